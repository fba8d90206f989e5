"""Measured settings of planes -> src/dipper/planes.toml, from which `auto` chooses.

    python experiments/planes.py RESULT.json...

Each RESULT is the JSON line of `benchmarks/bench_planes.py ... --ppl FILE`, alone or as the last line of a file. Of
each model, base and budget the last result given is kept.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import tomli_w

from dipper.bundle import Bundle

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
        "whole": [int(layer) for layer in row["whole"].split(",")] if row["whole"] else [],
        "bits": float(row["budget"].removesuffix("b")),
        "increase": round(row["relative"], 5),
        "stderr": round(row["relative_stderr"], 5),
        "tokens": result["ppl_tokens"],
    }


def main() -> None:
    """Writes the file."""
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("results", nargs="+", type=Path)
    models: dict[str, dict[str, Any]] = {}
    for path in cli.parse_args().results:
        result = json.loads(path.read_text(encoding="utf-8").splitlines()[-1])
        for source in result["provenance"]:
            bundle = Bundle.open(source["bundle"])
            table = models.setdefault(
                bundle.header["source"]["sha256"],
                {"name": bundle.model.name, "source_sha256": bundle.header["source"]["sha256"], "points": {}},
            )
            for row in result["results"]:
                of_model = row["model"] == Path(source["bundle"]).name and row["method"] == "planes"
                if of_model and row.get("relative") is not None:
                    made = point(row, result)
                    table["points"][(*made["base_bits"], made["bits"])] = made
    tables = [{**table, "points": list(table["points"].values())} for table in models.values()]
    OUT.write_text(HEAD + tomli_w.dumps({"models": tables}), encoding="utf-8")
    print(OUT)


if __name__ == "__main__":
    main()
