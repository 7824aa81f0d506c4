"""Writing (chapter 10): ask for the next token's probabilities, choose one, put it behind the text, ask again.

Letters: B batch, T time, V vocab_size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import cast

import torch
from torch import Tensor

from minillama.cache import KVCache
from minillama.model import Llama
from minillama.tokenizer import Tokenizer

Prompt = str | list[int]


def generate(
    model: Llama,
    tokenizer: Tokenizer,
    prompt: Prompt | Sequence[Prompt] = "",
    *,
    max_new_tokens: int = 128,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int | None = None,
    stop: Sequence[str] = (),
    stream: bool = False,
) -> str | list[str] | Iterator[str]:
    """Go on with a text: a str for one prompt, a list for a list of prompts.

    A prompt is a text, which the result begins with ("" starts from BOS), or token ids as `tokenizer.chat` makes them,
    whose result is only what is new. With `stream`, one prompt gives an iterator over the pieces of what is new.

    max_new_tokens: also ends where the model's context ends. stop: texts that end the writing and are cut off; the
    tokenizer's `stop_ids` always end it. temperature: 0 takes the most probable token each time; top_k, top_p and min_p
    leave unlikely tokens out (see the functions below). seed: row i of a batch draws as its prompt alone would with
    `seed + i`; None draws differently each time.

    Raises ValueError for a value that makes no sense and for a prompt that is longer than the model's context.
    """
    one = isinstance(prompt, str) or (len(prompt) > 0 and isinstance(prompt[0], int))
    prompts = cast("list[Prompt]", [prompt] if one else list(prompt))
    rows = [_encode(tokenizer, each) for each in prompts]
    _check(model, rows, max_new_tokens, stop, temperature, top_k, top_p, min_p)
    choose = Sampler(len(rows), temperature, top_k, top_p, min_p, seed, model.embedding.weight.device)
    steps = write(model, rows, choose, max_new_tokens, tokenizer.stop_ids)
    if stream:
        if not one:
            raise ValueError(f"stream=True was given {len(rows)} prompts, expected one: stream one after the other.")
        tokens = (token for step in steps for token in step if token is not None)
        return _until(tokenizer.decode_stream(tokens, start=prompt == ""), stop)

    written: list[list[int]] = [[] for _ in rows]
    ended = [False] * len(rows)
    window = max((len(text.encode()) for text in stop), default=0)  # a token has at least one byte
    for step in steps:
        for i, token in enumerate(step):
            if token is None or ended[i]:
                continue
            written[i].append(token)
            tail = tokenizer.decode(written[i][-window:], start=False) if window else ""
            ended[i] = any(text in tail for text in stop)
        if all(ended):
            break
    texts = []
    for each, tokens_ in zip(prompts, written, strict=True):
        new = "".join(_until(iter([tokenizer.decode(tokens_, start=each == "")]), stop))
        texts.append(each + new if isinstance(each, str) else new)
    return texts[0] if one else texts


@torch.inference_mode()
def write(
    model: Llama,
    rows: Sequence[Sequence[int]],
    choose: Callable[[Tensor], Tensor],
    max_new_tokens: int,
    stop_ids: Iterable[int] = (),
) -> Iterator[list[int | None]]:
    """The loop. rows: B prompts as token ids. choose: logits (B, V) → tokens (B,). Yields one new token for each row at
    every step, None for a row that has ended with one of `stop_ids`, which are not yielded."""
    stop_ids = frozenset(stop_ids)
    weight = model.embedding.weight
    longest = max(len(row) for row in rows)
    max_new_tokens = min(max_new_tokens, model.config.max_seq_len - longest)
    padding = torch.tensor([longest - len(row) for row in rows])
    cache = KVCache(
        model.config, len(rows), longest + max_new_tokens, device=weight.device, dtype=weight.dtype, padding=padding
    )
    # Rows of different lengths are aligned at their ends, so that the new tokens of all stand in one column.
    tokens = torch.tensor([[0] * (longest - len(row)) + list(row) for row in rows], device=weight.device)
    ended = [False] * len(rows)
    for _ in range(max_new_tokens):
        logits = model.scores(model.hidden(tokens, cache)[:, -1])  # only the last token's scores are needed: (B, V)
        chosen = choose(logits.float())
        values = chosen.tolist()
        ended = [was or value in stop_ids for was, value in zip(ended, values, strict=True)]
        if all(ended):
            return
        yield [None if end else value for end, value in zip(ended, values, strict=True)]
        tokens = chosen[:, None]


class Sampler:
    """Chooses each row's next token: logits (B, V) fp32 → tokens (B,) int64. Each row has its own random numbers."""

    def __init__(
        self,
        rows: int,
        temperature: float,
        top_k: int | None = None,
        top_p: float = 1.0,
        min_p: float = 0.0,
        seed: int | None = None,
        device: torch.device | str = "cpu",
    ):
        self.temperature, self.top_k, self.top_p, self.min_p = temperature, top_k, top_p, min_p
        self.generators = [torch.Generator(device) for _ in range(rows)]
        for i, generator in enumerate(self.generators):
            generator.seed() if seed is None else generator.manual_seed(seed + i)

    def __call__(self, logits: Tensor) -> Tensor:
        if not logits.amax(-1).isfinite().all():
            raise ValueError("the model's scores are NaN or infinite, expected finite numbers: check its weights.")
        if self.temperature == 0:
            return logits.argmax(-1)
        p = probabilities(logits, self.temperature, self.top_k, self.top_p, self.min_p)
        return torch.cat([row.multinomial(1, generator=g) for row, g in zip(p, self.generators, strict=True)])


def probabilities(
    logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float = 1.0, min_p: float = 0.0
) -> Tensor:
    """The distribution that is sampled from: logits (B, V) → (B, V), each row sums to 1.

    The logits are divided by the temperature first: below 1, likely tokens become likelier.
    """
    logits = logits / temperature
    if top_k is not None:
        logits = keep_top_k(logits, top_k)
    if top_p < 1:
        logits = keep_top_p(logits, top_p)
    if min_p > 0:
        logits = keep_min_p(logits, min_p)
    return logits.softmax(-1)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Leave the k largest logits of each row, and those equal to the last of them; the others become -inf."""
    smallest = logits.topk(min(k, logits.shape[-1])).values[..., -1:]
    return logits.masked_fill(logits < smallest, -torch.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Leave the fewest tokens whose probabilities add up to p or more, the likeliest first.

    The token that crosses p is kept. Source: Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration".
    """
    ordered, order = logits.softmax(-1).sort(descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered  # what the likelier tokens add up to
    dropped = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before >= p)
    return logits.masked_fill(dropped, -torch.inf)


def keep_min_p(logits: Tensor, share: float) -> Tensor:
    """Leave the tokens that are at least `share` times as probable as the likeliest.

    Source: Nguyen et al. 2024, "Min-p Sampling".
    """
    return logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(share), -torch.inf)


def _until(pieces: Iterator[str], stop: Sequence[str]) -> Iterator[str]:
    """Pass pieces on up to the first stop text. What may be the beginning of one is held back until that is known."""
    held = ""
    for piece in pieces:
        held += piece
        found = [held.index(text) for text in stop if text in held]
        if found:
            yield held[: min(found)]
            return
        unsure = max((n for text in stop for n in range(1, len(text)) if held.endswith(text[:n])), default=0)
        if len(held) > unsure:
            yield held[: len(held) - unsure]
            held = held[len(held) - unsure :]
    if held:
        yield held


def _encode(tokenizer: Tokenizer, prompt: Prompt) -> list[int]:
    if not isinstance(prompt, str):
        return list(prompt)
    bos = tokenizer.bos_id is not None and (tokenizer.add_bos or not prompt)
    return tokenizer.encode(prompt, bos=bos)


def _check(
    model: Llama,
    rows: list[list[int]],
    max_new_tokens: int,
    stop: Sequence[str],
    temperature: float,
    top_k: int | None,
    top_p: float,
    min_p: float,
) -> None:
    config = model.config
    if not rows or not all(rows):
        raise ValueError("there is no prompt, or an empty one, expected at least one token in each: give some text.")
    longest = max(len(row) for row in rows)
    if longest >= config.max_seq_len:
        raise ValueError(
            f"a prompt has {longest} tokens, but the model's context holds {config.max_seq_len}, one of them for the "
            f"answer: shorten it to {config.max_seq_len - 1}."
        )
    for row in rows:
        for token in row:
            if not isinstance(token, int) or not 0 <= token < config.vocab_size:
                raise ValueError(f"the prompt has the token id {token!r}, expected 0 to {config.vocab_size - 1}.")
    for name, value, fits, expected in (
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 0, "0 or more"),
        ("temperature", temperature, 0 <= temperature < math.inf, "0 or more"),
        ("top_k", top_k, top_k is None or top_k >= 1, "1 or more, or None"),
        ("top_p", top_p, 0 < top_p <= 1, "above 0 and up to 1"),
        ("min_p", min_p, 0 <= min_p <= 1, "0 to 1"),
        ("stop", stop, not isinstance(stop, str) and all(isinstance(t, str) and t for t in stop), "a list of texts"),
    ):
        if not fits:
            raise ValueError(f"{name} is {value!r}, expected {expected}.")
