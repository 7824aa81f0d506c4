"""Training: the schedule, the optimizers, accumulation, and that nothing is lost when a run is stopped or killed."""

import contextlib
import dataclasses
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from minillama.cli import main
from minillama.config import ModelConfig
from minillama.data import Batch, Validation, stack
from minillama.loss import IGNORE, cross_entropy
from minillama.model import Llama
from minillama.trainer import Trainer, TrainSettings, batch_loss, checkpoints, make_optimizers, mean_loss, rate_at

CONFIG = ModelConfig(
    dim=24, n_layers=2, n_heads=6, n_kv_heads=2, head_dim=6, ffn_dim=20,
    vocab_size=31, max_seq_len=64, tie_embeddings=True,
)  # fmt: skip
SETTINGS = TrainSettings(steps=24, warmup=3, learning_rate=0.01, save_every=3, validate_every=5)
forkserver = multiprocessing.get_context("forkserver")
forkserver.set_forkserver_preload(["minillama.trainer"])


def batches(step: int) -> Batch:
    """Rows of different lengths, which count upwards: easy to learn, and different at every step."""
    rng = random.Random(step)
    starts = [rng.randrange(20) for _ in range(5)]
    return stack([[(start + i) % 31 for i in range(6 + start % 4)] for start in starts], pad_id=0)


def make_trainer(folder: Path, settings: TrainSettings = SETTINGS, data=batches, **options) -> Trainer:
    torch.manual_seed(1)
    return Trainer(Llama(CONFIG), None, data, settings, folder, Validation([batches(10_000)], floor=0.5), **options)


def train_in_child(folder: Path, delay: float, killed_at: int | None = None) -> None:
    """Train; with `killed_at`, be killed at that call of all that its checkpoints make."""
    torch.set_num_threads(1)
    data = batches if delay == 0 else lambda step: (time.sleep(delay), batches(step))[1]
    trainer = make_trainer(folder, data=data)
    if killed_at is not None:
        calls = itertools.count(1)
        trainer._save = watched(trainer._save, lambda: next(calls) == killed_at and signal.raise_signal(signal.SIGKILL))
    try:
        trainer.run()
    except KeyboardInterrupt:
        os._exit(130)


def watched(function, at_each_call):
    """The function, which says when it and what it calls, in Python or C, call and return."""

    def watched_function():
        sys.setprofile(lambda *_: at_each_call())
        try:
            function()
        finally:
            sys.setprofile(None)

    return watched_function


def count_calls_of_saving(folder: Path, counted) -> None:
    """Send how many calls and returns there are while a checkpoint is written, in a process that never wrote one."""
    torch.set_num_threads(1)
    trainer, calls = make_trainer(folder, dataclasses.replace(SETTINGS, steps=3)), itertools.count()
    trainer._save = watched(trainer._save, lambda: next(calls))
    trainer.run()
    counted.send(next(calls))


def run_with_one_thread(trainer: Trainer) -> None:
    """As in the child, so that the bits are the same."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        trainer.run()
    finally:
        torch.set_num_threads(threads)


def what_remains(trainer: Trainer) -> tuple[dict, list]:
    records = [{k: v for k, v in record.items() if k != "seconds"} for record in trainer.records]
    return trainer.model.state_dict(), records


def assert_same_run(one: Trainer, other: Trainer) -> None:
    (weights, records), (other_weights, other_records) = what_remains(one), what_remains(other)
    assert records == other_records
    assert all(torch.equal(weights[name], other_weights[name]) for name in weights)
    written = [json.loads(line) for line in (other.folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in written] == [row["loss"] for row in records]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Trainer:
    trainer = make_trainer(tmp_path_factory.mktemp("whole"))
    run_with_one_thread(trainer)
    return trainer


def test_the_loss_falls_and_the_records_say_so(uninterrupted):
    losses = [record["loss"] for record in uninterrupted.records]
    assert len(losses) == 24 and losses[-1] < 0.6 * losses[0]
    assert [r["step"] for r in uninterrupted.records if "validation" in r] == [5, 10, 15, 20, 24]


def test_a_run_killed_at_50_random_moments_and_resumed_equals_one_that_was_not(uninterrupted, tmp_path):
    rng = random.Random(time.time_ns())  # other moments in every run of the tests
    counts, counted = forkserver.Pipe(duplex=False)
    forkserver.Process(target=count_calls_of_saving, args=(tmp_path / "counted", counted)).start()
    counted.close()
    calls = counts.recv()  # in the first half, before it writes, it looks whether all weights are finite
    runs, in_writing = [tmp_path / "run-0"], 0
    for kill in range(50):
        # At any moment, as early as before its first line; or in its first checkpoint; or until its second is there.
        killed_at = rng.randrange(calls // 2, calls if kill % 4 == 1 else 2 * calls) if kill % 2 else None
        child = forkserver.Process(target=train_in_child, args=(runs[-1], 0.01, killed_at))
        child.start()
        child.join(20 if kill % 2 else rng.uniform(0, 0.5))
        child.kill()
        child.join()
        in_writing += kill % 2 and (runs[-1] / "unfinished").exists()
        if (runs[-1] / "step-24").exists():
            runs.append(tmp_path / f"run-{len(runs)}")
    assert in_writing > 3
    for folder in runs:
        resumed = make_trainer(folder)
        run_with_one_thread(resumed)
        assert_same_run(uninterrupted, resumed)
        assert len(checkpoints(folder)) == 2 and not (folder / "unfinished").exists()


def test_ctrl_c_finishes_the_step_saves_and_the_run_goes_on(uninterrupted, tmp_path):
    child = forkserver.Process(target=train_in_child, args=(tmp_path, 0.05))
    child.start()
    deadline = time.time() + 60
    while not checkpoints(tmp_path) and time.time() < deadline:
        time.sleep(0.02)
    os.kill(child.pid, signal.SIGINT)
    child.join(30)
    assert child.exitcode == 130
    stopped = int(checkpoints(tmp_path)[-1].name.removeprefix("step-"))
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == stopped < 24
    resumed = make_trainer(tmp_path)
    run_with_one_thread(resumed)
    assert_same_run(uninterrupted, resumed)


def test_snapshots_are_kept_and_other_checkpoints_are_not(tmp_path):
    make_trainer(tmp_path, snapshots=(4, 7)).run()
    assert [path.name for path in checkpoints(tmp_path)] == ["step-4", "step-7", "step-21", "step-24"]


@pytest.mark.parametrize("change", [{"learning_rate": 0.02}, {"steps": 30}, {"optimizer": "adamw"}])
def test_other_settings_are_not_mixed_into_a_run(uninterrupted, change):
    ((name, value),) = change.items()
    settings = TrainSettings(**{**vars(SETTINGS), **change})
    with pytest.raises(ValueError, match=rf"{name} {getattr(SETTINGS, name)}, not {value}"):
        make_trainer(uninterrupted.folder, settings).run()


def test_another_model_is_not_mixed_into_a_run(uninterrupted):
    torch.manual_seed(1)
    other = Llama(ModelConfig.from_dict({**CONFIG.to_dict(), "ffn_dim": 22}))
    with pytest.raises(ValueError, match="ffn_dim=20.*not.*ffn_dim=22"):
        Trainer(other, None, batches, SETTINGS, uninterrupted.folder).run()


@pytest.mark.parametrize("file", ["trainer.pt", "model.safetensors", "config.json"])
@pytest.mark.parametrize("share", [0.0, 0.6])
def test_a_newest_checkpoint_that_was_cut_off_is_named_and_the_one_before_is_taken(
    uninterrupted, tmp_path, capsys, file, share
):
    shutil.copytree(uninterrupted.folder, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "step-24" / file
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    torch.manual_seed(9)
    resumed = make_trainer(tmp_path)
    run_with_one_thread(resumed)
    (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("minillama: ")]
    assert str(path) in said and said.endswith("Going on from step-21.")
    assert_same_run(uninterrupted, resumed)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-21", "step-24"]
    assert make_trainer(tmp_path).run() is None and capsys.readouterr().err.count("Going on") == 0


def test_where_no_checkpoint_can_be_read_the_newest_is_named_and_nothing_is_touched(tmp_path):
    settings = TrainSettings(steps=4, warmup=0, save_every=2)
    make_trainer(tmp_path, settings).run()
    metrics = (tmp_path / "metrics.jsonl").read_bytes()
    for checkpoint in checkpoints(tmp_path):
        (checkpoint / "trainer.pt").write_bytes(b"PK\x03\x04 cut")
    with pytest.raises(ValueError, match="step-4.trainer.pt cannot be read.*delete the folder step-4"):
        make_trainer(tmp_path, settings).run()
    assert len(checkpoints(tmp_path)) == 2 and (tmp_path / "metrics.jsonl").read_bytes() == metrics


def test_a_new_checkpoint_is_kept_though_later_ones_that_cannot_be_read_are_there(tmp_path):
    make_trainer(tmp_path, snapshots=(3,)).run()
    for checkpoint in checkpoints(tmp_path)[1:]:
        (checkpoint / "trainer.pt").unlink()
    trainer = make_trainer(tmp_path, snapshots=(3, 4))

    def stop(record):
        if record["step"] == 5:
            raise SystemExit

    trainer.on_step = stop
    with pytest.raises(SystemExit):
        trainer.run()
    assert [path.name for path in checkpoints(tmp_path)] == ["step-3", "step-4"]


@contextlib.contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """What is written beyond it fails, as on a disk that is full."""
    import resource  # Windows has none

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[None]:
    folder.chmod(0o555)
    if root := os.geteuid() == 0:  # to whom no folder is closed
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        folder.chmod(0o755)


@pytest.mark.skipif(os.name != "posix", reason="limits and rights of POSIX")
@pytest.mark.parametrize("trouble", ["metrics", "weights", "state", "rights"])
def test_a_disk_that_cannot_be_written_stops_the_run_in_one_sentence_and_loses_nothing(uninterrupted, trouble):
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        trainer = make_trainer(Path(folder))
        whole = uninterrupted.folder / "step-24"
        weights, state = ((whole / name).stat().st_size for name in ("model.safetensors", "optimizer.safetensors"))
        assert 8000 < weights < state

        def break_it(record):
            if record["step"] == 7:
                if trouble == "rights":
                    stack.enter_context(read_only(trainer.folder))
                else:
                    size = {"metrics": 900, "weights": weights - 100, "state": state - 100}[trouble]
                    stack.enter_context(files_of_at_most(size))

        trainer.on_step = break_it
        with pytest.raises(OSError) as stopped:
            trainer.run()
        stack.close()
        step = 9 if trouble in ("weights", "state") else 8
        reason = "Permission denied" if trouble == "rights" else "File too large"
        sentence = str(stopped.value)
        assert sentence.startswith(f"{folder} cannot be written at step {step} (") and reason in sentence
        assert sentence.endswith("the same command goes on from step-6.") and "\n" not in sentence
        assert not (trainer.folder / "unfinished").exists()
        resumed = make_trainer(trainer.folder)
        run_with_one_thread(resumed)
        assert_same_run(uninterrupted, resumed)


class Canary:
    def __reduce__(self):
        return Path.touch, (Path("canary"),)


def test_a_state_that_would_run_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = TrainSettings(steps=2, warmup=0, save_every=2)
    make_trainer(tmp_path, settings).run()
    torch.save({"step": Canary()}, tmp_path / "step-2" / "trainer.pt")
    with pytest.raises(ValueError, match="cannot be read"):
        make_trainer(tmp_path, settings).run()
    assert not (tmp_path / "canary").exists()


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_last_checkpoint(tmp_path):
    trainer = make_trainer(tmp_path)

    def break_it(record):
        if record["step"] == 8:
            trainer.model.norm.weight.data.fill_(torch.nan)

    trainer.on_step = break_it
    with pytest.raises(FloatingPointError, match="after step 8 the loss is nan"):
        trainer.run()
    kept = checkpoints(tmp_path)[-1]
    assert kept.name == "step-6"
    whole = make_trainer(tmp_path)
    whole.run()
    assert whole.step == 24 and all(torch.isfinite(p).all() for p in whole.model.parameters())


@pytest.mark.skipif(os.name != "posix", reason="limits of POSIX")
def test_the_command_says_it_in_one_sentence_with_exit_code_2(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("minillama.cli.train.VALIDATION_STORIES", 2)
    with pytest.raises(SystemExit) as stopped, files_of_at_most(100_000):
        main(["train", "--steps", "1", "--batch-size", "1", "--out", str(tmp_path / "run")])
    assert stopped.value.code == 2
    (sentence,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("minillama: ")]
    assert "cannot be written at step 1" in sentence and sentence.endswith("goes on from the beginning.")


def test_a_checkpoint_never_holds_a_weight_that_is_no_number(tmp_path):
    trainer = make_trainer(tmp_path)

    def break_it(record):
        if record["step"] == 6:
            trainer.model.norm.weight.data[3] = torch.inf

    trainer.on_step = break_it
    with pytest.raises(FloatingPointError, match="after step 6 a weight is infinite or no number"):
        trainer.run()
    assert [path.name for path in checkpoints(tmp_path)] == ["step-3"]


def test_accumulated_parts_give_the_step_of_one_big_batch(tmp_path):
    def halves(step):
        whole = batches(step // 2)
        cut = slice(0, 2) if step % 2 == 0 else slice(2, 5)  # two rows, three rows: not equally many tokens
        return Batch(whole.inputs[cut], whole.targets[cut])

    one = make_trainer(tmp_path / "one", TrainSettings(steps=4, warmup=0))
    two = make_trainer(tmp_path / "two", TrainSettings(steps=4, warmup=0, accumulate=2), halves)
    one.run(), two.run()
    for a, b in zip(one.records, two.records, strict=True):
        assert a["tokens"] == b["tokens"] and a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


def test_the_schedule_rises_in_a_line_and_falls_along_a_cosine_to_its_end():
    settings = TrainSettings(steps=110, warmup=10, final_rate=0.1)
    rates = [rate_at(step, settings) for step in range(111)]
    assert rates[:11] == pytest.approx([0.1 * (i + 1) for i in range(10)] + [1.0])
    assert rates[60] == pytest.approx(0.55) and rates[110] == pytest.approx(0.1)
    assert all(a > b for a, b in zip(rates[10:], rates[11:], strict=False))


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_each_parameter_has_one_optimizer_and_norms_do_not_decay(optimizer):
    model = Llama(CONFIG)
    optimizers = make_optimizers(model, TrainSettings(optimizer=optimizer, weight_decay=0.3))
    seen = [(id(p), group["weight_decay"]) for o in optimizers for group in o.param_groups for p in group["params"]]
    assert sorted(i for i, _ in seen) == sorted(id(p) for p in model.parameters())
    decay = dict(seen)
    assert all(decay[id(p)] == (0.3 if p.dim() == 2 else 0) for p in model.parameters())


def orthogonalise(matrix: torch.Tensor) -> torch.Tensor:
    """Newton and Schulz's iteration with Jordan's three numbers: all singular values come near 1."""
    x = matrix / matrix.norm()
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x


def test_muon_takes_the_steps_of_its_definition():
    torch.manual_seed(4)
    model = Llama(CONFIG)
    muon, _ = make_optimizers(model, TrainSettings(learning_rate=0.03, weight_decay=0.5))
    hidden = {name: p for name, p in model.named_parameters() if p.dim() == 2 and "blocks." in name}
    assert [id(p) for p in muon.param_groups[0]["params"]] == [id(p) for p in hidden.values()]
    assert {(24, 36), (12, 24), (20, 24), (24, 20)} < {tuple(p.shape) for p in hidden.values()}  # wide and tall
    start, momentum = {name: p.detach().double() for name, p in hidden.items()}, dict.fromkeys(hidden, 0.0)
    weights = dict(start)
    for _ in range(3):
        for name, p in hidden.items():
            p.grad = torch.randn_like(p) * torch.logspace(0, -2, p.shape[1])  # some directions are loud
            g = p.grad.double()
            momentum[name] = 0.95 * momentum[name] + 0.05 * g
            ahead = 0.95 * momentum[name] + 0.05 * g  # Nesterov's
            wide = ahead if p.shape[0] <= p.shape[1] else ahead.T
            turned = orthogonalise(wide) if wide is ahead else orthogonalise(wide).T
            weights[name] = (1 - 0.03 * 0.5) * weights[name] - 0.03 * 0.2 * max(p.shape) ** 0.5 * turned
        muon.step()
    for name, p in hidden.items():
        ours, defined = p.detach().double() - start[name], weights[name] - start[name]
        assert (ours - defined).norm() < 0.02 * defined.norm(), name  # torch's iteration is in bf16


@pytest.mark.parametrize(
    "wrong", [{"steps": 0}, {"warmup": 2000}, {"learning_rate": 0.0}, {"optimizer": "sgd"}, {"precision": "fp8"}]
)
def test_settings_that_cannot_work_are_refused_with_their_value(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=rf"{name}.*{value}"):
        TrainSettings(**wrong)


def test_the_mean_loss_counts_each_token_once():
    torch.manual_seed(2)
    model = Llama(CONFIG)
    small, large = stack([[1, 2, 3]], 0), stack([[4, 5, 6, 7, 8, 9, 10], [1, 2]], 0)
    losses = [cross_entropy(model(b.inputs), b.targets).item() for b in (small, large)]
    counts = [int((b.targets != IGNORE).sum()) for b in (small, large)]
    total = sum(loss * count for loss, count in zip(losses, counts, strict=True))
    assert mean_loss(model, [small, large]) == pytest.approx(total / 9, rel=1e-6)


@pytest.mark.parametrize("tied", [True, False])
def test_a_batch_with_very_many_logits_trains_as_any_other(monkeypatch, tied):
    torch.manual_seed(3)
    model, batch = Llama(dataclasses.replace(CONFIG, tie_embeddings=tied)), batches(0)
    gradients = []
    for many in (2**24, batch.targets.numel() * 31 - 1):
        monkeypatch.setattr("minillama.trainer.MANY", many)
        loss = batch_loss(model, batch)
        assert ("HeadCrossEntropy" in loss.grad_fn.next_functions[0][0].name()) == (many < 2**24)
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    for whole, chunked in zip(*gradients, strict=True):
        torch.testing.assert_close(chunked, whole, rtol=1e-5, atol=1e-7)


def test_checkpointing_trains_to_the_same_bits(uninterrupted, tmp_path):
    trainer = make_trainer(tmp_path, dataclasses.replace(SETTINGS, checkpointing=True))
    assert trainer.model.checkpointing
    run_with_one_thread(trainer)
    assert_same_run(uninterrupted, trainer)


def test_bf16_training_keeps_the_weights_in_fp32_and_learns(tmp_path):
    trainer = make_trainer(tmp_path, TrainSettings(steps=24, warmup=3, learning_rate=0.01, precision="bfloat16"))
    trainer.run()
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())
    assert trainer.records[-1]["loss"] < 0.7 * trainer.records[0]["loss"]
