# %% [markdown]
# # 12 · Exercises: real checkpoints
#
# Chapter: [12 real checkpoints](../chapters/12_checkpoints.ipynb). Run a check as often as you like:
# it says what is wrong.

# %%
import json
import math
import re

import torch
from torch import Tensor

from minillama import ModelConfig, load
from minillama.checkpoint.load import find_checkpoint
from minillama.course import case, check, hint, report
from minillama.data import story_validation
from minillama.rope import halves_to_pairs, pairs_to_halves
from minillama.trainer import mean_loss

SIZES = {"F32": 4, "F16": 2, "BF16": 2, "I64": 8, "U8": 1}  # bytes of one number, by safetensors' names

# %% [markdown] exercise="12.1"
# `read_header(data)`: data is a whole safetensors file → a dictionary, name → (dtype, shape, start, end), as in
# `("F32", (3, 4), 96, 144)`: the tensor's bytes are `data[start:end]`, so start and end are places in the file. `SIZES`
# holds the dtypes. Raise ValueError if
#
# - the file is too short for the header's length, or for the header;
# - a tensor has not as many bytes as its shape and dtype ask for;
# - the tensors do not fill the part behind the header exactly: each of its bytes belongs to one tensor, and they lie in any
#   order. (An empty tensor has no bytes, and may begin where another one does; `[]` is the shape of a single number.)
#
# A header may end in spaces, which its length counts. An entry called `__metadata__` is a note, and no tensor.
#
# For example, let a file hold the bytes 60 0 0 0 0 0 0 0, then `{"a":{"dtype":"BF16","shape":[1,2],"data_offsets":[0,4]}}`
# and 3 spaces, which are 60 bytes together, then 4 bytes more. It gives `{"a": ("BF16", (1, 2), 68, 72)}`.


# %% exercise="12.1"
def read_header(data: bytes) -> dict[str, tuple[str, tuple[int, ...], int, int]]:
    """a file → name → (dtype, shape, start, end)"""
    # <solution>
    first = 8 + int.from_bytes(data[:8], "little")  # of the data
    if first > len(data):
        raise ValueError(f"the file has {len(data)} bytes, and its data would begin at {first}")
    found = {}
    for name, entry in json.loads(data[8:first]).items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            if end - begin != SIZES[entry["dtype"]] * math.prod(entry["shape"]):
                raise ValueError(f"{name} has {end - begin} bytes, which do not fit its shape")
            found[name] = (entry["dtype"], tuple(entry["shape"]), first + begin, first + end)
    place = first
    for begin, end in sorted((begin, end) for _, _, begin, end in found.values()):
        if begin != place:
            raise ValueError(f"a tensor begins at {begin}, expected {place}")
        place = end
    if place != len(data):
        raise ValueError(f"the tensors end at {place}, the file at {len(data)}")
    return found
    # </solution>


# %% [markdown]
# Read the toy's own file with it.

# %% tags=["nbval-ignore-output"]
file = find_checkpoint("toy") / "model.safetensors"
try:
    for name, (dtype, shape, start, end) in list(read_header(file.read_bytes()).items())[:5]:
        print(f"{name:40}{dtype:6}{str(shape):14}{start:>10} to {end}")
except NotImplementedError:
    print("Write 12.1 first.")

# %% [markdown] exercise="12.2"
# `our_name(theirs)`: the name of a tensor in a Hugging Face folder → the name of our parameter. These are theirs, for layer 3
# of any number, in the order of the alphabet:
#
# `lm_head.weight`, `model.embed_tokens.weight`, `model.layers.3.input_layernorm.weight`, `model.layers.3.mlp.down_proj.weight`,
# `….mlp.gate_proj.weight`, `….mlp.up_proj.weight`, `….post_attention_layernorm.weight`, `….self_attn.k_proj.weight`,
# `….self_attn.o_proj.weight`, `….self_attn.q_proj.weight`, `….self_attn.v_proj.weight`, `model.norm.weight`;
#
# and these are ours:
#
# `blocks.3.attention.wk.weight`, `….attention.wo.weight`, `….attention.wq.weight`, `….attention.wv.weight`,
# `….attention_norm.weight`, `….feedforward.down.weight`, `….feedforward.gate.weight`, `….feedforward.up.weight`,
# `….feedforward_norm.weight`, `embedding.weight`, `norm.weight`, `output.weight`.
#
# A name that ends in `rotary_emb.inv_freq` gives None: it can be computed. For any other name raise ValueError: a tensor that
# nobody asked for belongs to another kind of model.
#
# For example `our_name("model.layers.3.self_attn.q_proj.weight")` is `"blocks.3.attention.wq.weight"`.


# %% exercise="12.2"
def our_name(theirs: str) -> str | None:
    """Hugging Face's name → ours, or None"""
    # <solution>
    if theirs.endswith("rotary_emb.inv_freq"):
        return None
    outside = {"lm_head": "output", "model.embed_tokens": "embedding", "model.norm": "norm"}
    inside = {
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "feedforward_norm",
        **{f"self_attn.{letter}_proj": f"attention.w{letter}" for letter in "qkvo"},
        **{f"mlp.{part}_proj": f"feedforward.{part}" for part in ("gate", "up", "down")},
    }
    stem, dot, last = theirs.rpartition(".")
    layer = re.fullmatch(r"model\.layers\.(\d+)\.(.*)", stem)
    if last == "weight" and stem in outside:
        return outside[stem] + ".weight"
    if last == "weight" and layer and layer[2] in inside:
        return f"blocks.{layer[1]}.{inside[layer[2]]}.weight"
    raise ValueError(f"{theirs} is not a weight of LLaMA's")
    # </solution>


# %% [markdown] exercise="12.3"
# `join(parts, whole)`: parts is a list of tensors, one from each of Meta's shards in their order, all of one shape and dtype;
# `whole` is the shape that the config asks for, as a tuple → one tensor of that shape, and of the dtype of the parts.
#
# A part that has the whole's shape is the whole (the norms, or the only shard). If not, the matrix was cut along one axis, and
# the shapes tell which. Raise ValueError if the parts, or the only one, do not make a tensor of the whole's shape.
#
# For example `[[1.], [2.]]` and `[[3.], [4.]]` make `[[1., 3.], [2., 4.]]` for the whole (2, 2), and
# `[[1.], [2.], [3.], [4.]]` for (4, 1).


# %% exercise="12.3"
def join(parts: list[Tensor], whole: tuple[int, ...]) -> Tensor:
    """n × (rows, columns) or n × (dim,) → whole"""
    # <solution>
    if tuple(parts[0].shape) == whole:
        return parts[0]
    for axis in range(len(whole)):
        size = list(parts[0].shape)
        size[axis] *= len(parts)
        if tuple(size) == whole:
            return torch.cat(parts, dim=axis)
    raise ValueError(f"{len(parts)} parts of {tuple(parts[0].shape)} do not make {whole}")
    # </solution>


# %% [markdown] exercise="12.4"
# `dequantize_q8_0(data)`: data (rows, bytes) uint8, the bytes of a matrix in GGUF's Q8_0 → (rows, columns) fp32. A row is a
# sequence of blocks of 34 bytes: a scale, fp16 with the smaller byte first, and 32 codes, signed bytes. A weight is code ·
# scale.
#
# All blocks at once: a matrix of a real model has a million of them, and the check has many.
#
# For example a block that begins with the bytes 0, 56, 2, 255 has the scale 0.5, and its first two weights are 1 and -0.5.


# %% exercise="12.4"
def dequantize_q8_0(data: Tensor) -> Tensor:
    """(rows, bytes) uint8 → (rows, columns) fp32"""
    # <solution>
    blocks = data.unflatten(1, (-1, 34))
    scales = blocks[:, :, :2].contiguous().view(torch.float16)  # (rows, blocks, 1)
    steps = blocks[:, :, 2:].contiguous().view(torch.int8)  # (rows, blocks, 32)
    return (steps.float() * scales.float()).flatten(1)
    # </solution>


# %% [markdown] exercise="12.5"
# `dequantize_q4_1(data)`: data (rows, bytes) uint8, in GGUF's Q4_1 → (rows, columns) fp32. A block of 32 weights has 20 bytes:
# its scale and its smallest value, both fp16 with the smaller byte first, and 16 bytes with two codes each, from 0 to 15. The
# low four bits of the 16 bytes are weights 0 to 15, the high ones are 16 to 31. A weight is code · scale + smallest.
#
# All blocks at once, as in 12.4.
#
# For example a block that begins with the bytes 0, 56, 0, 188, 0x2f has the scale 0.5 and the smallest value -1: its weight 0
# is 6.5, and its weight 16 is 0.


# %% exercise="12.5"
def dequantize_q4_1(data: Tensor) -> Tensor:
    """(rows, bytes) uint8 → (rows, columns) fp32"""
    # <solution>
    blocks = data.unflatten(1, (-1, 20))
    numbers = blocks[:, :, :4].contiguous().view(torch.float16).float()  # (rows, blocks, 2)
    two_codes = blocks[:, :, 4:]
    values = torch.cat([two_codes % 16, two_codes // 16], dim=2).float()  # (rows, blocks, 32)
    return (values * numbers[:, :, :1] + numbers[:, :, 1:]).flatten(1)
    # </solution>


# %% [markdown] exercise="12.6"
# `memory(config, bits, batch, tokens)` → two numbers, the bytes of a model's weights, and of its full key/value cache for
# `batch` rows of `tokens` each. config is a dictionary with the numbers dim, n_layers, n_heads, n_kv_heads, head_dim, ffn_dim
# and vocab_size, and with tie_embeddings, True or False. `bits` is what one number of a matrix takes, its share of the scales
# included: 16.0 in bf16, 8.5 in Q8_0, 5.0 in Q4_1. Embedding and output are matrices, too; norms stay in fp32 all the same,
# and the cache is in bf16.
#
# For example dim = ffn_dim = vocab_size = 10, one layer, one head of 10 and nothing tied are 900 numbers in matrices and 30 in
# norms: with 16 bits 1920 bytes; and each token takes 40 in the cache.


# %% exercise="12.6"
def memory(config: dict, bits: float, batch: int, tokens: int) -> tuple[float, float]:
    """config, bits a number, rows, tokens a row → (bytes of weights, bytes of cache)"""
    # <solution>
    dim, layers = config["dim"], config["n_layers"]
    queries, keys = (config[name] * config["head_dim"] for name in ("n_heads", "n_kv_heads"))
    tables = config["vocab_size"] * dim * (1 if config["tie_embeddings"] else 2)
    block = 2 * dim * queries + 2 * dim * keys + 3 * dim * config["ffn_dim"]
    norm_bytes = 4 * dim * (2 * layers + 1)
    weights = (tables + layers * block) * bits / 8 + norm_bytes
    return weights, 2 * 2 * layers * batch * tokens * keys
    # </solution>


# %% [markdown]
# What would fit on your machine?

# %% tags=["nbval-ignore-output"]
kinds = {"fp32": 32.0, "bf16": 16.0, "Q8_0": 8.5, "Q4_1": 5.0}
try:
    print(f"{'GB':16}", *(f"{kind:>9}" for kind in kinds), "    cache of 2048 tokens")
    for name in ("llama-7b", "llama-13b", "llama-30b", "llama-65b"):
        config = ModelConfig.preset(name).to_dict()
        sizes = [memory(config, bits, 1, 2048) for bits in kinds.values()]
        print(f"{name:16}", *(f"{weights / 1e9:9.1f}" for weights, _ in sizes), f"{sizes[0][1] / 1e9:10.1f}")
except NotImplementedError:
    print("Write 12.6 first.")

# %% [markdown] exercise="12.7"
# In a Hugging Face folder the rows of wq and wk lie in halves, in ours in pairs. Take the toy, and put its wq and wk in all
# blocks as they would lie in that folder. What does it cost to load them wrongly? Measure its mean loss on
# `story_validation(tokenizer, 20, seed=0)` with these rows put back right (from halves to pairs), left as they lie, and
# reordered in the wrong direction (from pairs to halves). `halves_to_pairs` and `pairs_to_halves` take a weight and
# `model.config.head_dim`. Write your prediction down first: without any knowledge the loss would be ln 2048 = 7.6.

# %% exercise="12.7"
measured_12 = {
    "predicted": None,  # nats per token, with the reordering left out, before you measure
    "right": None,
    "left out": None,
    "inverse": None,
    "because": None,  # a sentence
}
# <solution>
model, tokenizer = load("toy")
batches = story_validation(tokenizer, 20, seed=0).batches
head_dim = model.config.head_dim
turned = [w for name, w in model.named_parameters() if name.endswith(("wq.weight", "wk.weight"))]
in_folder = [pairs_to_halves(w.detach(), head_dim).clone() for w in turned]
ways = {"right": halves_to_pairs, "left out": lambda w, head_dim: w, "inverse": pairs_to_halves}
measured_12["predicted"] = 5.0
for way, reorder in ways.items():
    with torch.no_grad():
        for w, rows in zip(turned, in_folder, strict=True):
            w.copy_(reorder(rows, head_dim))
    measured_12[way] = mean_loss(model, batches)
measured_12["because"] = "coordinates that were trained to turn together now turn by the angles of other pairs"
# </solution>

# %% tags=["nbval-ignore-output"]
print(report())
