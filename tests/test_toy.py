"""The shipped toy: small enough, as good as its card says, and made by the recipe beside it."""

import json
import random
import re
import runpy
from pathlib import Path

import pytest
import torch

from minillama import generate, load, world
from minillama.data import StoryBatches, story_validation
from minillama.model import Llama
from minillama.tokenizer import SentencePieceTokenizer
from minillama.trainer import Trainer, mean_loss

DATA = Path(__file__).parents[1] / "data"
CARD = (DATA / "MODEL_CARD.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def toy():
    return load("toy")


@pytest.fixture(scope="module")
def recipe() -> dict:
    return runpy.run_path(str(DATA / "make.py"), run_name="make")


def share_accepted(toy, temperature: float) -> float:
    model, tokenizer = toy
    accepted = 0
    for seed in range(0, 500, 100):
        for text in generate(model, tokenizer, [""] * 100, max_new_tokens=200, temperature=temperature, seed=seed):
            try:
                world.log_prob(text)
                accepted += 1
            except world.Fault:
                pass
    return accepted / 500


@pytest.fixture(scope="module")
def shares(toy) -> dict[float, float]:
    return {temperature: share_accepted(toy, temperature) for temperature in (0.8, 1.0)}


@pytest.mark.parametrize("temperature", [0.8, 1.0])
def test_the_world_accepts_as_many_of_its_stories_as_the_card_says(shares, temperature):
    said = float(re.search(rf"\| {temperature} \| ([\d.]+)%", CARD)[1]) / 100
    assert abs(shares[temperature] - said) < 0.02, f"the card says {said:.1%}, measured {shares[temperature]:.1%}"


@pytest.mark.parametrize("temperature, least", [(0.8, 0.9), (1.0, 0.8)])
def test_the_world_accepts_most_of_its_stories(shares, temperature, least):
    assert shares[temperature] >= least


@pytest.fixture(scope="module")
def loss_and_floor(toy) -> tuple[float, float]:
    validation = story_validation(toy[1], 500, seed=0)
    return mean_loss(toy[0], validation.batches), validation.floor


def test_its_loss_is_what_the_card_says(loss_and_floor):
    loss, floor = loss_and_floor
    numbers = re.search(r"the floor is ([\d.]+) nats.*reaches ([\d.]+), which is ([\d.]+) above", CARD, re.DOTALL)
    said_floor, reached, above = (float(number) for number in numbers.groups())
    assert said_floor == pytest.approx(floor, abs=6e-5) and reached == pytest.approx(loss, abs=2e-4)
    assert above == pytest.approx(loss - floor, abs=2e-4)


def test_its_loss_is_within_a_hundredth_of_a_nat_of_the_floor(loss_and_floor):
    loss, floor = loss_and_floor
    assert loss - floor < 0.01


def test_the_checkpoint_is_at_most_ten_megabytes():
    assert sum(path.stat().st_size for path in (DATA / "toy").iterdir()) <= 10_000_000


def test_the_tokenizer_covers_stories_tasks_and_chinese_without_falling_to_bytes(toy):
    tokenizer = toy[1]
    bytes_ = set(range(7, 7 + 256))
    assert [tokenizer.piece(i) for i in (7, 7 + 255)] == ["\\x00", "\\xff"]
    rng = random.Random(99)
    for _ in range(300):
        for task in world.tasks(world.sample(rng)):
            for text in (task.prompt, task.answer):
                ids = tokenizer.encode(text)
                assert not bytes_ & set(ids) and tokenizer.decode(ids) == text


def test_the_longest_story_with_its_longest_task_fits_into_the_context(toy):
    model, tokenizer = toy
    rng = random.Random(98)
    longest = 0
    for _ in range(1500):
        for task in world.tasks(world.sample(rng)):
            if task.kind == "translation":
                turns = [{"role": "user", "content": task.prompt}, {"role": "assistant", "content": task.answer}]
                longest = max(longest, len(tokenizer.chat(turns, reply=False)))
    assert 250 < longest < 0.9 * model.config.max_seq_len


def test_the_tokenizer_is_the_one_that_the_recipe_makes(toy, recipe, tmp_path):
    made = SentencePieceTokenizer.train(recipe["tokenizer_texts"](), vocab_size=recipe["CONFIG"].vocab_size)
    made.save(tmp_path)
    assert (tmp_path / "tokenizer.model").read_bytes() == (DATA / "toy" / "tokenizer.model").read_bytes()


def test_the_recipe_begins_as_the_recorded_run_did(toy, recipe, tmp_path):
    torch.manual_seed(0)
    batches = StoryBatches(toy[1], recipe["BATCH_SIZE"], seed=0)
    trainer = Trainer(Llama(recipe["CONFIG"]), None, batches, recipe["SETTINGS"], tmp_path)
    recorded = [json.loads(line) for line in (DATA / "training.jsonl").read_text().splitlines()][:3]
    for then in recorded:
        now = trainer._one_step()
        assert (now["step"], now["tokens"], now["rate"]) == (then["step"], then["tokens"], then["rate"])
        assert now["loss"] == pytest.approx(then["loss"], rel=2e-3)  # another processor rounds bf16 otherwise


def test_the_checkpoints_along_the_way_get_better_and_are_in_bf16(toy, recipe):
    validation = story_validation(toy[1], 40, seed=1)
    losses = []
    for step in recipe["SNAPSHOTS"]:
        weights = DATA / "toy-steps" / str(step) / "model.safetensors"
        model, _ = load(weights.parent)
        assert weights.stat().st_size < 2.1 * model.config.n_params()
        losses.append(mean_loss(model, validation.batches))
    assert len(losses) in (5, 6) and losses == sorted(losses, reverse=True)
    assert losses[-1] > mean_loss(toy[0], validation.batches)


def test_the_sample_of_the_corpus_is_true():
    rows = [json.loads(line) for line in (DATA / "stories.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 1000
    for row in rows[::10]:
        story = world.read(row["text"])
        assert (story.facts, story.chinese) == (row["facts"], row["chinese"])
        assert story.log_prob == pytest.approx(row["log_prob"], abs=1e-8)


def test_the_data_card_is_what_the_recipe_counts(toy, recipe):
    assert (DATA / "README.md").read_text(encoding="utf-8") == recipe["data_card"](toy[1])
