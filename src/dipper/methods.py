"""Pruning rules for GLU MLPs, in PyTorch: which columns a token uses, and what the others are replaced by.

A method is one class that sees one layer's weights (`Glu`) and the layer's inputs. It may look at calibration tokens
first (`collect`, then `fit`), and then maps inputs to outputs with its masks, metering the weights it touched. Adding a
rule is one class and one line in `METHODS`; `dipper.sparsify` puts it into a model, and the tests pick it up from the
registry.

    rule = METHODS["dip"](MethodConfig("dip", density=0.6), glu, layer=0)
    y = rule(x)                      # x [..., D] -> y [..., D]
    rule.meter.touched               # share of the layer's MLP weight bits that a token touched: 0.6

Equal bytes: `density` is the share of the dense MLP's weight bits that a token touches, whatever the rule. DIP touches
(2 d_in + d_glu) / 3 of them (arXiv 2412.01380), a rule that must read W_up whole to choose touches a third and twice
its columns' share of the rest, and so on: each class says how its own densities follow. Weights beyond the model's that
a rule needs (predictors, low-rank factors, masks of fixed patterns) count as touched where a token reads them, and as
`extra_dram_bits` where they must be held.

Selection is `dipper.selector`'s, which follows the engine to the digit.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from dipper.cache import ColumnCache, n_selected, scan_many, scan_refine
from dipper.errors import ConfigError
from dipper.layout import base_bits_by_kind, columns_per_unit, unit_size
from dipper.reads import run_cost
from dipper.requantise import bits_per_weight, requantise
from dipper.selector import SELECTIONS, ColumnMean, Selector, top_k_mask
from dipper.split_weights import SplitMatrix, quantised_split

__all__ = ["METHODS", "CachedMethod", "Glu", "Meter", "Method", "MethodConfig", "PrunedLinear"]

F32 = npt.NDArray[np.float32]

# Options that one method alone has.
_OWN_OPTIONS = {
    **dict.fromkeys(("base_bits", "fetch", "fetch_glu", "read_cost", "whole", "unit_bytes", "deferred"), "planes"),
    "bits": "resident",
}


@dataclass(frozen=True)
class MethodConfig:
    """What is pruned, and how.

    Attributes:
        name: a key of `METHODS`.
        density: share of the dense MLP's weight bits that a token touches, in (0, 1].
        densities: a rule's own densities in place of equal ones: (input, glu) of DIP, (gate, up, down) of TEAL and
            WINA. `density` is then ignored.
        select: "topk" per token, "threshold" (calibrated, so that the mean density is the asked one), or "topp" (the
            fewest columns that hold a calibrated share of the scores' sum). None: what the rule's paper does.
        norms: DIP ranks |x| times the column's norm.
        compensate: an unselected column contributes, instead of nothing, the mean that it had on the calibration text
            at the tokens which did not select it.
        gamma: of cache-aware masking, in (0, 1]; `dip-ca` alone.
        cache, decay: policy of the column caches; `dip` and `dip-ca`.
        capacity: share of each region's columns that its cache holds; None: no cache is simulated.
        rank: of predictors and low-rank parts, as a share of the hidden size.
        pattern: of fixed masks: "unstructured" or "2:4".
        linears: TEAL and WINA: "mlp", or "all" for the attention's projections too.
        base_bits: `planes`: upper bits of every code that are resident, of input and of GLU columns. 0: a column that
            is not refined is dropped, as by DIP. Codes without that many bits or more are used whole.
        fetch, fetch_glu: `planes`: share of the units of residuals that a token reads, as in `budget.EngineConfig`;
            `fetch` None: as many as `density` asks for.
        read_cost: `planes`: what a read costs beside its bytes, in bytes, as in `budget.EngineConfig`: units are read
            in runs, for as much as that many reads of one unit.
        whole: `planes`: layers of which everything is used.
        unit_bytes: `planes`: about what a unit has, as for `pack`; None: units of one column.
        deferred: `planes`: a token is refined by what the token before it chose, and by what was cached before that.
        bits: `resident`: of a code of input and of GLU columns, 1 to 8.
    """

    name: str = "dip"
    density: float = 1.0
    densities: tuple[float, ...] | None = None
    select: str | None = None
    norms: bool = False
    compensate: bool = False
    gamma: float | None = None
    cache: str = "lfu"
    decay: float = 0.99
    capacity: float | None = None
    rank: float = 0.125
    pattern: str = "unstructured"
    linears: str = "mlp"
    base_bits: tuple[int, int] = (2, 3)
    fetch: float | None = None
    fetch_glu: float | None = None
    read_cost: int | None = None
    whole: tuple[int, ...] = ()
    unit_bytes: int | None = None
    deferred: bool = False
    bits: tuple[int, int] = (4, 4)

    def __post_init__(self) -> None:
        if self.name not in METHODS:
            raise ConfigError(f"method '{self.name}' is not known: choose one of {', '.join(sorted(METHODS))}")
        for value in (self.density, *(self.densities or ())):
            if not 0 < value <= 1:
                raise ConfigError(f"density is {value:g}, but must be above 0 and at most 1")
        if self.select is not None and self.select not in SELECTIONS:
            raise ConfigError(f"select is '{self.select}', known are {', '.join(SELECTIONS)}")
        if self.gamma is not None and not 0 < self.gamma <= 1:
            raise ConfigError(f"gamma is {self.gamma:g}, but must be above 0 and at most 1")
        if self.capacity is not None and not 0 <= self.capacity <= 1:
            raise ConfigError(f"capacity is {self.capacity:g}, but must be a share of the columns, 0 to 1")
        for option, owner in _OWN_OPTIONS.items():
            if self.name != owner and getattr(self, option) != type(self).__dataclass_fields__[option].default:
                raise ConfigError(f"{option} is an option of {owner}, and the method is {self.name}")
        METHODS[self.name].check(self)

    @property
    def selection(self) -> str:
        """`select`, or the rule's own way where that is None."""
        return self.select or METHODS[self.name].selection


@dataclass
class Glu:
    """One layer's GLU MLP: y = down(act(gate x) * (up x)).

    Attributes:
        gate, up: [I, D].
        down: [D, I].
        act: of the gate.
        gate_bias, up_bias: [I] or None; down_bias: [D] or None.
        split: gives "gate", "up" or "down" as base and residual; None: quantised to 4 bits when that is asked for.
    """

    gate: Tensor
    up: Tensor
    down: Tensor
    act: Callable[[Tensor], Tensor]
    gate_bias: Tensor | None = None
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    split: Callable[[str, int], SplitMatrix] | None = None

    @property
    def hidden_size(self) -> int:
        """D."""
        return int(self.gate.shape[1])

    @property
    def intermediate_size(self) -> int:
        """I."""
        return int(self.gate.shape[0])

    def hidden(self, x: Tensor, x_up: Tensor | None = None) -> Tensor:
        """act(gate x) * (up x), [..., I]; `x_up` [..., D] where up has an input of its own."""
        gate = functional.linear(x, self.gate, self.gate_bias)
        return self.act(gate) * functional.linear(x if x_up is None else x_up, self.up, self.up_bias)

    def output(self, h: Tensor) -> Tensor:
        """down h, [..., D]."""
        return functional.linear(h, self.down, self.down_bias)

    def dense(self, x: Tensor) -> Tensor:
        """The MLP as it is."""
        return self.output(self.hidden(x))


class Meter:
    """Weights touched: shares of each matrix, summed over tokens on the device they were counted on.

    Attributes:
        selected, hits: columns (units of `planes`) that caches were asked for, and had.
        missed: those that came from flash, of the input and of the GLU region.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forgets everything."""
        self.n_tokens = 0
        self._sum: Tensor | float = 0.0
        self.selected = 0
        self.hits = 0
        self.missed = [0, 0]
        self._missed_share: float | None = None

    def add(self, n_tokens: int, share: Tensor | float) -> None:
        """`share`: of the layer's weight bits, the mean of these tokens."""
        self.n_tokens += n_tokens
        self._sum = self._sum + share * n_tokens

    def miss(self, which: int, n: int, share: float) -> None:
        """n columns or units of the input (which = 0) or the GLU region (1) come from flash: this share of the bits."""
        self.missed[which] += n
        self._missed_share = (self._missed_share or 0.0) + share

    @property
    def touched(self) -> float:
        """Mean share of the dense MLP's weight bits that a token touched; NaN before the first token."""
        return float(self._sum) / self.n_tokens if self.n_tokens else math.nan

    @property
    def hit_rate(self) -> float | None:
        """Hits over selected columns; None where no cache is simulated."""
        return self.hits / self.selected if self.selected else None

    @property
    def flash_share(self) -> float | None:
        """Share of the MLP's weight bits that a token reads from flash; None where nothing says what is on flash."""
        return None if self._missed_share is None else self._missed_share / self.n_tokens


class Method(ABC):
    """A rule on one layer.

    Args:
        config: with this class's `name`.
        glu: the layer's weights.
        layer: its number, for messages.

    Attributes:
        meter: weights touched so far.
        straight_through: in training the gradient passes a mask as if nothing were dropped.
    """

    name: ClassVar[str]
    summary: ClassVar[str]  # one line for tables and --help
    least: ClassVar[float] = 0.0  # densities at or below cannot be reached
    selection: ClassVar[str] = "topk"  # the paper's way
    n_densities: ClassVar[int] = 0  # how many of its own it takes
    follows_weights: ClassVar[bool] = True  # computes with `glu` as it is now: weights may be trained under the rule

    def __init__(self, config: MethodConfig, glu: Glu, layer: int) -> None:
        self.config, self.glu, self.layer = config, glu, layer
        self.meter = Meter()
        self.straight_through = False
        self._means = (ColumnMean(), ColumnMean())  # of inputs and of GLU activations
        self._mean: tuple[Tensor, Tensor] | None = None

    @classmethod
    def check(cls, config: MethodConfig) -> None:
        """ConfigError if this rule cannot do what `config` asks."""
        if config.density <= cls.least:
            raise ConfigError(
                f"{cls.name} touches more than {cls.least:.3g} of the MLP's weights whatever it drops ({cls.summary}); "
                f"density {config.density:g} cannot be reached: ask for more"
            )
        if config.densities is not None and len(config.densities) != cls.n_densities:
            raise ConfigError(
                f"{cls.name} takes {cls.n_densities or 'no'} densities of its own, {len(config.densities)} were given"
            )
        if config.gamma is not None and cls is not DipCacheAware:
            raise ConfigError(f"gamma is dip-ca's alone, and the method is {cls.name}")
        if config.capacity is not None and not issubclass(cls, CachedMethod):
            raise ConfigError(f"column caches are simulated for dip, dip-ca and planes, and the method is {cls.name}")

    @classmethod
    def needs_data(cls, config: MethodConfig) -> bool:
        """Whether calibration tokens must be shown before the rule works."""
        return config.selection != "topk" or config.compensate

    @property
    def extra_dram_bits(self) -> float:
        """Bits beyond the model's weights that must be held in DRAM for this layer."""
        return 0.0

    def collect(self, x: Tensor) -> None:
        """Shows calibration inputs [..., D]; the rule sees the dense model's activations."""
        if self.config.compensate:
            for which, values in enumerate((x, self.glu.hidden(x))):
                self._means[which].collect(values, self._dropped(x, values, which))

    def _dropped(self, x: Tensor, values: Tensor, which: int) -> Tensor | None:
        """Where a column's value would be replaced by its mean, bool like values; None: everywhere.

        The mean that loses least is that of a column's values at the tokens which drop it, and these are small ones.
        which: 0 inputs (values is x), 1 GLU activations of the dense model.
        """
        return None

    def fit(self) -> None:
        """Ends calibration."""
        if self.config.compensate:
            self._mean = (self._means[0].value(self.glu.gate), self._means[1].value(self.glu.gate))

    def take_weights(self, gate: Tensor, up: Tensor, down: Tensor) -> None:
        """Other weights of the same shapes from now on, such as those of a training step."""
        self.glu.gate, self.glu.up, self.glu.down = gate, up, down

    def set_density(self, density: float) -> None:
        """Another density from now on, equal in all its parts; thresholds and means stay what they were fitted to."""
        raise ConfigError(f"{self.name} is made for one density: give no range of densities and no annealing")

    def dense(self, x: Tensor) -> Tensor:
        """What the layer gives without the rule."""
        return self.glu.dense(x)

    def __call__(self, x: Tensor) -> Tensor:
        """y [..., D] of x [..., D]."""
        return self.forward(x)

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """y [..., D] of x [..., D], metering what was touched."""

    def reset(self) -> None:  # noqa: B027  most rules carry nothing
        """A new sequence begins: state that a rule carries from token to token is dropped."""

    # -- pieces that rules are made of

    def _selector(self, n: int, density: float) -> Selector:
        return Selector(n, density, self.config.selection)

    def _kept(self, values: Tensor, mask: Tensor, which: int) -> Tensor:
        """values where selected, else their calibrated mean (0 without compensation); which: 0 inputs, 1 GLU."""
        kept = values * mask if self._mean is None else torch.where(mask, values, self._mean[which])
        return values + (kept - values).detach() if self.straight_through else kept

    def _count(self, x: Tensor, *shares: Tensor | float) -> None:
        """Meters the mean share of gate, up and down (one number for all, or three)."""
        n_tokens = x.numel() // x.shape[-1]
        self.meter.add(n_tokens, sum(shares) / len(shares))

    @property
    def _mlp_weights(self) -> int:
        return 3 * self.glu.hidden_size * self.glu.intermediate_size


def _share(mask: Tensor) -> Tensor:
    """Mean density of a mask."""
    return mask.mean(dtype=torch.float32)


class Dense(Method):
    """Everything is used."""

    name = "dense"
    summary = "every weight is used"

    @classmethod
    def check(cls, config: MethodConfig) -> None:
        """Dense has density 1 and nothing else."""
        if config.density != 1:
            raise ConfigError(f"dense uses every weight; density {config.density:g} belongs to another method")
        super().check(config)

    def set_density(self, density: float) -> None:
        """Nothing to set: density is 1."""

    def forward(self, x: Tensor) -> Tensor:
        """The MLP as it is."""
        self._count(x, 1.0)
        return self.glu.dense(x)


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
        share = _share(mask)
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
        self._count(x, _share(mask) + self._predictor_share)
        return self.glu.output(self._kept(self.glu.hidden(x), mask, 1))


class _FixedMask(Method):
    """Rules that drop the same weights for every token: the reference that needs no activations at run time.

    A mask of one bit a weight must be held or read beside the kept weights: `extra_dram_bits`.
    """

    follows_weights = False

    @classmethod
    def check(cls, config: MethodConfig) -> None:
        """2:4 is one density."""
        super().check(config)
        if config.pattern not in ("unstructured", "2:4"):
            raise ConfigError(f"pattern is '{config.pattern}', known are unstructured and 2:4")
        if config.pattern == "2:4" and config.density != 0.5:
            raise ConfigError(f"2:4 keeps half of the weights, and density is {config.density:g}: ask for 0.5")

    def __init__(self, config: MethodConfig, glu: Glu, layer: int) -> None:
        super().__init__(config, glu, layer)
        self._pruned: Glu | None = None
        self._correction: tuple[Tensor, ...] | None = None

    @property
    def extra_dram_bits(self) -> float:
        """One bit a weight."""
        return float(self._mlp_weights)

    @abstractmethod
    def _prune(self, weight: Tensor, which: int) -> Tensor:
        """The pruned weight; which: 0 for matrices whose input is x, 1 for down."""

    def fit(self) -> None:
        super().fit()
        self._make()

    def _make(self) -> Glu:
        if self._pruned is None:
            gate, up, down = (self._prune(w, n) for w, n in ((self.glu.gate, 0), (self.glu.up, 0), (self.glu.down, 1)))
            pruned = replace(self.glu, gate=gate, up=up, down=down)
            if self._mean is not None:  # what the dropped weights give on the mean input goes into the biases
                pruned.gate_bias = _with_bias(self.glu.gate_bias, (self.glu.gate - gate) @ self._mean[0])
                pruned.up_bias = _with_bias(self.glu.up_bias, (self.glu.up - up) @ self._mean[0])
                pruned.down_bias = _with_bias(self.glu.down_bias, (self.glu.down - down) @ self._mean[1])
            self._pruned = pruned
        return self._pruned

    def forward(self, x: Tensor) -> Tensor:
        self._count(x, self.config.density)
        return self._make().dense(x)

    def _keep_largest(self, weight: Tensor, scores: Tensor, *, by_row: bool) -> Tensor:
        """weight with its lowest scores set to zero, row by row or over the matrix."""
        if self.config.pattern == "2:4":
            fours = scores.reshape(*scores.shape[:-1], -1, 4)
            return weight * top_k_mask(fours, 2).reshape(weight.shape)
        rows = scores if by_row else scores.reshape(1, -1)
        keep = n_selected(self.config.density, rows.shape[-1])
        border = rows.kthvalue(rows.shape[-1] - keep + 1, dim=-1, keepdim=True).values
        return weight * (rows >= border).reshape(weight.shape)


def _with_bias(bias: Tensor | None, more: Tensor) -> Tensor:
    return more if bias is None else bias + more


class Magnitude(_FixedMask):
    """The largest |W| of each matrix."""

    name = "magnitude"
    summary = "a fixed mask of the largest |W|"

    def _prune(self, weight: Tensor, which: int) -> Tensor:
        return self._keep_largest(weight, weight.float().abs(), by_row=False)


class Wanda(_FixedMask):
    """The largest |W_ij| ||X_j|| of each output row (arXiv 2306.11695, eq. 1)."""

    name = "wanda"
    summary = "a fixed mask of the largest |W_ij| times the norm of input j"

    def __init__(self, config: MethodConfig, glu: Glu, layer: int) -> None:
        super().__init__(config, glu, layer)
        self._squares = (ColumnMean(), ColumnMean())

    @classmethod
    def needs_data(cls, config: MethodConfig) -> bool:
        """Always: norms of the inputs."""
        return True

    def collect(self, x: Tensor) -> None:
        super().collect(x)
        self._squares[0].collect(x.float().square())
        self._squares[1].collect(self.glu.hidden(x).float().square())

    def _prune(self, weight: Tensor, which: int) -> Tensor:
        norms = self._squares[which].value(weight.float()).sqrt()
        return self._keep_largest(weight, weight.float().abs() * norms, by_row=True)


class SparseGpt(_FixedMask):
    """Optimal brain surgeon, column by column: what a dropped weight did goes to the later ones (arXiv 2301.00774).

    Hessians are those of the dense model's activations; layers are not pruned one after the other.
    """

    name = "sparsegpt"
    summary = "a fixed mask chosen with second-order information, other weights adjusted"
    _block: ClassVar[int] = 128

    def __init__(self, config: MethodConfig, glu: Glu, layer: int) -> None:
        super().__init__(config, glu, layer)
        self._hessian: list[Tensor | None] = [None, None]

    @classmethod
    def needs_data(cls, config: MethodConfig) -> bool:
        """Always: Hessians."""
        return True

    def collect(self, x: Tensor) -> None:
        super().collect(x)
        for which, values in enumerate((x, self.glu.hidden(x))):
            rows = values.reshape(-1, values.shape[-1]).float()
            hessian = self._hessian[which]
            self._hessian[which] = rows.T @ rows if hessian is None else hessian.addmm_(rows.T, rows)

    def fit(self) -> None:
        super().fit()
        self._hessian = [None, None]

    def _prune(self, weight: Tensor, which: int) -> Tensor:
        hessian = self._hessian[which]
        if hessian is None:
            raise ConfigError("sparsegpt needs calibration text, and none was given")
        hessian = hessian.clone()
        dead = hessian.diagonal() == 0
        hessian.diagonal()[dead] = 1
        hessian.diagonal().add_(0.01 * hessian.diagonal().mean())
        inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
        w = weight.float().clone()
        w[:, dead] = 0
        n = w.shape[1]
        for first in range(0, n, self._block):
            last = min(n, first + self._block)
            part, corner = w[:, first:last].clone(), inverse[first:last, first:last]
            errors = torch.zeros_like(part)
            scores = (part / corner.diagonal()).square()
            if self.config.pattern == "unstructured":
                keep = max(1, round(self.config.density * scores.numel()))
                kept = scores >= scores.flatten().kthvalue(scores.numel() - keep + 1).values
            for j in range(last - first):
                if (
                    self.config.pattern == "2:4" and j % 4 == 0
                ):  # chosen when its four are reached: errors have moved them
                    fours = (part[:, j : j + 4] / corner.diagonal()[j : j + 4]).square()
                    kept = torch.zeros_like(part, dtype=torch.bool) if j == 0 else kept
                    kept[:, j : j + 4] = top_k_mask(fours, min(2, fours.shape[1]))
                column = part[:, j] * kept[:, j]
                error = (part[:, j] - column) / corner[j, j]
                part[:, j:] -= error[:, None] * corner[j, j:]
                part[:, j] = column
                errors[:, j] = error
            w[:, first:last] = part
            w[:, last:] -= errors @ inverse[first:last, last:]
        return w.to(weight.dtype)


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
        self._count(x, _share(gate), _share(up), _share(down))
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
        return y, _share(mask) + self.low_rank_share

    def forward(self, x: Tensor) -> Tensor:
        gate, gate_share = self._linear(x, 0)
        up, up_share = self._linear(x, 1)
        y, down_share = self._linear(self.glu.act(gate) * up, 2)
        self._count(x, gate_share, up_share, down_share)
        return y


@dataclass
class _Sequence:
    """The tokens of one sequence that are no padding: where they stand [T], their values [T, n], their cache."""

    at: Tensor
    rows: F32
    cache: ColumnCache


class CachedMethod(Method):
    """Rules that follow sequences, with column caches that go on from call to call."""

    def __init__(self, config: MethodConfig, glu: Glu, layer: int) -> None:
        super().__init__(config, glu, layer)
        self._caches: list[tuple[ColumnCache, ColumnCache]] = []
        self.used: Tensor | None = None  # [batch, tokens] bool: tokens that are not padding; None: all

    @abstractmethod
    def _cache(self, which: int) -> ColumnCache:
        """The cache of the input (which = 0) or the GLU region (1) before a sequence."""

    def reset(self) -> None:
        """A new sequence begins: its caches are as before any token."""
        self._caches = []

    def _check_order(self, values: Tensor) -> None:
        if values.ndim != 3:
            raise ConfigError(
                f"a column cache follows sequences, and layer {self.layer} got inputs of shape {tuple(values.shape)}, "
                "not [batch, tokens, columns]: experts see tokens without their order, use a method without caches"
            )

    def _sequences(self, values: Tensor, which: int) -> list[_Sequence]:
        """values [batch, tokens, n] of a region as its sequences, on the host."""
        self._check_order(values)
        if not self._caches:
            self._caches = [(self._cache(0), self._cache(1)) for _ in range(len(values))]
        if len(self._caches) != len(values):
            raise ConfigError(
                f"a batch of {len(values)} follows one of {len(self._caches)} without reset(): caches belong to "
                "sequences"
            )
        host = values.detach().float().cpu().numpy()
        used = torch.ones(values.shape[:2], dtype=torch.bool)
        if self.used is not None and self.used.shape == used.shape:
            used = self.used.cpu()
        return [
            _Sequence(mask.nonzero()[:, 0], rows[mask.numpy()], pair[which])
            for mask, rows, pair in zip(used, host, self._caches, strict=True)
        ]


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
        share = _share(inputs)
        self._count(x, share, share, _share(glu))
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
        share = _share(mask)
        self._count(x, *(part + self.low_rank_share for part in (share, share, _share(glu))))
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
        share = _share(mask)
        self._count(x, share, share, _share(glu))
        return functional.linear(self._kept(h, glu, 1), self.glu.down * down_scale[:, None], self.glu.down_bias)


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
        share = 1.0 if refined is None else _share(refined)
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


class Resident(Method):
    """No flash at all: the MLP requantised to fewer bits, the rival of whatever streams in the same DRAM.

    Groups of 32 with an 8-bit scale and offset each (`dipper.requantise`), searched for the least error weighted by the
    second moments of the inputs on calibration text.
    """

    follows_weights = False
    name = "resident"
    summary = "all weights in DRAM, in fewer bits"

    def __init__(self, config: MethodConfig, glu: Glu, layer: int) -> None:
        super().__init__(config, glu, layer)
        self._moments: list[Tensor] = []  # fp64 sums of squares, [D] and [I]
        self._n_tokens = 0

    @classmethod
    def check(cls, config: MethodConfig) -> None:
        """It uses everything; bits say how well."""
        super().check(config)
        if config.density != 1 or config.compensate or config.norms or config.select is not None:
            raise ConfigError("resident uses every weight: drop density, select, norms and compensate, give bits")
        if len(config.bits) != 2 or not all(1 <= b <= 8 for b in config.bits):
            raise ConfigError(f"bits is {config.bits}: give those of input and of GLU columns, 1 to 8 each")

    @classmethod
    def needs_data(cls, config: MethodConfig) -> bool:
        return True

    @property
    def held_bits(self) -> float:
        """Of the layer's weights with their scales."""
        shapes = (self.glu.gate.shape, self.glu.up.shape, self.glu.down.shape)
        bits = (self.config.bits[0], *self.config.bits)
        return float(sum(r * c * bits_per_weight(b, c) for (r, c), b in zip(shapes, bits, strict=True)))

    def collect(self, x: Tensor) -> None:
        squares = [v.reshape(-1, v.shape[-1]).double().square().sum(0) for v in (x, self.glu.hidden(x))]
        self._moments = [a + b for a, b in zip(self._moments, squares, strict=True)] if self._moments else squares
        self._n_tokens += x.numel() // x.shape[-1]

    def fit(self) -> None:
        inputs, hidden = (moments / self._n_tokens for moments in self._moments)
        bits, bits_glu = self.config.bits
        self.glu = replace(
            self.glu,
            gate=requantise(self.glu.gate, bits, inputs),
            up=requantise(self.glu.up, bits, inputs),
            down=requantise(self.glu.down, bits_glu, hidden),
        )
        self._moments = []

    def forward(self, x: Tensor) -> Tensor:
        if self._n_tokens == 0:
            raise ConfigError("resident was not calibrated: give calibration text")
        self._count(x, 1.0)
        return self.glu.dense(x)


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
        self.meter.add(x.numel() // x.shape[-1], _share(mask))
        return functional.linear(x * mask, self.weight, self.bias)


METHODS: dict[str, type[Method]] = {
    rule.name: rule
    for rule in (
        Dense,
        GluOracle,
        GluDown,
        UpPruning,
        GatePruning,
        DejaVu,
        Magnitude,
        Wanda,
        SparseGpt,
        Teal,
        Wina,
        RSparse,
        Dip,
        DipCacheAware,
        DipLowRank,
        DipRescale,
        Planes,
        Resident,
    )
}
