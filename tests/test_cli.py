import errno
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from dipper import __version__, bench
from dipper import bundle as bundle_module
from dipper import engine as engine_module
from dipper import tokenizer as tokenizer_module
from dipper.cli import main
from dipper.errors import BundleError, ConfigError
from dipper.records import RunRecord
from fakes import EOS, FakeEngine, FakeTokenizer

TOKENIZER = FakeTokenizer()
MAX_CONTEXT = 2048


@pytest.fixture
def header(monkeypatch):
    """Bundles whose model has MAX_CONTEXT positions; the list holds what was verified."""
    verified = []

    def open_bundle(path):
        return SimpleNamespace(
            model=SimpleNamespace(max_context=MAX_CONTEXT), verify=lambda: verified.append(str(path))
        )

    monkeypatch.setattr(bundle_module.Bundle, "open", open_bundle)
    return verified


@pytest.fixture
def opened(monkeypatch, header):
    """Engines that verbs open, in order; each says "ok" and ends. The disk probe gives 2 GB/s."""
    engines = []

    def open_engine(path, config, on_plan=None):
        engine = FakeEngine(
            [*TOKENIZER.ids("ok"), EOS], config=config, context=config.context, path=path,
            losses=lambda ids: [0.5] * (len(ids) - 1),
        )  # fmt: skip
        if on_plan is not None:
            on_plan(engine.plan)
        engines.append(engine)
        return engine

    monkeypatch.setattr(engine_module.Engine, "open", open_engine)
    monkeypatch.setattr(tokenizer_module.Tokenizer, "open", lambda path: TOKENIZER)
    monkeypatch.setattr(bench, "_read_gbps", lambda *_: 2.0)
    return engines


def lines(capsys):
    out, err = capsys.readouterr()
    return out.splitlines(), err.splitlines()


# ------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["rnu"], "there is no verb 'rnu'; did you mean `dipper run`?"),
        (
            ["zzz"],
            "there is no verb 'zzz'; the verbs are pull, pack, energies, sensitivity, inspect, run, chat, eval, "
            "calibrate, distill, merge, bench, doctor, simulate, plan, reproduce, report, compare.",
        ),
        (
            ["run", "b", "p", "--densty", "1"],
            "`dipper run` has no option --densty; did you mean --density? or see `dipper run --help`.",
        ),
        (["--nope"], "`dipper` has no option --nope; see `dipper --help`."),
        (["run", "b"], "Missing argument 'PROMPT'; see `dipper run --help`."),
        (["run", "b", "p", "q"], "Got unexpected extra argument"),
        (["run", "b", "p", "--density", "x"], "Invalid value for '--density'"),
        (["run", "b", "p", "--seed", "-1"], "seed is -1; it must be 0 or more."),
        (["run", "b", "p", "--top-k", "4"], "top_k would have no effect at temperature 0"),
        (
            ["run", "b", "p", "--method", "dip", "--density", "0"],
            "density is 0.0, outside (0, 1]: give a share such as 0.7",
        ),
        (
            ["run", "b", "p", "--method", "dpi"],
            "method 'dpi' is unknown: choose auto, dense-resident, dense-stream, dip, dip-ca, planes",
        ),
        (
            ["run", "b", "p", "--method", "dense-stream", "--density", ".5"],
            "--density has no effect with dense-stream: drop it, or use --method dip or dip-ca.",
        ),
        (
            ["run", "b", "p", "--method", "dense-resident", "--calibration", "c.npz"],
            "--calibration has no effect with dense-resident: drop it, or use --method dip or dip-ca.",
        ),
        (
            ["run", "b", "p", "--method", "dip", "--gamma", ".5"],
            "--gamma has no effect with dip: drop it, or use --method dip-ca.",
        ),
        (
            ["run", "b", "p", "--density", ".5"],
            "--density has no effect with auto: drop it, or use --method dip or dip-ca.",
        ),
        (["chat", "b", "--cold"], "--cold has no effect with auto: drop it, or use --method dip or dip-ca or planes."),
        (["run", "b", "p", "--fetch", ".1"], "--fetch has no effect with auto: drop it, or use --method planes."),
        (
            ["run", "b", "p", "--method", "dip", "--whole", "1"],
            "--whole has no effect with dip: drop it, or use --method planes.",
        ),
        (
            ["bench", "b", "--modes", "planes", "--whole", "1,,2"],
            "--whole 1,,2 has an empty part: separate values with single commas.",
        ),
        (
            ["run", "b", "p", "--method", "planes", "--whole", "a"],
            "--whole a is not a list of layers: write 27,2,26.",
        ),
        (
            ["chat", "b", "--method", "planes", "--whole", "-1"],
            "--whole -1 is not a list of layers: write 27,2,26.",
        ),
        (
            ["eval", "b", "--text", "no.txt", "--method", "planes", "--whole", "2,1,2"],
            "whole layers are (2, 1, 2): give each once, counted from 0",
        ),
        (
            ["run", "b", "p", "--method", "planes", "--fetch-glu", "1.5"],
            "fetch_glu is 1.5, outside [0, 1]: give a share such as 0.1",
        ),
        (["run", "b", "p", "--stop", ""], "A stop string is empty"),
        (["run", "b", "p", "--raw", "--system", "x"], "--system needs a chat template, and --raw leaves the chat"),
        (["bench", "b", "--modes", "dip,dense"], "there is no mode 'dense'; the modes are auto, dense-resident,"),
        (["bench", "b", "--modes", "dpi-ca"], "there is no mode 'dpi-ca'; did you mean dip-ca?"),
        (["bench", "b", "-n", "1", "--ledger"], "-n 1 decodes nothing after the first new token: --ledger needs at"),
        (["bench", "b", "--reps", "0"], "0 repetitions were asked for; at least 1 is needed."),
        (
            ["eval", "b", "--text", "no.txt", "--window", "2049"],
            "--window 2049 needs a context of 2049, the model has 2048: use a smaller one.",
        ),
        (
            ["bench", "b", "-p", "2000", "-n", "64"],
            "-p 2000 -n 64 needs a context of 2064, the model has 2048: use less of either.",
        ),
        (
            ["eval", "b", "--text", __file__, "--cache", "static"],
            "A static cache holds the columns that a prompt used most",
        ),
        (["eval", "b", "--text", "no.txt", "--trace", "t"], "`dipper eval` has no option --trace;"),
        (["run", "b", "a" * 3000, "--raw"], "The prompt has 3000 tokens, but the model's context is 2048: shorten it."),
        (["eval", "b", "--text", "no.txt"], "There is no file no.txt; give a text to score with --text FILE."),
    ],
)
def test_an_error_is_one_line_and_exit_code_1(opened, capsys, args, message):
    assert main(args) == 1
    out, err = lines(capsys)
    said = [line for line in err if line.startswith("dipper: ")]
    assert len(said) == 1
    assert said[0].startswith(f"dipper: {message}")
    assert out == []


def test_a_real_bundle_error_comes_through(capsys):
    assert main(["inspect", "no.dipper"]) == 1
    _, err = lines(capsys)
    assert len(err) == 1
    assert err[0].startswith("dipper: no.dipper")


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (BundleError("a is\nb"), 1, ["dipper: a is b"]),
        (KeyboardInterrupt(), 130, []),
        (MemoryError(), 1, ["dipper: out of memory; lower --dram, --mlp-dram or --ctx."]),
        (
            OSError(errno.ENOSPC, "No space left on device", "/x"),
            1,
            ["dipper: /x: No space left on device; free some space."],
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", "/x"),
            1,
            ["dipper: /x: Permission denied; check its permissions."],
        ),
        (RuntimeError("boom"), 1, ["dipper: internal error: RuntimeError: boom (--debug shows where)"]),
    ],
)
def test_what_is_raised_becomes_a_line(monkeypatch, capsys, error, code, said):
    def fail(path):
        raise error

    monkeypatch.setattr(bundle_module.Bundle, "open", fail)
    assert main(["inspect", "b"]) == code
    assert lines(capsys) == ([], said)


@pytest.mark.parametrize("args", [["--debug", "inspect", "b"], ["inspect", "b", "--debug"]])
def test_debug_shows_the_traceback(monkeypatch, capsys, args):
    def fail(path):
        raise BundleError("broken")

    monkeypatch.setattr(bundle_module.Bundle, "open", fail)
    assert main(args) == 1
    _, err = lines(capsys)
    assert err[0] == "Traceback (most recent call last):"
    assert err[-1] == "dipper: broken"


def test_help_has_examples_and_version_is_the_packages(capsys):
    assert main([]) == 0
    out, _ = lines(capsys)
    assert '  dipper run smollm2.dipper "Why is the sky blue?" --mlp-dram 60%' in [line[2:] for line in out]
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"dipper {__version__}\n"


@pytest.mark.parametrize(
    "verb",
    [
        "pull",
        "pack",
        "energies",
        "inspect",
        "run",
        "chat",
        "eval",
        "calibrate",
        "compare",
        "bench",
        "doctor",
        "simulate",
        "plan",
    ],
)
def test_every_verb_shows_an_example(capsys, verb):
    assert main([verb, "--help"]) == 0
    assert f"dipper {verb}" in capsys.readouterr().out.split("Examples:")[1]


def test_python_m_dipper_is_the_same_command():
    done = subprocess.run([sys.executable, "-m", "dipper", "rnu"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "dipper: there is no verb 'rnu'; did you mean `dipper run`?\n"


def test_a_reader_that_leaves_is_no_error():
    command = f"{sys.executable} -m dipper run --help | true"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert done.stderr == ""


# ------------------------------------------------------------------------------------------------ run


def test_run_streams_text_then_one_table(opened, capsys):
    assert main(["run", "b", "hi", "--method", "dip", "--density", "0.6"]) == 0
    out, err = lines(capsys)
    assert out[:2] == ["ok", ""]
    names = [line.split("  ")[0] for line in out[2:]]
    assert names == [
        "method", "speed", "hit rate", "flash per token", "read", "DRAM", "peak RSS", "time per token",
    ]  # fmt: skip
    table = "\n".join(out[2:])
    assert "dip, density 0.60, gamma 1, cache lfu; 2 threads, avx2" in table
    assert "70.0 %" in table
    assert "12.3 KB in 3 reads of 4.1 KB (24 % useful)" in table
    assert "the disk gives at that size: 2.00 GB/s (io_uring, O_DIRECT)" in table
    assert "105.0 MB (budget 120.0 MB; host 70.0, resident 30.0, slots 5.0); MLP 2.50 bits per weight" in table
    assert err[0].startswith("DRAM plan")  # before loading, not among the text


def test_run_json_is_the_last_line_of_stdout(opened, capsys):
    assert main(["run", "b", "hi", "--method", "dip", "--json", "--seed", "7"]) == 0
    out, _ = lines(capsys)
    record = json.loads(out[-1])
    assert out[0] == "ok" == record["text"]
    assert (record["seed"], record["method"], record["disk_gbps_at_size"]) == (7, "dip", 2.0)
    assert set(RunRecord.__dataclass_fields__) <= set(record)


def test_run_uses_the_template_and_sizes_the_context(opened):
    assert main(["run", "b", "hi", "-n", "9", "--system", "be"]) == 0
    prompt = TOKENIZER.ids("s be u hi a ")
    assert opened[0].calls[0] == ("prefill", prompt)
    assert opened[0].context == len(prompt) + 9


def test_run_raw_takes_the_prompt_as_it_is(opened):
    assert main(["run", "b", "hi", "--raw", "--ctx", "50"]) == 0
    assert opened[0].calls[0] == ("prefill", TOKENIZER.ids("hi"))
    assert opened[0].context == 50


@pytest.mark.parametrize(("n_prompt", "room"), [(2000, 48), (2047, 1), (2048, 1)])
def test_run_cuts_new_tokens_to_the_models_context(opened, capsys, n_prompt, room):
    assert main(["run", "b", "a" * n_prompt, "--raw"]) == 0
    _, err = lines(capsys)
    assert err[0] == f"-n 128 is cut to {room}: the model's context is 2048, the prompt has {n_prompt} tokens."
    assert opened[0].context == MAX_CONTEXT


def test_run_verifies_when_asked(opened, header):
    assert main(["run", "b", "hi"]) == 0
    assert header == []
    assert main(["run", "b", "hi", "--verify"]) == 0
    assert header == ["b"]


def test_run_gives_options_to_the_engine(opened):
    args = "run b hi --method dip-ca --d-in .75 --d-glu .6 --gamma .2 --cache lru --dram 600MB --mlp-dram 2.7b --cold"
    args += " --calibration c.npz --threads 1 --reader pread --isa scalar --no-probe"
    assert main(args.split()) == 0
    config = opened[0].config
    assert (config.method, config.densities, config.gamma, config.cache) == ("dip-ca", (0.75, 0.6), 0.2, "lru")
    assert (config.dram, config.mlp_dram, config.cold, str(config.calibration)) == ("600MB", "2.7b", True, "c.npz")
    assert (config.threads, config.reader, config.isa) == (1, "pread", "scalar")


@pytest.mark.parametrize("verb", [["run", "b", "hi"], ["chat", "b"]])
def test_defaults_are_the_engines_with_method_auto(opened, monkeypatch, verb):
    monkeypatch.setattr("builtins.input", lambda: "/quit")
    assert main(verb) == 0
    assert opened[0].config == engine_module.EngineConfig(method="auto", context=opened[0].config.context)


def test_auto_takes_budgets(opened):
    assert main(["run", "b", "hi", "--dram", "600MB", "--mlp-dram", "2.7b", "--threads", "1"]) == 0
    config = opened[0].config
    assert (config.method, config.dram, config.mlp_dram, config.threads) == ("auto", "600MB", "2.7b", 1)


def test_run_gives_options_of_planes_to_the_engine(opened):
    args = "run b hi --method planes --fetch .2 --fetch-glu .05 --whole 27,2,26 --cache lru --mlp-dram 3b --cold"
    assert main(args.split()) == 0
    config = opened[0].config
    assert (config.method, config.fetches, config.whole) == ("planes", (0.2, 0.05), (27, 2, 26))
    assert (config.cache, config.mlp_dram, config.cold) == ("lru", "3b", True)


def test_run_reads_a_prompt_from_stdin(opened, monkeypatch):
    import io

    monkeypatch.setattr("sys.stdin", io.StringIO("hi"))
    assert main(["run", "b", "-", "--raw"]) == 0
    assert opened[0].calls[0] == ("prefill", TOKENIZER.ids("hi"))


def test_run_closes_the_engine_before_it_probes_the_disk(opened, monkeypatch):
    calls = []
    monkeypatch.setattr(bench, "_read_gbps", lambda *_: calls.append(list(opened[0].calls)) or 1.0)
    assert main(["run", "b", "hi"]) == 0
    assert calls[0][-1] == "close"


# ------------------------------------------------------------------------------------------------ chat


def test_chat_answers_until_it_is_quit(opened, monkeypatch, capsys):
    said = iter(["hi", "", "/what", "/reset", "yo", "/quit", "never"])
    monkeypatch.setattr("builtins.input", lambda: next(said))
    assert main(["chat", "b"]) == 0
    out, err = lines(capsys)
    assert out == ["ok", "ok"]
    assert any("there is no command /what; use /reset or /quit." in line for line in err)
    assert any("new conversation" in line for line in err)
    assert sum("tok/s" in line for line in err) == 2
    assert next(said) == "never"


def test_chat_ends_with_the_input(opened, monkeypatch):
    def end():
        raise EOFError

    monkeypatch.setattr("builtins.input", end)
    assert main(["chat", "b"]) == 0
    assert opened[0].calls[-1] == "close"


def test_chat_survives_a_full_context(opened, monkeypatch, capsys):
    said = iter(["a question much too long for it", "/reset", "hi", "/quit"])
    monkeypatch.setattr("builtins.input", lambda: next(said))
    assert main(["chat", "b", "--ctx", "20"]) == 0
    out, err = lines(capsys)
    assert out == ["ok"]
    assert any("dipper: The conversation has" in line and "/reset starts a new" in line for line in err)


def test_chat_stops_an_answer_at_ctrl_c(opened, monkeypatch, capsys):
    said = iter(["hi", "yo", "/quit"])
    monkeypatch.setattr("builtins.input", lambda: next(said))
    step = FakeEngine.step
    interrupts = iter([True])

    def interrupted(engine, token, **options):
        if next(interrupts, False):
            raise KeyboardInterrupt
        return step(engine, token, **options)

    monkeypatch.setattr(FakeEngine, "step", interrupted)
    assert main(["chat", "b"]) == 0
    _, err = lines(capsys)
    assert "stopped" in " ".join(err)


def test_chat_stops_a_turn_at_ctrl_c_before_its_first_step(opened, monkeypatch, capsys):
    said = iter(["hi", "/quit"])
    monkeypatch.setattr("builtins.input", lambda: next(said))
    encode_chat = FakeTokenizer.encode_chat
    interrupts = iter([True])

    def interrupted(tokenizer, messages):
        if next(interrupts, False):
            raise KeyboardInterrupt
        return encode_chat(tokenizer, messages)

    monkeypatch.setattr(FakeTokenizer, "encode_chat", interrupted)
    assert main(["chat", "b"]) == 0
    _, err = lines(capsys)
    assert "> stopped" in err


# ------------------------------------------------------------------------------------------------ eval, bench, inspect


def test_eval_prints_what_it_scored(opened, tmp_path, capsys):
    (tmp_path / "t.txt").write_text("abcdefghij")
    assert main(["eval", "b", "--text", str(tmp_path / "t.txt"), "--window", "5", "--against", "dense"]) == 0
    out, _ = lines(capsys)
    table = dict(line.split("  ", 1) for line in out)
    assert table["perplexity"].strip() == "1.6487 (± 0.000)"
    assert table["windows"].strip() == "2 of 5, 8 tokens scored, no BOS"
    assert table["against dense-stream"].strip().startswith("1.6487; +0.00%")
    assert [e.config.method for e in opened] == ["dip", "dense-stream"]


def test_eval_json_is_one_object(opened, tmp_path, capsys):
    (tmp_path / "t.raw").write_text("ab\ncd")
    TOKENIZER.pieces.append(b"\n")
    try:
        assert main(["eval", "b", "--text", str(tmp_path / "t.raw"), "--window", "4", "--json"]) == 0
    finally:
        TOKENIZER.pieces.pop()
    record = json.loads(lines(capsys)[0][-1])
    assert (record["schema"], record["rows_joined"], record["n_windows"]) == ("dipper-eval/1", True, 1)


@pytest.fixture
def measured(monkeypatch, header):
    from test_records import record

    cases = []

    def measure(case):
        cases.append(case)
        return {state: record(method=case.mode) for state in ("cold", "warm")}

    monkeypatch.setattr(bench, "measure_apart", measure)
    return cases


def test_bench_json_has_rows_under_results(measured, capsys):
    assert main(["bench", "b", "--modes", "dip,dense-stream", "-n", "5", "-p", "3", "--reps", "2", "--json"]) == 0
    out, err = lines(capsys)
    results = json.loads(out[-1])["results"]
    assert len(results) == 8
    assert {(r["mode"], r["state"], r["test"]) for r in results} == {
        (m, s, t) for m in ("dip", "dense-stream") for s in ("cold", "warm") for t in ("pp3", "tg5")
    }
    keys = {"text", "n_tokens", "tok_per_s", "ttft_s", "ledger_s", "n_gen", "n_prompt", "avg_ts", "stddev_ts"}
    assert all(keys <= set(r) for r in results)
    assert err == ["1/4 dip", "2/4 dense-stream", "3/4 dip", "4/4 dense-stream"]


BENCH = ("bench", "b", "--reps", "1", "-n", "5", "-p", "3")


def test_bench_gives_each_mode_the_options_that_act(measured, capsys):
    args = ["--density", ".5", "--gamma", ".2", "--calibration", "c.npz", "--dram", "200MB", "--mlp-dram", "60%"]
    assert main([*BENCH, *args]) == 0
    configs = {case.mode: case.config for case in measured}
    assert configs == {
        "dense-resident": {"method": "dense-resident"},
        "dense-stream": {"method": "dense-stream", "dram": "200MB", "mlp_dram": "60%"},
        "dip": {"method": "dip", "density": 0.5, "calibration": "c.npz", "dram": "200MB", "mlp_dram": "60%"},
        "dip-ca": {
            "method": "dip-ca", "density": 0.5, "gamma": 0.2, "calibration": "c.npz", "dram": "200MB",
            "mlp_dram": "60%",
        },
    }  # fmt: skip
    assert all(json.dumps(config) for config in configs.values())  # the measuring process reads them as JSON
    assert measured[0].notes == ["no DRAM limit: the reference that holds everything"]
    out, _ = lines(capsys)
    assert out[0].split()[:4] == ["mode", "state", "test", "tok/s"]
    assert len(out) == 1 + 4 * 4


def test_bench_shows_the_ledger_of_warm_decodes(monkeypatch, header, capsys):
    from test_records import record

    seconds = {"select": 0.04, "submit": 0.0, "wait": 0.2, "gemv": 1.2, "attention": 0.32, "head": 0.16, "rest": 0.08}
    cases = []

    def measure(case):
        cases.append(case)
        run = record(
            ledger_s=seconds, touched_bytes={"gemv": 30e6, "attention": 8e6, "head": 2e6}, dram_gbps=0.2,
            disk_gbps_at_size=2.0,
        )  # fmt: skip
        still = dict.fromkeys(("flash_bytes_per_token", "reads_per_token"), 0.0)
        return {"cold": run, "warm": run if case.mode == "dip" else replace(run, **still)}

    monkeypatch.setattr(bench, "measure_apart", measure)
    assert main([*BENCH, "--modes", "dense-resident,dip", "--ledger"]) == 0
    assert [case.ledger for case in cases] == [True, True]
    rows, resident, dip = capsys.readouterr().out.split("\n\n")
    assert len(rows.splitlines()) == 1 + 2 * 4
    assert dip.splitlines() == [
        "dip, warm, tg5 after 3: 2 threads, avx2",
        "stage           ms    share  DRAM/token  GB/s  of roof",
        "select      10.000    2.0 %           -     -        -",
        "submit       0.000    0.0 %           -     -        -",
        "wait        50.000   10.0 %           -     -        -",
        "gemv       300.000   60.0 %     30.0 MB   0.1   50.0 %",
        "attention   80.000   16.0 %      8.0 MB   0.1   50.0 %",
        "head        40.000    8.0 %      2.0 MB   0.1   25.0 %",
        "rest        20.000    4.0 %           -     -        -",
        "total      500.000  100.0 %     40.0 MB   0.1   40.0 %",
        "limit      200.000   40.0 %           -     -        -",
        "limit: the longer of DRAM 200.000 ms at its roof, 0.2 GB/s, and flash 0.006 ms, 12.3 KB at 2.00 GB/s",
    ]
    assert resident.splitlines()[0] == "dense-resident, warm, tg5 after 3: 2 threads, avx2"
    assert resident.splitlines()[-1] == "limit: DRAM 200.000 ms at its roof, 0.2 GB/s"
    assert main([*BENCH, "--modes", "dip", "--ledger", "--json"]) == 0
    results = json.loads(lines(capsys)[0][-1])["results"]
    assert [r["state"] for r in results if r["ledger"] is not None] == ["cold", "warm"]
    assert results[-1]["ledger"]["total"]["of_roof"] == pytest.approx(0.4)


def test_bench_ledger_of_a_bundle(tiny_bundle, letters, monkeypatch, capsys):
    from dipper import doctor

    one_a_letter = SimpleNamespace(
        encode=lambda text: [ord(c) for c in text], eos_ids=(),
        stream=lambda: SimpleNamespace(push=lambda token: "x", finish=lambda: ""),
    )  # fmt: skip
    monkeypatch.setattr(tokenizer_module.Tokenizer, "open", lambda path: one_a_letter)
    monkeypatch.setattr(bench, "measure_apart", bench.measure)
    monkeypatch.setattr(doctor, "measure_dram", lambda n_threads: dict.fromkeys(n_threads, 10.0))
    args = ["--modes", "dense-resident,dense-stream,dip", "--mlp-dram", "1000b", "--threads", "2", "--text", letters]
    assert main(["bench", str(tiny_bundle), "-p", "12", "-n", "6", "--reps", "1", *args, "--ledger", "--json"]) == 0
    rows = [r for r in json.loads(lines(capsys)[0][-1])["results"] if r["test"] == "tg6"]
    assert len(rows) == 6
    for row in rows:
        told = row["ledger"]
        assert sum(stage["share"] for stage in told["stages"]) == pytest.approx(1.0)
        assert told["total"]["dram_bytes"] == sum(stage["dram_bytes"] or 0 for stage in told["stages"])
        assert told["total"]["ms"] == pytest.approx(1e3 / row["tok_per_s"])
        assert told["roof_gbps"] == 10.0
    touched = {row["mode"]: row["touched_bytes"] for row in rows}
    assert touched["dense-resident"] == touched["dense-stream"]
    assert touched["dip"]["attention"] == touched["dense-stream"]["attention"]
    assert touched["dip"]["gemv"] < touched["dense-stream"]["gemv"]


def test_bench_names_the_mode_that_failed(monkeypatch, header, capsys):
    def fail(case):
        raise ConfigError(f"{case.mode}: no")

    monkeypatch.setattr(bench, "measure_apart", fail)
    assert main(["bench", "b", "--modes", "dip"]) == 1
    assert lines(capsys)[1][-1] == "dipper: dip: no"


def units(*values):
    keys = ("record_bytes", "base_record_bytes", "columns_per_unit", "unit_bytes")
    return dict(zip(keys, values, strict=True))


@pytest.fixture
def described(monkeypatch):
    verified = []

    class Opened:
        def verify(self):
            verified.append(True)

        def describe(self):
            return {
                "path": "b", "version": 2, "created_by": "dipper 0.1.0",
                "source": {"name": "m.gguf", "kind": "gguf", "bits": "source"},
                "model": {
                    "name": "M", "architecture": "llama", "n_layers": 2, "hidden_size": 8, "intermediate_size": 16,
                    "vocab_size": 32,
                },
                "bytes": {"resident": {"head": 2_000_000}, "flash": {"input_records": 3_000, "embedding": 0}},
                "record_bytes": {"input": [1536], "glu": [288, 576]},
                "base_bits": {"gate": [0], "up": [0], "down": [0, 2]},
                "units": {"input": [units(1536, 0, 1, 1536)], "glu": [units(288, 0, 1, 288), units(576, 144, 7, 4096)]},
                "grids": {"gate": ["q4/32 f16m"]}, "bits_per_mlp_weight": 5.0,
            }  # fmt: skip

    monkeypatch.setattr(bundle_module.Bundle, "open", lambda path: Opened())
    return verified


def test_inspect_verifies_unless_told_not_to(described, capsys):
    assert main(["inspect", "b"]) == 0
    out, _ = lines(capsys)
    assert described == [True]
    assert out[-1] == "checksums     every byte read and right"
    assert "input column  1,536 B" in out
    assert "glu column    288 B or 576 B + 144 B base (7 in a unit of 4,096 B)" in out
    assert "base bits     gate 0; up 0; down 0 or 2" in out
    assert main(["inspect", "b", "--no-verify", "--json"]) == 0
    assert described == [True]
    assert json.loads(lines(capsys)[0][-1])["verified"] is False


# ------------------------------------------------------------------------------------------------ pull, pack, doctor


def test_pack_names_the_bundle_after_its_source(monkeypatch, capsys, tmp_path):
    asked = {}

    def pack(source, out, **options):
        asked.update(options, source=str(source), out=str(out))
        return out

    monkeypatch.setattr(bundle_module, "pack", pack)
    assert main(["pack", str(tmp_path / "tiny.gguf"), "--bits", "4", "--force"]) == 0
    assert capsys.readouterr().out == "tiny.dipper\n"
    assert (asked["bits"], asked["overwrite"], asked["progress"]) == ("4", True, None)
    assert asked["base_bits"] == 0
    assert not {"unit_bytes", "energies"} & set(asked)
    np.savez(tmp_path / "e.npz", **{"layers.0.input": np.ones(3), "layers.0.glu": np.arange(4, dtype=np.float32)})
    split = ["--base-bits", "2", "--unit-bytes", "32KiB", "--energies", str(tmp_path / "e.npz")]
    assert main(["pack", str(tmp_path / "tiny.gguf"), *split]) == 0
    assert (asked["base_bits"], asked["unit_bytes"]) == (2, 32768)
    assert {name: array.tolist() for name, array in asked["energies"].items()} == {
        "layers.0.input": [1, 1, 1], "layers.0.glu": [0, 1, 2, 3]
    }  # fmt: skip


@pytest.mark.parametrize(("text", "bits"), [("2,3", (2, 3)), ("0,3", (0, 3)), (" 2 , 3 ", (2, 3)), ("3", 3)])
def test_pack_takes_base_bits_by_kind(monkeypatch, text, bits):
    asked = {}
    monkeypatch.setattr(bundle_module, "pack", lambda source, out, **options: asked.update(options) or out)
    assert main(["pack", "tiny.gguf", "--base-bits", text]) == 0
    assert asked["base_bits"] == bits


def test_pack_says_what_is_wrong_with_the_split(capsys, tmp_path):
    (tmp_path / "bad.npz").write_bytes(b"PK")
    for options, message in (
        (["--unit-bytes", "8KiB"], "--unit-bytes is about residuals, and --base-bits is 0: give base bits, or drop it"),
        (["--base-bits", "2,"], "--base-bits 2, has an empty part: separate values with single commas."),
        (["--base-bits", "x"], "--base-bits x: write a number such as 2, or two, of input and GLU columns: 2,3."),
        (
            ["--base-bits", "1,2,3"],
            "--base-bits 1,2,3: write a number such as 2, or two, of input and GLU columns: 2,3.",
        ),
        (["--base-bits", "-1"], "--base-bits -1: write a number such as 2, or two, of input and GLU columns: 2,3."),
        (
            ["--base-bits", "0,0", "--unit-bytes", "8KiB"],
            "--unit-bytes is about residuals, and --base-bits is 0: give base bits, or drop it",
        ),
        (["--energies", "e"], "--energies is about residuals, and --base-bits is 0: give base bits, or drop it"),
        (
            ["--base-bits", "2", "--unit-bytes", "big"],
            "'big' is not an amount of memory: write 600MB, 1.5GiB, 60% or a number of bytes",
        ),
        (
            ["--base-bits", "2", "--energies", str(tmp_path / "no.npz")],
            f"{tmp_path / 'no.npz'}: cannot be read (No such file or directory); give an .npz file of column energies",
        ),
        (
            ["--base-bits", "2", "--energies", str(tmp_path / "bad.npz")],
            f"{tmp_path / 'bad.npz'}: is no file of column energies, or a damaged one (File is not a zip file); "
            "make it anew",
        ),
    ):
        assert main(["pack", str(tmp_path / "tiny.gguf"), *options]) == 1
        assert lines(capsys)[1] == [f"dipper: {message}"]


def test_pull_prints_the_path(monkeypatch, capsys):
    sources = pytest.importorskip("dipper.sources")
    monkeypatch.setattr(sources, "pull", lambda name, *, cache_dir, progress: f"/models/{name}")
    assert main(["pull"]) == 0
    assert capsys.readouterr().out == "/models/smollm2\n"


def test_doctor_prints_what_it_found(monkeypatch, capsys):
    from dipper import doctor

    monkeypatch.setattr(doctor, "doctor", lambda path: {"path": str(path)})
    monkeypatch.setattr(doctor, "format_doctor", lambda found: f"at {found['path']}")
    assert main(["doctor", "x"]) == 0
    assert capsys.readouterr().out == "at x\n"
    assert main(["doctor", "x", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"path": "x"}


# ------------------------------------------------------------------------------------------------ eval in PyTorch


@pytest.fixture
def in_torch(monkeypatch):
    """What the PyTorch side was asked for, instead of doing it."""
    pytest.importorskip("torch")
    from contextlib import contextmanager

    from dipper import evaluate_torch

    asked = []

    @contextmanager
    def open_sparse(source, method, **options):
        asked.append((source, method, options))
        yield "opened"

    def stop(opened, what, *args, **options):
        asked.append((str(what), options))
        raise ConfigError("enough")

    monkeypatch.setattr(evaluate_torch, "open_sparse", open_sparse)
    monkeypatch.setattr(evaluate_torch, "evaluate_torch", stop)
    monkeypatch.setattr(evaluate_torch, "answer_tasks", stop)
    return asked


@pytest.mark.torch
@pytest.mark.parametrize(
    ("source", "args"),
    [
        ("smollm2", []),
        ("org/name", []),
        ("no.gguf", []),
        ("b", ["--method", "up"]),
        ("b", ["--device", "cpu"]),
        ("b", ["--kl"]),
        ("b", ["--torch"]),
    ],
)
def test_eval_goes_to_pytorch(in_torch, capsys, source, args):
    assert main(["eval", source, "--text", "t.txt", *args]) == 1
    assert lines(capsys)[1][-1] == "dipper: enough"
    assert in_torch[0][0] == source


@pytest.mark.torch
def test_eval_gives_pytorch_its_options(in_torch):
    main(
        ["eval", "b", "--text", "t.txt", "--torch", "--d-in", ".5", "--d-glu", ".8", "--norms", "--window", "64",
         "--tokens", "640", "--against", "dense", "--dtype", "bf16", "--batch", "4", "--out", "o.json"]
    )  # fmt: skip
    (_, method, opening), (text, scoring) = in_torch
    assert method == {"name": "dip", "densities": (0.5, 0.8), "density": pytest.approx(0.6), "norms": True}
    assert (opening["dtype"], opening["context"], opening["device"]) == ("bf16", 64, "cpu")
    assert text == "t.txt"
    assert (scoring["kl"], scoring["limit"], scoring["batch"], str(scoring["out"])) == (True, 640, 4, "o.json")


@pytest.mark.torch
def test_eval_gives_pytorch_the_options_of_planes(in_torch):
    given = ["eval", "smollm2", "--text", "t.txt", "--method"]
    main([*given, "planes", "--base-bits", "2", "--fetch", ".2", "--fetch-glu", ".1", "--whole", "3,1", "--deferred",
          "--unit-bytes", "4KiB", "--capacity", ".2"])  # fmt: skip
    main([*given, "planes"])
    main([*given, "planes", "--density", ".8"])
    main([*given, "resident", "--bits", "3,2"])
    assert [method for _, method, *_ in in_torch[::2]] == [
        {"name": "planes", "base_bits": (2, 2), "fetch": 0.2, "fetch_glu": 0.1, "whole": (3, 1), "deferred": True,
         "unit_bytes": 4096, "capacity": 0.2},
        {"name": "planes", "fetch": 0.1},
        {"name": "planes", "density": 0.8},
        {"name": "resident", "bits": (3, 2)},
    ]  # fmt: skip


@pytest.mark.torch
def test_eval_asks_tasks(in_torch):
    main(["eval", "smollm2", "--tasks", "piqa,arc_easy", "--data", "d", "--limit", "5", "--seed", "3"])
    assert in_torch[0][1] == {"name": "dip", "density": 0.7}
    names, options = in_torch[1]
    assert names == "['piqa', 'arc_easy']"
    assert (options["limit"], options["seed"], options["shots"], options["batch"]) == (5, 3, 0, 1)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "give either a text to score with --text FILE, or tasks with --tasks A,B and --data DIR."),
        (["--text", "t", "--tasks", "piqa"], "give either a text to score"),
        (["--tasks", "piqa"], "--tasks needs the folder of their files; give it with --data DIR."),
        (
            ["--text", "t", "--engine", "--norms"],
            "--norms has no effect on the native engine: drop it, or use --torch.",
        ),
        (["--text", "t", "--torch", "--dram", "1GB"], "--dram has no effect in PyTorch: drop it, or use --engine."),
        (
            ["--text", "t", "--engine", "--deferred"],
            "--deferred has no effect on the native engine: drop it, or use --torch.",
        ),
        (
            ["--text", "t", "--torch", "--base-bits", "2,3,4"],
            "--base-bits 2,3,4: write a number such as 2, or two, of input and GLU columns: 2,3.",
        ),
        (["--text", "t", "--torch", "--d-in", ".5"], "d_in and d_glu go together: give both or neither"),
        (["--text", "t", "--kl", "--against", "dip"], "--against dip is for the native engine; in PyTorch it is"),
    ],
)
def test_eval_refuses(opened, capsys, args, message):
    assert main(["eval", "b", *args]) == 1
    assert lines(capsys)[1][-1].startswith(f"dipper: {message}")


def test_compare_prints_a_table(tmp_path, capsys):
    from dipper.files import write_json
    from test_compare import RECORDS

    for i, record in enumerate(RECORDS):
        write_json(tmp_path / f"{i}.json", record.as_dict())
    files = [str(path) for path in sorted(tmp_path.glob("*.json"))]
    assert main(["compare", *files]) == 0
    assert len(lines(capsys)[0]) == 1 + len(RECORDS)
    assert main(["compare", *files, "--json"]) == 0
    assert len(json.loads(lines(capsys)[0][-1])["evals"]) == len(RECORDS)


# ------------------------------------------------------------------------------------------------ simulate


@pytest.fixture(scope="module")
def tiny_bundle(tmp_path_factory):
    from dipper.bundle import pack
    from tiny import write_hf

    folder = tmp_path_factory.mktemp("simulate")
    return pack(write_hf(folder / "llama", "llama"), folder / "llama.dipper", tokenizer=False)


@pytest.fixture
def letters(monkeypatch, tmp_path):
    """A text for the tiny bundle, one token a character."""
    monkeypatch.setattr(
        tokenizer_module.Tokenizer, "open", lambda path: SimpleNamespace(encode=lambda text: [ord(c) for c in text])
    )
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog")
    return str(path)


SIMULATE = ["--device", "raspberry-pi-5", "--capacity", "0.5", "-p", "12", "-n", "6", "--threads", "2"]


def test_simulate_prints_a_table(tiny_bundle, letters, capsys):
    args = [*SIMULATE, "--device", "raspberry-pi-5,paper-phone", "--text", letters, "--method", "dip,dip-ca"]
    assert main(["simulate", str(tiny_bundle), *args, "--cache", "lru,none"]) == 0
    out, err = lines(capsys)
    head = ["device", "method", "density", "gamma", "cache", "split", "DRAM MB", "bits/weight", "cached", "hits"]
    head += ["flash/token", "reads/token", "tok/s", "flat", "TTFT s", "mJ/token", "bound by", "masks"]
    assert out[0].split() == " ".join(head).split()
    rows = [line.split() for line in out[1:]]
    assert [row[:6] for row in rows] == [
        [device, *row]
        for device in ("raspberry-pi-5", "paper-phone")
        for row in (
            ["dip", "0.70", "-", "lru", "uniform"],
            ["dip", "0.70", "-", "none", "uniform"],
            ["dip-ca", "0.70", "0.5", "lru", "uniform"],
        )
    ]
    assert [row[-1] for row in rows] == ["recorded", "recorded", "live"] * 2
    assert err == []


def test_simulate_json_is_the_best_with_all_under_results(tiny_bundle, letters, capsys):
    args = [*SIMULATE, "--text", letters, "--method", "dip,dip-ca", "--density", "0.5,0.7", "--json"]
    assert main(["simulate", str(tiny_bundle), *args]) == 0
    out, _ = lines(capsys)
    assert len(out) == 1
    record = json.loads(out[0])
    keys = {"tok_per_s", "ttft_s", "hit_rate", "flash_bytes_per_token", "reads_per_token", "dram_bytes", "workload"}
    assert keys <= set(record)
    assert record["schema"] == "dipper-simulate/1"
    results = record["results"]
    assert [(r["method"], r["density"]) for r in results] == [
        ("dip", 0.5), ("dip", 0.7), ("dip-ca", 0.5), ("dip-ca", 0.7),
    ]  # fmt: skip
    assert all(keys <= set(r) and r["schema"] == "dipper-sim/1" for r in results)
    assert record["tok_per_s"] == max(r["tok_per_s"] for r in results)
    assert (record["n_prompt"], record["n_tokens"], record["device"]) == (12, 6, "raspberry-pi-5")
    assert {r["workload"]["kind"] for r in results} == {"recorded", "live"}


def test_simulate_a_shape_with_generated_scores(capsys):
    args = ["phi-3-mini", "--device", "paper-phone", "--method", "dip", "--dram", "2GB", "-p", "2", "-n", "2"]
    assert main(["simulate", *args, "--bits", "4", "--seed", "3", "--json"]) == 0
    record = json.loads(lines(capsys)[0][-1])
    assert (record["model"], record["dram_budget_bytes"], record["dram_bytes"]["host"]) == ("phi-3-mini", 2 * 10**9, 0)
    assert (record["workload"]["kind"], record["workload"]["seed"]) == ("generated", 3)


def test_simulate_says_what_it_leaves_out(capsys):
    args = ["phi-3-mini", "--device", "paper-phone", "--method", "dip", "--dram", "100MB,2GB", "-p", "2", "-n", "2"]
    assert main(["simulate", *args]) == 0
    out, err = lines(capsys)
    assert len(out) == 2
    assert len(err) == 1
    assert err[0].startswith(
        "left out: paper-phone, dip dram 100MB density 0.7 cache lfu split uniform: --dram gives 100.0 MB, but dip "
        "with a context of 4 needs at least "
    )


def test_simulate_where_nothing_fits(capsys):
    args = ["phi-3-mini", "--device", "paper-phone", "--method", "dip", "--dram", "100MB,200MB", "-p", "2", "-n", "2"]
    assert main(["simulate", *args]) == 1
    out, err = lines(capsys)
    assert out == []
    assert [line.partition(":")[0] for line in err] == ["left out", "left out", "dipper"]
    assert err[-1].endswith("nothing fits, for the reasons above: give more DRAM, another device, or less --ctx")


def test_simulate_says_that_capacity_leaves_dense_out(tiny_bundle, letters, capsys):
    assert main(["simulate", str(tiny_bundle), *SIMULATE, "--text", letters, "--split", "uniform,miss-curve"]) == 0
    out, err = lines(capsys)
    assert [line.split()[1:6:4] for line in out[1:]] == [
        ["dip", "uniform"], ["dip", "miss-curve"], ["dip-ca", "uniform"], ["dip-ca", "miss-curve"],
    ]  # fmt: skip
    assert err == [
        "left out: dense-stream: --capacity is of column caches; give --dram or --mlp-dram to compare with it"
    ]


def test_simulate_draws(tiny_bundle, letters, tmp_path):
    pytest.importorskip("matplotlib")
    figure = tmp_path / "out.svg"
    args = [*SIMULATE, "--text", letters, "--method", "dip", "--figure", str(figure)]
    assert main(["simulate", str(tiny_bundle), *args]) == 0
    assert figure.read_text().startswith("<?xml")


def simulate_devices():
    from dipper.device import names

    return ", ".join(names())


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["phi-3-mini", "--device", "rasberry-pi-5"],
            "there is no device 'rasberry-pi-5'; did you mean raspberry-pi-5? known are DEVICES",
        ),
        (
            ["phi-3-mini", "--device", "paper-phone,zz"],
            "there is no device 'zz'; it is no file either; known are DEVICES",
        ),
        (
            ["phi-3-min", "--device", "paper-phone"],
            "there is no model 'phi-3-min' among those whose shape is known; did you mean phi-3-mini?",
        ),
        (["phi-3-mini", "--method", "dip,"], "--method dip, has an empty part: separate values with single commas."),
        (
            ["phi-3-mini", "--mlp-dram", "40%,,60%"],
            "--mlp-dram 40%,,60% has an empty part: separate values with single commas.",
        ),
        (["phi-3-mini", "--device", ""], "--device has an empty part: separate values with single commas."),
        (["phi-3-mini", "--density", "0.5,half"], "--density 0.5,half is not a list of numbers: write 0.5,0.7."),
        (["phi-3-mini", "--gamma", "x"], "--gamma x is not a list of numbers: write 0.5,0.7."),
        (["phi-3-mini", "--capacity", "50%"], "--capacity 50% is not a list of numbers: write 0.5,0.7."),
        (
            ["phi-3-mini", "--split", "even"],
            "split 'even' is unknown: choose uniform, miss-curve, or a file with a JSON list of weights",
        ),
        (["phi-3-mini", "--d-in", "0.5"], "d_in and d_glu go together: give both or neither"),
        (
            ["phi-3-mini", "--capacity", "0.5", "--dram", "1GB"],
            "--capacity says how many columns are cached, --dram and --mlp-dram do so too: give one",
        ),
        (
            ["phi-3-mini", "--method", "dip-ca", "--cache", "belady"],
            "methods dip-ca with caches belady leave nothing to simulate: dip-ca and planes need a cache other than "
            "none and belady, miss-curve needs slots, --capacity a column cache",
        ),
        (["phi-3-mini", "--bits", "3"], "bits is 3, other_bits 8: a published shape is laid out with 4 or 8"),
        (
            ["phi-3-mini", "--trace", "run.trace"],
            "a trace is of a bundle, and phi-3-mini is the shape of a model alone: drop --trace",
        ),
        (
            ["phi-3-mini", "--text", "t.txt"],
            "--text is for a real model: generated scores belong to no text",
        ),
        (
            ["phi-3-mini", "-n", "0"],
            "128 prompt tokens and 0 after them: each must be at least 1",
        ),
        (
            ["phi-3-mini", "--method", "dpi", "-p", "1", "-n", "1"],
            "method 'dpi' is unknown: choose auto, dense-resident, dense-stream, dip, dip-ca, planes",
        ),
        (
            ["phi-3-mini", "--method", "auto", "-p", "1", "-n", "1"],
            "auto is not simulated: choose --method dense-resident, dense-stream, dip, dip-ca or planes",
        ),
        (
            ["phi-3-mini", "--method", "planes", "-p", "1", "-n", "1"],
            "planes refines columns that are split in base and residual, and phi-3-mini has none: pack it, or lay its "
            "shape out, with --base-bits",
        ),
        (
            ["phi-3-mini", "--method", "dip", "--fetch", "0.1", "-p", "1", "-n", "1"],
            "--fetch has no effect with dip: drop it, or add planes to --method.",
        ),
        (
            ["phi-3-mini", "--method", "dip", "--cache", "fifo", "-p", "1", "-n", "1"],
            "cache 'fifo' is unknown: choose none, lru, lfu, lfu-decay, static, belady",
        ),
    ],
)  # fmt: skip
def test_simulate_refuses(capsys, args, message):
    assert main(["simulate", *args]) == 1
    out, err = lines(capsys)
    assert out == []
    assert err == [f"dipper: {message.replace('DEVICES', simulate_devices())}"]


def test_simulate_refuses_a_text_that_is_too_short(tiny_bundle, letters, capsys):
    assert main(["simulate", str(tiny_bundle), "--text", letters, "-p", "40", "-n", "6"]) == 1
    assert lines(capsys)[1] == [
        f"dipper: {letters} has 43 tokens, a prompt of 40 and 6 after it need 46: give a longer --text or ask for less"
    ]
    assert main(["simulate", str(tiny_bundle), "--text", letters, "--bits", "4"]) == 1
    assert lines(capsys)[1] == [
        f"dipper: --bits is for models of which only the shape is known; {tiny_bundle} has its own"
    ]


# ------------------------------------------------------------------------------------------------ plan


@pytest.fixture
def shape(monkeypatch):
    """`small`, a published shape of two layers, with made-up scores."""
    from dipper import generator, published
    from test_planner import SMALL, FakeGenerator

    monkeypatch.setattr(published, "_models", lambda: {"small": {**SMALL, "n_layers": 2}})
    monkeypatch.setattr(generator.ScoreGenerator, "load", lambda **_: FakeGenerator())
    return ["small", "--device", "paper-phone", "--dram", "30MB", "--ctx", "64", "-p", "8", "-n", "8"]


def test_plan_of_a_shape(shape, capsys, tmp_path):
    kept = tmp_path / "plan.json"
    assert main(["plan", *shape, "--max-ppl-increase", "0.2", "--out", str(kept)]) == 0
    out, err = lines(capsys)
    assert err == []
    blank = out.index("")
    words = [line.split("  ")[0] for line in out[:blank]]
    assert words[:6] == ["plan", "best", "speed", "perplexity", "DRAM", "flash"]
    assert out[0].split("  ")[-1].strip() == "small on paper-phone, perplexity +20.0 % at most"
    assert out[blank + 1].split()[:4] == ["method", "bits", "cache", "slots"]

    assert main(["plan", "--model", *shape, "--max-ppl-increase", "0.2", "--json"]) == 0
    out, _ = lines(capsys)
    assert len(out) == 1
    printed, held = json.loads(out[0]), json.loads(kept.read_text())
    assert printed["schema"] == held["schema"] == "dipper-plan/1"
    for same in ("model", "device", "config", "rows", "front", "skipped", "notes", "bits"):
        assert printed[same] == held[same]
    assert {row["bits"] for row in held["rows"]} == {4, 8}
    assert held["header_sha256"] is None
    assert (held["config"]["dram"], held["config"]["context"]) == ("30MB", 64)
    assert held["best"]["dram_bytes"]["host"] == 0
    assert sum(held["best"]["dram_bytes"].values()) <= 30 * 10**6
    assert (held["best"]["n_prompt"], held["best"]["n_tokens"]) == (8, 8)
    assert held["best"]["tok_per_s"] == max(row["tok_per_s"] for row in held["rows"] if row["within"])


def test_plan_gives_its_options(monkeypatch, shape, capsys):
    from dipper import planner

    asked = {}
    made = SimpleNamespace(as_dict=lambda: {"schema": "dipper-plan/1"})

    def make(bundles, device, *, workload_of, **options):
        asked.update(
            options, bundles=[b.path.name for b in bundles], device=device.name, tokens=workload_of(bundles[0])
        )
        return made

    monkeypatch.setattr(planner, "make_plan", make)
    monkeypatch.setattr(planner, "plan_table", lambda result: f"the table of {result is made}")
    args = ["small", "--device", "paper-phone", "--mlp-dram", "2.5b", "--max-ppl-increase", "0.1", "-p", "5", "-n", "6"]
    assert main(["plan", *args]) == 0
    assert lines(capsys) == (["the table of True"], [])
    assert (asked["bundles"], asked["device"], asked["host_bytes"]) == (["small", "small"], "paper-phone", 0)
    assert (asked["dram"], asked["mlp_dram"], asked["max_ppl_increase"], asked["context"]) == (None, "2.5b", 0.1, 1024)
    assert (asked["tokens"].n_prompt, asked["tokens"].n_tokens) == (5, 6)


ONE_MODEL = "give one model: dipper plan MODEL, or dipper plan --model MODEL."


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], ONE_MODEL),
        (["small", "--model", "small"], ONE_MODEL),
        (["small"], "small is the shape of a model: say where it shall run with --device NAME."),
        (
            ["small", "--device", "this-machine"],
            "this machine is profiled with a real bundle: dipper doctor BUNDLE --profile here.toml, then --device "
            "here.toml for small",
        ),
        (
            ["smal", "--device", "paper-phone"],
            "there is no model 'smal' among those whose shape is known; did you mean small?",
        ),
        (
            ["small", "--device", "paper-phone", "--text", "t.txt"],
            "--text is for a real model: generated scores belong to no text",
        ),
        (
            ["small", "--device", "paper-phone", "--ctx", "9999"],
            "a context of 9999 is over the model's 4096: lower --ctx",
        ),
        (
            ["small", "--device", "paper-phone", "--max-ppl-increase", "-1"],
            "max_ppl_increase is -1.0, outside [0, 10]: it is relative, 0.05 allows 5 % more perplexity",
        ),
        (
            ["small", "--device", "paper-phone", "--dram", "50%"],
            "DRAM in % is of one bundle's bytes, and there are 2 to choose from: give bytes such as 4GB",
        ),
        (["small", "--device", "paper-phone", "-n", "0"], "64 prompt tokens and 0 after them: each must be at least 1"),
    ],
)
@pytest.mark.usefixtures("shape")
def test_plan_refuses(capsys, args, message):
    assert main(["plan", *args]) == 1
    assert lines(capsys) == ([], [f"dipper: {message}"])


def test_plan_names_the_least_budget(shape, capsys):
    assert main(["plan", *shape, "--dram", "1MB"]) == 1
    out, err = lines(capsys)
    assert out == []
    assert len(err) == 1
    named = re.fullmatch(r"dipper: --dram gives 1\.0 MB, but .* raise --dram to ([0-9.]+MB)", err[0])
    assert named
    assert main(["plan", *shape, "--dram", named[1]]) == 0


# ------------------------------------------------------------------------------------------------ run --plan


@pytest.fixture
def configs(monkeypatch):
    """What engines of real bundles are opened with; a tokenizer of letters."""
    opened = []
    real = engine_module.Engine.open

    def open_engine(path, config, on_plan=None):
        opened.append(config)
        return real(path, config, on_plan)

    monkeypatch.setattr(engine_module.Engine, "open", open_engine)
    monkeypatch.setattr(tokenizer_module.Tokenizer, "open", lambda path: TOKENIZER)
    return opened


PLANNED = {
    "method": "dip-ca", "context": 64, "d_in": 0.6, "d_glu": 0.4, "gamma": 0.5, "cache": "lru",
    "split": [1.0, 0.5, 0.25, 1.0, 0.5, 0.5], "mlp_dram": "1000b",
}  # fmt: skip


@pytest.fixture
def plan_file(tiny_bundle, tmp_path):
    from dipper.bundle import Bundle

    header = Bundle.open(tiny_bundle).header
    path = tmp_path / "plan.json"
    held = {"schema": "dipper-plan/1", "header_sha256": header["header_sha256"], "model": "llama", "config": PLANNED}
    path.write_text(json.dumps(held))
    return str(path)


RUN = ["hi", "--raw", "-n", "4", "--no-probe", "--json"]


def test_run_takes_a_plan(tiny_bundle, plan_file, configs, capsys):
    assert main(["run", str(tiny_bundle), *RUN, "--plan", plan_file, "--threads", "1"]) == 0
    record = json.loads(lines(capsys)[0][-1])
    (config,) = configs
    assert config == engine_module.EngineConfig(
        **{**PLANNED, "split": tuple(PLANNED["split"]), "context": 6}, threads=1
    )
    assert (record["method"], record["d_in"], record["d_glu"], record["gamma"]) == ("dip-ca", 0.6, 0.4, 0.5)


def test_a_plan_of_a_bundle_is_run(tiny_bundle, letters, tmp_path, monkeypatch, capsys):
    kept = str(tmp_path / "plan.json")
    args = [
        str(tiny_bundle),
        "--device",
        "paper-phone",
        "--text",
        letters,
        "-p",
        "12",
        "-n",
        "6",
        "--mlp-dram",
        "1000b",
    ]
    assert main(["plan", *args, "--ctx", "32", "--max-ppl-increase", "0.5", "--out", kept]) == 0
    out, err = lines(capsys)
    assert out[0].startswith("plan  ")
    assert err == []
    monkeypatch.setattr(tokenizer_module.Tokenizer, "open", lambda path: TOKENIZER)
    assert main(["run", str(tiny_bundle), *RUN, "--plan", kept]) == 0
    record, best = json.loads(lines(capsys)[0][-1]), json.loads(Path(kept).read_text())["best"]
    same = ("method", "density", "d_in", "d_glu", "gamma", "cache")
    assert {name: record[name] for name in same} == {name: best[name] for name in same}


def test_plan_of_a_bundle_keeps_to_its_context(tiny_bundle, capsys):
    assert main(["plan", str(tiny_bundle), "--device", "paper-phone", "--mlp-dram", "1000b"]) == 1
    assert lines(capsys) == ([], ["dipper: a context of 1024 is over the model's 128: lower --ctx"])


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--method", "dip"), ("--density", "0.5"), ("--d-in", "0.5"), ("--d-glu", "0.5"), ("--gamma", "0.5"),
        ("--cache", "lru"), ("--calibration", "c.npz"), ("--dram", "1GB"), ("--mlp-dram", "50%"),
    ],
)  # fmt: skip
def test_what_a_plan_decides_is_not_given_too(tiny_bundle, plan_file, configs, capsys, option, value):
    assert main(["run", str(tiny_bundle), *RUN, "--plan", plan_file, option, value]) == 1
    message = f"dipper: {option} and --plan {plan_file} both decide it: drop one of them."
    assert lines(capsys) == ([], [message])
    assert configs == []


def test_plans_that_are_not_run(tiny_bundle, plan_file, configs, tmp_path, capsys):
    from dipper.bundle import pack
    from tiny import write_hf

    other = pack(write_hf(tmp_path / "hf", "qwen2"), tmp_path / "qwen2.dipper", tokenizer=False)
    assert main(["run", str(other), *RUN, "--plan", plan_file]) == 1
    assert lines(capsys) == (
        [],
        [f"dipper: {plan_file} is a plan for another bundle (llama), not for {other}: plan this one anew"],
    )
    assert main(["run", str(tiny_bundle), *RUN, "--plan", "no.json"]) == 1
    out, err = lines(capsys)
    assert out == []
    assert len(err) == 1
    assert err[0].startswith("dipper: no.json cannot be read as a plan (FileNotFoundError: ")
    assert err[0].endswith("): write one with dipper plan --out")
    assert main(["run", str(tiny_bundle), *RUN, "--plan", "auto", "--density", "0.5"]) == 1
    assert lines(capsys) == ([], ["dipper: --density and --plan auto both decide it: drop one of them."])
    assert configs == []


# ------------------------------------------------------------------------------------------------ profiles


def test_doctor_writes_a_profile(monkeypatch, capsys, tmp_path):
    from dipper import profile
    from dipper.device import Device

    asked = []
    made = Device.load("raspberry-pi-5")

    def measure(path, *, name, progress):
        asked.append((str(path), name))
        for what in ("disk", "DRAM"):
            progress(what)
        return made

    monkeypatch.setattr(profile, "measure_profile", measure)
    file = tmp_path / "here.toml"
    assert main(["doctor", "x.dipper", "--profile", str(file)]) == 0
    assert lines(capsys) == ([str(file)], ["measuring: disk", "measuring: DRAM"])
    assert asked == [("x.dipper", "here")]
    assert Device.load(file) == made
    assert main(["doctor", "x.dipper", "--profile", str(file), "--json"]) == 0
    out, _ = lines(capsys)
    assert [json.loads(line) for line in out] == [json.loads(json.dumps(made.as_dict()))]


def test_simulate_help_imports_no_library():
    from test_lean_import import HEAVY, cli, modules_after

    loaded = modules_after(cli("simulate", "--help"))
    assert "typer" in loaded
    assert not loaded & {*HEAVY, "numpy", "tokenizers", "matplotlib", "dipper.engine", "dipper.sweep", "dipper._core"}
