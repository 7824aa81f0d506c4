"""`minillama bench`: how fast this machine runs a model, beside how fast it could."""

import sys
from typing import Annotated

import typer

from minillama.cli.app import Device, app, best_device

Checkpoint = Annotated[str, typer.Argument(help="toy, smollm2, a folder or a .gguf file.")]


@app.command(rich_help_panel="Look")
def bench(checkpoint: Checkpoint = "smollm2", device: Device = None) -> None:
    """Measure how fast this machine writes and reads with a model, in every dtype, and what its memory would allow.

    [bold]Examples[/bold]
      minillama bench
      minillama bench ~/models/Llama-3.2-1B --device cuda
    """
    import torch
    from tqdm import tqdm

    from minillama import load, roofline
    from minillama.checkpoint.load import check_device
    from minillama.checkpoint.memory import DTYPES

    place = check_device(device or best_device())
    dtypes = [name for name in DTYPES if name != "float16" or place.type != "cpu"]  # processors do not compute in it
    lines = []
    with tqdm(total=2 + 2 * len(dtypes), desc="measuring", disable=not sys.stderr.isatty(), leave=False) as bar:
        bandwidth = roofline.memory_bandwidth(place)
        bar.update()
        peaks = {name: roofline.peak_flops(getattr(torch, name), place) for name in ("float32", "bfloat16")}
        bar.update()
        for name in dtypes:
            try:
                model, _ = load(checkpoint, device=place, dtype=name)
            except ValueError as error:
                if "the weights need" not in str(error):
                    raise
                lines.append(f"{name:9} {error}")
                bar.update(2)
                continue
            size = roofline.bytes_per_token(model, roofline.POSITION)
            writes = roofline.decode_speed(model)
            bar.update()
            peak = peaks.get(name, peaks["bfloat16"])  # quantized weights multiply in bf16
            reads = roofline.prefill_speed(model)
            bar.update()
            unscored = 2 * model.config.vocab_size * model.config.dim * (roofline.PROMPT - 1) / roofline.PROMPT
            flops = reads * (model.config.flops_per_token(roofline.PROMPT // 2) - unscored)  # only the last is scored
            lines.append(f"{name:9} {size / 1e6:10,.0f} MB {writes:10,.0f} {writes * size / bandwidth:8.0%}"
                         f" {reads:14,.0f} {flops / peak:8.0%}")  # fmt: skip
            del model
    threads = f", {torch.get_num_threads()} threads" if place.type == "cpu" else ""
    print(f"{place}{threads}: reads {bandwidth / 1e9:,.0f} GB/s; multiplies {peaks['float32'] / 1e9:,.0f} GFLOP/s in "
          f"float32, {peaks['bfloat16'] / 1e9:,.0f} in bfloat16")  # fmt: skip
    print(f"\n{checkpoint}\n{'':9} {'read a token':>13} {'writes':>10} {'of limit':>8} {'reads':>14} {'of limit':>8}")
    print(*lines, sep="\n")
    print("\nIn tokens a second.",
          f"Writing one token behind {roofline.POSITION} others is limited by the reading of memory,\n"
          f"reading a prompt of {roofline.PROMPT} by the multiplying of matrices.")  # fmt: skip
