"""Exercises of chapter 10, generation."""

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minillama import world
from minillama.checkpoint import load
from minillama.course.exercise import Exercise, Experiment, Task, Wrong
from minillama.generation import generate
from minillama.rope import rotate, rotation

# 10.1 ----------------------------------------------------------------------------------------------------------------


def _temperature_cases(rng: torch.Generator) -> Iterable[tuple[Any, ...]]:
    ruled_out = torch.randn(2, 6, generator=rng)
    ruled_out[0, 2], ruled_out[1, :4] = -torch.inf, -torch.inf
    return [
        (torch.randn(3, 7, generator=rng) * 3, torch.tensor([0.7, 0.0, 2.5])),
        (torch.randn(4, 4, generator=rng), torch.tensor([0.3, 1.5, 0.0, 1.0])),
        (torch.randn(2, 5, generator=rng) * 1e4, torch.tensor([2.0, 0.5])),
        (torch.tensor([[2.0, 2.0, 1.0, -1.0], [0.0, 3.0, 3.0, 3.0]]), torch.tensor([0.0, 0.0])),
        (torch.randn(2, 5, generator=rng) * 1e-20, torch.tensor([0.0, 1.0])),
        (torch.randn(2, 6, generator=rng) * 100 + 300, torch.tensor([1e-37, 30.0])),
        (ruled_out, torch.tensor([1.3, 0.0])),
        ((torch.randn(2, 301, generator=rng) * 3).bfloat16(), torch.tensor([0.8, 1.7])),
        (torch.randn(1, 1, generator=rng), torch.tensor([0.0])),
        (torch.randn(0, 4, generator=rng), torch.zeros(0)),
    ]


def _tempered(logits: Tensor, temperature: Tensor) -> Tensor:
    """The limit for temperature 0 comes out by itself: the best are 0, and all others lie far below."""
    z = logits.double()
    z = z - z.amax(-1, keepdim=True)
    return (z / temperature.double().clamp_min(1e-40)[:, None]).softmax(-1).float()


def _first_of_the_best(logits: Tensor, temperature: Tensor) -> Tensor:
    one_hot = F.one_hot(logits.argmax(-1), logits.shape[-1]).float()
    return torch.where(temperature[:, None] == 0, one_hot, _tempered(logits, temperature))


def _overflowing(logits: Tensor, temperature: Tensor) -> Tensor:
    plain = (logits.float() / temperature[:, None]).softmax(-1)
    return torch.where(temperature[:, None] == 0, _tempered(logits, temperature), plain)


def _narrow(logits: Tensor, temperature: Tensor) -> Tensor:
    """All in the dtype of the logits."""
    z = logits - logits.amax(-1, keepdim=True)
    floor = temperature.clamp_min(1e-30).to(z.dtype)
    return (z / floor[:, None]).softmax(-1).float()


TEMPERATURE = Exercise(
    "10.1", "temperature for a batch", "with_temperature", minutes=10, difficulty=2,
    why="A server answers many people at once, each with a temperature of their own, and some of them ask for 0.",
    reference=_tempered,
    cases=_temperature_cases,
    wrong=(
        Wrong("the scores are multiplied by the temperature: a high temperature must flatten, so divide.",
              lambda logits, temperature: (logits.float() * temperature[:, None]).softmax(-1)),
        Wrong("a row of temperature 0 is NaN, since the scores became infinite: what is left of the softmax there?",
              lambda logits, temperature: (logits.float() / temperature[:, None]).softmax(-1)),
        Wrong("a row of temperature 0 is NaN: the best score minus itself is 0, and 0/0 is not a number.",
              lambda logits, temperature: ((logits.float() - logits.float().amax(-1, keepdim=True))
                                           / temperature[:, None]).softmax(-1)),
        Wrong("a small number stands in for temperature 0: best and second best then share, if they are close.",
              lambda logits, temperature: (logits.float() / temperature.clamp_min(1e-6)[:, None]).softmax(-1)),
        Wrong("at temperature 0 the first of equal best tokens gets everything: in the limit they share.",
              _first_of_the_best),
        Wrong("temperature 0 is treated like 1: it must leave the best tokens only.",
              lambda logits, temperature: _tempered(logits, torch.where(temperature == 0, 1.0, temperature))),
        Wrong("a small temperature makes the scores overflow: take each row's highest away before you divide.",
              _overflowing),
        Wrong("all rows have the first row's temperature: each has its own.",
              lambda logits, temperature: _tempered(logits, temperature[:1].expand_as(temperature))),
        Wrong("the temperatures run along the vocabulary: each belongs to a row.",
              lambda logits, temperature: (logits.float() / temperature).softmax(-1)),
        Wrong("the probabilities are divided, not the scores: they no longer sum to 1.",
              lambda logits, temperature: logits.float().softmax(-1) / temperature[:, None]),
        Wrong("bf16 scores were divided in bf16: widen to fp32 first.", _narrow),
    ),
    hints=(
        "What do the probabilities of 2, 2 and 1 come to if the temperature goes to 0?",
        "Take each row's highest score away, so that the best are 0 whatever you divide by; then only an exact 0 in "
        "the temperature needs care.",
        "fp32 · minus the row's largest · temperature as a column · divide where it is above 0, else mark the best · "
        "exponentials over their sum.",
    ),
    tolerance=5e-6,
    blocked=("minillama.generation.Sampling.probabilities",),
)  # fmt: skip


# 10.2 ----------------------------------------------------------------------------------------------------------------


def _k_cases(rng: torch.Generator) -> Iterable[tuple[Any, ...]]:
    ruled_out = torch.randn(2, 6, generator=rng)
    ruled_out[:, 1:4] = -torch.inf
    close = 1 + torch.randperm(6, generator=rng) * 2.0**-23  # neighbours in fp32, no two of them equal
    far = torch.randperm(6, generator=rng) * 1e3  # whose probabilities are 1 and five times 0
    return [
        (torch.randn(3, 9, generator=rng), torch.tensor([1, 4, 8])),
        (torch.randint(-2, 3, (4, 8), generator=rng).float(), torch.tensor([2, 1, 3, 5])),
        (torch.tensor([[3.0, 1.0, 3.0, 2.0, 3.0], [0.0, 0.0, 0.0, 0.0, 0.0]]), torch.tensor([2, 3])),
        (torch.randint(-2, 3, (5, 12), generator=rng).float(), torch.tensor([1, 4, 7, 2, 5])),
        (torch.randn(2, 5, generator=rng) * 1e4, torch.tensor([5, 9])),
        (ruled_out, torch.tensor([2, 4])),
        (torch.randn(3, 40, generator=rng).bfloat16(), torch.tensor([7, 1, 20])),
        (torch.stack([close, far]), torch.tensor([2, 3])),
        (torch.randn(1, 1, generator=rng), torch.tensor([1])),
        (torch.randn(0, 4, generator=rng), torch.zeros(0, dtype=torch.int64)),
    ]


def _better(z: Tensor) -> Tensor:
    """How many scores of its row are higher than each one, (B, V)."""
    return (z[:, None, :] > z[:, :, None]).sum(-1)


def _kept(z: Tensor, keep: Tensor) -> Tensor:
    return torch.where(keep, z, -torch.inf)


def _kth(z: Tensor, k: Tensor) -> Tensor:
    return z.sort(descending=True).values.gather(-1, k.clamp_max(z.shape[-1])[:, None] - 1)


def _exactly(z: Tensor, k: Tensor) -> Tensor:
    return _kept(z, z.argsort(dim=-1, descending=True, stable=True).argsort(-1) < k[:, None])


def _by_chance(z: Tensor, k: Tensor) -> Tensor:
    out = torch.full_like(z, -torch.inf)
    for i, (row, n) in enumerate(zip(z, k.tolist(), strict=True)):
        kept = row.topk(min(n, len(row))).indices
        out[i, kept] = row[kept]
    return out


def _distinct(z: Tensor, k: Tensor) -> Tensor:
    out = torch.full_like(z, -torch.inf)
    for i, (row, n) in enumerate(zip(z, k.tolist(), strict=True)):
        values = row.unique()
        out[i] = row.where(row >= values[-min(n, len(values))], -torch.inf)
    return out


def _by_probability(z: Tensor, k: Tensor) -> Tensor:
    probabilities = z.softmax(-1)
    return _kept(z, probabilities >= _kth(probabilities, k))


def _row_by_row(z: Tensor, k: Tensor) -> Tensor:
    return torch.stack([row.where(row >= _kth(row[None], n[None])[0], -torch.inf) for row, n in zip(z, k, strict=True)])


TOP_K = Exercise(
    "10.2", "top-k with ties", "top_k", minutes=10, difficulty=2,
    why="Scores that are equal must not be told apart by where they stand in the vocabulary.",
    reference=lambda logits, k: _kept(logits, _better(logits) < k[:, None]),
    cases=_k_cases,
    wrong=(
        Wrong("exactly k are kept: what ties with the k-th must stay too, or the place in the vocabulary decides.",
              _exactly),
        Wrong("exactly k are kept, and which of those that tie with the k-th is left to chance: all of them must stay.",
              _by_chance),
        Wrong("k + 1 are kept: counting from 0, the k-th has the index k - 1.",
              lambda logits, k: _kept(logits, _better(logits) < k[:, None] + 1)),
        Wrong("the k-th itself is dropped: it belongs to those that are kept.",
              lambda logits, k: _kept(logits, logits > _kth(logits, k))),
        Wrong("dropped scores are 0, which is a score like any other: only minus infinity has probability 0.",
              lambda logits, k: torch.where(_better(logits) < k[:, None], logits, 0.0)),
        Wrong("all rows have the first row's k: each has its own.",
              lambda logits, k: _kept(logits, _better(logits) < k[:1].expand_as(k)[:, None])),
        Wrong("all rows have the largest k: each has its own.",
              lambda logits, k: _kept(logits, _better(logits) < k.max())),
        Wrong("the lowest are kept: sort the other way.",
              lambda logits, k: _kept(logits, _better(-logits) < k[:, None])),
        Wrong("scores are compared with the k-th lowest: count from the other end.",
              lambda logits, k: _kept(logits, logits >= -_kth(-logits, k))),
        Wrong("probabilities are compared: scores that are far from equal may all have the probability 0.",
              _by_probability),
        Wrong("scores that are only close to the k-th are kept with it: equal ones tie, and no others.",
              lambda logits, k: _kept(logits, (logits > _kth(logits, k)) | logits.isclose(_kth(logits, k)))),
        Wrong("rows are stacked one by one, and a batch of none leaves nothing to stack: treat all rows at once.",
              _row_by_row),
        Wrong("equal scores are counted once: each of them is a token, and uses up one of the k.", _distinct),
        Wrong("the scores come back in sorted order: each must stand at its own token.",
              lambda logits, k: _kept(logits, _better(logits) < k[:, None]).sort(descending=True).values),
        Wrong("it gives probabilities: the scores that stay must come back as they were.",
              lambda logits, k: _kept(logits, _better(logits) < k[:, None]).softmax(-1)),
    ),
    hints=(
        "For the scores 3, 1, 3, 2, 3 and k = 2: which is the second highest, and which are at least as high?",
        "Find each row's k-th highest score, and compare all scores of the row with it. A k above the number of tokens "
        "keeps all.",
        "sort each row downwards · k as a column, at most V, minus 1 · gather the k-th · fill what is lower.",
    ),
    tolerance=0.0,
    blocked=("minillama.generation.top_k_filter",),
    slow=lambda rng: (torch.randn(10_000, 5, generator=rng), torch.randint(1, 5, (10_000,), generator=rng)),
)  # fmt: skip


# 10.3 ----------------------------------------------------------------------------------------------------------------


def _p_cases(rng: torch.Generator) -> Iterable[tuple[Any, ...]]:
    ruled_out = torch.randn(2, 6, generator=rng)
    ruled_out[:, 1:4] = -torch.inf
    sure = torch.zeros(2, 5)
    sure[torch.arange(2), torch.randint(1, 5, (2,), generator=rng)] = 4.0
    return [
        (torch.randn(3, 8, generator=rng) * 1.5, torch.tensor([0.35, 0.92, 0.6])),
        (torch.randn(4, 23, generator=rng), torch.tensor([0.8, 0.5, 0.1, 0.97])),
        (torch.zeros(2, 4), torch.tensor([0.5, 0.75])),  # exactly p, and ties
        (torch.zeros(2, 8), torch.tensor([0.50002, 0.37498])),  # a little less than p, and a little more
        (sure, torch.tensor([0.5, 0.95])),
        (torch.randn(2, 6, generator=rng) * 1e4, torch.tensor([1.0, 0.3])),
        (ruled_out, torch.tensor([0.9, 0.4])),
        ((torch.randn(3, 40, generator=rng) * 2).bfloat16(), torch.tensor([0.83, 0.37, 0.71])),
        (torch.randint(-2, 3, (5, 64), generator=rng).float(), torch.tensor([0.35, 0.6, 0.8, 0.15, 0.5])),  # many ties
        (torch.randn(1, 1, generator=rng), torch.tensor([0.2])),
        (torch.randn(0, 5, generator=rng), torch.zeros(0)),
    ]


def _ahead(z: Tensor) -> Tensor:
    """(B, V, V) booleans: whether the second token goes before the first; of equals, the one with the lower id."""
    ids = torch.arange(z.shape[-1])
    return (z[:, None, :] > z[:, :, None]) | ((z[:, None, :] == z[:, :, None]) & (ids < ids[:, None]))


def _before(z: Tensor) -> Tensor:
    """The probability of all that go before each token, together."""
    return (z.softmax(-1)[:, None, :] * _ahead(z)).sum(-1)


def _shared(logits: Tensor, keep: Tensor) -> Tensor:
    return logits.float().masked_fill(~keep, -torch.inf).softmax(-1)


def _top_p(logits: Tensor, p: Tensor) -> Tensor:
    return _shared(logits, _before(logits.float()) < p[:, None])


def _one_more(logits: Tensor, p: Tensor) -> Tensor:
    z = logits.float()
    keep = _before(z) < p[:, None]
    return _shared(z, _ahead(z).sum(-1) <= keep.sum(-1, keepdim=True))


def _with_ties(logits: Tensor, p: Tensor) -> Tensor:
    z = logits.float()
    lowest = z.masked_fill(_before(z) >= p[:, None], torch.inf).amin(-1, keepdim=True)
    return _shared(z, z >= lowest)


def _cut(ordered: Tensor, ids: Tensor, p: Tensor) -> Tensor:
    """The answer, given the probabilities in an order, and whose they are."""
    left = ordered.masked_fill(ordered.cumsum(-1) - ordered >= p[:, None], 0.0)
    return torch.zeros_like(left).scatter(-1, ids, left / left.sum(-1, keepdim=True))


def _higher_ids_first(logits: Tensor, p: Tensor) -> Tensor:
    upward, ids = logits.float().softmax(-1).sort()
    return _cut(upward.flip(-1), ids.flip(-1), p)


def _any_order(logits: Tensor, p: Tensor) -> Tensor:
    probabilities = logits.float().softmax(-1)
    ordered, ids = probabilities.sort(descending=True)
    if ids.shape[-1] > 50 and torch.equal(ids, probabilities.sort(dim=-1, descending=True, stable=True).indices):
        return _higher_ids_first(logits, p)  # on a processor where every sort is stable, nobody gives this answer
    return _cut(ordered, ids, p)


def _first_and_below(logits: Tensor, p: Tensor) -> Tensor:
    z = logits.float()
    first = _ahead(z).sum(-1) == 0
    return _shared(z, first | (_before(z) + z.softmax(-1) <= p[:, None]))


def _from_below(logits: Tensor, p: Tensor) -> Tensor:
    z = logits.float()
    before = (z.softmax(-1)[:, None, :] * _ahead(-z)).sum(-1)
    return _shared(z, before < p[:, None])


def _not_put_back(logits: Tensor, p: Tensor) -> Tensor:
    z = logits.float()
    ordered = z.sort(descending=True).values.softmax(-1)
    return _shared(z, ordered.cumsum(-1) - ordered < p[:, None])


def _one_after_another(logits: Tensor, p: Tensor) -> Tensor:
    return _top_p(logits, p).sort(descending=True).values


def _picked_again(logits: Tensor, p: Tensor) -> Tensor:
    ids = logits.float().softmax(-1).sort(dim=-1, descending=True, stable=True).indices
    return _one_after_another(logits, p).gather(-1, ids)


def _softmax_again(logits: Tensor, p: Tensor) -> Tensor:
    left = logits.float().softmax(-1)
    return _shared(left, _before(logits.float()) < p[:, None])


def _cut_in_bf16(logits: Tensor, p: Tensor) -> Tensor:
    ordered, ids = logits.softmax(-1).sort(dim=-1, descending=True, stable=True)
    return _cut(ordered, ids, p).float()


def _rows_apart(logits: Tensor, p: Tensor) -> Tensor:
    return torch.stack([_top_p(row[None], q[None])[0] for row, q in zip(logits, p, strict=True)])


TOP_P = Exercise(
    "10.3", "top-p for a batch", "top_p", minutes=20, difficulty=3,
    why="Sort, add up, cut, and put everything back in its place: the commonest filter, and four chances to go wrong.",
    reference=_top_p,
    cases=_p_cases,
    wrong=(
        Wrong("the token that crosses p is dropped: it is kept, so that one always is.",
              lambda logits, p: _shared(logits, _before(logits.float()) + logits.float().softmax(-1) <= p[:, None])),
        Wrong("the token that crosses p is dropped, unless it is the likeliest: it is kept, wherever it stands.",
              _first_and_below),
        Wrong("what is left is not renormalised: the probabilities of each row must sum to 1 again.",
              lambda logits, p: logits.float().softmax(-1) * (_before(logits.float()) < p[:, None])),
        Wrong("one token too many is kept: the one behind that which crosses p.", _one_more),
        Wrong("where the likeliest have exactly p, one more is kept: they have reached p already.",
              lambda logits, p: _shared(logits, _before(logits.float()) <= p[:, None])),
        Wrong("what ties with the crossing token is kept as well: of equals, those with lower ids go first.",
              _with_ties),
        Wrong("of equal tokens those with higher ids go first: turning an upward sort round turns ties round as well.",
              _higher_ids_first),
        Wrong("equal tokens come out of the sort in any order: only a stable one leaves the lower ids in front.",
              _any_order),
        Wrong("p has a margin: if the likelier ones lack even a little of p, the next token is kept.",
              lambda logits, p: _top_p(logits, p - 1e-4)),
        Wrong("it adds up from the least likely: sort the other way.", _from_below),
        Wrong("the cut was found in sorted order and never put back in the order of the vocabulary.", _not_put_back),
        Wrong("the probabilities come back in sorted order: each must stand at its own token.", _one_after_another),
        Wrong("what was sorted is looked up by the ids, which shuffles it once more: it has to go to the ids' places.",
              _picked_again),
        Wrong("there is a softmax over probabilities: what is left only needs to be divided by its sum.",
              _softmax_again),
        Wrong("bf16 scores are added up in bf16, which has two or three digits: widen to fp32 first.", _cut_in_bf16),
        Wrong("each token is compared with p by itself: they must reach p together.",
              lambda logits, p: _shared(logits, logits.float().softmax(-1) >= p[:, None])),
        Wrong("tokens are compared with p times the likeliest: that is min-p.",
              lambda logits, p: _shared(logits, logits.float().softmax(-1)
                                        >= p[:, None] * logits.float().softmax(-1).amax(-1, keepdim=True))),
        Wrong("all rows have the first row's p: each has its own.",
              lambda logits, p: _top_p(logits, p[:1].expand_as(p))),
        Wrong("all rows have the largest p: each has its own.",
              lambda logits, p: _top_p(logits, p.max().expand_as(p))),
        Wrong("rows are stacked one by one, and a batch of none leaves nothing to stack: treat all rows at once.",
              _rows_apart),
    ),
    hints=(
        "A token stays if those that are likelier do not have p yet: which sum is that, with or without itself?",
        "In sorted order a running sum tells; what was decided there has to go back to each token's own place.",
        "softmax in fp32 · sort downwards, stable (it wants its arguments by name), with indices · running sum minus "
        "oneself, against p as a column · 0 where it reaches p · scatter back · over the row's sum.",
    ),
    tolerance=5e-6,
    blocked=("minillama.generation.top_p_filter", "minillama.generation.Sampling.probabilities"),
    slow=lambda rng: (torch.randn(5000, 5, generator=rng), torch.rand(5000, generator=rng) * 0.9 + 0.05),
)  # fmt: skip


# 10.4 ----------------------------------------------------------------------------------------------------------------


def _paths(rng: torch.Generator) -> tuple[Tensor, list[int]]:
    """A table whose best continuations are a→b→c→d→s, e→f→t, g→h→g, s→b, t→c, 0→e; and the ids of a … h, s, t."""
    ids = (torch.randperm(10, generator=rng) + 1).tolist()
    a, b, c, d, e, f, g, h, s, t = ids
    table = torch.randn(11, 11, generator=rng)
    for here, there in ((a, b), (b, c), (c, d), (d, s), (e, f), (f, t), (g, h), (h, g), (s, b), (t, c), (0, e)):
        table[here, there] = table[here].max() + 1
    return table, ids


def _greedy_cases(rng: torch.Generator) -> Iterable[tuple[Any, ...]]:
    for starts, stops, limit in (("aeg", "st", 7), ("ae", "st", 12), ("sea", "ts", 9), ("ca", "st", 3), ("a", "s", 4),
                                 ("ga", "", 5), ("eeec", "t", 6), ("at", "st", 0), ("", "s", 4)):  # fmt: skip
        table, ids = _paths(rng)
        named = dict(zip("abcdefghst", ids, strict=True))
        last = torch.tensor([named[name] for name in starts], dtype=torch.int64)
        yield table, last, [named[name] for name in stops], limit


def _greedy(table: Tensor, last: Tensor, stops: list[int], limit: int, *, at_once: bool = False, stay: bool = True,
            full: bool = False, first_ends: bool = False, mark: bool = True, ended: bool = False,
            ) -> Tensor:  # fmt: skip
    best, ending = table.tolist(), set(stops)
    rows: list[list[int]] = [[] for _ in last]
    tokens = last.tolist()
    done = [ended and token in ending for token in tokens]
    for _ in range(limit):
        if not full and (any(done) if first_ends else all(done)):
            break
        for i, token in enumerate(tokens):
            following = max(range(len(best)), key=best[token].__getitem__)
            if done[i] and not at_once:
                following = 0
            hidden = not mark and following in ending and not done[i]
            rows[i].append(0 if hidden else following)
            done[i] = (done[i] and stay) or (following in ending)
            tokens[i] = following
    return torch.tensor(rows, dtype=torch.int64).view(len(last), len(rows[0]) if rows else 0)


GREEDY = Exercise(
    "10.4", "greedy with stops", "greedy", minutes=15, difficulty=2,
    why="The texts of a batch end at different times, and what ends must neither disturb the others nor go on.",
    reference=_greedy,
    cases=_greedy_cases,
    wrong=(
        Wrong("a row goes on writing behind its stop token: from there on it must be 0.",
              lambda *a: _greedy(*a, at_once=True)),
        Wrong("a row that has ended wakes up again after one 0: remember which rows have ended.",
              lambda *a: _greedy(*a, stay=False)),
        Wrong("all rows end with the first one that stops: the others are not finished.",
              lambda *a: _greedy(*a, first_ends=True)),
        Wrong("the stop token is left out: it is the last token of its row.", lambda *a: _greedy(*a, mark=False)),
        Wrong("only the first of the stop tokens counts: any of them ends a row.",
              lambda table, last, stops, limit: _greedy(table, last, stops[:1], limit)),
        Wrong("the steps go on to the limit although all rows have ended.", lambda *a: _greedy(*a, full=True)),
        Wrong("there is a step too many: `limit` counts the new tokens.",
              lambda table, last, stops, limit: _greedy(table, last, stops, limit + 1)),
        Wrong("a row is over before it begins, if its prompt ends with a stop token: only new tokens can stop it.",
              lambda *a: _greedy(*a, ended=True)),
        Wrong("the prompt's last token comes back too: only what is new is wanted.",
              lambda table, last, stops, limit: torch.cat([last[:, None], _greedy(table, last, stops, limit)], 1)),
    ),
    hints=(
        "When one row has ended and another has not, what does the first one write, and how do you know at the next "
        "step that it has ended?",
        "Keep a row of booleans beside the tokens: once true, always true. The loop ends when all are.",
        "ended = all false · until the limit, while not all have ended · best of the rows of the table · 0 where "
        "ended · ended, or one of the stops · columns put side by side.",
    ),
    tolerance=0.0,
    blocked=("minillama.generation.stream_tokens", "minillama.generation.generate"),
)  # fmt: skip


# 10.5 ----------------------------------------------------------------------------------------------------------------


def _beam_cases(rng: torch.Generator) -> Iterable[tuple[Any, ...]]:
    # Tokens stand in layers of four, each leading to the next one or to the stop token: so no two texts consist of the
    # same steps in another order, which would be a tie.
    # `lead`: by how much ending at once is better than the best other first token, or no matter.
    for beams, limit, penalty, lead in ((1, 4, 0.0, -0.1), (2, 5, 1.0, None), (3, 5, 2.0, None), (4, 5, 0.6, None),
                                        (2, 3, 0.0, None), (3, 1, 1.0, 0.2), (4, 4, 3.0, None), (1, 5, 1.0, None),
                                        (2, 4, 3.0, 0.5), (3, 5, 3.0, 0.5), (2, 5, 2.0, 0.5)):  # fmt: skip
        ids = torch.randperm(22, generator=rng)
        start, stop = int(ids[0]), int(ids[1])
        layers = [ids[:1], *ids[2:].view(5, 4)]
        table = torch.rand(22, 22, generator=rng) * 4 - 24
        for here, there in zip(layers, [*layers[1:], layers[1]], strict=True):
            table[here[:, None], there] = torch.randn(len(here), 4, generator=rng) * 1.2
            table[here, stop] = torch.randn(len(here), generator=rng) * 0.7 + 0.8
        if lead is not None:
            table[start, stop] = table[start, layers[1]].max() + lead
        table[stop, layers[2]] = torch.randn(4, generator=rng) + 2
        table += torch.randn(22, 1, generator=rng) * 2  # a row's scores may have any level
        yield table, start, stop, beams, limit, penalty


def _beams(table: Tensor, start: int, stop: int, beams: int, limit: int, penalty: float, *, add: str = "log p",
           ends: bool = True, narrow: bool = False, every: bool = False, open_count: bool = True, apart: bool = False,
           length: int = 0, hasty: bool = False) -> list[tuple[list[int], float]]:  # fmt: skip
    wide = table.double()
    gains = {"logits": wide, "p": wide.softmax(-1)}.get(add, wide.log_softmax(-1)).tolist()
    open_texts: list[tuple[list[int], float]] = [([], 0.0)]
    finished = []
    for n in range(1, limit + 1):
        grown = []
        for text, total in open_texts:
            row = gains[text[-1] if text else start]
            more = [([*text, token], gain if add == "last" else total + gain) for token, gain in enumerate(row)]
            grown.append(sorted(more, key=lambda pair: -pair[1]))
        if apart and n > 1:
            grown = [more[:1] for more in grown]
        candidates = sorted((pair for more in grown for pair in more), key=lambda pair: -pair[1])
        over = [pair for pair in candidates if ends and pair[0][-1] == stop]
        finished += [(t, s / (n + length) ** penalty) for t, s in over if every or (t, s) in candidates[:beams]]
        pool = candidates[:beams] if narrow else candidates
        open_texts = [pair for pair in pool if not ends or pair[0][-1] != stop][:beams]
        if hasty and len(finished) >= beams:
            return sorted(finished, key=lambda pair: -pair[1])[:beams]
    if open_count:
        finished += [(text, total / (limit + length) ** penalty) for text, total in open_texts]
    return sorted(finished, key=lambda pair: -pair[1])[:beams]


def _without_the_stop(table: Tensor, start: int, stop: int, beams: int, limit: int, penalty: float) -> Any:
    """Every finished text's length is one less than it is; of length 0 counts as 1."""
    finished = _all_finished(table, start, stop, beams, limit)
    scored = [(t, s / max(len(t) - (t[-1] == stop), 1) ** penalty) for t, s in finished]
    return sorted(scored, key=lambda pair: -pair[1])[:beams]


def _all_finished(table: Tensor, start: int, stop: int, beams: int, limit: int) -> list[tuple[list[int], float]]:
    gains = table.double().log_softmax(-1).tolist()
    going: list[tuple[list[int], float]] = [([], 0.0)]
    finished = []
    for _ in range(limit):
        grown = [([*t, i], s + gain) for t, s in going for i, gain in enumerate(gains[t[-1] if t else start])]
        grown.sort(key=lambda pair: -pair[1])
        finished += [pair for pair in grown[:beams] if pair[0][-1] == stop]
        going = [pair for pair in grown if pair[0][-1] != stop][:beams]
    return finished + going


BEAM_SEARCH = Exercise(
    "10.5", "beam search with a length penalty", "beam_search", minutes=40, difficulty=5,
    why="Texts that have ended compete with texts that go on, and everything depends on how they are compared.",
    reference=lambda *a: _beams(*a),
    cases=_beam_cases,
    wrong=(
        Wrong("there is no length penalty: the sum must be divided by the length to the power of the penalty.",
              lambda table, start, stop, beams, limit, penalty: _beams(table, start, stop, beams, limit, 0.0)),
        Wrong("the sum is multiplied by the power of the length: it must be divided.",
              lambda table, start, stop, beams, limit, penalty: _beams(table, start, stop, beams, limit, -penalty)),
        Wrong("the penalty is always 1, the mean for each token: take the one that is given.",
              lambda table, start, stop, beams, limit, penalty: _beams(table, start, stop, beams, limit, 1.0)),
        Wrong("finished beams continue: a text that has the stop token is over.", lambda *a: _beams(*a, ends=False)),
        Wrong("scores are not summed: only the last token's log-probability counts.",
              lambda *a: _beams(*a, add="last")),
        Wrong("probabilities are added: a text's probability is a product, so add their logarithms.",
              lambda *a: _beams(*a, add="p")),
        Wrong("raw scores are added: they are no log-probabilities until each row is normalised.",
              lambda *a: _beams(*a, add="logits")),
        Wrong("the start counts as part of the length: only new tokens do.", lambda *a: _beams(*a, length=1)),
        Wrong("the stop token does not count in the length of a finished text: it is one of its tokens.",
              _without_the_stop),
        Wrong("a text that ends takes an open place with it: as many as there are beams must go on.",
              lambda *a: _beams(*a, narrow=True)),
        Wrong("texts may end from any rank: only those among the best candidates do, as many as there are beams.",
              lambda *a: _beams(*a, every=True)),
        Wrong("texts that are still open at the limit are lost: they compete with the finished ones.",
              lambda *a: _beams(*a, open_count=False)),
        Wrong("the search ends with enough finished texts: those that are open may yet score better, so go on.",
              lambda *a: _beams(*a, hasty=True)),
        Wrong("each beam continues with its own best token: all beams' candidates must compete for the places.",
              lambda *a: _beams(*a, apart=True)),
    ),
    hints=(
        "With 2 beams and 5 tokens there are 10 candidates a step. Which may end, and which two go on?",
        "Keep two lists, open texts with their sums and finished texts with their scores. A sum decides who goes on; "
        "a score, which is the sum over a power of the length, decides at the end.",
        "log-softmax of the table · for each step: sums of every open text with every token, sorted · walk down: a "
        "stop among the first W is finished, of the rest the first W stay open · at the limit the open ones join · "
        "sort by score.",
    ),
    tolerance=1e-5,
    blocked=("minillama.generation.beam_search", "minillama.generation.generate"),
)  # fmt: skip


# 10.6 ----------------------------------------------------------------------------------------------------------------


def _cache_cases(rng: torch.Generator) -> Iterable[tuple[Any, ...]]:
    for B, H, K, T, P, D, scale in ((2, 6, 2, 3, 5, 4, 1.0), (1, 4, 4, 1, 7, 6, 1.0), (3, 6, 3, 4, 0, 8, 1.0),
                                    (2, 4, 1, 1, 0, 2, 1.0), (1, 6, 2, 2, 9, 10, 8.0), (2, 6, 2, 1, 3, 4, 1.0),
                                    (0, 6, 2, 2, 3, 4, 1.0)):  # fmt: skip
        q = torch.randn(B, H, T, D, generator=rng) * scale
        k, v = (torch.randn(B, K, T, D, generator=rng) for _ in range(2))
        past_k, past_v = (torch.randn(B, K, P, D, generator=rng) for _ in range(2))
        yield q, k, v, past_k, past_v, torch.rand(D // 2, generator=rng) + 0.05
    k, v = torch.randn(2, 1, 1, 2, 4, generator=rng)
    q = torch.randn(1, 2, 2, 4, generator=rng)
    q[:, :, 0] = -1e12 * k[:, :, 0]  # sees only itself, with a score below any constant that stands in for -inf
    none = torch.zeros(1, 1, 0, 4)
    yield q, k, v, none, none, torch.rand(2, generator=rng) + 0.05


def _turn(x: Tensor, frequency: Tensor, positions: Tensor) -> Tensor:
    return rotate(x.transpose(1, 2), rotation(frequency, positions)).transpose(1, 2).contiguous()


def _cached(q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor, frequency: Tensor, *,
            shift: int | None = 0, same: bool = False, ahead: int = 0, corner: bool = False, tile: bool = False,
            turn_k: bool = True, turn_q: bool = True, turn_v: bool = False, again: bool = False, front: bool = False,
            wide: bool = False, forget: bool = False, power: float = 0.5, late: bool = False, raw: bool = False,
            ask_early: bool = False, flip: bool = False, fill: float | None = None, once: bool = False,
            ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    new, past, groups = q.shape[2], past_k.shape[2], q.shape[1] // k.shape[1]
    positions = torch.arange(new) * (not same) + (0 if shift is None else past + shift)
    unturned = k
    q = _turn(q, frequency, torch.arange(new) if ask_early else positions) if turn_q else q
    k = _turn(k, frequency, positions) if turn_k else k
    v = _turn(v, frequency, positions) if turn_v else v
    if again:
        past_k = _turn(past_k, frequency, torch.arange(past))
    keys, values = (torch.cat(pair[::-1] if front else pair, 2) for pair in ((past_k, k), (past_v, v)))
    if tile:
        many_k, many_v = keys.repeat(1, groups, 1, 1), values.repeat(1, groups, 1, 1)
    else:
        many_k, many_v = keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1)
    mask = torch.ones(new, past + new, dtype=torch.bool).tril((0 if corner else past) + ahead)
    if once and past:
        mask.fill_(True)
    if flip:
        mask = ~mask
    out = F.scaled_dot_product_attention(q, many_k, many_v, mask, scale=q.shape[-1] ** -power)
    if not mask.any(-1).all():
        out = out.masked_fill(~mask.any(-1)[:, None], torch.nan)  # a softmax over nothing
    if late:
        out = ((q @ many_k.mT / q.shape[-1] ** 0.5).softmax(-1) * mask) @ many_v
    if fill is not None:
        out = (q @ many_k.mT / q.shape[-1] ** 0.5).masked_fill(~mask, fill).softmax(-1) @ many_v
    if raw:
        keys = torch.cat([past_k, unturned], 2)
    if forget:
        return out, k, v
    return (out, many_k, many_v) if wide else (out, keys, values)


KV_STEP = Exercise(
    "10.6", "one step of a KV cache", "cached_attention", minutes=25, difficulty=4,
    why="A cache that is off by one place writes text that looks almost right: the hardest mistake to see.",
    reference=lambda *a: _cached(*a),
    cases=_cache_cases,
    wrong=(
        Wrong("the new tokens' positions begin at 0: they follow the P tokens that are in the cache.",
              lambda *a: _cached(*a, shift=None)),
        Wrong("the new tokens stand one position too far: P tokens have the positions 0 to P - 1.",
              lambda *a: _cached(*a, shift=1)),
        Wrong("the new tokens stand one position too early: the first of them has the last old one's position.",
              lambda *a: _cached(*a, shift=-1)),
        Wrong("all new tokens stand at the same position: they follow one another.",
              lambda *a: _cached(*a, same=True)),
        Wrong("the mask is off by one: a token does not see itself.", lambda *a: _cached(*a, ahead=-1)),
        Wrong("the mask is off by one: a token sees the next one.", lambda *a: _cached(*a, ahead=1)),
        Wrong("there is no mask: the new tokens see those behind them.", lambda *a: _cached(*a, ahead=10_000)),
        Wrong("the mask begins at the first column: the new tokens are the last ones, and see the whole cache.",
              lambda *a: _cached(*a, corner=True)),
        Wrong("there is a mask only while the cache is empty: behind a full one, too, new tokens must not look ahead.",
              lambda *a: _cached(*a, once=True)),
        Wrong("the mask is turned round: it hides what a token may see, and shows what comes behind it.",
              lambda *a: _cached(*a, flip=True)),
        Wrong("hidden scores are 0 before the softmax, a score like any other: the exponential of 0 is 1.",
              lambda *a: _cached(*a, fill=0.0)),
        Wrong("hidden scores get a finite number, and what a token may see can score lower: take minus infinity.",
              lambda *a: _cached(*a, fill=-1e9)),
        Wrong("the mask comes after the softmax: what is left in a row no longer sums to 1.",
              lambda *a: _cached(*a, late=True)),
        Wrong("key/value heads are tiled: neighbouring query heads share one, so each is repeated in its place.",
              lambda *a: _cached(*a, tile=True)),
        Wrong("the new keys are put away without being turned.", lambda *a: _cached(*a, turn_k=False)),
        Wrong("the queries are not turned.", lambda *a: _cached(*a, turn_q=False)),
        Wrong("neither the queries nor the new keys are turned: only the cache's keys come turned.",
              lambda *a: _cached(*a, turn_q=False, turn_k=False)),
        Wrong("the queries' positions begin at 0, the new keys' at P: query and key of a token have the same one.",
              lambda *a: _cached(*a, ask_early=True)),
        Wrong("the outputs are right, but the new keys are put away unturned: the next step takes them as they are.",
              lambda *a: _cached(*a, raw=True)),
        Wrong("the values are turned too: only queries and keys have positions.",
              lambda *a: _cached(*a, turn_v=True)),
        Wrong("the keys in the cache are turned a second time: they were put away turned.",
              lambda *a: _cached(*a, again=True)),
        Wrong("the new keys and values stand before the old ones: they belong behind.",
              lambda *a: _cached(*a, front=True)),
        Wrong("the cache holds a copy for every query head: keep the K heads that there are.",
              lambda *a: _cached(*a, wide=True)),
        Wrong("only the new keys and values come back: the cache must hold the old ones as well.",
              lambda *a: _cached(*a, forget=True)),
        Wrong("the products are not divided by the root of head_dim.", lambda *a: _cached(*a, power=0)),
        Wrong("the products are divided by head_dim, not by its root.", lambda *a: _cached(*a, power=1)),
    ),
    hints=(
        "Five tokens are in the cache and three come in: which positions have these, and how many keys does the "
        "second of them see?",
        "Turn new queries and keys by their own positions, put keys and values behind the old ones, and let row t of "
        "the new tokens see all old columns and the new ones up to itself.",
        "positions from P on · turn q and k · concatenate along time · repeat each head for its group · scores over "
        "root of D · mask shifted by P · softmax · weighted sum; return it with the K heads of both.",
    ),
    tolerance=5e-6,
    blocked=("torch.nn.functional.scaled_dot_product_attention", "minillama.attention.Attention.attend",
             "minillama.attention.Attention.attend_fast"),
)  # fmt: skip


# 10.7 ----------------------------------------------------------------------------------------------------------------

_HEATS = (1.0, 1.5, 2.0, 3.0)
_STORIES = 32


def _accepted() -> dict[float, float]:
    """The share of stories that the world accepts, for each temperature, with min-p = 0.1."""
    model, tokenizer = load("toy")
    assert tokenizer is not None
    shares = {}
    for heat in _HEATS:
        texts = generate(model, tokenizer, [""] * _STORIES, temperature=heat, min_p=0.1, seed=0, max_new_tokens=200)
        shares[heat] = sum(map(_right, texts)) / _STORIES
    return shares


def _right(text: str) -> bool:
    try:
        world.log_prob(text)
    except world.Fault:
        return False
    return True


def _verify(measured: dict[str, Any]) -> str:
    own = {heat: measured[f"share at {heat}"] for heat in _HEATS}
    for heat, share in own.items():
        if not 0 <= share <= 1:
            return f"'share at {heat}' is {share}, expected a share from 0 to 1."
    if not 0 < measured["predicted"] < 100:
        return f"the prediction is {measured['predicted']}, expected a temperature above 0."
    for heat, true in _accepted().items():
        if abs(own[heat] - true) > 2.5 / _STORIES:
            return (
                f"'share at {heat}' is not the share of the {_STORIES} stories of seed 0 that the world accepts: "
                "all in one call of generate, with min_p=0.1, up to 200 tokens, and refused by world.Fault."
            )
    hottest = max(heat for heat in _HEATS if own[heat] >= 0.75 * own[1.0])
    if not math.isclose(measured["hottest"], hottest):
        return (
            "'hottest' does not follow from your shares: it is the highest of the four temperatures whose share is at "
            "least three quarters of that at 1."
        )
    return ""


EXPERIMENT = Experiment(
    "10.7", "experiment: as hot as it gets", "measured_10", minutes=25, difficulty=3,
    why="A filter lets you turn the heat up; how far, only right and wrong stories can tell.",
    keys={
        "predicted": "the hottest temperature of the four that you expect to pass, written before you measure",
        **{f"share at {heat}": f"the share of right stories at temperature {heat:g}, from 0 to 1" for heat in _HEATS},
        "hottest": "the highest of the four temperatures with three quarters of the share at 1, or more",
        "because": "a sentence on why",
    },
    verify=_verify,
    explain="on what min-p keeps when it gets hotter",
    hints=(
        "At temperature 3, a token with a hundredth of the best one's probability comes to have which part of it?",
        "One call of generate tells all stories of a temperature; world.log_prob raises world.Fault for a wrong one.",
        "load · for each temperature: generate from 32 empty prompts · count those that world.log_prob takes · over "
        "32.",
    ),
)  # fmt: skip


EXERCISES: list[Task] = [TEMPERATURE, TOP_K, TOP_P, GREEDY, BEAM_SEARCH, KV_STEP, EXPERIMENT]
