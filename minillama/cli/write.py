"""`minillama generate` and `minillama chat`."""

import contextlib
import itertools
import os
import random
import sys
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from minillama.cli.app import Adapter, Device, app, best_device, complain, from_utf8, load_checkpoint, option

if TYPE_CHECKING:
    from minillama.model import Llama
    from minillama.tokenizer import Tokenizer

Checkpoint = Annotated[str, option("Model", "toy, smollm2, a folder or a .gguf file.")]
Dtype = Annotated[str, option("Model", "float32, bfloat16, float16, int8 or int4.")]
TEMPERATURE = "0: the likeliest token; 1: as the model thinks."
TopK = Annotated[int | None, option("Choosing", "Only the K likeliest tokens.")]
TopP = Annotated[float, option("Choosing", "Only the likeliest, until they add up to this.")]
MinP = Annotated[float, option("Choosing", "Only those at least this share as likely as the first.")]
Lookup = Annotated[int, option("Writing", "Guess so many tokens from the text so far: sooner, if it repeats itself.")]
Compile = Annotated[bool, option("Writing", "Compile the model first: half a minute, then quicker.")]
Seed = Annotated[int | None, option("Choosing", "The same seed, the same text.")]
Parallel = Annotated[str | None, option("Model", "tp=N: shared out among N processes, which torchrun starts.")]


@app.command(rich_help_panel="Write")
def generate(
    prompt: Annotated[str | None, typer.Argument(help="The text to go on with; - reads standard input.")] = None,
    checkpoint: Checkpoint = "toy",
    device: Device = None,
    adapter: Adapter = None,
    dtype: Dtype = "float32",
    max_new_tokens: Annotated[int, option("Writing", "Tokens to write at most.")] = 200,
    count: Annotated[int, option("Writing", "Texts to write.", min=1)] = 1,
    lookup: Lookup = 0,
    compile: Compile = False,
    stop: Annotated[list[str] | None, option("Writing", "End before this text (may be given again).")] = None,
    judge: Annotated[bool, option("Writing", "Ask the toy world about each story.")] = False,
    temperature: Annotated[float | None, option("Choosing", TEMPERATURE, show_default="0.8")] = None,
    top_k: TopK = None,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    beams: Annotated[int | None, option("Choosing", "Instead: search with so many beams.", min=1)] = None,
    seed: Seed = None,
    parallel: Parallel = None,
) -> None:
    """Go on with a text. Without one, begin at the beginning.

    [bold]Examples[/bold]
      minillama generate
      minillama generate "Once upon a time" --temperature 0.5 --judge
      minillama generate "One, two, three," --checkpoint smollm2
      minillama generate --count 3 --seed 0
      minillama generate - < beginning.txt
      torchrun --nproc-per-node 2 -m minillama generate --checkpoint big --parallel tp=2
    """
    if parallel is None:
        prompt = _read(prompt)
        model, tokenizer = load_checkpoint(checkpoint, device, dtype, adapter)
    elif adapter is not None or compile:
        raise ValueError("--parallel takes neither --adapter nor --compile: leave one out.")
    else:
        model, tokenizer, prompt, seed = _load_share(parallel, checkpoint, device, dtype, prompt, seed)
    from minillama import generate

    if temperature is None:
        temperature = 0.8 if beams is None else 1.0  # beams draw nothing, so a temperature makes no sense with them
    write = partial(
        generate, model, tokenizer, max_new_tokens=max_new_tokens, lookup=lookup, compile=compile, stop=stop or [],
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed,
    )  # fmt: skip
    live = count == 1 and beams is None
    if live:
        pieces = write(prompt, stream=True)  # refuses a bad prompt before anything is printed
        texts = ["".join(_show(itertools.chain([prompt], pieces)))]
    else:
        texts = write([prompt] * count, beams=beams)
    for number, text in enumerate(texts):
        print("" if live else text if number == 0 else f"\n{text}")
        if judge:
            print(_verdict(text))
    if parallel is not None:
        from minillama.parallel import stop as leave

        leave()


def _read(prompt: str | None) -> str:
    if prompt == "-" or prompt is None and not sys.stdin.isatty():
        return from_utf8(sys.stdin.buffer.read(), "standard input").removesuffix("\n").removesuffix("\r")
    return prompt or ""


def _load_share(
    parallel: str, checkpoint: str, device: str | None, dtype: str, prompt: str | None, seed: int | None
) -> "tuple[Llama, Tokenizer, str, int]":
    """This process's share of a model, with the prompt and the seed of the first process, which alone prints."""
    from minillama.parallel import Layout, start
    from minillama.parallel_load import from_first, load_share

    layout = Layout.parse(parallel)
    place = start(device or best_device())
    first = os.environ["RANK"] == "0"
    if not first:
        sys.stdout = open(os.devnull, "w")
    seed = random.getrandbits(62) if seed is None else seed
    prompt, seed = from_first((_read(prompt), seed) if first else None)
    model, tokenizer = load_checkpoint(checkpoint, place, dtype, load=partial(load_share, layout=layout))
    return model, tokenizer, prompt, seed


def _verdict(story: str) -> str:
    from minillama import world

    try:
        return f"✓ The toy world tells this story; its log-probability is {world.log_prob(story):.2f}."
    except world.Fault as fault:
        return f"✗ The toy world does not tell this story: {fault}."


@app.command(rich_help_panel="Write")
def chat(
    checkpoint: Checkpoint = "smollm2",
    device: Device = None,
    adapter: Adapter = None,
    dtype: Dtype = "float32",
    system: Annotated[str | None, option("Writing", "What to tell the model before the talk begins.")] = None,
    max_new_tokens: Annotated[int, option("Writing", "Tokens in an answer at most.")] = 512,
    lookup: Lookup = 0,
    compile: Compile = False,
    temperature: Annotated[float, option("Choosing", TEMPERATURE)] = 0.2,
    top_k: TopK = None,
    top_p: TopP = 0.9,
    min_p: MinP = 0.0,
    seed: Seed = None,
) -> None:
    """Talk with a model. /reset begins anew, /quit or Ctrl-D ends; Ctrl-C stops an answer.

    [bold]Examples[/bold]
      minillama chat
      minillama chat --system "You answer in one sentence." --temperature 0.7
      echo "What is the capital of France?" | minillama chat
    """
    if checkpoint == "toy" and adapter is None:
        raise ValueError(
            "the toy only tells stories, nobody taught it to chat: take `--checkpoint smollm2`, or teach it with "
            "`minillama finetune`."
        )
    model, tokenizer = load_checkpoint(checkpoint, device, dtype, adapter)
    from minillama import generate

    write = partial(
        generate, model, tokenizer, max_new_tokens=max_new_tokens, lookup=lookup, compile=compile, stream=True,
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed,
    )  # fmt: skip
    opening = [{"role": "system", "content": system}] if system else []
    tokenizer.chat([*opening, {"role": "user", "content": ""}])  # a tokenizer that has no chat says so at once
    context = model.config.max_seq_len
    talk: list[dict[str, str]] = []
    for line in _lines():
        if line.strip() == "/quit":
            break
        if line.strip() in ("", "/reset"):
            talk = [] if line.strip() else talk
            continue
        talk.append({"role": "user", "content": line})
        answer = ""
        try:
            while len(ids := tokenizer.chat(opening + talk)) > max(context - max_new_tokens, context // 2) and talk[1:]:
                del talk[:2]
                print(f"(The context holds {context} tokens: the oldest question and its answer are forgotten.)")
            for piece in _show(write(ids)):
                answer += piece
        except KeyboardInterrupt:
            print(" … stopped", end="")
        except ValueError as error:
            if not sys.stdin.isatty():
                raise
            complain(str(error))
            talk.pop()
            continue
        print()
        talk.append({"role": "assistant", "content": answer})


def _lines() -> Iterator[str]:
    """What is typed or piped in, until Ctrl-D, or Ctrl-C at the prompt."""
    if not sys.stdin.isatty():
        yield from (from_utf8(line, "standard input").rstrip("\r\n") for line in sys.stdin.buffer)
        return
    with contextlib.suppress(ImportError):  # Windows has none
        import readline  # noqa: F401  (`input` then knows the arrow keys)
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            yield input("> ")
    print()


def _show(pieces: Iterator[str]) -> Iterator[str]:
    """Print pieces as they come, and pass them on."""
    for piece in pieces:
        print(piece, end="", flush=True)
        yield piece
