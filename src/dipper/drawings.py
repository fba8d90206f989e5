"""What the experiments found, as one figure and a few tables each, from their results files alone.

    book = Book.open("experiments")
    view = shown(book, "density")         # panels as data, and tables
    draw_all("experiments")               # experiments/figures/NAME.svg

A view is a pure function of the results. A cell that was not measured is not drawn, and its row says "not measured".
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dipper.errors import ConfigError
from dipper.figures import Line, Panel, Reference, draw
from dipper.savings import (
    LOSSES,
    PAPER,
    Saving,
    Simulated,
    at_loss,
    kind_of_masks,
    nearest_dense,
    savings,
    simulated,
)
from dipper.sheets import (
    DENSE,
    NONE,
    NOT_MEASURED,
    RUINED,
    Book,
    Measured,
    Sheet,
    Table,
    close,
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

__all__ = ["VIEWS", "View", "draw_all", "gain_told", "shown"]

LOSS_TICKS = (0.003, RUINED)  # of figures: less than 0.3 % is noise


@dataclass(frozen=True, kw_only=True)
class View:
    """What is shown of an experiment: panels, so many in a row, and tables."""

    panels: tuple[Panel, ...]
    columns: int
    tables: tuple[Table, ...]


# ------------------------------------------------------------------------------------------------ perplexities

# What the figure of all rules shows of them; the table has them all.
_SHOWN = ("glu-oracle", "teal", "dip, fitted", "dip", "dip-ca, γ 0.5, cache 0.5", "gate", "up")


def density(sheets: Sequence[Sheet], book: Book) -> View:
    """Loss and right answers of every rule by density."""
    panels = [
        _loss_panel(
            sheet.title,
            [_loss_line(book, sheet, name, cells, label=name.split(", cache")[0]) for name, cells in _by_rule(sheet)],
        )
        for sheet in sheets
        if any(cell.result for cell in sheet.of("perplexity"))
    ]
    answered = [_answers_panel(sheet) for sheet in sheets if any(cell.result for cell in sheet.of("tasks"))]
    tables = [_loss_table(book, sheet) for sheet in sheets if sheet.of("perplexity")]
    tables += [_answers_table(sheet) for sheet in sheets if sheet.of("tasks")]
    return View(panels=(*panels, *answered), columns=max(len(panels), len(answered), 1), tables=tuple(tables))


def _by_rule(sheet: Sheet) -> list[tuple[str, list[Measured]]]:
    """Cells of the rules that the figure shows, in its order."""
    found: dict[str, list[Measured]] = {}
    for cell in sheet.of("perplexity"):
        found.setdefault(rule(cell.options), []).append(cell)
    return [(name, found[name]) for name in _SHOWN if name in found]


def _loss_line(
    book: Book, sheet: Sheet, name: str, cells: Sequence[Measured], *, label: str | None = None, style: str = "-"
) -> Line:
    """Loss by the share of bytes touched."""
    points, errors = [], []
    for cell in cells:
        loss = book.loss(sheet, cell)
        if loss is not None and cell.result is not None and cell.result["touched"] is not None:
            points.append((float(cell.result["touched"]), loss[0]))
            errors.append(loss[1] or 0.0)
    order = sorted(range(len(points)), key=lambda i: -points[i][0])
    marker = "s" if "fitted" in name else "o"
    return Line(
        label=name if label is None else label, method=str(cells[0].options["method"]["name"]), style=style,
        points=tuple(points[i] for i in order), errors=tuple(errors[i] for i in order), marker=marker,
        hollow="all" if "fitted" in name else "none",
    )  # fmt: skip


def _loss_panel(title: str, lines: Sequence[Line]) -> Panel:
    low, high = LOSS_TICKS
    return Panel(
        title=title, x="share of the MLP's bytes that a token touches", y="perplexity above dense",
        lines=tuple(line for line in lines if line.points), y_scale="log", y_limits=(low, high), percent="xy",
        x_limits=(0.83, 0.38),
    )  # fmt: skip


def _densities(cells: Sequence[Measured]) -> list[float]:
    return sorted({d for cell in cells if (d := density_of(cell)) is not None}, reverse=True)


def _loss_table(book: Book, sheet: Sheet) -> Table:
    cells = sheet.of("perplexity")
    densities = _densities(cells)
    dense = next((c.result for c in cells if c.result is not None and c.result["method"] in DENSE), None)
    by_rule: dict[str, dict[float, Measured]] = {}
    for cell in cells:
        if (at := density_of(cell)) is not None:
            by_rule.setdefault(rule(cell.options), {})[at] = cell
    rows = []
    for name, at_density in by_rule.items():
        row = [name]
        for at in densities:
            found = at_density.get(at)
            row.append(NONE if found is None else with_error(book.loss(sheet, found), found.result is not None))
        rows.append(row)
    scored = NOT_MEASURED if dense is None else f"{dense['perplexity']:.2f} over {dense['n_tokens']} tokens"
    return table(
        f"{sheet.title}: perplexity above dense ({scored}), by density", ["rule", *(f"{d:g}" for d in densities)], rows
    )


def _mean_answers(result: Mapping[str, Any]) -> tuple[float, float]:
    """Share of right answers, each task counting alike, and its standard error."""
    tasks = result["tasks"].values()
    error = math.sqrt(sum(task["acc_stderr"] ** 2 for task in tasks)) / len(tasks)
    return sum(task["acc"] for task in tasks) / len(tasks), error


def _share(task: Mapping[str, Any]) -> str:
    """Right answers of a task, per cent."""
    return f"{100 * task['acc']:.1f} ± {100 * task['acc_stderr']:.1f}"


def _answers_panel(sheet: Sheet) -> Panel:
    by_rule: dict[str, list[tuple[float, float, float]]] = {}
    methods: dict[str, str] = {}
    references = []
    for cell in (c for c in sheet.of("tasks") if c.result is not None):
        assert cell.result is not None
        mean, error = _mean_answers(cell.result)
        name, at = rule(cell.options), density_of(cell)
        if at is None:
            references.append(Reference(y=mean, label="dense"))
        elif name in _SHOWN:
            by_rule.setdefault(name, []).append((at, mean, error))
            methods[name] = cell.options["method"]["name"]
    lines = []
    for name in (n for n in _SHOWN if n in by_rule):
        points = sorted(by_rule[name], reverse=True)
        lines.append(
            Line(
                label=name.split(", cache")[0], method=methods[name], points=tuple((x, y) for x, y, _ in points),
                errors=tuple(error for *_, error in points),
            )
        )  # fmt: skip
    return Panel(
        title=sheet.title, x="density", y="right answers, mean of tasks", lines=tuple(lines), percent="xy",
        references=tuple(references), x_limits=(0.73, 0.47),
    )  # fmt: skip


def _answers_table(sheet: Sheet) -> Table:
    cells = sheet.of("tasks")
    names = list(dict.fromkeys(task for cell in cells for task in cell.options.get("tasks", ())))
    rows = []
    for cell in cells:
        row = [rule(cell.options), number(density_of(cell), "{:g}")]
        if cell.result is None:
            rows.append([*row, *([NOT_MEASURED] * (len(names) + 1))])
            continue
        for task in (cell.result["tasks"].get(name) for name in names):
            row.append(NONE if task is None else _share(task))
        mean, error = _mean_answers(cell.result)
        rows.append([*row, f"{100 * mean:.1f} ± {100 * error:.1f}"])
    limit = next((cell.options["limit"] for cell in cells if cell.options.get("limit")), None)
    items = "all items" if limit is None else f"{limit} items each"
    return table(f"{sheet.title}: right answers, % ({items})", ["rule", "density", *names, "mean"], rows)


def split(sheets: Sequence[Sheet], book: Book) -> View:
    """Loss by how much of a density the inputs get."""
    panels, tables = [], []
    for sheet in sheets:
        by_density: dict[float, list[tuple[float, float, float]]] = {}
        rows = []
        for cell in sheet.of("perplexity"):
            at, result, loss = density_of(cell), cell.result, book.loss(sheet, cell)
            if at is None:
                continue
            d_in, d_glu = (None, None) if result is None else (result["d_in"], result["d_glu"])
            above = cell.options.get("above")
            if d_in is None and above is not None:
                d_in, d_glu = at + above, at - 2 * above
            rows.append(
                (-at, d_in or 0.0, [number(at), number(d_in), number(d_glu), with_error(loss, result is not None)])
            )
            if loss is not None and d_in is not None:
                by_density.setdefault(at, []).append((d_in, loss[0], loss[1] or 0.0))
        rows.sort(key=lambda row: row[:2])
        tables.append(
            table(
                f"{sheet.title}: perplexity above dense, by split",
                ["density", "d_in", "d_glu", "perplexity above dense"],
                [row for *_, row in rows],
            )
        )
        lines = []
        for at, found in sorted(by_density.items()):
            found.sort()
            lines.append(
                Line(
                    label=f"density {at:g}", method="dip", points=tuple((x, y) for x, y, _ in found),
                    errors=tuple(error for *_, error in found),
                )
            )  # fmt: skip
        if lines:
            panels.append(
                Panel(
                    title=sheet.title, x="density of inputs, d_in", y="perplexity above dense", lines=tuple(lines),
                    y_scale="log", percent="xy", y_limits=_within(lines),
                )
            )  # fmt: skip
    return View(panels=tuple(panels), columns=max(1, len(panels)), tables=tuple(tables))


def _within(lines: Iterable[Line]) -> tuple[float, float] | None:
    """Limits of a log axis that hold what is positive and not ruined."""
    values = [y for line in lines for _, y in line.points if 0 < y <= LOSS_TICKS[1]]
    if not values:
        return None
    return max(LOSS_TICKS[0], 0.7 * min(values)), min(LOSS_TICKS[1], 1.4 * max(values))


_SELECT_STYLES = {"topk": "-", "threshold": "--", "topp": ":"}


def thresholds(sheets: Sequence[Sheet], book: Book) -> View:
    """Loss by what was touched, for the ways to select columns."""
    panels, tables = [], []
    for sheet in sheets:
        found: dict[tuple[str, str], list[Measured]] = {}
        for cell in sheet.of("perplexity"):
            method = cell.options.get("method", {})
            if density_of(cell) is not None:
                found.setdefault((method["name"], method.get("select", "topk")), []).append(cell)
        lines = [
            _loss_line(book, sheet, f"{name}, {how}", cells, style=_SELECT_STYLES.get(how, "-."))
            for (name, how), cells in found.items()
        ]
        panels.append(_loss_panel(sheet.title, lines))
        rows = []
        for (name, how), cells in found.items():
            for cell in cells:
                touched = None if cell.result is None else cell.result["touched"]
                loss = with_error(book.loss(sheet, cell), cell.result is not None)
                rows.append([name, how, number(density_of(cell)), number(touched, "{:.3f}"), loss])
        tables.append(
            table(
                f"{sheet.title}: perplexity above dense, by how columns are selected",
                ["rule", "select", "density asked", "touched", "perplexity above dense"],
                rows,
            )
        )
    kept = tuple(panel for panel in panels if panel.lines)
    return View(panels=kept, columns=max(1, len(kept)), tables=tuple(tables))


# ------------------------------------------------------------------------------------------------ simulations


def _missing(sheet: Sheet, kind: str, n_columns: int) -> Iterator[list[str]]:
    """One row for all cells that were not measured."""
    n = sum(cell.result is None for cell in sheet.of(kind))
    if n:
        yield [f"{n} more {'cells' if n > 1 else 'cell'}", *([NOT_MEASURED] * (n_columns - 1))]


def _drawn_density(runs: Iterable[Simulated]) -> float | None:
    """The density that figures show: a half, else the least."""
    found = {run.line[1] for run in runs if run.line[1] is not None}
    return min(found, key=lambda d: (abs(d - 0.5) > 0.01, d), default=None)


def _lines(
    runs: Sequence[Simulated],
    x: Callable[[Simulated], float | None],
    y: Callable[[Simulated], float | None],
    *,
    by_budget: bool = False,
) -> list[Line]:
    """A line for each way to run, at one density; with `by_budget` for each and budget."""
    at = _drawn_density(runs)
    shown = [run for run in runs if run.line[1] is None or at is None or close(run.line[1], at)]
    by_budget = by_budget and len({run.budget for run in shown}) > 1
    found: dict[tuple[str, str | None], list[Simulated]] = {}
    for run in shown:
        found.setdefault((run.line[0], run.budget if by_budget else None), []).append(run)
    caches = {run.record["cache"] for run in shown} - {None}
    rules = {way(run.record, cache=False) for run in shown}
    lines = []
    for (_, budget), group in found.items():
        points = {(a, b) for run in group if (a := x(run)) is not None and (b := y(run)) is not None}
        record = group[0].record
        label = str(record["cache"]) if len(rules) == 1 < len(caches) else way(record, cache=len(caches) > 1)
        label += "" if budget is None else f", {budget}"
        if points:
            style = _style_of(record)
            lines.append(Line(label=label, method=record["method"], points=tuple(sorted(points)), style=style))
    return lines


_CACHE_STYLES = {"none": ":", "lru": "--", "lfu-decay": "-."}


def _style_of(record: Mapping[str, Any]) -> str:
    """What tells lines of one method apart."""
    if record["method"] in DENSE:
        return ":" if record["method"] == "dense-resident" else "--"
    weak = (record["method"] == "dip-ca" and record["gamma"] < 0.4) or (record.get("fetch") or 0) > 0.2
    return "--" if weak else _CACHE_STYLES.get(str(record["cache"]), "-")


def _drawn_models(sheets: Sequence[Sheet]) -> list[Sheet]:
    """What figures show: models with masks of their own, and the paper's; the tables have all."""
    real = [s for s in sheets if s.model == PAPER or kind_of_masks(simulated(s)) == "real masks"]
    return real or list(sheets[:1])


def _sweep_panel(sheet: Sheet, runs: Sequence[Simulated], lines: Sequence[Line], **axes: Any) -> Panel:
    at = _drawn_density(runs)
    about = [kind_of_masks(runs), *([] if at is None else [f"density {at:g}"])]
    return Panel(title=f"{sheet.title}\n{', '.join(about)}", lines=tuple(lines), **axes)


def _speed_table(sheet: Sheet, title: str, column: str, first: Callable[[Simulated], str]) -> Table:
    runs = simulated(sheet)
    places = {_place_told(run) for run in runs}
    rows = [
        [
            way(r), number(run.line[1], "{:g}"), *([_place_told(run)] if len(places) > 1 else []), first(run),
            number(r["tok_per_s"], "{:.3g}"), percent(r["hit_rate"], 1, signed=False),
            f"{r['flash_bytes_per_token'] / 1e6:.4g} MB", f"{r['reads_per_token']:,.0f}",
        ]
        for run in runs
        for r in (run.record,)
    ]  # fmt: skip
    columns = ["way to run", "density", *(["on"] if len(places) > 1 else []), column, "tok/s", "hits"]
    columns += ["flash a token", "reads a token"]
    return table(f"{sheet.title}: {title}", columns, [*rows, *_missing(sheet, "simulate", len(columns))])


def _place_told(run: Simulated) -> str:
    """Where, bandwidth aside, and with what budget if the cell has one."""
    words = [str(run.options.get("device", "")), _cost(run), f"{run.budget} in DRAM" if run.budget else ""]
    return ", ".join(word for word in words if word)


def _by_dram(runs: Sequence[Simulated]) -> tuple[list[Line], dict[str, Any]]:
    """Lines of tokens a second by DRAM, and their axes: in MB where nothing has a GB."""
    scale, unit = (1, "GB") if max((dram_gb(run.record) for run in runs), default=0) >= 1 else (1000, "MB")
    lines = _lines(runs, lambda run: scale * dram_gb(run.record), _tok_per_s)
    return lines, {"x": f"DRAM held, {unit}", "y": "tokens a second", "y_scale": "log"}


def _by_flash(runs: Sequence[Simulated]) -> tuple[list[Line], dict[str, Any]]:
    axes = {"x": "flash, GB/s", "x_scale": "log", "y": "tokens a second", "y_scale": "log"}
    return _lines(runs, _gbps, _tok_per_s, by_budget=True), axes


def _tok_per_s(run: Simulated) -> float:
    return float(run.record["tok_per_s"])


def _gbps(run: Simulated) -> float | None:
    value = run.options.get("flash_gbps")
    return None if value is None else float(value)


def _columns(panels: Sequence[Panel]) -> int:
    return {0: 1, 1: 1, 2: 2, 4: 2}.get(len(panels), 3)


def _by_place(
    sheets: Sequence[Sheet],
    of_place: Callable[[Simulated], str],
    described: Callable[[Sequence[Simulated]], tuple[list[Line], dict[str, Any]]],
) -> tuple[tuple[Panel, ...], int]:
    """A row of panels for each model, a panel for each place where it was simulated; and how many of them there are."""
    rows = []
    places = list(dict.fromkeys(of_place(run) for sheet in sheets for run in simulated(sheet)))
    for sheet in _drawn_models(sheets):
        row = []
        for place in places:
            runs = [run for run in simulated(sheet) if of_place(run) == place]
            lines, axes = described(runs)
            if lines:
                panel = _sweep_panel(sheet, runs, lines, **axes)
                row.append(replace(panel, title=f"{panel.title}{f', {place}' if place else ''}"))
        rows.append(row)
    panels = tuple(itertools.chain(*rows))
    whole = all(len(row) == len(places) for row in rows) and len(places) > 1
    return panels, len(places) if whole else _columns(panels)


def dram(sheets: Sequence[Sheet], book: Book) -> View:
    """Tokens a second by DRAM."""
    panels, columns = _by_place(sheets, lambda run: str(run.options["device"]), _by_dram)
    tables = [
        _speed_table(sheet, "tokens a second by DRAM", "DRAM", lambda run: memory(dram_gb(run.record)))
        for sheet in sheets
    ]
    return View(panels=panels, columns=columns, tables=tuple(tables))


def _cost(run: Simulated) -> str:
    cost = run.options.get("cost_per_read_us")
    return "" if cost is None else f"{cost:g} µs a read" if cost else "flat"


def bandwidth(sheets: Sequence[Sheet], book: Book) -> View:
    """Tokens a second by what the flash gives."""
    panels, columns = _by_place(sheets, _cost, _by_flash)
    tables = [
        _speed_table(sheet, "tokens a second by flash bandwidth", "flash", lambda run: number(_gbps(run), "{:g} GB/s"))
        for sheet in sheets
    ]
    return View(panels=panels, columns=columns, tables=tuple(tables))


def caches(sheets: Sequence[Sheet], book: Book) -> View:
    """Hits and tokens a second of the policies, by the share of the columns that is cached."""
    panels = []

    def cached(run: Simulated) -> float:
        return float(run.record["cached_fraction"])

    for sheet in _drawn_models(sheets):
        runs = [run for run in simulated(sheet) if run.record["cache"] is not None]
        hits = _lines(runs, cached, lambda run: run.record["hit_rate"])
        if hits:
            x = "columns cached"
            panels.append(_sweep_panel(sheet, runs, hits, x=x, y="hits", percent="xy"))
            speeds = _lines(runs, cached, _tok_per_s)
            panels.append(_sweep_panel(sheet, runs, speeds, x=x, y="tokens a second", y_scale="log", percent="x"))
    tables = [
        _speed_table(
            sheet, "policies", "columns cached", lambda run: percent(run.record["cached_fraction"], 1, signed=False)
        )
        for sheet in sheets
    ]
    return View(panels=tuple(panels), columns=2, tables=tuple(tables))


def cache_aware(sheets: Sequence[Sheet], book: Book) -> View:
    """What gamma buys in hits and tokens, and what it costs."""
    panels: dict[str, list[Panel]] = {"loss": [], "hits": [], "tok_per_s": []}
    tables = []
    for sheet in sheets:
        rows, found = _gamma_rows(sheet, book)
        for what, axes in _GAMMA_AXES.items():
            lines = [_gamma_line(at, points, what) for at, points in sorted(found.items())]
            lines = [line for line in lines if line.points]
            if lines:
                limits = _within(lines) if what == "loss" else None
                x: Any = {"x": "γ, weight of columns not cached", "x_limits": (1.05, 0.05)}
                panels[what].append(Panel(title=sheet.title, lines=tuple(lines), y_limits=limits, **x, **axes))
        columns = ["density", "γ", "cache", "perplexity above dense", "hits, scoring", "hits, simulated", "tok/s"]
        tables.append(table(f"{sheet.title}: γ and density", columns, rows))
    most = max(map(len, panels.values()))
    whole = [row for row in panels.values() if len(row) in (0, most)]  # each row of the figure has all models
    return View(panels=tuple(itertools.chain(*whole)), columns=max(1, most), tables=tuple(tables))


_GAMMA_AXES: dict[str, dict[str, Any]] = {
    "loss": {"y": "perplexity above dense", "y_scale": "log", "percent": "y"},
    "hits": {"y": "hits while scoring", "percent": "y"},
    "tok_per_s": {"y": "tokens a second, simulated"},
}


def _gamma_line(at: float, points: Mapping[float, Mapping[str, float]], what: str) -> Line:
    shown = tuple((gamma, found[what]) for gamma, found in sorted(points.items(), reverse=True) if what in found)
    return Line(label=f"density {at:g}", method="dip-ca", points=shown)


def _gamma_rows(sheet: Sheet, book: Book) -> tuple[list[list[str]], dict[float, dict[float, dict[str, float]]]]:
    """Rows by density, gamma and cache; what is drawn, of the largest group of caches, by density and gamma."""
    found: dict[tuple[float, float, float], dict[str, Any]] = {}
    for cell in sheet.of("perplexity"):
        plain, at = cell.options.get("method", {}), density_of(cell)
        if at is not None and plain.get("name") in ("dip", "dip-ca"):
            capacity = plain.get("capacity")
            key = (at, plain.get("gamma", 1.0), 0.5 if capacity is None else capacity)
            found[key] = {"measured": cell.result is not None, "loss": book.loss(sheet, cell)}
            found[key]["hits"] = None if cell.result is None else cell.result["hit_rate"]
    runs = [run for run in simulated(sheet) if run.record["density"] is not None]
    for run in runs:
        r = run.record
        given = run.options.get("capacity")
        shares = [given] if isinstance(given, (int, float)) else given or [r["cached_fraction"]]
        share = min(shares, key=lambda s: abs(s - r["cached_fraction"]))
        key = (round(r["density"], 2), 1.0 if r["gamma"] is None else r["gamma"], round(float(share), 3))
        found.setdefault(key, {"measured": True, "loss": None, "hits": None}).update(
            simulated=r["hit_rate"], tok_per_s=r["tok_per_s"]
        )
    rows = []
    drawn: dict[float, dict[float, dict[str, float]]] = {}
    shares_seen = [share for _, _, share in found]
    largest = max(set(shares_seen), key=lambda s: (shares_seen.count(s), s), default=None)
    for (at, gamma, share), row in sorted(found.items(), key=lambda item: (-item[0][0], -item[0][1], -item[0][2])):
        rows.append(
            [
                f"{at:g}", f"{gamma:g}", percent(share, signed=False), with_error(row["loss"], row["measured"]),
                percent(row["hits"], 1, signed=False), percent(row.get("simulated"), 1, signed=False),
                number(row.get("tok_per_s"), "{:.3g}"),
            ]
        )  # fmt: skip
        points = {
            "tok_per_s": row.get("tok_per_s"),
            "hits": row["hits"],
            "loss": None if row["loss"] is None else row["loss"][0],
        }
        if share == largest:
            drawn.setdefault(at, {})[gamma] = {name: value for name, value in points.items() if value is not None}
    rows += list(_missing(sheet, "simulate", 7))
    return rows, drawn


# ------------------------------------------------------------------------------------------------ headline


def headline(sheets: Sequence[Sheet], book: Book) -> View:
    """Memory and throughput against perplexity, beside dense streaming."""
    found = savings(sheets, book)
    curves: list[Panel] = []
    trades: list[Panel] = []
    for sheet in _drawn_models(sheets):
        runs = simulated(sheet)
        for place in dict.fromkeys(run.place for run in runs):
            here = [run for run in runs if run.place == place]
            traded = _trade_lines([s for s in found if s.model == sheet.model and s.place == place])
            lines, axes = _by_dram(here)
            about = f", {_cost(here[0])}" if _cost(here[0]) else ""
            if traded and not place[2]:  # a cost per read is in the table: figures have the published setting
                trades.append(_trade_panel(f"{sheet.title}\n{kind_of_masks(here)}{about}", traded))
            elif lines and not traded:
                panel = _sweep_panel(sheet, here, lines, **axes)
                curves.append(replace(panel, title=panel.title + about))
    panels = (*trades, *curves)
    beside = _savings_table(found)
    for sheet in sheets:
        beside["rows"] += [[sheet.title, *row] for row in _missing(sheet, "simulate", len(beside["columns"]) - 1)]
    tables = [_at_losses(found), beside, *(t for sheet in sheets if (t := _band_table(sheet))["rows"])]
    return View(panels=panels, columns=_columns(panels), tables=tuple(tables))


def _trade_panel(title: str, lines: Sequence[Line]) -> Panel:
    references = [Reference(y=1, label="dense-stream"), *(Reference(x=x, label=name) for name, x in LOSSES.items())]
    return Panel(
        title=title, x="perplexity above dense", y="throughput over dense streaming", lines=tuple(lines),
        x_scale="log", y_scale="log", percent="x", x_limits=_loss_limits(lines), references=tuple(references),
    )  # fmt: skip


def _band_table(sheet: Sheet) -> Table:
    """Simulated with single models' fits of the generator, in place of their mean."""
    rows = [
        [
            str(run.options["variant"]), way(run.record), number(run.line[1], "{:g}"), memory(dram_gb(run.record)),
            number(run.record["tok_per_s"], "{:.3g}"), percent(run.record["hit_rate"], 1, signed=False),
        ]
        for run in simulated(sheet, variants=True)
    ]  # fmt: skip
    columns = ["masks like those of", "way to run", "density", "DRAM", "tok/s", "hits"]
    return table(f"{sheet.title}: how much the generator matters", columns, rows)


def _loss_limits(lines: Iterable[Line]) -> tuple[float, float]:
    """Of the axis of losses: from what is noise to the worst that is not ruined."""
    most = max((x for line in lines for x, _ in line.points if x <= RUINED), default=1.0)
    return LOSS_TICKS[0], max(0.2, 1.3 * most)


def _trade_lines(found: Sequence[Saving]) -> list[Line]:
    """Throughput over dense streaming, median over DRAM, against the loss: a line a way to run."""
    by_way: dict[str, list[Saving]] = {}
    for saving in found:
        if saving.loss is not None and saving.loss[0] > 0 and saving.gains and saving.cache != "belady":
            by_way.setdefault(saving.way, []).append(saving)
    lines = []
    for name, group in by_way.items():
        points = sorted((s.loss[0], 1 + s.gain) for s in group if s.loss is not None)
        style = "--" if "γ 0.2" in name else ":" if name.endswith("lru") else "-"
        label = name.removesuffix(" lfu")
        lines.append(Line(label=label, method=group[0].method, points=tuple(points), style=style))
    return lines


def gain_told(saving: Saving) -> str:
    """Median over DRAM, least and most."""
    least, most = min(saving.gains.values()), max(saving.gains.values())
    if len(saving.gains) == 1:
        return percent(saving.gain)
    return f"{percent(saving.gain)} ({number(100 * least, '{:+.0f}')} to {percent(most)})"


def _at_losses(found: Sequence[Saving]) -> Table:
    rows, unknown = [], []
    for model in dict.fromkeys(s.model for s in found):
        mine = [s for s in found if s.model == model]
        if not any(s.loss for s in mine):
            unknown.append(mine[0].title)
            continue
        for place in dict.fromkeys(s.place for s in mine):
            here = [s for s in mine if s.place == place]
            row = [here[0].title, _place(place)]
            for limit in LOSSES.values():
                best = at_loss(here, limit)
                row.append("none loses so little" if best is None else f"{gain_told(best)}: {best.setting}")
            rows.append(row)
    if unknown:
        rows.append([", ".join(unknown), NONE, *([f"perplexity {NOT_MEASURED}"] * len(LOSSES))])
    names = [f"{name} of 4.3, here {percent(share, 1)}" for name, share in LOSSES.items()]
    title = "Throughput over dense streaming at equal DRAM (median, least to most over DRAM) of the best setting that "
    return table(title + "loses at most so much perplexity", ["model", "on", *names], rows)


def _place(place: tuple[Any, ...]) -> str:
    device, gbps, cost, alignment = place
    words = [str(device)] if device else []
    words += [] if gbps is None else [f"{gbps:g} GB/s"]
    words += [] if cost is None else [f"{cost:g} µs a read" if cost else "flat"]
    words += [] if not alignment or alignment == 1 else [f"{alignment} B aligned"]
    return ", ".join(words) or "as it is"


def _savings_table(found: Sequence[Saving]) -> Table:
    rows = [
        [
            s.title, _place(s.place), s.way, number(s.density, "{:g}"), with_error(s.loss, measured=False),
            gain_told(s) if s.gains else NONE, percent(s.dram_saved, signed=False),
            percent(s.mlp_dram_saved, signed=False),
        ]
        for s in found
    ]  # fmt: skip
    columns = [
        "model", "on", "way to run", "density", "perplexity above dense", "throughput over dense, equal DRAM",
        "DRAM saved, equal tok/s", "of the MLP's",
    ]  # fmt: skip
    return table("Beside dense streaming", columns, rows)


# ------------------------------------------------------------------------------------------------ compensation


def compensation(sheets: Sequence[Sheet], book: Book) -> View:
    """Perplexity without and with LoRA under the masks."""
    panels, tables = [], []
    for sheet in sheets:
        cells: dict[str, Any] = {}
        for cell in sheet.of("compensation"):
            cells |= cell.result["cells"] if cell.result is not None else {}
        pairs = [
            (name, cells[name], cells[f"{name} + lora"])
            for name in cells
            if "wikitext" in cells[name] and f"{name} + lora" in cells
        ]
        if pairs and "dense" in cells:
            panels.append(_dumbbells(sheet, cells, pairs))
        tables += _compensation_tables(sheet, cells)
    return View(panels=tuple(panels), columns=_columns(panels), tables=tuple(tables))


def _dumbbells(sheet: Sheet, cells: Mapping[str, Any], pairs: Sequence[tuple[str, Any, Any]]) -> Panel:
    lines, most = [], (1 + RUINED) * cells["dense"]["wikitext"]["perplexity"]
    for i, (_, without, with_lora) in enumerate(pairs):
        ends = ((without["wikitext"]["perplexity"], float(i)), (with_lora["wikitext"]["perplexity"], float(i)))
        lines.append(Line(label="", method=without["method"]["name"], points=ends, hollow="first"))
    dense = cells["dense"]["wikitext"]["perplexity"]
    shown = max(x for line in lines for x, _ in line.points)
    return Panel(
        title=f"{sheet.title}\nhollow: without, filled: with LoRA", x="perplexity of WikiText-2", lines=tuple(lines),
        x_scale="log", rows=tuple(name.replace("@", ", ") for name, *_ in pairs),
        references=(Reference(x=dense, label="dense"),), x_limits=(0.96 * dense, min(1.1 * shown, most)),
    )  # fmt: skip


def _compensation_tables(sheet: Sheet, cells: Mapping[str, Any]) -> list[Table]:
    columns = ["setting", "WikiText-2", "brought back", "C4", "brought back", "held beside the model"]
    scored = {name: cell for name, cell in cells.items() if "wikitext" in cell}
    rows = []
    for name, cell in scored.items():
        row = [name]
        for text in ("wikitext", "c4"):
            found = cell[text]
            back = found.get("recovered")
            bar = "" if found.get("recovered_stderr") is None else f" ± {100 * found['recovered_stderr']:.1f}"
            row += [f"{found['perplexity']:.2f}", NONE if back is None else f"{100 * back:.0f}{bar} %"]
        rows.append([*row, memory(cell.get("extra_bytes", 0) / 1e9) if cell.get("extra_bytes") else NONE])
    rows += list(_missing(sheet, "compensation", len(columns)))
    tables = [table(f"{sheet.title}: perplexity, and the share of the loss that came back", columns, rows)]
    answered = {name: cell["tasks"] for name, cell in cells.items() if "tasks" in cell}
    if answered:
        tasks = list(dict.fromkeys(task for found in answered.values() for task in found))
        answers = []
        for name, found in answered.items():
            mean, error = _mean_answers({"tasks": found})
            shares = [_share(found[task]) if task in found else NONE for task in tasks]
            answers.append([name.removeprefix("tasks: "), *shares, f"{100 * mean:.1f} ± {100 * error:.1f}"])
        tables.append(table(f"{sheet.title}: right answers, %", ["setting", *tasks, "mean"], answers))
    return tables


# ------------------------------------------------------------------------------------------------ beyond


def beyond(sheets: Sequence[Sheet], book: Book) -> View:
    """Cost per read, planes, and what was measured on a disk: a row each, a column a model."""
    rows = [[panel for sheet in sheets for panel in part(sheet, book)] for part in _PARTS]
    tables: list[Table] = []
    for sheet in sheets:
        if sheet.of("simulate"):
            tables.append(_speed_table(sheet, "simulated", "DRAM", lambda run: memory(dram_gb(run.record))))
        if sheet.of("perplexity"):
            tables.append(_planes_table(sheet, book))
        tables += _bench_tables(sheet)
    panels = tuple(itertools.chain(*rows))
    return View(panels=panels, columns=min(3, max(1, *map(len, rows))), tables=tuple(tables))


def _cost_panels(sheet: Sheet, _: Book) -> list[Panel]:
    """Throughput over dense streaming with the same cost per read and DRAM, in the middle of the budgets."""
    runs = [run for run in simulated(sheet) if run.options.get("cost_per_read_us") is not None]
    dense: dict[float, list[dict[str, Any]]] = {}
    for run in runs:
        if run.record["method"] == "dense-stream":
            dense.setdefault(run.options["cost_per_read_us"], []).append(run.record)

    def ratio(run: Simulated) -> float | None:
        budgets = sorted(dense.get(run.options["cost_per_read_us"], []), key=dram_gb)
        same = nearest_dense(run.record, budgets)
        if same is None or same is not budgets[len(budgets) // 2]:
            return None
        return float(run.record["tok_per_s"] / same["tok_per_s"])

    shown = [run for run in runs if run.record["method"] not in DENSE and ratio(run) is not None]
    lines = _lines(shown, lambda run: float(run.options["cost_per_read_us"]), ratio)
    if not lines:
        return []
    axes: dict[str, Any] = {"x": "cost of a read, µs", "y": "throughput over dense streaming", "y_scale": "log"}
    return [_sweep_panel(sheet, shown, lines, references=(Reference(y=1, label="dense-stream"),), **axes)]


def _planes_panels(sheet: Sheet, book: Book) -> list[Panel]:
    """Loss of planes and of what they are compared with."""
    found: dict[str, list[Measured]] = {}
    for cell in sheet.of("perplexity"):
        if density_of(cell) is not None:
            found.setdefault(rule(cell.options), []).append(cell)
    styles = ("-", "-", "--", ":", "-.") * len(found)
    lines = [
        _loss_line(book, sheet, name, cells, label=_planes_label(cells[0].options["method"]), style=style)
        for (name, cells), style in zip(found.items(), styles, strict=False)
    ]
    lines = [line for line in lines if line.points]
    if not lines:
        return []
    x = [x for line in lines for x, _ in line.points]
    panel = _loss_panel(f"{sheet.title}\nplanes by base bits, beside dip", lines)
    return [replace(panel, x_limits=(max(x) + 0.02, min(x) - 0.02), y_limits=_within(lines))]


def _planes_label(method: Mapping[str, Any]) -> str:
    """Base bits of input and GLU columns, whether units are fetched, and whether a token late."""
    if method["name"] != "planes":
        return str(method["name"])
    words = [told(method.get("base_bits", "planes"))]
    words += ["units"] if "unit_bytes" in method else []
    words += ["late"] if method.get("deferred") else []
    return " ".join(words)


def _planes_table(sheet: Sheet, book: Book) -> Table:
    rows = [
        [
            rule(cell.options), number(density_of(cell)),
            with_error(book.loss(sheet, cell), cell.result is not None),
            number(None if cell.result is None else cell.result["mlp_bits_per_weight"]),
        ]
        for cell in sheet.of("perplexity")
        if cell.result is None or cell.result["method"] not in DENSE
    ]  # fmt: skip
    columns = ["rule", "density", "perplexity above dense", "bits held a weight"]
    return table(f"{sheet.title}: perplexity", columns, rows)


def _benchmarks(sheet: Sheet) -> Iterator[tuple[Measured, list[dict[str, Any]]]]:
    """Benchmarks and the rows of their result."""
    for cell in sheet.of("benchmark"):
        found = (cell.result or {}).get("results") or (cell.result or {}).get("rows") or []
        yield cell, [row for row in found if isinstance(row, dict)]


def _accuracy_panels(sheet: Sheet, _: Book) -> list[Panel]:
    """Of `bench_simulator.py`: on the held disk if it was measured there, which drifts less."""
    found = [(not _held(cell), rows) for cell, rows in _benchmarks(sheet) if rows and "predicted" in rows[0]]
    if not found:
        return []
    as_it_is, rows = min(found, key=lambda one: one[0])
    return [
        _accuracy_panel(f"{sheet.title}\nsimulated and measured, {'disk as it is' if as_it_is else 'held disk'}", rows)
    ]


def _ratio_panels(sheet: Sheet, _: Book) -> list[Panel]:
    """Of `bench_planes.py`, on every disk."""
    shown = [
        (f"{_bench_way(row)}, {'held disk' if _held(cell) else 'as it is'}", row["method"], float(row["r"]))
        for cell, rows in _benchmarks(sheet)
        for row in rows
        if row.get("r") is not None and row["method"] not in DENSE
    ]
    if not shown:
        return []
    return [
        Panel(
            title=f"{sheet.title}\nmeasured, equal DRAM", x="throughput over dense streaming",
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


def _held(cell: Measured) -> bool:
    return "--held" in cell.options.get("arguments", ()) or bool((cell.result or {}).get("held"))


def _bench_way(row: Mapping[str, Any]) -> str:
    """A setting of `bench_planes.py` in words."""
    words = [str(row["method"])]
    if row.get("fetch") is not None:
        words.append(f"{percent(row['fetch'], signed=False)} : {percent(row.get('fetch_glu'), signed=False)}")
    for name in ("density", "gamma"):
        if row.get(name) is not None:
            words.append(f"{name} {row[name]:g}")
    words += ["in runs"] if row.get("read_cost") else []
    return f"{' '.join(words)}, {row['budget']}"


_HIDDEN = ("model", "ok", "ledger_ms", "predicted_ms", "sustained_ms", "profiles")


def _bench_tables(sheet: Sheet) -> list[Table]:
    tables, missing = [], []
    for cell, rows in _benchmarks(sheet):
        script = str(cell.options["script"]).removesuffix(".py")
        name = f"{script}, {'held disk' if _held(cell) else 'disk as it is'}"
        if cell.result is None:
            missing.append([name, NOT_MEASURED])
            continue
        columns = [
            column
            for column in dict.fromkeys(column for row in rows for column in row)
            if column not in _HIDDEN and any(row.get(column) not in (None, "") for row in rows)
        ]
        shown = [[_bench_value(column, row.get(column)) for column in columns] for row in rows]
        tables.append(table(f"{sheet.title}: {name}", [column.replace("_", " ") for column in columns], shown))
    return [*tables, *([table(f"{sheet.title}: on a disk", ["benchmark", "result"], missing)] if missing else [])]


def _bench_value(column: str, value: Any) -> str:
    if value is None or value == "":
        return NONE
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        if column.endswith("bytes_per_token"):
            return f"{value / 1e6:.4g} MB"
        return percent(value, 1) if column in _SHARES else number(value, "{:.4g}")
    return str(value)


_SHARES = ("error", "relative", "relative_stderr")


_PARTS = (_cost_panels, _planes_panels, _accuracy_panels, _ratio_panels)


# ------------------------------------------------------------------------------------------------ all of them

VIEWS: dict[str, Callable[[Sequence[Sheet], Book], View]] = {
    "density": density,
    "headline": headline,
    "dram": dram,
    "bandwidth": bandwidth,
    "caches": caches,
    "cache_aware": cache_aware,
    "compensation": compensation,
    "split": split,
    "thresholds": thresholds,
    "beyond": beyond,
}


def shown(book: Book, experiment: str) -> View:
    """An experiment as it is shown.

    Raises:
        ConfigError: its configuration names a view that does not exist.
    """
    name = book.experiments[experiment].view.replace("-", "_")
    if name not in VIEWS:
        raise ConfigError(f"experiment {experiment} is to be shown as '{name}', known are {', '.join(sorted(VIEWS))}")
    return VIEWS[name](book.sheets(experiment), book)


def draw_all(folder: str | os.PathLike[str], book: Book | None = None) -> dict[str, Path]:
    """Draws `figures/NAME.svg` of every experiment that has results.

    Args:
        folder: of experiments.
        book: its results, where they were read already.

    Returns:
        Figures by experiment.

    Raises:
        ConfigError: as `Book.open`, or matplotlib is missing.
    """
    book = book or Book.open(folder)
    figures = Path(folder) / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    drawn = {}
    for name in book.experiments:
        view = shown(book, name)
        if view.panels:
            drawn[name] = figures / f"{name}.svg"
            draw(view.panels, drawn[name], columns=view.columns)
    return drawn
