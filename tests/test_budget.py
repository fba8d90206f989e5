"""Budgets of reads in the plan, and what a plan says of itself."""

from __future__ import annotations

import dataclasses
import json

import pytest

import tiny
from dipper import budget as budget_module
from dipper import evaluate_engine
from dipper.budget import EngineConfig, plan_run
from dipper.bundle import Bundle, pack
from dipper.cli import main
from dipper.engine import Engine
from dipper.errors import BudgetError, ConfigError
from fakes import device

TOKENS = [3, 14, 15, 9, 26, 5, 35]
PLANES = EngineConfig(method="planes", mlp_dram="4.4b", context=64)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    folder = tmp_path_factory.mktemp("budget")
    source = tiny.write_hf(folder / "llama", "llama", intermediate_size=1024, num_hidden_layers=10)
    options = {"base_bits": (2, 3), "unit_bytes": 4096}
    return {
        "whole": Bundle.open(pack(source, folder / "whole.dipper", "4", tokenizer=False)),
        "split": Bundle.open(pack(source, folder / "split.dipper", "4", tokenizer=False, **options)),
    }


@pytest.fixture
def split(bundles):
    return bundles["split"]


def planned(bundle, **changes):
    return plan_run(bundle, dataclasses.replace(PLANES, **changes), 0)


# ------------------------------------------------------------------------------------------------ io budget


@pytest.mark.parametrize("share", [0.5, 0.7, 1.0])
@pytest.mark.parametrize("whole", [(), (2, 0)])
def test_what_a_token_reads_keeps_to_the_budget(split, share, whole):
    most = planned(split, io_budget="1GB", whole=whole)
    assert most.fetched_shares == (1.0, 1.0)
    limit = share * most.token_reads.bytes
    plan = planned(split, io_budget=f"{limit / 1e6:.6f}MB", whole=whole)
    assert 0.3 * limit < plan.token_reads.bytes <= limit + 1  # units are few here
    shares = plan.fetched_shares
    assert shares[0] == pytest.approx(shares[1], abs=0.25)  # of four units
    assert plan.mlp_bytes <= plan.mlp_budget_bytes


def test_a_budget_of_time_is_one_of_the_disk(split, monkeypatch):
    asked = []

    def found(path, profile):
        asked.append(profile)
        return device(gbps=1e-3, cost_per_read_us=1.0)

    monkeypatch.setattr(budget_module, "device_for", found)
    plan = planned(split, io_budget="400ms", device_profile="here.toml")
    assert set(asked) == {"here.toml"}
    flash = device(gbps=1e-3, cost_per_read_us=1.0).flash
    seconds = sum(float(flash.batch_s(r.reads.n, r.reads.bytes)) for r in plan.regions if r.reads.n)
    assert 0.2 < seconds <= 0.4


def test_a_plan_by_budget_is_run(split):
    plan = planned(split, io_budget="200KB")
    told = []
    config = dataclasses.replace(PLANES, io_budget="200KB")
    with Engine.open(split.path, config, told.append) as engine:
        assert engine.plan.options["fetch"] == plan.options["fetch"]
        shares = plan.fetched_shares
        assert (
            f"planes: a token fetches {shares[0]:.3g} of the input and {shares[1]:.3g} of the GLU units "
            "by an io budget of 200KB"
        ) in engine.notes
        engine.prefill(TOKENS)
        engine.reset_counters()
        for token in TOKENS:
            engine.step(token)
        counters = engine.counters()
        assert counters.flash_bytes / counters.n_tokens <= engine.plan.token_bytes + 8192
        assert counters.flash_bytes / counters.n_tokens < 1.3 * engine.plan.token_reads.bytes + 8192


def test_a_kept_result_says_what_a_budget_came_to(split, monkeypatch):
    """The disk decides what a budget of time buys: a result is not continued on another."""
    found = []
    for gbps in (1e-3, 2e-3):
        monkeypatch.setattr(budget_module, "device_for", lambda *_, gbps=gbps: device(gbps=gbps))
        config = dataclasses.replace(PLANES, io_budget="400ms")
        found.append(evaluate_engine._scoring(config, split.path))
        assert found[-1]["io_budget"] == "400ms"
        assert any(found[-1]["fetch_units"])
    assert found[0] != found[1]


def test_too_small_a_budget_names_the_smallest(split):
    with pytest.raises(BudgetError) as error:
        planned(split, io_budget="1KB")
    words = str(error.value)
    assert words.startswith("--io-budget 1KB refines nothing: a unit of every refined region takes 0.1MB; raise it to ")
    least = words.rsplit(" ", 1)[1]
    assert planned(split, io_budget=least).fetched_shares[0] > 0
    with pytest.raises(BudgetError, match=r"refines nothing: regions streamed whole read [0-9.]+MB of it, and a unit"):
        planned(split, io_budget="1KB", mlp_dram="3.3b", whole=(0, 1, 2, 3, 4))


def test_a_budget_without_refined_regions(bundles):
    message = r"^an io budget is shared out over refined regions, and there are none here: drop it"
    with pytest.raises(ConfigError, match=message):
        planned(bundles["whole"], io_budget="1MB")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"io_budget": "1MB", "fetch": 0.1}, "fetch and io_budget both say what a token reads: give one of them"),
        ({"io_budget": "1MB", "fetch_glu": 0.1}, "fetch and io_budget both say what a token reads: give one of them"),
        ({"io_budget": "1MB", "method": "dip"}, "io_budget goes with --method planes, not dip"),
        (
            {"io_budget": "3"},
            "io budget '3' is neither a time nor an amount: write 20ms or 80MB, what a token reads",
        ),
        (
            {"io_budget": "3MB", "device_profile": "x"},
            "device_profile has no effect: it goes with --method auto, or an io_budget of time",
        ),
        (
            {"device_profile": "x"},
            "device_profile has no effect: it goes with --method auto, or an io_budget of time",
        ),
    ],
)
def test_options_that_do_not_go_together(options, message):
    with pytest.raises(ConfigError) as error:
        EngineConfig(**{"method": "planes", **options})
    assert str(error.value) == message


# ------------------------------------------------------------------------------------------------ what a plan says


def test_the_lines_of_planes(split):
    plan = planned(split, fetch=0.2, fetch_glu=0.1, whole=(2,), mlp_dram="4.6b")
    refined = [region for region in plan.regions if region.held == "refined"]
    assert plan.lines()[2].startswith("input regions: 9 refined (base of 2 bits, ")
    assert plan.lines()[2].endswith("a token fetches 16.7 %), 1 whole in DRAM")
    assert plan.lines()[3].startswith("glu regions: 9 refined (base of 3 bits, ")
    reads = plan.token_reads
    assert plan.lines()[4] == (f"flash, a token: {reads.bytes / 1e6:.1f} MB in {reads.n:,.0f} reads expected")
    assert len(refined) == 18
    assert sum(region.slots for region in refined) == sum(plan.options["capacity"])
    assert plan.token_reads.bytes <= plan.token_bytes


def test_the_lines_of_dense_modes_and_dip(bundles):
    bundle = bundles["whole"]
    plans = {
        method: plan_run(bundle, EngineConfig(method=method, mlp_dram=dram, context=64), 0)
        for method, dram in (("dense-resident", None), ("dense-stream", "3b"), ("dip", "3b"))
    }
    assert plans["dense-resident"].lines()[2:] == [
        "input regions: 10 whole in DRAM",
        "glu regions: 10 whole in DRAM",
    ]
    stream = plans["dense-stream"]
    assert stream.lines()[2].startswith("input regions: ")
    assert stream.token_reads.bytes == stream.token_bytes == sum(r.reads.bytes for r in stream.regions)
    dip = plans["dip"]
    slots = sum(dip.options["capacity"][::2])
    assert dip.lines()[2] == (
        f"input regions: 10 with a cache of columns ({slots:,} slots for {100 * slots / 960:.1f} % of the columns)"
    )
    assert dip.token_reads is None
    assert len(dip.lines()) == 4
    assert plans["dense-resident"].as_dict()["token_reads"] == {"n": 0, "bytes": 0}


def test_inspect_shows_the_plan_of_a_run(split, capsys):
    args = ["inspect", str(split.path), "--no-verify", "--ctx", "64", "--method", "planes", "--mlp-dram", "4.4b"]
    assert main([*args, "--io-budget", "150KB"]) == 0
    out = capsys.readouterr().out.splitlines()
    at = out.index("method: planes")
    assert out[at - 1] == ""
    assert out[at + 1].startswith("DRAM plan, MiB: total ")
    assert out[at + 3].startswith("input regions: 10 refined (base of 2 bits, ")
    assert out[-1].startswith("flash, a token: 0.1 MB in ")
    assert main([*args, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)["plan"]
    assert (plan["method"], plan["why"], len(plan["regions"])) == ("planes", "", 20)
    assert plan["total_bytes"] == sum(plan["parts"].values())
    assert main(["inspect", str(split.path), "--no-verify", "--mlp-dram", "3b"]) == 1
    assert main(["inspect", str(split.path), "--no-verify", "--mlp-dram", "4b", "--ctx", "64"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert "method: dense-stream (no setting of planes is known to lose at most 2.3 % here in this much DRAM)" in out
    assert main([*args, "--io-budget", "150KB", "--fetch", "0.1"]) == 1
    assert "fetch and io_budget both say what a token reads" in capsys.readouterr().err
