"""What an exercise is: a reference, inputs to try it on, and the wrong answers that people are known to give."""

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Wrong:
    """A known wrong answer: `answer` is called like the reference. `message` says, in one sentence that gives no code
    away, what was done and why it is wrong."""

    message: str
    answer: Callable[..., Any]


@dataclass(frozen=True)
class Exercise:
    """A function to write.

    number, title: as in "04.3 causal mask" or "clinic.12 norm". name: what it is called in the notebook.
    minutes, difficulty (1 to 5), why: for the box above it.
    reference: the right answer. cases: from a seeded generator, the arguments of each call: asymmetric sizes, large
    values, bf16, empty and of length one where that makes sense; never a function, since they may cross processes.
    wrong: answers that the check knows. hints: a question, the idea, the code's outline.
    tolerance: relative to the largest expected value of a case; 0 means exactly.
    part: what it can stand for in the model (`swap.PARTS`), or nothing.
    blocked: dotted names that are not there while it is graded: the package's own version, PyTorch's one-liner.
    slow: arguments at which a loop in Python takes a hundred times as long as the reference, or None.
    """

    number: str
    title: str
    name: str
    minutes: int
    difficulty: int
    why: str
    reference: Callable[..., Any]
    cases: Callable[[torch.Generator], Iterable[tuple[Any, ...]]]
    wrong: tuple[Wrong, ...]
    hints: tuple[str, str, str]
    tolerance: float = 1e-5
    part: str = ""
    blocked: tuple[str, ...] = ()
    slow: Callable[[torch.Generator], tuple[Any, ...]] | None = None


@dataclass(frozen=True)
class Experiment:
    """Something to predict, take out, measure and explain.

    The learner fills a dictionary called `name` with numbers and words under `keys` (key → what it is, with its unit).
    verify: what is wrong with them, in one sentence, or nothing; it may measure for itself. explain: what the sentence
    under "because" is to be about ("on …").
    """

    number: str
    title: str
    name: str
    minutes: int
    difficulty: int
    why: str
    keys: dict[str, str]
    verify: Callable[[dict[str, Any]], str]
    explain: str
    hints: tuple[str, str, str]

    part = ""
    blocked: tuple[str, ...] = ()


Task = Exercise | Experiment
_FOLDER = Path(__file__).parent / "chapters"


def chapters() -> list[str]:
    """The chapters that have exercises: "01", "02", …, and at the end "clinic"."""
    return [*sorted(path.stem[1:] for path in _FOLDER.glob("c[0-9]*.py")), "clinic"]


def exercises(chapter: str) -> list[Task]:
    """The exercises of a chapter, in order. Raises ValueError if it has none."""
    if chapter not in chapters():
        raise ValueError(f"there are no exercises for chapter {chapter!r}, expected one of {', '.join(chapters())}.")
    module = chapter if chapter == "clinic" else f"c{chapter}"
    return list(importlib.import_module(f"minillama.course.chapters.{module}").EXERCISES)


def find(number: str) -> Task:
    """The exercise with this number, as in "04.3". Raises ValueError if there is none."""
    chapter = str(number).partition(".")[0]
    known = exercises(chapter)
    for exercise in known:
        if exercise.number == number:
            return exercise
    numbers = ", ".join(exercise.number for exercise in known)
    raise ValueError(f"there is no exercise {number!r}, expected one of {numbers}: mind the quotes.")


def generator(exercise: Task, seed: int) -> torch.Generator:
    """Randomness for an exercise's inputs: another seed, other inputs."""
    digits = "".join(filter(str.isdecimal, exercise.number))
    return torch.Generator().manual_seed(seed * 1_000_003 + int(digits))
