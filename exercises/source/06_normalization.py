# %% [markdown]
# # 06 · Exercises: normalization
#
# Chapter: [06 normalization](../chapters/06_normalization.ipynb). Run a check as often as you like:
# it says what is wrong.

# %%
import torch
from torch import Tensor

from minillama import generate, load
from minillama.course import case, check, hint, report, swap_in
from minillama.data import story_validation
from minillama.norm import RMSNorm
from minillama.trainer import mean_loss

# %% [markdown] exercise="06.1"
# `l2_norm(x)`: x (..., dim) → (..., dim), each vector along the last axis with length 1, in the dtype of x. A vector of
# zeros stays one; no length counts as less than 1e-12.
#
# For example `l2_norm(torch.tensor([[3.0, 4.0]]))` is `[[0.6, 0.8]]`.


# %% exercise="06.1"
def l2_norm(x: Tensor) -> Tensor:
    """x (..., dim) → (..., dim), every vector of length 1."""
    # <solution>
    length = (x * x).sum(-1, keepdim=True).sqrt()
    return x / length.clamp_min(1e-12)
    # </solution>


# %% [markdown] exercise="06.2"
# `layer_norm(x, weight, bias, eps)`: x (..., dim), weight and bias (dim,) → (..., dim). Take the mean away, divide by
# the standard deviation (with eps where it belongs), scale, shift.
#
# For example `[1., 3.]` with weight 1, bias 0 and eps 0 becomes `[-1., 1.]`; with any eps above 0, `[3., 3.]` becomes
# the bias.


# %% exercise="06.2"
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """x (..., dim) → (..., dim)"""
    # <solution>
    centred = x - x.mean(-1, keepdim=True)
    variance = (centred * centred).mean(-1, keepdim=True)
    return centred / (variance + eps).sqrt() * weight + bias
    # </solution>


# %% [markdown] exercise="06.3"
# `rms_norm(x, weight, eps)`: x (..., dim), weight (dim,) → (..., dim), all of one dtype. Also in bf16: equal to LLaMA's
# to the last bit, so mind where fp32 begins and where it ends.
#
# For example `[3., 4.]` with weight 1 and eps 0 becomes `[0.849, 1.131]`.


# %% exercise="06.3"
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (..., dim) → (..., dim)"""
    # <solution>
    wide = x.float()
    scale = torch.rsqrt((wide * wide).mean(-1, keepdim=True) + eps)
    return (wide * scale).to(x.dtype) * weight
    # </solution>


# %% [markdown]
# Now hear it at work: the toy with your norm in the place of the package's, in all its layers.

# %% tags=["nbval-ignore-output"]
model, tokenizer = load("toy")
try:
    print(generate(swap_in(model, norm=rms_norm), tokenizer, "", temperature=0.8, seed=0, max_new_tokens=60))
except NotImplementedError:
    print("Write 06.3 first.")

# %% [markdown] exercise="06.4"
# `pre_norm_step(x, weight, w, eps)`: one residual line of a block. x (..., dim) is the stream; the norm is an RMSNorm
# with `weight` (dim,) and `eps`; the sublayer turns y into `torch.tanh(y @ w.mT)`, w (dim, dim).
# All is fp32 here, and you may call your `rms_norm`.
#
# If w is all zeros, the stream comes out as it went in.


# %% exercise="06.4"
def pre_norm_step(x: Tensor, weight: Tensor, w: Tensor, eps: float) -> Tensor:
    """x (..., dim) → (..., dim)"""
    # <solution>
    normed = x / ((x * x).mean(-1, keepdim=True) + eps).sqrt() * weight
    return x + torch.tanh(normed @ w.mT)
    # </solution>


# %% [markdown] exercise="06.5"
# Take the division by the root mean square out of some norms of the toy (their learned weights stay), and measure the
# mean loss on `story_validation(tokenizer, 20, seed=0)`: as it is; without it in the norms before attention; without it
# in the last norm. Take a fresh toy each time. Write your prediction down first.

# %% exercise="06.5"
measured_06 = {
    "predicted": None,  # nats per token, without the last norm, before you measure
    "loss": None,  # of the untouched toy
    "without attention norms": None,
    "without the last norm": None,
    "because": None,  # a sentence
}
# <solution>


def loss_without(kind: str) -> float:
    model, tokenizer = load("toy")
    for name, layer in model.named_modules():
        if name.split(".")[-1] == kind:
            layer.forward = lambda x, layer=layer: x * layer.weight
    return mean_loss(model, story_validation(tokenizer, 20, seed=0).batches)


measured_06["predicted"] = 5.0
measured_06["loss"] = loss_without("none of them")
measured_06["without attention norms"] = loss_without("attention_norm")
measured_06["without the last norm"] = loss_without("norm")
measured_06["because"] = "the stream grows from block to block, and huge scores make the softmax too sure"
# </solution>

# %% tags=["nbval-ignore-output"]
print(report())
