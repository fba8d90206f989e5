"""Weights of `planes` in PyTorch: a matrix whole, by the bases of its codes alone, and what its residuals weigh.

Codes are the source's where it is quantised to 4, 5 or 6 bits, so that base and residual are those of the bundle packed
from it; float weights are quantised to 4 bits first, as `pack --bits 4` does. Base, middle and norms are `grid`'s.

    split = Splits(loaded.codes).of_layer(3, glu.gate, glu.up, glu.down)
    split("gate", 2).base                  # [I, D]: every residual at its middle
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dipper.errors import ConfigError
from dipper.grid import (
    F64,
    CodedRows,
    Grid,
    base_weights,
    can_split,
    dequantise,
    plane_bytes,
    quantise,
    residual_squares,
    split_planes,
)

__all__ = ["Codes", "SplitMatrix", "Splits", "quantised_split"]

Codes = Callable[[str], tuple[Grid, CodedRows]]  # of "layers.N.gate|up|down"


@dataclass(frozen=True)
class SplitMatrix:
    """One matrix W [R, C], quantised, for some base bits.

    Attributes:
        whole: W, [R, C].
        base: W with every residual at its middle, [R, C]; None: nothing is held of a column that is not refined (no
            base bits), or codes that cannot be split so.
        squares: [C] squared norms of what is missing in `base`; 0 where codes cannot be split.
        code_bits, residual_bits: of a column.
        record_bytes: of a column's residual on flash, padded as there.
        can_split: False: the matrix is used whole.
    """

    whole: Tensor
    base: Tensor | None
    squares: F64
    code_bits: int
    residual_bits: int
    record_bytes: int
    can_split: bool


def _split_matrix(grid: Grid, rows: CodedRows, base_bits: int, weight: Tensor, is_own: bool) -> SplitMatrix:
    """weight: [R, C], whose device and dtype are taken; is_own: it is what the codes mean."""

    def like(values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(weight.device, weight.dtype)

    n_rows, n_columns = weight.shape
    whole = weight if is_own else like(dequantise(grid, rows))
    base, squares, splits = None, np.zeros(n_columns), base_bits == 0 or can_split(grid.codes, base_bits)
    try:
        residual, _ = split_planes(grid.codes, base_bits if splits else 0)
    except ValueError as error:
        raise ConfigError(f"{error}; choose other base_bits") from error
    if base_bits == 0:
        squares = whole.double().square().sum(0).cpu().numpy()
    elif splits:
        base, squares = like(base_weights(grid, rows, base_bits)), residual_squares(grid, rows, base_bits)
    return SplitMatrix(
        whole=whole,
        base=base,
        squares=squares,
        code_bits=n_rows * grid.bits,
        residual_bits=n_rows * (grid.bits - base_bits) if splits else 0,
        record_bytes=sum(plane_bytes(n_rows, bits) for bits, _ in residual),
        can_split=splits,
    )


class Splits:
    """Matrices of a model as base and residual.

    Args:
        codes: of the source; None: weights are quantised here.
        keep: every matrix that was made stays, for settings that follow each other.
    """

    def __init__(self, codes: Codes | None, *, keep: bool = False) -> None:
        self._codes, self._keep = codes, keep
        self._made: dict[tuple[int, str, int], SplitMatrix] = {}

    def of_layer(self, layer: int, gate: Tensor, up: Tensor, down: Tensor) -> Callable[[str, int], SplitMatrix]:
        """What gives the layer's matrices by name and base bits."""
        weights = {"gate": gate, "up": up, "down": down}

        def split(name: str, base_bits: int) -> SplitMatrix:
            key = (layer, name, base_bits)
            if key in self._made:
                return self._made[key]
            made = self._make(f"layers.{layer}.{name}", weights[name], base_bits)
            if self._keep:
                self._made[key] = made
            return made

        return split

    def _make(self, name: str, weight: Tensor, base_bits: int) -> SplitMatrix:
        if self._codes is not None:
            grid, rows = self._codes(name)
            if not grid.is_float:
                return _split_matrix(grid, rows, base_bits, weight, True)
        return _split_matrix(*quantise(weight.float().cpu().numpy(), 4), base_bits, weight, False)


def quantised_split(gate: Tensor, up: Tensor, down: Tensor) -> Callable[[str, int], SplitMatrix]:
    """A layer's matrices of which only the float weights are known."""
    return Splits(None).of_layer(0, gate, up, down)
