"""What rounding weights to 8 and 4 bits costs in what a model says.

On the toy, whose weights were never rounded: the KL divergence from the fp32 model, in nats a token. On SmolLM2, whose
file is in groups of 32 at 4 bits already, so that the same grid changes nothing: perplexity on English prose (the
chapters'), against fp32, and of fp32 against llama.cpp on the same file. On random matrices: the rounding error against
theory, step/√12.
"""

import itertools
import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minillama import load, world
from minillama.model import Llama
from minillama.quantize import Int4Linear, Int8Linear
from tests.benchmarks.harness import row, threads
from tests.benchmarks.llamacpp import peer_models

CHAPTERS = Path(__file__).parents[2] / "chapters"
WINDOW, WINDOWS, STORIES = 512, 24, 100  # WINDOWS: what shows losses of several per cent
ONE_HALF_PERCENT = 1.005


def grid(group: int | None, steps: int, symmetric: bool) -> Callable[[Tensor], Tensor]:
    """A function that rounds a matrix to a grid of so many steps for each group of a row, or for each row."""

    def rounded(weight: Tensor) -> Tensor:
        parts = weight.unflatten(1, (-1, group or weight.shape[1]))
        low, high = parts.amin(-1, keepdim=True), parts.amax(-1, keepdim=True)
        if symmetric:
            high = parts.abs().amax(-1, keepdim=True)
            low = -high
        step = ((high - low) / steps).clamp_min(1e-30)
        return (((parts - low) / step).round() * step + low).flatten(1)

    return rounded


def with_rounded(model: Llama, rounded: Callable[[Tensor], Tensor]) -> Llama:
    """The model, its matrices rounded in place (the arithmetic stays fp32)."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.copy_(rounded(parameter))
    return model


@torch.inference_mode()
def losses(model: Llama, windows: Tensor) -> Tensor:
    """Nats of every token of (windows, tokens) but each first."""
    return torch.cat([F.cross_entropy(model(w[None])[0, :-1].float(), w[1:], reduction="none") for w in windows])


def prose() -> Tensor:
    """English of all chapters as SmolLM2's tokens (windows, WINDOW)."""
    texts = []
    for path in sorted(CHAPTERS.glob("*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        texts += ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]
    _, tokenizer = load("smollm2")
    ids = tokenizer.encode("\n\n".join(texts))
    count = len(ids) // WINDOW
    assert count >= WINDOWS, f"{len(ids)} tokens of prose are too few"
    return torch.tensor(ids[: count * WINDOW]).view(count, WINDOW)


def perplexities() -> list[dict[str, Any]]:
    windows = prose()
    exact = losses(load("smollm2")[0], windows)
    found = []

    def against_fp32(name: str, model: Llama, windows: Tensor, at_most: float | None = None) -> None:
        other = losses(model, windows)
        same = exact[: len(other)]
        more, base = other - same, same.mean().exp().item()
        error, ratio = more.std().item() / len(more) ** 0.5, more.mean().exp().item()
        name = f"perplexity of SmolLM2, {name}, against fp32 (± {100 * error:.2f} %)"
        found.append(row(name, base * ratio, base, "", ratio, at_most=at_most))

    against_fp32("int8", load("smollm2", dtype="int8")[0], windows, ONE_HALF_PERCENT)
    against_fp32("int4 as in its file", load("smollm2", dtype="int4")[0], windows)
    windows = windows[:WINDOWS]
    against_fp32("symmetric 4 bits, groups of 32", with_rounded(load("smollm2")[0], grid(32, 14, True)), windows)
    for group in (64, 192):  # 128 does not divide its rows of 576
        rounded = with_rounded(load("smollm2")[0], grid(group, 15, False))
        against_fp32(f"asymmetric 4 bits, groups of {group}", rounded, windows)

    peer = peer_models(n_ctx=WINDOW, n_batch=WINDOW, logits_all=True)[0]
    theirs = []
    for window in windows:
        peer.reset()
        peer.eval(window.tolist())
        theirs.append(F.cross_entropy(torch.tensor(peer.scores[: WINDOW - 1]), window[1:], reduction="none"))
    other, base = (nats.mean().exp().item() for nats in (torch.cat(theirs), exact[: len(theirs) * (WINDOW - 1)]))
    ratio = max(base / other, other / base)
    name = "perplexity of SmolLM2, fp32, and llama.cpp's on the same file"
    return [*found, row(name, base, other, "", ratio, at_most=ONE_HALF_PERCENT)]


def divergences() -> list[dict[str, Any]]:
    """KL(fp32 ‖ rounded) on stories of the world, beside the trained toy's own distance from the world."""
    rng, (exact, tokenizer) = random.Random(0), load("toy")
    stories = [torch.tensor([tokenizer.encode(world.sample(rng).text, bos=True)]) for _ in range(STORIES)]

    @torch.inference_mode()
    def kl(other: Llama) -> float:
        sums = [F.kl_div(other(s)[0].float().log_softmax(-1), exact(s)[0].log_softmax(-1), reduction="sum",
                         log_target=True).item() for s in stories]  # fmt: skip
        return sum(sums) / sum(s.shape[1] for s in stories)

    nats = {kind: kl(load("toy", dtype=kind)[0]) for kind in ("bfloat16", "int8", "int4")}
    base = nats.pop("bfloat16")
    return [
        row(f"KL of the toy in {kind} from fp32, against bf16's", value, base, "nats", value / base)
        for kind, value in nats.items()
    ]


def rounding() -> list[dict[str, Any]]:
    """Root mean square errors on a Gaussian matrix, against step/√12; the ends of an asymmetric group have none."""
    weight, found = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0)), []

    def error(other: Tensor) -> float:
        return (other.double() - weight.double()).square().mean().sqrt().item()

    step = (2 * weight.abs().amax(1) / 254).double().square().mean().sqrt().item()
    measured, theory = error(Int8Linear.from_float(weight).dequantize()), step / math.sqrt(12)
    found.append(row("rounding error, int8, a scale a row, against theory", measured, theory, "σ", measured / theory,
                     at_most=1.03))  # fmt: skip
    for group in (32, 64, 128):
        parts = weight.view(1024, -1, group)
        step = ((parts.amax(-1) - parts.amin(-1)) / 15).double().square().mean().sqrt().item()
        theory = step / math.sqrt(12) * math.sqrt((group - 2) / group)
        measured = error(Int4Linear.from_float(weight, group).dequantize())
        found.append(row(f"rounding error, int4, groups of {group}, against theory", measured, theory, "σ",
                         measured / theory, at_most=1.03))  # fmt: skip
    return found


def rows(rounds: int = 1) -> list[dict[str, Any]]:
    """Once: nothing here depends on time."""
    with threads(2):
        return list(itertools.chain(rounding(), divergences(), perplexities()))
