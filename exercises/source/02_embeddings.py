# %% [markdown]
# # 02 · Exercises: embeddings
#
# Chapter: [02 embeddings](../chapters/02_embeddings.ipynb). Run a check as often as you like: it says what is wrong.

# %%
import random
import re

import torch
from torch import Tensor

from minillama import generate, load, world
from minillama.course import case, check, hint, report, swap_in

# %% [markdown] exercise="02.1"
# `lookup(tokens, table)`: tokens (B, T) int64 and the table (V, D), of any floating dtype → (B, T, D) in the table's dtype:
# the row of each token. Do it as a product of one-hot vectors with the table, without a loop. (Any way that gives the
# rows is accepted; `F.embedding` is not there while it is checked.)
#
# For example with the table `[[1, 2], [3, 4], [5, 6]]`, `lookup` of `[[2, 0]]` is `[[[5, 6], [1, 2]]]`.


# %% exercise="02.1"
def lookup(tokens: Tensor, table: Tensor) -> Tensor:
    """tokens (B, T), table (V, D) → (B, T, D)"""
    # <solution>
    rows = torch.arange(len(table))
    one_hot = (tokens[..., None] == rows).to(table.dtype)
    return one_hot @ table
    # </solution>


# %% [markdown] exercise="02.2"
# `skipgram_pairs(rows, window)`: rows is a list of stories, each a list of ids → a list of all pairs (word, neighbour). A
# neighbour stands in the same row, at most `window` places before or behind the word, and not at its own place. An id that
# occurs twice is two words. The order: row by row, in a row word by word, for each word its neighbours from left to right.
# (The chapter's `pairs_of` goes distance by distance.) There may be no rows, a row may be empty, `window` may be 0.
#
# For example `skipgram_pairs([[6, 7, 8, 9], [5, 4]], 2)` is
# `[(6, 7), (6, 8), (7, 6), (7, 8), (7, 9), (8, 6), (8, 7), (8, 9), (9, 7), (9, 8), (5, 4), (4, 5)]`.


# %% exercise="02.2"
def skipgram_pairs(rows: list[list[int]], window: int) -> list[tuple[int, int]]:
    """All (word, neighbour), `window` in places to each side."""
    # <solution>
    pairs = []
    for row in rows:
        for i, word in enumerate(row):
            start, end = max(0, i - window), min(len(row), i + window + 1)
            pairs += [(word, row[j]) for j in range(start, end) if j != i]
    return pairs
    # </solution>


# %% [markdown] exercise="02.3"
# `negative_sampling_loss(centre, context, negatives)`: the vectors of B words, centre (B, D), of their real neighbours,
# context (B, D), and of K false neighbours for each, negatives (B, K, D), all fp32 → the loss in nats, a tensor without
# axes: $-\log\sigma(u\cdot v) - \sum_i\log\bigl(1-\sigma(u\cdot n_i)\bigr)$ for each word, and the mean over the B words.
# It must be finite and exact for scores of 1000 and of -1000: a real pair with a score of -1000 costs 1000. No
# loop is needed, K may be 0. When this is graded, PyTorch's `logsigmoid`, `softplus` and its cross-entropy of scores are
# not there: write that part yourself.
#
# For example if all vectors are zeros, and K = 2, it is 3 · log 2 = 2.079.


# %% exercise="02.3"
def negative_sampling_loss(centre: Tensor, context: Tensor, negatives: Tensor) -> Tensor:
    """centre (B, D), context (B, D), negatives (B, K, D) → ()"""
    # <solution>
    real = (centre * context).sum(-1, keepdim=True)
    false = (negatives @ centre[:, :, None]).squeeze(-1)
    surprise = torch.cat([-real, false], dim=1)
    losses = surprise.clamp_min(0) + torch.log1p(torch.exp(-surprise.abs()))
    return losses.sum(1).mean()
    # </solution>


# %% [markdown] exercise="02.4"
# `nearest_rows(table, chosen, k)`: table (V, D) fp32 without rows of zeros, chosen (B,) int64, numbers of rows → (B, k)
# int64: for each of them the numbers of the k rows with the largest cosine, the largest first. The chosen row itself is left
# out; of two that are equally near, the lower number comes first. k is at most V - 1; B and k may be 0. No loop is needed.
# When this is graded, PyTorch's `cosine_similarity` is not there.
#
# For example with the table `[[1, 0], [0, 5], [2, 1]]`, `nearest_rows` of `[0, 1]` with k = 2 is `[[2, 1], [2, 0]]`.


# %% exercise="02.4"
def nearest_rows(table: Tensor, chosen: Tensor, k: int) -> Tensor:
    """table (V, D), chosen (B,) → (B, k)"""
    # <solution>
    unit = table / (table * table).sum(1, keepdim=True).sqrt()
    cosines = unit[chosen] @ unit.mT
    itself = chosen[:, None] == torch.arange(len(table))
    cosines = cosines.masked_fill(itself, -torch.inf)
    return cosines.argsort(dim=1, descending=True, stable=True)[:, :k]
    # </solution>


# %% [markdown]
# Ask the toy's table with it.

# %% tags=["nbval-ignore-output"]
model, tokenizer = load("toy")
try:
    asked = [tokenizer.encode(word)[0] for word in ("red", "Lily", "happy")]
    for token, near in zip(asked, nearest_rows(model.embedding.weight.detach(), torch.tensor(asked), 4), strict=True):
        print(tokenizer.piece(token), "→", *(tokenizer.piece(number) for number in near.tolist()))
except NotImplementedError:
    print("Write 02.4 first.")

# %% [markdown] exercise="02.5"
# `tied_logits(x, table)`: x (..., D), with any number of axes in front, and the embedding table (V, D) → (..., V) in fp32:
# one score for each token. Both may be bf16: widen them before the product, so that two close scores are not rounded to one.
#
# For example `[1, 2]` with the table `[[1, 0], [0, 1], [3, 1]]` gives `[1, 2, 5]`.


# %% exercise="02.5"
def tied_logits(x: Tensor, table: Tensor) -> Tensor:
    """x (..., D), table (V, D) → (..., V)"""
    # <solution>
    return x.float() @ table.float().mT
    # </solution>


# %% [markdown]
# Now hear it at work: the toy reads and writes with your functions.

# %% tags=["nbval-ignore-output"]
try:
    mine = swap_in(model, lookup=lookup, logits=tied_logits)
    print(generate(mine, tokenizer, "", temperature=0.8, seed=1, max_new_tokens=60))
except NotImplementedError:
    print("Write 02.1 and 02.5 first.")

# %% [markdown] exercise="02.6"
# With a window of five, *happy* is as near to *sad* as to *glad*. How wide must it be, to tell them apart? Take one
# `rng = random.Random(2)` and 2,000 stories, `world.sample(rng).text`, cut into words by `re.findall(r"\w+", text)`.
# Count how often each word stands at most `window` places before or behind each other, within a story; make PPMI of the
# counts, as in the chapter (natural logarithm, 0 for pairs that never met), and take its rows of V numbers as they are,
# without the singular value decomposition. The **gap** is cosine(*happy*, *glad*) minus cosine(*happy*, *sad*). Measure it
# for windows of 2, 5, 10 and 20 words, to three decimals or more. We call a gap above 0.2 clear. Write your prediction first.

# %% exercise="02.6"
measured_02 = {
    "predicted": None,  # 2, 5, 10 or 20: the narrowest with a clear gap, before you measure
    "gap at 2": None,
    "gap at 5": None,
    "gap at 10": None,
    "gap at 20": None,
    "narrowest": None,  # the narrowest of the four with a clear gap
    "because": None,  # a sentence
}
# <solution>
rng = random.Random(2)
stories = [re.findall(r"\w+", world.sample(rng).text) for _ in range(2000)]
ids = {word: i for i, word in enumerate(dict.fromkeys(word for story in stories for word in story))}
coded = [torch.tensor([ids[word] for word in story]) for story in stories]


def gap(window: int) -> float:
    M = torch.zeros(len(ids), len(ids), dtype=torch.float64)
    for distance in range(1, window + 1):
        before = torch.cat([story[:-distance] for story in coded])
        behind = torch.cat([story[distance:] for story in coded])
        one = torch.ones(len(before), dtype=torch.float64)
        M.index_put_((before, behind), one, accumulate=True)
        M.index_put_((behind, before), one, accumulate=True)
    P = M / M.sum()
    pmi = P.log() - P.sum(1, keepdim=True).log() - P.sum(0).log()
    rows = pmi.clamp_min(0)
    happy, glad, sad = (rows[ids[word]] / rows[ids[word]].norm() for word in ("happy", "glad", "sad"))
    return (happy @ glad - happy @ sad).item()


measured_02["predicted"] = 5
for window in (2, 5, 10, 20):
    measured_02[f"gap at {window}"] = gap(window)
measured_02["narrowest"] = min(window for window in (2, 5, 10, 20) if measured_02[f"gap at {window}"] > 0.2)
measured_02["because"] = "the same words surround each mood in its sentence, and what caused it stands further away"
# </solution>

# %% tags=["nbval-ignore-output"]
print(report())
