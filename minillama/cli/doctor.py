"""`minillama doctor`: what works here, what is missing, what to type."""

import importlib.metadata
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from functools import partial

import typer

from minillama.cli.app import app, load_checkpoint


@app.command(rich_help_panel="Look")
def doctor() -> None:
    """Say what works on this machine, what is missing, and what to type.

    The exit code is 0 if the course can run, and 1 if something that it needs is missing.
    """
    ready = True
    for name, look, needed, advice in _checks():
        try:
            print(f"✓ {name}: {look()}")
        except Exception as error:  # whatever it is, doctor says so and goes on
            print(f"✗ {name}: {error}\n  → {advice}{'' if needed else '; the course runs without it'}")
            ready = ready and not needed
    print("The course can run." if ready else "The course cannot run yet: see → above.")
    raise typer.Exit(0 if ready else 1)


def _checks() -> Iterator[tuple[str, Callable[[], object], bool, str]]:
    """(name, a function that says how it is or raises, whether the course needs it, what to do when it raises)."""
    install = "type `make lab`, or `pip install -e '.[lab]'` in the repository"
    yield "Python", platform.python_version, True, ""
    for package in ("torch", "ipykernel", "jupyterlab", "ipywidgets", "matplotlib"):
        yield package, partial(importlib.metadata.version, package), True, install
    yield "disk", lambda: _enough(shutil.disk_usage(".").free, 1), True, "make room"
    yield "memory", _memory, False, "close other programs before you load the real model"
    yield "cpu", _cpu, True, install
    yield "gpu", _gpus, False, "say `--device cpu` to the commands"
    yield "toy", partial(_first_pass, "toy"), True, "type `make toy`, or get `data/toy` again"
    yield "smollm2", partial(_first_pass, "smollm2"), False, "type `make lab`, or the command in this line"


def _memory() -> str:
    from minillama.checkpoint import memory

    return _enough(memory.free_memory(), 2)


def _enough(free: float, needed: int) -> str:
    if free < needed * 1e9:
        raise ValueError(f"{free / 1e9:.1f} GB free, expected at least {needed}")
    return f"{free / 1e9:.1f} GB free"


def _cpu() -> str:
    import torch

    return f"{torch.get_num_threads()} threads, {_speeds('cpu', 512)}"


def _gpus() -> str:
    import torch

    found = []
    for i in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(i)
        name = f"cuda:{i}, {torch.cuda.get_device_name(i)}, {free / 1e9:.0f} of {total / 1e9:.0f} GB free"
        found.append(f"{name}, {_speeds(f'cuda:{i}', 4096)}")
    if torch.backends.mps.is_available():
        found.append(f"mps, {_speeds('mps', 4096)}")
    return "\n  ".join(found) or "none, and the course needs none"


def _speeds(device: str, n: int) -> str:
    """Measured, because a processor that has to imitate bf16 is slower with it."""
    import torch

    speeds = []
    for dtype in (torch.float32, torch.bfloat16):
        matrix, seconds = torch.ones(n, n, dtype=dtype, device=device), []
        for _ in range(4):
            started = time.perf_counter()
            (matrix @ matrix)[0, 0].item()  # to fetch a number is to wait for the device
            seconds.append(time.perf_counter() - started)
        speeds.append(f"{2 * n**3 / min(seconds) / 1e9:,.0f} in {str(dtype).removeprefix('torch.')}")
    return f"{' and '.join(speeds)}, in billion operations a second"


def _first_pass(checkpoint: str) -> str:
    import torch

    started = time.perf_counter()
    model, tokenizer = load_checkpoint(checkpoint, "cpu", "bfloat16")
    tokens = torch.tensor([tokenizer.encode("Once upon a time")])
    loaded = time.perf_counter()
    with torch.inference_mode():
        if not model(tokens).isfinite().all():
            raise ValueError("its scores are not numbers, expected finite ones")
    passed = time.perf_counter()
    return f"{loaded - started:.2f} s to load, {(passed - loaded) * 1000:.0f} ms for one forward pass"
