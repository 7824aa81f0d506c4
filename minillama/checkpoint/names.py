"""What every format hands to the loader, and the tables of other people's weight names."""

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


# Name in the file -> name of our parameter; {i} counts the blocks.
GGUF = {
    "token_embd.weight": "embedding.weight",
    "blk.{i}.attn_norm.weight": "blocks.{i}.attention_norm.weight",
    "blk.{i}.attn_q.weight": "blocks.{i}.attention.wq.weight",
    "blk.{i}.attn_k.weight": "blocks.{i}.attention.wk.weight",
    "blk.{i}.attn_v.weight": "blocks.{i}.attention.wv.weight",
    "blk.{i}.attn_output.weight": "blocks.{i}.attention.wo.weight",
    "blk.{i}.ffn_norm.weight": "blocks.{i}.feedforward_norm.weight",
    "blk.{i}.ffn_gate.weight": "blocks.{i}.feedforward.gate.weight",
    "blk.{i}.ffn_up.weight": "blocks.{i}.feedforward.up.weight",
    "blk.{i}.ffn_down.weight": "blocks.{i}.feedforward.down.weight",
    "output_norm.weight": "norm.weight",
    "output.weight": "output.weight",
}

# Field of our config -> GGUF's key, after "llama.".
GGUF_CONFIG = {
    "dim": "embedding_length",
    "n_layers": "block_count",
    "n_heads": "attention.head_count",
    "n_kv_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "ffn_dim": "feed_forward_length",
    "vocab_size": "vocab_size",
    "max_seq_len": "context_length",
    "norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
}


def expand(table: dict[str, str], n_layers: int) -> dict[str, str]:
    """The table with {i} filled in: one entry for each of the blocks."""
    return {
        theirs.format(i=i): ours.format(i=i)
        for theirs, ours in table.items()
        for i in range(n_layers if "{i}" in theirs else 1)
    }
