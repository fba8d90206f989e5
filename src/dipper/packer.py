"""The writer behind `bundle.pack`: a checkpoint becomes a bundle, one tensor at a time.

The header is laid out first (every offset and size follows from the grids), so the space needed is known before
anything is written, and writing is one sequential pass over both files. A region is built column by column in one
buffer as large as its packed matrices; everything else passes through in slices of rows. The directory is built as
`NAME.partial-PID` and renamed when it is complete and flushed.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from dipper.bundle import ALIGNMENT, UNIT_BYTES, header_bytes, region_name, residual_name
from dipper.checkpoint import Checkpoint, open_checkpoint
from dipper.errors import BundleError, CheckpointError, ConfigError
from dipper.glu import Model, Part, read_model
from dipper.grid import (
    F64,
    U8,
    Array,
    CodedRows,
    Grid,
    dequantise,
    pack_plane,
    pack_tiles,
    padded_rows,
    plane_bytes,
    quantise,
    quantised_grid,
    residual_squares,
    tile_sizes,
)
from dipper.layout import BaseBits, base_bits_by_kind, is_mlp, layout, round_up

__all__ = ["Progress", "write_bundle"]

Progress = Callable[[int, int], None]

BITS = ("source", "4", "8", "16")
_WRITE_BYTES = 4 << 20  # of units that are put together at once


def write_bundle(
    source: Path,
    out: Path,
    *,
    bits: str,
    progress: Progress | None,
    overwrite: bool,
    tokenizer: bool,
    base_bits: BaseBits = 0,
    unit_bytes: int = UNIT_BYTES,
    energies: Mapping[str, Array] | None = None,
) -> Path:
    """Pack ``source`` into the bundle directory ``out``; see `bundle.pack`."""
    if bits not in BITS:
        raise ConfigError(f"bits is {bits!r}; it must be one of {', '.join(BITS)}")
    if energies is not None and not any(base_bits_by_kind(base_bits)):
        raise ConfigError(
            "energies order the columns of split regions, and base_bits is 0: give base bits, or no energies"
        )
    _check_target(out, overwrite)
    checkpoint = open_checkpoint(source)
    model = read_model(checkpoint)
    targets = _target_grids(checkpoint, model, bits)
    header = layout(
        model.config,
        {name: len(vector) for name, vector in model.vectors.items()},
        {name: part.shape for name, part in model.parts.items()},
        targets,
        base_bits=base_bits,
        unit_bytes=unit_bytes,
    )
    weighting = {} if energies is None else _checked_energies(energies, header["regions"])
    _check_space(out, header)
    with _partial_directory(out) as partial:
        if tokenizer:  # first: a source without one should fail before minutes of work
            _write_tokenizer(checkpoint, partial, header)
        _write_files(partial, model, targets, header, weighting, progress)
        _finish_header(partial, checkpoint, header, bits)
        _publish(partial, out, overwrite)
    return out


# --- what each tensor becomes ----------------------------------------------------------------------------------------


def _target_grids(checkpoint: Checkpoint, model: Model, bits: str) -> dict[str, Grid]:
    """The grid of every matrix in the bundle."""
    matrices = {name: part for name, part in model.parts.items() if len(part.shape) == 2}
    if bits in ("4", "8"):
        _refuse_requantising(checkpoint, matrices, bits)
    return {name: _target_grid(name, part, bits) for name, part in matrices.items()}


def _target_grid(name: str, part: Part, bits: str) -> Grid:
    own = part.grid
    if bits == "source":
        return own
    half = own if own.codes == "bf16" else Grid(codes="f16")
    if name == "embedding":
        return half if own.is_float else own
    if bits == "16" and is_mlp(name):
        return half
    if not own.is_float:
        return own
    return quantised_grid(int(bits) if is_mlp(name) else 8, part.shape[1])


def _refuse_requantising(checkpoint: Checkpoint, matrices: dict[str, Part], bits: str) -> None:
    quantised = [p.tensor for p in matrices.values() if not p.grid.is_float]
    if quantised:
        kinds = ", ".join(sorted({t.type_name for t in quantised}))
        raise ConfigError(
            f"{checkpoint.path}: {len(quantised)} matrices are quantised already ({kinds}) and --bits {bits} "
            "would quantise them again, which costs quality; use --bits source"
        )


def _recode(rows: CodedRows, source: Grid, target: Grid, part: Part) -> CodedRows:
    """Rows of the source grid in the target grid."""
    if source == target:
        return rows
    weights = dequantise(source, rows)
    if np.abs(weights).max() <= np.finfo(np.float16).max:
        return CodedRows(weights.astype(np.float16), {}) if target.is_float else quantise(weights, target.bits)[1]
    raise CheckpointError(
        f"{part.tensor.path}: tensor {part.tensor.name!r} reaches {np.abs(weights).max():.4g}, beyond the 65504 of "
        "16-bit floats and scales; use --bits source"
    )


def _recoded_slices(part: Part, target: Grid) -> Iterator[tuple[int, CodedRows]]:
    """(first row, rows in the target grid), in slices of whole tiles."""
    for start, rows in part.slices():
        yield start, _recode(rows, part.grid, target, part)


def _checked_energies(energies: Mapping[str, Array], regions: list[dict[str, Any]]) -> dict[str, F64]:
    """Mean squares by region, fp64 ``[n_columns]``; every split region has them."""
    columns = {region_name(region): region["n_columns"] for region in regions}
    unknown = sorted(set(energies) - set(columns))
    missing = [name for region in regions if region["base"] and (name := region_name(region)) not in energies]
    if unknown or missing:
        problem = f"lack {missing[0]!r}" if missing else f"have {unknown[0]!r}, which is no region of it"
        raise ConfigError(f"the energies are of another model: they {problem}; measure them on this one")
    return {name: _checked_energy(name, np.asarray(array), columns[name]) for name, array in energies.items()}


def _checked_energy(name: str, array: Array, n_columns: int) -> F64:
    if array.shape != (n_columns,) or array.dtype.kind not in "fiu":
        raise ConfigError(
            f"the energies of {name} are {array.dtype} of shape {list(array.shape)}, not {n_columns} numbers; "
            "measure them on this model"
        )
    wrong = ~((array >= 0) & (array <= np.finfo(np.float32).max))  # NaN compares as false
    if wrong.any():
        first = int(wrong.argmax())
        raise ConfigError(
            f"the energies of {name} have {array[first]} at column {first}: mean squares are finite 32-bit floats "
            "from 0; measure them anew"
        )
    return array.astype(np.float64)


# --- writing ---------------------------------------------------------------------------------------------------------


class _Sink:
    """A file written front to back; digests follow the bytes."""

    def __init__(self, file: BinaryIO, on_bytes: Callable[[int], None]) -> None:
        self.file, self.on_bytes, self.position = file, on_bytes, 0
        self.digest = hashlib.sha256()

    def write(self, content: Any) -> None:
        view = memoryview(content).cast("B")
        self.file.write(view)
        self.digest.update(view)
        self.position += len(view)
        self.on_bytes(len(view))

    def pad_to(self, offset: int) -> None:
        assert offset >= self.position, f"laid out at {offset}, already at {self.position}"
        self.write(bytes(offset - self.position))

    def take_digest(self) -> str:
        """The digest of what was written since the last call."""
        result = self.digest.hexdigest()
        self.digest = hashlib.sha256()
        return result


def _write_files(
    folder: Path,
    model: Model,
    targets: dict[str, Grid],
    header: dict[str, Any],
    energies: dict[str, F64],
    progress: Progress | None,
) -> None:
    total = header["files"]["resident.bin"]["bytes"] + header["files"]["flash.bin"]["bytes"]
    done = 0

    def on_bytes(n_bytes: int) -> None:
        nonlocal done
        done += n_bytes
        if progress is not None:
            progress(done, total)

    with (folder / "resident.bin").open("wb") as resident_file, (folder / "flash.bin").open("wb") as flash_file:
        resident, flash = _Sink(resident_file, on_bytes), _Sink(flash_file, on_bytes)
        with_regions = {residual_name(region) for region in header["regions"]}
        pending = {name: entry for name, entry in header["tensors"].items() if name not in with_regions}
        for layer in range(-1, model.config.n_layers):  # -1: what belongs to no layer
            prefix = f"layers.{layer}."
            for name in [n for n in pending if n.startswith(prefix) or (layer < 0 and "layers." not in n)]:
                _write_tensor(name, pending.pop(name), model, targets, resident)
            for region in (r for r in header["regions"] if r["layer"] == layer):
                norms = header["tensors"].get(residual_name(region))
                _write_region(region, norms, energies.get(region_name(region)), model, targets, resident, flash)
        if header["embedding"] is not None:
            rows = _embedding_rows(model.parts["embedding"], targets["embedding"])
            _write_span(header["embedding"], rows, flash)
        resident.pad_to(header["files"]["resident.bin"]["bytes"])
        header["files"]["resident.bin"]["sha256"] = resident.take_digest()
        for file in (resident_file, flash_file):
            _flush(file)


def _write_tensor(name: str, entry: dict[str, Any], model: Model, targets: dict[str, Grid], resident: _Sink) -> None:
    resident.pad_to(entry["offset"])
    if entry["kind"] == "vector":
        vector = model.vectors[name] if name in model.vectors else model.parts[name].vector()
        resident.write(np.ascontiguousarray(vector, "<f4"))
        return
    part, grid = model.parts[name], targets[name]
    slices = []
    for _, rows in _recoded_slices(part, grid):
        resident.write(pack_tiles(grid, rows.codes))
        slices.append(rows.scales)
    for array_name, span in entry["scales"].items():
        resident.pad_to(span["offset"])
        by_block = _scales_by_block(slices, array_name, part.shape[0])
        start = 0
        for size in tile_sizes(part.shape[0]):
            resident.write(np.ascontiguousarray(by_block[:, start : start + size]))
            start += size


def _scales_by_block(slices: list[dict[str, Array]], name: str, n_rows: int) -> Array:
    """One scale array of all rows as stored: ``[n_blocks or n_super, P]``."""
    array = np.concatenate([scales[name] for scales in slices])
    padded = np.zeros((array.shape[1], padded_rows(n_rows)), array.dtype)
    padded[:, :n_rows] = array.T
    return padded


def _write_region(
    region: dict[str, Any],
    norms_entry: dict[str, Any] | None,
    energy: F64 | None,
    model: Model,
    targets: dict[str, Grid],
    resident: _Sink,
    flash: _Sink,
) -> None:
    """A region: scales and norms into resident.bin, units and base into flash.bin; with an energy also its order."""
    base, n_columns = region["base"], region["n_columns"]
    records = {"flash": np.empty((n_columns, region["record_bytes"]), np.uint8)}
    if base is not None:
        records["base"] = np.empty((n_columns, base["record_bytes"]), np.uint8)
    squares = np.zeros(n_columns)
    for matrix in region["matrices"]:
        name = f"layers.{region['layer']}.{matrix['name']}"
        grid, slices = targets[name], []
        for start, rows in _recoded_slices(model.parts[name], grid):
            for plane in matrix["planes"]:
                packed = pack_plane(rows.codes, plane["bits"], plane["shift"])
                first = plane["offset"] + plane_bytes(start, plane["bits"])
                records[plane["tier"]][:, first : first + packed.shape[1]] = packed
            if base is not None:
                squares += residual_squares(grid, rows, matrix["base_bits"])
            slices.append(rows.scales)
        for array_name, span in matrix["scales"].items():
            if array_name != "tier":
                resident.pad_to(span["offset"])
                resident.write(_scales_by_block(slices, array_name, matrix["rows"]))
    if norms_entry is not None:
        norms = np.sqrt(squares).astype("<f4")
        resident.pad_to(norms_entry["offset"])
        resident.write(norms)
        if energy is not None:
            region["order"] = np.argsort(-energy * norms.astype(np.float64) ** 2, kind="stable").tolist()
    _write_span(region, _units(records["flash"], region), flash)
    if base is not None:
        _write_span(base, [records["base"]], flash)


def _units(records: U8, region: dict[str, Any]) -> Iterator[U8]:
    """Records ``[n_columns, record_bytes]`` in logical order -> units as they lie, ``[n, unit_bytes]`` at a time."""
    n_columns, record_bytes = records.shape
    unit_columns, unit_bytes = region["columns_per_unit"], region["unit_bytes"]
    order = np.arange(n_columns) if region["order"] is None else np.array(region["order"])
    step = max(_WRITE_BYTES // unit_bytes, 1) * unit_columns
    for start in range(0, n_columns, step):
        columns = order[start : start + step]
        n_full, n_rest = divmod(len(columns), unit_columns)
        units = np.zeros((n_full + (n_rest > 0), unit_bytes), np.uint8)
        full, rest = np.split(records[columns], [n_full * unit_columns])
        units[:n_full, : unit_columns * record_bytes] = full.reshape(n_full, unit_columns * record_bytes)
        if n_rest:
            units[n_full, : n_rest * record_bytes] = rest.reshape(-1)
        yield units


def _write_span(entry: dict[str, Any], parts: Iterable[U8], flash: _Sink) -> None:
    """A span of its own in flash.bin, whose digest covers the padding behind it."""
    flash.pad_to(entry["offset"])
    flash.take_digest()
    for part in parts:
        flash.write(part)
    flash.pad_to(round_up(flash.position, ALIGNMENT))
    entry["sha256"] = flash.take_digest()


def _embedding_rows(part: Part, grid: Grid) -> Iterator[U8]:
    """Rows of the embedding as stored, some ``[n, row_bytes]`` at a time."""
    for _, rows in _recoded_slices(part, grid):
        columns = rows.codes.T
        fields = [pack_plane(columns, bits, shift) for bits, shift in grid.planes]
        fields += [
            np.ascontiguousarray(rows.scales[name]).view(np.uint8) for name, _, _ in grid.scale_arrays(part.shape[1])
        ]
        yield np.ascontiguousarray(np.concatenate(fields, axis=1))


def _write_tokenizer(checkpoint: Checkpoint, folder: Path, header: dict[str, Any]) -> None:
    from dipper.tokenizer import write_tokenizer

    ids = write_tokenizer(checkpoint.path, folder)
    header["model"].update(bos_id=ids["bos_id"], eos_ids=list(ids["eos_ids"]), add_bos=bool(ids["add_bos"]))
    for name in ("tokenizer.json", "chat_template.jinja"):
        path = folder / name
        if path.is_file():
            with path.open("rb+") as file:
                content = file.read()
                _flush(file)
            header["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _finish_header(folder: Path, checkpoint: Checkpoint, header: dict[str, Any], bits: str) -> None:
    header["source"] = {
        "kind": checkpoint.kind,
        "name": checkpoint.path.resolve().name,
        "sha256": checkpoint.sha256(),
        "bits": bits,
    }
    with (folder / "bundle.json").open("wb") as file:
        file.write(header_bytes(header))
        _flush(file)


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


# --- the target directory --------------------------------------------------------------------------------------------


def _check_target(out: Path, overwrite: bool) -> None:
    """Everything about the target that can be known before work."""
    if out.exists():
        if not overwrite:
            raise BundleError(f"{out}: exists already; remove it, pack to another name, or pass --force")
        if not (out / "bundle.json").is_file():
            raise BundleError(f"{out}: exists and is not a bundle, so it is not replaced; pack to another name")
    if not out.parent.is_dir():
        raise BundleError(f"{out.parent}: there is no such folder; create it first")
    if not os.access(out.parent, os.W_OK | os.X_OK):
        raise BundleError(f"{out.parent}: this folder is not writable; pack to another folder")


def _check_space(out: Path, header: dict[str, Any]) -> None:
    # 64 MB for header and tokenizer: the largest vocabularies take half of that.
    needed = sum(entry["bytes"] for entry in header["files"].values()) + 64_000_000
    free = shutil.disk_usage(out.parent).free
    if needed > free:
        raise BundleError(f"{out}: needs {needed} bytes and the disk has {free} free; free {needed - free} bytes first")


@contextlib.contextmanager
def _partial_directory(out: Path) -> Iterator[Path]:
    """The directory a bundle is built in; gone after any error, Ctrl-C included."""
    _remove_stale(out)
    partial = out.parent / f"{out.name}.partial-{os.getpid()}"
    try:
        partial.mkdir()
        yield partial
    except OSError as error:
        reason = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror
        raise BundleError(
            f"{out}: writing failed ({reason}), nothing was left behind; make room or pack elsewhere"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _remove_stale(out: Path) -> None:
    """Remove what killed processes left behind."""
    pattern = re.compile(re.escape(out.name) + r"\.partial-(\d+)(-old)?")
    for path in out.parent.iterdir():
        match = pattern.fullmatch(path.name)
        if match and (int(match[1]) == os.getpid() or not _is_alive(int(match[1]))):
            shutil.rmtree(path, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _publish(partial: Path, out: Path, overwrite: bool) -> None:
    """Rename the finished directory into place, and make the rename last."""
    _sync_directory(partial)
    old = partial.with_name(partial.name + "-old")
    try:
        if overwrite and out.exists():
            os.rename(out, old)
        os.rename(partial, out)
    except BaseException:  # Ctrl-C between the two renames included: the old bundle goes back
        if old.exists() and not out.exists():
            os.rename(old, out)
        raise
    shutil.rmtree(old, ignore_errors=True)
    _sync_directory(out.parent)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
