"""Checkpoints (chapter 12): `save` writes our own format, `load` reads ours and GGUF."""

from minillama.checkpoint.load import load
from minillama.checkpoint.native import save

__all__ = ["load", "save"]
