"""Figures with matplotlib, which is imported only when one is drawn."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dipper.errors import ConfigError

__all__ = ["panels"]


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
        ConfigError: matplotlib is missing.
    """
    try:
        import matplotlib
    except ImportError:
        raise ConfigError("A figure needs matplotlib: run `pip install 'dipper[plots]'`.") from None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * n, height * n_rows), layout="constrained")
    with matplotlib.rc_context({"svg.hashsalt": "dipper"}):
        yield list(figure.subplots(n_rows, n, squeeze=False).flat)
        figure.savefig(path, metadata={"Date": None} if Path(path).suffix == ".svg" else None)
