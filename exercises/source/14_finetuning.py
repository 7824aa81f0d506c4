# %% [markdown]
# # 14 · Exercises: fine-tuning
#
# Chapter: [14 fine-tuning](../chapters/14_finetuning.ipynb). Run a check as often as you like:
# it says what is wrong.

# %%
import torch
from torch import Tensor

from minillama import load
from minillama.course import case, check, hint, report

# %% [markdown] exercise="14.1"
# `answer_targets(ids, spans, ignore)`: ids (T,) int32 or int64, the tokens of a whole chat; `spans` is a list of pairs
# `(start, end)`, one for each turn of the assistant's, in order: the answer's tokens are `ids[start:end]`, its end mark the last
# of them → two tensors of the dtype of ids:
#
# - inputs (T−1,): the tokens that the model is given;
# - targets (T−1,): at each place the token that follows, if an answer holds it, and `ignore` if not.
#
# What is not in a span is never scored: the user's turns, what opens an answer, padding at the end. A span may begin at 0; an
# answer's token with nothing before it cannot be a target. There may be no span at all. Leave ids as they are, and make no loop
# over tokens: the check has a long chat.
#
# For example ids = `[5, 6, 7, 8, 2, 9]` with the span `(2, 5)` and ignore = -100 give the inputs `[5, 6, 7, 8, 2]` and the
# targets `[-100, 7, 8, 2, -100]`: at the place of the 6 the model has to begin its answer.


# %% exercise="14.1"
def answer_targets(ids: Tensor, spans: list[tuple[int, int]], ignore: int) -> tuple[Tensor, Tensor]:
    """(T,), (start, end) of each answer → inputs (T-1,), targets (T-1,)"""
    # <solution>
    said = torch.zeros(len(ids), dtype=torch.bool)
    for start, end in spans:
        said[start:end] = True
    targets = ids[1:].clone()
    targets[~said[1:]] = ignore
    return ids[:-1].clone(), targets
    # </solution>


# %% [markdown]
# A chat of the toy's, token by token: what is given, and what has to follow.

# %% tags=["nbval-ignore-output"]
model, tokenizer = load("toy")
question = {"role": "user", "content": "Tom found a red ball. What colour is the ball?"}
prompt = tokenizer.chat([question])
ids = torch.tensor(tokenizer.chat([question, {"role": "assistant", "content": "It is red."}], reply=False))
end = next(i for i in range(len(prompt), len(ids)) if int(ids[i]) in tokenizer.stop_ids) + 1
try:
    for given, target in zip(*answer_targets(ids, [(len(prompt), end)], -100), strict=True):
        follows = tokenizer.piece(int(target)) if target >= 0 else ""
        print(f"{tokenizer.piece(int(given)):16} → {follows}")
except NotImplementedError:
    print("Write 14.1 first.")

# %% [markdown] exercise="14.2"
# `lora_forward(x, w, a, b, alpha)`: x (..., in), with any axes before the last; w (out, in), the base; a (r, in) and
# b (out, r), the adapter → (..., out), which is what w gives for x, plus α/r times what b gives for what a gives for x
# (Hu et al. 2021, section 4.1). alpha is a number; r is the adapter's rank, to be read off its shape.
#
# x and w are both in fp32 or both in bf16; a and b are always in fp32. Then the product with w is taken as it comes, in their
# dtype, the adapter's path and the sum are in fp32, and the result is rounded once, to the dtype of x.
#
# Never make a matrix of the size of w: the check has a wide one.
#
# For example x = `[1., 2.]`, w = `[[1., 0.], [0., 1.]]`, a = `[[1., 1.]]`, b = `[[0.], [0.5]]` and alpha = 2 give `[1., 5.]`:
# a makes 3 of x, b makes `[0, 1.5]` of that, and α/r is 2.


# %% exercise="14.2"
def lora_forward(x: Tensor, w: Tensor, a: Tensor, b: Tensor, alpha: float) -> Tensor:
    """(..., in), (out, in), (r, in), (out, r), number → (..., out)"""
    # <solution>
    base = x @ w.T
    thin = x.to(a.dtype) @ a.T  # (..., r)
    return (base + thin @ b.T * (alpha / a.shape[0])).to(x.dtype)
    # </solution>


# %% [markdown] exercise="14.3"
# `switched(w, adapters, turns)`: a model whose adapters are merged into its weights, and taken out again. w (out, in) in fp32
# or bf16 is the matrix as it was trained; `adapters` is a list of `(a, b, alpha)`, with a (r, in) and b (out, r) in fp32 and an r
# of their own each; `turns` is a list of lists of numbers: which adapters are merged at each turn, so `[]` for none, `[1, 0]` for
# two of them → the list of the weights at each turn, each (out, in), and of the dtype of w.
#
# With the adapters i of a turn merged, the weight is w + Σ αᵢ/rᵢ · bᵢaᵢ, added up in fp32 and rounded once. A turn of none gives
# back the very bits of w, whatever came before it, and w must stay as it is.
#
# For example w = `[[1.]]` with one adapter a = `[[2.]]`, b = `[[3.]]`, alpha = 0.5 and the turns `[[0], [], [0]]` give
# `[[4.]]`, `[[1.]]` and `[[4.]]`.


# %% exercise="14.3"
def switched(w: Tensor, adapters: list[tuple[Tensor, Tensor, float]], turns: list[list[int]]) -> list[Tensor]:
    """(out, in), adapters (a, b, alpha), their numbers for each turn → the weight of each turn"""
    # <solution>
    changes = [b @ a * (alpha / a.shape[0]) for a, b, alpha in adapters]
    weights = []
    for turn in turns:
        weight = w.to(torch.float32, copy=True)
        for number in turn:
            weight += changes[number]
        weights.append(weight.to(w.dtype))
    return weights
    # </solution>


# %% [markdown]
# What does the way back by subtraction lose? A matrix in bf16, and adapters of different sizes, merged and taken away again.

# %% tags=["nbval-ignore-output"]
rng = torch.Generator().manual_seed(0)
base = torch.randn(64, 64, generator=rng).bfloat16()
a, b = torch.randn(8, 64, generator=rng), torch.randn(64, 8, generator=rng)
try:
    for size in (0.01, 0.1, 1.0):
        merged, kept = switched(base, [(a, b * size, 16.0)], [[0], []])
        subtracted = switched(merged, [(a, -b * size, 16.0)], [[0]])[0]
        shares = [f"{(back != base).float().mean().item():.0%}" for back in (subtracted, kept)]
        print(f"b times {size}: {shares[0]} of the weights are not what they were, and {shares[1]} if w is kept")
except NotImplementedError:
    print("Write 14.3 first.")

# %% [markdown] exercise="14.4"
# `pooled(hidden, lengths, head)`: hidden (B, T, dim) in fp32 or bf16, what a model's last layer gives for B texts of different
# lengths; lengths (B,) int64, at least 1: the tokens of text i are at places 0 to lengths[i] − 1, and behind them is padding;
# head (C, dim) fp32, a row for each of C classes → two tensors in fp32:
#
# - means (B, dim): the mean over each text's own tokens;
# - logits (B, C): what the head gives for these.
#
# What stands at padding may be anything, NaN and infinity too: it must change nothing. Add up in fp32, and all texts at once:
# the check has thousands, and a batch of none (B = 0).
#
# For example hidden = `[[[1.], [3.], [9.]], [[5.], [9.], [9.]]]` with lengths = `[2, 1]` and head = `[[1.], [-1.]]` give the
# means `[[2.], [5.]]` and the logits `[[2., -2.], [5., -5.]]`.


# %% exercise="14.4"
def pooled(hidden: Tensor, lengths: Tensor, head: Tensor) -> tuple[Tensor, Tensor]:
    """(B, T, dim), (B,), (C, dim) → means (B, dim), logits (B, C)"""
    # <solution>
    real = torch.arange(hidden.shape[1]) < lengths[:, None]  # (B, T)
    tokens = torch.where(real[:, :, None], hidden.float(), 0.0)
    means = tokens.sum(dim=1) / lengths[:, None]
    return means, means @ head.T
    # </solution>


# %% [markdown] exercise="14.5"
# `packed(lengths, width)`: lengths (B, N) int64: how many tokens each of up to N chats has that stand in a row one behind the
# other, 0 where a row has fewer chats (zeros stand last, and no row's sum is above `width`); what is left of the row is padding
# → two tensors:
#
# - positions (B, width) int64: the number of each token within its chat, from 0; padding has 0;
# - mask (B, width, width) bool: True at [b, i, j] if token i may see token j, that is if both belong to the same chat, and j is
#   not later than i. Padding sees itself and nothing else, and nothing else sees it.
#
# No loop over rows or chats: the check has a thousand rows, and a batch of none (B = 0).
#
# For example lengths = `[[2, 1]]` and width = 4 give the positions `[[0, 1, 0, 0]]` and the mask, in which 1 is True,
# `[[[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]]`.


# %% exercise="14.5"
def packed(lengths: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """(B, N) → positions (B, width) int64, mask (B, width, width) bool"""
    # <solution>
    n_chats = lengths.shape[1]
    ends = lengths.cumsum(dim=1)  # (B, N)
    places = torch.arange(width).expand(len(lengths), width).contiguous()
    chats = torch.searchsorted(ends, places, right=True)  # how many have ended; padding: N
    starts = torch.cat([ends - lengths, torch.zeros_like(ends[:, :1])], dim=1).gather(1, chats)
    real = chats < n_chats
    positions = (places - starts).masked_fill(~real, 0)
    together = (chats[:, :, None] == chats[:, None, :]) & real[:, :, None]
    mask = torch.tril(together) | torch.eye(width, dtype=torch.bool)
    return positions, mask
    # </solution>


# %% [markdown]
# Two chats in one row, as the toy sees them: does the second one notice the first?

# %% tags=["nbval-ignore-output"]
chats = [tokenizer.encode(text) for text in ("Tom found a red ball.", "Anna lost a hat in the garden.")]
row = torch.tensor([chats[0] + chats[1] + [tokenizer.pad_id] * 3])
try:
    positions, mask = packed(torch.tensor([[len(tokens) for tokens in chats]]), row.shape[1])
    print("positions", positions[0].tolist())
    for seen in mask[0].tolist():
        print("".join("█" if one else "·" for one in seen))
except NotImplementedError:
    print("Write 14.5 first.")

# %% [markdown] exercise="14.6"
# What does a rank do? Here are two changes of a matrix: `thin` is nearly of rank 4, with noise, and `toy` leads from one trained
# matrix of the toy (wq in block 1) to another one (wq in block 2), which have nothing to do with each other.
#
# For ranks 4 and 16, measure what is left of each change, D, as a share of its size: ‖D − M‖ / ‖D‖, with the root of the sum of
# all squares as size. "best" is the least that any matrix M of this rank can leave: without the largest singular values, 4 or 16
# of them, the others remain (Eckart and Young 1936). "LoRA" is what training reaches: M = α/r · ba with a random and b zero at
# first, both trained by Adam until ‖D − M‖² gets no smaller. And "both zero": the same with rank 4 on `thin`, when a is zero,
# too. Write your prediction down first.

# %% exercise="14.6"
blocks = load("toy")[0].blocks
rng = torch.Generator().manual_seed(14)
thin = torch.randn(96, 4, generator=rng) @ torch.randn(4, 64, generator=rng)
changes = {
    "thin": thin + 0.4 * torch.randn(96, 64, generator=rng),
    "toy": (blocks[2].attention.wq.weight - blocks[1].attention.wq.weight).detach(),
}
measured_14 = {
    "predicted": None,  # the share that LoRA of rank 16 leaves of the toy's change, before you measure
    "thin, 4, best": None,
    "thin, 4, LoRA": None,
    "thin, 16, best": None,
    "thin, 16, LoRA": None,
    "toy, 4, best": None,
    "toy, 4, LoRA": None,
    "toy, 16, best": None,
    "toy, 16, LoRA": None,
    "both zero": None,
    "because": None,  # a sentence
}
# <solution>


def trained(change: Tensor, rank: int, spread: float) -> float:
    """What LoRA leaves of a change, as a share of its size; a begins as random numbers of this size"""
    start = torch.Generator().manual_seed(rank)
    a = (torch.randn(rank, change.shape[1], generator=start) * spread).requires_grad_()
    b = torch.zeros(change.shape[0], rank, requires_grad=True)
    optimizer = torch.optim.Adam([a, b], lr=0.02)
    for _ in range(300):
        loss = (change - 2 * b @ a).square().sum() / change.square().sum()  # alpha = 2 · rank
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item() ** 0.5


measured_14["predicted"] = 0.5
for key in list(measured_14)[1:-2]:
    name, rank, way = key.split(", ")
    change, rank = changes[name], int(rank)
    values = torch.linalg.svdvals(change)
    best = (values[rank:].norm() / values.norm()).item()
    measured_14[key] = best if way == "best" else trained(change, rank, 0.1)
measured_14["both zero"] = trained(changes["thin"], 4, 0.0)
measured_14["because"] = "a small rank is enough only for a change that has few large singular values"
# </solution>

# %% tags=["nbval-ignore-output"]
print(report())
