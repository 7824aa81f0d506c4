"""The loss (chapter 08): how surprised the model is by what comes next, in nats per token."""

import math

import torch.nn.functional as F
from torch import Tensor

IGNORE = -100  # a target that is not scored: padding, or a prompt


def cross_entropy(logits: Tensor, targets: Tensor, ignore_index: int = IGNORE) -> Tensor:
    """Mean of -log p(target) over the scored targets, in nats: logits (..., vocab_size), targets (...) int64 → ().

    In fp32 whatever the model's dtype. Raises ValueError when no target is scored: the mean would be 0/0.
    """
    if not (targets != ignore_index).any():
        raise ValueError(
            f"no target is scored: all {targets.numel()} are {ignore_index}, expected at least one real token: "
            "leave such rows out."
        )
    return F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten(), ignore_index=ignore_index)


def perplexity(loss: float) -> float:
    """e^loss (nats per token): among how many equally likely tokens a model of this loss would be choosing."""
    return math.exp(loss)
