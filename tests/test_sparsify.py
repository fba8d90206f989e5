"""Rules in Hugging Face models: every kind of GLU layer is found, generation works, undo leaves nothing."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from dipper.errors import ConfigError  # noqa: E402
from dipper.methods import METHODS, MethodConfig  # noqa: E402
from dipper.sparsify import find_glus, sparsify_  # noqa: E402

pytestmark = pytest.mark.torch

COMMON = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
CONFIGS = {
    "Llama": {},
    "Mistral": {},
    "Qwen2": {},
    "Qwen3": {"head_dim": 8},
    "Phi3": {},
    "Gemma2": {"head_dim": 8},
    "Gemma3Text": {"head_dim": 8},
    "Mixtral": {"num_local_experts": 4},
    "Qwen2Moe": {**MOE, "shared_expert_intermediate_size": 48},
    "Qwen3Moe": {**MOE, "head_dim": 8, "norm_topk_prob": True},
}
EXPERTS = ("Mixtral", "Qwen2Moe", "Qwen3Moe")


def model(kind, dtype=torch.float32):
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**COMMON, **CONFIGS[kind])
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)


def ids(batch=2, length=24):
    return torch.randint(3, 96, (batch, length), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def _short_training(monkeypatch):
    monkeypatch.setattr(METHODS["dejavu"], "_steps", 5)


@pytest.mark.parametrize("kind", CONFIGS)
def test_density_1_changes_nothing_and_undo_restores(kind):
    net = model(kind)
    with torch.no_grad():
        before = net(ids()).logits
        with sparsify_(net, MethodConfig("dip", density=1.0)) as sparse:
            torch.testing.assert_close(net(ids()).logits, before, rtol=1e-4, atol=1e-5)
            assert sparse.touched == pytest.approx(1.0)
        with sparsify_(net, MethodConfig("dip", density=0.4)) as sparse:
            assert not torch.allclose(net(ids()).logits, before, rtol=1e-2, atol=1e-3)
            assert sparse.touched == pytest.approx(0.4, abs=0.02)
        assert torch.equal(net(ids()).logits, before)
    assert not any("forward" in vars(module) for module in net.modules())
    assert not net._forward_pre_hooks


@pytest.mark.parametrize("kind", ["Llama", "Phi3", "Mixtral"])
@pytest.mark.parametrize("name", METHODS)
def test_every_rule_in_every_kind_of_layer(kind, name):
    net = model(kind)
    options = {"dip-ca": {"capacity": 0.5}}.get(name, {})
    config = MethodConfig(name, density=1.0 if name in ("dense", "resident") else 0.75, **options)
    with torch.no_grad(), sparsify_(net, config, calibration=[ids(2, 64), ids(1, 64)]) as sparse:
        if name == "dip-ca" and kind in EXPERTS:
            with pytest.raises(ConfigError, match="experts see tokens without their order"):
                net(ids())
            return
        assert torch.isfinite(net(ids()).logits).all()
        assert sparse.touched == pytest.approx(config.density, abs=0.06)


@pytest.mark.parametrize(
    "config", [MethodConfig("dip", density=0.6), MethodConfig("dip-ca", density=0.6, capacity=0.4)]
)
def test_generation_with_a_kv_cache_is_the_whole_sequence(config):
    net = model("Llama")
    with torch.no_grad(), sparsify_(net, config):
        prompt = ids(2, 9)
        made = net.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=None)
        tokens = prompt
        for _ in range(12):
            tokens = torch.cat([tokens, net(tokens, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(made, tokens)


def test_left_padding_gives_the_same_masks():
    net = model("Llama")
    prompt = ids(1, 10)
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.int64), prompt], 1)
    mask = (padded != 0).long()
    with torch.no_grad(), sparsify_(net, MethodConfig("dip-ca", density=0.5, capacity=0.5)):
        alone = net(prompt).logits
        position = (mask.cumsum(-1) - 1).clamp_min(0)
        together = net(padded, attention_mask=mask, position_ids=position).logits
    torch.testing.assert_close(together[:, 4:], alone, rtol=1e-3, atol=1e-4)


def test_bf16_and_compile():
    net = model("Llama", torch.bfloat16)
    with torch.no_grad(), sparsify_(net, MethodConfig("dip", density=0.5)):
        assert net(ids()).logits.dtype == torch.bfloat16
        eager = net.model.layers[0].mlp(torch.ones(1, 3, 32, dtype=torch.bfloat16))
        compiled = torch.compile(lambda x: net.model.layers[0].mlp(x), backend="aot_eager")
        torch.testing.assert_close(compiled(torch.ones(1, 3, 32, dtype=torch.bfloat16)), eager)


def test_teal_of_all_linear_layers_prunes_attention_too():
    net = model("Llama")
    config = MethodConfig("teal", density=0.6, linears="all")
    with torch.no_grad(), sparsify_(net, config, calibration=[ids(4, 64)]) as sparse:
        net(ids(4, 64))
        assert len(sparse.linears) == 2 * 4
        for part in sparse.linears:
            assert part.meter.touched == pytest.approx(0.6, abs=0.1)
    assert not any("forward" in vars(module) for module in net.modules())
    with pytest.raises(ConfigError, match="dip prunes MLPs only"):
        sparsify_(net, MethodConfig("dip", density=0.6, linears="all"))


def test_own_densities_by_layer():
    net = model("Llama")
    with torch.no_grad(), sparsify_(net, MethodConfig("dip"), densities=[(0.25, 0.5), (0.75, 1.0)]) as sparse:
        net(ids())
        shares = [rule.meter.touched for rule in sparse.rules]
    assert shares == pytest.approx([1 / 3, 2.5 / 3])
    with pytest.raises(ConfigError, match=r"densities for 1 layers were given, and the model has 2 GLU layers"):
        sparsify_(net, MethodConfig("dip"), densities=[(0.5, 0.5)])


def test_paused_is_dense_and_counts_nothing():
    net = model("Llama")
    with torch.no_grad():
        dense = net(ids()).logits
        with sparsify_(net, MethodConfig("dip-ca", density=0.5, capacity=0.5)) as sparse:
            pruned = net(ids()).logits
            counted = [rule.meter.n_tokens for rule in sparse.rules]
            with sparse.paused():
                assert torch.equal(net(ids()).logits, dense)
            assert [rule.meter.n_tokens for rule in sparse.rules] == counted
            assert torch.equal(net(ids()).logits, pruned)


def test_a_model_without_glu_layers_says_what_was_looked_for():
    config = transformers.GPT2Config(vocab_size=96, n_embd=32, n_layer=1, n_head=2, n_positions=64)
    net = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(ConfigError, match=r"GPT2LMHeadModel has no GLU MLP: looked for .*gate_proj/up_proj/down_proj"):
        sparsify_(net, MethodConfig("dip", density=0.5))


def test_failed_calibration_leaves_the_model_as_it_was():
    net = model("Llama")
    with pytest.raises(ConfigError, match="teal needs calibration text"):
        sparsify_(net, MethodConfig("teal", density=0.5))
    with pytest.raises(ConfigError, match="needs calibration text"):
        sparsify_(net, MethodConfig("teal", density=0.5), calibration=[])
    assert not any("forward" in vars(module) for module in net.modules())
    assert not net._forward_pre_hooks


def test_layers_are_found_in_order():
    assert [site.name for site in find_glus(model("Llama"))] == ["model.layers.0.mlp", "model.layers.1.mlp"]
    moe = find_glus(model("Qwen2Moe"))
    assert sum(len(site.glus) for site in moe) == 2 * (4 + 1)
