"""Time of selection and cache bookkeeping for one token and region; prints tables, then one JSON line.

Scores follow a log-normal column scale times a normal variable, rounded to bf16 (so that scores tie as in a model).
`scan` runs native loops over T tokens: without a cache for top_k, with one for top_k + step; each figure is the
median over repeats of (time / T), a step the difference of the two. The caches hold half of the columns, are warm,
and see scores that drift (each token keeps 0.7 of the last one's variable), so every step misses and most evict.
The second table is the closed loop of an evaluation: cache-aware selection at gamma = 0.5 and the policy's step, one
core, in millions of scored columns per second.

    python benchmarks/bench_selection.py [--tokens 16] [--repeats 200]
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable

import numpy as np

from dipper.cache import ColumnCache, n_selected, scan

SIZES = [576, 1536, 4864, 14336]
LOOP_SIZES = [576, 896, 1536, 4864]
LOOP_DENSITIES = [0.5, 0.6, 0.7]
POLICIES = ["lru", "lfu", "lfu-decay"]


def drifting_scores(n_tokens: int, n: int, seed: int) -> np.ndarray:
    """[n_tokens, n] fp32 with bf16 values."""
    rng = np.random.default_rng(seed)
    scale = np.exp(0.5 * rng.standard_normal(n))
    state, rows = rng.standard_normal(n), []
    for _ in range(n_tokens):
        state = 0.7 * state + 0.51**0.5 * rng.standard_normal(n)
        rows.append(state * scale)
    return (np.asarray(rows, dtype=np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32)


def ns_per_token(run: Callable[[], object], n_tokens: int) -> float:
    start = time.perf_counter_ns()
    run()
    return (time.perf_counter_ns() - start) / n_tokens


def spread(times: list[float]) -> dict[str, float]:
    p20, median, p80 = np.percentile(times, [20, 50, 80])
    return {"p20_ns": round(p20, 1), "median_ns": round(median, 1), "p80_ns": round(p80, 1)}


def measure(n: int, n_tokens: int, repeats: int) -> dict[str, object]:
    """Figures of one region size, k = n / 2; plain and cached scans alternate, so that noise hits both."""
    k = n // 2
    plain, aware = [], []
    stepped: dict[str, list[float]] = {policy: [] for policy in POLICIES}
    caches = {policy: ColumnCache(n, n // 2, policy) for policy in POLICIES}
    for cache in caches.values():
        scan(drifting_scores(256, n, seed=0), k, 1.0, cache, counted=False)
    gamma_cache = ColumnCache(n, n // 2, "static")
    gamma_cache.pin(np.arange(0, 2 * (n // 2), 2))
    for repeat in range(repeats):
        scores = drifting_scores(n_tokens, n, seed=1 + repeat)
        base = ns_per_token(lambda scores=scores: scan(scores, k), n_tokens)
        plain.append(base)
        aware.append(ns_per_token(lambda scores=scores: scan(scores, k, 0.5, gamma_cache), n_tokens))
        for policy, cache in caches.items():
            both = ns_per_token(lambda scores=scores, cache=cache: scan(scores, k, 1.0, cache), n_tokens)
            stepped[policy].append(both - base)
    steps = {
        policy: spread(stepped[policy])
        | {
            "misses_per_token": round(cache.misses / (repeats * n_tokens), 1),
            "evictions_per_token": round(cache.evictions / (repeats * n_tokens), 1),
        }
        for policy, cache in caches.items()
    }
    return {"n": n, "k": k, "top_k": spread(plain), "top_k_gamma_and_static_step": spread(aware), "step": steps}


def measure_loop(n: int, policy: str, n_tokens: int, repeats: int) -> dict[str, object]:
    """Closed loop of one region size and policy, half of the columns cached, over the densities of an evaluation."""
    mcolumns_per_s = {}
    for density in LOOP_DENSITIES:
        k, cache, times = n_selected(density, n), ColumnCache(n, n // 2, policy), []
        scan(drifting_scores(256, n, seed=0), k, 0.5, cache)
        for repeat in range(repeats):
            scores = drifting_scores(n_tokens, n, seed=1 + repeat)
            times.append(ns_per_token(lambda s=scores, k=k, c=cache: scan(s, k, 0.5, c), n_tokens))
        p20, median, p80 = np.percentile(times, [20, 50, 80])
        mcolumns_per_s[str(density)] = {
            name: round(1e3 * n / ns, 1) for name, ns in (("p20", p80), ("median", median), ("p80", p20))
        }
    return {"n": n, "policy": policy, "gamma": 0.5, "capacity": n // 2, "mcolumns_per_s": mcolumns_per_s}


def main() -> None:
    parser = argparse.ArgumentParser(description="Time of selection and cache bookkeeping.")
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=200)
    options = parser.parse_args()
    rows = [measure(n, options.tokens, options.repeats) for n in SIZES]
    print(f"{'n':>6} {'k':>6} {'top_k ns':>10} {'top_k γ ns*':>12}", *(f"{'step ' + p + ' ns':>18}" for p in POLICIES))
    for row in rows:
        print(f"{row['n']:>6} {row['k']:>6} {row['top_k']['median_ns']:>10.0f}", end=" ")
        print(f"{row['top_k_gamma_and_static_step']['median_ns']:>12.0f}", end=" ")
        print(
            *(f"{row['step'][p]['median_ns']:>10.0f} ({row['step'][p]['evictions_per_token']:>5.0f})" for p in POLICIES)
        )
    print("medians; in brackets evictions per token; * with the step of a static cache (no admissions)\n")
    loops = [measure_loop(n, policy, options.tokens, options.repeats) for policy in POLICIES for n in LOOP_SIZES]
    print(f"{'closed loop':<12} {'n':>6}", *(f"{'density ' + str(d):>14}" for d in LOOP_DENSITIES))
    for loop in loops:
        cells = (f"{speed['median']:>14.1f}" for speed in loop["mcolumns_per_s"].values())
        print(f"{loop['policy']:<12} {loop['n']:>6}", *cells)
    print("10^6 scored columns per second and core, medians")
    machine = {"machine": platform.machine(), "python": platform.python_version(), "tokens": options.tokens}
    print(json.dumps({"benchmark": "selection", **machine, "repeats": options.repeats, "rows": rows, "loops": loops}))


if __name__ == "__main__":
    main()
