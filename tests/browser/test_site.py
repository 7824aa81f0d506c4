"""The web site of `make site`, opened from its files, as a reader without a network and without a kernel sees it."""

import os
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import pytest
from playwright.sync_api import Browser, Page, expect

from chapters.site.live import cells_that_ask, html

ROOT = Path(__file__).resolve().parents[2]
PIXELS = "canvas => canvas.toDataURL()"
SITE = ROOT / "build" / "site"
PAGES = [
    "index.html", "chapters/00_start_here.html", "chapters/03_positions.html", "chapters/11_looking_inside.html",
    "exercises/04_attention.html", "reference/attention.html",
]  # fmt: skip

SOURCES = [
    "chapters/*.ipynb", "chapters/site/*.*", "exercises/*.ipynb", "minillama/**/*.py", "minillama/visualize/*.*s",
    "README.md",
]  # fmt: skip


def is_built() -> bool:
    changed = max(path.stat().st_mtime for pattern in SOURCES for path in ROOT.glob(pattern))
    return (SITE / "index.html").is_file() and (SITE / "index.html").stat().st_mtime > changed


pytestmark = pytest.mark.skipif(
    not is_built() and not os.environ.get("CI"), reason="the site is not built, or is old: type `make site`"
)


class Reader(HTMLParser):
    """What a page of the site holds: its links, its anchors, its pictures."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []  # what the browser fetches by itself
        self.anchors: set[str] = set()
        self.pictures: list[dict[str, str | None]] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        self.anchors |= {name for name in (found.get("id"), found.get("name")) if name}
        if tag == "a" and found.get("href"):
            self.links.append(found["href"] or "")
        for name in ("src", "href") if tag == "link" else ("src",):
            if found.get(name) and found.get("rel") != "canonical":
                self.loads.append(found[name] or "")
        if tag == "img":
            self.pictures.append(found)


@pytest.fixture(scope="module")
def read() -> dict[Path, Reader]:
    return {path: Reader(path) for path in sorted(SITE.rglob("*.html")) if "_static" not in path.parts}


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A page that fails the test when it asks for something that is not a file of the site, or when it complains."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("requestfailed", lambda request: complaints.append(f"not found: {request.url}"))
    addresses: list[str] = []
    page.on("request", lambda request: addresses.append(request.url))
    page.on("websocket", lambda socket: addresses.append(socket.url))
    yield page
    page.close()
    assert [address for address in addresses if urlsplit(address).scheme not in ("file", "data", "blob")] == []
    assert complaints == []


def visit(page: Page, name: str) -> None:
    path, _, query = name.partition("?")
    page.goto(f"{(SITE / path).as_uri()}?{query}")
    page.wait_for_function("!window.MathJax || MathJax.startup?.promise")
    page.evaluate("window.MathJax?.startup.promise.then(() => null)")


def test_every_chapter_exercise_and_module_has_a_page(read: dict[Path, Reader]) -> None:
    for notebook in [*ROOT.glob("chapters/*.ipynb"), *ROOT.glob("exercises/*.ipynb")]:
        assert SITE / notebook.relative_to(ROOT).with_suffix(".html") in read
    for path in (ROOT / "minillama").glob("[!_]*"):
        assert SITE / "reference" / f"{path.stem}.html" in read


def test_every_link_inside_the_site_leads_somewhere(read: dict[Path, Reader]) -> None:
    dead = []
    for path, content in read.items():
        for link in content.links + content.loads:
            to = urlsplit(link)
            if to.scheme or to.netloc:
                continue
            target = (path.parent / unquote(to.path)).resolve() if to.path else path
            anchors = read[target].anchors if target in read else set()
            if not target.is_file() or to.fragment and target in read and unquote(to.fragment) not in anchors:
                dead.append(f"{path.relative_to(SITE)}: {link}")
    assert dead == []


def test_nothing_is_loaded_from_elsewhere_and_no_control_is_left_without_its_kernel(read: dict[Path, Reader]) -> None:
    assert [link for content in read.values() for link in content.loads if urlsplit(link).netloc] == []
    for path in read:
        text = path.read_text(encoding="utf-8")
        assert "jupyter.widget" not in text
        assert text.count("draws controls") == len(re.findall(r'<span class="nd">@interact</span>', text)), path


def test_a_cell_that_asks_for_a_view_is_found() -> None:
    sources = [
        "from minillama import visualize\nfrom minillama.visualize import attention as look, grid",
        "def attention(q, k): ...\nattention(1, 2)\nself.attention(3)",
        "visualize.attention(model, tokenizer, text)",
        "look(model, tokenizer, text)\ngrid(numbers)",
        "visualize.head_grid(numbers)",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    notebook.cells.append(nbformat.v4.new_markdown_cell("visualize.attention(model, tokenizer, text)"))
    assert list(cells_that_ask(notebook)) == [2, 3]


def test_nothing_in_the_state_of_a_view_ends_its_script() -> None:
    state = {"_esm": "export default {}", "words": "</script><img src=x>", "_view_name": "AnyView"}
    text = html({"state": state, "buffers": [{"path": ["maps"], "data": "AAEC", "encoding": "base64"}]})
    assert text.count("</script>") == 1 and "<img" not in text and "_view_name" not in text


def test_every_view_that_a_chapter_asks_for_is_drawn(page: Page, read: dict[Path, Reader]) -> None:
    for notebook in sorted((ROOT / "chapters").glob("*.ipynb")):
        asking = list(cells_that_ask(nbformat.read(notebook, as_version=4)))
        name = notebook.relative_to(ROOT).with_suffix(".html")
        scripts = re.findall('<script[^>]*class="live-view">.*?</script>', (SITE / name).read_text(encoding="utf-8"))
        assert len(scripts) >= len(asking), name
        assert max(map(len, scripts), default=0) < 300_000
        if scripts:
            visit(page, name.as_posix())
            expect(page.locator(".live-view ~ div > *")).to_have_count(len(scripts))


def test_the_attention_view_lives_without_a_kernel(page: Page) -> None:
    visit(page, "chapters/11_looking_inside.html")
    view = page.locator(".minillama-attention")
    large = view.get_by_role("img")
    seen = [large.evaluate(PIXELS)]
    view.get_by_role("radio", name="layer 3, head 5", exact=True).click()
    expect(view.get_by_role("heading", name="Layer 3, head 5")).to_be_visible()
    seen.append(large.evaluate(PIXELS))
    page.keyboard.press("ArrowUp")
    expect(view.get_by_role("radio", name="layer 2, head 5", exact=True)).to_be_focused()
    expect(view.get_by_role("heading", name="Layer 2, head 5")).to_be_visible()
    seen.append(large.evaluate(PIXELS))
    assert len(set(seen)) == 3
    words = view.get_by_role("radiogroup", name="The token that looks").get_by_role("radio")
    words.nth(5).click()
    page.keyboard.press("ArrowDown")
    expect(view.locator(".row").get_by_role("heading")).to_have_text(f"“{words.nth(6).inner_text()}” looks at")


def test_the_attention_view_says_what_needs_a_kernel(page: Page) -> None:
    visit(page, "chapters/11_looking_inside.html")
    view = page.locator(".minillama-attention")
    expect(view.get_by_text("Here no kernel runs")).to_be_visible()
    expect(view.get_by_role("button")).to_have_count(0)
    expect(view.get_by_role("columnheader", name="after")).to_be_visible()  # what was silenced in the notebook


def test_the_stand_ins_of_a_view_are_folded(page: Page) -> None:
    visit(page, "chapters/11_looking_inside.html")
    stand_in = page.get_by_role("img", name="Attention over")
    expect(stand_in).to_be_hidden()
    page.get_by_text("The same as a picture and a table").first.click()
    expect(stand_in).to_be_visible()


def test_without_scripts_the_stand_ins_of_a_view_are_there(browser: Browser) -> None:
    page = browser.new_page(java_script_enabled=False)
    page.goto((SITE / "chapters" / "11_looking_inside.html").as_uri())
    expect(page.get_by_role("img", name="Attention over")).to_be_visible()
    expect(page.get_by_text("its strongest links").first).to_be_visible()
    page.close()


def test_every_picture_is_described(read: dict[Path, Reader]) -> None:
    for path, content in read.items():
        for picture in content.pictures:
            alt = picture.get("alt") or ""
            assert len(alt) > 20 and not alt.startswith("../"), f"{path}: {picture['src']} says {alt!r}"


@pytest.mark.parametrize("width", [1280, 390])
def test_every_page_opens_and_fits(page: Page, read: dict[Path, Reader], width: int) -> None:
    page.set_viewport_size({"width": width, "height": 900})
    broken = "[...document.images].some(image => image.complete && !image.naturalWidth)"
    found = {}
    for path in read:
        visit(page, path.relative_to(SITE).as_posix())
        if page.evaluate("document.documentElement.scrollWidth") > width:
            found[path.name] = "too wide"
        if page.evaluate(broken):
            found[path.name] = "a picture is missing"
    assert found == {}


def test_formulas_are_typeset(page: Page) -> None:
    visit(page, "chapters/04_attention.html")
    formulas, left = page.locator(".math").count(), page.locator(".math:not(:has(mjx-container))").count()
    assert formulas > 50 and left == 0
    assert page.locator("mjx-merror, [data-mjx-error]").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_follows_the_reader_s_colours(page: Page, scheme: str) -> None:
    page.emulate_media(color_scheme=scheme)
    visit(page, "chapters/04_attention.html")
    assert page.evaluate("document.documentElement.dataset.theme") == scheme
    channels = re.findall(r"\d+", page.evaluate("getComputedStyle(document.body).backgroundColor"))[:3]
    assert all((int(channel) > 128) is (scheme == "light") for channel in channels)


def test_search_finds_a_word(page: Page) -> None:
    visit(page, "search.html?q=softmax")
    found = page.locator("#search-results li a[href*='chapters/04_attention.html']")  # they come one after the other
    expect(found.first).to_be_visible(timeout=20_000)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", PAGES)
def test_axe_finds_no_serious_barrier(page: Page, name: str, scheme: str) -> None:
    try:
        (axe,) = [path for path in files("axe-playwright-python") or [] if path.name == "axe.min.js"]
    except PackageNotFoundError:
        pytest.skip("axe is not installed: type `make site`, then run this again")
    page.emulate_media(color_scheme=scheme)
    visit(page, name)
    page.add_style_tag(content="* { transition: none !important; }")  # a colour half-way is no colour to judge
    page.evaluate(Path(str(axe.locate())).read_text(encoding="utf-8"))
    result = page.evaluate("axe.run(document, {resultTypes: ['violations'], preload: false})")
    serious = [
        f"{fault['id']}: {node['target']} {node['html'][:120]}"
        for fault in result["violations"]
        if fault["impact"] in ("serious", "critical")
        for node in fault["nodes"]
    ]
    assert serious == []
