"""Columns refined, not dropped: `planes`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from dipper.cache import ColumnCache, scan_refine
from dipper.errors import ConfigError
from dipper.layout import base_bits_by_kind, columns_per_unit, unit_size
from dipper.methods.cached import CachedMethod
from dipper.methods.method import Glu, MethodConfig, mean_density
from dipper.reads import run_cost
from dipper.selector import top_k_mask
from dipper.split_weights import SplitMatrix, quantised_split

__all__ = ["Planes"]


class _RefinedRegion:
    """One region of `planes`: its matrices as base and residual, its units, and what a column's bits are.

    Args:
        matrices: of the region, in a record's order.
        base_bits: as `MethodConfig`.
        unit_bytes: as `MethodConfig`.
    """

    def __init__(self, matrices: Sequence[SplitMatrix], base_bits: int, unit_bytes: int | None) -> None:
        self.matrices = matrices
        self.n = int(matrices[0].whole.shape[1])
        self.refines = all(m.can_split for m in matrices)
        self.code_bits = sum(m.code_bits for m in matrices)  # of a column
        self.residual_bits = sum(m.residual_bits for m in matrices) if self.refines else 0
        record_bytes = sum(m.record_bytes for m in matrices)
        self.per_unit = 1 if unit_bytes is None else columns_per_unit(record_bytes, self.n, unit_bytes)
        self.unit_bytes = record_bytes if unit_bytes is None else unit_size(record_bytes, self.per_unit)
        self.n_units = -(-self.n // self.per_unit)
        self.norm = torch.from_numpy(np.sqrt(sum(m.squares for m in matrices)).astype(np.float32))  # [n]
        self.norm = self.norm.to(matrices[0].whole.device)
        self.drops = base_bits == 0
        self.n_fetch = 0

    def scores(self, x: Tensor) -> Tensor:
        """fp32 [..., n_units] of inputs [..., n]: what `cache.refine` ranks."""
        squares = (x.float() * self.norm).square()
        short = self.n_units * self.per_unit - self.n
        return functional.pad(squares, (0, short)).unflatten(-1, (self.n_units, self.per_unit)).sum(-1)

    def columns(self, units: Tensor) -> Tensor:
        """bool [..., n] of units [..., n_units]."""
        return units if self.per_unit == 1 else units.repeat_interleave(self.per_unit, -1)[..., : self.n]

    def product(self, x: Tensor, refined: Tensor | None, which: int, bias: Tensor | None) -> Tensor:
        """Matrix `which` times x [..., n], columns that are not refined by their base; None: all are refined."""
        matrix = self.matrices[which]
        if refined is None:
            return functional.linear(x, matrix.whole, bias)
        y = functional.linear(x * refined, matrix.whole, bias)
        return y if matrix.base is None else y + functional.linear(x * ~refined, matrix.base)


class Planes(CachedMethod):
    """Columns refined, not dropped: upper bits of all codes resident, the lower ones of the units that matter read.

    What `planes` is in the engine (docs/architecture.md): units are ranked by the error that their residuals remove,
    the best `fetch` of them that are not cached are read, and cached ones are used as well. Without `capacity` nothing
    is cached, and all tokens are taken at once on their device; with it, or in runs of units (`read_cost`), the native
    choice runs against a cache of units for each sequence, which begins, as the engine's does, with the first ones.
    Codes are those of the source, or its weights quantised to 4 bits. `deferred` measures what it would cost to read a
    token's units while the token before it is computed.
    """

    name = "planes"
    summary = "upper bits of all weights, the lower ones of the units whose residuals matter most"

    def __init__(self, config: MethodConfig, glu: Glu, layer: int) -> None:
        self.is_whole = layer in config.whole
        split = glu.split or quantised_split(glu.gate, glu.up, glu.down)
        base = base_bits_by_kind(config.base_bits)
        self.regions = (
            _RefinedRegion([split("gate", base[0]), split("up", base[0])], base[0], config.unit_bytes),
            _RefinedRegion([split("down", base[1])], base[1], config.unit_bytes),
        )
        self._own = [list(region.matrices) for region in self.regions]
        self._first = ((glu.gate, glu.up), (glu.down,))
        gate, up, down = (m.whole for region in self.regions for m in region.matrices)
        super().__init__(config, replace(glu, gate=gate, up=up, down=down), layer)
        self.total_bits = sum(region.n * region.code_bits for region in self.regions)
        self._set_fetches(config)
        share = config.capacity or 0.0
        self.slots = tuple(int(share * region.n_units) for region in self.regions)  # of each sequence's two caches
        self._last: list[Tensor | None] = [None, None]  # deferred: units [batch, n_units] that the last token fetched

    @classmethod
    def check(cls, config: MethodConfig) -> None:
        """Its own options, and none of those that would have no effect."""
        super().check(config)
        base_bits_by_kind(config.base_bits)
        for name in ("fetch", "fetch_glu"):
            value = getattr(config, name)
            if value is not None and not 0 <= value <= 1:
                raise ConfigError(f"{name} is {value:g}, but must be a share of the units, 0 to 1")
        if config.fetch is not None and config.density != 1:
            raise ConfigError("fetch and density both say how much planes reads: give one")
        if config.fetch is None and config.fetch_glu is not None:
            raise ConfigError("fetch_glu needs fetch: give both")
        if config.read_cost is not None and config.read_cost < 0:
            raise ConfigError(f"read_cost is {config.read_cost}: give bytes, 0 or more, such as 12500")
        if any(layer < 0 for layer in config.whole) or len(set(config.whole)) != len(config.whole):
            raise ConfigError(f"whole layers are {config.whole}: give each once, counted from 0")
        if config.select not in (None, "topk") or config.norms or config.compensate:
            raise ConfigError("planes ranks units by what their residuals remove: drop select, norms and compensate")

    def take_weights(self, gate: Tensor, up: Tensor, down: Tensor) -> None:
        """Bases change by as much as the weights do: codes stay, and what was added to them is held apart."""
        weights = ((gate, up), (down,))
        for region, own, first, now in zip(self.regions, self._own, self._first, weights, strict=True):
            changes = [w - w0 for w, w0 in zip(now, first, strict=True)]
            region.matrices = [
                replace(m, whole=m.whole + change, base=None if m.base is None else m.base + change)
                for m, change in zip(own, changes, strict=True)
            ]
        (gate_whole, up_whole), (down_whole,) = ([m.whole for m in region.matrices] for region in self.regions)
        super().take_weights(gate_whole, up_whole, down_whole)

    def set_density(self, density: float) -> None:
        """Of bases and residuals together."""
        self._set_fetches(replace(self.config, density=density))

    def _set_fetches(self, config: MethodConfig) -> None:
        for region, share in zip(self.regions, self._fetches(config), strict=True):
            region.n_fetch = int(share * region.n_units + 0.5)

    def _fetches(self, config: MethodConfig) -> tuple[float, float]:
        """Shares of the units of both regions that a token reads."""
        if config.fetch is not None:
            return config.fetch, config.fetch if config.fetch_glu is None else config.fetch_glu
        residual = sum(region.n * region.residual_bits for region in self.regions)
        least = 1 - residual / self.total_bits
        if self.is_whole or residual == 0:
            return 1.0, 1.0
        if config.density < least:
            raise ConfigError(
                f"planes holds {least:.3f} of layer {self.layer}'s weight bits as bases, and density is "
                f"{config.density:g}: ask for more, or for fewer base_bits"
            )
        return ((config.density - least) / (1 - least),) * 2

    def _cache(self, which: int) -> ColumnCache:
        cache = ColumnCache(self.regions[which].n_units, self.slots[which], self.config.cache, self.config.decay)
        cache.pin(np.arange(self.slots[which]))
        return cache

    def reset(self) -> None:
        super().reset()
        self._last = [None, None]

    def forward(self, x: Tensor) -> Tensor:
        inputs, glu = self.regions
        refined = self.refined(x, 0)
        gate = inputs.product(x, refined, 0, self.glu.gate_bias)
        h = self.glu.act(gate) * inputs.product(x, refined, 1, self.glu.up_bias)
        refined_glu = self.refined(h, 1)
        shares = [self._touched(refined, 0), self._touched(refined_glu, 1)]
        self.meter.add(x.numel() // x.shape[-1], sum(shares))
        return glu.product(h, refined_glu, 0, self.glu.down_bias)

    def _touched(self, refined: Tensor | None, which: int) -> Tensor | float:
        """The region's part of the layer's weight bits that these tokens touch."""
        region = self.regions[which]
        share = 1.0 if refined is None else mean_density(refined)
        return region.n * (region.code_bits - (1 - share) * region.residual_bits) / self.total_bits

    def refined(self, x: Tensor, which: int) -> Tensor | None:
        """Columns that are used with their residuals, bool [..., n] of inputs [..., n]; None: the region is whole."""
        region = self.regions[which]
        if self.is_whole or not region.refines:
            return None
        if self.config.capacity is not None or self.config.read_cost is not None:
            return region.columns(self._closed_loop(x, which))
        fetched = torch.zeros((*x.shape[:-1], region.n_units), dtype=torch.bool, device=x.device)
        if region.n_fetch:
            fetched = top_k_mask(region.scores(x), region.n_fetch)
        self._read(which, fetched)
        return region.columns(self._late(fetched, which) if self.config.deferred else fetched)

    def _read(self, which: int, fetched: Tensor) -> None:
        """Meters units [..., n_units] that are read."""
        region = self.regions[which]
        n_units = fetched[..., :-1].sum()  # the last may have fewer columns
        last = fetched[..., -1].sum()
        columns = n_units * region.per_unit + last * (region.n - (region.n_units - 1) * region.per_unit)
        share = float(columns) * region.residual_bits / self.total_bits
        self.meter.miss(which, int(n_units + last), share)

    def _late(self, fetched: Tensor, which: int) -> Tensor:
        """What each token's predecessor fetched, bool as fetched [batch, tokens, n_units]; the first token has none."""
        self._check_order(fetched)
        before = self._last[which]
        first = torch.zeros_like(fetched[:, :1]) if before is None else before[:, None]
        self._last[which] = fetched[:, -1]
        return torch.cat((first, fetched[:, :-1]), 1)

    def _closed_loop(self, x: Tensor, which: int) -> Tensor:
        """Units that are refined, bool [batch, tokens, n_units], each sequence against its cache."""
        region = self.regions[which]
        sequences = self._sequences(x, which)
        cached = torch.zeros((*x.shape[:2], region.n_units), dtype=torch.bool)
        fetched = torch.zeros_like(cached)
        norm = region.norm.cpu().numpy()
        cost = run_cost(region.unit_bytes, self.config.read_cost)
        for b, sequence in enumerate(sequences):
            done = scan_refine(sequence.rows, norm, None, region.per_unit, sequence.cache, region.n_fetch, cost)
            cached[b, sequence.at] = torch.from_numpy(done.cached)
            fetched[b, sequence.at] = torch.from_numpy(done.fetched)
            self.meter.selected += int(done.demanded.sum())
            self.meter.hits += int(done.hits.sum())
        self._read(which, fetched)
        units = cached | (self._late(fetched, which) if self.config.deferred else fetched)
        return units.to(x.device)
