# %% [markdown]
# # 10 · Exercises: generation
#
# Chapter: [10 generation](../chapters/10_generation.ipynb). Run a check as often as you like: it says what is wrong.

# %%
import torch
from torch import Tensor

from minillama import generate, load, world
from minillama.course import case, check, hint, report
from minillama.rope import rotate, rotation

# %% [markdown] exercise="10.1"
# `with_temperature(logits, temperature)`: logits (B, V) in any floating dtype, temperature (B,) fp32, one for each row and
# at least 0 → probabilities (B, V) in fp32. A row of temperature 0 gets the limit: its best tokens, and only these, share all
# the probability equally. Temperatures may be tiny, logits large, and some logits minus infinity (not all of a row).
#
# For example `[[2., 2., 1.], [0., 1.0986, 0.]]` with the temperatures 0 and 1 becomes `[[0.5, 0.5, 0.], [0.2, 0.6, 0.2]]`.


# %% exercise="10.1"
def with_temperature(logits: Tensor, temperature: Tensor) -> Tensor:
    """(B, V), (B,) → (B, V) fp32"""
    # <solution>
    z = logits.float()
    z = z - z.amax(-1, keepdim=True)
    t = temperature[:, None]
    warm = torch.exp(z / torch.where(t > 0, t, 1.0))
    weights = torch.where(t > 0, warm, (z == 0).float())
    return weights / weights.sum(-1, keepdim=True)
    # </solution>


# %% [markdown] exercise="10.2"
# `top_k(logits, k)`: logits (B, V), k (B,) int64, one for each row, at least 1 and perhaps more than V → logits (B, V) of the
# same dtype. Each row keeps its k highest, and whatever ties with the k-th; all others become minus infinity. No loop over
# the rows: there may be many, or none.
#
# For example `[[3., 1., 3., 2., 3.]]` with k = 2 becomes `[[3., -inf, 3., -inf, 3.]]`: three tie for the second place.


# %% exercise="10.2"
def top_k(logits: Tensor, k: Tensor) -> Tensor:
    """(B, V), (B,) → (B, V)"""
    # <solution>
    ordered = logits.sort(dim=-1, descending=True).values
    place = k.clamp(max=logits.shape[-1]) - 1
    kth = ordered.gather(-1, place[:, None])
    return logits.masked_fill(logits < kth, -torch.inf)
    # </solution>


# %% [markdown] exercise="10.3"
# `top_p(logits, p)`: logits (B, V) in any floating dtype, p (B,) fp32, one for each row, above 0 and at most 1 →
# probabilities (B, V) in fp32. Each row keeps its likeliest tokens until together they have at least p; the token that
# reaches p is kept, nothing behind it; of equal tokens those with lower ids go first. What is kept sums to 1 again, all
# others have 0. No loop over rows or tokens; B may be 0.
#
# For example with the probabilities `[0.1, 0.5, 0.4]` and p = 0.6, what comes back is `[0, 0.556, 0.444]`.


# %% exercise="10.3"
def top_p(logits: Tensor, p: Tensor) -> Tensor:
    """(B, V), (B,) → (B, V) fp32"""
    # <solution>
    probabilities = logits.float().softmax(-1)
    ordered, ids = probabilities.sort(dim=-1, descending=True, stable=True)
    likelier = ordered.cumsum(-1) - ordered
    left = ordered.masked_fill(likelier >= p[:, None], 0.0)
    left = left / left.sum(-1, keepdim=True)
    return torch.zeros_like(left).scatter(-1, ids, left)
    # </solution>


# %% [markdown] exercise="10.4"
# From here on a model is a table: `table` (V, V) holds, in row i, the scores of what may follow token i. So it looks at the
# last token only, and you can compute by hand what it writes.
#
# `greedy(table, last, stops, limit)`: last (B,) int64 is the last token of each prompt, stops a list of ids (perhaps empty),
# limit the largest number of new tokens → the new tokens (B, N) int64, the likeliest at each step. A row ends with the first
# of its *new* tokens that is a stop; that token belongs to it; behind it stands 0. The steps end as soon as all rows have
# ended, or with the limit, so N is the length of the longest row. No two scores of a row of the table are equal.
#
# For example, if 1 is best followed by 2, 2 by 3, and 3 by 1, then with last `[1, 2]`, stops `[3]` and limit 5 it is
# `[[2, 3], [3, 0]]`.


# %% exercise="10.4"
def greedy(table: Tensor, last: Tensor, stops: list[int], limit: int) -> Tensor:
    """(V, V), (B,) → (B, N)"""
    # <solution>
    columns = []
    ended = torch.zeros(len(last), dtype=torch.bool)
    while len(columns) < limit and not ended.all():
        last = table[last].argmax(-1).masked_fill(ended, 0)
        columns.append(last)
        ended = ended | torch.isin(last, torch.tensor(stops, dtype=torch.int64))
    return torch.stack(columns, dim=1) if columns else last.new_empty(len(last), 0)
    # </solution>


# %% [markdown] exercise="10.5"
# `beam_search(table, start, stop, beams, limit, penalty)`: the texts that begin behind the token `start`, in a model that is
# a table as in 10.4. At every step, for `limit` steps:
#
# - continue each open text by every token (at first one open text, with nothing in it), and sort these candidates by
#   $\log P$, the sum of their tokens' log-probabilities;
# - of the first `beams` candidates, those that end with `stop` are finished;
# - of all candidates, the best `beams` that do not end with `stop` stay open.
#
# After the last step the open texts count as finished, too. A finished text of n new tokens (`stop` is one of them, `start`
# is not) has the score $\log P / n^{\text{penalty}}$. → the best `beams` finished texts, best score first, as a list of pairs
# (list of tokens, score as a float). There are no ties.
#
# For example, with the probabilities 0.1, 0.6, 0.3 behind token 0 and 0.05, 0.15, 0.8 behind token 1, the search from 0 with
# stop 2, one beam, 2 steps and penalty 1 gives `[([1, 2], -0.367)]`, since ln 0.48 / 2 = -0.367.


# %% exercise="10.5"
def beam_search(
    table: Tensor, start: int, stop: int, beams: int, limit: int, penalty: float
) -> list[tuple[list[int], float]]:
    """(V, V) → [(tokens, score), …], best first"""
    # <solution>
    log_p = table.log_softmax(-1)
    texts, totals, finished = [[]], torch.zeros(1), []
    for n in range(1, limit + 1):
        last = [text[-1] if text else start for text in texts]
        sums, places = (totals[:, None] + log_p[last]).flatten().sort(descending=True)
        open_texts, open_ranks = [], []
        for rank, place in enumerate(places.tolist()):
            text = [*texts[place // len(table)], place % len(table)]
            if text[-1] != stop and len(open_texts) < beams:
                open_texts.append(text)
                open_ranks.append(rank)
            elif text[-1] == stop and rank < beams:
                finished.append((text, sums[rank].item() / n**penalty))
        texts, totals = open_texts, sums[open_ranks]
    finished += [(text, total / limit**penalty) for text, total in zip(texts, totals.tolist(), strict=True)]
    return sorted(finished, key=lambda pair: pair[1], reverse=True)[:beams]
    # </solution>


# %% [markdown] exercise="10.6"
# `cached_attention(q, k, v, past_k, past_v, frequency)`: causal attention for T new tokens in one layer. q (B, H, T, D), k
# and v (B, K, T, D) belong to the new tokens, and q and k are not turned yet; past_k and past_v (B, K, P, D) are the cache,
# its keys turned already; B and P are perhaps 0. The tokens in the cache have the positions 0 to P - 1. frequency (D/2,)
# is the angle of each pair of neighbours for one position. → three: the outputs (B, H, T, D); the keys and the values,
# (B, K, P + T, D), with which the next step goes on. Query heads that stand side by side share a key/value head, H/K of
# them each.
#
# You may use `rotate(x, rotation(frequency, positions))` from chapter 03, for x (B, T, heads, D) and positions (T,).
#
# For example with T = P = 1 the new token has position 1, sees two keys, and its key comes back turned by `frequency`.


# %% exercise="10.6"
def cached_attention(
    q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor, frequency: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(B, H, T, D), 2 × (B, K, T, D), 2 × (B, K, P, D), (D/2,) → (B, H, T, D), 2 × (B, K, P + T, D)"""
    # <solution>
    new, past = q.shape[2], past_k.shape[2]
    turn = rotation(frequency, past + torch.arange(new))
    q, k = (rotate(x.transpose(1, 2), turn).transpose(1, 2) for x in (q, k))
    keys, values = torch.cat([past_k, k], dim=2), torch.cat([past_v, v], dim=2)
    grouped = q.unflatten(1, (k.shape[1], -1))  # (B, K, H/K, T, D)
    scores = grouped @ keys[:, :, None].mT / q.shape[-1] ** 0.5
    hidden = torch.ones(new, past + new, dtype=torch.bool).triu(past + 1)
    probabilities = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return (probabilities @ values[:, :, None]).flatten(1, 2), keys, values
    # </solution>


# %% [markdown] exercise="10.7"
# How hot can it get? Let the toy tell 32 stories in one call, `generate(model, tokenizer, [""] * 32, min_p=0.1, seed=0,
# max_new_tokens=200, …)`, at each of the temperatures 1, 1.5, 2 and 3, and measure the share of them that the world accepts:
# `world.log_prob(text)` raises `world.Fault` for the others. The hottest setting that passes is the highest of the four with
# at least three quarters of the share at 1. Write your prediction down first.

# %% exercise="10.7"
measured_10 = {
    "predicted": None,  # the hottest temperature that passes, before you measure
    "share at 1.0": None,  # from 0 to 1
    "share at 1.5": None,
    "share at 2.0": None,
    "share at 3.0": None,
    "hottest": None,  # one of the four temperatures
    "because": None,  # a sentence
}
# <solution>


def accepted(text: str) -> bool:
    try:
        world.log_prob(text)
    except world.Fault:
        return False
    return True


model, tokenizer = load("toy")
measured_10["predicted"] = 2.0
heats = (1.0, 1.5, 2.0, 3.0)
for heat in heats:
    stories = generate(model, tokenizer, [""] * 32, temperature=heat, min_p=0.1, seed=0, max_new_tokens=200)
    measured_10[f"share at {heat}"] = sum(accepted(text) for text in stories) / 32
enough = 0.75 * measured_10["share at 1.0"]
measured_10["hottest"] = max(heat for heat in heats if measured_10[f"share at {heat}"] >= enough)
measured_10["because"] = "at temperature T min-p keeps what m to the power T keeps at 1, so the tail returns"
# </solution>

# %% tags=["nbval-ignore-output"]
print(report())
