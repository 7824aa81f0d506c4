"""Exercises of chapter 03, positions."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from minillama.checkpoint import load
from minillama.config import ModelConfig
from minillama.course.exercise import Exercise, Experiment, Task, Wrong
from minillama.data import story_validation
from minillama.rope import frequencies, halves_to_pairs, pairs_to_halves, rotate, rotation, sinusoidal_table
from minillama.trainer import mean_loss

# 03.1 ----------------------------------------------------------------------------------------------------------------


def _angles(length: int, dim: int, theta: float, *, shift: int = 0, power: float = 1.0) -> Tensor:
    exponents = (torch.arange(0, dim, 2) + shift) / dim * power
    return torch.arange(length)[:, None] * theta**-exponents


SINUSOIDAL = Exercise(
    "03.1", "sinusoidal table", "sinusoidal_table", minutes=10, difficulty=1,
    why="The first Transformer's positions; rotary embeddings use the same clock hands in another way.",
    reference=lambda length, dim, theta: sinusoidal_table(length, dim, theta),
    cases=lambda rng: [(7, 6, 1e4), (300, 4, 1e4), (1, 8, 1e4), (0, 4, 1e4), (33, 10, 500.0),
                       (int(torch.randint(5, 40, (1,), generator=rng)), 12, 2e3)],
    wrong=(
        Wrong("sines and cosines are exchanged: even coordinates are sines.",
              lambda length, dim, theta: torch.stack([_angles(length, dim, theta).cos(),
                                                      _angles(length, dim, theta).sin()], -1).flatten(1)),
        Wrong("all sines stand before all cosines: they alternate, one pair for each speed.",
              lambda length, dim, theta: torch.cat([_angles(length, dim, theta).sin(),
                                                    _angles(length, dim, theta).cos()], -1)),
        Wrong("the exponent is half as large as it should be: pair i turns by theta to the minus 2i/dim.",
              lambda length, dim, theta: torch.stack([_angles(length, dim, theta, power=0.5).sin(),
                                                      _angles(length, dim, theta, power=0.5).cos()], -1).flatten(1)),
        Wrong("positions begin at 1: the first row is position 0.",
              lambda length, dim, theta: sinusoidal_table(length + 1, dim, theta)[1:]),
    ),
    hints=(
        "How many different speeds has a table of dim numbers, if each speed has a sine and a cosine?",
        "An outer product of positions and speeds gives all angles; then sine and cosine, interleaved.",
        "arange of length as a column · theta to the minus (0, 2, 4, …)/dim · sin and cos stacked last, flattened.",
    ),
    tolerance=1e-6,
    blocked=("minillama.rope.sinusoidal_table",),
    slow=lambda rng: (4096, 128, 1e4),
)  # fmt: skip


# 03.2 ----------------------------------------------------------------------------------------------------------------


def _plain(head_dim: int, theta: float) -> Tensor:
    shape = {**ModelConfig.preset("toy").to_dict(), "head_dim": head_dim, "rope_theta": theta}
    return frequencies(ModelConfig.from_dict(shape))


FREQUENCIES = Exercise(
    "03.2", "rotary frequencies", "rope_frequencies", minutes=10, difficulty=1,
    why="One line that decides how far a model can see; off by one index, it still trains.",
    reference=_plain,
    cases=lambda rng: [(8, 1e4), (2, 1e4), (128, 5e5), (64, 1e4), (6, 100.0),
                       (2 * int(torch.randint(2, 40, (1,), generator=rng)), 1e5)],
    wrong=(
        Wrong("the exponent is half as large as it should be: i/head_dim in the place of 2i/head_dim.",
              lambda head_dim, theta: theta ** (-torch.arange(0, head_dim, 2).float() / head_dim / 2)),
        Wrong("the exponent is twice as large as it should be.",
              lambda head_dim, theta: theta ** (-2 * torch.arange(0, head_dim, 2).float() / head_dim)),
        Wrong("the pairs are counted from 1: pair 0 turns by one radian a position.",
              lambda head_dim, theta: theta ** (-(torch.arange(0, head_dim, 2).float() + 2) / head_dim)),
        Wrong("the exponent's sign is turned round: later pairs must turn slower.",
              lambda head_dim, theta: theta ** (torch.arange(0, head_dim, 2).float() / head_dim)),
        Wrong("these are wavelengths, in positions a turn: radians a position are wanted.",
              lambda head_dim, theta: 2 * math.pi * theta ** (torch.arange(0, head_dim, 2).float() / head_dim)),
        Wrong("there is one for each coordinate: one for each pair is wanted.",
              lambda head_dim, theta: theta ** (-torch.arange(head_dim).float() / head_dim)),
    ),
    hints=(
        "Which pair turns fastest, by how many radians from one position to the next, and how many pairs are there?",
        "A row of even numbers 0, 2, 4, … below head_dim, over head_dim, is the exponent, with a minus.",
        "arange with a step of 2 · fp32 · divided by head_dim · theta to the minus that.",
    ),
    tolerance=2e-6,
    part="frequencies",
    blocked=("minillama.rope.frequencies",),
)  # fmt: skip


# 03.3 ----------------------------------------------------------------------------------------------------------------


def _firm(x: Tensor, angles: Tensor) -> Tensor:
    """The rows of the batch whose results, in either layout, lie so far from the middle between two bf16 numbers that
    the last bits of fp32 (a complex product, or four real ones) do not matter."""
    cos, sin = _as_turn(angles.double())
    wide = x.double()
    firm = torch.ones(len(x), dtype=torch.bool)
    for a, b in ((wide[..., 0::2], wide[..., 1::2]), wide.chunk(2, -1)):
        slack = 3e-7 * (a.abs() + b.abs())
        for result in (a * cos - b * sin, a * sin + b * cos):
            firm &= ((result - slack).bfloat16() == (result + slack).bfloat16()).flatten(1).all(1)
    return firm


def _turn_cases(rng: torch.Generator) -> Iterable[tuple[Any, ...]]:
    for B, T, H, D in ((2, 5, 3, 8), (1, 7, 6, 4), (3, 1, 2, 6)):
        angles = torch.rand(T, D // 2, generator=rng) * 7 - 2
        yield torch.randn(B, T, H, D, generator=rng), angles
    x, angles = torch.randn(24, 4, 3, 10, generator=rng).bfloat16(), torch.rand(4, 5, generator=rng) * 900
    yield x[_firm(x, angles)][:2], angles
    yield torch.zeros(1, 0, 2, 4), torch.zeros(0, 2)  # last: whoever left out bf16 as well is told that first


def _as_turn(angles: Tensor) -> tuple[Tensor, Tensor]:
    return angles.cos()[:, None], angles.sin()[:, None]


def _halves(x: Tensor, angles: Tensor, sign: float = 1.0) -> Tensor:
    cos, sin = _as_turn(angles)
    a, b = x.float().chunk(2, -1)
    return torch.cat([a * cos - sign * b * sin, sign * a * sin + b * cos], -1).to(x.dtype)


def _in_own_dtype(x: Tensor, angles: Tensor) -> Tensor:
    cos, sin = (part.to(x.dtype) for part in _as_turn(angles.to(x.dtype)))
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)


def _products_in_own_dtype(x: Tensor, angles: Tensor) -> Tensor:
    cos, sin = (part.to(x.dtype) for part in _as_turn(angles))
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)


def _angles_laid_end_to_end(x: Tensor, angles: Tensor) -> Tensor:
    cos, sin = _as_turn(angles.repeat(1, 2))
    wide = x.float()
    crossed = torch.stack([-wide[..., 1::2], wide[..., 0::2]], -1).flatten(-2)
    return (wide * cos + crossed * sin).to(x.dtype)


def _apart(x: Tensor) -> Tensor:
    return torch.cat([x[..., 0::2], x[..., 1::2]], -1)


def _added(x: Tensor, angles: Tensor) -> Tensor:
    cos, sin = _as_turn(angles)
    a, b = x.float()[..., 0::2], x.float()[..., 1::2]
    return torch.stack([a * cos + b * sin, a * sin + b * cos], -1).flatten(-2).to(x.dtype)


def _size_left_open(x: Tensor, angles: Tensor) -> Tensor:
    pairs = x.reshape(*x.shape[:-1], -1, 2)
    return rotate(pairs.flatten(-2), _as_turn(angles))


def _first_pair_only(x: Tensor, angles: Tensor) -> Tensor:
    only = torch.cat([angles[:, :1], torch.zeros_like(angles[:, 1:])], 1)
    return rotate(x, _as_turn(only))


def _along_heads(x: Tensor, angles: Tensor) -> Tensor:
    other = angles[: x.shape[2]]
    missing = x.shape[2] - other.shape[0]
    other = torch.cat([other, other.new_zeros(missing, angles.shape[1])]) if missing else other
    return rotate(x, (other.cos(), other.sin()))


ROTATE = Exercise(
    "03.3", "rotate pairs", "rotate_pairs", minutes=20, difficulty=3,
    why="This is rotary embedding, the way that Meta's code and ours do it, for a whole batch at once.",
    reference=lambda x, angles: rotate(x, _as_turn(angles)),
    cases=_turn_cases,
    wrong=(
        Wrong("coordinate i is turned with i + D/2, as in Hugging Face's layout: here 2i and 2i + 1 are a pair.",
              _halves),
        Wrong("it turns the other way: the sines' signs are exchanged.",
              lambda x, angles: rotate(x, _as_turn(-angles))),
        Wrong("only the first pair is turned.", _first_pair_only),
        Wrong("all pairs are turned by the first one's angle.",
              lambda x, angles: rotate(x, _as_turn(angles[:, :1].expand_as(angles)))),
        Wrong("both numbers of a pair are turned, but the second one from the first one's new value.",
              lambda x, angles: _chained(x, angles)),
        Wrong("in bf16 the angles were rounded, by up to 2 radians at 900: turn in fp32, come back to the dtype of x "
              "at the end.", _in_own_dtype),
        Wrong("in bf16 cosines, sines and products were rounded: turn in fp32, come back to the dtype of x at the end.",
              _products_in_own_dtype),
        Wrong("the angles run along the heads: they belong to positions, axis 1.", _along_heads),
        Wrong("the right numbers come back in the wrong places, all first ones of a head's pairs before all second "
              "ones: they alternate, as in x.",
              lambda x, angles: _apart(rotate(x, _as_turn(angles)))),
        Wrong("the minus is missing: both products are added, which is no rotation.", _added),
        Wrong("the angles are laid end to end, once more behind the last one: 2i and 2i + 1 share angle i, so its two "
              "copies stand side by side.", _angles_laid_end_to_end),
        Wrong("it raises an error where there are no tokens (T = 0): from no numbers, a size of -1 cannot be worked "
              "out.", _size_left_open),
    ),
    hints=(
        "Where does the point (1, 0) come to lie, turned by an angle, and where does (0, 1)?",
        "Take even and odd coordinates apart, turn them with cosines and sines that have an axis for the heads, "
        "put them together again alternating.",
        "cos, sin with an axis of 1 for heads · fp32 · two products and a difference, two and a sum · stacked last and "
        "flattened, so that they alternate · the dtype of x.",
    ),
    tolerance=2e-6,
    part="rotate",
    blocked=("minillama.rope.rotate", "minillama.attention.rotate"),
)  # fmt: skip


def _chained(x: Tensor, angles: Tensor) -> Tensor:
    cos, sin = _as_turn(angles)
    a, b = x.float()[..., 0::2], x.float()[..., 1::2]
    a = a * cos - b * sin
    return torch.stack([a, a * sin + b * cos], -1).flatten(-2).to(x.dtype)


# 03.4 ----------------------------------------------------------------------------------------------------------------

HALVES = Exercise(
    "03.4", "rotate halves", "rotate_halves", minutes=15, difficulty=2,
    why="Hugging Face's checkpoints expect this layout, and mixing the two up leaves text that looks almost fine.",
    reference=_halves,
    cases=_turn_cases,
    wrong=(
        Wrong("neighbours are turned together: that is the interleaved layout; i and i + D/2 are a pair here.",
              lambda x, angles: rotate(x, _as_turn(angles))),
        Wrong("it turns the other way: the sines' signs are exchanged.", lambda x, angles: _halves(x, angles, -1.0)),
        Wrong("the two halves come back exchanged.",
              lambda x, angles: torch.cat(list(reversed(_halves(x, angles).chunk(2, -1))), -1)),
        Wrong("the minus is missing: both products are added, which is no rotation.",
              lambda x, angles: _no_minus(x, angles)),
    ),
    hints=(
        "For D = 4, which coordinate is turned together with coordinate 0, and which with coordinate 1?",
        "The first half holds the first numbers of all pairs, the second half the second ones.",
        "chunk in two along the last axis · the same two lines as for pairs · concatenate the halves.",
    ),
    tolerance=2e-6,
)  # fmt: skip


def _no_minus(x: Tensor, angles: Tensor) -> Tensor:
    cos, sin = _as_turn(angles)
    a, b = x.float().chunk(2, -1)
    return torch.cat([a * cos + b * sin, a * sin + b * cos], -1).to(x.dtype)


# 03.5 ----------------------------------------------------------------------------------------------------------------


def _weight_cases(rng: torch.Generator) -> Iterable[tuple[Any, ...]]:
    for heads, head_dim, dim in ((6, 8, 5), (2, 8, 7), (1, 6, 3), (4, 2, 5), (3, 10, 1)):
        yield torch.randn(heads * head_dim, dim, generator=rng), head_dim
    yield torch.randn(18, 4, generator=rng).bfloat16(), 6


def _dealt(w: Tensor, sizes: tuple[int, ...], axes: tuple[int, int]) -> Tensor:
    """Rows split into three axes, two of them exchanged."""
    return w.reshape(*sizes, w.shape[1]).transpose(*axes).reshape(w.shape)


def _mixed(w: Tensor, head_dim: int) -> Tensor:
    first, second = w.reshape(-1, 2, head_dim // 2, w.shape[1]).unbind(1)
    return torch.stack([first, second], -1).reshape(w.shape)


PERMUTATION = Exercise(
    "03.5", "from halves to pairs", "to_pairs", minutes=20, difficulty=3,
    why="Whoever loads a checkpoint of Hugging Face's needs it, for wq and for wk, and no other weight.",
    reference=halves_to_pairs,
    cases=_weight_cases,
    wrong=(
        Wrong("that is the inverse: from pairs to halves.", pairs_to_halves),
        Wrong("all rows are shuffled as if there were one head: each head's rows stay together.",
              lambda w, head_dim: halves_to_pairs(w, w.shape[0])),
        Wrong("the columns were moved: a query's coordinates are rows of the weight.",
              lambda w, head_dim: w[:, torch.arange(w.shape[1] - 1, -1, -1)]),
        Wrong("nothing was moved.", lambda w, head_dim: w.clone()),
        Wrong("the two numbers of each pair are exchanged.",
              lambda w, head_dim: halves_to_pairs(w, head_dim).unflatten(0, (-1, 2)).flip(1).flatten(0, 1)),
        Wrong("head_dim was taken for the number of heads: it is how many rows each head has.",
              lambda w, head_dim: _dealt(w, (head_dim, 2, w.shape[0] // head_dim // 2), (1, 2))),
        Wrong("the heads came apart: all first halves stand before all second ones; each head's rows stay together.",
              lambda w, head_dim: _dealt(w, (-1, 2, head_dim // 2), (0, 1))),
        Wrong("numbers of two rows were mixed into one: whole rows alternate, not their numbers.", _mixed),
        Wrong("the weight comes back in fp32: a row that moves keeps its dtype.",
              lambda w, head_dim: halves_to_pairs(w, head_dim).float()),
    ),
    hints=(
        "A head has the rows a0 a1 b0 b1 in halves. In which order do they stand as pairs?",
        "Give the rows three axes, head, which half, place in the half, and exchange two of them.",
        "split the rows into (heads, 2, head_dim/2) · swap the last two of these · flatten back.",
    ),
    tolerance=0.0,
    blocked=("minillama.rope.halves_to_pairs", "minillama.rope.pairs_to_halves"),
)  # fmt: skip


# 03.6 ----------------------------------------------------------------------------------------------------------------


def _offset_cases(rng: torch.Generator) -> Iterable[tuple[Any, ...]]:
    for B, T, D in ((3, 4, 6), (2, 1, 8), (1, 5, 4), (2, 0, 4)):
        yield torch.rand(D // 2, generator=rng), torch.randint(0, 5000, (B,), generator=rng), T
    yield torch.rand(3, generator=rng), torch.tensor([0, 4097]), 3


def _offset(frequency: Tensor, start: Tensor, new: int) -> tuple[Tensor, Tensor]:
    return rotation(frequency, start[:, None] + torch.arange(new))


def _in_bf16(frequency: Tensor, start: Tensor, new: int) -> tuple[Tensor, Tensor]:
    positions = (start[:, None] + torch.arange(new)).bfloat16().float()
    return rotation(frequency, positions)


OFFSET = Exercise(
    "03.6", "positions that go on", "cached_rotation", minutes=15, difficulty=2,
    why="With a cache, the new tokens are not the first ones, and each row of a batch has got further than another.",
    reference=_offset,
    cases=_offset_cases,
    wrong=(
        Wrong("every row begins at position 0: its start is ignored.",
              lambda frequency, start, new: _offset(frequency, torch.zeros_like(start), new)),
        Wrong("all rows begin where the first one does: each has its own start.",
              lambda frequency, start, new: _offset(frequency, start[:1].expand_as(start), new)),
        Wrong("all new tokens stand at the start: they follow one another.",
              lambda frequency, start, new: tuple(part.repeat(1, new, 1, 1) for part in _offset(frequency, start, 1))),
        Wrong("it is one place too late: `start` tokens are there, so the next one has the position `start`.",
              lambda frequency, start, new: _offset(frequency, start + 1, new)),
        Wrong("the positions were rounded to bf16, which cannot tell 4097 from 4096: keep them in fp32.", _in_bf16),
        Wrong("cosines and sines are exchanged.",
              lambda frequency, start, new: tuple(reversed(_offset(frequency, start, new)))),
    ),
    hints=(
        "A row has 7 tokens in its cache. Which positions have the next three?",
        "Each row's start plus 0, 1, 2, … makes a table of positions; times the frequencies it is one of angles.",
        "start as a column plus arange · times frequency on a new last axis · an axis of 1 for heads · cos, sin.",
    ),
    tolerance=2e-4,
    blocked=("minillama.rope.rotation",),
)  # fmt: skip


# 03.7 ----------------------------------------------------------------------------------------------------------------


def _scaling_cases(rng: torch.Generator) -> Iterable[tuple[Any, ...]]:
    for head_dim, theta, factor, low, high, original in (
        (128, 5e5, 8.0, 1.0, 4.0, 8192), (64, 5e5, 32.0, 1.0, 4.0, 8192), (32, 1e4, 4.0, 2.0, 9.0, 512),
        (128, 5e5, 1.0, 1.0, 4.0, 8192), (2, 1e4, 8.0, 1.0, 4.0, 100),
    ):  # fmt: skip
        yield _plain(head_dim, theta), factor, low, high, original
    yield torch.rand(9, generator=rng) * 0.1, 8.0, 1.0, 4.0, 1000


def _llama3(plain: Tensor, factor: float, low: float, high: float, original: int, *, smooth: bool = True,
            turned: bool = False, all_: bool = False) -> Tensor:  # fmt: skip
    if all_:
        return plain / factor
    turns = original * plain / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    kept = kept if smooth else (turns > high).float()
    kept = 1 - kept if turned else kept
    return kept * plain + (1 - kept) * plain / factor


def _for_one(plain: Tensor, factor: float, low: float, high: float, original: int) -> Tensor:
    turns = original * plain / (2 * math.pi)
    if turns > high:
        return plain
    return plain / factor if turns < low else _llama3(plain, factor, low, high, original)


def _mixed_by(plain: Tensor, kept: Tensor, factor: float) -> Tensor:
    return kept * plain + (1 - kept) * plain / factor


def _share(plain: Tensor, low: float, high: float, original: int) -> Tensor:
    return (original * plain / (2 * math.pi) - low) / (high - low)


def _falling(plain: Tensor, factor: float, low: float, high: float, original: int) -> Tensor:
    share = _share(plain, low, high, original)
    return _mixed_by(plain, torch.where(share < 0, 0.0, torch.where(share > 1, 1.0, 1 - share)), factor)


def _by_wavelength(plain: Tensor, factor: float, low: float, high: float, original: int) -> Tensor:
    long, short = original / low, original / high
    return _mixed_by(plain, ((long - 2 * math.pi / plain) / (long - short)).clamp(0, 1), factor)


SCALING = Exercise(
    "03.7", "Llama 3's scaling", "llama3_scaling", minutes=20, difficulty=3,
    why="It took a model from 8,192 tokens to 131,072, by slowing down some of its clock hands and not others.",
    reference=_llama3,
    cases=_scaling_cases,
    wrong=(
        Wrong("there is no smooth band: between the two bounds a frequency is part kept, part divided.",
              lambda *a: _llama3(*a, smooth=False)),
        Wrong("the factor is always 8: take the one that is given.",
              lambda plain, factor, *a: _llama3(plain, 8.0, *a)),
        Wrong("slow and fast are exchanged: fast pairs stay as they are, slow ones are divided.",
              lambda *a: _llama3(*a, turned=True)),
        Wrong("all frequencies are divided: that is linear scaling.", lambda *a: _llama3(*a, all_=True)),
        Wrong("the bounds are always 1 and 4: take the ones that are given.",
              lambda plain, factor, low, high, original: _llama3(plain, factor, 1.0, 4.0, original)),
        Wrong("the original context is always 8192: take the one that is given.",
              lambda plain, factor, low, high, original: _llama3(plain, factor, low, high, 8192)),
        Wrong("turns were counted without the 2π: a frequency is in radians, a turn is 2π of them.",
              lambda plain, factor, low, high, original: _llama3(plain * 1, factor, low / (2 * math.pi),
                                                                 high / (2 * math.pi), original)),
        Wrong("Llama 3.1's own numbers are written in, 8, 1, 4 and 8192: all four are arguments.",
              lambda plain, factor, low, high, original: _llama3(plain, 8.0, 1.0, 4.0, 8192)),
        Wrong("the kept share is not held between 0 and 1, so that fast pairs are sped up and slow ones may turn "
              "backwards.",
              lambda plain, factor, low, high, original: _mixed_by(plain, _share(plain, low, high, original), factor)),
        Wrong("there is no smooth band: every pair above the lower bound is kept whole, and in between only a part of "
              "it should be.",
              lambda plain, factor, low, high, original: _mixed_by(
                  plain, (_share(plain, low, high, original) >= 0).float(), factor)),
        Wrong("in the band the share falls as the turns grow: the faster the pair, the more of it is kept.", _falling),
        Wrong("in the band the share is a straight line in the wavelength: it should be one in the number of turns.",
              _by_wavelength),
        Wrong("one decision is made for all pairs at once, which raises an error: plain holds many numbers, and each "
              "has its own band.", _for_one),
    ),
    hints=(
        "How many turns does a pair make within the original context, and which pairs make less than one?",
        "Turn that number into a share from 0 (below low) to 1 (above high); mix the kept and the divided frequency.",
        "count turns · how far they are on the way from low to high, clamped to 0…1, is the share · share of plain "
        "plus rest of plain / factor.",
    ),
    tolerance=2e-6,
    blocked=("minillama.rope._llama3", "minillama.rope.frequencies"),
)  # fmt: skip


# 03.8 ----------------------------------------------------------------------------------------------------------------


def _losses() -> dict[str, float]:
    """The toy's loss with its clock hands as they are, the fast half of them stopped, and the slow half."""
    model, tokenizer = load("toy")
    assert tokenizer is not None
    batches = story_validation(tokenizer, 20, seed=0).batches
    plain = model.frequency.clone()
    losses = {}
    fast = torch.arange(len(plain)) < len(plain) // 2
    for name, stopped in (("loss", fast & ~fast), ("fast stopped", fast), ("slow stopped", ~fast)):
        model.frequency = plain.masked_fill(stopped, 0.0)
        losses[name] = mean_loss(model, batches)
    return losses


def _verify(measured: dict[str, Any]) -> str:
    true = _losses()
    for key, value in true.items():
        if abs(measured[key] - value) > 0.02 * value:
            return (
                f"{key!r} is not what the 20 stories of seed 0 give: set half of a fresh toy's model.frequency to 0, "
                "the first half for the fast pairs, the second for the slow ones, and nothing else."
            )
    if measured["predicted"] not in ("fast", "slow"):
        return f"the prediction is {measured['predicted']!r}, expected 'fast' or 'slow'."
    return ""


EXPERIMENT = Experiment(
    "03.8", "experiment: stop half of the clock hands", "measured_03", minutes=25, difficulty=3,
    why="Some hands tell neighbours apart, others only beginning from end; measure which the toy reads.",
    keys={
        "predicted": "fast or slow: the half whose absence you expect to cost more, written before you measure",
        "loss": "the toy's loss on 20 stories, in nats per token",
        "fast stopped": "the loss when the faster half of the pairs does not turn",
        "slow stopped": "the loss when the slower half does not turn",
        "because": "a sentence on why",
    },
    verify=_verify,
    explain="on what a head can no longer tell apart",
    hints=(
        "How many positions does the slowest of the fast hands take for one turn, and how long is a story?",
        "The model keeps its frequencies in model.frequency, (head_dim/2,); a product with a number is a new one.",
        "load · story_validation(tokenizer, 20, seed=0) · set model.frequency · mean_loss · put it back.",
    ),
)  # fmt: skip


EXERCISES: list[Task] = [SINUSOIDAL, FREQUENCIES, ROTATE, HALVES, PERMUTATION, OFFSET, SCALING, EXPERIMENT]
