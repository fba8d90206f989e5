"""Files that are whole or absent: built beside their place, flushed, renamed."""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from dipper.errors import ConfigError

__all__ = ["check_target", "locked", "safe_name", "whole_file", "write_json"]


def safe_name(name: str) -> str:
    """A name, such as a model's, as a part of a file's name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "model"


def check_target(path: str | os.PathLike[str] | None) -> None:
    """Before hours of work: whether a file could be written there; None: nothing is.

    Raises:
        ConfigError: its folder does not exist, or it is a folder itself.
    """
    if path is None:
        return
    target = Path(path)
    if not target.parent.is_dir():
        raise ConfigError(f"Cannot write {target}: the folder {target.parent} does not exist. Create it first.")
    if target.is_dir():
        raise ConfigError(f"Cannot write {target}: it is a folder. Name a file in it.")


def write_json(path: str | os.PathLike[str], value: Mapping[str, Any]) -> None:
    """Writes a JSON file that is whole or absent.

    Raises:
        ConfigError: the folder does not exist.
    """
    with whole_file(path) as out:
        out.write((json.dumps(value, ensure_ascii=False, allow_nan=False, indent=1) + "\n").encode())


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file to write that is whole or absent: built beside its place, flushed, renamed when the block ends well.

    Raises:
        ConfigError: the folder does not exist.
    """
    check_target(path)
    target = Path(path)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as out:
            yield out
            out.flush()
            os.fsync(out.fileno())
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def locked(path: str | os.PathLike[str]) -> Iterator[None]:
    """One process at a time: the second waits. The file is made where it is not, and stays."""
    with open(path, "a", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
