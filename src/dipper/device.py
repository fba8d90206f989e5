"""Device profiles: what a machine gives, as figures with their sources, and how long it takes for what a token asks.

A profile is a TOML file, one of `names()` or one of the user's own (`dipper doctor --profile` writes this machine's).
Units stand in the names; GB are 1e9 bytes. Figures that a profile leaves out cost nothing.

    device = Device.load("snapdragon-8-gen-3")
    device.flash.batch_s(n_reads=200, n_bytes=3_276_800)        # seconds until all of them are there

The time of n reads asked for at once is `max(latency, cost) + (n - 1) cost + bytes / bandwidth`, or, where a profile
has measured them, that of a table. `sustained` limits hold over many tokens: a disk that lets bursts through faster
than it lasts, as a throttled one does, is bound by them in the long run.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import tomli
import tomli_w

from dipper.errors import ConfigError
from dipper.files import whole_file

__all__ = ["Compute", "Device", "Dram", "Energy", "Flash", "names"]

Floats = npt.NDArray[np.float64]


def _positive(where: str, **values: float | None) -> None:
    for name, value in values.items():
        _reasonable(where, name, value)
        if value is not None and not value > 0:
            raise ConfigError(f"{where}.{name} is {value}: a device has more than none of it; give a positive figure")


def _not_negative(where: str, **values: float | None) -> None:
    for name, value in values.items():
        if value is not None and value > _LEAST:  # a cost of next to nothing is none
            _reasonable(where, name, value)
        if value is not None and not value >= 0:
            raise ConfigError(f"{where}.{name} is {value}: give zero or a positive figure")


_LEAST, _MOST = 1e-9, 1e18  # of any figure: what lies outside is a slip of the pen
_MAX_ALIGNMENT = 1 << 20


def _reasonable(where: str, name: str, value: float | None) -> None:
    """Refuses what would end as an infinity or a zero."""
    if value is not None and (abs(value) > _MOST or 0 < value < _LEAST):
        told = str(value) if len(str(value)) <= 24 else f"a number of {len(str(value))} digits"
        raise ConfigError(f"{where}.{name} is {told}: figures lie between {_LEAST:g} and {_MOST:g}; correct it")


@dataclass(frozen=True, kw_only=True)
class Dram:
    """What is installed, and the bandwidth at which weights are read from it."""

    bytes: int
    gbps: float

    def __post_init__(self) -> None:
        _positive("dram", bytes=self.bytes, gbps=self.gbps)


@dataclass(frozen=True, kw_only=True)
class Flash:
    """Reads from flash.

    Attributes:
        gbps: of large reads.
        cost_per_read_us: what a read adds beyond its bytes where many are in flight.
        latency_us: of one small read alone.
        queue_depth: reads in flight that these figures hold for.
        alignment: bytes that a read starts and ends at multiples of.
        stream_gbps: what streaming draws while it multiplies, where that was measured; None: what large reads get.
        sustained_gbps, sustained_reads_per_s: limits in the long run; None: none but the above.
        table: measured seconds of batches, rows of (reads, bytes of a read, microseconds); replaces gbps, cost and
            latency within its range and beyond.
    """

    gbps: float
    cost_per_read_us: float
    latency_us: float
    queue_depth: int
    alignment: int
    stream_gbps: float | None = None
    sustained_gbps: float | None = None
    sustained_reads_per_s: float | None = None
    table: tuple[tuple[float, float, float], ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "table", _rows(self.table))
        _positive(
            "flash", gbps=self.gbps, queue_depth=self.queue_depth, alignment=self.alignment,
            stream_gbps=self.stream_gbps, sustained_gbps=self.sustained_gbps,
            sustained_reads_per_s=self.sustained_reads_per_s,
        )  # fmt: skip
        _not_negative("flash", cost_per_read_us=self.cost_per_read_us, latency_us=self.latency_us)
        if self.alignment & (self.alignment - 1):
            raise ConfigError(f"flash.alignment is {self.alignment}: reads are aligned to a power of two")
        if self.alignment > _MAX_ALIGNMENT:
            raise ConfigError(
                f"flash.alignment is {self.alignment}: {_MAX_ALIGNMENT} is the most that reads are made in"
            )
        sizes = {row[1] for row in self.table}
        counts = {row[0] for row in self.table}
        pairs = {row[:2] for row in self.table}
        is_grid = len(self.table) == len(pairs) == len(sizes) * len(counts) and min(len(sizes), len(counts)) >= 2
        if self.table and not is_grid:
            raise ConfigError(
                f"flash.table has {len(self.table)} rows for {len(counts)} numbers of reads and {len(sizes)} sizes: "
                "give each pair once, at least two of either"
            )

    @property
    def flat(self) -> Flash:
        """The same bandwidth without a cost per read or a latency, as the paper's simulator has it."""
        return dataclasses.replace(
            self, cost_per_read_us=0.0, latency_us=0.0, table=(), stream_gbps=None, sustained_reads_per_s=None
        )

    def batch_s(self, n_reads: npt.ArrayLike, n_bytes: npt.ArrayLike) -> Floats:
        """Seconds until reads that were asked for at once are all there; zero for none.

        Args:
            n_reads: of a batch; any shape.
            n_bytes: of the whole batch, same shape.
        """
        reads, total = np.asarray(n_reads, np.float64), np.asarray(n_bytes, np.float64)
        if not self.table:
            first = max(self.latency_us, self.cost_per_read_us)
            seconds = 1e-6 * (first + (reads - 1) * self.cost_per_read_us) + total / (1e9 * self.gbps)
            return np.where(reads > 0, seconds, 0.0)
        return np.where(reads > 0, self._measured_s(np.maximum(reads, 1), total), 0.0)

    def _measured_s(self, reads: Floats, total: Floats) -> Floats:
        """Bilinear in the logarithms of reads, size and time; beyond the table time grows in proportion."""
        counts = np.unique([row[0] for row in self.table])
        sizes = np.unique([row[1] for row in self.table])
        times = np.empty((len(counts), len(sizes)))
        for n, bytes_each, us in self.table:
            times[np.searchsorted(counts, n), np.searchsorted(sizes, bytes_each)] = math.log(us * 1e-6)
        size: Floats = total / reads
        x, i = _place(np.log(counts), np.log(np.clip(reads, counts[0], counts[-1])))
        y, j = _place(np.log(sizes), np.log(np.clip(size, sizes[0], sizes[-1])))
        low = times[i, j] * (1 - y) + times[i, j + 1] * y
        high = times[i + 1, j] * (1 - y) + times[i + 1, j + 1] * y
        beyond = np.maximum(reads / counts[-1], 1.0) * np.maximum(size / sizes[-1], 1.0)
        return np.asarray(np.exp(low * (1 - x) + high * x) * beyond)

    def stream_s(self, n_reads: float, n_bytes: float) -> float:
        """Seconds of large reads that run ahead of the products made of them."""
        if self.stream_gbps is None:
            return float(self.batch_s(n_reads, n_bytes))
        return n_bytes / (1e9 * self.stream_gbps)

    def sustained_s(self, n_reads: float, n_bytes: float) -> float:
        """Seconds that the limits in the long run ask for."""
        by_bytes = 0.0 if self.sustained_gbps is None else n_bytes / (1e9 * self.sustained_gbps)
        by_reads = 0.0 if self.sustained_reads_per_s is None else n_reads / self.sustained_reads_per_s
        return max(by_bytes, by_reads)


def _rows(table: Any) -> tuple[tuple[float, float, float], ...]:
    """Rows of three positive numbers."""
    rows: list[Any] = list(table) if isinstance(table, (list, tuple)) else [None]
    for row in rows:
        is_row = isinstance(row, (list, tuple)) and len(row) == 3
        if not is_row or not all(_is_number(value) and math.isfinite(value) and value > 0 for value in row):
            raise ConfigError(
                "flash.table must have rows of reads, bytes of a read, microseconds: three positive numbers"
            )
    return tuple((float(n), float(size), float(us)) for n, size, us in rows)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _place(grid: Floats, at: Floats) -> tuple[Floats, npt.NDArray[np.intp]]:
    """Share of the way from grid[i] to grid[i + 1], and i."""
    i = np.clip(np.searchsorted(grid, at, side="right") - 1, 0, len(grid) - 2)
    return (at - grid[i]) / (grid[i + 1] - grid[i]), i


@dataclass(frozen=True, kw_only=True)
class Compute:
    """How fast the processor is, and what the engine's bookkeeping costs on it.

    Attributes:
        gemv_gweights_per_s: packed weights multiplied a second for one token, where DRAM does not hold them back.
        gemm_gmacs_per_s: multiply-accumulates a second in prefill.
        attention_gweights_per_s, head_gweights_per_s: the first for those parts, where they were measured apart.
        region_us: of a region's products beyond its weights: starting and ending a section of threads.
        select_us_per_region, select_ns_per_column: masks and cache steps.
        select_ns_per_miss: finding places and reads for missing columns.
        submit_us_per_read: handing a read to the kernel.
        copy_gbps: admitted records into their slots; None: not counted.
        token_us: of a token beyond all parts.
    """

    gemv_gweights_per_s: float
    gemm_gmacs_per_s: float
    attention_gweights_per_s: float | None = None
    head_gweights_per_s: float | None = None
    region_us: float = 0.0
    select_us_per_region: float = 0.0
    select_ns_per_column: float = 0.0
    select_ns_per_miss: float = 0.0
    submit_us_per_read: float = 0.0
    copy_gbps: float | None = None
    token_us: float = 0.0

    def __post_init__(self) -> None:
        rates = ("gemv_gweights_per_s", "gemm_gmacs_per_s", "attention_gweights_per_s", "head_gweights_per_s")
        _positive("compute", **{name: getattr(self, name) for name in (*rates, "copy_gbps")})
        costs = [f.name for f in dataclasses.fields(self) if f.name not in (*rates, "copy_gbps")]
        _not_negative("compute", **{name: getattr(self, name) for name in costs})


@dataclass(frozen=True, kw_only=True)
class Energy:
    """Picojoules of a byte moved; None where nobody knows."""

    dram_pj_per_byte: float | None = None
    flash_pj_per_byte: float | None = None

    def __post_init__(self) -> None:
        _not_negative("energy", dram_pj_per_byte=self.dram_pj_per_byte, flash_pj_per_byte=self.flash_pj_per_byte)


@dataclass(frozen=True, kw_only=True)
class Device:
    """One profile. `sources` says where each figure is from, under its name ("flash.gbps")."""

    name: str
    title: str
    dram: Dram
    flash: Flash
    compute: Compute
    energy: Energy = Energy()
    sources: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for key, source in self.sources.items():
            if not isinstance(source, str):
                raise ConfigError(f"sources.{key} is {source!r}: say in words where the figure is from")

    @classmethod
    def load(cls, name: str | os.PathLike[str]) -> Device:
        """A profile by name or from a file.

        Raises:
            ConfigError: neither a name (the nearest is named) nor a file, or a file that is no profile.
        """
        if os.fspath(name) in names():
            text = resources.files("dipper").joinpath("devices").joinpath(f"{name}.toml").read_text(encoding="utf-8")
            return cls.from_text(text, os.fspath(name))
        path = Path(name)
        if not path.is_file():
            near = difflib.get_close_matches(path.name, names(), n=1, cutoff=0.4)
            hint = f"did you mean {near[0]}?" if near else "it is no file either;"
            raise ConfigError(f"there is no device '{name}'; {hint} known are {', '.join(names())}")
        try:
            return cls.from_text(path.read_text(encoding="utf-8"), str(path))
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path} is no text: give a device profile, as dipper doctor --profile writes") from error

    @classmethod
    def from_text(cls, text: str, where: str) -> Device:
        """A profile from TOML; `where` names it in errors. ConfigError as `load`."""
        try:
            content = tomli.loads(text)
        except (tomli.TOMLDecodeError, RecursionError) as error:
            raise ConfigError(f"{where} is no TOML ({error}): correct it, or copy one of dipper's profiles") from error
        try:
            _known(cls, content, "the profile")
            parts: dict[str, Any] = {
                "dram": _made(Dram, content.pop("dram", {}), "dram"),
                "flash": _made(Flash, content.pop("flash", {}), "flash"),
                "compute": _made(Compute, content.pop("compute", {}), "compute"),
                "energy": _made(Energy, content.pop("energy", {}), "energy"),
            }
            return _made(cls, {**content, **parts}, "the profile")
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the profile, whole or not at all."""
        with whole_file(path) as out:
            out.write(tomli_w.dumps(self.as_dict()).encode())

    def as_dict(self) -> dict[str, Any]:
        """The profile as its file has it; figures that are not known are left out."""
        return _without_none(dataclasses.asdict(self))


_Made = TypeVar("_Made")


def _made(cls: type[_Made], content: Any, where: str) -> _Made:
    """A dataclass from a table: every key known, none missing, numbers where numbers belong."""
    if not isinstance(content, dict):
        raise ConfigError(f"{where} is {content!r}: it must be a table")
    fields = _known(cls, content, where)
    for key, value in content.items():
        if str(fields[key].type) not in _WANTED:
            continue  # checks itself
        wanted, told = _WANTED[str(fields[key].type)]
        if not isinstance(value, wanted) or isinstance(value, bool):
            raise ConfigError(f"{where}.{key} is {value!r}: it must be {told}")
    missing = [
        name
        for name, f in fields.items()
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING and name not in content
    ]
    if missing:
        raise ConfigError(f"{where} lacks {', '.join(missing)}: a device needs it")
    return cls(**content)


_WANTED: dict[str, tuple[tuple[type, ...], str]] = {
    "int": ((int,), "a whole number"),
    "float": ((int, float), "a number"),
    "float | None": ((int, float), "a number"),
    "str": ((str,), "a text"),
    "Mapping[str, str]": ((dict,), "a table of texts"),
}


def _known(cls: type[Any], content: dict[str, Any], where: str) -> dict[str, dataclasses.Field[Any]]:
    """The fields of a dataclass by name, if all keys are among them."""
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in content:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(fields)}"
            raise ConfigError(f"{where} has no figure '{key}'; {hint}")
    return fields


def _without_none(content: dict[str, Any]) -> dict[str, Any]:
    """TOML has no null; empty tables and arrays say nothing."""
    kept = {k: _without_none(v) if isinstance(v, dict) else v for k, v in content.items()}
    return {k: v for k, v in kept.items() if v is not None and v not in ({}, [], ())}


def names() -> tuple[str, ...]:
    """The profiles that come with dipper."""
    folder = resources.files("dipper").joinpath("devices")
    return tuple(sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml")))
