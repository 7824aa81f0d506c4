"""Build the exercise notebooks from their sources: `make exercises`, or `python -m tests.notebooks.build_exercises`.

A source, `exercises/source/NN_topic.py`, is a script in the percent format with the solutions in it:

    # %% [markdown] exercise="04.3"        the text of the box: signature, shapes, a worked example
    # %% exercise="04.3"                   the function; what stands between the two marks below is the solution
    # <solution>
    # </solution>

In the clinic, code that is to be repaired stands before it, between `# <broken>` and `# </broken>`.

The learner's notebook has a stub where the solution was, the solution notebook (`exercises/solutions/`) is whole. The
box gets its head (title, minutes, difficulty, why) and each function its check from `minillama/course/chapters/`.
"""

import re
import sys
from pathlib import Path

import jupytext
import nbformat
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode

from minillama.course.exercise import Exercise, Task, exercises
from tests.notebooks.normalise import execute, normalise, write

FOLDER = Path(__file__).resolve().parents[2] / "exercises"
SOLUTION = re.compile(r"^([ \t]*)# <solution>\n(.*?)^[ \t]*# </solution>\n?", re.MULTILINE | re.DOTALL)
BROKEN = re.compile(r"^[ \t]*# <broken>\n(.*?)^[ \t]*# </broken>\n?", re.MULTILINE | re.DOTALL)


def sources() -> list[Path]:
    return sorted((FOLDER / "source").glob("*.py"))


def box(exercise: Task, text: str) -> str:
    """The text cell above an exercise."""
    write, measure = ("Repair", "Diagnose") if exercise.number.startswith("clinic") else ("Write", "Measure")
    function = isinstance(exercise, Exercise)
    what = f"**{write}** `{exercise.name}`" if function else f"**{measure}**, and fill in `{exercise.name}`"
    stars = "●" * exercise.difficulty + "○" * (5 - exercise.difficulty)
    return (
        f"## {exercise.number} {exercise.title}\n\n"
        f"{what} · difficulty {stars} · {exercise.minutes} minutes\n\n"
        f"{exercise.why}\n\n{text.strip()}\n\n"
        f'Stuck? `hint("{exercise.number}")` in a new cell.'
    )


def stub(source: str, exercise: Task) -> str:
    """The cell without its solution: a function says that it is not written, or stays broken; an experiment's
    dictionary stays empty."""
    assert SOLUTION.search(source), f"{exercise.number} has no # <solution> … # </solution>"
    if BROKEN.search(source):
        return BROKEN.sub(lambda found: found[1], SOLUTION.sub("", source)).rstrip("\n")
    instead = f'raise NotImplementedError("{exercise.number}")\n' if isinstance(exercise, Exercise) else ""
    return SOLUTION.sub(lambda found: found[1] + instead if instead else "", source).rstrip("\n")


def whole(source: str) -> str:
    """A function with its solution, without the marks."""
    return SOLUTION.sub(lambda found: found[2], BROKEN.sub("", source)).rstrip("\n")


def build(path: Path) -> tuple[NotebookNode, NotebookNode]:
    """The learner's notebook and the solution, both without results."""
    chapter = path.name.partition("_")[0]
    known = {exercise.number: exercise for exercise in exercises(chapter)}
    parsed = jupytext.read(path, fmt="py:percent")
    learner, solution = (nbformat.v4.new_notebook() for _ in range(2))
    for notebook in (learner, solution):
        found = []
        for cell in parsed.cells:
            number = cell.metadata.get("exercise")
            tags = {"tags": cell.metadata["tags"]} if "tags" in cell.metadata else {}
            if number is None:
                name = f"cell-{len(notebook.cells) + 1:02}"
                new = nbformat.v4.new_markdown_cell if cell.cell_type == "markdown" else nbformat.v4.new_code_cell
                notebook.cells.append(new(cell.source, id=name, metadata=tags))
                continue
            name, exercise = number.replace(".", "-"), known[number]
            if cell.cell_type == "markdown":
                notebook.cells.append(nbformat.v4.new_markdown_cell(box(exercise, cell.source), id=f"{name}-box"))
                continue
            found.append(number)
            source = stub(cell.source, exercise) if notebook is learner else whole(cell.source)
            notebook.cells.append(nbformat.v4.new_code_cell(source, id=f"{name}-stub", metadata=tags))
            line = f'check("{number}", {exercise.name})'
            notebook.cells.append(nbformat.v4.new_code_cell(line, id=f"{name}-check"))
        assert found == list(known), f"{path.name} has the exercises {found}, expected {list(known)}"
    return learner, solution


def main(names: list[str]) -> int:
    for path in [Path(name) for name in names] or sources():
        learner, solution = build(path)
        target = FOLDER / path.with_suffix(".ipynb").name
        for notebook, place in ((learner, target), (solution, FOLDER / "solutions" / target.name)):
            place.parent.mkdir(exist_ok=True)
            if notebook is solution:
                try:
                    execute(notebook, place.parent)
                except CellExecutionError as error:
                    cell, _, reason = str(error).strip().rpartition("------------------")
                    print(place.name, cell[-300:], reason.strip()[-1000:], sep="\n", file=sys.stderr)
                    return 1
            if not place.exists():
                place.write_text("")
            write(place, normalise(notebook, results=notebook is solution))
            print(place.relative_to(FOLDER.parent))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
