"""Attention (chapter 04): every token asks a question, and takes from those before it in the measure that they answer.

Letters: B batch, T new tokens, S all tokens seen so far (S ≥ T), H query heads, K key/value heads, D head_dim.
"""

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillama.config import ModelConfig
from minillama.linear import Linear
from minillama.rope import rotate

BLOCK = 64  # queries whose scores are held at once


class LayerCache(Protocol):
    """What attention needs of a cache: put this step's keys and values away, get all of them back."""

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]: ...


def causal_mask(new: int, total: int, device: torch.device | None = None) -> Tensor:
    """(new, total) booleans, True where a token may look: at itself and at all before it.

    The new tokens are the last ones, so row t sees `total - new + t + 1` columns.
    """
    return torch.ones(new, total, dtype=torch.bool, device=device).tril(total - new)


def packed_mask(segments: Tensor) -> tuple[Tensor, Tensor]:
    """For rows that hold several texts one after the other: positions (B, T), which begin anew with each text, and a
    mask (B, 1, T, T) under which a token sees those before it in its own text only.

    `segments` (B, T) integers: the number of the text that a token belongs to; where it changes, another begins.
    """
    columns = torch.arange(segments.shape[1], device=segments.device)
    begins = segments.diff(dim=1, prepend=segments[:, :1]) != 0
    starts = torch.where(begins, columns, 0).cummax(1).values
    same = segments[:, :, None] == segments[:, None, :]
    return columns - starts, (same & causal_mask(len(columns), len(columns), segments.device))[:, None]


class Attention(nn.Module):
    """Grouped-query attention with rotary positions, from (B, T, dim) to (B, T, dim).

    `softmax(q kᵀ / sqrt(D) + mask) v` for every head; H/K query heads share one key/value head.
    Sources: Vaswani et al. 2017, equation 1; Ainslie et al. 2023, "GQA".

    Two paths give the same result: the readable one passes the probabilities (B, H, T, S) through `self.tap`, where a
    hook can look at them or change them; the fast one never makes them. `self.fast` chooses.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = config.n_heads, config.n_kv_heads, config.head_dim
        self.wq = Linear(config.dim, config.n_heads * config.head_dim)
        self.wk = Linear(config.dim, config.n_kv_heads * config.head_dim)
        self.wv = Linear(config.dim, config.n_kv_heads * config.head_dim)
        self.wo = Linear(config.n_heads * config.head_dim, config.dim)
        self.tap = nn.Identity()
        self.fast = True

    def forward(
        self,
        x: Tensor,
        turn: tuple[Tensor, Tensor],
        mask: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """`turn`: cosines and sines from `rope.rotation`. `mask`: (B, 1, T, S) booleans, or None for plain causal;
        True at least once in every row, since a softmax over nothing is NaN."""
        q, k, v = (y.transpose(1, 2) for y in self.project(x, turn))  # (B, H, T, D), two of (B, K, T, D)
        if cache is not None:
            k, v = cache.append(k, v)  # (B, K, S, D)
        # To train in bf16 on a CPU: PyTorch's fused kernels take twice as long there, even in fp32.
        to_learn = torch.is_grad_enabled() and q.dtype == torch.bfloat16 and q.device.type == "cpu"
        if not self.fast:
            y = self.attend(q, k, v, mask)
        elif to_learn and q.shape[2] == k.shape[2]:
            groups = self.n_heads // self.n_kv_heads
            y = InBlocks.apply(q, k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1), mask)
        else:
            y = self.attend_fast(q, k, v, mask)
        return self.wo(y.transpose(1, 2).flatten(2))

    def project(self, x: Tensor, turn: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Of x (B, T, dim) the queries (B, T, H, D) and keys (B, T, K, D), turned to their positions, and the values
        (B, T, K, D)."""
        q = rotate(self.wq(x).unflatten(-1, (self.n_heads, self.head_dim)), turn)
        k = rotate(self.wk(x).unflatten(-1, (self.n_kv_heads, self.head_dim)), turn)
        return q, k, self.wv(x).unflatten(-1, (self.n_kv_heads, self.head_dim))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """The readable path: q (B, H, T, D), k and v (B, K, S, D), to (B, H, T, D)."""
        groups = self.n_heads // self.n_kv_heads
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)  # (B, H, S, D)
        if mask is None:
            mask = causal_mask(q.shape[2], k.shape[2], q.device)
        scores = q @ k.transpose(-1, -2) * self.head_dim**-0.5  # (B, H, T, S)
        probabilities = scores.float().masked_fill(~mask, -torch.inf).softmax(-1).to(q.dtype)
        return self.tap(probabilities) @ v

    def attend_fast(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """The same through PyTorch's fused kernels, which never hold the T×S matrix as a whole."""
        new, total = q.shape[2], k.shape[2]
        groups = self.n_heads // self.n_kv_heads
        if new == 1:
            # One new token sees everything, so the query heads of a group can stand in the time axis: its keys and
            # values are read once for the whole group, not copied for each head.
            folded = F.scaled_dot_product_attention(q.view(-1, self.n_kv_heads, groups, self.head_dim), k, v, mask)
            return folded.reshape(q.shape)
        if groups > 1:
            k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        if mask is None and new < total:
            mask = causal_mask(new, total, q.device)
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None)


class InBlocks(torch.autograd.Function):
    """Attention of q, k and v (B, H, T, D) in blocks of queries, each of which meets only a span of keys: from the
    first that one of its queries may see to the last.

    Half of all pairs are left out, what remains are products of matrices, and only one block's probabilities are held
    at a time: the backward pass makes them again. Source: Dao et al. 2022, "FlashAttention", section 3.1.
    """

    # B and H are one axis in here: PyTorch would copy each slice of four axes before it multiplies.

    @staticmethod
    def spans(T: int, mask: Tensor | None) -> list[tuple[slice, slice]]:
        """For each block its queries, and the keys that it meets."""
        blocks = [slice(start, min(start + BLOCK, T)) for start in range(0, T, BLOCK)]
        if mask is None:
            return [(queries, slice(queries.stop)) for queries in blocks]
        seen = mask.flatten(0, 1).any(0)  # in any text of the batch: (T, T)
        columns = [seen[queries].any(0).nonzero() for queries in blocks]
        return [(queries, slice(int(c[0]), int(c[-1]) + 1)) for queries, c in zip(blocks, columns, strict=True)]

    @staticmethod
    def hidden(mask: Tensor | None, dtype: torch.dtype) -> Tensor:
        """What is added to scores, 0 where a token may look and -inf where not: (B, 1, T, T), or for plain causal
        (BLOCK, BLOCK), since only the last keys of a block are hidden from some of its queries."""
        return (causal_mask(BLOCK, BLOCK) if mask is None else mask).to(dtype).log()

    @staticmethod
    def probabilities(q: Tensor, k: Tensor, hidden: Tensor, queries: slice, keys: slice) -> Tensor:
        """Of one block: (B·H, queries, keys)."""
        scores = q[:, queries] @ k[:, keys].transpose(-1, -2)
        if hidden.dim() == 4:
            scores.unflatten(0, (len(hidden), -1)).add_(hidden[:, :, queries, keys])
        else:
            size = queries.stop - queries.start
            scores[..., -size:] += hidden[:size, :size]
        return scores.softmax(-1)

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        shape, y = q.shape, torch.empty_like(q)  # laid out as q is: what comes next then reads it as it lies
        q, k, v = (q * shape[-1] ** -0.5).flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
        hidden = InBlocks.hidden(mask, q.dtype)
        ctx.spans = InBlocks.spans(shape[2], mask)
        for queries, keys in ctx.spans:
            p = InBlocks.probabilities(q, k, hidden, queries, keys)
            y[:, :, queries] = (p @ v[:, keys]).unflatten(0, shape[:2])
        ctx.save_for_backward(q, k, v, mask, y)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, mask, y = ctx.saved_tensors
        hidden = InBlocks.hidden(mask, q.dtype)
        mean = (dy * y).sum(-1, keepdim=True).flatten(0, 1)  # Σ p dp of a query
        shape, dy = dy.shape, dy.flatten(0, 1)
        dq = torch.empty_like(q)
        dk, dv = torch.zeros_like(k, dtype=torch.float32), torch.zeros_like(v, dtype=torch.float32)
        for queries, keys in ctx.spans:
            p = InBlocks.probabilities(q, k, hidden, queries, keys)
            dp = dy[:, queries] @ v[:, keys].transpose(-1, -2)
            ds = dp.sub_(mean[:, queries]).mul_(p)
            dq[:, queries] = ds @ k[:, keys]
            dk[:, keys] += ds.transpose(-1, -2) @ q[:, queries]
            dv[:, keys] += p.transpose(-1, -2) @ dy[:, queries]
        dq, dk, dv = dq * shape[-1] ** -0.5, dk.to(k.dtype), dv.to(v.dtype)
        return dq.view(shape), dk.view(shape), dv.view(shape), None
