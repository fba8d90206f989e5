"""Measured settings of planes -> src/dipper/planes.toml, from which `auto` chooses.

    python experiments/planes.py [--keep] RESULT.json...

Each RESULT is the JSON line of `benchmarks/bench_planes.py ... --ppl FILE`, alone or as the last line of a file, or
what `dipper sensitivity` wrote, which gives the order of layers for `--whole auto:N`. Of each setting and
budget the last result given is kept; with --keep also what the file has of others.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import tomli
import tomli_w

from dipper.bundle import Bundle
from dipper.sensitivity import SCHEMA

OUT = Path(__file__).resolve().parent.parent / "src" / "dipper" / "planes.toml"
HEAD = (
    "# Written by experiments/planes.py: settings of planes, and what they change in perplexity (0.02 is 2 % more).\n\n"
)


def point(row: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    """What `auto` reads of one result."""
    bits = [int(b) for b in row["base"].split(",")]
    return {
        "base_bits": [bits[0], bits[-1]],
        "fetch": row["fetch"],
        "fetch_glu": row["fetch_glu"],
        **({} if row["read_cost"] is None else {"read_cost": row["read_cost"]}),
        "whole": [int(layer) for layer in row["whole"].split(",")] if row["whole"] else [],
        "bits": float(row["budget"].removesuffix("b")),
        "increase": round(row["relative"], 5),
        "stderr": round(row["relative_stderr"], 5),
        "tokens": result["ppl_tokens"],
    }


Models = dict[str, dict[str, Any]]  # by the SHA-256 of the source; points and orders by what one is kept of


def table_of(models: Models, name: str, sha256: str) -> dict[str, Any]:
    """A model's table, made where there is none."""
    return models.setdefault(sha256, {"name": name, "source_sha256": sha256, "orders": {}, "points": {}})


def setting_of(made: dict[str, Any]) -> str:
    """A point without what was measured of it."""
    return json.dumps({name: made[name] for name in made if name not in ("increase", "stderr", "tokens")})


def kept() -> Models:
    """What the file has."""
    models: Models = {}
    for old in tomli.loads(OUT.read_text(encoding="utf-8")).get("models", []):
        table = table_of(models, old["name"], old["source_sha256"])
        table["points"] = {setting_of(made): made for made in old["points"]}
        table["orders"] = {tuple(made["base_bits"]): made for made in old.get("orders", [])}
    return models


def add_points(models: Models, result: dict[str, Any]) -> None:
    """Adds a benchmark's settings."""
    for source in result["provenance"]:
        bundle = Bundle.open(source["bundle"])
        table = table_of(models, bundle.model.name, bundle.header["source"]["sha256"])
        for row in result["results"]:
            of_model = row["model"] == Path(source["bundle"]).name and row["method"] == "planes"
            if of_model and row.get("relative") is not None:
                made = point(row, result)
                table["points"][setting_of(made)] = made


def add_order(models: Models, found: dict[str, Any]) -> None:
    """Adds what `dipper sensitivity` found."""
    table = table_of(models, found["model"], found["source_sha256"])
    order = {name: found[name] for name in ("base_bits", "order")} | {"tokens": found["n_tokens"]}
    table["orders"][tuple(found["base_bits"])] = order


def main() -> None:
    """Writes the file."""
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("results", nargs="+", type=Path)
    cli.add_argument("--keep", action="store_true", help="add to what the file has")
    args = cli.parse_args()
    models = kept() if args.keep else {}
    for path in args.results:
        text = path.read_text(encoding="utf-8")
        if SCHEMA in text:
            add_order(models, json.loads(text))
        else:
            add_points(models, json.loads(text.splitlines()[-1]))
    tables = [
        {**table, **{part: list(table[part].values()) for part in ("orders", "points")}} for table in models.values()
    ]
    OUT.write_text(HEAD + tomli_w.dumps({"models": tables}), encoding="utf-8")
    print(OUT)


if __name__ == "__main__":
    main()
