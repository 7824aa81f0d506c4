"""Linear layers: whichever way the product is computed, it is x Wᵀ."""

import pytest
import torch
import torch.nn.functional as F

from minillama.linear import Linear, linear

DTYPES = pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 8e-3)], ids=str)


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@DTYPES
@pytest.mark.parametrize("out", [48, 37, 8, 1])
@pytest.mark.parametrize("shape", [(1, 1, 20), (20,), (1, 20), (2, 1, 20), (3, 5, 20), (0, 20)], ids=str)
def test_it_is_x_times_the_transpose_of_the_weight(shape, out, dtype, tolerance):
    x, weight = random(*shape, dtype=dtype), random(out, 20, dtype=dtype)
    expected = x.double() @ weight.double().T
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode():
            got = linear(x, weight)
        assert got.dtype == dtype and got.shape == expected.shape
        torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=10 * tolerance)


@DTYPES
def test_weights_and_vectors_need_not_be_contiguous(dtype, tolerance):
    x, weight = random(20, 3, dtype=dtype).T[1:2], random(20, 48, dtype=dtype).T
    with torch.no_grad():
        torch.testing.assert_close(linear(x, weight), F.linear(x, weight), rtol=tolerance, atol=10 * tolerance)


def test_one_vector_is_multiplied_in_blocks_and_only_without_a_gradient(monkeypatch):
    if not torch.backends.mkl.is_available():
        pytest.skip("this PyTorch has no MKL")
    calls = []
    bmm = torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda *args: calls.append(args) or bmm(*args))
    layer, x = Linear(20, 48), random(1, 1, 20)
    with torch.no_grad():
        layer(x)
        assert len(calls) == 1
        layer(x.expand(1, 2, 20))
    layer(x).sum().backward()
    assert len(calls) == 1
    torch.testing.assert_close(layer.weight.grad, x[0].expand(48, 20))


@pytest.mark.parametrize("enabled", [True, False])
def test_onednn_is_left_as_it_was(enabled, monkeypatch):
    inside = []

    def product(x, weight):
        inside.append(torch._C._get_mkldnn_enabled())
        raise KeyboardInterrupt

    monkeypatch.setattr(F, "linear", product)
    before = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(enabled)
    try:
        with torch.no_grad(), pytest.raises(KeyboardInterrupt):
            linear(random(1, 20, dtype=torch.bfloat16), random(48, 20, dtype=torch.bfloat16))
        assert inside == [False] and torch._C._get_mkldnn_enabled() == enabled
    finally:
        torch._C._set_mkldnn_enabled(before)


def test_it_is_nn_linear_without_a_bias():
    layer = Linear(20, 48)
    assert isinstance(layer, torch.nn.Linear) and layer.bias is None and layer.weight.shape == (48, 20)
    assert list(layer.state_dict()) == ["weight"]


@pytest.mark.parametrize("lead", [(7,), (3, 5), (1, 1), (2, 3, 4)])
def test_its_gradients_equal_those_of_pytorch(lead):
    x, weight, grad = random(*lead, 24).requires_grad_(), random(13, 24).requires_grad_(), random(*lead, 13)
    plain, ours = F.linear(x, weight), linear(x, weight)
    if torch.backends.mkldnn.is_available():
        assert "Product" in type(ours.grad_fn).__name__  # it really went another way
    for one, other in zip(
        torch.autograd.grad(plain, (x, weight), grad), torch.autograd.grad(ours, (x, weight), grad), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_gradients_of_what_is_not_contiguous_equal_those_of_pytorch():
    x = random(24, 5, 3).transpose(0, 2)[:, ::2].requires_grad_()
    weight = random(24, 13).t().requires_grad_()
    grad = random(13, 3, 3).permute(1, 2, 0)
    expected = torch.autograd.grad(F.linear(x, weight), (x, weight), grad)
    for one, other in zip(expected, torch.autograd.grad(linear(x, weight), (x, weight), grad), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_a_gradient_that_nobody_needs_is_not_made():
    x, weight = random(4, 6), random(5, 6).requires_grad_()
    linear(x, weight).sum().backward()
    assert x.grad is None and torch.allclose(weight.grad, x.sum(0).expand(5, 6), atol=1e-5)


def test_autocast_keeps_its_own_way():
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(random(4, 6), random(5, 6).requires_grad_()).dtype == torch.bfloat16


def test_shapes_that_do_not_match_fail_as_ever():
    with pytest.raises(RuntimeError):
        linear(random(4, 7), random(5, 6))
