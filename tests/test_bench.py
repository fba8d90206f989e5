from dataclasses import replace

import pytest

from dipper import bench
from dipper.bench import BenchCase, measure_apart, run_bench, with_disk_probe
from dipper.errors import BundleError, ConfigError, FlashError
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
        from types import SimpleNamespace

        return SimpleNamespace(push=lambda token: "x", finish=lambda: "")
