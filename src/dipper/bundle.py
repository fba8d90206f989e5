"""Bundles: open, validate, verify and read back; `pack` makes one (docs/bundle-format.md is normative)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

VERSION = 1
ALIGNMENT = 4096
RESIDENT_ALIGNMENT = 64


def _canonical(content: Any) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()


def header_bytes(header: dict[str, Any]) -> bytes:
    """bundle.json for a header without its hash."""
    return _canonical({**header, "header_sha256": hashlib.sha256(_canonical(header)).hexdigest()}) + b"\n"


def pack(
    source: Path | str,
    out: Path | str,
    bits: str = "source",
    progress: Callable[[int, int], None] | None = None,
    *,
    overwrite: bool = False,
    tokenizer: bool = True,
) -> Path:
    """Pack."""
    from dipper.packer import write_bundle

    return write_bundle(Path(source), Path(out), bits=bits, progress=progress, overwrite=overwrite, tokenizer=tokenizer)
