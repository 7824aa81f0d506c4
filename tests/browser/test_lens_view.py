"""The lens view in JupyterLab: clicked, driven by keys, a word followed by click and by typing; and saved."""

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Locator, expect

from minillama import load
from minillama.visualize import logit_lens
from minillama.visualize.view import read
from tests.browser.test_attention_view import ACTIVE_CELL, View, running

TEXT = "Once upon a time, there was a girl named Lily. She had a red kite. Lily lost her"
CODE = f"""from minillama import load
from minillama.visualize import lens
lens(*load("toy"), {TEXT!r})"""
GROUND = "cell => getComputedStyle(cell).backgroundColor"
COUNT = 25  # tokens


@pytest.fixture(scope="module")
def run(lab: str, browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[View]:
    with running(browser, lab, tmp_path_factory.mktemp("lens"), CODE, "minillama-lens") as view:
        yield view


def cells(run: View) -> Locator:
    return run.root.get_by_role("radiogroup", name="The likeliest next word").get_by_role("radio")


def colours(run: View) -> list[str]:
    return cells(run).evaluate_all(f"all => all.map({GROUND})")


def choose(run: View, label: str) -> None:
    run.root.get_by_role("radio", name=label, exact=False).first.check()


def numbers(table: Locator) -> list[float]:
    return [float(text.removesuffix(" %")) / 100 for text in table.locator(".share").all_inner_texts()]


def test_every_layer_and_token_has_its_word_and_the_end_is_chosen(run: View) -> None:
    model, tokenizer = load("toy")
    tokens, spell = read(tokenizer, TEXT)
    best = logit_lens(model, tokens).argmax(-1).flatten().tolist()
    expect(cells(run)).to_have_count(5 * COUNT)
    assert cells(run).all_text_contents() == [spell(i) for i in best]
    expect(cells(run).last).to_be_checked()
    expect(run.root.get_by_role("heading", name="After layer 3, behind “▁her”")).to_be_visible()
    expect(run.page.locator(".jp-RenderedImage, .jp-OutputArea table").first).to_be_hidden()


def test_a_place_shows_its_likeliest_words_by_click_and_by_keys(run: View) -> None:
    model, tokenizer = load("toy")
    tokens, spell = read(tokenizer, TEXT)
    shares, top = logit_lens(model, tokens).exp().topk(8)
    table = run.root.get_by_role("table").first
    cells(run).nth(3 * COUNT + 20).click()
    for row, column, key in ((3, 20, None), (4, 20, "ArrowDown"), (4, 19, "ArrowLeft"), (0, 0, "Home")):
        if key:
            run.page.keyboard.press(key)
        expect(cells(run).nth(row * COUNT + column)).to_be_checked()
        assert [words.strip() for words in table.locator("tbody th").all_text_contents()] == [
            spell(i) for i in top[row, column].tolist()
        ]
        assert numbers(table) == pytest.approx(shares[row, column].tolist(), abs=0.00051)
    expect(cells(run).first).to_be_focused()
    assert run.page.evaluate(ACTIVE_CELL) == 0, "JupyterLab did not take the key for its own"


def test_a_word_is_followed_by_a_click_on_it(run: View) -> None:
    model, tokenizer = load("toy")
    tokens, spell = read(tokenizer, TEXT)
    lens = logit_lens(model, tokens).exp()
    cells(run).nth(4 * COUNT + 18).click()
    before = colours(run)
    word = int(lens[4, 18].topk(2).indices[1])
    button = run.root.get_by_role("button", name=spell(word), exact=True)
    button.click()
    expect(button).to_have_attribute("aria-pressed", "true")
    expect(button).to_be_focused()
    assert colours(run) != before
    expect(run.root.get_by_role("heading", name=f"“{spell(word)}” behind")).to_be_visible()
    assert numbers(run.root.get_by_role("table").last) == pytest.approx(lens[:, 18, word].tolist(), abs=0.005)


def test_a_word_is_followed_by_typing_it(run: View) -> None:
    box = run.root.get_by_role("combobox", name="The word to follow")
    box.fill("kite")
    box.press("Enter")
    expect(run.root.get_by_role("status")).to_contain_text("by the probability of “▁kite”")
    expect(box).to_have_value("▁kite")
    kite = colours(run)
    box.fill("xyzzy")
    box.press("Enter")
    expect(run.root.get_by_role("status")).to_contain_text("“xyzzy” is none of the")
    assert colours(run) == kite
    box.fill("red")
    box.press("Enter")
    assert colours(run) != kite


def test_the_colour_shows_what_was_chosen(run: View) -> None:
    seen = set()
    for label in ("the likeliest word", "the text’s own next word", "entropy"):
        choose(run, label)
        seen.add(tuple(colours(run)))
    assert len(seen) == 3
    expect(run.root.get_by_role("heading", name="Entropy behind")).to_be_visible()
    choose(run, "the text’s own next word")
    assert cells(run).last.evaluate(GROUND) == "rgba(0, 0, 0, 0)", "how the text goes on from its end nobody knows"
    run.page.keyboard.press("ArrowUp")
    expect(run.root.get_by_role("radio", name="the likeliest word", exact=False).first).to_be_checked()


@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("theme", ["JupyterLab Light", "JupyterLab Dark"])
def test_nothing_is_cut_off_in_any_width_or_theme(run: View, theme: str, width: int) -> None:
    run.shown(theme, width)


def test_saved_it_reads_well_where_nothing_runs(run: View, lab: str) -> None:
    cell = run.saved(lab)
    assert cell.outputs[0].metadata["image/png"]["alt"].startswith("The next word over ")
    table = run.page.locator(".jp-RenderedHTMLCommon table").first
    expect(table).to_contain_text("after layer 3")
    assert table.locator("td").last.evaluate(GROUND) != "rgba(0, 0, 0, 0)"
    expect(run.page.get_by_text("Behind the last token, “▁her”")).to_be_visible()


def test_nothing_is_asked_of_another_machine_and_no_error_is_logged(run: View) -> None:
    run.asked_only_here()
