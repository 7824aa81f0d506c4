# %% [markdown]
# # 04 · Exercises: attention
#
# Chapter: [04 attention](../chapters/04_attention.ipynb). Run a check as often as you like: it says what is wrong.
#
# The letters are the chapter's: B texts in a batch, H query heads, K key/value heads, T new tokens (they look), S tokens
# in all (they are looked at; the new ones are the last of them), D numbers in a head.

# %%
import math

import torch
from torch import Tensor

from minillama import generate, load
from minillama.course import case, check, hint, report, swap_in
from minillama.data import story_validation
from minillama.trainer import mean_loss

# %% [markdown] exercise="04.1"
# `attention_scores(q, k)`: q (B, H, T, D), k (B, H, S, D) → (B, H, T, S), each query times each key of its head, divided
# as it should be. Always in fp32, also if q and k come in bf16: then not a digit may be lost on the way.
#
# For example q = `[[[[1., 2., 0., 0.]]]]` and k = `[[[[3., 4., 0., 0.]]]]` give `[[[[5.5]]]]`.


# %% exercise="04.1"
def attention_scores(q: Tensor, k: Tensor) -> Tensor:
    """q (B, H, T, D), k (B, H, S, D) → (B, H, T, S) in fp32"""
    # <solution>
    return q.float() @ k.float().transpose(-1, -2) / math.sqrt(q.shape[-1])
    # </solution>


# %% [markdown] exercise="04.2"
# `softmax(scores)`: scores (..., S) in fp32 → (..., S), the shares along the last axis, however large the scores. A score
# of `-inf` gets a share of exactly 0. Where a whole row is `-inf`, there is nobody to look at: all its shares are 0.
#
# For example `[[0., 0., -inf], [-inf, -inf, -inf]]` becomes `[[0.5, 0.5, 0.], [0., 0., 0.]]`.


# %% exercise="04.2"
def softmax(scores: Tensor) -> Tensor:
    """scores (..., S) → shares (..., S)"""
    # <solution>
    largest = scores.amax(-1, keepdim=True).clamp_min(-1e38)
    powers = (scores - largest).exp()
    return powers / powers.sum(-1, keepdim=True).clamp_min(1e-30)
    # </solution>


# %% [markdown] exercise="04.3"
# `causal_mask(new, total)`: two integers → (new, total) booleans, True where a token may look: at itself and at all before
# it. The text has `total` tokens, the `new` last of them look.
#
# For example `causal_mask(2, 3)` is `[[True, True, False], [True, True, True]]`.


# %% exercise="04.3"
def causal_mask(new: int, total: int) -> Tensor:
    """(new, total) booleans"""
    # <solution>
    looks = torch.arange(total - new, total)[:, None]
    return looks >= torch.arange(total)
    # </solution>


# %% [markdown] exercise="04.4"
# `weighted_sum(probabilities, v)`: probabilities (B, H, T, S) in fp32, v (B, H, S, D) → (B, H, T, D), for each query the
# values times their shares, added up. v may come in bf16: add up in fp32, and give the result in the dtype of v. No loops.
#
# For example shares `[[[[0.25, 0.75]]]]` and values `[[[[10.], [20.]]]]` give `[[[[17.5]]]]`.


# %% exercise="04.4"
def weighted_sum(probabilities: Tensor, v: Tensor) -> Tensor:
    """probabilities (B, H, T, S), v (B, H, S, D) → (B, H, T, D) in the dtype of v"""
    # <solution>
    mixed = probabilities @ v.to(probabilities.dtype)
    return mixed.to(v.dtype)
    # </solution>


# %% [markdown]
# These four are all that a head does. Hear them at work, in all heads of the toy:

# %% tags=["nbval-ignore-output"]
model, tokenizer = load("toy")
try:
    mine = swap_in(model, scores=attention_scores, mask=causal_mask, softmax=softmax, weighted_sum=weighted_sum)
    print(generate(mine, tokenizer, "", temperature=0.8, seed=0, max_new_tokens=60))
except NotImplementedError as missing:
    print(f"Write {missing} first.")

# %% [markdown] exercise="04.5"
# `split_heads(x, n_heads)`: x (B, T, H·D) → (B, H, T, D). In x, a token's numbers are those of head 0, then those of head
# 1, and so on.
#
# For example one text of two tokens, `[[[1, 2, 3, 4], [5, 6, 7, 8]]]`, with 2 heads becomes
# `[[[[1, 2], [5, 6]], [[3, 4], [7, 8]]]]`.


# %% exercise="04.5"
def split_heads(x: Tensor, n_heads: int) -> Tensor:
    """x (B, T, H·D) → (B, H, T, D)"""
    # <solution>
    B, T, width = x.shape
    return x.reshape(B, T, n_heads, width // n_heads).transpose(1, 2)
    # </solution>


# %% [markdown] exercise="04.6"
# `merge_heads(x)`: x (B, H, T, D) → (B, T, H·D), so that `merge_heads(split_heads(x, n_heads))` is x again. x need not
# lie in memory in one piece (its `is_contiguous()` may be False).
#
# For example `[[[[1, 2], [5, 6]], [[3, 4], [7, 8]]]]` becomes `[[[1, 2, 3, 4], [5, 6, 7, 8]]]`.


# %% exercise="04.6"
def merge_heads(x: Tensor) -> Tensor:
    """x (B, H, T, D) → (B, T, H·D)"""
    # <solution>
    B, H, T, D = x.shape
    return x.transpose(1, 2).reshape(B, T, H * D)
    # </solution>


# %% [markdown] exercise="04.7"
# `repeat_kv(x, n_heads)`: x (B, K, S, D) → (B, H, S, D), H = `n_heads`: for each query head the key (or value) head that it
# reads. If `n_heads` is not a multiple of K, raise a ValueError. Without `repeat_interleave`, which is not there while it
# is graded.
#
# For example heads `[k0, k1]` and 6 query heads give `[k0, k0, k0, k1, k1, k1]`.


# %% exercise="04.7"
def repeat_kv(x: Tensor, n_heads: int) -> Tensor:
    """x (B, K, S, D) → (B, H, S, D)"""
    # <solution>
    B, K, S, D = x.shape
    if n_heads % K:
        raise ValueError(f"{n_heads} query heads cannot share {K} key/value heads, expected a multiple.")
    return x[:, :, None].expand(B, K, n_heads // K, S, D).reshape(B, n_heads, S, D)
    # </solution>


# %% [markdown] exercise="04.8"
# `attention(q, k, v)`: q (B, H, T, D), k and v (B, K, S, D) → (B, H, T, D), all in fp32. Grouped queries, causal; the T new
# tokens are the last of the S. Use the functions above, or write it in one piece.
#
# For example with one token, T = S = 1, every head returns its value: there is nothing else to look at.


# %% exercise="04.8"
def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q (B, H, T, D), k and v (B, K, S, D) → (B, H, T, D)"""
    # <solution>
    k, v = repeat_kv(k, q.shape[1]), repeat_kv(v, q.shape[1])
    scores = attention_scores(q, k)
    scores = scores.masked_fill(~causal_mask(q.shape[2], k.shape[2]), -torch.inf)
    return weighted_sum(softmax(scores), v)
    # </solution>


# %% [markdown]
# The toy once more, with your heads and your attention:

# %% tags=["nbval-ignore-output"]
try:
    mine = swap_in(model, split_heads=split_heads, attention=attention)
    print(generate(mine, tokenizer, "", temperature=0.8, seed=1, max_new_tokens=60))
except NotImplementedError as missing:
    print(f"Write {missing} first.")

# %% [markdown] exercise="04.9"
# `online_softmax(q, k, v, block)`: q (H, T, D), k and v (H, S, D) → a pair. First the result (H, T, D) of causal attention,
# the T new tokens being the last of the S. Second what shows that you walked: the sum ℓ of every query after each block of
# keys, against the largest score that it has seen until then, (number of blocks, H, T). Hidden keys are not seen: they enter
# neither maximum nor sum, and a block that lies wholly in a query's future leaves its sum as it was. All in fp32. Blocks are
# `block` keys long, the last one may be shorter. Loop over blocks only, not over heads or queries, and never hold the scores
# of more than one block.
#
# For example one query with two keys whose scores are 0 and 0, and block = 1: the sums are `[[[1.]], [[2.]]]`. Are the
# scores 0 and ln 2, they are `[[[1.]], [[1.5]]]`.


# %% exercise="04.9"
def online_softmax(q: Tensor, k: Tensor, v: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """q (H, T, D), k and v (H, S, D) → out (H, T, D), sums (blocks, H, T)"""
    # <solution>
    H, T, D = q.shape
    S = k.shape[1]
    m, total, mixed = torch.full((H, T), -torch.inf), torch.zeros(H, T), torch.zeros(H, T, D)
    places, sums = torch.arange(S - T, S)[:, None], []
    for start in range(0, S, block):
        keys, values = k[:, start : start + block], v[:, start : start + block]
        future = torch.arange(start, start + keys.shape[1]) > places
        z = (q @ keys.transpose(1, 2) / math.sqrt(D)).masked_fill(future, -torch.inf)
        larger = torch.maximum(m, z.amax(-1))
        factor, powers = (m - larger).exp(), (z - larger[..., None]).exp()
        total = factor * total + powers.sum(-1)
        mixed = factor[..., None] * mixed + powers @ values
        m = larger
        sums.append(total)
    return mixed / total[..., None], torch.stack(sums)
    # </solution>


# %% [markdown] exercise="04.10"
# Which head of the toy's layer 0 is missed most? Take its eight heads out, one at a time: a head speaks through its
# own columns of `wo`, `head_dim` of them, so set these to zero, measure the mean loss on
# `story_validation(tokenizer, 20, seed=0).batches`, and put them back. Then the worst of them once more in another way: it
# still hands its values over, but looks at nothing in particular: each token gives the same share to itself and to all
# before it (a forward hook on `attention.tap` sees the shares (B, H, T, S) and may return others; set
# `attention.fast = False` before). Write your prediction down first.

# %% exercise="04.10"
measured_04 = {
    "predicted": None,  # nats per token, without the most needed head, before you measure
    "loss": None,  # of the untouched toy
    "head": None,  # 0 to 7: the head that is missed most
    "removed": None,  # the loss without it
    "even": None,  # the loss when it looks at everything evenly
    "because": None,  # a sentence
}
# <solution>
model, tokenizer = load("toy")
batches = story_validation(tokenizer, 20, seed=0).batches
layer = model.blocks[0].attention
measured_04["predicted"] = 1.5
saved = layer.wo.weight.detach().clone()  # (dim, H·D)
removed = []
with torch.inference_mode():
    measured_04["loss"] = mean_loss(model, batches)
    for head in range(layer.n_heads):
        layer.wo.weight.data.view(-1, layer.n_heads, layer.head_dim)[:, head] = 0
        removed.append(mean_loss(model, batches))
        layer.wo.weight.data.copy_(saved)
worst = max(range(layer.n_heads), key=lambda head: removed[head])


def look_evenly(tap, inputs, shares):
    shares = shares.clone()
    allowed = causal_mask(*shares.shape[-2:]).float()
    shares[:, worst] = allowed / allowed.sum(-1, keepdim=True)
    return shares


layer.fast = False
hook = layer.tap.register_forward_hook(look_evenly)
with torch.inference_mode():
    measured_04["even"] = mean_loss(model, batches)
hook.remove()
measured_04["head"], measured_04["removed"] = worst, removed[worst]
measured_04["because"] = "without it a voice is gone; looking evenly it still speaks, but says the same to everyone"
# </solution>

# %% tags=["nbval-ignore-output"]
print(report())
