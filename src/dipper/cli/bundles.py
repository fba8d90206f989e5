"""Verbs that make bundles and look into them: pull, pack, energies, sensitivity, inspect."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dipper.cli.app import app
from dipper.cli.shared import check_context, config_of, download_bar, parse_base_bits, say, size_of
from dipper.errors import ConfigError
from dipper.options import ENGINE, Bundle, Ctx, Debug, Given, Json, MlpDram, Threads, with_options

if TYPE_CHECKING:
    pass


@app.command()
def pull(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="smollm2, a Hugging Face id (org/name), or a local path.")
    ] = "smollm2",
    cache_dir: Annotated[Path | None, typer.Option(help="Where models are kept.", metavar="DIR")] = None,
    debug: Debug = False,
) -> None:
    """Fetch a model, or resume fetching it; prints its path.

    \b
    Examples:
      dipper pull
      dipper pull Qwen/Qwen2.5-0.5B-Instruct
    """
    from dipper.sources import pull as fetch

    with download_bar() as report:
        path = fetch(model, cache_dir=cache_dir, progress=report)
    print(path)


@app.command()
def pack(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="A GGUF file or a Hugging Face folder.")],
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="The bundle to make (default: SRC's name + .dipper).")
    ] = None,
    bits: Annotated[
        str, typer.Option(help="Of the MLP: source (the checkpoint's own grid), 4, 8 or 16.", metavar="BITS")
    ] = "source",
    base_bits: Annotated[
        str,
        typer.Option(
            help="Of every MLP code, kept as a base apart from the residual: 0 (no base) to 4, or of input and GLU "
            "columns: 2,3.",
            metavar="N[,N]",
        ),
    ] = "0",
    unit_bytes: Annotated[
        str | None,
        typer.Option(help="About what is read at once of the residuals (default 16KiB).", metavar="SIZE"),
    ] = None,
    energies: Annotated[
        Path | None,
        typer.Option(help="Mean square input of every column (.npz), by which residuals are ordered.", metavar="FILE"),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a bundle that is there already.")] = False,
    debug: Debug = False,
) -> None:
    """Pack a checkpoint into a bundle that single columns can be read from; prints its path.

    \b
    Examples:
      dipper pack model.gguf -o model.dipper
      dipper pack ./Qwen2.5-0.5B --bits 4
      dipper pack ./Qwen2.5-0.5B --bits 4 --base-bits 2
    """
    from dipper.bundle import pack as write

    split = _split_options(parse_base_bits(base_bits), unit_bytes, energies)
    target = out if out is not None else Path(source.resolve().stem + ".dipper")
    with download_bar() as report:
        told = None if report is None else partial(report, f"packing {source.name}")
        path = write(source, target, bits=bits, overwrite=force, progress=told, **split)
    print(path)


def _split_options(base_bits: int | tuple[int, int], unit_bytes: str | None, energies: Path | None) -> dict[str, Any]:
    """The options of `pack` that are about base and residual."""
    given = [name for name, value in (("--unit-bytes", unit_bytes), ("--energies", energies)) if value is not None]
    if base_bits in (0, (0, 0)) and given:
        raise ConfigError(f"{given[0]} is about residuals, and --base-bits is 0: give base bits, or drop it")
    options: dict[str, Any] = {"base_bits": base_bits}
    if unit_bytes is not None:
        options["unit_bytes"] = size_of(unit_bytes)
    if energies is not None:
        from dipper.calibration import read_energies

        options["energies"] = read_energies(energies)
    return options


@app.command()
def energies(
    bundle: Bundle,
    text: Annotated[Path, typer.Option("--text", help="A text like those the model will see.", metavar="FILE")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The file to write (.npz).", metavar="FILE")],
    tokens: Annotated[int, typer.Option(help="Use at most N positions.", metavar="N")] = 8192,
    window: Annotated[int, typer.Option(help="Positions of a window.", metavar="N")] = 1024,
    mlp_dram: MlpDram = None,
    debug: Debug = False,
) -> None:
    """Measure how strongly each column is driven, which orders the residuals of `dipper pack --base-bits`.

    \b
    Examples:
      dipper energies model.dipper --text wiki.train.raw -o model.npz
      dipper pack model.gguf --base-bits 3 --energies model.npz -o model-3.dipper
    """
    from dipper.energies import measure_energies, write_energies
    from dipper.engine import EngineConfig
    from dipper.files import check_target

    check_target(out)
    check_context(bundle, f"--window {window}", window, "a smaller one")
    config = None
    if mlp_dram is not None:
        config = EngineConfig(method="dense-stream", mlp_dram=mlp_dram, context=window)
    write_energies(out, measure_energies(bundle, text, window=window, limit=tokens, config=config))
    print(out)


@app.command()
def sensitivity(
    bundle: Bundle,
    text: Annotated[Path, typer.Option("--text", help="A text like those the model will see.", metavar="FILE")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The file to write (.json).", metavar="FILE")],
    tokens: Annotated[int, typer.Option(help="Use at most N positions.", metavar="N")] = 2048,
    window: Annotated[int, typer.Option(help="Positions of a window.", metavar="N")] = 256,
    threads: Threads = None,
    debug: Debug = False,
) -> None:
    """Measure what each region of a split bundle loses at its base alone: the order for --whole FILE:N.

    All of the model is in DRAM, and the text is scored once for every region.

    \b
    Examples:
      dipper sensitivity model-planes.dipper --text wiki.valid.raw -o order.json
      dipper run model-planes.dipper "Hello" --method planes --mlp-dram 3.6b --whole order.json:3
    """
    from dipper.files import check_target, write_json
    from dipper.sensitivity import measure_sensitivity

    check_target(out)
    check_context(bundle, f"--window {window}", window, "a smaller one")

    def progress(done: int, total: int, found: str) -> None:
        say(f"{done}/{total} {found}")

    found = measure_sensitivity(bundle, text, window=window, limit=tokens, threads=threads, progress=progress)
    write_json(out, found)
    print(out)


@app.command()
@with_options(engine=ENGINE)
def inspect(
    bundle: Bundle,
    *,
    engine: Given,
    ctx: Ctx = None,
    no_verify: Annotated[bool, typer.Option("--no-verify", help="Do not read every byte for the checksums.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show a bundle's model, sizes and columns, and check every byte of it; with options of a run also its DRAM plan.

    \b
    Examples:
      dipper inspect smollm2.dipper
      dipper inspect smollm2.dipper --method dip --dram 200MB --no-verify
    """
    from dipper.bundle import Bundle as BundleFile
    from dipper.engine import settle
    from dipper.tables import inspect_table

    opened = BundleFile.open(bundle)
    planned = ctx is not None or any(value is not None for value in engine.values())
    run = settle(opened, config_of(**engine, context=ctx)) if planned else None
    if not no_verify:
        opened.verify()
    description = opened.describe()
    if as_json:
        told = {} if run is None else {"plan": {"method": run.config.method, "why": run.why, **run.plan.as_dict()}}
        print(json.dumps({**description, "verified": not no_verify, **told}))
        return
    print(inspect_table(description, not no_verify))
    if run is not None:
        why = f" ({run.why})" if run.why else ""
        print("\n".join(["", f"method: {run.config.method}{why}", *run.plan.lines()]))
