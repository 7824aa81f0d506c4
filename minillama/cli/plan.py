"""`minillama plan`: what a training run will take, before it is begun."""

import re
from dataclasses import asdict, fields, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from minillama.cli.app import app, option

if TYPE_CHECKING:
    from minillama.plan import Plan, Run

SUFFIXES = {"": 1, "k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}
MOST = 10**18  # tokens of a pass; above it, arithmetic ends before sense does


@app.command(rich_help_panel="Learn")
def plan(
    preset: Annotated[str, option("Run", "The model's shape: toy, llama-7b, llama3-70b …")] = "toy",
    tokens: Annotated[
        str | None, option("Run", "Of the whole run, as 1.4T or 300M; left out: 20 for each parameter.")
    ] = None,
    context: Annotated[
        int | None, option("Run", "Tokens of a sequence; left out: the model's, at most 8192.", min=1)
    ] = None,
    batch: Annotated[
        str | None, option("Run", "Tokens in a step, as 4M (the nearest that divides); left out: of one pass.")
    ] = None,
    micro_batch: Annotated[int, option("Run", "Sequences that a device (with tp, a group) computes at once.")] = 1,
    optimizer: Annotated[str, option("Run", "adamw or muon.")] = "adamw",
    precision: Annotated[
        str | None,
        option("Run", "float32, or bfloat16 for matrix products; left out: bfloat16, but float32 on a laptop."),
    ] = None,
    checkpointing: Annotated[
        bool, option("Run", "Keep only the input of each block, and compute the rest again.")
    ] = False,
    device: Annotated[
        str | None, option("Devices", "laptop, rtx4090, a100, h100, h200; left out: laptop, or a100 with --gpus.")
    ] = None,
    gpus: Annotated[int | None, option("Devices", "How many; left out: one, or those of --parallel.", min=1)] = None,
    parallel: Annotated[
        str | None, option("Devices", "How they share the work, as fsdp=256,tp=8; left out: fsdp alone.")
    ] = None,
    memory: Annotated[float | None, option("Devices", "GB of each; left out: the device's own.")] = None,
    utilisation: Annotated[float, option("Devices", "The share of their peak FLOP/s that is reached.")] = 0.4,
    json: Annotated[bool, typer.Option("--json", help="Print it as JSON, in bytes and seconds.")] = False,
) -> None:
    """Say what a training run takes: memory by its parts, time, energy, and what devices send each other.

    Says whether it fits, and if not, what would.

    [bold]Examples[/bold]
      minillama plan
      minillama plan --preset llama-7b --gpus 8 --memory 80
      minillama plan --preset llama-65b --parallel fsdp=256,tp=8 --tokens 1.4T
    """
    from json import dumps

    from minillama.config import ModelConfig
    from minillama.plan import DEVICES, Run, fitting, memory_of
    from minillama.plan import plan as make

    config = ModelConfig.preset(preset)
    name = device if device is not None else "laptop" if gpus is None and parallel is None else "a100"
    if name not in DEVICES:
        raise ValueError(f"--device is {name!r}, expected one of {', '.join(DEVICES)}.")
    place = DEVICES[name] if memory is None else replace(DEVICES[name], memory=memory * 1e9)
    layout: dict[str, Any] = {"fsdp": gpus or 1}
    if parallel is not None:
        from minillama.parallel import Layout

        parsed = Layout.parse(parallel)
        if gpus is not None and parsed.processes != gpus:
            raise ValueError(
                f"--parallel {parallel} takes {parsed.processes} devices, and --gpus is {gpus}: change one."
            )
        layout = asdict(parsed)
    run = Run(
        config=config, device=place, **layout, micro_batch=micro_batch, **({"context": context} if context else {}),
        **({} if tokens is None else {"tokens": count("--tokens", tokens)}), optimizer=optimizer,
        precision=precision or ("float32" if name == "laptop" else "bfloat16"), checkpointing=checkpointing,
        utilisation=utilisation,
    )  # fmt: skip
    if run.at_once > MOST:
        raise ValueError(f"a pass has more than {MOST:.0e} tokens: take fewer devices or a smaller --micro-batch.")
    if batch is not None:
        passes = count("--batch", batch) / run.at_once
        if passes <= 0.5:
            raise ValueError(f"--batch is {batch}, expected {run.at_once} tokens, those of one pass, or more.")
        run = replace(run, batch=run.at_once * round(passes))
    made = make(run)
    if json:
        print(dumps({"run": asdict(run), "plan": asdict(made), "peak": made.memory.peak}, indent=2))
        return
    print(f"{preset}, {table(run, made)}\n")
    nearest = fitting(run)
    if made.fits:
        print("It fits.")
    elif nearest is None:
        print("It does not fit, nor does anything near it: take devices with more memory, or a smaller --preset.")
    else:
        print(f"It does not fit. This does, with {memory_of(nearest).peak / 1e9:,.2f} GB: {options(run, nearest)}")


def count(name: str, text: str) -> int:
    """How many tokens: 4096, 300M or 1.4T. Raises ValueError for anything else."""
    found = re.fullmatch(r"([\d,]{0,20}\.?\d{1,20}(?:e\d\d?)?)([kmbt]?)", text.strip().lower())
    if not found:
        raise ValueError(f"{name} is {text!r:.40}, expected a number of tokens, as 4096, 300M or 1.4T.")
    return round(float(found[1].replace(",", "")) * SUFFIXES[found[2]])


def short(number: float) -> str:
    """Three digits and a suffix: 1.4 T."""
    scale, suffix = next(
        ((10.0**power, unit) for power, unit in ((12, " T"), (9, " G"), (6, " M")) if number >= 10**power), (1, "")
    )
    return f"{number / scale:,.{2 if scale > 1 and number / scale < 100 else 0}f}{suffix}"


def time_of(days: float) -> str:
    return f"{days:12,.1f} days" if days >= 2 else f"{24 * days:12,.2f} hours"


def energy(megawatt_hours: float) -> str:
    return f"{megawatt_hours:12,.1f} MWh" if megawatt_hours >= 1 else f"{1000 * megawatt_hours:12,.3f} kWh"


def options(run: "Run", other: "Run") -> str:
    """What to type for another run, as far as it differs."""
    words = {
        f"--micro-batch {other.micro_batch}": run.micro_batch != other.micro_batch,
        f"--context {other.context}": run.context != other.context,
        "--checkpointing": run.checkpointing != other.checkpointing,
        f"--batch {other.batch}": other.batch != (other.at_once if run.passes == 1 else run.batch),
        "--device laptop": run.device.name == "laptop" and other.devices > 1,  # with --gpus, left out is a100
        f"--gpus {other.devices} --parallel dp={other.dp},fsdp={other.fsdp},tp={other.tp}": (
            (run.dp, run.fsdp, run.tp) != (other.dp, other.fsdp, other.tp)
        ),
    }
    return " ".join(word for word, differs in words.items() if differs)


def table(run: "Run", made: "Plan") -> str:
    """The plan as lines with units."""
    memory, place = made.memory, run.device
    layout = ", ".join(f"{name}={n}" for name in ("dp", "fsdp", "tp") if (n := getattr(run, name)) > 1)
    parts = {f.name: getattr(memory, f.name) for f in fields(memory) if f.name != "passes"}
    return "\n".join([
        f"{made.parameters:,} parameters, on {short(run.tokens)} tokens in {run.precision} with {run.optimizer}"
        f"{' and checkpointing' if run.checkpointing else ''}",
        f"{run.devices:,} × {place.name}{f' ({layout})' if layout else ''}; a step is {run.batch:,} tokens, in "
        f"{run.passes:,} × {run.dp * run.fsdp * run.micro_batch:,} sequences of {run.context:,}",
        "",
        "memory of a device",
        *(f"  {name:18}{size / 1e9:12,.3f} GB" for name, size in parts.items()),
        f"  {'at the peak':18}{memory.peak / 1e9:12,.3f} GB of {place.memory / 1e9:,.0f}"
        f"{' (gradients come as activations go)' if run.passes == 1 else ''}",
        f"  {'(to write: cache)':18}{made.kv_cache / 1e9:12,.3f} GB for {run.context:,} tokens",
        "",
        f"time, at {run.utilisation:.0%} of the peak",
        f"  {'a token':18}{short(made.flops_per_token):>14} FLOP",
        f"  {'a step':18}{made.step_seconds:12,.3f} s",
        f"  {'tokens':18}{made.tokens_per_second:10,.0f}   a second, {short(made.tokens_per_day)} a day",
        f"  {'the run':18}{time_of(made.days)}, {made.device_hours:,.1f} device-hours",
        f"  {'energy':18}{energy(made.megawatt_hours)}, at {place.watts:g} W and {run.pue:g} × for the building",
        *(["", "sent by a device in a step"] if any(made.sent.values()) else []),
        *(f"  {name:18}{size / 1e9:12,.3f} GB" for name, size in made.sent.items() if size),
        "",
        "tokens that suit its size (20 a parameter, and two fits of the same law)",
        *(f"  {name:18}{short(tokens):>14}" for name, tokens in made.optimal.items()),
    ])  # fmt: skip
