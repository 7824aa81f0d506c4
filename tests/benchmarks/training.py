"""Training the toy: tokens per second of a step of our trainer, against transformers' Llama trained the same way.

The same weights, batches, AdamW (fused), clipping and precision; one thread; nothing compiled; transformers with its
own choice of attention and its own loss. Both have to compute the same losses, or the comparison would mean nothing.
"""

import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minillama.config import ModelConfig
from minillama.data import Batch
from minillama.trainer import Trainer, TrainSettings, make_optimizers
from tests.benchmarks.harness import Times, race, row, threads
from tests.parity.test_transformers import pair_of_models

ROUNDS = 15
TARGET = 1.2
ROWS, LENGTH = 16, 130  # of a batch; a story is about this long
TOLERANCE = {"float32": 1e-5, "bfloat16": 5e-3}  # of the losses, relative


def measure(config: ModelConfig, shape: tuple[int, int], precision: str, rounds: int) -> Times:
    """Seconds of a step on a batch of `shape`. Raises AssertionError when the losses differ."""
    ours, other = pair_of_models(config)  # all weights are random and the same
    other.train()
    other.set_attn_implementation("sdpa")  # what transformers takes when it is not told
    other.config.use_cache = False  # as its own trainer sets it
    settings = TrainSettings(steps=10**6, warmup=0, learning_rate=1e-3, optimizer="adamw", precision=precision)
    random = torch.Generator().manual_seed(0)
    tokens = torch.randint(config.vocab_size, (shape[0], shape[1] + 1), generator=random)
    batch = Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
    losses: tuple[list[float], list[float]] = ([], [])

    trainer = Trainer(ours.train(), None, lambda step: batch, settings, Path("unused"))

    def our_step() -> None:
        losses[0].append(trainer._one_step()["loss"])

    (optimizer,) = make_optimizers(other, settings)

    def their_step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            loss = other(batch.inputs, labels=batch.targets, shift_labels=batch.targets).loss
        loss.backward()
        nn.utils.clip_grad_norm_(other.parameters(), settings.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses[1].append(loss.item())

    with threads(1):  # as the shipped toy is trained
        times = race(our_step, their_step, rounds)
    # Before the first step and after it. Later steps enlarge what rounding began.
    for step, (a, b) in enumerate(zip(losses[0][:2], losses[1][:2], strict=True)):
        assert math.isclose(a, b, rel_tol=TOLERANCE[precision]), f"step {step}: our loss is {a}, transformers' {b}"
    return times


def rows(rounds: int = ROUNDS) -> list[dict[str, Any]]:
    config, tokens = ModelConfig.preset("toy"), ROWS * LENGTH
    found = []
    for precision, words in (("float32", "fp32"), ("bfloat16", "bf16 autocast")):
        ours, peer, ratio = measure(config, (ROWS, LENGTH), precision, rounds)
        name = f"training the toy, {words}, against transformers"
        found.append(row(name, tokens / ours, tokens / peer, "tokens/s", ratio, at_least=TARGET))
    return found
