"""Decode speed with everything resident: dipper against llama.cpp, turn by turn in one run.

    python benchmarks/bench_llamacpp.py MODEL.gguf... --llama-python VENV/bin/python [--threads 2] [--tokens 64]

Each model is decoded greedily by three workers that stay loaded and take turns over pipes, so that only one computes at
a time: dipper (dense-resident, `--bits source` bundle), llama.cpp on the given GGUF, and llama.cpp on that file
requantised to Q4_0 (the head keeps its type). The same prompt, context, threads and number of tokens; tok/s excludes
prefill. The baseline is the faster of the two llama.cpp files. Run it on an idle machine: with two threads on two
cores, llama.cpp's barriers cost a factor of ten as soon as anything else wants a core.

`--llama-python` is a Python that has llama-cpp-python, best in a venv of its own. On CPUs with AMX a build with native
flags crashes; build it with explicit ones (minutes):

    CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_AVX=ON -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON \\
      -DGGML_AVX512=ON -DGGML_AVX512_VBMI=ON -DGGML_AVX512_VNNI=ON" pip install llama-cpp-python
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from harness import (
    PROMPT,
    Decode,
    bundle_for,
    fail,
    finish,
    greedy,
    interleave,
    open_engine,
    parser,
    print_table,
    run_command,
    spread,
)

HERE = Path(__file__).resolve().parent


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


def serve_dipper(bundle: str, n_ctx: str, n_threads: str) -> None:
    """The dipper worker: this file with `--serve`, in a process of its own as llama.cpp has one."""
    engine = open_engine(Path(bundle), method="dense-resident", context=int(n_ctx), threads=int(n_threads))
    print(json.dumps({"ready": bundle}), flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        run = greedy(engine, command["prompt"], command["n"])
        print(json.dumps({"prefill_s": run.prefill_s, "decode_s": run.decode_s, "tokens": run.tokens}), flush=True)


def head_type(gguf_path: Path) -> int:
    """ggml's type number of the tensor that makes the logits."""
    from gguf import GGUFReader

    types = {t.name: int(t.tensor_type) for t in GGUFReader(gguf_path).tensors}
    return types.get("output.weight", types["token_embd.weight"])


def requantised(source: Path, workdir: Path, llama_python: str) -> Path:
    target = workdir / f"{source.stem}-to-q4_0.gguf"
    if not target.exists():
        workdir.mkdir(parents=True, exist_ok=True)
        worker = [
            llama_python,
            str(HERE / "llama_worker.py"),
            "quantise",
            str(source),
            str(target),
            str(head_type(source)),
        ]
        subprocess.run(worker, check=True)
    return target


def common_prefix(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))


def measure(source: Path, bundle: Path | None, args: Any) -> list[dict[str, Any]]:
    llama = [args.llama_python, str(HERE / "llama_worker.py"), "serve"]
    limits = [str(args.ctx), str(args.threads)]
    commands = {"given": [*llama, str(source), *limits]}
    commands["q4_0"] = [*llama, str(requantised(source, args.workdir, args.llama_python)), *limits]
    if bundle is not None:
        serve = [sys.executable, str(Path(__file__).resolve()), "--serve", str(bundle), *limits]
        commands = {"dipper": serve, **commands}

    workers = {}
    try:
        for name, command in commands.items():
            workers[name] = Worker(command)
        prompt = workers["given"].ask(op="tokenise", text=PROMPT, bos=True)["tokens"]
        if len(prompt) + args.tokens > args.ctx:
            fail(f"{len(prompt)} + {args.tokens} tokens are more than --ctx {args.ctx}")
        turns = {name: (lambda w=worker: w.decode(prompt, args.tokens)) for name, worker in workers.items()}
        runs = interleave(turns, args.rounds)
    finally:
        for worker in workers.values():
            worker.close()

    speed = {name: spread([run.tok_per_s for run in of_name]) for name, of_name in runs.items()}
    baseline = max(speed["given"]["median"], speed["q4_0"]["median"])
    rows = []
    for name, of_name in runs.items():
        row = {
            "model": source.name,
            "engine": "dipper source" if name == "dipper" else f"llama.cpp {name}",
            "tok_per_s": speed[name]["median"],
            "p20": speed[name]["p20"],
            "p80": speed[name]["p80"],
            "prefill_tok_per_s": len(prompt) / spread([run.prefill_s for run in of_name])["median"],
            "vs_baseline": speed[name]["median"] / baseline,
            "tokens_as_given": common_prefix(runs["given"][0].tokens, of_name[0].tokens),
            "ok": None,
        }
        if name == "dipper":
            row["ok"] = row["vs_baseline"] >= 1.0
        rows.append(row)
    return rows


def main() -> None:
    if sys.argv[1:2] == ["--serve"]:
        serve_dipper(*sys.argv[2:])
        return
    cli = parser(__doc__)
    cli.add_argument("models", nargs="+", type=Path, metavar="MODEL.gguf")
    cli.add_argument("--llama-python", required=True, help="a Python that has llama-cpp-python")
    cli.add_argument("--threads", type=int, default=2)
    cli.add_argument("--tokens", type=int, default=64, help="decoded tokens per turn [64]")
    cli.add_argument("--ctx", type=int, default=256)
    cli.add_argument("--rounds", type=int, default=7)
    cli.add_argument(
        "--workdir", type=Path, default=Path("bundles"), help="for bundles and requantised files [bundles]"
    )
    cli.add_argument("--llama-only", action="store_true", help="llama.cpp's two files alone")
    args = cli.parse_args()
    for source in args.models:
        if not source.is_file():
            fail(f"{source} is not a file; both engines need the GGUF itself")
    bundles = [None if args.llama_only else bundle_for(str(source), "source", args.workdir) for source in args.models]
    rows = []
    for source, bundle in zip(args.models, bundles, strict=True):
        rows += measure(source, bundle, args)
    print_table(rows)
    finish(
        "llamacpp",
        rows,
        [b for b in bundles if b is not None],
        threads=args.threads,
        n_tokens=args.tokens,
        ctx=args.ctx,
        rounds=args.rounds,
    )


if __name__ == "__main__":
    run_command(main)
