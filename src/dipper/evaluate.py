"""Perplexity: what a method costs in quality. Windows, error bars and records, whatever computes the scores.

A `Scorer` turns windows into sums over their tokens: `EngineScorer` of `evaluate_engine` is the native engine,
`TorchScorer` of `evaluate_torch` a PyTorch model. Everything else is here, once.

The convention is that of the usual Hugging Face scripts: the text is tokenised once, without BOS, and cut into windows
that do not overlap; every window is scored from an empty context and its first token is not scored. Where the model's
tokenizer puts a BOS first, every window starts with one in place of its first text token, so that all its text tokens
are scored. An incomplete last window is dropped. Every token goes through its own mask and cache step; KV and column
caches are empty at the start of every window.

    source = read_text("wiki.test.raw")
    result = score_text(scorer, tokenizer.encode(source.text, add_bos=False), window=1024, bos_id=None)
    result.perplexity, result.stderr
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from dipper.errors import ConfigError
from dipper.files import write_json
from dipper.records import EvalRecord, Traffic

if TYPE_CHECKING:
    pass

__all__ = [
    "PerplexityResult",
    "ResultFile",
    "Scorer",
    "TextSource",
    "WindowScore",
    "cut_windows",
    "eval_record",
    "ids_sha256",
    "paired_change",
    "read_text",
    "recovered",
    "relative_change",
    "score_text",
    "text_windows",
    "texts_of_rows",
    "wikitext_rows_joined",
]

F64 = npt.NDArray[np.float64]
Progress = Callable[[int, int, float], None]

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
        path: a UTF-8 file; of a `.jsonl` file the `text` of every row, joined by blank lines.
        rows_joined: whether the file has one WikiText row a line, to be joined by blank lines. None: by the name, which
            ends in `.raw` for the files of WikiText; the result says which was done.

    Returns:
        The text.

    Raises:
        ConfigError: the file is absent, not UTF-8 text, or empty.
    """
    joined = Path(path).suffix == ".raw" if rows_joined is None else rows_joined
    if Path(path).suffix == ".jsonl":
        text = "\n\n".join(texts_of_rows(path))
    else:
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


def texts_of_rows(path: str | os.PathLike[str]) -> list[str]:
    """Texts of a file of rows {"text": ...}.

    Raises:
        ConfigError: a row is no such thing, or as of `read_text`.
    """
    try:
        return [json.loads(row)["text"] for row in io.StringIO(_read(path)) if row.strip()]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f'{os.fspath(path)} has a row that is no {{"text": ...}} ({type(error).__name__}: {error}); '
            "give plain text."
        ) from None


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


def text_windows(
    source: TextSource, tokens: npt.NDArray[Any], window: int, *, bos_id: int | None, limit: int | None
) -> list[list[int]]:
    """`cut_windows` of a text that fills at least one window; what is scored in part says so in no table.

    Raises:
        ConfigError: as `cut_windows`, or the text is shorter than one window.
    """
    windows = cut_windows(tokens, window, bos_id=bos_id, limit=limit)
    if len(windows[0]) < window:
        raise ConfigError(
            f"{source.path} has {len(tokens)} tokens, less than one window of {window}; use --window "
            f"{len(windows[0])} or a longer text."
        )
    return windows


# ------------------------------------------------------------------------------------------------ scorers


@dataclass(frozen=True, kw_only=True)
class WindowScore:
    """What one window gave: sums over its scored tokens."""

    nll: float  # nats
    tokens: int  # scored
    dense_nll: float | None = None  # of the dense model on the same tokens; the next two are against it as well
    kl: float | None = None  # KL(dense || method), nats
    same_top1: int | None = None  # tokens after which both find the same token likeliest
    touched: float | None = None  # share of the dense MLP's weight bits that a token reads, mean; None: unknown
    traffic: Traffic = field(default_factory=Traffic)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> WindowScore:
        """The score that `dataclasses.asdict` gave, after a way through JSON."""
        return cls(**{**value, "traffic": Traffic(**value["traffic"])})


class Scorer(Protocol):
    """Scores windows, each from an empty context and with empty column caches."""

    @property
    def context(self) -> int:
        """Positions that a window may have."""

    @property
    def batch(self) -> int:
        """Windows that `score` takes at once."""

    def score(self, windows: Sequence[Sequence[int]]) -> list[WindowScore]:
        """Scores ids[1:] of every window; at most `batch` windows of one length."""

    def fields(self) -> dict[str, Any]:
        """The keys of an `EvalRecord` that say what scored."""


# ------------------------------------------------------------------------------------------------ perplexity


@dataclass(frozen=True, kw_only=True)
class PerplexityResult:
    """Scores of all windows of a text. Error bars are bootstraps over windows, None for a single one."""

    windows: list[WindowScore]
    window: int
    bos_id: int | None
    tokens_sha256: str
    seconds: float
    seed: int = 0

    @property
    def window_nll(self) -> list[float]:
        """Sum over each window's scored tokens, nats."""
        return [w.nll for w in self.windows]

    @property
    def window_tokens(self) -> list[int]:
        """Scored tokens of each window."""
        return [w.tokens for w in self.windows]

    @property
    def n_tokens(self) -> int:
        """Scored tokens."""
        return sum(self.window_tokens)

    @property
    def traffic(self) -> Traffic:
        """Cache and flash counters over all windows."""
        total = Traffic()
        for window in self.windows:
            total.add(window.traffic)
        return total

    @property
    def nll_per_token(self) -> float:
        """Mean negative log likelihood, nats."""
        return math.fsum(self.window_nll) / self.n_tokens

    @property
    def nll_stderr(self) -> float | None:
        """Standard error of `nll_per_token`."""
        return _stderr(_resampled_means(self.window_nll, self.window_tokens, self.seed))

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log likelihood."""
        return _exp(self.nll_per_token)

    @property
    def stderr(self) -> float | None:
        """Standard error of the perplexity."""
        return _stderr(self._resampled_perplexities())

    @property
    def ci95(self) -> tuple[float, float] | None:
        """95 % interval of the perplexity."""
        values = self._resampled_perplexities()
        if values is None:
            return None
        low, high = np.quantile(values, [0.025, 0.975])
        return float(low), float(high)

    def _resampled_perplexities(self) -> F64 | None:
        means = _resampled_means(self.window_nll, self.window_tokens, self.seed)
        return None if means is None else np.exp(np.minimum(means, _LARGEST_NLL))

    @property
    def touched(self) -> float | None:
        """Share of the dense MLP's weight bits that a token reads, mean over tokens."""
        shares = [w.touched for w in self.windows]
        return None if None in shares else float(np.average(np.array(shares, np.float64), weights=self.window_tokens))

    def against_dense(self, name: str) -> tuple[float | None, float | None]:
        """Mean per token of `kl` or `same_top1` and its standard error; (None, None) where no dense model ran."""
        sums = [getattr(w, name) for w in self.windows]
        if None in sums:
            return None, None
        return math.fsum(sums) / self.n_tokens, _stderr(_resampled_means(sums, self.window_tokens, self.seed))

    def dense(self) -> PerplexityResult | None:
        """The dense model's scores of the same windows, where it ran side by side."""
        if any(w.dense_nll is None for w in self.windows):
            return None
        return replace(self, windows=[WindowScore(nll=w.dense_nll or 0.0, tokens=w.tokens) for w in self.windows])


def score_text(
    scorer: Scorer,
    tokens: Sequence[int] | npt.NDArray[Any],
    *,
    window: int = 1024,
    bos_id: int | None = None,
    limit: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    earlier: tuple[Sequence[WindowScore], float] = ((), 0.0),
    save: Callable[[list[WindowScore], float], None] | None = None,
) -> PerplexityResult:
    """Scores a text window by window.

    Args:
        scorer: what scores; its context is at least `window`.
        tokens: of the whole text, without BOS.
        window: positions of a window, BOS included.
        bos_id: put before every window, not scored; None where the model wants none.
        limit: use at most this many positions, whole windows only.
        seed: of the bootstrap.
        progress: called with (windows done, windows in all, perplexity so far).
        earlier: first windows that were scored before, and the seconds they took.
        save: called with all windows and seconds so far, after every batch.

    Returns:
        The scores.

    Raises:
        ConfigError: the window does not fit into the scorer's context, or nothing would be scored.
        DipperError: a score is not finite.
    """
    windows = cut_windows(tokens, window, bos_id=bos_id, limit=limit)
    if len(windows[0]) > scorer.context:
        raise ConfigError(
            f"The window is {len(windows[0])}, the context {scorer.context}; use --window {scorer.context}."
        )
    scores, before_s = list(earlier[0]), earlier[1]
    start_s = time.perf_counter() - before_s
    while len(scores) < len(windows):
        scores += scorer.score(windows[len(scores) : len(scores) + scorer.batch])
        if save is not None:
            save(scores, time.perf_counter() - start_s)
        if progress is not None:
            mean = math.fsum(s.nll for s in scores) / sum(s.tokens for s in scores)
            progress(len(scores), len(windows), _exp(mean))
    return PerplexityResult(
        windows=scores,
        window=window,
        bos_id=bos_id,
        tokens_sha256=ids_sha256(windows, bos_id),
        seconds=time.perf_counter() - start_s,
        seed=seed,
    )


def ids_sha256(windows: Sequence[Sequence[int]], bos_id: int | None) -> str:
    """Of the text's ids in all windows, int32 little-endian, without BOS."""
    skip = 0 if bos_id is None else 1
    digest = hashlib.sha256()
    for ids in windows:
        digest.update(np.asarray(ids[skip:], dtype="<i4").tobytes())
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------ error bars

_LARGEST_NLL = 700.0  # its exponential is about the largest that a double and JSON hold


def _exp(nll: float) -> float:
    return math.exp(min(nll, _LARGEST_NLL))


def _resampled_means(sums: Sequence[float], counts: Sequence[int], seed: int) -> F64 | None:
    """Means per token of `_N_RESAMPLES` draws of windows with replacement; None for a single window."""
    if len(sums) < 2:
        return None
    random = np.random.Generator(np.random.PCG64(seed))
    picks = random.integers(0, len(sums), size=(_N_RESAMPLES, len(sums)))
    means: F64 = np.array(sums, np.float64)[picks].sum(axis=1) / np.array(counts)[picks].sum(axis=1)
    return means


def _stderr(values: F64 | None) -> float | None:
    return None if values is None else float(values.std(ddof=1))


def paired_change(
    nll: Sequence[float], reference_nll: Sequence[float], counts: Sequence[int], seed: int = 0
) -> dict[str, float | None]:
    """How much higher a perplexity is than a reference's on the same windows.

    Args:
        nll: sum over each window, nats.
        reference_nll: of the reference, on the same tokens.
        counts: scored tokens of each window.
        seed: of the bootstrap.

    Returns:
        `relative` (0.05: 5 % higher) and `relative_stderr` of the paired difference, None for one window.
    """
    differences = [a - b for a, b in zip(nll, reference_nll, strict=True)]
    means = _resampled_means(differences, counts, seed)
    return {
        "relative": math.expm1(min(math.fsum(differences) / sum(counts), _LARGEST_NLL)),
        "relative_stderr": None if means is None else _stderr(np.expm1(np.minimum(means, _LARGEST_NLL))),
    }


def relative_change(result: PerplexityResult, reference: PerplexityResult, seed: int = 0) -> dict[str, Any]:
    """`paired_change` of two results.

    Raises:
        ConfigError: the two were taken on different tokens.
    """
    if result.tokens_sha256 != reference.tokens_sha256 or result.window_tokens != reference.window_tokens:
        raise ConfigError("The two perplexities were taken on different tokens; they cannot be compared.")
    return paired_change(result.window_nll, reference.window_nll, result.window_tokens, seed)


def recovered(
    dense_nll: Sequence[float],
    sparse_nll: Sequence[float],
    compensated_nll: Sequence[float],
    counts: Sequence[int],
    seed: int = 0,
) -> dict[str, float | None]:
    """Share of what a method lost in perplexity that a compensation brought back.

    Args:
        dense_nll, sparse_nll, compensated_nll: sums over each window, nats, on the same tokens.
        counts: scored tokens of each window.
        seed: of the bootstrap.

    Returns:
        `recovered`, (sparse - compensated) / (sparse - dense) in perplexities, and `recovered_stderr` over windows
        drawn together; None where nothing was lost, or for one window.
    """
    columns = (dense_nll, sparse_nll, compensated_nll)
    dense, sparse, compensated = (_exp(math.fsum(column) / sum(counts)) for column in columns)
    if sparse <= dense:
        return {"recovered": None, "recovered_stderr": None}
    draws = [_resampled_means(column, counts, seed) for column in columns]
    stderr = None
    if all(draw is not None for draw in draws):
        low, high, between = (np.exp(np.minimum(draw, _LARGEST_NLL)) for draw in draws)  # type: ignore[arg-type]
        stderr = _stderr((high - between) / (high - low))
    return {"recovered": (sparse - compensated) / (sparse - dense), "recovered_stderr": stderr}


# ------------------------------------------------------------------------------------------------ results


def eval_record(scorer: Scorer, source: TextSource, result: PerplexityResult) -> EvalRecord:
    """The record of a perplexity.

    Args:
        scorer: what scored.
        source: the text.
        result: the scores.

    Returns:
        The record.
    """
    kl, kl_stderr = result.against_dense("kl")
    same_top1, same_top1_stderr = result.against_dense("same_top1")
    touched, fields = result.touched, scorer.fields()
    dense_bytes = fields["mlp_bytes"]
    beside = fields.get("options", {}).get("adapter_bytes", 0)  # read whole for every token
    return EvalRecord(
        perplexity=result.perplexity,
        stderr=result.stderr,
        ci95=result.ci95,
        nll_per_token=result.nll_per_token,
        nll_stderr=result.nll_stderr,
        n_tokens=result.n_tokens,
        n_windows=len(result.windows),
        window=result.window,
        bos_id=result.bos_id,
        tokens_sha256=result.tokens_sha256,
        text=source.path,
        text_sha256=source.sha256,
        rows_joined=source.rows_joined,
        seconds=result.seconds,
        window_nll=result.window_nll,
        window_tokens=result.window_tokens,
        hit_rate=result.traffic.hit_rate,
        touched=touched,
        mlp_bytes_per_token=None if touched is None or dense_bytes is None else touched * dense_bytes + beside,
        kl=kl,
        kl_stderr=kl_stderr,
        same_top1=same_top1,
        same_top1_stderr=same_top1_stderr,
        **fields,
    )


class ResultFile:
    """A result on disk that grows while it is computed, so that an interrupted run continues.

    The file is always whole: `{..., "config", "parts": {name: ...}}`, until `finish` puts a record in its place that
    holds the same `config`. Only a run with that configuration may continue or replace it.

        file = ResultFile("results/dip.json", config)
        if "0" not in file.parts:
            file.save("0", compute())
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None,
        config: Mapping[str, Any],
        *,
        key: str = "parts",
        head: Mapping[str, Any] | None = None,
    ) -> None:
        """Opens a result.

        Args:
            path: where the result is kept; None: nowhere.
            config: JSON types; what must be equal for parts to belong together.
            key: what the parts are called in the file.
            head: what else is in the file beside the parts.

        Raises:
            ConfigError: the file is another run's, or no result at all.
        """
        self.path = None if path is None else Path(path)
        self.config: dict[str, Any] = json.loads(json.dumps(config))  # as it will be read back
        self._key, self._head = key, head or {"schema": "dipper-part/1"}
        self.parts: dict[str, Any] = {}
        self.record: dict[str, Any] | None = None
        if self.path is not None and self.path.exists():
            self._read(self.path)

    def _read(self, path: Path) -> None:
        try:
            held = json.loads(path.read_text(encoding="utf-8"))
            config = held["config"]
        except (ValueError, KeyError, TypeError):
            raise ConfigError(f"{path} holds no result of dipper's; give another --out, or remove it.") from None
        if config != self.config:
            names = sorted(k for k in {*config, *self.config} if config.get(k) != self.config.get(k))
            seen = ", ".join(f"{k} {config.get(k)!r}, not {self.config.get(k)!r}" for k in names[:3])
            raise ConfigError(f"{path} was made with another configuration ({seen}); give another --out, or remove it.")
        if self._key in held:
            self.parts = held[self._key]
        else:
            self.record = held

    def save(self, name: str, part: Any) -> None:
        """Keeps what was computed of one part."""
        self.parts[name] = part
        if self.path is not None:
            write_json(self.path, self.content())

    def content(self) -> dict[str, Any]:
        """The file as it is while there are parts."""
        return {**self._head, "config": self.config, self._key: self.parts}

    def finish(self, record: Mapping[str, Any]) -> None:
        """Puts the finished record, whose `config` is this file's, in the place of the parts."""
        self.record = dict(record)
        if self.path is not None:
            write_json(self.path, record)

    def windows(self, name: str) -> tuple[list[WindowScore], float]:
        """Windows of a part that are already scored, and the seconds they took."""
        part = self.parts.get(name, {"windows": [], "seconds": 0.0})
        return [WindowScore.from_dict(w) for w in part["windows"]], part["seconds"]

    def save_windows(self, name: str, windows: Sequence[WindowScore], seconds: float) -> None:
        """Keeps the windows of a part that are scored so far."""
        self.save(name, {"seconds": seconds, "windows": [asdict(w) for w in windows]})
