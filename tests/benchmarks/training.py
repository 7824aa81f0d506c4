"""Tokens per second of a whole step of our trainer, against transformers' Llama and a plain GPT; and what surrounds it.

One thread for both, which suits models of these sizes best; nothing compiled; gradients clipped; random weights.
- The toy, against transformers trained the same way: the same weights, batches, AdamW (fused) and precision, with its
  own choice of attention and its own loss. Both have to compute the same losses, or it would mean nothing.
- Models of characters (65 of them) of the sizes of many a tutorial, as `minillama train` would train them with AdamW,
  in bf16 where the machine is quick at it. Peers train in fp32, eager, as their usual scripts do: transformers, with
  the same weights and the AdamW (fused) that its own trainer takes; and a GPT of torch.nn's parts with torch's AdamW as
  it comes, of the same sizes but for the feed-forward layer: 0.818 and 2.744 million weights, ours 0.821 and 2.903.
- The head and the loss a few rows at a time, and activation checkpointing, against without: the peak of a fresh
  process's resident memory, less what it had before (Linux only), and the time.
- The share of the speed at which the machine multiplies large square matrices that such a step reaches, and what data,
  records and checkpoints cost beside the steps of a run.
"""

import contextlib
import io
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minillama import load
from minillama.cli.train import quick_precision
from minillama.config import ModelConfig
from minillama.data import Batch, StoryBatches, TextBatches
from minillama.linear import linear
from minillama.loss import cross_entropy, head_cross_entropy
from minillama.model import Llama
from minillama.roofline import peak_flops
from minillama.trainer import Trainer, TrainSettings, make_optimizers
from tests.benchmarks.harness import Times, race, row, threads
from tests.benchmarks.plain_gpt import PlainGPT, plain_step
from tests.parity.test_transformers import pair_of_models

ROOT = Path(__file__).resolve().parents[2]
ROUNDS = 15
TARGET = 1.2
ROWS, LENGTH = 16, 130  # of a batch; a story is about this long
TOLERANCE = {"float32": 1e-5, "bfloat16": 5e-3}  # of the losses, relative
PLAIN_TARGET, THEIRS_TARGET, AROUND_TARGET = 1.5, 1.7, 1.03
STEPS = 100  # of a run: as many as between two of its checkpoints
TOKENS, VOCABULARY, DIM = 2048, 49_152, 64  # of the head

CHILD = """
import json, sys, time
import torch
from tests.benchmarks import training

def status(field):  # bytes
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

torch.set_num_threads(1)
call = getattr(training, sys.argv[1])(sys.argv[2])
before, start = status("VmRSS"), time.perf_counter()
call()
print(json.dumps({"seconds": time.perf_counter() - start, "peak": status("VmHWM") - before}))
"""


def of_characters(dim: int, n_layers: int, n_heads: int, ffn_dim: int, context: int) -> ModelConfig:
    return ModelConfig(
        dim=dim, n_layers=n_layers, n_heads=n_heads, n_kv_heads=n_heads, head_dim=dim // n_heads, ffn_dim=ffn_dim,
        vocab_size=65, max_seq_len=context, tie_embeddings=False,
    )  # fmt: skip


CHARACTERS = {  # the size's name: its shape, and rows of a batch
    "0.8M": (of_characters(128, 4, 4, 352, context=64), 12),
    "2.9M": (of_characters(192, 6, 6, 576, context=256), 16),
}


def random_batch(config: ModelConfig, shape: tuple[int, int]) -> Batch:
    random = torch.Generator().manual_seed(0)
    tokens = torch.randint(config.vocab_size, (shape[0], shape[1] + 1), generator=random)
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())


def against_plain(config: ModelConfig, shape: tuple[int, int], settings: TrainSettings, rounds: int) -> Times:
    """Seconds of a step of our trainer, and of a plain GPT's."""
    batch = random_batch(config, shape)
    trainer = Trainer(Llama(config).train(), None, lambda step: batch, settings, Path("unused"))
    peer = PlainGPT(config)
    optimizer = torch.optim.AdamW(peer.parameters(), lr=settings.learning_rate)
    with threads(1):
        return race(trainer._one_step, lambda: plain_step(peer, optimizer, batch, settings.clip), rounds)


def head_and_loss(way: str) -> Callable[[], None]:
    """To call: the head, the loss and their gradients, in "chunks" or as a "whole". What warms up is done."""
    x, head = torch.randn(TOKENS, DIM, requires_grad=True), torch.randn(VOCABULARY, DIM, requires_grad=True)
    targets = torch.randint(VOCABULARY, (TOKENS,))

    def call(count: int = TOKENS) -> None:
        if way == "chunks":
            head_cross_entropy(x[:count], head, targets[:count]).backward()
        else:
            cross_entropy(linear(x[:count], head), targets[:count]).backward()

    call(2)
    return call


def step_of(way: str) -> Callable[[], Any]:
    """To call: a step of the 2.9M model in fp32, with "checkpointing" or "not". What warms up is done."""
    config, rows = CHARACTERS["2.9M"]
    few, many = random_batch(config, (1, 8)), random_batch(config, (rows, config.max_seq_len))
    settings = TrainSettings(steps=10**6, warmup=0, learning_rate=1e-3, checkpointing=way == "checkpointing")
    trainer = Trainer(Llama(config).train(), None, lambda step: many if step else few, settings, Path("unused"))
    trainer._one_step()
    return trainer._one_step


def alone(name: str, way: str) -> dict[str, float]:
    """Seconds, and bytes of the peak, of what the function `name` prepares, in a process of its own."""
    child = subprocess.run([sys.executable, "-c", CHILD, name, way], capture_output=True, text=True, cwd=ROOT)
    if child.returncode:
        raise ValueError(f"{name} was not measured: {child.stderr.strip().splitlines()[-1]}")
    return json.loads(child.stdout)


def around_steps(model: Llama, batches: Callable[[int], Batch], settings: TrainSettings) -> tuple[float, float]:
    """Seconds of a whole run, and of its bare steps: without data, records, the bar and checkpoints.

    Both from one run, so that whatever else the machine does falls on both.
    """
    spent = {"step": 0.0, "data": 0.0}

    def timed(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def inner(*arguments: Any) -> Any:
            start = time.perf_counter()
            try:
                return call(*arguments)
            finally:
                spent[name] += time.perf_counter() - start

        return inner

    with tempfile.TemporaryDirectory() as folder, threads(1), contextlib.redirect_stderr(io.StringIO()):
        trainer = Trainer(model, None, timed("data", batches), settings, Path(folder))
        trainer._one_step()  # warms up, and is not counted
        trainer.step = 0
        trainer._one_step = timed("step", trainer._one_step)  # type: ignore[method-assign]
        spent |= {"step": 0.0, "data": 0.0}
        start = time.perf_counter()
        trainer.run()
        return time.perf_counter() - start, spent["step"] - spent["data"]


def measure(
    config: ModelConfig, shape: tuple[int, int], precision: str, rounds: int, theirs: str | None = None
) -> Times:
    """Seconds of a step on a batch of `shape`; in what precision `theirs` is, if not in the same. Raises AssertionError
    when the losses differ."""
    ours, other = pair_of_models(config)  # all weights are random and the same
    other.train()
    other.set_attn_implementation("sdpa")  # what transformers takes when it is not told
    other.config.use_cache = False  # as its own trainer sets it
    settings = TrainSettings(steps=10**6, warmup=0, learning_rate=1e-3, optimizer="adamw", precision=precision)
    batch = random_batch(config, shape)
    losses: tuple[list[float], list[float]] = ([], [])

    trainer = Trainer(ours.train(), None, lambda step: batch, settings, Path("unused"))

    def our_step() -> None:
        losses[0].append(trainer._one_step()["loss"])

    (optimizer,) = make_optimizers(other, settings)

    def their_step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=(theirs or precision) == "bfloat16"):
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

    with threads(1):
        peaks = {precision: peak_flops(getattr(torch, precision)) for precision in ("float32", "bfloat16")}
    quick = quick_precision("cpu")
    for size, (config, batch) in CHARACTERS.items():
        shape = batch, config.max_seq_len
        tokens = batch * config.max_seq_len
        times = {}
        for optimizer, precision in (("adamw", quick), ("muon", quick), ("adamw", "float32")):
            settings = TrainSettings(
                steps=10**6, warmup=0, learning_rate=1e-3, optimizer=optimizer, precision=precision
            )
            times[optimizer, precision] = against_plain(config, shape, settings, rounds)
        for optimizer, words, least in (("adamw", "AdamW", PLAIN_TARGET), ("muon", "Muon", None)):
            ours, peer, ratio = times[optimizer, quick]
            name = f"training {size}, {words}, against a plain GPT with AdamW"
            found.append(row(name, tokens / ours, tokens / peer, "tokens/s", ratio, at_least=least))
        ours, peer, ratio = measure(config, shape, quick, rounds, theirs="float32")
        name = f"training {size}, AdamW, against transformers in fp32"
        found.append(row(name, tokens / ours, tokens / peer, "tokens/s", ratio, at_least=THEIRS_TARGET))
        for precision in dict.fromkeys(("float32", quick)):
            reached = config.flops_per_token(shape[1], training=True) * tokens / times["adamw", precision].ours
            name = f"training {size}, {precision}, against the peak of large products"
            found.append(row(name, reached / 1e9, peaks[precision] / 1e9, "GFLOP/s", reached / peaks[precision]))

    for name, ways, words, most in (
        ("head_and_loss", ("chunks", "whole"), f"head and loss, {TOKENS:,} tokens of {VOCABULARY:,}, in chunks", 0.5),
        ("step_of", ("checkpointing", "not"), "a step of 2.9M, fp32, with checkpointing", 0.7),
    ):
        pairs = [[alone(name, way) for way in ways] for _ in range(min(rounds, 3))]
        peaks_of = [statistics.median(pair[i]["peak"] / 1e6 for pair in pairs) for i in (0, 1)]
        times_of = [statistics.median(pair[i]["seconds"] for pair in pairs) for i in (0, 1)]
        found += [
            row(f"{words}: peak, against without", *peaks_of, "MB", peaks_of[0] / peaks_of[1], at_most=most),
            row("… and time", *times_of, "s", times_of[0] / times_of[1]),
        ]

    settings = TrainSettings(steps=STEPS, warmup=0, learning_rate=1e-3, precision=quick)
    config, batch = CHARACTERS["0.8M"]
    text = TextBatches(torch.randint(config.vocab_size, (10**6,)), batch, config.max_seq_len)
    tokenizer = load("toy")[1]
    assert tokenizer is not None
    stories = StoryBatches(tokenizer, ROWS)
    for name, model, batches in (
        ("0.8M on text", Llama(config), text), ("the toy on stories", Llama(ModelConfig.preset("toy")), stories),
    ):  # fmt: skip
        whole, bare = around_steps(model, batches, settings)
        name = f"{STEPS} steps of {name} and their data, records, checkpoint, against bare steps"
        found.append(row(name, whole, bare, "s", whole / bare, at_most=AROUND_TARGET))
    return found
