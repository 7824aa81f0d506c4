"""The model against transformers: shrunken random models of every family, on the same weights, in fp32.

Weights are large (std 0.2 and more) and norm weights differ from 1: with the usual small ones a swapped norm or a
forgotten scaling of the positions moves the logits by less than any tolerance. Sizes are asymmetric: 6 query heads,
head_dim 10 where dim / heads is 8.
"""

import dataclasses
import re

import pytest
import torch

from minillama.cache import KVCache
from minillama.config import PRESETS, LinearScaling, Llama3Scaling, ModelConfig
from minillama.model import Llama
from minillama.norm import RMSNorm
from minillama.rope import frequencies, halves_to_pairs, pairs_to_halves

transformers = pytest.importorskip("transformers")
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding  # noqa: E402

TOLERANCE = 2e-5  # of the largest value
BASE = ModelConfig(dim=48, n_layers=2, n_heads=6, n_kv_heads=2, head_dim=10, ffn_dim=56, vocab_size=37, max_seq_len=128)
# With theta 100, head_dim 10 and a first training on 64 tokens, two pairs are fast, one is between, two are slow; the
# slowest turns by more than a radian within these tests' sequences, so that its scaling shows.
SMALL = {"rope_theta": 100.0}
LLAMA31 = {**SMALL, "rope_scaling": Llama3Scaling(8.0, 1.0, 4.0, 64)}
LLAMA32 = {**SMALL, "rope_scaling": Llama3Scaling(32.0, 1.0, 4.0, 64), "tie_embeddings": True}
FAMILIES = {
    "llama": dataclasses.replace(BASE, n_kv_heads=6, norm_eps=1e-6),
    "llama2": BASE,
    "llama3": dataclasses.replace(BASE, rope_theta=5e5),
    "llama3.1": dataclasses.replace(BASE, **LLAMA31),
    "llama3.2": dataclasses.replace(BASE, **LLAMA32),
    "linear": dataclasses.replace(BASE, **SMALL, rope_scaling=LinearScaling(4.0)),
    "tinyllama": dataclasses.replace(BASE, n_kv_heads=1, n_layers=3),
    "smollm2": dataclasses.replace(BASE, n_kv_heads=3, rope_theta=1e5, tie_embeddings=True),
}
family = pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES)
path = pytest.mark.parametrize("fast", [True, False], ids=["fast", "readable"])


def theirs(config: ModelConfig) -> "transformers.LlamaConfig":
    """The same shape, in transformers' words."""
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    match config.rope_scaling:
        case LinearScaling(factor):
            rope |= {"rope_type": "linear", "factor": factor}
        case Llama3Scaling(factor, low, high, original):
            rope |= {"rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high}
            rope |= {"original_max_position_embeddings": original}
    return transformers.LlamaConfig(
        hidden_size=config.dim,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        num_key_value_heads=config.n_kv_heads,
        head_dim=config.head_dim,
        intermediate_size=config.ffn_dim,
        vocab_size=config.vocab_size,
        max_position_embeddings=config.max_seq_len,
        rms_norm_eps=config.norm_eps,
        rope_parameters=rope,
        tie_word_embeddings=config.tie_embeddings,
        attn_implementation="eager",
    )


def names(config: ModelConfig) -> dict[str, str]:
    """Our name of each parameter, and theirs."""
    pairs = {"embedding.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight"}
    if not config.tie_embeddings:
        pairs["output.weight"] = "lm_head.weight"
    for i in range(config.n_layers):
        ours, other = f"blocks.{i}", f"model.layers.{i}"
        pairs[f"{ours}.attention_norm.weight"] = f"{other}.input_layernorm.weight"
        pairs[f"{ours}.feedforward_norm.weight"] = f"{other}.post_attention_layernorm.weight"
        pairs |= {f"{ours}.attention.w{x}.weight": f"{other}.self_attn.{x}_proj.weight" for x in "qkvo"}
        pairs |= {f"{ours}.feedforward.{x}.weight": f"{other}.mlp.{x}_proj.weight" for x in ("gate", "up", "down")}
    return pairs


def to_theirs(name: str, tensor: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    """A weight, or its gradient, in their layout."""
    return pairs_to_halves(tensor, config.head_dim) if name.endswith(("wq.weight", "wk.weight")) else tensor


def pair_of_models(config: ModelConfig, fast: bool = True) -> tuple[Llama, "transformers.LlamaForCausalLM"]:
    """Our model with large random weights, and theirs with the same."""
    torch.manual_seed(20)
    ours = Llama(config)
    with torch.no_grad():
        for name, weight in ours.named_parameters():
            weight.uniform_(0.5, 1.5) if weight.dim() == 1 else weight.normal_(std=0.2 if "embed" in name else 0.25)
    for block in ours.blocks:
        block.attention.fast = fast
    other = transformers.LlamaForCausalLM(theirs(config)).eval()
    parameters = dict(other.named_parameters())
    assert set(parameters) == set(names(config).values())
    with torch.no_grad():
        for name, weight in ours.named_parameters():
            parameters[names(config)[name]].copy_(to_theirs(name, weight, config))
    return ours, other


def difference(got: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, as a part of the largest value."""
    assert got.shape == expected.shape and expected.isfinite().all()
    return ((got - expected).abs().max() / expected.abs().max()).item()


def tokens_of(config: ModelConfig, batch: int = 2, time: int = 53) -> torch.Tensor:
    return torch.randint(config.vocab_size, (batch, time), generator=torch.Generator().manual_seed(3))


@family
@path
def test_logits_and_every_gradient_are_those_of_transformers(config, fast):
    ours, other = pair_of_models(config, fast)
    tokens = tokens_of(config)
    mine, expected = ours(tokens), other(tokens).logits
    assert difference(mine, expected) <= TOLERANCE

    weight = torch.randn(mine.shape, generator=torch.Generator().manual_seed(4))  # every logit counts, each differently
    (mine * weight).sum().backward()
    (expected * weight).sum().backward()
    gradients = {name: parameter.grad for name, parameter in other.named_parameters()}
    worst = {
        name: difference(to_theirs(name, parameter.grad, config), gradients[names(config)[name]])
        for name, parameter in ours.named_parameters()
    }
    assert max(worst.values()) <= TOLERANCE, worst


@path
def test_a_left_padded_batch_gives_the_logits_of_transformers_with_its_mask(fast):
    config = FAMILIES["llama3.1"]
    ours, other = pair_of_models(config, fast)
    tokens, padding = tokens_of(config, batch=3, time=31), torch.tensor([0, 9, 4])
    real = torch.arange(31) >= padding[:, None]
    positions = (real.cumsum(1) - 1).clamp_min(0)
    cache = KVCache(config, 3, 31, padding=padding)
    with torch.no_grad():
        mine = torch.cat([ours(tokens[:, :20], cache), ours(tokens[:, 20:], cache)], dim=1)
        expected = other(tokens, attention_mask=real.long(), position_ids=positions).logits
    assert difference(mine[real], expected[real]) <= TOLERANCE


def swap_norms(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    other = {"attention_norm": "feedforward_norm", "feedforward_norm": "attention_norm"}
    return {re.sub("attention_norm|feedforward_norm", lambda found: other[found[0]], n): w for n, w in state.items()}


@pytest.mark.parametrize(
    ("name", "change", "move"),
    [
        ("llama3.1", {"rope_scaling": None}, dict),
        ("llama3.2", {"rope_scaling": LLAMA31["rope_scaling"]}, dict),
        ("linear", {"rope_scaling": None}, dict),
        ("llama3", {"rope_theta": 1e4}, dict),
        ("llama", {"norm_eps": 1e-5}, dict),
        ("llama2", {"norm_eps": 1e-6}, dict),
        ("llama2", {}, swap_norms),
    ],
)
def test_these_weights_and_sizes_would_show_a_fault(name, change, move):
    config = FAMILIES[name]
    right, _ = pair_of_models(config)
    wrong = Llama(dataclasses.replace(config, **change))
    wrong.load_state_dict(move(right.state_dict()))
    with torch.no_grad():
        assert difference(wrong(tokens_of(config)), right(tokens_of(config))) > 2 * TOLERANCE


CONFIGS = {**{f"small {name}": config for name, config in FAMILIES.items()}, **PRESETS}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_rotary_frequencies_are_those_of_transformers(config):
    expected = LlamaRotaryEmbedding(theirs(config)).inv_freq
    torch.testing.assert_close(frequencies(config), expected, rtol=5e-7, atol=0)


@pytest.mark.parametrize("name", [name for name, c in CONFIGS.items() if isinstance(c.rope_scaling, Llama3Scaling)])
def test_all_three_bands_of_llama3_scaling_are_in_use(name):
    config = CONFIGS[name]
    plain = frequencies(dataclasses.replace(config, rope_scaling=None))
    ratio = plain / LlamaRotaryEmbedding(theirs(config)).inv_freq
    factor = config.rope_scaling.factor
    fast, slow = ratio < 1 + 1e-6, ratio > factor * (1 - 1e-6)
    between = ~fast & ~slow
    assert fast.any() and between.any() and slow.any(), ratio


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rms_norm_has_the_bits_of_transformers(dtype):
    torch.manual_seed(0)
    ours, other = RMSNorm(70, 1e-5).to(dtype), LlamaRMSNorm(70, 1e-5).to(dtype)
    weight = torch.randn(70).to(dtype)
    ours.weight.data, other.weight.data = weight, weight
    x = (torch.randn(5, 3, 70) * 3).to(dtype)
    assert torch.equal(ours(x), other(x))


def test_the_two_layouts_of_query_rows_lead_to_each_other():
    rows = torch.arange(6 * 10).float()[:, None]
    halves = pairs_to_halves(rows, 10)
    assert halves[:10, 0].tolist() == [0, 2, 4, 6, 8, 1, 3, 5, 7, 9]
    assert torch.equal(halves_to_pairs(halves, 10), rows)
