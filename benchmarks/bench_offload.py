"""A model larger than its memory: dipper beside what others do, each under the same limit on a cold page cache.

    python benchmarks/bench_offload.py MODEL --limit 350MB [--limit 450MB] --llama-python VENV/bin/python [--held]

MODEL is a GGUF file, a name that `dipper pull` knows, or synthetic:SHAPE, made by synthetic.py. Every turn is a process
of its own in a memory control group of --limit bytes that may not swap. What it reads through the page cache counts
there, so what does not fit is evicted and read again; the files are dropped from the cache before, and mincore must
agree. It loads, takes the prompt (the same token ids for all), then decodes greedily. Engines take turns, --rounds
times; figures are medians. Needs root, and a cgroup v1 memory or v2 controller.

    dipper      --method, dense-stream by default, with --dram at the limit; with a split bundle (--bundle, or packed at
                --base-bits) planes as well, at --fetch. planes and auto run on the split bundle, others on the plain
    llama.cpp   --llama default: the file mapped, as it comes; but tensors whose kernels want another order are copied
                to memory that cannot be evicted. --llama no-repack: all stays mapped. no-mmap: all is copied
    accelerate  the weights in bfloat16 (converted once, unlimited), offloaded to disk; where --accelerate-python has it
    airllm      the same weights, a file a layer (split once, unlimited), on the CPU; where --airllm-python is given

`token_ms` and `tok_per_s` are the decode's alone, `start_s` is from the start of the process to the first token.
`read_mb` is read from storage per decoded token: by the process (/proc/PID/io), and `device_mb` by everybody from the
block device that holds the model. `idle_mb` is the resident set of a process that has only imported the engine, much of
it libraries, which count in a group only where it was the first to read them. `anon_mb`: what the engine holds at the
end that cannot be evicted. `killed`: turns ended for memory. `as_llama`: tokens before the first that llama.cpp does
not give; methods that prune differ sooner.

With --held the disk gives 0.5 GB/s and 40,000 reads a second (benchmarks/held_disk.sh), page faults included. Run it on
an idle machine: llama.cpp's barriers suffer from anything else that wants a core.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from bench_llamacpp import Worker, common_prefix
from harness import (
    bundle_for,
    fail,
    finish,
    greedy,
    hold_disk,
    interleave,
    is_bundle,
    open_engine,
    parser,
    print_table,
    prompt_tokens,
    run_command,
    source_for,
    spread,
)

HERE = Path(__file__).resolve().parent

MOST_CACHED = 0.01  # of a file before a turn
SECTOR_BYTES = 512  # of /sys/dev/block/*/stat, whatever the device's own
# Of the room beside an idle process, what accelerate may fill with weights; the rest is what it computes with.
ACCELERATE_SHARE = 0.5

IMPORTS = {
    "dipper": "dipper.engine",
    "llama.cpp": "llama_cpp",
    "accelerate": "accelerate, transformers, torch",
    "airllm": "airllm",
}
# v1 and v2: limit, limit with swap, the file that counts kills.
GROUP_FILES = (
    ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes", "memory.oom_control"),
    ("memory.max", "memory.swap.max", "memory.events"),
)


# --- the engines' processes


@dataclass(frozen=True, kw_only=True)
class Entrant:
    """One engine with its setting."""

    engine: str  # a name of IMPORTS
    setting: str
    command: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()  # what it reads
    absent: str | None = None  # why it is not run


def serve_dipper(bundle: str, config: str) -> None:
    """Answers as llama_worker.py does; its first line has an `error` where the engine does not open."""
    from dipper.errors import DipperError

    try:
        engine = open_engine(Path(bundle), **json.loads(config))
    except DipperError as error:
        print(json.dumps({"error": str(error)}), flush=True)
        return
    print(json.dumps({"ready": bundle, "plan": engine.plan.parts, "notes": engine.notes}), flush=True)

    def decode(prompt: list[int], n: int) -> dict[str, Any]:
        run = greedy(engine, prompt, n)
        return {"prefill_s": run.prefill_s, "decode_s": run.decode_s, "tokens": run.tokens}

    def more(token: int, n: int) -> dict[str, Any]:
        start, tokens = time.perf_counter(), [token]
        for _ in range(n):
            tokens.append(int(engine.step(tokens[-1], copy=False).argmax()))
        return {"decode_s": time.perf_counter() - start, "tokens": tokens}

    answer({"decode": decode, "more": more})


def serve_accelerate(folder: str, offload: str, cpu_bytes: str, threads: str) -> None:
    """The same of a model whose weights beyond `cpu_bytes` accelerate leaves on disk."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(int(threads))
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.bfloat16,
        device_map="auto",
        max_memory={"cpu": int(cpu_bytes)},
        offload_folder=offload,
    )
    places = list(getattr(model, "hf_device_map", {}).values())
    decode_with(model, folder, f"{places.count('disk')} of {len(places)} parts on disk")


def serve_airllm(folder: str, threads: str) -> None:
    """The same of a model that AirLLM loads layer by layer, for every token anew."""
    import torch

    torch.set_num_threads(int(threads))
    with contextlib.redirect_stdout(sys.stderr):  # it prints
        from airllm import AutoModel

        model = AutoModel.from_pretrained(folder, device="cpu")
    decode_with(model, folder, "a layer at a time")


def decode_with(model: Any, folder: str, note: str) -> None:
    """Answers for a model that is called as those of transformers are."""
    import torch

    print(json.dumps({"ready": folder, "notes": [note]}), flush=True)
    cache = None

    @torch.inference_mode()
    def next_of(ids: list[int]) -> int:
        nonlocal cache
        with contextlib.redirect_stdout(sys.stderr):
            out = model(torch.tensor([ids]), past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = out.past_key_values
        return int(out.logits[0, -1].argmax())

    def decode(prompt: list[int], n: int) -> dict[str, Any]:
        nonlocal cache
        cache, start = None, time.perf_counter()
        token = next_of(prompt)
        return {"prefill_s": time.perf_counter() - start, **more(token, n)}

    def more(token: int, n: int) -> dict[str, Any]:
        start, tokens = time.perf_counter(), [token]
        for _ in range(n):
            tokens.append(next_of(tokens[-1:]))
        return {"decode_s": time.perf_counter() - start, "tokens": tokens}

    answer({"decode": decode, "more": more})


def answer(ops: dict[str, Any]) -> None:
    for line in sys.stdin:
        command = json.loads(line)
        print(json.dumps(ops[command.pop("op")](**command)), flush=True)


def to_transformers(source: str, target: str) -> None:
    """A GGUF as transformers loads it without reading it all."""
    import torch
    import transformers

    file = Path(source).resolve()
    # Newer versions leave the blocks of a GGUF packed, which they can neither save nor offload.
    packed = hasattr(transformers, "GgufConfig")
    more = {"quantization_config": transformers.GgufConfig(dequantize=True)} if packed else {}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.bfloat16, **more
    )
    model.save_pretrained(target + ".partial")
    Path(target + ".partial").rename(target)


# --- the limit


class MemoryGroup:
    """A control group, cgroup v1 or v2, whose processes may hold so many bytes together, page cache included."""

    def __init__(self, limit_bytes: int) -> None:
        self.path, (limit, swap, self._events) = self._make()
        (self.path / limit).write_text(str(limit_bytes))
        with contextlib.suppress(OSError):  # kernels without accounting of swap
            (self.path / swap).write_text("0" if limit == "memory.max" else str(limit_bytes))

    @staticmethod
    def _make() -> tuple[Path, tuple[str, str, str]]:
        for files, parent, io_max in MemoryGroup._parents():
            group = parent / f"dipper-offload-{os.getpid()}"
            try:
                group.mkdir()
            except OSError:
                continue
            if not (group / files[0]).exists():
                group.rmdir()
                continue
            for line in io_max:
                (group / "io.max").write_text(line)
            return group, files
        return fail("no memory control group that this user may make: run as root, with cgroup v1 memory or v2")

    @staticmethod
    def _parents() -> Iterator[tuple[tuple[str, str, str], Path, list[str]]]:
        """Where a group may be made, and the limits on disks that this process has and the group would not inherit."""
        own = {
            controllers: path.lstrip("/")
            for _, controllers, path in (
                line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()
            )
        }
        if "memory" in own:
            root = Path("/sys/fs/cgroup/memory")
            yield GROUP_FILES[0], root / own["memory"], []
            yield GROUP_FILES[0], root, []
        if "" in own:
            # Beside this process's own group and not in it: a group with processes gives its children no controllers.
            root = Path("/sys/fs/cgroup")
            with contextlib.suppress(OSError):
                (root / "cgroup.subtree_control").write_text("+memory")
            held = root / own[""] / "io.max"
            yield GROUP_FILES[1], root, held.read_text().splitlines() if held.exists() else []

    @property
    def kills(self) -> int:
        fields = dict(line.split() for line in (self.path / self._events).read_text().splitlines())
        return int(fields.get("oom_kill", 0))

    def __enter__(self) -> MemoryGroup:
        return self

    def __exit__(self, *error: object) -> None:
        for _ in range(50):  # its last process may not be gone yet
            with contextlib.suppress(OSError):
                self.path.rmdir()
                return
            time.sleep(0.1)
        print(f"{self.path} is still in use; remove it with rmdir", file=sys.stderr)


class EndedError(Exception):
    """The process ended before it answered."""

    def __init__(self, what: str, is_late: bool = False) -> None:
        super().__init__(what)
        self.is_late = is_late


class Confined(Worker):
    """A worker in a memory group, killed where one answer takes longer than `timeout_s`."""

    def __init__(self, group: Path, command: tuple[str, ...], timeout_s: float) -> None:
        self.timeout_s = timeout_s
        super().__init__(["bash", "-c", 'echo $$ >"$0/cgroup.procs" && exec "$@"', str(group), *command])

    def __enter__(self) -> Confined:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.communicate()

    def _answer(self) -> dict[str, Any]:
        late = threading.Event()

        def kill() -> None:
            late.set()
            self.process.kill()

        timer = threading.Timer(self.timeout_s, kill)
        timer.start()
        try:
            line = self.process.stdout.readline()
        finally:
            timer.cancel()
        if line:
            return json.loads(line)
        status = self.process.wait()
        what = f"no answer in {self.timeout_s:g} s" if late.is_set() else f"ended with status {status}"
        raise EndedError(what, late.is_set())

    def ask(self, **command: Any) -> dict[str, Any]:
        with contextlib.suppress(BrokenPipeError):  # `_answer` tells
            return super().ask(**command)
        return self._answer()

    def read_bytes(self) -> int:
        fields = dict(line.split(": ") for line in Path(f"/proc/{self.process.pid}/io").read_text().splitlines())
        return int(fields["read_bytes"])

    def anonymous_bytes(self) -> int:
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("RssAnon"):
                return int(line.split()[1]) * 1024
        return 0


# --- a turn


@dataclass(frozen=True, kw_only=True)
class Run:
    """What one engine did in one round; without tokens where it ended before."""

    n: int = 0
    start_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    tokens: list[int] = field(default_factory=list)
    read_bytes: int = 0
    device_bytes: int | None = None
    anonymous_bytes: int = 0
    hello: dict[str, Any] = field(default_factory=dict)
    killed: bool = False
    note: str | None = None


def device_bytes(path: Path) -> int | None:
    """Bytes read so far from the block device that holds a file; None where the file system does not tell which."""
    number = path.stat().st_dev
    stat = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}/stat")
    return int(stat.read_text().split()[2]) * SECTOR_BYTES if stat.exists() else None


def make_cold(files: tuple[Path, ...]) -> None:
    from dipper.doctor import drop_page_cache, page_cache_share

    for file in files:
        drop_page_cache(file)
        share = page_cache_share(file)
        if share > MOST_CACHED:
            fail(f"{100 * share:.0f} % of {file} stay in the page cache: another process uses it")


def turn(entrant: Entrant, limit_bytes: int, prompt: list[int], late: set[Entrant], args: Any) -> Run | None:
    """None: it was too slow in an earlier round."""
    if entrant in late:
        return None
    make_cold(entrant.files)
    with MemoryGroup(limit_bytes) as group:
        try:
            return decode_in(group, entrant, prompt, args)
        except EndedError as error:
            killed = group.kills > 0
            if error.is_late:
                late.add(entrant)
            return Run(killed=killed, note=None if killed else str(error))


def decode_in(group: MemoryGroup, entrant: Entrant, prompt: list[int], args: Any) -> Run:
    start = time.perf_counter()
    with Confined(group.path, entrant.command, args.timeout) as worker:
        if "error" in worker.hello:
            raise EndedError(worker.hello["error"])
        first = worker.ask(op="decode", prompt=prompt, n=0)
        start_s = time.perf_counter() - start
        device, read = device_bytes(entrant.files[0]), worker.read_bytes()
        rest = worker.ask(op="more", token=first["tokens"][-1], n=args.tokens)
        read = worker.read_bytes() - read
        return Run(
            n=args.tokens,
            start_s=start_s,
            prefill_s=first["prefill_s"],
            decode_s=rest["decode_s"],
            tokens=rest["tokens"],
            read_bytes=read,
            device_bytes=None if device is None else device_bytes(entrant.files[0]) - device,
            anonymous_bytes=worker.anonymous_bytes(),
            hello=worker.hello,
        )


def idle_bytes(python: str, engine: str) -> int:
    """Resident set of a process that has imported the engine and loaded nothing."""
    script = f"import {IMPORTS[engine]}\nprint(open('/proc/self/statm').read().split()[1])"
    out = subprocess.run([python, "-c", script], capture_output=True, text=True, check=True).stdout
    return int(out.split()[-1]) * os.sysconf("SC_PAGE_SIZE")


# --- who takes part


def dipper_entrants(plain: Path, split: Path | None, context: int, limit_bytes: int, args: Any) -> list[Entrant]:
    entrants = []
    for method in args.method or ["dense-stream", *(["planes"] if split else [])]:
        bundle = split if split and method in ("planes", "auto") else plain
        config = {"method": method, "dram": limit_bytes, "context": context, "threads": args.threads}
        setting = method
        if method == "planes":
            config |= {"fetch": args.fetch, "fetch_glu": args.fetch_glu}
            config |= {"whole": [int(layer) for layer in args.whole.split(",")]} if args.whole else {}
            setting += f" {args.fetch:g}"
            setting += "" if args.fetch_glu is None else f":{args.fetch_glu:g}"
            setting += f" whole {args.whole}" if args.whole else ""
            config |= {} if args.read_cost is None else {"read_cost": args.read_cost}
            setting += "" if args.read_cost is None else f" read cost {args.read_cost}"
        if method in ("dip", "dip-ca"):
            config |= {"density": args.density}
            setting += f" {args.density:g}"
        command = (sys.executable, str(Path(__file__).resolve()), "--serve", str(bundle), json.dumps(config))
        files = (bundle / "flash.bin", bundle / "resident.bin")
        entrants.append(Entrant(engine="dipper", setting=setting, command=command, files=files))
    return entrants


def llama_entrants(source: Path, context: int, args: Any) -> list[Entrant]:
    if not args.llama_python:
        return [Entrant(engine="llama.cpp", setting="mmap", absent="not run: no --llama-python")]
    serve = (args.llama_python, str(HERE / "llama_worker.py"), "serve", str(source), str(context), str(args.threads))
    return [
        Entrant(
            engine="llama.cpp",
            setting=name if name != "default" else "mmap",
            command=serve if name == "default" else (*serve, name),
            files=(source,),
        )
        for name in args.llama
    ]


def accelerate_entrants(folder: Path | None, why_not: str, limit_bytes: int, idle: int, args: Any) -> list[Entrant]:
    if folder is None:
        return [Entrant(engine="accelerate", setting="disk", absent=f"not run: {why_not}")]
    room = max(1, int(ACCELERATE_SHARE * (limit_bytes - idle)))
    this = (args.accelerate_python, str(Path(__file__).resolve()), "--serve-accelerate")
    command = (*this, str(folder), str(folder / "offload"), str(room), str(args.threads))
    return [Entrant(engine="accelerate", setting="disk", command=command, files=tuple(folder.glob("*.safetensors")))]


def airllm_entrants(folder: Path | None, why_not: str, args: Any) -> list[Entrant]:
    if folder is None or not args.airllm_python:
        return [Entrant(engine="airllm", setting="layers", absent=f"not run: {why_not or 'no --airllm-python'}")]
    layers = folder / "splitted_model"  # where AirLLM puts them
    if not layers.exists():
        print(f"splitting {folder.name} for AirLLM", file=sys.stderr)
        script = f"from airllm import AutoModel\nAutoModel.from_pretrained({str(folder)!r}, device='cpu')"
        if subprocess.run([args.airllm_python, "-c", script], stdout=sys.stderr).returncode != 0:
            return [Entrant(engine="airllm", setting="layers", absent="not run: AirLLM does not split this model")]
    command = (args.airllm_python, str(Path(__file__).resolve()), "--serve-airllm", str(folder), str(args.threads))
    return [Entrant(engine="airllm", setting="layers", command=command, files=tuple(layers.glob("*.safetensors")))]


def accelerate_folder(source: Path, args: Any) -> tuple[Path | None, str]:
    """The model as transformers loads it, converted into the workdir once; or why there is none."""
    if not args.accelerate_python:
        return None, "no --accelerate-python"
    modules = ("accelerate", "transformers", "torch", "gguf", "numpy")
    script = f"from importlib.util import find_spec\nprint(*(m for m in {modules} if not find_spec(m)))"
    lacks = subprocess.run([args.accelerate_python, "-c", script], capture_output=True, text=True, check=True).stdout
    if lacks.split():
        return None, f"the given Python lacks {', '.join(lacks.split())}"
    target = args.workdir / f"{source.stem}-bf16"
    if not target.exists():
        print(f"converting {source.name} for transformers", file=sys.stderr)
        this = [args.accelerate_python, str(Path(__file__).resolve()), "--to-transformers"]
        if subprocess.run([*this, str(source), str(target)], stdout=sys.stderr).returncode != 0:
            return None, "transformers does not convert this GGUF"
    return target, ""


# --- a model


def measure(
    source: Path, plain: Path, split: Path | None, folder: Path | None, why_not: str, args: Any
) -> list[dict[str, Any]]:
    from dipper.budget import parse_bytes

    prompt = prompt_tokens(plain, args.prompt)
    context = len(prompt) + args.tokens + 1
    pythons = {
        "dipper": sys.executable,
        "llama.cpp": args.llama_python,
        "accelerate": args.accelerate_python if folder else None,
        "airllm": args.airllm_python if folder else None,
    }
    idle = {engine: idle_bytes(python, engine) for engine, python in pythons.items() if python}
    rows = []
    for limit in args.limit:
        limit_bytes = parse_bytes(limit, source.stat().st_size)
        entrants = [
            *dipper_entrants(plain, split, context, limit_bytes, args),
            *llama_entrants(source, context, args),
            *accelerate_entrants(folder, why_not, limit_bytes, idle.get("accelerate", 0), args),
            *airllm_entrants(folder, why_not, args),
        ]
        late: set[Entrant] = set()
        turns = {e: partial(turn, e, limit_bytes, prompt, late, args) for e in entrants if e.absent is None}
        runs = interleave(turns, args.rounds, pause_s=args.pause, warm_up=False)
        theirs = next((r.tokens for e in runs if e.engine == "llama.cpp" for r in runs[e] if r and r.tokens), None)
        of_limit = [row_of(source, limit_bytes, e, runs.get(e, []), idle.get(e.engine), theirs) for e in entrants]
        print_table([{k: v for k, v in row.items() if k not in ("runs", "model")} for row in of_limit])
        rows += of_limit
    return rows


def row_of(
    source: Path,
    limit_bytes: int,
    entrant: Entrant,
    rounds: list[Run | None],
    idle: int | None,
    theirs: list[int] | None,
) -> dict[str, Any]:
    runs = [run for run in rounds if run is not None]
    done = [run for run in runs if run.tokens]

    def median(values: list[float | None]) -> float | None:
        return spread(values)["median"] if values and None not in values else None

    hellos = [note for run in done for note in run.hello.get("notes", [])]
    notes = [entrant.absent, *(run.note for run in runs), *hellos]
    return {
        "model": source.name,
        "limit_mb": limit_bytes / 1e6,
        "engine": entrant.engine,
        "setting": entrant.setting,
        "tok_per_s": median([run.n / run.decode_s for run in done]),
        "token_ms": median([1e3 * run.decode_s / run.n for run in done]),
        "read_mb": median([run.read_bytes / run.n / 1e6 for run in done]),
        "device_mb": median([None if run.device_bytes is None else run.device_bytes / run.n / 1e6 for run in done]),
        "start_s": median([run.start_s for run in done]),
        "idle_mb": None if idle is None else idle / 1e6,
        "anon_mb": median([run.anonymous_bytes / 1e6 for run in done]),
        "killed": f"{sum(run.killed for run in runs)} of {len(runs)}" if runs else None,
        "as_llama": common_prefix(theirs, done[0].tokens) if theirs and done else None,
        "note": next((note for note in notes if note), None),
        "runs": [
            {"tok_per_s": run.n / run.decode_s, "prefill_s": run.prefill_s, "start_s": run.start_s}
            | {"read_bytes": run.read_bytes, "device_bytes": run.device_bytes, "plan": run.hello.get("plan")}
            for run in done
        ],
    }


def split_of(args: Any) -> Path | None:
    """The split bundle to run, if any."""
    if args.bundle:
        if not is_bundle(str(args.bundle)):
            fail(f"{args.bundle} is not a bundle")
        return args.bundle
    if args.base_bits:
        from bench_planes import split_bundle

        return split_bundle(args.model, args.base_bits, args)
    return None


def main() -> None:
    cli = parser(__doc__)
    cli.add_argument("model", metavar="MODEL", help="GGUF file, name, or synthetic:SHAPE")
    cli.add_argument(
        "--limit", action="append", help="memory of a process: 300MB, or 60%% of the file; may be repeated"
    )
    cli.add_argument("--llama-python", help="a Python that has llama-cpp-python")
    cli.add_argument(
        "--llama", action="append", choices=("default", "no-repack", "no-mmap"), help="[default, no-repack]"
    )
    cli.add_argument("--accelerate-python", help="a Python that has accelerate and transformers [--llama-python]")
    cli.add_argument("--airllm-python", help="a Python that has airllm")
    cli.add_argument("--bundle", type=Path, help="split bundle of this model, for planes and auto")
    cli.add_argument("--base-bits", metavar="BASE[,BASE]", help="instead of --bundle: pack one at these base bits")
    cli.add_argument("--unit-bytes", type=int, default=4096, help="of the bundle of --base-bits [4096]")
    cli.add_argument("--method", action="append", help="of dipper; may be repeated [dense-stream, planes if split]")
    cli.add_argument("--fetch", type=float, default=0.1, help="of planes [0.1]")
    cli.add_argument("--fetch-glu", type=float, help="of planes [--fetch]")
    cli.add_argument("--whole", metavar="LAYERS", help="of planes, as 2,26")
    cli.add_argument("--read-cost", type=int, metavar="BYTES", help="of planes [single units]")
    cli.add_argument("--density", type=float, default=0.7, help="of dip and dip-ca [0.7]")
    cli.add_argument("--tokens", type=int, default=16, help="decoded tokens per turn [16]")
    cli.add_argument("--prompt", type=int, default=32, help="tokens of the prompt [32]")
    cli.add_argument("--rounds", type=int, default=3)
    cli.add_argument("--pause", type=float, default=1.0, help="seconds before a turn [1]")
    cli.add_argument(
        "--timeout",
        type=float,
        default=600,
        help="seconds for loading, prompt and decode each [600]; who takes longer sits out the other rounds",
    )
    cli.add_argument("--threads", type=int, default=2)
    cli.add_argument(
        "--workdir", type=Path, default=Path("bundles"), help="for bundles, synthetic and converted files [bundles]"
    )
    cli.add_argument("--held", action="store_true", help="under benchmarks/held_disk.sh")
    cli.set_defaults(ordered=False)  # of bench_planes.split_bundle
    args = cli.parse_args()
    if not args.limit:
        fail("give --limit, less than the model's bytes")
    args.llama = args.llama or ["default", "no-repack"]
    args.accelerate_python = args.accelerate_python or args.llama_python

    source = source_for(args.model, args.workdir)
    if not source.is_file():
        fail(f"{source} is not a file; llama.cpp needs the GGUF itself")
    plain, split = bundle_for(args.model, "source", args.workdir), split_of(args)
    bundles = [plain, *([split] if split else [])]
    folder, why_not = accelerate_folder(source, args)
    if args.held:
        if len({path.stat().st_dev for path in (source, args.workdir, *bundles)}) > 1:
            fail(
                f"{source} and the bundles are on different file systems, and --held holds one disk: use its --workdir"
            )
        sys.stdout.flush()
        hold_disk(source)
    rows = measure(source, plain, split, folder, why_not, args)
    finish(
        "offload", rows, bundles, n_tokens=args.tokens, n_prompt=args.prompt, rounds=args.rounds, threads=args.threads,
        file_bytes=source.stat().st_size,
    )  # fmt: skip


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["--serve", *rest]:
            serve_dipper(*rest)
        case ["--serve-accelerate", *rest]:  # these three in a Python that need not have dipper
            serve_accelerate(*rest)
        case ["--serve-airllm", *rest]:
            serve_airllm(*rest)
        case ["--to-transformers", *rest]:
            to_transformers(*rest)
        case _:
            run_command(main)
