"""What the experiments found, as one figure and a few tables each, from their results files alone.

    book = Book.open("experiments")
    view = shown(book, "density")         # panels as data, and tables
    draw_all("experiments")               # experiments/figures/NAME.svg

A view is a pure function of the results. A cell that was not measured is not drawn, and its row says "not measured".
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from dipper.drawings.beyond import beyond
from dipper.drawings.compensation import compensation
from dipper.drawings.headline import headline
from dipper.drawings.perplexities import density, split, thresholds
from dipper.drawings.simulations import bandwidth, cache_aware, caches, dram
from dipper.drawings.view import View
from dipper.errors import ConfigError
from dipper.figures import draw
from dipper.sheets import Book, Sheet

__all__ = ["VIEWS", "View", "draw_all", "shown"]

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
