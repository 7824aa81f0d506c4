"""The exercises: `minillama start`, `check`, `hint`, `reset`, `solution`, `report`, and for an instructor `release`."""

import csv
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Annotated, Any

import typer

from minillama.cli.app import app, complain, option

PANEL = "Exercises"
Number = Annotated[str, typer.Argument(help="An exercise, as in 04.3 or clinic.9.")]
Chapter = Annotated[str, typer.Argument(help="A chapter, as in 04, or clinic.")]
Seed = Annotated[int, option("Grading", "Other seed, other inputs.")]
Seconds = Annotated[float, option("Grading", "How long a notebook may run.", min=1)]


@app.command(rich_help_panel=PANEL)
def start(chapter: Chapter) -> None:
    """Make your copy of a chapter's exercises, in work/. A copy that is there is left alone.

    [bold]Examples[/bold]
      minillama start 04
    """
    from minillama.course.notebooks import start as copy

    path, new = copy(chapter)
    print(f"{'Ready' if new else 'There already'}: {_short(path)}. Open it in JupyterLab; read, write, run its checks.")


@app.command(rich_help_panel=PANEL)
def check(chapter: Chapter, seed: Seed = 0, seconds: Seconds = 120.0) -> None:
    """Check your copy of a chapter's exercises: a line for each. Exit code 0 when all pass, 1 when not.

    Checks that were changed or deleted are put back first. Your functions run in a
    process of their own, on inputs made from the seed; then the whole notebook runs
    from top to bottom.

    [bold]Examples[/bold]
      minillama check 04
      minillama check 04 --seed 7
    """
    from minillama.course import progress
    from minillama.course.grade import Limits, grade
    from minillama.course.notebooks import copy_of

    path = copy_of(chapter)
    if not path.exists():
        raise ValueError(f"{_short(path)} is not there: type `minillama start {chapter}` first.")
    verdicts = grade(path, chapter, seed, Limits(seconds))
    ran = _run_notebook(path, chapter, seconds)
    missed = 0
    for task, verdict in verdicts:
        message = verdict.message
        if verdict.passed and not ran.get(task.number, False):
            message = "right by itself, but its check fails when the notebook runs from top to bottom."
        if message:
            missed += 1
            print(f"✗ {task.number} {task.title}: {message}")
        else:
            print(f"✓ {task.number} {task.title}")
            progress.note(task.number, passed=True)
    raise typer.Exit(1 if missed else 0)


def _run_notebook(path: Path, chapter: str, seconds: float) -> dict[str, bool]:
    """Run a copy of the notebook, with its checks restored, under nbval: exercise number → whether its check passed."""
    from minillama.course import notebooks

    notebook = notebooks.restored(notebooks.read(path), chapter)
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    with tempfile.TemporaryDirectory(prefix="minillama-check-") as folder:
        copy, results = Path(folder) / path.name, Path(folder) / "results.xml"
        notebooks.write(notebook, copy)
        (Path(folder) / "pytest.ini").touch()  # or the settings of a folder above would count
        environment = {**os.environ, "MINILLAMA_WORK": folder}  # a check of a check is no try
        options = ["--nbval-lax", "--nbval-current-env", f"--nbval-cell-timeout={seconds:g}", "-p", "no:cacheprovider"]
        try:
            subprocess.run(
                [sys.executable, "-m", "pytest", *options, f"--rootdir={folder}", f"--junitxml={results}", str(copy)],
                cwd=folder, env=environment, capture_output=True, timeout=2 * seconds + 60, check=False,
            )  # fmt: skip
            cases = list(ElementTree.parse(results).iter("testcase"))
        except (OSError, subprocess.TimeoutExpired, ElementTree.ParseError) as error:
            raise ValueError(
                f"{_short(path)} could not be run under nbval ({type(error).__name__}): run it in JupyterLab to "
                "see where it stops, or install what is missing with `make lab`."
            ) from None
    passed = {}
    for case in cases:
        index = int(case.get("name", "").rpartition(" ")[2] or 0)
        name = str(code[index].get("id", "")) if index < len(code) else ""
        if name.endswith("-check"):
            fine = case.find("failure") is None and case.find("error") is None and case.find("skipped") is None
            passed[name.removesuffix("-check").replace("-", ".")] = fine
    return passed


@app.command(rich_help_panel=PANEL)
def hint(number: Number) -> None:
    """The next hint: a question, then the idea, then the outline. Each next one needs another try.

    [bold]Examples[/bold]
      minillama hint 04.3
    """
    from minillama.course import hint as give

    give(number)


@app.command(rich_help_panel=PANEL)
def reset(number: Number) -> None:
    """Give an exercise's empty stub back. What you wrote is kept in a file of its own.

    [bold]Examples[/bold]
      minillama reset 04.3
    """
    from minillama.course.notebooks import reset as give_back

    print(f"{number} is as it was. What stood there is in {_short(give_back(number))}. Reload the notebook.")


@app.command(rich_help_panel=PANEL)
def solution(number: Number) -> None:
    """The solution of an exercise that you have passed, or that your instructor has released.

    [bold]Examples[/bold]
      minillama solution 04.3
    """
    from minillama.course import notebooks, progress
    from minillama.course.exercise import find

    find(number)
    chapter = number.partition(".")[0]
    if not progress.read().get(number, {}).get("passed") and chapter not in notebooks.released():
        raise ValueError(
            f"{number} is not passed yet, and chapter {chapter} is not released: take a hint, and try again."
        )
    print(notebooks.solution(number))


@app.command(rich_help_panel=PANEL)
def release(chapter: Chapter) -> None:
    """For an instructor: let `minillama solution` show a chapter's solutions to all.

    [bold]Examples[/bold]
      minillama release 04
    """
    from minillama.course.notebooks import release as let_go

    print(f"Solutions are released for chapters {', '.join(let_go(chapter))}.")


@app.command(rich_help_panel=PANEL)
def report(
    folder: Annotated[Path | None, typer.Argument(help="For an instructor: a folder of submissions.")] = None,
    csv_: Annotated[bool, typer.Option("--csv", help="A table with a row for each exercise of each notebook.")] = False,
    seed: Seed = 0,
    seconds: Seconds = 120.0,
) -> None:
    """What is done, which of the model's parts are yours, and what is left. With a folder: everybody's results.

    [bold]Examples[/bold]
      minillama report
      minillama report submissions --csv --seed 7 > results.csv

    Of a folder, every notebook named like an exercise's (04_attention.ipynb) is graded; who handed it in is
    the folder that it lies in.
    """
    if folder is None:
        from minillama.course import report as own

        print(own())
        return
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder, expected one with submissions in it.")
    rows = _grade_folder(folder, seed, seconds)
    if csv_:
        writer = csv.DictWriter(sys.stdout, ["who", "notebook", "exercise", "title", "passed", "message"])
        writer.writeheader()
        writer.writerows(rows)
        return
    for who in sorted({row["who"] for row in rows}):
        own_rows = [row for row in rows if row["who"] == who]
        print(f"{who}: {sum(row['passed'] for row in own_rows)} of {len(own_rows)}")


def _grade_folder(folder: Path, seed: int, seconds: float) -> list[dict[str, Any]]:
    from tqdm import tqdm

    from minillama.course.exercise import chapters
    from minillama.course.grade import Limits, grade

    known = chapters()
    paths = [path for path in sorted(folder.rglob("*.ipynb")) if path.name.partition("_")[0] in known]
    paths = [path for path in paths if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    if not paths:
        raise ValueError(f"{folder} has no notebooks of exercises, expected names as in 04_attention.ipynb.")
    rows = []
    for path in tqdm(paths, unit="notebook"):
        who, chapter = str(path.parent.relative_to(folder)), path.name.partition("_")[0]
        row = {"who": path.stem if who == "." else who, "notebook": path.name}
        try:
            verdicts = grade(path, chapter, seed, Limits(seconds))
        except ValueError as error:
            complain(str(error))
            rows.append({**row, "exercise": "", "title": "", "passed": 0, "message": str(error)})
            continue
        for task, verdict in verdicts:
            graded = {"exercise": task.number, "title": task.title, "passed": int(verdict.passed)}
            rows.append({**row, **graded, "message": verdict.message})
    return rows


def _short(path: Path) -> str:
    return os.path.relpath(path)
