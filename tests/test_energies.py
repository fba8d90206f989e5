"""Energies of columns: measured on a text, kept in a file, taken by `pack`."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

import reference_model
import tiny
from dipper.budget import EngineConfig
from dipper.bundle import Bundle, pack, region_name
from dipper.calibration import read_energies
from dipper.cli import main
from dipper.energies import measure_energies, write_energies
from dipper.errors import BudgetError, ConfigError
from dipper.tokenizer import Tokenizer

TEXT = "hell he held the bell and told a tale of all the hills he fell from, and then some more of it all"
TYPES = {"ffn_gate": "Q4_1", "ffn_up": "Q4_1", "ffn_down": "Q5_1"}


class Recorder:
    """Stands where reference_model has a pruning rule, and adds up the squares of what it is given."""

    def __init__(self):
        self.sums = {}

    def prune(self, layer, kind, x):
        name = f"layers.{layer}.{('input', 'glu')[kind]}"
        self.sums[name] = self.sums.get(name, 0) + (x**2).sum(0)
        return x


@pytest.fixture(scope="module", params=[False, True], ids=["no BOS", "BOS"])
def source(request, tmp_path_factory):
    pytest.importorskip("gguf")
    vocabulary = tiny.bpe_keys(**{"ggml.add_bos_token": request.param})
    folder = tmp_path_factory.mktemp("energies")
    return tiny.write_gguf(
        folder / "x.gguf", "llama-tied", TYPES, vocabulary=vocabulary, vocab_size=264, hidden_size=160,
        intermediate_size=256, num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip


@pytest.fixture(scope="module")
def bundle(source):
    return Bundle.open(pack(source, source.with_name("x.dipper")))


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text(TEXT)
    return path


def windows_of(bundle, window, n):
    tokenizer = Tokenizer.open(bundle.path)
    head = [tokenizer.bos_id] if tokenizer.add_bos else []
    ids = list(tokenizer.encode(TEXT, add_bos=False))
    step = window - len(head)
    return [head + ids[i * step : (i + 1) * step] for i in range(n)]


def test_they_are_mean_squares_over_all_windows(bundle, text):
    config = EngineConfig(method="dense-stream", mlp_dram="1000b", context=16, kv="f32")
    energies = measure_energies(bundle.path, text, window=16, limit=50, config=config)  # of 50, three windows are whole
    recorder = Recorder()
    for ids in windows_of(bundle, 16, 3):
        assert len(ids) == 16
        reference_model.logits(bundle, ids, recorder)
    assert list(energies) == [region_name(region) for region in bundle.header["regions"]] == list(recorder.sums)
    for name, sums in recorder.sums.items():
        expected = sums / 48
        assert energies[name].shape == expected.shape
        assert np.abs(energies[name] - expected).max() < 3e-3 * expected.max()
    resident = measure_energies(bundle.path, text, window=16, limit=50)
    for name, values in resident.items():
        np.testing.assert_allclose(values, energies[name], rtol=0.05, atol=1e-3 * values.max())


def test_pack_takes_the_file(bundle, source, text, tmp_path):
    energies = measure_energies(bundle.path, text, window=16, limit=48)
    write_energies(tmp_path / "e.npz", energies)
    assert [path.name for path in tmp_path.iterdir() if path != text] == ["e.npz"]
    read = read_energies(tmp_path / "e.npz")
    for name, values in energies.items():
        np.testing.assert_array_equal(read[name], values)
    options = {"base_bits": (2, 3), "unit_bytes": 700}
    split = Bundle.open(pack(source, tmp_path / "split.dipper", energies=read, **options))
    for region in split.header["regions"]:
        name = region_name(region)
        scores = energies[name] * split.dequantise(f"{name}_residual").astype(np.float64) ** 2
        assert region["order"] == sorted(range(len(scores)), key=lambda j: (-scores[j], j))
    # A split bundle gives the same energies: the dense model is the same bit for bit.
    again = measure_energies(split.path, text, window=16, limit=48)
    for name, values in energies.items():
        np.testing.assert_array_equal(again[name], values)


@pytest.mark.parametrize("budget", [[], ["--mlp-dram", "1000b"]])
def test_dipper_energies_and_pack(bundle, source, text, tmp_path, capsys, budget):
    out = tmp_path / "e.npz"
    args = [str(bundle.path), "--text", str(text), "-o", str(out), "--tokens", "48", "--window", "16"]
    assert main(["energies", *args, *budget]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(out)
    energies = measure_energies(bundle.path, text, window=16, limit=48)
    with np.load(out) as file:
        assert sorted(file.files) == sorted(energies)
        for name, values in energies.items():
            np.testing.assert_array_equal(file[name], values)
    made = tmp_path / "split.dipper"
    assert main(["pack", str(source), "--base-bits", "2,3", "--energies", str(out), "-o", str(made)]) == 0
    regions = Bundle.open(made).header["regions"]
    assert all(region["order"] not in (None, sorted(region["order"])) for region in regions)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"-o": "no/e.npz"}, "Cannot write no/e.npz: the folder no does not exist. Create it first."),
        ({"-o": "."}, "Cannot write .: it is a folder. Name a file in it."),
        ({"--text": "no.txt"}, "There is no file no.txt; give a text to score with --text FILE."),
        ({"--tokens": "15"}, "15 tokens do not fill one window of 16; use more --tokens or a smaller --window."),
        ({"--window": "129"}, "--window 129 needs a context of 129, the model has 128: use a smaller one."),
        ({"--window": "1"}, "The window is 1; it must be at least 2, one token to score and one before it."),
    ],
)
def test_energies_refuses(bundle, text, tmp_path, monkeypatch, capsys, changes, message):
    monkeypatch.chdir(tmp_path)
    options = {"--text": str(text), "-o": "e.npz", "--tokens": "48", "--window": "16", **changes}
    assert main(["energies", str(bundle.path), *(word for pair in options.items() for word in pair)]) == 1
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"dipper: {message}\n")
    assert [path.name for path in tmp_path.iterdir()] == ["t.txt"]


def test_a_text_or_a_budget_that_is_too_small(bundle, text, tmp_path):
    with pytest.raises(ConfigError, match=r"t\.txt has \d+ tokens, less than one window of 120; use --window \d+ or"):
        measure_energies(bundle.path, text, window=120, limit=120)
    with pytest.raises(BudgetError, match=r"raise --mlp-dram to [0-9.]+b or more$"):
        measure_energies(
            bundle.path, text, window=16, limit=48,
            config=EngineConfig(method="dense-stream", mlp_dram="0.01b", context=16),
        )  # fmt: skip
    copied = tmp_path / "bare.dipper"
    shutil.copytree(bundle.path, copied)
    (copied / "flash.bin").unlink()
    assert main(["energies", str(copied), "--text", str(text), "-o", str(tmp_path / "e.npz")]) == 1
    assert not (tmp_path / "e.npz").exists()
