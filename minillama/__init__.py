"""minillama: LLaMA from nothing. The course is in `chapters/`; this package is what it builds.

>>> from minillama import load, generate
>>> model, tokenizer = load("toy")
>>> print(generate(model, tokenizer, "Once upon a time", seed=0))
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minillama.checkpoint import load, save
    from minillama.config import ModelConfig
    from minillama.generation import generate
    from minillama.model import Llama

__all__ = ["Llama", "ModelConfig", "generate", "load", "save"]

_HOME = {
    "Llama": "model",
    "ModelConfig": "config",
    "generate": "generation",
    "load": "checkpoint",
    "save": "checkpoint",
}


def __getattr__(name: str) -> Any:
    """Import a name when it is first used: torch takes seconds, and `minillama --help` needs none of it."""
    if name not in _HOME:
        raise AttributeError(f"module 'minillama' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"minillama.{_HOME[name]}"), name)
    return value
