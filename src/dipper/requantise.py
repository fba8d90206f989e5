"""Weights in fewer bits for what is wholly resident: the rival of streaming in the same DRAM.

Groups of 32 consecutive inputs of a row share a scale and an offset of 8 bits each, under two f16 factors a row, as the
int4 of `grid.quantise` has them: w = d · sub · code − dm · subm. Both are searched for the least squared error in which
every input counts by its second moment.

    requantise(weight, 3, (x**2).mean(0))  # [R, C], what 3-bit codes give back
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["bits_per_weight", "requantise"]

_GROUP = 32
_CLIPS = (1.0, 0.92, 0.84, 0.76, 0.68, 0.6, 0.5)  # of a group's range, from both ends: starts of the search
_ROUNDS = 3  # of codes for a scale, then the scale for these codes
_WEIGHTS = 1 << 24  # at once


def bits_per_weight(bits: int, n_inputs: int) -> float:
    """Bits of a code with its share of the scales: 16 bits a group, 32 a row."""
    n_groups = -(-n_inputs // _GROUP)
    return bits + (16 * n_groups + 32) / n_inputs


def requantise(weight: Tensor, bits: int, energy: Tensor) -> Tensor:
    """What is left of weights.

    Args:
        weight: [R, C].
        bits: of a code.
        energy: [C], at least 0: what a squared error of a column counts.

    Returns:
        [R, C] on the same device, of the same dtype.
    """
    n_columns = weight.shape[1]
    short = -n_columns % _GROUP
    counts = energy.to(weight.device, torch.float32).clamp_min(1e-12 * float(energy.max()) + 1e-30)
    counts = torch.nn.functional.pad(counts, (0, short)).reshape(-1, _GROUP)  # padding counts nothing
    counts = counts / counts.mean(1, keepdim=True)
    step = max(1, _WEIGHTS // n_columns)
    parts = []
    for start in range(0, len(weight), step):
        rows = torch.nn.functional.pad(weight[start : start + step].float(), (0, short))
        parts.append(_rows(rows.unflatten(1, (-1, _GROUP)), counts, 2**bits - 1)[:, :n_columns])
    return torch.cat(parts).to(weight.dtype)


def _rows(x: Tensor, counts: Tensor, top: int) -> Tensor:
    """Rows [n, groups, 32] as they come back, [n, groups · 32]; counts [groups, 32]; codes 0..top."""
    scale, offset = _search(x, counts, top)
    scale, offset = _eight_bits(scale), _eight_bits(offset)
    return (scale[..., None] * _codes(x, scale, offset, top) - offset[..., None]).flatten(1)


def _search(x: Tensor, counts: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """The best scale and offset >= 0 of each group, [n, groups], from several starts."""
    low, high = x.amin(-1).clamp_max(0), x.amax(-1).clamp_min(0)
    best = torch.full_like(low, torch.inf)
    best_scale, best_offset = torch.zeros_like(low), torch.zeros_like(low)
    for clip in _CLIPS:
        scale, offset = clip * (high - low) / top, -clip * low
        for _ in range(_ROUNDS):
            scale, offset = _least_squares(x, counts, _codes(x, scale, offset, top), scale, offset)
        codes = _codes(x, scale, offset, top)
        error = (counts * (scale[..., None] * codes - offset[..., None] - x).square()).sum(-1)
        better = error < best
        best = torch.where(better, error, best)
        best_scale, best_offset = torch.where(better, scale, best_scale), torch.where(better, offset, best_offset)
    return best_scale, best_offset


def _codes(x: Tensor, scale: Tensor, offset: Tensor, top: int) -> Tensor:
    """The nearest codes, [n, groups, 32] fp32."""
    inverse = torch.where(scale > 0, 1 / scale, torch.zeros_like(scale))
    return ((x + offset[..., None]) * inverse[..., None]).round_().clamp_(0, top)


def _least_squares(x: Tensor, counts: Tensor, codes: Tensor, scale: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """The scale and offset that bring scale · codes − offset nearest to x; as given where codes do not tell them."""
    weighted = counts * codes
    sum_1, sum_q, sum_qq = counts.sum(-1), weighted.sum(-1), (weighted * codes).sum(-1)
    sum_x, sum_qx = (counts * x).sum(-1), (weighted * x).sum(-1)
    determinant = sum_1 * sum_qq - sum_q * sum_q
    new_scale = (sum_1 * sum_qx - sum_q * sum_x) / determinant
    new_offset = (sum_q * sum_qx - sum_qq * sum_x) / determinant
    alone = sum_qx / sum_qq.clamp_min(1e-30)  # no offset helps
    new_scale = torch.where(new_offset < 0, alone, new_scale)
    new_offset = new_offset.clamp_min(0)
    told = (determinant > 1e-5 * sum_1 * sum_qq) & (new_scale > 0)
    return torch.where(told, new_scale, scale), torch.where(told, new_offset, offset)


def _eight_bits(values: Tensor) -> Tensor:
    """Values >= 0 [n, groups] as an f16 factor a row times 8 bits."""
    wanted = values.amax(1, keepdim=True) / 255
    factor = (wanted * (1 + 2**-10) + 2**-25).half().float()  # rounded down, the largest value would not fit in 8 bits
    inverse = torch.where(factor > 0, 1 / factor, torch.zeros_like(factor))
    return factor * (values * inverse).round_().clamp_(0, 255)
