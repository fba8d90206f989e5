"""Verbs that generate: run, chat."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dipper.cli.app import app
from dipper.cli.shared import config_of, one_line, open_engine, open_tokenizer, sampling_of, say
from dipper.errors import ConfigError
from dipper.options import (
    ENGINE,
    LOGGED,
    SAMPLED,
    Bundle,
    Ctx,
    Debug,
    Given,
    Json,
    NewTokens,
    NoProbe,
    Stop,
    System,
    with_options,
)

if TYPE_CHECKING:
    from dipper.generate import GenerationStep
    from dipper.records import RunRecord
    from dipper.tokenizer import Tokenizer


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

    sampling = sampling_of(**sampled)
    tokenizer = open_tokenizer(bundle)
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
    with open_engine(bundle, config_of(**options)) as loaded:
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
    say(f"-n {n_tokens} is cut to {room}: the model's context is {limit}, the prompt has {n_prompt} tokens.")
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

    sampling = sampling_of(**sampled)
    tokenizer = open_tokenizer(bundle)
    with open_engine(bundle, config_of(**engine, **logged, context=ctx)) as opened:
        conversation = Conversation(opened, tokenizer, system=system)
        say("/reset starts a new conversation, /quit or Ctrl-D ends; Ctrl-C stops an answer.")
        while (line := _read_line()) is not None:
            if line == "/quit":
                break
            if line == "/reset":
                conversation.reset()
                say("new conversation")
            elif line.startswith("/"):
                say(f"there is no command {line.split()[0]}; use /reset or /quit.")
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
            say("the conversation does not extend what is held; reading all of it again")
        record = _print_steps(steps)
    except ConfigError as error:
        say(f"dipper: {one_line(error)} /reset starts a new conversation.")
        return
    except KeyboardInterrupt:
        if steps is not None:
            steps.close()
        print(flush=True)
        say("stopped")
        return
    if record.finish_reason == "context":
        say("the context is full; /reset starts a new conversation.")
    say(turn_line(record))


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
            say(line)
        return load_config(kept, BundleFile.open(bundle))
