"""Sampling and the one generator that feeds `run`, `chat`, `bench` and whatever serves text later.

Owns `Sampling` (what to draw), `Sampler` (logits -> token), `StopScanner` (stop strings) and `stream_generate()`.

A generation is one prefill and then decode steps. The first new token comes from the prefill's logits; the engine's
counters are reset there, so that n new tokens are n - 1 counted steps, and the last token is never fed back.

    for step in stream_generate(engine, tokenizer, tokens, max_new_tokens=64, sampling=Sampling()):
        print(step.text, end="", flush=True)
    step.finish_reason, step.record.tok_per_s
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dipper.errors import ConfigError, DipperError
from dipper.records import RunRecord, Timing, run_record

if TYPE_CHECKING:
    from dipper.engine import Engine
    from dipper.tokenizer import DecodeStream, Tokenizer

__all__ = ["GenerationStep", "Sampler", "Sampling", "StopScanner", "stream_generate"]

# Logits looked at first when only top-p cuts the tail; grown eightfold until they hold the mass. A model that is sure
# of itself needs a handful, so the 150k-entry sort is never paid.
_NUCLEUS_START = 256


# ------------------------------------------------------------------------------------------------ sampling


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn. Filters act in the order temperature, top-k, top-p, min-p.

    Attributes:
        temperature: 0 takes the largest logit (ties: the lower token id); otherwise logits are divided by it.
        top_k: keep the k largest logits (ties: the lower token id).
        top_p: of what top-k left, renormalised, keep the fewest most likely tokens that hold this mass.
        min_p: of what is left, drop tokens less likely than this share of the most likely one.
        seed: of the random stream; the same seed, prompt and engine give the same text.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ConfigError(f"temperature is {self.temperature}; it must be 0 (greedy) or a positive number.")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k is {self.top_k}; it must be at least 1, or left out to keep every token.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is {self.top_p}; it must be in (0, 1], or left out to keep every token.")
        if self.min_p is not None and not 0 <= self.min_p < 1:
            raise ConfigError(f"min_p is {self.min_p}; it must be in [0, 1), or left out to keep every token.")
        if self.seed < 0:
            raise ConfigError(f"seed is {self.seed}; it must be 0 or more.")
        unused = [name for name in ("top_k", "top_p", "min_p") if getattr(self, name) is not None]
        if self.temperature == 0 and unused:
            raise ConfigError(
                f"{', '.join(unused)} would have no effect at temperature 0 (greedy); set a temperature, e.g. 0.7."
            )

    def filters(self) -> dict[str, Any]:
        """All options but the seed, for records."""
        return {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p, "min_p": self.min_p}


class Sampler:
    """Draws tokens by a `Sampling`; holds the random stream. One uniform number is used a token, whatever the filters.

    Cost is O(V) in the vocabulary: maxima and partitions, no full sort.
    """

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._random = np.random.Generator(np.random.PCG64(sampling.seed))

    def __call__(self, logits: np.ndarray) -> int:
        """Draws one token.

        Args:
            logits: f32 [V].

        Returns:
            The token id.

        Raises:
            DipperError: a logit is NaN, or the largest is infinite.
        """
        best = int(np.argmax(logits))  # argmax stops at a NaN, so this one look finds any
        if not np.isfinite(logits[best]):
            raise DipperError(
                f"The model's logits hold {logits[best]} at token {best}: the weights or the computation are broken. "
                "Check the bundle with `dipper inspect`."
            )
        if self.sampling.temperature == 0:
            return best
        kept, weights = self._candidates(logits, float(logits[best]))
        total = np.cumsum(weights)  # f64 [n_kept], in token order
        drawn = int(np.searchsorted(total, self._random.random() * total[-1], side="right"))
        return int(kept[min(drawn, len(kept) - 1)])

    def _candidates(self, logits: np.ndarray, largest: float) -> tuple[np.ndarray, np.ndarray]:
        """Token ids that pass the filters, ascending, and their weights (probabilities up to a factor)."""
        s = self.sampling
        if s.top_k is not None and s.top_k < len(logits):
            kept = _largest(logits, s.top_k)
            values = logits[kept]
        else:
            kept, values = np.arange(len(logits)), logits
        # Relative to the largest, so that no exponent overflows: the top token weighs 1.
        weights = np.exp((values.astype(np.float64) - largest) / s.temperature)
        if s.top_p is not None and s.top_p < 1:
            inside = _nucleus(weights, s.top_p)
            kept, weights = kept[inside], weights[inside]
        if s.min_p:
            inside = np.flatnonzero(weights >= s.min_p)
            kept, weights = kept[inside], weights[inside]
        return kept, weights


def _largest(values: np.ndarray, k: int) -> np.ndarray:
    """Indices of the k largest values, ascending; ties at the border go to the lower index."""
    border = np.partition(values, len(values) - k)[len(values) - k]
    above = np.flatnonzero(values > border)
    ties = np.flatnonzero(values == border)[: k - len(above)]
    return np.sort(np.concatenate([above, ties]))


def _nucleus(weights: np.ndarray, mass: float) -> np.ndarray:
    """Indices, ascending, of the fewest largest weights that hold `mass` of their sum; ties: the lower index."""
    wanted = mass * weights.sum()
    n = min(_NUCLEUS_START, len(weights))
    while True:
        top = _largest(weights, n)
        order = top[np.argsort(-weights[top], kind="stable")]
        held = np.cumsum(weights[order])
        if held[-1] >= wanted or n == len(weights):
            break
        n = min(8 * n, len(weights))
    n_kept = min(int(np.searchsorted(held, wanted, side="left")) + 1, len(order))
    return np.sort(order[:n_kept])


# ------------------------------------------------------------------------------------------------ stop strings


class StopScanner:
    """Cuts a stream of text at the first stop string, and never lets a part of one through.

    Text whose end could still grow into a stop string is held back until it does or cannot any more.
    """

    def __init__(self, stop: Sequence[str] = ()) -> None:
        if isinstance(stop, str):
            raise ConfigError(f"stop is the string {stop!r}; give a list of strings, e.g. [{stop!r}].")
        if any(not s for s in stop):
            raise ConfigError("A stop string is empty: it would stop before the first character. Leave it out.")
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False

    def feed(self, text: str) -> str:
        """Takes the next piece; returns what may be shown. After a stop string (`stopped`) nothing is."""
        if self.stopped or not self._stop:
            return "" if self.stopped else text
        held = self._held + text
        # The first to be complete, and of those the longest: the same wherever the pieces end.
        found = min(((at + len(s), at) for s in self._stop if (at := held.find(s)) >= 0), default=None)
        if found is not None:
            self.stopped, self._held = True, ""
            return held[: found[1]]
        keep = max((_overlap(held, s) for s in self._stop), default=0)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def flush(self) -> str:
        """What was held back, at the end of the text."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins, but is not, `stop`."""
    for n in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:n]):
            return n
    return 0


# ------------------------------------------------------------------------------------------------ generation


@dataclass(frozen=True, kw_only=True)
class GenerationStep:
    """One new token. `text` may lag behind it (half a character, a possible stop string) and may be empty."""

    token: int
    text: str
    finish_reason: str | None = None  # on the last step: "stop" (end of text or stop string), "length", "context"
    record: RunRecord | None = None  # on the last step


def stream_generate(
    engine: Engine,
    tokenizer: Tokenizer,
    prompt_tokens: Sequence[int],
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    stop: Sequence[str] = (),
    ignore_eos: bool = False,
    clock: Callable[[], float] = time.perf_counter,
) -> Iterator[GenerationStep]:
    """Appends a prompt to what the engine holds and generates from there.

    Args:
        engine: an open engine; its KV and column caches are used as they are.
        tokenizer: the bundle's.
        prompt_tokens: what to append; at least one token.
        max_new_tokens: at least 1.
        sampling: greedy by default.
        stop: strings that end the text; they and what follows are not shown.
        ignore_eos: go on after an end-of-text token, as benchmarks of a fixed length must.
        clock: seconds; tests give their own.

    Returns:
        An iterator of one step a token; the last carries `finish_reason` and `record`. Arguments are checked here, the
        prefill runs when the first step is asked for.

    Raises:
        ConfigError: an argument is out of range, or the prompt does not fit into the context.
    """
    _check_room(engine, len(prompt_tokens), max_new_tokens)
    scanner = StopScanner(stop)
    return _generate(
        engine,
        _TextStream(tokenizer.stream(), scanner),
        list(prompt_tokens),
        max_new_tokens=max_new_tokens,
        sampling=sampling or Sampling(),
        eos=frozenset() if ignore_eos else frozenset(tokenizer.eos_ids),
        clock=clock,
    )


def _check_room(engine: Engine, n_prompt: int, max_new_tokens: int) -> None:
    if max_new_tokens < 1:
        raise ConfigError(f"{max_new_tokens} new tokens were asked for; at least 1 is needed.")
    if n_prompt < 1:
        raise ConfigError("The prompt has no tokens; write at least one word.")
    if engine.n_past + n_prompt > engine.context:
        held = f" after the {engine.n_past} already held" if engine.n_past else ""
        raise ConfigError(
            f"The prompt has {n_prompt} tokens{held}, but the context is {engine.context}: "
            f"shorten it or use --ctx {engine.n_past + n_prompt + max_new_tokens}."
        )


class _TextStream:
    """Tokens -> shown text: the tokenizer's stream, then the stop scanner; keeps the whole text."""

    def __init__(self, decoder: DecodeStream, scanner: StopScanner) -> None:
        self._decoder = decoder
        self._scanner = scanner
        self.text = ""

    @property
    def stopped(self) -> bool:
        return self._scanner.stopped

    def push(self, token: int) -> str:
        return self._show(self._scanner.feed(self._decoder.push(token)))

    def finish(self) -> str:
        """The rest: a last broken character, then what was held back for a stop string."""
        shown = self._scanner.feed(self._decoder.finish())
        return self._show(shown + self._scanner.flush())

    def _show(self, text: str) -> str:
        self.text += text
        return text


def _generate(
    engine: Engine,
    stream: _TextStream,
    prompt: list[int],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    eos: frozenset[int],
    clock: Callable[[], float],
) -> Iterator[GenerationStep]:
    sampler = Sampler(sampling)
    start_s = clock()
    logits = engine.prefill(prompt)
    engine.reset_counters()
    token = sampler(logits)
    first_s = last_s = clock()
    n_tokens = 1
    while True:
        text = "" if token in eos else stream.push(token)
        reason = _finish_reason(engine, token in eos or stream.stopped, n_tokens >= max_new_tokens)
        if reason is not None:
            break
        yield GenerationStep(token=token, text=text)
        token = sampler(engine.step(token, copy=False))
        last_s = clock()
        n_tokens += 1
    if not stream.stopped:
        text += stream.finish()
    record = run_record(
        engine,
        Timing(start_s=start_s, first_s=first_s, last_s=last_s, n_tokens=n_tokens),
        text=stream.text,
        n_prompt=len(prompt),
        finish_reason=reason,
        seed=sampling.seed,
        sampling=sampling.filters(),
    )
    yield GenerationStep(token=token, text=text, finish_reason=reason, record=record)


def _finish_reason(engine: Engine, stopped: bool, is_long: bool) -> str | None:
    if stopped:
        return "stop"
    if is_long:
        return "length"
    return "context" if engine.n_past >= engine.context else None
