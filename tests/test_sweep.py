"""Sweeps: lists of options become settings, settings become records; what is refused, and the figure."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import tiny
from dipper import tokenizer
from dipper.budget import EngineConfig, plan_run
from dipper.bundle import Bundle, pack
from dipper.device import Compute, Device, Dram, Energy, Flash
from dipper.drawings import sweep as sweep_drawing
from dipper.drawings.sweep import draw_sweep
from dipper.errors import BudgetError, BundleError, ConfigError
from dipper.published import published_bundle
from dipper.records import LEDGER, SimRecord
from dipper.sweep import Sweep, has_weights, open_model, open_workload, run_sweep
from dipper.tables import sim_table
from dipper.workload import GeneratedWorkload, ModelWorkload, TraceWorkload

PROMPT = [3, 14, 15, 9, 26, 5, 35, 8, 9, 7]
TEXT = [17, 4, 99, 150, 3, 3, 61, 80]
SLOW = Device(
    name="slow",
    title="A read costs much",
    dram=Dram(bytes=8 * 10**9, gbps=10.0),
    flash=Flash(gbps=0.5, cost_per_read_us=20.0, latency_us=100.0, queue_depth=32, alignment=4096),
    compute=Compute(gemv_gweights_per_s=3.0, gemm_gmacs_per_s=0.5),
    energy=Energy(dram_pj_per_byte=20.0, flash_pj_per_byte=100.0),
)
FAST = dataclasses.replace(
    SLOW,
    name="fast",
    title="Small reads at no cost",
    flash=Flash(gbps=5.0, cost_per_read_us=0.0, latency_us=0.0, queue_depth=64, alignment=512),
    energy=Energy(),
)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("bundle")
    return Bundle.open(pack(tiny.write_hf(folder / "llama", "llama"), folder / "llama.dipper", tokenizer=False))


@pytest.fixture
def workload(bundle: Bundle) -> ModelWorkload:
    return ModelWorkload(bundle, PROMPT, text=TEXT, threads=2)


def budgets(bundle: Bundle, *shares: float) -> tuple[str, ...]:
    """--mlp-dram of the least that works and about these shares of the columns, in bits per weight."""
    options: dict[str, Any] = {"density": 0.5, "context": len(PROMPT) + len(TEXT) + 1}
    with pytest.raises(BudgetError) as e:
        plan_run(bundle, EngineConfig(mlp_dram="0.1b", **options), 0)
    least = float(re.findall(r"raise --mlp-dram to ([0-9.]+)b or more$", str(e.value))[0])
    held = sum(region["bytes"] for region in bundle.header["regions"])
    return tuple(f"{least + share * 8 * held / bundle.mlp_weights:.3f}b" for share in shares)


# ------------------------------------------------------------------------------------------------ combinations


NEEDS = "dip-ca and planes need a cache other than none and belady, miss-curve needs slots, --capacity a column cache"


def test_every_combination_once() -> None:
    rows = Sweep(
        methods=("dip", "dip-ca"),
        densities=(0.5, 0.7),
        gammas=(0.2, 0.5),
        caches=("lru", "lfu"),
        mlp_dram=("40%", "60%"),
    ).options()
    assert len(rows) == 8 + 16  # plain dip has no gamma
    assert len({json.dumps(row, sort_keys=True) for row in rows}) == len(rows)
    assert rows[0] == {"method": "dip", "mlp_dram": "40%", "density": 0.5, "cache": "lru", "split": "uniform"}
    assert {row.get("gamma") for row in rows if row["method"] == "dip"} == {None}
    assert {row["gamma"] for row in rows if row["method"] == "dip-ca"} == {0.2, 0.5}


def test_what_does_not_act_with_a_method_is_left_out() -> None:
    sweep = Sweep(
        methods=("dense-resident", "dense-stream"), densities=(0.5, 0.7), gammas=(0.2, 0.5), caches=("lru", "belady"),
        dram=("1GB",), mlp_dram=("40%", "60%"), splits=("uniform", "miss-curve"), cold=True,
    )  # fmt: skip
    assert sweep.options() == [
        {"method": "dense-resident", "dram": "1GB"},
        {"method": "dense-stream", "dram": "1GB", "mlp_dram": "40%"},
        {"method": "dense-stream", "dram": "1GB", "mlp_dram": "60%"},
    ]
    for row in sweep.options():
        EngineConfig(**row)


def test_options_of_planes() -> None:
    sweep = Sweep(
        methods=("dense-stream", "planes"), densities=(0.5, 0.7), gammas=(0.2, 0.5), caches=("lru", "belady"),
        fetches=(0.1, 0.3), fetch_glu=0.05, whole=(2, 1), mlp_dram=("3.6b",), cold=True,
    )  # fmt: skip
    shared = {"method": "planes", "mlp_dram": "3.6b", "cache": "lru", "cold": True, "fetch_glu": 0.05, "whole": (2, 1)}
    assert sweep.options() == [
        {"method": "dense-stream", "mlp_dram": "3.6b"},
        {**shared, "fetch": 0.1},
        {**shared, "fetch": 0.3},
    ]
    for row in sweep.options():
        EngineConfig(**row)
    with pytest.raises(ConfigError) as e:
        Sweep(methods=("planes",), caches=("none",)).options()
    assert str(e.value) == f"methods planes with caches none leave nothing to simulate: {NEEDS}"
    with pytest.raises(ConfigError) as e:
        Sweep(methods=("planes",), capacity=(0.5,)).options()
    assert str(e.value) == "--capacity is of column caches, which planes do not have: give --dram"


def test_a_shape_with_planes() -> None:
    """More fetched is more read; the DRAM is the budget's."""
    bundle = open_model("phi-3-mini", base_bits=(2, 3))
    workload = open_workload(bundle, n_prompt=1, n_tokens=2)
    sweep = Sweep(methods=("dense-stream", "planes"), fetches=(0.02, 0.1), mlp_dram=("3.6b",))
    stream, *planes = run_sweep(bundle, workload, sweep, [Device.load("raspberry-pi-5")])
    assert [(r.method, r.fetch, r.fetch_glu, r.cache) for r in planes] == [
        ("planes", 0.02, 0.02, "lfu"),
        ("planes", 0.1, 0.1, "lfu"),
    ]
    assert planes[0].flash_bytes_per_token < planes[1].flash_bytes_per_token < stream.flash_bytes_per_token
    assert planes[0].tok_per_s > planes[1].tok_per_s > stream.tok_per_s
    assert all(3.3 < r.mlp_bits_per_weight <= 3.6 for r in planes)
    assert "planes 0.02 : 0.02" in sim_table(planes)
    with pytest.raises(ConfigError, match="--bits is for models of which only the shape is known"):
        open_model(str(Path(__file__).parent), base_bits=2)


def test_dense_methods_have_no_capacity() -> None:
    sweep = Sweep(methods=("dense-resident", "dense-stream", "dip"), capacity=(0.25, 0.5))
    assert [(row["method"], row["capacity"]) for row in sweep.options()] == [("dip", 0.25), ("dip", 0.5)]
    assert sweep.dense_left_out == ("dense-resident", "dense-stream")
    assert dataclasses.replace(sweep, capacity=()).dense_left_out == ()
    with pytest.raises(ConfigError) as e:
        Sweep(methods=("dense-stream",), capacity=(0.25, 0.5)).options()
    assert str(e.value) == "--capacity is of column caches, which dense-stream do not have: give --dram"


def test_one_split_of_the_density_is_instead_of_densities() -> None:
    rows = Sweep(methods=("dip",), densities=(0.5, 0.7), d_in=0.4, d_glu=0.6).options()
    assert rows == [{"method": "dip", "d_in": 0.4, "d_glu": 0.6, "cache": "lfu", "split": "uniform"}]


def test_options_of_pruned_methods() -> None:
    rows = Sweep(methods=("dip",), capacity=(0.0, 0.5), splits=("uniform", "miss-curve"), cold=True).options()
    assert [(row["capacity"], row["split"], row["cold"]) for row in rows] == [
        (0.0, "uniform", True),
        (0.5, "uniform", True),
        (0.5, "miss-curve", True),
    ]
    assert "cold" not in Sweep(methods=("dip",)).options()[0]


def test_equal_combinations_are_simulated_once() -> None:
    assert len(Sweep(methods=("dip", "dip"), densities=(0.5, 0.5), caches=("lru", "lru")).options()) == 1


@pytest.mark.parametrize("cache", ["none", "belady"])
def test_dip_ca_with_a_cache_that_means_nothing_there(cache: str) -> None:
    rows = Sweep(methods=("dip", "dip-ca"), caches=(cache, "lru")).options()
    assert [(row["method"], row["cache"]) for row in rows] == [("dip", cache), ("dip", "lru"), ("dip-ca", "lru")]
    with pytest.raises(ConfigError) as e:
        Sweep(methods=("dip-ca",), caches=(cache,)).options()
    assert str(e.value) == f"methods dip-ca with caches {cache} leave nothing to simulate: {NEEDS}"


SHARE = "it is the share of a region's columns that is cached, between 0 and 1"
CONFLICT = "--capacity says how many columns are cached, --dram and --mlp-dram do so too: give one"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"splits": ("uniform", "even")},
            "split 'even' is unknown: choose uniform, miss-curve, or a file with a JSON list of weights",
        ),
        ({"d_in": 0.5}, "d_in and d_glu go together: give both or neither"),
        ({"d_glu": 0.5}, "d_in and d_glu go together: give both or neither"),
        ({"capacity": (0.5, 1.2)}, f"capacity is 1.2: {SHARE}"),
        ({"capacity": (-0.1,)}, f"capacity is -0.1: {SHARE}"),
        ({"capacity": (float("nan"),)}, f"capacity is nan: {SHARE}"),
        ({"capacity": (0.5,), "dram": ("1GB",)}, CONFLICT),
        ({"capacity": (0.5,), "mlp_dram": ("50%", "60%")}, CONFLICT),
    ],
)
def test_sweeps_that_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as e:
        Sweep(**options)
    assert str(e.value) == message


# ------------------------------------------------------------------------------------------------ models and workloads


def test_a_model_is_a_bundle_or_a_shape(bundle: Bundle) -> None:
    found = open_model(str(bundle.path))
    assert (found.header, has_weights(found)) == (bundle.header, True)
    shape = open_model("phi-3-mini", bits=8, other_bits=4)
    assert shape.header == published_bundle("phi-3-mini", bits=8, other_bits=4).header
    assert not has_weights(shape)
    assert open_model("phi-3-mini").header == published_bundle("phi-3-mini", bits=4, other_bits=8).header


def test_models_that_are_refused(bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as e:
        open_model("phi3-mini")
    assert str(e.value) == "there is no model 'phi3-mini' among those whose shape is known; did you mean phi-3-mini?"
    for bits in ({"bits": 4}, {"other_bits": 8}):
        with pytest.raises(ConfigError) as e:
            open_model(str(bundle.path), **bits)
        assert str(e.value) == (f"--bits is for models of which only the shape is known; {bundle.path} has its own")
    with pytest.raises(BundleError):
        open_model(str(tmp_path))


@pytest.fixture
def letters(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tokenizer of one token a character."""
    letter = SimpleNamespace(encode=lambda text: [ord(c) % 160 for c in text])
    monkeypatch.setattr(tokenizer.Tokenizer, "open", lambda path: letter)


@pytest.mark.usefixtures("letters")
def test_a_text_is_cut_into_prompt_and_tokens(bundle: Bundle, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("abcdefghij")
    found = open_workload(bundle, n_prompt=4, n_tokens=3, text=path, threads=1)
    assert isinstance(found, ModelWorkload)
    assert (found.prompt, found.text, found.threads) == ([97, 98, 99, 100], [101, 102, 103], 1)
    own = open_workload(bundle, n_prompt=128, n_tokens=256)
    assert isinstance(own, ModelWorkload)
    assert (own.n_prompt, own.n_tokens) == (128, 256)
    with pytest.raises(ConfigError) as e:
        open_workload(bundle, n_prompt=6, n_tokens=5, text=path)
    assert str(e.value) == (
        f"{path} has 10 tokens, a prompt of 6 and 5 after it need 11: give a longer --text or ask for less"
    )
    with pytest.raises(ConfigError) as e:
        open_workload(bundle, n_prompt=10**6, n_tokens=5)
    assert re.fullmatch(
        r"dipper's own text has \d+ tokens, a prompt of 1000000 and 5 after it need 1000005: give a longer --text or "
        "ask for less",
        str(e.value),
    )


def test_generated_scores(bundle: Bundle) -> None:
    shape = published_bundle("phi-3-mini")
    for found in (
        open_workload(shape, n_prompt=4, n_tokens=3, seed=5),
        open_workload(bundle, n_prompt=4, n_tokens=3, seed=5, generated=True),
    ):
        assert isinstance(found, GeneratedWorkload)
        assert (found.n_prompt, found.n_tokens, found.seed) == (4, 3, 5)
    models = found.generator.fitted_on
    one = open_workload(shape, n_prompt=4, n_tokens=3, variant=models[-1])
    assert isinstance(one, GeneratedWorkload)
    assert one.generator.fitted_on == (models[-1],)
    with pytest.raises(ConfigError) as e:
        open_workload(shape, n_prompt=4, n_tokens=3, variant="nobody")
    assert str(e.value) == f"variant 'nobody' is unknown: choose {', '.join(models)}"


def test_workloads_that_are_refused(bundle: Bundle, tmp_path: Path) -> None:
    shape = published_bundle("phi-3-mini")
    with pytest.raises(ConfigError) as e:
        open_workload(shape, n_prompt=4, n_tokens=3, trace=tmp_path / "run.trace")
    assert str(e.value) == "a trace is of a bundle, and phi-3-mini is the shape of a model alone: drop --trace"
    for model, generated in ((shape, False), (bundle, True)):
        with pytest.raises(ConfigError) as e:
            open_workload(model, n_prompt=4, n_tokens=3, text=tmp_path / "text.txt", generated=generated)
        assert str(e.value) == "--text is for a real model: generated scores belong to no text"


def test_a_trace_has_its_own_tokens(bundle: Bundle, tmp_path: Path) -> None:
    from dipper.engine import Engine

    path = tmp_path / "run.trace"
    with Engine.open(bundle.path, EngineConfig(mlp_dram="1000b", context=32, trace=path)) as engine:
        engine.prefill(PROMPT)
        for token in TEXT:
            engine.step(token)
    found = open_workload(bundle, n_prompt=1, n_tokens=1, trace=path)
    assert isinstance(found, TraceWorkload)
    assert (found.n_prompt, found.n_tokens) == (len(PROMPT), len(TEXT))
    sweep = Sweep(methods=("dip",), densities=(0.7,), caches=("lru",), capacity=(0.5,))
    (record,) = run_sweep(bundle, found, sweep, [SLOW])
    (direct,) = run_sweep(bundle, ModelWorkload(bundle, PROMPT, text=TEXT), sweep, [SLOW])
    assert record.workload == {"kind": "recorded", "model": "llama", "trace": str(path)}
    assert (record.hit_rate, record.ledger_s) == (direct.hit_rate, direct.ledger_s)


# ------------------------------------------------------------------------------------------------ running


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """(method, density, gamma, cache) of every run of the real model."""
    made: list[tuple[Any, ...]] = []
    real = ModelWorkload._run

    def counted(self: ModelWorkload, engine: Any, setting: Any) -> Any:
        config = setting.config
        made.append((config.method, config.density, setting.gamma, setting.cache))
        return real(self, engine, setting)

    monkeypatch.setattr(ModelWorkload, "_run", counted)
    return made


def by(records: list[SimRecord], **wanted: Any) -> list[SimRecord]:
    return [r for r in records if all(getattr(r, name) == value for name, value in wanted.items())]


def test_one_recording_a_density_serves_caches_budgets_and_devices(
    bundle: Bundle, workload: ModelWorkload, runs: list[tuple[Any, ...]]
) -> None:
    sweep = Sweep(
        methods=("dense-stream", "dip", "dip-ca"), densities=(0.5, 0.6), gammas=(0.3,), caches=("lru", "belady"),
        mlp_dram=budgets(bundle, 0.25, 0.5), host="10MB",
    )  # fmt: skip
    records = run_sweep(bundle, workload, sweep, [SLOW, FAST])
    assert len(records) == 2 * (2 + 2 * 2 * 2 + 2 * 2)
    assert [r.device for r in records] == ["slow"] * 14 + ["fast"] * 14
    plain = [run for run in runs if run[0] == "dip"]
    assert [(density, gamma) for _, density, gamma, _ in plain] == [(0.5, 1.0), (0.6, 1.0)]
    # Below gamma 1 every cache size is a run, and no device is: 2 densities x 2 budgets.
    assert [run for run in runs if run[0] == "dip-ca"] == [
        ("dip-ca", density, 0.3, "lru") for density in (0.5, 0.6) for _ in range(2)
    ]
    for slow, fast in zip(records[:14], records[14:], strict=True):
        same = ("method", "density", "gamma", "cache", "hit_rate", "mlp_bits_per_weight", "cached_fraction", "workload")
        assert [getattr(slow, name) for name in same] == [getattr(fast, name) for name in same]
        assert slow.dram_bytes == fast.dram_bytes
        assert fast.tok_per_s > slow.tok_per_s
        assert fast.flash_bytes_per_token <= slow.flash_bytes_per_token  # narrower reads
        assert (slow.joules_per_token is None, fast.joules_per_token is None) == (False, True)
    small, large = by(records, device="slow", method="dip", density=0.5, cache="lru")
    assert small.hit_rate < large.hit_rate
    assert small.tok_per_s < large.tok_per_s
    best = by(records, device="slow", method="dip", density=0.5, cache="belady")
    assert best[0].hit_rate > small.hit_rate


def test_the_fields_of_a_record(bundle: Bundle, workload: ModelWorkload) -> None:
    (budget,) = budgets(bundle, 0.4)
    sweep = Sweep(densities=(0.5,), caches=("lru",), mlp_dram=(budget,), host="10MB")
    stream, dip, aware = run_sweep(bundle, workload, sweep, [SLOW])
    assert [r.method for r in (stream, dip, aware)] == ["dense-stream", "dip", "dip-ca"]
    assert [r.workload["kind"] for r in (stream, dip, aware)] == ["dense", "recorded", "live"]
    assert (stream.density, stream.cache, stream.gamma, stream.hit_rate) == (None, None, None, None)
    assert (dip.density, dip.d_in, dip.d_glu, dip.gamma, dip.cache) == (0.5, 0.5, 0.5, 1.0, "lru")
    assert (aware.gamma, aware.cache) == (0.5, "lru")
    assert 0 < dip.hit_rate < aware.hit_rate < 1
    for r in (stream, dip, aware):
        assert (r.model, r.device, r.split) == ("llama", "slow", "uniform")
        assert (r.n_prompt, r.n_tokens) == (len(PROMPT), len(TEXT))
        assert r.dram_bytes["host"] == 10**7
        assert r.dram_budget_bytes is None
        assert r.mlp_bits_per_weight <= float(budget[:-1])
        assert tuple(r.ledger_s) == tuple(LEDGER)
        assert r.tok_per_s == pytest.approx(r.n_tokens / sum(r.ledger_s.values()), rel=1e-12)
        assert 0 < r.tok_per_s <= r.tok_per_s_flat
        assert r.ttft_s > 0
        assert r.reads_per_token > 0
        assert r.flash_bytes_per_token >= 4096 * r.reads_per_token
        assert r.provenance is not None
        assert json.loads(json.dumps(r.as_dict()))["schema"] == "dipper-sim/1"


def test_the_context_is_what_the_workload_has(bundle: Bundle, workload: ModelWorkload) -> None:
    sweep = Sweep(methods=("dip",), capacity=(0.5,))
    kv = [run_sweep(bundle, workload, sweep, [SLOW], context=c)[0].dram_bytes["kv"] for c in (None, 19, 64)]
    assert kv[0] == kv[1] < kv[2]
    with pytest.raises(ConfigError) as e:
        run_sweep(bundle, workload, sweep, [SLOW], context=17)
    assert str(e.value) == "a context of 17 for 10 prompt tokens and 8 after them: use --ctx 18 or more"


def test_capacities_are_shares_of_every_region(bundle: Bundle, workload: ModelWorkload) -> None:
    sweep = Sweep(methods=("dip",), densities=(0.5,), caches=("none", "lru"), capacity=(0.0, 0.25, 1.0))
    records = run_sweep(bundle, workload, sweep, [SLOW])
    found = {(r.cache, r.cached_fraction): r for r in records}
    assert sorted(found) == [("lru", 0.0), ("lru", pytest.approx(0.25, abs=0.01)), ("lru", 1.0), ("none", 0.0)]
    assert found["lru", 0.0].hit_rate == found["none", 0.0].hit_rate == 0.0
    assert found["lru", 0.0].flash_bytes_per_token == found["none", 0.0].flash_bytes_per_token
    assert found["lru", 1.0].hit_rate > 0.5


def test_host_of_a_process_and_of_a_shape(bundle: Bundle, workload: ModelWorkload) -> None:
    sweep = Sweep(methods=("dip",), capacity=(0.5,))
    assert run_sweep(bundle, workload, sweep, [SLOW])[0].dram_bytes["host"] > 10**7  # this process
    for host, n_bytes in (("0", 0), ("12MB", 12 * 10**6)):
        record = run_sweep(bundle, workload, dataclasses.replace(sweep, host=host), [SLOW])[0]
        assert record.dram_bytes["host"] == n_bytes


def test_a_budget_that_is_too_small_names_the_least(bundle: Bundle, workload: ModelWorkload) -> None:
    sweep = Sweep(methods=("dip",), densities=(0.5,), dram=("100KB", "50MB"), host="10MB")
    message = (
        r"--dram gives 0\.1 MB, but dip with a context of 18 needs at least ([0-9.]+) MB here \(10\.0 MB of it is the "
        r"host process\): raise --dram to \1MB"
    )
    with pytest.raises(BudgetError) as e:
        run_sweep(bundle, workload, sweep, [SLOW])
    match = re.fullmatch(message, str(e.value))
    assert match
    named = dataclasses.replace(sweep, dram=(f"{match[1]}MB",))
    assert len(run_sweep(bundle, workload, named, [SLOW])) == 1
    # Told of, it is left out, on every device.
    skipped: list[str] = []
    records = run_sweep(bundle, workload, sweep, [SLOW, FAST], on_skip=skipped.append)
    assert [(r.device, r.dram_budget_bytes) for r in records] == [("slow", 50 * 10**6), ("fast", 50 * 10**6)]
    assert skipped == [
        f"{name}, dip dram 100KB density 0.5 cache lfu split uniform: {e.value}" for name in ("slow", "fast")
    ]
    skipped.clear()
    small = dataclasses.replace(sweep, dram=("100KB",))
    assert run_sweep(bundle, workload, small, [SLOW], on_skip=skipped.append) == []
    assert len(skipped) == 1


def test_a_device_with_less_dram_than_the_plan(bundle: Bundle, workload: ModelWorkload) -> None:
    tiny_device = dataclasses.replace(SLOW, name="tiny", dram=Dram(bytes=5 * 10**6, gbps=10.0))
    sweep = Sweep(methods=("dip",), capacity=(0.5,), host="10MB")
    with pytest.raises(BudgetError) as e:
        run_sweep(bundle, workload, sweep, [tiny_device])
    assert re.fullmatch(
        r"dip holds 1\d MB here, and tiny has 5 MB of DRAM: lower --dram, --mlp-dram or --ctx, or use --method "
        "dense-stream, dip or dip-ca",
        str(e.value),
    )
    skipped: list[str] = []
    records = run_sweep(bundle, workload, sweep, [tiny_device, SLOW], on_skip=skipped.append)
    assert [r.device for r in records] == ["slow"]
    assert skipped == [f"tiny, dip capacity 0.5 density 0.7 cache lfu split uniform: {e.value}"]


def test_slots_by_miss_curves(tmp_path: Path) -> None:
    """Recorded as such, and on the device that it was made for its reads take no longer than an even split's."""
    path = pack(tiny.write_hf(tmp_path / "hf", "gemma3"), tmp_path / "gemma3.dipper", tokenizer=False)
    bundle = Bundle.open(path)
    workload = ModelWorkload(bundle, PROMPT, text=TEXT)
    sweep = Sweep(
        methods=("dense-stream", "dip"), densities=(0.5,), caches=("lru",), mlp_dram=budgets(bundle, 0.3),
        splits=("uniform", "miss-curve"), host="0",
    )  # fmt: skip
    records = run_sweep(bundle, workload, sweep, [SLOW, FAST])
    assert [(r.device, r.method, r.split) for r in records] == [
        (device, method, split)
        for device in ("slow", "fast")
        for method, split in (("dense-stream", "uniform"), ("dip", "uniform"), ("dip", "miss-curve"))
    ]
    for device in ("slow", "fast"):
        even, shared = by(records, device=device, method="dip")
        assert shared.io_s <= even.io_s * (1 + 1e-9)
        assert shared.tok_per_s >= even.tok_per_s * (1 - 1e-9)
        assert sum(shared.dram_bytes.values()) <= sum(even.dram_bytes.values()) * 1.01
    assert by(records, device="slow", split="miss-curve")[0].io_s < by(records, device="slow", method="dip")[0].io_s


def test_miss_curves_share_out_a_given_capacity_too(bundle: Bundle, workload: ModelWorkload) -> None:
    sweep = Sweep(
        methods=("dip",), densities=(0.5,), caches=("lru",), capacity=(0.25, 0.5), splits=("uniform", "miss-curve")
    )
    records = run_sweep(bundle, workload, sweep, [SLOW])
    for share in (0.25, 0.5):
        even, shared = [r for r in records if r.cached_fraction == pytest.approx(share, abs=0.02)]
        assert (even.split, shared.split) == ("uniform", "miss-curve")
        assert shared.io_s <= even.io_s * (1 + 1e-9)


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_a_miss_curve_keeps_the_bytes_of_a_capacity(tmp_path: Path, kind: str) -> None:
    """Within one column a region, and never more of them."""
    path = pack(tiny.write_hf(tmp_path / "hf", kind), tmp_path / f"{kind}.dipper", tokenizer=False)
    bundle = Bundle.open(path)
    workload = ModelWorkload(bundle, PROMPT, text=TEXT, threads=2)
    shares = (0.05, 0.1, 0.2, 0.33, 0.5)
    sweep = Sweep(
        methods=("dip", "dip-ca"), densities=(0.5,), caches=("lru",), capacity=shares,
        splits=("uniform", "miss-curve"), host="0",
    )  # fmt: skip
    records = run_sweep(bundle, workload, sweep, [SLOW])
    column_a_region = sum(region["record_bytes"] for region in bundle.header["regions"])
    assert [r.split for r in records] == ["uniform", "miss-curve"] * 2 * len(shares)
    for even, shared in zip(records[::2], records[1::2], strict=True):
        spare = even.dram_bytes["slots"] - shared.dram_bytes["slots"]
        assert 0 <= spare <= column_a_region, (even.method, even.cached_fraction)
    assert len({r.dram_bytes["slots"] for r in records[::2][: len(shares)]}) == len(shares)


def test_dense_methods_are_told_as_left_out(bundle: Bundle, workload: ModelWorkload) -> None:
    sweep = Sweep(methods=("dense-resident", "dense-stream", "dip"), densities=(0.5,), capacity=(0.5,))
    skipped: list[str] = []
    records = run_sweep(bundle, workload, sweep, [SLOW, FAST], on_skip=skipped.append)
    assert [(r.device, r.method) for r in records] == [("slow", "dip"), ("fast", "dip")]
    assert skipped == [  # once, whatever the number of devices
        f"{method}: --capacity is of column caches; give --dram or --mlp-dram to compare with it"
        for method in ("dense-resident", "dense-stream")
    ]


def test_no_slots_have_no_split() -> None:
    rows = Sweep(methods=("dip",), caches=("none", "lru"), splits=("uniform", "miss-curve")).options()
    assert [(row["cache"], row["split"]) for row in rows] == [
        ("none", "uniform"),
        ("lru", "uniform"),
        ("lru", "miss-curve"),
    ]
    with pytest.raises(ConfigError) as e:
        Sweep(methods=("dip",), caches=("none",), splits=("miss-curve",)).options()
    assert str(e.value) == f"methods dip with caches none leave nothing to simulate: {NEEDS}"


def test_a_given_split(bundle: Bundle, workload: ModelWorkload, tmp_path: Path) -> None:
    file = tmp_path / "weights.json"
    file.write_text("[1, 0, 0.25, 3, 0.5, 0.5]")
    sweep = Sweep(
        methods=("dip",), densities=(0.5,), caches=("lru",), mlp_dram=budgets(bundle, 0.3),
        splits=("uniform", str(file)), host="0",
    )  # fmt: skip
    even, given = run_sweep(bundle, workload, sweep, [SLOW])
    assert (even.split, given.split) == ("uniform", "given")
    assert given.io_s != even.io_s
    assert sum(given.dram_bytes.values()) <= sum(even.dram_bytes.values()) * 1.01
    with pytest.raises(ConfigError) as e:
        run_sweep(bundle, workload, Sweep(methods=("dip",), capacity=(0.5,), splits=(str(file),)), [SLOW])
    assert str(e.value) == (
        "--capacity caches the same share everywhere, --split says where more: give a budget with it"
    )
    file.write_text("[1, 2]")
    with pytest.raises(ConfigError) as e:
        run_sweep(bundle, workload, sweep, [SLOW])
    assert str(e.value) == "the split has 2 weights, the model 6 regions: it is for another model"
    for text in ("", "[1, ", '["much"]', '{"a": 1}', "5", "[[1]]", "null"):
        file.write_text(text)
        with pytest.raises(ConfigError) as e:
            Sweep(splits=(str(file),))
        assert str(e.value).startswith(f"{file} is no JSON list of numbers (")
        assert str(e.value).endswith("): give a weight by region")


def test_generated_scores_for_a_shape() -> None:
    shape = published_bundle("phi-3-mini")
    workload = open_workload(shape, n_prompt=2, n_tokens=2)
    records = run_sweep(shape, workload, Sweep(methods=("dip",), dram=("2GB",)), [SLOW])
    assert records[0].workload["kind"] == "generated"
    assert records[0].dram_bytes["host"] == 0
    assert sum(records[0].dram_bytes.values()) <= 2 * 10**9 == records[0].dram_budget_bytes


# ------------------------------------------------------------------------------------------------ figure


def test_a_figure_is_the_same_bytes_twice(bundle: Bundle, workload: ModelWorkload, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    sweep = Sweep(densities=(0.5,), caches=("lru",), mlp_dram=budgets(bundle, 0.25, 0.5), host="10MB")
    records = run_sweep(bundle, workload, sweep, [SLOW, FAST])
    for name in ("a.svg", "b.svg"):
        draw_sweep(records, tmp_path / name)
    drawn = (tmp_path / "a.svg").read_bytes()
    assert drawn == (tmp_path / "b.svg").read_bytes()
    assert drawn.startswith(b"<?xml")
    draw_sweep(records[:1], tmp_path / "one.png")
    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")


def test_labels_of_a_figure(bundle: Bundle, workload: ModelWorkload) -> None:
    sweep = Sweep(densities=(0.5,), gammas=(0.3,), caches=("lru",), mlp_dram=budgets(bundle, 0.4))
    records = run_sweep(bundle, workload, sweep, [SLOW])
    label = sweep_drawing._told
    assert [label(r) for r in records] == ["dense-stream", "dip lru 0.50", "dip-ca γ 0.3 lru 0.50"]
    shared = dataclasses.replace(records[1], split="miss-curve")
    assert label(shared) == "dip lru 0.50 miss-curve"
    assert sweep_drawing._kinds(records) == "masks live, recorded"
    assert sweep_drawing._kinds(records[:1]) == "dense"
