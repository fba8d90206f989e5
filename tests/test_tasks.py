import json
import math

import pytest

from dipper.errors import ConfigError
from dipper.tasks import TASKS, Item, encode_pair, read_task, run_tasks, score_items


def encode(text):
    """Words with the space before them, as tokenizers cut; a space that stands alone is a token of its own."""
    ids, word = [], ""
    for c in text + "\0":
        if word and (c in " \0" or word[-1] == "\n"):
            ids.append(100 + sum(map(ord, word)) % 900)
            word = ""
        word += c
    return ids


class FakeScorer:
    """The likelihood of a continuation is minus its number of tokens; greedy where that is one."""

    def __init__(self):
        self.pairs = []

    def score_pairs(self, pairs, progress=None):
        self.pairs += pairs
        return [(-float(sum(after)), len(after) == 1) for _, after in pairs]


@pytest.fixture
def data(tmp_path):
    def write(name, rows):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    choices = [{"text": t, "label": k} for t, k in (("a fish", "1"), ("two birds", "2"), ("x", "3"))]
    arc = [{"question": {"stem": f"What is {i}?", "choices": choices}, "answerKey": "2"} for i in range(5)]
    write("arc_easy_test.jsonl", arc)
    write("arc_challenge_test.jsonl", arc)
    write("piqa_valid.jsonl", [{"goal": "sit", "sol1": "stand", "sol2": "chair"}] * 2)
    (tmp_path / "piqa_valid-labels.lst").write_text("1\n0\n")
    write("hellaswag_val_first2.jsonl", [{"ctx": "Run: he", "endings": ["a b", "c"], "label": 1}])
    write("lambada_openai_test.jsonl", [{"text": "one two\nthree four"}, {"text": "so it was him"}])
    for part, n in (("test", 2), ("dev", 5)):
        folder = tmp_path / "mmlu" / part
        folder.mkdir(parents=True)
        rows = "".join(f'"Q{i}, {part}? ",w,x,y,z,{"ABCDA"[i]}\n' for i in range(n))
        (folder / f"high_school_art_{part}.csv").write_text(rows)
    return tmp_path


# ------------------------------------------------------------------------------------------------ items


@pytest.mark.parametrize(
    ("name", "item"),
    [
        ("arc_easy", Item("Question: What is 0?\nAnswer:", (" a fish", " two birds", " x"), 1)),
        ("piqa", Item("Question: sit\nAnswer:", (" stand", " chair"), 1)),
        ("hellaswag", Item("Run: he", (" a b", " c"), 1)),
        ("lambada_openai", Item("one two\nthree", (" four",), None)),
        (
            "mmlu",
            Item(
                "The following are multiple choice questions (with answers) about high school art.\n\n"
                "Q0, test?\nA. w\nB. x\nC. y\nD. z\nAnswer:",
                (" A", " B", " C", " D"),
                0,
            ),
        ),
    ],
)
def test_prompts(data, name, item):
    assert read_task(name, data)[0] == item


def test_shots_are_answered_questions(data):
    context = read_task("mmlu", data, shots=2)[1].context
    assert context.split("\n\n")[1:] == [
        "Q0, dev?\nA. w\nB. x\nC. y\nD. z\nAnswer: A",
        "Q1, dev?\nA. w\nB. x\nC. y\nD. z\nAnswer: B",
        "Q1, test?\nA. w\nB. x\nC. y\nD. z\nAnswer:",
    ]


def test_limits_and_seeds(data):
    every = read_task("arc_easy", data)
    assert read_task("arc_easy", data, limit=2) == every[:2]
    drawn = read_task("arc_easy", data, limit=3, seed=4)
    assert drawn == read_task("arc_easy", data, limit=3, seed=4)
    assert [every.index(item) for item in drawn] == sorted(every.index(item) for item in drawn)
    assert len({tuple(i.context for i in read_task("arc_easy", data, limit=3, seed=s)) for s in range(9)}) > 1


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("arc", {}, "There is no task 'arc'; the tasks are arc_easy, arc_challenge, piqa,"),
        ("piqa", {"shots": 2}, "piqa is asked without examples"),
        ("piqa", {"limit": 0}, "The limit is 0; at least 1 item"),
    ],
)
def test_what_cannot_be_asked(data, name, options, message):
    with pytest.raises(ConfigError, match=message):
        read_task(name, data, **options)


def test_files_that_are_absent_or_broken(data):
    with pytest.raises(ConfigError, match=r"There is no .*none.arc_easy_test\.jsonl, which arc_easy is read from"):
        read_task("arc_easy", data / "none")
    (data / "arc_easy_test.jsonl").write_text('{"question": {}}\n')
    (data / "piqa_valid-labels.lst").write_text("1\n")
    with pytest.raises(ConfigError, match=r"arc_easy_test\.jsonl is not as arc_easy needs it \(KeyError: 'choices'\)"):
        read_task("arc_easy", data)
    with pytest.raises(ConfigError, match=r"piqa_valid\.jsonl is not as piqa needs it \(ValueError"):
        read_task("piqa", data)


# ------------------------------------------------------------------------------------------------ scores


def test_pairs_are_cut_where_the_context_ends():
    assert encode_pair(encode, "a b", " c", bos_id=None, empty_id=7) == (encode("a b"), encode(" c"))
    assert encode_pair(encode, "a b", " c", bos_id=1, empty_id=7) == ([1, *encode("a b")], encode(" c"))


def test_spaces_go_to_the_continuation():
    assert encode_pair(encode, "a b ", "c", bos_id=None, empty_id=7) == (encode("a b"), encode(" c"))


def test_an_empty_context_is_an_id():
    assert encode_pair(encode, "", "c", bos_id=None, empty_id=7) == ([7], encode("c"))
    assert encode_pair(encode, "", "c", bos_id=1, empty_id=7) == ([1], encode("c"))
    assert encode_pair(encode, "  ", "c", bos_id=None, empty_id=7) == ([7], encode("  c"))


def test_a_token_over_the_border_is_scored():
    assert encode_pair(encode, "a b", "c", bos_id=None, empty_id=7) == (encode("a"), encode(" bc"))


class Scripted:
    def __init__(self, *likelihoods):
        self.likelihoods = likelihoods

    def score_pairs(self, pairs, progress=None):
        return [(value, value > -1.5) for value in self.likelihoods]


def test_choices_by_likelihood_and_by_length():
    items = [Item("q", (" ab", " abcdef"), 1), Item("q", (" ab", " abcdef"), 0)]
    figures = score_items(items, Scripted(-4.0, -6.0, -1.0, -9.0), encode)
    assert figures == {
        "n": 2,
        "acc": 0.5, "acc_stderr": pytest.approx(0.5),  # only the second by likelihood
        "acc_norm": 1.0, "acc_norm_stderr": 0.0,  # -2 and -1; -0.5 and -1.5 a character
    }  # fmt: skip


def test_last_words():
    items = [Item("q", (" a",), None)] * 2
    figures = score_items(items, Scripted(-1.0, -3.0), encode)
    assert figures["acc"] == 0.5
    assert figures["perplexity"] == pytest.approx(math.exp(2.0))
    assert figures["perplexity_stderr"] == pytest.approx(math.exp(2.0))  # times the error 1 of the mean


def test_tasks_that_are_done_are_not_run_again(data, tmp_path):
    options = {"config": {"model": "a"}, "head": {"method": "dip"}, "out": tmp_path / "r.json"}
    first, second, third = FakeScorer(), FakeScorer(), FakeScorer()
    run_tasks(["piqa"], data, first, encode, **options)
    result = run_tasks(["piqa", "arc_easy"], data, second, encode, **options)
    assert (len(first.pairs), len(second.pairs)) == (4, 15)
    assert (list(result["tasks"]), result["method"], result["schema"]) == (
        ["piqa", "arc_easy"], "dip", "dipper-tasks/1",
    )  # fmt: skip
    assert json.loads((tmp_path / "r.json").read_text()) == result
    with pytest.raises(ConfigError, match=r"another configuration \(limit None, not 1\); give another --out"):
        run_tasks(["piqa"], data, third, encode, **options, limit=1)


# ------------------------------------------------------------------------------------------------ the harness


@pytest.mark.filterwarnings("ignore")
@pytest.mark.torch
def test_the_harness_comes_to_the_same(data):
    lm_eval = pytest.importorskip("lm_eval")
    pytest.importorskip("torch")
    from dipper.evaluate_torch import TorchScorer
    from dipper.lm_harness import DipperLM, local_tasks
    from dipper.methods import MethodConfig
    from dipper.sparsify import sparsify_
    from test_evaluate_torch import VOCAB, opened, tiny

    model = tiny()
    with sparsify_(model, MethodConfig("dip", density=0.5)) as sparsity:
        sparse = opened(model, sparsity)
        sparse.loaded.encode = lambda text: [i % VOCAB for i in encode(text)]
        found = lm_eval.simple_evaluate(
            model=DipperLM(opened=sparse, batch_size=4), tasks=local_tasks(list(TASKS), str(data)),
            bootstrap_iters=0, log_samples=False,
        )["results"]  # fmt: skip
        for name in TASKS:
            ours = score_items(read_task(name, data), TorchScorer(sparse, batch=4), sparse.loaded.encode)
            theirs = found[f"local_{name}"]
            for key in ours.keys() & {"acc", "acc_norm", "perplexity"}:
                assert theirs[f"{key},none"] == pytest.approx(ours[key], rel=1e-6), (name, key)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.torch
def test_the_adapter_scores_texts_and_generates():
    pytest.importorskip("lm_eval")
    torch = pytest.importorskip("torch")
    from types import SimpleNamespace

    from dipper.lm_harness import DipperLM
    from dipper.methods import MethodConfig
    from dipper.sparsify import sparsify_
    from test_evaluate_torch import log_probs, opened, tiny

    model = tiny()
    with sparsify_(model, MethodConfig("dense")) as sparsity:
        sparse = opened(model, sparsity, bos_id=1)
        sparse.loaded.tokenizer = SimpleNamespace(eos_ids=[2], decode=lambda ids: "".join(map(chr, ids)))
        lm = DipperLM(opened=sparse, batch_size="auto", max_length=64)
        ids = sparse.loaded.encode("some text")
        q = log_probs(model, [1, *ids])[:-1]
        (whole,) = lm.loglikelihood_rolling([SimpleNamespace(args=("some text",))], disable_tqdm=True)
        assert whole == pytest.approx(float(q.gather(1, torch.tensor(ids)[:, None]).sum()), rel=1e-5)

        def generate(**settings):
            (text,) = lm.generate_until([SimpleNamespace(args=("some text", settings))], disable_tqdm=True)
            return text

        text = generate(until=[], max_gen_toks=6)
        held = [1, *ids]
        for c in text:
            assert int(log_probs(model, held)[-1].argmax()) == ord(c)
            held.append(ord(c))
        assert generate(until=text[2], max_gen_toks=6) == text[: text.index(text[2])]
        with pytest.raises(ConfigError, match="Only greedy generation"):
            generate(do_sample=True)
