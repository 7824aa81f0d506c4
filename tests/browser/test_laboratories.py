"""The laboratories in a browser: their numbers are the package's, every control moves what is shown, nothing is asked
of anybody; and in JupyterLab their keys are their own."""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from playwright.sync_api import Browser, Locator, Page, expect

from minillama.generation import Sampling
from minillama.visualize import rotary_laboratory, sampling_laboratory, softmax_laboratory
from minillama.visualize.laboratory import hands, narrow, soften
from minillama.visualize.view import sources
from tests.browser.test_attention_view import ACTIVE_CELL, running

PAGE = '<!doctype html><html lang="en"><meta name="color-scheme" content="light dark"><title>x</title><style>{}</style>'
IMPORT = "window.load ??= script => import(URL.createObjectURL(new Blob([script], {type: 'text/javascript'})))"
RENDER = f"""async ([script, state]) => {{
    const {{default: view}} = await ({IMPORT})(script);
    document.body.replaceChildren();
    view.render({{model: {{get: name => state[name]}}, el: document.body}});
}}"""
COMPUTE = f"""async ([script, name, cases]) => {{
    const {{default: view}} = await ({IMPORT})(script);
    return cases.map(given => view[name](given));
}}"""
SCRIPT, STYLE = sources("laboratory")
WORDS = [f"▁word{i}" for i in range(41)]


def scores(seed: int, spread: float = 3.0) -> torch.Tensor:
    return spread * torch.randn(len(WORDS), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


LABORATORIES: dict[str, Callable[[], Any]] = {
    "rotary": lambda: rotary_laboratory(),
    "softmax": lambda: softmax_laboratory(WORDS, {"one": scores(0, 20), "two": scores(1, 20)}, head_dim=16),
    "sampling": lambda: sampling_laboratory(
        WORDS,
        {"here": scores(2), "there": scores(3)},
        right={"here": [1, 5]},
        start=Sampling(temperature=1.3, top_k=30),
    ),
}


@pytest.fixture(scope="module")
def page(browser: Browser) -> Iterator[Page]:
    page = browser.new_page(viewport={"width": 960, "height": 900})
    page.complaints = []  # type: ignore[attr-defined]
    page.on("pageerror", lambda error: page.complaints.append(str(error)))  # type: ignore[attr-defined]
    page.on("request", lambda request: page.complaints.append(request.url) if request.url[:5] != "blob:" else None)  # type: ignore[attr-defined]
    page.set_content(PAGE.format(STYLE))
    yield page
    page.close()


@pytest.fixture
def compute(page: Page) -> Callable[..., list[Any]]:
    """What a function of the page's module makes of each of some settings."""
    return lambda name, cases: page.evaluate(COMPUTE, [SCRIPT, name, cases])


@pytest.fixture
def opened(page: Page) -> Callable[[str], Locator]:
    """A laboratory, newly drawn into the page."""

    def draw(kind: str) -> Locator:
        widget = LABORATORIES[kind]()
        page.evaluate(RENDER, [SCRIPT, {"kind": widget.kind, "given": widget.given}])
        return page.locator(".minillama-laboratory")

    return draw


def test_the_hands_are_those_of_rope(compute: Any) -> None:
    cases = [
        {"query": query, "key": key, "headDim": head_dim, "theta": theta}
        for query, key in ((0, 0), (26, 6), (3, 99), (1100, 1093))
        for head_dim, theta in ((2, 10_000.0), (10, 100.0), (16, 500_000.0), (128, 10_000.0))
    ]
    for case, found in zip(cases, compute("rotary", cases), strict=True):
        expected = hands(case["query"], case["key"], head_dim=case["headDim"], theta=case["theta"])
        assert len(found) == case["headDim"] // 2
        parts, wavelengths = (torch.tensor([float(pair[name]) for pair in found]) for name in ("part", "wavelength"))
        # Angles are in fp32 in the package, and grow with the position.
        torch.testing.assert_close(parts, expected.parts, rtol=0, atol=1e-6 * (10 + max(case["query"], case["key"])))
        torch.testing.assert_close(wavelengths, expected.wavelengths, rtol=1e-5, atol=0)
        for i, pair in enumerate(found):
            frequency = case["theta"] ** (-2 * i / case["headDim"])
            assert pair["query"] == pytest.approx(case["query"] * frequency, rel=1e-12)
            assert pair["key"] == pytest.approx(case["key"] * frequency, rel=1e-12)
            assert pair["part"] == pytest.approx(math.cos((case["query"] - case["key"]) * frequency), abs=1e-11)


def test_shares_and_entropy_are_those_of_softmax(compute: Any) -> None:
    rows = [scores(4, 30), scores(5, 0.1), torch.tensor([7.0]), torch.tensor([1.0, 1.0, -900.0], dtype=torch.float64)]
    cases = [
        {"scores": row.tolist(), "headDim": head_dim, "temperature": temperature}
        for row in rows
        for head_dim in (1, 16, 32)
        for temperature in (0.1, 1, 1.7, 5)
    ]
    for case, found in zip(cases, compute("softmax", cases), strict=True):
        row = torch.tensor(case["scores"], dtype=torch.float64)
        shares, entropy = soften(row, temperature=case["temperature"], head_dim=case["headDim"])
        torch.testing.assert_close(torch.tensor(found["shares"], dtype=torch.float64), shares, rtol=0, atol=1e-12)
        assert found["entropy"] == pytest.approx(entropy, abs=1e-11)


def test_the_filters_are_the_packages_in_its_order(compute: Any) -> None:
    rows = [scores(6), scores(7, 0.2), scores(8, 12), scores(9).round(), torch.zeros(4), torch.tensor([0.5])]
    settings = [
        Sampling(temperature=temperature, top_k=k, top_p=p, min_p=m)
        for temperature in (0.1, 0.7, 1.0, 2.0, 3.0)
        for k in (1, 3, 20, None)
        for p in (0.05, 0.5, 0.9, 1.0)
        for m in (0.0, 0.02, 0.3, 1.0)
    ]
    pairs = [(row.double(), sampling) for row in rows for sampling in settings]
    cases = [
        {"scores": row.tolist(), "temperature": s.temperature, "topK": s.top_k or len(row), "topP": s.top_p,
         "minP": s.min_p}
        for row, s in pairs
    ]  # fmt: skip
    for (row, sampling), found in zip(pairs, compute("sampling", cases), strict=True):
        expected = narrow(row, sampling)
        said, left = (torch.tensor(found[name], dtype=torch.float64) for name in ("said", "left"))
        torch.testing.assert_close(said, expected.said, rtol=0, atol=1e-12)
        torch.testing.assert_close(left, expected.left, rtol=0, atol=1e-12, msg=lambda text, s=sampling: f"{s} {text}")
        assert found["mass"] == pytest.approx(float(expected.said[expected.left > 0].sum()), abs=1e-12)
        stages = [{"top_k": sampling.top_k}, {"top_p": sampling.top_p}, {"min_p": sampling.min_p}]
        for i, count in enumerate(found["kept"]):
            so_far = {name: value for stage in stages[: i + 1] for name, value in stage.items()}
            kept = narrow(row, Sampling(temperature=sampling.temperature, **so_far)).left > 0
            assert count == int(kept.sum()), (sampling, i)


def test_draws_follow_the_probabilities_and_the_seed(compute: Any) -> None:
    probabilities = [0.0, 0.5, 0.0, 0.3, 0.2, 0.0]
    case = {"probabilities": probabilities, "seed": 3, "count": 20_000}
    first, again, other, sure = compute("draw", [case, case, {**case, "seed": 4}, {**case, "probabilities": [0, 1]}])
    assert first == again != other and set(sure) == {1}
    counts = Counter(first)
    for i, p in enumerate(probabilities):
        assert abs(counts[i] / 20_000 - p) <= 4 * math.sqrt(p * (1 - p) / 20_000), f"{i} drawn {counts[i]} times"


@pytest.mark.parametrize("kind", LABORATORIES)
def test_every_control_changes_what_is_shown_and_said(kind: str, opened: Callable[[str], Locator]) -> None:
    root = opened(kind)
    sliders, lists = root.get_by_role("slider"), root.get_by_role("combobox")
    assert sliders.count() + lists.count() >= 2
    for slider in sliders.all():
        shown, said = root.inner_html(), slider.get_attribute("aria-valuetext")
        slider.press("ArrowLeft" if slider.input_value() == slider.get_attribute("max") else "ArrowRight")
        assert root.inner_html() != shown and slider.get_attribute("aria-valuetext") != said
        assert slider.evaluate("input => input.labels[0].textContent").endswith(slider.get_attribute("aria-valuetext"))
    for choice in lists.all():
        status = root.get_by_role("status").inner_text()
        choice.select_option(index=1)
        expect(root.get_by_role("status")).not_to_have_text(status)


def test_moving_both_leaves_the_score(opened: Callable[[str], Locator]) -> None:
    root = opened("rotary")
    table, clock = root.locator("table"), root.locator(".large")
    expect(root.get_by_role("status")).to_contain_text("Query at 26, key at 6: distance 20. Pair 2 turns by 114.6°")
    numbers, drawn = table.inner_text(), clock.inner_html()
    root.get_by_label("move both by").press("End")
    expect(root.get_by_role("status")).to_contain_text("Query at 1,026, key at 1,006: distance 20. Pair 2")
    assert table.inner_text() == numbers and clock.inner_html() != drawn
    root.get_by_label("key's position").press("Home")
    expect(root.get_by_role("status")).to_contain_text("distance 26")
    assert table.inner_text() != numbers


def test_a_pair_is_chosen_by_a_click_and_by_keys(opened: Callable[[str], Locator]) -> None:
    root = opened("rotary")
    clocks = root.get_by_role("radiogroup", name="Pair").get_by_role("radio")
    expect(clocks).to_have_count(8)
    clocks.nth(0).click()
    expect(root.get_by_role("heading", name="Pair 0")).to_be_visible()
    clocks.nth(0).press("ArrowRight")
    expect(clocks.nth(1)).to_be_focused()
    expect(clocks.nth(1)).to_be_checked()
    expect(root.get_by_role("status")).to_contain_text("Pair 1 turns by")


def test_without_the_root_of_d_the_shares_sharpen(opened: Callable[[str], Locator]) -> None:
    root = opened("softmax")
    expected = soften(scores(0, 20), temperature=1.0, head_dim=16)
    expect(root.get_by_role("status")).to_contain_text(f"The entropy is {expected[1]:.2f} nats")
    expect(root.locator(".text")).to_have_text(" ".join(f"word{i}" for i in range(41)))
    root.get_by_label("divide by √D = √16 = 4.00").uncheck()
    sharper = soften(scores(0, 20), temperature=1.0)
    expect(root.get_by_role("status")).to_contain_text(f"The entropy is {sharper[1]:.2f} nats")
    expect(root.locator(".share").first).to_have_text(f"{100 * sharper[0].max():.1f} %")


def test_the_same_darts_hit_other_words_when_a_dial_turns(opened: Callable[[str], Locator]) -> None:
    root = opened("sampling")
    drawn = root.locator(".drawn")
    expect(drawn).to_be_empty()
    root.get_by_role("button", name="Draw 20 words").click()
    expect(drawn).to_contain_text("Seed 1 (")
    expect(drawn.locator(".piece")).to_have_count(20)
    first = drawn.inner_text()
    root.get_by_label("top-k").press("Home")
    best = int(scores(2).argmax())
    assert drawn.locator(".piece").all_inner_texts() == [f"{WORDS[best]} {'✓' if best in (1, 5) else '✗'}"] * 20
    expect(root.get_by_role("status")).to_contain_text(
        "Of 41 tokens, top-k keeps 1, top-p of these 1, min-p of these 1"
    )
    root.get_by_role("button", name="Draw 20 words").click()
    expect(drawn).to_contain_text("Seed 2 (")
    assert drawn.inner_text() != first
    root.get_by_label("place").select_option("there")  # of which nothing is known to be right
    assert "✓" not in root.inner_text() and "✗" not in root.inner_text()


@pytest.mark.parametrize("width", [960, 400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("kind", LABORATORIES)
def test_nothing_is_cut_off(
    kind: str, scheme: Any, width: int, opened: Callable[[str], Locator], page: Page, tmp_path: Path
) -> None:
    root = opened(kind)
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 900})
    page.screenshot(path=tmp_path / f"{kind}-{scheme}-{width}.png", full_page=True)
    assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
    assert root.evaluate("root => [...root.querySelectorAll('input, select, button')].every(e => e.clientWidth > 10)")
    page.set_viewport_size({"width": 960, "height": 900})


def test_no_error_is_logged_and_nothing_is_asked_for(page: Page) -> None:
    assert page.complaints == []  # type: ignore[attr-defined]


def test_in_jupyterlab_the_keys_move_a_dial_and_not_the_notebook(lab: str, browser: Browser, tmp_path: Path) -> None:
    code = "from minillama.visualize import rotary_laboratory\nrotary_laboratory()"
    with running(browser, lab, tmp_path, code, "minillama-laboratory") as view:
        status = view.root.get_by_role("status")
        expect(status).to_contain_text("distance 20")
        view.root.get_by_label("query's position").press("ArrowUp")
        expect(status).to_contain_text("distance 21")
        view.root.get_by_role("radio", name="pair 2").press("ArrowLeft")
        expect(status).to_contain_text("Pair 1 turns by")
        assert view.page.evaluate(ACTIVE_CELL) == 0
        view.asked_only_here()
