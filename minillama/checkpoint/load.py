"""One loader for all formats: the weights go one at a time from the file to their device, in their final dtype."""

from pathlib import Path

import torch

from minillama.checkpoint.names import Checkpoint
from minillama.checkpoint.native import open_native
from minillama.model import Llama
from minillama.rope import frequencies
from minillama.tokenizer import Tokenizer


def load(
    name_or_path: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[Llama, Tokenizer | None]:
    return read(open_native(Path(name_or_path)), torch.device(device), dtype)


def read(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> tuple[Llama, Tokenizer | None]:
    with torch.device("meta"):
        model = Llama(checkpoint.config)
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for stored in checkpoint.tensors:
        if stored.name not in expected:
            raise ValueError(f"the checkpoint has the tensor {stored.key}, which its config has no place for.")
        if stored.shape != expected[stored.name]:
            raise ValueError(f"{stored.key} has the shape {stored.shape}, expected {expected[stored.name]}.")
    if missing := expected.keys() - {stored.name for stored in checkpoint.tensors}:
        raise ValueError(f"the checkpoint lacks {min(missing)}.")
    state = {}
    for stored in checkpoint.tensors:
        state[stored.name] = torch.empty(stored.shape, dtype=dtype, device=device)
        stored.read(state[stored.name])
    model.load_state_dict(state, strict=True, assign=True)
    model.frequency = frequencies(model.config).to(device)
    return model.eval(), checkpoint.tokenizer
