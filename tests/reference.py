"""What the engine is measured against: transformers in fp32 with a bundle's own weights, and plain DIP on it.

Owns `hf_model_from_bundle` (weights, rope tables, windows and scales of the bundle in a transformers model),
`reference_logits`, and `dip`, which prunes the MLPs of such a model with the engine's exact semantics:
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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
import transformers
from torch import nn

LayerMasks = tuple[np.ndarray, np.ndarray]  # uint8 [T, D], uint8 [T, I]


class WeightSource(Protocol):
    """The part of a `dipper.bundle.Bundle` that a reference needs."""

    header: dict[str, Any]

    def dequantise(self, name: str) -> np.ndarray: ...


# ------------------------------------------------------------------------------------------------ the model


def _hf_config(model: dict[str, Any], has_bias: Callable[[str], bool]) -> transformers.PretrainedConfig:
    """The transformers configuration of a bundle's `model` header. Rope, scales and windows are set on the modules."""
    windows = [layer["window"] for layer in model["layers"]]
    sliding = max(windows)
    if {w for w in windows if w} - {sliding}:
        raise ValueError(f"windows {sorted(set(windows))}: transformers has one sliding window per model")
    layer_types = ["sliding_attention" if w else "full_attention" for w in windows]
    common = {
        "vocab_size": model["vocab_size"],
        "hidden_size": model["hidden_size"],
        "intermediate_size": model["intermediate_size"],
        "num_hidden_layers": model["n_layers"],
        "num_attention_heads": model["n_heads"],
        "num_key_value_heads": model["n_kv_heads"],
        "head_dim": model["head_dim"],
        "max_position_embeddings": model["max_context"],
        "rms_norm_eps": model["norm_eps"],
        "tie_word_embeddings": model["tied"],
        "pad_token_id": None,
    }
    activation = {"silu": "silu", "gelu_tanh": "gelu_pytorch_tanh", "gelu_pytorch_tanh": "gelu_pytorch_tanh"}[
        model["activation"]
    ]
    biased = has_bias("q_bias")
    match model["architecture"]:
        case "llama" if not sliding:
            return transformers.LlamaConfig(hidden_act=activation, attention_bias=biased, **common)
        case "llama":  # the architecture that adds a window to llama, in every layer
            if biased or 0 in windows:
                raise ValueError("no transformers model is a llama with windows in some layers or with biases")
            return transformers.MistralConfig(hidden_act=activation, sliding_window=sliding, **common)
        case "qwen2" | "qwen3" as name:
            qwen = {"use_sliding_window": sliding > 0, "sliding_window": sliding or None, "layer_types": layer_types}
            if name == "qwen2":
                return transformers.Qwen2Config(hidden_act=activation, **qwen, **common)
            return transformers.Qwen3Config(hidden_act=activation, attention_bias=biased, **qwen, **common)
        case "phi3":
            if sliding and 0 in windows:
                raise ValueError("transformers has no phi3 with windows in some layers only")
            return transformers.Phi3Config(hidden_act=activation, sliding_window=sliding or None, **common)
        case "gemma3" | "gemma3_text":
            return transformers.Gemma3TextConfig(
                hidden_activation=activation,
                attention_bias=biased,
                sliding_window=sliding or None,
                layer_types=layer_types,
                **common,
            )
        case unknown:
            raise ValueError(f"no reference for architecture {unknown!r}")


class _BundleRotary(nn.Module):
    """cos and sin from a bundle's inverse frequencies, in place of a model's own rotary module."""

    def __init__(self, tables: dict[str | None, tuple[torch.Tensor, float]]) -> None:
        super().__init__()
        self.tables = tables

    def forward(self, x, position_ids, layer_type=None):
        inv_freq, scale = self.tables[layer_type]
        angles = position_ids[..., None].float() * inv_freq  # [1, T, dim / 2]
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos() * scale, angles.sin() * scale


def _rotary(bundle: WeightSource, config: transformers.PretrainedConfig, context: int) -> _BundleRotary:
    model = bundle.header["model"]

    def table(index: int) -> tuple[torch.Tensor, float]:
        rope = model["rope"][index]
        is_long = rope["long"] is not None and context > rope["original_context"]
        inv_freq = torch.from_numpy(np.array(bundle.dequantise(rope["long" if is_long else "short"]), np.float32))
        return inv_freq, rope["scale_long" if is_long else "scale_short"]

    if model["architecture"] not in ("gemma3", "gemma3_text"):
        used = {layer["rope"] for layer in model["layers"]}
        if len(used) != 1:
            raise ValueError(f"layers use rope tables {sorted(used)}; this architecture has one in transformers")
        return _BundleRotary({None: table(used.pop())})
    by_type: dict[str | None, tuple[torch.Tensor, float]] = {}
    for layer_type, layer in zip(config.layer_types, model["layers"], strict=True):
        by_type[layer_type] = table(layer["rope"])
    return _BundleRotary(by_type)


def _state(bundle: WeightSource, gemma: bool, fused: bool, names: set[str]) -> Iterator[tuple[str, np.ndarray]]:
    """(transformers name, fp32 weight) of every parameter."""
    model = bundle.header["model"]
    get = bundle.dequantise
    norm_shift = np.float32(1.0 if gemma else 0.0)  # transformers multiplies by 1 + w, a bundle stores the factor

    head = get("head")
    yield "lm_head.weight", head
    yield "model.embed_tokens.weight", head if model["tied"] else get("embedding")
    yield "model.norm.weight", get("final_norm") - norm_shift
    norms = {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    if gemma:
        norms = {
            "attn_norm": "input_layernorm",
            "post_attn_norm": "post_attention_layernorm",
            "mlp_norm": "pre_feedforward_layernorm",
            "post_mlp_norm": "post_feedforward_layernorm",
        }
    for n in range(model["n_layers"]):
        ours, theirs = f"layers.{n}.", f"model.layers.{n}."
        for name, hf_name in norms.items():
            yield f"{theirs}{hf_name}.weight", get(ours + name) - norm_shift
        if fused:
            yield f"{theirs}self_attn.qkv_proj.weight", np.concatenate([get(ours + p) for p in "qkv"])
            yield f"{theirs}self_attn.o_proj.weight", get(ours + "o")
            yield f"{theirs}mlp.gate_up_proj.weight", np.concatenate([get(ours + "gate"), get(ours + "up")])
        else:
            for p in "qkvo":
                yield f"{theirs}self_attn.{p}_proj.weight", get(ours + p)
                if f"{ours}{p}_bias" in names:
                    yield f"{theirs}self_attn.{p}_proj.bias", get(f"{ours}{p}_bias")
            for p in ("gate", "up"):
                yield f"{theirs}mlp.{p}_proj.weight", get(ours + p)
        yield f"{theirs}mlp.down_proj.weight", get(ours + "down")
        for p in ("q_norm", "k_norm"):
            if ours + p in names:
                yield f"{theirs}self_attn.{p}.weight", get(ours + p) - norm_shift


def hf_model_from_bundle(
    bundle: WeightSource, *, context: int | None = None, attention: str = "eager"
) -> transformers.PreTrainedModel:
    """A transformers model in fp32 that holds the bundle's dequantised weights and rope tables.

    Args:
        bundle: an open bundle (`header`, `dequantise(name)`).
        context: the session's context, which chooses between short and long rope tables; the model's own when None.
        attention: transformers' attention implementation, "eager" or "sdpa".

    Raises:
        ValueError: the header describes a model that transformers cannot express.
    """
    header = bundle.header["model"]
    names = set(bundle.header["tensors"])
    config = _hf_config(header, lambda bias: f"layers.0.{bias}" in names)
    config._attn_implementation = attention
    with torch.device("meta"):  # no weight is initialised only to be replaced
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation=attention
        )
    gemma = header["architecture"] in ("gemma3", "gemma3_text")
    state = {}
    for name, weight in _state(bundle, gemma, header["architecture"] == "phi3", names):
        state[name] = torch.from_numpy(np.ascontiguousarray(weight, np.float32))
    missing, unexpected = model.load_state_dict(state, assign=True, strict=False)
    for name in missing:  # an architecture that always has a bias, a bundle without: the bias is zero
        if not name.endswith("_proj.bias"):
            raise ValueError(f"the bundle has no {name}")
        module = model.get_submodule(name.removesuffix(".bias"))
        module.bias = nn.Parameter(torch.zeros(module.out_features))
    if unexpected:
        raise ValueError(f"transformers' {config.model_type} has no {unexpected[0]}")
    model.model.rotary_emb = _rotary(bundle, config, context or header["max_context"])
    if gemma:
        model.model.embed_tokens.embed_scale = torch.tensor(header["embedding_scale"], dtype=torch.float32)
    elif header["embedding_scale"] != 1.0:
        raise ValueError(f"embedding_scale {header['embedding_scale']} on an architecture that does not scale")
    for layer in model.model.layers:
        layer.self_attn.scaling = header["attention_scale"]
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise ValueError(f"{name} was left without values")
        tensor.requires_grad_(False)
    return model.eval()


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
