"""What compensation brings back of the accuracy that pruning costs: LoRA under masks, and rivals without training.

    python experiments/compensation.py experiments/configs/compensation.toml MODEL --data DATA \\
        -o experiments/results/compensation-MODEL.json [--device cuda] [--only methods:planes] [--state FOLDER]
    python experiments/compensation.py experiments/configs/compensation.toml smollm2.gguf --data DATA -o q.json --quick

MODEL is whatever `load_model` takes, DATA a folder with text/, wikitext-2-raw/ and eval/. Trained on C4, Wikipedia and
a piece of WikiText's train text; judged while training on WikiText valid and windows kept out; scored on WikiText-2
test and the last 200 documents of c4_train_docs_b, which no training sees. One file holds a cell for each measurement;
a run goes on after the cells that it holds. `--state` keeps trained adapters, so that a later run need not train again.

Cells: `dense`; `METHOD@DENSITY` without compensation and `... + lora` with; `train:METHOD` the curves; `dense + lora,
text` the dense model fine-tuned on the same windows by cross-entropy, which is what adaptation to the domain gives (by
KL to itself it gains nothing: the loss is zero from the start); `dip-ca ...` closed-loop against open; `resident ...`
rivals; `tasks ...`.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

import numpy as np
import torch

from dipper.adapter import Adapter
from dipper.distill import DistillConfig, distill, draw_curves
from dipper.errors import ConfigError, DipperError
from dipper.evaluate import cut_windows, read_text, recovered
from dipper.evaluate_torch import Opened, answer_tasks, mlp_bytes, perplexity_torch
from dipper.files import whole_file, write_json
from dipper.methods import MethodConfig
from dipper.sparsify import find_glus, sparsify_
from dipper.split_weights import Splits
from dipper.torch_model import LoadedModel, load_model

SCHEMA = "dipper-compensation/1"
WINDOW = 1024
KEPT_OUT = 200  # documents at the end of c4_train_docs_b
ADAPTER_BITS = 16


def quick(config: dict[str, Any]) -> dict[str, Any]:
    """The same path in minutes on a CPU; the figures mean little."""
    return {
        **config,
        "densities": [0.5], "window": 128, "tokens": 2048, "tokens_with_caches": 1024, "held_out_windows": 2,
        "batch_eval": 1, "methods": [{"name": "dip"}], "search": {"lr": [], "steps": 0},
        "train": {**config["train"], "steps": 8, "batch": 4, "eval_every": 4, "dtype": "fp32"},
        "caches": {**config["caches"], "steps": 2, "batch": 2},
        "residents": {**config["residents"], "calibration_windows": 1},
        "tasks": {**config["tasks"], "limit": 2},
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------ texts


def c4_documents(path: Path) -> list[str]:
    """Texts of the rows."""
    return [json.loads(row)["text"] for row in path.read_text(encoding="utf-8").splitlines() if row.strip()]


def training_texts(data: Path) -> list[str]:
    """Everything that may be trained on."""
    wikipedia = (data / "text/wikipedia_en_sample.txt").read_text(encoding="utf-8")
    return [
        "\n\n".join(c4_documents(data / "text/c4_train_docs_a.jsonl")),
        "\n\n".join(c4_documents(data / "text/c4_train_docs_b.jsonl")[:-KEPT_OUT]),
        re.sub(r"^</?doc.*$", "", wikipedia, flags=re.MULTILINE),
        (data / "wikitext-2-raw/wiki.train.first5k.txt").read_text(encoding="utf-8"),
    ]


class Texts:
    """Token ids of everything, by what it is for.

    Attributes:
        windows: [N, T] to train on, mixed.
        held_out: [M, T] to judge by while training.
        scored: ids by name, to measure.
        shown: [1, 1024] each, for rules that are fitted to text.
    """

    def __init__(self, loaded: LoadedModel, data: Path, config: dict[str, Any], is_quick: bool) -> None:
        def cut(text: str, window: int) -> list[list[int]]:
            return cut_windows(loaded.encode(text), window, bos_id=loaded.bos_id)

        limit = 40_000 if is_quick else None
        n, window = config["held_out_windows"], config["window"]
        pool = [ids for text in training_texts(data) for ids in cut(text[:limit], window)]
        order = np.random.default_rng(0).permutation(len(pool))
        mixed = torch.tensor([pool[i] for i in order])
        valid = read_text(data / "wikitext-2-raw/wiki.valid.raw").text[:limit]
        self.held_out = torch.cat((torch.tensor(cut(valid, window)[:n]), mixed[:n]))
        self.windows = mixed[n:]
        kept_out = "\n\n".join(c4_documents(data / "text/c4_train_docs_b.jsonl")[-KEPT_OUT:])
        test = read_text(data / "wikitext-2-raw/wiki.test.raw").text
        self.scored = {"wikitext": loaded.encode(test[:limit]), "c4": loaded.encode(kept_out[:limit])}
        shown = cut(training_texts(data)[0][: (limit or 0) * 2 or None], WINDOW)[
            : config["residents"]["calibration_windows"]
        ]
        self.shown = [torch.tensor([ids], device=loaded.model.device) for ids in shown]


# ------------------------------------------------------------------------------------------------ measuring


class Bench:
    """One model, its texts, and the file of results."""

    def __init__(self, args: argparse.Namespace, config: dict[str, Any]) -> None:
        self.args, self.config = args, config
        self._states: dict[str, list[torch.Tensor]] = {}  # of adapters trained in this run
        given = Path(args.model) if Path(args.model).exists() else args.model
        self.loaded = load_model(given, device=args.device)
        self.splits = Splits(self.loaded.codes, keep=True)
        self.texts = Texts(self.loaded, args.data, config, args.quick)
        self.mlp_bytes = mlp_bytes(args.model, self.loaded.model)
        self.n_weights = sum(3 * glu.gate.numel() for site in find_glus(self.loaded.model) for glu in site.glus)
        header = {"schema": SCHEMA, "model": self.loaded.name, "fingerprint": self.loaded.fingerprint, "config": config}
        self.content: dict[str, Any] = {**header, "mlp_bytes": self.mlp_bytes, "cells": {}}
        if args.output.exists():
            held = json.loads(args.output.read_text(encoding="utf-8"))
            for name, value in json.loads(json.dumps(header)).items():
                if held.get(name) != value:
                    raise ConfigError(f"{args.output} holds another run: its {name} differs; give another -o")
            self.content = held

    def cell(self, name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """A cell's content, measured unless the file has it."""
        cells: dict[str, Any] = self.content["cells"]
        if name not in cells:
            start = time.perf_counter()
            cells[name] = {**measure(), "cell_s": round(time.perf_counter() - start, 1)}
            cells[name]["device"] = torch.cuda.get_device_name() if self.args.device.startswith("cuda") else "cpu"
            write_json(self.args.output, self.content)
            print(self.line(name), file=sys.stderr, flush=True)
        return cells[name]

    def has(self, *names: str) -> bool:
        """Whether nothing is left to measure of these."""
        return all(name in self.content["cells"] for name in names)

    def line(self, name: str) -> str:
        """A cell in one line."""
        cell = self.content["cells"][name]
        parts = [
            f"{t} {cell[t]['perplexity']:.3f}{_share(cell[t].get('recovered'))}"
            for t in ("wikitext", "c4")
            if t in cell
        ]
        return f"{name}: {', '.join(parts) or ''} ({cell['cell_s']} s)"

    def score(self, method: MethodConfig, adapter: Adapter | None = None, **options: Any) -> dict[str, Any]:
        """Perplexities of both texts under a method, and what it holds beside the model."""
        few = method.capacity is not None
        shown, splits = self.texts.shown, self.splits
        with sparsify_(self.loaded.model, method, calibration=shown, adapter=adapter, splits=splits) as sparse:
            opened = Opened(self.loaded, sparse, source=str(self.args.model), mlp_bytes=self.mlp_bytes)
            cell: dict[str, Any] = {"method": {"name": method.name, "density": method.density}, **options}
            for name, ids in self.texts.scored.items():
                limit = min(self.config["tokens_with_caches" if few else "tokens"], len(ids))
                result = perplexity_torch(
                    opened, ids, window=WINDOW, bos_id=self.loaded.bos_id, limit=limit, batch=self.config["batch_eval"]
                )
                cell[name] = {
                    "perplexity": result.perplexity, "stderr": result.stderr, "n_tokens": result.n_tokens,
                    "touched": result.touched, "window_nll": result.window_nll, "window_tokens": result.window_tokens,
                    "tokens_sha256": result.tokens_sha256, "hit_rate": result.traffic.hit_rate,
                }  # fmt: skip
            return {**cell, "extra_bytes": sparse.extra_dram_bits / 8}

    def compensated(self, cell: dict[str, Any], sparse: dict[str, Any]) -> dict[str, Any]:
        """The cell with the share of the loss that it brings back, on the windows that all three scored."""
        dense = self.content["cells"]["dense"]
        for text in ("wikitext", "c4"):
            n = min(len(c[text]["window_nll"]) for c in (dense, sparse, cell))
            nll = [c[text]["window_nll"][:n] for c in (dense, sparse, cell)]
            cell[text] |= recovered(*nll, cell[text]["window_tokens"][:n])
        return cell

    # -- training

    @contextmanager
    def trained(self, name: str, method: MethodConfig, start: str | None = None, **changes: Any) -> Iterator[Adapter]:
        """An adapter, trained or out of `--state`, for as long as the block lasts."""
        train = {**self.config["train"], "lr": self.lr(), "seed": 0, **changes}
        held = None if self.args.state is None else self.args.state / f"{self.args.output.stem}-{name}.pt"
        adapter = Adapter.attach(self.loaded.model, rank=train["rank"])
        try:
            if start is not None:
                adapter.take_state(self._held(start))
            if name in self._states:
                adapter.take_state(self._states[name])
            elif held is not None and held.exists():
                adapter.take_state([m.float() for m in torch.load(held, weights_only=True)])
            else:
                result = distill(
                    self.loaded, self.texts.windows, self.texts.held_out,
                    DistillConfig(method=method, **train), adapter=adapter, progress=_say, splits=self.splits,
                )  # fmt: skip
                self.content["cells"].pop(f"train:{name}", None)
                self.cell(f"train:{name}", lambda: {"train": train, "curve": result.as_dict(), "best": result.best})
                if held is not None:
                    with whole_file(held) as file:
                        torch.save([m.half() for m in adapter.state()], file)
            self._states[name] = adapter.state()
            yield adapter
        finally:
            adapter.detach()

    def _held(self, name: str) -> list[torch.Tensor]:
        """The state of an adapter that was trained before, in this run or another."""
        if name not in self._states:
            with self.trained(name, **self.training_of(name)):
                pass
        return self._states[name]

    def options_of(self, listed: dict[str, Any]) -> tuple[str, dict[str, Any], list[float]]:
        """Name, options and densities of a method of the configuration."""
        options = {k: tuple(v) if isinstance(v, list) else v for k, v in listed.items() if k != "densities"}
        return listed["name"], options, listed.get("densities", self.config["densities"])

    def training_of(self, name: str) -> dict[str, Any]:
        """How a method of the configuration is trained: at densities drawn between the least and the greatest."""
        _, options, densities = self.options_of(next(m for m in self.config["methods"] if m["name"] == name))
        densities = sorted(densities)
        moving = {} if len(densities) == 1 else {"densities": (densities[0], densities[-1])}
        return {"method": MethodConfig(**options, density=densities[0]), **moving}

    def lr(self) -> float:
        """The configuration's, or the best of its search on dip."""
        search = self.config["search"]
        if not search["lr"]:
            return float(self.config["train"]["lr"])

        def measure() -> dict[str, Any]:
            losses = {}
            for lr in search["lr"]:
                train = {**self.config["train"], "lr": lr, "steps": search["steps"], "eval_every": search["steps"]}
                config = DistillConfig(method=MethodConfig("dip", density=min(self.config["densities"])), **train)
                result = distill(self.loaded, self.texts.windows, self.texts.held_out, config)
                result.adapter.detach()
                losses[str(lr)] = result.held_out[-1]["loss"]
            return {"losses": losses, "best": float(min(losses, key=lambda lr: losses[lr]))}

        return float(self.cell("learning rate", measure)["best"])

    # -- groups of cells

    def methods(self) -> None:
        """Every method, or those of `--only methods:NAME`, without and with its adapter."""
        named = [part[len("methods:") :] for part in self.args.only or [] if part.startswith("methods:")]
        for listed in self.config["methods"]:
            name, options, densities = self.options_of(listed)
            if named and name not in named:
                continue
            at = {d: MethodConfig(**options, density=d) for d in densities}
            for density, method in at.items():
                self.cell(f"{name}@{density}", lambda m=method: self.score(m))
            if self.has(*(f"{name}@{d} + lora" for d in densities)):
                continue
            with self.trained(name, **self.training_of(name)) as adapter:
                for density, method in at.items():
                    sparse = self.content["cells"][f"{name}@{density}"]
                    self.cell(
                        f"{name}@{density} + lora",
                        lambda m=method, s=sparse: self.compensated(self.score(m, adapter), s),
                    )

    def own_gain(self) -> None:
        """The dense model fine-tuned on the same windows by cross-entropy; by KL to itself there is nothing to gain."""
        if not self.has("dense + lora, text"):
            with self.trained("dense-text", MethodConfig("dense"), target="text") as adapter:
                self.cell("dense + lora, text", lambda: self.score(MethodConfig("dense"), adapter))

    def caches(self) -> None:
        """DIP-CA with dip's adapter, and that trained on in the closed loop or, for as many steps, as dip."""
        part = self.config["caches"]
        method = MethodConfig(**part["options"], density=part["density"])
        sparse = self.cell(f"dip-ca@{part['density']}", lambda: self.score(method))
        names = [f"dip-ca@{part['density']} + lora of {what}" for what in ("dip", "dip, more steps", "the closed loop")]
        if self.has(*names):
            return
        as_dip = MethodConfig("dip", density=part["density"])
        more = {"start": "dip", "steps": part["steps"], "batch": part["batch"], "lr": self.lr() / 3}
        with self.trained("dip", **self.training_of("dip")) as adapter:
            self.cell(names[0], lambda: self.compensated(self.score(method, adapter), sparse))
        for name, key, trained_as in ((names[1], "dip-more", as_dip), (names[2], "dip-ca", method)):
            if not self.has(name):
                with self.trained(key, trained_as, **more) as adapter:
                    self.cell(name, lambda a=adapter: self.compensated(self.score(method, a), sparse))

    def residents(self) -> None:
        """Rivals that touch and hold the same bytes: what they hold beside the model is taken off the columns."""
        density, rank = self.config["residents"]["density"], self.config["train"]["rank"]
        bits = 8 * self.mlp_bytes / self.n_weights  # of a weight of the model
        glus = [glu for site in find_glus(self.loaded.model) for glu in site.glus]
        d, i = glus[0].hidden_size, glus[0].intermediate_size

        def less(n_numbers: float) -> float:
            return density - n_numbers * ADAPTER_BITS / (3 * d * i * bits)

        mean = MethodConfig("dip", density=less(2 * d + 3 * i), compensate=True)
        rescale = MethodConfig("dip-rescale", density=less(2 * i + d))
        sparse = self.cell("resident: none", lambda: self.score(MethodConfig("dip", density=density)))
        rivals = [("mean", mean, 2 * d + 3 * i), ("rescale", rescale, 0)]
        for r in self.config["residents"]["ranks"]:
            n = r * (2 * d + 3 * i)  # dip-lowrank's density counts them as weights of the model
            factors = MethodConfig("dip-lowrank", density=less(n) + n / (3 * d * i), rank=r / d)
            rivals.append((f"low rank {r}", factors, 0))
        for name, method, held in rivals:
            self.cell(
                f"resident: {name}",
                lambda m=method, h=held: self.compensated(
                    self.score(m, held_beside_bytes=h * len(glus) * ADAPTER_BITS / 8), sparse
                ),
            )
        names = ("resident: lora, merged", "resident: lora, apart")
        if not self.has(*names):
            with self.trained("dip", **self.training_of("dip")) as adapter:
                for name, d_all in zip(names, (density, less(3 * rank * (d + i))), strict=True):
                    method, beside = MethodConfig("dip", density=d_all), adapter.n_bytes if "apart" in name else 0
                    self.cell(
                        name,
                        lambda m=method, b=beside: self.compensated(
                            self.score(m, adapter, held_beside_bytes=b), sparse
                        ),
                    )

    def tasks(self) -> None:
        """Right answers of the dense model, under dip, and with its adapter."""
        part = self.config["tasks"]
        dip = MethodConfig("dip", density=part["density"])

        def answer(method: MethodConfig, adapter: Adapter | None = None) -> dict[str, Any]:
            with sparsify_(self.loaded.model, method, adapter=adapter) as sparse:
                opened = Opened(self.loaded, sparse, source=str(self.args.model), mlp_bytes=self.mlp_bytes)
                result = answer_tasks(
                    opened, part["names"], self.args.data / "eval", batch=4 * self.config["batch_eval"],
                    limit=part["limit"], seed=0,
                )  # fmt: skip
            return {"tasks": result["tasks"]}

        self.cell("tasks: dense", lambda: answer(MethodConfig("dense")))
        self.cell(f"tasks: dip@{dip.density}", lambda: answer(dip))
        name = f"tasks: dip@{dip.density} + lora"
        if not self.has(name):
            with self.trained("dip", **self.training_of("dip")) as adapter:
                self.cell(name, lambda: answer(dip, adapter))

    def run(self) -> None:
        """All groups, or those asked for."""
        self.cell("dense", lambda: self.score(MethodConfig("dense")))
        for name in ("methods", "own_gain", "residents", "tasks", "caches"):
            if not self.args.only or any(part.split(":")[0] == name for part in self.args.only):
                getattr(self, name)()
        curves = {n[6:]: c["curve"] for n, c in self.content["cells"].items() if n.startswith("train:")}
        if self.args.figure is not None and curves:
            draw_curves(curves, self.args.figure)


def _share(value: float | None) -> str:
    return "" if value is None else f" ({value:.0%})"


def _say(done: int, total: int, loss: float) -> None:
    if done % 50 == 0 or done == total:
        print(f"  step {done}/{total}, loss {loss:.4f}", file=sys.stderr, flush=True)


def main() -> None:
    """Parses, runs, says what is wrong in one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--state", type=Path, help="folder that keeps trained adapters")
    parser.add_argument("--figure", type=Path, help="curves, as .svg, .png or .pdf")
    parser.add_argument(
        "--only",
        action="append",
        help="methods, methods:NAME, own_gain, residents, tasks or caches; may be repeated",
    )
    parser.add_argument("--steps", type=int, help="other than the configuration says")
    parser.add_argument("--quick", action="store_true", help="few tokens and steps: whether it works")
    args = parser.parse_args()
    torch.set_float32_matmul_precision("high")  # TF32 where there is some, the same for all that is compared
    try:
        config = tomllib.loads(args.config.read_text(encoding="utf-8"))
        config = quick(config) if args.quick else config
        if args.steps:
            config["train"]["steps"] = args.steps
        if args.state is not None:
            args.state.mkdir(parents=True, exist_ok=True)
        args.output.parent.mkdir(parents=True, exist_ok=True)
        Bench(args, config).run()
    except DipperError as error:
        sys.exit(f"compensation: {error}")


if __name__ == "__main__":
    main()
