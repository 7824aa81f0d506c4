# %% [markdown]
# # 03 · Exercises: positions
#
# Chapter: [03 positions](../chapters/03_positions.ipynb). Run a check as often as you like: it says what is wrong.

# %%
import math

import torch
from torch import Tensor

from minillama import generate, load
from minillama.course import case, check, hint, report, swap_in
from minillama.data import story_validation
from minillama.trainer import mean_loss

# %% [markdown] exercise="03.1"
# `sinusoidal_table(length, dim, theta)`: → (length, dim) fp32. Row t, coordinates 2i and 2i + 1: the sine and the cosine of
# $t\,\theta^{-2i/\mathrm{dim}}$. No loop: the check uses a large table, at which one takes a hundred times as long.
#
# For example row 0 is `[0, 1, 0, 1, …]`, and row 1 begins `[0.841, 0.540, …]`.


# %% exercise="03.1"
def sinusoidal_table(length: int, dim: int, theta: float) -> Tensor:
    """→ (length, dim)"""
    # <solution>
    speeds = theta ** -(torch.arange(0, dim, 2) / dim)
    angles = torch.arange(length)[:, None] * speeds
    table = torch.zeros(length, dim)
    table[:, 0::2], table[:, 1::2] = angles.sin(), angles.cos()
    return table
    # </solution>


# %% [markdown] exercise="03.2"
# `rope_frequencies(head_dim, theta)`: → (head_dim/2,) fp32, the radians by which each pair turns from one position to the
# next.
#
# For example `rope_frequencies(4, 10000.0)` is `[1.0, 0.01]`.


# %% exercise="03.2"
def rope_frequencies(head_dim: int, theta: float) -> Tensor:
    """→ (head_dim/2,)"""
    # <solution>
    pair = torch.arange(head_dim // 2).float()
    return theta ** (-2 * pair / head_dim)
    # </solution>


# %% [markdown] exercise="03.3"
# `rotate_pairs(x, angles)`: x (B, T, H, D), angles (T, D/2) in radians → (B, T, H, D) in the dtype of x. Pair i of a head,
# the coordinates 2i and 2i + 1, turns by angle i of its position, in fp32, whatever the dtype of x; the same in all heads.
# T may be 0.
#
# For example the pair (1, 0), turned by π/2, is (0, 1).


# %% exercise="03.3"
def rotate_pairs(x: Tensor, angles: Tensor) -> Tensor:
    """(B, T, H, D), (T, D/2) → (B, T, H, D)"""
    # <solution>
    cos, sin = angles.cos()[:, None, :], angles.sin()[:, None, :]
    a, b = x[..., 0::2].float(), x[..., 1::2].float()
    turned = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1)
    return turned.flatten(-2).to(x.dtype)
    # </solution>


# %% [markdown]
# Now hear it at work: the toy with your rotation and your frequencies in the place of the package's.

# %% tags=["nbval-ignore-output"]
model, tokenizer = load("toy")
try:
    mine = swap_in(model, rotate=rotate_pairs, frequencies=rope_frequencies)
    print(generate(mine, tokenizer, "", temperature=0.8, seed=2, max_new_tokens=60))
except NotImplementedError:
    print("Write 03.2 and 03.3 first.")

# %% [markdown] exercise="03.4"
# `rotate_halves(x, angles)`: the same in Hugging Face's layout: coordinate i turns together with coordinate i + D/2, by angle
# i. x (B, T, H, D), angles (T, D/2) → (B, T, H, D). Do not reorder and call 03.3: write it for this layout.
#
# For example for D = 4 and both angles π/2, (1, 2, 0, 0) becomes (0, 0, 1, 2).


# %% exercise="03.4"
def rotate_halves(x: Tensor, angles: Tensor) -> Tensor:
    """(B, T, H, D), (T, D/2) → (B, T, H, D)"""
    # <solution>
    half = x.shape[-1] // 2
    cos, sin = angles.cos().unsqueeze(1), angles.sin().unsqueeze(1)
    first, second = x[..., :half].float(), x[..., half:].float()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
    # </solution>


# %% [markdown] exercise="03.5"
# `to_pairs(w, head_dim)`: the weight of wq or wk from Hugging Face, (n_heads · head_dim, dim) in the layout of halves → the
# same shape and dtype in ours, so that `rotate_pairs` on its output gives the same scores as `rotate_halves` did before.
# Whole rows move, none is changed.
#
# For example with head_dim = 4, the rows 0 1 2 3 become 0 2 1 3.


# %% exercise="03.5"
def to_pairs(w: Tensor, head_dim: int) -> Tensor:
    """(n_heads · head_dim, dim) → the same"""
    # <solution>
    heads, half = w.shape[0] // head_dim, head_dim // 2
    return w.view(heads, 2, half, -1).permute(0, 2, 1, 3).reshape(w.shape)
    # </solution>


# %% [markdown] exercise="03.6"
# `cached_rotation(frequency, start, new)`: frequency (D/2,), start (B,) int64, how many tokens each row has already, and new,
# how many follow → the cosines and the sines of all angles, two tensors (B, new, 1, D/2) in fp32. The 1 stands where the
# heads will be.
#
# For example for frequency `[0.5]`, start `[0, 10]` and new = 1 the cosines are 1.000 and 0.284.


# %% exercise="03.6"
def cached_rotation(frequency: Tensor, start: Tensor, new: int) -> tuple[Tensor, Tensor]:
    """(D/2,), (B,), number → two of (B, new, 1, D/2)"""
    # <solution>
    positions = start.view(-1, 1) + torch.arange(new)
    angles = positions.float().unsqueeze(-1) * frequency
    angles = angles.unsqueeze(2)
    return angles.cos(), angles.sin()
    # </solution>


# %% [markdown] exercise="03.7"
# `llama3_scaling(plain, factor, low, high, original)`: plain (D/2,) frequencies in radians a position → (D/2,). A pair that
# makes fewer than `low` turns within `original` positions is divided by `factor`; one that makes more than `high` stays as
# it is; in between, the share that is kept rises in a straight line with the number of turns. Do not round turns: 2.5 is 2.5.
#
# For example with factor 8 and a pair half way between low and high: 0.5 · plain + 0.5 · plain / 8.


# %% exercise="03.7"
def llama3_scaling(plain: Tensor, factor: float, low: float, high: float, original: int) -> Tensor:
    """(D/2,) → (D/2,)"""
    # <solution>
    turns = plain * original / (2 * math.pi)
    share = ((turns - low) / (high - low)).clamp(min=0.0, max=1.0)
    return share * plain + (1.0 - share) * (plain / factor)
    # </solution>


# %% [markdown] exercise="03.8"
# `model.frequency` (head_dim/2,) holds the toy's clock hands, the fast ones first. Measure its mean loss on
# `story_validation(tokenizer, 20, seed=0)` as it is, with the faster half of the hands stopped (frequencies 0), and with the
# slower half stopped instead. Write down first which half you expect to be missed more: `"fast"` or `"slow"`.

# %% exercise="03.8"
measured_03 = {
    "predicted": None,  # "fast" or "slow", before you measure
    "loss": None,  # nats per token
    "fast stopped": None,
    "slow stopped": None,
    "because": None,  # a sentence
}
# <solution>
model, tokenizer = load("toy")
batches = story_validation(tokenizer, 20, seed=0).batches
plain = model.frequency.clone()
half = len(plain) // 2
measured_03["predicted"] = "fast"
measured_03["loss"] = mean_loss(model, batches)
for name, part in (("fast stopped", slice(0, half)), ("slow stopped", slice(half, None))):
    model.frequency = plain.clone()
    model.frequency[part] = 0
    measured_03[name] = mean_loss(model, batches)
measured_03["because"] = "its heads look for near neighbours, and only fast hands tell one position from the next"
# </solution>

# %% tags=["nbval-ignore-output"]
print(report())
