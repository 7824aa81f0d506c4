"""Batches (chapter 09): rows of tokens, each with the token that comes next.

A source of batches is a function from a step's number to a batch. What a step sees depends on the seed and that number
alone, so a run that stops and goes on sees what it would have seen without the stop.
"""

import functools
import json
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from minillama import world
from minillama.loss import IGNORE
from minillama.tokenizer import Tokenizer

MAX_LINE_BYTES = 2**24  # of a file of JSON lines: a context of a million tokens fits
Value = TypeVar("Value")


@dataclass(frozen=True)
class Batch:
    """`inputs` (B, T) int64, and `targets` (B, T) int64: what follows each input, or IGNORE where nothing is scored.

    `segments` (B, T) int64 where a row holds several texts: the number of its text for each token, -1 for padding.
    A classifier's targets are the classes of the texts (N,).
    """

    inputs: Tensor
    targets: Tensor
    segments: Tensor | None = None

    @property
    def scored(self) -> int:
        """The number of targets that count."""
        return int((self.targets != IGNORE).sum())


def stack(rows: Sequence[Sequence[int]], pad_id: int) -> Batch:
    """Rows of token ids, each with its end, to one batch. Shorter rows are filled up behind; the filling is not scored.

    Padding stands behind the text, so under a causal mask no real token ever sees it.
    """
    length = max(len(row) for row in rows) - 1
    inputs = torch.full((len(rows), length), pad_id)
    targets = torch.full((len(rows), length), IGNORE)
    for i, row in enumerate(rows):
        tokens = torch.tensor(row)
        inputs[i, : len(row) - 1] = tokens[:-1]
        targets[i, : len(row) - 1] = tokens[1:]
    return Batch(inputs, targets)


class StoryBatches:
    """New stories at every step, one a row, from BOS to EOS.

    Stories of like length share a batch, so that little is padding: `GROUP` batches are drawn together, sorted and cut.
    """

    GROUP = 16

    def __init__(self, tokenizer: Tokenizer, batch_size: int, seed: int = 0):
        self.tokenizer, self.batch_size, self.seed = tokenizer, batch_size, seed
        self._group = functools.lru_cache(maxsize=1)(self._draw_group)

    def __call__(self, step: int) -> Batch:
        return self._group(step // self.GROUP)[step % self.GROUP]

    def _draw_group(self, number: int) -> list[Batch]:
        rng = random.Random(f"{self.seed}:{number}")
        stories = [world.sample(rng).text for _ in range(self.batch_size * self.GROUP)]
        rows = sorted((self.tokenizer.encode(text, bos=True, eos=True) for text in stories), key=len)
        starts = range(0, len(rows), self.batch_size)
        batches = [stack(rows[i : i + self.batch_size], self.tokenizer.pad_id) for i in starts]
        rng.shuffle(batches)
        return batches


class TextBatches:
    """Windows cut at random from one long row of tokens (N,): for text of your own.

    A window begins and ends anywhere, so its loss says nothing exact about whole texts; see chapter 09.
    """

    def __init__(self, tokens: Tensor, batch_size: int, length: int, seed: int = 0):
        if len(tokens) <= length:
            raise ValueError(
                f"the text has {len(tokens)} tokens, but a window needs {length + 1}: give more, or a shorter window."
            )
        self.tokens, self.batch_size, self.length, self.seed = tokens, batch_size, length, seed

    def __call__(self, step: int) -> Batch:
        generator = torch.Generator().manual_seed(hash((self.seed, step)) % 2**63)
        starts = torch.randint(len(self.tokens) - self.length, (self.batch_size,), generator=generator)
        windows = torch.stack([self.tokens[start : start + self.length + 1] for start in starts]).long()
        return Batch(windows[:, :-1], windows[:, 1:])


@dataclass(frozen=True)
class Validation:
    """Batches that are scored but never trained on. `floor`: the lowest mean loss that any model can reach on them, in
    nats per token, where it is known."""

    batches: list[Batch]
    floor: float | None = None


def story_validation(
    tokenizer: Tokenizer, stories: int, seed: int, batch_size: int = 64, heldout: bool = False
) -> Validation:
    """Whole stories, BOS to EOS, every token scored, with their floor: -Σ log_prob(story) / number of scored tokens.

    No model can beat the floor in the long run, and the distance to it is the KL divergence from the world to the
    model, in nats per token.
    """
    rng = random.Random(f"validation:{seed}")
    drawn = [world.sample(rng, heldout) for _ in range(stories)]
    rows = sorted((tokenizer.encode(story.text, bos=True, eos=True) for story in drawn), key=len)
    batches = [stack(rows[i : i + batch_size], tokenizer.pad_id) for i in range(0, stories, batch_size)]
    nats = -math.fsum(story.log_prob for story in drawn)
    return Validation(batches, nats / sum(batch.scored for batch in batches))


def json_lines(path: str | Path, parse: Callable[[Any], Value]) -> Iterator[tuple[int, Value]]:
    """The lines of a file, each a JSON value, as (its number from 1, what `parse` makes of it), one at a time.

    Empty lines are skipped. Raises ValueError that names the line of what is not UTF-8, not JSON, longer than
    MAX_LINE_BYTES, or refused by `parse` with a ValueError.
    """
    number = 0
    with open(path, "rb") as file:
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            try:
                if len(line) > MAX_LINE_BYTES:
                    raise ValueError(f"it has more than {MAX_LINE_BYTES} bytes: give each entry a line of its own")
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip()
                if text:
                    yield number, parse(json.loads(text))
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number} is not JSON: {error.msg} at column {error.colno}.") from None
            except UnicodeDecodeError as error:
                byte = line[error.start]
                raise ValueError(f"{path}, line {number} is not UTF-8: byte {error.start} is {byte:#04x}.") from None
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {number}: {str(error).rstrip('.')}.") from None
