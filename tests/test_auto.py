"""Method `auto`: what it settles on, within which budgets, and what it says about it."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest

import tiny
from dipper import auto
from dipper import tokenizer as tokenizer_module
from dipper.auto import LOSS, choose
from dipper.budget import EngineConfig, plan_run
from dipper.bundle import Bundle, pack
from dipper.cli import main
from dipper.engine import Engine
from dipper.errors import BudgetError, ConfigError
from dipper.forecast import forecast
from fakes import FakeTokenizer, device

CONTEXT = 64
AUTO = EngineConfig(method="auto", context=CONTEXT)
TOKENS = [3, 14, 15, 9, 26, 5, 35]
UNSPLIT = "the model does not fit, and its columns are not split (dipper pack --base-bits)"
UNKNOWN = "no setting of planes is known to lose at most 2.3 % here in this much DRAM"


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    """The same model in one piece and split; of so many layers that buffers take little of a budget."""
    folder = tmp_path_factory.mktemp("auto")
    source = tiny.write_hf(folder / "llama", "llama", intermediate_size=1024, num_hidden_layers=10)
    options = {"base_bits": (2, 3), "unit_bytes": 4096}
    return {
        "whole": Bundle.open(pack(source, folder / "whole.dipper", "4", tokenizer=False)),
        "split": Bundle.open(pack(source, folder / "split.dipper", "4", tokenizer=False, **options)),
    }


@pytest.fixture(params=["whole", "split"])
def either(bundles, request):
    return bundles[request.param]


@pytest.fixture
def split(bundles):
    return bundles["split"]


@pytest.fixture
def measured(monkeypatch, split):
    """Replaces the measured table by points of the split model, each given as changes of a good one."""

    def put(*points, sha256=split.header["source"]["sha256"]):
        good = {"base_bits": [2, 3], "fetch": 0.05, "fetch_glu": 0.02, "whole": [], "bits": 4.0, "increase": 0.01}
        monkeypatch.setattr(auto, "_measured", lambda: {sha256: [{**good, **point} for point in points]})

    put()
    monkeypatch.setattr(auto, "device_for", lambda path, profile: device())
    return put


def needs(bundle, method):
    """The smallest process budget of a method, the host process aside."""
    return plan_run(bundle, EngineConfig(method=method, dram=10**12, context=CONTEXT), 0).minimum_bytes


def with_budget(bundle, bits):
    """`auto` with this many bits per MLP weight beside what dense streaming needs of the rest."""
    plan = plan_run(bundle, EngineConfig(method="dense-stream", mlp_dram=f"{bits}b", context=CONTEXT), 0)
    return dataclasses.replace(AUTO, dram=plan.total_bytes - plan.mlp_bytes + int(bits * bundle.mlp_weights / 8))


# ------------------------------------------------------------------------------------------------ dense


def test_all_is_resident_where_it_fits(either):
    least = needs(either, "dense-resident")
    choice = choose(either, dataclasses.replace(AUTO, dram=least), 0)
    assert (choice.config.method, choice.why) == ("dense-resident", "all of the model fits")
    assert choice.plan.total_bytes == least
    choice = choose(either, dataclasses.replace(AUTO, dram=least - 1), 0)
    assert choice.config.method == "dense-stream"
    assert choice.plan.total_bytes < least


def test_the_host_process_counts(either):
    config = dataclasses.replace(AUTO, dram=needs(either, "dense-resident") + 1000)
    assert choose(either, config, 1000).config.method == "dense-resident"
    assert choose(either, config, 1001).config.method == "dense-stream"


def test_without_a_budget_it_is_what_the_system_could_give(either, monkeypatch):
    least = needs(either, "dense-resident")
    for available, method in ((least, "dense-resident"), (least - 1, "dense-stream")):
        monkeypatch.setattr(auto, "available_bytes", lambda available=available: available)
        choice = choose(either, AUTO, 0)
        assert (choice.config.method, choice.config.dram) == (method, available)
        assert choice.plan.budget_bytes == available


def test_available_memory_is_a_number_of_this_machine():
    assert 2**24 < auto.available_bytes() < 2**50


def test_bundles_in_one_piece_are_streamed(bundles, measured):
    measured({"base_bits": [0, 0]})
    choice = choose(bundles["whole"], with_budget(bundles["whole"], 4), 0)
    assert (choice.config.method, choice.why) == ("dense-stream", UNSPLIT)
    assert choice.plan == plan_run(bundles["whole"], choice.config, 0)


@pytest.mark.parametrize(
    "point",
    [
        None,
        {"base_bits": [2, 2]},
        {"base_bits": [3, 3]},
        {"bits": 4.02},
        {"increase": LOSS + 1e-6},
    ],
)
def test_what_was_not_measured_is_not_assumed(split, measured, point):
    measured(*([] if point is None else [point]))
    choice = choose(split, with_budget(split, 4), 0)
    assert (choice.config.method, choice.why) == ("dense-stream", UNKNOWN)
    assert (choice.config.fetch, choice.config.whole) == (None, ())


def test_points_of_another_model_do_not_count(split, measured):
    measured({}, sha256="0" * 64)
    assert choose(split, with_budget(split, 4), 0).why == UNKNOWN


def test_a_budget_of_the_mlp_leaves_nothing_resident(either, measured):
    config = dataclasses.replace(AUTO, mlp_dram="1000b")
    choice = choose(either, config, 0)
    assert choice.config == dataclasses.replace(config, method="dense-stream")
    assert choice.config.dram is None
    assert all(choice.plan.options["pinned"])


def test_a_budget_that_is_too_small_names_the_smallest(either, measured):
    measured({})
    least = needs(either, "dense-stream")
    with pytest.raises(BudgetError) as error:
        choose(either, dataclasses.replace(AUTO, dram=least - 1), 0)
    megabytes = math.ceil(least / 1e5) / 10
    assert str(error.value).startswith(f"--dram gives {(least - 1) / 1e6:.1f} MB, but dense-stream with a context of ")
    assert str(error.value).endswith(f": raise --dram to {megabytes:.1f}MB")
    assert choose(either, dataclasses.replace(AUTO, dram=f"{megabytes:.1f}MB"), 0).config.method == "dense-stream"
    with pytest.raises(BudgetError, match=r"^--mlp-dram gives .*: raise --mlp-dram to [0-9.]+b or more$"):
        choose(either, dataclasses.replace(AUTO, mlp_dram="0.01b"), 0)


# ------------------------------------------------------------------------------------------------ planes


def test_planes_where_they_read_less(split, measured):
    measured({"whole": [2, 0], "increase": 0.0123})
    config = dataclasses.replace(with_budget(split, 4.2), kv="int8", threads=1, cache="lru", cold=True)
    choice = choose(split, config, 0)
    assert choice.config == dataclasses.replace(config, method="planes", fetch=0.05, fetch_glu=0.02, whole=(2, 0))
    assert choice.plan == plan_run(split, choice.config, 0)
    assert choice.plan.total_bytes <= config.dram
    stream = plan_run(split, dataclasses.replace(config, method="dense-stream"), 0)
    planes_s, stream_s = (forecast(split, plan, device()).token_s for plan in (choice.plan, stream))
    assert planes_s < 0.95 * stream_s
    assert choice.why == (
        f"measured: perplexity +1.2 % at 4.00 bits per MLP weight; {1e3 * planes_s:.0f} ms a token expected, "
        f"{1e3 * stream_s:.0f} of dense streaming, on a disk of 0.00 GB/s and 0.0 µs a read (measured just now)"
    )


@pytest.mark.parametrize("budget", ["dram", "mlp_dram"])
def test_points_up_to_the_budget_count(split, measured, budget):
    """Either budget; where both are given the smaller counts."""
    config = with_budget(split, 4) if budget == "dram" else dataclasses.replace(AUTO, mlp_dram="4b")
    other = {"mlp_dram": "4.5b"} if budget == "dram" else {"dram": 10**12}
    for bits, method in ((3.5, "planes"), (4.0, "planes"), (4.009, "planes"), (4.02, "dense-stream")):
        measured({"bits": bits})
        assert choose(split, config, 0).config.method == method, bits
        assert choose(split, dataclasses.replace(config, **other), 0).config.method == method, bits


def test_of_several_points_the_one_with_the_most_dram(split, measured):
    measured(
        {"fetch": 0.01, "bits": 3.5},
        {"fetch": 0.02, "bits": 4.0, "increase": 0.02},
        {"fetch": 0.03, "bits": 4.0, "increase": 0.01},  # as much DRAM, and loses less
        {"fetch": 0.04, "bits": 4.0, "increase": LOSS + 0.01},
        {"fetch": 0.06, "bits": 4.5},
    )
    assert choose(split, with_budget(split, 4.2), 0).config.fetch == 0.03
    assert choose(split, with_budget(split, 3.6), 0).config.fetch == 0.01
    measured({"increase": LOSS}, {"bits": 3.9, "increase": -0.001})
    assert choose(split, with_budget(split, 4), 0).config.fetch == 0.05


def test_of_points_with_as_much_dram_the_fastest_and_of_equals_the_one_that_loses_least(split, measured):
    slow, fast = {"fetch": 0.08, "increase": 0.005}, {"fetch": 0.02, "increase": 0.015}
    for points in ((slow, fast), (fast, slow)):
        measured(*points)
        assert choose(split, with_budget(split, 4.0), 0).config.fetch == 0.02
    measured({"increase": 0.015}, {"increase": 0.005}, {"increase": 0.01})
    assert choose(split, with_budget(split, 4.0), 0).why.startswith("measured: perplexity +0.5 %")


def test_planes_that_read_nearly_as_much_are_not_worth_it(split, measured):
    config = with_budget(split, 4)
    stream = plan_run(split, dataclasses.replace(config, method="dense-stream"), 0)
    found = set()
    for fetch in np.arange(0.02, 1.01, 0.02):
        measured({"fetch": float(fetch), "fetch_glu": float(fetch)})
        choice = choose(split, config, 0)
        planes = plan_run(
            split, dataclasses.replace(config, method="planes", fetch=float(fetch), fetch_glu=float(fetch)), 0
        )
        planes_s, stream_s = (forecast(split, plan, device()).token_s for plan in (planes, stream))
        slow = planes_s > 0.95 * stream_s
        assert choice.config.method == ("dense-stream" if slow else "planes"), (fetch, planes_s, stream_s)
        if slow:
            assert choice.why == (
                f"planes is not worth its loss of quality: {1e3 * planes_s:.0f} ms a token expected, "
                f"{1e3 * stream_s:.0f} of dense streaming, on a disk of 0.00 GB/s and 0.0 µs a read (measured just now)"
            )
            assert (choice.config.fetch, choice.config.fetch_glu) == (None, None)
        found.add(choice.config.method)
    assert found == {"dense-stream", "planes"}


def test_where_streaming_reads_nothing_planes_do_not_matter(split, measured):
    """All of the MLP is pinned."""
    measured({"bits": 2.0, "fetch": 0.5})
    choice = choose(split, dataclasses.replace(AUTO, mlp_dram="1000b"), 0)
    assert (choice.config.method, choice.why) == ("dense-stream", "all of the MLP fits")
    assert choice.plan.token_bytes == 0


# ------------------------------------------------------------------------------------------------ the disk


@pytest.mark.parametrize(
    ("flash", "method"),
    [
        ({"gbps": 1e-3}, "planes"),  # bytes decide
        ({"gbps": 1.0, "cost_per_read_us": 500.0}, "dense-stream"),  # reads decide
        ({"gbps": 1e-3, "latency_us": 1e5}, "dense-stream"),  # a batch a region
        ({"gbps": 1e-3, "sustained_reads_per_s": 10.0}, "dense-stream"),
    ],
)
def test_the_disk_decides(split, measured, monkeypatch, flash, method):
    measured({"fetch": 0.2, "fetch_glu": 0.1})
    asked = []

    def found(path, profile):
        asked.append((path, profile))
        return device(**flash)

    monkeypatch.setattr(auto, "device_for", found)
    choice = choose(split, dataclasses.replace(with_budget(split, 4), device_profile="here.toml"), 0)
    assert choice.config.method == method
    assert asked == [(split.path, "here.toml")]
    assert choice.config.device_profile is None  # is no option of the method that was chosen


def test_slow_products_decide_too(split, measured, monkeypatch):
    """Streaming reads while it multiplies; a refined region waits for both."""
    measured({})
    for gweights, method in ((1e6, "planes"), (1e-6, "dense-stream")):
        monkeypatch.setattr(auto, "device_for", lambda *_, rate=gweights: device(gweights=rate))
        assert choose(split, with_budget(split, 4), 0).config.method == method


def test_a_profile_stands_in_for_the_probe(split, measured, monkeypatch, tmp_path):
    monkeypatch.undo()
    sha256 = split.header["source"]["sha256"]
    point = {"base_bits": [2, 3], "fetch": 0.05, "fetch_glu": 0.02, "whole": [], "bits": 4.0, "increase": 0.01}
    monkeypatch.setattr(auto, "_measured", lambda: {sha256: [point]})
    device(name="slow").save(tmp_path / "slow.toml")
    config = dataclasses.replace(with_budget(split, 4), device_profile=tmp_path / "slow.toml")
    choice = choose(split, config, 0)
    assert choice.config.method == "planes"
    assert choice.why.endswith("on a disk of 0.00 GB/s and 0.0 µs a read (slow)")
    with pytest.raises(ConfigError, match=r"^there is no device 'no\.toml'"):
        choose(split, dataclasses.replace(config, device_profile="no.toml"), 0)


# ------------------------------------------------------------------------------------------------ the table


def test_the_measured_table_can_be_read():
    auto._measured.cache_clear()
    for sha256, points in auto._measured().items():
        assert len(sha256) == 64
        for point in points:
            assert len(point["base_bits"]) == 2
            assert all(0 <= bits <= 4 for bits in point["base_bits"])
            config = EngineConfig(
                method="planes", fetch=point["fetch"], fetch_glu=point["fetch_glu"], whole=tuple(point["whole"])
            )
            assert config.fetches == (point["fetch"], point["fetch_glu"])
            assert 0 < point["bits"] < 16
            assert -0.1 < point["increase"] < 10


def test_base_bits_of_a_bundle(bundles, tmp_path):
    assert [auto.base_bits(bundles[name]) for name in ("whole", "split")] == [[0, 0], [2, 3]]
    source = tiny.write_hf(tmp_path / "llama", "llama")
    glu = pack(source, tmp_path / "glu.dipper", "4", tokenizer=False, base_bits=(0, 2))
    assert auto.base_bits(Bundle.open(glu)) == [0, 2]


# ------------------------------------------------------------------------------------------------ where it is used


def test_auto_is_settled_before_it_is_planned(split):
    with pytest.raises(ConfigError, match=r"auto is no plan yet.*choose settles it"):
        plan_run(split, with_budget(split, 4.2), 0)


@pytest.mark.parametrize(("method", "bits"), [("dense-resident", None), ("dense-stream", 3.5), ("planes", 4.2)])
def test_an_engine_says_what_auto_is(split, measured, method, bits):
    measured({})
    config = dataclasses.replace(AUTO, dram=10**12) if bits is None else dataclasses.replace(AUTO, mlp_dram=f"{bits}b")
    choice = choose(split, config, 0)
    assert choice.config.method == method
    told = []
    with Engine.open(split.path, config, told.append) as engine:
        assert told == [engine.plan]
        assert engine.config == choice.config
        assert engine.plan.options == choice.plan.options
        assert f"auto is {method}: {choice.why}" in engine.notes
        rows = [engine.prefill(TOKENS), engine.step(5)]
    with Engine.open(split.path, choice.config) as engine:
        assert not [note for note in engine.notes if note.startswith("auto")]
        for row, same in zip(rows, (engine.prefill(TOKENS), engine.step(5)), strict=True):
            assert np.array_equal(row.view(np.int32), same.view(np.int32))


def test_a_context_over_the_models_is_refused_first(split):
    with pytest.raises(ConfigError) as error:
        Engine.open(split.path, EngineConfig(method="auto", context=10**7))
    assert str(error.value) == "a context of 10000000 is over the model's 128: lower --ctx"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fetch": 0.1}, "fetch goes with --method planes, not auto"),
        ({"whole": (1,)}, "whole layers go with --method planes, not auto"),
        ({"gamma": 0.5}, "gamma 0.5 goes with --method dip-ca, not auto"),
        (
            {"calibration": "c.npz"},
            "a calibration is about pruning, and auto does none: use --method dip or dip-ca",
        ),
    ],
)
def test_what_does_not_go_with_auto(options, message):
    with pytest.raises(ConfigError) as error:
        EngineConfig(method="auto", **options)
    assert str(error.value) == message


@pytest.mark.parametrize(("budget", "method"), [([], "dense-resident"), (["--mlp-dram", "4.2b"], "planes")])
def test_dipper_run_without_a_method(split, measured, monkeypatch, capsys, budget, method):
    measured({})
    monkeypatch.setattr(tokenizer_module.Tokenizer, "open", lambda path: FakeTokenizer())
    args = ["run", str(split.path), "hi", "--raw", "-n", "4", "--no-probe"]
    assert main([*args, *budget, "--json"]) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record["method"] == method
    assert [note for note in record["notes"] if note.startswith(f"auto is {method}: ")]
    assert main([*args, *budget]) == 0
    assert f"auto is {method}: " in capsys.readouterr().out
