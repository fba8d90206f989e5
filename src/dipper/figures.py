"""Figures with matplotlib, which is imported only when one is drawn.

`panels` gives axes to draw on. `draw` takes figures that are described as data: panels of lines, so that what is shown
can be tested without drawing it, and all figures look alike: one colour a method, names at the ends of lines, axes
that can be read on light and on dark pages.
"""

from __future__ import annotations

import importlib.util
import io
import math
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dipper.errors import ConfigError
from dipper.files import check_target, whole_file

__all__ = ["COLOURS", "Line", "Panel", "Reference", "check_figure", "colour_of", "draw", "panels"]

FORMATS = (".svg", ".png", ".pdf")


def check_figure(path: str | os.PathLike[str] | None) -> None:
    """Before the work that a figure is drawn of: whether it could be; None: none is.

    Raises:
        ConfigError: an unknown format, no such folder, matplotlib is missing.
    """
    if path is None:
        return
    if Path(path).suffix not in FORMATS:
        raise ConfigError(f"a figure is {', '.join(FORMATS)}, not '{Path(path).suffix}' ({path}): name it so")
    check_target(path)
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("A figure needs matplotlib: run `pip install 'dipper[plots]'`.")


@contextmanager
def panels(
    path: str | os.PathLike[str],
    n: int,
    *,
    n_rows: int = 1,
    width: float = 5.5,
    height: float = 4.2,
    themed: bool = False,
) -> Iterator[list[Any]]:
    """Axes, row by row; when the block ends well they are written, the same ones always to the same bytes.

    Args:
        path: .svg, .png or .pdf.
        n: panels of a row.
        n_rows: rows.
        width, height: of a panel, inches.
        themed: transparent, with axes for light and dark pages.

    Raises:
        ConfigError: as `check_figure`.
    """
    check_figure(path)
    import matplotlib
    from matplotlib.figure import Figure

    style: Any = {"svg.hashsalt": "dipper", **(_STYLE if themed else {})}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(width * n, height * n_rows), layout="constrained")
        yield list(figure.subplots(n_rows, n, squeeze=False).flat)
        suffix = Path(path).suffix
        made = io.BytesIO()
        metadata = {"Date": None} if suffix == ".svg" else None
        figure.savefig(made, format=suffix[1:], metadata=metadata, transparent=themed)
        content = made.getvalue()
        with whole_file(path) as out:
            out.write(_themed(content) if themed and suffix == ".svg" else content)


# ------------------------------------------------------------------------------------------------ figures as data

# Of middle lightness: each stands out at 3 : 1 or more on white and on near black.
COLOURS = {
    "dense": "#7c8590",
    "dip": "#2f80d8",
    "dip-ca": "#dd6b20",
    "planes": "#9564d8",
    "gate": "#279a62",
    "up": "#cf4f93",
    "glu-oracle": "#8f887b",
    "teal": "#1697a8",
    "wina": "#a3831c",
    "wanda": "#b06a52",
}
_OTHERS = ("#7d8f1e", "#5f7fa8", "#c25555", "#4f9187", "#a36fa0")
# What is no data: middle grey where a viewer knows no style sheets, else darker on light pages, lighter on dark ones.
_INK, _FAINT = "#76797f", "#9a9da3"
_THEMES = {"light": {_INK: "#3b4048", _FAINT: "#c3c7cd"}, "dark": {_INK: "#ccd1d8", _FAINT: "#4a5058"}}


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of a panel.

    Attributes:
        label: stands at its end; "": nothing does.
        method: whose colour it has.
        points: (x, y), in the order in which they are joined.
        errors: of y, one a point.
        style: of matplotlib: "-", "--", ":", "-.", or "" for points alone.
        marker: of matplotlib; "": none, the line is a bar.
        hollow: markers have no filling: "all", "first" or "none".
    """

    label: str
    method: str
    points: tuple[tuple[float, float], ...]
    errors: tuple[float, ...] | None = None
    style: str = "-"
    marker: str = "o"
    hollow: str = "none"


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A straight line to compare with: at x, at y, or where both are equal."""

    x: float | None = None
    y: float | None = None
    label: str = ""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One pair of axes.

    Attributes:
        title: what it is of; x, y: what the axes are, with their units.
        x_scale, y_scale: linear or log.
        x_limits, y_limits: None: as the data ask; a first one above the second turns the axis round.
        rows: names of y = 0, 1, ... from the top, where y is a name and no number; of bars they stand above them.
        percent: of "x" and "y", axes whose numbers are shares to be shown as per cent.
    """

    title: str
    x: str
    y: str = ""
    lines: tuple[Line, ...]
    references: tuple[Reference, ...] = ()
    x_scale: str = "linear"
    y_scale: str = "linear"
    x_limits: tuple[float | None, float | None] | None = None
    y_limits: tuple[float | None, float | None] | None = None
    rows: tuple[str, ...] = ()
    percent: str = ""


def colour_of(method: str) -> str:
    """A method's colour, the same in every figure; "dense-stream" has that of "dense"."""
    name = "dense" if method.startswith("dense") else method
    return COLOURS.get(name) or _OTHERS[sum(map(ord, name)) % len(_OTHERS)]


def draw(
    shown: Sequence[Panel], path: str | os.PathLike[str], *, columns: int, width: float = 3.9, height: float = 3.1
) -> None:
    """Draws panels row by row; the same ones always give the same bytes.

    Args:
        shown: at least one.
        path: .svg (for light and dark pages alike), .png or .pdf.
        columns: panels of a row.
        width, height: of a panel, inches.

    Raises:
        ConfigError: as `check_figure`, or there is nothing to draw.
    """
    if not shown:
        raise ConfigError(f"There is nothing to draw in {path}: no cell of it was measured.")
    n_rows = -(-len(shown) // columns)
    height = max(height, *(1.1 + 0.26 * len(panel.rows) for panel in shown))
    with panels(path, columns, n_rows=n_rows, width=width, height=height, themed=True) as axes:
        for axis, panel in zip(axes, shown, strict=False):
            _draw_panel(axis, panel, height)
        for axis in axes[len(shown) :]:
            axis.set_axis_off()


def _draw_panel(axis: Any, panel: Panel, height: float) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    title, _, about = panel.title.partition("\n")
    axis.set_title(title, loc="left", fontsize=9.5, fontweight="bold", pad=16 if about else 6)
    axis.annotate(
        about, (0, 1), xycoords="axes fraction", xytext=(0, 5), textcoords="offset points", fontsize=8, color=_INK
    )  # fmt: skip
    axis.set(xlabel=panel.x, ylabel=panel.y, xscale=panel.x_scale, yscale=panel.y_scale)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="x" if panel.rows else "y", color=_FAINT, linewidth=0.5)
    axis.set_axisbelow(True)
    for line in panel.lines:
        _draw_line(axis, line)
    if panel.rows:
        _name_rows(axis, panel)
    elif panel.y_limits is not None:
        axis.set_ylim(*panel.y_limits)
    if panel.x_limits is not None:
        axis.set_xlim(*panel.x_limits)
    for name, scale in (("x", panel.x_scale), ("y", panel.y_scale)):
        ticks = getattr(axis, f"{name}axis")
        share = name in panel.percent
        if scale == "log":
            low, high = sorted(getattr(axis, f"get_{name}lim")())
            spans = ((10, (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)), (300, (1.0, 2.0, 5.0)), (math.inf, (1.0,)))
            subs = next(subs for most, subs in spans if high / low < most)
            ticks.set_major_locator(LogLocator(subs=subs, numticks=20))
            ticks.set_minor_formatter(NullFormatter())
        elif not (name == "y" and panel.rows):
            # Numbers with a unit are wide: fewer of them below a panel.
            ticks.set_major_locator(MaxNLocator(6, steps=[1, 2, 10] if share and name == "x" else [1, 2, 2.5, 5, 10]))
        if share or scale == "log":
            unit, factor = (" %", 100) if share else ("", 1)
            ticks.set_major_formatter(FuncFormatter(lambda v, _, u=unit, f=factor: f"{f * v:,.10g}{u}"))
    for reference in panel.references:
        _draw_reference(axis, reference, below=bool(panel.rows))
    axis.get_xlim(), axis.get_ylim()  # limits that follow the data are found when they are asked for
    if not panel.rows:
        _label_ends(axis, panel, gap=0.13 / (height - 0.8))


def _name_rows(axis: Any, panel: Panel) -> None:
    """Names beside points, or above bars, so that long ones take no room from the axes."""
    axis.tick_params(axis="y", length=0)
    axis.set_ylim(len(panel.rows), -0.75)  # room for the label of a reference below
    if any(line.marker for line in panel.lines):
        axis.set_yticks(range(len(panel.rows)), panel.rows)
        return
    axis.set_yticks([])
    for i, name in enumerate(panel.rows):
        axis.annotate(name, (0, i), xytext=(3, 4.5), textcoords="offset points", fontsize=8, color=_INK)


def _draw_line(axis: Any, line: Line) -> None:
    colour = colour_of(line.method)
    x, y = [p[0] for p in line.points], [p[1] for p in line.points]
    if line.errors is not None:
        axis.errorbar(x, y, yerr=line.errors, fmt="none", ecolor=colour, elinewidth=0.8, alpha=0.6)
    axis.plot(x, y, color=colour, linestyle=line.style or "none", linewidth=1.5 if line.marker else 5.0)
    hollow = {"none": 0, "first": 1, "all": len(x)}[line.hollow]
    for filled, part in ((False, slice(0, hollow)), (True, slice(hollow, None))):
        fill = colour if filled else "none"
        axis.plot(
            x[part], y[part], color=colour, linestyle="none", marker=line.marker, markersize=3.8,
            markerfacecolor=fill, markeredgecolor=colour,
        )  # fmt: skip


def _draw_reference(axis: Any, reference: Reference, below: bool) -> None:
    style = {"color": _INK, "linewidth": 0.8, "linestyle": (0, (2, 2)), "zorder": 1}
    if reference.x is not None:
        axis.axvline(reference.x, **style)
        axis.annotate(
            reference.label, (reference.x, 0 if below else 1), xycoords=("data", "axes fraction"),
            xytext=(3, 3) if below else (2, -2), textcoords="offset points", va="bottom" if below else "top",
            rotation=0 if below else 90, fontsize=7.5, color=_INK,
        )  # fmt: skip
    elif reference.y is not None:
        axis.axhline(reference.y, **style)
    else:
        axis.axline((1, 1), (2, 2), **style)


def _label_ends(axis: Any, panel: Panel, gap: float) -> None:
    """Names to the right of the axes, each at its line's last point that is in sight, none over another.

    Args:
        axis: with its limits.
        panel: what is drawn on it.
        gap: least distance of two names, share of the axes' height.
    """
    ends = []  # height of the name, point it is of, name, colour
    for line in panel.lines:
        at = [_fraction(axis, *point) for point in line.points]
        if not line.style:  # nothing joins its points
            at = [(x, y) for x, y in at if -0.01 <= y <= 1.01]
        seen = _last_in_sight(at) if line.label else None
        if seen is not None:
            ends.append((seen[1], seen, line.label, colour_of(line.method)))
    for reference in panel.references:
        if reference.y is not None and reference.label:
            _, y = _fraction(axis, axis.get_xlim()[1], reference.y)
            ends.append((y, (1.0, y), reference.label, _INK))
    # Of those that leave at the top, who leaves first is the highest; at the bottom, the lowest.
    ends.sort(key=lambda end: (end[0], -end[1][0] if end[0] > 0.5 else end[1][0]))
    places: list[float] = []
    for y, *_ in ends:
        places.append(max(y, places[-1] + gap) if places else y)
    if places and places[-1] > 1.02:  # back down from the top
        places[-1] = 1.02
        for i in range(len(places) - 2, -1, -1):
            places[i] = min(places[i], places[i + 1] - gap)
    for place, (y, (x, _), label, colour) in zip(places, ends, strict=True):
        if x < 0.96 or abs(place - y) > gap / 4:
            axis.plot(
                (x, 1.03), (y, place), transform=axis.transAxes, color=colour, linewidth=0.5, alpha=0.55,
                clip_on=False,
            )  # fmt: skip
        axis.text(1.04, place, label, transform=axis.transAxes, color=colour, fontsize=8, va="center", ha="left")


def _last_in_sight(points: Sequence[tuple[float, float]]) -> tuple[float, float] | None:
    """Where a line ends within the axes, or leaves them upwards or downwards; points: in shares of the axes."""
    points = sorted(p for p in points if all(map(math.isfinite, p)))
    inside = [i for i, (x, y) in enumerate(points) if -0.01 <= x <= 1.01 and -0.01 <= y <= 1.01]
    if not inside:
        shown = [p for p in points if -0.01 <= p[0] <= 1.01]
        return (shown[-1][0], min(max(shown[-1][1], 0.0), 1.0)) if shown else None
    x, y = points[inside[-1]]
    if inside[-1] + 1 == len(points):
        return x, y
    x1, y1 = points[inside[-1] + 1]
    edge = min(max(y1, 0.0), 1.0)
    if edge == y1:  # it leaves to the right
        return x, y
    return x + (x1 - x) * min(max((edge - y) / (y1 - y), 0.0), 1.0), edge


def _fraction(axis: Any, x: float, y: float) -> tuple[float, float]:
    """A point of the data in shares of the axes."""
    at = axis.transLimits.transform(axis.transScale.transform((x, y)))
    return float(at[0]), float(at[1])


_STYLE = {
    "svg.fonttype": "none",  # a viewer's own fonts: small files, text that can be searched
    "font.family": "sans-serif",
    "font.size": 8.5,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _INK,
    "axes.titlecolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.unicode_minus": True,
}


def _themed(svg: bytes) -> bytes:
    """The SVG with a style sheet that sets what is no data off against a light and a dark page."""
    rules = []
    for scheme, colours in _THEMES.items():
        inner = "".join(
            f'[style*="{what}: {grey}"]{{{what}:{colour}!important}}'
            for grey, colour in colours.items()
            for what in ("fill", "stroke")
        )
        rules.append(f"@media (prefers-color-scheme:{scheme}){{{inner}}}")
    font = "text{font-family:system-ui,-apple-system,'Segoe UI',Roboto,'Helvetica Neue',Arial,sans-serif!important}"
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", svg.decode(), flags=re.DOTALL)
    text = re.sub(r"<!DOCTYPE.*?>\s*", "", text, flags=re.DOTALL)
    at = text.index(">", text.index("<svg")) + 1
    return f"{text[:at]}\n <style>{font}{''.join(rules)}</style>{text[at:]}".encode()
