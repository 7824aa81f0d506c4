"""Quantization (chapter 13): weights in 8 or 4 bits, which are read in half or a quarter of the time of bf16.

To write a token, a model reads every weight once, and on most machines the reading is what takes the time. So a weight
is stored as a small whole number, its code, and weights that lie near each other share a scale. The arithmetic stays in
bf16, and so do norms.

- `Int8Linear`: a scale for each row. w ≈ code · scale, code from -127 to 127.
- `Int4Linear`: a scale and a smallest value for each group of a row. w ≈ code · scale + low, code from 0 to 15.

Sources: Dettmers et al. 2022, "LLM.int8()" (a scale for a row); Frantar et al. 2022, "GPTQ" (for a group).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillama.model import Llama

GROUP = 32  # weights that share a scale; PyTorch's kernel can do 32, 64, 128 and 256
ROWS = 16  # and takes rows by as many


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
        scales = (weight.float().abs().amax(1) / 127).clamp_min(1e-30).bfloat16()
        codes = (weight.float() / scales.float()[:, None]).round().clamp(-127, 127)
        return cls(codes.to(torch.int8), scales)

    def dequantize(self) -> Tensor:
        """The weight that it computes with, (out, in) fp32."""
        return self.codes.float() * self.scales.float()[:, None]

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        out, in_ = self.codes.shape
        if x.device.type == "cpu" and out % ROWS == 0 == in_ % GROUP:  # the kernel reads past the end of other shapes
            y = torch.ops.aten._weight_int8pack_mm(rows, self.codes, self.scales)
        else:
            y = F.linear(rows, self.codes.to(x.dtype)) * self.scales
        return y.view(*x.shape[:-1], -1)

    def lookup(self, tokens: Tensor) -> Tensor:
        """Tokens (B, T) to their rows (B, T, in) bf16."""
        return self.codes[tokens].bfloat16() * self.scales[tokens, None]


class Int4Linear(nn.Module):
    """A linear layer, x (..., in) to (..., out), of codes of 4 bits and a scale and a middle for each group of a row.

    w = (code - 8) · scale + middle. codes: two a byte, in the order that the device's kernel reads them. scales:
    (in/group, out, 2) bf16, scale and middle.
    """

    codes: Tensor
    scales: Tensor

    def __init__(self, codes: Tensor, scales: Tensor, lows: Tensor):
        """codes (out, in) uint8, 0 to 15; scales and lows (out, in/group), with w = code · scale + low."""
        super().__init__()
        self.shape, self.group = tuple(codes.shape), codes.shape[1] // scales.shape[1]
        if codes.device.type == "cpu":
            packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
        else:
            packed = codes[:, ::2] | codes[:, 1::2] << 4
        middles = lows.float() + 8 * scales.float()
        self.register_buffer("codes", packed)
        pairs = torch.stack([scales.float(), middles], -1).bfloat16()
        self.register_buffer("scales", pairs.transpose(0, 1).contiguous())

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
        return cls(codes.to(torch.uint8).flatten(1), scales, low)

    def dequantize(self) -> Tensor:
        """The weight that it computes with, (out, in) bf16."""
        if self.codes.device.type == "cpu":  # ask the kernel, by one-hot vectors
            return self(torch.eye(self.shape[1], dtype=torch.bfloat16)).T.contiguous()
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


def put(model: Llama, name: str, weight: Tensor | Int8Linear | Int4Linear, kind: str) -> None:
    """Put a weight into a model under the name of its parameter ("blocks.0.attention.wq.weight"), quantized to `kind`
    ("int8" or "int4") unless it is already. Norms are kept in bf16, embedding and output in 8 bits."""
    path, _, last = name.removesuffix(".weight").rpartition(".")
    parent = model.get_submodule(path)
    if isinstance(weight, Tensor) and weight.dim() == 1:
        getattr(parent, last).weight = nn.Parameter(weight.bfloat16(), requires_grad=False)
        return
    if name in ("embedding.weight", "output.weight") and not isinstance(weight, Tensor):
        weight = weight.dequantize()
    if isinstance(weight, Tensor):
        four = kind == "int4" and path and weight.shape[0] % ROWS == 0 == weight.shape[1] % GROUP
        weight = Int4Linear.from_float(weight) if four else Int8Linear.from_float(weight)
    table = name == "embedding.weight" and isinstance(weight, Int8Linear)
    setattr(parent, last, Int8Embedding(weight) if table else weight)  # type: ignore[arg-type]


def quantize(model: Llama, kind: str) -> Llama:
    """Turn a model's weights into "int8" or "int4", in place, one after the other. It can write, and not be trained.

    Raises ValueError for another kind.
    """
    if kind not in ("int8", "int4"):
        raise ValueError(f"cannot quantize to {kind!r:.40}, expected 'int8' or 'int4'.")
    for name, weight in list(model.named_parameters()):
        put(model, name, weight.detach(), kind)
    return model.eval()
