"""A learner's copies of the exercise notebooks: start one, give one stub back, restore the checks.

In `exercises/NN_topic.ipynb` the cells of an exercise have ids that say what they are: `04-3-box`, `04-3-stub`,
`04-3-check`. Editors keep them, so a stub or a check is found again in whatever the learner has made of the notebook.
"""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from minillama.course import progress
from minillama.course.exercise import chapters, find

Notebook = dict[str, Any]
EXERCISES = Path(__file__).parents[2] / "exercises"


def original(chapter: str) -> Path:
    """The course's own notebook of a chapter's exercises. Raises ValueError if there is none."""
    found = sorted(EXERCISES.glob(f"{chapter}_*.ipynb")) if chapter.isalnum() else []
    if not found:
        raise ValueError(f"there are no exercises for chapter {chapter!r}, expected one of {', '.join(chapters())}.")
    return found[0]


def copy_of(chapter: str) -> Path:
    """Where the learner's copy is, or will be."""
    return progress.folder() / original(chapter).name


def read(path: Path) -> Notebook:
    """A notebook from a file. Raises ValueError for what is none."""
    try:
        notebook = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(notebook, dict) or not isinstance(notebook.get("cells"), list):
            raise ValueError("it has no list of cells")
        for cell in notebook["cells"]:
            if not isinstance(cell, dict) or cell.get("cell_type") not in ("markdown", "code", "raw"):
                raise ValueError("a cell is neither text nor code")
            source = cell.get("source", "")
            cell["source"] = "".join(source) if isinstance(source, list) else str(source)
    except (OSError, ValueError, TypeError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(
            f"{path} cannot be read as a notebook ({reason}): start it anew, or undo the last change."
        ) from None
    return notebook


def write(notebook: Notebook, path: Path) -> None:
    """Write a notebook in one step."""
    _write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", path)


def _write_text(text: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", encoding="utf-8", delete=False) as file:
        file.write(text)
    os.replace(file.name, path)


def start(chapter: str) -> tuple[Path, bool]:
    """Copy a chapter's exercises to where the learner works; one that is there is left alone. The copy's path, and
    whether it is new."""
    source, path = original(chapter), copy_of(chapter)
    if path.exists():
        return path, False
    _write_text(source.read_text(encoding="utf-8"), path)
    return path, True


def reset(number: str) -> Path:
    """Give an exercise's stub back. What stood there is kept: the path of the file that holds it is returned.

    Raises ValueError if the exercise was not started.
    """
    find(number)
    chapter, name = number.partition(".")[0], f"{number.replace('.', '-')}-stub"
    path = copy_of(chapter)
    if not path.exists():
        raise ValueError(f"{number} was not started: type `minillama start {chapter}`.")
    stub = _cell(read(original(chapter)), name)
    assert stub is not None, name
    notebook = read(path)
    mine = _cell(notebook, name)
    kept = progress.folder() / "old" / f"{number}.py"
    while kept.exists():
        kept = kept.with_name(f"{number}.{len(list(kept.parent.glob(f'{number}*.py'))) + 1}.py")
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text((mine["source"] if mine else "# the cell was deleted") + "\n", encoding="utf-8")
    if mine is None:
        check = _cell(notebook, f"{number.replace('.', '-')}-check")
        place = notebook["cells"].index(check) if check else len(notebook["cells"])
        notebook["cells"].insert(place, stub)
    else:
        mine.update(source=stub["source"], outputs=[], execution_count=None)
    write(notebook, path)
    return kept


def restored(notebook: Notebook, chapter: str) -> Notebook:
    """The notebook with every check as the course wrote it, so that a changed or deleted one does not count."""
    checks = [cell for cell in read(original(chapter))["cells"] if str(cell.get("id", "")).endswith("-check")]
    cells = list(notebook["cells"])
    for check in checks:
        mine = _cell({"cells": cells}, check["id"])
        if mine is not None:
            cells[cells.index(mine)] = check
            continue
        stub = _cell({"cells": cells}, check["id"].removesuffix("check") + "stub")
        cells.insert(cells.index(stub) + 1 if stub else len(cells), check)
    return {**notebook, "cells": cells}


def _cell(notebook: Notebook, name: str) -> dict[str, Any] | None:
    return next((cell for cell in notebook["cells"] if cell.get("id") == name), None)


def solution(number: str) -> str:
    """An exercise's solution. Raises ValueError where the solutions were taken out of the course."""
    path = EXERCISES / "solutions" / original(number.partition(".")[0]).name
    if not path.exists():
        raise ValueError(f"the solutions are not in this copy of the course ({path.name} is missing).")
    cell = _cell(read(path), f"{number.replace('.', '-')}-stub")
    return cell["source"] if cell else ""


def released() -> list[str]:
    """The chapters whose solutions an instructor has released."""
    note = EXERCISES / "released.txt"
    return note.read_text(encoding="utf-8").split() if note.exists() else []


def release(chapter: str) -> list[str]:
    """Release a chapter's solutions; all chapters that are released now. Raises ValueError for an unknown chapter."""
    original(chapter)
    chosen = sorted({*released(), chapter})
    (EXERCISES / "released.txt").write_text("\n".join(chosen) + "\n", encoding="utf-8")
    return chosen
