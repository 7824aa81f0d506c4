"""The model as a whole: its shape, its start, what it refuses, its size at every preset, its dtype and device."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

import minillama.attention
import minillama.model
from minillama.cache import KVCache
from minillama.config import PRESETS, Llama3Scaling, ModelConfig
from minillama.model import Llama
from minillama.rope import frequencies, rotation
from tests.test_config import PUBLISHED

CONFIG = ModelConfig(
    dim=48, n_layers=2, n_heads=6, n_kv_heads=2, head_dim=10, ffn_dim=56, vocab_size=37, max_seq_len=64
)
TIED = dataclasses.replace(CONFIG, tie_embeddings=True)
PATHS = pytest.mark.parametrize("fast", [True, False], ids=["fast", "readable"])


def random_model(config: ModelConfig = CONFIG, fast: bool = True) -> Llama:
    """Weights large enough that every part shows; `initialize` makes the blocks do nothing at all."""
    torch.manual_seed(9)
    model = Llama(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.uniform_(0.5, 1.5) if weight.dim() == 1 else weight.normal_(std=0.25)
    for block in model.blocks:
        block.attention.fast = fast
    return model


def tokens_of(batch: int = 2, time: int = 7) -> torch.Tensor:
    return torch.randint(CONFIG.vocab_size, (batch, time), generator=torch.Generator().manual_seed(10))


# Shape


@pytest.mark.parametrize("config", [CONFIG, TIED], ids=["untied", "tied"])
@pytest.mark.parametrize(("batch", "time"), [(2, 7), (1, 1), (3, 0), (0, 4)])
def test_logits_score_the_whole_vocabulary_after_every_token(config, batch, time):
    logits = random_model(config)(tokens_of(batch, time))
    assert logits.shape == (batch, time, 37) and logits.dtype == torch.float32


def test_parameters_have_the_names_and_shapes_of_the_checkpoint_format():
    blocks = {}
    for i in range(2):
        blocks |= {
            f"blocks.{i}.attention_norm.weight": (48,),
            f"blocks.{i}.attention.wq.weight": (60, 48),
            f"blocks.{i}.attention.wk.weight": (20, 48),
            f"blocks.{i}.attention.wv.weight": (20, 48),
            f"blocks.{i}.attention.wo.weight": (48, 60),
            f"blocks.{i}.feedforward_norm.weight": (48,),
            f"blocks.{i}.feedforward.gate.weight": (56, 48),
            f"blocks.{i}.feedforward.up.weight": (56, 48),
            f"blocks.{i}.feedforward.down.weight": (48, 56),
        }
    expected = {"embedding.weight": (37, 48), **blocks, "norm.weight": (48,)}
    assert {name: tuple(w.shape) for name, w in Llama(TIED).state_dict().items()} == expected
    expected["output.weight"] = (37, 48)
    assert {name: tuple(w.shape) for name, w in Llama(CONFIG).state_dict().items()} == expected


def test_a_block_is_two_residual_lines():
    model = random_model()
    x, turn = torch.randn(2, 7, 48), rotation(model.frequency, torch.arange(7))
    block = model.blocks[1]
    middle = x + block.attention(block.attention_norm(x), turn)
    expected = middle + block.feedforward(block.feedforward_norm(middle))
    torch.testing.assert_close(block(x, turn, None), expected)


def test_the_model_is_its_parts_one_after_the_other():
    for config in (CONFIG, TIED):
        model, tokens = random_model(config), tokens_of()
        x, turn = F.embedding(tokens, model.embedding.weight), rotation(frequencies(config), torch.arange(7))
        for block in model.blocks:
            x = block(x, turn, None)
        x = F.rms_norm(x, (48,), model.norm.weight, config.norm_eps)
        head = model.embedding.weight if config.tie_embeddings else model.output.weight
        torch.testing.assert_close(model(tokens), x @ head.T, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model.hidden(tokens), x, rtol=1e-5, atol=1e-5)


@PATHS
def test_no_logits_depend_on_a_later_token(fast):
    model, tokens = random_model(fast=fast), tokens_of()
    later = tokens.clone()
    later[:, 4:] = (later[:, 4:] + 1) % 37
    got, expected = model(later), model(tokens)
    assert torch.equal(got[:, :4], expected[:, :4])
    assert (got[:, 4:] - expected[:, 4:]).abs().amax((0, 2)).min() > 1e-2


@PATHS
def test_rows_of_a_batch_do_not_see_each_other(fast):
    model, tokens = random_model(fast=fast), tokens_of(3)
    rows = torch.cat([model(tokens[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(model(tokens), rows, rtol=1e-5, atol=1e-5)


def test_the_order_of_the_words_matters():
    model = random_model()
    tokens = torch.tensor([[3, 5, 8, 1], [5, 3, 8, 1]])
    last = model(tokens)[:, -1]
    assert (last[0] - last[1]).abs().max() > 0.05


@pytest.mark.parametrize("shape", [(7,), (1, 2, 7), ()])
def test_tokens_without_a_batch_axis_are_refused(shape):
    with pytest.raises(ValueError, match=r"tokens have the shape \(.*\), expected \(batch, time\)"):
        random_model()(torch.zeros(shape, dtype=torch.long))


# Start


def test_a_new_model_is_the_identity_in_every_block_and_unsure_of_the_next_token():
    torch.manual_seed(0)
    model, tokens = Llama(dataclasses.replace(CONFIG, vocab_size=1000)), tokens_of()
    x, turn = torch.randn(2, 7, 48), rotation(model.frequency, torch.arange(7))
    assert all(torch.equal(block(x, turn, None), x) for block in model.blocks)
    loss = F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
    assert loss.item() == pytest.approx(torch.tensor(1000.0).log().item(), abs=0.1)


def test_new_weights_have_std_002_but_for_the_zeros_that_write_into_the_residual_stream():
    torch.manual_seed(0)
    for name, weight in Llama(CONFIG).named_parameters():
        if weight.dim() == 1:
            assert (weight == 1).all(), name
        elif name.endswith(("wo.weight", "down.weight")):
            assert (weight == 0).all(), name
        else:
            assert weight.std().item() == pytest.approx(0.02, rel=0.1), name


def test_a_new_model_starts_to_learn_within_two_steps():
    torch.manual_seed(0)
    model, tokens = Llama(CONFIG), tokens_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for _ in range(2):  # the first step fills wo and down, through which the second one reaches everything else
        optimizer.zero_grad()
        F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()
    assert all(weight.grad.abs().max() > 0 for weight in model.parameters())


@pytest.mark.parametrize("half", [False, True])
def test_checkpointing_keeps_a_fraction_for_the_way_back_and_gives_the_same_gradients(half):
    model, tokens, kept, gradients = random_model(), tokens_of(3, 9), [], []
    for model.checkpointing in (False, True):
        numbers = [0]

        def keep(tensor: torch.Tensor, numbers: list[int] = numbers) -> torch.Tensor:
            numbers[0] += tensor.numel() * (not isinstance(tensor, torch.nn.Parameter))
            return tensor

        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1).float(), tokens[:, 1:].flatten())
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
        kept.append(numbers[0])
    assert kept[1] < kept[0] / 5
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_checkpointing_leaves_writing_alone():
    model, tokens = random_model(), tokens_of()
    expected = model(tokens)
    model.checkpointing = True
    cache = KVCache(CONFIG, 2, 7)
    parts = [model(tokens[:, :4], cache), model(tokens[:, 4:], cache)]
    torch.testing.assert_close(torch.cat(parts, 1), expected)


# Size


@pytest.mark.parametrize("name", PRESETS)
def test_the_parameters_of_every_preset_are_those_published(name):
    config = PRESETS[name]
    with torch.device("meta"):
        model = Llama(config)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == config.n_params() == PUBLISHED.get(name, config.n_params())
    assert set(PUBLISHED) == set(PRESETS) - {"toy", "toy-small"}


# Dtype


LONG = dataclasses.replace(CONFIG, rope_theta=5e5, rope_scaling=Llama3Scaling(8.0, 1.0, 4.0, 2048))


@pytest.mark.parametrize("cast", [lambda m: m.to(torch.bfloat16), lambda m: m.bfloat16(), lambda m: m.half()])
def test_frequencies_stay_in_fp32_when_the_model_is_cast(cast):
    model = cast(Llama(LONG))
    assert model.embedding.weight.dtype != torch.float32
    assert torch.equal(model.frequency, frequencies(LONG))
    inside = cast(torch.nn.Sequential(Llama(LONG)))[0]
    assert torch.equal(inside.frequency, frequencies(LONG))


def test_frequencies_in_bf16_would_turn_far_positions_by_more_than_a_radian():
    exact = frequencies(PRESETS["smollm2-135m"])
    assert (1000 * (exact.bfloat16().float() - exact)).abs().max() > 1


def test_a_model_made_on_the_meta_device_has_its_frequencies_when_it_gets_memory():
    with torch.device("meta"):
        model = Llama(LONG)
    assert torch.equal(model.to_empty(device="cpu").frequency, frequencies(LONG))


def test_frequencies_are_not_saved():
    assert not any("frequency" in name for name in Llama(CONFIG).state_dict())


@PATHS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("time", [33, 1])
def test_low_precision_stays_near_fp32(fast, dtype, time):
    model, tokens = random_model(LONG, fast), tokens_of(time=time)
    with torch.no_grad():  # gradients would put the fast path of bf16 aside
        expected = model(tokens)
        logits = model.to(dtype)(tokens)
    assert logits.dtype == dtype
    assert (logits - expected).norm() < 6 * torch.finfo(dtype).eps * expected.norm()


@PATHS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_in_low_precision_stay_near_those_in_fp32(fast, dtype):
    model, tokens = random_model(fast=fast), tokens_of()
    model(tokens).square().mean().backward()
    expected = [weight.grad for weight in model.parameters()]
    model.zero_grad()
    model.to(dtype)(tokens).float().square().mean().backward()
    for weight, grad in zip(model.parameters(), expected, strict=True):
        assert weight.grad.dtype == dtype
        assert (weight.grad - grad).norm() < 16 * torch.finfo(dtype).eps * grad.norm()


# Device

# "lazy" stands for a GPU: the one device beside the CPU that every build of PyTorch, also one without CUDA, can pretend
# to have. Fake tensors have a shape and a device and no numbers, and refuse to be mixed as real ones do.
ELSEWHERE = "lazy"


def run_elsewhere(config: ModelConfig, fast: bool) -> None:
    """Forward, backward and cached generation, with and without padding, on a device that is not the CPU."""
    with FakeTensorMode():
        with torch.device(ELSEWHERE):
            model = Llama(config)
            tokens, padding = torch.zeros(2, 7, dtype=torch.long), torch.ones(2, dtype=torch.long)
        for block in model.blocks:
            block.attention.fast = fast
        model(tokens).square().mean().backward()
        assert {str(weight.grad.device) for weight in model.parameters()} == {ELSEWHERE}
        for pads in (None, padding):
            cache = KVCache(config, 2, 16, device=ELSEWHERE)
            cache.padding = pads  # not through the constructor, which looks at the numbers
            for step in (4, 2, 1):
                assert str(model(tokens[:, :step], cache).device) == ELSEWHERE
            cache.rewind(5)
            cache.reorder(torch.zeros(2, dtype=torch.long, device=ELSEWHERE))
            model(tokens[:, :1], cache)


@PATHS
@pytest.mark.parametrize("config", [TIED, LONG], ids=["tied", "scaled"])
def test_it_runs_on_another_device(config, fast):
    run_elsewhere(config, fast)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (minillama.model, "rotation"),
        (minillama.model, "frequencies"),
        (minillama.attention, "causal_mask"),
        (minillama.cache, "causal_mask"),
    ],
)
def test_a_tensor_left_on_the_cpu_would_be_seen(module, name, monkeypatch):
    right = getattr(module, name)

    def on_cpu(*args):
        made = right(*args)
        with torch.device("cpu"):
            parts = [torch.empty(part.shape, dtype=part.dtype) for part in ([made] if name != "rotation" else made)]
        return parts[0] if name != "rotation" else tuple(parts)

    monkeypatch.setattr(module, name, on_cpu)
    with pytest.raises(RuntimeError, match="same device|two different devices"):
        run_elsewhere(LONG, fast=True)
