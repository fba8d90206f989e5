"""Every method on one bench: perplexity, KL and same-top-1 of a grid of methods and densities, one model at a time.

    python experiments/grid.py experiments/configs/grid.toml MODEL --text wiki.test.raw --calibration c4.txt \\
        -o experiments/results/grid-MODEL.json [--device cuda] [--dtype fp32] [--batch 8] [--only dip@0.6]

MODEL is a bundle, a GGUF file, a Hugging Face folder, or a name that `dipper pull` knows. The configuration names
methods and densities; a method that cannot reach a density is left out, and the file says so. `fit` names densities at
which DIP is also run as `calibrate` fits it (split, densities by layer, norms, means). The dense model runs beside
every setting, so changes to it are paired window by window. The output is one file; a run that was interrupted goes on
after the settings it holds. The text to score is never calibrated on.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

import torch

from dipper.calibrate import calibrate
from dipper.errors import ConfigError, DipperError
from dipper.evaluate import read_text
from dipper.evaluate_torch import DTYPES, Opened, calibration_windows, evaluate_torch, mlp_bytes
from dipper.files import write_json
from dipper.methods import METHODS, MethodConfig
from dipper.sparsify import sparsify_
from dipper.torch_model import LoadedModel, load_model

SCHEMA = "dipper-grid/1"


def settings(config: dict[str, Any]) -> tuple[list[dict[str, Any]], list[str]]:
    """Method options of every point of the grid, and what cannot be reached."""
    points: list[dict[str, Any]] = [{"name": "dense"}]
    left_out = []
    for part in (config, config.get("few", {})):
        for method in part.get("methods", []):
            for density in part["densities"]:
                point = {**method, "density": density}
                try:
                    MethodConfig(**point)
                except ConfigError as error:
                    left_out.append(str(error))
                    continue
                points.append(point)
    return points, left_out


def key_of(options: dict[str, Any]) -> str:
    """A setting's name in the file."""
    return json.dumps(options, sort_keys=True)


class Results:
    """The file: what it holds is not measured again."""

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        self.path = path
        self.content: dict[str, Any] = {"schema": SCHEMA, **header, "left_out": [], "results": []}
        if path.exists():
            held = json.loads(path.read_text(encoding="utf-8"))
            for name, value in header.items():
                if held.get(name) != value:
                    raise ConfigError(
                        f"{path} holds another grid: its {name} is {held.get(name)!r}, not {value!r}; give another -o"
                    )
            self.content = held

    def has(self, key: str) -> bool:
        """Whether a setting was measured."""
        return any(row["setting"] == key for row in self.content["results"])

    def add(self, key: str, record: dict[str, Any], seconds: float) -> None:
        """A setting's record; the file is whole at any time."""
        self.content["results"].append({"setting": key, "seconds": round(seconds, 2), "record": record})
        write_json(self.path, self.content)


def measure(opened: Opened, args: argparse.Namespace, config: dict[str, Any]) -> dict[str, Any]:
    """The record of a model as it stands."""
    record = evaluate_torch(
        opened, args.text, window=config["window"], limit=config["tokens"], batch=args.batch, kl=config["kl"]
    )
    return record.as_dict()


def run_grid(loaded: LoadedModel, results: Results, args: argparse.Namespace, config: dict[str, Any]) -> None:
    """Every point that the file lacks."""
    points, left_out = settings(config)
    results.content["left_out"] = left_out
    text = read_text(args.calibration)
    windows = calibration_windows(loaded, text.text, config["calibration_windows"])
    size = mlp_bytes(args.model, loaded.model)
    calibrated = text.sha256

    def one(key: str, method: MethodConfig, **more: Any) -> None:
        start = time.perf_counter()
        try:
            with sparsify_(loaded.model, method, calibration=windows, **more) as sparse:
                opened = Opened(loaded, sparse, source=args.model, mlp_bytes=size, calibration={"text": calibrated})
                record = measure(opened, args, config)
        except ConfigError as error:
            results.content["left_out"].append(f"{key}: {error}")
            print(f"{key}: {error}", file=sys.stderr)
            return
        results.add(key, record, time.perf_counter() - start)
        print(f"{key} {record['perplexity']:.4f} in {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)

    for point in points:
        key = key_of(point)
        if not results.has(key) and (args.only is None or f"{point['name']}@{point.get('density', 1)}" in args.only):
            one(key, MethodConfig(**point))
    if args.only is None:
        run_fitted(loaded, results, args, config, windows, calibrated, one)


def run_fitted(
    loaded: LoadedModel,
    results: Results,
    args: argparse.Namespace,
    config: dict[str, Any],
    windows: list[torch.Tensor],
    text_sha256: str,
    one: Callable[..., None],
) -> None:
    """DIP as `calibrate` fits it; the calibration lies beside the results."""
    densities = [d for d in config.get("fit", []) if not results.has(key_of({"name": "dip", "fitted": d}))]
    if not densities:
        return
    made = calibrate(
        loaded.model, windows, model_fields=loaded.calibration_fields(), densities=densities,
        provenance={"text_sha256": text_sha256, "windows": len(windows), "window": 1024},
    )  # fmt: skip
    made.save(args.output.with_suffix(".npz"))
    results.content["fit"] = made.provenance["fit"]
    for density in densities:
        one(key_of({"name": "dip", "fitted": density}), MethodConfig("dip", density=density), fitted=made)


def main() -> None:
    """Parses, runs, says what is wrong in one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="fp32")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--tokens", type=int, help="fewer than the configuration says")
    parser.add_argument("--only", action="append", metavar="METHOD@DENSITY", help="these points alone")
    args = parser.parse_args()
    try:
        config = tomllib.loads(args.config.read_text(encoding="utf-8"))
        config["tokens"] = args.tokens or config["tokens"]
        unknown = {m["name"] for part in (config, config.get("few", {})) for m in part.get("methods", [])} - set(
            METHODS
        )
        if unknown:
            raise ConfigError(f"{args.config} names unknown methods: {', '.join(sorted(unknown))}")
        given = Path(args.model) if Path(args.model).exists() else args.model
        loaded = load_model(given, device=args.device, dtype=DTYPES[args.dtype])
        args.output.parent.mkdir(parents=True, exist_ok=True)
        header = {
            "config": args.config.name,
            "model": loaded.name,
            "fingerprint": loaded.fingerprint,
            "dtype": args.dtype,
        }
        run_grid(loaded, Results(args.output, header), args, config)
    except DipperError as error:
        sys.exit(f"grid: {error}")


if __name__ == "__main__":
    main()
