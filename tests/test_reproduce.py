import json
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

import fake_kinds
from dipper import drawings, executors, kinds
from dipper import reproduce as module
from dipper.checksums import code_sha256, file_sha256
from dipper.cli import main
from dipper.errors import ConfigError
from dipper.experiment import Experiment, Results, sole_writer
from dipper.reproduce import Request, check, disagreements, failures, find_model, reproduce, split_model
from test_lean_import import modules_after

SQUARES = """
title = "Squares"
published = "Table 9"
models = ["phi-3-mini"]
minutes = 2

[[cells]]
kind = "fake"
[cells.each]
x = [1, 2, 3, 4, 5, 6]
"""


@pytest.fixture(autouse=True)
def _fakes(monkeypatch):
    monkeypatch.setattr(kinds, "KINDS", fake_kinds.KINDS)
    monkeypatch.delenv("DIPPER_DATA", raising=False)


class Lab:
    """A folder of experiments, and what is said of them."""

    def __init__(self, path, text=SQUARES, name="squares"):
        self.path, self.said = path, []
        (path / "configs").mkdir(exist_ok=True)
        self.write(text, name)

    def write(self, text, name="squares"):
        path = self.path / "configs" / f"{name}.toml"
        path.write_text(textwrap.dedent(text))
        self.experiment = Experiment.load(path)
        return self

    def request(self, **changes):
        return Request(workdir=self.path / "work", **changes)

    def run(self, **changes):
        self.said.clear()
        return reproduce([self.experiment], self.path, self.request(**changes), say=self.said.append)

    def check(self, **changes):
        return check([self.experiment], self.path, self.request(**changes), say=self.said.append)

    def file(self, model="phi-3-mini"):
        return self.path / "results" / f"{self.experiment.name}-{model}.json"

    def results(self, model="phi-3-mini"):
        return Results.read(self.file(model))

    def values(self):
        return {json.dumps(row["options"]): {k: v for k, v in row["result"].items() if k != "seconds"}
                for row in self.results().rows()}  # fmt: skip

    def log(self, model="phi-3-mini"):
        return [line.split() for line in fake_kinds.read_log(self.path / "work" / model)]


@pytest.fixture
def lab(tmp_path):
    return Lab(tmp_path)


TROUBLE = """
title = "Trouble"
models = ["phi-3-mini"]

[[cells]]
kind = "fake"
[cells.each]
x = [1, 2]

[[cells]]
kind = "fake"
x = 3
times = 1
how = "HOW"

[[cells]]
kind = "fake"
[cells.each]
x = [4, 5]
"""

# ------------------------------------------------------------------------------------------------ a run


def test_only_what_is_missing_is_measured(lab):
    (summary,) = lab.run()
    assert (summary.wanted, summary.measured, summary.kept, summary.failed) == (6, 6, 0, {})
    assert lab.said[0] == "squares phi-3-mini: 6 of 6 cells to measure"
    assert lab.said[1].startswith("[1/6] squares phi-3-mini: fake x 1: 0.0 s")
    before = lab.file().read_bytes()
    (summary,) = lab.run()
    assert (summary.measured, summary.kept) == (0, 6)
    assert lab.file().read_bytes() == before
    lab.write(SQUARES.replace("[1, 2, 3", "[9, 1, 2, 3"))
    (summary,) = lab.run()
    assert (summary.measured, summary.kept) == (1, 6)
    assert [row["options"]["x"] for row in lab.results().rows()] == [9, 1, 2, 3, 4, 5, 6]
    assert [row["result"]["square"] for row in lab.results().rows()] == [81, 1, 4, 9, 16, 25, 36]


def test_a_run_knows_what_it_was_made_with(lab):
    lab.run(threads=3, batch=2)
    held = lab.results().content
    assert held["model"] == {"name": "phi-3-mini", "sha256": None, "title": "Phi-3-mini-4k-instruct"}
    (run,) = held["runs"]
    assert {"dipper", "commit", "dirty", "python", "numpy", "torch", "cpu", "gpu", "system", "time"} <= set(run)
    assert (run["threads"], run["batch"], run["device"], run["gpu"]) == (3, 2, "cpu", None)
    assert "bundle" not in run


def test_what_is_stale_is_said_and_measured_when_asked(lab):
    lab.run()
    held = json.loads(lab.file().read_text())
    for cell in held["cells"][:2]:
        cell["code"], cell["result"]["square"] = "old", -1
    lab.file().write_text(json.dumps(held))
    (summary,) = lab.run()
    assert (summary.measured, summary.stale) == (0, 2)
    assert (
        "0 of 6 cells to measure; 2 of the 6 that are there are stale (--refresh stale measures them again)"
        in lab.said[0]
    )
    (summary,) = lab.run(refresh="stale")
    assert (summary.measured, summary.stale) == (2, 0)
    assert [row["result"]["square"] for row in lab.results().rows()] == [1, 4, 9, 16, 25, 36]
    assert lab.run(refresh="all")[0].measured == 6


def test_orphans_stay_until_a_refresh(lab):
    lab.run()
    lab.write(SQUARES.replace("[1, 2, 3,", "[3,"))
    assert lab.run()[0].orphaned == 2
    assert "2 are no longer in the configuration (--refresh drops them)" in lab.said[0]
    assert len(lab.results().rows()) == 6
    assert lab.run(refresh="stale")[0].orphaned == 0
    assert [row["options"]["x"] for row in lab.results().rows()] == [3, 4, 5, 6]


def test_what_fails_costs_none_of_the_others(lab):
    lab.write(TROUBLE.replace("HOW", "raise").replace("times = 1", "times = 9"))
    (summary,) = lab.run(retries=2)
    cell = "fake x 3 times 9 how raise"
    assert summary.failed == {cell: "RuntimeError: the roof fell in"}
    assert (summary.measured, summary.kept) == (4, 0)
    assert [line[0] for line in lab.log()] == list("1234533")  # tried again after the others
    assert failures([summary]) == (
        "1 of 5 cells failed; the others are kept, and the same command tries again: "
        f"trouble phi-3-mini: {cell}: RuntimeError: the roof fell in".replace("trouble", "squares")
    )
    assert sum("it is tried again after the others" in line for line in lab.said) == 2
    assert failures(lab.run(retries=9)) is None  # the ninth time was the last that went wrong
    assert len(lab.results().rows()) == 5


@pytest.mark.parametrize(
    ("how", "error", "times"),
    [("raise", None, 2), ("exit", None, 2), ("config", "x is wrong: give another", 1)],
)
def test_a_retry_is_for_what_may_pass(lab, how, error, times):
    lab.write(TROUBLE.replace("HOW", how))
    (summary,) = lab.run()
    assert list(summary.failed.values()) == ([] if error is None else [error])
    assert sum(line[0] == "3" for line in lab.log()) == times


def test_what_json_cannot_hold_is_an_error_of_its_cell(lab):
    lab.write('title = "t"\nmodels = ["phi-3-mini"]\n[[cells]]\nkind = "infinite"\n[[cells]]\nkind = "fake"\nx = 2\n')
    (summary,) = lab.run(retries=0)
    assert summary.measured == 1
    assert summary.failed["infinite"].startswith("ValueError: Out of range float values")


def test_an_interrupted_run_keeps_what_was_measured(lab):
    lab.write(TROUBLE.replace("HOW", "interrupt"))
    with pytest.raises(KeyboardInterrupt):
        lab.run()
    assert lab.said[-1] == "interrupted: 2 of 5 cells were measured and are kept; the same command goes on."
    assert [row["options"]["x"] for row in lab.results().rows()] == [1, 2]
    assert lab.run()[0].measured == 3
    assert [line[0] for line in lab.log()] == list("123345")


def test_code_that_changes_meanwhile_is_no_result(lab, monkeypatch):
    states = iter(["a"] * 20)
    monkeypatch.setattr(executors, "code_sha256", lambda sources: next(states))
    (summary,) = lab.run()
    assert "the sources of fake are not those that the run began with" in summary.failed["fake x 1"]
    assert not lab.file().exists()


CLOCKS = """
title = "t"
models = ["phi-3-mini"]
[[cells]]
kind = "clock"
[cells.each]
speed = [1, 2]
[[cells]]
kind = "fake"
[cells.each]
x = [1, 2]
"""


def test_what_is_timed_comes_last_alone_in_a_process_of_its_own(lab):
    lab.write(CLOCKS)
    lab.run()
    names, pids, _ = zip(*lab.log(), strict=True)
    assert names == ("1", "2", "clock", "clock")
    assert pids[0] == pids[1] == str(os.getpid())
    assert pids[2] == pids[3] != pids[0]
    assert lab.results().rows("clock")[0]["result"]["threads"] == len(os.sched_getaffinity(0))


def test_parts_can_be_chosen(lab):
    lab.write(CLOCKS)
    assert lab.run(timed=False)[0].measured == 2
    assert lab.run(kinds=("clock",), quick=True)[0].measured == 1
    assert lab.run(timed=True)[0].measured == 1
    with pytest.raises(ConfigError, match=r"no cell is of this model and of these kinds \(squares phi-3-mini\)"):
        lab.run(kinds=("graphic",))


GRAPHICS = """
title = "Graphics"
models = ["phi-3-mini"]

[[cells]]
kind = "graphic"
[cells.each]
x = [1, 2, 3, 4]
"""


def test_processes_share_the_gpus(lab, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, 5")
    lab.write(GRAPHICS)
    lab.run(device="cuda", jobs=3)
    found = [value["gpus"] for value in lab.values().values()]
    assert set(found) == {"3", "5"}
    lab.run(device="cuda:1", jobs=2, refresh="all")  # one that is named is all processes'
    assert {tuple(value.values()) for value in lab.values().values()} == {("3, 5", "cuda:1")}
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "3, 5"


def test_the_least_used_gpu_is_next():
    workers = [SimpleNamespace(gpu=gpu) for gpu in ("0", "1", "0")]
    assert executors._least_used(["0", "1"], workers) == "1"
    assert executors._least_used(["0", "1", "2"], workers) == "2"
    assert executors._least_used([], workers) is None


def test_figures_are_drawn_at_the_end(lab, monkeypatch):
    drawn = []
    monkeypatch.setattr(drawings, "draw_all", lambda folder: drawn.append((folder, lab.file().exists())))
    lab.run()
    assert drawn == [(lab.path, True)]

    def fails(folder):
        raise ConfigError("matplotlib is missing")

    monkeypatch.setattr(drawings, "draw_all", fails)
    lab.run()
    assert lab.said[-1] == "the figures were not drawn anew: matplotlib is missing"


# ------------------------------------------------------------------------------------------------ what a run takes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kinds": ("fke",)}, r"there is no kind 'fke'; did you mean fake\?"),
        ({"refresh": "stael"}, r"--refresh stael is unknown; did you mean stale\?"),
        ({"device": "gpu"}, "--device gpu is unknown: choose cpu or cuda"),
        ({"jobs": 0}, "--jobs is 0: give at least 1"),
        ({"retries": -1}, "--retries is -1: give at least 0"),
        ({"batch": 0}, "--batch is 0"),
        ({"jobs": 2, "ray": "auto"}, "--jobs is of processes on this machine"),
        ({"ray": "auto", "device": "cuda:1"}, "Ray gives each cell a GPU of its own, say --device cuda"),
        ({"data": Path("nowhere")}, "--data nowhere is no folder"),
        ({"models": ("smollm",)}, r"there is no model 'smollm'; did you mean smollm2\?"),
        ({"models": ("phi-3-midium",)}, r"did you mean phi-3-medium\?"),
        ({"models": ("=x",)}, "--model =x: write NAME=PATH"),
        ({"models": ("phi-3-mini", "phi-3-mini")}, "an experiment or model is named twice"),
    ],
)
def test_a_request_that_cannot_be(lab, changes, message):
    with pytest.raises(ConfigError, match=message):
        lab.run(**changes)
    assert not lab.file().exists()


def test_models_by_path(lab, tmp_path):
    gguf = tmp_path / "own.gguf"
    gguf.write_bytes(b"weights")
    assert split_model(str(gguf)) == ("own", str(gguf))
    assert split_model(f"mine={gguf}") == ("mine", str(gguf))
    assert split_model("org/name") == ("org/name", "org/name")
    assert split_model("SmolLM2") == ("smollm2", "smollm2")
    found = find_model("mine", str(gguf))
    assert (found.name, found.path, found.sha256) == ("mine", str(gguf), file_sha256(gguf))
    lab.run(models=(f"mine={gguf}",))
    assert lab.results("mine").content["model"] == {"name": "mine", "sha256": file_sha256(gguf), "title": "mine"}
    gguf.write_bytes(b"other weights")
    before = lab.file("mine").read_bytes()
    assert lab.run(models=(f"mine={gguf}",))[0].measured == 0  # nothing is missing: it is not looked at
    with pytest.raises(ConfigError, match="is of a mine with sha256"):
        lab.run(models=(f"mine={gguf}",), refresh="all")
    assert lab.file("mine").read_bytes() == before


def test_data(lab, tmp_path):
    lab.write(SQUARES.replace('kind = "fake"', 'kind = "fake"\nreads = true'))
    with pytest.raises(
        ConfigError, match=r"words\.txt is needed: give the folder that has it as --data or in DIPPER_DATA"
    ):
        lab.run()
    data = tmp_path / "data"
    data.mkdir()
    with pytest.raises(ConfigError, match=r"data has no words\.txt"):
        lab.run(data=data)
    (data / "words.txt").write_text("a b")
    lab.run(data=data, quick=True)
    assert lab.results().content["data"] == {"words.txt": file_sha256(data / "words.txt")}
    assert lab.results().rows()[0]["result"]["words"] == ["a", "b"]


def test_data_that_has_changed_is_refused(lab, tmp_path, monkeypatch):
    executors.input_sha256.cache_clear()
    lab.write(SQUARES.replace('kind = "fake"', 'kind = "fake"\nreads = true'))
    (tmp_path / "words.txt").write_text("a b")
    lab.run(data=tmp_path, quick=True)
    (tmp_path / "words.txt").write_text("c")
    executors.input_sha256.cache_clear()  # another process's
    with pytest.raises(ConfigError, match=r"was measured with a words\.txt of sha256"):
        lab.run(data=tmp_path)


def test_an_extra_that_is_missing(lab):
    lab.write('needs = ["nonesuch"]\n' + SQUARES)
    with pytest.raises(
        ConfigError, match=r"squares needs nonesuch, which is not installed: pip install 'dipper\[nonesuch\]'"
    ):
        lab.run()
    assert lab.run(kinds=("fake",))[0].measured == 6


def test_a_file_of_another_experiment_is_left_alone(lab):
    lab.run()
    text = lab.file().read_text().replace('"experiment": "squares"', '"experiment": "cubes"')
    lab.file().write_text(text)
    with pytest.raises(ConfigError, match="is of cubes of phi-3-mini, not of squares"):
        lab.run()
    assert lab.file().read_text() == text


def test_two_runs_do_not_write_the_same_file(lab):
    with sole_writer(lab.file()), pytest.raises(ConfigError, match="is being written by another `dipper reproduce`"):
        lab.run()


# ------------------------------------------------------------------------------------------------ processes


def test_processes_find_what_one_finds(lab, tmp_path):
    lab.run()
    expected = lab.values()
    (tmp_path / "b").mkdir()
    other = Lab(tmp_path / "b")
    assert other.run(jobs=2)[0].measured == 6
    assert other.values() == expected
    assert len({line[1] for line in other.log()} - {str(os.getpid())}) == 2
    assert [row["options"]["x"] for row in other.results().rows()] == [1, 2, 3, 4, 5, 6]


def test_a_process_that_dies_costs_only_its_cell(lab):
    lab.write(TROUBLE.replace("HOW", "die"))
    (summary,) = lab.run(jobs=2, retries=0)
    assert (summary.measured, list(summary.failed.values())) == (
        4, ["its process died (killed by SIGKILL; is there enough memory?)"],
    )  # fmt: skip
    assert lab.run(jobs=2)[0].measured == 1
    assert [row["result"]["square"] for row in lab.results().rows()] == [1, 4, 9, 16, 25]


def test_a_process_that_died_is_replaced(lab):
    lab.write(TROUBLE.replace("HOW", "die"))
    (summary,) = lab.run(jobs=2)
    assert (summary.measured, summary.failed) == (5, {})


def test_no_process_outlives_a_run(lab):
    lab.run(jobs=2)
    assert multiprocessing.active_children() == []
    lab.write(TROUBLE.replace("HOW", "raise"))

    def stop(line):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reproduce(
            [lab.experiment], lab.path, lab.request(jobs=2), say=lambda line: stop(line) if "[1/" in line else None
        )
    assert multiprocessing.active_children() == []


# ------------------------------------------------------------------------------------------------ Ray


@pytest.fixture
def cluster(monkeypatch):
    """Two machines of one CPU each, as processes of this one."""
    pytest.importorskip("ray")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))  # where their workers find fake_kinds
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    made.second = made.add_node(num_cpus=1)
    try:
        yield made
    finally:
        made.shutdown()


rays_own = pytest.mark.filterwarnings("ignore")  # warnings of what Ray will change


@pytest.mark.slow  # starts a cluster
@rays_own
def test_ray_finds_what_one_process_finds_though_a_worker_is_killed(lab, tmp_path, cluster):
    lab.write(TROUBLE.replace("HOW", "die"))
    (tmp_path / "b").mkdir()
    serial = Lab(tmp_path / "b", TROUBLE.replace('"HOW"', '"raise"'))
    serial.run()
    (summary,) = lab.run(ray=cluster.address, threads=1)
    assert (summary.measured, summary.failed) == (5, {})
    assert [list(v.items()) for v in lab.values().values()] == [list(v.items()) for v in serial.values().values()]
    assert [line[0] for line in lab.log()].count("3") == 2  # killed once, and measured after that
    assert any("its process or machine died" in line and "tried again" in line for line in lab.said)
    assert len({line[2] for line in lab.log()}) == 2
    assert "here" not in {line[2] for line in lab.log()}


@pytest.mark.slow  # starts a cluster
@rays_own
def test_ray_loses_a_machine(lab, cluster):
    lab.write(SQUARES.replace('kind = "fake"', 'kind = "fake"\nsleep = 0.5'))
    removed = []

    def say(line):
        if "[1/6]" in line and not removed:
            removed.append(cluster.remove_node(cluster.second, allow_graceful=False))

    (summary,) = reproduce([lab.experiment], lab.path, lab.request(ray=cluster.address, threads=1, retries=3), say=say)
    assert len(removed) == 1
    assert (summary.measured, summary.failed) == (6, {})
    assert [row["result"]["square"] for row in lab.results().rows()] == [1, 4, 9, 16, 25, 36]


def test_ray_refuses_what_no_machine_can_take(tmp_path):
    nodes = [
        {"Alive": True, "Resources": {"CPU": 2.0}},
        {"Alive": True, "Resources": {"CPU": 1.0, "GPU": 1.0}},
        {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}},
    ]

    def sized(threads, wants_gpu):
        one = task(tmp_path)
        return replace(one, wants_gpu=wants_gpu, context=replace(one.context, threads=threads))

    executors._check_cluster(nodes, [sized(2, False), sized(1, True)])
    has = "the machines of the Ray cluster have 2 CPUs and 0 GPUs, 1 CPUs and 1 GPUs: give fewer --threads"
    with pytest.raises(ConfigError, match=f"a cell takes 3 CPUs, and {has}"):
        executors._check_cluster(nodes, [sized(1, False), sized(3, False)])
    with pytest.raises(ConfigError, match=f"a cell takes 2 CPUs and a GPU, and {has}"):
        executors._check_cluster(nodes, [sized(2, True)])


@rays_own
def test_there_is_no_cluster(lab, monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ConfigError, match=r"there is no Ray cluster at auto .*: start one with `ray start --head`"):
        lab.run(ray="auto")


def test_ray_is_not_installed(lab, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"--ray needs Ray, which is not installed: pip install 'dipper\[ray\]'"):
        lab.run(ray="auto")


def task(tmp_path, **inputs):
    kind = fake_kinds.KINDS["fake"]
    return executors.Task(
        cell=module.Cell("fake", {"x": 1}), measure=kind.measure, sources=kind.sources,
        code=code_sha256(kind.sources), inputs=inputs, wants_gpu=False, started="now",
        context=kinds.Context(model="m", name="m", workdir=tmp_path / "w"),
    )  # fmt: skip


def test_another_machine_must_have_the_same_files(tmp_path):
    (tmp_path / "m").write_text("a")
    path, sha256 = str(tmp_path / "m"), file_sha256(tmp_path / "m")
    assert executors.measure_cell(task(tmp_path, **{path: sha256})).result is not None
    other = executors.measure_cell(task(tmp_path, **{path: "0" * 64}))
    assert other.error == f"{path} has sha256 {sha256[:12]}... here, 000000000000... where the run began: copy it again"
    assert other.final
    absent = executors.measure_cell(task(tmp_path, **{f"{path}x": "0" * 64}))
    assert absent.error is not None
    assert "mx cannot be read here (No such file or directory): put it at this path on every machine" in absent.error


# ------------------------------------------------------------------------------------------------ checking


def test_a_check_measures_again_and_writes_nothing(lab):
    lab.write(CLOCKS)
    with pytest.raises(ConfigError, match="nothing of this has a result to check"):
        lab.check()
    lab.run(timed=False)
    lab.run(timed=True, quick=True)
    before = lab.file().read_bytes()
    (found,) = lab.check()
    assert (found.checked, found.missing, found.differences) == (3, 1, {})
    held = json.loads(before)
    held["cells"][0]["result"]["speed"] = 1.3
    held["cells"][1]["result"]["square"] = 2
    held["runs"][held["cells"][1]["run"]]["cpu"] = "another"
    lab.file().write_text(json.dumps(held))
    (found,) = lab.check()
    assert found.differences.pop("clock speed 1")[0] == "speed is 1.3, now 1"
    (difference, where) = found.differences.pop("fake x 1")
    assert difference == "square is 2, now 1"
    assert where.startswith("measured on another, checked on ")
    assert found.differences == {}
    assert json.loads(lab.file().read_text()) == held


def test_a_check_uses_nothing_that_was_kept_and_tells_failures_apart(lab):
    lab.write(TROUBLE.replace("HOW", "raise"))  # x = 3 fails where its log is empty, once
    lab.run()
    (found,) = lab.check()
    assert (found.checked, found.differences) == (5, {})
    assert found.failed == {"fake x 3 times 1 how raise": "RuntimeError: the roof fell in"}
    assert disagreements([found]) == (
        "1 of 5 cells could not be measured: squares phi-3-mini: fake x 3 times 1 how raise: RuntimeError: the roof "
        "fell in"
    )
    assert [path.name for path in (lab.path / "work").iterdir()] == ["phi-3-mini"]


# ------------------------------------------------------------------------------------------------ the command


def cli(lab, *args):
    return main(["reproduce", *args, "--experiments", str(lab.path)])


def test_the_command(lab, capsys):
    more = ("--workdir", str(lab.path / "work"))
    assert cli(lab, "squares", "--json", *more) == 0
    out, err = capsys.readouterr()
    (result,) = json.loads(out)["results"]
    assert (result["measured"], result["kept"], result["path"]) == (6, 0, str(lab.file()))
    assert "[6/6] squares phi-3-mini: fake x 6" in err
    assert cli(lab, "--all", *more) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].split() == [
        "experiment",
        "model",
        "results",
        "cells",
        "measured",
        "kept",
        "stale",
        "failed",
        "seconds",
    ]
    assert shown[1].split() == ["squares", "phi-3-mini", str(lab.file()), "6", "0", "6", "0", "0", "0.0"]
    assert cli(lab, "squares", "--check", *more) == 0
    assert capsys.readouterr().out.splitlines()[1].split() == ["squares", "phi-3-mini", "6", "6", "0", "0", "0"]
    lab.file().write_text(lab.file().read_text().replace('"square": 36', '"square": 37'))
    assert cli(lab, "squares", "--check", *more) == 1
    assert capsys.readouterr().err.splitlines()[-1] == (
        "dipper: 1 of 6 cells came out otherwise: squares phi-3-mini: fake x 6: square is 37, now 36"
    )


def test_a_failure_ends_with_1_and_one_line(lab, capsys):
    lab.write(TROUBLE.replace("HOW", "config"))
    assert cli(lab, "squares", "--workdir", str(lab.path / "work")) == 1
    out, err = capsys.readouterr()
    assert out.splitlines()[1].split()[-6:-1] == ["5", "4", "0", "0", "1"]
    assert err.splitlines()[-1] == (
        "dipper: 1 of 5 cells failed; the others are kept, and the same command tries again: squares phi-3-mini: fake "
        "x 3 times 1 how config: x is wrong: give another"
    )


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "name experiments, or give --all: `dipper reproduce --list` shows what there is."),
        (["squares", "--all"], "name experiments, or give --all: `dipper reproduce --list` shows what there is."),
        (["sqares"], "there is no experiment 'sqares'; did you mean squares?"),
        (["squares", "--kind", "fakes"], "there is no kind 'fakes'; did you mean fake?"),
        (["squares", "--model", "phi-3-mni"],
         "there is no model 'phi-3-mni'; did you mean phi-3-mini?; or give org/name, or NAME=PATH"),
        (["squares", "--check", "--refresh", "all"],
         "--refresh has no effect with --check: drop it, or leave --check out."),
        (["squares", "--check", "--retries", "2"],
         "--retries has no effect with --check: drop it, or leave --check out."),
        (["--list", "--model", "phi-3-mini"],
         "--model has no effect with --list, which measures nothing: drop it, or leave --list out."),
        (["--list", "--all"], "--all has no effect with --list, which measures nothing: drop it, or leave --list out."),
        (["--list", "--no-timed"],
         "--timed has no effect with --list, which measures nothing: drop it, or leave --list out."),
        (["--list", "sqares"], "there is no experiment 'sqares'; did you mean squares?"),
        (["squares", "--check"], "nothing of this has a result to check: measure it first, without --check"),
    ],
)  # fmt: skip
def test_errors_of_the_command(lab, capsys, args, message):
    assert cli(lab, *args) == 1
    assert capsys.readouterr().err.splitlines()[-1] == f"dipper: {message}"


def test_the_list(lab, capsys):
    lab.run()
    lab.run(models=("own=phi-3-mini",), quick=True)
    held = json.loads(lab.file().read_text())
    held["cells"][0]["code"] = "old"
    lab.file().write_text(json.dumps(held))
    (lab.path / "results" / "squares-of-a-script.json").write_text('{"schema": "dipper-grid/1"}')
    lab.write('needs = ["nonesuch"]\n' + SQUARES.replace("6]", "7]"))
    assert cli(lab, "--list", "--json") == 0
    (one,) = json.loads(capsys.readouterr().out)["experiments"]
    assert one["models"] == {
        "phi-3-mini": {"n": 6, "done": 4, "stale": 1, "missing": 1, "orphaned": 1},
        "own": {"n": 6, "done": 1, "stale": 0, "missing": 5, "orphaned": 0},
    }
    assert (one["needs"], one["lacking"], one["minutes"], one["published"]) == (
        ["nonesuch"],
        ["nonesuch"],
        2.0,
        "Table 9",
    )
    lab.write(SQUARES, "cubes")
    assert cli(lab, "squares", "--list") == 0
    assert capsys.readouterr().out.splitlines() == [
        "squares: Squares",
        "  answers to: Table 9",
        "  about 2 minutes a model",
        "  needs nonesuch (not installed)",
        "  phi-3-mini  4 of 6 done, 1 stale, 1 missing, 1 orphaned",
        "  own         1 of 6 done, 5 missing",
    ]


def test_the_list_needs_neither_torch_nor_ray(lab):
    lab.write('title = "t"\nmodels = ["phi-3-mini"]\ncells = []\n')
    code = f"from dipper.cli import main; assert main(['reproduce', '--list', '--experiments', {str(lab.path)!r}]) == 0"
    assert not modules_after(code) & {"torch", "transformers", "ray", "matplotlib"}


def test_ctrl_c_in_processes(lab):
    """The whole group is told, as a terminal does it."""
    lab.write(SQUARES.replace('kind = "fake"', 'kind = "fake"\nsleep = 0.5'))
    code = (
        # In a job that a shell put into the background it would be ignored from the start.
        "import signal, sys, fake_kinds; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "from dipper import kinds; from dipper.cli import main; kinds.KINDS = fake_kinds.KINDS;"
        f"sys.exit(main(['reproduce', 'squares', '--jobs', '2', '--experiments', {str(lab.path)!r},"
        f"'--workdir', {str(lab.path / 'work')!r}]))"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    running = subprocess.Popen(
        [sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, start_new_session=True, env=environment
    )
    assert running.stderr is not None
    for line in running.stderr:
        if line.startswith("[1/6]"):
            break
    time.sleep(0.1)
    os.killpg(running.pid, signal.SIGINT)
    rest = running.stderr.read()
    running.stderr.close()
    assert running.wait(20) == 130
    assert "cells were measured and are kept; the same command goes on." in rest.splitlines()[-1]
    assert "Traceback" not in rest
    n_kept = len(lab.results().rows())
    assert 1 <= n_kept < 6
    assert lab.run()[0].measured == 6 - n_kept
