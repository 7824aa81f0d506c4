"""The feed-forward layer (chapter 05): what each token does by itself, after attention has let it look around."""

import torch.nn.functional as F
from torch import Tensor, nn

from minillama.config import ModelConfig
from minillama.linear import Linear


class FeedForward(nn.Module):
    """SwiGLU: one projection opens a gate, a second one makes values, a third brings the product back.

    `y = down(silu(gate(x)) · up(x))`, from (..., dim) to (..., dim) through (..., ffn_dim).
    Source: Shazeer 2020, "GLU Variants Improve Transformer", equation 6.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate = Linear(config.dim, config.ffn_dim)
        self.up = Linear(config.dim, config.ffn_dim)
        self.down = Linear(config.ffn_dim, config.dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))
