"""What the engine is measured against: logits of transformers in fp32, and plain DIP on its models.

Owns `reference_logits`, and `dip`, which prunes the MLPs of a model of `dipper.torch_model` with the engine's exact
semantics:
k = floor(d * n + 1/2) in [1, n]; |x| in fp32; gamma * |x| for columns that are not cached; ties to the lower index;
cached columns judged before the token. The masks are recorded, or given (`forced`).

    model = hf_model_from_bundle(bundle)
    with dip(model, d_in=0.6, d_glu=0.6) as run:
        logits = reference_logits(model, tokens)      # [T, V]
    masks = run.masks                                 # per layer: (uint8 [T, D], uint8 [T, I])

Needs the `torch` extra. Nothing here is shared with the engine's own arithmetic: that is its point.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
import transformers
from torch import nn

LayerMasks = tuple[np.ndarray, np.ndarray]  # uint8 [T, D], uint8 [T, I]


def logit_chunks(model: transformers.PreTrainedModel, tokens: Sequence[int], rows: int = 128) -> Iterator[np.ndarray]:
    """Logits of consecutive positions, `rows` at a time: a vocabulary of 262k makes 1 GiB of 1024 positions."""
    with torch.inference_mode():
        hidden = model.model(input_ids=torch.as_tensor(tokens)[None], use_cache=False).last_hidden_state[0]  # [T, D]
        for start in range(0, len(hidden), rows):
            yield model.lm_head(hidden[start : start + rows]).numpy()


def reference_logits(model: transformers.PreTrainedModel, tokens: Sequence[int]) -> np.ndarray:
    """fp32 logits [T, V] of one sequence."""
    return np.concatenate(list(logit_chunks(model, tokens)))


def nll_of(logits: np.ndarray, targets: Sequence[int]) -> np.ndarray:
    """Negative log-likelihood of each target under its row of logits, in fp64. logits [T, V], targets [T] -> [T]."""
    rows = torch.from_numpy(np.ascontiguousarray(logits)).double()
    picked = rows.gather(1, torch.as_tensor(targets)[:, None])[:, 0]
    return (rows.logsumexp(1) - picked).numpy()


def reference_nll(model: transformers.PreTrainedModel, tokens: Sequence[int]) -> np.ndarray:
    """Negative log-likelihood of tokens[1:], [T - 1]."""
    parts, position = [], 0
    for chunk in logit_chunks(model, tokens):
        targets = tokens[position + 1 : position + 1 + len(chunk)]
        parts.append(nll_of(chunk[: len(targets)], targets))
        position += len(chunk)
    return np.concatenate(parts)


# ------------------------------------------------------------------------------------------------ DIP


class ClosedLoopCache(Protocol):
    """The part of a `dipper.cache.ReferenceCache` that selection sees: a state that each token's mask moves."""

    slots: dict[int, int]  # cached column -> slot

    def step(self, mask: list[int]) -> Any: ...


def n_selected(density: float, n: int) -> int:
    """Columns kept at a density: floor(density * n + 1/2), in [1, n]."""
    return min(max(math.floor(density * n + 0.5), 1), n)


def top_k_mask(scores: np.ndarray, k: int) -> np.ndarray:
    """The k largest |scores| of each row, ties to the lower index. [T, n] -> bool [T, n]."""
    magnitude = np.abs(scores, dtype=np.float32)
    if np.isnan(magnitude).any():
        raise ValueError("a score is NaN")
    threshold = np.partition(magnitude, -k, axis=1)[:, -k, None]  # the k-th largest
    above = magnitude > threshold
    tied = magnitude == threshold
    room = k - above.sum(1, keepdims=True)
    return above | (tied & (tied.cumsum(1) <= room))


def closed_loop_mask(scores: np.ndarray, k: int, gamma: float, cache: ClosedLoopCache) -> np.ndarray:
    """Cache-aware masks of a sequence: row by row, select with the state before the token, then step the cache."""
    masks = np.zeros(scores.shape, bool)
    for row, mask in zip(np.abs(scores, dtype=np.float32), masks, strict=True):
        weighted = row * np.float32(gamma)
        cached = list(cache.slots)
        weighted[cached] = row[cached]
        mask[:] = top_k_mask(weighted[None], k)[0]
        cache.step(np.flatnonzero(mask).tolist())
    return masks


@dataclass
class DipRun:
    """Masks by layer, as they were used: (uint8 [T, D], uint8 [T, I])."""

    masks: list[LayerMasks] = field(default_factory=list)


@contextmanager
def dip(
    model: transformers.PreTrainedModel,
    *,
    d_in: float = 1.0,
    d_glu: float = 1.0,
    gamma: float = 1.0,
    caches: Sequence[tuple[ClosedLoopCache, ClosedLoopCache]] | None = None,
    forced: Sequence[LayerMasks] | None = None,
) -> Iterator[DipRun]:
    """Prune the MLPs of a model by Dynamic Input Pruning for the length of the block.

    Args:
        model: from `hf_model_from_bundle`; any transformers decoder with `model.layers[i].mlp` of a known shape.
        d_in: density of input columns.
        d_glu: density of GLU columns.
        gamma: weight of the score of a column that is not cached; below 1 it needs caches.
        caches: by layer the caches of the input and of the GLU region, moved on by the run.
        forced: masks to use instead of selecting any.
    """
    if gamma != 1.0 and caches is None:
        raise ValueError(f"gamma {gamma} needs the caches that it looks at")
    run = DipRun()

    def select(scores: torch.Tensor, layer: int, kind: int, density: float) -> np.ndarray:  # scores [T, n]
        if forced is not None:
            return np.asarray(forced[layer][kind], bool)
        k = n_selected(density, scores.shape[1])
        if caches is None:
            return top_k_mask(scores.numpy(), k)
        return closed_loop_mask(scores.numpy(), k, gamma, caches[layer][kind])

    def forward(mlp: nn.Module, layer: int, hidden: torch.Tensor) -> torch.Tensor:  # hidden [1, T, D]
        x = hidden[0]
        mask_in = select(x, layer, 0, d_in)
        x = x * torch.from_numpy(mask_in)
        if hasattr(mlp, "gate_up_proj"):
            gate, up = mlp.gate_up_proj(x).chunk(2, dim=-1)
            h = mlp.activation_fn(gate) * up
        else:
            h = mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)
        mask_glu = select(h, layer, 1, d_glu)
        run.masks.append((mask_in.astype(np.uint8), mask_glu.astype(np.uint8)))
        return mlp.down_proj(h * torch.from_numpy(mask_glu))[None]

    mlps = [layer.mlp for layer in model.model.layers]
    for n, mlp in enumerate(mlps):
        mlp.forward = lambda hidden, mlp=mlp, n=n: forward(mlp, n, hidden)
    try:
        yield run
    finally:
        for mlp in mlps:
            del mlp.forward
