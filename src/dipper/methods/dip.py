"""Dynamic Input Pruning, with cache-aware masking, and with what compensates it without training."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from dipper.cache import ColumnCache, n_selected, scan_many
from dipper.errors import ConfigError
from dipper.methods.cached import F32, CachedMethod
from dipper.methods.method import Glu, MethodConfig, mean_density

__all__ = ["Dip", "DipCacheAware", "DipLowRank", "DipRescale"]


class Dip(CachedMethod):
    """Dynamic Input Pruning (arXiv 2412.01380): top-k of |x| for gate and up together, of |h| for down.

    h is formed from the pruned inputs. With `capacity` a column cache per region and sequence is simulated beside it;
    x must then be [batch, tokens, D].
    """

    name = "dip"
    summary = "the largest |x| of the inputs and the largest |h| of the GLU; no predictor"
    n_densities = 2

    def __init__(self, config: MethodConfig, glu: Glu, layer: int) -> None:
        super().__init__(config, glu, layer)
        d_in, d_glu = config.densities or (config.density,) * 2
        self._selectors = (self._selector(glu.hidden_size, d_in), self._selector(glu.intermediate_size, d_glu))
        self._factors = self._norms() if config.norms else None
        self._is_fitted = False
        share = config.capacity or 0.0
        self.slots = tuple(math.floor(share * s.n + 0.5) for s in self._selectors)  # of each sequence's two caches

    def _norms(self) -> tuple[Tensor, Tensor]:
        """Of the input columns, gate's and up's together as one record holds them [D], and of the GLU columns [I]."""
        both = torch.cat((self.glu.gate, self.glu.up))
        return both.float().norm(dim=0), self.glu.down.float().norm(dim=0)

    def take_weights(self, gate: Tensor, up: Tensor, down: Tensor) -> None:
        """Norms are taken of these weights, where they do not come from a calibration file."""
        super().take_weights(gate, up, down)
        if self.config.norms and not self._is_fitted:
            with torch.no_grad():
                self._factors = self._norms()

    def set_density(self, density: float) -> None:
        """The same for inputs and GLU columns."""
        self.set_densities(density, density)

    def set_densities(self, d_in: float, d_glu: float) -> None:
        """Other densities from now on; thresholds must be fitted again, top-k needs nothing."""
        for selector, density in zip(self._selectors, (d_in, d_glu), strict=True):
            selector.density = density

    def take_fit(self, factors: tuple[F32, F32] | None, means: tuple[F32, F32] | None) -> None:
        """Score factors and means out of a calibration file, of inputs [D] and GLU activations [I]; None: neither."""
        like = self.glu.gate

        def on_device(vectors: tuple[F32, F32] | None, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
            if vectors is None:
                return None
            inputs, glu = (torch.tensor(vector, dtype=dtype, device=like.device) for vector in vectors)
            if len(inputs) != self.glu.hidden_size or len(glu) != self.glu.intermediate_size:
                raise ConfigError(
                    f"the calibration is for layers of {len(inputs)} x {len(glu)}, and layer {self.layer} has "
                    f"{self.glu.hidden_size} x {self.glu.intermediate_size}: calibrate this model"
                )
            return inputs, glu

        self._factors, self._mean = on_device(factors, torch.float32), on_device(means, like.dtype)
        self._is_fitted = True

    def factors(self) -> tuple[F32, F32]:
        """What |x| is multiplied by in the scores: norms of the input columns [D] and of the GLU columns [I]."""
        if self._factors is None:
            raise ConfigError("this dip ranks without norms")
        return self._factors[0].cpu().numpy(), self._factors[1].cpu().numpy()

    def means(self) -> tuple[F32, F32]:
        """Means of the inputs [D] and of the GLU activations [I] over the calibration text."""
        if self._mean is None:
            raise ConfigError("this dip does not compensate means")
        return self._mean[0].float().cpu().numpy(), self._mean[1].float().cpu().numpy()

    def mean_products(self) -> tuple[F32, F32, F32]:
        """gate [I], up [I] and down [D] times these means, fp32."""
        if self._mean is None:
            raise ConfigError("this dip does not compensate means")
        inputs, hidden = (mean.float() for mean in self._mean)
        products = (self.glu.gate.float() @ inputs, self.glu.up.float() @ inputs, self.glu.down.float() @ hidden)
        gate, up, down = (product.cpu().numpy() for product in products)
        return gate, up, down

    def scores(self, values: Tensor, which: int) -> Tensor:
        """fp32 scores of values [..., n]: of inputs (which = 0) or GLU activations (1)."""
        magnitudes = values.float().abs()
        return magnitudes if self._factors is None else magnitudes * self._factors[which]

    def _dropped(self, x: Tensor, values: Tensor, which: int) -> Tensor | None:
        return ~self._selectors[which].top_k(self.scores(values, which))

    def collect(self, x: Tensor) -> None:
        super().collect(x)
        self._selectors[0].collect(self.scores(x, 0))
        self._selectors[1].collect(self.scores(self.glu.hidden(x), 1))

    def fit(self) -> None:
        super().fit()
        for selector in self._selectors:
            selector.fit()

    def forward(self, x: Tensor) -> Tensor:
        inputs = self.masks(self.scores(x, 0), 0)
        h = self.glu.hidden(self._kept(x, inputs, 0))
        glu = self.masks(self.scores(h, 1), 1)
        share = mean_density(inputs)
        self._count(x, share, share, mean_density(glu))
        return self.glu.output(self._kept(h, glu, 1))

    def masks(self, scores: Tensor, which: int) -> Tensor:
        """bool [..., n] of scores [..., n], of the input region (which = 0) or the GLU region (1)."""
        if self.config.capacity is None:
            return self._selectors[which].mask(scores)
        return self._closed_loop(scores, which)

    @property
    def _gamma(self) -> float:
        return 1.0 if self.config.gamma is None else self.config.gamma

    def _closed_loop(self, scores: Tensor, which: int) -> Tensor:
        """The native scan over each sequence, its caches going on from call to call."""
        n = scores.shape[-1]
        selector = self._selectors[which]
        k = n_selected(selector.density, n)
        sequences = self._sequences(scores, which)
        mask = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
        per_column = (2 if which == 0 else 1) / (3 * n)  # a column's share of the MLP's weights
        scanned = scan_many([s.rows for s in sequences], k, self._gamma, [s.cache for s in sequences])
        for b, (sequence, (selected, hits)) in enumerate(zip(sequences, scanned, strict=True)):
            at, columns = sequence.at.to(mask.device), torch.from_numpy(selected).to(mask.device)
            mask[b, at] = mask[b, at].scatter(-1, columns.long(), True)
            self.meter.selected += selected.size
            self.meter.hits += int(hits.sum())
            missed = selected.size - int(hits.sum())
            self.meter.miss(which, missed, missed * per_column)
        return mask

    def _cache(self, which: int) -> ColumnCache:
        return ColumnCache(self._selectors[which].n, self.slots[which], self.config.cache, self.config.decay)


class DipCacheAware(Dip):
    """DIP with cache-aware masking (arXiv 2412.01380): scores of columns that are not cached times gamma."""

    name = "dip-ca"
    summary = "dip whose scores favour cached columns by 1 / gamma"
    has_gamma = True

    @classmethod
    def check(cls, config: MethodConfig) -> None:
        """Masks are exact top-k against a cache."""
        super().check(config)
        if config.capacity is None:
            raise ConfigError("dip-ca needs a cache: give its capacity, a share of the columns")
        if config.select is not None and config.select != "topk":
            raise ConfigError(
                f"dip-ca ranks each token's columns against its cache: select is '{config.select}', use topk"
            )

    @property
    def _gamma(self) -> float:
        return 0.5 if self.config.gamma is None else self.config.gamma


class _DipFitted(Dip):
    """DIP with something fitted to what it drops, each matrix to its dense output on the calibration tokens."""

    n_densities = 0
    weight_bits: ClassVar[int] = 16

    @classmethod
    def needs_data(cls, config: MethodConfig) -> bool:
        """Always."""
        return True

    def _pairs(self, x: Tensor) -> tuple[tuple[Tensor, Tensor], ...]:
        """(values, kept values) of inputs and of GLU activations, rows of fp32, on the dense model's activations."""
        h = self.glu.hidden(x)
        both = []
        for which, values in enumerate((x, h)):
            rows = values.reshape(-1, values.shape[-1]).float()
            both.append((rows, rows * self._selectors[which].top_k(self.scores(rows, which))))
        return tuple(both)


class DipLowRank(_DipFitted):
    """DIP whose dropped part goes through a low-rank matrix fitted to it, as R-Sparse's but seeing the activations.

    W x is approximated by W (m x) + U V ((1 - m) x), V = U^T W, with U the leading directions of what is dropped: the
    best of that rank in the squared output error on the calibration tokens. Gate and up share V. U and V are read for
    every token and held in DRAM at 16 bits; fewer columns are selected, so that the sum touches `density`.
    """

    name = "dip-lowrank"
    summary = "dip whose dropped part goes through a low-rank matrix fitted to it"

    def __init__(self, config: MethodConfig, glu: Glu, layer: int) -> None:
        d, i = glu.hidden_size, glu.intermediate_size
        self.n_directions = max(1, round(config.rank * d))
        share = self.n_directions * (2 * d + 3 * i) / (3 * d * i)
        self.low_rank_share = share if config.density < 1 else 0.0
        left = config.density - self.low_rank_share
        if left <= 0:
            raise ConfigError(
                f"dip-lowrank's matrices of rank {self.n_directions} touch {share:.2f} of the weights alone, and "
                f"density is {config.density:g}: ask for more, or for a smaller rank"
            )
        super().__init__(replace(config, density=left), glu, layer)
        self._sums: list[Tensor | float] = [0.0, 0.0]
        self._low_rank: list[tuple[Tensor, Tensor]] = []

    @property
    def extra_dram_bits(self) -> float:
        """Of U and V."""
        return self.low_rank_share * self._mlp_weights * self.weight_bits

    def set_density(self, density: float) -> None:
        """Of columns and low-rank part together."""
        super().set_density(density - self.low_rank_share)

    def collect(self, x: Tensor) -> None:
        super().collect(x)
        for which, (values, kept) in enumerate(self._pairs(x)):
            dropped = values - kept
            self._sums[which] = self._sums[which] + dropped.T @ dropped

    def fit(self) -> None:
        super().fit()
        if self.low_rank_share:
            weights = (torch.cat((self.glu.gate, self.glu.up)), self.glu.down)
            self._low_rank = [self._factorise(w.float(), c) for w, c in zip(weights, self._sums, strict=True)]
        self._sums = [0.0, 0.0]

    def _factorise(self, weight: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
        """U [out, r] with orthonormal columns and V = U^T W [r, in] of W [out, in] and the dropped inputs' [in, in]."""
        rank = self.n_directions
        if weight.shape[0] <= weight.shape[1]:
            u = torch.linalg.eigh(weight @ covariance @ weight.T).eigenvectors[:, -rank:]
        else:  # the same through the smaller side
            values, vectors = torch.linalg.eigh(covariance)
            root = weight @ (vectors * values.clamp_min(0).sqrt())
            u = torch.linalg.qr(root @ torch.linalg.eigh(root.T @ root).eigenvectors[:, -rank:]).Q
        dtype = self.glu.gate.dtype
        return u.to(dtype), (u.T @ weight).to(dtype)

    def _through(self, values: Tensor, kept: Tensor, which: int) -> Tensor | float:
        if not self.low_rank_share:
            return 0.0
        if not self._low_rank:
            raise ConfigError("dip-lowrank was not fitted: give calibration text")
        u, v = self._low_rank[which]
        return functional.linear(functional.linear(values - kept, v), u)

    def forward(self, x: Tensor) -> Tensor:
        mask = self.masks(self.scores(x, 0), 0)
        kept = self._kept(x, mask, 0)
        both = self._through(x, kept, 0)
        more = (0.0, 0.0) if isinstance(both, float) else both.chunk(2, dim=-1)
        gate = functional.linear(kept, self.glu.gate, self.glu.gate_bias) + more[0]
        h = self.glu.act(gate) * (functional.linear(kept, self.glu.up, self.glu.up_bias) + more[1])
        glu = self.masks(self.scores(h, 1), 1)
        share = mean_density(mask)
        self._count(x, *(part + self.low_rank_share for part in (share, share, mean_density(glu))))
        kept_h = self._kept(h, glu, 1)
        return self.glu.output(kept_h) + self._through(h, kept_h, 1)


class DipRescale(_DipFitted):
    """DIP whose matrices' outputs are multiplied, channel by channel, by the factor that fits the dense ones best.

    a_i = sum(y_i y^_i) / sum(y^_i^2) over the calibration tokens, y^ what the kept columns give. Factors of rows could
    be put into the weights' scales; here they are counted as 16-bit numbers beside them.
    """

    name = "dip-rescale"
    summary = "dip whose kept part is rescaled by output channel"

    def __init__(self, config: MethodConfig, glu: Glu, layer: int) -> None:
        super().__init__(config, glu, layer)
        self._sums: list[tuple[Tensor | float, Tensor | float]] = [(0.0, 0.0)] * 3
        self._scales: list[Tensor] | None = None

    @classmethod
    def check(cls, config: MethodConfig) -> None:
        """One compensation at a time."""
        super().check(config)
        if config.compensate:
            raise ConfigError("dip-rescale scales what is kept and knows no means: leave compensate out, or use dip")

    @property
    def extra_dram_bits(self) -> float:
        """Of the factors."""
        return float((2 * self.glu.intermediate_size + self.glu.hidden_size) * self.weight_bits)

    def collect(self, x: Tensor) -> None:
        super().collect(x)
        inputs, hidden = self._pairs(x)
        for n, (weight, (values, kept)) in enumerate(
            zip((self.glu.gate, self.glu.up, self.glu.down), (inputs, inputs, hidden), strict=True)
        ):
            y, y_kept = functional.linear(values, weight.float()), functional.linear(kept, weight.float())
            product, square = self._sums[n]
            self._sums[n] = (product + (y * y_kept).sum(0), square + y_kept.square().sum(0))

    def fit(self) -> None:
        super().fit()
        dtype = self.glu.gate.dtype
        self._scales = [
            torch.where(square > 0, product / square, torch.ones_like(square)).to(dtype)
            for product, square in self._sums
        ]

    def forward(self, x: Tensor) -> Tensor:
        if self._scales is None:
            raise ConfigError("dip-rescale was not fitted: give calibration text")
        gate_scale, up_scale, down_scale = self._scales
        mask = self.masks(self.scores(x, 0), 0)
        kept = self._kept(x, mask, 0)
        gate = functional.linear(kept, self.glu.gate * gate_scale[:, None], self.glu.gate_bias)
        h = self.glu.act(gate) * functional.linear(kept, self.glu.up * up_scale[:, None], self.glu.up_bias)
        glu = self.masks(self.scores(h, 1), 1)
        share = mean_density(mask)
        self._count(x, share, share, mean_density(glu))
        return functional.linear(self._kept(h, glu, 1), self.glu.down * down_scale[:, None], self.glu.down_bias)
