"""Several processes: the same losses, gradients and steps as in one, whatever is shared out, and nothing lost."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

import minillama.trainer
from minillama import load
from minillama.config import ModelConfig
from minillama.model import Llama
from minillama.parallel import Layout, SharedMuon, distribute
from minillama.trainer import Trainer, batch_loss, checkpoints
from tests.distributed.together import CONFIG, SETTINGS, batches, make_model, make_trainer, together

LAYOUTS = ["dp=2", "fsdp=2", "tp=2", "fsdp=2,tp=2", "dp=2,tp=2", "dp=2,fsdp=2", "tp=4"]


def processes(layout: str) -> int:
    return Layout.parse(layout).processes


# What is computed.


def compare_with_serial(layout: str, config: ModelConfig) -> None:
    batch = batches(3)
    model = make_model(config)
    expected = batch_loss(model, batch)
    expected.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)

    shared = make_model(config)
    team = distribute(shared, Layout.parse(layout))
    part, counted = team.share(batch)
    loss = batch_loss(shared, part) * (counted / batch.scored)
    (loss * team.parts).backward()
    assert team.total(loss.item()) == pytest.approx(expected.item(), rel=1e-6)
    assert team.clip(shared.parameters(), 0.5).item() == pytest.approx(norm.item(), rel=1e-6)
    theirs = dict(model.named_parameters())
    assert [name for name, _ in shared.named_parameters()] == list(theirs)
    for name, parameter in shared.named_parameters():
        assert isinstance(parameter, DTensor) and isinstance(parameter.grad, DTensor)
        assert torch.equal(parameter.full_tensor(), theirs[name]), name
        gradient, other = parameter.grad.full_tensor(), theirs[name].grad
        assert other is not None and (gradient - other).norm() <= 1e-6 * other.norm(), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_norm_and_gradients_equal_those_of_one_process(layout):
    together(processes(layout), compare_with_serial, layout, CONFIG)


def test_a_tied_table_is_shared_out_once():
    together(4, compare_with_serial, "fsdp=2,tp=2", replace(CONFIG, tie_embeddings=True))


def compare_in_parts(layout: str, config: ModelConfig) -> None:
    minillama.trainer.MANY = 0
    compare_with_serial(layout, config)


@pytest.mark.parametrize("tied", [False, True])
def test_scores_are_made_a_few_rows_at_a_time_there_too(tied):
    together(4, compare_in_parts, "fsdp=2,tp=2", replace(CONFIG, tie_embeddings=tied))


def begin_with_nothing(layout: str) -> None:
    torch.manual_seed(5)
    expected = Llama(CONFIG).state_dict()
    drawn = torch.rand(1)
    torch.manual_seed(5)
    with torch.device("meta"):
        model = Llama(CONFIG)
    distribute(model, Layout.parse(layout), device=torch.device("cpu"))
    assert torch.equal(torch.rand(1), drawn)
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor) and torch.equal(parameter.full_tensor(), expected[name]), name
    assert model.frequency.allclose(Llama(CONFIG).frequency)


@pytest.mark.parametrize("layout", ["dp=2", "fsdp=2", "fsdp=2,tp=2"])
def test_a_model_that_no_process_holds_begins_as_one_that_one_does(layout):
    together(processes(layout), begin_with_nothing, layout)


def count_what_is_held(layout: str, divisor: int) -> None:
    model = make_model()
    whole = {name: parameter.numel() for name, parameter in model.named_parameters()}
    team = distribute(model, Layout.parse(layout))
    matrices = [(name, p) for name, p in model.named_parameters() if "blocks." in name and p.dim() == 2]
    assert len(matrices) == 14
    for name, parameter in matrices:
        assert team.local(parameter).numel() * divisor == whole[name]


@pytest.mark.parametrize("layout, divisor", [("dp=2", 1), ("fsdp=2", 2), ("tp=2", 2), ("fsdp=2,tp=2", 4)])
def test_a_process_holds_its_share_of_every_matrix(layout, divisor):
    together(processes(layout), count_what_is_held, layout, divisor)


def count_messages() -> None:
    model = make_model()
    distribute(model, Layout(tp=2))
    with CommDebugMode() as messages:
        batch_loss(model, batches(0)).backward()
    counts = {str(name): count for name, count in messages.get_comm_counts().items()}
    assert counts == {"c10d_functional.all_reduce": 4 * CONFIG.n_layers}


def test_a_cut_block_talks_twice_forward_and_twice_backward():
    together(2, count_messages)


def compare_muon(layout: str) -> None:
    one, other = make_model(), make_model()
    distribute(other, Layout.parse(layout))
    matrices = [[p for name, p in m.named_parameters() if "blocks." in name and p.dim() == 2] for m in (one, other)]
    settings = {"lr": 0.02, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}
    optimizers = [torch.optim.Muon(matrices[0], **settings), SharedMuon(matrices[1], **settings)]
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        for p, q in zip(*matrices, strict=True):
            p.grad = torch.randn(p.shape, generator=generator)
            everywhere = DTensor.from_local(
                p.grad, q.device_mesh, [torch.distributed.tensor.Replicate()] * q.device_mesh.ndim
            )
            q.grad = everywhere.redistribute(placements=q.placements)
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(*matrices, strict=True):
        assert torch.allclose(p, q.full_tensor(), rtol=0, atol=1e-7)


def test_muon_takes_the_step_that_it_would_take_on_whole_matrices():
    together(4, compare_muon, "fsdp=2,tp=2")


# A whole run.


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Trainer:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    trainer = make_trainer(tmp_path_factory.mktemp("whole"), None)
    trainer.run()
    torch.set_num_threads(threads)
    return trainer


def assert_same_losses(records: list[dict], trainer: Trainer) -> None:
    assert [record["step"] for record in records] == [record["step"] for record in trainer.records]
    for record, other in zip(records, trainer.records, strict=True):
        for name in [name for name in record if name != "seconds"]:
            assert record[name] == pytest.approx(other[name], rel=1e-5), (name, record["step"])


def train(folder: Path, layout: str | None, until: int) -> None:
    """Go on until a step; there, one of the processes is asked to stop."""

    def stop(record: dict) -> None:
        if record["step"] == until and (layout is None or dist.get_rank() == dist.get_world_size() - 1):
            signal.raise_signal(signal.SIGINT)

    trainer = make_trainer(folder, layout, on_step=stop)
    try:
        trainer.run()
    except KeyboardInterrupt:
        assert trainer.step == until < SETTINGS.steps


def test_a_run_goes_on_with_other_numbers_of_processes(uninterrupted, tmp_path):
    for layout, until in ((None, 4), ("fsdp=2", 9), ("fsdp=2,tp=2", 13), ("dp=2", 16)):
        if layout is None:
            train(tmp_path, None, until)
        else:
            together(processes(layout), train, tmp_path, layout, until)
        model, _ = load(checkpoints(tmp_path)[-1])
        assert model.config == CONFIG and checkpoints(tmp_path)[-1].name == f"step-{until}"
    files = sorted(path.name for path in checkpoints(tmp_path)[-1].iterdir())
    assert files == ["config.json", "model.safetensors", "optimizer.safetensors", "trainer.pt"]
    last = make_trainer(tmp_path, None)
    last.run()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert_same_losses([json.loads(line) for line in lines], uninterrupted)
    for p, q in zip(last.model.parameters(), uninterrupted.model.parameters(), strict=True):
        assert (p - q).norm() <= 1e-4 * q.norm()


def train_alone_and_shared(folder: Path, layout: str, **changes) -> tuple[Trainer, Trainer]:
    """The same run twice: by each process for itself, and by all together."""
    settings = replace(SETTINGS, **changes)
    alone = make_trainer(folder / f"alone-{dist.get_rank()}", None, settings)
    shared = make_trainer(folder / "shared", layout, settings)
    for trainer in (alone, shared):
        trainer.run()
    return alone, shared


def train_with_muon(folder: Path) -> None:
    alone, shared = train_alone_and_shared(folder, "fsdp=2", optimizer="muon", steps=3)
    assert [r["loss"] for r in shared.records] == pytest.approx([r["loss"] for r in alone.records], rel=1e-4)
    assert len(shared.optimizers) == 2


def test_muon_trains_a_model_that_is_shared_out(tmp_path):
    together(2, train_with_muon, tmp_path)


def train_in_half(folder: Path) -> None:
    alone, shared = train_alone_and_shared(folder, "fsdp=2,tp=2", precision="bfloat16", steps=5)
    for name in ("loss", "validation"):
        one, other = ([r[name] for r in trainer.records if name in r] for trainer in (alone, shared))
        assert one and other == pytest.approx(one, rel=2e-2)
    assert all(p.dtype == torch.float32 for p in shared.model.parameters())


def test_products_in_bf16_with_weights_sent_in_bf16(tmp_path):
    together(4, train_in_half, tmp_path)


def resume_after_damage(folder: Path) -> None:
    trainer = make_trainer(folder, "fsdp=2")
    trainer._resume()
    assert trainer.step == 16


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "trainer.pt"])
def test_all_processes_fall_back_together_when_the_newest_checkpoint_is_damaged(uninterrupted, tmp_path, file):
    shutil.copytree(uninterrupted.folder, tmp_path / "run")
    path = tmp_path / "run" / "step-20" / file
    path.write_bytes(path.read_bytes()[:-100])
    together(2, resume_after_damage, tmp_path / "run")


# torchrun.


def torchrun(folder: Path, killed_at: int, restarts: int) -> subprocess.CompletedProcess:
    run = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", f"--max-restarts={restarts}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, *run, "-m", "tests.distributed.together", str(folder), "fsdp=2", str(killed_at)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)


def test_a_killed_process_ends_the_job(tmp_path):
    started = time.time()
    done = torchrun(tmp_path, 6, 0)
    seconds = time.time() - max(path.stat().st_mtime for path in tmp_path.rglob("metrics.jsonl"))
    assert done.returncode == 1 and "Signal 9 (SIGKILL)" in done.stderr, done.stderr
    assert seconds < 20 and seconds < time.time() - started
    assert [path.name for path in checkpoints(tmp_path)] == ["step-4"]


def test_torchrun_restarts_from_the_last_checkpoint(uninterrupted, tmp_path):
    done = torchrun(tmp_path, 6, 1)
    assert done.returncode == 0, done.stderr
    assert re.search(r"\b4/20\b", done.stderr)  # the bar of the second attempt
    assert_same_losses([json.loads(line) for line in (tmp_path / "metrics.jsonl").open()], uninterrupted)


def test_the_command_trains_like_one_process(tmp_path):
    command = ["-m", "minillama", "train", "--steps", "3", "--batch-size", "5", "--precision", "float32"]
    command += ["--optimizer", "adamw"]  # rounding grows in Muon, which multiplies in bf16
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    run = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *command, "--parallel", "fsdp=2"]
    losses = []
    for name, arguments in (("alone", command), ("shared", run)):
        done = subprocess.run(
            [sys.executable, *arguments, "--out", name],
            cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("Validation loss: ") == 1  # one speaks for all
        assert done.stdout.endswith(f"To read more: minillama generate --checkpoint {name}/step-3\n")
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines])
    assert len(losses[0]) == 3 and losses[1] == pytest.approx(losses[0], rel=1e-5)


# What cannot be.


@pytest.mark.parametrize("text", ["", "fsdp", "fsdp=0", "fsdp=two", "pp=2", "tp=2,tp=2", "fsdp=2;tp=2", "tp=-1"])
def test_what_is_no_layout_is_refused(text):
    with pytest.raises(ValueError, match=re.escape(repr(text))):
        Layout.parse(text)


def test_a_layout_that_does_not_suit_the_model_is_refused():
    with pytest.raises(ValueError, match="tp is 8 and n_kv_heads 4"):
        Layout(tp=8).check(CONFIG)
    with pytest.raises(ValueError, match="tp is 4 and ffn_dim 22"):
        Layout(tp=4).check(replace(CONFIG, ffn_dim=22))


def refuse_layout() -> None:
    with pytest.raises(ValueError, match="dp=1,fsdp=2,tp=2 needs 4 processes, and there are 2"):
        distribute(make_model(), Layout(fsdp=2, tp=2))


def test_a_layout_for_another_number_of_processes_is_refused():
    together(2, refuse_layout)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("half", [False, True])
def test_one_process_on_a_gpu(tmp_path, half):
    dist.init_process_group("nccl", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        settings = replace(SETTINGS, precision="bfloat16" if half else "float32", steps=4)
        alone = Trainer(make_model().cuda(), None, batches, settings, tmp_path / "alone")
        alone.run()
        model = make_model().cuda()
        team = distribute(model, Layout(), half)
        shared = Trainer(model, None, batches, settings, tmp_path / "shared", team=team)
        shared.run()
        losses = [[record["loss"] for record in trainer.records] for trainer in (alone, shared)]
        assert losses[1] == pytest.approx(losses[0], rel=2e-2 if half else 1e-5)
        assert load(tmp_path / "shared" / "step-4")[0].config == CONFIG
    finally:
        dist.destroy_process_group()
