"""What runs in the learner's process while it is graded: their cells, then their functions on the inputs given.

It is started by `grade.py` as a script, in a folder of its own that holds a copy of the package, without the
references. It hands back nothing but files of data; who is right is decided elsewhere.
"""

import contextlib
import functools
import importlib
import io
import json
import os
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


class Blocked(Exception):
    """Something that does the exercise in one line was called while it is graded."""


def main(folder: Path) -> None:
    from minillama.course import exchange

    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    active: set[str] = set()
    for name in sorted({name for task in job["tasks"] for name in task["blocked"]}):
        _guard(name, active)
    sys.modules["minillama.course"] = _quiet_course()
    names: dict[str, Any] = {"__name__": "__main__", "display": lambda *things: None}
    with _silence():
        for source in job["cells"]:
            # A cell that fails is the learner's usual state: what it needed may be written in a later one.
            with contextlib.suppress(Exception, SystemExit):
                exec(compile(source, "cell", "exec"), names)
        (folder / "cells.done").touch()
        for task in job["tasks"]:
            number = task["number"]
            active.clear()
            active.update(task["blocked"])
            result = _answers(task, names, folder, exchange)
            active.clear()
            unfinished = folder / f"{number}.unfinished"
            exchange.write(result, unfinished)
            os.replace(unfinished, folder / f"{number}.answer")


def _answers(
    task: dict[str, Any], names: dict[str, Any], folder: Path, exchange: types.ModuleType
) -> list[dict[str, Any]]:
    """What an answer gives for each input: {"value", "error", "changed", "seconds"}."""
    answer = names.get(task["name"])
    if answer is None:
        return [{"error": f"NameError: {task['name']} is not there any more"}]
    if not task["inputs"]:
        return [_data({"value": answer}, exchange)]
    inputs = exchange.read(folder / task["inputs"])
    results = []
    for arguments in inputs:
        given = tuple(arguments)
        started = time.perf_counter()
        try:
            value = answer(*given)
        except Exception as error:
            results.append({"error": f"{type(error).__name__}: {error}".splitlines()[0][:300]})
            continue
        seconds = time.perf_counter() - started
        results.append(_data({"value": value, "after": list(given), "seconds": seconds}, exchange))
    return results


def _data(result: dict[str, Any], exchange: types.ModuleType) -> dict[str, Any]:
    """The result if it can be handed back; otherwise what kind of thing it is."""
    try:
        exchange.check(result)
    except TypeError as error:
        return {"error": f"TypeError: it returns {error}."}
    return result


def _guard(name: str, active: set[str]) -> None:
    """Let a function or method, given by its dotted name, raise Blocked while its name is active."""
    *path, last = name.split(".")
    place: Any = None
    for i in range(len(path), 0, -1):
        try:
            place = importlib.import_module(".".join(path[:i]))
        except ImportError:
            continue
        for part in path[i:]:
            place = getattr(place, part, None)
        break
    original: Callable[..., Any] | None = getattr(place, last, None)
    if original is None:
        return  # this release does not have it

    @functools.wraps(original)
    def guarded(*arguments: Any, **options: Any) -> Any:
        if name in active:
            raise Blocked(f"{name} does the whole exercise, and is not there while it is graded: write it by hand.")
        return original(*arguments, **options)

    setattr(place, last, guarded)


def _quiet_course() -> types.ModuleType:
    """`minillama.course` for a learner's cells: all its names are there, and none of them does anything."""
    course = types.ModuleType("minillama.course")
    for name in ("check", "hint", "case", "report", "chart", "samples", "treat"):
        setattr(course, name, lambda *arguments, **options: "")
    course.swap_in = lambda model, **parts: model  # type: ignore[attr-defined]
    course.Mistake = AssertionError  # type: ignore[attr-defined]
    return course


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


if __name__ == "__main__":
    main(Path(sys.argv[1]))
