"""The KV cache (chapter 10): what attention has computed for earlier tokens, kept so that it is computed once.

Letters: B batch, K key/value heads, S tokens seen so far, D head_dim.
"""

from typing import Any

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


class StaticKV:
    """The keys and values of one layer, as whole tensors (B, K, max_len, D) whatever is in them."""

    def __init__(self, k: Tensor, v: Tensor, length: Tensor):
        self.k, self.v, self.length = k, v, length

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Put (B, K, T, D) in the last T of `length` columns, which has been advanced already; return all max_len."""
        places = self.length - k.shape[2] + torch.arange(k.shape[2], device=k.device)
        self.k.index_copy_(2, places, k)
        self.v.index_copy_(2, places, v)
        return self.k, self.v


class StaticCache(KVCache):
    """A cache whose shapes are the same in every step, for a compiled model: its length is a tensor, a mask hides what
    is not filled yet. A GPU can then repeat one recorded step without asking Python. It reads max_len columns always.
    """

    def __init__(self, config: ModelConfig, batch: int, max_len: int, **settings: Any):
        super().__init__(config, batch, max_len, **settings)
        self.filled = torch.zeros((), dtype=torch.int64, device=self.device)
        self.layers = [StaticKV(layer.k, layer.v, self.filled) for layer in self.layers]  # type: ignore[misc]
        for layer in self.layers:  # they stay where they are: a recorded step need not copy them
            for tensor in (layer.k, layer.v):
                torch._dynamo.mark_static_address(tensor)
        torch._dynamo.mark_static_address(self.filled)

    def advance(self, new: int) -> tuple[Tensor, Tensor | None]:
        """Positions and mask, (B, 1, T, max_len). Nobody counts here: what does not fit is an error of the device."""
        columns = torch.arange(self.max_len, device=self.device)
        places = self.filled + torch.arange(new, device=self.device)
        self.filled.add_(new)
        mask = (columns <= places[:, None])[None]  # (1, T, S)
        if self.padding is None:
            return places, mask[:, None]
        own = columns == places[:, None]
        mask = mask & (columns >= self.padding[:, None])[:, None] | own
        return (places - self.padding[:, None]).clamp_min(0), mask[:, None]

    def rewind(self, length: int) -> None:
        """Forget every token from `length` on."""
        self.filled.fill_(length)
