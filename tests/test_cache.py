"""The KV cache: whatever the steps, the padding, the order of the rows, the logits are those of one forward pass."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minillama.cache import KVCache, StaticCache
from minillama.config import LinearScaling, ModelConfig
from minillama.generation import compiled_step, next_logits
from minillama.model import Llama
from minillama.quantize import quantize

CONFIG = ModelConfig(
    dim=48,
    n_layers=2,
    n_heads=6,
    n_kv_heads=2,
    head_dim=10,
    ffn_dim=56,
    vocab_size=37,
    max_seq_len=64,
    rope_theta=100.0,
    rope_scaling=LinearScaling(1.5),
)
PATHS = pytest.mark.parametrize("fast", [True, False], ids=["fast", "readable"])


def random_model(fast: bool = True) -> Llama:
    torch.manual_seed(12)
    model = Llama(CONFIG).requires_grad_(False)
    for weight in model.parameters():
        weight.uniform_(0.5, 1.5) if weight.dim() == 1 else weight.normal_(std=0.25)
    for block in model.blocks:
        block.attention.fast = fast
    return model


def tokens_of(batch: int, time: int) -> torch.Tensor:
    return torch.randint(CONFIG.vocab_size, (batch, time), generator=torch.Generator().manual_seed(13))


def in_steps(model: Llama, tokens: torch.Tensor, steps: list[int], cache: KVCache) -> torch.Tensor:
    """The logits of all tokens, fed in steps of these lengths."""
    ends = itertools.accumulate(steps)
    return torch.cat([model(tokens[:, end - step : end], cache) for step, end in zip(steps, ends, strict=True)], dim=1)


def assert_equal_logits(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert got.shape == expected.shape and got.isfinite().all()
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


# Steps


@PATHS
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("steps", [[13], [1] * 13, [7, 1, 5], [1, 3, 1, 8], [5, 1, 1, 1, 4, 1]])
def test_in_steps_of_any_length_the_logits_are_those_of_one_pass(fast, batch, steps):
    model, tokens = random_model(fast), tokens_of(batch, 13)
    cache = KVCache(CONFIG, batch, 13)
    assert_equal_logits(in_steps(model, tokens, steps, cache), model(tokens))
    assert cache.length == 13 and all(layer.length == 13 for layer in cache.layers)


def test_room_that_is_left_over_changes_nothing():
    model, tokens = random_model(), tokens_of(2, 9)
    got = in_steps(model, tokens, [4, 1, 4], KVCache(CONFIG, 2, 50))
    assert_equal_logits(got, model(tokens))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_low_precision_steps_stay_near_one_pass(dtype):
    model, tokens = random_model().to(dtype), tokens_of(2, 9)
    got = in_steps(model, tokens, [4, 1, 4], KVCache(CONFIG, 2, 9, dtype=dtype))
    expected = model(tokens)
    assert got.dtype == dtype
    assert (got - expected).float().norm() < 6 * torch.finfo(dtype).eps * expected.float().norm()


def test_its_memory_is_what_the_config_says():
    for dtype, name in [(torch.float32, "float32"), (torch.bfloat16, "bfloat16")]:
        cache = KVCache(CONFIG, 3, 17, dtype=dtype)
        tensors = [tensor for layer in cache.layers for tensor in (layer.k, layer.v)]
        assert sum(tensor.nbytes for tensor in tensors) == CONFIG.kv_cache_bytes(3, 17, name)


@pytest.mark.parametrize(("filled", "new"), [(0, 9), (8, 1), (5, 4), (3, 50)])
def test_more_tokens_than_it_holds_are_refused_and_nothing_is_lost(filled, new):
    model, tokens, cache = random_model(), tokens_of(2, 8), KVCache(CONFIG, 2, 8)
    if filled:
        model(tokens[:, :filled], cache)
    with pytest.raises(ValueError, match=rf"the cache holds 8 tokens, but {filled} \+ {new} are needed: .*max_len"):
        model(tokens_of(2, new), cache)
    if filled < 8:
        assert_equal_logits(model(tokens[:, filled:], cache), model(tokens)[:, filled:])


# Padding

PADDING = torch.tensor([0, 4, 1, 9])  # the last row's first real token comes after the first step of some tests


@PATHS
@pytest.mark.parametrize("steps", [[12], [5, 7], [5, 1, 1, 5], [1] * 12, [11, 1]])
def test_a_left_padded_batch_gives_each_row_what_it_has_alone(fast, steps):
    model, tokens = random_model(fast), tokens_of(4, 12)
    got = in_steps(model, tokens, steps, KVCache(CONFIG, 4, 12, padding=PADDING))
    for row, pads in enumerate(PADDING.tolist()):
        alone = model(tokens[row : row + 1, pads:])
        assert_equal_logits(got[row : row + 1, pads:], alone)


def test_what_stands_in_the_padding_does_not_matter():
    model, tokens = random_model(), tokens_of(4, 12)
    pads = torch.arange(12) < PADDING[:, None]
    one = model(tokens.masked_fill(pads, 0), KVCache(CONFIG, 4, 12, padding=PADDING))
    other = model(tokens.masked_fill(pads, 36), KVCache(CONFIG, 4, 12, padding=PADDING))
    assert torch.equal(one[~pads], other[~pads])


@given(
    st.lists(st.integers(0, 12), min_size=1, max_size=4),
    st.lists(st.integers(1, 5), min_size=1, max_size=5),
)
def test_positions_and_mask_are_the_rule_whatever_the_steps(padding, steps):
    cache, start = KVCache(CONFIG, len(padding), 25, padding=torch.tensor(padding)), 0
    for step in steps:
        positions, mask = cache.advance(step)
        for row, pads in enumerate(padding):
            for t in range(step):
                column = start + t
                sees = [c for c in range(column + 1) if c >= pads or c == column]
                if mask is None:
                    assert not any(padding) and positions[t] == column
                else:
                    assert mask[row, 0, t].nonzero()[:, 0].tolist() == sees
                    assert positions[row, t] == max(column - pads, 0)
        start += step


@PATHS
def test_a_row_of_nothing_but_padding_spoils_nothing(fast):
    model, tokens = random_model(fast), tokens_of(2, 6)
    logits = model(tokens, KVCache(CONFIG, 2, 6, padding=torch.tensor([6, 0])))
    assert logits.isfinite().all()
    assert_equal_logits(logits[1:], model(tokens[1:]))


def test_padding_of_zeros_is_no_padding():
    cache = KVCache(CONFIG, 2, 6, padding=torch.zeros(2, dtype=torch.long))
    assert cache.padding is None and cache.advance(3)[1] is None


# Reorder


@PATHS
@pytest.mark.parametrize("padding", [None, PADDING])
@pytest.mark.parametrize("rows", [[3, 1, 1, 0], [2], [0, 0, 2, 3, 1, 2]])
def test_reordered_rows_go_on_as_if_they_had_always_been_so(fast, padding, rows):
    model, tokens, rows = random_model(fast), tokens_of(4, 12), torch.tensor(rows)
    cache = KVCache(CONFIG, 4, 16, padding=padding)
    model(tokens, cache)
    cache.reorder(rows)
    after = tokens_of(len(rows), 4)
    got = in_steps(model, after, [1, 3], cache)

    straight = KVCache(CONFIG, len(rows), 16, padding=None if padding is None else padding[rows])
    expected = model(torch.cat([tokens[rows], after], dim=1), straight)[:, 12:]
    assert_equal_logits(got, expected)


def test_rows_taken_twice_do_not_share_memory():
    model, cache = random_model(), KVCache(CONFIG, 1, 8)
    model(tokens_of(1, 4), cache)
    cache.reorder(torch.tensor([0, 0]))
    after = torch.tensor([[1, 2], [3, 4]])
    got = model(after, cache)
    whole = torch.cat([tokens_of(1, 4).expand(2, -1), after], dim=1)
    assert_equal_logits(got, model(whole)[:, 4:])


# Rewind


@PATHS
@pytest.mark.parametrize("padding", [None, PADDING])
@pytest.mark.parametrize("length", [10, 12, 3, 0])
def test_after_a_rewind_it_goes_on_as_if_the_rest_had_never_been(fast, padding, length):
    model, tokens, other = random_model(fast), tokens_of(4, 12), tokens_of(4, 14).flip(0)
    cache = KVCache(CONFIG, 4, 14, padding=padding)
    model(tokens, cache)
    cache.rewind(length)
    got = in_steps(model, other[:, length:], [1, 13 - length], cache)
    expected = model(torch.cat([tokens[:, :length], other[:, length:]], 1), KVCache(CONFIG, 4, 14, padding=padding))
    assert_equal_logits(got, expected[:, length:])


@pytest.mark.parametrize("length", [-1, 6])
def test_a_rewind_to_where_it_never_was_is_refused(length):
    cache = KVCache(CONFIG, 2, 8)
    random_model()(tokens_of(2, 5), cache)
    with pytest.raises(ValueError, match=f"holds 5 tokens and cannot be rewound to {length}: give 0 to 5"):
        cache.rewind(length)
    assert cache.length == 5


# The static cache, for compiled models


@pytest.mark.parametrize("steps", [[11], [5, 1, 1, 4], [1] * 11], ids=str)
@pytest.mark.parametrize("padding", [None, [0, 3, 1]], ids=["plain", "padded"])
def test_a_static_cache_gives_the_same_logits(padding, steps):
    model, tokens = random_model(), tokens_of(3, 11)
    padding = None if padding is None else torch.tensor(padding)
    expected = in_steps(model, tokens, steps, KVCache(CONFIG, 3, 11, padding=padding))
    got = in_steps(model, tokens, steps, StaticCache(CONFIG, 3, 16, padding=padding))
    first = 0 if padding is None else 3  # what pads are told does not matter
    assert_equal_logits(got[:, first:], expected[:, first:])


def test_a_static_cache_forgets_what_came_after_a_rewind():
    model, tokens = random_model(), tokens_of(1, 9)
    cache = StaticCache(CONFIG, 1, 12)
    expected = in_steps(model, tokens, [9], cache)
    cache.rewind(4)
    assert_equal_logits(in_steps(model, tokens[:, 4:], [1] * 5, cache), expected[:, 4:])


@pytest.mark.parametrize("kind", ["float32", "int8", "int4"])
def test_a_step_over_a_static_cache_compiles_as_a_whole_and_once(kind):
    """With Dynamo's graph run as it is: what a compiler makes of it is the compiler's business."""
    config = ModelConfig(dim=192, n_layers=2, n_heads=6, n_kv_heads=2, head_dim=32, ffn_dim=320, vocab_size=48,
                         max_seq_len=64)  # fmt: skip
    torch.manual_seed(0)
    model = Llama(config).requires_grad_(False).eval()
    for weight in model.parameters():
        weight.uniform_(0.5, 1.5) if weight.dim() == 1 else weight.normal_(std=0.2)
    model, dtype = (model, torch.float32) if kind == "float32" else (quantize(model, kind), torch.bfloat16)
    graphs = []
    torch.compiler.reset()
    step = torch.compile(
        next_logits, fullgraph=True, dynamic=False, backend=lambda graph, _: graphs.append(graph) or graph.forward
    )
    cache, static = (make(config, 1, 16, dtype=dtype) for make in (KVCache, StaticCache))
    prompt = torch.arange(5)[None]
    logits = next_logits(model, prompt, cache)
    next_logits(model, prompt, static)
    for _ in range(6):
        token = logits.argmax(-1, keepdim=True)
        logits = next_logits(model, token, cache)
        bound = (1e-5 if kind == "float32" else 0.05) * logits.abs().max()
        assert (step(model, token, static) - logits).abs().max() <= bound
    assert len(graphs) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["bfloat16", "int8", "int4"])
def test_on_a_gpu_a_recorded_step_gives_the_same_logits(kind):
    config = ModelConfig(dim=192, n_layers=2, n_heads=6, n_kv_heads=2, head_dim=32, ffn_dim=320, vocab_size=48,
                         max_seq_len=64)  # fmt: skip
    torch.manual_seed(0)
    model = Llama(config).requires_grad_(False).eval().to("cuda", torch.bfloat16)
    model = model if kind == "bfloat16" else quantize(model, kind)
    step = compiled_step("cuda", kind == "int8")
    cache, static = (make(config, 1, 16, device="cuda", dtype=torch.bfloat16) for make in (KVCache, StaticCache))
    token = torch.ones(1, 1, dtype=torch.int64, device="cuda")
    for _ in range(8):
        logits = next_logits(model, token, cache)
        assert (step(model, token, static) - logits).abs().max() <= 0.05 * logits.abs().max()
        token = logits.argmax(-1, keepdim=True)
