"""PyTorch's own files (`.bin`, `.pth`): a zip archive with a pickle, in which the tensors' numbers lie one by one.

A pickle is a program. It is read with PyTorch's short list of harmless instructions, and anything else is refused; the
numbers are not read at all but mapped: the system brings a page in when it is touched.
"""

import pickle
import zipfile
from pathlib import Path

import torch
from torch import Tensor

MAX_PICKLE_BYTES = 2**26  # names, shapes and places of a hundred thousand tensors


def open_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name, mapped. Raises ValueError for a file that is damaged, would run code, or holds
    something else than tensors."""
    try:
        _check_archive(path)
        found = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # the readers of archives and pickles trip over damage in many ways
        if isinstance(error, pickle.UnpicklingError) and "unsupported global" in str(error).lower():
            raise ValueError(f"{path} holds more than weights, and could run code: do not use it.") from None
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"cannot read {path}: {reason:.300}; get the checkpoint again.") from None
    if isinstance(found, dict) and found.keys() == {"model"}:  # as some trainers write it
        found = found["model"]
    if not isinstance(found, dict) or not all(isinstance(k, str) and type(v) is Tensor for k, v in found.items()):
        raise ValueError(f"{path} holds something else than tensors by name: expected a model's weights.")
    if odd := [name for name, tensor in found.items() if not tensor.is_contiguous() or tensor.layout != torch.strided]:
        raise ValueError(f"{path}: the tensor {odd[0]!r:.80} does not lie in one piece, expected plain tensors.")
    return found


def dtype_name(tensor: Tensor) -> str:
    """As safetensors calls it."""
    names = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}
    return names.get(tensor.dtype, str(tensor.dtype).removeprefix("torch."))


def _check_archive(path: Path) -> None:
    """Nothing in the archive is packed (a small file could then unpack without end), and all of it is in the file."""
    if not zipfile.is_zipfile(path):
        raise ValueError("it is not a zip archive, as PyTorch has written since version 1.6")
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    if packed := [entry for entry in entries if entry.compress_type != zipfile.ZIP_STORED]:
        raise ValueError(f"its part {packed[0].filename!r:.80} is compressed, expected plain numbers")
    if sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise ValueError("its parts are larger than the file")
    if any(entry.filename.endswith(".pkl") and entry.file_size > MAX_PICKLE_BYTES for entry in entries):
        raise ValueError(f"its table of contents has more than {MAX_PICKLE_BYTES} bytes")
