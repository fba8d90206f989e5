"""How a bundle is run, and every byte that the run will hold, decided before anything is loaded.

`EngineConfig` is what a user asks for. `plan_run` turns it, with a bundle's header alone, into a `Plan`: the richest
settings that the budget allows, in bytes by part, and what the native decoder is built with. All sizes come from the
native `plan_memory`. A budget that is too small is refused with the smallest that works.

    plan = plan_run(Bundle.open("smollm2.dipper"), EngineConfig(density=0.6, mlp_dram="60%"))
    print(*plan.lines(), sep="\n")
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from . import _core
from .bundle import Bundle
from .cache import n_selected
from .calibration import Calibration
from .dram_plan import Plan, RegionPlan
from .errors import BudgetError, ConfigError
from .probe import device_for
from .reads import IoBudget, Reads, fetched_reads, run_cost, streamed_reads, takes_part

__all__ = ["METHODS", "EngineConfig", "Plan", "available_cpus", "parse_bytes", "plan_run", "rss_bytes"]

METHODS = ("auto", "dense-resident", "dense-stream", "dip", "dip-ca", "planes")
CACHES = ("lru", "lfu", "lfu-decay", "static")
READERS = ("auto", "io_uring", "pread")
KV_CODES = ("f32", "f16", "int8")
DEFAULT_GAMMA = 0.5  # of dip-ca
DEFAULT_MLP_DRAM = "50%"
DEFAULT_FETCH = 0.1  # of planes

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
        method: one of `METHODS`; auto is settled by `dipper.auto.choose`.
        density: share of MLP columns used by dip and dip-ca, in (0, 1]; `d_in` and `d_glu` override it for the input
            and the GLU columns (give both).
        fetch: planes only: share of a region's units of residuals that a token reads from flash, in [0, 1]: the best
            that are not cached, while all that are cached are used as well. Every token therefore reads as much.
            `fetch_glu` overrides it for the GLU columns. None: 0.1.
        read_cost: planes only: what a read costs beside its bytes, in bytes, 12,500 on a disk of 0.5 GB/s and 40,000
            reads a second: units are then chosen in runs, the error that they remove against what their reads cost,
            for no more than `fetch` costs in reads of one unit each. None: the best units, wherever they lie.
        io_budget: planes only, instead of fetch: what a token may read of the MLP, "20ms" of the disk's time or "80MB".
            What regions streamed whole leave of it is shared out over the refined ones, the same share of units each;
            GLU columns take part where their units are pages (4096 bytes) or larger.
        whole: planes only: layers of which both regions are used whole, the most sensitive first: in DRAM while the
            budget lasts, streamed beyond it. Or as many as named, or a share of all, of a measured order:
            "ORDER.json:6" of a file of `dipper sensitivity`, "auto:25%" of the one that comes with dipper.
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
        kv: how keys and values are kept: "f32", "f16", or "int8" with a scale for each position and head.
        threads: None: all cores.
        reader, isa: "auto" or a fixed choice.
        cold: prefill leaves the column caches as they are.
        device_profile: a device (`dipper.device.Device`) by name or file, by which auto and an io_budget of time
            reckon; None: a probe of the bundle's disk, of half a second.
        trace: file for what every token did to every region (docs/trace-format.md).
        trace_scores: whether the trace holds every column's score, several times the size of its masks.
        split: how slots are shared out, for dip and dip-ca: a weight by region (layer 0 input, layer 0 GLU, ...); the
            share of its columns that a region caches is proportional to it, up to all. None: the same share everywhere.
    """

    method: str = "dip"
    density: float = 0.7
    d_in: float | None = None
    d_glu: float | None = None
    fetch: float | None = None
    fetch_glu: float | None = None
    read_cost: int | None = None
    io_budget: str | None = None
    whole: tuple[int, ...] | str = ()
    gamma: float | None = None
    cache: str = "lfu"
    cache_decay: float = 0.99
    calibration: str | Path | None = None
    dram: str | int | None = None
    mlp_dram: str | None = None
    context: int = 1024
    kv: str = "f16"
    threads: int | None = None
    reader: str = "auto"
    isa: str = "auto"
    cold: bool = False
    device_profile: str | Path | None = None
    trace: Path | None = None
    trace_scores: bool = True
    split: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        for name, known in (("method", METHODS), ("cache", CACHES), ("reader", READERS), ("kv", KV_CODES)):
            if getattr(self, name) not in known:
                raise ConfigError(f"{name} '{getattr(self, name)}' is unknown: choose {', '.join(known)}")
        if (self.d_in is None) != (self.d_glu is None):
            raise ConfigError("d_in and d_glu go together: give both or neither")
        for name in ("density", "d_in", "d_glu", "cache_decay"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise ConfigError(f"{name} is {value}, outside (0, 1]: give a share such as 0.7")
        for name in ("fetch", "fetch_glu"):
            value = getattr(self, name)
            if value is not None and self.method != "planes":
                raise ConfigError(f"{name} goes with --method planes, not {self.method}")
            if value is not None and not 0 <= value <= 1:
                raise ConfigError(f"{name} is {value}, outside [0, 1]: give a share such as 0.1")
        if self.read_cost is not None and self.method != "planes":
            raise ConfigError(f"a read cost goes with --method planes, not {self.method}")
        if self.read_cost is not None and not 0 <= self.read_cost <= 1 << 30:
            raise ConfigError(f"the read cost is {self.read_cost}: give bytes, 0 or more, such as 12500")
        self._check_io_budget()
        if self.whole and self.method != "planes":
            raise ConfigError(f"whole layers go with --method planes, not {self.method}")
        if isinstance(self.whole, str):
            if not re.fullmatch(r".+:[0-9]+%?", self.whole):
                raise ConfigError(f"whole layers are '{self.whole}': write 27,2,26, auto:6 or ORDER.json:25%")
        elif any(layer < 0 for layer in self.whole) or len(set(self.whole)) != len(self.whole):
            raise ConfigError(f"whole layers are {self.whole}: give each once, counted from 0")
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

    def _check_io_budget(self) -> None:
        by_time = self.io_budget is not None and IoBudget.is_time(self.io_budget)
        if self.io_budget is not None:
            if self.method != "planes":
                raise ConfigError(f"io_budget goes with --method planes, not {self.method}")
            if self.fetch is not None or self.fetch_glu is not None:
                raise ConfigError("fetch and io_budget both say what a token reads: give one of them")
        if self.device_profile is not None and self.method != "auto" and not by_time:
            raise ConfigError("device_profile has no effect: it goes with --method auto, or an io_budget of time")

    @property
    def prunes(self) -> bool:
        """Whether the MLP is pruned at all."""
        return self.method in ("dip", "dip-ca")

    @property
    def selects(self) -> bool:
        """Whether tokens choose which columns they use, or refine."""
        return self.prunes or self.method == "planes"

    @property
    def whole_layers(self) -> tuple[int, ...]:
        """Layers used whole. ConfigError: they are given by an order that has not been looked up."""
        if isinstance(self.whole, str):
            raise ConfigError(f"whole layers '{self.whole}' are no plan yet: dipper.engine.settle looks them up")
        return self.whole

    @property
    def fetches(self) -> tuple[float, float]:
        """Shares of the units of the input and the GLU regions that a token reads (planes)."""
        fetch = DEFAULT_FETCH if self.fetch is None else self.fetch
        return fetch, fetch if self.fetch_glu is None else self.fetch_glu

    def fetches_told(self, planned: tuple[float, float] | None = None) -> str:
        """What a token fetches, in words, for notes; by an io budget what was `planned` of input and GLU units."""
        fetch, fetch_glu = planned if planned is not None and self.io_budget else self.fetches
        why = f" by an io budget of {self.io_budget}" if self.io_budget else ""
        runs = "" if self.read_cost is None else f", in runs by a read cost of {self.read_cost} bytes"
        whole = f", layers {', '.join(map(str, self.whole_layers))} whole" if self.whole else ""
        shares = f"{fetch:.3g} of the input and {fetch_glu:.3g} of the GLU units"
        return f"planes: a token fetches {shares}{why}{runs}{whole}"

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


def densities_of(config: EngineConfig, n_layers: int, calibration: Calibration | None) -> _Densities:
    """A calibration's table for the density asked for; without one, or given a split, the same in every layer."""
    if calibration is not None and calibration.tables and config.d_in is None:
        return calibration.densities(config.density)
    return np.tile(np.array(config.densities), (n_layers, 1))


def mean_densities(densities: _Densities) -> tuple[float, float]:
    """Over the layers, exact where all are equal."""
    d_in, d_glu = densities[0] + (densities - densities[0]).mean(axis=0)
    return float(d_in), float(d_glu)


def calibration_vectors(calibration: Calibration | None) -> dict[str, Any]:
    """A calibration's vectors as the native decoder takes them: lists by region, empty where there are none."""
    factors = () if calibration is None else calibration.factors or ()
    means = () if calibration is None else calibration.means or ()
    biases = () if calibration is None else calibration.biases or ()
    return {
        "factors": [vector for layer in factors for vector in layer],
        "means": [vector for layer in means for vector in layer],
        "biases": [vectors for gate, up, down in biases for vectors in ([gate, up], [down])],
    }


class Planner:
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
            "residency": {"dense-resident": "resident", "dense-stream": "stream", "planes": "stream"}.get(
                config.method, "cached"
            ),
            "prune": config.prunes,
            "k": [n_selected(d, r["n_columns"]) for d, r in zip(densities.flat, self.regions, strict=True)],
            "gamma": config.effective_gamma,
            "cache": config.cache,
            "cache_decay": config.cache_decay,
            "capacity": [0] * len(self.regions),
            "pinned": [0] * len(self.regions),
            "refined": [0] * len(self.regions),
            "fetch": [0] * len(self.regions),
            "run_cost": [0.0] * len(self.regions),
            "stream_chunk_bytes": _CHUNK_BYTES,
            "context": config.context,
            "kv": config.kv,
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
        self.scale_bytes += sum(  # norms of residuals
            4 * region["n_columns"] for region in self.regions if region["base"] is not None
        )
        self.region_bytes = sum(_region_bytes(region) for region in self.regions)
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
        if self.config.method == "planes":
            return self.refine(options, room)
        if self.base["residency"] == "cached":
            columns = [region["n_columns"] for region in self.regions]
            empty, full = self.parts(options), self.parts({**options, "capacity": columns})
            cost = sum(full[name] - empty[name] for name in ("slots", "bookkeeping"))
            if self.config.split is None:
                options["capacity"] = [int(min(1.0, room / cost) * n) for n in columns]
            else:
                options["capacity"] = self.split_slots(self.config.split, room)
        elif self.base["residency"] == "stream":
            options["pinned"] = _spread([_aligned(_region_bytes(region)) for region in self.regions], room)
        return options

    def refine(self, options: dict[str, Any], room: int) -> dict[str, Any]:
        """Spends `room` bytes on bases, then on regions that are used whole, then on slots for residuals."""
        n_units = [_n_units(region) for region in self.regions]
        if self.config.io_budget is None:
            fetches = self.config.fetches * len(n_units)
            return self.refine_by(
                [int(share * n + 0.5) for share, n in zip(fetches, n_units, strict=False)], options, room
            )
        # What is fetched takes staging, which regions that are streamed may have to leave; so it shrinks till both fit.
        budget = self.io_budget()
        made = self.refine_by([0] * len(n_units), options, room)
        fetch = self.affordable(budget, made)
        while self.cost(budget, made := self.refine_by(fetch, options, room)) > budget.limit:
            fewer = [min(m, max(1, 9 * m // 10)) for m in fetch]
            if fewer == fetch:
                needed = budget.told(self.cost(budget, made))
                raise BudgetError(
                    f"--io-budget {budget.text} refines nothing: with staging for a unit of every region a token takes "
                    f"{needed}; raise it to {needed}"
                )
            fetch = fewer
        return made

    def io_budget(self) -> IoBudget:
        text = str(self.config.io_budget)
        by_time = IoBudget.is_time(text)
        flash = device_for(self.bundle.path, self.config.device_profile).flash if by_time else None
        return IoBudget.parse(text, flash, self.config.read_cost)

    def cost(self, budget: IoBudget, made: dict[str, Any]) -> float:
        """What a token costs of the budget under these options, expected."""
        total = 0.0
        for r in range(len(self.regions)):
            plan = self.region_plan(r, made)
            if plan.held in ("refined", "streamed"):
                total += (budget.fetched if plan.held == "refined" else budget.streamed)(plan.reads)
        return total

    def affordable(self, budget: IoBudget, made: dict[str, Any]) -> list[int]:
        """Units by region that the budget allows beside what these options stream whole.

        Raises:
            BudgetError: not a unit of every region; it names the smallest that is.
            ConfigError: no region is refined.
        """
        refined = [r for r, region in enumerate(self.regions) if made["refined"][r] and takes_part(region)]
        if not refined:
            raise ConfigError(
                "an io budget is shared out over refined regions, and there are none here: drop it, use a bundle of "
                "dipper pack --base-bits (its GLU columns in units of 4096 bytes or more), or give the MLP more DRAM"
            )
        streamed = self.cost(budget, {**made, "fetch": [0] * len(self.regions)})
        regions = [self.regions[r] for r in refined]
        least = streamed + budget.cost(regions, [1] * len(regions))
        if least > budget.limit:
            whole = f"regions streamed whole read {budget.told(streamed)} of it, and " if streamed else ""
            raise BudgetError(
                f"--io-budget {budget.text} refines nothing: {whole}a unit of every refined region takes "
                f"{budget.told(least - streamed)}; raise it to {budget.told(least)}"
            )
        fetch = [0] * len(self.regions)
        for r, n in zip(refined, budget.share_out(regions, budget.limit - streamed), strict=True):
            fetch[r] = n
        return fetch

    def refine_by(self, fetch: Sequence[int], options: dict[str, Any], room: int) -> dict[str, Any]:
        """As `refine`, where each refined region fetches so many units."""
        whole = {2 * layer + kind for layer in self.config.whole_layers for kind in (0, 1)}
        if whole and max(whole) >= len(self.regions):
            last = len(self.regions) // 2 - 1
            raise ConfigError(
                f"layer {max(whole) // 2} is to be whole, and the model has none: give layers of 0..{last}"
            )
        n_units = [_n_units(region) for region in self.regions]
        sizes = [_aligned(_region_bytes(region)) for region in self.regions]
        bases = [
            0 if region["base"] is None or r in whole else _aligned(region["base"]["bytes"])
            for r, region in enumerate(self.regions)
        ]
        if not any(bases):  # no region is split, or all are whole: as dense-stream
            return {**options, "pinned": _spread(sizes, room)}
        least = sum(self.parts(options).values())

        def left(made: dict[str, Any]) -> int:
            return room - (sum(self.parts(made).values()) - least)

        def refining(room_for_bases: int) -> dict[str, Any]:
            held = [int(h and base > 0) for h, base in zip(_spread(bases, room_for_bases), bases, strict=True)]
            return {
                **options,
                "refined": held,
                "fetch": [m * h for m, h in zip(fetch, held, strict=True)],
                "run_cost": [
                    h * run_cost(r["unit_bytes"], self.config.read_cost)
                    for r, h in zip(self.regions, held, strict=True)
                ],
            }

        low, high = 0, sum(bases)
        if left(refining(high)) >= 0:
            low = high
        while high - low > max(1, sum(bases) // 256):  # those whose bases do not fit are streamed whole
            middle = (low + high) // 2
            low, high = (middle, high) if left(refining(middle)) >= 0 else (low, middle)
        made = refining(low)
        if not any(made["refined"]):  # none fit: as dense-stream
            return {**options, "pinned": _spread(sizes, room)}
        wanted = [2 * layer + kind for layer in self.config.whole_layers for kind in (0, 1)]
        others = [r for r, refined in enumerate(made["refined"]) if not refined and r not in whole]
        for r in (*wanted, *others):
            pinned = [int(p or i == r) for i, p in enumerate(made["pinned"])]
            if left({**made, "pinned": pinned}) >= 0:
                made["pinned"] = pinned
        slots = [n * r for n, r in zip(n_units, made["refined"], strict=True)]
        cost = left(made) - left({**made, "capacity": slots})
        share = max(0.0, min(1.0, left(made) / cost)) if cost else 0.0
        return {**made, "capacity": [int(share * n) for n in slots]}

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
        ordered = any(region["order"] is not None for region in self.regions)  # of which a buffer holds a whole region
        return [
            {
                **self.base,
                "block_tokens": min(block_tokens, self.config.context),
                "stream_slots": 2 if ordered else stream_slots,
            }
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
        held = sum(_region_bytes(r) for r, p in zip(self.regions, options["pinned"], strict=True) if p)
        held += sum(r["base"]["bytes"] for r, p in zip(self.regions, options["refined"], strict=True) if p)
        held += parts["slots"]
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
            token_bytes=self.token_bytes(options),
            options=options,
            regions=tuple(self.region_plan(r, options) for r in range(len(self.regions))),
        )

    def region_plan(self, r: int, options: dict[str, Any]) -> RegionPlan:
        """How region r is held and read under these options."""
        region, slots, fetch = self.regions[r], options["capacity"][r], options["fetch"][r]
        n_units, reads = _n_units(region), Reads()
        if self.base["residency"] == "cached":
            held, n_units = "cached", region["n_columns"]
        elif options["refined"][r]:
            held, reads = "refined", fetched_reads(region, fetch, slots, options["run_cost"][r])
        elif self.base["residency"] == "resident" or options["pinned"][r]:
            held = "pinned"
        else:
            held, reads = "streamed", streamed_reads(region)
        return RegionPlan(
            layer=region["layer"],
            kind=region["kind"],
            held=held,
            base_bits=max(matrix["base_bits"] for matrix in region["matrices"]),
            n_units=n_units,
            slots=slots,
            fetch=fetch,
            reads=reads,
        )

    def token_bytes(self, options: dict[str, Any]) -> int:
        """Of units that refined regions fetch, and of regions streamed whole."""
        if self.base["residency"] != "stream":
            return 0
        each = zip(
            self.regions, options["pinned"], options["refined"], options["fetch"], options["run_cost"], strict=True
        )
        return sum(
            0
            if pinned
            else _core.max_run_bytes(m, cost, region["unit_bytes"], region["bytes"])
            if refined
            else _aligned(_region_bytes(region))
            for region, pinned, refined, m, cost in each
        )

    def streamed(self, options: dict[str, Any]) -> dict[str, int]:
        block = self.native(options)
        whole = [int(p or r) for p, r in zip(options["pinned"], options["refined"], strict=True)]
        token = self.native({**options, "pinned": whole}) if self.base["residency"] == "stream" else None
        names = ("stream_reads", "stream_bytes")
        return {name: block[name] for name in names} | {f"token_{n}": token[n] if token else 0 for n in names}

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


def _n_units(region: dict[str, Any]) -> int:
    return int(-(-region["n_columns"] // region["columns_per_unit"]))


def _ceil_mb(n_bytes: int) -> str:
    return f"{-(-n_bytes // 10**5) / 10:.1f}"


def _aligned(n_bytes: int) -> int:
    return -(-n_bytes // 4096) * 4096


def _region_bytes(region: dict[str, Any]) -> int:
    """Units and bases as they lie on flash, the gap between them included."""
    base = region["base"]
    return int(region["bytes"] if base is None else base["offset"] - region["offset"] + base["bytes"])


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
        ConfigError: a capacity above its region; method auto, which `dipper.auto.choose` settles.
    """
    if config.method == "auto":
        raise ConfigError("auto is no plan yet: dipper.auto.choose settles it and gives the plan with it")
    densities = densities_of(config, bundle.model.n_layers, None)
    host = rss_bytes() if host_bytes is None else host_bytes
    planner = Planner(bundle, config, host, densities, calibration_vectors(None))
    return planner.plan() if capacity is None else planner.plan_for(list(capacity))


def rss_bytes() -> int:
    """Resident set of this process now."""
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
