# %% [markdown]
# # 09 · Exercises: training
#
# Chapter: [09 training](../chapters/09_training.ipynb). Run a check as often as you like: it says what is wrong.

# %%
import math

import torch
from torch import Tensor

from minillama import Llama, ModelConfig, load
from minillama.course import case, check, hint, report
from minillama.data import StoryBatches
from minillama.loss import cross_entropy

# %% [markdown] exercise="09.1"
# `adamw_step(weights, gradients, m, v, step, settings)`: one step for all tensors of a model. weights, m and v are lists of
# tensors, each of any shape; gradients too, but a gradient may be None: that weight and its moments stay as they are. step
# is 1 for the first step. settings is a dictionary with rate, beta1, beta2, eps, decay. Only tensors with two axes or more
# decay. → new weights, new m, new v: three lists; change nothing in place.
#
# For example a first step with rate 0.1, decay 0 and the gradient `[3., -0.2]` moves the weight `[1., 1.]` to `[0.9, 1.1]`.


# %% exercise="09.1"
def adamw_step(
    weights: list[Tensor],
    gradients: list[Tensor | None],
    m: list[Tensor],
    v: list[Tensor],
    step: int,
    settings: dict[str, float],
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """→ new weights, m, v"""
    # <solution>
    rate, beta1, beta2 = settings["rate"], settings["beta1"], settings["beta2"]
    new_weights, new_m, new_v = [], [], []
    for w, g, mean, square in zip(weights, gradients, m, v, strict=True):
        if g is not None:
            mean = beta1 * mean + (1 - beta1) * g
            square = beta2 * square + (1 - beta2) * g * g
            mean_now = mean / (1 - beta1**step)
            size_now = (square / (1 - beta2**step)).sqrt() + settings["eps"]
            decay = settings["decay"] if w.dim() >= 2 else 0.0
            w = w - rate * decay * w - rate * mean_now / size_now
        new_weights.append(w)
        new_m.append(mean)
        new_v.append(square)
    return new_weights, new_m, new_v
    # </solution>


# %% [markdown] exercise="09.2"
# `learning_rate(step, steps, warmup, peak, final)`: the rate at many steps at once. step (...) int64, counted from 0 → (...)
# fp32. It rises in `warmup` equal parts, the last of which is at `peak`; then it falls along half a cosine that begins at the
# peak at step `warmup` and arrives at `final` times the peak at step `steps`, where it stays. Either part may be empty.
#
# For example with steps 8, warmup 4, peak 1 and final 0, steps 0, 3, 4, 6, 8 have the rates `[0.25, 1, 1, 0.5, 0]`.


# %% exercise="09.2"
def learning_rate(step: Tensor, steps: int, warmup: int, peak: float, final: float) -> Tensor:
    """(...) int64 → (...) fp32"""
    # <solution>
    rising = (step + 1) / max(warmup, 1)
    progress = ((step - warmup) / max(steps - warmup, 1)).clamp(max=1.0)
    falling = final + (1 - final) * (1 + torch.cos(math.pi * progress)) / 2
    return peak * torch.where(step < warmup, rising, falling)
    # </solution>


# %% [markdown] exercise="09.3"
# `clip_gradients(gradients, limit)`: gradients is a list of tensors, some or all of them None; it may be empty. → a new list,
# shortened as a whole to the norm `limit` if it is longer (each in its own dtype, None where None was), and its norm before, a
# float. The numbers may be as large as 1e25, and all be 0. If the norm is not finite, raise FloatingPointError.
#
# For example `[[3.], None, [4.]]` with limit 1 becomes `[[0.6], None, [0.8]]` and 5.0.


# %% exercise="09.3"
def clip_gradients(gradients: list[Tensor | None], limit: float) -> tuple[list[Tensor | None], float]:
    """→ clipped gradients, norm before"""
    # <solution>
    norm = math.sqrt(sum(float((g.double() ** 2).sum()) for g in gradients if g is not None))
    if not math.isfinite(norm):
        raise FloatingPointError(f"the norm is {norm}, expected a number")
    factor = limit / norm if norm > limit else 1.0
    return [g if g is None else g * factor for g in gradients], norm
    # </solution>


# %% [markdown] exercise="09.4"
# `batches(stories, length)`: stories is a list of lists of token ids, each from BOS (1) to EOS (2), with ids above 2 between
# them and 2 to length + 1 tokens in all. A story of n tokens fills n - 1 places with its inputs, and as many targets. Go through
# them in order: a story goes into the newest row if it fits there as a whole, else it begins a new row. → inputs (B, length)
# int64, filled up with 0; targets (B, length) int64, filled up with -100; mask (B, length, length) bool: True where the place in
# the row may look at the place in the column: same story and not later. For the mask, a row's padding counts as one more story.
#
# For example `[[1, 7, 2], [1, 2]]` with length 4 has the inputs `[[1, 7, 1, 0]]` and the targets `[[7, 2, 2, -100]]`.


# %% exercise="09.4"
def batches(stories: list[list[int]], length: int) -> tuple[Tensor, Tensor, Tensor]:
    """→ inputs (B, length), targets (B, length), mask (B, length, length)"""
    # <solution>
    rows: list[list[tuple[int, int, int]]] = []
    for number, story in enumerate(stories):
        places = [(now, following, number) for now, following in zip(story[:-1], story[1:], strict=True)]
        if not rows or len(rows[-1]) + len(places) > length:
            rows.append([])
        rows[-1] += places
    full = [row + [(0, -100, -1)] * (length - len(row)) for row in rows]
    table = torch.tensor(full, dtype=torch.int64).view(len(rows), length, 3)
    inputs, targets, number_of = table.unbind(-1)
    place = torch.arange(length)
    mask = (number_of[:, :, None] == number_of[:, None, :]) & (place[:, None] >= place[None, :])
    return inputs.contiguous(), targets.contiguous(), mask
    # </solution>


# %% [markdown] exercise="09.5"
# `accumulate(gradients, scored)`: a big batch came in parts. gradients has a list for each part, with the gradient of each
# weight: that of the part's mean loss over its own scored tokens. scored has the number of these tokens for each part. → the
# list of gradients that the whole batch would have had in one piece, in fp32. Some come in bf16; a gradient is None where a
# part does not use that weight (None for all parts: None); a part may have 0 scored tokens (its gradients are then NaN), but
# not all have.
#
# For example `[[[1.]], [[5.]]]` with `[3, 1]` scored tokens becomes `[[2.]]`.


# %% exercise="09.5"
def accumulate(gradients: list[list[Tensor | None]], scored: list[int]) -> list[Tensor | None]:
    """one list per part → one list, fp32"""
    # <solution>
    whole: list[Tensor | None] = [None] * len(gradients[0])
    for part, count in zip(gradients, scored, strict=True):
        for i, g in enumerate(part):
            if g is not None and count > 0:
                share = g.float() * count
                before = whole[i]
                whole[i] = share if before is None else before + share
    return [g if g is None else g / sum(scored) for g in whole]
    # </solution>


# %% [markdown] exercise="09.6"
# Train a tiny model for 30 steps with your `adamw_step`, by `short_run` below: with the rate 0.01 and with 0.12, each as it is
# and without bias correction. Note the mean loss of the last five steps. Write your prediction down first. (beta2 is 0.999
# here, Adam's usual one; the chapter worked out the length of the first step.)


# %%
def short_run(rate: float, step_number=lambda step: step) -> float:
    """The mean loss of the last five of 30 steps. step_number(1), step_number(2), … is what adamw_step is told."""
    torch.manual_seed(0)
    model = Llama(ModelConfig(dim=48, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16, ffn_dim=128, vocab_size=2048,
                              max_seq_len=512, tie_embeddings=True))  # fmt: skip
    source = StoryBatches(load("toy")[1], 4, seed=0)
    weights = list(model.parameters())
    m, v = [torch.zeros_like(w) for w in weights], [torch.zeros_like(w) for w in weights]
    losses = []
    for step in range(1, 31):
        batch = source(step)
        loss = cross_entropy(model(batch.inputs), batch.targets)
        losses.append(loss.item())
        gradients = list(torch.autograd.grad(loss, weights))
        settings = {"rate": rate, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "decay": 0.1}
        with torch.no_grad():
            moved, m, v = adamw_step(weights, gradients, m, v, step_number(step), settings)
            for w, new in zip(weights, moved, strict=True):
                w.copy_(new)
    return sum(losses[-5:]) / 5


# %% exercise="09.6"
measured_09 = {
    "predicted": None,  # nats per token, at the large rate without bias correction, before you measure
    "small": None,  # rate 0.01
    "small, not corrected": None,
    "large": None,  # rate 0.12
    "large, not corrected": None,
    "because": None,  # a sentence
}
# <solution>
measured_09["predicted"] = 6.0
for size, peak in (("small", 0.01), ("large", 0.12)):
    measured_09[size] = short_run(peak)
    measured_09[f"{size}, not corrected"] = short_run(peak, lambda step: 10**9)
measured_09["because"] = "the first steps are three times too long: that is progress at a small rate, and too far at a large one"
# </solution>

# %% tags=["nbval-ignore-output"]
print(report())
