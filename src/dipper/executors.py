"""Where the cells of experiments are measured: in this process, in several, or on a Ray cluster.

    for number, outcome in run_processes(tasks, jobs=4):
        outcome.result or outcome.error

All three run the same function, `measure_cell`, on the same tasks, so that where a cell is measured does not change
what is found. A cell that fails, or whose process or machine dies, has an outcome as any other.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from dipper.checksums import code_sha256, file_sha256
from dipper.errors import ConfigError, DipperError
from dipper.experiment import Cell
from dipper.kinds import Context

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

__all__ = ["Done", "Outcome", "Task", "input_sha256", "measure_cell", "run_processes", "run_ray", "run_serial"]


# ------------------------------------------------------------------------------------------------ one cell


@dataclass(frozen=True, kw_only=True)
class Task:
    """A cell with all that measuring it takes, wherever that is.

    Attributes:
        cell: what.
        measure: its kind's function; processes import it by name.
        sources: of the kind.
        code: their checksum; a process that finds another refuses.
        context: where and on what.
        inputs: sha256 by path, which another machine is to find the same.
        wants_gpu: it computes on a GPU.
        started: of the whole run, for its provenance.
    """

    cell: Cell
    measure: Callable[[dict[str, Any], Context], dict[str, Any]]
    sources: tuple[str, ...]
    code: str
    context: Context
    inputs: Mapping[str, str]
    wants_gpu: bool
    started: str


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a task: a result, or an error."""

    result: dict[str, Any] | None = None
    seconds: float = 0.0
    provenance: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    trace: str = ""
    final: bool = False  # it would fail again


def measure_cell(task: Task) -> Outcome:
    """Measures one cell in this process; whatever goes wrong with it is the outcome's error."""
    start = time.perf_counter()
    try:
        for path, sha256 in task.inputs.items():
            _check_input(path, sha256)
        task.context.workdir.mkdir(parents=True, exist_ok=True)
        found = task.measure(json.loads(json.dumps(task.cell.options)), task.context)  # a copy: theirs to change
        seconds = time.perf_counter() - start
        result = json.loads(json.dumps(found, allow_nan=False))
        if code_sha256(task.sources) != task.code:
            raise ConfigError(
                f"the sources of {task.cell.kind} are not those that the run began with: start it again, with the same "
                "dipper on every machine"
            )
    except (Exception, SystemExit) as error:  # any: a cell must not end the others
        told = " ".join(str(error).split())
        if not isinstance(error, DipperError):
            told = f"{type(error).__name__}: {told}"
        return Outcome(error=told, trace=traceback.format_exc(), final=isinstance(error, ConfigError))
    return Outcome(result=result, seconds=seconds, provenance=_provenance(task))


def _check_input(path: str, sha256: str) -> None:
    try:
        found = input_sha256(path)
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read here ({error.strerror}): put it at this path on every machine"
        ) from None
    if found != sha256:
        raise ConfigError(
            f"{path} has sha256 {found[:12]}... here, {sha256[:12]}... where the run began: copy it again"
        )


input_sha256 = lru_cache(maxsize=64)(file_sha256)  # once in a process: every cell reads the same few files


def _provenance(task: Task) -> dict[str, Any]:
    """What ran a cell: code, libraries, machine, settings."""
    from dipper.records import provenance

    found = asdict(provenance(task.context.model))
    for name in ("bundle", "bundle_header_sha256", "calibration", "calibration_sha256"):
        del found[name]
    device = task.context.device if task.wants_gpu else "cpu"
    torch = sys.modules.get("torch")
    gpu = torch.cuda.get_device_name(device) if torch is not None and task.wants_gpu else None
    cuda = torch.version.cuda if torch is not None and task.wants_gpu else None
    settings = {"threads": task.context.threads, "batch": task.context.batch}
    return {**found, "time": task.started, "device": device, "gpu": gpu, "cuda": cuda, **settings}


# ------------------------------------------------------------------------------------------------ executors

# An executor gives the outcome of every task, in the order in which they end.
Done = Generator[tuple[int, Outcome], None, None]  # the task's number


def run_serial(tasks: Sequence[Task]) -> Done:
    """One after another, in this process."""
    for number, task in enumerate(tasks):
        yield number, measure_cell(task)


class _Worker:
    """A process that measures one cell at a time. When it dies, only that cell is lost.

    Args:
        gpu: the only one that it sees, as in CUDA_VISIBLE_DEVICES; None: all there are.
    """

    def __init__(self, gpu: str | None = None) -> None:
        from multiprocessing import get_context

        # A new interpreter: after a fork neither CUDA nor the threads of a library work.
        spawned = get_context("spawn")
        self.gpu = gpu
        self.pipe, theirs = spawned.Pipe()
        self.process = spawned.Process(target=_serve, args=(theirs, gpu), daemon=True)
        self.process.start()
        theirs.close()

    def measure(self, task: Task) -> None:
        self.pipe.send(task)

    def outcome(self) -> Outcome | None:
        """Of the task that it was given; None: it died."""
        try:
            outcome: Outcome = self.pipe.recv()
        except (EOFError, ConnectionError):
            return None
        return outcome

    def death(self) -> str:
        """How it died, once it has."""
        self.pipe.close()
        self.process.join()
        code = self.process.exitcode or 0
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        hint = "; is there enough memory?" if code == -signal.SIGKILL else ""
        return f"its process died ({how}{hint})"

    def end(self) -> None:
        self.pipe.close()
        self.process.terminate()
        self.process.join(timeout=5)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def _serve(pipe: Connection, gpu: str | None) -> None:
    """A worker's life: tasks in, outcomes out, until the other end closes.

    It ends as by Ctrl-C, and with it what its cell has started; once, since it may be told twice. The handler stays:
    one that is taken away while a signal waits for it is an OSError of Python's.
    """
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu  # PyTorch looks when it first needs one
    told: list[bool] = []

    def stop(*_: Any) -> None:
        if not told:
            told.append(True)
            raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    try:
        while True:
            pipe.send(measure_cell(pipe.recv()))
    except (EOFError, ConnectionError, KeyboardInterrupt):
        return
    finally:
        told.append(True)  # what comes now interrupts nothing


def run_processes(tasks: Sequence[Task], jobs: int) -> Done:
    """In so many processes of this machine, which live on from cell to cell and keep their models loaded.

    Where cells want a GPU and name none, the processes share all that this one may use, evenly.
    """
    from multiprocessing.connection import wait

    gpus = _gpus() if any(task.wants_gpu and ":" not in task.context.device for task in tasks) else []
    waiting = deque(range(len(tasks)))
    idle: list[_Worker] = []
    busy: dict[Any, tuple[_Worker, int]] = {}  # by pipe
    try:
        while waiting or busy:
            while waiting and len(busy) < jobs:
                number = waiting.popleft()
                worker = idle.pop() if idle else _Worker(_least_used(gpus, [w for w, _ in busy.values()]))
                busy[worker.pipe] = worker, number
                with suppress(ConnectionError):  # it has died since: that is what waiting for it finds
                    worker.measure(tasks[number])
            for pipe in wait(list(busy)):
                worker, number = busy.pop(pipe)
                outcome = worker.outcome()
                if outcome is None:
                    outcome = Outcome(error=worker.death())
                else:
                    idle.append(worker)
                yield number, outcome
    finally:
        for worker in [*idle, *(worker for worker, _ in busy.values())]:
            worker.end()


def _gpus() -> list[str]:
    """Those that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [gpu.strip() for gpu in named.split(",") if gpu.strip()]
    try:
        import torch
    except ImportError:
        return []  # the cells will say so

    return [str(number) for number in range(torch.cuda.device_count())]


def _least_used(gpus: Sequence[str], workers: Sequence[_Worker]) -> str | None:
    """The GPU for another worker beside these; None: there are none."""
    return min(gpus, key=lambda gpu: sum(worker.gpu == gpu for worker in workers), default=None)


def run_ray(tasks: Sequence[Task], address: str) -> Done:
    """On a Ray cluster, each cell with the CPUs and the GPU that it takes.

    Raises:
        ConfigError: Ray is not installed, the cluster is not there, or none of its machines is large enough.
    """
    try:
        import ray
    except ImportError:
        raise ConfigError("--ray needs Ray, which is not installed: pip install 'dipper[ray]'") from None
    ours = not ray.is_initialized()
    if ours:
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ConfigError(
                f"there is no Ray cluster at {address} ({str(error).splitlines()[0]}): start one with "
                "`ray start --head`, or use --jobs"
            ) from None
    waiting: dict[Any, int] = {}
    try:
        _check_cluster(ray.nodes(), tasks)
        # Retries are this module's, the same for all executors.
        remote = ray.remote(max_retries=0)(measure_cell)
        for number, task in enumerate(tasks):
            sized = remote.options(num_cpus=task.context.threads, num_gpus=int(task.wants_gpu))
            waiting[sized.remote(task)] = number
        while waiting:
            (done, *_), _ = ray.wait(list(waiting), num_returns=1)
            try:
                outcome = ray.get(done)
            except ray.exceptions.RayError as error:
                outcome = Outcome(error=_ray_error(error), trace=str(error))
            yield waiting.pop(done), outcome
    finally:
        for left in waiting:
            ray.cancel(left, force=True)
        if ours:
            ray.shutdown()


def _ray_error(error: Exception) -> str:
    """What became of a task that gave no outcome."""
    from ray.exceptions import RayTaskError

    lines = str(error).strip().splitlines() or [""]
    if isinstance(error, RayTaskError):  # the worker lives: what ends its traceback is why it could not even begin
        return f"it could not be started there ({lines[-1].strip()})"
    return f"its process or machine died ({type(error).__name__}: {lines[0].strip()})"


def _check_cluster(nodes: Sequence[Mapping[str, Any]], tasks: Sequence[Task]) -> None:
    """Ray would wait for ever for a machine that can take a task."""
    sizes = [node["Resources"] for node in nodes if node["Alive"]]
    for task in tasks:
        wanted = {"CPU": task.context.threads, "GPU": int(task.wants_gpu)}
        if not any(all(size.get(name, 0) >= n for name, n in wanted.items()) for size in sizes):
            has = ", ".join(f"{size.get('CPU', 0):g} CPUs and {size.get('GPU', 0):g} GPUs" for size in sizes)
            gpu = " and a GPU" if wanted["GPU"] else ""
            raise ConfigError(
                f"a cell takes {wanted['CPU']} CPUs{gpu}, and the machines of the Ray cluster have {has}: "
                "give fewer --threads, or --device cpu"
            )
