"""Loading SmolLM2: the peak of memory in units of the weights' own size, and the time.

The peak is that of a fresh process's resident memory, less what it had after its imports. Linux only.
"""

import json
import statistics
import subprocess
import sys
from typing import Any

from tests.benchmarks.harness import row

ROUNDS = 3
LIMIT = 1.3  # times the weights, in the dtype asked for
QUANTIZED = 1.1  # times their own size, and one tensor as it is read: the table of embeddings in fp32

CHILD = """
import json, sys, time
import torch
from minillama.checkpoint import load

def status(field):  # bytes; getrusage would also count what the parent process had
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

torch.set_num_threads(1)
before, start = status("VmRSS"), time.perf_counter()
model, _ = load(sys.argv[1], dtype=sys.argv[2])
seconds = time.perf_counter() - start
weights = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
largest = 4 * model.config.vocab_size * model.config.dim
print(json.dumps({"weights": weights, "largest": largest, "peak": status("VmHWM") - before, "seconds": seconds}))
"""


def measure(name_or_path: str, dtype: str) -> dict[str, float]:
    """Bytes of the weights, bytes of the peak, and seconds, of one load in its own process."""
    child = subprocess.run([sys.executable, "-c", CHILD, name_or_path, dtype], capture_output=True, text=True)
    if child.returncode:
        raise ValueError(f"{name_or_path} was not loaded: {child.stderr.strip().splitlines()[-1]}")
    return json.loads(child.stdout)


def rows(rounds: int = ROUNDS) -> list[dict[str, Any]]:
    found = []
    for dtype, words in (("float32", "fp32"), ("bfloat16", "bf16")):
        loads = [measure("smollm2", dtype) for _ in range(rounds)]
        peak, weights = statistics.median(load["peak"] for load in loads), loads[0]["weights"]
        seconds = statistics.median(load["seconds"] for load in loads)
        name = f"loading SmolLM2, {words}, peak against the weights ({seconds:.1f} s)"
        found.append(row(name, peak / 1e6, weights / 1e6, "MB", peak / weights, at_most=LIMIT))
    for dtype in ("int8", "int4"):
        loads = [measure("smollm2", dtype) for _ in range(rounds)]
        peak = statistics.median(load["peak"] for load in loads)
        allowed = QUANTIZED * loads[0]["weights"] + loads[0]["largest"]
        size = f"{QUANTIZED} × its {loads[0]['weights'] / 1e6:.0f} MB and a table"
        name = f"loading SmolLM2, {dtype}, peak against {size}"
        found.append(row(name, peak / 1e6, allowed / 1e6, "MB", peak / allowed, at_most=1.0))
    return found
