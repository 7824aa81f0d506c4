"""Corpora (chapter 16): text in files of any size to tokens on disk, the shards of `shards.py`.

`prepare` reads, cleans and cuts the text, leaves out what was there before, holds some documents out, and writes the
rest as one long row of tokens for each side, in pieces (shards) of a fixed size. It never needs the memory that the
whole would take: 16 bytes are kept for each document, twice that at times.
"""

import functools
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import time
import unicodedata
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from minillama.download import sha256_of
from minillama.shards import FORMAT, SIDES, shard_path, token_type, tokenizer_file
from minillama.tokenizer import Tokenizer, load_tokenizer

BLOCK = 2**20  # bytes that are read, and handed to a process, at a time
PASSAGE = 2**12  # bytes: the most that a document has in a file that does not say where its documents end
MAX_DOCUMENT = 2**24  # bytes of a document in a file that does say it
SHARD_TOKENS = 2**26
FEW_BYTES = 2**23  # less text than this is cut into tokens before other processes have started
DIVIDER = re.compile(rb"^<\|endoftext\|>[ \t\r]*(?:\n|\Z)", re.MULTILINE)
EMPTY, DUPLICATE, UNWRITABLE = DROPPED = "empty", "there before", "a character that the tokenizer cannot write"
BOMS, ENDS, CONTROLS = CHANGED = "byte order marks removed", "line ends made \\n", "control characters removed"
OURS = re.compile(r"(train|held-out)(-\d+\.bin|\.index)|manifest\.json|tokenizer\..*")
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")


# Reading


@dataclass(frozen=True)
class Block:
    """Some whole documents of a file: its bytes from `offset` on, which begin in line `line`."""

    path: str
    offset: int
    line: int
    data: bytes
    kind: str  # "lines" of JSON, documents divided by "marks", or "plain" text


def blocks(path: Path) -> Iterator[Block]:
    """A file, block by block; each ends where a document does.

    A file named .jsonl has a document in each line. Any other file is text: if a line of its first MiB is
    `<|endoftext|>` and nothing else, as in TinyStories, such lines stand between its documents; if none is, it is a
    book, whose passages become documents of at most PASSAGE bytes, cut where a paragraph ends if possible.
    Raises ValueError for a document of more than MAX_DOCUMENT bytes, and for a file named .json.
    """
    if path.suffix == ".json":
        raise ValueError(
            f'{path} is one piece of JSON, expected text or JSON lines: write an object with "text" in each line of a '
            "file named .jsonl."
        )
    with open(path, "rb") as file:
        buffer, offset, line = file.read(BLOCK), 0, 1
        kind = "lines" if path.suffix == ".jsonl" else "marks" if DIVIDER.search(buffer) else "plain"
        while buffer:
            more = file.read(BLOCK)
            if end := _end_of_documents(buffer, kind) if more else len(buffer):
                yield Block(str(path), offset, line, buffer[:end], kind)
                offset, line, buffer = offset + end, line + buffer.count(b"\n", 0, end), buffer[end:]
            if len(buffer) > MAX_DOCUMENT:
                lacking = "line break" if kind == "lines" else "line with <|endoftext|> alone"
                raise ValueError(
                    f"{path}, byte {offset}: a document has more than {MAX_DOCUMENT} bytes; is a {lacking} missing?"
                )
            buffer += more


def _end_of_documents(data: bytes, kind: str) -> int:
    """How many of these bytes are whole documents."""
    if kind == "lines":
        return data.rfind(b"\n") + 1
    if kind == "plain":
        return _end_of_passage(data)
    end = len(data)
    while (end := data.rfind(b"<|endoftext|>", 0, end)) >= 0:
        if (mark := DIVIDER.match(data, end)) and mark[0].endswith(b"\n"):
            return mark.end()
    return 0


def _end_of_passage(data: bytes) -> int:
    """Where in their second half to cut: behind the last paragraph, or else line, word, character."""
    for boundary in (b"\n\n", b"\r\n\r\n", b"\n", b" "):
        if (at := data.rfind(boundary, len(data) // 2)) >= 0:
            return at + len(boundary)
    end = len(data) - 1
    while end > len(data) - 4 and data[end] & 0xC0 == 0x80:  # not the first byte of a character
        end -= 1
    return end


def documents(block: Block) -> Iterator[str]:
    """The texts in a block. Raises ValueError that names the place of what is not UTF-8, or is no line of JSON."""
    data = block.data
    if block.kind == "lines":
        start = 0
        for number, line in enumerate(data.split(b"\n"), start=block.line):
            if line.strip():
                yield _field(_decode(block, start, start + len(line)), f"{block.path}, line {number}")
            start += len(line) + 1
        return
    start = 0
    for mark in [*DIVIDER.finditer(data), None]:
        end = mark.start() if mark else len(data)
        while block.kind == "plain" and end - start > PASSAGE:
            cut = start + _end_of_passage(data[start : start + PASSAGE])
            yield _decode(block, start, cut)
            start = cut
        if data[start:end].strip():
            yield _decode(block, start, end)
        start = mark.end() if mark else end


def _decode(block: Block, start: int, end: int) -> str:
    try:
        return block.data[start:end].decode("utf-8")
    except UnicodeDecodeError as error:
        place, byte = block.offset + start + error.start, block.data[start + error.start]
        raise ValueError(f"{block.path} is not UTF-8: byte {place} is {byte:#04x}; save it as UTF-8.") from None


def _field(line: str, place: str) -> str:
    try:
        value = json.loads(line.removeprefix("\ufeff"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{place} is not JSON: {error.msg} at column {error.colno}.") from None
    except (ValueError, RecursionError) as error:  # a number of too many digits, brackets in brackets in brackets
        raise ValueError(f"{place} is not JSON that can be read: {error}.") from None
    if not isinstance(value, dict) or not isinstance(value.get("text"), str):
        raise ValueError(
            f'{place} is {line.strip()[:40]!r}, expected an object with "text", like {{"text": "Once …"}}.'
        )
    return value["text"]


# Cleaning


def clean(text: str) -> tuple[str, Counter[str]]:
    """The text without control characters, byte order marks, and white space around it, its lines ended by \\n only;
    and how many of each were changed.

    Accents stay as they are, one character with the letter or two (no NFC): what comes out of the tokens is what went
    in, as with the tokenizers themselves.
    """
    changed = Counter({BOMS: text.count("\ufeff"), ENDS: text.count("\r")})
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    text, changed[CONTROLS] = CONTROL.subn("", text.replace("\ufeff", ""))
    return text.strip(), changed


def fingerprint(text: str) -> bytes:
    """128 bits that two documents share if and only if they have the same words: white space counts only as being
    there or not, and an accent is the same in either form (NFC)."""
    words = " ".join(text.split())
    if not words.isascii():
        words = unicodedata.normalize("NFC", words)
    return hashlib.blake2b(words.encode(), digest_size=16).digest()


def is_held_out(fingerprint: bytes, holdout: float, seed: int) -> bool:
    """Whether a document with this fingerprint is held out: a matter of its words and the seed, not of where it was."""
    drawn = hashlib.blake2b(fingerprint, digest_size=8, key=str(seed).encode()).digest()
    return int.from_bytes(drawn, "big") < holdout * 2**64


class Seen:
    """The fingerprints that were there before, 16 bytes each: sorted, but for the newest RECENT."""

    RECENT = 2**16

    def __init__(self) -> None:
        self.sorted, self.recent = np.empty(0, "S16"), set[bytes]()

    def first(self, prints: np.ndarray) -> np.ndarray:
        """For each of these fingerprints (N,) S16, whether it is there for the first time (N,)."""
        old = np.zeros(len(prints), bool)
        if len(self.sorted):
            at = np.searchsorted(self.sorted, prints)
            old = self.sorted[np.minimum(at, len(self.sorted) - 1)] == prints
        for i, fingerprint in enumerate(prints.tolist()):
            if not old[i]:
                old[i] = fingerprint in self.recent
                self.recent.add(fingerprint)
        if len(self.recent) >= self.RECENT:
            self.sorted = np.concatenate([self.sorted, np.array(sorted(self.recent), "S16")])
            self.sorted.sort(kind="stable")  # which is quick where two sorted rows meet
            self.recent.clear()
        return ~old


# To tokens


@dataclass
class Cut:
    """The documents of a block as tokens: their fingerprints (N,) S16, whether they are held out (N,), their numbers of
    tokens (N,), and the tokens, one document after the other; and what was counted on the way."""

    prints: np.ndarray
    held_out: np.ndarray
    lengths: np.ndarray
    tokens: np.ndarray
    counts: Counter[str]


def cut(block: Block, tokenizer: Tokenizer, holdout: float, seed: int) -> Cut:
    """All that can be done to a block without knowing the others."""
    prints, held_out, rows, counts = [], [], [], Counter[str]()
    for text in documents(block):
        counts["read"] += 1
        text, changed = clean(text)
        counts += changed
        if not text:
            counts[EMPTY] += 1
            continue
        try:
            ids = tokenizer.encode(text, bos=tokenizer.bos_id is not None, eos=True)
        except ValueError:
            counts[UNWRITABLE] += 1
            continue
        prints.append(fingerprint(text))
        held_out.append(is_held_out(prints[-1], holdout, seed))
        rows.append(np.array(ids, token_type(tokenizer.vocab_size)))
    lengths = np.array([len(row) for row in rows], np.int64)
    tokens = np.concatenate(rows) if rows else np.empty(0, token_type(tokenizer.vocab_size))
    return Cut(np.array(prints, "S16"), np.array(held_out, bool), lengths, tokens, counts)


def _start_process(folder: str, holdout: float, seed: int) -> None:
    """In a process of the pool: read the tokenizer once, and leave Ctrl-C to the process that waits for this one."""
    global _cut_block
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _cut_block = functools.partial(cut, tokenizer=load_tokenizer(folder), holdout=holdout, seed=seed)


def _cut_in_process(block: Block) -> Cut:
    return _cut_block(block)


_cut_block: Any = None


def _cut_all(
    found: Iterable[Block], folder: Path, tokenizer: Tokenizer, holdout: float, seed: int, processes: int
) -> Iterator[tuple[Block, Cut]]:
    """The blocks in their order, each with its tokens; never more than a few of them are in memory."""
    if processes == 1:
        for block in found:
            yield block, cut(block, tokenizer, holdout, seed)
        return
    # Not forked from here, where PyTorch may have threads; where it can be, from a process that has imported this file.
    context = multiprocessing.get_context("forkserver" if hasattr(os, "fork") else "spawn")
    context.set_forkserver_preload([__name__])
    pool = ProcessPoolExecutor(processes, context, _start_process, (str(folder), holdout, seed))
    waiting: deque = deque()
    try:
        for block in found:
            waiting.append((block, pool.submit(_cut_in_process, block)))
            if len(waiting) > 2 * processes:
                block, future = waiting.popleft()
                yield block, future.result()
        while waiting:
            block, future = waiting.popleft()
            yield block, future.result()
    except BrokenProcessPool:
        raise ValueError(
            "a process that cuts text into tokens was ended from outside, or could not start: try processes=1; in a "
            "script of your own, call `prepare` below `if __name__ == '__main__':`."
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


@dataclass(frozen=True)
class Report:
    """What `prepare` did. `dropped` and `changed` say how many documents, and how many characters, and why."""

    files: int
    size: int  # bytes
    read: int  # documents
    dropped: dict[str, int]
    changed: dict[str, int]
    documents: dict[str, int]  # by side
    tokens: dict[str, int]
    seconds: float


def prepare(
    files: Sequence[str | Path], tokenizer: Tokenizer, out: str | Path, *, holdout: float = 0.01, seed: int = 0,
    shard_tokens: int = SHARD_TOKENS, processes: int | None = None,
) -> Report:  # fmt: skip
    """Write the documents of UTF-8 text files as tokens into the new folder `out`; see `blocks` for what a document is.

    files: in whatever order; which side a document is on does not depend on it.
    holdout: the share of the documents that is kept to validate with. seed: draws which.
    shard_tokens: the tokens in each shard but the last. processes: left out, as many as there are cores.

    A document is kept the first time only that its words are there. It is written as BOS (if the tokenizer has one),
    its tokens, EOS. The folder appears whole, at the end; the work goes on in `OUT.unfinished`, and a run that is
    stopped begins again. Raises ValueError for text that is not UTF-8, JSON lines without text, an `out` that is there,
    or when no document is left to learn from.
    """
    paths, out = [Path(file) for file in files], Path(out)
    if not 0 <= holdout < 1:
        raise ValueError(f"holdout is {holdout}, expected a share from 0 to below 1, like 0.01.")
    if shard_tokens < 1 or processes is not None and processes < 1:
        raise ValueError(f"shard_tokens is {shard_tokens} and processes is {processes}, expected at least 1.")
    if out.exists():
        raise ValueError(f"{out} is there already: choose another folder, or delete it first.")
    size, started = sum(_size(path) for path in paths), time.perf_counter()
    processes = processes or (1 if size < FEW_BYTES else os.cpu_count() or 1)
    unfinished = out.with_name(out.name + ".unfinished")
    if unfinished.exists():  # of a run that was killed
        if not all(OURS.fullmatch(path.name) for path in unfinished.iterdir()):
            raise ValueError(
                f"{unfinished} is there and holds other files than ours: choose another folder, or move it."
            )
        shutil.rmtree(unfinished)
    unfinished.mkdir(parents=True)
    try:
        tokenizer.save(unfinished)
        sides = {side: _Writer(unfinished, side, tokenizer.vocab_size, shard_tokens) for side in SIDES}
        seen, counts = Seen(), Counter[str]()
        found = (block for path in paths for block in blocks(path))
        with tqdm(total=size, unit="B", unit_scale=True, dynamic_ncols=True) as bar:
            for block, row in _cut_all(found, unfinished, tokenizer, holdout, seed, processes):
                fresh = seen.first(row.prints)
                counts += row.counts + Counter({DUPLICATE: int((~fresh).sum())})
                for side, held_out in (("train", False), ("held-out", True)):
                    chosen = fresh & (row.held_out == held_out)
                    sides[side].write(row.tokens[np.repeat(chosen, row.lengths)], row.lengths[chosen])
                bar.update(len(block.data))
        if not sides["train"].documents:
            source = paths[0] if len(paths) == 1 else f"{len(paths)} files"
            raise ValueError(
                f"of {counts['read']} document{'s' * (counts['read'] != 1)} in {source} none is left to learn from: "
                f"give more text, or a smaller holdout than {holdout}."
            )
        report = Report(
            files=len(paths), size=size, read=counts["read"],
            dropped={why: counts[why] for why in DROPPED},
            changed={what: counts[what] for what in CHANGED},
            documents={side: writer.documents for side, writer in sides.items()},
            tokens={side: writer.tokens for side, writer in sides.items()},
            seconds=time.perf_counter() - started,
        )  # fmt: skip
        manifest = {
            "format": FORMAT, "vocab_size": tokenizer.vocab_size, "tokenizer": sha256_of(tokenizer_file(unfinished)),
            "shard_tokens": shard_tokens, "holdout": holdout, "seed": seed,
            "sides": {side: writer.close() for side, writer in sides.items()},
            "report": {name: value for name, value in asdict(report).items() if name != "seconds"},
        }  # fmt: skip
        manifest_file = _File(unfinished / "manifest.json")
        manifest_file.write(json.dumps(manifest, indent=1).encode())
        manifest_file.close()
        unfinished.rename(out)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return report


def _size(path: Path) -> int:
    with open(path, "rb") as file:  # what cannot be read is found before the work begins
        return os.fstat(file.fileno()).st_size


class _File:
    """A file that is written, with its SHA-256."""

    def __init__(self, path: Path) -> None:
        self.file, self.sum = open(path, "wb"), hashlib.sha256()

    def write(self, data: bytes) -> None:
        self.file.write(data)
        self.sum.update(data)

    def close(self) -> str:
        """The sum, when all is on the disk."""
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        return self.sum.hexdigest()


class _Writer:
    """The documents of one side: shards, of which each but the last is full, and the index."""

    def __init__(self, folder: Path, side: str, vocab_size: int, shard_tokens: int) -> None:
        self.folder, self.side, self.shard_tokens = folder, side, shard_tokens
        self.documents = self.tokens = 0
        self.sums: list[str] = []
        self.shard: _File | None = None
        self.index = _File(folder / f"{side}.index")
        self.index.write(bytes(8))  # the first document begins at token 0

    def write(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Some whole documents: their tokens in a row, and how many each has."""
        self.index.write((self.tokens + lengths.cumsum()).astype("<u8").tobytes())
        self.documents += len(lengths)
        while len(tokens):
            if self.shard is None:
                self.shard = _File(shard_path(self.folder, self.side, len(self.sums)))
            room = self.shard_tokens - self.tokens % self.shard_tokens
            self.shard.write(tokens[:room].tobytes())
            self.tokens += min(room, len(tokens))
            if len(tokens) >= room:
                self._finish_shard()
            tokens = tokens[room:]

    def _finish_shard(self) -> None:
        if self.shard:
            self.sums.append(self.shard.close())
            self.shard = None

    def close(self) -> dict[str, Any]:
        """What the manifest says of this side."""
        self._finish_shard()
        index = self.index.close()
        return {"documents": self.documents, "tokens": self.tokens, "index": index, "shards": self.sums}
