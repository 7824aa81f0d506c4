# %% [markdown]
# # Clinic · Eight training runs that went wrong
#
# **You need** chapters [01](../chapters/01_tokens.ipynb) to [10](../chapters/10_generation.ipynb). **Time:** two hours.
#
# Most mistakes in training raise no error. The run ends, there is a curve, and the curve looks like a curve. What then
# has to be learned is to read it. Here are eight patients. All come from the same small trainer on the toy world
# (toy-small, 500 steps of AdamW, 16 stories a step, two in a row), and in each of them exactly one part is broken:
#
# | Disease | What it is |
# |---|---|
# | `leaked future` | in training, tokens see what comes after them |
# | `double shift` | the labels are moved by one twice, once too often |
# | `no warm-up` | the learning rate begins at its peak |
# | `exploding norm` | a norm makes large vectors larger |
# | `frozen embedding` | the optimizer was not given the table of embeddings |
# | `wrong RoPE at generation` | while it writes, new tokens get wrong positions |
# | `data order` | the stories come sorted as in their file |
# | `train/validation mix-up` | it is tested on what it was trained on |
#
# **The rounds:** look at eight charts and name each disease. **The surgery:** repair the eight parts, find whose each
# is, and see the patient recover.

# %%
import math
import random

import torch
import torch.nn.functional as F
from torch import Tensor

from minillama.course import case, chart, check, hint, report, samples, treat

# %% [markdown]
# ## How a healthy run looks
#
# Six panels: the **loss** of each batch (mean of five steps) and on stories that are held out, with the floor, below
# which nothing can get on new stories; the length of the **gradient** before clipping; the **learning rate**; how far
# four kinds of **weights** are from their random beginning; the size (root mean square) of the residual **stream**
# before the first block (0) and after each of the three, in the first and in the last step. In the patients' charts,
# grey is this healthy run.

# %% tags=["nbval-ignore-output"]
chart("healthy")

# %%
print(samples("healthy"))

# %% [markdown]
# After a minute of training the English is there and the facts are not yet: toys and names change on the way. That is
# no illness, it is youth.
#
# Write for each patient which disease it has, by its name in the list, and why: what shows it, and what speaks against
# the disease that looks most like it, in eight words or more.

# %% [markdown] exercise="clinic.1"
# Patient A: 500 steps, no error message.

# %% tags=["nbval-ignore-output"]
print(samples("A"))
chart("A")

# %% exercise="clinic.1"
patient_a = {
    "disease": None,  # its name, as in the list
    "because": None,  # a sentence
}
# <solution>
patient_a["disease"] = "frozen embedding"
patient_a["because"] = "the bar of the embedding is zero, while attention and feed-forward moved as far as in health"
# </solution>

# %% [markdown] exercise="clinic.2"
# Patient B: its owner is very happy with the curve.

# %% tags=["nbval-ignore-output"]
print(samples("B"))
chart("B")

# %% exercise="clinic.2"
patient_b = {"disease": None, "because": None}
# <solution>
patient_b["disease"] = "train/validation mix-up"
patient_b["because"] = "both losses are below the floor, and unlike with a leaked future it writes stretches of stories"
# </solution>

# %% [markdown] exercise="clinic.3"
# Patient C.

# %% tags=["nbval-ignore-output"]
print(samples("C"))
chart("C")

# %% exercise="clinic.3"
patient_c = {"disease": None, "because": None}
# <solution>
patient_c["disease"] = "no warm-up"
patient_c["because"] = "the learning rate begins at its peak and the loss stands high for a hundred steps, all bars move"
# </solution>

# %% [markdown] exercise="clinic.4"
# Patient D was sent home as healthy once, and came back.

# %% tags=["nbval-ignore-output"]
print(samples("D"))
chart("D")

# %% exercise="clinic.4"
patient_d = {"disease": None, "because": None}
# <solution>
patient_d["disease"] = "wrong RoPE at generation"
patient_d["because"] = "every curve is the healthy one and above the floor, so only what happens while it writes is ill"
# </solution>

# %% [markdown] exercise="clinic.5"
# Patient E holds the record.

# %% tags=["nbval-ignore-output"]
print(samples("E"))
chart("E")

# %% exercise="clinic.5"
patient_e = {"disease": None, "because": None}
# <solution>
patient_e["disease"] = "leaked future"
patient_e["because"] = "it is below the floor on new stories, which no honest model can be, and it cannot write at all"
# </solution>

# %% [markdown] exercise="clinic.6"
# Patient F.

# %% tags=["nbval-ignore-output"]
print(samples("F"))
chart("F")

# %% exercise="clinic.6"
patient_f = {"disease": None, "because": None}
# <solution>
patient_f["disease"] = "data order"
patient_f["because"] = "the training loss jumps, its gradient too, and validation lags behind: the kinds of stories come sorted"
# </solution>

# %% [markdown] exercise="clinic.7"
# Patient G.

# %% tags=["nbval-ignore-output"]
print(samples("G"))
chart("G")

# %% exercise="clinic.7"
patient_g = {"disease": None, "because": None}
# <solution>
patient_g["disease"] = "exploding norm"
patient_g["because"] = "in its last step the stream grows by powers of ten from block to block and is no number any more"
# </solution>

# %% [markdown] exercise="clinic.8"
# Patient H: "Is it not almost as good?" asks its owner.

# %% tags=["nbval-ignore-output"]
print(samples("H"))
chart("H")

# %% exercise="clinic.8"
patient_h = {"disease": None, "because": None}
# <solution>
patient_h["disease"] = "double shift"
patient_h["because"] = "the curves are calm but too high, and the samples leave out every second word of known sentences"
# </solution>

# %% [markdown]
# ## Surgery
#
# The trainer calls these eight functions. Here each of them is as it is in its patient: **broken**. Repair them.
#
# Then treat: `treated = treat("A", visible)` trains patient A again with your `visible` in the place of its own (about
# a minute; one processor core is enough), `chart("A", treated)` draws both runs, and `treated["samples"]` is what it
# writes now. Only the right medicine helps: a patient whose illness is elsewhere stays ill.

# %% [markdown] exercise="clinic.9"
# `batch_order(stories, epoch, seed)` → the numbers 0 to stories − 1 in the order in which the epoch reads them:
# shuffled by `random.Random(f"{seed}:{epoch}").shuffle`, so that every epoch has an order of its own, and a run that
# goes on after a stop has the same.
#
# For example `sorted(batch_order(4, 0, 7))` is `[0, 1, 2, 3]`.


# %% exercise="clinic.9"
def batch_order(stories: int, epoch: int, seed: int) -> list[int]:
    """→ every number from 0 to stories − 1 once"""
    # <broken>
    return list(range(stories))
    # </broken>
    # <solution>
    order = list(range(stories))
    random.Random(f"{seed}:{epoch}").shuffle(order)
    return order
    # </solution>


# %% [markdown] exercise="clinic.10"
# `learning_rate(step, steps, peak, warmup)` → the rate at a step (from 0): in a straight line up to `peak`, which step
# `warmup - 1` has, then down along half a cosine, which begins at the peak with step `warmup` and would reach zero at
# step `steps`. Without a warm-up (0) there is only the cosine.
#
# For example, with a peak of 1 and a warm-up of 4, steps 0 to 4 have 0.25, 0.5, 0.75, 1 and 1.


# %% exercise="clinic.10"
def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """The learning rate at a step."""
    # <broken>
    return peak * (1 + math.cos(math.pi * step / steps)) / 2
    # </broken>
    # <solution>
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / (steps - warmup)
    return peak * (1 + math.cos(math.pi * progress)) / 2
    # </solution>


# %% [markdown] exercise="clinic.11"
# `loss(logits, labels)`: logits (B, T, V) and labels (B, T) → the mean cross-entropy in nats over the scored places.
# `labels[b, t]` is the token that comes after place t: the loader has moved them already. −100 means not scored.
#
# For example, logits that are all zero give log V.


# %% exercise="clinic.11"
def loss(logits: Tensor, labels: Tensor) -> Tensor:
    """logits (B, T, V), labels (B, T) → ()"""
    # <broken>
    logits, labels = logits[:, :-1], labels[:, 1:]  # each place predicts the next
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
    # </broken>
    # <solution>
    places = logits.flatten(0, 1)
    return F.cross_entropy(places, labels.flatten(), ignore_index=-100)
    # </solution>


# %% [markdown] exercise="clinic.12"
# `norm(x, weight, eps)`: x (..., dim), weight (dim,) → (..., dim): RMSNorm, in fp32.
#
# For example `[3., 4.]` with weight 1 and eps 0 becomes `[0.849, 1.131]`.


# %% exercise="clinic.12"
def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (..., dim) → (..., dim)"""
    # <broken>
    size = torch.sqrt(x.square().mean(-1, keepdim=True) + eps)
    return x * size * weight
    # </broken>
    # <solution>
    root = torch.sqrt(x.square().mean(-1, keepdim=True) + eps)
    return x / root * weight
    # </solution>


# %% [markdown] exercise="clinic.13"
# `optimizer_groups(names, dims)`: the names of all parameters and how many dimensions each has → two lists of names, in
# the order in which they were given: those with weight decay (matrices, tables) and those without (norms, biases).
# Every parameter is in exactly one.
#
# For example `(["table", "norm"], [2, 1])` gives `(["table"], ["norm"])`.


# %% exercise="clinic.13"
def optimizer_groups(names: list[str], dims: list[int]) -> tuple[list[str], list[str]]:
    """→ names with weight decay, names without"""
    # <broken>
    decayed = [n for n, d in zip(names, dims, strict=True) if d >= 2 and n.startswith(("blocks.", "output."))]
    plain = [n for n, d in zip(names, dims, strict=True) if d < 2]
    return decayed, plain
    # </broken>
    # <solution>
    matrices = [name for name, dim in zip(names, dims, strict=True) if dim >= 2]
    vectors = [name for name, dim in zip(names, dims, strict=True) if dim < 2]
    return matrices, vectors
    # </solution>


# %% [markdown] exercise="clinic.14"
# `positions(cached, new)` → (new,) int64: the positions of `new` tokens that are given to the model when `cached` are
# in its cache. Positions begin at 0.
#
# For example `positions(0, 3)` is `[0, 1, 2]`.


# %% exercise="clinic.14"
def positions(cached: int, new: int) -> Tensor:
    """→ (new,) int64"""
    # <broken>
    return torch.arange(new)
    # </broken>
    # <solution>
    return torch.arange(cached, cached + new)
    # </solution>


# %% [markdown] exercise="clinic.15"
# `split(texts, share, seed)` → two lists of line numbers, each in rising order: for training, and held out. A text may
# stand in the file more than once. Take the different texts in alphabetical order, shuffle them with
# `random.Random(seed).shuffle`, and hold out the first `round(share * number)` of them, at least one.
#
# For example, if lines 0 and 2 are the same text, they are on the same side.


# %% exercise="clinic.15"
def split(texts: list[str], share: float, seed: int) -> tuple[list[int], list[int]]:
    """→ lines for training, lines held out"""
    # <broken>
    lines = list(range(len(texts)))
    random.Random(seed).shuffle(lines)
    count = max(1, round(share * len(texts)))
    return sorted(lines[count:]), sorted(lines[:count])
    # </broken>
    # <solution>
    different = sorted(set(texts))
    random.Random(seed).shuffle(different)
    kept_away = set(different[: max(1, round(share * len(different)))])
    training = [line for line, text in enumerate(texts) if text not in kept_away]
    held_out = [line for line, text in enumerate(texts) if text in kept_away]
    return training, held_out
    # </solution>


# %% [markdown] exercise="clinic.16"
# `visible(story)`: story (B, T) int64, the number of the story to which each token of a row belongs → (B, T, T)
# booleans; `[b, t, s]` says whether token t may look at token s.
#
# For example, in a row of stories `[0, 0, 1]` the last token sees itself only.


# %% exercise="clinic.16"
def visible(story: Tensor) -> Tensor:
    """story (B, T) → (B, T, T) booleans"""
    # <broken>
    return story[:, :, None] == story[:, None, :]  # not into another story
    # </broken>
    # <solution>
    same = story[:, :, None] == story[:, None, :]
    time = torch.arange(story.shape[1])
    return same & (time[:, None] >= time)
    # </solution>


# %% [markdown]
# ## Afterwards
#
# - Two patients were **below the floor**, and neither was well. In the toy world the floor is known, so "too good" is
#   visible. On real text nobody knows the floor: there, the samples are what tells them apart, and where a held-out
#   text comes from must be proved, not believed.
# - Two had **no sign in any curve** that you would look at twice without a healthy run beside it (D and H). Read samples.
# - When you treat B, its validation loss gets *worse*: it was always that bad, and now you see it.
# - One is a matter of the optimizer: with Muon for the matrices and blocks that begin at zero, this model trains as
#   well without a warm-up. AdamW's first steps, each as long as the learning rate allows, are what needs it.

# %% tags=["nbval-ignore-output"]
print(report())
