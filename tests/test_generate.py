import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dipper.errors import ConfigError, DipperError
from dipper.generate import Sampler, Sampling, StopScanner, stream_generate
from fakes import EOS, PREFILL_S, STEP_S, Clock, FakeEngine, FakeTokenizer

# ------------------------------------------------------------------------------------------------ Sampling


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature is -1.0; it must be 0 (greedy) or a positive number."),
        ({"temperature": float("nan")}, "temperature is nan; it must be 0 (greedy) or a positive number."),
        ({"temperature": 1.0, "top_k": 0}, "top_k is 0; it must be at least 1, or left out to keep every token."),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p is 0.0; it must be in (0, 1], or left out to keep every token."),
        ({"temperature": 1.0, "min_p": 1.0}, "min_p is 1.0; it must be in [0, 1), or left out to keep every token."),
        ({"seed": -1}, "seed is -1; it must be 0 or more."),
        (
            {"top_k": 4, "top_p": 0.5},
            "top_k, top_p would have no effect at temperature 0 (greedy); set a temperature, e.g. 0.7.",
        ),
    ],
)
def test_sampling_refuses(options, message):
    with pytest.raises(ConfigError) as error:
        Sampling(**options)
    assert str(error.value) == message


# ------------------------------------------------------------------------------------------------ Sampler


def reference_probabilities(logits, s):
    """The filters one after the other over the full sorted vocabulary."""
    order = np.lexsort((np.arange(len(logits)), -logits.astype(np.float64)))
    z = logits.astype(np.float64)[order] / s.temperature
    keep = np.ones(len(z), bool)
    if s.top_k is not None:
        keep[s.top_k :] = False
    p = np.where(keep, np.exp(z - z[0]), 0.0)
    p /= p.sum()
    if s.top_p is not None and s.top_p < 1:
        before = np.cumsum(p) - p
        keep &= before < s.top_p * p.sum()
        p = np.where(keep, p, 0.0)
    if s.min_p is not None:
        p = np.where(p >= s.min_p * p[0], p, 0.0)
    result = np.zeros(len(logits))
    result[order] = p / p.sum()
    return result


logit_rows = st.lists(st.integers(-40, 40), min_size=2, max_size=60).map(lambda v: np.array(v, np.float32) / 8)
filters = st.fixed_dictionaries(
    {"temperature": st.sampled_from([0.25, 1.0, 3.0])},
    optional={
        "top_k": st.integers(1, 70),
        "top_p": st.sampled_from([0.1, 0.5, 0.9, 0.999, 1.0]),
        "min_p": st.sampled_from([0.0, 0.05, 0.5]),
    },
)


@given(logit_rows, filters)
def test_filters_leave_what_the_full_sort_leaves(logits, options):
    sampler = Sampler(Sampling(**options))
    kept, weights = sampler._candidates(logits, float(logits.max()))
    got = np.zeros(len(logits))
    got[kept] = weights / weights.sum()
    wanted = reference_probabilities(logits, sampler.sampling)
    # A cumulative sum may fall on either side of top_p when it equals it; then one token of the edge may differ.
    if (got > 0).sum() == (wanted > 0).sum():
        np.testing.assert_allclose(got, wanted, rtol=1e-9, atol=1e-15)
    else:
        assert options.get("top_p", 1.0) < 1
        assert abs(int((got > 0).sum()) - int((wanted > 0).sum())) == 1
    assert np.all(np.diff(kept) > 0)


@given(logit_rows)
def test_greedy_takes_the_first_largest(logits):
    assert Sampler(Sampling())(logits) == int(np.flatnonzero(logits == logits.max())[0])


@given(logit_rows, st.integers(0, 5))
@settings(max_examples=30)
def test_the_same_seed_draws_the_same_tokens(logits, seed):
    draws = [[Sampler(Sampling(temperature=1.0, seed=seed))(logits) for _ in range(3)] for _ in range(2)]
    assert draws[0] == draws[1]


def test_draws_follow_the_probabilities():
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    sampler = Sampler(Sampling(temperature=1.0, seed=3))
    counts = np.bincount([sampler(logits) for _ in range(20_000)], minlength=4) / 20_000
    np.testing.assert_allclose(counts, [0.5, 0.3, 0.15, 0.05], atol=0.012)  # 3 sigma of 0.5 is 0.011


def test_filters_do_not_shift_the_random_stream():
    """Top-k of 1 draws the same numbers as no filter: the token after it is the same."""
    rows = [np.array([0.0, 5.0, 0.0], np.float32), np.array([1.0, 1.0, 1.0], np.float32)]
    free, tight = Sampler(Sampling(temperature=1.0, seed=1)), Sampler(Sampling(temperature=1.0, top_k=1, seed=1))
    free(rows[0]), tight(rows[0])
    assert free._random.random() == tight._random.random()


def test_huge_logits_do_not_overflow():
    logits = np.array([3e38, 2e38, -3e38], np.float32)
    assert Sampler(Sampling(temperature=0.01))(logits) == 0


def test_a_masked_vocabulary_never_gives_a_masked_token():
    logits = np.full(50, -np.inf, np.float32)
    logits[7] = 1.0
    sampler = Sampler(Sampling(temperature=2.0, top_p=0.9))
    assert {sampler(logits) for _ in range(20)} == {7}


def test_nucleus_wider_than_its_first_look():
    logits = np.zeros(5000, np.float32)
    kept, _ = Sampler(Sampling(temperature=1.0, top_p=0.5))._candidates(logits, 0.0)
    assert len(kept) == 2500
    assert kept[-1] == 2499  # ties: the lower ids


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_broken_logits_are_an_error(bad):
    with pytest.raises(DipperError, match=r"logits hold (nan|inf) at token 1: .* `dipper inspect`"):
        Sampler(Sampling())(np.array([0.0, bad, 1.0], np.float32))


# ------------------------------------------------------------------------------------------------ StopScanner


def scan(text, stop, cuts):
    """What a scanner shows of a text that comes in pieces, and whether it stopped."""
    scanner, edges = StopScanner(stop), [0, *sorted(cuts), len(text)]
    shown = "".join(scanner.feed(text[a:b]) for a, b in itertools.pairwise(edges))
    return shown + scanner.flush(), scanner.stopped


@given(
    st.text("ab", max_size=16),
    st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
    st.data(),
)
def test_stop_strings_cut_the_same_wherever_pieces_end(text, stop, data):
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=6))
    # The first stop string to be complete ends the text; of those, the longest.
    ends = [text[: i + 1] for i in range(len(text)) if any(text[: i + 1].endswith(s) for s in stop)]
    wanted = text if not ends else ends[0][: -max(len(s) for s in stop if ends[0].endswith(s))]
    assert scan(text, stop, cuts) == (wanted, bool(ends))


def test_a_stop_string_is_never_partly_shown():
    scanner = StopScanner(["<end>"])
    assert [scanner.feed(piece) for piece in ("a<", "e", "nx", "<en", "d>", "b")] == ["a", "", "<enx", "", "", ""]
    assert scanner.stopped
    assert scanner.flush() == ""


def test_held_text_comes_out_at_the_end():
    scanner = StopScanner(["<end>"])
    assert scanner.feed("a<en") == "a"
    assert scanner.flush() == "<en"


@pytest.mark.parametrize(
    ("stop", "message"),
    [
        ("ab", "stop is the string 'ab'; give a list of strings, e.g. ['ab']."),
        ([""], "A stop string is empty: it would stop before the first character. Leave it out."),
    ],
)
def test_stop_refuses(stop, message):
    with pytest.raises(ConfigError) as error:
        StopScanner(stop)
    assert str(error.value) == message


# ------------------------------------------------------------------------------------------------ stream_generate


def generate(script, prompt="hi", *, tokenizer=None, n=8, **options):
    """Steps of a generation whose engine says `script` (text, or token ids)."""
    tokenizer = tokenizer or FakeTokenizer()
    ids = tokenizer.ids(script) if isinstance(script, str) else script
    clock = Clock()
    engine = FakeEngine(ids, clock=clock, context=options.pop("context", 64))
    steps = stream_generate(
        engine, tokenizer, tokenizer.ids(prompt), max_new_tokens=n, clock=clock, **options
    )  # fmt: skip
    return engine, list(steps)


def test_generates_until_the_length():
    engine, steps = generate("abcdef", n=4)
    assert "".join(s.text for s in steps) == "abcd" == steps[-1].record.text
    assert [s.finish_reason for s in steps] == [None, None, None, "length"]
    assert [s.record is None for s in steps] == [True, True, True, False]
    assert engine.n_past == 2 + 3  # the last token is never fed back


def test_measures_what_records_define():
    _, steps = generate("abcdef", n=5)
    record = steps[-1].record
    assert (record.n_tokens, record.n_prompt) == (5, 2)
    assert record.ttft_s == pytest.approx(PREFILL_S)
    assert record.decode_s == pytest.approx(4 * STEP_S)
    assert record.tok_per_s == pytest.approx(1 / STEP_S)
    assert record.flash_bytes_per_token == 12288  # the prefill's reads are not in it
    assert sum(record.ledger_s.values()) == pytest.approx(record.decode_s)


def test_ends_at_the_end_of_text():
    tokenizer = FakeTokenizer()
    _, steps = generate([*tokenizer.ids("ab"), EOS, *tokenizer.ids("c")])
    assert steps[-1].finish_reason == "stop"
    assert steps[-1].token == EOS
    assert steps[-1].record.text == "ab"
    assert steps[-1].record.n_tokens == 3


def test_can_ignore_the_end_of_text():
    tokenizer = FakeTokenizer()
    _, steps = generate([*tokenizer.ids("ab"), EOS, *tokenizer.ids("c")], n=4, ignore_eos=True)
    assert (steps[-1].finish_reason, steps[-1].record.text) == ("length", "abc")


def test_ends_at_a_stop_string_across_tokens():
    _, steps = generate("ab cd ef", stop=["cd e"], n=20)
    assert [s.text for s in steps] == ["a", "b", " ", "", "", "", ""]
    assert (steps[-1].finish_reason, steps[-1].record.text) == ("stop", "ab ")


def test_text_held_for_a_stop_string_comes_with_the_last_step():
    _, steps = generate("ab cd", stop=["cde"], n=5)
    assert [s.text for s in steps] == ["a", "b", " ", "", "cd"]
    assert steps[-1].finish_reason == "length"


def test_ends_when_the_context_is_full():
    engine, steps = generate("abcdefgh", context=5, n=100)
    assert steps[-1].finish_reason == "context"
    assert engine.n_past == 5
    assert steps[-1].record.n_tokens == 4


def test_a_character_of_two_tokens_is_shown_once_it_is_whole():
    tokenizer = FakeTokenizer([b"\xc3", b"\xa9"])
    half, rest = len(tokenizer.pieces) - 2, len(tokenizer.pieces) - 1
    _, steps = generate([half, rest, half], tokenizer=tokenizer, n=3)
    assert [s.text for s in steps] == ["", "é", "\ufffd"]


def test_one_token_needs_no_step():
    engine, steps = generate("abc", n=1)
    assert (len(steps), steps[0].text, steps[0].finish_reason) == (1, "a", "length")
    assert steps[0].record.tok_per_s is None
    assert engine.n_past == 2


def test_sampled_text_follows_the_seed():
    texts = [
        generate("abc", n=20, sampling=Sampling(temperature=4.0, seed=seed))[1][-1].record.text for seed in (0, 0, 1)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_a_generation_continues_what_is_held():
    tokenizer, engine = FakeTokenizer(), FakeEngine([3, 4, 5])
    for _ in range(2):
        steps = list(stream_generate(engine, tokenizer, [6, 7], max_new_tokens=2))
    assert engine.held == [6, 7, 3, 6, 7, 5]
    assert steps[-1].record.n_prompt == 2


@pytest.mark.parametrize(
    ("prompt", "n", "message"),
    [
        ([], 4, "The prompt has no tokens; write at least one word."),
        ([3], 0, "0 new tokens were asked for; at least 1 is needed."),
        ([3] * 9, 4, "The prompt has 9 tokens, but the context is 8: shorten it or use --ctx 13."),
    ],
)
def test_arguments_are_checked_before_the_prefill(prompt, n, message):
    engine = FakeEngine([3], context=8)
    with pytest.raises(ConfigError) as error:
        stream_generate(engine, FakeTokenizer(), prompt, max_new_tokens=n)
    assert str(error.value) == message
    assert engine.calls == []


def test_a_prompt_as_long_as_the_context_gives_one_token():
    _, steps = generate("abc", prompt="hhhhh", context=5)
    assert [s.finish_reason for s in steps] == ["context"]
