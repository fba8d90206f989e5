"""Verbs about experiments and their results: reproduce, report, compare."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from dipper.cli.app import app
from dipper.cli.shared import download_bar, refuse, say
from dipper.errors import ConfigError, DipperError
from dipper.options import MEASURED, Debug, Given, Json, with_options


@app.command()
@with_options(asked=MEASURED)
def reproduce(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="NAME...", help="Experiments.", show_default=False)
    ] = None,
    *,
    every: Annotated[bool, typer.Option("--all", help="All experiments.")] = False,
    show: Annotated[bool, typer.Option("--list", help="Show what there is, and measure nothing.")] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Measure again what has a result, compare, and write nothing.")
    ] = False,
    experiments: Annotated[Path, typer.Option(help="Folder of configs, results and figures.", metavar="DIR")] = Path(
        "experiments"
    ),
    asked: Given,
    timed: Annotated[
        bool | None, typer.Option("--timed/--no-timed", help="Only what is timed, or only what is not.")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure what the results of experiments lack, for one model or several, and draw their figures.

    Results are kept in DIR/results after every cell: what is interrupted goes on with the same command.

    \b
    Examples:
      dipper reproduce --list
      dipper reproduce density --model smollm2 --data DATA --device cuda
      dipper reproduce --all --model mine=model.gguf --jobs 4
      dipper reproduce density --check --kind perplexity
    """
    from dipper import reproduce as run
    from dipper.experiment import find, load_all
    from dipper.records import json_line
    from dipper.tables import checks_table, experiments_table, reproduced_table

    if show:
        options = {"model" if k == "models" else "kind" if k == "kinds" else k: v for k, v in asked.items()}
        del options["data"]  # it may be of the environment
        options |= {"all": every, "check": check, "timed": None if timed is None else True}
        refuse({k: v or None for k, v in options.items()}, "with --list, which measures nothing", "leave --list out")
        listed = run.list_experiments(experiments, names or ())
        told = {"schema": "dipper-experiments/1", "experiments": [one.as_dict() for one in listed]}
        print(json_line(told) if as_json else experiments_table(listed))
        return
    if every == bool(names):
        raise ConfigError("name experiments, or give --all: `dipper reproduce --list` shows what there is.")
    if check:
        refuse({name: asked.get(name) for name in ("refresh", "retries")}, "with --check", "leave --check out")
    chosen = load_all(experiments) if every else [find(experiments, name) for name in names or ()]
    given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in asked.items()}
    request = run.Request(timed=timed, **{name: value for name, value in given.items() if value is not None})
    with download_bar() as progress:
        if check:
            checks = run.check(chosen, experiments, request, say=say, progress=progress)
            told = {"schema": "dipper-check/1", "checks": [one.as_dict() for one in checks]}
            shown, wrong = checks_table(checks), run.disagreements(checks)
        else:
            done = run.reproduce(chosen, experiments, request, say=say, progress=progress, trace=debug)
            told = {"schema": "dipper-reproduce/1", "results": [one.as_dict() for one in done]}
            shown, wrong = reproduced_table(done), run.failures(done)
    print(json_line(told) if as_json else shown)
    if wrong is not None:
        raise DipperError(wrong)


@app.command()
def report(
    experiments: Annotated[
        Path, typer.Option(help="Folder with configs/ and results/ (default experiments).", metavar="DIR")
    ] = Path("experiments"),
    out: Annotated[Path, typer.Option("-o", "--out", help="The page (default report.html).", metavar="FILE")] = Path(
        "report.html"
    ),
    docs: Annotated[Path | None, typer.Option(help="Also as Markdown: docs/results.md.", metavar="FILE")] = None,
    readme: Annotated[
        Path | None, typer.Option(help="Also the headline, between the markers of this README.", metavar="FILE")
    ] = None,
    debug: Debug = False,
) -> None:
    """Draw every figure and show all results on one page.

    \b
    Examples:
      dipper report
      dipper report --docs docs/results.md --readme README.md
    """
    from dipper.report import write_report

    for path in write_report(experiments, out=out, docs=docs, readme=readme):
        print(path)


@app.command()
def compare(
    results: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Results that `dipper eval --out` kept.")],
    figure: Annotated[
        Path | None, typer.Option(help="Draw perplexity against MLP bytes, as .svg, .png or .pdf.", metavar="FILE")
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(help='Only this one, named as in the table ("dip, norms"); may be repeated.', metavar="NAME"),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show results side by side, perplexities with their change to dense on the same tokens.

    \b
    Examples:
      dipper compare results/*.json --figure perplexity.svg
    """
    from dipper.compare import compare_evals, draw, read_results
    from dipper.errors import ConfigError
    from dipper.records import json_line
    from dipper.tables import evals_table, tasks_table

    evals, answers = read_results(results)
    rows = compare_evals(evals)
    if method:
        known = sorted({row.method for row in rows})
        for name in method:
            if name not in known:
                raise ConfigError(f"no result is of '{name}': there are {'; '.join(known)}")
        rows = [row for row in rows if row.method in method]
    if figure is not None:
        draw(rows, figure)
    if as_json:
        print(json_line({"schema": "dipper-compare/1", "evals": [row.as_dict() for row in rows], "tasks": answers}))
        return
    print("\n\n".join([*([evals_table(rows)] if rows else []), *([tasks_table(answers)] if answers else [])]))
