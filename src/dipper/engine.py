"""The engine: a bundle, a DRAM budget and a method become a plan, then a native decoder that keeps to it.

`Engine.open` does, in this order: read the header, measure the host (what the process holds before any weight), plan
every byte, hand the plan to the caller, allocate and load. A budget that is too small is refused before anything is
loaded.

Methods:
    dense-resident   every weight in DRAM
    dense-stream     as many regions of the MLP pinned as the budget allows, the rest streamed by large reads,
                     double-buffered
    dip              Dynamic Input Pruning: top-k columns by |x|, column caches, misses read from flash
                     (arXiv 2412.01380)
    dip-ca           the same with Cache-Aware Masking: scores of uncached columns times gamma

Example:
    >>> config = EngineConfig(method="dip", density=0.7, mlp_dram="50%")        # doctest: +SKIP
    >>> with Engine.open("smollm2.dipper", config) as engine:                   # doctest: +SKIP
    ...     logits = engine.prefill([1, 2, 3])
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from . import _core
from .bundle import Bundle
from .cache import n_selected
from .calibration import Calibration
from .errors import BudgetError, BundleError, ConfigError

__all__ = ["METHODS", "Counters", "Engine", "EngineConfig", "Plan", "parse_bytes", "plan_run", "rss_bytes"]

METHODS = ("dense-resident", "dense-stream", "dip", "dip-ca")
CACHES = ("lru", "lfu", "lfu-decay", "static")
READERS = ("auto", "io_uring", "pread")
DEFAULT_GAMMA = 0.5  # of dip-ca
DEFAULT_MLP_DRAM = "50%"

# Tried in this order until the budget holds: tokens a prefill block, buffers of the weight ring.
_BLOCKS_AND_SLOTS = ((256, 8), (64, 8), (64, 4), (16, 4), (16, 2))
_CHUNK_BYTES = 1 << 20
_SLOT_BOOK_BYTES = 20  # of a slot beside its record: `ColumnCache::bytes`
_MLP_PARTS = ("calibration", "pinned", "slots", "staging", "bookkeeping")  # of the native plan

_Densities = npt.NDArray[np.float64]  # of input and GLU columns by layer, [n_layers, 2]

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def available_cpus() -> int:
    """CPUs that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def parse_bytes(text: str | int, whole: int) -> int:
    """Bytes of "600MB", "1.5GiB", "60%" (of `whole`) or a number.

    Raises:
        ConfigError: not of these forms, or not positive.
    """
    if isinstance(text, int):
        text = str(text)
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]*|%)\s*", text)
    unit = match.group(2).upper() if match else ""
    if not match or (unit not in _UNITS and unit not in ("%", "")):
        raise ConfigError(f"'{text}' is not an amount of memory: write 600MB, 1.5GiB, 60% or a number of bytes")
    value = float(match.group(1))
    n_bytes = value / 100 * whole if unit == "%" else value * _UNITS.get(unit, 1)
    if n_bytes <= 0:
        raise ConfigError(f"'{text}' of memory is nothing: give more than zero")
    return int(n_bytes)


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How a bundle is run.

    Attributes:
        method: one of `METHODS`.
        density: share of MLP columns used by dip and dip-ca, in (0, 1]; `d_in` and `d_glu` override it for the input
            and the GLU columns (give both).
        gamma: factor on the scores of uncached columns, in (0, 1]; None: 1 for dip, 0.5 for dip-ca.
        cache: lru, lfu, lfu-decay (with `cache_decay`) or static.
        dram: what the whole process may hold: "600MB", "60%" of the bundle's bytes, or bytes. None: no limit on the
            process.
        calibration: file of a `dipper.calibration.Calibration`: its densities by layer for `density` (`d_in` and
            `d_glu`, if given, override them), its score factors, its means. Compensated by means, density 1 equals
            dense only up to rounding: (x - mean) w is then summed onto the bias mean w, not x w onto zero.
        mlp_dram: the MLP's share: "2.7b" bits per MLP weight, or "60%" of its bytes, scales and staging included.
            None: what `dram` leaves, or 50 % where that is not given either.
        context: positions of the KV cache.
        threads: None: all cores.
        reader, isa: "auto" or a fixed choice.
        cold: prefill leaves the column caches as they are.
        trace: file for what every token did to every region (docs/trace-format.md).
        trace_scores: whether the trace holds every column's score, several times the size of its masks.
        split: how slots are shared out, for dip and dip-ca: a weight by region (layer 0 input, layer 0 GLU, ...); the
            share of its columns that a region caches is proportional to it, up to all. None: the same share everywhere.
    """

    method: str = "dip"
    density: float = 0.7
    d_in: float | None = None
    d_glu: float | None = None
    gamma: float | None = None
    cache: str = "lfu"
    cache_decay: float = 0.99
    calibration: str | Path | None = None
    dram: str | int | None = None
    mlp_dram: str | None = None
    context: int = 1024
    threads: int | None = None
    reader: str = "auto"
    isa: str = "auto"
    cold: bool = False
    trace: Path | None = None
    trace_scores: bool = True
    split: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        for name, known in (("method", METHODS), ("cache", CACHES), ("reader", READERS)):
            if getattr(self, name) not in known:
                raise ConfigError(f"{name} '{getattr(self, name)}' is unknown: choose {', '.join(known)}")
        if (self.d_in is None) != (self.d_glu is None):
            raise ConfigError("d_in and d_glu go together: give both or neither")
        for name in ("density", "d_in", "d_glu", "cache_decay"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise ConfigError(f"{name} is {value}, outside (0, 1]: give a share such as 0.7")
        if self.gamma is not None and not 0 < self.gamma <= 1:
            raise ConfigError(
                f"gamma is {self.gamma}, outside (0, 1]: 1 ignores the cache, smaller favours cached columns"
            )
        if self.method != "dip-ca" and self.gamma not in (None, 1.0):
            raise ConfigError(f"gamma {self.gamma} goes with --method dip-ca, not {self.method}")
        if self.calibration is not None and not self.prunes:
            raise ConfigError(
                f"a calibration is about pruning, and {self.method} does none: use --method dip or dip-ca"
            )
        if self.context < 1:
            raise ConfigError(f"context is {self.context}: at least 1 position is needed")
        if self.threads is not None and self.threads < 1:
            raise ConfigError(f"threads is {self.threads}: at least 1 is needed")
        if self.threads is not None and self.threads > 16 * available_cpus():
            raise ConfigError(
                f"threads is {self.threads} on {available_cpus()} CPUs: give about as many as there are CPUs"
            )
        if self.trace is not None and not self.prunes:
            raise ConfigError(f"a trace records masks, which {self.method} does not have: use --method dip or dip-ca")

        if self.split is not None:
            if not self.prunes:
                raise ConfigError(f"a split shares out column slots, which {self.method} does not have: drop it")
            if not all(0 <= weight < float("inf") for weight in self.split) or sum(self.split) <= 0:
                raise ConfigError(
                    "a split has weights that are negative or not finite, or all are 0: give one a region"
                )

    @property
    def prunes(self) -> bool:
        """Whether the MLP is pruned at all."""
        return self.method in ("dip", "dip-ca")

    @property
    def densities(self) -> tuple[float, float]:
        """Densities of the input and the GLU columns where no calibration has its own: (d_in, d_glu)."""
        if not self.prunes:
            return 1.0, 1.0
        if self.d_in is not None and self.d_glu is not None:
            return self.d_in, self.d_glu
        return self.density, self.density

    @property
    def effective_gamma(self) -> float:
        """Gamma with the method's default filled in."""
        if self.gamma is not None:
            return self.gamma
        return DEFAULT_GAMMA if self.method == "dip-ca" else 1.0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Every byte that a run will hold, decided before anything is loaded.

    Attributes:
        parts: bytes by what for: host, resident, mlp_scales, calibration, pinned, slots, staging, bookkeeping, kv,
            scratch.
        budget_bytes: limit of the process, None without one.
        mlp_bytes: mlp_scales + calibration + pinned + slots + staging + bookkeeping.
        mlp_budget_bytes: limit of the MLP, None where the method takes what it needs.
        mlp_bits_per_weight: `mlp_bytes` in bits per MLP weight.
        cached_fraction: share of MLP columns that slots or pinned regions hold.
        minimum_bytes: the smallest process budget that this bundle, method and context work with.
        stream_reads, stream_bytes: what streaming the MLP once reads from flash: a token of dense-stream, a block of
            tokens in prefill.
        options: what the native decoder is built with, a calibration's vectors aside.
    """

    parts: dict[str, int]
    budget_bytes: int | None
    mlp_bytes: int
    mlp_budget_bytes: int | None
    mlp_bits_per_weight: float
    cached_fraction: float
    minimum_bytes: int
    stream_reads: int
    stream_bytes: int
    options: dict[str, Any] = field(repr=False)

    @property
    def total_bytes(self) -> int:
        """Bytes of all parts."""
        return sum(self.parts.values())

    def lines(self) -> list[str]:
        """The plan in words, one line for the process and one for the MLP."""
        mib = {name: f"{name.replace('_', ' ')} {value / 2**20:.1f}" for name, value in self.parts.items() if value}
        budget = "no limit" if self.budget_bytes is None else f"budget {self.budget_bytes / 2**20:.1f}"
        mlp_budget = "" if self.mlp_budget_bytes is None else f" of {self.mlp_budget_bytes / 2**20:.1f}"
        return [
            f"DRAM plan, MiB: total {self.total_bytes / 2**20:.1f} ({budget}) = {' + '.join(mib.values())}",
            f"MLP share, MiB: {self.mlp_bytes / 2**20:.1f}{mlp_budget} = "
            f"{self.mlp_bits_per_weight:.2f} bits per MLP weight; "
            f"{100 * self.cached_fraction:.1f} % of the columns held",
        ]


@dataclass(frozen=True, kw_only=True)
class Counters:
    """What happened since the last `reset_counters()`; bytes and reads are what was asked of the disk."""

    n_tokens: int
    selected: int
    hits: int
    misses: int
    evictions: int
    useful_bytes: int
    flash_bytes: int
    reads: int
    ledger_s: dict[str, float]

    @property
    def hit_rate(self) -> float | None:
        """Hits over selected columns; None where nothing was selected."""
        return self.hits / self.selected if self.selected else None


def _densities(config: EngineConfig, n_layers: int, calibration: Calibration | None) -> _Densities:
    """A calibration's table for the density asked for; without one, or given a split, the same in every layer."""
    if calibration is not None and calibration.tables and config.d_in is None:
        return calibration.densities(config.density)
    return np.tile(np.array(config.densities), (n_layers, 1))


def _mean(densities: _Densities) -> tuple[float, float]:
    """Over the layers, exact where all are equal."""
    d_in, d_glu = densities[0] + (densities - densities[0]).mean(axis=0)
    return float(d_in), float(d_glu)


def _vectors(calibration: Calibration | None) -> dict[str, Any]:
    """A calibration's vectors as the native decoder takes them: lists by region, empty where there are none."""
    factors = () if calibration is None else calibration.factors or ()
    means = () if calibration is None else calibration.means or ()
    biases = () if calibration is None else calibration.biases or ()
    return {
        "factors": [vector for layer in factors for vector in layer],
        "means": [vector for layer in means for vector in layer],
        "biases": [vectors for gate, up, down in biases for vectors in ([gate, up], [down])],
    }


class _Planner:
    """Finds the richest settings that a budget allows; all sizes come from the native `plan_memory`."""

    def __init__(
        self, bundle: Bundle, config: EngineConfig, host_bytes: int, densities: _Densities, vectors: dict[str, Any]
    ) -> None:
        self.bundle = bundle
        self.config = config
        self.host_bytes = host_bytes
        self.vectors = vectors
        self.regions: list[dict[str, Any]] = bundle.header["regions"]
        self.base: dict[str, Any] = {
            "residency": {"dense-resident": "resident", "dense-stream": "stream"}.get(config.method, "cached"),
            "prune": config.prunes,
            "k": [n_selected(d, r["n_columns"]) for d, r in zip(densities.flat, self.regions, strict=True)],
            "gamma": config.effective_gamma,
            "cache": config.cache,
            "cache_decay": config.cache_decay,
            "capacity": [0] * len(self.regions),
            "pinned": [0] * len(self.regions),
            "stream_chunk_bytes": _CHUNK_BYTES,
            "context": config.context,
            "n_threads": config.threads or available_cpus(),
            "isa": config.isa,
            "reader": config.reader,
            "depth": 64,
        }
        self.scale_bytes = sum(
            array["bytes"]
            for region in self.regions
            for matrix in region["matrices"]
            for name, array in matrix["scales"].items()
            if name != "tier"
        )
        self.region_bytes = sum(region["bytes"] for region in self.regions)
        self.mlp_weights = bundle.mlp_weights

    def native(self, options: dict[str, Any]) -> dict[str, int]:
        return _core.plan_memory(self.bundle.header, str(self.bundle.path), options | self.vectors)

    def parts(self, options: dict[str, Any]) -> dict[str, int]:
        native = self.native(options)
        return {
            "host": self.host_bytes,
            "resident": native["resident"] - self.scale_bytes,
            "mlp_scales": self.scale_bytes,
            **{name: native[name] for name in (*_MLP_PARTS, "kv", "scratch")},
        }

    @staticmethod
    def mlp_bytes(parts: dict[str, int]) -> int:
        return sum(parts[name] for name in ("mlp_scales", *_MLP_PARTS))

    def limits(self) -> tuple[int | None, int | None]:
        """Budgets of the process and of the MLP in bytes."""
        config = self.config
        budget = None if config.dram is None else parse_bytes(config.dram, self.bundle.total_bytes)
        mlp_dram = config.mlp_dram
        if config.method == "dense-resident":
            if mlp_dram is not None:
                raise ConfigError(
                    "--mlp-dram does not go with dense-resident, which holds the whole MLP: drop it or choose "
                    "dense-stream"
                )
            return budget, None
        if mlp_dram is None:
            if budget is not None:
                return budget, None
            mlp_dram = DEFAULT_MLP_DRAM
        bits = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*b(its)?\s*", mlp_dram)
        if bits:
            return budget, int(float(bits.group(1)) * self.mlp_weights / 8)
        return budget, parse_bytes(mlp_dram, self.region_bytes + self.scale_bytes)

    def fill(self, options: dict[str, Any], room: int) -> dict[str, Any]:
        """Spends `room` bytes on pinned regions (dense-stream) or slots (dip)."""
        options = dict(options)
        if self.base["residency"] == "cached":
            columns = [region["n_columns"] for region in self.regions]
            empty, full = self.parts(options), self.parts({**options, "capacity": columns})
            cost = sum(full[name] - empty[name] for name in ("slots", "bookkeeping"))
            if self.config.split is None:
                options["capacity"] = [int(min(1.0, room / cost) * n) for n in columns]
            else:
                options["capacity"] = self.split_slots(self.config.split, room)
        elif self.base["residency"] == "stream":
            options["pinned"] = _spread([-(-region["bytes"] // 4096) * 4096 for region in self.regions], room)
        return options

    def split_slots(self, weights: Sequence[float], room: int) -> list[int]:
        """Capacities proportional to columns x weight, up to all columns, that together take `room` bytes at most."""
        if len(weights) != len(self.regions):
            raise ConfigError(
                f"the split has {len(weights)} weights, the model {len(self.regions)} regions: it is for another model"
            )
        slot = [region["record_bytes"] + _SLOT_BOOK_BYTES for region in self.regions]

        def capacities(scale: float) -> list[int]:
            return [
                int(min(1.0, scale * weight) * region["n_columns"])
                for weight, region in zip(weights, self.regions, strict=True)
            ]

        def fits(scale: float) -> bool:
            return int(np.dot(capacities(scale), slot)) <= room

        # The largest scale that fits, between one at which no region has a slot and one at which all are full; in
        # powers, since weights may be orders of magnitude apart.
        low = 0.5 / (max(weights) * max(region["n_columns"] for region in self.regions))
        high = 1.0 / min(weight for weight in weights if weight > 0)
        if fits(high):
            return capacities(high)
        for _ in range(120):
            middle = math.sqrt(low) * math.sqrt(high)
            low, high = (middle, high) if fits(middle) else (low, middle)
        return capacities(low)

    def settings(self) -> list[dict[str, Any]]:
        """Options to choose from, most comfortable first: tokens a prefill block, buffers of the weight ring."""
        return [
            {**self.base, "block_tokens": min(block_tokens, self.config.context), "stream_slots": stream_slots}
            for block_tokens, stream_slots in _BLOCKS_AND_SLOTS
        ]

    def plan(self) -> Plan:
        budget, mlp_budget = self.limits()
        rooms = []  # what each setting leaves for slots or pinned regions
        for options in self.settings():
            parts = self.parts(options)
            minimum, mlp_minimum = sum(parts.values()), self.mlp_bytes(parts)
            limits = [2 * self.region_bytes]
            if budget is not None:
                limits.append(budget - minimum)
            if mlp_budget is not None:
                limits.append(mlp_budget - mlp_minimum)
            rooms.append(min(limits))
        if max(rooms) < 0:
            self.refuse(budget, minimum, mlp_budget, mlp_minimum)
        # Comfort is worth a tenth of the MLP, not more: columns held are what decides the speed.
        enough = max(rooms) - 0.1 * self.region_bytes
        options, room = next(
            (o, r)
            for o, r in zip(self.settings(), rooms, strict=True)
            if r >= 0 and r >= min(enough, self.region_bytes)
        )
        return self.made(self.fill(options, room), budget, mlp_budget)

    def plan_for(self, capacity: list[int]) -> Plan:
        """The plan of these slots, whatever they take."""
        columns = [region["n_columns"] for region in self.regions]
        if len(capacity) != len(columns):
            raise ConfigError(
                f"capacities for {len(capacity)} regions, and the model has {len(columns)}: give each one"
            )
        for r, (slots, n) in enumerate(zip(capacity, columns, strict=True)):
            if not 0 <= slots <= n:
                raise ConfigError(
                    f"a capacity of {slots} for region {r} of {n} columns: it lies between 0 and all of them"
                )
        return self.made({**self.settings()[0], "capacity": capacity}, None, None)

    def made(self, options: dict[str, Any], budget: int | None, mlp_budget: int | None) -> Plan:
        parts = self.parts(options)
        held = sum(r["bytes"] for r, p in zip(self.regions, options["pinned"], strict=True) if p) + parts["slots"]
        if self.config.method == "dense-resident":
            held = self.region_bytes
        return Plan(
            parts=parts,
            budget_bytes=budget,
            mlp_bytes=self.mlp_bytes(parts),
            mlp_budget_bytes=mlp_budget,
            mlp_bits_per_weight=8 * self.mlp_bytes(parts) / self.mlp_weights,
            cached_fraction=held / self.region_bytes,
            minimum_bytes=self.smallest(),
            **self.streamed(options),
            options=options,
        )

    def streamed(self, options: dict[str, Any]) -> dict[str, int]:
        native = self.native(options)
        return {name: native[name] for name in ("stream_reads", "stream_bytes")}

    def smallest(self) -> int:
        return sum(self.parts(self.settings()[-1]).values())

    def refuse(self, budget: int | None, minimum: int, mlp_budget: int | None, mlp_minimum: int) -> None:
        if budget is not None and budget < minimum:
            raise BudgetError(
                f"--dram gives {budget / 1e6:.1f} MB, but {self.config.method} with a context of {self.config.context} "
                f"needs at least {_ceil_mb(minimum)} MB here ({self.host_bytes / 1e6:.1f} MB of it is the host "
                f"process): raise --dram to {_ceil_mb(minimum)}MB"
                + ("" if self.config.method != "dense-resident" else " or choose --method dense-stream or dip")
            )
        bits = 8 * mlp_minimum / self.mlp_weights
        needed = "scales, calibration and staging" if any(self.vectors.values()) else "scales and staging"
        raise BudgetError(
            f"--mlp-dram gives {(mlp_budget or 0) / 1e6:.1f} MB to the MLP, but its {needed} alone need "
            f"{mlp_minimum / 1e6:.1f} MB: raise --mlp-dram to {bits + 0.005:.2f}b or more"
        )


def _ceil_mb(n_bytes: int) -> str:
    return f"{-(-n_bytes // 10**5) / 10:.1f}"


def _spread(sizes: Sequence[int], room: int) -> list[int]:
    """Which regions to pin within `room` bytes.

    Evenly over the depth: streaming then overlaps with every layer's compute.
    """
    total = sum(sizes)
    pinned = [0] * len(sizes)
    passed = held = 0
    for i, size in enumerate(sizes):
        passed += size
        if held + size <= room * passed / total:
            pinned[i] = 1
            held += size
    for i, size in enumerate(sizes):
        if not pinned[i] and held + size <= room:
            pinned[i] = 1
            held += size
    return pinned


def plan_run(
    bundle: Bundle, config: EngineConfig, host_bytes: int | None = None, capacity: Sequence[int] | None = None
) -> Plan:
    """Every byte that a run would hold, without loading anything; for the simulator also of bundles without weights.

    Args:
        bundle, config: as `Engine.open`; a calibration is not taken.
        host_bytes: what the process holds before any weight; None: what this one does.
        capacity: slots by region, whatever they take, instead of a budget.

    Raises:
        BudgetError: the budget is below the smallest that works.
        ConfigError: a capacity above its region.
    """
    densities = _densities(config, bundle.model.n_layers, None)
    host = rss_bytes() if host_bytes is None else host_bytes
    planner = _Planner(bundle, config, host, densities, _vectors(None))
    return planner.plan() if capacity is None else planner.plan_for(list(capacity))


def rss_bytes() -> int:
    """Resident set of this process now."""
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Engine:
    """A loaded bundle; use `Engine.open`. Not for several threads at once.

    Attributes:
        config, plan, bundle: what it was opened with.
        densities: of the input and the GLU columns, means over the layers.
        calibration_sha256: of the calibration's file, None without one.
        notes: fallbacks taken (reader, direct I/O), each said once.
    """

    def __init__(
        self,
        bundle: Bundle,
        config: EngineConfig,
        plan: Plan,
        decoder: Any,
        densities: tuple[float, float],
        calibration_sha256: str | None,
    ) -> None:
        self.bundle = bundle
        self.config = config
        self.plan = plan
        self.densities = densities
        self.calibration_sha256 = calibration_sha256
        self.notes: list[str] = [note for note in decoder.reader_notes if note]
        self._decoder = decoder
        self._trace_partial: Path | None = None

    @classmethod
    def open(
        cls,
        path: str | Path,
        config: EngineConfig | None = None,
        on_plan: Callable[[Plan], None] | None = None,
        *,
        simulated: bool = False,
    ) -> Engine:
        """Plans, then loads.

        Args:
            path: bundle directory.
            config: how to run it.
            on_plan: called with the plan before anything is loaded.
            simulated: dip and dip-ca only: masks, caches, counters and traces are those of a run under the budget, but
                all weights are in DRAM and nothing is read from flash; `configure` then changes masks and caches.

        Raises:
            BundleError: damaged or newer bundle.
            BudgetError: the budget is below the smallest that works.
            ConfigError: context over the model's, unknown instruction set, a calibration that is damaged, for another
                model, or without the density asked for.
        """
        config = config or EngineConfig()
        bundle = Bundle.open(path)
        limit = bundle.header["model"]["max_context"]
        if config.context > limit:
            raise ConfigError(f"a context of {config.context} is over the model's {limit}: lower --ctx")
        calibration = None if config.calibration is None else Calibration.load(config.calibration)
        if calibration is not None:
            calibration.check_model(bundle)
        densities, vectors = _densities(config, bundle.model.n_layers, calibration), _vectors(calibration)
        plan = _Planner(bundle, config, rss_bytes(), densities, vectors).plan()
        if on_plan is not None:
            on_plan(plan)
        if simulated and not config.prunes:
            raise ConfigError(f"{config.method} has no masks and no caches to simulate: use dip or dip-ca")
        residency = {"residency": "simulated"} if simulated else {}
        decoder = _core.Decoder(bundle.header, str(bundle.path), plan.options | vectors | residency)
        digest = hashlib.sha256(decoder.resident_bytes().data).hexdigest()
        if digest != bundle.header["files"]["resident.bin"]["sha256"]:
            raise BundleError(
                f"{bundle.path}/resident.bin does not match its checksum: the bundle is damaged, pack it again"
            )
        sha256 = None if calibration is None else calibration.sha256
        engine = cls(bundle, config, plan, decoder, _mean(densities), sha256)
        if config.split is not None:
            engine.notes.append("slots are shared out over the regions by given weights, not uniformly")
        if config.prunes and config.cache == "static" and config.cold:
            decoder.pin_static()
        if config.trace is not None:
            engine._start_trace(config.trace)
        return engine

    def configure(self, config: EngineConfig, capacity: Sequence[int] | None = None) -> None:
        """Other masks and caches for a simulated engine, which then starts anew with empty caches.

        Args:
            config: of the same context, without calibration. A trace under way is finished, its own begun.
            capacity: slots by region, instead of what the configuration's budget gives.

        Raises:
            ConfigError: the engine is not simulated, or the context differs.
        """
        if config.context != self.config.context:
            raise ConfigError(
                f"the context is {self.config.context} and cannot become {config.context}: open another engine"
            )
        if config.calibration is not None or not config.prunes:
            what = "a calibration" if config.prunes else config.method
            raise ConfigError(f"{what} does not go into a simulated engine that is open: open another one")
        self.finish_trace()
        plan = plan_run(self.bundle, config, self.plan.parts["host"])
        if capacity is not None:
            plan = replace(plan, options={**plan.options, "capacity": list(capacity)})
        options = plan.options
        self._decoder.configure(
            options["k"], options["gamma"], options["cache"], options["cache_decay"], options["capacity"]
        )
        self.config, self.plan = config, plan
        self.densities = _mean(_densities(config, self.bundle.model.n_layers, None))
        self.reset()
        if config.cache == "static" and config.cold:
            self._decoder.pin_static()
        if config.trace is not None:
            self._start_trace(config.trace)

    def _start_trace(self, path: Path) -> None:
        header = {
            "format": "dipper-trace",
            "model": self.bundle.header["model"]["name"],
            "bundle": self.bundle.header["header_sha256"],
            "method": self.config.method,
            "gamma": self.config.effective_gamma,
            "densities": self.densities,
            "cache": self.config.cache,
            "cache_decay": self.config.cache_decay,
            "cold": self.config.cold,
            "context": self.config.context,
            "block_tokens": self.plan.options["block_tokens"],
            "regions": [
                {
                    "layer": r["layer"],
                    "kind": r["kind"],
                    "n_columns": r["n_columns"],
                    "record_bytes": r["record_bytes"],
                    "offset": r["offset"],
                    "capacity": c,
                    "k": k,
                }
                for r, c, k in zip(
                    self.bundle.header["regions"],
                    self.plan.options["capacity"],
                    self.plan.options["k"],
                    strict=True,
                )
            ],
        }
        self._trace_partial = path.with_name(path.name + ".partial")
        self._decoder.start_trace(str(self._trace_partial), json.dumps(header), self.config.trace_scores)

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None and self._trace_partial is not None:  # what was recorded ends where the error came
            self._trace_partial.unlink(missing_ok=True)
            self._trace_partial = None
        self.close()

    def close(self) -> None:
        """Frees weights and caches; a trace gets its final name.

        Raises:
            FlashError: the trace could not all be written; nothing has its name.
        """
        if self._decoder is None:
            return
        try:
            self.finish_trace()
        finally:
            self._decoder = None

    def finish_trace(self) -> None:
        """Ends a trace under way before the engine closes: it gets its final name.

        Raises:
            FlashError: it could not all be written; nothing has its name.
        """
        if self._trace_partial is None or self.config.trace is None:
            return
        partial, self._trace_partial = self._trace_partial, None
        try:
            self._decoder.finish_trace()
            os.replace(partial, self.config.trace)
        finally:
            partial.unlink(missing_ok=True)

    @property
    def n_past(self) -> int:
        """Positions in the KV cache."""
        return int(self._decoder.n_past)

    @property
    def context(self) -> int:
        """Positions that the KV cache has room for."""
        return self.config.context

    @property
    def vocab_size(self) -> int:
        """Length of a row of logits."""
        return int(self.bundle.header["model"]["vocab_size"])

    @property
    def isa(self) -> str:
        """Instruction set of the kernels in use."""
        return str(self._decoder.isa)

    @property
    def n_threads(self) -> int:
        """Compute threads, the caller's included."""
        return int(self.plan.options["n_threads"])

    @property
    def reader_backend(self) -> str:
        """io_uring or pread."""
        return str(self._decoder.reader_backend)

    @property
    def direct(self) -> bool:
        """Whether reads bypass the page cache."""
        return bool(self._decoder.direct)

    def prefill(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """Appends tokens, dense and streamed layer by layer; warms the column caches unless `cold`.

        Returns:
            Logits of the last token, [vocab].

        Raises:
            ConfigError: no tokens, an id outside the vocabulary, or the context is full.
            FlashError: a read failed.
        """
        logits: npt.NDArray[np.float32] = self._decoder.prefill(
            np.asarray(tokens, np.int32), self.config.prunes and not self.config.cold
        )
        return logits

    def step(self, token: int) -> npt.NDArray[np.float32]:
        """One decoded token through its own masks and the caches; logits [vocab].

        Raises:
            ConfigError: as `prefill`, and for a NaN score.
            FlashError: a read failed.
        """
        logits: npt.NDArray[np.float32] = self._decoder.step(int(token))
        return logits

    def logits(
        self, tokens: Sequence[int], masks: Sequence[tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]] | None = None
    ) -> npt.NDArray[np.float32]:
        """Logits of every token, each through its own mask and cache step; equals `step` bit for bit.

        Worked layer by layer.

        Args:
            tokens: continue after `n_past`.
            masks: forced instead: by layer (uint8 [T, hidden], uint8 [T, intermediate]), nonzero = used. Cache
                untouched.

        Returns:
            [T, vocab] fp32.
        """
        ids = np.asarray(tokens, np.int32)
        if masks is None:
            logits: npt.NDArray[np.float32] = self._decoder.logits(
                ids, "own" if self.config.prunes else "dense", [], []
            )
        else:
            inputs, glus = ([np.ascontiguousarray(layer[i], np.uint8) for layer in masks] for i in range(2))
            logits = self._decoder.logits(ids, "forced", inputs, glus)
        return logits

    def advance(self, tokens: Sequence[int]) -> None:
        """Takes tokens through their own masks and cache steps, as `logits` does, and tells nothing but counters."""
        self._decoder.advance(np.asarray(tokens, np.int32))

    def score(self, tokens: Sequence[int]) -> npt.NDArray[np.float64]:
        """Negative log-likelihood of tokens[1:], every token through its own mask and cache step, [T - 1].

        Raises:
            ConfigError: fewer than two tokens, or as `prefill`.
        """
        ids = np.asarray(tokens, np.int32)
        if len(ids) < 2:
            raise ConfigError(f"{len(ids)} tokens cannot be scored: at least 2 are needed")
        losses: npt.NDArray[np.float64] = self._decoder.losses(ids[:-1].copy(), ids[1:].copy())
        return losses

    def reset(self) -> None:
        """Forgets the KV cache; column caches stay."""
        self._decoder.reset()

    def reset_cache(self) -> None:
        """Empties the column caches and their counters."""
        self._decoder.reset_cache()

    def reset_counters(self) -> None:
        """Counters and ledger start at zero."""
        self._decoder.reset_counters()

    def counters(self) -> Counters:
        """Counters since the last reset."""
        return Counters(**self._decoder.counters())
