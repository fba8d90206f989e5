"""This machine as a profile: fits, where batches read, what is measured of a reader, and one real measurement."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import tiny
from dipper import probe, profile
from dipper.bundle import Bundle, pack
from dipper.device import Compute, Device, Flash
from dipper.errors import BundleError, ConfigError
from dipper.profile import MAX_BATCH_BYTES, READS, REQUEST_BYTES, SUSTAINED_S, measure_profile

FILE_BYTES = 96 << 20


class Clock:
    def __init__(self) -> None:
        self.now = 100.0
        self.slept: list[float] = []

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


class FakeReader:
    """A disk of 50 us a batch, 2 us a read and 1 GB/s; in the long run `limit` reads a second at most."""

    def __init__(self, clock: Clock, *, direct: bool = True, file_bytes: int = FILE_BYTES, burst: int = 0) -> None:
        self.clock, self.direct, self.file_bytes = clock, direct, file_bytes
        self.direct_note = "" if direct else "the file lies in memory"
        self.burst = burst  # reads that go ten times as fast, before the rest
        self.batches: list[tuple[np.ndarray, int]] = []

    def seconds(self, n: int, size: int) -> float:
        return 50e-6 + n * 2e-6 + n * size / 1e9

    def read_batch(self, offsets: Any, size: int) -> float:
        self.batches.append((np.asarray(offsets), size))
        seconds = self.seconds(len(offsets), size) * (0.1 if self.burst > 0 else 1.0)
        self.burst -= len(offsets)
        self.clock.now += seconds
        return seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(probe, "_now", made.perf_counter)
    monkeypatch.setattr(
        profile, "time", SimpleNamespace(perf_counter=made.perf_counter, sleep=made.sleep, strftime=None, gmtime=None)
    )
    return made


# ------------------------------------------------------------------------------------------------ the fit


def test_a_line_is_found_exactly() -> None:
    x = [1e6, 3e6, 1e7]
    assert profile._line(x, [2e-4 + 5e-11 * v for v in x]) == (pytest.approx(2e-4), pytest.approx(5e-11))
    assert profile._line(x, [5e-11 * v for v in x]) == (pytest.approx(0.0, abs=1e-12), pytest.approx(5e-11))


def test_an_intercept_is_not_below_zero() -> None:
    x = [1.0, 2.0, 4.0]
    y = [1.0, 3.0, 7.0]  # 2 x - 1
    intercept, slope = profile._line(x, y)
    assert intercept == 0.0
    # Least squares of the relative error through the origin: sum (s x / y - 1)^2 is least.
    ratio = np.array(x) / np.array(y)
    assert slope == pytest.approx(ratio.sum() / (ratio**2).sum())
    error = [((s * ratio - 1) ** 2).sum() for s in (0.99 * slope, slope, 1.01 * slope)]
    assert error[1] == min(error)


def test_the_error_of_a_line_is_relative() -> None:
    """Ten per cent off at a small time counts as ten per cent off at a large one."""
    x = [1.0, 10.0, 100.0]
    y = [1.1, 10.0, 110.0]
    intercept, slope = profile._line(x, y)

    def error(a: float, b: float) -> float:
        return sum(((a + b * u) / v - 1) ** 2 for u, v in zip(x, y, strict=True))

    for a, b in ((1e-3, 0), (-1e-3, 0), (0, 1e-3), (0, -1e-3)):
        assert error(intercept, slope) <= error(intercept + a, slope + b)


# ------------------------------------------------------------------------------------------------ where is read


@pytest.mark.parametrize(("n", "size"), [(n, s) for n in READS for s in REQUEST_BYTES if n * s <= MAX_BATCH_BYTES])
def test_offsets_ascend_with_gaps_inside_the_file(n: int, size: int) -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        offsets = profile._spread_offsets(FILE_BYTES, n, size, rng).astype(np.int64)
        assert offsets.shape == (n,)
        assert (offsets % size == 0).all()
        assert offsets.min() >= 0
        assert offsets.max() + size <= FILE_BYTES
        gaps = np.diff(offsets) // size
        assert ((gaps >= 1) & (gaps <= 3)).all()
    starts = {int(profile._spread_offsets(FILE_BYTES, n, size, rng)[0]) for _ in range(20)}
    assert len(starts) > 1  # somewhere, not always at the same place


def test_offsets_of_a_file_that_is_just_large_enough() -> None:
    rng = np.random.default_rng(0)
    for n in (1, 5, 8):
        offsets = profile._spread_offsets(8 * 4096 + 100, n, 4096, rng).tolist()
        assert len(set(offsets)) == n  # without gaps where those would not fit
        assert max(offsets) + 4096 <= 8 * 4096
        assert offsets == sorted(offsets)


def test_more_reads_than_a_file_has_room_for_wrap() -> None:
    offsets = profile._spread_offsets(4 * 4096, 10, 4096, np.random.default_rng(0)).tolist()
    assert len(offsets) == 10
    assert set(offsets) == {0, 4096, 8192, 12288}


# ------------------------------------------------------------------------------------------------ what is measured


def test_batches_fill_the_grid(clock: Clock) -> None:
    reader = FakeReader(clock)
    table = profile._measure_batches(reader, np.random.default_rng(0), 2)
    assert [row[:2] for row in table] == [(n, size) for n in READS for size in REQUEST_BYTES]
    for n, size, us in table:
        if n * size <= MAX_BATCH_BYTES:
            assert us == pytest.approx(1e6 * reader.seconds(n, size)), (n, size)
        else:  # in proportion to the largest batch that was read
            largest = max(m for m in READS if m * size <= MAX_BATCH_BYTES)
            assert us == pytest.approx(1e6 * reader.seconds(largest, size) * n / largest), (n, size)
    read = {(len(offsets), size) for offsets, size in reader.batches}
    assert read == {(n, size) for n in READS for size in REQUEST_BYTES if n * size <= MAX_BATCH_BYTES}
    assert (1024, 65536) not in read  # or the proportion above was not tested
    # Small batches are read several times a round; a pause as long as two of them follows each, up to 50 ms.
    assert sum(len(offsets) == 1 and size == 4096 for offsets, size in reader.batches) == 2 * 8
    assert sum(len(offsets) == 1024 for offsets, size in reader.batches) == 2 * 2
    expected = [min(0.05, 2 * reader.seconds(len(o), s)) for o, s in reader.batches]
    assert clock.slept == pytest.approx(expected)
    assert max(clock.slept) <= 0.05
    # A profile takes it as it is.
    flash = Flash(gbps=1, cost_per_read_us=0, latency_us=0, queue_depth=64, alignment=4096, table=tuple(table))
    assert float(flash.batch_s(64, 64 * 16384)) == pytest.approx(reader.seconds(64, 16384))


def test_rounds_go_through_the_grid_in_another_order(clock: Clock) -> None:
    reader = FakeReader(clock)
    profile._measure_batches(reader, np.random.default_rng(0), 2)
    points = [(len(offsets), size) for offsets, size in reader.batches]
    half = len(points) // 2
    assert points[:half] != points[half:]
    assert sorted(points[:half]) == sorted(points[half:])


def test_a_batch_is_the_median_of_its_rounds(clock: Clock) -> None:
    reader = FakeReader(clock)
    real, seen = reader.read_batch, [0]

    def noisy(offsets: Any, size: int) -> float:
        seconds = real(offsets, size)
        if (len(offsets), size) == (256, 4096):
            seen[0] += 1
            return seconds * (100 if seen[0] == 2 else 1)
        return seconds

    reader.read_batch = noisy  # type: ignore[method-assign]
    table = {row[:2]: row[2] for row in profile._measure_batches(reader, np.random.default_rng(0), 3)}
    assert seen == [3]
    assert table[256, 4096] == pytest.approx(1e6 * reader.seconds(256, 4096))


@pytest.mark.parametrize(("size", "n"), [(4 << 10, 2048), (1 << 20, 64)])
def test_sustained_is_reads_over_wall_time(clock: Clock, size: int, n: int) -> None:
    reader = FakeReader(clock)
    found = profile._sustained(reader, size, np.random.default_rng(0))
    assert found == pytest.approx(n / reader.seconds(n, size))
    assert clock.slept == []  # without a pause
    assert clock.now - 100.0 >= SUSTAINED_S
    assert clock.now - 100.0 < SUSTAINED_S + 5 * reader.seconds(n, size)
    for offsets, bytes_each in reader.batches:
        assert (len(offsets), bytes_each) == (n, size)
        assert (offsets % size == 0).all()
        assert offsets.max() + size <= FILE_BYTES


def test_what_an_idle_disk_lets_through_at_once_is_not_sustained(clock: Clock) -> None:
    """The first fifth of the batches is ten times as fast."""
    n, size = 2048, 4096
    reader = FakeReader(clock, burst=n * 20)
    found = profile._sustained(reader, size, np.random.default_rng(0))
    assert len(reader.batches) > 80
    assert found == pytest.approx(n / reader.seconds(n, size))


def test_a_slow_disk_is_read_four_times_at_least(clock: Clock) -> None:
    reader = FakeReader(clock)
    reader.seconds = lambda n, size: 2.0  # type: ignore[method-assign]
    assert profile._sustained(reader, 4096, np.random.default_rng(0)) == pytest.approx(2048 / 2.0)
    assert len(reader.batches) == 4


def test_two_figures_of_a_disk(clock: Clock, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """From batches of 256 reads: what a byte takes beyond 4096 of them, and what a read takes besides."""
    reader = FakeReader(clock)
    found = measured_flash(reader, monkeypatch, tmp_path)
    share = 50e-6 / 256  # of the batch's own time
    assert found.gbps == pytest.approx(1.0)
    assert found.cost_per_read_us == pytest.approx(1e6 * (2e-6 + share))
    assert found.latency_us == pytest.approx(1e6 * reader.seconds(1, 4096))
    assert (found.queue_depth, found.alignment) == (64, 4096)
    assert found.sustained_gbps == pytest.approx(64 * (1 << 20) * 1e-9 / reader.seconds(64, 1 << 20))
    assert found.sustained_reads_per_s == pytest.approx(2048 / reader.seconds(2048, 4096))
    assert len(found.table) == len(READS) * len(REQUEST_BYTES)


def measured_flash(reader: FakeReader, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Flash:
    file = tmp_path / "flash.bin"
    file.write_bytes(b"")
    core = SimpleNamespace(FlashReader=lambda path, depth: reader)
    monkeypatch.setattr(profile, "importlib", SimpleNamespace(import_module=lambda name: core))
    return profile._measure_flash(file, 1)


# ------------------------------------------------------------------------------------------------ errors


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    return pack(tiny.write_hf(folder / "hf", "llama"), folder / "llama.dipper", tokenizer=False)


def test_a_small_bundle_is_refused(bundle: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    reader = FakeReader(clock, file_bytes=3 << 20)
    with pytest.raises(ConfigError) as e:
        measured_flash(reader, monkeypatch, tmp_path)
    assert str(e.value) == (f"{tmp_path}/flash.bin has 3 MiB: profiling reads batches of 16 MiB; use a larger bundle")
    assert reader.batches == []


def test_a_small_real_bundle_is_refused(bundle: Path) -> None:
    said: list[str] = []
    with pytest.raises(ConfigError, match=r"flash\.bin") as e:
        measure_profile(bundle, progress=said.append)
    assert str(e.value).endswith(("use a larger bundle", "its disk cannot be profiled"))
    assert said == ["disk"]


def test_reads_through_the_page_cache_are_refused(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    reader = FakeReader(clock, direct=False)
    with pytest.raises(ConfigError) as e:
        measured_flash(reader, monkeypatch, tmp_path)
    assert str(e.value) == (
        f"{tmp_path}/flash.bin is read through the page cache (the file lies in memory): its disk cannot be profiled"
    )
    assert reader.batches == []


def test_what_is_no_bundle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError):
        measure_profile(tmp_path)


# ------------------------------------------------------------------------------------------------ a real machine


@pytest.mark.slow
def test_this_machine_with_a_real_bundle(smollm2_gguf: Path, tmp_path: Path) -> None:
    path = pack(smollm2_gguf, tmp_path / "smollm2.dipper")
    said: list[str] = []
    try:
        found = measure_profile(path, name="here", rounds=1, progress=said.append)
    except ConfigError as error:
        if "page cache" in str(error):
            pytest.skip(str(error))
        raise
    assert said == ["disk", "DRAM", "compute"]
    found.save(tmp_path / "here.toml")
    assert Device.load(tmp_path / "here.toml") == found
    figures = found.as_dict()
    assert figures["name"] == "here"
    assert set(figures["sources"]) == {"dram", "flash", "compute"}
    required = {f"flash.{n}" for n in ("gbps", "latency_us", "sustained_gbps", "sustained_reads_per_s")}
    required |= {"dram.bytes", "dram.gbps", "compute.gemv_gweights_per_s", "compute.gemm_gmacs_per_s"}
    required |= {"compute.attention_gweights_per_s", "compute.head_gweights_per_s"}
    for part in ("dram", "flash", "compute"):
        for name, value in figures[part].items():
            if name != "table":
                assert math.isfinite(value), f"{part}.{name}"
                assert value >= 0, f"{part}.{name}"
                assert value > 0 or f"{part}.{name}" not in required, f"{part}.{name}"
    assert len(found.flash.table) == len(READS) * len(REQUEST_BYTES)
    assert isinstance(found.compute, Compute)
    assert "SmolLM2" in found.sources["dram"] or Bundle.open(path).model.name in found.sources["dram"]
