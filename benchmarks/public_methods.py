"""Our `teal` and `wina` beside the code that their authors published, on one model and the same tokens.

    git clone https://github.com/FasterDecoding/TEAL && git -C TEAL checkout 5baaec8
    git clone https://github.com/microsoft/wina && git -C wina checkout 8153dbf
    python benchmarks/public_methods.py MODEL --teal TEAL --wina wina --text wiki.test.raw --calibration c4.jsonl

MODEL is anything that `load_model` takes whose MLPs have gate_proj, up_proj and down_proj. Nothing of the two
repositories is copied: their modules are imported from the folders, and what runs as "theirs" is their MLP forward,
from histograms that their code builds of the same calibration windows. Rules, by sparsity:

  teal           TEAL's repository: histograms of the signed activations, threshold at the quantile (1 + s) / 2
  teal-abs       WINA's repository, its TEAL with thresholds: quantile s of the magnitudes, in fp16
  wina           WINA's repository, top-k, every matrix by the norms of its own columns, as the paper's formula
  wina-released  the same as the code is released: norms of gate; up and down without (TEAL's scores)
  teal-control   with --control: our thresholds times 1 + 1e-4, what an immaterial change does to the perplexity

Both repositories leave a part of a prompt dense (TEAL the first half, WINA the first hundredth). Here every token is
pruned, as in generation: their functions are shown the tokens one by one. `wina` is compared without the rotation of
weights that WINA's `--transform` adds. Each row has both densities, the share of mask entries that agree on the dense
model's activations, and both perplexities; `ok` where they are within 0.5 %, and for `wina` at 99.5 % equal entries.

Needs the `torch` extra and what the repositories import (transformers, tqdm; `datasets` is not needed). Runs on a CPU.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np

from harness import fail, finish, parser, print_table, run_command

PROJECTIONS = ("gate", "up", "down")
MAX_PPL_CHANGE = 5e-3
MIN_SAME_ENTRIES = 0.995


def import_from(root: Path, *names: str) -> list[ModuleType]:
    """Modules of a repository: both have a package `utils`, so none stays importable."""
    for name in names:
        if not (root / (name.replace(".", "/") + ".py")).is_file():
            fail(f"{root} has no {name.replace('.', '/')}.py: give a checkout of the repository, see --help")
    path = list(sys.path)
    sys.path.insert(0, str(root))
    try:
        return [importlib.import_module(name) for name in names]
    finally:
        sys.path[:] = path
        for name in [n for n in sys.modules if n.partition(".")[0] in ("utils", "teal", "wina")]:
            del sys.modules[name]


@contextlib.contextmanager
def cuda_is_cpu() -> Iterator[None]:
    """Both repositories sort on "cuda" by name; here that is wherever the tensor is."""
    import torch

    to = torch.Tensor.to

    def stay(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        return tensor if args == ("cuda",) else to(tensor, *args, **kwargs)

    with mock.patch.object(torch.Tensor, "to", stay):
        yield


class Theirs:
    """Their MLP forward around every MLP of a model.

    Args:
        root: checkout of the repository.
        package: "teal" or "wina".
        mlps: modules with gate_proj, up_proj, down_proj and act_fn; they stay as they are.
        options: of their `_monkeypatch_mlp`.
        own_norms: WINA's norms for up and down too.
    """

    def __init__(
        self, root: Path, package: str, mlps: list[Any], work: Path, options: dict[str, Any], own_norms: bool = False
    ) -> None:
        import torch

        utils, self.code = import_from(root, "utils.utils", f"{package}.mlp")
        self.files = [Path(str(module.__file__)) for module in (utils, self.code)]
        self.counts = dict.fromkeys(PROJECTIONS, 0.0)
        self.calls = 0
        theirs = self

        class EveryToken(utils.SparsifyFn):
            """Their function on tokens one by one; no token is spared as part of a prompt."""

            def forward(self, x: Any) -> Any:
                kept = super().forward(x.reshape(-1, 1, x.shape[-1])).reshape(x.shape)
                name = PROJECTIONS[theirs.calls % 3]  # they call gate, up, down, layer after layer
                theirs.calls += 1
                theirs.counts[name] += float((kept != 0).float().mean())
                return kept

        self.code.SparsifyFn = EveryToken
        self.options, self.own_norms, self.work = options, own_norms, work
        self.shells = []
        for mlp in mlps:
            shell = torch.nn.Module()
            for name in ("gate_proj", "up_proj", "down_proj", "act_fn"):
                setattr(shell, name, getattr(mlp, name))
            self.shells.append(shell)

    def patch(self, grabbing: bool) -> None:
        """Puts their forward on the shells; it reads the histograms unless it is grabbing them."""
        for layer, shell in enumerate(self.shells):
            self.code._monkeypatch_mlp(shell, str(self.work / str(layer)), grabbing_mode=grabbing, **self.options)
            if self.own_norms:
                shell.up_norm_by_column = shell.up_proj.weight.norm(dim=0)
                shell.down_norm_by_column = shell.down_proj.weight.norm(dim=0)

    def calibrate(self, layer: int, x: Any) -> Any:
        """Shows a layer's inputs [1, T, D]; the MLP's own outputs."""
        return self.shells[layer].forward(x)

    def build(self) -> None:
        """Histograms of what was shown, into their files, and the rules from these."""
        with cuda_is_cpu():
            for shell in self.shells:
                shell.activation_module.find_histogram()
                shell.activation_module.save_histogram()
        self.patch(grabbing=False)

    def set_sparsity(self, sparsity: float) -> None:
        for shell in self.shells:
            for function in shell.sparse_fns.values():
                function.set_threshold(sparsity)
        self.counts, self.calls = dict.fromkeys(PROJECTIONS, 0.0), 0

    def mask(self, layer: int, which: int, values: Any) -> Any:
        """bool [..., n], which of these inputs their function keeps."""
        shell, name = self.shells[layer], PROJECTIONS[which]
        norms = getattr(shell, f"{name}_norm_by_column", None)
        return shell.sparse_fns[name](values if norms is None else values * norms) != 0

    def level_ratios(self, ours: Any) -> list[float]:
        """p10, p50 and p90 over all matrices of our threshold over theirs."""
        pairs = zip(ours.rules, self.shells, strict=True)
        every = [
            selector.level / shell.sparse_fns[name].threshold
            for rule, shell in pairs
            for selector, name in zip(rule._selectors, PROJECTIONS, strict=True)
        ]
        return np.percentile(every, [10, 50, 90]).tolist()

    def densities(self) -> list[float]:
        """Mean share of gate, up and down kept since `set_sparsity`."""
        return [3 * self.counts[name] / self.calls for name in PROJECTIONS]


@contextlib.contextmanager
def forwards(mlps: list[Any], calls: list[Callable[[Any], Any]]) -> Iterator[None]:
    """Other forwards on the modules for as long as the context lasts."""
    for mlp, call in zip(mlps, calls, strict=True):
        mlp.forward = call
    try:
        yield
    finally:
        for mlp in mlps:
            del mlp.forward


def window_nll(model: Any, windows: list[Any]) -> np.ndarray:
    """Mean nll per token of every window [1, T]."""
    from torch.nn import functional

    nll = [functional.cross_entropy(model(ids, use_cache=False).logits[0, :-1].float(), ids[0, 1:]) for ids in windows]
    return np.array([float(value) for value in nll])


def same_entries(mlps: list[Any], ours: Any, theirs: Theirs, model: Any, windows: list[Any]) -> list[float]:
    """Share of equal mask entries of gate, up and down, on the activations of the dense model."""
    import torch

    same, n_calls = torch.zeros(3, dtype=torch.float64), 0

    def comparing(layer: int) -> Callable[[Any], Any]:
        rule = ours.rules[layer]

        def call(x: Any) -> Any:
            nonlocal n_calls
            n_calls += 1
            h = rule.glu.hidden(x)
            for which, values in enumerate((x, x, h)):
                mask = rule._selectors[which].mask(rule._scores(values, which))
                same[which] += float((mask == theirs.mask(layer, which, values)).float().mean())
            return rule.glu.output(h)

        return call

    with forwards(mlps, [comparing(layer) for layer in range(len(mlps))]):
        for ids in windows:
            model(ids, use_cache=False)
    return (same / n_calls).tolist()


def measure(args: Any, model: Any, calibration: list[Any], windows: list[Any]) -> tuple[list[dict[str, Any]], Any]:
    from dipper.methods import MethodConfig
    from dipper.sparsify import sparsify_

    mlps = [module for module in model.modules() if all(hasattr(module, f"{name}_proj") for name in PROJECTIONS)]
    if not mlps:
        fail("the model has no MLP with gate_proj, up_proj and down_proj")
    dense = window_nll(model, windows)
    print(f"dense {np.exp(dense.mean()):.4f}", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:

        def of(root: Path, package: str, name: str, *, own_norms: bool = False, **options: Any) -> Theirs:
            return Theirs(root, package, mlps, Path(folder) / name, options, own_norms)

        public = {
            "teal": of(args.teal, "teal", "teal"),
            "teal-abs": of(args.wina, "wina", "teal-abs", sparse_mode="teal", mask_by="threshold"),
            "wina": of(args.wina, "wina", "wina", sparse_mode="wina", mask_by="topk", own_norms=True),
            "wina-released": of(args.wina, "wina", "wina-released", sparse_mode="wina", mask_by="topk"),
        }
        for name, theirs in public.items():
            by_threshold = name.startswith("teal")
            theirs.patch(grabbing=by_threshold)
            if by_threshold:
                with forwards(mlps, [shell.forward for shell in theirs.shells]):
                    for ids in calibration:
                        model(ids, use_cache=False)
                theirs.build()
            print(f"{name} ready", file=sys.stderr)

    rows: list[dict[str, Any]] = []
    for sparsity in args.sparsity:
        for rule in ("teal", "wina"):
            with sparsify_(model, MethodConfig(rule, density=1 - sparsity), calibration=calibration) as ours:
                ours_nll, density = window_nll(model, windows), ours.touched
                for name, theirs in public.items():
                    if name.partition("-")[0] != rule:
                        continue
                    with ours.paused():
                        theirs.set_sparsity(sparsity)
                        same = same_entries(mlps, ours, theirs, model, windows[: args.mask_windows])
                        theirs.set_sparsity(sparsity)
                        with forwards(mlps, [shell.forward for shell in theirs.shells]):
                            nll = window_nll(model, windows)
                    ratios = theirs.level_ratios(ours) if rule == "teal" else None
                    row = row_of(name, sparsity, dense, ours_nll, density, nll, theirs.densities(), same, ratios)
                    rows.append(row)
                    print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}, file=sys.stderr)
                if rule == "teal" and args.control:
                    ours.reset_meters()
                    for selector in (s for part in ours.rules for s in part._selectors):
                        selector.level *= 1 + 1e-4
                    nll = window_nll(model, windows)
                    rows.append(row_of("teal-control", sparsity, dense, ours_nll, density, nll, [ours.touched] * 3))
                    print(rows[-1], file=sys.stderr)
    files = {f"{name}/{file.name}": file for name in ("teal", "wina") for file in public[name].files}
    return rows, {name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in files.items()}


def row_of(
    name: str,
    sparsity: float,
    dense: np.ndarray,
    ours: np.ndarray,
    ours_density: float,
    theirs: np.ndarray,
    theirs_densities: list[float],
    same: list[float] | None = None,
    level_ratios: list[float] | None = None,
) -> dict[str, Any]:
    difference = ours - theirs  # of windows of equal length
    change = float(np.expm1(difference.mean()))
    row: dict[str, Any] = {
        "rule": name,
        "sparsity": sparsity,
        "density_ours": float(ours_density),
        "density_theirs": float(np.mean(theirs_densities)),
        **{f"theirs_{p}": value for p, value in zip(PROJECTIONS, theirs_densities, strict=True)},
        "same": None if same is None else float(np.mean(same)),
        "same_by_matrix": same,
        "level_ratios": level_ratios,
        "ppl_dense": float(np.exp(dense.mean())),
        "ppl_ours": float(np.exp(ours.mean())),
        "ppl_theirs": float(np.exp(theirs.mean())),
        "ppl_change": change,
        "sigma": float(difference.std(ddof=1) / np.sqrt(len(difference))),
    }
    # What is released differs from the formula on purpose, which the row is there to show.
    row["ok"] = None if name in ("wina-released", "teal-control") else abs(change) <= MAX_PPL_CHANGE
    if name == "wina":
        row["ok"] = row["ok"] and row["same"] >= MIN_SAME_ENTRIES
    return row


def main() -> None:
    cli = parser(__doc__ or "")
    cli.add_argument("model", metavar="MODEL", help="bundle, GGUF file, Hugging Face folder, or a name")
    cli.add_argument("--teal", type=Path, required=True, metavar="DIR", help="checkout of FasterDecoding/TEAL")
    cli.add_argument("--wina", type=Path, required=True, metavar="DIR", help="checkout of microsoft/wina")
    cli.add_argument("--text", type=Path, required=True, help="wiki.test.raw of WikiText-2 raw")
    cli.add_argument("--calibration", type=Path, required=True, help="text or .jsonl that thresholds are set on")
    cli.add_argument("--window", type=int, default=512)
    cli.add_argument("--windows", type=int, default=8, help="windows that are scored [8]")
    cli.add_argument("--mask-windows", type=int, default=2, help="of these, those whose masks are compared [2]")
    cli.add_argument("--calibration-windows", type=int, default=8, help="windows shown to both [8]")
    cli.add_argument("--sparsity", type=float, action="append", help="may be repeated [.3 .4 .5]")
    cli.add_argument("--control", action="store_true", help="add our teal beside itself with other thresholds")
    cli.add_argument("--threads", type=int, default=2)
    args = cli.parse_args()
    args.sparsity = args.sparsity or [0.3, 0.4, 0.5]

    import torch

    from dipper.evaluate import cut_windows, read_text
    from dipper.torch_model import load_model

    torch.set_num_threads(args.threads)
    loaded = load_model(Path(args.model) if Path(args.model).exists() else args.model)

    def windows_of(path: Path, n: int) -> list[Any]:
        ids = loaded.encode(read_text(path).text[: 40 * n * args.window])  # no text needs 40 characters a token
        cut = cut_windows(ids, args.window, bos_id=loaded.bos_id, limit=n * args.window)
        if len(cut) < n:
            fail(f"{path} has not enough text for {n} windows of {args.window}")
        return [torch.tensor([window]) for window in cut]

    with torch.no_grad():
        calibration = windows_of(args.calibration, args.calibration_windows)
        rows, files = measure(args, loaded.model, calibration, windows_of(args.text, args.windows))
    hidden = ("same_by_matrix", "level_ratios", "ppl_dense")
    print_table([{key: value for key, value in row.items() if key not in hidden} for row in rows])
    more = {"window": args.window, "windows": args.windows, "calibration_windows": args.calibration_windows}
    finish("public_methods", rows, [Path(args.model)], **more, model_sha256=loaded.fingerprint, sources=files)


if __name__ == "__main__":
    run_command(main)
