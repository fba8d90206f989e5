import hashlib
import json
import math
from pathlib import Path

import numpy as np
import pytest

from dipper import engine as engine_module
from dipper import tokenizer as tokenizer_module
from dipper.engine import EngineConfig
from dipper.errors import ConfigError, DipperError
from dipper.evaluate import (
    ResultFile,
    cut_windows,
    read_text,
    recovered,
    relative_change,
    wikitext_rows_joined,
)
from dipper.evaluate_engine import evaluate_bundle, perplexity
from dipper.records import EvalRecord
from fakes import BOS, FakeEngine, FakeTokenizer


def by_token(ids):
    """A loss that depends on the token alone: perplexities can be told in advance."""
    return [t / 10 for t in ids[1:]]


# ------------------------------------------------------------------------------------------------ text


def test_wikitext_rows_are_joined_by_blank_lines(tmp_path):
    file = tmp_path / "wiki.test.raw"
    file.write_bytes(b" \n = Title = \n \n Text\x0cmore \n")
    assert wikitext_rows_joined(file) == "\n\n = Title = \n\n\n\n\n Text\x0cmore \n"


@pytest.mark.parametrize(
    ("name", "asked", "joined"),
    [("wiki.test.raw", None, True), ("a.txt", None, False), ("a.txt", True, True), ("wiki.test.raw", False, False)],
)
def test_rows_are_joined_by_name_or_request(tmp_path, name, asked, joined):
    (tmp_path / name).write_bytes(b"a\r\nb\r\n")
    source = read_text(tmp_path / name, asked)
    assert source.rows_joined is joined
    assert source.text == ("a\n\n\nb\n" if joined else "a\nb\n")
    assert source.sha256 == hashlib.sha256(source.text.encode()).hexdigest()


def test_text_that_cannot_be_read(tmp_path):
    (tmp_path / "empty").write_text(" \n")
    (tmp_path / "latin").write_bytes(b"caf\xe9 au lait")
    with pytest.raises(ConfigError, match=r"empty holds no text"):
        read_text(tmp_path / "empty")
    with pytest.raises(ConfigError, match=r"latin is not UTF-8 text \(byte 3: .*\); convert it first"):
        read_text(tmp_path / "latin")
    with pytest.raises(ConfigError, match=r"There is no file .*none; give a text to score with --text FILE"):
        read_text(tmp_path / "none")


# ------------------------------------------------------------------------------------------------ windows


def test_windows_do_not_overlap_and_the_rest_is_dropped():
    assert cut_windows(range(10, 21), 4) == [[10, 11, 12, 13], [14, 15, 16, 17]]


def test_bos_stands_before_every_window():
    assert cut_windows(range(10, 17), 4, bos_id=1) == [[1, 10, 11, 12], [1, 13, 14, 15]]


def test_limit_counts_positions():
    assert len(cut_windows(range(100), 4, limit=11)) == 2
    assert len(cut_windows(range(100), 4, limit=12, bos_id=1)) == 3


def test_a_short_text_is_one_window():
    assert cut_windows([5, 6, 7], 1024) == [[5, 6, 7]]
    assert cut_windows([5], 1024, bos_id=1) == [[1, 5]]


@pytest.mark.parametrize(
    ("tokens", "window", "limit", "message"),
    [
        ([1, 2, 3], 1, None, "The window is 1; it must be at least 2, one token to score and one before it."),
        ([1], 4, None, "The text has 1 tokens; at least 2 are needed to score one."),
        (
            [1] * 9, 4, 3,
            "3 tokens do not fill one window of 4; use more --tokens or a smaller --window.",
        ),
    ],
)  # fmt: skip
def test_windows_refuse(tokens, window, limit, message):
    with pytest.raises(ConfigError) as error:
        cut_windows(tokens, window, limit=limit)
    assert str(error.value) == message


# ------------------------------------------------------------------------------------------------ perplexity


def test_perplexity_is_that_of_the_scored_tokens():
    engine = FakeEngine(losses=by_token)
    result = perplexity(engine, [1, 2, 3, 4, 5, 6, 7, 8], window=4)
    scored = [2, 3, 4, 6, 7, 8]  # the first of each window is not
    assert result.n_tokens == 6
    assert result.nll_per_token == pytest.approx(np.mean(scored) / 10)
    assert result.perplexity == pytest.approx(math.exp(np.mean(scored) / 10))
    assert result.tokens_sha256 == hashlib.sha256(np.arange(1, 9, dtype="<i4").tobytes()).hexdigest()


def test_bos_is_not_scored_and_not_in_the_checksum():
    engine = FakeEngine(losses=by_token)
    result = perplexity(engine, [3, 4, 5, 6, 7, 8], window=4, bos_id=BOS)
    assert [c for c in engine.calls if c[0] == "score"] == [("score", [BOS, 3, 4, 5]), ("score", [BOS, 6, 7, 8])]
    assert result.n_tokens == 6
    assert result.nll_per_token == pytest.approx(np.mean([3, 4, 5, 6, 7, 8]) / 10)
    assert result.tokens_sha256 == hashlib.sha256(np.arange(3, 9, dtype="<i4").tobytes()).hexdigest()


def test_every_window_starts_cold():
    engine = FakeEngine(losses=by_token)
    perplexity(engine, [1, 2, 3, 4], window=2)
    assert engine.calls == ["reset", "reset_cache", ("score", [1, 2]), "reset", "reset_cache", ("score", [3, 4])]


def test_counters_cover_all_windows():
    result = perplexity(FakeEngine(losses=by_token), list(range(12)), window=4)
    assert (result.traffic.n_tokens, result.traffic.hits) == (9, 63)


def test_error_bar_is_seeded_and_close_to_theory():
    random = np.random.default_rng(5)
    tokens = [int(t) for t in random.integers(0, 20, 4000)]
    results = [perplexity(FakeEngine(losses=by_token), tokens, window=40, seed=seed) for seed in (0, 0, 1)]
    assert results[0].stderr == results[1].stderr != results[2].stderr
    # The delta method: perplexity times the standard error of the mean loss of 3900 independent tokens.
    theory = results[0].perplexity * np.std(np.arange(20) / 10) / math.sqrt(3900)
    assert results[0].stderr == pytest.approx(theory, rel=0.25)
    low, high = results[0].ci95
    assert low < results[0].perplexity < high


def test_one_window_has_no_error_bar():
    result = perplexity(FakeEngine(losses=by_token), [1, 2, 3], window=3)
    assert (result.stderr, result.ci95) == (None, None)


def test_the_change_is_of_paired_windows():
    tokens = [int(t) for t in np.random.default_rng(5).integers(0, 20, 400)]
    dense = perplexity(FakeEngine(losses=by_token), tokens, window=40)
    pruned = perplexity(FakeEngine(losses=lambda ids: [x + 0.1 for x in by_token(ids)]), tokens, window=40)
    change = relative_change(pruned, dense)
    assert change["relative"] == pytest.approx(math.expm1(0.1))
    assert change["relative_stderr"] == pytest.approx(0.0, abs=1e-12)  # the same shift in every window
    other = perplexity(FakeEngine(losses=by_token), tokens[1:], window=40)
    with pytest.raises(ConfigError, match="different tokens; they cannot be compared"):
        relative_change(pruned, other)


def test_a_broken_score_is_an_error():
    engine = FakeEngine(losses=lambda ids: [0.0, math.nan])
    with pytest.raises(DipperError, match=r"score of token 2 of a window is nan: .* `dipper inspect`"):
        perplexity(engine, [1, 2, 3], window=3)


def test_a_window_wider_than_the_context_is_an_error():
    with pytest.raises(ConfigError, match=r"The window is 65, the context 64; use --window 64"):
        perplexity(FakeEngine(losses=by_token), [3] * 100, window=65)


# ------------------------------------------------------------------------------------------------ evaluate_bundle


@pytest.fixture
def opened(monkeypatch):
    """Engines that `evaluate_bundle` opens, in order; dense ones score 0.1 less per token."""
    engines = []

    def open_engine(path, config, on_plan=None):
        shift = 0.0 if config.prunes else -0.1
        engine = FakeEngine(losses=lambda ids: [x + shift for x in by_token(ids)], config=config, path=path)
        engines.append(engine)
        return engine

    monkeypatch.setattr(engine_module.Engine, "open", open_engine)
    monkeypatch.setattr(tokenizer_module.Tokenizer, "open", lambda path: FakeTokenizer(bos_id=BOS))
    return engines


def test_a_bundle_is_scored_with_its_bos(opened, tmp_path):
    (tmp_path / "t.txt").write_text("abcdefghi")
    record = evaluate_bundle("m.dipper", tmp_path / "t.txt", [EngineConfig(context=4)], window=4)
    assert (record.bos_id, record.n_tokens, record.n_windows) == (BOS, 9, 3)
    assert record.nll_per_token == pytest.approx(np.mean(np.arange(3, 12)) / 10)
    assert record.hit_rate == pytest.approx(0.7)
    assert (record.flash_bytes_per_token, record.useful_bytes_per_token, record.reads_per_token) == (None, None, None)
    assert record.against is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache": "static"}, r"windows have no prompt, .* use --cache lru, lfu or lfu-decay"),
        ({"trace": Path("t.trace")}, r"t\.trace.* leave it out, or use `dipper run --trace`"),
    ],
)
def test_what_would_measure_nothing_is_refused(opened, tmp_path, options, message):
    (tmp_path / "t.txt").write_text("abcdefghi")
    with pytest.raises(ConfigError, match=message):
        evaluate_bundle("m.dipper", tmp_path / "t.txt", [EngineConfig(context=4, **options)], window=4)
    assert opened == []


def test_two_engines_are_compared_one_after_the_other(opened, tmp_path):
    (tmp_path / "t.txt").write_text("abcdefghi")
    configs = [EngineConfig(method="dip", context=4), EngineConfig(method="dense-stream", context=4)]
    record = evaluate_bundle("m.dipper", tmp_path / "t.txt", configs, window=4)
    assert record.against["relative"] == pytest.approx(math.expm1(0.1))
    assert record.against["record"]["method"] == "dense-stream"
    assert [e.calls[-1] for e in opened] == ["close", "close"]


def test_a_text_shorter_than_a_window_is_refused(opened, tmp_path):
    (tmp_path / "t.txt").write_text("abc")
    with pytest.raises(
        ConfigError, match=r"t\.txt has 3 tokens, less than one window of 9; use --window 4 or a longer"
    ):
        evaluate_bundle("m.dipper", tmp_path / "t.txt", [EngineConfig(context=9)], window=9)
    assert opened == []


# ------------------------------------------------------------------------------------------------ results on disk


def test_an_interrupted_comparison_continues(opened, tmp_path, monkeypatch):
    (tmp_path / "t.txt").write_text("abcdefghi")
    configs = [EngineConfig(method="dip", context=4), EngineConfig(method="dense-stream", context=4)]
    options = {"window": 4, "out": tmp_path / "r.json"}
    whole = evaluate_bundle("m.dipper", tmp_path / "t.txt", configs, window=4)
    score, calls = FakeEngine.score, []

    def fails_at_the_fifth(self, ids):
        calls.append(ids)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return score(self, ids)

    monkeypatch.setattr(FakeEngine, "score", fails_at_the_fifth)
    with pytest.raises(KeyboardInterrupt):
        evaluate_bundle("m.dipper", tmp_path / "t.txt", configs, **options)
    record = evaluate_bundle("m.dipper", tmp_path / "t.txt", configs, **options)
    assert len(calls) == 7  # two engines with three windows each, and the one that failed
    assert (record.window_nll, record.hit_rate) == (whole.window_nll, whole.hit_rate)
    assert record.against["relative"] == whole.against["relative"]
    again = evaluate_bundle("m.dipper", tmp_path / "t.txt", configs, **options)
    assert len(calls) == 7
    assert again == EvalRecord.from_dict(json.loads(json.dumps(record.as_dict())))
    with pytest.raises(ConfigError, match=r"made with another configuration \(methods .*give another --out"):
        evaluate_bundle("m.dipper", tmp_path / "t.txt", configs[:1], **options)


def test_a_file_that_is_no_result_is_left_alone(tmp_path):
    (tmp_path / "r.json").write_text("[1]")
    with pytest.raises(ConfigError, match=r"r\.json holds no result of dipper's; give another --out, or remove it"):
        ResultFile(tmp_path / "r.json", {})
    assert (tmp_path / "r.json").read_text() == "[1]"


def test_errors_of_nll_and_perplexity_belong_together():
    tokens = [int(t) for t in np.random.default_rng(5).integers(0, 20, 4000)]
    result = perplexity(FakeEngine(losses=by_token), tokens, window=40)
    assert result.stderr == pytest.approx(result.nll_stderr * result.perplexity, rel=0.01)
    assert result.against_dense("kl") == (None, None)
    assert result.dense() is None


def test_recovered_share_of_a_loss():
    counts = [10, 10, 10]
    dense, sparse = [10.0, 11.0, 12.0], [13.0, 14.0, 15.0]
    assert recovered(dense, sparse, dense, counts) == {"recovered": 1.0, "recovered_stderr": 0.0}
    assert recovered(dense, sparse, sparse, counts) == {"recovered": 0.0, "recovered_stderr": 0.0}
    found = recovered(dense, sparse, [11.0, 13.5, 12.5], counts)
    low, high, between = (math.exp(sum(nll) / 30) for nll in (dense, sparse, [11.0, 13.5, 12.5]))
    assert found["recovered"] == pytest.approx((high - between) / (high - low))
    assert 0 < found["recovered_stderr"] < 0.5
    assert recovered(sparse, dense, dense, counts) == {"recovered": None, "recovered_stderr": None}
    assert recovered([10.0], [13.0], [12.0], [10])["recovered_stderr"] is None
