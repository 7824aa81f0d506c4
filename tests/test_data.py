"""Batches: what is scored, that padding changes nothing, that a step's data depend on its number alone; the floor."""

import random

import pytest
import torch

from minillama import world
from minillama.config import ModelConfig
from minillama.data import StoryBatches, TextBatches, stack, story_validation
from minillama.loss import IGNORE, cross_entropy
from minillama.model import Llama
from minillama.tokenizer import SentencePieceTokenizer


@pytest.fixture(scope="module")
def tokenizer() -> SentencePieceTokenizer:
    rng = random.Random(5)
    return SentencePieceTokenizer.train([world.sample(rng).text for _ in range(200)], vocab_size=400)


def test_targets_are_the_inputs_shifted_by_one_and_padding_is_not_scored():
    batch = stack([[1, 5, 6, 7, 2], [1, 8, 2]], pad_id=3)
    assert batch.inputs.tolist() == [[1, 5, 6, 7], [1, 8, 3, 3]]
    assert batch.targets.tolist() == [[5, 6, 7, 2], [8, 2, IGNORE, IGNORE]]
    assert batch.scored == 6


def test_the_padding_of_a_row_changes_no_loss():
    torch.manual_seed(0)
    model = Llama(ModelConfig(dim=12, n_layers=1, n_heads=2, head_dim=6, vocab_size=11, max_seq_len=20))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    rows = [[1, 4, 5, 6, 7, 2], [1, 9, 2]]
    together = stack(rows, pad_id=3)
    apart = [stack([row], pad_id=3) for row in rows]
    losses = [cross_entropy(model(b.inputs), b.targets).item() * b.scored for b in apart]
    whole = cross_entropy(model(together.inputs), together.targets).item()
    assert whole == pytest.approx(sum(losses) / 7, rel=1e-5)


def test_a_row_of_a_story_batch_is_a_whole_story_from_bos_to_eos(tokenizer):
    batch = StoryBatches(tokenizer, 5, seed=3)(7)
    assert len(batch.inputs) == 5
    for inputs, targets in zip(batch.inputs, batch.targets, strict=True):
        scored = targets[targets != IGNORE].tolist()
        assert inputs[0] == tokenizer.bos_id and scored[-1] == tokenizer.eos_id
        world.log_prob(tokenizer.decode(scored))  # raises a Fault if it is no story


def test_what_a_step_sees_depends_on_the_seed_and_its_number_alone(tokenizer):
    source, again, other = (StoryBatches(tokenizer, 4, seed=seed) for seed in (1, 1, 0))
    in_order = [source(step).inputs for step in range(34)]
    for step in (33, 2, 17, 0):
        assert torch.equal(again(step).inputs, in_order[step])
    assert not any(torch.equal(other(step).inputs, in_order[step]) for step in range(34))
    texts = [tokenizer.decode(row.tolist()) for inputs in in_order for row in inputs]
    assert len(set(texts)) == len(texts)


def test_rows_of_like_length_share_a_batch(tokenizer):
    source = StoryBatches(tokenizer, 8, seed=2)
    batches = [source(step) for step in range(16)]
    assert sum(b.scored for b in batches) > 0.97 * sum(b.targets.numel() for b in batches)


def test_windows_of_text_are_shifted_by_one_and_repeatable():
    source = TextBatches(torch.arange(50), batch_size=3, length=9, seed=4)
    batch = source(12)
    assert torch.equal(batch.targets, batch.inputs + 1) and batch.inputs.shape == (3, 9)
    assert torch.equal(TextBatches(torch.arange(50), 3, 9, seed=4)(12).inputs, batch.inputs)
    assert not torch.equal(source(13).inputs, batch.inputs)
    starts = {int(row[0]) for step in range(300) for row in source(step).inputs}
    assert starts == set(range(41))  # the first and the last window included


def test_a_text_shorter_than_a_window_is_refused_with_both_lengths():
    with pytest.raises(ValueError, match="9 tokens.*needs 10"):
        TextBatches(torch.arange(9), batch_size=3, length=9)


@pytest.mark.parametrize("heldout", [False, True])
def test_the_floor_is_the_mean_surprise_of_the_stories_over_all_scored_tokens(tokenizer, heldout):
    validation = story_validation(tokenizer, 30, seed=6, batch_size=7, heldout=heldout)
    rows = [t[t != IGNORE].tolist() for batch in validation.batches for t in batch.targets]
    texts = [tokenizer.decode(row) for row in rows]
    nats = -sum(world.log_prob(text, heldout) for text in texts)
    assert len(texts) == 30 and validation.floor == pytest.approx(nats / sum(map(len, rows)), rel=1e-12)


def test_validation_stories_are_other_stories_than_the_ones_trained_on(tokenizer):
    validation = story_validation(tokenizer, 40, seed=0)
    source = StoryBatches(tokenizer, 8, seed=0)
    seen = {tokenizer.decode(row.tolist()) for step in range(16) for row in source(step).inputs}
    kept = {tokenizer.decode(row.tolist()) for batch in validation.batches for row in batch.inputs}
    assert len(kept) == 40 and not seen & kept
