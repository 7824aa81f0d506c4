"""Exercises of chapter 13, fast inference."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minillama.checkpoint import load
from minillama.config import ModelConfig
from minillama.course.exercise import Exercise, Experiment, Task, Wrong
from minillama.data import story_validation
from minillama.trainer import mean_loss

# 13.1 ----------------------------------------------------------------------------------------------------------------

_Int8 = tuple[Tensor, Tensor, Tensor]


def _int8_cases(rng: torch.Generator) -> Iterable[tuple[Any, ...]]:
    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=rng)

    yield normal(3, 7), normal(5, 7)
    yield normal(2, 4, 6), normal(6, 6) * torch.tensor([1, 10, 0.1, 3, 1, 1e3])[:, None]
    yield normal(9), normal(4, 9) * 1e4
    zeros = normal(3, 5)
    zeros[1] = 0
    yield normal(2, 5), zeros
    yield normal(0, 8), normal(2, 8)
    yield normal(2, 3), normal(4, 3) * 1e-10
    yield normal(4, 1), normal(1, 1)
    sixteen = normal(7, 12).clamp(-1.9, 1.9)
    sixteen[torch.arange(7), torch.randint(12, (7,), generator=rng)] = 251 / 128  # no code lies in the middle of two
    yield normal(3, 12).bfloat16(), sixteen.bfloat16()


def _nearest(codes: Tensor) -> Tensor:
    return codes.round().clamp(-127, 127)


def _wrapped(codes: Tensor) -> Tensor:
    """What a cast to 8 bits leaves of numbers that are too large."""
    return codes.round().to(torch.int32).to(torch.int8)


def _or_one(scales: Tensor) -> Tensor:
    return torch.where(scales > 0, scales, torch.ones_like(scales))


def _int8(x: Tensor, weight: Tensor, *, scales: Callable[[Tensor], Tensor] = lambda w: w.abs().amax(1) / 127,
          whole: Callable[[Tensor], Tensor] = _nearest, dtype: torch.dtype = torch.float32, across: bool = False,
          product: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] = lambda x, codes, scales, w: F.linear(
              x, codes) * scales) -> _Int8:  # fmt: skip
    weight = weight.to(dtype)
    found = scales(weight)
    used = _or_one(found)
    codes = whole(weight / (used if across or not used.dim() else used[:, None])).to(torch.int8)
    return codes, found.float(), product(x.float(), codes.float(), found.float(), weight.float())


def _int8_as(**options: Any) -> Callable[[Tensor, Tensor], _Int8]:
    return lambda x, weight: _int8(x, weight, **options)


def _then(answer: Callable[..., Any], change: Callable[..., Any]) -> Callable[..., Any]:
    """An answer of several parts, with something done to them."""
    return lambda *arguments, **options: change(*answer(*arguments, **options))


INT8 = Exercise(
    "13.1", "int8 with a scale a row", "int8_product", minutes=15, difficulty=2,
    why="In 8 bits a matrix is read in half of the time of bf16, and a scale a row is all that it costs.",
    reference=_int8,
    cases=_int8_cases,
    wrong=(
        Wrong("the whole matrix has one scale: each row has its own, so that a row of small weights keeps its digits.",
              _int8_as(scales=lambda w: w.abs().amax() / 127)),
        Wrong("all rows have the same scale, that of the largest weight of all: each row has its own.",
              _int8_as(scales=lambda w: (w.abs().amax() / 127).expand(len(w)))),
        Wrong("there is a scale for each column, and the inputs are scaled by them: expected one for each row, which "
              "can wait until the sum is done.",
              _int8_as(scales=lambda w: w.abs().amax(0) / 127, across=True,
                       product=lambda x, codes, scales, w: F.linear(x * scales, codes))),
        Wrong("there is a scale for each column, and what comes out has rows: expected the largest of each row.",
              _int8_as(scales=lambda w: w.abs().amax(0) / 127, across=True)),
        Wrong("the largest of a row is divided by 128 and then cut off at 127: there are 127 steps on either side.",
              _int8_as(scales=lambda w: w.abs().amax(1) / 128)),
        Wrong("the largest of a row is divided by 128: 128 does not fit in a signed byte, and becomes -128.",
              _int8_as(scales=lambda w: w.abs().amax(1) / 128, whole=_wrapped)),
        Wrong("the largest of a row is divided by 255: there are 127 steps on either side of 0, not 255.",
              _int8_as(scales=lambda w: w.abs().amax(1) / 255)),
        Wrong("the largest of a row is divided by 255: there are 127 steps on either side of 0, so most codes are cut "
              "off by the cast and come out anywhere.",
              _int8_as(scales=lambda w: w.abs().amax(1) / 255, whole=_wrapped)),
        Wrong("the largest of a row is looked for without regard to negative weights, which are cut off: take sizes.",
              _int8_as(scales=lambda w: w.amax(1).abs() / 127)),
        Wrong("the largest of a row is looked for without regard to negative weights, whose codes wrap round: take "
              "sizes.", _int8_as(scales=lambda w: w.amax(1).abs() / 127, whole=_wrapped)),
        Wrong("the scale comes from the distance between smallest and largest: codes around 0 need the largest size.",
              _int8_as(scales=lambda w: (w.amax(1) - w.amin(1)) / 255)),
        Wrong("the mean size of a row is taken for its largest.",
              _int8_as(scales=lambda w: w.abs().mean(1) / 127)),
        Wrong("the codes are cut off towards 0: the nearest whole number is wrong by half as much.",
              _int8_as(whole=torch.trunc)),
        Wrong("the codes are rounded down: the nearest whole number is wrong by half as much, and to both sides.",
              _int8_as(whole=torch.floor)),
        Wrong("the product lacks the scales: it is one of codes.",
              _int8_as(product=lambda x, codes, scales, w: F.linear(x, codes))),
        Wrong("the product is divided by the scales: a scale says how much one step is worth.",
              _int8_as(product=lambda x, codes, scales, w: F.linear(x, codes) / scales)),
        Wrong("the scales are multiplied twice.",
              _int8_as(product=lambda x, codes, scales, w: F.linear(x, codes) * scales * scales)),
        Wrong("the inputs are multiplied by the scales: these belong to the rows, which come out.",
              _int8_as(product=lambda x, codes, scales, w: F.linear(x * scales, codes))),
        Wrong("the product is that of the exact weights: what is stored, and multiplied, are the codes.",
              _int8_as(product=lambda x, codes, scales, w: F.linear(x, w))),
        Wrong("rows and columns are exchanged in the product: the weight is (out, in).",
              _int8_as(product=lambda x, codes, scales, w: x @ codes * scales)),
        Wrong("the scales are found in bf16, which rounds them before they are used: go to fp32 first.",
              lambda x, weight: _int8(x, weight, dtype=weight.dtype)),
        Wrong("all is computed in the dtype of the weight, which rounds it: go from bf16 to fp32 first.",
              lambda x, weight: _then(_int8, lambda codes, scales, y: (codes, scales.to(weight.dtype), y))(
                  x, weight, dtype=weight.dtype)),
        Wrong("the scales are rounded to bf16 before they are used, as the chapter's are: here they stay in fp32.",
              _int8_as(scales=lambda w: (w.abs().amax(1) / 127).bfloat16().float())),
        Wrong("the scales are stored in bf16, as the chapter's are: here they stay in fp32, and so the codes differ.",
              _then(_int8_as(scales=lambda w: (w.abs().amax(1) / 127).bfloat16().float()),
                    lambda codes, scales, y: (codes, scales.bfloat16(), y))),
        Wrong("the inputs are rounded to whole steps, too: here only the weights are, and x is used as it comes.",
              _int8_as(product=lambda x, codes, scales, w: F.linear((x / (step := _or_one(x.abs().amax(
                  -1, keepdim=True) / 127))).round(), codes) * scales * step)),
        Wrong("a small number is added to the scales: a row of smaller weights becomes zeros.",
              _int8_as(scales=lambda w: w.abs().amax(1) / 127 + 1e-8)),
        Wrong("the scales are never smaller than 1e-8, and a row of smaller weights becomes zeros.",
              _int8_as(scales=lambda w: (w.abs().amax(1) / 127).clamp_min(1e-8))),
        Wrong("a row of zeros has the scale 1, expected 0.",
              _int8_as(scales=lambda w: _or_one(w.abs().amax(1) / 127))),
        Wrong("the codes are whole numbers, but of four bytes each: keep them as int8.",
              _then(_int8, lambda codes, scales, y: (codes.float(), scales, y))),
        Wrong("the codes are counted from 0 to 254, expected -127 to 127, in int8.",
              _then(_int8, lambda codes, scales, y: ((codes.int() + 127).to(torch.uint8), scales, y))),
        Wrong("the first two are exchanged: the codes come first, then the scales.",
              _then(_int8, lambda codes, scales, y: (scales, codes, y))),
    ),
    hints=(
        "A row's weights are 0.2, -1 and 0.5. Which code does each get, and how much is one step worth?",
        "The scale of a row is common to all its products, so it can be taken out of the sum: multiply codes, and then "
        "what comes out.",
        "fp32 · largest size along the inputs · by 127 · where it is 0, divide by 1 instead · nearest whole numbers as "
        "int8 · inputs times codes, transposed · times the scales.",
    ),
    blocked=("minillama.quantize.Int8Linear.from_float", "minillama.quantize.Int8Linear.forward",
             "torch._weight_int8pack_mm", "torch.quantize_per_channel", "torch.fake_quantize_per_channel_affine"),
    slow=lambda rng: (torch.randn(2, 16, generator=rng), torch.randn(8192, 16, generator=rng)),
)  # fmt: skip


# 13.2 ----------------------------------------------------------------------------------------------------------------


def _int4_cases(rng: torch.Generator) -> Iterable[tuple[Any, ...]]:
    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=rng)

    yield normal(5, 12), 4
    yield normal(6, 12) + 3, 3
    yield normal(2, 64) * 1e4, 32
    yield normal(4, 8) - 0.5, 8
    equal = normal(3, 12)
    equal[1, :6] = equal[1, 0]
    equal[2, 6:] = 0
    yield equal, 6
    yield normal(3, 2), 1
    yield normal(8, 16) * 1e-10, 8
    grid = torch.randint(-59, 67, (5, 4, 8), generator=rng).float()  # no code lies in the middle of two
    grid[..., 1], grid[..., 6] = -60, 67
    yield (grid.flatten(1) / 128).bfloat16(), 8


_Int4 = tuple[Tensor, Tensor, Tensor]


def _neighbours(codes: Tensor, group: int) -> Tensor:
    return codes[:, ::2] | codes[:, 1::2] << 4


def _of_groups(codes: Tensor, group: int) -> Tensor:
    """The halves of each group in a byte, as in GGUF's blocks."""
    low, high = codes.unflatten(1, (-1, 2, group // 2)).unbind(2)
    return (low | high << 4).flatten(1)


def _int4(weight: Tensor, group: int, *, cut: Callable[[Tensor, int], Tensor] = lambda w, group: w.unflatten(
              1, (-1, group)), low: Callable[[Tensor], Tensor] = lambda g: g.amin(-1, keepdim=True),
          scale: Callable[[Tensor], Tensor] = lambda g: (g.amax(-1, keepdim=True) - g.amin(-1, keepdim=True)) / 15,
          codes: Callable[[Tensor, Tensor, Tensor], Tensor] = lambda g, low, scale: ((g - low) / scale).round().clamp(
              0, 15), pack: Callable[[Tensor, int], Tensor] = _neighbours, dtype: torch.dtype = torch.float32,
          ) -> _Int4:  # fmt: skip
    grouped = cut(weight.to(dtype), group)
    lows, scales = low(grouped), scale(grouped)
    whole = codes(grouped, lows, _or_one(scales)).to(torch.int32).to(torch.uint8).reshape(weight.shape)
    return pack(whole, group), scales.squeeze(-1).float(), lows.squeeze(-1).float()


def _int4_as(**options: Any) -> Callable[[Tensor, int], _Int4]:
    return lambda weight, group: _int4(weight, group, **options)


def _across(weight: Tensor, group: int, axis: int) -> _Int4:
    """Groups along the rows (axis 0), or of what stands `group` apart (axis 1)."""
    grouped = weight.float().unflatten(axis, (-1, group)) if axis == 0 else weight.float().unflatten(1, (-1, group))
    low, high = grouped.amin(1, keepdim=True), grouped.amax(1, keepdim=True)
    scales = (high - low) / 15
    codes = ((grouped - low) / _or_one(scales)).round().to(torch.uint8).reshape(weight.shape)
    return _neighbours(codes, group), scales.squeeze(1), low.squeeze(1)


def _size(g: Tensor) -> Tensor:
    return g.abs().amax(-1, keepdim=True)


def _everywhere(of: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The same number, of all groups, for each of them."""
    return lambda g: of(g).expand(*g.shape[:-1], 1).clone()


def _apart(weight: Tensor, group: int) -> _Int4:
    """As many groups as there should be, each of weights that stand apart by their number."""
    grouped = weight.float().unflatten(1, (group, -1))
    low, high = grouped.amin(1, keepdim=True), grouped.amax(1, keepdim=True)
    scales = (high - low) / 15
    codes = ((grouped - low) / _or_one(scales)).round().to(torch.uint8).flatten(1)
    return _neighbours(codes, group), scales.squeeze(1), low.squeeze(1)


def _pairs_of_groups(codes: Tensor, group: int) -> Tensor:
    """Neighbours in each group share a byte: of an odd group the last has none."""
    grouped = codes.unflatten(1, (-1, group))
    return (grouped[..., ::2] | grouped[..., 1::2] << 4).reshape(len(codes), codes.shape[1] // 2)


INT4 = Exercise(
    "13.2", "int4 in groups, packed", "int4_groups", minutes=25, difficulty=4,
    why="Four bits are 16 values: with two numbers for each small group they are enough, and two fit in a byte.",
    reference=_int4,
    cases=_int4_cases,
    wrong=(
        Wrong("the codes lie around 0, from -7 to 7: here they count up from the smallest weight of the group.",
              _int4_as(low=lambda g: -8 * _size(g) / 7, scale=lambda g: _size(g) / 7)),
        Wrong("the codes reach from the largest size below 0 to that above 0: expected from the smallest to the "
              "largest of the group.", _int4_as(low=lambda g: -_size(g), scale=lambda g: 2 * _size(g) / 15)),
        Wrong("the scale comes from the largest size: it is the distance from the smallest to the largest that the 15 "
              "steps have to cover.", _int4_as(scale=lambda g: 2 * _size(g) / 15)),
        Wrong("the smallest weight is never taken away: the codes are those of the weights themselves.",
              _int4_as(codes=lambda g, low, scale: (g / scale).round().clamp(0, 15))),
        Wrong("the codes count up from 0, and all negative weights become 0.",
              _int4_as(low=lambda g: torch.zeros_like(g[..., :1]), scale=lambda g: g.amax(-1, keepdim=True).clamp_min(
                  0) / 15)),
        Wrong("the groups lie along the rows (out): weights of one row share a scale.",
              lambda weight, group: _across(weight, group, 0)),
        Wrong("weights that stand apart by a group share a scale: a group is of neighbours.",
              lambda weight, group: _across(weight, group, 1)),
        Wrong("a row is cut into as many groups as a group has weights: `group` is their size, not their number.",
              _int4_as(cut=lambda w, group: w.unflatten(1, (group, -1)))),
        Wrong("the groups have the right number, but each takes weights from all over its row: a group is of "
              "neighbours.", _apart),
        Wrong("all groups of a row have the row's smallest weight and scale: each group has its own.",
              _int4_as(low=_everywhere(lambda g: g.amin((1, 2), keepdim=True)), scale=_everywhere(
                  lambda g: (g.amax((1, 2), keepdim=True) - g.amin((1, 2), keepdim=True)) / 15))),
        Wrong("a row has one scale: each group of it has its own.",
              _int4_as(cut=lambda w, group: w[:, None])),
        Wrong("all groups have the smallest weight and the scale of the whole matrix.",
              _int4_as(low=_everywhere(lambda g: g.min()), scale=_everywhere(lambda g: (g.max() - g.min()) / 15))),
        Wrong("the two halves of a byte are exchanged: the column with the even number is in the low one.",
              _int4_as(pack=lambda codes, group: codes[:, 1::2] | codes[:, ::2] << 4)),
        Wrong("the first half of a row is packed with the second: neighbours share a byte.",
              _int4_as(pack=lambda codes, group: (halves := codes.chunk(2, 1))[0] | halves[1] << 4)),
        Wrong("the first half of a row is packed with the second, and stands in the high bits: neighbours share a "
              "byte, the first one in the low bits.",
              _int4_as(pack=lambda codes, group: (halves := codes.chunk(2, 1))[1] | halves[0] << 4)),
        Wrong("the halves of each group are packed together, as in GGUF's files: here neighbours share a byte.",
              _int4_as(pack=_of_groups)),
        Wrong("neighbours are paired within their group, which cannot be done where a group is odd: pack the codes of "
              "the whole row.", _int4_as(pack=_pairs_of_groups)),
        Wrong("both codes of a byte move up by 4 bits, since a sum comes before a shift: only the second one moves.",
              _int4_as(pack=lambda codes, group: codes[:, ::2] + codes[:, 1::2] << 4)),
        Wrong("the codes are not packed: two of them share a byte.",
              _int4_as(pack=lambda codes, group: codes)),
        Wrong("the second code of a byte lies over the first: it must move up by 4 bits.",
              _int4_as(pack=lambda codes, group: codes[:, ::2] | codes[:, 1::2])),
        Wrong("the second code of a byte moves up by 8 bits, and out of it: 4 are enough.",
              _int4_as(pack=lambda codes, group: codes[:, ::2].clone())),
        Wrong("the distance is divided by 16, and the largest weight is cut off: 16 values have 15 steps between them.",
              _int4_as(scale=lambda g: (g.amax(-1, keepdim=True) - g.amin(-1, keepdim=True)) / 16)),
        Wrong("the distance is divided by 16: the largest weight gets the code 16, which does not fit in 4 bits, and "
              "spoils its neighbour.",
              _int4_as(scale=lambda g: (g.amax(-1, keepdim=True) - g.amin(-1, keepdim=True)) / 16,
                       codes=lambda g, low, scale: ((g - low) / scale).round())),
        Wrong("the codes are cut off, not rounded: the nearest is wrong by half as much.",
              _int4_as(codes=lambda g, low, scale: ((g - low) / scale).clamp(0, 15))),
        Wrong("the smallest value is rounded to a whole number of steps, as where 0 must have a code of its own: here "
              "it is the smallest weight itself.",
              _int4_as(low=lambda g: (g.amin(-1, keepdim=True) / (step := _or_one((g.amax(-1, keepdim=True) - g.amin(
                  -1, keepdim=True)) / 15))).round() * step)),
        Wrong("what stands behind the scales is the middle of the group, as the kernel takes it: expected its smallest "
              "weight.", _then(_int4, lambda packed, scales, lows: (packed, scales, lows + 8 * scales))),
        Wrong("what stands behind the scales are the largest weights, expected the smallest.",
              _then(_int4, lambda packed, scales, lows: (packed, scales, lows + 15 * scales))),
        Wrong("the scales and the smallest weights have the groups first: expected (out, in/group), as the rows lie.",
              _then(_int4, lambda packed, scales, lows: (packed, scales.T, lows.T))),
        Wrong("the scales and the smallest weights are exchanged: the scales come first.",
              _then(_int4, lambda packed, scales, lows: (packed, lows, scales))),
        Wrong("the smallest weight and the scale are found in bf16, which rounds them: go to fp32 first.",
              lambda weight, group: _int4(weight, group, dtype=weight.dtype)),
        Wrong("all is computed in the dtype of the weight, and comes back in it: go from bf16 to fp32 first.",
              lambda weight, group: _then(_int4, lambda packed, *numbers: (
                  packed, *(n.to(weight.dtype) for n in numbers)))(weight, group, dtype=weight.dtype)),
        Wrong("the scales are never smaller than 1e-8, and groups of smaller weights lose them.",
              _int4_as(scale=lambda g: ((g.amax(-1, keepdim=True) - g.amin(-1, keepdim=True)) / 15).clamp_min(1e-8))),
        Wrong("a group of equal weights has the scale 1, expected 0.",
              _int4_as(scale=lambda g: _or_one((g.amax(-1, keepdim=True) - g.amin(-1, keepdim=True)) / 15))),
    ),
    hints=(
        "A group has the weights -1, 0.5 and 2. Which three codes do they get, and how much is one step worth?",
        "Give the inputs an axis of groups. Find the smallest and the largest of each; codes count the steps from the "
        "smallest. Pack only when the groups are gone again.",
        "fp32 · (out, groups, group) · smallest and largest along the last axis · distance by 15 · where it is 0, "
        "divide by 1 instead · round · back to (out, in) as uint8 · every second, or-ed with the others moved up.",
    ),
    blocked=("minillama.quantize.Int4Linear.from_float", "minillama.quantize.Int4Linear.from_codes",
             "torch._convert_weight_to_int4pack", "torch._convert_weight_to_int4pack_for_cpu"),
    slow=lambda rng: (torch.randn(256, 1024, generator=rng), 32),
)  # fmt: skip


# 13.3 ----------------------------------------------------------------------------------------------------------------

_PAGE = 16
_CACHE_FIELDS = ("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim")


def _cache_cases(rng: torch.Generator) -> Iterable[tuple[Any, ...]]:
    lengths = (torch.randint(0, 6, (4,), generator=rng) * 16 + torch.tensor([1, 7, 16, 18])).tolist()
    for numbers, rows, size, padded in (
        ((96, 4, 6, 2, 32), lengths, 2, True),
        ((96, 4, 6, 2, 32), lengths, 2, False),
        ((4096, 32, 32, 8, 128), [2048, 16, 31, 33], 2, False),
        ((576, 30, 9, 3, 48), [100], 4, True),
        ((576, 30, 9, 3, 48), [100], 4, False),
        ((640, 7, 8, 4, 64), [0, 5, 64], 1, False),
        ((640, 7, 8, 4, 64), [0, 5, 61], 1, True),
        ((640, 7, 8, 4, 64), [], 2, True),
        ((640, 7, 8, 4, 64), [], 2, False),
    ):
        yield dict(zip(_CACHE_FIELDS, numbers, strict=True)), rows, size, padded


def _longest(lengths: list[int]) -> int:
    return len(lengths) * max(lengths, default=0)


def _pages(lengths: list[int]) -> int:
    return _PAGE * sum(math.ceil(length / _PAGE) for length in lengths)


def _cache(config: dict[str, int], lengths: list[int], size: int, padded: bool, *, both: int = 2,
           heads: Callable[[dict[str, int]], int] = lambda c: c["n_kv_heads"] * c["head_dim"],
           layers: Callable[[int], int] = lambda n: n, filled: Callable[[list[int]], int] = _longest,
           paged: Callable[[list[int]], float] = _pages, byte: float = 1) -> float:  # fmt: skip
    tokens = filled(lengths) if padded else paged(lengths)
    return float(both * layers(config["n_layers"]) * heads(config) * tokens * size / byte)


def _cache_as(**options: Any) -> Callable[..., float]:
    return lambda *arguments: _cache(*arguments, **options)


CACHE = Exercise(
    "13.3", "the cache in bytes", "cache_bytes", minutes=10, difficulty=2,
    why="A long text's cache grows larger than the model, and decides how many texts a machine can serve at once.",
    reference=_cache,
    cases=_cache_cases,
    wrong=(
        Wrong("the cache has a place for every query head: it holds keys and values, of which there are n_kv_heads.",
              _cache_as(heads=lambda c: c["n_heads"] * c["head_dim"])),
        Wrong("the cache has dim numbers for each key: it has head_dim for each of n_kv_heads.",
              _cache_as(heads=lambda c: c["dim"])),
        Wrong("dim / n_heads is taken for head_dim: a config may give another one.",
              _cache_as(heads=lambda c: c["n_kv_heads"] * (c["dim"] // c["n_heads"]))),
        Wrong("the cache has one key/value head: it has n_kv_heads.",
              _cache_as(heads=lambda c: c["head_dim"])),
        Wrong("the heads of a group are counted, not the groups: the cache has n_kv_heads heads.",
              _cache_as(heads=lambda c: c["n_heads"] // c["n_kv_heads"] * c["head_dim"])),
        Wrong("the cache has only keys, or only values: it holds both.", _cache_as(both=1)),
        Wrong("the cache is one layer's: each layer has its own.", _cache_as(layers=lambda n: 1)),
        Wrong("there is one layer too many.", _cache_as(layers=lambda n: n + 1)),
        Wrong("the bytes of a number are taken for bits.", _cache_as(byte=8)),
        Wrong("these are bits, expected bytes.", _cache_as(byte=1 / 8)),
        Wrong("these are GB, expected bytes.", _cache_as(byte=1e9)),
        Wrong("these are GiB, expected bytes.", _cache_as(byte=2**30)),
        Wrong("padded rows have their own lengths: in one tensor each is as long as the longest.",
              _cache_as(filled=sum)),
        Wrong("padded rows are counted in pages: in one tensor each is as long as the longest.",
              _cache_as(filled=_pages)),
        Wrong("padded rows are counted up to a whole page: only without padding there are pages.",
              _cache_as(filled=lambda lengths: len(lengths) * math.ceil(max(lengths, default=0) / _PAGE) * _PAGE)),
        Wrong("one padded row is counted: there are as many as lengths.",
              _cache_as(filled=lambda lengths: max(lengths, default=0))),
        Wrong("only tokens that are there are counted: padding up to the longest row takes room, and so does a page "
              "that is not full.", _cache_as(filled=sum, paged=sum)),
        Wrong("pages are not rounded up: a row has whole pages, and the last one is seldom full.",
              _cache_as(paged=sum)),
        Wrong("pages are rounded down: the tokens that do not fill a page need one all the same.",
              _cache_as(paged=lambda lengths: _PAGE * sum(length // _PAGE for length in lengths))),
        Wrong("a row whose pages are full gets one more: 32 tokens are two pages, and 0 are none.",
              _cache_as(paged=lambda lengths: _PAGE * sum(length // _PAGE + 1 for length in lengths))),
        Wrong("the rows' tokens are put into pages all together: no two rows share a page.",
              _cache_as(paged=lambda lengths: _PAGE * math.ceil(sum(lengths) / _PAGE))),
        Wrong("without padding each row has as many pages as the longest: each has what it needs.",
              _cache_as(paged=lambda lengths: len(lengths) * math.ceil(max(lengths, default=0) / _PAGE) * _PAGE)),
        Wrong("rows are padded in either case: without padding each has the pages that it needs.",
              _cache_as(paged=_longest)),
        Wrong("pages are counted, not their tokens: a page has 16.",
              _cache_as(paged=lambda lengths: _pages(lengths) // _PAGE)),
        Wrong("padded and not padded are exchanged.", _cache_as(filled=_pages, paged=_longest)),
        Wrong("where there are no rows it stumbles over the longest of none, expected 0.",
              _cache_as(filled=lambda lengths: len(lengths) * max(lengths))),
    ),
    hints=(
        "Rows of 5 and 20 tokens: how many places does one tensor for both have, and how many do pages of 16 have?",
        "The bytes of one token are the same for every row. Find them, and then how many tokens' places there are.",
        "keys and values · layers · n_kv_heads · head_dim · bytes; times rows times the longest, or 0 if there are "
        "none; or times 16 times the sum of each row's pages, rounded up.",
    ),
    tolerance=0.0,
    blocked=("minillama.config.ModelConfig.kv_cache_bytes",),
)  # fmt: skip


# 13.4 ----------------------------------------------------------------------------------------------------------------


def _draft(rng: torch.Generator, vocab: int, pattern: str, *, certain: bool = False) -> tuple[Any, ...]:
    """Guesses that are kept ("K"; "S", where the model finds them more probable) or refused ("R"), with chances that
    are not near to a border.

    Another chance is put where the first refused guess, or the end, needs one to draw from.
    """
    k = len(pattern)
    scores = 1.2 * torch.randn(k + 1, vocab, generator=rng)
    p = torch.softmax(scores, -1)
    q = torch.softmax(scores[:k] + 1.5 * torch.randn(k, vocab, generator=rng), -1)
    if certain:
        q = F.one_hot(torch.randint(vocab, (k,), generator=rng), vocab).float()
    chances = torch.rand(k + 1, generator=rng)
    guesses = torch.zeros(k, dtype=torch.int64)
    for i, kind in enumerate(pattern):
        ratios = torch.where(q[i] > 0, p[i] / q[i], 2)
        drawn = int(torch.multinomial(q[i], 1, generator=rng))
        seldom = torch.where(ratios < max(0.9, float(ratios.min()) + 1e-6), torch.ones(vocab), 0)
        refused = int(torch.multinomial(seldom, 1, generator=rng))
        guesses[i] = {"K": drawn, "S": int(ratios.argmax()), "R": refused}[kind]
        bound = min(1.0, float(ratios[guesses[i]]))
        share = 0.05 + 0.9 * float(chances[i])
        chances[i] = 0.97 if kind == "S" else bound * share if kind == "K" else bound + (1 - bound) * share
    n = (pattern + "R").index("R")
    if n == k:
        rivals = [p[k], p[k - 1]]
    else:
        apart, without = p[n] - q[n], _without(p[n], q[n], guesses[n])
        written = F.one_hot(guesses[n], vocab).float()
        rivals = [apart.clamp_min(0), p[n], without, (-apart).clamp_min(0), written, q[n], apart.abs()]
    # of many chances take the one at which they draw the most different tokens
    chosen = torch.multinomial(rivals[0], 30, replacement=True, generator=rng)
    sums = (rivals[0] / rivals[0].sum()).cumsum(0)
    width = rivals[0][chosen] / rivals[0].sum()
    maybe = sums[chosen] - width * (0.1 + 0.8 * torch.rand(30, generator=rng))
    tokens = torch.stack([torch.searchsorted((r / r.sum()).cumsum(0), maybe, right=True) for r in rivals])
    unlike = (tokens[:, None] != tokens).sum((0, 1)) + 20 * (tokens[1:3] != tokens[0]).sum(0)
    unlike += 10 * (tokens[2:] != tokens[1:-1])[:4].sum(0)
    best = int(unlike.argmax())
    if n < k - 1:  # and behind it a chance that draws another one
        own = int(torch.searchsorted(sums, chances[n], right=True))
        chances[k] = maybe[int(((chosen != chosen[best]).int() + (chosen != own).int()).argmax())]
    chances[min(n + 1, k)] = maybe[best]
    return guesses, q, p, chances


def _accept_cases(rng: torch.Generator) -> Iterable[tuple[Any, ...]]:
    yield _draft(rng, 7, "KSKK")
    yield _draft(rng, 9, "SKRKK")
    yield _draft(rng, 6, "RKKRK")
    yield _draft(rng, 11, "KRKKKK")
    yield _draft(rng, 5, "R")
    yield _draft(rng, 8, "")
    yield _draft(rng, 9, "KR", certain=True)
    yield _draft(rng, 12, "KSKR")
    yield _draft(rng, 6, "KKSKKK")
    # a guess that the model never makes, with the chance 0; and the chance 0 where the first token is impossible
    guesses, q, p, chances = _draft(rng, 6, "KRK")
    p[1] = torch.where(torch.arange(6) == guesses[1], 0, p[1])
    p[1] /= p[1].sum()
    chances[1] = 0
    yield guesses, q, p, chances
    guesses, q, p, chances = _draft(rng, 7, "KK")
    p[2, 0] = 0
    p[2] /= p[2].sum()
    chances[2] = 0
    yield guesses, q, p, chances


def _draw(weights: Tensor, chance: Tensor) -> Tensor:
    """The first token at which the sum of probabilities exceeds the chance."""
    sums = (weights / weights.sum()).cumsum(0)
    return torch.searchsorted(sums, chance, right=True).clamp_max(len(sums) - 1)


def _residual(p: Tensor, q: Tensor, guess: Tensor) -> Tensor:
    return (p - q).clamp_min(0)


def _without(p: Tensor, q: Tensor, guess: Tensor) -> Tensor:
    return torch.where(torch.arange(len(p)) == guess, 0, p)


def _accept(guesses: Tensor, q: Tensor, p: Tensor, chances: Tensor, *,
            keep: Callable[..., Tensor] = lambda u, p, q: u < p / q,
            rest: Callable[[Tensor, Tensor, Tensor], Tensor] = _residual,
            draw: Callable[[Tensor, Tensor], Tensor] = _draw, chance: Callable[[int, int], int] = lambda n, k: n + 1,
            row: Callable[[int, int], int] = lambda n, k: n, last: Callable[[int], int] = lambda k: k,
            always: bool = False, end: bool = True, stop: bool = True, kept: str = "first", shift: int = 0,
            ) -> Tensor:  # fmt: skip
    k = len(guesses)
    looked = p[shift : k + shift].gather(1, guesses[:, None])[:, 0]
    chosen = keep(chances[:k], looked, q.gather(1, guesses[:, None])[:, 0])
    n = k if always else int(chosen.long().cumprod(0).sum())
    before = guesses[:n]
    if kept == "all":
        before = guesses[chosen]
    elif kept == "count":
        n = int(chosen.sum())
        before = guesses[:n]
    elif kept == "refused":
        before = guesses[: n + 1]
    if not (stop if n < k else end):
        return before
    if n == k:
        token = draw(p[last(k)], chances[k])
    else:
        token = draw(rest(p[row(n, k)], q[n], guesses[n]), chances[chance(n, k)])
    return torch.cat([before, token.view(1)])


def _accept_as(**options: Any) -> Callable[..., Tensor]:
    return lambda *arguments: _accept(*arguments, **options)


def _best(k_guesses: Tensor, q: Tensor, p: Tensor, chances: Tensor) -> Tensor:
    """Keep guesses as long as they are the model's most probable token."""
    best = p.argmax(-1)
    n = int((best[:-1] == k_guesses).long().cumprod(0).sum())
    return best[: n + 1]


ACCEPT = Exercise(
    "13.4", "the accept rule", "accept", minutes=20, difficulty=4,
    why="Several tokens are written in one pass of the model, and yet each is drawn from its own probabilities.",
    reference=_accept,
    cases=_accept_cases,
    wrong=(
        Wrong("the ratio is turned round: a guess that the model finds more probable than the guesser did is kept for "
              "certain.", _accept_as(keep=lambda u, p, q: u < q / p)),
        Wrong("what the guesser thinks is not looked at: a token that it guesses too seldom would come too seldom.",
              _accept_as(keep=lambda u, p, q: u < p)),
        Wrong("a guess is kept only if the model finds it at least as probable: for others the chance decides.",
              _accept_as(keep=lambda u, p, q: p >= q)),
        Wrong("a guess is kept when its chance is above the ratio, expected below.",
              _accept_as(keep=lambda u, p, q: u > p / q)),
        Wrong("a guess is kept at the chance 0 even where the model gives it none: keep it if the chance is below the "
              "ratio, not if it is equal.", _accept_as(keep=lambda u, p, q: u <= p / q)),
        Wrong("all guesses are kept: the text would be the guesser's.", _accept_as(always=True)),
        Wrong("the most probable tokens are kept and written: the model draws from its probabilities.", _best),
        Wrong("after a refusal the token is drawn from all of p: where the guesser is too seldom right, the kept "
              "guesses already give their share.", _accept_as(rest=lambda p, q, guess: p)),
        Wrong("after a refusal the token is drawn from p without the guess: that is the rule for a guesser that is "
              "certain; this one had its doubts.", _accept_as(rest=_without)),
        Wrong("after a refusal the token is drawn from q, the guesser's probabilities.",
              _accept_as(rest=lambda p, q, guess: q)),
        Wrong("what is left after a refusal is turned round: it is where p exceeds q.",
              _accept_as(rest=lambda p, q, guess: (q - p).clamp_min(0))),
        Wrong("what is left after a refusal is the distance of p and q: where p is smaller, nothing is left.",
              _accept_as(rest=lambda p, q, guess: (p - q).abs())),
        Wrong("what is left does not sum to 1: where the chance exceeds the sum, token 0 is written.",
              _accept_as(draw=lambda w, chance: (w.cumsum(0) > chance).long().argmax())),
        Wrong("what is left does not sum to 1: where the chance exceeds the sum, the number behind the last token is "
              "written.", _accept_as(draw=lambda w, chance: (w.cumsum(0) <= chance).sum())),
        Wrong("what is left does not sum to 1: where the chance exceeds the sum, the last token is written.",
              _accept_as(draw=lambda w, chance: (w.cumsum(0) <= chance).sum().clamp_max(len(w) - 1))),
        Wrong("what is left does not sum to 1: where the chance exceeds the sum, no token is found.",
              _accept_as(draw=lambda w, chance: (w.cumsum(0) > chance).nonzero()[0])),
        Wrong("what is left is p − q as it stands, which sums to 0: where q is larger nothing is left, and the rest is "
              "scaled to sum to 1.", _accept_as(rest=lambda p, q, guess: p - q,
                                                draw=lambda w, chance: (w.cumsum(0) > chance).nonzero()[0])),
        Wrong("the chance 0 draws token 0 even where its probability is 0: take the first token at which the sum "
              "exceeds the chance.",
              _accept_as(draw=lambda w, chance: torch.searchsorted((w / w.sum()).cumsum(0), chance))),
        Wrong("the last token is the most probable one of what is left: draw it.",
              _accept_as(draw=lambda w, chance: w.argmax())),
        Wrong("the last token is drawn one too early: it is the first at which the sum exceeds the chance.",
              _accept_as(draw=lambda w, chance: (_draw(w, chance) - 1).clamp_min(0))),
        Wrong("guesses behind a refused one are kept: they were guessed for a text that will not be there.",
              _accept_as(kept="all")),
        Wrong("the kept guesses are counted, wherever they stand: only those before the first refused one are left.",
              _accept_as(kept="count")),
        Wrong("the refused guess is written all the same: another token is drawn in its place.",
              _accept_as(rest=lambda p, q, guess: F.one_hot(guess, len(p)).float())),
        Wrong("the refused guess is written, and another token behind it: that token stands in its place.",
              _accept_as(kept="refused")),
        Wrong("nothing follows when all guesses are kept: the model's pass has given one more token.",
              _accept_as(end=False)),
        Wrong("nothing follows a refused guess: another token is drawn in its place.", _accept_as(stop=False)),
        Wrong("no token is drawn behind the kept guesses: one pass gives at least one.",
              _accept_as(end=False, stop=False)),
        Wrong("the refused guess's own chance is used again: it is known to be large by now, and draws late tokens too "
              "often.", _accept_as(chance=lambda n, k: n)),
        Wrong("after a refusal the last chance is used, expected the one behind the refused guess's.",
              _accept_as(chance=lambda n, k: k)),
        Wrong("after a refusal the probabilities of the place behind are used: another token is drawn for the same "
              "place.", _accept_as(row=lambda n, k: n + 1)),
        Wrong("each guess is held against the probabilities of the place behind it: p[0] is for the first guess.",
              _accept_as(shift=1, row=lambda n, k: n + 1)),
        Wrong("when all are kept, the next token is drawn from the probabilities of the last guess, which stand one "
              "row before.", _accept_as(last=lambda k: max(k - 1, 0))),
    ),
    hints=(
        "The guesser says a token with probability 0.8, the model with 0.6. How often must its guess be kept?",
        "Keep or refuse all guesses at once, and find the first that is refused. What the model finds more probable "
        "than the guesser is what is still missing: draw from it.",
        "p and q of the guesses · chance below the ratio · product from the front, summed up: how many are kept · what "
        "p exceeds q by there, or the last row of p · divided by its sum · summed up: first place above the chance.",
    ),
    tolerance=0.0,
    blocked=("minillama.generation.stream_lookup", "torch.multinomial", "torch.Tensor.multinomial"),
    slow=lambda rng: ((q := torch.softmax(torch.randn(20000, 8, generator=rng), -1)).argmax(-1), q,
                      torch.cat([q, q[:1]]), torch.rand(20001, generator=rng)),
)  # fmt: skip


# 13.5 ----------------------------------------------------------------------------------------------------------------

_FIELDS = ("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "ffn_dim", "vocab_size", "tie_embeddings")


def _limit_cases(rng: torch.Generator) -> Iterable[tuple[Any, ...]]:
    batch, tokens = torch.randint(2, 9, (2,), generator=rng).tolist()
    for numbers, bits, rows, context, bandwidth, flops in (
        ((4096, 32, 32, 8, 128, 14336, 128256, False), 5.0, 1, 2048, 1e11, 2e12),
        ((4096, 32, 32, 8, 128, 14336, 128256, False), 16.0, 512, 4000, 3.35e12, 5e13),
        ((576, 30, 9, 3, 48, 1536, 49152, True), 8.5, 3, 100 * tokens, 3e10, 1e12),
        ((576, 30, 9, 3, 48, 1536, 49152, True), 4.5, 64, 300, 1e12, 1e12),
        ((640, 7, 8, 4, 64, 1056, 1000, True), 32.0, batch, 6000, 3e10, 1e12),
        ((640, 7, 8, 4, 64, 1056, 1000, False), 16.0, batch, 50 * tokens, 1e11, 1e10),
        ((96, 1, 6, 2, 32, 64, 320, False), 5.0, 1, 1, 1e3, 1e9),
    ):
        yield dict(zip(_FIELDS, numbers, strict=True)), bits, rows, context, bandwidth, flops


def _limit_reference(config: dict[str, Any], bits: float, batch: int, context: int, bandwidth: float, flops: float,
                     ) -> float:  # fmt: skip
    whole = ModelConfig(**config, max_seq_len=8192)
    parts = whole.n_params_by_part()
    matrices = parts["attention"] + parts["feedforward"] + whole.vocab_size * whole.dim
    read = matrices * bits / 8 + whole.kv_cache_bytes(batch, context, "bfloat16")
    return max(read / bandwidth, batch * whole.flops_per_token(context) / flops)


def _limit(config: dict[str, Any], bits: float, batch: int, context: int, bandwidth: float, flops: float, *,
           larger: Callable[[float, float], float] = max, read_again: bool = False, per_row: bool = True,
           byte: float = 8, multiply_add: int = 2, cached: bool = True, kv: bool = True, shared: bool = True,
           folded: bool = False, own_dim: bool = True, rows: bool = True, ffn: int = 3, both: int = 2,
           products: int = 2, layers: bool = True, cache_bits: Callable[[float], float] = lambda bits: 16,
           tables: Callable[[bool], int] = lambda tied: 1, used: Callable[[bool], int] = lambda tied: 1,
           square: bool = False, outputs: int = 1, seen_rows: bool = True, seen_layers: bool = True,
           whole: Callable[[float], float] = lambda size: size) -> float:  # fmt: skip
    dim, n, heads, kv_heads, head_dim, ffn_dim, vocab, tied = (config[name] for name in _FIELDS)
    wide = head_dim if own_dim else dim // heads
    groups = kv_heads if shared else heads
    queries = dim if square else wide * heads
    blocks = n * (dim * ((1 + outputs) * queries + 2 * wide * groups) + ffn * dim * ffn_dim)
    table = vocab * dim
    weights = (blocks + tables(tied) * table) * whole(bits / byte) * (batch if read_again else 1)
    past = both * (n if layers else 1) * context * (kv_heads if kv else heads) * wide * cache_bits(bits) / 8
    read = weights + (past * (batch if per_row else 1) if cached else 0)
    seen = products * (n if seen_layers else 1) * context * (kv_heads if folded else heads) * wide
    matrices = (blocks + used(tied) * table) * (batch if rows else 1)
    done = multiply_add * (matrices + seen * (batch if seen_rows else 1))
    return larger(read / bandwidth, done / flops)


def _limit_as(**options: Any) -> Callable[..., float]:
    return lambda *arguments: _limit(*arguments, **options)


LIMIT = Exercise(
    "13.5", "the roofline", "limit", minutes=15, difficulty=3,
    why="How fast a model can write at best is known before a line of it is made fast, and says when to stop.",
    reference=_limit_reference,
    cases=_limit_cases,
    wrong=(
        Wrong("the two times are added: reading and multiplying go on at once, and the longer one sets the limit.",
              _limit_as(larger=lambda a, b: a + b)),
        Wrong("the shorter time is taken: both must be done, and the longer one sets the limit.",
              _limit_as(larger=min)),
        Wrong("only reading is counted: with many texts multiplying takes longer.",
              _limit_as(larger=lambda a, b: a)),
        Wrong("only multiplying is counted: with few texts reading takes longer.",
              _limit_as(larger=lambda a, b: b)),
        Wrong("the weights are read for each text: they are read once a step, which is why batches pay.",
              _limit_as(read_again=True)),
        Wrong("the cache is read once for all texts: each text has its own.", _limit_as(per_row=False)),
        Wrong("the cache is not read: each new token looks at all before it.", _limit_as(cached=False)),
        Wrong("bits are taken as bytes: a byte has 8 of them.", _limit_as(byte=1)),
        Wrong("a multiplication and an addition are counted as one operation: they are two.",
              _limit_as(multiply_add=1)),
        Wrong("the operations are one text's: each text has its own.", _limit_as(rows=False, seen_rows=False)),
        Wrong("the matrices are multiplied for one text only: they are read once, but used for each text.",
              _limit_as(rows=False)),
        Wrong("the products of attention are one text's: each text has its own.", _limit_as(seen_rows=False)),
        Wrong("the products of attention are one layer's: each layer has its own.", _limit_as(seen_layers=False)),
        Wrong("the cache has a place for every query head: it holds keys and values, of which there are n_kv_heads.",
              _limit_as(kv=False)),
        Wrong("wk and wv are as large as wq: they have n_kv_heads heads.", _limit_as(shared=False)),
        Wrong("all is counted with n_heads: wk, wv and the cache have n_kv_heads.",
              _limit_as(kv=False, shared=False)),
        Wrong("the products of attention are counted for n_kv_heads: keys are read once for a group, but each of its "
              "queries is multiplied with them.", _limit_as(folded=True)),
        Wrong("dim / n_heads is taken for head_dim: a config may give another one.", _limit_as(own_dim=False)),
        Wrong("wq and wo are taken to be dim by dim: their n_heads heads of head_dim may be more or fewer than dim.",
              _limit_as(square=True)),
        Wrong("one of wq and wo is missing: attention has four matrices.", _limit_as(outputs=0)),
        Wrong("bits are cut to whole bytes: a weight may have 4 or 5 bits, which is less than one.",
              _limit_as(whole=math.floor)),
        Wrong("the cache has only keys, or only values: it holds both.", _limit_as(both=1)),
        Wrong("the cache is one layer's: each layer has its own.", _limit_as(layers=False)),
        Wrong("the cache is counted with the bits of the weights: it stays in bf16.",
              _limit_as(cache_bits=lambda bits: bits)),
        Wrong("the products of attention are missing: queries with keys, and probabilities with values.",
              _limit_as(products=0)),
        Wrong("attention has one product: after queries with keys come probabilities with values.",
              _limit_as(products=1)),
        Wrong("the feed-forward layer has two matrices: gate, up and down are three.", _limit_as(ffn=2)),
        Wrong("the output is left out: whether it is tied or not, its matrix is read and multiplied.",
              _limit_as(tables=lambda tied: 0, used=lambda tied: 0)),
        Wrong("a tied output is left out: the table of embeddings is read and multiplied there.",
              _limit_as(tables=lambda tied: 0 if tied else 1, used=lambda tied: 0 if tied else 1)),
        Wrong("the whole table of embeddings is read where it is not tied: a token needs one row of it.",
              _limit_as(tables=lambda tied: 1 if tied else 2)),
        Wrong("the table of embeddings is read and multiplied where it is not tied: a token looks one row of it up.",
              _limit_as(tables=lambda tied: 1 if tied else 2, used=lambda tied: 1 if tied else 2)),
        Wrong("the embeddings are counted beside the output: looking up costs nothing, and a tied table counts once.",
              _limit_as(tables=lambda tied: 2, used=lambda tied: 2)),
        Wrong("these are steps a second, expected the seconds of a step.",
              lambda *a: 1 / _limit(*a)),
        Wrong("these are tokens a second, expected the seconds of a step.",
              lambda *a: a[2] / _limit(*a)),
        Wrong("these are the seconds of one token: a step gives one to each text, expected its seconds.",
              lambda *a: _limit(*a) / a[2]),
        Wrong("these are milliseconds, expected seconds.", lambda *a: 1000 * _limit(*a)),
    ),
    hints=(
        "Eight texts are written at once: how often is a weight read in one step, and how often is it used?",
        "Count the numbers in matrices once: their bits are read, and each is multiplied and added for every text. "
        "The cache and what is done with it come on top, for every text.",
        "matrices of the layers and of the output · bits to bytes · keys and values of each text, two bytes · by the "
        "bandwidth; twice the matrices and both products with the cache, for every text · by the operations a second "
        "· the longer one.",
    ),
    tolerance=1e-9,
    blocked=("minillama.config.ModelConfig.n_params", "minillama.config.ModelConfig.n_params_by_part",
             "minillama.config.ModelConfig.bytes", "minillama.config.ModelConfig.kv_cache_bytes",
             "minillama.config.ModelConfig.flops_per_token", "minillama.roofline.bytes_per_token"),
)  # fmt: skip


# 13.6 ----------------------------------------------------------------------------------------------------------------

_WAYS: dict[str, tuple[int, int | str]] = {
    "4 bits, a matrix": (4, "matrix"),
    "4 bits, groups of 32": (4, 32),
    "3 bits, a matrix": (3, "matrix"),
    "3 bits, a row": (3, "row"),
    "3 bits, groups of 32": (3, 32),
    "2 bits, groups of 32": (2, 32),
}


def _rounded(weight: Tensor, bits: int, group: int | str, symmetric: bool) -> Tensor:
    size = weight.numel() if group == "matrix" else weight.shape[1] if group == "row" else int(group)
    grouped = weight.reshape(-1, size)
    if symmetric:
        low, scales = torch.zeros(()), grouped.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    else:
        low = grouped.amin(1, keepdim=True)
        scales = (grouped.amax(1, keepdim=True) - low) / (2**bits - 1)
    return (((grouped - low) / _or_one(scales)).round() * scales + low).view_as(weight)


def _losses(*, symmetric: bool = False, embedding: bool = True, again: bool = False) -> dict[str, float]:
    """The toy's loss with its matrices rounded in each way. again: those that are rounded already."""
    model, tokenizer = load("toy")
    assert tokenizer is not None
    batches = story_validation(tokenizer, 20, seed=0).batches
    matrices = [w for name, w in model.named_parameters() if w.dim() == 2 and (embedding or "embedding" not in name)]
    exact = [w.detach().clone() for w in matrices]
    losses = {}
    for name, way in _WAYS.items():
        for w, before in zip(matrices, exact, strict=True):
            w.data = _rounded(w.detach() if again else before, *way, symmetric)
        losses[name] = mean_loss(model, batches)
    return losses


def _fit(measured: dict[str, Any], true: dict[str, float]) -> bool:
    return all(abs(measured[key] - value) <= 0.005 * value for key, value in true.items())


def _verify(measured: dict[str, Any]) -> str:
    if not measured["predicted"] > 0:
        return f"the prediction is {measured['predicted']}, expected a loss in nats per token, above 0."
    true = _losses()
    if _fit(measured, true):
        return ""
    if _fit(measured, {key: math.exp(value) for key, value in true.items()}):
        return "these are perplexities, expected losses in nats per token, their logarithms."
    _, tokenizer = load("toy")
    assert tokenizer is not None
    floor = story_validation(tokenizer, 20, seed=0).floor
    assert floor is not None
    if all(abs(measured[key] + floor - value) <= 0.005 * value for key, value in true.items()):
        return "these are distances to the floor, or to the exact toy's loss, expected the losses themselves."
    for message, other in _OTHERS.items():
        if _fit(measured, _losses(**other)):
            return message
    first = next(key for key, value in true.items() if not _fit(measured, {key: value}))
    bits, group = _WAYS[first]
    return (
        f"{first!r} is not what the 20 stories of seed 0 give: round the embedding and each matrix of the blocks to "
        f"{2**bits} values from the smallest to the largest {_PARTS[group]}, beginning with the exact weights."
    )


_PARTS: dict[int | str, str] = {"matrix": "of the matrix", "row": "of each row", 32: "of each group"}
_OTHERS: dict[str, dict[str, bool]] = {
    "these are the losses with codes around 0: let them count up from the smallest weight, as in 13.2.":
        {"symmetric": True},
    "these are the losses with an exact embedding: round it, too, it is a fifth of the toy.": {"embedding": False},
    "these are the losses of weights that were rounded one time after the other: each way begins with the exact ones.":
        {"again": True},
}  # fmt: skip

EXPERIMENT = Experiment(
    "13.6", "experiment: bits and groups", "measured_13", minutes=20, difficulty=3,
    why="How many bits a model needs is a question that only a measurement answers, and groups change the answer.",
    keys={
        "predicted": "the loss that you expect with 2 bits in groups of 32, in nats per token, before you measure",
        "4 bits, a matrix": "the loss with 4 bits and one scale for a matrix, in nats per token",
        "4 bits, groups of 32": "the loss with 4 bits and a scale for 32 weights, in nats per token",
        "3 bits, a matrix": "the loss with 3 bits and one scale for a matrix, in nats per token",
        "3 bits, a row": "the loss with 3 bits and a scale for a row, in nats per token",
        "3 bits, groups of 32": "the loss with 3 bits and a scale for 32 weights, in nats per token",
        "2 bits, groups of 32": "the loss with 2 bits and a scale for 32 weights, in nats per token",
        "because": "a sentence on why",
    },
    verify=_verify,
    explain="on what a group has to do with the size of a step",
    hints=(
        "The largest weight of a matrix is ten times as large as most: how many of 8 values are left for the others?",
        "Keep the exact matrices. For each way put their rounded selves into the model, and measure.",
        "load · all parameters of two axes, copied · for each way: reshape to groups, smallest, step, nearest, back, "
        "into the model · mean_loss on story_validation(tokenizer, 20, seed=0).",
    ),
)  # fmt: skip


EXERCISES: list[Task] = [INT8, INT4, CACHE, ACCEPT, LIMIT, EXPERIMENT]
