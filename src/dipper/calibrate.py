"""Fits what DIP leaves open to calibration text: the split between d_in and d_glu, densities by layer, norms, means.

    calibration = calibrate(loaded.model, windows, model=fields, densities=[0.6])
    calibration.save("smollm2.npz")            # for the engine, the simulator and `sparsify_`

1. **Split** (arXiv 2412.01380): for a total density d, pairs with (2 d_in + d_glu) / 3 = d are tried on
   the calibration text and the one of lowest loss is taken.
2. **Allocation by layer.** Each layer alone is pruned at several densities, the rest dense, and the divergence of the
   model's predictions from its dense ones is measured: a curve per layer. Under a common budget the sum of the curves
   is least where all layers have the same slope; on their lower convex hulls that is found by a greedy walk in order
   of slope (Lagrangian relaxation). Layers are taken as independent, and the result is kept only if it is better than
   equal densities on text that was not used for the curves.
3. **Norms** of the columns as score factors, **means** of the columns' inputs as what an unselected column contributes:
   each only where it lowers the loss on text that the means were not taken from.

Perplexity on test text is never looked at. Everything is deterministic on one machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from dipper.calibration import Calibration
from dipper.errors import ConfigError
from dipper.methods import Dip, MethodConfig
from dipper.sparsify import Sparsified, find_glus, sparsify_

__all__ = ["MEANS_AT", "Allocation", "allocate", "calibrate", "mean_loss", "split_of"]

Pairs = list[tuple[float, float]]  # (d_in, d_glu) by layer
Progress = Callable[[str, int, int], None]

_CURVE = (0.2, 0.35, 0.5, 0.65, 0.8)  # densities at which a layer's curve is measured; 1 costs nothing
_SPLITS = (-0.2, -0.15, -0.1, -0.05, 0.0, 0.05, 0.1, 0.15, 0.2, 0.25)  # of d_in above d
MEANS_AT = 0.6  # density at which columns are unselected whose means are taken
_HEAD_ROWS = 256  # positions whose logits are held at once: a vocabulary of 262k makes 1 GiB of 1024


def split_of(density: float, above: float) -> tuple[float, float] | None:
    """(d_in, d_glu) with d_in = density + above and (2 d_in + d_glu) / 3 = density; None outside (0, 1]."""
    d_in = density + above
    d_glu = 3 * density - 2 * d_in
    if 0 < d_in <= 1 + 1e-12 and 0 < d_glu <= 1 + 1e-12:
        return min(d_in, 1.0), min(d_glu, 1.0)
    return None


def _logits(model: nn.Module, ids: Tensor) -> Callable[[int], Tensor]:
    """fp32 logits of windows ids [B, T], by chunks of positions: call(start) -> [rows, V]."""
    hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
    head = model.get_output_embeddings()
    return lambda start: head(hidden[start : start + _HEAD_ROWS]).float()


@torch.no_grad()  # type: ignore[untyped-decorator]
def mean_loss(model: nn.Module, windows: Sequence[Tensor]) -> float:
    """Mean negative log likelihood of a model as it stands, nats; windows: ids [B, T] each."""
    total, count = 0.0, 0
    for ids in windows:
        targets = ids[:, 1:].flatten()
        chunk_of = _logits(model, ids)
        for start in range(0, len(targets), _HEAD_ROWS):
            part = targets[start : start + _HEAD_ROWS]
            total += float(functional.cross_entropy(chunk_of(start), part, reduction="sum"))
        count += len(targets)
    if not math.isfinite(total):
        raise ConfigError(f"the loss on the calibration text is {total}: weights or the computation are broken")
    return total / count


class _Dense:
    """The dense model's log probabilities of some windows, kept in 16 bits, to measure divergence from."""

    def __init__(self, model: nn.Module, windows: Sequence[Tensor]) -> None:
        self._model, self._windows = model, windows
        self._hidden: list[Tensor] = []
        with torch.no_grad():
            for ids in windows:
                self._hidden.append(
                    model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
                )

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def divergence(self) -> float:
        """Mean KL(dense || as the model stands now), nats a token."""
        head = self._model.get_output_embeddings()
        total, count = 0.0, 0
        for ids, dense in zip(self._windows, self._hidden, strict=True):
            chunk_of = _logits(self._model, ids)
            for start in range(0, len(dense), _HEAD_ROWS):
                reference = head(dense[start : start + _HEAD_ROWS]).float().log_softmax(-1)
                now = chunk_of(start).log_softmax(-1)
                total += float(functional.kl_div(now, reference, reduction="sum", log_target=True))
            count += len(dense)
        return total / count


def allocate(curves: np.ndarray, densities: Sequence[float], mean_density: float) -> list[float]:
    """Densities by layer of least summed divergence, their mean given.

    Each curve's lower convex hull is walked down from its cheapest point; among all layers' next pieces the steepest is
    taken first, the last one in part. On the hulls this is the optimum (Lagrangian relaxation: one slope for all).

    Args:
        curves: [n_layers, n] divergence with that layer alone at each density, 0 at the last.
        densities: [n] ascending, the last one 1.
        mean_density: of the result.

    Returns:
        [n_layers].

    Raises:
        ConfigError: the budget is below the least density.
    """
    n_layers = len(curves)
    left = mean_density * n_layers - densities[0] * n_layers
    if left < -1e-9:
        raise ConfigError(f"density {mean_density:g} is below the least that curves were measured at, {densities[0]:g}")
    pieces = []  # (gain per density, order, layer, width)
    for layer, curve in enumerate(curves):
        at = _lower_hull(np.asarray(densities), curve)  # falling, since the last point, 0, is the least
        for order, (i, j) in enumerate(pairwise(at)):
            width = densities[j] - densities[i]
            pieces.append(((curve[i] - curve[j]) / width, -order, layer, width))
    result = [float(densities[0])] * n_layers
    for _, _, layer, width in sorted(pieces, reverse=True):
        step = min(width, max(0.0, left))
        result[layer] += step
        left -= step
    return [min(1.0, d) for d in result]


def _lower_hull(x: np.ndarray, y: np.ndarray) -> list[int]:
    """Indices of the points on the lower convex hull, x ascending."""
    hull: list[int] = []
    for i in range(len(x)):
        while len(hull) >= 2:
            a, b = hull[-2], hull[-1]
            if (y[b] - y[a]) * (x[i] - x[b]) >= (y[i] - y[b]) * (x[b] - x[a]):
                hull.pop()
            else:
                break
        hull.append(i)
    return hull


@dataclass(frozen=True)
class Allocation:
    """What was found for one total density.

    Attributes:
        pairs: (d_in, d_glu) by layer.
        losses: mean loss on held-back calibration text by what was tried: "dense", "equal", "split", "layers".
    """

    pairs: Pairs
    losses: dict[str, float]


class _Pruner:
    """DIP in a model, whose densities change from measurement to measurement without calibrating means anew."""

    def __init__(self, model: nn.Module, config: MethodConfig, calibration: Sequence[Tensor]) -> None:
        self.sparse: Sparsified = sparsify_(model, replace(config, density=MEANS_AT), calibration=calibration)
        self.rules: list[Dip] = [rule for rule in self.sparse.rules if isinstance(rule, Dip)]

    def set(self, pairs: Pairs) -> None:
        """Densities by layer."""
        for rule, pair in zip(self.rules, pairs, strict=True):
            rule.set_densities(*pair)


def calibrate(
    model: nn.Module,
    windows: Sequence[Tensor],
    *,
    model_fields: dict[str, Any],
    densities: Sequence[float],
    norms: bool | None = None,
    compensate: bool | None = None,
    by_layer: bool = True,
    provenance: dict[str, Any] | None = None,
    progress: Progress | None = None,
) -> Calibration:
    """Fits split, densities by layer, norms and means.

    Args:
        model: a Hugging Face model, dense, in eval mode.
        windows: ids [B, T] of calibration text on the model's device, at least two; the last half judges.
        model_fields: `Calibration.model`.
        densities: total densities to make tables for, in (0, 1).
        norms: rank by |x| times the column's norm; None: if that is better.
        compensate: an unselected column contributes its mean (`MethodConfig.compensate`); None: if that is better.
        by_layer: allocate densities by layer; equal ones otherwise.
        provenance: what the text was; figures of the fit are added.
        progress: called with (stage, done, in all).

    Raises:
        ConfigError: too little text, a density out of range, or a model without GLU layers.
    """
    if len(windows) < 2:
        raise ConfigError(
            f"{len(windows)} window of calibration text was given: two are the least, one to fit and one to judge"
        )
    for density in densities:
        if not 0 < density < 1:
            raise ConfigError(f"density is {density:g}: tables are made for densities above 0 and below 1")
    half = len(windows) // 2
    fitted, judged = windows[:half], windows[half:]
    tell = progress or (lambda stage, done, total: None)
    n_layers = sum(len(site.glus) for site in find_glus(model))
    base = mean_loss(model, judged)
    dense = _Dense(model, fitted[: max(1, half // 2)])
    config, found = _best_options(model, fitted, sorted(densities)[len(densities) // 2], norms, compensate)
    pruner = _Pruner(model, config, fitted)
    try:
        curves: dict[float, np.ndarray] = {}
        tables: dict[str, np.ndarray] = {}
        for i, density in enumerate(densities):
            tell(f"split at {density:g}", i, len(densities))
            above = _best_split(pruner, fitted, density)
            if by_layer and above not in curves:
                curves[above] = _layer_curves(pruner, dense, above, n_layers, tell)
            result = _choose(pruner, judged, density, above, curves.get(above), n_layers)
            tables[f"{density:g}"] = np.array(result.pairs, np.float64)
            found[f"{density:g}"] = {"above": above, "losses": {"dense": base, **result.losses}}
        return Calibration(
            model=model_fields,
            provenance={**(provenance or {}), "fit": found, "norms": config.norms, "compensate": config.compensate},
            tables=tables,
            factors=[rule.factors() for rule in pruner.rules] if config.norms else None,
            means=[rule.means() for rule in pruner.rules] if config.compensate else None,
            biases=[rule.mean_products() for rule in pruner.rules] if config.compensate else None,
        )
    finally:
        pruner.sparse.undo()


def _best_options(
    model: nn.Module, fitted: Sequence[Tensor], density: float, norms: bool | None, compensate: bool | None
) -> tuple[MethodConfig, dict[str, Any]]:
    """DIP with or without norms and means, whichever loses least at a density, and the losses.

    Means are taken on the first half of the windows and judged on the second.
    """
    half = max(1, len(fitted) // 2)
    losses: dict[tuple[bool, bool], float] = {}
    for use_norms in (False, True) if norms is None else (norms,):
        for use_means in (False, True) if compensate is None else (compensate,):
            config = MethodConfig("dip", density=density, norms=use_norms, compensate=use_means)
            with sparsify_(model, config, calibration=fitted[:half]):
                losses[use_norms, use_means] = mean_loss(model, fitted[half:] or fitted)
    use_norms, use_means = min(losses, key=lambda options: losses[options])
    told = {f"{'norms' if n else 'plain'}{' means' if m else ''}": loss for (n, m), loss in losses.items()}
    return MethodConfig("dip", norms=use_norms, compensate=use_means), {"options": told}


def _best_split(pruner: _Pruner, windows: Sequence[Tensor], density: float) -> float:
    """How far d_in lies above d at the least loss, equal densities in every layer."""
    losses = {}
    for above in _SPLITS:
        pair = split_of(density, above)
        if pair is not None:
            pruner.set([pair] * len(pruner.rules))
            losses[above] = mean_loss(pruner.sparse.model, windows)
    return min(losses, key=lambda above: losses[above])


def _pair_near(density: float, above: float) -> tuple[float, float]:
    """The split `above` at another density, shrunk where it would leave (0, 1]."""
    while True:
        pair = split_of(density, above)
        if pair is not None:
            return pair
        above *= 0.8 if abs(above) > 1e-3 else 0.0


def _layer_curves(pruner: _Pruner, dense: _Dense, above: float, n_layers: int, tell: Progress) -> np.ndarray:
    """Divergence with one layer alone at each of `_CURVE` and 1, [n_layers, n]."""
    curves = np.zeros((n_layers, len(_CURVE) + 1))
    for layer in range(n_layers):
        for i, density in enumerate(_CURVE):
            tell("curves by layer", layer * len(_CURVE) + i, n_layers * len(_CURVE))
            pairs = [(1.0, 1.0)] * n_layers
            pairs[layer] = _pair_near(density, above)
            pruner.set(pairs)
            curves[layer, i] = dense.divergence()
    return curves


def _choose(
    pruner: _Pruner, judged: Sequence[Tensor], density: float, above: float, curves: np.ndarray | None, n_layers: int
) -> Allocation:
    """The best of equal densities, the fitted split, and the allocation by layer, on text not fitted to."""
    tried: dict[str, Pairs] = {
        "equal": [(density, density)] * n_layers,
        "split": [_pair_near(density, above)] * n_layers,
    }
    if curves is not None and density >= _CURVE[0]:
        by_layer = allocate(curves, [*_CURVE, 1.0], density)
        tried["layers"] = [_pair_near(d, above) if d < 1 else (1.0, 1.0) for d in by_layer]
    losses = {}
    for name, pairs in tried.items():
        pruner.set(pairs)
        losses[name] = mean_loss(pruner.sparse.model, judged)
    return Allocation(tried[min(losses, key=lambda name: losses[name])], losses)
