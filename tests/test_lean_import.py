"""What stands in memory beside the model counts against the budget: nothing is imported that a verb does not need."""

import subprocess
import sys

import pytest

HEAVY = ("gguf", "huggingface_hub", "torch", "transformers", "safetensors", "rich")


def modules_after(code):
    """Names in sys.modules after `code` in a fresh interpreter."""
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print(*sys.modules)"], capture_output=True, text=True, check=True
    )
    return set(done.stdout.splitlines()[-1].split())


def cli(*args):
    return f"from dipper.cli import main; code = main({list(args)!r})"


@pytest.mark.parametrize(
    "args",
    [
        ["--help"],
        ["run", "--help"],
        ["bench", "-h"],
        ["reproduce", "-h"],
        ["energies", "-h"],
        ["rnu"],
        ["run", "--no-such"],
    ],
)
def test_help_and_usage_errors_import_no_library(args):
    loaded = modules_after(cli(*args))
    assert "typer" in loaded
    assert not loaded & {*HEAVY, "numpy", "tokenizers", "jinja2", "dipper.engine", "dipper._core"}


@pytest.mark.parametrize(
    "args",
    [
        ["run", "no.dipper", "hello"],
        ["run", "no.dipper", "hello", "--temperature", "1"],
        ["chat", "no.dipper"],
        ["eval", "no.dipper", "--text", "no.txt"],
        ["energies", "no.dipper", "--text", "no.txt", "-o", "e.npz"],
        ["inspect", "no.dipper"],
    ],
)
def test_engine_verbs_import_no_framework(args):
    assert not modules_after(cli(*args)) & set(HEAVY)


def test_the_library_behind_a_run_imports_no_framework():
    code = "import dipper.engine, dipper.tokenizer, dipper.generate, dipper.chat, dipper.evaluate, dipper.tables"
    loaded = modules_after(code)
    assert "dipper._core" in loaded
    assert not loaded & set(HEAVY)


def test_the_package_itself_imports_nothing():
    loaded = modules_after("import dipper")
    assert not loaded & {*HEAVY, "numpy", "typer", "dipper.engine"}
