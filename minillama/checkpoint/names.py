"""What every format hands to the loader, and the tables of other people's weight names."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from minillama.config import ModelConfig
from minillama.quantize import Int4Linear
from minillama.tokenizer import Tokenizer

Start = tuple[int, int]  # a row and a column; a vector is a single row


class Stored(NamedTuple):
    """One tensor of a checkpoint, not read yet."""

    key: str  # its name in the file, for messages
    name: str  # the name of our parameter
    shape: tuple[int, ...]
    dtype: str  # as the file calls it, for `inspect`
    read: Callable[[Tensor, Start], None]  # fills a tensor, of any floating dtype, on any device, from there on
    mapped: Callable[[], Tensor] | None = None  # the tensor itself, where it lies in the file as we want it
    # Where the file has 4 bits: a tensor of a shape, from there on, in ours; None for a shape that ours cannot have.
    quantized: Callable[[torch.device, tuple[int, ...], Start], Int4Linear | None] | None = None
    start: Start = (0, 0)  # where in the file's tensor it begins: not at its beginning if it is a share of it


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

HUGGING_FACE = {
    "model.embed_tokens.weight": "embedding.weight",
    "model.layers.{i}.input_layernorm.weight": "blocks.{i}.attention_norm.weight",
    "model.layers.{i}.self_attn.q_proj.weight": "blocks.{i}.attention.wq.weight",
    "model.layers.{i}.self_attn.k_proj.weight": "blocks.{i}.attention.wk.weight",
    "model.layers.{i}.self_attn.v_proj.weight": "blocks.{i}.attention.wv.weight",
    "model.layers.{i}.self_attn.o_proj.weight": "blocks.{i}.attention.wo.weight",
    "model.layers.{i}.post_attention_layernorm.weight": "blocks.{i}.feedforward_norm.weight",
    "model.layers.{i}.mlp.gate_proj.weight": "blocks.{i}.feedforward.gate.weight",
    "model.layers.{i}.mlp.up_proj.weight": "blocks.{i}.feedforward.up.weight",
    "model.layers.{i}.mlp.down_proj.weight": "blocks.{i}.feedforward.down.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "output.weight",
}

# Field of our config -> its key in Hugging Face's config.json.
HUGGING_FACE_CONFIG = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "ffn_dim": "intermediate_size",
    "vocab_size": "vocab_size",
    "max_seq_len": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "rope_theta": "rope_theta",
}

META = {
    "tok_embeddings.weight": "embedding.weight",
    "layers.{i}.attention_norm.weight": "blocks.{i}.attention_norm.weight",
    "layers.{i}.attention.wq.weight": "blocks.{i}.attention.wq.weight",
    "layers.{i}.attention.wk.weight": "blocks.{i}.attention.wk.weight",
    "layers.{i}.attention.wv.weight": "blocks.{i}.attention.wv.weight",
    "layers.{i}.attention.wo.weight": "blocks.{i}.attention.wo.weight",
    "layers.{i}.ffn_norm.weight": "blocks.{i}.feedforward_norm.weight",
    "layers.{i}.feed_forward.w1.weight": "blocks.{i}.feedforward.gate.weight",
    "layers.{i}.feed_forward.w3.weight": "blocks.{i}.feedforward.up.weight",
    "layers.{i}.feed_forward.w2.weight": "blocks.{i}.feedforward.down.weight",
    "norm.weight": "norm.weight",
    "output.weight": "output.weight",
}


def part_of(tensor: Tensor, shape: tuple[int, ...], start: Start) -> Tensor:
    """The part of a tensor that has this shape and begins there."""
    for axis, (first, length) in enumerate(zip(start[-len(shape) :], shape, strict=True)):
        tensor = tensor.narrow(axis, first, length)
    return tensor


def expand(table: dict[str, str], n_layers: int) -> dict[str, str]:
    """The table with {i} filled in: one entry for each of the blocks."""
    return {
        theirs.format(i=i): ours.format(i=i)
        for theirs, ours in table.items()
        for i in range(n_layers if "{i}" in theirs else 1)
    }
