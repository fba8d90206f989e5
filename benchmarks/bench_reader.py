"""The flash reader against fio: the same file, block size, depth and engine, runs taken in turn (A B A B).

    python benchmarks/bench_reader.py [--path FILE] [--rounds 7] [--seconds 1.5] [--depth 32]

Random aligned reads with O_DIRECT. The result of a row is the median over rounds of ours / fio of the same round, since
a shared disk drifts more between rounds than within one. Prints a table, then one JSON line. Goal: ratio >= 0.85.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from dipper import _core

BLOCK_BYTES = (16 << 10, 64 << 10)
TEST_FILE_BYTES = 1 << 30


@contextmanager
def test_file(path: Path | None) -> Iterator[Path]:
    """The file given, or a temporary one of random bytes in the current directory."""
    if path is not None:
        yield path
        return
    with tempfile.NamedTemporaryFile(dir=".", prefix="bench_reader_", suffix=".partial") as file:
        for _ in range(TEST_FILE_BYTES >> 20):
            file.write(os.urandom(1 << 20))
        file.flush()
        os.fsync(file.fileno())
        yield Path(file.name)


def fio_gbps(path: Path, block_bytes: int, depth: int, seconds: float) -> dict[str, float]:
    command = [
        "fio", "--name=randread", f"--filename={path}", "--rw=randread", f"--bs={block_bytes}", f"--iodepth={depth}",
        "--ioengine=io_uring", "--direct=1", "--readonly", "--time_based", f"--runtime={round(seconds * 1000)}ms",
        "--norandommap", "--output-format=json",
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        sys.exit(f"fio failed ({result.returncode}): {result.stderr.strip() or result.stdout.strip()}")
    job = json.loads(result.stdout[result.stdout.index("{") :])["jobs"][0]
    reads_per_s = job["read"]["iops"]
    cpu_us = (job["usr_cpu"] + job["sys_cpu"]) / 100 * 1e6 / reads_per_s
    return {"gbps": job["read"]["bw_bytes"] * 1e-9, "cpu_us_per_read": cpu_us}


def our_gbps(path: Path, block_bytes: int, depth: int, seconds: float, backend: str) -> dict[str, float]:
    reader = _core.FlashReader(str(path), backend=backend, depth=depth)
    if not reader.direct:
        sys.exit(f"{path}: {reader.direct_note}; give --path on a disk file system.")
    rng = np.random.default_rng(time.time_ns())
    n_batch = max(64, (64 << 20) // block_bytes)
    n_reads, busy_s, cpu_s = 0, 0.0, 0.0
    while busy_s < seconds:
        offsets = rng.integers(0, reader.file_bytes // block_bytes, n_batch, dtype=np.uint64) * np.uint64(block_bytes)
        before = resource.getrusage(resource.RUSAGE_SELF)
        busy_s += reader.read_batch(offsets, block_bytes)
        after = resource.getrusage(resource.RUSAGE_SELF)
        cpu_s += after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
        n_reads += n_batch
    return {"gbps": n_reads * block_bytes / busy_s * 1e-9, "cpu_us_per_read": cpu_s / n_reads * 1e6}


def compare(path: Path, block_bytes: int, args: argparse.Namespace) -> dict[str, float]:
    ours, fio = [], []
    for turn in range(args.rounds):
        runs = [
            lambda: ours.append(our_gbps(path, block_bytes, args.depth, args.seconds, args.backend)),
            lambda: fio.append(fio_gbps(path, block_bytes, args.depth, args.seconds)),
        ]
        for run in runs if turn % 2 == 0 else reversed(runs):
            run()

    def median(rows: list[dict[str, float]], key: str) -> float:
        return round(statistics.median(row[key] for row in rows), 3)

    ratios = [a["gbps"] / b["gbps"] for a, b in zip(ours, fio, strict=True)]
    return {
        "block_bytes": block_bytes,
        "ours_gbps": median(ours, "gbps"),
        "fio_gbps": median(fio, "gbps"),
        "ratio": round(statistics.median(ratios), 3),
        "ratio_min": round(min(ratios), 3),
        "ratio_max": round(max(ratios), 3),
        "ours_cpu_us_per_read": median(ours, "cpu_us_per_read"),
        "fio_cpu_us_per_read": median(fio, "cpu_us_per_read"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", type=Path, help="file to read (default: a temporary 1 GiB file in the current directory)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=1.5, help="of each run")
    parser.add_argument("--depth", type=int, default=32, help="reads in flight")
    parser.add_argument("--backend", default="auto", choices=["auto", "io_uring", "pread"])
    args = parser.parse_args()
    if shutil.which("fio") is None:
        sys.exit("fio is not installed, and this benchmark compares with it: apt install fio")
    with test_file(args.path) as path:
        rows = [compare(path, block_bytes, args) for block_bytes in BLOCK_BYTES]
    print(f"{'block':>9} {'ours GB/s':>10} {'fio GB/s':>9} {'ratio':>6} {'min..max':>13} {'ours µs/read':>13} {'fio µs/read':>12}")
    for r in rows:
        spread = f"{r['ratio_min']:.2f}..{r['ratio_max']:.2f}"
        print(
            f"{r['block_bytes'] >> 10:>5} KiB {r['ours_gbps']:>10.3f} {r['fio_gbps']:>9.3f} {r['ratio']:>6.2f} {spread:>13} "
            f"{r['ours_cpu_us_per_read']:>13.2f} {r['fio_cpu_us_per_read']:>12.2f}"
        )
    print(json.dumps({"benchmark": "reader", "depth": args.depth, "rounds": args.rounds, "seconds": args.seconds, "rows": rows}))


if __name__ == "__main__":
    main()
