"""Results of `dipper eval` and `dipper reproduce` side by side: what each method costs, at how many bytes.

    evals, answers = read_results(paths)
    rows = compare_evals(evals)
    draw(rows, "perplexity.svg")

A change to dense is taken on the same tokens and paired window by window, so its error is far smaller than that of
either perplexity.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from dipper.errors import ConfigError
from dipper.evaluate import paired_change
from dipper.figures import panels
from dipper.records import EvalRecord

__all__ = ["Row", "compare_evals", "draw", "read_results"]

_RUINED = 4  # times the dense perplexity: where figures end
_DENSE = ("dense", "dense-stream", "dense-resident")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One perplexity among others; names as in `records.EvalRecord`, `relative` as in `evaluate.paired_change`."""

    model: str
    engine: str
    method: str  # with the options that are not as by default
    density: float | None
    touched: float | None
    mlp_bytes_per_token: float | None
    perplexity: float
    stderr: float | None
    relative: float | None
    relative_stderr: float | None
    kl: float | None
    same_top1: float | None

    def as_dict(self) -> dict[str, Any]:
        """The row as JSON types."""
        return asdict(self)


def read_results(paths: Iterable[str | os.PathLike[str]]) -> tuple[list[EvalRecord], list[dict[str, Any]]]:
    """Reads what `dipper eval --out` and `dipper reproduce` kept.

    Returns:
        Perplexities and answers to tasks.

    Raises:
        ConfigError: a file is no result, or that of a run which did not end.
    """
    evals, answers = [], []
    for path in map(Path, paths):
        try:
            held = json.loads(path.read_text(encoding="utf-8"))
            schema = held["schema"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path} cannot be read as a result ({type(error).__name__}: {error}).") from None
        if schema == "dipper-eval/1":
            evals.append(EvalRecord.from_dict(held))
        elif schema == "dipper-experiment/1":
            evals += [_of_cell(cell) for cell in held["cells"] if cell["kind"] == "perplexity"]
            answers += [cell["result"] for cell in held["cells"] if cell["kind"] == "tasks"]
        elif schema == "dipper-tasks/1":
            answers.append(held)
        elif schema == "dipper-part/1":
            raise ConfigError(f"{path} is of a run that did not end; start it again with the same --out to finish it.")
        else:
            raise ConfigError(f"{path} is {schema}, not a result of `dipper eval` or `dipper reproduce`.")
    return evals, answers


def _of_cell(cell: Mapping[str, Any]) -> EvalRecord:
    """A cell of an experiment. A fitted rule is told from that at equal densities."""
    fields = dict(cell["result"])
    is_fitted = fields.pop("fit", None) is not None
    record = EvalRecord.from_dict(fields)
    return replace(record, options={**record.options, "fitted": True}) if is_fitted else record


def compare_evals(records: Sequence[EvalRecord], seed: int = 0) -> list[Row]:
    """Rows by model, method and density, each with its change to the dense model on the same tokens.

    Args:
        records: perplexities; of one model all on the same tokens.
        seed: of the bootstrap.

    Raises:
        ConfigError: results of one model were taken on different tokens.
    """
    _check_tokens(records)
    rows = [_row(record, _dense_of(record, records), seed) for record in records]
    return sorted(rows, key=lambda row: (row.model, row.method not in _DENSE, row.method, -(row.density or 1.0)))


def _check_tokens(records: Sequence[EvalRecord]) -> None:
    first: dict[str, EvalRecord] = {}
    for record in records:
        other = first.setdefault(record.model, record)
        if (record.tokens_sha256, record.window_tokens) != (other.tokens_sha256, other.window_tokens):
            raise ConfigError(
                f"{record.model} was scored on different tokens: {_taken_on(other)}, and {_taken_on(record)}; compare "
                "results of the same text, window and tokens."
            )


def _taken_on(record: EvalRecord) -> str:
    name = _label(record)
    return f"{name} on {record.n_tokens} of {Path(record.text).name} in windows of {record.window}"


def _dense_of(record: EvalRecord, records: Sequence[EvalRecord]) -> EvalRecord | None:
    """The dense result that is nearest: of the same engine if there is one."""
    dense = [r for r in records if r.model == record.model and r.method in _DENSE]
    return min(dense, key=lambda r: (r.engine != record.engine, r.dtype != record.dtype), default=None)


def _row(record: EvalRecord, dense: EvalRecord | None, seed: int) -> Row:
    change: dict[str, Any] = {"relative": None, "relative_stderr": None}
    if record.against is not None and record.against["record"]["method"] in _DENSE:
        change = {key: record.against[key] for key in change}
    elif dense is not None and dense is not record:
        change = paired_change(record.window_nll, dense.window_nll, record.window_tokens, seed)
    return Row(
        model=record.model,
        engine=record.engine,
        method=_label(record),
        density=record.density if record.density is None else round(record.density, 3),
        touched=record.touched,
        mlp_bytes_per_token=record.mlp_bytes_per_token,
        perplexity=record.perplexity,
        stderr=record.stderr,
        kl=record.kl,
        same_top1=record.same_top1,
        **change,
    )


def _label(record: EvalRecord) -> str:
    words = [record.method, *(name if value is True else f"{name} {value}" for name, value in record.options.items())]
    if record.gamma not in (None, 1.0):
        words.append(f"gamma {record.gamma:g}")
    return ", ".join(words)


# ------------------------------------------------------------------------------------------------ figure


def draw(rows: Sequence[Row], path: str | os.PathLike[str]) -> None:
    """Perplexity against MLP bytes per token, a panel for each model and a line for each method.

    Error bars are those of the paired change to dense where there is one, else of the perplexity.

    Args:
        rows: of `compare_evals`.
        path: .svg, .png or .pdf.

    Raises:
        ConfigError: matplotlib is missing, or there is nothing to draw.
    """
    drawable = [row for row in rows if row.mlp_bytes_per_token is not None]
    if not drawable:
        raise ConfigError("There is nothing to draw: no result tells its MLP bytes per token.")
    models = list(dict.fromkeys(row.model for row in drawable))
    with panels(path, len(models)) as all_axes:
        for axes, model in zip(all_axes, models, strict=True):
            _draw_model(axes, model, [row for row in drawable if row.model == model])


def _draw_model(axes: Any, model: str, rows: Sequence[Row]) -> None:
    for method, line in _lines(rows):
        x = [(row.mlp_bytes_per_token or 0.0) / 1e6 for row in line]
        y = [row.perplexity for row in line]
        errors = [_error(row) for row in line]
        if method in _DENSE:
            axes.axhline(y[0], color="black", linewidth=0.8, linestyle=":", label=method)
        else:
            axes.errorbar(x, y, yerr=errors, marker="o", markersize=3, linewidth=1.2, capsize=2, label=method)
    axes.set(title=model, xlabel="MLP MB per token", ylabel="perplexity", yscale="log")
    dense = [row.perplexity for row in rows if row.method in _DENSE]
    if dense:  # a ruined model's perplexity has no upper end, and what is near dense could not be told apart
        axes.set_ylim(0.97 * min(dense), _RUINED * min(dense))
    axes.legend(fontsize="x-small")


def _lines(rows: Sequence[Row]) -> Iterator[tuple[str, list[Row]]]:
    for method, engine in dict.fromkeys((row.method, row.engine) for row in rows):
        line = [row for row in rows if (row.method, row.engine) == (method, engine)]
        label = method if engine == "torch" or method in _DENSE else f"{method} ({engine})"
        yield label, sorted(line, key=lambda row: row.mlp_bytes_per_token or 0.0)


def _error(row: Row) -> float:
    if row.relative is not None and row.relative_stderr is not None:
        return row.perplexity / (1 + row.relative) * row.relative_stderr
    return row.stderr or 0.0
