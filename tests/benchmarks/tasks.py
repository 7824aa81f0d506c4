"""How well models do the toy world's four tasks: `python -m tests.benchmarks.tasks`, stored in TASKS.md.

The same tasks for all, about new stories: the shipped toy after fine-tuning, a model of its shape that starts from
nothing with the same recipe, SmolLM2 as it is (with no example, and with four), and SmolLM2 with LoRA. Every answer
follows from the story, so the best possible score is 1 (of BLEU 100).
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from minillama import load
from minillama.evaluate import bootstrap, run_task
from minillama.finetune import RECIPES, LoraTrainer, TaskBatches, add_lora, renew
from minillama.model import Llama
from minillama.tokenizer import Tokenizer
from minillama.trainer import Trainer, TrainSettings
from tests.benchmarks.__main__ import machine

RESULTS = Path(__file__).with_name("TASKS.md")
COUNT, COUNT_OF_SMOLLM2 = 500, 100
TARGETS = {"mood": ("accuracy", 0.98), "question": ("exact_match", 0.95), "summary": ("rougeL", 0.95),
           "translation": ("bleu", 90.0)}  # fmt: skip
MODELS = ("toy, fine-tuned", "toy, from scratch", "SmolLM2, no example", "SmolLM2, four examples", "SmolLM2, LoRA")
LORA_STEPS, LORA_BATCH, LORA_RANK = 360, 8, 8
NOTE = """\
Made by `python -m tests.benchmarks.tasks`. Scores are means over {count} tasks about new stories ({small} for SmolLM2),
between brackets the middle 95 % of 1,000 resamples; `held out`: about pairs of colour and thing that no training text
has. Seconds are those of training. SmolLM2 with LoRA learns all four tasks in one run. A part that is measured anew
(`… tasks question lora`) replaces its rows.
"""


def trained(model: Llama, tokenizer: Tokenizer, kinds: Sequence[str], settings: TrainSettings, batch: int,
            trainer: type[Trainer] = Trainer) -> float:  # fmt: skip
    """Train the model on these kinds of tasks. Returns the seconds that it took."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        trainer(model, tokenizer, TaskBatches(tokenizer, kinds, batch, settings.steps), settings, Path(folder)).run()
    return time.perf_counter() - started


def tuned_toy(kind: str, scratch: bool) -> tuple[Llama, Tokenizer, float]:
    """The toy, or a model of its shape without its weights, after the recipe of a kind; and the seconds."""
    model, tokenizer = load("toy")
    steps, batch, rate, renewed = RECIPES[kind]
    if scratch:
        torch.manual_seed(0)
        model = Llama(model.config)
    elif renewed:
        renew(model, renewed)
    settings = TrainSettings(steps=steps, learning_rate=rate, warmup=0, precision="bfloat16",
                             save_every=steps)  # fmt: skip
    return model, tokenizer, trained(model, tokenizer, [kind], settings, batch)


def tuned_smollm2() -> tuple[Llama, Tokenizer, float]:
    """SmolLM2 with LoRA on all matrices, after some minutes of all four kinds; and the seconds."""
    model, tokenizer = load("smollm2")
    torch.manual_seed(0)
    add_lora(model, LORA_RANK, 2 * LORA_RANK, ("wq", "wk", "wv", "wo", "gate", "up", "down"))
    settings = TrainSettings(steps=LORA_STEPS, learning_rate=1e-3, warmup=10, optimizer="adamw", weight_decay=0.0,
                             precision="bfloat16", save_every=LORA_STEPS)  # fmt: skip
    return model, tokenizer, trained(model, tokenizer, list(TARGETS), settings, LORA_BATCH, LoraTrainer)


def scores(name: str, model: Llama, tokenizer: Tokenizer, kind: str, count: int, seconds: float | None = None,
           shots: int = 0) -> list[dict[str, Any]]:  # fmt: skip
    """Rows of the table: the model on new stories, and on those of pairs that are held out."""
    metric, target = TARGETS[kind]
    rows = []
    for heldout in (False, True) if not shots else (False,):
        score = run_task(model, tokenizer, kind, count=count, heldout=heldout, shots=shots).scores[metric]
        stories = "held out" if heldout else "new"
        rows.append({"task": kind, "metric": metric, "model": name, "stories": stories, "interval": bootstrap(score),
                     "seconds": seconds, "target": target if name == "toy, fine-tuned" else None})  # fmt: skip
        value, low, high = rows[-1]["interval"]
        print(f"{kind}, {name}, {stories}: {metric} {value:.3f} [{low:.3f}, {high:.3f}]", flush=True)
    return rows


def toys(kind: str) -> list[dict[str, Any]]:
    rows = []
    for name, scratch in (("toy, fine-tuned", False), ("toy, from scratch", True)):
        model, tokenizer, seconds = tuned_toy(kind, scratch)
        rows += scores(name, model, tokenizer, kind, COUNT, seconds)
    return rows


def smollm2() -> list[dict[str, Any]]:
    rows = []
    model, tokenizer = load("smollm2", dtype=torch.bfloat16)
    for kind in TARGETS:
        for shots, name in ((0, "SmolLM2, no example"), (4, "SmolLM2, four examples")):
            rows += scores(name, model, tokenizer, kind, COUNT_OF_SMOLLM2, shots=shots)
    return rows


def lora() -> list[dict[str, Any]]:
    model, tokenizer, seconds = tuned_smollm2()
    return [row for kind in TARGETS
            for row in scores("SmolLM2, LoRA", model, tokenizer, kind, COUNT_OF_SMOLLM2, seconds)]  # fmt: skip


def lines_of(rows: list[dict[str, Any]]) -> dict[tuple[str, ...], str]:
    """A line of the table for each row, by task, model and stories."""
    lines = {}
    for r in rows:
        digits = 1 if r["metric"] == "bleu" else 3
        value, low, high = (f"{x:.{digits}f}" for x in r["interval"])
        seconds = "" if r["seconds"] is None else f"{r['seconds']:.0f}"
        target = "" if r["target"] is None else f"≥ {r['target']:g}"
        met = "" if r["target"] is None else "met" if r["interval"].value >= r["target"] else "not met"
        lines[r["task"], r["model"], r["stories"]] = (
            f"| {r['task']} | {r['model']} | {r['stories']} | {r['metric']} | {value} | [{low}, {high}] "
            f"| {seconds} | {target} | {met} |"
        )
    return lines


def stored() -> dict[tuple[str, ...], str]:
    """The lines that TASKS.md has."""
    if not RESULTS.exists():
        return {}
    keys = ((tuple(cell.strip() for cell in line.split("|")[1:4]), line)
            for line in RESULTS.read_text(encoding="utf-8").splitlines())  # fmt: skip
    return {key: line for key, line in keys if key[:1] and key[0] in TARGETS}


def store(lines: dict[tuple[str, ...], str]) -> None:
    """Write TASKS.md."""
    tasks, stories = list(TARGETS), ("new", "held out")
    order = sorted(lines, key=lambda key: (tasks.index(key[0]), MODELS.index(key[1]), stories.index(key[2])))
    table = [
        "| task | model | stories | metric | score | interval | seconds | target | |",
        "|---|---|---|---|---:|---|---:|---|---|",
        *(lines[key] for key in order),
    ]
    note = NOTE.format(count=COUNT, small=COUNT_OF_SMOLLM2)
    text = f"# The toy world's tasks\n\n{note}\n{machine()}\n\n" + "\n".join(table) + "\n"
    RESULTS.write_text(text, encoding="utf-8")


def main(arguments: list[str]) -> int:
    parts: dict[str, Callable[[], list[dict[str, Any]]]] = {kind: lambda kind=kind: toys(kind) for kind in TARGETS}
    parts |= {"lora": lora, "smollm2": smollm2}  # what is timed comes first
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.tasks", description="Measure the tasks.")
    parser.add_argument("names", nargs="*", metavar="name", help=f"what to measure, of {', '.join(parts)}; else all")
    names = parser.parse_args(arguments).names or list(parts)
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    rows = []
    for name in names:
        rows += parts[name]()
        store(stored() | lines_of(rows))  # at once: what comes next takes long, and may be stopped
    return int(any(r["target"] and r["interval"].value < r["target"] for r in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
