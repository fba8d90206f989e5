"""Every source format against an independent reader, and every way a source can be bad."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest

import tiny
from dipper import checkpoint
from dipper.checkpoint import Tensor, open_checkpoint
from dipper.errors import CheckpointError
from dipper.glu import ModelConfig, read_model
from dipper.grid import dequantise

gguf = pytest.importorskip("gguf")

QUANTISED = list(tiny.BLOCKS)
LAYER_NAMES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


def weights(tensor: Tensor) -> np.ndarray:
    return dequantise(tensor.grid, tensor.rows(0, tensor.n_rows))


# --- values


@pytest.mark.parametrize("type_name", QUANTISED)
def test_gguf_types_equal_the_gguf_package(tmp_path, type_name):
    kind = gguf.GGMLQuantizationType[type_name]
    raw = tiny.random_blocks(type_name, 24, 1024, np.random.default_rng(5))
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_tensor("t", raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tensor = open_checkpoint(tmp_path / "x.gguf").tensors["t"]
    assert tensor.shape == (24, 1024)
    assert tensor.type_name == type_name
    np.testing.assert_array_equal(weights(tensor), gguf.quants.dequantize(raw, kind))
    np.testing.assert_array_equal(dequantise(tensor.grid, tensor.rows(7, 9)), weights(tensor)[7:9])


@pytest.mark.parametrize("type_name", ["F16", "BF16", "F32"])
def test_gguf_float_types(tmp_path, type_name):
    types = {} if type_name == "F32" else {"ffn_up": type_name}
    path = tiny.write_gguf(tmp_path / "x.gguf", types=types)
    tensor = open_checkpoint(path).tensors["blk.0.ffn_up.weight"]
    expected = tiny.gguf_tensors("llama-tied")["blk.0.ffn_up.weight"]
    if type_name == "F16":
        expected = expected.astype(np.float16).astype(np.float32)
    if type_name == "BF16":
        expected = (tiny.to_bf16(expected).astype(np.uint32) << 16).view(np.float32)
    assert tensor.type_name == type_name
    np.testing.assert_array_equal(weights(tensor), expected)


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("n_shards", [1, 3])
def test_safetensors(tmp_path, dtype, n_shards):
    folder = tiny.write_hf(tmp_path / "m", "llama", dtype=dtype, n_shards=n_shards)
    opened = open_checkpoint(folder)
    arrays = tiny.tensors("llama")
    assert set(opened.tensors) == set(arrays)
    assert len(opened.files) == n_shards + 1
    for name, array in arrays.items():
        tensor = opened.tensors[name]
        assert tensor.shape == array.shape
        got = tensor.vector() if array.ndim == 1 else weights(tensor)
        if dtype == "f32":
            np.testing.assert_array_equal(got, array)
        else:
            np.testing.assert_allclose(got, array, rtol=2**-8, atol=1e-6)


def test_safetensors_equal_the_safetensors_package(tmp_path):
    numpy_reader = pytest.importorskip("safetensors.numpy")
    folder = tiny.write_hf(tmp_path / "m", "qwen2", dtype="f16")
    expected = numpy_reader.load_file(folder / "model.safetensors")
    tensors = open_checkpoint(folder).tensors
    assert set(tensors) == set(expected)
    for name, array in expected.items():
        got = tensors[name].rows(0, tensors[name].n_rows).codes
        np.testing.assert_array_equal(got.reshape(array.shape), array)


def test_digest_depends_on_every_file(tmp_path):
    folder = tiny.write_hf(tmp_path / "m", "llama", n_shards=2)
    before = open_checkpoint(folder).sha256()
    config = folder / "config.json"
    config.write_text(config.read_text() + "\n")
    assert open_checkpoint(folder).sha256() != before


# --- models


@pytest.mark.parametrize("kind", tiny.CONFIGS)
def test_every_architecture_is_understood(tmp_path, kind):
    model = read_model(open_checkpoint(tiny.write_hf(tmp_path / "m", kind)))
    config, source = model.config, tiny.config(kind)
    assert config.n_layers == len(config.layers) == source["num_hidden_layers"]
    assert config.tied == source["tie_word_embeddings"]
    assert ("embedding" in model.parts) != config.tied
    assert all(name in model.vectors for table in config.rope for name in (table.short, table.long) if name)
    assert ModelConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_fused_tensors_are_split_and_gemma_norms_raised(tmp_path):
    arrays = tiny.tensors("phi3")
    model = read_model(open_checkpoint(tiny.write_hf(tmp_path / "phi", "phi3")))
    fused = arrays["model.layers.1.mlp.gate_up_proj.weight"]
    up = model.parts["layers.1.up"]
    np.testing.assert_array_equal(up.rows(0, 136).codes, fused[136:])
    fused = arrays["model.layers.1.self_attn.qkv_proj.weight"]
    np.testing.assert_array_equal(model.parts["layers.1.k"].rows(3, 48).codes, fused[96 + 3 : 96 + 48])
    model = read_model(open_checkpoint(tiny.write_hf(tmp_path / "gemma", "gemma3")))
    norm = tiny.tensors("gemma3")["model.layers.2.pre_feedforward_layernorm.weight"]
    np.testing.assert_array_equal(model.parts["layers.2.mlp_norm"].vector(), norm + np.float32(1))


def test_windows_follow_the_architecture(tmp_path):
    def windows(kind, **changes):
        folder = tiny.write_hf(tmp_path / f"{kind}{len(changes)}", kind, **changes)
        return [layer.window for layer in read_model(open_checkpoint(folder)).config.layers]

    assert windows("llama") == [0, 0, 0]
    assert windows("mistral") == [8, 8, 8]
    assert windows("mistral", sliding_window=None) == [4096, 4096, 4096]  # what that key's absence means there
    assert windows("qwen2") == [0, 0, 0]
    assert windows("qwen2-window") == [0, 6, 6]
    assert windows("phi3-window") == [7, 7, 7]
    assert windows("gemma3") == [8, 8, 0, 8, 8, 0, 8]
    layer_types = ["full_attention", *["sliding_attention"] * 6]
    assert windows("gemma3", layer_types=layer_types) == [0, 8, 8, 8, 8, 8, 8]


# qwen2's windows begin at a layer that GGUF does not name
@pytest.mark.parametrize("kind", [kind for kind in tiny.CONFIGS if kind != "qwen2-window"])
def test_gguf_and_hugging_face_of_one_model_agree(tmp_path, kind):
    """Llama's interleaved q and k rows, biases included, come back in rotate-half order; so does everything else."""
    from_gguf = read_model(open_checkpoint(tiny.write_gguf(tmp_path / "x.gguf", kind)))
    from_hf = read_model(open_checkpoint(tiny.write_hf(tmp_path / "hf", kind)))
    assert set(from_gguf.parts) == set(from_hf.parts)
    for name, part in from_hf.parts.items():
        other = from_gguf.parts[name]
        assert other.shape == part.shape
        if len(part.shape) == 1:
            np.testing.assert_array_equal(other.vector(), part.vector())
        else:
            np.testing.assert_array_equal(other.rows(0, part.shape[0]).codes, part.rows(0, part.shape[0]).codes)
            np.testing.assert_array_equal(other.rows(5, 19).codes, part.rows(5, 19).codes)
    ours, theirs = from_gguf.config.to_json(), from_hf.config.to_json()
    for key in ours.keys() - {"name", "bos_id", "eos_ids"}:
        if key == "attention_scale":  # fp32 in GGUF
            assert ours[key] == pytest.approx(theirs[key], rel=1e-7)
        else:
            assert ours[key] == theirs[key]
    assert set(from_gguf.vectors) == set(from_hf.vectors)
    for name, vector in from_hf.vectors.items():
        np.testing.assert_allclose(from_gguf.vectors[name], vector, rtol=1e-6)


# --- what can be bad


def expect(message: str):
    return pytest.raises(CheckpointError, match=message)


def test_nothing_there(tmp_path):
    with expect("there is no such file or folder; give a .gguf file or a Hugging Face folder"):
        open_checkpoint(tmp_path / "absent")


def test_wrong_magic(tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(b"PK\3\4 not a model")
    with expect("starts with b'PK.*', not with b'GGUF'; give a .gguf file"):
        open_checkpoint(path)
    path.write_bytes(b"")
    with expect("starts with b''"):
        open_checkpoint(path)


def test_gguf_version(tmp_path):
    path = tmp_path / "x.gguf"
    for version in (1, 4, 0x03000000):
        path.write_bytes(b"GGUF" + struct.pack("<IQQ", version, 0, 0))
        with expect(f"GGUF version {version} is not one that dipper reads"):
            open_checkpoint(path)


def test_truncated_gguf_anywhere(tmp_path):
    whole = tiny.write_gguf(tmp_path / "x.gguf", types={"ffn_up": "Q4_0"}).read_bytes()
    path = tmp_path / "cut.gguf"
    rng = np.random.default_rng(0)
    for length in [4, 10, 23, 24, 100, *rng.integers(100, len(whole) - 1000, 30), len(whole) - 100]:
        path.write_bytes(whole[:length])
        with expect("download it again"):
            open_checkpoint(path)


def test_hostile_gguf_header_never_escapes(tmp_path):
    """Flipped header bytes either parse or raise CheckpointError."""
    whole = bytearray(tiny.write_gguf(tmp_path / "x.gguf").read_bytes())
    header = whole.index(b"blk.0.attn_q.weight") + 200
    path = tmp_path / "flipped.gguf"
    rng = np.random.default_rng(1)
    for at in rng.integers(4, header, 300):
        flipped = whole.copy()
        flipped[at] ^= int(rng.integers(1, 256))
        path.write_bytes(flipped)
        try:
            read_model(open_checkpoint(path))
        except CheckpointError as error:
            assert "\n" not in str(error)  # noqa: PT017 - some flips are harmless, so nothing is expected to raise


def test_split_gguf(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_uint16("split.count", 3)
    writer.add_uint16("split.no", 1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with expect("is part 2 of 3; merge the parts first"):
        open_checkpoint(tmp_path / "x.gguf")


def test_unknown_architecture(tmp_path):
    path = tiny.write_gguf(tmp_path / "x.gguf")
    path.write_bytes(path.read_bytes().replace(b"llama", b"mamba"))
    with expect("the architecture is 'mamba', which dipper does not know; it knows llama, qwen2, qwen3, phi3, gemma3"):
        read_model(open_checkpoint(path))
    folder = tiny.write_hf(tmp_path / "m", "llama")
    rewrite_config(folder, model_type="gpt2")
    with expect("the architecture is 'gpt2', which dipper does not know; it knows llama, mistral, qwen2"):
        read_model(open_checkpoint(folder))


def rewrite_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    config.update(changes)
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_local_experts": 8}, "the model has 8 experts"),
        (
            {"intermediate_size": 180},
            r"down_proj.weight' has the shape \(96, 176\) and the metadata asks for \(96, 180\)",
        ),
        ({"hidden_act": "relu"}, "the activation is 'relu'"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2}}, "RoPE scaling 'dynamic' is not one of"),
        ({"rope_scaling": {"rope_type": "linear"}}, "the metadata lacks 'factor'"),
        ({"hidden_size": None}, "the metadata lacks 'hidden_size'"),
        ({"hidden_size": "big"}, "the metadata is wrong"),
        ({"num_key_value_heads": 4}, "n_heads 6 is not a multiple of n_kv_heads 4"),
        ({"num_hidden_layers": 4}, "tensor 'model.layers.3.* is missing"),
        ({"num_hidden_layers": 2}, "9 tensors are not part of a llama model as dipper knows it"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised with 'gptq', which dipper does not read"),
    ],
)
def test_bad_config(tmp_path, changes, message):
    folder = tiny.write_hf(tmp_path / "m", "llama")
    rewrite_config(folder, **changes)
    with expect(message):
        read_model(open_checkpoint(folder))


def test_missing_tensor_gguf(tmp_path):
    path = tiny.write_gguf(tmp_path / "x.gguf")
    path.write_bytes(path.read_bytes().replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_xx.weight"))
    with expect("tensor 'blk.1.ffn_up.weight' is missing; the checkpoint is incomplete"):
        read_model(open_checkpoint(path))


def test_unsupported_gguf_type(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    kind = gguf.GGMLQuantizationType.IQ4_NL
    writer.add_tensor("t", np.zeros((4, 18), np.uint8), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tensor = open_checkpoint(tmp_path / "x.gguf").tensors["t"]
    with expect("tensor 't' is IQ4_NL, which dipper does not read; use a file with BF16, F16, F32, Q4_0, Q4_1, Q4_K"):
        tensor.rows(0, 1)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_broken_weights(tmp_path, value, dtype):
    folder = tiny.write_hf(tmp_path / "m", "llama", dtype=dtype)
    arrays = tiny.tensors("llama")
    arrays["model.layers.0.mlp.up_proj.weight"][70, 3] = value
    tiny.write_safetensors(folder / "model.safetensors", arrays, dtype)
    tensor = open_checkpoint(folder).tensors["model.layers.0.mlp.up_proj.weight"]
    tensor.rows(0, 70)
    with expect("'model.layers.0.mlp.up_proj.weight' has a weight that is NaN or infinite in row 70"):
        tensor.rows(64, 128)


@pytest.mark.parametrize("type_name", QUANTISED)
def test_broken_scales(tmp_path, type_name):
    block, n_bytes, f16_fields = tiny.BLOCKS[type_name]
    kind = next(t for t in checkpoint._GGUF_TYPES.values() if t.name == type_name)
    path = tmp_path / "rows"
    tensor = Tensor("t", (12, 2 * block), path, 0, kind, type_name)
    for field in f16_fields:
        for value in (np.nan, np.inf):
            raw = tiny.random_blocks(type_name, 12, 2 * block, np.random.default_rng(0)).reshape(12, 2, n_bytes)
            raw[9, 1, field : field + 2] = np.array([value], "<f2").view(np.uint8)
            path.write_bytes(raw.tobytes())
            tensor.rows(0, 9)
            with expect("tensor 't' has a scale that is NaN or infinite in row 9"):
                tensor.rows(4, 12)


def test_truncated_and_malformed_shards(tmp_path):
    folder = tiny.write_hf(tmp_path / "m", "llama", n_shards=2)
    shard = folder / "model-00002-of-00002.safetensors"
    whole = shard.read_bytes()
    for length in (0, 7, 8, 100, len(whole) - 1):
        shard.write_bytes(whole[:length])
        with expect("download it again"):
            open_checkpoint(folder)
    shard.write_bytes(struct.pack("<Q", 4) + b"[1]x")
    with expect("safetensors header is malformed"):
        open_checkpoint(folder)
    shard.unlink()
    with expect("model-00002-of-00002.safetensors named by the index is missing"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 60]}, r"shape \(4, 4\) in F32 has 60 bytes"),
        ({"dtype": "F32", "shape": [4, 4], "data_offsets": [64, 128]}, "ends at byte"),
        ({"dtype": "F32", "shape": [4, -4], "data_offsets": [0, -64]}, "the file is damaged"),
        ({"dtype": "F32", "data_offsets": [0, 64]}, "header is malformed"),
    ],
)
def test_hostile_safetensors_entries(tmp_path, entry, message):
    folder = tiny.write_hf(tmp_path / "m", "llama")
    header = json.dumps({"t": entry}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(64))
    with expect(message):
        open_checkpoint(folder)


def test_folders_without_weights_or_config(tmp_path):
    with expect("has no config.json"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with expect("has no .safetensors files; dipper does not read pickled weights"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with expect("is not JSON"):
        open_checkpoint(tmp_path)


def test_a_file_cut_after_opening(tmp_path):
    path = tiny.write_gguf(tmp_path / "x.gguf")
    tensor = list(open_checkpoint(path).tensors.values())[-1]
    path.write_bytes(path.read_bytes()[:-40_000])
    with expect("the file is cut: download it again"):
        tensor.rows(0, tensor.n_rows)
