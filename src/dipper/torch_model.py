"""Any source of a model as a Hugging Face model: bundles, GGUF files, folders, and names that `pull` knows.

A bundle, a GGUF and a folder of a known architecture go through dipper's own readers, one tensor at a time: what
PyTorch computes with is what the engine computes with, dequantised. A GGUF and the bundle packed from it in its own
grid (`--bits source`) give the same logits, bit for bit. A folder of another architecture is transformers' own affair.

    loaded = load_model("smollm2")
    ids = loaded.encode("The sea is")
    logits = loaded.model(input_ids=torch.tensor([ids])).logits  # [1, T, V]

Needs the `torch` extra; importing this module without it is a `ConfigError`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dipper.bundle import Bundle
from dipper.checkpoint import open_checkpoint, read_hf_config
from dipper.errors import CheckpointError, ConfigError
from dipper.glu import HF_TYPES, ModelConfig, architecture_of, read_model
from dipper.grid import F32, CodedRows, Grid
from dipper.sources import pull
from dipper.tokenizer import Tokenizer

try:
    import torch
    import transformers
    from torch import nn
except ImportError as error:
    raise ConfigError(
        f"PyTorch and transformers are needed here ({error}): run `pip install 'dipper[torch]'`"
    ) from error

__all__ = ["LoadedModel", "hf_model_from_bundle", "load_model"]


@dataclass
class LoadedModel:
    """A model ready to be pruned and measured.

    Attributes:
        model: a decoder with a language-model head (transformers), in evaluation mode, no parameter with a gradient.
        encode: text to token ids, without BOS; special tokens in the text are read as such.
        bos_id: what a window of text starts with; None where the model's tokenizer puts nothing first.
        name: for tables and records.
        fingerprint: sha256 that names the weights: of a bundle's header, of a checkpoint's files, or, for a folder that
            only transformers reads, of its config.json and the headers of its safetensors.
        tokenizer: the whole tokenizer, for decoding, chat templates and end-of-text ids.
        codes: grid, codes and scales of ``layers.N.gate|up|down`` as the source has them, read when asked; None for a
            folder that only transformers reads.
    """

    model: transformers.PreTrainedModel
    encode: Callable[[str], list[int]]
    bos_id: int | None
    name: str
    fingerprint: str
    tokenizer: Tokenizer | None = None
    codes: Callable[[str], tuple[Grid, CodedRows]] | None = None

    def calibration_fields(self) -> dict[str, Any]:
        """The `model` of a calibration made on this model (`calibration.Calibration`)."""
        config = self.model.config.get_text_config()
        return {
            "name": self.name,
            "architecture": architecture_of(config.model_type),
            "n_layers": config.num_hidden_layers,
            "hidden": config.hidden_size,
            "intermediate": config.intermediate_size,
            "fingerprint": self.fingerprint,
        }


def load_model(
    source: str | Path,
    *,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    context: int | None = None,
    attention: str = "sdpa",
) -> LoadedModel:
    """Load a model from wherever it is.

    Args:
        source: a bundle, a GGUF file, a Hugging Face folder, or a name or id as `sources.pull` takes them; a `Path` is
            never taken for a name.
        device: where the weights go, such as ``cpu``, ``cuda`` or ``cuda:1``.
        dtype: what they are held in; fp32 when None.
        context: tokens that will be seen at most, which chooses between short and long rope tables; the model's own
            when None. A folder that only transformers reads chooses by itself.
        attention: transformers' attention implementation: ``sdpa``, ``eager``, or another that is installed; where an
            architecture that only transformers knows has no ``sdpa`` (Gemma 2), that means ``eager``.

    Returns:
        The model and its tokenizer.

    Raises:
        SourceError: the name is unknown, or fetching fails.
        CheckpointError: the source is none of these, damaged, without a tokenizer, or not to be had in transformers.
        BundleError: the bundle is damaged.
        ConfigError: the device is absent or too small, or an option is not known.
    """
    dtype = torch.float32 if dtype is None else dtype
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ConfigError(f"dtype is {dtype!r}; give a floating-point torch.dtype such as torch.bfloat16")
    if context is not None and context < 1:
        raise ConfigError(f"context is {context}; it must be at least 1")
    target = _device(device)
    path = source if isinstance(source, Path) else pull(source)
    with _one_line_errors(path, target):
        if (path / "bundle.json").is_file():
            return _load_bundle(path, target, dtype, context, attention)
        # A file is a GGUF, or `open_checkpoint` says what it is; so it does of a folder without config.json.
        if path.is_dir() and read_hf_config(path).get("model_type") not in HF_TYPES:
            loaded = _load_with_transformers(path, target, dtype, attention)
        else:
            loaded = _load_checkpoint(path, target, dtype, context, attention)
    if path.is_dir() and not Path(source).is_dir():
        loaded.name = str(source)  # the folder of a fetched id is named by its commit
    return loaded


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch raises AssertionError without CUDA
        raise ConfigError(
            f"device is {name!r}, which PyTorch cannot use ({_one_line(error)}); give cpu, or install PyTorch for it"
        ) from error
    return device


@contextlib.contextmanager
def _one_line_errors(path: Path, device: torch.device) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"{path}: does not fit in the memory of {device}; give dtype=torch.bfloat16, or a larger device"
        ) from error


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:300] + "..."


# --- sources ---------------------------------------------------------------------------------------------------------


def _loaded(
    model: transformers.PreTrainedModel,
    tokenizer: Tokenizer,
    name: str,
    fingerprint: str,
    codes: Callable[[str], tuple[Grid, CodedRows]] | None = None,
) -> LoadedModel:
    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_bos=False)

    return LoadedModel(
        model=model,
        encode=encode,
        bos_id=tokenizer.bos_id if tokenizer.add_bos else None,
        name=name,
        fingerprint=fingerprint,
        tokenizer=tokenizer,
        codes=codes,
    )


def _load_bundle(
    path: Path, device: torch.device, dtype: torch.dtype, context: int | None, attention: str
) -> LoadedModel:
    bundle = Bundle.open(path)
    tokenizer = Tokenizer.open(path)
    model = hf_model_from_bundle(bundle, context=context, attention=attention, device=device, dtype=dtype)
    return _loaded(model, tokenizer, bundle.model.name, bundle.header["header_sha256"], bundle.coded)


def _load_checkpoint(
    path: Path, device: torch.device, dtype: torch.dtype, context: int | None, attention: str
) -> LoadedModel:
    checkpoint = open_checkpoint(path)
    source = read_model(checkpoint)
    tokenizer = Tokenizer.of_checkpoint(path)  # first: a source without one should fail before the weights are read
    config = dataclasses.replace(
        source.config, bos_id=tokenizer.bos_id, eos_ids=tuple(tokenizer.eos_ids), add_bos=tokenizer.add_bos
    )
    model = _build(
        config,
        {*source.vectors, *source.parts},
        source.dequantise,
        context=context,
        attention=attention,
        device=device,
        dtype=dtype,
    )
    return _loaded(model, tokenizer, config.name, checkpoint.sha256(), source.coded)


def hf_model_from_bundle(
    bundle: Bundle,
    *,
    context: int | None = None,
    attention: str = "eager",
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> transformers.PreTrainedModel:
    """A transformers model that holds the bundle's dequantised weights and rope tables.

    Args:
        bundle: an open bundle.
        context: the session's context, which chooses between short and long rope tables; the model's own when None.
        attention: transformers' attention implementation, "eager" or "sdpa".
        device: where the weights go.
        dtype: what they are held in; fp32 when None. Rope tables stay fp32.

    Raises:
        CheckpointError: the header describes a model that transformers cannot express.
    """
    return _build(
        bundle.model,
        set(bundle.header["tensors"]),
        bundle.dequantise,
        context=context,
        attention=attention,
        device=torch.device(device),
        dtype=torch.float32 if dtype is None else dtype,
    )


def _load_with_transformers(path: Path, device: torch.device, dtype: torch.dtype, attention: str) -> LoadedModel:
    """A folder of an architecture that only transformers knows; nothing is fetched and no code of it is run."""
    tokenizer = Tokenizer.of_checkpoint(path)
    fingerprint = _folder_fingerprint(path)
    try:
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            attn_implementation=None if attention == "sdpa" else attention,  # None: sdpa if there is, else eager
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, ImportError, KeyError, RuntimeError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: dipper does not know this architecture and transformers {transformers.__version__} cannot load "
            f"it ({_one_line(error)}); use another model or another transformers"
        ) from error
    if info["missing_keys"]:  # transformers would make them up
        missing = sorted(info["missing_keys"])
        raise CheckpointError(
            f"{path}: {len(missing)} weights are missing, the first is {missing[0]!r}; the checkpoint is incomplete: "
            "download it again"
        )
    model = model.to(device).eval().requires_grad_(False)
    return _loaded(model, tokenizer, path.resolve().name, fingerprint)


def _folder_fingerprint(path: Path) -> str:
    """SHA-256 of config.json and the headers of the safetensors: names, shapes and places of the weights."""
    digest = hashlib.sha256((path / "config.json").read_bytes())
    shards = sorted(path.glob("*.safetensors"))
    if not shards:
        raise CheckpointError(
            f"{path}: has no .safetensors files; dipper does not read pickled weights, save the model as safetensors"
        )
    for shard in shards:
        with shard.open("rb") as file:
            size = file.read(8)
            header = file.read(min(int.from_bytes(size, "little"), 100_000_000))
        digest.update(shard.name.encode() + size + header)
    return digest.hexdigest()


# --- a model in transformers -----------------------------------------------------------------------------------------

_ACTIVATIONS = {"silu": "silu", "gelu_tanh": "gelu_pytorch_tanh"}


def _build(
    config: ModelConfig,
    names: Collection[str],
    read: Callable[[str], F32],
    *,
    context: int | None,
    attention: str,
    device: torch.device,
    dtype: torch.dtype,
) -> transformers.PreTrainedModel:
    """The transformers model of a configuration.

    Args:
        config: what the model is.
        names: the tensors there are, by a bundle's names; matrices that every model has may lack.
        read: a tensor as fp32 by its name.
    """
    hf_config = _hf_config(config, biased="layers.0.q_bias" in names)
    try:
        with torch.device("meta"):  # no weight is initialised only to be replaced
            model = transformers.AutoModelForCausalLM.from_config(hf_config, dtype=dtype, attn_implementation=attention)
    except (ValueError, ImportError) as error:
        raise ConfigError(
            f"attention is {attention!r}, with which transformers cannot make this model ({_one_line(error)}); give "
            "sdpa or eager"
        ) from error
    state = {}
    for name, weight in _state(config, names, read):
        state[name] = torch.from_numpy(np.ascontiguousarray(weight, np.float32)).to(device, dtype)
    missing, unexpected = model.load_state_dict(state, assign=True, strict=False)
    if config.tied:
        model.lm_head.weight = model.model.embed_tokens.weight
        missing = [name for name in missing if name != "lm_head.weight"]
    for name in missing:  # an architecture that always has a bias, a checkpoint without: the bias is zero
        if not name.endswith("_proj.bias"):
            raise CheckpointError(f"{config.name}: transformers' {hf_config.model_type} has {name}, the model has not")
        module = model.get_submodule(name.removesuffix(".bias"))
        module.bias = nn.Parameter(torch.zeros(module.out_features, device=device, dtype=dtype))
    if unexpected:
        raise CheckpointError(f"{config.name}: transformers' {hf_config.model_type} has no {unexpected[0]}")
    model.model.rotary_emb = _rotary(config, hf_config, read, context or config.max_context, device)
    if _is_gemma(config):
        scale = torch.tensor(config.embedding_scale, dtype=torch.float32, device=device)
        model.model.embed_tokens.embed_scale = scale
    elif config.embedding_scale != 1.0:
        raise CheckpointError(
            f"{config.name}: embedding_scale is {config.embedding_scale}, and transformers' {hf_config.model_type} "
            "does not scale"
        )
    for layer in model.model.layers:
        layer.self_attn.scaling = config.attention_scale
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise CheckpointError(f"{config.name}: {name} of transformers' {hf_config.model_type} has no values")
    return model.eval().requires_grad_(False)


def _is_gemma(config: ModelConfig) -> bool:
    return config.architecture == "gemma3"


def _hf_config(config: ModelConfig, *, biased: bool) -> transformers.PretrainedConfig:
    """The transformers configuration. Rope, scales and windows are set on the modules."""
    windows = [layer.window for layer in config.layers]
    sliding = max(windows)
    if {window for window in windows if window} - {sliding}:
        raise CheckpointError(
            f"{config.name}: its windows are {sorted(set(windows))}, and transformers has one per model; use the engine"
        )
    layer_types = ["sliding_attention" if window else "full_attention" for window in windows]
    common: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_context,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied,
        "bos_token_id": config.bos_id,
        "eos_token_id": list(config.eos_ids) or None,
        "pad_token_id": None,
    }
    activation = _ACTIVATIONS[config.activation]
    some_windows = sliding > 0 and 0 in windows
    match config.architecture:
        case "llama" if not sliding:
            return transformers.LlamaConfig(hidden_act=activation, attention_bias=biased, **common)
        case "llama" if not biased and not some_windows:  # the architecture that adds a window to llama, in every layer
            return transformers.MistralConfig(hidden_act=activation, sliding_window=sliding, **common)
        case "qwen2" | "qwen3" as name:
            qwen = {"use_sliding_window": sliding > 0, "sliding_window": sliding or None, "layer_types": layer_types}
            if name == "qwen2":
                return transformers.Qwen2Config(hidden_act=activation, **qwen, **common)
            return transformers.Qwen3Config(hidden_act=activation, attention_bias=biased, **qwen, **common)
        case "phi3" if not some_windows:
            return transformers.Phi3Config(hidden_act=activation, sliding_window=sliding or None, **common)
        case "gemma3":
            return transformers.Gemma3TextConfig(
                hidden_activation=activation,
                attention_bias=biased,
                sliding_window=sliding or None,
                layer_types=layer_types,
                **common,
            )
    what = f"windows in {'some' if some_windows else 'all'} layers{' and biases' if biased else ''}"
    raise CheckpointError(
        f"{config.name}: transformers has no {config.architecture} with {what if sliding else 'such layers'}; "
        "use the engine"
    )


class _Rotary(nn.Module):
    """cos and sin from given inverse frequencies, in place of a model's own rotary module.

    The tables are no buffers on purpose: `model.to(torch.bfloat16)` would round the frequencies.
    """

    def __init__(self, tables: dict[str | None, tuple[torch.Tensor, float]]) -> None:
        super().__init__()
        self.tables = tables  # by layer type, or None where all layers share one: ([dim / 2], factor on cos and sin)

    def forward(
        self, x: torch.Tensor, position_ids: torch.Tensor, layer_type: str | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        inv_freq, scale = self.tables[layer_type]
        angles = position_ids[..., None].float() * inv_freq.to(position_ids.device)  # [B, T, dim / 2]
        angles = torch.cat((angles, angles), dim=-1)
        return (angles.cos() * scale).to(x.dtype), (angles.sin() * scale).to(x.dtype)


def _rotary(
    config: ModelConfig,
    hf_config: transformers.PretrainedConfig,
    read: Callable[[str], F32],
    context: int,
    device: torch.device,
) -> _Rotary:
    def table(index: int) -> tuple[torch.Tensor, float]:
        rope = config.rope[index]
        if rope.long is not None and context > rope.original_context:
            return torch.tensor(read(rope.long), dtype=torch.float32, device=device), rope.scale_long
        return torch.tensor(read(rope.short), dtype=torch.float32, device=device), rope.scale_short

    if _is_gemma(config):
        layers = zip(hf_config.layer_types, config.layers, strict=True)
        return _Rotary({layer_type: table(layer.rope) for layer_type, layer in layers})
    used = {layer.rope for layer in config.layers}
    if len(used) != 1:
        raise CheckpointError(
            f"{config.name}: its layers use {len(used)} rope tables, and transformers' {hf_config.model_type} has one; "
            "use the engine"
        )
    return _Rotary({None: table(used.pop())})


def _state(config: ModelConfig, names: Collection[str], read: Callable[[str], F32]) -> Iterator[tuple[str, F32]]:
    """(transformers name, fp32 weight) of every parameter; of a tied head only the embedding."""
    gemma, fused = _is_gemma(config), config.architecture == "phi3"
    norm_shift = np.float32(1.0 if gemma else 0.0)  # transformers multiplies by 1 + w, a bundle stores the factor

    yield "model.embed_tokens.weight", read("embedding")
    if not config.tied:
        yield "lm_head.weight", read("head")
    yield "model.norm.weight", read("final_norm") - norm_shift
    norms = {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    if gemma:
        norms = {
            "attn_norm": "input_layernorm",
            "post_attn_norm": "post_attention_layernorm",
            "mlp_norm": "pre_feedforward_layernorm",
            "post_mlp_norm": "post_feedforward_layernorm",
        }
    for n in range(config.n_layers):
        ours, theirs = f"layers.{n}.", f"model.layers.{n}."
        for name, hf_name in norms.items():
            yield f"{theirs}{hf_name}.weight", read(ours + name) - norm_shift
        if fused:
            yield f"{theirs}self_attn.qkv_proj.weight", np.concatenate([read(ours + p) for p in "qkv"])
            yield f"{theirs}self_attn.o_proj.weight", read(ours + "o")
            yield f"{theirs}mlp.gate_up_proj.weight", np.concatenate([read(ours + "gate"), read(ours + "up")])
        else:
            for p in "qkvo":
                yield f"{theirs}self_attn.{p}_proj.weight", read(ours + p)
                if f"{ours}{p}_bias" in names:
                    yield f"{theirs}self_attn.{p}_proj.bias", read(f"{ours}{p}_bias")
            for p in ("gate", "up"):
                yield f"{theirs}mlp.{p}_proj.weight", read(ours + p)
        yield f"{theirs}mlp.down_proj.weight", read(ours + "down")
        for p in ("q_norm", "k_norm"):
            if ours + p in names:
                yield f"{theirs}self_attn.{p}.weight", read(ours + p) - norm_shift
