"""Tiny random checkpoints of every architecture, with awkward sizes; made with numpy alone or through transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

# One entry per kind of checkpoint: what differs from _BASE. Sizes are awkward on purpose: inner sizes that are no
# multiple of 64 or 128, hidden sizes that are no multiple of 32, heads wider than hidden / heads.
_BASE: dict[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 96,
    "intermediate_size": 176,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LONGROPE = {
    "type": "longrope",
    "short_factor": [1.0 + i / 20 for i in range(12)],
    "long_factor": [1.5 + i for i in range(12)],
}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama-tied": {"model_type": "llama", "tie_word_embeddings": True, "num_key_value_heads": 6},
    "llama-llama3": {"model_type": "llama", "rope_scaling": _LLAMA3},
    "llama-linear": {"model_type": "llama", "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "llama-yarn": {
        "model_type": "llama",
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    },
    "llama-bias": {"model_type": "llama", "attention_bias": True},
    "mistral": {"model_type": "mistral", "sliding_window": 8},
    "qwen2": {
        "model_type": "qwen2",
        "hidden_size": 80,
        "num_attention_heads": 4,
        "intermediate_size": 200,
        "tie_word_embeddings": True,
    },
    "qwen2-window": {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    "qwen3": {
        "model_type": "qwen3",
        "hidden_size": 64,
        "num_attention_heads": 4,
        "head_dim": 24,
        "intermediate_size": 100,
    },
    "phi3": {
        "model_type": "phi3",
        "num_attention_heads": 4,
        "intermediate_size": 136,
        "original_max_position_embeddings": 64,
        "rope_scaling": _LONGROPE,
        "pad_token_id": 0,
    },
    "phi3-window": {
        "model_type": "phi3",
        "num_attention_heads": 4,
        "sliding_window": 7,
        "pad_token_id": 0,
        "original_max_position_embeddings": 128,
    },
    "gemma3": {
        "model_type": "gemma3_text",
        "hidden_size": 72,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "intermediate_size": 160,
        "num_hidden_layers": 7,
        "sliding_window": 8,
        "sliding_window_pattern": 3,
        "query_pre_attn_scalar": 20,
        "rope_theta": 1e6,
        "rope_local_base_freq": 10000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "tie_word_embeddings": True,
        "hidden_activation": "gelu_pytorch_tanh",
    },
}
# One name per architecture, for tests that need not see every variant.
ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma3")


def config(kind: str, **changes: Any) -> dict[str, Any]:
    """config.json of a tiny model, as a dict; a change of None removes the key."""
    merged = {**_BASE, **CONFIGS[kind], **changes}
    return {key: value for key, value in merged.items() if value is not None}


def tensors(kind: str, seed: int = 0, **changes: Any) -> dict[str, np.ndarray]:
    """The fp32 tensors of a tiny model by their Hugging Face names."""
    c, rng = config(kind, **changes), np.random.default_rng(seed)
    hidden, inner, n_heads, n_kv = (
        c["hidden_size"],
        c["intermediate_size"],
        c["num_attention_heads"],
        c["num_key_value_heads"],
    )
    head_dim = c.get("head_dim", hidden // n_heads)
    q_rows, kv_rows = n_heads * head_dim, n_kv * head_dim
    model = c["model_type"]
    out: dict[str, np.ndarray] = {}

    def matrix(name: str, rows: int, inputs: int) -> None:
        out[name] = rng.normal(0, 1.2 / np.sqrt(inputs), (rows, inputs)).astype(np.float32)

    def vector(name: str, length: int, centre: float, spread: float = 0.2) -> None:
        out[name] = (centre + spread * rng.normal(size=length)).astype(np.float32)

    norm_centre = 0.0 if model == "gemma3_text" else 1.0
    matrix("model.embed_tokens.weight", c["vocab_size"], hidden)
    for n in range(c["num_hidden_layers"]):
        at = f"model.layers.{n}."
        if model == "phi3":
            matrix(at + "self_attn.qkv_proj.weight", q_rows + 2 * kv_rows, hidden)
            matrix(at + "mlp.gate_up_proj.weight", 2 * inner, hidden)
        else:
            for name, rows in (("q", q_rows), ("k", kv_rows), ("v", kv_rows)):
                matrix(f"{at}self_attn.{name}_proj.weight", rows, hidden)
                if model == "qwen2" or c.get("attention_bias"):
                    vector(f"{at}self_attn.{name}_proj.bias", rows, 0.0)
            matrix(at + "mlp.gate_proj.weight", inner, hidden)
            matrix(at + "mlp.up_proj.weight", inner, hidden)
        matrix(at + "self_attn.o_proj.weight", hidden, q_rows)
        if c.get("attention_bias"):
            vector(at + "self_attn.o_proj.bias", hidden, 0.0)
        matrix(at + "mlp.down_proj.weight", hidden, inner)
        norms = ["input_layernorm", "post_attention_layernorm"]
        if model == "gemma3_text":
            norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
        for name in norms:
            vector(f"{at}{name}.weight", hidden, norm_centre)
        if model in ("qwen3", "gemma3_text"):
            vector(at + "self_attn.q_norm.weight", head_dim, norm_centre)
            vector(at + "self_attn.k_norm.weight", head_dim, norm_centre)
    vector("model.norm.weight", hidden, norm_centre)
    if not c["tie_word_embeddings"]:
        matrix("lm_head.weight", c["vocab_size"], hidden)
    return out


def to_bf16(values: np.ndarray) -> np.ndarray:
    """fp32 -> raw bf16 bits, rounded to nearest even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def write_safetensors(path: Path, arrays: dict[str, np.ndarray], dtype: str) -> None:
    """A safetensors file; ``dtype`` is f32, f16 or bf16."""
    entries, blobs, offset = {}, [], 0
    for name, array in arrays.items():
        blob = (to_bf16(array) if dtype == "bf16" else array.astype({"f32": "<f4", "f16": "<f2"}[dtype])).tobytes()
        entries[name] = {
            "dtype": dtype.upper(),
            "shape": list(array.shape),
            "data_offsets": [offset, offset + len(blob)],
        }
        blobs.append(blob)
        offset += len(blob)
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"".join(blobs))


def write_hf(folder: Path, kind: str, *, dtype: str = "f32", n_shards: int = 1, seed: int = 0, **changes: Any) -> Path:
    """A Hugging Face folder without a tokenizer: config.json and safetensors (with an index when sharded)."""
    folder.mkdir(parents=True, exist_ok=True)
    torch_dtype = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}[dtype]
    (folder / "config.json").write_text(json.dumps({**config(kind, **changes), "torch_dtype": torch_dtype}))
    arrays = tensors(kind, seed, **changes)
    if n_shards == 1:
        write_safetensors(folder / "model.safetensors", arrays, dtype)
        return folder
    weight_map = {}
    for shard in range(n_shards):
        name = f"model-{shard + 1:05d}-of-{n_shards:05d}.safetensors"
        part = {key: arrays[key] for key in list(arrays)[shard::n_shards]}
        write_safetensors(folder / name, part, dtype)
        weight_map.update(dict.fromkeys(part, name))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def save_with_transformers(folder: Path, kind: str, *, dtype: str = "float32", seed: int = 0, **changes: Any) -> Path:
    """The same kind of model made by transformers itself (needs torch and transformers)."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    values = config(kind, **changes)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(values.pop("model_type"), **values))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms and biases start constant, where a mistake would not show
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    return folder


# --- vocabularies -----------------------------------------------------------------------------------------------------

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + "
    "'\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def byte_alphabet() -> list[str]:
    """The 256 characters of byte-level BPE by byte value."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return [chr(b) if b in printable else chr(256 + others.index(b)) for b in range(256)]


def bpe_keys(**changes: Any) -> dict[str, Any]:
    """256 bytes, ids by byte value; "he" 256, "ll" 257, "hell" 258, "Ġhe" 259; then special tokens from 260."""
    tokens = [*byte_alphabet(), "he", "ll", "hell", "Ġhe", "<|im_start|>", "<|im_end|>", "<tool>", "[PAD]"]
    keys = {
        "ggml.model": "gpt2",
        "ggml.pre": "smollm",
        "ggml.tokens": tokens,
        "ggml.token_type": [NORMAL] * 260 + [CONTROL, CONTROL, USER_DEFINED, UNUSED],
        "ggml.merges": ["h e", "l l", "he ll", "Ġ he"],
        "ggml.bos_token_id": 260,
        "ggml.eos_token_id": 261,
        "ggml.add_bos_token": False,
        "chat_template": CHATML,
    }
    return {k: v for k, v in {**keys, **changes}.items() if v is not None}


def add_vocabulary(writer: Any, keys: dict[str, Any]) -> None:
    """Write a vocabulary's keys into a GGUF."""
    for key, value in keys.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string, list: writer.add_array}
        add[type(value)](f"tokenizer.{key}", value)


# --- GGUF -------------------------------------------------------------------------------------------------------------

# type -> (inputs in a block, bytes of a block, offsets of its f16 fields).
BLOCKS = {
    "Q4_0": (32, 18, (0,)),
    "Q4_1": (32, 20, (0, 2)),
    "Q5_0": (32, 22, (0,)),
    "Q5_1": (32, 24, (0, 2)),
    "Q8_0": (32, 34, (0,)),
    "Q4_K": (256, 144, (0, 2)),
    "Q5_K": (256, 176, (0, 2)),
    "Q6_K": (256, 210, (208,)),
}


def random_blocks(type_name: str, rows: int, inputs: int, rng: np.random.Generator) -> np.ndarray:
    """Random raw rows ``[rows, row_bytes]`` of a GGUF block type whose scales are finite and small."""
    block, n_bytes, f16_fields = BLOCKS[type_name]
    raw = rng.integers(0, 256, (rows, inputs // block, n_bytes), dtype=np.uint8)
    for offset in f16_fields:
        scales = rng.normal(0, 2e-3, raw.shape[:2]).astype("<f2")
        raw[..., offset : offset + 2] = scales[..., None].view(np.uint8)
    return raw.reshape(rows, -1)


def write_gguf(
    path: Path,
    kind: str = "llama-tied",
    types: dict[str, str] | None = None,
    seed: int = 0,
    vocabulary: dict[str, Any] | None = None,
    **changes: Any,
) -> Path:
    """A tiny GGUF of any kind in `CONFIGS`, made with the `gguf` package.

    Args:
        types: source name inside a layer (``ffn_up`` ...) or ``token_embd``/``output`` -> block type; F32 elsewhere.
        vocabulary: such as `bpe_keys`, whose pieces must not outnumber the rows of the embedding; none when None.
    """
    import gguf

    c = config(kind, **changes)
    writer = gguf.GGUFWriter(path, c["model_type"].removesuffix("_text").replace("mistral", "llama"))
    _add_gguf_metadata(writer, c)
    add_vocabulary(writer, vocabulary or {})
    rng = np.random.default_rng(seed)
    for name, array in gguf_tensors(kind, seed, **changes).items():
        short = name.removesuffix(".weight").rsplit(".", 1)[-1]
        type_name = (types or {}).get(short)
        if type_name is None or array.ndim == 1:
            writer.add_tensor(name, array)
        elif type_name in ("F16", "BF16"):
            data = array.astype("<f2") if type_name == "F16" else to_bf16(array).view(np.uint8)
            writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[type_name])
        else:
            raw = random_blocks(type_name, *array.shape, rng)
            writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType[type_name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_gguf_metadata(writer: Any, c: dict[str, Any]) -> None:
    import gguf

    writer.add_name(f"tiny {c['model_type']}")
    writer.add_context_length(c["max_position_embeddings"])
    writer.add_embedding_length(c["hidden_size"])
    writer.add_block_count(c["num_hidden_layers"])
    writer.add_feed_forward_length(c["intermediate_size"])
    writer.add_head_count(c["num_attention_heads"])
    writer.add_head_count_kv(c["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(c["rms_norm_eps"])
    writer.add_rope_freq_base(c["rope_theta"])
    if "head_dim" in c:
        writer.add_key_length(c["head_dim"])
        writer.add_value_length(c["head_dim"])
    if "sliding_window" in c and c.get("use_sliding_window", True):
        writer.add_sliding_window(c["sliding_window"])
    if "sliding_window_pattern" in c:
        writer.add_sliding_window_pattern(c["sliding_window_pattern"])
    if "query_pre_attn_scalar" in c:
        writer.add_attention_scale(c["query_pre_attn_scalar"] ** -0.5)
    scaling = c.get("rope_scaling", {})
    if scaling.get("rope_type") in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(scaling["rope_type"]))
        writer.add_rope_scaling_factor(scaling["factor"])
    original = c.get("original_max_position_embeddings") or scaling.get("original_max_position_embeddings")
    if original:
        writer.add_rope_scaling_orig_ctx_len(original)


_GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.qkv_proj": "attn_qkv",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_GGUF_GEMMA_NAMES = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def gguf_tensors(kind: str, seed: int = 0, **changes: Any) -> dict[str, np.ndarray]:
    """`tensors` as that format has them: its names, Llama's q and k rows pairing neighbours, Gemma's norms as 1 + w."""
    c = config(kind, **changes)
    is_llama, is_gemma = c["model_type"] in ("llama", "mistral"), c["model_type"] == "gemma3_text"
    names = _GGUF_NAMES | (_GGUF_GEMMA_NAMES if is_gemma else {})
    top = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    out = {}
    for name, array in tensors(kind, seed, **changes).items():
        stem, suffix = name.rsplit(".", 1)
        if is_gemma and stem.endswith("norm"):
            array = array + np.float32(1)
        if stem in top:
            out[f"{top[stem]}.{suffix}"] = array
            continue
        layer, inner = stem.removeprefix("model.layers.").split(".", 1)
        heads = {"self_attn.q_proj": c["num_attention_heads"], "self_attn.k_proj": c["num_key_value_heads"]}.get(inner)
        if heads and is_llama:
            array = array.reshape(heads, 2, -1, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
        out[f"blk.{layer}.{names[inner]}.{suffix}"] = array
    scaling = c.get("rope_scaling", {})
    for name in ("short_factor", "long_factor"):
        if name in scaling:
            out[f"rope_factors_{name.split('_')[0]}.weight"] = np.array(scaling[name], np.float32)
    if scaling.get("rope_type") == "llama3":
        out["rope_freqs.weight"] = _llama3_factors(c, scaling)
    return out


def _llama3_factors(c: dict[str, Any], scaling: dict[str, Any]) -> np.ndarray:
    """What GGUF conversion stores for Llama 3: the divisor of each frequency, element by element."""
    dim = c["hidden_size"] // c["num_attention_heads"]
    factors = []
    for i in range(dim // 2):
        wavelength = 2 * np.pi * c["rope_theta"] ** (2 * i / dim)
        turns = scaling["original_max_position_embeddings"] / wavelength
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        if turns > high:
            factors.append(1.0)
        elif turns < low:
            factors.append(scaling["factor"])
        else:
            smooth = (turns - low) / (high - low)
            factors.append(1 / ((1 - smooth) / scaling["factor"] + smooth))
    return np.array(factors, np.float32)
