"""The exercises: references pass, known wrong answers are named, nothing is given away, all is up to date."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch

from minillama.course import exercise as catalogue
from minillama.course.exercise import Exercise, Experiment
from minillama.course.judge import NOT_ATTEMPTED, Outcome, cases, equal, judge, run
from tests.notebooks import build_exercises
from tests.notebooks.normalise import normalise

ROOT = Path(__file__).parents[1]
TASKS = [task for chapter in catalogue.chapters() for task in catalogue.exercises(chapter)]
FUNCTIONS = [task for task in TASKS if isinstance(task, Exercise)]
EXPERIMENTS = [task for task in TASKS if isinstance(task, Experiment)]
WRONG = [(exercise, i) for exercise in FUNCTIONS for i in range(len(exercise.wrong))]

each_function = pytest.mark.parametrize("exercise", FUNCTIONS, ids=lambda exercise: exercise.number)
each_task = pytest.mark.parametrize("exercise", TASKS, ids=lambda exercise: exercise.number)
each_source = pytest.mark.parametrize("path", build_exercises.sources(), ids=lambda path: path.stem)


def outcomes(exercise: Exercise, answer, seed: int = 0) -> list[Outcome]:
    return [run(answer, arguments) for arguments in cases(exercise, seed)]


@each_function
@pytest.mark.parametrize("seed", [0, 1, 77])
def test_the_reference_passes(exercise, seed):
    verdict = judge(exercise, outcomes(exercise, exercise.reference, seed), seed)
    assert verdict.passed, verdict.message


@pytest.mark.parametrize(("exercise", "i"), WRONG, ids=[f"{exercise.number}-{i}" for exercise, i in WRONG])
@pytest.mark.parametrize("seed", [0, 5])
def test_a_known_wrong_answer_fails_with_its_own_message(exercise, i, seed):
    wrong = exercise.wrong[i]
    verdict = judge(exercise, outcomes(exercise, wrong.answer, seed), seed)
    assert not verdict.passed and verdict.message == wrong.message


@each_function
def test_an_untouched_stub_is_not_attempted(exercise):
    def stub(*arguments):
        raise NotImplementedError(exercise.number)

    verdict = judge(exercise, outcomes(exercise, stub))
    assert not verdict.passed and verdict.message == NOT_ATTEMPTED


def disturbed(value):
    """The same value but for one element of it; None if it has none."""
    if isinstance(value, torch.Tensor):
        if not value.numel():
            return None
        other = value.clone(memory_format=torch.contiguous_format)
        flat = other.view(-1)
        last = flat[-1]
        flat[-1] = ~last if value.dtype == torch.bool else 1.5 if not last.isfinite() else last + last.abs() * 0.5 + 1
        return other
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    if isinstance(value, str):
        return value + "x"
    if isinstance(value, bytes):
        return value + b"x"
    if isinstance(value, (list, tuple)):
        for i in reversed(range(len(value))):
            if (other := disturbed(value[i])) is not None:
                return type(value)([*value[:i], other, *value[i + 1 :]])
        return None
    if isinstance(value, dict) and value:
        key = list(value)[-1]
        return {**value, key: disturbed(value[key])}
    return None


@each_function
def test_one_wrong_element_is_shown(exercise):
    right = outcomes(exercise, exercise.reference)
    index = next(i for i, outcome in enumerate(right) if not outcome.error and disturbed(outcome.value) is not None)
    answers = list(right)
    answers[index] = Outcome(disturbed(right[index].value))
    verdict = judge(exercise, answers)
    assert not verdict.passed and verdict.case == index
    assert verdict.message not in {wrong.message for wrong in exercise.wrong} and "expected" in verdict.message


@each_function
@pytest.mark.parametrize("garbage", [lambda *a: None, lambda *a: torch.rand(3, 2), lambda *a: "text", lambda *a: [[]]])
def test_garbage_gets_a_message_that_says_what_was_expected(exercise, garbage):
    verdict = judge(exercise, outcomes(exercise, garbage))
    assert not verdict.passed and re.search(r"expected|wrong|differ", verdict.message), verdict.message
    assert "\n" not in verdict.message


@each_function
def test_an_answer_that_changes_its_input_is_told_so(exercise):
    def in_place(*arguments):
        value = exercise.reference(*arguments)
        for argument in arguments:
            if isinstance(argument, torch.Tensor) and argument.numel() and not argument.is_inference():
                argument.zero_() if argument.any() else argument.fill_(1)
            elif isinstance(argument, list):
                argument.append(0)
        return value.clone() if isinstance(value, torch.Tensor) else value

    given = outcomes(exercise, in_place)
    if any(outcome.changed for outcome in given):
        verdict = judge(exercise, given)
        assert not verdict.passed and "in place" in verdict.message, verdict.message


@each_function
def test_the_cases_are_the_same_for_a_seed_and_others_for_another(exercise):
    first, again, other = cases(exercise, 3), cases(exercise, 3), cases(exercise, 4)
    assert all(equal(a, b, 0.0) for a, b in zip(first, again, strict=True))
    assert len(first) != len(other) or not all(equal(a, b, 0.0) for a, b in zip(first, other, strict=True))


@each_task
def test_a_box_has_all_that_a_learner_needs(exercise):
    assert re.fullmatch(r"(\d\d|clinic)\.\d+", exercise.number) and exercise.name.isidentifier()
    assert 1 <= exercise.difficulty <= 5 and 3 <= exercise.minutes <= 60
    assert exercise.why.endswith(".") and len(exercise.hints) == 3
    assert exercise.hints[0].endswith("?"), "the first hint is a question"


@each_function
def test_messages_are_one_line_each_of_its_own(exercise):
    messages = [wrong.message for wrong in exercise.wrong]
    assert len(messages) >= 3 and len(set(messages)) == len(messages)
    assert all("\n" not in message and message.endswith((".", "?")) for message in messages)


@each_source
def test_nothing_gives_the_solution_away(path):
    chapter = path.name.partition("_")[0]
    solutions = "\n".join(found[2] for found in build_exercises.SOLUTION.finditer(path.read_text(encoding="utf-8")))
    lines = {line.strip() for line in solutions.splitlines() if len(line.strip()) > 15}
    for exercise in catalogue.exercises(chapter):
        said = [*exercise.hints, *(wrong.message for wrong in getattr(exercise, "wrong", ()))]
        for text in said:
            assert not any(line.removeprefix("return ") in text for line in lines), text
    learner, _ = build_exercises.build(path)
    shown = "\n".join(cell.source for cell in learner.cells if str(cell.id).endswith("-stub"))
    for line in lines:
        assert line not in shown or line.startswith(("def ", "for ", "import ", "from ")), line


@each_source
def test_the_built_notebooks_are_up_to_date(path):
    learner, solution = build_exercises.build(path)
    name = path.with_suffix(".ipynb").name
    assert normalise(learner, results=False) == (ROOT / "exercises" / name).read_text(encoding="utf-8")
    stored = json.loads((ROOT / "exercises" / "solutions" / name).read_text(encoding="utf-8"))
    built = json.loads(normalise(solution, results=False))
    as_built = [(cell["id"], cell["cell_type"], cell["source"]) for cell in built["cells"]]
    assert [(cell["id"], cell["cell_type"], cell["source"]) for cell in stored["cells"]] == as_built


def test_every_chapter_with_exercises_has_its_notebooks_and_an_experiment():
    assert [path.name.partition("_")[0] for path in build_exercises.sources()] == catalogue.chapters()
    for chapter in catalogue.chapters():
        assert sum(isinstance(task, Experiment) for task in catalogue.exercises(chapter)) >= 1


@pytest.mark.parametrize("task", EXPERIMENTS, ids=lambda task: task.number)
def test_right_numbers_need_an_explanation_of_a_sentence(task):
    right = dataclasses.replace(task, verify=lambda measured: "")
    numbers = dict.fromkeys(task.keys, 1.0)
    short = judge(right, [Outcome(numbers | {"because": "it is so"})])
    assert not short.passed and short.message.endswith(f"give 8 words or more, {task.explain}.")
    assert judge(right, [Outcome(numbers | {"because": "a sentence that says in some words what happened"})]).passed


@pytest.mark.parametrize("task", EXPERIMENTS, ids=lambda task: task.number)
def test_an_empty_or_nonsensical_experiment_does_not_pass(task):
    assert judge(task, [Outcome({key: None for key in task.keys})]).message == NOT_ATTEMPTED
    assert not judge(task, [Outcome(None)]).passed
    first, *rest = task.keys
    partly = judge(task, [Outcome({first: 1.0, **dict.fromkeys(rest)})])
    assert not partly.passed and "missing" in partly.message
    assert not judge(task, [Outcome(dict.fromkeys(task.keys, float("nan")))]).passed
    nonsense = judge(task, [Outcome(dict.fromkeys(task.keys, -123.0))])
    assert not nonsense.passed and nonsense.message
    assert not judge(task, [Outcome(dict.fromkeys(task.keys, "words of no use"))]).passed
