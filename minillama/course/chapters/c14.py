"""Exercises of chapter 14, fine-tuning."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minillama.checkpoint import load
from minillama.course.exercise import Exercise, Experiment, Task, Wrong

# 14.1 ----------------------------------------------------------------------------------------------------------------

_Spans = list[tuple[int, int]]
_Row = tuple[Tensor, Tensor]


def _target_cases(rng: torch.Generator) -> Iterable[tuple[Any, ...]]:
    def ids(size: int, below: int = 90) -> Tensor:
        return torch.randint(3, below, (size,), generator=rng)

    yield ids(13), [(4, 7), (10, 13)], -100
    padded = ids(19, 12)  # few tokens: those of an answer occur elsewhere
    padded[15:] = 2
    yield padded, [(3, 4), (6, 9), (12, 15)], -100
    yield ids(11), [(0, 3), (5, 6), (6, 9)], -1
    yield ids(16, 8), [(7, 12)], 0
    zero = ids(9).int()
    zero[[3, 6]] = 0  # a token's number like any other, in an answer and behind it
    yield zero, [(2, 5)], -100
    yield ids(6), [], -7
    yield ids(2), [(1, 2)], -100
    yield ids(1), [(0, 1)], -100


def _inside(n: int, spans: _Spans) -> Tensor:
    """Which of n tokens the assistant has said."""
    inside = torch.zeros(n, dtype=torch.bool)
    for start, end in spans:
        inside[max(start, 0) : end] = True
    return inside


def _next_scored(inside: Tensor) -> Tensor:
    return inside[1:]


def _targets(ids: Tensor, spans: _Spans, ignore: int, *,
             turns: Callable[[_Spans, int], _Spans] = lambda spans, n: spans,
             scored: Callable[[Tensor], Tensor] = _next_scored,
             inputs: Callable[[Tensor, Tensor, int], Tensor] = lambda ids, inside, ignore: ids[:-1],
             follow: Callable[[Tensor], Tensor] = lambda ids: ids[1:], fill: int | None = None) -> _Row:  # fmt: skip
    inside = _inside(len(ids), turns(spans, len(ids)))
    given = inputs(ids, inside, ignore).clone()
    return given, follow(ids).masked_fill(~scored(inside), ignore if fill is None else fill)


def _targets_as(**options: Any) -> Callable[..., _Row]:
    return lambda *arguments: _targets(*arguments, **options)


def _then(answer: Callable[..., Any], change: Callable[..., Any]) -> Callable[..., Any]:
    """An answer of several parts, with something done to them."""
    return lambda *arguments: change(*answer(*arguments))


def _ending(spans: _Spans, change: Callable[[int, int], tuple[int, int]]) -> _Spans:
    return [change(start, end) for start, end in spans]


def _masked_in_place(ids: Tensor, spans: _Spans, ignore: int) -> _Row:
    inputs, targets = ids[:-1], ids[1:]
    targets[~_inside(len(ids), spans)[1:]] = ignore
    return inputs, targets


def _copied_slices(ids: Tensor, spans: _Spans, ignore: int) -> _Row:
    """A slice from -1 is empty."""
    follow = ids[1:]
    targets = torch.full_like(follow, ignore)
    for start, end in spans:
        targets[start - 1 : end - 1] = follow[start - 1 : end - 1]
    return ids[:-1].clone(), targets


def _uneven_slices(ids: Tensor, spans: _Spans, ignore: int) -> _Row:
    """A slice from -1 is empty, and what is to be put there is not."""
    targets = torch.full_like(ids[1:], ignore)
    for start, end in spans:
        targets[start - 1 : end - 1] = ids[start:end]
    return ids[:-1].clone(), targets


def _made_anew(ids: Tensor, spans: _Spans, ignore: int) -> _Row:
    for span in spans:
        found = _targets(ids, [span], ignore)
    return found


def _by_value(ids: Tensor, spans: _Spans, ignore: int) -> _Row:
    said = ids[_inside(len(ids), spans)]
    return ids[:-1].clone(), ids[1:].masked_fill(~torch.isin(ids[1:], said), ignore)


TARGETS = Exercise(
    "14.1", "which tokens are scored", "answer_targets", minutes=10, difficulty=2,
    why="A model learns to answer, and not to ask, when only what the assistant says is among its targets.",
    reference=_targets,
    cases=_target_cases,
    wrong=(
        Wrong("the spans are applied to the inputs' places: an answer's first token is predicted one place before it, "
              "so that one is lost, and what follows the end mark is scored.",
              _targets_as(scored=lambda inside: inside[:-1])),
        Wrong("the answer's first token is lost: the prompt's last token is where the answer has to begin.",
              _targets_as(turns=lambda spans, n: _ending(spans, lambda start, end: (start + 1, end)))),
        Wrong("a target is scored only if its input is in an answer, too, so the first token is lost: it follows the "
              "prompt's last one.", _targets_as(scored=lambda inside: inside[1:] & inside[:-1])),
        Wrong("the prompt's last token is scored, too: an answer's first target is its own first token.",
              _targets_as(turns=lambda spans, n: _ending(spans, lambda start, end: (start - 1, end)))),
        Wrong("the end of turn is left out: a model that never learns to end an answer goes on and on.",
              _targets_as(turns=lambda spans, n: _ending(spans, lambda start, end: (start, end - 1)))),
        Wrong("the token behind the end mark is scored, too: a span does not hold its end.",
              _targets_as(turns=lambda spans, n: _ending(spans, lambda start, end: (start, end + 1)))),
        Wrong("the spans are one place late as a whole, so the first token of an answer is lost, and one behind it is "
              "scored, in targets that do not follow the inputs.",
              _targets_as(follow=lambda ids: ids[:-1], scored=lambda inside: inside[1:])),
        Wrong("the targets are not shifted: each is the token that the model is given at that place.",
              _targets_as(follow=lambda ids: ids[:-1], scored=lambda inside: inside[:-1])),
        Wrong("only the last answer is scored: each turn of the assistant's is.",
              _targets_as(turns=lambda spans, n: spans[-1:])),
        Wrong("only the last answer is scored, for the targets are begun again at each span; and where there is no "
              "span they are never begun.", _made_anew),
        Wrong("only the first answer is scored: each turn of the assistant's is.",
              _targets_as(turns=lambda spans, n: spans[:1])),
        Wrong("all from the first answer to the last is scored, what the user says between them included.",
              _targets_as(turns=lambda spans, n: [(spans[0][0], spans[-1][1])] if spans else [])),
        Wrong("all from the first answer to the last is scored, what the user says between them included; and a chat "
              "need not have a first answer.",
              _targets_as(turns=lambda spans, n: [(spans[0][0], spans[-1][1])])),
        Wrong("all that stands behind the first answer's beginning is scored, the user's turns and padding included.",
              _targets_as(turns=lambda spans, n: [(spans[0][0], n)] if spans else [])),
        Wrong("the last answer has no end: the padding behind it, or what the user says, is scored.",
              _targets_as(turns=lambda spans, n: [*spans[:-1], (spans[-1][0], n)] if spans else [])),
        Wrong("all that stands before the last answer is left out, and nothing behind its beginning: there are other "
              "answers, and padding.",
              _targets_as(turns=lambda spans, n: [(spans[-1][0], n)] if spans else [])),
        Wrong("all tokens are scored: the model would learn to ask, too.",
              _targets_as(scored=lambda inside: torch.ones_like(inside[1:]))),
        Wrong("it is turned round: the prompts are scored, and the answers are not.",
              _targets_as(scored=lambda inside: ~inside[1:])),
        Wrong("a span is taken for a start and a length: it is a start and an end.",
              _targets_as(turns=lambda spans, n: _ending(spans, lambda start, length: (start, start + length)))),
        Wrong("an answer that begins the row is lost: one place before its start is -1, which means the last one.",
              _copied_slices),
        Wrong("a span that begins at 0 does not fit: its first token has nothing before it, so it has one target less, "
              "and one place before 0 is -1, which means the last one.", _uneven_slices),
        Wrong("tokens are known by what they are, not by where they stand: a word of an answer is scored in the "
              "prompts, too.", _by_value),
        Wrong("the inputs are hidden, too: the model must see the prompt to answer it.",
              _targets_as(inputs=lambda ids, inside, ignore: ids[:-1].masked_fill(~inside[:-1], ignore))),
        Wrong("the inputs are hidden where nothing is scored: the model must see the prompt to answer it.",
              _targets_as(inputs=lambda ids, inside, ignore: ids[:-1].masked_fill(~inside[1:], ignore))),
        Wrong("the answers are hidden in the inputs: each of their tokens is predicted from those before it.",
              _targets_as(inputs=lambda ids, inside, ignore: ids[:-1].masked_fill(inside[:-1], ignore))),
        Wrong("the inputs are the whole row: nothing follows its last token, expected T - 1.",
              _targets_as(inputs=lambda ids, inside, ignore: ids)),
        Wrong("both have T places, the last target of them filled: nothing follows the last token, expected T - 1.",
              _then(_targets_as(inputs=lambda ids, inside, ignore: ids),
                    lambda inputs, targets: (inputs, F.pad(targets, (0, 1), value=-100)))),
        Wrong("a token of number 0 is taken for padding: what is scored hangs on the place alone.",
              lambda ids, spans, ignore: _then(_targets, lambda inputs, targets: (
                  inputs, targets.masked_fill(targets == 0, ignore)))(ids, spans, ignore)),
        Wrong("-100 stands where nothing is scored, expected what the argument ignore says.", _targets_as(fill=-100)),
        Wrong("0 stands where nothing is scored, expected what the argument ignore says.", _targets_as(fill=0)),
        Wrong("the targets are masked in the memory of ids, which changes them, and the inputs with them: copy first.",
              _masked_in_place),
        Wrong("int32 becomes int64: expected the dtype of ids.",
              _then(_targets, lambda inputs, targets: (inputs.long(), targets.long()))),
        Wrong("the first two are exchanged: inputs come first, then targets.",
              _then(_targets, lambda inputs, targets: (targets, inputs))),
    ),
    hints=(
        "An answer's first token stands at place 4. Which token is given when the model has to say it, and at which "
        "place of the targets is it?",
        "Mark the tokens of all answers first, in a mask as long as ids. It goes through the same shift as the "
        "targets do.",
        "a mask of T places, all off · on from start to end, for each span · without its first place · a copy of ids "
        "without its first token, ignored where the mask is off.",
    ),
    blocked=("minillama.finetune.chat_row",),
    slow=lambda rng: (torch.randint(3, 90, (60_000,), generator=rng),
                      [(2000 * i + 800, 2000 * i + 1900) for i in range(30)], -100),
)  # fmt: skip


# 14.2 ----------------------------------------------------------------------------------------------------------------


def _odd(rng: torch.Generator, *size: int) -> Tensor:
    """Numbers of 9 binary digits, between 1/2 and 1 in size: fp32 adds and multiplies some of them exactly, bf16 has
    8 digits."""
    whole = 2 * torch.randint(128, 256, size, generator=rng) + 1
    return whole.float() / 512 * (2 * torch.randint(2, size, generator=rng) - 1)


def _lora_cases(rng: torch.Generator) -> Iterable[tuple[Any, ...]]:
    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=rng)

    yield normal(2, 5, 6), normal(4, 6), normal(2, 6), normal(4, 2), 16.0
    yield normal(3, 7), normal(9, 7), normal(4, 7), normal(9, 4), 1
    yield normal(4, 5), normal(5, 5), normal(2, 5), normal(5, 2), 3
    yield normal(3, 4), normal(4, 4), normal(4, 4), normal(4, 4), 6.0
    yield normal(8) * 1e3, normal(3, 8) * 1e2, normal(1, 8), normal(3, 1) * 1e2, 0.5
    yield normal(0, 6), normal(5, 6), normal(3, 6), normal(5, 3), 8
    signs = torch.tensor([1.0, -1, 1, 1, -1, -1])[torch.randperm(6, generator=rng)]  # what w gives for these is 0
    heavy = (2 * torch.randint(1, 5, (5, 1), generator=rng) + 1) * 2.0**20
    yield torch.stack([signs, -2 * signs]), heavy.repeat(1, 6), normal(3, 6), normal(5, 3), 12.0
    whole = torch.randint(-3, 4, (24, 8), generator=rng).bfloat16()  # its products with x are whole numbers below 256
    x = torch.randint(-2, 3, (4, 3, 8), generator=rng).bfloat16()
    yield x, whole, 2 * _odd(rng, 3, 8), _odd(rng, 24, 3), 6.0
    rows = [torch.randint(-1, 2, size, generator=rng).bfloat16() for size in ((6, 4), (12, 4))]
    thin = [2 * torch.randint(1, 4, size, generator=rng).float() + 1 for size in ((1, 4), (12, 1))]
    yield *rows, *thin, 1 + 1 / 256  # a scale of 9 digits


def _alpha_r(alpha: float, a: Tensor, b: Tensor) -> float:
    return alpha / len(a)


def _thin(x: Tensor, a: Tensor, b: Tensor, base: Tensor) -> Tensor:
    return F.linear(F.linear(x.float(), a), b)


def _lora(x: Tensor, w: Tensor, a: Tensor, b: Tensor, alpha: float, *,
          scale: Callable[[float, Tensor, Tensor], float] = _alpha_r,
          plain: Callable[[Tensor, Tensor], Tensor] = F.linear,
          path: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] = _thin,
          total: Callable[[Tensor, Tensor, float], Tensor] = lambda base, added, scale: base + scale * added,
          ) -> Tensor:  # fmt: skip
    base = plain(x, w)
    return total(base.float(), path(x, a, b, base), scale(alpha, a, b)).to(x.dtype)


def _lora_as(**options: Any) -> Callable[..., Tensor]:
    return lambda *arguments: _lora(*arguments, **options)


def _merged_first(x: Tensor, w: Tensor, a: Tensor, b: Tensor, alpha: float) -> Tensor:
    return F.linear(x.float(), w.float() + alpha / len(a) * (b @ a)).to(x.dtype)


def _merged_rounded(x: Tensor, w: Tensor, a: Tensor, b: Tensor, alpha: float) -> Tensor:
    return F.linear(x, (w + alpha / len(a) * (b @ a)).to(w.dtype))


def _promoted(x: Tensor, w: Tensor, a: Tensor, b: Tensor, alpha: float) -> Tensor:
    return F.linear(x, w) + alpha / len(a) * _thin(x, a, b, x)


def _rounded_adapters(x: Tensor, a: Tensor, b: Tensor, base: Tensor) -> Tensor:
    return F.linear(F.linear(x.float(), a.to(x.dtype).float()), b.to(x.dtype).float())


def _all_in(x: Tensor, w: Tensor, a: Tensor, b: Tensor, alpha: float) -> Tensor:
    return F.linear(x, w) + alpha / len(a) * F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype))


def _sum_in(x: Tensor, w: Tensor, a: Tensor, b: Tensor, alpha: float) -> Tensor:
    return F.linear(x, w) + (alpha / len(a) * _thin(x, a, b, x)).to(x.dtype)


LORA = Exercise(
    "14.2", "LoRA's forward", "lora_forward", minutes=10, difficulty=2,
    why="Beside a matrix that stays as it is two thin ones learn, with a hundredth of its numbers.",
    reference=_lora,
    cases=_lora_cases,
    wrong=(
        Wrong("alpha / r is missing: what the adapter gives is scaled by it.", _lora_as(scale=lambda *_: 1.0)),
        Wrong("the scale is alpha, expected alpha / r, so that another rank needs no other learning rate.",
              _lora_as(scale=lambda alpha, a, b: alpha)),
        Wrong("the scale is alpha times r, expected alpha divided by r.",
              _lora_as(scale=lambda alpha, a, b: alpha * len(a))),
        Wrong("the scale is r / alpha, expected alpha / r.", _lora_as(scale=lambda alpha, a, b: len(a) / alpha)),
        Wrong("the scale is 1 / r: alpha is missing.", _lora_as(scale=lambda alpha, a, b: 1 / len(a))),
        Wrong("alpha is divided by the root of r, as rank-stabilised LoRA does: here by r itself.",
              _lora_as(scale=lambda alpha, a, b: alpha / math.sqrt(len(a)))),
        Wrong("alpha is divided by r as whole numbers are, which cuts it off.",
              _lora_as(scale=lambda alpha, a, b: alpha // len(a))),
        Wrong("alpha is divided by the size of the inputs: r is the other axis of a.",
              _lora_as(scale=lambda alpha, a, b: alpha / a.shape[1])),
        Wrong("alpha is divided by the size of the outputs: r is the other axis of b.",
              _lora_as(scale=lambda alpha, a, b: alpha / len(b))),
        Wrong("the scale is applied twice, once in each thin product.",
              _lora_as(scale=lambda alpha, a, b: (alpha / len(a)) ** 2)),
        Wrong("the scale is applied to the base, too: it belongs to the adapter alone.",
              _lora_as(total=lambda base, added, scale: (base + added) * scale)),
        Wrong("the scale is applied to the base alone: it belongs to the adapter.",
              _lora_as(total=lambda base, added, scale: base * scale + added)),
        Wrong("the base is missing: the adapter's product is a change of what w gives.",
              _lora_as(total=lambda base, added, scale: scale * added)),
        Wrong("the adapter is missing, so nothing is learned.", _lora_as(total=lambda base, added, scale: base)),
        Wrong("the adapter's product is taken away, expected added.",
              _lora_as(total=lambda base, added, scale: base - scale * added)),
        Wrong("a and b are exchanged, and not transposed: x meets a first, which has a row for each of r.",
              _lora_as(path=lambda x, a, b, base: x.float() @ b @ a)),
        Wrong("x meets b first: a takes the inputs down to r numbers, b takes those up to the outputs.",
              _lora_as(path=lambda x, a, b, base: F.linear(F.linear(x.float(), b), a))),
        Wrong("a and b are not transposed: they have the outputs first, as w has.",
              _lora_as(path=lambda x, a, b, base: x.float() @ a @ b)),
        Wrong("w is not transposed: it has the outputs first.", _lora_as(plain=lambda x, w: x @ w)),
        Wrong("the adapter is given what w gives: it is given x, beside w.",
              _lora_as(path=lambda x, a, b, base: F.linear(F.linear(base.float(), a), b))),
        Wrong("there is a nonlinearity between a and b: without one they can be merged into w.",
              _lora_as(path=lambda x, a, b, base: F.linear(F.silu(F.linear(x.float(), a)), b))),
        Wrong("there is a nonlinearity between a and b (ReLU): without one they can be merged into w.",
              _lora_as(path=lambda x, a, b, base: F.linear(F.linear(x.float(), a).relu(), b))),
        Wrong("a and b are merged into w at each call: that makes out times in numbers, and beside large weights a "
              "small change is rounded away.", _merged_first),
        Wrong("a and b are merged into w at each call, and rounded to its dtype: that makes out times in numbers, and "
              "beside large weights a small change is lost.", _merged_rounded),
        Wrong("a and b are rounded to the dtype of x: they are in fp32 so that small steps of training are not lost.",
              _lora_as(path=_rounded_adapters)),
        Wrong("all is computed in the dtype of x, with a and b rounded to it: the adapter's path is in fp32.",
              _all_in),
        Wrong("what the adapter gives is rounded to bf16 before the sum, which is rounded again: add in fp32, and "
              "round once.", _sum_in),
        Wrong("what a gives is rounded to bf16 before b: the adapter's path is in fp32 as a whole.",
              _lora_as(path=lambda x, a, b, base: F.linear(F.linear(x.float(), a).to(x.dtype).float(), b))),
        Wrong("alpha / r is rounded to bf16 before it scales: that is another scale.",
              lambda x, w, a, b, alpha: _lora(x, w, a, b, alpha, scale=lambda alpha, a, b: float(
                  torch.tensor(alpha / len(a), dtype=x.dtype)))),
        Wrong("it comes back in fp32, expected the dtype of x: what follows in the model has weights in bf16.",
              _promoted),
    ),
    hints=(
        "x has 2048 numbers, w 2048 rows, and r is 8. How many multiplications does b times a cost, and how many x "
        "times a, transposed, and then b?",
        "Go down to r numbers, and up again. The base does not know of it: what it gives is one summand, what the "
        "adapter gives, scaled, the other.",
        "what w gives, to fp32 · x to fp32, to r numbers with a, to the outputs with b · times alpha by the rows of a "
        "· their sum · back to the dtype of x.",
    ),
    blocked=("minillama.finetune.LoraLinear.forward",),
    slow=lambda rng: (torch.randn(1, 2048, generator=rng), torch.randn(2048, 2048, generator=rng),
                      torch.randn(1024, 2048, generator=rng), torch.randn(2048, 1024, generator=rng), 16.0),
)  # fmt: skip


# 14.3 ----------------------------------------------------------------------------------------------------------------

_Adapter = tuple[Tensor, Tensor, float]
_Turns = list[list[int]]


def _switch_cases(rng: torch.Generator) -> Iterable[tuple[Any, ...]]:
    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=rng)

    def adapters(out: int, size: int, *ranks_and_alphas: tuple[int, float], by: float = 1.0) -> list[_Adapter]:
        return [(normal(r, size), normal(out, r) * by, alpha) for r, alpha in ranks_and_alphas]

    yield normal(5, 7), adapters(5, 7, (2, 8.0), (3, 1)), [[0], [], [1], [0, 1], []]
    yield normal(6, 6), adapters(6, 6, (2, 3), (4, 16.0)), [[], [1, 0], [0], [1]]
    yield normal(4, 4), adapters(4, 4, (4, 6.0)), [[0], [0], []]
    yield normal(3, 8), adapters(3, 8, (2, 16.0), (1, 4.0), by=1e12), [[1], [0, 1], [0], [], [1, 0], []]
    yield normal(4, 6), adapters(4, 6, (3, 7), (2, 3), (4, 2)), [[2, 0, 1], [1, 2], []]
    yield normal(2, 3), [], [[], []]
    yield normal(3, 2), adapters(3, 2, (1, 2.0)), []
    weight = torch.randint(-255, 256, (16, 12), generator=rng).float() / 128
    exact = [(_odd(rng, r, 12), _odd(rng, 16, r), alpha) for r, alpha in ((3, 1.5), (2, 0.5))]
    yield weight.bfloat16(), exact, [[0], [1], [], [1, 0], []]


def _by_alpha_r(adapter: _Adapter, first: _Adapter) -> float:
    return adapter[2] / len(adapter[0])


def _b_a(a: Tensor, b: Tensor) -> Tensor:
    return b @ a


def _change(adapter: _Adapter, first: _Adapter, scale: Callable[[_Adapter, _Adapter], float] = _by_alpha_r,
            product: Callable[[Tensor, Tensor], Tensor] = _b_a) -> Tensor:  # fmt: skip
    return scale(adapter, first) * product(adapter[0], adapter[1])


def _switched(w: Tensor, adapters: list[_Adapter], turns: _Turns, *,
              chosen: Callable[[list[int]], list[int]] = lambda turn: turn,
              base: Callable[[Tensor, int], Tensor] = lambda w, n: w, sign: float = 1.0,
              share: Callable[[int], float] = lambda n: 1.0, kept: Callable[[Tensor, Tensor], Tensor] = lambda x, w: x,
              end: Callable[[Tensor, Tensor], Tensor] = lambda x, w: x.to(w.dtype),
              **options: Any) -> list[Tensor]:  # fmt: skip
    found = []
    for turn in turns:
        total = base(w.float(), len(turn))
        for i in chosen(turn):
            total = kept(total + sign * share(len(turn)) * kept(_change(adapters[i], adapters[0], **options), w), w)
        found.append(end(total, w))
    return found


def _switched_as(**options: Any) -> Callable[..., list[Tensor]]:
    return lambda *arguments: _switched(*arguments, **options)


def _going_on(how: str) -> Callable[..., list[Tensor]]:
    """From one merged weight to the next, instead of from the base each time."""

    def switched(w: Tensor, adapters: list[_Adapter], turns: _Turns) -> list[Tensor]:
        current = w if how == "in place" else w.clone()
        if how.endswith("in fp32"):
            current = current.float()
        before: list[int] = []
        found = []
        for turn in turns:
            total = current.float()
            if how == "from the base at none" and not turn:
                total = w.float()
            if how in ("all at once", "in place"):
                out, new = (sum((_change(adapters[i], adapters[0]) for i in turn), torch.zeros_like(total))
                            for turn in (before, turn))  # fmt: skip
                total = total - out + new
            else:
                same = set(before) & set(turn) if how.startswith("differences") else set()
                for i in before if how.startswith(("one by one", "differences")) else ():
                    total = total if i in same else total - _change(adapters[i], adapters[0])
                for i in turn:
                    total = total if i in same else total + _change(adapters[i], adapters[0])
            if how == "in place":
                current.copy_(total)
            else:
                current = total.to(current.dtype)
            found.append(current if how in ("add in fp32", "in place") else current.to(w.dtype))
            before = turn
        return found

    return switched


def _rounded_like(x: Tensor, w: Tensor) -> Tensor:
    return x.to(w.dtype).float()


def _in_dtype(w: Tensor, adapters: list[_Adapter], turns: _Turns) -> list[Tensor]:
    """With the adapters rounded, too."""
    small = [(a.to(w.dtype), b.to(w.dtype), alpha) for a, b, alpha in adapters]
    found = []
    for turn in turns:
        total = w.clone()
        for i in turn:
            a, b, alpha = small[i]
            total = total + alpha / len(a) * (b @ a)
        found.append(total)
    return found


def _put_together(w: Tensor, adapters: list[_Adapter], turns: _Turns) -> list[Tensor]:
    """The adapters of a turn as one of a larger rank."""
    found = []
    for turn in turns:
        rank = sum(len(adapters[i][0]) for i in turn)
        total = w.float()
        for i in turn:
            total = total + adapters[turn[0]][2] / rank * _b_a(adapters[i][0], adapters[i][1])
        found.append(total.to(w.dtype))
    return found


def _rounded_adapters_only(w: Tensor, adapters: list[_Adapter], turns: _Turns) -> list[Tensor]:
    return _switched(w, [(a.to(w.dtype).float(), b.to(w.dtype).float(), alpha) for a, b, alpha in adapters], turns)


MERGE = Exercise(
    "14.3", "merge and unmerge", "switched", minutes=15, difficulty=3,
    why="Merged, an adapter costs nothing when the model runs; whoever switches adapters has to find the way back.",
    reference=_switched,
    cases=_switch_cases,
    wrong=(
        Wrong("an adapter is taken away by subtracting it: what the sum rounded away does not come back. Something has "
              "to be kept.", _going_on("one by one")),
        Wrong("the adapters of a turn are taken away by subtracting their sum: what was rounded away does not come "
              "back. Something has to be kept.", _going_on("all at once")),
        Wrong("an adapter is taken away by subtracting it, from a weight in fp32: what that rounded away does not come "
              "back, either.", _going_on("one by one in fp32")),
        Wrong("adapters that a turn no longer names are subtracted: what the sum rounded away does not come back. "
              "Something has to be kept.", _going_on("differences")),
        Wrong("adapters that a turn no longer names are subtracted, from a weight in fp32: what that rounded away does "
              "not come back, either.", _going_on("differences in fp32")),
        Wrong("w itself is changed, and all the entries are this one tensor: make a new one at each turn.",
              _going_on("in place")),
        Wrong("each turn adds to what the one before it left: only the adapters that a turn names are in its weight.",
              _going_on("add")),
        Wrong("each turn adds to what the one before it left, and where w is in bf16 the sums are in fp32: each turn "
              "begins with w, and ends in its dtype.", _going_on("add in fp32")),
        Wrong("a turn of none goes back, but any other adds to what the one before it left: only the adapters that it "
              "names are in its weight.", _going_on("from the base at none")),
        Wrong("alpha / r is missing.", _switched_as(scale=lambda adapter, first: 1.0)),
        Wrong("the scale is alpha, expected alpha / r.", _switched_as(scale=lambda adapter, first: adapter[2])),
        Wrong("the scale is alpha times r, expected alpha divided by r.",
              _switched_as(scale=lambda adapter, first: adapter[2] * len(adapter[0]))),
        Wrong("the scale is r / alpha, expected alpha / r.",
              _switched_as(scale=lambda adapter, first: len(adapter[0]) / adapter[2])),
        Wrong("alpha is divided by the root of r, as rank-stabilised LoRA does: here by r itself.",
              _switched_as(scale=lambda adapter, first: adapter[2] / math.sqrt(len(adapter[0])))),
        Wrong("alpha is divided by r as whole numbers are, which cuts it off.",
              _switched_as(scale=lambda adapter, first: adapter[2] // len(adapter[0]))),
        Wrong("alpha is divided by the size of the inputs: r is the other axis of a.",
              _switched_as(scale=lambda adapter, first: adapter[2] / adapter[0].shape[1])),
        Wrong("the first adapter's alpha and r are used for all: each has its own.",
              _switched_as(scale=lambda adapter, first: first[2] / len(first[0]))),
        Wrong("the first adapter's alpha is used for all: each has its own.",
              _switched_as(scale=lambda adapter, first: first[2] / len(adapter[0]))),
        Wrong("the ranks of a turn's adapters are added up, and its first alpha is used for all: each has its own.",
              _put_together),
        Wrong("the product is a times b, which has another shape: b has the outputs, and comes first.",
              _switched_as(product=lambda a, b: a @ b)),
        Wrong("the change is transposed: w has the outputs first.", _switched_as(product=lambda a, b: (b @ a).T)),
        Wrong("the adapters are taken away, expected added.", _switched_as(sign=-1.0)),
        Wrong("only a turn's first adapter is merged: a turn may name several.",
              _switched_as(chosen=lambda turn: turn[:1])),
        Wrong("only a turn's last adapter is merged: a turn may name several.",
              _switched_as(chosen=lambda turn: turn[-1:])),
        Wrong("a turn's adapters are averaged, expected added up.", _switched_as(share=lambda n: 1 / n)),
        Wrong("the base is added once for each adapter of a turn: it is there once.",
              _switched_as(base=lambda w, n: max(n, 1) * w)),
        Wrong("the base is added once for each adapter of a turn, so a turn of none is all zeros: it is there once.",
              _switched_as(base=lambda w, n: n * w)),
        Wrong("the base is missing: these are the changes alone.", _switched_as(base=lambda w, n: 0 * w)),
        Wrong("in bf16 each change is rounded before it is added, and each sum again: add up in fp32, and round once.",
              _switched_as(kept=_rounded_like)),
        Wrong("in bf16 the sum is rounded after each adapter: add up in fp32, and round once.",
              lambda w, adapters, turns: [_stepwise(w, adapters, turn) for turn in turns]),
        Wrong("all is computed in bf16 where w is: add up in fp32, and round once.", _in_dtype),
        Wrong("a and b are rounded to bf16 where w is: they have more digits, and the sum is rounded once.",
              _rounded_adapters_only),
        Wrong("the merged weights are in fp32 where w is in bf16: expected its dtype.",
              _switched_as(end=lambda x, w: x)),
        Wrong("the merged weights are in fp32 where w is in bf16, and only a turn of none keeps its dtype.",
              lambda w, adapters, turns: [_switched_as(end=lambda x, w: x)(w, adapters, [turn])[0] if turn else w
                                          for turn in turns]),
    ),
    hints=(
        "In fp32, what are 1 + 100,000,000 and then that - 100,000,000? What would you have to know to get 1 back?",
        "Nothing leads from one merged weight to the next: each begins with the same matrix, which nothing writes to.",
        "for each turn: w in fp32, a new tensor · for each adapter that it names, b times a, scaled, on top · one "
        "rounding to the dtype of w · into the list.",
    ),
    blocked=("minillama.finetune.merge", "minillama.finetune.unmerge", "minillama.finetune.LoraLinear.merged"),
)  # fmt: skip


def _stepwise(w: Tensor, adapters: list[_Adapter], turn: list[int]) -> Tensor:
    for i in turn:
        w = (w.float() + _change(adapters[i], adapters[0])).to(w.dtype)
    return w


# 14.4 ----------------------------------------------------------------------------------------------------------------


def _pool_cases(rng: torch.Generator) -> Iterable[tuple[Any, ...]]:
    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=rng)

    def filled(hidden: Tensor, lengths: list[int], padding: float) -> tuple[Tensor, Tensor]:
        for row, length in zip(hidden, lengths, strict=True):
            row[length:] = padding
        return hidden, torch.tensor(lengths)

    yield normal(3, 7, 5) + 1, torch.tensor([4, 7, 2]), normal(2, 5)
    yield normal(4, 6, 3), torch.tensor([1, 5, 1, 3]), normal(3, 3)
    yield *filled(normal(2, 9, 4), [3, 8], 1e4), normal(6, 4)
    yield *filled(normal(3, 5, 6), [2, 5, 4], math.nan), normal(3, 6)
    yield *filled(normal(2, 4, 3), [1, 2], math.inf), normal(4, 3)
    yield normal(5, 1, 4) * 1e3, torch.ones(5, dtype=torch.int64), normal(1, 4)
    yield (normal(3, 40, 8) + 1).bfloat16(), torch.tensor([33, 5, 40]), normal(2, 8)
    yield normal(0, 3, 5), torch.zeros(0, dtype=torch.int64), normal(2, 5)


def _real(n: int, lengths: Tensor) -> Tensor:
    """(B, n) bool"""
    return torch.arange(n) < lengths[:, None]


_Real = Callable[[int, Tensor], Tensor]


def _sums(hidden: Tensor, real: Tensor) -> Tensor:
    return hidden.masked_fill(~real[:, :, None], 0).sum(1)


def _pooled(hidden: Tensor, lengths: Tensor, head: Tensor, *, real: _Real = _real,
            add: Callable[[Tensor, Tensor], Tensor] = _sums,
            by: Callable[[Tensor, int], Tensor | int] = lambda lengths, n: lengths[:, None], dtype: Any = torch.float32,
            logits: Callable[[Tensor, Tensor], Tensor] = F.linear) -> _Row:  # fmt: skip
    hidden = hidden.to(dtype or hidden.dtype)
    n = hidden.shape[1]
    means = add(hidden, real(n, lengths)) / by(lengths, n)
    return means.float(), logits(means.float(), head)


def _pooled_as(**options: Any) -> Callable[..., _Row]:
    return lambda *arguments: _pooled(*arguments, **options)


def _chosen(place: Callable[[Tensor, int], Tensor]) -> Callable[..., _Row]:
    """One token's vector instead of a mean."""

    def pooled(hidden: Tensor, lengths: Tensor, head: Tensor) -> _Row:
        means = hidden[torch.arange(len(hidden)), place(lengths, hidden.shape[1])].float()
        return means, F.linear(means, head)

    return pooled


def _largest(hidden: Tensor, real: Tensor) -> Tensor:
    return hidden.masked_fill(~real[:, :, None], -math.inf).amax(1)


def _one_by_one(hidden: Tensor, lengths: Tensor, head: Tensor) -> _Row:
    means = torch.stack([text[:n].float().mean(0) for text, n in zip(hidden, lengths.tolist(), strict=True)])
    return means, F.linear(means, head)


def _all_together(hidden: Tensor, real: Tensor) -> Tensor:
    return _sums(hidden, real).sum(0, keepdim=True).expand(len(hidden), -1)


POOLED = Exercise(
    "14.4", "a pooled classifier", "pooled", minutes=15, difficulty=2,
    why="A classifier looks at a text as a whole, and must not notice how much padding its batch put behind it.",
    reference=_pooled,
    cases=_pool_cases,
    wrong=(
        Wrong("padding is counted in the sum and in the divisor: the mean is over a text's own tokens.",
              _pooled_as(add=lambda h, real: h.sum(1), by=lambda lengths, n: n)),
        Wrong("padding is counted in the sum: only the divisor knows the lengths.",
              _pooled_as(add=lambda h, real: h.sum(1))),
        Wrong("padding is counted in the divisor: a short text's mean is too small.",
              _pooled_as(by=lambda lengths, n: n)),
        Wrong("padding is multiplied by 0, which leaves NaN and infinity as NaN: put zeros there, or leave it out.",
              _pooled_as(add=lambda h, real: (h * real[:, :, None]).sum(1))),
        Wrong("padding is multiplied by 0, which leaves NaN and infinity as NaN, and counted in the divisor.",
              _pooled_as(add=lambda h, real: (h * real[:, :, None]).sum(1), by=lambda lengths, n: n)),
        Wrong("one token of padding is counted as real: a text of length 4 has places 0 to 3.",
              _pooled_as(real=lambda n, lengths: _real(n, lengths + 1))),
        Wrong("one token of padding is counted as real, in the divisor, too.",
              _pooled_as(real=lambda n, lengths: _real(n, lengths + 1), by=lambda lengths, n: lengths[:, None] + 1)),
        Wrong("the last token is left out of the sum: a text of length 4 has places 0 to 3.",
              _pooled_as(real=lambda n, lengths: _real(n, lengths - 1))),
        Wrong("the last token is left out, so nothing is left of a text of one token.",
              _pooled_as(real=lambda n, lengths: _real(n, lengths - 1), by=lambda lengths, n: lengths[:, None] - 1)),
        Wrong("the first token is left out: it belongs to the text like any other.",
              _pooled_as(real=lambda n, lengths: _real(n, lengths) & (torch.arange(n) > 0),
                         by=lambda lengths, n: lengths[:, None] - 1)),
        Wrong("the real tokens are looked for at the end of the row: padding stands behind them.",
              _pooled_as(real=lambda n, lengths: _real(n, lengths).flip(1))),
        Wrong("it is turned round: padding is summed, and the text is left out.",
              _pooled_as(real=lambda n, lengths: ~_real(n, lengths))),
        Wrong("these are sums, expected means: a long text would count more.", _pooled_as(by=lambda lengths, n: 1)),
        Wrong("the sum is divided by the root of the length, expected the length.",
              _pooled_as(by=lambda lengths, n: lengths[:, None].sqrt())),
        Wrong("the sum is divided by the longest text's length: each text has its own.",
              _pooled_as(by=lambda lengths, n: lengths.max() if len(lengths) else 1)),
        Wrong("the sum is divided by the longest text's length: each text has its own, and a batch of none has no "
              "longest one.", _pooled_as(by=lambda lengths, n: lengths.max())),
        Wrong("the texts are taken one by one, which is slow, and where there are none nothing can be stacked: take "
              "all at once.", _one_by_one),
        Wrong("the sum is divided by the tokens of all texts: each text has its own.",
              _pooled_as(by=lambda lengths, n: lengths.sum())),
        Wrong("all texts have one mean, over the batch: each has its own.",
              _pooled_as(add=_all_together, by=lambda lengths, n: lengths.sum())),
        Wrong("this is the largest of each coordinate, expected the mean.",
              _pooled_as(add=_largest, by=lambda lengths, n: 1)),
        Wrong("this is the last real token, expected the mean of all.",
              _chosen(lambda lengths, n: lengths - 1)),
        Wrong("this is the last place of the row, which may be padding: expected the mean of the real tokens.",
              _chosen(lambda lengths, n: torch.full_like(lengths, n - 1))),
        Wrong("this is the first token, which has seen nothing of the text: expected the mean of all.",
              _chosen(lambda lengths, n: torch.zeros_like(lengths))),
        Wrong("the sums and means are in bf16 where hidden is: go to fp32 before you add.",
              _pooled_as(dtype=None)),
        Wrong("the sums and means are in bf16 where hidden is, and so is what comes back: go to fp32 before you add.",
              lambda hidden, lengths, head: _then(_pooled_as(dtype=None), lambda means, logits: (
                  means.to(hidden.dtype), F.linear(means.to(hidden.dtype), head.to(hidden.dtype))))(
                  hidden, lengths, head)),
        Wrong("the sums are in bf16 where hidden is, and only the division is in fp32: go to fp32 before you add.",
              lambda hidden, lengths, head: _pooled(hidden, lengths, head, add=lambda h, real: _sums(
                  h.to(hidden.dtype), real).float())),
        Wrong("the logits are computed in the dtype of hidden, expected in fp32.",
              lambda hidden, lengths, head: _pooled(hidden, lengths, head, logits=lambda means, head: F.linear(
                  means.to(hidden.dtype), head.to(hidden.dtype)).float())),
        Wrong("the means are rounded to bf16 where hidden is: stay in fp32 from the sum on.",
              lambda hidden, lengths, head: _then(_pooled, lambda means, logits: (
                  (rounded := means.to(hidden.dtype).float()), F.linear(rounded, head)))(hidden, lengths, head)),
        Wrong("the means come back in the dtype of hidden, expected fp32.",
              lambda hidden, lengths, head: _then(_pooled, lambda means, logits: (means.to(hidden.dtype), logits))(
                  hidden, lengths, head)),
        Wrong("the head is not transposed: it has a row for each class.",
              _pooled_as(logits=lambda means, head: means @ head)),
        Wrong("the second are probabilities, expected logits: the loss takes the softmax itself.",
              _pooled_as(logits=lambda means, head: F.linear(means, head).softmax(-1))),
        Wrong("the second are log-probabilities, expected logits: the loss takes the softmax itself.",
              _pooled_as(logits=lambda means, head: F.linear(means, head).log_softmax(-1))),
        Wrong("the second are the classes that win, expected the logits of all.",
              _pooled_as(logits=lambda means, head: F.linear(means, head).argmax(-1))),
        Wrong("the two are exchanged: the means come first, then the logits.",
              _then(_pooled, lambda means, logits: (logits, means))),
    ),
    hints=(
        "A text of 3 tokens stands in a row of 10. By how much would its mean shrink if zeros stood behind it?",
        "Compare the places of a row with the length of each text: that is a mask. What it leaves out must not get "
        "into the sum, not even times 0.",
        "places against lengths: (batch, time) · hidden in fp32, with zeros where the mask says so · sum over time · "
        "by the lengths, as a column · times head, transposed.",
    ),
    blocked=("minillama.finetune.Classifier.forward",),
    slow=lambda rng: (torch.randn(8000, 4, 4, generator=rng), torch.randint(1, 5, (8000,), generator=rng),
                      torch.randn(3, 4, generator=rng)),
)  # fmt: skip


# 14.5 ----------------------------------------------------------------------------------------------------------------


def _packed_cases(rng: torch.Generator) -> Iterable[tuple[Any, ...]]:
    def some(*size: int) -> Tensor:
        return torch.randint(1, 5, size, generator=rng)

    yield torch.tensor([[3, 4, 2], [5, 1, 0]]), 11
    yield torch.cat([some(3, 4), torch.zeros(3, 1, dtype=torch.int64)], 1), 18
    yield torch.tensor([[4, 4], [6, 2]]), 8
    yield torch.tensor([[2, 3, 2, 1]]), 10
    yield some(4, 1), 6
    yield torch.tensor([[0, 0], [2, 1]]), 4
    yield torch.tensor([[1]]), 1
    yield torch.zeros(0, 3, dtype=torch.int64), 5


def _packed(lengths: Tensor, width: int, *, numbers: str = "", positions: str = "", sees: str = "", padding: str = "",
            ) -> _Row:  # fmt: skip
    """numbers: how chats are told apart; positions, sees, padding: what is done with these."""
    if numbers == "one row":
        lengths = lengths[:1].expand(len(lengths), -1)
    places = torch.arange(width)
    ends = lengths.cumsum(1)
    late = 1 if numbers == "late" else 0
    chat = (places[None, :, None] >= ends[:, None, :] + late).sum(2).clamp(max=lengths.shape[1] - 1)  # (B, T)
    real = (places >= ends[:, -1:] + late).logical_not() if padding == "late" else places < ends[:, -1:]
    starts = (ends - lengths).gather(1, chat)
    before = lengths.roll(1, 1).index_fill(1, torch.tensor([0]), 0).gather(1, chat)
    chosen = {
        "go on": places.expand(len(lengths), -1), "from 1": places - starts + 1, "padding from 1": places - starts + 1,
        "last": places - before,
        "down": starts + lengths.gather(1, chat) - 1 - places,
    }.get(positions, places - starts)  # fmt: skip
    if positions == "number":
        chosen = chat
    if positions != "padding goes on":
        other = places - ends[:, -1:] if padding == "a chat" or positions == "padding from 0" else 0
        chosen = torch.where(real, chosen, 1 if positions == "padding from 1" else other)
    if numbers == "length":
        chat = lengths.gather(1, chat)
    if numbers == "first seen":
        same = (chat[:, :, None] == chat[:, None, :]) | (chat[:, None, :] == 0)
    elif numbers == "neighbours":
        same = (chat[:, :, None] - chat[:, None, :]).abs() <= 1
    elif numbers == "none":
        same = torch.ones(len(lengths), width, width, dtype=torch.bool)
    else:
        same = chat[:, :, None] == chat[:, None, :]
    causal = places <= places[:, None]
    if sees in ("both", "later", "past"):
        causal = {"both": torch.ones_like(causal), "later": causal.T, "past": causal.tril(-1)}[sees]
    mask = same & causal & real[:, :, None] & real[:, None, :]
    if padding == "like real":
        return chosen, same & causal
    if padding.startswith("a chat"):
        return chosen, mask | (causal & ~real[:, :, None] & ~real[:, None, :])
    if padding == "sees all":
        return chosen, mask | ~real[:, :, None]
    if padding == "sees before":
        return chosen, mask | (causal & ~real[:, :, None])
    if padding == "is seen":
        return chosen, mask | ~real[:, None, :]
    return chosen, mask if padding == "none" else mask | (torch.eye(width, dtype=torch.bool) & ~real[:, :, None])


def _packed_as(**options: Any) -> Callable[..., _Row]:
    return lambda *arguments: _packed(*arguments, **options)


PACKED = Exercise(
    "14.5", "packed chats", "packed", minutes=20, difficulty=4,
    why="Several short chats in a row of a batch save padding, if none of them can tell that the others are there.",
    reference=_packed,
    cases=_packed_cases,
    wrong=(
        Wrong("the positions go on through the row: each chat begins at 0 again.", _packed_as(positions="go on")),
        Wrong("the positions begin at 1, expected 0.", _packed_as(positions="from 1")),
        Wrong("the positions begin at 1, and so do those of padding: expected 0.",
              _packed_as(positions="padding from 1")),
        Wrong("the positions count down.", _packed_as(positions="down")),
        Wrong("the positions are the chats' numbers: they count tokens within a chat.",
              _packed_as(positions="number")),
        Wrong("a chat's positions count from the length of the one before it: there may be several before it.",
              _packed_as(positions="last")),
        Wrong("padding's positions go on from the last chat, expected 0.", _packed_as(positions="padding goes on")),
        Wrong("padding's positions count it as one more chat, expected 0 for all of it.",
              _packed_as(positions="padding from 0")),
        Wrong("a token sees those of its chat that come later: within a chat the mask is causal.",
              _packed_as(sees="both")),
        Wrong("rows and columns are exchanged: a token sees itself and the later ones of its chat.",
              _packed_as(sees="later")),
        Wrong("a token does not see itself, and the first one of a chat sees nothing, which gives NaN.",
              _packed_as(sees="past")),
        Wrong("nothing sees itself, padding and the first token of a chat included, and who sees nothing gets NaN.",
              _packed_as(sees="past", padding="none")),
        Wrong("a chat sees all that stand before it in the row: it must not know of them.", _packed_as(numbers="none")),
        Wrong("the row is taken for one text, with positions that go on and a mask that is causal alone: its chats "
              "must not know of each other.", _packed_as(numbers="none", positions="go on", padding="like real")),
        Wrong("a chat sees all that stand before it, and so does padding: the mask is causal alone.",
              _packed_as(numbers="none", padding="like real")),
        Wrong("a chat sees the one before it: it must not know of it.", _packed_as(numbers="neighbours")),
        Wrong("all chats see the first one of the row: no chat knows of another.", _packed_as(numbers="first seen")),
        Wrong("chats of the same length see each other: they are told apart by their place.",
              _packed_as(numbers="length")),
        Wrong("the first token of a chat is counted to the one before it: a chat of length 3 ends before place 3.",
              _packed_as(numbers="late")),
        Wrong("the first token of a chat is counted to the one before it, and the first place of padding to the last "
              "chat: a chat of length 3 ends before place 3.", _packed_as(numbers="late", padding="late")),
        Wrong("all rows are like the first one: each has its own chats.", _packed_as(numbers="one row")),
        Wrong("padding sees nothing: a softmax over none gives NaN, which spoils the row's gradients.",
              _packed_as(padding="none")),
        Wrong("padding sees the whole row, expected itself alone.", _packed_as(padding="sees all")),
        Wrong("padding sees all that stands before it, expected itself alone.", _packed_as(padding="sees before")),
        Wrong("padding counts as one more chat, with positions and a view of its own: expected position 0, and a view "
              "of itself alone.", _packed_as(padding="a chat")),
        Wrong("padding sees the padding before it, as if it were one more chat: expected itself alone.",
              _packed_as(padding="a chat seen")),
        Wrong("the last chat reaches to the end of the row: what stands behind it is padding.",
              _packed_as(padding="like real", positions="padding goes on")),
        Wrong("the mask treats padding as a part of the last chat: it sees itself alone.",
              _packed_as(padding="like real")),
        Wrong("padding is seen by all: it sees itself, and nobody else sees it.", _packed_as(padding="is seen")),
        Wrong("the mask is turned round: True is where a token may look.",
              _then(_packed, lambda positions, mask: (positions, ~mask))),
        Wrong("the mask has 0 and minus infinity, to be added: expected True and False.",
              _then(_packed, lambda positions, mask: (
                  positions, torch.zeros(mask.shape).masked_fill(~mask, -math.inf)))),
        Wrong("the mask has an axis of heads, expected (batch, time, time).",
              _then(_packed, lambda positions, mask: (positions, mask[:, None]))),
        Wrong("the positions are the same, but the mask is one of the chats' numbers: expected who sees whom.",
              _then(_packed, lambda positions, mask: (positions, mask.sum(2)))),
        Wrong("the two are exchanged: positions come first, then the mask.",
              _then(_packed, lambda positions, mask: (mask, positions))),
    ),
    hints=(
        "Chats of 3 and 4 tokens share a row of 9. Which number within its chat has place 5, and which places may it "
        "see?",
        "Where a chat ends is a sum of lengths. A place belongs to the chat whose number is how many have ended by "
        "then; two places may see each other if that number is the same.",
        "ends: lengths added up · for each place, how many ends it has reached · starts: ends without the lengths, "
        "looked up by that number · same number and not later · padding: position 0, and only the diagonal.",
    ),
    tolerance=0.0,
    blocked=("minillama.attention.packed_mask",),
    slow=lambda rng: (torch.randint(1, 4, (1000, 4), generator=rng), 12),
)  # fmt: skip


# 14.6 ----------------------------------------------------------------------------------------------------------------

_RANKS = (4, 16)


def _changes() -> dict[str, Tensor]:
    """As in the notebook: from one matrix of the toy to another, and one that is nearly of rank 4."""
    model, _ = load("toy")
    one, other = (model.get_parameter(f"blocks.{i}.attention.wq.weight").detach() for i in (1, 2))
    rng = torch.Generator().manual_seed(14)
    thin = torch.randn(96, 4, generator=rng) @ torch.randn(4, 64, generator=rng)
    return {"thin": thin + 0.4 * torch.randn(96, 64, generator=rng), "toy": other - one}


def _best(change: Tensor, rank: int) -> float:
    """How much of a change no matrix of this rank can reach, as a share of its size (Eckart and Young 1936)."""
    values = torch.linalg.svdvals(change)
    return float(values[rank:].norm() / values.norm())


def _verify(measured: dict[str, Any]) -> str:
    def near(key: str, value: float, by: float = 0.002) -> bool:
        return abs(measured[key] - value) <= by * value

    if not 0 < measured["predicted"] <= 1.5:
        return f"the prediction is {measured['predicted']}, expected a share of the change's size, from 0 to about 1."
    best = {f"{name}, {rank}": _best(change, rank) for name, change in _changes().items() for rank in _RANKS}
    if all(near(f"{key}, best", value**2) for key, value in best.items()):
        return "these are shares of the squares, expected of the sizes themselves, which are their roots."
    if all(near(f"{key}, best", 1 - value**2) for key, value in best.items()) or all(
        near(f"{key}, best", math.sqrt(1 - value**2)) for key, value in best.items()
    ):
        return "these are the shares that are reached, expected those that are left."
    if near("thin, 4, best", best["toy, 4"]) and near("toy, 4, best", best["thin, 4"]):
        return "'thin' and 'toy' are exchanged."
    for key, value in best.items():
        if measured[f"{key}, best"] > 1.05:
            return f"'{key}, best' is larger than the change itself: divide by its size."
        if not near(f"{key}, best", value):
            return (
                f"'{key}, best' is not what is left of this change by its singular values: keep as many of the "
                "largest as the rank says, and take the size of the others as a share of the whole."
            )
    for key, value in best.items():
        got = measured[f"{key}, LoRA"]
        if got > 1.05:
            return f"'{key}, LoRA' is larger than the change itself: divide by its size, and take a smaller rate."
        if got < value * (1 - 2e-3):
            return (
                f"'{key}, LoRA' is nearer to the change than any matrix of this rank can be: is it of this rank, and "
                "measured in the same way as the best?"
            )
        if got > 0.9995 and value < 0.99:
            return f"'{key}, LoRA' has not moved at all: one of a and b must begin with something else than zeros."
        if got > value * 1.05:
            return f"'{key}, LoRA' is further away than it has to be: train until it no longer gets nearer."
    if not near("both zero", 1.0, by=0.005):
        return "'both zero' is not what LoRA reaches if a and b both begin as zeros: look at their gradients there."
    return ""


EXPERIMENT = Experiment(
    "14.6", "experiment: what rank does", "measured_14", minutes=20, difficulty=3,
    why="A rank is a promise about the change that a task needs: some changes are thin, others are not.",
    keys={
        "predicted": "what you expect LoRA of rank 16 to leave of the toy's change, as a share of its size, before you "
                     "measure",
        "thin, 4, best": "what the best matrix of rank 4 leaves of the thin change, as a share of its size",
        "thin, 4, LoRA": "what LoRA of rank 4 leaves of the thin change when it is trained, as a share of its size",
        "thin, 16, best": "what the best matrix of rank 16 leaves of the thin change, as a share of its size",
        "thin, 16, LoRA": "what LoRA of rank 16 leaves of the thin change when it is trained, as a share of its size",
        "toy, 4, best": "what the best matrix of rank 4 leaves of the toy's change, as a share of its size",
        "toy, 4, LoRA": "what LoRA of rank 4 leaves of the toy's change when it is trained, as a share of its size",
        "toy, 16, best": "what the best matrix of rank 16 leaves of the toy's change, as a share of its size",
        "toy, 16, LoRA": "what LoRA of rank 16 leaves of the toy's change when it is trained, as a share of its size",
        "both zero": "what LoRA of rank 4 leaves of the thin change if a and b both begin as zeros, as a share of its "
                     "size",
        "because": "a sentence on why",
    },
    verify=_verify,
    explain="on what a change must be like for a small rank to be enough",
    hints=(
        "A matrix has the singular values 3, 4 and 12. How large is it, and what is left of it without the 12?",
        "The best matrix of rank r keeps the r largest singular values. LoRA has to find it by descent: the square of "
        "the distance between the change and what a and b make of it is the loss.",
        "svdvals, the root of the sum of squares from the rank on, by that of all · a random, b zeros, Adam, some "
        "hundred steps on the distance's square by the change's · the distance's size by the change's · again with a "
        "of zeros.",
    ),
)  # fmt: skip


EXERCISES: list[Task] = [TARGETS, LORA, MERGE, POOLED, PACKED, EXPERIMENT]
