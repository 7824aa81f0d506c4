"""Our own checkpoint: a folder with `config.json`, `model.safetensors` and the tokenizer's file.

It is there as a whole or not at all: it is written beside its place, and renamed when the disk has it.
"""

import json
import os
from functools import partial
from pathlib import Path

from safetensors.torch import save_file

from minillama.checkpoint.files import new_folder, previous
from minillama.checkpoint.names import Checkpoint, Stored
from minillama.checkpoint.safetensors_file import open_safetensors, read_numbers
from minillama.config import ModelConfig
from minillama.model import Llama
from minillama.tokenizer import Tokenizer, load_tokenizer

CONFIG, WEIGHTS, TOKENIZERS = "config.json", "model.safetensors", {"tokenizer.model", "tokenizer.json"}


def save(model: Llama, tokenizer: Tokenizer | None, folder: str | Path) -> None:
    """Write a checkpoint that `load` reads: the weights in their dtype, the config, and the tokenizer if there is one.

    An earlier checkpoint of ours in `folder` is replaced as a whole. Anything else there stays untouched, and
    ValueError is raised.
    """
    folder = Path(os.path.realpath(folder))
    check_floats(model)
    _check_free(folder)
    with new_folder(folder) as new:
        describe(model.config, tokenizer, new)
        save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, new / WEIGHTS)
        (new / WEIGHTS).chmod((new / CONFIG).stat().st_mode)  # the library lets only the owner read


def describe(config: ModelConfig, tokenizer: Tokenizer | None, folder: Path) -> None:
    """Write all of a checkpoint but its weights."""
    folder.mkdir(exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(config.to_dict(), indent=2) + "\n", encoding="utf-8")
    if tokenizer is not None:
        tokenizer.save(folder)


def check_floats(model: Llama) -> None:
    """Raise ValueError for a quantized model, whose weights are no longer parameters, and for one with an adapter
    beside its weights: no format here has a place for either."""
    if not model.embedding.weight.is_floating_point():
        raise ValueError(
            "the model's weights are in 8 or 4 bits, and a checkpoint holds floating-point numbers: load it in "
            "float32, or save it before it is quantized."
        )
    if adapter := next((name for name, _ in model.named_parameters() if name.endswith(".a")), None):
        raise ValueError(
            f"the model has an adapter beside its weights ({adapter}), and a checkpoint holds the weights alone: merge "
            "it first, or write it with save_adapter."
        )


def open_native(folder: Path) -> Checkpoint:
    """Read all but the weights. Raises ValueError for a folder that is damaged or not ours."""
    config, path = _read_config(folder), folder / WEIGHTS
    tensors = [
        Stored(key, key, numbers.shape, numbers.dtype, partial(read_numbers, path, numbers))
        for key, numbers in open_safetensors(path).items()
    ]
    has_tokenizer = any((folder / name).exists() for name in TOKENIZERS)
    return Checkpoint(config, load_tokenizer(folder) if has_tokenizer else None, tensors)


def _read_config(folder: Path) -> ModelConfig:
    path = folder / CONFIG
    try:
        if (size := path.stat().st_size) > 2**20:
            raise ValueError(f"it has {size} bytes, and a config {2**20} at most")
        return ModelConfig.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}; a checkpoint has {CONFIG} and {WEIGHTS}.") from None
    except (ValueError, RecursionError) as error:  # what is not UTF-8 or not JSON is a ValueError too
        raise ValueError(f"{path} is not a config of ours: {error}.") from None


def _check_free(folder: Path) -> None:
    """Nothing is there, or a checkpoint of ours, or an empty folder."""
    try:
        if folder.exists() and (files := set(os.listdir(folder))):
            _read_config(folder)
            if foreign := files - {CONFIG, WEIGHTS, *TOKENIZERS}:
                raise ValueError(f"it has {min(foreign)} in it")
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} is there, and not a checkpoint of ours ({error}); save elsewhere.") from None


def find(folder: Path) -> Path:
    """Where the checkpoint is: in `folder`, or beside it when a save was killed between its two renames."""
    old = previous(Path(os.path.realpath(folder)))
    return old if os.path.exists(old) and not os.path.exists(folder) else folder
