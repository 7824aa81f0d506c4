"""Rotary positions against formulas written out in plain Python and with complex numbers."""

import cmath
import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minillama.config import LinearScaling, Llama3Scaling, ModelConfig
from minillama.rope import frequencies, halves_to_pairs, pairs_to_halves, rotate, rotation, sinusoidal_table

CONFIG = ModelConfig(
    dim=48, n_layers=1, n_heads=6, n_kv_heads=2, head_dim=10, ffn_dim=8, vocab_size=5, max_seq_len=64, rope_theta=100.0
)


# The sinusoidal table


@pytest.mark.parametrize(("length", "dim", "theta"), [(50, 6, 10_000.0), (1, 2, 10_000.0), (7, 16, 50.0)])
def test_sinusoidal_table_is_the_formula(length, dim, theta):
    expected = [
        [(math.sin, math.cos)[i % 2](position / theta ** ((i - i % 2) / dim)) for i in range(dim)]
        for position in range(length)
    ]
    torch.testing.assert_close(sinusoidal_table(length, dim, theta), torch.tensor(expected), rtol=0, atol=1e-5)


def test_sinusoidal_table_has_theta_10000_when_none_is_given():
    assert torch.equal(sinusoidal_table(9, 8), sinusoidal_table(9, 8, 10_000.0))


# Frequencies


def plain(config: ModelConfig) -> list[float]:
    return [config.rope_theta ** (-2 * i / config.head_dim) for i in range(config.head_dim // 2)]


def by_wavelength(frequency: float, scaling: Llama3Scaling) -> float:
    """The three cases of the Llama 3.1 release, told by wavelength."""
    wavelength = 2 * math.pi / frequency
    if wavelength < scaling.original_max_seq_len / scaling.high_freq_factor:
        return frequency
    if wavelength > scaling.original_max_seq_len / scaling.low_freq_factor:
        return frequency / scaling.factor
    smooth = scaling.original_max_seq_len / wavelength - scaling.low_freq_factor
    smooth /= scaling.high_freq_factor - scaling.low_freq_factor
    return (1 - smooth) * frequency / scaling.factor + smooth * frequency


@pytest.mark.parametrize(("theta", "head_dim"), [(1e4, 10), (5e5, 128), (1e4, 2), (100.0, 64)])
def test_frequencies_are_powers_of_theta(theta, head_dim):
    config = dataclasses.replace(CONFIG, rope_theta=theta, head_dim=head_dim)
    torch.testing.assert_close(frequencies(config), torch.tensor(plain(config)), rtol=1e-6, atol=0)


def test_linear_scaling_slows_every_pair_down():
    config = dataclasses.replace(CONFIG, rope_scaling=LinearScaling(4.0))
    expected = torch.tensor([frequency / 4 for frequency in plain(config)])
    torch.testing.assert_close(frequencies(config), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("head_dim", [10, 128])
@pytest.mark.parametrize("scaling", [Llama3Scaling(8.0, 1.0, 4.0, 64), Llama3Scaling(32.0, 0.5, 3.0, 100)])
def test_llama3_scaling_is_the_rule_of_the_release(head_dim, scaling):
    config = dataclasses.replace(CONFIG, head_dim=head_dim, rope_scaling=scaling)
    expected = [by_wavelength(frequency, scaling) for frequency in plain(config)]
    torch.testing.assert_close(frequencies(config), torch.tensor(expected), rtol=2e-6, atol=0)
    kinds = {round(e / f, 6) for e, f in zip(expected, plain(config), strict=True)}
    assert {1.0, round(1 / scaling.factor, 6)} < kinds  # kept, divided, and at least one between


def test_a_scaling_of_an_unknown_kind_is_refused():
    config = dataclasses.replace(CONFIG)
    object.__setattr__(config, "rope_scaling", "yarn")
    with pytest.raises(ValueError, match="rope_scaling is 'yarn', expected None, LinearScaling or Llama3Scaling"):
        frequencies(config)


# Rotation


def by_complex_numbers(x: torch.Tensor, frequency: torch.Tensor, positions: list[int]) -> torch.Tensor:
    """x (T, H, D) turned number by number, in float64."""
    y = x.double().clone()
    for t, position in enumerate(positions):
        for h in range(x.shape[1]):
            for i, f in enumerate(frequency.tolist()):
                turned = complex(*x[t, h, 2 * i : 2 * i + 2].tolist()) * cmath.exp(1j * position * f)
                y[t, h, 2 * i], y[t, h, 2 * i + 1] = turned.real, turned.imag
    return y


def test_rotation_is_multiplication_by_complex_numbers():
    torch.manual_seed(0)
    x, positions, frequency = torch.randn(1, 4, 3, 10), [0, 1, 7, 100], frequencies(CONFIG)
    y = rotate(x, rotation(frequency, torch.tensor(positions)))
    torch.testing.assert_close(y[0].double(), by_complex_numbers(x[0], frequency, positions), rtol=0, atol=5e-5)


def test_a_transposed_view_is_turned_as_its_copy():
    x, turn = torch.randn(1, 10, 3, 4).transpose(1, 3), rotation(frequencies(CONFIG), torch.arange(4))
    torch.testing.assert_close(rotate(x, turn), rotate(x.clone(memory_format=torch.contiguous_format), turn))


def test_each_row_of_a_batch_can_have_its_own_positions():
    torch.manual_seed(0)
    x, positions, frequency = torch.randn(2, 3, 5, 10), torch.tensor([[0, 1, 2], [0, 0, 1]]), frequencies(CONFIG)
    cos, sin = rotation(frequency, positions)
    assert cos.shape == sin.shape == (2, 3, 1, 5)
    assert rotation(frequency, positions[0])[0].shape == (3, 1, 5)
    rows = [rotate(x[i : i + 1], rotation(frequency, positions[i])) for i in range(2)]
    torch.testing.assert_close(rotate(x, (cos, sin)), torch.cat(rows))


def test_position_zero_turns_nothing_and_no_position_changes_a_length():
    torch.manual_seed(0)
    x = torch.randn(2, 9, 3, 10)
    y = rotate(x, rotation(frequencies(CONFIG), torch.arange(9)))
    assert torch.equal(y[:, 0], x[:, 0])
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))


@settings(max_examples=40)
@given(st.integers(0, 100), st.integers(0, 100), st.integers(0, 100))
def test_the_dot_product_depends_only_on_the_distance(m, n, shift):
    q, k = torch.randn(2, 1, 1, 1, 10, generator=torch.Generator().manual_seed(0))

    def score(m, n):
        turned = [rotate(x, rotation(frequencies(CONFIG), torch.tensor([p]))) for x, p in [(q, m), (k, n)]]
        return (turned[0] * turned[1]).sum()

    torch.testing.assert_close(score(m, n), score(m + shift, n + shift), rtol=0, atol=2e-4)


def test_the_gradient_turns_back():
    torch.manual_seed(0)
    x, out_grad = torch.randn(2, 4, 3, 10, requires_grad=True), torch.randn(2, 4, 3, 10)
    cos, sin = rotation(frequencies(CONFIG), torch.arange(4))
    (grad,) = torch.autograd.grad(rotate(x, (cos, sin)), x, out_grad)
    torch.testing.assert_close(grad, rotate(out_grad, (cos, -sin)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_rounded_once_at_the_end(dtype):
    x = torch.randn(1, 9, 3, 10, generator=torch.Generator().manual_seed(0)).to(dtype)
    turn = rotation(frequencies(CONFIG), torch.arange(9))
    assert rotate(x, turn).dtype == dtype
    assert torch.equal(rotate(x, turn), rotate(x.float(), turn).to(dtype))


def test_neighbouring_positions_stay_apart_far_from_the_start():
    positions = torch.tensor([1000, 1001])
    cos, sin = rotation(frequencies(CONFIG), positions)
    assert cos.dtype == torch.float32
    assert positions.bfloat16()[0] == positions.bfloat16()[1]  # what would happen otherwise
    assert sin[1, 0, 0].item() == pytest.approx(math.sin(1001), abs=1e-4)


# The two layouts


def rotate_halves(x: torch.Tensor, frequency: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Rotation in the other layout, (B, T, H, D): coordinate i turns with coordinate i + D/2."""
    angles = (positions[:, None] * frequency)[:, None]
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], dim=-1)


sizes = st.tuples(st.integers(1, 7), st.integers(1, 9), st.integers(0, 5))


@given(sizes)
def test_the_layouts_are_each_others_inverse(size):
    heads, half, columns = size
    rows = torch.arange(heads * 2 * half * columns).view(heads * 2 * half, columns)
    for one, other in [(halves_to_pairs, pairs_to_halves), (pairs_to_halves, halves_to_pairs)]:
        assert one(rows, 2 * half).shape == rows.shape
        assert torch.equal(other(one(rows, 2 * half), 2 * half), rows)


def test_pairs_are_made_of_a_number_from_each_half_within_each_head():
    rows = torch.arange(12)
    assert halves_to_pairs(rows, 6).tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]
    assert pairs_to_halves(rows, 6).tolist() == [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]


@pytest.mark.parametrize(("heads", "head_dim"), [(6, 10), (2, 10), (3, 4), (1, 2)])
def test_both_layouts_rotate_alike(heads, head_dim):
    torch.manual_seed(0)
    frequency = frequencies(dataclasses.replace(CONFIG, head_dim=head_dim))
    weight, x, positions = torch.randn(heads * head_dim, 7), torch.randn(2, 5, 7), torch.arange(5) * 3

    def project(weight):
        return (x @ weight.T).unflatten(-1, (heads, head_dim))

    ours = rotate(project(halves_to_pairs(weight, head_dim)), rotation(frequency, positions))
    theirs = rotate_halves(project(weight), frequency, positions)
    assert not torch.allclose(ours, theirs) or head_dim == 2
    as_halves = pairs_to_halves(ours.permute(2, 3, 0, 1).flatten(0, 1), head_dim).unflatten(0, (heads, head_dim))
    torch.testing.assert_close(as_halves.permute(2, 3, 0, 1), theirs, rtol=0, atol=1e-5)


def test_rows_of_quantized_blocks_move_whole():
    rows = torch.randint(256, (12, 5, 34), dtype=torch.uint8)
    assert torch.equal(halves_to_pairs(rows, 6), rows[[0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]])
