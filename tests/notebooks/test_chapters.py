"""Every chapter has the form that its readers can rely on; that it runs, nbval shows."""

import re
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[2]
CHAPTERS = sorted((ROOT / "chapters").glob("*.ipynb"))
BUILT = [path for path in CHAPTERS if not path.name.startswith("00")]
SECTIONS = ["Build", "Check", "See", "Break", "Weigh", "Said and true", "Exercises", "Go further"]
SAFE = {"#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442"}  # Okabe and Ito's palette

every_chapter = pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
every_built_chapter = pytest.mark.parametrize("path", BUILT, ids=lambda path: path.stem)


def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def prose(notebook: nbformat.NotebookNode) -> str:
    return "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")


def headings(notebook: nbformat.NotebookNode) -> list[str]:
    return re.findall(r"^## (.+)$", prose(notebook), re.MULTILINE)


@every_chapter
def test_it_opens_with_its_question_and_what_the_reader_gets(path):
    first = read(path).cells[0].source
    assert re.match(rf"# {path.name[:2]} · \S", first)
    assert re.search(r"^\*\*.+\?\*\*$", first, re.MULTILINE), "no question in bold"
    for promise in ("You need", "Afterwards you can", "Time"):
        assert re.search(rf"^- \*\*{promise}:?\*\*", first, re.MULTILINE), promise


@every_built_chapter
def test_its_sections_come_in_the_order_of_the_course(path):
    found = [name for heading in headings(read(path)) for name in SECTIONS if re.match(rf"{name}\b", heading)]
    assert set(found) == set(SECTIONS)
    first = [found.index(name) for name in SECTIONS]
    assert first[:2] == sorted(first[:2]) and first[3:] == sorted(first[3:]) and found[-3:] == SECTIONS[-3:]


@every_built_chapter
def test_what_it_asks_to_predict_is_answered_in_a_fold(path):
    notebook = read(path)
    text = prose(notebook)
    shown = [o.data.get("text/markdown", "") for cell in notebook.cells for o in cell.get("outputs", []) if "data" in o]
    answers = "\n".join([text, *shown])  # an answer with numbers that were measured is shown by a cell
    asked, answered = text.count("**Predict:**"), answers.count("<details><summary>The answer</summary>\n\n")
    assert asked >= 3 and answered == asked
    assert text.count("<details>") == text.count("</details>") == text.count("\n\n</details>")


@every_chapter
def test_its_outputs_are_whole_and_clean(path):
    cells = [cell for cell in read(path).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        for output in cell.outputs:
            assert output.output_type != "error" and output.get("name") != "stderr", cell.source
            assert "Warning" not in output.get("text", ""), cell.source
    assert path.stat().st_size < 1_500_000


@every_chapter
def test_every_figure_is_described_in_words(path):
    for cell in read(path).cells:
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                alt = output.metadata.get("alt") or output.metadata.get("image/png", {}).get("alt", "")
                assert len(alt) >= 20, cell.source
    assert "![](" not in prose(read(path))


@every_chapter
def test_its_colours_can_be_told_apart_by_the_colour_blind(path):
    for cell in read(path).cells:
        if cell.cell_type == "code":
            colours = {colour.upper() for colour in re.findall(r"#[0-9A-Fa-f]{6}\b", cell.source)}
            greys = {colour for colour in colours if colour[1:3] == colour[3:5] == colour[5:7]}
            assert colours - greys <= SAFE, cell.source
            assert not re.search(r"cmap=[\"'](jet|rainbow|hsv|RdYlGn)", cell.source)


@every_chapter
def test_a_cell_fits_on_a_screen(path):
    for cell in read(path).cells:
        if cell.cell_type == "code":
            assert len(cell.source.splitlines()) <= 36, cell.source


@every_chapter
def test_what_differs_between_machines_is_asserted(path):
    """A cell whose result is not compared computes what the text speaks of: a cell near it says what holds."""
    cells = [cell for cell in read(path).cells if cell.cell_type == "code"]
    for number, cell in enumerate(cells):
        if "nbval-ignore-output" in cell.metadata.get("tags", []) and "interact" not in cell.source:
            near = cells[max(0, number - 3) : number + 4]
            assert any("assert" in other.source for other in near), cell.source


@every_chapter
def test_its_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", prose(read(path))):
        if target.startswith(("http://", "https://")):
            assert target.startswith("https://"), target
        else:
            assert (path.parent / target).exists(), target


def test_the_readme_and_chapter_00_list_the_chapters_that_are_there():
    there = {path.name for path in CHAPTERS}
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"\| \[.+?\]\(chapters/(.+?\.ipynb)\) \|", readme)) == there
    first = prose(read(CHAPTERS[0]))
    assert set(re.findall(r"^\| \[.+?\]\((.+?\.ipynb)\)", first, re.MULTILINE)) == there
