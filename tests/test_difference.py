"""The first difference: none between equal models, and each planted fault at its own place.

The models are random and asymmetric: 6 heads, 2 key/value heads, head_dim 10 where dim / heads is 8, three layers. Each
fault is looked for from our right model and from transformers', so that both layouts are tried.
"""

import copy
import dataclasses
import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from minillama.attention import causal_mask
from minillama.config import ModelConfig
from minillama.model import Llama
from minillama.quantize import quantize
from minillama.rope import frequencies, halves_to_pairs, pairs_to_halves, rotate
from minillama.visualize import first_difference

CONFIG = ModelConfig(
    dim=48, n_layers=3, n_heads=6, n_kv_heads=2, head_dim=10, ffn_dim=56, vocab_size=37, max_seq_len=64
)
TOKENS = torch.tensor([[3, 14, 15, 9, 26, 5, 35], [8, 9, 7, 9, 32, 3, 8]])


def random_model(config: ModelConfig = CONFIG) -> Llama:
    torch.manual_seed(5)
    model = Llama(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.uniform_(0.5, 1.5) if weight.dim() == 1 else weight.normal_(std=0.2)
    return model


@pytest.fixture(scope="module")
def right() -> Llama:
    return random_model()


@pytest.fixture
def model() -> Llama:
    return random_model()


def in_transformers(model: Llama) -> torch.nn.Module:
    transformers = pytest.importorskip("transformers")
    from tests.parity.test_transformers import names, theirs, to_theirs

    other = transformers.LlamaForCausalLM(theirs(model.config)).eval()
    parameters = dict(other.named_parameters())
    with torch.no_grad():
        for name, weight in model.named_parameters():
            parameters[names(model.config)[name]].copy_(to_theirs(name, weight, model.config))
    return other


@pytest.fixture(scope="module", params=["ours", "transformers"])
def reference(request, right):
    return right if request.param == "ours" else in_transformers(right)


def attend(tile_k=False, tile_v=False, causal=True, scale=True):
    """Attention's readable path, with faults."""

    def patched(layer, q, k, v, mask):
        groups = layer.n_heads // layer.n_kv_heads
        k = k.repeat(1, groups, 1, 1) if tile_k else k.repeat_interleave(groups, 1)
        v = v.repeat(1, groups, 1, 1) if tile_v else v.repeat_interleave(groups, 1)
        scores = q @ k.transpose(-1, -2) * (layer.head_dim**-0.5 if scale else 1)
        if causal:
            scores = scores.masked_fill(~causal_mask(q.shape[2], k.shape[2]), -torch.inf)
        return layer.tap(scores.softmax(-1)) @ v

    return patched


def patch(module, name, forward):
    setattr(module, name, lambda *args: forward(module, *args))


def project(turn_q, turn_k):
    def patched(layer, x, turn):
        q, k, v = (w(x).unflatten(-1, (-1, layer.head_dim)) for w in (layer.wq, layer.wk, layer.wv))
        return turn_q(q, turn), turn_k(k, turn), v

    return patched


def rotate_halves(x, turn):
    cos, sin = turn
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


def rotate_back(x, turn):
    return rotate(x, (turn[0], -turn[1]))


def backwards(x, turn):
    return rotate(x, tuple(part.flip(0) for part in turn))


def exchange(a, b):
    a.data, b.data = b.data, a.data


def eps_everywhere(model):
    for module in model.modules():
        if hasattr(module, "eps"):
            module.eps = 1e-6


def without_residual(block, x, turn, mask, cache=None):
    x = block.attention(block.attention_norm(x), turn, mask, cache)
    return x + block.feedforward(block.feedforward_norm(x))


def without_second_residual(block, x, turn, mask, cache=None):
    x = x + block.attention(block.attention_norm(x), turn, mask, cache)
    return block.feedforward(block.feedforward_norm(x))


def without_norm(block, x, turn, mask, cache=None):
    x = x + block.attention(block.attention_norm(x), turn, mask, cache)
    return x + block.feedforward(x)


# A fault, the place where it is, and the first token (row, position) that shows it.
FAULTS = {
    "one row of the embedding": (lambda m: m.embedding.weight.data[9].add_(0.01), "embedding", (0, 3)),
    "eps 1e-6 for 1e-5": (eps_everywhere, "blocks.0.attention_norm", (0, 0)),
    "eps in a late norm": (
        lambda m: setattr(m.blocks[2].feedforward_norm, "eps", 1e-2), "blocks.2.feedforward_norm", (0, 0)
    ),
    "a layer's norms exchanged": (
        lambda m: exchange(m.blocks[1].attention_norm.weight, m.blocks[1].feedforward_norm.weight),
        "blocks.1.attention_norm", (0, 0),
    ),
    "query rows in the other layout": (
        lambda m: exchange(w := m.blocks[1].attention.wq.weight, torch.nn.Parameter(pairs_to_halves(w.data, 10))),
        "blocks.1.attention.wq", (0, 0),
    ),
    "key rows in the other layout": (
        lambda m: exchange(w := m.blocks[2].attention.wk.weight, torch.nn.Parameter(halves_to_pairs(w.data, 10))),
        "blocks.2.attention.wk", (0, 0),
    ),
    "a single weight": (
        lambda m: m.blocks[2].attention.wv.weight.data[7, 11].add_(1e-3), "blocks.2.attention.wv", (0, 0)
    ),
    "theta": (
        lambda m: setattr(m, "frequency", frequencies(dataclasses.replace(CONFIG, rope_theta=10500))),
        "blocks.0.attention.q", (0, 1),
    ),
    "pairs of halves": (
        lambda m: patch(m.blocks[1].attention, "project", project(rotate_halves, rotate_halves)),
        "blocks.1.attention.q", (0, 1),
    ),
    "keys turned the other way": (
        lambda m: patch(m.blocks[2].attention, "project", project(rotate, rotate_back)), "blocks.2.attention.k", (0, 1)
    ),
    "positions from the end": (
        lambda m: patch(m.blocks[0].attention, "project", project(backwards, backwards)), "blocks.0.attention.q", (0, 0)
    ),
    "key heads tiled": (
        lambda m: patch(m.blocks[1].attention, "attend", attend(tile_k=True)), "blocks.1.attention.tap", (0, 1)
    ),
    "value heads tiled": (
        lambda m: patch(m.blocks[1].attention, "attend", attend(tile_v=True)), "blocks.1.attention.heads", (0, 0)
    ),
    "no mask in one layer": (
        lambda m: patch(m.blocks[2].attention, "attend", attend(causal=False)), "blocks.2.attention.tap", (0, 0)
    ),
    "no scale": (
        lambda m: patch(m.blocks[0].attention, "attend", attend(scale=False)), "blocks.0.attention.tap", (0, 1)
    ),
    "output rows reversed": (
        lambda m: exchange(w := m.blocks[0].attention.wo.weight, torch.nn.Parameter(w.data.flip(0))),
        "blocks.0.attention.wo", (0, 0),
    ),
    "no residual around attention": (
        lambda m: patch(m.blocks[1], "forward", without_residual), "blocks.1.stream", (0, 0)
    ),
    "no norm before the feed-forward": (
        lambda m: patch(m.blocks[1], "forward", without_norm), "blocks.1.feedforward.gate", (0, 0)
    ),
    "gate and up exchanged": (
        lambda m: exchange(m.blocks[1].feedforward.gate.weight, m.blocks[1].feedforward.up.weight),
        "blocks.1.feedforward.gate", (0, 0),
    ),
    "the other one opened": (
        lambda m: patch(m.blocks[2].feedforward, "forward", lambda f, x: f.down(f.gate(x) * F.silu(f.up(x)))),
        "blocks.2.feedforward.neurons", (0, 0),
    ),
    "down read by columns": (
        lambda m: exchange(w := m.blocks[0].feedforward.down.weight, torch.nn.Parameter(w.data.T.reshape(w.shape))),
        "blocks.0.feedforward.down", (0, 0),
    ),
    "no residual around the feed-forward": (
        lambda m: patch(m.blocks[1], "forward", without_second_residual), "blocks.1", (0, 0)
    ),
    "no weight in the last norm": (lambda m: m.norm.weight.data.fill_(1), "norm", (0, 0)),
    "two rows of the output exchanged": (
        lambda m: m.output.weight.data.copy_(m.output.weight.data[[1, 0, *range(2, 37)]]), "output", (0, 0)
    ),
}  # fmt: skip


@pytest.mark.parametrize(("plant", "name", "token"), FAULTS.values(), ids=FAULTS)
def test_a_planted_fault_is_found_where_it_is(reference, model, plant, name, token):
    plant(model)
    found = first_difference(reference, model, TOKENS)
    first = found.first
    assert first.name == name, found
    assert first.token == (*token, TOKENS[token].item())
    assert first.layer == (int(name[7]) if name.startswith("blocks") else None)
    assert first.relative > found.tolerance == 2e-5 and first.size > 0
    # From the faulty model's side it lies in the same place.
    assert first_difference(model, reference, TOKENS).first.name == name


def test_a_wrong_rotation_is_called_one(right, model):
    model.frequency = frequencies(dataclasses.replace(CONFIG, rope_theta=500))
    assert "positions" in first_difference(right, model, TOKENS).first.what


def test_only_what_is_wrong_itself_differs(reference, model):
    model.blocks[0].attention.wv.weight.data[0, 0] += 3
    model.blocks[1].feedforward.up.weight.data[5] *= -1
    model.norm.weight.data[2] += 1e-3
    found = first_difference(reference, model, TOKENS)
    assert [p.name for p in found.places if p.token] == ["blocks.0.attention.wv", "blocks.1.feedforward.up", "norm"]
    assert len(found.places) == 1 + 3 * 16 + 2


@given(st.data())
def test_any_single_weight_is_found(data):
    right, wrong = random_model(), random_model()
    name = data.draw(st.sampled_from([name for name, _ in right.named_parameters()]))
    weight = wrong.get_parameter(name).data
    at = tuple(data.draw(st.integers(0, size - 1)) for size in weight.shape)
    if name == "embedding.weight":
        at = (int(TOKENS[1, 4]), at[1])  # a row that is read
    weight[at] += data.draw(st.sampled_from([-0.1, 0.01, 1.0]))
    found = first_difference(right, wrong, TOKENS)
    assert [place.name for place in found.places if place.token] == [name.removesuffix(".weight")]
    if name == "embedding.weight":
        assert found.first.token == (1, 4, 32)


@pytest.mark.parametrize("plant", ["scaling", "rope"])
def test_a_fault_in_transformers_model_is_found_too(right, plant):
    other = in_transformers(right)
    if plant == "scaling":
        other.model.layers[1].self_attn.scaling = 0.3
        assert first_difference(right, other, TOKENS).first.name == "blocks.1.attention.tap"
        assert first_difference(in_transformers(right), other, TOKENS).first.name == "blocks.1.attention.tap"
    else:
        other.model.rotary_emb.inv_freq *= 1.001
        assert first_difference(right, other, TOKENS).first.name == "blocks.0.attention.q"


@pytest.mark.parametrize("family", ["llama", "llama2", "llama3.1", "llama3.2", "linear", "tinyllama", "smollm2"])
def test_ours_and_transformers_do_not_differ(family):
    pytest.importorskip("transformers")
    from tests.parity.test_transformers import FAMILIES, pair_of_models, tokens_of

    ours, other = pair_of_models(FAMILIES[family])
    for pair in [(ours, other), (other, ours), (other, other)]:
        found = first_difference(*pair, tokens_of(ours.config))
        assert found.first is None, found
        assert len(found.places) == 1 + ours.config.n_layers * 16 + 2


def test_equal_models_give_one_line(right, model):
    found = first_difference(right, model, TOKENS)
    assert found.first is None and all(place.size == 0 for place in found.places)
    assert str(found) == "No difference: 51 places agree, in every bit, tolerated 2.0e-05."


def test_one_token_and_one_row_will_do(reference, model):
    model.blocks[1].attention.wo.weight.data[0, 0] += 1
    assert first_difference(reference, model, TOKENS[:1, :1]).first.name == "blocks.1.attention.wo"


def test_the_tolerance_can_be_set(right, model):
    model.blocks[1].attention.wo.weight.data *= 1.01
    relative = first_difference(right, model, TOKENS).first.relative
    assert relative == pytest.approx(0.01, rel=0.01)
    assert first_difference(right, model, TOKENS, tolerance=0.02).first is None
    assert first_difference(right, model, TOKENS, tolerance=0.005).first.name == "blocks.1.attention.wo"


def test_half_precision_and_quantized_models_have_a_wider_one():
    config = ModelConfig(
        dim=64, n_layers=2, n_heads=6, n_kv_heads=2, head_dim=32, ffn_dim=128, vocab_size=48, max_seq_len=64
    )
    right = random_model(config)
    for kind in ("bf16", "int8"):
        wrong = copy.deepcopy(right).bfloat16() if kind == "bf16" else quantize(copy.deepcopy(right), kind)
        found = first_difference(right, wrong, TOKENS)
        assert found.first is None and found.tolerance == 0.1, found
        assert len(found.places) == 1 + 2 * 16 + 2
    wrong.blocks[1].attention.wqkv.scales[6 * 32 : 8 * 32] *= 2  # the keys' rows of the joined matrix
    wrong.blocks[1].feedforward.gate_up.scales[128:] *= 2  # and those of up
    found = first_difference(right, wrong, TOKENS)
    assert [p.name for p in found.places if p.token] == ["blocks.1.attention.wk", "blocks.1.feedforward.up"]


def test_nan_differs_from_a_number_and_not_from_itself(right, model):
    model.blocks[1].attention.wo.weight.data[3, 3] = torch.nan
    assert first_difference(right, model, TOKENS).first.name == "blocks.1.attention.wo"
    assert first_difference(model, model, TOKENS).first is None


def hooks_in(model):
    return [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]


def test_both_models_are_left_as_they_were_even_after_an_error(right, model):
    other = in_transformers(right)
    other.set_attn_implementation("sdpa")
    before = right(TOKENS), other(TOKENS).logits
    first_difference(right, other, TOKENS)
    with pytest.raises(IndexError):
        first_difference(right, other, TOKENS + 30)
    patch(model.blocks[2], "forward", lambda block, *args: 1 / 0)
    for pair in [(other, model), (model, other)]:
        with pytest.raises(ZeroDivisionError):
            first_difference(*pair, TOKENS)
    assert not any(hooks_in(m) for m in (right, model, other))
    assert all(block.attention.fast for block in (*right.blocks, *model.blocks))
    assert other.config._attn_implementation == "sdpa"
    assert torch.equal(right(TOKENS), before[0]) and torch.equal(other(TOKENS).logits, before[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_layers": 2}, "n_layers, 3 and 2"),
        ({"dim": 40}, "dim, 48 and 40"),
        ({"n_heads": 4}, "n_heads, 6 and 4"),
        ({"n_kv_heads": 3}, "n_kv_heads, 2 and 3"),
        ({"head_dim": 8}, "head_dim, 10 and 8"),
        ({"ffn_dim": 48}, "ffn_dim, 56 and 48"),
        ({"vocab_size": 38}, "vocab_size, 37 and 38"),
    ],
)
def test_models_of_other_sizes_are_refused(reference, change, message):
    with pytest.raises(ValueError, match=message):
        first_difference(reference, Llama(dataclasses.replace(CONFIG, **change)), TOKENS)


def test_what_cannot_be_compared_is_refused(right):
    with pytest.raises(ValueError, match=r"\(7,\), expected \(batch, time\)"):
        first_difference(right, right, TOKENS[0])
    with pytest.raises(ValueError, match=r"\(2, 0\), expected"):
        first_difference(right, right, TOKENS[:, :0])
    with pytest.raises(ValueError, match="is a Linear, expected a Llama"):
        first_difference(right, torch.nn.Linear(3, 3), TOKENS)


def test_the_text_has_a_line_for_each_difference_and_marks_the_first(right, model):
    model.blocks[0].attention.wv.weight.data[0] *= 2
    model.blocks[2].feedforward.down.weight.data[0] *= 2
    found = first_difference(right, model, TOKENS)
    headline, *lines = str(found).splitlines()
    assert headline.startswith("First difference: blocks.0.attention.wv, values, at row 0, position 0 (token 3): ")
    assert [line.split()[:2] for line in lines] == [
        ["=", "embedding"], ["→", "blocks.0.attention.wv"], ["=", "blocks.0.attention.q"],
        ["≠", "blocks.2.feedforward.down"], ["=", "blocks.2"],
    ]  # fmt: skip
    assert "… blocks.0.attention.wk" in lines[0] and "in 4 places" in lines[0]
    assert all(len(line) <= 120 for line in lines)


def test_the_page_needs_no_script_or_style_sheet_and_says_all_in_words(right, model):
    model.blocks[1].attention.wk.weight.data[0] *= 2
    found = first_difference(right, model, TOKENS)
    page = found._repr_html_()
    assert not re.search("<script|<style|<svg|class=|http", page)
    assert page.count("<tr>") == 1 + 1 + 3 + 2  # names, embedding, layers, last norm and logits
    cells = re.findall('<td[^>]*title="([^"]+)"[^>]*style="([^"]+)">([^<]+)</td>', page)
    assert len(cells) == page.count("<td") == len(found.places)
    assert all("background:" in style and ";color:" in style for _, style, _ in cells)
    assert [title.split(",")[0] for title, _, text in cells if text.startswith("→")] == ["blocks.1.attention.wk"]
    assert "First difference: blocks.1.attention.wk" in page
    assert "No difference" in first_difference(right, right, TOKENS)._repr_html_()
