"""Running the 4-bit SmolLM2 against llama.cpp: the same GGUF file, the same threads, the better of its two attentions.

llama.cpp is asked through its Python package, llama-cpp-python, which `make bench` compiles. Greedy; the two round
differently, so their texts may part, and only the number of tokens is compared.
"""

import ctypes
import functools
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from minillama import generate, load
from minillama.cache import KVCache
from minillama.checkpoint.load import find_checkpoint
from minillama.generation import Sampling, next_logits, stream_tokens
from tests.benchmarks.decode import PROMPT, with_transformers
from tests.benchmarks.harness import race, row, threads

ROUNDS = 11
THREADS, NEW_TOKENS, LONG, TEXTS, STEPS = 2, 64, 512, 8, 24
GREEDY = Sampling(temperature=0)
TASK = (
    "Repeat the following text, and correct its spelling:\n\n"
    "The old lighthouse keeper climed the stairs every evening to light the lamp. He counted the steps as he went, and "
    "there were always two hundred and twelve of them. From the top he could see the fishing boats come home, one "
    "after the other, and he knew the names of all of them."
)
LOOKUP = 7


@functools.cache
def package() -> Any:
    """llama-cpp-python, made silent."""
    try:
        import llama_cpp
    except ImportError:
        raise ValueError("llama-cpp-python is not there: `make bench` compiles it, with a C++ compiler") from None
    llama_cpp.silent = llama_cpp.llama_log_callback(lambda level, text, data: None)  # must live as long as the library
    llama_cpp.llama_log_set(llama_cpp.silent, ctypes.c_void_p(0))
    return llama_cpp


def quicker(calls: list[Callable[[], Any]]) -> Callable[[], Any]:
    """The one that takes less time, of three turns each."""

    def seconds(call: Callable[[], Any]) -> float:
        call()
        times = []
        for _ in range(3):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        return min(times)

    return min(calls, key=seconds)


def peer_models(**settings: Any) -> list[Any]:
    """llama.cpp's model without and with flash attention."""
    settings = {"n_threads": THREADS, "n_threads_batch": THREADS, "verbose": False, **settings}
    return [package().Llama(str(find_checkpoint("smollm2")), flash_attn=flash, **settings) for flash in (False, True)]


def writing(rounds: int) -> list[dict[str, Any]]:
    model, tokenizer = load("smollm2", dtype="int4")
    prompt = tokenizer.encode(PROMPT)

    def ours(compile: bool) -> int:
        steps = stream_tokens(model, [prompt], max_new_tokens=NEW_TOKENS, sampling=GREEDY, compile=compile)
        return len(list(steps))

    def peer(other: Any) -> int:
        other.reset()
        tokens = other.generate(prompt, temp=0.0)
        return len([token for token, _ in zip(tokens, range(NEW_TOKENS), strict=False)])

    assert ours(True) == ours(False) == NEW_TOKENS
    found = []

    def against(name: str, other: Callable[[], Any], compile: bool, turns: int, at_least: float | None) -> None:
        times = race(partial(ours, compile), other, turns)
        what = f"writing with SmolLM2, int4{', compiled' if compile else ''}, against {name}"
        speeds = NEW_TOKENS / times.ours, NEW_TOKENS / times.peer
        found.append(row(what, *speeds, "tokens/s", times.ratio, at_least=at_least))

    rival = quicker([partial(peer, other) for other in peer_models(n_ctx=256)])
    against("llama.cpp", rival, True, rounds, 1.0)
    against("llama.cpp", rival, False, rounds, None)
    inputs = {"input_ids": torch.tensor([prompt]), "attention_mask": torch.ones(1, len(prompt), dtype=torch.int64)}
    others = [with_transformers(load("smollm2", dtype=dtype)[0]) for dtype in (torch.float32, torch.bfloat16)]
    rival = quicker([partial(m.generate, **inputs, max_new_tokens=NEW_TOKENS, do_sample=False) for m in others])
    against("transformers", rival, True, max(3, rounds // 3), 5.0)
    against("transformers", rival, False, max(3, rounds // 3), None)
    return found


def reading(rounds: int) -> dict[str, Any]:
    model, _ = load("smollm2", dtype="int4")
    prompt = torch.arange(1, LONG + 1)[None]

    def ours() -> None:
        next_logits(model, prompt, KVCache(model.config, 1, LONG, dtype=torch.bfloat16))

    def peer(other: Any) -> None:
        other.reset()
        other.eval(prompt[0].tolist())

    others = peer_models(n_ctx=2 * LONG, n_batch=LONG)
    times = race(ours, quicker([partial(peer, other) for other in others]), rounds)
    name = f"reading {LONG} tokens with SmolLM2, int4, against llama.cpp"
    return row(name, LONG / times.ours, LONG / times.peer, "tokens/s", times.ratio, at_least=2.0)


class Batched:
    """llama.cpp writing several texts at once, through the C interface: the package's own class knows one text only."""

    def __init__(self, flash: bool):
        self.api = package()
        self.api.llama_backend_init()
        path = str(find_checkpoint("smollm2")).encode()
        self.model = self.api.llama_model_load_from_file(path, self.api.llama_model_default_params())
        settings = self.api.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_seq_max = TEXTS * 256, LONG, TEXTS
        settings.n_threads = settings.n_threads_batch = THREADS
        settings.flash_attn_type = int(flash)
        self.context = self.api.llama_init_from_model(self.model, settings)
        self.batch = self.api.llama_batch_init(LONG, 0, TEXTS)

    def __call__(self) -> None:
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)
        self.step([(1 + i, i, text, i == 7) for text in range(TEXTS) for i in range(8)])
        for position in range(8, 8 + STEPS):
            self.step([(5, position, text, True) for text in range(TEXTS)])

    def step(self, tokens: list[tuple[int, int, int, bool]]) -> None:
        self.batch.n_tokens = len(tokens)
        for i, (token, position, text, scored) in enumerate(tokens):
            self.batch.token[i], self.batch.pos[i], self.batch.logits[i] = token, position, scored
            self.batch.n_seq_id[i], self.batch.seq_id[i][0] = 1, text
        assert self.api.llama_decode(self.context, self.batch) == 0
        self.api.llama_get_logits(self.context)[0]


def eight_at_once(rounds: int) -> dict[str, Any]:
    model, _ = load("smollm2", dtype="int4")
    prompts, token = torch.arange(1, 9).expand(TEXTS, -1), torch.full((TEXTS, 1), 5)

    def ours() -> None:
        cache = KVCache(model.config, TEXTS, 8 + STEPS, dtype=torch.bfloat16)
        next_logits(model, prompts, cache)
        for _ in range(STEPS):
            next_logits(model, token, cache)

    times = race(ours, quicker([Batched(False), Batched(True)]), rounds)
    count = TEXTS * (STEPS + 8)
    name = "eight texts at once with SmolLM2, int4, against llama.cpp"
    return row(name, count / times.ours, count / times.peer, "tokens/s", times.ratio, at_least=1.5)


def guessing(rounds: int) -> dict[str, Any]:
    model, tokenizer = load("smollm2", dtype="int4")
    prompt = tokenizer.chat([{"role": "user", "content": TASK}])
    exact, _ = load("smollm2")
    write = partial(generate, tokenizer=tokenizer, prompt=prompt, temperature=0)
    assert write(exact, lookup=LOOKUP) == write(exact), "in fp32, guesses changed the text"
    counts = {}

    def run(lookup: int) -> None:
        counts[lookup] = len(tokenizer.encode(write(model, lookup=lookup)))

    times = race(lambda: run(LOOKUP), lambda: run(0), rounds)
    assert abs(counts[LOOKUP] - counts[0]) <= 4, f"texts of {counts} tokens cannot be compared"
    name = "writing a text that repeats its prompt, int4: with guesses against without"
    return row(name, counts[LOOKUP] / times.ours, counts[0] / times.peer, "tokens/s", times.ratio, at_least=1.5)


def rows(rounds: int = ROUNDS) -> list[dict[str, Any]]:
    package()
    with threads(THREADS):
        return [*writing(rounds), reading(rounds), eight_at_once(rounds), guessing(rounds)]
