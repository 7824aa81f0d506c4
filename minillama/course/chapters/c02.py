"""Exercises of chapter 02, embeddings."""

import functools
import math
import random
import re
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minillama import world
from minillama.course.exercise import Exercise, Experiment, Task, Wrong

# 02.1 ----------------------------------------------------------------------------------------------------------------


def _lookup_cases(rng: torch.Generator) -> Iterable[tuple[Any, ...]]:
    def tokens(*shape: int, below: int) -> Tensor:
        return torch.randint(below, shape, generator=rng)

    return [
        (tokens(2, 5, below=9), torch.randn(11, 3, generator=rng)),  # rows 9 and 10 are never asked for
        (tokens(3, 4, below=6), torch.randn(6, 6, generator=rng) * 1e4),
        (tokens(1, 1, below=4), torch.randn(7, 2, generator=rng)),
        (torch.tensor([[2, 2, 0, 4, 2]]), torch.randn(5, 8, generator=rng)),
        (tokens(2, 3, below=8), torch.randn(8, 5, generator=rng).bfloat16()),
        (tokens(4, 2, below=10), torch.randn(10, 3, generator=rng, dtype=torch.float64)),
        (tokens(3, 0, below=5), torch.randn(5, 4, generator=rng)),
    ]


def _one_hot(tokens: Tensor, table: Tensor) -> Tensor:
    return F.one_hot(tokens, len(table)).to(table.dtype)


LOOKUP = Exercise(
    "02.1", "a lookup by one-hot vectors", "lookup", minutes=10, difficulty=1,
    why="An embedding is a linear layer on bare names; whoever has multiplied it once knows how its rows learn.",
    reference=lambda tokens, table: _one_hot(tokens, table) @ table,
    cases=_lookup_cases,
    wrong=(
        Wrong("the product is with the transposed table: that looks up columns, or does not fit at all.",
              lambda tokens, table: _one_hot(tokens, table) @ table.mT),
        Wrong("rows are counted from 1: token 0 has the first row.",
              lambda tokens, table: table[tokens - 1]),
        Wrong("batch and places are flattened into one axis: the result has three axes, (B, T, D).",
              lambda tokens, table: table[tokens.flatten()]),
        Wrong("the rows of all places are added up: each place keeps a vector of its own.",
              lambda tokens, table: _one_hot(tokens, table).sum(1) @ table),
        Wrong("the one-hot vectors are as long as the largest token at hand: they need a place for each row.",
              lambda tokens, table: F.one_hot(tokens).to(table.dtype) @ table),
        Wrong("the one-hot vectors are fp32 whatever the table is: they need the table's dtype.",
              lambda tokens, table: _one_hot(tokens, table).float() @ table),
        Wrong("the rows are multiplied by √D: the Transformer of 2017 did that, LLaMA does not.",
              lambda tokens, table: table[tokens] * table.shape[1] ** 0.5),
    ),
    hints=(
        "How long is a one-hot vector, and which of the table's two axes does it meet in the product?",
        "Make (B, T, V) of zeros and ones, a single one for each token, in the table's dtype; then one product.",
        "all row numbers in a line · compare each token with them · true and false to numbers · times the table.",
    ),
    tolerance=0.0,
    part="lookup",
    blocked=("torch.nn.functional.embedding", "torch.embedding", "minillama.embedding.Embedding.forward"),
    slow=lambda rng: (torch.randint(8, (64, 512), generator=rng), torch.randn(8, 4, generator=rng)),
)  # fmt: skip


# 02.2 ----------------------------------------------------------------------------------------------------------------

Rows = list[list[int]]
Pairs = list[tuple[int, int]]


def _pair_cases(rng: torch.Generator) -> Iterable[tuple[Any, ...]]:
    def row(length: int, below: int = 50) -> list[int]:
        return torch.randint(below, (length,), generator=rng).tolist()

    return [
        ([row(7), row(4)], 2),
        ([row(5)], 1),
        ([row(3), [], row(1), row(6)], 3),
        ([row(2), row(3)], 9),
        ([row(9, below=3), [1, 1, 2, 1, 1]], 2),
        ([row(4)], 0),
        ([row(1)], 2),
        ([], 2),
    ]


def _pairs(rows: Rows, window: int) -> Pairs:
    return [
        (word, row[j])
        for row in rows
        for i, word in enumerate(row)
        for j in range(len(row))
        if 0 < abs(i - j) <= window
    ]


def _if(rule: Any) -> Any:
    """Pairs of two places i, j of a row for which rule(i, j, row, window) holds."""
    return lambda rows, window: [
        (row[i], row[j]) for row in rows for i in range(len(row)) for j in range(len(row)) if rule(i, j, row, window)
    ]


def _by_distance(rows: Rows, window: int) -> Pairs:
    found: Pairs = []
    for row in rows:
        for distance in range(1, window + 1):
            found += zip(row, row[distance:], strict=False)
            found += zip(row[distance:], row, strict=False)
    return found


def _wrapped(rows: Rows, window: int) -> Pairs:
    return [
        (word, row[i + d])
        for row in rows
        for i, word in enumerate(row)
        for d in range(-window, window + 1)
        if d and i + d < len(row)
    ]


def _in_order(order: Any) -> Any:
    """For each word the neighbours in another order: order(i, window) gives their places, also such as do not exist."""
    return lambda rows, window: [
        (word, row[j])
        for row in rows
        for i, word in enumerate(row)
        for j in order(i, window)
        if 0 <= j < len(row) and j != i
    ]


def _both_at_once(rows: Rows, window: int) -> Pairs:
    found: Pairs = []
    for row in rows:
        for i, word in enumerate(row):
            for other in row[i + 1 : i + window + 1]:
                found += [(word, other), (other, word)]
    return found


PAIRS = Exercise(
    "02.2", "skip-gram pairs", "skipgram_pairs", minutes=15, difficulty=2,
    why="Word vectors are made of these pairs and of nothing else; an edge that is off by one is never noticed.",
    reference=_pairs,
    cases=_pair_cases,
    wrong=(
        Wrong("pairs go from one row into the next: two stories are no neighbours.",
              lambda rows, window: _pairs([[word for row in rows for word in row]], window)),
        Wrong("each word is paired with itself: its own place is no neighbour.",
              _if(lambda i, j, row, window: abs(i - j) <= window)),
        Wrong("a neighbour with the word's own id is left out: only the word's own place is.",
              _if(lambda i, j, row, window: 0 < abs(i - j) <= window and row[i] != row[j])),
        Wrong("only neighbours behind the word are taken: those before it count as well.",
              _if(lambda i, j, row, window: 0 < j - i <= window)),
        Wrong("only neighbours before the word are taken: those behind it count as well.",
              _if(lambda i, j, row, window: 0 < i - j <= window)),
        Wrong("the last neighbour behind the word is missing: the end of a range is not in it.",
              _if(lambda i, j, row, window: -window <= j - i < window and i != j)),
        Wrong("both windows are one place too narrow: `window` places away still counts.",
              _if(lambda i, j, row, window: 0 < abs(i - j) < window)),
        Wrong("words near the start lose the neighbours before them: a slice from a negative place is another one.",
              _if(lambda i, j, row, window: 0 < j - i <= window or (j in range(len(row))[i - window : i]))),
        Wrong("near the start, a negative place wraps round to the row's end.", _wrapped),
        Wrong("words near the edges are left out: they have fewer neighbours, not none.",
              _if(lambda i, j, row, window: 0 < abs(i - j) <= window and window <= i < len(row) - window)),
        Wrong("the neighbour stands first in the pairs: the word comes first.",
              lambda rows, window: [(other, word) for word, other in _pairs(rows, window)]),
        Wrong("the pairs are right, in another order: distance by distance, and not word by word.", _by_distance),
        Wrong("the pairs are right, in another order: the nearest neighbours come first, not the leftmost.",
              _in_order(lambda i, window: (j for d in range(1, window + 1) for j in (i - d, i + d)))),
        Wrong("the pairs are right, in another order: those before the word are walked outwards, from right to left.",
              _in_order(lambda i, window: [*range(i - 1, i - window - 1, -1), *range(i + 1, i + window + 1)])),
        Wrong("the pairs are right, in another order: those behind the word stand first, and those before it last.",
              _in_order(lambda i, window: [*range(i + 1, i + window + 1), *range(i - window, i)])),
        Wrong("the pairs are right, in another order: a pair and its mirror image stand together, not word by word.",
              _both_at_once),
        Wrong("the pairs are right, but sorted by their ids: the order of the text is wanted.",
              lambda rows, window: sorted(_pairs(rows, window))),
        Wrong("these are places in the row: the ids that stand there are wanted.",
              lambda rows, window: _pairs([list(range(len(row))) for row in rows], window)),
        Wrong("only the last row's pairs are left: the list begins anew with each row.",
              lambda rows, window: _pairs(rows[-1:], window)),
        Wrong("only the first row's pairs are there: it returns before the others had their turn.",
              lambda rows, window: _pairs(rows[:1], window)),
        Wrong("a word's place is looked for by its id: an id that occurs twice is always found at the first.",
              lambda rows, window: [(word, row[j]) for row in rows for word in row for j in range(len(row))
                                    if 0 < abs(row.index(word) - j) <= window]),
        Wrong("a pair that occurs twice is given once: how often it occurs is what counts.",
              lambda rows, window: list(dict.fromkeys(_pairs(rows, window)))),
    ),
    hints=(
        "Which neighbours does the first word of a row have, and which the last?",
        "For each word, the first and last place of its window; cut both to the row, and skip the word's own place.",
        "each row · each place i · from the larger of 0 and i minus window to the smaller of two ends · not i.",
    ),
    tolerance=0.0,
)  # fmt: skip


# 02.3 ----------------------------------------------------------------------------------------------------------------


def _game_cases(rng: torch.Generator) -> Iterable[tuple[Any, ...]]:
    for b, k, d, scale in (
        (3, 5, 4, 1.0), (2, 3, 7, 2.0), (1, 1, 2, 1.0), (4, 2, 1, 0.5), (2, 0, 3, 1.0), (3, 1, 4, 1.0),
    ):  # fmt: skip
        yield (
            torch.randn(b, d, generator=rng) * scale,
            torch.randn(b, d, generator=rng),
            torch.randn(b, k, d, generator=rng),
        )
    ones = torch.ones(2, 1)
    # scores of false pairs of 12.75, 15.5 and 40: 1 minus their sigmoid is rounded or 0, the sigmoid of minus them not
    yield ones * 8, ones * torch.tensor([[3.0], [-3.375]]), torch.tensor([[[5.0], [1.9375]], [[1.59375], [-0.2]]])
    yield ones * 40, ones * torch.tensor([[-25.0], [7.0]]), torch.tensor([[[30.0], [-8.0]], [[-3.0], [0.01]]])


def _game(
    centre: Tensor, context: Tensor, negatives: Tensor, *, sign: float = -1.0, log: Any = F.logsigmoid
) -> tuple[Tensor, Tensor]:
    """(B,) and (B, K): log-probabilities of what was the case."""
    real, false = (centre * context).sum(-1), (negatives * centre[:, None]).sum(-1)
    return log(real), log(sign * false)


def _game_mean(*given: Tensor, **how: Any) -> Tensor:
    real, false = _game(*given, **how)
    return -(real + false.sum(1)).mean()


def _right_game(centre: Tensor, context: Tensor, negatives: Tensor) -> Tensor:
    vectors = torch.cat([context[:, None], negatives], 1)
    scores = torch.einsum("bd,bkd->bk", centre, vectors)
    truth = torch.zeros_like(scores)
    truth[:, 0] = 1
    return F.binary_cross_entropy_with_logits(scores, truth, reduction="none").sum(1).mean()


def _subtracted(*given: Tensor, log: Any = torch.log) -> Tensor:
    real, false = _game(*given, sign=1.0, log=torch.sigmoid)
    return -(log(real) + log(1 - false).sum(1)).mean()


def _scores(centre: Tensor, context: Tensor, negatives: Tensor) -> Tensor:
    """(B, 1 + K): the real pair's first."""
    return torch.cat([(centre * context).sum(-1, keepdim=True), (negatives * centre[:, None]).sum(-1)], 1)


def _bounded(eps: str) -> Iterable[Wrong]:
    """Ways to keep the logarithm finite that change its value."""
    small = float(eps)
    for how, log in (
        (f"{eps} is added inside the logarithm", lambda p: (p + small).log()),
        (f"no probability is let below {eps}", lambda p: p.clamp_min(small).log()),
    ):
        cost = f"a score of -1000 must cost 1000, and here nothing costs more than {-math.log(small):.0f}."
        yield Wrong(f"{how}: {cost}", lambda *given, log=log: _game_mean(*given, log=lambda s: log(s.sigmoid())))
        yield Wrong(f"{how}, and 1 minus a sigmoid is rounded before: {cost}",
                    lambda *given, log=log: _subtracted(*given, log=log))  # fmt: skip


def _clamped(most: int) -> Wrong:
    return Wrong(f"the scores are cut off at {most} and -{most}: a score of -1000 must cost 1000, not {most}.",
                 lambda *given: _game_mean(*given, log=lambda s: F.logsigmoid(s.clamp(-most, most))))  # fmt: skip


def _entropy_of_probabilities(*given: Tensor) -> Tensor:
    real, false = _game(*given, sign=1.0, log=torch.sigmoid)
    costs = F.binary_cross_entropy(false, torch.zeros_like(false), reduction="none").sum(1)
    return F.binary_cross_entropy(real, torch.ones_like(real)) + costs.mean()


GAME = Exercise(
    "02.3", "the loss of negative sampling", "negative_sampling_loss", minutes=20, difficulty=3,
    why="The loss that word2vec was trained with, for a whole batch, and safe where the textbook's form is infinite.",
    reference=_right_game,
    cases=_game_cases,
    wrong=(
        Wrong("large scores give infinity: an exponential overflows, or a probability of 0 meets a logarithm.",
              lambda *given: _game_mean(*given, log=lambda s: s.sigmoid().log())),
        Wrong("1 minus a sigmoid is rounded to 0 and its logarithm is infinite: false pairs need no subtraction.",
              _subtracted),
        Wrong("false pairs are treated as real ones: their score wants the other sign.",
              lambda *given: _game_mean(*given, sign=1.0)),
        Wrong("the sign is turned round: a loss is minus the logarithm of a probability.",
              lambda *given: -_game_mean(*given)),
        Wrong("it is the sum over the batch: the mean over B is wanted.",
              lambda *given: _game_mean(*given) * len(given[0])),
        Wrong("the K false pairs are averaged: each of them counts as much as the real one.",
              lambda *given: -(_game(*given)[0] + _game(*given)[1].sum(1) / max(1, given[2].shape[1])).mean()),
        Wrong("it is the mean over all B·(1 + K) pairs: add the pairs of a word up, and take the mean over B only.",
              lambda *given: _game_mean(*given) / (1 + given[2].shape[1])),
        Wrong("the false pairs are left out: without them, scoring everything high costs nothing.",
              lambda *given: -_game(*given)[0].mean()),
        Wrong("the real pair is left out: nothing then pulls a word to its neighbours.",
              lambda *given: -_game(*given)[1].sum(1).mean()),
        Wrong("the K false pairs are averaged, and for K = 0 that is no number: each counts as much as the real one.",
              lambda *given: -(_game(*given)[0] + _game(*given)[1].mean(1)).mean()),
        Wrong("the false pairs are added up over the whole batch: the mean over B is for them as well.",
              lambda *given: -_game(*given)[0].mean() - _game(*given)[1].sum()),
        Wrong("the real pair is counted K times, once for each false one: that is broadcasting, add up over K first.",
              lambda *given: -(_game(*given)[0][:, None] + _game(*given)[1]).sum(1).mean()),
        Wrong("where K is 1, its axis is squeezed away, and the sum that was for K adds up the batch.",
              lambda *given: -(_game(*given)[0] + _game(*given)[1].squeeze().sum(-1)).mean()),
        Wrong("the K scores are added up before the logarithm: each false pair is a guess of its own.",
              lambda *given: -(_game(*given)[0] + F.logsigmoid(-_scores(*given)[:, 1:].sum(1))).mean()),
        Wrong("it is a softmax over the 1 + K scores: here each pair is guessed alone, real or false.",
              lambda *given: -_scores(*given).log_softmax(1)[:, 0].mean()),
        *(wrong for eps in ("1e-12", "1e-10", "1e-9", "1e-8", "1e-7", "1e-6") for wrong in _bounded(eps)),
        *(_clamped(most) for most in (6, 10, 20, 50, 100)),
        Wrong("the cross-entropy is given probabilities: they are rounded by then, and it stops at a cost of 100.",
              _entropy_of_probabilities),
        Wrong("the false neighbours are scored with the real neighbour: they are scored with the centre word.",
              lambda centre, context, negatives: -(
                  F.logsigmoid((centre * context).sum(-1))
                  + F.logsigmoid(-(negatives * context[:, None]).sum(-1)).sum(1)).mean()),
        Wrong("all words of the batch get the first one's false neighbours: each has its own.",
              lambda centre, context, negatives: _game_mean(centre, context, negatives[:1].expand_as(negatives))),
    ),
    hints=(
        "What is the logarithm of a sigmoid for a score of minus 1000, and can you say it without an exponential?",
        "One score for the real pair, K for the false ones; turn the sign of those. Then -log σ(s) is a bent line: "
        "for a large score nearly 0, for a very negative one nearly -s. Take that line apart from a small correction.",
        "K + 1 scores a row, by products summed over D · signs · the part above 0 of -s, plus log1p of exp of -|s| · "
        "add up the row · mean over B.",
    ),
    tolerance=5e-6,
    blocked=("torch.nn.functional.binary_cross_entropy_with_logits", "torch.nn.functional.logsigmoid",
             "torch.nn.functional.softplus", "torch.binary_cross_entropy_with_logits",
             "torch.nn.BCEWithLogitsLoss.forward", "torch.nn.LogSigmoid.forward", "torch.nn.Softplus.forward"),
    slow=lambda rng: (torch.randn(6000, 4, generator=rng), torch.randn(6000, 4, generator=rng),
                      torch.randn(6000, 3, 4, generator=rng)),
)  # fmt: skip


# 02.4 ----------------------------------------------------------------------------------------------------------------


def _near_cases(rng: torch.Generator) -> Iterable[tuple[Any, ...]]:
    def table(rows: int, dim: int) -> Tensor:
        lengths = torch.rand(rows, 1, generator=rng) * 9 + 0.1
        return torch.randn(rows, dim, generator=rng) * lengths

    # cosines that are exact in any order of computing, many of them equal
    signs = torch.randint(2, (12, 4), generator=rng) * 2.0 - 1
    signs[3], signs[7], signs[9] = signs[1], signs[1], -signs[1]
    powers = 2.0 ** torch.randint(-2, 4, (12, 1), generator=rng)
    away = torch.tensor([[4.0, 0.0], [-1.0, 0.5], [-3.0, -1.0], [-0.2, 0.4]])  # row 0 has no near row
    aside = torch.tensor([[1.0, 0.1], [8.0, 8.5], [0.9, 0.4], [2.0, -1.0], [0.3, 0.05]])
    return [
        (table(9, 5), torch.tensor([4, 0, 8]), 3),
        (table(6, 3), torch.randint(6, (4,), generator=rng), 5),
        (table(7, 4) * 1e4, torch.tensor([2, 2]), 2),
        (signs * powers, torch.tensor([7, 3, 1, 11]), 6),
        (away, torch.tensor([0, 2]), 3),
        (aside, torch.tensor([2, 0]), 2),
        (table(5, 2), torch.tensor([3]), 0),
        (table(5, 2), torch.empty(0, dtype=torch.int64), 2),
    ]


def _cosines(table: Tensor, chosen: Tensor) -> Tensor:
    unit = table / table.norm(dim=1, keepdim=True)
    return unit[chosen] @ unit.mT


def _order(closeness: Tensor, chosen: Tensor, k: int, own: float | None = -torch.inf) -> Tensor:
    """The k largest of each row, the lower number first where two are equal; the own place has the value `own`."""
    if own is not None:
        closeness = closeness.clone()
        closeness[torch.arange(len(chosen)), chosen] = own
    return closeness.sort(dim=1, descending=True, stable=True).indices[:, :k]


def _nearest(table: Tensor, chosen: Tensor, k: int) -> Tensor:
    return _order(F.cosine_similarity(table[chosen][:, None], table, dim=-1), chosen, k)


def _higher_first(table: Tensor, chosen: Tensor, k: int) -> Tensor:
    last = len(table) - 1
    return last - _order(_cosines(table.flip(0), last - chosen), last - chosen, k)


def _own_at_the_diagonal(table: Tensor, chosen: Tensor, k: int) -> Tensor:
    return _order(_cosines(table, chosen).fill_diagonal_(-torch.inf), chosen, k, own=None)


def _all_chosen_left_out(table: Tensor, chosen: Tensor, k: int) -> Tensor:
    closeness = _cosines(table, chosen)
    closeness[:, chosen] = -torch.inf
    return _order(closeness, chosen, k, own=None)


def _renumbered(table: Tensor, chosen: Tensor, k: int) -> Tensor:
    right = _nearest(table, chosen, k)
    return right - (right > chosen[:, None]).long()


def _without_own(table: Tensor, chosen: Tensor) -> Tensor:
    closeness = _cosines(table, chosen)
    closeness[torch.arange(len(chosen)), chosen] = -torch.inf
    return closeness


NEAREST = Exercise(
    "02.4", "nearest rows by cosine", "nearest_rows", minutes=15, difficulty=2,
    why="The first thing that anybody asks of a table of vectors, and the easiest to ask wrongly.",
    reference=_nearest,
    cases=_near_cases,
    wrong=(
        Wrong("it goes by the product, not by the cosine: long rows then are near to everything.",
              lambda table, chosen, k: _order(table[chosen] @ table.mT, chosen, k)),
        Wrong("it goes by the distance: two rows in the same direction may lie far apart.",
              lambda table, chosen, k: _order(-torch.cdist(table[chosen], table), chosen, k)),
        Wrong("the row itself is among its neighbours.",
              lambda table, chosen, k: _order(_cosines(table, chosen), chosen, k, own=None)),
        Wrong("the row itself is among its neighbours, and rows that are equally near stand in no order.",
              lambda table, chosen, k: _cosines(table, chosen).topk(k).indices),
        Wrong("the row itself is made the nearest of all: its place needs a value that never wins.",
              lambda table, chosen, k: _order(_cosines(table, chosen), chosen, k, own=9.0)),
        Wrong("another row is left out: the first chosen row's own place is not 0, the second's not 1.",
              _own_at_the_diagonal),
        Wrong("every chosen row is left out for all of them: only the row itself is left out for each.",
              _all_chosen_left_out),
        Wrong("the row itself is cut out, and the numbers of those behind it are one too low.", _renumbered),
        Wrong("the first in the order is left out, whichever it is: another row may point in the same direction.",
              lambda table, chosen, k: _order(_cosines(table, chosen), chosen, k + 1, own=None)[:, 1:]),
        Wrong("the first in the order is left out, whichever it is, and rows that are equally near stand in no order.",
              lambda table, chosen, k: _cosines(table, chosen).topk(k + 1).indices[:, 1:]),
        Wrong("the row itself is given the cosine 0, and beats rows that point the other way.",
              lambda table, chosen, k: _order(_cosines(table, chosen), chosen, k, own=0.0)),
        Wrong("the farthest rows come first.",
              lambda table, chosen, k: _order(-_cosines(table, chosen), chosen, k)),
        Wrong("the sign of the cosine is lost: opposite directions are not near.",
              lambda table, chosen, k: _order(_cosines(table, chosen).abs(), chosen, k)),
        Wrong("of two rows that are equally near, the lower number comes first.", _higher_first),
        Wrong("rows that are equally near stand in no order: not every way to pick the largest keeps the lower first.",
              lambda table, chosen, k: _without_own(table, chosen).topk(k).indices),
        Wrong("they are the nearest, but the nearest of them comes last.",
              lambda table, chosen, k: _without_own(table, chosen).argsort(dim=1, stable=True)[:, -k:]),
        Wrong("columns are made to length 1, not rows.",
              lambda table, chosen, k: _order((table / table.norm(dim=0))[chosen] @ (table / table.norm(dim=0)).mT,
                                              chosen, k)),
    ),
    hints=(
        "Row 5 is twice row 3. What is their product, and what is their cosine?",
        "Make all rows as long as 1; then products are cosines. Give each row's own place a value that never wins.",
        "divide by the rows' lengths · (B, V) products · minus infinity at the own places · a sort that keeps the "
        "order of equals, descending · the first k columns.",
    ),
    tolerance=0.0,
    blocked=("torch.nn.functional.cosine_similarity", "torch.cosine_similarity",
             "torch.nn.CosineSimilarity.forward"),
    slow=lambda rng: (torch.randn(8, 4, generator=rng), torch.randint(8, (5000,), generator=rng), 3),
)  # fmt: skip


# 02.5 ----------------------------------------------------------------------------------------------------------------


def _logit_cases(rng: torch.Generator) -> Iterable[tuple[Any, ...]]:
    for shape, dim, rows, dtype in (
        ((2, 3), 5, 11, torch.float32), ((4,), 6, 6, torch.float32), ((), 3, 8, torch.float32),
        ((2, 1, 3), 4, 7, torch.float32), ((0,), 3, 5, torch.float32), ((2, 5), 33, 9, torch.bfloat16),
        ((3,), 7, 7, torch.bfloat16),
    ):  # fmt: skip
        x = torch.randn(*shape, dim, generator=rng) * 3
        yield x.to(dtype), (torch.randn(rows, dim, generator=rng) + 0.2).to(dtype)


def _logits(x: Tensor, table: Tensor) -> Tensor:
    return F.linear(x.float(), table.float())


LOGITS = Exercise(
    "02.5", "the scores of a tied output", "tied_logits", minutes=10, difficulty=2,
    why="The table that reads a token also writes it: one product, and a small model has far fewer weights.",
    reference=_logits,
    cases=_logit_cases,
    wrong=(
        Wrong("the table is not transposed: a vector has to meet rows, not columns.",
              lambda x, table: x.float() @ table.float()),
        Wrong("it is divided by √D: attention's scores are, the output's are not.",
              lambda x, table: _logits(x, table) / x.shape[-1] ** 0.5),
        Wrong("it goes by the cosine: the lengths of the rows count here, common tokens have other ones than rare.",
              lambda x, table: _logits(F.normalize(x.float(), dim=-1), F.normalize(table.float(), dim=-1))),
        Wrong("rows are made to length 1: their lengths count here.",
              lambda x, table: _logits(x, F.normalize(table.float(), dim=-1))),
        Wrong("these are probabilities: scores are wanted, without a softmax.",
              lambda x, table: _logits(x, table).softmax(-1)),
        Wrong("these are logarithms of probabilities: scores are wanted, without a softmax.",
              lambda x, table: _logits(x, table).log_softmax(-1)),
        Wrong("in bf16 the scores are rounded and then widened: widen first.",
              lambda x, table: (x @ table.mT).float()),
        Wrong("in bf16 the scores stay in bf16: they are wanted in fp32.",
              lambda x, table: x @ table.mT),
        Wrong("only the last place is scored: every place is.",
              lambda x, table: _logits(x[..., -1, :] if x.dim() > 1 and x.numel() else x, table)),
    ),
    hints=(
        "The result has one score for each row of the table: which axis do x and the table share?",
        "The score of a token is the product of x with its row. Which way must the table lie to do all at once?",
        "both to fp32 · the table's axes swapped · one matrix product, which takes care of the axes in front.",
    ),
    tolerance=2e-6,
    part="logits",
    blocked=("torch.nn.functional.linear", "minillama.linear.linear", "minillama.embedding.Embedding.scores",
             "torch.nn.Linear.forward"),
)  # fmt: skip


# 02.6 ----------------------------------------------------------------------------------------------------------------

WINDOWS = (2, 5, 10, 20)
CLEAR = 0.2  # a gap from which on we say that the vectors tell the two words apart


@functools.cache
def _stories() -> tuple[list[Tensor], dict[str, int]]:
    """The 2,000 stories, and the words with their numbers."""
    rng = random.Random(2)
    texts = [re.findall(r"\w+", world.sample(rng).text) for _ in range(2000)]
    words = {word: i for i, word in enumerate(sorted({word for text in texts for word in text}))}
    return [torch.tensor([words[word] for word in text]) for text in texts], words


@functools.cache
def _gaps(*, counts: bool = False, behind: bool = False) -> list[float]:
    """For each window, cosine(happy, glad) - cosine(happy, sad); from counts alone; with the words behind alone."""
    stories, words = _stories()
    n, gaps = len(words), []
    for window in WINDOWS:
        pairs = [row[:-d] * n + row[d:] for row in stories for d in range(1, window + 1) if d < len(row)]
        met = torch.bincount(torch.cat(pairs), minlength=n * n).view(n, n).double()
        if not behind:
            met = met + met.mT
        if not counts:
            share = met / met.sum()
            chance = share.sum(1, keepdim=True) * share.sum(0)
            met = torch.where(share > 0, share / chance, 1.0).log().clamp_min(0)
        happy, glad, sad = (F.normalize(met[words[word]], dim=0) for word in ("happy", "glad", "sad"))
        gaps.append((happy @ glad - happy @ sad).item())
    return gaps


def _verify(measured: dict[str, Any]) -> str:
    true = _gaps()
    got = [measured[f"gap at {window}"] + 0.0 for window in WINDOWS]

    def like(others: list[float]) -> bool:
        return all(abs(one - other) <= 0.001 for one, other in zip(got, others, strict=True))

    if not like(true):
        if like(_gaps(counts=True)):
            return "these are the cosines of rows of counts: take the positive PMI of the counts first."
        if like(_gaps(behind=True)):
            return "only the words behind were counted: a neighbour may stand before or behind."
    for window, one, other in zip(WINDOWS, got, true, strict=True):
        if abs(one - other) > 0.001:
            sign = " (its sign is turned round)" if abs(one + other) <= 0.001 else ""
            return (
                f"'gap at {window}' is not what these 2,000 stories give{sign}: count all pairs within a story, both "
                "ways, take PPMI, and cosine(happy, glad) minus cosine(happy, sad)."
            )
    if measured["narrowest"] != next(window for window, gap in zip(WINDOWS, true, strict=True) if gap > CLEAR):
        return f"'narrowest' does not fit your gaps: it is the smallest of the windows whose gap is above {CLEAR}."
    if measured["predicted"] not in WINDOWS:
        return f"the prediction is {measured['predicted']}, expected one of {', '.join(map(str, WINDOWS))}."
    return ""


EXPERIMENT = Experiment(
    "02.6", "experiment: how wide must the window be, to tell happy from sad?", "measured_02", minutes=25, difficulty=3,
    why="What a vector knows is what its training could see; here you can turn that knob and watch.",
    keys={
        "predicted": "the narrowest of the windows 2, 5, 10, 20 that you expect to tell them apart, written beforehand",
        **{f"gap at {window}": f"the gap for a window of {window}, a difference of cosines" for window in WINDOWS},
        "narrowest": f"the narrowest of these windows with a gap above {CLEAR}",
        "because": "a sentence on why",
    },
    verify=_verify,
    explain="on what a wider window sees",
    hints=(
        "In “… told her mom and felt happy. The next day …”, which words would have to be others for sad?",
        "Count for one window, look at PPMI's rows of three words, and only then write the loop over windows. What "
        "made the child happy stands in another sentence.",
        "words to numbers · a (V, V) matrix of counts for each window · PPMI, zero for pairs that never met · two "
        "cosines and their difference.",
    ),
)  # fmt: skip


EXERCISES: list[Task] = [LOOKUP, PAIRS, GAME, NEAREST, LOGITS, EXPERIMENT]
