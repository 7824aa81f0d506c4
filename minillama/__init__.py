"""minillama: LLaMA from nothing. The course is in `chapters/`; this package is what it builds.

>>> from minillama import load, generate
>>> model, tokenizer = load("toy")
>>> print(generate(model, tokenizer, "Once upon a time", seed=0))
"""

from minillama.checkpoint import load, save
from minillama.config import ModelConfig
from minillama.generation import generate
from minillama.model import Llama

__all__ = ["Llama", "ModelConfig", "generate", "load", "save"]
