"""Our own checkpoint: a folder with `config.json`, `model.safetensors` and the tokenizer's files.

It is there as a whole or not at all: it is written beside its place, and renamed when the disk has it.
"""

import json
import os
import shutil
import tempfile
from functools import partial
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from minillama.checkpoint.names import Checkpoint, Stored
from minillama.config import ModelConfig
from minillama.model import Llama
from minillama.tokenizer import Tokenizer, load_tokenizer

CONFIG, WEIGHTS = "config.json", "model.safetensors"
TOKENIZER = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json")
DTYPES = ("F32", "BF16", "F16")  # safetensors' names


def save(model: Llama, tokenizer: Tokenizer | None, folder: str | Path) -> None:
    """Write a checkpoint that `load` reads: the weights in their dtype, the config, and the tokenizer if there is one.

    An earlier checkpoint of ours in `folder` is replaced as a whole. If anything else is there, it stays untouched
    and ValueError is raised.
    """
    folder = Path(os.path.realpath(folder))
    if os.path.lexists(folder):
        _check_ours(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))
    try:
        temporary.chmod(0o755)  # mkdtemp lets nobody else in
        (temporary / CONFIG).write_text(json.dumps(model.config.to_dict(), indent=2) + "\n", encoding="utf-8")
        save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, temporary / WEIGHTS)
        if tokenizer is not None:
            tokenizer.save(temporary)
        _sync(*temporary.iterdir(), temporary)
        if folder.exists():
            shutil.rmtree(_previous(folder), ignore_errors=True)
            os.rename(folder, _previous(folder))
        os.rename(temporary, folder)
        _sync(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(_previous(folder), ignore_errors=True)


def open_native(folder: Path) -> Checkpoint:
    """Open a folder that `save` wrote. Raises ValueError for one that is damaged or not ours."""
    folder = Path(os.path.realpath(folder))
    if not folder.exists() and _previous(folder).exists():  # a save was killed between its two renames
        folder = _previous(folder)
    config, path = read_config(folder), folder / WEIGHTS
    tensors = []
    try:
        with safe_open(path, "pt") as file:
            for key in file.keys():
                part = file.get_slice(key)
                if part.get_dtype() not in DTYPES:
                    raise ValueError(f"{path}: {key} has the dtype {part.get_dtype()}, expected {', '.join(DTYPES)}.")
                tensors.append(Stored(key, key, tuple(part.get_shape()), partial(_read, path, key)))
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or not a safetensors file ({error}); get the checkpoint again.") from None
    has_tokenizer = any((folder / name).exists() for name in TOKENIZER)
    return Checkpoint(config, load_tokenizer(folder) if has_tokenizer else None, tensors)


def read_config(folder: Path) -> ModelConfig:
    """The config in a checkpoint's folder. Raises ValueError if it is missing, damaged or impossible."""
    path = folder / CONFIG
    try:
        if path.stat().st_size > 2**20:
            raise ValueError(f"it has {path.stat().st_size} bytes, and a config has {2**20} at most")
        return ModelConfig.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}; a checkpoint has {CONFIG} and {WEIGHTS}.") from None
    except (ValueError, RecursionError) as error:  # JSON's and UTF-8's errors are ValueErrors
        raise ValueError(f"{path} is not a config of ours: {error}.") from None


def _read(path: Path, key: str, out: Tensor) -> None:
    with safe_open(path, "pt") as file:
        out.copy_(file.get_tensor(key))


def _check_ours(folder: Path) -> None:
    try:
        if entries := set(os.listdir(folder)):
            read_config(folder)
        if foreign := sorted(entries - {CONFIG, WEIGHTS, *TOKENIZER}):
            raise ValueError(f"it has a {foreign[0]}")
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} is there, and is not a checkpoint of ours ({error}); save elsewhere.") from None


def _previous(folder: Path) -> Path:
    """Where the earlier checkpoint is between the two renames; `open_native` finds it there."""
    return folder.with_name(f".{folder.name}.minillama-previous")


def _sync(*paths: Path) -> None:
    for path in paths if os.name == "posix" else ():  # Windows cannot sync a folder
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
