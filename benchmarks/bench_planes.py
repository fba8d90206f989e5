"""Planes against dense streaming in the same DRAM: speed in turns of one run, perplexity through the same masks.

    python benchmarks/bench_planes.py MODEL... --text wiki.valid.raw [--held] [--ppl wiki.test.raw --ppl-tokens 8192]
        [--setting 3.6b@planes:base=2,3:fetch=.28:fetch_glu=.02:whole=27,2,26] [--setting dip:density=.7]...

Per model and budget (`--mlp-dram`, bits per MLP weight with everything counted): dense-stream on the plain bundle, and
each --setting, [BUDGET@]METHOD[:OPTION=VALUE]..., options as `EngineConfig` has them; planes on a bundle split by
base=BITS[,BITS]. Each setting generates greedily after every prompt, settings take turns by prompt. Bundles are packed
into --workdir once. The text of --text gives the prompts and, from other parts of it, the energies that --ordered goes
by.

r is tok/s over dense-stream's, r_max dense-stream's milliseconds a token over those of all-resident (dense-resident,
plain bundle): what can be won at most. `change` is perplexity against the dense model, same windows, the native engine
in blocks of tokens.
With `--held` the disk gives 0.5 GB/s and 40,000 reads a second (benchmarks/held_disk.sh).
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dipper.auto import named_layers
from dipper.budget import EngineConfig
from dipper.bundle import Bundle
from dipper.evaluate import PerplexityResult, relative_change, score_text
from dipper.evaluate_engine import EngineScorer
from dipper.options import layers
from dipper.records import Traffic
from harness import (
    bundle_for,
    finish,
    greedy,
    hold_disk,
    is_bundle,
    open_engine,
    parser,
    print_table,
    run_command,
    source_for,
    text_tokens,
)

# Options of EngineConfig that a setting may give, and a table shows.
COLUMNS: dict[str, Any] = {
    "density": float,
    "gamma": float,
    "fetch": float,
    "fetch_glu": float,
    "read_cost": int,
    "whole": layers,
}


@dataclass
class Setting:
    """What is run, a method on a bundle, and what was measured of it."""

    bundle: Path
    options: dict[str, Any]  # of EngineConfig
    base: str | None = None  # base bits, of planes
    seconds: float = 0.0
    traffic: Traffic = field(default_factory=Traffic)
    bits: float | None = None  # held, per MLP weight
    score: PerplexityResult | None = None

    def fields(self) -> dict[str, Any]:
        """The setting's columns of the table."""
        options = {name: self.options.get(name) for name in COLUMNS}
        whole = ",".join(map(str, options.pop("whole") or ()))
        return {"method": self.options["method"], "base": self.base, **options, "whole": whole}


def setting_of(spec: str, text: str, budget: str, args: Any) -> Setting | None:
    """A --setting; None where it is for another budget."""
    only, _, text = text.rpartition("@")
    if only not in ("", budget):
        return None
    method, *pairs = re.split(r":(?=[a-z_]+=)", text)
    given = dict(pair.split("=", 1) for pair in pairs)
    unknown = given.keys() - {"base", *COLUMNS}
    if unknown:
        raise SystemExit(f"--setting {text}: {', '.join(sorted(unknown))} is not of base, {', '.join(COLUMNS)}")
    base = given.pop("base", None)
    options: dict[str, Any] = {name: COLUMNS[name](value) for name, value in given.items()}
    bundle = bundle_for(spec, "source", args.workdir) if base is None else split_bundle(spec, base, args)
    if "whole" in options:  # an order and a number become the layers
        options["whole"] = named_layers(Bundle.open(bundle), EngineConfig(method=method, whole=options["whole"])).whole
    return Setting(bundle, {"method": method, "mlp_dram": budget, **options}, base)


def split_bundle(spec: str, base: str, args: Any) -> Path:
    """The split bundle of a checkpoint, with --ordered by energies on --text, packed into the workdir once."""
    from dipper.bundle import pack
    from dipper.calibration import read_energies
    from dipper.energies import measure_energies, write_energies

    plain = bundle_for(spec, "source", args.workdir)
    order = "-ordered" if args.ordered else ""
    target = args.workdir / f"{plain.name.removesuffix('.dipper')}-base{base}-{args.unit_bytes}{order}.dipper"
    if is_bundle(str(target)):
        return target
    kept = args.workdir / f"{plain.name.removesuffix('.dipper')}-energies.npz"
    energies = None
    if args.ordered:
        if not kept.exists():
            print(f"measuring the energies of {plain.name}", file=sys.stderr)
            write_energies(kept, measure_energies(plain, args.text, limit=args.energy_tokens))
        energies = read_energies(kept)
    print(f"packing {target.name}", file=sys.stderr)
    bits = [int(b) for b in base.split(",")]
    return pack(
        source_for(spec, args.workdir), target, base_bits=(bits[0], bits[-1]), unit_bytes=args.unit_bytes,
        energies=energies, tokenizer=not spec.startswith("synthetic:"),
    )  # fmt: skip


def prompts_of(spec: str, plain: Path, args: Any) -> list[list[int]]:
    if spec.startswith("synthetic:"):
        random = np.random.default_rng(0)
        return [random.integers(0, 1000, args.prompt).tolist() for _ in range(args.prompts)]
    ids, bos = text_tokens(plain, args.text)
    start = len(ids) // 2  # not where energies come from
    head = [] if bos is None else [bos]
    step = (len(ids) - start) // args.prompts
    return [head + ids[start + i * step :][: args.prompt - len(head)] for i in range(args.prompts)]


def measure(settings: list[Setting], prompts: list[list[int]], args: Any) -> None:
    """Every setting's decode, in turns by prompt; engines are opened for a turn, so that one holds memory at a time."""
    for i, prompt in enumerate(prompts):
        for setting in settings:
            engine = open_engine(
                setting.bundle, context=args.prompt + args.tokens + 1, threads=args.threads, **setting.options
            )
            with engine:
                setting.seconds += greedy(engine, prompt, args.tokens).decode_s
                setting.traffic.add(engine.counters())
                setting.bits = engine.plan.mlp_bits_per_weight
        print(f"prompt {i + 1} of {len(prompts)}", file=sys.stderr)


def score(setting: Setting, args: Any) -> PerplexityResult:
    """Perplexity as `dipper eval` measures it."""
    ids, bos = text_tokens(setting.bundle, args.ppl)
    with open_engine(setting.bundle, context=args.window, threads=args.threads, **setting.options) as engine:
        return score_text(EngineScorer(engine), ids, window=args.window, bos_id=bos, limit=args.ppl_tokens)


def row_of(model: str, budget: str, setting: Setting, stream: Setting, resident: Setting) -> dict[str, Any]:
    row: dict[str, Any] = {"model": model, "budget": budget, **setting.fields()}
    traffic = setting.traffic
    if traffic.n_tokens:
        row |= {
            "bits": setting.bits,
            "token_ms": 1e3 * setting.seconds / traffic.n_tokens,
            "r": stream.seconds / setting.seconds,
            "r_max": stream.seconds / resident.seconds,
            **traffic.fields(),
            "read_gbps": traffic.flash_bytes / setting.seconds / 1e9,
        }
    if setting.score is not None and resident.score is not None:
        row |= relative_change(setting.score, resident.score)
    return row


def run_model(spec: str, args: Any) -> list[dict[str, Any]]:
    plain = bundle_for(spec, "source", args.workdir)
    prompts = prompts_of(spec, plain, args)
    rows = []
    dense: PerplexityResult | None = None
    for budget in args.mlp_dram:
        resident = Setting(plain, {"method": "dense-resident"})
        stream = Setting(plain, {"method": "dense-stream", "mlp_dram": budget})
        given = [s for s in (setting_of(spec, text, budget, args) for text in args.setting) if s is not None]
        settings = [resident, stream, *given]
        if args.tokens:
            measure(settings, prompts, args)
        if args.ppl and not spec.startswith("synthetic:"):
            dense = dense or score(resident, args)
            resident.score = stream.score = dense
            for setting in given:
                setting.score = score(setting, args)
        made = [row_of(plain.name, budget, setting, stream, resident) for setting in settings]
        print_table(made)
        rows += made
    return rows


def main() -> None:
    cli = parser(__doc__)
    cli.add_argument("models", nargs="+", metavar="MODEL", help="GGUF file, name, or synthetic:SHAPE")
    cli.add_argument("--text", type=Path, help="text for energies and prompts; never the test text")
    cli.add_argument("--mlp-dram", action="append", help="budget; may be repeated [2.43b 2.7b 3.6b]")
    cli.add_argument(
        "--setting", action="append", metavar="[BUDGET@]METHOD[:OPTION=VALUE]...",
        help="may be repeated [planes:base=3:fetch=.1]",
    )  # fmt: skip
    cli.add_argument("--unit-bytes", type=int, default=4096)
    cli.add_argument("--ordered", action="store_true", help="split bundles ordered by column energies on --text")
    cli.add_argument("--tokens", type=int, default=64, help="decoded tokens per prompt; 0: perplexity alone [64]")
    cli.add_argument("--prompt", type=int, default=64, help="tokens of a prompt [64]")
    cli.add_argument("--prompts", type=int, default=8)
    cli.add_argument("--energy-tokens", type=int, default=8192)
    cli.add_argument("--ppl", type=Path, help="also perplexity on this text")
    cli.add_argument("--ppl-tokens", type=int, default=8192)
    cli.add_argument("--window", type=int, default=1024)
    cli.add_argument("--threads", type=int, default=2)
    cli.add_argument("--workdir", type=Path, default=Path("bundles"))
    cli.add_argument("--held", action="store_true", help="decode under benchmarks/held_disk.sh")
    args = cli.parse_args()
    args.mlp_dram = args.mlp_dram or ["2.43b", "2.7b", "3.6b"]
    args.setting = args.setting or ["planes:base=3:fetch=.1"]
    bundles = [bundle_for(spec, "source", args.workdir) for spec in args.models]
    if args.held:
        sys.stdout.flush()
        hold_disk(bundles[0])
    rows = [row for spec in args.models for row in run_model(spec, args)]
    finish(
        "planes", rows, bundles, threads=args.threads, n_tokens=args.tokens * args.prompts, unit_bytes=args.unit_bytes,
        ppl_tokens=args.ppl_tokens if args.ppl else None,
    )  # fmt: skip


if __name__ == "__main__":
    run_command(main)
