"""Quantization (chapter 13): weights in 8 or 4 bits, which are read in half or a quarter of the time of bf16.

To write a token, a model reads every weight once, and on most machines the reading is what takes the time. So a weight
is stored as a small whole number, its code, and weights that lie near each other share a scale. The arithmetic stays in
bf16, and so do norms.

- `Int8Linear`: a scale for each row. w ≈ code · scale, code from -127 to 127.
- `Int4Linear`: a scale and a smallest value for each group of a row. w ≈ code · scale + low, code from 0 to 15.

Sources: Dettmers et al. 2022, "LLM.int8()" (a scale for a row); Frantar et al. 2022, "GPTQ" (for a group).
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillama.attention import Attention, LayerCache
from minillama.feedforward import FeedForward
from minillama.model import Block, Llama
from minillama.norm import rms_norm_of_one
from minillama.rope import rotate

GROUP = 32  # weights that share a scale; PyTorch's kernel can do 32, 64, 128 and 256
ROWS = 16  # it takes rows by as many,
PACK = 64  # and packs those in 4 bits by as many
NUMBERS_AT_ONCE = 2**20  # are rounded: beside a large table of floats, no second one is needed


class Int8Linear(nn.Module):
    """A linear layer, x (..., in) to (..., out), of codes (out, in) int8 and scales (out,) bf16.

    With `lookup` it also serves as a table of embeddings, one row for each token.
    """

    codes: Tensor
    scales: Tensor

    def __init__(self, codes: Tensor, scales: Tensor):
        super().__init__()
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)

    @classmethod
    def from_float(cls, weight: Tensor) -> "Int8Linear":
        """The nearest codes for a weight (out, in): the largest of a row becomes ±127."""
        codes = torch.empty_like(weight, dtype=torch.int8)
        scales = torch.empty_like(weight[:, 0], dtype=torch.bfloat16)
        n = max(1, NUMBERS_AT_ONCE // weight.shape[1])
        for rows, code, scale in zip(weight.split(n), codes.split(n), scales.split(n), strict=True):
            scale.copy_((rows.float().abs().amax(1) / 127).clamp_min(1e-30))
            code.copy_((rows / scale.float()[:, None]).round().clamp(-127, 127))
        return cls(codes, scales)

    def dequantize(self) -> Tensor:
        """The weight that it computes with, (out, in) fp32."""
        return self.codes.float() * self.scales.float()[:, None]

    @property
    def has_kernel(self) -> bool:
        """Whether PyTorch has one for it, which reads past the end of shapes that do not fit."""
        out, in_ = self.codes.shape
        return self.codes.device.type == "cpu" and out % ROWS == 0 == in_ % GROUP

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if self.has_kernel:
            y = torch.ops.aten._weight_int8pack_mm(rows, self.codes, self.scales)
        else:
            y = F.linear(rows, self.codes.to(x.dtype)) * self.scales
        return y.view(*x.shape[:-1], -1)

    def kernel(self) -> Callable[[Tensor], Tensor]:
        """The same for x (n, in) in bf16, on a CPU without a module around it."""
        op, codes, scales = torch.ops.aten._weight_int8pack_mm.default, self.codes, self.scales
        return (lambda x: op(x, codes, scales)) if self.has_kernel else self

    def lookup(self, tokens: Tensor) -> Tensor:
        """Tokens (B, T) to their rows (B, T, in) bf16."""
        return self.codes[tokens].bfloat16() * self.scales[tokens][..., None]


class Int4Linear(nn.Module):
    """A linear layer, x (..., in) to (..., out), of codes of 4 bits and a scale and a middle for each group of a row.

    w = (code - 8) · scale + middle. codes: two a byte, in the order that the device's kernel reads them. scales:
    (in/group, out, 2) bf16, scale and middle.
    """

    codes: Tensor
    scales: Tensor

    def __init__(self, codes: Tensor, scales: Tensor):
        """As they are stored; `from_codes` and `from_float` make them."""
        super().__init__()
        self.group, self.made_for = 2 * codes.shape[-1] // scales.shape[0], codes.device.type
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)

    @classmethod
    def from_codes(cls, codes: Tensor, scales: Tensor, lows: Tensor) -> "Int4Linear":
        """codes (out, in) uint8, 0 to 15; scales and lows (out, in/group), with w = code · scale + low."""
        if codes.device.type == "cpu":
            packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
        else:
            packed = codes[:, ::2] | codes[:, 1::2] << 4
        middles = lows.float() + 8 * scales.float()
        pairs = torch.stack([scales.float(), middles], -1).bfloat16()
        return cls(packed, pairs.transpose(0, 1).contiguous())

    @classmethod
    def from_float(cls, weight: Tensor, group: int = GROUP) -> "Int4Linear":
        """The nearest codes for a weight (out, in): in each group the smallest becomes 0 and the largest 15.

        Raises ValueError if it cannot be cut into such groups.
        """
        if weight.shape[0] % ROWS or weight.shape[1] % group:
            raise ValueError(
                f"a weight of shape {tuple(weight.shape)} cannot be cut into groups of {group}, {ROWS} rows at a time: "
                "take int8."
            )
        grouped = weight.float().unflatten(1, (-1, group))
        low, high = grouped.amin(-1), grouped.amax(-1)
        scales = ((high - low) / 15).clamp_min(1e-30)
        codes = ((grouped - low[..., None]) / scales[..., None]).round().clamp(0, 15)
        return cls.from_codes(codes.to(torch.uint8).flatten(1), scales, low)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Int4Linear":
        super()._apply(fn, recurse)
        if (there := self.codes.device.type) != self.made_for:
            raise ValueError(f"4-bit weights lie in the order of {self.made_for!r}, and {there!r} has another: "
                             f"load the checkpoint with device={there!r}.")  # fmt: skip
        return self

    def dequantize(self) -> Tensor:
        """The weight that it computes with, (out, in) bf16."""
        if self.codes.device.type == "cpu":  # ask the kernel, by one-hot vectors
            return self(torch.eye(self.group * len(self.scales), dtype=torch.bfloat16)).T.contiguous()
        codes = torch.stack([self.codes & 15, self.codes >> 4], -1).flatten(1).unflatten(1, (-1, self.group))
        scales, middles = self.scales.transpose(0, 1).unbind(-1)
        return ((codes.bfloat16() - 8) * scales[..., None] + middles[..., None]).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if x.device.type == "cpu":
            y = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self.codes, self.group, self.scales)
        else:
            y = F.linear(rows, self.dequantize())
        return y.view(*x.shape[:-1], -1)

    def kernel(self) -> Callable[[Tensor], Tensor]:
        """The same for x (n, in) in bf16, on a CPU without a module around it."""
        op, codes, scales = torch.ops.aten._weight_int4pack_mm_for_cpu.default, self.codes, self.scales
        return lambda x: op(x, codes, self.group, scales)


class Int8Embedding(nn.Module):
    """The table of embeddings in 8 bits, read on the way in and, where the model ties it, on the way out."""

    def __init__(self, table: Int8Linear):
        super().__init__()
        self.table = table

    @property
    def weight(self) -> Tensor:
        return self.table.codes

    def forward(self, tokens: Tensor) -> Tensor:
        return self.table.lookup(tokens)

    def scores(self, x: Tensor) -> Tensor:
        return self.table(x)


class JoinedAttention(Attention):
    """Attention whose three input matrices stand in one: a call with more rows costs less than three calls."""

    wo: Any

    def __init__(self, layer: Any, wqkv: Int8Linear | Int4Linear):
        nn.Module.__init__(self)
        self.n_heads, self.n_kv_heads, self.head_dim = layer.n_heads, layer.n_kv_heads, layer.head_dim
        self.wqkv, self.wo, self.tap, self.fast = wqkv, layer.wo, layer.tap, layer.fast

    def project(self, x: Tensor, turn: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        heads = self.wqkv(x).unflatten(-1, (-1, self.head_dim))  # (B, T, H + 2K, D)
        asked, v = heads.split((self.n_heads + self.n_kv_heads, self.n_kv_heads), dim=2)
        q, k = rotate(asked, turn).split((self.n_heads, self.n_kv_heads), dim=2)
        return q, k, v


class JoinedFeedForward(FeedForward):
    """SwiGLU whose gate and up stand in one matrix."""

    down: Any

    def __init__(self, layer: Any, gate_up: Int8Linear | Int4Linear):
        nn.Module.__init__(self)
        self.gate_up, self.down = gate_up, layer.down

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class JoinedBlock(Block):
    """A block of joined matrices. When it has a single new token to see on a CPU, its kernels are called one after the
    other, with nothing in between: looking modules up and passing through them would take longer than the arithmetic.
    """

    attention: JoinedAttention
    feedforward: JoinedFeedForward

    def __init__(self, block: Any, attention: JoinedAttention, feedforward: JoinedFeedForward):
        nn.Module.__init__(self)
        self.attention_norm, self.attention = block.attention_norm, attention
        self.feedforward_norm, self.feedforward = block.feedforward_norm, feedforward
        self._gather()

    def _gather(self) -> None:
        a, f = self.attention, self.feedforward
        self.heads = a.n_heads, a.n_kv_heads, a.head_dim
        self.kernels = [layer.kernel() for layer in (a.wqkv, a.wo, f.gate_up, f.down)]
        self.norms = self.attention_norm.weight, self.feedforward_norm.weight, self.attention_norm.eps
        inner = list(self.modules())[1:]
        self.hooks = [m._forward_hooks for m in inner] + [m._forward_pre_hooks for m in inner]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "JoinedBlock":
        super()._apply(fn, recurse)
        self._gather()
        return self

    def forward(
        self, x: Tensor, turn: tuple[Tensor, Tensor], mask: Tensor | None, cache: LayerCache | None = None
    ) -> Tensor:
        alone = x.numel() == x.shape[-1] and mask is None and x.device.type == "cpu"
        compiling = torch.compiler.is_compiling()
        if not alone or cache is None or compiling or not self.attention.fast or any(self.hooks):
            return super().forward(x, turn, mask, cache)
        (H, K, D), (wqkv, wo, gate_up, down) = self.heads, self.kernels
        attention_norm, feedforward_norm, eps = self.norms
        x = x.view(1, -1)
        heads = wqkv(rms_norm_of_one(x, attention_norm, eps)).view(1, 1, -1, D)  # (B, T, H + 2K, D)
        turned = rotate(heads.narrow(2, 0, H + K), turn)
        k, v = turned.narrow(2, H, K), heads.narrow(2, H + K, K)
        k, v = cache.append(k.transpose(1, 2), v.transpose(1, 2))
        q = turned.narrow(2, 0, H).view(1, K, H // K, D)  # a group's heads stand in the time axis
        x = x + wo(F.scaled_dot_product_attention(q, k, v).view(1, -1))
        gate, up = gate_up(rms_norm_of_one(x, feedforward_norm, eps)).view(2, 1, -1)
        return (x + down(F.silu(gate) * up)).view(1, 1, -1)


def put(model: Llama, name: str, weight: Tensor | Int4Linear, kind: str) -> None:
    """Put a weight into a model under the name of its parameter ("blocks.0.attention.wq.weight"), quantized to `kind`
    ("int8" or "int4") unless it is already. Norms are kept in bf16, embedding and output in 8 bits."""
    path, _, last = name.removesuffix(".weight").rpartition(".")
    parent = model.get_submodule(path)
    layer: nn.Module
    if isinstance(weight, Int4Linear):
        layer = weight
    elif weight.dim() == 1:
        getattr(parent, last).weight = nn.Parameter(weight.bfloat16(), requires_grad=False)
        return
    elif name == "embedding.weight":
        layer = Int8Embedding(Int8Linear.from_float(weight))
    elif kind == "int4" and path and weight.shape[0] % ROWS == 0 == weight.shape[1] % GROUP:
        layer = Int4Linear.from_float(weight)
    else:
        layer = Int8Linear.from_float(weight)
    setattr(parent, last, layer)


def join(model: Llama) -> None:
    """Let matrices of one kind that read the same vector be one matrix, when all of a model's are there."""
    for i, block in enumerate(list(model.blocks)):
        a, f = block.get_submodule("attention"), block.get_submodule("feedforward")
        wqkv, gate_up = _joined(a, "wq", "wk", "wv"), _joined(f, "gate", "up")
        if wqkv and gate_up:
            model.blocks[i] = JoinedBlock(block, JoinedAttention(a, wqkv), JoinedFeedForward(f, gate_up))


def _joined(parent: nn.Module, *names: str) -> Int8Linear | Int4Linear | None:
    layers: list[Any] = [getattr(parent, name) for name in names]
    kind = type(layers[0])
    if any(type(layer) is not kind or len(layer.codes) % PACK for layer in layers):
        return None
    rows = 0 if kind is Int8Linear else 1  # the axis of the scales
    return kind(torch.cat([layer.codes for layer in layers]), torch.cat([layer.scales for layer in layers], rows))


def quantize(model: Llama, kind: str) -> Llama:
    """Turn a model's weights into "int8" or "int4", in place, one after the other. It can write, and not be trained.

    Raises ValueError for another kind.
    """
    if kind not in ("int8", "int4"):
        raise ValueError(f"cannot quantize to {kind!r:.40}, expected 'int8' or 'int4'.")
    for name, weight in list(model.named_parameters()):
        put(model, name, weight.detach(), kind)
    join(model)
    return model.eval()
