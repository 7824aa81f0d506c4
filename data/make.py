"""Make everything in this folder again: `make toy`, or `python data/make.py`.

The tokenizer, the toy model, the checkpoints along its way, the sample of the corpus and the two cards. One thread, so
that sums are added up in the same order on every machine; the run can be stopped with Ctrl-C and goes on where it was.
"""

import json
import random
import shutil
from pathlib import Path

import torch

from minillama import generate, world
from minillama.checkpoint import load, save
from minillama.config import ModelConfig
from minillama.data import StoryBatches, Validation, story_validation
from minillama.model import Llama
from minillama.tokenizer import SentencePieceTokenizer
from minillama.trainer import Trainer, TrainSettings, mean_loss

HERE = Path(__file__).parent
RUN = HERE.parent / "work" / "toy"
CONFIG = ModelConfig.preset("toy")
SETTINGS = TrainSettings(steps=8000, learning_rate=8e-3, warmup=100, validate_every=200, save_every=200)
BATCH_SIZE = 16
SNAPSHOTS = (100, 300, 600, 1000, 2000, 4000)  # before, while and after the copying heads form
SAMPLES = 500


def tokenizer_texts(stories: int = 6000) -> list[str]:
    """What the vocabulary is learned from: stories and all their tasks. Chinese has no spaces, so its sentences would
    melt into long tokens; a few translations are enough to have every character."""
    rng = random.Random("tokenizer")
    texts = []
    for number in range(stories):
        story = world.sample(rng)
        for task in world.tasks(story):
            if task.kind != "translation":
                texts += [task.prompt.rpartition("\n")[2], task.answer]
            elif number % 40 == 0:
                texts.append(task.answer)
    return texts


def train(tokenizer: SentencePieceTokenizer, validation: Validation) -> Trainer:
    torch.manual_seed(0)
    batches = StoryBatches(tokenizer, BATCH_SIZE, seed=0)
    trainer = Trainer(Llama(CONFIG), tokenizer, batches, SETTINGS, RUN, validation, SNAPSHOTS)
    trainer.run()
    return trainer


def accepted(model: Llama, tokenizer: SentencePieceTokenizer, temperature: float) -> tuple[int, list[str]]:
    """Of SAMPLES stories, how many the world accepts; and what is wrong with the others."""
    texts = []
    for seed in range(0, SAMPLES, 100):
        texts += generate(model, tokenizer, [""] * 100, max_new_tokens=200, temperature=temperature, seed=seed)
    faults = []
    for text in texts:
        try:
            world.log_prob(text)
        except world.Fault as fault:
            faults.append(str(fault))
    return SAMPLES - len(faults), faults


def write_snapshots(tokenizer: SentencePieceTokenizer) -> None:
    for step in SNAPSHOTS:
        model, _ = load(RUN / f"step-{step}", dtype=torch.bfloat16)
        save(model, tokenizer, HERE / "toy-steps" / str(step))


def write_corpus(stories: int = 1000) -> None:
    """A line a story: the text, what the world knows of it, and its tasks."""
    rng = random.Random("corpus")
    with open(HERE / "stories.jsonl", "w", encoding="utf-8") as file:
        for _ in range(stories):
            story = world.sample(rng)
            row = {"text": story.text, "log_prob": round(story.log_prob, 6), "facts": story.facts, "chinese": story.chinese}
            print(json.dumps(row, ensure_ascii=False), file=file)


if __name__ == "__main__":
    torch.set_num_threads(1)
    tokenizer = SentencePieceTokenizer.train(tokenizer_texts(), vocab_size=CONFIG.vocab_size)
    validation = story_validation(tokenizer, 1000, seed=0)
    trainer = train(tokenizer, validation)
    save(trainer.model, tokenizer, HERE / "toy")
    write_snapshots(tokenizer)
    write_corpus()
