"""Kinds that score a pruning rule on real weights, in PyTorch: perplexity, and tasks with a right answer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dipper import tasks
from dipper.errors import ConfigError
from dipper.kinds.kind import Context, Kind, Options, Result

if TYPE_CHECKING:
    import torch

    from dipper.calibration import Calibration
    from dipper.evaluate_torch import Opened
    from dipper.methods import MethodConfig
    from dipper.torch_model import LoadedModel

__all__ = ["CALIBRATION_TEXT", "PERPLEXITY", "TASKS", "fit_result", "load", "method_of", "task_files"]

CALIBRATION_TEXT = "text/c4_train_docs_a.jsonl"
TEST_TEXT = "wikitext-2-raw/wiki.test.raw"


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
def load(model: str, device: str, threads: int) -> tuple[LoadedModel, int]:
    """A model, its tokenised texts kept, and the bytes of its dense MLP."""
    from dataclasses import replace

    import torch

    from dipper.evaluate_torch import mlp_bytes
    from dipper.torch_model import load_model

    torch.set_num_threads(threads)
    loaded = load_model(Path(model) if Path(model).exists() else model, device=device)
    return replace(loaded, encode=lru_cache(maxsize=8)(loaded.encode)), mlp_bytes(model, loaded.model)


@lru_cache(maxsize=1)
def _dense_states(model: str, device: str, threads: int) -> dict[bytes, torch.Tensor]:
    """`Opened.dense_states` of a model, which all its cells share: half of what they compute is the same."""
    return {}


@lru_cache(maxsize=2)
def _shown(model: str, device: str, threads: int, text: Path, n_windows: int) -> list[torch.Tensor]:
    """Windows of calibration text on the model's device."""
    from dipper.evaluate import read_text
    from dipper.evaluate_torch import calibration_windows

    return calibration_windows(load(model, device, threads)[0], read_text(text).text, n_windows)


@lru_cache(maxsize=4)
def _fit(model: str, device: str, threads: int, text: Path, n_windows: int, density: float) -> Calibration:
    """DIP's split, densities by layer, norms and means for a density, as `dipper calibrate` finds them."""
    from dipper.calibrate import calibrate

    loaded = load(model, device, threads)[0]
    shown = _shown(model, device, threads, text, n_windows)
    return calibrate(loaded.model, shown, model_fields=loaded.calibration_fields(), densities=[density])


@contextmanager
def _opened(options: Options, context: Context) -> Iterator[tuple[Opened, Calibration | None]]:
    """The model under a cell's rule, and the calibration that was fitted to it, if the cell asks for one."""
    from dipper.evaluate_torch import Opened
    from dipper.methods import METHODS
    from dipper.sparsify import sparsify_
    from dipper.split_weights import Splits

    config = method_of(options)
    at = (context.model, context.device, context.threads)
    loaded, size = load(*at)
    shown, fitted = None, None
    if "fit" in options or METHODS[config.name].needs_data(config):
        text, n_windows = context.file(CALIBRATION_TEXT), options.get("calibration_windows", 16)
        shown = _shown(*at, text, n_windows)
        if "fit" in options:
            fitted = _fit(*at, text, n_windows, options["fit"])
    splits = Splits(loaded.codes) if config.name == "planes" else None
    with sparsify_(loaded.model, config, calibration=shown, fitted=fitted, splits=splits) as sparse:
        states = _dense_states(*at)
        yield Opened(loaded, sparse, source=context.model, mlp_bytes=size, dense_states=states), fitted


def _perplexity(options: Options, context: Context) -> Result:
    """Perplexity of a rule over a text: an `EvalRecord` without provenance; of a fitted DIP, `fit` says what it is."""
    from dataclasses import replace

    from dipper.evaluate_torch import evaluate_torch

    name = options.get("text", TEST_TEXT)
    with _opened(options, context) as (opened, fitted):
        record = evaluate_torch(
            opened,
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
    from dipper.evaluate_torch import answer_tasks

    with _opened(options, context) as (opened, _):
        answers = answer_tasks(
            opened,
            options["tasks"],
            context.file("eval"),
            batch=4 * context.batch,  # short sequences
            limit=options.get("limit"),
            seed=options.get("seed"),
            shots=options.get("shots", 0),
        )
    kept = ("engine", "model", "device", "dtype", "method", "density", "d_in", "d_glu", "gamma", "cache", "options")
    by_task = {name: {k: v for k, v in found.items() if k != "seconds"} for name, found in answers["tasks"].items()}
    return {**{key: answers[key] for key in kept}, "mlp_bytes": opened.mlp_bytes, "tasks": by_task}


def task_files(names: Iterable[str]) -> tuple[str, ...]:
    """The files of tasks, in the data folder."""
    return tuple(f"eval/{file}" for name in names for file in tasks.task_files(name))


def _tasks_data(options: Mapping[str, Any]) -> tuple[str, ...]:
    return (*task_files(options["tasks"]), CALIBRATION_TEXT)


PERPLEXITY = Kind(
    name="perplexity",
    measure=_perplexity,
    required=frozenset(("method",)),
    options=frozenset(("method", "density", "above", "fit", "text", "tokens", "window", "kl", "calibration_windows")),
    sources=("kinds/evaluated",),
    gpu=True,
    needs_data=_perplexity_data,
    varies=("seconds", "peak_rss_bytes", "n_threads", "device"),
)
TASKS = Kind(
    name="tasks",
    measure=_tasks,
    required=frozenset(("method", "tasks")),
    options=frozenset(("method", "density", "tasks", "limit", "seed", "shots", "calibration_windows")),
    sources=("kinds/evaluated",),
    gpu=True,
    needs_data=_tasks_data,
    varies=("device",),
)
