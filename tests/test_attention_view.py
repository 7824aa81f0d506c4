"""The attention view: its numbers are the model's, its page is whole and inert, what is saved stays small."""

import io
import json
import zlib
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch
from PIL import Image

from minillama.config import ModelConfig
from minillama.model import Llama
from minillama.visualize import ablate, attention, attention_probabilities
from minillama.visualize.anatomy import logits_of
from minillama.visualize.attention_page import attention_picture, attention_table
from minillama.visualize.attention_view import MAX_BYTES, AttentionView, attention_view, silence
from tests.benchmarks.decode import with_transformers

TOKENS = [3, 1, 4, 1, 5, 9, 2, 6]
SHAPE = dict(dim=12, n_layers=3, n_heads=6, n_kv_heads=2, head_dim=4, ffn_dim=10, vocab_size=17, max_seq_len=250)
HOSTILE = ['<script>alert("x")</script>', "</table>", "$\\frac$", "&amp;", "'\"><img src=x onerror=x>", "\\", "猫", "a"]
SAVED_BYTES = 300_000


@pytest.fixture
def model() -> Llama:
    torch.manual_seed(5)
    model = Llama(ModelConfig(**SHAPE))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model


def test_maps_are_the_recorders_in_whole_percent(model):
    view = attention_view(model, None, TOKENS)
    shares = attention_probabilities(model, torch.tensor(TOKENS))
    assert view.percent.dtype == torch.uint8 and view.layers == [0, 1, 2]
    assert (view.percent / 100 - shares).abs().max() <= 0.00501
    layer, head = view.head
    assert torch.equal(view.chosen, view.percent[layer, head])
    assert shares[:, :, -1, 1:-2].max() == shares[layer, head, -1, 1:-2].max()
    assert view.pieces == [str(i) for i in TOKENS]


def test_the_page_gets_the_maps_by_layer_head_what_is_looked_at_and_what_looks(model):
    view = attention_view(model, None, TOKENS)
    maps = torch.frombuffer(bytearray(zlib.decompress(view.packed())), dtype=torch.uint8).view(3, 6, 8, 8)
    assert torch.equal(maps.transpose(2, 3), view.percent)


@pytest.mark.parametrize("heads", [[(0, 5)], [(2, 0), (1, 3)]])
def test_silencing_is_ablation(model, heads):
    tokens = torch.tensor([TOKENS])
    view = attention_view(model, None, TOKENS, silenced=heads)
    before = logits_of(model, tokens)[0, -1].softmax(-1)
    with ablate(model, heads=heads):
        after = logits_of(model, tokens)[0, -1].softmax(-1)
    assert torch.equal(view.before, before) and torch.equal(view.after, after) and not torch.equal(before, after)
    assert view.silenced == sorted(heads)
    words = {piece: (old, new) for piece, old, new in view.words()}
    assert len(words) == 8 and words[str(int(before.argmax()))] == (before.max(), after[before.argmax()])
    assert str(int(after.argmax())) in words
    assert [old for old, _ in words.values()] == sorted((old for old, _ in words.values()), reverse=True)
    assert silence(model, view, []).after is view.before


def test_links_are_the_strongest_but_those_to_oneself_and_the_first(model):
    view = attention_view(model, None, TOKENS, head=(1, 4))
    shares = {(a, b): int(view.chosen[a, b]) for a in range(8) for b in range(1, a)}
    found = view.links(5)
    assert [share for *_, share in found] == sorted(shares.values(), reverse=True)[:5]
    assert all(shares[a, b] == share for a, b, share in found)


def test_our_model_and_transformers_show_the_same(model):
    models = (model, with_transformers(model))
    ours, other = (attention_view(m, None, torch.tensor(TOKENS), silenced=[(1, 2)]) for m in models)
    assert (ours.percent.int() - other.percent.int()).abs().max() <= 1
    assert torch.allclose(ours.after, other.after, atol=1e-5) and ours.layers == other.layers


def test_a_text_is_read_as_the_model_expects_it():
    from minillama import load

    model, tokenizer = load("toy")
    view = attention_view(model, tokenizer, "Lily lost her red")
    assert view.pieces[:2] == ["<s>", "▁Lily"] and view.words()[0][0].startswith("▁")
    shown = attention(model, tokenizer, "Lily lost her red", head=(1, 2))
    assert shown.view.head == (1, 2)
    assert repr(shown).startswith("Attention over ") and "Layer 1, head 2 gives" in repr(shown)


def test_transformers_tokenizer_is_taken_too(model):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"a": 0, "red": 1, "kite": 2, "?": 3}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    view = attention_view(with_transformers(model), PreTrainedTokenizerFast(tokenizer_object=words), "a red kite")
    assert view.tokens.tolist() == [0, 1, 2] and view.pieces == ["a", "red", "kite"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(text="a"), "no tokenizer"),
        (dict(text=[]), "0 tokens, expected 1 to 200"),
        (dict(text=[1] * 201), "201 tokens, expected 1 to 200"),
        (dict(text=[[1, 2]]), r"the shape \(1, 2\)"),
        (dict(text=[1, 2], head=(3, 0)), r"layer and head \(3, 0\)"),
        (dict(text=[1, 2], head=(0, -1)), r"layer and head \(0, -1\)"),
        (dict(text=[1, 2], head=(0, 0), layers=[1]), r"expected a layer of \[1\]"),
        (dict(text=[1, 2], layers=[3]), r"layers are \[3\], expected some of 0 to 2"),
        (dict(text=[1, 2], layers=[]), r"layers are \[\]"),
        (dict(text=[1, 2], silenced=[(0, 6)]), r"no layer and head \(0, 6\)"),
    ],
)
def test_what_cannot_be_shown_is_refused(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        attention_view(model, None, **arguments)


@pytest.mark.parametrize("length", [1, 2, 3])
def test_the_shortest_texts_are_shown(model, length):
    view = attention_view(model, None, TOKENS[:length])
    assert attention_picture(view).data and "next words" in attention_table(view)


class Page(HTMLParser):
    """Tags that are open, and everything that was met."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.words: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.open.append(tag)
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attributes}

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def hostile(view: AttentionView) -> AttentionView:
    return replace(view, pieces=HOSTILE, spell=lambda i: HOSTILE[i % len(HOSTILE)])


def test_the_table_is_whole_inert_and_escaped(model):
    page = Page(attention_table(hostile(attention_view(model, None, TOKENS, silenced=[(0, 1)]))))
    assert page.open == []
    assert page.tags <= {"div", "p", "b", "table", "thead", "tbody", "tr", "th", "td"}
    assert page.attributes <= {"style", "scope"}
    assert set(page.words) >= set(HOSTILE[:4]), "words come out as they went in"
    assert "without layer 0 head 1" in page.words


def test_the_picture_takes_any_word_as_text_and_says_what_it_shows(model, recwarn):
    view = hostile(attention_view(model, None, TOKENS, head=(1, 3)))
    first, second = attention_picture(view), attention_picture(view)
    assert first.data == second.data and not recwarn.list
    assert min(Image.open(io.BytesIO(first.data)).size) > 200
    assert "All 3 layers with 6 heads each. Layer 1, head 3 gives" in first.alt


@pytest.mark.parametrize("sharpness", [0.1, 4.0])
def test_what_is_saved_stays_small_for_the_real_models_shape(sharpness):
    torch.manual_seed(0)
    config = dict(SHAPE, n_layers=30, n_heads=9, n_kv_heads=3)
    model = Llama(ModelConfig(**config))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=sharpness)
    text = torch.randint(17, (60,))
    view = attention_view(model, None, text, head=(20, 1))
    assert 20 in view.layers and len(view.packed()) <= MAX_BYTES * 1.01
    assert len(view.layers) >= 10
    saved = 4 / 3 * len(attention_picture(view).data) + len(attention_table(view))
    assert saved < SAVED_BYTES
    if len(view.layers) < 30:
        assert "for others say layers=[…]" in attention_table(view)
        step = view.layers[1] - view.layers[0]
        assert view.layers == list(range(20 % step, 30, step)) and step > 1


def test_the_live_view_asks_this_kernel_when_a_head_is_silenced(model):
    pytest.importorskip("anywidget")
    shown = attention(model, None, TOKENS, head=(1, 4))
    widget = shown.widget()
    assert widget.page["head"] == (1, 4) and widget.words["silenced"] == [] and widget.maps == shown.view.packed()
    widget.silenced = [[1, 4], [0, 2]]
    after = attention_view(model, None, TOKENS, silenced=[(1, 4), (0, 2)])
    assert widget.words == {"silenced": [[0, 2], [1, 4]], "rows": [list(row) for row in after.words()]}
    json.dumps(widget.words)
    widget.silenced = []
    assert all(row[1] == row[2] for row in widget.words["rows"])


def test_the_live_view_asks_for_nothing_from_elsewhere_and_makes_no_html_of_words():
    from minillama.visualize.attention_widget import _kind

    code = _kind()._esm + _kind()._css
    assert not any(word in code for word in ("import ", "import(", "fetch(", "@import", "url(", "innerHTML", "eval("))
    assert "http" not in code.replace("http://www.w3.org/2000/svg", "")
    assert len(code) < 30_000
