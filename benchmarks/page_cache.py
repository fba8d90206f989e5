"""Whether the bytes that the engine says it read from flash are the bytes that were read.

    python benchmarks/page_cache.py MODEL [--method dip --density .6 --mlp-dram 50%]

MODEL is a bundle or a name that `dipper pull` knows. Over the same decoded tokens: the engine's `flash_bytes`, the
`read_bytes` of this process (/proc/self/io: what it caused to be fetched from storage), and the sectors that the block
device served. If a page cache served reads, the last two would be smaller; if the engine read through it with
read-ahead, larger. The device counts everybody's reads: run it on an idle disk, whose traffic before and after is
reported.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from harness import bundle_for, fail, finish, open_engine, parser, print_table, prompt_tokens, run_command

LIMIT = 0.02
WARM_UP = 4  # tokens before the count: lazy work of the first steps is done then
SECTOR_BYTES = 512  # of /sys/dev/block/*/stat, whatever the device's own


def device_stat(path: Path) -> Path:
    """The statistics file of the block device that holds a path."""
    number = path.stat().st_dev
    stat = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}/stat")
    if not stat.exists():
        fail(f"{path} is not directly on a block device (its number is {number:#x}); give --device, as in vda")
    return stat


def device_bytes(stat: Path) -> int:
    return int(stat.read_text().split()[2]) * SECTOR_BYTES


def process_bytes() -> int:
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["read_bytes"])


def main() -> None:
    cli = parser(__doc__)
    cli.add_argument("model", metavar="MODEL", help="bundle, or a name that `dipper pull` knows")
    cli.add_argument("--method", default="dip")
    cli.add_argument("--density", type=float, default=0.6)
    cli.add_argument("--mlp-dram", default="50%")
    cli.add_argument("--tokens", type=int, default=64)
    cli.add_argument("--threads", type=int, default=2)
    cli.add_argument("--device", help="block device that holds the bundle, where its file system does not tell")
    cli.add_argument("--workdir", type=Path, default=Path("bundles"), help="where bundles are packed [bundles]")
    args = cli.parse_args()
    bundle = bundle_for(args.model, "source", args.workdir)
    stat = Path(f"/sys/class/block/{args.device}/stat") if args.device else device_stat(bundle / "flash.bin")
    if not stat.exists():
        fail(f"there is no block device {args.device}; `lsblk` lists them")

    prompt = prompt_tokens(bundle, 16)
    engine = open_engine(
        bundle,
        method=args.method,
        density=args.density,
        mlp_dram=args.mlp_dram,
        context=len(prompt) + WARM_UP + args.tokens,
        threads=args.threads,
    )
    token = int(engine.prefill(prompt).argmax())
    for _ in range(WARM_UP):
        token = int(engine.step(token).argmax())
    engine.reset_counters()

    idle_start = device_bytes(stat)
    time.sleep(1.0)
    start_s, process, device = time.perf_counter(), process_bytes(), device_bytes(stat)
    idle_bps = device - idle_start
    for _ in range(args.tokens):
        token = int(engine.step(token).argmax())
    seconds = time.perf_counter() - start_s
    process, device = process_bytes() - process, device_bytes(stat) - device
    idle_start = device_bytes(stat)
    time.sleep(1.0)
    idle_bps = (idle_bps + device_bytes(stat) - idle_start) / 2

    flash = engine.counters().flash_bytes
    if flash == 0:
        fail(f"nothing was read from flash at --mlp-dram {args.mlp_dram}; give less")
    rows = []
    for who, n_bytes in (("engine", flash), ("process", process), ("block device", device)):
        rows.append(
            {
                "counted by": who,
                "mb_per_token": n_bytes / args.tokens / 1e6,
                "bytes": n_bytes,
                "vs_engine": n_bytes / flash - 1,
                "ok": abs(n_bytes / flash - 1) <= LIMIT,
            }
        )
    print_table(rows)
    idle_share = idle_bps * seconds / flash
    print(f"reads of others on an otherwise idle disk: about {100 * idle_share:.2f} % of the engine's")
    more = {"method": args.method, "density": args.density, "mlp_dram": args.mlp_dram, "n_tokens": args.tokens}
    finish("page-cache", rows, [bundle], idle_share=idle_share, **more)


if __name__ == "__main__":
    run_command(main)
