"""An experiment: a file that says what to measure, and a file for each model with what was measured.

    experiment = Experiment.load("experiments/configs/density.toml")
    results = Results.read(results_path("experiments", experiment.name, "smollm2"))
    for cell in experiment.cells("smollm2"):
        results.state(cell)                                  # done, stale or missing
    results.rows("perplexity", density=0.7)                  # [{"options": {...}, "result": {...}}, ...]

A configuration lists blocks of cells; a cell is a kind of measurement (`dipper.kinds`) and its options, and is known by
them. A result holds for the code that it was measured with: a cell whose kind's sources have changed since is *stale*.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import tomli

from dipper import kinds
from dipper.checksums import code_sha256
from dipper.errors import ConfigError, nearest
from dipper.files import safe_name, write_json

__all__ = [
    "Cell",
    "Experiment",
    "Model",
    "Results",
    "find",
    "is_results",
    "load_all",
    "read_all",
    "results_path",
    "sole_writer",
]

SCHEMA = "dipper-experiment/1"
State = Literal["done", "stale", "missing"]


def results_path(folder: str | os.PathLike[str], experiment: str, model: str) -> Path:
    """Where results are kept in a folder of experiments."""
    return Path(folder) / "results" / f"{experiment}-{safe_name(model)}.json"


# ------------------------------------------------------------------------------------------------ what to measure


@dataclass(frozen=True)
class Cell:
    """One measurement."""

    kind: str
    options: dict[str, Any]

    @property
    def key(self) -> str:
        """What a cell is known by: canonical JSON of its kind and options."""
        return json.dumps({**self.options, "kind": self.kind}, sort_keys=True, ensure_ascii=False, allow_nan=False)

    @property
    def sources(self) -> tuple[str, ...]:
        """The code that it rests on (`checksums.code_sha256`)."""
        return kinds.KINDS[self.kind].sources_of(self.options)

    def __str__(self) -> str:
        told = (f"{name} {_short(value)}" for name, value in self.options.items())
        return " ".join([self.kind, *told])


def _short(value: Any) -> str:
    if isinstance(value, Mapping):
        return " ".join(str(v) if k == "name" else f"{k} {_short(v)}" for k, v in value.items())
    return ",".join(map(_short, value)) if isinstance(value, list) else str(value)


@dataclass(frozen=True)
class _Block:
    """Cells that differ in some options, for these `models` alone (empty: all), and not for those `excepted`."""

    cells: tuple[Cell, ...]
    models: tuple[str, ...]
    excepted: tuple[str, ...]

    def is_for(self, model: str) -> bool:
        return model not in self.excepted and (not self.models or model in self.models)


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A configuration file.

    Attributes:
        name: of the file.
        title: in one line.
        published: which tables and figures of the paper it answers to.
        caption: what of it is real, simulated or generated.
        models: measured unless others are asked for.
        minutes: about, for a model, on the machine that `on` says.
        needs: extras of dipper.
        view: the function of `drawings` that shows it.
        blocks: of cells, in the order of the file.
    """

    name: str
    title: str
    published: str
    caption: str
    models: tuple[str, ...]
    minutes: float
    on: str
    needs: tuple[str, ...]
    view: str
    blocks: tuple[_Block, ...] = field(repr=False)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Experiment:
        """Reads a configuration.

        Raises:
            ConfigError: no such file, no TOML, a key, kind or option that does not exist (the nearest is named), or
                two equal cells.
        """
        path = Path(path)
        try:
            return cls._of(path.stem, _toml(path))
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None

    @classmethod
    def _of(cls, name: str, given: Mapping[str, Any]) -> Experiment:
        required = {"title": str, "models": list, "cells": list}
        optional = {"published": str, "caption": str, "minutes": (int, float), "on": str, "needs": list, "view": str}
        _check_table(given, required, optional, "an experiment")
        experiment = cls(
            name=name,
            title=given["title"],
            published=given.get("published", ""),
            caption=given.get("caption", "").strip(),
            models=_words(given, "models"),
            minutes=float(given.get("minutes", 0)),
            on=given.get("on", ""),
            needs=_words(given, "needs"),
            view=given.get("view", name),
            blocks=tuple(_block(block) for block in given["cells"]),
        )
        named = {model for block in experiment.blocks for model in (*block.models, *block.excepted)}
        for model in ("", *experiment.models, *named):  # "": any other
            keys = [cell.key for cell in experiment.cells(model)]
            twice = [key for key in dict.fromkeys(keys) if keys.count(key) > 1]
            if twice:
                raise ConfigError(f"the cell {twice[0]} is there twice: drop one of them")
        return experiment

    def cells(self, model: str, *, quick: bool = False) -> list[Cell]:
        """What is measured of a model, in the order of the file; with `quick` the first cell of every block."""
        blocks = [block for block in self.blocks if block.is_for(model)]
        return [cell for block in blocks for cell in (block.cells[:1] if quick else block.cells)]


def _toml(path: Path) -> dict[str, Any]:
    try:
        return tomli.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"it cannot be read ({error.strerror})") from None
    except (tomli.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"it is no TOML ({error})") from None


def _check_table(given: Mapping[str, Any], required: Mapping[str, Any], optional: Mapping[str, Any], of: str) -> None:
    known = {**required, **optional}
    for key in given:
        if key not in known:
            raise ConfigError(f"{of} has no '{key}'; {nearest(key, known)}")
    for key, kind in known.items():
        if key not in given and key in required:
            raise ConfigError(f"{of} needs '{key}', which is not there")
        if key in given and (not isinstance(given[key], kind) or isinstance(given[key], bool)):
            raise ConfigError(f"'{key}' is {given[key]!r}: see the other configurations for how it is written")


def _words(given: Mapping[str, Any], key: str) -> tuple[str, ...]:
    words = given.get(key, [])
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise ConfigError(f"'{key}' is {words!r}: give a list of names")
    return tuple(words)


def _block(given: Any) -> _Block:
    if not isinstance(given, dict):
        raise ConfigError(f"'cells' holds {given!r}: write blocks, [[cells]]")
    if not isinstance(given.get("kind"), str):
        raise ConfigError(f"a block of cells needs a kind; known are {', '.join(sorted(kinds.KINDS))}")
    name, each = given["kind"], given.get("each", {})
    if name not in kinds.KINDS:
        raise ConfigError(f"there is no kind '{name}'; {nearest(name, kinds.KINDS)}")
    fixed = {key: value for key, value in given.items() if key not in ("kind", "models", "except", "each")}
    if not isinstance(each, dict):
        raise ConfigError(f"'each' is {each!r}: write a table of lists, [cells.each]")
    for key, values in each.items():
        if not isinstance(values, list) or not values:
            raise ConfigError(f"each.{key} is {values!r}: give a list of its values")
        if key in fixed:
            raise ConfigError(f"a block of {name} has '{key}' once for all cells and once in each: drop one of them")
    kinds.KINDS[name].check([*fixed, *each])
    cells = [Cell(name, {**fixed, **dict(zip(each, combination, strict=True))})
             for combination in itertools.product(*each.values())]  # fmt: skip
    for cell in cells:
        try:
            cell.key  # noqa: B018
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"a block of {name} holds what JSON cannot ({error}): use numbers, texts, lists"
            ) from None
    return _Block(tuple(cells), _words(given, "models"), _words(given, "except"))


def load_all(folder: str | os.PathLike[str]) -> list[Experiment]:
    """All experiments of a folder, by name. A configuration without title and cells is another script's.

    Raises:
        ConfigError: there are none, or one is wrong.
    """
    paths = sorted((Path(folder) / "configs").glob("*.toml"))
    found = [path for path in paths if {"title", "cells"} & set(_named_toml(path))]
    if not found:
        raise ConfigError(f"{Path(folder) / 'configs'} holds no experiment: give the folder as --experiments DIR")
    return [Experiment.load(path) for path in found]


def _named_toml(path: Path) -> dict[str, Any]:
    try:
        return _toml(path)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def find(folder: str | os.PathLike[str], name: str) -> Experiment:
    """One experiment of a folder.

    Raises:
        ConfigError: there is none of that name (the nearest is named), or it is wrong.
    """
    path = Path(folder) / "configs" / f"{name}.toml"
    if not path.is_file() or path.stem != name:
        known = [experiment.name for experiment in load_all(folder)]
        raise ConfigError(f"there is no experiment '{name}'; {nearest(name, known)}")
    return Experiment.load(path)


# ------------------------------------------------------------------------------------------------ what was measured


@dataclass(frozen=True, kw_only=True)
class Model:
    """What is measured.

    Attributes:
        name: what results call it.
        path: of a GGUF file or Hugging Face folder, or the name of a published shape.
        sha256: of the file or folder; None: a shape has no weights.
        title: for people.
    """

    name: str
    path: str
    sha256: str | None
    title: str


def is_results(path: Path) -> bool:
    """Whether a file says that it is an experiment's results, damaged or not."""
    return f'"{SCHEMA}"' in path.read_text(encoding="utf-8", errors="replace")[:200]


class Results:
    """A file of results: `content` is its JSON, whole after every `add`.

    `read` shows a file as it is, `of` without what the configuration no longer has; `open` is for writing to it, its
    cells in the order of the configuration.
    """

    def __init__(self, path: Path, content: dict[str, Any], cells: Sequence[Cell] | None = None) -> None:
        self.path = path
        self.content = content
        self._order = None if cells is None else {cell.key: i for i, cell in enumerate(cells)}
        self._by_key = {Cell(held["kind"], held["options"]).key: held for held in content["cells"]}

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Results:
        """A file that is there.

        Raises:
            ConfigError: it is not, or it is damaged or no result of an experiment.
        """
        path = Path(path)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            _check_content(content)
            return cls(path, content)
        except OSError as error:
            raise ConfigError(f"{path} cannot be read ({error.strerror})") from None
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"{path} is damaged or no result of `dipper reproduce` ({type(error).__name__}: {error}): move it away"
            ) from None

    @classmethod
    def of(cls, path: str | os.PathLike[str], experiment: Experiment, model: str) -> Results:
        """A file that is there and has the results of an experiment and of the model of this name, to be read.

        Raises:
            ConfigError: as of `read`, or it is of something else.
        """
        found = cls.read(path)
        held = found.content["experiment"], found.content["model"]["name"]
        if held != (experiment.name, model):
            raise ConfigError(f"{path} is of {held[0]} of {held[1]}, not of {experiment.name} of {model}: move it away")
        return cls(found.path, found.content, experiment.cells(model))

    @classmethod
    def open(cls, path: str | os.PathLike[str], experiment: Experiment, model: Model) -> Results:
        """A file to add cells to, or an empty one, which is written with its first cell.

        Raises:
            ConfigError: what is there is damaged, or of another experiment or model.
        """
        path = Path(path)
        cells = experiment.cells(model.name)
        about = {"name": model.name, "sha256": model.sha256, "title": model.title}
        if not path.exists():
            empty = {
                "schema": SCHEMA,
                "experiment": experiment.name,
                "model": about,
                "data": {},
                "runs": [],
                "cells": [],
            }
            return cls(path, empty, cells)
        held = cls.of(path, experiment, model.name).content
        if held["model"]["sha256"] != model.sha256:
            raise ConfigError(
                f"{path} is of a {model.name} with sha256 {_brief(held['model']['sha256'])}, {model.path} has "
                f"{_brief(model.sha256)}: give it another name, --model NAME={model.path}, or move the file away"
            )
        return cls(path, held, cells)

    def cell(self, cell: Cell | str) -> dict[str, Any] | None:
        """What was measured of a cell, or of its key: kind, options, result, seconds, run, code; None: nothing was."""
        return self._by_key.get(cell if isinstance(cell, str) else cell.key)

    def rows(self, kind: str | None = None, **options: Any) -> list[dict[str, Any]]:
        """Options and results of the cells of a kind that have these options, without orphans where those are known."""
        return [
            {"options": held["options"], "result": held["result"]}
            for key, held in self._by_key.items()
            if kind in (None, held["kind"])
            and (self._order is None or key in self._order)
            and all(name in held["options"] and held["options"][name] == value for name, value in options.items())
        ]

    def state(self, cell: Cell) -> State:
        """Whether a cell was measured, and with what its kind's sources are now."""
        held = self.cell(cell)
        if held is None:
            return "missing"
        return "done" if held["code"] == code_sha256(cell.sources) else "stale"

    def orphans(self, cells: Iterable[Cell]) -> list[Cell]:
        """What was measured and is not among these cells."""
        keys = {cell.key for cell in cells}
        return [Cell(held["kind"], held["options"]) for key, held in self._by_key.items() if key not in keys]

    def note_data(self, files: Mapping[str, str]) -> None:
        """Takes down which data cells read: sha256 by name.

        Raises:
            ConfigError: what is there was measured with other data.
        """
        for name, sha256 in files.items():
            held = self.content["data"].setdefault(name, sha256)
            if held != sha256:
                raise ConfigError(
                    f"{self.path} was measured with a {name} of sha256 {_brief(held)}, --data has {_brief(sha256)}: "
                    "use the same, or move the file away"
                )

    def add(
        self,
        cell: Cell,
        result: Mapping[str, Any],
        seconds: float,
        provenance: Mapping[str, Any],
        code: str | None = None,
    ) -> None:
        """Keeps a measurement, in place of an older one of the same cell, and writes the file.

        Args:
            cell: what was measured.
            result: of JSON types.
            seconds: that it took.
            provenance: what ran it; equal ones are kept once.
            code: of the kind's sources when it ran; None: as they are.
        """
        runs = self.content["runs"]
        if provenance not in runs:
            runs.append(dict(provenance))
        self._by_key[cell.key] = {
            "kind": cell.kind,
            "options": cell.options,
            "result": dict(result),
            "seconds": round(seconds, 3),
            "run": runs.index(provenance),
            "code": code or code_sha256(cell.sources),
        }
        self._write()

    def drop(self, cells: Iterable[Cell]) -> None:
        """Forgets cells, and writes the file."""
        for cell in cells:
            self._by_key.pop(cell.key, None)
        self._write()

    def _write(self) -> None:
        if self._order is not None:
            last = len(self._order)
            order = self._order
            self._by_key = dict(sorted(self._by_key.items(), key=lambda item: order.get(item[0], last)))
        runs, used = self.content["runs"], sorted({held["run"] for held in self._by_key.values()})
        for held in self._by_key.values():
            held["run"] = used.index(held["run"])
        self.content["runs"] = [runs[run] for run in used]
        self.content["cells"] = list(self._by_key.values())
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, self.content)


def _check_content(content: Any) -> None:
    """What is wrong with a file is an exception of any kind."""
    if content["schema"] != SCHEMA:
        raise ValueError(f"schema {content['schema']}")
    if not isinstance(content["experiment"], str) or not isinstance(content["data"], dict):
        raise ValueError("experiment or data")
    _ = content["model"]["name"], content["model"]["sha256"]
    for held in content["cells"]:
        if not isinstance(held["options"], dict) or not isinstance(held["result"], dict):
            raise ValueError("a cell without options or result")
        _ = held["kind"], held["seconds"], held["code"], content["runs"][held["run"]]


def _brief(sha256: str | None) -> str:
    return "none (a shape without weights)" if sha256 is None else f"{sha256[:12]}..."


@contextmanager
def sole_writer(path: Path) -> Iterator[None]:
    """One process at a time writes a file of results.

    Raises:
        ConfigError: another does.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_name(f".{path.name}.lock")
    with lock.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ConfigError(
                f"{path} is being written by another `dipper reproduce` ({file.read().strip() or 'just started'}): "
                "wait until it has ended, or stop it"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()}")
        file.flush()
        yield  # the lock file stays: another process may have it open already


def read_all(folder: str | os.PathLike[str], experiment: Experiment) -> list[Results]:
    """Results of an experiment, of the models that it names and of others.

    Names of other experiments may begin alike, and scripts keep theirs in the same folder: both are passed over.

    Raises:
        ConfigError: a file is damaged, or not what its name says.
    """
    named = {path for model in experiment.models if (path := results_path(folder, experiment.name, model)).exists()}
    alike = {p for p in (Path(folder) / "results").glob(f"{experiment.name}-*.json") if is_results(p)}
    found = [Results.read(path) for path in sorted(named | alike)]
    return [results for results in found if results.content["experiment"] == experiment.name]
