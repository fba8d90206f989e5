"""Does the simulator say what the engine then does? Counts to the unit, seconds to the per cent.

    python benchmarks/bench_simulator.py MODEL... [--held] [--rounds 3]

MODEL is a bundle or a name that `dipper pull` knows. In one run, on one disk: a profile of the machine is measured
with the bundle (`dipper doctor --profile`); masks are recorded at gamma = 1, once a density; every setting (mode,
density, gamma, policy, budget) is predicted; only then is the engine run, settings taking turns, and the medians
compared. Settings below gamma = 1 are predicted by a live run of the model with simulated caches. Hits, misses, reads
and flash bytes must be equal; tok/s within 15 % each, median error 7 % (on the held disk: benchmarks/held_disk.sh,
0.5 GB/s, 40,000 reads/s).

The profile is fitted to decodes of its own: dip .5 under LRU at 60 %, dense-resident, and simulated caches. Settings
that equal one of them are marked `fitted`, all others are unseen; both are reported.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from harness import bundle_for, finish, hold_disk, parser, print_table, run_command, spread, text_tokens

LIMIT_EACH, LIMIT_MEDIAN = 0.15, 0.07
COUNTS = ("hits", "misses", "reads", "flash_bytes")


def settings_of() -> list[dict[str, Any]]:
    """Modes x densities x gammas x policies x budgets, each axis at three values or more, not the full product."""
    dip = {"method": "dip"}
    rows = [
        {"method": "dense-stream", "mlp_dram": "40%"},
        {"method": "dense-stream", "mlp_dram": "70%"},
        {**dip, "density": 0.5, "cache": "lru", "mlp_dram": "60%"},  # the profile's own
        {**dip, "density": 0.5, "cache": "lfu", "mlp_dram": "45%"},
        {**dip, "density": 0.5, "cache": "lfu", "mlp_dram": "75%"},
        {**dip, "density": 0.5, "cache": "static", "mlp_dram": "60%"},
        {**dip, "density": 0.6, "cache": "lfu", "mlp_dram": "60%"},
        {**dip, "density": 0.6, "cache": "lfu-decay", "mlp_dram": "75%"},
        {**dip, "density": 0.7, "cache": "lfu", "mlp_dram": "45%"},
        {**dip, "density": 0.7, "cache": "lru", "mlp_dram": "75%"},
        {**dip, "density": 0.7, "cache": "lfu", "mlp_dram": "90%"},
        {**dip, "density": 0.3, "cache": "lfu", "mlp_dram": "60%"},
    ]
    for density, gamma, cache, share in (
        (0.5, 0.5, "lfu", "60%"),
        (0.5, 0.2, "lfu", "60%"),
        (0.5, 0.2, "lru", "75%"),
        (0.6, 0.5, "lfu", "75%"),
        (0.7, 0.5, "lru", "60%"),
        (0.7, 0.2, "lfu-decay", "75%"),
    ):
        rows.append({"method": "dip-ca", "density": density, "gamma": gamma, "cache": cache, "mlp_dram": share})
    return rows


def is_fitted(options: dict[str, Any]) -> bool:
    return options == {"method": "dip", "density": 0.5, "cache": "lru", "mlp_dram": "60%"}


def engine_run(bundle: Path, config: Any, prompt: list[int], n: int) -> tuple[float, dict[str, Any]]:
    from dipper.engine import Engine

    with Engine.open(bundle, config) as engine:
        logits = engine.prefill(prompt)
        engine.reset_counters()
        start = time.perf_counter()
        for _ in range(n):
            logits = engine.step(int(logits.argmax()))
        seconds = time.perf_counter() - start
        counters = engine.counters()
    ledger = {name: 1e3 * s / n for name, s in counters.ledger_s.items()}
    return n / seconds, {**{name: getattr(counters, name) for name in COUNTS}, "ledger_ms": ledger}


def measure(path: Path, args: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    from dataclasses import asdict

    from dipper.budget import EngineConfig
    from dipper.bundle import Bundle
    from dipper.profile import measure_profile
    from dipper.simulator import predict
    from dipper.workload import ModelWorkload, Setting

    bundle = Bundle.open(path)
    ids, bos = text_tokens(path, args.text)
    prompt = ([] if bos is None else [bos]) + ids[: args.prompt]
    context = len(prompt) + args.tokens + 1
    device = measure_profile(path, progress=lambda what: print(f"{path.name}: {what}", file=sys.stderr))
    workload = ModelWorkload(bundle, prompt, n_tokens=args.tokens)
    configs = [EngineConfig(context=context, **options) for options in settings_of()]
    settings = [Setting.plan_for(bundle, config) for config in configs]
    sparse = [s for s in settings if s.config.prunes]
    counted = dict(zip(map(id, sparse), workload.traffic(sparse), strict=True))
    predicted = [
        predict(s, counted.get(id(s)), device, n_prompt=workload.n_prompt, n_tokens=args.tokens) for s in settings
    ]
    runs: list[list[Any]] = [[] for _ in settings]
    for round_ in range(args.rounds):
        for i, config in enumerate(configs):
            print(f"{path.name}: round {round_ + 1}, {i + 1}/{len(configs)}", end="\r", file=sys.stderr)
            runs[i].append(engine_run(path, config, prompt, args.tokens))
    rows = []
    for options, setting, found, measured in zip(settings_of(), settings, predicted, runs, strict=True):
        traffic = counted.get(id(setting))
        exact = None
        if traffic is not None:
            exact = all({n: run[n] for n in COUNTS} == {n: traffic.totals[n] for n in COUNTS} for _, run in measured)
        speed = spread([tok_per_s for tok_per_s, _ in measured])
        error = float(found.tok_per_s / speed["median"] - 1)
        middle = sorted(measured, key=lambda run: run[0])[(len(measured) - 1) // 2][1]
        rows.append(
            {
                "model": path.name.split("-")[0].removesuffix(".dipper"),
                "method": options["method"],
                "density": options.get("density"),
                "gamma": options.get("gamma"),
                "cache": options.get("cache"),
                "mlp_dram": options["mlp_dram"],
                "hits": None if traffic is None else traffic.totals["hits"] / traffic.totals["selected"],
                "mb": middle["flash_bytes"] / args.tokens / 1e6,
                "reads": middle["reads"] / args.tokens,
                "exact": exact,
                "predicted": found.tok_per_s,
                "measured": speed["median"],
                "p20": speed["p20"],
                "p80": speed["p80"],
                "error": error,
                "fitted": is_fitted(options),
                "ok": bool(exact is not False and (not args.held_limits or abs(error) <= LIMIT_EACH)),
                "ledger_ms": middle["ledger_ms"],
                "predicted_ms": {name: 1e3 * s / args.tokens for name, s in found.ledger_s.items()},
                "sustained_ms": 1e3 * found.sustained_s / args.tokens,
            }
        )
    return rows, asdict(device)


def main() -> None:
    cli = parser(__doc__)
    cli.add_argument("models", nargs="+", metavar="MODEL", help="bundle, or a name that `dipper pull` knows")
    cli.add_argument("--text", type=Path, required=True, help="text the prompt is cut from")
    cli.add_argument("--prompt", type=int, default=64, help="prompt tokens [64]")
    cli.add_argument("--tokens", type=int, default=64, help="decoded tokens [64]")
    cli.add_argument("--rounds", type=int, default=3)
    cli.add_argument("--workdir", type=Path, default=Path("bundles"), help="where bundles are packed [bundles]")
    cli.add_argument("--held", action="store_true", help="under benchmarks/held_disk.sh; tok/s then has its limits")
    cli.add_argument(
        "--held-limits", action="store_true", help="the limits on tok/s, whatever the disk (set by --held)"
    )
    args = cli.parse_args()
    bundles = [bundle_for(spec, "source", args.workdir) for spec in args.models]
    if args.held:
        sys.argv.append("--held-limits")
        sys.stdout.flush()
        hold_disk(bundles[0])
    rows, profiles = [], {}
    for bundle in bundles:
        found, profiles[bundle.name] = measure(bundle, args)
        rows += found
    hidden = ("ledger_ms", "predicted_ms", "fitted", "sustained_ms")
    print_table([{k: v for k, v in row.items() if k not in hidden} for row in rows])
    errors = {
        name: [abs(row["error"]) for row in rows if row["fitted"] is fitted]
        for name, fitted in (("fitted", True), ("unseen", False))
    }
    summary = {
        "settings": len(rows),
        "exact": sum(row["exact"] is True for row in rows),
        "inexact": sum(row["exact"] is False for row in rows),
        "median_error": float(np.median([abs(row["error"]) for row in rows])),
        "largest_error": max(abs(row["error"]) for row in rows),
        **{f"median_error_{name}": float(np.median(e)) for name, e in errors.items() if e},
        **{f"largest_error_{name}": max(e) for name, e in errors.items() if e},
    }
    print_table([summary])
    if args.held_limits and summary["median_error"] > LIMIT_MEDIAN:
        rows[0]["ok"] = False
    finish("simulator", rows, bundles, summary=summary, held=args.held_limits, profiles=profiles)


if __name__ == "__main__":
    run_command(main)
