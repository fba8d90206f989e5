"""What this machine's disk and DRAM give: the measurements behind `dipper doctor`.

Owns the read curve of a disk (request size x reads in flight), the cost of a read fitted to it, DRAM bandwidth, and the
facts that decide whether figures mean anything: direct I/O, io_uring, file system, page cache.

A batch of n reads of b bytes each, enough of them in flight, takes about `n * (a + b / BW)` seconds: `a` is the cost of
a read, `BW` the bandwidth, and at `b = a * BW` bytes half of the bandwidth is reached.

    profile = measure_disk(Path("model.dipper"))
    profile.cost_per_read_us, profile.gbps, profile.point(16384, 32).gbps
"""

from __future__ import annotations

import ctypes
import dataclasses
import importlib
import mmap
import os
import platform
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dipper.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = [
    "DiskProfile",
    "ReadPoint",
    "doctor",
    "drop_page_cache",
    "file_system",
    "fit_read_cost",
    "format_doctor",
    "machine",
    "measure_disk",
    "measure_dram",
    "page_cache_share",
]

REQUEST_BYTES = (4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20)
DEPTHS = (1, 4, 16, 32, 64)
# Below this a device's own cache answers most random reads.
MIN_FILE_BYTES = 64 << 20
TEST_FILE_BYTES = 256 << 20
# Left free beside the test file, so that a measurement never fills a disk.
SPARE_BYTES = 256 << 20
# The read cost is fitted at this depth, the engine's smallest in steady state; latency is the curve's depth 1.
FIT_DEPTH = 32


def _native() -> Any:
    # On use: importing this module must not need the extension.
    return importlib.import_module("dipper._core")


@dataclass(frozen=True, kw_only=True)
class ReadPoint:
    """One measured point: random aligned reads of `request_bytes`, `depth` of them in flight."""

    request_bytes: int
    depth: int
    reads_per_s: float

    @property
    def gbps(self) -> float:
        """Bandwidth in GB/s (1e9 bytes)."""
        return self.reads_per_s * self.request_bytes * 1e-9


@dataclass(frozen=True, kw_only=True)
class DiskProfile:
    """The read curve of a disk and the cost of a read fitted to it.

    `cost_per_read_us` and `gbps` are a and BW of `a + bytes / BW` at the depth `fit_depth`; `fit_error` is the largest
    relative error of that line over the request sizes.
    """

    points: tuple[ReadPoint, ...]
    cost_per_read_us: float
    gbps: float
    fit_depth: int
    fit_error: float
    backend: str
    backend_note: str
    direct: bool
    direct_note: str
    file_bytes: int

    def point(self, request_bytes: int, depth: int) -> ReadPoint:
        """The measured point; ConfigError names those there are."""
        for p in self.points:
            if (p.request_bytes, p.depth) == (request_bytes, depth):
                return p
        sizes = sorted({p.request_bytes for p in self.points})
        depths = sorted({p.depth for p in self.points})
        raise ConfigError(
            f"No measured point for {request_bytes} bytes at depth {depth}: request sizes are {sizes}, depths {depths}."
        )

    @property
    def latency_us(self) -> float:
        """Microseconds of one read alone, of the smallest measured request at the smallest depth."""
        alone = min(self.points, key=lambda p: (p.depth, p.request_bytes))
        return alone.depth / alone.reads_per_s * 1e6

    @property
    def half_bandwidth_bytes(self) -> int:
        """Request size that reaches half of the fitted bandwidth."""
        return round(self.cost_per_read_us * 1e-6 * self.gbps * 1e9)

    def to_dict(self) -> dict[str, Any]:
        """Everything, JSON-able; points carry their GB/s."""
        result = dataclasses.asdict(self)
        result["points"] = [{**dataclasses.asdict(p), "gbps": p.gbps} for p in self.points]
        result["latency_us"] = self.latency_us
        result["half_bandwidth_bytes"] = self.half_bandwidth_bytes
        return result


def fit_read_cost(request_bytes: Sequence[int], seconds_per_read: Sequence[float]) -> tuple[float, float, float]:
    """Fits `a + bytes / BW` to seconds per read by least squares of the *relative* error, a >= 0.

    Relative, since the plain error would fit the largest request alone.

    Returns:
        a in seconds, BW in bytes per second, the largest relative error.

    Raises:
        ConfigError: fewer than two request sizes, or reads that do not get slower with size.
    """
    sizes, seconds = np.asarray(request_bytes, np.float64), np.asarray(seconds_per_read, np.float64)
    if len(np.unique(sizes)) < 2 or len(sizes) != len(seconds):
        raise ConfigError(
            f"{len(sizes)} request sizes, {len(seconds)} times: a line needs two different sizes, and a time for each."
        )
    rows = np.stack([1 / seconds, sizes / seconds], axis=1)  # [n, 2], each row scaled to a right-hand side of 1
    a, per_byte = np.linalg.lstsq(rows, np.ones(len(sizes)), rcond=None)[0]
    if a < 0:
        a, per_byte = 0.0, rows[:, 1].sum() / (rows[:, 1] ** 2).sum()
    if per_byte <= 0:
        raise ConfigError(
            "Larger reads were not slower than small ones, so no bandwidth can be fitted:"
            " measure longer, on a quieter machine."
        )
    error = np.abs(rows @ np.array([a, per_byte]) - 1).max()
    return float(a), float(1 / per_byte), float(error)


def _existing(path: Path) -> Path:
    if not path.exists():
        raise ConfigError(f"{path} does not exist: give a bundle, a file or a directory on the disk to be measured.")
    return path


@contextmanager
def _file_to_read(path: Path) -> Iterator[Path]:
    """The file itself, a bundle's flash.bin, or, where those are small, an unnamed test file beside them."""
    candidate = path / "flash.bin" if path.is_dir() else path
    if candidate.is_file() and candidate.stat().st_size >= MIN_FILE_BYTES:
        yield candidate
        return
    directory = path if path.is_dir() else path.parent
    space = os.statvfs(directory)
    free_bytes = space.f_bavail * space.f_frsize
    if free_bytes < TEST_FILE_BYTES + SPARE_BYTES:
        raise ConfigError(
            f"{directory} has {free_bytes >> 20} MiB free, and measuring it takes a test file of"
            f" {TEST_FILE_BYTES >> 20} MiB (with {SPARE_BYTES >> 20} MiB to spare): free some space,"
            f" or give a file of at least {MIN_FILE_BYTES >> 20} MiB."
        )
    try:
        file = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115 (closed below; the open alone can be refused)
    except OSError as e:
        raise ConfigError(
            f"Cannot make a test file in {directory} ({e.strerror}): give a directory that you may write to,"
            f" or a file of at least {MIN_FILE_BYTES >> 20} MiB."
        ) from e
    with file:  # has no name: gone however this process ends
        block = np.random.default_rng(0).bytes(1 << 20)
        for i in range(TEST_FILE_BYTES >> 20):
            file.write(i.to_bytes(8, "little") + block[8:])  # no two blocks equal, none zero: nothing to compress away
        file.flush()
        os.fsync(file.fileno())
        yield Path(f"/proc/self/fd/{file.fileno()}")


def _reads_per_s(reader: Any, request_bytes: int, depth: int, seconds: float, rng: np.random.Generator) -> float:
    n_places = reader.file_bytes // request_bytes

    def rate(n_reads: int) -> float:
        offsets = rng.integers(0, n_places, n_reads, dtype=np.uint64) * np.uint64(request_bytes)
        return n_reads / float(reader.read_batch(offsets, request_bytes))

    n_pilot = max(4, depth)
    return rate(max(n_pilot, round(rate(n_pilot) * seconds)))


def measure_disk(
    path: Path,
    *,
    request_bytes: Sequence[int] = REQUEST_BYTES,
    depths: Sequence[int] = DEPTHS,
    seconds: float = 4.0,
    rounds: int = 3,
    backend: str = "auto",
) -> DiskProfile:
    """Measures random aligned reads of a file, of a bundle's flash.bin, or of a test file in a directory.

    Every point is measured once a round, in a new random order each, and its median taken: disks drift.

    Args:
        path: a bundle, a file, or a directory. What is below 64 MiB is stood in for by an unnamed test file beside it.
        request_bytes: sizes of a read, multiples of 4096.
        depths: numbers of reads in flight; 1 is one read alone.
        seconds: about how long to read in all (making a test file not counted).
        rounds: measurements of each point.
        backend: "auto", "io_uring" or "pread".

    Raises:
        ConfigError: no such path, no room or right for a test file, a request size or depth that cannot be.
        FlashError: the disk failed while being read.
    """
    if not request_bytes or any(b <= 0 or b % 4096 for b in request_bytes) or not depths or rounds < 1:
        raise ConfigError(
            f"request_bytes {list(request_bytes)} must be positive multiples of 4096, depths {list(depths)} not empty,"
            f" rounds {rounds} at least 1."
        )
    rng = np.random.default_rng()
    grid = [(b, d) for b in request_bytes for d in depths]
    rates: dict[tuple[int, int], list[float]] = {cell: [] for cell in grid}
    with _file_to_read(_existing(path)) as file:
        drop_page_cache(file)
        readers = {d: _native().FlashReader(str(file), backend=backend, depth=d) for d in depths}
        for _ in range(rounds):
            for i in rng.permutation(len(grid)):
                size, depth = grid[i]
                share = seconds / (rounds * len(grid))
                rates[grid[i]].append(_reads_per_s(readers[depth], size, depth, share, rng))
    points = tuple(
        ReadPoint(request_bytes=b, depth=d, reads_per_s=float(np.median(rates[b, d]))) for b, d in sorted(grid)
    )
    fit_depth = min(depths, key=lambda d: abs(d - FIT_DEPTH))
    line = [p for p in points if p.depth == fit_depth]
    a, bandwidth, error = fit_read_cost([p.request_bytes for p in line], [1 / p.reads_per_s for p in line])
    reader = readers[fit_depth]
    return DiskProfile(
        points=points,
        cost_per_read_us=a * 1e6,
        gbps=bandwidth * 1e-9,
        fit_depth=fit_depth,
        fit_error=error,
        backend=reader.backend,
        backend_note=reader.backend_note,
        direct=reader.direct,
        direct_note=reader.direct_note,
        file_bytes=reader.file_bytes,
    )


def measure_dram(*, n_threads: Sequence[int] = (), n_bytes: int = 0, seconds: float = 0.5) -> dict[int, float]:
    """DRAM read bandwidth in GB/s (1e9 bytes) by number of threads.

    Args:
        n_threads: thread counts; default: 1 and all usable cores.
        n_bytes: buffer; default: 1 GiB or a quarter of the available DRAM. A buffer that the last-level cache holds
            measures that cache (server processors share hundreds of MiB).
        seconds: of each measurement.
    """
    n_cores = len(os.sched_getaffinity(0))
    n_bytes = n_bytes or max(1 << 20, min(1 << 30, _dram_bytes()["available"] // 4))
    return {n: _native().dram_read_gbps(n, n_bytes, seconds) for n in n_threads or sorted({1, n_cores})}


def _dram_bytes() -> dict[str, int]:
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines() if ":" in line)
    kib = {name: int(value.split()[0]) for name, value in fields.items()}
    return {"total": kib["MemTotal"] << 10, "available": kib["MemAvailable"] << 10}


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith(("model name", "Hardware", "Model")):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def machine() -> dict[str, Any]:
    """Facts: processor, cores, instruction set of the kernels (None: not in this build), DRAM bytes, system."""
    isa = getattr(_native(), "isa", None)
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "isa": None if isa is None else str(isa()),
        "dram_bytes": _dram_bytes(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


def _unescape(field: str) -> str:
    return field.encode().decode("unicode_escape").encode("latin-1").decode()  # \040 is a space in mountinfo


def file_system(path: Path) -> str:
    """Type of the file system that holds path, such as ext4; "unknown" where /proc/self/mountinfo does not tell."""
    target = path.resolve()
    best, depth = "unknown", -1
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        mount_point = Path(_unescape(left.split(" ")[4]))
        # The later of two mounts on one place covers the earlier.
        if target.is_relative_to(mount_point) and len(mount_point.parts) >= depth:
            best, depth = right.split(" ")[0], len(mount_point.parts)
    return best


def page_cache_share(path: Path) -> float:
    """Share of a file's pages that lie in the page cache, 0..1, by mincore; an empty file gives 0.

    Raises:
        ConfigError: no such file.
    """
    if not _existing(path).is_file():
        raise ConfigError(f"{path} is not a file: page-cache residency is told of one file, such as flash.bin.")
    n_bytes = path.stat().st_size
    if n_bytes == 0:
        return 0.0
    libc = ctypes.CDLL(None, use_errno=True)
    n_pages = -(-n_bytes // mmap.PAGESIZE)
    resident = np.zeros(n_pages, np.uint8)
    with path.open("rb") as file, mmap.mmap(file.fileno(), n_bytes, access=mmap.ACCESS_READ) as view:
        address = np.frombuffer(view, np.uint8).ctypes.data
        result = libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(n_bytes), ctypes.c_void_p(resident.ctypes.data))
        if result != 0:
            raise ConfigError(
                f"mincore of {path} failed ({os.strerror(ctypes.get_errno())}): residency is unknown here."
            )
    return float((resident & 1).mean())


def drop_page_cache(path: Path) -> None:
    """Drops a file's clean pages from the page cache (flushes it first); needs no rights beyond reading."""
    with _existing(path).open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _notes(disk: DiskProfile, cached_share: float | None) -> list[str]:
    notes = []
    if not disk.direct:
        notes.append(
            f"No direct I/O ({disk.direct_note}): reads go through the page cache, so these figures may be DRAM's."
            " Put the bundle on a disk file system such as ext4 or xfs."
        )
    if disk.backend != "io_uring":
        notes.append(f"No io_uring ({disk.backend_note}): a pool of pread threads costs several times the CPU a read.")
    if disk.fit_error > 0.5:
        notes.append(
            f"The read cost fits badly (off by up to {disk.fit_error:.0%}): other work was on the disk,"
            " or its limits are not linear."
        )
    if cached_share is not None and cached_share > 0.05:
        notes.append(
            f"{cached_share:.0%} of flash.bin lies in the page cache, DRAM that no budget counts:"
            " drop it before timing."
        )
    return notes


def doctor(path: Path, *, seconds: float = 4.0) -> dict[str, Any]:
    """Measures the machine for a bundle (or any path): JSON-able facts, DRAM, disk and notes on what stands in the way.

    Args:
        path: a bundle, a file or a directory on the disk in question.
        seconds: about how long to read from the disk.

    Raises:
        ConfigError, FlashError: as `measure_disk`.
    """
    started = time.time()
    flash = _existing(path) / "flash.bin"
    cached_share = page_cache_share(flash) if flash.is_file() else None  # before measuring, which drops it
    disk = measure_disk(path, seconds=seconds)
    return {
        "path": str(path),
        "measured_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
        "machine": machine(),
        "dram_gbps": {str(n): gbps for n, gbps in measure_dram().items()},
        "file_system": file_system(path),
        "page_cache_share": cached_share,
        "disk": disk.to_dict(),
        "notes": _notes(disk, cached_share),
    }


def _size(n_bytes: int) -> str:
    return f"{n_bytes >> 20} MiB" if n_bytes >= 1 << 20 else f"{n_bytes >> 10} KiB"


def format_doctor(report: dict[str, Any]) -> RenderableType:
    """What `doctor` found, for a terminal: a rich renderable."""
    from rich.console import Group
    from rich.markup import escape
    from rich.table import Table

    host, disk = report["machine"], report["disk"]
    gib = {name: n / 2**30 for name, n in host["dram_bytes"].items()}
    facts = Table.grid(padding=(0, 2))
    for name, value in (
        ("processor", f"{host['cpu']}, {host['cores']} cores, kernels {host['isa'] or 'unknown'}"),
        ("DRAM", f"{gib['total']:.1f} GiB, {gib['available']:.1f} available"),
        ("DRAM reads", ", ".join(f"{gbps:.1f} GB/s with {n} threads" for n, gbps in report["dram_gbps"].items())),
        ("file system", report["file_system"]),
        ("direct I/O", "yes" if disk["direct"] else f"no: {disk['direct_note']}"),
        ("io_uring", "yes" if disk["backend"] == "io_uring" else f"no: {disk['backend_note']}"),
        ("one read alone", f"{disk['latency_us']:.0f} µs"),
        (
            f"{disk['fit_depth']} in flight",
            f"a read costs {disk['cost_per_read_us']:.1f} µs + bytes / {disk['gbps']:.2f} GB/s"
            f" (half of it at {disk['half_bandwidth_bytes'] / 1024:.0f} KiB; fit within {disk['fit_error']:.0%})",
        ),
    ):
        facts.add_row(name, escape(value))
    depths = sorted({p["depth"] for p in disk["points"]})
    curve = Table(title="random reads, GB/s by reads in flight", title_justify="left")
    curve.add_column("request", justify="right")
    for depth in depths:
        curve.add_column(str(depth), justify="right")
    gbps = {(p["request_bytes"], p["depth"]): p["gbps"] for p in disk["points"]}
    for size in sorted({p["request_bytes"] for p in disk["points"]}):
        curve.add_row(_size(size), *(f"{gbps[size, depth]:.3f}" for depth in depths))
    return Group(facts, curve, *(f"! {escape(note)}" for note in report["notes"]))
