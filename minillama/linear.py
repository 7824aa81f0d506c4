"""Linear layers, x Wᵀ: nearly all of a model's parameters, and nearly all of its time.

When a text is written token by token, x is one vector, and each weight is read from memory for a single multiplication.
PyTorch's usual way on a CPU is made for many vectors: in fp32 only one core reads, in bf16 the weights are rearranged
first. Two other ways that PyTorch has give the same product in about half the time.
"""

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
    one_vector = x.numel() == x.shape[-1] and not torch.is_grad_enabled()
    if one_vector and x.device.type == "cpu" and type(weight) in (Tensor, nn.Parameter):  # and not spread over machines
        if x.dtype == torch.float32 and len(weight) % BLOCKS == 0 and torch.backends.mkl.is_available():
            # A batch of matrices is shared among the cores; so make one, of blocks of rows.
            column = x.reshape(1, -1).T.expand(BLOCKS, -1, 1)
            return torch.bmm(weight.unflatten(0, (BLOCKS, -1)), column).view(*x.shape[:-1], -1)
        if x.dtype == torch.bfloat16 and torch._C._get_mkldnn_enabled():
            # oneDNN rearranges the weights. Without it, PyTorch multiplies them as they come.
            torch._C._set_mkldnn_enabled(False)
            try:
                return F.linear(x, weight)
            finally:
                torch._C._set_mkldnn_enabled(True)
    return F.linear(x, weight)
