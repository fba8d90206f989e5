"""Rules that fix their masks before any token: magnitude, Wanda, SparseGPT."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from dipper.cache import n_selected
from dipper.errors import ConfigError
from dipper.methods.method import Glu, Method, MethodConfig
from dipper.selector import ColumnMean, top_k_mask

__all__ = ["Magnitude", "SparseGpt", "Wanda"]


class _FixedMask(Method):
    """Rules that drop the same weights for every token: the reference that needs no activations at run time.

    A mask of one bit a weight must be held or read beside the kept weights: `extra_dram_bits`.
    """

    follows_weights = False

    @classmethod
    def check(cls, config: MethodConfig) -> None:
        """2:4 is one density."""
        super().check(config)
        if config.pattern not in ("unstructured", "2:4"):
            raise ConfigError(f"pattern is '{config.pattern}', known are unstructured and 2:4")
        if config.pattern == "2:4" and config.density != 0.5:
            raise ConfigError(f"2:4 keeps half of the weights, and density is {config.density:g}: ask for 0.5")

    def __init__(self, config: MethodConfig, glu: Glu, layer: int) -> None:
        super().__init__(config, glu, layer)
        self._pruned: Glu | None = None
        self._correction: tuple[Tensor, ...] | None = None

    @property
    def extra_dram_bits(self) -> float:
        """One bit a weight."""
        return float(self._mlp_weights)

    @abstractmethod
    def _prune(self, weight: Tensor, which: int) -> Tensor:
        """The pruned weight; which: 0 for matrices whose input is x, 1 for down."""

    def fit(self) -> None:
        super().fit()
        self._make()

    def _make(self) -> Glu:
        if self._pruned is None:
            gate, up, down = (self._prune(w, n) for w, n in ((self.glu.gate, 0), (self.glu.up, 0), (self.glu.down, 1)))
            pruned = replace(self.glu, gate=gate, up=up, down=down)
            if self._mean is not None:  # what the dropped weights give on the mean input goes into the biases
                pruned.gate_bias = _with_bias(self.glu.gate_bias, (self.glu.gate - gate) @ self._mean[0])
                pruned.up_bias = _with_bias(self.glu.up_bias, (self.glu.up - up) @ self._mean[0])
                pruned.down_bias = _with_bias(self.glu.down_bias, (self.glu.down - down) @ self._mean[1])
            self._pruned = pruned
        return self._pruned

    def forward(self, x: Tensor) -> Tensor:
        self._count(x, self.config.density)
        return self._make().dense(x)

    def _keep_largest(self, weight: Tensor, scores: Tensor, *, by_row: bool) -> Tensor:
        """weight with its lowest scores set to zero, row by row or over the matrix."""
        if self.config.pattern == "2:4":
            fours = scores.reshape(*scores.shape[:-1], -1, 4)
            return weight * top_k_mask(fours, 2).reshape(weight.shape)
        rows = scores if by_row else scores.reshape(1, -1)
        keep = n_selected(self.config.density, rows.shape[-1])
        border = rows.kthvalue(rows.shape[-1] - keep + 1, dim=-1, keepdim=True).values
        return weight * (rows >= border).reshape(weight.shape)


def _with_bias(bias: Tensor | None, more: Tensor) -> Tensor:
    return more if bias is None else bias + more


class Magnitude(_FixedMask):
    """The largest |W| of each matrix."""

    name = "magnitude"
    summary = "a fixed mask of the largest |W|"

    def _prune(self, weight: Tensor, which: int) -> Tensor:
        return self._keep_largest(weight, weight.float().abs(), by_row=False)


class Wanda(_FixedMask):
    """The largest |W_ij| ||X_j|| of each output row (arXiv 2306.11695, eq. 1)."""

    name = "wanda"
    summary = "a fixed mask of the largest |W_ij| times the norm of input j"

    def __init__(self, config: MethodConfig, glu: Glu, layer: int) -> None:
        super().__init__(config, glu, layer)
        self._squares = (ColumnMean(), ColumnMean())

    @classmethod
    def needs_data(cls, config: MethodConfig) -> bool:
        """Always: norms of the inputs."""
        return True

    def collect(self, x: Tensor) -> None:
        super().collect(x)
        self._squares[0].collect(x.float().square())
        self._squares[1].collect(self.glu.hidden(x).float().square())

    def _prune(self, weight: Tensor, which: int) -> Tensor:
        norms = self._squares[which].value(weight.float()).sqrt()
        return self._keep_largest(weight, weight.float().abs() * norms, by_row=True)


class SparseGpt(_FixedMask):
    """Optimal brain surgeon, column by column: what a dropped weight did goes to the later ones (arXiv 2301.00774).

    Hessians are those of the dense model's activations; layers are not pruned one after the other.
    """

    name = "sparsegpt"
    summary = "a fixed mask chosen with second-order information, other weights adjusted"
    _block: ClassVar[int] = 128

    def __init__(self, config: MethodConfig, glu: Glu, layer: int) -> None:
        super().__init__(config, glu, layer)
        self._hessian: list[Tensor | None] = [None, None]

    @classmethod
    def needs_data(cls, config: MethodConfig) -> bool:
        """Always: Hessians."""
        return True

    def collect(self, x: Tensor) -> None:
        super().collect(x)
        for which, values in enumerate((x, self.glu.hidden(x))):
            rows = values.reshape(-1, values.shape[-1]).float()
            hessian = self._hessian[which]
            self._hessian[which] = rows.T @ rows if hessian is None else hessian.addmm_(rows.T, rows)

    def fit(self) -> None:
        super().fit()
        self._hessian = [None, None]

    def _prune(self, weight: Tensor, which: int) -> Tensor:
        hessian = self._hessian[which]
        if hessian is None:
            raise ConfigError("sparsegpt needs calibration text, and none was given")
        hessian = hessian.clone()
        dead = hessian.diagonal() == 0
        hessian.diagonal()[dead] = 1
        hessian.diagonal().add_(0.01 * hessian.diagonal().mean())
        inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
        w = weight.float().clone()
        w[:, dead] = 0
        n = w.shape[1]
        for first in range(0, n, self._block):
            last = min(n, first + self._block)
            part, corner = w[:, first:last].clone(), inverse[first:last, first:last]
            errors = torch.zeros_like(part)
            scores = (part / corner.diagonal()).square()
            if self.config.pattern == "unstructured":
                keep = max(1, round(self.config.density * scores.numel()))
                kept = scores >= scores.flatten().kthvalue(scores.numel() - keep + 1).values
            for j in range(last - first):
                if (
                    self.config.pattern == "2:4" and j % 4 == 0
                ):  # chosen when its four are reached: errors have moved them
                    fours = (part[:, j : j + 4] / corner.diagonal()[j : j + 4]).square()
                    kept = torch.zeros_like(part, dtype=torch.bool) if j == 0 else kept
                    kept[:, j : j + 4] = top_k_mask(fours, min(2, fours.shape[1]))
                column = part[:, j] * kept[:, j]
                error = (part[:, j] - column) / corner[j, j]
                part[:, j:] -= error[:, None] * corner[j, j:]
                part[:, j] = column
                errors[:, j] = error
            w[:, first:last] = part
            w[:, last:] -= errors @ inverse[first:last, last:]
        return w.to(weight.dtype)
