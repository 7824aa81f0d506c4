"""Exercises of chapter 16, scaling up."""

import functools
import math
import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minillama import world
from minillama.checkpoint import load
from minillama.course.exercise import Exercise, Experiment, Task, Wrong


def _then(answer: Callable[..., Any], change: Callable[..., Any]) -> Callable[..., Any]:
    """An answer of several parts, with something done to them."""
    return lambda *arguments: change(*answer(*arguments))


def _up(whole: int, parts: int) -> int:
    return -(-whole // parts)


# 16.1 ----------------------------------------------------------------------------------------------------------------

_Reduced = tuple[list[Tensor], list[Tensor], list[int]]


def _ring_cases(rng: torch.Generator) -> Iterable[tuple[Any, ...]]:
    def ranks(size: int, counts: list[int], scale: float = 1.0) -> tuple[list[Tensor], list[int]]:
        return [scale * count * torch.randn(size, generator=rng) for count in counts], counts

    yield ranks(14, [5, 12, 3, 40])
    yield ranks(7, [9, 2, 31], 1e4)
    sums, counts = ranks(11, [7, 4, 7, 20, 3], 1e-3)
    yield [one.bfloat16() for one in sums], counts
    yield [(30_000 + 9000 * torch.rand(9, generator=rng)).half() for _ in range(4)], [600, 250, 410, 90]
    sums, counts = ranks(10, [6, 0, 17])  # a rank with nothing to score
    yield sums, counts
    yield ranks(3, [8, 1, 5, 4, 2])  # more ranks than numbers
    yield ranks(13, [3, 25])
    yield ranks(6, [11])
    yield [torch.zeros(5), torch.zeros(5), torch.zeros(5)], [0, 0, 0]


def _even(total: Tensor, ranks: int) -> list[Tensor]:
    return list(total.tensor_split(ranks))


def _all_but(sizes: list[int], rank: int, left: tuple[int, ...] = (1, 2)) -> int:
    """What a rank sends: in each half of the ring all chunks but one, counted from its own number."""
    return sum(sum(sizes) - sizes[(rank + one) % len(sizes)] for one in left)


def _by_total(total: Tensor, counts: list[int]) -> Tensor:
    return total / max(sum(counts), 1)


def _reduced(sums: list[Tensor], counts: list[int], *,
             weigh: Callable[[Tensor, int, list[int]], Tensor] = lambda one, count, counts: one,
             add: Callable[[list[Tensor]], Tensor] = lambda parts: torch.stack(parts).sum(dim=0),
             mean: Callable[[Tensor, list[int]], Tensor] = _by_total, narrow: bool = False,
             cut: Callable[[Tensor, int], list[Tensor]] = _even, first: int = 1,
             halfway: Callable[[Tensor, list[int]], Tensor] = lambda chunk, counts: chunk,
             sent: Callable[[list[int], int], Any] = _all_but) -> _Reduced:  # fmt: skip
    ranks = len(sums)
    weighed = [weigh(one if narrow else one.float(), count, counts) for one, count in zip(sums, counts, strict=True)]
    total = add(weighed).float()
    chunks = cut(total, ranks)
    sizes = [len(chunk) for chunk in chunks]
    return (
        [halfway(chunks[(rank + first) % ranks], counts).clone() for rank in range(ranks)],
        [mean(total, counts).clone() for _ in range(ranks)],
        [sent(sizes, rank) if ranks > 1 else 0 for rank in range(ranks)],
    )


def _reduced_as(**options: Any) -> Callable[..., _Reduced]:
    return lambda sums, counts: _reduced(sums, counts, **options)


def _remainder_last(total: Tensor, ranks: int) -> list[Tensor]:
    size = len(total) // ranks
    return [total[i * size : (i + 1) * size if i < ranks - 1 else None] for i in range(ranks)]


def _rounded_up(total: Tensor, ranks: int) -> list[Tensor]:
    size = _up(len(total), ranks)
    return [total[i * size : (i + 1) * size] for i in range(ranks)]


def _chunk_cut(total: Tensor, ranks: int) -> list[Tensor]:
    """As torch.chunk cuts: sometimes fewer pieces than ranks, which is found out on the way round."""
    chunks = list(total.chunk(ranks))
    if len(chunks) < ranks:
        raise IndexError("list index out of range")
    return chunks


def _around(parts: list[Tensor]) -> Tensor:
    """Each chunk added up in the order in which the ring does it."""
    ranks = len(parts)
    rows = [part.tensor_split(ranks) for part in parts]
    return torch.cat(
        [functools.reduce(torch.add, [rows[(c + i) % ranks][c] for i in range(ranks)]) for c in range(ranks)]
    )


def _remainder_lost(sums: list[Tensor], counts: list[int]) -> _Reduced:
    """The numbers behind the last whole chunk stay what they are on each rank."""
    size = len(sums[0]) // len(sums)
    _, results, _ = _reduced(sums, counts)
    for one, result in zip(sums, results, strict=True):
        result[size * len(sums) :] = _by_total(one[size * len(sums) :].float(), counts)
    return _reduced(sums, counts, cut=lambda total, ranks: list(total[: size * ranks].split(size)) if size else [
        total[:0]] * ranks)[0], results, [2 * size * (len(sums) - 1)] * len(sums)  # fmt: skip


def _short(sums: list[Tensor], counts: list[int]) -> _Reduced:
    """One step too few in the first half: the chunk that a rank takes for whole lacks one rank's numbers."""
    ranks = len(sums)
    if ranks == 1:
        return _reduced(sums, counts)
    rows = [one.float().tensor_split(ranks) for one in sums]
    total = torch.stack([one.float() for one in sums]).sum(dim=0).tensor_split(ranks)
    # chunk c has passed the ranks c, c + 1, …, and c - 2 is the last one
    chunks = [total[c] - rows[(c - 1) % ranks][c] for c in range(ranks)]
    sizes = [len(chunk) for chunk in chunks]
    mean = _by_total(torch.cat(chunks), counts)
    return (
        [chunks[(rank + 2) % ranks].clone() for rank in range(ranks)],
        [mean.clone() for _ in range(ranks)],
        [_all_but(sizes, rank) - sizes[(rank + 2) % ranks] for rank in range(ranks)],
    )


def _own_at_end(kept: Callable[[int, int], list[int]]) -> Callable[..., _Reduced]:
    """Chunks that never come back whole from the other ranks: there each rank has what it had halfway."""

    def answer(sums: list[Tensor], counts: list[int]) -> _Reduced:
        ranks = len(sums)
        halfway, results, sent = _reduced(sums, counts)
        for rank, result in enumerate(results):
            parts = result.tensor_split(ranks)
            for chunk in kept(rank, ranks):
                # on its way from rank `chunk`, the chunk had been through all ranks up to this one
                passed = [(chunk + i) % ranks for i in range((rank - chunk) % ranks + 1)]
                part = torch.stack([sums[other].float() for other in passed]).sum(dim=0).tensor_split(ranks)[chunk]
                parts[chunk].copy_(_by_total(part, counts))
        return halfway, results, sent

    return answer


def _added_at_end(sums: list[Tensor], counts: list[int]) -> _Reduced:
    """The second half adds what arrives to what was there."""
    ranks = len(sums)
    halfway, results, sent = _reduced(sums, counts)
    held = []
    for rank in range(ranks):
        chunks = []
        for chunk in range(ranks):
            passed = [(chunk + i) % ranks for i in range((rank - chunk) % ranks + 1)]
            chunks.append(torch.stack([sums[o].float() for o in passed]).sum(dim=0).tensor_split(ranks)[chunk].clone())
        held.append(chunks)
    for step in range(ranks - 1):
        moved = [held[rank][(rank + 1 - step) % ranks].clone() for rank in range(ranks)]
        for rank in range(ranks):
            held[(rank + 1) % ranks][(rank + 1 - step) % ranks] += moved[rank]
    return halfway, [_by_total(torch.cat(chunks), counts) for chunks in held], sent


def _round_once_more(sums: list[Tensor], counts: list[int]) -> _Reduced:
    """n steps in each half: more is sent, and a rank that is alone adds its numbers to themselves."""
    halfway, results, _ = _reduced(sums, counts)
    sent = [2 * len(sums[0])] * len(sums)
    return (halfway, results, sent) if len(sums) > 1 else ([2 * halfway[0]], [2 * results[0]], sent)


def _own_piece(sums: list[Tensor], counts: list[int]) -> _Reduced:
    """Halfway, each rank shows the piece of its own number, which it has sent first and nobody has added to."""
    _, results, sent = _reduced(sums, counts)
    return [one.float().tensor_split(len(sums))[rank].clone() for rank, one in enumerate(sums)], results, sent


def _own_count(sums: list[Tensor], counts: list[int]) -> _Reduced:
    halfway, results, sent = _reduced(sums, counts)
    return halfway, [sum(counts) * result / count if count else torch.zeros_like(result)
                     for result, count in zip(results, counts, strict=True)], sent  # fmt: skip


def _in_place(sums: list[Tensor], counts: list[int]) -> _Reduced:
    halfway, results, sent = _reduced(sums, counts)
    for one, result in zip(sums, results, strict=True):
        one.copy_(result)
    return halfway, results, sent


def _backwards(sums: list[Tensor], counts: list[int]) -> _Reduced:
    """The ring in the other direction."""
    ranks = len(sums)
    _, results, _ = _reduced(sums, counts)
    chunks = torch.stack([one.float() for one in sums]).sum(dim=0).tensor_split(ranks)
    sizes = [len(chunk) for chunk in chunks]
    sent = [_all_but(sizes, rank, (-1, -2)) if ranks > 1 else 0 for rank in range(ranks)]
    return [chunks[(rank - 1) % ranks].clone() for rank in range(ranks)], results, sent


RING = Exercise(
    "16.1", "all-reduce mean", "all_reduce_mean", minutes=15, difficulty=2,
    why="Data parallel training is one line, this one: if its mean is wrong, all cards agree on a wrong step.",
    reference=_reduced,
    cases=_ring_cases,
    wrong=(
        Wrong("the sums are divided by the number of ranks: a rank with more scored tokens has a larger sum already, "
              "and what is wanted is the mean over tokens.",
              _reduced_as(mean=lambda total, counts: total / len(counts))),
        Wrong("the results are sums: they are not divided by the scored tokens.",
              _reduced_as(mean=lambda total, counts: total)),
        Wrong("this is the mean of the ranks' means: a token on a rank with few of them would weigh more than one on a "
              "rank with many.",
              _reduced_as(mean=lambda total, counts: total / len(counts),
                          weigh=lambda one, count, counts: one / max(count, 1))),
        Wrong("this is the mean of the ranks' means, and the pieces of the first half are already made of means: a "
              "token on a rank with few of them would weigh more than one on a rank with many.",
              _reduced_as(mean=lambda total, counts: total, weigh=lambda one, count, counts: one / max(count, 1)
                          / len(counts))),
        Wrong("the ranks' means are added up: as many ranks, as many times too large a step.",
              _reduced_as(mean=lambda total, counts: total, weigh=lambda one, count, counts: one / max(count, 1))),
        Wrong("the sums are weighed by their rank's share of the tokens: that is right for means; a sum of more tokens "
              "weighs more by itself.",
              _reduced_as(mean=lambda total, counts: total,
                          weigh=lambda one, count, counts: one * count / max(sum(counts), 1))),
        Wrong("each rank divides the sum of all by its own count: the sum is over the tokens of all ranks, so all "
              "divide by all of these.", _own_count),
        Wrong("it is divided twice, before the ring and behind it.",
              _reduced_as(weigh=lambda one, count, counts: one / max(sum(counts), 1))),
        Wrong("halfway, the pieces are divided already: there they are sums, of what the ranks were given.",
              _reduced_as(halfway=_by_total)),
        Wrong("this is the mean of the means of those ranks that have scored any token: a rank weighs by its tokens.",
              _reduced_as(mean=lambda total, counts: total / max(sum(count > 0 for count in counts), 1),
                          weigh=lambda one, count, counts: one / max(count, 1))),
        Wrong("a rank without scored tokens is counted as one token: all counts together are at least 1, a single one "
              "may be 0.", _reduced_as(mean=lambda total, counts: total / sum(max(count, 1) for count in counts))),
        Wrong("without any scored token this is 0 by 0: there the mean is 0.",
              _reduced_as(mean=lambda total, counts: total / sum(counts) if sum(counts) else total / 0.0)),
        Wrong("the first half has one step too few: each piece lacks the numbers of one rank.", _short),
        Wrong("the last rank is left out of the sum: a ring has as many ranks as there are tensors.",
              _reduced_as(add=lambda parts: torch.stack(parts[:-1] if len(parts) > 1 else parts).sum(dim=0))),
        Wrong("the second half is missing: each rank has one piece that is whole, and parts of sums elsewhere.",
              _own_at_end(lambda rank, ranks: [c for c in range(ranks) if c != (rank + 1) % ranks])),
        Wrong("the second half has one step too few: each rank lacks one whole piece.",
              _own_at_end(lambda rank, ranks: [(rank + 2) % ranks] if ranks > 1 else [])),
        Wrong("in the second half, what arrives is added to what was there: a whole piece takes the place of a part.",
              _added_at_end),
        Wrong("the tensors that were given are changed: a rank's gradient is needed as it was; work on copies.",
              _in_place),
        Wrong("it is added up in the dtype of the inputs: bf16 loses what is small, fp16 goes to infinity; expected "
              "fp32.", _reduced_as(narrow=True)),
        Wrong("each step of the ring adds in the dtype of the inputs and rounds: bf16 loses what is small, fp16 goes "
              "to infinity; expected fp32 from the first step on.", _reduced_as(narrow=True, add=_around)),
        Wrong("the numbers behind the last whole piece never go round the ring: the first pieces have one number more "
              "each.", _remainder_lost),
        Wrong("the last piece takes all that is left over: the first pieces have one number more each.",
              _reduced_as(cut=_remainder_last)),
        Wrong("all pieces are as large as the largest, until nothing is left: the first ones have one number more, "
              "and the others one less.", _reduced_as(cut=lambda total, ranks: _rounded_up(total, ranks))),
        Wrong("the pieces are cut as `chunk` does it: all as large as the first, until nothing is left, and then there "
              "may be fewer than ranks; expected one for each rank, and one number more in the first N mod n.",
              _reduced_as(cut=_chunk_cut)),
        Wrong("halfway, rank r shows the piece r, which it has sent in the first step: nobody has added to that one "
              "here; another is whole.", _own_piece),
        Wrong("halfway, rank r is said to have the piece r: each piece begins at the rank of its own number, so it is "
              "whole where it arrives last.", _reduced_as(first=0)),
        Wrong("the ring runs the other way round: rank r sends to r + 1.", _backwards),
        Wrong("only the first half's sending is counted.",
              _reduced_as(sent=lambda sizes, rank: _all_but(sizes, rank, (1,)))),
        Wrong("what is sent is counted in bytes: expected numbers.",
              _reduced_as(sent=lambda sizes, rank: 4 * _all_but(sizes, rank))),
        Wrong("each rank is taken to send its whole tensor to all others: in a ring a rank sends pieces, to its "
              "neighbour.", _reduced_as(sent=lambda sizes, rank: sum(sizes) * (len(sizes) - 1))),
        Wrong("each rank is taken to send 2(n − 1) of the largest pieces: they are not all of one size.",
              _reduced_as(sent=lambda sizes, rank: 2 * (len(sizes) - 1) * max(sizes))),
        Wrong("what is sent is the mean over the ranks: the pieces are not all of one size, so some send more than "
              "others.", _reduced_as(sent=lambda sizes, rank: 2 * sum(sizes) * (len(sizes) - 1) / len(sizes))),
        Wrong("the same piece is left out in both halves when what was sent is counted: in the second half a rank "
              "begins with the piece that it has just made whole.",
              _reduced_as(sent=lambda sizes, rank: _all_but(sizes, rank, (1, 1)))),
        Wrong("n steps are counted in each half: after n − 1 every piece is where it should be.",
              _reduced_as(sent=lambda sizes, rank: 2 * sum(sizes))),
        Wrong("each half has n steps: after n − 1 every piece is where it should be, and a rank that is alone would "
              "add its numbers to themselves.", _round_once_more),
    ),
    hints=(
        "Three ranks stand in a ring. Rank 0 sends its piece 0 to rank 1. What does rank 1 have to do with it before "
        "it sends it on, and which rank is the last to add its own?",
        "In step s of the first half rank r sends piece r − s, counted round, and its neighbour adds it. In the second "
        "half it sends r + 1 − s, and the neighbour replaces its own.",
        "copies in fp32, each cut into n · n − 1 steps: first take what each rank sends, then let each neighbour add · "
        "keep the piece r + 1 of rank r · n − 1 steps that replace · divide by all tokens, at least 1 · count the "
        "numbers at each sending.",
    ),
)  # fmt: skip


# 16.2 ----------------------------------------------------------------------------------------------------------------

_Shapes = Sequence[tuple[int, ...]]
_Bytes = dict[str, int]
_PARTS = ("weights", "gradients", "moments", "master")
_SIZES = {"fp32": (4, 4, 8, 0), "bf16": (2, 2, 8, 4)}
_FROM = (3, 2, 1, 1)  # the stage from which on a part is divided


def _adam_cases(rng: torch.Generator) -> Iterable[tuple[Any, ...]]:
    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=rng))

    def odd(low: int, high: int, ranks: int) -> int:
        """A number that the ranks cannot share evenly."""
        return number(low, high) * ranks + number(1, ranks)

    def block(dim: int, wide: int) -> list[tuple[int, ...]]:
        return [(dim,), (dim + 4, dim), (3, dim), (dim, dim + 4), (wide, dim), (dim, wide)]

    for stage in range(4):
        ranks = number(4, 8)
        shapes = block(odd(3, 9, ranks), odd(9, 15, ranks))
        yield shapes, ranks, stage, "bf16"
        yield shapes, ranks, stage, "fp32"
    yield [(3,), (2, 50), (1, 7)], 8, 3, "bf16"  # fewer rows than ranks
    yield [(number(3, 9), 5), (number(3, 9),)], 1, 2, "bf16"
    yield [(number(2, 5), 3, odd(2, 5, 4)), (odd(2, 5, 4),)], 4, 3, "fp32"
    yield [(32_003, 8192), (8192,), (22_016, 8191)], 2048, 3, "bf16"


def _rows(shape: tuple[int, ...], ranks: int) -> int:
    return _up(shape[0], ranks) * math.prod(shape[1:])


def _adam(shapes: _Shapes, ranks: int, stage: int, precision: str, *,
          sizes: dict[str, Sequence[int]] | None = None, begins: Sequence[int] = _FROM,
          share: Callable[[tuple[int, ...], int], Any] = _rows,
          whole: Callable[[_Shapes, int], Any] | None = None) -> _Bytes:  # fmt: skip
    kinds = {**_SIZES, **(sizes or {})}[precision]
    divided = whole(shapes, ranks) if whole else sum(share(shape, ranks) for shape in shapes)
    alone = sum(math.prod(shape) for shape in shapes)
    return {
        part: size * (divided if stage >= begin else alone)
        for part, size, begin in zip(_PARTS, kinds, begins, strict=True)
    }


def _adam_as(**options: Any) -> Callable[..., _Bytes]:
    return lambda *arguments: _adam(*arguments, **options)


def _both(fp32: Sequence[int], bf16: Sequence[int]) -> Callable[..., _Bytes]:
    return _adam_as(sizes={"fp32": fp32, "bf16": bf16})


def _half_up(shape: tuple[int, ...], ranks: int) -> int:
    return int(shape[0] / ranks + 0.5) * math.prod(shape[1:])


def _times(factor: Callable[[int, int], float]) -> Callable[..., _Bytes]:
    def answer(shapes: _Shapes, ranks: int, stage: int, precision: str) -> _Bytes:
        found = _adam(shapes, ranks, stage, precision)
        return {part: int(size * factor(ranks, stage)) for part, size in found.items()}

    return answer


def _kept(shapes: _Shapes) -> _Shapes:
    return [shape for shape in shapes if len(shape) > 1]


ADAM = Exercise(
    "16.2", "sharded Adam's memory", "adam_bytes", minutes=15, difficulty=3,
    why="Whether a model can be trained on the cards at hand is decided by four numbers, and three of them are not its "
        "weights.",
    reference=_adam,
    cases=_adam_cases,
    wrong=(
        Wrong("gradients take nothing: each weight has one, in the weights' precision.",
              _both((4, 0, 8, 0), (2, 0, 8, 4))),
        Wrong("the moments are one number per weight: Adam keeps two means, of the gradients and of their squares.",
              _both((4, 4, 4, 0), (2, 2, 4, 4))),
        Wrong("the moments are kept in bf16: there a mean that changes by a thousandth would not change at all; they "
              "are in fp32.", _both((4, 4, 8, 0), (2, 2, 4, 4))),
        Wrong("the master copy is left out: weights in bf16 lose small steps, so one more copy is kept in fp32.",
              _both((4, 4, 8, 0), (2, 2, 8, 0))),
        Wrong("there is a master copy in fp32, too: there the weights themselves are exact enough.",
              _both((4, 4, 8, 4), (2, 2, 8, 4))),
        Wrong("the master copy is in bf16, as the weights are: it is there to be more exact than they.",
              _both((4, 4, 8, 0), (2, 2, 8, 2))),
        Wrong("gradients are kept in fp32 where the weights are in bf16: here they have the weights' precision.",
              _both((4, 4, 8, 0), (2, 4, 8, 4))),
        Wrong("the weights are in fp32 and so is their master copy: in bf16 a weight takes 2 bytes.",
              _both((4, 4, 8, 0), (4, 2, 8, 4))),
        Wrong("the precision makes no difference: in bf16 weights and gradients take half, and a master copy is added.",
              _both((4, 4, 8, 0), (4, 4, 8, 0))),
        Wrong("it counts bits, expected bytes.", _times(lambda ranks, stage: 8)),
        Wrong("it counts numbers, expected bytes.", _both((1, 1, 2, 0), (1, 1, 2, 1))),
        Wrong("it is for all ranks together, expected for one.", _times(lambda ranks, stage: ranks)),
        Wrong("stage 0 divides the moments already: it is plain data parallel, where each rank has everything.",
              _adam_as(begins=(3, 2, 0, 0))),
        Wrong("gradients are divided from stage 1 on: that stage divides what the optimizer keeps, and stage 2 the "
              "gradients.", _adam_as(begins=(3, 1, 1, 1))),
        Wrong("the weights are divided at stage 2, too: only stage 3 does that.", _adam_as(begins=(2, 2, 1, 1))),
        Wrong("stage 1 divides the weights, and stage 3 the moments: it is the other way round.",
              _adam_as(begins=(1, 2, 3, 3))),
        Wrong("all stages but 0 divide everything: each divides one thing more.", _adam_as(begins=(1, 1, 1, 1))),
        Wrong("each stage divides only its own part: a stage does what those below it do, and one thing more.",
              lambda shapes, ranks, stage, precision: _adam(
                  shapes, ranks, stage, precision,
                  begins=[begin if begin == stage else 4 for begin in _FROM])),
        Wrong("each stage divides what the one above it should: the stages count from 0, which divides nothing.",
              _adam_as(begins=(2, 1, 0, 0))),
        Wrong("each stage divides what the one below it should: stage 1 divides the moments and the master copy.",
              _adam_as(begins=(4, 3, 2, 2))),
        Wrong("the master copy is never divided: it belongs to what the optimizer keeps.",
              _adam_as(begins=(3, 2, 1, 4))),
        Wrong("the master copy is divided when the weights are: it belongs to what the optimizer keeps, which is "
              "divided from stage 1 on.", _adam_as(begins=(3, 2, 1, 3))),
        Wrong("gradients are divided at stage 3 only: that is stage 2.", _adam_as(begins=(3, 3, 1, 1))),
        Wrong("gradients are never divided.", _adam_as(begins=(3, 4, 1, 1))),
        Wrong("weights are never divided.", _adam_as(begins=(4, 2, 1, 1))),
        Wrong("the rows are rounded down: then some rows would belong to nobody.",
              _adam_as(share=lambda shape, ranks: shape[0] // ranks * math.prod(shape[1:]))),
        Wrong("the rows are rounded to the nearest number: then some rows could belong to nobody.",
              _adam_as(share=_half_up)),
        Wrong("a share is not a whole number of rows: a rank has whole rows, and the first ranks have one more.",
              _adam_as(share=lambda shape, ranks: math.prod(shape) / ranks)),
        Wrong("all parameters are laid in one row and that is cut: here each parameter is cut for itself, into whole "
              "rows.", _adam_as(whole=lambda shapes, ranks: _up(sum(math.prod(shape) for shape in shapes), ranks))),
        Wrong("each parameter is cut into single numbers: it is cut into whole rows.",
              _adam_as(share=lambda shape, ranks: _up(math.prod(shape), ranks))),
        Wrong("every parameter has one row more than it takes: rows that come out even need none.",
              _adam_as(share=lambda shape, ranks: (shape[0] // ranks + 1) * math.prod(shape[1:]))),
        Wrong("it is for the last rank, which may have fewer rows than the first one.",
              _adam_as(share=lambda shape, ranks: max(shape[0] - (ranks - 1) * _up(shape[0], ranks), 0)
                       * math.prod(shape[1:]))),
        Wrong("the longest axis is cut, expected the first one.",
              _adam_as(share=lambda shape, ranks: _up(max(shape), ranks) * (math.prod(shape) // max(shape)))),
        Wrong("the last axis is cut, expected the first one.",
              _adam_as(share=lambda shape, ranks: _up(shape[-1], ranks) * math.prod(shape[:-1]))),
        Wrong("parameters with one axis, such as a norm's, are left out.",
              lambda shapes, *rest: _adam(_kept(shapes), *rest)),
        Wrong("parameters with one axis, such as a norm's, are not divided: they are cut like the others.",
              _adam_as(share=lambda shape, ranks: _rows(shape, ranks) if len(shape) > 1 else shape[0])),
        Wrong("parameters with fewer rows than there are ranks are left whole: rank 0 has one row of them.",
              _adam_as(share=lambda shape, ranks: _rows(shape, ranks) if shape[0] >= ranks else math.prod(shape))),
    ),
    hints=(
        "A matrix with 10 rows is shared among 4 ranks, as evenly as rows allow. How many has the rank that has most?",
        "Count numbers first: how many of each parameter a rank holds if it is divided, and if not. Then ask for each "
        "of the four parts whether this stage divides it, and how many bytes one number takes.",
        "two sums over the shapes: all numbers, and rows rounded up times the rest of the shape · a table of bytes for "
        "each precision · weights from stage 3 on, gradients from 2, the two others from 1.",
    ),
    tolerance=0.0,
)  # fmt: skip


# 16.3 ----------------------------------------------------------------------------------------------------------------

_Layers = tuple[list[Tensor], list[Tensor], Tensor]


def _layer_cases(rng: torch.Generator) -> Iterable[tuple[Any, ...]]:
    def layers(lead: tuple[int, ...], dim: int, out: int, widths: list[int], scale: float = 1.0) -> tuple[Any, ...]:
        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=rng)

        wide = sum(widths)
        return (scale * normal(*lead, dim), normal(wide, dim), normal(wide), normal(out, wide), normal(out), widths)

    yield layers((2, 5), 7, 6, [4, 2, 6])
    yield layers((3,), 12, 12, [3, 3, 6])
    yield layers((2, 1, 3), 5, 8, [1, 4, 2, 5], 30.0)
    yield layers((4,), 6, 6, [2, 2, 2])
    yield layers((), 9, 4, [5, 3])
    yield layers((2, 3), 4, 5, [3, 0, 2])  # a rank without columns
    yield layers((1, 2), 3, 2, [7])
    x, up, up_bias, down, _, widths = layers((3, 2), 8, 10, [6, 4, 2])
    yield x, up, up_bias, down, None, widths
    yield layers((0,), 4, 3, [2, 3])


def _bounds(widths: list[int]) -> list[tuple[int, int]]:
    return [(sum(widths[:i]), sum(widths[: i + 1])) for i in range(len(widths))]


def _first_rows(widths: list[int]) -> list[tuple[int, int]]:
    return [(0, width) for width in widths]


def _strided(widths: list[int]) -> list[tuple[int, int]]:
    """Each rank begins at its number times its own width, maybe behind the end."""
    return [(i * width, i * width + width) for i, width in enumerate(widths)]


def _alike(widths: list[int]) -> list[tuple[int, int]]:
    size, left = divmod(sum(widths), len(widths))
    return _bounds([size + (i < left) for i in range(len(widths))])


def _split(x: Tensor, up: Tensor, up_bias: Tensor, down: Tensor, down_bias: Tensor | None, widths: list[int], *,
           bounds: Callable[[list[int]], list[tuple[int, int]]] = _bounds,
           bias_bounds: Callable[[list[int]], list[tuple[int, int]]] | None = None,
           hide: Callable[[Tensor, Tensor, Tensor], Tensor] = lambda x, w, b: F.silu(x @ w.T + b),
           down_bounds: Callable[[list[int]], list[tuple[int, int]]] | None = None,
           each: Callable[[Tensor, Tensor, int, int], Tensor] = lambda part, bias, rank, ranks: part,
           reduce: Callable[[list[Tensor]], Tensor] = lambda parts: torch.stack(parts).sum(dim=0),
           last: Callable[[Tensor, Tensor], Tensor] = lambda y, bias: y + bias) -> _Layers:  # fmt: skip
    bias = torch.zeros(len(down)) if down_bias is None else down_bias
    places = zip(bounds(widths), (bias_bounds or bounds)(widths), (down_bounds or bounds)(widths), strict=True)
    hidden, parts = [], []
    for rank, ((start, end), (low, high), (left, right)) in enumerate(places):
        hidden.append(hide(x, up[start:end], up_bias[low:high]))
        parts.append(each(hidden[-1] @ down[:, left:right].T, bias, rank, len(widths)))
    return hidden, parts, last(reduce(parts), bias)


def _split_as(**options: Any) -> Callable[..., _Layers]:
    return lambda *arguments: _split(*arguments, **options)


def _gathered(x: Tensor, up: Tensor, up_bias: Tensor, down: Tensor, bias: Tensor | None, widths: list[int]) -> _Layers:
    """The hidden vector is made whole on every rank before the second layer."""
    hidden, parts, y = _split(x, up, up_bias, down, bias, widths)
    return [torch.cat(hidden, dim=-1) for _ in widths], parts, y


def _by_outputs(x: Tensor, up: Tensor, up_bias: Tensor, down: Tensor, bias: Tensor | None,
                widths: list[int]) -> _Layers:  # fmt: skip
    """The second layer by columns, too: each rank makes some of the outputs."""
    hidden, _, y = _split(x, up, up_bias, down, bias, widths)
    whole = torch.cat(hidden, dim=-1)
    return hidden, [whole @ rows.T for rows in down.tensor_split(len(widths))], y


def _by_inputs(x: Tensor, up: Tensor, up_bias: Tensor, down: Tensor, bias: Tensor | None,
               widths: list[int]) -> _Layers:  # fmt: skip
    """The first layer by rows: each rank sees some of the inputs, and the bend comes before the sum."""
    ranks = len(widths)
    parts = zip(x.tensor_split(ranks, dim=-1), up.tensor_split(ranks, dim=1), strict=True)
    hidden = [F.silu(one @ w.T + up_bias) for one, w in parts]
    made = [h @ down.T for h in hidden]
    y = torch.stack(made).sum(dim=0)
    return hidden, made, y if bias is None else y + bias


def _bent(x: Tensor, up: Tensor, up_bias: Tensor, down: Tensor, bias: Tensor | None, widths: list[int]) -> _Layers:
    """What is shown is what goes into SiLU."""
    _, parts, y = _split(x, up, up_bias, down, bias, widths)
    return _split(x, up, up_bias, down, bias, widths, hide=lambda x, w, b: x @ w.T + b)[0], parts, y


def _own_outputs(part: Tensor, bias: Tensor, rank: int, ranks: int) -> Tensor:
    """The second bias is shared out among the ranks."""
    mine = torch.arange(len(bias)).tensor_split(ranks)[rank]
    share = torch.zeros_like(bias)
    share[mine] = bias[mine]
    return part + share


def _turned(x: Tensor, up: Tensor, up_bias: Tensor, down: Tensor, bias: Tensor | None, widths: list[int]) -> _Layers:
    """The second layer's columns go to the ranks in the wrong order."""
    return _split(x, up, up_bias, down, bias, widths,
                  down_bounds=lambda widths: [(sum(widths) - end, sum(widths) - start)
                                              for start, end in _bounds(widths)])  # fmt: skip


def _twice(x: Tensor, up: Tensor, up_bias: Tensor, down: Tensor, bias: Tensor | None, widths: list[int]) -> _Layers:
    """An all-reduce behind the first layer, as if its parts were to be added."""
    hidden, parts, y = _split(x, up, up_bias, down, bias, widths)
    same = len({h.shape for h in hidden}) == 1
    if not same:
        raise RuntimeError("the parts have different widths")
    total = torch.stack(hidden).sum(dim=0)
    parts = [total @ down[:, start:end].T for start, end in _bounds(widths)]
    y = torch.stack(parts).sum(dim=0)
    return [total.clone() for _ in widths], parts, y if bias is None else y + bias


LAYERS = Exercise(
    "16.3", "column- and row-parallel layers", "parallel_layers", minutes=25, difficulty=4,
    why="Two layers can be spread over many cards with a single exchange, if the first is cut one way and the second "
        "the other way.",
    reference=_split,
    cases=_layer_cases,
    wrong=(
        Wrong("every rank adds the second bias, so the sum has it as often as there are ranks: it is added once, to "
              "the sum.", _split_as(each=lambda part, bias, rank, ranks: part + bias, last=lambda y, bias: y)),
        Wrong("every rank adds the second bias, and it is added to the sum once more.",
              _split_as(each=lambda part, bias, rank, ranks: part + bias)),
        Wrong("rank 0 adds the second bias: the sum is right, but the ranks' parts are asked for without it.",
              _split_as(each=lambda part, bias, rank, ranks: part + bias if rank == 0 else part,
                        last=lambda y, bias: y)),
        Wrong("every rank adds its share of the second bias, divided by the number of ranks: the sum is right, but the "
              "ranks' parts are asked for without it.",
              _split_as(each=lambda part, bias, rank, ranks: part + bias / ranks, last=lambda y, bias: y)),
        Wrong("every rank adds the second bias to its own share of the outputs: the sum is right, but the ranks' parts "
              "are asked for without it.", _split_as(each=_own_outputs, last=lambda y, bias: y)),
        Wrong("the second bias is missing: it belongs to the sum.", _split_as(last=lambda y, bias: y)),
        Wrong("the second bias is added to the sum as often as there are ranks: the parts come without, so it is added "
              "once.", lambda x, up, up_bias, down, bias, widths: _split(
                  x, up, up_bias, down, None if bias is None else bias * len(widths), widths)),
        Wrong("the first bias is missing: each rank adds its own part of it.",
              _split_as(hide=lambda x, w, b: F.silu(x @ w.T))),
        Wrong("each rank takes the beginning of the first bias: it is cut at the same places as its weight.",
              _split_as(bias_bounds=_first_rows)),
        Wrong("the first bias is divided by the number of ranks: its parts belong to different columns, so nothing of "
              "it is added twice.", lambda x, up, up_bias, down, bias, widths: _split(
                  x, up, up_bias / len(widths), down, bias, widths)),
        Wrong("the first bias is added behind SiLU: it belongs to the layer before it.",
              _split_as(hide=lambda x, w, b: F.silu(x @ w.T) + b)),
        Wrong("SiLU is missing between the layers.", _split_as(hide=lambda x, w, b: x @ w.T + b)),
        Wrong("what is given as hidden is from before SiLU: expected what the second layer gets.", _bent),
        Wrong("SiLU comes last, behind the sum: it stands between the layers.",
              _split_as(hide=lambda x, w, b: x @ w.T + b, last=lambda y, bias: F.silu(y + bias))),
        Wrong("the parts are averaged: each holds some terms of one long sum, so they are added.",
              _split_as(reduce=lambda parts: torch.stack(parts).mean(dim=0))),
        Wrong("the parts are put side by side: each has all outputs already, with some terms of their sums, so they "
              "are added.", lambda x, up, up_bias, down, bias, widths: _split(
                  x, up, up_bias, down, bias, widths, reduce=lambda parts: torch.cat(parts, dim=-1),
                  last=lambda y, bias: y + bias.repeat(len(widths)))),
        Wrong("the result is one rank's part, without those of the others.",
              _split_as(reduce=lambda parts: parts[0])),
        Wrong("the parts are what comes out of the all-reduce: asked for is what each rank puts into it.",
              _then(_split, lambda hidden, parts, y: (
                  hidden, [torch.stack(parts).sum(dim=0) for _ in parts], y))),
        Wrong("the parts are the result, with its bias: asked for is what each rank puts into the all-reduce.",
              _then(_split, lambda hidden, parts, y: (hidden, [y.clone() for _ in parts], y))),
        Wrong("rank 0's part has become the sum: the others were added to it in its own memory.",
              _then(_split, lambda hidden, parts, y: (
                  hidden, [torch.stack(parts).sum(dim=0), *parts[1:]], y))),
        Wrong("rank 0's part has become the result, with the second bias: all was added to it in its own memory.",
              _then(_split, lambda hidden, parts, y: (hidden, [y.clone(), *parts[1:]], y))),
        Wrong("the last rank's part is left out of the sum.",
              _split_as(reduce=lambda parts: torch.stack(parts[:-1] if len(parts) > 1 else parts).sum(dim=0))),
        Wrong("every rank gets the whole hidden vector: an exchange that is not needed, for the second layer uses just "
              "what the rank has made itself.", _gathered),
        Wrong("what is between the layers is added up over the ranks: its parts are different columns, and nothing is "
              "exchanged there.", _twice),
        Wrong("the second layer is cut by its outputs, which every rank would need the whole hidden vector for: cut it "
              "by its inputs, as the hidden vector is.", _by_outputs),
        Wrong("the first layer is cut by its inputs: then each rank has a part of every sum, and SiLU of parts is not "
              "the parts of SiLU.", _by_inputs),
        Wrong("all ranks get parts of equal width: `widths` says how wide each is.", _split_as(bounds=_alike)),
        Wrong("every rank takes the first rows of the weights: its part begins where the one before it ends.",
              _split_as(bounds=_first_rows)),
        Wrong("a rank's part is taken to begin at its number times its own width: where the widths differ, it begins "
              "behind the sum of those before it.", _split_as(bounds=_strided)),
        Wrong("the second layer's columns go to the ranks from the other end: those of a rank belong to what it has "
              "made itself.", _turned),
    ),
    hints=(
        "Rank 1 has made the hidden numbers 4 and 5. Which numbers of the second weight does it need to use them, and "
        "what is it still missing of the first output?",
        "A weight (out, in) cut along its first axis makes some outputs whole; cut along its second axis it makes "
        "all outputs, of some terms. The first can be bent by SiLU at once, the second has to be added up before "
        "anything else.",
        "the places where the widths end · for each rank: rows of the first weight and bias between two of them, SiLU; "
        "columns of the second weight between the same two · the sum over ranks · the second bias, if there is one.",
    ),
)  # fmt: skip


# 16.4 ----------------------------------------------------------------------------------------------------------------

_Shape = dict[str, int]
_FIELDS = ("dim", "ffn_dim", "n_heads", "n_kv_heads", "head_dim", "n_layers")


def _activation_cases(rng: torch.Generator) -> Iterable[tuple[Any, ...]]:
    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=rng))

    def shape(layers: int, heads: int, kv_heads: int) -> _Shape:
        head_dim, dim = 2 * number(3, 9), 4 * number(20, 40)
        return dict(zip(_FIELDS, (dim, 3 * dim - number(1, 20), heads, kv_heads, head_dim, layers), strict=True))

    for layers, heads, kv_heads, size, group in (
        (5, 6, 2, 2, 0), (5, 6, 2, 4, 0), (7, 8, 4, 2, 1), (7, 6, 3, 4, 3), (9, 4, 1, 2, 4),
        (8, 6, 2, 2, 2), (3, 5, 5, 2, 6), (1, 6, 2, 4, 1),
    ):  # fmt: skip
        yield shape(layers, heads, kv_heads), number(2, 5), number(30, 60), size, group
    yield dict(zip(_FIELDS, (8192, 28_672, 64, 8, 128, 80), strict=True)), 1, 8192, 2, 9
    yield shape(4, 6, 2), number(2, 4), 1, 2, 0


_Numbers = Callable[[_Shape], int]


def _stream(shape: _Shape) -> int:
    return shape["dim"]


def _halves(shape: _Shape, kv: str = "n_kv_heads") -> int:
    """Numbers of `size` bytes that one block keeps for each token, with its input."""
    heads = shape["n_heads"] + shape[kv]
    return 6 * shape["dim"] + 2 * shape["head_dim"] * heads + 4 * shape["ffn_dim"]


def _singles(shape: _Shape) -> int:
    """Numbers in fp32."""
    return 2 + shape["n_heads"]


def _groups(layers: int, group: int) -> list[int]:
    return [min(group, layers - start) for start in range(0, layers, group)] if layers else []


def _worst(groups: list[int], block: int, given: int) -> int:
    """The worst moment: the groups are made anew from the last to the first."""
    return max((i * given + count * block for i, count in enumerate(groups)), default=0)


def _joined(groups: list[int], block: int, given: int) -> int:
    """A last group that is smaller goes together with the one before it."""
    if len(groups) > 1 and groups[-1] < groups[0]:
        groups = [*groups[:-2], groups[-2] + groups[-1]]
    return _worst(groups, block, given)


def _kept_bytes(shape: _Shape, batch: int, tokens: int, size: int, group: int, *,
                halves: _Numbers = _halves, singles: _Numbers = _singles, single: int | None = 4,
                extra: Callable[[_Shape, int], int] = lambda shape, tokens: 0, layers: int = 0,
                given: Callable[[_Shape], int] = _stream,
                worst: Callable[[list[int], int, int], int] = _worst,
                plain: Callable[[int, int], int] = lambda count, block: count * block) -> int:  # fmt: skip
    block = size * halves(shape) + (single or size) * singles(shape) + size * extra(shape, tokens)
    count = shape["n_layers"] + layers
    kept = worst(_groups(count, group), block, size * given(shape)) if group else plain(count, block)
    return batch * tokens * kept


def _kept_as(**options: Any) -> Callable[..., int]:
    return lambda *arguments: _kept_bytes(*arguments, **options)


def _more(**numbers: int) -> Callable[..., int]:
    """Other numbers of these sizes, per token."""
    sizes: dict[str, _Numbers] = {
        "dim": lambda shape: shape["dim"], "ffn": lambda shape: shape["ffn_dim"],
        "q": lambda shape: shape["n_heads"] * shape["head_dim"],
        "kv": lambda shape: shape["n_kv_heads"] * shape["head_dim"],
    }  # fmt: skip
    return _kept_as(halves=lambda shape: _halves(shape) + sum(n * sizes[name](shape) for name, n in numbers.items()))


ACTIVATIONS = Exercise(
    "16.4", "activation memory", "activation_bytes", minutes=15, difficulty=3,
    why="Weights and optimizer are the same for any batch; what the backward pass needs grows with it, and is what "
        "runs out first.",
    reference=_kept_bytes,
    cases=_activation_cases,
    wrong=(
        Wrong("the scores of all pairs are kept: attention that never makes the matrix as a whole keeps one number per "
              "token and head, and makes the scores anew.",
              _kept_as(extra=lambda shape, tokens: shape["n_heads"] * tokens)),
        Wrong("the scores of all pairs are kept, in fp32: attention that never makes the matrix as a whole keeps one "
              "number per token and head, and makes the scores anew.",
              lambda shape, batch, tokens, size, group: _kept_bytes(
                  shape, batch, tokens, size, group,
                  singles=lambda shape: _singles(shape) + shape["n_heads"] * tokens)),
        Wrong("one block is left out.", _kept_as(layers=-1)),
        Wrong("there is one block too many.", _kept_as(layers=1)),
        Wrong("keys and values are counted for every query head: here there are fewer of them.",
              _kept_as(halves=lambda shape: _halves(shape, "n_heads"))),
        Wrong("queries are counted with the heads of the keys: there are more of them.",
              _kept_as(halves=lambda shape: _halves({**shape, "n_heads": shape["n_kv_heads"]}))),
        Wrong("a head's width is taken to be dim by the number of heads: here it has a size of its own.",
              _kept_as(halves=lambda shape: _halves({**shape, "head_dim": shape["dim"] // shape["n_heads"]}))),
        Wrong("queries and attention's result are counted with dim numbers: they have heads times head_dim.",
              _kept_as(halves=lambda shape: _halves({**shape, "n_heads": 0}) + 2 * shape["dim"])),
        Wrong("either keys or values are missing: both are kept.", _more(kv=-1)),
        Wrong("either the queries or attention's result is missing: both are kept.", _more(q=-1)),
        Wrong("one of the four vectors of the feed-forward layer is missing: gate, SiLU of it, up, and their product.",
              _more(ffn=-1)),
        Wrong("two of the four vectors of the feed-forward layer are missing: gate, SiLU of it, up, and their product.",
              _more(ffn=-2)),
        Wrong("one of the six vectors of dim numbers is missing: three for each of the two norms.", _more(dim=-1)),
        Wrong("two of the six vectors of dim numbers are missing: each of the two norms has its input, that vector "
              "normalized, and that times the weight.", _more(dim=-2)),
        Wrong("the vectors of one norm are missing: there are two norms, with three each.", _more(dim=-3)),
        Wrong("both norms have only one vector of dim numbers each: expected three.", _more(dim=-4)),
        Wrong("there is one vector of dim numbers too many: what the block adds to the stream is not kept.",
              _more(dim=1)),
        Wrong("the numbers in fp32 are left out: one for each norm, and one for each query head.",
              _kept_as(singles=lambda shape: 0)),
        Wrong("the numbers of the softmax are left out: one for each query head, in fp32.",
              _kept_as(singles=lambda shape: 2)),
        Wrong("the numbers of the norms are left out: one for each of the two, in fp32.",
              _kept_as(singles=lambda shape: shape["n_heads"])),
        Wrong("both norms are counted with one number in fp32 together: each of the two has its own.",
              _kept_as(singles=lambda shape: 1 + shape["n_heads"])),
        Wrong("the numbers of the softmax are counted for the key heads: there is one for each query head.",
              _kept_as(singles=lambda shape: 2 + shape["n_kv_heads"])),
        Wrong("the numbers of norms and softmax are counted with `size` bytes: they are always in fp32.",
              _kept_as(single=None)),
        Wrong("all numbers are counted with 4 bytes: all but those of norms and softmax take `size` bytes.",
              lambda shape, batch, tokens, size, group: _kept_bytes(shape, batch, tokens, 4, group)),
        Wrong("it counts bits, expected bytes.", lambda *arguments: 8 * _kept_bytes(*arguments)),
        Wrong("it is for one row of the batch.",
              lambda shape, batch, *rest: _kept_bytes(shape, 1, *rest)),
        Wrong("it is for one token of each row.",
              lambda shape, batch, tokens, *rest: _kept_bytes(shape, batch, 1, *rest)),
        Wrong("groups of blocks keep nothing but what is made anew: the inputs of the groups before it wait, too.",
              _kept_as(worst=lambda groups, block, given: max(groups) * block)),
        Wrong("groups of blocks keep their inputs alone: at the worst moment, one group's blocks are there as well.",
              _kept_as(worst=lambda groups, block, given: len(groups) * given)),
        Wrong("groups of blocks make no difference: that is what is kept without them.",
              lambda shape, batch, tokens, size, group: _kept_bytes(shape, batch, tokens, size, 0)),
        Wrong("groups of one block are counted where there are to be none: group 0 keeps everything.",
              lambda shape, batch, tokens, size, group: _kept_bytes(shape, batch, tokens, size, group or 1)),
        Wrong("one block is made anew, with the group's input: the backward pass goes through the whole group, so all "
              "its blocks are there at once.",
              _kept_as(worst=lambda groups, block, given: (len(groups) - 1) * given + block)),
        Wrong("the input of the group that is made anew is counted twice: it stands in its first block's list.",
              _kept_as(worst=lambda groups, block, given: max(
                  (i + 1) * given + count * block for i, count in enumerate(groups)))),
        Wrong("the inputs of all groups are counted beside the largest group: its own stands in its first block's "
              "list, and those behind it are gone.",
              _kept_as(worst=lambda groups, block, given: len(groups) * given + max(groups) * block)),
        Wrong("the last group is taken for as large as the others: where it is smaller, the one before it is the "
              "worst, and by then the last one's input is gone.",
              _kept_as(worst=lambda groups, block, given: (len(groups) - 1) * given + max(groups) * block)),
        Wrong("the last group is taken to have `group` blocks, even where there are fewer: look at each group with the "
              "blocks that it has.",
              lambda shape, batch, tokens, size, group: _kept_bytes(
                  shape, batch, tokens, size, group,
                  worst=lambda groups, block, given: (len(groups) - 1) * given + group * block)),
        Wrong("the blocks behind the last whole group are joined to it: they are a smaller group of their own.",
              _kept_as(worst=_joined)),
        Wrong("only the moment of the last group is looked at: where that one is smaller, another moment is worse.",
              _kept_as(worst=lambda groups, block, given: (len(groups) - 1) * given + groups[-1] * block)),
        Wrong("the input of every block waits: of a group that is not being made anew, only its first block's does.",
              _kept_as(worst=lambda groups, block, given: max(
                  sum(groups[:i]) * given + count * block for i, count in enumerate(groups)))),
        Wrong("`group` is taken for the number of groups: it is the number of blocks in each.",
              lambda shape, batch, tokens, size, group: _kept_bytes(
                  shape, batch, tokens, size, _up(shape["n_layers"], group) if group else 0)),
        Wrong("the blocks behind the last whole group are left out: they are a smaller group.",
              lambda shape, batch, tokens, size, group: _kept_bytes(
                  {**shape, "n_layers": shape["n_layers"] // group * group if group else shape["n_layers"]},
                  batch, tokens, size, group)),
        Wrong("a group is taken to have as many blocks as it may, even where the model has fewer.",
              lambda shape, batch, tokens, size, group: _kept_bytes(
                  {**shape, "n_layers": max(shape["n_layers"], group)}, batch, tokens, size, group)),
    ),
    hints=(
        "Eight blocks are computed in groups of four. When the second group is made anew, what is still needed of the "
        "first one? And when the first is made anew, what of the second?",
        "Count the bytes of one token in one block first, by the list. With groups, look at each of them at the moment "
        "when it is made anew: its blocks keep everything, the groups before it only what went into them.",
        "numbers of `size` bytes: six of dim, queries and result, keys and values, four of ffn_dim · of 4 bytes: two, "
        "and one a head · no groups: times the blocks · groups: for each its blocks, and an input for each group "
        "before it; the largest of these · times batch and tokens.",
    ),
    tolerance=0.0,
)  # fmt: skip


# 16.5 ----------------------------------------------------------------------------------------------------------------

_Best = tuple[Tensor, Tensor, Tensor]


def _budget_cases(rng: torch.Generator) -> Iterable[tuple[Any, ...]]:
    def budgets(count: int, low: float, high: float) -> Tensor:
        """From 10^low to 10^high, in no order."""
        steps = (torch.arange(count) + torch.rand(count, generator=rng, dtype=torch.float64)) / count
        return 10 ** (low + (high - low) * steps[torch.randperm(count, generator=rng)])

    hoffmann = (0.34, 0.28, 406.4, 410.7)
    besiroglu = (0.3478, 0.3658, 482.01, 2085.43)
    yield budgets(6, 17, 26), *hoffmann, math.inf
    yield budgets(5, 18, 25), *besiroglu, math.inf
    yield budgets(7, 12, 18), 0.5, 0.31, 25.0, 900.0, math.inf
    yield budgets(5, 14, 20), 0.22, 0.45, 300.0, 40.0, math.inf
    yield budgets(8, 17, 25), *hoffmann, 4e10  # for half of the budgets, there is less text
    yield budgets(6, 20, 26).float(), *besiroglu, 1e11  # the largest models have more parameters than that
    yield budgets(4, 17, 19), *besiroglu, 1e13  # enough for all
    yield budgets(1, 20, 21), *hoffmann, math.inf
    yield torch.empty(0, dtype=torch.float64), *hoffmann, 1e9


def _root(a: float, b: float, big_a: float, big_b: float) -> float:
    """G of Hoffmann et al. 2022, equation 4."""
    return float((a * big_a / (b * big_b)) ** (1 / (a + b)))


def _budget(flops: Tensor, a: float, b: float, big_a: float, big_b: float, available: float, *, cost: float = 6.0,
            power: Callable[[float, float], float] = lambda a, b: b / (a + b),
            root: Callable[[float, float, float, float], float] = _root,
            tokens: Callable[[Tensor, Tensor, float], Tensor] = lambda budget, params, g: budget / params,
            limit: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]] | None = None,
            loss: Callable[..., Tensor] | None = None) -> _Best:  # fmt: skip
    budget = flops.double() / cost
    g = root(a, b, big_a, big_b)
    params = g * budget ** power(a, b)
    read = tokens(budget, params, g)
    params, read = (limit or _less_text)(budget, params, read, available)
    return params, read, (loss or _loss)(params, read, a, b, big_a, big_b)


def _less_text(budget: Tensor, params: Tensor, read: Tensor, available: float) -> tuple[Tensor, Tensor]:
    short = read > available
    return torch.where(short, budget / available, params), torch.where(short, available, read)


def _loss(params: Tensor, read: Tensor, a: float, b: float, big_a: float, big_b: float) -> Tensor:
    return big_a / params**a + big_b / read**b


def _budget_as(**options: Any) -> Callable[..., _Best]:
    return lambda *arguments: _budget(*arguments, **options)


def _twenty(flops: Tensor, a: float, b: float, big_a: float, big_b: float, available: float) -> _Best:
    budget = flops.double() / 6
    params, read = _less_text(budget, (budget / 20) ** 0.5, (budget * 20) ** 0.5, available)
    return params, read, _loss(params, read, a, b, big_a, big_b)


def _logarithms(flops: Tensor, *rest: float) -> _Best:
    params, read, loss = _budget(flops, *rest)
    return params.log(), read.log(), loss


def _in_singles(flops: Tensor, a: float, b: float, big_a: float, big_b: float, available: float) -> _Best:
    budget = flops.float() / 6
    params = _root(a, b, big_a, big_b) * budget ** (b / (a + b))
    params, read = _less_text(budget, params, budget / params, available)
    return params.double(), read.double(), _loss(params, read, a, b, big_a, big_b).double()


SPLIT = Exercise(
    "16.5", "the compute-optimal split", "compute_optimal", minutes=15, difficulty=3,
    why="A budget can be spent on a larger model or on more text, and the wrong half of it is lost.",
    reference=_budget,
    cases=_budget_cases,
    wrong=(
        Wrong("the exponents are exchanged: the faster the loss falls with tokens, the more goes into parameters, "
              "whose exponent is b/(a + b).", _budget_as(power=lambda a, b: a / (a + b))),
        Wrong("the exponents are exchanged, in G, too: it is the derivative by N that brings the factor a.",
              _budget_as(power=lambda a, b: a / (a + b), root=lambda a, b, A, B: (b * B / (a * A)) ** (1 / (a + b)))),
        Wrong("a budget is taken for 2·N·D, which is the forward pass alone: the backward pass costs twice as much "
              "again.", _budget_as(cost=2.0)),
        Wrong("a budget is taken for N·D: training costs 6 operations per parameter and token.", _budget_as(cost=1.0)),
        Wrong("parameters and tokens are exchanged: expected parameters first.",
              _then(_budget, lambda params, read, loss: (read, params, loss))),
        Wrong("20 tokens per parameter are taken: that is what one fit gave at one size; these constants have an "
              "optimum of their own.", _twenty),
        Wrong("parameters and tokens get the same share: the exponents of the law decide about that.",
              _budget_as(power=lambda a, b: 0.5, root=lambda a, b, A, B: 1.0)),
        Wrong("the constants are left out: the exponents say how the split grows, the constants where it begins.",
              _budget_as(root=lambda a, b, A, B: 1.0)),
        Wrong("both terms of the loss are made equal: what has to be equal is what another bit of compute would take "
              "off either, and there the exponents come down as factors.",
              _budget_as(root=lambda a, b, A, B: (A / B) ** (1 / (a + b)))),
        Wrong("G is turned over: the larger A, the more parameters are worth having.",
              _budget_as(root=lambda a, b, A, B: (b * B / (a * A)) ** (1 / (a + b)))),
        Wrong("in G the exponents are exchanged, as if A/N^a brought down b.",
              _budget_as(root=lambda a, b, A, B: (b * A / (a * B)) ** (1 / (a + b)))),
        Wrong("G has no root: N appears to the power of a + b where the derivatives are set equal.",
              _budget_as(root=lambda a, b, A, B: a * A / (b * B))),
        Wrong("the tokens have the factor G, too: then parameters and tokens do not cost the budget.",
              _budget_as(tokens=lambda budget, params, g: g * g * budget / params)),
        Wrong("the tokens are the budget by the parameters, without the 6: then the run costs six times the budget.",
              _budget_as(tokens=lambda budget, params, g: 6 * budget / params)),
        Wrong("the 6 is missing where the parameters are computed: N·D is a sixth of the budget there, too.",
              _budget_as(root=lambda a, b, A, B: _root(a, b, A, B) * 6 ** (b / (a + b)))),
        Wrong("the limit of the text is not kept to: no budget reads more than there is.",
              _budget_as(limit=lambda budget, params, read, available: (params, read))),
        Wrong("where the text runs out, the compute that is left is not used: a larger model can have it.",
              _budget_as(limit=lambda budget, params, read, available: (params, read.clamp(max=available)))),
        Wrong("where the text runs out, the model grows but still reads more than there is.",
              _budget_as(limit=lambda budget, params, read, available: (
                  torch.where(read > available, budget / available, params), read))),
        Wrong("where one budget runs out of text, all get the limit: those with fewer tokens stay as they are.",
              _budget_as(limit=lambda budget, params, read, available: (
                  (budget / available, torch.full_like(read, available)) if (read > available).any()
                  else (params, read)))),
        Wrong("every budget reads all the text that there is: the limit is for those that want more.",
              _budget_as(limit=lambda budget, params, read, available: (
                  (budget / available, torch.full_like(read, available)) if available < math.inf
                  else (params, read)))),
        Wrong("the limit is laid on the parameters: it is one of tokens.",
              _budget_as(limit=lambda budget, params, read, available: (
                  params.clamp(max=available), torch.where(params > available, budget / available, read)))),
        Wrong("the loss is that of the split without a limit: where the text runs out, it is higher.",
              lambda flops, a, b, big_a, big_b, available: (
                  *_budget(flops, a, b, big_a, big_b, available)[:2],
                  _budget(flops, a, b, big_a, big_b, math.inf)[2])),
        Wrong("in the loss, A stands over the tokens and B over the parameters.",
              _budget_as(loss=lambda params, read, a, b, A, B: B / params**b + A / read**a)),
        Wrong("in the loss, the powers are multiplied, expected to be divided by.",
              _budget_as(loss=lambda params, read, a, b, A, B: A * params**a + B * read**b)),
        Wrong("in the loss, the exponents are exchanged.",
              _budget_as(loss=lambda params, read, a, b, A, B: A / params**b + B / read**a)),
        Wrong("the loss holds the parameters' term alone.",
              _budget_as(loss=lambda params, read, a, b, A, B: A / params**a)),
        Wrong("the loss has 1.69 nats added, the floor of one fit to one language: what lies above the floor is asked "
              "for.", _budget_as(loss=lambda *arguments: 1.69 + _loss(*arguments))),
        Wrong("parameters and tokens are rounded to whole numbers: the law knows none, and small budgets feel it.",
              _then(_budget, lambda params, read, loss: (params.round(), read.round(), loss))),
        Wrong("parameters and tokens are logarithms: expected numbers.", _logarithms),
        Wrong("it is computed in fp32, which has seven digits: expected fp64.", _in_singles),
    ),
    hints=(
        "One more percent of parameters at the same budget means one percent fewer tokens. If that lowers the loss, "
        "where is the optimum, and what is true at it?",
        "Put D = C/(6N) into the loss and set its derivative by N to zero: N to the power of a + b stands alone on one "
        "side. If that wants more tokens than there are, the best that is left is to read all of them.",
        "G: a·A by b·B, the root of order a + b · N: G times C/6 to the power of b by a + b · D: what is left · where "
        "D is above the limit: the limit, and N again from the budget · the loss at both.",
    ),
    tolerance=1e-9,
    slow=lambda rng: (10 ** (17 + 8 * torch.rand(60_000, generator=rng, dtype=torch.float64)), 0.34, 0.28, 406.4, 410.7,
                      2e12),
)  # fmt: skip


# 16.6 ----------------------------------------------------------------------------------------------------------------

_KEYS = ("by tokens", "mean of means", "sum of means", "one rank", "bf16")


@functools.cache
def _ranks() -> tuple[Tensor, int, Tensor, int]:
    """As in the notebook: of both ranks the sum of the surprise's gradients over scored tokens, and their count."""
    model, tokenizer = load("toy")
    assert tokenizer is not None
    rng = random.Random(16)
    rows = [tokenizer.encode(world.sample(rng).text, bos=True, eos=True) for _ in range(24)]
    found: list[Any] = []
    with torch.enable_grad():
        for part in (rows[:12], [row[:9] for row in rows[12:]]):
            model.zero_grad()
            for row in part:
                tokens = torch.tensor([row])
                log_probs = model(tokens[:, :-1]).log_softmax(-1)
                (-log_probs.gather(2, tokens[:, 1:, None]).sum()).backward()
            gradients = [parameter.grad for parameter in model.parameters()]
            found += [
                torch.cat([gradient.flatten().double() for gradient in gradients if gradient is not None]),
                sum(len(row) - 1 for row in part),
            ]
    return found[0], found[1], found[2], found[3]


@functools.cache
def _distances() -> dict[str, float]:
    one, few, other, count = _ranks()
    right = (one + other) / (few + count)
    means = (one / few, other / count)
    rounded = [(total / (few + count)).bfloat16() for total in (one, other)]
    found = {
        "by tokens": right,
        "mean of means": (means[0] + means[1]) / 2,
        "sum of means": means[0] + means[1],
        "one rank": means[0],
        "bf16": rounded[0] + rounded[1],
    }
    return {key: float((value.double() - right).norm() / right.norm()) for key, value in found.items()}


def _verify(measured: dict[str, Any]) -> str:
    found = _distances()

    def near(key: str, value: float) -> bool:
        return abs(measured[key] - value) <= (0.2 if key == "bf16" else 3e-4) * value

    if not 0 < measured["predicted"] < 100:
        return f"the prediction is {measured['predicted']}, expected a positive share of the gradient's size."
    if any(measured[key] < 0 for key in _KEYS):
        return "a distance is negative: take the root of the sum of all squares of the difference."
    percent = [key for key in _KEYS[1:] if near(key, 100 * found[key])]
    if percent:
        return f"{percent[0]!r} is in percent, expected a share: 1 is a distance as large as the gradient itself."
    squares = [key for key in _KEYS[1:4] if near(key, found[key] ** 2)]
    if squares:
        return f"{squares[0]!r} is a share of the squares, expected of the sizes, which are their roots."
    if not measured["by tokens"] < 1e-4:
        return (
            f"'by tokens' is {measured['by tokens']:.3g}, expected next to nothing: two sums of gradients, by both "
            "ranks' tokens, are the gradient of all rows."
        )
    if near("mean of means", found["sum of means"]) and near("sum of means", found["mean of means"]):
        return "'mean of means' and 'sum of means' are exchanged."
    one, few, other, count = _ranks()
    right = (one + other) / (few + count)
    if near("one rank", float((other / count - right).norm() / right.norm())):
        return "'one rank' is the second rank's gradient, expected the first one's, of whole stories."
    if near("one rank", float((one / (few + count) - right).norm() / right.norm())) and not near(
        "one rank", found["one rank"]
    ):
        return "'one rank' is divided by the tokens of both: a rank that is alone divides by its own."
    for key in _KEYS[1:]:
        if not near(key, found[key]):
            return (
                f"{key!r} is not what these rows give: take the distance from the gradient of all rows, as a share of "
                "that one's size, over all parameters together."
            )
    return ""


EXPERIMENT = Experiment(
    "16.6", "experiment: a wrong mean", "measured_16", minutes=15, difficulty=2,
    why="A wrong all-reduce raises no error: the loss still falls, only to another place, and later.",
    keys={
        "predicted": "what you expect the mean of means to be off by, as a share of the gradient's size, before you "
                     "measure",
        "by tokens": "how far the sums by all tokens are from the gradient of all rows, as a share of its size",
        "mean of means": "how far the mean of the two ranks' means is off, as a share of the gradient's size",
        "sum of means": "how far the sum of the two ranks' means is off, as a share of the gradient's size",
        "one rank": "how far the first rank's own mean is off, as a share of the gradient's size",
        "bf16": "how far the all-reduce in bf16 is off, as a share of the gradient's size",
        "because": "a sentence on why",
    },
    verify=_verify,
    explain="on why the mean of means is so far off for these two ranks",
    hints=(
        "Rank 0 scores 1600 tokens that the toy finds easy, rank 1 scores 100 that it cannot know. Which share of the "
        "mean of means comes from rank 1, and which share of the tokens is it?",
        "A mean over tokens belongs to each rank: the sum of its gradients by its count. Each key puts the two sums "
        "together in another way; the distance is always from the one that all tokens make.",
        "the gradient of all rows: both sums by both counts · put the two together as the key says · the size of the "
        "difference by the size of the gradient · in bf16: each sum by all tokens, rounded, then added.",
    ),
)  # fmt: skip


EXERCISES: list[Task] = [RING, ADAM, LAYERS, ACTIVATIONS, SPLIT, EXPERIMENT]
