"""Train six sizes of LLaMA on the same stories, some minutes each, and write what they reach: `python data/scaling.py`.

Only the width differs: depth, heads, data, their order, optimizer and schedule are the same. `scaling.json` holds the
results; chapter 16 fits a law to the five smaller ones and predicts the sixth.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from minillama import load
from minillama.config import ModelConfig
from minillama.data import StoryBatches, story_validation
from minillama.model import Llama
from minillama.trainer import TrainSettings, batch_loss, make_optimizers, mean_loss, rate_at

HERE = Path(__file__).parent
WIDTHS = (16, 24, 32, 48, 64, 96)
SETTINGS = TrainSettings(steps=3000, learning_rate=2e-2, warmup=50)
BATCH_SIZE, VALIDATION_STORIES = 16, 1000


def config(width: int, vocab_size: int) -> ModelConfig:
    return ModelConfig(
        dim=width, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=3 * width, vocab_size=vocab_size, max_seq_len=512,
        rope_theta=1e5, tie_embeddings=True,
    )  # fmt: skip


def train(model: nn.Module, batches: StoryBatches, settings: TrainSettings, steps: Iterable[int]) -> list[float]:
    """These steps of a run; the loss of each."""
    optimizers, losses = make_optimizers(model, settings), []
    for step in steps:
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate_at(step, settings) * settings.learning_rate
        loss = batch_loss(model, batches(step))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    return losses


def main() -> None:
    torch.set_num_threads(1)
    tokenizer = load("toy")[1]
    validation = story_validation(tokenizer, VALIDATION_STORIES, seed=0)
    batches = StoryBatches(tokenizer, BATCH_SIZE, seed=0)
    tokens = sum(batches(step).scored for step in range(SETTINGS.steps))
    report = {"floor": validation.floor, "steps": SETTINGS.steps, "tokens": tokens, "runs": []}
    for width in WIDTHS:
        torch.manual_seed(0)
        model = Llama(config(width, tokenizer.vocab_size)).train()
        losses = train(model, batches, SETTINGS, tqdm(range(SETTINGS.steps), desc=f"width {width}", unit="step"))
        report["runs"].append({
            "width": width, "parameters": model.config.n_params(),
            "loss": mean_loss(model.eval(), validation.batches), "first": losses[:100], "curve": losses[::25],
        })  # fmt: skip
        unfinished = HERE / "scaling.tmp"
        unfinished.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        os.replace(unfinished, HERE / "scaling.json")


if __name__ == "__main__":
    main()
