"""What a learner wrote, put into a model: the right function changes nothing, a wrong one is heard."""

import pytest
import torch
import torch.nn.functional as F

from minillama import generate, load
from minillama.attention import causal_mask
from minillama.course import swap_in
from minillama.course.swap import PARTS
from minillama.rope import rotate


def attention(q, k, v):
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~causal_mask(q.shape[2], k.shape[2]), -torch.inf)
    return scores.softmax(-1) @ v


def silu_gate(gate, up):
    return F.silu(gate) * up


RIGHT = {
    "lookup": lambda tokens, table: F.one_hot(tokens, len(table)).float() @ table,
    "logits": lambda x, table: x @ table.mT,
    "frequencies": lambda head_dim, theta: theta ** (-torch.arange(0, head_dim, 2) / head_dim),
    "rotate": lambda x, angles: rotate(x, (angles.cos()[:, None], angles.sin()[:, None])),
    "split_heads": lambda x, n_heads: x.unflatten(-1, (n_heads, -1)).transpose(1, 2),
    "repeat_kv": lambda x, n_heads: x.repeat_interleave(n_heads // x.shape[1], dim=1),
    "scores": lambda q, k: q @ k.mT / q.shape[-1] ** 0.5,
    "mask": lambda new, total: torch.ones(new, total, dtype=torch.bool).tril(total - new),
    "softmax": lambda scores: scores.softmax(-1),
    "weighted_sum": lambda probabilities, v: probabilities @ v,
    "attention": attention,
    "silu": lambda x: x * torch.sigmoid(x),
    "feedforward": lambda x, gate_up, down: silu_gate(*(x @ gate_up.mT).chunk(2, -1)) @ down.mT,
    "norm": lambda x, weight, eps: x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight,
}


@pytest.fixture(scope="module")
def toy():
    return load("toy")


@pytest.fixture(scope="module")
def tokens(toy):
    return torch.randint(toy[0].config.vocab_size, (2, 23), generator=torch.Generator().manual_seed(0))


def test_every_part_has_a_signature_and_a_test():
    assert RIGHT.keys() == PARTS.keys()


@pytest.mark.parametrize("part", PARTS)
def test_the_right_function_leaves_the_model_as_it_was(part, toy, tokens):
    calls = []
    swapped = swap_in(toy[0], **{part: lambda *given: calls.append(part) or RIGHT[part](*given)})
    with torch.inference_mode():
        torch.testing.assert_close(swapped(tokens), toy[0](tokens), rtol=0, atol=2e-4)
    assert calls


def test_all_parts_together_tell_the_same_story(toy):
    model, tokenizer = toy
    ours = generate(model, tokenizer, "", temperature=0, max_new_tokens=40)
    assert generate(swap_in(model, **RIGHT), tokenizer, "", temperature=0, max_new_tokens=40) == ours


@pytest.mark.parametrize("part", sorted(PARTS.keys() - {"frequencies", "mask"}))
def test_a_wrong_function_is_heard_and_the_model_itself_is_left_alone(part, toy, tokens):
    before = toy[0](tokens)
    swapped = swap_in(toy[0], **{part: lambda *given: RIGHT[part](*given) * 0.5})
    assert (swapped(tokens) - before).abs().max() > 0.1
    assert torch.equal(toy[0](tokens), before)


def test_a_part_that_is_not_there_is_refused_by_name(toy):
    with pytest.raises(ValueError, match="no part 'nrom', expected one of lookup, logits"):
        swap_in(toy[0], nrom=RIGHT["norm"])


def test_a_quantized_model_takes_no_parts():
    with pytest.raises(ValueError, match="weights are quantized"):
        swap_in(load("toy", dtype="int8")[0], norm=RIGHT["norm"])
