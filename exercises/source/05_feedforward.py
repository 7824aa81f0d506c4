# %% [markdown]
# # 05 · Exercises: feed-forward
#
# Chapter: [05 feed-forward](../chapters/05_feedforward.ipynb). Run a check as often as you like: it says what is wrong.

# %%
import torch
from torch import Tensor

from minillama import generate, load
from minillama.course import case, check, hint, report, swap_in
from minillama.data import story_validation
from minillama.trainer import mean_loss

# %% [markdown] exercise="05.1"
# `silu(x)`: a tensor of any shape and any floating dtype → the same shape and dtype, $x \cdot \sigma(x)$ for every number.
# It must survive any finite input. bf16 and fp16 are computed in fp32 and rounded once, at the end; float64 stays float64.
# Write the sigmoid yourself: when this is graded, PyTorch's is not there.
#
# For example `silu(torch.tensor([0.0, 1.0]))` is `[0.000, 0.731]`.


# %% exercise="05.1"
def silu(x: Tensor) -> Tensor:
    """(...) → (...)"""
    # <solution>
    wide = x if x.dtype == torch.float64 else x.float()
    return (wide / (1 + torch.exp(-wide))).to(x.dtype)
    # </solution>


# %% [markdown] exercise="05.2"
# `swiglu(x, gate_up, down)`: x (..., dim), gate_up (2·ffn_dim, dim), the rows of the gate above the rows of up, and down
# (dim, ffn_dim) → (..., dim), for any number of axes in front. Weights are (out, in). Take two matrix products in all: the
# check sees only numbers and cannot count them, so count yourself. Nothing from 05.1 is needed, `F.silu` will do.
#
# For example with dim = ffn_dim = 1, all weights 1 and x = 2 it is 2 · 1.762 = 3.523.


# %% exercise="05.2"
def swiglu(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """x (..., dim) → (..., dim)"""
    # <solution>
    both = x @ gate_up.mT
    half = both.shape[-1] // 2
    opened, carried = both[..., :half], both[..., half:]
    opened = opened / (1 + torch.exp(-opened))
    return (opened * carried) @ down.mT
    # </solution>


# %% [markdown]
# Now hear it at work: the toy with your layer in the place of the package's.

# %% tags=["nbval-ignore-output"]
model, tokenizer = load("toy")
try:
    print(generate(swap_in(model, feedforward=swiglu), tokenizer, "", temperature=0.8, seed=1, max_new_tokens=60))
except NotImplementedError:
    print("Write 05.2 first.")

# %% [markdown] exercise="05.3"
# `feedforward_width(dim, matrices, multiple_of, multiplier)`: the width for a layer of `matrices` matrices (any number, not
# only 2 or 3) of dim × width which together have as many weights as two matrices of dim × 4·dim. Cut to a whole number,
# times `multiplier`, cut again, rounded up to a multiple of `multiple_of`. All are whole numbers but the multiplier; the
# result is an `int`.
#
# For example `feedforward_width(4096, 3, 256, 1.0)` is 11008, and `feedforward_width(768, 2, 1, 1.0)` is 3072, GPT-2's.


# %% exercise="05.3"
def feedforward_width(dim: int, matrices: int, multiple_of: int, multiplier: float) -> int:
    """The number of neurons of a feed-forward layer."""
    # <solution>
    fair = int(8 * dim / matrices)
    wanted = int(multiplier * fair)
    return -(-wanted // multiple_of) * multiple_of
    # </solution>


# %% [markdown] exercise="05.4"
# `feedforward_share(c)`: the parameters of all feed-forward layers of a LLaMA, and their share of all its parameters, from
# 0 to 1, as a pair. `c` is a dictionary with `dim n_layers n_heads n_kv_heads head_dim ffn_dim vocab_size tie_embeddings`.
#
# For LLaMA 7B it is (4328521728, 0.642…).


# %% exercise="05.4"
def feedforward_share(c: dict) -> tuple[int, float]:
    """(parameters of the feed-forward layers, their share of the whole model)"""
    # <solution>
    dim, layers = c["dim"], c["n_layers"]
    feedforward = layers * 3 * dim * c["ffn_dim"]
    queries, keys = (dim * c[heads] * c["head_dim"] for heads in ("n_heads", "n_kv_heads"))
    tables = c["vocab_size"] * dim * (1 if c["tie_embeddings"] else 2)
    rest = layers * (2 * queries + 2 * keys + 2 * dim) + dim + tables
    return feedforward, feedforward / (feedforward + rest)
    # </solution>


# %% [markdown] exercise="05.5"
# In the toy's last layer, what goes into `down` is 384 numbers for every token: its neurons. Call a neuron strong if the
# mean of its absolute value is large, over all positions of `story_validation(tokenizer, 20, seed=0).batches`. Silence the
# 38 strongest by setting their columns of the weight of `down` to zero, and measure the mean loss on the same stories; then
# the 38 weakest instead. Write your prediction down first.

# %% exercise="05.5"
measured_05 = {
    "predicted": None,  # nats per token, without the strongest, before you measure
    "loss": None,  # nothing silenced
    "strongest": None,  # the strongest silenced
    "weakest": None,  # the weakest silenced
    "because": None,  # a sentence
}
# <solution>
model, tokenizer = load("toy")
batches = story_validation(tokenizer, 20, seed=0).batches
down = model.blocks[-1].feedforward.down
strengths = []
hook = down.register_forward_pre_hook(lambda layer, inputs: strengths.append(inputs[0].abs().flatten(0, 1)))
measured_05["predicted"] = 1.0
measured_05["loss"] = mean_loss(model, batches)
hook.remove()
order = torch.cat(strengths).mean(0).argsort()
saved = down.weight.detach().clone()
for name, silent in (("strongest", order[-38:]), ("weakest", order[:38])):
    with torch.no_grad():
        down.weight.copy_(saved)
        down.weight[:, silent] = 0
    measured_05[name] = mean_loss(model, batches)
measured_05["because"] = "a loud neuron may say the same everywhere, and a quiet one may speak up only where it decides"
# </solution>

# %% tags=["nbval-ignore-output"]
print(report())
