"""Grading: a learner's code runs in a process of its own, and what it hands back is judged in this one.

This process never imports or runs their code. Theirs has limits of time and memory, a copy of the package without the
references and solutions, inputs that it has not seen, and gives back data only. So a notebook that loops, eats memory,
exits, prints a ✓ of its own, or replaces `check` fails, and so does one that edits the course's files. It is a guard
against mistakes and short cuts, not against an attacker: run what you do not trust at all in a container.
"""

import functools
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minillama.course import exchange, notebooks
from minillama.course.exercise import Exercise, Task, exercises, generator
from minillama.course.judge import Outcome, Verdict, cases, equal, judge

REPOSITORY = Path(__file__).parents[2]
WATCHED = ("minillama", "exercises")


@dataclass(frozen=True)
class Limits:
    """seconds: for the whole notebook, of the clock. memory: bytes of address space (not on Windows)."""

    seconds: float = 120.0
    memory: int = 8_000_000_000


def grade(path: Path, chapter: str, seed: int = 0, limits: Limits | None = None) -> list[tuple[Task, Verdict]]:
    """The verdict on every exercise of a chapter in a learner's notebook, in order.

    Raises ValueError for a file that is no notebook.
    """
    limits = limits or Limits()
    sources = [_plain(cell["source"]) for cell in notebooks.read(path)["cells"] if _is_theirs(cell)]
    tasks = exercises(chapter)
    before = _snapshot()
    with tempfile.TemporaryDirectory(prefix="minillama-grade-") as name:
        folder = Path(name)
        shutil.copytree(_pristine().name, folder, dirs_exist_ok=True)
        for task in tasks:
            if isinstance(task, Exercise):
                exchange.write([list(arguments) for arguments in _inputs(task, seed)], folder / f"{task.number}.inputs")
        lost = _run_all(folder, sources, tasks, limits)
        verdicts = [(task, _verdict(task, folder, lost.get(task.number, ""), seed)) for task in tasks]
    after = _snapshot()
    if changed := sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name)):
        message = f"the course's own file {changed[0]} changed while the notebook ran: leave that out, and put it back."
        return [(task, Verdict(False, message)) for task in tasks]
    return verdicts


def _is_theirs(cell: dict[str, Any]) -> bool:
    return cell["cell_type"] == "code" and not str(cell.get("id", "")).endswith("-check")


def _plain(source: str) -> str:
    """Without Jupyter's own commands."""
    return "\n".join(line for line in source.splitlines() if not line.lstrip().startswith(("%", "!")))


def _inputs(task: Exercise, seed: int) -> list[tuple[Any, ...]]:
    inputs = cases(task, seed)
    if task.slow:
        inputs.append(tuple(task.slow(generator(task, seed))))
    return inputs


@functools.cache
def _pristine() -> tempfile.TemporaryDirectory:
    """What a learner's cells need, as it was before the first of them ran: the package without references, the toy."""
    kept = tempfile.TemporaryDirectory(prefix="minillama-course-")
    leave_out = shutil.ignore_patterns("__pycache__", "chapters")
    shutil.copytree(REPOSITORY / "minillama", Path(kept.name) / "minillama", ignore=leave_out)
    shutil.copytree(REPOSITORY / "data" / "toy", Path(kept.name) / "data" / "toy")
    return kept


def _run_all(folder: Path, sources: list[str], tasks: list[Task], limits: Limits) -> dict[str, str]:
    """Run the learner's process, again after each answer that ended it. Why an answer is missing, by its number."""
    lost: dict[str, str] = {}
    left = list(tasks)
    while left:
        orders = [
            {
                "number": task.number,
                "name": task.name,
                "blocked": list(task.blocked),
                "inputs": f"{task.number}.inputs" if isinstance(task, Exercise) else "",
            }
            for task in left
        ]
        (folder / "job.json").write_text(json.dumps({"cells": sources, "tasks": orders}), encoding="utf-8")
        (folder / "cells.done").unlink(missing_ok=True)
        reason = _run_once(folder, limits)
        left = [task for task in left if not (folder / f"{task.number}.answer").exists()]
        if not left:
            break
        if not (folder / "cells.done").exists():
            return lost | {task.number: f"the notebook's cells {reason}, before any check." for task in left}
        lost[left[0].number] = f"it {reason}."
        left = left[1:]
    return lost


def _run_once(folder: Path, limits: Limits) -> str:
    """Run the learner's process to its end; in words, how it ended."""
    keep = ("PATH", "LANG", "LC_ALL", "SYSTEMROOT", "LD_LIBRARY_PATH", "VIRTUAL_ENV")
    environment = {name: os.environ[name] for name in keep if name in os.environ}
    environment |= {"HOME": str(folder), "OMP_NUM_THREADS": "1", "MINILLAMA_WORK": str(folder / "work")}
    process = subprocess.Popen(
        [sys.executable, "-s", "-m", "minillama.course.learner", str(folder)],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=_limit(limits) if os.name == "posix" else None,
    )
    try:
        code = process.wait(limits.seconds)
    except subprocess.TimeoutExpired:
        return f"ran for more than {limits.seconds:g} seconds and was stopped"
    finally:
        _kill(process)
    if code < 0:
        return f"used more than {limits.memory / 1e9:g} GB of memory, or crashed (signal {-code})"
    return f"ended Python itself (exit code {code})"


def _limit(limits: Limits) -> Callable[[], None]:
    import resource

    def set_limits() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (limits.memory, limits.memory))
        seconds = int(limits.seconds) + 5
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
        resource.setrlimit(resource.RLIMIT_FSIZE, (exchange.LARGEST, exchange.LARGEST))

    return set_limits


def _kill(process: subprocess.Popen) -> None:
    """End the process and all that it started."""
    try:
        if os.name == "posix":
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    except (ProcessLookupError, PermissionError):
        pass
    process.wait()


def _verdict(task: Task, folder: Path, lost: str, seed: int) -> Verdict:
    """The verdict on an answer file."""
    if lost:
        return Verdict(False, lost)
    try:
        results = exchange.read(folder / f"{task.number}.answer")
        if not isinstance(results, list) or not all(isinstance(result, dict) for result in results):
            raise ValueError("the answer file holds something else than answers")
        if not isinstance(task, Exercise):
            return judge(task, [Outcome(results[0].get("value"), str(results[0].get("error", "")))], seed)
        inputs = _inputs(task, seed)
        outcomes = [_outcome(result, arguments) for result, arguments in zip(results, inputs, strict=False)]
        if len(results) < len(inputs):  # the name is not there
            return Verdict(False, results[0]["error"])
    except (ValueError, KeyError, IndexError) as error:
        return Verdict(False, f"no answer came back ({error}).")
    blocked = [outcome.error for outcome in outcomes if outcome.error.startswith("Blocked: ")]
    if blocked:
        return Verdict(False, blocked[0].removeprefix("Blocked: "))
    if not task.slow:
        return judge(task, outcomes, seed)
    *outcomes, _ = outcomes
    return judge(task, outcomes, seed, results[-1].get("seconds"))


def _outcome(result: dict[str, Any], arguments: tuple[Any, ...]) -> Outcome:
    after = result.get("after", list(arguments))
    changed = tuple(i for i, (now, was) in enumerate(zip(after, arguments, strict=False)) if not equal(now, was, 0.0))
    return Outcome(result.get("value"), str(result.get("error", "")), changed)


def _snapshot() -> dict[str, str]:
    """A fingerprint of every file of the package and the exercises."""
    found = [path for name in WATCHED for path in (REPOSITORY / name).rglob("*") if path.is_file()]
    kept = [path for path in found if not {"__pycache__", ".ipynb_checkpoints"} & set(path.parts)]
    return {str(path.relative_to(REPOSITORY)): hashlib.sha256(path.read_bytes()).hexdigest() for path in kept}
