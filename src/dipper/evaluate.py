"""Perplexity of the native engine: what a bundle and a method cost in quality.

The convention is that of the usual Hugging Face scripts: the text is tokenised once, without BOS, and cut into windows
that do not overlap; every window is scored from an empty context and its first token is not scored. Where the model's
tokenizer puts a BOS first, every window starts with one in place of its first text token, so that all its text tokens
are scored. An incomplete last window is dropped. Every token goes through its own mask and cache step; KV and column
caches are empty at the start of every window.

    source = read_text("wiki.test.raw")
    result = perplexity(engine, tokenizer.encode(source.text, add_bos=False), window=1024, bos_id=None)
    result.perplexity, result.stderr
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import io
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dipper.errors import ConfigError, DipperError
from dipper.records import EvalRecord, Traffic, engine_fields

if TYPE_CHECKING:
    from dipper.engine import Engine, EngineConfig, Plan

__all__ = [
    "PerplexityResult",
    "TextSource",
    "cut_windows",
    "eval_record",
    "evaluate_bundle",
    "perplexity",
    "read_text",
    "relative_change",
    "wikitext_rows_joined",
]

# 1000 resamples give the standard error to about 2 %.
_N_RESAMPLES = 1000


# ------------------------------------------------------------------------------------------------ text


@dataclass(frozen=True, kw_only=True)
class TextSource:
    """A text as it will be tokenised, and how it came to be so."""

    path: str
    text: str
    rows_joined: bool

    @property
    def sha256(self) -> str:
        """Of the text, UTF-8."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def read_text(path: str | os.PathLike[str], rows_joined: bool | None = None) -> TextSource:
    """Reads a text, line ends as LF.

    Args:
        path: a UTF-8 file.
        rows_joined: whether the file has one WikiText row a line, to be joined by blank lines. None: by the name, which
            ends in `.raw` for the files of WikiText; the result says which was done.

    Returns:
        The text.

    Raises:
        ConfigError: the file is absent, not UTF-8 text, or empty.
    """
    joined = Path(path).suffix == ".raw" if rows_joined is None else rows_joined
    text = wikitext_rows_joined(path) if joined else _read(path)
    if not text.strip():
        raise ConfigError(f"{os.fspath(path)} holds no text; give a file to score.")
    return TextSource(path=os.fspath(path), text=text, rows_joined=joined)


def wikitext_rows_joined(path: str | os.PathLike[str]) -> str:
    r"""A WikiText file with one row a line, as the data set's rows joined by blank lines.

    The data set keeps the line end of a row and empties rows of white space; joined with "\n\n" that is the text which
    published perplexities are taken on.
    """
    rows = io.StringIO(_read(path))  # str.splitlines would also cut at form feeds and their like
    return "\n\n".join(row if row.strip() else "" for row in rows)


def _read(path: str | os.PathLike[str]) -> str:
    try:
        with open(path, encoding="utf-8", newline=None) as file:
            return file.read()
    except FileNotFoundError:
        raise ConfigError(f"There is no file {os.fspath(path)}; give a text to score with --text FILE.") from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{os.fspath(path)} is not UTF-8 text (byte {error.start}: {error.reason}); convert it first."
        ) from None


# ------------------------------------------------------------------------------------------------ windows


def cut_windows(
    tokens: Sequence[int] | np.ndarray, window: int, *, bos_id: int | None = None, limit: int | None = None
) -> list[list[int]]:
    """Cuts token ids into the windows that are scored.

    Args:
        tokens: of the whole text, without BOS.
        window: positions of a window, BOS included; at least 2.
        bos_id: put before every window when the model wants one.
        limit: use at most this many positions in all, whole windows only.

    Returns:
        Windows of `window` ids; one shorter window where the text is shorter than that.

    Raises:
        ConfigError: the window is too small, or nothing would be scored.
    """
    if window < 2:
        raise ConfigError(f"The window is {window}; it must be at least 2, one token to score and one before it.")
    ids = np.asarray(tokens, dtype=np.int32)
    head = [] if bos_id is None else [bos_id]
    chunk = window - len(head)
    n_windows = len(ids) // chunk
    if limit is not None:
        if limit < window:
            raise ConfigError(
                f"{limit} tokens do not fill one window of {window}; use more --tokens or a smaller --window."
            )
        n_windows = min(n_windows, limit // window)
    if n_windows == 0:
        if len(head) + len(ids) < 2:
            raise ConfigError(f"The text has {len(ids)} tokens; at least 2 are needed to score one.")
        return [head + ids.tolist()]
    return [head + ids[i * chunk : (i + 1) * chunk].tolist() for i in range(n_windows)]


# ------------------------------------------------------------------------------------------------ perplexity


@dataclass(frozen=True, kw_only=True)
class PerplexityResult:
    """Scores of all windows of a text by one engine."""

    window_nll: list[float]  # sum over a window's scored tokens, nats
    window_tokens: list[int]  # scored
    window: int
    bos_id: int | None
    tokens_sha256: str
    stderr: float | None
    ci95: tuple[float, float] | None
    seconds: float
    traffic: Traffic

    @property
    def n_tokens(self) -> int:
        """Scored tokens."""
        return sum(self.window_tokens)

    @property
    def nll_per_token(self) -> float:
        """Mean negative log likelihood, nats."""
        return math.fsum(self.window_nll) / self.n_tokens

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log likelihood."""
        return _exp(self.nll_per_token)


def perplexity(
    engine: Engine,
    tokens: Sequence[int] | np.ndarray,
    *,
    window: int = 1024,
    bos_id: int | None = None,
    limit: int | None = None,
    seed: int = 0,
    progress: Callable[[int, int, float], None] | None = None,
) -> PerplexityResult:
    """Scores a text window by window.

    Args:
        engine: an open engine whose context is at least `window`.
        tokens: of the whole text, without BOS.
        window: positions of a window, BOS included.
        bos_id: put before every window, not scored; None where the model wants none.
        limit: use at most this many positions, whole windows only.
        seed: of the bootstrap.
        progress: called with (windows done, windows in all, perplexity so far).

    Returns:
        The scores, with a bootstrap error over windows where there are at least two.

    Raises:
        ConfigError: the window does not fit into the engine's context, or nothing would be scored.
    """
    windows = cut_windows(tokens, window, bos_id=bos_id, limit=limit)
    if len(windows[0]) > engine.context:
        raise ConfigError(
            f"The window is {len(windows[0])}, the context {engine.context}; use --window {engine.context}."
        )
    sums: list[float] = []
    counts: list[int] = []
    traffic = Traffic()
    start_s = time.perf_counter()
    for ids in windows:
        nll = _score_cold(engine, ids)
        traffic.add(engine.counters())
        sums.append(math.fsum(nll.tolist()))
        counts.append(len(nll))
        if progress is not None:
            progress(len(sums), len(windows), _exp(math.fsum(sums) / sum(counts)))
    stderr, ci95 = _bootstrap(np.array(sums), np.array(counts), seed)
    return PerplexityResult(
        window_nll=sums,
        window_tokens=counts,
        window=window,
        bos_id=bos_id,
        tokens_sha256=_ids_sha256(windows, bos_id),
        stderr=stderr,
        ci95=ci95,
        seconds=time.perf_counter() - start_s,
        traffic=traffic,
    )


def _score_cold(engine: Engine, ids: list[int]) -> np.ndarray:
    """Negative log likelihoods of ids[1:], KV and column caches empty before."""
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
    return nll


def _ids_sha256(windows: list[list[int]], bos_id: int | None) -> str:
    skip = 0 if bos_id is None else 1
    digest = hashlib.sha256()
    for ids in windows:
        digest.update(np.asarray(ids[skip:], dtype="<i4").tobytes())
    return digest.hexdigest()


def _exp(nll: float) -> float:
    return math.exp(min(nll, 700.0))  # the largest that a double and JSON hold


def _resample(n_windows: int, seed: int) -> np.ndarray:
    """Window indices of every resample, [_N_RESAMPLES, n_windows]."""
    random = np.random.Generator(np.random.PCG64(seed))
    return random.integers(0, n_windows, size=(_N_RESAMPLES, n_windows))


def _bootstrap(sums: np.ndarray, counts: np.ndarray, seed: int) -> tuple[float | None, tuple[float, float] | None]:
    """Standard error and 95 % interval of the perplexity over resampled windows."""
    if len(sums) < 2:
        return None, None
    picks = _resample(len(sums), seed)
    values = np.exp(sums[picks].sum(axis=1) / counts[picks].sum(axis=1))
    low, high = np.quantile(values, [0.025, 0.975])
    return float(values.std(ddof=1)), (float(low), float(high))


def relative_change(result: PerplexityResult, reference: PerplexityResult, seed: int = 0) -> dict[str, Any]:
    """How much worse a result is than a reference on the same tokens; the error is of the paired difference.

    Returns:
        `relative` (0.05: 5 % higher perplexity) and `relative_stderr` (None for one window).

    Raises:
        ConfigError: the two were taken on different tokens.
    """
    if result.tokens_sha256 != reference.tokens_sha256 or result.window_tokens != reference.window_tokens:
        raise ConfigError("The two perplexities were taken on different tokens; they cannot be compared.")
    change = math.expm1(result.nll_per_token - reference.nll_per_token)
    if len(result.window_nll) < 2:
        return {"relative": change, "relative_stderr": None}
    picks = _resample(len(result.window_nll), seed)
    difference = np.array(result.window_nll) - np.array(reference.window_nll)
    changes = np.expm1(difference[picks].sum(axis=1) / np.array(result.window_tokens)[picks].sum(axis=1))
    return {"relative": change, "relative_stderr": float(changes.std(ddof=1))}


def eval_record(engine: Engine, source: TextSource, result: PerplexityResult) -> EvalRecord:
    """The record of a perplexity.

    Args:
        engine: what scored.
        source: the text.
        result: the scores.

    Returns:
        The record.
    """
    return EvalRecord(
        perplexity=result.perplexity,
        stderr=result.stderr,
        ci95=result.ci95,
        nll_per_token=result.nll_per_token,
        n_tokens=result.n_tokens,
        n_windows=len(result.window_nll),
        window=result.window,
        bos_id=result.bos_id,
        tokens_sha256=result.tokens_sha256,
        text=source.path,
        text_sha256=source.sha256,
        rows_joined=source.rows_joined,
        seconds=result.seconds,
        window_nll=result.window_nll,
        hit_rate=result.traffic.hit_rate,
        **engine_fields(engine),
    )


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
    on_plan: Callable[[Plan], None] | None = None,
    progress: Callable[[int, int, float], None] | None = None,
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
        on_plan: called with each engine's plan before it loads.
        progress: see `perplexity`.

    Returns:
        The record of the first configuration; `against` holds the second's.

    Raises:
        ConfigError: the text, the window or a configuration cannot be used.
    """
    for config in configs:
        _check_config(config)
    from dipper.engine import Engine
    from dipper.tokenizer import Tokenizer

    source = read_text(text, rows_joined)
    tokenizer = Tokenizer.open(bundle)
    tokens = np.asarray(tokenizer.encode(source.text, add_bos=False), dtype=np.int32)
    _return_free_memory()
    bos_id = tokenizer.bos_id if tokenizer.add_bos else None
    cut_windows(tokens, window, bos_id=bos_id, limit=limit)  # an error comes before anything is loaded
    scored = []
    for config in configs:
        with Engine.open(bundle, config, on_plan=on_plan) as engine:
            result = perplexity(engine, tokens, window=window, bos_id=bos_id, limit=limit, seed=seed, progress=progress)
            scored.append((result, eval_record(engine, source, result)))
        _return_free_memory()  # so that the next engine's budget does not pay for this one
    if len(scored) == 1:
        return scored[0][1]
    (result, record), (reference, other) = scored
    return replace(record, against={"record": other.as_dict(), **relative_change(result, reference, seed)})
