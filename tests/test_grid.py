"""A coloured table: what it says, that nothing in it runs, that it reads on a light and on a dark page."""

import html.parser
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minillama.visualize import grid, head_grid
from minillama.visualize.grid import BLUE, ORANGE, STRONGEST


class Page(html.parser.HTMLParser):
    """Every tag is closed in order, and none can run or fetch anything."""

    VOID, HARMLESS = set(), {"div", "table", "caption", "thead", "tbody", "tr", "th", "td"}

    def __init__(self, text: str):
        super().__init__()
        self.open, self.cells, self.titles, self.scopes, self.colours = [], [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        assert tag in self.HARMLESS and {name for name, _ in attributes} <= {"style", "title", "scope"}, attributes
        assert not any("url" in (value or "") for name, value in attributes if name == "style")
        self.open.append(tag)
        values = dict(attributes)
        if "title" in values:
            self.titles.append(values["title"])
            colour = re.search(r"background-color:rgba\((\d+),(\d+),(\d+),([\d.]+)\)", values["style"])
            self.colours.append(colour.groups())
            self.cells.append("")
        self.scopes += [values["scope"]] if "scope" in values else []

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if self.open[-1:] == ["td"] and self.cells:
            self.cells[-1] += text


def test_numbers_names_and_colours():
    page = Page(grid(torch.tensor([[1.0, -0.5, 0.0], [0.25, 150.0, 2.0]]), rows=["a", "b"], columns=["x", "y", "z"],
                     title="t")._repr_html_())  # fmt: skip
    assert page.cells == ["1.00", "-0.50", "0.00", "0.25", "150", "2.00"]
    assert page.titles[1] == "a, y: -0.50" and page.scopes == ["col"] * 3 + ["row"] * 2
    assert page.colours[4] == (*map(str, BLUE), f"{STRONGEST:.2f}") and page.colours[1][:3] == tuple(map(str, ORANGE))
    assert page.colours[2][3] == "0.00"


@given(st.lists(st.text(max_size=8), min_size=1, max_size=4), st.floats(allow_nan=True, allow_infinity=True, width=32))
def test_any_name_is_shown_as_it_is_and_any_number_has_a_colour(names, value):
    values = torch.full((1, len(names)), value)
    hostile = "<script>alert(1)</script>"
    page = Page(grid(values, rows=[hostile], columns=names, title=hostile, words=[names])._repr_html_())
    assert page.cells == names


def test_text_stays_readable_on_the_strongest_colours():
    """Contrast of the page's own text, 4.5 or more (WCAG 2.1, 1.4.3)."""

    def luminance(colour):
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (x / 255 for x in colour)]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for paper, ink in (((255, 255, 255), (0, 0, 0)), ((17, 17, 17), (255, 255, 255))):
        for colour in (BLUE, ORANGE):
            ground = [STRONGEST * c + (1 - STRONGEST) * p for c, p in zip(colour, paper, strict=True)]
            low, high = sorted((luminance(ground), luminance(ink)))
            assert (high + 0.05) / (low + 0.05) >= 4.5, (paper, colour)


def test_heads_have_a_row_for_each_layer():
    assert Page(head_grid(torch.rand(2, 3), "scores")._repr_html_()).titles[4].startswith("layer 1, head 1: ")


def test_a_picture_of_it_has_its_content_in_words():
    made = head_grid(torch.randn(2, 3), "scores").picture("two rows")
    assert made.data.startswith(b"\x89PNG") and made.alt == "two rows"


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"values are \(2, 3\), expected \(2, 2\)"):
        grid(torch.zeros(2, 3), rows=["a", "b"], columns=["x", "y"], title="")
    with pytest.raises(ValueError, match="40000 cells is too large"):
        grid(torch.zeros(200, 200), rows=["a"] * 200, columns=["x"] * 200, title="")
    with pytest.raises(ValueError, match="words do not fill the cells"):
        grid(torch.zeros(1, 2), rows=["a"], columns=["x", "y"], title="", words=[["one"]])
