"""What the commands share: the app, the one place where an error becomes a sentence, and options."""

import contextlib
import importlib.metadata
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import torch

    from minillama.model import Llama
    from minillama.tokenizer import Tokenizer

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")
UsageError: type[Exception] = typer.BadParameter.__mro__[1]  # no public name of it is in every version of typer


def main(arguments: list[str] | None = None) -> None:
    """Run one command, then exit: 0 done, 1 something needed is missing, 2 bad input, 130 stopped with Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # where there is no ✓ or 中, a ? will do
    try:
        status = app(arguments, prog_name="minillama", standalone_mode=False)
    except UsageError as error:
        status = complain(error.format_message())  # type: ignore[attr-defined]
    except OSError as error:
        status = complain(f"{error.filename}: {error.strerror}." if error.filename else str(error))
    except (ValueError, FloatingPointError) as error:
        status = complain(str(error))
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "allocate" not in str(error):
            raise  # a mistake of ours: let it be seen
        status = complain("there is not enough memory for this: take a smaller model or batch.")
    sys.exit(status)


def complain(sentence: str) -> int:
    if int(os.environ.get("RANK", 0)):  # the first of several processes says it, and torchrun then ends the others
        time.sleep(30)  # who is alive after that is the only one to know
    print("minillama:", " ".join(sentence.split()), file=sys.stderr)
    return 2


@app.callback(invoke_without_command=True)
def _start(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Show versions and exit.")] = False
) -> None:
    """LLaMA from nothing: a course, and the package that it builds.

    Type [bold]minillama doctor[/bold] first: it says what works on this machine.
    """
    if version:
        for name in ("minillama", "torch"):
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                print(name, importlib.metadata.version(name))
    elif context.invoked_subcommand is None:
        print(context.get_help())


def option(panel: str, help: str, **settings: Any) -> Any:
    return typer.Option(help=help, rich_help_panel=panel, **settings)


Device = Annotated[str | None, option("Model", "cpu, cuda, cuda:1, mps; left out: cuda if there is one.")]
Adapter = Annotated[Path | None, option("Model", "A folder with a LoRA adapter for it.", show_default=False)]


def load_checkpoint(
    checkpoint: str, device: "str | torch.device | None", dtype: str, adapter: Path | None = None, load: Any = None
) -> "tuple[Llama, Tokenizer]":
    import torch

    if load is None:
        from minillama import load

    model, tokenizer = load(checkpoint, device=device or best_device(), dtype=getattr(torch, dtype, dtype))
    if tokenizer is None:
        raise ValueError(f"the checkpoint {checkpoint} has no tokenizer, so it cannot read or write text.")
    if adapter is not None:
        from minillama.finetune import load_adapter, merge

        merge(load_adapter(model, adapter))
    return model, tokenizer


def named_tokenizer(name: str) -> "Tokenizer":
    from minillama import load
    from minillama.checkpoint.load import find_checkpoint
    from minillama.tokenizer import load_tokenizer

    path = find_checkpoint(name)
    tokenizer = load_tokenizer(path) if path.is_dir() else load(path)[1]
    if tokenizer is None:
        raise ValueError(f"the checkpoint {name} has no tokenizer: name one that has.")
    return tokenizer


def best_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def from_utf8(data: bytes, source: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = data[error.start]
        raise ValueError(f"{source} is not UTF-8: byte {error.start} is {byte:#04x}; save it as UTF-8.") from None
