"""Corpora: every document that is kept comes out token for token, once, on one side; batches that miss nothing and let
no document see another; nothing damaged is read, nothing half done is left."""

import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minillama import corpus, load, world
from minillama.cli import main
from minillama.config import ModelConfig
from minillama.corpus import Seen, prepare
from minillama.loss import IGNORE
from minillama.model import Llama
from minillama.shards import SIDES, Corpus, ShardBatches, corpus_validation, shelves, token_type
from minillama.tokenizer import SentencePieceTokenizer

ROOT = Path(__file__).resolve().parents[1]
STORIES = [world.sample(random.Random(seed)).text for seed in range(60)]
# Words that fall into few classes, so that documents repeat; with what is cleaned, and an é in both its forms.
WORDS = st.sampled_from(
    ["a", "kite", "e\u0301t\u00e9", "\u00e9te\u0301", "中文", "\U0001f600", "x\x00y", "\ufeffz", "\x85"]
)
SPACES = st.sampled_from([" ", "  ", "\n", "\t", "\r\n", "\n\n"])
TEXTS = st.lists(st.tuples(WORDS, SPACES), max_size=6).map(lambda pairs: "".join(itertools.chain(*pairs)))


@pytest.fixture(scope="module")
def tokenizer() -> SentencePieceTokenizer:
    return SentencePieceTokenizer.train(STORIES, vocab_size=400)


def cleaned(text: str) -> str:
    """Written otherwise than in the module, and slower."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\ufeff", "")
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc").strip()


def words(text: str) -> tuple[str, ...]:
    return tuple(unicodedata.normalize("NFC", " ".join(text.split())).split(" "))


def rows_of(folder: Path, side: str) -> list[list[int]]:
    """The documents of a side, read by NumPy alone."""
    shards = [np.fromfile(path, "<u2") for path in sorted(folder.glob(f"{side}-*.bin"))]
    ends = np.fromfile(folder / f"{side}.index", "<u8").astype(int)
    tokens = np.concatenate(shards).tolist() if shards else []
    assert len(tokens) == ends[-1] and all(len(shard) == len(shards[0]) for shard in shards[:-1])
    return [tokens[start:end] for start, end in itertools.pairwise(ends)]


def write(path: Path, texts: Sequence[str]) -> Path:
    if path.suffix == ".jsonl":
        content = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    else:
        content = "<|endoftext|>\n" + "\n<|endoftext|>\n".join(texts)  # the mark is looked for in the first block
    path.write_bytes(content.encode())
    return path


@settings(max_examples=25, report_multiple_bugs=False)
@given(
    st.lists(TEXTS, min_size=1, max_size=12), st.sampled_from([".txt", ".jsonl"]), st.integers(30, 300), st.randoms()
)
def test_every_document_that_is_kept_comes_out_token_for_token_once_and_on_one_side(
    tokenizer, tmp_path_factory, texts, suffix, shard_tokens, rng
):
    texts = [*texts, *STORIES[:8]]  # so that there is something to learn from
    folder = tmp_path_factory.mktemp("corpus")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "BLOCK", 64)  # so that a document is in several
        patch.setattr(os, "fsync", lambda file: None)  # thousands of small shards
        outs = []
        for name in ("a", "b"):
            path = write(folder / (name + suffix), texts)
            report = prepare([path], tokenizer, folder / name, holdout=0.4, seed=3, shard_tokens=shard_tokens)
            outs.append({side: rows_of(folder / name, side) for side in SIDES})
            rng.shuffle(texts)
    kept = [cleaned(text) for text in texts if cleaned(text)]
    expected = {words(text) for text in kept}
    found = [tokenizer.decode(row) for side in SIDES for row in outs[0][side]]
    assert Counter(map(words, found)) == Counter(expected)
    assert set(found) <= set(kept)
    for row, text in zip(itertools.chain(*outs[0].values()), found, strict=True):
        assert row == tokenizer.encode(text, bos=True, eos=True)
    for side in SIDES:  # in another order, on the same side
        sides = [{words(tokenizer.decode(row)) for row in out[side]} for out in outs]
        assert sides[0] == sides[1]
    assert sum(report.documents.values()) == len(expected)
    if suffix == ".jsonl":  # between two marks nothing is no document
        assert report.read == len(texts) and report.dropped["empty"] == len(texts) - len(kept)
    assert report.dropped["there before"] == len(kept) - len(expected)


def test_the_share_that_is_held_out_is_the_share_that_was_asked_for_and_the_seed_draws_it():
    marks = [corpus.fingerprint(str(i)) for i in range(4000)]
    held = [[corpus.is_held_out(mark, 0.1, seed) for mark in marks] for seed in (0, 1)]
    assert all(330 < sum(some) < 470 for some in held) and held[0] != held[1]
    assert not any(corpus.is_held_out(mark, 0.0, 0) for mark in marks)
    assert all(corpus.is_held_out(mark, 0.3, 0) for mark in marks if corpus.is_held_out(mark, 0.1, 0))


def test_a_fingerprint_is_of_the_words_and_nothing_else():
    same = ["\u00e9t\u00e9 \u4e2d", "e\u0301te\u0301\n\n\u4e2d", "  \u00e9te\u0301\t\u4e2d "]
    others = [
        "ete \u4e2d",
        "\u00c9t\u00e9 \u4e2d",
        "\u00e9t\u00e9\u4e2d",
        "\u00e9t\u00e9 \u4e2d.",
        "\u4e2d \u00e9t\u00e9",
    ]
    assert len({corpus.fingerprint(text) for text in same}) == 1
    assert len({corpus.fingerprint(text) for text in same + others}) == 1 + len(others)
    assert len(corpus.fingerprint("")) == 16


def test_a_book_is_cut_into_passages_where_paragraphs_end_and_loses_nothing(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "BLOCK", 10_000)
    paragraphs = [" ".join(f"word{n}-{i}" for i in range(n % 90)) + "é" for n in range(200)]
    (tmp_path / "book.txt").write_bytes("\r\n\r\n".join(paragraphs).encode())
    passages = [text for block in corpus.blocks(tmp_path / "book.txt") for text in corpus.documents(block)]
    assert "".join(passages).split() == " ".join(paragraphs).split()
    assert all(len(text.encode()) <= corpus.PASSAGE for text in passages)
    assert all(text.endswith("\r\n\r\n") for text in passages[:-1])
    assert sum(len(text) for text in passages) / len(passages) > corpus.PASSAGE / 2


@pytest.mark.parametrize("character", ["x", "é", "中", "\U0001f600"])
def test_text_without_any_white_space_is_cut_between_characters(tmp_path, monkeypatch, character):
    monkeypatch.setattr(corpus, "BLOCK", 9_999)
    (tmp_path / "line.txt").write_text(character * 9001, encoding="utf-8")
    passages = [text for block in corpus.blocks(tmp_path / "line.txt") for text in corpus.documents(block)]
    assert "".join(passages) == character * 9001 and len(passages) > 2


def test_a_mark_inside_a_line_is_text(tmp_path):
    (tmp_path / "a.txt").write_text("one <|endoftext|> two\n<|endoftext|>\nthree\n<|endoftext|>  \n\n")
    (block,) = corpus.blocks(tmp_path / "a.txt")
    assert [text.strip() for text in corpus.documents(block)] == ["one <|endoftext|> two", "three"]


def test_text_never_becomes_a_control_token(tokenizer, tmp_path):
    write(tmp_path / "a.jsonl", ["say </s> and <|im_end|>", "no <s>"])
    prepare([tmp_path / "a.jsonl"], tokenizer, tmp_path / "out", holdout=0)
    rows = rows_of(tmp_path / "out", "train")
    assert [tokenizer.decode(row) for row in rows] == ["say </s> and <|im_end|>", "no <s>"]
    assert all(row.count(tokenizer.eos_id) == 1 and row[-1] == tokenizer.eos_id for row in rows)


@given(st.lists(st.lists(st.integers(0, 30), max_size=8), max_size=20))
def test_a_fingerprint_is_new_the_first_time_only(batches):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Seen, "RECENT", 5)
        seen, known = Seen(), set()
        for batch in batches:
            marks = [bytes([n]).rjust(8, b"x").ljust(16, b"\0") for n in batch]  # zeros at the end count
            first = seen.first(np.array(marks, "S16"))
            assert first.tolist() == [not (mark in known or known.add(mark)) for mark in marks]


def test_several_processes_write_the_same_bytes_as_one(tokenizer, tmp_path, monkeypatch):
    rng = random.Random(0)
    path = write(tmp_path / "a.txt", [world.sample(rng).text for _ in range(300)] + STORIES[:5])
    monkeypatch.setattr(corpus, "BLOCK", 20_000)
    prepare([path], tokenizer, tmp_path / "one", holdout=0.2, shard_tokens=9000, processes=1)
    prepare([path], tokenizer, tmp_path / "two", holdout=0.2, shard_tokens=9000, processes=2)
    names = sorted(file.name for file in (tmp_path / "one").iterdir())
    assert len(names) > 6 and names == sorted(file.name for file in (tmp_path / "two").iterdir())
    assert all((tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes() for name in names)


def test_a_process_that_ends_is_one_sentence(tokenizer, tmp_path):
    block = corpus.Block("a.txt", 0, 1, b"text", "plain")
    with pytest.raises(ValueError, match="was ended from outside, or could not start: try processes=1"):
        list(corpus._cut_all([block], tmp_path, tokenizer, 0, 0, processes=2))  # where no tokenizer is


def test_a_vocabulary_beyond_sixteen_bits_is_written_in_thirty_two():
    assert [token_type(size) for size in (2, 65536, 65537)] == ["<u2", "<u2", "<u4"]


@pytest.mark.parametrize(
    "name, content, expected",
    [
        ("a.txt", b"fine\n<|endoftext|>\ncaf\xe9 x", r"a\.txt is not UTF-8: byte 22 is 0xe9; save it as UTF-8"),
        ("a.txt", b"caf\xe9 x", r"a\.txt is not UTF-8: byte 3 is 0xe9"),
        ("a.jsonl", b'{"text": "x"}\n\n{"text": "\xff"}\n', r"a\.jsonl is not UTF-8: byte 25 is 0xff"),
        ("a.jsonl", b'{"text": "x"}\n\n{"text": 3}\n', r"a\.jsonl, line 3 is '\{\"text\": 3\}', expected an object"),
        ("a.jsonl", b'{"text": "x"}\n[1]', r"a\.jsonl, line 2 is '\[1\]', expected"),
        ("a.jsonl", b'{"text": "x"}\n{"text: 1}\n', r"a\.jsonl, line 2 is not JSON: .* at column 2"),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl, line 1 is not JSON that can be read"),
        ("a.txt", b" \n\n \n", r"of 0 documents in .*a\.txt none is left"),
        ("a.jsonl", b'{"text": " "}', r"of 1 document in .*a\.jsonl none is left"),
        ("a.txt", b"", r"of 0 documents in .*a\.txt none is left"),
    ],
)
def test_text_that_cannot_be_taken_is_named_and_leaves_nothing(tokenizer, tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=expected):
        prepare([tmp_path / name], tokenizer, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_document_without_an_end_is_refused_before_it_fills_the_memory(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "BLOCK", 1000)
    monkeypatch.setattr(corpus, "MAX_DOCUMENT", 5000)
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "x"}\n' + b"x" * 10_000)
    with pytest.raises(ValueError, match="a.jsonl, byte 14: a document has more than 5000 bytes; is a line break miss"):
        prepare([tmp_path / "a.jsonl"], tokenizer, tmp_path / "out")


def test_a_character_that_the_vocabulary_cannot_write_drops_its_document_and_is_counted(tokenizer, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "half \\ud800"}\n{"text": "whole"}\n')
    report = prepare([tmp_path / "a.jsonl"], tokenizer, tmp_path / "out", holdout=0)
    assert report.dropped["a character that the tokenizer cannot write"] == 1 and report.documents["train"] == 1


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"holdout": 1.0}, "holdout is 1.0, expected a share from 0 to below 1"),
        ({"holdout": float("nan")}, "holdout is nan"),
        ({"shard_tokens": 0}, "shard_tokens is 0"),
        ({"processes": 0}, "processes is 0"),
    ],
)
def test_an_option_that_cannot_be_is_refused(tokenizer, tmp_path, options, expected):
    write(tmp_path / "a.txt", STORIES)
    with pytest.raises(ValueError, match=expected):
        prepare([tmp_path / "a.txt"], tokenizer, tmp_path / "out", **options)


def test_a_folder_that_is_there_is_left_alone(tokenizer, tmp_path):
    path = write(tmp_path / "a.txt", STORIES)
    prepare([path], tokenizer, tmp_path / "out")
    with pytest.raises(ValueError, match="out is there already"):
        prepare([path], tokenizer, tmp_path / "out")
    Corpus(tmp_path / "out", verify=True)


PREPARE = """
import sys
from minillama.corpus import prepare
from minillama.tokenizer import load_tokenizer
if __name__ == "__main__":
    prepare([sys.argv[1]], load_tokenizer(sys.argv[2]), sys.argv[3], processes=int(sys.argv[4]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Ctrl-C is no signal there")
@pytest.mark.parametrize("number, processes", [(signal.SIGINT, 2), (signal.SIGKILL, 1)])
def test_a_run_that_is_stopped_leaves_no_corpus_and_begins_again(tokenizer, tmp_path, number, processes):
    path = write(tmp_path / "a.txt", STORIES * 400)
    tokenizer.save(tmp_path / "words")
    (tmp_path / "run.py").write_text(PREPARE)
    command = [sys.executable, tmp_path / "run.py", path, tmp_path / "words", tmp_path / "out", str(processes)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, start_new_session=True)
    unfinished, deadline = tmp_path / "out.unfinished", time.monotonic() + 60
    while not list(unfinished.glob("train-*")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, number)  # what a terminal does
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0 and not (tmp_path / "out").exists()
    assert unfinished.exists() == (number == signal.SIGKILL)
    assert errors.count(b"Traceback") == (number == signal.SIGINT)  # of this process only, none of its helpers
    with pytest.raises(ValueError, match="holds no corpus"):
        Corpus(unfinished)
    small = write(tmp_path / "b.txt", STORIES)
    prepare([small], tokenizer, tmp_path / "out")
    assert not unfinished.exists()
    Corpus(tmp_path / "out", verify=True)


# Batches


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory) -> Path:
    """Documents of 2 to some 300 tokens, in shards that cut through them."""
    rng = random.Random(1)
    texts = [
        " ".join(rng.choices(STORIES[rng.randrange(60)].split(), k=rng.choice([1, 5, 5, 9, 9, 20, 90])))
        for _ in range(120)
    ]
    base = tmp_path_factory.mktemp("batches")
    prepare([write(base / "a.jsonl", texts)], tokenizer, base / "out", holdout=0.2, shard_tokens=777)
    return base / "out"


def pieces_of(batch) -> list[tuple[list[int], list[int]]]:
    """What a batch holds, piece by piece: the inputs and the targets."""
    found = []
    for i in range(len(batch.inputs)):
        numbers = batch.segments[i] if batch.segments is not None else (batch.targets[i] != IGNORE).long() - 1
        for number in range(int(numbers.max()) + 1):
            here = numbers == number
            found.append((batch.inputs[i][here].tolist(), batch.targets[i][here].tolist()))
        filling = numbers == -1
        assert (batch.targets[i][filling] == IGNORE).all() and not (batch.targets[i][~filling] == IGNORE).any()
    return found


@pytest.mark.parametrize("length", [1, 7, 64, 1000])
@pytest.mark.parametrize("held_out", [False, True])
def test_every_token_of_an_epoch_is_predicted_once_from_what_is_before_it_in_its_document(folder, length, held_out):
    rows = rows_of(folder, SIDES[held_out])
    expected = Counter(
        (tuple(row[i : min(i + length, len(row) - 1)]), tuple(row[i + 1 : i + length + 1]))
        for row in rows
        for i in range(0, len(row) - 1, length)
    )
    source = ShardBatches(folder, 3, length, seed=5, held_out=held_out)
    orders = []
    for epoch in (0, 1):
        numbers = range(epoch * source.n_rows, (epoch + 1) * source.n_rows)
        found = [(tuple(inputs), tuple(targets)) for inputs, targets in pieces_of(source.rows(numbers))]
        assert Counter(found) == expected
        orders.append(found)
    assert orders[0] != orders[1]
    asked = sum(len(row) - 1 for row in rows)
    assert source.padding == pytest.approx(1 - asked / (source.n_rows * length))
    assert source.padding < 0.02 or length == 1000


def test_batches_go_on_from_epoch_to_epoch_without_a_gap(folder):
    source = ShardBatches(folder, 4, 64, seed=2)
    steps = -(-2 * source.n_rows // 4)
    together = torch.cat([source(step).inputs for step in range(steps)])
    assert torch.equal(together[: 2 * source.n_rows], source.rows(range(2 * source.n_rows)).inputs)
    assert all(source(step).inputs.shape == (4, 64) for step in range(steps))


def test_what_a_step_holds_depends_on_the_seed_and_its_number_alone(folder):
    source, again, other = (ShardBatches(folder, 3, 50, seed=seed) for seed in (7, 7, 8))
    in_order = [source(step) for step in range(30)]
    for step in (29, 3, 17, 0, 28):
        batch = again(step)
        assert torch.equal(batch.inputs, in_order[step].inputs) and torch.equal(batch.targets, in_order[step].targets)
        assert str(batch.segments) == str(in_order[step].segments)  # or there are none
    assert not any(torch.equal(other(step).inputs, in_order[step].inputs) for step in range(30))


def test_no_document_sees_another(folder):
    torch.manual_seed(0)
    config = ModelConfig(
        dim=24, n_layers=2, n_heads=6, n_kv_heads=2, head_dim=6, ffn_dim=20, vocab_size=400, max_seq_len=64
    )
    model = Llama(config).eval()
    batch = ShardBatches(folder, 5, 64, seed=1)(2)
    assert batch.segments is not None and batch.segments.max() > 1
    with torch.no_grad():
        packed = model(batch.inputs, segments=batch.segments)
        for i, number in itertools.product(range(5), range(int(batch.segments.max()) + 1)):
            here = batch.segments[i] == number
            if here.any():
                alone = model(batch.inputs[i][here][None])[0]
                torch.testing.assert_close(packed[i][here], alone, rtol=1e-5, atol=1e-5)


def test_validation_is_of_held_out_documents_each_scored_once(folder):
    held = Counter(tuple(row[1:]) for row in rows_of(folder, "held-out"))
    validation = corpus_validation(folder, 4, 2000)
    assert Counter(tuple(targets) for batch in validation.batches for _, targets in pieces_of(batch)) == held
    assert validation.floor is None
    assert sum(len(batch.inputs) for batch in corpus_validation(folder, 4, 8, max_rows=10).batches) == 10


def best_fit(lengths: Sequence[int], width: int) -> Counter[tuple[int, ...]]:
    """Best-fit decreasing, one piece at a time."""
    rows: list[list[int]] = []
    for n in sorted(lengths, reverse=True):
        fitting = [row for row in rows if width - sum(row) >= n]
        row = min(fitting, key=lambda row: width - sum(row), default=None)
        if row is None:
            rows.append(row := [])
        row.append(n)
    return Counter(tuple(row) for row in rows)


@given(st.lists(st.integers(1, 20), max_size=60))
def test_pieces_are_put_into_rows_as_best_fit_decreasing_puts_them(lengths):
    counts = [lengths.count(n) for n in range(21)]
    kinds = shelves(counts, 20)
    rows = Counter()
    for pieces, count in kinds:
        rows[tuple(n for n, _ in pieces)] += count
    fills = Counter(sum(row) for row in rows.elements())  # which of two rows with the same room is taken is open
    assert fills == Counter(sum(row) for row in best_fit(lengths, 20).elements())
    taken = sorted((n, first + i) for pieces, count in kinds for n, first in pieces for i in range(count))
    assert taken == [(n, i) for n in range(21) for i in range(counts[n])]


def test_a_million_documents_are_put_into_rows_at_once():
    started = time.process_time()
    kinds = shelves([0] + [1000] * 1000, 1000)
    assert sum(count for _, count in kinds) < 1.01 * 500_500 and time.process_time() - started < 5


# Damage


def copy_of(folder: Path, to: Path) -> Path:
    to.mkdir()
    for path in folder.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    return to


def set_to(*keys: str, value: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        manifest = json.loads((folder / "manifest.json").read_text())
        inner = manifest
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = value
        (folder / "manifest.json").write_text(json.dumps(manifest))

    return change


def cut_by(name: str, count: int) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-count])


def flip(name: str, place: int) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[place] ^= 128
        (folder / name).write_bytes(data)

    return change


def once_around(folder: Path) -> None:
    """An index whose every step is upward, past the largest number and around to where it should end."""
    starts = np.fromfile(folder / "train.index", "<u8")
    steps = np.full(len(starts) - 1, 2, np.uint64)
    steps[:4] = (2**64 + int(starts[-1]) - 2 * (len(steps) - 4)) // 4
    steps[-1] += np.uint64((int(starts[-1]) - sum(map(int, steps))) % 2**64)
    np.concatenate([starts[:1], steps.cumsum(dtype=np.uint64)]).astype("<u8").tofile(folder / "train.index")


def other_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.model").unlink()
    SentencePieceTokenizer.train(STORIES[1:], vocab_size=400).save(folder)


@pytest.mark.parametrize(
    "damage, expected",
    [
        (lambda folder: (folder / "manifest.json").unlink(), "holds no corpus"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "is not JSON"),
        (lambda folder: (folder / "manifest.json").write_text("[" * 10**5), "is not JSON"),
        (lambda folder: (folder / "manifest.json").write_text("[1]"), "damaged manifest"),
        (lambda folder: (folder / "manifest.json").write_text("{}"), "damaged manifest .*'format'"),
        (set_to("format", value=2), "its format is 2, this program reads 1"),
        (set_to("vocab_size", value=401), "said to have 401 tokens, but the tokenizer 400"),
        (set_to("vocab_size", value=10**30), "said to have 1000"),
        (set_to("shard_tokens", value=0), "shard_tokens is 0, expected a whole number from 1 on"),
        (set_to("shard_tokens", value=True), "shard_tokens is True"),
        (set_to("shard_tokens", value=100), "train has .* shards of 100 tokens"),
        (set_to("sides", "train", "documents", value=-1), "documents is -1"),
        (set_to("sides", "train", "documents", value=10**40), r"train.index has \d+ bytes, expected 80000"),
        (set_to("sides", "train", "tokens", value=10**40), "train has .* shards of 777 tokens, but 1000"),
        (set_to("sides", "train", "tokens", value=3.0), "tokens is 3.0"),
        (set_to("sides", "train", "shards", value=["../../etc/passwd"]), "train has 1 shards"),
        (set_to("sides", "train", value=[]), "damaged manifest"),
        (set_to("sides", value=None), "damaged manifest"),
        (cut_by("train-00001.bin", 1), "train-00001.bin has 1553 bytes, expected 1554"),
        (cut_by("train.index", 8), "train.index has"),
        (cut_by("tokenizer.model", 3), "tokenizer"),
        (flip("train.index", -1), "train.index does not rise from 0 to"),
        (flip("train.index", 0), "train.index does not rise from 0 to"),
        (flip("train.index", 9), "train.index does not rise from 0 to"),
        (once_around, "train.index does not rise from 0 to"),
        (lambda folder: (folder / "held-out-00000.bin").unlink(), "held-out-00000.bin has 0 bytes, expected"),
        (other_tokenizer, "its tokenizer is not the one that it was prepared with"),
    ],
)  # fmt: skip
def test_what_is_damaged_is_refused_in_one_sentence(folder, tmp_path, damage, expected):
    damaged = copy_of(folder, tmp_path / "damaged")
    damage(damaged)
    with pytest.raises(ValueError, match=expected) as refused:
        ShardBatches(damaged, 2, 30)
    assert str(refused.value).count("\n") == 0 and str(damaged) in str(refused.value)


@pytest.mark.parametrize("name", ["train-00002.bin", "held-out-00000.bin"])
def test_a_changed_byte_is_found_when_asked_to_verify(folder, tmp_path, name):
    damaged = copy_of(folder, tmp_path / "damaged")
    flip(name, 100)(damaged)
    Corpus(damaged)
    with pytest.raises(ValueError, match=f"{name} has the right size, but another SHA-256"):
        Corpus(damaged, verify=True)


def test_a_token_beyond_the_vocabulary_is_refused_when_it_is_read(folder, tmp_path):
    damaged = copy_of(folder, tmp_path / "damaged")
    for number in range(3):
        flip(f"train-{number:05}.bin", 101)(damaged)
    source = ShardBatches(damaged, 2, 30)
    with pytest.raises(ValueError, match=r"token 3\d{4} is in it, but its vocabulary has 400"):
        source.rows(range(source.n_rows))


def test_a_side_without_documents_is_refused(tokenizer, tmp_path):
    prepare([write(tmp_path / "a.txt", STORIES)], tokenizer, tmp_path / "out", holdout=0)
    with pytest.raises(ValueError, match="no held-out document: prepare it with"):
        corpus_validation(tmp_path / "out", 2, 30)
    with pytest.raises(ValueError, match="batch_size is 0 and length is 30"):
        ShardBatches(tmp_path / "out", 0, 30)


# The commands


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def run_here(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stopped:
            main([str(argument) for argument in arguments])
        return stopped.value.code or 0, *capsys.readouterr()

    return run_here


def test_prepare_says_what_was_kept_and_what_was_dropped_and_why(run, tokenizer, tmp_path):
    tokenizer.save(tmp_path / "words")
    (tmp_path / "a.jsonl").write_bytes(
        b'{"text": "a\\r\\nkite"}\n{"text": "a kite"}\n{"text": ""}\n{"text": "a \\u0000dog"}\n'
    )
    command = ["data", "prepare", tmp_path / "a.jsonl", "--tokenizer", tmp_path / "words", "--out", tmp_path / "out"]
    code, out, err = run(*command, "--holdout", 0)
    assert code == 0, err
    numbers = [int(line.split()[-2].replace(",", "")) for line in out.splitlines() if line.endswith("documents")]
    assert numbers == [4, 1, 1, 0, 2, 0]  # read, empty, there before, unwritable, to learn from, held out
    assert re.search(r"line ends made \\n +1 characters", out)
    assert re.search(r"control characters removed +1 characters", out)
    assert "minillama train needs documents held out: give more text or a larger --holdout" in out
    out = run(*command[:-1], tmp_path / "half", "--holdout", 0.5, "--seed", 1)[1]
    assert f"minillama train --data {tmp_path / 'half'}" in out
    code, out, err = run(*command)
    assert (code, out) == (2, "") and err.endswith("out is there already: choose another folder, or delete it first.\n")


def test_data_alone_says_what_there_is(run):
    code, out, err = run("data")
    assert (code, err) == (0, "") and "Make text ready to train on." in out and "prepare" in out


def test_prepare_without_a_tokenizer_or_a_file_is_one_sentence(run, tokenizer, tmp_path):
    tokenizer.save(tmp_path / "words")
    write(tmp_path / "a.txt", STORIES)
    (tmp_path / "c.json").write_text('[{"text": "a kite"}]')
    (tmp_path / "d.jsonl").write_text('{"text": " "}')
    for arguments, expected in (
        ([tmp_path / "a.txt", "--tokenizer", tmp_path], "has no tokenizer"),
        ([tmp_path / "b.txt", "--tokenizer", tmp_path / "words"], "b.txt: No such file"),
        ([tmp_path, "--tokenizer", tmp_path / "words"], "Is a directory"),
        ([tmp_path / "a.txt", "--tokenizer", tmp_path / "nothing"], "there is no checkpoint"),
        ([tmp_path / "c.json", "--tokenizer", tmp_path / "words"], "c.json is one piece of JSON, expected text or"),
        ([tmp_path / "d.jsonl", "--tokenizer", tmp_path / "words"], "of 1 document in .*d.jsonl none is left to learn"),
    ):
        code, out, err = run("data", "prepare", *arguments, "--out", tmp_path / "out")
        assert (code, out) == (2, "") and re.search(expected, err) and "Traceback" not in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "c.json", "d.jsonl", "words"]


def test_prepare_takes_a_tokenizer_by_the_name_of_its_checkpoint(run, tmp_path):
    write(tmp_path / "a.txt", STORIES)
    code, _, err = run("data", "prepare", tmp_path / "a.txt", "--tokenizer", "toy", "--out", tmp_path / "out")
    assert code == 0, err
    toy = Path(__file__).parents[1] / "data" / "toy"
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == (toy / "tokenizer.model").read_bytes()


def test_ctrl_c_ends_prepare_with_one_sentence(run, tokenizer, tmp_path, monkeypatch):
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    tokenizer.save(tmp_path / "words")
    monkeypatch.setattr(Seen, "first", stopped)
    write(tmp_path / "a.txt", STORIES)
    code, out, err = run(
        "data", "prepare", tmp_path / "a.txt", "--tokenizer", tmp_path / "words", "--out", tmp_path / "out"
    )
    assert (code, out) == (130, "") and err.endswith("nothing was written, the same command begins again.\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "words"]


def test_train_on_a_corpus_stopped_in_an_epoch_ends_like_one_that_was_not(run, folder, tmp_path, monkeypatch):
    command = ["train", "--data", folder, "--window", 40, "--batch-size", 2, "--steps", 5, "--out"]
    code, out, err = run(*command, tmp_path / "whole")
    assert code == 0, err
    assert re.search(r"Validation loss: \d\.\d{4}\. *\n", out) and "Floor" not in out
    assert re.search(r"\d+ rows of 40 tokens; \d\.\d% is padding", err)
    ask = ShardBatches.__call__

    def interrupted(source: ShardBatches, step: int) -> object:
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return ask(source, step)

    monkeypatch.setattr(ShardBatches, "__call__", interrupted)
    assert run(*command, tmp_path / "run")[0] == 130
    monkeypatch.undo()
    assert run(*command, tmp_path / "run")[0] == 0
    models = [load(tmp_path / name / "step-5")[0] for name in ("whole", "run")]
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(one, other)
    code, _, err = run(*command[:4], 41, *command[5:], tmp_path / "run")
    assert code == 2 and "holds a run with data out (window 40)" in err


@pytest.mark.parametrize(
    "options, expected",
    [
        (["--text", "a.txt"], "--text is given, but --data .* brings its own: leave one of the two out"),
        (["--tokenizer", "words"], "--tokenizer is given"),
        (["--vocab-size", "300"], "--vocab-size is given"),
        (["--window", "513"], "--window is 513, expected at most 512"),
    ],
)
def test_what_a_corpus_brings_cannot_be_given_too(run, folder, tmp_path, options, expected):
    code, out, err = run("train", "--data", folder, "--out", tmp_path / "run", *options)
    assert (code, out) == (2, "") and re.search(expected, " ".join(err.split())) and not (tmp_path / "run").exists()


def test_a_new_run_reads_the_whole_corpus_once_and_refuses_changed_tokens(run, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    damaged = copy_of(folder, tmp_path / "damaged")
    flip("train-00000.bin", 100)(damaged)
    code, out, err = run("train", "--data", damaged, "--window", 30, "--steps", 1)
    assert (code, out) == (2, "") and "another SHA-256" in err and not (tmp_path / "runs").exists()


def test_several_processes_have_to_be_told_how_to_share(run, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, out, err = run("train", "--steps", 1)
    assert (code, out) == (2, "") and "torchrun has started 2 processes, and --parallel is left out" in err


def test_a_folder_of_somebody_elses_is_not_cleared_away(tokenizer, tmp_path):
    (tmp_path / "out.unfinished").mkdir()
    theirs = write(tmp_path / "out.unfinished" / "mine.txt", STORIES)
    with pytest.raises(ValueError, match="out.unfinished is there and holds other files than ours"):
        prepare([write(tmp_path / "a.txt", STORIES)], tokenizer, tmp_path / "out")
    assert theirs.exists()


def test_a_folder_that_is_no_corpus_is_refused_by_train(run, tmp_path):
    code, out, err = run("train", "--data", tmp_path, "--out", tmp_path / "run")
    assert (code, out) == (2, "") and "holds no corpus: expected a folder that `minillama data prepare` wrote" in err
