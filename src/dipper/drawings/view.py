"""What views of several experiments share: losses as lines, and cells that were not measured as rows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dipper.figures import Line, Panel
from dipper.sheets import (
    NOT_MEASURED,
    RUINED,
    Book,
    Measured,
    Sheet,
    Table,
)

__all__ = [
    "LOSS_TICKS",
    "View",
    "loss_limits",
    "loss_line",
    "loss_panel",
    "mean_answers",
    "missing_rows",
    "n_columns",
    "right_answers",
]


LOSS_TICKS = (0.003, RUINED)  # of figures: less than 0.3 % is noise


@dataclass(frozen=True, kw_only=True)
class View:
    """What is shown of an experiment: panels, so many in a row, and tables."""

    panels: tuple[Panel, ...]
    columns: int
    tables: tuple[Table, ...]


def missing_rows(sheet: Sheet, kind: str, n_columns: int) -> Iterator[list[str]]:
    """One row for all cells that were not measured."""
    n = sum(cell.result is None for cell in sheet.of(kind))
    if n:
        yield [f"{n} more {'cells' if n > 1 else 'cell'}", *([NOT_MEASURED] * (n_columns - 1))]


def n_columns(panels: Sequence[Panel]) -> int:
    """Of a figure of so many panels that belong together."""
    return {0: 1, 1: 1, 2: 2, 4: 2}.get(len(panels), 3)


def loss_limits(lines: Iterable[Line]) -> tuple[float, float] | None:
    """Limits of a log axis that hold what is positive and not ruined."""
    values = [y for line in lines for _, y in line.points if 0 < y <= LOSS_TICKS[1]]
    if not values:
        return None
    return max(LOSS_TICKS[0], 0.7 * min(values)), min(LOSS_TICKS[1], 1.4 * max(values))


def loss_line(book: Book, sheet: Sheet, label: str, cells: Sequence[Measured], *, style: str = "-") -> Line:
    """Loss by the share of bytes touched."""
    points, errors = [], []
    for cell in cells:
        loss = book.loss(sheet, cell)
        if loss is not None and cell.result is not None and cell.result["touched"] is not None:
            points.append((float(cell.result["touched"]), loss[0]))
            errors.append(loss[1] or 0.0)
    order = sorted(range(len(points)), key=lambda i: -points[i][0])
    options = cells[0].options
    fitted = "fit" in options
    return Line(
        label=label, method=str(options["method"]["name"]), style=style, points=tuple(points[i] for i in order),
        errors=tuple(errors[i] for i in order), marker="s" if fitted else "o", hollow="all" if fitted else "none",
    )  # fmt: skip


def loss_panel(title: str, lines: Sequence[Line]) -> Panel:
    """Lines of `loss_line`."""
    low, high = LOSS_TICKS
    return Panel(
        title=title, x="share of the MLP's bytes that a token touches", y="perplexity above dense",
        lines=tuple(line for line in lines if line.points), y_scale="log", y_limits=(low, high), percent="xy",
        x_limits=(0.83, 0.38),
    )  # fmt: skip


def mean_answers(result: Mapping[str, Any]) -> tuple[float, float]:
    """Share of right answers, each task counting alike, and its standard error."""
    tasks = result["tasks"].values()
    error = math.sqrt(sum(task["acc_stderr"] ** 2 for task in tasks)) / len(tasks)
    return sum(task["acc"] for task in tasks) / len(tasks), error


def right_answers(task: Mapping[str, Any]) -> str:
    """Right answers of a task, per cent."""
    return f"{100 * task['acc']:.1f} ± {100 * task['acc_stderr']:.1f}"
