"""Seconds from counts: what a setting would take on a device, by the parts of the engine's ledger.

Counts come from a `Workload`, seconds from a `Device`, with the engine's overlap: a pruned region waits for what its
reads take longer than its products, plus the products of its last block; dense streaming, whose reads depend on
nothing, takes the longer of all reads and all products. A refined region waits as a pruned one does, and where other
regions stream beside it a token takes as long as all reads together at least. Nothing here reads a disk or a clock.

    workload = ModelWorkload(bundle, prompt, n_tokens=128)
    settings = [Setting.plan_for(bundle, EngineConfig(density=0.6, mlp_dram=share)) for share in ("40%", "60%")]
    for setting, traffic in zip(settings, workload.traffic(settings)):
        sim_record(workload, setting, traffic, Device.load("snapdragon-8-gen-3")).tok_per_s
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from .budget import EngineConfig
from .device import Compute, Device
from .errors import BudgetError
from .records import LEDGER, SimRecord, provenance
from .touched import LAST_BLOCK, kv_read_bytes, model_parts, products_s, touched_bytes
from .workload import Setting, Traffic, Workload, embedding_reads

__all__ = [
    "Prediction",
    "check_fits",
    "miss_curve_split",
    "predict",
    "sim_record",
]

_F64 = npt.NDArray[np.float64]


# ------------------------------------------------------------------------------------------------ seconds


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Seconds of a decode, by the parts of the engine's ledger, and what bounds it.

    Attributes:
        n_tokens: decoded.
        ledger_s: over all of them.
        ttft_s: prefill, one token's head included.
        io_s: what the reads alone take; products_s: what all products alone take.
        sustained_s: what the disk's limits in the long run ask for; in the ledger's wait where it is longer.
    """

    n_tokens: int
    ledger_s: dict[str, float]
    ttft_s: float
    io_s: float
    products_s: float
    sustained_s: float
    joules_per_token: float | None

    @property
    def decode_s(self) -> float:
        """Of all decoded tokens."""
        return sum(self.ledger_s.values())

    @property
    def tok_per_s(self) -> float:
        """Decoded tokens a second."""
        return self.n_tokens / self.decode_s


def predict(setting: Setting, traffic: Traffic | None, device: Device, *, n_prompt: int, n_tokens: int) -> Prediction:
    """Seconds of a decode on a device.

    Args:
        setting: what is run.
        traffic: counts of the decode; None for the dense methods.
        device: where.
        n_prompt, n_tokens: tokens processed before the first, and decoded.
    """
    parts = model_parts(setting.bundle)
    positions = n_prompt + (n_tokens - 1) / 2  # mean position of a decoded token
    kv = kv_read_bytes(setting.bundle, parts, positions, setting.config.kv)
    ledger = dict.fromkeys(LEDGER, 0.0)
    compute = device.compute
    attention_s = float(products_s(device, compute.attention_gweights_per_s, *parts["attention"]))
    ledger["attention"] = n_tokens * (attention_s + kv / (1e9 * device.dram.gbps))
    ledger["head"] = n_tokens * float(products_s(device, compute.head_gweights_per_s, *parts["head"]))
    ledger["rest"] = n_tokens * 1e-6 * compute.token_us
    if traffic is None:
        io_s, n_reads, n_bytes = _dense(setting, device, parts, n_tokens, ledger)
    elif setting.config.method == "planes":
        io_s, n_reads, n_bytes = _refined(setting, traffic, device, parts, ledger)
    else:
        io_s, n_reads, n_bytes = _sparse(traffic, device, parts, ledger)
    sustained_s = device.flash.sustained_s(n_reads, n_bytes)
    ledger["wait"] += max(0.0, sustained_s - sum(ledger.values()))
    used = parts["n_columns"] if traffic is None else traffic.selected.mean(axis=0)
    if traffic is not None and setting.config.method == "planes":
        # Bytes of columns, as whole ones: all bases and the residuals used.
        bases = parts["base_bytes"] / parts["column_bytes"]
        used = parts["n_columns"] * bases + _refined_columns(setting, traffic).mean(axis=0) * (1 - bases)
    dram = sum(touched_bytes(setting.bundle, parts, used, positions, setting.config.kv).values())
    return Prediction(
        n_tokens=n_tokens,
        ledger_s=ledger,
        ttft_s=_ttft_s(setting, device, parts, n_prompt),
        io_s=io_s,
        products_s=ledger["gemv"] + ledger["attention"] + ledger["head"],
        sustained_s=sustained_s,
        joules_per_token=_joules(device, dram, n_bytes / n_tokens),
    )


def _sparse(
    traffic: Traffic, device: Device, parts: dict[str, Any], ledger: dict[str, float]
) -> tuple[float, float, float]:
    """Adds a pruned decode to the ledger; (seconds of its reads alone, reads, bytes)."""
    compute: Compute = device.compute
    gemv = 1e-6 * compute.region_us + products_s(
        device,
        None,
        traffic.selected * parts["column_weights"],
        traffic.selected * parts["column_bytes"] + parts["scale_bytes"],
    )  # [T, regions]
    io = device.flash.batch_s(traffic.reads, traffic.flash_bytes)
    last = gemv * np.minimum(1.0, LAST_BLOCK / traffic.selected)
    ledger["gemv"] += float(gemv.sum())
    ledger["wait"] += float(np.where(io > 0, np.maximum(0.0, io + last - gemv), 0.0).sum())
    select = 1e-6 * compute.select_us_per_region + 1e-9 * (
        compute.select_ns_per_column * parts["n_columns"] + compute.select_ns_per_miss * traffic.misses
    )
    copied = 0.0 if compute.copy_gbps is None else (traffic.admissions * parts["column_bytes"]).sum()
    ledger["select"] += float(select.sum()) + (copied / (1e9 * compute.copy_gbps) if compute.copy_gbps else 0.0)
    ledger["submit"] += 1e-6 * compute.submit_us_per_read * float(traffic.reads.sum())
    rows = device.flash.batch_s(traffic.embedding_reads, traffic.embedding_bytes)
    ledger["rest"] += float(rows.sum())
    totals = traffic.totals
    return float(io.sum() + rows.sum()), totals["reads"], totals["flash_bytes"]


def _refined_columns(setting: Setting, traffic: Traffic) -> _F64:
    """Columns [T, regions] that are used with their residuals: cached and fetched ones, or all of what is used whole.

    A cache of planes is full from the start, and a last unit with fewer columns counts as the others do.
    """
    regions = setting.bundle.header["regions"]
    n_columns = np.array([r["n_columns"] for r in regions])
    per_unit = np.array([r["columns_per_unit"] for r in regions])
    used = np.minimum((np.array(setting.capacity) + traffic.misses) * per_unit, n_columns)
    columns: _F64 = np.where(np.array(setting.plan.options["refined"], bool), used, n_columns).astype(np.float64)
    return columns


def _refined(
    setting: Setting, traffic: Traffic, device: Device, parts: dict[str, Any], ledger: dict[str, float]
) -> tuple[float, float, float]:
    """Adds a decode of planes to the ledger; (seconds of its reads alone, reads, bytes).

    Products with bases are made for all columns, those with residuals for the refined ones, at the speed of as many
    weights each; a region without bases has no others.
    """
    compute, n_columns, columns = device.compute, parts["n_columns"], _refined_columns(setting, traffic)
    has_base, refined = parts["base_bytes"] > 0, np.array(setting.plan.options["refined"], bool)
    weights = (n_columns * has_base + columns) * parts["column_weights"]
    n_bytes = n_columns * parts["base_bytes"] + columns * (parts["column_bytes"] - parts["base_bytes"])
    gemv = 1e-6 * compute.region_us + products_s(device, None, weights, n_bytes + parts["scale_bytes"])  # [T, regions]
    io = np.where(refined, device.flash.batch_s(traffic.reads, traffic.flash_bytes), 0.0)
    last = gemv * np.minimum(1.0, LAST_BLOCK / n_columns)
    ledger["gemv"] += float(gemv.sum())
    ledger["wait"] += float(np.where(io > 0, np.maximum(0.0, io + last - gemv), 0.0).sum())
    select = refined * (
        1e-6 * compute.select_us_per_region
        + 1e-9 * (compute.select_ns_per_column * n_columns + compute.select_ns_per_miss * traffic.misses)
    )
    unit_bytes = np.array([region["unit_bytes"] for region in setting.bundle.header["regions"]])
    copied = (traffic.admissions * unit_bytes).sum()
    ledger["select"] += float(select.sum()) + (copied / (1e9 * compute.copy_gbps) if compute.copy_gbps else 0.0)
    n_reads = traffic.reads.sum() + traffic.n_tokens * traffic.stream_reads
    ledger["submit"] += 1e-6 * compute.submit_us_per_read * float(n_reads)
    rows = device.flash.batch_s(traffic.embedding_reads, traffic.embedding_bytes)
    ledger["rest"] += float(rows.sum())
    stream_s = traffic.n_tokens * device.flash.stream_s(traffic.stream_reads, traffic.stream_bytes)
    io_s = float(io.sum() + rows.sum()) + (stream_s if traffic.stream_reads else 0.0)
    if traffic.stream_reads:  # it runs on beside the other reads, which have the same disk
        ledger["wait"] += max(0.0, io_s - sum(ledger.values()))
    totals = traffic.totals
    return io_s, totals["reads"], totals["flash_bytes"]


def _dense(
    setting: Setting, device: Device, parts: dict[str, Any], n_tokens: int, ledger: dict[str, float]
) -> tuple[float, float, float]:
    """Adds a dense decode: reads run ahead of use, so the longer of all reads and all products counts."""
    n_columns = parts["n_columns"]
    gemv = (
        1e-6 * device.compute.region_us * len(n_columns)
        + products_s(
            device, None, n_columns * parts["column_weights"], n_columns * parts["column_bytes"] + parts["scale_bytes"]
        ).sum()
    )
    ledger["gemv"] += n_tokens * float(gemv)
    reads, n_bytes = setting.plan.stream_reads, setting.plan.stream_bytes
    rows, row_bytes = (int(x[0]) for x in embedding_reads(setting, None, 1))
    ledger["rest"] += n_tokens * float(device.flash.batch_s(rows, row_bytes))
    ledger["submit"] += n_tokens * 1e-6 * device.compute.submit_us_per_read * reads
    io_s = n_tokens * device.flash.stream_s(reads, n_bytes)
    ledger["wait"] += max(0.0, io_s - sum(ledger.values()))
    return io_s, n_tokens * (reads + rows), n_tokens * (n_bytes + row_bytes)


def _ttft_s(setting: Setting, device: Device, parts: dict[str, Any], n_prompt: int) -> float:
    """Prefill: a block of tokens streams what is not held once, and multiplies it while the rest is read."""
    plan, seconds = setting.plan, 0.0
    stream = plan.stream_reads, plan.stream_bytes
    io_s = max(device.flash.stream_s(*stream), device.flash.sustained_s(*stream))
    for first in range(0, n_prompt, setting.block_tokens):
        n = min(setting.block_tokens, n_prompt - first)
        seconds += max(io_s, n * parts["macs"] / (1e9 * device.compute.gemm_gmacs_per_s))
    return seconds + float(products_s(device, device.compute.head_gweights_per_s, *parts["head"]))


def _joules(device: Device, dram_bytes: float, flash_bytes: float) -> float | None:
    """Of the bytes that a token moves; None where the device's figures are not known."""
    dram, flash = device.energy.dram_pj_per_byte, device.energy.flash_pj_per_byte
    if dram is None or flash is None:
        return None
    return 1e-12 * (dram * (dram_bytes + flash_bytes) + flash * flash_bytes)


# ------------------------------------------------------------------------------------------------ a result


def _density(config: EngineConfig) -> float | None:
    """Of the MLP, exact where no split was given."""
    if not config.prunes:
        return None
    return config.density if config.d_in is None else (2 * config.densities[0] + config.densities[1]) / 3


def sim_record(workload: Workload, setting: Setting, traffic: Traffic | None, device: Device) -> SimRecord:
    """Everything that one setting would do on one device, beside the same with flat bandwidth."""
    sizes = {"n_prompt": workload.n_prompt, "n_tokens": workload.n_tokens}
    found = predict(setting, traffic, device, **sizes)
    free = replace(device, flash=device.flash.flat, compute=replace(device.compute, submit_us_per_read=0.0))
    flat = predict(setting, traffic, free, **sizes)
    config = setting.config
    if traffic is None:
        rows, row_bytes = (int(x[0]) for x in embedding_reads(setting, None, 1))
        totals = {"hits": 0, "misses": 0}
        totals["reads"] = (setting.plan.stream_reads + rows) * found.n_tokens
        totals["flash_bytes"] = (setting.plan.stream_bytes + row_bytes) * found.n_tokens
    else:
        totals = traffic.totals
    looked_up = totals["hits"] + totals["misses"]
    described = {"kind": "dense"} if traffic is None else workload.describe(setting)
    shares: tuple[float | None, float | None] = (None, None)
    if config.method == "planes":
        shares = setting.plan.fetched_shares if config.io_budget else config.fetches
    return SimRecord(
        model=setting.bundle.model.name,
        device=device.name,
        method=config.method,
        density=_density(config),
        d_in=config.densities[0] if config.prunes else None,
        d_glu=config.densities[1] if config.prunes else None,
        gamma=config.effective_gamma if config.prunes else None,
        cache=setting.cache if config.selects else None,
        split="given" if config.split is not None else "uniform",
        tok_per_s=found.tok_per_s,
        tok_per_s_flat=flat.tok_per_s,
        ttft_s=found.ttft_s,
        hit_rate=totals["hits"] / looked_up if looked_up else None,
        flash_bytes_per_token=totals["flash_bytes"] / found.n_tokens,
        reads_per_token=totals["reads"] / found.n_tokens,
        dram_bytes=dict(setting.plan.parts),
        dram_budget_bytes=setting.plan.budget_bytes,
        mlp_bits_per_weight=setting.plan.mlp_bits_per_weight,
        cached_fraction=setting.plan.cached_fraction,
        joules_per_token=found.joules_per_token,
        ledger_s=found.ledger_s,
        io_s=found.io_s,
        products_s=found.products_s,
        sustained_s=found.sustained_s,
        n_prompt=workload.n_prompt,
        n_tokens=found.n_tokens,
        fetch=shares[0],
        fetch_glu=shares[1],
        read_cost=config.read_cost,
        workload=described,
        notes=[config.fetches_told(setting.plan.fetched_shares)] if config.method == "planes" else [],
        provenance=provenance(setting.bundle.path),
    )


def check_fits(setting: Setting, device: Device) -> None:
    """Refuses what the device's DRAM cannot hold.

    Raises:
        BudgetError: it names both sizes.
    """
    total = setting.plan.total_bytes
    if total > device.dram.bytes:
        raise BudgetError(
            f"{setting.config.method} holds {total / 1e6:.0f} MB here, and {device.name} has "
            f"{device.dram.bytes / 1e6:.0f} MB of DRAM: lower --dram, --mlp-dram or --ctx, or use --method "
            "dense-stream, dip or dip-ca"
        )


# ------------------------------------------------------------------------------------------------ capacities


def miss_curve_split(
    workload: Workload, setting: Setting, device: Device, *, steps: int = 16
) -> tuple[tuple[float, ...], _F64]:
    """Slots where they save the most time: each region's read time against its capacity, shared out greedily.

    The curve of a region is its reads' seconds at capacities 0, 1/steps, ..., 1 of its columns under the setting's
    policy. Slots are then given to the region whose lower convex hull falls most a byte, which is the best sum of
    convex curves for the bytes spent.

    Args:
        workload: at gamma = 1, or `generated`.
        setting: whose room for slots is shared out.
        device: whose reads are timed.
        steps: points of a curve.

    Returns:
        Weights by region, for `EngineConfig.split`; the curves [steps + 1, regions], seconds a token.
    """
    regions = setting.bundle.header["regions"]
    shares = np.linspace(0.0, 1.0, steps + 1)
    settings = [setting.with_shares([share] * len(regions)) for share in shares]
    curves = np.stack(
        [device.flash.batch_s(t.reads, t.flash_bytes).mean(axis=0) for t in workload.traffic(settings)]
    )  # [steps + 1, regions]
    room = sum(c * r["record_bytes"] for c, r in zip(setting.capacity, regions, strict=True))
    held = np.zeros(len(regions))
    heap = [step for r in range(len(regions)) if (step := _next_step(curves, shares, regions, r, 0)) is not None]
    heapq.heapify(heap)
    while heap and room > 0:
        _, r, i = heapq.heappop(heap)
        slot_bytes = regions[r]["n_columns"] * regions[r]["record_bytes"]
        # Whole columns: what is left of the room for less than one is nobody's.
        taken = int(min(shares[i] - held[r], room / slot_bytes) * regions[r]["n_columns"]) / regions[r]["n_columns"]
        held[r] += taken
        room -= taken * slot_bytes
        if held[r] + 1 / regions[r]["n_columns"] < shares[i]:
            break
        if (step := _next_step(curves, shares, regions, r, i)) is not None:
            heapq.heappush(heap, step)
    if not held.any():
        raise BudgetError("no region reads less with a larger cache, or there is no room for slots: raise the budget")
    return tuple(float(h) for h in held), curves


def _next_step(
    curves: _F64, shares: _F64, regions: Sequence[dict[str, Any]], r: int, at: int
) -> tuple[float, int, int] | None:
    """The step along a region's lower convex hull: (seconds a byte, negative; region; index it leads to)."""
    if at + 1 >= len(shares):
        return None
    n_bytes = (shares[at + 1 :] - shares[at]) * regions[r]["n_columns"] * regions[r]["record_bytes"]
    slopes = (curves[at + 1 :, r] - curves[at, r]) / n_bytes
    best = int(np.argmin(slopes))
    return None if slopes[best] >= 0 else (float(slopes[best]), r, at + 1 + best)
