"""Token embeddings (chapter 02): a table of one learned vector a token, read on the way in and on the way out."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillama.linear import linear


class Embedding(nn.Module):
    """A table (vocab_size, dim). `embedding(tokens)` looks rows up; `embedding.scores(x)` compares with every row."""

    def __init__(self, vocab_size: int, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, dim))

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (B, T) int64 to vectors (B, T, dim): one-hot vectors times the table, without the zeros."""
        return F.embedding(tokens, self.weight)

    def scores(self, x: Tensor) -> Tensor:
        """Vectors (..., dim) to one score for each token (..., vocab_size): the output head of a model that ties it.

        Source: Press and Wolf 2017, "Using the Output Embedding to Improve Language Models".
        """
        return linear(x, self.weight)
