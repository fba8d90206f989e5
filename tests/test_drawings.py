import json
from dataclasses import replace
from xml.etree import ElementTree

import pytest

from dipper.drawings import VIEWS, draw_all, shown
from dipper.drawings.beyond import at_equal_dram
from dipper.errors import ConfigError
from dipper.figures import _OTHERS, COLOURS, Line, Panel, Reference, _last_in_sight, colour_of, draw
from dipper.files import write_json
from dipper.savings import Place, at_loss, dense_at, least_loss, savings
from dipper.sheets import NOT_MEASURED, Book
from samples import CONFIGS, write_samples


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_samples(tmp_path_factory.mktemp("experiments") / "e")


@pytest.fixture(scope="module")
def book(folder):
    return Book.open(folder)


def lines_of(view):
    return {line.label: line for panel in view.panels for line in panel.lines}


def test_every_experiment_is_told_in_one_order_and_shown(book):
    assert [name.replace("-", "_") for name in book.experiments] == list(VIEWS)
    for name in book.experiments:
        view = shown(book, name)
        assert view.panels, name
        assert any(table["rows"] for table in view.tables), name
        for table in view.tables:
            assert all(len(row) == len(table["columns"]) for row in table["rows"]), table["title"]
            assert all(isinstance(cell, str) for row in table["rows"] for cell in row), table["title"]


def test_axes_say_what_they_are(book):
    for name in book.experiments:
        for panel in shown(book, name).panels:
            assert panel.title
            assert panel.x
            assert panel.y or panel.rows, name


def test_losses_are_those_of_the_samples(book):
    view = shown(book, "density")
    lines = {line.label: line for line in view.panels[0].lines}
    dip = lines["dip"]
    assert dip.points[0] == pytest.approx((0.8, 0.02))  # 0.5 (1 - d)^2
    assert [x for x, _ in dip.points] == [0.8, 0.7, 0.5]
    assert lines["dip-ca, γ 0.5"].points[2][1] == pytest.approx(0.2)
    (table,) = [t for t in view.tables if "perplexity above dense" in t["title"]]
    assert table["columns"] == ["rule", "0.8", "0.7", "0.5"]
    assert table["rows"][0] == ["dip", "+2.0 ± 0.0\u00a0%", "+4.5 ± 0.0\u00a0%", "+12.5 ± 0.1\u00a0%"]
    assert table["rows"][-1] == ["dip, fitted", "–", "+3.1 ± 0.0\u00a0%", "+8.7 ± 0.0\u00a0%"]


def test_answers_are_means_of_tasks(book):
    (table,) = [t for t in shown(book, "density").tables if "right answers" in t["title"]]
    assert table["title"] == "Model small: right answers, % (10 items each)"
    assert table["rows"][0] == ["dense", "–", "60.0 ± 2.0", "60.0 ± 2.0", "60.0 ± 1.4"]


def test_savings_are_at_equal_dram_and_at_equal_speed(book):
    found = {(s.model, s.way, s.density): s for s in savings(book.sheets("headline"), book)}
    dip = found["small", "dip lfu", 0.5]
    # Dense streaming reads .4 and .2 MB; with 53 and 69 % of hits dip reads half of what is left, and .01.
    assert list(dip.gains.values()) == pytest.approx([0.4 / 0.245 - 1, 0.2 / 0.165 - 1])
    assert dip.gain == pytest.approx((0.4 / 0.245 + 0.2 / 0.165) / 2 - 1)
    assert dip.loss[0] == pytest.approx(0.125)
    assert 0 < dip.dram_saved < dip.mlp_dram_saved < 1
    assert found["phi-3-medium", "dip lfu", 0.5].loss is None


def test_the_best_setting_loses_no_more_than_allowed(book):
    found = [s for s in savings(book.sheets("headline"), book) if s.model == "small"]
    assert at_loss(found, 0.01) is None
    assert (at_loss(found, 0.023).way, at_loss(found, 0.023).density) == ("dip lfu", 0.8)
    best = at_loss(found, 0.5)
    assert (best.way, best.density) == ("dip-ca γ 0.5 lfu", 0.5)
    assert (least_loss(found).way, least_loss(found).density) == ("dip lfu", 0.8)
    assert at_loss([replace(best, cache="belady")], 0.5) is None  # nobody knows the future


def test_policies_are_told_apart_by_name_alone(book):
    assert set(lines_of(shown(book, "caches"))) == {"lru", "lfu", "belady"}


def test_gamma_joins_what_was_scored_with_what_was_simulated(book):
    (table,) = shown(book, "cache-aware").tables
    assert table["rows"][1][:5] == ["0.7", "0.5", "50\u00a0%", "+7.2 ± 0.0\u00a0%", "60.0\u00a0%"]
    assert table["rows"][1][5] == "55.0\u00a0%"


def test_planes_that_fetch_a_share_are_points_at_what_they_touch(book):
    lines = lines_of(shown(book, "beyond"))
    assert lines["2,3 units fetch"].points == (pytest.approx((0.8, 0.01)), pytest.approx((0.6, 0.04)))
    assert lines["2,3 units in runs"].points == (pytest.approx((0.6, 0.04)),)
    assert lines["2,3 units fetch"].style == lines["2,3 units in runs"].style == ""
    assert lines["2,2"].style == "-"


def test_benchmarks_say_on_which_disk_they_ran(book):
    titles = [table["title"] for table in shown(book, "beyond").tables]
    assert titles.count("Model small: bench_planes, held disk") == 2
    assert titles.count("Model small: bench_planes, disk as it is") == 1


def test_looks_follow_options(book):
    found = [s for s in savings(book.sheets("headline"), book) if s.model == "small"]
    assert {(s.method, s.gamma, s.rule) for s in found} == {("dip", None, "dip"), ("dip-ca", 0.5, "dip-ca γ 0.5")}
    assert {line.label for line in shown(book, "headline").panels[0].lines} == {"dip", "dip-ca γ 0.5"}
    fitted = lines_of(shown(book, "density"))["dip, fitted"]
    assert (fitted.marker, fitted.hollow) == ("s", "all")


def test_compensation_goes_from_hollow_to_filled(book):
    (panel,) = shown(book, "compensation").panels
    assert panel.rows == ("dip, 0.5",)
    assert panel.lines[0].points == ((30.0, 0.0), (24.0, 0.0))
    assert panel.references == (Reference(x=20.0, label="dense"),)


def test_what_is_held_beside_the_model_is_all_told(book):
    table = shown(book, "compensation").tables[0]
    held = {row[0]: row[5] for row in table["rows"]}
    assert table["columns"][5] == "held beside the model"
    assert held == {
        "dense": "–", "dip@0.5": "–", "dip@0.5 + lora": "–", "gate@0.5 + lora": "–", "resident: rescale": "200 KB",
        "planes@0.65 + lora": "3 MB", "resident: lora, apart": "3 MB",  # an adapter of planes is not merged
    }  # fmt: skip


def test_rules_with_caches_stand_beside_the_same_windows(book):
    """They are scored on the first windows alone, where the others have another perplexity than on the whole text."""
    table = shown(book, "compensation").tables[1]
    assert table["title"].endswith(": with column caches, the first 200 and 200 tokens of WikiText-2 and C4")
    assert [tuple(row[:3]) for row in table["rows"]] == [
        ("dense", "18.00", "–"), ("dip@0.5", "27.00", "–"), ("dip@0.5 + lora", "24.00", "33 ± 0.0 %"),  # of 9, 3
        ("dip-ca@0.5", "33.00", "–"), ("dip-ca@0.5 + lora of dip, more steps", "30.00", "20 ± 1.0 %"),
        ("dip-ca@0.5 + lora of the closed loop", "27.00", "30 ± 1.0 %"),
    ]  # fmt: skip
    assert all(row[3:5] == row[1:3] for row in table["rows"])  # C4, the same in these samples


def test_ways_to_compensate_are_compared_on_the_same_windows(book):
    table = shown(book, "compensation").tables[2]
    assert table["columns"] == ["setting", "against", "WikiText-2", "C4"]
    gate, loop = table["rows"]
    assert gate == ["gate@0.5 + lora", "dip@0.5 + lora", "+10.0 ± 0.0\u00a0%", "+10.0 ± 0.0\u00a0%"]
    assert loop[:2] == ["dip-ca@0.5 + lora of the closed loop", "dip-ca@0.5 + lora of dip, more steps"]
    assert loop[2].startswith("−10.0 ± 0.0")  # 27 to 30 in either window


def test_what_has_no_dense_run_yet_is_shown_without_it(tmp_path):
    folder = write_samples(tmp_path / "e")
    path = folder / "results" / "compensation-small.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    for name in ("dense", "dip@0.5"):
        del content["cells"][0]["result"]["cells"][name]
    path.write_text(json.dumps(content), encoding="utf-8")
    tables = shown(Book.open(folder), "compensation").tables
    assert tables[1]["rows"][0][0] == "dip-ca@0.5"


def test_every_row_of_a_benchmark_says_what_it_is_of(book):
    tables = [table for table in shown(book, "beyond").tables if "bench_" in table["title"]]
    assert tables
    for table in tables:
        assert table["columns"][0] == "way to run"
        ways = [row[0] for row in table["rows"]]
        assert len(set(ways)) == len(ways), table["title"]


def test_a_benchmark_that_is_not_known_is_shown_as_it_is(tmp_path):
    folder = write_samples(tmp_path / "e")
    path = folder / "results" / "beyond-small.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    cell = next(cell for cell in content["cells"] if cell["kind"] == "benchmark")
    cell["result"]["results"] = [{"engine": "a", "idle_mb": 2.5, "ok": True, "warm": False}, {"engine": "b"}]
    path.write_text(json.dumps(content), encoding="utf-8")
    (table,) = [t for t in shown(Book.open(folder), "beyond").tables if t["columns"][0] == "engine"]
    assert table["columns"] == ["engine", "idle mb", "warm"]
    assert table["rows"] == [["a", "2.5", "no"], ["b", "–", "–"]]


def test_dense_streaming_is_told_at_the_very_same_dram():
    def record(gb, ms):
        return {"dram_bytes": {"a": gb * 1e9}, "tok_per_s": 1000 / ms}

    dense = [record(3, 60), record(1, 100), record(2, 80)]  # 20 ms a GB
    for gb, ms in ((1, 100), (1.5, 90), (2, 80), (2.25, 75), (3, 60), (0.5, 110), (0, 120), (4, 40)):
        assert dense_at(gb, dense) == pytest.approx(1000 / ms), gb
    for gb in (-0.1, 4.1):  # farther than the next budget is
        assert dense_at(gb, dense) is None
    assert dense_at(2.2, [record(1, 100), record(2, 1)]) is None  # no time at all
    assert dense_at(1.01, dense[1:2]) == pytest.approx(10)
    assert dense_at(1.1, dense[1:2]) is None
    assert dense_at(1, []) is None


def test_dense_streaming_on_a_disk_is_told_at_the_very_same_dram():
    """It holds whole blocks: 3 of the 5 bits where it may hold 3.5, and streams 2 of them in place of 1.5."""
    dense = [{"budget": "3.5b", "method": "dense-resident", "bits": 5.0, "r": 8.0},
             {"budget": "3.5b", "method": "dense-stream", "bits": 3.0, "r": 1.0}]  # fmt: skip
    pruned = {"budget": "3.5b", "method": "planes", "bits": 3.5, "r": 1.6}
    assert at_equal_dram(pruned, [*dense, pruned]) == pytest.approx(1.2)
    assert at_equal_dram({**pruned, "bits": 3.0}, dense) == 1.6
    assert at_equal_dram({**pruned, "bits": 5.0}, dense) == 1.6  # it holds all, as dense streaming never does
    assert at_equal_dram({**pruned, "budget": "2.7b"}, dense) == 1.6
    assert at_equal_dram({"budget": "3.5b", "method": "planes", "r": 1.6}, dense) == 1.6


@pytest.mark.parametrize(
    ("points", "end"),
    [
        ([(0.2, 0.5), (0.8, 0.6)], (0.8, 0.6)),
        ([(0.8, 0.6), (0.2, 0.5)], (0.8, 0.6)),  # from the right to the left
        ([(0.2, 0.5), (0.6, 1.5)], (0.4, 1.0)),  # out at the top
        ([(0.2, 0.5), (0.4, -0.5)], (0.3, 0.0)),
        ([(0.2, 0.5), (0.6, 1.5), (0.8, 0.7)], (0.8, 0.7)),  # and in again
        ([(0.9, 0.5), (1.5, 0.6)], (0.9, 0.5)),
        ([(0.2, 3.0), (0.5, 2.0)], (0.5, 1.0)),  # never in sight, but above
        ([(0.0, 0.5), (0.5, 1.009), (0.6, 1.0105)], (0.5, 1.0)),  # hardly above
        ([(0.2, 0.5), (0.6, float("nan")), (0.8, float("inf"))], (0.2, 0.5)),
        ([(1.2, 0.5)], None),
        ([], None),
    ],
)
def test_a_name_stands_where_its_line_leaves(points, end):
    assert _last_in_sight(points) == (None if end is None else pytest.approx(end))


def test_no_budget_is_left_out_of_a_gain(tmp_path):
    """The least one too, where pruning holds a little less than dense streaming can."""
    folder = write_samples(tmp_path / "e")
    path = folder / "results" / "headline-small.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    found = [r for cell in content["cells"] for r in cell["result"]["records"] if r["method"] == "dip"]
    least = min(found, key=lambda r: r["dram_bytes"]["slots"])
    before = savings(Book.open(folder).sheets("headline"), Book.open(folder))
    least["dram_bytes"]["slots"] = int(0.9 * least["dram_bytes"]["slots"])
    path.write_text(json.dumps(content), encoding="utf-8")
    after = savings(Book.open(folder).sheets("headline"), Book.open(folder))
    assert [len(s.gains) for s in after] == [len(s.gains) for s in before]


@pytest.mark.parametrize(
    ("place", "cost", "told"),
    [
        (Place("phone", None, None, None), "", "phone"),
        (Place("phone", None, 0, None), "flat", "phone, flat"),
        (Place("phone", 2, 0, 1), "flat", "phone, 2 GB/s, flat"),
        (Place("phone", None, 0, 4096), "0 µs a read", "phone, 0 µs a read, 4096 B aligned"),
        (Place("phone", None, 8, 4096), "8 µs a read", "phone, 8 µs a read, 4096 B aligned"),
        (Place(None, None, None, None), "", "as it is"),
    ],
)
def test_flat_is_where_reads_cost_their_bytes_alone(place, cost, told):
    assert (place.cost, place.told) == (cost, told)


def test_settings_that_do_not_fit_are_told(tmp_path):
    folder = write_samples(tmp_path / "e")
    path = folder / "results" / "dram-small.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    why = "paper-phone, dip mlp_dram {} density 0.5 cache lfu split uniform: --mlp-dram gives 1 MB"
    content["cells"][0]["result"]["skipped"] = [why.format("20%"), why.format("20%"), why.format("10%")]
    path.write_text(json.dumps(content), encoding="utf-8")
    (table,) = [t for t in shown(Book.open(folder), "dram").tables if t["title"].startswith("Model small")]
    assert [row[0] for row in table["rows"] if "not fit" in row[0]] == ["3 settings at 20%, 10% do not fit"]
    assert len({len(row) for row in table["rows"]}) == 1


def test_what_was_not_measured_is_not_drawn_and_said(tmp_path):
    whole, part = write_samples(tmp_path / "whole"), write_samples(tmp_path / "part", without=1)
    for name in CONFIGS:
        tables = [shown(Book.open(folder), name).tables for folder in (whole, part)]
        told = [sum(row.count(NOT_MEASURED) for t in found for row in t["rows"]) for found in tables]
        n_cells = len(json.loads((whole / "results" / f"{name}-small.json").read_text())["cells"])
        if n_cells > 1:
            assert told[1] > told[0], name
    assert Book.open(part).unmeasured("density") == ["other"]
    assert Book.open(part).unmeasured("compensation") == []


def test_orphans_are_not_shown(tmp_path):
    folder = write_samples(tmp_path / "e")
    config = folder / "configs" / "thresholds.toml"
    config.write_text(config.read_text(encoding="utf-8").replace("[0.7, 0.5]", "[0.7]"), encoding="utf-8")
    (table,) = shown(Book.open(folder), "thresholds").tables
    assert {row[2] for row in table["rows"]} == {"0.70"}


def test_other_files_among_the_results_are_left_alone(tmp_path):
    folder = write_samples(tmp_path / "e")
    write_json(folder / "results" / "density-old.json", {"schema": "dipper-grid/1"})
    assert [sheet.model for sheet in Book.open(folder).sheets("density")] == ["small"]


def test_a_damaged_file_is_named(tmp_path):
    folder = write_samples(tmp_path / "e")
    (folder / "results" / "density-small.json").write_text("{", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"density-small\.json is damaged or no result of `dipper reproduce`"):
        Book.open(folder)


def test_an_unknown_view_is_an_error(tmp_path):
    folder = write_samples(tmp_path / "e")
    config = folder / "configs" / "density.toml"
    config.write_text(
        config.read_text(encoding="utf-8").replace('view = "density"', 'view = "densty"'), encoding="utf-8"
    )
    with pytest.raises(ConfigError, match="experiment density is to be shown as 'densty', known are bandwidth, beyond"):
        shown(Book.open(folder), "density")


# ------------------------------------------------------------------------------------------------ figures


def test_figures_are_the_same_bytes_for_the_same_results(folder):
    pytest.importorskip("matplotlib")
    drawn = draw_all(folder)
    assert {path.name for path in drawn.values()} == {f"{name}.svg" for name in CONFIGS}
    first = {name: path.read_bytes() for name, path in drawn.items()}
    assert {name: path.read_bytes() for name, path in draw_all(folder).items()} == first
    for content in first.values():
        assert b"prefers-color-scheme" in content
        assert b"<text" in content  # searchable, not outlines
        ElementTree.fromstring(content)


def test_a_method_has_one_colour():
    assert colour_of("dense-stream") == colour_of("dense") == COLOURS["dense"]
    assert colour_of("something-new") in _OTHERS
    assert len(set(COLOURS.values())) == len(COLOURS)


def test_colours_stand_out_on_light_and_on_dark():
    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        r, g, b = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    for name, colour in COLOURS.items():
        assert 1.05 / (luminance(colour) + 0.05) >= 3, name
        assert (luminance(colour) + 0.05) / (luminance("#14171c") + 0.05) >= 3, name


def test_names_do_not_lie_on_each_other(tmp_path):
    pytest.importorskip("matplotlib")
    lines = tuple(Line(label=f"n{i}", method="dip", points=((0.0, 0.0), (1.0, 1 + i / 1000))) for i in range(5))
    draw([Panel(title="t", x="x", y="y", lines=lines)], tmp_path / "f.svg", columns=1)
    svg = (tmp_path / "f.svg").read_text(encoding="utf-8")
    root = ElementTree.fromstring(svg)
    at = [float(e.get("y")) for e in root.iter("{http://www.w3.org/2000/svg}text") if (e.text or "").startswith("n")]
    assert len(at) == 5
    assert all(abs(a - b) >= 8 for i, a in enumerate(at) for b in at[:i])


def test_nothing_to_draw_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="There is nothing to draw in"):
        draw([], tmp_path / "f.svg", columns=1)
