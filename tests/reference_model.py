"""A transformer in plain numpy over a `Bundle`: what a header means, written once more, slowly, as an oracle."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from dipper.bundle import Bundle
from dipper.cache import ReferenceCache, n_selected, reference_top_k


@dataclass
class Dip:
    """Dynamic Input Pruning by its definition: a column that is not selected contributes its mean, or nothing.

    Attributes:
        densities: of the input and the GLU columns by layer, [n_layers, 2].
        factors: by layer (input [D], GLU [I]): scores are |x| times these, in fp32.
        means: by layer (input [D], GLU [I]).
        gamma: factor of scores of columns that are not in `caches`, by layer (input, GLU), which the run moves.
        masks: by layer [input [T, D], GLU [T, I]], as the run used them.
    """

    densities: np.ndarray
    factors: list | None = None
    means: list | None = None
    gamma: float = 1.0
    caches: list[tuple[ReferenceCache, ReferenceCache]] | None = None
    masks: list[list[np.ndarray]] = field(default_factory=list)

    def prune(self, layer: int, kind: int, x: np.ndarray) -> np.ndarray:
        """x [T, n] with the columns that are not selected replaced."""
        k = n_selected(self.densities[layer, kind], x.shape[1])
        factor = np.float32(1) if self.factors is None else self.factors[layer][kind]
        mask = np.zeros(x.shape, bool)
        for row, used in zip(np.abs(x.astype(np.float32)) * factor, mask, strict=True):
            cached = np.ones(len(row), bool)
            if self.caches is not None:
                cached = np.isin(np.arange(len(row)), list(self.caches[layer][kind].slots))
            used[reference_top_k(row, k, self.gamma, cached)] = True
            if self.caches is not None:
                self.caches[layer][kind].step(np.flatnonzero(used).tolist())
        if kind == 0:
            self.masks.append([])
        self.masks[layer].append(mask)
        return np.where(mask, x, 0 if self.means is None else self.means[layer][kind])


def logits(bundle: Bundle, token_ids: list[int], dip: Dip | None = None) -> np.ndarray:
    """fp64 logits ``[T, V]`` of a prompt, with every weight used or with the MLPs pruned."""
    model = bundle.model
    weights = _Weights(bundle)
    x = bundle.embedding_rows(np.array(token_ids)).astype(np.float64) * model.embedding_scale
    for n in range(model.n_layers):
        branch = _attention(weights, n, _norm(x, weights(f"layers.{n}.attn_norm"), model.norm_eps))
        x = x + _maybe_norm(branch, weights, f"layers.{n}.post_attn_norm", model.norm_eps)
        branch = _mlp(weights, n, _norm(x, weights(f"layers.{n}.mlp_norm"), model.norm_eps), dip)
        x = x + _maybe_norm(branch, weights, f"layers.{n}.post_mlp_norm", model.norm_eps)
    return _norm(x, weights("final_norm"), model.norm_eps) @ weights("head").T


class _Weights:
    def __init__(self, bundle: Bundle) -> None:
        self.bundle, self.tensors = bundle, bundle.header["tensors"]

    def __call__(self, name: str) -> np.ndarray:
        return self.bundle.dequantise(name).astype(np.float64)


def _norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def _maybe_norm(x: np.ndarray, weights: _Weights, name: str, eps: float) -> np.ndarray:
    return _norm(x, weights(name), eps) if name in weights.tensors else x


def _mlp(weights: _Weights, n: int, x: np.ndarray, dip: Dip | None) -> np.ndarray:
    x = x if dip is None else dip.prune(n, 0, x)
    gate, up = x @ weights(f"layers.{n}.gate").T, x @ weights(f"layers.{n}.up").T
    if weights.bundle.model.activation == "silu":
        gate = gate / (1 + np.exp(-gate))
    else:
        gate = 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
    h = gate * up if dip is None else dip.prune(n, 1, gate * up)
    return h @ weights(f"layers.{n}.down").T


def _attention(weights: _Weights, n: int, x: np.ndarray) -> np.ndarray:
    model, layer = weights.bundle.model, weights.bundle.model.layers[n]
    q, k, v = (_heads(weights, n, x, name) for name in "qkv")  # [heads, T, head_dim]
    for name in ("q_norm", "k_norm"):
        if f"layers.{n}.{name}" in weights.tensors:
            normed = _norm(q if name == "q_norm" else k, weights(f"layers.{n}.{name}"), model.norm_eps)
            q, k = (normed, k) if name == "q_norm" else (q, normed)
    q, k = (_rotate(weights, layer.rope, heads) for heads in (q, k))
    group = model.n_heads // model.n_kv_heads
    k, v = np.repeat(k, group, axis=0), np.repeat(v, group, axis=0)
    scores = q @ k.swapaxes(1, 2) * model.attention_scale
    at = np.arange(len(x))
    distance = at[:, None] - at[None, :]
    hidden = (distance < 0) | ((distance >= layer.window) if layer.window else False)
    scores = np.where(hidden, -np.inf, scores)
    share = np.exp(scores - scores.max(-1, keepdims=True))
    share /= share.sum(-1, keepdims=True)
    out = (share @ v).swapaxes(0, 1).reshape(len(x), -1) @ weights(f"layers.{n}.o").T
    return out + (weights(f"layers.{n}.o_bias") if f"layers.{n}.o_bias" in weights.tensors else 0)


def _heads(weights: _Weights, n: int, x: np.ndarray, name: str) -> np.ndarray:
    out = x @ weights(f"layers.{n}.{name}").T
    if f"layers.{n}.{name}_bias" in weights.tensors:
        out = out + weights(f"layers.{n}.{name}_bias")
    return out.reshape(len(x), -1, weights.bundle.model.head_dim).swapaxes(0, 1)


def _rotate(weights: _Weights, index: int, heads: np.ndarray) -> np.ndarray:
    table = weights.bundle.model.rope[index]
    n_tokens = heads.shape[1]
    is_long = table.long is not None and n_tokens > table.original_context
    angles = np.arange(n_tokens)[:, None] * weights(table.long if is_long else table.short)  # type: ignore[arg-type]
    scale = table.scale_long if is_long else table.scale_short
    cos, sin = np.cos(angles) * scale, np.sin(angles) * scale
    half = table.dim // 2
    a, b, rest = heads[..., :half], heads[..., half : table.dim], heads[..., table.dim :]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)
