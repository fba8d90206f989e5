"""What LoRA brings back under the masks."""

from __future__ import annotations

import math
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


_TEXTS = ("wikitext", "c4")


def _has_caches(name: str) -> bool:
    return name.startswith("dip-ca@")


def _first_windows(cell: Mapping[str, Any], n_windows: Mapping[str, int]) -> dict[str, Any]:
    """A scored cell as it would be had it seen so many windows; what came back is known of the whole texts alone."""
    told: dict[str, Any] = {name: value for name, value in cell.items() if name not in _TEXTS}
    for text, n in n_windows.items():
        nll, n_tokens = (sum(cell[text][name][:n]) for name in ("window_nll", "window_tokens"))
        told[text] = {"perplexity": math.exp(nll / n_tokens)}
    return told


def _compensation_row(name: str, cell: Mapping[str, Any]) -> list[str]:
    row = [name]
    for text in _TEXTS:
        found = cell[text]
        back = found.get("recovered")
        bar = "" if found.get("recovered_stderr") is None else f" ± {100 * found['recovered_stderr']:.1f}"
        row += [f"{found['perplexity']:.2f}", NONE if back is None else f"{100 * back:.0f}{bar} %"]
    held = cell.get("extra_bytes", 0) + cell.get("held_beside_bytes", 0)
    return [*row, memory(held / 1e9) if held else NONE]


def _compensation_tables(sheet: Sheet, cells: Mapping[str, Any]) -> list[Table]:
    scored = {name: cell for name, cell in cells.items() if "wikitext" in cell}
    # Rules with column caches are scored on the first windows alone: no perplexity beside those of whole texts.
    whole = {name: cell for name, cell in scored.items() if not _has_caches(name)}
    columns = ["setting", "WikiText-2", "brought back", "C4", "brought back", "held beside the model"]
    rows = [_compensation_row(name, cell) for name, cell in whole.items()]
    rows += list(missing_rows(sheet, "compensation", len(columns)))
    tables = [table(f"{sheet.title}: perplexity, and the share of the loss that came back", columns, rows)]
    cached = {name: cell for name, cell in scored.items() if _has_caches(name)}
    if cached:
        first = next(iter(cached.values()))
        n_windows = {text: len(first[text]["window_nll"]) for text in _TEXTS}
        density = first["method"]["density"]
        beside = ("dense", f"dip@{density}", f"dip@{density} + lora")
        shown = {name: _first_windows(whole[name], n_windows) for name in beside if name in whole} | cached
        n_tokens = " and ".join(f"{first[text]['n_tokens']:,}" for text in _TEXTS)
        title = f"{sheet.title}: with column caches, the first {n_tokens} tokens of WikiText-2 and C4"
        tables.append(table(title, columns, [_compensation_row(name, cell) for name, cell in shown.items()]))
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
