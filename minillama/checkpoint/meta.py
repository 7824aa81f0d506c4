"""A LLaMA in Meta's own layout: a folder with `params.json` and `consolidated.NN.pth`, one file for each device.

Each file holds a slice of every matrix (Shoeybi et al. 2019, "Megatron-LM", section 3): some are cut across their rows,
some across their columns, norms are whole in each. Which is which is told by the shapes, since the embedding was cut
along one axis in LLaMA 1 and 2 and along the other in 3. Query and key rows lie in pairs, as ours.
"""

from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from minillama.checkpoint.files import read_json
from minillama.checkpoint.names import META, Checkpoint, Start, Stored, expand, part_of
from minillama.checkpoint.tokenizer_files import open_tokenizer
from minillama.checkpoint.torch_file import dtype_name, open_tensors
from minillama.config import Llama3Scaling, ModelConfig
from minillama.tokenizer import Tokenizer

KNOWN = {
    "dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "ffn_dim_multiplier", "norm_eps",
    "rope_theta", "use_scaled_rope", "max_seq_len", "max_batch_size", "model_parallel_size",
}  # fmt: skip
DERIVED = "rope.freqs"  # the rotary frequencies, which follow from params.json


def open_meta(folder: Path) -> Checkpoint:
    """Read all but the weights. Raises ValueError for a folder that is damaged or holds another kind of model."""
    files = sorted(folder.glob("consolidated.*.pth"))
    expected = [f"consolidated.{i:02}.pth" for i in range(len(files))]
    if not files or [file.name for file in files] != expected:
        found = ", ".join(file.name for file in files) or "none"
        raise ValueError(f"{folder} has the weight files {found}, expected consolidated.00.pth and on without a gap.")
    shards = [open_tensors(file) for file in files]
    for file, shard in zip(files, shards, strict=True):
        if odd := sorted(shard.keys() ^ shards[0].keys()):
            raise ValueError(f"{file} and {files[0].name} do not have the same tensors: {odd[0]!r:.80} is in one only.")
    tokenizer = open_tokenizer(folder)
    path = folder / "params.json"
    params = read_json(path)
    try:
        config = _config(params, shards, tokenizer)
    except ValueError as error:
        raise ValueError(f"{path}: {str(error).rstrip('.')}.") from None
    names, shapes = expand(META, config.n_layers), _shapes(config)
    stored = []
    for key in shards[0]:
        if key == DERIVED:
            continue
        if key not in names:
            raise ValueError(f"{files[0]} has the tensor {key!r:.80}, which is not one of LLaMA's.")
        parts = [shard[key] for shard in shards]
        shape, axis = _joined(key, [tuple(part.shape) for part in parts], shapes[names[key]])
        mapped = (lambda part=parts[0]: part) if axis is None else None
        stored.append(Stored(key, names[key], shape, dtype_name(parts[0]), partial(_fill, parts, axis), mapped))
    return Checkpoint(config, tokenizer, stored)


def _config(params: dict[str, Any], shards: list[dict[str, Tensor]], tokenizer: Tokenizer | None) -> ModelConfig:
    if unknown := sorted(params.keys() - KNOWN):
        raise ValueError(f"it has {unknown[0]} = {params[unknown[0]]!r:.60}, which is not one of LLaMA 1 to 3's")
    if missing := [name for name in ("dim", "n_layers", "n_heads") if name not in params]:
        raise ValueError(f"it lacks {missing[0]}")
    gate = shards[0].get("layers.0.feed_forward.w1.weight")
    if gate is None or gate.dim() != 2:
        raise ValueError("the weights lack layers.0.feed_forward.w1.weight")
    vocab_size = params.get("vocab_size", -1)
    if vocab_size == -1:  # LLaMA 1 and 2: as many as the tokenizer has
        if tokenizer is None:
            raise ValueError("its vocab_size is -1, the tokenizer's, but there is no tokenizer.model in the folder")
        vocab_size = tokenizer.vocab_size
    scaled = params.get("use_scaled_rope", False)
    given = ("dim", "n_layers", "n_heads", "norm_eps", "rope_theta")
    fields: dict[str, Any] = {name: params[name] for name in given if name in params}
    if params.get("n_kv_heads") is not None:
        fields["n_kv_heads"] = params["n_kv_heads"]
    return ModelConfig(
        **fields,
        vocab_size=vocab_size,
        ffn_dim=gate.shape[0] * len(shards),  # the rounding rule is not needed where the width can be read
        max_seq_len=params.get("max_seq_len", 131072 if scaled else 8192 if "rope_theta" in params else 2048),
        rope_scaling=Llama3Scaling(8.0, 1.0, 4.0, 8192) if scaled else None,  # as in the release's reference code
        tie_embeddings="output.weight" not in shards[0],
    )


def _shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The whole shape of each of our parameters."""
    queries, keys = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    one = {
        "attention.wq": (queries, config.dim), "attention.wk": (keys, config.dim), "attention.wv": (keys, config.dim),
        "attention.wo": (config.dim, queries), "feedforward.gate": (config.ffn_dim, config.dim),
        "feedforward.up": (config.ffn_dim, config.dim), "feedforward.down": (config.dim, config.ffn_dim),
        "attention_norm": (config.dim,), "feedforward_norm": (config.dim,),
    }  # fmt: skip
    blocks = {f"blocks.{i}.{name}.weight": shape for i in range(config.n_layers) for name, shape in one.items()}
    table = (config.vocab_size, config.dim)
    return {"embedding.weight": table, "output.weight": table, "norm.weight": (config.dim,), **blocks}


def _joined(key: str, parts: list[tuple[int, ...]], whole: tuple[int, ...]) -> tuple[tuple[int, ...], int | None]:
    """The shape that the shards' parts make together, and along which axis they are joined (None: all are whole)."""
    if all(part == whole for part in parts):
        return whole, None
    for axis in range(len(whole)):
        rest = [part[:axis] + part[axis + 1 :] for part in parts]
        if all(len(part) == len(whole) for part in parts) and set(rest) == {whole[:axis] + whole[axis + 1 :]}:
            if sum(part[axis] for part in parts) == whole[axis]:
                return whole, axis
    raise ValueError(f"the parts of {key} have the shapes {', '.join(map(str, parts))}, which do not make {whole}.")


def _fill(parts: list[Tensor], axis: int | None, out: Tensor, start: Start) -> None:
    if axis is None:
        out.copy_(part_of(parts[0], tuple(out.shape), start))
        return
    first, last = start[axis], start[axis] + out.shape[axis]  # of what is asked for, along the axis
    begin = 0
    for part in parts:
        end = begin + part.shape[axis]
        if (left := max(begin, first)) < (right := min(end, last)):
            piece = out.narrow(axis, left - first, right - left)
            within = (left - begin, start[1]) if axis == 0 else (start[0], left - begin)
            piece.copy_(part_of(part, tuple(piece.shape), within))
        begin = end
