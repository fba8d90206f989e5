"""What a GLU language model is in each architecture: dimensions, tensor names and shapes, activation, RoPE, windows.

`read_model` turns a checkpoint's metadata into a `Model`: a `ModelConfig` (the `model` object of a bundle's header),
the RoPE tables, and for every tensor of a bundle the *part* of the checkpoint it comes from. The peculiarities of
sources end here: fused tensors become row ranges, rows that GGUF's Llama conversion interleaves are put back to
rotate-half order, Gemma's ``1 + w`` norms are told apart from norms stored as multiplied.

To add an architecture: one `Architecture` in `_ARCHITECTURES`, its windows in `_hf_windows` and `_gguf_windows`, and a
tiny model in the tests.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from dipper.checkpoint import Checkpoint, Tensor
from dipper.errors import CheckpointError
from dipper.grid import F32, TILE, CodedRows, Grid, dequantise
from dipper.rope import Rope, RopeConfig, name_tables, rope_table

__all__ = [
    "HF_TYPES",
    "LayerConfig",
    "Model",
    "ModelConfig",
    "Part",
    "RopeConfig",
    "architecture_of",
    "matrix_shapes",
    "read_model",
    "vector_shapes",
]

ACTIVATIONS = ("silu", "gelu_tanh")
# Weights held at a time while rows of a matrix pass through: about 30 MB of codes, fp32 values and planes.
_SLICE_WEIGHTS = 1 << 20


@dataclass(frozen=True, kw_only=True)
class LayerConfig:
    """One layer: which RoPE table it uses and how many recent positions attention sees (0: all)."""

    rope: int
    window: int


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A model's dimensions and constants; the fields are those of a bundle header's `model`.

    Attributes:
        embedding_scale: what an embedding row is multiplied by.
        attention_scale: what q·k is multiplied by.
        tied: whether the head is also the input embedding.
        add_bos: whether prompts start with `bos_id`.
    """

    architecture: str
    name: str
    n_layers: int
    hidden_size: int
    intermediate_size: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    vocab_size: int
    max_context: int
    norm_eps: float
    activation: str
    embedding_scale: float
    attention_scale: float
    tied: bool
    rope: tuple[RopeConfig, ...]
    layers: tuple[LayerConfig, ...]
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    add_bos: bool = False

    def __post_init__(self) -> None:
        sizes = (
            "n_layers",
            "hidden_size",
            "intermediate_size",
            "n_heads",
            "n_kv_heads",
            "head_dim",
            "vocab_size",
            "max_context",
        )
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, it must be at least 1")
            _check_int32(name, getattr(self, name))
        _check_int32("n_heads * head_dim", self.n_heads * self.head_dim)
        for token in filter(lambda token: token is not None, (self.bos_id, *self.eos_ids)):
            _check_int32("a token id", token)
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads {self.n_heads} is not a multiple of n_kv_heads {self.n_kv_heads}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation is {self.activation!r}, known are {', '.join(ACTIVATIONS)}")
        if len(self.layers) != self.n_layers:
            raise ValueError(f"{len(self.layers)} layers are described and n_layers is {self.n_layers}")
        for index, layer in enumerate(self.layers):
            if not 0 <= layer.rope < len(self.rope) or layer.window < 0:
                raise ValueError(f"layer {index} has rope {layer.rope} of {len(self.rope)} and window {layer.window}")
            _check_int32("window", layer.window)
        for table in self.rope:
            if table.dim < 2 or table.dim % 2 or table.dim > self.head_dim:
                raise ValueError(
                    f"a rope table has dim {table.dim}, it must be even and at most head_dim {self.head_dim}"
                )
            _check_int32("original_context", table.original_context)

    def to_json(self) -> dict[str, Any]:
        """The header's `model` object."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> ModelConfig:
        """The inverse of `to_json`.

        Raises:
            ValueError: a field is missing, unknown, of the wrong type, or out of range.
        """
        values = _typed(cls, content)
        values["rope"] = tuple(RopeConfig(**_typed(RopeConfig, table)) for table in content["rope"])
        values["layers"] = tuple(LayerConfig(**_typed(LayerConfig, layer)) for layer in content["layers"])
        values["eos_ids"] = tuple(content["eos_ids"])
        return cls(**values)


MAX_INT = (1 << 31) - 1
_LARGEST_F32 = float(np.finfo(np.float32).max)
_FIELD_TYPES: dict[str, tuple[type, ...]] = {
    "int": (int,), "float": (int, float), "str": (str,), "bool": (bool,), "int | None": (int, type(None)),
    "str | None": (str, type(None)),
}  # fmt: skip


def _check_int32(name: str, value: Any) -> None:
    """The native decoder holds these as 32 bits."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MAX_INT:
        raise ValueError(f"{name} is {value!r}, it must be a whole number in 0..{MAX_INT}")


def _typed(cls: type[Any], content: Any) -> dict[str, Any]:
    """The fields of a dataclass out of a JSON object, checked by name and type."""
    if not isinstance(content, dict):
        raise ValueError(f"{cls.__name__} is a {type(content).__name__}, not an object")
    fields = {field.name: str(field.type) for field in dataclasses.fields(cls)}
    if set(content) != set(fields):
        odd = sorted(set(content) ^ set(fields))
        raise ValueError(f"{cls.__name__} has missing or unknown fields: {', '.join(odd)}")
    for name, kind in fields.items():
        allowed = _FIELD_TYPES.get(kind, (list, tuple))
        value = content[name]
        if not isinstance(value, allowed) or (isinstance(value, bool) and kind != "bool"):
            raise ValueError(f"{name} is {value!r}, not {kind}")
        if kind == "float" and isinstance(value, (int, float)) and not abs(value) <= _LARGEST_F32:
            raise ValueError(f"{name} is {value!r}, beyond 32-bit floats")
    return dict(content)


@dataclass(frozen=True, kw_only=True)
class Part:
    """Where a bundle's tensor comes from: rows of a source tensor, in an order, with a constant added.

    Attributes:
        tensor: the source tensor.
        start: its first row that belongs here (fused tensors).
        shape: ``(n,)`` or ``(R, C)`` here.
        interleaved_heads: 0, or the heads whose rows pair neighbours and are put back to rotate-half order.
        add: added to every element (Gemma's norms).
    """

    tensor: Tensor
    shape: tuple[int, ...]
    start: int = 0
    interleaved_heads: int = 0
    add: float = 0.0

    @property
    def grid(self) -> Grid:
        """The grid of the source."""
        return self.tensor.grid

    def rows(self, start: int, stop: int) -> CodedRows:
        """Rows ``start..stop`` of this part, as `Tensor.rows`."""
        if not self.interleaved_heads:
            return self.tensor.rows(self.start + start, self.start + stop)
        wanted = _rotate_half_rows(np.arange(start, stop), self.shape[0] // self.interleaved_heads)
        first = int(wanted.min())
        return self.tensor.rows(first, int(wanted.max()) + 1).take(wanted - first)

    def slices(self) -> Iterator[tuple[int, CodedRows]]:
        """(first row, rows) of a matrix from top to bottom, in slices of whole tiles."""
        n_rows, n_inputs = self.shape
        step = max(_SLICE_WEIGHTS // n_inputs // TILE, 1) * TILE
        for start in range(0, n_rows, step):
            yield start, self.rows(start, min(start + step, n_rows))

    def vector(self) -> F32:
        """This part of a vector, fp32 ``[n]``."""
        whole = self.tensor.vector()[self.start : self.start + self.shape[0]]
        if self.interleaved_heads:
            whole = whole[_rotate_half_rows(np.arange(len(whole)), len(whole) // self.interleaved_heads)]
        return whole + np.float32(self.add) if self.add else whole


def _rotate_half_rows(rows: Any, head_dim: int) -> Any:
    """Source row of each rotate-half row: element i pairs with i + head_dim/2 here, with its neighbour there."""
    head, element = rows // head_dim, rows % head_dim
    half = head_dim // 2
    return head * head_dim + 2 * (element % half) + element // half


@dataclass(frozen=True)
class Model:
    """A checkpoint understood: configuration, RoPE vectors by name, and the part behind each tensor of a bundle."""

    config: ModelConfig
    vectors: dict[str, F32]
    parts: dict[str, Part]

    def dequantise(self, name: str) -> F32:
        """A tensor as fp32, bit for bit what `Bundle.dequantise` gives when it was packed in its own grid.

        Args:
            name: of `vectors` or `parts`, or ``embedding`` (tied: the head).

        Returns:
            ``[R, C]`` of a matrix, ``[n]`` of a vector.

        Raises:
            CheckpointError: the tensor is of a type that is not read, is cut, or holds NaN.
        """
        if name in self.vectors:
            return self.vectors[name]
        part = self.parts["head" if name == "embedding" and self.config.tied else name]
        if len(part.shape) == 1:
            return part.vector()
        weights = np.empty(part.shape, np.float32)
        for start, rows in part.slices():
            weights[start : start + len(rows.codes)] = dequantise(part.grid, rows)
        return weights

    def coded(self, name: str) -> tuple[Grid, CodedRows]:
        """The grid of a matrix, and all of its codes and scales.

        Raises:
            CheckpointError: as `dequantise`.
        """
        part = self.parts[name]
        return part.grid, part.rows(0, part.shape[0])


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What distinguishes one architecture's tensors from Llama's."""

    name: str
    hf_types: tuple[str, ...]
    qk_norm: bool = False
    qkv_bias: bool = False
    sandwich_norms: bool = False
    fused: bool = False
    gguf_interleaved: bool = False
    hf_norm_add: float = 0.0


_ARCHITECTURES = (
    Architecture(name="llama", hf_types=("llama", "mistral"), gguf_interleaved=True),
    Architecture(name="qwen2", hf_types=("qwen2",), qkv_bias=True),
    Architecture(name="qwen3", hf_types=("qwen3",), qk_norm=True),
    Architecture(name="phi3", hf_types=("phi3",), fused=True),
    Architecture(name="gemma3", hf_types=("gemma3_text",), qk_norm=True, sandwich_norms=True, hf_norm_add=1.0),
)

HF_TYPES = tuple(name for architecture in _ARCHITECTURES for name in architecture.hf_types)
"""The `model_type` of every Hugging Face folder that `read_model` understands."""


def architecture_of(model_type: str) -> str:
    """The architecture's name in bundles for a Hugging Face `model_type`; the type itself where dipper has none."""
    return next((a.name for a in _ARCHITECTURES if model_type in a.hf_types), model_type)


# Bundle name -> source name inside a layer.
_HF_NAMES = {
    "attn_norm": "input_layernorm.weight",
    "q": "self_attn.q_proj.weight", "k": "self_attn.k_proj.weight",
    "v": "self_attn.v_proj.weight", "o": "self_attn.o_proj.weight",
    "q_bias": "self_attn.q_proj.bias", "k_bias": "self_attn.k_proj.bias",
    "v_bias": "self_attn.v_proj.bias", "o_bias": "self_attn.o_proj.bias",
    "q_norm": "self_attn.q_norm.weight", "k_norm": "self_attn.k_norm.weight",
    "qkv": "self_attn.qkv_proj.weight", "gate_up": "mlp.gate_up_proj.weight",
    "mlp_norm": "post_attention_layernorm.weight",
    "gate": "mlp.gate_proj.weight", "up": "mlp.up_proj.weight", "down": "mlp.down_proj.weight",
}  # fmt: skip
_HF_SANDWICH_NAMES = {
    "post_attn_norm": "post_attention_layernorm.weight",
    "mlp_norm": "pre_feedforward_layernorm.weight",
    "post_mlp_norm": "post_feedforward_layernorm.weight",
}
_GGUF_NAMES = {
    "attn_norm": "attn_norm.weight",
    "q": "attn_q.weight", "k": "attn_k.weight", "v": "attn_v.weight", "o": "attn_output.weight",
    "q_bias": "attn_q.bias", "k_bias": "attn_k.bias", "v_bias": "attn_v.bias", "o_bias": "attn_output.bias",
    "q_norm": "attn_q_norm.weight", "k_norm": "attn_k_norm.weight",
    "qkv": "attn_qkv.weight", "gate_up": "ffn_up.weight",
    "mlp_norm": "ffn_norm.weight",
    "gate": "ffn_gate.weight", "up": "ffn_up.weight", "down": "ffn_down.weight",
    "post_attn_norm": "post_attention_norm.weight", "post_mlp_norm": "post_ffw_norm.weight",
}  # fmt: skip
_TOP_NAMES = {
    "hf": {"embedding": "model.embed_tokens.weight", "head": "lm_head.weight", "final_norm": "model.norm.weight"},
    "gguf": {"embedding": "token_embd.weight", "head": "output.weight", "final_norm": "output_norm.weight"},
}
# Source tensors that hold nothing a bundle needs: tables that are computed, or read on their own.
_IGNORED_SUFFIXES = (
    "rotary_emb.inv_freq",
    "rope_freqs.weight",
    "rope_factors_long.weight",
    "rope_factors_short.weight",
)
_OPTIONAL = ("q_bias", "k_bias", "v_bias", "o_bias")


def matrix_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Bundle name -> ``(R, C)`` of every matrix a model must have; `layers.N.gate|up|down` lie in regions."""
    hidden, inner = config.hidden_size, config.intermediate_size
    q_rows, kv_rows = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    layer = {
        "q": (q_rows, hidden), "k": (kv_rows, hidden), "v": (kv_rows, hidden), "o": (hidden, q_rows),
        "gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner),
    }  # fmt: skip
    shapes = {f"layers.{n}.{name}": shape for n in range(config.n_layers) for name, shape in layer.items()}
    shapes["head"] = (config.vocab_size, hidden)
    return shapes


def vector_shapes(config: ModelConfig) -> dict[str, int]:
    """Bundle name -> length of every vector a layer may have, and of `final_norm`; which exist depends on the model."""
    hidden = config.hidden_size
    q_rows, kv_rows = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    layer = {
        "attn_norm": hidden, "mlp_norm": hidden, "post_attn_norm": hidden, "post_mlp_norm": hidden,
        "q_norm": config.head_dim, "k_norm": config.head_dim,
        "q_bias": q_rows, "k_bias": kv_rows, "v_bias": kv_rows, "o_bias": hidden,
    }  # fmt: skip
    shapes = {f"layers.{n}.{name}": length for n in range(config.n_layers) for name, length in layer.items()}
    shapes["final_norm"] = hidden
    return shapes


def read_model(checkpoint: Checkpoint) -> Model:
    """Understand a checkpoint.

    Raises:
        CheckpointError: the architecture is unknown, metadata or a tensor is missing, a shape contradicts the metadata,
            or the checkpoint holds tensors that this architecture does not have.
    """
    architecture = _architecture(checkpoint)
    try:
        config, vectors = (_read_gguf if checkpoint.kind == "gguf" else _read_hf)(checkpoint, architecture)
    except KeyError as error:
        raise CheckpointError(
            f"{checkpoint.path}: the metadata lacks {error.args[0]!r}; the file is incomplete: convert or "
            "download it again"
        ) from error
    except (ValueError, TypeError, ZeroDivisionError) as error:
        raise CheckpointError(
            f"{checkpoint.path}: the metadata is wrong: {error}; convert or download it again"
        ) from error
    return Model(config, vectors, _parts(checkpoint, architecture, config))


def _architecture(checkpoint: Checkpoint) -> Architecture:
    if checkpoint.kind == "gguf":
        found = checkpoint.metadata.get("general.architecture")
        matches = [a for a in _ARCHITECTURES if a.name == found]
        known = ", ".join(a.name for a in _ARCHITECTURES)
        n_experts = checkpoint.metadata.get(f"{found}.expert_count", 0)
    else:
        found = checkpoint.metadata.get("model_type")
        matches = [a for a in _ARCHITECTURES if found in a.hf_types]
        known = ", ".join(HF_TYPES)
        n_experts = checkpoint.metadata.get("num_local_experts", 0)
    if not matches:
        raise CheckpointError(
            f"{checkpoint.path}: the architecture is {found!r}, which dipper does not know; it knows {known}"
        )
    if n_experts:
        raise CheckpointError(f"{checkpoint.path}: the model has {n_experts} experts; dipper packs dense models only")
    return matches[0]


# --- parts -----------------------------------------------------------------------------------------------------------


def _parts(checkpoint: Checkpoint, architecture: Architecture, config: ModelConfig) -> dict[str, Part]:
    shapes: dict[str, tuple[int, ...]] = {**matrix_shapes(config)}
    shapes.update({name: (length,) for name, length in vector_shapes(config).items()})
    parts = {}
    used = set()
    top = _TOP_NAMES[checkpoint.kind]
    tops = {"final_norm": top["final_norm"], "head": top["embedding"] if config.tied else top["head"]}
    if not config.tied:
        tops["embedding"] = top["embedding"]
        shapes["embedding"] = shapes["head"]
    sources = [(name, source, 0) for name, source in tops.items()]
    for n in range(config.n_layers):
        sources += _layer_sources(checkpoint, architecture, config, n)
    add = architecture.hf_norm_add if checkpoint.kind == "hf" else 0.0
    for name, source, start in sources:
        if name.endswith(_OPTIONAL) and source not in checkpoint.tensors and not _needs_bias(architecture, name):
            continue
        heads = {"q": config.n_heads, "k": config.n_kv_heads}.get(name.rsplit(".", 1)[-1].removesuffix("_bias"), 0)
        interleaved = architecture.gguf_interleaved and checkpoint.kind == "gguf"
        parts[name] = Part(
            tensor=_find(checkpoint, source, _source_shape(architecture, config, name, shapes[name])),
            shape=shapes[name],
            start=start,
            interleaved_heads=heads if interleaved else 0,
            add=add if name.endswith("norm") else 0.0,
        )
        used.add(source)
    _refuse_unused(checkpoint, architecture, used, ignored=top["head"] if config.tied else "")
    return parts


def _layer_sources(
    checkpoint: Checkpoint, architecture: Architecture, config: ModelConfig, n: int
) -> list[tuple[str, str, int]]:
    """(bundle name, source name, first source row) of layer n."""
    if checkpoint.kind == "hf":
        names = _HF_NAMES | (_HF_SANDWICH_NAMES if architecture.sandwich_norms else {})
        prefix = f"model.layers.{n}."
    else:
        names, prefix = _GGUF_NAMES, f"blk.{n}."
    wanted = ["attn_norm", "o", "mlp_norm", "down", *_OPTIONAL]
    wanted += ["q_norm", "k_norm"] if architecture.qk_norm else []
    wanted += ["post_attn_norm", "post_mlp_norm"] if architecture.sandwich_norms else []
    wanted += [] if architecture.fused else ["q", "k", "v", "gate", "up"]
    sources = [(f"layers.{n}.{name}", prefix + names[name], 0) for name in wanted]
    if architecture.fused:
        q_rows, kv_rows = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        for name, start in (("q", 0), ("k", q_rows), ("v", q_rows + kv_rows)):
            sources.append((f"layers.{n}.{name}", prefix + names["qkv"], start))
        for name, start in (("gate", 0), ("up", config.intermediate_size)):
            sources.append((f"layers.{n}.{name}", prefix + names["gate_up"], start))
    return sources


def _needs_bias(architecture: Architecture, name: str) -> bool:
    return architecture.qkv_bias and not name.endswith("o_bias")


def _source_shape(
    architecture: Architecture, config: ModelConfig, name: str, shape: tuple[int, ...]
) -> tuple[int, ...]:
    """The shape of the source tensor that holds a part: more rows where it is fused with others."""
    last = name.rsplit(".", 1)[-1]
    if architecture.fused and last in ("q", "k", "v"):
        return (config.n_heads + 2 * config.n_kv_heads) * config.head_dim, shape[1]
    if architecture.fused and last in ("gate", "up"):
        return 2 * config.intermediate_size, shape[1]
    return shape


def _find(checkpoint: Checkpoint, source: str, shape: tuple[int, ...]) -> Tensor:
    tensor = checkpoint.tensors.get(source)
    if tensor is None:
        raise CheckpointError(
            f"{checkpoint.path}: tensor {source!r} is missing; the checkpoint is incomplete: download it again"
        )
    if tensor.shape != shape:
        raise CheckpointError(
            f"{checkpoint.path}: tensor {source!r} has the shape {tensor.shape} and the metadata asks for {shape}; "
            "the checkpoint is inconsistent: download it again"
        )
    return tensor


def _refuse_unused(checkpoint: Checkpoint, architecture: Architecture, used: set[str], ignored: str) -> None:
    """Weights that nothing would multiply mean that the model is not what dipper takes it for."""
    unused = [n for n in checkpoint.tensors if n not in used and n != ignored and not n.endswith(_IGNORED_SUFFIXES)]
    if unused:
        raise CheckpointError(
            f"{checkpoint.path}: {len(unused)} tensors are not part of a {architecture.name} model as dipper knows it, "
            f"the first is {unused[0]!r}; this variant is not supported"
        )


# --- Hugging Face config.json ----------------------------------------------------------------------------------------


def _read_hf(checkpoint: Checkpoint, architecture: Architecture) -> tuple[ModelConfig, dict[str, F32]]:
    config = checkpoint.metadata
    hidden, n_heads, n_layers = config["hidden_size"], config["num_attention_heads"], config["num_hidden_layers"]
    default_head_dim = {"qwen3": 128, "gemma3": 256}.get(architecture.name, hidden // n_heads)
    head_dim = config.get("head_dim") or default_head_dim
    max_context = config.get("max_position_embeddings") or 2048
    is_gemma = architecture.name == "gemma3"
    _refuse_softcap({key: config.get(key) for key in ("attn_logit_softcapping", "final_logit_softcapping")})
    if config.get("use_bidirectional_attention"):
        raise ValueError("use_bidirectional_attention is true: dipper generates with causal attention only")
    windows = _hf_windows(config, architecture)
    ropes, rope_of = _hf_ropes(config, architecture, head_dim, max_context)
    tables, vectors = name_tables(ropes)
    embedding = checkpoint.tensors.get(_TOP_NAMES["hf"]["embedding"])
    result = ModelConfig(
        architecture=architecture.name,
        name=checkpoint.path.resolve().name,
        n_layers=n_layers,
        hidden_size=hidden,
        intermediate_size=config["intermediate_size"],
        n_heads=n_heads,
        n_kv_heads=config.get("num_key_value_heads") or n_heads,
        head_dim=head_dim,
        vocab_size=config.get("vocab_size") or (embedding.shape[0] if embedding else 0),
        max_context=max_context,
        norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        activation=_hf_activation(config.get("hidden_activation") or config.get("hidden_act") or "silu", is_gemma),
        embedding_scale=math.sqrt(hidden) if is_gemma else 1.0,
        attention_scale=float(config.get("query_pre_attn_scalar") or 256 if is_gemma else head_dim) ** -0.5,
        tied=_hf_tied(checkpoint),
        rope=tables,
        layers=tuple(LayerConfig(rope=rope_of(w), window=w) for w in windows),
        bos_id=next(iter(_token_ids(config.get("bos_token_id"))), None),
        eos_ids=_token_ids(config.get("eos_token_id")),
        add_bos=False,
    )
    return result, vectors


def _token_ids(value: Any) -> tuple[int, ...]:
    """The ids of a configuration's entry: one, a list, or none; -1 is another way to say none."""
    return tuple(v for v in (value if isinstance(value, list) else [value]) if isinstance(v, int) and v >= 0)


def _hf_tied(checkpoint: Checkpoint) -> bool:
    tied = checkpoint.metadata.get("tie_word_embeddings")
    return bool(tied) if tied is not None else _TOP_NAMES["hf"]["head"] not in checkpoint.tensors


def _hf_activation(name: str, is_gemma: bool) -> str:
    # Early Gemma configs say "gelu" and mean the tanh form.
    known = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}
    if is_gemma and name == "gelu":
        return "gelu_tanh"
    if name not in known:
        raise ValueError(f"the activation is {name!r}, dipper has {', '.join(known)}")
    return known[name]


def _refuse_softcap(caps: dict[str, Any]) -> None:
    for key, value in caps.items():
        if value:
            raise ValueError(f"{key} is {value}: dipper has no logit soft-capping")


def _hf_windows(config: dict[str, Any], architecture: Architecture) -> list[int]:
    """Attention window of each layer; absent keys mean what the architecture's configuration class means by them."""
    n_layers = config["num_hidden_layers"]
    kind = config["model_type"]
    if kind == "llama":
        return [0] * n_layers
    window = config.get("sliding_window", None if kind == "phi3" else 4096) or 0
    if kind in ("mistral", "phi3"):
        return [window] * n_layers
    if kind in ("qwen2", "qwen3") and not config.get("use_sliding_window"):
        return [0] * n_layers
    if config.get("layer_types"):
        return [window if layer == "sliding_attention" else 0 for layer in config["layer_types"]]
    if kind in ("qwen2", "qwen3"):
        first = config.get("max_window_layers", 28)
        return [window if i >= first else 0 for i in range(n_layers)]
    pattern = config.get("sliding_window_pattern") or config.get("_sliding_window_pattern") or 6
    return [window if (i + 1) % pattern else 0 for i in range(n_layers)]


def _hf_ropes(
    config: dict[str, Any], architecture: Architecture, head_dim: int, max_context: int
) -> tuple[list[Rope], Any]:
    """The tables, and the index of the table for a layer's window."""
    parameters = dict(config.get("rope_parameters") or {})
    scaling = dict(config.get("rope_scaling") or {})
    if architecture.name == "gemma3":
        local = {
            "rope_theta": config.get("rope_local_base_freq", 10000.0),
            **(parameters.get("sliding_attention") or {}),
        }
        full = {"rope_theta": config.get("rope_theta", 1e6), **scaling, **(parameters.get("full_attention") or {})}
        return [rope_table(p, head_dim, max_context) for p in (local, full)], lambda window: 0 if window else 1
    params = {"rope_theta": config.get("rope_theta", 10000.0), **scaling, **parameters}
    params = {key: value for key, value in params.items() if value is not None}
    if "original_max_position_embeddings" in config:  # Phi-3 keeps it beside the scaling, and the ratio is the factor
        params["original_max_position_embeddings"] = config["original_max_position_embeddings"]
        params["factor"] = max_context / config["original_max_position_embeddings"]
    kind = params.get("rope_type", params.get("type"))
    if architecture.name == "phi3" and kind in ("su", "yarn"):
        params["rope_type"] = "longrope"
    partial = params.get("partial_rotary_factor", config.get("partial_rotary_factor")) or 1.0
    return [rope_table(params, int(head_dim * partial), max_context)], lambda window: 0


# --- GGUF metadata ---------------------------------------------------------------------------------------------------


def _read_gguf(checkpoint: Checkpoint, architecture: Architecture) -> tuple[ModelConfig, dict[str, F32]]:
    metadata = checkpoint.metadata
    prefix = architecture.name + "."

    def get(key: str, default: Any) -> Any:
        return metadata.get(prefix + key, default)

    hidden, n_heads = metadata[prefix + "embedding_length"], metadata[prefix + "attention.head_count"]
    n_layers, max_context = metadata[prefix + "block_count"], metadata[prefix + "context_length"]
    head_dim = get("attention.key_length", hidden // n_heads)
    if get("attention.value_length", head_dim) != head_dim:
        raise ValueError(f"keys have {head_dim} elements and values {get('attention.value_length', head_dim)}")
    _refuse_softcap({key: get(key, 0) for key in ("attn_logit_softcapping", "final_logit_softcapping")})
    is_gemma = architecture.name == "gemma3"
    windows = _gguf_windows(get, architecture, n_layers)
    ropes, rope_of = _gguf_ropes(checkpoint, get, architecture, head_dim, max_context)
    tables, vectors = name_tables(ropes)
    names = _TOP_NAMES["gguf"]
    embedding = checkpoint.tensors.get(names["embedding"])
    eos = metadata.get("tokenizer.ggml.eos_token_id")
    # Gemma 3 27B (62 layers) alone scales by hidden / heads instead of by the head's size.
    query_scalar = hidden // n_heads if is_gemma and n_layers == 62 else head_dim
    result = ModelConfig(
        architecture=architecture.name,
        name=metadata.get("general.name") or checkpoint.path.stem,
        n_layers=n_layers,
        hidden_size=hidden,
        intermediate_size=metadata[prefix + "feed_forward_length"],
        n_heads=n_heads,
        n_kv_heads=get("attention.head_count_kv", n_heads),
        head_dim=head_dim,
        vocab_size=embedding.n_rows if embedding else get("vocab_size", 0),
        max_context=max_context,
        norm_eps=_shortest(metadata[prefix + "attention.layer_norm_rms_epsilon"]),
        activation="gelu_tanh" if is_gemma else "silu",
        embedding_scale=math.sqrt(hidden) if is_gemma else 1.0,
        attention_scale=get("attention.scale", 0.0) or float(query_scalar) ** -0.5,
        tied=names["head"] not in checkpoint.tensors,
        rope=tables,
        layers=tuple(LayerConfig(rope=rope_of(w), window=w) for w in windows),
        bos_id=metadata.get("tokenizer.ggml.bos_token_id"),
        eos_ids=() if eos is None else (eos,),
        add_bos=bool(metadata.get("tokenizer.ggml.add_bos_token", False)),
    )
    return result, vectors


def _shortest(value: float) -> float:
    """The shortest decimal of an fp32 number: 1e-05 rather than 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _gguf_windows(get: Any, architecture: Architecture, n_layers: int) -> list[int]:
    window = get("attention.sliding_window", 0) or 0
    if architecture.name == "gemma3":
        pattern = get("attention.sliding_window_pattern", 6)
        if isinstance(pattern, list):
            return [window if is_local else 0 for is_local in pattern]
        return [window if (i + 1) % pattern else 0 for i in range(n_layers)]
    return [window] * n_layers


def _gguf_ropes(
    checkpoint: Checkpoint, get: Any, architecture: Architecture, head_dim: int, max_context: int
) -> tuple[list[Rope], Any]:
    params: dict[str, Any] = {"rope_theta": get("rope.freq_base", 10000.0)}
    kind = get("rope.scaling.type", "none")
    params["rope_type"] = "default" if kind == "none" else kind
    names = {
        "factor": "factor",
        "original_context_length": "original_max_position_embeddings",
        "attn_factor": "attention_factor",
        "yarn_beta_fast": "beta_fast",
        "yarn_beta_slow": "beta_slow",
    }
    params.update({ours: get(f"rope.scaling.{key}", None) for key, ours in names.items()})
    factors = {"rope_freqs": "freq_factors", "rope_factors_short": "short_factor", "rope_factors_long": "long_factor"}
    for source, ours in factors.items():
        tensor = checkpoint.tensors.get(source + ".weight")
        if tensor is not None:
            params[ours] = tensor.vector()
    if "short_factor" in params:
        params["rope_type"] = "longrope"
    params = {key: value for key, value in params.items() if value is not None}
    dim = get("rope.dimension_count", head_dim)
    if architecture.gguf_interleaved and dim != head_dim:
        raise ValueError(
            f"rope.dimension_count is {dim} and heads have {head_dim}: partial rotation of interleaved rows"
        )
    full = rope_table(params, dim, max_context)
    if architecture.name == "gemma3":
        local = rope_table({"rope_theta": get("rope.freq_base_swa", 10000.0)}, dim, max_context)
        return [local, full], lambda window: 0 if window else 1
    return [full], lambda window: 0
