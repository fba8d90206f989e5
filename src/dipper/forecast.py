"""How long a decoded token should take under a plan on a device, for the methods whose reads are known before.

The simulator's times, with expected reads in place of counted ones: a refined region waits for what its reads take
longer than its products, plus the products of its last block; what is streamed whole depends on nothing and has the
whole token, so a token takes the longer of all reads and of products with the waits of refined regions.

    forecast(bundle, plan, Device.load("here.toml")).token_s
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .budget import Plan
from .bundle import Bundle
from .device import Device
from .dram_plan import RegionPlan
from .reads import Reads
from .touched import LAST_BLOCK, model_parts, products_s

__all__ = ["Forecast", "forecast"]


@dataclass(frozen=True)
class Forecast:
    """Seconds of a token: all of it, its reads alone, its products alone."""

    token_s: float
    io_s: float
    products_s: float


def forecast(bundle: Bundle, plan: Plan, device: Device) -> Forecast:
    """Of a plan whose reads do not depend on hits (not dip and dip-ca). Keys and values are left out."""
    compute, parts = device.compute, model_parts(bundle)
    others = float(
        products_s(device, compute.attention_gweights_per_s, *parts["attention"])
        + products_s(device, compute.head_gweights_per_s, *parts["head"])
    )
    gemv = [
        1e-6 * compute.region_us + float(products_s(device, None, *_touched(region, held, int(scale_bytes))))
        for region, held, scale_bytes in zip(bundle.header["regions"], plan.regions, parts["scale_bytes"], strict=True)
    ]
    products = others + sum(gemv)
    selecting_s = 1e-6 * compute.token_us
    wait_s = batches_s = 0.0
    streamed = total = Reads()
    for held, own_s, n_columns in zip(plan.regions, gemv, parts["n_columns"], strict=True):
        total += held.reads
        if held.held == "streamed":
            streamed += held.reads
        elif held.held == "refined":
            io_s = float(device.flash.batch_s(held.reads.n, held.reads.bytes))
            last_s = own_s * min(1.0, LAST_BLOCK / n_columns)
            wait_s += max(0.0, io_s + last_s - own_s) if io_s > 0 else 0.0
            batches_s += io_s
            selecting_s += 1e-6 * compute.select_us_per_region + 1e-9 * compute.select_ns_per_column * n_columns
    selecting_s += 1e-6 * compute.submit_us_per_read * total.n
    io_s = batches_s + (device.flash.stream_s(streamed.n, streamed.bytes) if streamed.bytes else 0.0)
    io_s = max(io_s, device.flash.sustained_s(total.n, total.bytes))
    return Forecast(float(max(io_s, products + selecting_s + wait_s)), io_s, products)


def _touched(region: dict[str, Any], held: RegionPlan, scale_bytes: int) -> tuple[float, float]:
    """Weights multiplied and bytes of DRAM read: of a refined region bases of all columns, and residuals of some."""
    weights = region["n_columns"] * sum(matrix["rows"] for matrix in region["matrices"])
    base_bytes = 0 if region["base"] is None else region["base"]["bytes"]
    share = min(1.0, (held.slots + held.fetch) / held.n_units) if held.held == "refined" else 1.0
    passes = 1 + share if held.held == "refined" else 1.0
    return passes * weights, base_bytes + share * region["bytes"] + scale_bytes
