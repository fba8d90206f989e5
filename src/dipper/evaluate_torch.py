"""Perplexity, KL to the dense model and answers to tasks, by a PyTorch model on any device.

`TorchScorer` is a `Scorer` of `evaluate`: windows, error bars and records are written there. The model's body gives
hidden states, which are small; the head is applied to a few rows at a time, so that [T, V] logits never exist as a
whole, whatever the vocabulary. Log likelihoods are taken in fp64.

    with open_sparse("smollm2", {"name": "dip", "density": 0.6}) as opened:
        record = evaluate_torch(opened, "wiki.test.raw", kl=True)

Needs the `torch` extra.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from dipper.calibration import Calibration
from dipper.errors import ConfigError, DipperError
from dipper.evaluate import (
    PerplexityResult,
    Progress,
    ResultFile,
    WindowScore,
    cut_windows,
    eval_record,
    ids_sha256,
    read_text,
    relative_change,
    score_text,
    text_windows,
)
from dipper.methods import MethodConfig
from dipper.records import EvalRecord, Traffic, peak_rss_bytes, provenance
from dipper.sparsify import Sparsified, find_glus, sparsify_
from dipper.split_weights import Splits
from dipper.tasks import Pair, run_tasks
from dipper.torch_model import LoadedModel, load_model

__all__ = [
    "DTYPES",
    "Opened",
    "TorchScorer",
    "answer_tasks",
    "broken_module",
    "calibration_windows",
    "evaluate_torch",
    "mlp_bytes",
    "open_sparse",
    "perplexity_torch",
    "run_options",
    "split_head",
]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# Rows of logits at once: at a vocabulary of 262,144, 128 rows in fp64 are 268 MB.
_HEAD_ROWS = 128
# Positions of a window of calibration text.
_CALIBRATION_WINDOW = 1024


@dataclass(frozen=True)
class Opened:
    """A model with a method applied to it."""

    loaded: LoadedModel
    sparsity: Sparsified
    source: str = ""
    mlp_bytes: int | None = None  # of the dense MLP weights that a token uses, in the grid of the source
    calibration: dict[str, str] = field(default_factory=dict)  # sha256 of the files it was calibrated by
    adapter_bytes: int | None = None  # of an adapter kept apart, which every token reads
    # The dense model's hidden states by the ids they are of, kept for whoever scores many methods against one model.
    dense_states: dict[bytes, torch.Tensor] | None = None

    @property
    def model(self) -> Any:
        """The patched Hugging Face model."""
        return self.loaded.model


@contextmanager
def open_sparse(
    source: str | os.PathLike[str],
    method: Mapping[str, Any],
    *,
    device: str = "cpu",
    dtype: str | None = None,
    context: int | None = None,
    calibration: str | os.PathLike[str] | None = None,
    calibration_text: str | os.PathLike[str] | None = None,
    adapter: str | os.PathLike[str] | None = None,
) -> Iterator[Opened]:
    """Loads a model and applies a method to it.

    Args:
        source: a bundle, a GGUF file, a Hugging Face folder, or a name that `dipper pull` knows.
        method: options of `MethodConfig`; `name` "dense" leaves the model as it is.
        device: of PyTorch, such as cpu, cuda or cuda:1.
        dtype: one of `DTYPES`; None: fp32.
        context: positions that will be used, where the rotary embedding depends on them.
        calibration: file of `dipper calibrate`: DIP's densities by layer, norms and means.
        calibration_text: UTF-8, for methods that must see some first: 8 windows of 1024 positions are shown.
        adapter: folder of `dipper distill`'s adapter, kept apart; its bytes are counted. Needs the `train` extra.

    Yields:
        The model, sparse until the context ends.

    Raises:
        ConfigError: the dtype, the method or an option of it is unknown, or the model has no GLU layers.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype '{dtype}' is unknown: choose {', '.join(DTYPES)}")
    config = MethodConfig(**method)
    fitted = None if calibration is None else Calibration.load(Path(calibration))
    text = None if calibration_text is None else read_text(calibration_text)
    given = Path(source) if Path(source).exists() else os.fspath(source)
    loaded = load_model(given, device=device, dtype=DTYPES[dtype or "fp32"], context=context)
    windows = None if text is None else calibration_windows(loaded, text.text)
    beside = None if adapter is None else _load_adapter(adapter, loaded)
    splits = Splits(loaded.codes) if config.name == "planes" else None
    with sparsify_(loaded.model, config, calibration=windows, fitted=fitted, adapter=beside, splits=splits) as sparsity:
        yield Opened(
            loaded,
            sparsity,
            source=os.fspath(source),
            mlp_bytes=mlp_bytes(given, loaded.model),
            calibration=_told(calibration, calibration_text, None if adapter is None else _weights_of(adapter)),
            adapter_bytes=None if beside is None else beside.n_bytes,
        )


def _weights_of(adapter: str | os.PathLike[str]) -> Path:
    return Path(adapter) / "adapter_model.safetensors"


def _load_adapter(path: str | os.PathLike[str], loaded: LoadedModel) -> Any:
    from dipper.adapter import Adapter  # with it peft, an extra of its own

    return Adapter.load(path, loaded)


def _told(*paths: str | os.PathLike[str] | None) -> dict[str, str]:
    return {Path(p).name: sha256(Path(p).read_bytes()).hexdigest() for p in paths if p is not None}


def calibration_windows(loaded: LoadedModel, text: str, n_windows: int = 8) -> list[torch.Tensor]:
    """Windows [1, 1024] of ids from all over a text, on the model's device; fewer where the text is short."""
    windows = cut_windows(loaded.encode(text), _CALIBRATION_WINDOW, bos_id=loaded.bos_id)
    chosen = windows[:: max(1, len(windows) // n_windows)][:n_windows]
    return [torch.tensor([ids], device=loaded.model.device) for ids in chosen]


def mlp_bytes(source: str | os.PathLike[str], model: Any) -> int:
    """Bytes of the dense MLP weights that a token uses, scales included, in the grid in which the source has them."""
    from dipper.bundle import Bundle
    from dipper.checkpoint import open_checkpoint
    from dipper.glu import read_model
    from dipper.sources import pull

    path = Path(source) if Path(source).exists() else pull(os.fspath(source))
    if (path / "bundle.json").is_file():
        return Bundle.open(path).mlp_bytes
    if path.is_file():
        parts = read_model(open_checkpoint(path)).parts.items()
        mlp = [p for name, p in parts if name.rpartition(".")[2] in ("gate", "up", "down")]
        return sum(p.shape[0] * p.tensor.type.row_bytes(p.shape[1]) for p in mlp if p.tensor.type is not None)
    # A folder of floats. Of a mixture's experts a token uses a few.
    stored = getattr(model.config, "dtype", None)
    n_used = getattr(_text_config(model), "num_experts_per_tok", 1)
    weights: int = sum(
        3 * glu.gate.numel() for site in find_glus(model) for glu in site.glus[: n_used if site.is_experts else None]
    )
    return weights * (stored.itemsize if isinstance(stored, torch.dtype) else 2)


# ------------------------------------------------------------------------------------------------ scorer


class TorchScorer:
    """Scores windows and pairs with a PyTorch model."""

    def __init__(
        self, opened: Opened, *, batch: int = 1, against_dense: bool = False, context: int | None = None
    ) -> None:
        """Prepares scoring.

        Args:
            opened: the model; its MLPs may be patched at any time while it is used.
            batch: sequences at once.
            against_dense: also run the dense model on every window, for `kl`, `same_top1` and `dense_nll`.
            context: positions at most; None: what the model was made for.

        Raises:
            ConfigError: the batch is empty, or the context beyond the model's.
            DipperError: the logits are more than the head of the hidden states.
        """
        if batch < 1:
            raise ConfigError(f"The batch is {batch}; it must be at least 1.")
        made_for = int(getattr(_text_config(opened.model), "max_position_embeddings", 1 << 30))
        if not 2 <= (context or made_for) <= made_for:
            raise ConfigError(f"The context is {context}; it must be at least 2, and the model has {made_for}.")
        self.opened, self._against_dense = opened, against_dense
        self._batch, self._context = batch, context or made_for
        self._body, self._head = split_head(opened.model)
        self._device = next(opened.model.parameters()).device
        with opened.sparsity.paused(), torch.inference_mode():
            self._check_head()

    @property
    def batch(self) -> int:
        """Sequences at once."""
        return self._batch

    @property
    def context(self) -> int:
        """Positions of a sequence at most."""
        return self._context

    def _hidden(self, ids: torch.Tensor) -> torch.Tensor:
        """[B, T] -> [B, T, D], what the head is applied to."""
        hidden: torch.Tensor = self._body(input_ids=ids, use_cache=False).last_hidden_state
        return hidden

    def _dense_hidden(self, ids: torch.Tensor) -> torch.Tensor:
        """[B, T] -> [B, T, D] of the dense model, out of `Opened.dense_states` where it was asked before."""
        states = {} if self.opened.dense_states is None else self.opened.dense_states
        key = ids.cpu().numpy().tobytes()
        if key not in states:
            with self.opened.sparsity.paused():
                states[key] = self._hidden(ids)
        return states[key]

    def _log_probs(self, hidden: torch.Tensor) -> torch.Tensor:
        """[N, D] -> [N, V] fp64; N is small."""
        return torch.log_softmax(self._head(hidden).double(), dim=-1)

    def _check_head(self) -> None:
        """Refuses a model whose logits are scaled or masked in a way that is not known here."""
        ids = torch.tensor([[0, 1]], device=self._device)
        own = self.opened.model(input_ids=ids, use_cache=False).logits[0].float()
        ours = self._head(self._hidden(ids)[0]).float()
        if not torch.allclose(own, ours, rtol=1e-2, atol=1e-2, equal_nan=True):
            kind = _text_config(self.opened.model).model_type
            raise DipperError(
                f"The logits of {kind} are not its head applied to its last hidden state, which is how they are "
                "computed here: this model cannot be evaluated."
            )

    def score(self, windows: Sequence[Sequence[int]]) -> list[WindowScore]:
        """Scores ids[1:] of every window.

        Args:
            windows: of one length T >= 2.

        Returns:
            Sums over each window. The traffic of a batch stands in its first window.

        Raises:
            DipperError: the logits are not finite; the message names the module.
        """
        with torch.inference_mode():
            return self._score(torch.tensor([list(w) for w in windows], device=self._device))

    def _score(self, ids: torch.Tensor) -> list[WindowScore]:
        inputs, targets = ids[:, :-1], ids[:, 1:]
        dense = self._dense_hidden(inputs) if self._against_dense else None
        sparsity = self.opened.sparsity
        sparsity.reset_meters()
        sparsity.reset()
        hidden = self._hidden(inputs)
        hits = sum(rule.meter.hits for rule in sparsity.rules)
        misses = sum(rule.meter.selected for rule in sparsity.rules) - hits
        sums = [self._sums(hidden[i], targets[i], None if dense is None else dense[i]) for i in range(len(ids))]
        if not all(np.isfinite(window["nll"]) for window in sums):
            self._blame(inputs)
        traffic = [Traffic(n_tokens=inputs.numel(), hits=int(hits), misses=int(misses))]
        traffic += [Traffic() for _ in ids[1:]]
        return [
            WindowScore(tokens=inputs.shape[1], touched=float(sparsity.touched), traffic=t, **window)
            for window, t in zip(sums, traffic, strict=True)
        ]

    def _sums(self, hidden: torch.Tensor, targets: torch.Tensor, dense: torch.Tensor | None) -> dict[str, Any]:
        """Sums over the rows of one window: hidden [N, D], targets [N], dense [N, D]."""
        nll = torch.zeros((), dtype=torch.float64, device=hidden.device)
        dense_nll, kl, same = nll.clone(), nll.clone(), nll.clone()
        for at in range(0, len(targets), _HEAD_ROWS):
            rows = slice(at, at + _HEAD_ROWS)
            log_q = self._log_probs(hidden[rows])
            nll -= _picked(log_q, targets[rows]).sum()
            if dense is not None:
                log_p = self._log_probs(dense[rows])
                dense_nll -= _picked(log_p, targets[rows]).sum()
                kl += nn.functional.kl_div(log_q, log_p, log_target=True, reduction="sum")
                same += (log_p.argmax(-1) == log_q.argmax(-1)).sum()
        if dense is None:
            return {"nll": float(nll)}
        return {"nll": float(nll), "dense_nll": float(dense_nll), "kl": float(kl), "same_top1": int(same)}

    def score_pairs(
        self, pairs: Sequence[Pair], progress: Callable[[int, int], None] | None = None
    ) -> list[tuple[float, bool]]:
        """Log likelihood of continuations.

        A pair that is longer than the context loses the start of its context.

        Args:
            pairs: ids of contexts and continuations, neither empty.
            progress: called with (pairs done, pairs in all).

        Returns:
            For each pair the log likelihood of the continuation, nats, and whether greedy decoding would give it.

        Raises:
            ConfigError: a continuation is longer than the context.
            DipperError: the logits are not finite; the message names the module.
        """
        longest = max((len(after) for _, after in pairs), default=0)
        if longest > self.context:
            raise ConfigError(f"A continuation has {longest} tokens, and the context is {self.context}.")
        results: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
        # The longest first: what does not fit in memory fails at once, and a batch needs little padding.
        order = sorted(range(len(pairs)), key=lambda i: -len(pairs[i][0]) - len(pairs[i][1]))
        for at in range(0, len(order), self._batch):
            some = order[at : at + self._batch]
            with torch.inference_mode():
                scores = self._score_batch([pairs[i] for i in some])
            for i, scored in zip(some, scores, strict=True):
                results[i] = scored
            if progress is not None:
                progress(min(at + self._batch, len(pairs)), len(pairs))
        return results

    def _score_batch(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        """The pairs of one batch, padded on the right, where a causal model does not look."""
        inputs = [[*context, *after][-(self.context + 1) : -1] for context, after in pairs]
        ids = torch.zeros((len(inputs), max(map(len, inputs))), dtype=torch.int64, device=self._device)
        for row, held in zip(ids, inputs, strict=True):
            row[: len(held)] = torch.tensor(held)
        self.opened.sparsity.reset()
        hidden = self._hidden(ids)
        scored = []
        for states, held, (_, after) in zip(hidden, inputs, pairs, strict=True):
            targets = torch.tensor(after, device=self._device)
            log_q = self._log_probs(states[len(held) - len(after) : len(held)])
            scored.append((float(_picked(log_q, targets).sum()), bool((log_q.argmax(-1) == targets).all())))
        if not all(np.isfinite(value) for value, _ in scored):
            self._blame(ids)
        return scored

    def _blame(self, ids: torch.Tensor) -> None:
        """Runs the batch again and raises an error that names the first module with an output that is not finite."""

        def run() -> None:
            self.opened.sparsity.reset()
            for states in self._hidden(ids):
                self._head(states[-1:])

        found = broken_module(self.opened.model, run)
        where = f"{found} is the first module whose output is not finite" if found else "no module's output is"
        dtype = _dtype_name(next(self.opened.model.parameters()).dtype)
        raise DipperError(
            f"The logits are NaN or infinite: {where}. The weights are broken, or {dtype} overflows there: check the "
            "model's file, or use --dtype fp32."
        )

    def fields(self) -> dict[str, Any]:
        """The keys of an `EvalRecord` that say what scored."""
        config, loaded = self.opened.sparsity.config, self.opened.loaded
        named = _method_fields(config)
        if self.opened.adapter_bytes is not None:
            named["options"]["adapter_bytes"] = self.opened.adapter_bytes
        return {
            "engine": "torch",
            "model": loaded.name,
            "device": _device_name(self._device),
            "dtype": _dtype_name(next(self.opened.model.parameters()).dtype),
            **named,
            "mlp_bytes": self.opened.mlp_bytes,
            "peak_rss_bytes": peak_rss_bytes(),
            "n_threads": torch.get_num_threads(),
            "provenance": provenance(self.opened.source),
        }


def _method_fields(config: Any) -> dict[str, Any]:
    """The keys that name a method, as `records.method_fields` does for the engine's."""
    named = ("name", "density", "gamma", "cache", *(("densities",) if config.name in ("dip", "dip-ca") else ()))
    is_dip, is_dense = config.name in ("dip", "dip-ca"), config.name in ("dense", "planes", "resident")
    own = {f.name: getattr(config, f.name) for f in fields(config) if getattr(config, f.name) != f.default}
    d_in, d_glu = (is_dip and config.densities) or (config.density, config.density)
    density = (2 * d_in + d_glu) / 3 if is_dip else config.density
    return {
        "method": config.name,
        "density": None if is_dense else density,
        "d_in": d_in if is_dip else None,
        "d_glu": d_glu if is_dip else None,
        "gamma": config.gamma,
        "cache": None if config.capacity is None else config.cache,
        "options": {k: v for k, v in own.items() if k not in named},
    }


def _text_config(model: Any) -> Any:
    return model.config.get_text_config()


def broken_module(model: Any, run: Callable[[], object]) -> str | None:
    """The first module of a model with an output that is not finite while `run` runs it."""
    found: list[str] = []

    def look(name: str, _module: nn.Module, _inputs: Any, output: Any) -> None:
        if not found and any(not bool(torch.isfinite(t).all()) for t in _tensors(output)):
            found.append(name)

    hooks = [module.register_forward_hook(partial(look, name)) for name, module in model.named_modules() if name]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None


def split_head(model: Any) -> tuple[nn.Module, Callable[[torch.Tensor], torch.Tensor]]:
    """A causal model as the module that gives last hidden states, and what makes logits of them."""
    body, head = model.base_model, model.get_output_embeddings()
    cap = getattr(_text_config(model), "final_logit_softcapping", None)
    if cap is None:
        return body, head
    return body, lambda hidden: cap * torch.tanh(head(hidden) / cap)


def _picked(log_probs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """[N, V] and [N] -> [N]."""
    return log_probs.gather(-1, targets[:, None])[:, 0]


def _tensors(output: Any) -> Iterator[torch.Tensor]:
    """Floating-point tensors in what a module returned."""
    if isinstance(output, torch.Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from _tensors(value)


def _dtype_name(dtype: torch.dtype) -> str:
    return next((name for name, known in DTYPES.items() if known == dtype), str(dtype))


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


# ------------------------------------------------------------------------------------------------ evaluation


def perplexity_torch(
    opened: Opened, tokens: Sequence[int] | npt.NDArray[Any], *, batch: int = 1, kl: bool = False, **options: Any
) -> PerplexityResult:
    """Scores a text with a PyTorch model: `evaluate.score_text` and its options; `kl` as for `evaluate_torch`."""
    return score_text(TorchScorer(opened, batch=batch, against_dense=kl), tokens, **options)


def run_options(opened: Opened) -> dict[str, Any]:
    """What two runs must agree in to be one, as JSON types: model, method, calibration, device and dtype."""
    parameter = next(opened.model.parameters())
    return {
        "engine": "torch",
        "model_sha256": opened.loaded.fingerprint,
        "method": asdict(opened.sparsity.config),
        "calibration": opened.calibration,
        "device": _device_name(parameter.device),
        "dtype": _dtype_name(parameter.dtype),
    }


def evaluate_torch(
    opened: Opened,
    text: str | os.PathLike[str],
    *,
    window: int = 1024,
    limit: int | None = None,
    rows_joined: bool | None = None,
    seed: int = 0,
    batch: int = 1,
    kl: bool = False,
    out: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> EvalRecord:
    """Scores a text with a PyTorch model.

    Args:
        opened: the model and its method.
        text: a UTF-8 file.
        window: positions of a window.
        limit: use at most this many positions.
        rows_joined: see `evaluate.read_text`.
        seed: of the bootstrap.
        batch: windows at once.
        kl: run the dense model side by side: KL, same-top-1 and the paired change of the perplexity.
        out: keep the result here; a run that was interrupted continues from it.
        progress: see `evaluate.score_text`.

    Returns:
        The record; with `kl`, `against` holds the dense model's perplexity.

    Raises:
        ConfigError: the text or the window cannot be used, or `out` holds another run's result.
        DipperError: the logits are not finite.
    """
    source, loaded = read_text(text, rows_joined), opened.loaded
    tokens = np.asarray(loaded.encode(source.text), dtype=np.int32)
    windows = text_windows(source, tokens, window, bos_id=loaded.bos_id, limit=limit)
    sha256_of_ids = ids_sha256(windows, loaded.bos_id)
    own = {"tokens_sha256": sha256_of_ids, "window": window, "against_dense": kl, "seed": seed}
    file = ResultFile(out, {**run_options(opened), **own})
    if file.record is not None:
        return EvalRecord.from_dict(file.record)
    scorer = TorchScorer(opened, batch=batch, against_dense=kl)
    result = score_text(
        scorer, tokens, window=window, bos_id=loaded.bos_id, limit=limit, seed=seed, progress=progress,
        earlier=file.windows("0"), save=partial(file.save_windows, "0"),
    )  # fmt: skip
    record = replace(eval_record(scorer, source, result), config=file.config, against=_against_dense(result, seed))
    file.finish(record.as_dict())
    return record


def _against_dense(result: PerplexityResult, seed: int) -> dict[str, Any] | None:
    """What `EvalRecord.against` holds when the dense model ran side by side."""
    dense = result.dense()
    if dense is None:
        return None
    return {"record": {"method": "dense", "perplexity": dense.perplexity}, **relative_change(result, dense, seed)}


def answer_tasks(
    opened: Opened, names: Sequence[str], data: str | os.PathLike[str], *, batch: int = 1, **options: Any
) -> dict[str, Any]:
    """Answers tasks with a PyTorch model.

    Args:
        opened: the model and its method.
        names: keys of `tasks.TASKS`.
        data: the folder of their files.
        batch: continuations at once.
        options: limit, seed, shots, out and progress of `tasks.run_tasks`.

    Returns:
        The result of `tasks.run_tasks`.
    """
    scorer, loaded = TorchScorer(opened, batch=batch), opened.loaded
    config = run_options(opened)
    own = scorer.fields()
    head = {**own, "provenance": asdict(own["provenance"])}
    ends = [] if loaded.tokenizer is None else loaded.tokenizer.eos_ids
    return run_tasks(
        names, data, scorer, loaded.encode, config=config, head=head, bos_id=loaded.bos_id,
        empty_id=next(iter(ends), 0), **options,
    )  # fmt: skip
