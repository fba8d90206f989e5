"""What a kind of cell is: a function that measures one, and what that rests on."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dipper.errors import ConfigError, nearest

__all__ = ["Context", "Kind", "Options", "Result", "data_files", "stamp"]

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
        return data_files(self.data, [name])[name]


def data_files(data: Path | None, names: Iterable[str]) -> dict[str, Path]:
    """Files of a data folder by name; a name with a `*` stands for all that it matches.

    Raises:
        ConfigError: no data folder was given, or it lacks one of them.
    """
    found: dict[str, Path] = {}
    for name in names:
        if data is None:
            raise ConfigError(f"{name} is needed: give the folder that has it as --data or in DIPPER_DATA")
        paths = sorted(data.glob(name)) if "*" in name else [path for path in [data / name] if path.exists()]
        if not paths:
            raise ConfigError(f"{data} has no {name}: give the folder that has it as --data or in DIPPER_DATA")
        found.update({name if path == data / name else path.relative_to(data).as_posix(): path for path in paths})
    return found


def stamp(path: str | Path) -> str:
    """A file's or folder's path, size and time of change, for what is kept beside it."""
    stat = Path(path).stat() if Path(path).exists() else None
    return f"{path}" if stat is None else f"{Path(path).resolve()} {stat.st_size} {stat.st_mtime_ns}"


def _no_data(_: Mapping[str, Any]) -> tuple[str, ...]:
    return ()


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One kind of cell.

    Attributes:
        name: in configurations.
        measure: options and context to a result of JSON types.
        options: names that `measure` takes.
        required: those of them that every cell has.
        sources: modules and files of dipper that decide results (`checksums.code_sha256`): a change of one, or of a
            module that one imports, makes a result stale. {name} stands for that option of the cell.
        timed: needs the machine for itself.
        gpu: computes on `Context.device`.
        needs_data: files under `Context.data` that a cell with these options reads, as of `data_files`.
        varies: dotted names inside a result that a rerun may change, with all that lies below them.
        within: of these, numbers that must still agree within their error bars (`differences`).
    """

    name: str
    measure: Callable[[Options, Context], Result]
    options: frozenset[str]
    required: frozenset[str] = frozenset()
    sources: tuple[str, ...]
    timed: bool = False
    gpu: bool = False
    needs_data: Callable[[Mapping[str, Any]], tuple[str, ...]] = _no_data
    varies: tuple[str, ...] = ()
    within: tuple[str, ...] = ()

    def check(self, options: Collection[str]) -> None:
        """ConfigError for the first option that this kind does not have, the nearest named, or that a cell lacks."""
        for name in options:
            if name not in self.options:
                raise ConfigError(f"a cell of kind {self.name} has no option '{name}'; {nearest(name, self.options)}")
        for name in sorted(self.required.difference(options)):
            raise ConfigError(f"a cell of kind {self.name} lacks '{name}': see the other configurations for it")

    def sources_of(self, options: Mapping[str, Any]) -> tuple[str, ...]:
        """`sources` of a cell with these options."""
        return tuple(name.format_map(options) for name in self.sources)
