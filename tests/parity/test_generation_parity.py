"""Generation against transformers: the same random weights must give the same tokens, greedy and with beams, and the
filters the same probabilities.

Weights of std 0.3 make a random model choose decidedly, and differently after every context. Sizes are asymmetric:
6 query heads, 2 key/value heads, head_dim 10 where dim / heads is 8.
"""

import functools

import pytest
import torch

from minillama.config import ModelConfig
from minillama.generation import (
    Sampling,
    beam_search,
    generate,
    min_p_filter,
    stream_tokens,
    top_k_filter,
    top_p_filter,
)
from minillama.model import Llama
from tests.parity.test_transformers import names, theirs, to_theirs

transformers = pytest.importorskip("transformers")
from transformers.generation import logits_process  # noqa: E402

V = 37
CONFIG = ModelConfig(dim=48, n_layers=2, n_heads=6, n_kv_heads=2, head_dim=10, ffn_dim=56, vocab_size=V, max_seq_len=64)
GREEDY = Sampling(temperature=0)
SEEDS = range(6)


@functools.cache
def pair_of_models(seed: int) -> tuple[Llama, "transformers.LlamaForCausalLM"]:
    generator = torch.Generator().manual_seed(seed)
    ours, other = Llama(CONFIG), transformers.LlamaForCausalLM(theirs(CONFIG)).eval()
    other.generation_config.bos_token_id = other.generation_config.eos_token_id = None
    parameters = dict(other.named_parameters())
    with torch.no_grad():
        for name, weight in ours.named_parameters():
            if weight.dim() == 1:
                weight.uniform_(0.5, 1.5, generator=generator)
            else:
                weight.normal_(std=0.3, generator=generator)
            parameters[names(CONFIG)[name]].copy_(to_theirs(name, weight, CONFIG))
    return ours, other


def prompt_of(seed: int, length: int = 7) -> list[int]:
    return torch.randint(V, (length,), generator=torch.Generator().manual_seed(100 + seed)).tolist()


def all_real(prompt: list[int]) -> dict[str, torch.Tensor]:
    """A prompt for transformers, which without a mask takes its pad token, wherever it stands, for padding."""
    return {"input_ids": torch.tensor([prompt]), "attention_mask": torch.ones(1, len(prompt), dtype=torch.int64)}


def ids_of(steps, row: int = 0) -> list[int]:
    return [step[row] for step in steps if step[row] is not None]


@pytest.mark.parametrize("seed", SEEDS)
def test_greedy_gives_the_tokens_of_transformers(seed):
    ours, other = pair_of_models(seed)
    prompt = prompt_of(seed)
    expected = other.generate(**all_real(prompt), max_new_tokens=40, do_sample=False)[0, len(prompt) :].tolist()
    assert len(set(expected)) > 5  # not one token over and over
    assert ids_of(stream_tokens(ours, [prompt], max_new_tokens=40, sampling=GREEDY)) == expected


@pytest.mark.parametrize("seed", SEEDS)
def test_a_greedy_batch_of_different_lengths_gives_the_tokens_of_transformers_up_to_eos(seed):
    ours, other = pair_of_models(seed)
    prompts = [prompt_of(seed * 10 + n, length) for n, length in enumerate((3, 11, 7, 1))]
    longest = max(map(len, prompts))
    padded = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    stop_ids = [2, 8, 13, 21, 34]
    expected = other.generate(
        padded, attention_mask=mask, max_new_tokens=20, do_sample=False, eos_token_id=stop_ids, pad_token_id=0
    )[:, longest:].tolist()
    steps = list(stream_tokens(ours, prompts, max_new_tokens=20, sampling=GREEDY, stop_ids=stop_ids))
    for row in range(len(prompts)):
        got = ids_of(steps, row)
        assert got == expected[row][: len(got)]
        assert len(got) == 20 or got[-1] in stop_ids
        assert not set(got[:-1]) & set(stop_ids)


@pytest.mark.parametrize("beams, n_best, length_penalty", [
    (2, 1, 1.0), (3, 3, 1.0), (4, 2, 0.0), (5, 5, 2.0), (4, 4, -1.0), (3, 1, 0.6),
])  # fmt: skip
@pytest.mark.parametrize("stop_ids", [(), (5,), (2, 8, 13, 21, 34)], ids=["no stop", "one stop", "five stops"])
def test_beams_and_their_scores_are_those_of_transformers(beams, n_best, length_penalty, stop_ids):
    for seed in SEEDS:
        ours, other = pair_of_models(seed)
        prompt = prompt_of(seed)
        expected = other.generate(
            **all_real(prompt), max_new_tokens=12, do_sample=False, num_beams=beams, num_return_sequences=n_best,
            length_penalty=length_penalty, early_stopping=False, eos_token_id=list(stop_ids) or None, pad_token_id=1,
            return_dict_in_generate=True, output_scores=True,
        )  # fmt: skip
        got = beam_search(
            ours, prompt, beams=beams, max_new_tokens=12, length_penalty=length_penalty, n_best=n_best,
            stop_ids=stop_ids,
        )  # fmt: skip
        assert len(got) == n_best
        for beam, ids, score in zip(got, expected.sequences.tolist(), expected.sequences_scores.tolist(), strict=True):
            assert beam.ids == ids[len(prompt) : len(prompt) + len(beam.ids)]
            assert set(ids[len(prompt) + len(beam.ids) :]) <= {1}  # padding
            assert beam.score == pytest.approx(score, rel=1e-4)


def test_beams_end_at_different_lengths_in_these_tests():
    found = [
        beam
        for seed in SEEDS
        for beam in beam_search(
            pair_of_models(seed)[0], prompt_of(seed), beams=4, n_best=4, max_new_tokens=12, stop_ids=(2, 8, 13, 21, 34)
        )
    ]
    assert len({len(beam.ids) for beam in found}) >= 4


def rows_of_logits() -> torch.Tensor:
    """Ordinary rows, flat and peaked ones, and rows with many ties."""
    generator = torch.Generator().manual_seed(7)
    plain = torch.randn(6, V, generator=generator) * torch.tensor([0.1, 1, 1, 3, 10, 40])[:, None]
    ties = torch.randint(-2, 3, (4, V), generator=generator).float()
    return torch.cat([plain, ties, torch.zeros(1, V)])


@pytest.mark.parametrize("k", [1, 2, 5, V, V + 10])
def test_top_k_keeps_what_transformers_keeps_with_ties(k):
    logits = rows_of_logits()
    expected = logits_process.TopKLogitsWarper(k)(None, logits)
    assert torch.equal(top_k_filter(logits, k), expected)


@pytest.mark.parametrize("p", [0.05, 0.3, 0.777, 0.9, 0.99])
def test_top_p_keeps_what_transformers_keeps(p):
    logits = rows_of_logits()
    expected = logits_process.TopPLogitsWarper(p)(None, logits)
    got = top_p_filter(logits, p)
    assert torch.equal(got[:6], expected[:6])
    # Among equals transformers' choice is left to chance (an unstable sort): the number of each value is the same.
    assert torch.equal(got.sort(-1).values, expected.sort(-1).values)


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9, 1.0])
def test_min_p_keeps_what_transformers_keeps(p):
    logits = rows_of_logits()
    assert torch.equal(min_p_filter(logits, p), logits_process.MinPLogitsWarper(p)(None, logits))


@pytest.mark.parametrize("settings", [
    {"temperature": 0.7}, {"temperature": 3.0}, {"top_k": 5, "temperature": 1.3}, {"top_p": 0.9, "temperature": 0.5},
    {"min_p": 0.05}, {"temperature": 0.8, "top_k": 20, "top_p": 0.8, "min_p": 0.1},
])  # fmt: skip
def test_all_settings_together_give_the_probabilities_of_transformers(settings):
    logits = rows_of_logits()[:6]  # without ties
    scores = logits_process.TemperatureLogitsWarper(settings.get("temperature", 1.0))(None, logits)
    if "top_k" in settings:
        scores = logits_process.TopKLogitsWarper(settings["top_k"])(None, scores)
    if "top_p" in settings:
        scores = logits_process.TopPLogitsWarper(settings["top_p"])(None, scores)
    if "min_p" in settings:
        scores = logits_process.MinPLogitsWarper(settings["min_p"])(None, scores)
    torch.testing.assert_close(Sampling(**settings).probabilities(logits), scores.softmax(-1), rtol=1e-4, atol=1e-6)


def test_transformers_own_order_of_the_filters_is_ours():
    """Not only each filter alone: the list that transformers itself builds for these settings."""
    _, other = pair_of_models(0)
    settings = {"temperature": 0.8, "top_k": 9, "top_p": 0.7, "min_p": 0.08}
    config = transformers.GenerationConfig(do_sample=True, **settings)
    config._eos_token_tensor = None
    warpers = other._get_logits_processor(config, device="cpu")
    logits = rows_of_logits()[:6]
    expected = warpers(torch.zeros(6, 1, dtype=torch.int64), logits).softmax(-1)
    torch.testing.assert_close(Sampling(**settings).probabilities(logits), expected, rtol=1e-4, atol=1e-6)


def test_generate_with_beams_leads_to_the_same_search():
    class Numbers:  # a tokenizer whose tokens are written as numbers
        bos_id, add_bos, stop_ids = 1, False, frozenset({5})

        def decode_stream(self, ids, start):
            return (f" {i}" for i in ids if i != 5)

    ours, other = pair_of_models(3)
    prompts = [prompt_of(3), prompt_of(4, 5)]
    expected = []
    for prompt in prompts:
        found = other.generate(
            **all_real(prompt), max_new_tokens=9, do_sample=False, num_beams=4, num_return_sequences=2,
            eos_token_id=5, pad_token_id=5,
        )[:, len(prompt) :]  # fmt: skip
        expected.append(["".join(f" {i}" for i in ids if i != 5) for ids in found.tolist()])
    assert generate(ours, Numbers(), prompts, beams=4, n_best=2, max_new_tokens=9) == expected
    assert generate(ours, Numbers(), prompts[0], beams=4, max_new_tokens=9) == expected[0][0]
