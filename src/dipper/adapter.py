"""LoRA on the MLPs of a model, by peft: W + s BA for gate, up and down, kept apart or merged into a checkpoint.

    adapter = Adapter.attach(loaded.model, rank=32)
    with sparsify_(loaded.model, MethodConfig("dip", density=0.5), adapter=adapter):
        ...                                     # rules see W + s BA, with its gradient
    adapter.save("smollm2.lora", loaded)        # peft's format, and `dipper.json`: which model it is for
    merge(loaded, adapter, source, "smollm2-merged")    # a Hugging Face folder for `dipper pack`

peft owns the matrices, their places and their files. The products are not peft's: it would add B(Ax) of what a layer
is given, and a rule that ranks columns by the weights, drops columns of W + s BA, or rounds them to a grid must see the
sum. So `weight` makes the sum, [out, in], once a layer and forward pass: 2 r in out operations, r = 32 against the
tokens of a batch.

Needs the `train` extra.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dipper.errors import ConfigError
from dipper.files import write_json
from dipper.grid import F32, block_scales, quantise
from dipper.rope import rope_table
from dipper.sources import pull
from dipper.sparsify import find_glus
from dipper.tokenizer import Tokenizer, write_tokenizer
from dipper.torch_model import LoadedModel, load_model

try:
    import peft
except ImportError as error:
    raise ConfigError(f"peft is needed here ({error}): run `pip install 'dipper[train]'`") from error

__all__ = ["Adapter", "merge", "merge_source", "model_fields"]

SCHEMA = "dipper-adapter/1"
_NAME = "default"  # peft's, of the only adapter
_WEIGHTS = "adapter_model.safetensors"  # peft's
_ADAPTER_BITS = 16  # as they would be held at run time


class Adapter:
    """Low-rank matrices beside the gate, up and down projections of a model.

    Attributes:
        info: of `dipper.json`, for an adapter that was loaded: model and training.
    """

    def __init__(self, peft_model: Any, info: Mapping[str, Any] | None = None) -> None:
        self._peft = peft_model
        self.info = dict(info or {})
        self._grids: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    @classmethod
    def attach(cls, model: nn.Module, *, rank: int = 32, alpha: int | None = None, seed: int = 0) -> Adapter:
        """New matrices: A random by `seed`, B zero, so that nothing has changed yet.

        Args:
            model: a Hugging Face model.
            rank: r of A [r, in] and B [out, r].
            alpha: s = alpha / r; None: 2 r.
            seed: of A.

        Raises:
            ConfigError: the rank is not positive, or the MLPs are experts in one parameter.
        """
        if rank < 1:
            raise ConfigError(f"rank is {rank}; it must be at least 1")
        sites = find_glus(model)
        if any(site.is_experts for site in sites):
            raise ConfigError("the experts of this model are stacked in one parameter, which no adapter is for")
        config = peft.LoraConfig(
            r=rank,
            lora_alpha=2 * rank if alpha is None else alpha,
            target_modules=[f"{site.name}.{name}" for site in sites for name in site.linears],
        )
        device = next(model.parameters()).device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            return cls(peft.get_peft_model(model, config))

    @classmethod
    def load(cls, path: str | os.PathLike[str], loaded: LoadedModel) -> Adapter:
        """An adapter that `save` wrote, beside the model that it was trained on.

        Raises:
            ConfigError: there is none, it is for another model, or its files are damaged.
        """
        folder = Path(path)
        try:
            info = json.loads((folder / "dipper.json").read_text(encoding="utf-8"))
            made_for = info["model"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{folder} holds no adapter of dipper's ({type(error).__name__}: {error}): give the folder that "
                "`dipper distill` wrote"
            ) from None
        own = model_fields(loaded)
        if {**made_for, "name": None} != {**own, "name": None}:
            raise ConfigError(
                f"{folder} is an adapter for {_described(made_for)}, and this model is {_described(own)}: use the "
                "model that it was trained on"
            )
        try:
            load_file(folder / _WEIGHTS)  # first: peft would ask the Hugging Face hub for one that is not there
            adapter = cls(peft.PeftModel.from_pretrained(loaded.model, str(folder)), info)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            text = " ".join(str(error).split())[:200]
            raise ConfigError(f"{folder} is damaged ({text}): train the adapter again, or copy it anew") from error
        if info.get("training", {}).get("config", {}).get("snap_int4"):
            adapter.snap_to_int4()
        return adapter

    # -- weights

    def weight(self, linear: nn.Module) -> Tensor:
        """W + s BA of a linear layer of the model, [out, in], rounded to a grid where `snap_to_int4` was called."""
        base: Tensor = linear.base_layer.weight
        with torch.autocast(base.device.type, enabled=False):
            merged = base + linear.get_delta_weight(_NAME).to(base.dtype)
            grid = self._grids.get(linear)
            return merged if grid is None else _snapped(merged, *grid)

    def snap_to_int4(self) -> None:
        """From now on weights are rounded to the int4 grid of the model's own; the gradient passes unrounded.

        The scales are those that `dipper pack --bits 4` finds for the weights before training: LoRA moves weights by
        little, and with fixed scales a step costs one rounding.
        """
        for site in find_glus(self._peft):
            for linear in site.linears.values():
                base = linear.base_layer.weight
                grid, rows = quantise(base.detach().float().cpu().numpy(), 4)
                self._grids[linear] = tuple(torch.from_numpy(a).to(base.device) for a in block_scales(grid, rows))

    def parameters(self) -> list[nn.Parameter]:
        """What is trained, in the order of the layers."""
        return [parameter for name, parameter in self._peft.named_parameters() if "lora_" in name]

    @property
    def n_bytes(self) -> int:
        """Bytes of the adapter when it is kept apart, at 16 bits."""
        n_weights: int = sum(p.numel() for p in self.parameters())
        return n_weights * _ADAPTER_BITS // 8

    def state(self) -> list[Tensor]:
        """Copies of what is trained, on the CPU."""
        return [p.detach().cpu().clone() for p in self.parameters()]

    def take_state(self, state: list[Tensor]) -> None:
        """Puts back what `state` gave."""
        with torch.no_grad():
            for parameter, value in zip(self.parameters(), state, strict=True):
                parameter.copy_(value)

    # -- files

    def save(self, path: str | os.PathLike[str], loaded: LoadedModel, training: Mapping[str, Any]) -> None:
        """Writes peft's files, in fp16, and `dipper.json`; an adapter that was there is replaced when all is whole."""
        with _whole_folder(path) as folder:
            self._peft.save_pretrained(str(folder), save_embedding_layers=False)
            weights = folder / _WEIGHTS
            save_file({n: t.half() for n, t in load_file(weights).items()}, weights, metadata={"format": "pt"})
            (folder / "README.md").unlink(missing_ok=True)  # a form to fill in
            info = {"schema": SCHEMA, "model": model_fields(loaded), "bytes": self.n_bytes, "training": dict(training)}
            write_json(folder / "dipper.json", info)

    def detach(self) -> None:
        """Takes the matrices out of the model, which is what it was before."""
        self._peft.unload()


def _snapped(weight: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """weight [n, C] on w = s code + m, code in 0..15, s and m [n, n_blocks] of 32 columns; straight-through."""
    n_columns = weight.shape[1]
    s, m = (part.repeat_interleave(32, dim=1)[:, :n_columns] for part in (scale, offset))
    with torch.no_grad():
        codes = ((weight.float() - m) / torch.where(s == 0, 1.0, s)).round().clamp(0, 15)
        grid = (codes * s + m).to(weight.dtype)
    return weight + (grid - weight).detach()


# ------------------------------------------------------------------------------------------------ which model


def model_fields(loaded: LoadedModel) -> dict[str, Any]:
    """Name, sizes and a digest that a model keeps whatever its weights are quantised to: that of its norms."""
    fields = {k: v for k, v in loaded.calibration_fields().items() if k != "fingerprint"}
    digest = hashlib.sha256()
    for _, parameter in loaded.model.named_parameters():
        if parameter.ndim == 1 and "bias" not in _:
            digest.update(parameter.detach().cpu().to(torch.float16).numpy().tobytes())
    return {**fields, "norms_sha256": digest.hexdigest()}


def _described(fields: Mapping[str, Any]) -> str:
    return (
        f"{fields.get('name')} ({fields.get('n_layers')} layers of {fields.get('hidden')} x "
        f"{fields.get('intermediate')}, norms {str(fields.get('norms_sha256'))[:12]})"
    )


# ------------------------------------------------------------------------------------------------ merge


def merge(
    loaded: LoadedModel, adapter: Adapter, source: Path, out: str | os.PathLike[str], *, dtype: str = "float16"
) -> None:
    """Writes the model with the adapter in its weights as a Hugging Face folder; the adapter is taken out of the model.

    Args:
        loaded: the model that the adapter is attached to.
        adapter: what is merged.
        source: what the model was loaded from.
        out: the folder; must not exist.
        dtype: of the weights in the file: float16, bfloat16 or float32.

    Raises:
        ConfigError: the folder exists, or the model's rotary table cannot be said in a config.json.
    """
    if Path(out).exists():
        raise ConfigError(f"{out} exists: give another folder, or remove it")
    model = loaded.model
    with torch.no_grad():
        for site in find_glus(model):
            for linear in site.linears.values():
                linear.base_layer.weight.copy_(adapter.weight(linear))
    adapter.detach()
    target = getattr(torch, dtype)
    state = {name: tensor.to("cpu", target).contiguous() for name, tensor in model.state_dict().items()}
    if getattr(model.config, "tie_word_embeddings", False):
        state.pop("lm_head.weight", None)
    broken = [name for name, tensor in state.items() if not bool(torch.isfinite(tensor).all())]
    if broken:
        raise ConfigError(f"{broken[0]} is not finite in {dtype}: use float32")
    with _whole_folder(out) as folder:
        write_json(folder / "config.json", {**_config_of(loaded, source), "dtype": dtype, "torch_dtype": dtype})
        _write_tokenizer_files(loaded.tokenizer, source, folder)
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def merge_source(
    source: str, adapter: str | os.PathLike[str], out: str | os.PathLike[str], *, dtype: str = "float16"
) -> None:
    """`merge` of files: a source as `load_model` takes it, and the folder of an adapter.

    Raises:
        ConfigError: see `Adapter.load` and `merge`; or the dtype is unknown.
    """
    if dtype not in ("float16", "bfloat16", "float32"):
        raise ConfigError(f"dtype is '{dtype}'; a merged model is float16, bfloat16 or float32")
    path = Path(source) if Path(source).exists() else pull(source)
    loaded = load_model(path)
    merge(loaded, Adapter.load(adapter, loaded), path, out, dtype=dtype)


def _config_of(loaded: LoadedModel, source: Path) -> dict[str, Any]:
    """config.json: the source's own, or one made of the model's, with the rotary table said in parameters."""
    if (source / "config.json").is_file():
        content: dict[str, Any] = json.loads((source / "config.json").read_text(encoding="utf-8"))
        return content
    config: dict[str, Any] = json.loads(loaded.model.config.to_json_string(use_diff=False))
    tables = getattr(loaded.model.model.rotary_emb, "tables", {})
    plain = [(table, scale) for table, scale in tables.values()]
    scaling = loaded.model.config.head_dim**-0.5
    odd = any(layer.self_attn.scaling != scaling for layer in loaded.model.model.layers)
    theta = _theta(plain[0][0].cpu().numpy()) if len(plain) == 1 and plain[0][1] == 1.0 and not odd else None
    if theta is None:
        raise ConfigError(
            f"{loaded.name} has scaled rotary tables or attention, which a config.json made here cannot say: merge "
            "into the Hugging Face folder of the model"
        )
    return {**config, "rope_theta": theta, "rope_parameters": {"rope_type": "default", "rope_theta": theta}}


def _theta(table: F32) -> float | None:
    """The base of plain rotary frequencies [dim / 2]; None where they are scaled."""
    dim = 2 * len(table)
    theta = float(round(float(table[-1]) ** (-dim / (dim - 2)))) if dim > 2 else 10000.0
    plain = rope_table({"rope_theta": theta}, dim, 0).short
    return theta if np.allclose(plain, table, rtol=1e-6, atol=0) else None


def _write_tokenizer_files(tokenizer: Tokenizer | None, source: Path, folder: Path) -> None:
    """The source's own files, or those that say the same."""
    if source.is_dir() and (source / "config.json").is_file():
        for pattern in ("tokenizer*", "chat_template*", "generation_config.json", "special_tokens_map.json"):
            for file in source.glob(pattern):
                shutil.copyfile(file, folder / file.name)
        return
    if source.is_dir():  # a bundle
        for name in ("tokenizer.json", "chat_template.jinja"):
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
        assert tokenizer is not None, "a bundle has a tokenizer"
        ids = {"bos_id": tokenizer.bos_id, "eos_ids": list(tokenizer.eos_ids), "add_bos": tokenizer.add_bos}
    else:
        ids = write_tokenizer(source, folder)
    write_json(folder / "tokenizer_config.json", {"add_bos_token": bool(ids["add_bos"])})
    write_json(folder / "generation_config.json", {"bos_token_id": ids["bos_id"], "eos_token_id": ids["eos_ids"]})


@contextmanager
def _whole_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder that is whole or absent: built beside its place, flushed, renamed when the block ends well."""
    target = Path(path).absolute()
    if not target.parent.is_dir():
        raise ConfigError(f"Cannot write {target}: the folder {target.parent} does not exist. Create it first.")
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    try:
        partial.chmod(0o755)
        yield partial
        for file in partial.rglob("*"):
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
        if target.exists():
            shutil.rmtree(target)
        os.replace(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
