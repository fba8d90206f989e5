import json
import math
from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from dipper.errors import ConfigError, DipperError  # noqa: E402
from dipper.evaluate_torch import Opened, TorchScorer, evaluate_torch, perplexity_torch  # noqa: E402
from dipper.methods import MethodConfig  # noqa: E402
from dipper.sparsify import sparsify_  # noqa: E402
from dipper.torch_model import LoadedModel  # noqa: E402

pytestmark = pytest.mark.torch

VOCAB = 300  # more than the rows of a chunk, and not a multiple of them


def tiny(kind="llama", **changes):
    torch.manual_seed(3)
    options = {
        "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
        "initializer_range": 0.3, "head_dim": 8, **changes,
    }  # fmt: skip
    config = transformers.AutoConfig.for_model(kind, **options)
    return transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


def opened(model, sparsity, bos_id=None):
    loaded = LoadedModel(model, lambda text: [ord(c) % VOCAB for c in text], bos_id, "tiny", "f" * 64)
    return Opened(loaded, sparsity, source="tiny", mlp_bytes=1000)


@pytest.fixture(params=["dense", "dip", "dip-ca"])
def sparse(request):
    options = {"dense": {}, "dip": {"density": 0.5}, "dip-ca": {"density": 0.5, "gamma": 0.5, "capacity": 0.5}}
    model = tiny()
    with sparsify_(model, MethodConfig(request.param, **options[request.param])) as sparsity:
        yield opened(model, sparsity)


def ids_of(n, seed=0):
    return [int(t) for t in np.random.default_rng(seed).integers(0, VOCAB, n)]


def log_probs(model, ids):
    """[T, V] fp64, all at once."""
    return torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0].double(), -1)


# ------------------------------------------------------------------------------------------------ windows


def test_sums_are_those_of_whole_logits(sparse):
    ids = ids_of(300)  # three chunks of rows
    (score,) = TorchScorer(sparse, against_dense=True).score([ids])
    sparse.sparsity.reset()
    q = log_probs(sparse.model, ids)[:-1]
    with sparse.sparsity.paused():
        p = log_probs(sparse.model, ids)[:-1]
    targets = torch.tensor(ids[1:])[:, None]
    assert score.tokens == 299
    assert score.nll == pytest.approx(-float(q.gather(1, targets).sum()), rel=1e-5)
    assert score.dense_nll == pytest.approx(-float(p.gather(1, targets).sum()), rel=1e-5)
    assert score.kl == pytest.approx(float((p.exp() * (p - q)).sum()), rel=1e-3, abs=1e-3)
    assert score.same_top1 == int((p.argmax(1) == q.argmax(1)).sum())
    name = sparse.sparsity.config.name
    assert score.touched == pytest.approx(1.0 if name == "dense" else 0.5, abs=0.01)
    assert (score.traffic.hit_rate is None) == (name != "dip-ca")


def test_dense_states_are_computed_once(sparse, monkeypatch):
    windows = [ids_of(40, seed) for seed in range(3)]
    expected = TorchScorer(sparse, against_dense=True).score(windows)
    shared = replace(sparse, dense_states={})
    assert TorchScorer(shared, against_dense=True).score(windows) == expected
    assert [states.shape for states in shared.dense_states.values()] == [(3, 39, sparse.model.config.hidden_size)]
    passes = []
    scorer = TorchScorer(shared, against_dense=True)
    monkeypatch.setattr(scorer, "_hidden", lambda ids, run=scorer._hidden: passes.append(ids) or run(ids))
    assert scorer.score(windows) == expected
    assert len(passes) == 1  # the method's own
    scorer.score([ids_of(40, 7)])
    assert len(passes) == 3  # of other ids both
    assert len(shared.dense_states) == 2


def test_a_batch_scores_what_its_windows_do_alone(sparse):
    tokens = ids_of(256)
    alone = perplexity_torch(sparse, tokens, window=64)
    together = perplexity_torch(sparse, tokens, window=64, batch=3)
    assert together.window_nll == pytest.approx(alone.window_nll, rel=1e-5)
    assert together.traffic == alone.traffic


@pytest.mark.parametrize("kind", ["gemma2", "qwen2", "gemma3_text"])
def test_heads_of_other_architectures(kind):
    changes = {"final_logit_softcapping": 5.0} if kind == "gemma2" else {}
    model = tiny(kind, **changes)
    with sparsify_(model, MethodConfig("dense")) as sparsity:
        (score,) = TorchScorer(opened(model, sparsity)).score([ids_of(20)])
        q = log_probs(model, ids_of(20))[:-1]
    assert score.nll == pytest.approx(-float(q.gather(1, torch.tensor(ids_of(20)[1:])[:, None]).sum()), rel=1e-5)


def test_a_head_that_is_not_understood_is_refused():
    model = tiny("granite", logits_scaling=7.0)
    with sparsify_(model, MethodConfig("dense")) as sparsity, pytest.raises(DipperError, match="logits of granite are"):
        TorchScorer(opened(model, sparsity))


def test_nan_names_the_module(sparse):
    if sparse.sparsity.config.name != "dense":
        pytest.skip("a pruning rule sees the NaN first")
    with torch.no_grad():
        sparse.model.model.layers[1].self_attn.o_proj.weight[0, 0] = math.nan
    message = r"NaN or infinite: model\.layers\.1\.self_attn\.o_proj is the first .* use --dtype fp32"
    with pytest.raises(DipperError, match=message):
        TorchScorer(sparse).score([ids_of(20)])
    with pytest.raises(DipperError, match=message):
        TorchScorer(sparse).score_pairs([(ids_of(4), ids_of(2))])


@pytest.mark.parametrize(
    ("options", "message"),
    [({"batch": 0}, "batch is 0"), ({"context": 513}, "context is 513; .* the model has 512")],
)
def test_bad_options(sparse, options, message):
    with pytest.raises(ConfigError, match=message):
        TorchScorer(sparse, **options)


# ------------------------------------------------------------------------------------------------ pairs


def test_pairs_in_any_order_and_batch(sparse):
    pairs = [(ids_of(n, n), ids_of(m, m)) for n, m in ((5, 2), (30, 1), (1, 7), (12, 3), (12, 3))]
    scored = TorchScorer(sparse, batch=2).score_pairs(pairs)
    for (context, after), (value, greedy) in zip(pairs, scored, strict=True):
        sparse.sparsity.reset()
        q = log_probs(sparse.model, context + after)[len(context) - 1 : -1]
        assert value == pytest.approx(float(q.gather(1, torch.tensor(after)[:, None]).sum()), rel=1e-4)
        assert greedy == (q.argmax(1).tolist() == after)


def test_greedy_is_seen(sparse):
    context = ids_of(8)
    sparse.sparsity.reset()
    best = int(log_probs(sparse.model, context)[-1].argmax())
    scored = TorchScorer(sparse).score_pairs([(context, [best]), (context, [(best + 1) % VOCAB])])
    assert [greedy for _, greedy in scored] == [True, False]


def test_a_long_context_loses_its_start(sparse):
    scorer = TorchScorer(sparse, context=8)
    context, after = ids_of(20), ids_of(3, 1)
    # Of 22 inputs the last 8 are seen.
    assert scorer.score_pairs([(context, after)]) == scorer.score_pairs([(context[-6:], after)])
    with pytest.raises(ConfigError, match="A continuation has 9 tokens, and the context is 8"):
        scorer.score_pairs([(context, ids_of(9))])


# ------------------------------------------------------------------------------------------------ evaluate_torch


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("The quick brown fox jumps over the lazy dog, again and again and again.")
    return path


def test_a_record_says_what_was_done(sparse, text):
    record = evaluate_torch(sparse, text, window=16, kl=True)
    assert (record.engine, record.device, record.dtype, record.n_windows) == ("torch", "cpu", "fp32", 4)
    assert record.perplexity == pytest.approx(math.exp(record.nll_per_token))
    assert record.mlp_bytes_per_token == pytest.approx(1000 * record.touched)
    assert record.against["record"]["method"] == "dense"
    line = json.loads(json.dumps(record.as_dict(), allow_nan=False))
    assert {"perplexity", "nll_stderr", "tokens", "density", "method"} <= set(line)
    assert type(record).from_dict(line) == record
    if record.method == "dense":
        assert (record.kl, record.same_top1, record.against["relative"]) == (pytest.approx(0, abs=1e-9), 1.0, 0.0)


def test_an_interrupted_run_continues(sparse, text, tmp_path, monkeypatch):
    whole = evaluate_torch(sparse, text, window=16)
    score, out = TorchScorer._score, tmp_path / "out.json"
    calls = []

    def fails_at_the_third(self, ids):
        calls.append(ids)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return score(self, ids)

    monkeypatch.setattr(TorchScorer, "_score", fails_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        evaluate_torch(sparse, text, window=16, out=out)
    assert len(json.loads(out.read_text())["parts"]["0"]["windows"]) == 2
    record = evaluate_torch(sparse, text, window=16, out=out)
    assert len(calls) == 5  # two, the one that failed, and the other two
    assert record.window_nll == whole.window_nll
    assert evaluate_torch(sparse, text, window=16, out=out) == record
    assert len(calls) == 5  # nothing is done again
    with pytest.raises(ConfigError, match=r"out\.json was made with another configuration \(.*window 16, not 32"):
        evaluate_torch(sparse, text, window=32, out=out)


def test_a_short_text_is_refused(sparse, text):
    with pytest.raises(ConfigError, match=r"t\.txt has 71 tokens, less than one window of 100; use --window 71"):
        evaluate_torch(sparse, text, window=100)
