"""Laboratories of chapters 03, 04 and 10: dials to turn in a page, which computes what follows without a kernel.

For each, what the page computes (laboratory.js) stands here too, as a function to arrays made of the package's own
parts; the tests hold the page's numbers against it.
Letters: D head_dim, T tokens, V vocabulary.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minillama.config import ModelConfig
from minillama.generation import Sampling
from minillama.rope import frequencies, rotate, rotation
from minillama.visualize.view import sources

THETAS = (100.0, 1000.0, 10_000.0, 100_000.0, 500_000.0)
MAX_SCORES = 20_000  # of all places together: a page stays small enough to be sent by mail


class Hands(NamedTuple):
    """The hands of all pairs, (D/2,) each: `wavelengths` in tokens; what each of them adds to the score, `parts`."""

    wavelengths: Tensor
    parts: Tensor


def hands(query: int, key: int, *, head_dim: int, theta: float) -> Hands:
    """What rotary positions make of a query and a key at two positions, where in each pair both are (1, 0)."""
    frequency = frequencies(_heads(head_dim, theta))
    x = torch.tensor([1.0, 0.0]).repeat(1, 1, 1, head_dim // 2)  # (B, T, H, D), 1 of each
    turned = [rotate(x, rotation(frequency, torch.tensor([position]))) for position in (query, key)]
    return Hands(2 * math.pi / frequency, (turned[0] * turned[1]).flatten().unflatten(0, (-1, 2)).sum(-1))


def soften(scores: Tensor, *, temperature: float, head_dim: int = 1) -> tuple[Tensor, float]:
    """Scores (T,), divided by the root of head_dim and by the temperature, to shares (T,) and their entropy in nats."""
    shares = (scores / math.sqrt(head_dim) / temperature).softmax(-1)
    return shares, float(torch.special.entr(shares).sum())


class Narrowed(NamedTuple):
    """Probabilities (V,): `said` by the model at this temperature, and those `left` to draw from after the filters."""

    said: Tensor
    left: Tensor


def narrow(scores: Tensor, sampling: Sampling) -> Narrowed:
    """What temperature, top-k, top-p and min-p leave of scores (V,)."""
    heated = Sampling(temperature=sampling.temperature)
    return Narrowed(*(shape.probabilities(scores[None])[0] for shape in (heated, sampling)))


def rotary_laboratory(
    *, head_dim: int = 16, theta: float = 10_000.0, query: int = 26, key: int = 6, pair: int = 2
) -> Any:
    """The hands of rotary positions: the value of a cell, in which both positions, both together and theta can be
    moved. Each of the head_dim/2 pairs of query and key is (1, 0) before it is turned.

    query, key: positions at first, 0 to 100. pair: the one shown large at first.
    Raises ValueError for a head_dim or theta that no model has, and for a position or a pair that is not there.
    """
    _heads(head_dim, theta)
    for name, value, last in (("query", query, 100), ("key", key, 100), ("pair", pair, head_dim // 2 - 1)):
        if not 0 <= value <= last:
            raise ValueError(f"{name} is {value}, expected a whole number from 0 to {last}.")
    given = {"headDim": head_dim, "theta": theta, "thetas": THETAS, "query": query, "key": key, "pair": pair}
    return _widget("rotary", given)


def softmax_laboratory(words: Sequence[str], rows: Mapping[str, Tensor], *, head_dim: int, first: str = "") -> Any:
    """Softmax on scores of attention: the value of a cell, in which the temperature can be moved, the division by the
    root of head_dim left out, and another row chosen.

    words: T pieces of a text. rows: by name, the products of the last word's query with all keys, (T,) each, not yet
    divided. first: the name of the row shown at first; "" is the first of them.
    Raises ValueError for rows that are not finite or do not fit the words, for a name that is not there, and for a
    head_dim below 1.
    """
    if head_dim < 1:
        raise ValueError(f"head_dim is {head_dim}, expected a whole number from 1.")
    for name, row in rows.items():
        _check_scores(f"the row {name!r}", row, len(words))
    if not rows or first and first not in rows:
        raise ValueError(f"there is no row {first!r} to show, expected one of {list(rows)!r:.80}.")
    given = {"words": list(words), "headDim": head_dim, "first": first or next(iter(rows))}
    return _widget("softmax", {**given, "rows": {name: _numbers(row) for name, row in rows.items()}})


def sampling_laboratory(
    words: Sequence[str],
    places: Mapping[str, Tensor],
    *,
    right: Mapping[str, Collection[int]] | None = None,
    start: Sampling | None = None,
) -> Any:
    """What temperature, top-k, top-p and min-p leave to draw from: the value of a cell, in which each can be moved and
    words be drawn.

    words: the V pieces of a vocabulary. places: by name, a model's scores (V,) for the next token.
    right: by name, the ids of the words that are right at a place; they are marked. start: where the dials stand first.
    Raises ValueError for scores that are not finite, do not fit the words or are too many for a page, for ids that are
    not in the vocabulary, for a place that is not there, and for a temperature of 0, where nothing is drawn.
    """
    start, right = start or Sampling(), right or {}
    if other := [name for name in right if name not in places]:
        raise ValueError(f"right names {other[0]!r}, expected a place of {list(places)!r:.80}.")
    for name, scores in places.items():
        _check_scores(f"the place {name!r}", scores, len(words))
        if not all(0 <= i < len(words) for i in right.get(name, ())):
            raise ValueError(f"right at {name!r} has ids outside of the vocabulary, expected 0 to {len(words) - 1}.")
    if not 1 <= len(places) * len(words) <= MAX_SCORES:
        raise ValueError(
            f"{len(places)} places have {len(places) * len(words)} scores together, expected 1 to {MAX_SCORES}: "
            "a page must stay small."
        )
    if start.temperature == 0:
        raise ValueError("the temperature is 0, expected a number above 0: at 0 nothing is drawn.")
    dials = {"temperature": start.temperature, "topP": start.top_p, "minP": start.min_p}
    given = {"words": list(words), "start": {**dials, "topK": min(start.top_k or len(words), len(words))}}
    given["places"] = {name: _numbers(scores) for name, scores in places.items()}
    return _widget("sampling", {**given, "right": {name: sorted(ids) for name, ids in right.items()}})


def _heads(head_dim: int, theta: float) -> ModelConfig:
    return ModelConfig(dim=head_dim, n_layers=1, n_heads=1, vocab_size=1, max_seq_len=1, rope_theta=theta)


def _check_scores(name: str, scores: Tensor, count: int) -> None:
    if scores.shape != (count,) or not scores.isfinite().all():
        raise ValueError(
            f"{name} has scores of shape {tuple(scores.shape)}, {int(scores.isfinite().sum())} of them finite, "
            f"expected ({count},), one finite number for each word."
        )


def _numbers(scores: Tensor) -> list[float]:
    """As many digits as fp32 has: more would only make the page larger."""
    return [float(f"{score:.9g}") for score in scores.tolist()]


def _widget(kind: str, given: dict[str, Any]) -> Any:
    return _kind()(kind=kind, given=given)


@cache
def _kind() -> Any:
    """The widget's class, made when it is first used: the package works without notebooks."""
    import anywidget
    import traitlets

    class LaboratoryWidget(anywidget.AnyWidget):
        _esm, _css = sources("laboratory")
        kind = traitlets.Unicode().tag(sync=True)
        given = traitlets.Dict().tag(sync=True)

        def __repr__(self) -> str:  # what a saved page says in its place
            return "Run this cell to turn the dials."

    return LaboratoryWidget
