"""Where everything of a bundle lies: a header laid out from shapes and grids alone, before any weight is read.

`packer` writes what is laid out here; `published` lays out models of which only the shape is known, for the simulator.
Every offset and size follows from the grids (docs/bundle-format.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dipper import __version__
from dipper.bundle import ALIGNMENT, REGION_MATRICES, RESIDENT_ALIGNMENT, VERSION, embedding_fields
from dipper.glu import ModelConfig
from dipper.grid import Grid, padded_rows, plane_bytes

__all__ = ["is_mlp", "layout", "round_up"]


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


def layout(
    config: ModelConfig, vectors: Mapping[str, int], shapes: Mapping[str, tuple[int, ...]], grids: Mapping[str, Grid]
) -> dict[str, Any]:
    """The header with every offset and size, before checksums and tokenizer files.

    Args:
        config: the model.
        vectors: name -> length of what is computed, not read (rotary tables).
        shapes: name -> shape of every other tensor, `embedding` included where it is not the head.
        grids: of every matrix among them.
    """
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
            regions.append(_place_region(shapes, grids, layer, kind, resident, flash))
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
    resident: _Allocator,
    flash: _Allocator,
) -> dict[str, Any]:
    matrices = []
    record_bytes = 0
    for name in REGION_MATRICES[kind]:
        full = f"layers.{layer}.{name}"
        grid, (n_rows, n_columns) = grids[full], shapes[full]
        planes = []
        for bits, shift in grid.planes:
            planes.append({"bits": bits, "shift": shift, "kind": "codes", "tier": "flash", "offset": record_bytes})
            record_bytes += plane_bytes(n_rows, bits)
        scales = {"tier": "resident", **_place_scales(grid, n_rows, n_columns, resident)}
        matrices.append({"name": name, "rows": n_rows, **grid.to_json(), "planes": planes, "scales": scales})
    for matrix in matrices:
        for plane in matrix["planes"]:
            plane["stride"] = record_bytes
    n_bytes = n_columns * record_bytes
    return {
        "layer": layer, "kind": kind, "n_columns": n_columns, "columns_per_unit": 1, "order": None,
        "offset": flash.take(n_bytes, ALIGNMENT), "record_bytes": record_bytes, "bytes": n_bytes, "matrices": matrices,
    }  # fmt: skip


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
