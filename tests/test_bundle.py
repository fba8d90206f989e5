"""Packing and opening: what a bundle holds, what damages it shows, and what packing leaves behind when it stops."""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from dipper.bundle import ALIGNMENT, Bundle, header_bytes, pack, region_name
from dipper.checkpoint import open_checkpoint
from dipper.errors import BundleError, CheckpointError, ConfigError
from dipper.glu import read_model
from dipper.grid import dequantise, plane_bytes
from dipper.layout import columns_per_unit, unit_size

SRC = str(Path(__file__).parents[1] / "src")


def pack_hf(folder: Path, kind: str = "llama", bits: str = "source", dtype: str = "f32", **changes) -> Bundle:
    source = tiny.write_hf(folder / f"{kind}-hf", kind, dtype=dtype, **changes)
    return Bundle.open(pack(source, folder / f"{kind}-{bits}.dipper", bits, tokenizer=False))


def source_weights(source: Path) -> dict[str, np.ndarray]:
    parts = read_model(open_checkpoint(source)).parts
    return {
        name: part.vector() if len(part.shape) == 1 else dequantise(part.grid, part.rows(0, part.shape[0]))
        for name, part in parts.items()
    }


# --- what is in a bundle


@pytest.mark.parametrize("kind", tiny.CONFIGS)
def test_source_grid_is_lossless(tmp_path, kind):
    bundle = pack_hf(tmp_path, kind)
    bundle.verify()
    for name, weights in source_weights(tmp_path / f"{kind}-hf").items():
        np.testing.assert_array_equal(bundle.dequantise(name), weights)


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_sixteen_bit_sources_are_lossless(tmp_path, dtype):
    bundle = pack_hf(tmp_path, "phi3", dtype=dtype)
    assert all(labels == [dtype] for labels in bundle.describe()["grids"].values())
    for name, weights in source_weights(tmp_path / "phi3-hf").items():
        np.testing.assert_array_equal(bundle.dequantise(name), weights)


# hidden and inner sizes are multiples of 256 for the K types; inner 768 leaves no half tile, vocabulary 160 does
GGUF_SIZES = {"hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.mark.parametrize("type_name", [*tiny.BLOCKS, "F16", "BF16", None])
def test_gguf_types_survive_packing(tmp_path, type_name):
    pytest.importorskip("gguf")
    names = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down", "token_embd", "output")
    types = dict.fromkeys(names, type_name) if type_name else {}
    source = tiny.write_gguf(tmp_path / "x.gguf", "llama", types, **GGUF_SIZES)
    bundle = Bundle.open(pack(source, tmp_path / "x.dipper", tokenizer=False))
    bundle.verify()
    for name, weights in source_weights(source).items():
        np.testing.assert_array_equal(bundle.dequantise(name), weights)


def test_smollm2_like_gguf(tmp_path):
    """Q4_1 weights, tied Q8_0 head, half tiles everywhere."""
    pytest.importorskip("gguf")
    names = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    types = {**dict.fromkeys(names, "Q4_1"), "token_embd": "Q8_0"}
    source = tiny.write_gguf(tmp_path / "x.gguf", "llama-tied", types, **sizes)
    bundle = Bundle.open(pack(source, tmp_path / "x.dipper", tokenizer=False))
    input_region, glu_region = bundle.header["regions"][:2]
    assert input_region["record_bytes"] == 2 * 1536 // 2
    assert input_region["bytes"] == 576 * 1536
    assert glu_region["record_bytes"] == 576 // 2
    assert glu_region["offset"] == 576 * 1536
    assert bundle.header["regions"][2]["offset"] == 576 * 1536 + -(-1536 * 288 // 4096) * 4096
    for name, weights in source_weights(source).items():
        np.testing.assert_array_equal(bundle.dequantise(name), weights)


def test_records_lie_where_the_format_says(tmp_path):
    """One column of flash.bin, found with nothing but the header's numbers."""
    pytest.importorskip("gguf")
    types = {"ffn_gate": "Q4_0", "ffn_up": "Q5_0", "ffn_down": "Q6_K"}
    source = tiny.write_gguf(tmp_path / "x.gguf", "llama", types, **GGUF_SIZES)
    bundle = Bundle.open(pack(source, tmp_path / "x.dipper", tokenizer=False))
    region = bundle.header["regions"][2]
    assert (region["layer"], region["kind"]) == (1, "input")
    assert [plane["offset"] for matrix in region["matrices"] for plane in matrix["planes"]] == [0, 384, 768]
    column, row = 77, 300  # tile 2, row 44 of it: lane 12, field 2
    record = (bundle.path / "flash.bin").read_bytes()[region["offset"] + column * region["record_bytes"] :]
    part = read_model(open_checkpoint(source)).parts["layers.1.up"]
    code = int(part.rows(row, row + 1).codes[0, column])
    low = int.from_bytes(record[384 + 2 * 64 + 12 * 4 :][:4], "little") >> 8 & 15
    high = record[768 + 2 * 16 + 12] >> 2 & 1
    assert low | high << 4 == code
    scale = region["matrices"][1]["scales"]["d"]["offset"] + 2 * (column // 32 * 768 + row)
    resident = (bundle.path / "resident.bin").read_bytes()
    assert np.frombuffer(resident[scale : scale + 2], "<f2") == part.rows(row, row + 1).scales["d"][0, column // 32]


def test_header_keys_of_the_format(tmp_path):
    header = json.loads((pack_hf(tmp_path).path / "bundle.json").read_text())
    assert header["format"] == "dipper-bundle"
    assert header["version"] == 2
    assert header["source"]["kind"] == "hf"
    assert header["source"]["bits"] == "source"
    assert header["model"]["activation"] == "silu"
    assert header["regions"][0]["matrices"][0]["planes"] == [
        {"bits": 32, "shift": 0, "kind": "codes", "tier": "flash", "offset": 0, "stride": 2 * 4 * 192}
    ]
    assert header["regions"][0]["matrices"][0]["scales"] == {"tier": "resident"}
    for region in header["regions"]:  # nothing is split unless asked for
        assert (region["columns_per_unit"], region["order"], region["base"]) == (1, None, None)
        assert region["unit_bytes"] == region["record_bytes"]
        assert [matrix["base_bits"] for matrix in region["matrices"]] == [0] * len(region["matrices"])
    for name, entry in header["files"].items():
        assert (tmp_path / "llama-source.dipper" / name).stat().st_size == entry["bytes"]


@pytest.mark.parametrize(("bits", "codes", "limit"), [("4", "q4", 0.012), ("8", "q8", 5e-5), ("16", "f16", 1e-6)])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "phi3", "gemma3"])
def test_quantised_bundles(tmp_path, kind, bits, codes, limit):
    bundle = pack_hf(tmp_path, kind, bits)
    bundle.verify()
    grids = {name: labels[0].split("/")[0] for name, labels in bundle.describe()["grids"].items()}
    assert {grids[name] for name in ("gate", "up", "down")} == {codes}
    assert {grids[name] for name in ("q", "k", "v", "o", "head")} == {"q8"}
    assert grids.get("embedding", "f16") == "f16"
    for name, weights in source_weights(tmp_path / f"{kind}-hf").items():
        error = ((bundle.dequantise(name) - weights) ** 2).sum() / (weights**2).sum()
        is_mlp = name.endswith((".gate", ".up", ".down"))
        assert error <= (0 if weights.ndim == 1 else limit if is_mlp else 5e-5)


def test_sixteen_bits_keep_bf16(tmp_path):
    grids = pack_hf(tmp_path, "llama", "16", dtype="bf16").describe()["grids"]
    assert grids["gate"] == grids["embedding"] == ["bf16"]
    assert grids["q"] == ["q8/32 f16"]


def test_sixteen_bits_of_a_quantised_source(tmp_path):
    pytest.importorskip("gguf")
    types = {"attn_q": "Q5_0", "ffn_up": "Q4_K", "ffn_down": "Q6_K", "token_embd": "Q8_0"}
    source = tiny.write_gguf(tmp_path / "x.gguf", "llama", types, **GGUF_SIZES)
    bundle = Bundle.open(pack(source, tmp_path / "x.dipper", "16", tokenizer=False))
    grids = bundle.describe()["grids"]
    assert grids["up"] == grids["down"] == grids["gate"] == ["f16"]
    assert grids["q"] == ["q5/32 f16"]
    assert grids["k"] == grids["head"] == ["q8/32 f16"]
    assert grids["embedding"] == ["q8/32 f16"]
    weights = source_weights(source)
    np.testing.assert_array_equal(bundle.dequantise("layers.0.up"), weights["layers.0.up"].astype(np.float16))


def test_embedding_rows(tmp_path):
    bundle = pack_hf(tmp_path, "llama", "4")
    table = bundle.dequantise("embedding")
    assert table.shape == (160, 96)
    np.testing.assert_array_equal(bundle.embedding_rows(np.array([159, 0, 7])), table[[159, 0, 7]])
    np.testing.assert_array_equal(bundle.embedding_row(31), table[31])
    with pytest.raises(BundleError, match="token ids reach 160, the vocabulary has 160"):
        bundle.embedding_rows(np.array([1, 160]))
    tied = pack_hf(tmp_path, "llama-tied", "4")
    np.testing.assert_array_equal(tied.embedding_row(31), tied.dequantise("head")[31])
    np.testing.assert_array_equal(tied.dequantise("embedding"), tied.dequantise("head"))


def test_unknown_tensor(tmp_path):
    with pytest.raises(BundleError, match=r"has no tensor 'layers\.9\.gate'"):
        pack_hf(tmp_path).dequantise("layers.9.gate")


def test_bytes_by_part_add_up(tmp_path):
    bundle = pack_hf(tmp_path, "llama", "4")
    parts = bundle.bytes_by_part()
    # 3 layers of 176 x 96: gate and up records of 96 columns, down records of 176
    assert parts["flash"]["input_records"] == 3 * 96 * 2 * plane_bytes(176, 4)
    assert parts["flash"]["glu_records"] == 3 * 176 * plane_bytes(96, 4)
    assert parts["flash"]["embedding"] == 160 * 2 * 128
    blocks, inner_blocks = 96 // 32, -(-176 // 32)
    assert parts["resident"]["mlp_scales"] == 3 * (2 * 192 * (2 * blocks + 4) + 128 * (2 * inner_blocks + 4))
    assert parts["resident"]["norms"] == 4 * (3 * 2 * 96 + 96 + 8)
    assert parts["resident"]["head"] == 96 * 192 + 2 * 192 * blocks
    assert bundle.mlp_weights == 3 * 3 * 176 * 96
    files = bundle.describe()["files"]
    for tier, file in (("resident", "resident.bin"), ("flash", "flash.bin")):
        assert sum(parts[tier].values()) <= files[file]
    assert files["flash.bin"] - sum(parts["flash"].values()) < 7 * ALIGNMENT


def test_two_packs_are_the_same_bytes(tmp_path):
    one, two = (pack_hf(tmp_path / name, "gemma3", "4").path for name in ("a", "b"))
    for file in sorted(one.iterdir()):
        assert file.read_bytes() == (two / file.name).read_bytes()


def test_progress_ends_at_the_total(tmp_path):
    calls = []
    source = tiny.write_hf(tmp_path / "m", "llama")
    out = pack(source, tmp_path / "x.dipper", progress=lambda done, total: calls.append((done, total)), tokenizer=False)
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    total = sum((out / name).stat().st_size for name in ("resident.bin", "flash.bin"))
    assert calls[-1] == (total, total)


def test_tokenizer_files_are_listed_and_checked(tmp_path, monkeypatch):
    def write_tokenizer(source: Path, out_dir: Path) -> dict:
        (out_dir / "tokenizer.json").write_text("{}")
        return {"bos_id": None, "eos_ids": [5, 6], "add_bos": True}

    module = type(sys)("dipper.tokenizer")
    module.write_tokenizer = write_tokenizer
    monkeypatch.setitem(sys.modules, "dipper.tokenizer", module)
    bundle = Bundle.open(pack(tiny.write_hf(tmp_path / "m", "llama"), tmp_path / "x.dipper"))
    assert (bundle.model.bos_id, bundle.model.eos_ids, bundle.model.add_bos) == (None, (5, 6), True)
    bundle.verify()
    (bundle.path / "tokenizer.json").write_text("[]")
    with pytest.raises(BundleError, match=r"tokenizer.json: .* do not match their checksum"):
        bundle.verify()
    (bundle.path / "tokenizer.json").unlink()
    with pytest.raises(BundleError, match=r"tokenizer\.json: is missing; the bundle is incomplete"):
        Bundle.open(bundle.path)


# --- logits


@pytest.mark.torch
@pytest.mark.parametrize("maker", [tiny.write_hf, tiny.save_with_transformers])
@pytest.mark.parametrize("kind", tiny.CONFIGS)
def test_logits_equal_transformers(tmp_path, kind, maker):
    """Everything a header says (RoPE, windows, norms, scales, biases) against the models it was read from."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    import reference_model

    source = maker(tmp_path / "m", kind)
    bundle = Bundle.open(pack(source, tmp_path / "x.dipper", tokenizer=False))
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, attn_implementation="eager")
    for n_tokens in (20, 100):  # within and beyond Phi-3's original context
        ids = [int(i) for i in np.random.default_rng(n_tokens).integers(3, 160, n_tokens)]
        with torch.no_grad():
            expected = model(torch.tensor([ids])).logits[0].numpy()
        error = np.abs(reference_model.logits(bundle, ids) - expected).max()
        assert error <= 2e-5 * np.abs(expected).max()


# --- damage


@pytest.fixture
def bundle(tmp_path):
    return pack_hf(tmp_path, "qwen3", "4")


def test_a_flipped_byte_anywhere_is_found(bundle):
    rng = np.random.default_rng(0)
    for file in sorted(bundle.path.iterdir()):
        whole = file.read_bytes()
        for at in {0, len(whole) - 1, *(int(i) for i in rng.integers(0, len(whole), 25))}:
            flipped = bytearray(whole)
            flipped[at] ^= 0x01
            file.write_bytes(flipped)
            with pytest.raises(BundleError):
                Bundle.open(bundle.path).verify()
        file.write_bytes(whole)
    Bundle.open(bundle.path).verify()


def test_a_flipped_part_is_named(bundle):
    region = bundle.header["regions"][3]
    path = bundle.path / "flash.bin"
    content = bytearray(path.read_bytes())
    content[region["offset"] + 5] ^= 4
    content[bundle.header["embedding"]["offset"]] ^= 4
    path.write_bytes(content)
    with pytest.raises(BundleError, match=r"flash.bin: layer 1 glu columns do not match their checksum; .*pack again"):
        Bundle.open(bundle.path).verify()


@pytest.mark.parametrize("file", ["bundle.json", "resident.bin", "flash.bin"])
def test_truncation_is_found_on_opening(bundle, file):
    whole = (bundle.path / file).read_bytes()
    for length in (0, 1, len(whole) // 2, len(whole) - 2):
        (bundle.path / file).write_bytes(whole[:length])
        with pytest.raises(BundleError, match="pack again"):
            Bundle.open(bundle.path)
    (bundle.path / file).unlink()
    with pytest.raises(BundleError, match=r"is missing|no bundle\.json"):
        Bundle.open(bundle.path)


def test_not_a_bundle(tmp_path):
    with pytest.raises(BundleError, match=r"is not a bundle \(no bundle.json\); make one with `dipper pack"):
        Bundle.open(tmp_path)
    (tmp_path / "bundle.json").write_text('{"format": "other"}')
    with pytest.raises(BundleError, match="is not the header of a dipper bundle"):
        Bundle.open(tmp_path)
    (tmp_path / "bundle.json").write_text("[" * 100_000)
    with pytest.raises(BundleError, match="is not valid JSON"):
        Bundle.open(tmp_path)
    (tmp_path / "bundle.json").write_text('{"format": "dipper-bundle", "version": NaN}')
    with pytest.raises(BundleError, match="NaN is not a number"):
        Bundle.open(tmp_path)
    (tmp_path / "bundle.json").write_text('{"format": "dipper-bundle", "format": "dipper-bundle"}')
    with pytest.raises(BundleError, match="a key appears twice"):
        Bundle.open(tmp_path)
    (tmp_path / "bundle.json").write_text('{"format": "dipper-bundle", "version": 1, "alignment": 1e999}')
    with pytest.raises(BundleError, match="is not valid JSON"):
        Bundle.open(tmp_path)


def test_newer_version(bundle):
    for version in (3, 99):
        (bundle.path / "bundle.json").write_text(json.dumps({"format": "dipper-bundle", "version": version, "new": 1}))
        with pytest.raises(BundleError) as error:
            Bundle.open(bundle.path)
        assert str(error.value) == (
            f"{bundle.path}: format version {version} is newer than this dipper reads (2): upgrade"
        )


def test_huge_header_is_not_read(bundle):
    with (bundle.path / "bundle.json").open("r+b") as file:
        file.truncate((64 << 20) + 1)
    with pytest.raises(BundleError, match="a header has at most 67108864"):
        Bundle.open(bundle.path)


def change(path: str, value):
    def apply(header):
        *keys, last = [int(key) if key.isdigit() else key for key in path.split("/")]
        target = header
        for key in keys:
            target = target[key]
        if value is KeyError:
            del target[last]
        else:
            target[last] = value(target[last]) if callable(value) else value

    return apply


HOSTILE = [
    ("regions/1/offset", 0, "layers.0.glu and layers.0.input overlap in flash.bin"),
    ("regions/1/offset", lambda o: o + 1, "is not a multiple of 4096"),
    ("regions/1/offset", -4096, "offset -4096 is not a number from 0"),
    ("regions/1/offset", 1 << 40, "layers.0.glu: ends at"),
    ("regions/1/offset", 0.0, "is not a number from 0"),
    ("regions/0/record_bytes", lambda n: n + 64, "stride"),
    ("regions/0/bytes", 4096, "bytes is 4096, not"),
    ("regions/0/n_columns", 1, "n_columns is 1, not 64"),
    ("regions/0/columns_per_unit", 2, "columns_per_unit is 2"),
    ("regions/0/order", [0] * 64, "order is not a permutation of 64 columns"),
    ("regions/0/order", ["a"], "order is not a list of columns"),
    ("regions/0/order", list(range(64)), "layers.0.input: has an order and no base"),
    ("regions/0/order", KeyError, "'order' is missing"),
    ("regions/0/unit_bytes", 4096, "unit_bytes is 4096, not 128"),
    ("regions/0/base", KeyError, "'base' is missing"),
    ("regions/0/base", {}, "tensors are missing, the first is ['layers.0.input_residual']"),
    ("regions/0/matrices/1/base_bits", 2, "layers.0.up: base_bits is 2, and the region has no base"),
    ("regions/0/matrices/1/base_bits", KeyError, "'base_bits' is missing"),
    ("regions/0/sha256", KeyError, "'sha256' is missing"),
    ("tensors/layers.0.input_residual", {"kind": "vector", "shape": [64], "offset": 0}, "shape is [64], not [None]"),
    ("regions/0/kind", "glu", "regions are not"),
    ("regions/0/layer", [0], "regions are not"),
    ("regions/0/matrices/0/codes", "q5", "q5 has 2 planes"),
    ("regions/0/matrices/0/codes", "q9", "codes is 'q9'"),
    ("regions/0/matrices/0/rows", 50, "rows is 50, not 100"),
    ("regions/0/matrices/0/planes/0/offset", 64, "plane is"),
    ("regions/0/matrices/0/planes/0/tier", "resident", "plane is"),
    ("regions/0/matrices/0/scales/d/offset", 0, "overlap in resident.bin"),
    ("regions/0/matrices/0/scales/d/bytes", 2, "bytes is 2, not"),
    ("regions/0/matrices/0/scales/d", KeyError, "scale arrays are"),
    ("regions/0/matrices/0/scales/tier", "flash", "scales are in 'flash'"),
    ("regions/0/matrices/0/group", 1 << 40, "group is 1099511627776, with codes"),
    ("regions/0/matrices/0/group", 8, "group is 8, with codes"),
    ("regions/0/matrices/0/super_blocks", 3, "layers.0.gate: super_blocks is 3, a row has 2 blocks"),
    ("tensors/head/super_blocks", 1 << 40, "head: super_blocks is 1099511627776, a row has 2 blocks"),
    ("embedding/super_blocks", 3, "embedding: super_blocks is 3, a row has 2 blocks"),
    ("regions/0/matrices/0/super_blocks", True, "super_blocks is True"),
    ("regions", list, None),
    ("regions", lambda r: r[:-1], "regions are not"),
    ("tensors/head/offset", 8, "is not a multiple of 64"),
    ("tensors/head/shape", [160, 65], "head: shape is"),
    ("tensors/head/bytes", 1, "head: bytes is 1"),
    ("tensors/head", KeyError, "tensors are missing, the first is ['head']"),
    ("tensors/final_norm/shape", [1], "final_norm: shape is [1], not [64]"),
    ("tensors/final_norm/kind", "scalar", "kind is 'scalar'"),
    ("tensors/rope.0", KeyError, "tensors are missing"),
    ("tensors/extra", {"kind": "vector", "shape": [64], "offset": 0}, "extra: shape is [64], not [None]"),
    ("model/hidden_size", 128, "not"),
    ("model/n_layers", 10**9, "3 layers are described and n_layers is 1000000000"),
    ("model/vocab_size", 10**9, "head: shape is"),
    ("model/vocab_size", 10**15, "vocab_size is 1000000000000000, it must be a whole number in 0..2147483647"),
    ("model/intermediate_size", 10**9, "rows is 100, not 1000000000"),
    ("model/intermediate_size", 1 << 31, "intermediate_size is 2147483648, it must be"),
    ("model/max_context", 1 << 31, "max_context is 2147483648, it must be"),
    ("model/max_context", 0, "max_context is 0, it must be at least 1"),
    ("model/n_heads", 1 << 30, "n_heads * head_dim is 25769803776, it must be"),
    ("model/layers/0/window", 1 << 32, "window is 4294967296, it must be"),
    ("model/layers/0/window", -1, "and window -1"),
    ("model/rope/0/original_context", 1 << 31, "original_context is 2147483648, it must be"),
    ("model/rope/0/original_context", -1, "original_context is -1, it must be"),
    ("model/rope/0/scale_short", 1e300, "scale_short is 1e+300, beyond 32-bit floats"),
    ("model/norm_eps", 10**400, "beyond 32-bit floats"),
    ("model/bos_id", -1, "a token id is -1, it must be"),
    ("model/eos_ids", [1 << 31], "a token id is 2147483648, it must be"),
    ("model/eos_ids", ["a"], "a token id is 'a', it must be"),
    ("model/hidden_size", "64", "hidden_size is '64', not int"),
    ("model/n_heads", 0, "n_heads is 0"),
    ("model/activation", "relu", "activation is 'relu'"),
    ("model/tied", True, "the embedding is present and tied is True"),
    ("model/layers/0/rope", 5, "layer 0 has rope 5 of 1"),
    ("model/rope/0/dim", 200, "a rope table has dim 200"),
    ("model/rope/0/short", "head", "takes another tensor's name"),
    ("model/unknown", 1, "missing or unknown fields: unknown"),
    ("embedding/row_bytes", 1, "embedding: row_bytes is 1"),
    ("embedding/offset", 0, "embedding overlap in flash.bin"),
    ("embedding", None, "the embedding is absent and tied is False"),
    ("alignment", 512, "alignment is 512, not 4096"),
    ("files/flash.bin/bytes", lambda n: n + 4096, "the bundle is cut or damaged"),
    ("files/flash.bin", KeyError, "flash.bin is not listed"),
    ("files/..", {"bytes": 0}, "file '..' is not part of a bundle"),
    ("files", [], "the header is inconsistent"),
    ("embedding", 7, "the header is inconsistent"),
    ("extra", 1, "keys are missing or unknown: ['extra']"),
    ("created_by", KeyError, "keys are missing or unknown: ['created_by']"),
]


@pytest.mark.parametrize(("path", "value", "message"), HOSTILE)
def test_hostile_headers_with_a_right_hash(bundle, path, value, message):
    header = copy.deepcopy(bundle.header)
    change(path, value)(header)
    (bundle.path / "bundle.json").write_bytes(header_bytes(header))
    if message is None:  # the same content again: the machinery of this test changes nothing by itself
        Bundle.open(bundle.path)
        return
    with pytest.raises(BundleError) as error:
        Bundle.open(bundle.path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_changed_header_without_its_hash(bundle):
    file = bundle.path / "bundle.json"
    file.write_bytes(file.read_bytes().replace(b'"n_heads":4', b'"n_heads":2'))
    with pytest.raises(BundleError, match="does not match its own checksum"):
        Bundle.open(bundle.path)


def test_column_order_is_followed(bundle):
    """A region of version 1 whose records are permuted, with `order` saying so, is the same matrix."""
    before = bundle.dequantise("layers.1.down")
    header = version_1(bundle.header)
    region = header["regions"][3]
    order = np.random.default_rng(0).permutation(region["n_columns"])
    region["order"] = [int(j) for j in order]
    path = bundle.path / "flash.bin"
    content = bytearray(path.read_bytes())
    span = slice(region["offset"], region["offset"] + region["bytes"])
    records = np.frombuffer(content[span], np.uint8).reshape(-1, region["record_bytes"])
    content[span] = records[order].tobytes()
    path.write_bytes(content)
    (bundle.path / "bundle.json").write_bytes(header_bytes(header))
    np.testing.assert_array_equal(Bundle.open(bundle.path).dequantise("layers.1.down"), before)


def version_1(header: dict) -> dict:
    """A header without what version 2 added."""
    header = copy.deepcopy(header)
    header["version"] = 1
    for region in header["regions"]:
        del region["unit_bytes"], region["base"]
        for matrix in region["matrices"]:
            del matrix["base_bits"]
    return header


def test_version_1_still_opens(bundle):
    weights = bundle.dequantise("layers.2.up")
    (bundle.path / "bundle.json").write_bytes(header_bytes(version_1(bundle.header)))
    opened = Bundle.open(bundle.path)
    assert opened.header["version"] == opened.describe()["version"] == 1
    assert opened.header["regions"] == bundle.header["regions"]
    opened.verify()
    np.testing.assert_array_equal(opened.dequantise("layers.2.up"), weights)
    assert opened.bytes_by_part() == bundle.bytes_by_part()


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("regions/0/columns_per_unit", 2, "columns_per_unit is 2"),
        ("regions/0/record_bytes", KeyError, "'record_bytes' is missing"),
        ("regions", 7, "the header is inconsistent"),
        ("regions/0", [], "the header is inconsistent"),
        ("regions/0/matrices/0", 7, "the header is inconsistent"),
        ("regions/0/matrices/0/planes/0/tier", "base", "plane is"),
    ],
)
def test_hostile_headers_of_version_1(bundle, path, value, message):
    header = version_1(bundle.header)
    change(path, value)(header)
    (bundle.path / "bundle.json").write_bytes(header_bytes(header))
    with pytest.raises(BundleError) as error:
        Bundle.open(bundle.path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


# --- base and residual

SPLIT_TYPES = ("Q4_0", "Q4_1", "Q4_K", "Q5_0", "Q5_1", "Q5_K", "Q6_K")


def write_split_gguf(path: Path, types: tuple[str, str, str], hidden: int, inner: int, n_layers: int = 1) -> Path:
    """A model whose gate, up and down have these types; K types take inputs of whole 256s."""
    if any(name.endswith("K") for name in types[:2]):
        hidden = 256
    if types[2].endswith("K"):
        inner = 256
    return tiny.write_gguf(
        path, "llama-tied", dict(zip(("ffn_gate", "ffn_up", "ffn_down"), types, strict=True)), hidden_size=hidden,
        intermediate_size=inner, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=n_layers,
    )  # fmt: skip


def energies_of(bundle: Bundle, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {region_name(r): rng.lognormal(0, 2, r["n_columns"]).astype(np.float32) for r in bundle.header["regions"]}


@settings(max_examples=30, deadline=None)
@given(
    types=st.tuples(*[st.sampled_from(SPLIT_TYPES)] * 3),
    hidden=st.sampled_from([64, 96, 192, 288]),
    inner=st.sampled_from([64, 160, 192, 320]),
    base_bits=st.integers(1, 4),
    unit_bytes=st.sampled_from([1, 700, 4096, 5000, 16384]),
    ordered=st.booleans(),
)
def test_a_split_bundle_has_the_same_weights(types, hidden, inner, base_bits, unit_bytes, ordered):
    pytest.importorskip("gguf")
    bits = {"input": {int(name[1]) for name in types[:2]}, "glu": {int(types[2][1])}}
    split = {kind for kind, of_kind in bits.items() if min(of_kind) > base_bits}
    with tempfile.TemporaryDirectory() as folder:
        source = write_split_gguf(Path(folder) / "x.gguf", types, hidden, inner)
        whole = Bundle.open(pack(source, Path(folder) / "whole.dipper", tokenizer=False))
        energies = energies_of(whole) if ordered else None

        def pack_split(name: str) -> Bundle:
            options = {"base_bits": base_bits, "unit_bytes": unit_bytes, "energies": energies}
            return Bundle.open(pack(source, Path(folder) / name, tokenizer=False, **options))

        if not split or any(max(bits[kind]) - base_bits > 4 for kind in split):
            with pytest.raises(ConfigError, match=r"no region can be split|leave 5 residual bits"):
                pack_split("split.dipper")
            return
        bundle = pack_split("split.dipper")
        bundle.verify()
        for region, plain in zip(bundle.header["regions"], whole.header["regions"], strict=True):
            kind, u, n = region["kind"], region["columns_per_unit"], region["n_columns"]
            residual = bundle.header["tensors"].get(f"layers.0.{kind}_residual")
            assert (region["base"] is not None) == (residual is not None) == (kind in split)
            assert (region["order"] is not None) == (ordered and kind in split)
            if kind not in split:
                changed = ("offset", "matrices")
                assert {k: v for k, v in region.items() if k not in changed} == {
                    k: v for k, v in plain.items() if k not in changed
                }
                continue
            assert u == columns_per_unit(region["record_bytes"], n, unit_bytes)
            n_bytes = u * region["record_bytes"]
            padding = -n_bytes % ALIGNMENT
            assert region["unit_bytes"] == n_bytes + (padding if padding <= 2048 else 0)
            assert region["bytes"] == -(-n // u) * region["unit_bytes"]
            assert region["base"]["offset"] == region["offset"] + -(-region["bytes"] // ALIGNMENT) * ALIGNMENT
        for name in ("gate", "up", "down"):
            weights = whole.dequantise(f"layers.0.{name}")
            np.testing.assert_array_equal(bundle.dequantise(f"layers.0.{name}"), weights)
        again = pack_split("again.dipper")
        for file in sorted(bundle.path.iterdir()):
            assert file.read_bytes() == (again.path / file.name).read_bytes()


@pytest.mark.parametrize(
    ("record_bytes", "n_columns", "unit_bytes", "expected"),
    [
        (768, 576, 16384, 16),  # exactly three pages
        (4096, 576, 16384, 3),  # no padding from 3 on: the smallest
        (5001, 100, 16384, 4),  # 10002 of 12288, 15003 of 16384, 20004 of 20480
        (70_000, 10, 16384, 1),  # more than a unit
        (64, 5, 16384, 5),  # all columns are less
        (1, 1 << 20, 4096, 4096),
        (4096, 10, 1, 1),
    ],
)
def test_columns_per_unit(record_bytes, n_columns, unit_bytes, expected):
    assert columns_per_unit(record_bytes, n_columns, unit_bytes) == expected


@pytest.mark.parametrize(
    ("record_bytes", "n_columns", "expected"),
    [
        (768, 16, 12288),  # whole pages
        (2048, 1, 4096),  # padding of 2048 is the most
        (2047, 1, 2047),
        (96, 42, 4096),
        (1000, 5, 5000),  # 3192 more would be padding
        (5000, 2, 10000),
        (5120, 2, 12288),
    ],
)
def test_unit_size(record_bytes, n_columns, expected):
    assert unit_size(record_bytes, n_columns) == expected


@pytest.fixture(scope="module")
def split_source(tmp_path_factory):
    pytest.importorskip("gguf")
    types = ("Q4_1", "Q5_0", "Q6_K")
    return write_split_gguf(tmp_path_factory.mktemp("split") / "x.gguf", types, 192, 256, n_layers=2)


@pytest.fixture
def split_bundle(split_source, tmp_path):
    """Input: 2 and 3 residual bits, 25 of 192 columns in a unit; GLU: 4 residual bits, 42 of 256 columns."""
    whole = Bundle.open(pack(split_source, tmp_path / "whole.dipper", tokenizer=False))
    options = {"base_bits": 2, "unit_bytes": 4096, "energies": energies_of(whole)}
    return Bundle.open(pack(split_source, tmp_path / "split.dipper", tokenizer=False, **options))


def test_residual_and_base_lie_where_the_format_says(split_source, split_bundle):
    """One code of the flash and the base records, found with nothing but the header's numbers."""
    region = split_bundle.header["regions"][2]
    assert (region["layer"], region["kind"], region["n_columns"]) == (1, "input", 192)
    plane = {"kind": "codes", "tier": "flash", "stride": 160}
    base_plane = {"kind": "codes", "tier": "base", "stride": 128}
    assert (region["record_bytes"], region["base"]["record_bytes"]) == (160, 128)
    assert [matrix["planes"] for matrix in region["matrices"]] == [
        [{"bits": 2, "shift": 0, "offset": 0, **plane}, {"bits": 2, "shift": 2, "offset": 0, **base_plane}],
        [
            {"bits": 2, "shift": 0, "offset": 64, **plane},
            {"bits": 1, "shift": 2, "offset": 128, **plane},
            {"bits": 2, "shift": 3, "offset": 64, **base_plane},
        ],
    ]
    position, row = 61, 150  # tile 1, row 22 of it: lane 6, field 1
    column, unit = region["order"][position], position // region["columns_per_unit"]
    assert position % region["columns_per_unit"] > 0
    assert unit > 0
    content = (split_bundle.path / "flash.bin").read_bytes()
    record = content[region["offset"] + unit * region["unit_bytes"] :]
    record = record[position % region["columns_per_unit"] * region["record_bytes"] :]
    base = content[region["base"]["offset"] + column * region["base"]["record_bytes"] :]
    low = int.from_bytes(record[64 + 32 + 6 * 2 :][:2], "little") >> 2 & 3
    middle = record[128 + 16 + 6] >> 1 & 1
    high = int.from_bytes(base[64 + 32 + 6 * 2 :][:2], "little") >> 2 & 3
    part = read_model(open_checkpoint(split_source)).parts["layers.1.up"]
    assert low | middle << 2 | high << 3 == int(part.rows(row, row + 1).codes[0, column])


def test_columns_are_ordered_by_energy_and_norm(split_source, split_bundle, tmp_path):
    whole = Bundle.open(tmp_path / "whole.dipper")
    energies = energies_of(whole)
    for region in split_bundle.header["regions"]:
        name = region_name(region)
        assert name == f"layers.{region['layer']}.{region['kind']}"
        norms = split_bundle.dequantise(f"{name}_residual").astype(np.float64)
        scores = energies[name].astype(np.float64) * norms**2
        assert region["order"] == sorted(range(len(scores)), key=lambda j: (-scores[j], j))
        assert region["order"] != sorted(region["order"])
    flat = {name: np.zeros(len(array)) for name, array in energies.items()}  # all equal: the lower index first
    equal = pack(split_source, tmp_path / "equal.dipper", tokenizer=False, base_bits=2, energies=flat)
    assert all(r["order"] == list(range(r["n_columns"])) for r in Bundle.open(equal).header["regions"])


def test_norms_of_residuals(split_source, split_bundle):
    parts = read_model(open_checkpoint(split_source)).parts
    for region, names in ((0, ("gate", "up")), (1, ("down",))):
        squares = 0
        for name in names:
            part = parts[f"layers.0.{name}"]
            rows = part.rows(0, part.shape[0])
            r, d = part.grid.bits - 2, rows.scales["d"].astype(float)
            s = np.repeat(d, part.grid.super_blocks, axis=1) * rows.scales["sub"] if "sub" in rows.scales else d
            residual = rows.codes % 2**r - (2**r - 1) / 2
            squares = squares + ((np.repeat(s, part.grid.group, axis=1) * residual) ** 2).sum(axis=0)
        norms = split_bundle.dequantise(("layers.0.input_residual", "layers.0.glu_residual")[region])
        np.testing.assert_allclose(norms, np.sqrt(squares), rtol=1e-6)


def test_bytes_of_a_split_bundle(split_bundle, tmp_path):
    whole, split = (Bundle.open(tmp_path / f"{name}.dipper") for name in ("whole", "split"))
    parts, before = split.bytes_by_part(), whole.bytes_by_part()
    assert parts["flash"] == {
        "input_records": 2 * 192 * 160, "glu_records": 2 * 256 * 96, "base_records": 2 * (192 * 128 + 256 * 48),
        "embedding": 0,
    }  # fmt: skip
    assert before["flash"] == {
        "input_records": 2 * 192 * (128 + 128 + 32), "glu_records": 2 * 256 * 144, "base_records": 0, "embedding": 0
    }  # fmt: skip
    assert split.mlp_bytes == whole.mlp_bytes
    assert parts["resident"] == {**before["resident"], "norms": before["resident"]["norms"] + 2 * 4 * (192 + 256)}
    described = split.describe()
    assert described["base_bits"] == {"gate": [2], "up": [2], "down": [2]}
    assert described["units"]["glu"] == [
        {"record_bytes": 96, "base_record_bytes": 48, "columns_per_unit": 42, "unit_bytes": 4096}
    ]
    assert described["record_bytes"] == {"input": [160], "glu": [96]}
    assert whole.describe()["base_bits"] == {"gate": [0], "up": [0], "down": [0]}


@pytest.mark.parametrize(
    ("where", "unit_bytes"),
    [
        ("unit", 4096),
        ("unit", 700),
        ("unit padding", 4096),
        ("padding of all units", 700),
        ("base", 4096),
        ("base padding", 700),
    ],
)
def test_a_flipped_byte_of_a_split_region_is_named(tmp_path, where, unit_bytes):
    pytest.importorskip("gguf")
    source = write_split_gguf(tmp_path / "x.gguf", ("Q4_0",) * 3, 192, 160, n_layers=2)
    bundle = Bundle.open(pack(source, tmp_path / "x.dipper", tokenizer=False, base_bits=2, unit_bytes=unit_bytes))
    region = bundle.header["regions"][3]
    base = region["base"]
    assert (region["unit_bytes"] % 4096 == 0) == (unit_bytes == 4096)
    at = {
        "unit": region["offset"] + 5,
        "unit padding": region["offset"] + region["unit_bytes"] - 1,
        "padding of all units": base["offset"] - 1,
        "base": base["offset"] + base["bytes"] - 1,
        "base padding": base["offset"] + -(-base["bytes"] // 4096) * 4096 - 1,
    }[where]
    file = bundle.path / "flash.bin"
    content = bytearray(file.read_bytes())
    if "padding" in where:
        assert content[at] == 0
    content[at] ^= 1
    file.write_bytes(content)
    part = "layer 1 glu base" if where.startswith("base") else "layer 1 glu columns"
    with pytest.raises(BundleError) as error:
        Bundle.open(bundle.path).verify()
    message = f"{file}: {part} do not match their checksum; the bundle is damaged: pack again"
    assert str(error.value) == message


HOSTILE_SPLIT = [
    ("regions", list, None),
    ("regions/0/columns_per_unit", 0, "columns_per_unit is 0, it must lie in 1..192"),
    ("regions/0/columns_per_unit", 193, "columns_per_unit is 193, it must lie in 1..192"),
    ("regions/0/columns_per_unit", True, "columns_per_unit is True"),
    ("regions/0/columns_per_unit", 1.0, "columns_per_unit is 1.0"),
    ("regions/0/columns_per_unit", KeyError, "'columns_per_unit' is missing"),
    ("regions/0/columns_per_unit", 1, "layers.0.input: bytes is"),
    ("regions/0/columns_per_unit", 60, "layers.0.input: unit_bytes is 4096, not 9600 or 12288"),
    ("regions/0/unit_bytes", 8192, "layers.0.input: unit_bytes is 8192, not 4000 or 4096"),
    ("regions/0/unit_bytes", 4096.0, "layers.0.input: unit_bytes is 4096.0, not 4000 or 4096"),
    ("regions/0/unit_bytes", 0, "layers.0.input: unit_bytes is 0, not 4000 or 4096"),
    ("regions/0/unit_bytes", 4000, "layers.0.input: bytes is 32768, not 32000"),
    ("regions/0/unit_bytes", 3999, "layers.0.input: unit_bytes is 3999, not 4000 or 4096"),
    ("regions/0/unit_bytes", "4096", "layers.0.input: unit_bytes is '4096', not 4000 or 4096"),
    ("regions/0/unit_bytes", KeyError, "'unit_bytes' is missing"),
    ("regions/0/record_bytes", 1, "stride"),
    ("regions/0/bytes", 192 * 160, "layers.0.input: bytes is 30720, not"),
    ("regions/0/order", lambda o: [o[0], *o[:-1]], "order is not a permutation of 192 columns"),
    ("regions/0/order", lambda o: o[:-1], "order is not a permutation of 192 columns"),
    ("regions/0/order", lambda o: [-j for j in o], "order is not a list of columns"),
    ("regions/0/order", None, ""),
    ("regions/0/base", None, "layers.0.input_residual: shape is [192], not [None]"),
    ("regions/0/base", 7, "the header is inconsistent"),
    ("regions/0/base/offset", lambda o: o + 4096, "layers.0.input base: offset is"),
    ("regions/0/base/offset", 0, "layers.0.input base: offset is 0, not"),
    ("regions/0/base/offset", KeyError, "'offset' is missing"),
    ("regions/0/base/record_bytes", 64, "stride"),
    ("regions/0/base/bytes", 4096, "layers.0.input base: bytes is 4096, not 24576"),
    ("regions/0/base/sha256", KeyError, "'sha256' is missing"),
    ("regions/0/offset", lambda o: o + 4096, "layers.0.input base: offset is"),
    ("regions/1/offset", 0, "layers.0.glu base: offset is"),
    ("regions/0/matrices/0/base_bits", 0, "layers.0.gate: base_bits is 0, and the region has a base"),
    ("regions/0/matrices/0/base_bits", 4, "q4 codes cannot be split with 4 base bits"),
    ("regions/0/matrices/0/base_bits", -1, "layers.0.gate: base_bits is -1"),
    ("regions/0/matrices/0/base_bits", True, "layers.0.gate: base_bits is True"),
    ("regions/0/matrices/0/base_bits", 1 << 70, "cannot be split"),
    ("regions/0/matrices/0/base_bits", 3, "layers.0.gate: q4 has 3 planes"),
    ("regions/0/matrices/0/codes", "q8", "q8 codes cannot be split with 2 base bits"),
    ("regions/1/matrices/0/base_bits", 1, "q6 codes with 1 base bits leave 5 residual bits"),
    ("regions/0/matrices/0/planes/1/tier", "flash", "plane is"),
    ("regions/0/matrices/0/planes/1/shift", 0, "plane is"),
    ("regions/0/matrices/0/planes/1/offset", 1, "plane is"),
    ("regions/0/matrices/0/planes", lambda p: p[::-1], "plane is"),
    ("tensors/layers.0.input_residual", KeyError, "tensors are missing, the first is ['layers.0.input_residual']"),
    ("tensors/layers.0.input_residual/shape", [256], "layers.0.input_residual: shape is [256], not [192]"),
    ("tensors/layers.0.input_residual/offset", 0, "overlap in resident.bin"),
    ("version", 1, "the header is inconsistent"),
]


@pytest.mark.parametrize(("path", "value", "message"), HOSTILE_SPLIT)
def test_hostile_headers_of_split_bundles(split_bundle, path, value, message):
    header = copy.deepcopy(split_bundle.header)
    change(path, value)(header)
    (split_bundle.path / "bundle.json").write_bytes(header_bytes(header))
    if not message:
        Bundle.open(split_bundle.path)
        return
    with pytest.raises(BundleError) as error:
        Bundle.open(split_bundle.path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_units_lie_padded_or_not(split_bundle):
    """A reader takes either; what lies behind the units follows from what they are."""
    header = copy.deepcopy(split_bundle.header)
    for region, padded, unpadded in zip(header["regions"], (8 * 4096, 7 * 4096) * 2, (4000, 4032) * 2, strict=True):
        assert (region["unit_bytes"], region["bytes"]) == (4096, padded)
        region["unit_bytes"], region["bytes"] = unpadded, padded // 4096 * unpadded
    (split_bundle.path / "bundle.json").write_bytes(header_bytes(header))
    opened = Bundle.open(split_bundle.path)  # the base's offset is the same: the region is padded to it
    assert opened.header["regions"][0]["bytes"] == 32000
    header["regions"][0]["base"]["offset"] -= 768
    (split_bundle.path / "bundle.json").write_bytes(header_bytes(header))
    with pytest.raises(BundleError, match=r"layers\.0\.input base: offset is 32000, not 32768"):
        Bundle.open(split_bundle.path)


def test_regions_that_overlap_a_base(split_bundle):
    """A region and its base, both moved over the base of another."""
    header = copy.deepcopy(split_bundle.header)
    first, second = header["regions"][:2]
    second["offset"] = first["base"]["offset"]
    second["base"]["offset"] = second["offset"] + second["bytes"]
    (split_bundle.path / "bundle.json").write_bytes(header_bytes(header))
    with pytest.raises(
        BundleError, match=r"layers\.0\.(glu|input base) and layers\.0\.(glu|input base) overlap in flash"
    ):
        Bundle.open(split_bundle.path)


def test_only_whole_regions_are_split(tmp_path):
    """Up at 8 bits keeps gate whole too; a Q4 region is whole where the base would be all of it."""
    pytest.importorskip("gguf")
    source = write_split_gguf(tmp_path / "x.gguf", ("Q4_0", "Q8_0", "Q4_0"), 96, 160)
    bundle = Bundle.open(pack(source, tmp_path / "x.dipper", tokenizer=False, base_bits=2))
    assert [region["base"] is None for region in bundle.header["regions"]] == [True, False]
    assert bundle.describe()["base_bits"] == {"gate": [0], "up": [0], "down": [2]}
    assert "layers.0.input_residual" not in bundle.header["tensors"]
    with pytest.raises(ConfigError) as error:
        pack(source, tmp_path / "y.dipper", tokenizer=False, base_bits=4)
    assert str(error.value) == (
        "base_bits is 4 and no region can be split: all its matrices need 4-, 5- or 6-bit codes of more bits than "
        "that, and the MLP has q4, q8; pack without base bits or with other --bits"
    )


@pytest.mark.parametrize(
    ("base_bits", "found"),
    [((2, 3), [2, 2, 3]), ((3, 2), [3, 3, 2]), ((0, 3), [0, 0, 3]), ((1, 0), [1, 1, 0]), ((0, 0), [0, 0, 0])],
)
def test_base_bits_by_kind(split_source, tmp_path, base_bits, found):
    whole = Bundle.open(pack(split_source, tmp_path / "whole.dipper", tokenizer=False))
    energies = energies_of(whole) if any(base_bits) else None
    split = Bundle.open(
        pack(split_source, tmp_path / "split.dipper", tokenizer=False, base_bits=base_bits, energies=energies)
    )
    split.verify()
    assert split.describe()["base_bits"] == {n: [b] for n, b in zip(("gate", "up", "down"), found, strict=True)}
    for region in split.header["regions"]:
        bits = base_bits[region["kind"] == "glu"]
        assert (region["base"] is not None) == (region["order"] is not None) == (bits > 0)
        assert (f"{region_name(region)}_residual" in split.header["tensors"]) == (bits > 0)
    for name in ("gate", "up", "down"):
        np.testing.assert_array_equal(split.dequantise(f"layers.1.{name}"), whole.dequantise(f"layers.1.{name}"))


@pytest.mark.parametrize("bits", [0, 2])
def test_one_number_of_base_bits_is_both(split_source, tmp_path, bits):
    one, two = (
        pack(split_source, tmp_path / f"{name}.dipper", tokenizer=False, base_bits=base_bits)
        for name, base_bits in (("one", bits), ("two", (bits, bits)))
    )
    for file in sorted(one.iterdir()):
        assert file.read_bytes() == (two / file.name).read_bytes()


def test_options_of_the_split_that_cannot_be(split_source, tmp_path):
    for options, message in (
        ({"base_bits": 5}, "base_bits is 5; it must lie in 0..4, or be two such numbers"),
        ({"base_bits": -1}, "base_bits is -1; it must lie in 0..4, or be two such numbers"),
        ({"base_bits": (2, 5)}, "base_bits is (2, 5); it must lie in 0..4, or be two such numbers"),
        ({"base_bits": (-1, 2)}, "base_bits is (-1, 2); it must lie in 0..4, or be two such numbers"),
        ({"base_bits": (2,)}, "base_bits is (2,); it must lie in 0..4, or be two such numbers"),
        ({"base_bits": (1, 2, 3)}, "base_bits is (1, 2, 3); it must lie in 0..4, or be two such numbers"),
        ({"base_bits": 2, "unit_bytes": 0}, "unit_bytes is 0; it must lie in 1..1073741824"),
        (
            {"base_bits": 1},
            "layers.0.down: q6 codes with 1 base bits leave 5 residual bits, and a part has at most 4; choose other "
            "base bits",
        ),
        (
            {"energies": {}},
            "energies order the columns of split regions, and base_bits is 0: give base bits, or no energies",
        ),
        (
            {"energies": {}, "base_bits": (0, 0)},
            "energies order the columns of split regions, and base_bits is 0: give base bits, or no energies",
        ),
    ):
        with pytest.raises(ConfigError) as error:
            pack(split_source, tmp_path / "x.dipper", tokenizer=False, **options)
        assert str(error.value) == message
    assert not list(tmp_path.iterdir())


def with_value(value: float):
    def change_it(array: np.ndarray) -> np.ndarray:
        return np.where(np.arange(len(array)) == 3, np.float32(value), array)

    return change_it


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("layers.1.glu", None, "the energies are of another model: they lack 'layers.1.glu'; measure them on this one"),
        (
            "layers.2.glu",
            lambda a: np.ones(3),
            "the energies are of another model: they have 'layers.2.glu', which is no region of it; measure them on "
            "this one",
        ),
        ("layers.0.glu", lambda a: a[1:], "the energies of layers.0.glu are float32 of shape [255], not 256 numbers; "),
        ("layers.0.glu", lambda a: a[None], "the energies of layers.0.glu are float32 of shape [1, 256], not 256 num"),
        ("layers.0.glu", lambda a: a > 1, "the energies of layers.0.glu are bool of shape [256], not 256 numbers; "),
        ("layers.0.glu", with_value(np.nan), "the energies of layers.0.glu have nan at column 3: mean squares are "),
        ("layers.0.glu", with_value(np.inf), "the energies of layers.0.glu have inf at column 3: "),
        ("layers.0.glu", with_value(-1), "the energies of layers.0.glu have -1.0 at column 3: "),
    ],
)  # fmt: skip
def test_energies_that_do_not_fit(split_source, tmp_path, name, value, message):
    energies = energies_of(Bundle.open(pack(split_source, tmp_path / "whole.dipper", tokenizer=False)))
    if value is None:
        del energies[name]
    else:
        energies[name] = value(energies.get(name))
    with pytest.raises(ConfigError) as error:
        pack(split_source, tmp_path / "x.dipper", tokenizer=False, base_bits=2, energies=energies)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["whole.dipper"]


def test_a_negative_token_id_is_none(tmp_path):
    """Some configurations write -1 for "none"; a header has no negative ids."""
    model = pack_hf(tmp_path, "llama", bos_token_id=-1, eos_token_id=[-1, 2]).model
    assert (model.bos_id, model.eos_ids) == (None, (2,))


# --- refusing to pack


def test_bits(tmp_path):
    source = tiny.write_hf(tmp_path / "m", "llama")
    with pytest.raises(ConfigError, match="bits is '5'; it must be one of source, 4, 8, 16"):
        pack(source, tmp_path / "x.dipper", "5", tokenizer=False)


@pytest.mark.parametrize("bits", ["4", "8"])
def test_quantising_twice_is_refused(tmp_path, bits):
    pytest.importorskip("gguf")
    source = tiny.write_gguf(tmp_path / "x.gguf", types={"ffn_up": "Q4_0"}, **GGUF_SIZES)
    message = rf"3 matrices are quantised already \(Q4_0\) and --bits {bits} would .*; use --bits source"
    with pytest.raises(ConfigError, match=message):
        pack(source, tmp_path / "x.dipper", bits, tokenizer=False)
    assert [p.name for p in tmp_path.iterdir()] == ["x.gguf"]


@pytest.mark.parametrize("bits", ["4", "8", "16"])
def test_weights_beyond_sixteen_bits(tmp_path, bits):
    source = tiny.write_hf(tmp_path / "m", "llama")
    arrays = tiny.tensors("llama")
    arrays["model.layers.1.mlp.up_proj.weight"][3, 3] = 1e5
    tiny.write_safetensors(source / "model.safetensors", arrays, "f32")
    with pytest.raises(CheckpointError, match=r"'model.layers.1.mlp.up_proj.weight' reaches 1e\+05, beyond the 65504"):
        pack(source, tmp_path / "x.dipper", bits, tokenizer=False)
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
    assert pack(source, tmp_path / "x.dipper", tokenizer=False).is_dir()


def test_broken_weights_leave_nothing(tmp_path):
    source = tiny.write_hf(tmp_path / "m", "llama")
    arrays = tiny.tensors("llama")
    arrays["model.layers.2.mlp.down_proj.weight"][3, 3] = np.nan
    tiny.write_safetensors(source / "model.safetensors", arrays, "f32")
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        pack(source, tmp_path / "x.dipper", tokenizer=False)
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def rename_once_then_stop(rename):
    """`os.rename` that is interrupted at its second call, and works again from the third."""
    calls = []

    def stopping(old, new):
        calls.append(old)
        if len(calls) == 2:
            raise KeyboardInterrupt
        rename(old, new)

    return stopping


def test_existing_output(tmp_path, monkeypatch):
    bundle = pack_hf(tmp_path, "llama")
    source = tmp_path / "llama-hf"
    with pytest.raises(BundleError, match="exists already; remove it, pack to another name, or pass --force"):
        pack(source, bundle.path, tokenizer=False)
    pack(source, bundle.path, "8", overwrite=True, tokenizer=False)
    assert Bundle.open(bundle.path).header["source"]["bits"] == "8"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["llama-hf", "llama-source.dipper"]
    monkeypatch.setattr(os, "rename", rename_once_then_stop(os.rename))
    with pytest.raises(KeyboardInterrupt):
        pack(source, bundle.path, "4", overwrite=True, tokenizer=False)
    assert Bundle.open(bundle.path).header["source"]["bits"] == "8"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["llama-hf", "llama-source.dipper"]
    other = tmp_path / "precious"
    other.mkdir()
    with pytest.raises(BundleError, match="is not a bundle, so it is not replaced"):
        pack(source, other, overwrite=True, tokenizer=False)


def test_missing_and_unwritable_folders_before_any_work(tmp_path, monkeypatch):
    absent = tmp_path / "absent.gguf"  # never opened: the folder is looked at first
    with pytest.raises(BundleError, match="there is no such folder; create it first"):
        pack(absent, tmp_path / "no" / "x.dipper", tokenizer=False)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(BundleError, match="this folder is not writable; pack to another folder"):
        pack(absent, tmp_path / "x.dipper", tokenizer=False)


def test_no_space_is_known_before_writing(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(100, 0, 50_000_000))
    source = tiny.write_hf(tmp_path / "m", "llama")
    with pytest.raises(BundleError, match=r"needs \d+ bytes and the disk has 50000000 free; free \d+ bytes first"):
        pack(source, tmp_path / "x.dipper", tokenizer=False)
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


# --- stopping midway: in a process of its own

PRELUDE = f"""
import os, resource, shutil, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs would inherit its being ignored
sys.path.insert(0, {SRC!r})
from dipper.bundle import pack
source, out = sys.argv[1:3]
def slowly(done, total):
    if done > total // 2:
        print("half", flush=True)
        time.sleep(20)
"""


def start(code: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PRELUDE + textwrap.dedent(code), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def stop_halfway(tmp_path: Path, number: signal.Signals) -> subprocess.Popen[str]:
    source = tiny.write_hf(tmp_path / "m", "llama")
    process = start("pack(source, out, progress=slowly, tokenizer=False)", source, tmp_path / "x.dipper")
    assert process.stdout is not None
    assert process.stdout.readline() == "half\n"
    process.send_signal(number)
    process.communicate(timeout=30)
    return process


def test_interrupt_leaves_nothing(tmp_path):
    process = stop_halfway(tmp_path, signal.SIGINT)
    assert process.returncode != 0
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_kill_leaves_no_bundle_and_the_next_pack_cleans_up(tmp_path):
    process = stop_halfway(tmp_path, signal.SIGKILL)
    partial = tmp_path / f"x.dipper.partial-{process.pid}"
    assert partial.is_dir()
    assert not (tmp_path / "x.dipper").exists()
    alive = tmp_path / f"x.dipper.partial-{os.getppid()}"  # of a process that still runs: not ours to remove
    alive.mkdir()
    pack(tmp_path / "m", tmp_path / "x.dipper", tokenizer=False)
    assert not partial.exists()
    assert alive.exists()
    Bundle.open(tmp_path / "x.dipper").verify()


FULL = """
shutil.disk_usage = lambda path: shutil._ntuple_diskusage(10**12, 0, 10**12)
try:
    pack(source, out, tokenizer=False)
except Exception as error:
    print(type(error).__name__, error)
print(sorted(os.listdir(os.path.dirname(out))))
"""


def test_file_size_limit_midway(tmp_path):
    source = tiny.write_hf(tmp_path / "m", "llama")
    (tmp_path / "out").mkdir()
    limit = "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))"
    output, errors = start(limit + FULL, source, tmp_path / "out" / "x.dipper").communicate(timeout=60)
    assert "BundleError" in output, errors
    assert "writing failed (File too large), nothing was left behind; make room or pack elsewhere" in output
    assert output.splitlines()[-1] == "[]"


def test_full_disk_midway(tmp_path):
    """A disk that fills up although it looked large enough: a small tmpfs in a mount namespace of its own."""
    probe = ["unshare", "--mount", "mount", "-t", "tmpfs", "-o", "size=300k", "none", str(tmp_path)]
    if not shutil.which("unshare") or subprocess.run(probe, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount")
    source = tiny.write_hf(tmp_path / "m", "llama")
    small = tmp_path / "small"
    small.mkdir()
    code = PRELUDE + FULL
    script = f'mount -t tmpfs -o size=300k none "{small}" && exec "$@"'
    command = [
        "unshare",
        "--mount",
        "sh",
        "-c",
        script,
        "sh",
        sys.executable,
        "-c",
        code,
        str(source),
        str(small / "x.dipper"),
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert "BundleError" in result.stdout, result.stderr
    assert "writing failed (the disk is full), nothing was left behind" in result.stdout
    assert result.stdout.splitlines()[-1] == "[]"


# --- memory

# VmHWM: ru_maxrss survives exec, so a child's can be that of the process which started it.
PEAK = """
status = open("/proc/self/status").read()
print(int(status.split("VmHWM:")[1].split()[0]) * 1024)
"""


def write_large(folder: Path, dtype: str, n_bytes: int) -> tuple[Path, int]:
    """A one-layer model whose tensors are holes in a sparse file; returns it and its largest tensor's bytes."""
    source = tiny.write_hf(folder / "m", "llama-tied", num_hidden_layers=1, hidden_size=1024, num_attention_heads=8)
    item = {"f32": 4, "bf16": 2}[dtype]
    inner = n_bytes // item // 1024
    shapes = {
        name: list(array.shape)
        for name, array in tiny.tensors(
            "llama-tied", num_hidden_layers=1, hidden_size=1024, num_attention_heads=8, num_key_value_heads=2
        ).items()
    }
    shapes |= {f"model.layers.0.mlp.{name}_proj.weight": [inner, 1024] for name in ("gate", "up")}
    shapes["model.layers.0.mlp.down_proj.weight"] = [1024, inner]
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "intermediate_size": inner, "num_key_value_heads": 2}))
    entries, offset = {}, 0
    for name, shape in shapes.items():
        end = offset + item * int(np.prod(shape))
        entries[name] = {"dtype": dtype.upper(), "shape": shape, "data_offsets": [offset, end]}
        offset = end
    header = json.dumps(entries).encode()
    with (source / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + offset)
    return source, inner * 1024 * item


def test_peak_memory_is_not_the_parents():
    """A child starts with its parent's ru_maxrss; what `test_peak_memory` reads is its own."""
    held = bytearray(b"x") * (300 << 20)
    output, errors = start(PEAK, "-", "-").communicate(timeout=60)
    assert output, errors
    assert int(output) < len(held)


@pytest.mark.parametrize(
    ("dtype", "bits", "base_bits"),
    [
        ("f32", "source", 0),
        ("bf16", "source", 0),
        ("bf16", "16", 0),
        ("bf16", "8", 0),
        ("f32", "4", 0),
        ("f32", "4", 2),
    ],
)
def test_peak_memory(tmp_path, dtype, bits, base_bits):
    source, largest = write_large(tmp_path, dtype, 48 << 20)
    code = f"pack(source, out, {bits!r}, tokenizer=False, base_bits={base_bits})\n" + PEAK
    output, errors = start(code, source, tmp_path / "x.dipper").communicate(timeout=300)
    assert output, errors
    assert int(output) <= 2 * largest + 200_000_000
