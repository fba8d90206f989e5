"""A GGUF file of a given shape with random weights, for measuring speed where no real model of that size is at hand.

    python benchmarks/synthetic.py 8b -o FILE.gguf [--head Q6_K] [--embedding Q4_0] [--tokenizer-from MODEL.gguf]

llama.cpp and `dipper pack` read the very same file: architecture `llama`, every matrix of a layer Q4_0, norms one.
Codes are uniform random bits, drawn anew for every tensor; one tensor at a time is in memory. The same shape, options
and seed give the same file.

Weights have mean 0 and variance 1 / inputs, so each product keeps the size of what goes in and the residual stream
grows as the root of the layers. The f16 factor of a block has one size throughout a tensor and a random sign: codes run
from -8 to 7, whose mean of -1/2 would otherwise be a direction common to all rows, amplified from layer to layer.

The tokenizer, and with it the size of the vocabulary, is that of a real GGUF (by default of `dipper pull smollm2`).
Such a model says nothing about quality, nor about how a trained one's activations are spread.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from dipper.errors import ConfigError
from dipper.files import check_target, whole_file
from dipper.sources import DEFAULT_MODEL, pull
from dipper.vocabulary import read_gguf_metadata
from harness import parser, run_command

MAX_CONTEXT = 8192
# 64 MB for metadata and tokenizer: the largest vocabularies take half of that.
HEADER_BYTES = 64_000_000


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of a Llama-like model; the vocabulary comes with the tokenizer."""

    hidden_size: int
    intermediate_size: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int = 128


SHAPES = {
    # Qwen2.5-1.5B, without its biases
    "1.5b": Shape(hidden_size=1536, intermediate_size=8960, n_layers=28, n_heads=12, n_kv_heads=2),
    # Llama-3.2-3B
    "3b": Shape(hidden_size=3072, intermediate_size=8192, n_layers=28, n_heads=24, n_kv_heads=8),
    # Llama-3-8B
    "8b": Shape(hidden_size=4096, intermediate_size=14336, n_layers=32, n_heads=32, n_kv_heads=8),
    # Phi-3-medium, its fused matrices apart
    "14b": Shape(hidden_size=5120, intermediate_size=17920, n_layers=40, n_heads=40, n_kv_heads=10),
}


def _rms(codes: range) -> float:
    return math.sqrt(sum(code**2 for code in codes) / len(codes))


@dataclass(frozen=True)
class _Blocks:
    """A block type: where its f16 factor lies, and the root mean square of what it multiplies when bits are random."""

    factor_at: int
    rms: float


_BLOCKS = {
    "Q4_0": _Blocks(0, _rms(range(-8, 8))),
    "Q8_0": _Blocks(0, _rms(range(-128, 128))),
    "Q6_K": _Blocks(208, _rms(range(-32, 32)) * _rms(range(-128, 128))),  # codes times 8-bit scales of 16 inputs
}


@dataclass(frozen=True)
class _Tensor:
    """A matrix of random blocks, or a vector of ones."""

    name: str
    type: gguf.GGMLQuantizationType
    shape: tuple[int, ...]

    @property
    def byte_shape(self) -> tuple[int, ...]:
        try:
            return gguf.quant_shape_to_byte_shape(self.shape, self.type)
        except ValueError as error:
            raise ConfigError(
                f"{self.name} has rows of {self.shape[-1]} weights, not whole blocks of {self.type.name}: choose "
                "another type or size"
            ) from error

    @property
    def n_bytes(self) -> int:
        return math.prod(self.byte_shape)

    def content(self, rng: np.random.Generator) -> np.ndarray:  # byte_shape, uint8
        if len(self.shape) == 1:
            return np.ones(self.shape, "<f4").view(np.uint8)
        raw = rng.integers(0, 2**64, -(-self.n_bytes // 8), np.uint64).view(np.uint8)[: self.n_bytes]
        blocks, kind = raw.reshape(-1, gguf.GGML_QUANT_SIZES[self.type][1]), _BLOCKS[self.type.name]
        factor = np.array([1 / (kind.rms * math.sqrt(self.shape[-1]))], "<f2").view(np.uint8)
        sign = blocks[:, kind.factor_at + 1] & 0x80
        blocks[:, kind.factor_at : kind.factor_at + 2] = factor
        blocks[:, kind.factor_at + 1] |= sign
        return raw.reshape(self.byte_shape)


def _tensors(shape: Shape, n_vocab: int, embedding: str, head: str | None) -> Iterator[_Tensor]:
    def matrix(name: str, n_rows: int, n_inputs: int, kind: str = "Q4_0") -> _Tensor:
        return _Tensor(name + ".weight", gguf.GGMLQuantizationType[kind], (n_rows, n_inputs))

    def norm(name: str) -> _Tensor:
        return _Tensor(name + ".weight", gguf.GGMLQuantizationType.F32, (hidden,))

    hidden, inner = shape.hidden_size, shape.intermediate_size
    q_rows, kv_rows = shape.n_heads * shape.head_dim, shape.n_kv_heads * shape.head_dim
    yield matrix("token_embd", n_vocab, hidden, embedding)
    for n in range(shape.n_layers):
        at = f"blk.{n}."
        yield norm(at + "attn_norm")
        yield matrix(at + "attn_q", q_rows, hidden)
        yield matrix(at + "attn_k", kv_rows, hidden)
        yield matrix(at + "attn_v", kv_rows, hidden)
        yield matrix(at + "attn_output", hidden, q_rows)
        yield norm(at + "ffn_norm")
        yield matrix(at + "ffn_gate", inner, hidden)
        yield matrix(at + "ffn_up", inner, hidden)
        yield matrix(at + "ffn_down", hidden, inner)
    yield norm("output_norm")
    if head is not None:
        yield matrix("output", n_vocab, hidden, head)


def synthetic_gguf(
    shape: str | Shape,
    target: Path,
    *,
    embedding: str = "Q4_0",
    head: str | None = "Q4_0",
    tokenizer_from: Path | None = None,
    seed: int = 0,
) -> Path:
    """Write a model of this shape with random weights; the file is whole or absent.

    Args:
        shape: a name in `SHAPES`, or sizes of one's own.
        embedding: type of the embedding: Q4_0, Q8_0 or Q6_K.
        head: type of the output head; None: it is the embedding (tied).
        tokenizer_from: the GGUF whose tokenizer is copied; default what `dipper pull smollm2` fetches.

    Raises:
        DipperError: the file exists, the disk is too full, the rows do not fit the types, or there is no tokenizer.
    """
    if target.exists():
        raise ConfigError(f"{target} exists already: remove it or name another file")
    check_target(target)
    name = f"synthetic {shape}" if isinstance(shape, str) else "synthetic"
    sizes = _known_shape(shape) if isinstance(shape, str) else shape
    tokenizer = _tokenizer_keys(tokenizer_from or pull(DEFAULT_MODEL))
    tensors = list(_tensors(sizes, len(tokenizer["tokenizer.ggml.tokens"]), embedding, head))
    _check_space(target, sum(tensor.n_bytes for tensor in tensors) + HEADER_BYTES)
    with whole_file(target) as out:
        writer = gguf.GGUFWriter(out.name, "llama")  # opens the file itself; `out` is there to flush it
        try:
            _add_metadata(writer, name, sizes, tokenizer)
            _write(writer, tensors, np.random.default_rng(seed))
        finally:
            writer.close()
    return target


def _known_shape(name: str) -> Shape:
    if name not in SHAPES:
        raise ConfigError(f"there is no shape {name!r}; known are {', '.join(SHAPES)}")
    return SHAPES[name]


def _tokenizer_keys(path: Path) -> dict[str, Any]:
    keys = {key: value for key, value in read_gguf_metadata(path).items() if key.startswith("tokenizer.")}
    if "tokenizer.ggml.tokens" not in keys:
        raise ConfigError(f"{path}: there is no tokenizer in this GGUF: name another one")
    return keys


def _check_space(target: Path, needed: int) -> None:
    free = shutil.disk_usage(target.parent).free
    if needed > free:
        raise ConfigError(
            f"{target} needs {needed} bytes and the disk has {free} free: free {needed - free} bytes first"
        )


def _add_metadata(writer: gguf.GGUFWriter, name: str, shape: Shape, tokenizer: dict[str, Any]) -> None:
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(MAX_CONTEXT)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_block_count(shape.n_layers)
    writer.add_feed_forward_length(shape.intermediate_size)
    writer.add_head_count(shape.n_heads)
    writer.add_head_count_kv(shape.n_kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(500_000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    add: dict[type, Callable[[str, Any], None]] = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    for key, value in tokenizer.items():
        add[type(value)](key, value)


def _write(writer: gguf.GGUFWriter, tensors: list[_Tensor], rng: np.random.Generator) -> None:
    for tensor in tensors:
        writer.add_tensor_info(tensor.name, tensor.byte_shape, np.dtype(np.uint8), tensor.n_bytes, tensor.type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        writer.write_tensor_data(tensor.content(rng))


def main() -> None:
    cli = parser(__doc__)
    cli.add_argument("shape", choices=SHAPES)
    cli.add_argument("-o", "--output", type=Path, required=True, metavar="FILE.gguf")
    cli.add_argument("--embedding", choices=_BLOCKS, default="Q4_0", help="type of the embedding [Q4_0]")
    cli.add_argument("--head", choices=[*_BLOCKS, "tied"], default="Q4_0", help="type of the output head [Q4_0]")
    cli.add_argument(
        "--tokenizer-from", type=Path, metavar="MODEL.gguf", help=f"[what dipper pull {DEFAULT_MODEL} has]"
    )
    cli.add_argument("--seed", type=int, default=0)
    args = cli.parse_args()
    target = synthetic_gguf(
        args.shape,
        args.output,
        embedding=args.embedding,
        head=None if args.head == "tied" else args.head,
        tokenizer_from=args.tokenizer_from,
        seed=args.seed,
    )
    print(f"{target}: {target.stat().st_size / 1e9:.2f} GB")


if __name__ == "__main__":
    run_command(main)
