"""The references themselves: a bundle's model in transformers is the checkpoint's, and plain DIP is what it claims."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from tiny import CONFIGS, save_with_transformers

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from dipper.bundle import Bundle, pack  # noqa: E402
from dipper.torch_model import hf_model_from_bundle  # noqa: E402
from reference import (  # noqa: E402
    closed_loop_mask,
    dip,
    n_selected,
    nll_of,
    reference_logits,
    reference_nll,
    top_k_mask,
)

pytestmark = pytest.mark.torch

N_TOKENS = 48  # several sliding windows of the tiny models


def tokens(n: int, vocab_size: int, seed: int = 3) -> list[int]:
    return np.random.default_rng(seed).integers(0, vocab_size, n).tolist()


@pytest.mark.parametrize("kind", CONFIGS)
def test_model_from_a_bundle_is_the_checkpoint(kind, tmp_path):
    folder = save_with_transformers(tmp_path / kind, kind)
    bundle = Bundle.open(pack(folder, tmp_path / "bundle.dipper", tokenizer=False))
    ids = tokens(N_TOKENS, bundle.model.vocab_size)
    original = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    expected = reference_logits(original.eval(), ids)
    got = reference_logits(hf_model_from_bundle(bundle, context=len(ids)), ids)
    assert np.abs(got - expected).max() <= 1e-5 * np.abs(expected).max()


def test_top_k_keeps_the_largest_and_ties_go_to_the_lower_index():
    rows = np.array([[1, -3, 2, 3, 0], [1, 1, 1, 1, 1], [0, 0, -0.0, 5, 0]], np.float32)
    assert top_k_mask(rows, 2).astype(int).tolist() == [[0, 1, 0, 1, 0], [1, 1, 0, 0, 0], [1, 0, 0, 1, 0]]


def test_top_k_equals_a_stable_sort():
    rng = np.random.default_rng(0)
    rows = rng.integers(-6, 7, (200, 37)).astype(np.float32)  # few values: many ties
    for k in (1, 5, 36, 37):
        expected = np.zeros(rows.shape, bool)
        order = np.argsort(-np.abs(rows), axis=1, kind="stable")[:, :k]
        np.put_along_axis(expected, order, True, axis=1)
        assert np.array_equal(top_k_mask(rows, k), expected)


def test_nan_scores_are_refused():
    with pytest.raises(ValueError, match="NaN"):
        top_k_mask(np.array([[0.0, np.nan]], np.float32), 1)


@pytest.mark.parametrize(("density", "n", "k"), [(0.5, 3, 2), (0.5, 5, 3), (1e-9, 10, 1), (1.0, 7, 7), (0.7, 576, 403)])
def test_columns_of_a_density(density, n, k):
    assert n_selected(density, n) == k


def test_cache_aware_masks_prefer_what_is_cached():
    cache = SimpleNamespace(slots={2: 0}, step=lambda mask: seen.append(mask))
    seen: list[list[int]] = []
    masks = closed_loop_mask(np.array([[3, 1, 2, 0]], np.float32), k=1, gamma=0.5, cache=cache)
    assert masks.astype(int).tolist() == [[0, 0, 1, 0]]
    assert seen == [[2]]


@pytest.mark.parametrize("kind", ["llama", "phi3", "gemma3"])
def test_dip_is_dense_at_density_one_and_repeats_with_its_own_masks(kind, tmp_path):
    folder = save_with_transformers(tmp_path / kind, kind)
    bundle = Bundle.open(pack(folder, tmp_path / "bundle.dipper", tokenizer=False))
    model = hf_model_from_bundle(bundle, context=N_TOKENS)
    ids = tokens(N_TOKENS, bundle.model.vocab_size)
    dense = reference_logits(model, ids)
    with dip(model):
        assert np.array_equal(reference_logits(model, ids), dense)
    with dip(model, d_in=0.5, d_glu=0.3) as run:
        pruned = reference_logits(model, ids)
    assert not np.allclose(pruned, dense)
    sizes = {
        (int(k_in), int(k_glu))
        for m_in, m_glu in run.masks
        for k_in, k_glu in zip(m_in.sum(1), m_glu.sum(1), strict=True)
    }
    assert sizes == {(n_selected(0.5, bundle.model.hidden_size), n_selected(0.3, bundle.model.intermediate_size))}
    with dip(model, forced=run.masks):
        assert np.array_equal(reference_logits(model, ids), pruned)
    assert np.array_equal(reference_logits(model, ids), dense)  # the model is as before


def test_nll_is_that_of_the_logits(tmp_path):
    folder = save_with_transformers(tmp_path / "llama", "llama")
    bundle = Bundle.open(pack(folder, tmp_path / "bundle.dipper", tokenizer=False))
    model = hf_model_from_bundle(bundle, context=N_TOKENS)
    ids = tokens(N_TOKENS, bundle.model.vocab_size)
    logits = reference_logits(model, ids).astype(np.float64)
    probabilities = np.exp(logits - logits.max(1, keepdims=True))
    probabilities /= probabilities.sum(1, keepdims=True)
    expected = -np.log(probabilities[np.arange(N_TOKENS - 1), ids[1:]])
    assert np.allclose(reference_nll(model, ids), expected)
    assert np.allclose(nll_of(logits[:-1], ids[1:]), expected)
