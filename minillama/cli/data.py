"""`minillama data prepare`: text of any size to tokens on disk."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from minillama.cli.app import app, named_tokenizer, option

if TYPE_CHECKING:
    from minillama.corpus import Report

data = typer.Typer(rich_markup_mode="rich")
app.add_typer(data, name="data", rich_help_panel="Learn")


@data.callback(invoke_without_command=True)
def _start(context: typer.Context) -> None:
    """Make text ready to train on."""
    if context.invoked_subcommand is None:
        print(context.get_help())


@data.command()
def prepare(
    files: Annotated[list[Path], typer.Argument(help="UTF-8 text, or JSON lines with a text each (.jsonl).")],
    tokenizer: Annotated[str, option("Tokens", "A checkpoint's: toy, smollm2, a folder, or a .gguf file.")],
    out: Annotated[Path, option("Tokens", "The folder to write, a new one.")],
    shard_tokens: Annotated[int, option("Tokens", "In each file but the last.", min=1)] = 2**26,
    holdout: Annotated[float, option("Documents", "The share that is kept to validate with.")] = 0.01,
    seed: Annotated[int, option("Documents", "It draws which.")] = 0,
    processes: Annotated[
        int | None, option("Run", "Left out: as many as there are cores.", min=1, show_default=False)
    ] = None,
) -> None:
    """Clean text of any size, leave out what is there twice, and write the rest as tokens.

    Documents: the lines of a .jsonl file; what stands between lines that are
    <|endoftext|>, as in TinyStories; or, in a file without these, passages of a
    book, 4 kB at most, that end where a paragraph does. A document that holds the
    words of an earlier one is dropped. Ctrl-C leaves nothing behind.

    [bold]Examples[/bold]
      minillama data prepare books/*.txt --tokenizer toy --out corpora/books
      minillama data prepare a.jsonl b.jsonl --tokenizer smollm2 --out corpora/ab
      minillama train --data corpora/books
    """
    from minillama import corpus

    try:
        report = corpus.prepare(
            files, named_tokenizer(tokenizer), out, holdout=holdout, seed=seed, shard_tokens=shard_tokens,
            processes=processes,
        )  # fmt: skip
    except KeyboardInterrupt:
        print("minillama: stopped; nothing was written, the same command begins again.", file=sys.stderr)
        raise typer.Exit(130) from None
    lines = _lines(report)
    width = max(len(name) for name, _, _ in lines)
    for name, count, unit in lines:
        print(f"{name:<{width}}{count:>16,} {unit}")
    print(f"{report.size / 1e6 / report.seconds:.1f} MB/s.", end=" ")
    if report.documents["held-out"]:
        print(f"To train on it: minillama train --data {out}")
    else:
        print("minillama train needs documents held out: give more text or a larger --holdout, and another --out.")


def _lines(report: "Report") -> list[tuple[str, int, str]]:
    lines = [
        ("read", report.size, f"bytes in {report.files} file{'s' * (report.files != 1)}"),
        ("", report.read, "documents"),
    ]
    lines += [(f"dropped: {why}", count, "documents") for why, count in report.dropped.items()]
    lines += [(what, count, "characters") for what, count in report.changed.items()]
    for side, name in (("train", "to learn from"), ("held-out", "held out")):
        lines += [(name, report.documents[side], "documents"), ("", report.tokens[side], "tokens")]
    return lines
