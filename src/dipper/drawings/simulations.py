"""What a device makes of it: the experiments dram, bandwidth, caches and cache-aware."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from dipper.drawings.view import View, loss_limits, missing_rows, n_columns
from dipper.figures import Line, Panel
from dipper.savings import PAPER, Simulated, kind_of_masks, simulated
from dipper.sheets import (
    DENSE,
    NONE,
    Book,
    Sheet,
    Table,
    close,
    density_of,
    dram_gb,
    memory,
    number,
    percent,
    table,
    way,
    with_error,
)

__all__ = [
    "bandwidth",
    "by_dram",
    "cache_aware",
    "caches",
    "dram",
    "drawn_models",
    "speed_table",
    "sweep_lines",
    "sweep_panel",
]


def _drawn_density(runs: Iterable[Simulated]) -> float | None:
    """The density that figures show: the one nearest to 0.7, where a model still works without training."""
    found = {run.line[1] for run in runs if run.line[1] is not None}
    return min(found, key=lambda d: abs(d - 0.7), default=None)


def sweep_lines(
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
    if record.get("read_cost") is not None:
        return ":" if (record.get("fetch") or 0) <= 0.2 else "-."
    weak = (record["method"] == "dip-ca" and record["gamma"] < 0.4) or (record.get("fetch") or 0) > 0.2
    return "--" if weak else _CACHE_STYLES.get(str(record["cache"]), "-")


def drawn_models(sheets: Sequence[Sheet]) -> list[Sheet]:
    """What figures show: models with masks of their own, and the paper's; the tables have all."""
    real = [s for s in sheets if s.model == PAPER or kind_of_masks(simulated(s)) == "real masks"]
    return real or list(sheets[:1])


def sweep_panel(sheet: Sheet, runs: Sequence[Simulated], lines: Sequence[Line], **axes: Any) -> Panel:
    """Lines of a model, titled by its masks and the density that they are at."""
    at = _drawn_density(runs)
    about = [kind_of_masks(runs), *([] if at is None else [f"density {at:g}"])]
    return Panel(title=f"{sheet.marked}\n{', '.join(about)}", lines=tuple(lines), **axes)


def speed_table(sheet: Sheet, title: str, column: str, first: Callable[[Simulated], str]) -> Table:
    """All that was simulated of a model; `first`, headed `column`, says what was varied."""
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
    rows += [*_skipped_rows(sheet, len(columns)), *missing_rows(sheet, "simulate", len(columns))]
    return table(f"{sheet.marked}: {title}", columns, rows)


def _skipped_rows(sheet: Sheet, n_columns: int) -> Iterator[list[str]]:
    """One row for all settings that their budget does not hold, with the budgets."""
    told = [why for cell in sheet.of("simulate") if cell.result is not None for why in cell.result["skipped"]]
    budgets = dict.fromkeys(found[1] for why in told if (found := re.search(r"dram ([^\s:]+)", why)))
    if told:
        at = f" at {', '.join(budgets)}" if budgets else ""
        n = f"{len(told)} settings{at} do" if len(told) > 1 else f"1 setting{at} does"
        yield [f"{n} not fit", *([NONE] * (n_columns - 1))]


def _place_told(run: Simulated) -> str:
    """Where, bandwidth aside, and with what budget if the cell has one."""
    return run.place._replace(flash_gbps=None).told + (f", {run.budget} in DRAM" if run.budget else "")


def by_dram(runs: Sequence[Simulated]) -> tuple[list[Line], dict[str, Any]]:
    """Lines of tokens a second by DRAM, and their axes: in MB where nothing has a GB."""
    scale, unit = (1, "GB") if max((dram_gb(run.record) for run in runs), default=0) >= 1 else (1000, "MB")
    lines = sweep_lines(runs, lambda run: scale * dram_gb(run.record), _tok_per_s)
    return lines, {"x": f"DRAM held, {unit}", "y": "tokens a second", "y_scale": "log"}


def _by_flash(runs: Sequence[Simulated]) -> tuple[list[Line], dict[str, Any]]:
    axes = {"x": "flash, GB/s", "x_scale": "log", "y": "tokens a second", "y_scale": "log"}
    return sweep_lines(runs, _gbps, _tok_per_s, by_budget=True), axes


def _tok_per_s(run: Simulated) -> float:
    return float(run.record["tok_per_s"])


def _gbps(run: Simulated) -> float | None:
    return None if run.place.flash_gbps is None else float(run.place.flash_gbps)


def _by_place(
    sheets: Sequence[Sheet],
    of_place: Callable[[Simulated], str],
    described: Callable[[Sequence[Simulated]], tuple[list[Line], dict[str, Any]]],
) -> tuple[tuple[Panel, ...], int]:
    """A row of panels for each model, a panel for each place where it was simulated; and how many of them there are."""
    rows = []
    places = list(dict.fromkeys(of_place(run) for sheet in sheets for run in simulated(sheet)))
    for sheet in drawn_models(sheets):
        row = []
        for place in places:
            runs = [run for run in simulated(sheet) if of_place(run) == place]
            lines, axes = described(runs)
            if lines:
                panel = sweep_panel(sheet, runs, lines, **axes)
                row.append(replace(panel, title=f"{panel.title}{f', {place}' if place else ''}"))
        rows.append(row)
    panels = tuple(itertools.chain(*rows))
    whole = all(len(row) == len(places) for row in rows) and len(places) > 1
    return panels, len(places) if whole else n_columns(panels)


def dram(sheets: Sequence[Sheet], book: Book) -> View:
    """Tokens a second by DRAM."""
    panels, columns = _by_place(sheets, lambda run: str(run.options["device"]), by_dram)
    tables = [
        speed_table(sheet, "tokens a second by DRAM", "DRAM", lambda run: memory(dram_gb(run.record)))
        for sheet in sheets
    ]
    return View(panels=panels, columns=columns, tables=tuple(tables))


def bandwidth(sheets: Sequence[Sheet], book: Book) -> View:
    """Tokens a second by what the flash gives."""
    panels, columns = _by_place(sheets, lambda run: run.place.cost, _by_flash)
    tables = [
        speed_table(sheet, "tokens a second by flash bandwidth", "flash", lambda run: number(_gbps(run), "{:g} GB/s"))
        for sheet in sheets
    ]
    return View(panels=panels, columns=columns, tables=tuple(tables))


def caches(sheets: Sequence[Sheet], book: Book) -> View:
    """Hits and tokens a second of the policies, by the share of the columns that is cached."""
    panels = []

    def cached(run: Simulated) -> float:
        return float(run.record["cached_fraction"])

    for sheet in drawn_models(sheets):
        runs = [run for run in simulated(sheet) if run.record["cache"] is not None]
        hits = sweep_lines(runs, cached, lambda run: run.record["hit_rate"])
        if hits:
            x = "columns cached"
            panels.append(sweep_panel(sheet, runs, hits, x=x, y="hits", percent="xy"))
            speeds = sweep_lines(runs, cached, _tok_per_s)
            panels.append(sweep_panel(sheet, runs, speeds, x=x, y="tokens a second", y_scale="log", percent="x"))
    tables = [
        speed_table(
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
                limits = loss_limits(lines) if what == "loss" else None
                x: Any = {"x": "γ, weight of columns not cached", "x_limits": (1.05, 0.05)}
                panels[what].append(Panel(title=sheet.marked, lines=tuple(lines), y_limits=limits, **x, **axes))
        columns = ["density", "γ", "cache", "perplexity above dense", "hits, scoring", "hits, simulated", "tok/s"]
        tables.append(table(f"{sheet.marked}: γ and density", columns, rows))
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
    rows += list(missing_rows(sheet, "simulate", 7))
    return rows, drawn
