"""Checkpoints: a GGUF file or a folder of safetensors, read a few rows at a time in the grid each tensor was saved in.

Both formats hold row-major tensors at known offsets, so one reader serves both: `Tensor.rows` reads a slice of output
rows with plain reads (no memory map: mapped pages would count as this process's memory) and splits the bytes into
codes and scales. Nothing is requantised: `grid.dequantise` of the rows equals the source to fp32 rounding.

Every error is a `CheckpointError` that says what was seen and what to do.

Example:
    checkpoint = open_checkpoint(Path("model.gguf"))
    tensor = checkpoint.tensors["blk.0.ffn_up.weight"]
    weights = dequantise(tensor.grid, tensor.rows(0, 128))  # [128, C]
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dipper.errors import CheckpointError
from dipper.grid import F32, U8, Array, CodedRows, Grid, dequantise

__all__ = ["Checkpoint", "Tensor", "TensorType", "open_checkpoint", "read_hf_config"]

# A safetensors header is at most this long by that format's own rule.
_MAX_SAFETENSORS_HEADER_BYTES = 100_000_000
# Longer metadata arrays (vocabularies) are skipped: the tokenizer module reads them itself.
_MAX_ARRAY = 65_536


@dataclass(frozen=True)
class TensorType:
    """How a source format stores rows: blocks of ``block`` inputs in ``block_bytes``, and the grid they mean."""

    name: str
    block: int
    block_bytes: int
    grid: Grid
    split: Callable[[U8], CodedRows]

    def row_bytes(self, n_inputs: int) -> int:
        """Bytes of one row; ``n_inputs`` must be whole blocks."""
        return n_inputs // self.block * self.block_bytes


# --- block types: raw blocks [n, n_blocks, block_bytes] u8 -> CodedRows ----------------------------------------------


def _codes(parts: Array) -> Array:
    """``[n, n_blocks, ...]`` -> ``[n, C]``."""
    return parts.reshape(len(parts), -1)


def _f16_at(raw: U8, offset: int) -> Array:
    """The f16 at byte ``offset`` of every block: ``[n, n_blocks]``."""
    return np.ascontiguousarray(raw[..., offset : offset + 2]).view("<f2")[..., 0]


def _nibbles(raw: U8) -> U8:
    """``[..., k]`` bytes -> ``[..., 2k]``: all low nibbles, then all high ones."""
    return np.concatenate([raw & np.uint8(15), raw >> np.uint8(4)], axis=-1)


def _high_bits(raw: U8) -> U8:
    """Four bytes -> 32 bits, lowest first: ``[n, n_blocks, 32]``."""
    return np.unpackbits(raw, axis=-1, bitorder="little")


def _split_q4_0(raw: U8) -> CodedRows:
    return CodedRows(_codes(_nibbles(raw[..., 2:])), {"d": _f16_at(raw, 0)})


def _split_q4_1(raw: U8) -> CodedRows:
    return CodedRows(_codes(_nibbles(raw[..., 4:])), {"d": _f16_at(raw, 0), "m": _f16_at(raw, 2)})


def _split_q5_0(raw: U8) -> CodedRows:
    codes = _nibbles(raw[..., 6:]) | (_high_bits(raw[..., 2:6]) << np.uint8(4))
    return CodedRows(_codes(codes), {"d": _f16_at(raw, 0)})


def _split_q5_1(raw: U8) -> CodedRows:
    codes = _nibbles(raw[..., 8:]) | (_high_bits(raw[..., 4:8]) << np.uint8(4))
    return CodedRows(_codes(codes), {"d": _f16_at(raw, 0), "m": _f16_at(raw, 2)})


def _split_q8_0(raw: U8) -> CodedRows:
    return CodedRows(_codes(np.ascontiguousarray(raw[..., 2:])).view(np.int8), {"d": _f16_at(raw, 0)})


def _six_bit_scales(raw: U8) -> dict[str, Array]:
    """The eight 6-bit scales and offsets that Q4_K and Q5_K pack in 12 bytes, and their two f16 factors."""
    low, mid, high = raw[..., 4:8], raw[..., 8:12], raw[..., 12:16]
    six, four = np.uint8(63), np.uint8(15)
    top_of = np.uint8(6), np.uint8(4)  # the two highest bits of entries 4..7 sit above entries 0..3
    sub = np.concatenate([low & six, (high & four) | (low >> top_of[0] << top_of[1])], axis=-1)
    subm = np.concatenate([mid & six, (high >> np.uint8(4)) | (mid >> top_of[0] << top_of[1])], axis=-1)
    return {"sub": _codes(sub), "subm": _codes(subm), "d": _f16_at(raw, 0), "dm": _f16_at(raw, 2)}


def _k_nibbles(raw: U8) -> U8:
    """128 bytes -> 256 nibbles in input order: each run of 32 bytes holds 32 low, then 32 high ones."""
    runs = raw.reshape(*raw.shape[:2], 4, 32)
    return _nibbles(runs)


def _split_q4_k(raw: U8) -> CodedRows:
    return CodedRows(_codes(_k_nibbles(raw[..., 16:144])), _six_bit_scales(raw))


def _split_q5_k(raw: U8) -> CodedRows:
    bits = np.unpackbits(raw[..., 16:48, None], axis=-1, bitorder="little")  # [n, n_blocks, 32, 8]: bit k is run k
    high = bits.swapaxes(-1, -2).reshape(*raw.shape[:2], 4, 64)
    return CodedRows(_codes(_k_nibbles(raw[..., 48:176]) | (high << np.uint8(4))), _six_bit_scales(raw))


def _split_q6_k(raw: U8) -> CodedRows:
    shape = raw.shape[:2]
    low = _nibbles(raw[..., :128].reshape(*shape, 2, 64))  # [n, n_blocks, 2, 128]
    pairs = raw[..., 128:192].reshape(*shape, 2, 1, 32)
    shifts = np.arange(0, 8, 2, dtype=np.uint8).reshape(4, 1)
    high = ((pairs >> shifts) & np.uint8(3)).reshape(*shape, 2, 128)
    sub = np.ascontiguousarray(raw[..., 192:208]).view(np.int8)
    return CodedRows(_codes(low | (high << np.uint8(4))), {"sub": _codes(sub), "d": _f16_at(raw, 208)})


def _split_float(dtype: str) -> Callable[[U8], CodedRows]:
    return lambda raw: CodedRows(_codes(raw).view(dtype), {})


def _float_type(name: str, codes: str, dtype: str) -> TensorType:
    return TensorType(name, 1, np.dtype(dtype).itemsize, Grid(codes=codes), _split_float(dtype))


# GGUF's own type numbers.
_GGUF_TYPES = {
    0: _float_type("F32", "f32", "<f4"),
    1: _float_type("F16", "f16", "<f2"),
    30: _float_type("BF16", "bf16", "<u2"),
    2: TensorType("Q4_0", 32, 18, Grid(codes="q4", zero_point=8, scale="f16"), _split_q4_0),
    3: TensorType("Q4_1", 32, 20, Grid(codes="q4", scale="f16m"), _split_q4_1),
    6: TensorType("Q5_0", 32, 22, Grid(codes="q5", zero_point=16, scale="f16"), _split_q5_0),
    7: TensorType("Q5_1", 32, 24, Grid(codes="q5", scale="f16m"), _split_q5_1),
    8: TensorType("Q8_0", 32, 34, Grid(codes="q8", scale="f16"), _split_q8_0),
    12: TensorType("Q4_K", 256, 144, Grid(codes="q4", scale="u8m", super_blocks=8), _split_q4_k),
    13: TensorType("Q5_K", 256, 176, Grid(codes="q5", scale="u8m", super_blocks=8), _split_q5_k),
    14: TensorType(
        "Q6_K", 256, 210, Grid(codes="q6", group=16, zero_point=32, scale="i8", super_blocks=16), _split_q6_k
    ),
}
_SAFETENSORS_TYPES = {"F32": _GGUF_TYPES[0], "F16": _GGUF_TYPES[1], "BF16": _GGUF_TYPES[30]}
# Only so that a message can name what it cannot read.
_GGUF_OTHER_TYPES = {
    10: "Q2_K", 11: "Q3_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL",
    21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M",
    34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4",
}  # fmt: skip


# --- tensors ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tensor:
    """One stored tensor: where it lies and in which grid; nothing is read before `rows` or `vector`.

    Attributes:
        shape: ``(n,)`` or ``(R, C)``.
        type: how rows are stored; None when dipper does not read the type.
        type_name: the source format's name of the type, for messages.
    """

    name: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    type: TensorType | None
    type_name: str

    @property
    def grid(self) -> Grid:
        """The grid the tensor is stored in.

        Raises:
            CheckpointError: its type is not supported.
        """
        return self._known_type().grid

    @property
    def n_rows(self) -> int:
        """Output rows; 1 for a vector."""
        return self.shape[0] if len(self.shape) == 2 else 1

    @property
    def n_inputs(self) -> int:
        """Inputs of a row."""
        return self.shape[-1]

    def _known_type(self) -> TensorType:
        if self.type is None:
            known = ", ".join(sorted({t.name for t in _GGUF_TYPES.values()}))
            raise CheckpointError(
                f"{self.path}: tensor {self.name!r} is {self.type_name}, which dipper does not read; use a file "
                f"with {known}"
            )
        return self.type

    def rows(self, start: int, stop: int) -> CodedRows:
        """Rows ``start..stop`` as codes ``[stop - start, C]`` and scales.

        Raises:
            CheckpointError: the type is not supported, the file is cut, or a number is NaN or infinite.
        """
        kind = self._known_type()
        row_bytes = kind.row_bytes(self.n_inputs)
        raw = _read_at(self.path, self.offset + start * row_bytes, (stop - start) * row_bytes)
        blocks = np.frombuffer(raw, np.uint8).reshape(stop - start, self.n_inputs // kind.block, kind.block_bytes)
        rows = kind.split(blocks)
        floats = [rows.codes] if kind.grid.is_float else [a for a in rows.scales.values() if a.dtype.kind == "f"]
        for array in floats:
            bad = _is_broken(array, kind.grid.codes)
            if bad.any():
                row = start + int(np.argwhere(bad)[0][0])
                what = "a weight" if kind.grid.is_float else "a scale"
                raise CheckpointError(
                    f"{self.path}: tensor {self.name!r} has {what} that is NaN or infinite in row {row}; "
                    "the file is damaged or the model broken: download it again"
                )
        return rows

    def vector(self) -> F32:
        """A one-dimensional tensor as fp32 ``[n]``.

        Raises:
            CheckpointError: as `rows`.
        """
        vector: F32 = dequantise(self.grid, self.rows(0, 1))[0]
        return vector


def _is_broken(array: Array, codes: str) -> Array:
    """Where numbers are NaN or infinite: every exponent bit set."""
    if codes == "bf16":
        bits, exponent = array, np.uint16(0x7F80)
    elif array.dtype == np.float16:
        bits, exponent = array.view(np.uint16), np.uint16(0x7C00)
    else:
        bits, exponent = array.view(np.uint32), np.uint32(0x7F800000)
    return np.asarray((bits & exponent) == exponent)


def _read_at(path: Path, offset: int, n_bytes: int) -> bytearray:
    out = bytearray(n_bytes)
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(offset)
            view, done = memoryview(out), 0
            while done < n_bytes:
                got = file.readinto(view[done:])
                if not got:
                    break
                done += got
    except OSError as error:
        raise CheckpointError(
            f"{path}: reading failed ({error.strerror}); check the disk or download the file again"
        ) from error
    if done < n_bytes:
        raise CheckpointError(
            f"{path}: {n_bytes} bytes were expected at offset {offset} and {done} are there; "
            "the file is cut: download it again"
        )
    return out


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: metadata and tensors by their source names.

    Attributes:
        kind: ``gguf`` or ``hf``.
        path: the file or folder.
        metadata: GGUF keys, or the content of config.json.
        files: every file that holds weights or metadata.
    """

    kind: str
    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, Tensor]
    files: list[Path] = field(default_factory=list)

    def sha256(self) -> str:
        """SHA-256 of the one file, or of the lines ``<sha256>  <name>`` of several, sorted by name."""
        digests = {path.name: _file_sha256(path) for path in self.files}
        if self.kind == "gguf":
            return digests[self.path.name]
        lines = "".join(f"{digests[name]}  {name}\n" for name in sorted(digests))
        return hashlib.sha256(lines.encode()).hexdigest()


def _file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        with path.open("rb", buffering=0) as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise CheckpointError(f"{path}: reading failed ({error.strerror}); check the disk") from error
    return digest.hexdigest()


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a GGUF file or a Hugging Face folder.

    Args:
        path: a ``.gguf`` file, or a folder with ``config.json`` and safetensors.

    Raises:
        CheckpointError: nothing is there, the format is unknown, or the file is cut or malformed.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"{path}: there is no such file or folder; give a .gguf file or a Hugging Face folder")
    try:
        return _open_folder(path) if path.is_dir() else _open_gguf(path)
    except OSError as error:
        raise CheckpointError(
            f"{error.filename or path}: cannot be read ({error.strerror}); check its permissions"
        ) from error


# --- GGUF ------------------------------------------------------------------------------------------------------------

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9


class _Cursor:
    """Reads GGUF's header values one after the other."""

    def __init__(self, buffer: mmap.mmap, path: Path) -> None:
        self.buffer, self.path, self.at = buffer, path, 0

    def take(self, n_bytes: int) -> bytes:
        if n_bytes > len(self.buffer) - self.at:
            raise CheckpointError(
                f"{self.path}: the header asks for {n_bytes} bytes at offset {self.at} of a file of "
                f"{len(self.buffer)}; the file is cut or damaged: download it again"
            )
        self.at += n_bytes
        return self.buffer[self.at - n_bytes : self.at]

    def scalar(self, layout: str) -> Any:
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def string(self) -> str:
        raw = self.take(self.scalar("<Q"))
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(
                f"{self.path}: the string at offset {self.at - len(raw)} is not UTF-8; the file is damaged: "
                "download it again"
            ) from error

    def value(self, kind: int) -> Any:
        """A metadata value; None for an array that is too long to matter here."""
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self._array()
        if kind not in _SCALARS:
            raise CheckpointError(
                f"{self.path}: metadata type {kind} at offset {self.at} is unknown; the file is damaged"
            )
        return self.scalar(_SCALARS[kind])

    def _array(self) -> Any:
        kind, count = self.scalar("<I"), self.scalar("<Q")
        if kind in _SCALARS:
            raw = self.take(count * struct.calcsize(_SCALARS[kind]))
            return None if count > _MAX_ARRAY else np.frombuffer(raw, _SCALARS[kind]).tolist()
        if count > len(self.buffer):
            raise CheckpointError(f"{self.path}: an array of {count} entries does not fit in the file; it is damaged")
        for _ in range(count):  # strings and arrays of arrays: only their end is of interest
            if kind == _STRING:
                self.take(self.scalar("<Q"))
            else:
                self.value(kind)
        return None


def _open_gguf(path: Path) -> Checkpoint:
    with path.open("rb") as file:
        magic = file.read(4)
        if magic != b"GGUF":
            raise CheckpointError(
                f"{path}: starts with {magic!r}, not with b'GGUF'; give a .gguf file or a folder with config.json "
                "and safetensors"
            )
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as buffer:
            cursor = _Cursor(buffer, path)
            cursor.take(4)
            return _parse_gguf(cursor, path)


def _parse_gguf(cursor: _Cursor, path: Path) -> Checkpoint:
    version = cursor.scalar("<I")
    if version not in (2, 3):
        raise CheckpointError(
            f"{path}: GGUF version {version} is not one that dipper reads (2, 3, little-endian); convert the "
            "model again"
        )
    n_tensors, n_keys = cursor.scalar("<Q"), cursor.scalar("<Q")
    metadata: dict[str, Any] = {}
    for _ in range(n_keys):
        key = cursor.string()
        metadata[key] = cursor.value(cursor.scalar("<I"))
    if metadata.get("split.count", 0) > 1:
        raise CheckpointError(
            f"{path}: is part {metadata.get('split.no', 0) + 1} of {metadata['split.count']}; merge the parts first "
            "(llama-gguf-split --merge)"
        )
    infos = []
    for _ in range(n_tensors):
        name, n_dims = cursor.string(), cursor.scalar("<I")
        if n_dims > 4:
            raise CheckpointError(
                f"{path}: tensor {name!r} has {n_dims} dimensions, at most 4 are allowed; the file is damaged"
            )
        dims = tuple(cursor.scalar("<Q") for _ in range(n_dims))
        infos.append((name, dims, cursor.scalar("<I"), cursor.scalar("<Q")))
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise CheckpointError(f"{path}: general.alignment is {alignment!r}, not a positive number; the file is damaged")
    data = -(-cursor.at // alignment) * alignment
    tensors = {info[0]: _gguf_tensor(path, data, len(cursor.buffer), *info) for info in infos}
    return Checkpoint("gguf", path, metadata, tensors, [path])


def _gguf_tensor(
    path: Path, data: int, file_bytes: int, name: str, dims: tuple[int, ...], type_id: int, offset: int
) -> Tensor:
    # GGUF counts dimensions from the innermost; trailing ones are padding.
    while len(dims) > 1 and dims[-1] == 1:
        dims = dims[:-1]
    kind = _GGUF_TYPES.get(type_id)
    type_name = kind.name if kind else _GGUF_OTHER_TYPES.get(type_id, f"of unknown type {type_id}")
    if len(dims) not in (1, 2) or 0 in dims:
        raise CheckpointError(
            f"{path}: tensor {name!r} has the shape {dims}; dense models have vectors and matrices only"
        )
    tensor = Tensor(name, tuple(reversed(dims)), path, data + offset, kind, type_name)
    if kind is not None:
        if dims[0] % kind.block:
            raise CheckpointError(
                f"{path}: tensor {name!r} has rows of {dims[0]}, not a multiple of {type_name}'s {kind.block}; "
                "the file is damaged"
            )
        _check_inside(tensor, kind.row_bytes(dims[0]) * tensor.n_rows, file_bytes)
    return tensor


def _check_inside(tensor: Tensor, n_bytes: int, file_bytes: int) -> None:
    if tensor.offset + n_bytes > file_bytes:
        raise CheckpointError(
            f"{tensor.path}: tensor {tensor.name!r} ends at byte {tensor.offset + n_bytes} and the file has "
            f"{file_bytes}; the file is cut: download it again"
        )


# --- Hugging Face folders --------------------------------------------------------------------------------------------


def _open_folder(path: Path) -> Checkpoint:
    config_path = path / "config.json"
    config = read_hf_config(path)
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "unknown")
        raise CheckpointError(
            f"{path}: the weights are quantised with {method!r}, which dipper does not read; use the 16-bit model "
            "or a GGUF file"
        )
    tensors: dict[str, Tensor] = {}
    shards = _shards(path)
    for shard in shards:
        for tensor in _safetensors_header(shard):
            if tensor.name in tensors:
                raise CheckpointError(
                    f"{shard}: tensor {tensor.name!r} is in {tensors[tensor.name].path.name} too; remove one"
                )
            tensors[tensor.name] = tensor
    return Checkpoint("hf", path, config, tensors, [config_path, *shards])


def read_hf_config(path: Path) -> dict[str, Any]:
    """The content of a Hugging Face folder's config.json.

    Raises:
        CheckpointError: there is none, or it is malformed.
    """
    config_path = path / "config.json"
    if not config_path.is_file():
        raise CheckpointError(f"{path}: has no config.json; give a Hugging Face model folder or a .gguf file")
    return _read_json(config_path)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: is not JSON ({error}); download it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, not an object; download it again")
    return content


def _shards(path: Path) -> list[Path]:
    """The safetensors files of a folder, by its index where it has one."""
    index = path / "model.safetensors.index.json"
    if index.is_file():
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise CheckpointError(f"{index}: has no weight_map of file names; download it again")
        # Only names inside the folder: an index is input, and may not point elsewhere.
        shards = [path / Path(name).name for name in sorted(set(weight_map.values()))]
    else:
        shards = sorted(path.glob("*.safetensors"))
    if not shards:
        raise CheckpointError(
            f"{path}: has no .safetensors files; dipper does not read pickled weights, save the model as safetensors"
        )
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        raise CheckpointError(
            f"{path}: {', '.join(missing)} named by the index is missing; download the rest of the model"
        )
    return shards


def _safetensors_header(path: Path) -> Iterable[Tensor]:
    file_bytes = path.stat().st_size
    if file_bytes < 8:
        raise CheckpointError(f"{path}: has {file_bytes} bytes, too few for a safetensors file; download it again")
    (header_bytes,) = struct.unpack("<Q", _read_at(path, 0, 8))
    if header_bytes > min(file_bytes - 8, _MAX_SAFETENSORS_HEADER_BYTES):
        raise CheckpointError(
            f"{path}: its header should have {header_bytes} bytes and the file has {file_bytes}; "
            "it is cut or not a safetensors file: download it again"
        )
    try:
        header = json.loads(bytes(_read_at(path, 8, header_bytes)))
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        return [_safetensors_tensor(path, 8 + header_bytes, file_bytes, name, entry) for name, entry in entries.items()]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path}: its safetensors header is malformed ({error}); download it again") from error


def _safetensors_tensor(path: Path, data: int, file_bytes: int, name: str, entry: dict[str, Any]) -> Tensor:
    shape = tuple(int(n) for n in entry["shape"])
    start, stop = (int(n) for n in entry["data_offsets"])
    kind = _SAFETENSORS_TYPES.get(entry["dtype"]) if len(shape) in (1, 2) else None
    tensor = Tensor(name, shape, path, data + start, kind, str(entry["dtype"]))
    if kind is not None and (stop - start != math.prod(shape) * kind.block_bytes or start < 0 or min(shape) < 1):
        raise CheckpointError(
            f"{path}: tensor {name!r} of shape {shape} in {entry['dtype']} has {stop - start} bytes; the file is "
            "damaged"
        )
    _check_inside(tensor, stop - start, file_bytes)
    return tensor
