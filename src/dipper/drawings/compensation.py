"""What LoRA brings back under the masks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dipper.drawings.view import View, mean_answers, missing_rows, n_columns, right_answers
from dipper.figures import Line, Panel, Reference
from dipper.sheets import (
    NONE,
    RUINED,
    Book,
    Sheet,
    Table,
    memory,
    table,
)

__all__ = ["compensation"]


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
    return View(panels=tuple(panels), columns=n_columns(panels), tables=tuple(tables))


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
    rows += list(missing_rows(sheet, "compensation", len(columns)))
    tables = [table(f"{sheet.title}: perplexity, and the share of the loss that came back", columns, rows)]
    answered = {name: cell["tasks"] for name, cell in cells.items() if "tasks" in cell}
    if answered:
        tasks = list(dict.fromkeys(task for found in answered.values() for task in found))
        answers = []
        for name, found in answered.items():
            mean, error = mean_answers({"tasks": found})
            shares = [right_answers(found[task]) if task in found else NONE for task in tasks]
            answers.append([name.removeprefix("tasks: "), *shares, f"{100 * mean:.1f} ± {100 * error:.1f}"])
        tables.append(table(f"{sheet.title}: right answers, %", ["setting", *tasks, "mean"], answers))
    return tables
