"""Published shapes: parameter counts, sizes as packing lays them out, plans."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import tiny
from dipper import published
from dipper.budget import EngineConfig, plan_run
from dipper.bundle import Bundle, pack
from dipper.errors import BudgetError, ConfigError
from dipper.layout import BaseBits
from dipper.published import names, published_bundle
from dipper.workload import Setting

# Parameters, as published (model cards and safetensors indices), in 1e9.
PARAMETERS = {
    "phi-3-medium": 13.960,
    "phi-3-mini": 3.821,
    "llama-3-8b": 8.030,
    "mistral-7b": 7.242,
    "qwen2.5-7b": 7.616,
    "qwen2.5-14b": 14.770,
}


def n_parameters(bundle: Bundle) -> int:
    """Of tensors, MLP and untied embedding; rotary tables are none."""
    total = bundle.mlp_weights
    for name, entry in bundle.header["tensors"].items():
        if not name.startswith("rope"):
            rows, columns = (entry["shape"] + [1])[:2]
            total += rows * columns
    embedding = bundle.header["embedding"]
    return total + (0 if embedding is None else embedding["rows"] * bundle.model.hidden_size)


def test_every_model_has_its_published_parameters() -> None:
    assert set(PARAMETERS) == set(names())
    for name, published_count in PARAMETERS.items():
        assert n_parameters(published_bundle(name)) == pytest.approx(published_count * 1e9, rel=1e-3), name


@pytest.mark.parametrize("name", PARAMETERS)
def test_bits_of_the_mlp(name: str) -> None:
    four, eight = published_bundle(name), published_bundle(name, bits=8)
    sizes = [sum(region["bytes"] for region in bundle.header["regions"]) for bundle in (four, eight)]
    # Rows are padded to tiles, here nowhere: each weight is 4 or 8 bits on flash.
    assert [8 * size / four.mlp_weights for size in sizes] == [4.0, 8.0]
    assert len(four.header["regions"]) == 2 * four.model.n_layers
    resident = [
        bundle.header["files"]["resident.bin"]["bytes"] for bundle in (published_bundle(name, other_bits=4), four)
    ]
    assert resident[0] < resident[1]


def values_of(bundle: Bundle, **more: Any) -> dict[str, Any]:
    """A model's shape, as models.toml has it."""
    keys = ("n_layers", "hidden_size", "intermediate_size", "n_heads", "n_kv_heads", "head_dim", "vocab_size", "tied")
    return {"hf": "tiny", "source": "tests", **{key: getattr(bundle.model, key) for key in keys}, **more}


def flash_part(region: dict[str, Any]) -> dict[str, Any]:
    """All of a region but its hash and where its scales lie among resident tensors."""
    matrices = [
        {**m, "scales": {n: s["bytes"] for n, s in m["scales"].items() if n != "tier"}} for m in region["matrices"]
    ]
    base = region["base"] and {key: value for key, value in region["base"].items() if key != "sha256"}
    return {**{key: value for key, value in region.items() if key != "sha256"}, "base": base, "matrices": matrices}


def sizes(bundle: Bundle) -> dict[str, tuple[Any, ...]]:
    """Of every tensor; packing numbers the rotary tables."""
    return {
        name.replace("rope.0", "rope.short"): (
            entry["kind"],
            entry["shape"],
            entry.get("bytes"),
            {n: s["bytes"] for n, s in entry.get("scales", {}).items()},
        )
        for name, entry in bundle.header["tensors"].items()
    }


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", ["llama", "llama-tied", "mistral", "qwen2"])
def test_sizes_are_what_packing_lays_out(kind: str, bits: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny.write_hf(tmp_path / kind, kind, dtype="f16")
    real = Bundle.open(pack(source, tmp_path / "real.dipper", bits=str(bits), tokenizer=False))
    monkeypatch.setattr(published, "_models", lambda: {kind: values_of(real, qkv_bias=kind == "qwen2")})
    found = published_bundle(kind, bits=bits, max_context=128)
    assert list(map(flash_part, found.header["regions"])) == list(map(flash_part, real.header["regions"]))
    embeddings = [b.header["embedding"] for b in (found, real)]
    assert (embeddings[0] is None) == (embeddings[1] is None) == real.model.tied
    if not real.model.tied:  # 16 bits a weight, whatever --bits
        assert embeddings[0] == {key: value for key, value in embeddings[1].items() if key != "sha256"}
        assert embeddings[0]["codes"] == "f16"
    for name in ("flash.bin", "resident.bin"):
        assert found.header["files"][name]["bytes"] == real.header["files"][name]["bytes"], name
    assert found.mlp_weights == real.mlp_weights
    assert sizes(found) == sizes(real)
    assert found.total_bytes == real.total_bytes
    # So the planner holds the same columns for the same DRAM of the MLP.
    least = plan_run(real, EngineConfig(mlp_dram="16b", context=64), 0).minimum_bytes
    for budget in ({"mlp_dram": "16b"}, {"dram": str(least + 20_000)}):
        plans = [plan_run(b, EngineConfig(**budget, context=64), 0) for b in (found, real)]
        assert plans[0].options["capacity"] == plans[1].options["capacity"]
        assert sum(plans[0].options["capacity"]) > 0
        assert plans[0].parts == plans[1].parts
        assert plans[0].mlp_bytes == plans[1].mlp_bytes


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("base_bits", [2, (2, 3)])
@pytest.mark.parametrize("unit_bytes", [700, 8192])
def test_split_sizes_are_what_packing_lays_out(
    kind: str, base_bits: BaseBits, unit_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    split: dict[str, Any] = {"base_bits": base_bits, "unit_bytes": unit_bytes}
    source = tiny.write_hf(tmp_path / kind, kind, dtype="f16")
    real = Bundle.open(pack(source, tmp_path / "real.dipper", bits="4", tokenizer=False, **split))
    monkeypatch.setattr(published, "_models", lambda: {kind: values_of(real, qkv_bias=kind == "qwen2")})
    found = published_bundle(kind, bits=4, max_context=128, **split)
    assert all(region["base"] is not None for region in found.header["regions"])
    assert list(map(flash_part, found.header["regions"])) == list(map(flash_part, real.header["regions"]))
    assert sizes(found) == sizes(real)
    assert found.total_bytes == real.total_bytes
    assert found.bytes_by_part() == real.bytes_by_part()
    with pytest.raises(ConfigError, match=r"^base_bits is 2 and no region can be split: .*, and the MLP has q8; "):
        published_bundle(kind, bits=8, base_bits=2)


def test_unknown_names_and_bits() -> None:
    known = ", ".join(names())
    for name, bits, message in (
        ("phi-3-med", 4, "there is no model 'phi-3-med' among those whose shape is known; did you mean phi-3-medium?"),
        ("zz", 4, f"there is no model 'zz' among those whose shape is known; known are {known}"),
        ("phi-3-mini", 3, "bits is 3, other_bits 8: a published shape is laid out with 4 or 8"),
    ):
        with pytest.raises(ConfigError) as e:
            published_bundle(name, bits=bits)
        assert str(e.value) == message


def test_a_plan_keeps_to_the_budget_and_names_the_least() -> None:
    bundle = published_bundle("phi-3-medium")
    plan = plan_run(bundle, EngineConfig(density=0.5, dram="8GB"), 10**8)
    assert plan.parts["host"] == 10**8
    assert plan.total_bytes <= plan.budget_bytes == 8 * 10**9
    assert 0.5 < plan.cached_fraction < 1
    least = plan.minimum_bytes
    with pytest.raises(BudgetError) as e:
        plan_run(bundle, EngineConfig(density=0.5, dram="500MB"), 10**8)
    named = -(-least // 10**5) / 10
    assert str(e.value) == (
        f"--dram gives 500.0 MB, but dip with a context of 1024 needs at least {named} MB here (100.0 MB of it is the "
        f"host process): raise --dram to {named}MB"
    )
    assert plan_run(bundle, EngineConfig(density=0.5, dram=f"{named}MB"), 10**8).total_bytes <= named * 1e6
    with pytest.raises(BudgetError):
        plan_run(bundle, EngineConfig(density=0.5, dram=str(least - 10**5)), 10**8)
    setting = Setting.plan_for(bundle, EngineConfig(density=0.5, dram="8GB"), host_bytes=10**8)
    assert setting.plan == plan
    assert setting.k == (2560, 8960) * 40
