"""Attention: both paths against an oracle that goes head by head and row by row, and the tap on the probabilities."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import minillama.attention
from minillama.attention import Attention, InBlocks, causal_mask, packed_mask
from minillama.cache import LayerKV
from minillama.config import ModelConfig
from minillama.rope import frequencies, rotate, rotation

CONFIG = ModelConfig(
    dim=48, n_layers=1, n_heads=6, n_kv_heads=2, head_dim=10, ffn_dim=8, vocab_size=5, max_seq_len=64, rope_theta=100.0
)
PATHS = pytest.mark.parametrize("fast", [True, False], ids=["fast", "readable"])
KV_HEADS = pytest.mark.parametrize("kv_heads", [6, 3, 2, 1])


def layer(kv_heads: int = 2, fast: bool = True) -> Attention:
    torch.manual_seed(5)
    attention = Attention(dataclasses.replace(CONFIG, n_kv_heads=kv_heads))
    for weight in attention.parameters():
        torch.nn.init.normal_(weight, std=0.25)
    attention.fast = fast
    return attention


def inputs(batch: int, time: int, start: int = 0) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    x = torch.randn(batch, time, CONFIG.dim, generator=torch.Generator().manual_seed(6))
    return x, rotation(frequencies(CONFIG), torch.arange(start, start + time))


def oracle(attention: Attention, x: torch.Tensor, turn: tuple[torch.Tensor, torch.Tensor], mask: torch.Tensor):
    """Each head by itself, each query by itself, in float64. mask (B, T, T)."""
    heads, kv_heads, size = attention.n_heads, attention.n_kv_heads, attention.head_dim
    q, k, v = (x @ weight.T for weight in (attention.wq.weight, attention.wk.weight, attention.wv.weight))
    outputs = torch.zeros(*x.shape[:2], heads * size, dtype=torch.float64)
    for b in range(x.shape[0]):
        for h in range(heads):
            own, shared = slice(h * size, h * size + size), h * kv_heads // heads * size
            queries = rotate(q[b : b + 1, :, None, own], turn)[0, :, 0].double()
            keys = rotate(k[b : b + 1, :, None, shared : shared + size], turn)[0, :, 0].double()
            values = v[b, :, shared : shared + size].double()
            for t in range(x.shape[1]):
                seen = mask[b, t].nonzero()[:, 0]
                weights = torch.exp(keys[seen] @ queries[t] / size**0.5)
                outputs[b, t, own] = (weights / weights.sum()) @ values[seen]
    return outputs @ attention.wo.weight.double().T


# Both paths


@PATHS
@KV_HEADS
@pytest.mark.parametrize(("batch", "time"), [(3, 7), (1, 2), (2, 1), (1, 1)])
def test_it_is_the_oracle(kv_heads, fast, batch, time):
    attention, (x, turn) = layer(kv_heads, fast), inputs(batch, time)
    expected = oracle(attention, x, turn, torch.ones(batch, time, time).tril())
    torch.testing.assert_close(attention(x, turn).double(), expected, rtol=1e-5, atol=1e-5)


@PATHS
@KV_HEADS
@pytest.mark.parametrize("time", [6, 1])
def test_with_a_mask_it_is_the_oracle(kv_heads, fast, time):
    attention, (x, turn) = layer(kv_heads, fast), inputs(3, time)
    mask = torch.rand(3, 1, time, time, generator=torch.Generator().manual_seed(7)) < 0.4
    mask |= torch.eye(time, dtype=torch.bool)
    expected = oracle(attention, x, turn, mask[:, 0])
    torch.testing.assert_close(attention(x, turn, mask).double(), expected, rtol=1e-5, atol=1e-5)


@KV_HEADS
def test_both_paths_have_the_same_gradients(kv_heads):
    found = []
    for fast in (True, False):
        attention, (x, turn) = layer(kv_heads, fast), inputs(2, 7)
        x.requires_grad_()
        out_grad = torch.randn(2, 7, 48, generator=torch.Generator().manual_seed(8))
        found.append(torch.autograd.grad(attention(x, turn), [x, *attention.parameters()], out_grad))
    for fast, readable in zip(*found, strict=True):
        assert (fast - readable).abs().max() <= 2e-6 * readable.abs().max()


@PATHS
@KV_HEADS
@pytest.mark.parametrize("steps", [(7,), (1, 1, 1, 1, 1, 1, 1), (3, 1, 2, 1), (1, 5, 1)])
def test_in_steps_with_a_cache_it_is_the_same_as_at_once(kv_heads, fast, steps):
    attention, (x, turn) = layer(kv_heads, fast), inputs(2, 7)
    cache, parts, start = LayerKV((2, kv_heads, 9, 10), None, None), [], 0
    for step in steps:
        now = slice(start, start + step)
        parts.append(attention(x[:, now], (turn[0][now], turn[1][now]), None, cache))
        start += step
    torch.testing.assert_close(torch.cat(parts, 1), attention(x, turn), rtol=1e-5, atol=1e-5)


@PATHS
def test_with_a_cache_and_a_mask_columns_are_all_tokens_so_far(fast):
    attention, (x, turn) = layer(fast=fast), inputs(2, 5)
    mask = torch.ones(2, 1, 5, 5, dtype=torch.bool).tril()
    mask[1, :, 2:, 0] = False
    expected = attention(x, turn, mask)
    for split in (2, 4):
        cache = LayerKV((2, 2, 5, 10), None, None)
        attention(x[:, :split], (turn[0][:split], turn[1][:split]), mask[..., :split, :split], cache)
        last = attention(x[:, split:], (turn[0][split:], turn[1][split:]), mask[..., split:, :], cache)
        torch.testing.assert_close(last, expected[:, split:], rtol=1e-5, atol=1e-5)


@KV_HEADS
def test_for_one_new_token_keys_and_values_are_not_copied_for_each_head(kv_heads, monkeypatch):
    fused, seen = torch.nn.functional.scaled_dot_product_attention, []

    def look(q, k, v, *rest, **options):
        seen.append((q.shape, k.shape, v.shape))
        return fused(q, k, v, *rest, **options)

    monkeypatch.setattr(minillama.attention.F, "scaled_dot_product_attention", look)
    layer(kv_heads)(*inputs(2, 1))
    assert seen == [((2, kv_heads, 6 // kv_heads, 10), (2, kv_heads, 1, 10), (2, kv_heads, 1, 10))]


@PATHS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("time", [7, 1])
@pytest.mark.parametrize("training", [True, False])
def test_low_precision_stays_near_fp32(fast, dtype, time, training):
    attention, (x, turn) = layer(fast=fast), inputs(2, time)
    expected = attention(x, turn)
    with torch.set_grad_enabled(training):
        got = attention.to(dtype)(x.to(dtype), turn)
    assert got.dtype == dtype
    assert (got - expected).norm() < 1.5 * torch.finfo(dtype).eps * expected.norm()


@pytest.mark.parametrize("packed", [None, "causal", "open"])
@pytest.mark.parametrize("time", [1, 64, 150])
def test_attention_in_blocks_learns_what_the_formula_learns(packed, time):
    random = torch.Generator().manual_seed(time)
    q, k, v, dy = (torch.randn(2, 3, time, 10, dtype=torch.float64, generator=random) for _ in range(4))
    mask = None
    if packed == "causal":
        _, mask = packed_mask(torch.arange(time).expand(2, time) // torch.tensor([[23], [40]]))
    elif packed == "open":  # a token that sees what stands behind it
        mask = torch.rand(2, 1, time, time, generator=random) < 0.5
        mask |= torch.eye(time, dtype=torch.bool)
    seen = causal_mask(time, time) if mask is None else mask
    results = []
    for attend in (InBlocks.apply, lambda q, k, v, mask: F.scaled_dot_product_attention(q, k, v, seen)):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        y = attend(*leaves, mask)
        results.append([y, *torch.autograd.grad(y, leaves, dy)])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_training_in_bf16_on_a_cpu_holds_no_matrix_of_all_pairs():
    attention, (x, turn) = layer().bfloat16(), inputs(2, 300)
    expected, largest = layer()(x, turn), 0

    class Look(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                largest = max(largest, result.numel())
            return result

    with Look():
        got = attention(x.bfloat16(), turn)
        got.sum().backward()
    assert largest < 2 * 6 * 300 * 300 / 2
    assert (got - expected).norm() < 2 * torch.finfo(torch.bfloat16).eps * expected.norm()


@PATHS
def test_the_scale_is_that_of_head_dim(fast):
    # one pair of heads' worth by hand: D = 2, q = k = (1, 0) and (2, 0) at position 0, no rotation
    config = ModelConfig(dim=2, n_layers=1, n_heads=1, head_dim=2, ffn_dim=4, vocab_size=3, max_seq_len=4)
    attention = Attention(config)
    attention.fast = fast
    for linear in (attention.wq, attention.wk, attention.wv, attention.wo):
        linear.weight.data = torch.eye(2)
    x, still = torch.tensor([[[1.0, 0.0], [2.0, 0.0]]]), rotation(frequencies(config), torch.zeros(2))
    first = 1 / (1 + torch.exp(torch.tensor((4 - 2) / 2**0.5)))  # scores 2 and 4, divided by the root of 2
    assert attention(x, still)[0, 1, 0].item() == pytest.approx((first * 1 + (1 - first) * 2).item(), rel=1e-6)


# Masks


@pytest.mark.parametrize(("new", "total"), [(1, 1), (3, 3), (2, 5), (1, 4), (0, 3)])
def test_causal_mask_lets_each_token_see_itself_and_what_was_before(new, total):
    expected = [[column <= total - new + row for column in range(total)] for row in range(new)]
    assert causal_mask(new, total).tolist() == expected
    assert causal_mask(new, total).dtype == torch.bool


@PATHS
def test_no_token_sees_a_later_one(fast):
    attention, (x, turn) = layer(fast=fast), inputs(2, 7)
    later = x.clone()
    later[:, 4:] += 1
    assert torch.equal(attention(later, turn)[:, :4], attention(x, turn)[:, :4])


# The tap


@KV_HEADS
def test_the_tap_sees_probabilities_that_sum_to_one_and_look_at_no_later_token(kv_heads):
    attention, (x, turn) = layer(kv_heads, fast=False), inputs(2, 7)
    seen = []
    attention.tap.register_forward_hook(lambda module, args, probabilities: seen.append(probabilities))
    attention(x, turn)
    (probabilities,) = seen
    assert probabilities.shape == (2, 6, 7, 7)
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(2, 6, 7))
    assert (probabilities.triu(1) == 0).all() and (probabilities.tril()[..., :, 0] > 0).all()


def test_with_a_cache_the_tap_sees_a_column_for_every_token_so_far():
    attention, (x, turn) = layer(fast=False), inputs(1, 5)
    seen = []
    attention.tap.register_forward_hook(lambda module, args, probabilities: seen.append(probabilities))
    cache = LayerKV((1, 2, 5, 10), None, None)
    attention(x[:, :3], (turn[0][:3], turn[1][:3]), None, cache)
    attention(x[:, 3:], (turn[0][3:], turn[1][3:]), None, cache)
    attention(x, turn)
    torch.testing.assert_close(seen[1], seen[2][:, :, 3:])


def test_what_a_hook_gives_back_is_what_attention_uses():
    attention, (x, turn) = layer(fast=False), inputs(2, 5)
    values = (x @ attention.wv.weight.T).unflatten(-1, (2, 10)).repeat_interleave(3, dim=2)  # (B, T, H, D)

    handle = attention.tap.register_forward_hook(lambda module, args, p: torch.full_like(p, 0.2))
    expected = attention.wo(values.mean(1, keepdim=True).expand(-1, 5, -1, -1).flatten(2))
    torch.testing.assert_close(attention(x, turn), expected, rtol=1e-5, atol=1e-5)
    handle.remove()

    def silence_head_4(module, args, probabilities):
        return probabilities.index_fill(1, torch.tensor([4]), 0.0)

    before = attention(x, turn)
    attention.tap.register_forward_hook(silence_head_4)
    without = attention(x, turn)
    assert not torch.allclose(without, before, atol=1e-2)
    attention.wo.weight.data[:, 40:50] = 0  # head 4's columns: what it would have said is heard no more
    torch.testing.assert_close(attention(x, turn), without)


def test_the_fast_path_has_no_probabilities_to_tap():
    attention = layer()
    attention.tap.register_forward_hook(lambda *_: pytest.fail("the tap was called"))
    attention(*inputs(2, 7))
    attention(*inputs(2, 1))
