"""`dipper reproduce`: measures the cells that results lack, and checks those that are there.

    request = Request(models=("smollm2",), data=Path("data"), jobs=4)
    reproduce([find("experiments", "density")], Path("experiments"), request)

Where a cell is measured, `dipper.executors` decides. Results are written after every cell; one that fails, or whose
process dies, costs none of the others, and is tried again after them. Kinds that are timed have this machine for
themselves, in a process of its own, last.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from dipper import kinds
from dipper.budget import available_cpus
from dipper.checksums import code_sha256, file_sha256
from dipper.differences import differences
from dipper.errors import ConfigError, DipperError, nearest
from dipper.executors import Done, Outcome, Task, input_sha256, run_processes, run_ray, run_serial
from dipper.experiment import (
    Cell,
    Experiment,
    Model,
    Results,
    find,
    load_all,
    read_all,
    results_path,
    sole_writer,
)
from dipper.files import locked, safe_name
from dipper.kinds import Context
from dipper.sources import PACKAGED_MODELS, Progress, default_cache_dir, pull

__all__ = [
    "Check",
    "Listed",
    "Request",
    "Summary",
    "check",
    "disagreements",
    "failures",
    "list_experiments",
    "reproduce",
]

Say = Callable[[str], None]

REFRESH = ("stale", "all")
_MODULES = {"pack": "gguf", "train": "peft", "tasks": "lm_eval", "plots": "matplotlib"}  # by which an extra is known


@dataclass(frozen=True, kw_only=True)
class Request:
    """What shall be measured, and how.

    Attributes:
        models: names of `dipper pull` or of published shapes, Hugging Face ids, paths, or NAME=PATH; empty: those that
            each experiment names.
        data: folder of texts and tasks; None: no cell reads any.
        device: cpu or cuda, for the kinds that compute in PyTorch.
        jobs: processes, which share the GPUs unless `device` names one (cuda:1); 1: all is measured in this one, timed
            cells apart.
        ray: address of a cluster, or auto: the one that runs on this machine; None: locally.
        kinds: only these; empty: all.
        timed: only kinds that are timed, or only those that are not; None: both.
        refresh: also what is stale, or all; None: only what is missing.
        retries: how often a cell that failed is tried again.
        quick: only the first cell of every block.
        threads: of a cell; None: the CPUs that this process may use, shared by `jobs`.
        batch: windows at once.
        workdir: bundles and other files that cells share, by model; None: in dipper's cache.
    """

    models: tuple[str, ...] = ()
    data: Path | None = None
    device: str = "cpu"
    jobs: int = 1
    ray: str | None = None
    kinds: tuple[str, ...] = ()
    timed: bool | None = None
    refresh: str | None = None
    retries: int = 1
    quick: bool = False
    threads: int | None = None
    batch: int = 8
    workdir: Path | None = None

    def __post_init__(self) -> None:
        for name in self.kinds:
            if name not in kinds.KINDS:
                raise ConfigError(f"there is no kind '{name}'; {nearest(name, kinds.KINDS)}")
        if self.refresh is not None and self.refresh not in REFRESH:
            raise ConfigError(f"--refresh {self.refresh} is unknown; {nearest(self.refresh, REFRESH)}")
        if self.device.partition(":")[0] not in ("cpu", "cuda"):
            raise ConfigError(f"--device {self.device} is unknown: choose cpu or cuda")
        if self.ray is not None and self.jobs != 1:
            raise ConfigError("--jobs is of processes on this machine, and --ray takes what its cluster has: drop one")
        if self.ray is not None and ":" in self.device:
            raise ConfigError(f"--device {self.device}: Ray gives each cell a GPU of its own, say --device cuda")
        for option, value, least in (("--jobs", self.jobs, 1), ("--retries", self.retries, 0),
                                     ("--threads", self.threads or 1, 1), ("--batch", self.batch, 1)):  # fmt: skip
            if value < least:
                raise ConfigError(f"{option} is {value}: give at least {least}")
        if self.data is not None and not self.data.is_dir():
            raise ConfigError(f"--data {self.data} is no folder: give the one that holds the texts and tasks")

    def cells(self, experiment: Experiment, model: str) -> list[Cell]:
        """What of an experiment this asks for."""
        return [
            cell
            for cell in experiment.cells(model, quick=self.quick)
            if (not self.kinds or cell.kind in self.kinds) and self.timed in (None, kinds.KINDS[cell.kind].timed)
        ]

    def threads_of(self, timed: bool) -> int:
        """Threads of a cell."""
        if self.threads is not None:
            return self.threads
        n_cpus = available_cpus()
        return n_cpus if timed else max(1, n_cpus // self.jobs)


# ------------------------------------------------------------------------------------------------ inputs


def split_model(given: str) -> tuple[str, str]:
    """A model's name and where it is, of NAME=PATH, a path or a name."""
    if given.lower() in PACKAGED_MODELS:  # `dipper pull` takes them in any case: results have one name
        return given.lower(), given.lower()
    name, equals, path = given.partition("=")
    if equals:
        if not name or not path:
            raise ConfigError(f"--model {given}: write NAME=PATH, such as smollm2=model.gguf")
        return name, path
    there = Path(given).expanduser()
    if there.exists():
        return (there.stem if there.is_file() else there.resolve().name), given
    return given, given


def find_model(name: str, source: str, progress: Progress | None = None) -> Model:
    """The model that a name and source of `split_model` mean; fetched where it is not here yet.

    Raises:
        ConfigError: no model is called so; the nearest is named.
        SourceError: it cannot be fetched.
    """
    from dipper import published

    if source in published.names() and not Path(source).exists():
        return Model(name=name, path=source, sha256=None, title=published.title(source))
    packaged = PACKAGED_MODELS.get(source.lower())
    if packaged is None and "/" not in source and not Path(source).expanduser().exists():
        known = [*PACKAGED_MODELS, *published.names()]
        raise ConfigError(f"there is no model '{source}'; {nearest(source, known)}; or give org/name, or NAME=PATH")
    path = pull(source, progress=progress).resolve()
    sha256 = file_sha256(path) if packaged is None else packaged.sha256
    return Model(name=name, path=str(path), sha256=sha256, title=name if packaged is None else packaged.title)


def _check_needs(experiment: Experiment) -> None:
    for extra in experiment.needs:
        if not _is_installed(extra):
            raise ConfigError(f"{experiment.name} needs {extra}, which is not installed: pip install 'dipper[{extra}]'")


def _is_installed(extra: str) -> bool:
    return importlib.util.find_spec(_MODULES.get(extra, extra)) is not None


def _data_of(cells: Sequence[Cell], data: Path | None) -> dict[str, Path]:
    """The files that cells read, by name."""
    names = dict.fromkeys(name for cell in cells for name in kinds.KINDS[cell.kind].needs_data(cell.options))
    return kinds.data_files(data, names)


# ------------------------------------------------------------------------------------------------ running


@dataclass(kw_only=True)
class Summary:
    """What was done for an experiment and a model."""

    experiment: str
    model: str
    path: Path
    wanted: int  # cells asked for
    measured: int = 0
    failed: dict[str, str] = field(default_factory=dict)  # error by cell
    stale: int = 0  # left as they are
    orphaned: int = 0
    seconds: float = 0.0

    @property
    def kept(self) -> int:
        """Cells asked for that have a result which was not measured now."""
        return self.wanted - self.measured - len(self.failed)

    def as_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return {**asdict(self), "path": str(self.path), "kept": self.kept}


@dataclass(kw_only=True)
class _Job:
    """An experiment and a model, and what of it is to be measured."""

    experiment: Experiment
    name: str  # of the model
    source: str
    path: Path  # of the results
    cells: list[Cell]
    todo: list[Cell]
    summary: Summary
    results: Results | None = None

    @property
    def label(self) -> str:
        return f"{self.experiment.name} {self.name}"


class _Work(NamedTuple):
    job: _Job
    task: Task


def reproduce(
    experiments: Sequence[Experiment],
    folder: Path,
    request: Request,
    *,
    say: Say = lambda line: None,
    progress: Progress | None = None,
    trace: bool = False,
) -> list[Summary]:
    """Measures what results lack, and draws the figures anew.

    Args:
        experiments: which.
        folder: of configurations, results and figures.
        request: what of them, and how.
        say: told of every cell that ends, a line at a time.
        progress: of models that are fetched.
        trace: say where an error comes from, too.

    Returns:
        What was done, a summary for each experiment and model. Cells that failed are in there: no exception.

    Raises:
        ConfigError: before anything is measured: a model, data or extra is not there, or a file of results is damaged,
            of another model or data, or being written by another process.
    """
    jobs = _plan(experiments, folder, request)
    with ExitStack() as stack:
        for job in jobs:
            stack.enter_context(sole_writer(job.path))
        jobs = _plan(experiments, folder, request)  # again: before the lock, another process may have added cells
        for job in jobs:
            say(_planned(job))
        work = _prepare(jobs, request, progress)
        for job in jobs:
            _settle(job, request)
        try:
            _run(work, request, say, trace)
        except KeyboardInterrupt:
            measured = sum(job.summary.measured for job in jobs)
            then = "--refresh stale goes on" if request.refresh == "all" else "the same command goes on"
            say(f"interrupted: {measured} of {len(work)} cells were measured and are kept; {then}.")
            raise
    _draw(folder, say)
    return [job.summary for job in jobs]


def _plan(experiments: Sequence[Experiment], folder: Path, request: Request) -> list[_Job]:
    """Everything that was asked for, with what of it there is already."""
    jobs = []
    for experiment in experiments:
        for name, source in map(split_model, request.models or experiment.models):
            every, cells = experiment.cells(name), request.cells(experiment, name)
            path = results_path(folder, experiment.name, name)
            summary = Summary(experiment=experiment.name, model=name, path=path, wanted=len(cells))
            todo = cells
            if path.exists():
                held = Results.of(path, experiment, name)
                states = {cell.key: held.state(cell) for cell in cells}
                redone = {None: ("missing",), "stale": ("missing", "stale"), "all": ("missing", "stale", "done")}
                todo = [cell for cell in cells if states[cell.key] in redone[request.refresh]]
                summary.stale = 0 if request.refresh else sum(state == "stale" for state in states.values())
                summary.orphaned = len(held.orphans(every))
            jobs.append(
                _Job(
                    experiment=experiment, name=name, source=source, path=path, cells=cells, todo=todo, summary=summary
                )
            )
    if not any(job.cells for job in jobs):
        asked = ", ".join(job.label for job in jobs) or "nothing"
        raise ConfigError(f"no cell is of this model and of these kinds ({asked}): see `dipper reproduce --list`")
    if len({job.path for job in jobs}) < len(jobs):
        raise ConfigError(
            "an experiment or model is named twice: give each once, models names of their own (NAME=PATH)"
        )
    return [job for job in jobs if job.cells]


def _planned(job: _Job) -> str:
    there = len(job.cells) - len(job.todo)
    told = f"{job.label}: {len(job.todo)} of {len(job.cells)} cells to measure"
    if job.summary.stale:
        told += f"; {job.summary.stale} of the {there} that are there are stale (--refresh stale measures them again)"
    if job.summary.orphaned:
        told += f"; {job.summary.orphaned} are no longer in the configuration (--refresh drops them)"
    return told


def _prepare(jobs: Sequence[_Job], request: Request, progress: Progress | None) -> list[_Work]:
    """What is to be measured as tasks; the models and data that it takes are found, and fit the results there are."""
    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    models: dict[tuple[str, str], Model] = {}
    work = []
    for job in jobs:
        if not job.todo:
            continue
        if request.ray is None and not request.kinds:  # elsewhere, or for some kinds, less may be needed
            _check_needs(job.experiment)
        at = (job.name, job.source)
        if at not in models:
            models[at] = find_model(*at, progress)
        model = models[at]
        job.results = Results.open(job.path, job.experiment, model)
        files = _data_of(job.todo, request.data)
        sums = {name: input_sha256(str(path.resolve())) for name, path in files.items()}
        job.results.note_data(sums)
        work += [_Work(job, _task(cell, model, sums, request, started)) for cell in job.todo]
    return sorted(work, key=lambda item: kinds.KINDS[item.task.cell.kind].timed)  # stable: by experiment and model


def _task(cell: Cell, model: Model, sums: Mapping[str, str], request: Request, started: str) -> Task:
    kind = kinds.KINDS[cell.kind]
    inputs = {}
    if request.ray is not None and not kind.timed:  # another machine may have other files
        inputs = {str(path.resolve()): sums[name] for name, path in _data_of([cell], request.data).items()}
        if model.sha256 is not None:
            inputs[model.path] = model.sha256
    own = safe_name(model.name) if model.sha256 is None else f"{safe_name(model.name)}-{model.sha256[:12]}"
    context = Context(
        model=model.path, name=model.name, data=None if request.data is None else request.data.resolve(),
        device=request.device if kind.gpu else "cpu", workdir=(_workdir(request) / own).resolve(),
        threads=request.threads_of(kind.timed), batch=request.batch,
    )  # fmt: skip
    return Task(
        cell=cell, measure=kind.measure, sources=cell.sources, code=code_sha256(cell.sources), context=context,
        inputs=inputs, wants_gpu=kind.gpu and request.device.startswith("cuda"), started=started,
    )  # fmt: skip


def _workdir(request: Request) -> Path:
    """Where what cells share is kept."""
    return request.workdir or default_cache_dir() / "reproduce"


def _settle(job: _Job, request: Request) -> None:
    """Drops what the configuration no longer has, where that is asked for."""
    if request.refresh is None or not job.summary.orphaned:
        return
    results = job.results or Results.read(job.path)
    results.drop(results.orphans(job.experiment.cells(job.name)))
    job.summary.orphaned = 0


def _run(work: Sequence[_Work], request: Request, say: Say, trace: bool) -> None:
    """Measures, and tries what failed again after the rest."""
    timed = [item for item in work if kinds.KINDS[item.task.cell.kind].timed]
    others = [item for item in work if not kinds.KINDS[item.task.cell.kind].timed]
    n_done = 0
    for group, is_timed in ((others, False), (timed, True)):
        for attempt in range(1 + request.retries):
            again = []
            with closing(_execute([item.task for item in group], request, is_timed)) as done:
                for number, outcome in done:
                    item = group[number]
                    last = outcome.error is None or outcome.final or attempt == request.retries
                    n_done += last
                    if not last:
                        again.append(item)
                    _keep(item, outcome, last)
                    if trace and outcome.trace:
                        say(outcome.trace.rstrip())
                    end = f"{outcome.seconds:.1f} s" if outcome.error is None else f"failed: {outcome.error}"
                    later = "" if last else "; it is tried again after the others"
                    say(f"[{n_done}/{len(work)}] {item.job.label}: {item.task.cell}: {end}{later}")
            group = again


def _execute(tasks: Sequence[Task], request: Request, timed: bool) -> Done:
    if timed:
        return run_processes(tasks, jobs=1)
    if request.ray is not None and tasks:
        return run_ray(tasks, request.ray)
    return run_serial(tasks) if request.jobs == 1 else run_processes(tasks, request.jobs)


def _keep(item: _Work, outcome: Outcome, last: bool) -> None:
    """Writes a result down, or the error of what failed for the last time."""
    summary, task = item.job.summary, item.task
    if outcome.result is not None:
        assert item.job.results is not None
        item.job.results.add(task.cell, outcome.result, outcome.seconds, outcome.provenance, task.code)
        summary.measured += 1
        summary.seconds += outcome.seconds
    elif last:
        summary.failed[str(task.cell)] = outcome.error or ""
        summary.stale += item.job.results is not None and item.job.results.state(task.cell) == "stale"


def _draw(folder: Path, say: Say) -> None:
    """The figures of all results. What was measured is kept whether they can be drawn or not.

    One process at a time: the last one that draws has read what all before it wrote.
    """
    from dipper import drawings

    try:
        with locked(folder / "results" / ".figures.lock"):
            drawings.draw_all(folder)
    except DipperError as error:
        say(f"the figures were not drawn anew: {error}")


def failures(summaries: Sequence[Summary]) -> str | None:
    """What failed for the last time, in one line; None: nothing."""
    failed = [
        f"{one.experiment} {one.model}: {cell}: {error}" for one in summaries for cell, error in one.failed.items()
    ]
    n_tried = sum(one.measured + len(one.failed) for one in summaries)
    return _counted(failed, f"of {n_tried} cells failed; the others are kept, and the same command tries again")


def _counted(wrong: Sequence[str], what: str) -> str | None:
    if not wrong:
        return None
    more = f"; and {len(wrong) - 3} more, above" if len(wrong) > 3 else ""
    return f"{len(wrong)} {what}: {'; '.join(wrong[:3])}{more}"


# ------------------------------------------------------------------------------------------------ checking


@dataclass(kw_only=True)
class Check:
    """What was found when an experiment's results of a model were measured once more."""

    experiment: str
    model: str
    checked: int = 0
    missing: int = 0  # not checked: there is no result
    differences: dict[str, list[str]] = field(default_factory=dict)  # by cell
    failed: dict[str, str] = field(default_factory=dict)  # errors by cell

    def as_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return asdict(self)


def check(
    experiments: Sequence[Experiment],
    folder: Path,
    request: Request,
    *,
    say: Say = lambda line: None,
    progress: Progress | None = None,
) -> list[Check]:
    """Measures what has a result once more, and compares; writes nothing into the folder.

    Nothing that an earlier run kept is used again: bundles are packed and adapters are trained anew, in a folder of its
    own below the work folder.

    Args:
        experiments, folder, request, say, progress: as of `reproduce`; `refresh` and `retries` have no part in it.

    Raises:
        ConfigError: as of `reproduce`, or nothing of it has a result.
    """
    jobs = _plan(experiments, folder, request)
    checks = {job.label: Check(experiment=job.experiment.name, model=job.name) for job in jobs}
    for job in jobs:
        held = Results.read(job.path) if job.path.exists() else None
        job.todo = [cell for cell in job.cells if held is not None and held.cell(cell) is not None]
        checks[job.label].missing = len(job.cells) - len(job.todo)
    if not any(job.todo for job in jobs):
        raise ConfigError("nothing of this has a result to check: measure it first, without --check")
    workdir = _workdir(request)
    workdir.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix="check-", dir=workdir) as own:
        work = _prepare(jobs, replace(request, workdir=Path(own)), progress)
        n_done = 0
        for is_timed in (False, True):
            group = [item for item in work if kinds.KINDS[item.task.cell.kind].timed == is_timed]
            with closing(_execute([item.task for item in group], request, is_timed)) as done:
                for number, outcome in done:
                    n_done += 1
                    job, cell = group[number].job, group[number].task.cell
                    one = checks[job.label]
                    one.checked += 1
                    if outcome.error is not None:
                        one.failed[str(cell)] = outcome.error
                        told = f"failed: {outcome.error}"
                    else:
                        found = _compared(job, cell, outcome)
                        told = "; ".join(found) or "the same"
                        if found:
                            one.differences[str(cell)] = found
                    say(f"[{n_done}/{len(work)}] {job.label}: {cell}: {told}")
    return list(checks.values())


def disagreements(checks: Sequence[Check]) -> str | None:
    """What did not come out the same, or not at all, in one line; None: nothing."""
    n = sum(one.checked for one in checks)
    wrong, failed = (
        [f"{one.experiment} {one.model}: {cell}: {told}" for one in checks for cell, told in part(one)]
        for part in (
            lambda one: ((cell, found[0]) for cell, found in one.differences.items()),
            lambda one: one.failed.items(),
        )
    )
    parts = _counted(wrong, f"of {n} cells came out otherwise"), _counted(failed, f"of {n} cells could not be measured")
    return "; ".join(part for part in parts if part is not None) or None


def _compared(job: _Job, cell: Cell, outcome: Outcome) -> list[str]:
    assert job.results is not None
    held = job.results.cell(cell)
    assert held is not None
    kind = kinds.KINDS[cell.kind]
    found = differences(held["result"], outcome.result, kind.varies, kind.within)
    devices = [
        run.get("gpu") or run.get("cpu") for run in (job.results.content["runs"][held["run"]], outcome.provenance)
    ]
    if found and devices[0] != devices[1]:
        found.append(f"measured on {devices[0]}, checked on {devices[1]}")
    return found


# ------------------------------------------------------------------------------------------------ listing


@dataclass(frozen=True, kw_only=True)
class Listed:
    """An experiment, and for each model how much of it there is."""

    experiment: Experiment
    models: dict[str, dict[str, int]]  # n, done, stale, missing, orphaned; by model
    lacking: tuple[str, ...]  # extras that are not installed

    def as_dict(self) -> dict[str, Any]:
        """As JSON types."""
        e = self.experiment
        about = {"name": e.name, "title": e.title, "published": e.published, "minutes": e.minutes, "on": e.on}
        return {**about, "needs": list(e.needs), "lacking": list(self.lacking), "models": self.models}


def list_experiments(folder: Path, names: Sequence[str] = ()) -> list[Listed]:
    """What there is in a folder, by its files alone: models and data are not looked at.

    Args:
        folder: of experiments.
        names: only these; empty: all.

    Raises:
        ConfigError: there is nothing, or nothing of a name, or a file of it is damaged.
    """
    listed = []
    for experiment in [find(folder, name) for name in names] or load_all(folder):
        paths = {name: results_path(folder, experiment.name, name) for name in experiment.models}
        for results in read_all(folder, experiment):
            paths[results.content["model"]["name"]] = results.path
        models = {name: _counts(experiment, name, path) for name, path in paths.items()}
        lacking = tuple(extra for extra in experiment.needs if not _is_installed(extra))
        listed.append(Listed(experiment=experiment, models=models, lacking=lacking))
    return listed


def _counts(experiment: Experiment, model: str, path: Path) -> dict[str, int]:
    cells = experiment.cells(model)
    held = Results.of(path, experiment, model) if path.exists() else None
    states = ["missing" if held is None else held.state(cell) for cell in cells]
    counts = {state: states.count(state) for state in ("done", "stale", "missing")}
    return {"n": len(cells), **counts, "orphaned": 0 if held is None else len(held.orphans(cells))}
