"""How far the native engine is from transformers in fp32 that holds the bundle's own dequantised weights.

    python benchmarks/fidelity.py MODEL... --text wiki.test.raw [--bits source --bits 16] [--workdir DIR]

MODEL is a bundle or a name that `dipper pull` knows. For each bundle:
  dense         logits of one window: max error / max logit, same top-1; perplexity of both
  dip, forced   the reference's masks given to the engine: max error / max logit
  dip, free     engine and reference each with their own masks: paired difference of the nll of every token. Top-k is
                chaotic, so the difference is judged by its own standard error (`sigma`): means of blocks of 128
                tokens are taken as independent, since neighbours share a state (blocks of 32 are too short: with them
                the control of one window was 3.03 sigma from itself)
  dip, control  the reference against itself with attention summed in another order: what chaos alone does

Needs the `torch` extra. 16-bit bundles must agree within 1e-3, others within 2e-2 (their kernels take inputs as 16-bit
integers).
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import numpy as np

from harness import (
    ROOT,
    Windows,
    bundle_for,
    finish,
    is_bundle,
    open_engine,
    parser,
    print_table,
    run_command,
    text_windows,
)

sys.path.insert(0, str(ROOT / "tests"))  # the reference is the tests' own

BLOCK = 128


def compare_logits(engine: Any, tokens: list[int], chunks: Any, masks: Any = None) -> dict[str, float]:
    """Engine and reference side by side, a chunk of positions at a time: all logits of a large vocabulary are 1 GiB."""
    error = peak = same = 0.0
    position = 0
    engine.reset()
    for chunk in chunks:
        part = slice(position, position + len(chunk))
        forced = None if masks is None else [(mask_in[part], mask_glu[part]) for mask_in, mask_glu in masks]
        ours = engine.logits(tokens[part], masks=forced)
        error = max(error, float(np.abs(ours - chunk).max()))
        peak = max(peak, float(np.abs(chunk).max()))
        same += float((ours.argmax(1) == chunk.argmax(1)).sum())
        position += len(chunk)
    return {"max_error": error, "max_logit": peak, "relative_error": error / peak, "same_top1": same / position}


def paired(ours: list[np.ndarray], theirs: list[np.ndarray]) -> dict[str, float]:
    """Mean difference of nll with its standard error from block means, and both perplexities."""
    blocks = []
    for a, b in zip(ours, theirs, strict=True):
        difference = a - b
        n_blocks = max(len(difference) // BLOCK, 2)
        blocks += [part.mean() for part in np.array_split(difference, n_blocks)]
    a, b = np.concatenate(ours), np.concatenate(theirs)
    mean = float((a - b).mean())
    sigma = float(np.std(blocks, ddof=1) / np.sqrt(len(blocks)))
    return {
        "ppl_engine": float(np.exp(a.mean())),
        "ppl_reference": float(np.exp(b.mean())),
        "ppl_change": float(np.expm1(mean)),
        "nll_difference": mean,
        "sigma": sigma,
        "z": mean / sigma if sigma > 0 else 0.0,
    }


def dense_case(engine: Any, model: Any, windows: Windows, is_16_bit: bool) -> dict[str, Any]:
    from reference import logit_chunks, reference_nll

    tokens = windows.tokens[0]
    row = compare_logits(engine, tokens, logit_chunks(model, tokens))
    engine.reset()
    row |= paired([np.asarray(engine.score(tokens), np.float64)], [reference_nll(model, tokens)])
    limit, top1 = (1e-3, 0.999) if is_16_bit else (2e-2, 0.99)
    row["ok"] = row["relative_error"] <= limit and row["same_top1"] >= top1 and abs(row["ppl_change"]) <= 1e-3
    return row


def forced_case(engine: Any, model: Any, tokens: list[int], density: float) -> dict[str, Any]:
    from reference import dip, logit_chunks

    with dip(model, d_in=density, d_glu=density) as run:
        chunks = logit_chunks(model, tokens)
        chunks = itertools.chain([next(chunks)], chunks)  # the masks are complete once the first logits are
        row = compare_logits(engine, tokens, chunks, run.masks)
    row["ok"] = row["relative_error"] <= 1e-3
    return row


def free_cases(engine: Any, model: Any, windows: Windows, density: float, control: bool) -> dict[str, dict[str, Any]]:
    from reference import dip, reference_nll

    ours, theirs, again = [], [], []
    for tokens in windows.tokens:
        engine.reset()
        engine.reset_cache()
        ours.append(np.asarray(engine.score(tokens), np.float64))
        with dip(model, d_in=density, d_glu=density):
            theirs.append(reference_nll(model, tokens))
            if control:
                model.set_attn_implementation("sdpa")
                again.append(reference_nll(model, tokens))
                model.set_attn_implementation("eager")
    cases = {"free": paired(ours, theirs)}
    cases["free"]["ok"] = abs(cases["free"]["z"]) <= 3.0
    if control:
        cases["control"] = paired(again, theirs)
    return cases


def measure(path: Path, args: Any) -> list[dict[str, Any]]:
    from dipper.bundle import Bundle
    from dipper.torch_model import hf_model_from_bundle

    bundle = Bundle.open(path)
    model = hf_model_from_bundle(bundle, context=args.window)
    bits = str(bundle.header["source"]["bits"])
    windows = text_windows(path, args.text, args.window, args.windows)
    rows: list[dict[str, Any]] = []

    def add(case: str, density: float, row: dict[str, Any]) -> None:
        labels = {"model": path.name, "bits": bits, "case": case, "density": density}
        rows.append(labels | {"tokens_sha256": windows.sha256} | row)
        print(f"{path.name} {case} {density:g} done", file=sys.stderr)

    engine = open_engine(path, method="dense-resident", context=args.window, threads=args.threads)
    add("dense", 1.0, dense_case(engine, model, windows, bits == "16"))
    del engine
    for density in args.density:
        engine = open_engine(path, method="dip", density=density, context=args.window, threads=args.threads)
        add("forced", density, forced_case(engine, model, windows.tokens[0], density))
        for case, row in free_cases(engine, model, windows, density, args.control).items():
            add(case, density, row)
        del engine
    return rows


def main() -> None:
    cli = parser(__doc__)
    cli.add_argument("models", nargs="+", metavar="MODEL", help="bundle, or a name that `dipper pull` knows")
    cli.add_argument("--text", type=Path, required=True, help="wiki.test.raw of WikiText-2 raw")
    cli.add_argument(
        "--bits", action="append", help="how to pack a MODEL that is no bundle; may be repeated [source 16]"
    )
    cli.add_argument("--workdir", type=Path, default=Path("bundles"), help="where bundles are packed [bundles]")
    cli.add_argument("--window", type=int, default=1024)
    cli.add_argument("--windows", type=int, default=4, help="windows of the free-running comparison [4]")
    cli.add_argument("--density", type=float, action="append", help="may be repeated [.8 .6 .5]")
    cli.add_argument("--control", action="store_true", help="add the reference against itself")
    cli.add_argument("--threads", type=int, default=2)
    args = cli.parse_args()
    args.density = args.density or [0.8, 0.6, 0.5]

    import torch

    torch.set_num_threads(args.threads)
    bundles = []
    for spec in args.models:
        every_bits = ["as it is"] if is_bundle(spec) else args.bits or ["source", "16"]
        bundles += [bundle_for(spec, bits, args.workdir) for bits in every_bits]
    rows = [row for bundle in bundles for row in measure(bundle, args)]
    columns = [
        "model",
        "bits",
        "case",
        "density",
        "relative_error",
        "same_top1",
        "ppl_engine",
        "ppl_reference",
        "ppl_change",
        "sigma",
        "z",
        "ok",
    ]
    print_table([{c: row.get(c) for c in columns} for row in rows])
    finish("fidelity", rows, bundles, window=args.window, windows=args.windows)


if __name__ == "__main__":
    run_command(main)
