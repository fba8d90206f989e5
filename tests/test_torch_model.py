"""Any source as a Hugging Face model: equal logits from every kind of source, and one-line errors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dipper.bundle import Bundle, pack
from dipper.errors import BundleError, CheckpointError, ConfigError, SourceError
from dipper.tokenizer import write_tokenizer
from tiny import ARCHITECTURES, CONFIGS, bpe_keys, save_with_transformers, write_gguf

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("gguf")
from dipper import torch_model  # noqa: E402
from dipper.torch_model import LoadedModel, load_model  # noqa: E402

pytestmark = pytest.mark.torch

VOCAB_SIZE = 264  # that of `bpe_keys`
N_TOKENS = 48  # several sliding windows of the tiny models
FOREIGN = {  # architectures that only transformers knows
    "gemma2": {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
}


def tokens(n: int = N_TOKENS, seed: int = 3) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCAB_SIZE, n).tolist()


def logits(model, ids: list[int] | None = None) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=torch.tensor([ids or tokens()])).logits[0]  # [T, V]


def tiny_gguf(path: Path, kind: str = "llama", types: dict[str, str] | None = None, **changes) -> Path:
    return write_gguf(path, kind, types, vocabulary=bpe_keys(), vocab_size=VOCAB_SIZE, **changes)


def add_tokenizer(folder: Path) -> Path:
    """The tokenizer of `tiny_gguf` for a Hugging Face folder."""
    source = folder.with_name(folder.name + "-tokenizer")
    source.mkdir()
    facts = write_tokenizer(tiny_gguf(source / "m.gguf"), source)
    (source / "tokenizer.json").rename(folder / "tokenizer.json")
    ids = {"bos_token_id": facts["bos_id"], "eos_token_id": facts["eos_ids"]}
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | ids))
    (folder / "generation_config.json").unlink(missing_ok=True)
    return folder


def tiny_folder(folder: Path, kind: str = "llama", **changes) -> Path:
    return add_tokenizer(save_with_transformers(folder, kind, vocab_size=VOCAB_SIZE, **changes))


def foreign_folder(folder: Path, kind: str) -> Path:
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB_SIZE, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 3, "num_key_value_heads": 1, "max_position_embeddings": 128}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = transformers.AutoConfig.for_model(kind, **sizes, **heads, **ids, **FOREIGN[kind])
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return add_tokenizer(folder)


def original(folder: Path, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **{"dtype": torch.float32, **options}).eval()


# --- equal logits -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CONFIGS)
def test_gguf_and_its_bundle_are_equal_bit_for_bit(kind, tmp_path):
    types = {"ffn_down": "F16", "ffn_up": "BF16", "token_embd": "F16"}
    gguf = tiny_gguf(tmp_path / "m.gguf", kind, types)
    bundle = pack(gguf, tmp_path / "m.dipper")
    one, other = load_model(str(gguf)), load_model(str(bundle))
    assert torch.equal(logits(one.model), logits(other.model))
    assert one.name == other.name


@pytest.mark.parametrize(
    "types", [("Q4_K", "Q6_K"), ("Q5_K", "Q4_1"), ("Q8_0", "Q5_1"), ("Q4_0", "Q5_0")], ids="-".join
)
def test_quantised_gguf_and_its_bundle_are_equal_bit_for_bit(types, tmp_path):
    names = ("attn_q", "attn_v", "ffn_gate", "output"), ("attn_k", "attn_output", "ffn_up", "ffn_down", "token_embd")
    by_name = {name: kind for kind, group in zip(types, names, strict=True) for name in group}
    gguf = tiny_gguf(
        tmp_path / "m.gguf", "llama", by_name, hidden_size=256, num_attention_heads=4, intermediate_size=512
    )
    bundle = pack(gguf, tmp_path / "m.dipper")
    got = logits(load_model(gguf).model)
    assert torch.isfinite(got).all()
    assert torch.equal(got, logits(load_model(bundle).model))


@pytest.mark.parametrize("slice_weights", [1, 1 << 20])
def test_slices_of_rows_do_not_change_a_bit(slice_weights, tmp_path, monkeypatch):
    gguf = tiny_gguf(tmp_path / "m.gguf", "llama", intermediate_size=400)  # q and k interleaved, several tiles
    bundle = Bundle.open(pack(gguf, tmp_path / "m.dipper"))
    monkeypatch.setattr("dipper.glu._SLICE_WEIGHTS", slice_weights)
    model = torch_model.read_model(torch_model.open_checkpoint(gguf))
    for name in (*model.vectors, *model.parts):
        assert np.array_equal(model.dequantise(name), bundle.dequantise(name)), name


@pytest.mark.parametrize("kind", CONFIGS)
def test_folder_of_a_known_architecture_is_the_original(kind, tmp_path):
    folder = tiny_folder(tmp_path / kind, kind)
    expected = logits(original(folder, attn_implementation="sdpa"))
    got = logits(load_model(folder, context=N_TOKENS).model)
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("kind", FOREIGN)
def test_folder_of_another_architecture_is_left_to_transformers(kind, tmp_path):
    folder = foreign_folder(tmp_path / kind, kind)
    loaded = load_model(folder, attention="eager")
    assert loaded.model.config.model_type == kind
    assert torch.equal(logits(loaded.model), logits(original(folder, attn_implementation="eager")))
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    by_default = load_model(folder).model  # Gemma 2 has no sdpa in transformers
    assert by_default.config._attn_implementation == {"gemma2": "eager", "mixtral": "sdpa"}[kind]
    assert torch.allclose(logits(by_default), logits(loaded.model), atol=1e-4)
    assert (loaded.name, loaded.encode("hello")) == (kind, [258, ord("o")])


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_model_in_bf16_is_that_of_transformers(kind, tmp_path):
    folder = tiny_folder(tmp_path / kind, kind, dtype="bfloat16")
    loaded = load_model(folder, dtype=torch.bfloat16, attention="eager", context=N_TOKENS)
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.bfloat16}
    expected = logits(original(folder, dtype=torch.bfloat16, attn_implementation="eager")).float()
    got = logits(loaded.model).float()
    # Both round alike but for one operation at most (a norm stored as 1 + w), which a token here and there sees.
    assert (got - expected).abs().mean() <= 0.02 * expected.abs().mean()


def test_rope_tables_stay_exact_when_the_model_is_cast(tmp_path):
    model = load_model(tiny_gguf(tmp_path / "m.gguf")).model
    before = {key: table.clone() for key, (table, _) in model.model.rotary_emb.tables.items()}
    model.to(torch.bfloat16)
    assert all(torch.equal(table, before[key]) for key, (table, _) in model.model.rotary_emb.tables.items())
    assert logits(model).dtype == torch.bfloat16


def test_context_chooses_the_rope_table(tmp_path):
    gguf = tiny_gguf(tmp_path / "m.gguf", "phi3")  # long tables beyond 64 positions
    short, long, default = (logits(load_model(gguf, context=n).model) for n in (64, 65, None))
    assert torch.equal(long, default)
    assert not torch.allclose(short, long)


def test_batches_and_generation_with_a_kv_cache(tmp_path):
    loaded = load_model(tiny_gguf(tmp_path / "m.gguf", "gemma3"))
    ids = torch.tensor([tokens(seed=1), tokens(seed=2)])
    with torch.inference_mode():
        both = loaded.model(input_ids=ids).logits
    for row, single in zip(both, ids.tolist(), strict=True):
        assert torch.allclose(row, logits(loaded.model, single), atol=1e-4)
    prompt = ids[:1, :12]
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    cached, uncached = (loaded.model.generate(prompt, use_cache=use, **options) for use in (True, False))
    assert torch.equal(cached, uncached)


# --- what else a loaded model says ------------------------------------------------------------------------------------


@pytest.mark.parametrize("add_bos", [False, True])
def test_text_gets_no_bos_and_windows_get_the_models(add_bos, tmp_path):
    keys = bpe_keys(**{"ggml.add_bos_token": add_bos})
    gguf = write_gguf(tmp_path / "m.gguf", "llama", vocabulary=keys, vocab_size=VOCAB_SIZE)
    for source in (gguf, pack(gguf, tmp_path / "m.dipper")):
        loaded = load_model(source)
        assert loaded.encode("hello he") == [258, ord("o"), 259]
        assert loaded.bos_id == (260 if add_bos else None)
        assert loaded.model.config.eos_token_id == loaded.tokenizer.eos_ids == [261]
        assert loaded.tokenizer.decode([258, 261]) == "hell"


def test_fingerprints_name_the_weights(tmp_path):
    gguf = tiny_gguf(tmp_path / "m.gguf")
    bundle = Bundle.open(pack(gguf, tmp_path / "m.dipper"))
    assert load_model(gguf).fingerprint == bundle.header["source"]["sha256"]
    assert load_model(bundle.path).fingerprint == bundle.header["header_sha256"]
    assert load_model(tiny_gguf(tmp_path / "other.gguf", seed=1)).fingerprint != load_model(gguf).fingerprint
    foreign = foreign_folder(tmp_path / "gemma2", "gemma2")
    first = load_model(foreign).fingerprint
    assert len(first) == 64
    config = json.loads((foreign / "config.json").read_text())
    (foreign / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    assert load_model(foreign).fingerprint != first


def test_a_name_is_fetched_and_a_path_is_not(tmp_path, monkeypatch):
    folder = tiny_folder(tmp_path / "0123abcd")
    monkeypatch.setattr(torch_model, "pull", lambda name: {"org/tiny": folder}[name])
    assert load_model("org/tiny").name == "org/tiny"
    assert load_model(folder).name == "0123abcd"
    with pytest.raises(CheckpointError, match="there is no such file or folder"):
        load_model(Path("org/tiny"))


# --- errors -----------------------------------------------------------------------------------------------------------


def assert_one_line(error: pytest.ExceptionInfo) -> None:
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["gguf", "known", "foreign"])
def test_missing_tokenizer(kind, tmp_path):
    if kind == "gguf":
        source, message = write_gguf(tmp_path / "m.gguf", "llama"), r"m\.gguf.*tokenizer"
    else:
        folder = tmp_path / "m"
        source = tiny_folder(folder) if kind == "known" else foreign_folder(folder, "gemma2")
        (source / "tokenizer.json").unlink()
        message = r"m has no tokenizer\.json: download the tokenizer files of the model into it, then try again"
    with pytest.raises(CheckpointError, match=message) as error:
        load_model(source)
    assert_one_line(error)


def test_wrong_sources(tmp_path):
    with pytest.raises(SourceError, match="neither an existing path nor a Hugging Face id"):
        load_model(str(tmp_path / "absent.gguf"))
    with pytest.raises(SourceError, match="not a known model: did you mean 'smollm2'"):
        load_model("smollm")
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        load_model(tmp_path)
    (tmp_path / "text").write_text("some text that is no model")
    with pytest.raises(CheckpointError, match="not with b'GGUF'"):
        load_model(tmp_path / "text")
    (tmp_path / "bundle.json").write_text("{}")
    with pytest.raises(BundleError, match="not the header of a dipper bundle"):
        load_model(tmp_path)


def test_folder_that_transformers_does_not_know_either(tmp_path):
    folder = foreign_folder(tmp_path / "m", "gemma2")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "nosuch", "architectures": ["NoSuch"]}))
    with pytest.raises(
        CheckpointError, match=r"not know this architecture and transformers .* cannot load it"
    ) as error:
        load_model(folder)
    assert_one_line(error)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has no \.safetensors files"):
        load_model(folder)


def test_missing_weights_are_not_made_up(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = foreign_folder(tmp_path / "m", "mixtral")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.self_attn.o_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    message = r"1 weights are missing, the first is 'model\.layers\.1\.self_attn\.o_proj\.weight'"
    with pytest.raises(CheckpointError, match=message):
        load_model(folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "nosuch"}, "device is 'nosuch', which PyTorch cannot use"),
        ({"device": "cuda:99"}, "device is 'cuda:99', which PyTorch cannot use"),
        ({"dtype": torch.int8}, r"dtype is torch\.int8; give a floating-point"),
        ({"dtype": "bf16"}, "dtype is 'bf16'; give a floating-point"),
        ({"context": 0}, "context is 0; it must be at least 1"),
        ({"attention": "nosuch"}, "attention is 'nosuch', with which transformers cannot make this model"),
    ],
)
def test_bad_options(options, message, tmp_path):
    with pytest.raises(ConfigError, match=message) as error:
        load_model(tiny_gguf(tmp_path / "m.gguf"), **options)
    assert_one_line(error)


def test_without_the_extra():
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from dipper.errors import ConfigError\n"
        "try:\n    import dipper.torch_model\nexcept ConfigError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.count("\n") == 1
    assert "PyTorch and transformers are needed" in done.stdout
    assert "run `pip install 'dipper[torch]'`" in done.stdout


# --- real models ------------------------------------------------------------------------------------------------------


def test_smollm2_and_its_bundle_are_equal_bit_for_bit(smollm2_gguf, tmp_path):
    one = load_model(smollm2_gguf)
    other = load_model(pack(smollm2_gguf, tmp_path / "m.dipper"))
    ids = one.encode("The capital of France is")
    assert ids == other.encode("The capital of France is")
    got = logits(one.model, ids)
    assert torch.equal(got, logits(other.model, ids))
    assert one.tokenizer.decode([int(got[-1].argmax())]) == " Paris"
    assert isinstance(other, LoadedModel)
