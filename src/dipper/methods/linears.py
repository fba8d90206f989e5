"""Rules of single linear layers: TEAL, WINA, R-Sparse, in the MLP or everywhere."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from dipper.errors import ConfigError
from dipper.methods.method import METHODS, Glu, Meter, Method, MethodConfig, mean_density
from dipper.selector import Selector

__all__ = ["PrunedLinear", "RSparse", "Teal", "Wina"]


class Teal(Method):
    """Inputs of each matrix below its own calibrated threshold are zero (TEAL, arXiv 2408.14690)."""

    name = "teal"
    summary = "inputs of each matrix under a calibrated threshold are dropped"
    selection = "threshold"
    n_densities = 3

    def __init__(self, config: MethodConfig, glu: Glu, layer: int) -> None:
        super().__init__(config, glu, layer)
        gate, up, down = config.densities or (config.density,) * 3
        self._selectors = (
            self._selector(glu.hidden_size, gate),
            self._selector(glu.hidden_size, up),
            self._selector(glu.intermediate_size, down),
        )
        self._factors: tuple[Tensor | None, ...] = tuple(self._factor(w) for w in (glu.gate, glu.up, glu.down))

    @staticmethod
    def _factor(weight: Tensor) -> Tensor | None:
        """What |input| is multiplied by in the score, [columns]; None: nothing."""
        return None

    def take_weights(self, gate: Tensor, up: Tensor, down: Tensor) -> None:
        """Scores follow the norms of these weights."""
        super().take_weights(gate, up, down)
        with torch.no_grad():
            self._factors = tuple(self._factor(w) for w in (gate, up, down))

    def set_density(self, density: float) -> None:
        """The same for all three matrices."""
        for selector in self._selectors:
            selector.density = density

    def _scores(self, values: Tensor, which: int) -> Tensor:
        factor = self._factors[which]
        magnitudes = values.float().abs()
        return magnitudes if factor is None else magnitudes * factor

    def _dropped(self, x: Tensor, values: Tensor, which: int) -> Tensor | None:
        # Gate and up share one mean of their inputs; gate's mask speaks for both.
        return ~self._selectors[2 * which].top_k(self._scores(values, 2 * which))

    def collect(self, x: Tensor) -> None:
        super().collect(x)
        for which, values in enumerate((x, x, self.glu.hidden(x))):
            self._selectors[which].collect(self._scores(values, which))

    def fit(self) -> None:
        super().fit()
        for selector in self._selectors:
            selector.fit()

    def forward(self, x: Tensor) -> Tensor:
        gate, up = (self._selectors[n].mask(self._scores(x, n)) for n in range(2))
        h = self.glu.hidden(self._kept(x, gate, 0), self._kept(x, up, 0))
        down = self._selectors[2].mask(self._scores(h, 2))
        self._count(x, mean_density(gate), mean_density(up), mean_density(down))
        return self.glu.output(self._kept(h, down, 1))


class Wina(Teal):
    """As TEAL, with |x_j| times the norm of column j for each matrix, top-k per token (WINA, arXiv 2505.19427)."""

    name = "wina"
    summary = "inputs of each matrix with the smallest |x_j| times the norm of column j are dropped"
    selection = "topk"

    @staticmethod
    def _factor(weight: Tensor) -> Tensor | None:
        return weight.float().norm(dim=0)


class RSparse(Teal):
    """The inputs that TEAL drops go through a low-rank part of each matrix (after R-Sparse, arXiv 2504.19449).

    y = W (m x) + U V ((1 - m) x), U V the best rank-r approximation of W. The low-rank part is read for every token and
    held in DRAM beside the model at 16 bits; the selected columns are fewer, so that the sum touches `density`.
    """

    name = "rsparse"
    summary = "dropped inputs of each matrix go through a low-rank part of it"
    n_densities = 0
    follows_weights = False
    weight_bits: ClassVar[int] = 16

    def __init__(self, config: MethodConfig, glu: Glu, layer: int) -> None:
        self.rank = max(1, round(config.rank * glu.hidden_size))
        share = self.rank * (glu.hidden_size + glu.intermediate_size) / (glu.hidden_size * glu.intermediate_size)
        left = config.density - share
        if config.density < 1 and left <= 0:
            raise ConfigError(
                f"rsparse's low-rank part of rank {self.rank} touches {share:.2f} of the weights alone, and density is "
                f"{config.density:g}: ask for more, or for a smaller rank"
            )
        self.low_rank_share = share if config.density < 1 else 0.0
        super().__init__(replace(config, densities=None, density=left if config.density < 1 else 1.0), glu, layer)
        self._low_rank = [self._factorise(w) for w in (glu.gate, glu.up, glu.down)] if config.density < 1 else None

    @property
    def extra_dram_bits(self) -> float:
        """Of the low-rank parts."""
        return self.low_rank_share * self._mlp_weights * self.weight_bits

    def _factorise(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        u, s, v = torch.linalg.svd(weight.float(), full_matrices=False)
        root = s[: self.rank].sqrt()
        return (u[:, : self.rank] * root).to(weight.dtype), (root[:, None] * v[: self.rank]).to(weight.dtype)

    def _linear(self, values: Tensor, which: int) -> tuple[Tensor, Tensor]:
        weight = (self.glu.gate, self.glu.up, self.glu.down)[which]
        bias = (self.glu.gate_bias, self.glu.up_bias, self.glu.down_bias)[which]
        mask = self._selectors[which].mask(self._scores(values, which))
        y = functional.linear(self._kept(values, mask, which // 2), weight, bias)
        if self._low_rank is not None and self._mean is None:
            u, v = self._low_rank[which]
            y = y + functional.linear(functional.linear(values * ~mask, v), u)
        elif self._low_rank is not None:
            u, v = self._low_rank[which]
            mean = self._mean[which // 2]  # type: ignore[index]
            y = y + functional.linear(functional.linear((values - mean) * ~mask, v), u)
        return y, mean_density(mask) + self.low_rank_share

    def forward(self, x: Tensor) -> Tensor:
        gate, gate_share = self._linear(x, 0)
        up, up_share = self._linear(x, 1)
        y, down_share = self._linear(self.glu.act(gate) * up, 2)
        self._count(x, gate_share, up_share, down_share)
        return y


class PrunedLinear:
    """One linear layer outside the MLP whose small inputs are dropped: TEAL's and WINA's "all linear layers".

    Args:
        config: of `teal` or `wina`.
        weight: [out, in].
        bias: [out] or None.
    """

    def __init__(self, config: MethodConfig, weight: Tensor, bias: Tensor | None) -> None:
        rule = METHODS[config.name]
        if not issubclass(rule, Teal):
            raise ConfigError(f"{config.name} prunes MLPs only; of all linear layers teal and wina take inputs away")
        self.weight, self.bias = weight, bias
        self._factor = rule._factor(weight)
        self._selector = Selector(weight.shape[1], config.density, config.selection)
        self.meter = Meter()

    def _scores(self, x: Tensor) -> Tensor:
        return x.float().abs() if self._factor is None else x.float().abs() * self._factor

    def collect(self, x: Tensor) -> None:
        """Shows calibration inputs [..., in]."""
        self._selector.collect(self._scores(x))

    def fit(self) -> None:
        """Ends calibration."""
        self._selector.fit()

    def dense(self, x: Tensor) -> Tensor:
        """The layer as it is."""
        return functional.linear(x, self.weight, self.bias)

    def __call__(self, x: Tensor) -> Tensor:
        """y [..., out] of x [..., in]."""
        mask = self._selector.mask(self._scores(x))
        self.meter.add(x.numel() // x.shape[-1], mean_density(mask))
        return functional.linear(x * mask, self.weight, self.bias)
