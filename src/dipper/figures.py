"""Figures with matplotlib, which is imported only when one is drawn."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dipper.errors import ConfigError
from dipper.files import check_target, whole_file

__all__ = ["check_figure", "panels"]

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
    path: str | os.PathLike[str], n: int, *, n_rows: int = 1, width: float = 5.5, height: float = 4.2
) -> Iterator[list[Any]]:
    """Axes, row by row; when the block ends well they are written, the same ones always to the same bytes.

    Args:
        path: .svg, .png or .pdf.
        n: panels of a row.
        n_rows: rows.
        width, height: of a panel, inches.

    Raises:
        ConfigError: as `check_figure`.
    """
    check_figure(path)
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * n, height * n_rows), layout="constrained")
    with matplotlib.rc_context({"svg.hashsalt": "dipper"}):
        yield list(figure.subplots(n_rows, n, squeeze=False).flat)
        suffix = Path(path).suffix
        with whole_file(path) as out:
            figure.savefig(out, format=suffix[1:], metadata={"Date": None} if suffix == ".svg" else None)
