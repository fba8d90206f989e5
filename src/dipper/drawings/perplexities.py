"""What pruning costs, by rule, split and way to select: the experiments density, split and thresholds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dipper.drawings.view import View, loss_limits, loss_line, loss_panel, mean_answers, right_answers
from dipper.figures import Line, Panel, Reference
from dipper.sheets import (
    DENSE,
    NONE,
    NOT_MEASURED,
    Book,
    Measured,
    Sheet,
    Table,
    density_of,
    number,
    rule,
    table,
    with_error,
)

__all__ = ["density", "split", "thresholds"]


# What the figure of all rules shows of them; the table has them all.
_SHOWN: tuple[dict[str, Any], ...] = (
    {"name": "glu-oracle"},
    {"name": "teal"},
    {"name": "dip", "fitted": True},
    {"name": "dip"},
    {"name": "dip-ca", "gamma": 0.5, "capacity": 0.5},
    {"name": "gate"},
    {"name": "up"},
)


def density(sheets: Sequence[Sheet], book: Book) -> View:
    """Loss and right answers of every rule by density."""
    panels = [
        loss_panel(
            sheet.marked,
            [loss_line(book, sheet, rule(cells[0].options, cache=False), cells) for cells in _by_rule(sheet)],
        )
        for sheet in sheets
        if any(cell.result for cell in sheet.of("perplexity"))
    ]
    answered = [_answers_panel(sheet) for sheet in sheets if any(cell.result for cell in sheet.of("tasks"))]
    tables = [_loss_table(book, sheet) for sheet in sheets if sheet.of("perplexity")]
    tables += [_answers_table(sheet) for sheet in sheets if sheet.of("tasks")]
    return View(panels=(*panels, *answered), columns=max(len(panels), len(answered), 1), tables=tuple(tables))


def _by_rule(sheet: Sheet) -> list[list[Measured]]:
    """Cells of the rules that the figure shows, in its order."""
    found: dict[int, list[Measured]] = {}
    for cell in sheet.of("perplexity"):
        if (at := _shown_at(cell)) is not None:
            found.setdefault(at, []).append(cell)
    return [found[at] for at in sorted(found)]


def _shown_at(cell: Measured) -> int | None:
    """Where a cell's rule is among those that figures show; None: it is not."""
    options = {name: value for name, value in cell.options.get("method", {}).items() if name != "density"}
    options |= {"fitted": True} if "fit" in cell.options else {}
    return _SHOWN.index(options) if options in _SHOWN else None


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
        f"{sheet.marked}: perplexity above dense ({scored}), by density", ["rule", *(f"{d:g}" for d in densities)], rows
    )


def _answers_panel(sheet: Sheet) -> Panel:
    by_rule: dict[int, list[tuple[float, float, float]]] = {}
    options: dict[int, Mapping[str, Any]] = {}
    references = []
    for cell in (c for c in sheet.of("tasks") if c.result is not None):
        assert cell.result is not None
        mean, error = mean_answers(cell.result)
        place, at = _shown_at(cell), density_of(cell)
        if at is None:
            references.append(Reference(y=mean, label="dense"))
        elif place is not None:
            by_rule.setdefault(place, []).append((at, mean, error))
            options[place] = cell.options
    lines = []
    for place in sorted(by_rule):
        points = sorted(by_rule[place], reverse=True)
        lines.append(
            Line(
                label=rule(options[place], cache=False), method=options[place]["method"]["name"],
                points=tuple((x, y) for x, y, _ in points), errors=tuple(error for *_, error in points),
            )
        )  # fmt: skip
    return Panel(
        title=sheet.marked, x="density", y="right answers, mean of tasks", lines=tuple(lines), percent="xy",
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
            row.append(NONE if task is None else right_answers(task))
        mean, error = mean_answers(cell.result)
        rows.append([*row, f"{100 * mean:.1f} ± {100 * error:.1f}"])
    limit = next((cell.options["limit"] for cell in cells if cell.options.get("limit")), None)
    items = "all items" if limit is None else f"{limit} items each"
    return table(f"{sheet.marked}: right answers, % ({items})", ["rule", "density", *names, "mean"], rows)


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
                f"{sheet.marked}: perplexity above dense, by split",
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
                    title=sheet.marked, x="density of inputs, d_in", y="perplexity above dense", lines=tuple(lines),
                    y_scale="log", percent="xy", y_limits=loss_limits(lines),
                )
            )  # fmt: skip
    return View(panels=tuple(panels), columns=max(1, len(panels)), tables=tuple(tables))


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
            loss_line(book, sheet, f"{name}, {how}", cells, style=_SELECT_STYLES.get(how, "-."))
            for (name, how), cells in found.items()
        ]
        panels.append(loss_panel(sheet.marked, lines))
        rows = []
        for (name, how), cells in found.items():
            for cell in cells:
                touched = None if cell.result is None else cell.result["touched"]
                loss = with_error(book.loss(sheet, cell), cell.result is not None)
                rows.append([name, how, number(density_of(cell)), number(touched, "{:.3f}"), loss])
        tables.append(
            table(
                f"{sheet.marked}: perplexity above dense, by how columns are selected",
                ["rule", "select", "density asked", "touched", "perplexity above dense"],
                rows,
            )
        )
    kept = tuple(panel for panel in panels if panel.lines)
    return View(panels=kept, columns=max(1, len(kept)), tables=tuple(tables))
