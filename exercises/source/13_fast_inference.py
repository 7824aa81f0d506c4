# %% [markdown]
# # 13 · Exercises: fast inference
#
# Chapter: [13 fast inference](../chapters/13_fast_inference.ipynb). Run a check as often as you like:
# it says what is wrong.

# %%
import torch
from torch import Tensor

from minillama import ModelConfig, load
from minillama.course import case, check, hint, report
from minillama.data import story_validation
from minillama.trainer import mean_loss

# %% [markdown] exercise="13.1"
# `int8_product(x, weight)`: x (..., in), with any axes before the last; weight (out, in), each fp32 or bf16 → three tensors:
#
# - codes (out, in) int8: the weights in steps of their row's scale, each rounded to the nearest whole number;
# - scales (out,) fp32, where the chapter has bf16: what one step is worth. The largest weight of a row, by size, becomes
#   127 or -127;
# - y (..., out) fp32: the product of x with the weight that the codes stand for, transposed.
#
# A row of zeros has zeros as codes, and the scale 0. Compute in fp32. Do not make a second weight out of codes and scales: a
# scale is common to the sum of a row, so `out` multiplications for a row of x are enough, instead of `out` times `in`. And all
# rows at once: the check has thousands.
#
# For example the weight `[[2.54, -1.0]]` has the codes `[[127, -50]]` and the scale `[0.02]`; x = `[1.0, 1.0]` gives
# y = `[1.54]`, which is 77 steps.


# %% exercise="13.1"
def int8_product(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(..., in), (out, in) → codes (out, in) int8, scales (out,), y (..., out)"""
    # <solution>
    weight = weight.float()
    scales = weight.abs().amax(dim=1) / 127
    divisors = scales.masked_fill(scales == 0, 1.0)
    codes = torch.round(weight / divisors[:, None]).to(torch.int8)
    y = (x.float() @ codes.float().T) * scales
    return codes, scales, y
    # </solution>


# %% [markdown] exercise="13.2"
# `int4_groups(weight, group)`: weight (out, in), fp32 or bf16, with an even `in` that `group` divides → three tensors:
#
# - packed (out, in/2) uint8: the codes, from 0 to 15, two in a byte. Neighbours share it: columns 0 and 1, then 2 and 3, and so
#   on, the first in the low four bits, the second in the high ones;
# - scales (out, in/group) fp32: what one step is worth in each group of `group` neighbours of a row;
# - lows (out, in/group) fp32: the smallest weight of each group.
#
# A weight is about code · scale + low. In each group the smallest weight becomes 0, the largest 15, and each code is the
# nearest one. A group of equal weights has zeros as codes, and the scale 0. `group` may be odd: then there are bytes whose two
# codes belong to two groups. Compute in fp32, and all groups at once: the check has many.
#
# For example the weight `[[0.0, 3.0, 1.0, -1.0]]` in groups of 2 has the codes 0, 15, 15, 0, so the bytes `[[240, 15]]`, the
# scales `[[0.2, 0.1333]]` and the lows `[[0.0, -1.0]]`.


# %% exercise="13.2"
def int4_groups(weight: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """(out, in) → packed (out, in/2) uint8, scales and lows (out, in/group)"""
    # <solution>
    grouped = weight.float().unflatten(1, (-1, group))  # (out, groups, group)
    lows, highs = grouped.amin(dim=2), grouped.amax(dim=2)
    scales = (highs - lows) / 15
    divisors = scales.masked_fill(scales == 0, 1.0)
    steps = (grouped - lows[:, :, None]) / divisors[:, :, None]
    codes = steps.round().clamp(0, 15).to(torch.uint8).flatten(1)  # (out, in)
    return codes[:, 0::2] + 16 * codes[:, 1::2], scales, lows
    # </solution>


# %% [markdown]
# What do groups buy? A matrix of normal numbers with one outlier in each row, the error per weight, and the bits.

# %% tags=["nbval-ignore-output"]
weight = torch.randn(64, 1024, generator=torch.Generator().manual_seed(0))
weight[:, 0] = 10
try:
    for group in (16, 32, 128, 1024):
        packed, scales, lows = int4_groups(weight, group)
        codes = torch.stack([packed % 16, packed // 16], dim=2).view(64, -1, group)
        back = (codes * scales[:, :, None] + lows[:, :, None]).flatten(1)
        error = (back - weight).square().mean().sqrt().item()
        print(f"groups of {group:4}: error {error:.3f}, {4 + 32 / group:.2f} bits a weight with its numbers in bf16")
except NotImplementedError:
    print("Write 13.2 first.")

# %% [markdown] exercise="13.3"
# `cache_bytes(config, lengths, bytes_per_number, padded)` → the bytes of the key/value cache of several texts, one number.
# config is a dictionary with dim, n_layers, n_heads, n_kv_heads and head_dim; `lengths` is a list with the tokens of each text,
# and may be empty.
#
# If `padded` is True, the cache is one tensor, in which each row is as long as the longest. If not, it is made of pages of 16
# tokens, as in servers: a text has as many whole pages as it needs, and no two texts share one. A text of no tokens has none.
#
# For example two layers with one key/value head of 10, and 2 bytes a number, take 80 bytes a token. Lengths 5 and 20 are 40
# tokens when they are padded, so 3200 bytes, and 16 + 32 tokens in pages, so 3840 bytes.


# %% exercise="13.3"
def cache_bytes(config: dict, lengths: list[int], bytes_per_number: int, padded: bool) -> int:
    """config, tokens of each text, bytes, one tensor or pages → bytes"""
    # <solution>
    token = 2 * config["n_layers"] * config["n_kv_heads"] * config["head_dim"] * bytes_per_number
    if padded:
        return token * len(lengths) * max(lengths, default=0)
    return token * 16 * sum((length + 15) // 16 for length in lengths)
    # </solution>


# %% [markdown]
# What do eight texts of different lengths take in the cache?

# %% tags=["nbval-ignore-output"]
lengths = [40, 100, 100, 250, 300, 700, 1100, 2048]
try:
    for name in ("smollm2-135m", "llama-7b", "llama3-8b", "llama2-70b"):
        config = ModelConfig.preset(name).to_dict()
        sizes = [cache_bytes(config, lengths, 2, padded) / 1e9 for padded in (True, False)]
        print(f"{name:14} {sizes[0]:7.2f} GB padded {sizes[1]:7.2f} GB in pages")
except NotImplementedError:
    print("Write 13.3 first.")

# %% [markdown] exercise="13.4"
# `accept(guesses, q, p, chances)`: the tokens that are written after a small model has guessed k tokens, and the large one has
# looked at them in one pass (Leviathan et al. 2023, algorithm 1).
#
# - guesses (k,) int64: token i was drawn from q[i]; k may be 0;
# - q (k, V): the small model's probabilities at each place;
# - p (k+1, V): the large model's at the same places, and at the one behind the last guess;
# - chances (k+1,): numbers from 0 to below 1, drawn for you, so that the result is certain.
#
# Guess x at place i is kept if chances[i] is below p[i, x] / q[i, x]. The first that is refused ends it: those behind it
# are dropped, whatever their chances say, and in its place a token is drawn from what p[i] exceeds q[i] by, that is max(0, p − q),
# divided by its sum, with chances[i+1]. If all are kept, one more is drawn from the last p, with chances[k].
#
# To draw with a chance u: the first token at which the sum of the probabilities, from token 0 on, is above u.
#
# → (n,) int64, n from 1 to k+1: the guesses that are kept, and the token drawn. No loop over the guesses: the check has many.
#
# For example the guess `[0]` with q = `[[0.8, 0.2]]`, p = `[[0.4, 0.6], [0.3, 0.7]]` is kept below the chance 0.5. The
# chances `[0.45, 0.5]` give `[0, 1]`, and `[0.55, 0.5]` give `[1]`, since max(0, p − q) is `[0, 0.4]`.


# %% exercise="13.4"
def accept(guesses: Tensor, q: Tensor, p: Tensor, chances: Tensor) -> Tensor:
    """(k,), (k, V), (k+1, V), (k+1,) → (n,) with 1 <= n <= k+1"""
    # <solution>
    k = len(guesses)
    places = torch.arange(k)
    refused = chances[:k] * q[places, guesses] >= p[places, guesses]
    kept = int(refused.nonzero()[0]) if refused.any() else k
    if kept < k:
        weights, chance = (p[kept] - q[kept]).clamp(min=0), chances[kept + 1]
    else:
        weights, chance = p[k], chances[k]
    sums = torch.cumsum(weights, 0)
    drawn = (sums > chance * sums[-1]).nonzero()[:1, 0]
    return torch.cat([guesses[:kept], drawn])
    # </solution>


# %% [markdown]
# Is the text still the large model's? Count what is written first, when the guesses come from q.

# %% tags=["nbval-ignore-output"]
rng = torch.Generator().manual_seed(0)
q, p = torch.tensor([[0.1, 0.6, 0.2, 0.1]]), torch.tensor([[0.4, 0.3, 0.1, 0.2], [0.25, 0.25, 0.25, 0.25]])
try:
    counts = torch.zeros(4)
    for _ in range(4000):
        drawn = torch.multinomial(q[0], 1, generator=rng)
        counts[accept(drawn, q, p, torch.rand(2, generator=rng))[0]] += 1
    print("written:", (counts / counts.sum()).tolist(), "p:", p[0].tolist(), sep="\n")
except NotImplementedError:
    print("Write 13.4 first.")

# %% [markdown] exercise="13.5"
# `limit(config, bits, batch, context, bandwidth, flops)` → the seconds that a step takes at best. In a step each of `batch`
# texts gets one token, which looks at `context` tokens in the cache. config is a dictionary with the numbers dim, n_layers,
# n_heads, n_kv_heads, head_dim, ffn_dim and vocab_size, and with tie_embeddings, True or False.
#
# The machine reads `bandwidth` bytes a second, and does `flops` operations a second, both at once; a multiplication and an
# addition are two operations. It reads
#
# - the matrices of all layers and of the output once, for all texts, with `bits` for each number;
# - each text's cache, in bf16.
#
# It multiplies with each of these matrices for each text; and in each layer every query head is multiplied with `context` keys,
# and its probabilities with as many values. Norms, softmax, positions, and looking up embeddings cost nothing here.
#
# For example dim = ffn_dim = vocab_size = 10, one layer, one head of 10 are 800 numbers in matrices. With 16 bits, 2 texts
# and a context of 5, 1600 + 2 · 200 bytes are read, and 2 · (1600 + 200) operations done. With a bandwidth of 1000 and 1200
# operations a second that is 2 seconds for the one and 3 for the other: `3.0`.


# %% exercise="13.5"
def limit(config: dict, bits: float, batch: int, context: int, bandwidth: float, flops: float) -> float:
    """config, bits a number, texts, tokens, bytes/s, operations/s → seconds of a step"""
    # <solution>
    dim, layers, head_dim = config["dim"], config["n_layers"], config["head_dim"]
    queries, keys = config["n_heads"] * head_dim, config["n_kv_heads"] * head_dim
    layer = 2 * dim * queries + 2 * dim * keys + 3 * dim * config["ffn_dim"]
    matrices = layers * layer + dim * config["vocab_size"]
    cache = 2 * layers * context * keys * 2  # bytes of a text
    attention = 2 * layers * context * queries  # multiply-adds of a text
    reading = (matrices * bits / 8 + batch * cache) / bandwidth
    multiplying = batch * 2 * (matrices + attention) / flops
    return max(reading, multiplying)
    # </solution>


# %% [markdown]
# A laptop that reads 50 GB and does 500 billion operations a second: tokens a second at best, of all texts together.

# %% tags=["nbval-ignore-output"]
try:
    print(f"{'tokens a second':17}", *(f"{texts:>7} texts" for texts in (1, 8, 64)))
    for name in ("smollm2-135m", "llama-7b", "llama3-8b"):
        config = ModelConfig.preset(name).to_dict()
        for kind, bits in {"bf16": 16.0, "int4": 5.0}.items():
            speeds = [texts / limit(config, bits, texts, 1000, 50e9, 500e9) for texts in (1, 8, 64)]
            print(f"{name:12} {kind}", *(f"{speed:13.1f}" for speed in speeds))
except NotImplementedError:
    print("Write 13.5 first.")

# %% [markdown] exercise="13.6"
# How few bits are enough for the toy, and what do groups change? Round its matrices, that is every parameter with two axes, the
# embedding among them. With b bits a weight becomes the nearest of 2^b values that lie at equal distances from the smallest to
# the largest weight of its group, as in 13.2. A group is the whole matrix, a row, or 32 neighbours of a row. Put the rounded
# weights in and measure the mean loss on `story_validation(tokenizer, 20, seed=0)`, in each of these ways, beginning with the
# exact weights each time. The toy reaches 0.35 there with exact weights, and without any knowledge the loss would be
# ln 2048 = 7.6. Write your prediction down first.

# %% exercise="13.6"
measured_13 = {
    "predicted": None,  # nats per token, with 2 bits in groups of 32, before you measure
    "4 bits, a matrix": None,
    "4 bits, groups of 32": None,
    "3 bits, a matrix": None,
    "3 bits, a row": None,
    "3 bits, groups of 32": None,
    "2 bits, groups of 32": None,
    "because": None,  # a sentence
}
# <solution>
model, tokenizer = load("toy")
batches = story_validation(tokenizer, 20, seed=0).batches
matrices = [w for w in model.parameters() if w.dim() == 2]
exact = [w.detach().clone() for w in matrices]


def rounded(weight: Tensor, bits: int, size: int) -> Tensor:
    groups = weight.reshape(-1, size)
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    step = (high - low) / (2**bits - 1)
    return (((groups - low) / step).round() * step + low).view_as(weight)


measured_13["predicted"] = 2.0
for way in list(measured_13)[1:-1]:
    bits, group = int(way[0]), way.partition(", ")[2]
    with torch.no_grad():
        for w, before in zip(matrices, exact, strict=True):
            size = {"a matrix": before.numel(), "a row": before.shape[1]}.get(group, 32)
            w.copy_(rounded(before, bits, size))
    measured_13[way] = mean_loss(model, batches)
measured_13["because"] = "a step is as long as the distance in its group, and in a small group few weights are large"
# </solution>

# %% tags=["nbval-ignore-output"]
print(report())
