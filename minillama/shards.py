"""Shards (chapter 16): a corpus on disk, as `corpus.prepare` writes it, and from there to batches.

`ShardBatches` reads only what a step asks for: files are mapped into memory, and 40 bytes are kept for each piece of a
document. A folder holds `manifest.json`, the tokenizer, and for `train` and `held-out` the shards `SIDE-NNNNN.bin`,
little-endian uint16 (uint32 where the vocabulary needs it), and `SIDE.index`: where each document begins, and where the
last one ends, in tokens, uint64.
"""

import bisect
import functools
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minillama.data import Batch, Validation
from minillama.download import sha256_of
from minillama.loss import IGNORE
from minillama.tokenizer import load_tokenizer

FORMAT = 1
SIDES = ("train", "held-out")
MAX_MANIFEST = 2**26  # bytes


def token_type(vocab_size: int) -> str:
    """How a token is written to disk."""
    return "<u2" if vocab_size <= 2**16 else "<u4"


def shard_path(folder: Path, side: str, number: int) -> Path:
    return folder / f"{side}-{number:05}.bin"


def tokenizer_file(folder: Path) -> Path:
    return next(path for name in ("model", "json") if (path := folder / f"tokenizer.{name}").exists())


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
            if manifest["tokenizer"] != sha256_of(tokenizer_file(self.folder)):
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
            sizes[shard_path(self.folder, side, number)] = (width * held, digest)
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
