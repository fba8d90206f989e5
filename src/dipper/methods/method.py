"""What a pruning rule is: its options, a layer's weights, its meter, and the class that all rules are of."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from dipper.errors import ConfigError
from dipper.selector import SELECTIONS, ColumnMean, Selector
from dipper.split_weights import SplitMatrix

__all__ = ["METHODS", "Dense", "Glu", "Meter", "Method", "MethodConfig", "mean_density"]

METHODS: dict[str, type[Method]] = {}  # by name; the package fills it

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
    has_caches: ClassVar[bool] = False  # its choice may depend on column caches
    has_gamma: ClassVar[bool] = False  # it favours what they hold
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
        if config.gamma is not None and not cls.has_gamma:
            raise ConfigError(f"gamma is dip-ca's alone, and the method is {cls.name}")
        if config.capacity is not None and not cls.has_caches:
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


def mean_density(mask: Tensor) -> Tensor:
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
