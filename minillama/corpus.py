"""Corpora (chapter 16): text in files of any size to tokens on disk, and from there to batches.

`prepare` reads, cleans and cuts the text, leaves out what was there before, holds some documents out, and writes the
rest as one long row of tokens for each side, in pieces (shards) of a fixed size. `ShardBatches` reads only what a step
asks for, so neither ever needs the memory that the whole would take. What grows with the corpus: `prepare` keeps 16
bytes for each document (twice that at times), `ShardBatches` 40 for each piece of one.

A folder that `prepare` wrote holds `manifest.json`, the tokenizer, and for `train` and `held-out` the shards
`SIDE-NNNNN.bin`, little-endian uint16 (uint32 where the vocabulary needs it), and `SIDE.index`: where each document
begins, and where the last one ends, in tokens, uint64.
"""

import bisect
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
import torch
from tqdm.auto import tqdm

from minillama.data import Batch, Validation
from minillama.download import sha256_of
from minillama.loss import IGNORE
from minillama.tokenizer import Tokenizer, load_tokenizer

FORMAT = 1
SIDES = ("train", "held-out")
BLOCK = 2**20  # bytes that are read, and handed to a process, at a time
PASSAGE = 2**12  # bytes: the most that a document has in a file that does not say where its documents end
MAX_DOCUMENT = 2**24  # bytes of a document in a file that does say it
MAX_MANIFEST = 2**26
SHARD_TOKENS = 2**26
FEW_BYTES = 2**23  # less text than this is cut into tokens before other processes have started
DIVIDER = re.compile(rb"^<\|endoftext\|>[ \t\r]*(?:\n|\Z)", re.MULTILINE)
EMPTY, DUPLICATE, UNWRITABLE = DROPPED = "empty", "there before", "a character that the tokenizer cannot write"
BOMS, ENDS, CONTROLS = CHANGED = "byte order marks removed", "line ends made \\n", "control characters removed"
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
    Raises ValueError for a document of more than MAX_DOCUMENT bytes.
    """
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


def token_type(vocab_size: int) -> str:
    """How a token is written to disk."""
    return "<u2" if vocab_size <= 2**16 else "<u4"


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
    shutil.rmtree(unfinished, ignore_errors=True)  # of a run that was killed
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
            raise ValueError(f"of {counts['read']} documents none is left to learn from: give more text.")
        report = Report(
            files=len(paths), size=size, read=counts["read"],
            dropped={why: counts[why] for why in DROPPED},
            changed={what: counts[what] for what in CHANGED},
            documents={side: writer.documents for side, writer in sides.items()},
            tokens={side: writer.tokens for side, writer in sides.items()},
            seconds=time.perf_counter() - started,
        )  # fmt: skip
        manifest = {
            "format": FORMAT, "vocab_size": tokenizer.vocab_size, "tokenizer": sha256_of(_tokenizer_file(unfinished)),
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


def _shard(folder: Path, side: str, number: int) -> Path:
    return folder / f"{side}-{number:05}.bin"


def _tokenizer_file(folder: Path) -> Path:
    return next(path for name in ("model", "json") if (path := folder / f"tokenizer.{name}").exists())


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
                self.shard = _File(_shard(self.folder, self.side, len(self.sums)))
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


# From disk


class Corpus:
    """A folder that `prepare` wrote, opened to be read.

    tokenizer: the one that it was cut with. sha256: of the manifest, and so of all that is in the folder.
    starts: of each side, where its documents begin, and the last one's end, (N + 1,).

    Raises ValueError, in one sentence, for a folder that is not what was written: sizes, the index and the tokenizer
    are always compared; with `verify` the SHA-256 of every file too, for which all of them are read.
    """

    def __init__(self, folder: str | Path, *, verify: bool = False) -> None:
        self.folder = Path(folder)
        manifest, self.sha256 = self._manifest()
        try:
            if manifest["format"] != FORMAT:
                raise ValueError(f"its format is {manifest['format']!r:.40}, this program reads {FORMAT}")
            self.tokenizer = load_tokenizer(self.folder)
            if manifest["tokenizer"] != sha256_of(_tokenizer_file(self.folder)):
                raise ValueError("its tokenizer is not the one that it was prepared with")
            if manifest["vocab_size"] != self.tokenizer.vocab_size:
                sizes = f"{manifest['vocab_size']!r:.40} tokens, but the tokenizer {self.tokenizer.vocab_size}"
                raise ValueError(f"its vocabulary is said to have {sizes}")
            self.shard_tokens = _count(manifest["shard_tokens"], "shard_tokens", least=1)
            self.starts: dict[str, np.ndarray] = {}
            self._shards: dict[str, list[np.ndarray]] = {}
            for side in SIDES:
                self._open(side, manifest["sides"][side], verify)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{self.folder} has a damaged manifest ({error!r:.80}); prepare it again.") from None
        except ValueError as error:
            raise ValueError(f"{self.folder} cannot be read: {error}; prepare it again.") from None

    def read(self, side: str, start: int, end: int) -> np.ndarray:
        """Tokens `start` to `end` of a side, (end - start,) int64."""
        first, last = start // self.shard_tokens, (end - 1) // self.shard_tokens
        parts = []
        for number in range(first, last + 1):
            offset = number * self.shard_tokens
            parts.append(self._shards[side][number][max(0, start - offset) : end - offset])
        tokens = np.concatenate(parts).astype(np.int64)
        if (largest := tokens.max(initial=0)) >= self.tokenizer.vocab_size:
            raise ValueError(
                f"{self.folder} is damaged: token {largest} is in it, but its vocabulary has "
                f"{self.tokenizer.vocab_size}; prepare it again."
            )
        return tokens

    def _manifest(self) -> tuple[dict[str, Any], str]:
        path = self.folder / "manifest.json"
        if not path.is_file():
            raise ValueError(f"{self.folder} holds no corpus: expected a folder that `minillama data prepare` wrote.")
        if path.stat().st_size > MAX_MANIFEST:
            raise ValueError(f"{path} has {path.stat().st_size} bytes, expected {MAX_MANIFEST} at most.")
        data = path.read_bytes()
        try:
            manifest = json.loads(data)
        except (ValueError, RecursionError):
            raise ValueError(f"{path} is damaged: it is not JSON; prepare the corpus again.") from None
        return manifest, hashlib.sha256(data).hexdigest()

    def _open(self, side: str, said: dict[str, Any], verify: bool) -> None:
        documents, tokens = _count(said["documents"], "documents"), _count(said["tokens"], "tokens")
        width = np.dtype(token_type(self.tokenizer.vocab_size)).itemsize
        index, sums = self.folder / f"{side}.index", list(said["shards"])
        if len(sums) != -(-tokens // self.shard_tokens):
            raise ValueError(f"{side} has {len(sums)} shards of {self.shard_tokens} tokens, but {tokens} tokens")
        sizes = {index: (8 * (documents + 1), said["index"])}
        for number, digest in enumerate(sums):
            held = min(self.shard_tokens, tokens - number * self.shard_tokens)
            sizes[_shard(self.folder, side, number)] = (width * held, digest)
        for path, (size, digest) in sizes.items():
            found = path.stat().st_size if path.is_file() else 0
            if found != size:
                raise ValueError(f"{path.name} has {found} bytes, expected {size}")
            if verify and sha256_of(path) != digest:
                raise ValueError(f"{path.name} has the right size, but another SHA-256 than when it was written")
        starts = np.fromfile(index, "<u8").astype(np.int64)
        # BOS or a first token, and EOS: no document has less than two.
        if starts[0] != 0 or starts[-1] != tokens or starts.max() > tokens or (np.diff(starts) < 2).any():
            raise ValueError(f"{index.name} does not rise from 0 to {tokens}, the number of tokens")
        self.starts[side] = starts
        shards = [path for path in sizes if path != index]
        self._shards[side] = [np.memmap(path, token_type(self.tokenizer.vocab_size), "r") for path in shards]


def _count(value: Any, name: str, least: int = 0) -> int:
    if type(value) is not int or value < least:
        raise ValueError(f"{name} is {value!r:.40}, expected a whole number from {least} on")
    return value


# To batches


class ShardBatches:
    """The documents of a corpus, again and again, each time in another order: rows of `length` tokens that hold one
    document or several, none of which sees another.

    A document with more than `length` tokens to predict is cut into pieces. Every token of an epoch is predicted once,
    but for the first of each document (BOS, or what comes without one). A batch always has `batch_size` rows: where an
    epoch ends inside it, the rest are of the next.

    n_rows: the rows of an epoch. padding: the share of their places that is not filled.
    Raises ValueError if the folder cannot be read (see `Corpus`), or has no document on this side.
    """

    def __init__(self, folder: str | Path, batch_size: int, length: int, seed: int = 0, held_out: bool = False) -> None:
        if batch_size < 1 or length < 1:
            raise ValueError(f"batch_size is {batch_size} and length is {length}, expected at least 1.")
        self.corpus, self.side = Corpus(folder), SIDES[held_out]
        self.batch_size, self.length, self.seed = batch_size, length, seed
        starts = self.corpus.starts[self.side]
        if len(starts) < 2:
            raise ValueError(
                f"{folder} has no {self.side} document: prepare it with more text, or another share to hold out."
            )
        asked = np.diff(starts) - 1  # tokens to predict, of each document
        pieces = -(-asked // length)
        document = np.repeat(np.arange(len(asked)), pieces)
        offset = length * (np.arange(len(document)) - np.repeat(pieces.cumsum() - pieces, pieces))
        lengths = np.minimum(asked[document] - offset, length)
        by_length = lengths.argsort(kind="stable")
        self._begins = (starts[document] + offset)[by_length]  # where the pieces begin, the shortest first
        counts = np.bincount(lengths, minlength=length + 1)
        self._first = counts.cumsum() - counts  # the place of the first piece of each length
        self._shelves = shelves(counts.tolist(), length)
        self._rows = np.cumsum([count for _, count in self._shelves])
        self.n_rows = int(self._rows[-1])
        self.padding = 1 - int(asked.sum()) / (self.n_rows * length)
        self._epoch = functools.lru_cache(maxsize=2)(self._shuffle)

    def __call__(self, step: int) -> Batch:
        return self.rows(range(step * self.batch_size, (step + 1) * self.batch_size))

    def rows(self, numbers: Iterable[int]) -> Batch:
        """The rows of these numbers, which count on from epoch to epoch, as one batch."""
        rows = [self._row(*divmod(number, self.n_rows)) for number in numbers]
        shape = (len(rows), self.length)
        pad_id = self.corpus.tokenizer.pad_id
        inputs, targets, segments = (torch.full(shape, fill) for fill in (pad_id, IGNORE, -1))
        for i, row in enumerate(rows):
            start = 0
            for number, (begin, length) in enumerate(row):
                tokens = torch.from_numpy(self.corpus.read(self.side, begin, begin + length + 1))
                place = slice(start, start + length)
                inputs[i, place], targets[i, place], segments[i, place] = tokens[:-1], tokens[1:], number
                start += length
        return Batch(inputs, targets, segments if max(map(len, rows)) > 1 else None)

    def _row(self, epoch: int, number: int) -> list[tuple[int, int]]:
        """The pieces of a row: where each begins, and how many tokens it asks for."""
        begins, order = self._epoch(epoch)
        place = int(order[number])
        shelf = int(np.searchsorted(self._rows, place, side="right"))
        place -= int(self._rows[shelf - 1]) if shelf else 0
        return [(int(begins[self._first[length] + taken + place]), length) for length, taken in self._shelves[shelf][0]]

    def _shuffle(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The pieces of each length in a new order, and the rows in one."""
        # The old generator: its numbers are the same in every release of NumPy.
        random = np.random.RandomState([self.seed % 2**32, self.seed // 2**32 % 2**32, epoch])
        begins = self._begins.copy()
        for some in np.split(begins, self._first[1:]):
            random.shuffle(some)
        return begins, random.permutation(self.n_rows)


def shelves(counts: Sequence[int], length: int) -> list[tuple[list[tuple[int, int]], int]]:
    """How to put `counts[n]` pieces of n tokens, for every n up to `length`, into few rows of `length` places.

    Answers kinds of rows: (what is in it, how many rows are like this). What is in it: for each piece its length n, and
    how many pieces of n tokens are in kinds before; the rows of the kind take the next ones, one each.

    The longest first, each into the row with the least room that it fits into ("best-fit decreasing", never more than
    11/9 of the fewest rows, and one; Johnson 1973). Pieces of one length are placed together, so that a million cost
    no more than a thousand ("histogram packing"; Krell et al. 2021, arXiv:2107.02027).
    """
    rows: dict[int, list[tuple[list[int], int]]] = {}  # what is in them, and how many, by the room that is left
    rooms: list[int] = []  # those of `rows` with room, ascending

    def put(content: list[int], count: int) -> None:
        room = length - sum(content)
        if room and not rows.get(room):
            bisect.insort(rooms, room)
        rows.setdefault(room, []).append((content, count))

    for n in range(length, 0, -1):
        left = counts[n]
        while left:
            room, count = length, left  # new rows, if no other has room
            content: list[int] = []
            if (place := bisect.bisect_left(rooms, n)) < len(rooms):
                room = rooms[place]
                content, count = rows[room].pop()
                if not rows[room]:
                    rooms.pop(place)
            each = min(left, room // n)
            used = min(count, left // each)
            if content and used < count:
                put(content, count - used)
            put([*content, *[n] * each], used)
            left -= used * each
    taken = Counter[int]()
    kinds = []
    for content, count in (kind for some in rows.values() for kind in some):
        pieces = []
        for n in content:
            pieces.append((n, taken[n]))
            taken[n] += count
        kinds.append((pieces, count))
    return kinds


def corpus_validation(folder: str | Path, batch_size: int, length: int, max_rows: int = 64) -> Validation:
    """The held-out documents of a corpus, as many as fit into `max_rows` rows, always the same ones.

    Raises ValueError if there are none, or the folder cannot be read.
    """
    source = ShardBatches(folder, batch_size, length, held_out=True)
    numbers = range(min(source.n_rows, max_rows))
    return Validation([source.rows(numbers[i : i + batch_size]) for i in numbers[::batch_size]])
