"""What an experiment can measure: each kind of cell by its name, its options, and the function that measures one.

    record = KINDS["perplexity"].measure({"method": {"name": "dip"}, "density": 0.6, "tokens": 8192}, context)

A measurement is a function of its options and a `Context` alone, and gives JSON types. Loaded models stay in the
process, so that cells of one model that follow each other load it once. PyTorch is imported by the kinds that need it.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dipper.errors import ConfigError

__all__ = ["KINDS", "Context", "Kind"]

Options = dict[str, Any]
Result = dict[str, Any]


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
        if self.data is None:
            raise ConfigError(f"{name} is needed: give the folder that has it as --data or in DIPPER_DATA")
        if not (self.data / name).exists():
            raise ConfigError(f"{self.data} has no {name}: give the folder that has it as --data or in DIPPER_DATA")
        return self.data / name


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
        varies: dotted names inside a result that a rerun may change; `*` stands for any name or index.
    """

    name: str
    measure: Callable[[Options, Context], Result]
    options: frozenset[str]
    sources: tuple[str, ...]
    timed: bool = False
    gpu: bool = False
    needs_data: Callable[[Mapping[str, Any]], tuple[str, ...]] = _no_data
    varies: tuple[str, ...] = ()

    def check(self, options: Iterable[str]) -> None:
        """ConfigError for the first option that this kind does not have, with the nearest that it has."""
        for name in options:
            if name not in self.options:
                near = difflib.get_close_matches(name, self.options, n=1)
                hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(sorted(self.options))}"
                raise ConfigError(f"a cell of kind {self.name} has no option '{name}'; {hint}")


KINDS: dict[str, Kind] = {}
