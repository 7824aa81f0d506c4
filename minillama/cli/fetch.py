"""`minillama fetch`: text to train on, from the network."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from minillama.cli.app import app, option


@app.command(rich_help_panel="Learn")
def fetch(
    name: Annotated[str, typer.Argument(help="tinyshakespeare (1 MB), or tinystories (2.3 GB).")] = "tinyshakespeare",
    out: Annotated[Path, option("Files", "The folder to put the files into.")] = Path("corpora"),
) -> None:
    """Download a well-known text to train on, and make sure that it is the right one.

    What breaks off, or is stopped with Ctrl-C, goes on where it was with the same
    command. A file is there under its own name only when its size and SHA-256 are
    right; without a network, the message says where to put it by hand.

    [bold]Examples[/bold]
      minillama fetch
      minillama fetch tinystories --out corpora
      minillama train --text corpora/tinyshakespeare.txt
    """
    from minillama import download

    if name not in download.FILES:
        raise ValueError(f"there is no text {name!r:.40}, expected {' or '.join(download.FILES)}.")
    try:
        paths = [download.fetch(file, out) for file in download.FILES[name]]
    except KeyboardInterrupt:
        print("minillama: stopped; the same command goes on from here.", file=sys.stderr)
        raise typer.Exit(130) from None
    print(*paths, sep="\n")
