# %% [markdown]
# # 16 · Exercises: scaling up
#
# Chapter: [16 scaling up](../chapters/16_scaling_up.ipynb). Run a check as often as you like:
# it says what is wrong.

# %%
import math
import random

import torch
import torch.nn.functional as F
from torch import Tensor

from minillama import ModelConfig, load, world
from minillama.course import case, check, hint, report
from minillama.model import Block
from minillama.rope import frequencies, rotation

# %% [markdown] exercise="16.1"
# `all_reduce_mean(sums, counts)`: n ranks stand in a ring, rank r sends to rank r + 1, and the last one to rank 0. Of each there is
#
# - sums[r] (N,), fp32, fp16 or bf16: the sum of its gradients over the tokens that it scored;
# - counts[r]: how many those were, maybe 0.
#
# → three lists of length n:
#
# - halfway: the piece of the sum that each rank has whole after the reduce-scatter, fp32, not divided yet;
# - results (N,), fp32: what each rank has in the end, the mean over the scored tokens of all ranks. If there are none, zeros;
# - sent: how many numbers each rank has sent in both halves together, the count of tokens not included.
#
# The steps are those of the chapter: in step s = 0 … n − 2 of the reduce-scatter, rank r sends its piece r − s, counted round, and
# the receiver adds it; in step s of the all-gather it sends its piece r + 1 − s, which replaces the receiver's. But N need not be a
# multiple of n: the first N mod n pieces hold one number more than the others, and there may be more ranks than numbers. Add up in
# fp32, and leave the given tensors as they are.
#
# For example three ranks with the sums `[1, 2, 3, 4]`, `[10, 20, 30, 40]`, `[100, 200, 300, 400]` cut them into pieces of 2, 1 and 1
# numbers. Halfway, rank 0 has `[333]`, rank 1 `[444]` and rank 2 `[111, 222]`. With the counts 2, 0 and 9 all end with
# `[10.09, 20.18, 30.27, 40.36]`, and have sent 6, 5 and 5 numbers.


# %% exercise="16.1"
def all_reduce_mean(sums: list[Tensor], counts: list[int]) -> tuple[list[Tensor], list[Tensor], list[int]]:
    """n × (N,), n counts → halfway n × (piece,), results n × (N,), sent n numbers"""
    # <solution>
    n = len(sums)
    held = [[piece.clone() for piece in one.float().tensor_split(n)] for one in sums]  # held[rank][piece]
    sent = [0] * n
    halfway = []
    for first in (0, 1):  # the piece that a rank begins with, from its own number
        for step in range(n - 1):
            moving = [held[rank][(rank + first - step) % n].clone() for rank in range(n)]
            for rank, values in enumerate(moving):
                pieces, piece = held[(rank + 1) % n], (rank + first - step) % n
                pieces[piece] = values if first else pieces[piece] + values
                sent[rank] += len(values)
        if not first:
            halfway = [held[rank][(rank + 1) % n].clone() for rank in range(n)]
    scored = max(sum(counts), 1)
    return halfway, [torch.cat(pieces) / scored for pieces in held], sent
    # </solution>


# %% [markdown] exercise="16.2"
# `adam_bytes(shapes, ranks, stage, precision)`: a model's parameters have the given shapes, a list of tuples of at least one number. Which
# bytes does rank 0 of so many ranks hold to train it with Adam? → a dictionary of four whole numbers:
#
# | key | in "fp32" | in "bf16" | divided from |
# |---|---|---|---|
# | `"weights"` | fp32 | bf16 | stage 3 |
# | `"gradients"` | fp32 | bf16 | stage 2 |
# | `"moments"` | Adam's m and v in fp32 | the same | stage 1 |
# | `"master"` | none: 0 | a copy of the weights in fp32 | stage 1 |
#
# Stage 0 divides nothing. The chapter lays all parameters in one row and cuts that. Libraries of today cut each parameter for itself
# along its first axis, into whole rows, and the first rank never has fewer than another: of 10 rows on 4 ranks it has 3. If there are
# fewer rows than ranks, the first ranks have one each.
#
# For example shapes = `[(10, 6), (6,)]` on 4 ranks are 66 numbers, or 3·6 + 2 = 20 if divided. At stage 2 in bf16 that is
# `{"weights": 132, "gradients": 40, "moments": 160, "master": 80}`.


# %% exercise="16.2"
def adam_bytes(shapes: list[tuple[int, ...]], ranks: int, stage: int, precision: str) -> dict[str, int]:
    """shapes, ranks, stage 0 to 3, "fp32" or "bf16" → bytes on rank 0 of each part"""
    # <solution>
    whole = divided = 0
    for rows, *rest in shapes:
        whole += rows * math.prod(rest)
        divided += math.ceil(rows / ranks) * math.prod(rest)
    half = precision == "bf16"
    return {
        "weights": (2 if half else 4) * (divided if stage == 3 else whole),
        "gradients": (2 if half else 4) * (divided if stage >= 2 else whole),
        "moments": 8 * (divided if stage >= 1 else whole),
        "master": (4 if half else 0) * (divided if stage >= 1 else whole),
    }
    # </solution>


# %% [markdown]
# The toy at stage 3: where does one more rank no longer help, and why?

# %% tags=["nbval-ignore-output"]
model, tokenizer = load("toy")
shapes = [tuple(parameter.shape) for parameter in model.parameters()]
try:
    for ranks in (1, 4, 7, 48, 300, 2048):
        held = adam_bytes(shapes, ranks, 3, "bf16")
        even = 16 * sum(math.prod(shape) for shape in shapes) / ranks
        print(f"{ranks:4} ranks: {sum(held.values()):>10,} bytes, {sum(held.values()) / even:.2f} × an even share")
except NotImplementedError:
    print("Write 16.2 first.")

# %% [markdown] exercise="16.3"
# `parallel_layers(x, up, up_bias, down, down_bias, widths)`: two linear layers with SiLU between them,
# `SiLU(x · upᵀ + up_bias) · downᵀ + down_bias`, on n ranks that exchange one thing: an all-reduce at the end.
#
# - x (..., in), the same on all ranks; up (F, in), up_bias (F,); down (out, F), down_bias (out,) or None; all fp32;
# - widths: how many of the F hidden numbers each rank makes, n whole numbers with the sum F. They may differ, as do shares of 5 heads on 2 ranks, and
#   may be 0. Rank 0 makes the first ones, rank 1 those behind them, and so on.
#
# → three things, computed from each rank's own part of both weights:
#
# - hidden: n tensors (..., widths[r]), what each rank has behind SiLU;
# - parts: n tensors (..., out), what each rank puts into the all-reduce, without down_bias;
# - y (..., out): what all of them have in the end.
#
# For example x = `[1.0]`, up = `[[1], [2], [3]]`, up_bias of zeros, down = `[[1, 1, 1]]`, down_bias = `[5]` and widths = `[1, 2]`: hidden is
# `[0.731]` and `[1.762, 2.858]`, the parts are `[0.731]` and `[4.619]`, and y is `[10.350]`.


# %% exercise="16.3"
def parallel_layers(
    x: Tensor, up: Tensor, up_bias: Tensor, down: Tensor, down_bias: Tensor | None, widths: list[int]
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """(..., in), (F, in), (F,), (out, F), (out,) → n × (..., F_r), n × (..., out), (..., out)"""
    # <solution>
    hidden, parts = [], []
    for rows, bias, columns in zip(up.split(widths), up_bias.split(widths), down.split(widths, dim=1), strict=True):
        hidden.append(F.silu(x @ rows.T + bias))
        parts.append(hidden[-1] @ columns.T)
    y = torch.stack(parts).sum(dim=0)
    return hidden, parts, y if down_bias is None else y + down_bias
    # </solution>


# %% [markdown] exercise="16.4"
# `activation_bytes(shape, batch, tokens, size, group)`: what do the blocks keep for the backward pass? shape is a dictionary with
# `"dim"`, `"ffn_dim"`, `"n_heads"`, `"n_kv_heads"`, `"head_dim"` and `"n_layers"`; there are `batch` rows of `tokens` tokens. For each token, a
# block keeps
#
# - three vectors of dim numbers for each of its two norms: the norm's input, that vector normalized, and that times the norm's weight;
# - queries and attention's result, for each query head; keys and values, for each key head (not repeated for the query heads);
# - four vectors of ffn_dim numbers: gate, SiLU of it, up, and the product of those two;
# - in fp32, whatever the rest: one number for each of the two norms, one by its input's root mean square, and one for each query head, the
#   logarithm of its softmax's sum. The scores themselves are never kept.
#
# All but the last take `size` bytes a number. If group is 0, all of this is kept in all blocks. Otherwise the blocks are put in groups of
# `group`, the last one smaller if they do not come out even, and of each group the forward pass keeps nothing but the input of its first
# block. The backward pass goes from the last group to the first: it computes a group once more, now with everything kept, goes
# back through it, and frees it and its input.
#
# → the bytes that are kept at the worst moment, when a group has just been computed once more; without groups, at the end of the forward
# pass. A whole number.
#
# For example with 8, 20, 2, 1, 4 and 3 for the six keys, a token has 152 numbers of `size` bytes in a block, and 4 in fp32: at size 2
# that is 320 bytes. One row of 5 tokens has 4800 bytes with group 0, and 1760 with group 1: two inputs of 16 bytes wait while the third
# block has its 320.


# %% exercise="16.4"
def activation_bytes(shape: dict[str, int], batch: int, tokens: int, size: int, group: int) -> int:
    """shape, rows, tokens per row, bytes per number, blocks per group or 0 → bytes"""
    # <solution>
    numbers = 6 * shape["dim"] + 4 * shape["ffn_dim"]
    numbers += 2 * (shape["n_heads"] + shape["n_kv_heads"]) * shape["head_dim"]
    block = size * numbers + 4 * (2 + shape["n_heads"])
    layers = shape["n_layers"]
    worst = layers * block
    if group:
        moments = enumerate(range(0, layers, group))  # groups before this one, its first block
        worst = max(before * size * shape["dim"] + min(group, layers - i) * block for before, i in moments)
    return batch * tokens * worst
    # </solution>


# %% [markdown]
# Does a real block keep what you counted? PyTorch says what it saves, if it is asked. A block of minillama's in fp32 keeps what the list
# has, and 3,840 bytes for the rotation of 40 positions, whatever the batch. But it repeats keys and values for the query heads: where there
# are fewer key heads, that is more.


# %% tags=["nbval-ignore-output"]
def kept(shape: dict[str, int], batch: int, tokens: int) -> int:
    """Bytes that a block of minillama's saves for the backward pass, besides its weights"""
    config = ModelConfig(vocab_size=50, max_seq_len=tokens, **shape)
    block, turn = Block(config), rotation(frequencies(config), torch.arange(tokens))
    saved = {}

    def note(t: Tensor) -> Tensor:
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        y = block(torch.randn(batch, tokens, config.dim).requires_grad_(), turn, None)
    for weight in block.parameters():
        saved.pop(weight.untyped_storage().data_ptr(), None)
    del y  # until here it holds all that was saved
    return sum(saved.values())


try:
    for kv_heads in (6, 2):
        shape = {"dim": 96, "ffn_dim": 260, "n_heads": 6, "n_kv_heads": kv_heads, "head_dim": 12, "n_layers": 1}
        counted = activation_bytes(shape, 3, 40, 4, 0)
        print(f"{kv_heads} key heads: counted {counted:,} bytes, measured {kept(shape, 3, 40):,}")
except NotImplementedError:
    print("Write 16.4 first.")

# %% [markdown]
# How large should a group be? LLaMA 65B, one row of 2048 tokens in bf16:

# %% tags=["nbval-ignore-output"]
shape = {"dim": 8192, "ffn_dim": 22_016, "n_heads": 64, "n_kv_heads": 64, "head_dim": 128, "n_layers": 80}
try:
    for group in (0, 1, 2, 4, 8, 16, 40, 80):
        print(f"group {group:2}: {activation_bytes(shape, 1, 2048, 2, group) / 1e9:6.1f} GB")
except NotImplementedError:
    print("Write 16.4 first.")

# %% [markdown] exercise="16.5"
# `compute_optimal(flops, a, b, A, B, available)`: training a model of N parameters on D tokens costs C = 6·N·D operations, and ends at a loss
# of E + A/N^a + B/D^b ([Hoffmann et al. 2022](https://arxiv.org/abs/2203.15556), approach 3). flops (K,), fp32 or fp64, are K budgets. Each is to be
# spent whole, so that the loss is as low as can be; but there are only `available` tokens of text (maybe `math.inf`), and none is read twice.
# → three tensors (K,) fp64, all computed in fp64:
#
# - the parameters N, which need not be whole numbers;
# - the tokens D;
# - the part of the loss that lies above E.
#
# No loop over budgets: the check has many. For example with a = b = 0.5, A = 200, B = 400 the budget 2.4e11 is best spent on 1e5
# parameters and 4e5 tokens, at 0.632 + 0.632 above E; if there are only 2e5 tokens, on 2e5 parameters, at 0.447 + 0.894.


# %% exercise="16.5"
def compute_optimal(
    flops: Tensor, a: float, b: float, A: float, B: float, available: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(K,) operations, the law's numbers, tokens → parameters (K,), tokens (K,), nats above E (K,)"""
    # <solution>
    product = flops.double() / 6  # N · D
    params = (a * A / (b * B) * product**b) ** (1 / (a + b))
    tokens = (product / params).clamp(max=available)
    params = product / tokens
    return params, tokens, A * params**-a + B * tokens**-b
    # </solution>


# %% [markdown]
# Two fits of the same runs: Hoffmann's own numbers, and those of [Besiroglu et al. 2024](https://arxiv.org/abs/2404.10102), who fitted again. What would each
# have done with the compute of LLaMA 7B and 65B, and of Llama 3 405B?

# %% tags=["nbval-ignore-output"]
runs = {"LLaMA 7B": (6.7e9, 1.0e12), "LLaMA 65B": (65.2e9, 1.4e12), "Llama 3 405B": (405e9, 15.6e12)}
budgets = torch.tensor([6 * n * d for n, d in runs.values()])
laws = {"Hoffmann": (0.34, 0.28, 406.4, 410.7), "Besiroglu": (0.3478, 0.3658, 482.01, 2085.43)}
try:
    for name, law in laws.items():
        params, tokens, _ = compute_optimal(budgets, *law, math.inf)
        for run, n, d in zip(runs, params.tolist(), tokens.tolist(), strict=True):
            print(f"{name:9} {run:12}: {n / 1e9:6.1f}B parameters, {d / 1e12:5.1f}T tokens, {d / n:4.0f} per parameter")
except NotImplementedError:
    print("Write 16.5 first.")

# %% [markdown] exercise="16.6"
# What does a wrong all-reduce do? Two ranks train the toy further: rank 0 has 12 whole stories, rank 1 has only the openings of 12 others, 9 tokens of
# each. An opening is where the names and things are still open, so nobody can know them.
#
# `gradients(rows)` below gives the sum over all scored tokens of their surprise's gradient, all parameters in one vector (P,), and the count of these
# tokens. The right gradient g is the mean over the tokens of both ranks. For each way to put the two ranks' numbers together, measure how far
# the result h is off, ‖h − g‖ / ‖g‖, with the root of the sum of all squares as size:
#
# - "by tokens": the two sums are added and divided by both counts. To compare, take g from all 24 rows at once;
# - "mean of means" and "sum of means": each rank divides by its own count; then their mean, or their sum;
# - "one rank": rank 0 never gets what rank 1 sends, and takes its own mean;
# - "bf16": each rank divides its sum by the tokens of both, rounds it to bf16, and the two are added in bf16.
#
# Write down first how far off you expect the mean of means.

# %% exercise="16.6"
rng = random.Random(16)
rows = [tokenizer.encode(world.sample(rng).text, bos=True, eos=True) for _ in range(24)]
ranks = [rows[:12], [row[:9] for row in rows[12:]]]


def gradients(rows: list[list[int]]) -> tuple[Tensor, int]:
    """rows of tokens → the sum of the gradients (P,), the count of scored tokens"""
    model.zero_grad()
    for row in rows:
        tokens = torch.tensor([row])
        log_probs = model(tokens[:, :-1]).log_softmax(-1)
        (-log_probs.gather(2, tokens[:, 1:, None]).sum()).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()]), sum(len(row) - 1 for row in rows)


measured_16 = {
    "predicted": None,  # how far off the mean of means is, as a share of the gradient's size, before you measure
    "by tokens": None,
    "mean of means": None,
    "sum of means": None,
    "one rank": None,
    "bf16": None,
    "because": None,  # a sentence
}
# <solution>
total, count = gradients([*ranks[0], *ranks[1]])
g = total / count
(first, n0), (second, n1) = (gradients(part) for part in ranks)
ways = {
    "by tokens": (first + second) / (n0 + n1),
    "mean of means": (first / n0 + second / n1) / 2,
    "sum of means": first / n0 + second / n1,
    "one rank": first / n0,
    "bf16": (first / count).bfloat16() + (second / count).bfloat16(),
}
measured_16["predicted"] = 1.0
for name, h in ways.items():
    measured_16[name] = ((h.float() - g).norm() / g.norm()).item()
measured_16["because"] = "few tokens of large gradients count as much as many tokens that the model knows already"
# </solution>

# %% tags=["nbval-ignore-output"]
print(report())
