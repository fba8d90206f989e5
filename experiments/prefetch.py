"""What a prefetch for the next layer would bring of the units that planes fetch, and what it would read in vain.

    python experiments/prefetch.py SPLIT_BUNDLE --text wiki.valid.raw --mlp-dram 3.6b --fetch 0.28 [--tokens 96]

While a layer computes, the disk could fetch for the next one what a guess of its inputs chooses: with the inputs of the
layer before (the residual stream changes little from layer to layer), or with those of the same layer at the token
before. Guess and truth go through the same `refine`, norms and caches; the caches follow the truth. Of each guess as
many units as the token will fetch, so `hit` is the share of them that it does fetch; the rest is read in vain, and as
much is still to be read. Input regions alone: a GLU region's inputs are not known before its layer's own products.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

from dipper.budget import EngineConfig
from dipper.cache import ColumnCache, refine
from dipper.engine import Engine
from dipper.errors import DipperError
from dipper.evaluate import read_text
from dipper.records import json_line
from dipper.tokenizer import Tokenizer
from dipper.workload import residual_norms


def main() -> None:
    """Reads tokens one by one, then tells the shares."""
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("bundle", type=Path)
    cli.add_argument("--text", type=Path, required=True)
    cli.add_argument("--mlp-dram", default="3.6b")
    cli.add_argument("--fetch", type=float, default=0.28)
    cli.add_argument("--tokens", type=int, default=96)
    args = cli.parse_args()
    ids = Tokenizer.open(args.bundle).encode(read_text(args.text).text[: 40 * args.tokens])[: args.tokens]
    config = EngineConfig(method="planes", mlp_dram=args.mlp_dram, fetch=args.fetch, context=args.tokens + 1)
    with Engine.open(args.bundle, config, simulated=True) as engine:
        regions = engine.bundle.header["regions"]
        inputs = [engine.region_inputs(token)[1] for token in ids]
        options = engine.plan.options
        refined = [r for r, region in enumerate(regions) if region["kind"] == "input" and options["refined"][r]]
        norms = {r: residual_norms(engine.bundle, regions[r]) for r in refined}
    found: dict[str, list[float]] = {"layer before": [], "token before": []}
    for r in refined:
        n_units, n_fetch = -(-regions[r]["n_columns"] // regions[r]["columns_per_unit"]), options["fetch"][r]
        cache = ColumnCache(n_units, options["capacity"][r], config.cache)
        cache.pin(np.arange(options["capacity"][r]))

        def chosen(x: np.ndarray, r: int = r, n_fetch: int = n_fetch, cache: ColumnCache = cache) -> tuple[set, list]:
            region = regions[r]
            done = refine(x, norms[r], region["order"], region["columns_per_unit"], cache.cached, n_fetch)
            return set(done.fetched.tolist()), done.demanded.tolist()

        for t in range(1, len(ids)):
            truth, demanded = chosen(inputs[t][r])
            guesses = {"token before": inputs[t - 1][r]} | ({"layer before": inputs[t][r - 2]} if r >= 2 else {})
            for name, x in guesses.items():
                found[name].append(len(truth & chosen(x)[0]) / max(1, len(truth)))
            cache.step(np.array(demanded, np.int32))
    shares = {name: float(np.mean(hits)) for name, hits in found.items()}
    chance = float(np.mean([options["fetch"][r] / (regions[r]["n_columns"] - options["capacity"][r]) for r in refined]))
    for name, share in shares.items():
        print(
            f"by the {name}: {share:.1%} of a guess is fetched, {1 - share:.1%} read in vain (by chance {chance:.1%})"
        )
    print(
        json_line({"benchmark": "prefetch", "hit": shares, "chance": chance, "n_tokens": len(ids), "fetch": args.fetch})
    )


if __name__ == "__main__":
    try:
        main()
    except DipperError as error:
        sys.exit(f"prefetch: {error}")
