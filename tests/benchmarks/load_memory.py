"""Loading SmolLM2: the peak of memory in units of the weights' own size, and the time.

The peak is that of a fresh process's resident memory, less what it had after its imports. Linux only.
"""

import json
import subprocess
import sys

LIMIT = 1.3  # times the weights, in the dtype asked for

CHILD = """
import json, sys, time
import torch
from minillama.checkpoint import load

def status(field):  # bytes; getrusage would also count what the parent process had
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

torch.set_num_threads(1)
before, start = status("VmRSS"), time.perf_counter()
model, _ = load(sys.argv[1], dtype=getattr(torch, sys.argv[2]))
seconds = time.perf_counter() - start
weights = sum(parameter.nbytes for parameter in model.parameters())
print(json.dumps({"weights": weights, "peak": status("VmHWM") - before, "seconds": seconds}))
"""


def measure(name_or_path: str, dtype: str) -> dict[str, float]:
    """Bytes of the weights, bytes of the peak, and seconds, of one load in its own process."""
    child = subprocess.run(
        [sys.executable, "-c", CHILD, name_or_path, dtype], capture_output=True, text=True, check=True
    )
    return json.loads(child.stdout)


def main() -> None:
    print("load SmolLM2     weights     peak   ratio (limit 1.3)    time")
    for dtype in ("float32", "bfloat16"):
        row = measure("smollm2", dtype)
        ratio = row["peak"] / row["weights"]
        print(
            f"{dtype:14} {row['weights'] / 1e6:7.0f} MB {row['peak'] / 1e6:5.0f} MB  {ratio:6.2f}"
            f"            {row['seconds']:6.2f} s"
        )


if __name__ == "__main__":
    main()
