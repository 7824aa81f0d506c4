"""A LLaMA in Hugging Face's layout: a folder with `config.json` and safetensors, or older `.bin` files.

Its query and key rows lie in halves, ours in pairs (chapter 03), so they move as they are read.
"""

import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minillama.checkpoint.files import read_json
from minillama.checkpoint.names import (
    HUGGING_FACE,
    HUGGING_FACE_CONFIG,
    Checkpoint,
    Start,
    Stored,
    expand,
    part_of,
)
from minillama.checkpoint.safetensors_file import map_tensor, open_safetensors, read_numbers
from minillama.checkpoint.tokenizer_files import open_tokenizer
from minillama.checkpoint.torch_file import dtype_name, open_tensors
from minillama.config import LinearScaling, Llama3Scaling, ModelConfig
from minillama.rope import halves_to_pairs

# Settings that make another model of it, and the values that do not.
REFUSED: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False, None), "mlp_bias": (False, None), "hidden_act": ("silu",), "sliding_window": (None,),
    "num_local_experts": (None,), "partial_rotary_factor": (1, 1.0, None), "quantization_config": (None,),
    "use_qk_norm": (False, None), "no_rope_layers": (None,), "attn_logit_softcapping": (None,),
    "embedding_multiplier": (1, 1.0, None), "logits_scaling": (1, 1.0, None), "residual_multiplier": (1, 1.0, None),
    "attention_multiplier": (None,),
}  # fmt: skip


def is_huggingface(folder: Path) -> bool:
    """Whether a folder's config is Hugging Face's: it names its kind of model, ours does not. A damaged one is not."""
    try:
        return "model_type" in read_json(folder / "config.json")
    except ValueError:
        return False


def open_huggingface(folder: Path) -> Checkpoint:
    """Read all but the weights. Raises ValueError for a folder that is damaged or holds another kind of model."""
    path = folder / "config.json"
    settings = read_json(path)
    try:
        config = config_from(settings)
    except ValueError as error:
        raise ValueError(f"{path}: {str(error).rstrip('.')}.") from None
    names = expand(HUGGING_FACE, config.n_layers)
    stored = []
    for file in _weight_files(folder):
        tensors = _safetensors(file) if file.suffix == ".safetensors" else _pickled(file)
        for key, (shape, dtype, read, mapped) in tensors.items():
            derived = key.endswith("rotary_emb.inv_freq") or (key == "lm_head.weight" and config.tie_embeddings)
            if derived:  # the frequencies follow from the config, a tied output from the embedding
                continue
            if key not in names:
                raise ValueError(f"{file} has the tensor {key!r:.80}, which is not one of LLaMA's.")
            if names[key].endswith(("wq.weight", "wk.weight")):
                read, mapped = partial(_turn, read, config.head_dim), None
            stored.append(Stored(key, names[key], shape, dtype, read, mapped))
    return Checkpoint(config, open_tokenizer(folder), stored)


def config_from(theirs: dict[str, Any]) -> ModelConfig:
    """Our config for the contents of their `config.json`, old or new. Raises ValueError for a setting not supported."""
    if (kind := theirs.get("model_type")) != "llama":
        raise ValueError(f"its model_type is {kind!r:.40}, expected 'llama'")
    for key, harmless in REFUSED.items():
        if key in theirs and theirs[key] not in harmless:
            raise ValueError(f"it has {key} = {theirs[key]!r:.60}, expected {harmless[0]!r} or no such key")
    ours: dict[str, Any] = {"rope_theta": 10_000.0, "norm_eps": 1e-6}  # LlamaConfig's own, where a file is silent
    for field, key in HUGGING_FACE_CONFIG.items():
        if theirs.get(key) is not None:
            ours[field] = theirs[key]
    rope = theirs.get("rope_parameters") or theirs.get("rope_scaling") or {}  # since version 5, and before
    if not isinstance(rope, dict):
        raise ValueError(f"its settings for positions are {rope!r:.60}, expected a dictionary")
    if "rope_theta" in rope:
        ours["rope_theta"] = rope["rope_theta"]
    if missing := [HUGGING_FACE_CONFIG[key] for key in ("dim", "n_layers", "n_heads", "vocab_size") if key not in ours]:
        raise ValueError(f"it lacks {missing[0]}")
    ours.setdefault("max_seq_len", 2048)
    ours.setdefault("ffn_dim", 11008)
    tied = theirs.get("tie_word_embeddings", False)
    config = ModelConfig(**ours, tie_embeddings=tied)
    return replace(config, rope_scaling=_scaling(rope, config.max_seq_len))


def _scaling(rope: dict[str, Any], context: int) -> LinearScaling | Llama3Scaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    known = {"rope_type", "type", "rope_theta", "factor"}
    if kind == "llama3":
        known |= {"low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
    if kind not in ("default", "linear", "llama3") or (odd := sorted(rope.keys() - known)):
        what = f"a scaling of positions of the type {kind!r:.40}"
        if kind in ("default", "linear", "llama3"):
            what += f" with {odd[0]!r:.40}"
        raise ValueError(f"it has {what}, expected default, linear or llama3")
    if kind == "default":
        return None
    if kind == "linear":
        return LinearScaling(rope.get("factor"))  # type: ignore[arg-type]  # checked there
    values = [rope.get(key) for key in ("factor", "low_freq_factor", "high_freq_factor")]
    return Llama3Scaling(*values, rope.get("original_max_position_embeddings", context))  # type: ignore[call-arg,arg-type]


# ---------------------------------------------------------------------------------------------------------------------
# Files and tensors.


def _weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights: those that an index names, or else all that are named like weights."""
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        index = folder / f"{stem}.{suffix}.index.json"
        if index.exists():
            places = read_json(index).get("weight_map")
            if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
                raise ValueError(f"{index} has no weight_map from tensors to files.")
            names = sorted(set(places.values()))
            for name in names:
                if name != os.path.basename(name) or not name.endswith(f".{suffix}"):
                    raise ValueError(f"{index} names {name!r:.80}, expected a .{suffix} file in the same folder.")
                if not (folder / name).exists():
                    raise ValueError(f"{index} names {name!r:.80}, which is not there: get the whole checkpoint.")
            return [folder / name for name in names]
        if files := sorted(folder.glob(f"{stem}*.{suffix}")):
            return files
    raise ValueError(f"{folder} has no weights: expected model*.safetensors or pytorch_model*.bin in it.")


# key -> shape, dtype, and of a `Stored` read and mapped
Tensors = dict[str, tuple[tuple[int, ...], str, Callable[[Tensor, Start], None], Callable[[], Tensor] | None]]


def _safetensors(path: Path) -> Tensors:
    return {
        key: (numbers.shape, numbers.dtype, partial(read_numbers, path, numbers), partial(map_tensor, path, key))
        for key, numbers in open_safetensors(path).items()
    }


def _pickled(path: Path) -> Tensors:
    found = open_tensors(path)
    for key, tensor in found.items():
        if not tensor.is_floating_point() and not key.endswith("inv_freq"):
            raise ValueError(f"{path}: {key!r:.80} is {tensor.dtype}, expected floating-point numbers.")
    return {
        key: (tuple(tensor.shape), dtype_name(tensor), partial(_copy, tensor), partial(found.__getitem__, key))
        for key, tensor in found.items()
    }


def _copy(tensor: Tensor, out: Tensor, start: Start) -> None:
    out.copy_(part_of(tensor, tuple(out.shape), start))


def _turn(read: Callable[[Tensor, Start], None], head_dim: int, out: Tensor, start: Start) -> None:
    """Fill `out` with whole heads of queries or keys, whose rows move within each."""
    theirs = torch.empty_like(out, device="cpu")
    read(theirs, start)
    out.copy_(halves_to_pairs(theirs, head_dim))
