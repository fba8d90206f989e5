"""The one result schema: what a measurement is called, how it is computed, and where it came from.

Owns the metrics (each defined once, below), `RunRecord` (one generation), `BenchRow` (a `RunRecord` plus
llama-bench's field names), `TokenLedger` (where a token's time goes), `EvalRecord` (one perplexity) and `Provenance`.
Whatever prints or stores a figure takes it from here.

    timing = Timing(start_s=0.0, first_s=0.5, last_s=2.5, n_tokens=21)
    timing.ttft_s, timing.tok_per_s       # (0.5, 10.0): 20 tokens in the 2 s after the first
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dipper import __version__

if TYPE_CHECKING:
    from dipper.engine import Counters, Engine, EngineConfig

__all__ = [
    "LEDGER",
    "BenchRow",
    "EvalRecord",
    "Provenance",
    "RunRecord",
    "SimRecord",
    "Stage",
    "Timing",
    "TokenLedger",
    "Traffic",
    "engine_fields",
    "header_sha256",
    "json_line",
    "ledger",
    "method_fields",
    "peak_rss_bytes",
    "per_token",
    "provenance",
    "ratio",
    "run_record",
    "token_ledger",
]

# The parts of a decoded token's time. `rest` is what the others leave of the wall time: norms, sampling, detokenising.
LEDGER = ("select", "submit", "wait", "gemv", "attention", "head", "rest")


# ------------------------------------------------------------------------------------------------ metrics


def ratio(part: float, whole: float) -> float | None:
    """part / whole, or None where there is no whole (JSON has no infinity)."""
    return part / whole if whole > 0 else None


def per_token(total: int, n_tokens: int) -> float:
    """A counter spread over the decoded tokens it was counted over; 0 where none was."""
    return total / n_tokens if n_tokens else 0.0


@dataclass(frozen=True, kw_only=True)
class Timing:
    """When a generation began, gave its first and its last token, in seconds of one monotonic clock."""

    start_s: float  # before the prefill
    first_s: float  # the first new token is known: prefill and one sampling are done
    last_s: float  # the last new token is known
    n_tokens: int  # new tokens, an end-of-text token included

    @property
    def ttft_s(self) -> float:
        """Time to the first token, prefill included."""
        return self.first_s - self.start_s

    @property
    def decode_s(self) -> float:
        """Time from the first token to the last, prefill excluded."""
        return self.last_s - self.first_s

    @property
    def tok_per_s(self) -> float | None:
        """Tokens after the first over the time they took; None for fewer than two tokens."""
        return ratio(self.n_tokens - 1, self.decode_s) if self.n_tokens > 1 else None


def ledger(measured: Mapping[str, float], decode_s: float) -> dict[str, float]:
    """The engine's own seconds by part, with `rest` set so that the parts add up to the decode time.

    Args:
        measured: seconds by part; parts that are absent count as 0, an own `rest` is replaced.
        decode_s: wall time from the first token to the last.

    Returns:
        Seconds for every name of `LEDGER`, in that order.
    """
    parts = {name: float(measured.get(name, 0.0)) for name in LEDGER if name != "rest"}
    parts["rest"] = max(0.0, decode_s - sum(parts.values()))
    return parts


# ------------------------------------------------------------------------------------------------ provenance


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """What produced a result: code, bundle, libraries, machine, time."""

    dipper: str
    commit: str | None  # None outside a git checkout
    dirty: bool | None  # tracked files differ from the commit
    bundle: str
    bundle_header_sha256: str | None
    python: str
    numpy: str
    cpu: str
    n_cpus: int
    system: str
    time: str  # UTC, ISO 8601
    calibration: str | None = None  # file
    calibration_sha256: str | None = None
    torch: str | None = None  # None: not used


def _git(root: Path, *args: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(root), *args], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


@lru_cache(maxsize=1)
def _checkout() -> tuple[str | None, bool | None]:
    """Commit and dirty flag when this package runs from a checkout, (None, None) when it is installed."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists() or not (root / "pyproject.toml").exists():
        return None, None
    commit = _git(root, "rev-parse", "HEAD")
    # What measurements write is not what they are made with.
    written = [f":(exclude)experiments/{folder}" for folder in ("results", "figures")]
    status = _git(root, "status", "--porcelain", "--untracked-files=no", "--", ".", *written)
    return commit, None if commit is None or status is None else bool(status)


@lru_cache(maxsize=1)
def _cpu() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def header_sha256(bundle: str | os.PathLike[str]) -> str | None:
    """The checksum that names a bundle's content, None where there is no readable header."""
    try:
        with open(Path(bundle) / "bundle.json", encoding="utf-8") as file:
            stated = json.load(file).get("header_sha256")
    except (OSError, ValueError, AttributeError):
        return None
    return stated if isinstance(stated, str) else None


def provenance(
    bundle: str | os.PathLike[str],
    calibration: str | os.PathLike[str] | None = None,
    calibration_sha256: str | None = None,
) -> Provenance:
    """Describes this process, the bundle that it read and the calibration, where there was one."""
    import numpy as np

    commit, dirty = _checkout()
    return Provenance(
        dipper=__version__,
        commit=commit,
        dirty=dirty,
        bundle=os.fspath(bundle),
        bundle_header_sha256=header_sha256(bundle),
        python=platform.python_version(),
        numpy=np.__version__,
        cpu=_cpu(),
        n_cpus=os.cpu_count() or 1,
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        time=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        calibration=None if calibration is None else os.fspath(calibration),
        calibration_sha256=calibration_sha256,
        torch=getattr(sys.modules.get("torch"), "__version__", None),
    )


def peak_rss_bytes() -> int:
    """The most memory this process held. VmHWM, since ru_maxrss survives exec and can be the parent's."""
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as lines:
            for line in lines:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024


# ------------------------------------------------------------------------------------------------ rows


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """One generation, measured. Counters run from the first new token to the last: prefill is not in them."""

    text: str
    n_tokens: int  # new tokens, an end-of-text token included
    n_prompt: int  # tokens prefilled for this generation
    finish_reason: str  # stop | length | context
    tok_per_s: float | None
    ttft_s: float
    decode_s: float
    method: str
    density: float | None  # None: dense
    d_in: float | None
    d_glu: float | None
    gamma: float | None  # 1 for dip; None: dense
    cache: str | None  # None: the method has no column cache
    seed: int
    sampling: dict[str, Any]  # temperature (0: greedy, the seed does not act), top_k, top_p, min_p
    hit_rate: float | None  # hits / (hits + misses); None where nothing was looked up
    flash_bytes_per_token: float  # asked of the disk
    useful_bytes_per_token: float  # of it, the records' own
    reads_per_token: float
    read_gbps: float | None  # flash bytes / decode_s: what the run drew from the disk, its idle time included
    disk_gbps_at_size: float | None = None  # what the disk gives for reads of the run's mean size; None: not measured
    dram_bytes: dict[str, int]  # planned, by part
    dram_budget_bytes: int | None
    mlp_bits_per_weight: float
    peak_rss_bytes: int
    ledger_s: dict[str, float]  # seconds over the whole decode; see LEDGER
    touched_bytes: dict[str, float] | None = None  # of DRAM, that a token must read in a part; None: not counted
    dram_gbps: float | None = None  # what DRAM gives to reads by n_threads threads; None: not measured
    reader_backend: str
    direct: bool
    isa: str
    n_threads: int
    notes: list[str] = field(default_factory=list)  # fallbacks and what else a reader of the figures must know
    provenance: Provenance | None = None

    def as_dict(self) -> dict[str, Any]:
        """The record as JSON types, `schema` first."""
        return {"schema": "dipper-run/1", **asdict(self)}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> RunRecord:
        """The record that `as_dict` gave, after a way through JSON."""
        fields = {key: v for key, v in value.items() if key != "schema"}
        if fields["provenance"] is not None:
            fields["provenance"] = Provenance(**fields["provenance"])
        return cls(**fields)


@dataclass(frozen=True, kw_only=True)
class BenchRow:
    """One test of one mode: the run whose speed is the median, and llama-bench's fields over all repetitions.

    `test` is `ppN` (prompt tokens per second until the first new token) or `tgN` (new tokens per second after it, at a
    depth of `n_depth` prompt tokens).
    """

    run: RunRecord
    mode: str
    state: str  # cold: page cache dropped, column cache empty before the prompt; warm: after one generation
    test: str
    n_gen: int
    n_depth: int
    samples_ts: list[float]
    samples_ns: list[int]
    # What the disk alone would allow: disk_gbps_at_size / flash bytes per token; None where nothing is read.
    limit_ts: float | None = None

    @property
    def median_ts(self) -> float:
        """Tokens per second, median of the repetitions."""
        return _median(self.samples_ts)

    @property
    def ledger(self) -> TokenLedger | None:
        """Where a decoded token's time goes; None of a prompt, and where its bytes were not counted."""
        return token_ledger(self.run) if self.n_gen else None

    def as_dict(self) -> dict[str, Any]:
        """The row as JSON types: every key of the run, then the bench's own."""
        avg_ts, stddev_ts = _mean_stddev(self.samples_ts)
        avg_ns, stddev_ns = _mean_stddev(self.samples_ns)
        of_limit = None if self.limit_ts is None else ratio(self.median_ts, self.limit_ts)
        own: dict[str, Any] = {
            "mode": self.mode,
            "state": self.state,
            "test": self.test,
            "n_gen": self.n_gen,
            "n_depth": self.n_depth,
            "reps": len(self.samples_ts),
            "median_ts": self.median_ts,
            "avg_ts": avg_ts,
            "stddev_ts": stddev_ts,
            "avg_ns": round(avg_ns),
            "stddev_ns": round(stddev_ns),
            "samples_ts": self.samples_ts,
            "samples_ns": self.samples_ns,
            "limit_ts": self.limit_ts,
            "of_limit": of_limit,
            "ledger": None if self.ledger is None else asdict(self.ledger),
        }
        return {**self.run.as_dict(), "schema": "dipper-bench/1", **own}


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A part of a decoded token's time, and the DRAM that it must read in it; None: nothing is counted there."""

    name: str  # of LEDGER, or total
    ms: float
    share: float | None  # of the token's time
    dram_bytes: float | None
    gbps: float | None  # dram_bytes in ms
    of_roof: float | None  # gbps over what DRAM gives to as many threads


@dataclass(frozen=True, kw_only=True)
class TokenLedger:
    """Where a decoded token's time goes, and the least that its bytes allow. None: not measured."""

    stages: list[Stage]
    total: Stage
    roof_gbps: float | None
    dram_ms: float | None  # all its bytes of DRAM at the roof
    flash_ms: float | None  # what it asks of the disk, at what the disk gives to reads of that size
    limit_ms: float | None  # the longer of both: reads and products may overlap
    of_limit: float | None  # limit_ms over the token's time


def token_ledger(run: RunRecord) -> TokenLedger | None:
    """A run's seconds and bytes by part, for a mean token; None where bytes were not counted or nothing was decoded."""
    n_steps = run.n_tokens - 1
    if run.touched_bytes is None or n_steps < 1:
        return None
    roof, token_ms = run.dram_gbps, 1e3 * run.decode_s / n_steps

    def stage(name: str, ms: float, n_bytes: float | None) -> Stage:
        gbps = None if n_bytes is None else ratio(1e-6 * n_bytes, ms)
        of_roof = None if gbps is None or roof is None else ratio(gbps, roof)
        return Stage(name=name, ms=ms, share=ratio(ms, token_ms), dram_bytes=n_bytes, gbps=gbps, of_roof=of_roof)

    n_bytes = sum(run.touched_bytes.values())
    dram_ms = None if roof is None else ratio(1e-6 * n_bytes, roof)
    flash_ms: float | None = 0.0
    if run.flash_bytes_per_token:
        disk = run.disk_gbps_at_size
        flash_ms = None if disk is None else ratio(1e-6 * run.flash_bytes_per_token, disk)
    limit_ms = None if dram_ms is None or flash_ms is None else max(dram_ms, flash_ms)
    return TokenLedger(
        stages=[stage(name, 1e3 * run.ledger_s[name] / n_steps, run.touched_bytes.get(name)) for name in LEDGER],
        total=stage("total", token_ms, n_bytes),
        roof_gbps=roof,
        dram_ms=dram_ms,
        flash_ms=flash_ms,
        limit_ms=limit_ms,
        of_limit=None if limit_ms is None else ratio(limit_ms, token_ms),
    )


@dataclass(frozen=True, kw_only=True)
class SimRecord:
    """One setting on one device, simulated: the fields of a `RunRecord` where they mean the same."""

    model: str
    device: str
    method: str
    density: float | None
    d_in: float | None
    d_glu: float | None
    gamma: float | None
    cache: str | None  # also none and belady, which no engine has
    split: str  # of the slots over regions: uniform, miss-curve or given
    tok_per_s: float
    tok_per_s_flat: float  # the same were a read to cost nothing beyond its (widened) bytes
    ttft_s: float
    hit_rate: float | None
    flash_bytes_per_token: float
    reads_per_token: float
    dram_bytes: dict[str, int]
    dram_budget_bytes: int | None
    mlp_bits_per_weight: float
    cached_fraction: float
    joules_per_token: float | None  # of bytes moved; None where the device's figures are not known
    ledger_s: dict[str, float]  # over the whole decode; see LEDGER
    io_s: float  # the reads alone
    products_s: float  # all products alone
    sustained_s: float  # what the disk's limits in the long run ask for
    n_prompt: int
    n_tokens: int
    fetch: float | None = None  # planes: shares of the input and of the GLU units that a token reads
    fetch_glu: float | None = None
    read_cost: int | None = None  # planes in runs of units
    workload: dict[str, Any]  # kind: recorded, live, replayed, generated or dense; and where it is from
    notes: list[str] = field(default_factory=list)
    provenance: Provenance | None = None

    def as_dict(self) -> dict[str, Any]:
        """The record as JSON types, `schema` first."""
        return {"schema": "dipper-sim/1", **asdict(self)}


@dataclass(frozen=True, kw_only=True)
class EvalRecord:
    """One perplexity of one method over one text. None: not measured, or there is no such thing on that engine."""

    perplexity: float
    stderr: float | None  # of the perplexity: bootstrap over windows; None for a single window
    ci95: tuple[float, float] | None
    nll_per_token: float
    nll_stderr: float | None
    n_tokens: int  # scored
    n_windows: int
    window: int
    bos_id: int | None  # put before every window, not scored
    tokens_sha256: str  # of the text's token ids that were used, int32 little-endian, without BOS
    text: str  # path
    text_sha256: str  # of the text as tokenised, UTF-8
    rows_joined: bool  # True: one row a line, joined by blank lines; False: the file as it is
    engine: str  # native | torch
    model: str
    device: str
    dtype: str | None  # of the arithmetic; the native engine's depends on the grid
    method: str
    density: float | None  # None: dense
    d_in: float | None
    d_glu: float | None
    gamma: float | None
    cache: str | None
    options: dict[str, Any] = field(default_factory=dict)  # what else of the method is not as by default
    hit_rate: float | None
    touched: float | None  # share of the dense MLP's weight bits that a token reads from DRAM or flash
    mlp_bytes: int | None  # of the dense MLP weights that a token uses, in the source's own grid
    mlp_bytes_per_token: float | None  # touched * mlp_bytes
    kl: float | None  # KL(dense || method), nats per token
    kl_stderr: float | None
    same_top1: float | None  # share of tokens after which both find the same token likeliest
    same_top1_stderr: float | None
    # Not measured: evaluation works layer by layer and streams whole layers, so its reads are not those of decoding.
    flash_bytes_per_token: float | None = None
    useful_bytes_per_token: float | None = None
    reads_per_token: float | None = None
    seconds: float
    dram_bytes: dict[str, int] | None = None
    dram_budget_bytes: int | None = None
    mlp_bits_per_weight: float | None = None
    peak_rss_bytes: int
    isa: str | None = None
    n_threads: int
    window_nll: list[float]  # sum over each window, nats
    window_tokens: list[int]  # scored in each window
    notes: list[str] = field(default_factory=list)
    provenance: Provenance | None = None
    config: dict[str, Any] = field(default_factory=dict)  # what a rerun must agree in to continue this one
    against: dict[str, Any] | None = None  # the other method's record and the relative change

    def as_dict(self) -> dict[str, Any]:
        """The record as JSON types, `schema` first; `tokens` is `n_tokens` by its short name."""
        return {"schema": "dipper-eval/1", **asdict(self), "tokens": self.n_tokens}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> EvalRecord:
        """The record that `as_dict` gave, after a way through JSON."""
        fields = {key: v for key, v in value.items() if key not in ("schema", "tokens")}
        if fields["provenance"] is not None:
            fields["provenance"] = Provenance(**fields["provenance"])
        if fields["ci95"] is not None:
            fields["ci95"] = tuple(fields["ci95"])
        return cls(**fields)


def _median(values: Sequence[float]) -> float:
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def _mean_stddev(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (0 for one value, as llama-bench has it)."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, 0.0
    return mean, (sum((v - mean) ** 2 for v in values) / (len(values) - 1)) ** 0.5


# ------------------------------------------------------------------------------------------------ from an engine


def method_fields(config: EngineConfig, densities: tuple[float, float] | None = None) -> dict[str, Any]:
    """The keys that name a method, with None where a knob does not act.

    Args:
        config: the engine's.
        densities: of the input and the GLU columns, where a calibration has its own: means over the layers.
    """
    d_in, d_glu = (densities or config.densities) if config.prunes else (None, None)
    return {
        "method": config.method,
        "density": None if d_in is None or d_glu is None else (2 * d_in + d_glu) / 3,
        "d_in": d_in,
        "d_glu": d_glu,
        "gamma": config.effective_gamma if config.prunes else None,
        "cache": config.cache if config.selects else None,
    }


@dataclass(kw_only=True)
class Traffic:
    """Cache and flash counters, summed over as many readings of an engine's counters as are added."""

    n_tokens: int = 0
    hits: int = 0
    misses: int = 0
    flash_bytes: int = 0
    useful_bytes: int = 0
    reads: int = 0

    def add(self, counters: Counters | Traffic) -> Traffic:
        """Adds one reading; returns itself."""
        self.n_tokens += counters.n_tokens
        self.hits += counters.hits
        self.misses += counters.misses
        self.flash_bytes += counters.flash_bytes
        self.useful_bytes += counters.useful_bytes
        self.reads += counters.reads
        return self

    @property
    def hit_rate(self) -> float | None:
        """Hits over looked-up columns; None where nothing was looked up."""
        return ratio(self.hits, self.hits + self.misses)

    def fields(self) -> dict[str, Any]:
        """The keys of a record that come from counters."""
        return {
            "hit_rate": self.hit_rate,
            "flash_bytes_per_token": per_token(self.flash_bytes, self.n_tokens),
            "useful_bytes_per_token": per_token(self.useful_bytes, self.n_tokens),
            "reads_per_token": per_token(self.reads, self.n_tokens),
        }


def engine_fields(engine: Engine) -> dict[str, Any]:
    """The keys that name an engine and what it holds, shared by all records."""
    return {
        **method_fields(engine.config, engine.densities),
        "dram_bytes": dict(engine.plan.parts),
        "dram_budget_bytes": engine.plan.budget_bytes,
        "mlp_bits_per_weight": engine.plan.mlp_bits_per_weight,
        "peak_rss_bytes": peak_rss_bytes(),
        "isa": engine.isa,
        "n_threads": engine.n_threads,
        "notes": list(engine.notes),
        "provenance": provenance(engine.bundle.path, engine.config.calibration, engine.calibration_sha256),
    }


def run_record(
    engine: Engine,
    timing: Timing,
    *,
    text: str,
    n_prompt: int,
    finish_reason: str,
    seed: int,
    sampling: Mapping[str, Any],
) -> RunRecord:
    """Builds the record of the generation that the engine's counters cover.

    Args:
        engine: its counters were reset after the prefill.
        timing: of the same generation.
        text: what was generated.
        n_prompt: tokens prefilled.
        finish_reason: stop, length or context.
        seed: of the sampler.
        sampling: its other options.

    Returns:
        The record, without `disk_gbps_at_size`, which only a probe of the disk can tell.
    """
    counters = engine.counters()
    flash_gbps = ratio(counters.flash_bytes / 1e9, timing.decode_s) if counters.flash_bytes else None
    return RunRecord(
        text=text,
        n_tokens=timing.n_tokens,
        n_prompt=n_prompt,
        finish_reason=finish_reason,
        tok_per_s=timing.tok_per_s,
        ttft_s=timing.ttft_s,
        decode_s=timing.decode_s,
        seed=seed,
        sampling=dict(sampling),
        read_gbps=flash_gbps,
        ledger_s=ledger(counters.ledger_s, timing.decode_s),
        reader_backend=engine.reader_backend,
        direct=engine.direct,
        **Traffic().add(counters).fields(),
        **engine_fields(engine),
    )


# ------------------------------------------------------------------------------------------------ JSON


def json_line(value: Mapping[str, Any]) -> str:
    """One line of strict JSON (no NaN, no infinity), keys in the order given."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(", ", ": "))
