"""The benchmarks measure what they say, and a missed target is reported. Nothing is timed here: clocks are made up."""

import dataclasses
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from minillama.config import ModelConfig
from minillama.trainer import TrainSettings
from tests.benchmarks import __main__ as runner
from tests.benchmarks import harness

ROOT = Path(__file__).resolve().parents[1]
TINY = ModelConfig(
    dim=24, n_layers=2, n_heads=6, n_kv_heads=2, head_dim=6, ffn_dim=20, vocab_size=31, max_seq_len=64,
    tie_embeddings=True,
)  # fmt: skip


class Clock:
    """Stands still except when a call takes its seconds; `slow` rounds take ten times as long."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now, self.calls = 0.0, []
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def call(self, name: str, seconds: float, slow: tuple[int, ...] = ()):
        def take() -> None:
            number = self.calls.count(name)
            self.calls.append(name)
            self.now += seconds * (10 if number in slow else 1)

        return take


@pytest.mark.parametrize("ours, peer, ratio", [(2.0, 1.0, 0.5), (1.0, 3.0, 3.0)])
def test_ratio_is_above_one_when_ours_is_faster_and_below_when_it_is_slower(monkeypatch, ours, peer, ratio):
    clock = Clock(monkeypatch)
    times = harness.race(clock.call("ours", ours), clock.call("peer", peer), rounds=3)
    assert times == pytest.approx((ours, peer, ratio))


def test_rivals_take_turns_and_what_slows_both_leaves_the_ratio_alone(monkeypatch):
    clock = Clock(monkeypatch)
    slow = (0, 1, 2, 3)  # the machine was busy for most of the time
    times = harness.race(clock.call("ours", 1.0, slow), clock.call("peer", 1.5, slow), rounds=5)
    assert clock.calls == ["peer", "ours", "ours", "peer"] * 3
    assert times.ratio == pytest.approx(1.5)


def test_the_first_round_is_not_counted(monkeypatch):
    clock = Clock(monkeypatch)
    times = harness.race(clock.call("ours", 1.0, slow=(0,)), clock.call("peer", 1.0), rounds=1)
    assert times == pytest.approx((1.0, 1.0, 1.0))


@pytest.mark.parametrize(
    "ratio, target, met", [(1.2, {"at_least": 1.2}, True), (1.19, {"at_least": 1.2}, False),
                           (1.3, {"at_most": 1.3}, True), (1.31, {"at_most": 1.3}, False)]
)  # fmt: skip
def test_a_target_is_a_least_or_a_most(ratio, target, met):
    row = harness.row("x", 1.0, 1.0, "s", ratio, **target)
    assert row["met"] is met and row["target"] == ("≥ 1.2" if "at_least" in target else "≤ 1.3")


def test_a_row_without_a_target_is_only_stated():
    row = harness.row("x", 1.0, 1.0, "s", 3.0)
    assert row["met"] and row["target"] == ""
    assert runner.table([row]).endswith("|  3.00 |        |  |\n")
    assert "| 1.0033 |" in runner.table([harness.row("x", 1.0, 1.0, "", 1.0033)])


def test_the_training_benchmark_runs_through_the_runner_with_a_tiny_budget(monkeypatch, capsys):
    training = pytest.importorskip("tests.benchmarks.training")
    monkeypatch.setattr(training.ModelConfig, "preset", lambda name: dataclasses.replace(TINY, vocab_size=2048))
    monkeypatch.setattr(training, "ROWS", 2)
    monkeypatch.setattr(training, "LENGTH", 9)
    monkeypatch.setattr(training, "STEPS", 2)
    monkeypatch.setattr(training, "CHARACTERS", {"0.8M": (dataclasses.replace(TINY, n_kv_heads=6, max_seq_len=9), 2)})
    monkeypatch.setattr(training, "peak_flops", lambda dtype: 1e15)
    for target in ("TARGET", "PLAIN_TARGET", "THEIRS_TARGET"):
        monkeypatch.setattr(training, target, 0.0)
    monkeypatch.setattr(training, "AROUND_TARGET", 1e9)
    peaks = {"chunks": 1e6, "whole": 3e6, "checkpointing": 1e6, "not": 2e6}
    monkeypatch.setattr(training, "alone", lambda name, way: {"peak": peaks[way], "seconds": 1.0})
    assert runner.main(["training", "--rounds", "1"]) == 0
    out = capsys.readouterr().out
    assert "| training the toy, fp32, against transformers " in out and "torch " in out and "not met" not in out


def test_training_is_not_compared_when_the_weights_differ(monkeypatch):
    training = pytest.importorskip("tests.benchmarks.training")

    def other_weights(config: ModelConfig):
        ours, other = pair(config)
        with torch.no_grad():
            ours.blocks[1].attention.wq.weight.neg_()
        return ours, other

    pair = training.pair_of_models
    monkeypatch.setattr(training, "pair_of_models", other_weights)
    with pytest.raises(AssertionError, match=r"step 0: our loss is [\d.]+, transformers' [\d.]+"):
        training.measure(TINY, (2, 9), "float32", rounds=1)


def test_training_is_not_compared_when_the_steps_differ(monkeypatch):
    training = pytest.importorskip("tests.benchmarks.training")
    monkeypatch.setattr(training, "make_optimizers", lambda model, _: [torch.optim.SGD(model.parameters(), lr=1e-3)])
    with pytest.raises(AssertionError, match=r"step 1: our loss is [\d.]+, transformers' [\d.]+"):
        training.measure(TINY, (2, 9), "float32", rounds=1)


class Counter:
    """Takes `seconds` a step by the clock."""

    model = torch.nn.Identity()

    def __init__(self, clock: Clock, steps: int, seconds: float):
        self.clock, self.settings, self.seconds, self.done = clock, TrainSettings(steps=steps, warmup=0), seconds, 0

    def _one_step(self) -> None:
        self.done += 1
        self.clock.now += self.seconds


def test_two_runs_take_turns_until_each_has_done_all_of_its_steps(monkeypatch):
    time_to_loss = pytest.importorskip("tests.benchmarks.time_to_loss")
    clock = Clock(monkeypatch)
    ours, peer = Counter(clock, 7, 2.0), Counter(clock, 45, 0.5)
    assert time_to_loss.train_in_turns(ours, peer) == pytest.approx((14.0, 22.5))
    assert (ours.done, peer.done) == (7, 45)


def test_the_time_to_a_loss_is_measured_with_a_tiny_budget(monkeypatch):
    time_to_loss = pytest.importorskip("tests.benchmarks.time_to_loss")
    monkeypatch.setattr(time_to_loss.ModelConfig, "preset", lambda name: dataclasses.replace(TINY, vocab_size=2048))
    monkeypatch.setattr(time_to_loss, "CHARACTERS", {"0.8M": (dataclasses.replace(TINY, n_kv_heads=6), 2)})
    monkeypatch.setattr(time_to_loss, "LETTERS", 9000)
    for name in ("OUR_STORIES", "THEIR_STORIES", "OUR_LETTERS", "THEIR_LETTERS"):
        settings = dataclasses.replace(getattr(time_to_loss, name), steps=2, warmup=0)
        monkeypatch.setattr(time_to_loss, name, settings)
    above, _, _, letters, _ = time_to_loss.rows()
    assert 6 < above["ours"] < 8 and not above["met"]  # ln 2048 less the floor, after two steps
    assert 2.5 < letters["ours"] < 4 and 2.5 < letters["peer"] < 4  # ln 40 or so


# The command, with made-up measurements


@pytest.fixture
def bench(tmp_path):
    """A function that runs `make bench` in a folder whose benchmarks have the ratios that it is given."""
    folder = tmp_path / "tests" / "benchmarks"
    folder.mkdir(parents=True)
    for name in ("Makefile", "pyproject.toml", "tests/constraints.txt", "tests/benchmarks/__main__.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    (tmp_path / ".venv" / "installed").write_text(f"{tmp_path}\n")
    (tmp_path / ".venv" / "real-model").touch()
    (tmp_path / ".venv" / "rival").touch()

    def run(ratios: dict[str, float | None], flags: str = "") -> subprocess.CompletedProcess[str]:
        for name in runner.MODULES:
            ratio = ratios.get(name, 2.0)
            row = {"name": name, "ours": 1234.5, "peer": 617.0, "unit": "tokens/s", "ratio": ratio, "target": "≥ 1.2"}
            row["met"] = ratio is not None and ratio >= 1.2
            failure = "raise ValueError('the real model is not installed')" if ratio is None else ""
            (folder / f"{name}.py").write_text(f"def rows(rounds=7):\n    {failure}\n    return [{row!r}]\n")
        return subprocess.run(
            ["make", "bench", f"BENCH_FLAGS={flags}"], cwd=tmp_path, capture_output=True, text=True, timeout=60
        )

    if shutil.which("make") is None:
        pytest.skip("make was not found")
    return run


def test_met_targets_end_well_and_the_table_is_stored(bench, tmp_path):
    result = bench({})
    assert result.returncode == 0, result.stderr
    assert "not met" not in result.stdout
    stored = (tmp_path / "tests" / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8")
    assert stored.startswith("# Benchmarks\n") and stored.endswith(" |\n")
    assert stored.count("\n| ") == 1 + len(runner.MODULES)
    assert "| 1,234 |  617 | tokens/s |  2.00 |  ≥ 1.2 | met |\n" in stored
    assert stored.partition("|")[2] in result.stdout
    assert str(tmp_path) not in stored


def test_a_missed_target_is_named_stored_and_fails_the_command(bench, tmp_path):
    result = bench({"training": 1.19})
    assert result.returncode != 0
    assert "|  1.19 |  ≥ 1.2 | not met |" in result.stdout and "\nnot met: training\n" in result.stdout
    assert "not met" in (tmp_path / "tests" / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8")


def test_what_could_not_be_measured_fails_the_command_and_stores_nothing(bench, tmp_path):
    result = bench({"decode": None})
    assert result.returncode != 0
    assert "decode was not measured: the real model is not installed\n" in result.stdout
    assert "| load_memory " in result.stdout
    assert not (tmp_path / "tests" / "benchmarks" / "RESULTS.md").exists()


@pytest.mark.parametrize("flags", ["training", "--rounds 1"])
def test_a_part_or_a_quick_look_is_not_stored(bench, tmp_path, flags):
    assert bench({}, flags).returncode == 0
    assert not (tmp_path / "tests" / "benchmarks" / "RESULTS.md").exists()


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["trainig"], "there is no benchmark trainig: choose from training"),
        (["--rounds", "0"], "--rounds is 0, expected at least 1."),
    ],
)
def test_a_wrong_argument_is_named(capsys, arguments, sentence):
    with pytest.raises(SystemExit) as stop:
        runner.main(arguments)
    assert stop.value.code == 2 and sentence in capsys.readouterr().err
