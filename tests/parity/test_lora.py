"""LoRA against peft: the same adapter on the same model gives the same logits, whoever wrote it."""

import dataclasses
import json

import pytest
import torch

from minillama.checkpoint import load, save_huggingface
from minillama.config import ModelConfig
from minillama.finetune import TARGETS, LoraLinear, add_lora, load_adapter, merge, save_adapter
from minillama.model import Llama

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

TOLERANCE = 2e-5  # of the largest value
CONFIG = ModelConfig(
    dim=48, n_layers=3, n_heads=6, n_kv_heads=2, head_dim=10, ffn_dim=56, vocab_size=37, max_seq_len=64
)
TOKENS = torch.randint(37, (2, 23), generator=torch.Generator().manual_seed(3))
some = pytest.mark.parametrize("targets", [["wq", "wv"], ["wk", "down"], list(TARGETS)], ids="+".join)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with large random weights, in Hugging Face's layout."""
    torch.manual_seed(20)
    model = Llama(dataclasses.replace(CONFIG, tie_embeddings=True))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.uniform_(0.5, 1.5) if weight.dim() == 1 else weight.normal_(std=0.2 if "embed" in name else 0.25)
    save_huggingface(model, None, path := tmp_path_factory.mktemp("base") / "model")
    return path


def theirs(folder) -> "transformers.LlamaForCausalLM":
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def difference(got: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, as a part of the largest value."""
    assert got.shape == expected.shape and expected.isfinite().all()
    return ((got - expected).abs().max() / expected.abs().max()).item()


@some
@torch.no_grad()
def test_peft_opens_our_adapter_and_gives_the_same_logits(targets, folder, tmp_path):
    model, _ = load(folder)
    before = model(TOKENS)
    add_lora(model, rank=3, alpha=5, targets=targets)
    for module in model.modules():
        if isinstance(module, LoraLinear):
            module.b.normal_(std=0.3)
    mine = model(TOKENS)
    save_adapter(model, tmp_path / "adapter")
    opened = peft.PeftModel.from_pretrained(theirs(folder), tmp_path / "adapter")
    expected = opened(TOKENS).logits
    assert difference(mine, expected) <= TOLERANCE
    assert difference(merge(model)(TOKENS), opened.merge_and_unload()(TOKENS).logits) <= TOLERANCE
    assert difference(before, expected) > 0.1  # the adapter does something


@some
@torch.no_grad()
def test_we_open_what_peft_wrote(targets, folder, tmp_path):
    settings = peft.LoraConfig(r=3, lora_alpha=5, target_modules=[TARGETS[t] for t in targets], lora_dropout=0.1)
    other = peft.get_peft_model(theirs(folder), settings)
    for name, weight in other.named_parameters():
        if "lora_B" in name:
            weight.normal_(std=0.3)
    other.eval().save_pretrained(tmp_path)
    model = load_adapter(load(folder)[0], tmp_path)
    assert difference(model(TOKENS), other(TOKENS).logits) <= TOLERANCE


@torch.no_grad()
def test_an_adapter_in_fp32_beside_weights_in_bf16(folder, tmp_path):
    model, _ = load(folder, dtype=torch.bfloat16)
    add_lora(model, 4, 8, ["wq", "down"])
    for module in model.modules():
        if isinstance(module, LoraLinear):
            module.b.normal_(std=0.1)
    layer = model.blocks[1].feedforward.down
    assert layer.a.dtype == layer.b.dtype == torch.float32 and layer.weight.dtype == torch.bfloat16
    x = torch.randn(2, 5, CONFIG.ffn_dim, generator=torch.Generator().manual_seed(0)).bfloat16()
    save_adapter(model, tmp_path / "adapter")
    half = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    opened = peft.PeftModel.from_pretrained(half, tmp_path / "adapter")
    other = opened.base_model.model.model.layers[1].mlp.down_proj
    assert layer(x).dtype == torch.bfloat16 and difference(layer(x).float(), other(x).float()) < 2**-8


@torch.no_grad()
def test_gradients_are_those_of_peft(folder, tmp_path):
    model = add_lora(load(folder)[0], 3, 5, list(TARGETS))
    for module in model.modules():
        if isinstance(module, LoraLinear):
            module.b.normal_(std=0.3)
    save_adapter(model, tmp_path / "adapter")
    other = peft.PeftModel.from_pretrained(theirs(folder), tmp_path / "adapter", is_trainable=True)
    weight = torch.randn(2, 23, 37, generator=torch.Generator().manual_seed(4))
    with torch.enable_grad():
        (model(TOKENS) * weight).sum().backward()
        (other(TOKENS).logits * weight).sum().backward()
    for i, block in enumerate(model.blocks):
        layer = other.base_model.model.model.layers[i]
        for mine, expected in (
            (block.attention.wv, layer.self_attn.v_proj),
            (block.feedforward.down, layer.mlp.down_proj),
        ):
            assert difference(mine.a.grad, expected.lora_A.default.weight.grad) <= TOLERANCE
            assert difference(mine.b.grad, expected.lora_B.default.weight.grad) <= TOLERANCE
            assert mine.weight.grad is None


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"use_rslora": True}, "use_rslora"),
        ({"bias": "all"}, "bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 2}}, "alpha_pattern"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"layers_to_transform": [0]}, "layers_to_transform"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication"),
        ({"lora_bias": True}, "lora_bias"),
        ({"init_lora_weights": "olora"}, "init_lora_weights"),
        ({"target_modules": "all-linear"}, "target_modules"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "target_modules"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
    ],
)
def test_settings_of_peft_that_ask_for_more_are_refused_by_name(options, name, folder, tmp_path):
    settings = peft.LoraConfig(**{"r": 3, "lora_alpha": 5, "target_modules": ["q_proj"], **options})
    settings.save_pretrained(tmp_path)
    assert name in json.loads((tmp_path / "adapter_config.json").read_text())
    with pytest.raises(ValueError, match=rf"adapter_config.json: (it has )?{name} (=|is) "):
        load_adapter(load(folder)[0], tmp_path)
