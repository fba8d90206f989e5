"""The kind that measures this machine: a script of benchmarks/."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dipper.errors import ConfigError, DipperError
from dipper.kinds.kind import Context, Kind, Options, Result
from dipper.kinds.packed import bundle_of, packing_code

__all__ = ["BENCHMARK"]

_BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"
_OF_A_CHECKOUT = ("../../benchmarks/{script}", "../../benchmarks/held_disk.sh")  # an installed dipper has none


def _benchmark(options: Options, context: Context) -> Result:
    """The last line of a script of benchmarks/, which is JSON.

    In `arguments` {bundle}, {model}, {data} and {workdir} stand for the model packed, its source, and the folders.
    """
    script = _BENCHMARKS / f"{options['script']}.py"
    if not script.is_file():
        raise ConfigError(f"there is no {script}: benchmarks are run from a checkout of dipper")
    workdir = context.workdir / f"benchmarks-{packing_code()}"
    workdir.mkdir(parents=True, exist_ok=True)
    arguments = [_filled(argument, context, workdir) for argument in options.get("arguments", [])]
    done = subprocess.run([sys.executable, str(script), *arguments], stdout=subprocess.PIPE, text=True, check=False)
    printed = done.stdout.strip().splitlines()
    try:
        result: Result = dict(json.loads(printed[-1]))
    except (IndexError, TypeError, ValueError):
        raise DipperError(
            f"{script.name} ended with status {done.returncode} and without a result, a JSON object in its last line: "
            f"{' | '.join(printed[-3:]) or 'it printed nothing'}"
        ) from None
    result.pop("provenance", None)  # names folders; the run of the cell has the rest
    return result


def _filled(argument: str, context: Context, workdir: Path) -> str:
    if "{model}" in argument:
        given = Path(context.model)
        argument = argument.replace("{model}", str(given.resolve()) if given.exists() else context.model)
    if "{bundle}" in argument:
        argument = argument.replace("{bundle}", str(bundle_of(context).resolve()))
    if "{data}" in argument:
        argument = argument.replace("{data}", str(context.file(".").resolve()))
    return argument.replace("{workdir}", str(workdir.resolve()))


def _benchmark_data(options: Mapping[str, Any]) -> tuple[str, ...]:
    given = (argument.partition("{data}/") for argument in options.get("arguments", []))
    return tuple(name for _, found, name in given if found)


BENCHMARK = Kind(
    name="benchmark",
    measure=_benchmark,
    options=frozenset(("script", "arguments")),
    required=frozenset(("script",)),
    sources=("kinds/benchmarked", "planes.toml", "bench.txt", *(_OF_A_CHECKOUT if _BENCHMARKS.is_dir() else ())),
    timed=True,
    needs_data=_benchmark_data,
    varies=("results", "summary", "profiles", "seconds"),
    within=tuple(f"results.*.{name}" for name in ("r", "measured", "predicted", "relative")),
)
