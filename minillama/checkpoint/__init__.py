"""Checkpoints (chapter 12): `load` reads every format that a LLaMA comes in, `save` writes ours, `save_huggingface`
theirs."""

from minillama.checkpoint.export import save_huggingface
from minillama.checkpoint.load import load
from minillama.checkpoint.native import save

__all__ = ["load", "save", "save_huggingface"]
