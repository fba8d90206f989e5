"""The kind that trains: what LoRA wins back of what a pruning rule loses (`dipper.compensation`)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from dipper.checksums import code_sha256, file_sha256
from dipper.kinds.evaluated import load, task_files
from dipper.kinds.kind import Context, Kind, Options, Result, stamp

__all__ = ["COMPENSATION", "FILES"]

# Under the data folder: what it trains and scores on.
FILES = (
    "text/c4_train_docs_a.jsonl", "text/c4_train_docs_b.jsonl", "text/wikipedia_en_sample.txt",
    "wikitext-2-raw/wiki.train.first5k.txt", "wikitext-2-raw/wiki.valid.raw", "wikitext-2-raw/wiki.test.raw",
)  # fmt: skip

_SOURCES = ("kinds/compensated",)


@lru_cache(maxsize=1)
def _bench(model: str, device: str, threads: int, data: Path, state: Path, config: str) -> Any:
    """A `compensation.Bench` and what it has measured and trained so far; config: JSON of its options."""
    from dipper.compensation import Bench

    state.mkdir(parents=True, exist_ok=True)
    return Bench(load(model, device, threads)[0], data, json.loads(config), source=model, state=state)


def _compensation(options: Options, context: Context) -> Result:
    """The cells of a group, by name."""
    import torch

    config = {name: value for name, value in options.items() if name != "group"}
    files = [context.file(name) for name in FILES]
    text = json.dumps(config, sort_keys=True)
    # Adapters serve the cells of other processes; another configuration, model, code or data has its own.
    told = [text, stamp(context.model), code_sha256(_SOURCES), context.device.partition(":")[0]]
    told += [file_sha256(path) for path in files]
    state = context.workdir / f"adapters-{context.name}-{sha256(json.dumps(told).encode()).hexdigest()[:12]}"
    earlier = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")  # TF32 where there is some, the same for all that is compared
    try:
        data = files[0].parent.parent
        bench = _bench(context.model, context.device, context.threads, data, state, text)
        return {"cells": json.loads(json.dumps(bench.group(options["group"])))}
    finally:
        torch.set_float32_matmul_precision(earlier)


def _compensation_data(options: Mapping[str, Any]) -> tuple[str, ...]:
    return (*FILES, *(task_files(options["tasks"]["names"]) if options["group"] == "tasks" else ()))


_OPTIONS = frozenset(
    (
        "group", "densities", "window", "tokens", "tokens_with_caches", "held_out_windows", "batch_eval", "methods",
        "train", "search", "caches", "residents", "tasks",
    )
)  # fmt: skip
COMPENSATION = Kind(
    name="compensation",
    measure=_compensation,
    options=_OPTIONS,
    required=_OPTIONS,
    sources=_SOURCES,
    gpu=True,
    needs_data=_compensation_data,
    varies=("cells",),  # training sums in another order every time
    within=("cells.*.*.perplexity", "cells.*.*.recovered", "cells.*.tasks.*.acc"),
)  # fmt: skip
