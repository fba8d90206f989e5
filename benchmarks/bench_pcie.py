"""What a GPU gets of its own memory and of pinned host memory: the figures behind a device profile with HBM as DRAM.

    python benchmarks/bench_pcie.py          # needs PyTorch with CUDA; Triton for the gather

Prints bandwidth of a GEMV and a reduction over device memory, of copies from pinned host memory by size, and of a
kernel that gathers records from it (loads over the bus, no copy engine). Last line: one JSON object.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import torch

GIB = 1 << 30


def seconds(run: Callable[[], Any], n: int = 10) -> float:
    run()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(n):
        run()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / n


def copies(host: torch.Tensor, device: torch.Tensor) -> dict[int, float]:
    """GB/s of asynchronous copies by size of one."""
    found = {}
    for size in (1 << k for k in (12, 14, 16, 18, 20, 22, 24, 30)):
        n = min(4096, GIB // size)

        def run(n: int = n, size: int = size) -> None:
            for i in range(n):
                part = slice(i * size, (i + 1) * size)
                device[part].copy_(host[part], non_blocking=True)

        found[size] = n * size / seconds(run, 3) / 1e9
    return found


def gathers(host: torch.Tensor) -> dict[int, float]:
    """GB/s of a kernel's loads of scattered records from pinned host memory, by bytes of a record."""
    import triton
    import triton.language as tl

    @triton.jit
    def gather(src, index, out, n: tl.constexpr, block: tl.constexpr):
        row = tl.load(index + tl.program_id(0)).to(tl.int64)
        for at in range(0, n, block):
            p = at + tl.arange(0, block)
            tl.store(out + tl.program_id(0).to(tl.int64) * n + p, tl.load(src + row * n + p))

    class Mapped:  # pinned memory has the same address on the device; Triton asks a tensor for no more than these
        dtype = torch.int32

        @staticmethod
        def data_ptr() -> int:
            return host.data_ptr()

    found = {}
    for size in (4096, 16384, 65536):
        n, rows = size // 4, GIB // size
        index = torch.randperm(rows, device="cuda")[: rows // 4].to(torch.int32)
        out = torch.empty(len(index) * n, dtype=torch.int32, device="cuda")

        def run(index: torch.Tensor = index, out: torch.Tensor = out, n: int = n) -> None:
            gather[(len(index),)](Mapped(), index, out, n, 1024)

        found[size] = len(index) * size / seconds(run, 5) / 1e9
    return found


def main() -> None:
    host = torch.empty(GIB, dtype=torch.uint8, pin_memory=True)
    device = torch.empty(GIB, dtype=torch.uint8, device="cuda")
    matrix = torch.randn(65536, 16384, dtype=torch.float16, device="cuda")
    vector = torch.randn(16384, dtype=torch.float16, device="cuda")
    one = seconds(lambda: (device[:4096].copy_(host[:4096], non_blocking=True), torch.cuda.synchronize()), 200)
    result: dict[str, Any] = {
        "benchmark": "pcie",
        "card": torch.cuda.get_device_name(0),
        "gemv_gbps": 2 * matrix.numel() / seconds(lambda: matrix @ vector) / 1e9,
        "sum_gbps": 2 * matrix.numel() / seconds(lambda: matrix.sum()) / 1e9,
        "copy_gbps": copies(host, device),
        "one_copy_us": 1e6 * one,
    }
    try:
        result["gather_gbps"] = gathers(host)
    except (ImportError, RuntimeError, TypeError, AttributeError) as error:
        result["gather_gbps"] = f"not measured: {type(error).__name__}: {error}"[:200]
    for name, value in result.items():
        print(name, value)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
