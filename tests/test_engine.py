"""The engine's invariants and its errors.

Invariants: density 1 is dense, gamma 1 depends on nothing but the masks, budgets hold.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import reference_model
import tiny
from dipper import _core
from dipper.budget import KV_CODES, EngineConfig, parse_bytes, plan_run
from dipper.bundle import Bundle, header_bytes, pack
from dipper.cache import ReferenceCache, n_selected, reference_top_k
from dipper.engine import METHODS, Engine
from dipper.errors import BudgetError, BundleError, ConfigError, FlashError
from dipper.trace import read_trace

KINDS = ("llama", "llama-tied", "mistral", "qwen2", "qwen3", "phi3", "gemma3")
ALL = "1000b"  # more DRAM than any tiny MLP can use
PROMPT = [3, 14, 15, 9, 26, 5, 35, 8, 9, 7, 9, 32, 38, 46, 2]


@pytest.fixture(scope="session")
def bundles(tmp_path_factory):
    """Tiny bundles of every architecture, packed on demand."""
    folder = tmp_path_factory.mktemp("bundles")
    known = [k for k in KINDS if k in tiny.CONFIGS]

    def bundle(kind: str = "llama") -> Path:
        assert kind in known
        path = folder / f"{kind}.dipper"
        if not path.exists():
            pack(tiny.write_hf(folder / kind, kind), path, tokenizer=False)
        return path

    bundle.kinds = known
    return bundle


@pytest.fixture(scope="session")
def smollm2(smollm2_gguf, tmp_path_factory):
    return pack(smollm2_gguf, tmp_path_factory.mktemp("smollm2") / "smollm2.dipper")


def decode(path, n=12, prompt=PROMPT, **options):
    """Greedy tokens and every row of logits."""
    options.setdefault("context", 64)
    if options.get("method", "dip") != "dense-resident":
        options.setdefault("mlp_dram", ALL)
    with Engine.open(path, EngineConfig(**options)) as engine:
        rows = [engine.prefill(prompt)]
        for _ in range(n):
            rows.append(engine.step(int(rows[-1].argmax())))
    return np.stack(rows)


def same_bits(a, b):
    return a.shape == b.shape and np.array_equal(a.view(np.int32), b.view(np.int32))


def scarce(path, share, **options):
    """The least MLP share that works and this part of the columns, in bits per weight; some columns do not fit."""
    bundle = Bundle.open(path)
    with pytest.raises(BudgetError) as e:
        plan_run(bundle, EngineConfig(mlp_dram="0.1b", **options), 0)
    least = float(str(e.value).split("raise --mlp-dram to ")[1].split("b ")[0])
    held = sum(r["bytes"] for r in bundle.header["regions"])
    return f"{least + share * 8 * held / bundle.mlp_weights:.3f}b"


# --- invariant 1: density 1 is dense


@pytest.mark.parametrize("kind", KINDS)
def test_density_1_equals_dense_bit_for_bit(bundles, kind):
    if kind not in bundles.kinds:
        pytest.skip(f"tests/tiny.py has no {kind}")
    path = bundles(kind)
    dense = decode(path, method="dense-resident")
    assert same_bits(decode(path, density=1.0, mlp_dram=scarce(path, 0.3, density=1.0, context=64)), dense)
    assert same_bits(decode(path, method="dense-stream"), dense)
    assert not same_bits(decode(path, density=0.5), dense)  # or nothing above was tested


def test_density_1_equals_dense_on_a_real_model(smollm2):
    dense = decode(smollm2, n=8, method="dense-resident")
    assert same_bits(decode(smollm2, n=8, method="dense-stream", mlp_dram="60%"), dense)
    assert same_bits(decode(smollm2, n=8, density=1.0, mlp_dram="60%"), dense)


# --- invariant 2: at gamma 1 nothing but the masks matters


@pytest.mark.parametrize("path_of", ["tiny", "smollm2"])
def test_gamma_1_depends_on_masks_alone(bundles, request, path_of):
    path = bundles() if path_of == "tiny" else request.getfixturevalue("smollm2")
    base = decode(path, density=0.6)
    shares = {share: scarce(path, share, density=0.6, context=64) for share in (0.0, 0.2, 0.3, 0.4, 0.7)}
    with Engine.open(path, EngineConfig(density=0.6, mlp_dram=shares[0.3], context=64)) as engine:
        for row in (engine.prefill(PROMPT), *base[1:-1]):
            engine.step(int(row.argmax()))
        assert engine.counters().evictions > 0  # such a cache is small, or nothing below was tested
    variants = (
        [{"mlp_dram": shares[share]} for share in (0.0, 0.2, 0.7)]
        + [{"cache": cache, "mlp_dram": shares[0.3]} for cache in ("lru", "lfu-decay", "static")]
        + [
            {"threads": 1},
            {"threads": 3},
            {"cold": True},
            {"reader": "pread"},
            {"cache": "static", "cold": True, "mlp_dram": shares[0.4]},
        ]
        + [{"isa": isa} for isa in _core.isas() if isa != "scalar" or path_of == "tiny"]
    )
    for variant in variants:
        assert same_bits(decode(path, **{"density": 0.6, **variant}), base), variant


# --- invariant 3: gamma < 1 repeats


def test_gamma_below_1_repeats(bundles):
    path = bundles()
    options = {"method": "dip-ca", "gamma": 0.3, "density": 0.5}
    share = scarce(path, 0.3, density=0.5, context=64)
    first = decode(path, mlp_dram=share, **options)
    assert same_bits(decode(path, mlp_dram=share, **options), first)
    assert not same_bits(decode(path, mlp_dram=share, density=0.5), first)  # gamma does something
    with Engine.open(path, EngineConfig(mlp_dram=share, context=64, **options)) as engine:
        for _ in range(2):
            engine.reset()
            engine.reset_cache()
            assert same_bits(engine.prefill(PROMPT), first[0])
            assert same_bits(engine.step(int(first[0].argmax())), first[1])


# --- evaluation is decoding


@pytest.mark.parametrize("gamma", [1.0, 0.5])
def test_block_forward_equals_decoding_512_tokens(smollm2, gamma):
    tokens = np.random.default_rng(0).integers(5, 40000, 512)
    config = EngineConfig(method="dip-ca", gamma=gamma, density=0.6, mlp_dram="60%", context=512)
    with Engine.open(smollm2, config) as engine:
        block = engine.logits(tokens)
        counted = engine.counters()
        engine.reset()
        engine.reset_cache()
        losses = engine.score(tokens)
        engine.reset()
        engine.reset_cache()
        for i, token in enumerate(tokens):
            assert same_bits(engine.step(int(token)), block[i]), i
        steps = engine.counters()
    assert (steps.hits, steps.misses, steps.selected) == (counted.hits, counted.misses, counted.selected)
    exact = block.astype(np.float64)
    exact = (
        np.log(np.exp(exact - exact.max(1, keepdims=True)).sum(1))
        + exact.max(1)
        - exact[np.arange(512), np.roll(tokens, -1)]
    )
    assert np.allclose(losses, exact[:-1], rtol=1e-5, atol=1e-6)


def test_decoding_goes_on_after_evaluation(smollm2):
    config = EngineConfig(method="dip-ca", gamma=0.5, density=0.6, mlp_dram="60%", context=64)
    with Engine.open(smollm2, config) as engine:
        engine.logits(range(100, 140))
        after_block = engine.step(7)
        engine.reset()
        engine.reset_cache()
        for token in range(100, 140):
            engine.step(token)
        assert same_bits(engine.step(7), after_block)


def test_pruning_hard_scores_worse(smollm2_gguf, smollm2):
    text = (Path(__file__).parent / "data" / "wikitext2_test_head.txt").read_text()[:6000]
    from dipper.tokenizer import Tokenizer

    tokens = Tokenizer.open(smollm2).encode(text)[:512]
    losses = {}
    for density in (1.0, 0.3):
        with Engine.open(smollm2, EngineConfig(density=density, mlp_dram="70%", context=512)) as engine:
            losses[density] = engine.score(tokens).mean()
    assert losses[1.0] < 4 < losses[0.3]


def test_forced_masks_of_a_run_give_its_logits(bundles, tmp_path):
    path = bundles()
    trace = tmp_path / "run.trace"
    with Engine.open(path, EngineConfig(density=0.6, mlp_dram=ALL, context=64, trace=trace)) as engine:
        rows = np.stack([engine.step(t) for t in PROMPT])
    header, frames = read_trace(trace)
    n_layers = len(header["regions"]) // 2
    masks = [
        tuple(np.zeros((len(PROMPT), header["regions"][2 * i + j]["n_columns"]), np.uint8) for j in range(2))
        for i in range(n_layers)
    ]
    for frame in frames:
        masks[frame.region // 2][frame.region % 2][frame.position, frame.mask] = 1
    with Engine.open(path, EngineConfig(method="dense-resident", context=64)) as engine:
        assert same_bits(engine.logits(PROMPT, masks), rows)


# --- cache, trace and flash counters


def test_trace_agrees_with_counters_and_reference(smollm2, tmp_path):
    trace = tmp_path / "run.trace"
    config = EngineConfig(
        method="dip-ca", gamma=0.4, density=0.55, mlp_dram="60%", context=64, trace=trace, cache="lru"
    )
    with Engine.open(smollm2, config) as engine:
        engine.reset_counters()
        for token in range(200, 212):
            engine.step(token)
        counters = engine.counters()
    header, frames = read_trace(trace)
    frames = list(frames)
    regions = header["regions"]
    assert len(frames) == 12 * len(regions)
    assert sum(f.flash_bytes for f in frames) == counters.flash_bytes
    assert sum(len(f.reads) for f in frames) == counters.reads
    assert sum(f.useful_bytes for f in frames) == counters.useful_bytes
    caches = [ReferenceCache(r["n_columns"], r["capacity"], "lru") for r in regions]
    for frame in frames:
        cache = caches[frame.region]
        region = regions[frame.region]
        cached = np.zeros(region["n_columns"], bool)
        cached[list(cache.slots)] = True
        k = n_selected(0.55, region["n_columns"])
        assert list(reference_top_k(frame.scores, k, 0.4, cached)) == list(frame.mask)
        assert np.array_equal(cached[frame.mask], frame.hit)
        cache.step(list(frame.mask))
        covered = np.zeros(region["n_columns"] * region["record_bytes"], bool)
        for offset, size in frame.reads:
            start = int(offset) - region["offset"]
            covered[max(0, start) : start + int(size)] = True
        assert covered.reshape(-1, region["record_bytes"])[frame.mask[~frame.hit]].all()
        assert frame.flash_bytes == frame.reads["bytes"].sum()
    assert (sum(c.hits for c in caches), sum(c.misses for c in caches)) == (counters.hits, counters.misses)
    assert sum(c.evictions for c in caches) == counters.evictions


def test_cut_trace_is_refused(bundles, tmp_path):
    trace = tmp_path / "run.trace"
    with Engine.open(bundles(), EngineConfig(mlp_dram=ALL, context=16, trace=trace)) as engine:
        engine.step(3)
        assert not trace.exists()  # only a closed trace has its name
    trace.write_bytes(trace.read_bytes()[:-3])
    with pytest.raises(ConfigError, match="ends inside a frame: the trace is cut"):
        list(read_trace(trace)[1])
    trace.write_bytes(b"not a trace at all")
    with pytest.raises(ConfigError, match="it is no trace"):
        read_trace(trace)


def test_prefill_warms_the_cache(smollm2):
    hits = {}
    for cold in (False, True):
        with Engine.open(smollm2, EngineConfig(density=0.5, mlp_dram="60%", context=64, cold=cold)) as engine:
            engine.prefill(PROMPT)
            engine.reset_counters()
            engine.step(5)
            hits[cold] = engine.counters().hits
    assert hits[True] == 0 < hits[False]


def test_dense_stream_reads_what_is_not_pinned(smollm2):
    with Engine.open(smollm2, EngineConfig(method="dense-stream", mlp_dram="60%", context=64)) as engine:
        streamed = sum(
            r["bytes"]
            for r, p in zip(engine.bundle.header["regions"], engine.plan.options["pinned"], strict=True)
            if not p
        )
        engine.step(3)
        engine.reset_counters()
        for token in range(8):
            engine.step(token)
        per_token = engine.counters().flash_bytes / 8
    assert streamed <= per_token < 1.1 * streamed  # alignment; reads ahead shift by less than a token


def test_flash_bytes_are_what_the_process_read(smollm2):
    def read_bytes():
        return int(Path("/proc/self/io").read_text().split("read_bytes: ")[1].split()[0])

    with Engine.open(smollm2, EngineConfig(density=0.6, mlp_dram="60%", context=64)) as engine:
        if not engine.direct:
            pytest.skip(f"{smollm2} is on a file system without direct I/O: reads go through the page cache")
        engine.reset_counters()
        before = read_bytes()
        for token in range(20):
            engine.step(token)
        counted = engine.counters().flash_bytes
        assert read_bytes() - before == pytest.approx(counted, rel=0.02)


# --- invariant 6: the budget


_PEAK = """
import sys
from dipper.budget import EngineConfig
from dipper.engine import Engine
from dipper.tokenizer import Tokenizer
tokenizer = Tokenizer.open(sys.argv[1])
config = EngineConfig(method=sys.argv[2], dram=sys.argv[3], context=96, density=0.7)
with Engine.open(sys.argv[1], config) as engine:
    logits = engine.prefill(range(300, 364))
    for _ in range(16):
        logits = engine.step(int(logits.argmax()))
    print(engine.plan.total_bytes, engine.plan.budget_bytes)
print(next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith("VmHWM")))
"""


@pytest.mark.parametrize("method", METHODS)
def test_peak_memory_keeps_to_the_budget(smollm2, method):
    dram = "170MB" if method == "dense-resident" else "130MB"
    run = subprocess.run(
        [sys.executable, "-c", _PEAK, smollm2, method, dram], capture_output=True, text=True, check=True
    )
    planned, budget, peak = (int(word) for word in run.stdout.split())
    assert planned <= budget
    assert peak <= budget + 32 * 2**20


@pytest.mark.parametrize("method", ["dense-resident", "dense-stream", "planes"])
def test_peak_memory_of_split_columns_keeps_to_the_budget(smollm2_split, method):
    dram = "170MB" if method == "dense-resident" else "130MB"
    run = subprocess.run(
        [sys.executable, "-c", _PEAK, smollm2_split, method, dram], capture_output=True, text=True, check=True
    )
    planned, budget, peak = (int(word) for word in run.stdout.split())
    assert planned <= budget
    assert peak <= budget + 32 * 2**20


@pytest.fixture
def memory_group():
    """A control group that limits memory: (folder, the file of its limit), as cgroup v1 or v2 has it."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "memory":
            parent, limit = Path("/sys/fs/cgroup/memory") / path.lstrip("/"), "memory.limit_in_bytes"
        elif controllers == "":
            parent, limit = Path("/sys/fs/cgroup") / path.lstrip("/"), "memory.max"
        else:
            continue
        group = parent / f"dipper-test-{os.getpid()}"
        try:
            group.mkdir()
        except OSError:
            continue
        if (group / limit).exists():
            yield group, limit
            group.rmdir()
            return
        group.rmdir()
    pytest.skip("no memory control group that this user may make")


def test_the_budget_holds_in_a_memory_group(smollm2, memory_group):
    group, limit = memory_group

    def run_in_group(limit_bytes):
        (group / limit).write_text(str(limit_bytes))
        enter = f"open({str(group / 'cgroup.procs')!r}, 'w').write('0')\n"
        return subprocess.run(
            [sys.executable, "-c", enter + _PEAK, smollm2, "dip", "130MB"], capture_output=True, text=True
        )

    budget = 130 * 10**6
    assert run_in_group(budget // 2).returncode == -signal.SIGKILL  # the group does end what takes too much
    held = run_in_group(budget + 32 * 2**20)
    assert held.returncode == 0, held.stderr


def test_smallest_budget_is_named_and_works(smollm2, smollm2_split):
    cases = [(smollm2, method) for method in METHODS]
    for path, method in [*cases, *((smollm2_split, m) for m in ("dense-resident", "dense-stream", "planes"))]:
        with pytest.raises(BudgetError, match=r"needs at least .* raise --dram to ") as error:
            Engine.open(path, EngineConfig(method=method, dram="1MB"))
        named = str(error.value).split("raise --dram to ")[1].split("MB")[0]
        with Engine.open(
            path, EngineConfig(method=method, dram=f"{float(named) + 4:.1f}MB")
        ) as engine:  # the host may grow a little
            assert engine.plan.total_bytes <= engine.plan.budget_bytes
            engine.step(1)


def test_smallest_mlp_share_is_named_and_works(smollm2, smollm2_split):
    split = ((smollm2_split, method) for method in ("dense-stream", "planes"))
    for path, method in ((smollm2, "dense-stream"), (smollm2, "dip"), (smollm2, "planes"), *split):
        with pytest.raises(BudgetError, match="its scales and staging alone need") as error:
            Engine.open(path, EngineConfig(method=method, mlp_dram="0.5b"))
        named = str(error.value).split("raise --mlp-dram to ")[1].split(" ")[0]
        with Engine.open(path, EngineConfig(method=method, mlp_dram=named)) as engine:
            assert engine.plan.mlp_bytes <= engine.plan.mlp_budget_bytes
            engine.step(1)


def test_plan_comes_before_loading(smollm2, tmp_path):
    damaged = tmp_path / "damaged.dipper"
    shutil.copytree(smollm2, damaged)
    with open(damaged / "resident.bin", "r+b") as f:
        f.seek(5000)
        f.write(b"\xff")
    plans = []
    with pytest.raises(BundleError, match=r"resident.bin does not match its checksum: the bundle is damaged"):
        Engine.open(damaged, EngineConfig(), on_plan=plans.append)
    assert len(plans) == 1
    assert plans[0].lines()[0].startswith("DRAM plan, MiB: total ")
    assert "bits per MLP weight" in plans[0].lines()[1]


def test_parse_bytes():
    assert parse_bytes("600MB", 0) == 600_000_000
    assert parse_bytes("1.5GiB", 0) == 3 * 2**29
    assert parse_bytes("60%", 1000) == 600
    assert parse_bytes(4096, 0) == 4096
    for text in ("lots", "-3MB", "5 XB", ""):
        with pytest.raises(ConfigError, match="is not an amount of memory: write 600MB"):
            parse_bytes(text, 1000)
    with pytest.raises(ConfigError, match="is nothing"):
        parse_bytes("0%", 1000)


# --- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "dop"}, "method 'dop' is unknown: choose .*dense-resident, dense-stream, dip, dip-ca, planes"),
        ({"density": 0.0}, r"density is 0.0, outside \(0, 1\]"),
        ({"density": 1.2}, r"density is 1.2, outside \(0, 1\]"),
        ({"density": float("nan")}, r"density is nan, outside"),
        ({"method": "dip-ca", "gamma": 0.0}, r"gamma is 0.0, outside \(0, 1\]"),
        ({"method": "dip-ca", "gamma": 1.5}, r"gamma is 1.5, outside"),
        ({"gamma": 0.5}, "gamma 0.5 goes with --method dip-ca, not dip"),
        ({"d_in": 0.5}, "d_in and d_glu go together"),
        ({"cache": "fifo"}, "cache 'fifo' is unknown: choose lru, lfu, lfu-decay, static"),
        ({"context": 0}, "context is 0: at least 1"),
        ({"threads": 0}, "threads is 0: at least 1"),
        ({"threads": 10**6}, r"threads is 1000000 on \d+ CPUs: give about as many"),
        ({"method": "dense-stream", "trace": Path("x")}, "a trace records masks, which dense-stream does not have"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ConfigError, match=message):
        EngineConfig(**options)


def test_bad_calls(bundles):
    path = bundles()
    with Engine.open(path, EngineConfig(mlp_dram=ALL, context=16)) as engine:
        with pytest.raises(ConfigError, match="the context is full: 17 positions are needed, --ctx gives 16"):
            engine.prefill([1] * 17)
        with pytest.raises(ConfigError, match=f"token id 100000 is outside the vocabulary of {engine.vocab_size}"):
            engine.step(100000)
        with pytest.raises(ConfigError, match="no tokens to run"):
            engine.prefill([])
        with pytest.raises(ConfigError, match="1 tokens cannot be scored"):
            engine.score([1])
        with pytest.raises(ConfigError, match=f"token id 1000000 is outside the vocabulary of {engine.vocab_size}"):
            engine.score([1, 10**6])
        with pytest.raises(ConfigError, match="forced masks for 0 layers"):
            engine.logits([1], masks=[])
        engine.prefill([1] * 16)
        with pytest.raises(ConfigError, match="the context is full"):
            engine.step(1)
    limit = Bundle.open(path).header["model"]["max_context"]
    with pytest.raises(ConfigError, match=f"a context of {limit + 1} is over the model's {limit}"):
        Engine.open(path, EngineConfig(context=limit + 1))
    with pytest.raises(ConfigError, match="instruction set 'mmx' is not available"):
        Engine.open(path, EngineConfig(isa="mmx", mlp_dram=ALL, context=16))
    with pytest.raises(ConfigError, match="--mlp-dram does not go with dense-resident"):
        Engine.open(path, EngineConfig(method="dense-resident", mlp_dram="50%", context=16))


def _steps(engine, n_tokens):
    for token in range(n_tokens):
        engine.step(token)


def test_flash_cut_while_running(bundles, tmp_path):
    path = tmp_path / "cut.dipper"
    shutil.copytree(bundles(), path)
    for method in ("dip", "dense-stream"):
        with Engine.open(path, EngineConfig(method=method, mlp_dram="20b", context=16, cold=True)) as engine:
            flash = path / "flash.bin"
            whole = flash.read_bytes()
            os.truncate(flash, 0)
            try:
                with pytest.raises(FlashError, match=r"flash\.bin"):
                    _steps(engine, 4)
                with pytest.raises(FlashError):  # and it stays stopped
                    engine.step(1)
            finally:
                flash.write_bytes(whole)


def test_nan_scores_name_layer_and_region(bundles, tmp_path):
    path = tmp_path / "nan.dipper"
    shutil.copytree(bundles(), path)
    header = json.loads((path / "bundle.json").read_text())
    header.pop("header_sha256", None)
    data = bytearray((path / "resident.bin").read_bytes())
    at = header["tensors"]["layers.1.mlp_norm"]["offset"] + 4 * 3
    data[at : at + 4] = np.float32(np.nan).tobytes()
    (path / "resident.bin").write_bytes(data)
    header["files"]["resident.bin"]["sha256"] = hashlib.sha256(data).hexdigest()
    (path / "bundle.json").write_bytes(header_bytes(header))
    with (
        Engine.open(path, EngineConfig(mlp_dram=ALL, context=16)) as engine,
        pytest.raises(ConfigError, match=r"layer 1, input columns: .*column 3.* NaN"),
    ):
        engine.step(1)


def test_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        EngineConfig().density = 0.5


def test_an_error_in_a_block_leaves_no_stale_columns(bundles, tmp_path):
    """A NaN amid a prompt: the caches had moved, their columns were never read. Nothing may be left of that."""
    path = tmp_path / "nan.dipper"
    shutil.copytree(bundles(), path)
    header = json.loads((path / "bundle.json").read_text())
    header.pop("header_sha256", None)
    flash = bytearray((path / "flash.bin").read_bytes())
    embedding = header["embedding"]
    bad = 77  # a token whose embedding is NaN
    at = embedding["offset"] + bad * embedding["row_bytes"]
    flash[at : at + 4] = np.float32(np.nan).tobytes()
    (path / "flash.bin").write_bytes(flash)
    (path / "bundle.json").write_bytes(header_bytes(header))
    config = EngineConfig(density=0.6, mlp_dram=scarce(path, 0.4, density=0.6, context=64), context=64)
    with Engine.open(path, config) as engine:
        clean = np.stack([engine.prefill(PROMPT), *(engine.step(t) for t in (5, 6, 7))])
        engine.reset()
        with pytest.raises(ConfigError, match="is NaN"):
            engine.prefill([*PROMPT, bad, 3])
        engine.reset()
        assert same_bits(np.stack([engine.prefill(PROMPT), *(engine.step(t) for t in (5, 6, 7))]), clean)
        engine.reset()
        with pytest.raises(ConfigError, match="is NaN"):
            engine.step(bad)
        engine.reset()
        engine.reset_cache()
        assert same_bits(engine.prefill(PROMPT), clean[0])


def test_a_run_that_fails_leaves_no_trace(bundles, tmp_path):
    trace = tmp_path / "run.trace"
    engine = Engine.open(bundles(), EngineConfig(mlp_dram=ALL, context=4, trace=trace))
    with pytest.raises(ConfigError, match="the context is full"), engine:
        _steps(engine, 5)
    assert list(tmp_path.iterdir()) == []


# --- slots shared out by a split, and simulated engines


def test_split_shares_slots_in_proportion(bundles):
    path = bundles()
    bundle = Bundle.open(path)
    regions = bundle.header["regions"]
    share = scarce(path, 0.2, density=0.5, context=64)
    weights = (0.1, 0.2, 0.4, 0.0, 0.3, 0.2)
    plan = plan_run(bundle, EngineConfig(mlp_dram=share, density=0.5, context=64, split=weights), 0)
    capacity = plan.options["capacity"]
    held = [c / r["n_columns"] for c, r in zip(capacity, regions, strict=True)]
    assert capacity[3] == 0
    assert max(held) < 1
    scale = held[2] / 0.4
    for found, weight, region in zip(held, weights, regions, strict=True):
        assert found == pytest.approx(scale * weight, abs=2 / region["n_columns"])
    assert plan.mlp_bytes <= plan.mlp_budget_bytes
    # All of the room is spent, but for less than a column a region.
    spare = plan.mlp_budget_bytes - plan.mlp_bytes
    assert spare < sum(r["record_bytes"] + 20 for r in regions)
    # Weights have no unit; equal ones are what no split gives, to a column.
    scaled = dataclasses.replace
    config = EngineConfig(mlp_dram=share, density=0.5, context=64, split=tuple(1e3 * w for w in weights))
    assert plan_run(bundle, config, 0).options["capacity"] == capacity
    even = plan_run(bundle, scaled(config, split=(2.5,) * 6), 0).options["capacity"]
    none = plan_run(bundle, scaled(config, split=None), 0).options["capacity"]
    assert max(abs(a - b) for a, b in zip(even, none, strict=True)) <= 1


@pytest.mark.parametrize("room", [0.05, 0.3, 0.8, 5.0])
def test_split_keeps_to_the_budget(bundles, room):
    path = bundles()
    bundle = Bundle.open(path)
    columns = [r["n_columns"] for r in bundle.header["regions"]]
    share = scarce(path, room, density=0.5, context=64)
    for weights in ((1, 1, 1, 1, 1, 1), (1, 0, 0, 0, 0, 0), (1e-6, 1, 1e6, 1, 1, 1), (0, 3, 0, 0, 1, 0)):
        plan = plan_run(bundle, EngineConfig(mlp_dram=share, density=0.5, context=64, split=weights), 0)
        capacity = plan.options["capacity"]
        assert plan.mlp_bytes <= plan.mlp_budget_bytes
        assert all(0 <= c <= n for c, n in zip(capacity, columns, strict=True))
        assert [c == 0 for c, w in zip(capacity, weights, strict=True) if w == 0] == [True] * weights.count(0)
        if room == 5.0:
            assert capacity == [n if w else 0 for n, w in zip(columns, weights, strict=True)]


def test_a_weight_of_next_to_nothing_is_as_none(bundles):
    bundle = Bundle.open(bundles())
    config = EngineConfig(mlp_dram=scarce(bundles(), 0.2, density=0.5, context=64), density=0.5, context=64)
    none, tiny_weight = (
        plan_run(bundle, dataclasses.replace(config, split=(weight, 1, 1, 1, 1, 1)), 0).options["capacity"]
        for weight in (0.0, 1e-30)
    )
    assert sum(none) > 0
    assert tiny_weight == none


def test_gamma_1_tokens_do_not_depend_on_a_split(bundles):
    path = bundles()
    share = scarce(path, 0.3, density=0.6, context=64)
    base = decode(path, density=0.6, mlp_dram=share)
    capacities = set()
    for weights in ((1.0, 0.0, 0.25, 3.0, 0.5, 0.5), (0.0, 0.0, 0.0, 0.0, 0.0, 1.0)):
        for cache in ("lru", "static"):
            assert same_bits(decode(path, density=0.6, mlp_dram=share, split=weights, cache=cache), base), weights
        config = EngineConfig(density=0.6, mlp_dram=share, split=weights, context=64)
        capacities.add(tuple(plan_run(Bundle.open(path), config, 0).options["capacity"]))
    assert len(capacities) == 2  # a split does something
    assert all(0 in capacity for capacity in capacities)


BAD_SPLIT = "a split has weights that are negative or not finite, or all are 0: give one a region"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": (1.0, -1.0)}, BAD_SPLIT),
        ({"split": ()}, BAD_SPLIT),
        ({"split": (0.0,) * 6}, BAD_SPLIT),
        ({"split": (1.0, float("nan"))}, BAD_SPLIT),
        ({"split": (1.0, float("inf"))}, BAD_SPLIT),
        (
            {"method": "dense-stream", "split": (1.0,) * 6},
            "a split shares out column slots, which dense-stream does not have: drop it",
        ),
        (
            {"method": "dense-resident", "split": (1.0,) * 6},
            "a split shares out column slots, which dense-resident does not have: drop it",
        ),
    ],
)
def test_bad_splits(options, message):
    with pytest.raises(ConfigError) as e:
        EngineConfig(**options)
    assert str(e.value) == message


def test_a_split_of_another_model(bundles):
    config = EngineConfig(mlp_dram=ALL, context=16, split=(1.0,) * 14)
    message = "the split has 14 weights, the model 6 regions: it is for another model"
    for call in (lambda: Engine.open(bundles(), config), lambda: plan_run(Bundle.open(bundles()), config, 0)):
        with pytest.raises(ConfigError) as e:
            call()
        assert str(e.value) == message


def test_plan_of_given_slots(bundles):
    bundle = Bundle.open(bundles())
    regions = bundle.header["regions"]
    columns = [r["n_columns"] for r in regions]
    config = EngineConfig(mlp_dram="0.1b", dram="1KB", density=0.5, context=64)  # no budget holds it back
    capacity = [3, 0, *columns[2:]]
    plan = plan_run(bundle, config, 1000, capacity)
    assert plan.options["capacity"] == capacity
    assert (plan.parts["host"], plan.budget_bytes, plan.mlp_budget_bytes) == (1000, None, None)
    slots = sum(c * r["record_bytes"] for c, r in zip(capacity, regions, strict=True))
    assert plan.parts["slots"] == slots
    assert plan.cached_fraction == slots / sum(r["bytes"] for r in regions)
    for bad, named in ((columns[0] + 1, 0), (-1, 0)):
        with pytest.raises(ConfigError) as e:
            plan_run(bundle, config, 0, [bad, *capacity[1:]])
        assert str(e.value) == (
            f"a capacity of {bad} for region {named} of {columns[0]} columns: it lies between 0 and all of them"
        )


@pytest.mark.parametrize("n", [0, 5, 7])
def test_plan_of_slots_of_another_model(bundles, n):
    with pytest.raises(ConfigError) as e:
        plan_run(Bundle.open(bundles()), EngineConfig(density=0.5, context=64), 0, [1] * n)
    assert str(e.value) == f"capacities for {n} regions, and the model has 6: give each one"


def test_simulated_dense_is_refused(bundles):
    for method in ("dense-stream", "dense-resident"):
        options = {} if method == "dense-resident" else {"mlp_dram": ALL}
        with pytest.raises(ConfigError) as e:
            Engine.open(bundles(), EngineConfig(method=method, context=16, **options), simulated=True)
        assert str(e.value) == f"{method} has no masks and no caches to simulate: use dip, dip-ca or planes"


def test_configure_is_for_the_same_context_of_a_simulated_engine(bundles):
    path = bundles()
    with Engine.open(path, EngineConfig(mlp_dram=ALL, context=16), simulated=True) as engine:
        for context in (15, 17):
            with pytest.raises(ConfigError) as e:
                engine.configure(EngineConfig(mlp_dram=ALL, context=context))
            assert str(e.value) == f"the context is 16 and cannot become {context}: open another engine"
        with pytest.raises(ConfigError) as e:
            engine.configure(EngineConfig(mlp_dram=ALL, context=16, calibration="c.npz"))
        assert str(e.value) == "a calibration does not go into a simulated engine that is open: open another one"
        assert engine.config == EngineConfig(mlp_dram=ALL, context=16)  # nothing changed
        engine.step(3)
    with Engine.open(path, EngineConfig(mlp_dram=ALL, context=16)) as engine:
        with pytest.raises(ConfigError) as e:
            engine.configure(EngineConfig(mlp_dram=ALL, context=16, density=0.5))
        assert "simulated" in str(e.value)


def test_configure_equals_opening(bundles):
    path = bundles()
    first = EngineConfig(mlp_dram=scarce(path, 0.3, density=0.7, context=64), density=0.7, context=64, threads=2)
    second = EngineConfig(
        method="dip-ca", gamma=0.3, mlp_dram=scarce(path, 0.2, density=0.5, context=64), density=0.5, context=64,
        cache="lru",
        split=(1, 0, 2, 1, 1, 1), threads=2,
    )  # fmt: skip

    def run(engine):
        rows = [engine.prefill(PROMPT)]
        for _ in range(8):
            rows.append(engine.step(int(rows[-1].argmax())))
        counters = engine.counters()
        return np.stack(rows), (counters.hits, counters.misses, counters.evictions)

    with Engine.open(path, second) as engine:
        expected = run(engine)
    with Engine.open(path, first, simulated=True) as engine:
        run(engine)
        engine.configure(second)
        found = run(engine)
        assert engine.densities == (0.5, 0.5)
    assert same_bits(found[0], expected[0])
    assert found[1] == expected[1]
    assert expected[1][2] > 0  # evictions


def test_configure_to_dense_is_refused(bundles):
    with Engine.open(bundles(), EngineConfig(mlp_dram=ALL, context=16), simulated=True) as engine:
        for options in ({"method": "dense-stream", "mlp_dram": ALL}, {"method": "dense-resident"}):
            with pytest.raises(ConfigError) as e:
                engine.configure(EngineConfig(context=16, **options))
            assert str(e.value) == (
                f"{options['method']} does not go into a simulated engine that is open: open another one"
            )
        assert engine.config == EngineConfig(mlp_dram=ALL, context=16)
        engine.step(3)


def test_configured_slots_are_those_of_plan_and_trace(bundles, tmp_path):
    config = EngineConfig(mlp_dram=ALL, context=16)
    with Engine.open(bundles(), config, simulated=True) as engine:
        engine.configure(dataclasses.replace(config, trace=tmp_path / "run.trace"), [5] * 6)
        engine.step(3)
        assert engine.plan.options["capacity"] == [5] * 6
    header, frames = read_trace(tmp_path / "run.trace")
    assert len(list(frames)) == 6
    assert [region["capacity"] for region in header["regions"]] == [5] * 6


# ------------------------------------------------------------------------------------------------ keys and values


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3"])
@pytest.mark.parametrize(("kv", "allowed"), [("f16", 5e-3), ("int8", 0.15)])
def test_shorter_keys_and_values_stay_close_and_blocks_equal_steps(bundles, kind, kv, allowed):
    got = {}
    for codes in ("f32", kv):
        config = EngineConfig(method="dense-resident", context=64, threads=2, kv=codes)
        with Engine.open(bundles(kind), config) as engine:
            got[codes] = engine.logits(PROMPT)
            engine.reset()
            steps = np.stack([engine.step(token) for token in PROMPT])
            assert np.array_equal(steps.view(np.int32), got[codes].view(np.int32))
            assert any(codes in note for note in engine.notes) == (codes != "f16")
    error = np.abs(got[kv] - got["f32"]).max()
    assert 0 < error <= allowed * np.abs(got["f32"]).max()


def test_keys_and_values_take_the_room_that_the_plan_says(bundles):
    path = bundles("llama")
    kv = {c: plan_run(Bundle.open(path), EngineConfig(context=64, kv=c, mlp_dram=ALL), 0).parts["kv"] for c in KV_CODES}
    model = Bundle.open(path).model
    values = 2 * model.n_layers * model.n_kv_heads * 64
    assert kv == {
        "f32": 4 * values * model.head_dim, "f16": 2 * values * model.head_dim, "int8": values * (model.head_dim + 4),
    }  # fmt: skip


def test_unknown_kv_is_named():
    with pytest.raises(ConfigError, match="kv 'f8' is unknown: choose f32, f16, int8"):
        EngineConfig(kv="f8")


def test_logits_can_be_looked_at_without_a_copy(bundles):
    with Engine.open(bundles(), EngineConfig(method="dense-resident", context=16)) as engine:
        engine.prefill(PROMPT[:2])
        copied = engine.step(3)
        seen = engine.step(4, copy=False)
        kept = seen.copy()
        assert not seen.flags.writeable
        assert copied.flags.writeable
        engine.step(5)
        assert np.array_equal(seen, engine.step(6, copy=False))  # the same memory, another token
        assert not np.array_equal(seen, kept)


# --- split columns: bases and residuals, method planes

SPLITS = {  # how it is made, the arguments of pack; units of "pages" are padded, the others are not
    "llama": ({}, {"bits": "4", "base_bits": 2, "unit_bytes": 500}),  # units that end in the middle of a block; untied
    "gemma3": ({}, {"bits": "4", "base_bits": 1, "unit_bytes": 300}),  # residuals of 3 bits; norms behind the MLP
    "mixed": ({"types": ("Q4_1", "Q5_0", "Q6_K"), "hidden_size": 160}, {"base_bits": 2, "unit_bytes": 300}),
    "groups": ({"types": ("Q6_K", "Q4_K", "Q5_K"), "hidden_size": 256}, {"base_bits": 3, "unit_bytes": 700}),
    "half": ({"types": ("Q4_0", "Q4_0", "Q8_0"), "hidden_size": 160}, {"base_bits": 3, "unit_bytes": 300}),
    "pages": ({"types": ("Q4_1", "Q4_1", "Q5_1"), "hidden_size": 256}, {"base_bits": (2, 3), "unit_bytes": 4096}),
}
GO_ON = [int(token) for token in np.random.default_rng(4).integers(3, 150, 40)]


@pytest.fixture(scope="session")
def splits(tmp_path_factory):
    """Tiny bundles (in one piece, split), packed on demand."""
    folder = tmp_path_factory.mktemp("splits")

    def pair(kind: str = "llama") -> tuple[Path, Path]:
        whole, split = folder / f"{kind}.dipper", folder / f"{kind}-split.dipper"
        if not split.exists():
            source = split_source(folder, kind)
            pack_options = SPLITS[kind][1]
            pack(source, whole, tokenizer=False, bits=pack_options.get("bits", "source"))
            pack(source, split, tokenizer=False, **pack_options)
        return whole, split

    return pair


def split_source(folder, kind):
    made = dict(SPLITS[kind][0])
    if "types" not in made:
        return tiny.write_hf(folder / kind, kind)
    pytest.importorskip("gguf")
    types = dict(zip(("ffn_gate", "ffn_up", "ffn_down"), made.pop("types"), strict=True))
    return tiny.write_gguf(
        folder / f"{kind}.gguf", "llama-tied", types, intermediate_size=256, num_attention_heads=4,
        num_key_value_heads=2, **made,
    )  # fmt: skip


@pytest.fixture(scope="session")
def smollm2_split(smollm2_gguf, tmp_path_factory):
    return pack(smollm2_gguf, tmp_path_factory.mktemp("smollm2") / "split.dipper", base_bits=2)


def planes_shares(path, **options):
    """MLP budgets by what a plan can do with them.

    "streams" some split regions whole; holds the bases of all and "some" of their units, or "all". Where a token
    fetches much, there may be no budget in which some bases fit and others do not.
    """
    shares = {}
    options = {"method": "planes", "context": 128, **options}
    bundle = Bundle.open(path)
    is_split = [region["base"] is not None for region in bundle.header["regions"]]
    units = [-(-r["n_columns"] // r["columns_per_unit"]) for r in bundle.header["regions"]]
    for part in (*np.arange(0, 0.2, 0.02), *np.arange(0.2, 2, 0.05), 2.5, 4.0):
        share = scarce(path, part, **options)
        plan = plan_run(bundle, EngineConfig(mlp_dram=share, **options), 0)
        assert plan.mlp_bytes <= plan.mlp_budget_bytes
        assert plan.cached_fraction <= 1
        refined, capacity = plan.options["refined"], plan.options["capacity"]
        assert all(s or not r for s, r in zip(is_split, refined, strict=True))
        assert all(0 <= c <= n * r for c, n, r in zip(capacity, units, refined, strict=True))
        if any(refined):
            if sum(refined) < sum(is_split):
                shares["streams"] = share  # the last: some that are refined lie between some that are not
            elif capacity == [n * s for n, s in zip(units, is_split, strict=True)]:
                shares.setdefault("all", share)
            else:
                shares.setdefault("some", share)
        else:
            stream = EngineConfig(method="dense-stream", mlp_dram=share, context=options["context"])
            assert plan.options == plan_run(bundle, stream, 0).options
    assert {"some", "all"} | ({"streams"} if options["fetch"] < 0.2 else set()) <= set(shares)
    return shares


@pytest.mark.parametrize("kind", SPLITS)
def test_refining_all_equals_the_bundle_in_one_piece(splits, kind):
    whole, split = splits(kind)
    dense = decode(whole, method="dense-resident")
    with Engine.open(whole, EngineConfig(method="dense-resident", context=64)) as engine:
        block = engine.logits(PROMPT)
    variants = [
        {"method": "dense-resident"},
        {"method": "dense-stream"},
        {"method": "dense-stream", "mlp_dram": scarce(split, 0.3, method="dense-stream", context=64)},
        {"method": "planes", "fetch": 0.0},  # all is cached
        {"method": "planes", "fetch": 1.0, "threads": 3},
        {"method": "planes", "fetch": 1.0, "read_cost": 12500, "threads": 3},
        {"method": "planes", "fetch": 1.0, "mlp_dram": scarce(split, 0.0, method="planes", context=64)},
        *(
            {"method": "planes", "fetch": 1.0, "mlp_dram": share, "cold": cold, "cache": cache, "context": 128}
            for share in planes_shares(split, fetch=1.0).values()
            for cold, cache in ((True, "lfu"), (False, "lru"), (True, "static"))
        ),
    ]
    for variant in variants:
        assert same_bits(decode(split, **variant), dense), variant
        options = {"context": 64, "mlp_dram": None if variant["method"] == "dense-resident" else ALL, **variant}
        with Engine.open(split, EngineConfig(**options)) as engine:
            assert same_bits(engine.logits(PROMPT), block), variant
    none = decode(split, method="planes", fetch=0.0, mlp_dram=planes_shares(split, fetch=0.0)["some"], context=128)
    assert not same_bits(none, dense)  # or nothing above was tested


def counted(engine):
    counters = engine.counters()
    return counters.selected, counters.hits, counters.misses, counters.evictions


@pytest.mark.parametrize("kind", SPLITS)
@pytest.mark.parametrize("cold", [False, True])
def test_a_block_of_planes_equals_decoding(splits, kind, cold):
    _, split = splits(kind)
    options = {"method": "planes", "fetch": 0.1, "fetch_glu": 0.05, "context": 128, "cold": cold}
    evictions = 0
    for share in planes_shares(split, fetch=0.1, fetch_glu=0.05).values():
        for cache in ("lfu", "lru", "static", "lfu-decay") if kind == "llama" else ("lfu",):
            config = EngineConfig(mlp_dram=share, cache=cache, **options)
            with Engine.open(split, config) as block, Engine.open(split, config) as steps:
                assert same_bits(block.prefill(PROMPT), steps.prefill(PROMPT))
                assert counted(block) == (0, 0, 0, 0)
                rows = block.logits(GO_ON)
                for i, token in enumerate(GO_ON):
                    assert same_bits(steps.step(token), rows[i]), (share, cache, i)
                assert counted(block) == counted(steps)
                evictions += counted(block)[3]
                assert same_bits(block.step(7), steps.step(7))  # the slots hold what the books say
                assert same_bits(block.logits(GO_ON[:9])[-1], [steps.step(t) for t in GO_ON[:9]][-1])
                for engine in (block, steps):
                    engine.reset()
                    engine.reset_cache()
                losses = block.score(GO_ON)
                rows = np.stack([steps.step(token) for token in GO_ON[:-1]]).astype(np.float64)
                exact = np.log(np.exp(rows).sum(1)) - rows[np.arange(len(rows)), GO_ON[1:]]
                assert np.allclose(losses, exact, rtol=1e-5, atol=1e-6)
    assert evictions > 0 or kind != "llama"  # or no slot was overwritten


@pytest.mark.parametrize("kind", SPLITS)
def test_planes_depend_on_the_cache_alone(splits, kind):
    _, split = splits(kind)
    options = {"method": "planes", "fetch": 0.1, "context": 128}
    for share in planes_shares(split, fetch=0.1).values():
        base = decode(split, mlp_dram=share, **options)
        variants = [{"threads": n} for n in (1, 2, 3)] + [{"reader": "pread"}] + [{"isa": isa} for isa in _core.isas()]
        for variant in variants:
            assert same_bits(decode(split, mlp_dram=share, **options, **variant), base), (share, variant)


def test_planes_on_a_real_model(smollm2, smollm2_split):
    dense = decode(smollm2, n=4, method="dense-resident")
    for method in ("dense-resident", "dense-stream"):
        assert same_bits(decode(smollm2_split, n=4, method=method), dense)
    for share in ("3.2b", "4b"):
        assert same_bits(decode(smollm2_split, n=4, method="planes", fetch=1.0, mlp_dram=share), dense)
        config = EngineConfig(method="planes", mlp_dram=share, context=64)
        with Engine.open(smollm2_split, config) as block, Engine.open(smollm2_split, config) as steps:
            rows = block.logits(GO_ON)
            for i, token in enumerate(GO_ON):
                assert same_bits(steps.step(token), rows[i]), (share, i)


def expected_reads(engine):
    """(units, their bytes and those of what is streamed) that a token reads: caches of planes are always full."""
    options = engine.plan.options
    n_units = n_bytes = 0
    for i, region in enumerate(engine.bundle.header["regions"]):
        if options["refined"][i]:
            units = -(-region["n_columns"] // region["columns_per_unit"])
            n = min(options["fetch"][i], units - options["capacity"][i])
            n_units += n
            n_bytes += n * region["unit_bytes"]
        elif not options["pinned"][i]:
            base = region["base"]
            whole = region["bytes"] if base is None else base["offset"] - region["offset"] + base["bytes"]
            n_bytes += -(-whole // 4096) * 4096
    return n_units, n_bytes


@pytest.mark.parametrize("read_cost", [0, 2000])
@pytest.mark.parametrize("kind", SPLITS)
def test_runs_of_units_decode_as_blocks_do_and_keep_to_the_plan(splits, kind, read_cost):
    _, split = splits(kind)
    options = {"method": "planes", "fetch": 0.1, "read_cost": read_cost, "context": 128}
    for share in planes_shares(split, **options).values():
        with Engine.open(split, EngineConfig(mlp_dram=share, **options)) as block:
            rows = block.logits(PROMPT + GO_ON)
        with Engine.open(split, EngineConfig(mlp_dram=share, **options)) as steps:
            for i, token in enumerate(PROMPT + GO_ON):
                steps.reset_counters()
                assert same_bits(steps.step(token), rows[i]), (share, i)
                if i > 1:  # the stream is ahead by as much from now on
                    assert steps.counters().flash_bytes <= steps.plan.token_bytes + 2 * 4096  # the embedding
        for variant in ({"threads": 3}, {"reader": "pread"}):
            assert same_bits(
                decode(split, mlp_dram=share, **options, **variant), decode(split, mlp_dram=share, **options)
            )


@pytest.mark.parametrize("fetch", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("kind", ["mixed", "groups", "half", "pages"])
@pytest.mark.parametrize("cold", [False, True])
def test_every_token_of_planes_reads_as_much(splits, kind, fetch, cold):
    _, split = splits(kind)
    for what, share in planes_shares(split, fetch=fetch).items():
        config = EngineConfig(method="planes", fetch=fetch, mlp_dram=share, context=128, cold=cold)
        with Engine.open(split, config) as engine:
            engine.prefill(PROMPT)
            engine.step(1)  # the stream is ahead by as much from now on
            n_units, n_bytes = expected_reads(engine)
            for token in GO_ON[:12]:
                engine.reset_counters()
                engine.step(token)
                counters = engine.counters()
                assert counters.misses == n_units
                assert n_bytes <= counters.flash_bytes <= engine.plan.token_bytes
                if kind == "pages" or n_units == 0:
                    assert counters.flash_bytes == n_bytes  # else a unit lies amid pages, of which some are shared
                assert (counters.reads > 0) == (n_bytes > 0)
                assert counters.hits == counters.selected - counters.misses
            if what != "streams":
                assert (n_units > 0) == (fetch > 0 and what == "some")
            if kind != "half":
                assert (n_bytes > n_units) == (n_units > 0 or what == "streams")


def planned(path, budget, **options):
    return plan_run(Bundle.open(path), EngineConfig(method="planes", dram=budget, context=64, **options), 0)


@pytest.mark.parametrize("whole", [(), (1,), (2, 0)])
@pytest.mark.parametrize("fetch", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("kind", SPLITS)
def test_plans_of_planes_keep_to_the_budget_and_use_it(splits, kind, fetch, whole):
    """From the smallest budget upward: at most it, and less by no more than the next thing would take."""
    _, path = splits(kind)
    options = {"fetch": fetch, "whole": whole}
    regions = Bundle.open(path).header["regions"]
    is_whole = [region["layer"] in whole for region in regions]
    slots = sum(region["unit_bytes"] + 64 for region in regions)
    largest = max((r["base"]["bytes"] if r["base"] else 0) + r["bytes"] + 8192 for r in regions)
    least = planned(path, 10**12, **options).minimum_bytes
    with pytest.raises(BudgetError):
        planned(path, least - 1, **options)
    found = set()
    for budget in range(least, least + 2 * sum(r["bytes"] for r in regions), 1999):
        plan = planned(path, budget, **options)
        refined, pinned, capacity = (plan.options[name] for name in ("refined", "pinned", "capacity"))
        assert plan.minimum_bytes == least
        assert plan.total_bytes <= budget
        assert plan.cached_fraction <= 1
        units = [-(-r["n_columns"] // r["columns_per_unit"]) for r in regions]
        full = [n * held for n, held in zip(units, refined, strict=True)]
        assert all(0 <= c <= n for c, n in zip(capacity, full, strict=True))
        assert not any(r and (p or w) for r, p, w in zip(refined, pinned, is_whole, strict=True))
        if not any(refined):
            stream = EngineConfig(method="dense-stream", dram=budget, context=64)
            assert plan.options == plan_run(Bundle.open(path), stream, 0).options
            if not all(pinned):
                assert budget - plan.total_bytes < largest
            found.add("stream")
        elif capacity != full:
            assert budget - plan.total_bytes < slots
            found.add("slots")
        else:
            found.add("all")
    assert found == {"stream", "slots", "all"}


@pytest.mark.parametrize("kind", ["gemma3", "llama"])
def test_plans_of_dense_streams_keep_to_the_budget(splits, kind):
    """Regions whose units end amid a page, with a gap before their bases."""
    bundle = Bundle.open(splits(kind)[1])
    regions = bundle.header["regions"]
    assert any(r["base"]["offset"] > r["offset"] + r["bytes"] for r in regions)
    least = plan_run(bundle, EngineConfig(method="dense-stream", dram=10**12, context=64), 0).minimum_bytes
    for budget in range(least, least + 2 * sum(r["bytes"] for r in regions), 499):
        plan = plan_run(bundle, EngineConfig(method="dense-stream", dram=budget, context=64), 0)
        assert plan.total_bytes <= budget


def whole_shares(path, whole, **options):
    """MLP budgets by how many of the regions of whole layers they pin."""
    shares = {}
    options = {"method": "planes", "whole": whole, "context": 128, **options}
    bundle = Bundle.open(path)
    wanted = [2 * layer + kind for layer in whole for kind in (0, 1)]
    for part in np.arange(0, 3, 0.05):
        share = scarce(path, part, **options)
        plan = plan_run(bundle, EngineConfig(mlp_dram=share, **options), 0)
        if any(plan.options["refined"]):
            shares.setdefault(sum(plan.options["pinned"][r] for r in wanted), share)
    return shares


@pytest.mark.parametrize("kind", ["llama", "mixed", "gemma3"])
@pytest.mark.parametrize("whole", [(1,), (2, 0)])
def test_whole_layers_are_pinned_while_the_budget_lasts(splits, kind, whole):
    whole_path, split = splits(kind)
    dense = decode(whole_path, method="dense-resident")
    shares = whole_shares(split, whole, fetch=1.0)
    n = 2 * len(whole)
    assert {0, n} <= set(shares)  # none and all of them are pinned, and what lies between
    for n_pinned, share in shares.items():
        options = {"method": "planes", "whole": whole, "mlp_dram": share, "context": 128}
        for cold in (False, True):
            assert same_bits(decode(split, fetch=1.0, cold=cold, **options), dense), (n_pinned, cold)
        config = EngineConfig(fetch=0.1, **options)
        with Engine.open(split, config) as block, Engine.open(split, config) as steps:
            rows = block.logits(GO_ON)
            for i, token in enumerate(GO_ON):
                assert same_bits(steps.step(token), rows[i]), (n_pinned, i)
            assert counted(block) == counted(steps)
    everything = plan_run(
        Bundle.open(split), EngineConfig(method="planes", whole=whole, mlp_dram=ALL, context=64), 0
    ).options
    in_whole = [region["layer"] in whole for region in Bundle.open(split).header["regions"]]
    assert everything["pinned"] == [int(w) for w in in_whole]
    assert everything["refined"] == [int(not w) for w in in_whole]


@pytest.mark.parametrize("whole", [(2, 0), (0, 2)])
def test_the_first_whole_layer_is_pinned_first(splits, whole):
    """Where one region fits it is of that layer. More free buffers of the stream, so which are next is no rule."""
    bundle = Bundle.open(splits("gemma3")[1])
    options = {"method": "planes", "whole": whole, "fetch": 0.1, "context": 128}
    share = whole_shares(bundle.path, whole, fetch=0.1)[1]
    plan = plan_run(bundle, EngineConfig(mlp_dram=share, **options), 0)
    pinned = [r["layer"] for r, p in zip(bundle.header["regions"], plan.options["pinned"], strict=True) if p]
    assert pinned == [whole[0]]


def test_all_layers_whole_is_dense_streaming(splits, bundles):
    whole_path, split = splits("llama")
    for share in (ALL, scarce(split, 0.5, method="planes", context=64)):
        config = EngineConfig(method="planes", whole=(0, 1, 2), mlp_dram=share, context=64)
        stream = EngineConfig(method="dense-stream", mlp_dram=share, context=64)
        plans = [plan_run(Bundle.open(split), c, 0) for c in (config, stream)]
        assert plans[0].options == plans[1].options
        assert plans[0].token_bytes == plans[1].token_bytes
        dense = decode(whole_path, method="dense-resident")
        assert same_bits(decode(split, method="planes", whole=(0, 1, 2), mlp_dram=share), dense)
    assert same_bits(
        decode(bundles(), method="planes", whole=(1,)), decode(bundles(), method="dense-stream")
    )  # not split: nothing to refine


def test_a_whole_layer_that_the_model_does_not_have(splits, bundles):
    for path in (splits("llama")[1], bundles()):
        for layer in (3, 1000):
            with pytest.raises(ConfigError) as e:
                Engine.open(path, EngineConfig(method="planes", whole=(1, layer), mlp_dram=ALL, context=64))
            assert str(e.value) == f"layer {layer} is to be whole, and the model has none: give layers of 0..2"


def test_what_is_refined_is_what_the_definition_says(splits, monkeypatch):
    """A static cache and no reads: the first units of every region are refined, and nothing else is."""
    _, split = splits("mixed")
    options = {"method": "planes", "fetch": 0.0, "context": 128}
    config = EngineConfig(cache="static", cold=True, mlp_dram=scarce(split, 1.2, **options), **options)
    with Engine.open(split, config) as engine:
        rows = engine.logits(PROMPT)
        regions = engine.bundle.header["regions"]
        masks = []
        for region, capacity in zip(regions, engine.plan.options["capacity"], strict=True):
            used = np.zeros((len(PROMPT), region["n_columns"]), np.uint8)
            assert 0 < capacity * region["columns_per_unit"] < region["n_columns"]
            used[:, : capacity * region["columns_per_unit"]] = 1
            masks.append(used)
    pairs = list(zip(masks[::2], masks[1::2], strict=True))
    nothing = [(np.zeros_like(a), np.zeros_like(b)) for a, b in pairs]
    everything = [(np.ones_like(a), np.ones_like(b)) for a, b in pairs]
    for options in ({"method": "dense-resident"}, {"method": "dense-stream", "mlp_dram": ALL}):
        with Engine.open(split, EngineConfig(context=128, kv="f32", **options)) as engine:
            found = {}
            for name, forced in (("planes", pairs), ("coarse", nothing), ("dense", everything), ("own", None)):
                engine.reset()
                found[name] = engine.logits(PROMPT, forced)
        assert same_bits(found["dense"], found["own"])
    with Engine.open(split, EngineConfig(method="dense-resident", context=128)) as engine:
        assert same_bits(engine.logits(PROMPT, pairs), rows)

    # Without residuals a weight is in the middle of what it could be.
    whole_columns = Bundle._dequantise_columns
    read_records = Bundle._read_records

    def middle(bundle, region, matrix):
        ends = []
        for byte in (0, 255):
            monkeypatch.setattr(
                Bundle,
                "_read_records",
                lambda b, r, byte=byte: {
                    k: v if k == "base" else np.full_like(v, byte) for k, v in read_records(b, r).items()
                },
            )
            ends.append(whole_columns(bundle, region, matrix).astype(np.float64))
        monkeypatch.setattr(Bundle, "_read_records", read_records)
        return (ends[0] + ends[1]) / 2

    bundle = Bundle.open(split)
    dense = reference_model.logits(bundle, PROMPT)
    monkeypatch.setattr(Bundle, "_dequantise_columns", middle)
    coarse = reference_model.logits(bundle, PROMPT)
    allowed = 2e-3 * np.abs(dense).max()
    assert np.abs(found["dense"] - dense).max() < allowed
    assert np.abs(found["coarse"] - coarse).max() < allowed
    assert np.abs(coarse - dense).max() > 10 * allowed


def test_planes_of_a_bundle_in_one_piece_are_its_stream(bundles):
    path = bundles()
    dense = decode(path, method="dense-stream")
    for options in ({}, {"fetch": 0.0}, {"mlp_dram": scarce(path, 0.2, method="planes", context=64)}):
        assert same_bits(decode(path, method="planes", **options), dense), options
    with Engine.open(path, EngineConfig(method="planes", mlp_dram=ALL, context=64)) as engine:
        assert all(engine.plan.options["pinned"])
        engine.logits(PROMPT)
        assert counted(engine) == (0, 0, 0, 0)


class Recorder:
    """Stands where reference_model has a pruning rule, and keeps what it is given."""

    def __init__(self):
        self.inputs = {}

    def prune(self, layer, kind, x):
        self.inputs[f"layers.{layer}.{('input', 'glu')[kind]}"] = x
        return x


@pytest.mark.parametrize("path_of", ["whole", "split", "16-bit"])
def test_column_energies_are_mean_squares_of_inputs(bundles, splits, path_of):
    path = bundles() if path_of == "16-bit" else splits("llama")[path_of == "split"]
    config = EngineConfig(method="dense-stream", mlp_dram=ALL, context=128, kv="f32")
    with Engine.open(path, config) as engine:
        found = engine.column_energies(GO_ON)
        engine.reset()
        engine.prefill(GO_ON[:10])
        rest = engine.column_energies(GO_ON[10:])
        recorder = Recorder()
        reference_model.logits(engine.bundle, GO_ON, recorder)
    assert list(found) == list(recorder.inputs) == list(rest)
    for name, x in recorder.inputs.items():
        for energies, rows in ((found, x), (rest, x[10:])):
            expected = (rows**2).mean(0)
            assert energies[name].shape == expected.shape
            assert np.abs(energies[name] - expected).max() < 2e-3 * expected.max()


def test_an_order_changes_no_bit_where_all_is_refined(splits, tmp_path):
    whole, split = splits("llama")
    with Engine.open(whole, EngineConfig(method="dense-resident", context=128)) as engine:
        energies = engine.column_energies(GO_ON)
    ordered = pack(
        split_source(tmp_path, "llama"), tmp_path / "x.dipper", tokenizer=False, energies=energies, **SPLITS["llama"][1]
    )
    regions = Bundle.open(ordered).header["regions"]
    assert all(r["order"] not in (None, sorted(r["order"])) for r in regions)
    dense = decode(whole, method="dense-resident")
    options = {"method": "planes", "context": 128}
    for share in planes_shares(ordered, fetch=1.0).values():
        assert same_bits(decode(ordered, fetch=1.0, mlp_dram=share, **options), dense)
    assert same_bits(decode(ordered, method="dense-resident"), dense)
    assert same_bits(decode(ordered, method="dense-stream"), dense)
    # Otherwise an order matters: other columns share a unit, and the hottest are there first.
    share = planes_shares(ordered, fetch=0.1)["some"]
    rows = decode(ordered, fetch=0.1, mlp_dram=share, cold=True, **options)
    plain = decode(split, fetch=0.1, mlp_dram=share, cold=True, **options)
    assert not same_bits(rows, plain)
    config = EngineConfig(fetch=0.1, mlp_dram=share, **options)
    with Engine.open(ordered, config) as block, Engine.open(ordered, config) as steps:
        found = block.logits(GO_ON)
        for i, token in enumerate(GO_ON):
            assert same_bits(steps.step(token), found[i]), i


@pytest.mark.parametrize("what", ["streams", "some"])
def test_flash_cut_amid_planes(splits, tmp_path, what):
    path = tmp_path / "cut.dipper"
    shutil.copytree(splits("mixed")[1], path)
    config = EngineConfig(method="planes", fetch=0.1, mlp_dram=planes_shares(path, fetch=0.1)[what], context=128)
    flash = path / "flash.bin"
    whole = flash.read_bytes()
    for spoil in (
        lambda engine: [engine.step(t) for t in GO_ON[:4]],
        lambda engine: engine.logits(GO_ON[:4]),
        lambda engine: engine.prefill(GO_ON[:4]),
    ):
        with Engine.open(path, config) as engine:
            engine.step(1)
            engine.logits(PROMPT)
            os.truncate(flash, 0)
            try:
                with pytest.raises(FlashError, match=r"flash\.bin"):
                    spoil(engine)
            finally:
                flash.write_bytes(whole)
            for _ in range(2):  # and it stays stopped, whatever is asked
                for call in (lambda: engine.step(1), lambda: engine.logits([1, 2]), lambda: engine.prefill([1, 2])):
                    with pytest.raises(FlashError):
                        call()
                engine.reset()


def test_nan_amid_planes_names_layer_and_region_and_leaves_nothing_stale(splits, tmp_path):
    path = tmp_path / "nan.dipper"
    shutil.copytree(splits("llama")[1], path)
    header = json.loads((path / "bundle.json").read_text())
    header.pop("header_sha256", None)
    flash = bytearray((path / "flash.bin").read_bytes())
    embedding = header["embedding"]
    bad = 77  # a token whose embedding is NaN
    at = embedding["offset"] + bad * embedding["row_bytes"]
    flash[at : at + 4] = np.float32(np.nan).tobytes()
    (path / "flash.bin").write_bytes(flash)
    (path / "bundle.json").write_bytes(header_bytes(header))
    cases = [(fetch, *case) for fetch in (0.1, 1.0) for case in planes_shares(path, fetch=fetch).items()]
    for fetch, what, share in cases:
        config = EngineConfig(method="planes", fetch=fetch, mlp_dram=share, context=128)
        with Engine.open(path, config) as engine:
            message = r"layer 0, input columns: (token \d+: )?an input of the columns of unit \d+ is NaN"
            if not engine.plan.options["refined"][0]:
                assert what == "streams"
                message = r"layer \d, \w+ columns: .* is NaN"  # the first region that ranks tells

            def decoded(engine=engine, prefill=True):
                engine.reset()
                rows = [engine.prefill(PROMPT)] if prefill else []
                return np.stack(rows + [engine.step(t) for t in GO_ON])

            engine.step(3)
            engine.reset_cache()
            clean = decoded(prefill=False)
            engine.reset_cache()
            warm = decoded()
            for spoil in (
                lambda: engine.prefill([*PROMPT, bad, 3]),
                lambda: engine.logits([*PROMPT, bad, 3]),
                lambda: (engine.step(3), engine.step(bad)),
            ):
                engine.reset()
                with pytest.raises(ConfigError, match=message):
                    spoil()
                if fetch == 1.0:  # whatever is cached: no slot may hold another unit than the books say
                    assert same_bits(decoded(prefill=False), clean)
                    assert same_bits(decoded(), warm)
                    engine.reset()
                    with pytest.raises(ConfigError, match=message):
                        spoil()
                engine.reset_cache()
                assert same_bits(decoded(prefill=False), clean)
                engine.reset_cache()
                assert same_bits(decoded(), warm)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fetch": 0.1}, "fetch goes with --method planes, not dip"),
        ({"method": "dip-ca", "fetch_glu": 0.1}, "fetch_glu goes with --method planes, not dip-ca"),
        ({"method": "dense-stream", "fetch": 0.1}, "fetch goes with --method planes, not dense-stream"),
        ({"method": "planes", "fetch": -0.1}, "fetch is -0.1, outside [0, 1]: give a share such as 0.1"),
        ({"method": "planes", "fetch": 1.1}, "fetch is 1.1, outside [0, 1]: give a share such as 0.1"),
        ({"method": "planes", "fetch_glu": float("nan")}, "fetch_glu is nan, outside [0, 1]: give a share such as 0.1"),
        ({"whole": (1,)}, "whole layers go with --method planes, not dip"),
        ({"method": "dense-stream", "whole": (1,)}, "whole layers go with --method planes, not dense-stream"),
        ({"method": "planes", "whole": (1, 2, 1)}, "whole layers are (1, 2, 1): give each once, counted from 0"),
        ({"method": "planes", "whole": (-1,)}, "whole layers are (-1,): give each once, counted from 0"),
        ({"method": "planes", "gamma": 0.5}, "gamma 0.5 goes with --method dip-ca, not planes"),
        (
            {"method": "planes", "calibration": "c.npz"},
            "a calibration is about pruning, and planes does none: use --method dip or dip-ca",
        ),
        (
            {"method": "planes", "trace": Path("x")},
            "a trace records masks, which planes does not have: use --method dip or dip-ca",
        ),
        (
            {"method": "planes", "split": (1.0,)},
            "a split shares out column slots, which planes does not have: drop it",
        ),
    ],
)
def test_bad_options_of_planes(options, message):
    with pytest.raises(ConfigError) as e:
        EngineConfig(**options)
    assert str(e.value) == message


def test_dip_drops_no_columns_that_are_split(splits):
    message = (
        "the columns of this bundle are split in base and residual, and dip drops whole columns: pack with "
        "--base-bits 0, or use --method planes"
    )
    for kind in ("llama", "half"):
        for method in ("dip", "dip-ca"):
            for simulated in (False, True):
                with pytest.raises(ConfigError) as e:
                    Engine.open(
                        splits(kind)[1], EngineConfig(method=method, mlp_dram=ALL, context=16), simulated=simulated
                    )
                assert str(e.value) == message
