"""Fine-tuning (chapter 14): from a model that goes on with any text to one that does what it is asked.

What changes is the data. A chat becomes a row of tokens of which only the assistant's are scored, so that the model
learns to answer, and not to ask.
"""

import functools
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minillama import world
from minillama.data import Batch, Validation
from minillama.loss import IGNORE
from minillama.tokenizer import ROLES, Tokenizer

KINDS = ("mood", "question", "summary", "translation", "story")  # what the toy world has to ask
MAX_LINE_BYTES = 2**24  # of a file of chats: a context of a million tokens fits


# ---------------------------------------------------------------------------------------------------------------------
# Chats.


class Chat(NamedTuple):
    """A conversation, and the number of the line where it stands in its file."""

    line: int
    messages: list[dict[str, str]]


class Row(NamedTuple):
    """Tokens (T,) int32, and what follows each of them (T,) int32, or IGNORE where that is not scored."""

    inputs: Tensor
    targets: Tensor


def read_chats(path: str | Path) -> Iterator[Chat]:
    """The chats of a file, one at a time. Each is a line of JSON: `{"messages": [{"role": ..., "content": ...}, ...]}`.

    A system message may come first, then come the user's and the assistant's, and the assistant has the last word.
    Empty lines are skipped; what else an object holds beside its messages is left aside. Raises ValueError that names
    the line of anything else.
    """
    number = 0
    with open(path, "rb") as file:
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            try:
                if len(line) > MAX_LINE_BYTES:
                    raise ValueError(f"it has more than {MAX_LINE_BYTES} bytes: give each chat a line of its own")
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                if text.strip():
                    yield Chat(number, _messages(json.loads(text)))
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number} is not JSON: {error.msg} at column {error.colno}.") from None
            except UnicodeDecodeError as error:
                byte = line[error.start]
                raise ValueError(f"{path}, line {number} is not UTF-8: byte {error.start} is {byte:#04x}.") from None
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {number}: {str(error).rstrip('.')}.") from None


def _messages(value: Any) -> list[dict[str, str]]:
    if not isinstance(value, dict) or not isinstance(messages := value.get("messages"), list) or not messages:
        raise ValueError(f'expected {{"messages": [...]}} with at least one message, got {value!r:.80}')
    for n, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or message.keys() != {"role", "content"}:
            raise ValueError(f'message {n} is {message!r:.80}, expected {{"role": ..., "content": ...}}')
        role, content = message["role"], message["content"]
        if role not in ROLES or (role == "system" and n > 1):
            expected = ROLES if n == 1 else ROLES[1:]
            raise ValueError(f"message {n} has the role {role!r:.40}, expected {' or '.join(expected)}")
        if not isinstance(content, str):
            raise ValueError(f"message {n} has the content {content!r:.60}, expected text")
        content.encode("utf-8")  # refuses half of a surrogate pair, which JSON lets through
    if role != "assistant":
        raise ValueError(f"the last message is from the {role}, expected one from the assistant: there is no answer")
    return messages


def chat_row(tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]], context: int | None = None) -> Row:
    """A chat as `tokenizer.chat` writes it, with what the assistant says as targets: its words and its end of turn.

    What stands before each answer are the tokens that the model is given when it is to answer; what follows the last
    answer is left out. Raises ValueError if there is no answer, if the row has more than `context` tokens, and if an
    answer's beginning melts into a token of the prompt, so that no model could be asked for it.
    """
    ids = tokenizer.chat(messages, reply=False)
    if context is not None and len(ids) - 1 > context:
        raise ValueError(f"the chat has {len(ids) - 1} tokens, expected at most {context}: shorten it or leave it out")
    scored = [False] * len(ids)
    end = 0
    for n, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        start = len(prompt := tokenizer.chat(messages[:n]))
        if ids[:start] != prompt:
            raise ValueError(
                f"message {n + 1} is {message['content']!r:.60}, whose beginning the tokenizer joins to what stands "
                "before it: begin with a word"
            )
        end = next(i for i in range(start, len(ids)) if ids[i] in tokenizer.stop_ids) + 1
        scored[start:end] = [True] * (end - start)
    if not end:
        raise ValueError("the chat has no message from the assistant, so there is nothing to learn from it")
    tokens = torch.tensor(ids[:end], dtype=torch.int32)
    targets = tokens.masked_fill(~torch.tensor(scored[:end]), IGNORE)
    return Row(tokens[:-1], targets[1:])


def chat_rows(path: str | Path, tokenizer: Tokenizer, context: int) -> list[Row]:
    """The rows of all chats of a file. Raises ValueError, with the line, for a chat that cannot be one."""
    rows = []
    for line, messages in read_chats(path):
        try:
            rows.append(chat_row(tokenizer, messages, context))
        except ValueError as error:
            raise ValueError(f"{path}, line {line}: {str(error).rstrip('.')}.") from None
    if not rows:
        raise ValueError(f"{path} has no chats, expected one in each line.")
    return rows


def pack(rows: Sequence[Row], pad_id: int) -> Batch:
    """One batch as wide as the longest of the rows; shorter ones share a row, where they fit, without a view of each
    other. What remains is padding.

    The longest is placed first, each in the first place with room for it: never more than 11/9 of the fewest rows, and
    one ("first-fit decreasing"; Johnson 1973, "Near-Optimal Bin Packing Algorithms").
    """
    rows = sorted(rows, key=lambda row: -len(row.inputs))
    width = len(rows[0].inputs)
    shelves: list[list[Row]] = []
    room: list[int] = []
    for row in rows:
        need = len(row.inputs)
        place = next((i for i, free in enumerate(room) if free >= need), len(room))
        if place == len(room):
            shelves.append([])
            room.append(width)
        shelves[place].append(row)
        room[place] -= need
    inputs, targets, segments = (torch.full((len(shelves), width), fill) for fill in (pad_id, IGNORE, -1))
    for i, shelf in enumerate(shelves):
        start = 0
        for number, row in enumerate(shelf):
            end = start + len(row.inputs)
            inputs[i, start:end], targets[i, start:end], segments[i, start:end] = *row, number
            start = end
    return Batch(inputs, targets, segments if len(shelves) < len(rows) else None)


class ChatBatches:
    """Given rows, again and again, each time in another order. The last batch of a round may be smaller."""

    def __init__(self, rows: Sequence[Row], pad_id: int, batch_size: int, seed: int = 0):
        self.rows, self.pad_id, self.batch_size, self.seed = rows, pad_id, batch_size, seed
        self._order = functools.lru_cache(maxsize=1)(self._shuffle)

    def __call__(self, step: int) -> Batch:
        in_a_round = -(-len(self.rows) // self.batch_size)
        start = step % in_a_round * self.batch_size
        chosen = self._order(step // in_a_round)[start : start + self.batch_size]
        return pack([self.rows[i] for i in chosen], self.pad_id)

    def _shuffle(self, number: int) -> list[int]:
        order = list(range(len(self.rows)))
        random.Random(f"{self.seed}:{number}").shuffle(order)
        return order


class TaskBatches:
    """New tasks from the toy world at every step, each of a new story, of kinds drawn from `kinds`.

    Raises ValueError for a kind that the world does not have.
    """

    def __init__(self, tokenizer: Tokenizer, kinds: Sequence[str], batch_size: int, seed: int = 0):
        _check_kinds(kinds)
        self.tokenizer, self.kinds, self.batch_size, self.seed = tokenizer, kinds, batch_size, seed

    def __call__(self, step: int) -> Batch:
        rng = random.Random(f"{self.seed}:{step}")
        return pack([task_row(self.tokenizer, self.kinds, rng) for _ in range(self.batch_size)], self.tokenizer.pad_id)


def task_row(tokenizer: Tokenizer, kinds: Sequence[str], rng: random.Random, heldout: bool = False) -> Row:
    """A chat about a new story: one of its tasks of a kind drawn from `kinds`."""
    kind = rng.choice(kinds)
    task = rng.choice([task for task in world.tasks(world.sample(rng, heldout)) if task.kind == kind])
    messages = [{"role": "user", "content": task.prompt}, {"role": "assistant", "content": task.answer}]
    return chat_row(tokenizer, messages)


def task_validation(
    tokenizer: Tokenizer, kinds: Sequence[str], count: int, seed: int, batch_size: int = 64, heldout: bool = False
) -> Validation:
    """`count` tasks that no training step draws. The floor is 0 but for stories: all other answers follow from what is
    asked."""
    _check_kinds(kinds)
    rng = random.Random(f"validation:{seed}")
    rows = [task_row(tokenizer, kinds, rng, heldout) for _ in range(count)]
    batches = [pack(rows[i : i + batch_size], tokenizer.pad_id) for i in range(0, count, batch_size)]
    return Validation(batches, None if "story" in kinds else 0.0)


def _check_kinds(kinds: Sequence[str]) -> None:
    if isinstance(kinds, str) or not kinds or set(kinds) - set(KINDS):
        raise ValueError(f"the kinds of tasks are {kinds!r:.80}, expected a list of some of {', '.join(KINDS)}.")
