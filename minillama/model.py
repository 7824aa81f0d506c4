"""LLaMA (chapter 07): embed the tokens, pass them through the blocks, norm, score every token of the vocabulary.

One class from a toy to a full checkpoint; only the config changes.
Source: Touvron et al. 2023, "LLaMA: Open and Efficient Foundation Language Models", section 2.2.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minillama.attention import Attention, LayerCache, packed_mask
from minillama.config import ModelConfig
from minillama.embedding import Embedding
from minillama.feedforward import FeedForward
from minillama.linear import Linear
from minillama.norm import RMSNorm
from minillama.rope import frequencies, rotation

if TYPE_CHECKING:  # the model takes a cache, and knows nothing of its making
    from minillama.cache import KVCache


class Block(nn.Module):
    """One layer: two lines, each of which adds something to the residual stream (B, T, dim)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config)
        self.feedforward_norm = RMSNorm(config.dim, config.norm_eps)
        self.feedforward = FeedForward(config)

    def forward(
        self, x: Tensor, turn: tuple[Tensor, Tensor], mask: Tensor | None, cache: LayerCache | None = None
    ) -> Tensor:
        x = x + self.attention(self.attention_norm(x), turn, mask, cache)
        x = x + self.feedforward(self.feedforward_norm(x))
        return x


class Llama(nn.Module):
    """A language model: `model(tokens)` scores, after every token, what the next one could be.

    tokens (B, T) int64 → logits (B, T, vocab_size). With a `cache`, the tokens are the ones that follow those already
    in it. With `segments` (B, T), a row holds several texts, none of which sees another: the number of its text for
    each token. `config` says everything about its shape.

    With `checkpointing`, training keeps the input of each block only, and computes what is inside again on the way
    back: far less memory, for a third more work.
    Source: Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost".
    """

    frequency: Tensor  # (head_dim/2,) radians from one position to the next, always fp32

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config, self.checkpointing = config, False
        self.embedding = Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = None if config.tie_embeddings else Linear(config.dim, config.vocab_size)
        self.register_buffer("frequency", frequencies(config), persistent=False)
        self.initialize()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Llama":
        # Behind `.to`, `.half` and `.to_empty`. The frequencies are made anew rather than cast: in bf16 they would be
        # off by up to 1 part in 512, which at position 1000 turns some pairs by more than a radian too far.
        super()._apply(fn, recurse)
        self.frequency = frequencies(self.config).to(self.frequency.device)
        return self

    def forward(self, tokens: Tensor, cache: "KVCache | None" = None, segments: Tensor | None = None) -> Tensor:
        return self.scores(self.hidden(tokens, cache, segments))

    def hidden(self, tokens: Tensor, cache: "KVCache | None" = None, segments: Tensor | None = None) -> Tensor:
        """tokens (B, T) → the last block's output after the final norm (B, T, dim)."""
        if tokens.dim() != 2:
            raise ValueError(f"tokens have the shape {tuple(tokens.shape)}, expected (batch, time): add a batch axis.")
        mask: Tensor | None = None
        if cache is not None:
            positions, mask = cache.advance(tokens.shape[1])
        elif segments is not None:
            positions, mask = packed_mask(segments)
        else:
            positions = torch.arange(tokens.shape[1], device=tokens.device)
        turn = rotation(self.frequency, positions)
        x = self.embedding(tokens)
        for i, block in enumerate(self.blocks):
            if self.checkpointing and cache is None and torch.is_grad_enabled():
                x = checkpoint(block, x, turn, mask, use_reentrant=False)
            else:
                x = block(x, turn, mask, None if cache is None else cache.layers[i])
        return self.norm(x)

    def scores(self, x: Tensor) -> Tensor:
        """Normed vectors (..., dim) → logits (..., vocab_size)."""
        return self.embedding.scores(x) if self.output is None else self.output(x)

    @torch.no_grad()
    def initialize(self) -> None:
        """Small random weights; what writes into the residual stream starts at zero: each block starts as the identity.

        A block that begins by adding nothing lets the gradient through unharmed at any depth, and the toy's loss falls
        faster for it. Source: Zhang et al. 2019, "Fixup Initialization", section 3.
        """
        for name, parameter in self.named_parameters():
            begin(name, parameter)


def begin(name: str, weight: Tensor) -> None:
    """Give a weight the values that it has in a new model, in place."""
    if name.endswith(("wo.weight", "down.weight")):
        weight.zero_()
    elif weight.dim() == 2:
        weight.normal_(std=0.02)
    else:
        weight.fill_(1)
