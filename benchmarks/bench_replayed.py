"""What a replay of recorded scores is worth: its counts against live runs under the same settings.

    python benchmarks/bench_replayed.py MODEL... --text wiki.valid.raw

Below gamma = 1, and at another density, activations depend on the masks before them, so scores recorded at gamma = 1
are not those that the model would have had. Per model one trace is recorded (gamma 1, density 0.7, a text); its scores
are ranked again under each setting (`replayed`), and the model is run under it (`live`). Errors: hit rate in points,
flash bytes and reads in per cent.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from harness import bundle_for, finish, parser, print_table, run_command, text_tokens

DENSITY = 0.7
SETTINGS = [
    (density, gamma, cache, share)
    for density in (0.5, 0.7)
    for gamma, cache, share in (
        (1.0, "lfu", "60%"),
        (0.5, "lfu", "60%"),
        (0.5, "lru", "75%"),
        (0.2, "lfu", "60%"),
        (0.2, "lru", "75%"),
    )
    if (density, gamma) != (DENSITY, 1.0)
]


def measure(path: Path, text: Path, n_prompt: int, n_tokens: int) -> list[dict[str, Any]]:
    from dipper.budget import EngineConfig
    from dipper.bundle import Bundle
    from dipper.engine import Engine
    from dipper.workload import ModelWorkload, Setting, TraceWorkload

    bundle = Bundle.open(path)
    ids, bos = text_tokens(path, text)
    ids = ([] if bos is None else [bos]) + ids
    prompt, rest = ids[:n_prompt], ids[n_prompt : n_prompt + n_tokens]
    context = n_prompt + n_tokens
    live = ModelWorkload(bundle, prompt, text=rest)
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "scores.trace"
        config = EngineConfig(density=DENSITY, mlp_dram="1000b", context=context, trace=trace)
        with Engine.open(path, config, simulated=True) as engine:
            engine.prefill(prompt)
            engine.advance(rest)
        replayed = TraceWorkload(bundle, trace)
    rows = []
    for density, gamma, cache, share in SETTINGS:
        method = {"method": "dip"} if gamma == 1 else {"method": "dip-ca", "gamma": gamma}
        config = EngineConfig(density=density, cache=cache, mlp_dram=share, context=context, **method)
        setting = Setting.plan_for(bundle, config)
        a, b = (workload.traffic([setting])[0].totals for workload in (replayed, live))
        rows.append(
            {
                "model": path.stem,
                "density": density,
                "gamma": gamma,
                "cache": cache,
                "mlp_dram": share,
                "replayed_hits": a["hits"] / a["selected"],
                "live_hits": b["hits"] / b["selected"],
                "points": 100 * (a["hits"] / a["selected"] - b["hits"] / b["selected"]),
                "flash_bytes_%": 100 * (a["flash_bytes"] / b["flash_bytes"] - 1),
                "reads_%": 100 * (a["reads"] / b["reads"] - 1),
            }
        )
    return rows


def main() -> None:
    cli = parser(__doc__)
    cli.add_argument("models", nargs="+", metavar="MODEL", help="bundle, or a name that `dipper pull` knows")
    cli.add_argument("--text", type=Path, required=True, help="text that the model reads")
    cli.add_argument("--prompt", type=int, default=128, help="prompt tokens [128]")
    cli.add_argument("--tokens", type=int, default=256, help="tokens after it [256]")
    cli.add_argument("--workdir", type=Path, default=Path("bundles"), help="where bundles are packed [bundles]")
    args = cli.parse_args()
    bundles = [bundle_for(spec, "source", args.workdir) for spec in args.models]
    rows = [row for bundle in bundles for row in measure(bundle, args.text, args.prompt, args.tokens)]
    print_table(rows)
    worst = {
        name: float(np.max(np.abs([row[name] for row in rows]))) for name in ("points", "flash_bytes_%", "reads_%")
    }
    print_table([{"settings": len(rows), **{f"worst_{name}": value for name, value in worst.items()}}])
    finish("replayed", rows, bundles, worst=worst)


if __name__ == "__main__":
    run_command(main)
