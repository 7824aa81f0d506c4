"""RMSNorm, L2 normalization and LayerNorm against torch.nn.functional and against the formulas in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from minillama.norm import RMSNorm, l2_norm, layer_norm


def rms_norm(dim: int, eps: float = 1e-5) -> RMSNorm:
    norm = RMSNorm(dim, eps)
    torch.manual_seed(1)
    norm.weight.data.uniform_(0.5, 1.5)
    return norm


def by_formula(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    x, weight = x.double(), weight.double()
    return x / ((x**2).sum(-1, keepdim=True) / x.shape[-1] + eps) ** 0.5 * weight


@pytest.mark.parametrize("shape", [(7,), (5, 7), (3, 5, 7), (0, 7), (3, 1, 1)])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_rms_norm_is_that_of_pytorch(shape, scale):
    torch.manual_seed(0)
    norm, x = rms_norm(shape[-1]), torch.randn(shape) * scale
    torch.testing.assert_close(norm(x), F.rms_norm(x, shape[-1:], norm.weight, 1e-5), rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_single_vector_is_normed_as_it_is_among_others(dtype):
    """It goes another way, with fewer calls."""
    norm, x = rms_norm(11, eps=0.1).to(dtype), torch.randn(3, 11, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.no_grad():
        together, alone = norm(x), torch.cat([norm(row[None, None])[0] for row in x])
        torch.testing.assert_close(alone, together, rtol=2e-6 if dtype == torch.float32 else 2**-7, atol=0)
        torch.testing.assert_close(alone.double(), by_formula(x, norm.weight, 0.1), rtol=2**-6, atol=0)
        assert (norm(torch.zeros(1, 11, dtype=dtype)) == 0).all()


def test_rms_norm_and_its_gradients_are_the_formula():
    torch.manual_seed(0)
    norm, x = rms_norm(11, eps=0.1), torch.randn(4, 3, 11, requires_grad=True)
    out_grad = torch.randn(4, 3, 11)
    expected = by_formula(x, norm.weight, 0.1)
    torch.testing.assert_close(norm(x).double(), expected, rtol=2e-6, atol=1e-6)
    got = torch.autograd.grad(norm(x), [x, norm.weight], out_grad)
    wanted = torch.autograd.grad(expected, [x, norm.weight], out_grad.double())
    torch.testing.assert_close(got, wanted, rtol=2e-6, atol=1e-6)


def test_eps_stands_inside_the_root():
    # x² = 1e-4 and eps = 1e-2: 0.01 / sqrt(0.0101); outside of the root it would be 0.01 / 0.02
    assert RMSNorm(4, 1e-2)(torch.full((4,), 1e-2)).tolist() == pytest.approx([0.0995037] * 4, rel=1e-5)


def test_a_vector_of_zeros_stays_zero_and_has_a_gradient():
    x = torch.zeros(2, 5, requires_grad=True)
    y = RMSNorm(5, 1e-6)(x)
    y.sum().backward()
    assert (y == 0).all() and x.grad.isfinite().all()


def test_the_size_of_the_input_does_not_matter_and_its_direction_does():
    norm, x = RMSNorm(9, 1e-12), torch.randn(3, 9, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(norm(5 * x), norm(x))
    torch.testing.assert_close(norm(-x), -norm(x))
    torch.testing.assert_close(norm(x).square().mean(-1), torch.ones(3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_output_keeps_the_dtype_and_is_rounded_before_the_weight(dtype):
    norm = rms_norm(7).to(dtype)
    x = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    normed = by_formula(x, torch.ones(7), 1e-5).to(dtype)
    assert norm(x).dtype == dtype
    assert torch.equal(norm(x), normed * norm.weight)


def test_statistics_are_in_fp32_when_the_input_is_bf16():
    norm = RMSNorm(512, 1e-5).to(torch.bfloat16)
    x = torch.randn(64, 512, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = by_formula(x, norm.weight, 1e-5).bfloat16()
    in_bf16 = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps)
    assert (in_bf16 != exact).float().mean() > 0.25  # these inputs would show it
    assert (norm(x) != exact).float().mean() < 0.001  # a tie, rounded the other way


def test_statistics_are_in_fp32_when_the_input_is_fp16():
    x = torch.full((3, 8), 300.0).half()  # 300² is above the largest fp16, 65504
    assert (x * torch.rsqrt(x.square().mean(-1, keepdim=True)) == 0).all()
    assert (RMSNorm(8, 1e-5).half()(x) == 1).all()


@pytest.mark.parametrize("shape", [(7,), (5, 7), (3, 1, 7), (2, 1)])
def test_l2_norm_is_that_of_pytorch(shape):
    torch.manual_seed(0)
    x = torch.randn(shape)
    x[..., :1] += 3
    torch.testing.assert_close(l2_norm(x), F.normalize(x, dim=-1))
    torch.testing.assert_close(l2_norm(x).norm(dim=-1), torch.ones(shape[:-1]))


def test_a_short_vector_gets_length_one_as_well():
    x = torch.tensor([[3e-6, -4e-6]])
    torch.testing.assert_close(l2_norm(x), torch.tensor([[0.6, -0.8]]))
    assert l2_norm(x, eps=1e-3).norm() < 0.1


def test_rms_norm_without_weight_is_l2_norm_times_the_root_of_dim():
    x = torch.randn(3, 10, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(RMSNorm(10, 1e-12)(x), l2_norm(x) * 10**0.5)


def test_l2_norm_of_zeros_is_zeros():
    x = torch.zeros(2, 5, requires_grad=True)
    l2_norm(x).sum().backward()
    assert (l2_norm(x) == 0).all() and x.grad.isfinite().all()


@pytest.mark.parametrize("shape", [(7,), (5, 7), (3, 5, 7)])
@pytest.mark.parametrize("eps", [1e-5, 0.5])
def test_layer_norm_is_that_of_pytorch(shape, eps):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(shape) * 2 + 3, torch.randn(7), torch.randn(7)
    expected = F.layer_norm(x, (7,), weight, bias, eps)
    torch.testing.assert_close(layer_norm(x, weight, bias, eps), expected, rtol=1e-5, atol=2e-6)


def test_layer_norm_takes_1e_5_as_eps_when_none_is_given():
    x, weight, bias = torch.randn(3, 7) * 1e-3, torch.ones(7), torch.zeros(7)
    torch.testing.assert_close(layer_norm(x, weight, bias), F.layer_norm(x, (7,), weight, bias))


def test_layer_norm_does_not_see_a_shift_and_rms_norm_does():
    x = torch.randn(3, 7, generator=torch.Generator().manual_seed(0))
    weight, bias = torch.ones(7), torch.zeros(7)
    torch.testing.assert_close(layer_norm(x + 2, weight, bias), layer_norm(x, weight, bias), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(RMSNorm(7, 1e-5)(x + 2), RMSNorm(7, 1e-5)(x), atol=0.1)


def test_gradients_of_l2_norm_and_layer_norm():
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(*s, 5, dtype=torch.float64, requires_grad=True) for s in [(3,), (), ()])
    assert gradcheck(l2_norm, x)
    assert gradcheck(layer_norm, (x, weight, bias))
