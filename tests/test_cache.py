"""Column cache: native against the definition, pinned counts, invariants, error texts."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dipper.cache import (
    ColumnCache,
    ReferenceCache,
    next_uses,
    reference_refine,
    reference_top_k,
    scan,
    scan_refine,
    top_k,
)
from dipper.errors import ConfigError

POLICIES = ["lru", "lfu", "lfu-decay", "static"]
ALL_POLICIES = [*POLICIES, "belady"]  # belady goes with recorded masks alone


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


def plain_next_uses(masks: list[list[int]]) -> list[list[int]]:
    """By definition: for every column of every mask the first later mask that has it, -1 where there is none."""
    return [
        [next((u for u in range(t + 1, len(masks)) if column in masks[u]), -1) for column in mask]
        for t, mask in enumerate(masks)
    ]


def replayed(cache: ColumnCache, masks: list[list[int]]) -> ColumnCache:
    """The cache after these masks; belady is told the future."""
    future = plain_next_uses(masks) if cache.policy == "belady" else [None] * len(masks)
    for mask, known in zip(masks, future, strict=True):
        cache.step(mask, next_use=known)
    return cache


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


@given(
    trace=traces(), policy=st.sampled_from(ALL_POLICIES), decay=st.sampled_from([1.0, 0.99, 0.5, 1e-3]), data=st.data()
)
def test_equals_the_definition_on_any_masks(
    trace: tuple[int, int, list[list[int]]], policy: str, decay: float, data: st.DataObject
) -> None:
    n, capacity, masks = trace
    native, reference = ColumnCache(n, capacity, policy, decay), ReferenceCache(n, capacity, policy, decay)
    again = data.draw(st.integers(0, len(masks)))  # pinned once more: history stays, whatever it is
    for t, (mask, next_use) in enumerate(zip(masks, plain_next_uses(masks), strict=True)):
        if t in (0, again):
            pinned = sorted(data.draw(st.sets(st.integers(0, n - 1), max_size=capacity)))
            native.pin(pinned)
            reference.pin(pinned)
        counted = data.draw(st.booleans())
        n_hits, misses, admissions = reference.step(mask, counted, next_use)
        step = native.step(mask, counted, next_use if policy == "belady" else None)
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


@given(trace=traces(), policy=st.sampled_from(ALL_POLICIES))
@settings(max_examples=50)
def test_invariants(trace: tuple[int, int, list[list[int]]], policy: str) -> None:
    n, capacity, masks = trace
    cache = ColumnCache(n, capacity, policy)
    selected = 0
    for mask, next_use in zip(masks, plain_next_uses(masks), strict=True):
        before = cache.slots
        step = cache.step(mask, next_use=next_use if policy == "belady" else None)
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
    with pytest.raises(
        ConfigError, match=r"cache policy 'fifo' is unknown: use one of lru, lfu, lfu-decay, static, belady$"
    ):
        ColumnCache(8, 4, "fifo")
    with pytest.raises(ConfigError, match=r"^cache admission 'maybe' is unknown: use best or always$"):
        ColumnCache(8, 4, "lru", admission="maybe")
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


# --- belady


@given(masks=st.integers(0, 6).flatmap(lambda k: st.lists(st.permutations(range(9)).map(lambda p: sorted(p[:k])))))
def test_next_uses_are_the_definitions(masks: list[list[int]]) -> None:
    rows = np.array(masks, np.int32).reshape(len(masks), -1 if masks and masks[0] else 0)
    found = next_uses(rows, 9)
    assert found.shape == rows.shape
    assert found.tolist() == plain_next_uses(masks)


def test_next_uses_of_bad_masks() -> None:
    for masks, text in (
        ([[0, 9]], "a mask holds column 9, but the region has 4 columns: use the masks of the same region"),
        ([[-1, 2]], "a mask holds column -1, but the region has 4 columns: use the masks of the same region"),
        ([0, 1], "masks has shape [2]: it must be [tokens, n]"),
        ([[0.5, 1.0]], "masks has dtype float64: columns are integers; for flags use np.flatnonzero(flags)"),
        ([[0.0, 1.0]], "masks has dtype float64: columns are integers; for flags use np.flatnonzero(flags)"),
        ([[True, False]], "masks has dtype bool: columns are integers; for flags use np.flatnonzero(flags)"),
        ([[0, 2**33]], "masks holds 8589934592 at position 1: a column index fits in 32 bits"),
    ):
        with pytest.raises(ConfigError) as e:
            next_uses(masks, 4)
        assert str(e.value) == text


def test_belady_worked_by_hand() -> None:
    cache = ColumnCache(4, 2, "belady")
    masks = [[0, 1, 2], [2], [3], [0], [2, 3]]
    assert plain_next_uses(masks) == [[3, -1, 1], [4], [4], [-1], [-1, -1]]
    rows = [
        cache.step(mask, next_use=u).admissions.tolist() for mask, u in zip(masks, plain_next_uses(masks), strict=True)
    ]
    # Column 1 never comes again and stays out. At token 2 column 3 comes as late as 2, which is cached, and later than
    # 0: it stays out. At the end no column comes again, so the cached stay.
    assert rows == [[[0, 0, -1], [2, 1, -1]], [], [], [], []]
    assert (cache.hits, cache.misses, cache.evictions, cache.admissions) == (3, 5, 0, 2)
    cache = ColumnCache(3, 1, "belady")
    masks = [
        [0],
        [1],
        [1],
        [0],
        [2],
        [0],
    ]  # at token 1 column 1 comes sooner than 0 and replaces it; and back at token 3
    rows = [
        cache.step(mask, next_use=u).admissions.tolist() for mask, u in zip(masks, plain_next_uses(masks), strict=True)
    ]
    assert rows == [[[0, 0, -1]], [[1, 0, 0]], [], [[0, 0, 1]], [], []]
    assert (cache.hits, cache.misses, cache.evictions, cache.admissions) == (2, 4, 2, 3)


@pytest.mark.parametrize("make", [ColumnCache, ReferenceCache])
def test_belady_lets_go_first_of_what_it_was_told_nothing_about(make: type[ColumnCache | ReferenceCache]) -> None:
    """A pinned column has no next use until a mask has it: it leaves before one that is known never to come again."""
    cache = make(5, 2, "belady")
    cache.pin([3, 4])
    masks = [[0], [1, 4], [1], [4]]
    steps = []
    for mask, next_use in zip(masks, plain_next_uses(masks), strict=True):
        step = cache.step(mask, True, next_use)
        steps.append(step[2] if isinstance(step, tuple) else [tuple(row) for row in step.admissions.tolist()])
    # Column 0 never comes again, and still enters for 4, of which nothing was told (of equals the lower, 3, stays).
    # Then 1 and 4, which do come again, replace both.
    assert steps == [[(0, 1, 4)], [(1, 0, 3), (4, 1, 0)], [], []]


# (hits, misses, evictions, admissions), as PINNED.
PINNED_BELADY = {
    1: (199, 6201, 76, 77),
    24: (4103, 2297, 1278, 1302),
    48: (5449, 951, 708, 756),
}


@pytest.mark.parametrize("capacity", PINNED_BELADY)
def test_pinned_counts_of_belady(capacity: int) -> None:
    masks = scan(fixed_scores(200, 96), 32)[0].tolist()
    cache = replayed(ColumnCache(96, capacity, "belady"), masks)
    assert (cache.hits, cache.misses, cache.evictions, cache.admissions) == PINNED_BELADY[capacity]
    for policy in ("lru", "lfu", "lfu-decay"):
        assert cache.misses < PINNED[policy, 1.0, capacity][1]


@given(trace=traces(), data=st.data())
def test_belady_misses_least_of_all_policies(trace: tuple[int, int, list[list[int]]], data: st.DataObject) -> None:
    n, capacity, masks = trace
    least = replayed(ColumnCache(n, capacity, "belady"), masks).misses
    for policy in ("lru", "lfu", "lfu-decay"):
        assert least <= replayed(ColumnCache(n, capacity, policy, 0.9), masks).misses
    # What a static cache holds was never missed: a policy that admits those columns once misses one more for each.
    static = ColumnCache(n, capacity, "static")
    pinned = data.draw(st.sets(st.integers(0, n - 1), max_size=capacity))
    static.pin(sorted(pinned))
    assert least <= replayed(static, masks).misses + len(pinned & {column for mask in masks for column in mask})


def fewest_misses(capacity: int, masks: list[list[int]]) -> int:
    """Over all that a cache may do: after each token it holds any `capacity` of the columns it held and of the mask."""
    best = {frozenset[int](): 0}
    for mask in masks:
        after: dict[frozenset[int], int] = {}
        for held, misses in best.items():
            total = misses + len(set(mask) - held)
            there = held | set(mask)
            for size in range(min(capacity, len(there)) + 1):
                for kept in combinations(sorted(there), size):
                    after[frozenset(kept)] = min(total, after.get(frozenset(kept), total))
        best = after
    return min(best.values())


@given(
    n=st.integers(1, 5),
    capacity=st.integers(0, 5),
    masks=st.lists(st.sets(st.integers(0, 4)).map(sorted), max_size=7),
)
@settings(max_examples=200, deadline=None)
def test_belady_is_the_optimum(n: int, capacity: int, masks: list[list[int]]) -> None:
    masks, capacity = [[c for c in mask if c < n] for mask in masks], min(n, capacity)
    assert replayed(ColumnCache(n, capacity, "belady"), masks).misses == fewest_misses(capacity, masks)


def test_the_optimum_tells_belady_from_lru() -> None:
    masks = [[0], [1], [2], [0], [1], [2]]
    assert fewest_misses(2, masks) == replayed(ColumnCache(3, 2, "belady"), masks).misses == 4
    assert replayed(ColumnCache(3, 2, "lru"), masks).misses == 6
    scores = fixed_scores(200, 96)
    masks = scan(scores, 32)[0].tolist()
    for policy in ("lru", "lfu", "lfu-decay"):
        cache, reference = replayed(ColumnCache(96, 24, policy), masks), ReferenceCache(96, 24, "belady")
        for mask, next_use in zip(masks, plain_next_uses(masks), strict=True):
            reference.step(mask, True, next_use)
        assert (reference.hits, reference.evictions) != (cache.hits, cache.evictions)


def test_belady_without_next_uses() -> None:
    cache = ColumnCache(8, 4, "belady")
    cache.step([1, 5], next_use=[3, -1])
    before = cache.slots
    told = "it needs each; replay recorded masks, or choose another policy"
    for next_use, n_told in ((None, 0), ([3], 1), ([3, 4, 5], 3)):
        with pytest.raises(ConfigError) as e:
            cache.step([2, 5], next_use=next_use)
        assert str(e.value) == f"belady was told the next use of {n_told} columns for a mask of 2: {told}"
    with pytest.raises(ConfigError) as e:
        scan(fixed_scores(3, 8), 2, 1.0, cache)
    assert str(e.value) == f"belady was told the next use of 0 columns for a mask of 2: {told}"
    with pytest.raises(ConfigError, match=r"^next_use has dtype float64: columns are integers"):
        cache.step([2, 5], next_use=[1.5, 2.0])
    assert np.array_equal(cache.slots, before)
    assert (cache.hits, cache.misses) == (0, 2)


# --- admission always


@given(
    columns=st.lists(st.integers(0, 11), max_size=60),
    capacity=st.integers(0, 12),
    policy=st.sampled_from(["lru", "lfu", "lfu-decay", "belady"]),
    data=st.data(),
)
def test_always_equals_the_definition(columns: list[int], capacity: int, policy: str, data: st.DataObject) -> None:
    native = ColumnCache(12, capacity, policy, 0.9, admission="always")
    reference = ReferenceCache(12, capacity, policy, 0.9, admission="always")
    pinned = sorted(data.draw(st.sets(st.integers(0, 11), max_size=capacity)))
    native.pin(pinned)
    reference.pin(pinned)
    masks = [[column] for column in columns]
    for mask, next_use in zip(masks, plain_next_uses(masks), strict=True):
        counted = data.draw(st.booleans())
        n_hits, misses, admissions = reference.step(mask, counted, next_use)
        step = native.step(mask, counted, next_use if policy == "belady" else None)
        assert (step.n_hits, step.misses.tolist()) == (n_hits, misses)
        assert [tuple(row) for row in step.admissions.tolist()] == admissions
        assert_equal_state(native, reference)
    counters = (native.hits, native.misses, native.evictions, native.admissions)
    assert counters == (reference.hits, reference.misses, reference.evictions, reference.admissions)
    assert native.admissions == native.misses or capacity == 0  # every miss enters


def test_always_worked_by_hand() -> None:
    rows = lambda cache, columns: [cache.step([column]).admissions.tolist() for column in columns]  # noqa: E731
    # lfu: column 2 enters although it was used once, 0 twice; of equals (1 and 2, once each) the older leaves. What
    # left has no count: 1 comes back with one use and leaves before 0 again.
    cache = ColumnCache(4, 2, "lfu", admission="always")
    assert rows(cache, [0, 0, 1, 2, 1, 3]) == [[[0, 0, -1]], [], [[1, 1, -1]], [[2, 1, 1]], [[1, 1, 2]], [[3, 1, 1]]]
    assert (cache.hits, cache.misses, cache.evictions, cache.admissions) == (1, 5, 3, 5)
    # With admission best, counts of all columns matter: 2 and 3 stay out, and so does 1, whose two uses beat none.
    best = ColumnCache(4, 2, "lfu")
    assert rows(best, [0, 0, 1, 2, 1, 3]) == [[[0, 0, -1]], [], [[1, 1, -1]], [], [], []]
    # belady: 0 comes back last, so it leaves, although 2, which enters, never does. Then neither 1 nor 2 comes again.
    cache = ColumnCache(4, 2, "belady", admission="always")
    columns = [[0], [1], [2], [1], [0]]
    steps = [
        cache.step(c, next_use=u).admissions.tolist() for c, u in zip(columns, plain_next_uses(columns), strict=True)
    ]
    assert steps == [[[0, 0, -1]], [[1, 1, -1]], [[2, 0, 0]], [], [[0, 0, 2]]]


def test_always_of_belady_settles_ties_by_age() -> None:
    """Of two columns that never come again the one used longer ago leaves."""
    cache = ColumnCache(4, 2, "belady", admission="always")
    masks = [[0], [1], [0], [2]]
    steps = [cache.step(m, next_use=u).admissions.tolist() for m, u in zip(masks, plain_next_uses(masks), strict=True)]
    assert steps == [[[0, 0, -1]], [[1, 1, -1]], [], [[2, 1, 1]]]


@pytest.mark.parametrize("policy", ["lru", "lfu", "belady"])
def test_always_takes_one_column_a_step(policy: str) -> None:
    cache = ColumnCache(8, 4, policy, admission="always")
    with pytest.raises(ConfigError) as e:
        cache.step([1, 5], next_use=[1, 2])
    assert str(e.value) == "a mask of 2 columns under admission 'always': it takes one column a step"
    assert (cache.hits, cache.misses, cache.size) == (0, 0, 0)
    assert cache.step([], next_use=[]).n_hits == 0


def single_accesses(name: str) -> list[int]:
    """2000 accesses to 60 columns."""
    if name == "skewed":
        return one_access_trace()
    if name == "loop":
        return [t % 60 for t in range(2000)]
    if name == "uniform":
        return [a * 60 >> 16 for a in pseudo_random(2000, 3)]
    assert name == "drifting"
    return [(t // 25 + (a * 12 >> 16)) % 60 for t, a in enumerate(pseudo_random(2000, 4))]


# Misses of lru, lfu, belady with admission always; those of libcachesim 0.3.5.
ALWAYS_MISSES = {
    ("skewed", 1): (1928, 1928, 1928),
    ("skewed", 5): (1654, 1549, 1188),
    ("skewed", 20): (892, 701, 436),
    ("skewed", 40): (245, 192, 116),
    ("skewed", 60): (59, 59, 59),
    ("loop", 5): (2000, 2000, 1868),
    ("loop", 40): (2000, 2000, 713),
    ("uniform", 5): (1829, 1826, 1422),
    ("uniform", 40): (712, 665, 292),
    ("drifting", 5): (1224, 1705, 710),
    ("drifting", 40): (91, 532, 63),
}


@pytest.mark.parametrize("key", ALWAYS_MISSES, ids=str)
def test_always_of_single_accesses(key: tuple[str, int]) -> None:
    name, capacity = key
    masks = [[column] for column in single_accesses(name)]
    caches = [ColumnCache(60, capacity, policy, admission="always") for policy in ("lru", "lfu", "belady")]
    assert tuple(replayed(cache, masks).misses for cache in caches) == ALWAYS_MISSES[key]


@pytest.mark.parametrize("policy", ["lru", "lfu", "belady"])
@pytest.mark.parametrize("key", ALWAYS_MISSES, ids=str)
def test_always_equals_libcachesim(key: tuple[str, int], policy: str) -> None:
    """Access by access. Its LFU lets the least recently used of equals leave; its Belady is told the next access."""
    libcachesim = pytest.importorskip("libcachesim")
    name, capacity = key
    peer = {"lru": libcachesim.LRU, "lfu": libcachesim.LFU, "belady": libcachesim.Belady}[policy]
    peer = peer(cache_size=capacity, hashpower=10)
    cache = ColumnCache(60, capacity, policy, admission="always")
    masks = [[column] for column in single_accesses(name)]
    for mask, next_use in zip(masks, plain_next_uses(masks), strict=True):
        request = libcachesim.Request()
        request.obj_id, request.obj_size = mask[0], 1
        request.next_access_vtime = next_use[0] if next_use[0] >= 0 else 2**63 - 1
        assert bool(cache.step(mask, next_use=next_use if policy == "belady" else None).n_hits) == peer.get(request)


def test_the_comparison_with_libcachesim_catches_the_other_admission() -> None:
    masks = [[column] for column in one_access_trace()]
    misses = {(p, c): replayed(ColumnCache(60, c, p), masks).misses for p in ("lru", "lfu", "belady") for c in (5, 20)}
    assert misses == {
        ("lru", 5): 1654,  # every miss is the latest: lru admits it either way
        ("lru", 20): 892,
        ("lfu", 5): 1474,
        ("lfu", 20): 638,
        ("belady", 5): 1132,
        ("belady", 20): 422,
    }


# --- the closed loop of planes


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 40),
    per_unit=st.integers(1, 7),
    policy=st.sampled_from(POLICIES),
    shares=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    ordered=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_closed_loop_of_planes_equals_the_definition(n, per_unit, policy, shares, ordered, seed):
    rng = np.random.default_rng(seed)
    n_units = -(-n // per_unit)
    capacity, n_fetch = (int(share * n_units) for share in shares)
    x, norm = rng.standard_normal((9, n)).astype(np.float32), rng.random(n).astype(np.float32)
    order = rng.permutation(n) if ordered else None
    cache, reference = ColumnCache(n_units, capacity, policy), ReferenceCache(n_units, capacity, policy)
    for either in (cache, reference):
        either.pin(list(range(capacity)))
    done = scan_refine(x, norm, order, per_unit, cache, n_fetch)
    for t, row in enumerate(x):
        held = [unit in reference.slots for unit in range(n_units)]
        _, _, fetched, demanded = reference_refine(row, norm, order, per_unit, held, n_fetch)
        hits, _, _ = reference.step(demanded)
        assert done.cached[t].tolist() == held
        assert np.flatnonzero(done.fetched[t]).tolist() == fetched
        assert (done.demanded[t], done.hits[t]) == (len(demanded), hits)
    assert_equal_state(cache, reference)


def test_the_loop_of_planes_can_be_stepped_otherwise_and_names_its_token():
    cache = ColumnCache(4, 2, "lru")
    told = []
    x = np.array([[1, 2, 3, 4], [4, 3, 2, 1]], np.float32)
    scan_refine(x, np.ones(4), None, 1, cache, 1, step=lambda units: told.append(units.demanded.tolist()))
    assert (told, cache.size, cache.misses) == ([[3], [0]], 0, 0)
    scan_refine(x, np.ones(4), None, 1, cache, 1, counted=False)
    assert (cache.size, cache.misses) == (2, 0)
    x[1, 2] = np.nan
    with pytest.raises(ConfigError, match=r"^token 1: an input of the columns of unit 2 is NaN"):
        scan_refine(x, np.ones(4), None, 1, cache, 1)
