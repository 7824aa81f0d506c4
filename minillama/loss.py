"""The loss (chapter 08): how surprised the model is by what comes next, in nats per token."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minillama.linear import linear

IGNORE = -100  # a target that is not scored: padding, or a prompt
ROWS = 512  # vectors whose logits `head_cross_entropy` holds at once


def cross_entropy(logits: Tensor, targets: Tensor, ignore_index: int = IGNORE) -> Tensor:
    """Mean of -log p(target) over the scored targets, in nats: logits (..., vocab_size), targets (...) int64 → ().

    In fp32 whatever the model's dtype. Raises ValueError when no target is scored: the mean would be 0/0.
    """
    _count(targets, ignore_index)
    return F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten(), ignore_index=ignore_index)


def head_cross_entropy(x: Tensor, head: Tensor, targets: Tensor, ignore_index: int = IGNORE) -> Tensor:
    """`cross_entropy(x headᵀ, targets)` without all logits at once: x (..., dim), head (vocab_size, dim) → ().

    In a large vocabulary logits are the largest tensor of a step by far: 16 texts of 2,048 tokens have 6.4 GB of them
    among 49,152 tokens, and their gradient is as large again. Raises ValueError when no target is scored.
    """
    count = _count(targets, ignore_index)
    if not torch.is_grad_enabled():
        x, head = x.detach(), head.detach()
    return _HeadCrossEntropy.apply(x.flatten(0, -2), head, targets.flatten(), ignore_index) / count


class _HeadCrossEntropy(torch.autograd.Function):
    """The sum. Gradients are found on the way forward, a few rows after the other, while the rows' logits are there."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, head: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
        wanted = ctx.needs_input_grad[:2]
        x, head = (tensor.detach().requires_grad_(want) for tensor, want in zip((x, head), wanted, strict=True))
        total = torch.zeros((), device=x.device)
        with torch.enable_grad():
            for some, goals in zip(x.split(ROWS), targets.split(ROWS), strict=True):
                logits = linear(some, head).float()
                loss = F.cross_entropy(logits, goals, ignore_index=ignore_index, reduction="sum")
                if any(wanted):
                    loss.backward()  # adds to the gradients of the rows before
                total += loss.detach()
        ctx.save_for_backward(x.grad, head.grad)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *(None if found is None else grad * found for found in ctx.saved_tensors), None, None


def _count(targets: Tensor, ignore_index: int) -> int:
    if not (count := int((targets != ignore_index).sum())):
        raise ValueError(
            f"no target is scored: all {targets.numel()} are {ignore_index}, expected at least one real token: "
            "leave such rows out."
        )
    return count


def perplexity(loss: float) -> float:
    """e^loss (nats per token): among how many equally likely tokens a model of this loss would be choosing."""
    return math.exp(loss)
