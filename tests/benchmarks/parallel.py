"""FSDP2 on two processes against DistributedDataParallel: tokens per second, and the peak of memory in each process.

A model of 25.8M parameters (8 layers, 512 wide, 8 heads, feed-forward 1,376, 1,000 tokens, tied), a text of 1,024
tokens in each process, fp32, AdamW (fused), activations checkpointed, one thread each, gloo. The peak is that of
resident memory during steps, less what the process had before there was this model: the code of both libraries is in
memory then, since a very small model has been trained. Linux only.

The two targets pull at the length of the text. What is sent does not depend on it, so speed gains by longer ones; and
FSDP2 halves weights, gradients and optimizer states, not activations, so memory gains by shorter ones. Hence the
checkpointing, on both sides: with all activations kept, memory was 0.73 at this length, and speed 0.83.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from typing import Any

from tests.benchmarks.harness import row

ROUNDS = 5
STEPS = 4  # of a turn, after one that is not counted
SPEED, MEMORY = 0.8, 0.65

# Large blocks go back to the system when they are freed, and come in huge pages. Otherwise glibc keeps weights that
# were only brought together for a moment, and its habits would be measured. Both sides run so.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=524288:glibc.malloc.hugetlb=1"}

CHILD = """
import json, sys, time, warnings
from pathlib import Path
import torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from minillama import Llama, ModelConfig
from minillama.loss import cross_entropy
from minillama.parallel import Layout, distribute

def status(field):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

folder, rank, kind, steps = sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
dist.init_process_group("gloo", store=dist.FileStore(folder + "/store", 2), rank=rank, world_size=2)
small, large = (
    ModelConfig(dim=64 * heads, n_layers=heads, n_heads=heads, n_kv_heads=heads, head_dim=64, ffn_dim=172 * heads,
                vocab_size=1000, max_seq_len=1024, tie_embeddings=True) for heads in (1, 8))
tokens = torch.randint(1000, (1, 1025), generator=torch.Generator().manual_seed(rank))

def make_step(config, tokens):
    torch.manual_seed(0)
    model = Llama(config)
    model.checkpointing = True
    if kind == "ddp":
        net = DistributedDataParallel(model, gradient_as_bucket_view=True)
        clip = torch.nn.utils.clip_grad_norm_
    else:
        net, clip = model, distribute(model, Layout(fsdp=2)).clip
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, fused=True)

    def step():
        loss = cross_entropy(net(tokens[:, :-1]), tokens[:, 1:])
        loss.backward()
        clip(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        total = loss.detach().clone()
        dist.all_reduce(total)
        return total.item() / 2

    return step

step = make_step(small, tokens[:, :65])
step(), step()
before = status("VmRSS")
step = make_step(large, tokens)
losses = [step()]
Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
start = time.perf_counter()
losses += [step() for _ in range(steps)]
seconds = (time.perf_counter() - start) / steps
print(json.dumps({"losses": losses, "seconds": seconds, "peak": status("VmHWM") - before}))
dist.destroy_process_group()
"""


def measure(kind: str) -> dict[str, Any]:
    """Losses, seconds of a step and bytes at the peak of the first of two processes."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-W", "ignore", "-c", CHILD, folder]
        both = [
            subprocess.Popen(
                [*command, str(rank), kind, str(STEPS)],
                env={**os.environ, **ENVIRONMENT},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in (0, 1)
        ]
        outputs = [process.communicate(timeout=600) for process in both]
    for process, (_, errors) in zip(both, outputs, strict=True):
        if process.returncode:
            raise ValueError(f"{kind} did not run: {errors.strip().splitlines()[-1]}")
    return json.loads(outputs[0][0])


def rows(rounds: int = ROUNDS) -> list[dict[str, Any]]:
    turns = []
    for number in range(rounds):
        kinds = ("fsdp", "ddp") if number % 2 else ("ddp", "fsdp")
        turns.append({kind: measure(kind) for kind in kinds})
    for turn in turns:  # both take the same steps
        for a, b in zip(turn["fsdp"]["losses"], turn["ddp"]["losses"], strict=True):
            assert abs(a - b) < 1e-3, f"the losses are {a} with FSDP2 and {b} with DDP"

    def median(kind: str, value: str) -> float:
        return statistics.median(turn[kind][value] for turn in turns)

    speed = statistics.median(turn["ddp"]["seconds"] / turn["fsdp"]["seconds"] for turn in turns)
    memory = statistics.median(turn["fsdp"]["peak"] / turn["ddp"]["peak"] for turn in turns)
    rates = [2 * 1024 / median(kind, "seconds") for kind in ("fsdp", "ddp")]
    peaks = [median(kind, "peak") / 1e6 for kind in ("fsdp", "ddp")]
    name = "25.8M parameters, activations checkpointed, two processes, FSDP2 against DDP"
    return [
        row(f"{name}: speed", rates[0], rates[1], "tokens/s", speed, at_least=SPEED),
        row(f"{name}: peak of a process", peaks[0], peaks[1], "MB", memory, at_most=MEMORY),
    ]
