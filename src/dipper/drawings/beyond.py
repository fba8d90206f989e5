"""What reads cost, planes, and what was measured on a real disk."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from dipper.drawings.simulations import speed_table, sweep_lines, sweep_panel
from dipper.drawings.view import View, loss_limits, loss_line, loss_panel
from dipper.figures import Line, Panel, Reference
from dipper.savings import Place, Simulated, dense_at, simulated
from dipper.sheets import (
    DENSE,
    NONE,
    NOT_MEASURED,
    Book,
    Measured,
    Sheet,
    Table,
    density_of,
    dram_gb,
    memory,
    number,
    percent,
    rule,
    table,
    told,
    way,
    with_error,
)

__all__ = ["at_equal_dram", "bench_way", "benchmarks", "beyond"]


def beyond(sheets: Sequence[Sheet], book: Book) -> View:
    """Cost per read, planes, and what was measured on a disk, one after the other."""
    parts = [[panel for sheet in sheets for panel in part(sheet, book)] for part in _PARTS]
    tables: list[Table] = []
    for sheet in sheets:
        if sheet.of("simulate"):
            tables.append(speed_table(sheet, "simulated", "DRAM", lambda run: memory(dram_gb(run.record))))
        if sheet.of("perplexity"):
            tables.append(_planes_table(sheet, book))
        tables += _bench_tables(sheet)
    panels = tuple(itertools.chain(*parts))
    return View(panels=panels, columns=min(3, max(1, *map(len, parts))), tables=tuple(tables))


def _cost_panels(sheet: Sheet, _: Book) -> list[Panel]:
    """Throughput over dense streaming with the same cost per read and DRAM, in the middle of the budgets."""
    runs = [run for run in simulated(sheet) if run.place.cost_per_read_us is not None]
    dense: dict[Place, list[dict[str, Any]]] = {}
    for run in runs:
        if run.record["method"] == "dense-stream":
            dense.setdefault(run.place, []).append(run.record)

    def ratio(run: Simulated) -> float | None:
        budgets = sorted(dense.get(run.place, []), key=dram_gb)
        gb = dram_gb(run.record)
        nearest = min(budgets, key=lambda record: abs(dram_gb(record) - gb), default=None)
        streamed = dense_at(gb, budgets)
        if streamed is None or nearest is not budgets[len(budgets) // 2]:
            return None
        return float(run.record["tok_per_s"] / streamed)

    shown = [run for run in runs if run.record["method"] not in DENSE and ratio(run) is not None]
    lines = sweep_lines(shown, lambda run: float(run.place.cost_per_read_us or 0), ratio)
    if not lines:
        return []
    axes: dict[str, Any] = {"x": "cost of a read, µs", "y": "throughput over dense streaming", "y_scale": "log"}
    return [sweep_panel(sheet, shown, lines, references=(Reference(y=1, label="dense-stream"),), **axes)]


def _planes_panels(sheet: Sheet, book: Book) -> list[Panel]:
    """Loss of planes and of what they are compared with: by density as lines, by what is fetched as points."""
    found: dict[str, list[Measured]] = {}
    for cell in sheet.of("perplexity"):
        if density_of(cell) is not None or "fetch" in cell.options["method"]:
            found.setdefault(_without_fetch(cell), []).append(cell)
    styles = itertools.cycle(("-", "-", "--", ":", "-."))
    lines = [
        loss_line(
            book, sheet, _planes_label(cells[0].options["method"]), cells,
            style="" if "fetch" in cells[0].options["method"] else next(styles),
        )
        for cells in found.values()
    ]  # fmt: skip
    lines = [line for line in lines if line.points]
    if not lines:
        return []
    x = [x for line in lines for x, _ in line.points]
    panel = loss_panel(f"{sheet.marked}\nplanes by base bits, beside dip", lines)
    return [replace(panel, x_limits=(max(x) + 0.02, min(x) - 0.02), y_limits=loss_limits(lines))]


def _without_fetch(cell: Measured) -> str:
    """What all cells of a line have in common: the rule, and that a share is fetched, not how large it is."""
    method = {name: value for name, value in cell.options["method"].items() if name != "fetch_glu"}
    return rule({**cell.options, "method": {**method, "fetch": True} if "fetch" in method else method})


def _planes_label(method: Mapping[str, Any]) -> str:
    """Base bits of input and GLU columns, whether units are fetched, how, and whether a token late."""
    if method["name"] != "planes":
        return str(method["name"])
    words = [told(method.get("base_bits", "planes"))]
    words += ["units"] if "unit_bytes" in method else []
    words += ["late"] if method.get("deferred") else []
    if "fetch" in method:
        words.append("fetch" if method.get("read_cost") is None else "in runs")
    return " ".join(words)


def _planes_table(sheet: Sheet, book: Book) -> Table:
    rows = [
        [rule(cell.options), number(density_of(cell)), with_error(book.loss(sheet, cell), cell.result is not None)]
        for cell in sheet.of("perplexity")
        if cell.result is None or cell.result["method"] not in DENSE
    ]
    return table(f"{sheet.marked}: perplexity", ["rule", "density", "perplexity above dense"], rows)


def benchmarks(sheet: Sheet) -> Iterator[tuple[Measured, list[dict[str, Any]]]]:
    """Benchmarks and the rows of their result."""
    for cell in sheet.of("benchmark"):
        found = (cell.result or {}).get("results") or []
        yield cell, [row for row in found if isinstance(row, dict)]


def _accuracy_panels(sheet: Sheet, _: Book) -> list[Panel]:
    """Of `bench_simulator.py`: on the held disk if it was measured there, which drifts less."""
    found = [(not cell.held, rows) for cell, rows in benchmarks(sheet) if rows and "predicted" in rows[0]]
    if not found:
        return []
    as_it_is, rows = min(found, key=lambda one: one[0])
    return [
        _accuracy_panel(f"{sheet.marked}\nsimulated and measured, {'disk as it is' if as_it_is else 'held disk'}", rows)
    ]


def _ratio_panels(sheet: Sheet, _: Book) -> list[Panel]:
    """Of `bench_planes.py`, on every disk."""
    shown = [
        (f"{bench_way(row)}, {'held disk' if cell.held else 'as it is'}", row["method"], at_equal_dram(row, rows))
        for cell, rows in benchmarks(sheet)
        for row in rows
        if row.get("r") is not None and row["method"] not in DENSE
    ]
    if not shown:
        return []
    return [
        Panel(
            title=f"{sheet.marked}\nmeasured, equal DRAM", x="throughput over dense streaming",
            rows=tuple(name for name, *_ in shown),
            lines=tuple(
                Line(label="", method=method, points=((0.0, float(i)), (ratio, float(i))), marker="")
                for i, (_, method, ratio) in enumerate(shown)
            ),
            references=(Reference(x=1, label="dense-stream"),),
            x_limits=(0.0, max(1.6, 1.1 * max(ratio for *_, ratio in shown))),
        )
    ]  # fmt: skip


def _accuracy_panel(title: str, rows: Sequence[Mapping[str, Any]]) -> Panel:
    """Of `bench_simulator.py`."""
    methods = dict.fromkeys(row["method"] for row in rows)
    points = {m: tuple((r["measured"], r["predicted"]) for r in rows if r["method"] == m) for m in methods}
    speeds = [speed for pairs in points.values() for pair in pairs for speed in pair]
    limits = 0.8 * min(speeds), 1.25 * max(speeds)
    return Panel(
        title=title, x="measured, tokens a second", y="simulated, tokens a second", x_scale="log", y_scale="log",
        lines=tuple(Line(label=m, method=m, points=p, style="") for m, p in points.items()),
        references=(Reference(),), x_limits=limits, y_limits=limits,
    )  # fmt: skip


def at_equal_dram(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> float:
    """Throughput of a setting of `bench_planes.py` over dense streaming that holds as much, not only as it may.

    Dense streaming holds whole blocks, which may leave a little of its budget unused; with that, it would stream so
    much less, and take so much less time.
    """
    ratio = float(row["r"])
    bits = {r["method"]: r.get("bits") for r in (*rows, row) if r["budget"] == row["budget"]}
    every, held, mine = bits.get("dense-resident"), bits.get("dense-stream"), row.get("bits")
    if every is None or held is None or mine is None or not max(held, mine) < every:
        return ratio
    return ratio * float((every - mine) / (every - held))


def bench_way(row: Mapping[str, Any]) -> str:
    """A setting of `bench_planes.py` in words."""
    words = [str(row["method"])]
    if row.get("fetch") is not None:
        shares = [row["fetch"], row["fetch"] if row.get("fetch_glu") is None else row["fetch_glu"]]
        words.append(" : ".join(percent(share, signed=False) for share in shares))
    for name in ("density", "gamma"):
        if row.get(name) is not None:
            words.append(f"{name} {row[name]:g}")
    words += ["in runs"] if row.get("read_cost") else []
    return f"{' '.join(words)}, {row['budget']}"


def _bench_tables(sheet: Sheet) -> list[Table]:
    tables, missing = [], []
    for cell, rows in benchmarks(sheet):
        script = str(cell.options["script"])
        title = f"{sheet.marked}: {script}, {'held disk' if cell.held else 'disk as it is'}"
        if cell.result is None:
            missing.append([script, NOT_MEASURED])
            continue
        held = dict.fromkeys(name for row in rows for name in row if row[name] not in (None, ""))
        known = [name for name in _BENCH_COLUMNS if name in held]
        names = known + [name for name in held if name not in (*known, *_SETTING, *_HIDDEN)]
        heads = [_BENCH_COLUMNS.get(name, name.replace("_", " ")) for name in names]
        told_rows = [[_bench_value(name, row) for name in names] for row in rows]
        if all("method" in row for row in rows):
            heads = ["way to run", *heads]
            told_rows = [[_bench_setting(row), *told_row] for row, told_row in zip(rows, told_rows, strict=True)]
        tables.append(table(title, heads, told_rows))
    return [*tables, *([table(f"{sheet.marked}: on a disk", ["benchmark", "result"], missing)] if missing else [])]


# What `_bench_setting` tells, and what is no table's.
_SETTING = ("method", "budget", "density", "gamma", "cache", "fetch", "fetch_glu", "read_cost", "mlp_dram")
_HIDDEN = ("model", "ok", "relative_stderr", "ledger_ms", "predicted_ms", "sustained_ms", "profiles")
# What rows of benchmarks have, in the order in which it is told; other columns of a script come after them.
_BENCH_COLUMNS = {
    "r": "tok/s over dense streaming, same budget",
    "relative": "perplexity above dense",
    "token_ms": "ms a token",
    "measured": "measured, tok/s",
    "p20": "20th percentile",
    "p80": "80th percentile",
    "predicted": "simulated, tok/s",
    "error": "error",
    "r_max": "tok/s at most: all resident",
    "bits": "bits held per MLP weight",
    "mb": "MB read, a token",
    "reads": "reads, a token",
    "hits": "hits",
    "flash_bytes_per_token": "read, a token",
    "useful_bytes_per_token": "of it wanted",
    "reads_per_token": "reads, a token",
    "read_gbps": "GB/s drawn",
    "hit_rate": "hits",
    "base": "base bits",
    "whole": "whole layers",
}


def _bench_setting(row: Mapping[str, Any]) -> str:
    """Of a row of `bench_planes.py` or `bench_simulator.py`."""
    if "budget" in row:
        return bench_way(row)
    words = [way(row)]
    words += [] if row.get("density") is None else [f"density {row['density']:g}"]
    words += [] if row.get("mlp_dram") is None else [f"{row['mlp_dram']} of the MLP"]
    return ", ".join(words)


def _bench_value(name: str, row: Mapping[str, Any]) -> str:
    value = row.get(name)
    if value is None or value == "":
        return NONE
    dense = row.get("method") in DENSE
    if isinstance(value, bool):
        return "yes" if value else "no"
    if name == "useful_bytes_per_token" and dense:
        return "all"
    if name == "relative":
        return NONE if dense else with_error((value, row.get("relative_stderr")))
    if name.endswith("bytes_per_token"):
        return f"{value / 1e6:.4g} MB"
    if name in ("r", "r_max"):
        return f"{value:.2f} ×"
    if name in ("error", "hit_rate", "hits"):
        return percent(value, 1, signed=name == "error")
    return number(value, "{:.4g}") if isinstance(value, float) else str(value)


_PARTS = (_cost_panels, _planes_panels, _accuracy_panels, _ratio_panels)
