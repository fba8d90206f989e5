"""Models of which only the published shape is known, as bundles without weights: for the simulator and the planner.

`models.toml` has the configuration values that their publishers give. A bundle is laid out from them exactly as
packing the checkpoint would (`layout`), so records, scales and DRAM have the sizes that the real one would have;
nothing of it is on a disk, and it cannot be run.
"""

from __future__ import annotations

import difflib
import json
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

import tomli

from dipper.bundle import UNIT_BYTES, Bundle
from dipper.errors import ConfigError
from dipper.glu import LayerConfig, ModelConfig, matrix_shapes, vector_shapes
from dipper.grid import Grid, quantised_grid
from dipper.layout import BaseBits, is_mlp, layout
from dipper.rope import RopeConfig

__all__ = ["names", "published_bundle", "title"]

_VECTORS = ("attn_norm", "mlp_norm", "final_norm")
_BIASES = ("q_bias", "k_bias", "v_bias")


@lru_cache(maxsize=1)
def _models() -> dict[str, dict[str, Any]]:
    return tomli.loads(resources.files("dipper").joinpath("models.toml").read_text(encoding="utf-8"))


def names() -> tuple[str, ...]:
    """The models there are."""
    return tuple(_models())


def title(name: str) -> str:
    """What its publisher calls a model of `names()`."""
    return str(_models()[name]["hf"]).partition("/")[2]


def published_bundle(
    name: str,
    *,
    bits: int = 4,
    other_bits: int = 8,
    max_context: int = 4096,
    base_bits: BaseBits = 0,
    unit_bytes: int = UNIT_BYTES,
) -> Bundle:
    """A model of `models.toml` as the bundle that `dipper pack --bits` would lay out, without weights.

    Args:
        name: one of `names()`.
        bits: of the MLP, 4 or 8.
        other_bits: of attention and head, 4 or 8 (packing makes them 8).
        max_context: positions that the model claims to take.
        base_bits: of the regions, 0 to leave them whole.
        unit_bytes: about what a unit of a split region has.

    Raises:
        ConfigError: an unknown name (the nearest is named) or other bits.
    """
    if name not in _models():
        near = difflib.get_close_matches(name, names(), n=1)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(names())}"
        raise ConfigError(f"there is no model '{name}' among those whose shape is known; {hint}")
    if not {bits, other_bits} <= {4, 8}:
        raise ConfigError(f"bits is {bits}, other_bits {other_bits}: a published shape is laid out with 4 or 8")
    values = _models()[name]
    config = _config(name, values, max_context)
    shapes: dict[str, tuple[int, ...]] = {
        tensor: (length,)
        for tensor, length in vector_shapes(config).items()
        if tensor.rsplit(".", 1)[-1] in _VECTORS + (_BIASES if values.get("qkv_bias", False) else ())
    }
    matrices = matrix_shapes(config)
    if not config.tied:
        matrices["embedding"] = (config.vocab_size, config.hidden_size)
    grids = {
        tensor: quantised_grid(bits if is_mlp(tensor) else other_bits, shape[1]) for tensor, shape in matrices.items()
    }
    if not config.tied:
        grids["embedding"] = Grid(codes="f16")  # as packing keeps it: a row is read whole, whatever its bits
    vectors = {"rope.short": config.head_dim // 2}
    header = layout(config, vectors, {**shapes, **matrices}, grids, base_bits=base_bits, unit_bytes=unit_bytes)
    header["source"] = {"name": values["hf"], "shape_from": values["source"]}
    return Bundle(Path(name), json.loads(json.dumps(header)), config)  # lists, as a header on disk has them


def _config(name: str, values: dict[str, Any], max_context: int) -> ModelConfig:
    sizes = ("n_layers", "hidden_size", "intermediate_size", "n_heads", "n_kv_heads", "head_dim", "vocab_size")
    rope = RopeConfig(
        dim=values["head_dim"], short="rope.short", long=None, original_context=max_context, scale_short=1.0,
        scale_long=1.0,
    )  # fmt: skip
    return ModelConfig(
        architecture="llama",  # what it shares with all of these: names and order of the tensors
        name=name,
        **{size: values[size] for size in sizes},
        max_context=max_context,
        norm_eps=1e-5,
        activation="silu",
        embedding_scale=1.0,
        attention_scale=values["head_dim"] ** -0.5,
        tied=values["tied"],
        rope=(rope,),
        layers=tuple(LayerConfig(rope=0, window=0) for _ in range(values["n_layers"])),
    )
