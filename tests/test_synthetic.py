"""The benchmarks' random models: what both engines are measured on must be what it claims to be."""

from __future__ import annotations

import hashlib
import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

import tiny
from dipper.bundle import pack
from dipper.checkpoint import open_checkpoint
from dipper.engine import Engine, EngineConfig
from dipper.errors import ConfigError
from dipper.grid import dequantise

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
SIZES: dict[str, int] = {
    "hidden_size": 256,
    "intermediate_size": 416,
    "n_layers": 2,
    "n_heads": 6,
    "n_kv_heads": 2,
    "head_dim": 64,
}


@pytest.fixture(scope="module")
def synthetic() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield importlib.import_module("synthetic")


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF whose tokenizer has 264 pieces."""
    path = tmp_path_factory.mktemp("vocabulary") / "model.gguf"
    return tiny.write_gguf(path, vocabulary=tiny.bpe_keys(), vocab_size=264)


def write(
    synthetic: ModuleType, target: Path, vocabulary: Path, *, sizes: dict[str, int] = SIZES, **options: Any
) -> Path:
    shape = synthetic.Shape(**sizes)
    return synthetic.synthetic_gguf(shape, target, tokenizer_from=vocabulary, **options)


def test_the_file_has_the_shapes_and_grids_asked_for(synthetic: ModuleType, vocabulary: Path, tmp_path: Path) -> None:
    path = write(synthetic, tmp_path / "model.gguf", vocabulary, embedding="Q8_0", head="Q6_K")
    checkpoint = open_checkpoint(path)
    found = {name: (tensor.shape, tensor.type_name) for name, tensor in checkpoint.tensors.items()}
    layer = {
        "attn_norm": ((256,), "F32"),
        "attn_q": ((384, 256), "Q4_0"),
        "attn_k": ((128, 256), "Q4_0"),
        "attn_v": ((128, 256), "Q4_0"),
        "attn_output": ((256, 384), "Q4_0"),
        "ffn_norm": ((256,), "F32"),
        "ffn_gate": ((416, 256), "Q4_0"),
        "ffn_up": ((416, 256), "Q4_0"),
        "ffn_down": ((256, 416), "Q4_0"),
    }
    assert found == {
        "token_embd.weight": ((264, 256), "Q8_0"),
        **{f"blk.{n}.{name}.weight": expected for n in range(2) for name, expected in layer.items()},
        "output_norm.weight": ((256,), "F32"),
        "output.weight": ((264, 256), "Q6_K"),
    }
    for name, tensor in checkpoint.tensors.items():
        weights = dequantise(tensor.grid, tensor.rows(0, tensor.n_rows))
        if name.endswith("norm.weight"):
            assert (weights == 1).all()
        else:
            assert weights.std() == pytest.approx(tensor.n_inputs**-0.5, rel=0.03), name
            assert abs(weights.mean()) < 0.02 * tensor.n_inputs**-0.5, name


def test_the_same_seed_gives_the_same_file(synthetic: ModuleType, vocabulary: Path, tmp_path: Path) -> None:
    digests = [
        hashlib.sha256(write(synthetic, tmp_path / f"{i}.gguf", vocabulary, seed=seed).read_bytes()).hexdigest()
        for i, seed in enumerate((0, 0, 1))
    ]
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize("head", ["Q4_0", "Q8_0", "Q6_K", None])
def test_logits_are_of_order_1(synthetic: ModuleType, vocabulary: Path, tmp_path: Path, head: str | None) -> None:
    embedding = head or "Q4_0"
    path = write(synthetic, tmp_path / "model.gguf", vocabulary, head=head, embedding=embedding)
    bundle = pack(path, tmp_path / "model.dipper")
    engine = Engine.open(bundle, EngineConfig(method="dense-resident", context=64))
    engine.prefill([260, 1, 2])
    logits = np.stack([engine.step(token) for token in range(16)])
    assert np.isfinite(logits).all()
    assert 0.7 < logits.std() < 1.4


def test_the_command_refuses_to_overwrite(tmp_path: Path) -> None:
    target = tmp_path / "model.gguf"
    target.write_bytes(b"mine")
    command = [sys.executable, BENCHMARKS / "synthetic.py", "8b", "-o", target]
    run = subprocess.run(command, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (1, f"error: {target} exists already: remove it or name another file\n")
    assert target.read_bytes() == b"mine"


def test_too_full_a_disk_is_seen_first(
    synthetic: ModuleType, vocabulary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(synthetic.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(ConfigError, match=r"model\.gguf needs \d+ bytes and the disk has 1000 free"):
        write(synthetic, tmp_path / "model.gguf", vocabulary)
    assert list(tmp_path.iterdir()) == []


def test_rows_that_are_not_whole_blocks_are_refused(synthetic: ModuleType, vocabulary: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"output\.weight has rows of 288 weights, not whole blocks of Q6_K"):
        write(synthetic, tmp_path / "model.gguf", vocabulary, sizes={**SIZES, "hidden_size": 288}, head="Q6_K")
    with pytest.raises(ConfigError, match=r"there is no shape '9b'; known are 1\.5b, 3b, 8b, 14b"):
        synthetic.synthetic_gguf("9b", tmp_path / "model.gguf")
    assert list(tmp_path.iterdir()) == []
