"""Speed with everything resident: dipper against llama.cpp, turn by turn in one run.

    python benchmarks/bench_llamacpp.py MODEL... --llama-python VENV/bin/python [--threads 2] [--density 0.5]

MODEL is a GGUF file, a name that `dipper pull` knows, or synthetic:SHAPE, made by synthetic.py. llama.cpp runs the file
as given and requantised to Q4_0 (the head keeps its type; a file that is Q4_0 already is one file), dipper the bundles
packed from both, dense-resident. So both engines run the very same weights; dipper's on Q4_0 is *dense int4*.

Each is a process that stays loaded, and they take turns over pipes, so that only one computes at a time (where memory
does not hold all, they are loaded again for their turn). A turn is a greedy decode after a short prompt, whose own time
is not in tok/s, and a prefill of --prompt tokens of repeated text; one more turn a round measures DRAM. The baselines
are the faster of llama.cpp's two files, for decode and prefill apart. `roof_share`: the bytes that a token must read,
by its time, over what DRAM gives to as many threads.

Thresholds: dipper decodes at 1.0 times the baseline as given and at 1.3 times as dense int4; dense int4 prefills at 0.8
times and, where a token reads 2 GB or more, has 0.8 of DRAM's bandwidth (below, what a token costs beside its bytes
counts).

--density adds DIP on the Q4_0 bundle, every column in a slot before the first token, so that nothing is read from
flash; `vs_dense` compares it with dense int4. --expect-density-gain asks for 1.5 times its speed, and for 0.6 of its
time in the MLP's products.

Run it on an idle machine: with two threads on two cores, llama.cpp's barriers cost a factor of ten as soon as anything
else wants a core. `--llama-python` is a Python that has llama-cpp-python, best in a venv of its own. On CPUs with AMX a
build with native flags crashes; build it with explicit ones (minutes):

    CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_AVX=ON -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON \\
      -DGGML_AVX512=ON -DGGML_AVX512_VBMI=ON -DGGML_AVX512_VNNI=ON" pip install llama-cpp-python
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import (
    ALL_CACHED,
    PROMPT,
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
    repeated,
    run_command,
    source_for,
    spread,
    touched_bytes,
)

HERE = Path(__file__).resolve().parent

LEAST_DECODE = {"given": 1.0, "q4_0": 1.3}
LEAST_PREFILL = 0.8
LEAST_ROOF_SHARE = 0.8
ROOF_BYTES = 2e9
LEAST_DENSITY_SPEED = 1.5
MOST_DENSITY_MLP = 0.6

# Columns of the two tables.
WHICH = ("model", "engine", "file", "density")
SPEED = ("tok_per_s", "p20", "p80", "vs_baseline", "prefill_tok_per_s", "prefill_vs_baseline", "tokens_as_llama", "ok")
COST = ("gb_per_token", "dram_gbps", "roof_share", "mlp_ms", "vs_dense", "mlp_vs_dense", "missed")


# --- the processes


class Worker:
    """A subprocess that answers one JSON line to each JSON line."""

    def __init__(self, command: list[str]) -> None:
        self.command = command
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.hello = self._answer()

    def _answer(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            fail(f"{' '.join(self.command)} ended with status {self.process.wait()}")
        return json.loads(line)

    def ask(self, **command: Any) -> dict[str, Any]:
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def decode(self, prompt: list[int], n: int) -> Decode:
        return Decode(**self.ask(op="decode", prompt=prompt, n=n))

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def serve_dipper(bundle: str, config: str) -> None:
    """The dipper worker: this file with `--serve`, in a process of its own as llama.cpp has one."""
    engine = open_engine(Path(bundle), **json.loads(config))
    print(json.dumps({"ready": bundle}), flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        run = greedy(engine, command["prompt"], command["n"])
        if engine.counters().misses:
            fail(f"{bundle}: {engine.counters().misses} columns came from flash")
        touched = touched_bytes(engine, len(command["prompt"]), command["n"])
        print(json.dumps(dataclasses.asdict(run) | {"touched_bytes": touched}), flush=True)


@dataclass(frozen=True, kw_only=True)
class Entrant:
    """One engine on one file."""

    engine: str  # dipper, llama.cpp
    file: str  # given, q4_0
    density: float | None = None
    command: tuple[str, ...]
    n_bytes: int  # about what it holds

    @property
    def is_dense_int4(self) -> bool:
        return self.engine == "dipper" and self.file == "q4_0" and self.density is None


@dataclass(frozen=True)
class Run:
    """What one entrant did in one round."""

    decode: Decode
    prefill_s: float | None  # None: not measured


# --- the files


def tensor_types(source: Path) -> dict[str, str]:
    """Types of the matrices by name."""
    from dipper.checkpoint import open_checkpoint

    return {name: t.type_name for name, t in open_checkpoint(source).tensors.items() if len(t.shape) == 2}


def requantised(source: Path, workdir: Path, llama_python: str) -> Path:
    from gguf import GGMLQuantizationType

    target = workdir / f"{source.stem}-to-q4_0.gguf"
    if not target.exists():
        workdir.mkdir(parents=True, exist_ok=True)
        types = tensor_types(source)
        head = GGMLQuantizationType[types.get("output.weight", types["token_embd.weight"])]
        worker = [llama_python, str(HERE / "llama_worker.py"), "quantise", str(source), str(target), str(int(head))]
        subprocess.run(worker, check=True)
    return target


def gguf_files(source: Path, args: Any) -> dict[str, Path]:
    """The given file and its Q4_0; the one file where that is its type."""
    layers = {kind for name, kind in tensor_types(source).items() if name.startswith("blk.")}
    if layers == {"Q4_0"}:
        return {"q4_0": source}
    return {"given": source, "q4_0": requantised(source, args.workdir, args.llama_python)}


def entrants(files: dict[str, Path], bundles: dict[str, Path], context: int, args: Any) -> list[Entrant]:
    def dipper(file: str, density: float | None = None) -> Entrant:
        config = (
            {"method": "dense-resident"} if density is None else {"method": "dip", "density": density, **ALL_CACHED}
        )
        config |= {"context": context, "threads": args.threads}
        command = (sys.executable, str(Path(__file__).resolve()), "--serve", str(bundles[file]), json.dumps(config))
        n_bytes = sum(part.stat().st_size for part in bundles[file].iterdir())
        return Entrant(engine="dipper", file=file, density=density, command=command, n_bytes=n_bytes)

    def llama(file: str) -> Entrant:
        worker = (args.llama_python, str(HERE / "llama_worker.py"), "serve")
        command = (*worker, str(files[file]), str(context), str(args.threads))
        return Entrant(engine="llama.cpp", file=file, command=command, n_bytes=files[file].stat().st_size)

    ours = [dipper(file) for file in bundles]
    if args.density is not None and bundles:
        ours.append(dipper("q4_0", args.density))
    return [*ours, *(llama(file) for file in files)]


# --- a model


def measure(source: Path, args: Any) -> tuple[list[dict[str, Any]], list[Path]]:
    from dipper.doctor import measure_dram

    files = gguf_files(source, args)
    bundles = {} if args.llama_only else {f: bundle_for(str(p), "source", args.workdir) for f, p in files.items()}
    prompt, long_prompt = prompts(files["q4_0"], args)
    context = max(len(prompt) + args.tokens, len(long_prompt)) + 1
    with Shelf() as shelf:

        def turn(entrant: Entrant) -> Run:
            worker, is_new = shelf.get(entrant, entrant.n_bytes, lambda: Worker(list(entrant.command)))
            if is_new:
                worker.decode(prompt, 4)
            decode = worker.decode(prompt, args.tokens)
            return Run(decode, worker.decode(long_prompt, 0).prefill_s if entrant.density is None else None)

        turns: dict[Any, Any] = {e: (lambda e=e: turn(e)) for e in entrants(files, bundles, context, args)}
        turns["dram"] = lambda: measure_dram(n_threads=[args.threads], seconds=0.3)[args.threads]
        runs = interleave(turns, args.rounds)
        if shelf.n_closed:
            print(f"{source.name}: memory does not hold all engines; loaded again {shelf.n_closed} times")
    dram = runs.pop("dram")
    return rows_of(source, runs, dram, len(long_prompt), args), list(bundles.values())


def prompts(source: Path, args: Any) -> tuple[list[int], list[int]]:
    """The built-in prompt in this model's tokens, and --prompt tokens of it again and again."""
    worker = Worker([args.llama_python, str(HERE / "llama_worker.py"), "serve", str(source), "64", str(args.threads)])
    with_bos, ids = (worker.ask(op="tokenise", text=PROMPT, bos=bos)["tokens"] for bos in (True, False))
    worker.close()
    bos = with_bos[0] if len(with_bos) > len(ids) else None
    return with_bos, repeated(bos, ids, args.prompt)


def rows_of(
    source: Path, runs: dict[Entrant, list[Run]], dram: list[float], n_prompt: int, args: Any
) -> list[dict[str, Any]]:
    speed = {e: spread([run.decode.tok_per_s for run in of_e]) for e, of_e in runs.items()}
    prefill = {
        e: spread([n_prompt / run.prefill_s for run in of_e])["median"] for e, of_e in runs.items() if e.density is None
    }
    mlp_s = {
        e: spread([run.decode.ledger_s.get("gemv", 0.0) / args.tokens for run in of_e]) for e, of_e in runs.items()
    }
    llama = [e for e in runs if e.engine == "llama.cpp"]
    baseline = max(speed[e]["median"] for e in llama)
    prefill_baseline = max(prefill[e] for e in llama)
    dense = next((e for e in runs if e.is_dense_int4), None)
    theirs = {e.file: runs[e][0].decode.tokens for e in llama}

    rows = []
    for e, of_e in runs.items():
        ours, pruned = e.engine == "dipper", e.density is not None
        touched = of_e[0].decode.touched_bytes
        shares = [
            touched * run.decode.tok_per_s / (1e9 * roof) if ours else 0 for run, roof in zip(of_e, dram, strict=True)
        ]
        row = {
            "model": source.name,
            "engine": e.engine,
            "file": e.file,
            "density": e.density,
            "tok_per_s": speed[e]["median"],
            "p20": speed[e]["p20"],
            "p80": speed[e]["p80"],
            "vs_baseline": speed[e]["median"] / baseline,
            "prefill_tok_per_s": prefill.get(e),
            "prefill_vs_baseline": None if pruned else prefill[e] / prefill_baseline,
            "gb_per_token": touched / 1e9 if ours else None,
            "dram_gbps": spread(dram)["median"],
            "roof_share": spread(shares)["median"] if ours else None,
            "mlp_ms": 1e3 * mlp_s[e]["median"] if ours else None,
            "vs_dense": speed[e]["median"] / speed[dense]["median"] if pruned else None,
            "mlp_vs_dense": mlp_s[e]["median"] / mlp_s[dense]["median"] if pruned else None,
            "tokens_as_llama": common_prefix(theirs[e.file], of_e[0].decode.tokens),
        }
        rows.append({**row, **verdict(e, row, args)})
    return rows


def verdict(entrant: Entrant, row: dict[str, Any], args: Any) -> dict[str, Any]:
    """Whether the row is within its thresholds, and past which it is; None where it has none."""
    checks: list[tuple[str, bool]] = []
    if entrant.engine == "dipper" and entrant.density is None:
        least = LEAST_DECODE[entrant.file]
        checks.append((f"vs_baseline < {least}", row["vs_baseline"] >= least))
    if entrant.is_dense_int4:
        checks.append((f"prefill < {LEAST_PREFILL}", row["prefill_vs_baseline"] >= LEAST_PREFILL))
        if row["gb_per_token"] * 1e9 >= ROOF_BYTES:
            checks.append((f"roof_share < {LEAST_ROOF_SHARE}", row["roof_share"] >= LEAST_ROOF_SHARE))
    if entrant.density is not None and args.expect_density_gain:
        checks.append((f"vs_dense < {LEAST_DENSITY_SPEED}", row["vs_dense"] >= LEAST_DENSITY_SPEED))
        checks.append((f"mlp_vs_dense > {MOST_DENSITY_MLP}", row["mlp_vs_dense"] <= MOST_DENSITY_MLP))
    missed = [name for name, holds in checks if not holds]
    return {"missed": ", ".join(missed) or None, "ok": not missed if checks else None}


def common_prefix(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))


def main() -> None:
    if sys.argv[1:2] == ["--serve"]:
        serve_dipper(*sys.argv[2:])
        return
    cli = parser(__doc__)
    cli.add_argument("models", nargs="+", metavar="MODEL", help="GGUF file, name, or synthetic:SHAPE")
    cli.add_argument("--llama-python", required=True, help="a Python that has llama-cpp-python")
    cli.add_argument("--threads", type=int, default=2)
    cli.add_argument("--tokens", type=int, default=64, help="decoded tokens per turn [64]")
    cli.add_argument("--prompt", type=int, default=512, help="tokens of a timed prefill [512]")
    cli.add_argument("--rounds", type=int, default=7)
    cli.add_argument("--density", type=float, help="also DIP at this density, all columns cached")
    cli.add_argument("--expect-density-gain", action="store_true", help="thresholds for --density")
    cli.add_argument(
        "--workdir", type=Path, default=Path("bundles"), help="for bundles, synthetic and requantised files [bundles]"
    )
    cli.add_argument("--llama-only", action="store_true", help="llama.cpp's files alone")
    args = cli.parse_args()
    if args.expect_density_gain and (args.density is None or args.llama_only):
        fail("--expect-density-gain is about --density, which no engine here runs")
    sources = [source_for(spec, args.workdir) for spec in args.models]
    for source in sources:
        if not source.is_file():
            fail(f"{source} is not a file; both engines need the GGUF itself")
    rows: list[dict[str, Any]] = []
    bundles: list[Path] = []
    for source in sources:
        of_model, packed = measure(source, args)
        rows += of_model
        bundles += packed
    print_table([{column: row[column] for column in (*WHICH, *SPEED)} for row in rows])
    print_table([{column: row[column] for column in (*WHICH, *COST)} for row in rows if row["engine"] == "dipper"])
    finish(
        "llamacpp",
        rows,
        bundles,
        threads=args.threads,
        n_tokens=args.tokens,
        n_prompt=args.prompt,
        rounds=args.rounds,
    )


if __name__ == "__main__":
    run_command(main)
