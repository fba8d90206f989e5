"""Rotary position embedding: inverse frequencies under every scaling that checkpoints ask for.

A table is a vector of inverse frequencies (radians a position; element i of a head is paired with i + dim/2) and a
factor on cos and sin. Parameters carry Hugging Face's names; `glu` brings GGUF metadata to them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from dipper.grid import F32

__all__ = ["Rope", "RopeConfig", "name_tables", "rope_table"]


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """One rotary table: names of its inverse-frequency vectors, factors on cos and sin (bundle format, section 5)."""

    dim: int
    short: str
    long: str | None
    original_context: int
    scale_short: float
    scale_long: float


@dataclass(frozen=True)
class Rope:
    """Inverse frequencies [dim/2] and the factors on cos and sin, up to and beyond `original_context`."""

    short: F32
    long: F32 | None = None
    original_context: int = 0
    scale_short: float = 1.0
    scale_long: float = 1.0


def rope_table(params: dict[str, Any], dim: int, max_context: int) -> Rope:
    """The table that ``params`` describe.

    Args:
        params: `rope_theta`, `rope_type` and what that type needs; `freq_factors`, where given, divide the frequencies.
        dim: rotated elements of a head.
        max_context: positions the model was made for.

    Raises:
        ValueError: the scaling is unknown, or its factors do not fit ``dim``.
        KeyError: a parameter that the scaling needs is missing.
    """
    kind = params.get("rope_type", params.get("type", "default"))
    inverse = params["rope_theta"] ** -(np.arange(0, dim, 2, dtype=np.float64) / dim)
    if "freq_factors" in params:
        inverse = inverse / _factors(params["freq_factors"], dim)
    if kind == "default":
        return Rope(inverse.astype(np.float32))
    if kind == "linear":
        return Rope((inverse / params["factor"]).astype(np.float32))
    if kind == "llama3":
        return Rope(_llama3(inverse, params).astype(np.float32))
    if kind == "yarn":
        return _yarn(inverse, params, dim, max_context)
    if kind in ("longrope", "su"):
        return _longrope(inverse, params, dim, max_context)
    raise ValueError(f"RoPE scaling {kind!r} is not one of default, linear, llama3, yarn, longrope")


def _factors(values: Any, dim: int) -> Any:
    factors = np.asarray(values, np.float64)
    if factors.shape != (dim // 2,) or not (factors > 0).all():
        raise ValueError(f"{factors.size} RoPE factors for {dim // 2} frequencies, or one that is not positive")
    return factors


def _llama3(inverse: Any, params: dict[str, Any]) -> Any:
    """Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, those between blended."""
    low, high = params["low_freq_factor"], params["high_freq_factor"]
    turns = params["original_max_position_embeddings"] * inverse / (2 * math.pi)  # turns within the trained context
    keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return inverse * (keep + (1 - keep) / params["factor"])


def _yarn(inverse: Any, params: dict[str, Any], dim: int, max_context: int) -> Rope:
    """YaRN: a ramp over the elements between kept and stretched frequencies, and a longer cos and sin."""
    original = params.get("original_max_position_embeddings") or max_context
    factor = params.get("factor") or max_context / original

    def element(turns: float) -> float:
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(params["rope_theta"]))

    low, high = element(params.get("beta_fast") or 32), element(params.get("beta_slow") or 1)
    if params.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    stretched = np.clip((np.arange(dim // 2) - low) / max(high - low, 0.001), 0, 1)
    scale = params.get("attention_factor")
    if scale is None:
        mscale, all_dim = params.get("mscale"), params.get("mscale_all_dim")
        scale = _mscale(factor, mscale) / _mscale(factor, all_dim) if mscale and all_dim else _mscale(factor, 1)
    return Rope(
        (inverse * (1 - stretched + stretched / factor)).astype(np.float32), scale_short=scale, scale_long=scale
    )


def _mscale(factor: float, weight: float) -> float:
    return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0


def _longrope(inverse: Any, params: dict[str, Any], dim: int, max_context: int) -> Rope:
    original = params.get("original_max_position_embeddings") or max_context
    factor = params.get("factor") or max_context / original
    scale = params.get("attention_factor")
    if scale is None:
        scale = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    short, long = (inverse / _factors(params[name], dim) for name in ("short_factor", "long_factor"))
    return Rope(short.astype(np.float32), long.astype(np.float32), int(original), scale, scale)


def name_tables(ropes: list[Rope]) -> tuple[tuple[RopeConfig, ...], dict[str, F32]]:
    """A bundle's `rope` entries for tables, and the vectors they name."""
    configs, vectors = [], {}
    for index, rope in enumerate(ropes):
        short, long = f"rope.{index}", f"rope.{index}.long" if rope.long is not None else None
        vectors[short] = rope.short
        if long is not None and rope.long is not None:
            vectors[long] = rope.long
        configs.append(
            RopeConfig(
                dim=2 * len(rope.short),
                short=short,
                long=long,
                original_context=rope.original_context,
                scale_short=float(rope.scale_short),
                scale_long=float(rope.scale_long),
            )
        )
    return tuple(configs), vectors
