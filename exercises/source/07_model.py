# %% [markdown]
# # 07 · Exercises: the model
#
# Chapter: [07 the model](../chapters/07_model.ipynb). Run a check as often as you like: it says what is wrong.
#
# The weights of a layer come as a dictionary `w` of tensors, each (out, in), with the names `attention_norm wq wk wv wo
# feedforward_norm gate up down`. The shape comes as a dictionary `s` with `n_heads n_kv_heads head_dim`, `eps` of
# all norms and `theta`, the base of the rotary angles.

# %%
import math

import torch
from torch import Tensor, nn

from minillama import load
from minillama.course import case, check, hint, report, swap_in
from minillama.data import story_validation
from minillama.trainer import mean_loss

# %% [markdown] exercise="07.1"
# `block(x, w, s)`: one layer, x (B, T, dim) → (B, T, dim), positions 0 to T - 1, causal, key/value heads shared among
# neighbouring query heads, rotary pairs as neighbours (2i, 2i + 1). Write what you need beside it, or bring it along from
# your other notebooks.
#
# For example with `wo` and `down` all zeros, x comes out as it went in. That is case 0 of the check; in case 1 only `down` is
# all zeros (what is wrong there is in attention), in case 2 only `wo` (there it is in the feed-forward layer).


# %% exercise="07.1"
def block(x: Tensor, w: dict[str, Tensor], s: dict) -> Tensor:
    """(B, T, dim) → (B, T, dim)"""

    # <solution>
    def norm(y: Tensor, weight: Tensor) -> Tensor:
        return y / (y.pow(2).mean(-1, keepdim=True) + s["eps"]).sqrt() * weight

    def heads(y: Tensor, name: str, n: int) -> Tensor:  # (B, n, T, D)
        return (y @ w[name].T).view(*y.shape[:2], n, s["head_dim"]).transpose(1, 2)

    def turn(y: Tensor) -> Tensor:
        pair = torch.arange(s["head_dim"] // 2)
        angle = torch.arange(y.shape[2])[:, None] / s["theta"] ** (2 * pair / s["head_dim"])
        even, odd = y[..., 0::2], y[..., 1::2]
        turned = (even * angle.cos() - odd * angle.sin(), even * angle.sin() + odd * angle.cos())
        return torch.stack(turned, dim=-1).reshape(y.shape)

    a = norm(x, w["attention_norm"])
    q, k = turn(heads(a, "wq", s["n_heads"])), turn(heads(a, "wk", s["n_kv_heads"]))
    v = heads(a, "wv", s["n_kv_heads"])
    group = s["n_heads"] // s["n_kv_heads"]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = q @ k.transpose(2, 3) / s["head_dim"] ** 0.5
    seen = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
    shares = scores.masked_fill(~seen, -math.inf).softmax(dim=-1)
    x = x + (shares @ v).transpose(1, 2).reshape(*x.shape[:2], -1) @ w["wo"].T
    b = norm(x, w["feedforward_norm"])
    gate = b @ w["gate"].T
    return x + (gate * gate.sigmoid() * (b @ w["up"].T)) @ w["down"].T
    # </solution>


# %% [markdown] exercise="07.2"
# `logits(tokens, state, layers, s)`: the whole model. tokens (B, T) int64; `state` has `embedding` (V, dim), `norm` (dim,), the
# last norm's weight, and, only if the output is not tied, `output` (V, dim); `layers` is a list of dictionaries `w`.
# → (B, T, V). Use your `block`.
#
# For example with no layers at all it is: look up, norm, compare with every row of the output's table. That is case 0 of the
# check; case 1 has one layer, the others have more.


# %% exercise="07.2"
def logits(tokens: Tensor, state: dict[str, Tensor], layers: list[dict[str, Tensor]], s: dict) -> Tensor:
    """(B, T) → (B, T, V)"""
    # <solution>
    x = state["embedding"][tokens]
    for w in layers:
        x = block(x, w, s)
    x = x / (x.pow(2).mean(-1, keepdim=True) + s["eps"]).sqrt() * state["norm"]
    return x @ state.get("output", state["embedding"]).T
    # </solution>


# %% [markdown] exercise="07.3"
# `count_parameters(c)`: a dictionary with the number of weights under `embedding attention feedforward norms output` for any
# LLaMA. `c` is a dictionary with `dim n_layers n_heads n_kv_heads head_dim ffn_dim vocab_size tie_embeddings`; the width of a
# head is head_dim, whatever dim / n_heads is. A tied output counts 0.
#
# For LLaMA 7B the five numbers add up to 6,738,415,616.


# %% exercise="07.3"
def count_parameters(c: dict) -> dict[str, int]:
    """→ {"embedding": …, "attention": …, "feedforward": …, "norms": …, "output": …}"""
    # <solution>
    table = c["vocab_size"] * c["dim"]
    q, kv = (c["dim"] * c["head_dim"] * c[name] for name in ("n_heads", "n_kv_heads"))
    return {
        "embedding": table,
        "attention": c["n_layers"] * (q + kv + kv + q),
        "feedforward": c["n_layers"] * (3 * c["dim"] * c["ffn_dim"]),
        "norms": c["n_layers"] * 2 * c["dim"] + c["dim"],
        "output": table * (not c["tie_embeddings"]),
    }
    # </solution>


# %% [markdown] exercise="07.4"
# `residual_std(n_layers, std)`: a model that does not begin with zeros draws all matrices with the standard deviation `std`, but
# those that write into the stream (`wo` and `down` of every layer) with a smaller one, so that all their additions together
# have the variance that one addition with `std` would have. Which?
#
# For example for 2 layers and 0.02 it is 0.01.


# %% exercise="07.4"
def residual_std(n_layers: int, std: float) -> float:
    """→ the standard deviation for wo and down"""
    # <solution>
    additions = 2 * n_layers
    return std * additions**-0.5
    # </solution>


# %% [markdown] exercise="07.5"
# Leave each of the toy's layers out in turn (the others stay, in order) and measure the mean loss on
# `story_validation(tokenizer, 20, seed=0)`. Write down first which one you expect to be missed most.

# %% exercise="07.5"
measured_07 = {
    "predicted": None,  # the number of a layer, before you measure
    "loss": None,  # nothing left out, nats per token
    "without": None,  # a list: without layer 0, without layer 1, …
    "because": None,  # a sentence
}
# <solution>
model, tokenizer = load("toy")
batches = story_validation(tokenizer, 20, seed=0).batches
layers = list(model.blocks)
measured_07["predicted"] = 0
measured_07["loss"] = mean_loss(model, batches)
measured_07["without"] = []
for i in range(len(layers)):
    model.blocks = nn.ModuleList([layer for j, layer in enumerate(layers) if j != i])
    measured_07["without"].append(mean_loss(model, batches))
measured_07["because"] = "the first layer marks what each token is for, and all later ones look for these marks"
# </solution>

# %% tags=["nbval-ignore-output"]
print(report())
