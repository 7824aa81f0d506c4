# %% [markdown]
# # 08 · Exercises: loss
#
# Chapter: [08 loss](../chapters/08_loss.ipynb). Run a check as often as you like: it says what is wrong.

# %%
import math

import torch
from torch import Tensor

from minillama import load
from minillama.course import case, check, hint, report, swap_in
from minillama.data import story_validation
from minillama.loss import cross_entropy

# %% [markdown] exercise="08.1"
# `log_softmax(logits)`: logits (..., V) in any floating dtype → log-probabilities (..., V) in fp32, over the last axis. Any
# finite logits must work, 10,000 and -10,000 too, and so must some that are minus infinity (their log-probability is minus
# infinity); each row has at least one finite logit.
#
# For example `log_softmax(torch.tensor([0.0, 0.0]))` is `[-0.693, -0.693]`.


# %% exercise="08.1"
def log_softmax(logits: Tensor) -> Tensor:
    """(..., V) → (..., V) fp32"""
    # <solution>
    z = logits.float()
    z = z - z.amax(-1, keepdim=True)
    return z - torch.exp(z).sum(-1, keepdim=True).log()
    # </solution>


# %% [markdown] exercise="08.2"
# `masked_cross_entropy(logits, targets)`: logits (..., V), targets (...) int64 → the mean surprise in nats, a tensor with no
# axes, in fp32. A target of -100 is not scored, at least one other is there; 0 is a token like any other. The shift is done:
# each target stands at the place from which it is guessed. Use your own `log_softmax`.
#
# For example with logits all 0 and V = 4 it is ln 4 = 1.386, whatever the targets.


# %% exercise="08.2"
def masked_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """(..., V), (...) → ()"""
    # <solution>
    scored = targets != -100
    rows = log_softmax(logits[scored])  # (N, V)
    return -rows[torch.arange(len(rows)), targets[scored]].mean()
    # </solution>


# %% [markdown] exercise="08.3"
# `shift(tokens, lengths)`: tokens (B, T) int64, each row a text with its BOS and EOS, filled up with 0 behind; lengths (B,)
# says how many of a row are real, at least 2; a 0 inside a text is a real token. → inputs (B, T-1), filling and all, and
# targets (B, T-1), both int64: what follows each input, or -100 where nothing real follows. `tokens` stay as they are.
#
# For example `[[1, 8, 2, 0]]` with length 3 becomes inputs `[[1, 8, 2]]` and targets `[[8, 2, -100]]`.


# %% exercise="08.3"
def shift(tokens: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """(B, T), (B,) → (B, T-1), (B, T-1)"""
    # <solution>
    inputs, targets = tokens[:, :-1].clone(), tokens[:, 1:].clone()
    column = torch.arange(targets.shape[1])
    targets[column >= lengths[:, None] - 1] = -100
    return inputs, targets
    # </solution>


# %% [markdown] exercise="08.4"
# `perplexity_and_bits(nats, scored, n_bytes)`: nats (...) is each token's surprise, scored (...) says which tokens count, and
# the scored ones together wrote n_bytes bytes of text. → perplexity and bits per byte, two floats.
#
# For example three scored tokens of ln 2 each that wrote 6 bytes have perplexity 2.0 and 0.5 bits per byte.


# %% exercise="08.4"
def perplexity_and_bits(nats: Tensor, scored: Tensor, n_bytes: int) -> tuple[float, float]:
    """→ (perplexity, bits per byte)"""
    # <solution>
    counted = nats[scored]
    bits = counted.sum().item() / math.log(2)
    return math.exp(counted.mean().item()), bits / n_bytes
    # </solution>


# %% [markdown] exercise="08.5"
# `kl_divergence(log_q, log_p)`: log-probabilities of the truth and of a model, both (N, V) → the mean over the N positions of
# KL(q ‖ p), in nats, a tensor with no axes. As in the chapter, q is the truth and p the model.
# The truth may have probabilities of 0 (log -inf); the model has none, though some as small as e^-200.
#
# For example for q = (1, 0) and p = (0.5, 0.5) it is ln 2 = 0.693.


# %% exercise="08.5"
def kl_divergence(log_q: Tensor, log_p: Tensor) -> Tensor:
    """(N, V), (N, V) → ()"""
    # <solution>
    possible = log_q > -torch.inf
    gap = torch.where(possible, log_q - log_p, torch.zeros_like(log_p))
    return (log_q.exp() * gap).sum(-1).mean()
    # </solution>


# %% [markdown] exercise="08.6"
# `loss_gradient(logits, targets)`: the gradient of the masked mean loss of 08.2 with respect to the logits, (..., V), without
# autograd.
#
# For example for logits `[[0., 0.]]` and target `[0]` it is `[[-0.5, 0.5]]`.


# %% exercise="08.6"
def loss_gradient(logits: Tensor, targets: Tensor) -> Tensor:
    """(..., V), (...) → (..., V)"""
    # <solution>
    scored = targets != -100
    gradient = torch.zeros_like(logits)
    rows = log_softmax(logits[scored]).exp()
    rows[torch.arange(len(rows)), targets[scored]] -= 1
    gradient[scored] = rows / len(rows)
    return gradient
    # </solution>


# %% [markdown] exercise="08.7"
# Multiply all logits of the toy by a factor, and measure its mean loss on `story_validation(tokenizer, 20, seed=0)`: by 0.5,
# as it is, by 2. Write down first at which factor you expect the lowest loss.

# %% exercise="08.7"
measured_08 = {
    "predicted": None,  # the best factor, before you measure
    "half": None,  # nats per token
    "loss": None,
    "double": None,
    "because": None,  # a sentence
}
# <solution>
model, tokenizer = load("toy")
measured_08["predicted"] = 1.0
for name, factor in (("half", 0.5), ("loss", 1.0), ("double", 2.0)):
    total, count = 0.0, 0
    for batch in story_validation(tokenizer, 20, seed=0).batches:
        with torch.inference_mode():
            total += cross_entropy(factor * model(batch.inputs), batch.targets).item() * batch.scored
        count += batch.scored
    measured_08[name] = total / count
measured_08["because"] = "a trained model is as sure as it is right, so more trust is punished and less is wasted"
# </solution>

# %% tags=["nbval-ignore-output"]
print(report())
