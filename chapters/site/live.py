"""The live views of a notebook with their state, so that a page draws them where no kernel runs (see live.js).

Notebooks are stored without that state: they are run again, as far as the last cell that asks for a view.
"""

import ast
import copy
import inspect
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
from nbformat import NotebookNode

from minillama import visualize
from tests.notebooks.normalise import WIDGET, execute

STATE = "application/vnd.jupyter.widget-state+json"
VIEWS = {
    name for name in visualize.__all__
    if "import anywidget" in inspect.getsource(sys.modules[getattr(visualize, name).__module__])
}  # fmt: skip


def add_views(notebook: NotebookNode, path: Path) -> None:
    """Put the live views that cells show behind what is stored of these cells. Raises nbclient's errors."""
    asking = list(cells_that_ask(notebook))
    if not asking:
        return
    start = time.perf_counter()
    ran = copy.deepcopy(notebook)
    del ran.cells[asking[-1] + 1 :]
    execute(ran, path.parent)
    models, count = ran.metadata.widgets[STATE].state, 0
    for stored, cell in zip(notebook.cells, ran.cells, strict=False):
        for output in cell.get("outputs", []):
            model = models.get(output.get("data", {}).get(WIDGET, {}).get("model_id"), {})
            if model.get("model_module") == "anywidget":
                stored.outputs.append(nbformat.v4.new_output("display_data", {"text/html": html(model)}))
                count += 1
    print(f"{path.parent.name}/{path.name}: {count} live, {time.perf_counter() - start:.0f} s", flush=True)


def html(model: dict[str, Any]) -> str:
    """What a page needs to draw an anywidget: its module, its style, and its state without what Jupyter adds."""
    state = {name: value for name, value in model["state"].items() if not name.startswith("_")}
    needs = {
        "module": model["state"]["_esm"],
        "style": model["state"].get("_css", ""),
        "state": state,
        "buffers": [[buffer["path"], buffer["data"]] for buffer in model.get("buffers", [])],  # base64
    }
    text = json.dumps(needs, ensure_ascii=False).replace("<", "\\u003c")  # nothing in it ends the script
    return f'<script type="application/json" class="live-view">{text}</script>'


def cells_that_ask(notebook: NotebookNode) -> Iterator[int]:
    """The places of the cells that call one of VIEWS, by `visualize.` or as imported from there."""
    names = {f"visualize.{name}" for name in VIEWS}
    for place, cell in enumerate(notebook.cells):
        nodes = list(ast.walk(ast.parse(cell.source))) if cell.cell_type == "code" else []
        for node in nodes:
            if isinstance(node, ast.ImportFrom) and node.module == "minillama.visualize":
                names |= {alias.asname or alias.name for alias in node.names if alias.name in VIEWS}
        if any(isinstance(node, ast.Call) and ast.unparse(node.func) in names for node in nodes):
            yield place
