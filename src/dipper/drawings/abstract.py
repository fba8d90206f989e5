"""The abstract's three figures beside what was found here: the table at the head of the report and in the README."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dipper.drawings.beyond import at_equal_dram, bench_way, benchmarks
from dipper.drawings.headline import gain_told
from dipper.savings import LOSSES, PAPER, Saving, at_loss, least_loss, savings
from dipper.sheets import DENSE, NOT_MEASURED, Book, Measured, Table, number, percent, span, table, with_error

__all__ = ["NOTES", "headline_table"]


def headline_table(book: Book) -> Table:
    """The abstract's three figures beside what was found here; what cannot be had says so."""
    found = savings(book.sheets("headline"), book)
    flat = [s for s in found if not s.place.cost_per_read_us]  # as published
    paper, real = _parted(flat)
    paper_costly, real_costly = _parted(s for s in found if s.place.cost_per_read_us)
    measured = _on_disk(book)
    simulated = (*paper, *real, *paper_costly, *real_costly)
    used = [*(cell for s in simulated for cell in s.cells), *(cell for f in measured for cell in f.cells)]
    stale = any(cell.state == "stale" for cell in used)
    costs = " or ".join(dict.fromkeys(s.place.cost for s in (*paper_costly, *real_costly)))
    rows = [
        [
            "memory, at equal throughput", "−46\u00a0%", _each(paper, _told_saved, lambda s: s.dram_saved),
            _best(real, _told_saved), NOT_MEASURED,
        ],
        [
            "throughput, at equal memory", "+40\u00a0%", _each(paper, gain_told, _gain),
            _best(real, _told_gain), _gains(measured),
        ],
        [
            "perplexity lost", "less than 0.1", _lost_elsewhere(paper, real),
            _best(real, lambda s: with_error(s.loss)), _losses(measured),
        ],
    ]  # fmt: skip
    if costs:
        costly = [
            f"throughput, at equal memory, with {costs}", "not given", _each(paper_costly, gain_told, _gain),
            _best(real_costly, lambda s: f"{_told_gain(s)}, which loses {with_error(s.loss)}"),
            "a disk has its own: above",
        ]  # fmt: skip
        rows.insert(2, costly)
    return table(
        "The headline: pruned against a dense model streamed from flash" + (" (of stale results)" if stale else ""),
        ["", "published", "Phi-3-medium, simulated", "small models, simulated", "small models, measured"],
        rows,
    )


NOTES = (
    "Published: the abstract of arXiv 2412.01380, DIP on Phi-3-medium in simulation. A loss of 0.1 is taken as "
    f"{percent(LOSSES['+0.1'], 1)} for other models, which it is at a perplexity of about 4.3.",
    "Phi-3-medium, simulated: 4 bits on the paper's device (flash 1 GB/s, DRAM 60 GB/s, reads cost their bytes "
    "alone), masks generated; of DIP and DIP-CA at each density what gains most. Without its weights no "
    "perplexity can be measured, so no setting can be called the published one; what the same one loses on the "
    "small models is told instead.",
    "Small models, simulated: the same device, the model's own masks, real perplexities without LoRA; of the "
    f"settings that lose at most {percent(LOSSES['+0.1'], 1)}, the one that gains most, in every row but that with a "
    "cost of reads, which has its own; where none that is simulated loses so little, the one that loses least. A loss "
    "is that on the most tokens that its setting was scored on; that of DIP-CA is with half of the columns cached, "
    "whatever the budget.",
    "Memory is the largest share of all that is held (interpreter and libraries left out), and of the MLP's, that "
    "is saved where the throughput is that of dense streaming; where even the least DRAM simulated is as fast, it "
    "is at least this much. Throughput is the median over the DRAM budgets simulated, in brackets the least and "
    "the most; dense streaming has the very same DRAM, by the line through its two nearest budgets.",
    "A cost of each read beside its bytes, in blocks of 4,096 bytes, is what UFS 4.0 and disks have, and the "
    "paper's device has not.",
    "Small models, measured: the engine on a disk, of every budget (bits of DRAM per weight of the MLP) the "
    "fastest setting of DIP, which drops columns, and of planes, which refines them (the shares of input and GLU "
    "units that a token fetches); dense streaming at the very same DRAM, its time in proportion to what it then "
    "streams. One run each: how far runs of one setting lie apart is in "
    "docs/log.md. The loss is that of the very same setting, on whichever disk it was "
    "scored, beside the dense model on the same tokens.",
)


def _parted(found: Iterable[Saving]) -> tuple[list[Saving], list[Saving]]:
    """DIP and DIP-CA of the published model, and everything of those with weights; nobody knows the future."""
    known = [s for s in found if s.cache != "belady"]
    paper = [s for s in known if s.model == PAPER and s.method in ("dip", "dip-ca")]
    return paper, [s for s in known if s.masks == "real masks"]


def _gain(saving: Saving) -> float | None:
    return saving.gain if saving.gains else None


def _each(found: Sequence[Saving], tell: Callable[[Saving], str], value: Callable[[Saving], float | None]) -> str:
    """Of each density the setting of the highest value of every method; one line where methods come to the same."""
    best: dict[tuple[float, str], Saving] = {}
    known = [s for s in found if value(s) is not None]
    for s in sorted(known, key=lambda s: -(value(s) or 0)):
        best.setdefault((-(s.density or 0), s.method), s)
    lines: dict[tuple[float, str], str] = {}
    for density, method in sorted(best):
        one = best[density, method]
        lines.setdefault((density, tell(one)), f"{one.setting}: {tell(one)}")
    return "; ".join(lines.values()) or NOT_MEASURED


def _lost_elsewhere(paper: Sequence[Saving], real: Sequence[Saving]) -> str:
    """Of the published model no loss is known: what each setting loses on the models that have weights here."""
    parts = []
    order = sorted(paper, key=lambda s: (-(s.density or 0), s.method, s.gamma or 0))
    for density, method, gamma, name in dict.fromkeys((s.density, s.method, s.gamma, s.rule) for s in order):
        same = [s for s in real if (s.density, s.method, s.gamma) == (density, method, gamma)]
        losses = [s.loss[0] for s in same if s.loss is not None]
        if losses:
            parts.append(f"{name}, density {number(density, '{:g}')}: {span(min(losses), max(losses))}")
    unknown = "cannot be had: needs the weights"
    return "; ".join([f"{unknown}. The small models lose with", *parts]) if parts else unknown


def _best(found: Sequence[Saving], tell: Callable[[Saving], str]) -> str:
    """Of each model the setting that gains most at the published loss; where none loses so little, the least lossy."""
    parts = []
    for model in dict.fromkeys(s.model for s in found):
        mine = [s for s in found if s.model == model]
        best, least = at_loss(mine, LOSSES["+0.1"]), least_loss(mine)
        if best is not None:
            parts.append(f"{best.title}: {tell(best)}")
        elif least is not None:
            parts.append(f"{least.title}: {tell(least)} (none simulated loses less than {with_error(least.loss)})")
    return "; ".join(parts) or NOT_MEASURED


def _told_gain(saving: Saving) -> str:
    return f"{gain_told(saving)}, {saving.setting}"


def _told_saved(saving: Saving) -> str:
    if saving.dram_saved is None or saving.mlp_dram_saved is None:
        return "never as fast"
    return f"{percent(-saving.dram_saved)}, of the MLP's {percent(-saving.mlp_dram_saved)}"


# ------------------------------------------------------------------------------------------------ on a disk

# What makes two rows of `bench_planes.py` the same setting.
_SETTING = ("budget", "method", "base", "density", "gamma", "fetch", "fetch_glu", "read_cost", "whole")


@dataclass(frozen=True, kw_only=True)
class _Row:
    """A pruned setting that was measured, its throughput over dense streaming at equal DRAM, and its benchmark."""

    title: str
    cell: Measured
    row: Mapping[str, Any]
    ratio: float

    @property
    def setting(self) -> tuple[Any, ...]:
        return tuple(self.row.get(name) for name in _SETTING)

    @property
    def loss(self) -> str | None:
        """In words, with the tokens scored; None: not scored."""
        if self.row.get("relative") is None:
            return None
        told = with_error((self.row["relative"], self.row.get("relative_stderr")))
        return f"{told} on {self.n_scored:,} tokens" if self.n_scored else told

    @property
    def n_scored(self) -> int:
        return (self.cell.result or {}).get("ppl_tokens") or 0


@dataclass(frozen=True, kw_only=True)
class _Fastest:
    """The fastest setting of a model, disk, budget and kind, and the same one where it was scored: itself if it was,
    else that on the most tokens; None: nowhere."""

    gain: _Row
    loss: _Row | None

    @property
    def disk(self) -> str:
        return "held disk" if self.gain.cell.held else "disk as it is"

    @property
    def way(self) -> str:
        return bench_way(self.gain.row)

    @property
    def cells(self) -> tuple[Measured, ...]:
        return (self.gain.cell,) if self.loss is None else (self.gain.cell, self.loss.cell)


def _on_disk(book: Book) -> list[_Fastest]:
    """Of every model, disk and budget, planes and what drops columns apart."""
    by_model: dict[str, list[_Row]] = {}
    for sheet in (sheet for name in book.experiments for sheet in book.sheets(name)):
        for cell, rows in benchmarks(sheet):
            by_model.setdefault(sheet.model, []).extend(
                _Row(title=sheet.title, cell=cell, row=row, ratio=at_equal_dram(row, rows))
                for row in rows
                if row.get("r") and row["method"] not in DENSE
            )
    found = []
    for mine in by_model.values():
        best: dict[tuple[bool, str, bool], _Row] = {}
        for one in mine:
            at = one.cell.held, one.row["budget"], one.row["method"] == "planes"
            if at not in best or one.ratio > best[at].ratio:
                best[at] = one
        for one in best.values():
            scored = [other for other in mine if other.setting == one.setting and other.loss is not None]
            loss = max(scored, key=lambda other: (other is one, other.n_scored), default=None)
            found.append(_Fastest(gain=one, loss=loss))
    return found


def _gains(found: Sequence[_Fastest]) -> str:
    told: dict[str, list[str]] = {}
    for one in found:
        words = f"{percent(one.gain.ratio - 1)} ({one.way})"
        told.setdefault(f"{one.gain.title}, {one.disk}", []).append(words)
    return _told(told)


def _losses(found: Sequence[_Fastest]) -> str:
    """The disk is told only where the same setting has another loss on each."""
    disks: dict[tuple[str, str], dict[str, str]] = {}  # by model and setting: of every loss the first disk
    for one in found:
        if one.loss is not None and one.loss.loss is not None:
            disks.setdefault((one.gain.title, one.way), {}).setdefault(one.loss.loss, one.disk)
    told: dict[str, list[str]] = {}
    for (title, way), losses in disks.items():
        for loss, disk in losses.items():
            told.setdefault(title, []).append(f"{loss} ({way}{f', {disk}' if len(losses) > 1 else ''})")
    return _told(told)


def _told(found: Mapping[str, Sequence[str]]) -> str:
    return "; ".join(f"{where}: {', '.join(each)}" for where, each in found.items()) or NOT_MEASURED
