"""Device measurements: the fit, the facts, the page cache, and a small real measurement."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from dipper import doctor
from dipper.errors import ConfigError


def test_fit_finds_the_line_it_was_made_from() -> None:
    sizes = [4096, 16384, 65536, 1 << 20]
    a, bandwidth, error = doctor.fit_read_cost(sizes, [9e-6 + n / 1.5e9 for n in sizes])
    assert (a, bandwidth) == (pytest.approx(9e-6), pytest.approx(1.5e9))
    assert error < 1e-9


def test_fit_never_gives_a_negative_cost() -> None:
    a, bandwidth, error = doctor.fit_read_cost([4096, 8192], [1e-6, 3e-6])
    assert a == 0
    assert bandwidth > 0
    assert error > 0.1


def test_fit_refuses_what_is_no_line() -> None:
    with pytest.raises(ConfigError, match="1 request sizes, 1 times: a line needs two different sizes"):
        doctor.fit_read_cost([4096], [1e-6])
    with pytest.raises(ConfigError, match="Larger reads were not slower than small ones"):
        doctor.fit_read_cost([4096, 1 << 20], [1e-3, 1e-6])


@pytest.fixture
def disk_file(tmp_path: Path) -> Path:
    path = tmp_path / "flash.bin"
    path.write_bytes(np.random.default_rng(1).bytes(doctor.MIN_FILE_BYTES))
    return path


def test_page_cache_is_seen_and_dropped(tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    path.write_bytes(bytes(1 << 20))
    if doctor.file_system(path) in {"tmpfs", "ramfs"}:
        pytest.skip("a file in memory is always resident")
    doctor.drop_page_cache(path)
    assert doctor.page_cache_share(path) < 0.05
    path.read_bytes()
    assert doctor.page_cache_share(path) == 1.0
    (tmp_path / "empty").touch()
    assert doctor.page_cache_share(tmp_path / "empty") == 0.0
    with pytest.raises(ConfigError, match="is not a file: page-cache residency is told of one file"):
        doctor.page_cache_share(tmp_path)


def test_file_system_and_machine() -> None:
    assert doctor.file_system(Path("/proc/self")) == "proc"
    facts = doctor.machine()
    assert facts["cores"] == len(os.sched_getaffinity(0))
    assert 0 < facts["dram_bytes"]["available"] <= facts["dram_bytes"]["total"]


def test_measure_disk_reads_a_bundles_own_flash(disk_file: Path) -> None:
    profile = doctor.measure_disk(disk_file.parent, request_bytes=(4096, 262144), depths=(1, 32), seconds=0.2, rounds=2)
    assert profile.file_bytes == doctor.MIN_FILE_BYTES
    assert len(profile.points) == 4
    assert profile.fit_depth == 32
    assert all(p.reads_per_s > 0 for p in profile.points)
    assert profile.latency_us == pytest.approx(1e6 / profile.point(4096, 1).reads_per_s)
    with pytest.raises(
        ConfigError, match=r"No measured point for 8192 bytes at depth 1: request sizes are \[4096, 262144\]"
    ):
        profile.point(8192, 1)


def test_a_small_path_gets_a_test_file_that_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "TEST_FILE_BYTES", 4 << 20)
    (tmp_path / "flash.bin").write_bytes(b"small")
    profile = doctor.measure_disk(tmp_path, request_bytes=(4096, 1 << 20), depths=(1,), seconds=0.1, rounds=3)
    assert profile.file_bytes == 4 << 20
    assert [p.name for p in tmp_path.iterdir()] == ["flash.bin"]


def test_measure_disk_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="does not exist: give a bundle, a file or a directory"):
        doctor.measure_disk(tmp_path / "missing")
    with pytest.raises(ConfigError, match=r"request_bytes \[1000\] must be positive multiples of 4096"):
        doctor.measure_disk(tmp_path, request_bytes=(1000,))
    monkeypatch.setattr(doctor, "TEST_FILE_BYTES", 1 << 60)
    with pytest.raises(ConfigError, match="MiB free, and measuring it takes a test file of"):
        doctor.measure_disk(tmp_path)


def test_doctor_is_json_and_prints(disk_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "measure_dram", lambda: {1: 9.5, 2: 19.0})
    report = doctor.doctor(disk_file.parent, seconds=0.3)
    assert json.loads(json.dumps(report)) == report
    assert report["page_cache_share"] is not None
    console = Console(width=200, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(doctor.format_doctor(report))
    text = console.export_text()
    assert "9.5 GB/s with 1 threads, 19.0 GB/s with 2 threads" in text
    assert "32 in flight" in text
    console.file.close()


def test_notes_tell_what_stands_in_the_way() -> None:
    profile = doctor.DiskProfile(
        points=(doctor.ReadPoint(request_bytes=4096, depth=1, reads_per_s=1e4),),
        cost_per_read_us=9.0,
        gbps=1.5,
        fit_depth=32,
        fit_error=0.8,
        backend="pread",
        backend_note="io_uring_setup: refused",
        direct=False,
        direct_note="the file system refuses O_DIRECT",
        file_bytes=1 << 30,
    )
    notes = doctor._notes(profile, 0.5)
    assert notes[0].startswith("No direct I/O (the file system refuses O_DIRECT): reads go through the page cache")
    assert notes[1].startswith("No io_uring (io_uring_setup: refused): a pool of pread threads")
    assert notes[2].startswith("The read cost fits badly (off by up to 80%)")
    assert notes[3].startswith("50% of flash.bin lies in the page cache")
    assert profile.half_bandwidth_bytes == 13500
