"""The feed-forward layer against its formula, written out in NumPy."""

import numpy as np
import torch
from torch.autograd import gradcheck

from minillama.config import ModelConfig
from minillama.feedforward import FeedForward

CONFIG = ModelConfig(dim=6, n_layers=1, n_heads=3, ffn_dim=10, vocab_size=5, max_seq_len=8)


def layer(dtype: torch.dtype = torch.float32) -> FeedForward:
    torch.manual_seed(0)
    feedforward = FeedForward(CONFIG).to(dtype)
    for weight in feedforward.parameters():
        torch.nn.init.normal_(weight, std=0.7)
    return feedforward


def by_formula(feedforward: FeedForward, x: torch.Tensor) -> torch.Tensor:
    weights = {name: weight.detach().double().numpy() for name, weight in feedforward.named_parameters()}
    gate = x.double().numpy() @ weights["gate.weight"].T
    up = x.double().numpy() @ weights["up.weight"].T
    return torch.from_numpy((gate / (1 + np.exp(-gate)) * up) @ weights["down.weight"].T)


def test_it_is_the_formula_for_any_leading_dimensions():
    feedforward = layer()
    for shape in [(6,), (1, 6), (4, 6), (2, 3, 6), (0, 6)]:
        x = torch.randn(shape) * 2
        torch.testing.assert_close(feedforward(x).double(), by_formula(feedforward, x), rtol=1e-5, atol=2e-6)


def test_gate_and_up_are_not_each_other():
    feedforward, x = layer(), torch.randn(4, 6)
    y = feedforward(x)
    feedforward.gate, feedforward.up = feedforward.up, feedforward.gate
    assert not torch.allclose(feedforward(x), y, atol=0.1)


def test_it_has_three_matrices_and_nothing_else():
    shapes = {name: tuple(weight.shape) for name, weight in layer().named_parameters()}
    assert shapes == {"gate.weight": (10, 6), "up.weight": (10, 6), "down.weight": (6, 10)}


def test_each_token_is_by_itself():
    feedforward, x = layer(), torch.randn(1, 5, 6)
    changed = x.clone()
    changed[:, 2] += 1
    same = (feedforward(changed) == feedforward(x)).all(-1)[0]
    assert same.tolist() == [True, True, False, True, True]


def test_gradients():
    feedforward = layer(torch.float64)
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in feedforward.named_parameters()]
    weights = [weight.detach().requires_grad_() for weight in feedforward.parameters()]

    def run(x, *weights):
        return torch.func.functional_call(feedforward, dict(zip(names, weights, strict=True)), (x,))

    assert gradcheck(run, (x, *weights))


def test_it_keeps_the_dtype():
    for dtype in (torch.bfloat16, torch.float16):
        feedforward, x = layer(dtype), torch.randn(4, 6).to(dtype)
        assert feedforward(x).dtype == dtype
        torch.testing.assert_close(feedforward(x).double(), by_formula(feedforward, x), rtol=0.05, atol=0.05)
