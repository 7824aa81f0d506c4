"""Train LLaMA's relatives on the toy world, minutes each, and write what they reach: `python data/architectures.py`.

All read the same stories in the same order, have the same width and depth, and are trained by the same optimizer with
the same schedule; `architectures.json` holds the results, which chapter 07 shows. Each relative is written in the
fewest lines that keep what makes it different. A trigram with smoothing stands for what came before them.

Letters: B batch, T time, D width, V vocabulary.
"""

import json
import math
import os
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from minillama import load
from minillama.config import ModelConfig
from minillama.data import Batch, StoryBatches, story_validation
from minillama.loss import IGNORE, cross_entropy
from minillama.model import Llama
from minillama.trainer import TrainSettings, make_optimizers, rate_at

HERE = Path(__file__).parent
DIM, LAYERS, HEADS, LENGTH = 128, 4, 4, 160
SETTINGS = TrainSettings(steps=1000, learning_rate=8e-3, warmup=100, precision="bfloat16")
BATCH_SIZE = 16
HIDDEN = 0.15  # of the tokens, for BERT


class GPT2(nn.Module):
    """Radford et al. 2019: learned positions are added to the embeddings; LayerNorm before each
    part; GELU; biases."""

    def __init__(self, vocab_size: int):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocab_size, DIM), nn.Embedding(LENGTH, DIM)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                DIM, HEADS, 4 * DIM, 0.0, F.gelu, batch_first=True, norm_first=True
            )
            for _ in range(LAYERS)
        )
        self.norm = nn.LayerNorm(DIM)
        initialize(self)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]  # (B, T, D)
        future = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).triu(1)
        for block in self.blocks:
            x = block(x, src_mask=future)
        return self.norm(x) @ self.tokens.weight.mT  # (B, T, V)


class Transformer2017(nn.Module):
    """Vaswani et al. 2017: an encoder that sees all of the first part, a decoder that reads the
    whole and writes the second, and looks at the encoder's output in every layer; sinusoidal
    positions; LayerNorm after each part; ReLU."""

    def __init__(self, vocab_size: int):
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, DIM)
        shape = {"dim_feedforward": 4 * DIM, "dropout": 0.0, "batch_first": True}
        half = range(LAYERS // 2)
        encoder = nn.ModuleList(nn.TransformerEncoderLayer(DIM, HEADS, **shape) for _ in half)
        decoder = nn.ModuleList(nn.TransformerDecoderLayer(DIM, HEADS, **shape) for _ in half)
        self.blocks = nn.ModuleDict({"encoder": encoder, "decoder": decoder})
        angles = torch.arange(LENGTH)[:, None] * 10_000 ** (-torch.arange(0, DIM, 2) / DIM)
        self.register_buffer("positions", torch.stack([angles.sin(), angles.cos()], -1).flatten(1))
        initialize(self, std=DIM**-0.5)

    def embed(self, tokens: Tensor) -> Tensor:
        return self.tokens(tokens) * math.sqrt(DIM) + self.positions[: tokens.shape[1]]

    def forward(self, tokens: Tensor, source: Tensor) -> Tensor:
        memory, x, filling = self.embed(source), self.embed(tokens), source == 0
        for block in self.blocks["encoder"]:
            memory = block(memory, src_key_padding_mask=filling)
        future = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).triu(1)
        for block in self.blocks["decoder"]:
            x = block(x, memory, tgt_mask=future, memory_key_padding_mask=filling)
        return x @ self.tokens.weight.mT


class BERT(nn.Module):
    """Devlin et al. 2019: nothing hides the future, so it cannot be asked for the next word; some
    words are hidden instead, and it is asked for those."""

    def __init__(self, vocab_size: int):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocab_size, DIM), nn.Embedding(LENGTH, DIM)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(DIM, HEADS, 4 * DIM, 0.0, F.gelu, batch_first=True)
            for _ in range(LAYERS)
        )
        initialize(self)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return x @ self.tokens.weight.mT


def initialize(model: nn.Module, std: float = 0.02) -> None:
    """Small random matrices, as in GPT-2 and BERT."""
    for parameter in model.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=std)


def hide(batch: Batch, seed: int, hidden_id: int) -> Batch:
    """BERT's question: inputs in which some tokens are hidden, and as targets what stood there."""
    random_ = torch.Generator().manual_seed(seed)
    chosen = (torch.rand(batch.inputs.shape, generator=random_) < HIDDEN) & (batch.targets != IGNORE)
    chosen[:, 0] = False
    return Batch(batch.inputs.masked_fill(chosen, hidden_id), batch.inputs.masked_fill(~chosen, IGNORE))


def split(batch: Batch, period: int) -> tuple[Tensor, Batch]:
    """The encoder-decoder's question: the story up to its second full stop is the source, and the rest is written."""
    ends = [int((row == period).nonzero()[1]) + 1 for row in batch.inputs]
    source = torch.zeros(len(ends), max(ends), dtype=torch.int64)
    targets = batch.targets.clone()
    for i, end in enumerate(ends):
        source[i, :end] = batch.inputs[i, :end]
        targets[i, : end - 1] = IGNORE  # what the encoder was shown is not asked for
    return source, Batch(batch.inputs, targets)


Scorer = Callable[[Batch, int], tuple[Tensor, Tensor]]


def train(model: nn.Module, score: Scorer, batches: StoryBatches, name: str) -> float:
    """Train a model; `score(batch, number)` gives logits and targets. Seconds that it took."""
    optimizers = make_optimizers(model, SETTINGS)
    started = time.perf_counter()
    for step in tqdm(range(SETTINGS.steps), desc=name, unit="step"):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate_at(step, SETTINGS) * SETTINGS.learning_rate
        with torch.autocast("cpu", torch.bfloat16):
            loss = cross_entropy(*score(batches(step), step))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), SETTINGS.clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return time.perf_counter() - started


@torch.no_grad()
def evaluate(model: nn.Module, score: Scorer, batches: list[Batch]) -> dict[str, float]:
    """Mean loss in nats per scored token, and the share of them that the first guess gets right."""
    model.eval()
    total, right, count = 0.0, 0, 0
    for number, batch in enumerate(batches):
        logits, targets = score(batch, 10**6 + number)
        scored = int((targets != IGNORE).sum())
        total += cross_entropy(logits, targets).item() * scored
        right += int((logits.argmax(-1) == targets).sum())
        count += scored
    return {"loss": total / count, "right": right / count}


def trigram(batches: StoryBatches, stories: int, validation: list[Batch], vocab_size: int) -> dict[str, float]:
    """Count what followed each pair of tokens, each token, and any; mix the three by absolute discounting (Ney, Essen
    and Kneser 1994). The discount is chosen on other stories."""
    counts: list[Counter] = [Counter() for _ in range(3)]  # of what followed 0, 1, 2 tokens
    contexts: list[Counter] = [Counter() for _ in range(3)]
    kinds: list[Counter] = [Counter() for _ in range(3)]  # how many different tokens followed

    def rows(batch: Batch) -> list[list[int]]:
        return [[int(row[0]), *(int(t) for t in targets if t != IGNORE)] for row, targets in zip(
            batch.inputs, batch.targets, strict=True)]  # fmt: skip

    for step in range(stories // BATCH_SIZE):
        for row in rows(batches(step)):
            for i in range(1, len(row)):
                for n in range(3):
                    context = tuple(row[max(0, i - n) : i])
                    if not counts[n][context, row[i]]:
                        kinds[n][context] += 1
                    counts[n][context, row[i]] += 1
                    contexts[n][context] += 1

    def probability(row: list[int], i: int, discount: float) -> float:
        p = 1 / vocab_size
        for n in range(3):
            context = tuple(row[max(0, i - n) : i])
            if seen := contexts[n][context]:
                p = max(counts[n][context, row[i]] - discount, 0) / seen + discount * kinds[n][context] / seen * p
        return p

    def loss(some: list[Batch], discount: float) -> float:
        nats = [-math.log(probability(row, i, discount)) for b in some for row in rows(b) for i in range(1, len(row))]
        return sum(nats) / len(nats)

    others = [batches(10**5 + i) for i in range(4)]
    discount = min((0.05, 0.1, 0.2, 0.4, 0.6, 0.8), key=lambda d: loss(others, d))
    return {"loss": loss(validation, discount), "parameters": sum(len(c) for c in counts)}


def main() -> None:
    torch.set_num_threads(1)
    tokenizer = load("toy")[1]
    vocab_size, hidden_id = tokenizer.vocab_size, tokenizer.pad_id
    period = tokenizer.encode("One day.")[-1]
    validation = story_validation(tokenizer, 500, seed=0)
    batches = StoryBatches(tokenizer, BATCH_SIZE, seed=0)

    def next_word(model: nn.Module) -> Scorer:
        return lambda batch, number: (model(batch.inputs), batch.targets)

    def rest(model: nn.Module) -> Scorer:
        def score(batch: Batch, number: int) -> tuple[Tensor, Tensor]:
            source, asked = split(batch, period)
            return model(asked.inputs, source), asked.targets

        return score

    def hidden_word(model: nn.Module) -> Scorer:
        def score(batch: Batch, number: int) -> tuple[Tensor, Tensor]:
            asked = hide(batch, number, hidden_id)
            return model(asked.inputs), asked.targets

        return score

    results: dict[str, dict[str, float]] = {}
    for name, build, score in (
        ("LLaMA", lambda: Llama(ModelConfig.preset("toy")), next_word),
        ("GPT-2", lambda: GPT2(vocab_size), next_word),
        ("Transformer 2017", lambda: Transformer2017(vocab_size), rest),
        ("BERT", lambda: BERT(vocab_size), hidden_word),
    ):
        torch.manual_seed(0)
        model = build().train()
        seconds = train(model, score(model), batches, name)
        found = evaluate(model, score(model), validation.batches)
        if name == "LLaMA":  # on the encoder-decoder's question too
            source = [split(batch, period)[1] for batch in validation.batches]
            found["loss of the rest"] = evaluate(model, next_word(model), source)["loss"]
        parameters = sum(p.numel() for p in model.parameters())
        results[name] = {**found, "parameters": parameters, "seconds": round(seconds)}
    stories = SETTINGS.steps * BATCH_SIZE
    results["trigram"] = trigram(batches, stories, validation.batches, vocab_size)
    report = {"floor": validation.floor, "stories": stories, "steps": SETTINGS.steps, "models": results}
    unfinished = HERE / "architectures.tmp"
    unfinished.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    os.replace(unfinished, HERE / "architectures.json")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
