"""Matrix products through oneDNN: the same numbers and gradients as F.linear, and only where they fit."""

import pytest
import torch
import torch.nn.functional as F

from minillama.onednn import onednn


@pytest.fixture(autouse=True)
def needs_onednn():
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this PyTorch has no oneDNN")


def both(x, weight, grad):
    plain = F.linear(x, weight)
    with onednn():
        other = F.linear(x, weight)
    assert "_Linear" in type(other.grad_fn).__name__  # it really went another way
    return (
        (plain, *torch.autograd.grad(plain, (x, weight), grad)),
        (other, *torch.autograd.grad(other, (x, weight), grad)),
    )


@pytest.mark.parametrize("lead", [(7,), (3, 5), (1, 1), (2, 3, 4)])
def test_values_and_gradients_equal_those_of_linear(lead):
    torch.manual_seed(0)
    x = torch.randn(*lead, 24, requires_grad=True)
    weight = torch.randn(13, 24, requires_grad=True)
    for one, other in zip(*both(x, weight, torch.randn(*lead, 13)), strict=True):
        assert one.shape == other.shape and torch.allclose(one, other, rtol=1e-5, atol=1e-5)


def test_inputs_that_are_not_contiguous_are_read_right():
    torch.manual_seed(1)
    x = torch.randn(24, 5, 3).transpose(0, 2)[:, ::2].requires_grad_()
    weight = torch.randn(24, 13).t().requires_grad_()
    grad = torch.randn(13, 3, 3).permute(1, 2, 0)
    for one, other in zip(*both(x, weight, grad), strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-5)


def test_a_gradient_that_nobody_needs_is_not_made():
    x, weight = torch.randn(4, 6), torch.randn(5, 6, requires_grad=True)
    with onednn():
        y = F.linear(x, weight)
    y.sum().backward()
    assert x.grad is None and torch.allclose(weight.grad, x.sum(0).expand(5, 6), atol=1e-5)


@pytest.mark.parametrize(
    "x, weight, bias",
    [
        (torch.randn(4, 6).bfloat16(), torch.randn(5, 6).bfloat16(), None),
        (torch.randn(4, 6).double(), torch.randn(5, 6).double(), None),
        (torch.randn(4, 6), torch.randn(5, 6), torch.randn(5)),
    ],
)
def test_what_does_not_fit_goes_the_usual_way(x, weight, bias):
    with onednn():
        assert torch.equal(F.linear(x, weight, bias), F.linear(x, weight, bias))
        assert F.linear(x, weight, bias).dtype == x.dtype


def test_autocast_keeps_its_own_way():
    weight = torch.randn(5, 6, requires_grad=True)
    with onednn(), torch.autocast("cpu", torch.bfloat16):
        assert F.linear(torch.randn(4, 6), weight).dtype == torch.bfloat16


def test_shapes_that_do_not_match_fail_as_ever():
    with onednn(), pytest.raises(RuntimeError):
        F.linear(torch.randn(4, 7), torch.randn(5, 6))
