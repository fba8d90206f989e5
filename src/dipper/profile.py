"""This machine as a device profile: its disk's batches, its DRAM, and what the engine's work costs on it.

The disk is measured the way the engine uses it: batches of reads submitted at once, ascending with gaps, then a pause
longer than the batch took, so that a table of bursts is not a table of a limit. The limits in the long run are measured
apart, by reading without a pause.

Compute is fitted to a few short decodes of a bundle, each of which tells one part of the ledger from the others:

    dense-resident                  products of MLP, attention, head; what a token costs besides; prefill's rate
    simulated, density .9 and .3    products by column; masks and cache steps with nothing missing
    simulated, nothing cached       what a missing column costs to plan
    under a budget, from the disk   handing reads over; copying admitted records
    dense-stream, half pinned       what a stream draws from the disk while it multiplies

    profile = measure_profile(Path("smollm2.dipper"))
    profile.save("here.toml")
"""

from __future__ import annotations

import dataclasses
import importlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dipper.budget import EngineConfig, plan_run
from dipper.bundle import Bundle
from dipper.device import Compute, Device, Dram, Flash
from dipper.doctor import drop_page_cache, machine, measure_dram
from dipper.engine import Engine
from dipper.errors import ConfigError
from dipper.probe import DEPTH, sustained_reads_per_s
from dipper.sources import default_cache_dir
from dipper.touched import model_parts

__all__ = ["measure_profile", "this_machine"]

READS = (1, 4, 16, 64, 256, 1024)
REQUEST_BYTES = (4 << 10, 16 << 10, 64 << 10, 256 << 10)
MAX_BATCH_BYTES = 16 << 20
SUSTAINED_S = 3.0
_PROMPT = 128
_TOKENS = 24
_CONTEXT = _PROMPT + 2 * _TOKENS + 2


def measure_profile(
    path: Path, *, name: str = "this-machine", rounds: int = 3, progress: Callable[[str], None] | None = None
) -> Device:
    """Measures this machine with a bundle; about twenty seconds.

    Args:
        path: a bundle on the disk in question, whose kind of model compute is fitted to.
        name: of the profile.
        rounds: measurements of each point, whose median is taken.
        progress: told what is being measured.

    Raises:
        BundleError, ConfigError, FlashError: as the engine; a file too small to read batches from.
    """
    bundle = Bundle.open(path)
    say = progress or (lambda _: None)
    say("disk")
    flash = _measure_flash(path / "flash.bin", rounds)
    say("DRAM")
    dram_gbps = max(measure_dram(seconds=0.3).values())
    dram = Dram(bytes=int(machine()["dram_bytes"]["total"]), gbps=dram_gbps)
    say("compute")
    runs = _Runs(bundle, rounds)
    flash = dataclasses.replace(flash, stream_gbps=runs.stream_gbps())
    measured = (
        f"measured {time.strftime('%Y-%m-%d', time.gmtime())} by dipper doctor --profile with {bundle.model.name}"
    )
    return Device(
        name=name,
        title=_title(),
        dram=dram,
        flash=flash,
        compute=runs.fit(dram),
        sources={"dram": measured, "flash": measured, "compute": measured},
    )


def this_machine(
    path: Path, *, again: bool = False, progress: Callable[[str], None] | None = None
) -> tuple[Device, Path]:
    """This machine's profile for a bundle: measured once, then taken from dipper's cache folder.

    Args:
        path: a bundle.
        again: measure although there is one.
        progress: as `measure_profile`.

    Returns:
        The profile, and where it is kept.
    """
    bundle = Bundle.open(path)
    kept = default_cache_dir() / "profiles" / f"{bundle.header['header_sha256'][:16]}.toml"
    if kept.is_file() and not again:
        device = Device.load(kept)
        if device.title == _title():
            return device, kept
    device = measure_profile(path, progress=progress)
    kept.parent.mkdir(parents=True, exist_ok=True)
    device.save(kept)
    return device, kept


def _title() -> str:
    facts = machine()
    return f"{facts['cpu']}, {facts['cores']} cores, {facts['system']}"


# ------------------------------------------------------------------------------------------------ disk


def _measure_flash(file: Path, rounds: int) -> Flash:
    drop_page_cache(file)
    reader: Any = importlib.import_module("dipper._core").FlashReader(str(file), depth=DEPTH)
    if not reader.direct:
        raise ConfigError(f"{file} is read through the page cache ({reader.direct_note}): its disk cannot be profiled")
    if reader.file_bytes < MAX_BATCH_BYTES:
        raise ConfigError(
            f"{file} has {reader.file_bytes >> 20} MiB: profiling reads batches of {MAX_BATCH_BYTES >> 20} MiB; "
            "use a larger bundle"
        )
    rng = np.random.default_rng(0)
    sustained = {size: _sustained(reader, size, rng) for size in (1 << 20, 4 << 10)}  # first: spends what idling saved
    table = _measure_batches(reader, rng, rounds)
    by = {(n, size): us for n, size, us in table}  # gbps and cost: what a reader wants of a disk in two figures
    per_read = {size: by[256, size] / 256 for size in (REQUEST_BYTES[0], 64 << 10)}
    us_per_byte = max(per_read[64 << 10] - per_read[4 << 10], 1e-6) / (60 << 10)
    return Flash(
        gbps=1e-3 / us_per_byte,
        cost_per_read_us=max(0.0, per_read[4 << 10] - us_per_byte * (4 << 10)),
        latency_us=by[1, 4 << 10],
        queue_depth=DEPTH,
        alignment=4096,
        sustained_gbps=sustained[1 << 20] * (1 << 20) * 1e-9,
        sustained_reads_per_s=sustained[4 << 10],
        table=tuple(table),
    )


def _measure_batches(reader: Any, rng: np.random.Generator, rounds: int) -> list[tuple[float, float, float]]:
    """(reads, bytes of one, microseconds): medians; points in a new random order each round, since disks drift.

    Batches over MAX_BATCH_BYTES are not read: they take in proportion to the largest that are.
    """
    grid = [(n, size) for n in READS for size in REQUEST_BYTES]
    seconds: dict[tuple[int, int], list[float]] = {point: [] for point in grid}
    for _ in range(rounds):
        for i in rng.permutation(len(grid)):
            n, size = grid[i]
            if n * size > MAX_BATCH_BYTES:
                continue
            for _ in range(max(1, min(8, 64 // n))):  # small batches are noisy
                taken = float(reader.read_batch(_spread_offsets(reader.file_bytes, n, size, rng), size))
                seconds[n, size].append(taken)
                time.sleep(min(0.05, 2 * taken))
    medians = {point: float(np.median(s)) for point, s in seconds.items() if s}
    for n, size in grid:
        if (n, size) not in medians:
            largest = max(m for m in READS if (m, size) in medians)
            medians[n, size] = medians[largest, size] * n / largest
    return [(n, size, 1e6 * s) for (n, size), s in sorted(medians.items())]


def _spread_offsets(
    file_bytes: int, n: int, size: int, rng: np.random.Generator
) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """Ascending offsets with gaps of one to three reads, somewhere in the file: as a region's missing columns lie."""
    room = file_bytes // size
    steps = rng.integers(1, 4, n).cumsum() if 3 * n < room else np.arange(n)
    start = rng.integers(0, max(room - int(steps[-1]), 1))
    return np.asarray((start + steps - steps[0]) % room * size, np.uint64)


def _sustained(reader: Any, size: int, rng: np.random.Generator) -> float:
    n_batch = max(DEPTH, MAX_BATCH_BYTES // size // 2)
    return sustained_reads_per_s(reader, size, rng, n_batch=n_batch, seconds=SUSTAINED_S)


# ------------------------------------------------------------------------------------------------ compute


class _Runs:
    """Decodes that tell the ledger's parts from each other."""

    def __init__(self, bundle: Bundle, rounds: int) -> None:
        self.bundle, self.rounds = bundle, rounds
        self.parts = model_parts(bundle)
        self.prompt = [1 + 37 * i % (bundle.model.vocab_size - 1) for i in range(_PROMPT)]

    def weights(self, k: Sequence[int]) -> float:
        """Products of a token that selects k columns a region."""
        return float(np.dot(k, self.parts["column_weights"]))

    def decode(self, simulated: bool = False, **options: Any) -> tuple[dict[str, float], Any, Any, float]:
        """Medians of the ledger (seconds a token, `rest` what is left of wall time), counters, plan, least TTFT."""
        ledgers, ttfts = [], []
        config = EngineConfig(context=_CONTEXT, **options)
        with Engine.open(self.bundle.path, config, simulated=simulated) as engine:
            for _ in range(self.rounds):
                engine.reset()
                start = time.perf_counter()
                token = int(engine.prefill(self.prompt).argmax())
                ttfts.append(time.perf_counter() - start)
                for _ in range(2):
                    token = int(engine.step(token, copy=False).argmax())
                engine.reset_counters()
                start = time.perf_counter()
                for _ in range(_TOKENS):
                    token = int(engine.step(token, copy=False).argmax())
                wall = time.perf_counter() - start
                counters = engine.counters()
                parts = {name: s / _TOKENS for name, s in counters.ledger_s.items()}
                parts["rest"] = wall / _TOKENS - sum(s for name, s in parts.items() if name != "rest")
                ledgers.append(parts)
            plan = engine.plan
        return {name: float(np.median([p[name] for p in ledgers])) for name in ledgers[0]}, counters, plan, min(ttfts)

    def fit(self, dram: Dram) -> Compute:
        """Coefficients of `Compute`, each from the decodes that tell it from the others."""
        dense, _, _, ttft_s = self.decode(method="dense-resident")
        held = {d: self.decode(True, density=d, cache="lru", mlp_dram="1000b") for d in (0.9, 0.3)}
        missing = self.decode(True, density=0.5, cache="static", cold=True, mlp_dram=self._least())
        disk, counters, _, _ = self.decode(density=0.5, cache="lru", mlp_dram="60%")

        n_columns = self.parts["n_columns"]
        gemv = [(self.weights(n_columns), dense["gemv"])]
        gemv += [(self.weights(run[2].options["k"]), run[0]["gemv"]) for run in held.values()]
        region_s, s_per_weight = _line(*zip(*gemv, strict=True))
        select_s = min(held[0.9][0]["select"], held[0.3][0]["select"])
        per_miss = max(0.0, missing[0]["select"] - select_s) / max(missing[1].misses / _TOKENS, 1)
        # Under LRU every miss that fits is admitted; the caches are full by now.
        copied = counters.evictions * counters.useful_bytes / max(counters.misses, 1) / _TOKENS
        copy_s = disk["select"] - select_s - per_miss * counters.misses / _TOKENS
        attention, head = self.parts["attention"][0], self.parts["head"][0]
        kv_bytes = self.parts["kv_bytes"]["f16"] * self.bundle.model.n_layers * (_PROMPT + _TOKENS / 2)
        attention_s = max(dense["attention"] - kv_bytes / (1e9 * dram.gbps), 0.1 * dense["attention"])
        return Compute(
            gemv_gweights_per_s=1e-9 / s_per_weight,
            gemm_gmacs_per_s=1e-9 * _PROMPT * self.parts["macs"] / (ttft_s - dense["head"]),
            attention_gweights_per_s=1e-9 * attention / attention_s,
            head_gweights_per_s=1e-9 * head / dense["head"],
            region_us=1e6 * region_s / len(n_columns),
            select_ns_per_column=1e9 * select_s / int(n_columns.sum()),
            select_ns_per_miss=1e9 * per_miss,
            submit_us_per_read=1e6 * disk["submit"] * _TOKENS / max(counters.reads, 1),
            copy_gbps=1e-9 * copied / copy_s if copy_s > 0 and copied > 0 else None,
            token_us=1e6 * max(0.0, dense["rest"]),
        )

    def stream_gbps(self) -> float | None:
        """Of dense streaming that waits for the disk; None where it does not wait."""
        ledger, counters, _, _ = self.decode(method="dense-stream", mlp_dram="50%")
        token_s = sum(ledger.values())
        waits = ledger["wait"] > 0.05 * token_s
        return 1e-9 * counters.flash_bytes / _TOKENS / token_s if waits else None

    def _least(self) -> str:
        """A share of the MLP that caches next to nothing: its scales and buffers alone."""
        config = EngineConfig(density=0.5, cache="static", cold=True, mlp_dram="1000b", context=_CONTEXT)
        parts = plan_run(self.bundle, config).parts
        needed = sum(parts[name] for name in ("mlp_scales", "staging", "bookkeeping"))
        return f"{8 * needed / self.bundle.mlp_weights + 0.01:.3f}b"


def _line(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Intercept (not below zero) and slope, by least squares of the relative error."""
    weight = 1 / np.asarray(y)
    rows = np.stack([np.ones(len(x)), np.asarray(x)], axis=1) * weight[:, None]
    intercept, slope = np.linalg.lstsq(rows, np.ones(len(x)), rcond=None)[0]
    if intercept < 0:
        return 0.0, float(rows[:, 1].sum() / (rows[:, 1] ** 2).sum())
    return float(intercept), float(slope)
