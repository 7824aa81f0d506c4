"""Fine-tuning (chapter 14): from a model that goes on with any text to one that does what it is asked.

What changes is the data. A chat becomes a row of tokens of which only the assistant's are scored, so that the model
learns to answer, and not to ask. What is trained may be all of the model, a small correction beside frozen weights
(LoRA), or a head that tells classes of texts apart; all of them by the trainer of chapter 09.
"""

import functools
import json
import math
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from minillama import world
from minillama.checkpoint import load, save
from minillama.checkpoint.files import new_folder, read_json
from minillama.checkpoint.names import HUGGING_FACE, expand
from minillama.config import ModelConfig
from minillama.data import Batch, Validation, json_lines
from minillama.linear import Linear, linear
from minillama.loss import IGNORE
from minillama.model import Llama
from minillama.rope import halves_to_pairs, pairs_to_halves
from minillama.tokenizer import ROLES, Tokenizer
from minillama.trainer import Trainer

SHAKEN = 0.4  # the length of what `renew` adds to a word, of the mean length of all
KINDS = ("mood", "question", "summary", "translation", "story")  # what the toy world has to ask

ADAPTER_CONFIG, ADAPTER, HEAD = "adapter_config.json", "adapter_model.safetensors", "classifier.safetensors"
# Settings of peft that say nothing about what an adapter computes, and the values with which any other is off.
PEFT_INERT = {
    "peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version",
    "lora_dropout", "init_lora_weights", "megatron_core", "qalora_group_size",
}  # fmt: skip
PEFT_OFF: tuple[Any, ...] = (None, False, "none", [], {})

# Our name of a matrix -> peft's.
TARGETS = {
    ours.removesuffix(".weight").split(".")[-1]: theirs.removesuffix(".weight").split(".")[-1]
    for theirs, ours in HUGGING_FACE.items()
    if "_proj." in theirs
}


# ---------------------------------------------------------------------------------------------------------------------
# Chats.


class Chat(NamedTuple):
    """A conversation, and the number of the line where it stands in its file."""

    line: int
    messages: list[dict[str, str]]


class Row(NamedTuple):
    """Tokens (T,) int32, and what follows each of them (T,) int32, or IGNORE where that is not scored."""

    inputs: Tensor
    targets: Tensor


def read_chats(path: str | Path) -> Iterator[Chat]:
    """The chats of a file, one at a time. Each is a line of JSON: `{"messages": [{"role": ..., "content": ...}, ...]}`.

    A system message may come first, then come the user's and the assistant's, and the assistant has the last word.
    Empty lines are skipped; what else an object holds beside its messages is left aside. Raises ValueError that names
    the line of anything else.
    """
    for line, messages in json_lines(path, _messages):
        yield Chat(line, messages)


def _messages(value: Any) -> list[dict[str, str]]:
    if not isinstance(value, dict) or not isinstance(messages := value.get("messages"), list) or not messages:
        raise ValueError(f'expected {{"messages": [...]}} with at least one message, got {value!r:.80}')
    for n, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or message.keys() != {"role", "content"}:
            raise ValueError(f'message {n} is {message!r:.80}, expected {{"role": ..., "content": ...}}')
        role, content = message["role"], message["content"]
        if role not in ROLES or (role == "system" and n > 1):
            expected = ROLES if n == 1 else ROLES[1:]
            raise ValueError(f"message {n} has the role {role!r:.40}, expected {' or '.join(expected)}")
        if not isinstance(content, str):
            raise ValueError(f"message {n} has the content {content!r:.60}, expected text")
        content.encode("utf-8")  # refuses half of a surrogate pair, which JSON lets through
    if role != "assistant":
        raise ValueError(f"the last message is from the {role}, expected one from the assistant: there is no answer")
    return messages


def chat_row(tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]], context: int | None = None) -> Row:
    """A chat as `tokenizer.chat` writes it, with what the assistant says as targets: its words and its end of turn.

    What stands before each answer are the tokens that the model is given when it is to answer; what follows the last
    answer is left out. Raises ValueError if the assistant does not have the last word, if the row has more than
    `context` tokens, and if an answer's beginning melts into a token of the prompt, so that no model could be asked
    for it.
    """
    ids = tokenizer.chat(messages, reply=False)
    if (role := messages[-1]["role"]) != "assistant":
        raise ValueError(f"the last message is from the {role}, expected one from the assistant: there is no answer")
    while ids[-1] not in tokenizer.stop_ids:  # a line break, which nobody has to write
        ids.pop()
    if context is not None and len(ids) - 1 > context:
        raise ValueError(f"the chat has {len(ids) - 1} tokens, expected at most {context}: shorten it or leave it out")
    scored = [False] * len(ids)
    for n, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        start = len(prompt := tokenizer.chat(messages[:n]))
        if ids[:start] != prompt:
            raise ValueError(
                f"message {n + 1} is {message['content']!r:.60}, whose beginning the tokenizer joins to what stands "
                "before it: begin with a word"
            )
        end = next(i for i in range(start, len(ids)) if ids[i] in tokenizer.stop_ids) + 1
        scored[start:end] = [True] * (end - start)
    tokens = torch.tensor(ids, dtype=torch.int32)
    targets = tokens.masked_fill(~torch.tensor(scored), IGNORE)
    return Row(tokens[:-1], targets[1:])


def chat_rows(path: str | Path, tokenizer: Tokenizer, context: int) -> list[Row]:
    """The rows of all chats of a file. Raises ValueError, with the line, for a chat that cannot be one."""
    rows = []
    for line, messages in read_chats(path):
        try:
            rows.append(chat_row(tokenizer, messages, context))
        except ValueError as error:
            raise ValueError(f"{path}, line {line}: {str(error).rstrip('.')}.") from None
    if not rows:
        raise ValueError(f"{path} has no chats, expected one in each line.")
    return rows


def pack(rows: Sequence[Row], pad_id: int) -> Batch:
    """One batch as wide as the longest of the rows; shorter ones share a row, where they fit, without a view of each
    other. What remains is padding.

    The longest is placed first, each in the first place with room for it: never more than 11/9 of the fewest rows, and
    one ("first-fit decreasing"; Johnson 1973, "Near-Optimal Bin Packing Algorithms").
    """
    rows = sorted(rows, key=lambda row: -len(row.inputs))
    width = len(rows[0].inputs)
    shelves: list[list[Row]] = []
    room: list[int] = []
    for row in rows:
        need = len(row.inputs)
        place = next((i for i, free in enumerate(room) if free >= need), len(room))
        if place == len(room):
            shelves.append([])
            room.append(width)
        shelves[place].append(row)
        room[place] -= need
    inputs, targets, segments = (torch.full((len(shelves), width), fill) for fill in (pad_id, IGNORE, -1))
    for i, shelf in enumerate(shelves):
        start = 0
        for number, row in enumerate(shelf):
            end = start + len(row.inputs)
            inputs[i, start:end], targets[i, start:end], segments[i, start:end] = *row, number
            start = end
    return Batch(inputs, targets, segments if len(shelves) < len(rows) else None)


class ChatBatches:
    """Given rows, again and again, each time in another order. The last batch of a round may be smaller."""

    def __init__(self, rows: Sequence[Row], pad_id: int, batch_size: int, seed: int = 0):
        self.rows, self.pad_id, self.batch_size, self.seed = rows, pad_id, batch_size, seed
        self._order = functools.lru_cache(maxsize=1)(self._shuffle)

    def __call__(self, step: int) -> Batch:
        in_a_round = -(-len(self.rows) // self.batch_size)
        start = step % in_a_round * self.batch_size
        chosen = self._order(step // in_a_round)[start : start + self.batch_size]
        return pack([self.rows[i] for i in chosen], self.pad_id)

    def _shuffle(self, number: int) -> list[int]:
        order = list(range(len(self.rows)))
        random.Random(f"{self.seed}:{number}").shuffle(order)
        return order


class TaskBatches:
    """New tasks from the toy world at every step, each chat about a new story, of kinds drawn from `kinds`.

    Chats of like length share a batch: `GROUP` batches are drawn together, sorted and cut. Of a run of `steps`, the
    first two thirds have questions and translations about excerpts, and the rest about whole stories too, half and
    half: where a few sentences hold the answer, what to look at is soon found, and then found again among many. The
    later batches have half as many chats, and so about as many tokens. Raises ValueError for a kind that the world
    does not have.
    """

    GROUP = 16

    def __init__(self, tokenizer: Tokenizer, kinds: Sequence[str], batch_size: int, steps: int, seed: int = 0):
        _check_kinds(kinds)
        self.tokenizer, self.kinds, self.batch_size, self.seed = tokenizer, kinds, batch_size, seed
        self.excerpts = 2 * steps // 3 if {"question", "translation"} & set(kinds) else steps
        self._group = functools.lru_cache(maxsize=1)(self._draw_group)

    def __call__(self, step: int) -> Batch:
        late = step >= self.excerpts
        number, place = divmod(step - late * self.excerpts, self.GROUP)
        return self._group(late, number)[place]

    def _draw_group(self, late: bool, number: int) -> list[Batch]:
        rng = random.Random(f"{self.seed}:{late}:{number}")
        count, share = (max(1, self.batch_size // 2), 0.5) if late else (self.batch_size, 1.0)
        rows = [
            task_row(self.tokenizer, self.kinds, rng, excerpt=rng.random() < share) for _ in range(count * self.GROUP)
        ]
        rows.sort(key=lambda row: len(row.inputs))
        batches = [pack(rows[i : i + count], self.tokenizer.pad_id) for i in range(0, len(rows), count)]
        rng.shuffle(batches)
        return batches


def task_chat(tasks: Sequence[world.Task]) -> list[dict[str, str]]:
    """Tasks about one story as a conversation. The story is told once, before the first.

    Answers begin with a space, as words do inside a story: a model of stories knows "▁Nora", and not the "N" and "ora"
    that its tokenizer makes of "Nora" where nothing stands before it.
    """
    messages = []
    for n, task in enumerate(tasks):
        asked = task.prompt if n == 0 else task.prompt.rpartition("\n")[2]
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": f" {task.answer}"}]
    return messages


def task_row(
    tokenizer: Tokenizer, kinds: Sequence[str], rng: random.Random, heldout: bool = False, excerpt: bool = False
) -> Row:
    """A chat about a new story, of a kind drawn from `kinds`. Questions are asked all, one after the other, in any
    order: each is learned from the same reading of the story.

    With `excerpt`, questions and translations are about a few of its sentences alone, where these can be answered.
    """
    kind = rng.choice(kinds)
    story = world.sample(rng, heldout)
    tasks = [task for task in world.excerpt(story, rng) if task.kind == kind] if excerpt else []
    if not tasks:  # a sentence may answer no question: then too the story is told whole
        tasks = [task for task in world.tasks(story) if task.kind == kind]
    rng.shuffle(tasks)
    return chat_row(tokenizer, task_chat(tasks))


def task_validation(
    tokenizer: Tokenizer, kinds: Sequence[str], count: int, seed: int, batch_size: int = 64, heldout: bool = False
) -> Validation:
    """`count` tasks that no training step draws. The floor is 0 but for stories: all other answers follow from what is
    asked."""
    _check_kinds(kinds)
    rng = random.Random(f"validation:{seed}")
    rows = [task_row(tokenizer, kinds, rng, heldout) for _ in range(count)]
    batches = [pack(rows[i : i + batch_size], tokenizer.pad_id) for i in range(0, count, batch_size)]
    return Validation(batches, None if "story" in kinds else 0.0)


def _check_kinds(kinds: Sequence[str]) -> None:
    if isinstance(kinds, str) or not kinds or set(kinds) - set(KINDS):
        raise ValueError(f"the kinds of tasks are {kinds!r:.80}, expected a list of some of {', '.join(KINDS)}.")


# ---------------------------------------------------------------------------------------------------------------------
# All weights, or new ones.


class Recipe(NamedTuple):
    """How to train all weights: steps, chats in a step, the learning rate's peak, the last blocks that begin anew."""

    steps: int
    batch_size: int
    learning_rate: float
    renewed: int


# From the shipped toy to each kind of task in less than 3 minutes on two cores: what `tests/benchmarks/tasks.py` runs.
RECIPES = {
    "mood": Recipe(250, 16, 4e-3, 0),
    "question": Recipe(1050, 16, 7e-3, 3),
    "summary": Recipe(850, 16, 5e-3, 0),
    "translation": Recipe(900, 14, 1e-2, 3),
}


def renew(model: Llama, blocks: int, seed: int = 0) -> Llama:
    """Give the last `blocks` of a model's blocks the weights of a new model, in place; returns the model.

    What they had learned is learned for one end, and heads that look at one place firmly hardly move. For a task that
    asks to look elsewhere it can be quicker to keep the words and the first blocks alone. The words are shaken too:
    those that the old task never had to tell apart have become almost one, and nothing could copy what they differ in.
    Raises ValueError for a number that is not from 1 to all.
    Source: Zhang et al. 2021, "Revisiting Few-sample BERT Fine-tuning", where the first is shown.
    """
    if not 1 <= blocks <= model.config.n_layers:
        raise ValueError(f"{blocks} blocks are to be new, expected 1 to {model.config.n_layers}, which the model has.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        new = Llama(replace(model.config, n_layers=blocks))
        with torch.no_grad():
            table = model.embedding.weight
            size = SHAKEN * table.norm(dim=1).mean().item() * model.config.dim**-0.5
            table.add_((size * torch.randn(table.shape)).to(table))
    for block, begin in zip(model.blocks[-blocks:], new.blocks, strict=True):
        block.load_state_dict(begin.state_dict())
    return model


# ---------------------------------------------------------------------------------------------------------------------
# LoRA.


class LoraLinear(Linear):
    """A frozen linear layer with a correction of low rank beside it: `y = x Wᵀ + alpha / rank · (x Aᵀ) Bᵀ`.

    `weight` W (out, in), `a` (rank, in) and `b` (out, rank); only a and b are trained. They are in fp32 whatever the
    dtype of W. Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", equation 3.
    """

    def __init__(self, base: Linear, rank: int, alpha: float):
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.rank, self.alpha = rank, alpha
        self.weight = base.weight
        self.register_parameter("bias", None)
        device = base.weight.device
        # B begins at zero, so that the model begins as it was; then A must not, or no gradient would reach either.
        self.a = nn.Parameter(torch.empty(rank, base.in_features, device=device, dtype=torch.float32))
        self.b = nn.Parameter(torch.zeros(base.out_features, rank, device=device, dtype=torch.float32))
        nn.init.uniform_(self.a, -(base.in_features**-0.5), base.in_features**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        same = x if torch.is_autocast_enabled(x.device.type) else x.to(self.a.dtype)  # autocast would turn it back
        correction = linear(linear(same, self.a) * (self.alpha / self.rank), self.b)
        y = linear(x, self.weight)
        return (y + correction).to(y.dtype)

    @torch.no_grad()
    def merged(self) -> Tensor:
        """The one weight (out, in) that does the same, in the dtype of W."""
        weight = self.weight.float() + self.alpha / self.rank * self.b.float() @ self.a.float()
        return weight.to(self.weight.dtype)


class MergedLinear(Linear):
    """A linear layer with its correction added to its weight. It remembers both."""

    def __init__(self, lora: LoraLinear):
        nn.Module.__init__(self)
        self.in_features, self.out_features = lora.in_features, lora.out_features
        self.weight = nn.Parameter(lora.merged(), requires_grad=False)
        self.register_parameter("bias", None)
        self.parts = (lora,)  # in a tuple, so that it is no part of the model, nor of its checkpoints


def add_lora(model: Llama, rank: int, alpha: float, targets: Sequence[str] = ("wq", "wv")) -> Llama:
    """Freeze all weights of a model, and put a correction of low rank beside the matrices `targets` of every block.

    targets: of wq, wk, wv, wo, gate, up and down. In place; returns the model, which computes what it did until it is
    trained. Raises ValueError for sizes and names that cannot be, for a model whose weights are in 8 or 4 bits, and for
    one that has an adapter.
    """
    if type(rank) is not int or rank < 1 or type(alpha) not in (int, float) or not 0 < alpha < math.inf:
        raise ValueError(
            f"rank is {rank!r:.40}, alpha {alpha!r:.40}: expected an integer from 1, and a number above 0."
        )
    if isinstance(targets, str) or not targets or set(targets) - set(TARGETS):
        raise ValueError(f"targets are {targets!r:.80}, expected a list of some of {', '.join(TARGETS)}.")
    _check_floats(model)
    if any(isinstance(module, LoraLinear | MergedLinear) for module in model.modules()):
        raise ValueError("the model has an adapter, and can have one at a time: load the model anew.")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for name in _places(model.config, targets):
        base: Any = model.get_submodule(name)
        _put(model, name, LoraLinear(base, rank, alpha))
    return model


def merge(model: Llama) -> Llama:
    """Add every correction to its weight, in place: as quick as without an adapter, and `save` writes a whole model.

    The old weights stay in memory for `unmerge`. Raises ValueError for a model without an adapter.
    """
    for name, layer in _lora_layers(model).items():
        _put(model, name, MergedLinear(layer))
    return model


def unmerge(model: Llama) -> Llama:
    """Undo `merge`, in place and to the last bit. Raises ValueError for a model that is not merged."""
    merged = {name: module for name, module in model.named_modules() if isinstance(module, MergedLinear)}
    if not merged:
        raise ValueError("the model has no merged adapter to take out: merge comes first.")
    for name, module in merged.items():
        _put(model, name, module.parts[0].to(module.weight.device))
    return model


def save_adapter(model: Llama, folder: str | Path) -> None:
    """Write a model's adapter as `peft` does: adapter_config.json and adapter_model.safetensors, in a new folder.

    `peft` opens it on the same model in Hugging Face's layout, `load_adapter` on ours. Raises ValueError for a model
    without an adapter, or with a merged one, and if the folder is there and not empty.
    """
    layers = _lora_layers(model)
    folder = _new(folder)
    targets = [name for name in TARGETS if any(place.endswith(f".{name}") for place in layers)]
    first = next(iter(layers.values()))
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": None, "inference_mode": True,
        "r": first.rank, "lora_alpha": first.alpha, "target_modules": [TARGETS[name] for name in targets],
        "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False,
    }  # fmt: skip
    weights = {}
    for name, theirs in _places(model.config, targets).items():
        a, b = layers[name].a.detach(), layers[name].b.detach()
        turned = name.endswith(("wq", "wk"))  # the rows of B are those of the weight (chapter 03)
        weights[f"{theirs}.lora_A.weight"] = a.contiguous()
        weights[f"{theirs}.lora_B.weight"] = (pairs_to_halves(b, model.config.head_dim) if turned else b).contiguous()
    with new_folder(folder) as new:
        (new / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        save_file(weights, new / ADAPTER, metadata={"format": "pt"})
        (new / ADAPTER).chmod((new / ADAPTER_CONFIG).stat().st_mode)  # the library lets only the owner read


def load_adapter(model: Llama, folder: str | Path) -> Llama:
    """Put an adapter that `save_adapter` or `peft` wrote beside a model's weights, in place; returns the model.

    A model that has an adapter of the same rank, alpha and targets takes the new numbers. Dropout is left aside, which
    plays a part in training only. Raises ValueError, and leaves the model as it was, for an adapter that is damaged,
    was made for another model, or asks for more than LoRA.
    """
    path = Path(folder) / ADAPTER
    rank, alpha, targets = _adapter_settings(Path(folder) / ADAPTER_CONFIG)
    _check_floats(model)
    places = _places(model.config, targets)
    shapes: dict[str, tuple[int | None, ...]] = {}
    for name, theirs in places.items():
        out, width = model.get_parameter(f"{name}.weight").shape
        shapes |= {f"{theirs}.lora_A.weight": (rank, width), f"{theirs}.lora_B.weight": (out, rank)}
    weights = _read_tensors(path, shapes)
    if not any(isinstance(module, LoraLinear | MergedLinear) for module in model.modules()):
        add_lora(model, rank, alpha, targets)
    layers = _lora_layers(model)
    here = {(layer.rank, layer.alpha) for layer in layers.values()}
    if layers.keys() != places.keys() or here != {(rank, alpha)}:
        raise ValueError(
            f"{folder} has an adapter of rank {rank} and alpha {alpha} for {', '.join(targets)}, and the model has "
            "another already: load the model anew."
        )
    with torch.no_grad():
        for name, theirs in places.items():
            b = weights[f"{theirs}.lora_B.weight"]
            layers[name].a.copy_(weights[f"{theirs}.lora_A.weight"])
            layers[name].b.copy_(halves_to_pairs(b, model.config.head_dim) if name.endswith(("wq", "wk")) else b)
    return model


def _adapter_settings(path: Path) -> tuple[int, float, list[str]]:
    """Rank, alpha and targets. Raises ValueError for a setting that makes something else of it than LoRA."""
    settings = read_json(path)
    if (kind := settings.get("peft_type")) != "LORA":
        raise ValueError(f"{path}: its peft_type is {kind!r:.40}, expected 'LORA'.")
    for key, value in settings.items():
        if key not in PEFT_INERT and key not in ("r", "lora_alpha", "target_modules") and value not in PEFT_OFF:
            raise ValueError(f"{path}: it has {key} = {value!r:.60}, which is not supported, expected it to be off.")
    if (init := settings.get("init_lora_weights", True)) not in (True, False, "gaussian", "orthogonal"):
        raise ValueError(
            f"{path}: it has init_lora_weights = {init!r:.60}, which changes the model's own weights, expected true."
        )
    names = settings.get("target_modules")
    rank: Any = settings.get("r")
    alpha: Any = settings.get("lora_alpha")
    if type(rank) is not int or rank < 1 or type(alpha) not in (int, float) or not 0 < alpha < math.inf:
        raise ValueError(
            f"{path}: r is {rank!r:.40}, lora_alpha {alpha!r:.40}: expected an integer from 1, and a number above 0."
        )
    ours = {theirs: name for name, theirs in TARGETS.items()}
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name in ours for name in names):
        raise ValueError(f"{path}: target_modules is {names!r:.80}, expected a list of some of {', '.join(ours)}.")
    return rank, alpha, [name for name in TARGETS if TARGETS[name] in names]


def _places(config: ModelConfig, targets: Sequence[str]) -> dict[str, str]:
    """Our name of each matrix that gets a correction -> peft's."""
    return {
        ours.removesuffix(".weight"): "base_model.model." + theirs.removesuffix(".weight")
        for theirs, ours in expand(HUGGING_FACE, config.n_layers).items()
        if ours.removesuffix(".weight").split(".")[-1] in targets
    }


def _lora_layers(model: Llama) -> dict[str, LoraLinear]:
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}
    if not layers:
        raise ValueError("the model has no adapter, or a merged one: expected one from add_lora or load_adapter.")
    return layers


def _put(model: Llama, name: str, layer: Linear) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, layer)


def _check_floats(model: Llama) -> None:
    if not model.embedding.weight.is_floating_point():
        raise ValueError(
            "the model's weights are in 8 or 4 bits, and training needs floating-point numbers: load it in float32 or "
            "bfloat16."
        )


class LoraTrainer(Trainer):
    """Trains a model to which `add_lora` was done. A checkpoint holds the adapter only, for `load_adapter`."""

    def _write(self, folder: Path) -> None:
        save_adapter(self.model, folder)

    def _read(self, folder: Path) -> None:
        load_adapter(self.model, folder)


# ---------------------------------------------------------------------------------------------------------------------
# A classifier.


class Classifier(nn.Module):
    """A linear head on the mean of a text's hidden states: which of some classes is it?

    tokens (B, T) int64 → a score for each class (N, n_classes), N being the number of texts: B, or with `segments`
    (B, T), which number the texts of each row and are -1 for padding, as many as there are, row by row.
    """

    def __init__(self, model: Llama, n_classes: int):
        super().__init__()
        if type(n_classes) is not int or n_classes < 2:
            raise ValueError(f"n_classes is {n_classes!r:.40}, expected an integer from 2.")
        _check_floats(model)
        self.model = model
        self.head = Linear(model.config.dim, n_classes).to(model.embedding.weight)
        nn.init.normal_(self.head.weight, std=0.02)

    def forward(self, tokens: Tensor, segments: Tensor | None = None) -> Tensor:
        x = self.model.hidden(tokens, segments=segments).float()  # in bf16 a sum of many would be rounded at each
        if segments is None:
            return self.head(x.mean(1).to(self.head.weight.dtype))
        counts = segments.amax(1) + 1  # texts in each row
        numbers = (segments + (counts.cumsum(0) - counts)[:, None])[segments >= 0]
        sums = x.new_zeros(int(counts.sum()), x.shape[-1]).index_add(0, numbers, x[segments >= 0])
        return self.head((sums / numbers.bincount()[:, None]).to(self.head.weight.dtype))


def label_batch(texts: Sequence[Sequence[int]], labels: Sequence[int], pad_id: int) -> Batch:
    """A batch for a classifier: texts as tokens, one a row, and the class of each."""
    shape = len(texts), max(map(len, texts))
    inputs, segments = torch.full(shape, pad_id), torch.full(shape, -1)
    for i, text in enumerate(texts):
        inputs[i, : len(text)], segments[i, : len(text)] = torch.tensor(text), 0
    return Batch(inputs, torch.tensor(labels), segments)


def save_classifier(classifier: Classifier, tokenizer: Tokenizer | None, folder: str | Path) -> None:
    """Write a checkpoint with the head beside it, in a new folder. Raises ValueError if it is there and not empty."""
    with new_folder(_new(folder)) as new:
        save(classifier.model, tokenizer, new)
        save_file({"head.weight": classifier.head.weight.detach().contiguous()}, new / HEAD)
        (new / HEAD).chmod((new / "config.json").stat().st_mode)  # the library lets only the owner read


def load_classifier(
    folder: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[Classifier, Tokenizer | None]:
    """What `save_classifier` wrote. Raises ValueError for a folder that is damaged or something else."""
    model, tokenizer = load(folder, device=device, dtype=dtype)
    head = _read_tensors(Path(folder) / HEAD, {"head.weight": (None, model.config.dim)})["head.weight"]
    classifier = Classifier(model, len(head))
    classifier.head.weight.data.copy_(head)
    return classifier.eval(), tokenizer


class ClassifierTrainer(Trainer):
    """Trains a classifier, on batches like those of `label_batch`."""

    model: Classifier  # type: ignore[assignment]

    def _write(self, folder: Path) -> None:
        save_classifier(self.model, self.tokenizer, folder)

    def _read(self, folder: Path) -> None:
        saved, _ = load_classifier(folder, device=self.device)
        theirs, ours = ((c.head.out_features, c.model.config) for c in (saved, self.model))
        if theirs != ours:
            raise ValueError(
                f"{self.folder} holds a classifier with {theirs[0]} classes and {theirs[1]}, not {ours[0]} and "
                f"{ours[1]}: go on with the same one, or choose another folder."
            )
        self.model.load_state_dict(saved.state_dict())


# ---------------------------------------------------------------------------------------------------------------------
# Files.


def _new(folder: str | Path) -> Path:
    folder = Path(os.path.realpath(folder))
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"{folder} is there and not an empty folder: choose another folder.")
    return folder


def _read_tensors(path: Path, shapes: Mapping[str, tuple[int | None, ...]]) -> dict[str, Tensor]:
    """Exactly the tensors of these names and shapes (None: any size). Nothing is read before all of them fit."""
    try:
        with safe_open(path, "pt") as file:
            parts = {key: file.get_slice(key) for key in file.keys()}
            if odd := sorted(parts.keys() - shapes.keys()):
                raise ValueError(f"{path} has the tensor {odd[0]!r:.120}, for which the model has no place.")
            if missing := sorted(shapes.keys() - parts.keys()):
                raise ValueError(f"{path} lacks {missing[0]} ({len(missing)} tensors of {len(shapes)} are missing).")
            for key, expected in shapes.items():
                shape, dtype = tuple(parts[key].get_shape()), parts[key].get_dtype()
                if len(shape) != len(expected) or any(e not in (s, None) for s, e in zip(shape, expected, strict=True)):
                    raise ValueError(
                        f"{path}: {key} has the shape {shape}, expected {expected}: made for another model."
                    )
                if dtype not in ("F32", "BF16", "F16"):
                    raise ValueError(f"{path}: {key} is {dtype}, expected F32, BF16 or F16.")
            return {key: file.get_tensor(key) for key in shapes}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"cannot read {path}: {error}.") from None
