"""Calibrations: the file (round trip, damage, hostility, other models), and what the engine makes of one."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from dipper import _core
from dipper.bundle import Bundle, pack
from dipper.cache import ReferenceCache, n_selected
from dipper.calibration import Calibration, model_fields
from dipper.engine import Engine, EngineConfig
from dipper.errors import BudgetError, ConfigError
from dipper.records import engine_fields
from dipper.trace import read_trace
from reference_model import Dip, logits

ALL = "1000b"  # more DRAM than any tiny MLP can use
PROMPT = [3, 14, 15, 9, 26, 5, 35, 8, 9, 7, 9, 32, 38, 46, 2, 99, 17, 4, 61, 3]
MODEL = {
    "name": "tiny", "architecture": "llama", "n_layers": 2, "hidden": 3, "intermediate": 5, "fingerprint": "f00d",
}  # fmt: skip


def random_calibration(model=MODEL, seed=0, densities=(0.5, 0.7), **changes) -> Calibration:
    """Every part, at random; biases have nothing to do with means."""
    rng = np.random.default_rng(seed)
    n_layers, hidden, inner = model["n_layers"], model["hidden"], model["intermediate"]

    def vectors(draw, *sizes):
        return [tuple(draw(size).astype(np.float32) for size in sizes) for _ in range(n_layers)]

    parts = {
        "model": dict(model),
        "provenance": {"text_sha256": "abc", "tokens": 4096},
        "tables": {str(d): rng.uniform(d - 0.2, d + 0.2, (n_layers, 2)) for d in densities},
        "factors": vectors(lambda n: rng.lognormal(0, 0.5, n), hidden, inner),
        "means": vectors(lambda n: 0.3 * rng.standard_normal(n), hidden, inner),
        "biases": vectors(rng.standard_normal, inner, inner, hidden),
        "extra": {"thresholds": rng.random((n_layers, 4)), "layers": np.arange(n_layers)},
    }
    return Calibration(**{**parts, **changes})


def calibrate(bundle: Bundle, seed=0, **changes) -> Calibration:
    """Random factors and means for a bundle, with the biases that belong to the means."""
    calibration = random_calibration(model_fields(bundle), seed, **changes)
    biases = []
    for n, (mean_in, mean_glu) in enumerate(calibration.means or ()):
        gate, up, down = (bundle.dequantise(f"layers.{n}.{name}") for name in ("gate", "up", "down"))
        biases.append((gate @ mean_in, up @ mean_in, down @ mean_glu))
    return dataclasses.replace(calibration, biases=biases or None)


def assert_equal(a: Calibration, b: Calibration) -> None:
    assert (a.model, a.provenance) == (b.model, b.provenance)
    for part in ("tables", "extra"):
        ours, theirs = getattr(a, part), getattr(b, part)
        assert list(ours) == list(theirs)
        for name, array in ours.items():
            assert array.dtype == theirs[name].dtype
            assert np.array_equal(array, theirs[name])
    for part in ("factors", "means", "biases"):
        ours, theirs = getattr(a, part), getattr(b, part)
        assert (ours is None) == (theirs is None)
        for mine, other in zip(ours or (), theirs or (), strict=True):
            assert len(mine) == len(other)
            assert all(np.array_equal(x, y) for x, y in zip(mine, other, strict=True))


# --- the file


@settings(deadline=None)
@given(
    seed=st.integers(0, 1000),
    densities=st.lists(st.floats(0.25, 0.75), max_size=3, unique=True),
    without=st.sets(st.sampled_from(["factors", "means", "extra"])),
    sizes=st.tuples(*[st.integers(1, 9)] * 3),
)
def test_a_file_gives_back_what_was_saved(tmp_path_factory, seed, densities, without, sizes):
    model = {**MODEL, **dict(zip(("n_layers", "hidden", "intermediate"), sizes, strict=True))}
    changes = {name: {} if name == "extra" else None for name in without}
    if "means" in without:
        changes["biases"] = None
    calibration = random_calibration(model, seed, densities, **changes)
    path = tmp_path_factory.mktemp("calibration") / "c.npz"
    calibration.save(path)
    loaded = Calibration.load(path)
    assert_equal(loaded, calibration)
    assert loaded.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_equal_calibrations_are_equal_files_that_numpy_reads(tmp_path):
    for name in ("a.npz", "b.npz"):
        random_calibration().save(tmp_path / name)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    with np.load(tmp_path / "a.npz", allow_pickle=False) as arrays:
        assert arrays["means/glu"].shape == (2, 5)
        assert json.loads(arrays["header"].tobytes())["model"] == MODEL


def test_a_failed_save_leaves_nothing(tmp_path):
    with pytest.raises(ConfigError, match=r"extra/names has dtype <U1: a calibration holds numbers"):
        random_calibration(extra={"names": np.array(["a"])}).save(tmp_path / "c.npz")
    with pytest.raises(ConfigError, match=r"does not exist\. Create it first"):
        random_calibration().save(tmp_path / "no" / "c.npz")
    assert list(tmp_path.iterdir()) == []


def test_a_cut_file_is_refused_wherever_it_was_cut(tmp_path):
    path = tmp_path / "c.npz"
    random_calibration().save(path)
    whole = path.read_bytes()
    for length in [*range(0, len(whole), 61), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(ConfigError, match=r"c\.npz: is not a calibration, or a damaged one \(.*make it anew"):
            Calibration.load(path)


@settings(deadline=None, max_examples=400)
@given(flips=st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 255)), min_size=1, max_size=4))
def test_a_damaged_file_is_refused_or_read_as_it_was(tmp_path_factory, flips):
    path = tmp_path_factory.getbasetemp() / "damaged.npz"
    calibration = random_calibration()
    calibration.save(path)
    content = bytearray(path.read_bytes())
    for at, flip in flips:
        content[at % len(content)] ^= flip
    path.write_bytes(content)
    try:
        loaded = Calibration.load(path)
    except ConfigError as error:
        assert str(error).startswith(str(path))  # noqa: PT017
        return
    assert_equal(loaded, calibration)  # what was flipped says nothing: a date, say


ARRAYS = [
    "tables/0.5", "tables/0.7", "factors/in", "factors/glu", "means/in", "means/glu", "biases/gate", "biases/up",
    "biases/down", "extra/thresholds", "extra/layers",
]  # fmt: skip


def npy(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


def rewrite(path: Path, compression: int = zipfile.ZIP_STORED, **members: bytes | None) -> None:
    """The file with members replaced, added, or (None) left out; `__` in a name is `/`."""
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    content |= {f"{name.replace('__', '/')}.npy": data for name, data in members.items()}
    content = {name: data for name, data in content.items() if data is not None}
    if "header" not in members:
        content["header.npy"] = header(arrays=[name.removesuffix(".npy") for name in content][1:])
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in content.items():
            archive.writestr(name, data)


def claimed(shape: str, descr: str = "<f8") -> bytes:
    header = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(16)


def header(**changes) -> bytes:
    fields = {"format": "dipper-calibration", "version": 1, "model": MODEL, "provenance": {}, "arrays": ARRAYS}
    fields |= changes
    return npy(np.frombuffer(json.dumps(fields).encode(), np.uint8))


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"header": None}, r"'header' is missing"),
        ({"header": header(format="x")}, "its format is not dipper-calibration"),
        ({"header": header(version="1")}, "version is '1'"),
        ({"header": header(version=2)}, r"calibration version 2 is newer than this dipper reads \(1\): upgrade"),
        ({"header": header(model=[])}, "model is no object"),
        ({"header": header(arrays=ARRAYS[1:])}, "its members are not those that the header lists"),
        ({"header": header(model={"name": "x"})}, r"model has keys \['name'\]"),
        ({"header": header(model={**MODEL, "hidden": 0})}, "model hidden is 0"),
        ({"header": header(model={**MODEL, "hidden": True})}, "model hidden is True"),
        ({"header": header(model={**MODEL, "n_layers": 3})}, r"tables/0\.5 has shape \[2, 2\], not \[3, 2\]"),
        ({"header": npy(np.zeros(4))}, "the header is no text"),
        ({"header": npy(np.frombuffer(b'{"a": NaN}', np.uint8))}, "NaN is not a number"),
        ({"header": npy(np.frombuffer(b"[" * 10**5, np.uint8))}, "damaged one"),
        ({"tables__0.5": npy(np.full((2, 2), 1.5))}, r"tables/0\.5 holds a density outside \(0, 1\]"),
        ({"tables__0.5": npy(np.zeros((2, 2)))}, r"tables/0\.5 holds a density outside \(0, 1\]"),
        ({"tables__0.5": npy(np.full((2, 2), np.nan))}, r"tables/0\.5 holds a value that is not finite"),
        ({"tables__0.5": npy(np.ones((2, 2), np.float32))}, r"tables/0\.5 has dtype float32, not float64"),
        ({"tables__1.5": npy(np.ones((2, 2)))}, r"a table is for the density '1\.5', outside \(0, 1\]"),
        ({"tables__half": npy(np.ones((2, 2)))}, r"a table is for the density 'half', outside \(0, 1\]"),
        ({"factors__in": npy(np.zeros((2, 3), np.float32))}, "factors/in of layer 0 are not all positive"),
        ({"factors__in": npy(np.ones((1, 3), np.float32))}, r"its factors are not all \[n_layers, n\]"),
        ({"factors__in": npy(np.ones((2, 4), np.float32))}, r"factors/in has shape \[4\], not \[3\]"),
        ({"factors__in": None}, "it has factors glu, not glu, in"),
        ({"factors__in": npy(np.float32(1))}, r"its factors are not all \[n_layers, n\]"),
        ({"means__glu": npy(np.full((2, 5), np.inf, np.float32))}, "means/glu holds a value that is not finite"),
        ({"means__in": None, "means__glu": None}, "means and biases go together, one is missing"),
        ({"extra__x": npy(np.array([{}], object))}, r"extra/x holds '\|O': numbers are expected"),
        ({"extra__x": claimed("(10000000000000, 1000000)")}, "its shape needs"),
        ({"extra__x": claimed("(-1, 2)")}, r"extra/x: shape \(-1, 2\)"),
        ({"extra__x": claimed("__import__('os').getpid()")}, "damaged one"),
        ({"extra__x": claimed("(2,", "(")}, "damaged one"),
        ({"extra__x": b"no array"}, "extra/x is no array"),
        ({"extra__x": npy(np.asfortranarray(np.ones((2, 3))))}, "extra/x holds '<f8': numbers are expected"),
    ],
)
def test_hostile_files(members, message, tmp_path):
    path = tmp_path / "c.npz"
    random_calibration().save(path)
    rewrite(path, **members)
    with pytest.raises(ConfigError, match=message) as error:
        Calibration.load(path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


def test_compressed_absent_and_foreign_files(tmp_path):
    path = tmp_path / "c.npz"
    with pytest.raises(ConfigError, match=r"cannot be read \(No such file.*made by `dipper calibrate`"):
        Calibration.load(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        Calibration.load(tmp_path)
    random_calibration().save(path)
    rewrite(path, zipfile.ZIP_DEFLATED)
    with pytest.raises(ConfigError, match="header is compressed"):
        Calibration.load(path)
    path.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ConfigError, match=r"is not a calibration, or a damaged one \(File is not a zip file\)"):
        Calibration.load(path)


def test_densities_names_what_it_has():
    calibration = random_calibration()
    assert calibration.densities(0.5) is calibration.tables["0.5"]
    with pytest.raises(ConfigError, match=r"no densities for 0\.6: it has 0\.5, 0\.7; ask for one of these"):
        calibration.densities(0.6)
    with pytest.raises(ConfigError, match=r"no densities for 0\.6: it has none"):
        random_calibration(densities=()).densities(0.6)


def test_other_models_are_named():
    calibration = random_calibration()
    calibration.check_model(MODEL)
    calibration.check_model({**MODEL, "fingerprint": "another precision"})
    calibration.check_model({**MODEL, "name": "renamed"})
    for change in ({"hidden": 4}, {"n_layers": 1}, {"name": "other", "fingerprint": "beef"}):
        with pytest.raises(
            ConfigError,
            match=r"calibration was made for another model: it is for tiny \(llama, 2 layers, 3 x 5, f00d\), this is ",
        ):
            calibration.check_model({**MODEL, **change})


# --- in the engine


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    """Tiny bundles, packed on demand: f32, or int4 as a grid of packed codes."""
    folder = tmp_path_factory.mktemp("bundles")

    def bundle(kind: str = "llama", bits: str = "source") -> Bundle:
        path = folder / f"{kind}-{bits}.dipper"
        if not path.exists():
            source = tiny.write_hf(folder / f"{kind}-{bits}", kind, dtype="f32" if bits == "source" else "bf16")
            pack(source, path, bits=bits, tokenizer=False)
        return Bundle.open(path)

    return bundle


@pytest.fixture
def saved(tmp_path):
    """A calibration as a file."""

    def save(calibration: Calibration) -> Path:
        path = tmp_path / f"{len(list(tmp_path.glob('*.npz')))}.npz"
        calibration.save(path)
        return path

    return save


def open_engine(bundle: Bundle, **options) -> Engine:
    return Engine.open(
        bundle.path, EngineConfig(**{"mlp_dram": ALL, "context": 64, "threads": 2, "kv": "f32", **options})
    )


def same_bits(a, b):
    return a.shape == b.shape and np.array_equal(a.view(np.int32), b.view(np.int32))


def some_cached(bundle: Bundle, share: float = 0.5, **options) -> str:
    """An MLP share with room for about this part of the columns beside the least that is needed anyway."""
    with pytest.raises(BudgetError) as error:
        open_engine(bundle, **options, mlp_dram="0.1b")
    least = float(str(error.value).split("raise --mlp-dram to ")[1].split("b")[0])
    return f"{least + 8 * share * sum(r['bytes'] for r in bundle.header['regions']) / bundle.mlp_weights:.3f}b"


def decode(bundle: Bundle, **options) -> np.ndarray:
    with open_engine(bundle, **options) as engine:
        return np.stack([engine.step(token) for token in PROMPT])


PARTS = {
    "densities": {"factors": None, "means": None, "biases": None},
    "factors": {"means": None, "biases": None, "densities": ()},
    "means": {"factors": None, "densities": ()},
    "all": {},
}


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize(("kind", "bits"), [("llama", "source"), ("llama", "4"), ("gemma3", "source"), ("qwen2", "8")])
def test_a_block_equals_decoding_bit_for_bit(bundles, saved, kind, bits, parts):
    bundle = bundles(kind, bits)
    path = saved(calibrate(bundle, **PARTS[parts]))
    plain = decode(bundle, density=0.5)
    for options in ({}, {"method": "dip-ca", "gamma": 0.4, "cache": "lru"}):
        options = {"density": 0.5, "calibration": path, **options}
        with open_engine(bundle, **options, mlp_dram=some_cached(bundle, **options)) as engine:
            block = engine.logits(PROMPT)
            counted = engine.counters()
            engine.reset()
            engine.reset_cache()
            steps = np.stack([engine.step(token) for token in PROMPT])
            assert same_bits(steps, block)
            stepped = engine.counters()
            assert (stepped.selected, stepped.hits, stepped.evictions) == (
                counted.selected,
                counted.hits,
                counted.evictions,
            )
            assert 0.3 < engine.plan.cached_fraction < 0.6
        assert not same_bits(steps, plain)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma3"])
@pytest.mark.parametrize("gamma", [1.0, 0.5])
def test_equals_the_definition(bundles, saved, kind, gamma):
    bundle = bundles(kind)
    calibration = calibrate(bundle)
    options = {"density": 0.5, "calibration": saved(calibration)}
    options |= {"method": "dip"} if gamma == 1 else {"method": "dip-ca", "gamma": gamma}
    with open_engine(bundle, **options, mlp_dram=some_cached(bundle, **options)) as engine:
        got = engine.logits(PROMPT)
        counters, capacity = engine.counters(), engine.plan.options["capacity"]
    sizes = [region["n_columns"] for region in bundle.header["regions"]]
    caches = [ReferenceCache(n, c, "lfu") for n, c in zip(sizes, capacity, strict=True)]
    dip = Dip(
        calibration.tables["0.5"], calibration.factors, calibration.means, gamma,
        list(zip(caches[::2], caches[1::2], strict=True)),
    )  # fmt: skip
    expected = logits(bundle, PROMPT, dip)
    assert np.abs(got - expected).max() <= 1e-4 * np.abs(expected).max()
    assert (counters.hits, counters.misses) == (sum(c.hits for c in caches), sum(c.misses for c in caches))
    masks = [tuple(mask.astype(np.uint8) for mask in layer) for layer in dip.masks]
    with open_engine(bundle, density=0.7, calibration=saved(calibration)) as engine:  # forced: the density is not used
        assert same_bits(engine.logits(PROMPT, masks), got)


def test_forced_masks_of_a_run_give_its_logits(bundles, saved, tmp_path):
    bundle, trace = bundles(bits="4"), tmp_path / "run.trace"
    calibration = calibrate(bundle)
    options = {"density": 0.5, "calibration": saved(calibration)}
    steps = decode(bundle, trace=trace, **options)
    fields, frames = read_trace(trace)
    ks = [n_selected(d, r["n_columns"]) for d, r in zip(calibration.tables["0.5"].flat, fields["regions"], strict=True)]
    assert [region["k"] for region in fields["regions"]] == ks
    masks = [
        [np.zeros((len(PROMPT), r["n_columns"]), np.uint8) for r in fields["regions"][i : i + 2]]
        for i in range(0, len(ks), 2)
    ]
    for frame in frames:
        masks[frame.region // 2][frame.region % 2][frame.position, frame.mask] = 1
        assert len(frame.mask) == ks[frame.region]
        # The scores of a trace are those that ranked.
        assert frame.scores[frame.mask].min() >= np.delete(frame.scores, frame.mask).max(initial=0)
    with open_engine(bundle, **options) as engine:
        assert same_bits(engine.logits(PROMPT, masks), steps)


def test_nothing_but_the_masks_matters_at_gamma_1(bundles, saved):
    bundle = bundles(bits="4")
    options = {"density": 0.5, "calibration": saved(calibrate(bundle))}
    base = decode(bundle, **options)
    for variant in (
        {"threads": 1}, {"mlp_dram": some_cached(bundle, **options)}, *({"isa": isa} for isa in _core.isas()),
        {"cache": "lru", "mlp_dram": some_cached(bundle, 0.2, **options)},
    ):  # fmt: skip
        assert same_bits(decode(bundle, **options, **variant), base), variant


def test_parts_that_say_nothing_change_nothing(bundles, saved):
    bundle = bundles(bits="4")
    n_layers = bundle.model.n_layers
    plain = calibrate(bundle, tables={"0.6": np.full((n_layers, 2), 0.6)})
    ones = [tuple(np.ones_like(v) for v in layer) for layer in plain.factors]
    zeros = [tuple(np.zeros_like(v) for v in layer) for layer in plain.means]
    idle = dataclasses.replace(
        plain, factors=ones, means=zeros, biases=[tuple(-np.zeros_like(v) for v in layer) for layer in plain.biases]
    )
    assert same_bits(decode(bundle, density=0.6, calibration=saved(idle)), decode(bundle, density=0.6))
    # A split given by hand overrides the table.
    split = {"d_in": 0.6, "d_glu": 0.6}
    other = dataclasses.replace(idle, tables={"0.3": np.full((n_layers, 2), 0.3)})
    assert same_bits(decode(bundle, calibration=saved(other), **split), decode(bundle, density=0.6))


def test_density_1_with_means_is_dense_up_to_rounding(bundles, saved):
    bundle = bundles()
    calibration = calibrate(bundle, densities=())
    dense = decode(bundle, method="dense-resident", mlp_dram=None)
    got = decode(bundle, density=1.0, calibration=saved(calibration))
    assert np.abs(got - dense).max() <= 1e-5 * np.abs(dense).max()
    without = dataclasses.replace(calibration, means=None, biases=None)
    assert same_bits(decode(bundle, density=1.0, calibration=saved(without)), dense)


def test_prefill_is_dense_and_warms_by_the_calibrations_scores(bundles, saved):
    bundle = bundles()
    dense = decode(bundle, method="dense-resident", mlp_dram=None)[-1]
    hits = []
    for factors in (True, False):
        calibration = calibrate(bundle, densities=())
        calibration = calibration if factors else dataclasses.replace(calibration, factors=None)
        options = {"density": 0.3, "calibration": saved(calibration)}
        with open_engine(bundle, **options, mlp_dram=some_cached(bundle, **options)) as engine:
            assert same_bits(engine.prefill(PROMPT), dense)
            engine.reset_counters()
            engine.step(5)
            hits.append(engine.counters().hits)
    assert hits[0] > 0
    assert hits[0] != hits[1]


def test_the_plan_counts_every_byte(bundles, saved):
    bundle = bundles()
    calibration = calibrate(bundle)
    model = bundle.model
    columns = model.hidden_size + model.intermediate_size
    rows = [-(-n // 64) * 64 for n in (model.intermediate_size, model.intermediate_size, model.hidden_size)]
    n_bytes = {"factors": 4 * model.n_layers * columns, "means": 4 * model.n_layers * (columns + sum(rows))}
    for parts in (("factors", "means"), ("factors",), ("means",), ()):
        kept = dataclasses.replace(
            calibration,
            factors=calibration.factors if "factors" in parts else None,
            means=calibration.means if "means" in parts else None,
            biases=calibration.biases if "means" in parts else None,
        )
        options = {"density": 0.5, "calibration": saved(kept)}
        with open_engine(bundle, **options, mlp_dram=some_cached(bundle, **options)) as engine:
            plan = engine.plan
        assert plan.parts["calibration"] == sum(n_bytes[part] for part in parts)
        names = ("mlp_scales", "calibration", "pinned", "slots", "staging", "bookkeeping")
        assert plan.mlp_bytes == sum(plan.parts[name] for name in names) <= plan.mlp_budget_bytes
        assert plan.total_bytes == sum(plan.parts.values())
    with pytest.raises(BudgetError, match=r"its scales, calibration and staging alone need .* raise --mlp-dram to"):
        open_engine(bundle, density=0.5, calibration=saved(calibration), mlp_dram="3%")


def test_records_name_densities_and_file(bundles, saved):
    bundle = bundles()
    calibration = calibrate(bundle)
    path = saved(calibration)
    with open_engine(bundle, density=0.7, calibration=path) as engine:
        fields = engine_fields(engine)
        assert engine.plan.options.keys().isdisjoint({"factors", "means", "biases"})
    d_in, d_glu = calibration.tables["0.7"].mean(axis=0)
    assert (fields["d_in"], fields["d_glu"]) == pytest.approx((d_in, d_glu))
    assert fields["density"] == pytest.approx((2 * d_in + d_glu) / 3)
    assert fields["provenance"].calibration == str(path)
    assert fields["provenance"].calibration_sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    with open_engine(bundle, density=0.7) as engine:
        fields = engine_fields(engine)
    assert (fields["density"], fields["d_in"]) == (pytest.approx(0.7), 0.7)
    assert fields["provenance"].calibration_sha256 is None


def test_other_models_and_densities_are_refused(bundles, saved):
    bundle = bundles()
    path = saved(calibrate(bundle))
    with pytest.raises(ConfigError, match=r"no densities for 0\.6: it has 0\.5, 0\.7"):
        open_engine(bundle, density=0.6, calibration=path)
    with pytest.raises(ConfigError, match=r"made for another model: it is for llama-source .*, this is qwen2-source "):
        open_engine(bundles("qwen2"), density=0.5, calibration=path)
    source = calibrate(bundle)
    source.model.update(name="somewhere else", fingerprint=bundle.header["source"]["sha256"])
    with open_engine(bundle, density=0.5, calibration=saved(source)) as engine:
        engine.step(1)
    with pytest.raises(ConfigError, match="a calibration is about pruning, and dense-stream does none"):
        EngineConfig(method="dense-stream", calibration=path)


def test_counters_add_up_to_the_columns_of_the_table(bundles, saved):
    bundle = bundles()
    calibration = calibrate(bundle)
    with open_engine(bundle, density=0.5, calibration=saved(calibration)) as engine:
        engine.step(1)
        counters = engine.counters()
    regions = zip(calibration.tables["0.5"].flat, bundle.header["regions"], strict=True)
    assert counters.selected == sum(n_selected(d, region["n_columns"]) for d, region in regions)
