"""The small toy of the training chapter: `minillama train` as it stands, on two threads, to stories that read well.

No peer here but a limit: three minutes, and half of the stories without a single wrong word.
"""

import inspect
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from minillama import generate, load, world
from minillama.cli.train import quick_precision, train
from minillama.config import ModelConfig
from minillama.data import StoryBatches
from minillama.model import Llama
from minillama.trainer import Trainer, TrainSettings
from tests.benchmarks.harness import row, threads

SECONDS, ACCEPTED, STORIES = 180, 0.5, 200


def accepted(model: Llama, tokenizer: Any) -> float:
    """The share of stories, sampled at temperature 0.8, that the world accepts."""
    count = 0
    for text in generate(model, tokenizer, [""] * STORIES, max_new_tokens=200, temperature=0.8, seed=0):
        try:
            world.log_prob(text)
            count += 1
        except world.Fault:
            pass
    return count / STORIES


def rows(rounds: int = 1) -> list[dict[str, Any]]:
    """One run, however many rounds: it is long enough."""
    default = {name: parameter.default for name, parameter in inspect.signature(train).parameters.items()}
    tokenizer = load("toy")[1]
    settings = TrainSettings(
        steps=default["steps"], learning_rate=default["learning_rate"], warmup=0, precision=quick_precision("cpu"),
        validate_every=default["steps"], save_every=default["steps"],
    )  # fmt: skip
    torch.manual_seed(default["seed"])
    model = Llama(ModelConfig.preset(default["preset"]))
    with threads(2), tempfile.TemporaryDirectory() as folder:
        batches = StoryBatches(tokenizer, default["batch_size"], default["seed"])
        trainer = Trainer(model, tokenizer, batches, settings, Path(folder))
        started = time.perf_counter()
        trainer.run()
        seconds = time.perf_counter() - started
    share = accepted(model, tokenizer)
    return [
        row("`minillama train`, two threads, against 3 minutes", seconds, SECONDS, "s", seconds / SECONDS, at_most=1.0),
        row("… its stories that are accepted, against half", share, ACCEPTED, "", share / ACCEPTED, at_least=1.0),
    ]
