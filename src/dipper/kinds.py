"""What an experiment can measure: each kind of cell by its name, its options, and the function that measures one.

    record = KINDS["perplexity"].measure({"method": {"name": "dip"}, "density": 0.6, "tokens": 8192}, context)

A measurement is a function of its options and a `Context` alone, and gives JSON types. Loaded models stay in the
process, so that cells of one model that follow each other load it once. PyTorch is imported by the kinds that need it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dipper.errors import BudgetError, ConfigError, DipperError, nearest
from dipper.files import safe_name

if TYPE_CHECKING:
    import torch

    from dipper.bundle import Bundle
    from dipper.calibration import Calibration
    from dipper.device import Device
    from dipper.layout import BaseBits
    from dipper.methods import MethodConfig
    from dipper.torch_model import LoadedModel
    from dipper.workload import Workload

__all__ = ["KINDS", "Context", "Kind", "data_file"]

Options = dict[str, Any]
Result = dict[str, Any]

CALIBRATION_TEXT = "text/c4_train_docs_a.jsonl"
TEST_TEXT = "wikitext-2-raw/wiki.test.raw"


@dataclass(frozen=True, kw_only=True)
class Context:
    """Where and on what cells are measured.

    Attributes:
        model: path of a GGUF file, a bundle or a Hugging Face folder, a name that `dipper pull` knows, or, for kinds
            that need no weights, one of `published.names()`.
        name: what results call it.
        data: folder of texts and tasks; None where no cell reads any.
        device: of PyTorch, for kinds with `gpu`.
        workdir: folder for bundles and other files that later cells use again.
        threads: of this process.
        batch: windows at once.
    """

    model: str
    name: str
    data: Path | None = None
    device: str = "cpu"
    workdir: Path
    threads: int = 1
    batch: int = 8

    def file(self, name: str) -> Path:
        """A file of the data folder.

        Raises:
            ConfigError: no data folder was given, or it lacks the file.
        """
        return data_file(self.data, name)


def data_file(data: Path | None, name: str) -> Path:
    """A file of a data folder.

    Raises:
        ConfigError: as of `Context.file`.
    """
    if data is None:
        raise ConfigError(f"{name} is needed: give the folder that has it as --data or in DIPPER_DATA")
    if not (data / name).exists():
        raise ConfigError(f"{data} has no {name}: give the folder that has it as --data or in DIPPER_DATA")
    return data / name


def _no_data(_: Mapping[str, Any]) -> tuple[str, ...]:
    return ()


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One kind of cell.

    Attributes:
        name: in configurations.
        measure: options and context to a result of JSON types.
        options: names that `measure` takes.
        sources: modules of dipper whose change makes a result stale.
        timed: needs the machine for itself.
        gpu: computes on `Context.device`.
        needs_data: files under `Context.data` that a cell with these options reads.
        varies: dotted names inside a result that a rerun may change, with all that lies below them.
        within: of these, numbers that must still agree within their error bars (`differences`).
    """

    name: str
    measure: Callable[[Options, Context], Result]
    options: frozenset[str]
    sources: tuple[str, ...]
    timed: bool = False
    gpu: bool = False
    needs_data: Callable[[Mapping[str, Any]], tuple[str, ...]] = _no_data
    varies: tuple[str, ...] = ()
    within: tuple[str, ...] = ()

    def check(self, options: Iterable[str]) -> None:
        """ConfigError for the first option that this kind does not have, with the nearest that it has."""
        for name in options:
            if name not in self.options:
                raise ConfigError(f"a cell of kind {self.name} has no option '{name}'; {nearest(name, self.options)}")


# ------------------------------------------------------------------------------------------------ with PyTorch


def method_of(options: Mapping[str, Any]) -> MethodConfig:
    """The pruning rule of a cell.

    Args:
        options: `method`, a table for `MethodConfig`, and beside it `density`, and `above`: DIP's d_in is that much
            above the density, and d_glu such that (2 d_in + d_glu) / 3 is the density.

    Raises:
        ConfigError: no such rule, or it cannot do what is asked.
    """
    from dipper.calibrate import split_of
    from dipper.methods import MethodConfig

    given: dict[str, Any] = options["method"]
    made: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
    density = options.get("density", options.get("fit"))
    if density is not None:
        made["density"] = density
    if "above" in options:
        pair = split_of(density, options["above"])
        if pair is None:
            raise ConfigError(f"d_in cannot be {options['above']:g} above density {density:g}: d_glu leaves (0, 1]")
        made["densities"] = pair
    try:
        return MethodConfig(**made)
    except TypeError as error:
        raise ConfigError(f"method {options['method']}: {error}") from None


@lru_cache(maxsize=1)
def _loaded(model: str, device: str, threads: int) -> tuple[LoadedModel, int]:
    """A model, its tokenised texts kept, and the bytes of its dense MLP."""
    from dataclasses import replace

    import torch

    from dipper.evaluate_torch import mlp_bytes
    from dipper.torch_model import load_model

    torch.set_num_threads(threads)
    loaded = load_model(Path(model) if Path(model).exists() else model, device=device)
    return replace(loaded, encode=lru_cache(maxsize=8)(loaded.encode)), mlp_bytes(model, loaded.model)


@lru_cache(maxsize=2)
def _shown(model: str, device: str, threads: int, text: Path, n_windows: int) -> list[torch.Tensor]:
    """Windows of calibration text on the model's device."""
    from dipper.evaluate import read_text
    from dipper.evaluate_torch import calibration_windows

    return calibration_windows(_loaded(model, device, threads)[0], read_text(text).text, n_windows)


@lru_cache(maxsize=4)
def _fit(model: str, device: str, threads: int, text: Path, n_windows: int, density: float) -> Calibration:
    """DIP's split, densities by layer, norms and means for a density, as `dipper calibrate` finds them."""
    from dipper.calibrate import calibrate

    loaded = _loaded(model, device, threads)[0]
    shown = _shown(model, device, threads, text, n_windows)
    return calibrate(loaded.model, shown, model_fields=loaded.calibration_fields(), densities=[density])


def _perplexity(options: Options, context: Context) -> Result:
    """Perplexity of a rule over a text: an `EvalRecord` without provenance; of a fitted DIP, `fit` says what it is."""
    from dataclasses import replace

    from dipper.evaluate_torch import Opened, evaluate_torch
    from dipper.methods import METHODS
    from dipper.sparsify import sparsify_
    from dipper.split_weights import Splits

    config = method_of(options)
    at = (context.model, context.device, context.threads)
    loaded, size = _loaded(*at)
    name = options.get("text", TEST_TEXT)
    shown, fitted = None, None
    if "fit" in options or METHODS[config.name].needs_data(config):
        text, n_windows = context.file(CALIBRATION_TEXT), options.get("calibration_windows", 16)
        shown = _shown(*at, text, n_windows)
        if "fit" in options:
            fitted = _fit(*at, text, n_windows, options["fit"])
    splits = Splits(loaded.codes) if config.name == "planes" else None
    with sparsify_(loaded.model, config, calibration=shown, fitted=fitted, splits=splits) as sparse:
        record = evaluate_torch(
            Opened(loaded, sparse, source=context.model, mlp_bytes=size),
            context.file(name),
            window=options.get("window", 1024),
            limit=options.get("tokens"),
            batch=context.batch,
            kl=options.get("kl", False),
        )
    result = replace(record, text=name, config={}, provenance=None).as_dict()
    if fitted is not None:
        result["fit"] = fit_result(fitted, options["fit"])
    return result


def fit_result(fitted: Calibration, density: float) -> Result:
    """What a calibration found for a density: densities by layer, losses, and which of norms and means it uses."""
    found = fitted.provenance["fit"]
    return {
        "densities": fitted.densities(density).round(6).tolist(),
        "norms": fitted.factors is not None,
        "means": fitted.means is not None,
        "options": found["options"],
        **found[f"{density:g}"],
    }


def _perplexity_data(options: Mapping[str, Any]) -> tuple[str, ...]:
    return (options.get("text", TEST_TEXT), CALIBRATION_TEXT)


def _tasks(options: Options, context: Context) -> Result:
    """Right answers under a rule: the figures of `tasks.run_tasks` by task."""
    from dipper.evaluate_torch import Opened, answer_tasks
    from dipper.methods import METHODS
    from dipper.sparsify import sparsify_

    config = method_of(options)
    at = (context.model, context.device, context.threads)
    loaded, size = _loaded(*at)
    shown = None
    if METHODS[config.name].needs_data(config):
        shown = _shown(*at, context.file(CALIBRATION_TEXT), options.get("calibration_windows", 16))
    with sparsify_(loaded.model, config, calibration=shown) as sparse:
        answers = answer_tasks(
            Opened(loaded, sparse, source=context.model, mlp_bytes=size),
            options["tasks"],
            context.file("eval"),
            batch=4 * context.batch,  # short sequences
            limit=options.get("limit"),
            seed=options.get("seed"),
            shots=options.get("shots", 0),
        )
    kept = ("engine", "model", "device", "dtype", "method", "density", "d_in", "d_glu", "gamma", "cache", "options")
    by_task = {name: {k: v for k, v in found.items() if k != "seconds"} for name, found in answers["tasks"].items()}
    return {**{key: answers[key] for key in kept}, "mlp_bytes": size, "tasks": by_task}


def _task_files(tasks: Iterable[str]) -> tuple[str, ...]:
    files = {
        "arc_easy": ("arc_easy_test.jsonl",),
        "arc_challenge": ("arc_challenge_test.jsonl",),
        "piqa": ("piqa_valid.jsonl", "piqa_valid-labels.lst"),
        "hellaswag": ("hellaswag_val_first2000.jsonl",),
        "lambada_openai": ("lambada_openai_test.jsonl",),
    }
    return tuple(f"eval/{name}" for task in tasks for name in files.get(task, ()))


def _tasks_data(options: Mapping[str, Any]) -> tuple[str, ...]:
    return (*_task_files(options["tasks"]), CALIBRATION_TEXT)


@lru_cache(maxsize=1)
def _bench(model: str, device: str, threads: int, data: Path, state: Path, config: str) -> Any:
    """A `compensation.Bench` and what it has measured and trained so far; config: JSON of its options."""
    from dipper.compensation import Bench

    state.mkdir(parents=True, exist_ok=True)
    return Bench(_loaded(model, device, threads)[0], data, json.loads(config), source=model, state=state)


def _compensation(options: Options, context: Context) -> Result:
    """The cells of a group, by name."""
    import torch

    from dipper import compensation

    config = {name: value for name, value in options.items() if name != "group"}
    missing = [name for name in compensation.OPTIONS if name not in config]
    if missing:
        raise ConfigError(f"a cell of kind compensation lacks {', '.join(missing)}: see compensation.toml")
    files = [context.file(name) for name in compensation.FILES]
    text = json.dumps(config, sort_keys=True)
    # Adapters serve the cells of other processes; another configuration, model or code has its own.
    sources = [Path(__file__).parent / f"{name}.py" for name in (*_TORCH_SOURCES, "adapter", "distill", "compensation")]
    told = [text, _stamp(context.model), *map(_stamp, sources), context.device.partition(":")[0]]
    state = context.workdir / f"adapters-{context.name}-{sha256(json.dumps(told).encode()).hexdigest()[:12]}"
    earlier = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")  # TF32 where there is some, the same for all that is compared
    try:
        data = files[0].parent.parent
        bench = _bench(context.model, context.device, context.threads, data, state, text)
        return {"cells": json.loads(json.dumps(bench.group(options["group"])))}
    finally:
        torch.set_float32_matmul_precision(earlier)


def _compensation_data(options: Mapping[str, Any]) -> tuple[str, ...]:
    texts = (
        "text/c4_train_docs_a.jsonl", "text/c4_train_docs_b.jsonl", "text/wikipedia_en_sample.txt",
        "wikitext-2-raw/wiki.train.first5k.txt", "wikitext-2-raw/wiki.valid.raw", "wikitext-2-raw/wiki.test.raw",
    )  # fmt: skip
    return (*texts, *(_task_files(options["tasks"]["names"]) if options["group"] == "tasks" else ()))


# ------------------------------------------------------------------------------------------------ simulated


def _simulate(options: Options, context: Context) -> Result:
    """What `Sweep` makes of a device: `records` of every setting, and `skipped`, what no budget holds."""
    from dataclasses import replace

    from dipper.sweep import Sweep, run_sweep

    for name in ("device", "n_prompt", "n_tokens"):
        if name not in options:
            raise ConfigError(f"a cell of kind simulate lacks {name}")
    bundle, workload = _workload(
        context,
        json.dumps({name: options[name] for name in (*_LAID_OUT, *_MASKS) if name in options}, sort_keys=True),
    )
    # This process's own size and this machine's cores are no phone's: they would make results differ by machine.
    swept: dict[str, Any] = {"host": "0", **{name: value for name, value in options.items() if name in _SWEPT}}
    swept = {name: tuple(value) if isinstance(value, list) else value for name, value in swept.items()}
    skipped: list[str] = []
    try:
        records = run_sweep(
            bundle, workload, Sweep(**swept), [_device_of(options)], context=options.get("context"), threads=1,
            on_skip=skipped.append,
        )  # fmt: skip
    except BudgetError:
        if not skipped:
            raise
        records = []  # no budget holds any of it: a result too
    return {"records": [replace(record, provenance=None).as_dict() for record in records], "skipped": skipped}


_SWEPT = (
    "methods", "densities", "d_in", "d_glu", "fetches", "fetch_glu", "whole", "gammas", "caches", "dram", "mlp_dram",
    "capacity", "splits", "cold", "host",
)  # fmt: skip
_LAID_OUT = ("bits", "other_bits", "base_bits", "unit_bytes")
_MASKS = ("n_prompt", "n_tokens", "text", "generated", "variant", "seed")
_DEVICE = ("flash_gbps", "cost_per_read_us", "alignment")


def _device_of(options: Options) -> Device:
    """A profile by name, with what the cell has instead of its figures."""
    import dataclasses

    from dipper.device import Device

    device = Device.load(options["device"])
    names = {"flash_gbps": "gbps", "cost_per_read_us": "cost_per_read_us", "alignment": "alignment"}
    changes: dict[str, Any] = {names[name]: options[name] for name in _DEVICE if name in options}
    if device.flash.table and set(changes) & {"gbps", "cost_per_read_us"}:
        changes["table"] = ()  # measured batches stand for both
    return dataclasses.replace(device, flash=dataclasses.replace(device.flash, **changes))


@lru_cache(maxsize=1)
def _workload(context: Context, options: str) -> tuple[Bundle, Workload]:
    """A model's bundle or shape, and its masks; options: JSON of `_LAID_OUT` and `_MASKS`.

    Of real weights every text but dipper's own is one of the data folder.
    """
    from dipper import published
    from dipper.sweep import open_model, open_workload

    given = json.loads(options)
    laid_out = {name: given.get(name) for name in _LAID_OUT}
    base_bits = laid_out["base_bits"]
    laid_out["base_bits"] = tuple(base_bits) if isinstance(base_bits, list) else base_bits
    masks = {name: given[name] for name in _MASKS if name in given}
    if not Path(context.model).exists() and context.model in published.names():
        if "text" in masks:
            raise ConfigError(f"{context.model} is a shape without weights, which reads no text: leave text out")
        bundle = open_model(context.model, **laid_out)
        return bundle, open_workload(bundle, **masks)
    if "text" in masks:
        masks["text"] = context.file(masks["text"])
    laid_out.pop("other_bits")  # packing has its own rule
    bundle = open_model(str(bundle_of(context, **laid_out)))
    threads = None if masks.get("generated") else context.threads
    return bundle, open_workload(bundle, threads=threads, **masks)


def bundle_of(
    context: Context,
    bits: int | None = None,
    base_bits: BaseBits | None = None,
    unit_bytes: int | None = None,
) -> Path:
    """The model packed into `workdir`, once.

    Args:
        context: whose model: a bundle is taken as it is.
        bits: of the MLP where the source has 16 or 32 bits; a quantised source keeps its own grid.
        base_bits, unit_bytes: as for `bundle.pack`.

    Raises:
        ConfigError: base_bits for a bundle that is packed already.
    """
    from dipper.bundle import UNIT_BYTES, pack
    from dipper.checkpoint import open_checkpoint
    from dipper.files import locked
    from dipper.glu import read_model
    from dipper.sources import pull

    source = Path(context.model) if Path(context.model).exists() else pull(context.model)
    if (source / "bundle.json").is_file():
        if base_bits:
            raise ConfigError(f"{source} is a bundle, which cannot be split again: give the model that it is from")
        return source
    parts = read_model(open_checkpoint(source)).parts.values()
    is_float = all(part.grid.is_float for part in parts if len(part.shape) == 2)
    packed_bits = str(bits or 4) if is_float else "source"
    split = "" if not base_bits else f"-base{base_bits}-unit{unit_bytes or UNIT_BYTES}"
    told = f"{_stamp(str(source))} {packed_bits}{split}"
    context.workdir.mkdir(parents=True, exist_ok=True)
    out = context.workdir / f"{safe_name(context.name)}-{sha256(told.encode()).hexdigest()[:12]}.dipper"
    with locked(out.with_suffix(".lock")):
        if not out.exists():
            pack(source, out, packed_bits, base_bits=base_bits or 0, unit_bytes=unit_bytes or UNIT_BYTES)
    return out


def _stamp(path: str | Path) -> str:
    """A file's or folder's path, size and time of change, for what is kept beside it."""
    stat = Path(path).stat() if Path(path).exists() else None
    return f"{path}" if stat is None else f"{Path(path).resolve()} {stat.st_size} {stat.st_mtime_ns}"


def _simulate_data(options: Mapping[str, Any]) -> tuple[str, ...]:
    return (options["text"],) if "text" in options else ()


# ------------------------------------------------------------------------------------------------ measured here


def _benchmark(options: Options, context: Context) -> Result:
    """The last line of a script of benchmarks/, which is JSON.

    In `arguments` {bundle}, {model}, {data} and {workdir} stand for the model packed, its source, and the folders.
    """
    benchmarks = Path(__file__).resolve().parents[2] / "benchmarks"
    script = benchmarks / f"{options['script'].removesuffix('.py')}.py"
    if not script.is_file():
        raise ConfigError(f"there is no {script}: benchmarks are run from a checkout of dipper")
    arguments = [_filled(argument, context) for argument in options.get("arguments", [])]
    context.workdir.mkdir(parents=True, exist_ok=True)
    done = subprocess.run([sys.executable, str(script), *arguments], stdout=subprocess.PIPE, text=True, check=False)
    last = done.stdout.strip().rpartition("\n")[2]
    try:
        result: Result = json.loads(last)
    except ValueError:
        raise DipperError(
            f"{script.name} ended with status {done.returncode} and without a result; see what it printed"
        ) from None
    result.pop("provenance", None)  # names folders; the run of the cell has the rest
    return result


def _filled(argument: str, context: Context) -> str:
    if "{model}" in argument:
        given = Path(context.model)
        argument = argument.replace("{model}", str(given.resolve()) if given.exists() else context.model)
    if "{bundle}" in argument:
        argument = argument.replace("{bundle}", str(bundle_of(context).resolve()))
    if "{data}" in argument:
        argument = argument.replace("{data}", str(context.file(".").resolve()))
    return argument.replace("{workdir}", str(context.workdir.resolve()))


def _benchmark_data(options: Mapping[str, Any]) -> tuple[str, ...]:
    given = (argument.partition("{data}/") for argument in options.get("arguments", []))
    return tuple(name for _, found, name in given if found)


# ------------------------------------------------------------------------------------------------ registry

# What decides which columns a token uses, what is computed with them, and how it is scored.
_TORCH_SOURCES = (
    "cache", "calibrate", "evaluate", "evaluate_torch", "methods", "requantise", "selector", "sparsify",
    "split_weights", "torch_model",
)  # fmt: skip

KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind(
            name="perplexity",
            measure=_perplexity,
            options=frozenset(
                ("method", "density", "above", "fit", "text", "tokens", "window", "kl", "calibration_windows")
            ),
            sources=_TORCH_SOURCES,
            gpu=True,
            needs_data=_perplexity_data,
            varies=("seconds", "peak_rss_bytes", "n_threads", "device"),
        ),
        Kind(
            name="tasks",
            measure=_tasks,
            options=frozenset(("method", "density", "tasks", "limit", "seed", "shots", "calibration_windows")),
            sources=(*_TORCH_SOURCES, "tasks"),
            gpu=True,
            needs_data=_tasks_data,
            varies=("device",),
        ),
        Kind(
            name="compensation",
            measure=_compensation,
            options=frozenset(
                (
                    "group",
                    "densities",
                    "window",
                    "tokens",
                    "tokens_with_caches",
                    "held_out_windows",
                    "batch_eval",
                    "methods",
                    "train",
                    "search",
                    "caches",
                    "residents",
                    "tasks",
                )
            ),
            sources=(*_TORCH_SOURCES, "adapter", "compensation", "distill", "tasks"),
            gpu=True,
            needs_data=_compensation_data,
            varies=("cells",),  # training sums in another order every time
            within=("cells.*.*.perplexity", "cells.*.*.recovered", "cells.*.tasks.*.acc"),
        ),
        Kind(
            name="simulate",
            measure=_simulate,
            options=frozenset(("device", "context", *_SWEPT, *_LAID_OUT, *_MASKS, *_DEVICE)),
            sources=(
                "budget",
                "bundle",
                "cache",
                "device",
                "engine",
                "generator",
                "generator.npz",
                "grid",
                "layout",
                "packer",
                "published",
                "models.toml",
                "simulator",
                "sweep",
                "workload",
            ),
            needs_data=_simulate_data,
        ),
        Kind(
            name="benchmark",
            measure=_benchmark,
            options=frozenset(("script", "arguments")),
            sources=("bench", "budget", "engine", "profile", "simulator", "workload"),
            timed=True,
            needs_data=_benchmark_data,
            varies=("passed", "results", "summary", "profiles", "seconds"),
            within=("results", "summary", "profiles"),
        ),
    )
}
