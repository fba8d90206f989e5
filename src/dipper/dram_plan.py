"""A DRAM plan: every byte that a run will hold, and what a token will read, decided before anything is loaded.

`budget.Planner` makes plans; this is what they say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from .reads import Reads

__all__ = ["Plan", "RegionPlan"]

# How a region is held, and the word for it.
_HELD = {
    "refined": "refined",
    "cached": "with a cache of columns",
    "pinned": "whole in DRAM",
    "streamed": "streamed whole",
}


@dataclass(frozen=True, kw_only=True)
class RegionPlan:
    """How one region is held and read.

    Attributes:
        layer, kind: which it is.
        held: refined (bases in DRAM, some residuals read), cached (a column cache), pinned (whole in DRAM), streamed.
        base_bits: of its codes, the most of its matrices; 0 where it is not split.
        n_units: that are read and cached as one: columns, of a split region some columns' residuals.
        slots: units that its cache has room for.
        fetch: units that a token reads, where refined.
        reads: what a token is expected to read; nothing where it is pinned, and where hits decide (cached).
    """

    layer: int
    kind: str
    held: str
    base_bits: int
    n_units: int
    slots: int
    fetch: int
    reads: Reads


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
        token_stream_reads, token_stream_bytes: of that what a decoded token reads: regions that are used whole and are
            not held.
        token_bytes: what a decoded token reads of the MLP at most where that is known before: all but dip and dip-ca.
        regions: how each region of the MLP is held and read.
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
    token_stream_reads: int
    token_stream_bytes: int
    token_bytes: int
    options: dict[str, Any] = field(repr=False)
    regions: tuple[RegionPlan, ...] = ()

    @property
    def total_bytes(self) -> int:
        """Bytes of all parts."""
        return sum(self.parts.values())

    def mlp_limit_bits(self, mlp_weights: int) -> float:
        """Bits per MLP weight that the MLP might hold at most under the budgets."""
        rest = self.total_bytes - self.mlp_bytes
        limits = [self.mlp_budget_bytes, None if self.budget_bytes is None else self.budget_bytes - rest]
        return 8 * min(limit for limit in (*limits, float("inf")) if limit is not None) / mlp_weights

    @property
    def token_reads(self) -> Reads | None:
        """What a decoded token is expected to read of the MLP; None where hits decide it (dip and dip-ca)."""
        if not self.regions or any(region.held == "cached" for region in self.regions):
            return None
        return sum((region.reads for region in self.regions), Reads())

    @property
    def fetched_shares(self) -> tuple[float, float]:
        """Share of the units of refined input and GLU regions that a token fetches; 0 where none is refined."""
        refined = [region for region in self.regions if region.held == "refined"]
        units = {kind: sum(r.n_units for r in refined if r.kind == kind) for kind in ("input", "glu")}
        fetched = {kind: sum(r.fetch for r in refined if r.kind == kind) for kind in units}
        shares = [fetched[kind] / n if n else 0.0 for kind, n in units.items()]
        return shares[0], shares[1]

    def lines(self) -> list[str]:
        """The plan in words: a line for the process, for the MLP, for each kind of region, and for the reads."""
        mib = {name: f"{name.replace('_', ' ')} {value / 2**20:.1f}" for name, value in self.parts.items() if value}
        budget = "no limit" if self.budget_bytes is None else f"budget {self.budget_bytes / 2**20:.1f}"
        mlp_budget = "" if self.mlp_budget_bytes is None else f" of {self.mlp_budget_bytes / 2**20:.1f}"
        reads = self.token_reads
        return [
            f"DRAM plan, MiB: total {self.total_bytes / 2**20:.1f} ({budget}) = {' + '.join(mib.values())}",
            f"MLP share, MiB: {self.mlp_bytes / 2**20:.1f}{mlp_budget} = "
            f"{self.mlp_bits_per_weight:.2f} bits per MLP weight; "
            f"{100 * self.cached_fraction:.1f} % of the columns held",
            *(_kind_line(kind, [r for r in self.regions if r.kind == kind]) for kind in _kinds(self.regions)),
            *(
                [f"flash, a token: {reads.bytes / 1e6:.1f} MB in {reads.n:,.0f} reads expected"]
                if reads and reads.n
                else []
            ),
        ]

    def as_dict(self) -> dict[str, Any]:
        """What `lines` says, JSON-able, region by region."""
        reads = self.token_reads
        return {
            "parts": self.parts,
            "total_bytes": self.total_bytes,
            "budget_bytes": self.budget_bytes,
            "mlp_bytes": self.mlp_bytes,
            "mlp_budget_bytes": self.mlp_budget_bytes,
            "mlp_bits_per_weight": self.mlp_bits_per_weight,
            "cached_fraction": self.cached_fraction,
            "minimum_bytes": self.minimum_bytes,
            "token_reads": None if reads is None else asdict(reads),
            "regions": [asdict(region) for region in self.regions],
        }


def _kinds(regions: Sequence[RegionPlan]) -> list[str]:
    return list(dict.fromkeys(region.kind for region in regions))


def _kind_line(kind: str, regions: Sequence[RegionPlan]) -> str:
    """How the regions of a kind are held, those held alike together."""
    words = []
    for held, told in _HELD.items():
        alike = [region for region in regions if region.held == held]
        if not alike:
            continue
        words.append(f"{len(alike)} {told}")
        if held in ("refined", "cached"):
            slots, units = sum(r.slots for r in alike), sum(r.n_units for r in alike)
            what = "residuals" if held == "refined" else "columns"
            detail = f"{slots:,} slots for {100 * slots / units:.1f} % of the {what}"
            if held == "refined":
                bits = " or ".join(map(str, sorted({r.base_bits for r in alike})))
                fetched = sum(r.fetch for r in alike)
                detail = f"base of {bits} bits, {detail}, a token fetches {100 * fetched / units:.1f} %"
            words[-1] += f" ({detail})"
    return f"{kind} regions: {', '.join(words)}"
