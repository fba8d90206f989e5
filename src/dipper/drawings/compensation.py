"""What LoRA brings back under the masks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dipper.drawings.view import View, mean_answers, missing_rows, n_columns, right_answers
from dipper.evaluate import recovered
from dipper.figures import Line, Panel, Reference
from dipper.sheets import NONE, RUINED, Book, Sheet, Table, loss_against, memory, table, with_error

__all__ = ["compensation"]


def compensation(sheets: Sequence[Sheet], book: Book) -> View:
    """Perplexity without and with LoRA under the masks."""
    panels: list[Panel] = []
    tables: list[Table] = []
    for sheet in sheets:
        cells: dict[str, Any] = {}
        for cell in sheet.of("compensation"):
            cells |= cell.result["cells"] if cell.result is not None else {}
        pairs = [
            (name, cells[name], cells[name + _LORA])
            for name in cells
            if "wikitext" in cells[name] and name + _LORA in cells
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
        title=f"{sheet.marked}\nhollow: without, filled: with LoRA", x="perplexity of WikiText-2", lines=tuple(lines),
        x_scale="log", rows=tuple(name.replace("@", ", ") for name, *_ in pairs),
        references=(Reference(x=dense, label="dense"),), x_limits=(0.96 * dense, min(1.1 * shown, most)),
    )  # fmt: skip


_TEXTS = ("wikitext", "c4")
_LORA = " + lora"


def _compensation_row(name: str, cell: Mapping[str, Any], apart: float = 0.0) -> list[str]:
    """apart: bytes of an adapter that is not merged, beside what the cell says of itself."""
    row = [name]
    for text in _TEXTS:
        found = cell[text]
        back = found.get("recovered")
        bar = "" if found.get("recovered_stderr") is None else f" ± {100 * found['recovered_stderr']:.1f}"
        row += [f"{found['perplexity']:.2f}", NONE if back is None else f"{100 * back:.0f}{bar} %"]
    held = cell.get("extra_bytes", 0) + cell.get("held_beside_bytes", 0) + apart
    return [*row, memory(held / 1e9) if held else NONE]


_COLUMNS = ("setting", "WikiText-2", "brought back", "C4", "brought back", "held beside the model")


def _compensation_tables(sheet: Sheet, cells: Mapping[str, Any]) -> Iterator[Table]:
    scored = {name: cell for name, cell in cells.items() if "wikitext" in cell}
    # Rules with column caches are scored on the first windows alone: no perplexity beside those of whole texts.
    cached = {name: cell for name, cell in scored.items() if name.startswith("dip-ca@")}
    whole = {name: cell for name, cell in scored.items() if name not in cached}
    # All adapters have one size. Those of planes cannot be merged: the weights would have to be split anew.
    adapter = scored.get("resident: lora, apart", {}).get("held_beside_bytes", 0.0)
    apart = {name: adapter for name in whole if name.startswith("planes@") and name.endswith(_LORA)}
    rows = [_compensation_row(name, cell, apart.get(name, 0.0)) for name, cell in whole.items()]
    rows += list(missing_rows(sheet, "compensation", len(_COLUMNS)))
    yield table(f"{sheet.marked}: perplexity, and the share of the loss that came back", _COLUMNS, rows)
    if cached:
        yield _cached_table(sheet, cached, whole)
    changes = [
        [name, other, *(with_error(loss_against(scored[name][t], scored[other][t])) for t in _TEXTS)]
        for name, other in _pairs(scored)
    ]
    if changes:
        title = f"{sheet.marked}: how much higher a perplexity is than another's, on the same windows"
        yield table(title, ("setting", "against", "WikiText-2", "C4"), changes)
    answered = {name.removeprefix("tasks: "): cell["tasks"] for name, cell in cells.items() if "tasks" in cell}
    if answered:
        yield _answers_table(sheet, answered)


def _cached_table(sheet: Sheet, cached: Mapping[str, Any], whole: Mapping[str, Any]) -> Table:
    """Rules with column caches, beside dense and dip on the windows that those have seen."""
    first = next(iter(cached.values()))
    n_windows = {text: len(first[text]["window_nll"]) for text in _TEXTS}
    dense, dip = whole.get("dense"), f"dip@{first['method']['density']}"
    shown = {name: _first_windows(whole[name], n_windows) for name in ("dense", dip) if name in whole}
    if dense is not None and dip in whole and dip + _LORA in whole:
        shown[dip + _LORA] = _first_windows(whole[dip + _LORA], n_windows, (dense, whole[dip]))
    n_tokens = " and ".join(f"{first[text]['n_tokens']:,}" for text in _TEXTS)
    title = f"{sheet.marked}: with column caches, the first {n_tokens} tokens of WikiText-2 and C4"
    return table(title, _COLUMNS, [_compensation_row(name, cell) for name, cell in {**shown, **cached}.items()])


def _first_windows(
    cell: Mapping[str, Any], n_windows: Mapping[str, int], compensates: tuple[Any, Any] | None = None
) -> dict[str, Any]:
    """A scored cell as it would be had it seen so many windows; compensates: dense, and what lost against it."""
    told: dict[str, Any] = {name: value for name, value in cell.items() if name not in _TEXTS}
    for text, n in n_windows.items():
        nll, counts = (cell[text][name][:n] for name in ("window_nll", "window_tokens"))
        told[text] = {"perplexity": math.exp(sum(nll) / sum(counts))}
        if compensates is not None:
            dense, sparse = (other[text]["window_nll"][:n] for other in compensates)
            told[text] |= recovered(dense, sparse, nll, counts)
    return told


def _pairs(scored: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What is compared: adapted rules with adapted dip, which touches as many bytes; ways to train one for dip-ca."""
    trained = [name for name in scored if name.startswith(("gate@", "up@")) and name.endswith(_LORA)]
    pairs = [(name, "dip@" + name.partition("@")[2]) for name in trained]
    loop, more = " + lora of the closed loop", " + lora of dip, more steps"
    pairs += [(name, name.removesuffix(loop) + more) for name in scored if name.endswith(loop)]
    return [(name, other) for name, other in pairs if other in scored]


def _answers_table(sheet: Sheet, answered: Mapping[str, Mapping[str, Any]]) -> Table:
    tasks = list(dict.fromkeys(task for found in answered.values() for task in found))
    rows = []
    for name, found in answered.items():
        mean, error = mean_answers({"tasks": found})
        shares = [right_answers(found[task]) if task in found else NONE for task in tasks]
        rows.append([name, *shares, f"{100 * mean:.1f} ± {100 * error:.1f}"])
    return table(f"{sheet.marked}: right answers, %", ("setting", *tasks, "mean"), rows)
