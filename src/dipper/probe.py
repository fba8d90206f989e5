"""What a bundle's disk and DRAM give, in about half a second: enough to decide by time.

Large reads without a pause give the bandwidth, small ones with many in flight the cost of a read, one alone its
latency. Of products only DRAM's bandwidth is known, which bounds them. A device profile, where one is given, says all
of it better (`dipper doctor --profile`).

    device = device_for("model.dipper")
    device.flash.batch_s(6000, 80e6)
"""

from __future__ import annotations

import os
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from . import _core
from .device import Compute, Device, Dram, Flash
from .doctor import drop_page_cache, fit_read_cost, machine
from .errors import ConfigError

__all__ = ["device_for", "probe_device", "sustained_reads_per_s"]

DEPTH = 64  # the engine's
LARGE_BYTES, SMALL_BYTES = 1 << 20, 12 << 10  # of a read: as in streaming, and as units of residuals come together
_LARGE_S, _SMALL_S, _DRAM_S = 0.2, 0.12, 0.05
_DRAM_BYTES = 64 << 20  # as much as the reads before it hold
_SCHEDSTAT = Path("/proc/thread-self/schedstat")  # nanoseconds on a CPU, nanoseconds waiting for one
_BOUNDLESS = 1e6  # a rate of products that DRAM bounds first


@lru_cache(maxsize=16)
def device_for(bundle: str | os.PathLike[str], profile: str | os.PathLike[str] | None = None) -> Device:
    """A profile by name or file, or else what a probe of the bundle's disk finds; the same for all of this process.

    Raises:
        ConfigError: no such profile, or a bundle too small to be probed.
        FlashError: a read failed.
    """
    return probe_device(Path(bundle)) if profile is None else Device.load(profile)


def probe_device(bundle: Path) -> Device:
    """Measures with reads of the bundle's own flash.bin, which hold up to 64 MiB for the moment.

    Raises:
        ConfigError: flash.bin is too small to tell large reads from small ones.
        FlashError: a read failed.
    """
    file = bundle / "flash.bin"
    reader: Any = _core.FlashReader(str(file), depth=DEPTH)
    if not reader.direct:
        drop_page_cache(file)
    large = min(LARGE_BYTES, reader.file_bytes // 4 // 4096 * 4096)
    if large < 4 * SMALL_BYTES:
        raise ConfigError(
            f"{file} has {reader.file_bytes >> 10} KiB, too little to measure its disk: give --device-profile"
        )
    rng = np.random.default_rng(0)
    sizes = (SMALL_BYTES, large)
    small_per_s = sustained_reads_per_s(reader, SMALL_BYTES, rng, n_batch=512, seconds=_SMALL_S)
    large_per_s = sustained_reads_per_s(reader, large, rng, n_batch=16, seconds=_LARGE_S)
    cost_s, bytes_per_s, _ = fit_read_cost(sizes, (1 / small_per_s, 1 / large_per_s))
    places = rng.integers(0, reader.file_bytes // 4096, 9, dtype=np.uint64) * np.uint64(4096)
    latency_s = float(np.median([reader.read_batch(places[i : i + 1], 4096) for i in range(len(places))]))
    facts = machine()
    dram_gbps = float(_core.dram_read_gbps(facts["cores"], _DRAM_BYTES, _DRAM_S))
    through = "" if reader.direct else ", through the page cache"
    return Device(
        name="probe",
        title=f"measured just now{through}",
        dram=Dram(bytes=int(facts["dram_bytes"]["total"]), gbps=dram_gbps),
        flash=Flash(
            gbps=1e-9 * bytes_per_s,
            cost_per_read_us=1e6 * cost_s,
            latency_us=1e6 * latency_s,
            queue_depth=DEPTH,
            alignment=4096,
        ),
        compute=Compute(gemv_gweights_per_s=_BOUNDLESS, gemm_gmacs_per_s=_BOUNDLESS),
    )


def sustained_reads_per_s(reader: Any, size: int, rng: np.random.Generator, *, n_batch: int, seconds: float) -> float:
    """Reads a second without a pause, once what an idle disk lets through at once is used up.

    Args:
        reader: a native FlashReader.
        size: bytes of a read, a multiple of 4096.
        rng: chooses their places.
        n_batch: reads submitted together.
        seconds: about how long; the first third does not count. A limit may act in periods of 0.1 s.
    """
    ends: list[float] = []  # wall time, since a limit counts the gaps between batches too
    started = _now()
    while not ends or ends[-1] < seconds or len(ends) < 4:
        offsets = rng.integers(0, reader.file_bytes // size, n_batch, dtype=np.uint64) * np.uint64(size)
        reader.read_batch(offsets, size)
        ends.append(_now() - started)
    first = min(next(i for i, end in enumerate(ends) if end >= ends[-1] / 3), len(ends) - 2)
    return n_batch * (len(ends) - 1 - first) / (ends[-1] - ends[first])


def _now() -> float:
    """Seconds on a clock that stands while this thread waits for a CPU, which says nothing of a disk."""
    try:
        waited_ns = int(_SCHEDSTAT.read_text().split()[1])
    except OSError:
        waited_ns = 0
    return time.perf_counter() - 1e-9 * waited_ns
