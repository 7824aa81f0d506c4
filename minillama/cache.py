"""The KV cache (chapter 10): what attention has computed for earlier tokens, kept so that it is computed once.

Letters: B batch, K key/value heads, S tokens seen so far, D head_dim.
"""

import torch
from torch import Tensor

from minillama.attention import causal_mask
from minillama.config import ModelConfig


class LayerKV:
    """The keys and values of one layer: two tensors (B, K, max_len, D), the first `length` columns of them filled."""

    def __init__(self, shape: tuple[int, int, int, int], device: torch.device | str | None, dtype: torch.dtype | None):
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.length = 0

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Put (B, K, T, D) behind what is there; return all of it, (B, K, S, D), as views of the storage."""
        new, start = k.shape[2], self.length
        self.k.narrow(2, start, new).copy_(k)
        self.v.narrow(2, start, new).copy_(v)
        self.length = start + new
        return self.k.narrow(2, 0, self.length), self.v.narrow(2, 0, self.length)


class KVCache:
    """Keys and values of all layers, and with them the position of the next token and what it may look at.

    `padding` (B,) int64 says how many pad tokens stand before each row's first real one: rows of different lengths are
    aligned at their ends. Its memory is `config.kv_cache_bytes(batch, max_len, dtype)`, taken at once.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        max_len: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        padding: Tensor | None = None,
    ):
        shape = (batch, config.n_kv_heads, max_len, config.head_dim)
        self.layers = [LayerKV(shape, device, dtype) for _ in range(config.n_layers)]
        self.max_len = max_len
        self.length = 0
        self.device = self.layers[0].k.device
        self.padding = None if padding is None or not padding.any() else padding.to(self.device)

    def advance(self, new: int) -> tuple[Tensor, Tensor | None]:
        """Make room for `new` tokens: their positions, (T,) or (B, T), and mask, (B, 1, T, S) or None for causal.

        Raises ValueError when the cache is too short for them.
        """
        if self.length + new > self.max_len:
            raise ValueError(
                f"the cache holds {self.max_len} tokens, but {self.length} + {new} are needed: "
                "make it with a larger max_len."
            )
        start, self.length = self.length, self.length + new
        columns = torch.arange(self.length, device=self.device)
        if self.padding is None:
            return columns[start:], None
        positions = (columns[start:] - self.padding[:, None]).clamp_min(0)
        real = columns >= self.padding[:, None]  # (B, S)
        # A pad may look at itself: a row with nothing to look at would be a softmax over nothing, which is NaN.
        own = columns == columns[start:, None]  # (T, S)
        mask = (causal_mask(new, self.length, self.device) & real[:, None, :]) | own
        return positions, mask[:, None]

    def reorder(self, rows: Tensor) -> None:
        """Keep the rows (B',) given by index, in that order: beams that live on, some of them twice."""
        for layer in self.layers:
            layer.k, layer.v = layer.k[rows], layer.v[rows]
        if self.padding is not None:
            self.padding = self.padding[rows]

    def rewind(self, length: int) -> None:
        """Forget every token from `length` on. Raises ValueError for a length that was not reached."""
        if not 0 <= length <= self.length:
            raise ValueError(
                f"the cache holds {self.length} tokens and cannot be rewound to {length}: give 0 to {self.length}."
            )
        self.length = length
        for layer in self.layers:
            layer.length = length
