"""What is lost at equal DRAM: the MLP requantised and wholly resident, planes, planes a token late, dip and dip-ca.

    python experiments/rivals.py experiments/configs/rivals.toml MODEL --text wiki.test.raw --calibration c4.txt \\
        -o rivals.json [--device cuda] [--batch 8] [--bits 3.6,2.7] [--whole 27,2,26] [--tokens N] [--only planes]

MODEL is a bundle or a GGUF file (or a name that `dipper pull` knows) whose MLP is quantised to 4, 5 or 6 bits. A
setting gets the cache that a budget leaves: of units in planes, of columns in dip and dip-ca. Codes, scales, norms and
slots count, staging does not. Flash bytes are those of the units or columns that a token reads, without what a device
widens them to. Every window begins with the caches that a run begins with. Changes of perplexity are against the dense
model on the same windows, paired. `resident` is calibrated on another text than the one that is scored.

The output file grows setting by setting; a rerun goes on after those it holds. The last line of stdout is its summary.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

import torch

from dipper.errors import ConfigError, DipperError
from dipper.evaluate import PerplexityResult, WindowScore, eval_record, read_text, relative_change, score_text
from dipper.evaluate_torch import DTYPES, Opened, TorchScorer, calibration_windows, mlp_bytes
from dipper.files import write_json
from dipper.methods import Dip, Method, MethodConfig, Planes, Resident
from dipper.records import json_line, provenance
from dipper.sparsify import find_glus, sparsify_
from dipper.split_weights import Codes, Splits
from dipper.tables import align
from dipper.torch_model import LoadedModel, load_model

SCHEMA = "dipper-rivals/1"


@dataclasses.dataclass(frozen=True)
class LayerBits:
    """Bits of a layer as the source has it.

    Attributes:
        n: input and GLU columns.
        column: bits of the codes of one of each.
        scales: bits of all scales and offsets.
    """

    n: tuple[int, int]
    column: tuple[int, int]
    scales: int

    @property
    def codes(self) -> int:
        """Of the layer."""
        return self.n[0] * self.column[0] + self.n[1] * self.column[1]


def layer_bits(codes: Codes, n_layers: int) -> list[LayerBits]:
    """Of every layer.

    Raises:
        ConfigError: the source is not quantised, so that its bits say nothing about a packed model.
    """
    layers = []
    for layer in range(n_layers):
        column, scales, n = [0, 0], 0, [0, 0]
        for name, which in (("gate", 0), ("up", 0), ("down", 1)):
            grid, rows = codes(f"layers.{layer}.{name}")
            if grid.is_float:
                raise ConfigError("the MLP has float weights: give the bundle that `dipper pack --bits 4` makes of it")
            n_rows, n[which] = rows.codes.shape
            column[which] += n_rows * grid.bits
            scales += sum(n_rows * entries * dtype.itemsize * 8 for _, dtype, entries in grid.scale_arrays(n[which]))
        layers.append(LayerBits((n[0], n[1]), (column[0], column[1]), scales))
    return layers


class Scorer(TorchScorer):
    """Also sums the bytes that tokens read from flash."""

    layers: list[LayerBits]
    flash_bytes = 0.0
    selected = hits = 0

    def _score(self, ids: torch.Tensor) -> list[WindowScore]:
        scores = super()._score(ids)
        for rule, layer in zip(self.opened.sparsity.rules, self.layers, strict=True):
            self.selected += rule.meter.selected
            self.hits += rule.meter.hits
            for which in (0, 1):
                self.flash_bytes += rule.meter.missed[which] * read_bytes(rule, layer, which)
        return scores


def read_bytes(rule: Method, layer: LayerBits, which: int) -> float:
    """What one miss of the input (which = 0) or the GLU region (1) reads."""
    return rule.regions[which].unit_bytes if isinstance(rule, Planes) else layer.column[which] / 8


def held_bits(rules: list[Method], layers: list[LayerBits]) -> tuple[float, float]:
    """Bits that these rules hold without a cache, and what a cache of everything takes beyond them."""
    fixed, cached = 0.0, 0.0
    for rule, layer in zip(rules, layers, strict=True):
        if isinstance(rule, Resident):
            fixed += rule.held_bits
            continue
        fixed += layer.scales
        if isinstance(rule, Dip):
            cached += layer.codes
        elif not isinstance(rule, Planes) or rule.is_whole:
            fixed += layer.codes
        else:
            for region in rule.regions:
                fixed += region.n * (region.code_bits - region.residual_bits + 32)  # its norm is fp32
                cached += 8 * region.n_units * region.unit_bytes if region.refines else 0
    return fixed, cached


class Rivals:
    """One model, its dense perplexity, and the file of what was measured."""

    def __init__(self, loaded: LoadedModel, args: argparse.Namespace, config: dict[str, Any]) -> None:
        if loaded.codes is None:
            raise ConfigError(f"{args.model} is known to transformers alone: give a bundle, a GGUF file or a name")
        self.loaded, self.args, self.config = loaded, args, config
        codes = functools.cache(loaded.codes)
        self.splits = Splits(codes, keep=True)
        self.layers = layer_bits(codes, sum(len(site.glus) for site in find_glus(loaded.model)))
        self.n_weights = sum(rule.gate.numel() * 3 for site in find_glus(loaded.model) for rule in site.glus)
        self.size = mlp_bytes(Path(args.model) if Path(args.model).exists() else args.model, loaded.model)
        self.source = read_text(args.text)
        self.tokens = loaded.encode(self.source.text)
        self.text = read_text(args.calibration)
        self.calibration = calibration_windows(loaded, self.text.text, config["calibration_windows"])
        header = {
            "schema": SCHEMA, "model": loaded.name, "fingerprint": loaded.fingerprint, "dtype": args.dtype,
            "config": {name: config[name] for name in ("window", "tokens", "calibration_windows")},
            "calibration_sha256": self.text.sha256,
        }  # fmt: skip
        self.content: dict[str, Any] = {**header, "results": []}
        if args.output.exists():
            held = json.loads(args.output.read_text(encoding="utf-8"))
            for name, value in header.items():
                if held.get(name) != json.loads(json.dumps(value)):
                    raise ConfigError(
                        f"{args.output} holds another run: its {name} is {held.get(name)!r}; give another -o"
                    )
            self.content = held
        self.dense = self._score(MethodConfig("dense"))[0]

    def _score(self, method: MethodConfig) -> tuple[PerplexityResult, Scorer, tuple[float, float], Any]:
        """The score, what scored, (bits held, bits of a full cache), and the record."""
        with sparsify_(self.loaded.model, method, calibration=self.calibration, splits=self.splits) as sparse:
            opened = Opened(self.loaded, sparse, source=self.args.model, mlp_bytes=self.size)
            scorer = Scorer(opened, batch=self.args.batch)
            scorer.layers = self.layers
            result = score_text(
                scorer, self.tokens, window=self.config["window"], bos_id=self.loaded.bos_id,
                limit=self.config["tokens"],
            )  # fmt: skip
            return result, scorer, held_bits(sparse.rules, self.layers), eval_record(scorer, self.source, result)

    def room(self, method: MethodConfig, bits: float) -> float | None:
        """The share of the units or columns that a budget leaves room for; None where the rest alone is above it."""
        with sparsify_(self.loaded.model, dataclasses.replace(method, capacity=0.0), splits=self.splits) as sparse:
            fixed, cached = held_bits(sparse.rules, self.layers)
        left = bits * self.n_weights - fixed
        return None if left < 0 else min(1.0, left / cached) if cached else 0.0

    def measure(self, options: dict[str, Any], bits: float | None) -> None:
        """One setting at one budget; None: it holds what it holds."""
        key = json.dumps({"setting": options, "bits": bits})
        if any(row["key"] == key for row in self.content["results"]):
            return
        start = time.perf_counter()
        try:
            method = self._method(options)
            if bits is not None:
                capacity = self.room(method, bits)
                if capacity is None:
                    print(f"{key}: its bases alone are above the budget", file=sys.stderr)
                    return
                method = dataclasses.replace(method, capacity=capacity)
            result, scorer, (fixed, cached), record = self._score(method)
        except ConfigError as error:
            print(f"{key}: {error}", file=sys.stderr)
            return
        held = (fixed + (method.capacity or 0.0) * cached) / self.n_weights
        change = relative_change(result, self.dense)
        per_token = scorer.flash_bytes / result.n_tokens
        record = dataclasses.replace(
            record, mlp_bits_per_weight=held, useful_bytes_per_token=per_token,
            against={"record": {"method": "dense", "perplexity": self.dense.perplexity}, **change},
        )  # fmt: skip
        self.content["results"].append(
            {
                "key": key,
                "setting": options,
                "bits": bits,
                "seconds": time.perf_counter() - start,
                "record": record.as_dict(),
            }
        )
        write_json(self.args.output, self.content)
        print(
            f"{key}: {100 * change['relative']:+.2f} % at {held:.3f} bits, {per_token / 1e6:.2f} MB a token "
            f"({time.perf_counter() - start:.1f} s)", file=sys.stderr, flush=True,
        )  # fmt: skip

    def _method(self, options: dict[str, Any]) -> MethodConfig:
        options = dict(options)
        n_whole = options.pop("n_whole", 0)
        if n_whole > len(self.args.whole):
            raise ConfigError(f"{n_whole} layers are to be whole: name them with --whole, the most sensitive first")
        if n_whole:
            options["whole"] = self.args.whole[:n_whole]
        made = {name: tuple(v) if isinstance(v, list) else v for name, v in options.items()}
        if made["name"] == "dip-ca":
            made["capacity"] = 0.0
        return MethodConfig(**made)


def settings(config: dict[str, Any], only: list[str] | None) -> Iterator[tuple[dict[str, Any], float | None]]:
    """Method options and budgets, in the order of measuring."""
    for bits in config["resident"]:
        if only is None or "resident" in only:
            yield {"name": "resident", "bits": bits}, None
    for budget in config["bits"]:
        for options in [{"name": "planes", **p} for p in config["planes"]] + config["dip"]:
            if only is None or options["name"] in only:
                yield options, budget


def table(rivals: Rivals) -> str:
    """For people: what is held, read and lost."""
    rows = [["setting", "budget", "bits held", "MB a token", "cached", "hits", "perplexity", "change %", "±"]]
    for row in sorted(
        rivals.content["results"], key=lambda row: (row["bits"] or 0, row["record"]["against"]["relative"])
    ):
        record, setting = row["record"], row["setting"]
        words = " ".join([setting["name"], *(f"{k} {v}" for k, v in setting.items() if k != "name")])
        cached, hits = record["options"].get("capacity"), record["hit_rate"]
        stderr = record["against"]["relative_stderr"]
        rows.append(
            [
                words, "" if row["bits"] is None else f"{row['bits']:g}", f"{record['mlp_bits_per_weight']:.3f}",
                f"{record['useful_bytes_per_token'] / 1e6:.2f}", "" if cached is None else f"{cached:.3f}",
                "" if hits is None else f"{hits:.3f}", f"{record['perplexity']:.4f}",
                f"{100 * record['against']['relative']:+.2f}", "" if stderr is None else f"{100 * stderr:.2f}",
            ]
        )  # fmt: skip
    own = sum(layer.codes + layer.scales for layer in rivals.layers) / rivals.n_weights
    dense = rivals.dense
    return f"dense: {own:.3f} bits, perplexity {dense.perplexity:.4f}, {dense.n_tokens} tokens\n" + align(rows)


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
    parser.add_argument("--tokens", type=int, help="other than the configuration says")
    parser.add_argument("--bits", help="budgets, with commas, other than the configuration says")
    parser.add_argument("--whole", default="", metavar="LAYER,...", help="layers, the most sensitive first")
    parser.add_argument("--only", action="append", metavar="METHOD", help="these methods alone")
    args = parser.parse_args()
    args.whole = tuple(int(layer) for layer in args.whole.split(",") if layer)
    try:
        config = tomllib.loads(args.config.read_text(encoding="utf-8"))
        config["tokens"] = args.tokens or config["tokens"]
        if args.bits:
            config["bits"] = [float(bits) for bits in args.bits.split(",")]
        given = Path(args.model) if Path(args.model).exists() else args.model
        loaded = load_model(given, device=args.device, dtype=DTYPES[args.dtype], context=config["window"])
        rivals = Rivals(loaded, args, config)
        for options, bits in settings(config, args.only):
            rivals.measure(options, bits)
    except DipperError as error:
        sys.exit(f"rivals: {error}")
    print(table(rivals))
    summary = {**rivals.content, "provenance": dataclasses.asdict(provenance(args.model))}
    for row in summary["results"]:
        row["record"] = {
            k: v for k, v in row["record"].items() if k not in ("window_nll", "window_tokens", "provenance")
        }
    print(json_line(summary))


if __name__ == "__main__":
    main()
