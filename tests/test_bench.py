from dataclasses import replace
from types import SimpleNamespace

import pytest

import tiny
from dipper import bench, doctor, tokenizer
from dipper.bench import BenchCase, measure_apart, run_bench, with_disk_probe
from dipper.bundle import Bundle, pack
from dipper.engine import Engine, EngineConfig
from dipper.errors import BundleError, ConfigError, FlashError
from dipper.touched import model_parts, touched_bytes
from fakes import FakeEngine
from test_records import record


def case(mode, **options):
    return BenchCase(bundle="m.dipper", config={"method": mode}, n_prompt=3, n_gen=5, **options)


def test_modes_take_turns_and_medians_are_reported():
    order, speeds = [], iter([1.0, 5.0, 4.0, 5.0, 2.0, 5.0])

    def measure(one):
        order.append(one.mode)
        speed = next(speeds)
        cold = record(n_steps=4, decode_s=speed, disk_gbps_at_size=12288e-9 * speed / 2)
        return {"cold": cold, "warm": replace(cold, text="warm")}

    rows = run_bench([case("dip", notes=["said"]), case("dense-stream")], 3, measure=measure)
    assert order == ["dip", "dense-stream"] * 3
    assert [(r.mode, r.state, r.test) for r in rows[:4]] == [
        ("dip", "cold", "pp3"),
        ("dip", "cold", "tg5"),
        ("dip", "warm", "pp3"),
        ("dip", "warm", "tg5"),
    ]
    decode = rows[1]
    assert decode.samples_ts == [4.0, 1.0, 2.0]
    assert decode.median_ts == 2.0 == decode.run.tok_per_s
    assert decode.limit_ts == pytest.approx(1.0)  # the median probe, whichever run it was beside
    assert decode.run.notes == ["said"]
    assert (rows[0].limit_ts, rows[0].n_gen, rows[0].median_ts) == (None, 0, 6.0)  # 3 tokens in 0.5 s


def test_one_new_token_has_no_decode_row():
    one = replace(case("dip"), n_gen=1)
    rows = run_bench([one], 1, measure=lambda _: {"cold": record(n_steps=0), "warm": record(n_steps=0)})
    assert [r.test for r in rows] == ["pp3", "pp3"]


def test_no_repetitions_is_an_error():
    with pytest.raises(ConfigError, match="0 repetitions were asked for; at least 1 is needed"):
        run_bench([case("dip")], 0)


def test_the_measuring_process_says_what_it_failed_with():
    with pytest.raises(BundleError, match=r"^dip: .*m\.dipper"):
        measure_apart(case("dip"))


def test_the_probe_reads_at_the_runs_own_size(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(bench, "_read_gbps", lambda *args: asked.append(args) or 1.5)
    assert with_disk_probe(tmp_path, record()).disk_gbps_at_size == 1.5
    assert asked == [(tmp_path / "flash.bin", 4096.0, "io_uring")]
    nothing = record(n_steps=0)
    assert with_disk_probe(tmp_path, nothing) is nothing


def test_a_probe_that_fails_is_told(monkeypatch, tmp_path):
    def fail(*_):
        raise FlashError("read failed.")

    monkeypatch.setattr(bench, "_read_gbps", fail)
    probed = with_disk_probe(tmp_path, record())
    assert (probed.disk_gbps_at_size, probed.notes) == (None, ["the disk was not probed: read failed."])


def test_the_probe_reads_a_file(tmp_path):
    (tmp_path / "flash.bin").write_bytes(bytes(1 << 20))
    assert bench._read_gbps(tmp_path / "flash.bin", 5000.0, "pread") > 0


def test_the_prompt_is_cut_from_a_text_that_is_long_enough(tmp_path):
    class Words:
        def encode(self, text):
            return text.split()

    assert len(bench._prompt(Words(), replace(case("dip"), n_prompt=900))) == 900
    (tmp_path / "t.txt").write_text("one two")
    with pytest.raises(ConfigError, match=r"t.txt has 2 tokens, the prompt needs 3; give a longer --text"):
        bench._prompt(Words(), case("dip", text=str(tmp_path / "t.txt")))


def test_measure_is_cold_then_warm(monkeypatch):
    from dipper import engine as engine_module
    from dipper import tokenizer as tokenizer_module

    engine = FakeEngine([5, 6, 7])
    monkeypatch.setattr(engine_module.Engine, "open", lambda path, config: engine)
    monkeypatch.setattr(tokenizer_module.Tokenizer, "open", lambda path: _Letters())
    monkeypatch.setattr(bench, "_drop_page_cache", lambda path: ["dropped"])
    monkeypatch.setattr(bench, "with_disk_probe", lambda path, run: run)
    runs = bench.measure(case("dip"))
    assert engine.calls == ["reset", ("prefill", [3, 3, 3]), "reset", ("prefill", [3, 3, 3]), "close"]
    assert (runs["cold"].n_tokens, runs["warm"].n_prompt, runs["cold"].notes) == (5, 3, ["dropped"])


class _Letters:
    eos_ids = (5,)  # must be ignored: a bench generates what it was asked to

    def encode(self, text):
        return [3] * len(text)

    def stream(self):
        return SimpleNamespace(push=lambda token: "x", finish=lambda: "")


# ------------------------------------------------------------------------------------------------ what a token touches


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundles")
    return {
        kind: pack(tiny.write_hf(folder / kind, kind), folder / f"{kind}.dipper", bits="4", tokenizer=False)
        for kind in ("llama", "mistral")
    }


# Of tiny.py's Llama at 4 bits, rows padded to 64: hidden 96, intermediate 176, 6 heads of 16 and 2 of keys, 160 words.
N_LAYERS = 3
UP_SCALES, DOWN_SCALES = 192 * (4 + 2 * 3), 128 * (4 + 2 * 6)  # two f16 a row, two bytes a group of 32
ATTENTION = 2 * (64 + 128) * (96 + 2 * 3)  # k, v, q, o at 8 bits, a f16 a group
HEAD = 192 * (96 + 2 * 3)


def mlp_bytes(n_input, n_glu):
    return N_LAYERS * (n_input * 2 * 192 // 2 + 2 * UP_SCALES + n_glu * 128 // 2 + DOWN_SCALES)


@pytest.mark.parametrize(
    ("kind", "kv", "position_bytes", "seen"),
    [
        ("llama", "f16", 2 * 2 * 16 * 2, (6 + 7 + 10) / 3),
        ("llama", "int8", 2 * 2 * (16 + 4), (6 + 7 + 10) / 3),  # and a scale
        ("mistral", "f16", 2 * 2 * 16 * 2, (6 + 7 + 8) / 3),  # a window of 8
    ],
)
def test_touched_bytes_are_codes_scales_keys_and_values(bundles, kind, kv, position_bytes, seen):
    bundle = Bundle.open(bundles[kind])
    parts = model_parts(bundle)
    touched = touched_bytes(bundle, parts, [48, 88] * N_LAYERS, [6, 7, 10], kv)
    attention = N_LAYERS * (ATTENTION + position_bytes * seen)
    assert touched == {"gemv": mlp_bytes(48, 88), "attention": pytest.approx(attention, rel=1e-12), "head": HEAD}
    dense = touched_bytes(bundle, parts, parts["n_columns"], 6, kv)
    assert dense["gemv"] == mlp_bytes(96, 176)
    assert dense["gemv"] == sum(r["bytes"] for r in bundle.header["regions"]) + parts["scale_bytes"].sum()


def test_the_columns_of_the_plan_are_those_the_engine_selects(bundles):
    for method in ("dip", "dip-ca"):
        config = EngineConfig(method=method, density=0.5, mlp_dram="1000b", context=16, threads=1)
        with Engine.open(bundles["llama"], config) as engine:
            engine.prefill([3, 14, 15])
            engine.reset_counters()
            for token in (9, 26, 5):
                engine.step(token)
            assert engine.counters().selected == 3 * sum(engine.plan.options["k"]) == 3 * N_LAYERS * (48 + 88)


@pytest.fixture
def roofs(monkeypatch):
    """Measurements in this process, of a disk of 2 GB/s and DRAM of 10; the list holds the thread counts asked for."""
    asked = []
    monkeypatch.setattr(tokenizer.Tokenizer, "open", lambda path: _Letters())
    monkeypatch.setattr(bench, "_read_gbps", lambda *_: 2.0)
    monkeypatch.setattr(
        doctor, "measure_dram", lambda n_threads: asked.append(n_threads) or dict.fromkeys(n_threads, 10.0)
    )
    return asked


def test_measure_counts_what_a_token_touches_when_asked(bundles, roofs):
    config = {"method": "dip", "density": 0.5, "mlp_dram": "1000b", "threads": 1}
    one = BenchCase(bundle=str(bundles["llama"]), config=config, n_prompt=4, n_gen=4, ledger=True)
    runs = bench.measure(one)
    positions = (5 + 6 + 7) / 3  # three tokens after the first, each reads its own, too
    for run in runs.values():
        assert (run.dram_gbps, run.n_tokens) == (10.0, 4)
        assert run.touched_bytes == {
            "gemv": mlp_bytes(48, 88), "attention": N_LAYERS * (ATTENTION + 128 * positions), "head": HEAD,
        }  # fmt: skip
    assert roofs == [[1]]
    plain = bench.measure(replace(one, ledger=False))["warm"]
    assert (plain.dram_gbps, plain.touched_bytes, roofs) == (None, None, [[1]])


def test_the_roof_is_the_median_of_all_measurements_on_as_many_threads():
    roofs = iter([30.0, 5.0, 10.0, 6.0, 20.0, 50.0])

    def measure(one):
        threads = 1 if one.mode == "dip-ca" else 2
        run = record(n_steps=4, touched_bytes={"gemv": 1e6}, dram_gbps=next(roofs), n_threads=threads)
        return {"cold": run, "warm": run}

    rows = run_bench([case("dip"), case("dip-ca"), case("dense-stream")], 2, measure=measure)
    decodes = [r for r in rows if r.ledger is not None]
    assert [(r.mode, r.state, r.ledger.roof_gbps) for r in decodes] == [
        ("dip", "cold", 10.0), ("dip", "warm", 10.0), ("dip-ca", "cold", 5.0), ("dip-ca", "warm", 5.0),
        ("dense-stream", "cold", 10.0), ("dense-stream", "warm", 10.0),
    ]  # fmt: skip
    assert [r.as_dict()["ledger"] is None for r in rows] == [True, False] * 6  # not of prompts
