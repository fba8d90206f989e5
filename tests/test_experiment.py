import json
import multiprocessing
import textwrap

import pytest
from hypothesis import given
from hypothesis import strategies as st

import fake_kinds
from dipper import experiment as module
from dipper import kinds
from dipper.checksums import code_sha256
from dipper.errors import ConfigError
from dipper.experiment import (
    Cell,
    Experiment,
    Model,
    Results,
    find,
    load_all,
    results_path,
    sole_writer,
)
from dipper.files import safe_name

MODEL = Model(name="m", path="/m.gguf", sha256="ab" * 32, title="M")
RUN = {"dipper": "0", "commit": None, "cpu": "a", "time": "t"}
CONFIG = """
title = "Squares"
models = ["m", "n"]

[[cells]]
kind = "fake"
how = "raise"
[cells.each]
x = [1, 2]
times = [0, 1]

[[cells]]
kind = "clock"
models = ["m"]
speed = 3
"""


@pytest.fixture(autouse=True)
def _fakes(monkeypatch):
    monkeypatch.setattr(kinds, "KINDS", fake_kinds.KINDS)


def write(folder, name="squares", text=CONFIG):
    path = folder / "configs" / f"{name}.toml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(textwrap.dedent(text))
    return path


# ------------------------------------------------------------------------------------------------ configurations


def test_a_block_is_every_combination_in_the_order_written(tmp_path):
    experiment = Experiment.load(write(tmp_path))
    assert [(cell.kind, cell.options) for cell in experiment.cells("m")] == [
        ("fake", {"how": "raise", "x": 1, "times": 0}),
        ("fake", {"how": "raise", "x": 1, "times": 1}),
        ("fake", {"how": "raise", "x": 2, "times": 0}),
        ("fake", {"how": "raise", "x": 2, "times": 1}),
        ("clock", {"speed": 3}),
    ]
    assert [cell.kind for cell in experiment.cells("n")] == ["fake"] * 4  # the second block is not for it
    assert [cell.key for cell in experiment.cells("m", quick=True)] == [
        '{"how": "raise", "kind": "fake", "times": 0, "x": 1}', '{"kind": "clock", "speed": 3}',
    ]  # fmt: skip
    assert (experiment.name, experiment.view, experiment.minutes) == ("squares", "squares", 0.0)


def test_the_same_options_are_the_same_cell_in_any_order():
    assert Cell("k", {"a": 1, "b": {"c": 2, "d": [3]}}).key == Cell("k", {"b": {"d": [3], "c": 2}, "a": 1}).key
    assert Cell("k", {"a": 1}).key != Cell("k", {"a": 2}).key
    assert (
        str(Cell("k", {"method": {"name": "dip", "norms": True}, "d": [0.5, 0.7]}))
        == "k method dip norms True d 0.5,0.7"
    )


@given(
    st.dictionaries(
        st.text("ab", min_size=1),
        st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
        max_size=4,
    )
)
def test_a_key_survives_json(options):
    cell = Cell("k", options)
    assert Cell("k", json.loads(json.dumps(options))).key == cell.key


HEAD = 'title = "t"\nmodels = ["m"]\n'
BLOCK = '[[cells]]\nkind = "fake"\nx = 1\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("title = ", r"squares\.toml: it is no TOML"),
        ('titel = "t"\n', r"an experiment has no 'titel'; did you mean title\?"),
        ('title = "t"\n' + BLOCK, "an experiment needs 'models', which is not there"),
        ("title = 3\n" + 'models = ["m"]\n' + BLOCK, "'title' is 3: see the other configurations"),
        ('title = "t"\nmodels = [1]\n' + BLOCK, r"'models' is \[1\]: give a list of names"),
        (HEAD + "cells = [1]", "'cells' holds 1: write blocks"),
        (HEAD + "[[cells]]\nx = 1", "a block of cells needs a kind; known are clock, fake, graphic, infinite"),
        (HEAD + '[[cells]]\nkind = "fike"', r"there is no kind 'fike'; did you mean fake\?"),
        (HEAD + BLOCK + "slep = 1", r"a cell of kind fake has no option 'slep'; did you mean sleep\?"),
        (HEAD + BLOCK + "[cells.each]\ntime = [1]", r"no option 'time'; did you mean times\?"),
        (HEAD + BLOCK + "[cells.each]\ntimes = 1", r"each\.times is 1: give a list"),
        (HEAD + BLOCK + "[cells.each]\ntimes = []", r"each\.times is \[\]: give a list"),
        (HEAD + BLOCK + "[cells.each]\nx = [2]", "a block of fake has 'x' once for all cells and once in each"),
        (HEAD + BLOCK + "each = 1", "'each' is 1: write a table of lists"),
        (HEAD + BLOCK + "times = nan", "a block of fake holds what JSON cannot"),
        (HEAD + BLOCK + "times = 2024-01-01", "a block of fake holds what JSON cannot"),
        (HEAD + BLOCK + BLOCK, r'the cell \{"kind": "fake", "x": 1\} is there twice'),
        (HEAD + BLOCK + 'models = ["other"]\n' + BLOCK, "is there twice"),
    ],
)
def test_what_is_wrong_with_a_configuration(tmp_path, text, message):
    path = write(tmp_path, text=text)
    with pytest.raises(ConfigError, match=message) as error:
        Experiment.load(path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


def test_equal_cells_of_different_models_are_no_error(tmp_path):
    text = HEAD + BLOCK + 'models = ["m"]\n' + BLOCK + 'models = ["n"]\n'
    assert len(Experiment.load(write(tmp_path, text=text)).cells("m")) == 1


def test_experiments_are_found_by_name(tmp_path):
    write(tmp_path)
    write(tmp_path, "cubes", HEAD + BLOCK)
    write(tmp_path, "script", "tokens = 3")  # of a script
    assert [experiment.name for experiment in load_all(tmp_path)] == ["cubes", "squares"]
    assert find(tmp_path, "cubes").title == "t"
    with pytest.raises(ConfigError, match=r"there is no experiment 'square'; did you mean squares\?"):
        find(tmp_path, "square")
    with pytest.raises(ConfigError, match=r"script\.toml: an experiment has no 'tokens'"):
        find(tmp_path, "script")
    with pytest.raises(ConfigError, match="holds no experiment: give the folder as --experiments DIR"):
        load_all(tmp_path / "nowhere")
    write(tmp_path, "broken", "cells = [")
    with pytest.raises(ConfigError, match=r"broken\.toml: it is no TOML"):
        load_all(tmp_path)


# ------------------------------------------------------------------------------------------------ names


def test_names_of_files():
    assert safe_name("org/Some model@main") == "org-Some-model-main"
    assert safe_name("../../etc") == "etc"
    assert results_path("e", "density", "a/b").as_posix() == "e/results/density-a-b.json"


# ------------------------------------------------------------------------------------------------ results


@pytest.fixture
def experiment(tmp_path):
    return Experiment.load(write(tmp_path))


def opened(tmp_path, experiment, model=MODEL):
    return Results.open(results_path(tmp_path, experiment.name, model.name), experiment, model)


def test_a_file_is_whole_after_every_cell_and_in_the_configurations_order(tmp_path, experiment):
    results, cells = opened(tmp_path, experiment), experiment.cells("m")
    assert not results.path.exists()
    for i in (3, 0, 2):
        results.add(cells[i], {"square": i}, 1.23456, {**RUN, "cpu": "b" if i == 3 else "a"})
        assert Results.read(results.path).content == results.content
    held = json.loads(results.path.read_text())
    assert held["schema"] == "dipper-experiment/1"
    assert (held["experiment"], held["model"]) == ("squares", {"name": "m", "sha256": "ab" * 32, "title": "M"})
    assert [cell["options"] for cell in held["cells"]] == [cells[i].options for i in (0, 2, 3)]
    assert [held["runs"][cell["run"]]["cpu"] for cell in held["cells"]] == ["a", "a", "b"]
    assert len(held["runs"]) == 2
    assert held["cells"][0]["seconds"] == 1.235
    assert held["cells"][0]["code"] == code_sha256(("errors",))
    assert [results.state(cell) for cell in cells] == ["done", "missing", "done", "done", "missing"]


def test_a_run_that_nothing_is_of_any_more_goes(tmp_path, experiment):
    results, cell = opened(tmp_path, experiment), experiment.cells("m")[0]
    results.add(cell, {"square": 1}, 1, {**RUN, "cpu": "old"})
    results.add(cell, {"square": 2}, 1, RUN)
    assert results.content["runs"] == [RUN]
    assert results.cell(cell)["result"] == {"square": 2}
    assert results.cell(cell.key) is results.cell(cell)


def test_a_cell_is_stale_when_its_code_has_changed(tmp_path, experiment, monkeypatch):
    results, cells = opened(tmp_path, experiment), experiment.cells("m")
    results.add(cells[0], {}, 1, RUN)
    results.add(cells[4], {}, 1, RUN)
    monkeypatch.setattr(module, "code_sha256", lambda sources: "new" if "files" in sources else code_sha256(sources))
    assert [results.state(cell) for cell in (cells[0], cells[1], cells[4])] == ["done", "missing", "stale"]


def test_rows_by_kind_and_options(tmp_path, experiment):
    results, cells = opened(tmp_path, experiment), experiment.cells("m")
    for cell in cells:
        results.add(cell, {"of": cell.key}, 1, RUN)
    assert [row["options"]["times"] for row in results.rows("fake", x=2)] == [0, 1]
    assert results.rows("clock") == [{"options": {"speed": 3}, "result": {"of": cells[4].key}}]
    assert len(results.rows()) == 5
    assert results.rows("fake", speed=3) == []


def test_what_the_configuration_no_longer_has_is_an_orphan(tmp_path, experiment):
    results, gone = opened(tmp_path, experiment), Cell("fake", {"x": 9})
    results.add(gone, {}, 1, RUN)
    results.add(experiment.cells("m")[1], {}, 1, RUN)
    assert [cell["options"] for cell in results.content["cells"]][-1] == {"x": 9}
    assert results.orphans(experiment.cells("m")) == [gone]
    assert len(results.rows()) == 1  # nothing is drawn of it
    assert len(Results.of(results.path, experiment, "m").rows()) == 1
    assert len(Results.read(results.path).rows()) == 2
    results.drop([gone])
    assert Results.read(results.path).orphans(experiment.cells("m")) == []


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:-20],
        lambda text: "[]",
        lambda text: "{}",
        lambda text: text.replace("experiment/1", "experiment/2"),
        lambda text: text.replace('"run": 0', '"run": 7'),
        lambda text: text.replace('"code"', '"cod"'),
        lambda text: text.replace('"result": {}', '"result": 1'),
    ],
)
def test_a_damaged_file_is_refused_and_left_alone(tmp_path, experiment, damage):
    results = opened(tmp_path, experiment)
    results.add(experiment.cells("m")[0], {}, 1, RUN)
    damaged = damage(results.path.read_text())
    assert damaged != results.path.read_text()
    results.path.write_text(damaged)
    with pytest.raises(
        ConfigError, match=r"squares-m\.json is damaged or no result of `dipper reproduce` .*: move it away"
    ):
        opened(tmp_path, experiment)
    assert results.path.read_text() == damaged


def test_a_file_of_something_else_is_refused(tmp_path, experiment):
    results = opened(tmp_path, experiment)
    results.add(experiment.cells("m")[0], {}, 1, RUN)
    before = results.path.read_bytes()
    other = Experiment.load(write(tmp_path, "cubes", HEAD + BLOCK))
    with pytest.raises(ConfigError, match="is of squares of m, not of cubes of m: move it away"):
        Results.open(results.path, other, MODEL)
    with pytest.raises(ConfigError, match="is of squares of m, not of squares of n"):
        Results.of(results.path, experiment, "n")
    changed = Model(name="m", path="/other.gguf", sha256="cd" * 32, title="M")
    with pytest.raises(
        ConfigError, match=r"sha256 abababababab\.\.\., /other\.gguf has cdcdcdcdcdcd\.\.\.: give it another"
    ):
        opened(tmp_path, experiment, changed)
    with pytest.raises(ConfigError, match=r"has none \(a shape without weights\)"):
        opened(tmp_path, experiment, Model(name="m", path="m", sha256=None, title="M"))
    with pytest.raises(ConfigError, match="cannot be read"):
        Results.read(tmp_path / "nothing.json")
    assert results.path.read_bytes() == before


def test_other_data_is_refused(tmp_path, experiment):
    results = opened(tmp_path, experiment)
    results.note_data({"a.txt": "1" * 64})
    results.add(experiment.cells("m")[0], {}, 1, RUN)
    again = opened(tmp_path, experiment)
    again.note_data({"a.txt": "1" * 64, "b.txt": "2" * 64})
    with pytest.raises(ConfigError, match=r"with a a\.txt of sha256 111111111111\.\.\., --data has 333333333333"):
        again.note_data({"a.txt": "3" * 64})


def _hold(path, held, release):
    with sole_writer(path):
        held.set()
        release.wait(20)


def test_one_process_writes_a_file(tmp_path):
    path = tmp_path / "results" / "r.json"
    spawned = multiprocessing.get_context("spawn")
    held, release = spawned.Event(), spawned.Event()
    other = spawned.Process(target=_hold, args=(path, held, release))
    other.start()
    try:
        assert held.wait(20)
        message = rf"r\.json is being written by another `dipper reproduce` \(process {other.pid}\): wait until"
        with pytest.raises(ConfigError, match=message), sole_writer(path):
            pass
    finally:
        release.set()
        other.join()
    with sole_writer(path):
        pass
