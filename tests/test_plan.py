"""The plan of a run, against real steps of the trainer, published runs, and shares of processes that are not there."""

import json
import os
import re
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from minillama import ModelConfig, loss, trainer
from minillama import plan as planner
from minillama.cli import main
from minillama.plan import DEVICES, LAWS, Memory, Run, fitting, memory_of, optimal_tokens, plan
from tests.benchmarks import plan as benchmark

ROOT = Path(__file__).resolve().parents[1]
ODD = ModelConfig(dim=50, n_layers=3, n_heads=6, n_kv_heads=2, head_dim=10, ffn_dim=70, vocab_size=101, max_seq_len=64)
B65 = ModelConfig.preset("llama-65b")


# Memory


@pytest.mark.parametrize("name", benchmark.RUNS)
def test_every_part_is_what_a_real_step_holds(name: str) -> None:
    run = benchmark.RUNS[name]
    planned, real = memory_of(run), benchmark.measure(run)
    assert (planned.weights, planned.gradients, planned.copies) == (real["weights"], real["gradients"], real["copies"])
    assert planned.optimizer == pytest.approx(real["optimizer"], rel=1e-3)  # beside it, the number of each step
    assert planned.activations == pytest.approx(real["activations"], rel=6e-3)
    assert planned.peak == pytest.approx(real["peak"], rel=0.04)


def test_scores_are_made_in_chunks_as_the_trainer_makes_them() -> None:
    assert (planner.ROWS, planner.MANY) == (loss.ROWS, trainer.MANY)


def test_gradients_come_as_activations_go_unless_several_passes_add_them_up() -> None:
    parts = {"weights": 1, "optimizer": 10, "copies": 100, "activations": 3000, "loss": 4000, "gradients": 5000}
    assert Memory(**parts, update=0).peak == 7111
    assert Memory(**parts, update=2500).peak == 7611
    assert Memory(**parts, update=2500, passes=2).peak == 12111
    assert Memory(**parts, update=8000, passes=2).peak == 13111


def test_a_context_twice_as_long_keeps_twice_as_much_not_four_times() -> None:
    short, long = (memory_of(Run(config=B65, context=context)) for context in (1024, 2048))
    assert long.activations == pytest.approx(2 * short.activations, rel=1e-6)


def test_checkpointing_keeps_one_vector_a_block_and_one_block() -> None:
    every, fewer, one = (
        memory_of(Run(config=config, micro_batch=3, checkpointing=checkpointing)).activations
        for config, checkpointing in ((B65, False), (replace(B65, n_layers=79), False), (B65, True))
    )
    assert every - one == 79 * (every - fewer) - 80 * 3 * 2048 * 4 * 8192


def test_fsdp_divides_what_tp_cannot_and_both_divide_matrices() -> None:
    whole = memory_of(Run(config=B65, tp=1, fsdp=2))
    assert memory_of(Run(config=B65, fsdp=16)).weights == whole.weights // 8
    norms_and_tables = 2 * 32000 * 8192 + 161 * 8192
    matrices = B65.n_params() - norms_and_tables
    for dp in (1, 4):
        assert memory_of(Run(config=B65, dp=dp, fsdp=2, tp=8)).weights == 4 * (matrices // 16 + norms_and_tables // 2)
    tp = memory_of(Run(config=B65, fsdp=2, tp=8)).activations
    assert whole.activations / 8 < tp < 0.6 * whole.activations  # norms, and copies of what they give, stay whole


FAKE = """
import dataclasses, json, sys
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from minillama import Llama, ModelConfig, parallel
from minillama.trainer import TrainSettings, make_optimizers

config, layout = ModelConfig.from_dict(json.loads(sys.argv[1])), parallel.Layout.parse(sys.argv[2])
dist.init_process_group("fake", rank=0, world_size=layout.processes, store=FakeStore())
make_mesh = parallel.make_mesh
parallel.make_mesh = lambda layout, device: make_mesh(layout, "cpu")  # there is no mesh of meta devices
with torch.device("meta"):
    model = Llama(config)
parallel.distribute(model, layout, half=True)
(optimizer,) = make_optimizers(model, TrainSettings(optimizer="adamw"))
for group in optimizer.param_groups:
    group["fused"] = False  # no kernel for meta tensors
for p in model.parameters():
    p.grad = torch.zeros_like(p)
optimizer.step()
local = lambda tensors: sum(t.to_local().nbytes for t in tensors)
states = [v for state in optimizer.state.values() for v in state.values() if v.dim()]  # without the numbers of steps
parameters = list(model.parameters())
print(json.dumps([local(parameters), local(p.grad for p in parameters), local(states)]))
"""


def held_by_first(config: ModelConfig, layout: str) -> list[int]:
    """Bytes of weights, gradients and optimizer that the first of many processes has; none but it is there."""
    command = [sys.executable, "-W", "ignore", "-c", FAKE, json.dumps(config.to_dict()), layout]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("layout", [{"fsdp": 4, "tp": 2}, {"dp": 3, "fsdp": 8}])
def test_shares_are_those_of_processes_that_hold_them_also_where_rows_do_not_divide(layout: dict[str, int]) -> None:
    planned = memory_of(Run(config=ODD, **layout))
    found = held_by_first(ODD, ",".join(f"{name}={count}" for name, count in layout.items()))
    assert found == [planned.weights, planned.gradients, planned.optimizer]


@pytest.mark.slow
def test_65b_on_2048_devices_holds_what_was_planned() -> None:
    planned = memory_of(Run(config=B65, fsdp=256, tp=8))
    assert held_by_first(B65, "fsdp=256,tp=8") == [planned.weights, planned.gradients, planned.optimizer]
    ideal = 16 * B65.n_params() / 2048
    assert planned.weights * 4 == pytest.approx(ideal, rel=0.07) and planned.weights * 4 > ideal  # rests, whole tables


# What would fit


@pytest.mark.parametrize(
    ("run", "change"),
    [
        (Run(config=B65, fsdp=256, tp=8), {}),
        (Run(config=B65, fsdp=256, tp=8, micro_batch=8), {"micro_batch": 1}),
        (Run(config=B65, fsdp=64), {"checkpointing": True}),
        (Run(config=B65, dp=64), {"checkpointing": True, "dp": 1, "fsdp": 64}),
        (Run(config=ModelConfig.preset("llama3-70b"), fsdp=4), {"checkpointing": True, "fsdp": 8, "tp": 4}),
    ],
)
def test_the_nearest_run_that_fits_is_found(run: Run, change: dict) -> None:
    found = fitting(run)
    assert found is not None and plan(found).fits and plan(run).fits is (not change)
    assert {k: v for k, v in asdict(found).items() if v != asdict(run)[k] and k != "batch"} == change


def test_a_run_that_is_made_to_fit_keeps_its_batch() -> None:
    run = Run(config=ModelConfig.preset("llama-7b"), fsdp=8, micro_batch=16, batch=16 * 8 * 2048 * 3)
    found = fitting(run)
    assert found is not None and found.batch == run.batch and found.passes > run.passes == 3


def test_what_no_number_of_devices_can_hold_does_not_fit() -> None:
    small = replace(DEVICES["a100"], memory=1e9)
    assert fitting(Run(config=ModelConfig.preset("llama3.1-405b"), fsdp=8, device=small)) is None


# Time, energy, tokens, bytes on the way


def test_time_is_arithmetic_over_the_share_of_the_peak() -> None:
    run = Run(config=B65, fsdp=256, tp=8, tokens=14 * 10**11, batch=2**22, utilisation=0.5)
    made = plan(run)
    flops = 6 * (B65.n_params() - 32000 * 8192 - 161 * 8192) + 12 * 80 * 8192 * 2048
    assert made.flops_per_token == flops == B65.flops_per_token(2048, training=True)
    assert made.tokens_per_second == pytest.approx(2048 * 0.5 * 312e12 / flops)
    assert made.step_seconds == pytest.approx(2**22 / made.tokens_per_second)
    assert made.days == pytest.approx(14e11 / made.tokens_per_day)
    assert made.device_hours == pytest.approx(24 * 2048 * made.days)
    assert plan(replace(run, checkpointing=True)).days == pytest.approx(4 / 3 * made.days)
    single = plan(replace(run, precision="float32"))
    assert single.days == pytest.approx(312 / 19.5 * made.days)


def test_energy_of_65b_is_the_published_one_for_the_published_hours() -> None:
    made = plan(Run(config=B65))
    assert made.megawatt_hours / made.device_hours * 1_022_362 == pytest.approx(449, rel=0.002)  # table 15


ERRORS = {"LLaMA": 0.09, "Llama 2": 0.11, "Llama 3": 0.27, "Llama 3.1": 0.39}  # of the runs of a family, at one share


@pytest.mark.parametrize("family", benchmark.FAMILIES)
def test_published_hours_are_met_with_the_stated_error(family: str) -> None:
    errors = [abs(error) for name, *_, error, _ in benchmark.hours() if name.rsplit(" ", 1)[0] == family]
    assert len(errors) >= 2 and ERRORS[family] - 0.011 < max(errors) < ERRORS[family]


def test_published_speed_of_65b_is_near_half_of_the_peak() -> None:
    made = plan(Run(config=B65, fsdp=256, tp=8, utilisation=0.495))
    assert made.tokens_per_second / 2048 == pytest.approx(380, rel=0.01)  # "around 380 tokens/sec/GPU", section 2.4


def test_no_other_size_does_better_at_the_same_arithmetic() -> None:
    for law, (a, b, alpha, beta) in LAWS.items():
        n, d = 7e10, optimal_tokens(70_000_000_000, law)
        losses = {k: a / (k * n) ** alpha + b / (d / k) ** beta for k in (0.9, 0.99, 1, 1.01, 1.1)}
        assert min(losses, key=losses.__getitem__) == 1
    assert optimal_tokens(10) == 200
    # The refitted law agrees with Chinchilla's 20 a parameter, the published one does not.
    assert (
        15
        < optimal_tokens(70_000_000_000, "Besiroglu") / 7e10
        < 25
        < 80
        < optimal_tokens(70_000_000_000, "Hoffmann") / 7e10
    )


def test_what_is_sent_in_rings() -> None:
    one = plan(Run(config=ODD)).sent
    assert set(one.values()) == {0.0}
    size = 4 * (ODD.n_params() - ODD.dim)  # the last norm is left out
    ddp = plan(Run(config=ODD, dp=4)).sent
    assert ddp["gradients"] == pytest.approx(2 * 3 / 4 * size) and ddp["weights"] == 0
    sharded = plan(Run(config=ODD, fsdp=4, precision="float32")).sent
    tables = 4 * 2 * 101 * 50
    assert sharded["gradients"] == pytest.approx(3 / 4 * size)
    assert sharded["weights"] == pytest.approx(3 / 4 * (2 * size - tables))
    assert sum(sharded.values()) < 1.5 * sum(ddp.values())
    tp = plan(Run(config=ODD, tp=2, batch=3 * 64)).sent
    assert tp["activations"] == pytest.approx(3 * 3 * 4 * 64 * 50 * 2)  # passes, blocks, sums, tokens, dim, bf16
    again = plan(Run(config=ODD, tp=2, batch=3 * 64, checkpointing=True)).sent
    assert again["activations"] == pytest.approx(1.5 * tp["activations"])  # the forward pass a second time


# What is refused


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"fsdp": 0}, "fsdp is 0, expected at least 1"),
        ({"tokens": 0}, "tokens is 0"),
        ({"tp": 4}, "tp is 4 and n_kv_heads 2"),
        ({"context": 65}, "context is 65, expected at most 64"),
        ({"batch": 100, "fsdp": 2}, "batch is 100 tokens, expected a multiple of 128"),
        ({"precision": "fp8"}, "precision is 'fp8', expected 'float32' or 'bfloat16'"),
        ({"optimizer": "sgd"}, "optimizer is 'sgd', expected 'adamw' or 'muon'"),
        ({"utilisation": 1.1}, "utilisation is 1.1, expected above 0 and at most 1"),
        ({"utilisation": float("nan")}, "utilisation is nan"),
        ({"pue": 0.9}, "pue is 0.9"),
    ],
)
def test_a_run_that_cannot_be_is_refused(change: dict, words: str) -> None:
    with pytest.raises(ValueError) as error:
        Run(config=ODD, **change)
    assert words in str(error.value)


# The command


def said(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stopped:
        main(["plan", *map(str, arguments)])
    return stopped.value.code or 0, *capsys.readouterr()


def test_plan_says_what_a_laptop_needs_for_the_toy(capsys) -> None:
    code, out, err = said(capsys)
    assert (code, err) == (0, "") and out.endswith("\nIt fits.\n")
    assert out.startswith("toy, 1,246,336 parameters") and "1 × laptop" in out and "float32" in out


def test_plan_says_what_would_fit_and_it_does(capsys) -> None:
    given = ["--preset", "llama-7b", "--gpus", 8, "--batch", "4M"]
    assert said(capsys, *given, "--memory", 80)[1].endswith("It fits.\n")
    code, out, _ = said(capsys, *given, "--memory", 24, "--micro-batch", 4)
    assert code == 0
    advice = out.splitlines()[-1]
    assert advice.startswith("It does not fit. This does, with ")
    changed = advice.split("GB: ")[1].split()
    assert said(capsys, *given, "--memory", 24, *changed)[1].endswith("It fits.\n")


@pytest.mark.parametrize(
    "given",
    [["llama-65b", "--gpus", 8], ["llama-7b"], ["llama-7b", "--parallel", "dp=2", "--batch", "40k"]],
    ids=["one pass becomes several", "laptops stay laptops", "a batch that was asked for"],
)
def test_what_would_fit_needs_the_memory_that_was_said(capsys, given: list) -> None:
    advice = said(capsys, "--preset", *given)[1].splitlines()[-1]
    gigabytes, changed = re.fullmatch(r"It does not fit. This does, with ([\d.]+) GB: (.*)", advice).groups()
    out = said(capsys, "--preset", *given, *changed.split())[1]
    assert re.search(r"at the peak +([\d.]+) GB", out)[1].startswith(gigabytes[:-1]) and out.endswith("It fits.\n")


def test_plan_takes_the_batch_that_is_nearest(capsys) -> None:
    _, out, _ = said(capsys, "--preset", "llama-65b", "--gpus", 2048, "--parallel", "fsdp=256,tp=8", "--batch", "4M")
    assert "2,048 × A100-80GB (fsdp=256, tp=8); a step is 4,194,304 tokens, in 8 × 256 sequences of 2,048" in out


def test_plan_as_json_has_what_the_library_says(capsys) -> None:
    out = said(
        capsys, "--preset", "llama3-8b", "--device", "h100", "--parallel", "dp=2,fsdp=4", "--tokens", "15T", "--json"
    )[1]
    run = Run(config=ModelConfig.preset("llama3-8b"), device=DEVICES["h100"], dp=2, fsdp=4, tokens=15 * 10**12)
    assert json.loads(out)["plan"] == json.loads(json.dumps(asdict(plan(run))))
    assert json.loads(out)["peak"] == memory_of(run).peak


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--preset", "lama-7b"], "did you mean"),
        (["--device", "tpu"], "--device is 'tpu', expected one of laptop"),
        (["--tokens", "many"], "--tokens is 'many', expected a number of tokens"),
        (["--tokens", "1e999"], "--tokens is '1e999', expected a number of tokens"),
        (["--tokens", "0.1"], "tokens is 0, expected at least 1"),
        (["--batch", "10"], "--batch is 10, expected 512 tokens, those of one pass, or more"),
        (["--gpus", "3", "--parallel", "fsdp=4"], "takes 4 devices, and --gpus is 3"),
        (["--gpus", "9" * 400], "a pass has more than 1e+18 tokens"),
        (["--device", ""], "--device is ''"),
        (["--parallel", ""], "the layout is ''"),
        (["--parallel", "pp=4"], "expected counts of dp, fsdp, tp"),
        (["--memory", "0"], "memory"),
        (["--context", "4096"], "context is 4096, expected at most 512"),
    ],
)
def test_plan_refuses_in_one_sentence(capsys, arguments: list[str], words: str) -> None:
    code, out, err = said(capsys, *arguments)
    assert code == 2 and out == "" and err.count("\n") == 1 and words in err


def test_plan_needs_no_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; from minillama.cli import main; main(['plan', '--gpus', '2'])"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True).returncode == 0
