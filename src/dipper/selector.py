"""Selection in PyTorch: masks from scores, the levels that masks are fitted to, and means of what they drop.

Top-k follows the engine to the digit: k = floor(d n + 1/2) in [1, n], scores in fp32, ties to the lower column.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dipper.cache import n_selected
from dipper.errors import ConfigError

__all__ = ["SELECTIONS", "ColumnMean", "Selector", "top_k_mask"]

# Tokens whose scores a selector keeps to fit a threshold: quantiles of 512 tokens x 1000s of columns are good to 1e-3.
_SAMPLE_TOKENS = 512
SELECTIONS = ("topk", "threshold", "topp")


def top_k_mask(scores: Tensor, k: int) -> Tensor:
    """The k largest scores of each row, exactly k: ties go to the lower column.

    Args:
        scores: [..., n] fp32, not NaN.
        k: in [1, n].

    Returns:
        bool [..., n].
    """
    if k >= scores.shape[-1]:
        return torch.ones_like(scores, dtype=torch.bool)
    border = scores.topk(k, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    above = scores > border
    ties = scores == border
    wanted = k - above.sum(-1, keepdim=True)
    return above | (ties & (ties.cumsum(-1, dtype=torch.int32) <= wanted))


class Selector:
    """One mask from one score: top-k per token, a calibrated threshold, or a calibrated share of the sum.

    Args:
        n: columns.
        density: share of them to use, in (0, 1].
        select: one of `SELECTIONS`.
    """

    def __init__(self, n: int, density: float, select: str = "topk") -> None:
        self.n, self.density, self.select = n, density, select
        self.level: float | None = None  # the threshold, or the share of the sum
        self._sample: list[Tensor] = []

    @property
    def needs_fit(self) -> bool:
        """Whether `mask` must wait for calibration."""
        return self.select != "topk" and self.density < 1

    def collect(self, scores: Tensor) -> None:
        """Takes scores [..., n] of calibration tokens into account."""
        held = sum(len(part) for part in self._sample)
        if self.needs_fit and held < _SAMPLE_TOKENS:
            rows = scores.reshape(-1, self.n)
            self._sample.append(rows[:: max(1, len(rows) // 64)][: _SAMPLE_TOKENS - held].float())

    def fit(self) -> None:
        """Fixes the level at which the sample has the asked mean density."""
        if not self.needs_fit:
            return
        if not self._sample:
            raise ConfigError(f"select '{self.select}' needs calibration text, and none was given")
        sample = torch.cat(self._sample)
        self._sample = []
        keep = max(1, round(self.density * sample.numel()))
        if self.select == "threshold":
            self.level = float(sample.flatten().kthvalue(sample.numel() - keep + 1).values)
            return
        ranked = sample.sort(dim=-1, descending=True).values
        before = (ranked.cumsum(-1) - ranked) / ranked.sum(-1, keepdim=True).clamp_min(1e-30)
        # A column is kept while what stands before it holds less than the level: count(before < level) columns.
        self.level = float(before.flatten().kthvalue(min(keep + 1, before.numel())).values)

    def top_k(self, scores: Tensor) -> Tensor:
        """The mask of top-k at this density, whatever `select` is: bool [..., n] of scores [..., n]."""
        return top_k_mask(scores, n_selected(self.density, self.n))

    def mask(self, scores: Tensor) -> Tensor:
        """bool [..., n] of scores [..., n]."""
        if self.density >= 1:
            return torch.ones_like(scores, dtype=torch.bool)
        if self.select == "topk":
            return self.top_k(scores)
        if self.level is None:
            raise ConfigError(f"select '{self.select}' was not calibrated: give calibration text")
        if self.select == "threshold":
            return scores >= self.level
        ranked, order = scores.sort(dim=-1, descending=True)
        before = (ranked.cumsum(-1) - ranked) / ranked.sum(-1, keepdim=True).clamp_min(1e-30)
        return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order, before < self.level)


class ColumnMean:
    """Running mean of vectors [..., n] over the tokens where each column counts, in fp64."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._count: Tensor | int = 0

    def collect(self, values: Tensor, counts: Tensor | None = None) -> None:
        """counts: bool [..., n], which values are taken; None: all."""
        rows = values.reshape(-1, values.shape[-1])
        taken = torch.ones_like(rows, dtype=torch.bool) if counts is None else counts.reshape(rows.shape)
        total = (rows * taken).sum(0, dtype=torch.float64)
        self._sum = total if self._sum is None else self._sum + total
        self._count = self._count + taken.sum(0)

    def value(self, like: Tensor) -> Tensor:
        """[n]; 0 where a column never counted."""
        if self._sum is None or isinstance(self._count, int):
            raise ConfigError("calibration text is needed, and none was given")
        return (self._sum / self._count.clamp_min(1)).to(like.dtype)
