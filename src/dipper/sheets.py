"""Results of the experiments, read: a `Book` of `Sheet`s, one for each experiment and model, and the words for them.

book = Book.open("experiments")
for sheet in book.sheets("density"):
    for cell in sheet.of("perplexity"):
        rule(cell.options), with_error(book.loss(sheet, cell))      # "dip, norms", "+5.4 ± 0.3 %"
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from dipper.evaluate import paired_change
from dipper.experiment import Experiment, Results, load_all, read_all
from dipper.sources import PACKAGED_MODELS

__all__ = [
    "DENSE",
    "NONE",
    "NOT_MEASURED",
    "RUINED",
    "Book",
    "Loss",
    "Measured",
    "Sheet",
    "Table",
    "close",
    "density_of",
    "dram_gb",
    "memory",
    "number",
    "percent",
    "rule",
    "table",
    "told",
    "way",
    "with_error",
]

# In which experiments are told; others follow by name.
ORDER = (
    "density", "headline", "dram", "bandwidth", "caches", "cache-aware", "compensation", "split", "thresholds",
    "beyond",
)  # fmt: skip
NOT_MEASURED = "not measured"
NONE = "–"
DENSE = ("dense", "dense-stream", "dense-resident")
RUINED = 20.0  # a loss from where on it makes no sense to tell how much
CACHED = 0.5  # share of the columns that is cached where a loss that depends on it is told

Table = dict[str, Any]  # title, columns, rows: strings
Loss = tuple[float, "float | None"]  # 0.05: perplexity 5 % above dense; and its standard error, None for one window


# ------------------------------------------------------------------------------------------------ results


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One cell: what was asked, and what was found; `result` is None where it was not measured."""

    kind: str
    options: dict[str, Any]
    result: dict[str, Any] | None
    state: str = "done"  # done, stale or missing

    @property
    def held(self) -> bool:
        """Whether a benchmark ran on the held disk."""
        return "--held" in self.options.get("arguments", ()) or bool((self.result or {}).get("held"))


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """All cells of one experiment for one model.

    Attributes:
        content: of the results file; without one, as far as it is known.
        cells: in the order of the configuration.
    """

    experiment: str
    model: str
    title: str
    content: Mapping[str, Any] = field(default_factory=dict, repr=False)
    cells: tuple[Measured, ...] = field(repr=False)

    @property
    def marked(self) -> str:
        """The title, and whether what is shown under it is stale."""
        n_stale, n_missing = self.count("stale"), self.count("missing")
        if not n_stale:
            return self.title
        return f"{self.title} ({'stale' if n_stale + n_missing == len(self.cells) else 'partly stale'})"

    def of(self, kind: str) -> list[Measured]:
        """Cells of a kind, measured or not."""
        return [cell for cell in self.cells if cell.kind == kind]

    def count(self, state: str) -> int:
        """Cells in a state."""
        return sum(cell.state == state for cell in self.cells)


class Book:
    """The results of all experiments.

    Attributes:
        experiments: by name, in the order in which they are told.
    """

    def __init__(self, experiments: Mapping[str, Experiment], sheets: Iterable[Sheet]) -> None:
        first = {name: i for i, name in enumerate(ORDER)}
        order = sorted(experiments, key=lambda name: (first.get(name, len(first)), name))
        self.experiments = {name: experiments[name] for name in order}
        self._sheets = list(sheets)
        self._losses: dict[
            int, Loss | None
        ] = {}  # by the id of the cell, which lives as long as this: bootstraps take time

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Book:
        """Reads `configs/*.toml` and the results of a folder of experiments.

        Raises:
            ConfigError: there are no configurations, or a file is not what it should be.
        """
        experiments = {experiment.name: experiment for experiment in load_all(folder)}
        sheets = []
        for experiment in experiments.values():
            by_model = {results.content["model"]["name"]: results for results in read_all(folder, experiment)}
            others = sorted(by_model.keys() - set(experiment.models))
            sheets += [_sheet(experiment, by_model[m], m) for m in (*experiment.models, *others) if m in by_model]
        return cls(experiments, sheets)

    def sheets(self, experiment: str) -> list[Sheet]:
        """Of one experiment, one for each model of which there are results."""
        return [sheet for sheet in self._sheets if sheet.experiment == experiment]

    def unmeasured(self, experiment: str) -> list[str]:
        """Models of an experiment of which there are none."""
        measured = {sheet.model for sheet in self.sheets(experiment)}
        return [model for model in self.experiments[experiment].models if model not in measured]

    @cached_property
    def _dense(self) -> dict[tuple[str, str, int], list[tuple[Sheet, Measured]]]:
        """Dense cells by model, tokens and window."""
        found: dict[tuple[str, str, int], list[tuple[Sheet, Measured]]] = {}
        for sheet in self._sheets:
            for cell in sheet.of("perplexity"):
                if cell.result is not None and cell.result["method"] in DENSE:
                    key = sheet.model, cell.result["tokens_sha256"], cell.result["window"]
                    found.setdefault(key, []).append((sheet, cell))
        return found

    def dense(self, sheet: Sheet, cell: Measured) -> Measured | None:
        """The dense model on the same tokens: of the same sheet, else of another, rather one that is not stale."""
        if cell.result is None:
            return None
        found = self._dense.get((sheet.model, cell.result["tokens_sha256"], cell.result["window"]), [])
        order = sorted(found, key=lambda one: (one[0] is not sheet, one[1].state == "stale"))
        return order[0][1] if order else None

    def loss(self, sheet: Sheet, cell: Measured) -> Loss | None:
        """How much higher a perplexity is than the dense model's on the same tokens, and the error of that.

        Returns:
            0.05 for 5 %, with a standard error (None for one window); None where either was not measured.
        """
        if id(cell) not in self._losses:
            self._losses[id(cell)] = self._loss(sheet, cell)
        return self._losses[id(cell)]

    def _loss(self, sheet: Sheet, cell: Measured) -> Loss | None:
        dense = self.dense(sheet, cell)
        if cell.result is None or dense is None or dense.result is None or dense is cell:
            return None
        return loss_against(cell.result, dense.result)

    def loss_of(
        self, model: str, method: str, density: float | None, gamma: float | None, **options: Any
    ) -> tuple[Loss | None, tuple[Measured, ...]]:
        """The loss of a method as it is by default, from whichever experiment scored it on the most tokens.

        Args:
            model, method, density, gamma: as in a `SimRecord`.
            options: what else must agree, such as `fetch`. A cache's capacity need not, but for dip-ca, whose masks
                depend on the cache: half of the columns are cached.

        Returns:
            The loss, None where it was not measured; and the cells that it is from.
        """
        best: Loss | None = None
        cells: tuple[Measured, ...] = ()
        n_tokens = 0
        wanted = {"name": method, "density": density, "gamma": gamma, "deferred": False, **options}
        wanted |= {"capacity": CACHED} if method == "dip-ca" else {}
        for sheet in (s for s in self._sheets if s.model == model):
            for cell in (c for c in sheet.of("perplexity") if c.result is not None):
                found, dense = _plain(cell), self.dense(sheet, cell)
                if found is None or dense is None or cell.result is None or cell.result["n_tokens"] <= n_tokens:
                    continue
                same = all(close(found.get(name), value) for name, value in wanted.items())
                if same and (loss := self.loss(sheet, cell)) is not None:
                    best, cells, n_tokens = loss, (cell, dense), cell.result["n_tokens"]
        return best, cells


def _sheet(experiment: Experiment, results: Results, model: str) -> Sheet:
    cells = []
    for cell in experiment.cells(model):
        held = results.cell(cell)
        if held is None and model not in experiment.models:
            continue  # it is there for some cells alone
        result = None if held is None else held["result"]
        cells.append(Measured(kind=cell.kind, options=cell.options, result=result, state=results.state(cell)))
    packaged = PACKAGED_MODELS.get(model)
    title = results.content["model"].get("title") or model if packaged is None else packaged.title
    return Sheet(experiment=experiment.name, model=model, title=title, content=results.content, cells=tuple(cells))


def _plain(cell: Measured) -> dict[str, Any] | None:
    """What a perplexity asked for, None where a rule was changed in a way that no simulation knows."""
    method = dict(cell.options.get("method", {}))
    if method.keys() & {"select", "norms", "compensate", "linears"} or cell.options.keys() & {"fit", "above"}:
        return None
    if "fetch" in method:
        method.setdefault("fetch_glu", method["fetch"])
    return {"density": density_of(cell), "gamma": None, "deferred": False, "read_cost": None, **method}


def loss_against(scored: Mapping[str, Any], other: Mapping[str, Any]) -> Loss | None:
    """How much higher one perplexity is than another on the same windows: of results with `window_nll`."""
    change = paired_change(scored["window_nll"], other["window_nll"], scored["window_tokens"])
    relative = change["relative"]
    return None if relative is None else (relative, change["relative_stderr"])


def close(a: Any, b: Any) -> bool:
    """Whether two options agree: shares to half a hundredth."""
    if isinstance(a, (int, float)) and isinstance(b, (int, float)) and max(a, b) <= 1:
        return math.isclose(a, b, abs_tol=5e-3)
    return bool(a == b)


def density_of(cell: Measured) -> float | None:
    """The density that a cell asks for; None: the model is dense."""
    density = cell.options.get("density", cell.options.get("fit", cell.options.get("method", {}).get("density")))
    return None if density is None else float(density)


# ------------------------------------------------------------------------------------------------ words


def number(value: float | None, form: str = "{:.2f}") -> str:
    """A number, with a true minus sign; a dash for None."""
    return NONE if value is None else form.format(value).replace("-", "−")


def percent(value: float | None, digits: int = 0, *, signed: bool = True) -> str:
    """A share as per cent; "ruined" where there is no sense in telling how much."""
    if value is None:
        return NONE
    if value > RUINED:
        return "ruined"
    return number(100 * value, f"{{:{'+' if signed else ''}.{digits}f}}\u00a0%")


def span(least: float, most: float) -> str:
    """Shares from the least to the most as per cent; one where they are the same."""
    return percent(most) if least == most else f"{number(100 * least, '{:+.0f}')} to {percent(most)}"


def with_error(loss: Loss | None, measured: bool = True) -> str:
    """A loss with its standard error."""
    if loss is None:
        return NONE if measured else NOT_MEASURED
    value, stderr = loss
    if stderr is None or value > RUINED:
        return percent(value, 1)
    return f"{percent(value, 1)[:-2]} ± {100 * stderr:.1f}\u00a0%"


def rule(options: Mapping[str, Any], *, cache: bool = True) -> str:
    """A pruning rule in words: its name and what is not as by default; its cache only where that is asked for."""
    method = dict(options.get("method", {}))
    words = [str(method.pop("name", "?"))]
    method.pop("density", None)
    gamma, capacity = method.pop("gamma", None), method.pop("capacity", None)
    words += [] if gamma is None else [f"γ {gamma:g}"]
    words += [name if value is True else f"{name} {told(value)}" for name, value in method.items()]
    words += ["fitted"] if "fit" in options else []
    words += [f"cache {capacity:g}"] if cache and capacity is not None else []
    return ", ".join(words)


def told(value: Any) -> str:
    """An option's value."""
    if isinstance(value, (list, tuple)):
        return ",".join(map(told, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def way(record: Mapping[str, Any], *, cache: bool = True) -> str:
    """A way to run in words, without its density: of a `SimRecord`."""
    words = [str(record["method"])]
    if record.get("fetch") is not None:
        shares = [f"{100 * record[name]:g}\u00a0%" for name in ("fetch", "fetch_glu")]
        words.append(shares[0] if shares[0] == shares[1] else " : ".join(shares))
    words += [] if record.get("read_cost") is None else [f"in runs by {record['read_cost']} B"]
    if record["method"] == "dip-ca":
        words.append(f"γ {record['gamma']:g}")
    if cache and record.get("cache") is not None:
        words.append(str(record["cache"]))
    return " ".join(words)


def dram_gb(record: Mapping[str, Any]) -> float:
    """What the process of a `SimRecord` holds."""
    return float(sum(record["dram_bytes"].values())) / 1e9


def memory(gb: float) -> str:
    """A size, given in GB."""
    for unit, form in (("GB", "{:.2f}"), ("MB", "{:.0f}")):
        if gb >= 1:
            return f"{form.format(gb)} {unit}"
        gb *= 1000
    return f"{gb:.0f} KB"


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """A table of strings."""
    return {"title": title, "columns": list(columns), "rows": [list(row) for row in rows]}
