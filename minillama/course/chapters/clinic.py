"""The clinic: eight runs that went wrong. First the diagnoses, from charts; then the eight parts, each to repair.

A part stands here whole (the reference) and broken (as it is in the patient, and in the learner's notebook: what
answers like it counts as not attempted).
"""

import math
import random
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from minillama.course.exercise import Exercise, Experiment, Wrong
from minillama.course.judge import NOT_ATTEMPTED

# ---------------------------------------------------------------------------------------------------------------------
# The parts.


def visible(story: Tensor) -> Tensor:
    same = story[:, :, None] == story[:, None, :]
    return same & torch.ones(story.shape[1], story.shape[1], dtype=torch.bool).tril()


def all_of_the_story(story: Tensor) -> Tensor:
    return story[:, :, None] == story[:, None, :]


def loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)


def shifted_again(logits: Tensor, labels: Tensor) -> Tensor:
    return loss(logits[:, :-1], labels[:, 1:])


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2


def from_the_top(step: int, steps: int, peak: float, warmup: int) -> float:
    return peak * (1 + math.cos(math.pi * step / steps)) / 2


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def multiplied(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.sqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def optimizer_groups(names: list[str], dims: list[int]) -> tuple[list[str], list[str]]:
    pairs = list(zip(names, dims, strict=True))
    return [name for name, dim in pairs if dim >= 2], [name for name, dim in pairs if dim < 2]


def without_the_table(names: list[str], dims: list[int]) -> tuple[list[str], list[str]]:
    matrices, vectors = optimizer_groups(names, dims)
    return [name for name in matrices if name.startswith(("blocks.", "output."))], vectors


def positions(cached: int, new: int) -> Tensor:
    return torch.arange(cached, cached + new)


def from_zero_each_time(cached: int, new: int) -> Tensor:
    return torch.arange(new)


def batch_order(stories: int, epoch: int, seed: int) -> list[int]:
    order = list(range(stories))
    random.Random(f"{seed}:{epoch}").shuffle(order)
    return order


def as_in_the_file(stories: int, epoch: int, seed: int) -> list[int]:
    return list(range(stories))


def split(texts: list[str], share: float, seed: int) -> tuple[list[int], list[int]]:
    distinct = sorted(set(texts))
    random.Random(seed).shuffle(distinct)
    held_out = set(distinct[: max(1, round(share * len(distinct)))])
    numbered = list(enumerate(texts))
    return [i for i, text in numbered if text not in held_out], [i for i, text in numbered if text in held_out]


def by_line(texts: list[str], share: float, seed: int) -> tuple[list[int], list[int]]:
    lines = list(range(len(texts)))
    random.Random(seed).shuffle(lines)
    count = max(1, round(share * len(texts)))
    return sorted(lines[count:]), sorted(lines[:count])


HEALTHY: dict[str, Callable[..., Any]] = {
    "batch_order": batch_order, "learning_rate": learning_rate, "loss": loss, "norm": norm,
    "optimizer_groups": optimizer_groups, "positions": positions, "split": split, "visible": visible,
}  # fmt: skip
BROKEN: dict[str, Callable[..., Any]] = {
    "batch_order": as_in_the_file, "learning_rate": from_the_top, "loss": shifted_again, "norm": multiplied,
    "optimizer_groups": without_the_table, "positions": from_zero_each_time, "split": by_line,
    "visible": all_of_the_story,
}  # fmt: skip
# Patient → what is broken in it, and how many copies of each story its file has (1: nine thousand different stories).
PATIENTS = {
    "A": ("optimizer_groups", 1), "B": ("split", 3), "C": ("learning_rate", 1), "D": ("positions", 1),
    "E": ("visible", 1), "F": ("batch_order", 1), "G": ("norm", 1), "H": ("loss", 1),
}  # fmt: skip

# ---------------------------------------------------------------------------------------------------------------------
# The diagnoses: disease → the part that has it, and what a chart would show.

DISEASES = {
    "leaked future": ("visible", "the loss would go below the floor on new stories too, and the samples would be "
                      "nonsense, since what it leans on is not there when it writes"),
    "double shift": ("loss", "the curves would look calm and end somewhat above the healthy run's, and the samples "
                     "would leave out every second word of the sentences that you know"),
    "no warm-up": ("learning_rate", "the learning rate would begin at its peak, and the loss would fall at once and "
                   "then stand nearly still while the healthy run passes it"),
    "exploding norm": ("norm", "the size of the stream would reach a number with more than ten digits within one step, "
                       "and the run would end early in something that is not a number"),
    "frozen embedding": ("optimizer_groups", "one of the bars of how far the weights moved would be zero"),
    "wrong RoPE at generation": ("positions", "all curves would be those of a healthy run, and only the samples would "
                                 "be ill"),
    "data order": ("batch_order", "the training loss would jump up now and then, its gradient with it, and the "
                   "validation loss would lag behind"),
    "train/validation mix-up": ("split", "training and validation loss would both go below the floor, and the samples "
                                "would still be stories, in scraps"),
}  # fmt: skip


def diagnosis(number: int, patient: str, why: str, hints: tuple[str, str, str]) -> Experiment:
    fault = PATIENTS[patient][0]

    def verify(measured: dict[str, Any]) -> str:
        known = {name.lower(): name for name in DISEASES}
        said = known.get(str(measured["disease"]).strip().lower())
        if said is None:
            return f"the disease is {measured['disease']!r:.40}, expected one of {', '.join(DISEASES)}."
        part, would_show = DISEASES[said]
        return "" if part == fault else f"with {said}, {would_show}: that is not what this chart shows."

    return Experiment(
        number=f"clinic.{number}", title=f"patient {patient}", name=f"patient_{patient.lower()}", minutes=5,
        difficulty=2, why=why, verify=verify, hints=hints,
        keys={"disease": "the name of a disease of the list", "because": "a sentence"},
        explain="on what in the chart or in the samples shows it, and what speaks against the disease most like it",
    )  # fmt: skip


DIAGNOSES = [
    diagnosis(1, "A", "A loss that stops too high has many causes, and one panel tells most of them apart.", (
        "Which of the six panels differs most from the healthy run's?",
        "Everything that is trained moves. Look for what did not.",
        "Compare the four bars: one kind of weight stands where the random numbers put it.")),
    diagnosis(2, "B", "The curve that everybody wishes for is sometimes the surest sign of illness.", (
        "Can a model of this world be better than the floor on stories that it has not seen?",
        "Two diseases pass below the floor. The samples tell them apart: are they scraps of stories, or nonsense?",
        "Ask where the stories that it is tested on come from, if it knows whole stretches of them.")),
    diagnosis(3, "C", "What happens in the first steps can cost a hundred later ones.", (
        "Where does this run lose its time, at the beginning, in the middle or at the end?",
        "Compare the first fifty steps of two panels with the healthy run's.",
        "Look at where the learning rate begins, and at what the loss does meanwhile.")),
    diagnosis(4, "D", "A run can be healthy and its model still write nonsense.", (
        "Is there anything wrong with the curves?",
        "If training and validation are well, the illness is in what only happens when it writes.",
        "It writes a token at a time, with a cache. What does the model need to be told about each new token?")),
    diagnosis(5, "E", "A loss that is too good is a finding, not a success.", (
        "Is this loss possible for a model that does what it should?",
        "It is below the floor and cannot write. What does it have in training that it lacks when it writes?",
        "Think of what stands to the right of each token in training.")),
    diagnosis(6, "F", "A training loss alone can look like progress.", (
        "What do training and validation loss do at the same moments?",
        "Where the training loss jumps, the stories suddenly become of another kind; ask why they change all at once.",
        "Jumps in one curve and not in the other, and openings that are broken: ask in which order the stories come.")),
    diagnosis(7, "G", "When a run ends in something that is not a number, the steps before it say why.", (
        "How many steps did it make?",
        "Look at what happens to the size of the stream from block to block in its last step.",
        "A part that should bring every vector to the same size seems to do the opposite.")),
    diagnosis(8, "H", "Some mistakes keep all curves smooth: then read the samples, aloud.", (
        "What is missing in the samples?",
        "The model has learned something well, but not quite the task: what does it predict?",
        "Take a sentence that you know from the stories and cross out the words that the sample leaves out.")),
]  # fmt: skip

# ---------------------------------------------------------------------------------------------------------------------
# The repairs.


def order_cases(g: Generator) -> Iterable[tuple[Any, ...]]:
    seed = int(torch.randint(1000, (), generator=g))
    return [(7, 0, seed), (7, 1, seed), (7, 0, seed + 1), (1, 0, 0), (0, 3, 1), (100, 5, seed), (101, 6, seed)]


def seed_only(stories: int, epoch: int, seed: int) -> list[int]:
    return batch_order(stories, 0, seed)


def epoch_only(stories: int, epoch: int, seed: int) -> list[int]:
    return batch_order(stories, epoch, 0)


def with_replacement(stories: int, epoch: int, seed: int) -> list[int]:
    return random.Random(f"{seed}:{epoch}").choices(range(stories), k=stories) if stories else []


def rate_cases(g: Generator) -> Iterable[tuple[Any, ...]]:
    peak = 0.001 + 0.01 * torch.rand((), generator=g).item()
    steps = [0, 1, 8, 9, 10, 57, 11, 99]
    return [(step, 100, peak, 10) for step in steps] + [(0, 7, 1.0, 0), (3, 7, 1.0, 0), (1, 40, 0.5, 20)]


def first_step_lost(step: int, steps: int, peak: float, warmup: int) -> float:
    return peak * step / warmup if step < warmup else learning_rate(step, steps, peak, warmup)


def a_jump_after_it(step: int, steps: int, peak: float, warmup: int) -> float:
    return peak * (step + 1) / warmup if step < warmup else from_the_top(step, steps, peak, warmup)


def above_the_peak(step: int, steps: int, peak: float, warmup: int) -> float:
    return peak * (step + 1) / warmup if 0 < warmup == step else learning_rate(step, steps, peak, warmup)


def straight_down(step: int, steps: int, peak: float, warmup: int) -> float:
    return learning_rate(step, steps, peak, warmup) if step < warmup else peak * (steps - step) / (steps - warmup)


def over_all_steps(step: int, steps: int, peak: float, warmup: int) -> float:
    return learning_rate(step, steps, peak, warmup) if step < warmup else from_the_top(step - warmup, steps, peak, 0)


def one_behind(step: int, steps: int, peak: float, warmup: int) -> float:
    return learning_rate(step, steps, peak, warmup) if step < warmup else learning_rate(step + 1, steps, peak, warmup)


def loss_cases(g: Generator) -> Iterable[tuple[Any, ...]]:
    out = []
    for b, t, v in ((1, 2, 5), (3, 7, 11), (2, 9, 4), (4, 5, 30)):
        labels = torch.randint(v, (b, t), generator=g)
        out.append((torch.randn(b, t, v, generator=g) * 3, labels))
        if t > 2:
            masked = labels.clone()
            masked[0, t // 2 :] = -100
            masked[-1, 0] = -100
            out.append((torch.randn(b, t, v, generator=g) * 50, masked))
    return out


def over_all_places(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum") / labels.numel()


def summed(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")


def shifted_back(logits: Tensor, labels: Tensor) -> Tensor:
    return loss(logits[:, 1:], labels[:, :-1])


def norm_cases(g: Generator) -> Iterable[tuple[Any, ...]]:
    out = []
    for shape in ((5, 6), (2, 7, 10), (1, 1, 3), (0, 4)):
        weight = 1 + 0.3 * torch.randn(shape[-1], generator=g)
        out.append((torch.randn(shape, generator=g), weight, 1e-5))
        out.append((torch.randn(shape, generator=g) * 0.01, weight, 1e-5))
        out.append((torch.randn(shape, generator=g) * 1e4, weight, 1e-5))
    return [*out, (torch.zeros(2, 4), torch.ones(4), 1e-5)]


def without_the_root(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps) * weight


def without_eps(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True)) * weight


def by_the_length(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + eps) * weight


def group_cases(g: Generator) -> Iterable[tuple[Any, ...]]:
    block = [("attention_norm.weight", 1), ("attention.wq.weight", 2), ("attention.wq.bias", 1), ("down.weight", 2)]
    inner = [(f"blocks.{i}.{name}", dim) for i in range(2) for name, dim in block]
    tied = [("embedding.weight", 2), *inner, ("norm.weight", 1)]
    mixed = [inner[i] for i in torch.randperm(len(inner), generator=g)]
    odd = [("blocks.0.gain", 1), ("table", 2), ("relative_bias_table", 2), ("norms.mixing", 2), ("kernel", 4)]
    out = []
    for pairs in (tied, [*tied, ("output.weight", 2)], [("norm.weight", 1), *mixed], odd, []):
        out.append(([name for name, _ in pairs], [dim for _, dim in pairs]))
    return out


def all_in_the_first(names: list[str], dims: list[int]) -> tuple[list[str], list[str]]:
    return list(names), []


def table_in_both(names: list[str], dims: list[int]) -> tuple[list[str], list[str]]:
    matrices, vectors = optimizer_groups(names, dims)
    return matrices, [name for name in names if name in vectors or name.startswith("embedding.")]


def table_not_decayed(names: list[str], dims: list[int]) -> tuple[list[str], list[str]]:
    matrices, _ = without_the_table(names, dims)
    return matrices, [name for name in names if name not in matrices]


def by_name(names: list[str], dims: list[int]) -> tuple[list[str], list[str]]:
    vectors = [name for name in names if "norm" in name or "bias" in name]
    return [name for name in names if name not in vectors], vectors


def position_cases(g: Generator) -> Iterable[tuple[Any, ...]]:
    cached = 2 + int(torch.randint(100, (), generator=g))
    return [(0, 5), (0, 1), (cached, 1), (cached, 4), (cached + 3, 9), (7, 0)]


def all_the_same(cached: int, new: int) -> Tensor:
    return torch.full((new,), cached)


def one_too_far(cached: int, new: int) -> Tensor:
    return torch.arange(cached, cached + new) + (1 if cached else 0)


def from_the_beginning(cached: int, new: int) -> Tensor:
    return torch.arange(cached + new)


def split_cases(g: Generator) -> Iterable[tuple[Any, ...]]:
    seed = int(torch.randint(1000, (), generator=g))
    few = [f"story {int(i)}" for i in torch.randint(12, (30,), generator=g)]
    many = [f"{int(i)} times" for i in torch.randint(1000, (90,), generator=g)] * 2
    uneven = ["the same"] * 20 + [f"other {i}" for i in range(9)]
    nine = [f"line {i}" for i in (5, 2, 8, 1, 7, 3, 9, 4, 6)]  # 0.3 of nine is 2.7
    return [(few, 0.25, seed), (nine, 0.3, seed), (many, 0.1, seed), (uneven, 0.3, seed + 1), (list("abcd"), 0.01, 3)]


def held_out_first(
    texts: list[str], distinct: list[str], count: int, seed: int, shuffle: bool = True
) -> tuple[list[int], list[int]]:
    """The split that holds out the first `count` of these different texts, after a shuffle."""
    distinct = list(distinct)
    if shuffle:
        random.Random(seed).shuffle(distinct)
    held_out = set(distinct[: max(1, count)])
    numbered = list(enumerate(texts))
    return [i for i, text in numbered if text not in held_out], [i for i, text in numbered if text in held_out]


def cut_off(texts: list[str], share: float, seed: int) -> tuple[list[int], list[int]]:
    return held_out_first(texts, sorted(set(texts)), int(share * len(set(texts))), seed)


def share_of_the_lines(texts: list[str], share: float, seed: int) -> tuple[list[int], list[int]]:
    return held_out_first(texts, sorted(set(texts)), round(share * len(texts)), seed)


def as_they_come(texts: list[str], share: float, seed: int) -> tuple[list[int], list[int]]:
    return held_out_first(texts, list(dict.fromkeys(texts)), round(share * len(set(texts))), seed)


def sides_swapped(texts: list[str], share: float, seed: int) -> tuple[list[int], list[int]]:
    training, held_out = split(texts, share, seed)
    return held_out, training


def trained_on_all(texts: list[str], share: float, seed: int) -> tuple[list[int], list[int]]:
    return list(range(len(texts))), split(texts, share, seed)[1]


def copies_dropped(texts: list[str], share: float, seed: int) -> tuple[list[int], list[int]]:
    first = {text: i for i, text in reversed(list(enumerate(texts)))}
    training, held_out = split(texts, share, seed)
    return [i for i in training if first[texts[i]] == i], [i for i in held_out if first[texts[i]] == i]


def not_shuffled(texts: list[str], share: float, seed: int) -> tuple[list[int], list[int]]:
    return held_out_first(texts, sorted(set(texts)), round(share * len(set(texts))), seed, shuffle=False)


def visible_cases(g: Generator) -> Iterable[tuple[Any, ...]]:
    out = []
    for b, t in ((1, 6), (3, 9), (2, 1), (4, 12), (2, 0)):
        steps = (torch.rand(b, t, generator=g) < 0.3).long()
        out.append((steps.cumsum(1),))
    return [(torch.tensor([[0, 0, 0, 1, 1, 2, 2]]),), *out]


def into_the_one_before(story: Tensor) -> Tensor:
    return torch.ones(story.shape[1], story.shape[1], dtype=torch.bool).tril().expand(len(story), -1, -1)


def not_at_itself(story: Tensor) -> Tensor:
    return all_of_the_story(story) & torch.ones(story.shape[1], story.shape[1], dtype=torch.bool).tril(-1)


def only_the_future(story: Tensor) -> Tensor:
    return visible(story).mT


def untouched(name: str) -> Wrong:
    return Wrong(NOT_ATTEMPTED, BROKEN[name])


REPAIRS = [
    Exercise(
        number="clinic.9", title="batch_order", name="batch_order", minutes=5, difficulty=1,
        why="What a model read last it knows best, so no kind of story may be the last.",
        reference=batch_order, cases=order_cases, tolerance=0.0,
        wrong=(
            untouched("batch_order"),
            Wrong("every epoch has the same order: the stories at its end are the last ones each time.", seed_only),
            Wrong("the seed makes no difference: two runs that should differ would not.", epoch_only),
            Wrong("some stories come twice in an epoch and others not at all: draw without putting back.",
                  with_replacement),
        ),
        hints=(
            "In which order do the stories lie in the file, and what does the model see at the end of an epoch?",
            "Each epoch needs an order of its own, which the seed and the epoch's number alone decide.",
            "Make the list of all numbers, and let the generator that the box names shuffle it.",
        ),
    ),
    Exercise(
        number="clinic.10", title="learning_rate", name="learning_rate", minutes=8, difficulty=2,
        why="AdamW's first steps are as large as any, and they are taken in the dark.",
        reference=learning_rate, cases=rate_cases,
        wrong=(
            untouched("learning_rate"),
            Wrong("the first step has the rate 0 and is lost: the line starts one step's share up.", first_step_lost),
            Wrong("at the end of the warm-up the rate jumps down: the cosine has to begin there, not at step 0.",
                  a_jump_after_it),
            Wrong("after the warm-up the cosine is one step ahead: its first step has the peak itself.", one_behind),
            Wrong("the step after the warm-up is still on the line, and above the peak: the cosine begins with step "
                  "`warmup`.", above_the_peak),
            Wrong("after the warm-up it falls in a straight line, not along half a cosine.", straight_down),
            Wrong("it does not reach zero at the end: the cosine has only the steps that are left after the warm-up.",
                  over_all_steps),
        ),
        hints=(
            "Which argument of the function is not used?",
            "Two pieces: a straight line during the warm-up, and then the cosine over the steps that are left.",
            "During the warm-up the peak times the share of it that is done, this step counted; then the half cosine "
            "of how much of the remaining steps is behind.",
        ),
    ),
    Exercise(
        number="clinic.11", title="loss", name="loss", minutes=5, difficulty=1,
        why="Two places that both mean well and shift by one make a model that skips words.",
        reference=loss, cases=loss_cases,
        wrong=(
            untouched("loss"),
            Wrong("it divides by all places: those that are not scored must not count.", over_all_places),
            Wrong("it adds up and does not divide: a longer batch would then weigh more.", summed),
            Wrong("it now scores each place with the label of the place before.", shifted_back),
        ),
        hints=(
            "What stands in the labels at place t: token t, or the token after it?",
            "Shifting is needed once, and somebody has done it already.",
            "Score every place with its own label, leave out what is not to be scored, take the mean.",
        ),
    ),
    Exercise(
        number="clinic.12", title="norm", name="norm", minutes=5, difficulty=1,
        why="A norm that makes large vectors larger feeds on its own output, block after block.",
        reference=norm, cases=norm_cases,
        wrong=(
            untouched("norm"),
            Wrong("the root is missing: it divides by the mean square, so small vectors come out large.",
                  without_the_root),
            Wrong("eps is not used: a vector of zeros gives NaN.", without_eps),
            Wrong("it divides by the length, not by the root of the mean: the result is smaller the wider the model.",
                  by_the_length),
        ),
        hints=(
            "What comes out for a vector ten times as long?",
            "A norm brings every vector to the same size, so large ones have to shrink.",
            "The broken part does with the root of the mean square the opposite of what it should.",
        ),
    ),
    Exercise(
        number="clinic.13", title="optimizer_groups", name="optimizer_groups", minutes=8, difficulty=2,
        why="A weight that is in no group is never changed, and nothing complains.",
        reference=optimizer_groups, cases=group_cases, tolerance=0.0,
        wrong=(
            untouched("optimizer_groups"),
            Wrong("everything is decayed: norms and biases are not to be pulled to zero.", all_in_the_first),
            Wrong("the embedding is in both groups: PyTorch refuses that, and it would be changed twice.",
                  table_in_both),
            Wrong("tables are matrices too: they belong to those that are decayed.", table_not_decayed),
            Wrong("it goes by \"norm\" and \"bias\" in the names, and names can be anything: the number of dimensions "
                  "decides.", by_name),
        ),
        hints=(
            "Is every name of the input in one of the two lists, whatever it is called?",
            "A rule by name forgets what has another name. What do all matrices have in common?",
            "Go by the number of dimensions alone: two or more to the first list, fewer to the second.",
        ),
    ),
    Exercise(
        number="clinic.14", title="positions", name="positions", minutes=5, difficulty=1,
        why="With a cache the model sees one new token, and cannot know by itself where it stands.",
        reference=positions, cases=position_cases, tolerance=0.0,
        wrong=(
            untouched("positions"),
            Wrong("all new tokens get the same position: they come one after the other.", all_the_same),
            Wrong("it is one too far: positions begin at 0, so the first new one is the number of those before.",
                  one_too_far),
            Wrong("it counts the tokens in the cache again: only the new ones get a position.", from_the_beginning),
        ),
        hints=(
            "What is the position of the next token if five are in the cache?",
            "It is right for the first call, when nothing is in the cache. What changes after it?",
            "As many whole numbers as there are new tokens, the first of them the number of tokens before.",
        ),
    ),
    Exercise(
        number="clinic.15", title="split", name="split", minutes=12, difficulty=2,
        why="A test on what was learned by heart measures memory, and it is the best-looking curve of all.",
        reference=split, cases=split_cases, tolerance=0.0,
        wrong=(
            untouched("split"),
            Wrong("what is held out is trained on all the same: take it away from the training lines.", trained_on_all),
            Wrong("some lines are in neither list: copies stay, but together, all on one side.", copies_dropped),
            Wrong("the seed makes no difference, and what is held out is the first in the alphabet: shuffle.",
                  not_shuffled),
            Wrong("the number to hold out is cut off, not rounded to the nearest.", cut_off),
            Wrong("the share is taken of the lines: it is the share of the different texts.", share_of_the_lines),
            Wrong("the different texts are shuffled in the order in which they come: sort them first.", as_they_come),
            Wrong("the two lists are swapped: first the lines for training, then those held out.", sides_swapped),
        ),
        hints=(
            "What happens to the two copies of a story that stands in the file twice?",
            "Choose among the different texts, not among the lines; the lines follow their text.",
            "The different texts in alphabetical order, shuffled; the first share of them is held out; then each line "
            "goes where its text went.",
        ),
    ),
    Exercise(
        number="clinic.16", title="visible", name="visible", minutes=8, difficulty=2,
        why="When stories share a row, a mask has two things to hide, and it is easy to think of one only.",
        reference=visible, cases=visible_cases, tolerance=0.0,
        wrong=(
            untouched("visible"),
            Wrong("a token sees the story before its own in the row: they have nothing to do with each other.",
                  into_the_one_before),
            Wrong("a token does not see itself: the first of a story would then have nothing to look at.",
                  not_at_itself),
            Wrong("it is turned round: each token sees what comes after it, and nothing before.", only_the_future),
        ),
        hints=(
            "Which two kinds of tokens must a token not see?",
            "The same story is one condition. What is the other one, which holds in every row?",
            "Both must hold: the same story, and not later than the token itself.",
        ),
    ),
]  # fmt: skip

EXERCISES = [*DIAGNOSES, *REPAIRS]
