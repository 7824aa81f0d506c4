"""`minillama train`: the toy world's stories, or text of your own."""

import hashlib
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from minillama.cli.app import Device, app, best_device, from_utf8, named_tokenizer, option

if TYPE_CHECKING:
    from minillama.data import TextBatches, Validation
    from minillama.parallel import Team
    from minillama.tokenizer import Tokenizer
    from minillama.trainer import Alone

VALIDATION_STORIES, VALIDATION_WINDOWS = 200, 64


@app.command(rich_help_panel="Learn")
def train(
    preset: Annotated[str, option("Model", "Its shape: toy-small, toy, llama-7b …")] = "toy-small",
    device: Device = None,
    precision: Annotated[
        str | None,
        option("Model", "float32, or bfloat16 for matrix products; left out: bfloat16 if the device is quick at it."),
    ] = None,
    out: Annotated[Path | None, option("Run", "Its folder; left out: runs/PRESET.", show_default=False)] = None,
    steps: Annotated[int, option("Run", "How often all weights are nudged.")] = 2000,
    batch_size: Annotated[int, option("Run", "Stories, or windows of text, in a step.", min=1)] = 16,
    optimizer: Annotated[str, option("Run", "muon or adamw.")] = "muon",
    learning_rate: Annotated[float, option("Run", "Its peak.")] = 1.5e-2,
    checkpointing: Annotated[
        bool, option("Run", "Keep of each block only what it reads, and compute the rest again: less memory.")
    ] = False,
    parallel: Annotated[
        str | None, option("Run", "Under torchrun, how the processes share the work: dp=2, fsdp=2,tp=2 …")
    ] = None,
    seed: Annotated[int, option("Run", "For the first weights and the order of the data.")] = 0,
    text: Annotated[list[Path] | None, option("Data", "Your own text, a UTF-8 file (may be given again).")] = None,
    data: Annotated[Path | None, option("Data", "Or a folder that `minillama data prepare` wrote.")] = None,
    tokenizer: Annotated[
        str | None, option("Data", "A checkpoint's: toy, smollm2, a folder …; left out: the toy's, or a new one.")
    ] = None,
    vocab_size: Annotated[int | None, option("Data", "Tokens to learn from the text; left out: 2048.")] = None,
    window: Annotated[
        int | None, option("Data", "Tokens of the text that are read at once; left out: 256.", min=1)
    ] = None,
) -> None:
    """Train a model on the toy world's stories, or on text of your own.

    Without options it takes a few minutes on two cores. Ctrl-C saves and stops;
    the same command goes on from there, also after a power cut. For stories the
    floor is known, the lowest loss that any model can reach; KL is the distance
    to it. Losses are in nats per token.

    [bold]Examples[/bold]
      minillama train
      minillama train --preset toy --steps 5000 --out runs/mine
      minillama train --text book.txt --text letters.txt --out runs/book
      minillama train --data corpora/books --out runs/books
      minillama generate --checkpoint runs/book/step-2000
      torchrun --nproc-per-node 4 -m minillama train --parallel fsdp=2,tp=2
    """
    import torch

    from minillama import Llama, ModelConfig, generate, load
    from minillama.checkpoint.load import check_device
    from minillama.checkpoint.memory import free_memory
    from minillama.data import StoryBatches, story_validation
    from minillama.shards import Corpus, ShardBatches, corpus_validation
    from minillama.trainer import ALONE, Trainer, TrainSettings, checkpoints

    config, layout, out = ModelConfig.preset(preset), None, out or Path("runs") / preset
    team: Alone | Team = ALONE
    if parallel is None:
        if (started := os.environ.get("WORLD_SIZE", "1")) != "1":
            raise ValueError(
                f"torchrun has started {started} processes, and --parallel is left out: say how they share the work, "
                f"like --parallel fsdp={started}."
            )
        place = check_device(device or best_device())
    else:
        from minillama.parallel import Layout, distribute, start, stop

        layout = Layout.parse(parallel)
        place = start(device or best_device())
    settings = TrainSettings(
        steps=steps, learning_rate=learning_rate, optimizer=optimizer, checkpointing=checkpointing,
        warmup=0 if optimizer == "muon" else min(50, max(0, steps) // 10),  # Muon's steps have one size from the first
        precision=precision or quick_precision(place.type),
    )  # fmt: skip
    if layout is None and place.type == "cpu" and (needed := config.training_bytes()) > (free := free_memory()):
        raise ValueError(f"{preset} needs {needed / 1e9:,.1f} GB to train, and {free / 1e9:,.1f} GB are free: try toy.")
    if (width := window or 256) > config.max_seq_len:
        raise ValueError(f"--window is {width}, expected at most {config.max_seq_len}, the context of {preset}.")
    words = named_tokenizer(tokenizer) if tokenizer and not data else None
    batches: TextBatches | StoryBatches | ShardBatches
    if data:
        for name, value in (("--text", text), ("--tokenizer", tokenizer), ("--vocab-size", vocab_size)):
            if value:
                raise ValueError(f"{name} is given, but --data {data} brings its own: leave one of the two out.")
        if not checkpoints(out):
            Corpus(data, verify=True)  # once, before the first step
        batches = ShardBatches(data, batch_size, width, seed)
        validation = corpus_validation(data, batch_size, width, VALIDATION_WINDOWS)
        words, held = batches.corpus.tokenizer, validation.batches[0].inputs[0]
        beginning = words.decode(held[:10].tolist())
        if os.environ.get("RANK", "0") == "0":
            print(f"{batches.n_rows:,} rows of {width} tokens; {batches.padding:.1%} is padding.", file=sys.stderr)
        source, content = f"{data.name} (window {width})", torch.tensor(list(batches.corpus.sha256.encode()))
    elif text:
        if vocab_size is not None and words:
            raise ValueError(
                f"--vocab-size is {vocab_size}, but the tokenizer in {tokenizer} has {words.vocab_size} tokens, and is "
                "learned already: leave one of the two out."
            )
        vocab_size = 2048 if vocab_size is None else vocab_size
        words, batches, validation, beginning = _read(text, words, vocab_size, batch_size, width, seed)
        source, content = f"{', '.join(path.name for path in text)} (window {width})", batches.tokens
    else:
        for name, value in (("--vocab-size", vocab_size), ("--window", window)):
            if value is not None:
                raise ValueError(f"{name} is {value}, but there is no --text to use it on: give one, or leave it out.")
        words = words or load("toy")[1]
        assert words is not None
        batches, beginning = StoryBatches(words, batch_size, seed), ""
        validation = story_validation(words, VALIDATION_STORIES, seed)
        source, content = "stories", batches(0).inputs
    digest = hashlib.sha256(content.numpy().tobytes()).hexdigest()[:8]  # of the text and the tokenizer
    torch.manual_seed(seed)
    with torch.device("meta" if layout else "cpu"):
        model = Llama(replace(config, vocab_size=words.vocab_size))
    if layout:
        team = distribute(model, layout, half=settings.precision == "bfloat16", device=place)
    model.to(place)
    if team.first:
        claim(out, {"preset": preset, "seed": seed, "batch_size": batch_size, "data": f"{source} {digest}"})
    team.wait()
    trainer = Trainer(model, words, batches, settings, out, validation, team=team)
    try:
        trainer.run()
    except KeyboardInterrupt as stopped:
        print(f"minillama: {stopped or 'stopped; the same command goes on from the last checkpoint'}.", file=sys.stderr)
        raise typer.Exit(130) from None
    if layout:
        first = team.first
        stop()
        if not first:
            return
    loss, floor = trainer.records[-1]["validation"], validation.floor
    print(f"Validation loss: {loss:.4f}.", "" if floor is None else f"Floor: {floor:.4f}. KL: {loss - floor:.4f}.")
    whole = model if not layout else None
    if layout and model.config.bytes("float32") < free_memory():
        whole, _ = load(checkpoints(out)[-1])
    if whole:
        print(generate(whole, words, beginning, max_new_tokens=200, temperature=0.8, seed=0))
    print(f"To read more: minillama generate --checkpoint {checkpoints(out)[-1]}")


def quick_precision(device: str) -> str:
    """bfloat16 where the device multiplies it faster than float32: graphics cards, and processors that say so."""
    import torch

    if device == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        flags = ""
    return "bfloat16" if device == "cpu" and ("amx_bf16" in flags or "avx512_bf16" in flags) else "float32"


def _read(
    paths: list[Path], tokenizer: "Tokenizer | None", vocab_size: int, batch_size: int, window: int, seed: int
) -> "tuple[Tokenizer, TextBatches, Validation, str]":
    """Tokenizer, batches, validation, and a few words to go on with. The last tenth of each file is held out."""
    import torch

    from minillama.data import Batch, TextBatches, Validation
    from minillama.tokenizer import SentencePieceTokenizer

    texts = []
    for path in paths:
        texts.append(from_utf8(path.read_bytes(), str(path)))
        if not texts[-1].strip():
            raise ValueError(f"{path} is empty, expected text.")
    if (size := len("".join(texts).encode())) <= 10 * window:  # no token has less than a byte
        raise ValueError(
            f"the text has {size} bytes, expected more than {10 * window}: the tenth of it that is held out must fill "
            f"a window of {window} tokens; give more text or a smaller --window."
        )
    if tokenizer is None:
        lines = [line for text in texts for line in text.splitlines()]
        tokenizer = SentencePieceTokenizer.train(lines, vocab_size=vocab_size)
    rows = [tokenizer.encode(text, bos=tokenizer.bos_id is not None, eos=True) for text in texts]
    learned = torch.tensor([token for row in rows for token in row[: len(row) * 9 // 10]])
    held = torch.tensor([token for row in rows for token in row[len(row) * 9 // 10 :]])
    batches = TextBatches(learned, batch_size, window, seed)
    if len(held) <= window:
        raise ValueError(
            f"the tenth of the text that is held out has {len(held)} tokens, a window needs {window + 1}: give more "
            "text or a smaller --window."
        )
    windows = held.unfold(0, window + 1, window)[:VALIDATION_WINDOWS]  # one token in common: each is scored once
    validation = Validation([Batch(some[:, :-1], some[:, 1:]) for some in windows.split(batch_size)])
    return tokenizer, batches, validation, tokenizer.decode(held[:10].tolist())


def claim(folder: Path, run: dict[str, Any]) -> None:
    """Note in the folder what is trained in it. Raises ValueError, and writes nothing, if it holds anything else."""
    note = folder / "run.json"
    if not folder.exists() or folder.is_dir() and not any(folder.iterdir()):
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = folder / ".run.json.tmp"
        unfinished.write_text(json.dumps(run, indent=2) + "\n", encoding="utf-8")
        os.replace(unfinished, note)
        return
    try:
        found = dict(json.loads(note.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        raise ValueError(f"{folder} is there and holds no run of ours: choose another --out.") from None
    for name, value in run.items():
        if found.get(name) != value:
            raise ValueError(
                f"{folder} holds a run with {name} {found.get(name)}, not {value}: "
                "go on with the same settings, or choose another --out."
            )
