"""A calibration: what was fitted to one model on calibration text, as one `.npz` file that the engine and PyTorch read.

It may hold, each on its own:

- `tables`: densities of the input and the GLU columns of every layer, for one or several densities of the MLP;
- `factors`: what a column's |x| is multiplied by to give its score, such as the norms of the columns;
- `means` with `biases`: the mean of every column's input and the dense products of these means. A selected column then
  contributes (x_j - mean_j) w_j, an unselected one nothing, and sums start at the bias: so an unselected column
  contributes its mean instead of zero;
- `extra`: arrays by name, for methods that only PyTorch has (thresholds and their like).

The file is an uncompressed zip of `.npy` members: `header` (UTF-8 JSON as uint8: format, version, model, provenance,
the names of the other members), `tables/<density>`, `factors/in`, `factors/glu`, `means/in`, `means/glu`,
`biases/gate`, `biases/up`, `biases/down` (layers stacked, [n_layers, n]) and `extra/<name>`. Nothing in it is trusted
before it is checked; a file under its name is whole.

    calibration = Calibration.load("smollm2.npz")
    calibration.check_model(bundle)
    calibration.densities(0.6)      # [n_layers, 2]: d_in, d_glu
"""

from __future__ import annotations

import ast
import hashlib
import io
import json
import math
import re
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import numpy.typing as npt

from dipper.errors import ConfigError
from dipper.files import whole_file

if TYPE_CHECKING:
    from dipper.bundle import Bundle

__all__ = ["F32", "Calibration", "model_fields", "read_energies"]

F32 = npt.NDArray[np.float32]
_Arrays = dict[str, npt.NDArray[Any]]

_FORMAT, _VERSION = "dipper-calibration", 1
_MODEL_KEYS = ("name", "architecture", "n_layers", "hidden", "intermediate", "fingerprint")
_SIZES = ("n_layers", "hidden", "intermediate")
_MAX_HEADER_BYTES = 16 << 20
# What reading damaged files raises, beside OSError.
_MALFORMED = (ValueError, KeyError, TypeError, SyntaxError, RuntimeError, EOFError, struct.error)
# Vectors by layer: member of the file -> the size they have.
_FACTORS = {"in": "hidden", "glu": "intermediate"}
_MEANS = _FACTORS
_BIASES = {"gate": "intermediate", "up": "intermediate", "down": "hidden"}


def model_fields(bundle: Bundle) -> dict[str, Any]:
    """The `model` of a calibration made on a bundle's weights."""
    model = bundle.model
    return {
        "name": model.name,
        "architecture": model.architecture,
        "n_layers": model.n_layers,
        "hidden": model.hidden_size,
        "intermediate": model.intermediate_size,
        "fingerprint": bundle.header["header_sha256"],
    }


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What was fitted to one model; see the module.

    Attributes:
        model: name, architecture, n_layers, hidden (D), intermediate (I), fingerprint (a sha256 that names the weights:
            a bundle's header_sha256 or its source's sha256).
        provenance: how it was made, as JSON types: text, tokens, code.
        tables: density of the MLP, written as `str` writes it -> fp64 [n_layers, 2], d_in and d_glu in (0, 1].
        factors: by layer (fp32 [D], fp32 [I]), positive.
        means: by layer (fp32 [D], fp32 [I]).
        biases: by layer (gate fp32 [I], up fp32 [I], down fp32 [D]): the matrices times the means; with `means` only.
        extra: further arrays by name.
        sha256: of the file it was loaded from.

    Raises:
        ConfigError: a part is missing, of the wrong shape, not finite or out of range.
    """

    model: dict[str, Any]
    provenance: dict[str, Any] = field(default_factory=dict)
    tables: dict[str, npt.NDArray[np.float64]] = field(default_factory=dict)
    factors: list[tuple[F32, F32]] | None = None
    means: list[tuple[F32, F32]] | None = None
    biases: list[tuple[F32, F32, F32]] | None = None
    extra: _Arrays = field(default_factory=dict)
    sha256: str | None = None

    def __post_init__(self) -> None:
        try:
            self._validate()
        except (ValueError, TypeError, AttributeError) as error:
            raise ConfigError(f"the calibration is inconsistent: {error}; make it anew") from error

    def _validate(self) -> None:
        _require(set(self.model) == set(_MODEL_KEYS), f"model has keys {sorted(self.model)}, not {sorted(_MODEL_KEYS)}")
        for name in _MODEL_KEYS:
            value: Any = self.model[name]
            known = type(value) is int and value > 0 if name in _SIZES else isinstance(value, str)
            _require(known, f"model {name} is {value!r}")
        for key, table in self.tables.items():
            _check_density(key)
            _check_array(f"tables/{key}", table, np.dtype(np.float64), (self.model["n_layers"], 2))
            _require(bool(((table > 0) & (table <= 1)).all()), f"tables/{key} holds a density outside (0, 1]")
        for part, sizes in (("factors", _FACTORS), ("means", _MEANS), ("biases", _BIASES)):
            self._validate_vectors(part, sizes)
        for layer, vectors in enumerate(self.factors or ()):
            for name, factor in zip(_FACTORS, vectors, strict=True):
                _require(bool((factor > 0).all()), f"factors/{name} of layer {layer} are not all positive")
        _require((self.means is None) == (self.biases is None), "means and biases go together, one is missing")

    def _validate_vectors(self, part: str, sizes: Mapping[str, str]) -> None:
        layers = getattr(self, part)
        if layers is None:
            return
        _require(len(layers) == self.model["n_layers"], f"{part} are given for {len(layers)} layers")
        for vectors in layers:
            _require(len(vectors) == len(sizes), f"{part} of a layer are {len(vectors)} vectors, not {len(sizes)}")
            for (name, size), vector in zip(sizes.items(), vectors, strict=True):
                _check_array(f"{part}/{name}", vector, np.dtype(np.float32), (self.model[size],))

    # --- use

    def densities(self, density: float) -> npt.NDArray[np.float64]:
        """Densities of the input and the GLU columns by layer for a density of the MLP, [n_layers, 2].

        Raises:
            ConfigError: the calibration has no table for this density; the message names those it has.
        """
        for key, table in self.tables.items():
            if abs(float(key) - density) < 1e-9:
                return table
        known = ", ".join(sorted(self.tables, key=float)) or "none"
        raise ConfigError(
            f"the calibration has no densities for {density:g}: it has {known}; ask for one of these, or calibrate "
            f"for {density:g} too"
        )

    def check_model(self, model: Bundle | Mapping[str, Any]) -> None:
        """Refuses a model that this calibration was not made for.

        The sizes must be equal, and either the fingerprint must be the bundle's own or its source's, or the name and
        architecture must be equal: the same model at another precision will do.

        Args:
            model: an open bundle, or the fields of `Calibration.model`.

        Raises:
            ConfigError: it is another model; the message names both.
        """
        if isinstance(model, Mapping):
            given, fingerprints = dict(model), {model["fingerprint"]}
        else:
            given = model_fields(model)
            fingerprints = {given["fingerprint"], model.header["source"].get("sha256")}
        same_sizes = all(self.model[name] == given[name] for name in _SIZES)
        same_name = all(self.model[name] == given[name] for name in ("name", "architecture"))
        if not same_sizes or not (same_name or self.model["fingerprint"] in fingerprints):
            raise ConfigError(
                f"the calibration was made for another model: it is for {_told(self.model)}, this is {_told(given)}; "
                "calibrate this model"
            )

    # --- the file

    def save(self, path: str | Path) -> None:
        """Writes the file, which is whole or absent.

        Raises:
            ConfigError: the folder does not exist.
        """
        arrays: _Arrays = {f"tables/{key}": table for key, table in self.tables.items()}
        for part, sizes in (("factors", _FACTORS), ("means", _MEANS), ("biases", _BIASES)):
            layers = getattr(self, part)
            if layers is not None:
                arrays |= {f"{part}/{name}": np.stack([vs[i] for vs in layers]) for i, name in enumerate(sizes)}
        arrays |= {f"extra/{name}": np.asarray(array) for name, array in self.extra.items()}
        for name, array in arrays.items():
            if array.dtype.kind not in "biuf":
                raise ConfigError(f"{name} has dtype {array.dtype}: a calibration holds numbers")
        header = {"format": _FORMAT, "version": _VERSION, "model": self.model, "provenance": self.provenance}
        text = json.dumps({**header, "arrays": list(arrays)}, allow_nan=False)
        arrays = {"header": np.frombuffer(text.encode(), np.uint8), **arrays}
        with whole_file(path) as out, zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
            for name, array in arrays.items():
                # A fixed date: equal calibrations are equal files.
                with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, np.ascontiguousarray(array), allow_pickle=False)

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Reads and validates a file.

        Raises:
            ConfigError: it is absent, cut, damaged, newer, or no calibration.
        """
        try:
            content = Path(path).read_bytes()
        except OSError as error:
            raise ConfigError(
                f"{path}: cannot be read ({error.strerror}); give a calibration made by `dipper calibrate`"
            ) from error
        try:
            arrays = _read_arrays(content)
            header = _read_header(arrays)
        except (*_MALFORMED, OSError) as error:
            raise ConfigError(
                f"{path}: is not a calibration, or a damaged one ({_problem(error)}); make it anew"
            ) from error
        if header["version"] > _VERSION:
            raise ConfigError(
                f"{path}: calibration version {header['version']} is newer than this dipper reads ({_VERSION}): upgrade"
            )
        try:
            return cls(
                model=header["model"],
                provenance=header["provenance"],
                tables=_under("tables", arrays),
                factors=_by_layer("factors", _FACTORS, arrays),
                means=_by_layer("means", _MEANS, arrays),
                biases=_by_layer("biases", _BIASES, arrays),
                extra=_under("extra", arrays),
                sha256=hashlib.sha256(content).hexdigest(),
            )
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error


def _told(model: Mapping[str, Any]) -> str:
    """A model in words."""
    return (
        f"{model['name']} ({model['architecture']}, {model['n_layers']} layers, {model['hidden']} x "
        f"{model['intermediate']}, {str(model['fingerprint'])[:12]})"
    )


def _require(condition: bool, problem: str) -> None:
    if not condition:
        raise ValueError(problem)


def _check_density(key: str) -> None:
    try:
        known = 0 < float(key) <= 1
    except ValueError:
        known = False
    _require(known, f"a table is for the density {key!r}, outside (0, 1]")


def _check_array(name: str, array: npt.NDArray[Any], dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
    _require(array.dtype == dtype, f"{name} has dtype {array.dtype}, not {dtype}")
    _require(array.shape == shape, f"{name} has shape {list(array.shape)}, not {list(shape)}")
    _require(bool(np.isfinite(array).all()), f"{name} holds a value that is not finite")


def read_energies(path: str | Path) -> _Arrays:
    """The arrays of an `.npz` file of column energies by region, numbers but otherwise unchecked: `pack` does that.

    Raises:
        ConfigError: it is absent, cut, damaged, compressed, or no such file.
    """
    try:
        return _read_arrays(Path(path).read_bytes())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); give an .npz file of column energies") from error
    except _MALFORMED as error:
        raise ConfigError(
            f"{path}: is no file of column energies, or a damaged one ({_problem(error)}); make it anew"
        ) from error


def _problem(error: BaseException) -> str:
    return f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else " ".join(str(error).split())


def _read_arrays(content: bytes) -> _Arrays:
    """The members of the zip. Not `np.load`, which allocates what a member's header claims before looking for it."""
    arrays: _Arrays = {}
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            for info in archive.infolist():
                name = info.filename.removesuffix(".npy")
                _require(name != info.filename and name not in arrays, f"{info.filename!r} is unexpected")
                _require(info.compress_type == zipfile.ZIP_STORED, f"{name} is compressed")
                _require(info.file_size <= len(content), f"{name} is longer than the file")
                arrays[name] = _read_array(name, archive.read(info))
    except zipfile.BadZipFile as error:
        raise ValueError(str(error)) from error
    return arrays


def _read_array(name: str, content: bytes) -> npt.NDArray[Any]:
    """A `.npy` member of version 1.0 that holds numbers in C order."""
    start = 10 + int.from_bytes(content[8:10], "little")
    _require(content[:8] == b"\x93NUMPY\x01\x00" and start <= len(content), f"{name} is no array")
    described = ast.literal_eval(content[10:start].decode("latin-1"))
    dtype, shape = described["descr"], described["shape"]
    is_number = isinstance(dtype, str) and re.fullmatch("[<>|]([biu]1|[iuf][248])", dtype)
    _require(bool(is_number) and described["fortran_order"] is False, f"{name} holds {dtype!r}: numbers are expected")
    _require(
        type(shape) is tuple and all(type(extent) is int and extent >= 0 for extent in shape), f"{name}: shape {shape}"
    )
    n_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    _require(n_bytes == len(content) - start, f"{name} has {len(content) - start} bytes, its shape needs {n_bytes}")
    array: npt.NDArray[Any] = np.frombuffer(content, dtype, offset=start).reshape(shape)
    return array


def _read_header(arrays: _Arrays) -> dict[str, Any]:
    """The JSON header, its format, its version and its list of members checked."""
    raw = arrays["header"]
    _require(raw.dtype == np.uint8 and raw.ndim == 1 and raw.size <= _MAX_HEADER_BYTES, "the header is no text")
    header: dict[str, Any] = json.loads(raw.tobytes(), parse_constant=_no_constant)
    _require(isinstance(header, dict) and header.get("format") == _FORMAT, f"its format is not {_FORMAT}")
    _require(type(header.get("version")) is int and header["version"] >= 1, f"version is {header.get('version')!r}")
    for name in ("model", "provenance"):
        _require(isinstance(header[name], dict), f"{name} is no object")
    _require(["header", *header["arrays"]] == list(arrays), "its members are not those that the header lists")
    return header


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number")


def _under(part: str, arrays: _Arrays) -> _Arrays:
    return {name.removeprefix(f"{part}/"): array for name, array in arrays.items() if name.startswith(f"{part}/")}


def _by_layer(part: str, sizes: Mapping[str, str], arrays: _Arrays) -> list[Any] | None:
    """Vectors by layer out of stacked ones; None where the part is absent."""
    stacked = _under(part, arrays)
    if not stacked:
        return None
    if set(stacked) != set(sizes):
        raise ConfigError(f"it has {part} {', '.join(sorted(stacked))}, not {', '.join(sorted(sizes))}; make it anew")
    n_layers = {array.shape[0] if array.ndim == 2 else None for array in stacked.values()}
    if len(n_layers) != 1 or None in n_layers:
        raise ConfigError(f"its {part} are not all [n_layers, n]; make it anew")
    return list(zip(*(stacked[name] for name in sizes), strict=True))
