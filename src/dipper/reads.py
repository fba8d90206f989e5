"""What a token is expected to read of the MLP, and how a budget of reads is shared out over refined regions.

Which residuals a token fetches is known only as it comes; how many, or for what cost, is known before. Expected are the
reads and bytes of as many units scattered at random: a page of 4096 bytes is read if any unit on it is fetched, and
pages that touch are one read. Where runs of units are chosen by cost, those of inputs drawn from a normal distribution.

    budget = IoBudget.parse("20ms", flash)
    budget.share_out(regions, left)            # units to fetch by region
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from .cache import refine
from .errors import ConfigError

if TYPE_CHECKING:
    from .device import Flash

__all__ = ["PAGE", "IoBudget", "Reads", "fetched_reads", "run_cost", "streamed_reads", "takes_part"]

PAGE = 4096  # what reads start and end at multiples of
_MAX_READ_BYTES = 256 << 10  # the reader cuts longer ones
_CHUNK_BYTES = 1 << 20  # of what is streamed whole
_SECONDS = {"MS": 1e-3, "S": 1.0}
_BYTES = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class Reads:
    """Requests to the disk and their bytes; means, so not whole numbers."""

    n: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: Reads) -> Reads:
        return Reads(self.n + other.n, self.bytes + other.bytes)


def run_cost(unit_bytes: int, read_cost: int | None) -> float:
    """What starting a read costs, in the bytes of a unit: `read_cost`, and what whole pages add at its ends.

    None: 0, reads do not count.
    """
    if read_cost is None:
        return 0.0
    return float(read_cost + PAGE - math.gcd(unit_bytes, PAGE)) / float(unit_bytes)


def takes_part(region: dict[str, Any]) -> bool:
    """Whether a budget is spent on this region: GLU columns only by pages, since less is not worth a read."""
    return bool(region["kind"] == "input" or region["unit_bytes"] >= PAGE)


def fetched_reads(region: dict[str, Any], n_fetch: int, n_cached: int = 0, cost: float = 0.0) -> Reads:
    """Of as many of a region's units, wherever they lie, or of runs of units for as much (`cost`: `run_cost`)."""
    n_units = -(-region["bytes"] // region["unit_bytes"])
    if cost and 0 < n_fetch < n_units - n_cached:
        return _in_runs(region["unit_bytes"], n_units, n_fetch, n_cached, cost)
    return _scattered(region["unit_bytes"], region["bytes"], min(n_fetch, n_units - n_cached))


def streamed_reads(region: dict[str, Any]) -> Reads:
    """Of a region that every token reads whole: chunks, each in one read, of a split region in two."""
    base = region["base"]
    n_bytes = region["bytes"] if base is None else base["offset"] - region["offset"] + base["bytes"]
    n_bytes = -(-n_bytes // PAGE) * PAGE
    return Reads((1 if base is None else 2) * -(-n_bytes // _CHUNK_BYTES), n_bytes)


@lru_cache(maxsize=4096)
def _scattered(unit_bytes: int, region_bytes: int, n_fetched: int) -> Reads:
    n_units = -(-region_bytes // unit_bytes)
    share = min(1.0, n_fetched / n_units)
    starts = np.arange(0, region_bytes, PAGE)
    first = starts // unit_bytes  # of the units on a page
    last = np.minimum((np.minimum(starts + PAGE, region_bytes) - 1) // unit_bytes, n_units - 1)
    touched = 1 - (1 - share) ** (last - first + 1)
    # A read begins where a page is touched and the one before is not: by a unit that begins on the page.
    new = np.diff(last, prepend=-1)
    begun = (1 - share) ** np.append(0, (last - first + 1)[:-1]) * (1 - (1 - share) ** new)
    n_bytes = float(touched.sum()) * PAGE
    return Reads(max(float(begun.sum()), n_bytes / _MAX_READ_BYTES), n_bytes)


@lru_cache(maxsize=4096)
def _in_runs(unit_bytes: int, n_units: int, n_fetch: int, n_cached: int, cost: float) -> Reads:
    rng = np.random.default_rng(0)
    n_tokens, n_reads, n_bytes = 4, 0.0, 0
    for _ in range(n_tokens):
        cached = rng.permutation(n_units) < n_cached
        read = refine(rng.standard_normal(n_units), np.ones(n_units), None, 1, cached, n_fetch, cost).read.astype(int)
        first, last = read * unit_bytes // PAGE, ((read + 1) * unit_bytes - 1) // PAGE
        of_read = PAGE * (int(np.sum(last - first + 1)) - int(np.sum(first[1:] == last[:-1])))
        n_bytes += of_read
        n_reads += max(1.0 + float(np.sum(first[1:] > last[:-1] + 1)), of_read / _MAX_READ_BYTES)
    return Reads(n_reads / n_tokens, n_bytes / n_tokens)


@dataclass(frozen=True)
class IoBudget:
    """What a token may read of the MLP: seconds on a disk, or bytes where `flash` is None.

    `read_cost` as `EngineConfig` has it.
    """

    text: str
    limit: float
    flash: Flash | None = None
    read_cost: int | None = None

    @staticmethod
    def is_time(text: str) -> bool:
        """Whether a budget is one of time, which needs a disk to mean anything. ConfigError: it is no budget."""
        return _amount(text)[1] in _SECONDS

    @classmethod
    def parse(cls, text: str, flash: Flash | None, read_cost: int | None = None) -> IoBudget:
        """A budget such as "20ms" or "80MB"; `flash` is what times reads.

        Raises:
            ConfigError: not of this form, or nothing.
        """
        value, unit = _amount(text)
        if unit in _BYTES:
            return cls(text, value * _BYTES[unit], None, read_cost)
        assert flash is not None, "a budget of time comes with a disk"
        return cls(text, value * _SECONDS[unit], flash, read_cost)

    def fetched(self, reads: Reads) -> float:
        """Cost of one region's fetched units, in the budget's unit: seconds or bytes."""
        if self.flash is None or reads.n == 0:
            return reads.bytes
        return float(self.flash.batch_s(max(1.0, reads.n), reads.bytes))

    def streamed(self, reads: Reads) -> float:
        """Cost of what is read whole."""
        return reads.bytes if self.flash is None else float(self.flash.stream_s(reads.n, reads.bytes))

    def told(self, cost: float) -> str:
        """A cost in words, rounded up, as a budget may be given."""
        scale, unit = (1e-3, "ms") if self.flash is not None else (1e6, "MB")
        return f"{math.ceil(10 * cost / scale - 1e-9) / 10:.1f}{unit}"

    def share_out(self, regions: Sequence[dict[str, Any]], left: float) -> list[int]:
        """Units that each of these regions fetches, the same share of all that take part, for `left` at most.

        At least a unit of each, where `left` does for that.
        """
        n_units = [takes_part(region) * -(-region["bytes"] // region["unit_bytes"]) for region in regions]

        least = int(self.cost(regions, [min(n, 1) for n in n_units]) <= left)

        def shared(share: float) -> list[int]:
            return [min(n, max(least, int(share * n + 1e-9))) for n in n_units]

        low, high = 0.0, 1.0
        if self.cost(regions, n_units) <= left:
            return n_units
        for _ in range(24):
            middle = (low + high) / 2
            low, high = (middle, high) if self.cost(regions, shared(middle)) <= left else (low, middle)
        return shared(low)

    def cost(self, regions: Sequence[dict[str, Any]], fetch: Sequence[int]) -> float:
        """Of fetching so many units of each region, one batch of reads after the other."""
        each = zip(regions, fetch, strict=True)
        return sum(self.fetched(fetched_reads(r, m, 0, run_cost(r["unit_bytes"], self.read_cost))) for r, m in each)


def _amount(text: str) -> tuple[float, str]:
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]+)\s*", text)
    unit = match.group(2).upper() if match else ""
    if not match or unit not in {**_SECONDS, **_BYTES}:
        raise ConfigError(f"io budget '{text}' is neither a time nor an amount: write 20ms or 80MB, what a token reads")
    if float(match.group(1)) <= 0:
        raise ConfigError(f"io budget '{text}' is nothing: give more than zero, or --fetch 0")
    return float(match.group(1)), unit
