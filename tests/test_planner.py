"""The planner: measured quality and how far it is known, the choice within a bound, plans in files."""

from __future__ import annotations

import dataclasses
import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

import tiny
from dipper import planner, published
from dipper.budget import EngineConfig, plan_run
from dipper.bundle import Bundle, pack
from dipper.device import Device
from dipper.errors import BudgetError, ConfigError
from dipper.planner import (
    PlanResult,
    Quality,
    load_config,
    make_plan,
    measured_models,
    plan_table,
    quality_of,
)
from dipper.workload import GeneratedWorkload, ModelWorkload

ROOT = Path(__file__).parents[1]
SMOLLM2, QWEN, GEMMA = "Smollm2 135M 8k Lc100K Mix1 Ep2", "Qwen2.5 Coder 0.5B Instruct AWQ", "Gemma 3 270m"
SMALL = {
    "n_layers": 6, "hidden_size": 1024, "intermediate_size": 3072, "n_heads": 8, "n_kv_heads": 8, "head_dim": 128,
    "vocab_size": 256, "tied": True, "hf": "small", "source": "nowhere",
}  # fmt: skip


class FakeGenerator:
    """Scores of columns that differ in how often they are large."""

    fitted_on = ("fake",)

    def region(self, kind, depth, n_columns, seed):
        rng = np.random.default_rng(seed)
        level = rng.normal(0, 1.0, n_columns)

        class Stream:
            def scores(self, n_tokens):
                return np.exp(level + rng.normal(0, 0.7, (n_tokens, n_columns))).astype(np.float32)

        return Stream()


@pytest.fixture
def small(monkeypatch):
    """Bundles of a published shape that is small, at 4 and 8 bits."""
    monkeypatch.setattr(published, "_models", lambda: {"small": SMALL})
    return {bits: published.published_bundle("small", bits=bits) for bits in (4, 8)}


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    folder = tmp_path_factory.mktemp("planner")
    return Bundle.open(pack(tiny.write_hf(folder / "hf", "llama"), folder / "tiny.dipper", tokenizer=False))


def own_grid(bundle, name):
    """The bundle as one of a model that was measured, in its source's own grid."""
    header = {**bundle.header, "source": {"bits": "source"}}
    return Bundle(bundle.path, header, dataclasses.replace(bundle.model, name=name))


def plan(bundles, device="paper-phone", **options):
    given = Device.load(device) if isinstance(device, str) else device
    options.setdefault("host_bytes", 0)
    options.setdefault("context", 64)
    return make_plan(
        bundles,
        given,
        workload_of=lambda bundle: GeneratedWorkload(bundle, FakeGenerator(), n_prompt=16, n_tokens=24),
        **options,
    )


def half(bundle):
    """DRAM that holds about half of the MLP's columns."""
    smallest = plan_run(bundle, EngineConfig(method="dip", mlp_dram="1000b", context=64), 0).minimum_bytes
    return smallest + sum(r["bytes"] for r in bundle.header["regions"]) // 2


def half_of_mlp(bundle):
    """The MLP's share, in bits per weight, that leaves slots for about half of its columns: staging is most of it."""
    run = plan_run(bundle, EngineConfig(method="dip", mlp_dram="1000b", context=64), 0)

    def held(n_bytes):
        share = f"{8 * n_bytes / bundle.mlp_weights:.3f}b"
        try:
            return plan_run(bundle, EngineConfig(method="dip", mlp_dram=share, context=64), 0).cached_fraction, share
        except BudgetError:
            return 0.0, share

    return min((held(run.mlp_bytes * i / 500) for i in range(1, 501)), key=lambda found: abs(found[0] - 0.5))[1]


# ------------------------------------------------------------------------------------------------ quality


def test_the_curves_are_those_of_the_results(tmp_path, monkeypatch):
    grids = [f"experiments/results/density-{name}.json" for name in ("smollm2", "qwen2.5-0.5b", "gemma3-270m")]
    monkeypatch.setattr(sys, "argv", ["quality.py", *(str(ROOT / g) for g in grids), "-o", str(tmp_path / "q.toml")])
    runpy.run_path(str(ROOT / "experiments/quality.py"), run_name="__main__")
    assert (tmp_path / "q.toml").read_text() == (ROOT / "src/dipper/quality.toml").read_text()
    assert measured_models() == (SMOLLM2, QWEN, GEMMA)


@pytest.mark.parametrize(
    ("name", "options", "cached", "increase", "stderr"),
    [
        (SMOLLM2, {"density": 0.7}, 0.3, 0.069957, 0.0036343),
        (QWEN, {"density": 0.4}, 0.3, 1.3713, 0.052395),
        (QWEN, {"d_in": 0.8, "d_glu": 0.5}, 0.3, 0.014275, 0.0027014),
        (SMOLLM2, {"density": 0.6, "gamma": 0.5}, 0.5, 0.2782, 0.011538),
        (GEMMA, {"density": 0.5, "gamma": 0.2}, 0.52, 1.7756, 0.072793),
    ],
)
def test_measured_points_come_back(small, name, options, cached, increase, stderr):
    config = EngineConfig(method="dip-ca" if "gamma" in options else "dip", **options)
    quality = quality_of(own_grid(small[4], name), config, cached=cached)
    assert (quality.kind, quality.notes) == ("measured", ())
    assert quality.increase == pytest.approx(increase, rel=1e-4)
    assert (quality.high - quality.low) / 4 == pytest.approx(stderr, rel=1e-4)


def test_between_measured_points_lies_between_them(small):
    bundle = own_grid(small[4], SMOLLM2)
    at = quality_of(bundle, EngineConfig(density=0.65))
    assert at.kind == "interpolated"
    assert 0.069957 < at.low < at.increase < at.high < 0.19326
    # The fit for .5 is by layer: one split for all layers was calculated from it, not measured.
    assert quality_of(bundle, EngineConfig(d_in=0.55, d_glu=0.4)).kind == "interpolated"
    between = quality_of(bundle, EngineConfig(method="dip-ca", density=0.7, gamma=0.8))
    assert between.kind == "interpolated"
    assert 0.069957 < between.increase < 0.093283
    losses = [quality_of(bundle, EngineConfig(density=d / 100)).increase for d in range(30, 100)]
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize(
    ("options", "cached", "notes"),
    [
        ({"density": 0.9}, 0.5, ["measured for equal d_in and d_glu from density 0.40 to 0.80"]),
        ({"d_in": 0.88, "d_glu": 0.58}, 0.5, ["measured for the best split from density 0.50 to 0.70"]),
        ({"d_in": 0.6, "d_glu": 0.8}, 0.5, ["this difference of d_in and d_glu is beyond what was measured"]),
        ({"density": 0.7, "gamma": 0.5}, 0.3, ["gamma below 1 was measured with 50 % of the columns cached alone"]),
        (
            {"density": 0.7, "gamma": 0.5, "cache": "lru"},
            0.5,
            ["gamma below 1 was measured with lfu and the same share cached everywhere"],
        ),
        ({"density": 0.7, "gamma": 0.1}, 0.5, ["gamma was measured down to 0.2"]),
        ({"d_in": 0.8, "d_glu": 0.5, "gamma": 0.5}, 0.5, ["gamma below 1 was measured with d_in = d_glu alone"]),
    ],
)  # fmt: skip
def test_extrapolation_says_so(small, options, cached, notes):
    config = EngineConfig(method="dip-ca" if "gamma" in options else "dip", **options)
    quality = quality_of(own_grid(small[4], QWEN), config, cached=cached)
    assert (quality.kind, list(quality.notes)) == ("extrapolated", [*notes])
    assert (quality.low, quality.high) == (None, None)


def test_another_model_gets_the_mean_and_the_band(small):
    bundle = own_grid(small[4], "Another")
    quality = quality_of(bundle, EngineConfig(density=0.7))
    assert quality.kind == "extrapolated"
    found = (0.069957, 0.057661, 0.046998)
    assert (quality.increase, quality.low, quality.high) == pytest.approx(
        (sum(found) / 3, min(found), max(found)), rel=1e-4
    )
    assert quality.notes == (
        "not measured for Another: mean, least and most of 3 models of 0.1 to 0.5 B; larger ones lose less in "
        "the literature, so this is more likely too high than too low",
    )
    assert quality.words() == "+5.8 % (4.7 to 7.0 %, extrapolated)"


def test_quantising_a_16_bit_source_is_counted(small):
    dense = EngineConfig(method="dense-stream")
    assert quality_of(own_grid(small[4], QWEN), dense) == Quality(increase=0.0, low=0.0, high=0.0, kind="exact")
    assert quality_of(own_grid(small[4], QWEN), dense).words() == "+0.0 %"
    four, eight = (quality_of(small[bits], dense) for bits in (4, 8))
    assert (four.increase, eight.increase) == pytest.approx((0.025, 0.00036))
    assert four.notes == ("the cost of 4 bits was measured on Qwen2.5 Coder 0.5B alone",)
    header = {**small[4].header, "source": {"bits": "4"}}
    packed = Bundle(small[4].path, header, dataclasses.replace(small[4].model, name=QWEN))
    assert quality_of(packed, dense).kind == "measured"
    both = quality_of(packed, EngineConfig(density=0.7))
    assert (both.kind, both.increase) == ("interpolated", pytest.approx(1.057661 * 1.025 - 1, rel=1e-4))


# ------------------------------------------------------------------------------------------------ the choice


@pytest.fixture
def made(small):
    return plan([own_grid(small[4], QWEN)], dram=half(small[4]), max_ppl_increase=0.05)


def test_the_best_is_the_fastest_within_the_bound(made):
    assert made.best.method in ("dip", "dip-ca")
    assert made.quality.increase <= 0.05
    within = [row for row in made.rows if row["within"]]
    assert all(row["ppl_increase"] <= 0.05 for row in within)
    assert made.best.tok_per_s == max(row["tok_per_s"] for row in within)
    dense = next(row for row in made.rows if row["method"] == "dense-stream")
    assert made.best.tok_per_s > 1.1 * dense["tok_per_s"]
    assert dense["ppl_increase"] == 0.0
    assert {row["cache"] for row in made.rows} == {None, "lru", "lfu"}
    assert {row["split"] for row in made.rows} == {None, "uniform", "miss-curve"}
    assert {row["gamma"] for row in made.rows} == {None, 1.0, 0.8, 0.5, 0.2}
    assert made.notes[0].startswith(f"{made.best.tok_per_s / dense['tok_per_s']:.2f} × dense-stream (")


def test_the_front_is_a_front(made):
    front = made.front
    assert [row["tok_per_s"] for row in front] == sorted((row["tok_per_s"] for row in front), reverse=True)
    for row in made.rows:
        beaten = [o for o in front if o["tok_per_s"] >= row["tok_per_s"] and o["ppl_increase"] <= row["ppl_increase"]]
        assert beaten
        if row in front:
            assert beaten == [row]


def test_a_tighter_bound_is_no_faster(small, made):
    tight = plan([own_grid(small[4], QWEN)], dram=half(small[4]), max_ppl_increase=0.01)
    assert tight.quality.increase <= 0.01
    assert tight.best.tok_per_s < made.best.tok_per_s


def test_its_configuration_is_what_was_simulated(small, made):
    config = EngineConfig(**made.config)
    bundle = own_grid(small[4], QWEN)
    run = plan_run(bundle, config, 0)
    assert run.total_bytes <= half(small[4])
    assert (config.method, config.densities) == (made.best.method, (made.best.d_in, made.best.d_glu))
    assert run.parts == made.best.dram_bytes
    assert (config.split is not None) == (made.best.split == "miss-curve")


def test_dense_streaming_wins_where_reads_are_dear(small):
    phone = Device.load("paper-phone")
    dear = dataclasses.replace(phone, flash=dataclasses.replace(phone.flash, cost_per_read_us=1000.0))
    result = plan([own_grid(small[4], QWEN)], dear, dram=half(small[4]))
    assert result.best.method == "dense-stream"
    fastest = max(row["tok_per_s"] for row in result.rows if row["method"] == "dip")
    assert result.notes == (
        f"pruning does not pay here: dense-stream {result.best.tok_per_s:.2f} tok/s, the fastest pruned setting within "
        f"the bound {fastest:.2f}",
    )
    assert result.skipped[-1] == {
        "what": "other densities, dip-ca, caches and splits",
        "why": f"plain dip reaches {fastest:.2f} tok/s, dense-stream {result.best.tok_per_s:.2f}: nothing makes up for "
        "that",
    }
    assert len(result.rows) == 3
    assert result.config == {"method": "dense-stream", "context": 64, "dram": half(small[4])}


def test_no_loss_allowed_leaves_dense(small):
    result = plan([own_grid(small[4], QWEN)], dram=half(small[4]), max_ppl_increase=0.0)
    assert result.best.method == "dense-stream"
    assert {"what": "dip and dip-ca", "why": "no loss is allowed"} in result.skipped
    assert result.notes == ("dense-stream it is: no pruned setting keeps to +0.0 % of perplexity",)


def test_bits_are_chosen_too(small):
    both = [small[4], small[8]]
    result = plan(both, dram=half(small[4]), max_ppl_increase=0.05)
    assert {row["bits"] for row in result.rows} == {4, 8}
    assert result.bits == 4
    assert result.header_sha256 is None
    assert [s["what"] for s in result.skipped] == [
        "dense-resident at 4 bits",
        "dense-resident at 8 bits",
        "other densities, dip-ca, caches and splits at 8 bits",
    ]
    # 4 bits alone cost more than this.
    finer = plan(both, dram=half(small[4]), max_ppl_increase=0.01)
    assert finer.bits == 8
    assert {"what": "dip and dip-ca at 4 bits", "why": "quantising alone costs +2.50 %"} in finer.skipped
    least = plan([small[4]], dram=half(small[4]), max_ppl_increase=0.01)
    assert least.best.method == "dense-stream"
    assert least.notes[0] == (
        "nothing keeps to +1.00 % of perplexity: quantising alone costs +2.50 %; this loses the least"
    )


def test_without_a_budget_everything_is_resident(small):
    result = plan([own_grid(small[4], QWEN)], max_ppl_increase=0.0)
    assert "dense-resident" in {row["method"] for row in result.rows}
    assert result.notes[0] == ("no budget given: all 8.6 GB of the device; give --dram what a process may take")
    assert result.config["dram"] == 8589934592


def test_the_mlp_alone_may_have_a_budget(small):
    result = plan([own_grid(small[4], QWEN)], mlp_dram="60%")
    assert {
        "what": "dense-resident",
        "why": "--mlp-dram limits the MLP, which it holds whole",
    } in result.skipped
    assert result.config["mlp_dram"] == "60%"
    assert "dram" not in result.config


def test_slots_that_cannot_be_shared_out_are_left_out(small, monkeypatch):
    why = "no region reads less with a larger cache, or there is no room for slots: raise the budget"

    def refuse(*_, **__):
        raise BudgetError(why)

    monkeypatch.setattr(planner, "miss_curve_split", refuse)
    result = plan([own_grid(small[4], QWEN)], dram=half(small[4]), max_ppl_increase=0.05)
    assert {row["split"] for row in result.rows} == {None, "uniform"}
    assert {"what": "slots by miss curve", "why": why} in result.skipped


def test_nothing_fits(small):
    smallest = min(
        plan_run(small[4], EngineConfig(method=method, mlp_dram="1000b", context=64), 0).minimum_bytes
        for method in ("dense-stream", "dip")
    )
    with pytest.raises(BudgetError) as caught:
        plan([small[4]], dram="0.1MB")
    named = -(-smallest // 10**5) / 10
    assert str(caught.value).endswith(f"(0.0 MB of it is the host process): raise --dram to {named:.1f}MB")
    assert plan([small[4]], dram=f"{named:.1f}MB").best.tok_per_s > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"max_ppl_increase": -0.1},
            "max_ppl_increase is -0.1, outside [0, 10]: it is relative, 0.05 allows 5 % more perplexity",
        ),
        ({"context": 9999}, "a context of 9999 is over the model's 4096: lower --ctx"),
        ({"dram": "9GB"}, "--dram gives 9000.0 MB, but paper-phone has 8589.9 MB: lower it"),
        (
            {"dram": "50%"},
            "DRAM in % is of one bundle's bytes, and there are 2 to choose from: give bytes such as 4GB",
        ),
    ],
)
def test_options_are_checked(small, options, message):
    with pytest.raises(ConfigError) as caught:
        plan([small[4], small[8]], **options)
    assert str(caught.value) == message


def test_nothing_to_plan_for():
    with pytest.raises(ConfigError) as caught:
        make_plan([], Device.load("paper-phone"), workload_of=lambda bundle: pytest.fail("not asked"))
    assert str(caught.value) == "there is nothing to plan for: give a bundle"


# ------------------------------------------------------------------------------------------------ files, words


@pytest.fixture(scope="module")
def planned(real) -> PlanResult:
    workload = ModelWorkload(real, list(range(3, 19)), text=list(range(20, 44)), threads=1)
    return make_plan(
        [real], Device.load("paper-phone"), workload_of=lambda bundle: workload, mlp_dram=half_of_mlp(real), context=64,
        host_bytes=0, max_ppl_increase=0.1,
    )  # fmt: skip


def test_a_real_bundle_is_planned_and_its_plan_comes_back(real, planned, tmp_path):
    assert {row["workload"] for row in planned.rows} >= {"dense", "recorded", "live"}
    assert planned.header_sha256 == real.header["header_sha256"]
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(planned.as_dict(), allow_nan=False))
    options = load_config(file, real)
    assert options == planned.config
    assert EngineConfig(**options) == EngineConfig(**planned.config)
    assert plan_run(real, EngineConfig(**options), 0).parts == planned.best.dram_bytes


def test_a_plan_is_for_its_bundle(real, planned, tmp_path, small):
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(planned.as_dict()))
    with pytest.raises(ConfigError) as caught:
        load_config(file, small[4])
    assert str(caught.value) == (
        f"{file} is a plan for another bundle ({real.model.name}), not for small: plan this one anew"
    )
    file.write_text(json.dumps({**planned.as_dict(), "schema": "dipper-eval/1"}))
    with pytest.raises(ConfigError) as caught:
        load_config(file, real)
    assert str(caught.value) == f"{file} is dipper-eval/1, not dipper-plan/1: write a plan with dipper plan --out"
    file.write_text(json.dumps({**planned.as_dict(), "config": {"speed": 9}}))
    with pytest.raises(ConfigError) as caught:
        load_config(file, real)
    assert str(caught.value) == (f"{file} has options that no plan has (speed): plan anew")
    file.write_text("[]")
    with pytest.raises(
        ConfigError, match=r"cannot be read as a plan \(TypeError: .*\): write one with dipper plan --o"
    ):
        load_config(file, real)


def test_the_table(made):
    lines = plan_table(made).splitlines()
    best = made.best
    assert lines[0] == f"plan        {QWEN} on paper-phone, perplexity +5.0 % at most"
    assert lines[1].startswith(f"best        {best.method}, density {best.density:.2f} (input {best.d_in:.2f}, glu ")
    assert lines[2].startswith(f"speed       {best.tok_per_s:.2f} tok/s, first token after ")
    assert lines[3] == f"perplexity  {made.quality.words()}"
    blank = lines.index("")
    assert lines[blank + 1].split() == [
        "method", "bits", "cache", "slots", "d_in", "d_glu", "gamma", "tok/s", "TTFT", "s", "DRAM", "MB", "hits",
        "perplexity", "known", "within",
    ]  # fmt: skip
    assert len(lines) == blank + 2 + len(made.front)
