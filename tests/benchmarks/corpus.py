"""From text to tokens on disk: speed against a plain loop on one core, and a peak of memory that does not grow.

The text is the toy world's stories, some 480 bytes each. The peer encodes document after document with the same
tokenizer, and saves one array with NumPy; it cleans nothing, looks for nothing twice and holds nothing out. A peak is
that of a fresh process and its helpers, what they share counted once. Linux only.
"""

import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from minillama import load, world
from minillama.corpus import FEW_BYTES, prepare
from minillama.tokenizer import Tokenizer
from tests.benchmarks.harness import race, row

ROUNDS = 3
SPEED = 2e9 / 3600  # bytes a second: 2 GB an hour
SMALL, LARGE = 50, 200  # MB

CHILD = """
import json, os, sys, threading
import psutil
from minillama.corpus import prepare
from minillama.tokenizer import load_tokenizer

def resident():  # what processes share is counted once, in parts
    mine = psutil.Process()
    total = 0
    for process in [mine, *mine.children(recursive=True)]:
        try:
            total += process.memory_full_info().pss
        except psutil.Error:
            pass  # it has just ended
    return total

def watch(stop):
    global peak
    while not stop.wait(0.2):
        peak = max(peak, resident())

if __name__ == "__main__":
    peak, stop = 0, threading.Event()
    thread = threading.Thread(target=watch, args=(stop,))
    thread.start()
    report = prepare([sys.argv[1]], load_tokenizer(sys.argv[2]), sys.argv[3], processes=2)
    stop.set()
    thread.join()
    print(json.dumps({"peak": peak, "seconds": report.seconds, "documents": report.read}))
"""


def write_stories(path: Path, size: int, seed: int = 0) -> int:
    """Write about so many bytes of stories, with marks between them; return the bytes."""
    rng, stories = random.Random(seed), [world.sample(random.Random(n)).text for n in range(2000)]
    written = 0
    with open(path, "w", encoding="utf-8") as file:
        while written < size:  # a number makes each another one: to sample them all would take longer than to read them
            written += file.write(f"{rng.choice(stories)} {written:x}\n<|endoftext|>\n")
    return written


def plain_loop(path: Path, tokenizer: Tokenizer, out: Path) -> None:
    texts = path.read_text(encoding="utf-8").split("\n<|endoftext|>\n")
    np.save(out, np.array([token for text in texts for token in tokenizer.encode(text, eos=True)], np.uint16))


def rows(rounds: int = ROUNDS) -> list[dict[str, Any]]:
    found = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = write_stories(folder / "text.txt", 4 * FEW_BYTES)
        for checkpoint, words in (("toy", "the toy's SentencePiece"), ("smollm2", "SmolLM2's byte-level BPE")):
            tokenizer = load(checkpoint)[1]
            assert tokenizer is not None
            outs = iter(range(100))
            times = race(
                lambda tokenizer=tokenizer, outs=outs: prepare(  # type: ignore[misc]
                    [folder / "text.txt"], tokenizer, folder / f"{tokenizer.vocab_size}-{next(outs)}", processes=2
                ),
                lambda tokenizer=tokenizer: plain_loop(folder / "text.txt", tokenizer, folder / "plain.npy"),
                rounds,
            )
            ours, peer = size / times.ours, size / times.peer
            name = f"text to tokens on two cores, {words}, against a plain loop"
            found.append(row(name, ours / 1e6, peer / 1e6, "MB/s", times.ratio))
            name = f"text to tokens on two cores, {words}, against 2 GB an hour"
            found.append(row(name, ours / 1e6, SPEED / 1e6, "MB/s", ours / SPEED, at_least=1.0))
        load("toy")[1].save(folder / "words")  # type: ignore[union-attr]
        peaks = {}
        for megabytes in (SMALL, LARGE):
            write_stories(folder / "large.txt", megabytes * 10**6)
            command = [sys.executable, "-c", CHILD, folder / "large.txt", folder / "words", folder / f"{megabytes}"]
            child = subprocess.run(command, capture_output=True, text=True)
            if child.returncode:
                raise ValueError(f"{megabytes} MB were not prepared: {child.stderr.strip().splitlines()[-1]}")
            peaks[megabytes] = json.loads(child.stdout)["peak"]
        name = f"text to tokens, peak of memory for {LARGE} MB against {SMALL} MB"
        found.append(row(name, peaks[LARGE] / 1e6, peaks[SMALL] / 1e6, "MB", peaks[LARGE] / peaks[SMALL], at_most=1.1))
    return found
