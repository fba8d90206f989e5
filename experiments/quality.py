"""The measured quality curves that `dipper plan` uses: src/dipper/quality.toml from results of the experiment density.

    python experiments/quality.py experiments/results/density-*.json -o src/dipper/quality.toml

Taken are DIP at equal densities, DIP as `calibrate` fits it, and DIP-CA with half of the columns cached, each as its
paired change to the dense model on the same windows. A fit may have densities by layer, which the planner has not: such
a point is corrected by what one split for all layers lost on the calibration text. What quantising costs is from
docs/log.md ("What does quantising a 16-bit source cost?").
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from dipper.files import whole_file

_PLAIN = {"name", "capacity", "gamma"}  # what a rule may have; norms and the like are left out
_QUANTISATION = """\
# Change of perplexity by packing a 16-bit source with --bits: attention and head at 8 bits, the MLP at these.
[quantisation]
model = "Qwen2.5 Coder 0.5B"
tokens = 32736
source = "docs/log.md, 2026-11-22: What does quantising a 16-bit source cost? (benchmarks/quantisation.py)"
4 = { increase = 0.0250, stderr = 0.0021 }
8 = { increase = 0.00036, stderr = 0.00019 }
16 = { increase = 0.00067, stderr = 0.00014 }
"""


def points(results: dict[str, Any]) -> list[dict[str, Any]]:
    """One point a setting: densities, gamma, share cached, relative change of perplexity and its standard error."""
    out = []
    for cell in results["cells"]:
        options, record = cell["options"], cell["result"]
        if cell["kind"] != "perplexity" or options["method"]["name"] not in ("dip", "dip-ca"):
            continue
        method = options["method"]
        if set(method) - _PLAIN or "above" in options:
            continue
        if method["name"] == "dip" and "capacity" in method:  # the same masks as without a cache
            continue
        point = {"d_in": record["d_in"], "d_glu": record["d_glu"], "gamma": method.get("gamma", 1.0)}
        increase, stderr = record["against"]["relative"], record["against"]["relative_stderr"]
        if "fit" in options:
            table = record["fit"]["densities"]
            d_in, d_glu = (math.fsum(column) / len(table) for column in zip(*table, strict=True))
            point |= {"d_in": d_in, "d_glu": d_glu, "fitted": True}
            if any(row != table[0] for row in table):
                losses = record["fit"]["losses"]
                increase = (1 + increase) * math.exp(losses["split"] - losses["layers"]) - 1
                point["by_layer"] = True
        if "capacity" in method:
            point |= {"cached": method["capacity"], "cache": "lfu", "hit_rate": record["hit_rate"]}
        out.append({**point, "increase": increase, "stderr": stderr})
    return out


def toml(value: Any) -> str:
    """A value, rounded to what it is good for."""
    if isinstance(value, float):
        return f"{value:.5g}" if "." in f"{value:.5g}" else f"{value:.1f}"
    return json.dumps(value)


def model_toml(path: Path) -> str:
    """The table of one model."""
    results = json.loads(path.read_text(encoding="utf-8"))
    dense = next(
        c["result"]
        for c in results["cells"]
        if c["kind"] == "perplexity" and c["options"]["method"] == {"name": "dense"}
    )
    head = {
        "name": dense["model"],
        "fingerprint": results["model"]["sha256"],
        "source": f"experiments/results/{path.name}",
        "text": f"{Path(dense['text']).name}, {dense['n_windows']} windows of {dense['window']}",
        "tokens": dense["n_tokens"],
        "dense_perplexity": dense["perplexity"],
    }
    lines = ["[[models]]", *(f"{key} = {toml(value)}" for key, value in head.items()), "points = ["]
    for point in points(results):
        lines.append("  { " + ", ".join(f"{key} = {toml(value)}" for key, value in point.items()) + " },")
    return "\n".join([*lines, "]\n"])


def main() -> None:
    """Parses, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    head = "# Written by experiments/quality.py. Perplexity relative to the dense model: 0.05 is 5 % more.\n"
    with whole_file(args.output) as out:
        out.write("\n".join([head, _QUANTISATION, *map(model_toml, args.results)]).encode())


if __name__ == "__main__":
    main()
