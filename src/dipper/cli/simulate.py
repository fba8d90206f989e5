"""Verbs about devices that are not here: simulate, plan."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from dipper.cli.app import app
from dipper.cli.shared import parse_base_bits, refuse, say, size_of
from dipper.errors import BudgetError, ConfigError
from dipper.options import SWEPT, WORKLOAD, Ctx, Debug, Dram, Given, Json, MlpDram, listed, numbers, with_options


@app.command()
@with_options(swept=SWEPT, work=WORKLOAD)
def simulate(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A bundle, or a model whose shape is known (phi-3-medium, ...).")
    ],
    *,
    device: Annotated[
        str,
        typer.Option(help="Profiles, with commas: names that come with dipper, files, or this-machine.", metavar="A,B"),
    ] = "snapdragon-8-gen-3",
    swept: Given,
    work: Given,
    ctx: Ctx = None,
    figure: Annotated[
        Path | None, typer.Option(help="Draw speed against DRAM and time by part: .svg, .png, .pdf.", metavar="FILE")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """What a model would do on a device: hits, reads, tokens a second, for every combination of the lists given.

    A real bundle is run in DRAM with simulated caches: its counts are those the engine would have. A model whose shape
    alone is known gets generated scores.

    \b
    Examples:
      dipper simulate smollm2.dipper --device raspberry-pi-5,phone-ufs-3.1 --mlp-dram 40%,60% --density 0.5,0.7
      dipper simulate smollm2.dipper --method dip --cache none,lru,lfu,belady --capacity 0.25,0.5,0.75
      dipper simulate phi-3-medium --device paper-phone --dram 4GB,5GB,6GB --figure phi.svg
      dipper simulate phi-3-medium --base-bits 2,3 --method dense-stream,planes --fetch 0.1,0.3 --mlp-dram 3.6b
    """
    from dipper.budget import DEFAULT_FETCH
    from dipper.figures import check_figure
    from dipper.records import json_line
    from dipper.sweep import Sweep, open_model, open_workload, run_sweep
    from dipper.tables import sim_table

    check_figure(figure)
    if "planes" not in listed("--method", swept["method"]):
        about = {name: swept[name] for name in ("fetch", "fetch_glu", "read_cost", "whole")}
        refuse(about, f"with {swept['method']}", "add planes to --method")
    sweep = Sweep(
        methods=listed("--method", swept["method"]), densities=numbers("--density", swept["density"]),
        d_in=swept["d_in"], d_glu=swept["d_glu"], fetches=numbers("--fetch", swept["fetch"]) or (DEFAULT_FETCH,),
        fetch_glu=swept["fetch_glu"], read_cost=swept["read_cost"], whole=swept["whole"] or (),
        gammas=numbers("--gamma", swept["gamma"]), caches=listed("--cache", swept["cache"]),
        dram=listed("--dram", swept["dram"]) or (None,),
        mlp_dram=listed("--mlp-dram", swept["mlp_dram"]) or (None,),
        capacity=numbers("--capacity", swept["capacity"]), splits=listed("--split", swept["split"]),
        cold=bool(swept["cold"]), host=swept["host"],
    )  # fmt: skip
    base_bits, unit_bytes = work.pop("base_bits"), work.pop("unit_bytes")
    bundle = open_model(
        model, bits=work.pop("bits"), other_bits=work.pop("other_bits"),
        base_bits=None if base_bits is None else parse_base_bits(base_bits), unit_bytes=size_of(unit_bytes),
    )  # fmt: skip
    devices = [_device(name, bundle) for name in listed("--device", device)]
    workload = open_workload(bundle, **{**work, "generated": bool(work["generated"])})
    records = run_sweep(
        bundle, workload, sweep, devices, context=ctx, threads=work["threads"],
        on_skip=lambda why: say(f"left out: {why}"),
    )  # fmt: skip
    if not records:
        raise BudgetError("nothing fits, for the reasons above: give more DRAM, another device, or less --ctx")
    if figure is not None:
        from dipper.drawings.sweep import draw_sweep

        draw_sweep(records, figure)
    if as_json:
        best = max(records, key=lambda record: record.tok_per_s).as_dict()
        print(json_line({**best, "schema": "dipper-simulate/1", "results": [r.as_dict() for r in records]}))
    else:
        print(sim_table(records))


def _device(name: str, bundle: Any) -> Any:
    """A profile by name; this machine's is measured where there is none yet."""
    from dipper.device import Device

    if name != _THIS_MACHINE:
        return Device.load(name)
    from dipper.profile import this_machine
    from dipper.sweep import has_weights

    if not has_weights(bundle):
        raise ConfigError(
            f"this machine is profiled with a real bundle: dipper doctor BUNDLE --profile here.toml, then --device "
            f"here.toml for {bundle.path}"
        )
    device, kept = this_machine(bundle.path, progress=lambda what: say(f"measuring this machine: {what}"))
    say(f"this machine's profile: {kept}")
    return device


_THIS_MACHINE = "this-machine"


@app.command()
def plan(
    bundle: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="A bundle, or a model whose shape is known.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="The same, as an option.", metavar="MODEL")] = None,
    device: Annotated[
        str | None,
        typer.Option(help="A profile: a name, a file, or this-machine (default for bundles).", metavar="NAME"),
    ] = None,
    dram: Dram = None,
    mlp_dram: MlpDram = None,
    max_ppl_increase: Annotated[
        float, typer.Option(help="Perplexity that may be lost, relative: 0.05 is 5 %.", metavar="P")
    ] = 0.05,
    ctx: Annotated[int, typer.Option("--ctx", help="Positions of the KV cache.", metavar="N")] = 1024,
    n_prompt: Annotated[int, typer.Option("-p", "--n-prompt", help="Prompt tokens.", metavar="N")] = 64,
    n_tokens: Annotated[int, typer.Option("-n", "--n-tokens", help="Tokens after it.", metavar="N")] = 96,
    text: Annotated[
        Path | None, typer.Option(help="Text the model reads (default: one of dipper's own).", metavar="FILE")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Keep the plan, for `dipper run --plan FILE`.", metavar="FILE")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Find the fastest settings on a device within a loss of quality: method, bits, densities, gamma, cache, slots.

    Speed is simulated; quality comes from measured curves, and what they do not cover is said to be extrapolated.

    \b
    Examples:
      dipper plan smollm2.dipper --mlp-dram 60% --out plan.json && dipper run smollm2.dipper "Hello" --plan plan.json
      dipper plan --model phi-3-medium --device snapdragon-8-gen-3 --dram 6GB --max-ppl-increase 0.1
    """
    from dipper.files import check_target, write_json
    from dipper.planner import make_plan, plan_table
    from dipper.records import json_line
    from dipper.sweep import has_weights, open_model, open_workload

    check_target(out)
    if (bundle is None) == (model is None):
        raise ConfigError("give one model: dipper plan MODEL, or dipper plan --model MODEL.")
    name = str(bundle or model)
    first = open_model(name)
    real = has_weights(first)
    if device is None and not real:
        raise ConfigError(f"{name} is the shape of a model: say where it shall run with --device NAME.")
    result = make_plan(
        [first] if real else [first, open_model(name, bits=8)],
        _device(device or _THIS_MACHINE, first),
        workload_of=lambda b: open_workload(b, n_prompt=n_prompt, n_tokens=n_tokens, text=text),
        dram=dram,
        mlp_dram=mlp_dram,
        max_ppl_increase=max_ppl_increase,
        context=ctx,
        host_bytes=None if real else 0,
    )
    if out is not None:
        write_json(out, result.as_dict())
    print(json_line(result.as_dict()) if as_json else plan_table(result))
