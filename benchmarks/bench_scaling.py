"""How decode time grows with threads, context and model size: dense-resident and DIP with every column cached.

    python benchmarks/bench_scaling.py MODEL... [--parts threads,context,sizes] [--density 0.5] [--rounds 5]

MODEL is a bundle, a name that `dipper pull` knows, or synthetic:SHAPE, made by synthetic.py. Greedy decodes, prefill
not in the time; nothing is read from flash. All that a part compares takes turns within a round.

threads    1, 2, 4, ... up to all cores, after a short prompt.
context    positions filled by a prompt, --contexts; one turn goes through all of them, prefilling from one to the next.
           `read_gbps`: the keys and values that a token reads more of than at the first, by the time it takes more.
sizes      over the models given, for each method: the line time = a + bytes / BW through its models, bytes those that a
           token must read of DRAM, least squares of the relative error; no model may be off by more than 10 % (judged
           from three models on: two always lie on a line). a and BW are in the JSON line, beside DRAM's bandwidth.

An engine stays open as long as memory holds it beside the others. What does not fit is closed and opened again for its
turn, and decodes a few tokens before it is timed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import (
    ALL_CACHED,
    Decode,
    Shelf,
    bundle_for,
    fail,
    finish,
    greedy,
    interleave,
    open_engine,
    parser,
    print_table,
    prompt_tokens,
    run_command,
    spread,
    touched_bytes,
)

MOST_OFF = 0.10
PROMPT_TOKENS = 32
WARM_TOKENS = 4


@dataclass(frozen=True, kw_only=True)
class Setup:
    """An engine."""

    bundle: Path
    density: float | None  # None: dense-resident
    threads: int
    context: int

    @property
    def label(self) -> dict[str, Any]:
        method = "dense-resident" if self.density is None else f"dip {self.density:g}"
        return {"model": self.bundle.name, "method": method, "threads": self.threads}

    def open(self) -> Any:
        method = {"method": "dense-resident"} if self.density is None else {"method": "dip", "density": self.density}
        more = {} if self.density is None else ALL_CACHED
        return open_engine(self.bundle, context=self.context, threads=self.threads, **method, **more)

    @property
    def n_bytes(self) -> int:
        """About what it holds."""
        return sum(part.stat().st_size for part in self.bundle.iterdir())


@dataclass(frozen=True)
class Run:
    """Decoded tokens from one position on."""

    token_s: float
    ledger_ms: dict[str, float]  # of a token
    touched_bytes: float


def _run(engine: Any, decode: Decode, n_before: int, n: int) -> Run:
    if engine.counters().misses:
        fail(f"{engine.bundle.path}: {engine.counters().misses} columns came from flash")
    ledger_ms = {part: 1e3 * seconds / n for part, seconds in decode.ledger_s.items()}
    return Run(decode.token_s, ledger_ms, touched_bytes(engine, n_before, n))


def ready(shelf: Shelf, setup: Setup) -> Any:
    """The engine, warm."""
    engine, is_new = shelf.get(setup, setup.n_bytes, setup.open)
    if is_new:
        greedy(engine, prompt_tokens(setup.bundle, PROMPT_TOKENS), WARM_TOKENS)
    return engine


def short_turn(shelf: Shelf, setup: Setup, n: int) -> Run:
    engine = ready(shelf, setup)
    return _run(engine, greedy(engine, prompt_tokens(setup.bundle, PROMPT_TOKENS), n), PROMPT_TOKENS, n)


def context_turn(shelf: Shelf, setup: Setup, contexts: Sequence[int], n: int) -> dict[int, Run]:
    engine = ready(shelf, setup)
    tokens = prompt_tokens(setup.bundle, max(contexts))
    runs: dict[int, Run] = {}
    engine.reset()
    for context in contexts:
        start = engine.n_past
        runs[context] = _run(engine, greedy(engine, tokens[start:context], n, fresh=False), context, n)
    return runs


def _by_turns(shelf: Shelf, turns: dict[Any, Callable[[], Any]], rounds: int) -> dict[Any, list[Any]]:
    before = shelf.n_closed
    runs = interleave(turns, rounds)
    if shelf.n_closed > before:
        print(f"memory does not hold all engines: {shelf.n_closed - before} were closed for others and opened again")
    return runs


def _times(runs: Sequence[Run]) -> dict[str, float]:
    times = spread([1e3 * run.token_s for run in runs])
    return {"token_ms": times["median"], "p20": times["p20"], "p80": times["p80"]}


def _stage_ms(runs: Sequence[Run], stage: str) -> float:
    return spread([run.ledger_ms[stage] for run in runs])["median"]


# --- the parts


def thread_counts(most: int) -> list[int]:
    return sorted({*(2**i for i in range(most.bit_length())), most})


def threads_part(bundles: list[Path], args: Any) -> list[dict[str, Any]]:
    rows = []
    context = PROMPT_TOKENS + args.tokens + 1
    for bundle in bundles:
        setups = [
            Setup(bundle=bundle, density=density, threads=threads, context=context)
            for density in (None, args.density)
            for threads in thread_counts(args.threads)
        ]
        with Shelf() as shelf:
            turns = {setup: (lambda setup=setup: short_turn(shelf, setup, args.tokens)) for setup in setups}
            runs = _by_turns(shelf, turns, args.rounds)
        for setup, of_setup in runs.items():
            alone = _times(next(r for s, r in runs.items() if s.density == setup.density and s.threads == 1))
            times = _times(of_setup)
            stages = {f"{stage}_ms": _stage_ms(of_setup, stage) for stage in ("gemv", "attention", "head")}
            speedup = alone["token_ms"] / times["token_ms"]
            rows.append({"part": "threads", **setup.label, **times, **stages, "speedup": speedup})
    return rows


def context_part(bundles: list[Path], args: Any) -> list[dict[str, Any]]:
    rows = []
    for bundle in bundles:
        room = max(args.contexts) + args.tokens + 1
        setups = [
            Setup(bundle=bundle, density=density, threads=args.threads, context=room)
            for density in (None, args.density)
        ]
        with Shelf() as shelf:
            turns = {s: (lambda s=s: context_turn(shelf, s, args.contexts, args.tokens)) for s in setups}
            runs = _by_turns(shelf, turns, args.rounds)
        for setup, of_setup in runs.items():
            first = [run[args.contexts[0]] for run in of_setup]
            for context in args.contexts:
                at = [run[context] for run in of_setup]
                more_bytes = at[0].touched_bytes - first[0].touched_bytes
                more_s = 1e-3 * (_times(at)["token_ms"] - _times(first)["token_ms"])
                rows.append(
                    {
                        "part": "context",
                        **setup.label,
                        "positions": context,
                        **_times(at),
                        "attention_ms": _stage_ms(at, "attention"),
                        "mb_per_token": at[0].touched_bytes / 1e6,
                        "read_gbps": 1e-9 * more_bytes / more_s if more_bytes and more_s > 0 else None,
                    }
                )
    return rows


def sizes_part(bundles: list[Path], args: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    from dipper.doctor import measure_dram

    context = PROMPT_TOKENS + args.tokens + 1
    setups = [
        Setup(bundle=bundle, density=density, threads=args.threads, context=context)
        for bundle in bundles
        for density in (None, args.density)
    ]
    with Shelf() as shelf:
        turns: dict[Any, Any] = {s: (lambda s=s: short_turn(shelf, s, args.tokens)) for s in setups}
        turns["dram"] = lambda: measure_dram(n_threads=[args.threads], seconds=0.3)[args.threads]
        runs = _by_turns(shelf, turns, args.rounds)
    dram = runs.pop("dram")
    rows, lines = [], {}
    for density in (None, args.density):
        of_method = {setup: of_setup for setup, of_setup in runs.items() if setup.density == density}
        of_method_rows, line = fitted(of_method)
        rows += of_method_rows
        lines[of_method_rows[0]["method"]] = line
    return rows, {"lines": lines, "dram_gbps": spread(dram)}


def fitted(runs: dict[Setup, list[Run]]) -> tuple[list[dict[str, Any]], dict[str, float] | None]:
    """The models of one method against the line through them; no line through one model."""
    from dipper.doctor import fit_read_cost

    seconds = {setup: 1e-3 * _times(of_setup)["token_ms"] for setup, of_setup in runs.items()}
    n_bytes = {setup: of_setup[0].touched_bytes for setup, of_setup in runs.items()}
    line = None
    if len(set(n_bytes.values())) > 1:
        start_s, bandwidth, _ = fit_read_cost(list(n_bytes.values()), list(seconds.values()))
        line = {"a_ms": 1e3 * start_s, "gbps": 1e-9 * bandwidth}
    rows = []
    for setup, of_setup in runs.items():
        line_ms = None if line is None else line["a_ms"] + 1e-6 * n_bytes[setup] / line["gbps"]
        off = None if line_ms is None else 1e-3 * line_ms / seconds[setup] - 1
        rows.append(
            {
                "part": "sizes",
                **setup.label,
                "mb_per_token": n_bytes[setup] / 1e6,
                **_times(of_setup),
                "gbps": 1e-9 * n_bytes[setup] / seconds[setup],
                "line_ms": line_ms,
                "off": off,
                "ok": abs(off) <= MOST_OFF if off is not None and len(runs) > 2 else None,
            }
        )
    return rows, line


PARTS = ("threads", "context", "sizes")


def main() -> None:
    cli = parser(__doc__)
    cli.add_argument("models", nargs="+", metavar="MODEL", help="bundle, name, or synthetic:SHAPE")
    cli.add_argument("--parts", default=",".join(PARTS), help="comma-separated [all three]")
    cli.add_argument("--density", type=float, default=0.5, help="of DIP [0.5]")
    cli.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="the most [all cores]")
    cli.add_argument("--contexts", default="64,512,1024,2048", help="positions filled [64,512,1024,2048]")
    cli.add_argument("--tokens", type=int, default=32, help="decoded tokens of a time [32]")
    cli.add_argument("--rounds", type=int, default=5)
    cli.add_argument("--workdir", type=Path, default=Path("bundles"), help="for bundles and synthetic files [bundles]")
    args = cli.parse_args()
    parts = args.parts.split(",")
    if not set(parts) <= set(PARTS):
        fail(f"--parts {args.parts}: known are {', '.join(PARTS)}")
    args.contexts = sorted(int(context) for context in args.contexts.split(","))
    if any(later - earlier <= args.tokens for earlier, later in zip(args.contexts, args.contexts[1:], strict=False)):
        fail(f"--contexts must lie more than the {args.tokens} decoded tokens apart")
    bundles = [bundle_for(spec, "source", args.workdir) for spec in args.models]

    results: list[dict[str, Any]] = []
    more: dict[str, Any] = {}
    if "threads" in parts:
        results += shown(threads_part(bundles, args))
    if "context" in parts:
        results += shown(context_part(bundles, args))
    if "sizes" in parts:
        rows, more = sizes_part(bundles, args)
        results += shown(rows)
    finish("scaling", results, bundles, **more, density=args.density, n_tokens=args.tokens, rounds=args.rounds)


def shown(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    print_table(rows)
    return rows


if __name__ == "__main__":
    run_command(main)
