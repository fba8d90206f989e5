"""Traces: what every decoded token did to every region (docs/trace-format.md). Written by the engine, read here.

Example:
    >>> header, frames = read_trace("run.trace")            # doctest: +SKIP
    >>> sum(frame.flash_bytes for frame in frames)          # doctest: +SKIP
"""

from __future__ import annotations

import json
import struct
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from .errors import ConfigError

__all__ = ["Frame", "read_trace"]

_MAGIC = b"DIPTRACE"
_VERSION = 2
_HEADER_KEYS = {
    "model", "bundle", "method", "gamma", "densities", "cache", "cache_decay", "cold", "calibration", "context",
    "block_tokens", "regions",
}  # fmt: skip
_FRAME = struct.Struct("<2IiI4I2Q")
_READ = np.dtype([("offset", "<u8"), ("bytes", "<u4")])


@dataclass(frozen=True, kw_only=True)
class Frame:
    """One token at one region.

    Attributes:
        is_prompt: the mask warmed the cache in prefill; nothing was read or counted.
        position: of the token in its sequence.
        token: its id.
        region: index into the header's regions.
        mask: selected columns, ascending int32 [n_selected].
        hit: bool [n_selected], cached before the token.
        reads: ranges read, structured [n_reads] of (offset, bytes).
        scores: magnitudes of every column before gamma, f32 [n_columns]; empty in a trace without scores.
        flash_bytes, useful_bytes: asked of the disk; records that were missing.
    """

    is_prompt: bool
    position: int
    token: int
    region: int
    mask: npt.NDArray[np.int32]
    hit: npt.NDArray[np.bool_]
    reads: npt.NDArray[Any]
    scores: npt.NDArray[np.float32]
    flash_bytes: int
    useful_bytes: int


def read_trace(path: str | Path) -> tuple[dict[str, Any], Generator[Frame, None, None]]:
    """Header and frames of a trace; frames are read as they are asked for.

    Raises:
        ConfigError: no such file, not a trace, another version, or cut short.
    """
    if not Path(path).is_file():
        raise ConfigError(f"{path} is no file: give a trace, as dipper run --trace writes")
    file = open(path, "rb")  # noqa: SIM115  closed by the generator
    start = file.read(16)
    if start[:8] != _MAGIC or len(start) < 16:
        file.close()
        raise ConfigError(
            f"{path} starts with {start[:8]!r}, not {_MAGIC!r}: it is no trace; write one with dipper run --trace"
        )
    version, length = struct.unpack("<2I", start[8:])
    if version != _VERSION:
        file.close()
        raise ConfigError(
            f"{path} has trace version {version}, this dipper reads {_VERSION}: "
            + ("upgrade dipper" if version > _VERSION else "record it again")
        )
    text = file.read(length)
    try:
        header: dict[str, Any] = json.loads(text)
        if not set(header) >= _HEADER_KEYS or not isinstance(header["regions"], list):
            raise ValueError(f"it lacks {', '.join(sorted(_HEADER_KEYS - set(header))) or 'a list of regions'}")
    except (ValueError, TypeError, RecursionError) as error:
        file.close()
        raise ConfigError(f"{path} ends inside its header, or that is damaged ({error}): record it again") from error
    return header, _frames(file, path)


def _frames(file: BinaryIO, path: str | Path) -> Generator[Frame, None, None]:
    with file:
        while head := file.read(_FRAME.size):
            if len(head) < _FRAME.size:
                raise ConfigError(f"{path} ends inside a frame: the trace is cut, record it again")
            phase, position, token, region, n_selected, _, n_reads, n_scores, flash_bytes, useful_bytes = _FRAME.unpack(
                head
            )

            def take(dtype: Any, count: int) -> npt.NDArray[Any]:
                data = file.read(np.dtype(dtype).itemsize * count)
                if len(data) < np.dtype(dtype).itemsize * count:
                    raise ConfigError(f"{path} ends inside a frame: the trace is cut, record it again")
                return np.frombuffer(data, dtype)

            mask = take("<i4", n_selected)
            hit = take("u1", n_selected).astype(bool)
            yield Frame(
                is_prompt=phase == 0,
                position=position,
                token=token,
                region=region,
                mask=mask,
                hit=hit,
                reads=take(_READ, n_reads),
                scores=take("<f4", n_scores),
                flash_bytes=flash_bytes,
                useful_bytes=useful_bytes,
            )
