"""What regions lose at their base: measured against the definition, kept, and taken by `--whole`."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

import tiny
from dipper import auto
from dipper import sensitivity as sensitivity_module
from dipper.auto import named_layers
from dipper.budget import EngineConfig
from dipper.bundle import Bundle, pack
from dipper.cli import main
from dipper.engine import Engine, settle
from dipper.errors import ConfigError
from dipper.sensitivity import layer_order, measure_sensitivity


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sensitivity")
    source = tiny.write_hf(folder / "llama", "llama", intermediate_size=256)
    return Bundle.open(pack(source, folder / "m.dipper", "4", tokenizer=False, base_bits=(2, 3), unit_bytes=4096))


@pytest.fixture
def text(tmp_path, monkeypatch):
    """A text whose words are ids."""

    class Words:
        bos_id, add_bos = 1, True

        def encode(self, text, add_bos):
            return [int(word) for word in text.split()]

    monkeypatch.setattr(sensitivity_module.Tokenizer, "open", lambda path: Words())
    file = tmp_path / "text.txt"
    file.write_text(" ".join(map(str, np.random.default_rng(0).integers(3, 160, 100))))
    return file


@pytest.fixture
def found(bundle, text):
    return measure_sensitivity(bundle.path, text, window=32, limit=96, threads=1)


def test_a_region_at_its_base_is_one_that_fetches_nothing(bundle, text, found):
    """Bit for bit, all others fetching everything."""
    assert [(r["layer"], r["kind"]) for r in found["regions"]] == [
        (layer, kind) for layer in range(3) for kind in ("input", "glu")
    ]
    assert all(abs(region["change"]) > 1e-6 for region in found["regions"])
    ids = [1, *map(int, text.read_text().split())][:32]
    for region, fetches in ((2, (0.0, 1.0)), (3, (1.0, 0.0))):
        settled = sensitivity_module._at_base(bundle, region, 32, 1)
        assert sum(settled.plan.options["refined"]) == 1
        assert sum(settled.plan.options["pinned"]) == 5
        with Engine.load(bundle, settled) as engine:
            losses = engine.score(ids)
        config = EngineConfig(
            method="planes",
            fetch=fetches[0],
            fetch_glu=fetches[1],
            whole=(0, 2),
            mlp_dram="100b",
            context=32,
            threads=1,
        )
        made = settle(bundle, config)
        made.plan.options["capacity"] = [0] * 6  # what is cached is refined, too
        with Engine.load(bundle, made) as engine:
            assert np.array_equal(losses, engine.score(ids))


def test_what_is_kept(bundle, found):
    assert found["schema"] == "dipper-sensitivity/1"
    assert (found["base_bits"], found["source_sha256"]) == ([2, 3], bundle.header["source"]["sha256"])
    assert found["n_tokens"] == 3 * 31
    assert found["order"] == layer_order(found["regions"])
    json.dumps(found)


def test_layers_rank_by_both_regions():
    regions = [
        {"layer": layer, "kind": kind, "change": change}
        for layer, pair in enumerate([(0.1, 0.1), (0.3, -0.2), (0.0, 0.25), (0.1, 0.1)])
        for kind, change in zip(("input", "glu"), pair, strict=True)
    ]
    assert math.log(1.21) < math.log(1.25)
    assert layer_order(regions) == [2, 0, 3, 1]


def test_a_bundle_in_one_piece_has_nothing_to_measure(tmp_path, text):
    source = tiny.write_hf(tmp_path / "llama", "llama")
    whole = pack(source, tmp_path / "w.dipper", "4", tokenizer=False)
    with pytest.raises(ConfigError, match=r"has no region with a base of its own: pack it with --base-bits$"):
        measure_sensitivity(whole, text)


# ------------------------------------------------------------------------------------------------ --whole


def config(whole):
    return EngineConfig(method="planes", whole=whole)


def test_whole_takes_the_first_of_an_order(bundle, found, tmp_path, monkeypatch):
    file = tmp_path / "order.json"
    file.write_text(json.dumps({**found, "order": [2, 0, 1]}))
    assert named_layers(bundle, config(f"{file}:2")).whole == (2, 0)
    assert named_layers(bundle, config(f"{file}:33%")).whole == (2,)
    assert named_layers(bundle, config(f"{file}:0")).whole == ()
    assert named_layers(bundle, config((1,))).whole == (1,)
    with pytest.raises(ConfigError, match=r"is more than the 3 layers of the order: give fewer$"):
        named_layers(bundle, config(f"{file}:4"))
    table = {found["source_sha256"]: [{"base_bits": [3, 3], "order": [0]}, {"base_bits": [2, 3], "order": [1, 2, 0]}]}
    monkeypatch.setattr(auto, "_orders", lambda: table)
    assert named_layers(bundle, config("auto:2")).whole == (1, 2)
    monkeypatch.setattr(auto, "_orders", dict)
    with pytest.raises(ConfigError, match=r"^--whole auto: how sensitive the layers are was not measured"):
        named_layers(bundle, config("auto:2"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"cannot be read \(No such file or directory\): give a file of dipper sensitivity$"),
        ("{}", r"is no file of dipper sensitivity: give one, or layers such as 27,2$"),
        ("[", r"is no file of dipper sensitivity"),
        ({"base_bits": [3, 3]}, r"was measured on another model or base than .*: measure this one$"),
        ({"source_sha256": "0"}, r"was measured on another model or base than .*: measure this one$"),
        ({"order": [0, 3]}, r"has layers that the model lacks: measure it again$"),
        ({"order": [0, 0]}, r"has layers that the model lacks: measure it again$"),
    ],
)
def test_files_that_are_no_order(bundle, tmp_path, content, message):
    file = tmp_path / "order.json"
    good = {"source_sha256": bundle.header["source"]["sha256"], "base_bits": [2, 3], "order": [0, 1, 2]}
    if content is not None:
        file.write_text(content if isinstance(content, str) else json.dumps({**good, **content}))
    with pytest.raises(ConfigError, match=message):
        named_layers(bundle, config(f"{file}:1"))


def test_whole_that_is_neither():
    with pytest.raises(ConfigError) as error:
        config("auto:many")
    assert str(error.value) == "whole layers are 'auto:many': write 27,2,26, auto:6 or ORDER.json:25%"


def test_from_measuring_to_running(bundle, text, tmp_path, capsys):
    file = tmp_path / "order.json"
    args = ["--text", str(text), "--window", "32", "--tokens", "96", "--threads", "1"]
    assert main(["sensitivity", str(bundle.path), *args, "-o", str(file)]) == 0
    out, err = capsys.readouterr()
    assert out == f"{file}\n"
    assert err.splitlines()[-1].startswith("6/6 layer 2 glu ")
    order = json.loads(file.read_text())["order"]
    told = []
    options = EngineConfig(method="planes", whole=f"{file}:1", mlp_dram="100b", context=32)
    with Engine.open(bundle.path, options, told.append) as engine:
        assert engine.config.whole == (order[0],)
        assert [r.held for r in told[0].regions if r.layer == order[0]] == ["pinned", "pinned"]
