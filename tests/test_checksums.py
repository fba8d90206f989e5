"""Checksums: what changes them, and what does not."""

from __future__ import annotations

import pytest

from dipper import checksums
from dipper.checksums import code_sha256, file_sha256, modules_of
from dipper.errors import ConfigError


def test_only_what_runs_counts():
    base = "def f(x):\n    return x + 1\n"
    same = '"""About."""\n\n# why\n\ndef f(x):  # what\n    """Adds\n    one."""\n    return x + 1   \n'
    assert checksums._what_runs(same) == checksums._what_runs(base)
    assert checksums._what_runs(base.replace("1", "2")) != checksums._what_runs(base)
    assert checksums._what_runs("s = '# no comment'") == ["s = '# no comment'"]


def test_a_folder_has_a_checksum(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"w")
    first = file_sha256(tmp_path)
    (tmp_path / "notes.txt").write_text("not of the model")
    assert file_sha256(tmp_path) == first
    (tmp_path / "model.safetensors").write_bytes(b"v")
    assert file_sha256(tmp_path) != first


def test_the_code_of_dipper():
    assert code_sha256(("errors",)) == code_sha256(("errors",)) != code_sha256(("errors", "files"))
    assert len(code_sha256(("devices/paper-phone.toml",))) == 64
    assert len(modules_of(["devices/*.toml"])) > 5
    with pytest.raises(ConfigError, match="nothing is no module or file of dipper"):
        code_sha256(("nothing",))


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package in the place of dipper; gives a function that writes a file of it."""
    root = tmp_path / "src" / "dipper"
    monkeypatch.setattr(checksums, "_ROOT", root)

    def write(name, text):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    return write


def names(sources):
    return [path.name for path in modules_of(sources)]


IMPORTS = """
import numpy
import dipper.plain
from dipper import by_name, __version__
from dipper.errors import DipperError
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from dipper.types_alone import T
def late():
    from .relative import x
    from . import _native
"""


def test_imports_are_followed_wherever_they_are(package):
    package("start.py", IMPORTS)
    package("plain.py", "from dipper.start import late\nfrom dipper.inner.deep import z")
    for name in ("by_name", "errors", "types_alone", "relative", "never"):
        package(f"{name}.py", "x = 1")
    package("inner/deep.py", "from ..above import y\nfrom .beside import w")
    package("inner/beside.py", "w = 1")
    package("above.py", "y = 1")
    expected = ["above.py", "by_name.py", "beside.py", "deep.py", "plain.py", "relative.py", "start.py"]
    assert names(["start"]) == expected
    first = code_sha256(["start"])
    for quiet in ("never", "errors", "types_alone"):
        package(f"{quiet}.py", "x = 12345")
        assert code_sha256(["start"]) == first
    package("inner/beside.py", "w = 23456")
    assert code_sha256(["start"]) != first


def test_a_script_imports_what_is_beside_it(package):
    package("../../benchmarks/bench_it.py", "import json\nfrom helper import run\nfrom dipper.plain import x")
    package("../../benchmarks/helper.py", "run = 1")
    package("plain.py", "import helper")
    package("helper.py", "here = 'of a library'")
    assert names(["../../benchmarks/bench_it"]) == ["bench_it.py", "helper.py", "plain.py"]
    assert {path.parent.name for path in modules_of(["../../benchmarks/bench_it"])} == {"benchmarks", "dipper"}
