"""The command line: every verb parses, calls the library, prints.

Text that a verb makes goes to stdout, what it says about itself to stderr; with `--json` the last line of stdout is one
JSON object. Every error is one line on stderr, `dipper: ...`, and exit code 1; Ctrl-C is 130. Nothing heavy is imported
before the verb that needs it runs: `dipper --help` knows neither numpy nor the engine.
"""

from __future__ import annotations

import difflib
import errno
import json
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from typer.core import TyperGroup

from dipper import __version__
from dipper.errors import ConfigError, DipperError
from dipper.options import (
    ENGINE,
    ENGINE_BUT_METHOD,
    LOGGED,
    MEASURED,
    SAMPLED,
    STUDENT,
    SWEPT,
    TORCH,
    TRAINED,
    WORKLOAD,
    Bundle,
    Cold,
    Ctx,
    Debug,
    Dram,
    Given,
    Json,
    MlpDram,
    NewTokens,
    NoProbe,
    Stop,
    System,
    Threads,
    listed,
    numbers,
    with_options,
)

if TYPE_CHECKING:
    from dipper.bench import BenchCase
    from dipper.engine import Engine, EngineConfig, Plan
    from dipper.generate import GenerationStep, Sampling
    from dipper.records import EvalRecord, RunRecord
    from dipper.sources import Progress
    from dipper.tokenizer import Tokenizer

__all__ = ["app", "main"]

# click's own classes, wherever this typer keeps its click (newer ones carry a copy).
_UsageError = cast(type[Exception], typer.BadParameter.__mro__[1])
_EXIT_ERROR, _EXIT_INTERRUPTED, _EXIT_BROKEN_PIPE = 1, 130, 141


class _Group(TyperGroup):
    """The verbs; an unknown one is an error that names the nearest."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The verb that `args` begins with."""
        if args and not args[0].startswith("-") and self.get_command(ctx, args[0]) is None:
            verbs = self.list_commands(ctx)
            near = difflib.get_close_matches(args[0], verbs, n=1)
            hint = f"did you mean `dipper {near[0]}`?" if near else f"the verbs are {', '.join(verbs)}."
            raise ConfigError(f"there is no verb '{args[0]}'; {hint}")
        return super().resolve_command(ctx, args)


app = typer.Typer(
    name="dipper",
    cls=_Group,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"dipper {__version__}")
        raise typer.Exit


@app.callback()
def _dipper(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Run GLU language models larger than the DRAM they may use, by reading from flash only the weight columns needed.

    \b
    Examples:
      dipper pack "$(dipper pull smollm2)" -o smollm2.dipper
      dipper run smollm2.dipper "Why is the sky blue?" --mlp-dram 60%
    """


# ------------------------------------------------------------------------------------------------ pull, pack, inspect


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

    with _progress() as report:
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

    split = _split_options(_base_bits(base_bits), unit_bytes, energies)
    target = out if out is not None else Path(source.resolve().stem + ".dipper")
    with _progress() as report:
        told = None if report is None else partial(report, f"packing {source.name}")
        path = write(source, target, bits=bits, overwrite=force, progress=told, **split)
    print(path)


def _base_bits(text: str) -> int | tuple[int, int]:
    bits = _one_or_two("--base-bits", text)
    return bits[0] if len(bits) == 1 else (bits[0], bits[1])


def _one_or_two(name: str, text: str) -> list[int]:
    parts = listed(name, text)
    if not all(part.isdecimal() for part in parts) or len(parts) > 2:
        raise ConfigError(f"{name} {text}: write a number such as 2, or two, of input and GLU columns: 2,3.")
    return [int(part) for part in parts]


def _two_bits(name: str, text: str | None) -> tuple[int, int] | None:
    """Bits of input and of GLU columns; one number is both."""
    if text is None:
        return None
    bits = _one_or_two(name, text)
    return bits[0], bits[-1]


def _split_bits(options: dict[str, Any]) -> dict[str, Any]:
    """Base bits and units of `planes` out of their texts."""
    return {
        "base_bits": _two_bits("--base-bits", options["base_bits"]), "unit_bytes": _bytes(options["unit_bytes"]),
    }  # fmt: skip


def _bytes(text: str | None) -> int | None:
    from dipper.budget import parse_bytes

    return None if text is None else parse_bytes(text, 0)


def _split_options(base_bits: int | tuple[int, int], unit_bytes: str | None, energies: Path | None) -> dict[str, Any]:
    """The options of `pack` that are about base and residual."""
    given = [name for name, value in (("--unit-bytes", unit_bytes), ("--energies", energies)) if value is not None]
    if base_bits in (0, (0, 0)) and given:
        raise ConfigError(f"{given[0]} is about residuals, and --base-bits is 0: give base bits, or drop it")
    options: dict[str, Any] = {"base_bits": base_bits}
    if unit_bytes is not None:
        options["unit_bytes"] = _bytes(unit_bytes)
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
    _check_context(bundle, f"--window {window}", window, "a smaller one")
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
    _check_context(bundle, f"--window {window}", window, "a smaller one")

    def progress(done: int, total: int, found: str) -> None:
        _say(f"{done}/{total} {found}")

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
    run = settle(opened, _config(**engine, context=ctx)) if planned else None
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


# ------------------------------------------------------------------------------------------------ run


@app.command()
@with_options(engine=ENGINE, logged=LOGGED, sampled=SAMPLED)
def run(
    bundle: Bundle,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What to ask; - reads it from stdin.")],
    *,
    engine: Given,
    ctx: Ctx = None,
    plan: Annotated[
        str | None, typer.Option(help="Settings of `dipper plan --out FILE`, or auto: plan now.", metavar="FILE|auto")
    ] = None,
    logged: Given,
    n_tokens: NewTokens = 128,
    sampled: Given,
    stop: Stop = None,
    raw: Annotated[bool, typer.Option("--raw", help="Complete the prompt as it is, without chat template.")] = False,
    system: System = None,
    verify: Annotated[bool, typer.Option("--verify", help="First read every byte for the checksums.")] = False,
    no_probe: NoProbe = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Generate text, then show what it read, held and took.

    \b
    Examples:
      dipper run smollm2.dipper "Why is the sky blue?"
      dipper run smollm2.dipper "Why is the sky blue?" --dram 200MB --method dip-ca --density 0.6
      dipper run smollm2.dipper "Once upon a time" --raw -n 200 --temperature 0.8 --top-p 0.95 --seed 7
    """
    from dipper.bundle import Bundle as BundleFile
    from dipper.generate import stream_generate

    sampling = _sampling(**sampled)
    tokenizer = _open_tokenizer(bundle)
    tokens = _prompt_tokens(tokenizer, sys.stdin.read() if prompt == "-" else prompt, raw=raw, system=system)
    opened = BundleFile.open(bundle)
    if verify:
        opened.verify()
    if ctx is None:
        n_tokens = _fitting(len(tokens), n_tokens, opened.model.max_context)
    options = {**engine, **logged}
    if plan is not None:
        options |= _planned(plan, bundle, options)
    options["context"] = ctx if ctx is not None else min(len(tokens) + max(n_tokens, 1), opened.model.max_context)
    with _open_engine(bundle, _config(**options)) as loaded:
        steps = stream_generate(loaded, tokenizer, tokens, max_new_tokens=n_tokens, sampling=sampling, stop=stop or ())
        record = _print_steps(steps)
    _report_run(bundle, record, probe=not no_probe, as_json=as_json)


def _fitting(n_prompt: int, n_tokens: int, limit: int) -> int:
    """The new tokens asked for, or as many as the model has room for after the prompt."""
    if n_prompt > limit:
        raise ConfigError(f"The prompt has {n_prompt} tokens, but the model's context is {limit}: shorten it.")
    room = max(limit - n_prompt, 1)  # the last new token is never held
    if n_tokens <= room:
        return n_tokens
    _say(f"-n {n_tokens} is cut to {room}: the model's context is {limit}, the prompt has {n_prompt} tokens.")
    return room


def _prompt_tokens(tokenizer: Tokenizer, prompt: str, *, raw: bool, system: str | None) -> list[int]:
    if raw or not tokenizer.has_chat_template:
        if system is not None:
            why = "--raw leaves the chat template out" if raw else "this bundle has no chat template"
            raise ConfigError(f"--system needs a chat template, and {why}; put it into the prompt instead.")
        return list(tokenizer.encode(prompt))
    messages = [{"role": "system", "content": system}] if system is not None else []
    return list(tokenizer.encode_chat([*messages, {"role": "user", "content": prompt}]))


def _print_steps(steps: Iterator[GenerationStep]) -> RunRecord:
    """Streams text to stdout as it comes; returns the last step's record."""
    record = None
    for step in steps:
        if step.text:
            sys.stdout.write(step.text)
            sys.stdout.flush()
        record = step.record
    print(flush=True)
    assert record is not None, "the last step carries the record"
    return record


def _report_run(bundle: Path, record: RunRecord, *, probe: bool, as_json: bool) -> None:
    from dipper.bench import with_disk_probe
    from dipper.records import json_line
    from dipper.tables import run_table

    if probe:
        record = with_disk_probe(bundle, record)
    print(json_line(record.as_dict()) if as_json else f"\n{run_table(record)}", flush=True)


# ------------------------------------------------------------------------------------------------ chat


@app.command()
@with_options(engine=ENGINE, logged=LOGGED, sampled=SAMPLED)
def chat(
    bundle: Bundle,
    *,
    engine: Given,
    ctx: Ctx = 2048,
    logged: Given,
    n_tokens: NewTokens = 512,
    sampled: Given,
    stop: Stop = None,
    system: System = None,
    debug: Debug = False,
) -> None:
    """Talk to a model; KV and column caches are kept over turns. /reset starts anew, /quit or Ctrl-D ends.

    \b
    Examples:
      dipper chat smollm2.dipper --mlp-dram 60% --system "Answer in one sentence."
    """
    from dipper.chat import Conversation

    sampling = _sampling(**sampled)
    tokenizer = _open_tokenizer(bundle)
    with _open_engine(bundle, _config(**engine, **logged, context=ctx)) as opened:
        conversation = Conversation(opened, tokenizer, system=system)
        _say("/reset starts a new conversation, /quit or Ctrl-D ends; Ctrl-C stops an answer.")
        while (line := _read_line()) is not None:
            if line == "/quit":
                break
            if line == "/reset":
                conversation.reset()
                _say("new conversation")
            elif line.startswith("/"):
                _say(f"there is no command {line.split()[0]}; use /reset or /quit.")
            elif line:
                _turn(conversation, line, max_new_tokens=n_tokens, sampling=sampling, stop=stop or ())


def _read_line() -> str | None:
    """A line from the user; None at the end of input."""
    try:
        # The prompt goes to stderr, so that stdout holds answers only.
        print("> ", end="", file=sys.stderr, flush=True)
        return input().strip()
    except EOFError:
        print(file=sys.stderr)
        return None


def _turn(conversation: Any, line: str, **options: Any) -> None:
    """One question and its answer. What ends a turn does not end the chat, except a broken disk or bundle."""
    from dipper.tables import turn_line

    steps = None
    try:
        steps = conversation.send(line, **options)
        if conversation.was_reset and len(conversation.messages) > 1:
            _say("the conversation does not extend what is held; reading all of it again")
        record = _print_steps(steps)
    except ConfigError as error:
        _say(f"dipper: {_one_line(error)} /reset starts a new conversation.")
        return
    except KeyboardInterrupt:
        if steps is not None:
            steps.close()
        print(flush=True)
        _say("stopped")
        return
    if record.finish_reason == "context":
        _say("the context is full; /reset starts a new conversation.")
    _say(turn_line(record))


# ------------------------------------------------------------------------------------------------ eval, compare


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
    torch_method = {**torch, **_split_bits(torch), "bits": _two_bits("--bits", torch["bits"])}
    torch_only = {**torch_method, **torch_run, "kl": kl or None, "tasks": tasks}
    scoring = {"window": window, "limit": tokens, "rows_joined": wikitext, "seed": seed or 0, "out": out}
    if _on_engine(source, method, engine, torch_only):
        assert text is not None, "tasks are for PyTorch"
        _refuse(torch_only, "on the native engine", "use --torch")
        _eval_native(Path(source), text, method, options, against, scoring, as_json)
        return
    _refuse(native, "in PyTorch", "use --engine")
    if against not in (None, "dense"):
        raise ConfigError(f"--against {against} is for the native engine; in PyTorch it is --against dense.")
    chosen = _torch_method(method or "dip", {**common, **torch_method})
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


def _is_bundle(source: str) -> bool:
    """Whether a source is, or would be, a bundle: what is neither a checkpoint nor a name is, so that errors say so."""
    path = Path(source)
    if path.exists():
        return not path.is_file() and not ((path / "config.json").exists() and not (path / "bundle.json").exists())
    from dipper.sources import PACKAGED_MODELS

    is_name = source.lower() in PACKAGED_MODELS or ("/" in source and path.suffix != ".dipper")
    return not is_name and path.suffix != ".gguf"


def _refuse(options: dict[str, Any], where: str, instead: str) -> None:
    for name, value in options.items():
        if value is not None:
            raise ConfigError(f"--{name.replace('_', '-')} has no effect {where}: drop it, or {instead}.")


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
    _check_context(bundle, f"--window {window}", window, "a smaller one")
    configs = [_config(method=method or "dip", **options, context=window)]
    if against is not None:
        other = "dense-stream" if against == "dense" else against
        configs.append(_config(**_for_method(other, options), context=window))
    _print_eval(evaluate_bundle(bundle, text, configs, **scoring, on_plan=_print_plan, progress=_say_progress), as_json)


def _torch_method(method: str, options: dict[str, Any]) -> dict[str, Any]:
    """Options of a `MethodConfig`, those that were given."""
    from dipper.budget import DEFAULT_FETCH

    given = {name: value for name, value in options.items() if value is not None}
    d_in, d_glu = given.pop("d_in", None), given.pop("d_glu", None)
    if (d_in is None) != (d_glu is None):
        raise ConfigError("d_in and d_glu go together: give both or neither")
    if d_in is not None:
        given |= {"densities": (d_in, d_glu), "density": (2 * d_in + d_glu) / 3}
    elif method == "planes" and not {"density", "fetch"} & set(given):
        given["fetch"] = DEFAULT_FETCH
    elif method not in ("dense", "planes", "resident"):
        given.setdefault("density", 0.7)
    return {"name": method, **given}


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

        record = evaluate_torch(opened, text, **scoring, batch=run["batch"] or 1, progress=_say_progress)
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

        result = answer_tasks(opened, names, data, batch=run["batch"] or 1, progress=_say_answers, **asked)
    print(json_line(result) if as_json else tasks_table([result]))


@app.command()
def calibrate(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="Bundle, GGUF file, Hugging Face folder, or name.")],
    text: Annotated[Path, typer.Option(help="Calibration text (UTF-8, or .jsonl rows with `text`).", metavar="FILE")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The calibration.", metavar="FILE.npz")],
    density: Annotated[
        list[float] | None, typer.Option(help="Density of the MLP to fit; may be repeated [0.7].", metavar="D")
    ] = None,
    windows: Annotated[int, typer.Option(help="Windows of 1024 positions.", metavar="N")] = 8,
    uniform: Annotated[bool, typer.Option("--uniform", help="The same densities in every layer.")] = False,
    device: Annotated[str, typer.Option(help="Of PyTorch: cpu, cuda, ...", metavar="NAME")] = "cpu",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Fit DIP to a model on calibration text: split, densities by layer, norms, means. PyTorch; minutes on a CPU.

    \b
    Examples:
      dipper calibrate smollm2 --text c4.jsonl --density 0.6 -o smollm2.npz
      dipper run smollm2.dipper "Hello" --method dip --density 0.6 --calibration smollm2.npz
    """
    from dipper.evaluate import read_text
    from dipper.records import json_line
    from dipper.torch_model import load_model  # first: it says what to install where torch is missing

    from dipper.calibrate import calibrate as fit  # isort: skip
    from dipper.evaluate_torch import calibration_windows  # isort: skip

    held = read_text(text)
    loaded = load_model(Path(source) if Path(source).exists() else source, device=device)
    shown = calibration_windows(loaded, held.text, windows)
    made = fit(
        loaded.model,
        shown,
        model_fields=loaded.calibration_fields(),
        densities=density or [0.7],
        by_layer=not uniform,
        provenance={"text_sha256": held.sha256, "windows": len(shown)},
        progress=_fit_progress,
    )
    made.save(out)
    if as_json:
        print(json_line({"schema": "dipper-calibrate/1", "path": str(out), **made.provenance}))
        return
    for name, found in made.provenance["fit"].items():
        losses = found.get("losses", found)
        _say(f"{name}: " + ", ".join(f"{what} {loss:.4f}" for what, loss in losses.items()))


@app.command()
@with_options(options=STUDENT, train=TRAINED)
def distill(
    *,
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="Bundle, GGUF file, Hugging Face folder, or name.")],
    text: Annotated[
        list[Path], typer.Option(help="Text to train on (UTF-8, or .jsonl rows); may be repeated.", metavar="FILE")
    ],
    out: Annotated[
        Path, typer.Option("-o", "--out", help="Folder of checkpoints, the curve and the adapter.", metavar="DIR")
    ],
    held_out: Annotated[
        Path | None, typer.Option(help="Text to judge by (default: a twentieth of the windows).", metavar="FILE")
    ] = None,
    method: Annotated[str, typer.Option(help="Rule that is compensated, of `dipper.methods`.", metavar="NAME")] = "dip",
    options: Given,
    train: Given,
    window: Annotated[int, typer.Option(help="Positions of a window.", metavar="N")] = 512,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint in --out.")] = False,
    device: Annotated[str, typer.Option(help="Of PyTorch: cpu, cuda, ...", metavar="NAME")] = "cpu",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Train LoRA on the MLPs to give under a method's masks what the dense model gives. Needs the `train` extra.

    With several GPUs: accelerate launch --num-processes 2 -m dipper distill ... --device cuda

    \b
    Examples:
      dipper distill smollm2 --text c4.jsonl --density 0.5 -o smollm2-dip --device cuda --dtype bf16
      dipper eval smollm2 --text wiki.test.raw --density 0.5 --adapter smollm2-dip/adapter --kl
      dipper merge smollm2 smollm2-dip/adapter -o smollm2-merged
    """
    import dipper.torch_model  # noqa: F401 - first, since it says what to install where PyTorch is missing
    from dipper.distill import DistillConfig, distill_source, end_processes
    from dipper.methods import MethodConfig
    from dipper.records import json_line

    files = {"calibration": options.pop("calibration")}
    student = _torch_method(method, {**options, **_split_bits(options)})
    span = numbers("--densities", train.pop("densities"))
    if span and len(span) != 2:
        raise ConfigError("--densities are the lowest and the highest, as 0.5,0.7")
    given = {name: value for name, value in train.items() if value is not None}
    config = DistillConfig(method=MethodConfig(**student), densities=(span[0], span[1]) if span else None, **given)
    with _training_bar(config.steps) as report:
        result = distill_source(
            source, text, out, config, held_out=held_out, window=window, device=device, resume=resume, progress=report,
            **files,
        )  # fmt: skip
    end_processes()
    if not result.is_main:
        return
    first, best = result.held_out[0], result.best
    if as_json:
        print(json_line({"schema": "dipper-distill/1", "out": str(out), "first": first, "best": best}))
        return
    _say(
        f"held-out loss {first['loss']:.4f} -> {best['loss']:.4f} at step {best['step']:.0f} of {len(result.steps)}, "
        f"{result.seconds:.0f} s: {out / 'adapter'}"
    )


@contextmanager
def _training_bar(steps: int) -> Iterator[Any]:
    """Steps and loss as a bar on stderr from the first step on; None where stderr is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("loss {task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=Console(stderr=True))
    task = bar.add_task("-", total=steps)

    def report(done: int, total: int, loss: float) -> None:
        bar.start()  # here, since of several processes one alone is to draw
        bar.update(task, completed=done, total=total, description=f"{loss:.4f}")

    try:
        yield report
    finally:
        bar.stop()


@app.command()
def merge(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="What the adapter was trained on.")],
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="Folder of `dipper distill`'s adapter.")],
    out: Annotated[
        Path, typer.Option("-o", "--out", help="The Hugging Face folder, for `dipper pack`.", metavar="DIR")
    ],
    dtype: Annotated[str, typer.Option(help="Of the file: float16, bfloat16 or float32.", metavar="NAME")] = "float16",
    debug: Debug = False,
) -> None:
    """Put an adapter into the weights: as fast as before, and nothing held beside the model. Needs the `train` extra.

    \b
    Examples:
      dipper merge smollm2 smollm2-dip/adapter -o smollm2-merged
      dipper pack smollm2-merged --bits 4 -o smollm2-merged.dipper
    """
    import dipper.torch_model  # noqa: F401 - first, since it says what to install where PyTorch is missing
    from dipper.adapter import merge_source

    merge_source(source, adapter, out, dtype=dtype)
    _say(f"wrote {out}")


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


# ------------------------------------------------------------------------------------------------ bench, doctor


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
    _check_context(bundle, f"-p {n_prompt} -n {n_tokens}", n_prompt + n_tokens, "less of either")
    rows = run_bench(cases, reps, progress=lambda done, total, mode: _say(f"{done + 1}/{total} {mode}"))
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
    given = _for_method(mode, options)
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
        made = measure_profile(path, name=profile.stem, progress=lambda what: _say(f"measuring: {what}"))
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


# ------------------------------------------------------------------------------------------------ simulate


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
    from dipper.sweep import Sweep, draw_sweep, open_model, open_workload, run_sweep
    from dipper.tables import sim_table

    check_figure(figure)
    if "planes" not in listed("--method", swept["method"]):
        about = {name: swept[name] for name in ("fetch", "fetch_glu", "read_cost", "whole")}
        _refuse(about, f"with {swept['method']}", "add planes to --method")
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
        base_bits=None if base_bits is None else _base_bits(base_bits), unit_bytes=_bytes(unit_bytes),
    )  # fmt: skip
    devices = [_device(name, bundle) for name in listed("--device", device)]
    workload = open_workload(bundle, **{**work, "generated": bool(work["generated"])})
    records = run_sweep(
        bundle,
        workload,
        sweep,
        devices,
        context=ctx,
        threads=work["threads"],
        on_skip=lambda why: _say(f"left out: {why}"),
    )
    if figure is not None:
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
    device, kept = this_machine(bundle.path, progress=lambda what: _say(f"measuring this machine: {what}"))
    _say(f"this machine's profile: {kept}")
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


def _planned(plan: str, bundle: Path, given: dict[str, Any]) -> dict[str, Any]:
    """Options of a run from a plan's file, or from a plan made now, in a process of its own: planning takes memory."""
    import subprocess
    import tempfile

    from dipper.bundle import Bundle as BundleFile
    from dipper.planner import load_config

    steered = ("method", "density", "d_in", "d_glu", "gamma", "cache", "calibration")
    for name in steered if plan == "auto" else (*steered, "dram", "mlp_dram"):
        if given.get(name) is not None:
            raise ConfigError(f"--{name.replace('_', '-')} and --plan {plan} both decide it: drop one of them.")
    if plan != "auto":
        return load_config(plan, BundleFile.open(bundle))
    with tempfile.TemporaryDirectory(prefix="dipper-") as folder:
        kept = Path(folder) / "plan.json"
        command = [sys.executable, "-m", "dipper", "plan", str(bundle), "--out", str(kept)]
        for name in ("dram", "mlp_dram"):
            if given.get(name) is not None:
                command += [f"--{name.replace('_', '-')}", str(given[name])]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode != 0:
            raise ConfigError("there is no plan to run (see above)")
        for line in done.stdout.split("\n\n")[0].splitlines():
            _say(line)
        return load_config(kept, BundleFile.open(bundle))


# ------------------------------------------------------------------------------------------------ reproduce


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
        listed = run.list_experiments(experiments, names or ())
        told = {"schema": "dipper-experiments/1", "experiments": [one.as_dict() for one in listed]}
        print(json_line(told) if as_json else experiments_table(listed))
        return
    if every == bool(names):
        raise ConfigError("name experiments, or give --all: `dipper reproduce --list` shows what there is.")
    if check and asked.get("refresh") is not None:
        raise ConfigError("--refresh writes new results, and --check writes nothing: drop one of them")
    chosen = load_all(experiments) if every else [find(experiments, name) for name in names or ()]
    given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in asked.items()}
    request = run.Request(timed=timed, **{name: value for name, value in given.items() if value is not None})
    with _progress() as progress:
        if check:
            checks = run.check(chosen, experiments, request, say=_say, progress=progress)
            told = {"schema": "dipper-check/1", "checks": [one.as_dict() for one in checks]}
            shown, wrong = checks_table(checks), run.disagreements(checks)
        else:
            done = run.reproduce(chosen, experiments, request, say=_say, progress=progress, trace=debug)
            told = {"schema": "dipper-reproduce/1", "results": [one.as_dict() for one in done]}
            shown, wrong = reproduced_table(done), run.failures(done)
    print(json_line(told) if as_json else shown)
    if wrong is not None:
        raise DipperError(wrong)


# ------------------------------------------------------------------------------------------------ what verbs share

# Options that act with some methods only. Elsewhere they would be dropped in silence, so giving them is an error.
_ACTS_WITH = {
    "density": ("dip", "dip-ca"),
    "d_in": ("dip", "dip-ca"),
    "d_glu": ("dip", "dip-ca"),
    "fetch": ("planes",),
    "fetch_glu": ("planes",),
    "read_cost": ("planes",),
    "io_budget": ("planes",),
    "device_profile": ("auto", "planes"),
    "whole": ("planes",),
    "cache": ("dip", "dip-ca", "planes"),
    "calibration": ("dip", "dip-ca"),
    "cold": ("dip", "dip-ca", "planes"),
    "gamma": ("dip-ca",),
    "mlp_dram": ("auto", "dense-stream", "dip", "dip-ca", "planes"),
}


def _config(*, method: str | None, context: int | None, **options: Any) -> EngineConfig:
    """The options that were given, as a configuration; defaults are the engine's, and method auto."""
    from dipper.engine import METHODS, EngineConfig

    method = method or "auto"
    for name, methods in _ACTS_WITH.items():
        if options.get(name) is not None and method in METHODS and method not in methods:
            flag = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{flag} has no effect with {method}: drop it, or use --method {' or '.join(methods)}.")
    given = _for_method(method, options)
    return EngineConfig(**given) if context is None else EngineConfig(**given, context=context)


def _for_method(method: str, options: dict[str, Any]) -> dict[str, Any]:
    """The method and those of the given options that act with it."""
    acting = {k: v for k, v in options.items() if v is not None and method in _ACTS_WITH.get(k, (method,))}
    return {"method": method, **acting}


def _sampling(temperature: float, top_k: int | None, top_p: float | None, min_p: float | None, seed: int) -> Sampling:
    from dipper.generate import Sampling

    return Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)


def _check_context(bundle: Path, given: str, wanted: int, instead: str) -> None:
    """Refuses more positions than the model has, in terms of the option that asked for them."""
    from dipper.bundle import Bundle as BundleFile

    limit = BundleFile.open(bundle).model.max_context
    if wanted > limit:
        raise ConfigError(f"{given} needs a context of {wanted}, the model has {limit}: use {instead}.")


def _open_tokenizer(bundle: Path) -> Tokenizer:
    from dipper.tokenizer import Tokenizer

    return Tokenizer.open(bundle)


def _open_engine(bundle: Path, config: EngineConfig) -> Engine:
    from dipper.engine import Engine

    return Engine.open(bundle, config, on_plan=_print_plan)


def _print_plan(plan: Plan) -> None:
    """Before any weight is loaded, so that a budget can be judged before it is spent."""
    for line in plan.lines():
        _say(line)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _say_progress(done: int, total: int, value: float) -> None:
    if sys.stderr.isatty():
        end = "\n" if done == total else ""
        print(f"\rwindow {done}/{total}, perplexity {value:.3f}", end=end, file=sys.stderr, flush=True)


def _say_answers(task: str, done: int, total: int) -> None:
    if sys.stderr.isatty():
        end = "\n" if done == total else ""
        print(f"\r{task}: {done}/{total} continuations", end=end, file=sys.stderr, flush=True)


def _fit_progress(stage: str, done: int, total: int) -> None:
    if sys.stderr.isatty():
        print(f"\r{stage}: {done}/{total}   ", end="", file=sys.stderr, flush=True)


@contextmanager
def _progress() -> Iterator[Progress | None]:
    """A progress bar on stderr; none where stderr is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from dipper.sources import progress_bar

    with progress_bar() as report:
        yield report


# ------------------------------------------------------------------------------------------------ errors


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line.

    Args:
        argv: arguments without the program's name; by default the process's.

    Returns:
        The exit code: 0; 1 for an error, said in one line on stderr; 130 for Ctrl-C.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    command = typer.main.get_command(app)
    try:
        # Not command.main(): it would print usage errors over several lines, and exit with 2.
        with command.make_context("dipper", list(args) or ["--help"]) as context:
            command.invoke(context)
    except typer.Exit as request:
        return int(request.exit_code)
    except BrokenPipeError:
        # The reader of stdout has gone, as in `dipper ... | head`; Python would complain once more when it closes it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _EXIT_BROKEN_PIPE
    except (KeyboardInterrupt, typer.Abort):
        return _EXIT_INTERRUPTED
    except Exception as error:
        if "--debug" in args:
            traceback.print_exc()
        _say(f"dipper: {_describe(error)}")
        return _EXIT_ERROR
    return 0


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _describe(error: Exception) -> str:
    """What an error says to a user, in one line."""
    if isinstance(error, DipperError):
        return _one_line(error)
    if isinstance(error, _UsageError):
        return _describe_usage(error)
    if isinstance(error, MemoryError):
        return "out of memory; lower --dram, --mlp-dram or --ctx."
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename is not None else ""
        todo = {errno.ENOSPC: "; free some space", errno.EACCES: "; check its permissions"}.get(error.errno or 0, "")
        return f"{where}{error.strerror or _one_line(error)}{todo}."
    return f"internal error: {type(error).__name__}: {_one_line(error)} (--debug shows where)"


def _describe_usage(error: Any) -> str:
    """A usage error of click's, with the nearest option where one was misspelt."""
    context = error.ctx
    help_hint = f"see `{context.command_path} --help`." if context is not None else "see `dipper --help`."
    name = getattr(error, "option_name", None)
    if name is not None and hasattr(error, "possibilities") and context is not None:
        known = [option for parameter in context.command.params for option in parameter.opts]
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}? or " if near else ""
        return f"`{context.command_path}` has no option {name}; {hint}{help_hint}"
    message = " ".join(error.format_message().split()).rstrip(".")
    return f"{message}; {help_hint}"
