"""Results of all ten experiments as `dipper reproduce` would keep them, made up by formulas; nothing is measured."""

import dataclasses
import math
from pathlib import Path

from dipper.checksums import code_sha256
from dipper.experiment import Experiment, results_path
from dipper.files import write_json
from dipper.records import EvalRecord, SimRecord

WEIGHT = {"glu-oracle": 0.1, "teal": 0.8, "dip": 1.0, "dip-ca": 1.6, "gate": 5.0, "up": 4.0, "planes": 0.5}
CONFIGS = {
    "density": """
title = "Density against perplexity"
published = "Figure 3"
caption = "Real weights, real text."
models = ["small", "other"]
view = "density"
[[cells]]
kind = "perplexity"
method = { name = "dense" }
[[cells]]
kind = "perplexity"
[cells.each]
method = [{ name = "dip" }, { name = "gate" }, { name = "dip-ca", capacity = 0.5, gamma = 0.5 }]
density = [0.8, 0.7, 0.5]
[[cells]]
kind = "perplexity"
method = { name = "dip" }
[cells.each]
fit = [0.7, 0.5]
[[cells]]
kind = "tasks"
method = { name = "dense" }
tasks = ["arc_easy", "piqa"]
limit = 10
[[cells]]
kind = "tasks"
tasks = ["arc_easy", "piqa"]
limit = 10
[cells.each]
method = [{ name = "dip" }, { name = "gate" }]
density = [0.7, 0.5]
""",
    "headline": """
title = "Memory and throughput"
published = "the abstract"
caption = "Simulated."
models = ["small", "phi-3-medium"]
[[cells]]
kind = "simulate"
device = "paper-phone"
n_prompt = 1
n_tokens = 1
methods = ["dense-stream", "dip", "dip-ca"]
densities = [0.8, 0.5]
dram = ["60%", "80%"]
""",
    "dram": """
title = "Throughput by DRAM"
models = ["small"]
[[cells]]
kind = "simulate"
device = "paper-phone"
n_prompt = 1
n_tokens = 1
methods = ["dense-stream", "dip", "dip-ca"]
densities = [0.5]
dram = ["50%", "60%", "80%"]
""",
    "bandwidth": """
title = "Throughput by flash bandwidth"
models = ["small"]
[[cells]]
kind = "simulate"
device = "paper-phone"
n_prompt = 1
n_tokens = 1
methods = ["dense-stream", "dip"]
densities = [0.5]
dram = ["60%"]
[cells.each]
flash_gbps = [0.5, 1.0, 4.0]
""",
    "caches": """
title = "Policies"
models = ["small"]
[[cells]]
kind = "simulate"
device = "paper-phone"
n_prompt = 1
n_tokens = 1
methods = ["dip"]
densities = [0.5]
caches = ["lru", "lfu", "belady"]
capacity = [0.25, 0.5]
""",
    "cache-aware": """
title = "Gamma and density"
models = ["small"]
view = "cache_aware"
[[cells]]
kind = "perplexity"
method = { name = "dense" }
[[cells]]
kind = "perplexity"
[cells.each]
method = [{ name = "dip", capacity = 0.5 }, { name = "dip-ca", capacity = 0.5, gamma = 0.5 }]
density = [0.7, 0.5]
[[cells]]
kind = "simulate"
device = "paper-phone"
n_prompt = 1
n_tokens = 1
methods = ["dip", "dip-ca"]
densities = [0.7, 0.5]
capacity = [0.5]
""",
    "compensation": """
title = "With and without LoRA"
models = ["small"]
[[cells]]
kind = "compensation"
group = "untrained"
densities = [0.5]
window = 1024
tokens = 1024
tokens_with_caches = 1024
held_out_windows = 1
batch_eval = 1
methods = []
caches = []
residents = []
[cells.train]
[cells.search]
[cells.tasks]
""",
    "split": """
title = "Split of a density: a < b"
models = ["small"]
[[cells]]
kind = "perplexity"
method = { name = "dense" }
[[cells]]
kind = "perplexity"
method = { name = "dip" }
[cells.each]
density = [0.6, 0.5]
above = [-0.1, 0.0, 0.1]
""",
    "thresholds": """
title = "Ranks and thresholds"
models = ["small"]
[[cells]]
kind = "perplexity"
method = { name = "dense" }
[[cells]]
kind = "perplexity"
[cells.each]
method = [{ name = "dip", select = "topk" }, { name = "dip", select = "threshold" }]
density = [0.7, 0.5]
""",
    "beyond": """
title = "Beyond the paper"
caption = "Reads are not `free`."
models = ["small"]
[[cells]]
kind = "perplexity"
method = { name = "dense" }
[[cells]]
kind = "perplexity"
[cells.each]
method = [{ name = "dip" }, { name = "planes", base_bits = [2, 2] }]
density = [0.8, 0.6]
[[cells]]
kind = "perplexity"
[cells.each]
method = [
  { name = "planes", base_bits = [2, 3], unit_bytes = 4096, fetch = 0.8 },
  { name = "planes", base_bits = [2, 3], unit_bytes = 4096, fetch = 0.6 },
  { name = "planes", base_bits = [2, 3], unit_bytes = 4096, fetch = 0.6, read_cost = 4096 },
]
[[cells]]
kind = "simulate"
device = "paper-phone"
n_prompt = 1
n_tokens = 1
methods = ["dense-stream", "dip"]
densities = [0.5]
dram = ["60%"]
[cells.each]
cost_per_read_us = [0, 8]
[[cells]]
kind = "benchmark"
script = "bench_planes"
[cells.each]
arguments = [["--held"], ["--held", "--mlp-dram", "3.6b"], ["--mlp-dram", "3.6b", "--mlp-dram", "2.7b"]]
[[cells]]
kind = "benchmark"
script = "bench_simulator"
""",
}
RUN = {"dipper": "0.1.0", "commit": "0123456789abcdef", "dirty": False, "python": "3.11.7", "torch": "2.4.0",
       "cpu": "A CPU", "gpu": None, "time": "2026-01-02T03:04:05+00:00"}  # fmt: skip


def write_samples(folder: Path, *, without: int = 0, stale: bool = False) -> Path:
    """Configurations and results: without the last cells of a file if it has more, the first perhaps stale."""
    (folder / "configs").mkdir(parents=True)
    (folder / "results").mkdir()
    for name, config in CONFIGS.items():
        path = folder / "configs" / f"{name}.toml"
        path.write_text(config, encoding="utf-8")
        experiment = Experiment.load(path)
        for model in (m for m in experiment.models if m != "other"):
            write_results(folder, experiment, model, without, stale)
    return folder


def write_results(folder, experiment, model, without, stale):
    cells = experiment.cells(model)
    content = {
        "schema": "dipper-experiment/1",
        "experiment": experiment.name,
        "model": {"name": model, "sha256": None if model.startswith("phi") else "ab" * 32, "title": f"Model {model}"},
        "data": {} if model.startswith("phi") else {"wiki.test.raw": "cd" * 32},
        "runs": [RUN],
        "cells": [
            {
                "kind": cell.kind, "options": cell.options, "result": RESULTS[cell.kind](cell.options, model),
                "seconds": 1.5, "run": 0, "code": code_sha256(cell.sources),
            }
            for cell in cells[: max(1, len(cells) - without)]
        ],
    }  # fmt: skip
    if stale:
        content["cells"][0]["code"] = "0" * 64
    write_json(results_path(folder, experiment.name, model), content)


# ------------------------------------------------------------------------------------------------ a result a kind


def perplexity(options, model):
    method = options["method"]
    density = options.get("density", options.get("fit"))
    above = options.get("above", 0.0)
    share = method.get("fetch", density)
    loss = 0.0 if share is None else WEIGHT[method["name"]] * 0.5 * (1 - share) ** 2 * (1 + 4 * above**2)
    loss *= 0.7 if "fit" in options or method.get("select") == "threshold" else 1.0
    nll = [300.0 + 10 * i + (99 + i % 2 * 2) * math.log1p(loss) for i in range(4)]
    record = EvalRecord(
        perplexity=math.exp(sum(nll) / 400), stderr=0.5, ci95=None, nll_per_token=sum(nll) / 400, nll_stderr=0.1,
        n_tokens=400, n_windows=4, window=101, bos_id=None, tokens_sha256="ef" * 32, text="wiki.test.raw",
        text_sha256="cd" * 32, rows_joined=True, engine="torch", model=model, device="cpu", dtype="fp32",
        method=method["name"], density=density, d_in=None if density is None else density + above,
        d_glu=None if density is None else density - 2 * above, gamma=method.get("gamma"), cache=None,
        hit_rate=0.6 if "capacity" in method else None, touched=1.0 if share is None else share,
        mlp_bytes=1000, mlp_bytes_per_token=1000.0, kl=loss, kl_stderr=0.01, same_top1=0.9, same_top1_stderr=0.01,
        seconds=1.0, peak_rss_bytes=1, n_threads=1, window_nll=nll, window_tokens=[100] * 4,
    )  # fmt: skip
    return record.as_dict()


def tasks(options, model):
    density = options.get("density", 1.0)
    weight = WEIGHT.get(options["method"]["name"], 0.0)
    acc = 0.6 - 0.2 * weight * (1 - density) ** 2
    return {"tasks": {name: {"n": 10, "acc": acc, "acc_stderr": 0.02} for name in options["tasks"]}}


def simulate(options, model):
    large = 100 if model.startswith("phi") else 1
    records = []
    budgets = options.get("dram", [None])
    shares = options.get("capacity", [None])
    for method in options["methods"]:
        prunes = method.startswith("dip")
        for density in options.get("densities") if prunes else (None,):
            for cache in options.get("caches", ["lfu"]) if prunes else (None,):
                for budget in budgets:
                    for share in shares:
                        records.append(_record(options, large, model, method, density, cache, budget, share))
    return {"records": records, "skipped": []}


def _record(options, large, model, method, density, cache, budget, share):
    fraction = share if share is not None else float(budget.rstrip("%")) / 100
    bonus = {"lru": 0.0, "lfu": 0.05, "belady": 0.2, None: 0.0}[cache] + (0.1 if method == "dip-ca" else 0.0)
    hits = None if density is None else min(1.0, 0.8 * fraction + bonus)
    n_bytes = 1e6 * large * ((1 - fraction) if density is None else density * (1 - hits) + 0.01)
    seconds = n_bytes / 1e9 / options.get("flash_gbps", 1.0)
    seconds += (0 if density is None else 1e-3 * large) * options.get("cost_per_read_us", 0.0)
    record = SimRecord(
        model=model, device="paper-phone", method=method, density=density, d_in=density, d_glu=density,
        gamma=None if density is None else 0.5 if method == "dip-ca" else 1.0, cache=cache, split="uniform",
        tok_per_s=1 / seconds, tok_per_s_flat=1 / seconds, ttft_s=1.0, hit_rate=hits, flash_bytes_per_token=n_bytes,
        reads_per_token=10.0, dram_bytes={"resident": 10**6 * large, "slots": int(fraction * 10**7 * large)},
        dram_budget_bytes=None if budget is None else int(fraction * 10**7 * large), mlp_bits_per_weight=4 * fraction,
        cached_fraction=fraction, joules_per_token=None, ledger_s={"wait": seconds}, io_s=seconds, products_s=0.0,
        sustained_s=0.0, n_prompt=1, n_tokens=1,
        workload={"kind": "generated" if large > 1 else "live"} if density else {"kind": "dense"},
    )  # fmt: skip
    return dataclasses.asdict(record)


def compensation(options, model):
    def cell(name, density, perplexity, back=None, *, n=4, first=None, **more):
        """Scored on n windows of 100 tokens; first: perplexity of the first two of them."""
        nll = 100 * math.log(perplexity)
        early = nll if first is None else 100 * math.log(first)
        found = {
            "perplexity": perplexity, "stderr": 0.5, "recovered": back, "recovered_stderr": 0.01 if back else None,
            "n_tokens": 100 * n, "window_nll": [early, early, 2 * nll - early, 2 * nll - early][:n],
            "window_tokens": [100] * n,
        }  # fmt: skip
        method = {"name": name, "density": density}
        return {"method": method, "wikitext": found, "c4": found, "extra_bytes": 0.0, **more}

    right = {"tasks": {"arc_easy": {"n": 10, "acc": 0.5, "acc_stderr": 0.1}}}
    return {
        "cells": {
            "dense": cell("dense", 1.0, 20.0, first=18.0),
            "dip@0.5": cell("dip", 0.5, 30.0, first=27.0),
            "dip@0.5 + lora": cell("dip", 0.5, 24.0, 0.6),
            "gate@0.5 + lora": cell("gate", 0.5, 26.4, 0.5),
            "planes@0.65 + lora": cell("planes", 0.65, 22.0, 0.6),
            "dip-ca@0.5": cell("dip-ca", 0.5, 33.0, n=2),
            "dip-ca@0.5 + lora of dip, more steps": cell("dip-ca", 0.5, 30.0, 0.2, n=2),
            "dip-ca@0.5 + lora of the closed loop": cell("dip-ca", 0.5, 27.0, 0.3, n=2),
            "resident: rescale": cell("dip-rescale", 0.5, 29.0, 0.1, extra_bytes=2e5),
            "resident: lora, apart": cell("dip", 0.4, 35.0, -0.5, held_beside_bytes=3_000_000),
            "train:dip": {"best": {"step": 1, "loss": 0.1}},
            "tasks: dense": right,
        }
    }


# Budget, fetch, fetch of GLU units, throughput over dense streaming and loss: a held disk, and as it is.
PLANES = {
    "--held": [("3.6b", 0.2, 0.2, 2.5, 0.013), ("3.6b", 0.4, 0.2, 1.4, 0.008), ("2.7b", 0.4, 0.2, 1.5, 0.02)],
    "--held --mlp-dram 3.6b": [("3.6b", 0.6, 0.2, 1.2, 0.005)],
    "--mlp-dram 3.6b --mlp-dram 2.7b": [("3.6b", 0.2, 0.2, 1.1, None), ("2.7b", 0.5, 0.2, 1.3, None)],
}


def benchmark(options, model):
    if options["script"] == "bench_planes":
        runs = PLANES[" ".join(options["arguments"])]
        rows = [
            {"model": "small", "budget": budget, "method": "planes", "fetch": fetch, "fetch_glu": fetch_glu,
             "token_ms": 10.0 / r, "r": r, **({"relative": loss, "relative_stderr": 0.003} if loss else {})}
            for budget, fetch, fetch_glu, r, loss in runs
        ]  # fmt: skip
        dense = {"model": "small", "budget": "3.6b", "method": "dense-stream", "token_ms": 10.0, "r": 1.0}
        return {"benchmark": "planes", "results": [dense, *rows], "ppl_tokens": 8192 if runs[0][-1] else None}
    rows = [{"method": "dip", "predicted": 9.0, "measured": 10.0, "ok": True}]
    return {"benchmark": "simulator", "results": rows}


RESULTS = {
    "perplexity": perplexity, "tasks": tasks, "simulate": simulate, "compensation": compensation,
    "benchmark": benchmark,
}  # fmt: skip
