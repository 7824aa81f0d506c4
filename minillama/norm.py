"""Normalization (chapter 06): keep a token's direction, fix its size.

LLaMA uses RMSNorm. L2 normalization and LayerNorm stand beside it for comparison; the model uses neither.
"""

import math

import torch
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Divide each vector by its root mean square, then scale every coordinate by a learned weight.

    `y = x / sqrt(mean(x²) + eps) · weight`, from (..., dim) to (..., dim).
    Source: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization", equation 4.
    """

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        alone = x.numel() == x.shape[-1] and x.device.type == "cpu"
        if alone and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return rms_norm_of_one(x, self.weight, self.eps)
        # The mean of squares is taken in fp32: in bf16 a sum of thousands of squares loses its small terms.
        # LLaMA rounds to the working dtype before it multiplies by the weight; the other order gives other last bits.
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype) * self.weight


def rms_norm_of_one(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of a single vector on the CPU: a text is written token by token, and for so few numbers a call costs more
    than its arithmetic. Four calls instead of nine."""
    length = torch.linalg.vector_norm(x, dtype=torch.float32).item()
    return x.mul(1 / math.sqrt(length * length / x.shape[-1] + eps)) * weight


def l2_norm(x: Tensor, eps: float = 1e-12) -> Tensor:
    """Scale each vector (..., dim) to length 1. RMSNorm without its weight is this times sqrt(dim)."""
    return x / x.norm(dim=-1, keepdim=True).clamp_min(eps)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """Take away the mean, divide by the standard deviation, scale and shift: (..., dim) to (..., dim).

    Source: Ba, Kiros and Hinton 2016, "Layer Normalization". The variance is the biased one (divided by dim).
    """
    centred = x - x.mean(-1, keepdim=True)
    return centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps) * weight + bias
