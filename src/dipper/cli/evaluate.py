"""The verb eval: perplexity and tasks, on the engine or in PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dipper.cli.app import app
from dipper.cli.shared import (
    check_context,
    config_of,
    for_method,
    parse_two_bits,
    print_plan,
    pytorch_method,
    refuse,
    say_answers,
    say_progress,
    split_bits,
)
from dipper.errors import ConfigError
from dipper.options import ENGINE_BUT_METHOD, TORCH, Debug, Given, Json, with_options

if TYPE_CHECKING:
    from dipper.records import EvalRecord


@app.command("eval")
@with_options(options=ENGINE_BUT_METHOD, torch=TORCH)
def evaluate(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE", help="A bundle, a GGUF file, a Hugging Face folder, or a name `dipper pull` knows."
        ),
    ],
    *,
    text: Annotated[Path | None, typer.Option("--text", help="The text to score, UTF-8.", metavar="FILE")] = None,
    tasks: Annotated[str | None, typer.Option(help="Or tasks to answer, with commas (PyTorch).", metavar="A,B")] = None,
    data: Annotated[Path | None, typer.Option(help="Folder of the tasks' files.", metavar="DIR")] = None,
    limit: Annotated[int | None, typer.Option(help="Items of a task at most (default: all).", metavar="N")] = None,
    shots: Annotated[int, typer.Option(help="Answered questions before each (mmlu).", metavar="N")] = 0,
    window: Annotated[int, typer.Option(help="Positions of a window.", metavar="N")] = 1024,
    tokens: Annotated[
        int | None, typer.Option(help="Use at most N positions, whole windows only (default: all).", metavar="N")
    ] = None,
    wikitext: Annotated[
        bool | None,
        typer.Option(
            "--wikitext/--plain", help="One row a line, joined by blank lines (default: for files named *.raw)."
        ),
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="Score this method as well and show the change, e.g. dense.", metavar="NAME")
    ] = None,
    kl: Annotated[
        bool, typer.Option("--kl", help="As --against dense, with KL and same-top-1 to the dense model (PyTorch).")
    ] = False,
    engine: Annotated[
        bool | None, typer.Option("--engine/--torch", help="The native engine (default for bundles), or PyTorch.")
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="Native: as for `dipper run`; PyTorch: any of `dipper.methods` (default of both: dip).", metavar="NAME"
        ),
    ] = None,
    options: Given,
    torch: Given,
    out: Annotated[
        Path | None, typer.Option(help="Keep the result here; an interrupted run continues from it.", metavar="FILE")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of the error bar's resampling, and of which items --limit takes.", metavar="N")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Perplexity of a text, or right answers to tasks, for any method.

    The native engine takes every token through its own mask and cache step; PyTorch knows more methods.

    \b
    Examples:
      dipper eval smollm2.dipper --text wiki.test.raw --tokens 32768
      dipper eval smollm2.dipper --text wiki.test.raw --method dip --density 0.6 --against dense
      dipper eval smollm2 --text wiki.test.raw --method up --density 0.7 --kl --device cuda --out up.json
      dipper eval smollm2 --text wiki.test.raw --torch --method planes --base-bits 2,3 --fetch 0.2 --kl
      dipper eval smollm2 --tasks arc_easy,piqa --data eval --limit 500 --method dip --density 0.5
    """
    if (text is None) == (tasks is None):
        raise ConfigError("give either a text to score with --text FILE, or tasks with --tasks A,B and --data DIR.")
    common = {
        name: options[name]
        for name in ("density", "d_in", "d_glu", "gamma", "cache", "fetch", "fetch_glu", "read_cost", "whole")
    }
    files = {"calibration": options["calibration"]}
    native = {name: value for name, value in options.items() if name not in (*common, *files)}
    torch_run = {name: torch.pop(name) for name in ("calibration_text", "adapter", "device", "dtype", "batch")}
    torch_method = {**torch, **split_bits(torch), "bits": parse_two_bits("--bits", torch["bits"])}
    torch_only = {**torch_method, **torch_run, "kl": kl or None, "tasks": tasks}
    scoring = {"window": window, "limit": tokens, "rows_joined": wikitext, "seed": seed or 0, "out": out}
    if _on_engine(source, method, engine, torch_only):
        assert text is not None, "tasks are for PyTorch"
        refuse(torch_only, "on the native engine", "use --torch")
        _eval_native(Path(source), text, method, options, against, scoring, as_json)
        return
    refuse(native, "in PyTorch", "use --engine")
    if against not in (None, "dense"):
        raise ConfigError(f"--against {against} is for the native engine; in PyTorch it is --against dense.")
    chosen = pytorch_method(method or "dip", {**common, **torch_method})
    torch_run |= files
    if text is not None:
        _eval_torch(source, text, chosen, torch_run, {**scoring, "kl": kl or against is not None}, as_json)
    else:
        asked = {"limit": limit, "seed": seed, "shots": shots, "out": out}
        _eval_tasks(source, str(tasks).split(","), data, chosen, torch_run, asked, as_json)


def _on_engine(source: str, method: str | None, asked: bool | None, torch_only: dict[str, Any]) -> bool:
    """Whether the native engine evaluates: as asked, else for bundles and what it can do."""
    if asked is not None:
        return asked
    if any(value is not None for value in torch_only.values()):
        return False
    from dipper.engine import METHODS

    return _is_bundle(source) and (method is None or method in METHODS)


def _eval_native(
    bundle: Path,
    text: Path,
    method: str | None,
    options: dict[str, Any],
    against: str | None,
    scoring: dict[str, Any],
    as_json: bool,
) -> None:
    from dipper.evaluate_engine import evaluate_bundle

    window = scoring["window"]
    check_context(bundle, f"--window {window}", window, "a smaller one")
    configs = [config_of(method=method or "dip", **options, context=window)]
    if against is not None:
        other = "dense-stream" if against == "dense" else against
        configs.append(config_of(**for_method(other, options), context=window))
    _print_eval(evaluate_bundle(bundle, text, configs, **scoring, on_plan=print_plan, progress=say_progress), as_json)


def _open_sparse(source: str, method: dict[str, Any], run: dict[str, Any], context: int | None) -> Any:
    import dipper.torch_model  # noqa: F401 - first, since it says what to install where PyTorch is missing
    from dipper.evaluate_torch import open_sparse

    return open_sparse(
        source, method, device=run["device"] or "cpu", dtype=run["dtype"], context=context,
        calibration=run["calibration"], calibration_text=run["calibration_text"], adapter=run["adapter"],
    )  # fmt: skip


def _eval_torch(
    source: str,
    text: Path,
    method: dict[str, Any],
    run: dict[str, Any],
    scoring: dict[str, Any],
    as_json: bool,
) -> None:
    with _open_sparse(source, method, run, scoring["window"]) as opened:
        from dipper.evaluate_torch import evaluate_torch

        record = evaluate_torch(opened, text, **scoring, batch=run["batch"] or 1, progress=say_progress)
    _print_eval(record, as_json)


def _print_eval(record: EvalRecord, as_json: bool) -> None:
    from dipper.records import json_line
    from dipper.tables import eval_table

    print(json_line(record.as_dict()) if as_json else eval_table(record))


def _eval_tasks(
    source: str,
    names: list[str],
    data: Path | None,
    method: dict[str, Any],
    run: dict[str, Any],
    asked: dict[str, Any],
    as_json: bool,
) -> None:
    if data is None:
        raise ConfigError("--tasks needs the folder of their files; give it with --data DIR.")
    from dipper.records import json_line
    from dipper.tables import tasks_table

    with _open_sparse(source, method, run, None) as opened:
        from dipper.evaluate_torch import answer_tasks

        result = answer_tasks(opened, names, data, batch=run["batch"] or 1, progress=say_answers, **asked)
    print(json_line(result) if as_json else tasks_table([result]))


def _is_bundle(source: str) -> bool:
    """Whether a source is, or would be, a bundle: what is neither a checkpoint nor a name is, so that errors say so."""
    path = Path(source)
    if path.exists():
        return not path.is_file() and not ((path / "config.json").exists() and not (path / "bundle.json").exists())
    from dipper.sources import PACKAGED_MODELS

    is_name = source.lower() in PACKAGED_MODELS or ("/" in source and path.suffix != ".dipper")
    return not is_name and path.suffix != ".gguf"
