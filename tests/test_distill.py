"""Adapters and their training, on tiny models: masks see merged weights, runs resume to the bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    peft = pytest.importorskip("peft")
    pytest.importorskip("accelerate")

from dipper.adapter import Adapter, merge  # noqa: E402
from dipper.cli import main  # noqa: E402
from dipper.distill import DistillConfig, distill, draw_curves  # noqa: E402
from dipper.errors import ConfigError, DipperError  # noqa: E402
from dipper.methods import METHODS, MethodConfig  # noqa: E402
from dipper.sparsify import find_glus, sparsify_  # noqa: E402
from dipper.torch_model import LoadedModel, load_model  # noqa: E402

from test_torch_model import tiny_folder, tiny_gguf  # noqa: E402  # isort: skip

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore::FutureWarning")]

VOCAB = 64
DIP = MethodConfig("dip", density=0.4)


def loaded(kind="Llama", seed=3, **changes):
    torch.manual_seed(seed)
    config = getattr(transformers, f"{kind}Config")(**{
        "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 2, "pad_token_id": 0,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2,
        **changes,
    })  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    return LoadedModel(model, lambda text: [ord(c) % VOCAB for c in text], None, f"tiny-{seed}", "f" * 64)


def ids(n=24, length=12, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(1, VOCAB, (n, length)))


def config(**changes):
    return DistillConfig(**{
        "method": DIP, "rank": 4, "steps": 12, "batch": 4, "lr": 1e-2, "eval_every": 4, "save_every": 4, **changes,
    })  # fmt: skip


def run(model=None, **changes):
    given = {name: changes.pop(name) for name in ("out", "resume", "progress", "adapter", "fitted") if name in changes}
    return distill(model or loaded(), ids(), ids()[:8], config(**changes), **given)


def stirred(adapter, seed=0):
    """Both matrices random: the adapter changes something."""
    generator = torch.Generator().manual_seed(seed)
    adapter.take_state([torch.randn(p.shape, generator=generator) * 0.1 for p in adapter.parameters()])
    return adapter


# ------------------------------------------------------------------------------------------------ weights


@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "Phi3"])
@pytest.mark.parametrize("name", ["dip", "gate", "up", "wina", "wanda", "dip-lowrank"])
def test_rules_see_the_merged_weights(kind, name):
    method = MethodConfig(name, density=0.6, norms=name == "dip", rank=0.05)
    model, x = loaded(kind), ids(2)
    shown = [ids(4, seed=5)]
    adapter = stirred(Adapter.attach(model.model, rank=4))
    with sparsify_(model.model, method, adapter=adapter, calibration=shown):
        apart = model.model(x).logits
    for site in find_glus(model.model):
        for linear in site.linears.values():
            linear.base_layer.weight += adapter.weight(linear).detach() - linear.base_layer.weight
    adapter.detach()
    with sparsify_(model.model, method, calibration=shown):
        torch.testing.assert_close(model.model(x).logits, apart, rtol=0, atol=1e-5)


def test_the_teacher_and_the_model_afterwards_are_as_before():
    model, x = loaded(), ids(2)
    before = model.model(x).logits
    adapter = stirred(Adapter.attach(model.model, rank=4))
    with sparsify_(model.model, DIP, adapter=adapter) as sparse:
        assert not torch.equal(model.model(x).logits, before)
        with sparse.paused():
            assert torch.equal(model.model(x).logits, before)
    adapter.detach()
    assert torch.equal(model.model(x).logits, before)
    assert not any("lora" in name for name, _ in model.model.named_parameters())


def test_snapped_weights_lie_on_the_grid_and_pass_the_gradient():
    model = loaded()
    adapter = Adapter.attach(model.model, rank=4)
    plain = [adapter.weight(linear).detach() for site in find_glus(model.model) for linear in site.linears.values()]
    adapter.snap_to_int4()
    for linear, was in zip((li for s in find_glus(model.model) for li in s.linears.values()), plain, strict=True):
        weight = adapter.weight(linear)
        assert all(len(row[:32].unique()) <= 16 for row in weight)
        torch.testing.assert_close(weight, was, rtol=0, atol=float(was.abs().max()) / 5)
    weight.sum().backward()
    assert float(adapter.parameters()[-1].grad.abs().sum()) > 0


def test_planes_hold_what_was_trained_beside_their_codes():
    model, method = loaded(), MethodConfig("planes", base_bits=(2, 2), fetch=0.5)
    with sparsify_(model.model, method) as sparse:
        before = [m for rule in sparse.rules for region in rule.regions for m in region.matrices]
    adapter = stirred(Adapter.attach(model.model, rank=4))
    with sparsify_(model.model, method, adapter=adapter) as sparse:
        model.model(ids(2))
        after = [m for rule in sparse.rules for region in rule.regions for m in region.matrices]
    linears = [linear for site in find_glus(model.model) for linear in site.linears.values()]
    for was, now, linear in zip(before, after, linears, strict=True):
        change = adapter.weight(linear) - linear.base_layer.weight
        torch.testing.assert_close(now.whole, was.whole + change)
        torch.testing.assert_close(now.base, was.base + change)


# ------------------------------------------------------------------------------------------------ training


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"method": MethodConfig("gate", density=0.6)},
        {"method": MethodConfig("up", density=0.6)},
        {"method": MethodConfig("dip-ca", density=0.4, gamma=0.5, capacity=0.5)},
        {"method": MethodConfig("planes", base_bits=(2, 2), fetch=0.2)},
        {"method": MethodConfig("planes", base_bits=(2, 2), density=0.6), "densities": (0.55, 0.7)},
        {"target": "layers"},
        {"straight_through": True},
        {"densities": (0.3, 0.6), "anneal": 0.3},
        {"hidden_weight": 0.5, "temperature": 2.0},
        {"recompute": True, "micro_batch": 2},
        {"snap_int4": True},
        {"method": MethodConfig("dense"), "target": "text"},
    ],
    ids=lambda changes: "-".join(changes) or "plain",
)
def test_held_out_loss_falls(changes):
    result = run(steps=24, eval_every=8, patience=9, **changes)
    assert result.best["loss"] < 0.97 * result.held_out[0]["loss"]


def test_dense_has_nothing_to_learn_of_itself():
    assert run(method=MethodConfig("dense"), steps=2).held_out[0]["loss"] == pytest.approx(0, abs=1e-6)


def test_accumulation_and_recomputing_are_the_same_curve():
    losses = [[s["loss"] for s in run(**c).steps] for c in ({}, {"micro_batch": 1}, {"recompute": True})]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-3)
    np.testing.assert_allclose(losses[2], losses[0], rtol=1e-5)


def test_bf16_is_near_fp32():
    losses = [run(steps=4, dtype=dtype).held_out[-1]["loss"] for dtype in ("fp32", "bf16")]
    assert losses[1] == pytest.approx(losses[0], rel=0.1)


def test_densities_are_drawn_by_step_and_annealed():
    c = config(densities=(0.3, 0.5), steps=100, anneal=0.5)
    drawn = [c.density(step) for step in range(100)]
    assert drawn == [c.density(step) for step in range(100)] != [replace(c, seed=1).density(s) for s in range(100)]
    assert drawn[0] == 1.0
    assert all(0.3 <= d <= 0.5 for d in drawn[50:])
    assert max(drawn[50:]) - min(drawn[50:]) > 0.15
    assert [config(anneal=0.5, steps=4).density(step) for step in range(4)] == pytest.approx([1.0, 0.7, 0.4, 0.4])


def test_every_window_comes_once_an_epoch():
    c = config(batch=4)
    seen = [n for step in range(6) for n in c.windows_of(step, 12)]
    assert sorted(seen[:12]) == sorted(seen[12:]) == list(range(12))
    assert seen[:12] != seen[12:]


@pytest.mark.parametrize(
    ("changes", "best"), [({}, 12), ({"lr": 0.2, "warmup": 1.0}, 4)], ids=["best at the end", "best before"]
)
def test_an_interrupted_run_resumes_to_the_same_bits(tmp_path, changes, best):
    def interrupt(done, _total, _loss):
        if done == 6:
            raise KeyboardInterrupt

    whole = run(out=tmp_path / "whole", densities=(0.3, 0.6), **changes)
    assert whole.best["step"] == best
    with pytest.raises(KeyboardInterrupt):
        run(out=tmp_path / "cut", densities=(0.3, 0.6), **changes, progress=interrupt)
    resumed = run(out=tmp_path / "cut", densities=(0.3, 0.6), **changes, resume=True)
    assert (resumed.steps, resumed.held_out) == (whole.steps, whole.held_out)
    assert all(torch.equal(a, b) for a, b in zip(resumed.adapter.state(), whole.adapter.state(), strict=True))
    assert not list(tmp_path.rglob("*partial*"))
    assert json.loads((tmp_path / "cut" / "curve.json").read_text())["steps"] == whole.steps


def test_it_ends_when_held_out_text_gains_nothing():
    result = run(lr=1e-15, steps=40, eval_every=2, patience=2, method=MethodConfig("dense"))
    assert len(result.steps) == 4


# ------------------------------------------------------------------------------------------------ files


def test_a_saved_adapter_is_the_trained_one(tmp_path):
    result = run(out=tmp_path)
    other = loaded()
    adapter = Adapter.load(tmp_path / "adapter", other)
    assert all(torch.equal(a, b) for a, b in zip(adapter.state(), result.adapter.state(), strict=True))
    assert adapter.n_bytes == 2 * sum(p.numel() for p in adapter.parameters())
    assert adapter.info["training"]["best"] == result.best


def test_an_adapter_for_another_model_is_refused(tmp_path):
    run(out=tmp_path, steps=1)
    with pytest.raises(
        ConfigError, match=r"is an adapter for tiny-3 \(2 layers of 32 x 80.*this model is tiny-4 \(3 layers of 32 x 80"
    ):
        Adapter.load(tmp_path / "adapter", loaded(seed=4, num_hidden_layers=3))
    with pytest.raises(ConfigError, match=r"holds no adapter of dipper's"):
        Adapter.load(tmp_path, loaded())


def test_models_of_one_size_differ_by_their_norms_and_not_by_their_grid(tmp_path):
    run(out=tmp_path, steps=1)
    coarse, other = loaded(), loaded()
    for linear in coarse.model.model.layers[0].mlp.children():
        if isinstance(linear, torch.nn.Linear):
            linear.weight.mul_(32).round_().div_(32)
    Adapter.load(tmp_path / "adapter", coarse)
    other.model.model.norm.weight[3] *= 1.01
    with pytest.raises(
        ConfigError, match=r"is an adapter for tiny-3 .* and this model is tiny-3 .*: use the model that"
    ):
        Adapter.load(tmp_path / "adapter", other)


@pytest.mark.parametrize("broken", ["adapter_model.safetensors", "adapter_config.json"])
@pytest.mark.parametrize("content", [None, b"{"], ids=["absent", "cut"])
def test_a_damaged_adapter_is_refused(tmp_path, broken, content):
    run(out=tmp_path, steps=1)
    file = tmp_path / "adapter" / broken
    file.unlink() if content is None else file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"adapter is damaged \(.*\): train the adapter again, or copy it anew"):
        Adapter.load(tmp_path / "adapter", loaded())


@pytest.mark.parametrize(
    ("made", "kind"),
    [
        (tiny_folder, "llama"),
        (tiny_folder, "phi3"),
        (tiny_folder, "gemma3"),
        (tiny_gguf, "llama"),
        (tiny_gguf, "qwen2"),
    ],
)
def test_merged_is_the_adapter(tmp_path, made, kind):
    source = made(tmp_path / "source", kind)
    model, x = load_model(source), ids(2)
    adapter = stirred(Adapter.attach(model.model, rank=4))
    with sparsify_(model.model, DIP, adapter=adapter):
        apart = model.model(x).logits.detach()
    merge(model, adapter, source, tmp_path / "merged", dtype="float32")
    merged = load_model(tmp_path / "merged")
    with sparsify_(merged.model, DIP):
        torch.testing.assert_close(merged.model(x).logits, apart, rtol=0, atol=1e-5)
    assert merged.encode("a b") == model.encode("a b")
    assert (merged.bos_id, merged.tokenizer.eos_ids) == (model.bos_id, model.tokenizer.eos_ids)
    with pytest.raises(ConfigError, match="merged exists"):
        merge(model, adapter, source, tmp_path / "merged")


def test_what_a_config_cannot_say_is_not_merged(tmp_path):
    source = tiny_gguf(tmp_path / "m.gguf", "llama-llama3")
    model = load_model(source)
    with pytest.raises(ConfigError, match="has scaled rotary tables or attention"):
        merge(model, Adapter.attach(model.model, rank=4), source, tmp_path / "merged")
    assert list(tmp_path.iterdir()) == [source]


def test_curves_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    draw_curves({"dip": run(steps=4).as_dict()}, tmp_path / "curve.svg")
    assert (tmp_path / "curve.svg").stat().st_size > 1000


# ------------------------------------------------------------------------------------------------ the verbs


def text_file(folder):
    path = folder / "text.txt"
    path.write_text(" ".join(np.random.default_rng(0).choice(["hell", "o", "the ", "sea", "lo"], 2000)))
    return path


def distil(source, folder, *more):
    given = ["--text", str(text_file(folder)), "-o", str(folder / "out"), "--density", "0.5", "--window", "16"]
    train = ["--rank", "4", "--steps", "4", "--batch", "4", "--eval-every", "2"]
    return ["distill", str(source), *given, *train, *more]


def test_from_text_to_a_bundle(tmp_path, capsys):
    source = tiny_gguf(tmp_path / "m.gguf", "llama", {"mlp": "F16"})
    out = tmp_path / "out"
    assert main(distil(source, tmp_path, "--json")) == 0, capsys.readouterr().err
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["best"]["loss"] <= told["first"]["loss"]
    assert {p.name for p in out.iterdir()} >= {"adapter", "checkpoint.pt", "curve.json"}
    score = ["--text", str(tmp_path / "text.txt"), "--window", "16", "--tokens", "64", "--density", "0.5", "--json"]
    assert main(["eval", str(source), *score, "--adapter", str(out / "adapter")]) == 0, capsys.readouterr().err
    apart = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert apart["options"]["adapter_bytes"] > 0
    assert apart["mlp_bytes_per_token"] == pytest.approx(
        apart["touched"] * apart["mlp_bytes"] + apart["options"]["adapter_bytes"]
    )
    merged = tmp_path / "merged"
    assert main(["merge", str(source), str(out / "adapter"), "-o", str(merged), "--dtype", "float32"]) == 0
    assert main(["pack", str(merged), "--bits", "16", "-o", str(tmp_path / "b.dipper")]) == 0, capsys.readouterr().err
    capsys.readouterr()
    assert main(["eval", str(tmp_path / "b.dipper"), "--method", "dip", "--mlp-dram", "20b", *score]) == 0, (
        capsys.readouterr().err
    )
    packed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert packed["perplexity"] == pytest.approx(apart["perplexity"], rel=0.02)
    assert main(distil(source, tmp_path)) == 1
    assert "holds a run already" in capsys.readouterr().err
    other = str(tiny_gguf(tmp_path / "other.gguf", "qwen2"))
    for command in (["eval", other, *score, "--adapter"], ["merge", other, "-o", str(tmp_path / "no")]):
        assert main([*command, str(out / "adapter")]) == 1
        assert "is an adapter for" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


@pytest.mark.slow
def test_two_processes_give_the_curve_of_one(tmp_path):
    source = tiny_gguf(tmp_path / "m.gguf", "llama")
    program = tmp_path / "program.py"
    program.write_text(
        "import sys, torch\nfrom dipper.cli import main\ncode = main(sys.argv[1:])\n"
        "print('the group has ended\\n' * (not torch.distributed.is_initialized()), end='', flush=True)\nsys.exit(code)"
    )
    curves = []
    for n in (1, 2):
        folder = tmp_path / str(n)
        folder.mkdir()
        # What `accelerate launch` starts for several GPUs; its own launcher starts one process on CPUs, whatever n.
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(n)]
        command = [sys.executable, *launch, str(program), *distil(source, folder)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, check=True, timeout=300, env=environment, capture_output=True, text=True)
        curves.append(json.loads((folder / "out" / "curve.json").read_text()))
        assert done.stderr.count("held-out loss") == 1
        assert done.stdout.count("the group has ended") == n
    one, two = ([s["loss"] for s in curve["steps"]] for curve in curves)
    assert two == pytest.approx(one, rel=1e-4)


# ------------------------------------------------------------------------------------------------ bad input


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(tmp_path):
    model = loaded()

    def break_weights(done, _total, _loss):
        if done == 6:
            model.model.model.layers[1].mlp.down_proj.base_layer.weight[0, 0] = float("nan")

    with pytest.raises(DipperError, match=r"loss of step 7 is nan.*model.layers.1.mlp is the first.*last good one"):
        run(model, out=tmp_path, progress=break_weights)
    assert len(json.loads((tmp_path / "curve.json").read_text())["steps"]) == 4
    assert len(run(out=tmp_path, resume=True).steps) == 12


def test_a_gradient_that_is_not_finite_stops_before_its_step():
    model = loaded()
    adapter = Adapter.attach(model.model, rank=4)
    before = adapter.state()
    adapter.parameters()[0].requires_grad_(True).register_hook(lambda grad: grad * float("inf"))
    with pytest.raises(
        DipperError,
        match=r"^The gradient of step 1 is nan: all outputs are finite; there is no checkpoint\. "
        r"Lower the learning rate \(0\.01\) or use dtype fp32\.$",
    ):
        run(model, adapter=adapter)
    assert all(torch.equal(a, b) for a, b in zip(adapter.state(), before, strict=True))


def test_the_window_that_breaks_is_found_among_its_batch():
    model, windows = loaded(), ids()
    model.model.model.embed_tokens.weight[0] = float("inf")  # of a token that only one window has
    windows[config().windows_of(0, len(windows))[2], 5] = 0
    with pytest.raises(DipperError, match=r"^The loss of step 1 is nan: model\.embed_tokens is the first module"):
        distill(model, windows, ids()[:8], config())


def test_held_out_text_without_a_finite_loss_stops():
    model, judged = loaded(), ids()[:8].clone()
    model.model.model.embed_tokens.weight[0] = float("nan")
    judged[-1, 3] = 0
    with pytest.raises(
        DipperError, match=r"^The loss on held-out text after step 0 is nan: model\.embed_tokens is the"
    ):
        distill(model, ids(), judged, config())


def test_a_broken_state_is_not_saved_over_a_good_one(tmp_path, monkeypatch):
    step, calls = torch.optim.AdamW.step, []

    def break_third(self, *given):
        calls.append(step(self, *given))
        if len(calls) == 3:
            self.param_groups[0]["params"][-1][0, 0] = float("nan")

    monkeypatch.setattr("torch.optim.AdamW.step", torch.no_grad()(break_third))
    changes = {"out": tmp_path, "save_every": 1, "eval_every": 12, "densities": (0.3, 0.6)}
    with pytest.raises(
        DipperError, match=r"held-out text after step 3 is nan: model\.layers\.1\.mlp is.*last good one"
    ):
        run(**changes)
    assert len(json.loads((tmp_path / "curve.json").read_text())["steps"]) == 2
    assert run(**changes, resume=True).steps == run(**{**changes, "out": None}).steps


@pytest.mark.parametrize(
    ("changes", "ways"),
    [
        ({}, "a micro-batch below 4, recompute, dtype bf16, a shorter window, target layers"),
        (
            {"micro_batch": 2, "dtype": "bf16", "recompute": True},
            "a micro-batch below 2, a shorter window, target layers",
        ),
        ({"micro_batch": 1, "dtype": "bf16", "target": "layers"}, "recompute, a shorter window"),
        ({"target": "text"}, "a micro-batch below 4, recompute, dtype bf16, a shorter window"),
        (
            {"method": MethodConfig("dip-ca", density=0.4, gamma=0.5, capacity=0.5), "batch": 1},
            "dtype bf16, a shorter window, target layers",
        ),
    ],
    ids=["plain", "small", "layers", "text", "caches"],
)
@pytest.mark.parametrize("where", ["cuda", "cpu"])
def test_out_of_memory_says_what_to_lower(monkeypatch, where, changes, ways):
    def fail(*_):
        if where == "cpu":
            torch.empty(1 << 48)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("dipper.distill._Run._step", fail)
    model = loaded()
    with pytest.raises(ConfigError) as caught:
        run(model, **changes)
    assert str(caught.value) == f"training does not fit into the device's memory: use {ways}"
    assert not any("lora" in name for name, _ in model.model.named_parameters())


def test_errors_that_are_not_memorys_stay_what_they_are(monkeypatch):
    monkeypatch.setattr("dipper.distill._Run._step", lambda *_: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match=r"size"):
        run()


def test_another_runs_checkpoint_is_refused(tmp_path):
    run(out=tmp_path, steps=4)
    with pytest.raises(ConfigError, match=r"holds a run already"):
        run(out=tmp_path, steps=4)
    with pytest.raises(ConfigError, match=r"of another run: its lr is 0.01, not 0.1"):
        run(out=tmp_path, steps=4, lr=0.1, resume=True)
    with pytest.raises(ConfigError, match=r"its name is 'tiny-3', not 'tiny-5'"):
        run(loaded(seed=5), out=tmp_path, steps=4, resume=True)
    with pytest.raises(ConfigError, match=r"of another run: its windows is '.*; give the same texts and options, or"):
        distill(loaded(), ids(seed=1), ids()[:8], config(steps=4), out=tmp_path, resume=True)
    with pytest.raises(ConfigError, match=r"of another run: its held_out is"):
        distill(loaded(), ids(), ids()[:7], config(steps=4), out=tmp_path, resume=True)
    (tmp_path / "checkpoint.pt").write_bytes((tmp_path / "checkpoint.pt").read_bytes()[:500])
    with pytest.raises(ConfigError, match=r"checkpoint.pt is damaged: remove it and start anew, or copy it again"):
        run(out=tmp_path, steps=4, resume=True)
    with pytest.raises(ConfigError, match=r"nothing to resume"):
        run(out=tmp_path / "none", steps=4, resume=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target": "words"}, "target is 'words'"),
        ({"steps": 0}, "steps is 0"),
        ({"lr": 0.0}, "lr is 0"),
        ({"anneal": 2.0}, "anneal is 2"),
        ({"target": "layers", "temperature": 2.0}, "no effect on target 'layers'"),
        ({"method": MethodConfig("wanda", density=0.5)}, "wanda keeps what it made of the weights"),
        ({"method": MethodConfig("dip-ca", density=0.5, capacity=0.5), "recompute": True}, "move the simulated caches"),
        ({"densities": (0.6, 0.4)}, "densities are"),
        ({"method": MethodConfig("dip", densities=(0.5, 0.4)), "anneal": 0.5}, "same in every part"),
    ],
)
def test_options_that_contradict_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        config(**changes)


def test_a_failed_start_leaves_the_model_alone():
    model = loaded()
    with pytest.raises(ConfigError, match="needs calibration text"):
        run(model, method=MethodConfig("teal", density=0.5))
    assert not any("lora" in name for name, _ in model.model.named_parameters())


def test_every_rule_says_whether_its_weights_may_move():
    assert {name for name, rule in METHODS.items() if not rule.follows_weights} == {
        "dejavu", "magnitude", "wanda", "sparsegpt", "rsparse", "resident",
    }  # fmt: skip
