"""Where everything of a bundle lies: a header laid out from shapes and grids alone, before any weight is read.

`packer` writes what is laid out here; `published` lays out models of which only the shape is known, for the simulator.
Every offset and size follows from the grids (docs/bundle-format.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dipper import __version__
from dipper.bundle import (
    ALIGNMENT,
    REGION_MATRICES,
    RESIDENT_ALIGNMENT,
    UNIT_BYTES,
    VERSION,
    embedding_fields,
    residual_name,
)
from dipper.errors import ConfigError
from dipper.glu import ModelConfig
from dipper.grid import Grid, can_split, padded_rows, plane_bytes, split_planes

__all__ = ["BaseBits", "base_bits_by_kind", "columns_per_unit", "is_mlp", "layout", "round_up", "unit_size"]

BaseBits = int | tuple[int, int]  # of all regions, or of input and GLU regions

_MAX_BASE_BITS = 4
_MAX_UNIT_BYTES = 1 << 30


def is_mlp(name: str) -> bool:
    """Whether a matrix lies in a region."""
    return name.endswith((".gate", ".up", ".down"))


class _Allocator:
    """Hands out offsets of one file."""

    def __init__(self) -> None:
        self.end = 0

    def take(self, n_bytes: int, alignment: int) -> int:
        offset = round_up(self.end, alignment)
        self.end = offset + n_bytes
        return offset


def round_up(n: int, multiple: int) -> int:
    """The smallest multiple that is at least n."""
    return -(-n // multiple) * multiple


def columns_per_unit(record_bytes: int, n_columns: int, unit_bytes: int) -> int:
    """How many columns of a split region make a unit.

    Of the numbers of records that take 0.6 to 1.4 times ``unit_bytes`` (one record at least, all at most), the one
    whose unit, padded to whole 4096s, has the smallest share of padding; the smaller of equals.
    """
    low = min(max(-(-6 * unit_bytes // (10 * record_bytes)), 1), n_columns)
    high = min(max(14 * unit_bytes // (10 * record_bytes), low), n_columns)
    return max(range(low, high + 1), key=lambda u: u * record_bytes / round_up(u * record_bytes, ALIGNMENT))


def base_bits_by_kind(base_bits: BaseBits) -> tuple[int, int]:
    """Base bits of the input and of the GLU regions.

    Raises:
        ConfigError: they are out of range.
    """
    bits = (base_bits, base_bits) if isinstance(base_bits, int) else tuple(base_bits)
    if len(bits) != 2 or not all(0 <= b <= _MAX_BASE_BITS for b in bits):
        raise ConfigError(f"base_bits is {base_bits}; it must lie in 0..{_MAX_BASE_BITS}, or be two such numbers")
    return bits[0], bits[1]


def unit_size(record_bytes: int, n_columns: int) -> int:
    """Bytes of a unit: padded to whole 4096s where that is at most half of one.

    A unit alone reads less when it is padded; runs of neighbours, which a token often wants together, read less when
    their units are not, and so do slots and streams.
    """
    n_bytes = n_columns * record_bytes
    padded = round_up(n_bytes, ALIGNMENT)
    return padded if padded - n_bytes <= ALIGNMENT // 2 else n_bytes


def layout(
    config: ModelConfig,
    vectors: Mapping[str, int],
    shapes: Mapping[str, tuple[int, ...]],
    grids: Mapping[str, Grid],
    *,
    base_bits: BaseBits = 0,
    unit_bytes: int = UNIT_BYTES,
) -> dict[str, Any]:
    """The header with every offset and size, before checksums and tokenizer files.

    Args:
        config: the model.
        vectors: name -> length of what is computed, not read (rotary tables).
        shapes: name -> shape of every other tensor, `embedding` included where it is not the head.
        grids: of every matrix among them.
        base_bits: of the regions that can be split, or those of input and of GLU regions; 0: none is.
        unit_bytes: about what a unit of a split region has.

    Raises:
        ConfigError: ``base_bits`` or ``unit_bytes`` is out of range, no region can be split, or a residual would have
            more than 4 bits.
    """
    bits_of = dict(zip(REGION_MATRICES, base_bits_by_kind(base_bits), strict=True))
    if not 1 <= unit_bytes <= _MAX_UNIT_BYTES:
        raise ConfigError(f"unit_bytes is {unit_bytes}; it must lie in 1..{_MAX_UNIT_BYTES}")
    resident, flash = _Allocator(), _Allocator()
    tensors: dict[str, Any] = {}
    regions: list[dict[str, Any]] = []
    names = sorted((n for n in shapes if "layers" not in n and n != "embedding"), key=lambda n: n == "head")
    for name, length in vectors.items():
        tensors[name] = _place_vector(length, resident)
    for name in names:
        tensors[name] = _place_tensor(shapes[name], grids.get(name), resident)
    for layer in range(config.n_layers):
        prefix = f"layers.{layer}."
        for name in (n for n in shapes if n.startswith(prefix) and not is_mlp(n)):
            tensors[name] = _place_tensor(shapes[name], grids.get(name), resident)
        for kind in REGION_MATRICES:
            region = _place_region(shapes, grids, layer, kind, bits_of[kind], unit_bytes, resident, flash)
            regions.append(region)
            if region["base"] is not None:
                # Behind the region's scales: like these it is known once the region has been built.
                tensors[residual_name(region)] = _place_vector(region["n_columns"], resident)
    if any(bits_of.values()) and all(region["base"] is None for region in regions):
        codes = ", ".join(sorted({grid.codes for name, grid in grids.items() if is_mlp(name)}))
        raise ConfigError(
            f"base_bits is {base_bits} and no region can be split: all its matrices need 4-, 5- or 6-bit codes of more "
            f"bits than that, and the MLP has {codes}; pack without base bits or with other --bits"
        )
    embedding = None if config.tied else _place_embedding(shapes["embedding"], grids["embedding"], flash)
    files = {
        "resident.bin": {"bytes": round_up(resident.end, ALIGNMENT)},
        "flash.bin": {"bytes": round_up(flash.end, ALIGNMENT)},
    }
    return {
        "format": "dipper-bundle", "version": VERSION, "created_by": f"dipper {__version__}", "alignment": ALIGNMENT,
        "model": config.to_json(), "files": files, "tensors": tensors, "regions": regions, "embedding": embedding,
    }  # fmt: skip


def _place_vector(length: int, resident: _Allocator) -> dict[str, Any]:
    return {"kind": "vector", "shape": [length], "offset": resident.take(4 * length, RESIDENT_ALIGNMENT)}


def _place_tensor(shape: tuple[int, ...], grid: Grid | None, resident: _Allocator) -> dict[str, Any]:
    if grid is None:
        return _place_vector(shape[0], resident)
    n_rows, n_inputs = shape
    n_bytes = n_inputs * sum(plane_bytes(n_rows, bits) for bits, _ in grid.planes)
    return {
        "kind": "matrix",
        "shape": [n_rows, n_inputs],
        **grid.to_json(),
        "offset": resident.take(n_bytes, RESIDENT_ALIGNMENT),
        "bytes": n_bytes,
        "scales": _place_scales(grid, n_rows, n_inputs, resident),
    }


def _place_scales(grid: Grid, n_rows: int, n_inputs: int, resident: _Allocator) -> dict[str, Any]:
    scales = {}
    for name, dtype, n_entries in grid.scale_arrays(n_inputs):
        n_bytes = n_entries * padded_rows(n_rows) * dtype.itemsize
        scales[name] = {"offset": resident.take(n_bytes, RESIDENT_ALIGNMENT), "bytes": n_bytes}
    return scales


def _place_region(
    shapes: Mapping[str, tuple[int, ...]],
    grids: Mapping[str, Grid],
    layer: int,
    kind: str,
    base_bits: int,
    unit_bytes: int,
    resident: _Allocator,
    flash: _Allocator,
) -> dict[str, Any]:
    names = {name: f"layers.{layer}.{name}" for name in REGION_MATRICES[kind]}
    if not all(can_split(grids[full].codes, base_bits) for full in names.values()):
        base_bits = 0
    matrices = []
    record_bytes = {"flash": 0, "base": 0}
    for name, full in names.items():
        grid, (n_rows, n_columns) = grids[full], shapes[full]
        planes = _place_planes(full, grid, n_rows, base_bits, record_bytes)
        scales = {"tier": "resident", **_place_scales(grid, n_rows, n_columns, resident)}
        entry = {"name": name, "rows": n_rows, **grid.to_json(), "base_bits": base_bits}
        matrices.append({**entry, "planes": planes, "scales": scales})
    for matrix in matrices:
        for plane in matrix["planes"]:
            plane["stride"] = record_bytes[plane["tier"]]
    columns, unit, base = 1, record_bytes["flash"], None
    if base_bits:
        columns = columns_per_unit(record_bytes["flash"], n_columns, unit_bytes)
        unit = unit_size(record_bytes["flash"], columns)
    n_bytes = -(-n_columns // columns) * unit
    offset = flash.take(n_bytes, ALIGNMENT)
    if base_bits:
        base_bytes = n_columns * record_bytes["base"]
        base_offset = flash.take(base_bytes, ALIGNMENT)
        base = {"offset": base_offset, "record_bytes": record_bytes["base"], "bytes": base_bytes}
    return {
        "layer": layer, "kind": kind, "n_columns": n_columns, "columns_per_unit": columns, "unit_bytes": unit,
        "order": None, "offset": offset, "record_bytes": record_bytes["flash"], "bytes": n_bytes, "base": base,
        "matrices": matrices,
    }  # fmt: skip


def _place_planes(
    name: str, grid: Grid, n_rows: int, base_bits: int, record_bytes: dict[str, int]
) -> list[dict[str, Any]]:
    """A matrix's planes behind what the records, by tier, have already; ``record_bytes`` grows by them."""
    try:
        parts = split_planes(grid.codes, base_bits)
    except ValueError as error:
        raise ConfigError(f"{name}: {error}; choose other base bits") from error
    planes = []
    for tier, part in zip(("flash", "base"), parts, strict=True):
        for bits, shift in part:
            planes.append({"bits": bits, "shift": shift, "kind": "codes", "tier": tier, "offset": record_bytes[tier]})
            record_bytes[tier] += plane_bytes(n_rows, bits)
    return planes


def _place_embedding(shape: tuple[int, ...], grid: Grid, flash: _Allocator) -> dict[str, Any]:
    n_rows, n_inputs = shape
    row_bytes = sum(embedding_fields(grid, n_inputs))
    n_bytes = n_rows * row_bytes
    return {
        "rows": n_rows,
        "row_bytes": row_bytes,
        "offset": flash.take(n_bytes, ALIGNMENT),
        "bytes": n_bytes,
        **grid.to_json(),
    }
