"""Splits, allocations and what a calibration holds."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from dipper.calibrate import allocate, calibrate, mean_loss, split_of  # noqa: E402
from dipper.errors import ConfigError  # noqa: E402
from dipper.methods import MethodConfig  # noqa: E402
from dipper.sparsify import sparsify_  # noqa: E402

pytestmark = pytest.mark.torch

FIELDS = {
    "name": "tiny",
    "architecture": "llama",
    "n_layers": 3,
    "hidden": 32,
    "intermediate": 80,
    "fingerprint": "f" * 64,
}


def model():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


def windows(n=6):
    return [torch.randint(3, 96, (1, 48), generator=torch.Generator().manual_seed(i)) for i in range(n)]


@given(st.floats(0.05, 1.0), st.floats(-0.3, 0.3))
def test_a_split_has_the_total_density(density, above):
    pair = split_of(density, above)
    if pair is not None:
        assert (2 * pair[0] + pair[1]) / 3 == pytest.approx(density)
        assert all(0 < d <= 1 for d in pair)


def test_allocation_is_the_best_of_all_on_convex_curves():
    grid = [0.25, 0.5, 0.75, 1.0]
    curves = np.array([[8.0, 3.0, 1.0, 0.0], [2.0, 1.0, 0.4, 0.0], [30.0, 12.0, 3.0, 0.0]])
    for total in (1.0, 1.5, 2.0, 2.25, 2.75):
        best = min(
            sum(curve[i] for curve, i in zip(curves, choice, strict=True))
            for choice in itertools.product(range(4), repeat=3)
            if sum(grid[i] for i in choice) <= total + 1e-9
        )
        found = allocate(curves, grid, total / 3)
        cost = sum(np.interp(d, grid, curve) for d, curve in zip(found, curves, strict=True))
        assert sum(found) == pytest.approx(total)
        assert cost <= best + 1e-9


def test_allocation_below_the_curves_is_refused():
    with pytest.raises(ConfigError, match=r"density 0\.1 is below the least that curves were measured at, 0\.25"):
        allocate(np.ones((2, 4)), [0.25, 0.5, 0.75, 1.0], 0.1)


def test_a_calibration_is_used_by_sparsify_and_is_no_worse_than_equal_densities(tmp_path):
    net, text = model(), windows()
    made = calibrate(net, text, model_fields=FIELDS, densities=[0.4, 0.6], norms=True, compensate=True)
    path = tmp_path / "tiny.npz"
    made.save(path)
    loaded = type(made).load(path)
    for density in (0.4, 0.6):
        table = loaded.densities(density)
        assert float((2 * table[:, 0] + table[:, 1]).mean() / 3) == pytest.approx(density, abs=0.02)
        losses = loaded.provenance["fit"][f"{density:g}"]["losses"]
        assert min(losses["equal"], losses["split"], losses["layers"]) >= losses["dense"] - 0.2
    # The file holds what the rule held.
    with sparsify_(net, MethodConfig("dip", density=0.6), fitted=loaded) as sparse:
        assert mean_loss(net, text[3:]) == pytest.approx(min(losses[name] for name in ("equal", "split", "layers")))
        for rule, factors, means, biases in zip(sparse.rules, loaded.factors, loaded.means, loaded.biases, strict=True):
            for ours, theirs in zip(
                (*rule.factors(), *rule.means(), *rule.mean_products()), (*factors, *means, *biases), strict=True
            ):
                np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    assert not any("forward" in vars(module) for module in net.modules())


def test_norms_and_means_are_used_only_where_they_help():
    made = calibrate(model(), windows(4), model_fields=FIELDS, densities=[0.5], by_layer=False)
    losses = made.provenance["fit"]["options"]
    assert set(losses) == {"plain", "plain means", "norms", "norms means"}
    best = min(losses, key=losses.get)
    assert (made.factors is not None) == best.startswith("norms")
    assert (made.means is not None) == best.endswith("means")


def test_bad_input():
    with pytest.raises(ConfigError, match="1 window of calibration text was given"):
        calibrate(model(), windows(1), model_fields=FIELDS, densities=[0.5])
    with pytest.raises(ConfigError, match="density is 1: tables are made for"):
        calibrate(model(), windows(2), model_fields=FIELDS, densities=[1.0])


def test_a_calibration_of_another_model_or_method_is_refused():
    made = calibrate(model(), windows(2), model_fields=FIELDS, densities=[0.5], by_layer=False)
    net = model()
    with pytest.raises(ConfigError, match=r"a calibration holds what dip and dip-ca need, and the method is wina"):
        sparsify_(net, MethodConfig("wina", density=0.5), fitted=made)
    with pytest.raises(ConfigError, match=r"has no densities for 0\.7: it has 0\.5"):
        sparsify_(net, MethodConfig("dip", density=0.7), fitted=made)
    del net.model.layers[2]
    with pytest.raises(ConfigError, match=r"tiny with 3 layers, and this model has 2: calibrate this model"):
        sparsify_(net, MethodConfig("dip", density=0.5), fitted=made)
