"""GGUF, the file of llama.cpp: metadata, a table of tensors, then their numbers, in blocks of a few bits each.

Source: the GGUF specification (docs/gguf.md in ggml). The header is read here and not by the `gguf` package, which
makes several arrays for each word of a vocabulary; the blocks are made into floats by the `gguf` package.
"""

import math
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from gguf.quants import dequantize
from torch import Tensor

from minillama.checkpoint.names import GGUF, GGUF_CONFIG, Checkpoint, Stored, expand
from minillama.config import LinearScaling, Llama3Scaling, ModelConfig
from minillama.rope import frequencies
from minillama.tokenizer import tokenizer_from_gguf

TYPES = {GGMLQuantizationType[name].value: GGMLQuantizationType[name] for name in (
    "F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")}  # fmt: skip
NUMBERS = {GGUFValueType[name.upper()].value: np.dtype(name) for name in (
    "uint8", "int8", "uint16", "int16", "uint32", "int32", "float32", "uint64", "int64", "float64", "bool")}  # fmt: skip
UINT32, UINT64, STRING, ARRAY = (GGUFValueType[name].value for name in ("UINT32", "UINT64", "STRING", "ARRAY"))
MAX_HEADER_BYTES = 2**25  # the largest vocabularies take a third; bounds what a hostile header can cost
NUMBERS_AT_ONCE = 2**20  # are made into floats: 4 MiB


class Blocks(NamedTuple):
    """Where one tensor is in the file."""

    shape: tuple[int, ...]  # in PyTorch's order; the file has the reverse
    kind: GGMLQuantizationType
    offset: int  # in bytes


def open_gguf(path: Path) -> Checkpoint:
    """Read all but the weights. Raises ValueError for a file that is damaged or holds another kind of model."""
    try:
        fields, tensors = _read_header(path)
        config = _config(fields, tensors)
        if "rope_freqs.weight" in tensors:
            config = _llama3(config, path, tensors.pop("rope_freqs.weight"))
        names = expand(GGUF, config.n_layers)
        if unknown := tensors.keys() - names.keys():
            raise ValueError(f"it has the tensor {min(unknown)!r:.80}, which is not one of LLaMA's")
        tokenizer = tokenizer_from_gguf(fields) if "tokenizer.ggml.model" in fields else None
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}.") from None
    except ValueError as error:
        raise ValueError(f"cannot load {path}: {error}.") from None
    stored = [Stored(key, names[key], blocks.shape, partial(_read, path, blocks)) for key, blocks in tensors.items()]
    return Checkpoint(config, tokenizer, stored)


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
        if kind not in TYPES:
            name = next((known.name for known in GGMLQuantizationType if known == kind), kind)
            raise ValueError(f"it has a tensor of type {name}, expected {', '.join(t.name for t in TYPES.values())}")
        return Blocks(tuple(shape), TYPES[kind], offset)


def _read_header(path: Path) -> tuple[dict[str, Any], dict[str, Blocks]]:
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
        total += n_bytes
        if start + offset + n_bytes > size or total > size:  # before any memory is asked for
            raise ValueError(f"{key!r:.80} ends at byte {start + offset + n_bytes}, and the tensors so far have {total} "
                             f"bytes, but the file has {size}: it is cut short or damaged")  # fmt: skip
    return fields, tensors


def _unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
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


def _config(fields: dict[str, Any], tensors: dict[str, Blocks]) -> ModelConfig:
    if (architecture := fields.get("general.architecture")) != "llama":
        raise ValueError(f"its general.architecture is {architecture!r:.40}, expected 'llama'")
    if "token_embd.weight" not in tensors:
        raise ValueError("it lacks the tensor token_embd.weight")
    llama = {key.removeprefix("llama."): value for key, value in fields.items() if key.startswith("llama.")}
    ours: dict[str, Any] = {"vocab_size": tensors["token_embd.weight"].shape[0]}  # files of 2023 do not name it
    for field, key in GGUF_CONFIG.items():
        if key in llama:
            value = llama.pop(key)
            ours[field] = float(str(np.float32(value))) if isinstance(value, float) else value  # 1e-5, not 9.99999975e-6
        elif field not in ("vocab_size", "n_kv_heads", "head_dim", "rope_theta"):
            raise ValueError(f"its metadata lacks llama.{key}")
    if (scaling := llama.pop("rope.scaling.type", "none")) == "linear":
        ours["rope_scaling"] = LinearScaling(llama.pop("rope.scaling.factor", None))
    elif scaling != "none":
        raise ValueError(f"its llama.rope.scaling.type is {scaling!r:.40}, expected 'none' or 'linear'")
    config = ModelConfig(**ours, tie_embeddings="output.weight" not in tensors)
    known = {"rope.dimension_count": config.head_dim, "attention.value_length": config.head_dim}
    for key, value in llama.items():  # a setting that is not understood is refused: without it, the model is another
        if key not in known or value != known[key]:
            expected = f"{known[key]}, the head_dim" if key in known else "no such key"
            raise ValueError(f"its metadata has llama.{key} = {value!r:.60}, expected {expected}")
    return config


def _llama3(config: ModelConfig, path: Path, blocks: Blocks) -> ModelConfig:
    """Llama 3.1 and later: a tensor says how much slower each pair turns. Find the scaling it comes from, and compare."""
    slower = torch.empty(blocks.shape)
    _read(path, blocks, slower)
    scaled = replace(config, rope_scaling=Llama3Scaling(float(slower.max()), 1.0, 4.0, 8192))  # as all were published
    plain = frequencies(replace(config, rope_scaling=None))
    if plain.shape != slower.shape or not torch.allclose(plain / slower, frequencies(scaled), rtol=1e-4, atol=0):
        raise ValueError("its rope_freqs.weight is not the scaling of Llama 3.1 or 3.2, the only one supported")
    return scaled


def _read(path: Path, blocks: Blocks, out: Tensor) -> None:
    """Fill `out` a few rows at a time, so that the floats are never all there beside it."""
    rows = out if out.dim() == 2 else out[None]
    with open(path, "rb") as file:
        file.seek(blocks.offset)
        for part in rows.split(max(1, NUMBERS_AT_ONCE // rows.shape[1])):
            data = np.empty((len(part), _row_bytes(rows.shape[1], blocks.kind)), np.uint8)
            if file.readinto(data) != data.nbytes:  # type: ignore[arg-type]
                raise ValueError(f"{path} has become shorter while it was read.")
            with np.errstate(all="ignore"):  # a damaged scale may be infinite
                part.copy_(torch.from_numpy(dequantize(data, blocks.kind)))
