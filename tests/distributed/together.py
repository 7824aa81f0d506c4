"""Several processes for a test, which meet through a file: no port is taken. Also a run that torchrun can start."""

import multiprocessing
import os
import random
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from minillama.config import ModelConfig
from minillama.data import Batch, Validation, stack
from minillama.loss import IGNORE
from minillama.model import Llama
from minillama.trainer import ALONE, Trainer, TrainSettings

forkserver = multiprocessing.get_context("forkserver")
forkserver.set_forkserver_preload(["minillama.parallel", "minillama.trainer"])

CONFIG = ModelConfig(
    dim=24, n_layers=2, n_heads=12, n_kv_heads=4, head_dim=6, ffn_dim=20,
    vocab_size=31, max_seq_len=64, tie_embeddings=False,
)  # fmt: skip
SETTINGS = TrainSettings(
    steps=20, warmup=3, learning_rate=0.01, optimizer="adamw", save_every=4, validate_every=5, accumulate=2
)


def together(processes: int, work: Callable[..., None], *arguments: Any) -> None:
    """Call `work` in so many processes of one group. Raises AssertionError with what went wrong in any of them."""
    with tempfile.TemporaryDirectory() as folder:
        errors = forkserver.Queue()
        children = [
            forkserver.Process(target=_member, args=(rank, processes, folder, errors, work, arguments))
            for rank in range(processes)
        ]
        for child in children:
            child.start()
        for child in children:
            child.join(120)
        stuck = [child for child in children if child.is_alive()]
        for child in stuck:
            child.kill()
        found = [] if errors.empty() else [errors.get()]
        assert not found and not stuck, found[0] if found else "a process never ended"


def _member(rank: int, processes: int, folder: str, errors: Any, work: Callable[..., None], arguments: Any) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", processes)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=processes, timeout=timedelta(seconds=60))
    try:
        work(*arguments)
        dist.destroy_process_group()
    except BaseException:
        errors.put(f"process {rank}: {traceback.format_exc()}")
        errors.close()
        errors.join_thread()
        os._exit(1)


def make_model(config: ModelConfig = CONFIG) -> Llama:
    """The same in every process; nothing in it is zero, as it would be in a new model."""
    torch.manual_seed(1)
    model = Llama(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def batches(step: int) -> Batch:
    """Seven rows, which no number of processes divides; in the second half of them hardly anything is scored."""
    rng = random.Random(step)
    starts = [rng.randrange(20) for _ in range(7)]
    batch = stack([[(start + i) % 31 for i in range(6 + start % 4)] for start in starts], pad_id=0)
    batch.targets[4:, 1:] = IGNORE
    return batch


def make_trainer(folder: Path, layout: str | None, settings: TrainSettings = SETTINGS, **options: Any) -> Trainer:
    """A run in this process alone, or with the others of its group."""
    model, team = make_model(), ALONE
    if layout:
        from minillama.parallel import Layout, distribute

        half = settings.precision == "bfloat16"
        team = distribute(model, Layout.parse(layout), half)  # type: ignore[assignment]
    return Trainer(model, None, batches, settings, folder, Validation([batches(10_000)]), team=team, **options)


def main(folder: str, layout: str, killed_at: str) -> None:
    """For torchrun: a run whose last process is killed at a step, in the first attempt."""
    from minillama import parallel

    parallel.start("cpu")

    def kill(record: dict[str, Any]) -> None:
        first_attempt = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
        if record["step"] == int(killed_at) and first_attempt and dist.get_rank() == dist.get_world_size() - 1:
            os.kill(os.getpid(), signal.SIGKILL)

    make_trainer(Path(folder), layout, on_step=kill).run()
    parallel.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
