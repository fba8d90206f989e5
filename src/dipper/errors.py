"""The one exception family: every error a user can meet is a `DipperError` whose message is a whole sentence.

A message says what was seen (values), why it stops and what to do. The CLI prints it on one line and exits with 1.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "BudgetError",
    "BundleError",
    "CheckpointError",
    "ConfigError",
    "DipperError",
    "FlashError",
    "SourceError",
    "nearest",
]


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error about an unknown name: the nearest that is known, or all."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]}?" if near else f"known are {', '.join(known) or 'none'}"


class DipperError(Exception):
    """Base of all errors that dipper raises on purpose."""


class ConfigError(DipperError):
    """An option is out of range, unknown, or contradicts another."""


class SourceError(DipperError):
    """A model could not be fetched: unknown name, network, checksum."""


class CheckpointError(DipperError):
    """A GGUF file or safetensors folder is cut, malformed, or of an unknown architecture."""


class BundleError(DipperError):
    """A bundle is absent, cut, flipped, or of a newer format."""


class BudgetError(DipperError):
    """The DRAM budget is below the smallest that works; the message names it."""


class FlashError(DipperError):
    """A read from flash failed (EIO, short read) while the engine was running."""
