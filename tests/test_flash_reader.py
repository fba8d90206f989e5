"""The flash reader from Python: contents, counters, failures, plans."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dipper import _core
from dipper.errors import ConfigError, FlashError

PAGE = 4096
FILE_BYTES = 4 << 20
BACKENDS = ["io_uring", "pread"]


@pytest.fixture(scope="module")
def contents() -> np.ndarray:
    return np.random.default_rng(5).integers(0, 256, FILE_BYTES, dtype=np.uint8)


@pytest.fixture(scope="module")
def path(contents: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("flash") / "flash.bin"
    with file.open("wb") as f:
        f.write(contents.tobytes())
        os.fsync(f.fileno())
    return str(file)


def open_reader(path: str, backend: str = "auto", **options: object) -> _core.FlashReader:
    auto = _core.FlashReader(path)
    if backend == "io_uring" and auto.backend != "io_uring":
        pytest.skip(f"no io_uring here: {auto.backend_note}")
    return _core.FlashReader(path, backend=backend, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("depth", [1, 32, 300])
def test_reads_what_the_file_holds(path: str, contents: np.ndarray, backend: str, direct: bool, depth: int) -> None:
    reader = open_reader(path, backend, depth=depth, direct=direct)
    assert reader.backend == backend
    assert (reader.backend_note == "") == (backend == "io_uring")
    assert reader.file_bytes == FILE_BYTES
    assert reader.direct == (reader.direct_note == "")
    for offset, n in ((0, 1), (1, PAGE), (4095, 2), (123_457, 700_000), (FILE_BYTES - 5, 5), (77, 0)):
        assert reader.read(offset, n) == contents[offset : offset + n].tobytes()

    rng = np.random.default_rng(depth)
    offsets = rng.integers(0, FILE_BYTES // PAGE - 4, 500, dtype=np.uint64) * np.uint64(PAGE)
    out = np.empty((500, 4 * PAGE), np.uint8)
    assert reader.read_batch(offsets, 4 * PAGE, out) > 0
    for row, offset in zip(out, offsets.tolist(), strict=True):
        np.testing.assert_array_equal(row, contents[offset : offset + 4 * PAGE])


@pytest.mark.parametrize("backend", BACKENDS)
def test_counters_are_exact(path: str, backend: str) -> None:
    reader = open_reader(path, backend)
    assert reader.counters == {"reads": 0, "bytes": 0}
    reader.read(100, 10)
    assert reader.counters == {"reads": 1, "bytes": PAGE}
    reader.read(4090, 10)
    assert reader.counters == {"reads": 2, "bytes": 3 * PAGE}
    reader.read_batch(np.arange(0, 64 * PAGE, PAGE, dtype=np.uint64), 2 * PAGE)
    assert reader.counters == {"reads": 66, "bytes": 131 * PAGE}
    reader.read_batch(np.empty(0, np.uint64), PAGE)
    assert reader.counters == {"reads": 66, "bytes": 131 * PAGE}


def disk_bytes_read() -> int:
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["read_bytes"])


def test_bytes_are_what_the_kernel_read_from_disk(path: str) -> None:
    reader = _core.FlashReader(path)
    if not reader.direct:
        pytest.skip(f"reads go through the page cache: {reader.direct_note}")
    offsets = np.random.default_rng(6).integers(0, FILE_BYTES // PAGE - 4, 2000, dtype=np.uint64) * np.uint64(PAGE)
    before, counted = disk_bytes_read(), reader.counters["bytes"]
    reader.read_batch(offsets, 4 * PAGE)
    from_disk = disk_bytes_read() - before
    assert reader.counters["bytes"] - counted == 2000 * 4 * PAGE
    assert from_disk == pytest.approx(2000 * 4 * PAGE, rel=0.02)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_short_read_says_where_the_file_ends(tmp_path: Path, backend: str) -> None:
    file = tmp_path / "cut.bin"
    file.write_bytes(bytes(10 * PAGE))
    reader = open_reader(str(file), backend)
    with pytest.raises(FlashError) as e:
        reader.read_batch(np.array([0, 8 * PAGE], np.uint64), 4 * PAGE)
    assert str(e.value) == (
        f"Reading {file} failed at offset 32768 (16384 bytes): short read, 8192 bytes came and the file ends at 40960. "
        "The file is cut or not padded: pack the model again."
    )
    with pytest.raises(FlashError, match="short read, 8192 bytes came"):
        reader.read(0, 1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_eio_names_path_place_and_cause(backend: str) -> None:
    # Address 4096 of this process is not mapped: reading it through /proc/self/mem is a real EIO.
    reader = open_reader("/proc/self/mem", backend)
    assert (reader.direct, reader.direct_note) == (False, "the file system refuses O_DIRECT")
    own = np.random.default_rng(7).integers(0, 256, 40 * PAGE, dtype=np.uint8)
    address = own.ctypes.data
    assert reader.read(address, 30 * PAGE) == own[: 30 * PAGE].tobytes()
    good = -(-address // PAGE) * PAGE
    offsets = np.arange(good, good + 30 * PAGE, PAGE, dtype=np.uint64)
    offsets[17] = 4096
    with pytest.raises(FlashError) as e:
        reader.read_batch(offsets, PAGE)
    assert str(e.value) == (
        "Reading /proc/self/mem failed at offset 4096 (4096 bytes): Input/output error (errno 5). "
        "The device could not read this place: check the disk (dmesg), then fetch or pack the model again."
    )
    with pytest.raises(FlashError, match="errno 5"):
        reader.read(address, 1)


def test_refusals(path: str, tmp_path: Path) -> None:
    missing = tmp_path / "missing.bin"
    with pytest.raises(FlashError) as e:
        _core.FlashReader(str(missing))
    assert str(e.value) == (
        f"Cannot open {missing} for reading: No such file or directory (errno 2). Check the path and its permissions."
    )
    with pytest.raises(FlashError, match=r"it is a directory; give a file such as its flash\.bin\."):
        _core.FlashReader(str(tmp_path))
    with pytest.raises(ConfigError, match=r"depth is 0, but reads in flight must be between 1 and 4096\."):
        _core.FlashReader(path, depth=0)
    with pytest.raises(ConfigError, match=r'Unknown back end "mmap": give auto, io_uring or pread\.'):
        _core.FlashReader(path, backend="mmap")
    reader = _core.FlashReader(path)
    with pytest.raises(ConfigError, match=r"A read of 4096 bytes at offset 512 .* must be multiples of 4096"):
        reader.read_batch(np.array([512], np.uint64), PAGE)
    with pytest.raises(ConfigError, match=r"out has shape \[2, 4096\], but the reads need \[1, 4096\]\."):
        reader.read_batch(np.zeros(1, np.uint64), PAGE, np.empty((2, PAGE), np.uint8))
    assert reader.read(0, 10)  # a refused request breaks nothing


def test_tmpfs_is_not_direct() -> None:
    shm = Path("/dev/shm")
    if not shm.is_dir() or not os.access(shm, os.W_OK):
        pytest.skip("no /dev/shm here")
    file = shm / f"flash_reader_{os.getpid()}.bin"
    file.write_bytes(bytes(PAGE))
    try:
        reader = _core.FlashReader(str(file))
        assert not reader.direct
        assert reader.direct_note == "the file lies in memory (tmpfs), O_DIRECT has no meaning there"
    finally:
        file.unlink()


def test_io_uring_refused_falls_back_and_says_why(path: str) -> None:
    """A process without file descriptors to spare cannot have a ring."""
    code = (
        "import resource, sys; from dipper import _core; from dipper.errors import ConfigError\n"
        "used = len(__import__('os').listdir('/proc/self/fd')) - 1\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (used + 1, used + 1))\n"
        "r = _core.FlashReader(sys.argv[1]); print(r.backend, '|', r.backend_note, '|', len(r.read(0, 9000)))\n"
        "del r\n"
        "try: _core.FlashReader(sys.argv[1], backend='io_uring')\n"
        "except ConfigError as e: print(e)\n"
    )
    if _core.FlashReader(path).backend != "io_uring":
        pytest.skip("no io_uring here")
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "pread | io_uring_setup: Too many open files | 9000",
        "The io_uring back end was asked for, but: io_uring_setup: Too many open files. Use backend auto or pread.",
    ]


def test_threads_may_share_a_python_reader(path: str, contents: np.ndarray) -> None:
    reader = _core.FlashReader(path)
    wrong: list[int] = []

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for offset in rng.integers(0, FILE_BYTES - 9000, 50).tolist():
            if reader.read(offset, 9000) != contents[offset : offset + 9000].tobytes():
                wrong.append(offset)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


regions = st.tuples(
    st.integers(0, 1000).map(lambda page: page * PAGE),
    st.integers(1, 20_000),
    st.sets(st.integers(0, 200), max_size=60).map(sorted),
    st.integers(1, 16).map(lambda pages: pages * PAGE),
)


@given(regions)
@settings(max_examples=300, deadline=None)
def test_plan_reads(region: tuple[int, int, list[int], int]) -> None:
    start, record_bytes, columns, max_bytes = region
    offsets = np.array([start + c * record_bytes for c in columns], np.uint64)
    plan = _core.plan_reads(offsets, record_bytes, PAGE, max_bytes)

    ends, position = 0, 0
    for offset, n_bytes, place in plan["ranges"]:
        assert offset % PAGE == n_bytes % PAGE == 0
        assert 0 < n_bytes <= max_bytes
        assert offset >= ends  # disjoint and ascending
        assert place == position  # staging is filled from 0 without gaps
        ends, position = offset + n_bytes, position + n_bytes
    assert position == plan["staging_bytes"]
    region_bytes = (max(columns, default=0) + 1) * record_bytes
    assert position <= _core.max_staging_bytes(len(columns), record_bytes, region_bytes, PAGE)

    # Every page of the plan holds some record's bytes: nothing is read for nothing.
    wanted = {page for o in offsets.tolist() for page in range(o // PAGE, (o + record_bytes - 1) // PAGE + 1)}
    read = [page for o, n, _ in plan["ranges"] for page in range(o // PAGE, (o + n) // PAGE)]
    assert sorted(wanted) == read

    # A record lies whole in staging once its ranges are there, and needs the last of them.
    in_staging = {o + k: place + k for o, n, place in plan["ranges"] for k in range(0, n, PAGE)}
    for record, offset in enumerate(offsets.tolist()):
        last = offset + record_bytes - 1
        for byte in (offset, last):
            page = byte // PAGE * PAGE
            assert in_staging[page] + byte - page == plan["staging_offset"][record] + byte - offset
        o, n, _ = plan["ranges"][plan["n_ranges_needed"][record] - 1]
        assert o <= last < o + n


def test_plan_reads_refuses() -> None:
    with pytest.raises(ConfigError, match=r"offsets must ascend, but 0 follows 4096\."):
        _core.plan_reads(np.array([4096, 0], np.uint64), 10)
    with pytest.raises(ConfigError, match="alignment 4096 must be a power of two, max_bytes 5000 a multiple of it"):
        _core.plan_reads(np.array([0], np.uint64), 10, PAGE, 5000)


def test_dram_probe() -> None:
    assert 0.1 < _core.dram_read_gbps(1, 16 << 20, 0.02) < 5000
    with pytest.raises(ConfigError, match="n_threads 0 must be between 1 and 1024 and bytes 1048576 at least 1 MiB"):
        _core.dram_read_gbps(0, 1 << 20)


def test_proc_self_mem_trick_holds() -> None:
    """The EIO tests stand on this: the first page is never mapped."""
    with open("/proc/self/mem", "rb", buffering=0) as file, pytest.raises(OSError, match="Input/output error"):
        os.pread(file.fileno(), PAGE, 4096)
