"""Looking inside: the recorder tells the truth and leaves the model as it was; the figure has the right cells."""

import io

import pytest
import torch
from PIL import Image

from minillama.config import ModelConfig
from minillama.model import Llama
from minillama.visualize import attention_figure, attention_probabilities, strongest_head


@pytest.fixture
def model() -> Llama:
    torch.manual_seed(3)
    model = Llama(
        ModelConfig(dim=12, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=6, ffn_dim=10, vocab_size=17, max_seq_len=30)
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model


def test_recorded_rows_are_distributions_over_the_past(model):
    maps = attention_probabilities(model, torch.tensor([3, 1, 4, 1, 5]))
    assert maps.shape == (3, 4, 5, 5)
    assert torch.allclose(maps.sum(-1), torch.ones(3, 4, 5), atol=1e-6)
    assert not maps.triu(1).any()


def test_recorded_numbers_are_those_of_the_first_layer_worked_out_by_hand(model):
    from minillama.rope import rotate, rotation

    tokens = torch.tensor([3, 1, 4, 1, 5])
    layer = model.blocks[0]
    x = layer.attention_norm(model.embedding(tokens[None]))
    turn = rotation(model.frequency, torch.arange(5))
    q = rotate(layer.attention.wq(x).view(1, 5, 4, 6), turn)[0]
    k = rotate(layer.attention.wk(x).view(1, 5, 2, 6), turn)[0]
    maps = attention_probabilities(model, tokens)
    for head in range(4):
        scores = q[4, head] @ k[:, head // 2].T / 6**0.5  # the last token sees all
        assert torch.allclose(maps[0, head, 4], scores.softmax(-1), atol=1e-6)


def test_the_model_is_left_as_it_was_even_when_it_fails(model):
    tokens = torch.tensor([[3, 1, 4, 1, 5]])
    before = model(tokens)
    attention_probabilities(model, tokens[0])
    with pytest.raises(IndexError):
        attention_probabilities(model, torch.tensor([99]))
    assert torch.equal(model(tokens), before)
    assert all(block.attention.fast and not block.attention.tap._forward_hooks for block in model.blocks)


def test_a_batch_is_refused(model):
    with pytest.raises(ValueError, match=r"\(1, 5\), expected \(time,\)"):
        attention_probabilities(model, torch.zeros(1, 5, dtype=torch.long))


def test_the_strongest_head_is_the_one_with_the_largest_share():
    maps = torch.zeros(3, 4, 5, 5)
    maps[2, 1, 4, 3] = 0.9
    maps[1, 3, 3, 4] = 1.0  # the other way round does not count
    assert strongest_head(maps, looking=-1, seen=3) == (2, 1)


def test_the_figure_is_a_picture_with_its_content_in_words_and_the_same_each_time():
    maps = torch.eye(4)
    first, second = (attention_figure(maps, list("abcd"), title="t", alt="a diagonal") for _ in range(2))
    assert first.data == second.data and first.alt == "a diagonal"
    picture = Image.open(io.BytesIO(first.data))
    assert picture.format == "PNG" and min(picture.size) > 100
    assert picture.getpixel((1, 1))[:3] == (255, 255, 255)


def test_a_figure_with_other_tokens_than_its_map_is_refused():
    with pytest.raises(ValueError, match=r"\(4, 4\), expected \(3, 3\)"):
        attention_figure(torch.eye(4), list("abc"), title="", alt="")
