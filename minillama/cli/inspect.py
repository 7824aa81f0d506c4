"""`minillama inspect`: what a checkpoint holds, without loading it."""

from typing import Annotated

import typer

from minillama.cli.app import app

Checkpoint = Annotated[str, typer.Argument(help="toy, smollm2, a folder or a .gguf file.")]


@app.command(rich_help_panel="Look")
def inspect(
    checkpoint: Checkpoint,
    tensors: Annotated[bool, typer.Option("--tensors", help="A line for each tensor as well.")] = False,
) -> None:
    """Say what a checkpoint holds and what it needs, without reading its weights.

    [bold]Examples[/bold]
      minillama inspect smollm2
      minillama inspect ~/models/Llama-3.2-1B --tensors
    """
    from collections import Counter

    from minillama.checkpoint.load import find_checkpoint, open_checkpoint
    from minillama.checkpoint.memory import DTYPES, free_memory, needed_memory
    from minillama.config import PRESETS

    path = find_checkpoint(checkpoint)
    opened = open_checkpoint(path)
    config = opened.config
    on_disk = sum(file.stat().st_size for file in ([path] if path.is_file() else path.iterdir()) if file.is_file())
    print(f"{path}: {on_disk / 1e6:,.1f} MB on disk")
    same = [name for name, preset in PRESETS.items() if preset == config]
    print(f"{config.n_params():,} parameters{f', the shape of {same[0]}' if same else ''}")
    for name, value in config.to_dict().items():
        print(f"  {name:15} {value}")
    kinds = Counter(stored.dtype for stored in opened.tensors)
    print(f"{len(opened.tensors)} tensors: {', '.join(f'{count} {kind}' for kind, count in kinds.most_common())}")
    if opened.tokenizer:
        kind = type(opened.tokenizer).__name__.removesuffix("Tokenizer")
        print(f"{opened.tokenizer.vocab_size:,} tokens, {kind}")
    else:
        print("no tokenizer")
    free = free_memory()
    for name in DTYPES:
        weights = needed_memory(config, name)
        cache = config.kv_cache_bytes(1, config.max_seq_len, "float32" if name == "float32" else "bfloat16")
        more = "" if weights <= free else " (more than is free here)"
        print(f"in {name:9}{weights / 1e9:8.2f} GB{more}, and {cache / 1e9:.2f} GB for {config.max_seq_len:,} tokens")
    if tensors:
        for stored in opened.tensors:
            print(f"{stored.key:50} {stored.dtype:5} {'×'.join(map(str, stored.shape)):>15}  → {stored.name}")
