"""A model larger than any one device (chapter 16): each process reads its share of a checkpoint, and they write
together.

By the plan of `parallel`: a process has some of the heads and some of the hidden width of every block, and the tables
whole. What it has is a LLaMA like any other, with fewer heads and a narrower feed-forward, and a cache of only their
keys and values; but for one thing, that twice in a block the results of all are added up.
"""

import os
from collections.abc import Callable
from dataclasses import replace
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from minillama.checkpoint import load
from minillama.checkpoint.memory import free_memory
from minillama.checkpoint.names import Checkpoint, Stored
from minillama.model import Llama
from minillama.parallel import PLAN, Layout, make_mesh
from minillama.tokenizer import Tokenizer

AXES = {"column": 0, "row": 1}  # a weight is (out, in): a column of the product is a row of it


def load_share(
    name_or_path: str | Path, layout: Layout, *, device: torch.device, dtype: torch.dtype | str = torch.float32
) -> tuple[Llama, Tokenizer | None]:
    """This process's share of a model, ready to write with the others, and its tokenizer.

    Of the blocks' matrices only its own parts are read. It takes the same calls in all processes, and each finds the
    same scores: those of the first. It cannot be trained.
    Raises ValueError as `load` does, and for a layout of more than tp, or one that does not suit the model or the
    number of processes.
    """
    if layout.processes != layout.tp:
        raise ValueError(f"the layout is {layout}, and to write takes tp alone, as tp=2: the rest shares out batches.")
    make_mesh(layout, device.type)
    free = free_memory(device)
    if device.type == "cpu":  # all processes of a machine take from the same memory
        free /= int(os.environ.get("LOCAL_WORLD_SIZE", layout.tp))
    part = partial(share, part=dist.get_rank(), parts=layout.tp)
    model, tokenizer = load(name_or_path, device=device, dtype=dtype, max_memory=free, share=part)
    connect(model)
    return model, tokenizer


def share(checkpoint: Checkpoint, part: int, parts: int) -> Checkpoint:
    """One part of a checkpoint, counted from 0: a checkpoint of a narrower model. Raises ValueError if its matrices
    cannot be cut so."""
    whole = checkpoint.config
    Layout(tp=parts).check(whole)
    config = replace(
        whole, n_heads=whole.n_heads // parts, n_kv_heads=whole.n_kv_heads // parts, ffn_dim=whole.ffn_dim // parts
    )
    return checkpoint._replace(config=config, tensors=[_cut(stored, part, parts) for stored in checkpoint.tensors])


def _cut(stored: Stored, part: int, parts: int) -> Stored:
    kind = _kind(stored.name.removesuffix(".weight"))
    if kind is None or len(stored.shape) != 2 or stored.shape[AXES[kind]] % parts:
        return stored  # whole in every process; or of a wrong shape, which the loader refuses
    shape, start, axis = list(stored.shape), [0, 0], AXES[kind]
    shape[axis] //= parts
    start[axis] = part * shape[axis]
    return stored._replace(shape=tuple(shape), start=(start[0], start[1]), mapped=None)


def _kind(name: str) -> str | None:
    return next((kind for pattern, kind in PLAN.items() if fnmatch(name, pattern)), None)


def connect(model: Llama) -> None:
    """Let the shares of a model add up what they compute, and agree on the scores, in place.

    Sums come out the same everywhere, but the processes draw tokens for themselves, and a single bit would part them.
    So all take the scores of the first: whatever is drawn, searched or guessed then goes the same way.
    """
    model.requires_grad_(False)
    for name, layer in model.named_modules():
        if _kind(name) == "row":
            layer.register_forward_hook(_add_up)
    model.scores = partial(_of_the_first, model.scores)  # type: ignore[method-assign]


def _add_up(layer: nn.Module, inputs: Any, y: Tensor) -> Tensor:
    dist.all_reduce(y)
    return y


def _of_the_first(scores: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    y = scores(x)
    dist.broadcast(y, 0)
    return y


def from_first(value: Any) -> Any:
    """A value of the first process, for all. It knows what was typed."""
    box = [value]
    dist.broadcast_object_list(box, 0)
    return box[0]
