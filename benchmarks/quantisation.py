"""What packing a 16-bit source at 8 and 4 bits costs in perplexity, in the native engine.

    python benchmarks/quantisation.py MODEL --text wiki.test.raw [--windows 32] [--reference]

MODEL is a bundle or a name that `dipper pull` knows. Its weights are dequantised to a Hugging Face folder in f16, which
is then packed with --bits source (all of it f16: what the others are compared with), 16, 8 and 4 (the MLP's; attention
and head at 8). `--reference` adds transformers in fp32 on the f16 weights. Needs the `torch` extra.
"""

from __future__ import annotations

import gc
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from harness import ROOT, bundle_for, finish, open_engine, parser, print_table, run_command, text_tokens

sys.path.insert(0, str(ROOT / "tests"))  # the reference is the tests' own

LIMITS = {"8": 0.003, "4": 0.06}  # largest relative change of perplexity against the f16 folder


def rope_theta(inv_freq: np.ndarray) -> float:
    """The base of a plain rope table, since a Hugging Face folder states the base and not the frequencies."""
    dim = 2 * len(inv_freq)
    theta = float(f"{float(inv_freq[1]) ** (-dim / 2):.5g}")
    plain = theta ** (-np.arange(0, dim, 2) / dim)
    if not np.allclose(plain, inv_freq, rtol=1e-5, atol=0.0):
        raise SystemExit("error: the model's rope is scaled; this benchmark writes plain rope only")
    return theta


def write_f16_folder(bundle_path: Path, folder: Path) -> None:
    """A bundle's dequantised weights as a Hugging Face folder, whole or not at all."""
    import torch

    from dipper.bundle import Bundle
    from dipper.torch_model import hf_model_from_bundle

    bundle = Bundle.open(bundle_path)
    header = bundle.header["model"]
    if len(header["rope"]) != 1 or header["rope"][0]["long"] is not None:
        raise SystemExit("error: the model has several rope tables; this benchmark writes plain rope only")
    model = hf_model_from_bundle(bundle).to(torch.float16)
    for name, weight in model.named_parameters():
        if not torch.isfinite(weight).all():
            raise SystemExit(f"error: {name} does not fit in f16")
    theta = rope_theta(bundle.dequantise(header["rope"][0]["short"]))
    model.config.rope_parameters = {"rope_type": "default", "rope_theta": theta}
    model.config.bos_token_id = header["bos_id"]
    model.config.eos_token_id = header["eos_ids"]
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    for name in ("tokenizer.json", "chat_template.jinja"):
        if (bundle_path / name).exists():
            shutil.copy(bundle_path / name, partial / name)
    partial.rename(folder)


def engine_result(bundle: Path, ids: list[int], bos_id: int | None, args: Any) -> Any:
    """The bundle's `dipper.evaluate.PerplexityResult`."""
    from dipper.evaluate_engine import perplexity

    engine = open_engine(bundle, method="dense-resident", context=args.window, threads=args.threads)
    return perplexity(engine, ids, window=args.window, bos_id=bos_id, limit=args.window * args.windows)


def reference_perplexity(bundle_path: Path, windows: Sequence[list[int]], threads: int) -> float:
    import torch

    from dipper.bundle import Bundle
    from dipper.torch_model import hf_model_from_bundle
    from reference import reference_nll

    torch.set_num_threads(threads)
    model = hf_model_from_bundle(Bundle.open(bundle_path), attention="sdpa")
    return float(np.exp(np.concatenate([reference_nll(model, tokens) for tokens in windows]).mean()))


def main() -> None:
    cli = parser(__doc__)
    cli.add_argument("model", metavar="MODEL", help="bundle, or a name that `dipper pull` knows")
    cli.add_argument("--text", type=Path, required=True, help="wiki.test.raw of WikiText-2 raw")
    cli.add_argument("--workdir", type=Path, default=Path("bundles"), help="where folders and bundles go [bundles]")
    cli.add_argument("--window", type=int, default=1024)
    cli.add_argument("--windows", type=int, default=32)
    cli.add_argument("--threads", type=int, default=2)
    cli.add_argument("--reference", action="store_true", help="add transformers in fp32 (minutes)")
    args = cli.parse_args()

    from dipper.evaluate import cut_windows, relative_change

    source = bundle_for(args.model, "source", args.workdir)
    folder = args.workdir / f"{source.name.removesuffix('.dipper')}-f16"
    if not folder.exists():
        write_f16_folder(source, folder)
        gc.collect()
    ids, bos_id = text_tokens(source, args.text)
    bundles = {bits: bundle_for(str(folder), bits, args.workdir) for bits in ("source", "16", "8", "4")}

    reference = None
    if args.reference:
        windows = cut_windows(ids, args.window, bos_id=bos_id, limit=args.window * args.windows)
        reference = reference_perplexity(bundles["source"], windows, args.threads)
    rows: list[dict[str, Any]] = []
    base = None
    for bits, bundle in bundles.items():
        result = engine_result(bundle, ids, bos_id, args)
        base = base or result
        change = relative_change(result, base)
        limit = LIMITS.get(bits)
        rows.append(
            {
                "bits": bits,
                "bundle_mb": sum(file.stat().st_size for file in bundle.iterdir()) / 1e6,
                "perplexity": result.perplexity,
                "vs_source": change["relative"],
                "stderr": change["relative_stderr"],
                "vs_reference": None if reference is None else result.perplexity / reference - 1,
                "limit": limit,
                "ok": None if limit is None else change["relative"] <= limit,
            }
        )
        print(f"{bits}: {result.perplexity:.4f} in {result.seconds:.0f} s", file=sys.stderr)
    print_table(rows)
    more = {"n_tokens": base.n_tokens, "window": args.window, "tokens_sha256": base.tokens_sha256}
    finish("quantisation", rows, list(bundles.values()), model=source.name, reference_perplexity=reference, **more)


if __name__ == "__main__":
    run_command(main)
