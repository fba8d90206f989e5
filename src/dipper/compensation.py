"""What compensation brings back of the accuracy that pruning costs: LoRA under masks, and rivals without training.

    bench = Bench(loaded, data, config, source="smollm2.gguf", device="cuda")
    bench.group("methods:dip")       # {"dip@0.5": {...}, "dip@0.5 + lora": {...}, "train:dip": {...}, ...}

Trained on C4, Wikipedia and a piece of WikiText's train text; judged while training on WikiText valid and windows kept
out; scored on WikiText-2 test and the last 200 documents of c4_train_docs_b, which no training sees.

Cells: `dense`; `METHOD@DENSITY` without compensation and `... + lora` with; `train:METHOD` the curves; `dense + lora,
text` the dense model fine-tuned on the same windows by cross-entropy, which is what adaptation to the domain gives (by
KL to itself it gains nothing: the loss is zero from the start); `dip-ca ...` closed-loop against open; `resident ...`
rivals; `tasks ...`. A group is the cells that are measured together. Needs the `train` extra.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dipper.adapter import Adapter
from dipper.distill import DistillConfig, distill
from dipper.errors import ConfigError
from dipper.evaluate import cut_windows, read_text, recovered, texts_of_rows
from dipper.evaluate_torch import Opened, answer_tasks, mlp_bytes, perplexity_torch
from dipper.files import locked, whole_file, write_json
from dipper.methods import MethodConfig
from dipper.sparsify import find_glus, sparsify_
from dipper.split_weights import Splits
from dipper.torch_model import LoadedModel

__all__ = ["Bench", "group_of"]

WINDOW = 1024
KEPT_OUT = 200  # documents at the end of c4_train_docs_b
ADAPTER_BITS = 16


def group_of(cell: str) -> str:
    """The group that a cell is of: dense, methods:NAME, own_gain, residents, tasks or caches."""
    if cell in ("dense + lora, text", "train:dense-text"):
        return "own_gain"
    if cell.startswith("dip-ca@") or cell in ("train:dip-more", "train:dip-ca"):
        return "caches"
    for start, group in (("resident: ", "residents"), ("tasks: ", "tasks")):
        if cell.startswith(start):
            return group
    if cell == "dense":
        return cell
    return "methods:dip" if cell == "learning rate" else "methods:" + cell.removeprefix("train:").partition("@")[0]


# ------------------------------------------------------------------------------------------------ texts


def training_texts(data: Path) -> list[str]:
    """Everything that may be trained on."""
    wikipedia = (data / "text/wikipedia_en_sample.txt").read_text(encoding="utf-8")
    return [
        "\n\n".join(texts_of_rows(data / "text/c4_train_docs_a.jsonl")),
        "\n\n".join(texts_of_rows(data / "text/c4_train_docs_b.jsonl")[:-KEPT_OUT]),
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

    def __init__(self, loaded: LoadedModel, data: Path, config: Mapping[str, Any]) -> None:
        def cut(text: str, window: int) -> list[list[int]]:
            return cut_windows(loaded.encode(text), window, bos_id=loaded.bos_id)

        n, window = config["held_out_windows"], config["window"]
        pool = [ids for text in training_texts(data) for ids in cut(text, window)]
        order = np.random.default_rng(0).permutation(len(pool))
        mixed = torch.tensor([pool[i] for i in order])
        valid = read_text(data / "wikitext-2-raw/wiki.valid.raw").text
        self.held_out = torch.cat((torch.tensor(cut(valid, window)[:n]), mixed[:n]))
        self.windows = mixed[n:]
        kept_out = "\n\n".join(texts_of_rows(data / "text/c4_train_docs_b.jsonl")[-KEPT_OUT:])
        test = read_text(data / "wikitext-2-raw/wiki.test.raw").text
        self.scored = {"wikitext": loaded.encode(test), "c4": loaded.encode(kept_out)}
        shown = cut(training_texts(data)[0], WINDOW)[: config["residents"]["calibration_windows"]]
        self.shown = [torch.tensor([ids], device=loaded.model.device) for ids in shown]


# ------------------------------------------------------------------------------------------------ measuring


class Bench:
    """One model, its texts, and the cells that were measured.

    Args:
        loaded: the model, dense.
        data: folder of `kinds.compensated.FILES`, and of eval/ for tasks.
        config: the options of a cell of kind compensation but its group; see experiments/configs/compensation.toml.
        source: path of the model, for records.
        state: folder that keeps trained adapters, so that a later process need not train again.
        progress: told what was measured.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        data: Path,
        config: Mapping[str, Any],
        *,
        source: str,
        state: Path | None = None,
        progress: Callable[[str], None] = lambda told: None,
    ) -> None:
        self.loaded, self.data, self.config, self.source, self.state = loaded, data, config, source, state
        self.cells: dict[str, dict[str, Any]] = {}
        self._progress = progress
        self._states: dict[str, list[torch.Tensor]] = {}  # of adapters trained in this run
        self.splits = Splits(loaded.codes, keep=True)
        self.texts = Texts(loaded, data, config)
        self.mlp_bytes = mlp_bytes(source, loaded.model)
        self.n_weights = sum(3 * glu.gate.numel() for site in find_glus(loaded.model) for glu in site.glus)

    def cell(self, name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """A cell's content, measured once."""
        if name not in self.cells:
            self.cells[name] = measure()
            self._progress(self.line(name))
        return self.cells[name]

    def has(self, *names: str) -> bool:
        """Whether nothing is left to measure of these."""
        return all(name in self.cells for name in names)

    def line(self, name: str) -> str:
        """A cell in one line."""
        cell = self.cells[name]
        parts = [
            f"{t} {cell[t]['perplexity']:.3f}{_share(cell[t].get('recovered'))}"
            for t in ("wikitext", "c4")
            if t in cell
        ]
        return f"{name}: {', '.join(parts) or 'done'}"

    def score(self, method: MethodConfig, adapter: Adapter | None = None, **options: Any) -> dict[str, Any]:
        """Perplexities of both texts under a method, and what it holds beside the model."""
        few = method.capacity is not None
        shown, splits = self.texts.shown, self.splits
        with sparsify_(self.loaded.model, method, calibration=shown, adapter=adapter, splits=splits) as sparse:
            opened = Opened(self.loaded, sparse, source=self.source, mlp_bytes=self.mlp_bytes)
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

    def compensated(
        self, sparse: dict[str, Any], method: MethodConfig, adapter: Adapter | None = None, **options: Any
    ) -> dict[str, Any]:
        """A method's score, with the share of its loss without compensation, `sparse`, that it brings back."""
        cell = self.score(method, adapter, **options)
        dense = self.cells["dense"]
        for text in ("wikitext", "c4"):
            n = min(len(c[text]["window_nll"]) for c in (dense, sparse, cell))
            first, second, third = (c[text]["window_nll"][:n] for c in (dense, sparse, cell))
            cell[text] |= recovered(first, second, third, cell[text]["window_tokens"][:n])
        return cell

    # -- training

    @contextmanager
    def trained(self, name: str, method: MethodConfig, start: str | None = None, **changes: Any) -> Iterator[Adapter]:
        """An adapter, trained or out of `state`, for as long as the block lasts."""
        train = {**self.config["train"], "lr": self.lr(), "seed": 0, **changes}
        adapter = Adapter.attach(self.loaded.model, rank=train["rank"])
        try:
            if start is not None:
                adapter.take_state(self._held(start))
            if name in self._states:
                adapter.take_state(self._states[name])
            else:
                with self._alone(name):
                    self._take_or_train(name, adapter, method, train)
            self._states[name] = adapter.state()
            yield adapter
        finally:
            adapter.detach()

    def _alone(self, name: str) -> AbstractContextManager[None]:
        """Processes that share a state folder train one thing once: the others wait for it."""
        return nullcontext() if self.state is None else locked(self.state / f"{name}.lock")

    def _take_or_train(self, name: str, adapter: Adapter, method: MethodConfig, train: dict[str, Any]) -> None:
        held = None if self.state is None else self.state / f"{name}.pt"
        if held is not None and held.exists():
            kept = torch.load(held, weights_only=True)
            adapter.take_state(kept["state"])
            self.cell(f"train:{name}", lambda: dict(kept["cell"]))
            return
        result = distill(
            self.loaded, self.texts.windows, self.texts.held_out,
            DistillConfig(method=method, **train), adapter=adapter, progress=self._say, splits=self.splits,
        )  # fmt: skip
        curve = {"train": train, "curve": result.as_dict(), "best": result.best}
        cell = self.cell(f"train:{name}", lambda: curve)
        if held is not None:
            with whole_file(held) as file:
                torch.save({"state": [m.cpu() for m in adapter.state()], "cell": cell}, file)

    def _held(self, name: str) -> list[torch.Tensor]:
        """The state of an adapter that was trained before, in this run or another."""
        if name not in self._states:
            with self.trained(name, **self.training_of(name)):
                pass
        return self._states[name]

    def _listed(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] | None = next((m for m in self.config["methods"] if m["name"] == name), None)
        if found is None:
            known = ", ".join(m["name"] for m in self.config["methods"])
            raise ConfigError(f"'{name}' is none of the methods that are trained: {known}")
        return found

    def options_of(self, listed: dict[str, Any]) -> tuple[str, dict[str, Any], list[float]]:
        """Name, options and densities of a method of the configuration."""
        options = {k: tuple(v) if isinstance(v, list) else v for k, v in listed.items() if k != "densities"}
        return listed["name"], options, listed.get("densities", self.config["densities"])

    def training_of(self, name: str) -> dict[str, Any]:
        """How a method of the configuration is trained: at densities drawn between the least and the greatest."""
        _, options, densities = self.options_of(self._listed(name))
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

        held = None if self.state is None else self.state / "learning-rate.json"
        with self._alone("learning-rate"):
            if held is not None and held.exists():
                kept = json.loads(held.read_text(encoding="utf-8"))
                return float(self.cell("learning rate", lambda: dict(kept))["best"])
            cell = self.cell("learning rate", measure)
            if held is not None:
                write_json(held, cell)
        return float(cell["best"])

    # -- groups of cells

    def method(self, name: str) -> None:
        """A method of the configuration without and with its adapter."""
        _, options, densities = self.options_of(self._listed(name))
        at = {d: MethodConfig(**options, density=d) for d in densities}
        for density, method in at.items():
            self.cell(f"{name}@{density}", partial(self.score, method))
        if self.has(*(f"{name}@{d} + lora" for d in densities)):
            return
        with self.trained(name, **self.training_of(name)) as adapter:
            for density, method in at.items():
                sparse = self.cells[f"{name}@{density}"]
                self.cell(f"{name}@{density} + lora", partial(self.compensated, sparse, method, adapter))

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
            self.cell(names[0], partial(self.compensated, sparse, method, adapter))
        for name, key, trained_as in ((names[1], "dip-more", as_dip), (names[2], "dip-ca", method)):
            if not self.has(name):
                with self.trained(key, trained_as, **more) as adapter:
                    self.cell(name, partial(self.compensated, sparse, method, adapter))

    def residents(self) -> None:
        """Rivals that touch and hold the same bytes: what they hold beside the model is taken off the columns."""
        density, rank = self.config["residents"]["density"], self.config["train"]["rank"]
        bits = 8 * self.mlp_bytes / self.n_weights  # of a weight of the model
        glus = [glu for site in find_glus(self.loaded.model) for glu in site.glus]
        d, i = glus[0].hidden_size, glus[0].intermediate_size

        def less(n_numbers: float) -> float:
            return float(density - n_numbers * ADAPTER_BITS / (3 * d * i * bits))

        mean = MethodConfig("dip", density=less(2 * d + 3 * i), compensate=True)
        rescale = MethodConfig("dip-rescale", density=less(2 * i + d))
        sparse = self.cell("resident: none", lambda: self.score(MethodConfig("dip", density=density)))
        rivals = [("mean", mean, 2 * d + 3 * i), ("rescale", rescale, 0)]
        for r in self.config["residents"]["ranks"]:
            n = r * (2 * d + 3 * i)  # dip-lowrank's density counts them as weights of the model
            factors = MethodConfig("dip-lowrank", density=less(n) + n / (3 * d * i), rank=r / d)
            rivals.append((f"low rank {r}", factors, 0))
        for name, method, held in rivals:
            beside = held * len(glus) * ADAPTER_BITS / 8
            self.cell(f"resident: {name}", partial(self.compensated, sparse, method, held_beside_bytes=beside))
        names = ("resident: lora, merged", "resident: lora, apart")
        if not self.has(*names):
            with self.trained("dip", **self.training_of("dip")) as adapter:
                for name, d_all in zip(names, (density, less(3 * rank * (d + i))), strict=True):
                    method, beside = MethodConfig("dip", density=d_all), adapter.n_bytes if "apart" in name else 0
                    self.cell(name, partial(self.compensated, sparse, method, adapter, held_beside_bytes=beside))

    def tasks(self) -> None:
        """Right answers of the dense model, under dip, and with its adapter."""
        part = self.config["tasks"]
        dip = MethodConfig("dip", density=part["density"])

        def answer(method: MethodConfig, adapter: Adapter | None = None) -> dict[str, Any]:
            with sparsify_(self.loaded.model, method, adapter=adapter) as sparse:
                opened = Opened(self.loaded, sparse, source=self.source, mlp_bytes=self.mlp_bytes)
                result = answer_tasks(
                    opened, part["names"], self.data / "eval", batch=4 * self.config["batch_eval"],
                    limit=part["limit"], seed=0,
                )  # fmt: skip
            return {"tasks": result["tasks"]}

        self.cell("tasks: dense", lambda: answer(MethodConfig("dense")))
        self.cell(f"tasks: dip@{dip.density}", lambda: answer(dip))
        name = f"tasks: dip@{dip.density} + lora"
        if not self.has(name):
            with self.trained("dip", **self.training_of("dip")) as adapter:
                self.cell(name, lambda: answer(dip, adapter))

    def group(self, name: str) -> dict[str, dict[str, Any]]:
        """The cells of a group (`group_of`) by name.

        Raises:
            ConfigError: there is no such group.
        """
        groups = {
            "dense": lambda: None, "own_gain": self.own_gain, "residents": self.residents, "tasks": self.tasks,
            "caches": self.caches,
        }  # fmt: skip
        kind, _, method = name.partition(":")
        if kind not in (groups if not method else ("methods",)):
            raise ConfigError(f"there is no group '{name}': choose {', '.join(groups)} or methods:NAME")
        self.cell("dense", lambda: self.score(MethodConfig("dense")))
        if method:
            self.method(method)
        else:
            groups[name]()
        return {cell: content for cell, content in self.cells.items() if group_of(cell) == name}

    def _say(self, done: int, total: int, loss: float) -> None:
        if done % 50 == 0 or done == total:
            self._progress(f"  step {done}/{total}, loss {loss:.4f}")


def _share(value: float | None) -> str:
    return "" if value is None else f" ({value:.0%})"
