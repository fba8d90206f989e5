"""What pruning saves in simulation: throughput at equal DRAM, and DRAM at equal throughput, beside dense streaming.

found = savings(book.sheets("headline"), book)
best = at_loss([s for s in found if s.model == "smollm2"], 0.023)     # of settings that lose 2.3 % at most
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, NamedTuple

from dipper.sheets import DENSE, Book, Loss, Measured, Sheet, dram_gb, way

__all__ = [
    "LOSSES",
    "PAPER",
    "Place",
    "Saving",
    "Simulated",
    "at_loss",
    "dense_at",
    "kind_of_masks",
    "least_loss",
    "savings",
    "simulated",
]

# The published loss, +0.1, and +0.2 and +0.5, at a perplexity of about 4.3, as a share: what it is for other models.
LOSSES = {"+0.1": 0.023, "+0.2": 0.046, "+0.5": 0.115}
PAPER = "phi-3-medium"  # the model of the published headline


class Place(NamedTuple):
    """Where something was simulated: a device, and what of its flash is not as in its profile."""

    device: str | None
    flash_gbps: float | None
    cost_per_read_us: float | None
    alignment: int | None

    @property
    def is_flat(self) -> bool:
        """Whether reads cost their bytes alone, as in the paper."""
        return self.cost_per_read_us == 0 and self.alignment in (None, 1)

    @property
    def cost(self) -> str:
        """What a read costs beside its bytes; empty: as the profile has it."""
        if self.cost_per_read_us is None:
            return ""
        return "flat" if self.is_flat else f"{self.cost_per_read_us:g} µs a read"

    @property
    def told(self) -> str:
        """All of it."""
        words = [self.device or "", "" if self.flash_gbps is None else f"{self.flash_gbps:g} GB/s", self.cost]
        words += [] if self.alignment in (None, 1) else [f"{self.alignment} B aligned"]
        return ", ".join(word for word in words if word) or "as it is"


@dataclass(frozen=True, kw_only=True)
class Simulated:
    """One record of a sweep, and its cell."""

    cell: Measured
    record: dict[str, Any]

    @property
    def options(self) -> dict[str, Any]:
        """Those of its cell."""
        return self.cell.options

    @property
    def place(self) -> Place:
        """Where."""
        return Place(*(self.options.get(name) for name in Place._fields))

    @property
    def budget(self) -> str | None:
        """Its budget, where all records of its cell have the same."""
        budgets = [*self.options.get("dram", []), *self.options.get("mlp_dram", [])]
        return str(budgets[0]) if len(budgets) == 1 else None

    @property
    def line(self) -> tuple[str, float | None]:
        """The way to run and its density."""
        density = self.record["density"]
        return way(self.record), None if density is None else round(density, 3)


def simulated(sheet: Sheet, *, variants: bool = False) -> list[Simulated]:
    """All records of a sheet; those of single models' fits of the generator only where they are asked for."""
    return [
        Simulated(cell=cell, record=record)
        for cell in sheet.of("simulate")
        if cell.result is not None and ("variant" in cell.options) == variants
        for record in cell.result["records"]
    ]


def dense_at(gb: float, dense: Iterable[Mapping[str, Any]]) -> float | None:
    """Tokens a second of dense streaming that holds so much DRAM, from records of it.

    What a token streams falls with what is held: its time is taken from the line through the two nearest budgets, as
    far beyond the least or the greatest as that is from the next. None: nothing near was simulated.
    """
    times = sorted({dram_gb(d): 1 / d["tok_per_s"] for d in dense}.items())
    if len(times) < 2:
        return next((1 / time for size, time in times if math.isclose(size, gb, rel_tol=0.02)), None)
    above = min(max(bisect(times, (gb,)), 1), len(times) - 1)
    (less, slower), (more, faster) = times[above - 1 : above + 1]
    share = (gb - less) / (more - less)
    time = slower + share * (faster - slower)
    return 1 / time if -1 <= share <= 2 and time > 0 else None


def kind_of_masks(runs: Iterable[Simulated]) -> str:
    """Where masks are from: a real model over a text, or the generator."""
    kinds = {str(run.record["workload"]["kind"]) for run in runs} - {"dense"}
    return "generated masks" if kinds == {"generated"} else "real masks" if kinds else "dense"


@dataclass(frozen=True, kw_only=True)
class Saving:
    """What one way to run at one density saves over dense streaming at equal DRAM or at equal speed.

    Attributes:
        gains: throughput over dense streaming, less 1, by DRAM in GB.
        rule: the way to run, its cache's policy left out.
        gamma: of dip-ca; None: another method.
        dram_saved, mlp_dram_saved: largest share of the process's, of the MLP's DRAM; None where it never is as fast.
        loss: of perplexity, and its error; None: not measured.
        cells: all that this rests on: what was simulated, dense streaming too, and what was scored.
    """

    model: str
    title: str
    masks: str
    place: Place
    rule: str
    method: str
    gamma: float | None
    cache: str | None
    density: float | None
    gains: dict[float, float]
    dram_saved: float | None
    mlp_dram_saved: float | None
    loss: Loss | None
    cells: tuple[Measured, ...] = field(repr=False)

    @property
    def way(self) -> str:
        """The way to run."""
        return self.rule if self.cache is None else f"{self.rule} {self.cache}"

    @property
    def gain(self) -> float:
        """Median over DRAM."""
        return median(self.gains.values())

    @property
    def setting(self) -> str:
        """The way to run, and its density where it has one."""
        return self.way if self.density is None else f"{self.way}, density {self.density:g}"


def savings(sheets: Sequence[Sheet], book: Book) -> list[Saving]:
    """Every way to run beside dense streaming on the same device."""
    found = []
    for sheet in sheets:
        runs = simulated(sheet)
        for place in dict.fromkeys(run.place for run in runs):
            here = [run for run in runs if run.place == place]
            dense = [run for run in here if run.record["method"] == "dense-stream"]
            lines: dict[tuple[str, float | None], list[Simulated]] = {}
            for run in here:
                if run.record["method"] not in DENSE:
                    lines.setdefault(run.line, []).append(run)
            if dense:
                found += [_saving(sheet, book, kind_of_masks(here), dense, line) for line in lines.values()]
    return found


def _saving(sheet: Sheet, book: Book, masks: str, streamed: Sequence[Simulated], line: Sequence[Simulated]) -> Saving:
    first, records, gains = line[0].record, [run.record for run in line], {}
    dense = [run.record for run in streamed]
    for record in records:
        streamed_at = dense_at(dram_gb(record), dense)
        if streamed_at is not None:
            gains[round(dram_gb(record), 3)] = record["tok_per_s"] / streamed_at - 1
    method, density = first["method"], line[0].line[1]
    gamma = first["gamma"] if method == "dip-ca" else None
    more: dict[str, Any] = {}
    if method == "planes":
        more = {name: line[0].options.get(name) for name in ("base_bits", "unit_bytes")}
        more |= {name: first.get(name) for name in ("fetch", "fetch_glu", "read_cost")}
    loss, scored = book.loss_of(sheet.model, method, density, gamma, **more)
    return Saving(
        model=sheet.model, title=sheet.title, masks=masks, place=line[0].place, rule=way(first, cache=False),
        method=method, gamma=gamma, cache=first["cache"], density=density, gains=gains,
        dram_saved=_saved(dense, records, dram_gb),
        mlp_dram_saved=_saved(dense, records, lambda r: float(r["mlp_bits_per_weight"])),
        loss=loss, cells=(*(run.cell for run in (*streamed, *line)), *scored),
    )  # fmt: skip


def _saved(
    dense: Sequence[Mapping[str, Any]], line: Sequence[Mapping[str, Any]], size: Callable[[Mapping[str, Any]], float]
) -> float | None:
    """The largest share of a size that a line saves where it is as fast as dense streaming; None where it never is."""
    points = sorted((size(record), float(record["tok_per_s"])) for record in line)
    best = None
    for record in dense:
        speed = record["tok_per_s"]
        needed = points[0][0] if speed <= points[0][1] else None  # even the least is faster: at least this much
        for (x0, y0), (x1, y1) in itertools.pairwise(points):
            if needed is None and y0 <= speed <= y1:
                needed = x0 + (x1 - x0) * (speed - y0) / (y1 - y0) if y1 > y0 else x0
        if needed is not None:
            share = 1 - needed / size(record)
            best = share if best is None else max(best, share)
    return best


def at_loss(found: Iterable[Saving], limit: float) -> Saving | None:
    """The setting that gains most, by the median over DRAM, among those measured to lose at most `limit`."""
    allowed = [s for s in _judged(found) if s.loss is not None and s.loss[0] <= limit]
    return max(allowed, key=lambda s: s.gain, default=None)


def least_loss(found: Iterable[Saving]) -> Saving | None:
    """The setting that loses least; of equals the one that gains most."""
    return min(_judged(found), key=lambda s: (s.loss or (0.0, None))[0] - 1e-9 * s.gain, default=None)


def _judged(found: Iterable[Saving]) -> list[Saving]:
    """Settings whose gain and loss are known, and that could be run: nobody knows the future as Belady does."""
    return [s for s in found if s.loss is not None and s.gains and s.cache != "belady"]
