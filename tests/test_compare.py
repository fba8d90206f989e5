import dataclasses
import json
import math

import pytest

from dipper.compare import compare_evals, draw, read_results
from dipper.errors import ConfigError
from dipper.evaluate import TextSource, eval_record, score_text
from dipper.evaluate_engine import EngineScorer
from dipper.files import write_json
from dipper.tables import evals_table, tasks_table
from fakes import FakeEngine

SOURCE = TextSource(path="t.txt", text="abc", rows_joined=False)


def record(method="dip", density=0.5, shift=0.0, tokens=tuple(range(40)), **changes):
    engine = FakeEngine(losses=lambda ids: [t / 50 + shift for t in ids[1:]])
    scorer = EngineScorer(engine)
    made = eval_record(scorer, SOURCE, score_text(scorer, tokens, window=8))
    touched = 1.0 if density is None else density
    return dataclasses.replace(
        made, method=method, density=density, touched=touched, mlp_bytes_per_token=1e6 * touched, gamma=None, **changes
    )


RECORDS = [
    record("up", 0.7, 0.3),
    record("dip", 0.5, 0.2),
    record("dense", None),
    record("dip", 0.7, 0.1, options={"norms": True}),
    record("dip", 0.7, 0.1),
]


def test_changes_to_dense_are_paired():
    rows = compare_evals(RECORDS)
    assert [(row.method, row.density) for row in rows] == [
        ("dense", None), ("dip", 0.7), ("dip", 0.5), ("dip, norms", 0.7), ("up", 0.7),
    ]  # fmt: skip
    assert rows[0].relative is None
    assert [row.relative for row in rows[1:]] == pytest.approx([math.expm1(x) for x in (0.1, 0.2, 0.1, 0.3)])
    assert [row.relative_stderr for row in rows[1:]] == pytest.approx([0.0] * 4, abs=1e-12)  # the same everywhere


def test_without_dense_there_is_no_change():
    assert [row.relative for row in compare_evals(RECORDS[:2])] == [None, None]


def test_a_change_taken_side_by_side_is_kept():
    against = {"record": {"method": "dense", "perplexity": 3.0}, "relative": 0.25, "relative_stderr": 0.01}
    (row,) = compare_evals([record(against=against)])
    assert (row.relative, row.relative_stderr) == (0.25, 0.01)


def test_different_tokens_are_not_compared():
    other = record("dense", None, tokens=range(1, 41))
    with pytest.raises(ConfigError, match=r"fake was scored on different tokens: up on 35 of t\.txt in windows of 8"):
        compare_evals([*RECORDS, other])
    assert len(compare_evals([*RECORDS, dataclasses.replace(other, model="another")])) == 6


def test_results_come_back_from_files(tmp_path):
    write_json(tmp_path / "a.json", RECORDS[3].as_dict())
    write_json(tmp_path / "b.json", {"schema": "dipper-tasks/1", "tasks": {}})
    assert read_results([tmp_path / "a.json", tmp_path / "b.json"]) == (
        [RECORDS[3]],
        [{"schema": "dipper-tasks/1", "tasks": {}}],
    )


def test_cells_of_an_experiment(tmp_path):
    def cell(kind, result):
        return {"kind": kind, "options": {}, "result": result, "seconds": 1.0, "run": 0, "code": "0"}

    fitted = {**RECORDS[4].as_dict(), "fit": {"densities": [[0.8, 0.5]]}}
    answer = {"model": "fake", "method": "dip", "density": 0.7, "tasks": {}}
    cells = [cell("perplexity", RECORDS[4].as_dict()), cell("perplexity", fitted), cell("tasks", answer)]
    write_json(tmp_path / "a.json", {"schema": "dipper-experiment/1", "cells": [*cells, cell("simulate", {})]})
    evals, answers = read_results([tmp_path / "a.json"])
    assert evals == [RECORDS[4], dataclasses.replace(RECORDS[4], options={"fitted": True})]
    assert [row.method for row in compare_evals(evals)] == ["dip", "dip, fitted"]
    assert answers == [answer]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"r\.json cannot be read as a result \(JSONDecodeError"),
        ("[]", r"r\.json cannot be read as a result \(TypeError"),
        ('{"schema": "dipper-run/1"}', r"r\.json is dipper-run/1, not a result of `dipper eval`"),
        ('{"schema": "dipper-part/1"}', r"did not end; start it again with the same --out"),
    ],
)
def test_what_is_no_result(tmp_path, content, message):
    (tmp_path / "r.json").write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_results([tmp_path / "r.json"])


def test_tables():
    lines = evals_table(compare_evals(RECORDS)).splitlines()
    assert lines[0].split()[:7] == ["model", "on", "method", "density", "touched", "MLP", "MB/token"]
    assert lines[2].split()[:6] == ["fake", "native", "dip", "0.70", "0.700", "0.7"]
    assert "+10.52%" in lines[2]
    tasks = {"piqa": {"n": 9, "acc": 0.5, "acc_stderr": 0.1, "acc_norm": 0.75, "acc_norm_stderr": None}}
    shown = tasks_table([{"model": "m", "method": "dense", "density": None, "tasks": tasks}]).splitlines()[1]
    assert shown.split() == ["m", "dense", "-", "piqa", "9", "0.5000", "0.1000", "0.7500", "-", "-", "-"]


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
def test_a_figure_has_a_line_for_each_method(tmp_path):
    pytest.importorskip("matplotlib")
    rows = compare_evals([*RECORDS, dataclasses.replace(record(), model="another")])
    draw(rows, tmp_path / "f.svg")
    drawn = (tmp_path / "f.svg").read_text()
    draw(rows, tmp_path / "g.svg")
    assert "<svg" in drawn
    assert (tmp_path / "g.svg").read_text() == drawn
    with pytest.raises(ConfigError, match="There is nothing to draw"):
        draw([dataclasses.replace(rows[0], mlp_bytes_per_token=None)], tmp_path / "h.svg")


def test_json_of_a_row():
    assert json.loads(json.dumps(compare_evals(RECORDS)[0].as_dict()))["method"] == "dense"
