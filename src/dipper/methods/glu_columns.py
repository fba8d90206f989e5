"""Rules that choose GLU columns by what they compute or predict of them: the oracle, gate, up, DejaVu."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from dipper.errors import ConfigError
from dipper.methods.method import Glu, Method, MethodConfig, mean_density
from dipper.selector import Selector

__all__ = ["DejaVu", "GatePruning", "GluDown", "GluOracle", "UpPruning"]


class _GluColumns(Method):
    """Rules that choose among the I hidden units by one score: a unit kept is a column of down and rows of gate and up.

    `whole`: how many of the three matrices are used whole, to compute the score or because the rule does not skip in
    them. Density d leaves d' = (3 d - whole) / (3 - whole) of the units.
    """

    whole: ClassVar[int]

    def __init__(self, config: MethodConfig, glu: Glu, layer: int) -> None:
        super().__init__(config, glu, layer)
        self.units = self._selector(glu.intermediate_size, self._units_at(config.density))

    def _units_at(self, density: float) -> float:
        return min((3 * density - self.whole) / (3 - self.whole), 1.0)

    def set_density(self, density: float) -> None:
        """Density of the whole MLP; the units' own follows."""
        self.check(replace(self.config, density=density))
        self.units.density = self._units_at(density)

    @abstractmethod
    def _scores(self, x: Tensor, h: Tensor) -> Tensor:
        """fp32 [..., I]; h is act(gate x) * (up x) of these inputs."""

    def _dropped(self, x: Tensor, values: Tensor, which: int) -> Tensor | None:
        return None if which == 0 else ~self.units.top_k(self._scores(x, values))

    def collect(self, x: Tensor) -> None:
        super().collect(x)
        self.units.collect(self._scores(x, self.glu.hidden(x)))

    def fit(self) -> None:
        super().fit()
        self.units.fit()

    def forward(self, x: Tensor) -> Tensor:
        h = self.glu.hidden(x)
        mask = self.units.mask(self._scores(x, h))
        share = mean_density(mask)
        self._count(x, (self.whole + (3 - self.whole) * share) / 3)
        return self.glu.output(self._kept(h, mask, 1))


class GluOracle(_GluColumns):
    """Top-k of the true |h|, known beforehand: the bound of any predictor of hidden units."""

    name = "glu-oracle"
    summary = "the units of largest |h|, told by an oracle; all three matrices skip"
    whole = 0

    def _scores(self, x: Tensor, h: Tensor) -> Tensor:
        return h.float().abs()


class GluDown(GluOracle):
    """Top-k of |h| once it is computed: only W_down is skipped in."""

    name = "glu"
    summary = "the units of largest |h|; gate and up are read whole"
    whole = 2
    least = 2 / 3


class UpPruning(_GluColumns):
    """Top-k of |up x|: up is read whole, gate and down skip (arXiv 2412.01380)."""

    name = "up"
    summary = "the units of largest |up x|; up is read whole"
    whole = 1
    least = 1 / 3

    def _scores(self, x: Tensor, h: Tensor) -> Tensor:
        return functional.linear(x, self.glu.up, self.glu.up_bias).float().abs()


class GatePruning(_GluColumns):
    """Top-k or, as in CATS (arXiv 2404.08763), a calibrated threshold of |act(gate x)|: gate is read whole."""

    name = "gate"
    summary = "the units of largest |act(gate x)| (CATS); gate is read whole"
    whole = 1
    least = 1 / 3

    def _scores(self, x: Tensor, h: Tensor) -> Tensor:
        return self.glu.act(functional.linear(x, self.glu.gate, self.glu.gate_bias)).float().abs()


class DejaVu(Method):
    """A trained low-rank predictor of |h|'s top-k chooses the units (after Deja Vu, arXiv 2310.17157).

    The predictor, sigmoid(B relu(A x)) with A [r, D] and B [I, r], is trained on calibration tokens to tell which units
    are among the true top-k (binary cross-entropy, AdamW). It is held in DRAM as 16-bit weights and read for each
    token; the units are fewer, so that both together touch `density`.
    """

    name = "dejavu"
    summary = "the units that a trained low-rank predictor names; all three matrices skip"
    weight_bits: ClassVar[int] = 16
    follows_weights = False
    _tokens: ClassVar[int] = 16384
    _steps: ClassVar[int] = 400
    _batch: ClassVar[int] = 256

    def __init__(self, config: MethodConfig, glu: Glu, layer: int) -> None:
        super().__init__(config, glu, layer)
        self.rank = max(1, round(config.rank * glu.hidden_size))
        left = config.density - self._predictor_share
        if left <= 0:
            raise ConfigError(
                f"dejavu's predictor of rank {self.rank} touches {self._predictor_share:.2f} of the weights alone, and "
                f"density is {config.density:g}: ask for more, or for a smaller rank"
            )
        self.units = Selector(glu.intermediate_size, left)
        self._inputs: list[Tensor] = []
        self._factors: tuple[Tensor, Tensor] | None = None

    @classmethod
    def needs_data(cls, config: MethodConfig) -> bool:
        """Always: the predictor is trained."""
        return True

    @property
    def _predictor_share(self) -> float:
        return self.rank * (self.glu.hidden_size + self.glu.intermediate_size) / self._mlp_weights

    @property
    def extra_dram_bits(self) -> float:
        """Of the predictor."""
        return self._predictor_share * self._mlp_weights * self.weight_bits

    def collect(self, x: Tensor) -> None:
        super().collect(x)
        if sum(len(part) for part in self._inputs) < self._tokens:
            self._inputs.append(x.reshape(-1, x.shape[-1]))

    def fit(self) -> None:
        super().fit()
        x = torch.cat(self._inputs)[: self._tokens]
        self._inputs = []
        random = torch.Generator(device="cpu").manual_seed(self.layer)
        scale = x.float().square().mean().rsqrt()  # inputs of unit variance: one learning rate for every model
        a = torch.randn(self.rank, x.shape[1], generator=random) / math.sqrt(x.shape[1])
        b = torch.randn(self.glu.intermediate_size, self.rank, generator=random) / math.sqrt(self.rank)
        factors = [w.to(x.device).requires_grad_() for w in (a, b)]
        optimiser = torch.optim.AdamW(factors, lr=2e-3, weight_decay=1e-2)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, self._steps)
        positive = torch.tensor((1 - self.units.density) / self.units.density, device=x.device)
        with torch.enable_grad():
            for _ in range(self._steps):
                rows = x[torch.randint(len(x), (self._batch,), generator=random).to(x.device)]
                with torch.no_grad():
                    wanted = self.units.mask(self.glu.hidden(rows).float().abs())
                logits = (rows.float() * scale @ factors[0].T).relu() @ factors[1].T
                loss = functional.binary_cross_entropy_with_logits(logits, wanted.float(), pos_weight=positive)
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                schedule.step()
        self._factors = ((factors[0] * scale).detach().to(x.dtype), factors[1].detach().to(x.dtype))

    def forward(self, x: Tensor) -> Tensor:
        if self._factors is None:
            raise ConfigError("dejavu's predictor was not trained: give calibration text")
        scores = (x @ self._factors[0].T).relu() @ self._factors[1].T
        mask = self.units.mask(scores.float())
        self._count(x, mean_density(mask) + self._predictor_share)
        return self.glu.output(self._kept(self.glu.hidden(x), mask, 1))
