"""Single product kernels: bytes and products a second by instruction set, beside the DRAM bandwidth of the same hour.

    python benchmarks/bench_kernels.py [--only gemv_block] [--isa avx512,avx2] [--threads 2] [--rounds 5]
    python benchmarks/bench_kernels.py --instructions

Builds benchmarks/kernels.cpp (cmake, into build/bench) and runs it once a case and round, all cases taking turns with a
measurement of the DRAM. Cases: every grid; shapes of an 8B model (a record's matrices as one: 28672 rows are gate and
up) and of small ones; all columns and half of them; working sets that DRAM holds (`--dram-mb`; take it well above the
last-level cache) and that a cache does. `dram_share` is GB/s over the DRAM's with as many threads, for the former. The
scalar kernels run only what a cache holds: they are a reference.

`--instructions` counts instead of timing: valgrind's callgrind counts the instructions of one pass, with one thread, on
a matrix of 1024 x 1024. Such a count does not depend on the machine's load, so it is taken twice and must repeat; it
tells a kernel's work, not its speed. Valgrind does not know AVX-512 and says so to the program, so those kernels cannot
be counted.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import ROOT, fail, finish, interleave, parser, print_table, run_command, spread

BUILD = ROOT / "build" / "bench"
GRIDS = ("Q4_0", "Q4_1", "Q4_K", "Q5_0", "Q5_1", "Q5_K", "Q6_K", "Q8_0", "F16", "BF16", "F32")
KERNELS = ("gemv_block", "gemv_tiled", "gemm_block", "gemm_tiled")
# (rows, columns) of what a record or a matrix holds.
SHAPES = {
    "8B input": (28672, 4096),
    "8B glu": (4096, 14336),
    "8B attention": (4096, 4096),
    "0.5B input": (9728, 896),
    "0.5B glu": (896, 4864),
    "135M input": (3072, 576),
    "135M glu": (576, 1536),
    "square": (1024, 1024),
}
CACHE_MB = 4
GEMM_TOKENS = 64
COUNTED_TOKENS = 8


@dataclass(frozen=True, kw_only=True)
class Case:
    """One run of the executable, the instruction set and the threads aside."""

    kernel: str
    grid: str
    shape: str
    density: float = 1.0
    tokens: int = 1
    in_dram: bool

    def options(self, mb: int) -> list[str]:
        rows, columns = SHAPES[self.shape]
        options = {
            "kernel": self.kernel,
            "grid": self.grid,
            "rows": rows,
            "columns": columns,
            "density": self.density,
            "tokens": self.tokens,
            "mb": mb,
        }
        return [f"{name}={value}" for name, value in options.items()]


def cases() -> list[Case]:
    every_grid = [
        case
        for grid in GRIDS
        for case in (
            Case(kernel="gemv_tiled", grid=grid, shape="8B attention", in_dram=True),
            Case(kernel="gemv_tiled", grid=grid, shape="square", in_dram=False),
            Case(kernel="gemv_block", grid=grid, shape="8B input", density=0.5, in_dram=True),
            Case(kernel="gemv_block", grid=grid, shape="square", density=0.5, in_dram=False),
            Case(kernel="gemm_tiled", grid=grid, shape="square", tokens=GEMM_TOKENS, in_dram=False),
        )
    ]
    every_shape = [
        Case(kernel="gemv_block", grid="Q4_0", shape=shape, density=density, in_dram=in_dram)
        for shape in SHAPES
        for density in (1.0, 0.5)
        for in_dram in (True, False)
        if in_dram or not shape.startswith("8B")
    ]
    more = [
        Case(kernel="gemv_tiled", grid="Q4_0", shape="0.5B input", in_dram=True),
        Case(kernel="gemv_tiled", grid="Q4_0", shape="135M input", in_dram=True),
        Case(kernel="gemv_tiled", grid="Q4_0", shape="135M input", in_dram=False),
        Case(kernel="gemm_block", grid="Q4_0", shape="0.5B input", tokens=GEMM_TOKENS, in_dram=False),
        Case(kernel="gemm_tiled", grid="Q4_0", shape="0.5B input", tokens=GEMM_TOKENS, in_dram=False),
    ]
    return list(dict.fromkeys([*every_grid, *every_shape, *more]))


# --- the executable


def _tool(name: str) -> str | None:
    """Of this Python's environment, where pip puts cmake and ninja, or of the system."""
    return shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")


def build() -> Path:
    cmake = _tool("cmake")
    if cmake is None:
        fail("cmake is missing: pip install cmake")
    configure = [cmake, "-S", str(ROOT), "-B", str(BUILD), "-DCMAKE_BUILD_TYPE=Release", "-DDIPPER_NATIVE_BENCH=ON"]
    ninja = _tool("ninja")
    if ninja is not None:
        configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    for command in ([*configure, "-Wno-dev"], [cmake, "--build", str(BUILD), "--target", "bench_kernels"]):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            fail(f"{' '.join(command)} failed:\n{done.stdout[-4000:]}{done.stderr[-4000:]}")
    return BUILD / "bench_kernels"


def _output(command: Sequence[str]) -> tuple[str, str]:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        fail(f"{' '.join(command)} ended with {done.returncode}: {done.stderr.strip()}")
    return done.stdout, done.stderr


# --- seconds


def measure(executable: Path, chosen: list[tuple[str, Case]], args: Any) -> None:
    from dipper.doctor import measure_dram

    def turn(isa: str, case: Case) -> dict[str, Any]:
        mb = args.dram_mb if case.in_dram else CACHE_MB
        options = [*case.options(mb), f"isa={isa}", f"threads={args.threads}", f"seconds={args.seconds}"]
        return json.loads(_output([str(executable), *options])[0])

    turns: dict[Any, Any] = {key: (lambda key=key: turn(*key)) for key in chosen}
    turns["dram"] = lambda: measure_dram(n_threads=[args.threads], seconds=args.seconds)[args.threads]
    runs = interleave(turns, args.rounds, pause_s=0.0)
    dram = runs.pop("dram")

    rows = []
    for (isa, case), of_case in runs.items():
        gbps = spread([run["gbps"] for run in of_case])
        shares = [run["gbps"] / roof for run, roof in zip(of_case, dram, strict=True)]
        rows.append(
            {
                **_label(isa, case),
                "mb": of_case[0]["bytes"] / 1e6,
                "gbps": gbps["median"],
                "p20": gbps["p20"],
                "p80": gbps["p80"],
                "dram_share": spread(shares)["median"] if case.in_dram else None,
                "gmacs": spread([run["gmacs"] for run in of_case])["median"],
            }
        )
    print_table(rows)
    print(f"DRAM: {spread(dram)['median']:.1f} GB/s read by {args.threads} threads; medians of {args.rounds} rounds")
    finish("kernels", rows, [], **_conditions(args), dram_gbps=spread(dram), rounds=args.rounds)


def _label(isa: str, case: Case) -> dict[str, Any]:
    rows, columns = SHAPES[case.shape]
    return {
        "kernel": case.kernel,
        "grid": case.grid,
        "isa": isa,
        "shape": f"{case.shape} {rows}x{columns}",
        "density": case.density,
        "tokens": case.tokens,
        "memory": "DRAM" if case.in_dram else "cache",
    }


def _conditions(args: Any) -> dict[str, Any]:
    from dipper.doctor import machine

    return {"machine": machine(), "threads": args.threads}


# --- instructions


def instructions(executable: Path, isa: str, case: Case) -> tuple[int, int]:
    """(instructions, products) of one pass."""
    valgrind = shutil.which("valgrind")
    if valgrind is None:
        fail("valgrind is missing: install it with the system's packages")
    counter = [valgrind, "--tool=callgrind", "--callgrind-out-file=/dev/null", "--toggle-collect=bench_pass"]
    out, log = _output([*counter, str(executable), *case.options(0), f"isa={isa}", "threads=1", "passes=1"])
    found = re.search(r"Collected : (\d+)", log)
    if found is None or found.group(1) == "0":
        fail(f"callgrind counted nothing:\n{log}")
    return int(found.group(1)), json.loads(out)["macs"]


def count(executable: Path, isas: list[str], args: Any) -> None:
    rows = []
    for isa in isas:
        for kernel in KERNELS:
            for grid in GRIDS:
                tokens = COUNTED_TOKENS if kernel.startswith("gemm") else 1
                case = Case(kernel=kernel, grid=grid, shape="square", tokens=tokens, in_dram=False)
                if not _is_chosen(_label(isa, case), args.only):
                    continue
                (first, macs), (second, _) = (instructions(executable, isa, case) for _ in range(2))
                label = {name: value for name, value in _label(isa, case).items() if name != "memory"}
                rows.append({**label, "instructions": first, "per_product": first / macs, "ok": first == second})
    if not rows:
        fail(f"no case has all of {args.only!r}")
    print_table(rows)
    print("per_product: instructions a weight and token")
    finish("kernel-instructions", rows, [], **_conditions(args))


def _is_chosen(label: dict[str, Any], only: str | None) -> bool:
    text = " ".join(str(value) for value in label.values())
    return only is None or all(word in text for word in only.split())


def main() -> None:
    from dipper import _core

    available = _core.isas()
    cli = parser(__doc__)
    cli.add_argument("--only", metavar="WORDS", help="cases with all these words, such as 'gemv_block 8B DRAM'")
    cli.add_argument("--isa", help="instruction sets, comma-separated [all of this CPU]")
    cli.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="[all cores]")
    cli.add_argument("--rounds", type=int, default=5)
    cli.add_argument("--seconds", type=float, default=0.2, help="of a case and round [0.2]")
    cli.add_argument("--dram-mb", type=int, default=512, help="working set of the cases that DRAM holds [512]")
    cli.add_argument("--instructions", action="store_true", help="count instructions under valgrind instead")
    args = cli.parse_args()
    isas = args.isa.split(",") if args.isa else list(available)
    for isa in isas:
        if isa not in available:
            fail(f"instruction set {isa!r} is not one of this CPU's: {', '.join(available)}")
    if args.instructions:
        counted = [isa for isa in isas if isa != "avx512"]
        if not counted:
            fail("valgrind does not know AVX-512: choose --isa avx2 or scalar")
        count(build(), counted, args)
    chosen = [
        (isa, case)
        for isa in isas
        for case in cases()
        if _is_chosen(_label(isa, case), args.only) and not (isa == "scalar" and case.in_dram)
    ]
    if not chosen:
        fail(f"no case has all of {args.only!r}")
    measure(build(), chosen, args)


if __name__ == "__main__":
    run_command(main)
