"""The engine: a bundle, a DRAM budget and a method become a plan, then a native decoder that keeps to it.

`Engine.open` does, in this order: read the header, measure the host (what the process holds before any weight), plan
every byte, hand the plan to the caller, allocate and load. A budget that is too small is refused before anything is
loaded.

Methods:
    auto             the one of the others that reads least within the budget and a bounded loss of quality
    dense-resident   every weight in DRAM
    dense-stream     as many regions of the MLP pinned as the budget allows, the rest streamed by large reads,
                     double-buffered
    dip              Dynamic Input Pruning: top-k columns by |x|, column caches, misses read from flash
                     (arXiv 2412.01380)
    planes           the upper bits of all columns resident, the others of the columns that matter most read from flash
                     by units
    dip-ca           the same with Cache-Aware Masking: scores of uncached columns times gamma

Example:
    >>> config = EngineConfig(method="dip", density=0.7, mlp_dram="50%")        # doctest: +SKIP
    >>> with Engine.open("smollm2.dipper", config) as engine:                   # doctest: +SKIP
    ...     logits = engine.prefill([1, 2, 3])
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from . import _core
from .auto import choose, named_layers
from .budget import (
    METHODS,
    EngineConfig,
    Plan,
    Planner,
    calibration_vectors,
    densities_of,
    mean_densities,
    plan_run,
    rss_bytes,
)
from .bundle import Bundle
from .calibration import Calibration
from .errors import BundleError, ConfigError

__all__ = ["METHODS", "Counters", "Engine", "EngineConfig", "Plan", "Settled", "settle"]


@dataclass(frozen=True, kw_only=True)
class Counters:
    """What happened since the last `reset_counters()`; bytes and reads are what was asked of the disk."""

    n_tokens: int
    selected: int
    hits: int
    misses: int
    evictions: int
    useful_bytes: int
    flash_bytes: int
    reads: int
    ledger_s: dict[str, float]

    @property
    def hit_rate(self) -> float | None:
        """Hits over selected columns; None where nothing was selected."""
        return self.hits / self.selected if self.selected else None


@dataclass(frozen=True)
class Settled:
    """What will run: a configuration whose method is no longer auto, why, its calibration, and the plan of all that."""

    config: EngineConfig
    plan: Plan
    why: str
    calibration: Calibration | None
    densities: npt.NDArray[np.float64]
    vectors: dict[str, Any]


def settle(bundle: Bundle, config: EngineConfig, plan: Plan | None = None) -> Settled:
    """Decides everything about a run before any weight is loaded; `plan`: of this configuration, if there is one.

    Raises:
        BudgetError, ConfigError: as `Engine.open`.
        FlashError: the disk, which auto and an io_budget of time measure, could not be read.
    """
    limit = bundle.header["model"]["max_context"]
    if config.context > limit:
        raise ConfigError(f"a context of {config.context} is over the model's {limit}: lower --ctx")
    why = ""
    config = named_layers(bundle, config)
    if config.method == "auto":
        choice = choose(bundle, config)
        config, why = choice.config, choice.why
    calibration = None if config.calibration is None else Calibration.load(config.calibration)
    if calibration is not None:
        calibration.check_model(bundle)
    densities, vectors = densities_of(config, bundle.model.n_layers, calibration), calibration_vectors(calibration)
    plan = plan or Planner(bundle, config, rss_bytes(), densities, vectors).plan()
    return Settled(config, plan, why, calibration, densities, vectors)


class Engine:
    """A loaded bundle; use `Engine.open`. Not for several threads at once.

    Attributes:
        config, plan, bundle: what it was opened with.
        densities: of the input and the GLU columns, means over the layers.
        calibration_sha256: of the calibration's file, None without one.
        notes: fallbacks taken (reader, direct I/O), each said once.
    """

    def __init__(
        self,
        bundle: Bundle,
        config: EngineConfig,
        plan: Plan,
        decoder: Any,
        densities: tuple[float, float],
        calibration_sha256: str | None,
    ) -> None:
        self.bundle = bundle
        self.config = config
        self.plan = plan
        self.densities = densities
        self.calibration_sha256 = calibration_sha256
        self.notes: list[str] = [note for note in decoder.reader_notes if note]
        self._decoder = decoder
        self._trace_partial: Path | None = None

    @classmethod
    def open(
        cls,
        path: str | Path,
        config: EngineConfig | None = None,
        on_plan: Callable[[Plan], None] | None = None,
        *,
        simulated: bool = False,
        plan: Plan | None = None,
    ) -> Engine:
        """Plans, then loads.

        Args:
            path: bundle directory.
            config: how to run it.
            on_plan: called with the plan before anything is loaded.
            simulated: masks, caches, counters and (dip and dip-ca) traces are those of a run under the budget, but all
                weights are in DRAM and nothing is read from flash; `configure` then changes masks and caches of dip and
                dip-ca. With planes tokens are to be taken by `region_inputs` and `logits`, not by `step`.
            plan: of this bundle and configuration, instead of planning.

        Raises:
            BundleError: damaged or newer bundle.
            BudgetError: the budget is below the smallest that works.
            ConfigError: context over the model's, unknown instruction set, a calibration that is damaged, for another
                model, or without the density asked for.
        """
        bundle = Bundle.open(path)
        return cls.load(bundle, settle(bundle, config or EngineConfig(), plan), on_plan, simulated=simulated)

    @classmethod
    def load(
        cls,
        bundle: Bundle,
        settled: Settled,
        on_plan: Callable[[Plan], None] | None = None,
        *,
        simulated: bool = False,
    ) -> Engine:
        """As `open`, of what was settled before."""
        config, plan, calibration = settled.config, settled.plan, settled.calibration
        if on_plan is not None:
            on_plan(plan)
        if simulated and not config.selects:
            raise ConfigError(f"{config.method} has no masks and no caches to simulate: use dip, dip-ca or planes")
        residency: dict[str, Any] = {}
        if simulated:
            pinned = {"pinned": [1] * len(bundle.header["regions"])}
            residency = {"residency": "simulated"} if config.prunes else pinned

        def check_resident(data: npt.NDArray[np.uint8]) -> None:
            if hashlib.sha256(data.data).hexdigest() != bundle.header["files"]["resident.bin"]["sha256"]:
                raise BundleError(
                    f"{bundle.path}/resident.bin does not match its checksum: the bundle is damaged, pack it again"
                )

        options = plan.options | settled.vectors | residency
        decoder = _core.Decoder(bundle.header, str(bundle.path), options, check_resident)
        sha256 = None if calibration is None else calibration.sha256
        engine = cls(bundle, config, plan, decoder, mean_densities(settled.densities), sha256)
        if settled.why:
            engine.notes.append(f"auto is {config.method}: {settled.why}")
        if config.kv != "f16":
            engine.notes.append(f"keys and values are kept as {config.kv}")
        if config.method == "planes":
            engine.notes.append(config.fetches_told(plan.fetched_shares))
        if config.split is not None:
            engine.notes.append("slots are shared out over the regions by given weights, not uniformly")
        if config.prunes and config.cache == "static" and config.cold:
            decoder.pin_static()
        if config.trace is not None:
            engine._start_trace(config.trace)
        return engine

    def configure(self, config: EngineConfig, capacity: Sequence[int] | None = None) -> None:
        """Other masks and caches for a simulated engine, which then starts anew with empty caches.

        Args:
            config: of the same context, without calibration. A trace under way is finished, its own begun.
            capacity: slots by region, instead of what the configuration's budget gives.

        Raises:
            ConfigError: the engine is not simulated, or the context differs.
        """
        if config.context != self.config.context:
            raise ConfigError(
                f"the context is {self.config.context} and cannot become {config.context}: open another engine"
            )
        if config.calibration is not None or not config.prunes:
            what = "a calibration" if config.prunes else config.method
            raise ConfigError(f"{what} does not go into a simulated engine that is open: open another one")
        plan = plan_run(self.bundle, config, self.plan.parts["host"], capacity)
        options = plan.options
        self.finish_trace()
        self._decoder.configure(
            options["k"], options["gamma"], options["cache"], options["cache_decay"], options["capacity"]
        )
        self.config, self.plan = config, plan
        self.densities = mean_densities(densities_of(config, self.bundle.model.n_layers, None))
        self.reset()
        if config.cache == "static" and config.cold:
            self._decoder.pin_static()
        if config.trace is not None:
            self._start_trace(config.trace)

    def _start_trace(self, path: Path) -> None:
        header = {
            "format": "dipper-trace",
            "model": self.bundle.header["model"]["name"],
            "bundle": self.bundle.header["header_sha256"],
            "method": self.config.method,
            "gamma": self.config.effective_gamma,
            "densities": self.densities,
            "cache": self.config.cache,
            "cache_decay": self.config.cache_decay,
            "cold": self.config.cold,
            "calibration": self.calibration_sha256,
            "context": self.config.context,
            "block_tokens": self.plan.options["block_tokens"],
            "regions": [
                {
                    "layer": r["layer"],
                    "kind": r["kind"],
                    "n_columns": r["n_columns"],
                    "record_bytes": r["record_bytes"],
                    "offset": r["offset"],
                    "capacity": c,
                    "k": k,
                }
                for r, c, k in zip(
                    self.bundle.header["regions"],
                    self.plan.options["capacity"],
                    self.plan.options["k"],
                    strict=True,
                )
            ],
        }
        self._trace_partial = path.with_name(path.name + ".partial")
        self._decoder.start_trace(str(self._trace_partial), json.dumps(header), self.config.trace_scores)

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None and self._trace_partial is not None:  # what was recorded ends where the error came
            self._trace_partial.unlink(missing_ok=True)
            self._trace_partial = None
        self.close()

    def close(self) -> None:
        """Frees weights and caches; a trace gets its final name.

        Raises:
            FlashError: the trace could not all be written; nothing has its name.
        """
        if self._decoder is None:
            return
        try:
            self.finish_trace()
        finally:
            self._decoder = None

    def finish_trace(self) -> None:
        """Ends a trace under way before the engine closes: it gets its final name.

        Raises:
            FlashError: it could not all be written; nothing has its name.
        """
        if self._trace_partial is None or self.config.trace is None:
            return
        partial, self._trace_partial = self._trace_partial, None
        try:
            self._decoder.finish_trace()
            os.replace(partial, self.config.trace)
        finally:
            partial.unlink(missing_ok=True)

    @property
    def n_past(self) -> int:
        """Positions in the KV cache."""
        return int(self._decoder.n_past)

    @property
    def context(self) -> int:
        """Positions that the KV cache has room for."""
        return self.config.context

    @property
    def vocab_size(self) -> int:
        """Length of a row of logits."""
        return int(self.bundle.header["model"]["vocab_size"])

    @property
    def isa(self) -> str:
        """Instruction set of the kernels in use."""
        return str(self._decoder.isa)

    @property
    def n_threads(self) -> int:
        """Compute threads, the caller's included."""
        return int(self.plan.options["n_threads"])

    @property
    def reader_backend(self) -> str:
        """io_uring or pread."""
        return str(self._decoder.reader_backend)

    @property
    def direct(self) -> bool:
        """Whether reads bypass the page cache."""
        return bool(self._decoder.direct)

    def prefill(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """Appends tokens, dense and streamed layer by layer; warms the column caches unless `cold`.

        Returns:
            Logits of the last token, [vocab].

        Raises:
            ConfigError: no tokens, an id outside the vocabulary, or the context is full.
            FlashError: a read failed.
        """
        logits: npt.NDArray[np.float32] = self._decoder.prefill(
            np.asarray(tokens, np.int32), self.config.selects and not self.config.cold
        )
        return logits

    def step(self, token: int, *, copy: bool = True) -> npt.NDArray[np.float32]:
        """One decoded token through its own masks and the caches; logits [vocab].

        Args:
            token: its id.
            copy: False: logits that hold until the next call only, and cannot be written to. A copy for a
                large vocabulary takes longer than choosing from it.

        Raises:
            ConfigError: as `prefill`, and for a NaN score.
            FlashError: a read failed.
        """
        logits: npt.NDArray[np.float32] = self._decoder.step(int(token))
        return logits.copy() if copy else logits

    def logits(
        self, tokens: Sequence[int], masks: Sequence[tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]] | None = None
    ) -> npt.NDArray[np.float32]:
        """Logits of every token, each through its own mask and cache step; equals `step` bit for bit.

        Worked layer by layer.

        Args:
            tokens: continue after `n_past`.
            masks: forced instead: by layer (uint8 [T, hidden], uint8 [T, intermediate]), nonzero = used. Cache
                untouched.

        Returns:
            [T, vocab] fp32.
        """
        ids = np.asarray(tokens, np.int32)
        if masks is None:
            logits: npt.NDArray[np.float32] = self._decoder.logits(
                ids, "own" if self.config.selects else "dense", [], []
            )
        else:
            inputs, glus = ([np.ascontiguousarray(layer[i], np.uint8) for layer in masks] for i in range(2))
            logits = self._decoder.logits(ids, "forced", inputs, glus)
        return logits

    def advance(self, tokens: Sequence[int]) -> None:
        """Takes tokens through their own masks and cache steps, as `logits` does, and tells nothing but counters."""
        self._decoder.advance(np.asarray(tokens, np.int32))

    def column_energies(self, tokens: Sequence[int]) -> dict[str, npt.NDArray[np.float64]]:
        """Mean square of every column's input over tokens, which continue after `n_past`; for `bundle.pack`.

        Args:
            tokens: through the dense model, or whatever method the engine was opened with.

        Returns:
            By region, "layers.N.input" and "layers.N.glu": [n_columns].
        """
        self._decoder.start_energies()
        self.advance(tokens)
        sums = self._decoder.energies()
        return {
            f"layers.{region['layer']}.{region['kind']}": np.array(values) / len(tokens)
            for region, values in zip(self.bundle.header["regions"], sums, strict=True)
        }

    def region_inputs(
        self, token: int, *, is_prompt: bool = False
    ) -> tuple[npt.NDArray[np.float32], list[npt.NDArray[np.float32]]]:
        """One token as `logits` takes it, or of a prompt as `prefill` does, and what its regions were driven by.

        Returns:
            Logits [vocab]; by region the magnitudes of its inputs, [n_columns], exact.
        """
        self._decoder.start_energies()
        logits = self.prefill([token]) if is_prompt else self.logits([token])[0]
        # A square of an fp32 number is exact in fp64, and so is its root.
        return logits, [np.sqrt(np.array(squares)).astype(np.float32) for squares in self._decoder.energies()]

    def score(self, tokens: Sequence[int]) -> npt.NDArray[np.float64]:
        """Negative log-likelihood of tokens[1:], every token through its own mask and cache step, [T - 1].

        Raises:
            ConfigError: fewer than two tokens, or as `prefill`.
        """
        ids = np.asarray(tokens, np.int32)
        if len(ids) < 2:
            raise ConfigError(f"{len(ids)} tokens cannot be scored: at least 2 are needed")
        losses: npt.NDArray[np.float64] = self._decoder.losses(ids[:-1].copy(), ids[1:].copy())
        return losses

    def reset(self) -> None:
        """Forgets the KV cache; column caches stay."""
        self._decoder.reset()

    def reset_cache(self) -> None:
        """Empties the column caches and their counters."""
        self._decoder.reset_cache()

    def reset_counters(self) -> None:
        """Counters and ledger start at zero."""
        self._decoder.reset_counters()

    def counters(self) -> Counters:
        """Counters since the last reset."""
        return Counters(**self._decoder.counters())
