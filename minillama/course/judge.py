"""The verdict on an answer: what it gave for each input, and if that is wrong, which mistake it is.

Only `run` runs the learner's code; `judge` looks at results, so that they may come from another process.
"""

import contextlib
import copy
import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minillama.course.exercise import Exercise, Experiment, Task, generator

SLOW = 25  # times the reference's time; a loop in Python takes a hundred times or more
WORDS = 8  # of an explanation, at least, and different ones
NOT_ATTEMPTED = "not attempted yet."


@dataclass(frozen=True)
class Outcome:
    """What one call gave: a value, or the error that it raised; and which arguments it changed (their positions)."""

    value: Any = None
    error: str = ""  # "" or as in "TypeError: …"
    changed: tuple[int, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """Whether an answer passed; if not, one sentence that says what is wrong, and at which case (or -1)."""

    passed: bool
    message: str = ""
    case: int = -1

    @property
    def attempted(self) -> bool:
        return self.message != NOT_ATTEMPTED


def cases(exercise: Exercise, seed: int = 0) -> list[tuple[Any, ...]]:
    """The arguments of every call of a check."""
    return [tuple(arguments) for arguments in exercise.cases(generator(exercise, seed))]


def run(answer: Callable[..., Any], arguments: Sequence[Any]) -> Outcome:
    """Call an answer with arguments of its own, and note what becomes of them."""
    given = copy.deepcopy(tuple(arguments))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value = answer(*given)
    except Exception as error:
        return Outcome(error=f"{type(error).__name__}: {error}".splitlines()[0])
    changed = tuple(i for i, (now, was) in enumerate(zip(given, arguments, strict=True)) if not equal(now, was, 0.0))
    return Outcome(value.detach() if isinstance(value, Tensor) else value, changed=changed)


def run_slow(exercise: Exercise, answer: Callable[..., Any], seed: int = 0) -> float:
    """Seconds of this process that an answer takes for the large input, however busy the machine is."""
    assert exercise.slow is not None
    times = []
    for _ in range(2):  # the better of two: the first may have to warm up
        arguments = copy.deepcopy(exercise.slow(generator(exercise, seed)))
        started = time.process_time()
        with contextlib.suppress(Exception):  # what it raises, the cases have shown
            answer(*arguments)
        times.append(time.process_time() - started)
    return min(times)


def equal(got: Any, expected: Any, tolerance: float) -> bool:
    """Whether two values are the same: type, shape and dtype; numbers up to `tolerance` times the largest expected."""
    if isinstance(expected, Tensor):
        if not isinstance(got, Tensor) or (got.shape, got.dtype, got.device) != (
            expected.shape, expected.dtype, expected.device,
        ):  # fmt: skip
            return False
        return _near(got, expected, tolerance)
    if isinstance(expected, (list, tuple)):
        return (
            isinstance(got, (list, tuple))
            and len(got) == len(expected)
            and all(equal(g, e, tolerance) for g, e in zip(got, expected, strict=True))
        )
    if isinstance(expected, dict):
        return (
            isinstance(got, dict)
            and got.keys() == expected.keys()
            and all(equal(got[key], expected[key], tolerance) for key in expected)
        )
    if isinstance(expected, float) and isinstance(got, (int, float)) and not isinstance(got, bool):
        wide = torch.float64
        return _near(torch.tensor(float(got), dtype=wide), torch.tensor(expected, dtype=wide), tolerance)
    return type(got) is type(expected) and bool(got == expected)


def _near(got: Tensor, expected: Tensor, tolerance: float) -> bool:
    if not expected.is_floating_point() or tolerance == 0:
        return bool(((got == expected) | ((got != got) & (expected != expected))).all())
    got, expected = got.double(), expected.double()
    finite = expected[expected.isfinite()]
    bound = tolerance * (finite.abs().max().item() if finite.numel() else 1.0)
    return bool(torch.isclose(got, expected, rtol=0, atol=max(bound, 1e-30), equal_nan=True).all())


def judge(exercise: Task, outcomes: list[Outcome], seed: int = 0, seconds: float | None = None) -> Verdict:
    """The verdict on what an answer gave for each case (for an experiment: on the one dictionary).

    `seconds`: how long the large input took, if the exercise has one.
    """
    if isinstance(exercise, Experiment):
        return _judge_experiment(exercise, outcomes[0])
    inputs = cases(exercise, seed)
    if any(outcome.error.startswith("NotImplementedError") for outcome in outcomes):
        return Verdict(False, NOT_ATTEMPTED)
    right = [run(exercise.reference, arguments) for arguments in inputs]
    tolerance = exercise.tolerance
    failed = [i for i, (got, want) in enumerate(zip(outcomes, right, strict=True)) if not _same(got, want, tolerance)]
    if not failed:
        if exercise.slow and seconds is not None:
            own = run_slow(exercise, exercise.reference, seed)
            if seconds > SLOW * max(own, 1e-3):
                factor = seconds / max(own, 1e-3)
                return Verdict(False, f"right, but {factor:,.0f} times as slow as it can be.")
        return Verdict(True)
    known = [
        wrong.message
        for wrong in exercise.wrong
        if all(
            _same(got, run(wrong.answer, arguments), tolerance) for got, arguments in zip(outcomes, inputs, strict=True)
        )
    ]
    if known:
        return Verdict(False, " Or: ".join(known), failed[0])
    first = failed[0]
    return Verdict(False, _difference(outcomes[first], right[first], tolerance), first)


def _same(got: Outcome, want: Outcome, tolerance: float) -> bool:
    if got.error or want.error:
        return got.error.partition(":")[0] == want.error.partition(":")[0]
    return got.changed == want.changed and equal(got.value, want.value, tolerance)


def _judge_experiment(exercise: Experiment, outcome: Outcome) -> Verdict:
    measured = outcome.value
    if not isinstance(measured, dict):
        return Verdict(False, f"{exercise.name} is {_kind(measured)}, expected a dictionary.")
    if all(measured.get(key) in (None, "", ...) for key in exercise.keys):
        return Verdict(False, NOT_ATTEMPTED)
    for key, what in exercise.keys.items():
        value = measured.get(key)
        if value in (None, "", ...):
            return Verdict(False, f"{exercise.name}[{key!r}] is missing, expected {what}.")
        if isinstance(value, float) and not math.isfinite(value):
            return Verdict(False, f"{exercise.name}[{key!r}] is {value}, expected {what}.")
    if len(set(str(measured["because"]).lower().split())) < WORDS:  # first, so that it says nothing about the rest
        return Verdict(False, f"the explanation is too short: give {WORDS} words or more, {exercise.explain}.")
    try:
        problem = exercise.verify(measured)
    except (TypeError, ValueError, KeyError) as error:
        problem = f"{exercise.name} holds something else than was asked for ({type(error).__name__}: {error})."
    return Verdict(not problem, problem)


# ---------------------------------------------------------------------------------------------------------------------
# No known mistake: say where the first difference is, and of what kind.


def _difference(got: Outcome, want: Outcome, tolerance: float) -> str:
    if got.error and want.error:
        return f"it raises {got.error.rstrip(': ')}, expected {want.error.partition(':')[0]} to be raised."
    if got.error:
        return f"it raises {got.error.rstrip(': ')}"
    if want.error:
        return f"it returns {_kind(got.value, whole=True)}, expected {want.error.partition(':')[0]} to be raised."
    if got.changed and not want.changed:
        return f"it changes its argument {got.changed[0] + 1} in place: work on a copy."
    return _first_difference(got.value, want.value, tolerance)


def _kind(value: Any, whole: bool = False) -> str:
    """What a value is, in words. whole: it is the answer as such, and not a part of it."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}, {str(value.dtype).removeprefix('torch.')}"
    if value is None:
        return "None (is a return missing?)" if whole else "None"
    return f"{'an' if type(value).__name__[0] in 'aeiou' else 'a'} {type(value).__name__}"


def _first_difference(got: Any, expected: Any, tolerance: float, where: str = "") -> str:
    at = f" at {where}" if where else ""
    if isinstance(expected, Tensor):
        if not isinstance(got, Tensor):
            return f"it returns {_kind(got, not where)}{at}, expected {_kind(expected)}."
        if got.shape != expected.shape:
            turned = expected.dim() > 1 and got.shape == expected.mT.shape
            flipped = " (the last two axes are swapped)" if turned else ""
            return f"the shape{at} is {tuple(got.shape)}, expected {tuple(expected.shape)}{flipped}."
        if got.dtype != expected.dtype:
            return f"the dtype{at} is {got.dtype}, expected {expected.dtype}."
        if got.device != expected.device:
            return f"the device{at} is {got.device}, expected {expected.device}."
        return _tensor_difference(got, expected, tolerance) + (f" (This is about {where}.)" if where else "")
    if isinstance(expected, (list, tuple)):
        if not isinstance(got, (list, tuple)):
            return f"it returns {_kind(got, not where)}{at}, expected {_kind(expected)}."
        for index, (one, other) in enumerate(zip(got, expected, strict=False)):
            if not equal(one, other, tolerance):
                return _first_difference(one, other, tolerance, f"{where}[{index}]")
        return f"the length{at} is {len(got)}, expected {len(expected)}."
    if isinstance(expected, dict) and isinstance(got, dict):
        if got.keys() != expected.keys():
            missing, extra = (
                sorted(map(str, expected.keys() - got.keys())),
                sorted(map(str, got.keys() - expected.keys())),
            )
            return f"the keys{at} differ: missing {missing[:3]}, not expected {extra[:3]}."
        key = next(key for key in expected if not equal(got[key], expected[key], tolerance))
        return _first_difference(got[key], expected[key], tolerance, f"{where}[{key!r}]")
    if isinstance(expected, str) and isinstance(got, str):
        if max(len(got), len(expected)) <= 40:
            return f"the text{at} is {got!r}, expected {expected!r}."
        place = next(
            (i for i, (a, b) in enumerate(zip(got, expected, strict=False)) if a != b), min(len(got), len(expected))
        )
        here, there = got[place : place + 20], expected[place : place + 20]
        return f"the texts{at} differ from character {place} on: got {here!r}, expected {there!r}."
    if type(got) is not type(expected) and not (isinstance(expected, float) and isinstance(got, int)):
        return f"it returns {_kind(got, not where)}{at}, expected {_kind(expected)}."
    return f"it gives {got!r:.60}{at}, expected {expected!r:.60}."


def _tensor_difference(got: Tensor, expected: Tensor, tolerance: float) -> str:
    same = torch.isclose(got.double(), expected.double(), rtol=0, atol=_bound(expected, tolerance), equal_nan=True)
    index = tuple(int(i) for i in (~same).nonzero()[0])
    place = f"[{', '.join(map(str, index))}]" if index else "the value"
    found = f"{place} is {_number(got[index])}, expected {_number(expected[index])}"
    return f"{found}{_what_kind(got, expected, same, tolerance)}."


def _bound(expected: Tensor, tolerance: float) -> float:
    finite = expected.double()[expected.isfinite()] if expected.is_floating_point() else expected.new_zeros(0)
    return tolerance * finite.abs().max().item() if finite.numel() else 0.0


def _number(value: Tensor) -> str:
    return f"{value.item():.6g}" if value.is_floating_point() else f"{value.item()}"


def _what_kind(got: Tensor, expected: Tensor, same: Tensor, tolerance: float) -> str:
    """A clue on the whole difference: NaN, sign, scale, transposed, shifted, only at some positions."""
    if expected.dtype == torch.bool:
        return "; all values are turned round" if bool((got == ~expected).all()) else _positions(same)
    if not expected.is_floating_point():
        return _shifted(got, expected, 0.0) or _positions(same)
    if got.isnan().any() and not expected.isnan().any():
        return f"; {int(got.isnan().sum())} of {got.numel()} values are not numbers (NaN)"
    if (got.isposinf() & expected.isfinite()).any():
        return "; some values overflow to infinity"
    if (got.isneginf() & expected.isfinite()).any():
        return "; some values are minus infinity"
    one, other = got.double(), expected.double()
    clean = other.isfinite() & (other.abs() > _bound(expected, 1e-3))
    if clean.any():
        ratios = one[clean] / other[clean]
        ratio = ratios.median().item()
        if abs(ratio - 1) > 1e-4 and bool(((ratios - ratio).abs() < 1e-3 * max(abs(ratio), 1e-9)).all()):
            return (
                "; all signs are turned round"
                if abs(ratio + 1) < 1e-3
                else f"; all values are {ratio:.6g} times as large"
            )
        differences = (one - other)[clean]
        if (
            bool(((differences - differences[0]).abs() < 1e-3 * abs(differences[0].item()) + 1e-12).all())
            and clean.all()
        ):
            return f"; all values are {differences[0].item():+.4g} off" if differences.numel() > 1 else ""
    if (
        got.dim() > 1
        and got.shape[-1] == got.shape[-2]
        and got.shape[-1] > 1
        and equal(got.mT.contiguous(), expected, max(tolerance, 1e-6))
    ):
        return "; the last two axes are swapped"
    return _shifted(got, expected, max(tolerance, 1e-6)) or _positions(same)


def _shifted(got: Tensor, expected: Tensor, tolerance: float) -> str:
    for axis in range(expected.dim()):
        for by in (1, -1):
            size = expected.shape[axis]
            if size > 2 and equal(
                got.narrow(axis, max(by, 0), size - 1).contiguous(),
                expected.narrow(axis, max(-by, 0), size - 1).contiguous(),
                tolerance,
            ):
                return f"; everything stands one place too {'late' if by == 1 else 'early'} along axis {axis}"
    return ""


def _positions(same: Tensor) -> str:
    """Where along each axis the differences are, if that is telling."""
    if same.dim() == 0 or same.numel() == 1:
        return ""
    if int((~same).sum()) <= 2 < same.numel():  # too few to speak of an axis
        return f"; {int((~same).sum())} of {same.numel()} values differ"
    for axis in range(same.dim()):
        size = same.shape[axis]
        wrong = (~same).transpose(0, axis).flatten(1).any(1) if same.dim() > 1 else ~same
        if size > 2 and wrong.sum() < size:
            places = wrong.nonzero().flatten().tolist()
            if places == [size - 1]:
                return f"; only the last place along axis {axis} is wrong"
            if places == [0]:
                return f"; only place 0 along axis {axis} is wrong"
            if places == list(range(1, size)):
                return f"; all but place 0 along axis {axis} are wrong"
    return f"; {int((~same).sum())} of {same.numel()} values differ"
