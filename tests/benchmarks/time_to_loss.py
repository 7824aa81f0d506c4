"""How long it takes to get to a loss: our recipe (Muon, bf16 where the machine is quick at it) against usual ones.

One thread for both, who train in turns, a twentieth of their steps at a time. Held-out losses are measured in fp32 when
all steps are done. Each schedule is about as short as its recipe allows: a cosine that ends later gets there later.
Rates and lengths were tried for both; LOG.md has what came out.
- The toy world: the smaller toy to 0.05 nats a token above the floor, against the same model in the same trainer, in
  fp32 with AdamW, a warm-up and a cosine.
- Characters: a megabyte of the toy world's stories, letter by letter, and a model of 0.8 million weights, against a
  plain GPT of torch.nn's parts in fp32 with AdamW, of the sizes of nanoGPT's example for a CPU
  (https://github.com/karpathy/nanoGPT): 4 layers, 128 wide, 64 characters, 12 rows, a warm-up of 100 steps, a rate that
  falls to a tenth along a cosine. Its peak is 4e-3: with that example's 1e-3 it takes a third more steps.
"""

import random
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from minillama import load, world
from minillama.cli.train import quick_precision
from minillama.config import ModelConfig
from minillama.data import Batch, StoryBatches, TextBatches, Validation, story_validation
from minillama.model import Llama
from minillama.trainer import Trainer, TrainSettings, mean_loss, rate_at
from tests.benchmarks.harness import row, threads
from tests.benchmarks.plain_gpt import PlainGPT, plain_step
from tests.benchmarks.training import CHARACTERS

LETTERS = 10**6
ABOVE_FLOOR, STORIES_TARGET, LETTERS_TARGET = 0.05, 0.5, 0.4
OUR_STORIES = TrainSettings(steps=500, learning_rate=3e-2, warmup=0)
THEIR_STORIES = TrainSettings(steps=1300, learning_rate=1.2e-2, warmup=100, optimizer="adamw")
OUR_LETTERS = TrainSettings(steps=500, learning_rate=1.2e-2, warmup=0)
THEIR_LETTERS = TrainSettings(steps=1500, learning_rate=4e-3, warmup=100, final_rate=0.1, weight_decay=0.1)


class Runner(Protocol):
    """Something that trains `model`, a step at a time, and has `settings.steps` of them before it."""

    model: nn.Module
    settings: TrainSettings

    def _one_step(self) -> Any: ...


class PlainTrainer:
    """A plain GPT, with AdamW as torch has it, and its rate by the same formula as ours."""

    def __init__(self, config: ModelConfig, batches: Callable[[int], Batch], settings: TrainSettings):
        self.model, self.batches, self.settings, self.step = PlainGPT(config), batches, settings, 0
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.99), weight_decay=settings.weight_decay
        )

    def _one_step(self) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate_at(self.step, self.settings) * self.settings.learning_rate
        plain_step(self.model, self.optimizer, self.batches(self.step), self.settings.clip)
        self.step += 1


def our_trainer(config: ModelConfig, batches: Callable[[int], Batch], settings: TrainSettings) -> Trainer:
    return Trainer(Llama(config).train(), None, batches, settings, Path("unused"))


def stories() -> tuple[ModelConfig, StoryBatches, Validation]:
    tokenizer = load("toy")[1]
    assert tokenizer is not None
    return ModelConfig.preset("toy-small"), StoryBatches(tokenizer, 16), story_validation(tokenizer, 200, seed=0)


def characters() -> tuple[ModelConfig, TextBatches, Validation]:
    """Stories one below the other, of which the last tenth is held out and scored in windows side by side."""
    config, rows = CHARACTERS["0.8M"]
    rng, told, length = random.Random(0), [], 0
    while length < LETTERS:
        told.append(world.sample(rng).text + "\n")
        length += len(told[-1])
    text = "".join(told)
    number = {letter: i for i, letter in enumerate(sorted(set(text)))}
    tokens = torch.tensor([number[letter] for letter in text])
    learned, held = tokens[: len(tokens) * 9 // 10], tokens[len(tokens) * 9 // 10 :]
    windows: Tensor = held.unfold(0, config.max_seq_len + 1, config.max_seq_len)
    validation = Validation([Batch(some[:, :-1], some[:, 1:]) for some in windows[:512].split(64)])
    return replace(config, vocab_size=len(number)), TextBatches(learned, rows, config.max_seq_len), validation


def train_in_turns(ours: Runner, peer: Runner, turns: int = 20) -> tuple[float, float]:
    """Seconds that each takes for all of its steps."""
    runners, seconds = (ours, peer), [0.0, 0.0]
    for turn in range(turns):
        for i in (0, 1) if turn % 2 else (1, 0):
            runner, steps = runners[i], runners[i].settings.steps
            start = time.perf_counter()
            for _ in range(steps * turn // turns, steps * (turn + 1) // turns):
                runner._one_step()
            seconds[i] += time.perf_counter() - start
    return seconds[0], seconds[1]


def distance(runner: Runner, validation: Validation) -> float:
    """From the floor, where there is one; else from 0."""
    return mean_loss(runner.model.eval(), validation.batches) - (validation.floor or 0.0)


def rows(rounds: int = 1) -> list[dict[str, Any]]:
    """One run of each, however many rounds: they are long enough."""
    quick, found = quick_precision("cpu"), []
    with threads(1):
        config, batches, validation = stories()
        assert validation.floor is not None
        torch.manual_seed(0)
        ours = our_trainer(config, batches, replace(OUR_STORIES, precision=quick))
        peer = our_trainer(config, batches, THEIR_STORIES)
        our_seconds, their_seconds = train_in_turns(ours, peer)
        our_loss, their_loss = (distance(runner, validation) for runner in (ours, peer))
        found += [
            row("stories: loss above the floor, Muon, against 0.05", our_loss, ABOVE_FLOOR, "nats/token",
                our_loss / ABOVE_FLOOR, at_most=1.0),
            row("stories: loss above the floor, AdamW, against 0.05", their_loss, ABOVE_FLOOR, "nats/token",
                their_loss / ABOVE_FLOOR),
            row("… the time to it, Muon, against AdamW in fp32", our_seconds, their_seconds, "s",
                our_seconds / their_seconds, at_most=STORIES_TARGET),
        ]  # fmt: skip

        config, batches, validation = characters()
        torch.manual_seed(0)
        ours = our_trainer(config, batches, replace(OUR_LETTERS, precision=quick))
        plain = PlainTrainer(config, batches, THEIR_LETTERS)
        our_seconds, their_seconds = train_in_turns(ours, plain)
        our_loss, their_loss = (distance(runner, validation) for runner in (ours, plain))
        found += [
            row("characters: loss, 0.8M, Muon, against a plain GPT with AdamW", our_loss, their_loss, "nats/letter",
                our_loss / their_loss, at_most=1.0),
            row("… the time to it", our_seconds, their_seconds, "s", our_seconds / their_seconds,
                at_most=LETTERS_TARGET),
        ]  # fmt: skip
    return found
