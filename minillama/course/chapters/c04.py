"""Exercises of chapter 04, attention."""

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minillama import attention
from minillama.checkpoint import load
from minillama.course.exercise import Exercise, Experiment, Task, Wrong
from minillama.data import story_validation
from minillama.trainer import mean_loss

# 04.1 ----------------------------------------------------------------------------------------------------------------


def _score_cases(rng: torch.Generator) -> Iterable[tuple[Any, ...]]:
    shapes = ((2, 6, 3, 7, 10), (1, 3, 1, 9, 5), (2, 2, 4, 4, 6), (1, 5, 2, 3, 1), (3, 1, 1, 1, 7), (2, 3, 2, 0, 4))
    for b, h, t, s, d in shapes:
        yield torch.randn(b, h, t, d, generator=rng), torch.randn(b, h, s, d, generator=rng)
    yield torch.randn(1, 2, 3, 6, generator=rng) * 1e3, torch.randn(1, 2, 5, 6, generator=rng) * 1e3
    yield tuple((torch.randn(2, 3, n, 11, generator=rng) * 3).bfloat16() for n in (4, 6))


def _scores(q: Tensor, k: Tensor) -> Tensor:
    """q (…, T, D), k (…, S, D) → (…, T, S) in fp32, not divided."""
    return q.float() @ k.float().mT


SCORES = Exercise(
    "04.1", "scores", "attention_scores", minutes=10, difficulty=2,
    why="How well each question fits each key: all that attention decides, it decides on these numbers.",
    reference=lambda q, k: torch.einsum("bhtd,bhsd->bhts", q.float(), k.float()) * q.shape[-1] ** -0.5,
    cases=_score_cases,
    wrong=(
        Wrong("nothing is divided by the root of head_dim: the scores grow with the size of a head, and softmax "
              "saturates.", _scores),
        Wrong("nothing is divided by the root of head_dim, and bf16 is not widened to fp32.", lambda q, k: q @ k.mT),
        Wrong("it is divided by the root of all heads' numbers together: each score adds up only head_dim of them.",
              lambda q, k: _scores(q, k) / math.sqrt(q.shape[1] * q.shape[-1])),
        Wrong("it is divided by head_dim itself: a root is missing.", lambda q, k: _scores(q, k) / q.shape[-1]),
        Wrong("it is multiplied by the root of head_dim where it should be divided.",
              lambda q, k: _scores(q, k) * math.sqrt(q.shape[-1])),
        Wrong("it is divided by the root of the number of queries: what is added up are the numbers of a head.",
              lambda q, k: _scores(q, k) / math.sqrt(q.shape[-2])),
        Wrong("what lies in the future is hidden already: only the scores are asked for, the mask is the next step.",
              lambda q, k: (_scores(q, k) / math.sqrt(q.shape[-1])).masked_fill(
                  ~_triangle(q.shape[-2], k.shape[-2], k.shape[-2] - q.shape[-2]), -torch.inf)),
        Wrong("keys stand in the rows and queries in the columns: a row belongs to the token that looks.",
              lambda q, k: _scores(q, k).mT / math.sqrt(q.shape[-1])),
        Wrong("in bf16 the scores come out in bf16: widen both to fp32 before they are multiplied.",
              lambda q, k: q @ k.mT / math.sqrt(q.shape[-1])),
        Wrong("in bf16 the products are rounded to bf16 and widened only then: widen before.",
              lambda q, k: (q @ k.mT).float() / math.sqrt(q.shape[-1])),
    ),
    hints=(
        "How many numbers are multiplied and added up for one score, and what does that do to its spread?",
        "Turn the last two axes of the keys round, multiply for all heads of the batch at once, and divide by a root.",
        "both to fp32 · product of queries with turned keys, (B, H, T, S) · over the root of the length of a query.",
    ),
    tolerance=2e-6,
    part="scores",
)  # fmt: skip


# 04.2 ----------------------------------------------------------------------------------------------------------------


def _softmax_cases(rng: torch.Generator) -> Iterable[tuple[Any, ...]]:
    partly = torch.randn(2, 3, 4, 5, generator=rng) * 3
    partly[:, :, 0, 1:], partly[:, :, 1, 3:] = -torch.inf, -torch.inf
    wholly = torch.randn(4, 6, generator=rng)
    wholly[1], wholly[2, :4] = -torch.inf, -torch.inf
    far = torch.randn(3, 5, generator=rng) + torch.tensor([[0.0], [-500.0], [700.0]])
    lowest = torch.randn(2, 3, 4, generator=rng) * 3
    lowest[0, 1] -= 2e10  # below any number that stands for minus infinity elsewhere
    lowest[..., 2:] = -torch.inf
    return [
        (torch.randn(2, 6, 3, 7, generator=rng),),
        (far,),
        (torch.randn(3, 4, generator=rng) * 1e4,),
        (partly,),
        (wholly,),
        (lowest,),
        (torch.randn(5, generator=rng) - 1e10,),
        (torch.randn(1, generator=rng),),
        (torch.randn(0, 4, generator=rng),),
    ]


def _stubborn(scores: Tensor) -> Tensor:
    """Softmax that takes the largest of all rows away from all."""
    return _shares(scores, scores.max())


def _shares(scores: Tensor, largest: Tensor) -> Tensor:
    powers = (scores - largest).exp()
    return powers / powers.sum(-1, keepdim=True)


def _filled(scores: Tensor, number: float) -> Tensor:
    return scores.masked_fill(scores.isneginf(), number)


SOFTMAX = Exercise(
    "04.2", "stable softmax", "softmax", minutes=10, difficulty=2,
    why="It turns scores into shares, and overflows on ordinary numbers if it is written as it is defined.",
    reference=lambda scores: torch.softmax(scores, -1).nan_to_num(0.0),
    cases=_softmax_cases,
    wrong=(
        Wrong("an exponential overflows or vanishes: far from zero, scores give NaN.",
              lambda scores: scores.exp() / scores.exp().sum(-1, keepdim=True)),
        Wrong("it runs over the first axis: each row along the last axis must sum to 1.",
              lambda scores: torch.softmax(scores, 0)),
        Wrong("it runs down the columns, over the tokens that look: a row, what one token gives, must sum to 1.",
              lambda scores: torch.softmax(scores, -2)),
        Wrong("the largest of the whole tensor is taken away: in rows far below it every exponential vanishes.",
              _stubborn),
        Wrong("the largest of the whole tensor is taken away: rows far below it come out as 0, as if all were hidden.",
              lambda scores: _stubborn(scores).nan_to_num(0.0)),
        Wrong("what is taken away is never below 0: the powers of rows far below zero vanish, and so do their shares.",
              lambda scores: _shares(scores, scores.amax(-1, keepdim=True).clamp_min(0.0)).nan_to_num(0.0)),
        Wrong("what is taken away is kept above a finite number, and a row can lie far below it: its shares vanish.",
              lambda scores: _shares(scores, scores.amax(-1, keepdim=True).clamp_min(-1e9)).nan_to_num(0.0)),
        Wrong("the hidden scores enter the maximum as 0 or another number: where all visible ones are far below it, "
              "their shares vanish.",
              lambda scores: _shares(scores, _filled(scores, 0.0).amax(-1, keepdim=True)).nan_to_num(0.0)),
        Wrong("hidden scores are set to a finite number: where all visible ones lie lower still, the hidden get the "
              "shares.",
              lambda scores: torch.softmax(_filled(scores, -1e9), -1) * ~scores.isneginf().all(-1, keepdim=True)),
        Wrong("hidden scores are set to a finite number: a row of nothing else is shared out evenly, and scores that "
              "lie lower still are beaten by it.",
              lambda scores: torch.softmax(_filled(scores, -1e9), -1)),
        Wrong("a row in which everything is hidden becomes NaN: nobody to look at means shares of 0.",
              lambda scores: torch.softmax(scores, -1)),
        Wrong("a row in which everything is hidden is shared out evenly: what is hidden must get exactly 0.",
              lambda scores: torch.softmax(scores, -1).nan_to_num(1 / scores.shape[-1])),
        Wrong("the shares are not divided by their sum: the largest of each row is 1.",
              lambda scores: (scores - scores.amax(-1, keepdim=True)).exp().nan_to_num(0.0)),
        Wrong("it is divided by the sum of all rows together: each row has its own.",
              lambda scores: (scores - scores.amax(-1, keepdim=True)).exp()
              / (scores - scores.amax(-1, keepdim=True)).exp().sum()),
        Wrong("each share is multiplied by its score: the exponentials alone are the shares.",
              lambda scores: (torch.softmax(scores, -1) * scores).nan_to_num(0.0)),
    ),
    hints=(
        "What happens to the shares of a row if you take the same number away from all of its scores?",
        "Take each row's largest away first. A row of nothing but minus infinity has no finite largest, and its powers "
        "sum to 0: see to it that neither becomes NaN.",
        "largest of each row, kept as an axis of 1; where it is minus infinity, any finite number instead · powers of "
        "the difference · over their sum, which is not let down to 0.",
    ),
    part="softmax",
    blocked=("torch.softmax", "torch.Tensor.softmax", "torch.nn.functional.softmax", "torch.nn.Softmax.forward",
             "torch.log_softmax", "torch.Tensor.log_softmax", "torch.nn.functional.log_softmax",
             "torch.logsumexp", "torch.Tensor.logsumexp"),
)  # fmt: skip


# 04.3 ----------------------------------------------------------------------------------------------------------------


def _mask_cases(rng: torch.Generator) -> Iterable[tuple[Any, ...]]:
    drawn = torch.randint(2, 9, (4, 2), generator=rng).tolist()
    return [(3, 7), (5, 5), (1, 6), (1, 1), *((new, new + kept) for new, kept in drawn)]


def _triangle(new: int, total: int, diagonal: int) -> Tensor:
    return torch.ones(new, total, dtype=torch.bool).tril(diagonal)


MASK = Exercise(
    "04.3", "causal mask", "causal_mask", minutes=15, difficulty=3,
    why="One place too many, and training looks splendid while the model learns nothing; one too few, and it is blind.",
    reference=lambda new, total: torch.arange(total) <= torch.arange(total - new, total)[:, None],
    cases=_mask_cases,
    wrong=(
        Wrong("the earlier tokens are forgotten: row 0 is not the first token of the text, but the first of the new.",
              lambda new, total: _triangle(new, total, 0)),
        Wrong("the diagonal is hidden: a token may look at itself.",
              lambda new, total: _triangle(new, total, total - new - 1)),
        Wrong("each token sees one token of the future: the very one that it must foretell.",
              lambda new, total: _triangle(new, total, total - new + 1)),
        Wrong("it is transposed: the tokens see what comes after them, and not what came before.",
              lambda new, total: torch.ones(new, total, dtype=torch.bool).triu(total - new)),
        Wrong("True and False are turned round: True is where a token may look.",
              lambda new, total: ~_triangle(new, total, total - new)),
        Wrong("it has a row for every token of the text: only the new ones look.",
              lambda new, total: _triangle(total, total, 0)),
        Wrong("the columns are those of the new tokens only: the kept ones are looked at too.",
              lambda new, total: _triangle(new, new, 0)),
        Wrong("it holds numbers to be added to the scores, expected booleans.",
              lambda new, total: torch.zeros(new, total).masked_fill(~_triangle(new, total, total - new), -torch.inf)),
        Wrong("it holds the numbers 0 and 1, expected booleans.",
              lambda new, total: torch.ones(new, total).tril(total - new)),
        Wrong("the shift goes the wrong way: the kept tokens stand before the new ones, so each row sees more.",
              lambda new, total: _triangle(new, total, new - total)),
    ),
    hints=(
        "Seven tokens, the last three of them new: how many columns may the first of the three see?",
        "Row t is the token at place total - new + t; a column is seen if its place is not behind that.",
        "places of the new tokens, as a column · places of all tokens, as a row · compare: not later than.",
    ),
    tolerance=0.0,
    part="mask",
    blocked=("minillama.attention.causal_mask",),
)  # fmt: skip


# 04.4 ----------------------------------------------------------------------------------------------------------------


def _share_cases(rng: torch.Generator) -> Iterable[tuple[Any, ...]]:
    for b, h, t, s, d in ((2, 6, 3, 7, 10), (1, 2, 4, 4, 5), (1, 3, 1, 9, 2), (2, 1, 1, 1, 3), (1, 2, 0, 3, 4)):
        shares = (torch.randn(b, h, t, s, generator=rng) * 2).softmax(-1)
        yield shares, torch.randn(b, h, s, d, generator=rng) * 10
    yield torch.rand(2, 3, 4, 5, generator=rng), torch.randn(2, 3, 5, 6, generator=rng)  # as dropout leaves them
    shares = torch.randn(1, 2, 3, 5, generator=rng).softmax(-1)
    yield shares, (torch.randn(1, 2, 5, 7, generator=rng) * 3).bfloat16()


def _sum(p: Tensor, v: Tensor) -> Tensor:
    return (p.float() @ v.float()).to(v.dtype)


WEIGHTED = Exercise(
    "04.4", "weighted sum", "weighted_sum", minutes=8, difficulty=1,
    why="Shares say where to look; this fetches what stands there.",
    reference=lambda p, v: torch.einsum("bhts,bhsd->bhtd", p.float(), v.float()).to(v.dtype),
    cases=_share_cases,
    wrong=(
        Wrong("shares in fp32 and values in bf16 cannot be multiplied as they are: widen the values first.",
              lambda p, v: p @ v),
        Wrong("the shares are rounded to bf16 with the values: widen the values, round the result.",
              lambda p, v: p.to(v.dtype) @ v),
        Wrong("the result stays in fp32, expected the dtype of the values.", lambda p, v: p.float() @ v.float()),
        Wrong("it is divided by the number of keys: the shares are weights already.",
              lambda p, v: (p.float() @ v.float() / v.shape[-2]).to(v.dtype)),
        Wrong("the shares are turned round: a row is what one token gives, and its sum runs over the columns.",
              lambda p, v: _sum(p.mT, v)),
        Wrong("the shares are scaled to a sum of 1: they come as they are to be used.",
              lambda p, v: _sum(p / p.sum(-1, keepdim=True), v)),
        Wrong("only the value with the largest share is taken: each value counts in the measure of its share.",
              lambda p, v: _sum(F.one_hot(p.argmax(-1), p.shape[-1]), v)),
        Wrong("all heads are added up: each head keeps what it found.",
              lambda p, v: (p.float() @ v.float()).sum(1, keepdim=True).expand(-1, v.shape[1], -1, -1).to(v.dtype)),
    ),
    hints=(
        "Two values, 10 and 20, with shares 0.25 and 0.75: what comes out?",
        "For each query it is a row of shares times the table of values: one product of matrices for all.",
        "values to the dtype of the shares · product · back to the dtype of the values.",
    ),
    tolerance=2e-6,
    part="weighted_sum",
    slow=lambda rng: (torch.rand(64, 64, 4, 4, generator=rng), torch.randn(64, 64, 4, 2, generator=rng)),
)  # fmt: skip


# 04.5 and 04.6 -------------------------------------------------------------------------------------------------------


def _split_cases(rng: torch.Generator) -> Iterable[tuple[Any, ...]]:
    for b, t, h, d in ((2, 5, 6, 4), (1, 3, 2, 3), (3, 1, 4, 2), (1, 4, 1, 5), (2, 3, 5, 1), (1, 2, 3, 4)):
        yield torch.randn(b, t, h * d, generator=rng), h
    yield torch.randn(2, 7, 6, generator=rng).bfloat16(), 3
    yield torch.randn(2, 8, 5, generator=rng).mT, 2


def _split(x: Tensor, n_heads: int) -> Tensor:
    return torch.stack(x.split(x.shape[-1] // n_heads, -1), 1)


SPLIT = Exercise(
    "04.5", "split heads", "split_heads", minutes=8, difficulty=2,
    why="All heads come out of one product; cut in the wrong place, no shape complains and nothing works.",
    reference=_split,
    cases=_split_cases,
    wrong=(
        Wrong("it is viewed as (B, H, T, D) at once: that only counts the numbers anew, and mixes tokens with heads.",
              lambda x, n_heads: x.reshape(x.shape[0], n_heads, x.shape[1], x.shape[2] // n_heads)),
        Wrong("the heads stand behind the tokens, (B, T, H, D): exchange these two axes.",
              lambda x, n_heads: x.unflatten(-1, (n_heads, x.shape[-1] // n_heads))),
        Wrong("a head gets every n_heads-th number of a token: its numbers stand side by side.",
              lambda x, n_heads: x.unflatten(-1, (x.shape[-1] // n_heads, n_heads)).permute(0, 3, 1, 2)),
        Wrong("n_heads is taken for the size of a head: it is their number.",
              lambda x, n_heads: x.unflatten(-1, (x.shape[-1] // n_heads, n_heads)).transpose(1, 2)),
        Wrong("tokens and the numbers of a head are exchanged, (B, H, D, T).",
              lambda x, n_heads: _split(x, n_heads).mT),
        Wrong("the last two axes are cut out and then exchanged with the batch: the batch stays in front.",
              lambda x, n_heads: _split(x, n_heads).transpose(0, 1)),
    ),
    hints=(
        "A token has the numbers 0 to 5 and there are 2 heads: which numbers belong to head 0?",
        "Cut only the last axis into (heads, numbers of a head); then bring the heads before the tokens.",
        "size of a head is the last length over n_heads · cut the last axis in two · exchange axes 1 and 2.",
    ),
    tolerance=0.0,
    part="split_heads",
)  # fmt: skip


def _merge_cases(rng: torch.Generator) -> Iterable[tuple[Any, ...]]:
    for b, h, t, d in ((2, 6, 5, 4), (1, 2, 3, 3), (3, 4, 1, 2), (1, 1, 4, 5), (2, 5, 3, 1), (1, 3, 2, 4)):
        yield (torch.randn(b, h, t, d, generator=rng),)
    yield (torch.randn(2, 3, 7, 2, generator=rng).bfloat16(),)
    yield (torch.randn(2, 4, 3, 5, generator=rng).transpose(1, 2),)


def _merge(x: Tensor) -> Tensor:
    return torch.cat(x.unbind(1), -1)


def _no_merge(x: Tensor) -> Tensor:
    return x.reshape(x.shape[0], x.shape[2], x.shape[1] * x.shape[3])


MERGE = Exercise(
    "04.6", "merge heads", "merge_heads", minutes=5, difficulty=2,
    why="The way back: what the heads found is laid side by side, so that one matrix can read it all.",
    reference=_merge,
    cases=_merge_cases,
    wrong=(
        Wrong("it is counted anew without exchanging axes first: that lays tokens side by side, not heads.", _no_merge),
        Wrong("the heads' numbers are woven together: first all numbers of head 0, then all of head 1.",
              lambda x: x.permute(0, 2, 3, 1).flatten(2)),
        Wrong("a view cannot join axes that lie apart in memory, as they do after an exchange: let it copy.",
              lambda x: x.transpose(1, 2).view(x.shape[0], x.shape[2], x.shape[1] * x.shape[3])),
        Wrong("it is copied before the exchange, and the exchange takes the axes apart in memory once more: copy "
              "behind it.",
              lambda x: x.contiguous().transpose(1, 2).view(x.shape[0], x.shape[2], x.shape[1] * x.shape[3])),
        Wrong("tokens are exchanged with the numbers of a head: it is the heads that go behind the tokens.",
              lambda x: _no_merge(x.mT).reshape(x.shape[0], x.shape[2], -1)),
        Wrong("heads are exchanged with the numbers of a head: they go behind the tokens, and before these numbers.",
              lambda x: x.transpose(1, 3).reshape(x.shape[0], x.shape[2], -1)),
        Wrong("tokens come before the batch, and are then counted as texts: the batch stays in front.",
              lambda x: x.permute(2, 0, 1, 3).reshape(x.shape[0], x.shape[2], -1)),
        Wrong("the heads are added up: they are laid side by side.", lambda x: x.sum(1)),
        Wrong("the heads are exchanged with the tokens, but not joined.", lambda x: x.transpose(1, 2)),
        Wrong("the tokens are joined within each head: join the heads of each token.", lambda x: x.flatten(2)),
    ),
    hints=(
        "Which two axes must be neighbours before they can become one, and in which order?",
        "Undo split_heads: bring the heads back behind the tokens, then join heads and their numbers.",
        "exchange axes 1 and 2 · join the last two, with a copy where the memory needs it.",
    ),
    tolerance=0.0,
)  # fmt: skip


# 04.7 ----------------------------------------------------------------------------------------------------------------


def _kv_cases(rng: torch.Generator) -> Iterable[tuple[Any, ...]]:
    for b, k, s, d, h in ((2, 2, 5, 4, 6), (1, 3, 3, 2, 3), (2, 1, 4, 3, 5), (1, 4, 1, 2, 8), (1, 2, 0, 3, 4)):
        yield torch.randn(b, k, s, d, generator=rng), h
    yield torch.randn(2, 3, 4, 5, generator=rng).bfloat16(), 12
    yield torch.randn(1, 3, 2, 4, generator=rng), 8  # 3 do not go into 8


def _groups(x: Tensor, n_heads: int) -> int:
    if n_heads % x.shape[1]:
        raise ValueError(f"{n_heads} query heads cannot share {x.shape[1]} key/value heads evenly.")
    return n_heads // x.shape[1]


def _wide_index(x: Tensor, n_heads: int) -> Tensor:
    return x[:, torch.arange(n_heads) // _groups(x, n_heads)]


REPEAT = Exercise(
    "04.7", "repeat keys and values", "repeat_kv", minutes=10, difficulty=2,
    why="Grouped queries share their keys; handed to the wrong queries, every shape fits and nothing works.",
    reference=_wide_index,
    cases=_kv_cases,
    wrong=(
        Wrong("the heads are tiled, 0 1 0 1: neighbouring query heads share, so copies stand side by side, 0 0 1 1.",
              lambda x, n_heads: x.repeat(1, _groups(x, n_heads), 1, 1)),
        Wrong("the heads are tiled, 0 1 0 1, where 0 0 1 1 belongs; and no error says that a number does not fit.",
              lambda x, n_heads: x.repeat(1, n_heads // x.shape[1], 1, 1)),
        Wrong("query head i reads head i modulo K, 0 1 0 1: neighbouring query heads share one, 0 0 1 1.",
              lambda x, n_heads: x[:, torch.arange(n_heads) % x.shape[1]]),
        Wrong("where n_heads is not a multiple of the heads that there are, it goes on quietly: raise a ValueError.",
              lambda x, n_heads: x.repeat_interleave(n_heads // x.shape[1], dim=1)),
        Wrong("where n_heads is not a multiple of the heads that there are, the shapes clash further down: look "
              "first, and raise a ValueError.",
              lambda x, n_heads: x[:, :, None].expand(-1, -1, n_heads // x.shape[1], -1, -1).reshape(
                  x.shape[0], n_heads, x.shape[2], x.shape[3])),
        Wrong("each head is copied n_heads times: n_heads is how many there are in the end.",
              lambda x, n_heads: (_groups(x, n_heads), x.repeat_interleave(n_heads, dim=1))[1]),
        Wrong("the tokens are repeated, not the heads.",
              lambda x, n_heads: x.repeat_interleave(_groups(x, n_heads), dim=2)),
        Wrong("all query heads read head 0: each group has a head of its own.",
              lambda x, n_heads: (_groups(x, n_heads), x[:, :1].expand(-1, n_heads, -1, -1))[1]),
        Wrong("copies are made of tokens and then counted as heads: each new head must hold all tokens in order.",
              lambda x, n_heads: x.repeat_interleave(_groups(x, n_heads), dim=2).reshape(
                  x.shape[0], n_heads, x.shape[2], x.shape[3])),
        Wrong("the copies stand on an axis of their own: join it with the heads.",
              lambda x, n_heads: x[:, :, None].expand(-1, -1, _groups(x, n_heads), -1, -1)),
    ),
    hints=(
        "6 query heads, 2 key heads: which key head does query head 2 read, and which does query head 3?",
        "Give each head a new axis of copies right behind it, then join the two axes; or say for each query head "
        "which head it reads.",
        "check that it goes evenly, else ValueError · new axis behind the heads · widen it to the group · join them.",
    ),
    tolerance=0.0,
    part="repeat_kv",
    blocked=("torch.repeat_interleave", "torch.Tensor.repeat_interleave"),
)  # fmt: skip


# 04.8 ----------------------------------------------------------------------------------------------------------------


def _attention_cases(rng: torch.Generator) -> Iterable[tuple[Any, ...]]:
    shapes = ((2, 6, 2, 5, 5, 10), (1, 4, 2, 3, 8, 6), (2, 6, 3, 1, 7, 5), (1, 3, 3, 2, 6, 4), (2, 4, 1, 4, 5, 3),
              (1, 2, 1, 1, 1, 4))  # fmt: skip
    for b, h, kv, t, s, d in shapes:
        q = torch.randn(b, h, t, d, generator=rng) * 2
        yield q, torch.randn(b, kv, s, d, generator=rng), torch.randn(b, kv, s, d, generator=rng)
    q, k = torch.randn(2, 6, 4, 7, generator=rng) * 1e7, torch.randn(2, 2, 4, 7, generator=rng) * 1e7
    yield q, k, torch.randn(2, 2, 4, 7, generator=rng)


def _attend(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, mask: Tensor | None = None,
            hidden: float = -torch.inf, axis: int = -1, after: str = "", tiled: bool = False) -> Tensor:  # fmt: skip
    """Attention with a mistake chosen by its arguments."""
    new, total, groups = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    k, v = (x.repeat(1, groups, 1, 1) if tiled else x.repeat_interleave(groups, 1) for x in (k, v))
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    mask = _triangle(new, total, total - new) if mask is None else mask
    if not after:
        return scores.masked_fill(~mask, hidden).softmax(axis) @ v
    shares = scores.softmax(axis) * mask
    return (shares / shares.sum(-1, keepdim=True) if after == "renormalised" else shares) @ v


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = attention.causal_mask(q.shape[2], k.shape[2])
    return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)


ATTENTION = Exercise(
    "04.8", "attention", "attention", minutes=20, difficulty=3,
    why="The heart of LLaMA in one function, as it is called while the model writes.",
    reference=_sdpa,
    cases=_attention_cases,
    wrong=(
        Wrong("the scores are not divided by the root of head_dim.", lambda q, k, v: _attend(q, k, v, scale=1.0)),
        Wrong("the scores are divided by the root of all heads' numbers together, not of one head's.",
              lambda q, k, v: _attend(q, k, v, scale=(q.shape[1] * q.shape[3]) ** -0.5)),
        Wrong("there is no mask: each token sees those that come after it.",
              lambda q, k, v: _attend(q, k, v, mask=torch.tensor(True))),
        Wrong("the mask counts the new tokens from the start of the text: they are its last ones.",
              lambda q, k, v: _attend(q, k, v, mask=_triangle(q.shape[2], k.shape[2], 0))),
        Wrong("the mask is square: with kept keys there are more columns than rows.",
              lambda q, k, v: _attend(q, k, v, mask=_triangle(q.shape[2], q.shape[2], 0))),
        Wrong("the mask is transposed: each token sees those after it, and not those before.",
              lambda q, k, v: _attend(q, k, v, mask=torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(
                  k.shape[2] - q.shape[2]))),
        Wrong("the diagonal is hidden: a token may look at itself, and the first one has nobody else.",
              lambda q, k, v: _attend(q, k, v, mask=_triangle(q.shape[2], k.shape[2], k.shape[2] - q.shape[2] - 1))),
        Wrong("hidden scores are a large negative number, and larger scores beat it: only minus infinity hides surely.",
              lambda q, k, v: _attend(q, k, v, hidden=-1e9)),
        Wrong("hidden scores are 0: in a softmax that is a score like any other.",
              lambda q, k, v: _attend(q, k, v, hidden=0.0)),
        Wrong("the mask comes after the softmax: the sum below each share still runs over the future.",
              lambda q, k, v: _attend(q, k, v, after="as it is")),
        Wrong("the mask comes after the softmax and the rows are scaled up again: where a hidden score is by far the "
              "largest that is 0/0.", lambda q, k, v: _attend(q, k, v, after="renormalised")),
        Wrong("the softmax runs over the queries: what one token gives must sum to 1.",
              lambda q, k, v: _attend(q, k, v, axis=-2)),
        Wrong("key and value heads are tiled, 0 1 0 1: neighbouring query heads share one, 0 0 1 1.",
              lambda q, k, v: _attend(q, k, v, tiled=True)),
    ),
    hints=(
        "You have written all the parts: in which order do they come, and what shape has each in between?",
        "Copy key and value heads for their groups, score, hide the future with minus infinity, softmax, mix values.",
        "repeat k and v · scores · mask of (T, S), new tokens last · fill where it is False · softmax · weighted sum.",
    ),
    part="attention",
    blocked=("torch.nn.functional.scaled_dot_product_attention", "minillama.attention.Attention.attend",
             "minillama.attention.Attention.attend_fast", "torch.nn.functional.multi_head_attention_forward"),
)  # fmt: skip


# 04.9 ----------------------------------------------------------------------------------------------------------------


def _online_cases(rng: torch.Generator) -> Iterable[tuple[Any, ...]]:
    for h, t, s, d, block in ((2, 5, 5, 6, 2), (3, 3, 8, 4, 3), (1, 1, 7, 5, 2), (2, 4, 6, 3, 10), (2, 3, 4, 5, 1),
                              (1, 1, 1, 2, 4)):  # fmt: skip
        q = torch.randn(h, t, d, generator=rng) * 2
        yield q, torch.randn(h, s, d, generator=rng), torch.randn(h, s, d, generator=rng), block
    q, k = torch.randn(2, 4, 7, generator=rng).abs() * 1e3, torch.randn(2, 6, 7, generator=rng) * 1e3
    k[:, 0] = k[:, 0].abs()  # every query has seen a score above 0
    yield q, k, torch.randn(2, 6, 7, generator=rng), 2
    q, k = torch.randn(2, 3, 4, generator=rng), torch.zeros(2, 5, 4)
    q[..., 0], k[..., 0] = 2.0**18, -(2.0**17)  # all scores -2**34, exactly: below any number that stands for -inf
    yield q, k, torch.randn(2, 5, 4, generator=rng), 2


def _whole(q: Tensor, k: Tensor, v: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """All scores at once; the running sums as what they are, sums over the first keys."""
    new, total = q.shape[1], k.shape[1]
    mask = attention.causal_mask(new, total)
    scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~mask, -torch.inf)
    ends = [min(start + block, total) for start in range(0, total, block)]
    sums = [(scores[..., :end] - scores[..., :end].amax(-1, keepdim=True)).exp().sum(-1) for end in ends]
    return F.scaled_dot_product_attention(q, k, v, mask), torch.stack(sums)


def _online(q: Tensor, k: Tensor, v: Tensor, block: int, *, mistake: str = "") -> tuple[Tensor, Tensor]:
    new, total = q.shape[1], k.shape[1]
    kept = 0 if mistake == "offset" else total - new
    mask = torch.ones(new, total, dtype=torch.bool) if mistake == "mask" else _triangle(new, total, kept)
    lowest = {"zero": 0.0, "low": -1e4}.get(mistake, -torch.inf)
    m, ell, mixed = torch.full((*q.shape[:2], 1), lowest), torch.zeros(*q.shape[:2], 1), torch.zeros_like(q)
    last = total // block * block if mistake == "tail" and total >= block else total
    sums = []
    for start in range(0, last, block):
        stop = min(start + block, total)
        scores = q @ k[:, start:stop].mT / (1 if mistake == "root" else math.sqrt(q.shape[-1]))
        largest = scores.amax(-1, keepdim=True)
        seen = _triangle(new, stop - start, kept) if mistake == "within" else mask[:, start:stop]
        scores = scores.masked_fill(~seen, -1e9 if mistake == "finite" else -torch.inf)
        if mistake != "hidden":
            largest = scores.amax(-1, keepdim=True)
        if mistake == "shared":
            largest = scores.amax((-2, -1), keepdim=True).expand_as(largest)
        new_m = largest if mistake == "block" else torch.maximum(m, largest)
        if mistake == "no maximum":
            new_m = torch.zeros_like(m)
        c = (new_m - m).exp() if mistake == "inverse" else (m - new_m).exp()
        powers = (scores - new_m).exp()
        ell = (1 if mistake in ("none", "sum") else c) * ell + powers.sum(-1, keepdim=True)
        mixed = (1 if mistake in ("none", "values") else c) * mixed + powers @ v[:, start:stop]
        if mistake in ("each", "twice"):
            mixed = mixed / ell
        m = new_m
        sums.append(ell[..., 0])
    if mistake == "alias":
        sums = [ell[..., 0]] * len(sums)
    return (mixed if mistake in ("quotient", "each") else mixed / ell), torch.stack(sums)


def _with(mistake: str) -> Any:
    return lambda q, k, v, block: _online(q, k, v, block, mistake=mistake)


ONLINE = Exercise(
    "04.9", "online softmax", "online_softmax", minutes=30, difficulty=5,
    why="How FlashAttention never holds the large matrix, and is exact all the same.",
    reference=_whole,
    cases=_online_cases,
    wrong=(
        Wrong("nothing is rescaled when a larger score turns up: old keys then weigh too much.", _with("none")),
        Wrong("the sum of powers is not rescaled, though the mixed values are.", _with("sum")),
        Wrong("the mixed values are not rescaled, though the sum of powers is.", _with("values")),
        Wrong("the factor is turned round: what was gathered against a smaller maximum must shrink.",
              _with("inverse")),
        Wrong("each block's own maximum takes the place of the largest so far: a block that is wholly hidden gives "
              "NaN.", _with("block")),
        Wrong("all queries of a head share one maximum: each row has its own.", _with("shared")),
        Wrong("no maximum is taken away: the sums are not against it, and large scores overflow.",
              _with("no maximum")),
        Wrong("there is no mask: each token sees those that come after it.", _with("mask")),
        Wrong("the mask counts the new tokens from the start of the text: they are its last ones.", _with("offset")),
        Wrong("the places of keys are counted anew in each block: a key's place in the text decides who sees it.",
              _with("within")),
        Wrong("hidden keys enter the maximum: a sum is measured against the largest score that its query has seen.",
              _with("hidden")),
        Wrong("hidden scores are a finite number: where all visible ones lie lower, the future is seen.",
              _with("finite")),
        Wrong("the largest so far starts at 0: where all scores lie below, the sums are not against the largest seen.",
              _with("zero")),
        Wrong("the largest so far starts at a finite number: where all scores lie far below it, every power vanishes.",
              _with("low")),
        Wrong("every block notes the last sum: those noted earlier changed later with the sum itself, so note a copy.",
              _with("alias")),
        Wrong("the mixed values are divided by the sum in every block: what came earlier is then divided again.",
              _with("each")),
        Wrong("the mixed values are divided by the sum in every block and again at the end: divide at the end only.",
              _with("twice")),
        Wrong("the mixed values are not divided by the sum at the end.", _with("quotient")),
        Wrong("the keys behind the last full block are left out.", _with("tail")),
        Wrong("the scores are not divided by the root of head_dim.", _with("root")),
    ),
    hints=(
        "A larger score turns up in the second block. By which factor is all that you gathered before too large?",
        "Walk over blocks of keys with three things for every query: largest, sum and mixed values. Put the old ones "
        "right, then add the block's.",
        "scores of the block, hidden ones minus infinity · the larger of old and new maximum · factor · powers · sum · "
        "values · note the sum; at the end the quotient, and all noted sums stacked.",
    ),
    slow=lambda rng: tuple(torch.randn(64, 32, 4, generator=rng) for _ in range(3)) + (16,),
    blocked=("torch.softmax", "torch.Tensor.softmax", "torch.nn.functional.softmax",
             "torch.nn.functional.scaled_dot_product_attention"),
)  # fmt: skip


# 04.10 ---------------------------------------------------------------------------------------------------------------


def _evenly(head: int) -> Any:
    """A hook after which a head gives every token that it may see the same share."""

    def hook(layer: Any, given: Any, shares: Tensor) -> Tensor:
        changed = shares.clone()
        new, total = shares.shape[-2:]
        mask = attention.causal_mask(new, total).to(shares.dtype)
        changed[:, head] = mask / mask.sum(-1, keepdim=True)
        return changed

    return hook


def _losses() -> tuple[float, list[float], list[float]]:
    """The toy's loss as it is; with each head of layer 0 taken out; with each spreading itself evenly."""
    model, tokenizer = load("toy")
    assert tokenizer is not None
    batches = story_validation(tokenizer, 20, seed=0).batches
    layer: Any = model.blocks[0].attention
    size, whole = layer.head_dim, layer.wo.weight.detach().clone()
    removed, even = [], []
    with torch.inference_mode():
        untouched = mean_loss(model, batches)
        for head in range(layer.n_heads):
            layer.wo.weight.data.copy_(whole)[:, head * size : (head + 1) * size] = 0
            removed.append(mean_loss(model, batches))
        layer.wo.weight.data.copy_(whole)
        layer.fast = False
        for head in range(layer.n_heads):
            handle = layer.tap.register_forward_hook(_evenly(head))
            even.append(mean_loss(model, batches))
            handle.remove()
    return untouched, removed, even


def _verify(measured: dict[str, Any]) -> str:
    if isinstance(measured["head"], bool) or measured["head"] not in range(8):
        return f"'head' is {measured['head']!r:.20}, expected the number of a head of layer 0, from 0 to 7."
    untouched, removed, even = _losses()
    head = int(measured["head"])
    if abs(measured["loss"] - untouched) > 0.005 * untouched:
        return "'loss' is not what these 20 stories give: measure the toy as it is loaded, with nothing changed."
    if removed[head] < max(removed) - 0.005:
        return f"without head {head} of layer 0 the loss rises, but there is a head without which it rises more."
    for key, true, how in (
        ("removed", removed[head], "set this head's columns of `wo` to zero in layer 0, and no others."),
        ("even", even[head], "put its columns back; each token gives the same share to itself and all before it."),
    ):
        if abs(measured[key] - true) > 0.01 * true:
            return f"{key!r} is not the mean loss on these 20 stories: {how}"
    if not measured["predicted"] > 0:
        return f"the prediction is {measured['predicted']}, expected a loss in nats, above 0."
    return ""


EXPERIMENT = Experiment(
    "04.10", "experiment: a head that no longer looks", "measured_04", minutes=25, difficulty=3,
    why="A map shows where a head looks; only taking that away shows what it was worth.",
    keys={
        "predicted": "the loss that you expect without the most needed head of layer 0, in nats per token, written "
                     "before you measure",
        "loss": "the toy's loss on 20 stories, in nats per token",
        "head": "the number of the head of layer 0 that is missed most, from 0 to 7",
        "removed": "the loss without that head, in nats per token",
        "even": "the loss when that head looks at everything evenly, in nats per token",
        "because": "a sentence on why",
    },
    verify=_verify,
    explain="on what was lost in each of the two ways",
    hints=(
        "Through which columns of `wo` does a head speak, and what do the others notice if these are zero?",
        "Eight times: zero one head's columns of `wo` in layer 0, measure, put them back. Then, for the worst, a hook "
        "on `tap` that replaces its shares by even ones; `attention.fast = False` lets the shares pass there.",
        "copy wo · loop over heads · mean_loss · worst · hook: shares of that head become the causal mask, each row "
        "over its sum · mean_loss.",
    ),
)  # fmt: skip


EXERCISES: list[Task] = [SCORES, SOFTMAX, MASK, WEIGHTED, SPLIT, MERGE, REPEAT, ATTENTION, ONLINE, EXPERIMENT]
