"""A safetensors file: the library checks all of it but the numbers, of which then only those asked for are read.

The library itself maps the file. That is right for a whole model on a processor; but of a mapped matrix whose columns
are shared out, the system brings in nearly all, and it keeps what it brought in memory until the file is closed.
"""

import json
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minillama.checkpoint.files import read_rows

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # by safetensors' names
NUMBERS_AT_ONCE = 2**22  # on their way to another dtype or device


class Numbers(NamedTuple):
    """Where one tensor is in the file."""

    shape: tuple[int, ...]
    dtype: str  # a name in DTYPES
    offset: int  # bytes


def open_safetensors(path: Path) -> dict[str, Numbers]:
    """Where each tensor is. Raises ValueError for a file that is damaged or holds other than floating-point numbers."""
    try:
        with safe_open(path, "pt") as file:
            keys = file.keys()
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
    except (SafetensorError, OSError) as error:
        raise ValueError(f"cannot read {path}: {error}; get the checkpoint again.") from None
    for key in keys:
        if (dtype := header[key]["dtype"]) not in DTYPES:
            raise ValueError(f"{path}: {key!r:.80} is {dtype}, expected {', '.join(DTYPES)}.")
    return {
        key: Numbers(tuple(header[key]["shape"]), header[key]["dtype"], 8 + size + header[key]["data_offsets"][0])
        for key in keys
    }


def read_numbers(path: Path, numbers: Numbers, out: Tensor, start: tuple[int, int]) -> None:
    """Fill `out`, of any dtype and device, with the part of a tensor that begins at a row and a column; a vector has
    one row. Raises ValueError if the file has become shorter."""
    rows = out if out.dim() == 2 else out[None]
    dtype, width = DTYPES[numbers.dtype], numbers.shape[-1]
    first, column = start
    for part in rows.split(max(1, NUMBERS_AT_ONCE // rows.shape[1])):
        where = slice(column * dtype.itemsize, (column + rows.shape[1]) * dtype.itemsize)
        data = read_rows(path, numbers.offset, width * dtype.itemsize, slice(first, first + len(part)), where)
        part.copy_(torch.from_numpy(data).view(dtype))
        first += len(part)


def map_tensor(path: Path, key: str) -> Tensor:
    """The tensor itself, where it lies in the file: the system brings in what is touched."""
    with safe_open(path, "pt") as file:
        return file.get_tensor(key)
