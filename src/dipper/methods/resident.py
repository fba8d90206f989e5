"""The rival of all that streams: the whole MLP in fewer bits."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from dipper.errors import ConfigError
from dipper.methods.method import Glu, Method, MethodConfig
from dipper.requantise import bits_per_weight, requantise

__all__ = ["Resident"]


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
