"""What the benchmarks share: models by name, windows of text, turns of an engine, one table and one JSON line."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

ROOT = Path(__file__).resolve().parent.parent


def fail(message: str) -> NoReturn:
    """Stop with one line."""
    sys.exit(f"error: {message}")


def parser(doc: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


# --- inputs


def is_bundle(spec: str) -> bool:
    return (Path(spec) / "bundle.json").is_file()


def run_command(main: Callable[[], None]) -> None:
    """Run a benchmark's main; an error that dipper raises on purpose is one line."""
    from dipper.errors import DipperError

    try:
        main()
    except DipperError as error:
        fail(str(error))


def hold_disk(path: Path) -> None:
    """Start this command again, without --held, under the block-I/O limit of held_disk.sh on the disk of `path`."""
    script = Path(__file__).parent / "held_disk.sh"
    command = [sys.executable, *(arg for arg in sys.argv if arg != "--held")]
    os.execvp("bash", ["bash", str(script), "--path", str(path), "--", *command])


def source_for(spec: str, workdir: Path) -> Path:
    """A checkpoint: a path, a name that `dipper pull` knows, or synthetic:SHAPE, which is made in `workdir` once."""
    kind, _, shape = spec.partition(":")
    if kind != "synthetic":
        from dipper.sources import pull

        return Path(pull(spec))
    from synthetic import synthetic_gguf  # imports this module

    target = workdir / f"synthetic-{shape}.gguf"
    if not target.exists():
        workdir.mkdir(parents=True, exist_ok=True)
        print(f"making {target}", file=sys.stderr)
        synthetic_gguf(shape, target)
    return target


def bundle_for(spec: str, bits: str, workdir: Path) -> Path:
    """The bundle at `spec`, or of the checkpoint that `source_for` finds, packed into `workdir` once."""
    if is_bundle(spec):
        return Path(spec)
    from dipper.bundle import pack

    source = source_for(spec, workdir)
    name = source.stem if source.is_file() else source.name  # a folder's name may have dots
    target = workdir / f"{name}-{bits}.dipper"
    if not target.exists():
        workdir.mkdir(parents=True, exist_ok=True)
        print(f"packing {source.name} at --bits {bits}", file=sys.stderr)
        pack(source, target, bits=bits)
    return target


@dataclass(frozen=True)
class Windows:
    """Consecutive windows of a text for one bundle's tokenizer, cut as `dipper eval` cuts them."""

    tokens: list[list[int]]
    sha256: str  # of the token ids, int32 little-endian, BOS included


PROMPT = (
    "Flash memory is read in pages, and a page costs almost the same whether one byte of it is wanted or all of them. "
    "A program that reads many small records should therefore put those that are wanted together next to each other."
)


def _tokenise(bundle: Path, text: str) -> tuple[list[int], int | None]:
    """Token ids without BOS, and the BOS where the model wants one."""
    from tokenizers import Tokenizer

    model = json.loads((bundle / "bundle.json").read_text(encoding="utf-8"))["model"]
    ids = Tokenizer.from_file(str(bundle / "tokenizer.json")).encode(text, add_special_tokens=False).ids
    return ids, model["bos_id"] if model["add_bos"] else None


def repeated(bos: int | None, ids: Sequence[int], n: int) -> list[int]:
    """A prompt of n tokens, BOS included: ids again and again."""
    start = [] if bos is None else [bos]
    return (start + list(ids) * (n // len(ids) + 1))[:n]


def prompt_tokens(bundle: Path, n: int) -> list[int]:
    """A prompt of n tokens, BOS included: the built-in text, repeated where it is too short."""
    ids, bos = _tokenise(bundle, PROMPT)
    return repeated(bos, ids, n)


def text_tokens(bundle: Path, text: Path) -> tuple[list[int], int | None]:
    """Token ids of a text file as `dipper eval` reads it, without BOS, and the BOS where the model wants one."""
    from dipper.evaluate import read_text

    return _tokenise(bundle, read_text(text).text)


def text_windows(bundle: Path, text: Path, window: int, n_windows: int) -> Windows:
    from dipper.evaluate import cut_windows

    ids, bos = text_tokens(bundle, text)
    tokens = cut_windows(ids, window, bos_id=bos, limit=window * n_windows)
    if len(tokens) < n_windows or len(tokens[0]) < window:
        fail(f"{text} has {len(ids)} tokens: not enough for {n_windows} windows of {window}")
    return Windows(tokens, hashlib.sha256(np.asarray(tokens, "<i4").tobytes()).hexdigest())


# --- the engine

# Every column of the MLP in a slot before the first token, whatever the mask: what a pruned token costs without reads.
ALL_CACHED = {"cache": "static", "cold": True, "mlp_dram": "1000b"}


def open_engine(bundle: Path, **config: Any):
    from dipper.engine import Engine, EngineConfig

    return Engine.open(bundle, EngineConfig(**config))


@dataclass(frozen=True)
class Decode:
    """One greedy decode: `n` tokens after the prompt's, the prompt's own time apart."""

    prefill_s: float
    decode_s: float
    tokens: list[int]
    # Of dipper's engine alone: the decode's time by part; what a token must read of DRAM, where that was asked for.
    ledger_s: dict[str, float] = field(default_factory=dict)
    touched_bytes: float | None = None

    @property
    def tok_per_s(self) -> float:
        return (len(self.tokens) - 1) / self.decode_s

    @property
    def token_s(self) -> float:
        return self.decode_s / (len(self.tokens) - 1)


def greedy(engine: Any, prompt: Sequence[int], n: int, *, fresh: bool = True) -> Decode:
    """Prefill, then n single-token steps with an argmax outside: the same loop that llama_worker.py runs.

    `fresh`: the context is emptied first; otherwise the prompt goes on where it ends.
    """
    if fresh:
        engine.reset()
    start = time.perf_counter()
    tokens = [int(engine.prefill(list(prompt)).argmax())]
    engine.reset_counters()
    prefilled = time.perf_counter()
    for _ in range(n):
        tokens.append(int(engine.step(tokens[-1], copy=False).argmax()))
    done = time.perf_counter()
    return Decode(prefilled - start, done - prefilled, tokens, engine.counters().ledger_s)


def touched_bytes(engine: Any, n_before: int, n: int) -> float:
    """Bytes of DRAM that each of n tokens after `n_before` must read, on average."""
    from dipper import touched

    bundle, positions = engine.bundle, n_before + np.arange(1, max(n, 1) + 1)
    parts, used = touched.model_parts(bundle), engine.plan.options["k"]
    return sum(touched.touched_bytes(bundle, parts, used, positions, engine.config.kv).values())


class Shelf:
    """What turns need, opened when first asked for and closed at the end.

    Where memory does not hold everything, what was used longest ago is closed for what comes next.
    """

    def __init__(self) -> None:
        from dipper.doctor import machine

        self.room_bytes = 0.9 * machine()["dram_bytes"]["available"]
        self.n_closed = 0  # before the end
        self._held: dict[Hashable, tuple[Any, int]] = {}  # the longest unused first

    def get(self, key: Hashable, n_bytes: int, open_: Callable[[], Any]) -> tuple[Any, bool]:
        """What `open_` gave for this key, and whether that was just now."""
        is_new = key not in self._held
        if is_new:
            while self._held and sum(size for _, size in self._held.values()) + n_bytes > self.room_bytes:
                thing, _ = self._held.pop(next(iter(self._held)))
                thing.close()
                self.n_closed += 1
            self._held[key] = open_(), n_bytes
        self._held[key] = self._held.pop(key)
        return self._held[key][0], is_new

    def __enter__(self) -> Shelf:
        return self

    def __exit__(self, *error: object) -> None:
        for thing, _ in self._held.values():
            thing.close()
        self._held.clear()


# --- statistics and output


def interleave(
    turns: dict[str, Callable[[], Any]], rounds: int, pause_s: float = 0.1, *, warm_up: bool = True
) -> dict[str, list[Any]]:
    """Every turn once a round, rounds times: drift of the machine falls on all alike. One round more warms up."""
    results: dict[str, list[Any]] = {name: [] for name in turns}
    for round_ in range(0 if warm_up else 1, rounds + 1):
        for name, turn in turns.items():
            time.sleep(pause_s)  # threads of the last turn spin for a while before they sleep
            value = turn()
            if round_ > 0:
                results[name].append(value)
    return results


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, p20 and p80."""
    p20, p80 = np.percentile(values, [20, 80])
    return {"median": statistics.median(values), "p20": float(p20), "p80": float(p80)}


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """Rows of equal keys as an aligned table."""

    def text(value: Any) -> str:
        if value is None:
            return "-"
        if isinstance(value, bool):
            return "yes" if value else "NO"
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    if not rows:
        return
    columns = list(rows[0])
    cells = [columns, *([text(row[c]) for c in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    for line in cells:
        print(
            "  ".join(
                cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
            )
        )


def finish(benchmark: str, results: list[dict[str, Any]], bundles: Sequence[Path], **more: Any) -> NoReturn:
    """The one JSON line; exit status 1 when a result that has a threshold is past it."""
    from dipper.records import provenance

    passed = all(row.get("ok") is not False for row in results)
    sources = [dataclasses.asdict(provenance(bundle)) for bundle in bundles]
    print(json.dumps({"benchmark": benchmark, "passed": passed, "results": results, **more, "provenance": sources}))
    sys.exit(0 if passed else 1)
