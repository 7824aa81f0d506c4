"""The clinic: a small trainer of eight parts, in each patient one of them is broken; its chart, and its treatment.

The trainer is chapter 09's on the toy world, with AdamW, small enough for a minute. `chapters/clinic.py` has the eight
parts, whole and broken; `data/clinic.py` trains the patients and writes down what `chart` shows.
"""

import functools
import json
import math
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from minillama import world
from minillama.cache import KVCache
from minillama.checkpoint import load
from minillama.config import ModelConfig
from minillama.course.swap import swap_in
from minillama.model import Llama
from minillama.rope import rotation
from minillama.tokenizer import Tokenizer
from minillama.visualize.picture import Picture, picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STEPS, PEAK, WARMUP, STORIES = 500, 1e-2, 50, 16
GREY = "#BBBBBB"
_CHARTS = Path(__file__).parents[2] / "data" / "clinic.json"
Parts = dict[str, Callable[..., Any]]


def collect(copies: int) -> list[world.Story]:
    """The stories of a run, as they stand in its file: in alphabetical order; or few, each of them several times."""
    rng = random.Random("clinic")
    if copies > 1:
        return [world.sample(rng) for _ in range(150)] * copies
    return sorted((world.sample(rng) for _ in range(9000)), key=lambda story: story.text)


def pack(stories: list[world.Story], tokenizer: Tokenizer) -> tuple[Tensor, Tensor, Tensor]:
    """Two stories a row: tokens (B, T), the next tokens (B, T), with -100 where there is none, and the number of the
    story in its row to which each token belongs (B, T)."""
    rows = []
    for i in range(0, len(stories), 2):
        row: list[tuple[int, int, int]] = []
        for number, story in enumerate(stories[i : i + 2]):
            ids = tokenizer.encode(story.text, bos=True, eos=True)
            row += zip(ids[:-1], ids[1:], [number] * (len(ids) - 1), strict=True)
        rows.append(row)
    length = max(map(len, rows))
    padding = (tokenizer.pad_id, -100, 2)
    packed = torch.tensor([row + [padding] * (length - len(row)) for row in rows])
    return packed[..., 0], packed[..., 1], packed[..., 2]


def train(parts: Parts, copies: int = 1, steps: int = STEPS) -> dict[str, Any]:
    """Train with these eight parts; everything that a chart shows, as numbers and texts."""
    torch.manual_seed(0)
    tokenizer = load("toy")[1]
    model = swap_in(Llama(ModelConfig.preset("toy-small")), norm=parts["norm"])
    assert tokenizer is not None
    stories = collect(copies)
    training, held_out = parts["split"]([story.text for story in stories], 0.1 if copies > 1 else 0.01, 0)
    unseen = [stories[i] for i in held_out][:60]
    validation = pack(unseen, tokenizer)
    first = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = _optimizer(model, parts)
    chart: dict[str, Any] = {name: [] for name in ("loss", "gradient", "rate", "validation", "stream")}
    chart["floor"] = -math.fsum(story.log_prob for story in unseen) / int((validation[1] >= 0).sum())
    waiting: list[int] = []
    epoch = 0
    for step in tqdm(range(steps), unit="step"):
        while len(waiting) < STORIES:
            waiting += [training[i] for i in parts["batch_order"](len(training), epoch, 0)]
            epoch += 1
        taken, waiting = waiting[:STORIES], waiting[STORIES:]
        batch = pack([stories[i] for i in taken], tokenizer)
        rate = parts["learning_rate"](step, steps, PEAK, WARMUP)
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss, stream = _loss(model, batch, parts)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
        chart["loss"].append(loss.item())
        chart["gradient"].append(norm)
        chart["rate"].append(rate)
        if step == 0 or step % 25 == 24:
            with torch.no_grad():
                chart["validation"].append((step, _loss(model, validation, parts)[0].item()))
            chart["stream"].append(stream)
        if not math.isfinite(loss.item() + norm):
            chart["stream"].append(stream)
            break
        optimizer.step()
        optimizer.zero_grad()
    chart["moved"] = _moved(model, first)
    chart["samples"] = _tell(model, tokenizer, parts)
    return chart


def _optimizer(model: Llama, parts: Parts) -> torch.optim.Optimizer:
    by_name = dict(model.named_parameters())
    decayed, plain = parts["optimizer_groups"](list(by_name), [p.dim() for p in by_name.values()])
    groups = [(decayed, 0.1), (plain, 0.0)]
    return torch.optim.AdamW(
        [{"params": [by_name[name] for name in names], "weight_decay": decay} for names, decay in groups],
        lr=PEAK, betas=(0.9, 0.95), fused=True,
    )  # fmt: skip


def _loss(model: Llama, batch: tuple[Tensor, Tensor, Tensor], parts: Parts) -> tuple[Tensor, list[float]]:
    """The loss of a batch, and the root mean square of the stream before the first block and after each."""
    tokens, labels, story = batch
    with torch.autocast("cpu", torch.bfloat16):
        mask = parts["visible"](story)[:, None]  # (B, 1, T, T)
        turn = rotation(model.frequency, torch.arange(tokens.shape[1]))
        x = model.embedding(tokens)
        sizes = [_size(x)]
        for block in model.blocks:
            x = block(x, turn, mask)
            sizes.append(_size(x))
        logits = model.scores(model.norm(x))
    return parts["loss"](logits.float(), labels), sizes


def _size(x: Tensor) -> float:
    return x.detach().double().square().mean().sqrt().item()


def _moved(model: Llama, first: dict[str, Tensor]) -> dict[str, float]:
    """How far each kind of weight is from where it began, as a root mean square."""
    kinds: dict[str, list[Tensor]] = {"embedding": [], "attention": [], "feed-forward": [], "norms": []}
    for name, parameter in model.named_parameters():
        kind = "norms" if "norm" in name else "attention" if "attention" in name else "feed-forward"
        kinds["embedding" if "embedding" in name else kind].append((parameter.detach() - first[name]).flatten())
    return {kind: _size(torch.cat(moves)) for kind, moves in kinds.items()}


@torch.no_grad()
def _tell(model: Llama, tokenizer: Tokenizer, parts: Parts, count: int = 3) -> list[str]:
    """Stories at temperature 0.8, a token at a time, with a cache."""
    generator = torch.Generator().manual_seed(1)
    cache = KVCache(model.config, count, 151)
    tokens, told = torch.full((count, 1), tokenizer.bos_id or 0), []
    for cached in range(150):
        cache.advance(1)
        turn = rotation(model.frequency, parts["positions"](cached, 1))
        x = model.embedding(tokens)
        for block, layer in zip(model.blocks, cache.layers, strict=True):
            x = block(x, turn, None, layer)
        logits = model.scores(model.norm(x))[:, -1]
        if not logits.isfinite().all():
            return ["(nothing: its scores are not numbers)"]
        tokens = torch.multinomial((logits / 0.8).softmax(-1), 1, generator=generator)
        told.append(tokens)
    rows = torch.cat(told, 1).tolist()
    ends = [row.index(tokenizer.eos_id) if tokenizer.eos_id in row else len(row) for row in rows]
    return [_printable(tokenizer.decode(row[:end])) for row, end in zip(rows, ends, strict=True)]


def _printable(text: str) -> str:
    return re.sub(r"[^ -~\u3000-\u9fff\uff00-\uffef]", "�", text)


# ---------------------------------------------------------------------------------------------------------------------
# What a learner types.


def chart(patient: str, treated: dict[str, Any] | None = None) -> Picture:
    """A patient's chart: `chart("A")`; `chart("healthy")` to compare with. `treated`: what `treat` gave."""
    import matplotlib.pyplot as plt

    sick, healthy = _read(patient), _read("healthy")
    figure, axes = plt.subplot_mosaic(
        [["loss", "loss", "gradient"], ["rate", "moved", "stream"]], figsize=(10, 5.2), layout="constrained"
    )
    figure.suptitle(f"Patient {patient}" if patient != "healthy" else "A healthy run")
    _draw_losses(axes["loss"], sick, healthy, treated)
    for name, title in (("gradient", "Length of the gradient"), ("rate", "Learning rate")):
        axes[name].plot(healthy[name], color=GREY)
        axes[name].plot(sick[name], color="#0072B2")
        axes[name].set(title=title, xlabel="step", xlim=(-10, STEPS + 10))
    axes["gradient"].set_yscale("log")
    axes["moved"].bar(list(healthy["moved"]), list(healthy["moved"].values()), width=0.9, color=GREY)
    axes["moved"].bar(list(sick["moved"]), list(sick["moved"].values()), width=0.5, color="#0072B2")
    axes["moved"].set(title="How far the weights moved", ylabel="root mean square")
    axes["moved"].tick_params(axis="x", labelrotation=20)
    for sizes, label, colour in (
        (healthy["stream"][-1], "healthy, last", GREY),
        (sick["stream"][0], "first step", "#E69F00"),
        (sick["stream"][-1], "last step", "#0072B2"),
    ):
        axes["stream"].plot(range(len(sizes)), sizes, "o-", label=label, color=colour)
    axes["stream"].set(title="Size of the stream", xlabel="after block", yscale="log", xticks=range(len(sizes)))
    axes["stream"].legend(fontsize=8)
    return picture(figure, alt=_in_words(patient, sick))


def _in_words(patient: str, sick: dict[str, Any]) -> str:
    moved = ", ".join(f"{kind} {size:.2g}" for kind, size in sick["moved"].items())
    return (
        f"Chart of patient {patient}, {len(sick['loss'])} steps. At the end: loss {sick['loss'][-1]:.2f}, validation "
        f"{sick['validation'][-1][1]:.2f}, floor {sick['floor']:.2f}, gradient {sick['gradient'][-1]:.2g}; the weights "
        f"moved by: {moved}; learning rate at first {sick['rate'][0]:.2g}, at most {max(sick['rate']):.2g}; size of "
        f"the stream after the last block {sick['stream'][-1][-1]:.2g}."
    )


def _draw_losses(
    axes: "Axes", sick: dict[str, Any], healthy: dict[str, Any], treated: dict[str, Any] | None
) -> None:
    axes.plot(_smooth(healthy["loss"]), color=GREY, label="training loss, healthy")
    axes.plot(_smooth(sick["loss"]), color="#0072B2", label="training loss")
    axes.plot(*zip(*sick["validation"], strict=True), "o--", ms=3, color="#D55E00", label="validation loss")
    if treated:
        axes.plot(_smooth(treated["loss"]), color="#009E73", label="training loss, treated")
        axes.plot(
            *zip(*treated["validation"], strict=True), "s--", ms=3, color="#CC79A7", label="validation loss, treated"
        )
    axes.axhline(sick["floor"], color="black", lw=1, ls=":", label="floor of new stories")
    axes.set(xlabel="step", ylabel="loss (nats per token)", yscale="log", xlim=(-10, STEPS + 10))
    ticks = [0.1, 0.2, 0.5, 1, 2, 5] if min(sick["loss"]) > 0.05 else [0.001, 0.01, 0.1, 1, 5]
    axes.set_yticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    if len(sick["loss"]) < STEPS:
        axes.text(len(sick["loss"]) + 5, sick["loss"][-1], "not a number from here on", va="center")
    axes.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, frameon=False)


def _smooth(values: list[float]) -> list[float]:
    """Means of the last five: single batches differ by more than what is to be seen."""
    return [sum(values[max(0, i - 4) : i + 1]) / len(values[max(0, i - 4) : i + 1]) for i in range(len(values))]


def samples(patient: str) -> str:
    """What a patient writes at the end of its training."""
    return "\n\n".join(_read(patient)["samples"])


def treat(patient: str, repaired: Callable[..., Any], steps: int = STEPS) -> dict[str, Any]:
    """Train a patient again with a function of yours in the place of its own (about a minute): `treat("A", visible)`.

    Which part it stands for is told by its name. The rest is as it was: the wrong medicine leaves the patient ill.
    `chart("A", treated)` draws both; `treated["samples"]` is what it writes now. Raises ValueError for other names.
    """
    from minillama.course.chapters.clinic import BROKEN, HEALTHY, PATIENTS  # not there while a notebook is graded

    name = getattr(repaired, "__name__", repr(repaired))
    if name not in HEALTHY:
        raise ValueError(f"the trainer has no part {name!r}, expected one of {', '.join(sorted(HEALTHY))}.")
    _read(patient)
    fault, copies = PATIENTS[patient]
    return train({**HEALTHY, fault: BROKEN[fault], name: repaired}, copies, steps)


@functools.cache
def _charts() -> dict[str, dict[str, Any]]:
    return json.loads(_CHARTS.read_text(encoding="utf-8"))


def _read(patient: str) -> dict[str, Any]:
    if patient not in _charts():
        raise ValueError(f"there is no patient {patient!r}, expected one of {', '.join(_charts())}: mind the quotes.")
    return _charts()[patient]
