"""Losses over the vocabulary from hidden states, whose logits [N, V] never exist as a whole.

Logits are made for a few rows at a time, once: the gradient by the rows comes out of the same pass as the loss, so
nothing is kept for a backward pass and nothing is computed again in it. At a vocabulary of 262,144 that is most of what
a training step of a small model does.

    divergence(head, student, teacher).backward()     # the gradient is in student.grad

Needs the `torch` extra.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["cross_entropy", "divergence"]

Head = Callable[[Tensor], Tensor]
# Logits [n, V] fp32 and what they are set against, by row: the loss summed, and its gradient [n, V] by the logits.
_Part = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

_LOGITS_AT_ONCE = 1 << 26  # numbers of a chunk of logits: 256 MiB in fp32


def divergence(head: Head, student: Tensor, teacher: Tensor, *, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student), summed over rows.

    Args:
        head: [n, D] -> [n, V]; its own weights get no gradient.
        student: [N, D], which gets the gradient.
        teacher: [N, D], which gets none.
        temperature: both logits are divided by it.

    Returns:
        A scalar, fp32, in nats.
    """
    return _summed(head, student, teacher, partial(_divergence, head, temperature))


def cross_entropy(head: Head, student: Tensor, targets: Tensor) -> Tensor:
    """-log p(target), summed over rows: student [N, D], targets [N] of ids; as `divergence`."""
    return _summed(head, student, targets, _cross_entropy)


def _divergence(head: Head, temperature: float, logits: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    log_q, log_p = (torch.log_softmax(x / temperature, -1) for x in (logits, head(teacher).float()))
    p = log_p.exp()
    loss = log_p.sub_(log_q).mul_(p).sum()
    return loss, log_q.exp_().sub_(p).div_(temperature)


def _cross_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    log_q = torch.log_softmax(logits, -1)
    at = targets[:, None]
    loss = -log_q.gather(-1, at).sum()
    return loss, log_q.exp_().scatter_add_(-1, at, log_q.new_full(at.shape, -1.0))


def _summed(head: Head, rows: Tensor, others: Tensor, part: _Part) -> Tensor:
    loss: Tensor = _Summed.apply(rows if torch.is_grad_enabled() else rows.detach(), others, head, part)
    return loss


class _Summed(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(ctx: Any, rows: Tensor, others: Tensor, head: Head, part: _Part) -> Tensor:
        loss = torch.zeros((), device=rows.device)
        grads = []
        n = max(16, _LOGITS_AT_ONCE // head(rows[:1]).shape[-1])
        for some, other in zip(rows.split(n), others.split(n), strict=True):
            with torch.enable_grad():  # through the head alone, which may cap what it gives
                leaf = some.detach().requires_grad_(ctx.needs_input_grad[0])
                logits = head(leaf)
            value, grad = part(logits.detach().float(), other)
            loss += value
            if ctx.needs_input_grad[0]:
                grads.append(torch.autograd.grad(logits, leaf, grad.to(logits.dtype))[0])
        if grads:
            ctx.save_for_backward(torch.cat(grads))
        return loss

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (rows,) = ctx.saved_tensors
        return grad.to(rows.dtype) * rows, None, None, None
