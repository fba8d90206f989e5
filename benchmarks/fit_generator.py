"""Fits the generator of column scores to recorded models, and tests it on models that it was not fitted to.

    python benchmarks/fit_generator.py BUNDLE... --text wiki.valid.raw [--workdir DIR] [--write]

Of every bundle it records scores at gamma 1, and hits of real runs with every policy, gamma, density and capacity
(gamma 1: the recorded masks through each cache; gamma < 1: a simulated engine's run each). Then each model in turn is
generated from parameters fitted to the others, sent through the same caches, and its hit rates are compared with the
real ones: at most 3 percentage points apart. The last table tells how far a large model's hit rates depend on which
model the parameters come from. `--write` fits to all bundles and writes the parameters that the package carries.

Recordings stay in --workdir, about 1 GB for a model of 0.5B parameters, and are used again for the same bundle and
tokens. 20 minutes for three models on two cores, 5 of them after the recordings.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

from dipper import _core, generator
from dipper.cache import ColumnCache, n_selected, next_uses, scan
from dipper.generator import DEGREE, KINDS, PHI, W_RANGE, ScoreGenerator
from harness import ROOT, fail, finish, parser, print_table, run_command, text_tokens

DENSITIES = (0.5, 0.7)
GAMMAS = (1.0, 0.5, 0.2)
SHARES = (0.3, 0.5, 0.7)  # of the columns that slots hold
POLICIES = ("lru", "lfu", "lfu-decay", "static", "belady")
N_PROMPT = 128
ALIGNMENT = 4096  # of reads
LIMIT = 3.0  # percentage points of hit rate

KNOTS = (0.0, 0.05, 0.15, 0.3, 0.45, 0.6, 0.75, 0.9, 1.0)  # depths; the ends of a model differ most from layer to layer
GROUPS = (48, 3)  # prototypes: by hotness, then by spread
FLOOR = -4.5  # log2 below the median where scores are cut: no gamma brings them back
LAGS = (1, 2, 3, 4, 6, 8, 12, 16)  # tokens
LARGE = {"input": 5120, "glu": 17920}  # Phi-3-medium
LARGE_DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)

Tables = dict[str, np.ndarray]  # by kind, [knots, *GROUPS, DEGREE + 3]


@dataclass(frozen=True)
class Cell:
    """One way to run a model."""

    density: float
    gamma: float
    share: float
    policy: str

    @property
    def name(self) -> str:
        return f"{self.density}/{self.gamma}/{self.share}/{self.policy}"


CELLS = tuple(
    Cell(density, gamma, share, policy)
    for density, gamma, share, policy in itertools.product(DENSITIES, GAMMAS, SHARES, POLICIES)
    if gamma == 1 or policy != "belady"
)


@dataclass(frozen=True)
class Outcome:
    """What a cell did to every region after the prompt, and the cache that it had: [n_regions] each."""

    selected: np.ndarray
    hits: np.ndarray
    reads: np.ndarray
    capacity: np.ndarray
    warm_tokens: int  # of the prompt that choose the contents of a static cache

    def hit_rate(self, regions: np.ndarray) -> float:
        """In per cent, over the regions flagged."""
        return float(100 * self.hits[regions].sum() / self.selected[regions].sum())


@dataclass(frozen=True)
class Region:
    """A region's place in its model."""

    kind: str
    depth: float
    n_columns: int
    offset: int
    record_bytes: int


@dataclass(frozen=True)
class Recording:
    """A model's shape, and what its real runs did by cell; scores lie in `folder`."""

    model: str
    regions: list[Region]
    tokens: list[int]
    tokens_sha256: str
    folder: Path
    outcomes: dict[str, Outcome]

    def scores(self, density: float, region: int) -> np.ndarray:
        """[T, n_columns] fp32, prompt included, of a run at gamma 1."""
        return np.load(self.folder / f"{density}-{region}.npy")

    def of_kind(self, kind: str | None) -> np.ndarray:
        """Flags [n_regions]; None: all."""
        return np.array([kind in (None, region.kind) for region in self.regions])


# --- real runs


def record(bundle: Path, text: Path, n_tokens: int, workdir: Path) -> Recording:
    """Real runs of a bundle; those that `workdir` has are not run again."""
    ids, bos = text_tokens(bundle, text)
    tokens = (([] if bos is None else [bos]) + ids)[:n_tokens]
    if len(tokens) < n_tokens:
        fail(f"{text} has {len(tokens)} tokens, {n_tokens} are needed: give a longer text or lower --tokens")
    sha256 = hashlib.sha256(np.asarray(tokens, "<i4").tobytes()).hexdigest()
    header = json.loads((bundle / "bundle.json").read_text(encoding="utf-8"))
    last = max(region["layer"] for region in header["regions"])
    regions = [
        Region(r["kind"], r["layer"] / max(1, last), r["n_columns"], r["offset"], r["record_bytes"])
        for r in header["regions"]
    ]
    folder = workdir / f"{bundle.stem}-{header['header_sha256'][:12]}-{sha256[:12]}"
    folder.mkdir(parents=True, exist_ok=True)
    recording = Recording(bundle.stem, regions, tokens, sha256, folder, {})
    engine = None
    for cell in CELLS:
        file = folder / f"{cell.name.replace('/', '-')}.npz"
        if not file.exists():
            print(f"{recording.model}: {cell.name}", file=sys.stderr)
            engine = engine or simulated_engine(bundle, n_tokens)
            outcome = (live if cell.gamma < 1 else replayed)(engine, cell, recording)
            np.savez(file, **dataclasses.asdict(outcome))
        with np.load(file) as saved:
            recording.outcomes[cell.name] = Outcome(**{name: saved[name] for name in saved.files})
    return recording


def simulated_engine(bundle: Path, n_tokens: int) -> Any:
    from dipper.engine import Engine, EngineConfig

    return Engine.open(bundle, EngineConfig(method="dip-ca", mlp_dram="60%", context=n_tokens), simulated=True)


def trace_frames(engine: Any, cell: Cell, recording: Recording, scores: bool) -> tuple[dict[str, Any], Iterator[Any]]:
    """Header and frames of one run: prompt, then text."""
    from dipper.engine import EngineConfig
    from dipper.trace import read_trace

    trace = recording.folder / "run.trace"
    config = EngineConfig(
        method="dip-ca",
        density=cell.density,
        gamma=cell.gamma,
        cache=cell.policy,
        context=len(recording.tokens),
    )
    config = dataclasses.replace(config, mlp_dram=budget(engine, config, cell.share))
    engine.configure(dataclasses.replace(config, trace=trace, trace_scores=scores))
    engine.prefill(recording.tokens[:N_PROMPT])
    engine.reset_counters()
    engine.score(recording.tokens[N_PROMPT:])
    engine.configure(config)  # finishes the trace
    return read_trace(trace)


def budget(engine: Any, config: Any, share: float) -> str:
    """Bytes of the MLP that hold `share` of the columns: slots take room in proportion, so two plans tell the third."""
    n_columns = sum(region["n_columns"] for region in engine.bundle.header["regions"])
    points = []
    for mlp_dram in ("50%", "80%"):
        engine.configure(dataclasses.replace(config, mlp_dram=mlp_dram))
        points.append((sum(engine.plan.options["capacity"]) / n_columns, engine.plan.mlp_bytes))
    (share_0, bytes_0), (share_1, bytes_1) = points
    return str(int(bytes_0 + (share - share_0) / (share_1 - share_0) * (bytes_1 - bytes_0)))


def live(engine: Any, cell: Cell, recording: Recording) -> Outcome:
    """A run of its own: below gamma 1 masks depend on the cache."""
    header, frames = trace_frames(engine, cell, recording, scores=False)
    counts = np.zeros((3, len(recording.regions)), np.int64)
    for frame in frames:
        if not frame.is_prompt:
            counts[:, frame.region] += len(frame.mask), int(frame.hit.sum()), len(frame.reads)
    capacity = np.array([region["capacity"] for region in header["regions"]])
    return Outcome(*counts, capacity, min(N_PROMPT, header["block_tokens"]))


def replayed(engine: Any, cell: Cell, recording: Recording) -> Outcome:
    """At gamma 1 masks do not depend on caches: one run a density serves every cache."""
    n_regions = len(recording.regions)
    if not (recording.folder / f"{cell.density}-{n_regions - 1}.npy").exists():
        rows: list[list[np.ndarray]] = [[] for _ in range(n_regions)]
        for frame in trace_frames(engine, dataclasses.replace(cell, policy="lfu"), recording, scores=True)[1]:
            rows[frame.region].append(frame.scores)
        for r in range(n_regions):
            np.save(recording.folder / f"{cell.density}-{r}.npy", np.stack(rows[r]))
    capacity = np.array([int(cell.share * region.n_columns) for region in recording.regions])
    counts = [
        cached(recording.scores(cell.density, r), region, cell, int(capacity[r]), N_PROMPT)
        for r, region in enumerate(recording.regions)
    ]
    return Outcome(*np.array(counts).T, capacity, N_PROMPT)


# --- scores through a cache


def cached(scores: np.ndarray, region: Region, cell: Cell, capacity: int, warm_tokens: int) -> tuple[int, int, int]:
    """Columns selected, hits and reads after the prompt, of scores [T, n] through a cell's cache, as the engine."""
    k = n_selected(cell.density, region.n_columns)
    place = (region.offset, region.record_bytes, ALIGNMENT)
    cache = ColumnCache(region.n_columns, capacity, cell.policy)
    if cell.policy == "belady":
        masks = scan(scores, k)[0]
        uses = next_uses(masks, region.n_columns)
        _core.replay_masks(masks[:N_PROMPT], *place, cache, False, uses[:N_PROMPT])
        traffic = _core.replay_masks(masks[N_PROMPT:], *place, cache, True, uses[N_PROMPT:])
    else:
        masks = scan(scores[:N_PROMPT], k, cache=cache, counted=False)[0]
        if cell.policy == "static":
            uses = np.bincount(masks[:warm_tokens].ravel(), minlength=region.n_columns)
            cache.pin(np.sort(np.argsort(-uses, kind="stable")[:capacity]))
        traffic = _core.replay_scores(scores[N_PROMPT:], k, cell.gamma, *place, cache)
    return (len(scores) - N_PROMPT) * k, int(traffic["hits"].sum()), int(traffic["reads"].sum())


def generated(fitted: ScoreGenerator, recording: Recording, cells: Sequence[Cell]) -> dict[str, Outcome]:
    """What the recording's cells would have done on generated scores, by the same caches."""
    counts = {cell.name: np.zeros((3, len(recording.regions)), np.int64) for cell in cells}
    for r, region in enumerate(recording.regions):
        stream = fitted.region(region.kind, region.depth, region.n_columns, seed=r)
        scores = stream.scores(len(recording.tokens))
        for cell in cells:
            real = recording.outcomes[cell.name]
            counts[cell.name][:, r] = cached(scores, region, cell, int(real.capacity[r]), int(real.warm_tokens))
    return {
        cell.name: Outcome(*counts[cell.name], *dataclasses.astuple(recording.outcomes[cell.name])[3:])
        for cell in cells
    }


# --- fit


def fit(recording: Recording) -> Tables:
    """A model's prototypes by kind, knot of depth, hotness and spread; from both densities together."""
    tables = {}
    for kind in KINDS:
        nearest = [int(np.abs(np.array(KNOTS) - region.depth).argmin()) for region in recording.regions]
        grids = []
        for knot in range(len(KNOTS)):
            here = [r for r, region in enumerate(recording.regions) if region.kind == kind and nearest[r] == knot]
            if not here:
                fail(f"{recording.model} has no layer near depth {KNOTS[knot]}: fit to a deeper model")
            logs = [relative(recording.scores(d, r)[N_PROMPT:]) for d in DENSITIES for r in here]
            grids.append(prototypes(np.concatenate(logs, axis=1)))
        tables[kind] = np.stack(grids).astype(np.float32)
    return tables


def relative(scores: np.ndarray) -> np.ndarray:
    """log2(score / its token's median), cut at FLOOR; [T, n]."""
    median = np.maximum(np.median(scores, axis=1, keepdims=True), 1e-30)
    return np.maximum(np.log2(np.maximum(scores / median, 1e-9)), FLOOR)


def prototypes(logs: np.ndarray) -> np.ndarray:
    """Columns [T, n] sorted into the grid; each cell's quantile function and memory, [*GROUPS, DEGREE + 3].

    A column's mean over T tokens scatters around its true one; generated columns would scatter once more. So means are
    drawn together until their variance is the true one's.
    """
    n_tokens = len(logs)
    mean, spread = logs.mean(axis=0), logs.std(axis=0)
    normal = np.array([NormalDist().inv_cdf((t + 0.5) / n_tokens) for t in range(n_tokens)])
    memory = autocorrelations(normal[np.argsort(np.argsort(logs, axis=0), axis=0)])
    weaker = 1 + 2 * (memory_parts(memory.mean(axis=1)) * np.array(PHI) / (1 - np.array(PHI))).sum()  # tokens in one
    noise = weaker * (spread**2).mean() / n_tokens
    shrink = np.sqrt(max(0.0, 1 - noise / max(float(mean.var()), 1e-9)))
    logs = logs + (shrink - 1) * (mean - mean.mean())
    quantiles = np.sort(logs, axis=0)
    to_polynomial = weighted_polynomial(normal)
    grid = [
        [
            np.concatenate(
                [to_polynomial @ quantiles[:, cell].mean(axis=1), memory_parts(memory[:, cell].mean(axis=1))]
            )
            for cell in np.array_split(group[np.argsort(spread[group])], GROUPS[1])
        ]
        for group in np.array_split(np.argsort(mean), GROUPS[0])
    ]
    return np.array(grid)


def autocorrelations(w: np.ndarray) -> np.ndarray:
    """Of columns [T, n] of mean 0, at LAGS: [lags, n]; the finite series' bias of about -1/T a lag is taken out."""
    n_tokens = len(w)
    products = np.stack([(w[lag:] * w[:-lag]).mean(axis=0) for lag in LAGS])
    return products / (w * w).mean(axis=0) + 1 / n_tokens


def memory_parts(autocorrelation: np.ndarray) -> np.ndarray:
    """A_1, A_2 >= 0 of the least squares fit at LAGS."""
    basis = np.array(PHI) ** np.array(LAGS)[:, None]
    parts = np.linalg.lstsq(basis, autocorrelation, rcond=None)[0]
    if parts.min() < 0:  # then the best fit has one part alone
        alone = np.maximum(0, basis.T @ autocorrelation / (basis**2).sum(axis=0))
        best = int(np.argmin([((autocorrelation - basis[:, i] * alone[i]) ** 2).sum() for i in range(2)]))
        parts = np.where(np.arange(2) == best, alone, 0.0)
    return np.minimum(parts, 0.45)  # of 1 together: there is always an independent part


def weighted_polynomial(w: np.ndarray) -> np.ndarray:
    """[DEGREE + 1, T]: maps quantiles at w, within W_RANGE, to coefficients; rare ones count less."""
    weight = np.exp(-(w**2) / 12) * (w > W_RANGE[0]) * (w < W_RANGE[1])
    return np.linalg.pinv(np.vander(w, DEGREE + 1, increasing=True) * weight[:, None]) * weight


def combined(tables: dict[str, Tables], models: Sequence[str]) -> ScoreGenerator:
    stacked = {kind: np.stack([tables[model][kind] for model in models]) for kind in KINDS}
    return ScoreGenerator.of_models(tuple(models), np.array(KNOTS, np.float32), stacked)


def write(tables: dict[str, Tables], recordings: Sequence[Recording], text: Path) -> Path:
    """The package's parameters with their provenance."""
    provenance = {
        "command": "benchmarks/fit_generator.py",
        "models": list(tables),
        "text_sha256": hashlib.sha256(text.read_bytes()).hexdigest(),
        "tokens_sha256": [recording.tokens_sha256 for recording in recordings],
        "n_tokens": [len(recording.tokens) for recording in recordings],
        "n_prompt": N_PROMPT,
        "densities": DENSITIES,
    }
    path = ROOT / "src/dipper" / generator.PARAMETERS.name
    arrays = {kind: np.stack([tables[model][kind] for model in tables]).astype(np.float16) for kind in KINDS}
    np.savez_compressed(path, provenance=json.dumps(provenance), knots=np.array(KNOTS, np.float32), **arrays)
    return path


# --- results


def compare(recording: Recording, outcomes: dict[str, Outcome], fitted_on: Sequence[str]) -> list[dict[str, Any]]:
    """Real hit rate and the generated one's difference, in percentage points, by cell."""
    rows = []
    for cell in CELLS:
        real, ours = recording.outcomes[cell.name], outcomes[cell.name]
        row: dict[str, Any] = {"model": recording.model, "fitted_on": list(fitted_on), **dataclasses.asdict(cell)}
        for name, kind in (("all", None), ("input", "input"), ("glu", "glu")):
            flags = recording.of_kind(kind)
            row[name] = round(real.hit_rate(flags), 2)
            row[f"{name}_off"] = round(ours.hit_rate(flags) - real.hit_rate(flags), 2)
        row["reads_off"] = round(100 * (float(ours.reads.sum() / real.reads.sum()) - 1), 1)  # per cent
        row["ok"] = all(abs(row[f"{name}_off"]) <= LIMIT for name in ("all", *KINDS))
        rows.append(row)
    return rows


def worst(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows' largest differences by model, gamma and policy, over densities and capacities."""
    table = []
    key = ("model", "gamma", "policy")
    for names in dict.fromkeys(tuple(row[k] for k in key) for row in rows):
        group = [row for row in rows if tuple(row[k] for k in key) == names]
        columns = ("all_off", "input_off", "glu_off", "reads_off")
        line = {name: max((row[name] for row in group), key=abs) for name in columns}
        table.append({**dict(zip(key, names, strict=True)), **line, "ok": all(row["ok"] for row in group)})
    return table


def trend(recordings: Sequence[Recording], tables: dict[str, Tables]) -> list[dict[str, Any]]:
    """What of a model could depend on its number of columns, by kind: means over the knots."""
    rows = []
    for kind, recording in itertools.product(KINDS, recordings):
        table = tables[recording.model][kind]
        rates = {
            f"lfu_{gamma}": round(recording.outcomes[f"0.5/{gamma}/0.5/lfu"].hit_rate(recording.of_kind(kind)), 2)
            for gamma in GAMMAS
        }
        rows.append(
            {
                "kind": kind,
                "n_columns": next(region.n_columns for region in recording.regions if region.kind == kind),
                "model": recording.model,
                "hotness": round(float(table[..., 0].std(axis=(1, 2)).mean()), 3),  # scatter over columns, in octaves
                "spread": round(float(table[..., 1].mean()), 3),  # of a column over tokens, in octaves
                "memory": round(float((table[..., -2:] @ np.array(PHI)).mean()), 3),  # autocorrelation at one token
                **rates,
            }
        )
    return rows


def band(fitted: dict[str, ScoreGenerator], n_tokens: int) -> list[dict[str, Any]]:
    """Hit rates of a large model, half of the columns cached, by where the parameters come from."""
    rows = []
    cells = [cell for cell in CELLS if cell.share == 0.5 and cell.policy in ("lru", "lfu")]
    counts = {(name, cell.name): np.zeros(3) for name in fitted for cell in cells}
    for (name, one), (kind, n), depth in itertools.product(fitted.items(), LARGE.items(), LARGE_DEPTHS):
        region = Region(kind, depth, n, 0, 2560)
        scores = one.region(kind, depth, n, seed=1).scores(n_tokens)
        for cell in cells:
            counts[name, cell.name] += cached(scores, region, cell, int(cell.share * n), N_PROMPT)
    for cell in cells:
        rates = {name: round(100 * counts[name, cell.name][1] / counts[name, cell.name][0], 2) for name in fitted}
        low_high = {"band": round(max(rates.values()) - min(rates.values()), 2)}
        rows.append({"policy": cell.policy, "density": cell.density, "gamma": cell.gamma, **rates, **low_high})
    return rows


def speed(fitted: ScoreGenerator) -> float:
    """Nanoseconds a score on the large model's GLU region."""
    stream = fitted.region("glu", 0.5, LARGE["glu"], seed=0)
    stream.scores(16)
    start = time.perf_counter()
    n_scores = stream.scores(256).size
    return round((time.perf_counter() - start) / n_scores * 1e9, 1)


def main() -> None:
    cli = parser(__doc__)
    cli.add_argument("bundles", metavar="BUNDLE", type=Path, nargs="+", help="two or more")
    cli.add_argument("--text", type=Path, required=True)
    cli.add_argument("--tokens", type=int, default=512, help=f"of the text, the prompt's {N_PROMPT} included [512]")
    cli.add_argument("--workdir", type=Path, default=Path("generator-recordings"))
    cli.add_argument("--write", action="store_true", help="write the package's parameters, fitted to all bundles")
    args = cli.parse_args()
    if len(args.bundles) < 2:
        fail("one bundle leaves none to test on: give at least two")

    recordings = [record(bundle, args.text, args.tokens, args.workdir) for bundle in args.bundles]
    tables = {recording.model: fit(recording) for recording in recordings}
    rows = []
    for recording in recordings:
        others = [model for model in tables if model != recording.model]
        rows += compare(recording, generated(combined(tables, others), recording, CELLS), others)
        print(f"{recording.model}: generated from {', '.join(others)}", file=sys.stderr)
    everyone = combined(tables, list(tables))
    trends = trend(recordings, tables)
    bands = band({**{model: combined(tables, [model]) for model in tables}, "mean": everyone}, args.tokens)
    for title, table in (
        (f"largest differences, percentage points of hit rate (limit {LIMIT:g}) and per cent of reads", worst(rows)),
        ("by number of columns: real hit rates at density 0.5, half cached", trends),
        ("Phi-3-medium's columns, half cached: hit rates by the models that parameters come from", bands),
    ):
        print(f"\n{title}")
        print_table(table)
    if args.write:
        print(f"\nwrote {write(tables, recordings, args.text)}")
    finish("generator", rows, args.bundles, trend=trends, band=bands, ns_per_score=speed(everyone), limit=LIMIT)


if __name__ == "__main__":
    run_command(main)
