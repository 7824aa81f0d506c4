"""What a learner has done so far: tries, hints and passes, in one small file beside their notebooks."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from minillama.course.exercise import chapters, exercises


def folder() -> Path:
    """Where the learner's copies are: $MINILLAMA_WORK, or `work/` in the repository."""
    return Path(os.environ.get("MINILLAMA_WORK") or Path(__file__).parents[2] / "work")


def _file() -> Path:
    return folder() / "progress.json"


def read() -> dict[str, dict[str, Any]]:
    """Exercise number → {"tries", "passed", "hints", "tries_at_hint"}. A file that cannot be read counts as empty."""
    try:
        notes = json.loads(_file().read_text(encoding="utf-8"))
        return {str(number): dict(note) for number, note in notes.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def note(number: str, **values: Any) -> None:
    """Remember something of an exercise. The file is replaced in one step; where nothing can be written, nothing is."""
    notes = read()
    notes.setdefault(number, {}).update(values)
    try:
        folder().mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=folder(), suffix=".tmp", encoding="utf-8", delete=False) as file:
            json.dump(notes, file, indent=1, sort_keys=True)
        os.replace(file.name, _file())
    except OSError:
        pass  # a read-only folder is no reason to refuse an answer


def report() -> str:
    """Which exercises are done, which of the model's parts are the learner's own, and how many minutes are left."""
    notes, lines, left = read(), [], 0
    parts: dict[str, bool] = {}
    for chapter in chapters():
        marks = []
        for exercise in exercises(chapter):
            passed = bool(notes.get(exercise.number, {}).get("passed"))
            tried = bool(notes.get(exercise.number, {}).get("tries"))
            marks.append("✓" if passed else "✗" if tried else "·")
            left += 0 if passed else exercise.minutes
            if exercise.part:
                parts[exercise.part] = passed
        lines.append(f"{chapter}  {' '.join(marks)}")
    own = [part for part, passed in parts.items() if passed]
    lines.append(f"Parts of the model that are yours: {len(own)} of {len(parts)}{': ' if own else ''}{', '.join(own)}.")
    hours, minutes = divmod(left, 60)
    lines.append(f"Left to do: about {hours} h {minutes:02} min." if left else "All is done.")
    return "\n".join(lines)
