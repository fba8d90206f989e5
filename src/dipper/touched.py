"""What a decoded token touches of a model, in weights and bytes, and how long its products take on a device."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from . import _core
from .budget import KV_CODES
from .bundle import Bundle
from .device import Device

__all__ = ["LAST_BLOCK", "kv_read_bytes", "model_parts", "products_s", "touched_bytes"]

LAST_BLOCK = 32  # columns whose products follow the last read


def model_parts(bundle: Bundle) -> dict[str, Any]:
    """Weights and bytes that a token touches: (weights, bytes) of attention and head; arrays by region of the MLP."""
    parts = {"attention": [0, 0], "head": [0, 0]}  # weights, bytes
    for name, entry in bundle.header["tensors"].items():
        if entry["kind"] == "matrix":
            part = parts["head" if name == "head" else "attention"]
            part[0] += entry["shape"][0] * entry["shape"][1]
            part[1] += entry["bytes"] + sum(span["bytes"] for span in entry["scales"].values())
    regions, model = bundle.header["regions"], bundle.model
    return {
        **parts,
        "n_columns": np.array([r["n_columns"] for r in regions]),
        "column_bytes": np.array([r["record_bytes"] + _base_bytes(r) for r in regions]),  # bases included
        "base_bytes": np.array([_base_bytes(r) for r in regions]),
        "column_weights": np.array([sum(m["rows"] for m in r["matrices"]) for r in regions]),
        "scale_bytes": np.array(
            [sum(s["bytes"] for m in r["matrices"] for n, s in m["scales"].items() if n != "tier") for r in regions]
        ),
        "kv_bytes": {  # of a position in a layer
            kv: model.n_kv_heads * _core.kv_position_bytes(kv, model.head_dim) for kv in KV_CODES
        },
        "macs": bundle.mlp_weights + parts["attention"][0],  # of a token in prefill, the head aside
    }


def _base_bytes(region: dict[str, Any]) -> int:
    """Of a column's base."""
    return 0 if region["base"] is None else int(region["base"]["record_bytes"])


def touched_bytes(
    bundle: Bundle, parts: dict[str, Any], used: npt.ArrayLike, positions: npt.ArrayLike, kv: str
) -> dict[str, float]:
    """Bytes of DRAM that a decoded token must touch, by the part of the ledger that does; a mean over tokens.

    Codes of all matrices, of the MLP those of the columns used, and all scales: a block's belong to each of its
    columns. Keys and values are attention's. Small and left out: norms, activations, embedding rows, a calibration.

    Args:
        bundle: whose weights.
        parts: its `model_parts`.
        used: columns by region.
        positions: that a token attends to; of each token, or their mean.
        kv: how keys and values are kept.
    """
    mlp = np.asarray(used) * parts["column_bytes"] + parts["scale_bytes"]
    return {
        "gemv": float(mlp.sum()),
        "attention": parts["attention"][1] + kv_read_bytes(bundle, parts, positions, kv),
        "head": float(parts["head"][1]),
    }


def kv_read_bytes(bundle: Bundle, parts: dict[str, Any], positions: npt.ArrayLike, kv: str) -> float:
    """Keys and values that a token reads, of as many positions as each layer's window lets it see."""
    windows = [layer.window or np.inf for layer in bundle.model.layers]
    seen = np.minimum.outer(np.atleast_1d(positions), windows)  # [positions, layers]
    return float(seen.mean(axis=0).sum() * parts["kv_bytes"][kv])


def products_s(
    device: Device, gweights_per_s: float | None, weights: npt.ArrayLike, n_bytes: npt.ArrayLike
) -> npt.NDArray[np.float64]:
    """Seconds of products: as fast as the processor multiplies and DRAM gives the bytes."""
    rate = gweights_per_s or device.compute.gemv_gweights_per_s
    return np.maximum(np.asarray(weights) / (1e9 * rate), np.asarray(n_bytes) / (1e9 * device.dram.gbps))
