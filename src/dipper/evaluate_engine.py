"""The native engine scores a text: `evaluate` with the real cache and the real reads.

record = evaluate_bundle("model.dipper", "wiki.test.raw", [EngineConfig(method="dip", density=0.6)])
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dipper.bundle import Bundle
from dipper.engine import Engine, EngineConfig, Plan, settle
from dipper.errors import ConfigError, DipperError
from dipper.evaluate import (
    PerplexityResult,
    Progress,
    ResultFile,
    WindowScore,
    eval_record,
    ids_sha256,
    read_text,
    relative_change,
    score_text,
    text_windows,
)
from dipper.records import EvalRecord, Traffic, engine_fields, header_sha256, method_fields
from dipper.tokenizer import Tokenizer

__all__ = ["EngineScorer", "evaluate_bundle", "perplexity"]


class EngineScorer:
    """The native engine, real cache and all."""

    batch = 1

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    @property
    def context(self) -> int:
        """Positions of the engine's KV cache."""
        return self.engine.context

    def score(self, windows: Sequence[Sequence[int]]) -> list[WindowScore]:
        """See `Scorer`."""
        return [self._score_cold(list(ids)) for ids in windows]

    def _score_cold(self, ids: list[int]) -> WindowScore:
        engine = self.engine
        engine.reset()
        engine.reset_cache()
        engine.reset_counters()
        nll = engine.score(ids)
        if not np.isfinite(nll).all():
            at = int(np.flatnonzero(~np.isfinite(nll))[0]) + 1
            raise DipperError(
                f"The score of token {at} of a window is {nll[at - 1]}: the weights or the computation are broken. "
                "Check the bundle with `dipper inspect`."
            )
        density = method_fields(engine.config, engine.densities)["density"]
        if density is None and engine.config.method != "planes":  # of planes it is not counted
            density = 1.0
        return WindowScore(
            nll=math.fsum(nll.tolist()),
            tokens=len(nll),
            touched=density,
            traffic=Traffic().add(engine.counters()),
        )

    def fields(self) -> dict[str, Any]:
        """See `Scorer`."""
        bundle = self.engine.bundle
        return {
            "engine": "native",
            "model": bundle.model.name,
            "device": "cpu",
            "dtype": None,
            "mlp_bytes": bundle.mlp_bytes,
            **engine_fields(self.engine),
        }


def perplexity(engine: Engine, tokens: Sequence[int] | npt.NDArray[Any], **options: Any) -> PerplexityResult:
    """Scores a text with an open native engine: `score_text` and its options."""
    return score_text(EngineScorer(engine), tokens, **options)


def _return_free_memory() -> None:
    """Gives the heap's free pages back, where the C library can.

    Encoding a long text takes a hundred times its size for a moment; what the heap keeps of that, or of an engine that
    was closed, would count as the host's part of the next DRAM budget.
    """
    with contextlib.suppress(AttributeError, OSError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


def _check_config(config: EngineConfig) -> None:
    """Refuses what would have no effect here, or measure something else than it says."""
    if config.prunes and config.cache == "static":
        raise ConfigError(
            "A static cache holds the columns that a prompt used most, and windows have no prompt, so it would stay "
            "empty: use --cache lru, lfu or lfu-decay."
        )
    if config.trace is not None:
        raise ConfigError(
            f"A trace ({config.trace}) tells what decoding reads, and an evaluation streams whole layers: leave it "
            "out, or use `dipper run --trace`."
        )


def evaluate_bundle(
    bundle: str | Path,
    text: str | os.PathLike[str],
    configs: Sequence[EngineConfig],
    *,
    window: int = 1024,
    limit: int | None = None,
    rows_joined: bool | None = None,
    seed: int = 0,
    out: str | os.PathLike[str] | None = None,
    on_plan: Callable[[Plan], None] | None = None,
    progress: Progress | None = None,
) -> EvalRecord:
    """Scores a text with one engine, or with two, one after the other, to compare.

    Args:
        bundle: the model.
        text: a UTF-8 file.
        configs: what to score, and optionally what to compare it with.
        window: positions of a window.
        limit: use at most this many positions.
        rows_joined: see `read_text`.
        seed: of the bootstrap.
        out: keep the result here; a run that was interrupted continues from it.
        on_plan: called with each engine's plan before it loads.
        progress: see `score_text`.

    Returns:
        The record of the first configuration; `against` holds the second's.

    Raises:
        ConfigError: the text, the window or a configuration cannot be used, or `out` holds another run's result.
    """
    for config in configs:
        _check_config(config)
    source = read_text(text, rows_joined)
    tokenizer = Tokenizer.open(bundle)
    tokens = np.asarray(tokenizer.encode(source.text, add_bos=False), dtype=np.int32)
    _return_free_memory()
    bos_id = tokenizer.bos_id if tokenizer.add_bos else None
    windows = text_windows(source, tokens, window, bos_id=bos_id, limit=limit)  # before anything is loaded
    file = ResultFile(
        out,
        {
            "engine": "native",
            "model_sha256": header_sha256(bundle),
            "tokens_sha256": ids_sha256(windows, bos_id),
            "window": window,
            "methods": [_scoring(config, bundle) for config in configs],
            "seed": seed,
        },
    )
    if file.record is not None:
        return EvalRecord.from_dict(file.record)
    scored = []
    for i, config in enumerate(configs):
        with Engine.open(bundle, config, on_plan=on_plan) as engine:
            scorer = EngineScorer(engine)
            result = score_text(
                scorer, tokens, window=window, bos_id=bos_id, limit=limit, seed=seed, progress=progress,
                earlier=file.windows(str(i)), save=partial(file.save_windows, str(i)),
            )  # fmt: skip
            scored.append((result, eval_record(scorer, source, result)))
        _return_free_memory()  # so that the next engine's budget does not pay for this one
    (result, record), *others = scored
    against = None
    for reference, other in others:
        against = {"record": other.as_dict(), **relative_change(result, reference, seed)}
    record = replace(record, config=file.config, against=against)
    file.finish(record.as_dict())
    return record


def _scoring(config: EngineConfig, bundle: str | Path) -> dict[str, Any]:
    """The options that can change a score; reader, kernels and threads cannot.

    What depends on a disk measured now is what came of it, so that no result is continued by another method.
    """
    same = ("threads", "reader", "isa", "trace", "cold", "device_profile")
    measured: dict[str, Any] = {}
    if config.method == "auto" or config.io_budget is not None or isinstance(config.whole, str):
        settled = settle(Bundle.open(bundle), config)
        config = settled.config
        measured = {"fetch_units": settled.plan.options["fetch"]} if config.io_budget is not None else {}
    options = {name: value for name, value in asdict(config).items() if name not in same}
    if config.calibration is not None:
        options["calibration"] = hashlib.sha256(Path(config.calibration).read_bytes()).hexdigest()
    return options | measured
