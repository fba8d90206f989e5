"""Column cache: native against the definition, pinned counts, invariants, error texts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dipper.cache import ColumnCache, ReferenceCache, reference_top_k, scan, top_k
from dipper.errors import ConfigError

POLICIES = ["lru", "lfu", "lfu-decay", "static"]


def pseudo_random(n: int, seed: int) -> list[int]:
    """n integers in [0, 2^16), from a generator that no library can change."""
    values = []
    for _ in range(n):
        seed = (seed * 6364136223846793005 + 1442695040888963407) % 2**64
        values.append(seed >> 48)
    return values


def fixed_scores(n_tokens: int, n: int) -> np.ndarray:
    """Scores [n_tokens, n]: some columns are large more often, and tokens resemble those before them. Exact in fp32."""
    noise = np.array(pseudo_random(n_tokens * n, seed=7), dtype=np.int64).reshape(n_tokens, n)
    popularity = np.array(pseudo_random(n, seed=8), dtype=np.int64) // 2
    rows, state = [], np.zeros(n, dtype=np.int64)
    for row in noise:
        state = state // 2 + row
        rows.append(state + popularity)
    return np.array(rows, dtype=np.float32)


def assert_equal_state(native: ColumnCache, reference: ReferenceCache) -> None:
    assert {j: slot for j, slot in enumerate(native.slots.tolist()) if slot >= 0} == reference.slots
    assert np.array_equal(native.cached, native.slots >= 0)
    assert native.size == len(reference.slots) <= native.capacity
    counters = (native.hits, native.misses, native.evictions, native.admissions)
    assert counters == (reference.hits, reference.misses, reference.evictions, reference.admissions)


@st.composite
def traces(draw: st.DrawFn) -> tuple[int, int, list[list[int]]]:
    n = draw(st.integers(1, 40))
    capacity = draw(st.one_of(st.just(0), st.just(n), st.integers(0, n)))
    masks = draw(st.lists(st.sets(st.integers(0, n - 1)), max_size=30))
    return n, capacity, [sorted(mask) for mask in masks]


@given(trace=traces(), policy=st.sampled_from(POLICIES), decay=st.sampled_from([1.0, 0.99, 0.5, 1e-3]), data=st.data())
def test_equals_the_definition_on_any_masks(
    trace: tuple[int, int, list[list[int]]], policy: str, decay: float, data: st.DataObject
) -> None:
    n, capacity, masks = trace
    native, reference = ColumnCache(n, capacity, policy, decay), ReferenceCache(n, capacity, policy, decay)
    pinned = sorted(data.draw(st.sets(st.integers(0, n - 1), max_size=capacity)))
    native.pin(pinned)
    reference.pin(pinned)
    for mask in masks:
        counted = data.draw(st.booleans())
        n_hits, misses, admissions = reference.step(mask, counted)
        step = native.step(mask, counted)
        assert step.n_hits == n_hits
        assert step.misses.tolist() == misses
        assert [tuple(row) for row in step.admissions.tolist()] == admissions
        assert_equal_state(native, reference)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("gamma", [1.0, 0.5, 0.1])
@pytest.mark.parametrize("capacity", [0, 1, 20, 48, 96])
@pytest.mark.parametrize("bits", [24, 4])
def test_closed_loop_equals_the_definition(policy: str, gamma: float, capacity: int, bits: int) -> None:
    n, k = 96, 32
    scores = fixed_scores(80, n)
    scores = np.floor(scores / 2.0 ** (17 - bits)).astype(np.float32)  # 4 bits: most rows tie at the threshold
    native, reference = ColumnCache(n, capacity, policy, 0.9), ReferenceCache(n, capacity, policy, 0.9)
    pinned = list(range(0, n, 3))[:capacity]
    native.pin(pinned)
    reference.pin(pinned)
    masks, hits = scan(scores, k, gamma, native)
    for row, mask, n_hits in zip(scores, masks.tolist(), hits.tolist(), strict=True):
        cached = [j in reference.slots for j in range(n)]
        assert mask == reference_top_k(row, k, gamma, cached)
        assert n_hits == reference.step(mask)[0]
    assert_equal_state(native, reference)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("gamma", [1.0, 0.4])
def test_scan_is_a_loop_of_top_k_and_step(policy: str, gamma: float) -> None:
    scores = np.random.default_rng(3).standard_normal((60, 200)).astype(np.float32)
    scanned, looped = ColumnCache(200, 70, policy), ColumnCache(200, 70, policy)
    for cache in (scanned, looped):
        cache.pin(np.arange(10, 60))
    warm_masks, _ = scan(scores[:20], 80, gamma, scanned, counted=False)
    masks, hits = scan(scores[20:], 80, gamma, scanned)
    for t, row in enumerate(scores):
        mask = top_k(row, 80, gamma, looped.cached)
        step = looped.step(mask, counted=t >= 20)
        assert mask.tolist() == (warm_masks[t] if t < 20 else masks[t - 20]).tolist()
        if t >= 20:
            assert step.n_hits == hits[t - 20]
    assert np.array_equal(scanned.slots, looped.slots)
    assert (scanned.hits, scanned.misses) == (looped.hits, looped.misses)
    assert scanned.hits == hits.sum() > 0
    assert scanned.hits + scanned.misses == masks.size


def test_masks_at_gamma_1_do_not_depend_on_the_cache() -> None:
    scores = fixed_scores(60, 96)
    alone, no_hits = scan(scores, 32)
    assert not no_hits.any()
    for policy in POLICIES:
        for capacity in (0, 10, 96):
            masks, _ = scan(scores, 32, 1.0, ColumnCache(96, capacity, policy))
            assert np.array_equal(masks, alone)


def test_masks_below_gamma_1_do_depend_on_the_cache() -> None:
    scores = fixed_scores(60, 96)
    masks = [scan(scores, 32, 0.5, ColumnCache(96, capacity, "lfu"))[0] for capacity in (20, 48)]
    assert not np.array_equal(*masks)


# (hits, misses, evictions, admissions) of 200 tokens, 32 of 96 columns each: 6400 selections.
PINNED = {
    ("lru", 1.0, 1): (129, 6271, 70, 71),
    ("lru", 1.0, 24): (2724, 3676, 2052, 2076),
    ("lru", 1.0, 48): (4524, 1876, 1828, 1876),
    ("lru", 0.8, 1): (166, 6234, 33, 34),
    ("lru", 0.8, 24): (3644, 2756, 1132, 1156),
    ("lru", 0.8, 48): (5592, 808, 760, 808),
    ("lfu", 1.0, 1): (115, 6285, 12, 13),
    ("lfu", 1.0, 24): (2342, 4058, 104, 128),
    ("lfu", 1.0, 48): (4182, 2218, 102, 150),
    ("lfu", 0.8, 1): (147, 6253, 2, 3),
    ("lfu", 0.8, 24): (3248, 3152, 22, 46),
    ("lfu", 0.8, 48): (5234, 1166, 18, 66),
    ("lfu-decay", 1.0, 1): (120, 6280, 45, 46),
    ("lfu-decay", 1.0, 24): (2471, 3929, 415, 439),
    ("lfu-decay", 1.0, 48): (4277, 2123, 473, 521),
    ("lfu-decay", 0.8, 1): (173, 6227, 4, 5),
    ("lfu-decay", 0.8, 24): (3375, 3025, 87, 111),
    ("lfu-decay", 0.8, 48): (5398, 1002, 85, 133),
    ("static", 1.0, 1): (110, 6290, 0, 0),
    ("static", 1.0, 24): (1758, 4642, 0, 0),
    ("static", 1.0, 48): (3474, 2926, 0, 0),
    ("static", 0.8, 1): (160, 6240, 0, 0),
    ("static", 0.8, 24): (2768, 3632, 0, 0),
    ("static", 0.8, 48): (4842, 1558, 0, 0),
}


@pytest.mark.parametrize("key", PINNED, ids=str)
def test_pinned_counts(key: tuple[str, float, int]) -> None:
    policy, gamma, capacity = key
    cache = ColumnCache(96, capacity, policy, 0.95)
    cache.pin(range(capacity if policy == "static" else 0))
    scan(fixed_scores(200, 96), 32, gamma, cache)
    assert (cache.hits, cache.misses, cache.evictions, cache.admissions) == PINNED[key]


def test_a_case_worked_by_hand() -> None:
    cache = ColumnCache(6, 2, "lfu")
    rows = lambda step: step.admissions.tolist()  # noqa: E731
    # Counts 1 1 1: of three new columns the two lowest enter, slots ascending.
    assert rows(cache.step([1, 3, 5])) == [[1, 0, -1], [3, 1, -1]]
    # Column 5 counts 2 and replaces the worst of 1, 3 (equal counts: the higher column leaves).
    step = cache.step([5])
    assert (step.n_hits, step.misses.tolist(), rows(step)) == (0, [5], [[5, 1, 3]])
    # Column 0 counts 1 like the cached column 1: cached first, so the miss stays unadmitted.
    step = cache.step([0])
    assert (step.n_hits, step.misses.tolist(), rows(step)) == (0, [0], [])
    # Column 0 counts 2 now; column 1, used in the same token, counts 2 as well and stays.
    step = cache.step([0, 1])
    assert (step.n_hits, step.misses.tolist(), rows(step)) == (1, [0], [])
    assert (cache.hits, cache.misses, cache.evictions, cache.admissions) == (1, 6, 1, 3)


def test_decay_forgets() -> None:
    lfu, decaying = ColumnCache(2, 1, "lfu"), ColumnCache(2, 1, "lfu-decay", 0.5)
    for cache in (lfu, decaying):
        for mask in ([0], [0], [0], [1], [1]):  # counts 3 and 2; decayed 1.75/4 and 1.5
            cache.step(mask)
    assert lfu.slots.tolist() == [0, -1]
    assert decaying.slots.tolist() == [-1, 0]


def test_lru_admits_every_miss_that_fits() -> None:
    cache = ColumnCache(10, 4, "lru")
    cache.step([0, 1, 2, 3])
    cache.step([0])
    assert cache.step([7, 8]).admissions.tolist() == [[7, 2, 2], [8, 3, 3]]
    assert cache.step([4, 5, 6, 9]).admissions.tolist() == [[4, 0, 0], [5, 1, 1], [6, 2, 7], [9, 3, 8]]


def test_a_mask_larger_than_the_cache() -> None:
    cache = ColumnCache(10, 3, "lru")
    assert cache.step(range(10)).admissions.tolist() == [[0, 0, -1], [1, 1, -1], [2, 2, -1]]
    step = cache.step(range(10))
    assert step.n_hits == 3
    assert step.admissions.shape == (0, 3)


def test_uncounted_touches_move_state_but_no_counter() -> None:
    cache = ColumnCache(8, 4, "lfu")
    assert len(cache.step([0, 1], counted=False).admissions) == 2
    assert (cache.hits, cache.misses, cache.evictions, cache.admissions, cache.size) == (0, 0, 0, 0, 2)
    assert cache.step([0, 1]).n_hits == 2


def test_clear_forgets_history_and_reset_counters_does_not() -> None:
    cache, fresh = ColumnCache(12, 3, "lfu-decay"), ColumnCache(12, 3, "lfu-decay")
    for mask in ([1, 2, 3, 4], [4, 5], [4, 9]):
        cache.step(mask)
    slots = cache.slots
    cache.reset_counters()
    assert (cache.hits, cache.misses, cache.evictions, cache.admissions) == (0, 0, 0, 0)
    assert np.array_equal(cache.slots, slots)
    cache.clear()
    assert cache.size == 0
    for mask in ([0, 1, 2], [3, 4], [4, 11]):
        assert cache.step(mask).admissions.tolist() == fresh.step(mask).admissions.tolist()


@given(trace=traces(), policy=st.sampled_from(POLICIES))
@settings(max_examples=50)
def test_invariants(trace: tuple[int, int, list[list[int]]], policy: str) -> None:
    n, capacity, masks = trace
    cache = ColumnCache(n, capacity, policy)
    selected = 0
    for mask in masks:
        before = cache.slots
        step = cache.step(mask)
        after, selected = cache.slots, selected + len(mask)
        entered, left = (before < 0) & (after >= 0), (before >= 0) & (after < 0)
        assert step.n_hits + len(step.misses) == len(mask)
        assert cache.hits + cache.misses == selected
        assert set(np.flatnonzero(entered)) <= set(step.misses.tolist()) <= set(mask)
        assert np.flatnonzero(entered).tolist() == step.admissions[:, 0].tolist()
        assert sorted(e for e in step.admissions[:, 2].tolist() if e >= 0) == np.flatnonzero(left).tolist()
        stayed = (before >= 0) & (after >= 0)
        assert np.array_equal(before[stayed], after[stayed])  # a slot is never moved
        assert sorted(after[after >= 0].tolist()) == list(range(cache.size))
        assert left.sum() == 0 or cache.size == capacity
    assert cache.admissions - cache.evictions == cache.size <= capacity


def test_a_cache_of_all_columns_misses_each_once() -> None:
    for policy in ("lru", "lfu", "lfu-decay"):
        cache = ColumnCache(96, 96, policy)
        masks, _ = scan(fixed_scores(50, 96), 32, 1.0, cache)
        assert cache.misses == cache.admissions == len(np.unique(masks))
        assert cache.evictions == 0


def one_access_trace() -> list[int]:
    """2000 single accesses to 60 columns, small ones more often."""
    return [a * b * 60 // 2**32 for a, b in zip(pseudo_random(2000, 1), pseudo_random(2000, 2), strict=True)]


ONE_ACCESS_LRU_HITS = {1: 72, 5: 346, 20: 1108, 40: 1755}


@pytest.mark.parametrize("capacity", ONE_ACCESS_LRU_HITS)
def test_lru_of_single_accesses(capacity: int) -> None:
    cache = ColumnCache(60, capacity, "lru")
    for column in one_access_trace():
        cache.step([column])
    assert cache.hits == ONE_ACCESS_LRU_HITS[capacity]


@pytest.mark.parametrize("capacity", ONE_ACCESS_LRU_HITS)
def test_lru_equals_libcachesim(capacity: int) -> None:
    libcachesim = pytest.importorskip("libcachesim")
    peer, cache = libcachesim.LRU(cache_size=capacity), ColumnCache(60, capacity, "lru")
    for column in one_access_trace():
        request = libcachesim.Request()
        request.obj_id, request.obj_size = column, 1
        assert bool(cache.step([column]).n_hits) == peer.get(request)


@pytest.mark.parametrize(
    ("mask", "text"),
    [
        ([3, 1], r"mask holds column 1 after 3 at position 1: a mask ascends without repeats"),
        ([1, 2, 2], r"mask holds column 2 after 2 at position 2"),
        ([-1, 2], r"mask holds column -1 at position 0, but the region has 8 columns"),
        ([2, 8], r"mask holds column 8 at position 1, but the region has 8 columns"),
        ([2**32 + 1], r"mask holds 4294967297 at position 0: a column index fits in 32 bits"),
        ([1.5], r"mask has dtype float64: columns are integers"),
        (np.ones(8, dtype=bool), r"mask has dtype bool: columns are integers; for flags use np\.flatnonzero"),
        ([[1, 2]], r"mask has shape \[1, 2\]: it must be \[n\]"),
    ],
)
def test_a_bad_mask_is_named_and_changes_nothing(mask: object, text: str) -> None:
    cache = ColumnCache(8, 4, "lru")
    cache.step([1, 5])
    before = cache.slots
    with pytest.raises(ConfigError, match=text):
        cache.step(mask)  # type: ignore[arg-type]
    assert np.array_equal(cache.slots, before)
    assert (cache.hits, cache.misses) == (0, 2)


def test_bad_options() -> None:
    with pytest.raises(ConfigError, match=r"cache policy 'fifo' is unknown: use one of lru, lfu, lfu-decay, static"):
        ColumnCache(8, 4, "fifo")
    with pytest.raises(ConfigError, match=r"cache capacity is 9 for a region of 8 columns"):
        ColumnCache(8, 9, "lru")
    with pytest.raises(ConfigError, match=r"cache capacity is -1 for a region of 8 columns"):
        ColumnCache(8, -1, "lru")
    with pytest.raises(ConfigError, match=r"a cache of a region with 0 columns"):
        ColumnCache(0, 0, "lru")
    for decay in (0.0, -1.0, 1.5, float("nan")):
        with pytest.raises(ConfigError, match=r"cache decay is .* lies in \(0, 1\]"):
            ColumnCache(8, 4, "lfu-decay", decay)


def test_bad_pins() -> None:
    cache = ColumnCache(8, 2, "static")
    cache.pin([3, 4])
    with pytest.raises(ConfigError, match=r"pin of 3 columns into a cache of 2: pin at most the capacity"):
        cache.pin([1, 2, 3])
    with pytest.raises(
        ConfigError, match=r"pinned column 8 at position 1: columns ascend, without repeats, from 0 to 7"
    ):
        cache.pin([1, 8])
    with pytest.raises(ConfigError, match=r"pinned column 0 at position 1"):
        cache.pin([1, 0])
    assert np.flatnonzero(cache.cached).tolist() == [3, 4]
    assert cache.step([0, 3]).admissions.shape == (0, 3)


@pytest.mark.parametrize("policy", ["lru", "lfu", "lfu-decay"])
def test_the_comparison_catches_a_wrong_policy(policy: str) -> None:
    """The oracle tells policies apart: with another policy's reference the counts of this trace differ."""
    scores = fixed_scores(200, 96)
    cache = ColumnCache(96, 24, policy, 0.95)
    masks, _ = scan(scores, 32, 1.0, cache)
    for other in {"lru", "lfu", "lfu-decay"} - {policy}:
        reference = ReferenceCache(96, 24, other, 0.95)
        for mask in masks.tolist():
            reference.step(mask)
        assert (reference.hits, reference.evictions) != (cache.hits, cache.evictions)
