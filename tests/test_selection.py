"""Masks: native against the definition, ties, bounds and error texts."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dipper.cache import (
    ColumnCache,
    ReferenceCache,
    n_selected,
    reference_refine,
    reference_top_k,
    refine,
    scan,
    scan_many,
    top_k,
)
from dipper.errors import ConfigError

GAMMAS = [1.0, 0.5, 0.2, 0.1, 1e-30]


def to_bf16(scores: np.ndarray) -> np.ndarray:
    """Cut to bf16, so that many scores tie."""
    return (scores.astype(np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32)


finite_or_inf = st.floats(width=32, allow_nan=False, allow_infinity=True)
few_values = st.sampled_from([0.0, -0.0, 0.5, -0.5, 1.0, 1.0078125, 1e-45, math.inf, -math.inf])


@given(
    scores=hnp.arrays(np.float32, st.integers(1, 150), elements=st.one_of(finite_or_inf, few_values)),
    gamma=st.sampled_from(GAMMAS),
    data=st.data(),
)
def test_equals_the_definition(scores: np.ndarray, gamma: float, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(scores)))
    cached = data.draw(hnp.arrays(np.bool_, len(scores)))
    mask = top_k(scores, k, gamma, cached)
    assert mask.dtype == np.int32
    assert mask.tolist() == reference_top_k(scores, k, gamma, cached)


@pytest.mark.parametrize("n", [1, 2, 63, 64, 65, 576, 1536, 4864])
@pytest.mark.parametrize("gamma", [1.0, 0.3])
@pytest.mark.parametrize("rounded", [False, True])
def test_equals_the_definition_at_model_sizes(n: int, gamma: float, rounded: bool) -> None:
    rng = np.random.default_rng(n)
    scores = rng.standard_normal(n).astype(np.float32) * np.exp(rng.standard_normal(n).astype(np.float32))
    scores = to_bf16(scores) if rounded else scores
    cached = rng.random(n) < 0.5
    for k in sorted({1, 2, n // 10, n // 2, n - 1, n} & set(range(1, n + 1))):
        assert top_k(scores, k, gamma, cached).tolist() == reference_top_k(scores, k, gamma, cached)


def test_ties_go_to_the_lower_column() -> None:
    assert top_k([1, 2, 1, 2, 1], 3).tolist() == [0, 1, 3]
    assert top_k([-1, 1, -1, 1], 2).tolist() == [0, 1]
    assert top_k([0.0, -0.0, 0.0], 2).tolist() == [0, 1]


def test_the_product_with_gamma_is_rounded_to_fp32() -> None:
    # 0.1f * 3 rounds to the fp32 number 0.3f + 1 ulp; in fp64 the product would lie between the two scores.
    product = np.float32(0.1) * np.float32(3)
    assert float(np.float32(0.1)) * 3 < float(product)
    assert top_k([product, 3.0], 1, 0.1, [True, False]).tolist() == [0]
    assert top_k([3.0, product], 1, 0.1, [False, True]).tolist() == [0]


def test_scores_are_compared_in_fp32() -> None:
    assert top_k(np.array([1.0, 1.0 + 1e-12]), 1).tolist() == [0]


def test_cached_columns_win_at_small_gamma() -> None:
    assert top_k([9, 1, 8, 2], 2, 0.01, [False, True, False, True]).tolist() == [1, 3]
    assert top_k([9, 1, 8, 2], 2, 1.0, [False, True, False, True]).tolist() == [0, 2]


def test_infinite_scores_rank() -> None:
    assert top_k([1.0, -math.inf, 5.0, math.inf], 2, 0.5, [True, False, True, False]).tolist() == [1, 3]


@pytest.mark.parametrize(
    ("density", "n", "k"),
    [(0.5, 576, 288), (0.5, 3, 2), (0.5, 1, 1), (0.7, 896, 627), (1e-6, 4864, 1), (1.0, 4864, 4864), (0.999, 5, 5)],
)
def test_n_selected(density: float, n: int, k: int) -> None:
    assert n_selected(density, n) == k


@given(density=st.floats(0, 1, exclude_min=True), n=st.integers(1, 20000))
def test_n_selected_is_its_formula_within_bounds(density: float, n: int) -> None:
    assert n_selected(density, n) == min(n, max(1, math.floor(density * n + 0.5)))


@pytest.mark.parametrize("density", [0.0, -0.5, 1.5, math.nan, math.inf])
def test_n_selected_refuses_what_is_no_share(density: float) -> None:
    with pytest.raises(ConfigError, match=r"density is .*: it is the share of columns used, above 0 and at most 1"):
        n_selected(density, 100)


def test_n_selected_refuses_an_empty_region() -> None:
    with pytest.raises(ConfigError, match=r"a region of 0 columns has no mask"):
        n_selected(0.5, 0)


@pytest.mark.parametrize("k", [-1, 0, 4, 1000])
def test_k_out_of_bounds(k: int) -> None:
    text = rf"k is {k} for 3 columns: a mask holds between 1 and all of them"
    with pytest.raises(ConfigError, match=text):
        top_k([1, 2, 3], k)
    with pytest.raises(ConfigError, match=text):
        scan([[1, 2, 3]], k)


@pytest.mark.parametrize("column", [0, 17, 99])
@pytest.mark.parametrize("nan", [math.nan, -math.nan])
def test_nan_names_its_column(column: int, nan: float) -> None:
    scores = np.ones(100, dtype=np.float32)
    scores[column] = nan
    scores[99] = nan
    for gamma in (1.0, 0.5):
        with pytest.raises(ConfigError, match=rf"score of column {column} is NaN: it has no rank"):
            top_k(scores, 10, gamma, np.ones(100, dtype=bool))


def test_nan_in_a_scan_names_its_token_and_leaves_the_cache_before_it() -> None:
    scores = np.random.default_rng(0).random((8, 20), dtype=np.float32)
    cache, before = ColumnCache(20, 5, "lfu"), ColumnCache(20, 5, "lfu")
    scan(scores[:6], 7, 0.5, before)
    scores[6, 3] = math.nan
    with pytest.raises(ConfigError, match=r"score of column 3 at token 6 is NaN"):
        scan(scores, 7, 0.5, cache)
    assert (cache.hits, cache.misses) == (before.hits, before.misses)
    assert np.array_equal(cache.slots, before.slots)


@pytest.mark.parametrize("gamma", [0.0, -0.5, 1.5, math.nan])
def test_gamma_out_of_range(gamma: float) -> None:
    with pytest.raises(ConfigError, match=r"gamma is .*lies in \(0, 1\]; 1 ignores the cache"):
        top_k([1, 2], 1, gamma, [True, False])


def test_gamma_needs_a_cache() -> None:
    with pytest.raises(ConfigError, match=r"gamma is 0\.5\d* but no cache is given"):
        top_k([1, 2], 1, 0.5)
    with pytest.raises(ConfigError, match=r"gamma is 0\.5\d* but no cache is given"):
        scan([[1, 2]], 1, 0.5)


def test_shapes() -> None:
    with pytest.raises(ConfigError, match=r"scores has shape \[1, 2\]: it must be \[n\]"):
        top_k([[1, 2]], 1)
    with pytest.raises(ConfigError, match=r"scores has shape \[2\]: it must be \[tokens, n\]"):
        scan([1, 2], 1)
    with pytest.raises(ConfigError, match=r"cached has 3 flags for 2 scores: give one flag a column"):
        top_k([1, 2], 1, 0.5, [True, False, True])
    with pytest.raises(
        ConfigError, match=r"scores have 3 columns but the cache has 4: use the cache of the same region"
    ):
        scan([[1, 2, 3]], 1, 1.0, ColumnCache(4, 2, "lru"))


def test_strided_and_double_scores_are_converted() -> None:
    scores = np.random.default_rng(1).standard_normal((50, 2))
    assert top_k(scores[:, 1], 20).tolist() == reference_top_k(scores[:, 1], 20)


def test_scan_of_no_tokens() -> None:
    masks, hits = scan(np.empty((0, 8)), 3)
    assert masks.shape == (0, 3)
    assert hits.shape == (0,)


# --- several sequences at once


@given(
    scores=hnp.arrays(np.float32, st.tuples(*[st.integers(1, 6)] * 3), elements=st.one_of(finite_or_inf, few_values)),
    gamma=st.sampled_from(GAMMAS),
    policy=st.sampled_from(["lru", "lfu", "lfu-decay"]),
    n_threads=st.integers(1, 3),
    data=st.data(),
)
def test_many_scans_equal_the_definition(
    scores: np.ndarray, gamma: float, policy: str, n_threads: int, data: st.DataObject
) -> None:
    n = scores.shape[2]
    k, capacity = data.draw(st.integers(1, n)), data.draw(st.integers(0, n))
    caches = [ColumnCache(n, capacity, policy) for _ in scores]
    scanned = scan_many(scores, k, gamma, caches, n_threads=n_threads)
    for rows, cache, (sequence_masks, sequence_hits) in zip(scores, caches, scanned, strict=True):
        reference = ReferenceCache(n, capacity, policy)
        for row, mask, n_hits in zip(rows, sequence_masks, sequence_hits, strict=True):
            cached = np.isin(np.arange(n), list(reference.slots))
            assert mask.tolist() == reference_top_k(row, k, gamma, cached)
            assert n_hits == reference.step(mask.tolist())[0]
        assert (cache.hits, cache.misses, cache.evictions) == (reference.hits, reference.misses, reference.evictions)
    ragged = [rows[: len(rows) - i % 2] for i, rows in enumerate(scores)]
    for (masks, _), rows in zip(scan_many(ragged, k), ragged, strict=True):
        assert masks.tolist() == scan(rows, k)[0].tolist()


def test_many_scans_refuse_what_cannot_be() -> None:
    scores, cache = np.ones((2, 3, 4), np.float32), ColumnCache(4, 2, "lfu")
    for caches in ([cache], [cache, cache]):
        with pytest.raises(ConfigError, match=r"caches for 2 sequences: give each sequence a cache of its own"):
            scan_many(scores, 2, 0.5, caches)
    with pytest.raises(ConfigError, match=r"sequence 0: scores has shape \[4\]: it must be \[tokens, n\]"):
        scan_many(scores[0], 2)
    scores[1, 2, 3] = math.nan
    with pytest.raises(ConfigError, match=r"sequence 1: score of column 3 at token 2 is NaN"):
        scan_many(scores, 2)
    assert scan_many(scores[:0], 2) == []


# --- which residuals a token fetches


def equals_reference(*given_args) -> bool:
    scores, *units = refine(*given_args)
    assert [scores.dtype, *(u.dtype for u in units)] == [np.float32, np.int32, np.int32, np.int32]
    with np.errstate(over="ignore"):
        expected_scores, *expected_units = reference_refine(*given_args)
    assert np.array_equal(scores.view(np.int32), np.array(expected_scores, np.float32).view(np.int32))
    return [u.tolist() for u in units] == expected_units


@given(
    x=hnp.arrays(np.float32, st.integers(1, 120), elements=st.one_of(finite_or_inf, few_values)),
    columns_per_unit=st.integers(1, 40),
    ordered=st.booleans(),
    data=st.data(),
)
def test_refinement_equals_the_definition(x: np.ndarray, columns_per_unit: int, ordered: bool, data) -> None:
    n_units = -(-len(x) // columns_per_unit)
    norms = st.sampled_from([1e-20, 0.25, 0.5, 1.0, 1.7, 3e10])  # positive, for an infinite input's sake
    norm = data.draw(hnp.arrays(np.float32, len(x), elements=norms))
    order = np.array(data.draw(st.permutations(range(len(x))))) if ordered else None
    cached = data.draw(hnp.arrays(np.bool_, n_units))
    n_fetch = data.draw(st.integers(0, n_units + 3))
    assert equals_reference(x, norm, order, columns_per_unit, cached, n_fetch)


@pytest.mark.parametrize(("n", "columns_per_unit"), [(576, 16), (576, 25), (1536, 42), (4864, 11), (4864, 1)])
@pytest.mark.parametrize("held", [0.0, 0.4, 0.99])
def test_refinement_equals_the_definition_at_model_sizes(n: int, columns_per_unit: int, held: float) -> None:
    rng = np.random.default_rng(n + columns_per_unit)
    n_units = -(-n // columns_per_unit)
    x, norm = rng.standard_normal(n).astype(np.float32), rng.random(n).astype(np.float32)
    for n_fetch in (0, 1, n_units // 10, n_units // 2, n_units):
        assert equals_reference(x, norm, rng.permutation(n), columns_per_unit, rng.random(n_units) < held, n_fetch)


@given(
    n_units=st.integers(1, 10), run_cost=st.sampled_from([0.25, 0.875, 2.375, 5.5625]), seed=st.integers(0, 2**32 - 1)
)
def test_runs_equal_the_best_of_all_choices(n_units: int, run_cost: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = np.exp(rng.standard_normal(n_units)).astype(np.float32)  # no ties: a wide range, and no gap as dear as a read
    cached, n_fetch = rng.random(n_units) < 0.3, int(rng.integers(0, n_units + 1))
    assert equals_reference(x, np.ones(n_units), None, 1, cached, n_fetch, run_cost)


def cost_of(read: np.ndarray, run_cost: float) -> float:
    return len(read) + run_cost * int(np.sum(np.diff(read, prepend=-2) > 1))


@given(
    x=hnp.arrays(np.float32, st.integers(1, 400), elements=st.one_of(finite_or_inf, few_values)),
    run_cost=st.floats(0, 50, width=32),
    data=st.data(),
)
def test_runs_gain_no_less_than_single_units_for_no_more(x: np.ndarray, run_cost: float, data) -> None:
    cached = data.draw(hnp.arrays(np.bool_, len(x)))
    n_fetch = data.draw(st.integers(0, len(x)))
    norm = np.ones(len(x))
    single = refine(x, norm, None, 1, cached, n_fetch)
    runs = refine(x, norm, None, 1, cached, n_fetch, run_cost)
    assert runs.fetched.tolist() == [u for u in runs.read if not cached[u]]
    assert not np.any(~cached[np.setdiff1d(runs.demanded, runs.fetched)])
    assert cost_of(runs.read, run_cost) <= n_fetch * (1 + run_cost) * (1 + 1e-12)
    gain = np.minimum(runs.scores, np.finfo(np.float32).max).astype(np.float64)
    assert gain[runs.fetched].sum() >= gain[single.fetched].sum() * (1 - 1e-12)


def test_a_cheap_neighbour_comes_along_and_a_gap_is_read_through() -> None:
    x = np.sqrt([9, 1, 8, 0.1, 0.1, 0.1, 0.1, 4, 0.1, 3], dtype=np.float32)
    cached = np.zeros(10, bool)
    assert refine(x, np.ones(10), None, 1, cached, 2).read.tolist() == [0, 2]
    through = refine(x, np.ones(10), None, 1, cached, 2, 2.0)  # 2 reads of a unit cost 6: one run of three costs 5
    assert through.read.tolist() == through.fetched.tolist() == [0, 1, 2]
    cached[1] = True
    over = refine(x, np.ones(10), None, 1, cached, 2, 2.0)
    assert (over.read.tolist(), over.fetched.tolist()) == ([0, 1, 2], [0, 2])  # what is cached is read past
    assert 1 not in over.demanded


def test_refinement_adds_in_fp32_in_the_order_of_the_unit() -> None:
    x = np.array([2.0**12, 1, 1, 1], np.float32)  # 2^24 + 1 is 2^24 in fp32
    first, last = [0, 1, 2, 3], [3, 2, 1, 0]
    assert refine(x, np.ones(4), first, 4, [False], 1)[0].tolist() == [2.0**24]
    assert refine(x, np.ones(4), last, 4, [False], 1)[0].tolist() == [2.0**24 + 4]  # 2^24 + 3, to even
    assert refine(x, [1, 2, 3, 4], None, 1, [False] * 4, 1)[0].tolist() == [2.0**24, 4, 9, 16]


def test_ties_go_to_the_lower_unit() -> None:
    x = [1, 1, 1, 1, 1, 1, 2]
    scores, _, fetched, demanded = refine(x, np.ones(7), None, 2, [False] * 4, 2)
    assert scores.tolist() == [2, 2, 2, 4]  # the last unit has one column
    assert fetched.tolist() == demanded.tolist() == [0, 3]
    _, _, fetched, demanded = refine(x, np.ones(7), None, 2, [True, False, True, False], 2)
    assert fetched.tolist() == [1, 3]
    assert demanded.tolist() == [0, 1, 2, 3]  # cached ones that are as good as the worst that is fetched
    assert refine(np.zeros(7), np.ones(7), None, 2, [True, False, False, False], 1).fetched.tolist() == [1]


def test_refinement_of_what_little_there_is() -> None:
    x, norm = np.arange(1, 7, dtype=np.float32), np.ones(6)

    def units(cached: list[bool], n_fetch: int) -> tuple[list[int], list[int]]:
        _, _, fetched, demanded = refine(x, norm, None, 2, cached, n_fetch)
        return fetched.tolist(), demanded.tolist()

    assert units([False, True, False], 3) == ([0, 2], [0, 1, 2])  # fewer are absent than may be fetched
    assert units([True, False, True], 1) == ([1], [1, 2])
    assert units([True, True, True], 2) == ([], [])
    assert units([False, True, False], 0) == ([], [])
    scores, _, fetched, demanded = refine([], [], [], 3, [], 2)
    assert len(scores) == len(fetched) == len(demanded) == 0


@pytest.mark.parametrize("column", [0, 5, 9])
@pytest.mark.parametrize("cached", [False, True])
def test_nan_names_its_unit(column: int, cached: bool) -> None:
    x, order = np.ones(10, np.float32), [9, 8, 7, 6, 5, 4, 3, 2, 1, 0]
    x[column] = math.nan
    unit = order.index(column) // 3
    with pytest.raises(ConfigError, match=rf"an input of the columns of unit {unit} is NaN: it has no rank"):
        refine(x, np.ones(10), order, 3, [cached] * 4, 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": [[1, 2]]}, r"x has shape \[1, 2\]: it must be \[n\]"),
        ({"norm": [1, 2]}, r"3 inputs, 2 norms and 3 columns in order: give one of each a column"),
        ({"order": [0, 1]}, r"3 inputs, 3 norms and 2 columns in order"),
        ({"order": [0, 1, 3]}, r"order holds 3 at position 2: it is a permutation of the 3 columns"),
        ({"order": [0, -1, 2]}, r"order holds -1 at position 1"),
        ({"order": [0, 1, 0]}, r"order holds 0 at position 2"),
        ({"order": [0.0, 1.0, 2.0]}, r"order has dtype float64: columns are integers"),
        ({"columns_per_unit": 0}, r"columns_per_unit is 0: a unit has at least 1"),
        ({"columns_per_unit": 1}, r"cached has 2 flags for 3 units: give one flag a unit"),
        ({"n_fetch": -1}, r"n_fetch is -1: at least 0 units are fetched"),
        ({"run_cost": -0.5}, r"run_cost is -0.5\d*: what starting a read costs lies in 0 to 1e6 units"),
        ({"run_cost": math.nan}, r"run_cost is nan"),
    ],
)
def test_refinement_refuses_what_cannot_be(changes: dict, message: str) -> None:
    arguments = {
        "x": [1, 2, 3],
        "norm": [1, 1, 1],
        "order": None,
        "columns_per_unit": 2,
        "cached": [0, 1],
        "n_fetch": 1,
    }
    with pytest.raises(ConfigError, match=message):
        refine(**{**arguments, **changes})
