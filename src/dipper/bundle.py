"""Bundles: open and validate, verify checksums, read weights back, account for bytes; docs/bundle-format.md is the law.

`Bundle.open` trusts nothing in the header: hash, version, sizes, offsets, alignment, overlap and shapes are checked
before any of it is used. `Bundle.verify` reads every byte. `pack` makes a bundle; its writer lives in `packer` and is
imported only then, so running a bundle needs no checkpoint reader's time.

Example:
    bundle = Bundle.open("model.dipper")
    gate = bundle.dequantise("layers.0.gate")  # f32 [intermediate, hidden]
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from dipper.errors import BundleError
from dipper.glu import MAX_INT, ModelConfig, matrix_shapes, vector_shapes
from dipper.grid import (
    F32,
    U8,
    Array,
    CodedRows,
    Grid,
    dequantise,
    join_planes,
    padded_rows,
    plane_bytes,
    split_planes,
    tile_sizes,
    unpack_tiles,
)

__all__ = [
    "ALIGNMENT",
    "REGION_MATRICES",
    "RESIDENT_ALIGNMENT",
    "UNIT_BYTES",
    "VERSION",
    "Bundle",
    "embedding_fields",
    "header_bytes",
    "pack",
    "region_name",
    "residual_name",
]

VERSION = 2
ALIGNMENT = 4096
RESIDENT_ALIGNMENT = 64
UNIT_BYTES = 16384  # of a unit, about, where nothing else is asked for
REGION_MATRICES = {"input": ("gate", "up"), "glu": ("down",)}
_MAX_HEADER_BYTES = 64 << 20
_FILES = ("resident.bin", "flash.bin", "tokenizer.json", "chat_template.jinja")
_GRID_KEYS = ("codes", "group", "zero_point", "scale", "super_blocks")
_HEADER_KEYS = frozenset(
    (
        "format",
        "version",
        "created_by",
        "alignment",
        "source",
        "model",
        "files",
        "tensors",
        "regions",
        "embedding",
        "header_sha256",
    )
)


def pack(
    source: Path | str,
    out: Path | str,
    bits: str = "source",
    progress: Callable[[int, int], None] | None = None,
    *,
    overwrite: bool = False,
    tokenizer: bool = True,
    base_bits: int | tuple[int, int] = 0,
    unit_bytes: int = UNIT_BYTES,
    energies: Mapping[str, Array] | None = None,
) -> Path:
    """Pack a checkpoint into a bundle directory, one tensor at a time.

    Peak memory is two of the largest tensors plus 200 MB at most. ``out`` appears only when it is complete.

    Args:
        source: a ``.gguf`` file or a Hugging Face folder.
        out: the directory to make.
        bits: ``source`` keeps every tensor's own grid (lossless); ``16`` stores the MLP as 16-bit floats; ``8`` and
            ``4`` quantise the MLP of a 16- or 32-bit source in groups of 32 inputs. With ``4``, ``8`` and ``16`` the
            attention and head of a 16- or 32-bit source are stored at 8 bits; an untied embedding keeps 16 bits.
        progress: called with (bytes written, bytes in all) as files grow.
        overwrite: replace a bundle that is already at ``out``.
        tokenizer: whether to write tokenizer files; without them only token ids can be used.
        base_bits: 0, or the upper bits of every code (1 to 4) that make a base, apart from the residual; a region is
            split where all its matrices have 4-, 5- or 6-bit codes of more bits than that.
        unit_bytes: about what a unit of residual records takes on flash.
        energies: by region ("layers.N.input", "layers.N.glu") the mean square of every column's input, ``[n_columns]``;
            the columns of a split region then lie by descending energy times the residual's squared norm. None: in
            their own order.

    Returns:
        ``out``.

    Raises:
        CheckpointError: the source is cut, malformed, or of an unknown architecture.
        ConfigError: ``bits`` is unknown, or would quantise a quantised source again; no region can be split with
            ``base_bits``, or a residual would have more than 4 bits; ``energies`` do not fit the model.
        BundleError: ``out`` exists, its folder is missing or not writable, or the disk is full.
    """
    from dipper.packer import write_bundle

    return write_bundle(
        Path(source), Path(out), bits=bits, progress=progress, overwrite=overwrite, tokenizer=tokenizer,
        base_bits=base_bits, unit_bytes=unit_bytes, energies=energies,
    )  # fmt: skip


def region_name(region: Mapping[str, Any]) -> str:
    """A region as names and messages have it: ``layers.N.input`` or ``layers.N.glu``."""
    return f"layers.{region['layer']}.{region['kind']}"


def residual_name(region: Mapping[str, Any]) -> str:
    """The tensor that holds the norms of a split region's residuals, ``[n_columns]``."""
    return f"{region_name(region)}_residual"


# --- the header ------------------------------------------------------------------------------------------------------


def _canonical(content: Any) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()


def header_bytes(header: dict[str, Any]) -> bytes:
    """The bytes of bundle.json, whose hash is made here; one that the header has already is replaced."""
    return _canonical({**header, "header_sha256": _header_sha256(header)}) + b"\n"


def _header_sha256(header: dict[str, Any]) -> str:
    hashed = {key: value for key, value in header.items() if key != "header_sha256"}
    return hashlib.sha256(_canonical(hashed)).hexdigest()


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key appears twice")
    return result


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number")


def _read_header(path: Path) -> dict[str, Any]:
    """bundle.json, after a check of format, version and hash."""
    file = path / "bundle.json"
    if not path.is_dir() or not file.is_file():
        raise BundleError(
            f"{path}: is not a bundle (no bundle.json); make one with `dipper pack SOURCE -o {path.name}`"
        )
    if file.stat().st_size > _MAX_HEADER_BYTES:
        raise BundleError(
            f"{file}: has {file.stat().st_size} bytes, a header has at most {_MAX_HEADER_BYTES}; pack again"
        )
    try:
        header = json.loads(file.read_bytes(), object_pairs_hook=_unique, parse_constant=_no_constant)
        # In here: 1e999 reads as infinity, which has no canonical form to hash.
        sha256 = _header_sha256(header) if isinstance(header, dict) else None
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{file}: is not valid JSON ({error}); the bundle is damaged: pack again") from error
    except OSError as error:
        raise BundleError(f"{file}: cannot be read ({error.strerror}); check its permissions") from error
    if not isinstance(header, dict) or header.get("format") != "dipper-bundle":
        raise BundleError(f"{file}: is not the header of a dipper bundle; pack again")
    version = header.get("version")
    if not isinstance(version, int) or version < 1:
        raise BundleError(
            f"{file}: format version {version!r} is not a number from 1; the bundle is damaged: pack again"
        )
    if version > VERSION:
        raise BundleError(f"{path}: format version {version} is newer than this dipper reads ({VERSION}): upgrade")
    if header.get("header_sha256") != sha256:
        raise BundleError(f"{file}: does not match its own checksum; the bundle is damaged: pack again")
    return header


# --- validation ------------------------------------------------------------------------------------------------------


class _Spans:
    """Byte ranges of one file: aligned, inside, disjoint."""

    def __init__(self, file: str, n_bytes: int) -> None:
        self.file, self.n_bytes = file, n_bytes
        self.taken: list[tuple[int, int, str]] = []

    def add(self, name: str, offset: Any, n_bytes: int, alignment: int) -> None:
        _require(_is_count(offset), f"{name}: offset {offset!r} is not a number from 0")
        _require(offset % alignment == 0, f"{name}: offset {offset} is not a multiple of {alignment}")
        _require(
            offset + n_bytes <= self.n_bytes,
            f"{name}: ends at {offset + n_bytes}, {self.file} has {self.n_bytes} bytes",
        )
        self.taken.append((offset, offset + n_bytes, name))

    def check_overlap(self) -> None:
        self.taken.sort()
        for (_, end, name), (start, _, other) in zip(self.taken, self.taken[1:], strict=False):
            _require(start >= end, f"{name} and {other} overlap in {self.file} at byte {start}")


def _require(condition: bool, problem: str) -> None:
    if not condition:
        raise ValueError(problem)


def _require_number(name: str, entry: dict[str, Any], key: str, value: int) -> None:
    _require(_is_count(entry[key]) and entry[key] == value, f"{name}: {key} is {entry[key]!r}, not {value}")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _checked_grid(name: str, entry: dict[str, Any], n_inputs: int) -> Grid:
    """The grid of a matrix with ``n_inputs``; a super-block is never longer than a row."""
    grid = _grid_of(entry)
    n_blocks = grid.n_blocks(n_inputs)
    _require(grid.super_blocks <= n_blocks, f"{name}: super_blocks is {grid.super_blocks}, a row has {n_blocks} blocks")
    return grid


def _grid_of(entry: dict[str, Any]) -> Grid:
    values = {key: entry[key] for key in _GRID_KEYS}
    for key in ("group", "zero_point", "super_blocks"):
        _require(isinstance(values[key], int) and not isinstance(values[key], bool), f"{key} is {values[key]!r}")
    for key in ("codes", "scale"):
        _require(isinstance(values[key], str), f"{key} is {values[key]!r}")
    return Grid(**values)


def _validate(header: dict[str, Any], path: Path) -> ModelConfig:
    """Check everything a reader relies on; raises ValueError, KeyError or TypeError."""
    _require(set(header) == _HEADER_KEYS, f"keys are missing or unknown: {sorted(set(header) ^ _HEADER_KEYS)}")
    if header["version"] == 1:
        _fill_version_1(header["regions"])
    _require(header["alignment"] == ALIGNMENT, f"alignment is {header['alignment']!r}, not {ALIGNMENT}")
    model = ModelConfig.from_json(header["model"])
    files = header["files"]
    _validate_files(files, path)
    resident = _Spans("resident.bin", files["resident.bin"]["bytes"])
    flash = _Spans("flash.bin", files["flash.bin"]["bytes"])
    _validate_tensors(header["tensors"], header["regions"], model, resident)
    _validate_regions(header["regions"], model, resident, flash)
    for region in header["regions"]:
        ordered = region["order"] is not None and region["base"] is None
        _require(
            not ordered or header["version"] == 1,
            f"{region_name(region)}: has an order and no base; from version 2 on only a split region is reordered",
        )
    _validate_embedding(header["embedding"], model, flash)
    resident.check_overlap()
    flash.check_overlap()
    return model


def _fill_version_1(regions: list[dict[str, Any]]) -> None:
    """What version 2 adds to the header, as version 1 means it."""
    for region in regions:
        region.update(base=None, unit_bytes=region["record_bytes"])
        for matrix in region["matrices"]:
            matrix["base_bits"] = 0


def _validate_files(files: dict[str, Any], path: Path) -> None:
    for name, entry in files.items():
        _require(name in _FILES, f"file {name!r} is not part of a bundle")
        _require(_is_count(entry["bytes"]), f"{name}: bytes is {entry['bytes']!r}")
    for name in ("resident.bin", "flash.bin"):
        _require(name in files, f"{name} is not listed")
        _require(
            files[name]["bytes"] % ALIGNMENT == 0, f"{name}: {files[name]['bytes']} bytes are not whole {ALIGNMENT}s"
        )
    for name, entry in files.items():
        file = path / name
        if not file.is_file():
            raise BundleError(f"{file}: is missing; the bundle is incomplete: pack again")
        if file.stat().st_size != entry["bytes"]:
            raise BundleError(
                f"{file}: has {file.stat().st_size} bytes, the header says {entry['bytes']}; "
                "the bundle is cut or damaged: pack again"
            )


def _validate_tensors(
    tensors: dict[str, Any], regions: list[dict[str, Any]], model: ModelConfig, resident: _Spans
) -> None:
    matrices = {n: s for n, s in matrix_shapes(model).items() if not n.endswith((".gate", ".up", ".down"))}
    vectors = vector_shapes(model)
    for table in model.rope:
        for name in filter(None, (table.short, table.long)):
            _require(name not in matrices and name not in vectors, f"RoPE vector {name!r} takes another tensor's name")
            vectors[name] = table.dim // 2
    n_columns = {"input": model.hidden_size, "glu": model.intermediate_size}
    residuals = {residual_name(r): n_columns[r["kind"]] for r in regions if r["base"] is not None}
    vectors |= residuals
    required = {
        *matrices,
        *residuals,
        "final_norm",
        *(n for n in vectors if n.startswith("rope") or n.endswith((".attn_norm", ".mlp_norm"))),
    }
    missing = sorted(required - set(tensors))
    _require(not missing, f"tensors are missing, the first is {missing[:1]}")
    for name, entry in tensors.items():
        if entry["kind"] == "vector":
            _require(
                entry["shape"] == [vectors.get(name)], f"{name}: shape is {entry['shape']}, not [{vectors.get(name)}]"
            )
            resident.add(name, entry["offset"], 4 * vectors[name], RESIDENT_ALIGNMENT)
            continue
        _require(entry["kind"] == "matrix", f"{name}: kind is {entry['kind']!r}")
        shape = matrices.get(name)
        _require(shape is not None and entry["shape"] == list(shape), f"{name}: shape is {entry['shape']}, not {shape}")
        assert shape is not None
        grid = _checked_grid(name, entry, shape[1])
        n_bytes = shape[1] * sum(plane_bytes(shape[0], bits) for bits, _ in grid.planes)
        _require(entry["bytes"] == n_bytes, f"{name}: bytes is {entry['bytes']!r}, not {n_bytes}")
        resident.add(name, entry["offset"], n_bytes, RESIDENT_ALIGNMENT)
        _validate_scales(name, entry["scales"], grid, shape, resident)


def _validate_scales(name: str, scales: dict[str, Any], grid: Grid, shape: tuple[int, int], resident: _Spans) -> None:
    arrays = grid.scale_arrays(shape[1])
    _require(set(scales) - {"tier"} == {a for a, _, _ in arrays}, f"{name}: scale arrays are {sorted(scales)}")
    for array, dtype, n_entries in arrays:
        n_bytes = n_entries * padded_rows(shape[0]) * dtype.itemsize
        _require(
            scales[array]["bytes"] == n_bytes, f"{name}.{array}: bytes is {scales[array]['bytes']!r}, not {n_bytes}"
        )
        resident.add(f"{name}.{array}", scales[array]["offset"], n_bytes, RESIDENT_ALIGNMENT)


def _validate_regions(regions: list[dict[str, Any]], model: ModelConfig, resident: _Spans, flash: _Spans) -> None:
    wanted = [(layer, kind) for layer in range(model.n_layers) for kind in REGION_MATRICES]
    found = [(region["layer"], region["kind"]) for region in regions]
    _require(found == wanted, f"regions are not `input` then `glu` of {model.n_layers} layers")
    shapes = matrix_shapes(model)
    for region in regions:
        name = region_name(region)
        names = REGION_MATRICES[region["kind"]]
        _require([m["name"] for m in region["matrices"]] == list(names), f"{name}: matrices are not {', '.join(names)}")
        n_columns = shapes[f"layers.{region['layer']}.{names[0]}"][1]
        _require(region["n_columns"] == n_columns, f"{name}: n_columns is {region['n_columns']!r}, not {n_columns}")
        _validate_order(name, region["order"], n_columns)
        record_bytes = {"flash": 0, "base": 0}
        for matrix in region["matrices"]:
            full = f"layers.{region['layer']}.{matrix['name']}"
            _validate_matrix(full, matrix, region, shapes[full], record_bytes, resident)
        _validate_region_spans(name, region, record_bytes, flash)


def _validate_region_spans(name: str, region: dict[str, Any], record_bytes: dict[str, int], flash: _Spans) -> None:
    """Check what a region takes of flash.bin, given the bytes of its records by tier."""
    base, n_columns, u = region["base"], region["n_columns"], region["columns_per_unit"]
    size = record_bytes["flash"]
    _require_number(name, region, "record_bytes", size)
    _require(size <= MAX_INT, f"{name}: record_bytes is {size}, more than {MAX_INT}")
    most = 1 if base is None else n_columns
    _require(_is_count(u) and 1 <= u <= most, f"{name}: columns_per_unit is {u!r}, it must lie in 1..{most}")
    unit_bytes = region["unit_bytes"]
    sizes = [size] if base is None else sorted({u * size, _padded(u * size)})
    wanted = " or ".join(map(str, sizes))
    _require(_is_count(unit_bytes) and unit_bytes in sizes, f"{name}: unit_bytes is {unit_bytes!r}, not {wanted}")
    _require(unit_bytes <= MAX_INT, f"{name}: unit_bytes is {unit_bytes}, more than {MAX_INT}")
    _require_number(name, region, "bytes", -(-n_columns // u) * unit_bytes)
    _require(isinstance(region["sha256"], str), f"{name}: sha256 is {region['sha256']!r}")
    flash.add(name, region["offset"], _padded(region["bytes"]), ALIGNMENT)
    if base is None:
        return
    name = f"{name} base"
    _require(record_bytes["base"] <= MAX_INT, f"{name}: record_bytes is {record_bytes['base']}, more than {MAX_INT}")
    _require_number(name, base, "record_bytes", record_bytes["base"])
    _require_number(name, base, "bytes", n_columns * record_bytes["base"])
    _require_number(name, base, "offset", region["offset"] + _padded(region["bytes"]))
    _require(isinstance(base["sha256"], str), f"{name}: sha256 is {base['sha256']!r}")
    flash.add(name, base["offset"], _padded(base["bytes"]), ALIGNMENT)


def _validate_order(name: str, order: Any, n_columns: int) -> None:
    if order is not None:
        _require(
            isinstance(order, list) and all(_is_count(j) for j in order), f"{name}: order is not a list of columns"
        )
        _require(sorted(order) == list(range(n_columns)), f"{name}: order is not a permutation of {n_columns} columns")


def _validate_matrix(
    name: str,
    matrix: dict[str, Any],
    region: dict[str, Any],
    shape: tuple[int, int],
    record_bytes: dict[str, int],
    resident: _Spans,
) -> None:
    """Check one matrix of a region; ``record_bytes``, by tier what the records have before it, grows by its planes."""
    grid = _checked_grid(name, matrix, shape[1])
    base, base_bits = region["base"], matrix["base_bits"]
    _require(
        _is_count(base_bits) and (base_bits > 0) == (base is not None),
        f"{name}: base_bits is {base_bits!r}, and the region has {'no' if base is None else 'a'} base",
    )
    parts = dict(zip(("flash", "base"), split_planes(grid.codes, base_bits), strict=True))
    n_planes = sum(map(len, parts.values()))
    _require(matrix["rows"] == shape[0], f"{name}: rows is {matrix['rows']!r}, not {shape[0]}")
    _require(len(matrix["planes"]) == n_planes, f"{name}: {grid.codes} has {n_planes} planes")
    places = [(tier, *place) for tier, part in parts.items() for place in part]
    for plane, (tier, bits, shift) in zip(matrix["planes"], places, strict=True):
        expected = {"bits": bits, "shift": shift, "kind": "codes", "tier": tier, "offset": record_bytes[tier]}
        expected["stride"] = (region if tier == "flash" else base)["record_bytes"]
        _require(plane == expected, f"{name}: plane is {plane}, expected {expected}")
        record_bytes[tier] += plane_bytes(shape[0], bits)
    tier = matrix["scales"]["tier"]
    _require(tier == "resident", f"{name}: scales are in {tier!r}, not resident")
    _validate_scales(name, matrix["scales"], grid, shape, resident)


def _validate_embedding(entry: dict[str, Any] | None, model: ModelConfig, flash: _Spans) -> None:
    _require(
        (entry is None) == model.tied,
        f"the embedding is {'absent' if entry is None else 'present'} and tied is {model.tied}",
    )
    if entry is None:
        return
    grid = _checked_grid("embedding", entry, model.hidden_size)
    row_bytes = sum(embedding_fields(grid, model.hidden_size))
    _require(row_bytes <= MAX_INT, f"embedding: row_bytes is {row_bytes}, more than {MAX_INT}")
    expected = {"rows": model.vocab_size, "row_bytes": row_bytes, "bytes": model.vocab_size * row_bytes}
    for key, value in expected.items():
        _require(entry[key] == value, f"embedding: {key} is {entry[key]!r}, not {value}")
    flash.add("embedding", entry["offset"], _padded(entry["bytes"]), ALIGNMENT)


def _padded(n_bytes: int) -> int:
    return -(-n_bytes // ALIGNMENT) * ALIGNMENT


# --- the bundle ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bundle:
    """A validated bundle.

    Attributes:
        path: its directory.
        header: bundle.json.
        model: the header's `model`.
    """

    path: Path
    header: dict[str, Any]
    model: ModelConfig

    @classmethod
    def open(cls, path: Path | str) -> Bundle:
        """Open a bundle and validate its header; weights are read later, and checked by `verify`.

        Raises:
            BundleError: it is absent, cut, damaged, or of a newer format.
        """
        path = Path(path)
        header = _read_header(path)
        try:
            model = _validate(header, path)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            problem = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
            raise BundleError(f"{path}: the header is inconsistent: {problem}; pack again") from error
        return cls(path, header, model)

    def verify(self) -> None:
        """Read every byte and compare all checksums.

        Raises:
            BundleError: a byte differs; the message names the part.
        """
        for name, entry in self.header["files"].items():
            if "sha256" in entry:
                self._verify_span(name, name, 0, entry["bytes"], entry["sha256"])
        for region in self.header["regions"]:
            part = f"layer {region['layer']} {region['kind']} columns"
            self._verify_span("flash.bin", part, region["offset"], _padded(region["bytes"]), region["sha256"])
            base = region["base"]
            if base is not None:
                part = f"layer {region['layer']} {region['kind']} base"
                self._verify_span("flash.bin", part, base["offset"], _padded(base["bytes"]), base["sha256"])
        embedding = self.header["embedding"]
        if embedding is not None:
            span = embedding["offset"], _padded(embedding["bytes"])
            self._verify_span("flash.bin", "embedding rows", *span, embedding["sha256"])

    def _verify_span(self, file: str, part: str, offset: int, n_bytes: int, sha256: str) -> None:
        digest = hashlib.sha256()
        for start in range(0, n_bytes, 1 << 22):
            digest.update(self._read_bytes(file, offset + start, min(1 << 22, n_bytes - start)))
        if digest.hexdigest() != sha256:
            raise BundleError(
                f"{self.path / file}: {part} do not match their checksum; the bundle is damaged: pack again"
            )

    def _read(self, file: str, offset: int, n_bytes: int) -> U8:
        return np.frombuffer(self._read_bytes(file, offset, n_bytes), np.uint8)

    def _read_bytes(self, file: str, offset: int, n_bytes: int) -> bytes:
        try:
            with (self.path / file).open("rb") as stream:
                stream.seek(offset)
                content = stream.read(n_bytes)
        except OSError as error:
            raise BundleError(f"{self.path / file}: cannot be read ({error.strerror}); check the disk") from error
        if len(content) < n_bytes:
            raise BundleError(f"{self.path / file}: ends {n_bytes - len(content)} bytes early; it was cut: pack again")
        return content

    # --- weights

    def dequantise(self, name: str) -> F32:
        """A tensor as fp32.

        Args:
            name: any name of the header's `tensors`, or ``layers.N.gate|up|down``, or ``embedding`` (tied: the head).

        Returns:
            ``[R, C]`` of a matrix, ``[n]`` of a vector.

        Raises:
            BundleError: there is no such tensor, or it cannot be read.
        """
        if name == "embedding":
            return (
                self.embedding_rows(np.arange(self.model.vocab_size))
                if not self.model.tied
                else self.dequantise("head")
            )
        matrix = self._region_matrix(name)
        if matrix is not None:
            return self._dequantise_columns(*matrix)
        entry = self.header["tensors"].get(name)
        if entry is None:
            raise BundleError(f"{self.path}: has no tensor {name!r}; `dipper inspect` lists them")
        if entry["kind"] == "vector":
            vector: F32 = self._read("resident.bin", entry["offset"], 4 * entry["shape"][0]).view("<f4").copy()
            return vector
        n_rows, n_inputs = entry["shape"]
        grid = _grid_of(entry)
        codes = unpack_tiles(grid, self._read("resident.bin", entry["offset"], entry["bytes"]), n_rows, n_inputs)
        scales = self._read_scales(grid, entry["scales"], n_rows, n_inputs, tiled=True)
        return dequantise(grid, CodedRows(codes, scales))

    def _region_matrix(self, name: str) -> tuple[dict[str, Any], dict[str, Any]] | None:
        for region in self.header["regions"]:
            for matrix in region["matrices"]:
                if name == f"layers.{region['layer']}.{matrix['name']}":
                    return region, matrix
        return None

    def coded(self, name: str) -> tuple[Grid, CodedRows]:
        """The codes and scales of a matrix of the MLP, base and residual joined.

        Args:
            name: ``layers.N.gate|up|down``.

        Raises:
            BundleError: there is no such matrix, or it cannot be read.
        """
        found = self._region_matrix(name)
        if found is None:
            raise BundleError(f"{self.path}: has no MLP matrix {name!r}; `dipper inspect` lists them")
        return self._coded_columns(*found)

    def _dequantise_columns(self, region: dict[str, Any], matrix: dict[str, Any]) -> F32:
        return dequantise(*self._coded_columns(region, matrix))

    def _coded_columns(self, region: dict[str, Any], matrix: dict[str, Any]) -> tuple[Grid, CodedRows]:
        grid, n_rows = _grid_of(matrix), matrix["rows"]
        records = self._read_records(region)
        planes = [
            records[plane["tier"]][:, plane["offset"] : plane["offset"] + plane_bytes(n_rows, plane["bits"])]
            for plane in matrix["planes"]
        ]
        places = tuple((plane["bits"], plane["shift"]) for plane in matrix["planes"])
        scales = self._read_scales(grid, matrix["scales"], n_rows, region["n_columns"], tiled=False)
        return grid, CodedRows(join_planes(grid, planes, n_rows, places), scales)

    def _read_records(self, region: dict[str, Any]) -> dict[str, U8]:
        """A region's records by tier in logical order, ``[n_columns, record_bytes]`` each."""
        n_columns, record_bytes, base = region["n_columns"], region["record_bytes"], region["base"]
        units = self._read("flash.bin", region["offset"], region["bytes"]).reshape(-1, region["unit_bytes"])
        used = units[:, : region["columns_per_unit"] * record_bytes]
        records = {"flash": used.reshape(-1, record_bytes)[:n_columns]}
        if region["order"] is not None:
            records["flash"] = records["flash"][np.argsort(region["order"])]
        if base is not None:
            records["base"] = self._read("flash.bin", base["offset"], base["bytes"]).reshape(n_columns, -1)
        return records

    def _read_scales(
        self, grid: Grid, scales: dict[str, Any], n_rows: int, n_inputs: int, *, tiled: bool
    ) -> dict[str, Array]:
        """Scale arrays ``[n_rows, n_blocks or n_super]``; stored by tile for resident matrices, whole for regions."""
        result = {}
        sizes = tile_sizes(n_rows) if tiled else [padded_rows(n_rows)]
        for name, dtype, n_entries in grid.scale_arrays(n_inputs):
            flat = self._read("resident.bin", scales[name]["offset"], scales[name]["bytes"]).view(dtype)
            starts = np.cumsum([0, *sizes]) * n_entries
            tiles = [
                flat[a:b].reshape(n_entries, size).T for a, b, size in zip(starts, starts[1:], sizes, strict=False)
            ]
            result[name] = np.concatenate(tiles)[:n_rows]
        return result

    def embedding_row(self, token: int) -> F32:
        """One row of the input embedding, fp32 ``[hidden_size]``, before `embedding_scale`."""
        row: F32 = self.embedding_rows(np.array([token]))[0]
        return row

    def embedding_rows(self, tokens: Array) -> F32:
        """Rows of the input embedding, fp32 ``[n, hidden_size]``, before `embedding_scale`.

        Raises:
            BundleError: a token id is outside the vocabulary.
        """
        tokens = np.asarray(tokens)
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < self.model.vocab_size:
            raise BundleError(
                f"{self.path}: token ids reach {tokens.max()}, the vocabulary has {self.model.vocab_size}"
            )
        entry = self.header["embedding"]
        if entry is None:
            return self.dequantise("head")[tokens]
        grid, hidden, row_bytes = _grid_of(entry), self.model.hidden_size, entry["row_bytes"]
        if len(tokens) > self.model.vocab_size // 8:
            raw = self._read("flash.bin", entry["offset"], entry["bytes"]).reshape(-1, row_bytes)[tokens]
        else:
            raw = np.stack([self._read("flash.bin", entry["offset"] + int(t) * row_bytes, row_bytes) for t in tokens])
        fields = list(_fields(raw, embedding_fields(grid, hidden)))
        n_planes = len(grid.planes)
        codes = np.ascontiguousarray(join_planes(grid, fields[:n_planes], hidden).T)
        arrays = zip(grid.scale_arrays(hidden), fields[n_planes:], strict=True)
        return dequantise(grid, CodedRows(codes, {a[0]: field.copy().view(a[1]) for a, field in arrays}))

    # --- accounting

    def bytes_by_part(self) -> dict[str, dict[str, int]]:
        """Bytes of each part.

        Returns:
            ``{"resident": {attention, head, norms, mlp_scales}, "flash": {input_records, glu_records, base_records,
            embedding}}``. `norms` holds every vector. Padding, of units too, is in no part.
        """
        resident = {"attention": 0, "head": 0, "norms": 0, "mlp_scales": 0}
        flash = {"input_records": 0, "glu_records": 0, "base_records": 0, "embedding": 0}
        for name, entry in self.header["tensors"].items():
            if entry["kind"] == "vector":
                resident["norms"] += 4 * entry["shape"][0]
            else:
                scales = sum(span["bytes"] for span in entry["scales"].values())
                resident["head" if name == "head" else "attention"] += entry["bytes"] + scales
        for region in self.header["regions"]:
            flash[f"{region['kind']}_records"] += region["n_columns"] * region["record_bytes"]
            flash["base_records"] += 0 if region["base"] is None else region["base"]["bytes"]
            for matrix in region["matrices"]:
                resident["mlp_scales"] += sum(s["bytes"] for n, s in matrix["scales"].items() if n != "tier")
        if self.header["embedding"] is not None:
            flash["embedding"] = self.header["embedding"]["bytes"]
        return {"resident": resident, "flash": flash}

    @property
    def total_bytes(self) -> int:
        """Bytes of all files of the bundle, the header aside."""
        return sum(int(file["bytes"]) for file in self.header["files"].values())

    @property
    def mlp_weights(self) -> int:
        """Weights of all MLPs, without padding: what "bits per MLP weight" divides by."""
        return 3 * self.model.n_layers * self.model.hidden_size * self.model.intermediate_size

    @property
    def mlp_bytes(self) -> int:
        """Bytes of all MLPs, scales and bases included: what a token of the dense model reads of them."""
        parts = self.bytes_by_part()
        flash = parts["flash"]
        return parts["resident"]["mlp_scales"] + flash["input_records"] + flash["glu_records"] + flash["base_records"]

    def describe(self) -> dict[str, Any]:
        """What `dipper inspect` shows: model, source, grids by kind of tensor, base bits, units, and bytes."""
        grids: dict[str, set[str]] = {}
        base_bits: dict[str, set[int]] = {}
        for name, entry in self._grid_entries():
            grids.setdefault(name, set()).add(_grid_label(_grid_of(entry)))
            if "base_bits" in entry:
                base_bits.setdefault(name, set()).add(entry["base_bits"])
        return {
            "path": str(self.path),
            "version": self.header["version"],
            "created_by": self.header["created_by"],
            "source": self.header["source"],
            "model": self.header["model"],
            "grids": {name: sorted(labels) for name, labels in grids.items()},
            "bytes": self.bytes_by_part(),
            "files": {name: entry["bytes"] for name, entry in self.header["files"].items()},
            "mlp_weights": self.mlp_weights,
            "bits_per_mlp_weight": 8 * self.mlp_bytes / self.mlp_weights,
            "record_bytes": {
                kind: sorted({r["record_bytes"] for r in self.header["regions"] if r["kind"] == kind})
                for kind in REGION_MATRICES
            },
            "base_bits": {name: sorted(bits) for name, bits in base_bits.items()},
            "units": {kind: self._units(kind) for kind in REGION_MATRICES},
        }

    def _units(self, kind: str) -> list[dict[str, int]]:
        """How records of this kind of region lie, each way once; without a base its record has 0 bytes."""
        keys = ("record_bytes", "base_record_bytes", "columns_per_unit", "unit_bytes")
        regions = [region for region in self.header["regions"] if region["kind"] == kind]
        ways = {
            (
                r["record_bytes"],
                (r["base"] or {"record_bytes": 0})["record_bytes"],
                r["columns_per_unit"],
                r["unit_bytes"],
            )
            for r in regions
        }
        return [dict(zip(keys, way, strict=True)) for way in sorted(ways)]

    def _grid_entries(self) -> Iterator[tuple[str, dict[str, Any]]]:
        for region in self.header["regions"]:
            for matrix in region["matrices"]:
                yield matrix["name"], matrix
        for name, entry in self.header["tensors"].items():
            if entry["kind"] == "matrix":
                yield name.rsplit(".", 1)[-1], entry
        if self.header["embedding"] is not None:
            yield "embedding", self.header["embedding"]


def embedding_fields(grid: Grid, hidden: int) -> list[int]:
    """Bytes of each field of an embedding row: its planes, then its scale arrays."""
    sizes = [plane_bytes(hidden, bits) for bits, _ in grid.planes]
    return sizes + [n_entries * dtype.itemsize for _, dtype, n_entries in grid.scale_arrays(hidden)]


def _fields(raw: U8, sizes: list[int]) -> Iterator[U8]:
    start = 0
    for size in sizes:
        yield raw[:, start : start + size]
        start += size


def _grid_label(grid: Grid) -> str:
    return grid.codes if grid.is_float else f"{grid.codes}/{grid.group} {grid.scale}"
