"""What it costs a model to have one region of its MLP at its base alone: which layers `planes` should use whole.

Perplexity on a text is measured once with everything whole, and once for every split region with that region's
residuals left out and all others whole, in the native engine. A layer is as sensitive as the logarithms of its regions'
ratios are together. Never measure on the text that results are reported on.

    found = measure_sensitivity("model.dipper", "wiki.valid.raw")
    write_json("model-order.json", found)           # dipper run model.dipper ... --whole model-order.json:6
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dipper.auto import base_bits
from dipper.budget import EngineConfig, Planner, rss_bytes
from dipper.bundle import Bundle
from dipper.engine import Engine, Settled, settle
from dipper.errors import ConfigError
from dipper.evaluate import PerplexityResult, read_text, relative_change, score_text
from dipper.evaluate_engine import EngineScorer
from dipper.records import provenance
from dipper.tokenizer import Tokenizer

__all__ = ["SCHEMA", "layer_order", "measure_sensitivity"]

SCHEMA = "dipper-sensitivity/1"


def measure_sensitivity(
    bundle: str | Path,
    text: str | os.PathLike[str],
    *,
    window: int = 256,
    limit: int = 2048,
    threads: int | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> dict[str, Any]:
    """Measures every split region of a bundle; all of the model is in DRAM meanwhile.

    Args:
        bundle: split (`dipper pack --base-bits`).
        text: as for `dipper eval`.
        window: positions of a window.
        limit: positions in all.
        threads: None: all cores.
        progress: called with regions done, regions in all, and what the last one was found to cost.

    Returns:
        JSON-able: `regions` with the relative change of perplexity and its standard error each, `order`: the layers,
        the most sensitive first.

    Raises:
        ConfigError: the bundle is not split, or the text or the window cannot be used.
    """
    opened = Bundle.open(bundle)
    split = [r for r, region in enumerate(opened.header["regions"]) if region["base"] is not None]
    if not split:
        raise ConfigError(f"{bundle} has no region with a base of its own: pack it with --base-bits")
    source = read_text(text)
    tokenizer = Tokenizer.open(bundle)
    tokens = np.asarray(tokenizer.encode(source.text, add_bos=False), dtype=np.int32)
    bos_id = tokenizer.bos_id if tokenizer.add_bos else None

    def scored(settled: Settled) -> PerplexityResult:
        with Engine.load(opened, settled) as engine:
            return score_text(EngineScorer(engine), tokens, window=window, bos_id=bos_id, limit=limit)

    whole = scored(settle(opened, EngineConfig(method="dense-resident", context=window, threads=threads)))
    regions = []
    for done, r in enumerate(split):
        change = relative_change(scored(_at_base(opened, r, window, threads)), whole)
        region = opened.header["regions"][r]
        named = {"layer": region["layer"], "kind": region["kind"]}
        regions.append({**named, "change": change["relative"], "stderr": change["relative_stderr"]})
        if progress is not None:
            progress(done + 1, len(split), f"layer {region['layer']} {region['kind']} {change['relative']:+.2%}")
    return {
        "schema": SCHEMA,
        "model": opened.model.name,
        "source_sha256": opened.header["source"]["sha256"],
        "base_bits": base_bits(opened),
        "text": source.path,
        "tokens_sha256": whole.tokens_sha256,
        "n_tokens": whole.n_tokens,
        "window": window,
        "perplexity": whole.perplexity,
        "regions": regions,
        "order": layer_order(regions),
        "provenance": provenance(opened.path).__dict__,
    }


def layer_order(regions: Iterable[dict[str, Any]]) -> list[int]:
    """Layers by what their regions cost together, the most first; ties by number."""
    cost: dict[int, float] = {}
    for region in regions:
        cost[region["layer"]] = cost.get(region["layer"], 0.0) + math.log1p(region["change"])
    return sorted(cost, key=lambda layer: (-cost[layer], layer))


def _at_base(bundle: Bundle, region: int, window: int, threads: int | None) -> Settled:
    """A run with all regions pinned but this one, of which no residual is ever there."""
    config = EngineConfig(method="planes", fetch=0.0, context=window, threads=threads)
    densities = np.ones((bundle.model.n_layers, 2))
    planner = Planner(bundle, config, rss_bytes(), densities, {"factors": [], "means": [], "biases": []})
    only = [int(r == region) for r in range(len(planner.regions))]
    options = {**planner.settings()[0], "refined": only, "pinned": [1 - o for o in only]}
    whole = settle(bundle, replace(config, method="dense-resident", fetch=None))
    return replace(whole, config=config, plan=planner.made(options, None, None))
