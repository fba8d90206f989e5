"""Verbs that fit: calibrate, distill, merge."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dipper.cli.app import app
from dipper.cli.shared import fit_progress, pytorch_method, say, split_bits
from dipper.errors import ConfigError
from dipper.options import STUDENT, TRAINED, Debug, Given, Json, numbers, with_options

if TYPE_CHECKING:
    pass


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
        progress=fit_progress,
    )
    made.save(out)
    if as_json:
        print(json_line({"schema": "dipper-calibrate/1", "path": str(out), **made.provenance}))
        return
    for name, found in made.provenance["fit"].items():
        losses = found.get("losses", found)
        say(f"{name}: " + ", ".join(f"{what} {loss:.4f}" for what, loss in losses.items()))


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
    student = pytorch_method(method, {**options, **split_bits(options)})
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
    say(
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
    say(f"wrote {out}")
