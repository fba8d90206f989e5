"""The simulator: counts are the engine's own, exactly; seconds follow closed forms."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import tiny
from dipper import _core
from dipper.budget import EngineConfig, plan_run
from dipper.bundle import Bundle, pack
from dipper.cache import ColumnCache, next_uses, scan, top_k
from dipper.device import Compute, Device, Dram, Energy, Flash
from dipper.engine import Counters, Engine
from dipper.errors import BudgetError, ConfigError
from dipper.published import published_bundle
from dipper.records import LEDGER
from dipper.simulator import miss_curve_split, predict, sim_record
from dipper.trace import read_trace
from dipper.workload import CACHES, GeneratedWorkload, ModelWorkload, Setting, TraceWorkload, Traffic

KINDS = ("llama", "qwen2", "gemma3")  # llama's embedding is untied: its rows are reads, too
PROMPT = [3, 14, 15, 9, 26, 5, 35, 8, 9, 7, 9, 32, 38, 46, 2]
TEXT = [17, 4, 99, 150, 3, 3, 61, 80, 12, 159]
N_TOKENS = 8
POLICIES = ("lru", "lfu", "lfu-decay", "static")


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    folder = tmp_path_factory.mktemp("bundles")
    paths = {
        kind: pack(tiny.write_hf(folder / kind, kind), folder / f"{kind}.dipper", tokenizer=False) for kind in KINDS
    }
    return {kind: Bundle.open(path) for kind, path in paths.items()}


def config_with(bundle: Bundle, share: float, **options: Any) -> EngineConfig:
    """A budget of the least that works and about this share of the columns."""
    options = {"context": 48, "threads": 2, "density": 0.5, **options}
    with pytest.raises(BudgetError) as e:
        plan_run(bundle, EngineConfig(mlp_dram="0.1b", **options), 0)
    least = float(re.findall(r"raise --mlp-dram to ([0-9.]+)b or more$", str(e.value))[0])
    held = sum(region["bytes"] for region in bundle.header["regions"])
    return EngineConfig(mlp_dram=f"{least + share * 8 * held / bundle.mlp_weights:.3f}b", **options)


def setting_with(bundle: Bundle, share: float, *, cache: str | None = None, **options: Any) -> Setting:
    """A setting in which some columns fit, but not all."""
    if cache in POLICIES:
        options["cache"] = cache
    setting = Setting.plan_for(bundle, config_with(bundle, share, **options), cache=cache, host_bytes=0)
    assert cache == "none" or 0 < sum(setting.capacity) < sum(r["n_columns"] for r in bundle.header["regions"])
    return setting


def engines_counters(
    setting: Setting, prompt: Sequence[int] = PROMPT, text: Sequence[int] | None = None, trace: Path | None = None
) -> Counters:
    """What the engine itself counts, reading from flash."""
    config = dataclasses.replace(setting.config, trace=trace)
    with Engine.open(setting.bundle.path, config) as engine:
        assert tuple(engine.plan.options["capacity"]) == setting.capacity
        logits = engine.prefill(prompt)
        engine.reset_counters()
        for t in range(N_TOKENS if text is None else len(text)):
            logits = engine.step(int(logits.argmax()) if text is None else text[t])
        return engine.counters()


def totals_of(counters: Counters) -> dict[str, int]:
    return {name: getattr(counters, name) for name in ("selected", "hits", "misses", "reads", "flash_bytes")}


def arrays_of(traffic: Traffic) -> dict[str, list[Any]]:
    return {name: np.asarray(value).tolist() for name, value in vars(traffic).items()}


# --- replay: the counts of a loop


def plain_replay(
    masks: list[np.ndarray], cache: ColumnCache, offset: int, record_bytes: int, alignment: int, next_use: Any = None
) -> dict[str, list[int]]:
    """Cache steps and read plans, one after the other."""
    counts: dict[str, list[int]] = {"hits": [], "admissions": [], "reads": [], "flash_bytes": []}
    for t, mask in enumerate(masks):
        step = cache.step(mask, next_use=None if next_use is None else next_use[t])
        offsets = offset + step.misses.astype(np.uint64) * np.uint64(record_bytes)
        plan = _core.plan_reads(offsets, record_bytes, alignment, 256 << 10)
        counts["hits"].append(step.n_hits)
        counts["admissions"].append(len(step.admissions))
        counts["reads"].append(len(plan["ranges"]))
        counts["flash_bytes"].append(sum(size for _, size, _ in plan["ranges"]))
    return counts


def listed(counts: Any) -> dict[str, list[int]]:
    return {name: values.tolist() for name, values in counts.items()}


LAYOUTS = [(4096, 700), (8192, 4096), (1 << 20, 5001), (12288, 300_000)]  # offset, record_bytes
SCORES = np.abs(np.random.default_rng(11).standard_normal((30, 120), np.float32)) * np.linspace(
    1, 3, 120, dtype=np.float32
)


@pytest.mark.parametrize("policy", [*POLICIES, "belady"])
@pytest.mark.parametrize(("offset", "record_bytes"), LAYOUTS)
@pytest.mark.parametrize("alignment", [512, 4096])
def test_replayed_masks_are_a_loop_of_steps_and_plans(
    policy: str, offset: int, record_bytes: int, alignment: int
) -> None:
    masks = scan(SCORES, 40)[0]
    future = next_uses(masks, 120) if policy == "belady" else None
    replayed, looped = ColumnCache(120, 50, policy, 0.9), ColumnCache(120, 50, policy, 0.9)
    if policy == "static":
        for cache in (replayed, looped):
            cache.pin(range(50))
    found = _core.replay_masks(masks, offset, record_bytes, alignment, replayed, True, future)
    expected = plain_replay(list(masks), looped, offset, record_bytes, alignment, future)
    assert listed(found) == expected
    assert np.array_equal(replayed.slots, looped.slots)
    assert (
        (replayed.hits, replayed.misses) == (looped.hits, looped.misses) == (sum(expected["hits"]), 1200 - looped.hits)
    )


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("offset", "record_bytes"), LAYOUTS)
@pytest.mark.parametrize("gamma", [1.0, 0.5, 0.1])
def test_replayed_scores_are_a_closed_loop_with_its_reads(
    policy: str, offset: int, record_bytes: int, gamma: float
) -> None:
    replayed, looped = ColumnCache(120, 50, policy, 0.9), ColumnCache(120, 50, policy, 0.9)
    for cache in (replayed, looped):
        cache.pin(range(60, 110))
    found = listed(_core.replay_scores(SCORES, 40, gamma, offset, record_bytes, 4096, replayed))
    counts = [
        plain_replay([top_k(row, 40, gamma, looped.cached)], looped, offset, record_bytes, 4096) for row in SCORES
    ]
    assert found == {name: [c[name][0] for c in counts] for name in found}
    assert np.array_equal(replayed.slots, looped.slots)
    assert (replayed.hits, replayed.misses) == (looped.hits, looped.misses)


def test_a_replay_may_warm_without_counting() -> None:
    masks = scan(SCORES, 40)[0]
    warm, counted = ColumnCache(120, 50, "lru"), ColumnCache(120, 50, "lru")
    found = [_core.replay_masks(masks, 0, 64, 512, cache, cache is counted) for cache in (warm, counted)]
    assert listed(found[0]) == listed(found[1])
    assert (warm.hits, warm.misses) == (0, 0)
    assert np.array_equal(warm.slots, counted.slots)
    nothing = _core.replay_masks(masks[:0], 0, 64, 512, warm)
    assert listed(nothing) == {"hits": [], "admissions": [], "reads": [], "flash_bytes": []}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[0, 1], [3, 2]], "the mask of token 1 holds column 2 at position 1"),
        ([[0, 1], [2, 2]], "the mask of token 1 holds column 2 at position 1"),
        ([[0, 4], [2, 3]], "the mask of token 0 holds column 4 at position 1"),
        ([[0, 1], [-1, 3]], "the mask of token 1 holds column -1 at position 0"),
    ],
)
def test_a_bad_mask_of_a_replay_is_named(rows: list[list[int]], message: str) -> None:
    with pytest.raises(ConfigError) as e:
        _core.replay_masks(np.array(rows, np.int32), 0, 64, 512, ColumnCache(4, 2, "lru"))
    assert str(e.value) == f"{message}: columns ascend, without repeats, from 0 to 3"


def test_what_a_replay_refuses() -> None:
    masks, scores = np.array([[1, 2], [0, 3]], np.int32), np.ones((2, 4), np.float32)
    missing = (
        "belady was told the next use of 0 columns for a mask of 2: it needs each; replay recorded masks, or choose "
        "another policy"
    )
    others = "next uses are for other masks: give one a selected column, next_uses(masks, n_columns)"
    k = "k is 5 for 4 columns: a mask holds between 1 and all of them; use n_selected(density, n)"
    shape = "scores have 4 columns but the cache has 5: use the cache of the same region"
    sizes = (
        "plan_reads: alignment 3 must be a power of two, max_bytes 262144 a multiple of it and not 0, record_bytes 64 "
        "not 0."
    )
    nan = (
        "score of column 2 at token 1 is NaN: it has no rank; look for an overflow or a damaged weight in the layers "
        "before"
    )
    bad = scores.copy()
    bad[1, 2] = np.nan
    for call, message in (
        (lambda: _core.replay_masks(masks, 0, 64, 512, ColumnCache(4, 2, "belady")), missing),
        (lambda: _core.replay_scores(scores, 2, 1.0, 0, 64, 512, ColumnCache(4, 2, "belady")), missing),
        (lambda: _core.replay_masks(masks, 0, 64, 512, ColumnCache(4, 2, "belady"), True, masks[:1]), others),
        (lambda: _core.replay_masks(masks, 0, 64, 3, ColumnCache(4, 2, "lru")), sizes),
        (lambda: _core.replay_scores(scores, 5, 1.0, 0, 64, 512, ColumnCache(4, 2, "lru")), k),
        (lambda: _core.replay_scores(scores, 2, 1.0, 0, 64, 512, ColumnCache(5, 2, "lru")), shape),
        (lambda: _core.replay_scores(bad, 2, 1.0, 0, 64, 512, ColumnCache(4, 2, "lru")), nan),
    ):
        with pytest.raises(ConfigError) as e:
            call()
        assert str(e.value) == message


# --- counts equal the engine's


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("density", [0.4, 0.7])
def test_counts_are_the_engines(bundles: dict[str, Bundle], kind: str, density: float) -> None:
    bundle = bundles[kind]
    workload = ModelWorkload(bundle, PROMPT, n_tokens=N_TOKENS)
    variants = list(product(POLICIES, (False, True), (0.15, 0.5)))
    settings = [
        setting_with(bundle, share, cache=cache, cold=cold, density=density, cache_decay=0.9)
        for cache, cold, share in variants
    ]
    seen = set()
    for variant, setting, traffic in zip(variants, settings, workload.traffic(settings), strict=True):
        assert traffic.totals == totals_of(engines_counters(setting)), variant
        assert traffic.n_tokens == N_TOKENS
        assert traffic.embedding_reads.tolist() == [0 if bundle.model.tied else 1] * N_TOKENS
        assert np.array_equal(traffic.hits + traffic.misses, traffic.selected)
        seen.add((traffic.totals["hits"], traffic.totals["reads"], traffic.totals["flash_bytes"]))
    assert len(workload._recorded) == 1  # one recording served them all
    assert len(seen) > len(settings) // 2  # settings differ, or nothing above was tested


def test_another_capacity_gives_other_counts(bundles: dict[str, Bundle]) -> None:
    """What is compared above tells capacities apart by a single column."""
    bundle = bundles["llama"]
    setting = setting_with(bundle, 0.3, cache="lru")
    capacity = [setting.capacity[0] - 1, *setting.capacity[1:]]
    plan = dataclasses.replace(setting.plan, options={**setting.plan.options, "capacity": capacity})
    other = dataclasses.replace(setting, plan=plan)
    found = ModelWorkload(bundle, PROMPT, n_tokens=N_TOKENS).traffic([setting, other])
    counted = totals_of(engines_counters(setting))
    assert found[0].totals == counted != found[1].totals


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_live_counts_are_the_engines(bundles: dict[str, Bundle], kind: str) -> None:
    bundle = bundles[kind]
    workload = ModelWorkload(bundle, PROMPT, n_tokens=N_TOKENS)
    settings = [
        setting_with(bundle, 0.15, cache=cache, cold=cold, method="dip-ca", gamma=gamma, cache_decay=0.8)
        for cache, cold, gamma in product(POLICIES, (False, True), (0.6, 0.2))
    ]
    found = workload.traffic(settings)
    for setting, traffic in zip(settings, found, strict=True):
        assert traffic.totals == totals_of(engines_counters(setting)), setting.config
        assert workload.describe(setting) == {"kind": "live", "model": kind, "tokens": "greedy"}
    # One loaded model serves all: what ran before leaves nothing behind.
    again = ModelWorkload(bundle, PROMPT, n_tokens=N_TOKENS).traffic(settings[::-1])
    assert list(map(arrays_of, again[::-1])) == list(map(arrays_of, found))


@pytest.mark.parametrize("gamma", [1.0, 0.3])
@pytest.mark.parametrize("cache", ["lru", "static"])
def test_a_long_prompt_in_small_blocks(bundles: dict[str, Bundle], gamma: float, cache: str) -> None:
    """Five blocks of 16 tokens; the first alone fills a static cache."""
    prompt = [(7 * i * i + 3 * i) % 160 for i in range(75)]
    setting = setting_with(bundles["llama"], 0.02, cache=cache, method="dip-ca", gamma=gamma, context=100)
    assert setting.block_tokens == 16
    found = ModelWorkload(bundles["llama"], prompt, n_tokens=N_TOKENS).traffic([setting])[0]
    assert found.totals == totals_of(engines_counters(setting, prompt))


@pytest.mark.parametrize("gamma", [1.0, 0.3])
def test_a_given_split(bundles: dict[str, Bundle], gamma: float) -> None:
    bundle = bundles["llama"]
    weights = (1.0, 0.0, 0.25, 3.0, 0.5, 0.5)
    setting = setting_with(bundle, 0.3, cache="lfu", split=weights, method="dip-ca", gamma=gamma)
    n_columns = [region["n_columns"] for region in bundle.header["regions"]]
    shares = [c / n for c, n in zip(setting.capacity, n_columns, strict=True)]
    assert setting.capacity[1] == 0
    assert shares[3] == 1.0  # in proportion up to all columns
    assert shares[4] == pytest.approx(2 * shares[2], abs=0.02)
    found = ModelWorkload(bundle, PROMPT, n_tokens=N_TOKENS).traffic([setting])[0]
    assert found.totals == totals_of(engines_counters(setting))
    assert found.hits[:, 1].sum() == 0
    if gamma == 1.0:
        uniform = setting_with(bundle, 0.3, cache="lfu", method="dip-ca", gamma=gamma)
        assert ModelWorkload(bundle, PROMPT, n_tokens=N_TOKENS).traffic([uniform])[0].totals != found.totals


@pytest.mark.parametrize("gamma", [1.0, 0.3])
def test_a_text_counts_as_decoding_its_tokens(bundles: dict[str, Bundle], gamma: float) -> None:
    for kind in ("llama", "qwen2"):
        setting = setting_with(bundles[kind], 0.2, cache="lru", method="dip-ca", gamma=gamma)
        workload = ModelWorkload(bundles[kind], PROMPT, text=TEXT)
        found = workload.traffic([setting])[0]
        assert (workload.n_prompt, workload.n_tokens, found.n_tokens) == (len(PROMPT), len(TEXT), len(TEXT))
        assert found.totals == totals_of(engines_counters(setting, text=TEXT))
        assert workload.describe(setting)["tokens"] == "text"


def test_lower_gamma_hits_more(bundles: dict[str, Bundle]) -> None:
    settings = [setting_with(bundles["gemma3"], 0.2, cache="lfu", method="dip-ca", gamma=g) for g in (1.0, 0.5, 0.1)]
    hits = [t.totals["hits"] for t in ModelWorkload(bundles["gemma3"], PROMPT, text=TEXT).traffic(settings)]
    assert hits[0] < hits[1] < hits[2]


@pytest.fixture(scope="module")
def phi3(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """LongRoPE: other rotary factors in a context of more than 64."""
    folder = tmp_path_factory.mktemp("phi3")
    return Bundle.open(pack(tiny.write_hf(folder / "phi3", "phi3"), folder / "phi3.dipper", tokenizer=False))


@pytest.mark.parametrize("gamma", [1.0, 0.3])
def test_the_context_chooses_the_rotary_factors(phi3: Bundle, gamma: float) -> None:
    settings = [
        setting_with(phi3, 0.3, cache=cache, context=context, method="dip-ca", gamma=gamma)
        for context, cache in product((64, 65, 128), ("lru", "static"))
    ]
    workload = ModelWorkload(phi3, PROMPT, n_tokens=N_TOKENS)
    found = workload.traffic(settings)
    for setting, traffic in zip(settings, found, strict=True):
        assert traffic.totals == totals_of(engines_counters(setting)), (setting.config.context, setting.cache)
    if gamma == 1.0:
        assert len(workload._recorded) == 2  # one for 64, one for both beyond
        short, long = workload._recorded.values()
        assert any(not np.array_equal(a, b) for a, b in zip(short.masks, long.masks, strict=True))
    # The order of the settings does not matter: an engine of another context is not used for them.
    again = ModelWorkload(phi3, PROMPT, n_tokens=N_TOKENS).traffic(settings[::-1])
    assert list(map(arrays_of, again[::-1])) == list(map(arrays_of, found))


def test_no_cache_and_the_best_cache(bundles: dict[str, Bundle]) -> None:
    bundle = bundles["llama"]
    caches = [setting_with(bundle, 0.2, cache=cache) for cache in CACHES]
    found = dict(zip(CACHES, ModelWorkload(bundle, PROMPT, text=TEXT).traffic(caches), strict=True))
    assert found["none"].hits.sum() == found["none"].admissions.sum() == 0
    assert caches[0].capacity == (0,) * 6
    for cache in ("none", "lru", "lfu", "lfu-decay"):
        assert found["belady"].totals["hits"] >= found[cache].totals["hits"], cache
    assert found["belady"].totals["hits"] > found["lru"].totals["hits"] > 0
    # By region from the masks: belady knows the prompt, too.
    recording = _recording(bundle, caches[0])
    for r, (prompt, masks) in enumerate(zip(recording.prompt, recording.masks, strict=True)):
        every = np.concatenate([prompt, masks])
        cache = ColumnCache(bundle.header["regions"][r]["n_columns"], caches[-1].capacity[r], "belady")
        steps = [cache.step(m, next_use=u) for m, u in zip(every, next_uses(every, cache.n_columns), strict=True)]
        assert [s.n_hits for s in steps[len(prompt) :]] == found["belady"].hits[:, r].tolist()


def _recording(bundle: Bundle, setting: Setting) -> Any:
    workload = ModelWorkload(bundle, PROMPT, text=TEXT)
    workload.traffic([setting])
    (recording,) = workload._recorded.values()
    return recording


# --- traces


@pytest.fixture(scope="module")
def trace(bundles: dict[str, Bundle], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of an engine that reads from flash, at gamma 1."""
    path = tmp_path_factory.mktemp("trace") / "run.trace"
    engines_counters(setting_with(bundles["llama"], 0.3, cache="lfu"), trace=path)
    return path


def test_a_trace_tells_what_the_model_does(bundles: dict[str, Bundle], trace: Path) -> None:
    bundle = bundles["llama"]
    traced, model = TraceWorkload(bundle, trace), ModelWorkload(bundle, PROMPT, n_tokens=N_TOKENS)
    assert (traced.n_prompt, traced.n_tokens) == (len(PROMPT), N_TOKENS)
    settings = [
        setting_with(bundle, share, cache=cache, cold=cold)
        for cache, share, cold in product(CACHES, (0.15, 0.5), (False, True))
    ]
    for setting, one, other in zip(settings, traced.traffic(settings), model.traffic(settings), strict=True):
        assert arrays_of(one) == arrays_of(other), (setting.cache, setting.config.cold)
    assert traced.describe(settings[0]) == {"kind": "recorded", "model": "llama", "trace": str(trace)}
    assert model.describe(settings[0]) == {"kind": "recorded", "model": "llama", "tokens": "greedy"}


@pytest.mark.parametrize("cache", ["lru", "lfu", "static"])
def test_replayed_scores_of_a_trace(bundles: dict[str, Bundle], trace: Path, cache: str) -> None:
    bundle, workload = bundles["llama"], TraceWorkload(bundles["llama"], trace)
    setting = setting_with(bundle, 0.2, cache=cache, method="dip-ca", gamma=0.4, density=0.6)
    found = workload.traffic([setting])[0]
    frames = list(read_trace(trace)[1])
    for r, region in enumerate(bundle.header["regions"]):
        prompt, decoded = ([f.scores for f in frames if f.region == r and f.is_prompt is p] for p in (True, False))
        n, k = region["n_columns"], setting.k[r]
        column_cache = ColumnCache(n, setting.capacity[r], cache)
        warm = [top_k(row, k) for row in prompt]
        if cache == "static":  # the columns that the prompt used most
            uses = np.bincount(np.concatenate(warm), minlength=n)
            column_cache.pin(sorted(sorted(range(n), key=lambda j: (-uses[j], j))[: setting.capacity[r]]))
        for mask in warm:
            column_cache.step(mask, counted=False)
        hits = [column_cache.step(top_k(row, k, 0.4, column_cache.cached)).n_hits for row in decoded]
        assert found.hits[:, r].tolist() == hits
    assert (found.selected == setting.k).all()
    assert workload.describe(setting) == {"kind": "replayed", "model": "llama", "trace": str(trace)}
    other_density = setting_with(bundle, 0.2, cache="lru", density=0.6)
    assert workload.describe(other_density)["kind"] == "replayed"
    belady = setting_with(bundle, 0.2, cache="belady", density=0.6)
    assert workload.traffic([belady])[0].totals["hits"] >= workload.traffic([other_density])[0].totals["hits"]


def test_traces_that_are_refused(bundles: dict[str, Bundle], trace: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as e:
        TraceWorkload(bundles["qwen2"], trace)
    assert str(e.value) == f"{trace} was recorded with another bundle (llama): use its own, or record anew"
    cut = tmp_path / "cut.trace"
    cut.write_bytes(trace.read_bytes()[:-3])
    with pytest.raises(ConfigError) as e:
        TraceWorkload(bundles["llama"], cut)
    assert str(e.value) == f"{cut} ends inside a frame: the trace is cut, record it again"
    frames = list(read_trace(trace)[1])
    last = 48 + 5 * len(frames[-1].mask) + 12 * len(frames[-1].reads) + 4 * len(frames[-1].scores)
    for n_bytes in (trace.stat().st_size - last, len(_header_of(trace))):  # between frames; no frame at all
        cut.write_bytes(trace.read_bytes()[:n_bytes])
        with pytest.raises(ConfigError) as e:
            TraceWorkload(bundles["llama"], cut)
        assert str(e.value) == f"{cut} ends in the middle of a token, or has none: it is cut, record it again"
    low = tmp_path / "low.trace"
    engines_counters(setting_with(bundles["llama"], 0.3, cache="lfu", method="dip-ca", gamma=0.5), trace=low)
    with pytest.raises(ConfigError) as e:
        TraceWorkload(bundles["llama"], low)
    assert str(e.value) == f"{low} was recorded at gamma 0.5: its masks belong to its cache; record at gamma 1"
    plain = tmp_path / "plain.trace"
    setting = setting_with(bundles["llama"], 0.3, cache="lfu", trace_scores=False)
    engines_counters(setting, trace=plain)
    workload = TraceWorkload(bundles["llama"], plain)
    assert arrays_of(workload.traffic([setting])[0]) == arrays_of(
        TraceWorkload(bundles["llama"], trace).traffic([setting])[0]
    )
    with pytest.raises(ConfigError) as e:
        workload.traffic([setting_with(bundles["llama"], 0.3, cache="lfu", density=0.6)])
    assert str(e.value) == (
        f"{plain} has no scores, and its masks are for gamma 1 at its own densities: record with scores"
    )


def test_a_trace_cut_anywhere_is_refused(bundles: dict[str, Bundle], trace: Path, tmp_path: Path) -> None:
    """In the magic, the header, between frames and inside them; nothing stays open."""
    data, header = trace.read_bytes(), len(_header_of(trace))
    cut = tmp_path / "cut.trace"
    inside = np.linspace(header, len(data), 14, endpoint=False, dtype=int) + 1
    for n_bytes in (0, 4, 8, 12, 16, 17, header // 2, header - 1, header, *inside, len(data) - 1):
        cut.write_bytes(data[:n_bytes])
        with pytest.raises(ConfigError, match=f"^{re.escape(str(cut))} .*(record it again|with dipper run --trace)$"):
            TraceWorkload(bundles["llama"], cut)
        assert not any(file.exists() and file.samefile(cut) for file in Path("/proc/self/fd").iterdir()), n_bytes


def test_a_cold_trace_is_refused(bundles: dict[str, Bundle], tmp_path: Path) -> None:
    path = tmp_path / "cold.trace"
    engines_counters(setting_with(bundles["llama"], 0.3, cache="lfu", cold=True), trace=path)
    with pytest.raises(ConfigError) as e:
        TraceWorkload(bundles["llama"], path)
    assert str(e.value) == f"{path} was recorded with --cold: without the prompt's masks; record it without --cold"


def test_a_trace_of_a_chat_is_refused(bundles: dict[str, Bundle], tmp_path: Path) -> None:
    """Two turns: masks of the second prompt warm caches that the first answer has moved."""
    bundle, path = bundles["llama"], tmp_path / "chat.trace"
    setting = setting_with(bundle, 0.3, cache="lfu")
    with Engine.open(bundle.path, dataclasses.replace(setting.config, trace=path)) as engine:
        for _ in range(2):
            engine.prefill(PROMPT[:5])
            engine.step(7)
    message = f"{path} has a prompt after decoded tokens, as of a chat: record a single run"
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        TraceWorkload(bundle, path)
    # A prompt in several blocks of tokens is a single run.
    with Engine.open(bundle.path, dataclasses.replace(setting.config, trace=path)) as engine:
        for prompt in (PROMPT[:5], PROMPT[5:]):
            logits = engine.prefill(prompt)
        engine.step(int(logits.argmax()))
    assert TraceWorkload(bundle, path).n_prompt == len(PROMPT)


def test_a_trace_of_no_prompt(bundles: dict[str, Bundle], tmp_path: Path) -> None:
    """Tokens alone: nothing warms the caches, whether cold or not."""
    bundle, path = bundles["llama"], tmp_path / "tokens.trace"
    setting = setting_with(bundle, 0.3, cache="lru")
    with Engine.open(bundle.path, dataclasses.replace(setting.config, trace=path)) as engine:
        for token in TEXT:
            engine.step(token)
        counters = engine.counters()
    workload = TraceWorkload(bundle, path)
    assert (workload.n_prompt, workload.n_tokens) == (0, len(TEXT))
    assert workload.traffic([setting])[0].totals == totals_of(counters)


def _header_of(trace: Path) -> bytes:
    data = trace.read_bytes()
    return data[: 16 + int.from_bytes(data[12:16], "little")]


# --- settings and workloads that are refused


def test_settings_that_are_refused(bundles: dict[str, Bundle]) -> None:
    bundle = bundles["llama"]
    with pytest.raises(ConfigError) as e:
        Setting.plan_for(bundle, EngineConfig(context=48, mlp_dram="1000b"), cache="fifo")
    assert str(e.value) == "cache 'fifo' is unknown: choose none, lru, lfu, lfu-decay, static, belady"
    with pytest.raises(ConfigError) as e:
        Setting.plan_for(bundle, EngineConfig(context=48, mlp_dram="1000b", method="dip-ca"), cache="belady")
    assert str(e.value) == (
        "belady with gamma 0.5: masks then depend on the cache, so there is no future to know; use gamma 1, or another "
        "cache"
    )
    with pytest.raises(BudgetError, match=r"^--mlp-dram gives 0\.0 MB to the MLP, but its scales and staging alone"):
        Setting.plan_for(bundle, EngineConfig(context=48, mlp_dram="0.1b"))
    with pytest.raises(ConfigError) as e:
        Setting.plan_for(bundle, EngineConfig(context=48, mlp_dram="1000b", split=(1.0, 2.0)))
    assert str(e.value) == "the split has 2 weights, the model 6 regions: it is for another model"
    with pytest.raises(ConfigError) as e:
        Setting.plan_for(bundle, EngineConfig(context=48, mlp_dram="1000b", calibration="c.npz"))
    assert str(e.value) == "a calibration is not simulated yet: give --density, or --d-in and --d-glu"
    limit = bundle.model.max_context
    with pytest.raises(ConfigError) as e:
        Setting.plan_for(bundle, EngineConfig(context=limit + 1, mlp_dram="1000b"))
    assert str(e.value) == f"a context of {limit + 1} is over the model's {limit}: lower --ctx"
    assert Setting.plan_for(bundle, EngineConfig(context=limit, mlp_dram="1000b")).config.context == limit
    setting = setting_with(bundle, 0.3, cache="none", method="dip-ca", gamma=0.5)
    with pytest.raises(ConfigError) as e:
        ModelWorkload(bundle, PROMPT, n_tokens=3).traffic([setting])
    assert str(e.value) == "gamma below 1 without a cache favours nothing: use gamma 1, or a cache"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give either a number of tokens to decode or the tokens of a text"),
        ({"n_tokens": 3, "text": [1]}, "give either a number of tokens to decode or the tokens of a text"),
        ({"n_tokens": 0}, "15 prompt tokens and 0 after them: each must be at least 1"),
        ({"text": []}, "15 prompt tokens and 0 after them: each must be at least 1"),
    ],
)
def test_workloads_that_are_refused(bundles: dict[str, Bundle], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as e:
        ModelWorkload(bundles["llama"], PROMPT, **options)
    assert str(e.value) == message


def _workloads(bundle: Bundle, trace: Path) -> list[Any]:
    generator: Any = FixedScores()
    return [
        ModelWorkload(bundle, PROMPT, n_tokens=N_TOKENS),
        TraceWorkload(bundle, trace),
        GeneratedWorkload(bundle, generator, n_prompt=len(PROMPT), n_tokens=N_TOKENS),
    ]


def test_a_context_without_room_for_the_tokens(bundles: dict[str, Bundle], trace: Path) -> None:
    needed = len(PROMPT) + N_TOKENS
    for workload in _workloads(bundles["llama"], trace):
        short, enough = (setting_with(bundles["llama"], 0.3, cache="lru", context=c) for c in (needed - 1, needed))
        assert workload.traffic([enough])[0].n_tokens == N_TOKENS
        with pytest.raises(ConfigError) as e:
            workload.traffic([enough, short])
        assert str(e.value) == (
            f"a context of {needed - 1} for {len(PROMPT)} prompt tokens and {N_TOKENS} after them: use --ctx {needed} "
            "or more"
        )


def test_a_setting_of_another_bundle(bundles: dict[str, Bundle], trace: Path) -> None:
    other = setting_with(bundles["qwen2"], 0.3, cache="lru")
    for workload in _workloads(bundles["llama"], trace):
        with pytest.raises(ConfigError) as e:
            workload.traffic([other])
        assert str(e.value) == (
            f"a setting of {bundles['qwen2'].path} for a workload of {bundles['llama'].path}: use the same bundle"
        )


def test_a_setting_of_the_same_bundle_opened_again(bundles: dict[str, Bundle], trace: Path) -> None:
    again = Bundle.open(bundles["llama"].path)
    settings = [setting_with(bundle, 0.3, cache="lru") for bundle in (bundles["llama"], again)]
    for workload in _workloads(bundles["llama"], trace):
        one, other = (arrays_of(workload.traffic([setting])[0]) for setting in settings)
        assert one == other


BAD_WEIGHTS = "a split has weights that are negative or not finite, or all are 0: give one a region"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"method": "dense-stream", "split": (1.0,)},
            "a split shares out column slots, which dense-stream does not have: drop it",
        ),
        ({"split": (1.0, -1.0)}, BAD_WEIGHTS),
        ({"split": (0.0, 0.0)}, BAD_WEIGHTS),
        ({"split": (1.0, float("inf"))}, BAD_WEIGHTS),
        ({"split": (1.0, float("nan"))}, BAD_WEIGHTS),
    ],
)
def test_splits_that_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as e:
        EngineConfig(**options)
    assert str(e.value) == message


# --- generated scores


class FixedScores:
    """A generator whose streams anyone can make again."""

    fitted_on = ("nothing",)

    def region(self, kind: str, depth: float, n_columns: int, seed: int) -> FixedScores:
        self.asked = (kind, depth, n_columns, seed)
        self.rng = np.random.default_rng(seed)
        self.scale = np.linspace(1, 4, n_columns, dtype=np.float32)
        return self

    def scores(self, n_tokens: int) -> np.ndarray:
        return np.abs(self.rng.standard_normal((n_tokens, len(self.scale)), np.float32)) * self.scale


def test_generated_scores_go_through_the_caches(bundles: dict[str, Bundle]) -> None:
    bundle = bundles["gemma3"]
    workload = GeneratedWorkload(bundle, FixedScores(), n_prompt=6, n_tokens=9, seed=40)  # type: ignore[arg-type]
    settings = [setting_with(bundle, 0.3, cache="lfu", method="dip-ca", gamma=gamma) for gamma in (1.0, 0.3)]
    settings.append(setting_with(bundle, 0.3, cache="belady"))
    found = workload.traffic(settings)
    for setting, traffic in zip(settings[:2], found, strict=False):
        for r, region in enumerate(bundle.header["regions"]):
            stream = FixedScores().region(
                "", 0.0, region["n_columns"], int(np.random.SeedSequence((40, r)).generate_state(1)[0])
            )
            cache = ColumnCache(region["n_columns"], setting.capacity[r], "lfu")
            scan(stream.scores(6), setting.k[r], 1.0, cache, counted=False)
            assert scan(stream.scores(9), setting.k[r], setting.gamma, cache)[1].tolist() == traffic.hits[:, r].tolist()
    assert found[0].totals["hits"] < found[1].totals["hits"]
    assert found[0].totals["hits"] < found[2].totals["hits"]
    assert workload.describe(settings[0]) == {
        "kind": "generated", "model": "gemma3", "fitted_on": ["nothing"], "seed": 40,
    }  # fmt: skip
    assert workload.generator.asked[:3] == ("glu", 1.0, 160)
    with pytest.raises(ConfigError, match=r"^0 prompt tokens and 1 after them: each must be at least 1$"):
        GeneratedWorkload(bundle, FixedScores(), n_prompt=0, n_tokens=1)  # type: ignore[arg-type]


# --- seconds


PLAIN = Device(
    name="plain",
    title="Bandwidths alone",
    dram=Dram(bytes=8 * 10**9, gbps=10.0),
    flash=Flash(gbps=2.0, cost_per_read_us=0.0, latency_us=0.0, queue_depth=64, alignment=4096),
    compute=Compute(gemv_gweights_per_s=1e9, gemm_gmacs_per_s=100.0),
)
BUSY = dataclasses.replace(
    PLAIN,
    flash=dataclasses.replace(PLAIN.flash, cost_per_read_us=5.0, latency_us=80.0),
    compute=Compute(
        gemv_gweights_per_s=3.0,
        gemm_gmacs_per_s=0.5,
        head_gweights_per_s=2.0,
        region_us=4.0,
        select_us_per_region=3.0,
        select_ns_per_column=2.0,
        select_ns_per_miss=20.0,
        submit_us_per_read=1.5,
        copy_gbps=6.0,
        token_us=100.0,
    ),
    energy=Energy(dram_pj_per_byte=20.0, flash_pj_per_byte=100.0),
)


def with_flash(device: Device, **changes: Any) -> Device:
    return dataclasses.replace(device, flash=dataclasses.replace(device.flash, **changes))


def with_dram(device: Device, gbps: float) -> Device:
    return dataclasses.replace(device, dram=dataclasses.replace(device.dram, gbps=gbps))


def matrix_bytes(bundle: Bundle, *, head: bool) -> int:
    tensors = bundle.header["tensors"]
    return sum(
        entry["bytes"] + sum(s["bytes"] for s in entry["scales"].values())
        for name, entry in tensors.items()
        if entry["kind"] == "matrix" and (name == "head") is head
    )


def region_scale_bytes(region: dict[str, Any]) -> int:
    return sum(s["bytes"] for m in region["matrices"] for n, s in m["scales"].items() if n != "tier")


def kv_bytes(bundle: Bundle, n_prompt: int, n_tokens: int) -> float:
    """Keys and values read by a mean decoded token, fp32."""
    positions = np.mean([n_prompt + t for t in range(n_tokens)])
    model = bundle.model
    return float(positions) * 2 * 2 * model.n_layers * model.n_kv_heads * model.head_dim


def dense(bundle: Bundle, method: str, **options: Any) -> Setting:
    return Setting.plan_for(bundle, EngineConfig(method=method, context=64, **options), host_bytes=0)


def made_traffic(setting: Setting, rng: np.random.Generator, n_tokens: int = 4, *, n_reads: int = 6) -> Traffic:
    shape = (n_tokens, len(setting.k))
    selected = np.tile(np.array(setting.k, np.int64), (n_tokens, 1))
    hits = rng.integers(0, selected + 1)
    reads = np.where(hits < selected, rng.integers(0, n_reads + 1, shape), 0)
    return Traffic(
        selected=selected,
        hits=hits,
        admissions=(selected - hits) // 2,
        reads=reads,
        flash_bytes=reads * 8192,
        embedding_reads=np.ones(n_tokens, np.int64),
        embedding_bytes=np.full(n_tokens, 4096),
    )


def test_dense_resident_is_bytes_over_bandwidth(bundles: dict[str, Bundle]) -> None:
    bundle = bundles["qwen2"]  # tied: no embedding row is read
    setting = dense(bundle, "dense-resident")
    found = predict(setting, None, PLAIN, n_prompt=10, n_tokens=5)
    scales = sum(map(region_scale_bytes, bundle.header["regions"]))
    mlp = sum(region["bytes"] for region in bundle.header["regions"]) + scales
    total = mlp + matrix_bytes(bundle, head=False) + matrix_bytes(bundle, head=True) + kv_bytes(bundle, 10, 5)
    assert found.decode_s == pytest.approx(5 * total / 10e9, rel=1e-9)
    assert found.tok_per_s == pytest.approx(10e9 / total, rel=1e-9)
    assert found.products_s == pytest.approx(found.decode_s, rel=1e-12)
    assert (found.io_s, found.sustained_s, found.joules_per_token) == (0.0, 0.0, None)
    assert found.ledger_s["gemv"] == pytest.approx(5 * mlp / 10e9, rel=1e-9)
    # Where DRAM is not what holds back, weights over rate are: the same for any number of bytes.
    slow = dataclasses.replace(PLAIN, compute=dataclasses.replace(PLAIN.compute, gemv_gweights_per_s=0.01))
    weights = bundle.mlp_weights + sum(
        e["shape"][0] * e["shape"][1] for e in bundle.header["tensors"].values() if e["kind"] == "matrix"
    )
    expected = weights / 0.01e9 + kv_bytes(bundle, 10, 5) / 10e9
    assert predict(setting, None, slow, n_prompt=10, n_tokens=5).decode_s == pytest.approx(5 * expected, rel=1e-9)


def test_dense_streaming_takes_the_longer_of_reads_and_products(bundles: dict[str, Bundle]) -> None:
    bundle = bundles["qwen2"]
    resident = predict(dense(bundle, "dense-resident"), None, PLAIN, n_prompt=10, n_tokens=5).decode_s
    setting = dense(bundle, "dense-stream", mlp_dram="30b")
    read_s = 5 * setting.plan.stream_bytes / 2e9
    assert read_s > resident
    found = predict(setting, None, PLAIN, n_prompt=10, n_tokens=5)
    assert found.decode_s == pytest.approx(read_s, rel=1e-9)
    assert found.io_s == pytest.approx(read_s, rel=1e-12)
    assert found.ledger_s["wait"] == pytest.approx(read_s - resident, rel=1e-9)
    quick = predict(setting, None, with_flash(PLAIN, gbps=1e6), n_prompt=10, n_tokens=5)
    assert quick.decode_s == pytest.approx(resident, rel=1e-9)
    assert quick.ledger_s["wait"] == 0.0


def test_an_untied_embedding_is_a_read_of_its_own(bundles: dict[str, Bundle]) -> None:
    setting = dense(bundles["llama"], "dense-resident")
    n_bytes = -(-bundles["llama"].header["embedding"]["row_bytes"] // 4096) * 4096
    found = predict(setting, None, PLAIN, n_prompt=10, n_tokens=5)
    assert found.ledger_s["rest"] == pytest.approx(5 * n_bytes / 2e9, rel=1e-9)
    slow = predict(setting, None, with_flash(PLAIN, latency_us=300.0), n_prompt=10, n_tokens=5)
    assert slow.decode_s - found.decode_s == pytest.approx(5 * 300e-6, rel=1e-9)


def test_a_region_waits_for_its_reads_and_its_last_block(bundles: dict[str, Bundle]) -> None:
    bundle = bundles["llama"]
    setting = setting_with(bundle, 0.3, cache="lru")
    traffic = made_traffic(setting, np.random.default_rng(1))
    found = predict(setting, traffic, BUSY, n_prompt=10, n_tokens=4)
    expected = dict.fromkeys(LEDGER, 0.0)
    io_s = 0.0
    regions = bundle.header["regions"]
    for t, r in product(range(4), range(len(regions))):
        region, k = regions[r], setting.k[r]
        weights = k * sum(m["rows"] for m in region["matrices"])
        n_bytes = k * region["record_bytes"] + region_scale_bytes(region)
        gemv = 4e-6 + max(weights / 3e9, n_bytes / 10e9)
        n_reads, misses = int(traffic.reads[t, r]), int(traffic.misses[t, r])
        expected["gemv"] += gemv
        if n_reads:
            io = (80 + 5 * (n_reads - 1)) * 1e-6 + 8192 * n_reads / 2e9
            io_s += io
            expected["wait"] += max(0.0, io + gemv * min(1.0, 32 / k) - gemv)
        expected["select"] += 3e-6 + 2e-9 * region["n_columns"] + 20e-9 * misses
        expected["select"] += int(traffic.admissions[t, r]) * region["record_bytes"] / 6e9
        expected["submit"] += 1.5e-6 * n_reads
    row = 80e-6 + 4096 / 2e9
    expected["rest"] = 4 * (100e-6 + row)
    attention = [e for n, e in bundle.header["tensors"].items() if e["kind"] == "matrix" and n != "head"]
    head = bundle.header["tensors"]["head"]["shape"]
    n_weights = sum(e["shape"][0] * e["shape"][1] for e in attention)
    attention_s = max(n_weights / 3e9, matrix_bytes(bundle, head=False) / 10e9)
    expected["attention"] = 4 * (attention_s + kv_bytes(bundle, 10, 4) / 10e9)
    expected["head"] = 4 * max(head[0] * head[1] / 2e9, matrix_bytes(bundle, head=True) / 10e9)
    assert expected["wait"] > 0
    assert found.ledger_s == pytest.approx(expected, rel=1e-9)
    assert tuple(found.ledger_s) == tuple(LEDGER)
    assert found.io_s == pytest.approx(io_s + 4 * row, rel=1e-9)
    assert found.decode_s == pytest.approx(sum(expected.values()), rel=1e-9)
    assert found.tok_per_s == pytest.approx(4 / sum(expected.values()), rel=1e-9)
    dram = sum(k * r["record_bytes"] + region_scale_bytes(r) for k, r in zip(setting.k, regions, strict=True))
    dram += matrix_bytes(bundle, head=False) + matrix_bytes(bundle, head=True) + kv_bytes(bundle, 10, 4)
    flash = (8192 * int(traffic.reads.sum()) + 4 * 4096) / 4
    assert found.joules_per_token == pytest.approx(1e-12 * (20 * (dram + flash) + 100 * flash), rel=1e-9)


def test_without_reads_nothing_waits(bundles: dict[str, Bundle]) -> None:
    setting = setting_with(bundles["llama"], 0.3, cache="lru")
    none = made_traffic(setting, np.random.default_rng(1), n_reads=0)
    found = predict(setting, none, BUSY, n_prompt=10, n_tokens=4)
    assert (found.ledger_s["wait"], found.ledger_s["submit"]) == (0.0, 0.0)


def test_limits_in_the_long_run_bind(bundles: dict[str, Bundle]) -> None:
    setting = setting_with(bundles["llama"], 0.3, cache="lru")
    traffic = made_traffic(setting, np.random.default_rng(2))
    free = predict(setting, traffic, BUSY, n_prompt=10, n_tokens=4)
    totals = traffic.totals
    for changes, seconds in (
        ({"sustained_reads_per_s": 100.0}, totals["reads"] / 100),
        ({"sustained_gbps": 1e-4}, totals["flash_bytes"] / 1e5),
    ):
        found = predict(setting, traffic, with_flash(BUSY, **changes), n_prompt=10, n_tokens=4)
        assert found.sustained_s == pytest.approx(seconds, rel=1e-12)
        assert found.decode_s == pytest.approx(seconds, rel=1e-9)
        assert {k: v for k, v in found.ledger_s.items() if k != "wait"} == {
            k: v for k, v in free.ledger_s.items() if k != "wait"
        }
    # A limit that is not reached changes nothing.
    assert predict(setting, traffic, with_flash(BUSY, sustained_gbps=1e3), n_prompt=10, n_tokens=4).ledger_s == (
        free.ledger_s
    )
    stream = dense(bundles["qwen2"], "dense-stream", mlp_dram="30b")
    slow = with_flash(BUSY, sustained_gbps=1e-4)
    found = predict(stream, None, slow, n_prompt=10, n_tokens=4)
    assert found.decode_s == pytest.approx(4 * stream.plan.stream_bytes / 1e5, rel=1e-9)


def test_prefill_streams_a_block_of_tokens_once(bundles: dict[str, Bundle]) -> None:
    bundle = bundles["llama"]
    setting = setting_with(bundle, 0.02, cache="lru", context=100)
    assert setting.block_tokens == 16
    traffic = made_traffic(setting, np.random.default_rng(3))
    macs = bundle.mlp_weights + sum(
        e["shape"][0] * e["shape"][1]
        for n, e in bundle.header["tensors"].items()
        if e["kind"] == "matrix" and n != "head"
    )
    head = bundle.header["tensors"]["head"]["shape"]
    head_s = max(head[0] * head[1] / 2e9, matrix_bytes(bundle, head=True) / 10e9)
    io = float(BUSY.flash.batch_s(setting.plan.stream_reads, setting.plan.stream_bytes))
    expected = sum(max(io, n * macs / 0.5e9) for n in (16, 16, 5)) + head_s
    found = predict(setting, traffic, BUSY, n_prompt=37, n_tokens=4)
    assert found.ttft_s == pytest.approx(expected, rel=1e-9)
    fast = dataclasses.replace(BUSY, compute=dataclasses.replace(BUSY.compute, gemm_gmacs_per_s=1e9))
    assert predict(setting, traffic, fast, n_prompt=37, n_tokens=4).ttft_s == pytest.approx(3 * io + head_s, rel=1e-9)


@given(
    seed=st.integers(0, 1000),
    gbps=st.floats(0.1, 1000),
    factor=st.floats(1, 100),
    cost=st.floats(0, 100),
    limit=st.sampled_from([None, 0.001, 1.0]),
)
@hypothesis_settings(max_examples=20, deadline=None)
def test_a_better_device_is_never_slower(
    seed: int, gbps: float, factor: float, cost: float, limit: float | None
) -> None:
    setting = _mistral()
    traffic = made_traffic(setting, np.random.default_rng(seed), n_tokens=2, n_reads=200)
    base = with_dram(with_flash(BUSY, cost_per_read_us=cost, sustained_gbps=limit), gbps)

    def seconds(device: Device) -> float:
        found = predict(setting, traffic, device, n_prompt=10, n_tokens=2)
        assert sum(found.ledger_s.values()) == found.decode_s
        assert min(found.ledger_s.values()) >= 0
        assert found.decode_s >= max(found.products_s, found.sustained_s) * (1 - 1e-12)
        return found.decode_s

    now = seconds(base) * (1 + 1e-12)
    assert seconds(with_dram(base, gbps * factor)) <= now
    assert seconds(with_flash(base, gbps=base.flash.gbps * factor)) <= now
    assert seconds(with_flash(base, cost_per_read_us=cost / factor)) <= now
    assert seconds(with_flash(base, latency_us=base.flash.latency_us / factor)) <= now
    if limit is None:  # flat bandwidth is the sustained one, read by read
        assert seconds(dataclasses.replace(base, flash=base.flash.flat)) <= now


@lru_cache(maxsize=1)
def _mistral() -> Setting:
    config = EngineConfig(density=0.5, mlp_dram="50%")
    return Setting.plan_for(published_bundle("mistral-7b"), config, host_bytes=0)


# --- capacities by miss curves, and the record


def test_slots_where_they_save_the_most_time(bundles: dict[str, Bundle]) -> None:
    bundle = bundles["gemma3"]
    workload = ModelWorkload(bundle, PROMPT, text=TEXT)
    setting = setting_with(bundle, 0.3, cache="lru")
    weights, curves = miss_curve_split(workload, setting, BUSY, steps=8)
    regions = bundle.header["regions"]
    assert len(weights) == len(regions)
    assert curves.shape == (9, len(regions))
    assert all(0 <= weight <= 1 for weight in weights)
    room = sum(c * r["record_bytes"] for c, r in zip(setting.capacity, regions, strict=True))
    spent = sum(w * r["bytes"] for w, r in zip(weights, regions, strict=True))
    # Whole columns; what is left is less than one a region.
    columns = [weight * region["n_columns"] for weight, region in zip(weights, regions, strict=True)]
    assert columns == pytest.approx([round(c) for c in columns], abs=1e-6)
    assert 0 <= room - spent + 1e-6 < sum(r["record_bytes"] for r in regions)
    # The curves are what each region's reads take at 0, 1/8, ... of its columns.
    half = [r["n_columns"] // 2 for r in regions]
    plan = dataclasses.replace(setting.plan, options={**setting.plan.options, "capacity": half})
    at_half = workload.traffic([dataclasses.replace(setting, plan=plan)])[0]
    assert curves[4].tolist() == BUSY.flash.batch_s(at_half.reads, at_half.flash_bytes).mean(axis=0).tolist()
    # The engine plans with it, and what is planned reads no more than an even split.
    split = setting_with(bundle, 0.3, cache="lru", split=weights)
    assert split.plan.mlp_bytes <= split.plan.mlp_budget_bytes
    assert split.capacity != setting.capacity
    even, shared = (BUSY.flash.batch_s(t.reads, t.flash_bytes).sum() for t in workload.traffic([setting, split]))
    assert shared < even
    full = dataclasses.replace(setting.plan, options={**setting.plan.options, "capacity": [0] * len(regions)})
    with pytest.raises(BudgetError) as e:
        miss_curve_split(workload, dataclasses.replace(setting, plan=full), BUSY, steps=4)
    assert str(e.value) == ("no region reads less with a larger cache, or there is no room for slots: raise the budget")


def test_a_record_is_what_was_predicted(bundles: dict[str, Bundle]) -> None:
    bundle = bundles["llama"]
    workload = ModelWorkload(bundle, PROMPT, text=TEXT)
    setting = setting_with(bundle, 0.3, cache="belady")
    traffic = workload.traffic([setting])[0]
    record = sim_record(workload, setting, traffic, BUSY)
    found = predict(setting, traffic, BUSY, n_prompt=len(PROMPT), n_tokens=len(TEXT))
    compute = dataclasses.replace(BUSY.compute, submit_us_per_read=0.0)
    flat = dataclasses.replace(BUSY, flash=BUSY.flash.flat, compute=compute)
    flat_found = predict(setting, traffic, flat, n_prompt=len(PROMPT), n_tokens=len(TEXT))
    assert (record.tok_per_s, record.tok_per_s_flat) == (found.tok_per_s, flat_found.tok_per_s)
    assert record.tok_per_s < record.tok_per_s_flat
    assert record.ledger_s == found.ledger_s
    assert (record.cache, record.gamma, record.density, record.split) == ("belady", 1.0, 0.5, "uniform")
    totals = traffic.totals
    assert record.hit_rate == totals["hits"] / totals["selected"]
    assert record.flash_bytes_per_token == totals["flash_bytes"] / len(TEXT)
    assert record.reads_per_token == totals["reads"] / len(TEXT)
    assert (record.n_prompt, record.n_tokens, record.workload["kind"]) == (len(PROMPT), len(TEXT), "recorded")
    assert record.dram_bytes == setting.plan.parts
    assert json.loads(json.dumps(record.as_dict()))["schema"] == "dipper-sim/1"
    for density in (0.3, 0.6, 0.7):  # exactly what was asked, not what a mean of it rounds to
        asked = setting_with(bundle, 0.3, cache="lru", density=density)
        assert sim_record(workload, asked, workload.traffic([asked])[0], BUSY).density == density

    stream = dense(bundle, "dense-stream", mlp_dram="60%")
    record = sim_record(workload, stream, None, BUSY)
    assert (record.cache, record.gamma, record.density, record.hit_rate) == (None, None, None, None)
    assert record.workload == {"kind": "dense"}
    assert record.flash_bytes_per_token == stream.plan.stream_bytes + 4096  # an embedding row is one aligned read


# --- planes


PLANES = {  # how it is packed
    "llama": {"bits": "4", "base_bits": (2, 3), "unit_bytes": 500},
    "qwen2": {"bits": "4", "base_bits": (2, 2), "unit_bytes": 300},
}


@pytest.fixture(scope="module")
def splits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    folder = tmp_path_factory.mktemp("splits")
    paths = {
        kind: pack(tiny.write_hf(folder / kind, kind), folder / f"{kind}.dipper", tokenizer=False, **options)
        for kind, options in PLANES.items()
    }
    return {kind: Bundle.open(path) for kind, path in paths.items()}


def planes_setting(bundle: Bundle, mlp_dram: str, *, fetch: float = 0.15, **options: Any) -> Setting:
    config = EngineConfig(method="planes", mlp_dram=mlp_dram, context=48, threads=2, fetch=fetch, **options)
    return Setting.plan_for(bundle, config, host_bytes=0)


def held_setting(bundle: Bundle, **options: Any) -> Setting:
    """One under which all bases and whole layers are held, and some of the units are cached."""
    units = [-(-r["n_columns"] // r["columns_per_unit"]) for r in bundle.header["regions"]]
    for bits in np.arange(7.0, 14.0, 0.2):
        setting = planes_setting(bundle, f"{bits:.1f}b", **options)
        held = not setting.plan.token_stream_reads and any(setting.plan.options["refined"])
        if held and 0.1 * sum(units) < sum(setting.capacity) < 0.8 * sum(units):
            return setting
    raise AssertionError("no budget holds all bases and some of the units")


@pytest.mark.parametrize("kind", PLANES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cache": "lru", "fetch_glu": 0.3},
        {"cache": "lfu-decay", "cold": True},
        {"cache": "static"},
        {"fetch": 0.0, "fetch_glu": 0.1},
        {"whole": (1,)},
        {"read_cost": 2000},
        {"read_cost": 0, "fetch": 0.3, "cache": "lru"},
        {"read_cost": 20000, "fetch": 0.3, "fetch_glu": 0.2, "cold": True},
    ],
)
def test_live_planes_are_the_engines(splits: dict[str, Bundle], kind: str, options: dict[str, Any]) -> None:
    bundle = splits[kind]
    setting = held_setting(bundle, **options)
    counters = engines_counters(setting, text=TEXT)
    workload = ModelWorkload(bundle, PROMPT, text=TEXT, threads=1)
    (traffic,) = workload.traffic([setting])
    assert traffic.totals == totals_of(counters)
    assert workload.describe(setting)["kind"] == "live"
    greedy = ModelWorkload(bundle, PROMPT, n_tokens=N_TOKENS)
    assert greedy.traffic([setting])[0].totals == totals_of(engines_counters(setting))


def test_a_cache_named_beside_the_configuration_of_planes_runs(splits: dict[str, Bundle]) -> None:
    setting = held_setting(splits["llama"], cache="lru")
    other = dataclasses.replace(setting, config=dataclasses.replace(setting.config, cache="lfu"))
    workload = ModelWorkload(splits["llama"], PROMPT, text=TEXT)
    one, two = (ModelWorkload(splits["llama"], PROMPT, text=TEXT).traffic([s])[0] for s in (setting, other))
    assert arrays_of(one) == arrays_of(two)
    lfu = dataclasses.replace(setting, cache="lfu")
    assert arrays_of(workload.traffic([setting, lfu])[1]) != arrays_of(one)


def test_planes_that_stream_some_regions(splits: dict[str, Bundle]) -> None:
    """Where not all bases fit, the others are streamed: as many bytes a token, and reads too once the stream runs."""
    bundle = splits["llama"]
    setting = planes_setting(bundle, "6b", whole=(1,))
    assert any(setting.plan.options["refined"])
    assert setting.plan.token_stream_reads > 0
    (traffic,) = ModelWorkload(bundle, PROMPT, text=TEXT).traffic([setting])
    with Engine.open(bundle.path, setting.config) as engine:
        engine.prefill(PROMPT)
        before = {"reads": 0, "flash_bytes": 0}
        engine.reset_counters()
        rows = []
        for token in TEXT:
            engine.step(token)
            now = totals_of(engine.counters())
            rows.append({name: now[name] - before[name] for name in before})
            before = {name: now[name] for name in before}
    for name, ours, embedding, stream in (
        ("reads", traffic.reads, traffic.embedding_reads, traffic.stream_reads),
        ("flash_bytes", traffic.flash_bytes, traffic.embedding_bytes, traffic.stream_bytes),
    ):
        wanted = [row[name] for row in rows[1:]]  # the first token starts the stream, which then stays ahead
        assert (ours.sum(axis=1) + embedding + stream)[1:].tolist() == wanted


def test_generated_planes_read_what_the_plan_says(splits: dict[str, Bundle]) -> None:
    setting = held_setting(splits["llama"])
    workload = GeneratedWorkload(splits["llama"], FlatScores(), n_prompt=6, n_tokens=9)
    (traffic,) = workload.traffic([setting])
    options, regions = setting.plan.options, splits["llama"].header["regions"]
    units = [-(-r["n_columns"] // r["columns_per_unit"]) for r in regions]
    fetched = [min(f, u - c) for f, u, c in zip(options["fetch"], units, options["capacity"], strict=True)]
    assert (traffic.misses == fetched).all()
    assert (traffic.flash_bytes.sum(axis=1) <= setting.plan.token_bytes).all()
    assert (traffic.selected >= traffic.misses).all()
    shape = published_bundle("llama-3-8b", base_bits=(2, 3))
    config = EngineConfig(method="planes", mlp_dram="3.6b", fetch=0.1, context=48)
    setting = Setting.plan_for(shape, config, host_bytes=0)
    assert all(setting.plan.options["refined"])


class FlatScores:
    """A generator of random scores."""

    fitted_on = ("nothing",)

    def region(self, kind: str, depth: float, n: int, seed: int) -> Any:
        rng = np.random.default_rng(seed)

        class Stream:
            def scores(self, n_tokens: int) -> np.ndarray:
                return np.abs(rng.standard_normal((n_tokens, n))).astype(np.float32)

        return Stream()


def test_planes_take_the_time_of_bases_residuals_and_reads(splits: dict[str, Bundle]) -> None:
    """With compute free the reads remain, with reads free the products: of all bases and of what is refined."""
    bundle = splits["llama"]
    setting = held_setting(bundle)
    (traffic,) = ModelWorkload(bundle, PROMPT, text=TEXT).traffic([setting])
    device = Device.load("snapdragon-8-gen-3")
    found = predict(setting, traffic, device, n_prompt=len(PROMPT), n_tokens=len(TEXT))
    io = device.flash.batch_s(traffic.reads, traffic.flash_bytes).sum()
    rows = device.flash.batch_s(traffic.embedding_reads, traffic.embedding_bytes).sum()
    assert found.io_s == pytest.approx(float(io + rows))
    assert found.decode_s >= found.io_s
    bytes_of = [  # nothing refined, what this setting refines, everything
        predict(s, t, dataclasses.replace(device, flash=device.flash.flat), n_prompt=15, n_tokens=10).ledger_s["gemv"]
        for s, t in (
            (without_cache(setting), dataclasses.replace(traffic, hits=traffic.selected)),
            (setting, traffic),
        )
    ]
    assert bytes_of[0] < bytes_of[1]
    record = sim_record(ModelWorkload(bundle, PROMPT, text=TEXT), setting, traffic, device)
    assert (record.fetch, record.fetch_glu, record.cache, record.density) == (0.15, 0.15, "lfu", None)
    assert record.notes == ["planes: a token fetches 0.15 of the input and 0.15 of the GLU units"]
    assert record.flash_bytes_per_token == traffic.totals["flash_bytes"] / len(TEXT)
    assert record.hit_rate == traffic.hits.sum() / traffic.selected.sum()


def without_cache(setting: Setting) -> Setting:
    options = {**setting.plan.options, "capacity": [0] * len(setting.capacity)}
    return dataclasses.replace(setting, plan=dataclasses.replace(setting.plan, options=options))


def test_planes_that_are_not_simulated(splits: dict[str, Bundle], bundles: dict[str, Bundle]) -> None:
    config = EngineConfig(method="planes", mlp_dram="7b", context=48)
    for cache in ("none", "belady"):
        with pytest.raises(ConfigError) as e:
            Setting.plan_for(splits["llama"], config, cache=cache, host_bytes=0)
        assert str(e.value).startswith(f"cache {cache} with planes: what is refined depends on the cache")
    with pytest.raises(ConfigError) as e:
        Setting.plan_for(splits["llama"], config, capacity_share=0.5, host_bytes=0)
    assert str(e.value) == "planes caches units in what its bases leave: give a budget, not a share of the columns"
    with pytest.raises(ConfigError) as e:
        Setting.plan_for(bundles["llama"], config, host_bytes=0)
    path = bundles["llama"].path
    assert str(e.value).startswith(f"planes refines columns that are split in base and residual, and {path} has none")
