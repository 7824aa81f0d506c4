"""Exercises of chapter 09, training."""

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from minillama.checkpoint import load
from minillama.config import ModelConfig
from minillama.course.exercise import Exercise, Experiment, Task, Wrong
from minillama.data import StoryBatches
from minillama.loss import IGNORE, cross_entropy
from minillama.model import Llama

Tensors = list[Tensor]
Gradients = list[Tensor | None]

# 09.1 ----------------------------------------------------------------------------------------------------------------


def _settings(rate: float, beta1: float, beta2: float, eps: float, decay: float) -> dict[str, float]:
    return {"rate": rate, "beta1": beta1, "beta2": beta2, "eps": eps, "decay": decay}


def _adamw_cases(rng: torch.Generator) -> Iterable[tuple[Any, ...]]:
    for shapes, missing, scale, step, settings in (
        (((3, 5),), (), 1.0, 1, _settings(0.1, 0.9, 0.95, 1e-8, 0.1)),
        (((4, 2), (2, 3, 2)), (), 1.0, 3, _settings(0.3, 0.9, 0.999, 0.3, 0.5)),
        (((6,), (3, 4)), (), 0.1, 7, _settings(0.2, 0.8, 0.95, 0.01, 0.4)),
        (((2, 3), (5, 2), (4,)), (1, 2), 1.0, 4, _settings(0.3, 0.9, 0.95, 1e-3, 0.3)),
        (((7, 3), (1, 1)), (), 1e4, 2, _settings(0.5, 0.9, 0.95, 1e-8, 0.2)),
        (((2, 6),), (), 1e-5, 1000, _settings(0.05, 0.9, 0.999, 1e-6, 0.1)),
        ((), (), 1.0, 5, _settings(0.1, 0.9, 0.95, 1e-8, 0.1)),
    ):
        weights = [torch.randn(shape, generator=rng) for shape in shapes]
        gradients = [torch.randn(shape, generator=rng) * scale + scale / 2 for shape in shapes]
        m = [torch.randn(shape, generator=rng) * scale * (step > 1) for shape in shapes]
        v = [(torch.rand(shape, generator=rng) + 0.1) * scale**2 * (step > 1) for shape in shapes]
        yield weights, [None if i in missing else g for i, g in enumerate(gradients)], m, v, step, settings


def _adamw_reference(
    weights: Tensors, gradients: Gradients, m: Tensors, v: Tensors, step: int, settings: dict[str, float]
) -> tuple[Tensors, Tensors, Tensors]:
    parameters = [torch.nn.Parameter(w.clone()) for w in weights]
    moments = [(mean.clone(), square.clone()) for mean, square in zip(m, v, strict=True)]
    if parameters:
        groups = [
            {"params": [p for p in parameters if p.dim() > 1], "weight_decay": settings["decay"]},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ]
        betas = (settings["beta1"], settings["beta2"])
        optimizer = torch.optim.AdamW(groups, lr=settings["rate"], betas=betas, eps=settings["eps"])
        for p, g, (mean, square) in zip(parameters, gradients, moments, strict=True):
            p.grad = g
            optimizer.state[p] = {"step": torch.tensor(step - 1.0), "exp_avg": mean, "exp_avg_sq": square}
        optimizer.step()
    return [p.detach() for p in parameters], [mean for mean, _ in moments], [square for _, square in moments]


def _adamw(
    weights: Tensors, gradients: Gradients, m: Tensors, v: Tensors, step: int, settings: dict[str, float], *,
    fault: str = "",
) -> tuple[Tensors, Tensors, Tensors]:  # fmt: skip
    rate, beta1, beta2, eps, decay = (settings[key] for key in ("rate", "beta1", "beta2", "eps", "decay"))
    if fault == "betas":
        beta1, beta2 = beta2, beta1
    moved: tuple[Tensors, Tensors, Tensors] = ([], [], [])
    for w, given, mean, square in zip(weights, gradients, m, v, strict=True):
        if given is None and fault == "dropped":
            continue
        if given is None and fault != "missing":
            new = (w * (1 - rate * decay) if fault == "still" and w.dim() > 1 else w, mean, square)
        else:
            g = torch.zeros_like(w) if given is None else given
            pull = decay if w.dim() > 1 or fault == "vectors" else 0.0
            if (fault == "planes" and w.dim() > 2) or (fault == "solids" and w.dim() == 2):
                pull = 0.0
            if fault == "l2":
                g, pull = g + pull * w, 0.0
            keep1, keep2 = (1 - beta1, 1 - beta2) if fault == "shares" else (beta1, beta2)
            mean = keep1 * mean + (1 - keep1) * g
            square = keep2 * square + (1 - keep2) * g * g
            t = {"late": step + 1, "none": 10**9}.get(fault, step)
            first, second = mean / (1 - beta1**t), square / (1 - beta2**t)
            if fault == "first":
                first = mean
            if fault == "second":
                second = square
            if fault == "power":
                first, second = mean / (1 - beta1) ** t, square / (1 - beta2) ** t
            size = (second + eps).sqrt() if fault == "inside" else second.sqrt() + eps
            if fault == "eps first":
                size = (square.sqrt() + eps) / math.sqrt(1 - beta2**t)
            if fault == "no root":
                size = second + eps
            if fault == "order":
                w = (w - rate * first / size) * (1 - rate * pull)
            elif fault == "share":
                w = w * (1 - pull) - rate * first / size
            else:
                w = w * (1 - rate * pull) - rate * first / size
            new = (w, first, second) if fault == "kept" else (w, mean, square)
        for found, tensor in zip(moved, new, strict=True):
            found.append(tensor.clone())
    return moved


def _adamw_with(fault: str) -> Callable[..., Any]:
    return functools.partial(_adamw, fault=fault)


ADAMW = Exercise(
    "09.1", "AdamW step", "adamw_step", minutes=25, difficulty=3,
    why="LLaMA was trained with it; a detail that is wrong does not stop the loss from falling, only from falling far.",
    reference=_adamw_reference,
    cases=_adamw_cases,
    wrong=(
        Wrong("there is no bias correction: both moments begin at zero, so the first steps have the wrong length.",
              _adamw_with("none")),
        Wrong("only the first moment is corrected: the second began at zero as well.", _adamw_with("second")),
        Wrong("only the second moment is corrected: the first began at zero as well.", _adamw_with("first")),
        Wrong("the power is taken of one minus beta: after many steps nothing of the start is left, and the correction "
              "should be gone.", _adamw_with("power")),
        Wrong("the shares are exchanged: a running mean keeps beta of what it was and takes in the little that is "
              "left of the new.", _adamw_with("shares")),
        Wrong("the decay goes into the gradient: that is L2, which is then divided by the gradient's size; AdamW "
              "pulls the weight itself.", _adamw_with("l2")),
        Wrong("eps is inside of the root: it belongs to the root of the second moment.", _adamw_with("inside")),
        Wrong("eps is added before the second moment is corrected: correct first, so that eps is not scaled.",
              _adamw_with("eps first")),
        Wrong("the order is wrong: the decay also shrinks this step's own move; it pulls the weight as it came in.",
              _adamw_with("order")),
        Wrong("the decay is not multiplied by the rate: it would go on at full force when the rate falls.",
              _adamw_with("share")),
        Wrong("tensors with fewer than two axes decay as well: norm weights must not be pulled to zero.",
              _adamw_with("vectors")),
        Wrong("matrices do not decay: two axes are enough.", _adamw_with("solids")),
        Wrong("only tensors with two axes decay: those with more do as well.", _adamw_with("planes")),
        Wrong("the corrected moments are handed on: hand on the means as they are.",
              _adamw_with("kept")),
        Wrong("the correction is one step late: the first step is number 1, and it is given as such.",
              _adamw_with("late")),
        Wrong("the betas are mixed up: beta1 is for the gradient, beta2 for its square.", _adamw_with("betas")),
        Wrong("a root is missing: the move is divided by the mean square, not by the size.", _adamw_with("no root")),
        Wrong("a missing gradient is taken for one of zeros: such a weight and its moments stay as they are.",
              _adamw_with("missing")),
        Wrong("a weight decays even where its gradient is missing: such a weight stays as it is.",
              _adamw_with("still")),
        Wrong("weights without a gradient are left out of the lists: the others then stand in the wrong places.",
              _adamw_with("dropped")),
    ),
    hints=(
        "At step 1 with moments of zero and no decay: how far should a weight move, whatever its gradient?",
        "Update both running means; make corrected copies for this step only; pull the weight and move it, together.",
        "skip where the gradient is None · two means · each over one minus its beta to the power of the step · "
        "root plus eps · decay only with two axes or more · three new lists.",
    ),
    blocked=("torch.optim.AdamW.step", "torch.optim.Adam.step", "torch.optim.adam.adam", "torch.optim.adamw.adamw"),
)  # fmt: skip


# 09.2 ----------------------------------------------------------------------------------------------------------------


def _rate_cases(rng: torch.Generator) -> Iterable[tuple[Any, ...]]:
    def some(most: int) -> Tensor:
        return torch.randperm(most, generator=rng)

    return [
        (some(37), 30, 6, 0.004, 0.1),
        (some(20), 19, 5, 3.0, 0.0),
        (some(15), 11, 0, 0.5, 0.25),
        (some(9), 7, 7, 2.0, 0.1),
        (torch.randint(0, 250_000, (11,), generator=rng), 250_000, 2000, 3e-4, 0.1),
        (some(8).view(2, 4), 6, 1, 1.0, 1.0),
        (some(0), 10, 2, 1.0, 0.1),
        (torch.tensor([0]), 1, 0, 0.02, 0.0),
    ]


def _rate_slow(rng: torch.Generator) -> tuple[Any, ...]:
    return torch.randint(0, 500_000, (150_000,), generator=rng), 450_000, 5000, 1.0, 0.1


def _rates(
    step: Tensor, steps: int, warmup: int, peak: float, final: float, *,
    first: int = 1, longer: int = 0, span: int = 0, begin: bool = True, beyond: bool = True, shape: str = "cosine",
    end: str = "share",
) -> Tensor:  # fmt: skip
    k = step.double()
    rising = (k + first) / max(warmup + longer, 1)
    start = warmup if begin else 0
    progress = (k - start) / max(steps - start + span, 1)
    if beyond:
        progress = progress.clamp(max=1.0)
    falling = (1 + torch.cos(math.pi * progress)) / 2 if shape == "cosine" else 1 - progress
    share = {
        "share": final + (1 - final) * falling,
        "zero": falling,
        "added": final + falling,
        "cut": falling.clamp_min(final),
        "rate": (final + (peak - final) * falling) / peak,
    }[end]
    return (peak * torch.where(step < warmup, rising, share)).float()


def _rates_with(**how: Any) -> Callable[..., Tensor]:
    return functools.partial(_rates, **how)


RATE = Exercise(
    "09.2", "learning rate", "learning_rate", minutes=15, difficulty=2,
    why="A step too early or too late is not seen in a loss curve, but it is what makes two runs differ.",
    reference=_rates,
    cases=_rate_cases,
    wrong=(
        Wrong("it is above its end by a step when the run is over: the cosine is stretched over one step too many.",
              _rates_with(span=1)),
        Wrong("it is at its end a step too early: the cosine is squeezed into one step too few.", _rates_with(span=-1)),
        Wrong("the warm-up begins at zero: its first step moves nothing; count from one.", _rates_with(first=0)),
        Wrong("the warm-up ends below the peak: its last step should be at the peak.", _rates_with(longer=1)),
        Wrong("the cosine counts from step 0: it begins where the warm-up ends, or the rate jumps there.",
              _rates_with(begin=False)),
        Wrong("it goes down to zero: it should end at the given share of the peak.", _rates_with(end="zero")),
        Wrong("the end is added on top: the curve then begins above the peak.", _rates_with(end="added")),
        Wrong("the cosine goes to zero and is cut off at the end's height: it should arrive there at the last step, "
              "smoothly.", _rates_with(end="cut")),
        Wrong("the end is taken for a rate: it is a share of the peak.", _rates_with(end="rate")),
        Wrong("behind the last step the rate rises again: there it stays where it ended.", _rates_with(beyond=False)),
        Wrong("it falls along a straight line, expected half a cosine.", _rates_with(shape="line")),
    ),
    hints=(
        "With 4 steps of warm-up, what is the rate at step 0, at step 3 and at step 4?",
        "Compute both curves for all steps at once and choose; the second needs to know how far it is, from 0 to 1.",
        "rising: step plus one over warm-up · progress: since warm-up, over what is left, at most 1 · half of one plus "
        "cosine, squeezed between the final share and 1 · where · times peak.",
    ),
    tolerance=2e-6,
    blocked=("minillama.trainer.rate_at",),
    slow=_rate_slow,
)  # fmt: skip


# 09.3 ----------------------------------------------------------------------------------------------------------------


def _clip_cases(rng: torch.Generator) -> Iterable[tuple[Any, ...]]:
    def some(*shapes: tuple[int, ...], scale: float = 1.0) -> Tensors:
        return [torch.randn(shape, generator=rng) * scale for shape in shapes]

    whole = some((5, 3), (7,), (2, 2, 9), scale=3.0)
    whole[1] = whole[1] / 50  # a quiet tensor beside loud ones
    half = [g.bfloat16() for g in some((40, 30), (11,))]
    signs = [2 * g.sign().bfloat16() for g in some((3, 4), (4,))]  # of norm 8: shortened to 1 without rounding
    return [
        (whole, 1.0),
        (some((4, 3), (2,)), 100.0),
        (some((6, 2), (3,), scale=1e4), 2.5),
        ([*some((3, 4)), None, *some((5,)), None], 0.5),
        (half, 1000.0),
        (signs, 1.0),
        ([torch.zeros(2, 3), torch.zeros(4)], 1.0),
        (some((3, 2), (4,), scale=1e25), 1.0),
        ([None], 1.0),
        ([], 2.0),
        ([*some((2, 2)), torch.tensor([1.0, torch.inf])], 1.0),
        ([torch.tensor([torch.nan, 1.0]), *some((3,))], 1.0),
    ]


def _clip_reference(gradients: Gradients, limit: float) -> tuple[Gradients, float]:
    given = [g.flatten().double() for g in gradients if g is not None]
    norm = torch.linalg.vector_norm(torch.cat([*given, torch.zeros(1).double()])).item()
    if not math.isfinite(norm):
        raise FloatingPointError(f"the norm of the gradient is {norm}, expected a number.")
    return _scaled(gradients, limit / norm if norm > limit else 1.0), norm


def _scaled(gradients: Gradients, factor: float) -> Gradients:
    return [None if g is None else g * factor for g in gradients]


def _clip(gradients: Gradients, limit: float, *, fault: str) -> tuple[Gradients, float]:
    given = [g.double() for g in gradients if g is not None]
    norms = [g.square().sum().sqrt().item() for g in given]
    norm = math.sqrt(sum(n * n for n in norms))
    if fault == "narrow":
        kept = [g for g in gradients if g is not None]
        norm = math.sqrt(sum(g.square().sum().item() for g in kept))
    if fault == "fp32":
        norm = math.sqrt(sum(g.float().square().sum().item() for g in given))
    if fault == "own norms":
        norm = torch.stack([g.norm() for g in gradients if g is not None]).norm().item()
    if fault == "own vector":
        norm = torch.cat([g.flatten() for g in gradients if g is not None]).norm().item()
    if fault == "sum of norms":
        norm = sum(norms)
    if fault == "mean":
        norm = norm / math.sqrt(max(1, sum(g.numel() for g in given)))
    if fault == "largest":
        norm = max((g.abs().max().item() for g in given), default=0.0)
    if fault == "squared":
        norm = norm * norm
    if not math.isfinite(norm) and fault != "unseen":
        raise FloatingPointError("not a number")
    factor = min(1.0, limit / max(norm, 1e-30))
    if fault == "up":
        return _scaled(gradients, limit / max(norm, 1e-6)), norm
    if fault == "unit":
        return _scaled(gradients, min(1.0, 1 / max(norm, 1e-30))), norm
    if fault == "no limit":
        return _scaled(gradients, 1 / norm if norm > limit else 1.0), norm
    if fault == "value":
        return [None if g is None else g.clamp(-limit, limit) for g in gradients], norm
    if fault == "per tensor":
        return [
            None if g is None else g * min(1.0, limit / max(g.double().norm().item(), 1e-30)) for g in gradients
        ], norm
    if fault == "zeros":
        return [torch.zeros(0) if g is None else g * factor for g in gradients], norm
    if fault == "dropped":
        return [g * factor for g in gradients if g is not None], norm
    return _scaled(gradients, factor), min(norm, limit) if fault == "after" else norm


def _clip_with(fault: str) -> Callable[..., Any]:
    return functools.partial(_clip, fault=fault)


CLIP = Exercise(
    "09.3", "clip by the global norm", "clip_gradients", minutes=15, difficulty=2,
    why="One bad batch can undo an hour of training; a clip that bends the gradient harms in every step.",
    reference=_clip_reference,
    cases=_clip_cases,
    wrong=(
        Wrong("each tensor is clipped by its own norm: that turns the gradient as a whole; one factor is for all.",
              _clip_with("per tensor")),
        Wrong("a short gradient is scaled up: clipping only ever shortens.", _clip_with("up")),
        Wrong("each number is clipped by its value: that turns the gradient; scale all of it by one factor.",
              _clip_with("value")),
        Wrong("the norms of the tensors are added up: their squares add, and the root comes last.",
              _clip_with("sum of norms")),
        Wrong("a mean of squares stands where the sum should be: the norm is that of one long vector.",
              _clip_with("mean")),
        Wrong("the largest number is taken for the norm.", _clip_with("largest")),
        Wrong("the root is missing: that is the squared norm.", _clip_with("squared")),
        Wrong("gradients are shortened to a norm of 1, whatever the limit.", _clip_with("unit")),
        Wrong("what is longer than the limit is shortened to 1: shorten it to the limit.", _clip_with("no limit")),
        Wrong("the norm is that after clipping: return it as it was before, since that is what one wants to watch.",
              _clip_with("after")),
        Wrong("the squares are summed in the gradients' own dtype: large ones overflow, and bf16 loses digits; "
              "widen first.", _clip_with("narrow")),
        Wrong("the squares are summed in fp32: those of large numbers overflow to infinity, though the norm does not; "
              "widen further.", _clip_with("fp32")),
        Wrong("the norms of the tensors are in their own dtype: bf16 rounds them, large ones overflow, and without any "
              "tensor there is nothing to join; widen first, and begin from 0.", _clip_with("own norms")),
        Wrong("the norm of the one long vector is in the gradients' own dtype: bf16 rounds it, large ones overflow; "
              "and without any tensor there is no vector to make.", _clip_with("own vector")),
        Wrong("a gradient with infinity or NaN in it goes through: raise FloatingPointError before it spoils the "
              "weights.", _clip_with("unseen")),
        Wrong("missing gradients are left out of the list: the others then belong to the wrong weights.",
              _clip_with("dropped")),
        Wrong("a missing gradient becomes a tensor: None stays None.", _clip_with("zeros")),
    ),
    hints=(
        "Two tensors with the norms 3 and 4: what is the norm of both together?",
        "One number for the whole list, in fp64; then one factor, never above 1, for every tensor.",
        "sum of squares over all that is not None · root · check that it is finite · factor: limit over norm, if the "
        "norm is above · new list, None where None was.",
    ),
    blocked=("torch.nn.utils.clip_grad_norm_", "torch.nn.utils.get_total_norm",
             "torch.nn.utils.clip_grads_with_norm_", "torch.nn.utils.clip_grad.clip_grad_norm_"),
)  # fmt: skip


# 09.4 ----------------------------------------------------------------------------------------------------------------

BOS, EOS = 1, 2


def _story_cases(rng: torch.Generator) -> Iterable[tuple[Any, ...]]:
    for sizes, length in (
        ((5, 4, 9, 3, 3, 6, 11, 2, 2), 10),
        ((3, 3, 8, 4, 4, 5), 7),
        ((3, 4, 2, 5, 3, 3, 2), 11),  # more than two in a row
        ((4, 7), 12),
        ((2, 2, 2), 1),
        ((6,), 9),
        ((), 5),
    ):
        yield [[BOS, *torch.randint(3, 90, (n - 2,), generator=rng).tolist(), EOS] for n in sizes], length


def _packed_rows(stories: list[list[int]], length: int, *, fault: str = "") -> list[list[list[int]]]:
    """Which stories share a row."""
    rows: list[list[list[int]]] = []
    extra = 1 if fault == "tight" else 0
    room = length - 1 if fault == "never full" else length
    for story in stories:
        takes = len(story) - 1
        open_rows = rows if fault == "first fit" else rows[-1:]
        for row in open_rows if fault != "alone" else []:
            if sum(len(other) - 1 + extra for other in row) + takes + extra <= room:
                row.append(story)
                break
        else:
            rows.append([story])
    return rows


def _batch(stories: list[list[int]], length: int, *, fault: str = "") -> tuple[Tensor, Tensor, Tensor]:
    rows = _packed_rows(stories, length, fault=fault)
    if fault == "cut":
        pairs = [(x, y) for story in stories for x, y in zip(story[:-1], story[1:], strict=True)]
        rows = [[[0] * (length + 1)]] * -(-len(pairs) // length)
    inputs = torch.zeros(len(rows), length, dtype=torch.int64)
    targets = torch.full((len(rows), length), 0 if fault == "padding" else IGNORE)
    owner = torch.full((len(rows), length), -1)
    if fault == "cut":
        numbers = [i for i, story in enumerate(stories) for _ in story[1:]]
        for place, ((x, y), number) in enumerate(zip(pairs, numbers, strict=True)):
            at = divmod(place, length)
            inputs[at], targets[at], owner[at] = x, y, number
    for b, row in enumerate(rows if fault != "cut" else []):
        xs = [token for story in row for token in story[:-1]]
        ys = [token for story in row for token in story[1:]]
        who = [i for i, story in enumerate(row) for _ in story[1:]]
        if fault == "neighbours":
            who = [i % 2 for i in who]
        if fault == "equal":
            who = [row.index(row[i]) for i in who]
        if fault == "joined":
            owner[b] = len(row) - 1
        if fault == "border":
            tokens = [token for story in row for token in story]
            who = [i for i, story in enumerate(row) for _ in story][:-1][:length]
            xs, ys = tokens[:-1][:length], tokens[1:][:length]
        if fault == "not shifted":
            ys = xs
        if fault == "begins":
            ys = [token for story in row for token in [*story[1:-1], story[0]]]
        if fault == "two ahead":
            ys = [token for story in row for token in [*story[2:], IGNORE]]
        if fault == "no end":
            ys = [token if token != EOS else IGNORE for token in ys]
        inputs[b, : len(xs)], targets[b, : len(ys)], owner[b, : len(who)] = (torch.tensor(x) for x in (xs, ys, who))
    own = owner[:, :, None] == owner[:, None, :]
    earlier = torch.ones(length, length).tril().bool()
    if fault == "leak":
        return inputs, targets, earlier.expand_as(own).clone()
    if fault == "future":
        return inputs, targets, own
    if fault == "transposed":
        return inputs, targets, (own & earlier).mT.contiguous()
    if fault == "diagonal":
        return inputs, targets, own & earlier.tril(-1)
    if fault == "blind":
        return inputs, targets, own & earlier & (owner >= 0)[:, :, None]
    if fault == "itself":
        return inputs, targets, own & earlier & ((owner >= 0)[:, :, None] | torch.eye(length).bool())
    return inputs, targets, own & earlier


def _batch_with(fault: str) -> Callable[..., Any]:
    return functools.partial(_batch, fault=fault)


BATCHES = Exercise(
    "09.4", "batches", "batches", minutes=25, difficulty=4,
    why="A model that sees another story, or its own answer, has a fine loss and learns nothing of use.",
    reference=_batch,
    cases=_story_cases,
    wrong=(
        Wrong("stories leak: a token may look at the stories that stand before its own in the row.",
              _batch_with("leak")),
        Wrong("targets are not shifted: each asks for the token that the model has just read.",
              _batch_with("not shifted")),
        Wrong("targets are two ahead: each asks for the token after the next.", _batch_with("two ahead")),
        Wrong("a target crosses a border: the end of a story asks for the beginning of the next.",
              _batch_with("border")),
        Wrong("the last target of each story is a BOS: it should be the story's own end.", _batch_with("begins")),
        Wrong("padding is scored: a target behind the last story must be -100.", _batch_with("padding")),
        Wrong("the end of each story is not scored: the model never learns to stop.", _batch_with("no end")),
        Wrong("each story has a row of its own: as many as fit shall share one.", _batch_with("alone")),
        Wrong("stories are cut where a row is full: one that does not fit as a whole begins a new row.",
              _batch_with("cut")),
        Wrong("a story that just fits begins a new row: n tokens need only n - 1 places.", _batch_with("tight")),
        Wrong("a story that would fill its row to the last place begins a new row: it fits.",
              _batch_with("never full")),
        Wrong("a story was put into an earlier row that had room: only the newest row is open.",
              _batch_with("first fit")),
        Wrong("only neighbours are kept apart: the third story of a row may look at the first.",
              _batch_with("neighbours")),
        Wrong("stories with the same tokens are taken for one: the second may look at the first.",
              _batch_with("equal")),
        Wrong("tokens look ahead within their story: the mask is not causal.", _batch_with("future")),
        Wrong("the mask is transposed: the row is the token that looks, the column what it looks at.",
              _batch_with("transposed")),
        Wrong("no token may look at itself: the diagonal belongs to the mask.", _batch_with("diagonal")),
        Wrong("padding may look at nothing: a softmax over nothing is NaN; let it look at padding.",
              _batch_with("blind")),
        Wrong("padding may look at the last story of its row: for the mask it is a story of its own.",
              _batch_with("joined")),
        Wrong("padding may look only at itself: as one more story it looks at the padding before it, too.",
              _batch_with("itself")),
    ),
    hints=(
        "A story of 5 tokens: how many inputs does it give, and how many targets?",
        "Turn each story into its inputs and its targets first, and pack these: then no target can cross a border.",
        "go through the stories, open a row when one does not fit · three tensors: inputs, targets, number of the "
        "story (one of its own for padding) · mask: same number, and not later.",
    ),
    tolerance=0.0,
    blocked=("minillama.data.stack",),
)  # fmt: skip


# 09.5 ----------------------------------------------------------------------------------------------------------------


def _part_cases(rng: torch.Generator) -> Iterable[tuple[Any, ...]]:
    def some(parts: int, *shapes: tuple[int, ...]) -> list[Gradients]:
        return [[torch.randn(shape, generator=rng) + 0.3 for shape in shapes] for _ in range(parts)]

    missing = some(3, (2, 3), (4,), (5,))
    missing[1][1] = missing[2][1] = None
    for part in missing:
        part[2] = None
    empty = some(4, (3, 2), (3,))
    empty[1] = [torch.full_like(g, torch.nan) for g in empty[1] if g is not None]
    half = [[g.bfloat16() for g in part if g is not None] for part in some(6, (9, 4), (3,))]
    return [
        (some(3, (4, 3), (5,)), [7, 2, 30]),
        (some(2, (3, 3, 2)), [1, 6]),
        (some(1, (2, 5), (1,)), [9]),
        (some(5, (6,)), [100_000, 3, 40_000, 1, 250]),
        (missing, [4, 3, 8]),
        (half, [5, 17, 3, 9, 1, 11]),
        (empty, [5, 0, 2, 12]),
    ]


def _whole(gradients: list[Gradients], scored: list[int]) -> Gradients:
    share = torch.tensor(scored).double() / sum(scored)
    found: Gradients = []
    for column in zip(*gradients, strict=True):
        counted = [(g, s) for g, s in zip(column, share, strict=True) if g is not None and s > 0]
        stacked = [g.double() * s for g, s in counted]
        found.append(torch.stack(stacked).sum(0).float() if stacked else None)
    return found


def _sums(gradients: list[Gradients], scored: list[int], *, fault: str) -> Gradients:
    found: Gradients = []
    for column in zip(*gradients, strict=True):
        pairs = [(g.float(), n) for g, n in zip(column, scored, strict=True) if g is not None]
        if fault in ("skipped mean", "own dtype", "tokens of the present", "part twice"):
            pairs = [(g, n) for g, n in pairs if n > 0]
        if not pairs:
            found.append(None)
            continue
        parts = [g for g, _ in pairs]
        total = torch.zeros_like(parts[0])
        if fault == "last":
            total = parts[-1]
        elif fault == "running":
            total = parts[0]
            for g in parts[1:]:
                total = (total + g) / 2
        elif fault == "own dtype":
            kind = next(g.dtype for g in column if g is not None)
            total = total.to(kind)
            for g, n in pairs:
                total = total + g.to(kind) * n
            total = (total / sum(scored)).float()
        else:
            for g, n in pairs:
                total = total + g * (1 if fault in ("sum", "mean", "skipped mean") else n)
            counts = {
                "mean": len(gradients),
                "skipped mean": sum(n > 0 for n in scored),
                "tokens": 1,
                "sum": 1,
                "part twice": sum(scored) * len(gradients),
                "tokens of the present": sum(n for _, n in pairs),
                "nan": sum(scored),
            }
            total = total / counts[fault]
        found.append(total)
    return found


def _sums_with(fault: str) -> Callable[..., Any]:
    return functools.partial(_sums, fault=fault)


ACCUMULATE = Exercise(
    "09.5", "accumulate", "accumulate", minutes=20, difficulty=3,
    why="A batch of millions of tokens comes in small parts, and when these are weighted wrongly no error says so.",
    reference=_whole,
    cases=_part_cases,
    wrong=(
        Wrong("the parts are only added up: nothing divides, so twice the parts would give twice the gradient.",
              _sums_with("sum")),
        Wrong("it is the plain mean of the parts: a part with few scored tokens then counts as much as one with many.",
              _sums_with("mean")),
        Wrong("it is the plain mean of the parts that score something: weight each by its scored tokens.",
              _sums_with("skipped mean")),
        Wrong("the parts are weighted by their tokens, but the sum is not divided by all tokens.",
              _sums_with("tokens")),
        Wrong("it is divided by the number of parts as well: dividing by all scored tokens is enough.",
              _sums_with("part twice")),
        Wrong("a part without scored tokens makes all NaN: its mean is 0/0, so leave it out.", _sums_with("nan")),
        Wrong("only the last part is left: each one wiped out what was there before.", _sums_with("last")),
        Wrong("each new part is averaged with all before it: the last then counts half, however many there were.",
              _sums_with("running")),
        Wrong("the tokens of parts in which a weight has no gradient are not counted: there it is zero, and the tokens "
              "are in the mean all the same.", _sums_with("tokens of the present")),
        Wrong("bf16 gradients were added in bf16: small parts vanish in the sum; add in fp32.",
              _sums_with("own dtype")),
    ),
    hints=(
        "One part has 1 scored token, the other 99: how much of the mean over all 100 is the first one's?",
        "Undo each part's mean (times its tokens), add, and divide once, by the tokens of all parts.",
        "for each weight: fp32 sum of gradient times tokens, over the parts that have both · over the sum of all "
        "tokens · None if no part has a gradient.",
    ),
    tolerance=2e-6,
)  # fmt: skip


# 09.6 ----------------------------------------------------------------------------------------------------------------

STEPS = 30
SMALL, LARGE = 0.01, 0.12
RUNS = {
    "small": (SMALL, True),
    "small, not corrected": (SMALL, False),
    "large": (LARGE, True),
    "large, not corrected": (LARGE, False),
}


def _short_run(rate: float, corrected: bool) -> float:
    """The mean loss of the last five of 30 steps."""
    _, tokenizer = load("toy")
    assert tokenizer is not None
    source = StoryBatches(tokenizer, 4, seed=0)
    state = torch.get_rng_state()
    torch.manual_seed(0)
    model = Llama(ModelConfig(dim=48, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16, ffn_dim=128, vocab_size=2048,
                              max_seq_len=512, tie_embeddings=True))  # fmt: skip
    torch.set_rng_state(state)
    weights: Tensors = list(model.parameters())
    m, v = ([torch.zeros_like(w) for w in weights] for _ in range(2))
    losses, settings = [], _settings(rate, 0.9, 0.999, 1e-8, 0.1)
    for step in range(1, STEPS + 1):
        batch = source(step)
        loss = cross_entropy(model(batch.inputs), batch.targets)
        losses.append(loss.item())
        gradients: Gradients = list(torch.autograd.grad(loss, weights))
        with torch.no_grad():
            moved, m, v = _adamw(weights, gradients, m, v, step if corrected else 10**9, settings)
            for w, new in zip(weights, moved, strict=True):
                w.copy_(new)
    return sum(losses[-5:]) / 5


def _verify(measured: dict[str, Any]) -> str:
    losses = {key: float(measured[key]) for key in RUNS}
    for key, loss in losses.items():
        # Thrown far, a run depends on the last bits of a machine: of that one, only that it was thrown is asked.
        if key == "large, not corrected":
            fits = losses["large"] + 0.2 < loss < 100
        else:
            true = _short_run(*RUNS[key])
            fits = abs(loss - true) <= 0.03 * true
        if not fits:
            return (
                f"{key!r} is {loss:.3f}, which is not the mean loss of the last five steps: begin each run with a "
                "fresh model from seed 0 and moments of zero, and change nothing but what its name says."
            )
    if not 0 < measured["predicted"] < 20:
        return f"the prediction is {measured['predicted']}, expected a loss in nats, above 0."
    return ""


EXPERIMENT = Experiment(
    "09.6", "experiment: first steps that are too long", "measured_09", minutes=25, difficulty=4,
    why="Bias correction looks like a detail; taken out, it helps one run and throws another.",
    keys={
        "predicted": "the loss that you expect at the large rate without bias correction, written before you measure",
        "small": "the mean loss of the last five steps at rate 0.01, in nats per token",
        "small, not corrected": "the same without bias correction",
        "large": "the mean loss of the last five steps at rate 0.12, in nats per token",
        "large, not corrected": "the same without bias correction",
        "because": "a sentence on why",
    },
    verify=_verify,
    explain="on how long the first steps are",
    hints=(
        "With a beta2 of 0.999, how much of the squared gradient is in the uncorrected v after one step?",
        "You need no second AdamW: at which step number do both corrections become 1?",
        "call short_run four times · in the uncorrected runs it passes on a huge step number · note the four means.",
    ),
)  # fmt: skip


EXERCISES: list[Task] = [ADAMW, RATE, CLIP, BATCHES, ACCUMULATE, EXPERIMENT]
