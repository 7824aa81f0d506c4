"""Run notebooks and store them in one form: `make notebooks`, or `python -m tests.notebooks.normalise [notebook ...]`.

A notebook that Jupyter saves differs from machine to machine: random cell ids, the kernel's version, times, widgets
that nobody can open later, addresses of objects. All of that goes or becomes fixed, so that a second run changes
nothing but what a cell really computes differently. Exercises are stored without results: the learner makes these.
"""

import os
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbclient.output_widget import OutputWidget
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("chapters", "exercises", "exercises/solutions")
EXERCISE_ID = re.compile(r"\w+-\d+-(box|stub|check)")
WIDGET = "application/vnd.jupyter.widget-view+json"
SECONDS_PER_CELL = 600


def committed_notebooks() -> list[Path]:
    """Every notebook of the course, in the order of its folders and numbers."""
    return [path for folder in FOLDERS for path in sorted((ROOT / folder).glob("*.ipynb"))]


def is_exercise(path: Path) -> bool:
    return path.resolve().parent == ROOT / "exercises"


class _Listener(OutputWidget):
    """Takes what a cell shows inside of a widget, and does not answer: now and then an answer crosses with the next
    request, the kernel's reply is lost, and nbclient waits for it until its time is up."""

    def send(self, *arguments: Any, **options: Any) -> None:
        pass


def execute(notebook: NotebookNode, folder: Path) -> None:
    """Run all cells in a new kernel of this Python, in `folder`. Raises nbclient's errors; outputs change in place."""
    client = NotebookClient(
        notebook,
        kernel_name="python3",
        timeout=SECONDS_PER_CELL,
        resources={"metadata": {"path": str(folder)}},
        record_timing=False,
        coalesce_streams=True,
        extra_arguments=["--log-level=ERROR"],
    )
    client.widget_registry = {"@jupyter-widgets/output": {"OutputModel": _Listener}}
    client.execute()


def normalise(notebook: NotebookNode, results: bool = True) -> str:
    """The text to store for a notebook, with or without its results.

    Raises ValueError when a result names a path of this machine, or when a cell ends with a semicolon: Jupyter then
    hides the cell's value, the tests' runner (nbval) does not, and the two results would differ.
    """
    notebook = nbformat.from_dict(notebook)
    notebook.nbformat, notebook.nbformat_minor = 4, 5  # the first with cell ids
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        }
    )
    count = 0
    for number, cell in enumerate(notebook.cells, start=1):
        if not EXERCISE_ID.fullmatch(cell.get("id", "")):
            cell.id = f"cell-{number:02}"
        cell.metadata = nbformat.from_dict({k: v for k, v in cell.metadata.items() if k in ("tags", "slideshow")})
        if cell.cell_type != "code":
            continue
        if cell.source.rstrip().endswith(";"):
            raise ValueError(f"cell {number} ends with ';', expected none: end a cell that draws with plt.show().")
        if not results:
            cell.outputs = []
        cell.outputs = [output for output in cell.outputs if WIDGET not in output.get("data", {})]
        cell.execution_count = None
        if results and cell.source.strip():
            count += 1
            cell.execution_count = count
        for output in cell.outputs:
            _normalise_output(output, cell.execution_count, where=f"cell {number}")
    return nbformat.writes(notebook) + "\n"


def _normalise_output(output: NotebookNode, count: int | None, where: str) -> None:
    if output.output_type == "execute_result":
        output.execution_count = count
    if output.output_type == "error":
        # The frames name files of this machine and are coloured for a terminal; the last line says what happened.
        output.traceback = [f"{output.ename}: {output.evalue}"]
    if output.output_type == "stream":
        output.text = _normalise_text(output.text, where)
    for kind, content in output.get("data", {}).items():
        if isinstance(content, str) and not kind.startswith("image/png"):
            output.data[kind] = _normalise_text(content, where)


def _normalise_text(text: str, where: str) -> str:
    for place in {str(ROOT), str(Path.home()), sys.prefix, sys.base_prefix, tempfile.gettempdir()}:
        if len(place) > 1 and (found := re.search(rf"(?<![\w.]){re.escape(place)}(?!\w)[^\s'\"]*", text)):
            raise ValueError(
                f"{where} shows {found[0]!r}, a path of this machine, expected none: "
                "print a path relative to the repository, or cure the warning."
            )
    return re.sub(r"\bat 0x[0-9a-f]{6,}", "at 0x000000000000", text)


def write(path: Path, text: str) -> None:
    """Replace a file in one step, so that a run that is stopped leaves the old one whole."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", encoding="utf-8", delete=False) as file:
        file.write(text)
    os.chmod(file.name, path.stat().st_mode)
    os.replace(file.name, path)


def _short(path: Path) -> str:
    return os.path.relpath(path, ROOT)


def main(names: list[str]) -> int:
    failed = 0
    for path in [Path(name) for name in names] or committed_notebooks():
        start = time.perf_counter()
        try:
            notebook = nbformat.read(path, as_version=4)
            if not is_exercise(path):
                execute(notebook, path.parent)
            text = normalise(notebook, results=not is_exercise(path))
        except (OSError, ValueError, CellExecutionError, CellTimeoutError, DeadKernelError) as error:
            print(f"{_short(path)} was not stored: {error}", file=sys.stderr)
            failed += 1
            continue
        changed = text != path.read_text(encoding="utf-8")
        if changed:
            write(path, text)
        seconds = time.perf_counter() - start
        print(f"{_short(path)}: {'stored' if changed else 'unchanged'}, {seconds:.0f} s", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
