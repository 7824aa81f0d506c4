"""Matrix products on a CPU: the same numbers, on some processors in less than half the time.

For fp32 matrices PyTorch calls Intel's MKL, which on AMD's processors keeps to older instructions; for convolutions and
for bf16 it calls oneDNN, which uses all that the processor has. Inside `onednn()` linear layers go to oneDNN too.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """x (N, in) times weight (out, in) transposed: (N, out)."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


class _Linear(torch.autograd.Function):
    """F.linear without a bias, and its gradients, which are two more such products."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        for_x = _product(grad, weight.t()) if ctx.needs_input_grad[0] else None
        for_weight = _product(rows.t(), x.flatten(0, -2).t()) if ctx.needs_input_grad[1] else None
        return for_x, for_weight


class onednn(TorchFunctionMode):
    """Within this context, linear layers in fp32 on the CPU are computed by oneDNN, forward and backward."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.linear and _suits(*args):
            return _Linear.apply(*args[:2])
        return function(*args, **(kwargs or {}))


def _suits(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    return (
        bias is None
        and x.dtype == weight.dtype == torch.float32
        and x.device.type == "cpu"
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.is_available()
    )
