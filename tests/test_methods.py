"""Every pruning rule of the registry: what it keeps, counts and refuses; selection against the definition."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from dipper.cache import n_selected, reference_refine, reference_top_k  # noqa: E402
from dipper.errors import ConfigError  # noqa: E402
from dipper.grid import dequantise, quantise  # noqa: E402
from dipper.layout import columns_per_unit  # noqa: E402
from dipper.methods import METHODS, Glu, Method, MethodConfig  # noqa: E402
from dipper.requantise import requantise  # noqa: E402
from dipper.selector import Selector, top_k_mask  # noqa: E402

pytestmark = pytest.mark.torch

D, I = 32, 80  # noqa: E741
EXTRA = {"dip-ca": {"capacity": 0.5, "gamma": 0.5}}
FULL = ("dense", "resident")  # these use every weight


@pytest.fixture(autouse=True)
def _short_training(monkeypatch):
    monkeypatch.setattr(METHODS["dejavu"], "_steps", 20)
    torch.manual_seed(0)


def glu(dtype=torch.float32):
    make = torch.nn.init.normal_
    return Glu(*(make(torch.empty(shape, dtype=dtype)) for shape in ((I, D), (I, D), (D, I))), torch.nn.functional.silu)


def rule(name, density, weights=None, calibrate=True, **options) -> Method:
    config = MethodConfig(name, density=density, **{**EXTRA.get(name, {}), **options})
    made = METHODS[name](config, weights or glu(), 0)
    if calibrate and METHODS[name].needs_data(config):
        for _ in range(4):
            made.collect(torch.randn(2, 64, D))
        made.fit()
    return made


def least_above(name):
    return max(0.6, METHODS[name].least + 0.1)


# --- the matrix: every rule, without knowing which


@pytest.mark.parametrize("name", METHODS)
def test_the_touched_share_is_the_density(name):
    density = 1.0 if name in FULL else least_above(name)
    made = rule(name, density)
    y = made(torch.randn(3, 50, D))
    assert y.shape == (3, 50, D)
    slack = 0.06 if made.config.selection != "topk" else 1.5 / D  # rounding of k, or of a threshold on other tokens
    assert made.meter.touched == pytest.approx(density, abs=slack)
    assert made.meter.n_tokens == 150


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"dejavu", "rsparse"}))
def test_density_1_is_dense(name):
    made = rule(name, 1.0)
    x = torch.randn(2, 20, D)
    torch.testing.assert_close(made(x), made.glu.dense(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_lower_density_is_further_from_dense(name):
    if name in FULL:
        pytest.skip("it has one density")
    x = torch.randn(2, 60, D)
    errors = []
    for density in (0.95, least_above(name)):
        made = rule(name, density, weights=(weights := glu()))
        errors.append(float((made(x) - weights.dense(x)).norm()))
        torch.manual_seed(0)
    assert errors[0] < errors[1]


@pytest.mark.parametrize("name", METHODS)
def test_bf16_stays_bf16(name):
    made = METHODS[name](
        MethodConfig(name, density=1.0 if name in FULL else 0.9, **EXTRA.get(name, {})), glu(torch.bfloat16), 0
    )
    for _ in range(2):
        made.collect(torch.randn(1, 64, D, dtype=torch.bfloat16))
    made.fit()
    assert made(torch.randn(1, 5, D, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("name", [name for name in METHODS if METHODS[name].least])
def test_a_density_out_of_reach_is_refused(name):
    with pytest.raises(ConfigError, match=rf"{name} touches more than .* cannot be reached: ask for more"):
        MethodConfig(name, density=METHODS[name].least)


@pytest.mark.parametrize("name", [n for n in METHODS if METHODS[n].needs_data(MethodConfig(n, **EXTRA.get(n, {})))])
def test_what_needs_text_says_so(name):
    with pytest.raises(ConfigError, match=r"calibration text|was not calibrated"):
        rule(name, 1.0 if name in FULL else 0.7, calibrate=False)(torch.randn(1, 4, D))


@pytest.mark.parametrize("name", METHODS)
def test_means_stand_for_what_is_dropped(name):
    """With constant inputs the mean is the input, so nothing is lost."""
    if name in (*FULL, "planes", "dejavu", "dip-rescale"):
        pytest.skip("they drop nothing or take no means, or dejavu's predictor is trained on inputs that differ")
    config = MethodConfig(name, density=least_above(name), compensate=True, **EXTRA.get(name, {}))
    made = METHODS[name](config, weights := glu(), 0)
    x = torch.randn(1, 1, D).expand(2, 40, D).contiguous()
    made.collect(x)
    made.fit()
    if name == "sparsegpt":  # its Hessian has rank 1 here; weights moved, and the bias corrects for where they went
        torch.testing.assert_close(made(x), weights.dense(x), rtol=1e-2, atol=1e-1)
    else:
        torch.testing.assert_close(made(x), weights.dense(x), rtol=1e-4, atol=1e-3)


# --- single rules


def test_dip_is_the_definition():
    made = rule("dip", 0.5, weights := glu())
    x = torch.randn(7, D)
    for row, got in zip(x, made(x), strict=True):
        kept = reference_top_k(row.numpy(), n_selected(0.5, D))
        pruned = torch.zeros(D)
        pruned[kept] = row[kept]
        h = weights.hidden(pruned)
        units = reference_top_k(h.numpy(), n_selected(0.5, I))
        sparse = torch.zeros(I)
        sparse[units] = h[units]
        torch.testing.assert_close(got, weights.output(sparse), rtol=1e-4, atol=1e-3)


def test_dip_with_a_cache_and_gamma_1_is_dip():
    weights = glu()
    x = torch.randn(2, 30, D)
    plain = rule("dip", 0.5, weights)(x)
    cached = rule("dip", 0.5, weights, capacity=0.4)
    assert torch.equal(cached(x), plain)
    assert 0 < cached.meter.hit_rate < 1
    assert cached.meter.flash_share == pytest.approx(0.5 * (1 - cached.meter.hit_rate), rel=0.2)


def test_caches_go_on_from_call_to_call_and_gamma_favours_them():
    weights = glu()
    x = torch.randn(2, 30, D)
    whole, parts = rule("dip-ca", 0.5, weights), rule("dip-ca", 0.5, weights)
    together = whole(x)
    assert torch.equal(torch.cat([parts(x[:, :11]), parts(x[:, 11:])], 1), together)
    assert parts.meter.hits == whole.meter.hits
    parts.reset()
    parts.meter.reset()
    assert torch.equal(parts(x), together)
    plain = rule("dip", 0.5, weights, capacity=0.5)
    plain(x)
    assert whole.meter.hit_rate > plain.meter.hit_rate


def test_padding_does_not_move_caches():
    weights = glu()
    x = torch.randn(1, 12, D)
    alone, padded = rule("dip-ca", 0.5, weights), rule("dip-ca", 0.5, weights)
    padded.used = torch.tensor([[False] * 3 + [True] * 12])
    y = padded(torch.cat([torch.randn(1, 3, D), x], 1))
    assert torch.equal(y[:, 3:], alone(x))


def test_caches_refuse_tokens_without_order():
    with pytest.raises(ConfigError, match=r"layer 0 got inputs of shape \(4, 32\)"):
        rule("dip-ca", 0.5)(torch.randn(4, D))
    made = rule("dip-ca", 0.5)
    made(torch.randn(2, 3, D))
    with pytest.raises(ConfigError, match=r"a batch of 1 follows one of 2 without reset\(\)"):
        made(torch.randn(1, 3, D))


def test_norms_change_the_ranking():
    weights = glu()
    weights.gate[:, 0] *= 100
    x = torch.ones(1, D) + 0.01 * torch.rand(1, D)
    x[0, 0] = 0.5  # the smallest input, the largest column
    with_norms, without = (rule("dip", 0.5, weights, norms=norms) for norms in (True, False))
    assert with_norms.masks(with_norms.scores(x, 0), 0)[0, 0]
    assert not without.masks(without.scores(x, 0), 0)[0, 0]


def test_fixed_masks_keep_the_share_and_2_of_4():
    for name in ("magnitude", "wanda", "sparsegpt"):
        made = rule(name, 0.5, pattern="2:4")
        made(torch.randn(1, 2, D))
        fours = made._make().gate.reshape(I, -1, 4)
        assert ((fours != 0).sum(-1) == 2).all(), name
    with pytest.raises(ConfigError, match=r"2:4 keeps half of the weights, and density is 0\.6"):
        MethodConfig("wanda", density=0.6, pattern="2:4")


def test_sparsegpt_is_nearer_to_dense_than_magnitude():
    weights = glu()
    mixing = torch.randn(D, D)
    errors = {}
    for name in ("magnitude", "wanda", "sparsegpt"):
        made = METHODS[name](MethodConfig(name, density=0.5), weights, 0)
        torch.manual_seed(1)
        for _ in range(8):
            made.collect(torch.randn(64, D) @ mixing)
        made.fit()
        x = torch.randn(200, D) @ mixing
        gate = torch.nn.functional.linear(x, weights.gate)
        errors[name] = float((torch.nn.functional.linear(x, made._make().gate) - gate).norm() / gate.norm())
    assert errors["sparsegpt"] < errors["wanda"] <= errors["magnitude"] * 1.05


def test_a_trained_predictor_beats_chance(monkeypatch):
    monkeypatch.setattr(METHODS["dejavu"], "_steps", 300)
    weights = glu()
    made = METHODS["dejavu"](MethodConfig("dejavu", density=0.6, rank=0.5), weights, 0)
    for _ in range(8):
        made.collect(torch.randn(256, D))
    made.fit()
    x = torch.randn(300, D)
    wanted = made.units.mask(weights.hidden(x).abs())
    a, b = made._factors
    found = made.units.mask((x @ a.T).relu() @ b.T)
    share = float((wanted & found).sum() / wanted.sum())
    assert share > made.units.density + 0.1


def test_extra_dram_is_declared():
    assert rule("dip", 0.5).extra_dram_bits == 0
    assert rule("wanda", 0.5).extra_dram_bits == 3 * D * I
    predictor = rule("dejavu", 0.6)
    assert predictor.extra_dram_bits == predictor.rank * (D + I) * 16
    low_rank = rule("rsparse", 0.6)
    assert low_rank.extra_dram_bits == 3 * low_rank.rank * (D + I) * 16


# --- planes


def planes(weights=None, **options):
    return rule("planes", 1.0, weights or glu(), **options)


def test_planes_that_fetch_all_are_the_quantised_weights():
    x = torch.randn(2, 20, D)
    for options in ({"fetch": 1.0}, {"fetch": 0.0, "whole": (0,)}, {"fetch": 0.0, "capacity": 1.0}):
        made = planes(**options)
        assert torch.equal(made(x), made.glu.dense(x)), options
        assert made.meter.touched == 1
    assert planes(fetch=0.0, base_bits=(4, 4))(x).shape == x.shape  # 4-bit codes have no residual then: used whole


def test_planes_hold_the_bundles_bases():
    """Codes, middle and norms are the packer's: nothing but bases equals their definition in `grid`."""
    weights = glu()
    made = planes(weights, fetch=0.0, base_bits=(2, 3))
    for matrix, weight, bits in zip(
        [m for region in made.regions for m in region.matrices], (weights.gate, weights.up, weights.down), (2, 2, 3),
        strict=True,
    ):  # fmt: skip
        _, rows = quantise(weight.numpy(), 4)
        codes = (rows.codes >> (4 - bits) << (4 - bits)) + np.float32((2 ** (4 - bits) - 1) / 2)
        s, m = (
            rows.scales["d"].astype(np.float32) * rows.scales["sub"],
            -rows.scales["dm"].astype(np.float32) * rows.scales["subm"],
        )
        n = weight.shape[1]
        wanted = np.repeat(s, 32, 1)[:, :n] * codes + np.repeat(m, 32, 1)[:, :n]
        np.testing.assert_allclose(matrix.base.numpy(), wanted, rtol=1e-6, atol=1e-6)
        missing = ((matrix.whole - matrix.base) ** 2).sum(0)
        np.testing.assert_allclose(matrix.squares, missing.numpy(), rtol=1e-3)
    x = torch.randn(1, 3, D)
    base = Glu(*(m.base for region in made.regions for m in region.matrices), weights.act)
    torch.testing.assert_close(made(x), base.dense(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("density", [0.25, 0.5, 0.8])
def test_planes_without_bases_are_dip(density):
    weights = glu()
    made = planes(weights, base_bits=(0, 0), fetch=density)
    dip = rule("dip", density, made.glu, norms=True)
    x = torch.randn(2, 30, D)
    torch.testing.assert_close(made(x), dip(x), rtol=1e-5, atol=1e-4)
    assert made.meter.touched == pytest.approx(dip.meter.touched)
    assert made.meter.flash_share == pytest.approx(dip.meter.touched)  # all of it
    assert torch.equal(made.refined(x, 0), dip.masks(dip.scores(x, 0), 0))


@pytest.mark.parametrize("unit_bytes", [None, 100, 300])
@pytest.mark.parametrize("deferred", [False, True])
def test_all_tokens_at_once_are_the_native_choice_without_slots(unit_bytes, deferred):
    weights = glu()
    options = {"fetch": 0.3, "fetch_glu": 0.1, "unit_bytes": unit_bytes, "deferred": deferred}
    at_once, looped = planes(weights, **options), planes(weights, capacity=0.0, **options)
    x = torch.randn(2, 30, D)
    assert torch.equal(at_once(x), looped(x))
    assert at_once.meter.missed == looped.meter.missed == [60 * region.n_fetch for region in at_once.regions]
    assert at_once.meter.flash_share == pytest.approx(looped.meter.flash_share)
    assert looped.meter.hits == 0


def test_units_of_planes_are_the_packers():
    region = planes(unit_bytes=100, fetch=0.2, base_bits=(2, 2)).regions[0]
    assert region.per_unit == columns_per_unit(2 * 32, D, 100)  # 80 rows pad to 128, two matrices of 2 bits
    scores = region.scores(torch.arange(D, dtype=torch.float32))
    wanted, *_ = reference_refine(
        np.arange(D), region.norm.numpy(), None, region.per_unit, np.zeros(region.n_units, bool), 0
    )
    np.testing.assert_allclose(scores.numpy(), wanted, rtol=1e-6)


def test_what_is_cached_is_refined_and_caches_go_on():
    weights = glu()
    options = {"fetch": 0.1, "capacity": 0.5, "cache": "lru"}
    x = torch.randn(2, 30, D)
    whole, parts, bare = planes(weights, **options), planes(weights, **options), planes(weights, fetch=0.1)
    together = whole(x)
    assert torch.equal(torch.cat([parts(x[:, :11]), parts(x[:, 11:])], 1), together)
    parts.reset()
    assert torch.equal(parts(x), together)
    dense = whole.glu.dense(x)
    assert (together - dense).norm() < (bare(x) - dense).norm()
    assert whole.meter.touched > bare.meter.touched  # at the same reads
    assert whole.meter.flash_share == pytest.approx(bare.meter.flash_share)


def test_deferred_planes_use_what_the_token_before_chose():
    weights = glu()
    now, late = planes(weights, fetch=0.3), planes(weights, fetch=0.3, deferred=True)
    x = torch.randn(1, 12, D)
    chosen = now.refined(x, 0)
    shifted = torch.cat([late.refined(x[:, :5], 0), late.refined(x[:, 5:], 0)], 1)
    assert torch.equal(shifted[:, 1:], chosen[:, :-1])
    assert not shifted[:, 0].any()
    late.reset()
    same = x[:, :1].expand(1, 12, D)  # of tokens all alike the first lacks its inputs, the second what the first chose
    torch.testing.assert_close(late(same)[:, 2:], now(same)[:, 2:])
    with pytest.raises(ConfigError, match=r"layer 0 got inputs of shape \(4, 32\)"):
        late(torch.randn(4, D))


def test_density_says_how_much_planes_fetch():
    made = planes(base_bits=(2, 2))
    assert [region.n_fetch for region in made.regions] == [D, I]
    assert [region.n_fetch for region in rule("planes", 0.75, base_bits=(2, 2)).regions] == [D // 2, I // 2]
    with pytest.raises(
        ConfigError, match=r"planes holds 0\.583 of layer 0's weight bits as bases, and density is 0\.5"
    ):
        rule("planes", 0.5)


# --- resident


def test_resident_bits_are_ordered_and_counted():
    weights = glu()
    mixing = torch.randn(D, D)
    x = torch.randn(400, D) @ mixing
    errors = []
    for bits in ((2, 2), (3, 2), (3, 3), (4, 4), (8, 8)):
        made = METHODS["resident"](MethodConfig("resident", bits=bits), weights, 0)
        made.collect(x)
        made.fit()
        errors.append(float((made(x) - weights.dense(x)).norm() / weights.dense(x).norm()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.03 < errors[0]
    # 16 bits a group of 32 (80 inputs have three) and 32 a row.
    assert made.held_bits == 2 * (I * D * 8 + I * 16 + 32 * I) + D * I * 8 + D * 3 * 16 + 32 * D


def test_requantising_weighs_inputs_by_their_moments():
    weight = torch.randn(64, 96)
    energy = torch.ones(96)
    energy[::7] = 1000
    plain, weighted = requantise(weight, 2, torch.ones(96)), requantise(weight, 2, energy)
    assert ((weighted - weight) ** 2 * energy).sum() < 0.7 * ((plain - weight) ** 2 * energy).sum()
    assert ((plain - weight) ** 2).sum() < ((weighted - weight) ** 2).sum()
    assert torch.equal(requantise(torch.zeros(3, 40), 2, torch.ones(40)), torch.zeros(3, 40))
    few = torch.randint(0, 4, (5, 64)).float() * 0.5
    torch.testing.assert_close(requantise(few, 2, torch.rand(64)), few, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("seed", range(3))
def test_requantised_4_bits_are_as_near_as_packing_is(seed):
    torch.manual_seed(seed)
    weight = torch.randn(32, 128)
    ours = (requantise(weight, 4, torch.ones(128)) - weight).norm()
    assert ours < 1.02 * np.linalg.norm(dequantise(*quantise(weight.numpy(), 4)) - weight.numpy())


# --- selection


def test_top_k_is_exact_with_ties():
    scores = torch.tensor([[3.0, 1.0, 1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    assert top_k_mask(scores, 3).tolist() == [[True, True, True, False, False], [True, True, True, False, False]]
    random = np.random.default_rng(0)
    rows = random.integers(0, 5, (200, 33)).astype(np.float32)
    for k in (1, 7, 32, 33):
        masks = top_k_mask(torch.from_numpy(rows), k)
        for row, mask in zip(rows, masks, strict=True):
            assert np.flatnonzero(mask).tolist() == list(reference_top_k(row, k))


@pytest.mark.parametrize("select", ["threshold", "topp"])
@pytest.mark.parametrize("density", [0.2, 0.5, 0.9])
def test_calibrated_levels_give_the_mean_density(select, density):
    selector = Selector(I, density, select)
    for _ in range(8):
        selector.collect(torch.randn(64, I).abs())
    selector.fit()
    assert float(selector.mask(torch.randn(500, I).abs()).float().mean()) == pytest.approx(density, abs=0.02)


def test_unknown_options_are_refused():
    for options, message in (
        ({"name": "dipp"}, r"method 'dipp' is not known: choose one of "),
        ({"density": 0.0}, r"density is 0, but must be above 0"),
        ({"select": "best"}, r"select is 'best'"),
        ({"name": "dip", "gamma": 0.5}, r"gamma is dip-ca's alone"),
        ({"name": "dip-ca", "density": 0.5}, r"dip-ca needs a cache"),
        ({"name": "teal", "density": 0.5, "capacity": 0.5}, r"column caches are simulated for dip, dip-ca and planes"),
        ({"name": "dip", "densities": (0.5, 0.5, 0.5)}, r"dip takes 2 densities of its own, 3 were given"),
        ({"name": "dense", "density": 0.5}, r"dense uses every weight"),
        ({"name": "dip", "density": 0.5, "fetch": 0.1}, r"fetch is an option of planes, and the method is dip"),
        ({"name": "dip", "density": 0.5, "whole": (1,)}, r"whole is an option of planes, and the method is dip"),
        ({"name": "planes", "bits": (2, 2)}, r"bits is an option of resident, and the method is planes"),
        ({"name": "planes", "fetch": 1.5}, r"fetch is 1\.5, but must be a share of the units, 0 to 1"),
        ({"name": "planes", "fetch": 0.1, "density": 0.8}, r"fetch and density both say how much planes reads"),
        ({"name": "planes", "fetch_glu": 0.1}, r"fetch_glu needs fetch: give both"),
        ({"name": "planes", "base_bits": (2, 5)}, r"base_bits is \(2, 5\); it must lie in 0\.\.4"),
        ({"name": "planes", "whole": (1, 1)}, r"whole layers are \(1, 1\): give each once"),
        ({"name": "planes", "norms": True}, r"planes ranks units by what their residuals remove: drop select"),
        ({"name": "planes", "gamma": 0.5}, r"gamma is dip-ca's alone"),
        ({"name": "resident", "bits": (0, 2)}, r"bits is \(0, 2\): give those of input and of GLU columns, 1 to 8"),
        ({"name": "resident", "density": 0.5}, r"resident uses every weight: drop density"),
    ):
        with pytest.raises(ConfigError, match=message):
            MethodConfig(**options)


def test_what_is_fitted_to_the_dropped_part_brings_outputs_back():
    weights, x = glu(), torch.randn(1, 512, D) @ torch.randn(D, D) / D**0.5  # inputs that depend on each other
    dense = weights.dense(x)
    errors = {}
    for name, rank, density in (("dip", 0.1, 0.6), ("dip-rescale", 0.1, 0.6), ("dip-lowrank", 0.1, 0.6)):
        low_rank = (
            max(1, round(rank * D)) * (2 * D + 3 * weights.intermediate_size) / (3 * D * weights.intermediate_size)
        )
        more = low_rank if name == "dip-lowrank" else 0.0  # the same columns for all
        made = METHODS[name](MethodConfig(name, density=density + more, rank=rank), weights, 0)
        made.collect(x)
        made.fit()
        errors[name] = float((made(x) - dense).square().mean())
        assert made.meter.touched == pytest.approx(density + more, abs=0.02)
    assert errors["dip-lowrank"] < 0.95 * errors["dip"]
    assert errors["dip-rescale"] < errors["dip"]
