"""`minillama finetune`: teach a model to answer, by chats of your own or by the toy world's tasks."""

import hashlib
import sys
from pathlib import Path
from typing import Annotated

import typer

from minillama.cli.app import Device, app, best_device, load_checkpoint, option
from minillama.cli.train import claim, quick_precision
from minillama.cli.write import Checkpoint

VALIDATION_TASKS = 256


@app.command(rich_help_panel="Learn")
def finetune(
    checkpoint: Checkpoint = "toy",
    device: Device = None,
    precision: Annotated[
        str | None,
        option("Model", "float32, or bfloat16 for matrix products; left out: bfloat16 if the device is quick at it."),
    ] = None,
    data: Annotated[Path | None, option("Data", "Chats of your own, a file in JSON lines.")] = None,
    task: Annotated[
        str | None, option("Data", "Or the toy world's: mood, question, summary, translation, story; left out: all.")
    ] = None,
    renew: Annotated[
        int | None, option("Model", "Blocks, the last ones, that begin anew; for what a model resists to learn.", min=0)
    ] = None,
    lora: Annotated[int | None, option("LoRA", "Train corrections of this rank only; left out: all weights.")] = None,
    alpha: Annotated[float | None, option("LoRA", "They count alpha / rank times; left out: twice the rank.")] = None,
    targets: Annotated[
        str | None, option("LoRA", "Of wq,wk,wv,wo,gate,up,down; left out: wq,wv.", show_default=False)
    ] = None,
    out: Annotated[
        Path | None, option("Run", "Its folder; left out: runs/CHECKPOINT-DATA.", show_default=False)
    ] = None,
    steps: Annotated[int | None, option("Run", "How often the weights are nudged.", show_default="500")] = None,
    batch_size: Annotated[int | None, option("Run", "Chats in a step.", min=1, show_default="16")] = None,
    learning_rate: Annotated[float | None, option("Run", "Its peak.", show_default="0.001")] = None,
    seed: Annotated[int, option("Run", "For the order of the data, and what else is drawn.")] = 0,
) -> None:
    """Teach a model to answer: only what the assistant says is learned.

    A line of the file is a chat: {"messages": [{"role": "user", "content": "…"},
    {"role": "assistant", "content": "…"}]}. The last tenth of the chats, at least
    one, is held out to validate with. Ctrl-C saves and stops; the same command
    goes on from there. Losses are in nats per token of the answers.

    The toy learns one task (all its weights, no --lora) by a recipe that takes
    two cores less than 3 minutes; what you give of --steps, --batch-size,
    --learning-rate and --renew counts instead.

    [bold]Examples[/bold]
      minillama finetune
      minillama finetune --task question
      minillama eval --task question --checkpoint runs/toy-question/step-1050
      minillama finetune --checkpoint smollm2 --data chats.jsonl --lora 8
      minillama chat --checkpoint smollm2 --adapter runs/smollm2-chats-lora/step-500
    """
    if data is not None and task is not None:
        raise ValueError(
            f"--data is {data} and --task is {task}, but a run learns from one of them: leave the other out."
        )
    task = task or ("all" if data is None else None)
    for name, value in (("--alpha", alpha), ("--targets", targets)):
        if value is not None and lora is None:
            raise ValueError(
                f"{name} is {value}, but there is no --lora that it is meant for: give one, or leave it out."
            )
    if renew and lora is not None:
        raise ValueError(f"--renew is {renew} and --lora is {lora}, but LoRA keeps all weights: leave one of them out.")
    import torch

    from minillama.checkpoint.load import check_device
    from minillama.checkpoint.memory import free_memory
    from minillama.data import Validation
    from minillama.finetune import (
        KINDS,
        RECIPES,
        ChatBatches,
        LoraTrainer,
        Recipe,
        TaskBatches,
        add_lora,
        chat_rows,
        pack,
        task_validation,
    )
    from minillama.finetune import renew as begin_anew
    from minillama.trainer import Trainer, TrainSettings, checkpoints

    usual = Recipe(500, 16, 1e-3, 0)
    if checkpoint == "toy" and lora is None:
        usual = RECIPES.get(task or "", usual)
    steps = usual.steps if steps is None else steps
    batch_size = usual.batch_size if batch_size is None else batch_size
    learning_rate = usual.learning_rate if learning_rate is None else learning_rate
    renew = (usual.renewed if renew is None else renew) or None
    place = check_device(device or best_device())
    settings = TrainSettings(
        steps=steps, learning_rate=learning_rate, warmup=0 if lora is None else min(50, max(0, steps) // 10),
        optimizer="muon" if lora is None else "adamw", precision=precision or quick_precision(place.type),
    )  # fmt: skip
    model, tokenizer = load_checkpoint(checkpoint, str(place), "float32")
    if lora is None and place.type == "cpu" and (needed := model.config.training_bytes()) > (free := free_memory()):
        raise ValueError(
            f"{checkpoint} needs {needed / 1e9:,.1f} GB to train, and {free / 1e9:,.1f} GB are free: try --lora 8."
        )
    batches: ChatBatches | TaskBatches
    if data is None:
        if task not in ("all", *KINDS):
            raise ValueError(f"--task is {task!r:.40}, expected all or one of {', '.join(KINDS)}.")
        kinds = KINDS if task == "all" else (task,)
        batches = TaskBatches(tokenizer, kinds, batch_size, steps, seed)
        validation = task_validation(tokenizer, kinds, VALIDATION_TASKS, seed)
        rows, content = [], batches(0).inputs
    else:
        rows = chat_rows(data, tokenizer, model.config.max_seq_len)
        if len(rows) < 2:
            raise ValueError(f"{data} has 1 chat, expected 2 at least: one to learn from and one to validate with.")
        cut = len(rows) - max(1, len(rows) // 10)
        batches = ChatBatches(rows[:cut], tokenizer.pad_id, batch_size, seed)
        held = [pack(rows[i : i + batch_size], tokenizer.pad_id) for i in range(cut, len(rows), batch_size)]
        validation, content = Validation(held), torch.cat([row.inputs for row in rows])
        print(f"{cut} chats to learn from; the last {len(rows) - cut} are held out to validate with.", file=sys.stderr)
    name = f"{Path(checkpoint).stem}-{task or data.stem}" + ("" if lora is None else "-lora")  # type: ignore[union-attr]
    out = out or Path("runs") / name
    run = {"checkpoint": checkpoint, "seed": seed, "batch_size": batch_size, "renew": renew,
           "data": f"{task or data} {hashlib.sha256(content.numpy().tobytes()).hexdigest()[:8]}"}  # fmt: skip
    torch.manual_seed(seed)
    kind = Trainer
    if lora is not None:
        alpha, chosen = 2 * lora if alpha is None else alpha, (targets or "wq,wv").split(",")
        model, kind = add_lora(model, lora, alpha, chosen), LoraTrainer
        run |= {"lora": lora, "alpha": alpha, "targets": ",".join(chosen)}
    if renew is not None:
        model = begin_anew(model, renew, seed)
    claim(out, run)
    trainer = kind(model, tokenizer, batches, settings, out, validation)
    try:
        trainer.run()
    except KeyboardInterrupt as stopped:
        print(f"minillama: {stopped or 'stopped; the same command goes on from the last checkpoint'}.", file=sys.stderr)
        raise typer.Exit(130) from None
    print(f"Validation loss: {trainer.records[-1]['validation']:.4f} nats per token of the answers.")
    last = checkpoints(out)[-1]
    chosen_model = f"--checkpoint {last}" if lora is None else f"--checkpoint {checkpoint} --adapter {last}"
    print(f"To talk with it: minillama chat {chosen_model}")
