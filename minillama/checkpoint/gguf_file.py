"""The GGUF file of llama.cpp: named values, a table of tensors, then their numbers, in blocks of a few bits each.

Source: the GGUF specification (docs/gguf.md in ggml). The header is read here and not by the `gguf` package, which
makes several arrays for each word of a vocabulary; blocks are made into floats by the `gguf` package.
"""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from gguf.quants import dequantize
from torch import Tensor

from minillama.checkpoint.files import read_rows
from minillama.quantize import ROWS, Int4Linear

# fmt: off
NUMBERS = {GGUFValueType[name.upper()].value: np.dtype(name) for name in (
    "bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "float32", "float64")}
UINT32, UINT64, STRING, ARRAY = (GGUFValueType[name].value for name in ("UINT32", "UINT64", "STRING", "ARRAY"))
BLOCKS = {kind.value: kind for kind in GGMLQuantizationType if kind.name in (  # what the package makes into floats
    "F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K",
    "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS",
    "TQ1_0", "TQ2_0", "MXFP4", "NVFP4")}
# fmt: on
MAX_HEADER_BYTES = 2**25  # the largest vocabularies take a third; bounds what a hostile header can cost
NUMBERS_AT_ONCE = 2**20  # are made into floats: 4 MiB
T = TypeVar("T")


class Blocks(NamedTuple):
    """Where one tensor is in the file."""

    shape: tuple[int, ...]  # in PyTorch's order; the file has the reverse
    kind: GGMLQuantizationType
    offset: int  # bytes


def read_header(path: Path) -> tuple[dict[str, Any], dict[str, Blocks]]:
    """The metadata, as Python's values and lists, and where each tensor is. All tensors lie within the file.

    Raises ValueError for a file that is cut short, damaged or of an unknown type, and OSError.
    """
    size, total = path.stat().st_size, 0
    with open(path, "rb") as file:
        header = _Header(file, size)
        if (magic := header.take(4)) != b"GGUF":
            raise ValueError(f"it begins with {magic!r}, expected b'GGUF'")
        if (version := header.number(UINT32)) not in (2, 3):
            raise ValueError(f"its GGUF version is {version}, expected 2 or 3")
        n_tensors, n_fields = header.numbers(UINT64, 2)
        fields = _unique((header.string(), header.value()) for _ in range(n_fields))
        tensors = _unique((header.string(), header.blocks()) for _ in range(n_tensors))
        alignment = fields.get("general.alignment", 32)
        if type(alignment) is not int or not 1 <= alignment <= 2**16:
            raise ValueError(f"its general.alignment is {alignment!r:.40}, expected a number of bytes")
        start = -(-file.tell() // alignment) * alignment  # rounded up
    for key, (shape, kind, offset) in tensors.items():
        tensors[key] = Blocks(shape, kind, start + offset)
        n_bytes = math.prod(shape[:-1]) * _row_bytes(shape[-1], kind)
        end, total = start + offset + n_bytes, total + n_bytes
        if max(end, total) > size:  # before any memory is asked for; tensors may not share bytes
            raise ValueError(
                f"{key!r:.80} ends at byte {end}, and the tensors up to it have {total} bytes together, but the file "
                f"has only {size}: it is cut short or damaged"
            )
    return fields, tensors


def read_blocks(path: Path, blocks: Blocks, out: Tensor, start: tuple[int, int] = (0, 0)) -> None:
    """Fill `out`, of any dtype and device, with the part of a tensor that begins at a row and a column, a few rows at a
    time: the floats are never all there beside it. Raises ValueError for a part that begins or ends within a block."""
    rows = out if out.dim() == 2 else out[None]
    first = start[0]
    for part in rows.split(max(1, NUMBERS_AT_ONCE // rows.shape[1])):
        data = _bytes(path, blocks, tuple(part.shape), (first, start[1]))
        with np.errstate(all="ignore"):  # a damaged scale may be infinite
            part.copy_(torch.from_numpy(dequantize(data, blocks.kind)))
        first += len(part)


def _bytes(path: Path, blocks: Blocks, shape: tuple[int, ...], start: tuple[int, int]) -> np.ndarray:
    (first, column), (n, width) = start, shape
    block, block_bytes = GGML_QUANT_SIZES[blocks.kind]
    if column % block or width % block:
        raise ValueError(
            f"{path} has {block} weights of a row in one block ({blocks.kind.name}), and a share of {width} weights "
            "cuts one: take fewer processes, or a checkpoint that is not quantized."
        )
    columns = slice(column // block * block_bytes, (column + width) // block * block_bytes)
    return read_rows(path, blocks.offset, _row_bytes(blocks.shape[-1], blocks.kind), slice(first, first + n), columns)


def read_int4(
    path: Path, blocks: Blocks, device: torch.device, shape: tuple[int, ...], start: tuple[int, int]
) -> Int4Linear | None:
    """Of a Q4_0 or Q4_1 tensor the part of a shape (out, in) that begins at a row and a column. The 4 bits stay 4 bits:
    a block of 32 weights is our group. None for a number of rows that an `Int4Linear` cannot have.

    A block is its scale, in Q4_1 its smallest value, both fp16, and 16 bytes: the low halves are weights 0 to 15, the
    high ones 16 to 31. Source: ggml's `block_q4_0` and `block_q4_1`.
    """
    if len(shape) != 2 or shape[0] % ROWS:
        return None
    data = _bytes(path, blocks, shape, start).reshape(shape[0], shape[1] // 32, -1)
    head = 4 if blocks.kind == GGMLQuantizationType.Q4_1 else 2
    numbers = torch.from_numpy(data[..., :head].copy().view(np.float16)).float()
    scales = numbers[..., 0]
    lows = numbers[..., 1] if head == 4 else -8 * scales
    halves = torch.from_numpy(data[..., head:])
    codes = torch.cat([halves & 15, halves >> 4], -1).flatten(1)
    return Int4Linear.from_codes(codes.to(device), scales.to(device), lows.to(device))


class _Header:
    """Reads one value after the other, and never more than there is."""

    def __init__(self, file: BinaryIO, file_bytes: int):
        self.file, self.left = file, min(file_bytes, MAX_HEADER_BYTES)

    def take(self, n: int) -> bytes:
        if n > self.left:
            raise ValueError(f"its header asks for {n} bytes where {self.left} are left: it is cut short or damaged")
        self.left -= n
        return self.file.read(n)

    def numbers(self, kind: int, count: int) -> list:
        if kind not in NUMBERS:  # among them an array of arrays, which llama.cpp does not read either
            raise ValueError(f"its header has a value of type {kind}, expected {ARRAY} or one of {sorted(NUMBERS)}")
        return np.frombuffer(self.take(count * NUMBERS[kind].itemsize), NUMBERS[kind]).tolist()

    def number(self, kind: int) -> Any:
        return self.numbers(kind, 1)[0]

    def string(self) -> str:
        return self.take(int.from_bytes(self.take(8), "little")).decode()

    def value(self) -> Any:
        kind, count = self.number(UINT32), None
        if kind == ARRAY:
            kind, count = self.number(UINT32), self.number(UINT64)
        if kind == STRING:
            return self.string() if count is None else [self.string() for _ in range(count)]
        return self.number(kind) if count is None else self.numbers(kind, count)

    def blocks(self) -> Blocks:
        if not 1 <= (n_dims := self.number(UINT32)) <= 4:
            raise ValueError(f"it has a tensor of {n_dims} dimensions, expected 1 to 4")
        shape, kind, offset = self.numbers(UINT64, n_dims)[::-1], self.number(UINT32), self.number(UINT64)
        if kind not in BLOCKS:
            name = next((known.name for known in GGMLQuantizationType if known == kind), kind)
            raise ValueError(f"it has a tensor of type {name}, expected {', '.join(k.name for k in BLOCKS.values())}")
        return Blocks(tuple(shape), BLOCKS[kind], offset)


def _unique(pairs: Iterable[tuple[str, T]]) -> dict[str, T]:
    result: dict[str, T] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"it has {key!r:.80} twice")
        result[key] = value
    return result


def _row_bytes(n: int, kind: GGMLQuantizationType) -> int:
    block, block_bytes = GGML_QUANT_SIZES[kind]
    if n % block:
        raise ValueError(f"it has a tensor of type {kind.name} with rows of {n}, expected a multiple of {block}")
    return n // block * block_bytes
