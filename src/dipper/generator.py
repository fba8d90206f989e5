"""Scores of columns for models that we have no weights of: streams with the hit rates of real ones.

What a column cache makes of a model depends on four things: how a column's scores are distributed around its token's
median (most columns alike, a few nearly always selected), how much columns differ in that, how long a column stays
where it is, and how far apart in size scores are (for gamma < 1). All were measured on recorded traces
(`benchmarks/fit_generator.py`) and are kept as *prototypes*: kinds of column, each with

- a quantile function: log2(score / the token's median) = p(w), a polynomial of a standard normal w (by least squares:
  rising, but for the outermost per cent of some);
- an autocorrelation of w: `A_1 phi_1^lag + A_2 phi_2^lag`, what is left of 1 being independent from token to token.

Prototypes stand in a grid, [hotness, spread]: a region's columns sorted by their mean into groups of equal size, each
group by standard deviation into groups of equal size. There is a grid by model, kind of region and knot of relative
depth. A region of n columns has n / (size of the grid) columns of each prototype, whatever n is, in random order.

w follows one innovation e a score (ARMA(2, 2)): `u_i <- phi_i u_i + e`, `w = c_0 e + c_1 u_1 + c_2 u_2` with u of the
token before, and c such that w has variance 1 and the autocorrelation above.

    generator = ScoreGenerator.load()
    stream = generator.region("glu", depth=0.5, n_columns=17920, seed=7)
    stream.scores(128)  # [128, 17920] fp32; the next call goes on
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .errors import ConfigError

__all__ = ["KINDS", "PHI", "RegionScores", "ScoreGenerator"]

KINDS = ("input", "glu")
PHI = (0.5, 0.9)  # decays by token of the two parts of a column's memory
W_RANGE = (-2.0, 2.75)  # where the polynomials were fitted, 97 % of all tokens; beyond, a score stays at their end
DEGREE = 5

PARAMETERS = Path(__file__).with_name("generator.npz")
_BLOCK = 1 << 16  # scores worked on at a time: what stays in a core's own cache
_U_COVARIANCE = 1 / (1 - np.multiply.outer(PHI, PHI))  # of u_1, u_2 in the long run

_Array = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, eq=False)
class ScoreGenerator:
    """Fitted prototypes; use `ScoreGenerator.load`.

    Attributes:
        fitted_on: names of the models whose traces they were fitted to.
        knots: relative depths that have a grid, ascending from 0 to 1, [n_knots].
        tables: by kind, polynomial coefficients (constant first) then A_1, A_2, means over `fitted_on`,
            [n_knots, hotness, spread, DEGREE + 3].
    """

    fitted_on: tuple[str, ...]
    knots: _Array
    tables: dict[str, _Array]

    @classmethod
    def load(cls, path: Path | None = None, variant: str | None = None) -> ScoreGenerator:
        """The package's parameters, or those of a file that `benchmarks/fit_generator.py` wrote.

        Args:
            path: the file; None: the package's.
            variant: one of the models fitted, to have its parameters alone; None: means over all models. What hit rates
                differ between the variants is how far the choice of models to fit matters.

        Raises:
            ConfigError: no such file, not a file of parameters, or an unknown variant.
        """
        path = path or PARAMETERS
        try:
            with np.load(path, allow_pickle=False) as file:
                models = tuple(json.loads(str(file["provenance"]))["models"])
                knots = file["knots"].astype(np.float32)
                tables = {kind: file[kind].astype(np.float32) for kind in KINDS}
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(
                f"{path} has no generator's parameters ({error}): write it with benchmarks/fit_generator.py --write"
            ) from None
        return cls.of_models(models, knots, tables, variant)

    @classmethod
    def of_models(
        cls, models: tuple[str, ...], knots: _Array, tables: dict[str, _Array], variant: str | None = None
    ) -> ScoreGenerator:
        """From tables by model, [n_models, n_knots, hotness, spread, DEGREE + 3] by kind; `load` tells of `variant`."""
        if variant is not None and variant not in models:
            raise ConfigError(f"variant '{variant}' is unknown: choose {', '.join(models)}")
        chosen = [i for i, model in enumerate(models) if variant in (None, model)]
        return cls(
            fitted_on=tuple(models[i] for i in chosen),
            knots=knots,
            tables={kind: table[chosen].mean(axis=0) for kind, table in tables.items()},
        )

    def region(self, kind: str, depth: float, n_columns: int, seed: int) -> RegionScores:
        """The stream of one region.

        Args:
            kind: "input" or "glu".
            depth: of its layer, layer / (layers - 1), in [0, 1].
            n_columns: at least 1.
            seed: the same seed gives the same stream.

        Raises:
            ConfigError: kind, depth or n_columns out of range.
        """
        if kind not in KINDS:
            raise ConfigError(f"kind '{kind}' is unknown: choose {', '.join(KINDS)}")
        if not 0 <= depth <= 1:
            raise ConfigError(f"depth is {depth}, outside [0, 1]: give layer / (layers - 1)")
        if n_columns < 1:
            raise ConfigError(f"a region of {n_columns} columns has no scores: at least 1 is needed")
        table, knots = self.tables[kind], self.knots
        above = int(np.clip(np.searchsorted(knots, depth), 1, len(knots) - 1))
        share = (depth - knots[above - 1]) / (knots[above] - knots[above - 1])
        grid = (table[above - 1] * (1 - share) + table[above] * share).reshape(-1, table.shape[-1])
        rng = np.random.Generator(np.random.SFC64(seed))
        prototypes = (np.arange(n_columns) * len(grid) + rng.integers(len(grid))) // n_columns % len(grid)
        return RegionScores(grid[rng.permutation(prototypes)].T.astype(np.float32), rng)


class RegionScores:
    """A region's stream of scores; `ScoreGenerator.region` makes it."""

    def __init__(self, parameters: _Array, rng: np.random.Generator) -> None:
        # [DEGREE + 3, n_columns]
        self._polynomial = np.ascontiguousarray(parameters[: DEGREE + 1])
        self._c_0, self._c = _innovation_weights(parameters[DEGREE + 1 :])
        self._rng = rng
        self._memory = self._stationary()

    def scores(self, n_tokens: int) -> _Array:
        """The next `n_tokens` tokens, [n_tokens, n_columns] fp32, positive, a token's median near 1.

        Calls may be cut anywhere: they go on where the last one ended.
        """
        n_columns = self._polynomial.shape[1]
        out = np.empty((n_tokens, n_columns), np.float32)
        rows = max(1, _BLOCK // n_columns)
        for start in range(0, n_tokens, rows):
            self._fill(out[start : start + rows])
        return out

    def _fill(self, out: _Array) -> None:
        """One block of tokens, [rows, n_columns], in place."""
        self._rng.standard_normal(dtype=np.float32, out=out)
        u, c_0, c = self._memory, self._c_0, self._c
        part, phi = np.empty_like(u), np.array(PHI, np.float32)[:, None]
        for row in out:  # an innovation e by column becomes w
            np.multiply(c, u, out=part)
            u *= phi
            u += row
            row *= c_0
            row += part[0]
            row += part[1]
        np.clip(out, *W_RANGE, out=out)
        w = out.copy()
        np.multiply(w, self._polynomial[DEGREE], out=out)
        for coefficient in self._polynomial[DEGREE - 1 : 0 : -1]:
            out += coefficient
            out *= w
        out += self._polynomial[0]
        np.exp2(out, out=out)

    def _stationary(self) -> _Array:
        """u as it is after a long time, [2, n_columns]: the two follow the same innovations, so they are correlated."""
        u = self._rng.standard_normal((2, self._polynomial.shape[1]), dtype=np.float32)
        return np.linalg.cholesky(_U_COVARIANCE).astype(np.float32) @ u


def _innovation_weights(parts: _Array) -> tuple[_Array, _Array]:
    """c_0 [n] and c [2, n] that give w variance 1 and the autocorrelation sum_i A_i phi_i^lag of `parts` A [2, n].

    With u of the token before, the covariance of w at a lag is the sum over i of
    `phi_i^lag c_i (c_0 / phi_i + sum_j cov(u_i, u_j) c_j)`. c is solved for with c_0 and the bracket held, then c_0
    from the variance, and again: memory is weak, so this settles.
    """
    phi = np.array(PHI)[:, None]
    c_0, c = np.ones(parts.shape[1]), np.zeros(parts.shape)
    for _ in range(60):
        c = parts / (c_0 / phi + _U_COVARIANCE @ c)
        c_0 = np.sqrt(np.maximum(0.01, 1 - (c * (_U_COVARIANCE @ c)).sum(axis=0)))
    return c_0.astype(np.float32), c.astype(np.float32)
