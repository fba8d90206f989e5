"""Figures and tables of the experiments, from their results alone."""

from __future__ import annotations

from pathlib import Path

__all__ = ["draw_all"]


def draw_all(experiments: Path) -> None:
    """Draws what there are results of."""
