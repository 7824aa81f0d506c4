"""Measure speed and memory, and say whether the targets are met: `make bench`, or `python -m tests.benchmarks`.

Each module here has `rows(rounds)`: what it measured, against a peer or a limit, as rows of the table. Exit code 0 only
when every target is met. When all modules were measured in full, the table is stored in RESULTS.md, met or not.
"""

import argparse
import os
import platform
import sys
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

MODULES = (
    "training", "time_to_loss", "decode", "llamacpp", "load_memory", "load_large", "quality", "small_toy",
    "plan", "corpus", "parallel",
)  # fmt: skip
RESULTS = Path(__file__).with_name("RESULTS.md")
NOTE = """\
Stored by `make bench`. Ours and its peer took turns, again and again: the values are medians, and the ratio is the
median of each turn's ratio. A target says which way is good: at least (≥) for speed, at most (≤) for memory, time and
error; what has none is only stated. LOG.md says what was tried and did not help.
"""


def machine() -> str:
    """The kind of machine: processor, cores, and the releases that the figures depend on."""
    processor = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        processor = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), processor)
    cores = f"{os.cpu_count()} core{'s' if os.cpu_count() != 1 else ''}"
    return f"{processor}, {cores}, torch {version('torch')}, transformers {version('transformers')}"


def number(value: float) -> str:
    """Three digits or more, none of them made up."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a table in Markdown, aligned so that it reads well as plain text too."""
    cells = [["what", "ours", "peer", "unit", "ratio", "target", ""], [""] * 7]
    for r in rows:
        verdict = "" if not r["target"] else "met" if r["met"] else "not met"
        ratio = f"{r['ratio']:.{2 if abs(r['ratio'] - 1) > 0.02 else 4}f}"  # of what is nearly equal, the difference
        values = (number(r["ours"]), number(r["peer"]), r["unit"], ratio, r["target"], verdict)
        cells.append([r["name"], *values])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    right = (1, 2, 4, 5)  # numbers
    lines = []
    for line in cells:
        padded = [c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))]
        lines.append("| " + " | ".join(padded) + " |\n")
    lines[1] = "|" + "|".join("-" * (w + 1) + (":" if i in right else "-") for i, w in enumerate(widths)) + "|\n"
    return "".join(lines)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="name", help=f"what to measure, of {', '.join(MODULES)}")
    parser.add_argument("--rounds", type=int, metavar="N", help="measure N times; few for a quick look, not stored")
    options = parser.parse_args(arguments)
    if unknown := set(options.names) - set(MODULES):
        parser.error(f"there is no benchmark {', '.join(sorted(unknown))}: choose from {', '.join(MODULES)}.")
    if options.rounds is not None and options.rounds < 1:
        parser.error(f"--rounds is {options.rounds}, expected at least 1.")

    rows, failures = [], []
    for name in options.names or MODULES:
        print(f"measuring {name} …", file=sys.stderr, flush=True)
        try:
            measure = import_module(f"tests.benchmarks.{name}").rows
            rows += measure() if options.rounds is None else measure(options.rounds)
        except (AssertionError, ValueError, OSError) as error:  # a loss that differs, the real model not installed
            failures.append(f"{name} was not measured: {error}")
    text = f"{machine()}\n\n{table(rows)}"
    print(text)
    print(*failures, sep="\n", end="\n" if failures else "")
    missed = [row["name"] for row in rows if not row["met"]]
    if missed:
        print(f"not met: {'; '.join(missed)}")
    if not failures and not options.names and options.rounds is None:
        unfinished = RESULTS.with_suffix(".tmp")
        unfinished.write_text(f"# Benchmarks\n\n{NOTE}\n{text}", encoding="utf-8")
        os.replace(unfinished, RESULTS)
    return 1 if missed or failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
