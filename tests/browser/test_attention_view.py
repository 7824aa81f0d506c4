"""The attention view in JupyterLab: clicked, driven by keys, asked to silence a head; and saved, where nothing runs."""

import json
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import nbformat
import pytest
from playwright.sync_api import Browser, Locator, Page, expect

from tests.browser.test_lab import ALL_RAN, CELLS, COMMANDS, FAILED, IDLE

TEXT = "Once upon a time, there was a girl named Lily. She had a red kite. Lily lost her"
CODE = f"""from minillama import load
from minillama.visualize import attention
attention(*load("toy"), {TEXT!r}, head=(1, 2))"""
PIXELS = "canvas => canvas.toDataURL()"
ACTIVE_CELL = "window.jupyterapp.shell.currentWidget.content.activeCellIndex"


class View:
    """The page with the view in it, and what it asked for and complained of."""

    def __init__(self, page: Page, folder: Path, kind: str) -> None:
        self.page, self.folder, self.kind = page, folder, kind
        self.addresses: list[str] = []
        self.complaints: list[str] = []
        page.on("request", lambda request: self.addresses.append(request.url))
        page.on("websocket", lambda socket: self.addresses.append(socket.url))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("console", lambda line: self.complaints.append(line.text) if line.type == "error" else None)

    @property
    def root(self) -> Locator:
        return self.page.locator(f".{self.kind}")

    def open(self, lab: str, name: str, cells: list[nbformat.NotebookNode]) -> None:
        """Put a notebook into the course's folder, as a stranger's: not trusted; and open it."""
        kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
        notebook = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})
        address, token = lab.split("/?token=")
        content = json.dumps({"type": "notebook", "format": "json", "content": notebook}).encode()
        request = urllib.request.Request(f"{address}/api/contents/{name}", data=content, method="PUT")
        request.add_header("Authorization", f"token {token}")
        request.add_header("Content-Type", "application/json")
        urllib.request.urlopen(request, timeout=30).close()
        self.page.goto(f"{address}/lab/tree/{name}?token={token}")
        self.page.wait_for_function(IDLE, timeout=60_000)

    def shown(self, theme: str, width: int) -> None:
        """Show it in a theme and a width, and see that nothing is cut off."""
        self.page.set_viewport_size({"width": width, "height": 1000})
        self.page.evaluate(f"{COMMANDS}.execute('apputils:change-theme', {{theme: '{theme}'}})")
        self.page.wait_for_function("theme => document.body.dataset.jpThemeName === theme", arg=theme)
        self.root.scroll_into_view_if_needed()
        self.page.wait_for_timeout(300)
        self.screenshot(f"{theme.split()[1]}-{width}")
        assert self.root.evaluate("root => root.scrollWidth - root.clientWidth") <= 1

    def saved(self, lab: str) -> nbformat.NotebookNode:
        """Save it, and open it as a stranger's, where nothing runs; returns the cell."""
        cell = nbformat.from_dict(self.page.evaluate(CELLS)[0])
        cell.metadata.pop("trusted", None)
        assert len(json.dumps(cell.outputs)) < 300_000
        self.open(lab, "stranger.ipynb", [cell])
        expect(self.page.locator(".jp-RenderedImage img")).to_be_visible()
        expect(self.page.get_by_text("Run this cell to click")).to_be_visible()
        expect(self.root).to_have_count(0)
        self.page.set_viewport_size({"width": 1280, "height": 1300})
        self.screenshot("saved")
        return cell

    def asked_only_here(self) -> None:
        places = {
            urlsplit(address).hostname for address in self.addresses if not address.startswith(("data:", "blob:"))
        }
        assert places == {"localhost"}
        assert self.complaints == []

    def screenshot(self, name: str = "page") -> Path:
        self.page.screenshot(path=self.folder / f"{name}.png")
        return self.folder / f"{name}.png"


@contextmanager
def running(browser: Browser, lab: str, folder: Path, code: str, kind: str) -> Iterator[View]:
    """A notebook whose first cell shows a view of this kind."""
    page = browser.new_page(viewport={"width": 1280, "height": 1000})
    view = View(page, folder, kind)
    try:
        view.open(lab, f"{kind}.ipynb", [nbformat.v4.new_code_cell(code), nbformat.v4.new_markdown_cell("the end")])
        page.evaluate(f"{COMMANDS}.execute('application:toggle-left-area')")
        page.evaluate(f"{COMMANDS}.execute('notebook:run-all-cells')")
        page.wait_for_function(f"{IDLE} && ({ALL_RAN} || {FAILED})", timeout=60_000)
        expect(view.root).to_be_visible()
    except Exception as error:
        raise AssertionError(f"{error}\nThe page: {view.screenshot()}") from error
    yield view
    page.close()


@pytest.fixture(scope="module")
def run(lab: str, browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[View]:
    with running(browser, lab, tmp_path_factory.mktemp("view"), CODE, "minillama-attention") as view:
        yield view


def test_all_heads_are_there_and_one_is_chosen(run: View) -> None:
    heads = run.root.get_by_role("radiogroup", name="Every head").get_by_role("radio")
    expect(heads).to_have_count(4 * 8)
    expect(run.root.get_by_role("radio", name="layer 1, head 2", exact=True)).to_be_checked()
    assert len(set(heads.evaluate_all(f"all => all.map({PIXELS})"))) > 20, "the small maps differ"
    expect(run.page.locator(".jp-RenderedImage, .jp-OutputArea table").first).to_be_hidden()


def test_another_head_is_shown_at_once(run: View) -> None:
    large = run.root.get_by_role("img")
    before, lines = large.evaluate(PIXELS), run.root.locator("svg path").count()
    run.root.get_by_role("radio", name="layer 3, head 5", exact=True).click()
    expect(run.root.get_by_role("heading", name="Layer 3, head 5")).to_be_visible()
    assert large.evaluate(PIXELS) != before and lines > 10
    run.page.keyboard.press("ArrowUp")
    expect(run.root.get_by_role("radio", name="layer 2, head 5", exact=True)).to_be_focused()
    expect(run.root.get_by_role("heading", name="Layer 2, head 5")).to_be_visible()
    assert run.page.evaluate(ACTIVE_CELL) == 0, "JupyterLab did not take the key for its own"


def test_a_chosen_word_shows_its_shares(run: View) -> None:
    words = run.root.get_by_role("radiogroup", name="The token that looks").get_by_role("radio")
    shares = run.root.locator(".row")
    words.nth(5).click()
    expect(words.nth(5)).to_be_checked()
    expect(shares.get_by_role("heading")).to_have_text(f"“{words.nth(5).inner_text()}” looks at")
    numbers = [float(text.removesuffix(" %")) for text in shares.locator(".share").all_inner_texts()]
    assert 1 <= len(numbers) <= 6 and numbers == sorted(numbers, reverse=True) and 90 < sum(numbers) < 103
    run.page.keyboard.press("ArrowDown")
    expect(words.nth(6)).to_be_focused()
    expect(shares.get_by_role("heading")).to_have_text(f"“{words.nth(6).inner_text()}” looks at")


def test_a_silenced_head_changes_the_next_words(run: View) -> None:
    bars = run.root.locator(".next")
    whole = bars.inner_text()
    run.root.get_by_role("radio", name="layer 0, head 0", exact=True).click()
    run.root.get_by_role("button", name="Silence layer 0, head 0").click()
    expect(bars.get_by_role("columnheader", name="after")).to_be_visible(timeout=30_000)
    expect(run.root.get_by_role("status")).to_contain_text("Silenced: layer 0 head 0")
    rows = [row.locator(".share").all_inner_texts() for row in bars.locator("tbody tr").all()]
    assert any(before != after for before, after in rows)
    expect(run.root.get_by_role("button", name="Silence layer 0, head 0", pressed=True)).to_be_visible()
    run.root.get_by_role("button", name="Let all heads speak").click()
    expect(bars).to_have_text(whole.replace("\n", "").replace("\t", ""), timeout=30_000)


@pytest.mark.parametrize("width", [1280, 520])
@pytest.mark.parametrize("theme", ["JupyterLab Light", "JupyterLab Dark"])
def test_nothing_is_cut_off_in_any_width_or_theme(run: View, theme: str, width: int) -> None:
    run.shown(theme, width)


def test_saved_it_reads_well_where_nothing_runs(run: View, lab: str) -> None:
    cell = run.saved(lab)
    assert cell.outputs[0].metadata["image/png"]["alt"].startswith("Attention over ")
    expect(run.page.get_by_text("Attention over 25 tokens.")).to_be_visible()
    table = run.page.locator(".jp-RenderedHTMLCommon table").first
    expect(table).to_be_visible()
    expect(table).to_contain_text("is looked at")
    assert table.locator("td div").first.evaluate("bar => bar.clientHeight") == 5


def test_nothing_is_asked_of_another_machine_and_no_error_is_logged(run: View) -> None:
    run.asked_only_here()
