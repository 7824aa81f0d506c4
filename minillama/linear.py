"""Linear layers, x Wᵀ: nearly all of a model's parameters, and nearly all of its time.

On a GPU there is one good way to multiply, and PyTorch takes it. On a CPU its usual ways leave half of the machine
unused, so here is chosen between others that it has. All of them give the same numbers, up to the last bits.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCKS = 8  # of rows, shared among the cores


class Linear(nn.Linear):
    """`nn.Linear` without a bias: x (..., in) to (..., out)."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x (..., in) times the transpose of weight (out, in): (..., out)."""
    if torch.compiler.is_compiling():
        return F.linear(x, weight)
    on_cpu = x.device.type == "cpu" and type(weight) in (Tensor, nn.Parameter)  # and not spread over machines
    if not on_cpu or x.dtype != weight.dtype or x.numel() == 0 or torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight)
    if x.numel() == x.shape[-1] and not torch.is_grad_enabled():
        return _one_vector(x, weight)
    if x.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        return _Product.apply(x, weight)
    return F.linear(x, weight)


def _one_vector(x: Tensor, weight: Tensor) -> Tensor:
    """When a text is written token by token, every weight is read from memory for a single multiplication.

    What counts then is to read with all cores, and to read the weights as they lie.
    """
    if x.dtype == torch.float32 and torch.backends.mkl.is_available() and len(weight) % BLOCKS == 0:
        # A batch of matrices is shared among the cores; so make one, of blocks of rows.
        column = x.reshape(1, -1).T.expand(BLOCKS, -1, 1)
        return torch.bmm(weight.reshape(BLOCKS, -1, weight.shape[1]), column).view(*x.shape[:-1], -1)
    if x.dtype == torch.bfloat16 and torch._C._get_mkldnn_enabled():
        # oneDNN would rearrange the weights first.
        torch._C._set_mkldnn_enabled(False)
        try:
            return F.linear(x, weight)
        finally:
            torch._C._set_mkldnn_enabled(True)
    return F.linear(x, weight)


class _Product(torch.autograd.Function):
    """Many vectors in fp32, through oneDNN.

    PyTorch itself calls MKL for these, which on AMD's processors keeps to older instructions: a prompt or a step
    of training then takes about twice as long.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _onednn(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        for_x = _onednn(grad, weight.t()) if ctx.needs_input_grad[0] else None
        for_weight = _onednn(grad.flatten(0, -2).t(), x.flatten(0, -2).t()) if ctx.needs_input_grad[1] else None
        return for_x, for_weight


def _onednn(x: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
