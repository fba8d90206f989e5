"""Rules whose choice may depend on a column cache: each sequence has its own, in the native closed loop."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dipper.cache import ColumnCache
from dipper.errors import ConfigError
from dipper.methods.method import Glu, Method, MethodConfig

__all__ = ["F32", "CachedMethod"]

F32 = npt.NDArray[np.float32]


@dataclass
class _Sequence:
    """The tokens of one sequence that are no padding: where they stand [T], their values [T, n], their cache."""

    at: Tensor
    rows: F32
    cache: ColumnCache


class CachedMethod(Method):
    """Rules that follow sequences, with column caches that go on from call to call."""

    has_caches = True

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
