"""Memory and throughput against perplexity, beside dense streaming."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from dipper.drawings.simulations import by_dram, drawn_models, sweep_panel
from dipper.drawings.view import LOSS_TICKS, View, missing_rows, n_columns
from dipper.figures import Line, Panel, Reference
from dipper.savings import (
    LOSSES,
    Saving,
    at_loss,
    kind_of_masks,
    savings,
    simulated,
)
from dipper.sheets import (
    NONE,
    NOT_MEASURED,
    RUINED,
    Book,
    Sheet,
    Table,
    dram_gb,
    memory,
    number,
    percent,
    span,
    table,
    way,
    with_error,
)

__all__ = ["gain_told", "headline"]


def headline(sheets: Sequence[Sheet], book: Book) -> View:
    """Memory and throughput against perplexity, beside dense streaming."""
    found = savings(sheets, book)
    curves: list[Panel] = []
    trades: list[Panel] = []
    for sheet in drawn_models(sheets):
        runs = simulated(sheet)
        for place in dict.fromkeys(run.place for run in runs):
            here = [run for run in runs if run.place == place]
            traded = _trade_lines([s for s in found if s.model == sheet.model and s.place == place])
            lines, axes = by_dram(here)
            about = f", {place.cost}" if place.cost else ""
            # Where losses are known, figures have the published setting alone: a cost per read is in the table.
            if traded and not place.cost_per_read_us:
                trades.append(_trade_panel(f"{sheet.marked}\n{kind_of_masks(here)}{about}", traded))
            elif lines and not traded:
                panel = sweep_panel(sheet, here, lines, **axes)
                curves.append(replace(panel, title=panel.title + about))
    panels = (*trades, *curves)
    beside = _savings_table(found)
    for sheet in sheets:
        beside["rows"] += [[sheet.marked, *row] for row in missing_rows(sheet, "simulate", len(beside["columns"]) - 1)]
    tables = [_at_losses(found), beside, *(t for sheet in sheets if (t := _band_table(sheet))["rows"])]
    return View(panels=panels, columns=n_columns(panels), tables=tuple(tables))


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
    return table(f"{sheet.marked}: how much the generator matters", columns, rows)


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
    for group in by_way.values():
        first = group[0]
        points = sorted((s.loss[0], 1 + s.gain) for s in group if s.loss is not None)
        style = "--" if first.gamma == 0.2 else ":" if first.cache == "lru" else "-"
        label = first.rule if first.cache == "lfu" else first.way
        lines.append(Line(label=label, method=first.method, points=tuple(points), style=style))
    return lines


def gain_told(saving: Saving) -> str:
    """Median over DRAM, least and most."""
    if len(saving.gains) == 1:
        return percent(saving.gain)
    return f"{percent(saving.gain)} ({span(min(saving.gains.values()), max(saving.gains.values()))})"


def _at_losses(found: Sequence[Saving]) -> Table:
    rows, unknown = [], []
    for model in dict.fromkeys(s.model for s in found):
        mine = [s for s in found if s.model == model]
        if not any(s.loss for s in mine):
            unknown.append(mine[0].title)
            continue
        for place in dict.fromkeys(s.place for s in mine):
            here = [s for s in mine if s.place == place]
            row = [here[0].title, place.told]
            for limit in LOSSES.values():
                best = at_loss(here, limit)
                row.append("none loses so little" if best is None else f"{gain_told(best)}: {best.setting}")
            rows.append(row)
    if unknown:
        rows.append([", ".join(unknown), NONE, *([f"perplexity {NOT_MEASURED}"] * len(LOSSES))])
    names = [f"{name} of 4.3, here {percent(share, 1)}" for name, share in LOSSES.items()]
    title = "Throughput over dense streaming at equal DRAM (median, least to most over DRAM) of the best setting that "
    return table(title + "loses at most so much perplexity", ["model", "on", *names], rows)


def _savings_table(found: Sequence[Saving]) -> Table:
    rows = [
        [
            s.title, s.place.told, s.way, number(s.density, "{:g}"), with_error(s.loss, measured=False),
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
