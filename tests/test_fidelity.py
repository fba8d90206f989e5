"""The native engine against transformers in fp32: every architecture, on tiny random models, logit by logit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tiny import CONFIGS, save_with_transformers

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from dipper.bundle import Bundle, pack  # noqa: E402
from dipper.cache import ReferenceCache  # noqa: E402
from dipper.calibrate import calibrate  # noqa: E402
from dipper.calibration import model_fields  # noqa: E402
from dipper.engine import Engine, EngineConfig  # noqa: E402
from dipper.methods import MethodConfig  # noqa: E402
from dipper.sparsify import sparsify_  # noqa: E402
from dipper.torch_model import hf_model_from_bundle  # noqa: E402
from reference import dip, reference_logits, reference_nll  # noqa: E402

pytestmark = pytest.mark.torch

TOLERANCE = 1e-4  # max error / max logit; both sides are fp32 and sum in different orders
N_TOKENS = 48  # several sliding windows of the tiny models
KINDS_OF_MLP = ["llama", "qwen2", "qwen3", "phi3", "gemma3"]


def tokens(n: int, bundle: Bundle, seed: int = 3) -> list[int]:
    return np.random.default_rng(seed).integers(0, bundle.model.vocab_size, n).tolist()


def packed(tmp_path: Path, kind: str) -> tuple[Path, Bundle]:
    """(checkpoint folder, its bundle in the source's f32)."""
    folder = save_with_transformers(tmp_path / kind, kind)
    return folder, Bundle.open(pack(folder, tmp_path / f"{kind}.dipper", tokenizer=False))


def original_logits(folder: Path, ids: list[int]) -> np.ndarray:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return reference_logits(model.eval(), ids)


def open_engine(bundle: Bundle, method: str = "dense-resident", context: int = N_TOKENS, **config) -> Engine:
    if method != "dense-resident":
        config["mlp_dram"] = "80%"  # staging is a large share of an MLP this small
    return Engine.open(
        bundle.path, EngineConfig(**{"method": method, "context": context, "threads": 2, "kv": "f32"} | config)
    )


def assert_close(got: np.ndarray, expected: np.ndarray, tolerance: float = TOLERANCE) -> None:
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize("kind", CONFIGS)
def test_logits_are_those_of_the_checkpoint(kind, tmp_path):
    folder, bundle = packed(tmp_path, kind)
    ids = tokens(N_TOKENS, bundle)
    assert_close(open_engine(bundle).logits(ids), original_logits(folder, ids))


@pytest.mark.parametrize(("n_tokens", "context"), [(64, 64), (65, 65), (100, 128)])
def test_longrope_on_both_sides_of_its_original_context(n_tokens, context, tmp_path):
    folder, bundle = packed(tmp_path, "phi3")
    assert bundle.model.rope[0].original_context == 64
    ids = tokens(n_tokens, bundle)
    assert_close(open_engine(bundle, context=context).logits(ids), original_logits(folder, ids))


def test_the_two_sides_of_longrope_differ(tmp_path):
    _, bundle = packed(tmp_path, "phi3")
    ids = tokens(32, bundle)
    short, long = (open_engine(bundle, context=context).logits(ids) for context in (64, 128))
    assert np.abs(short - long).max() > 100 * TOLERANCE * np.abs(short).max()


@pytest.mark.parametrize("kind", CONFIGS)
def test_token_by_token_equals_a_block(kind, tmp_path):
    _, bundle = packed(tmp_path, kind)
    ids = tokens(N_TOKENS, bundle)
    engine = open_engine(bundle)
    block = engine.logits(ids)
    engine.reset()
    assert np.array_equal(np.stack([engine.step(token) for token in ids]), block)
    engine.reset()
    assert np.array_equal(engine.prefill(ids), block[-1])
    engine.reset()
    assert np.array_equal(np.concatenate([engine.logits(ids[:13]), engine.logits(ids[13:])]), block)


@pytest.mark.parametrize("kind", KINDS_OF_MLP)
def test_forced_masks_give_the_references_logits(kind, tmp_path):
    _, bundle = packed(tmp_path, kind)
    ids = tokens(N_TOKENS, bundle)
    model = hf_model_from_bundle(bundle, context=N_TOKENS)
    with dip(model, d_in=0.6, d_glu=0.4) as run:
        expected = reference_logits(model, ids)
    for method in ("dense-resident", "dip"):
        assert_close(open_engine(bundle, method).logits(ids, masks=run.masks), expected)


@pytest.mark.parametrize("kind", KINDS_OF_MLP)
def test_own_masks_give_the_references_logits(kind, tmp_path):
    _, bundle = packed(tmp_path, kind)
    ids = tokens(N_TOKENS, bundle)
    model = hf_model_from_bundle(bundle, context=N_TOKENS)
    with dip(model, d_in=0.6, d_glu=0.4):
        expected = reference_logits(model, ids)
    assert_close(open_engine(bundle, "dip", d_in=0.6, d_glu=0.4).logits(ids), expected)


@pytest.mark.parametrize("cache", ["lru", "lfu", "lfu-decay"])
def test_cache_aware_masks_give_the_references_logits(cache, tmp_path):
    _, bundle = packed(tmp_path, "llama")
    ids = tokens(N_TOKENS, bundle)
    engine = open_engine(bundle, "dip-ca", d_in=0.5, d_glu=0.5, gamma=0.5, cache=cache)
    caches = []
    regions = zip(bundle.header["regions"], engine.plan.options["capacity"], strict=True)
    for region, capacity in regions:
        assert 0 < capacity < region["n_columns"]
        caches.append(ReferenceCache(region["n_columns"], capacity, cache, engine.config.cache_decay))
    model = hf_model_from_bundle(bundle, context=N_TOKENS)
    with dip(model, d_in=0.5, d_glu=0.5, gamma=0.5, caches=list(zip(caches[::2], caches[1::2], strict=True))) as run:
        expected = reference_logits(model, ids)
    assert_close(engine.logits(ids), expected)
    assert engine.counters().hits == sum(c.hits for c in caches)
    with dip(model, d_in=0.5, d_glu=0.5) as plain:
        reference_logits(model, ids)
    assert any(not np.array_equal(a[0], b[0]) for a, b in zip(run.masks, plain.masks, strict=True))


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_scores_are_the_references(kind, tmp_path):
    _, bundle = packed(tmp_path, kind)
    ids = tokens(N_TOKENS, bundle)
    expected = reference_nll(hf_model_from_bundle(bundle, context=N_TOKENS), ids)
    assert np.allclose(open_engine(bundle).score(ids), expected, rtol=0, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("kind", ["llama", "phi3", "gemma3"])
@pytest.mark.parametrize("method", ["dip", "dip-ca"])
def test_one_calibration_for_engine_and_pytorch(kind, method, tmp_path):
    """Densities by layer, norms and means out of one file: the same logits, so the same masks."""
    _, bundle = packed(tmp_path, kind)
    model = hf_model_from_bundle(bundle, context=N_TOKENS)
    text = [torch.tensor([tokens(N_TOKENS, bundle, seed)]) for seed in range(4)]
    made = calibrate(
        model, text, model_fields=model_fields(bundle), densities=[0.6], norms=True, compensate=True, by_layer=True
    )
    made.save(tmp_path / "fit.npz")
    ids = tokens(N_TOKENS, bundle)
    options = {"gamma": 0.5, "cache": "lfu"} if method == "dip-ca" else {}
    engine = open_engine(bundle, method, density=0.6, calibration=tmp_path / "fit.npz", **options)
    config = MethodConfig(method, density=0.6, **({"gamma": 0.5, "capacity": 0.5} if method == "dip-ca" else {}))
    with sparsify_(model, config, fitted=type(made).load(tmp_path / "fit.npz")) as sparse:
        if method == "dip-ca":  # the engine's own slots, region by region
            share = iter(engine.plan.options["capacity"])
            for rule in sparse.rules:
                rule.slots = (next(share), next(share))
        expected = reference_logits(model, ids)
    assert_close(engine.logits(ids), expected)
