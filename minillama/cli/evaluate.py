"""`minillama eval`: how good a model is, how sure that is, and which of two is better."""

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from minillama.cli.app import Device, app, from_utf8, load_checkpoint, option

if TYPE_CHECKING:
    from minillama.evaluate import Difference, Question, Score
    from minillama.model import Llama
    from minillama.tokenizer import Tokenizer

TASKS = ("perplexity", "choice", "mood", "question", "summary", "translation")


@app.command("eval", rich_help_panel="Look")
def evaluate(
    task: Annotated[str, option("Task", f"{', '.join(TASKS[:-1])} or {TASKS[-1]}.")] = "perplexity",
    checkpoint: Annotated[
        list[str] | None,
        option(
            "Model", "toy, smollm2, a folder or a .gguf file; a second one is compared with it.", show_default="toy"
        ),
    ] = None,
    device: Device = None,
    adapter: Annotated[
        Path | None, option("Model", "A folder with a LoRA adapter, of two models for the second.", show_default=False)
    ] = None,
    dtype: Annotated[str, option("Model", "float32, bfloat16, float16, int8 or int4.")] = "float32",
    text: Annotated[Path | None, option("Task", "For perplexity: a UTF-8 file; left out: stories.")] = None,
    data: Annotated[Path | None, option("Task", "For choice: a file of questions, one a line of JSON.")] = None,
    count: Annotated[
        int | None, option("Task", "So many stories, or tasks about one each.", show_default="200")
    ] = None,
    heldout: Annotated[bool, option("Task", "Stories with facts that no training text has.")] = False,
    shots: Annotated[int, option("Task", "So many worked examples before each task.")] = 0,
    seed: Annotated[int | None, option("Task", "The same seed, the same stories.", show_default="0")] = None,
    out: Annotated[Path | None, option("Task", "Write everything to this file, as JSON.")] = None,
) -> None:
    """Measure how good a model is at a task, with the interval that 95 % of resamples of its examples lie in.

    With two checkpoints, both do the same examples, and the difference has an
    interval too. A question is {"question": "The sky is", "choices": ["blue",
    "a fish"], "answer": 0}, where 0 is the index of the right choice.

    [bold]Examples[/bold]
      minillama eval
      minillama eval --text book.txt --checkpoint toy --checkpoint smollm2
      minillama eval --task choice --data questions.jsonl --checkpoint smollm2
      minillama eval --task mood --heldout --checkpoint runs/mine --out mood.json
      minillama eval --task mood --checkpoint smollm2 --adapter runs/mine/step-500
    """
    names = checkpoint or ["toy"]
    _check(task, names, text, data, {"--count": count, "--seed": seed, "--heldout": heldout, "--shots": shots})
    content: str | list[Question] | None = None
    if text:
        content = from_utf8(text.read_bytes(), str(text))
    elif data:
        from minillama.evaluate import read_questions

        content = read_questions(data)
    count, seed = 200 if count is None else count, seed or 0
    settings = {"count": count, "seed": seed, "heldout": heldout}
    results, scores = [], []
    try:
        for name, correction in zip(names, [*[None] * (len(names) - 1), adapter], strict=True):
            model, tokenizer = load_checkpoint(name, device, dtype, correction)
            found, details = _run(model, tokenizer, task, content, settings, shots)
            del model
            scores.append(found)
            which = {"checkpoint": name} | ({"adapter": str(correction)} if correction else {})
            results.append(which | {"scores": {key: _said(score) for key, score in found.items()}} | details)
    except KeyboardInterrupt:
        print("minillama: stopped; nothing was written.", file=sys.stderr)
        raise typer.Exit(130) from None
    differences = _differences(scores, results)
    if adapter is not None:
        names = [*names[:-1], f"{names[-1]} + {adapter}"]
    print(_table(names, scores, differences))
    for name, details in zip(names, results, strict=True):
        if "tokens" in details:
            print(f"{name}: {details['tokens']:,} tokens, {details['bytes']:,} bytes")
    if out:
        made_of = {"text": str(text)} if text else {"data": str(data)} if data else settings | {"shots": shots}
        report = {"task": task, **made_of, "dtype": dtype, "results": results}
        if differences:
            report["differences"] = {key: difference._asdict() for key, difference in differences.items()}
        unfinished = out.with_name(f".{out.name}.tmp")
        unfinished.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(unfinished, out)


def _check(task: str, names: list[str], text: Path | None, data: Path | None, drawn: dict[str, Any]) -> None:
    """What does not fit together is refused before anything is loaded."""
    if task not in TASKS:
        raise ValueError(f"--task is {task!r}, expected {', '.join(TASKS[:-1])} or {TASKS[-1]}.")
    if len(names) > 2:
        raise ValueError(f"there are {len(names)} checkpoints, expected one, or two to compare.")
    if text and task != "perplexity":
        raise ValueError(f"--text is {text}, but the task is {task}: it is for perplexity.")
    if data and task != "choice":
        raise ValueError(f"--data is {data}, but the task is {task}: it is for choice.")
    if task == "choice" and not data:
        raise ValueError("the task choice has no questions: give a file of them with --data.")
    for option_, value in drawn.items():
        if (text or data) and value not in (None, False, 0):
            raise ValueError(f"{option_} is given, but {text or data} is read whole: leave one of the two out.")
    if drawn["--shots"] and task == "perplexity":
        raise ValueError(f"--shots is {drawn['--shots']}, but perplexity has no examples to show: leave it out.")
    if drawn["--count"] is not None and drawn["--count"] < 1:
        raise ValueError(f"--count is {drawn['--count']}, expected at least 1.")


def _run(
    model: "Llama", tokenizer: "Tokenizer", task: str, content: "str | list[Question] | None",
    settings: dict[str, Any], shots: int,
) -> "tuple[dict[str, Score], dict[str, Any]]":  # fmt: skip
    """The scores of one model, and what else to write down."""
    from minillama import evaluate

    if isinstance(content, list):
        chosen = evaluate.choose(model, tokenizer, content)
        return dict(chosen.scores), {"log_likelihoods": chosen.log_likelihoods}
    if task == "perplexity":
        if content is None:
            parts = evaluate.story_perplexities(model, tokenizer, **settings)
        else:
            parts = evaluate.perplexity(model, tokenizer, content).blocks()
        sums = {"tokens": sum(part.tokens for part in parts), "bytes": sum(part.bytes for part in parts)}
        return evaluate.perplexity_scores(parts), sums
    done = evaluate.run_task(model, tokenizer, task, **settings, shots=shots)
    return dict(done.scores), {"examples": [example._asdict() for example in done.examples]}


def _differences(scores: "list[dict[str, Score]]", results: list[dict[str, Any]]) -> "dict[str, Difference]":
    """The second model's scores above the first's. Perplexity per token says nothing where tokens are not the same."""
    from minillama.evaluate import paired

    if len(scores) < 2:
        return {}
    same = results[0].get("tokens") == results[1].get("tokens")
    return {name: paired(scores[1][name], scores[0][name]) for name in scores[0] if name != "perplexity" or same}


def _said(score: "Score") -> dict[str, Any]:
    from minillama.evaluate import bootstrap

    signature = {"signature": score.signature} if score.signature else {}
    return bootstrap(score)._asdict() | {"examples": len(score)} | signature


def _table(names: "list[str]", scores: "list[dict[str, Score]]", differences: "dict[str, Difference]") -> str:
    """A line for each score: of each model, and by how much the second is above the first."""
    from minillama.evaluate import bootstrap

    compared = [f"{'difference':>30}  {'flips':>6}"] if differences else []
    heads = [name if len(name) <= 30 else f"…{name[-29:]}" for name in names]
    lines = ["  ".join([f"{'':13}", *(f"{head:>30}" for head in heads), *compared])]
    for name in scores[0]:
        cells = [_cell(*bootstrap(found[name])) for found in scores]
        if name in differences:
            value, low, high, flips = differences[name]
            cells += [_cell(value, low, high, "+"), f"{flips:6.1%}"]
        lines.append("  ".join([f"{name:13}", *cells]))
    return "\n".join(lines) + f"\n{len(scores[0][name])} examples; in brackets, 95 % of their resamples."


def _cell(value: float, low: float, high: float, sign: str = "") -> str:
    return f"{f'{value:{sign}.4g} ({low:{sign}.4g} to {high:{sign}.4g})':>30}"
