"""Kinds of cells: what configurations ask for is accepted, and a cell gives what calling the library gives."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import tiny
from dipper.bundle import Bundle, pack
from dipper.checksums import modules_of
from dipper.device import Device
from dipper.errors import ConfigError, DipperError
from dipper.experiment import Cell, Experiment
from dipper.kinds import KINDS, Context, benchmarked, compensated, evaluated, packed, simulated
from dipper.kinds.packed import bundle_of
from dipper.published import names, published_bundle
from dipper.records import SimRecord
from dipper.sweep import Sweep, open_workload, run_sweep

CONFIGS = Path(__file__).parents[1] / "experiments" / "configs"
OTHERS = ("rivals.toml",)  # of scripts
PAPER = ["density", "headline", "dram", "bandwidth", "caches", "cache-aware", "compensation", "split", "thresholds"]
EXPERIMENTS = [path for path in sorted(CONFIGS.glob("*.toml")) if path.name not in OTHERS]


def cells_of(path: Path) -> list[Cell]:
    return [cell for block in Experiment.load(path).blocks for cell in block.cells]


def context(tmp_path: Path, model: Path | str = "phi-3-mini", **changes: Any) -> Context:
    return Context(**{"model": str(model), "name": "tiny", "workdir": tmp_path / "work", "threads": 2, **changes})


# ------------------------------------------------------------------------------------------------ configurations


def test_there_are_ten():
    assert sorted(path.stem for path in EXPERIMENTS) == sorted([*PAPER, "beyond"])


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_configurations(path):
    experiment = Experiment.load(path)
    assert experiment.caption
    assert experiment.models
    for cell in cells_of(path):
        options = cell.options
        assert modules_of(cell.sources)
        if cell.kind == "simulate":
            swept = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items() if k in simulated._SWEPT}
            assert Sweep(**swept).options()
            simulated._device_of(options)
        if cell.kind == "benchmark":
            assert (CONFIGS.parents[1] / "benchmarks" / f"{options['script']}.py").is_file()


@pytest.mark.torch
@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_rules_of_configurations_can_do_what_is_asked(path):
    pytest.importorskip("torch")
    for cell in cells_of(path):
        if cell.kind in ("perplexity", "tasks"):
            evaluated.method_of(cell.options)


def test_models_without_weights_are_asked_for_nothing_that_needs_some():
    for experiment in map(Experiment.load, EXPERIMENTS):
        for model in set(experiment.models) & set(names()):
            assert {cell.kind for cell in experiment.cells(model)} == {"simulate"}, f"{experiment.name}: {model}"


def test_an_unknown_option_names_the_nearest():
    with pytest.raises(ConfigError, match="a cell of kind perplexity has no option 'densty'; did you mean density"):
        KINDS["perplexity"].check(["method", "densty"])


@pytest.mark.parametrize("kind", KINDS.values(), ids=lambda kind: kind.name)
def test_an_option_that_is_needed_is_named(kind):
    for name in kind.required:
        with pytest.raises(ConfigError, match=f"a cell of kind {kind.name} lacks '{name}'"):
            kind.check(kind.options - {name})


def test_what_decides_a_result_is_among_its_sources():
    options = {"script": "bench_planes", "device": "paper-phone"}
    found = {name: {p.name for p in modules_of(kind.sources_of(options))} for name, kind in KINDS.items()}
    assert {"kind.py", "evaluated.py", "method.py", "dip.py", "calibration.py", "checkpoint.py", "glu.py"} <= found[
        "perplexity"
    ]
    assert (
        found["perplexity"] | {"compensated.py", "compensation.py", "distill.py", "head_losses.py"}
        == found["compensation"]
    )
    read = {"workload.py", "trace.py", "reads.py", "glu.py", "paper-phone.toml", "bench.txt", "generator.npz"}
    assert {"simulated.py", *read} <= found["simulate"]
    assert "apple-a18.toml" not in found["simulate"]
    run = {"bench_planes.py", "harness.py", "held_disk.sh", "planes.toml", "engine.py", "reads.py"}
    assert {"benchmarked.py", *run} <= found["benchmark"]
    for of in found.values():  # a page, a message or a download changes no figure
        assert "_core" in of
        assert not of & {"report.py", "errors.py", "sources.py", "reproduce.py", "cli.py"}
    assert "engine.py" not in found["perplexity"]


def test_what_must_agree_within_error_bars_is_of_what_varies():
    for kind in KINDS.values():
        assert all(any(name.startswith(whole) for whole in kind.varies) for name in kind.within), kind.name
        assert not kind.timed or kind.within, kind.name  # else a check of it could not fail
    assert KINDS["compensation"].within


# ------------------------------------------------------------------------------------------------ simulate

SIMULATED = {
    "methods": ["dense-stream", "dip", "dip-ca"], "densities": [0.5], "caches": ["lfu"], "gammas": [0.5],
    "mlp_dram": ["70%"], "device": "paper-phone", "context": 64, "n_prompt": 8, "n_tokens": 6,
}  # fmt: skip


def without(records: list[SimRecord]) -> list[dict[str, Any]]:
    return [json.loads(json.dumps({**record.as_dict(), "provenance": None})) for record in records]


def test_simulated_as_by_the_library(tmp_path):
    sweep = Sweep(densities=(0.5,), mlp_dram=("70%",), host="0")
    bundle = published_bundle("phi-3-mini", bits=4, other_bits=4)
    workload = open_workload(bundle, n_prompt=8, n_tokens=6, seed=3)
    expected = run_sweep(bundle, workload, sweep, [Device.load("paper-phone")], context=64, threads=1)
    result = KINDS["simulate"].measure({**SIMULATED, "bits": 4, "other_bits": 4, "seed": 3}, context(tmp_path))
    assert json.loads(json.dumps(result)) == {"records": without(expected), "skipped": []}


def test_a_cell_changes_the_device(tmp_path):
    flat, slow = (
        KINDS["simulate"].measure({**SIMULATED, **more}, context(tmp_path))["records"]
        for more in ({}, {"flash_gbps": 2, "cost_per_read_us": 16, "alignment": 4096})
    )
    assert slow[0]["tok_per_s"] == pytest.approx(2 * flat[0]["tok_per_s"], rel=0.1)  # dense: few reads, large ones
    assert slow[1]["tok_per_s"] < flat[1]["tok_per_s"]
    assert slow[1]["tok_per_s_flat"] > flat[1]["tok_per_s"]


def test_what_no_budget_holds_is_told(tmp_path):
    result = KINDS["simulate"].measure({**SIMULATED, "mlp_dram": ["1%", "70%"]}, context(tmp_path))
    assert len(result["records"]) == 3
    assert len(result["skipped"]) == 3
    assert all("mlp_dram 1%" in told for told in result["skipped"])
    nothing = KINDS["simulate"].measure({**SIMULATED, "mlp_dram": ["1%"]}, context(tmp_path))
    assert (nothing["records"], nothing["skipped"]) == ([], result["skipped"])


def test_a_shape_reads_no_text(tmp_path):
    with pytest.raises(ConfigError, match="phi-3-mini is a shape without weights, which reads no text"):
        KINDS["simulate"].measure({**SIMULATED, "text": "a.txt"}, context(tmp_path))


def test_a_value_where_a_simulation_has_lists(tmp_path):
    with pytest.raises(ConfigError, match=r"methods of a cell of kind simulate is 'dip': give a list, \['dip'\]"):
        KINDS["simulate"].measure({**SIMULATED, "methods": "dip"}, context(tmp_path))


def test_a_bundle_of_other_code_is_not_used_again(tmp_path, gguf, monkeypatch):
    given = context(tmp_path, gguf)
    first = bundle_of(given)
    monkeypatch.setattr(packed, "packing_code", lambda: "other")
    assert bundle_of(given) != first
    assert bundle_of(given).is_dir()


SHAPE = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 320, "num_attention_heads": 4}


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    types = dict.fromkeys(("ffn_gate", "ffn_up", "ffn_down"), "Q4_0")
    return tiny.write_gguf(tmp_path / "m.gguf", "llama", types, vocabulary=tiny.bpe_keys(), **SHAPE)


def test_real_masks_and_a_bundle_packed_once(tmp_path, gguf):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "t.txt").write_text("The sea is wide. " * 20)
    given = context(tmp_path, gguf, data=tmp_path / "data")
    options = {**SIMULATED, "text": "t.txt", "mlp_dram": ["12b"]}  # a tiny model has more staging than weights
    assert KINDS["simulate"].needs_data(options) == ("t.txt",)
    result = KINDS["simulate"].measure(options, given)
    bundle = Bundle.open(pack(gguf, tmp_path / "own.dipper"))
    workload = open_workload(bundle, n_prompt=8, n_tokens=6, text=tmp_path / "data" / "t.txt", threads=2)
    sweep = Sweep(densities=(0.5,), mlp_dram=("12b",), host="0")
    expected = run_sweep(bundle, workload, sweep, [Device.load("paper-phone")], context=64, threads=1)
    assert json.loads(json.dumps(result))["records"] == without(expected)
    assert {r["workload"]["kind"] for r in result["records"]} == {"dense", "recorded", "live"}
    (packed,) = given.workdir.glob("*.dipper")
    before = packed.stat().st_mtime_ns
    assert bundle_of(given) == packed
    assert packed.stat().st_mtime_ns == before


def test_a_split_bundle_is_another(tmp_path, gguf):
    given = context(tmp_path, gguf)
    plain, split = bundle_of(given), bundle_of(given, base_bits=(2, 2), unit_bytes=4096)
    assert plain != split
    assert all(region["base"] is not None for region in Bundle.open(split).header["regions"])
    assert split == bundle_of(given, base_bits=(2, 2), unit_bytes=4096)
    with pytest.raises(ConfigError, match="is a bundle, which cannot be split again"):
        bundle_of(context(tmp_path, plain), base_bits=2)


# ------------------------------------------------------------------------------------------------ benchmark


@pytest.fixture
def script(tmp_path, monkeypatch):
    """Writes a benchmark where the package looks for them."""
    root = tmp_path / "checkout"
    (root / "benchmarks").mkdir(parents=True)
    monkeypatch.setattr(benchmarked, "_BENCHMARKS", root / "benchmarks")

    def write(text: str) -> None:
        (root / "benchmarks" / "bench_it.py").write_text(text)

    return write


def test_the_last_line_of_a_benchmark(tmp_path, script):
    script("import json, sys\nprint('a table')\nprint(json.dumps({'results': sys.argv[1:], 'provenance': 1}))\n")
    (tmp_path / "data").mkdir()
    options = {"script": "bench_it", "arguments": ["{model}", "{data}/a/b.txt", "--workdir", "{workdir}"]}
    given = context(tmp_path, data=tmp_path / "data")
    assert KINDS["benchmark"].needs_data(options) == ("a/b.txt",)
    workdir = tmp_path / "work" / f"benchmarks-{packed.packing_code()}"
    expected = ["phi-3-mini", str(tmp_path / "data/a/b.txt"), "--workdir", str(workdir)]
    assert KINDS["benchmark"].measure(options, given) == {"results": expected}


def test_a_benchmark_past_its_limit_keeps_its_result(tmp_path, script):
    script("import sys\nprint('{\"passed\": false}')\nsys.exit(1)\n")
    assert KINDS["benchmark"].measure({"script": "bench_it"}, context(tmp_path)) == {"passed": False}


def test_a_benchmark_that_fails(tmp_path, script):
    script("import sys\nsys.exit(3)\n")
    with pytest.raises(DipperError, match=r"bench_it\.py ended with status 3 and without a result"):
        KINDS["benchmark"].measure({"script": "bench_it"}, context(tmp_path))
    with pytest.raises(ConfigError, match=r"there is no .*bench_none\.py: benchmarks are run from a checkout"):
        KINDS["benchmark"].measure({"script": "bench_none"}, context(tmp_path))


# ------------------------------------------------------------------------------------------------ data


def test_data_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match=re.escape("a.txt is needed: give the folder that has it as --data")):
        context(tmp_path).file("a.txt")
    with pytest.raises(ConfigError, match=r"has no a\.txt"):
        context(tmp_path, data=tmp_path).file("a.txt")


# ------------------------------------------------------------------------------------------------ with PyTorch


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data folder of nonsense words, enough for two windows of calibration text."""
    import numpy as np

    rng = np.random.default_rng(1)

    def words(n: int) -> str:
        return " ".join("".join(rng.choice(list("aeilnorst"), 4)) for _ in range(n))

    folder = tmp_path / "data"
    for part in ("text", "wikitext-2-raw", "eval"):
        (folder / part).mkdir(parents=True)
    for name in ("a", "b"):
        rows = (json.dumps({"text": words(30)}) for _ in range(210))
        (folder / f"text/c4_train_docs_{name}.jsonl").write_text("\n".join(rows))
    (folder / "text/wikipedia_en_sample.txt").write_text(words(400))
    for name in ("wiki.test.raw", "wiki.valid.raw", "wiki.train.first5k.txt"):
        (folder / "wikitext-2-raw" / name).write_text(words(400))
    rows = (json.dumps({"text": f"{words(5)} end{i}"}) for i in range(6))
    (folder / "eval/lambada_openai_test.jsonl").write_text("\n".join(rows))
    return folder


SCORED = {"tokens": 96, "window": 24, "kl": True, "calibration_windows": 2}


@pytest.fixture
def torch_model(tmp_path: Path) -> Path:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    shape = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 320, "num_attention_heads": 4}
    return tiny.write_gguf(
        tmp_path / "m.gguf",
        "llama",
        vocabulary=tiny.bpe_keys(),
        num_hidden_layers=2,
        max_position_embeddings=1100,
        **shape,
    )


@pytest.mark.torch
@pytest.mark.parametrize(
    "options",
    [
        {"method": {"name": "dense"}},
        {"method": {"name": "dip", "densities": [0.6, 0.3]}},
        {"method": {"name": "dip-ca", "capacity": 0.5, "gamma": 0.5}, "density": 0.5},
        {"method": {"name": "planes", "base_bits": [2, 3]}, "density": 0.8},
        {"method": {"name": "teal"}, "density": 0.5},
    ],
    ids=lambda options: options["method"]["name"],
)
def test_perplexity_as_by_the_library(tmp_path, torch_model, data, options):
    from dipper.evaluate_torch import evaluate_torch, open_sparse

    result = KINDS["perplexity"].measure({**options, **SCORED}, context(tmp_path, torch_model, data=data))
    json.dumps(result, allow_nan=False)
    method = {k: tuple(v) if isinstance(v, list) else v for k, v in options["method"].items()}
    if "density" in options:
        method["density"] = options["density"]
    text = data / "wikitext-2-raw/wiki.test.raw"
    calibration = data / "text/c4_train_docs_a.jsonl"
    with open_sparse(torch_model, method, calibration_text=calibration) as opened:
        expected = evaluate_torch(opened, text, window=24, limit=96, kl=True, batch=8).as_dict()
    if options["method"]["name"] != "teal":  # which saw other windows
        for name in ("perplexity", "kl", "touched", "window_nll", "hit_rate", "d_in", "d_glu", "mlp_bytes"):
            assert result[name] == pytest.approx(expected[name]), name
    assert result["text"] == "wikitext-2-raw/wiki.test.raw"
    assert result["provenance"] is None
    assert str(tmp_path) not in json.dumps(result)


@pytest.mark.torch
def test_a_split_of_a_density(tmp_path, torch_model, data):
    at = context(tmp_path, torch_model, data=data)
    split = KINDS["perplexity"].measure({"method": {"name": "dip"}, "density": 0.5, "above": 0.1, **SCORED}, at)
    assert (split["d_in"], split["d_glu"]) == pytest.approx((0.6, 0.3))
    given = KINDS["perplexity"].measure({"method": {"name": "dip", "densities": [0.6, 0.3]}, **SCORED}, at)
    assert split["window_nll"] == given["window_nll"]
    with pytest.raises(ConfigError, match=r"d_in cannot be 0\.4 above density 0\.5: d_glu leaves"):
        KINDS["perplexity"].measure({"method": {"name": "dip"}, "density": 0.5, "above": 0.4, **SCORED}, at)


@pytest.mark.torch
def test_a_fitted_rule_says_what_it_is(tmp_path, torch_model, data):
    at = context(tmp_path, torch_model, data=data)
    result = KINDS["perplexity"].measure({"method": {"name": "dip"}, "fit": 0.6, **SCORED}, at)
    json.dumps(result, allow_nan=False)
    fit = result["fit"]
    assert len(fit["densities"]) == 2
    assert sum((2 * d_in + d_glu) / 3 for d_in, d_glu in fit["densities"]) / 2 == pytest.approx(0.6, abs=0.01)
    assert {"dense", "equal", "split"} <= set(fit["losses"])
    assert result["touched"] == pytest.approx(0.6, abs=0.03)
    assert result["density"] == pytest.approx(0.6)


@pytest.mark.torch
def test_tasks_as_by_the_library(tmp_path, torch_model, data):
    from dipper.evaluate_torch import answer_tasks, open_sparse

    options = {"method": {"name": "dip"}, "density": 0.5, "tasks": ["lambada_openai"], "limit": 4, "seed": 0}
    assert KINDS["tasks"].needs_data(options) == ("eval/lambada_openai_test.jsonl", evaluated.CALIBRATION_TEXT)
    result = KINDS["tasks"].measure(options, context(tmp_path, torch_model, data=data))
    with open_sparse(torch_model, {"name": "dip", "density": 0.5}) as opened:
        expected = answer_tasks(opened, ["lambada_openai"], data / "eval", batch=32, limit=4, seed=0)
    figures = expected["tasks"]["lambada_openai"]
    del figures["seconds"]
    assert result["tasks"]["lambada_openai"] == pytest.approx(figures)
    assert result["density"] == pytest.approx(0.5)


@pytest.mark.torch
def test_planes_have_the_models_own_codes(tmp_path):
    torch = pytest.importorskip("torch")
    types = dict.fromkeys(("ffn_gate", "ffn_up", "ffn_down"), "Q5_0")  # quantised anew they would have 4 bits
    path = tiny.write_gguf(tmp_path / "m.gguf", "llama", types, vocabulary=tiny.bpe_keys(), **SHAPE)
    given = context(tmp_path, path)
    with evaluated._opened({"method": {"name": "planes", "fetch": 0.5}}, given) as (opened, _):
        for rule, layer in zip(opened.sparsity.rules, opened.loaded.model.model.layers, strict=True):
            for matrix, linear in zip(rule.regions[0].matrices, (layer.mlp.gate_proj, layer.mlp.up_proj), strict=True):
                assert matrix.can_split
                torch.testing.assert_close(matrix.whole, linear.weight, rtol=0, atol=0)


@pytest.mark.torch
def test_a_rule_with_an_option_that_does_not_exist():
    pytest.importorskip("torch")
    with pytest.raises(ConfigError, match=r"method \{'name': 'dip', 'nroms': True\}: .*nroms"):
        evaluated.method_of({"method": {"name": "dip", "nroms": True}})


COMPENSATION = {
    "densities": [0.5], "window": 32, "tokens": 2048, "tokens_with_caches": 1024, "held_out_windows": 2,
    "batch_eval": 1,
    "train": {"steps": 4, "batch": 2, "rank": 4, "lr": 1e-3, "eval_every": 2, "dtype": "fp32"},
    "search": {"lr": [5e-4, 1e-3], "steps": 2}, "methods": [{"name": "dip"}],
    "caches": {"options": {"name": "dip-ca", "gamma": 0.5, "capacity": 0.5}, "density": 0.5, "steps": 2, "batch": 2},
    "residents": {"density": 0.5, "calibration_windows": 1, "ranks": [2]},
    "tasks": {"names": ["lambada_openai"], "density": 0.5, "limit": 2},
}  # fmt: skip


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_groups_of_compensation(tmp_path, torch_model, data, monkeypatch):
    pytest.importorskip("peft")
    from dipper import compensation

    at = context(tmp_path, torch_model, data=data, batch=1)
    dip = KINDS["compensation"].measure({**COMPENSATION, "group": "methods:dip"}, at)["cells"]
    assert list(dip) == ["dip@0.5", "learning rate", "train:dip", "dip@0.5 + lora"]
    assert "recovered" in dip["dip@0.5 + lora"]["wikitext"]
    compensated._bench.cache_clear()  # another process: the adapter is there
    monkeypatch.setattr(compensation, "distill", None)
    again = KINDS["compensation"].measure({**COMPENSATION, "group": "methods:dip"}, at)["cells"]
    assert again["dip@0.5 + lora"] == dip["dip@0.5 + lora"]
    assert again["train:dip"] == dip["train:dip"]
    tasks = KINDS["compensation"].measure({**COMPENSATION, "group": "tasks"}, at)["cells"]
    assert list(tasks) == ["tasks: dense", "tasks: dip@0.5", "tasks: dip@0.5 + lora"]
    dense = KINDS["compensation"].measure({**COMPENSATION, "group": "dense"}, at)["cells"]
    assert list(dense) == ["dense"]


def test_compensation_reads_tasks_for_their_group_alone():
    options = {**COMPENSATION, "tasks": {"names": ["piqa"]}}
    assert KINDS["compensation"].needs_data({**options, "group": "dense"}) == compensated.FILES
    files = ("eval/piqa_valid.jsonl", "eval/piqa_valid-labels.lst")
    assert KINDS["compensation"].needs_data({**options, "group": "tasks"}) == (*compensated.FILES, *files)


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_groups_that_are_none(tmp_path, torch_model, data):
    pytest.importorskip("peft")
    at = context(tmp_path, torch_model, data=data)
    with pytest.raises(ConfigError, match="there is no group 'method:dip': choose dense, own_gain"):
        KINDS["compensation"].measure({**COMPENSATION, "group": "method:dip"}, at)
    with pytest.raises(ConfigError, match="'gate' is none of the methods that are trained: dip"):
        KINDS["compensation"].measure({**COMPENSATION, "group": "methods:gate"}, at)
