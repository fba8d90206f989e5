"""The abstract's three figures beside what was found here: the table at the head of the report and in the README."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dipper.drawings.beyond import bench_way, benchmarks
from dipper.drawings.headline import gain_told
from dipper.savings import LOSSES, PAPER, Saving, at_loss, least_loss, savings
from dipper.sheets import DENSE, NOT_MEASURED, Book, Measured, Table, percent, table, with_error

__all__ = ["NOTES", "headline_table"]


def headline_table(book: Book) -> Table:
    """The abstract's three figures beside what was found here; what cannot be had says so."""
    found = [s for s in savings(book.sheets("headline"), book) if not s.place.cost_per_read_us]  # flat, as published
    paper = [s for s in found if s.model == PAPER and s.method == "dip-ca"]
    real = [s for s in found if s.masks == "real masks"]
    measured = _on_disk(book)
    used = [*(cell for s in (*paper, *real) for cell in s.cells), *(cell for f in measured for cell in f.cells)]
    stale = any(cell.state == "stale" for cell in used)
    return table(
        "The headline: pruned against a dense model streamed from flash" + (" (of stale results)" if stale else ""),
        ["", "published", "Phi-3-medium, simulated", "small models, simulated", "small models, measured"],
        [
            ["memory, at equal throughput", "−46\u00a0%", _saved(paper), _best(real, _told_saved), NOT_MEASURED],
            ["throughput, at equal memory", "+40\u00a0%", _gained(paper), _best(real, _told_gain), _gains(measured)],
            [
                "perplexity lost", "less than 0.1", "cannot be had: needs the weights",
                _best(real, lambda s: with_error(s.loss)), _losses(measured),
            ],
        ],
    )  # fmt: skip


NOTES = (
    "Published: the abstract of arXiv 2412.01380, DIP on Phi-3-medium in simulation. A loss of 0.1 is taken as "
    f"{percent(LOSSES['+0.1'], 1)} for other models, which it is at a perplexity of about 4.3.",
    "Phi-3-medium, simulated: DIP-CA at 4 bits on the paper's device (flash 1 GB/s, DRAM 60 GB/s, reads cost their "
    "bytes alone), masks generated, of each density the better γ. Without its weights no perplexity can be measured, "
    "so no density can be called the published one.",
    "Small models, simulated: the same device, the model's own masks, real perplexities without LoRA; of the settings "
    f"that lose at most {percent(LOSSES['+0.1'], 1)}, the one that gains most; where none that is simulated loses so "
    "little, the one that loses least. The loss of DIP-CA is that with half of the columns cached, whatever the "
    "budget.",
    "Memory is the largest share of the process's, and of the MLP's, that is saved where the throughput is that of "
    "dense streaming; where even the least DRAM simulated is as fast, it is at least this much. Throughput is the "
    "median over the DRAM budgets simulated, in brackets the least and the most; dense streaming has the very same "
    "DRAM, by the line through its two nearest budgets.",
    "Small models, measured: the engine on a disk, of every budget (bits of DRAM per weight of the MLP) the fastest "
    "pruned setting beside dense streaming at equal DRAM, with the shares of input and GLU units that a token fetches. "
    "The loss is that of the very same setting, on whichever disk it was scored, beside the dense model on the same "
    "tokens.",
)


def _by_density(found: Sequence[Saving]) -> Iterator[tuple[float, list[Saving]]]:
    for density in sorted({s.density for s in found if s.density is not None}, reverse=True):
        yield density, [s for s in found if s.density == density]


def _saved(found: Sequence[Saving]) -> str:
    parts = []
    for density, group in _by_density(found):
        both = [s for s in group if s.dram_saved is not None and s.mlp_dram_saved is not None]
        best = max(both, key=lambda s: s.dram_saved or 0.0, default=None)
        if best is not None:
            parts.append(f"{_told_saved(best)}: density {density:g}")
    return "; ".join(parts) or NOT_MEASURED


def _gained(found: Sequence[Saving]) -> str:
    parts = []
    for density, group in _by_density(found):
        best = max((s for s in group if s.gains), key=lambda s: s.gain, default=None)
        if best is not None:
            parts.append(f"{gain_told(best)}: density {density:g}")
    return "; ".join(parts) or NOT_MEASURED


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
    """A pruned setting that was measured, and its benchmark."""

    title: str
    cell: Measured
    row: Mapping[str, Any]

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
    """The fastest pruned setting of a model, disk and budget, and the same one where it was scored: itself if it was,
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
    """Of every model, disk and budget."""
    by_model: dict[str, list[_Row]] = {}
    for sheet in (sheet for name in book.experiments for sheet in book.sheets(name)):
        for cell, rows in benchmarks(sheet):
            pruned = [row for row in rows if row.get("r") and row["method"] not in DENSE]
            by_model.setdefault(sheet.model, []).extend(_Row(title=sheet.title, cell=cell, row=r) for r in pruned)
    found = []
    for mine in by_model.values():
        best: dict[tuple[bool, str], _Row] = {}
        for one in mine:
            at = one.cell.held, one.row["budget"]
            if at not in best or one.row["r"] > best[at].row["r"]:
                best[at] = one
        for one in best.values():
            scored = [other for other in mine if other.setting == one.setting and other.loss is not None]
            loss = max(scored, key=lambda other: (other is one, other.n_scored), default=None)
            found.append(_Fastest(gain=one, loss=loss))
    return found


def _gains(found: Sequence[_Fastest]) -> str:
    told: dict[str, list[str]] = {}
    for one in found:
        words = f"{percent(one.gain.row['r'] - 1)} ({one.way})"
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
