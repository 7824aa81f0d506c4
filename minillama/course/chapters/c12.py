"""Exercises of chapter 12, real checkpoints."""

import json
import math
import re
import struct
from collections.abc import Callable, Iterable
from typing import Any

import torch
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize
from torch import Tensor

from minillama.checkpoint import load
from minillama.checkpoint.names import HUGGING_FACE, expand
from minillama.config import ModelConfig
from minillama.course.exercise import Exercise, Experiment, Task, Wrong
from minillama.data import story_validation
from minillama.rope import halves_to_pairs, pairs_to_halves
from minillama.trainer import mean_loss

# 12.1 ----------------------------------------------------------------------------------------------------------------

_SIZES = {"F32": 4, "F16": 2, "BF16": 2, "I64": 8, "U8": 1}  # bytes of one number
_Entry = tuple[str, str, list[int], int, int]  # name, dtype, shape, start and end within the data part


def _file(entries: Iterable[_Entry], size: int, rng: torch.Generator, *, note: bool = False, pad: int = 0) -> bytes:
    """A safetensors file with a data part of `size` bytes, and `pad` spaces behind its header."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}} if note else {}
    for name, dtype, shape, start, end in entries:
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, ensure_ascii=False).encode() + b" " * pad
    return len(text).to_bytes(8, "little") + text + bytes(torch.randint(256, (size,), generator=rng).tolist())


def _header_cases(rng: torch.Generator) -> Iterable[tuple[Any, ...]]:
    rows, columns = torch.randint(3, 9, (2,), generator=rng).tolist()
    n = 4 * rows * columns
    a: _Entry = ("a.weight", "F32", [rows, columns], 0, n)
    files = [
        # right ones: a header that is not in the data's order; a scalar; nothing but a note
        _file([("b.weight", "BF16", [rows + 9], n, n + 2 * rows + 18), a], n + 2 * rows + 18, rng, note=True, pad=5),
        _file([("größe", "I64", [], 0, 8), ("u", "U8", [2, 1, rows], 8, 8 + 2 * rows)], 8 + 2 * rows, rng),
        _file([], 0, rng, note=True, pad=3),
        # bytes shared; shared and a gap as long; beyond the end; a gap; bytes left over; a shape that does not fit
        _file([a, ("b", "F16", [20], n - 16, n + 24)], n + 24, rng),
        _file([a, ("b", "F32", [6], n - 8, n + 16), ("c", "F32", [3], n + 24, n + 36)], n + 36, rng, note=True),
        _file([a, ("b", "BF16", [20], n, n + 40)], n + 24, rng),
        _file([a, ("b", "F32", [2], n + 8, n + 16)], n + 16, rng),
        _file([a], n + 4, rng),
        _file([("a.weight", "F32", [rows, columns], 0, n - 4)], n - 4, rng),
        # cut short: within the header, and within its length
        (12).to_bytes(8, "little") + b"{}",
        (64).to_bytes(8, "little")[:5],
        # right ones with an empty tensor, which begins where another does, named before it and after it
        _file([a, ("none", "F16", [0, columns], n, n), ("u", "U8", [rows], n, n + rows)], n + rows, rng),
        _file([a, ("none", "F16", [columns, 0], 0, 0)], n, rng),
        # bytes of none before the first tensor; a length that is out of bounds in its upper bytes only
        _file([("a.weight", "F32", [rows, columns], 4, n + 4)], n + 4, rng),
        (2 + 2**40).to_bytes(8, "little") + b"{}",
    ]  # fmt: skip
    return [(data,) for data in files]


def _fills(places: list[tuple[int, int]], size: int, how: str) -> bool:
    """Whether places in a data part of `size` bytes are as they should be, looked at in one of several ways."""
    bounds = all(0 <= start <= end <= size for start, end in places)
    ordered = {"unsorted": places, "by start": sorted(places, key=lambda place: place[0])}.get(how, sorted(places))
    pairs = list(zip(ordered, ordered[1:], strict=False))
    apart = all(one[1] <= other[0] for one, other in pairs)
    ends = [0, *(end for _, end in ordered)]
    chain = all(start == end for (start, _), end in zip(ordered, ends, strict=False))
    return {
        "nothing": True,
        "bounds": bounds,
        "apart": bounds and apart,
        "apart only": apart,
        "sum": bounds and sum(end - start for start, end in places) == size,
        "open end": chain,
        "covered": bounds and len({i for start, end in places for i in range(start, end)}) == size,
        "open start": ends[-1] == size and all(one[1] == other[0] for one, other in pairs),
    }.get(how, chain and ends[-1] == size)


def _from_four(data: bytes, order: Any) -> int:
    return int.from_bytes(data[:4], order)


def _from_struct(data: bytes, order: str) -> int:
    return int(struct.unpack("<Q", data[:8])[0])


def _read_header(data: bytes, *, number: Callable[..., int] = int.from_bytes, order: Any = "little",
                 base: Callable[[int, bytes], int] = lambda n, text: 8 + n, noted: bool = False, length: bool = True,
                 shape: str = "bytes", fills: str = "exact", turn: bool = False,
                 count: Callable[[list[int]], int] = math.prod) -> dict[str, Any]:  # fmt: skip
    n = number(data[:8], order)
    if length and 8 + n > len(data):
        raise ValueError("the header is longer than the file")
    text = data[8 : 8 + n]
    found, first = {}, base(n, text)
    for name, entry in json.loads(text).items():
        if name == "__metadata__" and not noted:
            continue
        (start, end), size = entry["data_offsets"], count(entry["shape"])
        if shape != "unchecked" and end - start != size * (_SIZES[entry["dtype"]] if shape == "bytes" else 1):
            raise ValueError(f"{name} has {end - start} bytes")
        found[name] = (entry["dtype"], tuple(entry["shape"])[:: -1 if turn else 1], start, end)
    if not _fills([(start, end) for *_, start, end in found.values()], len(data) - 8 - n, fills):
        raise ValueError("the tensors do not fill the data part")
    return {name: (dtype, size, first + start, first + end) for name, (dtype, size, start, end) in found.items()}


HEADER = Exercise(
    "12.1", "a safetensors header", "read_header", minutes=20, difficulty=3,
    why="Eight bytes and a piece of JSON say where every weight lies; a reader that believes them can be fooled.",
    reference=lambda data: _read_header(data),
    cases=_header_cases,
    wrong=(
        Wrong("the length is read with its largest byte first: the format puts the smallest first (little-endian).",
              lambda data: _read_header(data, order="big")),
        Wrong("start and end count from the data part: as places in the file they lie behind length and header.",
              lambda data: _read_header(data, base=lambda n, text: 0)),
        Wrong("the header's own length is not counted: the data begin behind it, not behind the first 8 bytes.",
              lambda data: _read_header(data, base=lambda n, text: 8)),
        Wrong("start and end are 8 too small: the header does not count the 8 bytes that hold its length.",
              lambda data: _read_header(data, base=lambda n, text: n)),
        Wrong("the data part is taken to begin behind the last brace: the spaces that pad a header belong to it.",
              lambda data: _read_header(data, base=lambda n, text: 8 + len(text.rstrip()))),
        Wrong("`__metadata__` is taken for a tensor: it is a note with neither dtype nor shape nor place.",
              lambda data: _read_header(data, noted=True)),
        Wrong("a header that is said to be longer than the file is believed: compare before you read it.",
              lambda data: _read_header(data, length=False)),
        Wrong("a file of less than 8 bytes is not refused but stumbles in struct, expected ValueError.",
              lambda data: _read_header(data, number=_from_struct)),
        Wrong("all is believed: the length, the shapes and the places must fit the file, or ValueError is raised.",
              lambda data: _read_header(data, length=False, shape="unchecked", fills="nothing")),
        Wrong("all is believed: the length, the shapes and the places must fit the file, or ValueError is raised, not "
              "struct's own error.",
              lambda data: _read_header(data, number=_from_struct, length=False, shape="unchecked", fills="nothing")),
        Wrong("shapes are not compared with the bytes: a tensor would be read with too few of them, or too many.",
              lambda data: _read_header(data, shape="unchecked")),
        Wrong("how many numbers a shape has is compared with how many bytes it has: the dtype's size is missing.",
              lambda data: _read_header(data, shape="numbers")),
        Wrong("where tensors lie is not looked at: they may reach beyond the file, share bytes, or leave some out.",
              lambda data: _read_header(data, fills="nothing")),
        Wrong("only the bounds are looked at: tensors that share bytes pass, and bytes of none.",
              lambda data: _read_header(data, fills="bounds")),
        Wrong("tensors that share bytes are noticed, but bytes that belong to none are not.",
              lambda data: _read_header(data, fills="apart")),
        Wrong("tensors that share bytes are noticed, but none that reaches beyond the file, and no gap.",
              lambda data: _read_header(data, fills="apart only")),
        Wrong("only the sum of all bytes is looked at: where two tensors share as many as a gap has, it is right.",
              lambda data: _read_header(data, fills="sum")),
        Wrong("the end of the last tensor is not compared with the end of the file.",
              lambda data: _read_header(data, fills="open end")),
        Wrong("the tensors are expected in the header's order: it may name them in another one than they lie.",
              lambda data: _read_header(data, fills="unsorted")),
        Wrong("bytes that belong to no tensor are noticed, but bytes that belong to two are not.",
              lambda data: _read_header(data, fills="covered")),
        Wrong("the beginning of the first tensor is not compared with the beginning of the data part: bytes between "
              "header and tensor belong to none.", lambda data: _read_header(data, fills="open start")),
        Wrong("tensors are put in order by their beginning alone: an empty one may then come behind another that "
              "begins at the same place, and a good file is refused.",
              lambda data: _read_header(data, fills="by start")),
        Wrong("only four bytes of the length are read: it has 8, and those above may not be 0.",
              lambda data: _read_header(data, number=_from_four)),
        Wrong("the shape `[]` is counted as no number at all: it is that of a single one.",
              lambda data: _read_header(data, count=lambda shape: math.prod(shape) if shape else 0)),
        Wrong("an empty tensor is counted as one number: a shape with a 0 in it has none.",
              lambda data: _read_header(data, count=lambda shape: math.prod(shape) or 1)),
        Wrong("the shapes are turned round: that is GGUF's order; here they are as in PyTorch.",
              lambda data: _read_header(data, turn=True)),
    ),
    hints=(
        "A header of 100 bytes says that a tensor begins at 0. At which place of the file is its first byte?",
        "Compare the length with the file before you read, each shape with its bytes, and then put the tensors in the "
        "order in which they lie: each begins where the one before it ends.",
        "length from 8 bytes, smallest first · beyond the end? · JSON · leave out the note · product of the shape "
        "times size of dtype · sorted by place, follow them from the first byte of data to the last of the file.",
    ),
    tolerance=0.0,
    blocked=("safetensors.deserialize", "safetensors.torch.load", "safetensors.torch.load_file",
             "safetensors.numpy.load", "safetensors.numpy.load_file"),
)  # fmt: skip


# 12.2 ----------------------------------------------------------------------------------------------------------------

_OTHERS = (
    "model.layers.{i}.self_attn.q_proj.bias",  # not LLaMA's
    "model.layers.{i}.self_attn.v_proj.weight.absmax",  # of a quantized checkpoint
    "vision.model.layers.{i}.mlp.up_proj.weight",  # of a model with two towers
    "model.layers.first.mlp.gate_proj.weight",
    "model.layers.{i}.norm.weight",
    "model.embed_tokens",
)


def _name_cases(rng: torch.Generator) -> Iterable[tuple[Any, ...]]:
    names = [*HUGGING_FACE, *_OTHERS, "model.layers.{i}.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"]
    numbers = torch.randint(2, 10, (len(names),), generator=rng).tolist()
    cases = [(name.format(i=i),) for name, i in zip(names, numbers, strict=True)]
    far = torch.randint(10, 80, (2,), generator=rng).tolist()
    more = zip((11, 0, *far), ("self_attn.k_proj", "mlp.down_proj", "input_layernorm", "mlp.up_proj"), strict=True)
    return cases + [(f"model.layers.{i}.{part}.weight",) for i, part in more]


_NAMES = expand(HUGGING_FACE, 100)


def _our_name(theirs: str) -> str | None:
    if theirs.endswith("rotary_emb.inv_freq"):
        return None
    if theirs not in _NAMES:
        raise ValueError(f"{theirs} is not one of LLaMA's weights")
    return _NAMES[theirs]


def _swapped(one: str, other: str) -> Callable[[str], str | None]:
    """Our names, with two words exchanged."""

    def name(theirs: str) -> str | None:
        ours = _our_name(theirs)
        return ours and re.sub(f"{one}|{other}", lambda found: other if found[0] == one else one, ours)

    return name


def _changed(pattern: str, instead: str | Callable[[re.Match[str]], str]) -> Callable[[str], str | None]:
    """Our names, with something done to them."""

    def name(theirs: str) -> str | None:
        ours = _our_name(theirs)
        return ours and re.sub(pattern, instead, ours)

    return name


def _lenient(pattern: str, instead: str = "") -> Callable[[str], str | None]:
    """The name of what is left of a name if a part of it is not looked at."""
    return lambda theirs: _our_name(re.sub(pattern, instead, theirs))


def _unknown(outcome: Callable[[], None]) -> Callable[[str], str | None]:
    def name(theirs: str) -> str | None:
        try:
            return _our_name(theirs)
        except ValueError:
            return outcome()  # type: ignore[func-returns-value]

    return name


def _key_error() -> None:
    raise KeyError("not in the table")


def _one_digit(theirs: str) -> str | None:
    if re.search(r"layers\.\d\d", theirs) and not theirs.endswith("inv_freq"):
        raise ValueError("no such layer")
    return _our_name(theirs)


def _refuses_derived(theirs: str) -> str | None:
    if theirs.endswith("inv_freq"):
        raise ValueError("not a weight")
    return _our_name(theirs)


def _refuses_old_derived(theirs: str) -> str | None:
    if theirs == "model.rotary_emb.inv_freq":
        raise ValueError("not a weight")
    return _our_name(theirs)


def _bias_too(theirs: str) -> str | None:
    ours = _our_name(theirs.replace(".bias", ".weight"))
    return ours and ours.replace("weight", "bias") if theirs.endswith("bias") else ours


def _any_layer(theirs: str) -> str | None:
    ours = _our_name(theirs.replace("layers.first", "layers.0"))
    return ours and ours.replace("blocks.0", "blocks.first") if "first" in theirs else ours


RENAME = Exercise(
    "12.2", "the rename table", "our_name", minutes=10, difficulty=2,
    why="Two weights of one shape under each other's name load without an error, and the model talks nonsense.",
    reference=_our_name,
    cases=_name_cases,
    wrong=(
        Wrong("layer 11 becomes layer 1: a number may have several digits.",
              _changed(r"\.(\d)\d+\.", r".\1.")),
        Wrong("layers from 10 on are refused: a number may have several digits.", _one_digit),
        Wrong("the layers are counted from 1: ours begin at 0, as theirs do.",
              _changed(r"\.(\d+)\.", lambda found: f".{int(found[1]) + 1}.")),
        Wrong("the two norms of a block are exchanged: `post_attention_layernorm` comes after attention, so before the "
              "feed-forward layer.", _swapped("attention_norm", "feedforward_norm")),
        Wrong("gate and up are exchanged: they have the same shape, so nothing but the text will tell.",
              _swapped("gate", "up")),
        Wrong("up and down are exchanged: up widens, down narrows.", _swapped("up", "down")),
        Wrong("gate and down are exchanged.", _swapped("gate", "down")),
        Wrong("keys and values are exchanged: they have the same shape, so nothing but the text will tell.",
              _swapped("wk", "wv")),
        Wrong("queries and keys are exchanged.", _swapped("wq", "wk")),
        Wrong("queries and the output of attention are exchanged.", _swapped("wq", "wo")),
        Wrong("the embedding and the output are exchanged: they have the same shape.",
              _swapped("embedding", "output")),
        Wrong("`lm_head.weight` is taken for a derived key: it is one only where the config ties it to the embedding, "
              "and the name does not say that.",
              lambda theirs: None if theirs == "lm_head.weight" else _our_name(theirs)),
        Wrong("a block is called as they call it: ours are `blocks`.", _changed("blocks", "layers")),
        Wrong("the names lack their end: a parameter's name has `.weight` in it.", _changed(r"\.weight$", "")),
        Wrong("a name that nobody knows gives None, and would be left out without a word: refuse it.",
              _unknown(lambda: None)),
        Wrong("a name that nobody knows raises KeyError, expected ValueError.", _unknown(_key_error)),
        Wrong("the rotary frequencies are refused: they follow from the config, so they give None.", _refuses_derived),
        Wrong("the rotary frequencies give None within a layer only: in some files they stand outside of the layers.",
              _refuses_old_derived),
        Wrong("a bias gets a name: LLaMA has none, and a model that has one is another model.", _bias_too),
        Wrong("the end of the name is not looked at: what follows `.weight` makes it another tensor.",
              _lenient(r"(?<=\.weight)\..*")),
        Wrong("the beginning of the name is not looked at: the same names occur in the parts of other models.",
              _lenient(r"^vision\.")),
        Wrong("any word passes for the number of a layer.", _any_layer),
    ),
    hints=(
        "Which norm would you expect behind the words post-attention: the one that attention reads, or the next one?",
        "Three names stand outside of the layers. For all others, split the number off, and look up what follows it; "
        "the whole name must fit.",
        "derived? None · one of the three? · a pattern for the whole name with a group of digits and a group for the "
        "rest · nine entries · no match or no entry: ValueError.",
    ),
    tolerance=0.0,
    blocked=("minillama.checkpoint.names.expand", "minillama.checkpoint.huggingface.expand",
             "minillama.checkpoint.export.expand"),
)  # fmt: skip


# 12.3 ----------------------------------------------------------------------------------------------------------------


def _cut(whole: Tensor, shards: int, axis: int) -> tuple[list[Tensor], tuple[int, ...]]:
    return [part.clone() for part in whole.chunk(shards, axis)], tuple(whole.shape)


def _shard_cases(rng: torch.Generator) -> Iterable[tuple[Any, ...]]:
    yield _cut(torch.randn(6, 5, generator=rng), 2, 0)
    yield _cut(torch.randn(7, 8, generator=rng), 2, 1)
    yield _cut(torch.randn(8, 8, generator=rng) * 1e4, 4, 1)
    yield _cut(torch.randn(8, 4, generator=rng).bfloat16(), 4, 0)
    norm = torch.randn(6, generator=rng)
    yield [norm, norm.clone(), norm.clone()], (6,)
    yield [torch.randn(3, 7, generator=rng)], (3, 7)
    yield _cut(torch.randn(4, 6, generator=rng).bfloat16(), 2, 1)
    yield [torch.randn(2, 5, generator=rng) for _ in range(2)], (5, 5)  # a shard is missing
    yield [torch.randn(3, 5, generator=rng) for _ in range(2)], (6, 10)  # two of four quarters
    yield [norm, norm.clone()], (7,)  # a norm of another model
    yield [torch.randn(3, 7, generator=rng)], (4, 7)  # the only shard, of another model


def _axis(part: Tensor, whole: tuple[int, ...]) -> int:
    """The first axis along which a part is not whole."""
    return next((i for i, size in enumerate(whole) if part.shape[i] != size), 0)


def _join(parts: list[Tensor], whole: tuple[int, ...]) -> Tensor:
    if all(part.shape == whole for part in parts):
        return parts[0].clone()
    joined = torch.cat(parts, _axis(parts[0], whole))
    if joined.shape != whole:
        raise ValueError(f"the parts make {tuple(joined.shape)}, expected {whole}")
    return joined


def _as(way: Callable[[list[Tensor], tuple[int, ...]], Tensor], *, checked: bool = False, norms: bool = False,
        ) -> Callable[[list[Tensor], tuple[int, ...]], Tensor]:  # fmt: skip
    """Join what is cut in another way, and norms only if asked to; perhaps with a look at the shape in the end."""

    def join(parts: list[Tensor], whole: tuple[int, ...]) -> Tensor:
        if not norms and all(part.shape == whole for part in parts):
            return parts[0].clone()
        joined = way(parts, whole)
        if checked and joined.shape != whole:
            raise ValueError("the shape does not fit")
        return joined

    return join


def _sums_up(parts: list[Tensor], whole: tuple[int, ...]) -> Tensor:
    """Along the first axis whose sizes sum up to the whole's, whatever the others are."""
    for axis, size in enumerate(whole):
        if sum(part.shape[axis] for part in parts) == size:
            return torch.cat(parts, axis)
    raise ValueError("no axis fits")


def _norms_as(norm: Callable[[list[Tensor]], Tensor]) -> Callable[[list[Tensor], tuple[int, ...]], Tensor]:
    return lambda parts, whole: norm(parts) if len(whole) == 1 else _join(parts, whole)


def _refuses_norms(parts: list[Tensor], whole: tuple[int, ...]) -> Tensor:
    if len(whole) == 1:
        raise ValueError("the shape does not fit")
    return _join(parts, whole)


_unchecked = _as(lambda parts, whole: torch.cat(parts, _axis(parts[0], whole)))


def _tries_both(parts: list[Tensor], whole: tuple[int, ...]) -> Tensor:
    if any(part.shape != whole for part in parts):
        parts = [joined for joined in (torch.cat(parts, axis) for axis in (0, 1)) if joined.shape == whole]
    if not parts:
        raise ValueError("no axis fits")
    return parts[0].clone()


JOIN = Exercise(
    "12.3", "join Meta's shards", "join", minutes=20, difficulty=3,
    why="A model that was cut for eight GPUs is joined on one laptop; nothing but the shapes says how it was cut.",
    reference=_join,
    cases=_shard_cases,
    wrong=(
        Wrong("the parts are always joined along the rows: some matrices were cut across their columns.",
              _as(lambda parts, whole: torch.cat(parts))),
        Wrong("the parts are only ever joined along the rows, so those that were cut across their columns are refused.",
              _as(lambda parts, whole: torch.cat(parts), checked=True)),
        Wrong("the parts are always joined along the columns: some matrices were cut across their rows.",
              _as(lambda parts, whole: torch.cat(parts, -1))),
        Wrong("the parts are only ever joined along the columns, so those that were cut across their rows are refused.",
              _as(lambda parts, whole: torch.cat(parts, -1), checked=True)),
        Wrong("rows and columns are exchanged: the parts are joined along the axis that is whole in each.",
              _as(lambda parts, whole: torch.cat(parts, 1 - _axis(parts[0], whole)))),
        Wrong("the parts are added up: each holds other rows or columns of the matrix.",
              _as(lambda parts, whole: torch.stack(parts).sum(0), norms=True)),
        Wrong("the norms are joined end to end: each shard has the whole norm.",
              _norms_as(lambda parts: torch.cat(parts))),
        Wrong("the norms are added up: each shard has the whole norm, so one is enough.",
              _norms_as(lambda parts: torch.stack(parts).sum(0))),
        Wrong("the norms are refused: each shard has the whole norm, so one is enough.", _refuses_norms),
        Wrong("the order of the shards is reversed.",
              lambda parts, whole: _join(parts[::-1], whole)),
        Wrong("the axis is right, but no shape is refused: parts that do not make the whole must raise ValueError.",
              _unchecked),
        Wrong("a norm is taken as it is, whatever the whole's shape: one of another length must raise ValueError.",
              lambda parts, whole: parts[0].clone() if len(whole) == 1 else _join(parts, whole)),
        Wrong("an only part is taken as it is, whatever the whole's shape: if they differ, ValueError must be raised.",
              lambda parts, whole: parts[0].clone() if len(parts) == 1 else _join(parts, whole)),
        Wrong("norms and an only part are taken as they are: if the whole has another shape, ValueError must be "
              "raised.",
              lambda parts, whole: parts[0].clone() if 1 in (len(parts), len(whole)) else _join(parts, whole)),
        Wrong("norms are taken as they are, and no shape is refused: parts that do not make the whole must raise "
              "ValueError.", lambda parts, whole: parts[0].clone() if len(whole) == 1 else _unchecked(parts, whole)),
        Wrong("both axes are tried where there is only one: a norm of another length stumbles in PyTorch, expected "
              "ValueError.", _tries_both),
        Wrong("an axis is taken where the sizes sum up, whatever the other axis says: a quarter of a matrix is cut "
              "along both, and two quarters do not make it.", _as(_sums_up)),
        Wrong("the rows are put below each other and then reshaped: where columns were cut, numbers come into other "
              "rows.", _as(lambda parts, whole: torch.cat(parts).reshape(whole))),
        Wrong("the rows are put below each other and then reshaped: the numbers are as many, but where columns were "
              "cut they come into other rows.",
              _as(lambda parts, whole: torch.cat(parts).reshape(whole) if math.prod(whole) == sum(
                  part.numel() for part in parts) else _join(parts, whole))),
        Wrong("the rows or columns of the shards take turns: those of a shard stay together.",
              lambda parts, whole: torch.stack(parts, _axis(parts[0], whole) + 1).flatten(
                  (axis := _axis(parts[0], whole)), axis + 1) if _join(parts, whole).shape != parts[0].shape
              else _join(parts, whole)),
        Wrong("the matrix comes back in fp32: joining keeps the dtype.",
              lambda parts, whole: _join(parts, whole).float()),
    ),
    hints=(
        "Four parts of (8, 2) shall make (8, 8): which of the two numbers differs from the whole's?",
        "If a part has the whole's shape, it is the whole. If not, join along the axis whose size differs, and look at "
        "the shape of the result.",
        "all of the whole shape? the first · the axis where a part's size is not the whole's · concatenate along it, "
        "in order · another shape than the whole? ValueError.",
    ),
    tolerance=0.0,
    blocked=("minillama.checkpoint.meta._joined", "minillama.checkpoint.meta._fill"),
)  # fmt: skip


# 12.4 ----------------------------------------------------------------------------------------------------------------


def _blocks(rng: torch.Generator, rows: int, blocks: int, spread: tuple[float, ...], n_codes: int) -> Tensor:
    """Blocks of fp16 numbers as large as `spread` says, and of codes: (rows, bytes)."""
    numbers = (torch.rand(rows, blocks, len(spread), generator=rng) + 0.5) * torch.tensor(spread)
    codes = torch.randint(256, (rows, blocks, n_codes), generator=rng, dtype=torch.uint8)
    return torch.cat([numbers.half().view(torch.uint8), codes], -1).flatten(1)


def _q8_cases(rng: torch.Generator) -> Iterable[tuple[Any, ...]]:
    for rows, blocks, scale in ((3, 2, 0.01), (1, 1, 1.0), (5, 4, 3e4), (2, 3, 1e-6), (7, 1, 0.3)):
        yield (_blocks(rng, rows, blocks, (scale,), 32),)
    empty = _blocks(rng, 2, 3, (0.1,), 32)
    empty[0, 34:68] = 0  # a block of zeros
    yield (empty,)


def _by_gguf(data: Tensor, kind: GGMLQuantizationType) -> Tensor:
    return torch.from_numpy(dequantize(data.contiguous().numpy(), kind))


def _swap_bytes(two: Tensor) -> Tensor:
    """Pairs of bytes (…, 2n), each pair turned round."""
    return two.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)


def _q8(data: Tensor, *, dtype: torch.dtype = torch.float16, big: bool = False, behind: bool = False,
        codes: Callable[[Tensor], Tensor] = lambda codes: codes.view(torch.int8).float(),
        result: Callable[[Tensor, Tensor], Tensor] = lambda codes, scales: codes * scales) -> Tensor:  # fmt: skip
    blocks = data.unflatten(1, (-1, 34))
    head, tail = (blocks[..., 32:], blocks[..., :32]) if behind else (blocks[..., :2], blocks[..., 2:])
    scales = (_swap_bytes(head) if big else head).contiguous().view(dtype).float()
    return result(codes(tail.contiguous()), scales).flatten(1)


Q8_0 = Exercise(
    "12.4", "dequantize Q8_0", "dequantize_q8_0", minutes=10, difficulty=2,
    why="The simplest of the block formats: a scale and 32 bytes; the others only pack more tightly.",
    reference=lambda data: _by_gguf(data, GGMLQuantizationType.Q8_0),
    cases=_q8_cases,
    wrong=(
        Wrong("the codes are taken as 0 to 255: they have a sign, from -128 to 127.",
              lambda data: _q8(data, codes=lambda c: c.float())),
        Wrong("the codes are taken as 0 to 255 with 128 in the middle: they are signed bytes.",
              lambda data: _q8(data, codes=lambda c: c.float() - 128)),
        Wrong("the scale is read as bf16: its two bytes are an fp16 number.",
              lambda data: _q8(data, dtype=torch.bfloat16)),
        Wrong("the scale's bytes are exchanged: the smaller one comes first (little-endian).",
              lambda data: _q8(data, big=True)),
        Wrong("the scale is looked for behind the codes: it stands before them.",
              lambda data: _q8(data, behind=True)),
        Wrong("the scale is read as a whole number: its two bytes are an fp16 number.",
              lambda data: _q8(data, dtype=torch.int16)),
        Wrong("a row has one scale: each block of 32 has its own.",
              lambda data: _q8(data, result=lambda c, s: c * s[:, :1])),
        Wrong("all blocks at the same place of their rows have the first row's scale: each block has its own.",
              lambda data: _q8(data, result=lambda c, s: c * s[:1])),
        Wrong("the product is rounded to fp16, and some overflow: go to fp32 before you multiply.",
              lambda data: _q8(data, result=lambda c, s: (c.half() * s.half()).float())),
        Wrong("the result is in fp16, expected fp32: some values are too large for it.",
              lambda data: _q8(data, result=lambda c, s: c.half() * s.half())),
        Wrong("the codes are divided by the scale: it says how much one step is worth.",
              lambda data: _q8(data, result=lambda c, s: c / s)),
        Wrong("the codes are divided by 127: that was done when the scale was made.",
              lambda data: _q8(data, result=lambda c, s: c / 127 * s)),
        Wrong("the scale is missing: these are the codes.",
              lambda data: _q8(data, result=lambda c, s: c)),
    ),
    hints=(
        "A row has 68 bytes: how many blocks are in it, and how many weights come out?",
        "Give the bytes an axis of blocks, 34 long. The first two bytes of all blocks at once are their scales, seen "
        "as another dtype; so are the other 32.",
        "unflatten to (rows, blocks, 34) · two bytes viewed as fp16, then fp32 · 32 bytes viewed as int8, then fp32 · "
        "product · flatten to (rows, columns).",
    ),
    tolerance=0.0,
    blocked=("gguf.quants.dequantize", "gguf.dequantize", "gguf.quants.Q8_0.dequantize",
             "gguf.quants.Q8_0.dequantize_blocks", "gguf.quants.Q8_0.dequantize_rows",
             "minillama.checkpoint.gguf_file.dequantize", "minillama.checkpoint.gguf_file.read_blocks"),
    slow=lambda rng: (_blocks(rng, 1024, 32, (0.01,), 32),),
)  # fmt: skip


# 12.5 ----------------------------------------------------------------------------------------------------------------


def _q4_cases(rng: torch.Generator) -> Iterable[tuple[Any, ...]]:
    sizes = ((3, 2), (1, 1), (5, 3), (2, 4), (7, 1))
    spreads = ((0.01, -0.08), (1.0, 3.0), (3e4, -3e4), (1e-6, 2e-6), (0.3, -1.0))
    for (rows, blocks), spread in zip(sizes, spreads, strict=True):
        yield (_blocks(rng, rows, blocks, spread, 16),)
    empty = _blocks(rng, 2, 3, (0.1, -0.7), 16)
    empty[1, 20:40] = 0  # a block of zeros
    yield (empty,)


def _halves(codes: Tensor) -> tuple[Tensor, Tensor]:
    return codes & 15, codes >> 4


def _q4(data: Tensor, *, dtype: torch.dtype = torch.float16, big: bool = False, behind: bool = False,
        swap: bool = False, first: bool = False,
        codes: Callable[[Tensor], Tensor] = lambda codes: torch.cat(_halves(codes), -1),
        result: Callable[[Tensor, Tensor, Tensor], Tensor] = lambda codes, scale, low: codes * scale + low,
        ) -> Tensor:  # fmt: skip
    blocks = data.unflatten(1, (-1, 20))
    head, tail = (blocks[..., 16:], blocks[..., :16]) if behind else (blocks[..., :4], blocks[..., 4:])
    numbers = (_swap_bytes(head) if big else head).contiguous().view(dtype).float()
    scale, low = (numbers[..., i : i + 1] for i in ((1, 0) if swap else (0, 1)))
    if first:
        scale, low = scale[:, :1], low[:, :1]
    return result(codes(tail).float(), scale, low).flatten(1)


Q4_1 = Exercise(
    "12.5", "dequantize Q4_1", "dequantize_q4_1", minutes=15, difficulty=3,
    why="SmolLM2's file is in it: 5 bits a weight, with two numbers for each 32 of them.",
    reference=lambda data: _by_gguf(data, GGMLQuantizationType.Q4_1),
    cases=_q4_cases,
    wrong=(
        Wrong("these are the codes: the scale and the smallest value are missing.",
              lambda data: _q4(data, result=lambda c, s, m: c)),
        Wrong("the low and the high halves of the bytes are exchanged: the low ones are the first 16 weights.",
              lambda data: _q4(data, codes=lambda c: torch.cat(_halves(c)[::-1], -1))),
        Wrong("the two halves of a byte are taken for neighbours: weights 0 to 15 are the low halves of all 16 bytes, "
              "and 16 to 31 the high ones.",
              lambda data: _q4(data, codes=lambda c: torch.stack(_halves(c), -1).flatten(-2))),
        Wrong("the two halves of a byte are taken for neighbours, and the high one comes first: weights 0 to 15 are "
              "the low halves of all 16 bytes.",
              lambda data: _q4(data, codes=lambda c: torch.stack(_halves(c)[::-1], -1).flatten(-2))),
        Wrong("the scale and the smallest value are exchanged: the scale comes first.",
              lambda data: _q4(data, swap=True)),
        Wrong("the smallest value is missing: the codes count up from it.",
              lambda data: _q4(data, result=lambda c, s, m: c * s)),
        Wrong("the smallest value is multiplied by the scale: it is added as it stands.",
              lambda data: _q4(data, result=lambda c, s, m: (c + m) * s)),
        Wrong("the smallest value is taken away: it is added, with its own sign.",
              lambda data: _q4(data, result=lambda c, s, m: c * s - m)),
        Wrong("8 is taken from the codes: they count up from the smallest value, not from a middle.",
              lambda data: _q4(data, result=lambda c, s, m: (c - 8) * s + m)),
        Wrong("that is Q4_0, with codes around 8 and no smallest value: here they count up from it.",
              lambda data: _q4(data, result=lambda c, s, m: (c - 8) * s)),
        Wrong("the codes are taken as signed, from -8 to 7: they count up from 0.",
              lambda data: _q4(data, result=lambda c, s, m: torch.where(c > 7, c - 16, c) * s + m)),
        Wrong("the high halves are taken as signed: bytes that have a sign keep it when they are shifted.",
              lambda data: _q4(data, codes=lambda c: torch.cat([c & 15, c.contiguous().view(torch.int8) >> 4], -1))),
        Wrong("the high halves are 16 times too large: they must move down by 4 bits.",
              lambda data: _q4(data, codes=lambda c: torch.cat([c & 15, c & 240], -1))),
        Wrong("the high halves keep a fraction, which the low halves leave in them: codes are whole numbers.",
              lambda data: _q4(data, codes=lambda c: torch.cat([c & 15, c / 16], -1))),
        Wrong("the low halves of a whole row come first, then all its high ones: each block has its own 16 and 16.",
              lambda data: _q4(data).unflatten(1, (-1, 2, 16)).transpose(1, 2).flatten(1)),
        Wrong("the scale and the smallest value are read as whole numbers: the two bytes of each are an fp16 number.",
              lambda data: _q4(data, dtype=torch.int16)),
        Wrong("the two bytes of the scale, and of the smallest value, are put together as a whole number without sign: "
              "they are an fp16 number.", lambda data: _q4(data, dtype=torch.uint16)),
        Wrong("the low halves still have the high ones in them.",
              lambda data: _q4(data, codes=lambda c: torch.cat([c, c >> 4], -1))),
        Wrong("the scale and the smallest value are read as bf16: they are fp16 numbers.",
              lambda data: _q4(data, dtype=torch.bfloat16)),
        Wrong("in the scale and in the smallest value the bytes are exchanged: the smaller one comes first "
              "(little-endian).", lambda data: _q4(data, big=True)),
        Wrong("the scale and the smallest value are looked for behind the codes: they stand before them.",
              lambda data: _q4(data, behind=True)),
        Wrong("a row has one scale and one smallest value: each block of 32 has its own.",
              lambda data: _q4(data, first=True)),
        Wrong("the arithmetic is done in fp16, and digits are lost, or it overflows: go to fp32 first.",
              lambda data: _q4(data, result=lambda c, s, m: (c.half() * s.half() + m.half()).float())),
        Wrong("the result is in fp16, expected fp32: digits are lost, and some values are too large for it.",
              lambda data: _q4(data, result=lambda c, s, m: c.half() * s.half() + m.half())),
    ),
    hints=(
        "A block has 16 bytes of codes. Of the byte 0x2f, which half is weight 0, and which weight is the other half?",
        "As in 12.4, with blocks of 20 bytes and two fp16 numbers before the codes; a byte gives one weight to the "
        "first 16 and one to the last.",
        "unflatten to (rows, blocks, 20) · four bytes viewed as two fp16, then fp32 · low halves, then high halves, "
        "concatenated to 32 · times scale, plus smallest · flatten.",
    ),
    tolerance=0.0,
    blocked=("gguf.quants.dequantize", "gguf.dequantize", "gguf.quants.Q4_1.dequantize",
             "gguf.quants.Q4_1.dequantize_blocks", "gguf.quants.Q4_1.dequantize_rows",
             "minillama.checkpoint.gguf_file.dequantize", "minillama.checkpoint.gguf_file.read_blocks",
             "minillama.checkpoint.gguf_file.read_int4"),
    slow=lambda rng: (_blocks(rng, 1024, 32, (0.01, -0.08), 16),),
)  # fmt: skip


# 12.6 ----------------------------------------------------------------------------------------------------------------

_FIELDS = ("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "ffn_dim", "vocab_size", "tie_embeddings")


def _memory_cases(rng: torch.Generator) -> Iterable[tuple[Any, ...]]:
    for numbers, bits, batch, tokens in (
        ((96, 1, 4, 4, 32, 64, 320, False), 5.0, 1, 1),
        ((4096, 32, 32, 32, 128, 11008, 32000, False), 16.0, 1, 2048),
        ((4096, 32, 32, 8, 128, 14336, 128256, False), 5.0, 3, 8192),
        ((576, 30, 9, 3, 64, 1536, 49152, True), 8.5, 2, 100),
        ((640, 7, 6, 2, 48, 1056, 1000, True), 32.0, 5, 17),
    ):
        yield dict(zip(_FIELDS, numbers, strict=True)), bits, batch, tokens
    layers, kv, batch, tokens = (torch.randint(2, 9, (4,), generator=rng)).tolist()
    numbers = (32 * 11, layers, 5 * kv, kv, 64, 32 * 29, 704, True)
    yield dict(zip(_FIELDS, numbers, strict=True)), 8.5, batch, 100 * tokens


def _memory_reference(config: dict[str, Any], bits: float, batch: int, tokens: int) -> tuple[float, float]:
    whole = ModelConfig(**config, max_seq_len=8192)
    norms = whole.n_params_by_part()["norms"]
    return (whole.n_params() - norms) * bits / 8 + 4 * norms, float(whole.kv_cache_bytes(batch, tokens, "bfloat16"))


def _memory(config: dict[str, Any], bits: float, batch: int, tokens: int, *, kv: bool = True, cache_kv: bool = True,
            both: int = 2, tables: Callable[[bool], int] = lambda tied: 1 if tied else 2, own_dim: bool = True,
            own_cache_dim: bool = True, ffn: int = 3, queries: int = 2,
            norms: Callable[[int], int] = lambda n: 2 * n + 1, norm_bits: Callable[[float], float] = lambda bits: 32,
            cache_bits: Callable[[float], float] = lambda bits: 16,
            rows: bool = True, layers: bool = True, byte: float = 8, weight_byte: float | None = None,
            square: bool = False, cache_row: bool = False) -> tuple[float, float]:  # fmt: skip
    dim, n, heads, kv_heads, head_dim, ffn_dim, vocab, tied = (config[name] for name in _FIELDS)
    wide, cached = (head_dim if own else dim // heads for own in (own_dim, own_cache_dim))
    shared, kept = (kv_heads if grouped else heads for grouped in (kv, cache_kv))
    block = queries * dim * (dim if square else heads * wide) + 2 * dim * shared * wide + ffn * dim * ffn_dim
    weights = (tables(tied) * vocab * dim + n * block) * bits + norms(n) * dim * norm_bits(bits)
    row = dim if cache_row else kept * cached
    cache = both * (n if layers else 1) * (batch if rows else 1) * tokens * row * cache_bits(bits)
    return weights / (weight_byte or byte), cache / byte


def _memory_as(**options: Any) -> Callable[..., tuple[float, float]]:
    return lambda *arguments: _memory(*arguments, **options)


MEMORY = Exercise(
    "12.6", "memory before loading", "memory", minutes=15, difficulty=2,
    why="Whether a model fits is known from its config, before a byte is downloaded.",
    reference=_memory_reference,
    cases=_memory_cases,
    wrong=(
        Wrong("the cache has a place for every query head: it holds keys and values, of which there are n_kv_heads.",
              _memory_as(cache_kv=False)),
        Wrong("wk and wv are as large as wq: they have n_kv_heads heads.", _memory_as(kv=False)),
        Wrong("all is counted with n_heads: wk, wv and the cache have n_kv_heads.",
              _memory_as(kv=False, cache_kv=False)),
        Wrong("the cache has only keys, or only values: it holds both.", _memory_as(both=1)),
        Wrong("bits are taken as bytes: a byte has 8 of them.", _memory_as(byte=1)),
        Wrong("the weights are in bits, expected bytes: a byte has 8 of them.", _memory_as(weight_byte=1)),
        Wrong("bits become whole bytes too early: 8.5 bits are more than one byte, and 5 more than none.",
              lambda config, bits, *rest: _memory(config, bits // 8 * 8, *rest)),
        Wrong("wq and wo are taken as square: the heads together may be wider than dim, or narrower.",
              _memory_as(square=True)),
        Wrong("the cache has dim numbers for each key and value: there are n_kv_heads of them, each a head wide.",
              _memory_as(cache_row=True)),
        Wrong("a tied output is counted again: it is the embedding's table.", _memory_as(tables=lambda tied: 2)),
        Wrong("the output is never counted: where it is not tied, it is a second table.",
              _memory_as(tables=lambda tied: 1)),
        Wrong("tied and not tied are exchanged: the table is there twice where they are not tied.",
              _memory_as(tables=lambda tied: 2 if tied else 1)),
        Wrong("the tables of embedding and output are missing.", _memory_as(tables=lambda tied: 0)),
        Wrong("dim / n_heads is taken for head_dim: a config may give another one.",
              _memory_as(own_dim=False, own_cache_dim=False)),
        Wrong("in the cache, dim / n_heads is taken for head_dim: a config may give another one.",
              _memory_as(own_cache_dim=False)),
        Wrong("in the weights, dim / n_heads is taken for head_dim: a config may give another one.",
              _memory_as(own_dim=False)),
        Wrong("the feed-forward layer has two matrices: gate, up and down are three.", _memory_as(ffn=2)),
        Wrong("attention has three matrices: wo is missing, which is as large as wq.", _memory_as(queries=1)),
        Wrong("the norms are missing.", _memory_as(norms=lambda n: 0)),
        Wrong("the last norm is missing: there are two in each layer, and one behind them all.",
              _memory_as(norms=lambda n: 2 * n)),
        Wrong("each layer has one norm: there are two, one before attention and one before the feed-forward layer.",
              _memory_as(norms=lambda n: n + 1)),
        Wrong("the norms are counted with the bits of the matrices: they stay in fp32.",
              _memory_as(norm_bits=lambda bits: bits)),
        Wrong("the norms are in bf16: they stay in fp32.", _memory_as(norm_bits=lambda bits: 16)),
        Wrong("the cache is counted with the bits of the weights: it stays in bf16.",
              _memory_as(cache_bits=lambda bits: bits)),
        Wrong("the cache is in fp32: bf16 has 16 bits.", _memory_as(cache_bits=lambda bits: 32)),
        Wrong("the sizes are in GB, expected bytes.", _memory_as(byte=8e9)),
        Wrong("the sizes are in GiB, expected bytes.", _memory_as(byte=8 * 2**30)),
        Wrong("the two are exchanged: the weights come first, then the cache.", lambda *a: _memory(*a)[::-1]),
        Wrong("the cache is one row's: each row of the batch has its own.", _memory_as(rows=False)),
        Wrong("the cache is one layer's: each layer has its own.", _memory_as(layers=False)),
    ),
    hints=(
        "Six query heads share two key/value heads: how many numbers does the cache get for one token in one layer?",
        "Count the numbers of the tables, of a layer's seven matrices and of all norms; then give each kind its bits.",
        "tables once or twice · wq and wo with n_heads · wk and wv with n_kv_heads · three times dim by ffn_dim · "
        "norms apart, four bytes each · cache: keys and values, layers, rows, tokens, n_kv_heads, head_dim, two bytes "
        "each.",
    ),
    tolerance=0.0,
    blocked=("minillama.config.ModelConfig.n_params", "minillama.config.ModelConfig.n_params_by_part",
             "minillama.config.ModelConfig.bytes", "minillama.config.ModelConfig.kv_cache_bytes",
             "minillama.checkpoint.memory.needed_memory"),
)  # fmt: skip


# 12.7 ----------------------------------------------------------------------------------------------------------------

_ORDERS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "right": halves_to_pairs,
    "left out": lambda rows, head_dim: rows,
    "inverse": pairs_to_halves,
}


def _losses() -> dict[str, float]:
    """The toy's loss with its rows in Hugging Face's order, put into ours in three ways."""
    model, tokenizer = load("toy")
    assert tokenizer is not None
    batches = story_validation(tokenizer, 20, seed=0).batches
    weights = [weight for name, weight in model.named_parameters() if name.endswith(("wq.weight", "wk.weight"))]
    theirs = [pairs_to_halves(weight.detach(), model.config.head_dim) for weight in weights]
    losses = {}
    for name, order in _ORDERS.items():
        for weight, rows in zip(weights, theirs, strict=True):
            weight.data = order(rows, model.config.head_dim).contiguous()
        losses[name] = mean_loss(model, batches)
    return losses


def _verify(measured: dict[str, Any]) -> str:
    true = _losses()

    def near(key: str, value: float) -> bool:
        return abs(measured[key] - value) <= 0.005 * value

    if not measured["predicted"] > 0:
        return f"the prediction is {measured['predicted']}, expected a loss in nats per token, above 0."
    if all(near(key, math.exp(value)) for key, value in true.items()):
        return "these are perplexities, expected losses in nats per token, their logarithms."
    if near("left out", true["inverse"]) and near("inverse", true["left out"]) and near("right", true["right"]):
        return (
            "'left out' and 'inverse' are exchanged: left out are rows as they lie in the folder, and the inverse "
            "turns them once more in the direction in which they were written."
        )
    for key, value in true.items():
        if not near(key, value):
            return f"{key!r} is not what the 20 stories of seed 0 give: {_SUSPECTS[key]}"
    return ""


_SUSPECTS = {
    "right": "with the right order the model is the toy as it was, to the last digit; reorder wq and wk of every "
             "block, and head by head.",
    "left out": "put the rows of wq and wk, in all blocks, in the order of a Hugging Face folder, and leave them so.",
    "inverse": "begin with the rows as they lie in a Hugging Face folder, in wq and wk of all blocks, and reorder them "
               "once in the wrong direction.",
}  # fmt: skip

EXPERIMENT = Experiment(
    "12.7", "experiment: the wrong row order", "measured_12", minutes=20, difficulty=3,
    why="Every shape fits and nothing complains: only a measurement says that the rows of wq and wk are in disorder.",
    keys={
        "predicted": "the loss that you expect with the reordering left out, in nats per token, before you measure",
        "right": "the loss with the rows reordered from halves to pairs, in nats per token",
        "left out": "the loss with the rows as they lie in a Hugging Face folder, in nats per token",
        "inverse": "the loss with the rows reordered in the wrong direction, in nats per token",
        "because": "a sentence on why",
    },
    verify=_verify,
    explain="on what the pairs of a query and a key are then turned by",
    hints=(
        "If coordinates 0 and 16 of a head were trained to turn together, which two does our rotation turn?",
        "Write the toy's wq and wk as a Hugging Face folder has them; then read them back in each of the three ways, "
        "and measure.",
        "load · pairs_to_halves on each wq and wk, kept as theirs · for each way: put it in, mean_loss on "
        "story_validation(tokenizer, 20, seed=0) · the inverse is pairs_to_halves once more.",
    ),
)  # fmt: skip


EXERCISES: list[Task] = [HEADER, RENAME, JOIN, Q8_0, Q4_1, MEMORY, EXPERIMENT]
