"""Selection and column cache: the typed face of the native code, and a plain reference to test it against.

A region has n columns. For each token `top_k` turns scores [n] into a mask (ascending int32 column indices), and
`ColumnCache.step` tells which of them were in DRAM and moves its contents. With gamma < 1 the mask depends on the cache
and the cache on the masks before (arXiv 2412.01380, cache-aware masking): `scan` runs that closed loop over a sequence.

    cache = ColumnCache(n_columns=1536, capacity=768, policy="lfu")
    masks, hits = scan(scores, k=n_selected(0.5, 1536), gamma=0.5, cache=cache)  # scores [T, 1536]
    cache.hits / (cache.hits + cache.misses)

`scan_many` does so for several sequences at once, each with a cache of its own.

Invariants: masks are exact (fp32 comparison, ties to the lower column); hits + misses == columns selected; size <=
capacity; nothing leaves without an admission. Objects are not locked: use each cache from one thread at a time.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import _core
from .errors import ConfigError

__all__ = [
    "CacheStep",
    "ColumnCache",
    "ReferenceCache",
    "Refined",
    "RefinedTokens",
    "n_selected",
    "next_uses",
    "reference_refine",
    "reference_top_k",
    "refine",
    "scan",
    "scan_many",
    "scan_refine",
    "top_k",
]

CacheStep = _core.CacheStep


def n_selected(density: float, n: int) -> int:
    """Columns kept at a density: floor(density * n + 1/2), in [1, n].

    Args:
        density: share of columns used, in (0, 1].
        n: columns of the region, at least 1.

    Raises:
        ConfigError: density or n out of range.
    """
    return _core.n_selected(density, n)


def top_k(scores: ArrayLike, k: int, gamma: float = 1.0, cached: ArrayLike | None = None) -> NDArray[np.int32]:
    """Mask of a region: the k columns of largest s_j * (c_j + gamma * (1 - c_j)), s = |scores|, c = cached.

    Dynamic Input Pruning at gamma = 1, cache-aware masking below (arXiv 2412.01380). The product and the comparison are
    fp32; ties go to the lower column; infinite scores rank.

    Args:
        scores: [n], converted to fp32.
        k: columns to keep, in [1, n].
        gamma: factor of columns that are not cached, in (0, 1].
        cached: [n] flags; needed below gamma = 1.

    Returns:
        [k] int32, ascending.

    Raises:
        ConfigError: a NaN score (the message names its column), or k, gamma or a shape out of range.
    """
    flags = None if cached is None else _of_shape("cached", np.ascontiguousarray(cached, dtype=np.bool_), 1)
    return _core.top_k(_of_shape("scores", np.ascontiguousarray(scores, dtype=np.float32), 1), k, gamma, flags)


def scan(
    scores: ArrayLike, k: int, gamma: float = 1.0, cache: ColumnCache | None = None, counted: bool = True
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Closed loop over a sequence: for each token `top_k` against the cache as it stands, then `cache.step`.

    Runs without the GIL, so regions may be scanned in parallel threads.

    Args:
        scores: [T, n], converted to fp32.
        k: columns to keep per token, in [1, n].
        gamma: factor of columns that are not cached, in (0, 1].
        cache: moved and, if `counted`, counted; needed below gamma = 1.
        counted: False warms the cache without counting (prefill).

    Returns:
        masks [T, k] int32, each ascending; hits [T] int32, zeros without a cache.

    Raises:
        ConfigError: as `top_k`; a NaN names its column and token, and the cache holds the state before that token.
    """
    return _core.scan(_of_shape("scores", np.ascontiguousarray(scores, dtype=np.float32), 2), k, gamma, cache, counted)


def scan_many(
    scores: Sequence[ArrayLike] | NDArray[Any],
    k: int,
    gamma: float = 1.0,
    caches: Sequence[ColumnCache] | None = None,
    counted: bool = True,
    n_threads: int | None = None,
) -> list[tuple[NDArray[np.int32], NDArray[np.int32]]]:
    """`scan` of several sequences, each with a cache of its own, in parallel threads.

    Args:
        scores: B sequences of [T, n]; T may differ from one to the next.
        k, gamma, counted: as `scan`.
        caches: B different caches, moved; needed below gamma = 1.
        n_threads: None: one a CPU.

    Returns:
        What `scan` returns for each sequence, in their order.

    Raises:
        ConfigError: as `scan`, naming the sequence; caches that are not B different ones. The caches of the sequences
            without an error have moved to their ends.
    """
    if caches is not None and not len(caches) == len({id(cache) for cache in caches}) == len(scores):
        raise ConfigError(f"{len(caches)} caches for {len(scores)} sequences: give each sequence a cache of its own")
    from concurrent.futures import ThreadPoolExecutor

    def one(b: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        try:
            return scan(scores[b], k, gamma, None if caches is None else caches[b], counted)
        except ConfigError as error:
            raise ConfigError(f"sequence {b}: {error}") from error

    with ThreadPoolExecutor(n_threads or os.cpu_count()) as pool:
        return [scanned.result() for scanned in [pool.submit(one, b) for b in range(len(scores))]]


class Refined(NamedTuple):
    """What a token of `planes` does to one region; units are ascending int32.

    Attributes:
        scores: [n_units] fp32.
        read: units that the reads bring, cached ones between others included.
        fetched: those of them that are not cached.
        demanded: units, fetched or cached, that the cache's step counts.
    """

    scores: NDArray[np.float32]
    read: NDArray[np.int32]
    fetched: NDArray[np.int32]
    demanded: NDArray[np.int32]


def refine(
    x: ArrayLike,
    norm: ArrayLike,
    order: ArrayLike | None,
    columns_per_unit: int,
    cached: ArrayLike,
    n_fetch: int,
    run_cost: float = 0.0,
) -> Refined:
    """Which units of residuals a token of `planes` fetches.

    A unit scores the error that its residuals remove, the sum over its columns, in the order in which they lie, of
    (x_j * norm_j)^2, all in fp32. A read brings a run of neighbours and costs `run_cost` + its units; a token may spend
    n_fetch * (1 + run_cost), as much as that many reads of one unit. Of sum(scores not cached) - price * cost the best
    choice is taken, at the lowest price that keeps within this. Where run_cost is 0, or every price gains less, it is
    the best `n_fetch` units that are not cached, ties to the lower, fewer where fewer are not cached.

    Args:
        x: [n] inputs, converted to fp32.
        norm: [n] norms of the residuals (docs/bundle-format.md section 4), converted to fp32.
        order: [n] the columns as they lie in units; None: in their own order.
        columns_per_unit: at least 1.
        cached: [n_units] flags.
        n_fetch: units, at least 0.
        run_cost: what starting a read costs, in the cost of one unit's bytes.

    Returns:
        The units. Demanded are those fetched or cached that are worth a read of their own at the price found; without
        a price, that score as well as the worst that is fetched.

    Raises:
        ConfigError: a NaN score (the message names its unit), or a size out of range.
    """
    values = _of_shape("x", np.ascontiguousarray(x, dtype=np.float32), 1)
    return Refined(
        *_core.refine(
            values,
            _of_shape("norm", np.ascontiguousarray(norm, dtype=np.float32), 1),
            np.arange(len(values), dtype=np.int32) if order is None else _columns("order", order),
            columns_per_unit,
            _of_shape("cached", np.ascontiguousarray(cached, dtype=np.bool_), 1),
            n_fetch,
            run_cost,
        )
    )


@dataclass(frozen=True)
class RefinedTokens:
    """What each token of a sequence did to a region of `planes`; units, exact.

    Attributes:
        cached: [T, n_units] bool, held before the token.
        fetched: [T, n_units] bool, read for it. A token refines what is cached or fetched.
        demanded, hits: [T] int64, units that the cache's step counted, and those of them that were cached.
    """

    cached: NDArray[np.bool_]
    fetched: NDArray[np.bool_]
    demanded: NDArray[np.int64]
    hits: NDArray[np.int64]


def scan_refine(
    x: ArrayLike,
    norm: ArrayLike,
    order: ArrayLike | None,
    columns_per_unit: int,
    cache: ColumnCache,
    n_fetch: int,
    run_cost: float = 0.0,
    counted: bool = True,
    step: Callable[[Refined], Any] | None = None,
) -> RefinedTokens:
    """Closed loop of `planes` over a sequence: for each token `refine` against the cache as it stands, then a step.

    The one place from which evaluation and simulator choose what is refined.

    Args:
        x: [T, n] inputs, converted to fp32; signs do not matter.
        norm, order, columns_per_unit, n_fetch, run_cost: as `refine`.
        cache: of the region's units; moved and, if `counted`, counted.
        step: what moves the cache instead of `cache.step`, told the token's units.

    Raises:
        ConfigError: as `refine`; a NaN names its token, and the cache holds the state before it.
    """
    rows = _of_shape("x", np.ascontiguousarray(x, dtype=np.float32), 2)
    shape = (len(rows), cache.n_columns)
    out = RefinedTokens(np.zeros(shape, bool), np.zeros(shape, bool), *np.zeros((2, len(rows)), np.int64))
    ordered = np.arange(rows.shape[1], dtype=np.int32) if order is None else order
    for t, row in enumerate(rows):
        cached = cache.cached
        try:
            units = refine(row, norm, ordered, columns_per_unit, cached, n_fetch, run_cost)
        except ConfigError as error:
            raise ConfigError(f"token {t}: {error}") from error
        demanded = units.demanded
        out.cached[t], out.fetched[t, units.fetched] = cached, True
        out.demanded[t], out.hits[t] = len(demanded), np.count_nonzero(cached[demanded])
        if step is None:
            cache.step(demanded, counted)
        else:
            step(units)
    return out


def next_uses(masks: ArrayLike, n_columns: int) -> NDArray[np.int32]:
    """For every selected column the next token whose mask has it, -1 where there is none: what `belady` must know.

    Args:
        masks: [T, k] integers in [0, n_columns).
        n_columns: columns of the region.

    Raises:
        ConfigError: a column out of range.
    """
    given = _of_shape("masks", np.asarray(masks), 2)
    flat = _columns("masks", given.ravel())
    return _core.next_uses(flat.reshape(given.shape), n_columns)


class ColumnCache(_core.ColumnCache):
    """Which columns of a region are in DRAM slots, and what a policy keeps.

    Hits of a token are judged against the state before it; then the policy keeps the best `capacity` of cached and
    selected columns together (ties: cached first, then the lower column), so a miss may stay unadmitted:

    - `lru`: by the last token that used the column.
    - `lfu`: by the count of uses, of all columns, cached or not.
    - `lfu-decay`: the same, every count first multiplied by `decay` at each token (fp32; below 2^-100 it becomes 0).
    - `static`: never admits; contents come from `pin`.
    - `belady`: by the next token that uses the column, which `step` must be told: the fewest misses possible in a
      region (L. A. Belady, IBM Systems Journal 5(2), 1966). For recorded masks, which do not depend on the cache.

    Admitted columns take, in ascending order, the free slots, lowest first, then the slots freed by this step, lowest
    first. Use counts saturate at 2^31 - 1; `lfu-decay` at decay 1 stops counting at 2^24.

    Args:
        n_columns: columns of the region, at least 1.
        capacity: slots, in [0, n_columns].
        policy: "lru", "lfu", "lfu-decay", "static" or "belady".
        decay: in (0, 1], used by lfu-decay alone.
        admission: "best", as above; or "always", as textbooks and other simulators have it: one column a step, every
            miss enters, the worst of those cached before leaves (of equals the least recently used), and uses are
            counted of cached columns only.

    Raises:
        ConfigError: an unknown policy, or capacity or decay out of range.

    Attributes: `n_columns`, `capacity`, `policy`; `size` (columns held), `cached` [n] bool, `slots` [n] int32 (-1: not
    cached), both copies; counters `hits`, `misses`, `evictions`, `admissions` in columns.
    """

    def step(self, mask: ArrayLike, counted: bool = True, next_use: ArrayLike | None = None) -> CacheStep:
        """One token that uses the columns of `mask`.

        Args:
            mask: [k] integers, ascending, without repeats, in [0, n_columns); k may exceed the capacity.
            counted: False moves contents and history but no counter.
            next_use: [k], belady alone: the next token that uses each column of the mask, -1 for none (`next_uses`).

        Returns:
            `n_hits`; `misses` [m] int32, ascending; `admissions` [a, 3] int32 rows (column, slot, evicted column or -1
            where the slot was free), ascending by column.

        Raises:
            ConfigError: a column out of range or out of order, belady without next uses, more than one column under
                admission `always`; the cache is as before.
        """
        return super().step(
            _columns("mask", mask), counted, None if next_use is None else _columns("next_use", next_use)
        )

    def pin(self, columns: ArrayLike) -> None:
        """Replaces the contents by `columns`, in slots 0, 1, ...; history and counters stay.

        Args:
            columns: [m] integers, m <= capacity, ascending, without repeats, in [0, n_columns).

        Raises:
            ConfigError: too many columns, or one out of range or out of order.
        """
        super().pin(_columns("columns", columns))

    def clear(self) -> None:
        """Empties the cache and forgets history and counters."""
        super().clear()

    def reset_counters(self) -> None:
        """Sets hits, misses, evictions and admissions to 0; contents and history stay."""
        super().reset_counters()


def _of_shape(name: str, array: NDArray[Any], n_dimensions: int) -> NDArray[Any]:
    if array.ndim != n_dimensions:
        wanted = ("[n]", "[tokens, n]", "[sequences, tokens, n]")[n_dimensions - 1]
        raise ConfigError(f"{name} has shape {list(array.shape)}: it must be {wanted}")
    return array


def _columns(name: str, values: ArrayLike) -> NDArray[np.int32]:
    """[k] contiguous int32, refusing what the conversion would change."""
    given = _of_shape(name, np.asarray(values), 1)
    if given.size and given.dtype.kind not in "iu":
        raise ConfigError(f"{name} has dtype {given.dtype}: columns are integers; for flags use np.flatnonzero(flags)")
    columns = np.ascontiguousarray(given, dtype=np.int32)
    changed = np.flatnonzero(columns != given)
    if changed.size:
        raise ConfigError(f"{name} holds {given[changed[0]]} at position {changed[0]}: a column index fits in 32 bits")
    return columns


def reference_top_k(scores: ArrayLike, k: int, gamma: float = 1.0, cached: ArrayLike | None = None) -> list[int]:
    """What `top_k` must return, by its definition: a full stable sort. The oracle of the tests; no checks."""
    keys: NDArray[np.float32] = np.abs(np.asarray(scores, dtype=np.float32))
    if gamma != 1.0:
        keys = np.where(np.asarray(cached, dtype=bool), keys, np.float32(gamma) * keys)
    return sorted(int(j) for j in np.argsort(-keys, kind="stable")[:k])


def reference_refine(
    x: ArrayLike,
    norm: ArrayLike,
    order: ArrayLike | None,
    columns_per_unit: int,
    cached: ArrayLike,
    n_fetch: int,
    run_cost: float = 0.0,
) -> tuple[list[np.float32], list[int], list[int], list[int]]:
    """What `refine` must return, by its definition: every choice of units is tried. The oracle of the tests.

    No checks; for a run_cost above 0 only of few units.
    """
    errors: NDArray[np.float32] = np.asarray(x, dtype=np.float32) * np.asarray(norm, dtype=np.float32)
    squares = errors * errors
    if order is not None:
        squares = squares[np.asarray(order)]
    scores = [sum(squares[i : i + columns_per_unit], np.float32(0)) for i in range(0, len(squares), columns_per_unit)]
    held = [bool(c) for c in np.asarray(cached)]
    absent = sorted((u for u in range(len(scores)) if not held[u]), key=lambda u: (-scores[u], u))
    read = fetched = sorted(absent[:n_fetch])
    least = float(min((scores[u] for u in fetched), default=np.float32(np.inf)))
    if run_cost > 0 and 0 < n_fetch < len(absent):
        gains = np.where(held, 0.0, np.array(scores, dtype=np.float64))
        choices = np.array([[c >> u & 1 for u in range(len(scores))] for c in range(2 ** len(scores))])
        starts = np.diff(choices, axis=1, prepend=0) == 1
        cost, gain = choices.sum(1) + run_cost * starts.sum(1), choices @ gains
        low, high = least / (1 + run_cost) / 64, least / (1 + run_cost) * 64
        for _ in range(12):
            price = math.sqrt(low * high)
            best = int(np.argmax(gain - price * cost))
            low, high = (low, price) if cost[best] <= n_fetch * (1 + run_cost) else (price, high)
            if high == price and gain[best] >= sum(gains[fetched]):
                read, least = np.flatnonzero(choices[best]).tolist(), price * (1 + run_cost)
        fetched = [u for u in read if not held[u]]
    demanded = [u for u in range(len(scores)) if fetched and (held[u] or u in fetched) and scores[u] >= least]
    return scores, read, fetched, demanded


# Belady's values are minus the next use: the nearer, the better. Worse than any: it never comes; nobody has told it.
_NEVER, _UNTOLD = -(2**40), -(2**41)


class ReferenceCache:
    """What `ColumnCache` must do, by its definition, in plain Python. The oracle of the tests; no checks."""

    def __init__(
        self, n_columns: int, capacity: int, policy: str, decay: float = 0.99, admission: str = "best"
    ) -> None:
        self.capacity, self.policy, self.decay = capacity, policy, np.float32(decay)
        self.admission = admission
        self.last_use = [0] * n_columns
        self.slots: dict[int, int] = {}  # column -> slot
        self.value: NDArray[Any] = np.zeros(n_columns, dtype=np.float32 if policy == "lfu-decay" else np.int64)
        if policy == "belady":
            self.value[:] = _UNTOLD
        self.token = self.hits = self.misses = self.evictions = self.admissions = 0

    def step(
        self, mask: list[int], counted: bool = True, next_use: list[int] | None = None
    ) -> tuple[int, list[int], list[tuple[int, int, int]]]:
        """(hits, misses, admissions as (column, slot, evicted or -1)) of one token."""
        misses = [j for j in mask if j not in self.slots]
        self._use(mask, next_use or [])
        if self.policy == "static" or self.capacity == 0:
            admissions = []
        elif self.admission == "always":
            admissions = self._admit_always(misses)
        else:
            admissions = self._admit(misses)
        if counted:
            self.hits += len(mask) - len(misses)
            self.misses += len(misses)
            self.admissions += len(admissions)
            self.evictions += sum(evicted >= 0 for _, _, evicted in admissions)
        return len(mask) - len(misses), misses, admissions

    def _use(self, mask: list[int], next_use: list[int]) -> None:
        self.token += 1
        for j in mask:
            self.last_use[j] = self.token
        if self.policy == "belady":
            for j, token in zip(mask, next_use, strict=True):
                self.value[j] = -token if token >= 0 else _NEVER
            return
        if self.policy == "lfu-decay":
            self.value *= self.decay
            self.value[self.value < np.float32(2.0**-100)] = 0
        for j in mask:
            self.value[j] = self.token if self.policy == "lru" else self.value[j] + 1

    def _admit_always(self, misses: list[int]) -> list[tuple[int, int, int]]:
        if not misses:
            return []
        if len(self.slots) < self.capacity:
            self.slots[misses[0]] = len(self.slots)
            return [(misses[0], self.slots[misses[0]], -1)]
        evicted = min(self.slots, key=lambda j: (self.value[j], self.last_use[j]))
        if self.policy != "lru":
            self.value[evicted] = 0
        self.slots[misses[0]] = self.slots.pop(evicted)
        return [(misses[0], self.slots[misses[0]], evicted)]

    def _admit(self, misses: list[int]) -> list[tuple[int, int, int]]:
        best = sorted([*self.slots, *misses], key=lambda j: (-self.value[j], j not in self.slots, j))[: self.capacity]
        leaving = {self.slots[j]: j for j in self.slots if j not in best}
        free = sorted(set(range(self.capacity)) - set(self.slots.values()))
        entering = sorted(j for j in best if j not in self.slots)
        rows = [(j, slot, leaving.get(slot, -1)) for j, slot in zip(entering, free + sorted(leaving), strict=False)]
        for j, slot, evicted in rows:
            self.slots.pop(evicted, None)
            self.slots[j] = slot
        return rows

    def pin(self, columns: list[int]) -> None:
        """Replaces the contents."""
        self.slots = {j: slot for slot, j in enumerate(columns)}
