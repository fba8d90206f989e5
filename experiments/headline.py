"""The paper's headline, simulated: a large model streamed from a phone's flash, dense and pruned, against DRAM.

    python experiments/headline.py experiments/configs/headline.toml -o experiments/results/headline.json \
        --figure experiments/figures/headline.svg

Weights of the model are not needed: scores are generated (`ScoreGenerator`), and a band over the single models that
the generator was fitted to stands beside them. Printed: tok/s by DRAM; throughput gained at equal DRAM, DRAM saved at
equal throughput, at flat bandwidth and at a cost per read; and what decides (density, hits, cost per read). Last line:
one JSON object.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import tomli

from dipper.budget import EngineConfig
from dipper.device import Device
from dipper.figures import panels
from dipper.files import write_json
from dipper.generator import ScoreGenerator
from dipper.published import published_bundle
from dipper.records import provenance
from dipper.simulator import predict
from dipper.tables import align
from dipper.workload import GeneratedWorkload, Setting


def name_of(line: dict[str, Any]) -> str:
    """A line of the figure."""
    words = [line["method"], line.get("cache", ""), f"γ {line['gamma']}" if "gamma" in line else ""]
    return " ".join(word for word in words if word)


Key = tuple[str, float, str]  # line, density, DRAM


class Headline:
    """One configuration: settings, their counts (by alignment of reads), and their speed on variants of a device."""

    def __init__(self, config: dict[str, Any], variant: str | None = None, only_at: bool = False) -> None:
        self.config = config
        self.bundle = published_bundle(config["model"], bits=config["bits"], other_bits=config["other_bits"])
        self.device = Device.load(config["device"])
        self.sizes = {"n_prompt": config["n_prompt"], "n_tokens": config["n_tokens"]}
        generator = ScoreGenerator.load(variant=variant)
        self.workload = GeneratedWorkload(self.bundle, generator, seed=config["seed"], **self.sizes)
        self.dram = [config["at_dram"]] if only_at else config["dram"]
        self.densities = [config["at_density"]] if only_at else config["densities"]
        self.dense = {dram: self._setting({"method": "dense-stream"}, dram) for dram in self.dram}
        self.keys = [
            (name_of(line), density, dram)
            for line in config["lines"]
            for density in self.densities
            for dram in self.dram
        ]
        self.by_name = {name_of(line): line for line in config["lines"]}
        self.settings: dict[int, list[Setting]] = {}
        self.traffic: dict[int, list[Any]] = {}
        for alignment in (1, config["alignment"]):
            self.settings[alignment] = [self._setting(self.by_name[n], dram, d, alignment) for n, d, dram in self.keys]
        both = [s for settings in self.settings.values() for s in settings]
        counts = self.workload.traffic(both)  # all at once: they share the generated scores
        for i, alignment in enumerate(self.settings):
            self.traffic[alignment] = counts[i * len(self.keys) : (i + 1) * len(self.keys)]

    def _setting(self, line: dict[str, Any], dram: str, density: float | None = None, alignment: int = 1) -> Setting:
        options = {"method": line["method"], "gamma": line.get("gamma"), "dram": dram}
        if density is not None:
            options["density"] = density
        config = EngineConfig(context=self.config["context"], **options)
        return Setting.plan_for(self.bundle, config, cache=line.get("cache"), host_bytes=0, alignment=alignment)

    def on(self, cost_us: float, alignment: int) -> Device:
        """The device with another cost per read."""
        flash = dataclasses.replace(self.device.flash, cost_per_read_us=cost_us, alignment=alignment)
        return dataclasses.replace(self.device, flash=flash)

    def speeds(self, cost_us: float) -> tuple[dict[str, float], dict[Key, dict[str, float]]]:
        """tok/s of dense streaming by DRAM; tok/s, hits, reads, bytes of each pruned setting, at a cost per read."""
        alignment = 1 if cost_us == 0 else self.config["alignment"]
        device = self.on(cost_us, alignment)
        dense = {dram: predict(s, None, device, **self.sizes).tok_per_s for dram, s in self.dense.items()}
        rows = {}
        for key, setting, counts in zip(self.keys, self.settings[alignment], self.traffic[alignment], strict=True):
            totals = counts.totals
            rows[key] = {
                "tok_per_s": predict(setting, counts, device, **self.sizes).tok_per_s,
                "dram_bytes": float(setting.plan.total_bytes),
                "mlp_bytes": float(setting.plan.mlp_bytes),
                "hit_rate": totals["hits"] / totals["selected"],
                "flash_bytes_per_token": totals["flash_bytes"] / counts.n_tokens,
                "reads_per_token": totals["reads"] / counts.n_tokens,
            }
        return dense, rows


def saved(dense: dict[str, float], dense_bytes: dict[str, float], line: list[tuple[float, float]]) -> float | None:
    """The largest share of DRAM that a line saves where it is as fast as dense streaming; None where it never is.

    Args:
        dense, dense_bytes: tok/s and DRAM of dense streaming.
        line: (DRAM, tok/s), rising.
    """
    x, y = np.array([p[0] for p in line]), np.array([p[1] for p in line])
    best = None
    for dram, speed in dense.items():
        if y[0] <= speed <= y[-1]:
            needed = float(np.interp(speed, y, x))
        elif speed < y[0]:
            needed = float(x[0])  # even the smallest DRAM is faster: at least this much
        else:
            continue
        share = 1 - needed / dense_bytes[dram]
        best = share if best is None else max(best, share)
    return best


def line_of(
    rows: dict[Key, dict[str, float]], name: str, density: float, of: str = "dram_bytes"
) -> list[tuple[float, float]]:
    """(DRAM, tok/s), rising; `of` may be the MLP's share alone, `mlp_bytes`."""
    return [(r[of], r["tok_per_s"]) for (n, d, _), r in rows.items() if (n, d) == (name, density)]


def summary(headline: Headline, cost_us: float) -> list[dict[str, Any]]:
    """By line and density: throughput over dense streaming at equal DRAM (least, most), DRAM saved at equal speed."""
    dense, rows = headline.speeds(cost_us)
    whole = {dram: float(s.plan.total_bytes) for dram, s in headline.dense.items()}
    mlp = {dram: float(s.plan.mlp_bytes) for dram, s in headline.dense.items()}
    result = []
    for name in headline.by_name:
        for density in headline.densities:
            gains = {dram: rows[name, density, dram]["tok_per_s"] / dense[dram] - 1 for dram in headline.dram}
            result.append(
                {
                    "line": name, "density": density, "cost_per_read_us": cost_us,
                    "gain_least": min(gains.values()), "gain_most": max(gains.values()),
                    "dram_saved": saved(dense, whole, line_of(rows, name, density)),
                    "mlp_dram_saved": saved(dense, mlp, line_of(rows, name, density, "mlp_bytes")),
                    "reaches_40": max(gains.values()) >= 0.4,
                }
            )  # fmt: skip
    return result


def sensitivity(headline: Headline) -> list[dict[str, Any]]:
    """At one DRAM: what density, policy and cost per read make of the gain."""
    at = headline.config["at_dram"]
    result = []
    for cost in headline.config["costs_us"]:
        dense, rows = headline.speeds(cost)
        for name in headline.by_name:
            for density in headline.densities:
                row = rows[name, density, at]
                gain = row["tok_per_s"] / dense[at] - 1
                result.append({"line": name, "density": density, "cost_per_read_us": cost, **row, "gain": gain})
    return result


def percent(value: float | None) -> str:
    """With its sign."""
    return "-" if value is None else f"{100 * value:+.0f} %"


def print_all(headline: Headline, result: dict[str, Any]) -> None:
    """The tables."""
    at, density = headline.config["at_dram"], headline.config["at_density"]
    dense, rows = headline.speeds(0)
    names = list(headline.by_name)
    table = [["DRAM", "dense-stream", *(f"{n} d {density}" for n in names)]]
    for dram in headline.dram:
        table.append([dram, f"{dense[dram]:.2f}", *(f"{rows[n, density, dram]['tok_per_s']:.2f}" for n in names)])
    print("tok/s at flat bandwidth\n" + align(table))
    table = [["line", "density", "cost µs", "over dense, least", "most", "DRAM saved at equal tok/s", "of the MLP's"]]
    for row in result["summary"]:
        cells = [row["line"], f"{row['density']}", f"{row['cost_per_read_us']:g}", percent(row["gain_least"])]
        table.append([*cells, *(percent(row[name]) for name in ("gain_most", "dram_saved", "mlp_dram_saved"))])
    print("\n" + align(table))
    costs = headline.config["costs_us"]
    table = [["line", "density", "hits", *(f"{c} µs" for c in costs)]]
    for name in names:
        for d in headline.densities:
            cells = [r for r in result["sensitivity"] if (r["line"], r["density"]) == (name, d)]
            table.append([name, f"{d}", f"{100 * cells[0]['hit_rate']:.1f} %", *(percent(r["gain"]) for r in cells)])
    print(f"\nthroughput over dense streaming at {at}, by cost per read\n" + align(table))
    table = [["generator", *names]]
    for variant, speeds in result["band"].items():
        table.append([variant, *(f"{speeds[n]['tok_per_s']:.3f} ({100 * speeds[n]['hit_rate']:.1f} %)" for n in names)])
    print(f"\ntok/s (hits) at {at}, density {density}, with each model's own fit\n" + align(table))


def draw(headline: Headline, path: Path) -> None:
    """Speed against DRAM, at flat bandwidth and at a cost per read."""
    density = headline.config["at_density"]
    cost = headline.config["costs_us"][-2]
    with panels(path, 2, width=5.6, height=4.4) as axes:
        for axis, cost_us in zip(axes, (0, cost), strict=True):
            dense, rows = headline.speeds(cost_us)
            x = [headline.dense[dram].plan.total_bytes / 1e9 for dram in headline.dram]
            axis.plot(x, list(dense.values()), color="black", linestyle="--", label="dense-stream")
            for name in headline.by_name:
                line = line_of(rows, name, density)
                axis.plot([p[0] / 1e9 for p in line], [p[1] for p in line], marker="o", markersize=3, label=name)
            what = (
                "flat bandwidth" if cost_us == 0 else f"{cost_us} µs a read, {headline.config['alignment']} B aligned"
            )
            axis.set(xlabel="DRAM held, GB", ylabel="tokens/s", title=what, yscale="log")
            axis.legend(fontsize="x-small")


def main() -> None:
    """The command line."""
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("config", type=Path)
    cli.add_argument("-o", "--out", type=Path, required=True, help="the result, JSON")
    cli.add_argument("--figure", type=Path)
    args = cli.parse_args()
    config = tomli.loads(args.config.read_text(encoding="utf-8"))
    start = time.perf_counter()
    headline = Headline(config)
    worst = config["costs_us"][-2]
    result: dict[str, Any] = {
        "schema": "dipper-headline/1",
        "config": config,
        "workload": "generated",
        "fitted_on": list(headline.workload.generator.fitted_on),
        "floor_dram_bytes": headline.dense[headline.dram[0]].plan.minimum_bytes,
        "summary": summary(headline, 0) + summary(headline, worst),
        "sensitivity": sensitivity(headline),
        "band": {},
    }
    at = config["at_dram"]
    for variant in (None, *headline.workload.generator.fitted_on):
        found = headline if variant is None else Headline(config, variant, only_at=True)
        _, rows = found.speeds(0)
        result["band"][variant or "mean"] = {n: rows[n, config["at_density"], at] for n in headline.by_name}
    result["seconds"] = time.perf_counter() - start
    result["provenance"] = dataclasses.asdict(provenance(headline.bundle.path))
    write_json(args.out, result)
    print_all(headline, result)
    if args.figure is not None:
        draw(headline, args.figure)
    print(json.dumps({key: result[key] for key in ("schema", "workload", "fitted_on", "summary", "seconds")}))


if __name__ == "__main__":
    main()
