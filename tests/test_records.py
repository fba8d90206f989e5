import dataclasses
import json
import math
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dipper.engine import EngineConfig
from dipper.errors import ConfigError
from dipper.files import write_json
from dipper.records import (
    LEDGER,
    BenchRow,
    RunRecord,
    Timing,
    Traffic,
    json_line,
    ledger,
    method_fields,
    provenance,
    ratio,
    run_record,
    token_ledger,
)
from fakes import FakeEngine


def record(n_steps=4, decode_s=2.0, **changes):
    engine = FakeEngine([3])
    engine.n_counted = n_steps
    timing = Timing(start_s=1.0, first_s=1.5, last_s=1.5 + decode_s, n_tokens=n_steps + 1)
    run = run_record(engine, timing, text="x", n_prompt=3, finish_reason="length", seed=0, sampling={})
    return dataclasses.replace(run, **changes)


def test_speed_leaves_out_the_prefill_and_the_first_token():
    timing = Timing(start_s=10.0, first_s=10.5, last_s=12.5, n_tokens=21)
    assert (timing.ttft_s, timing.decode_s, timing.tok_per_s) == (0.5, 2.0, 10.0)


def test_one_token_has_no_speed():
    assert Timing(start_s=0.0, first_s=1.0, last_s=1.0, n_tokens=1).tok_per_s is None


@given(st.dictionaries(st.sampled_from(LEDGER), st.floats(0, 10)), st.floats(0, 10))
def test_ledger_adds_up_to_the_decode_time(measured, slack):
    decode_s = sum(v for k, v in measured.items() if k != "rest") + slack
    parts = ledger(measured, decode_s)
    assert tuple(parts) == LEDGER
    assert math.isclose(sum(parts.values()), decode_s, abs_tol=1e-9)


def test_run_record_spreads_counters_over_decoded_tokens():
    run = record(n_steps=4, decode_s=2.0)
    assert run.tok_per_s == 2.0
    assert run.hit_rate == 0.7
    assert (run.flash_bytes_per_token, run.useful_bytes_per_token, run.reads_per_token) == (12288, 3000, 3)
    assert run.read_gbps == pytest.approx(4 * 12288 / 2.0 / 1e9)
    assert run.ledger_s == pytest.approx(
        {"select": 0.04, "submit": 0, "wait": 0.2, "gemv": 0, "attention": 0, "head": 0, "rest": 1.76}
    )


def test_run_record_of_nothing_read_has_no_rates():
    run = record(n_steps=0, decode_s=0.0)
    assert (run.tok_per_s, run.hit_rate, run.read_gbps, run.reads_per_token) == (None, None, None, 0)


def test_run_record_has_every_key_that_readers_rely_on():
    keys = set(json.loads(json_line(record().as_dict())))
    assert keys >= {
        "schema", "text", "n_tokens", "n_prompt", "tok_per_s", "ttft_s", "method", "density", "d_in", "d_glu", "gamma",
        "cache", "seed", "hit_rate", "flash_bytes_per_token", "useful_bytes_per_token", "reads_per_token", "read_gbps",
        "disk_gbps_at_size", "dram_bytes", "peak_rss_bytes", "ledger_s", "reader_backend", "direct", "isa",
        "n_threads", "notes", "provenance",
    }  # fmt: skip


def test_a_record_survives_the_way_through_json():
    run = record()
    assert RunRecord.from_dict(json.loads(json_line(run.as_dict()))) == run


def test_knobs_that_do_not_act_are_none():
    assert method_fields(EngineConfig(method="dense-stream", density=0.3)) == {
        "method": "dense-stream", "density": None, "d_in": None, "d_glu": None, "gamma": None, "cache": None,
    }  # fmt: skip


def test_planes_have_a_cache_and_no_density():
    assert method_fields(EngineConfig(method="planes", fetch=0.1, cache="lru")) == {
        "method": "planes", "density": None, "d_in": None, "d_glu": None, "gamma": None, "cache": "lru",
    }  # fmt: skip


def test_density_is_that_of_the_split():
    fields = method_fields(EngineConfig(method="dip-ca", d_in=0.75, d_glu=0.6))
    assert fields["density"] == pytest.approx(0.7)
    assert (fields["d_in"], fields["d_glu"], fields["gamma"]) == (0.75, 0.6, 0.5)


def test_traffic_sums_readings():
    engine, traffic = FakeEngine([3]), Traffic()
    for engine.n_counted in (1, 3):
        traffic.add(engine.counters())
    assert (traffic.n_tokens, traffic.hits, traffic.reads) == (4, 28, 12)


def test_bench_row_has_llama_bench_fields_and_the_limit():
    run = record(disk_gbps_at_size=12288e-9 * 40)
    row = BenchRow(
        run=run, mode="dip", state="cold", test="tg4", n_gen=4, n_depth=3, samples_ts=[10.0, 30.0, 20.0],
        samples_ns=[3, 1, 2], limit_ts=40.0,
    ).as_dict()  # fmt: skip
    assert (row["avg_ts"], row["stddev_ts"], row["median_ts"], row["of_limit"]) == (20.0, 10.0, 20.0, 0.5)
    assert (row["n_gen"], row["test"], row["reps"], row["schema"]) == (4, "tg4", 3, "dipper-bench/1")
    assert row["tok_per_s"] == run.tok_per_s


TOUCHED = {"gemv": 30e6, "attention": 8e6, "head": 2e6}


def test_token_ledger_is_seconds_and_bytes_of_a_mean_token():
    seconds = {"select": 0.04, "submit": 0.0, "wait": 0.2, "gemv": 1.2, "attention": 0.32, "head": 0.16, "rest": 0.08}
    run = record(
        n_steps=4,
        decode_s=2.0,
        ledger_s=seconds,
        touched_bytes=TOUCHED,
        dram_gbps=0.2,
        disk_gbps_at_size=12288e-9 / 0.4,
    )
    found = token_ledger(run)
    assert [s.name for s in found.stages] == list(LEDGER)
    assert [s.ms for s in found.stages] == pytest.approx([10, 0, 50, 300, 80, 40, 20])
    assert sum(s.share for s in found.stages) == pytest.approx(1.0) == found.total.share
    by_name = {s.name: s for s in found.stages}
    assert (by_name["gemv"].dram_bytes, by_name["gemv"].gbps, by_name["gemv"].of_roof) == pytest.approx(
        (30e6, 0.1, 0.5)
    )
    assert (by_name["wait"].dram_bytes, by_name["wait"].gbps, by_name["wait"].of_roof) == (None, None, None)
    total = found.total
    assert (total.name, total.ms, total.dram_bytes) == ("total", 500.0, 40e6)
    assert (total.gbps, total.of_roof) == pytest.approx((0.08, 0.4))
    assert (found.dram_ms, found.flash_ms, found.limit_ms, found.of_limit) == pytest.approx((200, 400, 400, 0.8))


def test_token_ledger_knows_what_was_not_measured():
    assert token_ledger(record()) is None  # no bytes counted
    assert token_ledger(record(n_steps=0, touched_bytes=TOUCHED)) is None
    unprobed = token_ledger(record(touched_bytes=TOUCHED, dram_gbps=10.0))
    assert (unprobed.dram_ms, unprobed.flash_ms, unprobed.limit_ms, unprobed.of_limit) == (4.0, None, None, None)
    held = token_ledger(record(touched_bytes=TOUCHED, dram_gbps=10.0, flash_bytes_per_token=0.0))
    assert (held.flash_ms, held.limit_ms) == (0.0, 4.0)
    assert [s.gbps for s in held.stages if s.name == "gemv"] == [None]  # in no time
    roofless = token_ledger(record(touched_bytes=TOUCHED))
    assert (roofless.dram_ms, roofless.total.of_roof, roofless.limit_ms) == (None, None, None)


def test_a_ledger_goes_with_its_row():
    run = record(touched_bytes=TOUCHED, dram_gbps=10.0, disk_gbps_at_size=1.0)
    row = BenchRow(
        run=run, mode="dip", state="warm", test="tg4", n_gen=4, n_depth=3, samples_ts=[2.0], samples_ns=[1]
    )  # fmt: skip
    told = json.loads(json_line(row.as_dict()))
    assert told["ledger"]["stages"][3]["name"] == "gemv"
    assert (told["ledger"]["total"]["dram_bytes"], told["touched_bytes"]) == (40e6, TOUCHED)
    assert dataclasses.replace(row, n_gen=0).ledger is None


def test_json_refuses_what_is_not_json():
    with pytest.raises(ValueError, match="not JSON compliant"):
        json_line({"x": math.inf})


def test_ratio_of_nothing_is_none():
    assert ratio(3, 0) is None


def test_write_json_replaces_whole_files(tmp_path):
    target = tmp_path / "result.json"
    write_json(target, {"a": 1})
    write_json(target, {"a": "é"})
    assert json.loads(target.read_text(encoding="utf-8")) == {"a": "é"}
    assert list(tmp_path.iterdir()) == [target]


def test_write_json_leaves_the_old_file_when_it_fails(tmp_path):
    target = tmp_path / "result.json"
    write_json(target, {"a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(target, {"a": math.nan})
    assert json.loads(target.read_text(encoding="utf-8")) == {"a": 1}
    assert list(tmp_path.iterdir()) == [target]


def test_write_json_names_a_missing_folder(tmp_path):
    with pytest.raises(ConfigError, match=r"does not exist\. Create it first"):
        write_json(tmp_path / "no" / "result.json", {})


def test_provenance_names_code_and_machine(tmp_path):
    (tmp_path / "bundle.json").write_text('{"header_sha256": "abc"}')
    p = provenance(tmp_path)
    assert p.bundle_header_sha256 == "abc"
    assert p.n_cpus >= 1
    assert p.cpu
    assert p.time.endswith("+00:00")
    assert provenance(tmp_path / "none").bundle_header_sha256 is None


def test_peak_rss_grows_with_what_is_held():
    # In a process of its own: whatever ran before in this one has set the peak already.
    code = (
        "from dipper.records import peak_rss_bytes\n"
        "before = peak_rss_bytes()\n"
        "held = bytearray(b'x') * (256 << 20)\n"
        "print(peak_rss_bytes() - before, len(held))\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    grown, held = map(int, out.split())
    assert 0.9 * held < grown < 1.2 * held
