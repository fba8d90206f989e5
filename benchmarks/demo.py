"""`make demo`: a real model in all four modes with the same DRAM for its MLP, then what pruning costs in perplexity.

Each mode runs once, in a process of its own, as `dipper run` would by hand; `make bench` is for timings to rely on.
dense-resident is the reference that holds everything. Prints a table, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from dipper.bundle import pack
from dipper.engine import EngineConfig
from dipper.errors import DipperError
from dipper.evaluate_engine import evaluate_bundle
from dipper.records import EvalRecord, RunRecord, json_line
from dipper.sources import progress_bar, pull
from dipper.tables import compare_table

ROOT = Path(__file__).resolve().parent.parent
TEXT = ROOT / "tests" / "data" / "wikitext2_test_head.txt"
MODES = ("dense-resident", "dense-stream", "dip", "dip-ca")  # auto and planes need a budget and a bundle of their own
PROMPT = "Why does the sea look blue, although a glass of water does not?"


def bundle_of(model: str) -> Path:
    """Fetches and packs a model, each once."""
    out = ROOT / "models" / f"{model.rsplit('/', 1)[-1]}.dipper"
    if not out.exists():
        out.parent.mkdir(exist_ok=True)
        with progress_bar() as report:
            source = pull(model, progress=report)
            pack(source, out, progress=lambda done, total: report(f"packing {source.name}", done, total))
    return out


def run(bundle: Path, method: str, n_tokens: int, mlp_dram: str) -> RunRecord:
    """One `dipper run`, its text shown as it comes."""
    share = [] if method == "dense-resident" else ["--mlp-dram", mlp_dram]
    arguments = ["run", str(bundle), PROMPT, "--method", method, "-n", str(n_tokens), "--json", *share]
    print(f"\n$ dipper {' '.join(arguments[:2])} {PROMPT!r} {' '.join(arguments[3:])}", flush=True)
    line = ""
    with subprocess.Popen([sys.executable, "-m", "dipper", *arguments], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        while character := process.stdout.read(1):
            line = character if line.endswith("\n") else line + character
            if not line.startswith("{"):  # the record comes last, on a line of its own
                print(character, end="", flush=True)
    if process.returncode != 0:
        raise SystemExit(process.returncode)  # it said why
    return RunRecord.from_dict(json.loads(line))


def perplexity(bundle: Path, method: str, n_tokens: int, mlp_dram: str) -> EvalRecord:
    """WikiText-2 perplexity of one mode, in the native engine."""
    config = EngineConfig(method=method, mlp_dram=mlp_dram, context=1024)
    return evaluate_bundle(bundle, TEXT, [config], window=1024, limit=n_tokens, rows_joined=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="what `dipper pull` takes (default smollm2)")
    parser.add_argument("--mlp-dram", default="60%", help="DRAM of the MLP, as `dipper run` takes it (default 60%%)")
    parser.add_argument("-n", "--n-tokens", type=int, default=64, help="new tokens of a run (default 64)")
    parser.add_argument("--eval-tokens", type=int, default=4096, help="tokens that are scored (default 4096)")
    options = parser.parse_args()
    bundle = bundle_of(options.model)
    runs = [run(bundle, method, options.n_tokens, options.mlp_dram) for method in MODES]
    print(f"\nscoring {options.eval_tokens} tokens of WikiText-2, dense and pruned ...", flush=True)
    scores = [perplexity(bundle, m, options.eval_tokens, options.mlp_dram) for m in ("dense-stream", "dip")]
    print(f"\n{compare_table(runs, {s.method: s.perplexity for s in scores})}\n")
    print(f"one run each, density {runs[-1].density:g}, MLP at {options.mlp_dram} of its bytes (dense-resident: all)\n")
    print(json_line({"runs": [r.as_dict() for r in runs], "perplexity": [s.as_dict() for s in scores]}))


if __name__ == "__main__":
    try:
        main()
    except DipperError as error:
        sys.exit(f"dipper: {error}")
