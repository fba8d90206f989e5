"""Expected reads against random ones counted, and budgets of reads shared out."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dipper import _core
from dipper.cache import refine
from dipper.device import Flash
from dipper.errors import ConfigError
from dipper.reads import PAGE, IoBudget, Reads, fetched_reads, run_cost, streamed_reads

FLASH = Flash(gbps=1.0, cost_per_read_us=10.0, latency_us=100.0, queue_depth=64, alignment=4096)


def region(unit_bytes, n_units, kind="input", base=None):
    return {"kind": kind, "unit_bytes": unit_bytes, "bytes": unit_bytes * n_units, "offset": 0, "base": base}


def counted(made, units):
    """Runs of pages that the units lie on."""
    touched = np.zeros(-(-made["bytes"] // PAGE), bool)
    for u in units:
        touched[u * made["unit_bytes"] // PAGE : ((u + 1) * made["unit_bytes"] - 1) // PAGE + 1] = True
    return int(np.diff(touched, prepend=False, append=False).sum()) // 2, int(touched.sum()) * PAGE


@pytest.mark.parametrize("unit_bytes", [400, 2048, 4096, 4480, 5000, 9000])
@pytest.mark.parametrize("share", [0.01, 0.2, 0.7])
def test_expected_are_the_mean_of_random_ones(unit_bytes, share):
    made, rng = region(unit_bytes, 600), np.random.default_rng(0)
    n = int(share * 600)
    found = np.mean([counted(made, rng.choice(600, n, replace=False)) for _ in range(300)], axis=0)
    expected = fetched_reads(made, n)
    assert expected.bytes == pytest.approx(found[1], rel=0.02)
    assert expected.n == pytest.approx(found[0], rel=0.03)


def test_none_and_all():
    made = region(4480, 1000)
    assert fetched_reads(made, 0) == Reads()
    pages = -(-4480 * 1000 // PAGE)
    assert fetched_reads(made, 1000) == Reads(pages * PAGE / (256 << 10), pages * PAGE)  # cut at 256 KiB
    assert fetched_reads(made, 2000) == fetched_reads(made, 1000)


def test_streamed_whole():
    assert streamed_reads(region(4096, 600)) == Reads(3, 600 * 4096)
    split = region(4480, 100, base={"offset": 450560, "bytes": 5000})
    assert streamed_reads(split) == Reads(2, 458752)


@pytest.mark.parametrize(
    ("text", "limit", "by_time"),
    [("20ms", 0.02, True), ("0.5 s", 0.5, True), ("80MB", 8e7, False), ("1MiB", 2**20, False)],
)
def test_what_a_budget_may_be(text, limit, by_time):
    assert IoBudget.is_time(text) is by_time
    assert IoBudget.parse(text, FLASH).limit == pytest.approx(limit)


@pytest.mark.parametrize("text", ["20", "20us", "50%", "ms", "-3MB", "1e3MB", ""])
def test_what_a_budget_may_not_be(text):
    with pytest.raises(ConfigError) as error:
        IoBudget.parse(text, FLASH)
    assert str(error.value) == (
        f"io budget '{text}' is neither a time nor an amount: write 20ms or 80MB, what a token reads"
    )


def test_a_budget_of_nothing():
    with pytest.raises(ConfigError, match=r"^io budget '0ms' is nothing: give more than zero, or --fetch 0$"):
        IoBudget.is_time("0ms")


@pytest.mark.parametrize("text", ["1MB", "3ms"])
def test_the_same_share_of_every_region_and_no_more_than_the_budget(text):
    budget = IoBudget.parse(text, FLASH)
    regions = [region(4480, 300), region(4096, 500, "glu"), region(4480, 200), region(8192, 100, "glu")]
    fetch = budget.share_out(regions, budget.limit)
    shares = [m / (r["bytes"] // r["unit_bytes"]) for m, r in zip(fetch, regions, strict=True)]
    assert min(shares) > 0.05
    assert max(shares) - min(shares) < 1 / 100
    assert 0.95 * budget.limit < budget.cost(regions, fetch) <= budget.limit
    assert budget.share_out(regions, 1e9) == [300, 500, 200, 100]
    assert budget.share_out(regions, 0.0) == [0, 0, 0, 0]


def test_small_glu_units_are_left_out():
    budget = IoBudget.parse("400KB", None)
    fetch = budget.share_out([region(4480, 300), region(2048, 500, "glu")], budget.limit)
    assert fetch[0] > 30
    assert fetch[1] == 0


def test_time_is_a_batch_a_region():
    budget = IoBudget.parse("8ms", FLASH)
    made = region(4480, 300)
    reads = fetched_reads(made, 50)
    assert budget.cost([made, made], [50, 50]) == pytest.approx(2 * float(FLASH.batch_s(reads.n, reads.bytes)))
    assert budget.cost([made], [0]) == 0
    assert budget.told(0.00123) == "1.3ms"
    assert IoBudget.parse("1MB", None).told(1_230_001) == "1.3MB"


@pytest.mark.parametrize("unit_bytes", [400, 4096, 4480, 9000])
def test_runs_cost_no_more_than_as_many_single_reads(unit_bytes):
    made = region(unit_bytes, 600)
    cost = run_cost(made["unit_bytes"], 12500)
    assert cost == (12500 + 4096 - math.gcd(unit_bytes, 4096)) / unit_bytes
    assert run_cost(made["unit_bytes"], None) == 0
    single, runs = fetched_reads(made, 100), fetched_reads(made, 100, 0, cost)
    assert runs.n < single.n  # fewer reads, of more units each
    assert 12500 * runs.n + runs.bytes <= 100 * (12500 + unit_bytes + 2 * PAGE)
    assert fetched_reads(made, 100, 550, cost) == fetched_reads(made, 50)  # all that are not cached
    assert fetched_reads(made, 0, 0, cost) == Reads()


@given(
    unit_bytes=st.integers(1, 200).map(lambda n: 64 * n),
    n_units=st.integers(1, 200),
    read_cost=st.one_of(st.integers(0, 9000), st.just(10**6)),
    seed=st.integers(0, 2**32 - 1),
)
def test_no_runs_take_more_than_the_staging_that_is_planned(unit_bytes, n_units, read_cost, seed):
    made, rng = region(unit_bytes, n_units), np.random.default_rng(seed)
    cost = float(np.float32(run_cost(made["unit_bytes"], read_cost)))
    n_fetch, cached = int(rng.integers(0, n_units + 1)), rng.random(n_units) < rng.random()
    read = refine(rng.standard_normal(n_units), np.ones(n_units), None, 1, cached, n_fetch, cost).read
    assert counted(made, read.astype(int))[1] <= _core.max_run_bytes(n_fetch, cost, unit_bytes, made["bytes"])
