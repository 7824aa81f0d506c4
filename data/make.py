# ruff: noqa: E501  (a row of a card's table is one line)
"""Make everything in this folder again: `make toy`, or `python data/make.py`.

The tokenizer, the toy model, checkpoints along its way, the sample of the corpus and the two cards. It takes about 15
minutes on one core: one thread, so that sums are added up in the same order on every run. Ctrl-C stops it without
loss; the same command goes on.
"""

import inspect
import json
import math
import random
import string
from pathlib import Path
from typing import Any

import torch

from minillama import generate, world
from minillama.checkpoint import load, save
from minillama.config import ModelConfig
from minillama.data import StoryBatches, Validation, story_validation
from minillama.model import Llama
from minillama.tokenizer import SentencePieceTokenizer
from minillama.trainer import Trainer, TrainSettings, mean_loss

HERE = Path(__file__).parent
RUN = HERE.parent / "work" / "toy"
CONFIG = ModelConfig.preset("toy")
SETTINGS = TrainSettings(
    steps=5000, learning_rate=8e-3, warmup=100, precision="bfloat16", validate_every=250, save_every=250
)
BATCH_SIZE = 16
SNAPSHOTS = (100, 300, 500, 750, 1000, 2000)  # before, while and after the copying heads form
SAMPLES = 500


def tokenizer_texts(stories: int = 6000) -> list[str]:
    """What the vocabulary is learned from: stories and all their tasks.

    Chinese has no spaces, so its sentences would melt into long tokens: there are only a few translations, and a line
    with every character that the grammar can write.
    """
    rng = random.Random("tokenizer")
    texts = [" ".join(sorted(set(inspect.getsource(world)) - set(string.printable)))]
    for number in range(stories):
        story = world.sample(rng)
        for task in world.tasks(story):
            asked = task.prompt.rpartition("\n")[2]
            if task.kind != "translation":
                if not asked.startswith("Why"):  # reasons say again what the story says
                    texts += [asked, task.answer]
            elif number % 40 == 0:
                texts.append(task.answer)
    return texts


def train(tokenizer: SentencePieceTokenizer, validation: Validation) -> Trainer:
    """The run of the model card. It goes on from where it was, or is left alone if it was finished."""
    torch.manual_seed(0)
    batches = StoryBatches(tokenizer, BATCH_SIZE, seed=0)
    run = Trainer(Llama(CONFIG), tokenizer, batches, SETTINGS, RUN, validation, SNAPSHOTS)
    run.run()
    return run


def accepted(model: Llama, tokenizer: SentencePieceTokenizer, temperature: float) -> float:
    """The share of SAMPLES stories that the world accepts."""
    count = 0
    for seed in range(0, SAMPLES, 100):
        for text in generate(model, tokenizer, [""] * 100, max_new_tokens=200, temperature=temperature, seed=seed):
            try:
                world.log_prob(text)
            except world.Fault:
                continue
            count += 1
    return count / SAMPLES


def write_snapshots(tokenizer: SentencePieceTokenizer) -> None:
    """Weights along the way, in bf16, for watching heads form."""
    for step in SNAPSHOTS:
        model, _ = load(RUN / f"step-{step}", dtype=torch.bfloat16)
        save(model, tokenizer, HERE / "toy-steps" / str(step))


def write_curve(records: list[dict[str, Any]]) -> None:
    """The first ten steps, every 25th, and all that were validated: a line each."""
    with open(HERE / "training.jsonl", "w", encoding="utf-8") as file:
        for record in records:
            if record["step"] <= 10 or record["step"] % 25 == 0 or "validation" in record:
                print(json.dumps({name: value for name, value in record.items() if name != "seconds"}), file=file)


def write_corpus(stories: int = 1000) -> None:
    """A line a story: its text, exact log-probability, facts and translation."""
    rng = random.Random("corpus")
    with open(HERE / "stories.jsonl", "w", encoding="utf-8") as file:
        for _ in range(stories):
            story = world.sample(rng)
            row = {"text": story.text, "log_prob": round(story.log_prob, 9), "facts": story.facts}
            print(json.dumps({**row, "chinese": story.chinese}, ensure_ascii=False), file=file)


def data_card(tokenizer: SentencePieceTokenizer) -> str:
    """What the stories are, with every number counted."""
    rng = random.Random("card")
    stories = [world.sample(rng) for _ in range(5000)]
    lengths = sorted(len(tokenizer.encode(story.text, bos=True, eos=True)) for story in stories)
    words = {word.english for name in world.WORLD.words for word in world.WORLD.words[name]}
    pairs = [(c.english, t.english) for c in world.WORLD.words["colours"] for t in world.WORLD.words["things"]]
    kept_out = sum(world.held_out(*pair) for pair in pairs)
    example = world.sample(random.Random(0))
    questions = "\n".join(
        f"- *{task.kind}*: {task.prompt.rpartition(chr(10))[2]} → {task.answer}"
        for task in world.tasks(example)
        if task.kind in ("mood", "question", "summary")
    )
    return f"""# Data card: the stories of the toy world

`stories.jsonl` holds 1,000 stories: text, exact log-probability in nats, the facts behind it, and its Chinese translation.
They are a sample to look at; training draws new stories from the grammar in `minillama/world.py` at every step.

| | |
|---|---|
| plots | {len(world._PLOTS)} |
| words in its lists | {len(words)} |
| entropy of a story | {world.entropy():.3f} nats ({world.entropy() / math.log(2):.1f} bits) |
| tokens a story, with BOS and EOS | {lengths[0]} to {lengths[-1]}, median {lengths[len(lengths) // 2]} (5,000 stories) |
| vocabulary | {tokenizer.vocab_size:,} tokens, SentencePiece BPE with byte fallback |
| kept out of all training texts | {kept_out} of the {len(pairs)} pairs of colour and thing; `sample(rng, heldout=True)` tells only of these |

A story, what it is worth, and what can be asked about it:

> {example.text}
>
> {example.chinese}
>
> log-probability {example.log_prob:.3f} nats

{questions}

- **How it was made:** the grammar was written by hand for this course, in English and Chinese side by side. No text of
  anybody else's is in it, and no person.
- **What it is for:** learning how language models work. Its entropy is known, so the best possible loss is known too.
- **What it is not for:** anything where the world is larger than ten plots.
- **Beside it:** `scaling.json`, six sizes of LLaMA trained on the same stories (chapter 16); made again by
  `python data/scaling.py`.
- **Licence:** Apache-2.0, like all of this repository.
- **Made again by** `make toy`.
"""


def model_card(run: Trainer, tokenizer: SentencePieceTokenizer, validation: Validation) -> str:
    """What the toy is and how well it does, with every number measured."""
    floor = validation.floor or 0.0
    model, records = run.model, run.records
    reached = mean_loss(model, validation.batches)
    heldout = story_validation(tokenizer, 500, seed=0, heldout=True)
    unseen = mean_loss(model, heldout.batches)
    scores = {record["step"]: record["validation"] for record in records if "validation" in record}
    tokens = sum(record["tokens"] for record in records)
    curve = "\n".join(f"| {step:,} | {score:.4f} | {score - floor:.4f} |" for step, score in scores.items())
    shares = "\n".join(f"| {t} | {accepted(model, tokenizer, t):.1%} |" for t in (0.8, 1.0))
    c, s = CONFIG, SETTINGS
    return f"""# Model card: the toy

A LLaMA of {c.n_params():,} weights that tells stories of the toy world (`README.md` beside this card).

| | |
|---|---|
| shape | {c.n_layers} layers, width {c.dim}, {c.n_heads} heads over {c.n_kv_heads} key/value heads of {c.head_dim}, feed-forward {c.ffn_dim}, tied embeddings |
| context | {c.max_seq_len} tokens; trained on whole stories only, of at most 150 |
| trained on | {tokens:,} tokens in {len(records):,} steps of {BATCH_SIZE} new stories each; none is seen twice |
| optimizer | Muon for the blocks' matrices, AdamW for the rest; peak rate {s.learning_rate} after {s.warmup} steps of warm-up, then a cosine to 0; weight decay {s.weight_decay}; {s.precision} matrix products, fp32 weights |
| files | `toy/` (fp32); along the way `toy-steps/{{{",".join(map(str, SNAPSHOTS))}}}/` (bf16); losses in `training.jsonl` |

## How good it is

On {sum(len(b.inputs) for b in validation.batches):,} new stories, every token scored, the floor is {floor:.4f} nats per token: no model can do
better on average. The toy reaches {reached:.4f}, which is {reached - floor:.4f} above it. On stories of pairs that were kept out of training it
reaches {unseen:.4f}, {unseen - heldout.floor:.4f} above their floor: it has learned that these pairs do not occur.

| step | validation loss | above the floor |
|---|---|---|
{curve}

Of {SAMPLES} stories that it writes, the world accepts, without a single wrong word:

| temperature | accepted |
|---|---|
{shares}

## Limits

- Most stories that the world refuses give a second child the name of the first. The world never does; the toy has not
  learned to leave that one name out of {len(world.WORLD.words["names"])}.
- It knows nothing but these stories: a text that begins otherwise leads nowhere. It was never tuned to follow
  instructions, though its tokenizer has the tokens of a chat.

**Licence:** Apache-2.0. **Made again by** `make toy`, from seed 0, in one thread.
"""


if __name__ == "__main__":
    torch.set_num_threads(1)
    tokenizer = SentencePieceTokenizer.train(tokenizer_texts(), vocab_size=CONFIG.vocab_size)
    validation = story_validation(tokenizer, 500, seed=0)
    run = train(tokenizer, validation)
    save(run.model, tokenizer, HERE / "toy")
    write_snapshots(tokenizer)
    write_curve(run.records)
    write_corpus()
    (HERE / "README.md").write_text(data_card(tokenizer), encoding="utf-8")
    (HERE / "MODEL_CARD.md").write_text(model_card(run, tokenizer, validation), encoding="utf-8")
