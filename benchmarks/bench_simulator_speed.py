"""How fast the simulator is: the closed loop in column accesses a second, and a 14 B model's shape from end to end.

    python benchmarks/bench_simulator_speed.py [--tokens 1000] [--model phi-3-medium]

First, per policy and size: scores -> cache-aware selection (gamma 0.5, density 0.5) -> cache step -> read plan, one
core, millions of scored columns a second, median and p20/p80 over repeats; at least 25. Then the shape with generated
scores, closed loop, LFU, a quarter of the columns cached, one process on one core, generation included: processor
seconds and wall time; at most 60 for 1000 tokens.
"""

from __future__ import annotations

import os
import time
from typing import Any

import numpy as np

from harness import finish, parser, print_table, run_command, spread

LEAST_MCOLUMNS = 25.0
MOST_SECONDS = 60.0
SIZES = (576, 1536, 4864, 5120, 17920)
POLICIES = ("lru", "lfu", "lfu-decay")


def loop_speed(n: int, policy: str, repeats: int) -> dict[str, Any]:
    from dipper import _core
    from dipper.cache import ColumnCache
    from dipper.generator import ScoreGenerator

    n_tokens = max(8, 400_000 // n)
    stream = ScoreGenerator.load().region("input", 0.5, n, seed=1)
    cache = ColumnCache(n, n // 2, policy)
    speeds = []
    for repeat in range(repeats + 1):
        scores = stream.scores(n_tokens)
        start = time.perf_counter()
        _core.replay_scores(scores, n // 2, 0.5, offset=0, record_bytes=4096, alignment=4096, cache=cache)
        if repeat > 0:
            speeds.append(n * n_tokens / (time.perf_counter() - start) / 1e6)
    found = spread(speeds)
    rounded = {name: round(value, 1) for name, value in found.items()}
    return {"columns": n, "cache": policy, **rounded, "ok": found["median"] >= LEAST_MCOLUMNS}


def whole_model(name: str, n_tokens: int) -> dict[str, Any]:
    from dipper.budget import EngineConfig
    from dipper.generator import ScoreGenerator
    from dipper.published import published_bundle
    from dipper.workload import GeneratedWorkload, Setting

    bundle = published_bundle(name)
    config = EngineConfig(method="dip-ca", gamma=0.5, density=0.5, context=n_tokens + 16)
    setting = Setting.plan_for(bundle, config, capacity_share=0.25, host_bytes=0)
    workload = GeneratedWorkload(bundle, ScoreGenerator.load(), n_prompt=1, n_tokens=n_tokens)
    start, started = time.perf_counter(), time.process_time()
    traffic = workload.traffic([setting])[0]
    seconds, busy = time.perf_counter() - start, time.process_time() - started
    columns = sum(r["n_columns"] for r in bundle.header["regions"]) * n_tokens
    return {
        "model": name,
        "tokens": n_tokens,
        "Mcolumns": columns / 1e6,
        "cpu_s": busy,
        "wall_s": seconds,
        "Mcolumns_per_cpu_s": columns / busy / 1e6,
        "hits": traffic.totals["hits"] / traffic.totals["selected"],
        "ok": bool(busy <= MOST_SECONDS * n_tokens / 1000),
    }


def main() -> None:
    cli = parser(__doc__)
    cli.add_argument("--model", default="phi-3-medium")
    cli.add_argument("--tokens", type=int, default=1000)
    cli.add_argument("--repeats", type=int, default=15)
    args = cli.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[0]})  # one core
    loops = [loop_speed(n, policy, args.repeats) for n in SIZES for policy in POLICIES]
    print_table(loops)
    print("least median:", f"{np.min([row['median'] for row in loops]):.1f} M columns/s")
    whole = whole_model(args.model, args.tokens)
    print_table([whole])
    finish("simulator-speed", [*loops, whole], [])


if __name__ == "__main__":
    run_command(main)
