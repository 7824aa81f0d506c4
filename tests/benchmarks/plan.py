"""The plan against what is: the memory of real steps of our trainer, counted tensor by tensor and as the system sees
it, and the GPU-hours that LLaMA's authors published. `python -m tests.benchmarks.plan` prints every comparison.
"""

import gc
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from minillama.config import PRESETS, ModelConfig
from minillama.data import Batch
from minillama.model import Llama
from minillama.plan import DEVICES, Run, memory_of, plan
from minillama.trainer import Trainer, TrainSettings
from tests.benchmarks.harness import row

ROUNDS = 1  # nothing here is a matter of chance, but for what the system sees
ALLOWED = 1.1  # times what is measured, or one part in that


def shape(dim: int, layers: int, heads: int, kv: int, head_dim: int, ffn: int, vocab: int, tied: bool) -> ModelConfig:
    return ModelConfig(
        dim=dim, n_layers=layers, n_heads=heads, n_kv_heads=kv, head_dim=head_dim, ffn_dim=ffn, vocab_size=vocab,
        max_seq_len=1024, tie_embeddings=tied,
    )  # fmt: skip


NARROW = shape(96, 4, 6, 2, 20, 160, 300, False)
DEEP = shape(64, 9, 4, 4, 16, 200, 101, True)
WIDE = shape(320, 3, 5, 1, 72, 800, 500, False)
WORDY = shape(64, 2, 4, 2, 16, 176, 6000, True)  # a large vocabulary
TABLE = shape(96, 1, 6, 2, 16, 256, 30000, False)  # little else than a vocabulary
RUNS = {
    f"{name}, {run.micro_batch} × {run.context}, {run.precision}, {run.optimizer}": run
    for name, run in (
        ("narrow", Run(config=NARROW, micro_batch=2, context=320, precision="float32")),
        ("narrow", Run(config=NARROW, micro_batch=3, context=150, precision="bfloat16", optimizer="muon")),
        ("deep", Run(config=DEEP, micro_batch=5, context=96, precision="float32", optimizer="muon")),
        ("deep", Run(config=DEEP, micro_batch=1, context=700, precision="bfloat16")),
        ("wide", Run(config=WIDE, micro_batch=1, context=64, precision="float32", optimizer="muon")),
        ("wide", Run(config=WIDE, micro_batch=2, context=288, precision="bfloat16")),
        ("wide", Run(config=WIDE, micro_batch=2, context=48, batch=192, precision="float32")),  # two passes
        ("wordy", Run(config=WORDY, micro_batch=4, context=56, precision="float32")),
        ("wordy", Run(config=WORDY, micro_batch=2, context=96, precision="bfloat16", optimizer="muon")),
        ("wordy", Run(config=WORDY, micro_batch=12, context=250, precision="float32", optimizer="muon")),  # in chunks
        ("wordy", Run(config=WORDY, micro_batch=30, context=100, precision="bfloat16")),
        ("table", Run(config=TABLE, micro_batch=3, context=200, precision="float32")),
        ("table", Run(config=TABLE, micro_batch=3, context=200, precision="bfloat16")),
    )
}
LARGE = Run(config=shape(512, 8, 8, 4, 64, 1408, 8192, False), micro_batch=4, context=512, precision="float32")


class Published(NamedTuple):
    config: ModelConfig
    context: int
    tokens: float
    hours: float


LLAMA2_34B = ModelConfig(  # the shape of Code Llama 34B, which began from it
    dim=8192, n_layers=48, n_heads=64, n_kv_heads=8, ffn_dim=22016, vocab_size=32000, max_seq_len=4096
)
# A device, the share of its peak that is assumed for all of a family, and its runs. Touvron et al. 2023a, table 15
# (tokens: table 2); Touvron et al. 2023b, table 2; the model cards of Llama 3 and 3.1 (405B: Dubey et al. 2024).
FAMILIES = {
    "LLaMA": ("a100", 0.50, {
        "7B": Published(PRESETS["llama-7b"], 2048, 1.0e12, 82_432),
        "13B": Published(PRESETS["llama-13b"], 2048, 1.0e12, 135_168),
        "33B": Published(PRESETS["llama-30b"], 2048, 1.4e12, 530_432),
        "65B": Published(PRESETS["llama-65b"], 2048, 1.4e12, 1_022_362),
    }),
    "Llama 2": ("a100", 0.42, {
        "7B": Published(PRESETS["llama2-7b"], 4096, 2e12, 184_320),
        "13B": Published(PRESETS["llama2-13b"], 4096, 2e12, 368_640),
        "34B": Published(LLAMA2_34B, 4096, 2e12, 1_038_336),
        "70B": Published(PRESETS["llama2-70b"], 4096, 2e12, 1_720_320),
    }),
    "Llama 3": ("h100", 0.25, {
        "8B": Published(PRESETS["llama3-8b"], 8192, 15e12, 1.3e6),
        "70B": Published(PRESETS["llama3-70b"], 8192, 15e12, 6.4e6),
    }),
    "Llama 3.1": ("h100", 0.27, {
        "8B": Published(PRESETS["llama3.1-8b"], 8192, 15e12, 1.46e6),
        "70B": Published(PRESETS["llama3.1-70b"], 8192, 15e12, 7.0e6),
        "405B": Published(PRESETS["llama3.1-405b"], 8192, 15.6e12, 30.84e6),
    }),
}  # fmt: skip


def trainer_of(run: Run) -> Trainer:
    """A trainer on random tokens that does what the run says."""
    torch.manual_seed(0)
    tokens = torch.randint(run.config.vocab_size, (run.micro_batch, run.context + 1))
    batch = Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
    settings = TrainSettings(
        steps=10**6, warmup=0, optimizer=run.optimizer, precision=run.precision, accumulate=run.passes
    )
    return Trainer(Llama(run.config).train(), None, lambda step: batch, settings, Path("unused"))


def measure(run: Run) -> dict[str, int]:
    """Bytes that a step really holds: the parts that can be told apart, and the peak of all."""
    trainer = trainer_of(run)
    trainer._one_step()  # makes the optimizers' states
    model, batch = trainer.model, trainer.batches(0)
    states = [v for o in trainer.optimizers for state in o.state.values() for v in state.values()]
    found = {"weights": sum(p.nbytes for p in model.parameters()), "optimizer": sum(v.nbytes for v in states)}
    at_rest = sum(found.values())
    trainer._backward(batch, 1.0)
    found["gradients"] = sum(p.grad.nbytes for p in model.parameters())
    for p in model.parameters():
        p.grad = None
    found |= saved(trainer, batch)
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        trainer._one_step()
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return {**found, "peak": at_rest + peak}


def saved(trainer: Trainer, batch: Batch) -> dict[str, int]:
    """What autograd keeps of a forward pass, without the loss: activations, and copies of weights."""
    model, kept = trainer.model, {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    tokens = batch.inputs.numel()

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            # A copy of a weight has no axis of tokens. Holding the tensor keeps its address from being used again.
            per_token = batch.inputs.shape[1] in tensor.shape or tokens in tensor.shape
            kept[storage.data_ptr()] = (storage.nbytes(), per_token, tensor)
        return tensor

    with torch.autocast("cpu", torch.bfloat16, enabled=trainer.settings.precision == "bfloat16"):
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(batch.inputs)
    return {name: sum(size for size, per_token, _ in kept.values() if per_token is want)
            for name, want in (("activations", True), ("copies", False))}  # fmt: skip


def resident() -> int:
    """Bytes at the peak of two LARGE steps in a process of their own, as the system sees them. Linux only."""
    child = subprocess.run([sys.executable, "-m", "tests.benchmarks.plan", "resident"], capture_output=True, text=True)
    if child.returncode:
        raise ValueError(f"the large run was not measured: {child.stderr.strip().splitlines()[-1]}")
    return int(child.stdout)


def status(field: str) -> int:
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def rows(rounds: int = ROUNDS) -> list[dict[str, Any]]:
    """The worst of the counted steps, a large one as the system sees it, and the worst run of each family."""
    peaks = [(f"{len(RUNS)} steps, worst", memory_of(run).peak, measure(run)["peak"]) for run in RUNS.values()]
    peaks = [max(peaks, key=lambda peak: abs(peak[1] / peak[2] - 1))]
    large = sorted(resident() for _ in range(rounds))[rounds // 2]
    peaks.append((f"{LARGE.config.n_params() / 1e6:.0f}M parameters, resident", memory_of(LARGE).peak, large))
    found = []
    for name, planned, real in peaks:
        ratio = max(planned / real, real / planned)
        found.append(row(f"planned peak of memory, {name}", planned / 1e6, real / 1e6, "MB", ratio, at_most=ALLOWED))
    for family, (_, share, runs) in FAMILIES.items():
        of_family = [one for one in hours() if one[0].rsplit(" ", 1)[0] == family]
        name, planned, published, error, _ = max(of_family, key=lambda one: abs(one[3]))
        what = f"planned GPU-hours at {share:.0%}, {name}, the worst of {len(runs)}"
        found.append(row(what, planned / 1e3, published / 1e3, "kh", 1 + error))
    return found


def hours() -> list[tuple[str, float, float, float, float]]:
    """For each published run: its name, the planned hours, the published ones, the error, the utilisation implied."""
    found = []
    for family, (device, share, runs) in FAMILIES.items():
        for size, (config, context, tokens, published) in runs.items():
            run = Run(config=config, context=context, tokens=round(tokens), device=DEVICES[device], utilisation=share)
            planned = plan(run).device_hours
            found.append((f"{family} {size}", planned, published, planned / published - 1, share * planned / published))
    return found


if __name__ == "__main__":
    if sys.argv[1:] == ["resident"]:
        torch.set_num_threads(1)
        trainer_of(RUNS[next(iter(RUNS))])._one_step()
        before = status("VmRSS")
        trainer = trainer_of(LARGE)
        for _ in range(2):
            trainer._one_step()
        print(status("VmHWM") - before)
    else:
        for name, run in RUNS.items():
            planned, real = memory_of(run), measure(run)
            print(name)
            for part, size in real.items():
                expected = getattr(planned, part)
                print(f"  {part:12}{expected:14,} planned {size:14,} counted {(expected - size) / max(size, 1):+8.2%}")
        for name, planned_hours, published, error, share in hours():
            print(
                f"{name:15}{planned_hours:14,.0f} planned {published:14,.0f} published {error:+8.1%}"
                f", {share:.1%} of the peak"
            )
