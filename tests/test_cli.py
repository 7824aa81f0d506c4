"""The command line: what each command does, and that bad input is one sentence, exit code 2, and leaves no trace."""

import hashlib
import importlib.metadata
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import typer
from safetensors.torch import load_file, save_file

import minillama
from minillama import Llama, ModelConfig, world
from minillama.checkpoint import load, memory, save
from minillama.cli import app, main
from minillama.cli import doctor as doctor_file
from minillama.cli import train as train_file
from minillama.cli import write as write_file
from minillama.tokenizer import BYTE_OF, BPETokenizer, SentencePieceTokenizer
from minillama.trainer import Trainer

ROOT = Path(__file__).resolve().parents[1]
CONTEXT = 64
STORIES = [world.sample(random.Random(seed)).text for seed in range(40)]


class Result(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Result]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """`minillama` in this process: run("generate", "Once", stdin=b"")."""

    def run_here(*arguments: object, stdin: bytes = b"") -> Result:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        with pytest.raises(SystemExit) as stopped:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Result(stopped.value.code or 0, captured.out, captured.err)

    return run_here


def start(*arguments: object, **options) -> subprocess.Popen:
    """`minillama` in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TERM": "dumb"}
    command = [sys.executable, "-m", "minillama.cli", *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, **options)


def tiny_model(tokenizer, vocab_size: int | None = None, max_seq_len: int = CONTEXT) -> Llama:
    """Weights large enough that it says something else after each token."""
    config = ModelConfig(
        dim=24, n_layers=2, n_heads=6, n_kv_heads=2, head_dim=6, ffn_dim=20,
        vocab_size=vocab_size or tokenizer.vocab_size, max_seq_len=max_seq_len,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    model = Llama(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.3, generator=generator)
        model.output.weight[list(tokenizer.stop_ids)] = 0  # it seldom stops by itself
    return model


@pytest.fixture(scope="session")
def tokenizer() -> SentencePieceTokenizer:
    return SentencePieceTokenizer.train(STORIES, vocab_size=400)


@pytest.fixture(scope="session")
def checkpoint(tokenizer: SentencePieceTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny"
    save(tiny_model(tokenizer), tokenizer, folder)
    return folder


@pytest.fixture(scope="session")
def book(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "book.txt"
    path.write_text("\n".join(STORIES), encoding="utf-8")
    return path


def digests(*folders: Path) -> dict[Path, str]:
    files = [path for folder in folders for path in folder.rglob("*")]
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "" for path in files}


def assert_one_sentence(result: Result, expected: str) -> None:
    assert result.code == 2, result
    assert re.fullmatch(r"minillama: [^\n]+\n", result.err), result.err
    assert re.search(expected, result.err), result.err
    assert "Traceback" not in result.err and result.out == ""


# Help


def test_every_command_and_option_is_explained_with_examples_and_defaults(run: Run) -> None:
    assert [f"{name} " in run().out for name in ("doctor", "generate", "chat", "train")] == [True] * 4
    commands = dict(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    group = commands.pop("data")
    commands |= {f"data {name}": command for name, command in group.commands.items()}
    for name, command in commands.items():
        for parameter in command.params:
            assert getattr(parameter, "help", None) or parameter.name == "help", f"{name}: {parameter.name}"
        bare = "" if any(parameter.required for parameter in command.params) else r" *\n"
        assert name == "doctor" or re.search(
            rf"Examples *\n +minillama {name}\b{bare}", run(*name.split(), "--help").out
        )
    assert "[default: (0.8)]" in run("generate", "--help").out
    assert "[default: muon]" in run("train", "--help").out


def test_help_needs_no_torch_and_has_no_colour_codes_where_there_is_no_terminal() -> None:
    code = (
        "import sys\n"
        "from minillama.cli import main\n"
        "try: main(['generate', '--help'])\n"
        "finally: assert not {'torch', 'numpy', 'transformers'} & sys.modules.keys()"
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("FORCE_COLOR", "PY_COLORS", "GITHUB_ACTIONS")}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert b"--max-new-tokens" in done.stdout and b"\x1b" not in done.stdout


def test_version_says_which_torch(run: Run) -> None:
    result = run("--version")
    assert result.code == 0 and f"torch {importlib.metadata.version('torch')}\n" in result.out


def test_what_the_terminal_cannot_show_becomes_a_question_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_file, "_checks", lambda: iter([("Python", lambda: "中", True, "")]))
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    with pytest.raises(SystemExit) as stopped:
        main(["doctor"])
    sys.stdout.flush()
    assert stopped.value.code == 0 and sys.stdout.buffer.getvalue().startswith(b"? Python: ?\n")  # type: ignore[attr-defined]


# doctor


@pytest.fixture
def healthy(monkeypatch: pytest.MonkeyPatch, tokenizer: SentencePieceTokenizer) -> Callable[[str], None]:
    """A machine on which everything is there. Call it with what shall be missing."""
    missing = ""

    def version(name: str) -> str:
        if name == missing:
            raise importlib.metadata.PackageNotFoundError(name)
        return "1.2.3"

    def load_checkpoint(name: str, *_: object) -> tuple:
        if name == missing:
            raise ValueError(f"{name} is not installed")
        return tiny_model(tokenizer), tokenizer

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(doctor_file, "load_checkpoint", load_checkpoint)
    monkeypatch.setattr(memory, "free_memory", lambda: 1e9 if missing == "memory" else 9e9)

    def without(name: str) -> None:
        nonlocal missing
        missing = name

    return without


def test_doctor_on_a_healthy_machine(run: Run, healthy: Callable[[str], None]) -> None:
    result = run("doctor")
    assert result.code == 0 and result.err == ""
    assert "✗" not in result.out and result.out.endswith("The course can run.\n")
    for line in (r"torch: 1\.2\.3", r"cpu: \d+ threads, \d.* in float32 and \d.* in bfloat16", r"toy: .* ms for one"):
        assert re.search(rf"^✓ {line}", result.out, re.MULTILINE), result.out


@pytest.mark.parametrize(
    "missing, code, line",
    [
        ("jupyterlab", 1, r"✗ jupyterlab: .*\n  → type `make lab`, or `pip install"),
        ("toy", 1, r"✗ toy: toy is not installed\n  → type `make toy`"),
        ("smollm2", 0, r"✗ smollm2: smollm2 is not installed\n  → .*; the course runs without it"),
        ("memory", 0, r"✗ memory: 1.0 GB free, expected at least 2\n  → close other programs"),
    ],
)
def test_doctor_says_what_is_missing_and_what_to_type(
    run: Run, healthy: Callable[[str], None], missing: str, code: int, line: str
) -> None:
    healthy(missing)
    result = run("doctor")
    assert result.code == code and result.out.count("✗") == 1 and result.err == ""
    assert re.search(line, result.out)
    assert ("The course can run." in result.out) is (code == 0)


def test_doctor_survives_whatever_goes_wrong(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(doctor_file, "_speeds", fails)
    monkeypatch.setattr(doctor_file, "load_checkpoint", fails)
    monkeypatch.setattr(doctor_file.shutil, "disk_usage", fails)
    result = run("doctor")
    assert result.code == 1 and result.err == ""
    for name in ("disk", "cpu", "toy", "smollm2"):
        assert f"✗ {name}: no kernel image is available\n  → " in result.out


# generate


def test_generate_writes_what_the_library_writes(run: Run, checkpoint: Path) -> None:
    model, tokenizer = load(checkpoint)
    texts = minillama.generate(model, tokenizer, ["Once upon"] * 2, max_new_tokens=9, temperature=0.7, top_k=50, seed=3)
    options = ["--checkpoint", checkpoint, "--max-new-tokens", 9, "--temperature", 0.7, "--top-k", 50, "--seed", 3]
    assert run("generate", "Once upon", *options) == Result(0, f"{texts[0]}\n", "")
    assert run("generate", "Once upon", *options, "--count", 2).out == f"{texts[0]}\n\n{texts[1]}\n"
    assert run("generate", *options, stdin=b"Once upon\n").out == f"{texts[0]}\n"
    assert run("generate", "-", *options, stdin=b"Once upon\r\n").out == f"{texts[0]}\n"
    likeliest = minillama.generate(model, tokenizer, "Once upon", max_new_tokens=9, beams=3)
    assert run("generate", "Once upon", *options[:4], "--beams", 3).out == f"{likeliest}\n"


def test_generate_without_a_prompt_starts_from_bos(run: Run, checkpoint: Path) -> None:
    model, tokenizer = load(checkpoint)
    text = minillama.generate(model, tokenizer, "", max_new_tokens=5, temperature=0.8, seed=1)
    assert run("generate", "--checkpoint", checkpoint, "--max-new-tokens", 5, "--seed", 1).out == f"{text}\n"


def test_generate_stops_before_a_stop_text(run: Run, checkpoint: Path) -> None:
    options = ["--checkpoint", checkpoint, "--max-new-tokens", 9, "--seed", 3]
    whole = run("generate", "Once", *options).out
    stop = whole[10:13]
    assert run("generate", "Once", *options, "--stop", stop).out == whole[: whole.index(stop, 4)] + "\n"


def test_generate_shows_each_piece_at_once(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        shown = ""

        def flush(self) -> None:
            self.shown = self.getvalue()

    terminal, seen = Terminal(), []

    def pieces(*_: object, **__: object) -> Iterator[str]:
        for word in (" upon", " a time"):
            yield word
            seen.append(terminal.shown)

    monkeypatch.setattr(minillama, "generate", pieces)
    monkeypatch.setattr(sys, "stdout", terminal)
    with pytest.raises(SystemExit):
        main(["generate", "Once", "--checkpoint", str(checkpoint)])
    assert seen == ["Once upon", "Once upon a time"]


def test_the_toy_world_judges_a_story() -> None:
    assert write_file._verdict(STORIES[0]) == (
        f"✓ The toy world tells this story; its log-probability is {world.log_prob(STORIES[0]):.2f}."
    )
    assert re.search(r"✗ The toy world does not tell .*: .* \(at character \d+\)\.$", write_file._verdict("Once upon"))


def test_generate_gives_a_verdict_for_each_story(run: Run, checkpoint: Path) -> None:
    options = ["--checkpoint", checkpoint, "--max-new-tokens", 5, "--judge"]
    assert run("generate", *options).out.count("\n✗ The toy world") == 1
    assert run("generate", *options, "--count", 3).out.count("\n✗ The toy world") == 3


# chat


@pytest.fixture
def prompts(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """What the model is given, one entry for each answer; its answers are A1, A2 and so on."""
    given: list[list[int]] = []

    def answer(model: Llama, tokenizer: object, ids: list[int], **options: object) -> Iterator[str]:
        assert options["stream"]
        given.append(ids)
        return iter(["A", str(len(given))])

    monkeypatch.setattr(minillama, "generate", answer)
    return given


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def test_chat_answers_each_line_and_remembers_the_talk(
    run: Run, checkpoint: Path, tokenizer: SentencePieceTokenizer, prompts: list[list[int]]
) -> None:
    options = ["--checkpoint", checkpoint, "--max-new-tokens", 9, "--system", "be"]
    result = run("chat", *options, stdin=b"a\n\nb\n/reset\nc\n/quit\nd\n")
    assert result == Result(0, "A1\nA2\nA3\n", "")
    system = [{"role": "system", "content": "be"}]
    assert prompts == [tokenizer.chat(system + talk) for talk in (turns("a"), turns("a", "A1", "b"), turns("c"))]


def test_chat_forgets_the_oldest_turns_and_says_so(
    run: Run, checkpoint: Path, tokenizer: SentencePieceTokenizer, prompts: list[list[int]]
) -> None:
    lines = [f"the kite number {i}" for i in range(5)]
    result = run("chat", "--checkpoint", checkpoint, "--max-new-tokens", 9, stdin="\n".join(lines).encode())
    assert result.code == 0
    assert f"(The context holds {CONTEXT} tokens: the oldest question and its answer are forgotten.)\n" in result.out
    assert max(map(len, prompts)) <= CONTEXT - 9
    assert prompts[-1] in [tokenizer.chat(turns(*kept)) for kept in ([lines[4]], [lines[3], "A4", lines[4]])]


def test_chat_with_a_real_model_in_the_loop(run: Run, checkpoint: Path) -> None:
    result = run("chat", "--checkpoint", checkpoint, "--max-new-tokens", 4, "--seed", 0, stdin=b"the kite\n")
    model, tokenizer = load(checkpoint)
    ids = tokenizer.chat(turns("the kite"))
    expected = minillama.generate(model, tokenizer, ids, max_new_tokens=4, temperature=0.2, top_p=0.9, seed=0)
    assert result == Result(0, f"{expected}\n", "")


@pytest.mark.parametrize("end", [EOFError, KeyboardInterrupt])
def test_ctrl_d_or_ctrl_c_at_the_prompt_ends_the_chat(
    checkpoint: Path, prompts: list[list[int]], end: type, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    typed = iter(["hello"])

    def read(prompt: str) -> str:
        assert prompt == "> "
        for line in typed:
            return line
        raise end

    monkeypatch.setattr(sys, "stdin", io.StringIO())
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    monkeypatch.setattr("builtins.input", read)
    with pytest.raises(SystemExit) as stopped:
        main(["chat", "--checkpoint", str(checkpoint)])
    assert not stopped.value.code and capsys.readouterr() == ("A1\n\n", "")


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
def test_ctrl_c_stops_the_answer_and_keeps_the_talk(tokenizer: SentencePieceTokenizer, tmp_path: Path) -> None:
    import pty

    save(tiny_model(tokenizer, max_seq_len=100_000), tokenizer, tmp_path / "talker")
    ours, theirs = pty.openpty()
    options = ["--checkpoint", tmp_path / "talker", "--max-new-tokens", 50_000, "--temperature", 0]

    def controlling_terminal() -> None:  # Ctrl-C becomes a signal only on the terminal that a process belongs to
        import fcntl
        import termios

        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    process = start(
        "chat", *options, stdin=theirs, stdout=theirs, start_new_session=True, preexec_fn=controlling_terminal
    )
    os.close(theirs)
    seen = ""

    def wait_for(pattern: str) -> None:
        nonlocal seen
        deadline = time.monotonic() + 60
        while not (found := re.search(pattern, seen, re.DOTALL)):
            assert time.monotonic() < deadline, seen[-500:]
            seen += os.read(ours, 4096).decode(errors="replace")
        seen = seen[found.end() :]

    try:
        for _ in range(2):
            wait_for("> ")
            os.write(ours, b"the kite\n")
            wait_for("the kite\r?\n.{20}")  # the answer has begun
            os.write(ours, b"\x03")
            wait_for("stopped\r?\n")
        wait_for("> ")
        os.write(ours, b"\x04")
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0 and errors == b""
    finally:
        process.kill()
        os.close(ours)


# train


def training(checkpoint: Path, out: Path, *more: object) -> list[object]:
    return ["train", "--tokenizer", checkpoint, "--out", out, "--steps", 4, "--batch-size", 2, *more]


@pytest.fixture(autouse=True)
def few_stories(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_file, "VALIDATION_STORIES", 4)


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_train_on_stories_shows_floor_and_kl_and_one_sample(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    result = run(*training(checkpoint, tmp_path / "run"))
    assert result.code == 0, result.err
    loss, floor, kl = map(float, re.findall(r"(?:loss|Floor|KL): (\d\.\d{4})", result.out))
    assert abs(loss - floor - kl) < 2e-4 and 0 < floor < 1
    model, tokenizer = load(tmp_path / "run" / "step-4")
    assert minillama.generate(model, tokenizer, "", max_new_tokens=200, temperature=0.8, seed=0) in result.out
    assert f"minillama generate --checkpoint {tmp_path / 'run' / 'step-4'}" in result.out


def test_train_on_text_holds_a_tenth_of_it_out(run: Run, book: Path, tmp_path: Path) -> None:
    options = ["--text", book, "--vocab-size", 320, "--window", 16, "--steps", 2, "--batch-size", 2]
    result = run("train", *options, "--out", tmp_path / "run")
    assert result.code == 0, result.err
    assert re.search(r"Validation loss: \d\.\d{4}\. *\n", result.out) and "Floor" not in result.out
    _, tokenizer = load(tmp_path / "run" / "step-2")
    assert tokenizer is not None and tokenizer.vocab_size == 320


def test_text_is_cut_into_what_is_learned_and_what_is_held_out(book: Path, checkpoint: Path) -> None:
    _, tokenizer = load(checkpoint)
    assert tokenizer is not None
    ids = tokenizer.encode(book.read_text(encoding="utf-8"), bos=True, eos=True)
    cut = len(ids) * 9 // 10
    _, batches, validation, beginning = train_file._read([book], tokenizer, 0, batch_size=3, window=16, seed=0)
    assert batches.tokens.tolist() == ids[:cut]
    rows = [row.tolist() for batch in validation.batches for row in batch.inputs]
    assert sum(rows, []) == ids[cut : cut + 16 * len(rows)] and 1 < len(rows) <= train_file.VALIDATION_WINDOWS
    targets = [row.tolist() for batch in validation.batches for row in batch.targets]
    assert sum(targets, []) == ids[cut + 1 : cut + 16 * len(rows) + 1]
    assert beginning == tokenizer.decode(ids[cut : cut + 10])


def test_training_stopped_with_ctrl_c_goes_on_to_the_same_end(
    run: Run, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(*training(checkpoint, tmp_path / "whole"))
    one_step = Trainer._one_step

    def interrupted(trainer: Trainer) -> dict:
        if trainer.step == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return one_step(trainer)

    monkeypatch.setattr(Trainer, "_one_step", interrupted)
    result = run(*training(checkpoint, tmp_path / "run"))
    assert result.code == 130 and "Traceback" not in result.err
    assert result.err.endswith("minillama: stopped after step 2; the same command goes on from here.\n")
    monkeypatch.setattr(Trainer, "_one_step", one_step)
    assert (tmp_path / "run" / "step-2").is_dir()
    assert run(*training(checkpoint, tmp_path / "run")).code == 0
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


@pytest.mark.skipif(sys.platform == "win32", reason="Ctrl-C is no signal there")
def test_ctrl_c_in_a_terminal_ends_training_with_one_sentence(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = start(*training(checkpoint, out, "--steps", 100_000), stdout=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 60
        while not (out / "metrics.jsonl").exists() or not losses(out):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        written, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130 and written == b"" and b"Traceback" not in errors
    found = re.search(rb"\nminillama: stopped after step (\d+); the same command goes on from here\.\n$", errors)
    assert found and (out / f"step-{int(found[1])}").is_dir()


def test_other_settings_do_not_touch_a_run(run: Run, checkpoint: Path, book: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run(*training(checkpoint, out))
    before = digests(tmp_path)
    for more, expected in (
        (["--steps", 5], r"holds a run with steps 4, not 5: "),
        (["--learning-rate", 0.1], r"holds a run with learning_rate 0\.015, not 0\.1: "),
        (["--batch-size", 3], r"holds a run with batch_size 2, not 3: "),
        (["--seed", 1], r"holds a run with seed 0, not 1: "),
        (["--preset", "toy"], r"holds a run with preset toy-small, not toy: "),
        (["--text", book, "--window", 16], r"holds a run with data stories \w{8}, not book\.txt \(window 16\) \w{8}: "),
    ):
        assert_one_sentence(run(*training(checkpoint, out, *more)), re.escape(str(out)) + " " + expected)
        assert digests(tmp_path) == before


@pytest.mark.parametrize("name", ["notes.txt", "config.json", "run.json"])
def test_a_folder_that_holds_something_else_is_refused_untouched(
    run: Run, checkpoint: Path, tmp_path: Path, name: str
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("[1]")
    before = digests(tmp_path)
    for out in (tmp_path / "out", tmp_path / "out" / name):
        assert_one_sentence(run(*training(checkpoint, out)), r"is there and holds no run of .*: choose another --out")
    assert digests(tmp_path) == before


# Bad input


def damage(checkpoint: Path, kind: str) -> None:
    weights, config = checkpoint / "model.safetensors", checkpoint / "config.json"
    tensors, fields = load_file(weights), json.loads(config.read_text())
    match kind:
        case "missing":
            shutil.rmtree(checkpoint)
        case "empty folder":
            for path in checkpoint.iterdir():
                path.unlink()
        case "empty weights":
            weights.write_bytes(b"")
        case "truncated weights":
            weights.write_bytes(weights.read_bytes()[:-100])
        case "truncated tokenizer":
            path = checkpoint / "tokenizer.model"
            path.write_bytes(path.read_bytes()[:-100])
        case "tensor missing":
            del tensors["norm.weight"]
        case "tensor extra":
            tensors["blocks.2.attention.wq.weight"] = torch.zeros(2, 2)
        case "tensor mis-shaped":
            tensors["norm.weight"] = torch.zeros(25)
        case "unknown key":
            fields["n_head"] = 6
        case "impossible key":
            fields["n_kv_heads"] = 4
        case "no JSON":
            config.write_text("{")
        case "no tokenizer":
            (checkpoint / "tokenizer.model").unlink()
        case "more tokens than rows":
            fields["vocab_size"] = 399
            for name in ("embedding.weight", "output.weight"):
                tensors[name] = tensors[name][:399].clone()
    if "tensor" in kind or "rows" in kind:
        save_file(tensors, weights)
    if "key" in kind or "rows" in kind:
        config.write_text(json.dumps(fields))


@pytest.mark.parametrize("command", ["generate", "chat"])
@pytest.mark.parametrize(
    "kind, expected",
    [
        ("missing", r"there is no checkpoint '.*damaged'; expected"),
        ("empty folder", r"cannot read .*config\.json: No such file"),
        ("empty weights", r"cannot read .*model\.safetensors"),
        ("truncated weights", r"cannot read .*model\.safetensors"),
        ("truncated tokenizer", r"tokenizer\.model is damaged"),
        ("tensor missing", r"lacks norm\.weight \(1 tensors of \d+ are missing\)"),
        ("tensor extra", r"has the tensor 'blocks\.2\.attention\.wq\.weight', for which its config has no place"),
        ("tensor mis-shaped", r"norm\.weight has the shape \(25,\), but the config asks for \(24,\)"),
        ("unknown key", r"config\.json .* unknown key 'n_head'; did you mean n_heads\?"),
        ("impossible key", r"n_heads=6 and n_kv_heads=4"),
        ("no JSON", r"config\.json is not a config of ours"),
        ("no tokenizer", r"damaged has no tokenizer, so it cannot read or write text"),
        ("more tokens than rows", r"the tokenizer has 400 tokens, but the model only 399"),
    ],
)
def test_a_damaged_checkpoint_is_one_sentence(
    run: Run, checkpoint: Path, tmp_path: Path, command: str, kind: str, expected: str
) -> None:
    shutil.copytree(checkpoint, tmp_path / "damaged")
    damage(tmp_path / "damaged", kind)
    before = digests(tmp_path)
    assert_one_sentence(run(command, "--checkpoint", tmp_path / "damaged", stdin=b"the kite\n"), expected)
    assert digests(tmp_path) == before


@pytest.mark.parametrize(
    "arguments, stdin, expected",
    [
        (["generat"], b"", "No such command 'generat'"),
        (["generate", "--colour", "red"], b"", "No such option.*--colour"),
        (["generate", "--max-new-tokens", "many"], b"", "'--max-new-tokens'"),
        (["generate", "--max-new-tokens", "0"], b"", "max_new_tokens is 0"),
        (["generate", "--count", "0"], b"", "'--count'"),
        (["generate", "--temperature", "-1"], b"", "temperature is -1"),
        (["generate", "--top-p", "2"], b"", "top_p is 2"),
        (["generate", "--top-k", "0"], b"", "top_k is 0"),
        (["generate", "--min-p", "nan"], b"", "min_p is nan"),
        (["generate", "--beams", "2", "--top-k", "5"], b"", "sampling is .* beams"),
        (["generate", "--seed", "-1"], b"", "seed is -1"),
        (["generate", "--stop", ""], b"", "stop is "),
        (["generate", "--device", "abacus"], b"", "device 'abacus' is not there"),
        (["generate", "--dtype", "float12"], b"", "dtype is 'float12', expected one of float32"),
        (["generate", "-"], b"Once \xff", "standard input is not UTF-8: byte 5 is 0xff"),
        (["generate"], b"Once \xff", "standard input is not UTF-8: byte 5 is 0xff"),
        (["generate", "Once \udcff"], b"", r"the text has '\\udcff' at position \d: half of a surrogate"),
        (["generate"], "很长".encode() * CONTEXT, rf"the prompt has \d+ tokens, but the model's context is {CONTEXT}"),
        (["chat"], b"hello \xff", "standard input is not UTF-8: byte 6 is 0xff"),
        (["chat"], b"the kite " * CONTEXT, rf"the prompt has \d+ tokens, but the model's context is {CONTEXT}"),
        (["chat", "--top-p", "0"], b"hello", "top_p is 0"),
    ],
)
def test_a_bad_option_or_text_is_one_sentence(
    run: Run, checkpoint: Path, arguments: list[str], stdin: bytes, expected: str
) -> None:
    assert_one_sentence(run(*arguments, "--checkpoint", checkpoint, stdin=stdin), expected)


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["--preset", "toy-smal"], "there is no preset 'toy-smal'; did you mean toy-small"),
        (["--preset", "llama3.1-405b"], "llama3.1-405b needs 6,493.7 GB to train, and [0-9.,]+ GB are free"),
        (["--device", "abacus"], "device 'abacus' is not there"),
        (["--precision", "float12"], "precision is 'float12', expected 'float32' or 'bfloat16'"),
        (["--optimizer", "sgd"], "optimizer is 'sgd'"),
        (["--steps", "0"], "steps is 0"),
        (["--learning-rate", "0"], "learning_rate is 0.0, expected a number above 0, and at most 1"),
        (["--learning-rate", "nan"], "learning_rate is nan, expected a number above 0, and at most 1"),
        (["--learning-rate", "1e6"], "learning_rate is 1000000.0, expected a number above 0, and at most 1"),
        (["--batch-size", "0"], "'--batch-size'"),
        (["--tokenizer", "nowhere"], "there is no checkpoint 'nowhere'"),
        (["--text", "missing.txt"], "missing.txt: No such file or directory"),
        (["--text", "folder"], "folder: Is a directory"),
        (["--text", "empty.txt"], "empty.txt is empty"),
        (["--text", "latin.txt"], "latin.txt is not UTF-8: byte 3 is 0xe9; save it as UTF-8"),
        (["--text", "short.txt"], "the text has 6 bytes, expected more than 2560"),
        (["--text", "book.txt", "--window", "513"], "--window is 513, expected at most 512"),
        (["--text", "book.txt", "--vocab-size", "90000"], "vocab_size=90000 is not possible: too large"),
        (["--text", "book.txt", "--vocab-size", "9"], "vocab_size=9 is not possible: too small"),
        (["--text", "part.txt", "--window", "500", "--tokenizer", "words"], "the tenth of .* has [0-9]+ tokens, a"),
        (["--window", "64"], "--window is 64, but there is no --text to use it on"),
        (["--vocab-size", "300"], "--vocab-size is 300, but there is no --text to use it on"),
        (["--text", "book.txt", "--vocab-size", "300", "--tokenizer", "words"], "--vocab-size is 300, but the"),
    ],
)
def test_bad_input_to_train_is_one_sentence_and_makes_no_folder(
    run: Run, tokenizer: SentencePieceTokenizer, book: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    arguments: list[str], expected: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    text = book.read_bytes()
    for name, content in (
        ("empty", b" \n"), ("latin", b"caf\xe9"), ("short", b"a kite"), ("part", text[:6000]), ("book", text)
    ):  # fmt: skip
        (tmp_path / f"{name}.txt").write_bytes(content)
    tokenizer.save(tmp_path / "words")
    before = digests(tmp_path)
    assert_one_sentence(run("train", "--out", "out", *arguments), expected)
    assert digests(tmp_path) == before


def test_token_that_the_tokenizer_does_not_know_is_one_sentence(
    run: Run, tokenizer: SentencePieceTokenizer, tmp_path: Path
) -> None:
    save(tiny_model(tokenizer, vocab_size=9000), tokenizer, tmp_path / "wide")
    result = run("generate", "Once", "--checkpoint", tmp_path / "wide", "--seed", 0, "--count", 2)
    assert_one_sentence(result, r"token id \d+ is outside the vocabulary of 400 tokens")


def test_chat_needs_chat_tokens(run: Run, tmp_path: Path) -> None:
    tokens = [*sorted(BYTE_OF, key=BYTE_OF.__getitem__), "<end>"]
    fields = {"model": "gpt2", "pre": "smollm", "tokens": tokens, "merges": [], "token_type": [1] * 256 + [3]}
    plain = BPETokenizer({**{f"tokenizer.ggml.{k}": v for k, v in fields.items()}, "tokenizer.ggml.eos_token_id": 256})
    save(tiny_model(plain), plain, tmp_path / "plain")
    assert_one_sentence(
        run("chat", "--checkpoint", tmp_path / "plain", stdin=b"hello\n"),
        r"lacks the control tokens .* no format for a chat",
    )
    assert_one_sentence(run("generate", "--checkpoint", tmp_path / "plain"), "has no BOS token")


def test_chat_with_the_toy_is_refused_and_the_real_model_suggested(run: Run) -> None:
    assert_one_sentence(run("chat", "--checkpoint", "toy"), "nobody taught it to chat: take `--checkpoint smollm2`")


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")])
def test_too_little_memory_is_one_sentence(run: Run, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fails(*_: object) -> None:
        raise error

    monkeypatch.setattr(write_file, "load_checkpoint", fails)
    assert_one_sentence(run("generate"), "not enough memory for this: take a smaller model or batch")


def test_a_mistake_of_ours_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(write_file, "load_checkpoint", fails)
    with pytest.raises(RuntimeError, match="mat1"):
        main(["generate", "Once"])


def test_a_reader_that_goes_away_is_no_error(checkpoint: Path) -> None:
    options = ["--checkpoint", checkpoint, "--count", 900, "--max-new-tokens", 60]  # more than a pipe holds
    process = start("generate", "Once", *options, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    assert process.stdout and process.stdout.read(4) == b"Once"
    process.stdout.close()
    assert process.stderr and process.stderr.read() == b""
    assert process.wait(60) == 1
