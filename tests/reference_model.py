"""A transformer in plain numpy over a `Bundle`: what a header means, written once more, slowly, as an oracle."""

from __future__ import annotations

import numpy as np

from dipper.bundle import Bundle


def logits(bundle: Bundle, token_ids: list[int]) -> np.ndarray:
    """fp64 logits ``[T, V]`` of a prompt, with every weight used."""
    model = bundle.model
    weights = _Weights(bundle)
    x = bundle.embedding_rows(np.array(token_ids)).astype(np.float64) * model.embedding_scale
    for n in range(model.n_layers):
        branch = _attention(weights, n, _norm(x, weights(f"layers.{n}.attn_norm"), model.norm_eps))
        x = x + _maybe_norm(branch, weights, f"layers.{n}.post_attn_norm", model.norm_eps)
        branch = _mlp(weights, n, _norm(x, weights(f"layers.{n}.mlp_norm"), model.norm_eps))
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


def _mlp(weights: _Weights, n: int, x: np.ndarray) -> np.ndarray:
    gate, up = x @ weights(f"layers.{n}.gate").T, x @ weights(f"layers.{n}.up").T
    if weights.bundle.model.activation == "silu":
        gate = gate / (1 + np.exp(-gate))
    else:
        gate = 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
    return (gate * up) @ weights(f"layers.{n}.down").T


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
