"""The roofline (chapter 13): how fast a machine could run a model, from how fast it can read and how fast multiply.

To write a token, a model reads all its weights, and uses each once: reading sets the limit. To read a prompt, it uses
each weight for every token: multiplying sets it.
Source: Williams, Waterman and Patterson 2009, "Roofline: An Insightful Visual Performance Model".
"""

import time
from collections.abc import Callable

import torch

from minillama.cache import KVCache
from minillama.generation import next_logits
from minillama.linear import linear
from minillama.model import Llama

BYTES = 2**28  # far more than a cache holds
SIDE = 2048
POSITION, PROMPT = 64, 512  # tokens before the one that is written, and of the prompt that is read


def memory_bandwidth(device: torch.device | str = "cpu") -> float:
    """Bytes that can be read in a second: the best of many passes over 256 MiB, since others may be reading too."""
    numbers = torch.ones(BYTES // 4, device=device)
    return BYTES / seconds(numbers.amax, numbers.device, 40)


def peak_flops(dtype: torch.dtype, device: torch.device | str = "cpu") -> float:
    """Floating-point operations in a second: the best of several products of square matrices."""
    matrix = torch.ones(SIDE, SIDE, dtype=dtype, device=device)
    with torch.inference_mode():
        return 2 * SIDE**3 / seconds(lambda: linear(matrix, matrix), matrix.device, 5)


def bytes_per_token(model: Llama, position: int) -> int:
    """Bytes that must be read to write the token at a position: weights, scales, and the cache before it.

    Of a table of embeddings that is not tied, only one row is read.
    """
    weights = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    if model.output is not None:
        weights -= sum(tensor.nbytes for tensor in [*model.embedding.parameters(), *model.embedding.buffers()])
    return weights + model.config.kv_cache_bytes(1, position, str(model.norm.weight.dtype).removeprefix("torch."))


def decode_speed(model: Llama, *, position: int = POSITION, tokens: int = 16, rounds: int = 5) -> float:
    """Tokens in a second, written one by one behind `position` others; the best round."""
    cache = _filled_cache(model, position, tokens)
    token = torch.ones(1, 1, dtype=torch.int64, device=cache.device)

    def write() -> None:
        cache.rewind(position)
        for _ in range(tokens):
            next_logits(model, token, cache)

    return tokens / seconds(write, cache.device, rounds)


def prefill_speed(model: Llama, *, tokens: int = PROMPT, rounds: int = 3) -> float:
    """Tokens of a prompt that are read in a second; the best round."""
    cache = _filled_cache(model, 0, tokens)
    prompt = torch.ones(1, tokens, dtype=torch.int64, device=cache.device)

    def read() -> None:
        cache.rewind(0)
        next_logits(model, prompt, cache)

    return tokens / seconds(read, cache.device, rounds)


def _filled_cache(model: Llama, filled: int, more: int) -> KVCache:
    weight = model.norm.weight
    cache = KVCache(model.config, 1, filled + more, device=weight.device, dtype=weight.dtype)
    if filled:
        next_logits(model, torch.ones(1, filled, dtype=torch.int64, device=weight.device), cache)
    return cache


def seconds(call: Callable[[], object], device: torch.device, rounds: int) -> float:
    """The shortest of several calls; the first, which warms up, does not count."""
    best = float("inf")
    for number in range(rounds + 1):
        start = time.perf_counter()
        call()
        if device.type != "cpu":  # the call has only been put in a queue
            torch.accelerator.synchronize()
        if number:
            best = min(best, time.perf_counter() - start)
    return best
