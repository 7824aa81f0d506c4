"""Weights in 8 and 4 bits: layers compute with what they say, the rounding is what theory says, models still work."""

import copy
import math

import gguf
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from minillama import generate, load
from minillama.cache import KVCache
from minillama.checkpoint.gguf_file import Blocks, read_int4
from minillama.checkpoint.memory import needed_memory
from minillama.config import ModelConfig
from minillama.model import Llama
from minillama.quantize import Int4Linear, Int8Linear, JoinedBlock, put, quantize

KINDS = {"int8": Int8Linear.from_float, "int4": Int4Linear.from_float}
each_kind = pytest.mark.parametrize("kind", KINDS)


JOINABLE = ModelConfig(
    dim=192, n_layers=2, n_heads=6, n_kv_heads=2, head_dim=32, ffn_dim=320, vocab_size=48, max_seq_len=64
)


def random_model(config: ModelConfig) -> Llama:
    torch.manual_seed(0)
    model = Llama(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2) if parameter.dim() == 2 else parameter.uniform_(0.5, 1.5)
    return model


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@each_kind
@pytest.mark.parametrize("shape", [(1,), (1, 1), (3, 5), (40,), (2, 33)])
@pytest.mark.parametrize("size", [(96, 64), (32, 160), (576, 96)])
def test_a_layer_computes_with_the_weight_that_it_gives_back(kind, shape, size):
    layer = KINDS[kind](gaussian(*size))
    x = gaussian(*shape, size[1], seed=1).bfloat16()
    expected = x.double() @ layer.dequantize().double().T
    got = layer(x)
    assert got.dtype == torch.bfloat16 and got.shape == expected.shape
    assert (got.double() - expected).abs().max() <= 2**-7 * expected.abs().max()  # bf16 has 8 bits


def test_the_rounding_error_is_the_theoretical_one():
    """Rounding to a grid of step s makes an error of s/√12, as a root mean square (Widrow and Kollár 2008)."""
    weight = gaussian(512, 1024)
    error = (Int8Linear.from_float(weight).dequantize() - weight).double().square().mean().sqrt().item()
    step = (weight.abs().amax(1) / 127).double().square().mean().sqrt().item()
    assert error == pytest.approx(step / math.sqrt(12), rel=0.03)
    grouped = weight.view(512, -1, 32)
    step = ((grouped.amax(-1) - grouped.amin(-1)) / 15).double().square().mean().sqrt().item()
    error = (Int4Linear.from_float(weight).dequantize().float() - weight).double().square().mean().sqrt().item()
    # The smallest and the largest of each group lie on its grid, without an error.
    assert error == pytest.approx(step / math.sqrt(12) * math.sqrt(30 / 32), rel=0.02)
    assert 0.075 < error < 0.083


@pytest.mark.parametrize("group", [32, 64, 128])
def test_larger_groups_are_less_exact(group):
    weight = gaussian(64, 256)
    error = (Int4Linear.from_float(weight, group).dequantize().float() - weight).square().mean().sqrt().item()
    assert error == pytest.approx({32: 0.079, 64: 0.091, 128: 0.103}[group], rel=0.05)
    with pytest.raises(ValueError, match=r"shape \(16, 40\) cannot be cut into groups of 32, 16 rows at a time"):
        Int4Linear.from_float(gaussian(16, 40))


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1"])
def test_a_file_in_4_bits_stays_as_it_is(kind, tmp_path):
    weight = gaussian(96, 160)
    which = gguf.GGMLQuantizationType[kind]
    data = gguf.quants.quantize(weight.numpy(), which)
    path = tmp_path / "blocks"
    path.write_bytes(b"12345" + data.tobytes())
    layer = read_int4(path, Blocks((96, 160), which, 5), torch.device("cpu"), (96, 160), (0, 0))
    expected = torch.from_numpy(np.array(gguf.quants.dequantize(data, which))).double()
    # The codes are the file's. Only three roundings to bf16 (8 bits) lie between: of a scale, a middle and their sum.
    scales = torch.from_numpy(data.reshape(96, 5, -1)[..., :2].copy().view(np.float16)).double().abs()
    grouped = expected.view(96, 5, 32)
    bound = 2**-8 * (8 * scales + (grouped.amin(-1) + 8 * scales[..., 0]).abs()[..., None] + grouped.abs())
    assert ((layer.dequantize().double().view(96, 5, 32) - grouped).abs() <= bound).all()
    assert layer.codes.nbytes == 96 * 160 // 2
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="became shorter"):
        read_int4(path, Blocks((96, 160), which, 5), torch.device("cpu"), (96, 160), (0, 0))


@each_kind
def test_the_toy_still_tells_its_stories(kind):
    exact, tokenizer = load("toy")
    model, _ = load("toy", dtype=kind)
    text = generate(exact, tokenizer, "", temperature=0.8, seed=0)
    tokens = torch.tensor([tokenizer.encode(text, bos=True)])
    with torch.inference_mode():
        wanted, got = exact(tokens).log_softmax(-1), model(tokens).float().log_softmax(-1)
    kl = F.kl_div(got[0], wanted[0], log_target=True, reduction="batchmean").item()
    assert kl < {"int8": 0.01, "int4": 0.25}[kind], kl
    assert generate(model, tokenizer, "Once upon a time", temperature=0, max_new_tokens=20)
    held = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    assert held <= 1.05 * needed_memory(exact.config, kind)


@pytest.mark.parametrize(("kind", "bound"), [("int8", 0.02), ("int4", 0.006)])
def test_smollm2_keeps_its_guesses(kind, bound):
    """Its file is in 4 bits already, so "int4" only rounds scales, and "int8" sets another grid over that one."""
    exact, tokenizer = load("smollm2")
    model, _ = load("smollm2", dtype=kind)
    text = "A notebook-first course in which people build a language model from nothing, and learn why each part is so."
    tokens = torch.tensor([tokenizer.encode(text)])
    with torch.inference_mode():
        wanted, got = exact(tokens).log_softmax(-1), model(tokens).float().log_softmax(-1)
    kl = F.kl_div(got[0], wanted[0], log_target=True, reduction="batchmean").item()
    assert kl < bound, kl
    held = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    assert held < {"int8": 140e6, "int4": 98e6}[kind]


def test_a_model_is_quantized_in_place_and_rows_that_do_not_fit_become_8_bits():
    config = ModelConfig(
        dim=64, n_layers=2, n_heads=6, n_kv_heads=2, head_dim=10, ffn_dim=96, vocab_size=37, max_seq_len=64
    )
    model, tokens = random_model(config), torch.randint(37, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = model(tokens)
        assert quantize(model, "int4") is model
        got = model(tokens).float()
    assert isinstance(model.blocks[0].feedforward.down, Int4Linear) and isinstance(model.output, Int8Linear)
    assert isinstance(model.blocks[0].attention.wq, Int8Linear)  # 60 rows
    assert isinstance(model.blocks[0].attention.wo, Int8Linear)  # rows of 60
    assert (got - expected).square().mean().sqrt() < 0.25 * expected.std()
    with pytest.raises(ValueError, match="expected 'int8' or 'int4'"):
        quantize(model, "int3")


def written(model: Llama, tokens: torch.Tensor) -> torch.Tensor:
    """Logits of a prompt of three tokens, and of the others one by one."""
    cache = KVCache(JOINABLE, 1, tokens.shape[1], dtype=torch.bfloat16)
    with torch.inference_mode():
        parts = [model(part, cache) for part in tokens.split([3] + [1] * (tokens.shape[1] - 3), dim=1)]
    return torch.cat(parts, dim=1)


@each_kind
def test_joined_matrices_give_what_single_ones_give(kind):
    single, joined = random_model(JOINABLE), quantize(random_model(JOINABLE), kind)
    tokens = torch.randint(48, (2, 11), generator=torch.Generator().manual_seed(1))
    for name, weight in list(single.named_parameters()):
        put(single, name, weight.detach(), kind)
    assert all(type(block) is JoinedBlock for block in joined.blocks)
    with torch.inference_mode():
        assert torch.equal(joined(tokens), single(tokens))
    assert torch.equal(written(joined, tokens[:1]), written(single, tokens[:1]))


@each_kind
def test_a_token_through_the_kernels_alone_is_the_one_through_the_modules_and_hooks_are_heard(kind):
    model = quantize(random_model(JOINABLE), kind)
    tokens = torch.randint(48, (1, 12), generator=torch.Generator().manual_seed(1))
    alone, heard = written(model, tokens), []
    with torch.inference_mode():  # the same as a whole, rounded in another order
        torch.testing.assert_close(alone, model(tokens), rtol=0, atol=0.03 * alone.abs().max().item())
    for block in model.blocks:
        block.feedforward.down.register_forward_hook(lambda module, x, y: heard.append(y.shape))
    assert torch.equal(written(model, tokens), alone)
    assert heard == 2 * [(1, 3, 192)] + 18 * [(1, 1, 192)]
    assert torch.equal(written(copy.deepcopy(model), tokens), alone)


def test_four_bits_do_not_move_to_another_kind_of_device():
    with pytest.raises(ValueError, match="lie in the order of 'cpu', and 'meta' has another: load the checkpoint with"):
        quantize(random_model(JOINABLE), "int4").to("meta")


@pytest.mark.gpu
@each_kind
def test_on_a_gpu_a_layer_computes_with_the_same_weight(kind):
    weight, x = gaussian(96, 64), gaussian(3, 64, seed=1).bfloat16()
    here, there = KINDS[kind](weight), KINDS[kind](weight.cuda())
    assert (there.dequantize().cpu().float() - here.dequantize().float()).abs().max() <= 2**-7 * weight.abs().max()
    expected = x.double() @ here.dequantize().double().T
    assert (there(x.cuda()).cpu().double() - expected).abs().max() <= 2**-6 * expected.abs().max()
