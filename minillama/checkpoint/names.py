"""What every checkpoint format gives the loader, and the tables from other people's weight names to ours."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from minillama.config import ModelConfig
from minillama.tokenizer import Tokenizer


class Stored(NamedTuple):
    """One tensor of a checkpoint, not read yet."""

    key: str  # its name in the file, for messages
    name: str  # the name of our parameter
    shape: tuple[int, ...]
    read: Callable[[Tensor], None]  # fills a tensor of this shape, of any floating dtype, on any device


class Checkpoint(NamedTuple):
    """An opened checkpoint: all that is known before the weights are read."""

    config: ModelConfig
    tokenizer: Tokenizer | None
    tensors: list[Stored]
