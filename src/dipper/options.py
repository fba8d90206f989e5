"""Options of the verbs, each defined once, and groups of them that verbs share.

A verb names a group as one parameter and gets the group's options as a dict:

    @app.command()
    @with_options(engine=ENGINE)
    def chat(bundle: Bundle, *, engine: Given, ctx: Ctx = 2048) -> None: ...

An option that was not given is None, a flag that was not set too, unless the group has a default for it. Nothing is
imported here but typer: `dipper --help` knows no library.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import typer

from dipper.errors import ConfigError

Given = dict[str, Any]  # of a group: what was given by name
Group = Mapping[str, Any]  # annotations by name, or pairs of annotation and default

# ------------------------------------------------------------------------------------------------ options

Bundle = Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle made by `dipper pack`.", show_default=False)]
Method = Annotated[
    str | None,
    typer.Option(help="auto, dense-resident, dense-stream, dip, dip-ca or planes (default auto).", metavar="NAME"),
]
Density = Annotated[float | None, typer.Option(help="Share of MLP columns used, in (0, 1] (default 0.7).", metavar="D")]
DIn = Annotated[float | None, typer.Option("--d-in", help="Share of input columns; with --d-glu.", metavar="D")]
DGlu = Annotated[float | None, typer.Option("--d-glu", help="Share of GLU columns; with --d-in.", metavar="D")]
Fetch = Annotated[
    float | None,
    typer.Option(help="planes: share of the residuals that a token reads, in [0, 1] (default 0.1).", metavar="F"),
]
FetchGlu = Annotated[
    float | None, typer.Option("--fetch-glu", help="planes: the same of GLU columns (default --fetch).", metavar="F")
]
ReadCost = Annotated[
    int | None,
    typer.Option(
        "--read-cost",
        help="planes: choose runs of residuals, a read costing so many bytes beside its own (12500 at 0.5 GB/s and "
        "40,000 reads/s).",
        metavar="BYTES",
    ),
]
IoBudget = Annotated[
    str | None,
    typer.Option("--io-budget", help="planes: instead of --fetch: 20ms or 80MB read by a token.", metavar="AMOUNT"),
]
DeviceProfile = Annotated[
    str | None,
    typer.Option(
        "--device-profile",
        help="auto, --io-budget: reckon with this device, a name or file, in place of a probe of the disk.",
        metavar="NAME",
    ),
]
Whole = Annotated[
    str | None,
    typer.Option(
        help="planes: layers used whole, the most sensitive first: 27,2,26; or N (or N%) of an order that `dipper "
        "sensitivity` found: ORDER.json:6, or auto:6 where dipper has one.",
        metavar="LAYER,...",
    ),
]
Gamma = Annotated[
    float | None, typer.Option(help="dip-ca: weight of columns not cached, in (0, 1] (default 0.5).", metavar="G")
]
Cache = Annotated[
    str | None, typer.Option(help="Column cache: lru, lfu, lfu-decay or static (default lfu).", metavar="NAME")
]
Dram = Annotated[
    str | None, typer.Option(help="DRAM of the whole process: 600MB, or 60% of the bundle's bytes.", metavar="SIZE")
]
MlpDram = Annotated[
    str | None,
    typer.Option(help="DRAM of the MLP alone: 2.7b (bits per MLP weight), or 60% of its bytes.", metavar="SIZE"),
]
Calibration = Annotated[
    Path | None,
    typer.Option(help="Densities by layer, score factors and means from `dipper calibrate`.", metavar="FILE"),
]
Threads = Annotated[int | None, typer.Option(help="Compute threads (default: all cores).", metavar="N")]
Reader = Annotated[str | None, typer.Option(help="auto, io_uring or pread (default auto).", metavar="NAME")]
Isa = Annotated[
    str | None, typer.Option(help="Kernels: auto, scalar, avx2, avx512 or neon (default auto).", metavar="NAME")
]
Kv = Annotated[str | None, typer.Option(help="Keys and values: f32, f16 or int8 (default f16).", metavar="NAME")]
Cold = Annotated[bool, typer.Option("--cold", help="The prompt does not warm the column cache.")]
Trace = Annotated[
    Path | None, typer.Option(help="Write masks, hits and reads by token and region to FILE.", metavar="FILE")
]
Ctx = Annotated[int | None, typer.Option("--ctx", help="Positions of the KV cache.", metavar="N")]
NewTokens = Annotated[int, typer.Option("-n", "--n-tokens", help="New tokens at most.", metavar="N")]
Seed = Annotated[int, typer.Option(help="Of the sampler.", metavar="N")]
Temperature = Annotated[float, typer.Option(help="0 is greedy.", metavar="T")]
TopK = Annotated[int | None, typer.Option("--top-k", help="Keep the K most likely tokens.", metavar="K")]
TopP = Annotated[
    float | None, typer.Option("--top-p", help="Then the fewest tokens that hold this probability.", metavar="P")
]
MinP = Annotated[
    float | None, typer.Option("--min-p", help="Then those at least P times as likely as the best.", metavar="P")
]
Stop = Annotated[list[str] | None, typer.Option(help="End the text at this string; may be repeated.", metavar="TEXT")]
System = Annotated[str | None, typer.Option(help="System message of the chat template.", metavar="TEXT")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line of stdout.")]
NoProbe = Annotated[
    bool, typer.Option("--no-probe", help="Do not read the disk afterwards to compare with what it can give.")
]
# Read from argv by main(), which is also there when parsing itself fails.
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]

# ------------------------------------------------------------------------------------------------ groups

# How an engine runs a bundle: fields of `EngineConfig`.
ENGINE: Group = {
    "method": Method,
    "density": Density,
    "d_in": DIn,
    "d_glu": DGlu,
    "fetch": Fetch,
    "fetch_glu": FetchGlu,
    "read_cost": ReadCost,
    "io_budget": IoBudget,
    "whole": Whole,
    "gamma": Gamma,
    "cache": Cache,
    "calibration": Calibration,
    "dram": Dram,
    "mlp_dram": MlpDram,
    "threads": Threads,
    "reader": Reader,
    "isa": Isa,
    "kv": Kv,
    "device_profile": DeviceProfile,
}
ENGINE_BUT_METHOD: Group = {name: option for name, option in ENGINE.items() if name != "method"}
# Of one run: its prefill and its trace.
LOGGED: Group = {
    "cold": Cold,
    "trace": Trace,
}
# How tokens are drawn.
SAMPLED: Group = {
    "seed": (Seed, 0),
    "temperature": (Temperature, 0.0),
    "top_k": TopK,
    "top_p": TopP,
    "min_p": MinP,
}
# Of evaluation in PyTorch.
TORCH: Group = {
    "select": Annotated[
        str | None, typer.Option(help="PyTorch: topk, threshold or topp (default: the method's).", metavar="HOW")
    ],
    "norms": Annotated[bool, typer.Option("--norms", help="PyTorch: dip ranks |x| times the column's norm.")],
    "compensate": Annotated[bool, typer.Option("--compensate", help="PyTorch: a dropped column contributes its mean.")],
    "capacity": Annotated[
        float | None, typer.Option(help="PyTorch: simulate caches of this share of the columns.", metavar="C")
    ],
    "base_bits": Annotated[
        str | None,
        typer.Option(help="PyTorch, planes: resident bits of a code, of input and GLU (default 2,3).", metavar="N[,N]"),
    ],
    "unit_bytes": Annotated[
        str | None, typer.Option(help="PyTorch, planes: about what a unit has (default one column).", metavar="SIZE")
    ],
    "deferred": Annotated[bool, typer.Option("--deferred", help="PyTorch, planes: use what the token before chose.")],
    "bits": Annotated[
        str | None, typer.Option(help="PyTorch, resident: bits of input and GLU columns (default 4).", metavar="N[,N]")
    ],
    "calibration_text": Annotated[
        Path | None, typer.Option(help="PyTorch: a text for methods that must see some.", metavar="FILE")
    ],
    "adapter": Annotated[
        Path | None, typer.Option(help="PyTorch: an adapter of `dipper distill`, kept apart.", metavar="DIR")
    ],
    "device": Annotated[str | None, typer.Option(help="PyTorch: cpu, cuda or cuda:1 (default cpu).", metavar="NAME")],
    "dtype": Annotated[str | None, typer.Option(help="PyTorch: fp32, bf16 or fp16 (default fp32).", metavar="NAME")],
    "batch": Annotated[int | None, typer.Option(help="PyTorch: sequences at once (default 1).", metavar="N")],
}
# The rule under which an adapter is trained.
STUDENT: Group = {
    **{name: ENGINE[name] for name in ("density", "d_in", "d_glu", "fetch", "fetch_glu", "whole", "gamma", "cache")},
    "calibration": Calibration,
    **{name: TORCH[name] for name in ("norms", "capacity", "base_bits", "unit_bytes")},
}
# How it is trained: fields of `DistillConfig`, whose defaults hold.
TRAINED: Group = {
    "densities": Annotated[
        str | None, typer.Option(help="Draw the density anew each step: lowest,highest.", metavar="D,D")
    ],
    "anneal": Annotated[
        float | None, typer.Option(help="Share of the steps in which the density falls from 1 (0).", metavar="A")
    ],
    "target": Annotated[
        str | None,
        typer.Option(help="logits, layers (memory of one layer), or text (no teacher) (logits).", metavar="NAME"),
    ],
    "rank": Annotated[int | None, typer.Option(help="Of LoRA (32).", metavar="R")],
    "snap_int4": Annotated[
        bool, typer.Option("--int4", help="Train for a bundle of 4 bits: weights are rounded to its grid.")
    ],
    "straight_through": Annotated[
        bool, typer.Option("--straight-through", help="The gradient passes masks as if nothing were dropped.")
    ],
    "temperature": Annotated[float | None, typer.Option(help="Of both distributions (1).", metavar="T")],
    "hidden_weight": Annotated[float | None, typer.Option(help="Of the last hidden state's error (0).", metavar="W")],
    "steps": Annotated[int | None, typer.Option(help="Optimiser steps (400).", metavar="N")],
    "batch": Annotated[int | None, typer.Option(help="Windows of a step, over all processes (16).", metavar="N")],
    "micro_batch": Annotated[int | None, typer.Option(help="Windows at once (all).", metavar="N")],
    "lr": Annotated[float | None, typer.Option(help="Peak of the learning rate (0.001).", metavar="R")],
    "dtype": Annotated[str | None, typer.Option(help="bf16 or fp32 (fp32).", metavar="NAME")],
    "recompute": Annotated[bool, typer.Option("--recompute", help="Gradient checkpointing: less memory.")],
    "eval_every": Annotated[
        int | None, typer.Option(help="Steps between judgements on held-out text (50).", metavar="N")
    ],
    "patience": Annotated[
        int | None, typer.Option(help="Judgements without improvement that end it (4).", metavar="N")
    ],
    "save_every": Annotated[int | None, typer.Option(help="Steps between checkpoints (100).", metavar="N")],
    "seed": Annotated[int | None, typer.Option(help="Of the adapter, windows and densities (0).", metavar="N")],
}
# Lists of settings to simulate.
SWEPT: Group = {
    "method": (Annotated[str, typer.Option(help="Methods, with commas.", metavar="A,B")], "dense-stream,dip,dip-ca"),
    "density": (Annotated[str, typer.Option(help="Densities, with commas.", metavar="D,...")], "0.7"),
    "d_in": DIn,
    "d_glu": DGlu,
    "fetch": Annotated[str | None, typer.Option(help="planes: shares read, with commas (0.1).", metavar="F,...")],
    "fetch_glu": FetchGlu,
    "read_cost": ReadCost,
    "whole": Whole,
    "gamma": (Annotated[str, typer.Option(help="dip-ca: gammas, with commas.", metavar="G,...")], "0.5"),
    "cache": (
        Annotated[str, typer.Option(help="Of none, lru, lfu, lfu-decay, static, belady; with commas.", metavar="A,B")],
        "lfu",
    ),
    "dram": Annotated[
        str | None, typer.Option(help="DRAM of the whole process, with commas: 4GB,6GB or 60%.", metavar="SIZES")
    ],
    "mlp_dram": Annotated[
        str | None, typer.Option(help="DRAM of the MLP alone, with commas: 2.7b or 60%.", metavar="SIZES")
    ],
    "capacity": Annotated[
        str | None, typer.Option(help="Instead: shares of the columns cached, with commas.", metavar="C,...")
    ],
    "split": (
        Annotated[
            str,
            typer.Option(
                help="Of the slots over regions: uniform, miss-curve, or a file of weights; with commas.", metavar="A,B"
            ),
        ],
        "uniform",
    ),
    "host": Annotated[
        str | None, typer.Option(help="DRAM of the process before any weight (a shape alone: 0).", metavar="SIZE")
    ],
    "cold": Cold,
}
# What tokens a simulation takes, and of which weights.
WORKLOAD: Group = {
    "trace": Annotated[
        Path | None, typer.Option(help="Masks of this trace (`dipper run --trace`, gamma 1).", metavar="FILE")
    ],
    "text": Annotated[
        Path | None, typer.Option(help="Text the model reads (default: one of dipper's own).", metavar="FILE")
    ],
    "generated": Annotated[bool, typer.Option("--generated", help="Generated scores even for a real model.")],
    "variant": Annotated[
        str | None, typer.Option(help="Generated scores as this one model has them, for a band.", metavar="NAME")
    ],
    "bits": Annotated[int | None, typer.Option(help="Of the MLP, for a shape: 4 or 8 (default 4).", metavar="N")],
    "other_bits": Annotated[
        int | None, typer.Option(help="Of attention and head, for a shape (default 8).", metavar="N")
    ],
    "base_bits": Annotated[
        str | None, typer.Option(help="Of a shape's MLP codes, as for `dipper pack` (default 0).", metavar="N[,N]")
    ],
    "unit_bytes": Annotated[
        str | None, typer.Option(help="Of a shape's residuals, as for `dipper pack`.", metavar="SIZE")
    ],
    "n_prompt": (Annotated[int, typer.Option("-p", "--n-prompt", help="Prompt tokens.", metavar="N")], 128),
    "n_tokens": (Annotated[int, typer.Option("-n", "--n-tokens", help="Tokens after it.", metavar="N")], 256),
    "threads": Threads,
    "seed": (Annotated[int, typer.Option(help="Of generated scores.", metavar="N")], 0),
}
# What `dipper reproduce` measures, and where: fields of `Request`, whose defaults hold.
MEASURED: Group = {
    "models": Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            help="smollm2, a Hugging Face id, a path, or NAME=PATH; may be repeated (default: the experiment's).",
            metavar="NAME",
        ),
    ],
    "data": Annotated[
        Path | None,
        typer.Option(envvar="DIPPER_DATA", help="Folder of texts and tasks (or DIPPER_DATA).", metavar="DIR"),
    ],
    "device": Annotated[
        str | None, typer.Option(help="cpu or cuda, for what computes in PyTorch (cpu).", metavar="NAME")
    ],
    "batch": Annotated[int | None, typer.Option(help="Windows at once (8).", metavar="N")],
    "threads": Annotated[
        int | None, typer.Option(help="Of a cell (default: all cores, shared by the jobs).", metavar="N")
    ],
    "jobs": Annotated[int | None, typer.Option(help="Processes on this machine (1).", metavar="N")],
    "ray": Annotated[
        str | None,
        typer.Option(help="On the Ray cluster at this address, or the one that runs here.", metavar="auto|ADDRESS"),
    ],
    "kinds": Annotated[
        list[str] | None, typer.Option("--kind", help="Only cells of this kind; may be repeated.", metavar="NAME")
    ],
    "refresh": Annotated[
        str | None, typer.Option(help="Measure again: stale (the code has changed since), or all.", metavar="WHICH")
    ],
    "retries": Annotated[
        int | None, typer.Option(help="How often a cell that failed is tried again (1).", metavar="N")
    ],
    "quick": Annotated[bool, typer.Option("--quick", help="Only the first cell of every block.")],
    "workdir": Annotated[
        Path | None, typer.Option(help="Where bundles are kept (default: in dipper's cache).", metavar="DIR")
    ],
}


def with_options(**groups: Group) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A verb's parameters of these names become the options of the groups; the verb gets each group as a dict."""

    def decorate(verb: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(verb, include_extras=True)
        parameters: list[inspect.Parameter] = []
        for name, parameter in inspect.signature(verb).parameters.items():
            options = groups.get(name, {name: (hints[name], parameter.default)})
            parameters += [_parameter(option, what) for option, what in options.items()]

        @functools.wraps(verb)
        def called(**given: Any) -> None:
            taken = {
                name: {option: _value(option, given.pop(option)) for option in group} for name, group in groups.items()
            }
            verb(**given, **taken)

        vars(called).pop("__wrapped__")  # typer would look at the verb's own parameters
        vars(called)["__signature__"] = inspect.Signature(parameters)
        called.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return called

    return decorate


def _parameter(name: str, option: Any) -> inspect.Parameter:
    annotation, default = option if isinstance(option, tuple) else (option, None)
    if default is None and get_args(annotation)[0] is bool:
        default = False
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _value(name: str, value: Any) -> Any:
    """What a verb gets: flags that were not set are None, as options that were not given."""
    return layers(value) if name == "whole" else None if value is False else value


# ------------------------------------------------------------------------------------------------ lists


def listed(option: str, text: str | None) -> tuple[str, ...]:
    """The parts of a list with commas.

    Raises:
        ConfigError: a part is empty.
    """
    if text is None:
        return ()
    parts = tuple(part.strip() for part in text.split(","))
    if not all(parts):
        raise ConfigError(f"{option} {text} has an empty part: separate values with single commas.")
    return parts


def layers(text: str | None) -> tuple[int, ...] | str | None:
    """The layers of --whole, or the order and number that name them. ConfigError: neither."""
    if text is None or ":" in text:
        return text
    parts = listed("--whole", text)
    if not all(part.isdecimal() for part in parts):
        raise ConfigError(f"--whole {text} is not a list of layers: write 27,2,26.")
    return tuple(int(part) for part in parts)


def numbers(option: str, text: str | None) -> tuple[float, ...]:
    """A list of numbers with commas. ConfigError: it is none."""
    try:
        return tuple(float(part) for part in listed(option, text))
    except ValueError:
        raise ConfigError(f"{option} {text} is not a list of numbers: write 0.5,0.7.") from None
