"""Verbs that time this machine: bench, doctor."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dipper.cli.app import app
from dipper.cli.shared import check_context, for_method, say
from dipper.errors import ConfigError
from dipper.options import ENGINE_BUT_METHOD, Bundle, Cold, Debug, Given, Json, with_options

if TYPE_CHECKING:
    from dipper.bench import BenchCase


@app.command()
@with_options(engine=ENGINE_BUT_METHOD)
def bench(
    bundle: Bundle,
    *,
    modes: Annotated[
        str, typer.Option(help="Methods, with commas.", metavar="A,B,...")
    ] = "dense-resident,dense-stream,dip,dip-ca",
    n_tokens: Annotated[int, typer.Option("-n", "--n-tokens", help="New tokens of a generation.", metavar="N")] = 64,
    n_prompt: Annotated[int, typer.Option("-p", "--n-prompt", help="Prompt tokens.", metavar="N")] = 512,
    reps: Annotated[int, typer.Option(help="Repetitions; modes take turns.", metavar="N")] = 5,
    ledger: Annotated[
        bool, typer.Option("--ledger", help="Where a decoded token's time goes, and what its bytes would allow.")
    ] = False,
    text: Annotated[
        Path | None, typer.Option(help="Text the prompt is cut from (default: one of dipper's own).", metavar="FILE")
    ] = None,
    engine: Given,
    cold: Cold = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Time modes against each other, cold and warm, each measurement in a process of its own.

    dense-resident is the reference that holds everything: it gets no DRAM limit.

    --ledger adds where a decoded token's time goes: a table for the warm decode of each mode (--json: of the cold one,
    too), of the run whose speed is the median.

    \b
      stage       select: masks, cache, read plans, admissions; submit: reads
                  handed to the kernel; wait: for them; gemv: the MLP's
                  products; attention; head; rest: what these leave (norms,
                  sampling, detokenising)
      ms, share   of a mean token, and of its time
      DRAM/token  bytes that the stage must read: codes and scales of its
                  matrices (of the MLP the codes of selected columns and all
                  scales), keys and values of the positions so far
      GB/s        these bytes in that time
      of roof     that over what as many threads get that only read DRAM,
                  measured after every run; above 100 % where a processor's
                  cache holds some of it
      limit       the longer of all these bytes at the roof, and all reads of
                  flash at what the disk gives to random reads of their size;
                  share: of the token's time

    \b
    Examples:
      dipper bench smollm2.dipper --mlp-dram 60%
      dipper bench smollm2.dipper --modes dense-resident,dip --ledger
      dipper bench smollm2.dipper --modes dense-stream,dip --dram 200MB -n 128 --reps 3 --json
    """
    from dipper.bench import run_bench
    from dipper.records import json_line
    from dipper.tables import bench_table, ledger_table

    if ledger and n_tokens < 2:
        raise ConfigError(f"-n {n_tokens} decodes nothing after the first new token: --ledger needs at least -n 2.")
    options = {**engine, "cold": cold or None}
    if options["calibration"] is not None:
        options["calibration"] = str(options["calibration"])
    measured = {"n_prompt": n_prompt, "n_gen": n_tokens, "text": str(text) if text else None, "ledger": ledger}
    cases = [_bench_case(bundle, mode.strip(), options, **measured) for mode in modes.split(",")]
    check_context(bundle, f"-p {n_prompt} -n {n_tokens}", n_prompt + n_tokens, "less of either")
    rows = run_bench(cases, reps, progress=lambda done, total, mode: say(f"{done + 1}/{total} {mode}"))
    if as_json:
        print(json_line({"schema": "dipper-bench/1", "results": [row.as_dict() for row in rows]}))
    else:
        ledgers = [ledger_table(row) for row in rows if row.state == "warm"]
        print("\n\n".join(filter(None, [bench_table(rows), *ledgers])))


def _bench_case(bundle: Path, mode: str, options: dict[str, Any], **measured: Any) -> BenchCase:
    from dipper.bench import BenchCase
    from dipper.engine import METHODS

    if mode not in METHODS:
        near = difflib.get_close_matches(mode, METHODS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"the modes are {', '.join(METHODS)}."
        raise ConfigError(f"there is no mode '{mode}'; {hint}")
    given = for_method(mode, options)
    notes = []
    if mode == "dense-resident" and (options["dram"], options["mlp_dram"]) != (None, None):
        given.pop("dram", None)
        notes.append("no DRAM limit: the reference that holds everything")
    return BenchCase(bundle=str(bundle), config=given, notes=notes, **measured)


@app.command()
def doctor(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A bundle, or a folder on the disk to look at.")],
    profile: Annotated[
        Path | None,
        typer.Option(help="Write this machine as a device profile, compute measured with the bundle.", metavar="FILE"),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show what this machine gives: direct I/O, io_uring, instruction sets, DRAM and disk bandwidth.

    \b
    Examples:
      dipper doctor smollm2.dipper
      dipper doctor smollm2.dipper --profile here.toml && dipper simulate smollm2.dipper --device here.toml
    """
    if profile is not None:
        from dipper.files import check_target
        from dipper.profile import measure_profile

        check_target(profile)
        made = measure_profile(path, name=profile.stem, progress=lambda what: say(f"measuring: {what}"))
        made.save(profile)
        print(json.dumps(made.as_dict()) if as_json else profile)
        return
    from dipper import doctor as machine

    found = machine.doctor(path)
    if as_json:
        print(json.dumps(found))
        return
    from rich.console import Console

    Console().print(machine.format_doctor(found))
