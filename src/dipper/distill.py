"""Distillation: LoRA on the MLPs, trained under a rule's masks to give what the dense model gives.

    result = distill(loaded, windows, held_out, DistillConfig(method=MethodConfig("dip", density=0.5)), out=folder)

The student is the model under a rule with W + s BA for gate, up and down; the teacher is the same model without either
(one copy of the weights: `Sparsified.paused`). The loss is KL(teacher || student) of the next-token distributions, so
no text is learnt, only what pruning took away. `target="text"` trains on the text itself instead, to see how much of a
gain is adaptation to a domain; `target="layers"` compares every MLP with its own dense output, layer by layer, and
holds the graph of one layer at a time.

Every random choice is a function of the seed and the step: which windows, which density. So a run that goes on from a
checkpoint gives the same curve, and each of several processes (`accelerate launch`) takes its share of the same batch:
gradients are summed, the curve is that of one process up to rounding.

Needs the `train` extra.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dipper.adapter import Adapter, model_fields
from dipper.calibration import Calibration
from dipper.errors import ConfigError, DipperError
from dipper.evaluate import cut_windows, read_text
from dipper.evaluate_torch import broken_module, split_head
from dipper.figures import panels
from dipper.files import whole_file, write_json
from dipper.head_losses import cross_entropy, divergence
from dipper.methods import METHODS, MethodConfig
from dipper.sparsify import Sparsified, sparsify_
from dipper.split_weights import Splits
from dipper.torch_model import LoadedModel, load_model

try:
    from accelerate import PartialState
    from accelerate.utils import reduce
except ImportError as error:
    raise ConfigError(f"accelerate is needed here ({error}): run `pip install 'dipper[train]'`") from error

__all__ = ["DistillConfig", "Distilled", "distill", "distill_source", "draw_curves", "end_processes"]

TARGETS = ("logits", "layers", "text")
_NO_MEMORY = ("DefaultCPUAllocator", "CUBLAS_STATUS_ALLOC_FAILED")  # what torch has no error of its own for
_CHECKPOINT, _CURVE, _FIGURE, _ADAPTER = "checkpoint.pt", "curve.json", "curve.svg", "adapter"

Progress = Callable[[int, int, float], None]  # steps done, in all, loss


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """What is trained, and how.

    Attributes:
        method: the student's rule; its density is what held-out text is judged at.
        rank, alpha: of LoRA; alpha None: 2 rank.
        target: "logits": KL to the dense model; "layers": each MLP's squared error to its dense output, relative;
            "text": cross-entropy of the text, no teacher.
        temperature: of both distributions under "logits"; the loss is multiplied by its square.
        hidden_weight: of the last hidden state's squared error, relative to the teacher's, beside the KL.
        straight_through: the gradient passes masks as if nothing were dropped; else dropped columns give none.
        densities: lowest and highest of a density drawn anew each step; None: the method's.
        anneal: share of the steps over which the density falls from 1 to where it belongs.
        snap_int4: weights are rounded to the int4 grid in the student, so that a bundle of 4 bits loses nothing more.
        steps, batch: optimiser steps, and windows of each, over all processes.
        micro_batch: windows at once in one process; None: all of its share.
        lr, warmup, last_lr: peak of the learning rate, share of the steps in which it rises, and the share of the peak
            that the cosine ends at.
        clip: norm of the gradient at most.
        dtype: "bf16" (matrix products of the layers; adapter, optimiser and losses stay fp32) or "fp32".
        recompute: gradient checkpointing: activations of one layer at a time, a third more time.
        seed: of A, the windows and the densities.
        eval_every, patience: steps between judgements on held-out text, and how many without improvement end it.
        save_every: steps between checkpoints.
    """

    method: MethodConfig
    rank: int = 32
    alpha: int | None = None
    target: str = "logits"
    temperature: float = 1.0
    hidden_weight: float = 0.0
    straight_through: bool = False
    densities: tuple[float, float] | None = None
    anneal: float = 0.0
    snap_int4: bool = False
    steps: int = 400
    batch: int = 16
    micro_batch: int | None = None
    lr: float = 1e-3
    warmup: float = 0.05
    last_lr: float = 0.05
    clip: float = 1.0
    dtype: str = "fp32"
    recompute: bool = False
    seed: int = 0
    eval_every: int = 50
    patience: int = 4
    save_every: int = 100

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            raise ConfigError(f"target is '{self.target}', known are {', '.join(TARGETS)}")
        if self.dtype not in ("fp32", "bf16"):
            raise ConfigError(f"dtype is '{self.dtype}', training knows fp32 and bf16")
        for name in ("rank", "steps", "batch", "eval_every", "patience", "save_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("lr", "temperature", "clip"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} is {getattr(self, name):g}; it must be above 0")
        for name in ("anneal", "warmup", "last_lr"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} is {getattr(self, name):g}; it must be a share, 0 to 1")
        if self.target != "logits" and (self.temperature != 1 or self.hidden_weight):
            raise ConfigError(f"temperature and hidden_weight have no effect on target '{self.target}': leave them out")
        if not METHODS[self.method.name].follows_weights:
            raise ConfigError(
                f"{self.method.name} keeps what it made of the weights at the start, so training them under it would "
                "have no effect: choose a method that masks activations, such as dip"
            )
        if self.recompute and self.method.capacity is not None:
            raise ConfigError(
                "recomputing activations would move the simulated caches twice: leave either recompute or capacity out"
            )
        if self.moves_density and self.method.densities is not None:
            raise ConfigError("a density that moves is the same in every part: leave the method's own densities out")
        if self.densities is not None and not 0 < self.densities[0] <= self.densities[1] <= 1:
            raise ConfigError(f"densities are {self.densities}; give the lowest and the highest, in (0, 1]")

    @property
    def moves_density(self) -> bool:
        """Whether the density differs from step to step."""
        return self.densities is not None or self.anneal > 0

    def density(self, step: int) -> float:
        """Of the whole MLP at a step, 0 to steps - 1."""
        density = self.method.density
        if self.densities is not None:
            density = float(np.random.default_rng((self.seed, 1, step)).uniform(*self.densities))
        left = 1 - step / (self.anneal * self.steps) if self.anneal else 0.0
        return density + (1 - density) * max(0.0, left)

    def learning_rate(self, step: int) -> float:
        """A linear rise, then half a cosine."""
        rise = self.warmup * self.steps
        if step < rise:
            return self.lr * (step + 1) / (rise + 1)
        part = (step - rise) / max(1.0, self.steps - rise)
        return self.lr * (self.last_lr + (1 - self.last_lr) * 0.5 * (1 + math.cos(math.pi * part)))

    def windows_of(self, step: int, n_windows: int) -> list[int]:
        """The windows of a step: permutations of all, one after the other."""
        chosen = []
        for at in range(step * self.batch, (step + 1) * self.batch):
            epoch, place = divmod(at, n_windows)
            chosen.append(int(np.random.default_rng((self.seed, 2, epoch)).permutation(n_windows)[place]))
        return chosen


@dataclass
class Distilled:
    """What training gave.

    Attributes:
        adapter: attached to the model, as it was where held-out text was judged best.
        steps: per step {step, loss, lr, density, norm}; loss in nats a token, or relative under "layers".
        held_out: per judgement {step, loss}, at the method's density; step 0 is before training.
        seconds: of the steps, without the judgements.
        is_main: whether this process is the one of several that writes files and says what came out.
    """

    adapter: Adapter
    steps: list[dict[str, float]] = field(default_factory=list)
    held_out: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0
    is_main: bool = True

    @property
    def best(self) -> dict[str, float]:
        """The judgement of the adapter that was kept."""
        return min(self.held_out, key=lambda judged: judged["loss"])

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"steps": self.steps, "held_out": self.held_out, "seconds": round(self.seconds, 2)}


def distill(
    loaded: LoadedModel,
    windows: Tensor,
    held_out: Tensor,
    config: DistillConfig,
    *,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    fitted: Calibration | None = None,
    calibration: Sequence[Tensor] | None = None,
    splits: Splits | None = None,
    adapter: Adapter | None = None,
    progress: Progress | None = None,
) -> Distilled:
    """Trains an adapter.

    Args:
        loaded: the model, dense, on its device; the adapter stays attached to it.
        windows: ids [N, T] to train on, on the CPU.
        held_out: ids [M, T] that decide which state is kept and when training ends.
        config: see there.
        out: folder for checkpoints, the curve, its figure and the adapter; made where it is absent. None: nothing.
        resume: go on from the checkpoint in `out`.
        fitted: DIP's densities by layer, norms and means (`sparsify_`).
        calibration: windows for rules that look at text first (`sparsify_`).
        splits: of `planes`; None: made of the source's codes.
        adapter: one to go on training, already attached; None: a new one.
        progress: called after each step.

    Raises:
        ConfigError: options contradict each other, or the checkpoint is of another run; or memory is too small.
        DipperError: the loss or the gradient is not finite.
    """
    if windows.ndim != 2 or held_out.ndim != 2 or not len(windows) or not len(held_out):
        raise ConfigError("there is no text to train on or to judge by: give more of it, or a smaller window")
    if config.moves_density and fitted is not None and fitted.tables:
        raise ConfigError("the calibration has densities by layer, and the density is to move: leave one of them out")
    new = adapter is None
    adapter = adapter or Adapter.attach(loaded.model, rank=config.rank, alpha=config.alpha, seed=config.seed)
    try:
        if config.snap_int4:
            adapter.snap_to_int4()
        if config.method.name == "planes" and splits is None:
            splits = Splits(loaded.codes)
        with (
            _memory_advice(config),
            sparsify_(
                loaded.model, config.method, calibration=calibration, fitted=fitted, adapter=adapter, splits=splits
            ) as sparse,
        ):
            inputs = {"windows": _digest(windows), "held_out": _digest(held_out)}
            inputs |= {} if fitted is None or fitted.sha256 is None else {"calibration": fitted.sha256}
            run = _Run(loaded, sparse, adapter, config, inputs, Path(out) if out is not None else None)
            return run.train(windows, held_out, resume, progress)
    except BaseException:
        if new:
            adapter.detach()
        raise


def distill_source(
    source: str,
    texts: Sequence[Path],
    out: Path,
    config: DistillConfig,
    *,
    held_out: Path | None = None,
    window: int = 512,
    device: str = "cpu",
    calibration: Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> Distilled:
    """`distill` of files; under `accelerate launch` each process takes a GPU of its own.

    Args:
        source: as `load_model` takes it.
        texts: to train on; windows do not cross files.
        out: see `distill`.
        config: see `distill`.
        held_out: to judge by; None: a twentieth of the windows, 1 to 64 of them, which are then not trained on.
        window: positions of a window.
        device: of PyTorch.
        calibration: file of `dipper calibrate`.
        resume, progress: see `distill`.
    """
    processes = PartialState(cpu=device == "cpu")
    if processes.num_processes > 1:
        device = str(processes.device)
    loaded = load_model(Path(source) if Path(source).exists() else source, device=device, context=window)
    trained, judged = _windows(loaded, texts, held_out, window, config.seed)
    fitted = None if calibration is None else Calibration.load(calibration)
    result = distill(loaded, trained, judged, config, out=out, resume=resume, fitted=fitted, progress=progress)
    if result.is_main and find_spec("matplotlib"):
        draw_curves({config.method.name: result.as_dict()}, out / _FIGURE)
    return result


def end_processes() -> None:
    """Ends the group of `accelerate launch`'s processes, if there is one: the last that a program does with it.

    After an error the group is the launcher's, which stops all: to end it from one process could wait for another.
    """
    PartialState().destroy_process_group()


def _windows(
    loaded: LoadedModel, texts: Sequence[Path], held_out: Path | None, window: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Ids [N, T] to train on, mixed, and [M, T] to judge by."""

    def cut(path: Path) -> list[list[int]]:
        ids = loaded.encode(read_text(path).text)
        return [w for w in cut_windows(ids, window, bos_id=loaded.bos_id) if len(w) == window]

    windows = [ids for path in texts for ids in cut(path)]
    order = np.random.default_rng(seed).permutation(len(windows))
    n_judged = min(64, max(1, len(windows) // 20)) if held_out is None else 0
    judged = [windows[i] for i in order[:n_judged]] if held_out is None else cut(held_out)
    trained = [windows[i] for i in order[n_judged:]]
    if not trained or not judged:
        raise ConfigError(
            f"the texts have {len(windows)} windows of {window} positions to train on and {len(judged)} to judge by: "
            "give more text, or a smaller window"
        )
    return torch.tensor(trained), torch.tensor(judged)


def _digest(ids: Tensor) -> str:
    """Of windows."""
    return hashlib.sha256(ids.to(torch.int64).contiguous().numpy().tobytes()).hexdigest()[:16]


@contextmanager
def _memory_advice(config: DistillConfig) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and not any(sign in str(error) for sign in _NO_MEMORY):
            raise
        micro = config.micro_batch or -(-config.batch // PartialState().num_processes)
        ways = [f"a micro-batch below {micro}"] if micro > 1 else []
        ways += [] if config.recompute or config.method.capacity is not None else ["recompute"]
        ways += [] if config.dtype == "bf16" else ["dtype bf16"]
        ways += ["a shorter window", *(["target layers"] if config.target == "logits" else [])]
        raise ConfigError(f"training does not fit into the device's memory: use {', '.join(ways)}") from error


class _Run:
    """One training run: model, optimiser, and what is kept of them."""

    def __init__(
        self,
        loaded: LoadedModel,
        sparse: Sparsified,
        adapter: Adapter,
        config: DistillConfig,
        inputs: dict[str, str],
        out: Path | None,
    ) -> None:
        self.loaded, self.sparse, self.adapter, self.config, self.out = loaded, sparse, adapter, config, out
        self.inputs = inputs  # digests of what a run that goes on must be given again
        self.device = loaded.model.device
        self.processes = PartialState(cpu=self.device.type == "cpu")
        self.body, self.head = split_head(loaded.model)
        self.parameters = adapter.parameters()
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        self.optimiser = torch.optim.AdamW(self.parameters, lr=config.lr, betas=(0.9, 0.99), weight_decay=0.0)
        self.result = Distilled(adapter, is_main=bool(self.processes.is_main_process))
        self.best_state = adapter.state()
        for rule in sparse.rules:
            rule.straight_through = config.straight_through
        if config.moves_density:
            sparse.set_density(config.density(0))  # first: a rule that cannot says so now

    # -- the loop

    def train(self, windows: Tensor, held_out: Tensor, resume: bool, progress: Progress | None) -> Distilled:
        config, result = self.config, self.result
        if self.out is not None and self.result.is_main:
            self.out.mkdir(parents=True, exist_ok=True)
        if resume:
            self._load()
        elif self.out is not None and (self.out / _CHECKPOINT).exists():
            raise ConfigError(
                f"{self.out} holds a run already, at {_CHECKPOINT}: resume it, remove it, or name another folder"
            )
        with self._training_mode():
            if not result.held_out:
                self._judge(held_out)
            while len(result.steps) < config.steps and not self._is_over():
                self._step(windows)
                done = len(result.steps)
                if done % config.eval_every == 0 or done == config.steps:
                    self._judge(held_out)
                if self.out is not None and (done % config.save_every == 0 or done == config.steps):
                    self._check(held_out)
                    self._save()
                if progress is not None and self.result.is_main:
                    progress(done, config.steps, result.steps[-1]["loss"])
        self.adapter.take_state([matrix.half().float() for matrix in self.best_state])  # as files and `n_bytes` have it
        if self.out is not None:
            self._finish()
        return result

    def _is_over(self) -> bool:
        """Whether as many judgements as `patience` have passed since the best one."""
        losses = [judged["loss"] for judged in self.result.held_out]
        return len(losses) - 1 - int(np.argmin(losses)) >= self.config.patience

    @contextmanager
    def _training_mode(self) -> Iterator[None]:
        model = self.loaded.model
        precision = torch.get_float32_matmul_precision()
        if self.config.dtype == "bf16":
            torch.set_float32_matmul_precision("high")  # of the head, whose products stay fp32
        if self.config.recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            self.body.train()  # transformers recomputes in training mode alone
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(precision)
            if self.config.recompute:
                model.gradient_checkpointing_disable()
                self.body.eval()

    def _step(self, windows: Tensor) -> None:
        config, step, start = self.config, len(self.result.steps), time.perf_counter()
        density = config.density(step)
        if config.moves_density:
            self.sparse.set_density(density)
        lr = config.learning_rate(step)
        for group in self.optimiser.param_groups:
            group["lr"] = lr
        self.optimiser.zero_grad(set_to_none=True)
        batch = windows[config.windows_of(step, len(windows))]
        share = batch[self.processes.process_index :: self.processes.num_processes]
        loss = torch.zeros((), device=self.device)
        for ids in share.split(config.micro_batch or max(1, len(share))):
            loss += self._backward(ids.to(self.device), 1 / len(batch))
        self._sum_gradients(loss)
        norm = nn.utils.clip_grad_norm_(self.parameters, config.clip)
        value, length = float(loss), float(norm)
        if not (math.isfinite(value) and math.isfinite(length)):
            what = f"loss of step {step + 1} is {value:g}"
            self._blame(what if not math.isfinite(value) else f"gradient of step {step + 1} is {length:g}", batch)
        self.optimiser.step()
        self.result.seconds += time.perf_counter() - start
        self.result.steps.append({"step": step + 1, "loss": value, "lr": lr, "density": density, "norm": length})

    def _sum_gradients(self, loss: Tensor) -> None:
        """Over all processes, in one message; a share of a batch may be empty."""
        if self.processes.num_processes == 1:
            return
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        flat = reduce(torch.cat([loss[None], *(g.flatten() for g in grads)]), "sum")
        loss.copy_(flat[0])
        for parameter, part in zip(self.parameters, flat[1:].split([p.numel() for p in self.parameters]), strict=True):
            parameter.grad = part.view_as(parameter).clone()

    # -- losses

    def _backward(self, ids: Tensor, weight: float) -> Tensor:
        """Adds the gradient of these windows' mean loss times their number and `weight`; gives that loss."""
        if self.config.target == "layers":
            return self._backward_by_layers(ids, weight * len(ids))
        loss = self._loss(ids) * (weight * len(ids))
        loss.backward()
        return loss.detach()

    def _hidden(self, ids: Tensor) -> Tensor:
        """[B, T] -> [B * T, D] fp32."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.dtype == "bf16"):
            states: Tensor = self.body(input_ids=ids, use_cache=False).last_hidden_state
        return states.flatten(0, 1).float()

    def _loss(self, ids: Tensor) -> Tensor:
        """Of the student on ids [B, T], mean over positions."""
        config = self.config
        if config.target == "text":
            self.sparse.reset()
            return self._cross_entropy(self._hidden(ids).view(*ids.shape, -1)[:, :-1].flatten(0, 1), ids[:, 1:])
        with torch.no_grad(), self.sparse.paused():
            teacher = self._hidden(ids)
        self.sparse.reset()
        student = self._hidden(ids)
        loss = self._divergence(student, teacher)
        if config.hidden_weight:
            loss = loss + config.hidden_weight * (student - teacher).square().mean() / teacher.square().mean()
        return loss

    def _divergence(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Mean KL(teacher || student) of rows [N, D], nats, times temperature squared."""
        temperature = self.config.temperature
        summed = divergence(self.head, self._as_model(student), self._as_model(teacher), temperature=temperature)
        return summed * (temperature**2 / len(student))

    def _cross_entropy(self, student: Tensor, targets: Tensor) -> Tensor:
        """Mean over rows [N, D] and targets [...] of N in all, nats."""
        return cross_entropy(self.head, self._as_model(student), targets.flatten()) / len(student)

    def _as_model(self, rows: Tensor) -> Tensor:
        """In the type of the model's weights."""
        return rows.to(next(self.loaded.model.parameters()).dtype)

    def _backward_by_layers(self, ids: Tensor, weight: float) -> Tensor:
        """Every layer's own loss, whose graph is gone before the next layer."""
        losses = []
        n_layers = len(self.sparse.rules)

        def compare(y: Tensor, dense: Tensor) -> None:
            loss = (y - dense).float().square().mean() / dense.float().square().mean()
            (loss * (weight / n_layers)).backward()
            losses.append(loss.detach())

        self.sparse.reset()
        with torch.no_grad(), self.sparse.beside_dense(compare):
            self._hidden(ids)
        return torch.stack(losses).mean() * weight

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def _judge(self, held_out: Tensor) -> None:
        """Loss on held-out text at the method's density; keeps the state if it is the best."""
        config, result = self.config, self.result
        self._set_judged_density()
        size = config.micro_batch or max(1, config.batch // self.processes.num_processes)
        total = sum(float(self._held_out_loss(ids.to(self.device))) * len(ids) for ids in held_out.split(size))
        loss = total / len(held_out)
        if self.processes.num_processes > 1:  # all must decide alike
            loss = float(reduce(torch.tensor(loss, device=self.device), "mean"))
        if not math.isfinite(loss):
            self._blame(f"loss on held-out text after step {len(result.steps)} is {loss:g}", held_out)
        if all(loss < judged["loss"] for judged in result.held_out):
            self.best_state = self.adapter.state()
        result.held_out.append({"step": len(result.steps), "loss": loss})

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def _check(self, held_out: Tensor) -> None:
        """Raises where the state that the last step left, which no loss has judged yet, gives none that is finite."""
        done = len(self.result.steps)
        if self.result.held_out[-1]["step"] == done:
            return
        self._set_judged_density()
        loss = float(self._held_out_loss(held_out[:1].to(self.device)))
        if not math.isfinite(loss):
            self._blame(f"loss on held-out text after step {done} is {loss:g}", held_out[:1])

    def _set_judged_density(self) -> None:
        if self.config.moves_density:
            self.sparse.set_density(self.config.method.density)

    def _held_out_loss(self, ids: Tensor) -> Tensor:
        if self.config.target != "layers":
            return self._loss(ids)
        losses: list[Tensor] = []
        self.sparse.reset()
        with self.sparse.beside_dense(
            lambda y, dense: losses.append((y - dense).detach().float().square().mean() / dense.float().square().mean())
        ):
            self._hidden(ids)
        return torch.stack(losses).mean()

    def _blame(self, what: str, windows: Tensor) -> None:
        """Raises, with the first module that breaks on any of the windows."""
        found = None
        for ids in windows.split(1):
            self.sparse.reset()
            with torch.no_grad():
                found = found or broken_module(self.loaded.model, partial(self._hidden, ids.to(self.device)))
        where = f"{found} is the first module whose output is not finite" if found else "all outputs are finite"
        kept = "there is no checkpoint"
        if self.out is not None and (self.out / _CHECKPOINT).exists():
            kept = f"{self.out / _CHECKPOINT} holds the last good one"
        raise DipperError(
            f"The {what}: {where}; {kept}. Lower the learning rate ({self.config.lr:g}) or use dtype fp32."
        )

    # -- files

    def _identity(self) -> dict[str, Any]:
        config = json.loads(json.dumps(asdict(self.config)))
        return {"config": config, "model": model_fields(self.loaded), "inputs": self.inputs}

    def _save(self) -> None:
        """A checkpoint that is whole or absent, and the curve beside it."""
        if not self.result.is_main:
            return
        assert self.out is not None
        content = {
            "identity": json.dumps(self._identity()),
            "adapter": self.adapter.state(),
            "best": self.best_state,
            "optimiser": self.optimiser.state_dict(),
            "result": json.dumps(self.result.as_dict()),
        }
        with whole_file(self.out / _CHECKPOINT) as file:
            torch.save(content, file)
        write_json(self.out / _CURVE, self.result.as_dict())

    def _load(self) -> None:
        path = (self.out or Path()) / _CHECKPOINT
        if self.out is None or not path.is_file():
            raise ConfigError(f"{path} is not there, so there is nothing to resume: start without resuming")
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
            theirs, own = json.loads(content["identity"]), self._identity()
        except (OSError, RuntimeError, EOFError, KeyError, UnpicklingError) as error:
            raise ConfigError(f"{path} is damaged: remove it and start anew, or copy it again") from error
        for part in ("model", "config", "inputs"):
            held = theirs.get(part, {})
            for name in {**held, **own[part]}:
                was, now = held.get(name), own[part].get(name)
                if was != now:
                    raise ConfigError(
                        f"{path} is of another run: its {name} is {was!r}, not {now!r}; give the same texts and "
                        "options, or another folder"
                    )
        self.adapter.take_state(content["adapter"])
        self.best_state = content["best"]
        self.optimiser.load_state_dict(content["optimiser"])
        for name, value in json.loads(content["result"]).items():
            setattr(self.result, name, value)

    def _finish(self) -> None:
        """The best adapter, the curve and its figure."""
        if not self.result.is_main:
            return
        assert self.out is not None
        write_json(self.out / _CURVE, self.result.as_dict())
        told = {"config": self._identity()["config"], "best": self.result.best, "seconds": self.result.seconds}
        self.adapter.save(self.out / _ADAPTER, self.loaded, told)


def draw_curves(curves: dict[str, dict[str, Any]], path: str | os.PathLike[str]) -> None:
    """Losses over steps, training and held-out; curves: what `Distilled.as_dict` gave, by name."""
    with panels(path, 2) as (left, right):
        for name, curve in curves.items():
            left.plot([s["step"] for s in curve["steps"]], [s["loss"] for s in curve["steps"]], lw=0.8, label=name)
            right.plot([j["step"] for j in curve["held_out"]], [j["loss"] for j in curve["held_out"]], "o-", ms=3)
        for axes, title in ((left, "training"), (right, "held-out text")):
            axes.set(title=title, xlabel="step", ylabel="loss (nats a token)", yscale="log")
        left.legend(fontsize="small")
