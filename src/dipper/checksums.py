"""What a result rests on, as checksums: the weights and data it was measured on, and the code that measured it.

file_sha256("model.gguf")
code_sha256(["kinds/simulated", "devices/*.toml"])  # with all that the module imports
"""

from __future__ import annotations

import ast
import hashlib
import io
import os
import tokenize
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

from dipper import _core
from dipper.errors import ConfigError

__all__ = ["code_sha256", "file_sha256", "modules_of"]

_ROOT = Path(__file__).parent
_CORE = _ROOT / "_core"
# They carry what was measured, or say what went wrong: no figure is theirs.
_CARRIERS = frozenset(f"{name}.py" for name in ("checksums", "errors", "figures", "files", "sources"))


def file_sha256(path: str | os.PathLike[str]) -> str:
    """Of a file, or of a folder's weights, configuration and tokeniser with their names."""
    path = Path(path)
    if path.is_dir():
        files = sorted(f for f in path.iterdir() if f.suffix in (".safetensors", ".json", ".model", ".gguf"))
        lines = "".join(f"{file_sha256(file)}  {file.name}\n" for file in files)
        return hashlib.sha256(lines.encode()).hexdigest()
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def code_sha256(sources: Sequence[str]) -> str:
    """Of modules and those that they import, the native core too; comments, docstrings and blank lines do not count.

    Args:
        sources: paths from dipper's folder: modules without their suffix, data files with it, or patterns of these.

    Raises:
        ConfigError: there is no such module or file.
    """
    digest = hashlib.sha256()
    for path in modules_of(sources):
        content = _core.code_sha256 if path == _CORE else _content_sha256(path, *_state(path))
        digest.update(f"{os.path.relpath(path, _ROOT)}\0{content}\n".encode())
    return digest.hexdigest()


def modules_of(sources: Sequence[str]) -> list[Path]:
    """The files behind `sources`, sorted: with every module of dipper that one imports, wherever in it, itself or
    through others, but for what is imported for its types alone and what carries results without making them. The
    native core is `_core`, wherever it lies.

    Raises:
        ConfigError: as of `code_sha256`.
    """
    found: set[Path] = set()
    todo = [path for name in sources for path in _named(name)]
    while todo:
        path = todo.pop()
        if path in found:
            continue
        found.add(path)
        if path.suffix == ".py":
            todo += _imported(path, *_state(path))
    return sorted(found)


def _named(name: str) -> list[Path]:
    pattern = name if Path(name).suffix else f"{name}.py"
    paths = [Path(os.path.normpath(path)) for path in _ROOT.glob(pattern)]
    if not paths:
        raise ConfigError(f"{name} is no module or file of dipper: a kind's sources are paths in its folder")
    return paths


def _state(path: Path) -> tuple[int, int]:
    """What a file's content is known again by: every cell asks for the same few."""
    stat = path.stat()
    return stat.st_mtime_ns, stat.st_size


@lru_cache(maxsize=256)
def _content_sha256(path: Path, mtime_ns: int, size: int) -> str:
    if path.suffix != ".py":
        return file_sha256(path)
    return hashlib.sha256("\n".join(_what_runs(path.read_text(encoding="utf-8"))).encode()).hexdigest()


@lru_cache(maxsize=256)
def _imported(path: Path, mtime_ns: int, size: int) -> tuple[Path, ...]:
    """The modules of dipper that a module imports; of a script also those beside it."""
    paths = (_module(name, path) for name in _import_names(ast.parse(path.read_text(encoding="utf-8")), path))
    return tuple(module for module in paths if module is not None)


def _module(name: str, importer: Path) -> Path | None:
    """The file of a module by its full name; None: it is a library's, none of Python, or carries results only."""
    first, _, rest = name.partition(".")
    if name == "dipper._core":
        return _CORE
    if first == "dipper":
        path = _ROOT / rest.replace(".", "/")
        path = path / "__init__.py" if rest and path.is_dir() else path.with_suffix(".py")
        return None if path.name in _CARRIERS or not path.is_file() else path
    beside = importer.with_name(f"{first}.py")
    return beside if not importer.is_relative_to(_ROOT) and beside.is_file() else None


def _import_names(node: ast.AST, path: Path) -> Iterator[str]:
    """Full names of what is imported anywhere below a node of a file, modules or things in them."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            continue
        if isinstance(child, ast.ImportFrom):
            package = path.relative_to(_ROOT.parent).parts[: -child.level] if child.level else ()
            module = ".".join([*package, *([child.module] if child.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in child.names)
        elif isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        yield from _import_names(child, path)


def _what_runs(source: str) -> list[str]:
    """Lines of a module without comments, docstrings and blank lines."""
    lines = source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and node.body:
            first = node.body[0]
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                for row in range(first.lineno - 1, first.end_lineno or first.lineno):
                    lines[row] = ""
    return [line.rstrip() for line in lines if line.strip()]
