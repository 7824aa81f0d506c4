"""Writing text with SmolLM2: tokens per second for one prompt, against transformers; and how a long context slows it.

The same weights, prompt, number of tokens and threads; greedy; nothing compiled; transformers with its own choice of
attention and of cache. In fp32 both have to write the same tokens, or the comparison would mean nothing.

By itself: `python -m tests.benchmarks.decode`.
"""

from typing import Any

import torch
import transformers

from minillama.cache import KVCache
from minillama.checkpoint import load
from minillama.generation import Sampling, next_logits, stream_tokens
from minillama.model import Llama
from tests.benchmarks.harness import race, row, threads
from tests.parity.test_transformers import names, theirs, to_theirs

ROUNDS = 7
TARGETS = {torch.float32: 1.25, torch.bfloat16: 1.4}
NEW_TOKENS = 32
PROMPT = "Once upon a time, in a village by the sea, there lived a girl who"
NEAR, FAR, SLOWER = 100, 2000, 2.0  # positions, and how many times the later one's time may be
STEPS = 8  # in one turn at a position
THREADS = 2


def with_transformers(model: Llama) -> "transformers.LlamaForCausalLM":
    """The same weights in transformers' model."""
    with torch.device("meta"):
        other = transformers.LlamaForCausalLM(theirs(model.config)).eval()
    weights = {
        names(model.config)[name]: to_theirs(name, weight.detach(), model.config)
        for name, weight in model.named_parameters()
    }
    other.to_empty(device="cpu").to(model.norm.weight.dtype).load_state_dict(weights, strict=False, assign=True)
    other.tie_weights()
    other.model.rotary_emb = type(other.model.rotary_emb)(other.config)  # frequencies are no weights
    other.set_attn_implementation("sdpa")  # what transformers takes when it is not told
    other.generation_config.bos_token_id = other.generation_config.eos_token_id = None
    return other


def against_transformers(dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """A row: tokens per second, of the prompt and all that follows it."""
    model, tokenizer = load("smollm2", dtype=dtype)
    other, prompt = with_transformers(model), tokenizer.encode(PROMPT)
    inputs = {"input_ids": torch.tensor([prompt]), "attention_mask": torch.ones(1, len(prompt), dtype=torch.int64)}
    written: list[list[int]] = [[], []]

    def ours() -> None:
        steps = stream_tokens(model, [prompt], max_new_tokens=NEW_TOKENS, sampling=Sampling(temperature=0))
        written[0] = [token for (token,) in steps if token is not None]

    def peer() -> None:
        written[1] = other.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)[0, len(prompt) :].tolist()

    times = race(ours, peer, rounds)
    assert len(written[0]) == len(written[1]) == NEW_TOKENS
    # Rounded to bf16, two likely tokens can change places.
    assert dtype != torch.float32 or written[0] == written[1], f"we wrote {written[0]}, transformers {written[1]}"
    name = f"writing with SmolLM2, {'fp32' if dtype == torch.float32 else 'bf16'}, against transformers"
    speeds = NEW_TOKENS / times.ours, NEW_TOKENS / times.peer
    return row(name, *speeds, "tokens/s", times.ratio, at_least=TARGETS[dtype])


def far_against_near(dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """A row: milliseconds for a token late in a text, and early in it."""
    model, _ = load("smollm2", dtype=dtype)
    token = torch.tensor([[11]])

    def at(position: int):
        cache = KVCache(model.config, 1, position + 1, dtype=dtype)
        next_logits(model, token.expand(1, position), cache)

        def some_steps() -> None:
            for _ in range(STEPS):
                cache.rewind(position)
                next_logits(model, token, cache)

        return some_steps

    times = race(at(NEAR), at(FAR), rounds)  # the peer's time in units of ours: far in units of near
    name = f"SmolLM2, {'fp32' if dtype == torch.float32 else 'bf16'}: a token at {FAR} against one at {NEAR}"
    return row(name, times.peer / STEPS * 1e3, times.ours / STEPS * 1e3, "ms", times.ratio, at_most=SLOWER)


def rows(rounds: int = ROUNDS) -> list[dict[str, Any]]:
    with threads(THREADS):
        return [measure(dtype, rounds) for measure in (against_transformers, far_against_near) for dtype in TARGETS]


if __name__ == "__main__":
    for r in rows():
        values = f"{r['ours']:.3g} and {r['peer']:.3g} {r['unit']}"
        print(f"{r['name']}: {values}, ratio {r['ratio']:.2f}, target {r['target']}")
