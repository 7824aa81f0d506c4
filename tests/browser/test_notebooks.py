"""Notebooks in a real browser: each is opened, run and played with, and an exercise is solved by typing.

`make test` opens two of them, `make browser` all chapters and all solutions.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.browser.test_lab import ALL_RAN, BUSY, CELLS, COMMANDS, FAILED, IDLE, NOTEBOOK, ROOT

ALL = os.environ.get("MINILLAMA_BROWSER") == "all"
SECONDS = 300  # the longest chapter trains for three minutes
CHAPTERS = [f"chapters/{path.name}" for path in sorted((ROOT / "chapters").glob("*.ipynb"))[1:]]  # 00: test_lab.py
SOLUTIONS = [f"exercises/solutions/{path.name}" for path in sorted((ROOT / "exercises" / "solutions").glob("*.ipynb"))]
NOTEBOOKS = [*CHAPTERS, *SOLUTIONS] if ALL else ["chapters/07_model.ipynb"]
TEXT = "element => element.innerHTML"
AT_THE_END = """handle => handle.matches("input") ? handle.value === handle.max :
    handle.getAttribute("aria-valuenow") === handle.getAttribute("aria-valuemax")"""
WIDGET = ".jupyter-widgets.widget-interact, .minillama-laboratory"


@dataclass
class Opened:
    """A notebook in JupyterLab, what it asked for and what its page complained of."""

    page: Page
    folder: Path
    addresses: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    def cells(self) -> list[dict[str, Any]]:
        return [cell for cell in self.page.evaluate(CELLS) if cell["cell_type"] == "code"]

    def wait_until_idle(self) -> None:
        self.page.wait_for_function(IDLE, timeout=120_000)

    def screenshot(self, name: str) -> Path:
        self.page.screenshot(path=self.folder / f"{name}.png")
        return self.folder / f"{name}.png"


@pytest.fixture
def open_notebook(lab: str, browser: Browser, tmp_path: Path) -> Iterator[Any]:
    """A function that opens a notebook of the copy; its kernel ends with the test."""
    pages: list[Opened] = []

    def open_it(name: str) -> Opened:
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        opened = Opened(page, tmp_path)
        pages.append(opened)
        page.on("request", lambda request: opened.addresses.append(request.url))
        page.on("websocket", lambda socket: opened.addresses.append(socket.url))
        page.on("pageerror", lambda error: opened.complaints.append(str(error)))
        page.goto(lab.replace("/?", f"/lab/tree/{name}?reset&"))
        opened.wait_until_idle()
        return opened

    yield open_it
    for opened in pages:
        opened.page.evaluate("window.jupyterapp.shell.currentWidget?.sessionContext?.shutdown()")
        opened.page.close()


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs_and_its_controls_move(name: str, open_notebook: Any) -> None:
    opened = open_notebook(name)
    page = opened.page
    page.evaluate(f"{COMMANDS}.execute('notebook:clear-all-cell-outputs')")
    page.wait_for_function(f"!{CELLS}.some(cell => cell.execution_count)")
    page.evaluate(f"{COMMANDS}.execute('notebook:run-all-cells')")
    try:
        page.wait_for_function(f"{IDLE} && ({ALL_RAN} || {FAILED})", timeout=SECONDS * BUSY * 1000)
    except Exception as error:
        raise AssertionError(f"{error}\nThe page: {opened.screenshot('page')}") from error
    outputs = [out for cell in opened.cells() for out in cell["outputs"]]
    assert [f"{out['ename']}: {out['evalue']}" for out in outputs if out["output_type"] == "error"] == []
    assert ["".join(out["text"]) for out in outputs if out.get("name") == "stderr"] == []
    # A window as high as the notebook, from its top: JupyterLab draws only what is in sight.
    page.evaluate(f"{NOTEBOOK}.scrollTop = 0")
    page.set_viewport_size({"width": 1280, "height": min(200 + page.evaluate(f"{NOTEBOOK}.scrollHeight"), 30_000)})
    move_every_control(opened)
    for theme in ("JupyterLab Light", "JupyterLab Dark"):
        page.evaluate(f"{COMMANDS}.execute('apputils:change-theme', {{theme: '{theme}'}})")
        page.wait_for_timeout(500)
        opened.screenshot(theme.split()[-1])
    assert opened.complaints == []
    places = {(urlsplit(address).scheme, urlsplit(address).hostname) for address in opened.addresses}
    assert {place for place in places if place[0] not in ("data", "blob") and place[1] != "localhost"} == set()


def move_every_control(opened: Opened) -> None:
    """Every slider of a laboratory is moved by one step, every list by one entry: what it shows becomes another."""
    page = opened.page
    for widget in page.locator(WIDGET).all():
        widget.scroll_into_view_if_needed()
        areas = widget.locator(".jp-OutputArea")  # what `interact` draws into; a laboratory says what it shows
        shown = areas.first if areas.count() else widget.get_by_role("status")
        for control in [*widget.locator(".noUi-handle, input[type=range]").all(), *widget.locator("select").all()]:
            before = shown.evaluate(TEXT)
            if control.evaluate("element => element.tagName") == "SELECT":
                entries = control.locator("option").evaluate_all("all => all.map(option => option.value)")
                control.select_option(entries[-1 if control.input_value() != entries[-1] else 0])
            else:
                at_the_end = control.evaluate(AT_THE_END)
                control.press("ArrowLeft" if at_the_end else "ArrowRight")
            handle = shown.element_handle()
            page.wait_for_function(
                "([element, before]) => element.innerHTML !== before && element.innerHTML.length > 20",
                arg=[handle, before], timeout=30_000,
            )  # fmt: skip


def test_an_exercise_is_solved_by_typing(open_notebook: Any) -> None:
    """A wrong answer shows the sentence that names it, a right one its ✓."""
    opened = open_notebook("exercises/06_normalization.ipynb")
    page = opened.page
    sources = [cell["source"] for cell in page.evaluate(CELLS)]
    stub = next(i for i, source in enumerate(sources) if source.startswith("def l2_norm"))

    def run(cell: int) -> None:
        page.evaluate(f"window.jupyterapp.shell.currentWidget.content.activeCellIndex = {cell}")
        page.evaluate(f"{COMMANDS}.execute('notebook:run-cell')")
        page.wait_for_function(
            f"{CELLS}[{cell}].execution_count && {IDLE}", timeout=60_000
        )  # the next reply comes after it is idle

    def write(body: str) -> None:
        page.evaluate(f"window.jupyterapp.shell.currentWidget.content.activeCellIndex = {stub}")
        page.evaluate("window.jupyterapp.shell.currentWidget.content.mode = 'edit'")
        page.keyboard.press("Control+A")
        page.keyboard.press("Delete")
        page.keyboard.insert_text(f"def l2_norm(x):\n    {body}")
        assert body in page.evaluate(CELLS)[stub]["source"]

    run(1)
    write("return x / x.norm()")
    run(stub)
    run(stub + 1)
    expect(page.get_by_text(re.compile("✗ 06.1")).first).to_be_visible(timeout=60_000)
    write("return x / x.norm(dim=-1, keepdim=True).clamp_min(1e-12)")
    run(stub)
    run(stub + 1)
    expect(page.get_by_text(re.compile("✓ 06.1")).first).to_be_visible(timeout=60_000)
    assert opened.complaints == []
