"""The short probe of disk and DRAM: what it makes of a disk that is known, how long it takes, what it refuses."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from dipper import _core, probe
from dipper.errors import ConfigError
from dipper.probe import device_for, probe_device


class Disk:
    """Reads at `gbps` and `cost_us` a read, one batch after the other on a clock of its own."""

    def __init__(self, gbps=1.0, cost_us=10.0, latency_us=80.0, file_bytes=1 << 30, direct=True):
        self.now, self.gbps, self.cost_us, self.latency_us = 5.0, gbps, cost_us, latency_us
        self.file_bytes, self.direct = file_bytes, direct
        self.burst_bytes = 0  # at ten times the speed, at first

    def read_batch(self, offsets, size):
        assert (offsets % 4096 == 0).all()
        assert offsets.max() + size <= self.file_bytes
        n = len(offsets)
        seconds = 1e-6 * (self.latency_us if n == 1 else n * self.cost_us) + n * size / (1e9 * self.gbps)
        if self.burst_bytes > 0:
            self.burst_bytes -= n * size
            seconds /= 10
        self.now += seconds
        return seconds


@pytest.fixture
def put(monkeypatch):
    """Puts a disk in place of the machine's."""

    def use(disk):
        native = SimpleNamespace(FlashReader=lambda file, depth: disk, dram_read_gbps=lambda *_: 12.5)
        monkeypatch.setattr(probe, "_core", native)
        monkeypatch.setattr(probe, "_now", lambda: disk.now)
        return disk

    return use


@pytest.mark.parametrize(("gbps", "cost_us"), [(0.5, 8.0), (2.0, 9.0), (1.0, 0.0)])
def test_finds_what_a_disk_gives(put, tmp_path, gbps, cost_us):
    disk = put(Disk(gbps, cost_us))
    found = probe_device(tmp_path)
    assert found.flash.gbps == pytest.approx(gbps)
    assert found.flash.cost_per_read_us == pytest.approx(cost_us, abs=1e-6)
    assert found.flash.latency_us == pytest.approx(80 + 4.096 / gbps)
    assert found.dram.gbps == 12.5
    assert (found.name, found.title) == ("probe", "measured just now")
    assert disk.now - 5.0 < 0.5


def test_what_an_idle_disk_lets_through_at_once_does_not_count(put, tmp_path):
    put(Disk(0.5)).burst_bytes = 20 << 20
    assert probe_device(tmp_path).flash.gbps == pytest.approx(0.5, rel=0.05)


def test_a_small_file_is_refused(put, tmp_path):
    put(Disk(file_bytes=100 << 10))
    with pytest.raises(ConfigError) as error:
        probe_device(tmp_path)
    assert str(error.value) == (
        f"{tmp_path}/flash.bin has 100 KiB, too little to measure its disk: give --device-profile"
    )


def test_a_page_cache_is_said(put, tmp_path):
    (tmp_path / "flash.bin").write_bytes(b"x")
    put(Disk(direct=False))
    assert probe_device(tmp_path).title == "measured just now, through the page cache"


def test_a_process_is_probed_once(put, tmp_path):
    disk = put(Disk())
    found = device_for(tmp_path)
    after = disk.now
    assert device_for(tmp_path) is found
    assert disk.now == after
    assert device_for(tmp_path, "paper-phone").name == "paper-phone"


def test_a_real_disk(tmp_path):
    (tmp_path / "flash.bin").write_bytes(np.random.default_rng(0).bytes(8 << 20))
    found = probe_device(tmp_path)
    assert 1e-3 < found.flash.gbps < 1000
    assert 0 <= found.flash.cost_per_read_us < 1e5
    assert found.dram.gbps > 0.1
    assert _core.FlashReader(str(tmp_path / "flash.bin")).direct or "page cache" in found.title
