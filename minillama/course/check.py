"""What a learner types in a notebook: `check`, `hint`, `case`."""

from typing import Any

from minillama.course import progress
from minillama.course.exercise import Exercise, find
from minillama.course.judge import NOT_ATTEMPTED, Outcome, cases, judge, run, run_slow


class Mistake(AssertionError):
    """An answer that is not right yet. Jupyter and nbval show its one line, and no traceback."""

    def _render_traceback_(self) -> list[str]:
        return [str(self)]


def check(number: str, answer: Any, seed: int = 0) -> None:
    """Print ✓, or raise a Mistake whose one line says what is wrong: `check("04.3", causal_mask)`.

    `answer` is the function that the exercise asks for (or the dictionary, for an experiment).
    """
    exercise = find(number)
    seconds = None
    if isinstance(exercise, Exercise):
        if not callable(answer):
            raise Mistake(f"✗ {number} {exercise.title}: got {type(answer).__name__}, expected the function "
                          f"{exercise.name} itself, without brackets behind it.")  # fmt: skip
        outcomes = [run(answer, arguments) for arguments in cases(exercise, seed)]
        if exercise.slow and not any(outcome.error for outcome in outcomes):
            seconds = run_slow(exercise, answer, seed)
    else:
        outcomes = [Outcome(answer)]
    verdict = judge(exercise, outcomes, seed, seconds)
    before = progress.read().get(number, {})
    if verdict.passed:
        progress.note(number, passed=True, tries=before.get("tries", 0) + 1)
        print(f"✓ {number} {exercise.title}")
        return
    if not verdict.attempted:
        raise Mistake(f"✗ {number} {exercise.title}: {NOT_ATTEMPTED}")
    progress.note(number, tries=before.get("tries", 0) + 1)
    closer = f' Look closer: {exercise.name}(*case("{number}", {verdict.case}))' if verdict.case >= 0 else ""
    raise Mistake(f"✗ {number} {exercise.title}: {verdict.message}{closer}")


def case(number: str, index: int = 0, seed: int = 0) -> tuple[Any, ...]:
    """The arguments of one of the calls that `check` makes, to try them by hand."""
    exercise = find(number)
    if not isinstance(exercise, Exercise):
        raise ValueError(f"{number} is an experiment and has no cases: look at the numbers that you measured.")
    known = cases(exercise, seed)
    if not 0 <= index < len(known):
        raise ValueError(f"{number} has no case {index}, expected 0 to {len(known) - 1}.")
    return known[index]


def hint(number: str) -> None:
    """Print the next hint: a question, then the idea, then the code's outline. Each next one needs another try."""
    exercise = find(number)
    notes = progress.read().get(number, {})
    given, tries = notes.get("hints", 0), notes.get("tries", 0)
    if 0 < given < len(exercise.hints) and tries <= notes.get("tries_at_hint", 0):
        print(f"Hint {given} of 3 once more: {exercise.hints[given - 1]}\n(The next one comes after another try.)")
        return
    level = min(given + 1, len(exercise.hints))
    progress.note(number, hints=level, tries_at_hint=tries)
    print(f"Hint {level} of 3: {exercise.hints[level - 1]}")
