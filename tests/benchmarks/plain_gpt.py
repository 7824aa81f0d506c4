"""The peer of the training benchmarks: a GPT from torch.nn's parts as one usually writes it, trained in fp32, eager."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillama.config import ModelConfig
from minillama.data import Batch


class PlainBlock(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.attention_norm, self.feedforward_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.feedforward = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1))  # (B, T, 3, H, D)
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.feedforward(self.feedforward_norm(x))


class PlainGPT(nn.Module):
    """Learned positions, LayerNorm, one matrix for queries, keys and values, GELU: the sizes of `config`, but for the
    feed-forward layer's, which is four times as wide as the residual stream, as it usually is."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.positions = nn.Embedding(config.max_seq_len, config.dim)
        self.blocks = nn.Sequential(*(PlainBlock(config.dim, config.n_heads) for _ in range(config.n_layers)))
        self.norm = nn.LayerNorm(config.dim)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        for name, parameter in self.named_parameters():  # GPT-2's, with smaller steps into the residual stream
            if parameter.dim() == 2:
                into = name.endswith(("out.weight", "feedforward.2.weight"))
                nn.init.normal_(parameter, std=0.02 / (2 * config.n_layers) ** 0.5 if into else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.positions(torch.arange(tokens.shape[1]))
        return self.output(self.norm(self.blocks(x)))


def plain_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, clip: float = 1.0) -> float:
    """One step as most training scripts have it; returns the loss."""
    optimizer.zero_grad()
    loss = F.cross_entropy(model(batch.inputs).flatten(0, 1), batch.targets.flatten())
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    return loss.item()
