"""What verbs share: options as configurations, and what is said while they work."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dipper.errors import ConfigError
from dipper.options import listed

if TYPE_CHECKING:
    from dipper.engine import Engine, EngineConfig, Plan
    from dipper.generate import Sampling
    from dipper.sources import Progress
    from dipper.tokenizer import Tokenizer

__all__ = [
    "check_context",
    "config_of",
    "download_bar",
    "fit_progress",
    "for_method",
    "one_line",
    "open_engine",
    "open_tokenizer",
    "parse_base_bits",
    "parse_two_bits",
    "print_plan",
    "pytorch_method",
    "refuse",
    "sampling_of",
    "say",
    "say_answers",
    "say_progress",
    "size_of",
    "split_bits",
]


def parse_base_bits(text: str) -> int | tuple[int, int]:
    """Bits of `--base-bits`: of all columns, or of input and of GLU columns."""
    bits = _one_or_two("--base-bits", text)
    return bits[0] if len(bits) == 1 else (bits[0], bits[1])


def _one_or_two(name: str, text: str) -> list[int]:
    parts = listed(name, text)
    if not all(part.isdecimal() for part in parts) or len(parts) > 2:
        raise ConfigError(f"{name} {text}: write a number such as 2, or two, of input and GLU columns: 2,3.")
    return [int(part) for part in parts]


def parse_two_bits(name: str, text: str | None) -> tuple[int, int] | None:
    """Bits of input and of GLU columns; one number is both."""
    if text is None:
        return None
    bits = _one_or_two(name, text)
    return bits[0], bits[-1]


def split_bits(options: dict[str, Any]) -> dict[str, Any]:
    """Base bits and units of `planes` out of their texts."""
    return {
        "base_bits": parse_two_bits("--base-bits", options["base_bits"]), "unit_bytes": size_of(options["unit_bytes"]),
    }  # fmt: skip


def size_of(text: str | None) -> int | None:
    """Bytes of a size such as 4KB; None: none was given."""
    from dipper.budget import parse_bytes

    return None if text is None else parse_bytes(text, 0)


def refuse(options: dict[str, Any], where: str, instead: str) -> None:
    """ConfigError for the first option that was given and has no effect `where`; `instead` says what to do."""
    for name, value in options.items():
        if value is not None:
            raise ConfigError(f"--{name.replace('_', '-')} has no effect {where}: drop it, or {instead}.")


# Options that act with some methods only. Elsewhere they would be dropped in silence, so giving them is an error.
_ACTS_WITH = {
    "density": ("dip", "dip-ca"),
    "d_in": ("dip", "dip-ca"),
    "d_glu": ("dip", "dip-ca"),
    "fetch": ("planes",),
    "fetch_glu": ("planes",),
    "read_cost": ("planes",),
    "io_budget": ("planes",),
    "device_profile": ("auto", "planes"),
    "whole": ("planes",),
    "cache": ("dip", "dip-ca", "planes"),
    "calibration": ("dip", "dip-ca"),
    "cold": ("dip", "dip-ca", "planes"),
    "gamma": ("dip-ca",),
    "mlp_dram": ("auto", "dense-stream", "dip", "dip-ca", "planes"),
}


def config_of(*, method: str | None, context: int | None, **options: Any) -> EngineConfig:
    """The options that were given, as a configuration; defaults are the engine's, and method auto."""
    from dipper.engine import METHODS, EngineConfig

    method = method or "auto"
    for name, methods in _ACTS_WITH.items():
        if options.get(name) is not None and method in METHODS and method not in methods:
            flag = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{flag} has no effect with {method}: drop it, or use --method {' or '.join(methods)}.")
    given = for_method(method, options)
    return EngineConfig(**given) if context is None else EngineConfig(**given, context=context)


def for_method(method: str, options: dict[str, Any]) -> dict[str, Any]:
    """The method and those of the given options that act with it."""
    acting = {k: v for k, v in options.items() if v is not None and method in _ACTS_WITH.get(k, (method,))}
    return {"method": method, **acting}


def sampling_of(temperature: float, top_k: int | None, top_p: float | None, min_p: float | None, seed: int) -> Sampling:
    """The options of sampling as one."""
    from dipper.generate import Sampling

    return Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)


def check_context(bundle: Path, given: str, wanted: int, instead: str) -> None:
    """Refuses more positions than the model has, in terms of the option that asked for them."""
    from dipper.bundle import Bundle as BundleFile

    limit = BundleFile.open(bundle).model.max_context
    if wanted > limit:
        raise ConfigError(f"{given} needs a context of {wanted}, the model has {limit}: use {instead}.")


def open_tokenizer(bundle: Path) -> Tokenizer:
    """A bundle's tokenizer."""
    from dipper.tokenizer import Tokenizer

    return Tokenizer.open(bundle)


def open_engine(bundle: Path, config: EngineConfig) -> Engine:
    """The engine, its plan printed before anything is loaded."""
    from dipper.engine import Engine

    return Engine.open(bundle, config, on_plan=print_plan)


def print_plan(plan: Plan) -> None:
    """Before any weight is loaded, so that a budget can be judged before it is spent."""
    for line in plan.lines():
        say(line)


def say(line: str) -> None:
    """A line on stderr."""
    print(line, file=sys.stderr, flush=True)


def say_progress(done: int, total: int, value: float) -> None:
    """Windows that are scored, on a terminal."""
    if sys.stderr.isatty():
        end = "\n" if done == total else ""
        print(f"\rwindow {done}/{total}, perplexity {value:.3f}", end=end, file=sys.stderr, flush=True)


def say_answers(task: str, done: int, total: int) -> None:
    """Items of a task that are answered, on a terminal."""
    if sys.stderr.isatty():
        end = "\n" if done == total else ""
        print(f"\r{task}: {done}/{total} continuations", end=end, file=sys.stderr, flush=True)


def fit_progress(stage: str, done: int, total: int) -> None:
    """Stages of a calibration, on a terminal."""
    if sys.stderr.isatty():
        print(f"\r{stage}: {done}/{total}   ", end="", file=sys.stderr, flush=True)


@contextmanager
def download_bar() -> Iterator[Progress | None]:
    """A progress bar on stderr; none where stderr is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from dipper.sources import progress_bar

    with progress_bar() as report:
        yield report


def pytorch_method(method: str, options: dict[str, Any]) -> dict[str, Any]:
    """Options of a `MethodConfig`, those that were given."""
    from dipper.budget import DEFAULT_FETCH

    given = {name: value for name, value in options.items() if value is not None}
    d_in, d_glu = given.pop("d_in", None), given.pop("d_glu", None)
    if (d_in is None) != (d_glu is None):
        raise ConfigError("d_in and d_glu go together: give both or neither")
    if d_in is not None:
        given |= {"densities": (d_in, d_glu), "density": (2 * d_in + d_glu) / 3}
    elif method == "planes" and not {"density", "fetch"} & set(given):
        given["fetch"] = DEFAULT_FETCH
    elif method not in ("dense", "planes", "resident"):
        given.setdefault("density", 0.7)
    return {"name": method, **given}


def one_line(error: BaseException) -> str:
    """An error's message without line ends."""
    return " ".join(str(error).split())
