"""How inputs and answers pass between the grader and a learner's process: as a safetensors file, which runs no code.

A value is a tree of lists, tuples, dictionaries, numbers, texts, bytes and tensors. The tensors are stored as such; the
tree, with their numbers in it, is JSON in the file's metadata.
"""

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

LARGEST = 200_000_000  # bytes of a file that is read


def check(value: Any) -> None:
    """Raise TypeError for anything but data."""
    _flatten(value, {}, depth=0)


def write(value: Any, path: Path) -> None:
    """Store a value. Raises TypeError for anything but data."""
    tensors: dict[str, Tensor] = {}
    tree = json.dumps(_flatten(value, tensors, depth=0))
    save_file(tensors, path, metadata={"tree": tree})


def read(path: Path) -> Any:
    """The value in a file. Raises ValueError for a file that is too large or holds none."""
    try:
        if path.stat().st_size > LARGEST:
            raise ValueError(f"{path.stat().st_size} bytes, expected at most {LARGEST}")
        with safe_open(path, framework="pt") as file:
            tree = json.loads((file.metadata() or {})["tree"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        return _rebuild(tree, tensors)
    except Exception as error:
        raise ValueError(f"{path.name} holds no answer ({type(error).__name__}: {error})") from None


def _flatten(value: Any, tensors: dict[str, Tensor], depth: int) -> Any:
    if depth > 50:
        raise TypeError("the value is nested too deeply, or contains itself")
    match value:
        case Tensor():
            name = str(len(tensors))
            tensors[name] = value.detach().cpu().contiguous().clone()
            return {"tensor": name}
        case None | bool() | str():
            return value
        case int():
            return {"int": str(int(value))}
        case float():
            return {"float": float(value).hex()}
        case bytes():
            return {"bytes": value.hex()}
        case list() | tuple():
            kind = "list" if isinstance(value, list) else "tuple"
            return {kind: [_flatten(item, tensors, depth + 1) for item in value]}
        case dict():
            return {"dict": [[_flatten(x, tensors, depth + 1) for x in pair] for pair in value.items()]}
        case other:
            raise TypeError(f"a {type(other).__name__}, expected data (tensors, numbers, text, lists)")


def _rebuild(tree: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(tree, dict):
        return tree
    ((kind, inside),) = tree.items()
    match kind:
        case "tensor":
            return tensors[inside]
        case "int":
            return int(inside)
        case "float":
            return float.fromhex(inside)
        case "bytes":
            return bytes.fromhex(inside)
        case "list":
            return [_rebuild(item, tensors) for item in inside]
        case "tuple":
            return tuple(_rebuild(item, tensors) for item in inside)
        case "dict":
            return {_rebuild(key, tensors): _rebuild(item, tensors) for key, item in inside}
        case other:
            raise ValueError(f"a part of kind {other!r}")
