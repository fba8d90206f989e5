"""What every token selects, and what that does to the caches under a setting: exact counts, no seconds.

    recorded    masks of the real model at gamma = 1, recorded once a density: exact for any cache and device, since
                there masks do not depend on the cache
    live        the real model run closed-loop under the very cache (gamma < 1, planes): exact for that cache
    replayed    recorded scores ranked again under another cache, although the activations would have changed: an
                approximation
    generated   scores of a generator fitted to real models, for models whose weights are not at hand

Cache, selection, read plans and the DRAM plan are the engine's own, so with a bundle the counts are those that the
engine would have, exactly.

    workload = ModelWorkload(bundle, prompt, n_tokens=128)
    setting = Setting.plan_for(bundle, EngineConfig(density=0.6, mlp_dram="40%"))
    workload.traffic([setting])[0].totals        # selected, hits, misses, reads, flash_bytes
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from . import _core
from .budget import EngineConfig, Plan, plan_run
from .bundle import Bundle, residual_name
from .cache import ColumnCache, Refined, next_uses, scan, scan_refine
from .engine import Engine
from .errors import ConfigError
from .trace import read_trace

if TYPE_CHECKING:
    from .generator import ScoreGenerator

__all__ = [
    "CACHES",
    "GeneratedWorkload",
    "ModelWorkload",
    "Setting",
    "TraceWorkload",
    "Traffic",
    "Workload",
    "embedding_reads",
]

CACHES = ("none", "lru", "lfu", "lfu-decay", "static", "belady")

_I32 = npt.NDArray[np.int32]
_F32 = npt.NDArray[np.float32]


# ------------------------------------------------------------------------------------------------ what is simulated


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One way to run a bundle: the engine's configuration, its DRAM plan, and the cache policy.

    Attributes:
        bundle: real, or of a published shape.
        config: the engine's; `config.cache` is `cache` where the engine has that policy.
        plan: every byte of it, and the capacities.
        cache: one of `CACHES`; none holds no column, belady knows the future.
        alignment: bytes that a read is widened to.
    """

    bundle: Bundle
    config: EngineConfig
    plan: Plan
    cache: str
    alignment: int = 4096

    @classmethod
    def plan_for(
        cls,
        bundle: Bundle,
        config: EngineConfig,
        *,
        cache: str | None = None,
        capacity_share: float | None = None,
        host_bytes: int | None = None,
        alignment: int = 4096,
    ) -> Setting:
        """Plans the DRAM as the engine does.

        Args:
            bundle, config: what is run.
            cache: one of `CACHES`, instead of the configuration's.
            capacity_share: of every region's columns, cached whatever that takes; None: what the budget gives.
            host_bytes: of the process; None: of this one.
            alignment: of the device's reads.

        Raises:
            ConfigError: an unknown policy; a method that is not simulated; belady below gamma = 1, where nobody can
                know the future.
            BudgetError: the DRAM does not hold the resident part; the smallest that does is named.
        """
        cache = config.cache if cache is None else cache
        if cache not in CACHES:
            raise ConfigError(f"cache '{cache}' is unknown: choose {', '.join(CACHES)}")
        if config.method == "auto":
            raise ConfigError(
                "auto is not simulated: choose --method dense-resident, dense-stream, dip, dip-ca or planes"
            )
        if config.method == "planes" and all(region["base"] is None for region in bundle.header["regions"]):
            raise ConfigError(
                f"planes refines columns that are split in base and residual, and {bundle.path} has none: pack it, or "
                "lay its shape out, with --base-bits"
            )
        if config.method == "planes" and cache in ("none", "belady"):
            raise ConfigError(
                f"cache {cache} with planes: what is refined depends on the cache, and slots are what the budget "
                "leaves; use lru, lfu, lfu-decay or static"
            )
        if config.method == "planes" and capacity_share is not None:
            raise ConfigError("planes caches units in what its bases leave: give a budget, not a share of the columns")
        if cache == "belady" and config.effective_gamma < 1:
            raise ConfigError(
                f"belady with gamma {config.effective_gamma}: masks then depend on the cache, so there is no future "
                "to know; use gamma 1, or another cache"
            )
        limit = bundle.model.max_context
        if config.context > limit:
            raise ConfigError(f"a context of {config.context} is over the model's {limit}: lower --ctx")
        if config.calibration is not None:
            raise ConfigError("a calibration is not simulated yet: give --density, or --d-in and --d-glu")
        capacity = None
        if capacity_share is not None:
            capacity = [int(capacity_share * region["n_columns"]) for region in bundle.header["regions"]]
        plan = plan_run(bundle, config, host_bytes, capacity)
        if cache == "none":  # the budget is checked above; what it would give to slots is not held
            plan = plan_run(bundle, config, host_bytes, [0] * len(plan.options["k"]))
        return cls(bundle=bundle, config=config, plan=plan, cache=cache, alignment=alignment)

    def with_shares(self, shares: Sequence[float]) -> Setting:
        """The same with these shares of the regions' columns cached, whatever that takes."""
        regions = self.bundle.header["regions"]
        capacity = [int(share * r["n_columns"]) for share, r in zip(shares, regions, strict=True)]
        return replace(self, plan=plan_run(self.bundle, self.config, self.plan.parts["host"], capacity))

    def at_gamma_1(self) -> Setting:
        """The same DRAM and caches for plain DIP."""
        return replace(self, config=replace(self.config, method="dip", gamma=None))

    @property
    def gamma(self) -> float:
        """Factor on the scores of columns that are not cached."""
        return self.config.effective_gamma

    @property
    def k(self) -> tuple[int, ...]:
        """Columns selected, by region."""
        return tuple(self.plan.options["k"])

    @property
    def capacity(self) -> tuple[int, ...]:
        """Slots, by region."""
        return tuple(self.plan.options["capacity"])

    @property
    def block_tokens(self) -> int:
        """Tokens that prefill takes at once: the first block fills a static cache."""
        return int(self.plan.options["block_tokens"])


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """What every token did to every region: counts [T, regions], exact integers.

    Attributes:
        selected: columns of the mask; of planes the units demanded, the fetched ones and cached ones as good.
        hits: of them, cached before the token.
        admissions: columns (units) that entered a cache.
        reads, flash_bytes: asked of the disk for the misses.
        embedding_reads, embedding_bytes: [T], of untied input embeddings.
        stream_reads, stream_bytes: of each token, for regions of planes that are used whole and not held.
    """

    selected: npt.NDArray[np.int64]
    hits: npt.NDArray[np.int64]
    admissions: npt.NDArray[np.int64]
    reads: npt.NDArray[np.int64]
    flash_bytes: npt.NDArray[np.int64]
    embedding_reads: npt.NDArray[np.int64]
    embedding_bytes: npt.NDArray[np.int64]
    stream_reads: int = 0
    stream_bytes: int = 0

    @property
    def misses(self) -> npt.NDArray[np.int64]:
        """Selected and not cached, [T, regions]."""
        return self.selected - self.hits

    @property
    def n_tokens(self) -> int:
        """Decoded tokens."""
        return len(self.selected)

    @property
    def totals(self) -> dict[str, int]:
        """Sums over tokens and regions, under the names of the engine's counters; reads are the embedding's too."""
        return {
            "selected": int(self.selected.sum()),
            "hits": int(self.hits.sum()),
            "misses": int(self.misses.sum()),
            "reads": int(self.reads.sum() + self.embedding_reads.sum()) + self.n_tokens * self.stream_reads,
            "flash_bytes": int(self.flash_bytes.sum() + self.embedding_bytes.sum()) + self.n_tokens * self.stream_bytes,
        }


class Workload(Protocol):
    """What tokens select."""

    bundle: Bundle
    n_prompt: int
    n_tokens: int

    def traffic(self, settings: Sequence[Setting]) -> list[Traffic]:
        """Counts under each setting. Raises ConfigError for settings that this workload cannot tell about."""

    def describe(self, setting: Setting) -> dict[str, Any]:
        """Where the masks of a setting come from: `kind`, and what a reader of the result must know."""


# ------------------------------------------------------------------------------------------------ one region


def _cache(setting: Setting, region: int, prompt_masks: _I32 | None) -> ColumnCache:
    """The region's cache before the first token; a static one is filled as the engine does it."""
    n_columns, capacity = setting.bundle.header["regions"][region]["n_columns"], setting.capacity[region]
    policy = "lru" if setting.cache == "none" else setting.cache
    cache = ColumnCache(n_columns, capacity, policy, setting.config.cache_decay)
    if policy != "static" or capacity == 0:
        return cache
    if setting.config.cold:
        cache.pin(np.arange(capacity))
    elif prompt_masks is not None and len(prompt_masks):
        uses = np.bincount(prompt_masks[: setting.block_tokens].ravel(), minlength=n_columns)
        cache.pin(np.sort(np.argsort(-uses, kind="stable")[:capacity]))
    return cache


def _layout(setting: Setting, region: int) -> dict[str, Any]:
    entry = setting.bundle.header["regions"][region]
    return {"offset": entry["offset"], "record_bytes": entry["record_bytes"], "alignment": setting.alignment}


def _replay_masks(setting: Setting, region: int, prompt: _I32, masks: _I32) -> dict[str, Any]:
    """Counts of one region from its masks [P, k] and [T, k], which are valid for this setting."""
    warm = prompt[:0] if setting.config.cold else prompt
    cache = _cache(setting, region, warm)
    future = None
    if setting.cache == "belady":
        future = next_uses(np.concatenate([warm, masks]), cache.n_columns)
    for part, at in ((warm, 0), (masks, len(warm))):
        known = None if future is None else np.ascontiguousarray(future[at : at + len(part)])
        counts = _core.replay_masks(
            part, **_layout(setting, region), cache=cache, counted=part is masks, next_use=known
        )
    return {**counts, "selected": np.full(len(masks), masks.shape[1])}


def _replay_scores(setting: Setting, region: int, prompt: _F32, scores: _F32) -> dict[str, Any]:
    """Counts of one region from scores [P, n] and [T, n], the prompt's masks at gamma = 1."""
    k = setting.k[region]
    warm = prompt[:0] if setting.config.cold else prompt
    if setting.cache == "belady":
        return _replay_masks(setting, region, scan(warm, k)[0], scan(scores, k)[0])
    cache = _cache(setting, region, scan(warm[: setting.block_tokens], k)[0] if setting.cache == "static" else None)
    scan(warm, k, 1.0, cache, counted=False)
    counts = _core.replay_scores(scores, k, setting.gamma, **_layout(setting, region), cache=cache)
    return {**counts, "selected": np.full(len(scores), k)}


_PLANNED = ("refined", "fetch", "run_cost", "pinned")  # what choices of planes depend on, of a plan's options
_COUNTS = ("selected", "hits", "admissions", "reads", "flash_bytes")


def _stack(columns: Sequence[dict[str, Any]], embedding: tuple[Any, Any], setting: Setting | None = None) -> Traffic:
    """Counts by region -> [T, regions]; setting: of planes, whose plan says what is streamed."""
    stacked = {name: np.stack([np.asarray(c[name], np.int64) for c in columns], axis=1) for name in _COUNTS}
    streamed = (0, 0) if setting is None else (setting.plan.token_stream_reads, setting.plan.token_stream_bytes)
    return Traffic(
        **stacked, embedding_reads=embedding[0], embedding_bytes=embedding[1],
        stream_reads=streamed[0], stream_bytes=streamed[1],
    )  # fmt: skip


class _RefinedRegion:
    """A region of `planes`: its cache, what each token chooses against it, and the reads that this causes.

    Args:
        setting: of planes.
        region: its index; where it is not refined, every count is 0.
    """

    def __init__(self, setting: Setting, region: int) -> None:
        self._entry = setting.bundle.header["regions"][region]
        self._is_refined = bool(setting.plan.options["refined"][region])
        self._cold = setting.config.cold
        self._layout = {**_layout(setting, region), "record_bytes": self._entry["unit_bytes"]}
        self._n_fetch = setting.plan.options["fetch"][region]
        self._run_cost = setting.plan.options["run_cost"][region]
        self._rows: list[tuple[int, ...]] = []
        if not self._is_refined:
            return
        self._norm = residual_norms(setting.bundle, self._entry)
        n_units = -(-self._entry["n_columns"] // self._entry["columns_per_unit"])
        self._cache = ColumnCache(n_units, setting.capacity[region], setting.cache, setting.config.cache_decay)
        self._cache.pin(np.arange(setting.capacity[region]))  # what a run begins with
        self._nothing = ColumnCache(n_units, 0, setting.cache, setting.config.cache_decay)

    def warm(self, x: _F32) -> None:
        """Tokens [T, n] of the prompt, which count nothing."""
        if self._is_refined and not self._cold:
            self._scan(x, lambda units: self._cache.step(units.demanded, counted=False))

    def count(self, x: _F32) -> None:
        """Decoded tokens [T, n]."""
        if self._is_refined:
            self._scan(x, self._step)
        else:
            self._rows += [(0,) * len(_COUNTS)] * len(x)

    def counts(self) -> dict[str, Any]:
        """By token, of all that were counted."""
        return dict(zip(_COUNTS, np.array(self._rows, np.int64).reshape(-1, len(_COUNTS)).T, strict=True))

    def _scan(self, x: _F32, step: Callable[[Refined], Any]) -> None:
        entry = self._entry
        scan_refine(
            x, self._norm, entry["order"], entry["columns_per_unit"], self._cache, self._n_fetch, self._run_cost,
            step=step,
        )  # fmt: skip

    def _step(self, units: Refined) -> None:
        """Hits and admissions are of what is demanded; a read brings what lies between two units of a run, too."""
        stepped = self._replay(units.demanded, self._cache)
        read = self._replay(units.read, self._nothing)
        counts = {**stepped, "reads": read["reads"], "flash_bytes": read["flash_bytes"]}
        self._rows.append((len(units.demanded), *(int(counts[name][0]) for name in _COUNTS[1:])))

    def _replay(self, units: _I32, cache: ColumnCache) -> dict[str, Any]:
        return dict(_core.replay_masks(units[None], **self._layout, cache=cache, counted=True))


def _refine_scores(setting: Setting, region: int, prompt: _F32, scores: _F32) -> dict[str, Any]:
    """Counts of one region of planes from its inputs' magnitudes [P, n] and [T, n]."""
    refined = _RefinedRegion(setting, region)
    refined.warm(prompt)
    refined.count(scores)
    return refined.counts()


def residual_norms(bundle: Bundle, region: dict[str, Any]) -> _F32:
    """What inputs are multiplied by; of a shape without weights all alike, which ranks nearly as well (docs/log.md)."""
    if not (bundle.path / "resident.bin").exists():
        return np.ones(region["n_columns"], np.float32)
    return bundle.dequantise(residual_name(region))


def embedding_reads(setting: Setting, tokens: npt.NDArray[Any] | None, n_tokens: int) -> tuple[Any, Any]:
    """Reads and bytes [T] of an untied embedding: one aligned read a token; ids unknown: rows that straddle nothing."""
    entry = setting.bundle.header["embedding"]
    if entry is None:
        return np.zeros(n_tokens, np.int64), np.zeros(n_tokens, np.int64)
    step = setting.alignment
    begin = np.zeros(n_tokens, np.int64) if tokens is None else np.asarray(tokens, np.int64) * entry["row_bytes"]
    begin = begin + entry["offset"]
    end = -(-(begin + entry["row_bytes"]) // step) * step
    return np.ones(n_tokens, np.int64), end - begin // step * step


# ------------------------------------------------------------------------------------------------ workloads


def _check_settings(workload: Workload, settings: Sequence[Setting]) -> None:
    """Settings of the workload's own bundle, with room for its tokens."""
    needed = workload.n_prompt + workload.n_tokens
    for setting in settings:
        if setting.bundle.header is not workload.bundle.header and setting.bundle.header != workload.bundle.header:
            raise ConfigError(
                f"a setting of {setting.bundle.path} for a workload of {workload.bundle.path}: use the same bundle"
            )
        if setting.config.context < needed:
            raise ConfigError(
                f"a context of {setting.config.context} for {workload.n_prompt} prompt tokens and {workload.n_tokens} "
                f"after them: use --ctx {needed} or more"
            )


@dataclass(frozen=True, kw_only=True)
class _Recording:
    """A run's masks by region: the prompt's [P, k] and the decoded tokens' [T, k]; ids of the latter [T]."""

    prompt: list[_I32]
    masks: list[_I32]
    tokens: _I32

    @classmethod
    def of_trace(cls, path: Path, with_scores: bool = False) -> tuple[dict[str, Any], _Recording, Any]:
        """A trace's header and masks; with scores also (prompt [P, n], decoded [T, n]) by region."""
        header, frames = read_trace(path)
        n = len(header["regions"])
        masks: list[list[list[Any]]] = [[[], []] for _ in range(n)]
        scores: list[list[list[Any]]] = [[[], []] for _ in range(n)]
        tokens: list[int] = []
        with closing(frames):  # an error leaves no file open
            for frame in frames:
                if frame.region >= n:
                    raise ConfigError(
                        f"{path} has a frame of region {frame.region}, its header {n} regions: record it again"
                    )
                part = 0 if frame.is_prompt else 1
                if frame.is_prompt and tokens:
                    raise ConfigError(f"{path} has a prompt after decoded tokens, as of a chat: record a single run")
                masks[frame.region][part].append(frame.mask)
                if with_scores:
                    scores[frame.region][part].append(frame.scores)
                if frame.region == 0 and not frame.is_prompt:
                    tokens.append(frame.token)
        counts = {tuple(map(len, parts)) for parts in masks}
        if len(counts) != 1 or not tokens:
            raise ConfigError(f"{path} ends in the middle of a token, or has none: it is cut, record it again")
        stack: list[list[_I32]] = [[], []]
        for parts, region in zip(masks, header["regions"], strict=True):
            for p in range(2):
                rows = np.stack(parts[p]) if parts[p] else np.empty((0, region["k"]), np.int32)
                stack[p].append(np.ascontiguousarray(rows, np.int32))
        recording = cls(prompt=stack[0], masks=stack[1], tokens=np.array(tokens, np.int32))
        return header, recording, scores

    def traffic(self, setting: Setting) -> Traffic:
        """Counts under a setting for which the masks are valid."""
        regions = range(len(self.masks))
        counts = [_replay_masks(setting, r, self.prompt[r], self.masks[r]) for r in regions]
        return _stack(counts, embedding_reads(setting, self.tokens, len(self.tokens)))


class ModelWorkload:
    """A real model over tokens of its own or of a text; its masks are recorded or run live, as the setting needs.

    All weights must fit into DRAM here: nothing is read from flash. At gamma = 1 one recording a density serves every
    cache and device. Below, each setting is a run; one set of loaded weights serves them all, and a text is taken in
    blocks of tokens, so that a weight is read once a block whatever the number of settings.

    Args:
        bundle: the model.
        prompt: tokens processed dense, which warm the caches.
        n_tokens: tokens decoded greedily after it, ...
        text: ... or these, whatever the model would have said. Give one of the two.
        threads: of the runs; None: all cores.

    Raises:
        ConfigError: neither or both, no tokens.
    """

    def __init__(
        self,
        bundle: Bundle,
        prompt: Sequence[int],
        *,
        n_tokens: int | None = None,
        text: Sequence[int] | None = None,
        threads: int | None = None,
    ) -> None:
        if (n_tokens is None) == (text is None):
            raise ConfigError("give either a number of tokens to decode or the tokens of a text")
        self.bundle, self.prompt, self.text, self.threads = bundle, list(prompt), text, threads
        self.n_prompt = len(self.prompt)
        self.n_tokens = len(text) if text is not None else int(n_tokens or 0)
        if self.n_prompt < 1 or self.n_tokens < 1:
            raise ConfigError(f"{self.n_prompt} prompt tokens and {self.n_tokens} after them: each must be at least 1")
        self._recorded: dict[tuple[Any, ...], _Recording] = {}
        self._refined: dict[tuple[Any, ...], Traffic] = {}

    def traffic(self, settings: Sequence[Setting]) -> list[Traffic]:
        """Counts under each setting, exact."""
        _check_settings(self, settings)
        result = []
        engine: Engine | None = None
        try:
            for setting in settings:
                key = self._key(setting)
                if setting.config.method == "planes":
                    if key not in self._refined:
                        self._refined[key] = self._run_planes(setting)
                    result.append(self._refined[key])
                    continue
                if key not in self._recorded:
                    engine, self._recorded[key] = self._run(engine, setting)
                result.append(self._recorded[key].traffic(setting))
        finally:
            if engine is not None:
                engine.close()
        return result

    @staticmethod
    def _key(setting: Setting) -> tuple[Any, ...]:
        """What a run's masks depend on: at gamma 1 on the density, and on which rotary factors the context asks for."""
        config = setting.config
        positions = tuple(r.long is not None and config.context > r.original_context for r in setting.bundle.model.rope)
        if config.method == "planes":
            made = (tuple(setting.plan.options[name]) for name in (*_PLANNED, "capacity"))
            return ("planes", *made, positions, setting.cache, config.cache_decay, config.cold, setting.alignment)
        if setting.gamma == 1:
            return (setting.k, positions)
        cache = (setting.cache, config.cache_decay, setting.capacity, config.cold, setting.block_tokens)
        return (setting.k, positions, setting.gamma, *cache)

    def describe(self, setting: Setting) -> dict[str, Any]:
        """`recorded` at gamma 1, `live` below and of planes."""
        is_live = setting.gamma < 1 or setting.config.method == "planes"
        return {
            "kind": "live" if is_live else "recorded",
            "model": self.bundle.model.name,
            "tokens": "greedy" if self.text is None else "text",
        }

    def _run_planes(self, setting: Setting) -> Traffic:
        """One run under a setting of planes: the engine tells what drives each region, and the caches here follow.

        Token by token, since the engine tells of a block only sums; nothing is read from flash.
        """
        options = {**setting.plan.options, "cache": setting.cache}
        if self.threads is not None:
            options["n_threads"] = self.threads
        plan = replace(setting.plan, options=options)
        regions = [_RefinedRegion(setting, r) for r in range(len(setting.bundle.header["regions"]))]
        ids = []
        with Engine.open(self.bundle.path, setting.config, simulated=True, plan=plan) as engine:
            for token in self.prompt:
                logits, inputs = engine.region_inputs(token, is_prompt=True)
                for region, x in zip(regions, inputs, strict=True):
                    region.warm(x[None])
            for t in range(self.n_tokens):
                ids.append(int(logits.argmax()) if self.text is None else self.text[t])
                logits, inputs = engine.region_inputs(ids[-1])
                for region, x in zip(regions, inputs, strict=True):
                    region.count(x[None])
        counts = [region.counts() for region in regions]
        return _stack(counts, embedding_reads(setting, np.array(ids), self.n_tokens), setting)

    def _run(self, engine: Engine | None, setting: Setting) -> tuple[Engine, _Recording]:
        """One closed-loop run under a setting; nothing is read from flash."""
        known = "lfu" if setting.cache in ("none", "belady") else setting.cache  # of no influence at gamma 1
        options = {name: getattr(setting.config, name) for name in ("method", "density", "d_in", "d_glu", "gamma")}
        if setting.gamma < 1:
            if setting.cache == "none":
                raise ConfigError("gamma below 1 without a cache favours nothing: use gamma 1, or a cache")
            options |= {"cold": setting.config.cold, "cache_decay": setting.config.cache_decay}
        with tempfile.TemporaryDirectory(prefix="dipper-") as folder:
            trace = Path(folder) / "masks.trace"
            config = EngineConfig(
                **options,
                cache=known,
                mlp_dram="1000b",
                context=setting.config.context,
                threads=self.threads,
                trace=trace,
                trace_scores=False,
            )
            if engine is not None and engine.context != config.context:
                engine.close()
                engine = None
            if engine is None:
                engine = Engine.open(self.bundle.path, config, simulated=True)
            capacity = None if setting.gamma == 1 else list(setting.capacity)
            engine.configure(config, capacity)
            for first in range(0, self.n_prompt, setting.block_tokens):  # the first fills a static cache
                logits = engine.prefill(self.prompt[first : first + setting.block_tokens])
            if self.text is not None:
                engine.advance(self.text)
            else:
                for _ in range(self.n_tokens):
                    logits = engine.step(int(logits.argmax()))
            engine.finish_trace()
            return engine, _Recording.of_trace(trace)[1]


class TraceWorkload:
    """A trace written by `dipper run --trace` at gamma = 1: its masks, and, if it has them, its scores.

    At the trace's own densities and gamma = 1 counts are exact. At others its scores are ranked again (`replayed`), as
    if the activations stayed what they were: an approximation, and one that grows as gamma falls.

    Raises:
        ConfigError: no trace, cut, of another bundle, recorded at gamma below 1.
    """

    def __init__(self, bundle: Bundle, path: Path) -> None:
        header, self._recording, scores = _Recording.of_trace(path, with_scores=True)
        if header["bundle"] != bundle.header.get("header_sha256"):
            raise ConfigError(
                f"{path} was recorded with another bundle ({header['model']}): use its own, or record anew"
            )
        if header["gamma"] != 1:
            raise ConfigError(
                f"{path} was recorded at gamma {header['gamma']}: its masks belong to its cache; record at gamma 1"
            )
        if header["calibration"] is not None:
            raise ConfigError(f"{path} was recorded with a calibration, which is not simulated yet: record it without")
        if header["cold"]:
            raise ConfigError(f"{path} was recorded with --cold: without the prompt's masks; record it without --cold")
        self._k = tuple(region["k"] for region in header["regions"])
        self._scores = scores if all(len(s) for s in scores[0][1]) else None
        self._path = path
        self.bundle = bundle
        self.n_prompt, self.n_tokens = len(self._recording.prompt[0]), len(self._recording.tokens)

    def _is_exact(self, setting: Setting) -> bool:
        return setting.gamma == 1 and setting.k == self._k

    def traffic(self, settings: Sequence[Setting]) -> list[Traffic]:
        """Counts under each setting: exact, or `replayed`."""
        _check_settings(self, settings)
        return [self._recording.traffic(s) if self._is_exact(s) else self._replayed(s) for s in settings]

    def _replayed(self, setting: Setting) -> Traffic:
        if self._scores is None:
            raise ConfigError(
                f"{self._path} has no scores, and its masks are for gamma 1 at its own densities: record with scores"
            )
        counts = []
        for region, (prompt, decoded) in enumerate(self._scores):
            n_columns = setting.bundle.header["regions"][region]["n_columns"]
            warm = np.array(prompt, np.float32).reshape(len(prompt), n_columns)
            counts.append(_replay_scores(setting, region, warm, np.array(decoded, np.float32)))
        return _stack(counts, embedding_reads(setting, self._recording.tokens, self.n_tokens))

    def describe(self, setting: Setting) -> dict[str, Any]:
        """`recorded`, or `replayed`."""
        kind = "recorded" if self._is_exact(setting) else "replayed"
        return {"kind": kind, "model": self.bundle.model.name, "trace": str(self._path)}


def _counted_by(setting: Setting) -> tuple[Any, ...]:
    """All that the counts of given scores depend on: no speed of a device is among it."""
    config, options = setting.config, setting.plan.options
    refined = config.method == "planes"
    planes = [tuple(config.whole), *(tuple(options[name]) for name in _PLANNED)] if refined else []
    cache = (setting.cache, config.cache_decay, tuple(setting.capacity), config.cold, setting.block_tokens)
    return (config.method, setting.k, setting.gamma, *cache, setting.alignment, *planes)


class GeneratedWorkload:
    """Scores of a generator fitted to real models, in the shape of any model.

    Args:
        bundle: real, or of a published shape.
        generator: fitted scores.
        n_prompt, n_tokens: tokens that warm the caches, and decoded tokens.
        seed: of the scores.
    """

    def __init__(
        self, bundle: Bundle, generator: ScoreGenerator, *, n_prompt: int, n_tokens: int, seed: int = 0
    ) -> None:
        if n_prompt < 1 or n_tokens < 1:
            raise ConfigError(f"{n_prompt} prompt tokens and {n_tokens} after them: each must be at least 1")
        if seed < 0:
            raise ConfigError(f"seed is {seed}: give a whole number from 0 up")
        self.bundle, self.generator, self.seed = bundle, generator, seed
        self.n_prompt, self.n_tokens = n_prompt, n_tokens
        self._counted: dict[tuple[Any, ...], Traffic] = {}

    def traffic(self, settings: Sequence[Setting]) -> list[Traffic]:
        """Counts under each setting, region by region: only one region's scores are held."""
        _check_settings(self, settings)
        by_key = {_counted_by(setting): setting for setting in settings}
        missing = {key: setting for key, setting in by_key.items() if key not in self._counted}
        if missing:
            self._counted |= zip(missing, self._count(list(missing.values())), strict=True)
        return [self._counted[_counted_by(setting)] for setting in settings]

    def _count(self, settings: Sequence[Setting]) -> list[Traffic]:
        counts: list[list[dict[str, Any]]] = [[] for _ in settings]
        for region, (prompt, decoded) in enumerate(self._scores()):
            for setting, column in zip(settings, counts, strict=True):
                replay = _refine_scores if setting.config.method == "planes" else _replay_scores
                column.append(replay(setting, region, prompt, decoded))
        return [
            _stack(
                column,
                embedding_reads(setting, None, self.n_tokens),
                setting if setting.config.method == "planes" else None,
            )
            for setting, column in zip(settings, counts, strict=True)
        ]

    def _scores(self) -> Iterator[tuple[_F32, _F32]]:
        n_layers = self.bundle.model.n_layers
        for index, region in enumerate(self.bundle.header["regions"]):
            depth = region["layer"] / max(n_layers - 1, 1)
            seed = int(np.random.SeedSequence((self.seed, index)).generate_state(1)[0])  # no two alike
            stream = self.generator.region(region["kind"], depth, region["n_columns"], seed)
            yield stream.scores(self.n_prompt), stream.scores(self.n_tokens)

    def describe(self, setting: Setting) -> dict[str, Any]:
        """`generated`, with what the generator was fitted on."""
        return {
            "kind": "generated",
            "model": self.bundle.model.name,
            "fitted_on": list(self.generator.fitted_on),
            "seed": self.seed,
        }
