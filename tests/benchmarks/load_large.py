"""Loading 1.1 billion weights from three safetensors shards in bf16, as they are stored, against transformers.

Random weights, written for the occasion; each load in a process of its own, in turns. The time runs to the first
logits, since a mapped file is only read when it is used; the peak of memory is counted over the imports.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from minillama.checkpoint.export import config_for
from minillama.checkpoint.names import HUGGING_FACE, expand
from minillama.config import ModelConfig
from minillama.model import Llama
from tests.benchmarks.harness import row

ROUNDS, SHARDS, SLOWER, PEAK = 7, 3, 1.0, 1.05
CONFIG = ModelConfig.preset("tinyllama-1.1b")

CHILD = """
import json, sys, time
import torch

def status(field):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

torch.set_num_threads(2)
if sys.argv[1] == "ours":
    from minillama import load as read
else:
    from transformers import LlamaForCausalLM
    import transformers.models.llama.modeling_llama
before, start = status("VmRSS"), time.perf_counter()
if sys.argv[1] == "ours":
    model = read(sys.argv[2], dtype="bfloat16")[0]
else:
    model = LlamaForCausalLM.from_pretrained(sys.argv[2], dtype=torch.bfloat16)
with torch.inference_mode():
    logits = model(torch.tensor([[1, 5, 9]]))
logits = logits if sys.argv[1] == "ours" else logits.logits
print(json.dumps({"seconds": time.perf_counter() - start, "peak": status("VmHWM") - before,
                  "logits": logits[0, -1, :5].tolist()}))
"""


def write(folder: Path) -> int:
    """The checkpoint in Hugging Face's layout; bytes of its weights."""
    (folder / "config.json").write_text(json.dumps(config_for(CONFIG, "bfloat16")), encoding="utf-8")
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in Llama(CONFIG).named_parameters()}
    theirs = {ours: name for name, ours in expand(HUGGING_FACE, CONFIG.n_layers).items()}
    names, places, torch_seed = list(shapes), {}, torch.Generator().manual_seed(0)
    for shard in range(SHARDS):
        part = names[shard * len(names) // SHARDS : (shard + 1) * len(names) // SHARDS]
        weights = {
            theirs[name]: torch.empty(shapes[name], dtype=torch.bfloat16).normal_(std=0.02, generator=torch_seed)
            for name in part
        }
        file = f"model-{shard + 1:05}-of-{SHARDS:05}.safetensors"
        save_file(weights, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(weights, file)
    index = json.dumps({"metadata": {}, "weight_map": places})
    (folder / "model.safetensors.index.json").write_text(index, encoding="utf-8")
    return 2 * CONFIG.n_params()


def measure(who: str, folder: Path) -> dict[str, Any]:
    child = subprocess.run([sys.executable, "-c", CHILD, who, str(folder)], capture_output=True, text=True)
    if child.returncode:
        raise ValueError(f"{who} did not load the checkpoint: {child.stderr.strip().splitlines()[-1]}")
    return json.loads(child.stdout.splitlines()[-1])


def rows(rounds: int = ROUNDS) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = write(folder)
        pairs = [(measure("ours", folder), measure("theirs", folder)) for _ in range(rounds + 1)][1:]
    for ours, theirs in pairs:
        difference = max(abs(a - b) for a, b in zip(ours["logits"], theirs["logits"], strict=True))
        assert difference < 0.1, f"the logits differ by {difference:.3f}"
    seconds = [statistics.median(load["seconds"] for load in loads) for loads in zip(*pairs, strict=True)]
    ratio = statistics.median(ours["seconds"] / theirs["seconds"] for ours, theirs in pairs)
    peak = statistics.median(ours["peak"] for ours, _ in pairs)
    what = "1.1 billion weights in three shards, bf16"
    return [
        row(f"first logits of {what}, against transformers", *seconds, "s", ratio, at_most=SLOWER),
        row(f"peak of {what}, against the weights", peak / 1e6, size / 1e6, "MB", peak / size, at_most=PEAK),
    ]
