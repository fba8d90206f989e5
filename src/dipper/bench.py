"""Modes of one bundle timed against each other: interleaved, each measurement in a process of its own.

A process of its own gives every measurement an empty heap, its own peak RSS and its own budget, and lets only one
engine hold memory at a time. One measurement is: drop the bundle from the page cache and check it, open the engine,
generate (`cold`: the column cache is empty before the prompt), forget the KV cache, generate the same again (`warm`),
close, and read the disk at the run's mean request size; with `ledger` also count what its tokens must read of DRAM, and
read DRAM with as many threads. Modes take turns, A B C A B C, so that a disk that changes its speed changes it for all.

    rows = run_bench([BenchCase(bundle="smollm2.dipper", config={"method": "dip"}, n_prompt=512, n_gen=64)], reps=5)

`python -m dipper.bench` is the measuring process: a case as JSON on stdin, the two records as the last line of stdout.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dipper import errors
from dipper.errors import ConfigError, DipperError
from dipper.records import BenchRow, RunRecord, json_line, ratio

if TYPE_CHECKING:
    from dipper.engine import Engine

__all__ = ["BenchCase", "Measurement", "measure", "measure_apart", "run_bench", "with_disk_probe"]

STATES = ("cold", "warm")

_ALIGNMENT = 4096
_PROBE_DEPTH = 64  # the engine's own
_PROBE_SECONDS = 0.3
_COLD_SHARE = 0.01  # of flash.bin's pages that may be cached in a run called cold

Measurement = dict[str, RunRecord]  # by state


@dataclass(frozen=True, kw_only=True)
class BenchCase:
    """What one mode is measured with."""

    bundle: str
    config: dict[str, Any]  # options of EngineConfig, `context` left out
    n_prompt: int
    n_gen: int
    text: str | None = None  # file the prompt is cut from; None: a text of dipper's own
    ledger: bool = False  # whether what a token touches is counted, and DRAM read for comparison
    notes: list[str] = field(default_factory=list)

    @property
    def mode(self) -> str:
        """The method's name."""
        return str(self.config["method"])


# ------------------------------------------------------------------------------------------------ many measurements


def run_bench(
    cases: Sequence[BenchCase],
    reps: int,
    *,
    measure: Callable[[BenchCase], Measurement] | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> list[BenchRow]:
    """Measures all cases `reps` times, taking turns.

    Args:
        cases: one a mode.
        reps: measurements of each.
        measure: one measurement; by default in a process of its own.
        progress: called with (measurements done, in all, the next mode).

    Returns:
        For every mode and state a prompt row and a decode row.

    Raises:
        ConfigError: nothing to measure.
        DipperError: what a measurement failed with, its mode named.
    """
    if reps < 1:
        raise ConfigError(f"{reps} repetitions were asked for; at least 1 is needed.")
    take = measure or measure_apart
    taken: list[list[Measurement]] = [[] for _ in cases]
    for i in range(reps * len(cases)):
        case = cases[i % len(cases)]
        if progress is not None:
            progress(i, reps * len(cases), case.mode)
        taken[i % len(cases)].append(take(case))
    rows = []
    for case, measurements in zip(cases, taken, strict=True):
        for state in STATES:
            rows += _rows(case, state, [m[state] for m in measurements])
    runs = [run for measurements in taken for measurement in measurements for run in measurement.values()]
    return [replace(row, run=replace(row.run, dram_gbps=_roof(runs, row.run.n_threads))) for row in rows]


def _roof(runs: Sequence[RunRecord], n_threads: int) -> float | None:
    """What DRAM gives, the same for all modes, so that their shares of it compare."""
    return _middle([run.dram_gbps for run in runs if run.n_threads == n_threads])


def _rows(case: BenchCase, state: str, runs: list[RunRecord]) -> list[BenchRow]:
    prompt = _row(case, state, runs, f"pp{case.n_prompt}", 0, 0, [(r.n_prompt, r.ttft_s) for r in runs])
    if case.n_gen < 2:  # one token has no rate
        return [prompt]
    decode = [(r.n_tokens - 1, r.decode_s) for r in runs]
    return [prompt, _row(case, state, runs, f"tg{case.n_gen}", case.n_gen, case.n_prompt, decode)]


def _row(
    case: BenchCase,
    state: str,
    runs: list[RunRecord],
    test: str,
    n_gen: int,
    n_depth: int,
    samples: list[tuple[int, float]],
) -> BenchRow:
    speeds = [n / max(seconds, 1e-9) for n, seconds in samples]
    middle = sorted(range(len(runs)), key=lambda i: speeds[i])[(len(runs) - 1) // 2]
    # The disk is probed after every run; a median of all says more about it than the one beside the median run.
    disk_gbps = _middle([r.disk_gbps_at_size for r in runs])
    run = replace(runs[middle], disk_gbps_at_size=disk_gbps, notes=[*case.notes, *runs[middle].notes])
    limit = None
    if n_gen and run.disk_gbps_at_size is not None:
        limit = ratio(run.disk_gbps_at_size * 1e9, run.flash_bytes_per_token)
    return BenchRow(
        run=run,
        mode=case.mode,
        state=state,
        test=test,
        n_gen=n_gen,
        n_depth=n_depth,
        samples_ts=speeds,
        samples_ns=[round(seconds * 1e9) for _, seconds in samples],
        limit_ts=limit,
    )


def _middle(probes: Sequence[float | None]) -> float | None:
    known = sorted(p for p in probes if p is not None)
    return known[(len(known) - 1) // 2] if known else None


def measure_apart(case: BenchCase) -> Measurement:
    """One measurement in a process of its own.

    Raises:
        DipperError: what it failed with, of the same type, the mode named.
    """
    done = subprocess.run(
        [sys.executable, "-m", "dipper.bench"],
        input=json.dumps(asdict(case)),
        capture_output=True,
        text=True,
        check=False,
    )
    lines = done.stdout.splitlines()
    if done.returncode != 0 or not lines:
        raise DipperError(f"{case.mode}: the measuring process ended with {done.returncode}: {_last_line(done.stderr)}")
    answer = json.loads(lines[-1])
    if "error" in answer:
        kind = getattr(errors, answer["error"], DipperError)
        raise kind(f"{case.mode}: {answer['message']}")
    return {state: RunRecord.from_dict(answer[state]) for state in STATES}


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["it said nothing"])[-1]


# ------------------------------------------------------------------------------------------------ one measurement


def measure(case: BenchCase) -> Measurement:
    """One measurement, cold and warm, in this process.

    Raises:
        ConfigError: the text is too short for the prompt.
        DipperError: whatever the engine stops with.
    """
    from dipper.engine import Engine, EngineConfig
    from dipper.generate import stream_generate
    from dipper.tokenizer import Tokenizer

    tokenizer = Tokenizer.open(case.bundle)
    prompt = _prompt(tokenizer, case)
    config = EngineConfig(**case.config, context=case.n_prompt + case.n_gen)
    notes = _drop_page_cache(Path(case.bundle))
    runs: Measurement = {}
    with Engine.open(case.bundle, config) as engine:
        for state in STATES:
            engine.reset()
            steps = stream_generate(engine, tokenizer, prompt, max_new_tokens=case.n_gen, ignore_eos=True)
            for step in steps:
                last = step
            assert last.record is not None, "the last step carries the record"
            runs[state] = replace(last.record, notes=[*last.record.notes, *notes])
    runs = {state: with_disk_probe(case.bundle, run) for state, run in runs.items()}
    return _with_touched(runs, engine) if case.ledger else runs


def _with_touched(runs: Measurement, engine: Engine) -> Measurement:
    """Runs of an engine, closed by now, with the DRAM that a token must touch and what DRAM gives."""
    import numpy as np

    from dipper.doctor import measure_dram
    from dipper.touched import model_parts, touched_bytes

    bundle, plan = engine.bundle, engine.plan
    parts = model_parts(bundle)

    def touched(run: RunRecord) -> dict[str, float]:
        positions = run.n_prompt + np.arange(1, max(run.n_tokens, 2))  # of each decoded token, its own the last
        return touched_bytes(bundle, parts, plan.options["k"], positions, engine.config.kv)

    gbps = measure_dram(n_threads=[engine.n_threads])[engine.n_threads]
    return {state: replace(run, touched_bytes=touched(run), dram_gbps=gbps) for state, run in runs.items()}


def _drop_page_cache(bundle: Path) -> list[str]:
    """Drops a bundle's files from the page cache; says so where its columns stay there all the same."""
    from dipper.doctor import drop_page_cache, page_cache_share

    for file in sorted(bundle.iterdir()):
        if file.is_file():
            drop_page_cache(file)
    share = page_cache_share(bundle / "flash.bin")
    return [f"{100 * share:.0f} % of flash.bin stayed in the page cache: not cold"] if share > _COLD_SHARE else []


def _prompt(tokenizer: Any, case: BenchCase) -> list[int]:
    if case.text is None:
        text = resources.files("dipper").joinpath("bench.txt").read_text(encoding="utf-8")
    else:
        text = Path(case.text).read_text(encoding="utf-8")
    tokens = tokenizer.encode(text)
    if len(tokens) < case.n_prompt:
        named = "dipper's own text" if case.text is None else case.text
        raise ConfigError(f"{named} has {len(tokens)} tokens, the prompt needs {case.n_prompt}; give a longer --text.")
    return list(tokens[: case.n_prompt])


def with_disk_probe(bundle: str | os.PathLike[str], run: RunRecord) -> RunRecord:
    """A run with what its bundle's disk gives for reads of the run's mean size, as far apart as can be.

    Random reads of the same file through the same kind of reader, for a third of a second. A run that read nothing is
    returned as it is.
    """
    if not run.reads_per_token:
        return run
    mean = run.flash_bytes_per_token / run.reads_per_token
    try:
        gbps = _read_gbps(Path(bundle) / "flash.bin", mean, run.reader_backend)
    except DipperError as error:  # a side measurement: its failure is told, the run's own figures stand
        return replace(run, notes=[*run.notes, f"the disk was not probed: {error}"])
    return replace(run, disk_gbps_at_size=gbps)


def _read_gbps(file: Path, mean_bytes: float, backend: str) -> float:
    """Random reads of the aligned size nearest to `mean_bytes`."""
    import numpy as np

    reader: Any = importlib.import_module("dipper._core").FlashReader(str(file), backend=backend, depth=_PROBE_DEPTH)
    size = max(round(mean_bytes / _ALIGNMENT), 1) * _ALIGNMENT
    n_places = max(reader.file_bytes // size, 1)
    random = np.random.default_rng(0)
    n_reads, n_bytes, seconds = _PROBE_DEPTH, 0, 0.0
    while seconds < _PROBE_SECONDS:
        offsets = random.integers(0, n_places, n_reads, dtype=np.uint64) * np.uint64(size)
        seconds += float(reader.read_batch(offsets, size))
        n_bytes += n_reads * size
        n_reads *= 2
    return n_bytes / seconds / 1e9


def _main() -> int:
    case = BenchCase(**json.load(sys.stdin))
    try:
        answer: dict[str, Any] = {state: run.as_dict() for state, run in measure(case).items()}
    except DipperError as error:
        answer = {"error": type(error).__name__, "message": str(error)}
    print(json_line(answer))
    return 0


if __name__ == "__main__":
    sys.exit(_main())
