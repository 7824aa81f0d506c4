"""Evaluation (chapter 15): how good a model is, and how sure one can be of that.

A score is a sum over examples, and then a function of the sum: a mean, a ratio, BLEU. So a resample of the examples,
which says how much of a score is luck, is a count for each example, and all resamples are one product of matrices.

Top to bottom: scores and their intervals, texts against references, perplexity, choices, the toy world's tasks.
"""

import importlib
import math
import random
import re
import string
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from minillama import world
from minillama.cache import KVCache
from minillama.data import json_lines
from minillama.finetune import task_chat
from minillama.generation import generate
from minillama.model import Llama
from minillama.tokenizer import Tokenizer

KINDS = ("mood", "question", "summary", "translation")  # tasks of the toy world that have one right answer
SCORED_AT_ONCE = 512  # positions whose logits are held: with 128,000 tokens to choose from, 260 MB
_progress = partial(tqdm, disable=None, leave=False, dynamic_ncols=True)  # only where somebody looks on


# ---------------------------------------------------------------------------------------------------------------------
# Scores, and how sure they are.


@dataclass(frozen=True, repr=False, eq=False)
class Score:
    """One number over n examples.

    statistics (n, k): what each example adds. of_sums: sums (R, k) of R sets of examples → their scores (R,).
    signature: the settings of the library that made it, to be stated with the number.
    """

    statistics: np.ndarray
    of_sums: Callable[[np.ndarray], np.ndarray]
    signature: str = ""

    def __post_init__(self) -> None:
        if len(self.statistics) == 0:
            raise ValueError("there are no examples, expected at least 1: a score over none is not a number.")

    @property
    def value(self) -> float:
        """The score of all examples."""
        return float(self.of_sums(self.statistics.sum(0)[None])[0])

    def __len__(self) -> int:
        """The number of examples."""
        return len(self.statistics)

    def __repr__(self) -> str:
        return f"Score({self.value:.4f}, {len(self)} examples)"


class Interval(NamedTuple):
    """A score, and where it would lie for other examples of the same kind."""

    value: float
    low: float
    high: float


class Difference(NamedTuple):
    """By how much one score is above another on the same examples. flips: the share of the resamples in which the
    sign is another; below 0.05, one may say which of the two is better."""

    value: float
    low: float
    high: float
    flips: float


def mean_score(values: Sequence[float], signature: str = "") -> Score:
    """The mean of a number for each example."""
    numbers = np.asarray(values, dtype=np.float64)
    return Score(np.stack([numbers, np.ones_like(numbers)], axis=-1), _ratio, signature)


def resample(score: Score, *, resamples: int = 1000, seed: int = 12345) -> np.ndarray:
    """The scores (resamples,) of as many sets of n examples, drawn from the n with repetition.

    With one seed, two scores of the same n examples draw the same sets; the default is sacrebleu's.
    Source: Efron 1979, "Bootstrap Methods: Another Look at the Jackknife".
    """
    if resamples < 1:
        raise ValueError(f"resamples is {resamples}, expected at least 1.")
    n = len(score)
    drawn = np.random.default_rng(seed).choice(n, size=(resamples, n), replace=True)
    counts = np.stack([np.bincount(row, minlength=n) for row in drawn])
    return score.of_sums(counts @ score.statistics)


def bootstrap(
    score: Score | Sequence[float], *, level: float = 0.95, resamples: int = 1000, seed: int = 12345
) -> Interval:
    """The interval that holds the middle `level` of the resamples' scores. Plain numbers: the interval of their mean.

    Source: Efron and Tibshirani 1993, "An Introduction to the Bootstrap", chapter 13 (the percentile interval).
    """
    score = score if isinstance(score, Score) else mean_score(score)
    return Interval(score.value, *_middle(resample(score, resamples=resamples, seed=seed), level))


def paired(
    a: Score | Sequence[float],
    b: Score | Sequence[float],
    *,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 12345,
) -> Difference:
    """a - b for two models on the same examples, each resample drawn for both: what is hard for both cancels out.

    Source: Koehn 2004, "Statistical Significance Tests for Machine Translation Evaluation", section 4.
    Raises ValueError if one has more examples than the other.
    """
    a, b = (score if isinstance(score, Score) else mean_score(score) for score in (a, b))
    if len(a) != len(b):
        raise ValueError(f"the two scores have {len(a)} and {len(b)} examples, expected the same ones for both.")
    value = a.value - b.value
    one, other = (resample(score, resamples=resamples, seed=seed) for score in (a, b))
    flips = float(np.mean((one - other) * np.sign(value) <= 0))
    return Difference(value, *_middle(one - other, level), flips)


def _middle(values: np.ndarray, level: float) -> tuple[float, float]:
    if not 0 < level < 1:
        raise ValueError(f"level is {level}, expected above 0 and below 1, as 0.95.")
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _ratio(sums: np.ndarray) -> np.ndarray:
    return sums[:, 0] / sums[:, 1]


# ---------------------------------------------------------------------------------------------------------------------
# What was written, against references: one for each.


def accuracy(answers: Sequence[Any], references: Sequence[Any]) -> Score:
    """The share of answers that equal their reference, 0 to 1."""
    return mean_score([answer == reference for answer, reference in _pairs(answers, references)])


def exact_match(answers: Sequence[str], references: Sequence[str]) -> Score:
    """The share of answers that equal their reference once both are `normalized`, 0 to 1."""
    return mean_score(
        [normalized(answer) == normalized(reference) for answer, reference in _pairs(answers, references)]
    )


def f1(answers: Sequence[str], references: Sequence[str]) -> Score:
    """The mean overlap of words, `normalized`: 2·precision·recall / (precision + recall), 0 to 1.

    Source: Rajpurkar et al. 2016, "SQuAD: 100,000+ Questions for Machine Comprehension of Text", section 6.1.
    """

    def overlap(answer: str, reference: str) -> float:
        words, expected = normalized(answer).split(), normalized(reference).split()
        if not words or not expected:
            return float(words == expected)
        return 2 * sum((Counter(words) & Counter(expected)).values()) / (len(words) + len(expected))

    return mean_score([overlap(answer, reference) for answer, reference in _pairs(answers, references)])


def normalized(text: str) -> str:
    """Lower case, without punctuation (of ASCII), without a, an and the, one space between words: SQuAD's own rule."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def bleu(answers: Sequence[str], references: Sequence[str], *, chinese: bool = False) -> Score:
    """BLEU by sacrebleu, 0 to 100. chinese: each Chinese character is a word, since no spaces tell words apart.

    Sources: Papineni et al. 2002, "BLEU"; Post 2018, "A Call for Clarity in Reporting BLEU Scores".
    """
    metric = _library("sacrebleu.metrics", "BLEU").BLEU(tokenize="zh" if chinese else "13a")
    return _corpus_score(metric, answers, references)


def chrf(answers: Sequence[str], references: Sequence[str]) -> Score:
    """chrF by sacrebleu, 0 to 100: overlap of runs of up to 6 characters, for any language.

    Source: Popović 2015, "chrF: character n-gram F-score for automatic MT evaluation".
    """
    return _corpus_score(_library("sacrebleu.metrics", "chrF").CHRF(), answers, references)


def rouge(answers: Sequence[str], references: Sequence[str]) -> dict[str, Score]:
    """ROUGE by rouge-score: the mean F1, 0 to 1, of `rouge1` (words), `rouge2` (pairs) and `rougeL` (longest common
    subsequence).

    Its words are runs of a-z and 0-9; all else is dropped, so a reference in another script would have none.
    Raises ValueError for such a reference. Source: Lin 2004, "ROUGE: A Package for Automatic Evaluation of Summaries".
    """
    names = ("rouge1", "rouge2", "rougeL")
    scorer = _library("rouge_score.rouge_scorer", "ROUGE").RougeScorer(list(names))
    rows = []
    for number, (answer, reference) in enumerate(_pairs(answers, references), start=1):
        if not re.search("[a-z0-9]", reference.lower()):
            raise ValueError(
                f"reference {number} is {reference!r:.60}, which has no word of a-z and 0-9, all that ROUGE sees: "
                "score it with chrf, or with bleu."
            )
        rows.append(scorer.score(reference, answer))
    return {name: mean_score([row[name].fmeasure for row in rows], "rouge-score, no stemmer") for name in names}


def _corpus_score(metric: Any, answers: Sequence[str], references: Sequence[str]) -> Score:
    """A score of sacrebleu's: its counts are added up over examples. Its own tests of significance take the same two
    methods."""
    _pairs(answers, references)
    statistics = np.asarray(metric._extract_corpus_statistics(answers, [references]), dtype=np.float64)

    def of_sums(sums: np.ndarray) -> np.ndarray:
        return np.array([metric._compute_score_from_stats(row.tolist()).score for row in sums])

    return Score(statistics.reshape(len(answers), -1), of_sums, str(metric.get_signature()))


def _pairs(answers: Sequence[Any], references: Sequence[Any]) -> list[tuple[Any, Any]]:
    if isinstance(answers, str) or isinstance(references, str) or len(answers) != len(references) or not len(answers):
        raise ValueError(
            f"the answers are {answers!r:.60} and the references {references!r:.60}, expected a list of each, equally "
            "long and with at least one: give one reference for every answer."
        )
    return list(zip(answers, references, strict=True))


def _library(module: str, score: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        name = module.split(".")[0].replace("_", "-")
        raise ValueError(f"{score} needs {name}, which is not installed: type pip install 'minillama[lab]'.") from None


# ---------------------------------------------------------------------------------------------------------------------
# Perplexity.


@dataclass(frozen=True, repr=False, eq=False)
class Perplexity:
    """How surprised a model is by a text.

    losses (N,) fp32: -log p of each token, in nats. sizes (N,) int64: the bytes of the text that each token brings.
    """

    losses: Tensor
    sizes: Tensor

    @property
    def nats(self) -> float:
        """-log p of the text."""
        return float(self.losses.double().sum())

    @property
    def tokens(self) -> int:
        """The number of tokens, all of them scored."""
        return len(self.losses)

    @property
    def bytes(self) -> int:
        """The length of the text in UTF-8."""
        return int(self.sizes.sum())

    @property
    def per_token(self) -> float:
        """e^(nats per token): what is called perplexity. Only models with the same tokenizer compare by it."""
        return math.exp(self.nats / self.tokens)

    @property
    def bits_per_byte(self) -> float:
        """Bits that the text would take, packed with this model, per byte: comparable whatever the tokenizer."""
        return self.nats / math.log(2) / self.bytes

    def __repr__(self) -> str:
        return f"Perplexity({self.nats:.4f} nats, {self.tokens} tokens, {self.bytes} bytes)"

    def blocks(self, size: int = 1000) -> "list[Perplexity]":
        """Parts of `size` bytes of the text, about: a token belongs to the part in which it ends. They are the same
        parts for every tokenizer, and examples to resample."""
        if size < 1:
            raise ValueError(f"size is {size}, expected at least 1 byte.")
        part = (self.sizes.cumsum(0) - 1).clamp_min(0) // size
        cuts = torch.bincount(part)
        parts = zip(self.losses.split(cuts.tolist()), self.sizes.split(cuts.tolist()), strict=True)
        return [Perplexity(losses, sizes) for losses, sizes in parts]


def perplexity(
    model: Llama, tokenizer: Tokenizer, text: str, *, window: int | None = None, stride: int | None = None
) -> Perplexity:
    """How surprised a model is by a text, however long: see `sliding_losses` for window and stride.

    Every token is scored, the first after BOS (EOS where there is no BOS), as lm-eval does. Raises ValueError for a
    text that is empty.
    """
    ids = tokenizer.encode(text)
    if not ids:
        raise ValueError("the text is empty, expected at least one character.")
    first = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
    losses = sliding_losses(model, [first, *ids], window=window, stride=stride)
    return Perplexity(losses, torch.tensor(_sizes(tokenizer, ids)))


@torch.inference_mode()
def sliding_losses(model: Llama, ids: Sequence[int], *, window: int | None = None, stride: int | None = None) -> Tensor:
    """-log p of every token of `ids` but the first: (N + 1) → (N,) fp32, in nats, on the CPU.

    The model sees `window` tokens at once (left out: its whole context). The first window scores all that it predicts,
    each further one its last `stride` (left out: half a window): every token counts once, and after the first window
    none has less than window - stride tokens before it.
    """
    context = model.config.max_seq_len
    window = context if window is None else window
    stride = max(1, window // 2) if stride is None else stride
    if not 1 <= window <= context:
        raise ValueError(f"window is {window}, expected 1 to {context}, the context of this model.")
    if not 1 <= stride <= window:
        raise ValueError(f"stride is {stride}, expected 1 to {window}, the window: else tokens would be left out.")
    if len(ids) < 2:
        raise ValueError(f"there are {len(ids)} tokens, expected at least 2: the first is only context.")
    tokens, last = torch.tensor(list(ids)), len(ids) - 1
    ends = [min(window, last), *(min(end + stride, last) for end in range(window, last, stride))]
    losses, done = [], 0
    for end in _progress(ends, desc="reading", unit="window", delay=1):
        begin = max(0, end - window)
        x = model.hidden(tokens[None, begin:end].to(model.norm.weight.device))[0, done - begin :]
        losses.append(_losses(model, x, tokens[done + 1 : end + 1]))
        done = end
    return torch.cat(losses)


def _losses(model: Llama, x: Tensor, targets: Tensor) -> Tensor:
    """-log p (T,) fp32 of targets (T,) after normed vectors (T, dim), never with the logits of all in memory."""
    pairs = zip(x.split(SCORED_AT_ONCE), targets.to(x.device).split(SCORED_AT_ONCE), strict=True)
    return torch.cat([F.cross_entropy(model.scores(h).float(), t, reduction="none") for h, t in pairs]).cpu()


def _sizes(tokenizer: Tokenizer, ids: Sequence[int]) -> list[int]:
    """The bytes of text that each id brings; a character of several ids counts with the last of them."""
    sizes = [0] * len(ids)
    read = 0

    def counted() -> Iterator[int]:
        nonlocal read
        for token in ids:
            read += 1
            yield token

    for text in tokenizer.decode_stream(counted()):
        sizes[read - 1] = len(text.encode())
    return sizes


def perplexity_scores(parts: Sequence[Perplexity]) -> dict[str, Score]:
    """`bits_per_byte` and `perplexity` (per token) over several texts, or `Perplexity.blocks` of one, as examples."""
    sums = np.array([[part.nats, part.tokens, part.bytes] for part in parts], dtype=np.float64).reshape(-1, 3)
    return {
        "bits_per_byte": Score(sums, lambda sums: sums[:, 0] / sums[:, 2] / math.log(2)),
        "perplexity": Score(sums, lambda sums: np.exp(sums[:, 0] / sums[:, 1])),
    }


def story_perplexities(
    model: Llama, tokenizer: Tokenizer, *, count: int = 200, seed: int = 0, heldout: bool = False
) -> list[Perplexity]:
    """How surprised a model is by each of `count` new stories of the toy world, for `perplexity_scores`."""
    if count < 1:
        raise ValueError(f"count is {count}, expected at least 1.")
    rng = random.Random(f"evaluation:{seed}")
    stories = [world.sample(rng, heldout).text for _ in range(count)]
    return [perplexity(model, tokenizer, story) for story in _progress(stories, desc="reading", unit="story")]


# ---------------------------------------------------------------------------------------------------------------------
# Choices.


class Question(NamedTuple):
    """A text to go on with, ways to do so, and the index of the right one."""

    question: str
    choices: list[str]
    answer: int


@dataclass(frozen=True)
class ChoiceResult:
    """What a model thinks of each choice: log p in nats, a tuple for each question.

    scores: `acc`, the share of questions whose right choice is the likeliest, and `acc_norm`, the likeliest per
    character, so that a long choice has no disadvantage.
    """

    log_likelihoods: list[tuple[float, ...]]
    scores: Mapping[str, Score]


def read_questions(path: str | Path) -> list[Question]:
    """The questions of a file, each a line of JSON: `{"question": "The sky is", "choices": ["blue", "a fish"],
    "answer": 0}`, where `answer` is the index of the right choice, counted from 0.

    Empty lines are skipped; what else an object holds is left aside. Raises ValueError that names the line of anything
    else, and for a file without questions.
    """
    questions = [question for _, question in json_lines(path, _question)]
    if not questions:
        raise ValueError(f"{path} has no questions, expected one in each line.")
    return questions


def _question(value: Any) -> Question:
    shape = '{"question": "...", "choices": ["...", "..."], "answer": 0}'
    if not isinstance(value, dict) or not {"question", "choices", "answer"} <= value.keys():
        raise ValueError(f"expected {shape}, got {value!r:.80}")
    question, choices, answer = value["question"], value["choices"], value["answer"]
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f"the question is {question!r:.60}, expected text")
    if not isinstance(choices, list) or len(choices) < 2:
        raise ValueError(f"the choices are {choices!r:.60}, expected a list of at least 2")
    for i, choice in enumerate(choices):
        if not isinstance(choice, str) or not choice.strip():
            raise ValueError(f"choice {i} is {choice!r:.60}, expected text")
        if choice in choices[:i]:
            raise ValueError(f"choice {i} is {choice!r:.60}, which is there already: leave one of the two out")
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise ValueError(f"the answer is {answer!r:.60}, expected the index of a choice, 0 to {len(choices) - 1}")
    for text in (question, *choices):
        text.encode("utf-8")  # refuses half of a surrogate pair, which JSON lets through
    return Question(question, choices, answer)


@torch.inference_mode()
def choose(model: Llama, tokenizer: Tokenizer, questions: Sequence[Question]) -> ChoiceResult:
    """Which choice does the model think likeliest to follow the question, with a space between? log p is the sum over
    the choice's tokens; what the choices of a question have in common is read once.

    The rules are those of EleutherAI's lm-eval (`output_type: multiple_choice`), and so are the numbers.
    Raises ValueError for a question that does not fit in the model's context.
    """
    if not questions:
        raise ValueError("there are no questions, expected at least 1.")
    found = []
    for number, (question, choices, _) in enumerate(_progress(questions, desc="choosing", unit="question"), start=1):
        rows = [_continued(tokenizer, question, f" {choice}") for choice in choices]
        longest = max(len(ids) for ids, _ in rows) - 1
        if longest > model.config.max_seq_len:
            raise ValueError(
                f"question {number} has {longest} tokens with its longest choice, but the model's context is "
                f"{model.config.max_seq_len}: shorten it."
            )
        found.append(_log_likelihoods(model, rows))
    answers = [question.answer for question in questions]
    lengths = [[len(choice) for choice in question.choices] for question in questions]
    best = [int(np.argmax(row)) for row in found]
    best_norm = [int(np.argmax(np.array(row) / length)) for row, length in zip(found, lengths, strict=True)]
    scores = {"acc": accuracy(best, answers), "acc_norm": accuracy(best_norm, answers)}
    return ChoiceResult(found, MappingProxyType(scores))


def _continued(tokenizer: Tokenizer, context: str, text: str) -> tuple[list[int], int]:
    """The ids of context and text, and how many are the context's. Both are encoded together: a token may only be
    the same as in training with what stands before it. So spaces at the context's end go to the text."""
    kept = context.rstrip()
    before = tokenizer.encode(kept, bos=tokenizer.add_bos)
    whole = tokenizer.encode(context + text, bos=tokenizer.add_bos)
    return before + whole[len(before) :], len(before)


def _log_likelihoods(model: Llama, rows: Sequence[tuple[list[int], int]]) -> tuple[float, ...]:
    """For each row (ids, start): the sum of log p of ids[start:]. What all rows begin with is read once."""
    inputs = [ids[:-1] for ids, _ in rows]
    common = min(start for _, start in rows) - 1
    while common and any(ids[:common] != inputs[0][:common] for ids in inputs):
        common -= 1
    weight, width = model.norm.weight, max(map(len, inputs))
    cache = KVCache(model.config, 1, width, device=weight.device, dtype=weight.dtype)
    if common:
        model.hidden(torch.tensor([inputs[0][:common]], device=weight.device), cache)
    cache.reorder(torch.zeros(len(rows), dtype=torch.int64, device=weight.device))
    padded = [ids[common:] + [0] * (width - len(ids)) for ids in inputs]  # behind the text, where nothing looks
    x = model.hidden(torch.tensor(padded, device=weight.device), cache)
    sums = [
        _losses(model, x[i, start - 1 - common : len(ids) - 1 - common], torch.tensor(ids[start:])).sum()
        for i, (ids, start) in enumerate(rows)
    ]
    return tuple(-float(nats) for nats in sums)


# ---------------------------------------------------------------------------------------------------------------------
# The toy world's tasks.


class Example(NamedTuple):
    """A task, its one right answer, and what the model wrote."""

    prompt: str
    answer: str
    written: str


@dataclass(frozen=True)
class TaskResult:
    """What a model wrote, and its scores: for `mood` accuracy, for `question` exact_match and f1, for `summary` rougeL
    and exact_match, for `translation` bleu, chrf and exact_match."""

    kind: str
    examples: list[Example]
    scores: Mapping[str, Score]


def draw_tasks(kind: str, count: int, seed: int = 0, heldout: bool = False) -> list[world.Task]:
    """`count` tasks of a kind, each about a new story, of which no training step draws from the same numbers."""
    if kind not in KINDS:
        raise ValueError(f"the kind of task is {kind!r:.40}, expected one of {', '.join(KINDS)}.")
    if count < 1:
        raise ValueError(f"count is {count}, expected at least 1.")
    rng = random.Random(f"evaluation:{seed}")
    return [
        rng.choice([task for task in world.tasks(world.sample(rng, heldout)) if task.kind == kind])
        for _ in range(count)
    ]


def run_task(
    model: Llama,
    tokenizer: Tokenizer,
    kind: str,
    *,
    count: int = 200,
    seed: int = 0,
    heldout: bool = False,
    shots: int = 0,
    batch_size: int = 32,
) -> TaskResult:
    """Give a model `count` tasks of the toy world, each as one message of a chat, and score what it answers.

    Always the likeliest token is taken, to the end of the turn, or to twice the length of the longest right answer.
    heldout: about stories with facts that no training text has. shots: so many other tasks, with their answers, come
    before as earlier turns, the same for all, and never held out. The same seed gives every model the same tasks.
    Raises ValueError for a tokenizer without a chat, and for a prompt that does not fit in the context.
    """
    if shots < 0:
        raise ValueError(f"shots is {shots}, expected 0 or more.")
    tasks = draw_tasks(kind, count, seed, heldout)
    opening = []
    for task in draw_tasks(kind, shots, seed + 2**32) if shots else []:
        opening += task_chat([task])
    prompts = [tokenizer.chat([*opening, {"role": "user", "content": task.prompt}]) for task in tasks]
    limit = 2 * max(len(tokenizer.encode(task.answer)) for task in tasks) + 1
    order = sorted(range(count), key=lambda i: len(prompts[i]))  # of like length, so that little is padding
    written = [""] * count
    with _progress(total=count, desc=kind, unit="answer") as bar:
        for start in range(0, count, batch_size):
            some = order[start : start + batch_size]
            texts = generate(model, tokenizer, [prompts[i] for i in some], max_new_tokens=limit, temperature=0)
            for i, text in zip(some, texts, strict=True):
                written[i] = text.strip()
            bar.update(len(some))
    examples = [Example(task.prompt, task.answer, text) for task, text in zip(tasks, written, strict=True)]
    return TaskResult(kind, examples, MappingProxyType(_task_scores(kind, written, [task.answer for task in tasks])))


def _task_scores(kind: str, written: Sequence[str], answers: Sequence[str]) -> dict[str, Score]:
    if kind == "mood":
        return {"accuracy": accuracy(written, answers)}
    exact = {"exact_match": exact_match(written, answers)}
    if kind == "question":
        return exact | {"f1": f1(written, answers)}
    if kind == "summary":
        return {"rougeL": rouge(written, answers)["rougeL"]} | exact
    return {"bleu": bleu(written, answers, chinese=True), "chrf": chrf(written, answers)} | exact
