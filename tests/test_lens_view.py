"""The lens view: its numbers are the model's, its page is whole and inert, what is saved stays small."""

import io
import json
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from minillama import load
from minillama.config import ModelConfig
from minillama.model import Llama
from minillama.visualize import lens, logit_lens, record
from minillama.visualize.anatomy import logits_of
from minillama.visualize.lens_page import lens_picture, lens_table, lens_text
from minillama.visualize.lens_view import FOLLOWED, LensView, lens_view
from minillama.visualize.lens_widget import _page
from minillama.visualize.view import MAX_BYTES
from tests.benchmarks.decode import with_transformers
from tests.test_attention_view import HOSTILE, SAVED_BYTES, SHAPE, TOKENS, Page


def random_model(std: float = 0.5, **sizes: int) -> Llama:
    torch.manual_seed(5)
    model = Llama(ModelConfig(**{**SHAPE, **sizes}))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return model


@pytest.fixture
def model() -> Llama:
    return random_model()


@pytest.fixture
def by_hand(model) -> torch.Tensor:
    """Probabilities (R, T, V): the stream through the last norm and the output head."""
    with record(model, "stream") as seen, torch.inference_mode():
        model(torch.tensor([TOKENS]))
        x = seen.stream[:, 0]
        normed = x * (x.square().mean(-1, keepdim=True) + model.config.norm_eps).rsqrt() * model.norm.weight
        return (normed @ model.output.weight.T).softmax(-1)


def test_every_row_is_the_stream_through_norm_and_output(model, by_hand):
    view = lens_view(model, None, TOKENS)
    assert view.depths == [0, 1, 2, 3] and view.names[:2] == ["embedding", "after layer 0"]
    shares, top = by_hand.topk(8)
    assert torch.equal(view.top, top)
    torch.testing.assert_close(view.shares, shares, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(view.entropy, -(by_hand * by_hand.log()).sum(-1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logit_lens(model, torch.tensor(TOKENS)).exp(), by_hand, rtol=1e-4, atol=1e-6)


def test_the_last_row_is_what_the_model_says(model):
    view = lens_view(model, None, TOKENS, layers=[2])
    said = logits_of(model, torch.tensor([TOKENS]))[0].softmax(-1)
    assert view.depths == [0, 3]
    torch.testing.assert_close(view.shares[-1], said.topk(8).values, rtol=1e-5, atol=1e-6)


def test_a_word_is_followed_through_every_place(model, by_hand):
    view = lens_view(model, None, TOKENS, word=11)
    assert view.words[0] == 11 and view.words.tolist()[1:7] == [1, 4, 5, 9, 2, 6], "then the text's own"
    assert len(view.words) == len(set(view.words.tolist())) == 17
    for word in range(17):
        assert (view.following(word) - by_hand[..., word]).abs().max() < 0.002
    assert (view.roots[0] == (by_hand[..., 11].sqrt() * 255).round()).all()


def test_the_rank_is_that_of_the_word_with_which_the_text_goes_on(model, by_hand):
    view = lens_view(model, None, TOKENS)
    for row in range(4):
        for t in range(7):
            order = by_hand[row, t].argsort(descending=True).tolist()
            assert view.rank[row, t] == order.index(TOKENS[t + 1]) + 1
    assert (view.rank[:, -1] == 0).all()


def test_the_page_gets_the_numbers_in_their_order(model):
    shown = lens(model, None, TOKENS)
    view = shown.view
    content, size = zlib.decompress(view.packed()), 4 * 8
    rank, rest = np.frombuffer(content[: 4 * size], "<u4"), content[4 * size :]
    short = np.frombuffer(rest[: 2 * 17 * size], "<u2").reshape(17, 4, 8)
    roots = np.frombuffer(rest[2 * 17 * size :], np.uint8).reshape(-1, 4, 8)
    assert (rank.reshape(4, 8) == view.rank.numpy()).all() and (roots == view.roots.numpy()).all()
    assert (np.array(view.listed)[short[:8]] == view.top.movedim(-1, 0).numpy()).all()
    assert np.abs(short[8:16] / 1e4 - view.shares.movedim(-1, 0).numpy()).max() <= 0.00005001
    assert np.abs(short[16] / 1e3 - view.entropy.numpy()).max() <= 0.000501


def test_our_model_and_transformers_show_the_same(model):
    ours, other = (lens_view(m, None, torch.tensor(TOKENS)) for m in (model, with_transformers(model)))
    assert torch.equal(ours.top, other.top) and torch.equal(ours.rank, other.rank)
    torch.testing.assert_close(ours.shares, other.shares, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "int8", "int4"])
def test_a_text_is_read_as_the_model_expects_it_in_each_dtype(dtype):
    model, tokenizer = load("toy", dtype=dtype)
    view = lens_view(model, tokenizer, "Lily lost her red kite")
    assert view.pieces[:2] == ["<s>", "▁Lily"] and len(view.depths) == model.config.n_layers + 1
    with torch.inference_mode():
        said = model(view.tokens[None])[0].float().softmax(-1)
    torch.testing.assert_close(view.shares[-1], said.topk(8).values, rtol=0.05, atol=0.01)
    assert repr(lens(model, tokenizer, "Lily lost her red kite")).startswith("The next word over ")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(text="a"), "no tokenizer"),
        (dict(text=[]), "0 tokens, expected 1 to 200"),
        (dict(text=[[1, 2]]), r"the shape \(1, 2\)"),
        (dict(text=[1, 2], layers=[3]), r"layers are \[3\], expected some of 0 to 2"),
        (dict(text=[1, 2], layers=[]), r"layers are \[\]"),
        (dict(text=[1, 2], word=17), "the word to follow is 17, expected a token's id, 0 to 16"),
        (dict(text=[1, 2], word=-1), "the word to follow is -1"),
    ],
)
def test_what_cannot_be_shown_is_refused(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        lens(model, None, **arguments)


@pytest.mark.parametrize("length", [1, 2, 13])
def test_short_texts_and_long_ones_are_shown(model, length):
    view = lens_view(model, None, list(range(length)))
    assert lens_picture(view).data
    assert ("the last 12 tokens" in lens_table(view)) == (length == 13)


def hostile(view: LensView) -> LensView:
    return replace(view, pieces=HOSTILE, spell=lambda i: HOSTILE[i % len(HOSTILE)])


def test_the_table_is_whole_inert_and_escaped(model):
    page = Page(lens_table(hostile(lens_view(model, None, TOKENS, word=4))))
    assert page.open == []
    assert page.tags <= {"div", "p", "b", "table", "caption", "thead", "tbody", "tr", "th", "td"}
    assert page.attributes <= {"style", "scope", "title"}
    assert set(page.words) >= set(HOSTILE[:4]), "words come out as they went in"


def test_the_table_says_the_words_the_numbers_and_what_is_seen(model):
    view = lens_view(model, None, TOKENS)
    page = Page(lens_table(view))
    for row in range(4):
        for t in range(8):
            assert f"{int(view.top[row, t, 0])} {view.shares[row, t, 0]:.0%}" in page.words
    assert {"embedding", "after layer 2", f"{100 * view.shares[-1, -1, 0]:.1f} %"} <= set(page.words)
    assert lens_text(view) in "".join(page.words) and f"is “{view.top[-1, -1, 0]}” with" in lens_text(view)


def test_from_where_on_the_last_answer_leads_is_said(model):
    view = lens_view(model, None, TOKENS)
    top = view.top.clone()
    top[:, -1, 0] = torch.tensor([7, 3, 7, 7])
    assert lens_text(replace(view, top=top)).endswith("it leads from here on: after layer 1.")


def test_the_picture_takes_any_word_as_text_and_says_what_it_shows(model, recwarn):
    view = hostile(lens_view(model, None, TOKENS, word=3))
    first, second = lens_picture(view), lens_picture(view)
    assert first.data == second.data and not recwarn.list
    assert min(Image.open(io.BytesIO(first.data)).size) > 200
    assert "over 8 tokens, read off the stream. All 3 layers." in first.alt


@pytest.mark.parametrize("std", [0.05, 0.5])
def test_what_is_saved_stays_small_for_the_real_models_shape(std):
    model = random_model(std, n_layers=30, vocab_size=5000)
    shown = lens(model, None, torch.randint(5000, (54,)))
    view = shown.view
    assert len(view.words) <= FOLLOWED and len(view.packed()) <= MAX_BYTES and view.depths[-1] == 30
    live = 4 / 3 * len(view.packed()) + len(json.dumps(_page(view)))
    assert live + 4 / 3 * len(lens_picture(view).data) + len(lens_table(view)) < SAVED_BYTES
    if len(view.depths) < 31:
        step = view.depths[1] - view.depths[0]
        assert view.depths == list(range(30 % step, 31, step)) and "for others say layers=[…]" in lens_text(view)


def test_the_live_view_names_all_that_it_shows(model):
    pytest.importorskip("anywidget")
    shown = lens(model, None, TOKENS, word=9)
    page, view = shown.widget().page, shown.view
    assert page["words"][page["word"]] == "9" and page["rows"] == view.names and page["vocabulary"] == 17
    assert [page["words"][i] for i in page["text"]] == [str(i) for i in TOKENS[1:]]
    assert page["followed"] == len(view.words) and page["tops"] == 8 and page["shown"] == "All 3 layers."
    json.dumps(page)


def test_the_live_view_asks_for_nothing_from_elsewhere_and_makes_no_html_of_words():
    pytest.importorskip("anywidget")
    from minillama.visualize.lens_widget import _kind

    code = _kind()._esm + _kind()._css
    assert not any(word in code for word in ("import ", "import(", "fetch(", "@import", "url(", "innerHTML", "eval("))
    assert "http" not in code.replace("http://www.w3.org/2000/svg", "")
    assert len(code) < 30_000
