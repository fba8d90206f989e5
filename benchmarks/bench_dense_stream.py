"""How close dense streaming comes to what the disk and the processor allow.

    python benchmarks/bench_dense_stream.py MODEL... [--mlp-dram 30% --mlp-dram 60%] [--held]

MODEL is a bundle or a name that `dipper pull` knows. With a share of the MLP pinned, the rest is streamed for every
token, which cannot be faster than the bytes at the disk's sequential bandwidth, nor than the same token with everything
resident. Turn by turn in one run: a dense-resident decode, then for every share a sequential pass over the bundle (the
reader's own 1 MiB direct reads), a dense-stream decode, and a pass again. `ratio` is

    token time / max(streamed bytes / mean bandwidth of the two passes, token time of the round's dense-resident decode)

by round, then its median. `--held` runs everything under benchmarks/held_disk.sh (0.5 GB/s, 40,000 reads/s; root).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from harness import (
    bundle_for,
    fail,
    finish,
    greedy,
    hold_disk,
    interleave,
    open_engine,
    parser,
    print_table,
    prompt_tokens,
    run_command,
    spread,
)

LIMIT = 1.15
READ_BYTES = 1 << 20
DEPTH = 32


class Disk:
    """Sequential bandwidth of the disk, on the file that the engine streams from."""

    def __init__(self, bundle: Path, pass_bytes: int) -> None:
        from dipper._core import FlashReader

        self.reader = FlashReader(str(bundle / "flash.bin"), depth=DEPTH)
        if not self.reader.direct:
            fail(f"{bundle}: no O_DIRECT here ({self.reader.direct_note}), so reads would be the page cache's")
        n_in_file = self.reader.file_bytes // READ_BYTES
        if n_in_file == 0:
            fail(f"{bundle}/flash.bin has {self.reader.file_bytes} bytes, less than one read of {READ_BYTES}")
        order = np.arange(max(pass_bytes // READ_BYTES, 1)) % n_in_file
        self.offsets = (order * READ_BYTES).astype(np.uint64)

    def gbps(self) -> float:
        """Of one pass; a pass before it uses up what a held disk lets through at once after it has been idle."""
        self.reader.read_batch(self.offsets, READ_BYTES)
        return len(self.offsets) * READ_BYTES / self.reader.read_batch(self.offsets, READ_BYTES) / 1e9


@dataclass(frozen=True)
class Streamed:
    """One dense-stream decode between two passes over the disk."""

    gbps: float
    token_s: float
    bytes_per_token: float


def resident_turn(engine: Any, prompt: list[int], n: int) -> float:
    return greedy(engine, prompt, n).token_s


def stream_turn(engine: Any, disk: Disk, prompt: list[int], n: int) -> Streamed:
    before = disk.gbps()
    run = greedy(engine, prompt, n)
    after = disk.gbps()
    return Streamed((before + after) / 2, run.token_s, engine.counters().flash_bytes / n)


def measure(bundle: Path, args: Any) -> list[dict[str, Any]]:
    prompt = prompt_tokens(bundle, args.prompt)
    common = {"context": args.prompt + args.tokens + 1, "threads": args.threads}
    resident = open_engine(bundle, method="dense-resident", **common)
    disk = Disk(bundle, args.pass_mb << 20)
    turns: dict[str, Any] = {"resident": lambda: resident_turn(resident, prompt, args.tokens)}
    for share in args.mlp_dram:
        engine = open_engine(bundle, method="dense-stream", mlp_dram=share, **common)
        turns[share] = lambda engine=engine: stream_turn(engine, disk, prompt, args.tokens)
    runs = interleave(turns, args.rounds)

    resident_s = spread(runs["resident"])["median"]
    rows = []
    for share in args.mlp_dram:
        rounds = list(zip(runs[share], runs["resident"], strict=True))
        ratios = [run.token_s / max(run.bytes_per_token / (run.gbps * 1e9), base) for run, base in rounds]
        ratio = spread(ratios)
        gbps = spread([run.gbps for run in runs[share]])["median"]
        bytes_per_token = spread([run.bytes_per_token for run in runs[share]])["median"]
        rows.append(
            {
                "model": bundle.name,
                "mlp_dram": share,
                "token_ms": 1e3 * spread([run.token_s for run in runs[share]])["median"],
                "resident_ms": 1e3 * resident_s,
                "read_ms": bytes_per_token / gbps / 1e6,
                "streamed_mb": bytes_per_token / 1e6,
                "disk_gbps": gbps,
                "ratio": ratio["median"],
                "p20": ratio["p20"],
                "p80": ratio["p80"],
                "ok": ratio["median"] <= LIMIT,
            }
        )
    return rows


def main() -> None:
    cli = parser(__doc__)
    cli.add_argument("models", nargs="+", metavar="MODEL", help="bundle, or a name that `dipper pull` knows")
    cli.add_argument("--mlp-dram", action="append", help="DRAM of the MLP; may be repeated [30%% 60%% 80%%]")
    cli.add_argument("--tokens", type=int, default=32, help="decoded tokens per turn [32]")
    cli.add_argument("--prompt", type=int, default=16, help="prompt tokens [16]")
    cli.add_argument("--rounds", type=int, default=7)
    cli.add_argument("--pass-mb", type=int, default=128, help="MiB of a sequential pass [128]")
    cli.add_argument("--threads", type=int, default=2)
    cli.add_argument("--workdir", type=Path, default=Path("bundles"), help="where bundles are packed [bundles]")
    cli.add_argument("--held", action="store_true", help="under benchmarks/held_disk.sh")
    args = cli.parse_args()
    args.mlp_dram = args.mlp_dram or ["30%", "60%", "80%"]
    bundles = [bundle_for(spec, "source", args.workdir) for spec in args.models]
    if args.held:
        sys.stdout.flush()
        hold_disk(bundles[0])
    rows = [row for bundle in bundles for row in measure(bundle, args)]
    print_table(rows)
    finish("dense-stream", rows, bundles, threads=args.threads, n_tokens=args.tokens, rounds=args.rounds)


if __name__ == "__main__":
    run_command(main)
