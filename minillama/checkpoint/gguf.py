"""A LLaMA in a GGUF file: the metadata becomes our config and tokenizer, and the tensors get our names.

Query and key rows are interleaved in these files, as ours are, so no weight is permuted.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minillama.checkpoint.gguf_file import Blocks, read_blocks, read_header, read_int4
from minillama.checkpoint.names import GGUF, GGUF_CONFIG, Checkpoint, Stored, expand
from minillama.config import LinearScaling, Llama3Scaling, ModelConfig
from minillama.rope import frequencies
from minillama.tokenizer import tokenizer_from_gguf

OPTIONAL = ("n_kv_heads", "head_dim", "vocab_size", "rope_theta")  # fields of our config that a file may leave out


def open_gguf(path: Path) -> Checkpoint:
    """Read all but the weights. Raises ValueError for a file that is damaged or holds another kind of model."""
    try:
        fields, tensors = read_header(path)
        config = _config(fields, tensors)
        if "rope_freqs.weight" in tensors:
            config = _llama3(config, path, tensors.pop("rope_freqs.weight"))
        names = expand(GGUF, config.n_layers)
        if unknown := tensors.keys() - names.keys():
            raise ValueError(f"it has the tensor {min(unknown)!r:.80}, which is not one of LLaMA's")
        tokenizer = tokenizer_from_gguf(fields) if "tokenizer.ggml.model" in fields else None
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}.") from None
    except ValueError as error:
        raise ValueError(f"cannot load {path}: {error}.") from None
    stored = [
        Stored(
            key,
            names[key],
            blocks.shape,
            blocks.kind.name,
            partial(read_blocks, path, blocks),
            quantized=partial(read_int4, path, blocks) if blocks.kind.name in ("Q4_0", "Q4_1") else None,
        )
        for key, blocks in tensors.items()
    ]
    return Checkpoint(config, tokenizer, stored)


def _config(fields: dict[str, Any], tensors: dict[str, Blocks]) -> ModelConfig:
    if (architecture := fields.get("general.architecture")) != "llama":
        raise ValueError(f"its general.architecture is {architecture!r:.40}, expected 'llama'")
    if "token_embd.weight" not in tensors:
        raise ValueError("it lacks the tensor token_embd.weight")
    llama = {key.removeprefix("llama."): value for key, value in fields.items() if key.startswith("llama.")}
    ours: dict[str, Any] = {"vocab_size": tensors["token_embd.weight"].shape[0]}  # files of 2023 do not name it
    for field, key in GGUF_CONFIG.items():
        if key in llama:
            value = llama.pop(key)  # a fp32 number in its shortest spelling: 1e-5, not 9.999999747378752e-6
            ours[field] = float(str(np.float32(value))) if isinstance(value, float) else value
        elif field not in OPTIONAL:
            raise ValueError(f"its metadata lacks llama.{key}")
    if (scaling := llama.pop("rope.scaling.type", "none")) == "linear":
        ours["rope_scaling"] = LinearScaling(llama.pop("rope.scaling.factor", None))
    elif scaling != "none":
        raise ValueError(f"its llama.rope.scaling.type is {scaling!r:.40}, expected 'none' or 'linear'")
    config = ModelConfig(**ours, tie_embeddings="output.weight" not in tensors)
    known = {"rope.dimension_count": config.head_dim, "attention.value_length": config.head_dim}
    for key, value in llama.items():  # a setting not understood is refused, because the model is another without it
        if key not in known or value != known[key]:
            expected = f"{known[key]}, the head_dim" if key in known else "no such key"
            raise ValueError(f"its metadata has llama.{key} = {value!r:.60}, expected {expected}")
    return config


def _llama3(config: ModelConfig, path: Path, blocks: Blocks) -> ModelConfig:
    """Llama 3.1 and later: a tensor says how much slower each pair turns. Find the scaling that it was made from."""
    if blocks.shape == (config.head_dim // 2,):
        read_blocks(path, blocks, slower := torch.empty(blocks.shape))
        scaling = Llama3Scaling(float(slower.max()), 1.0, 4.0, 8192)  # but for the factor, the same in all releases
        plain, scaled = replace(config, rope_scaling=None), replace(config, rope_scaling=scaling)
        if torch.allclose(frequencies(plain) / slower, frequencies(scaled), rtol=1e-4, atol=0):
            return scaled
    raise ValueError("its rope_freqs.weight is not the scaling of Llama 3.1 or 3.2, the only one that is supported")
