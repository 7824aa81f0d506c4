"""The command line (chapter 00): `minillama COMMAND`, or `python -m minillama.cli COMMAND`.

A command is a function: its parameters are the options, its docstring is the help. Bad input is raised as everywhere
in the package, and `main` makes one sentence of it. torch takes seconds to import, so what needs it is imported inside
the commands, and `--help` is there at once.
"""

from minillama.cli import (  # noqa: F401  (they add commands)
    bench,
    data,
    doctor,
    evaluate,
    fetch,
    finetune,
    inspect,
    learn,
    plan,
    train,
    write,
)
from minillama.cli.app import app, main

__all__ = ["app", "main"]
