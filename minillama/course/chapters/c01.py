"""Exercises of chapter 01, tokens."""

import random
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from minillama import world
from minillama.course.exercise import Exercise, Experiment, Task, Wrong
from minillama.tokenizer import SentencePieceTokenizer


def _drawn(rng: torch.Generator, characters: str, length: int) -> str:
    return "".join(characters[i] for i in torch.randint(len(characters), (length,), generator=rng).tolist())


# 01.1 ----------------------------------------------------------------------------------------------------------------

_DIRT = "\u200b\ufeff\u00ad"  # zero-width space, byte order mark, soft hyphen
_MIXED = "aeZo \t\n\r\u0308\u0301\u200b\ufeff\u00ad\u200c\u200d\x00\x07\x85ﬁ²Åé风👩🚀"


def _clean_cases(rng: torch.Generator) -> Iterable[tuple[Any, ...]]:
    yield ("Zoe\u0308 and Zo\u00eb have 10² ﬁsh…  and a  kite",)
    yield ("one\r\ntwo\rthree\n\r\nfour\tfive\r\rsix\r\r\nseven",)
    yield ("The kite\x00 was\u200b red.\x07\ufeff The \u00adend.",)
    yield ("Zoe\u200b\u0308, caf\u00ade\x07\u0301",)  # only after the cleaning can it be composed
    yield ("\u200b \ufeff\x00  behind dirt \u00ad\u200b ",)
    yield ("\ufeff👩\u200d🚀 and می\u200cخواهم",)
    yield ("\n\t two lines\n\n of it \n",)
    yield ("",)
    yield (" \r\n\u200b",)
    yield (_drawn(rng, _MIXED, 60),)


def _clean(text: str, *, form: Any = "NFC", lines: str = r"\r\n|\r", kept: str = "\n\t", dirt: str = _DIRT,
           early: bool = False, order: str = "remove, strip", strip: str | None = None) -> str:  # fmt: skip
    text = unicodedata.normalize(form, text) if early and form else text
    text = re.sub(lines, "\n", text) if lines else text
    text = text.strip(strip) if order == "strip, remove" else text
    text = "".join(c for c in text if c in kept or unicodedata.category(c) != "Cc" and c not in dirt)
    text = unicodedata.normalize(form, text) if form and not early else text
    return text.strip(strip) if order == "remove, strip" else text


def _plain_clean(text: str) -> str:
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    table = {i: None for i in [*range(32), *range(127, 160)] if chr(i) not in "\n\t"} | dict.fromkeys(map(ord, _DIRT))
    return unicodedata.normalize("NFC", text.translate(table)).strip()


CLEAN = Exercise(
    "01.1", "clean text", "clean_text", minutes=15, difficulty=2,
    why="What the cleaning breaks no model can learn, and what it leaves the model learns twice.",
    reference=_plain_clean,
    cases=_clean_cases,
    wrong=(
        Wrong("compatible characters are replaced as well, 10² by 102: that is NFKC, and changes what was written.",
              lambda text: _clean(text, form="NFKC")),
        Wrong("ë is taken apart into two characters: that is NFD, where NFC is wanted.",
              lambda text: _clean(text, form="NFD")),
        Wrong("the two spellings of ë are still two: the normal form is missing.", lambda text: _clean(text, form="")),
        Wrong("it is normalised too early: dirt between a letter and its mark hides them from each other, and a "
              "second cleaning would change the text again.", lambda text: _clean(text, early=True)),
        Wrong("a Windows line end, carriage return and line feed, became two line ends.",
              lambda text: _clean(text, lines=r"\r")),
        Wrong("a carriage return alone was taken out: it is a line end too, and lines now run together.",
              lambda text: _clean(text, lines=r"\r\n")),
        Wrong("carriage returns are left, or joined with their neighbours: each is a line end or part of one.",
              lambda text: _clean(text, lines=r"\r+\n?")),
        Wrong("tabs and line ends are gone: they are control characters too, but these two stay.",
              lambda text: _clean(text, kept="")),
        Wrong("the joiners are gone: a zero-width joiner or non-joiner is part of how emoji, Hindi and Persian are "
              "written.", lambda text: _clean(text, dirt=_DIRT + "\u200c\u200d")),
        Wrong("soft hyphens are left: they show nothing, and cut a word in two for the tokenizer.",
              lambda text: _clean(text, dirt="\u200b\ufeff")),
        Wrong("byte order marks are left: they stand inside a text too, where files were put together.",
              lambda text: _clean(text, dirt="\u200b\u00ad")),
        Wrong("it is stripped before the dirt is out: spaces behind an invisible character are left at the ends.",
              lambda text: _clean(text, order="strip, remove")),
        Wrong("only control characters are out: a carriage return is a line end, and three invisible ones are dirt.",
              lambda text: _clean(text, lines="", dirt="")),
        Wrong("the ends are not stripped.", lambda text: _clean(text, order="")),
        Wrong("only spaces are stripped at the ends: line ends and tabs there go too.",
              lambda text: _clean(text, strip=" ")),
        Wrong("all white space inside became single spaces: paragraphs and tabs belong to the text.",
              lambda text: " ".join(_clean(text).split())),
    ),
    hints=(
        "Which step can make work for another one: what may stand between an e and its two dots, or before a space?",
        "Line ends first, then take characters out, then compose, then strip: so nothing is left for a second run.",
        "two replacements, the longer line end first · keep a character unless Cc or dirt, but for two · NFC · strip.",
    ),
    tolerance=0.0,
)  # fmt: skip


# 01.2 ----------------------------------------------------------------------------------------------------------------

Row = list[int]
Pair = tuple[int, int]


def _pair_cases(rng: torch.Generator) -> Iterable[tuple[Any, ...]]:
    yield ([[3, 4], [5, 6], [5, 6], [4, 5], [9, 3], [4, 7], [4, 5, 8], [4, 9, 3], [5, 6]],)
    yield ([[7, 1], [7, 1], [1, 2], [1, 2], [9, 9, 1]],)  # (7, 1) is met first, (1, 2) is the smallest
    yield ([[5, 5, 5, 5], [2, 3], [3, 2, 3]],)  # (5, 5) three times, twice without overlaps
    yield ([[8, 6, 8, 6, 8, 6, 8, 6], [1, 2], [1, 2], [1, 2]],)
    yield ([[4, 3], [3, 4], [4, 3], [2, 9], [2, 9], [2, 9]],)
    yield ([[1, 8, 3, 2], [5, 8, 3], [6, 8, 3, 8, 3], [4, 7], [4, 7]],)
    yield ([[1, 2], [4], [2, 1], [1], [2], [1], [2]],)
    yield ([],)
    yield ([[], [4], [4], []],)
    size = torch.randint(1, 9, (30,), generator=rng).tolist()
    yield ([torch.randint(6, (n,), generator=rng).tolist() for n in size],)


def _most(counts: Counter[Pair]) -> Pair | None:
    return min(counts, key=lambda pair: (-counts[pair], pair)) if counts else None


def _counted(rows: list[Row]) -> Counter[Pair]:
    return Counter(pair for row in rows for pair in pairwise(row))


def _without_overlaps(rows: list[Row]) -> Pair | None:
    counts: Counter[Pair] = Counter()
    for row in rows:
        last: tuple[Pair | None, int] = (None, -2)
        for i, pair in enumerate(pairwise(row)):
            if last != (pair, i - 1):
                counts[pair] += 1
                last = (pair, i)
    return _most(counts)


def _fails(rows: list[Row]) -> Pair:
    found = _most(_counted(rows))
    if found is None:
        raise ValueError("no pair")
    return found


PAIR = Exercise(
    "01.2", "the most frequent pair", "most_frequent_pair", minutes=10, difficulty=2,
    why="This count is all that byte-pair encoding ever learns from.",
    reference=lambda rows: _most(_counted(rows)),
    cases=_pair_cases,
    wrong=(
        Wrong("pairs are counted across rows: the end of one word and the start of the next are no neighbours.",
              lambda rows: _most(Counter(pairwise([i for row in rows for i in row])))),
        Wrong("of equally frequent pairs it takes the one that was met first: the smallest is wanted.",
              lambda rows: max(_counted(rows), key=_counted(rows).__getitem__) if _counted(rows) else None),
        Wrong("of equally frequent pairs it takes the largest: the smallest is wanted.",
              lambda rows: max(_counted(rows), key=lambda p: (_counted(rows)[p], p)) if _counted(rows) else None),
        Wrong("a pair counts once a row: it counts at every place where it stands.",
              lambda rows: _most(Counter(pair for row in rows for pair in set(pairwise(row))))),
        Wrong("(4, 3) and (3, 4) are counted as one: the order makes them two different pairs.",
              lambda rows: _most(Counter((min(p), max(p)) for row in rows for p in pairwise(row)))),
        Wrong("overlaps are skipped: in a row of four equal ids the pair stands at three places.", _without_overlaps),
        Wrong("rows are cut into twos: every id but the last is the left one of a pair.",
              lambda rows: _most(Counter(pair for row in rows for pair in zip(row[::2], row[1::2], strict=False)))),
        Wrong("where there is no pair at all it raises an error: the answer is None then.", _fails),
        Wrong("of equally frequent pairs it takes the first one met, not the smallest, and without any pair it fails.",
              lambda rows: _counted(rows).most_common(1)[0][0]),
        Wrong("it is the pair that stands in the text least often.",
              lambda rows: min(_counted(rows), key=lambda p: (_counted(rows)[p], p)) if _counted(rows) else None),
    ),
    hints=(
        "How many pairs has a row of five ids, and how many a row of one?",
        "Count the pairs of each row by itself, in one dictionary; then compare counts, and pairs if equal.",
        "a Counter · for each row, ids with the ids one further · nothing counted: None · by minus count, then pair.",
    ),
    tolerance=0.0,
)  # fmt: skip


# 01.3 ----------------------------------------------------------------------------------------------------------------


def _merge_cases(rng: torch.Generator) -> Iterable[tuple[Any, ...]]:
    rows: list[tuple[Row, int, int, int]] = [
        ([5, 7, 8, 7, 8, 8, 7, 2], 7, 8, 300),
        ([3, 3, 3, 1, 3, 3, 3, 3, 2, 3], 3, 3, 301),
        ([4, 4, 4, 4, 4], 4, 4, 256),
        ([9, 1, 2, 6, 1, 2], 1, 2, 77),  # a pair at the very end
        ([1, 2, 2, 2, 5, 1, 1, 2, 9], 1, 2, 1),  # the new id makes the pair again
        ([6], 6, 6, 7),
        ([], 1, 2, 3),
        ([8, 9, 8, 9], 9, 9, 10),  # not there
        ([17, 7, 71, 7, 7, 70, 5], 7, 7, 256),  # ids that end and begin with another's digits
    ]
    for row, a, b, new in rows:
        yield torch.tensor(row, dtype=torch.int64), a, b, new
    yield torch.randint(3, (200,), generator=rng), 1, 2, 3
    yield torch.randint(2, (150,), generator=rng), 1, 1, 2


def _merged(ids: Tensor, a: int, b: int, new: int) -> Tensor:
    matches = (ids[:-1] == a) & (ids[1:] == b)
    if a == b:
        places = torch.arange(len(matches))
        before = torch.where(matches, -1, places)  # the last place before that does not match
        run = before.cummax(0).values + 1 if len(matches) else before
        matches &= (places - run) % 2 == 0
    out, keep = ids.clone(), torch.ones(len(ids), dtype=torch.bool)
    out[:-1][matches] = new
    keep[1:] &= ~matches
    return out[keep]


def _on_list(f: Callable[[Row, int, int, int], Row]) -> Callable[[Tensor, int, int, int], Tensor]:
    return lambda ids, a, b, new: torch.tensor(f(ids.tolist(), a, b, new), dtype=torch.int64)


def _walked(row: Row, a: int, b: int, new: int, *, tail: int = 0, last: bool = True, most: int = 10**9,
            turned: bool = False, length: bool = False) -> Row:  # fmt: skip
    out: Row = []
    i = 0
    while i < len(row):
        here = i + 1 < len(row) - tail and most > 0
        if here and ((row[i], row[i + 1]) == (a, b) or turned and (row[i + 1], row[i]) == (a, b)):
            out += [new, row[i + 1]] if length else [new]
            i, most = i + 2, most - 1
        else:
            out += [row[i]] if last or i + 1 < len(row) else []
            i += 1
    return out


def _lossy(ids: Tensor, a: int, b: int, new: int) -> Tensor:
    matches = (ids[:-1] == a) & (ids[1:] == b)
    out, keep = ids.clone(), torch.ones(len(ids), dtype=torch.bool)
    out[:-1][matches] = new
    keep[1:] &= ~matches
    return out[keep]


def _again(row: Row, a: int, b: int, new: int) -> Row:
    i = 0
    while i + 1 < len(row):
        if (row[i], row[i + 1]) == (a, b):
            row[i : i + 2] = [new]
            i = max(i - 1, 0) if new in (a, b) and a != b else i + (a == b)
        else:
            i += 1
    return row


def _unskipped(row: Row, a: int, b: int, new: int) -> Row:
    pairs = [*pairwise(row), None]
    return [new if pair == (a, b) else i for i, pair in zip(row, pairs, strict=False)]


def _unguarded(row: Row, a: int, b: int, new: int, *, always_last: bool = False) -> Row:
    """Looks past the end of the row; or stops before it, and then takes the last id whatever happened to it."""
    out: Row = []
    i = 0
    while i < len(row) - always_last:
        if row[i] == a and row[i + 1] == b:
            out.append(new)
            i += 2
        else:
            out.append(row[i])
            i += 1
    return [*out, row[-1]] if always_last else out


def _digits(row: Row, a: int, b: int, new: int) -> Row:
    return list(map(int, " ".join(map(str, row)).replace(f"{a} {b}", str(new)).split()))


MERGE = Exercise(
    "01.3", "merge a pair", "merge_pair", minutes=15, difficulty=3,
    why="Training a vocabulary does this thousands of times, over all of the text.",
    reference=_merged,
    cases=_merge_cases,
    wrong=(
        Wrong("in a run of three equal ids both places are joined, though they overlap, and an id is lost.", _lossy),
        Wrong("it joins from right to left: in a run of three equal ids the first two make the pair.",
              _on_list(lambda row, a, b, new: _walked(row[::-1], b, a, new)[::-1])),
        Wrong("the pair is joined in the other order too: (a, b) is not (b, a).",
              _on_list(lambda row, a, b, new: _walked(row, a, b, new, turned=True))),
        Wrong("only the first place is joined.", _on_list(lambda row, a, b, new: _walked(row, a, b, new, most=1))),
        Wrong("the second id of a pair is left standing: one id takes the place of two.",
              _on_list(lambda row, a, b, new: _walked(row, a, b, new, length=True))),
        Wrong("a pair at the very end is missed.", _on_list(lambda row, a, b, new: _walked(row, a, b, new, tail=1))),
        Wrong("the last id is lost when it is not part of a pair.",
              _on_list(lambda row, a, b, new: _walked(row, a, b, new, last=False))),
        Wrong("an empty row comes back in fp32: name the dtype, since an empty list has none.",
              lambda ids, a, b, new: _merged(ids, a, b, new) if len(ids) else torch.tensor([])),
        Wrong("what was just made is joined again: one pass goes over the ids as they were.", _on_list(_again)),
        Wrong("nothing is skipped behind a joined pair: its second id is still there, and may begin a pair itself.",
              _on_list(_unskipped)),
        Wrong("after a pair at the very end, its second id comes once more: the last id is not always left over.",
              _on_list(lambda row, a, b, new: _unguarded(row, a, b, new, always_last=True))),
        Wrong("it raises IndexError where the row ends with an a: behind the last id there is none to look at.",
              _on_list(_unguarded)),
        Wrong("digits are joined, not ids: written out, 17 and 7 hold a 7 and a 7, and the id 17 is lost.",
              _on_list(_digits)),
    ),
    hints=(
        "In a run of four equal ids, which places begin a pair, and in a run of five?",
        "Go from left to right over a plain list, and step over both ids of a pair that you join.",
        "make a list · an index and an empty result · pair here: new id, two steps; else: the id, one step · a tensor.",
    ),
    tolerance=0.0,
    slow=lambda rng: (torch.randint(4, (50_000,), generator=rng), 1, 2, 9),
)  # fmt: skip


# 01.4 ----------------------------------------------------------------------------------------------------------------

Merges = list[tuple[str, str]]


def _random_merges(rng: torch.Generator, number: int, letters: str) -> Merges:
    """Pairs of pieces that the pairs before them make, shuffled a little."""
    pieces, merges = list(letters), dict[tuple[str, str], None]()
    while len(merges) < number:
        i, j = (torch.rand(2, generator=rng) ** 2 * len(pieces)).int().tolist()
        if len(pieces[i] + pieces[j]) <= 6 and (pieces[i], pieces[j]) not in merges:
            merges[pieces[i], pieces[j]] = None
            pieces += [] if pieces[i] + pieces[j] in pieces else [pieces[i] + pieces[j]]
    return list(merges)


def _encode_cases(rng: torch.Generator) -> Iterable[tuple[Any, ...]]:
    yield ["kitten", "mitten", "ten", " ten", "nett"], [("e", "n"), ("t", "t"), ("t", "en"), ("i", "tt"), ("i", "t")]
    yield ["abc", "abcabc", "bca", "abc"], [("b", "c"), ("a", "b"), ("a", "bc")]  # not from left to right; one twice
    yield ["aaa", "aaaa", "aaaaa", "a", ""], [("a", "a"), ("aa", "aa")]
    yield ["abc", "xabc"], [("ab", "c"), ("x", "a"), ("a", "b")]  # its pieces are made later
    yield ["abab", "ababab"], [("ab", "a"), ("a", "b")]
    yield ["abcd"], [("a", "b"), ("c", "d"), ("a", "bc"), ("b", "c"), ("ab", "cd")]
    yield ["abc", "abcabc"], [("b", "c"), ("ab", "c")]  # a + bc makes the same letters, and is not in the list
    yield ["风筝", "é🪁"], []
    letters = "abc"
    merges = _random_merges(rng, 12, letters)
    order = torch.randperm(12, generator=rng).tolist()
    words = [_drawn(rng, letters, int(n)) for n in torch.randint(2, 12, (12,), generator=rng)]
    yield words, merges
    yield words, [merges[i] for i in order]


def _bpe(word: str, merges: Merges, *, pick: str = "rank", place: str = "left", steps: int = 10**9,
         by_text: bool = False, unseen: int = 0) -> list[str]:  # fmt: skip
    """Join one pair after the other: which one (`pick`), and where, if it is there twice; the last `unseen` never."""
    rank = {(a + b if by_text else (a, b)): i for i, (a, b) in reversed(list(enumerate(merges)))}
    pieces = list(word)
    while steps > 0:
        keys = [a + b if by_text else (a, b) for a, b in pairwise(pieces[: len(pieces) - unseen])]
        found = [(rank[key], i) for i, key in enumerate(keys) if key in rank]
        if not found:
            break
        best = {"rank": min(found)[0], "worst": max(found)[0], "first": found[0][0]}[pick]
        places = [i for r, i in found if r == best]
        chosen = places[-1] if place == "right" else places[0]
        if place == "everywhere":
            pair = pieces[chosen], pieces[chosen + 1]
            pieces = _joined(pieces, pair)
        else:
            pieces[chosen : chosen + 2] = [pieces[chosen] + pieces[chosen + 1]]
        steps -= 1
    return pieces


def _joined(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    out: list[str] = []
    i = 0
    while i < len(pieces):
        size = 2 if tuple(pieces[i : i + 2]) == pair else 1
        out.append("".join(pieces[i : i + size]))
        i += size
    return out


def _once_through(word: str, merges: Merges) -> list[str]:
    pieces = list(word)
    for pair in merges:
        pieces = _joined(pieces, pair)
    return pieces


def _pairs_of_characters(word: str, merges: Merges) -> list[str]:
    pieces = list(word)
    for pair in sorted(set(pairwise(word)) & set(merges), key=merges.index):
        pieces = _joined(pieces, pair)
    return pieces


def _longest(word: str, merges: Merges) -> list[str]:
    known, out = {a + b for a, b in merges}, []
    while word:
        size = max((n for n in range(2, len(word) + 1) if word[:n] in known), default=1)
        out.append(word[:size])
        word = word[size:]
    return out


def _words(f: Callable[..., list[str]], **how: Any) -> Callable[[list[str], Merges], list[list[str]]]:
    return lambda words, merges: [f(word, merges, **how) for word in words]


def _encoded(words: list[str], merges: Merges) -> list[list[str]]:
    rank = {pair: i for i, pair in reversed(list(enumerate(merges)))}
    out = []
    for word in words:
        pieces = list(word)
        while len(pieces) > 1:
            first, at = min((rank.get(pair, len(merges)), i) for i, pair in enumerate(pairwise(pieces)))
            if first == len(merges):
                break
            pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
        out.append(pieces)
    return out


def _zero_is_false(word: str, merges: Merges) -> list[str]:
    rank = {pair: i for i, pair in enumerate(merges)}
    pieces = list(word)
    while len(pieces) > 1:
        _, at = min((rank.get(pair) or len(merges), i) for i, pair in enumerate(pairwise(pieces)))
        if (pieces[at], pieces[at + 1]) not in rank:
            break
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
    return pieces


def _slow_words(rng: torch.Generator) -> tuple[Any, ...]:
    letters = [chr(0x4E00 + i) for i in range(80)]
    merges = [(a, b) for a in letters for b in letters][:6_000]
    return [_drawn(rng, "".join(letters), 4) for _ in range(1500)], merges


ENCODE = Exercise(
    "01.4", "encode with merges", "bpe_encode", minutes=25, difficulty=4,
    why="Every prompt goes through this, with a hundred thousand merges for a large model.",
    reference=_encoded,
    cases=_encode_cases,
    wrong=(
        Wrong("it joins from left to right whatever can be joined: the pair that is earliest in the list goes first.",
              _words(_bpe, pick="first")),
        Wrong("it takes the longest known piece from the left: that is another kind of tokenizer, without an order.",
              _words(_longest)),
        Wrong("it walks through the list once: a pair that only becomes possible later is missed.",
              _words(_once_through)),
        Wrong("a pair is joined at all its places at once: after each one, look again for the earliest in the list.",
              _words(_bpe, place="everywhere")),
        Wrong("of two places of the same pair it takes the right one first: the left one is wanted.",
              _words(_bpe, place="right")),
        Wrong("the last pair of the list goes first: the order is turned round.", _words(_bpe, pick="worst")),
        Wrong("it stops after one merge: go on until no pair of the list is left.", _words(_bpe, steps=1)),
        Wrong("two pieces are joined because together they make a known piece: the pair itself must be in the list.",
              _words(_bpe, by_text=True)),
        Wrong("nothing is joined: each word is still its characters.", lambda words, merges: [list(w) for w in words]),
        Wrong("the first pair of the list is never joined: its place is 0, and 0 was taken for not there.",
              lambda words, merges: _encoded(words, merges[1:])),
        Wrong("the first pair of the list comes last or not at all: its place is 0, and that counts as false.",
              _words(_zero_is_false)),
        Wrong("the last two pieces of a word are never looked at as a pair: n pieces have n - 1 pairs of neighbours.",
              _words(_bpe, unseen=1)),
        Wrong("only the pairs of the characters are looked up: a joined piece has new neighbours, so look again.",
              _words(_pairs_of_characters)),
        Wrong("a word that comes twice was cut once only: there is one answer for each place in the list of words.",
              lambda words, merges: _encoded(list(dict.fromkeys(words)), merges)),
    ),
    hints=(
        "A word has seven pieces, so six pairs; do you look the six up in the list, or the list in the six?",
        "Make a dictionary from pair to place once; then join the neighbours with the lowest place, and look again.",
        "place of each pair · for each word its characters · the lowest (place, index) of neighbours · join · repeat.",
    ),
    tolerance=0.0,
    slow=_slow_words,
)  # fmt: skip


# 01.5 ----------------------------------------------------------------------------------------------------------------


def _fallback_cases(rng: torch.Generator) -> Iterable[tuple[Any, ...]]:
    yield "a风b", "ab", 99
    yield "a风b", "ab", 3
    yield "🪁 kite", "kite ", 3
    yield "naïve\n风", "naïve", 7
    yield "é", "", 1
    yield "x <0xE9> 风", "x <0xE9>", 11  # a text that spells a byte token
    yield "", "abc", 5
    yield "kite", "kite", 0
    yield "ï 🪁", "ï ", 99  # bytes at the end, all of them
    letters = "abé风筝🪁<0xA>\n\t"
    for _ in range(3):
        text = _drawn(rng, letters, 12)
        yield text, _drawn(rng, letters, 4), int(torch.randint(4, 20, (1,), generator=rng))


def _spelled(text: str, known: str, *, spell: str = "<0x{:02X}>", code: str = "utf-8") -> list[str]:
    return [token for c in text for token in ([c] if c in known else [spell.format(b) for b in c.encode(code)])]


def _read(tokens: list[str], *, errors: str = "replace") -> str:
    parts = (bytes([int(t[3:5], 16)]) if len(t) > 1 else t.encode() for t in tokens)
    return b"".join(parts).decode(errors=errors)


def _of_each(tokens: list[str]) -> str:
    """A mark for each byte of the character that is cut off."""
    for cut in range(4):
        try:
            return _read(tokens[: len(tokens) - cut], errors="strict") + "\ufffd" * cut
        except UnicodeDecodeError:
            continue
    raise AssertionError


def _piecewise(tokens: list[str], *, alone: bool = False, rest: str = "end") -> str:
    """Each byte by itself; or runs of bytes, of which the last one is forgotten, or all bytes in one run at the end."""
    text, run = "", b""
    for token in tokens:
        if len(token) > 1:
            run += bytes([int(token[3:5], 16)])
        if rest == "lost" and len(token) == 1 or alone:
            text, run = text + run.decode(errors="replace"), b""
        text += token if len(token) == 1 else ""
    return text if rest == "lost" else text + run.decode(errors="replace")


def _fallback(write: Callable[..., list[str]] = _spelled, read: Callable[..., str] = _read,
              **how: Any) -> Callable[[str, str, int], tuple[list[str], str]]:  # fmt: skip
    def answer(text: str, known: str, limit: int) -> tuple[list[str], str]:
        return write(text, known, **how), read(_spelled(text, known)[:limit])

    return answer


def _by_hand(text: str, known: str, limit: int) -> tuple[list[str], str]:
    tokens: list[str] = []
    back = ""
    for c in text:
        own = [c] if c in known else [f"<0x{byte:02X}>" for byte in c.encode()]
        room = limit - len(tokens)
        back += c if room >= len(own) else "\ufffd" if room > 0 else ""
        tokens += own
    return tokens, back


FALLBACK = Exercise(
    "01.5", "bytes for what is left", "byte_fallback", minutes=20, difficulty=3,
    why="It lets a LLaMA write any character of the world, and shows a � when it stops in the middle of one.",
    reference=_by_hand,
    cases=_fallback_cases,
    wrong=(
        Wrong("an unknown character became one token with its code point: it becomes its UTF-8 bytes, one token each.",
              lambda text, known, limit: ([c if c in known else f"<0x{ord(c):02X}>" for c in text], text[:limit])),
        Wrong("unknown characters became <unk>: what they were is lost.",
              _fallback(lambda text, known: [c if c in known else "<unk>" for c in text])),
        Wrong("the bytes are not those of UTF-8, but of UTF-16.", _fallback(code="utf-16-be")),
        Wrong("byte tokens are in small letters: <0xE2>, not <0xe2>.", _fallback(spell="<0x{:02x}>")),
        Wrong("a small byte has one digit: a byte token has always two, as in <0x0A>.", _fallback(spell="<0x{:X}>")),
        Wrong("bytes are written in decimal: two hexadecimal digits are wanted.", _fallback(spell="<0x{}>")),
        Wrong("known characters are spelled in bytes too: only what has no token of its own falls back.",
              _fallback(lambda text, known: [t for c in text
                                             for t in ([c] if c.isascii() and c in known else _spelled(c, ""))])),
        Wrong("the rest of a character that was cut off is left out: it must show as one �.",
              _fallback(read=lambda tokens: _read(tokens, errors="ignore"))),
        Wrong("there is a � for each byte of the character that was cut off, expected one for the character.",
              _fallback(read=_of_each)),
        Wrong("it raises UnicodeDecodeError when the tokens end inside a character.",
              _fallback(read=lambda tokens: _read(tokens, errors="strict"))),
        Wrong("each byte was read as a character by itself: the bytes of one character belong together.",
              _fallback(read=lambda tokens: "".join(chr(int(t[3:5], 16)) if len(t) > 1 else t for t in tokens))),
        Wrong("each byte was decoded by itself and became a �: the bytes of one character are decoded together.",
              _fallback(read=lambda tokens: _piecewise(tokens, alone=True))),
        Wrong("bytes at the end are never shown: after the last token, some may still wait to be decoded.",
              _fallback(read=lambda tokens: _piecewise(tokens, rest="lost"))),
        Wrong("the bytes of all characters stand at the end of the text: each belongs before the next known one.",
              _fallback(read=_piecewise)),
        Wrong("every character is spelled in bytes, and `known` is not looked at.",
              lambda text, known, limit: (_spelled(text, ""), _read(_spelled(text, "")[:limit]))),
        Wrong("a text that spells <0xE9> in single characters was read as a byte: look at each token by itself.",
              _fallback(read=lambda tokens: re.sub(
                  rb"<0x([0-9A-F]{2})>", lambda m: bytes([int(m[1], 16)]), "".join(tokens).encode()
              ).decode(errors="replace"))),
        Wrong("the limit cuts characters, not tokens: a character that falls back counts for each of its bytes.",
              lambda text, known, limit: (_spelled(text, known), text[:limit])),
        Wrong("the limit cuts the bytes of the text: a known character is one token, however many bytes it has.",
              lambda text, known, limit: (_spelled(text, known), text.encode()[:limit].decode(errors="replace"))),
        Wrong("the first answer is cut as well: it is all the tokens; only the text comes from the first `limit`.",
              lambda text, known, limit: (_spelled(text, known)[:limit], _read(_spelled(text, known)[:limit]))),
    ),
    hints=(
        "How many bytes has 风 in UTF-8, and what can you show when only two of them are there?",
        "Make bytes of all tokens first, those of known characters too; decode once at the end, and forgive errors.",
        "for each character itself or its bytes in two hexadecimal digits · first `limit` · bytes of each · decode.",
    ),
    tolerance=0.0,
)  # fmt: skip


# 01.6 ----------------------------------------------------------------------------------------------------------------

SIZE = 1000  # pieces in both vocabularies


def _tokens_per_story() -> dict[str, float]:
    """Tokens per story of 100 new stories, under a vocabulary from mostly English stories and one from half of each."""
    rng = random.Random(1)
    stories, fresh = [world.sample(rng) for _ in range(300)], [world.sample(rng) for _ in range(100)]
    mixtures = {
        "mostly": [story.text for story in stories] + [story.chinese for story in stories[:3]],
        "half": [story.text for story in stories[:150]] + [story.chinese for story in stories[150:]],
    }
    found = {}
    for name, texts in mixtures.items():
        tokenizer = SentencePieceTokenizer.train(texts, vocab_size=SIZE)
        found[f"english_{name}"] = sum(len(tokenizer.encode(story.text)) for story in fresh) / len(fresh)
        found[f"chinese_{name}"] = sum(len(tokenizer.encode(story.chinese)) for story in fresh) / len(fresh)
    return found


def _verify(measured: dict[str, Any]) -> str:
    for key, value in _tokens_per_story().items():
        if abs(measured[key] - value) > 0.02 * value:
            return (
                f"{key!r} is not what these stories give: draw 300 stories and then 100 new ones from one "
                f"random.Random(1), train {SIZE:,} pieces on the mixture, and count the new ones' tokens per story."
            )
    if not 0 < measured["predicted"] < 100:
        return f"the prediction is {measured['predicted']}, expected Chinese's price, a ratio above 0."
    return ""


EXPERIMENT = Experiment(
    "01.6", "experiment: the price of a language", "measured_01", minutes=25, difficulty=3,
    why="Who pays how much for the same story is decided before training, by the texts a vocabulary is learned from.",
    keys={
        "predicted": "Chinese tokens over English tokens that you expect when half is Chinese, written beforehand",
        "english_mostly": "tokens per new story in English, vocabulary from English and three translations",
        "chinese_mostly": "tokens per new story in Chinese, the same vocabulary",
        "english_half": "tokens per new story in English, vocabulary from half English, half Chinese",
        "chinese_half": "tokens per new story in Chinese, the same vocabulary",
        "because": "a sentence on why",
    },
    verify=_verify,
    explain="on who pays for the pieces that Chinese gets",
    hints=(
        "A vocabulary has a fixed number of places: what was thrown out, when Chinese got some of them?",
        "Train twice with the same size, and encode the same 100 new stories four times.",
        "one random.Random(1) · two lists of texts · train each · len of encode, summed, over 100, for each language.",
    ),
)  # fmt: skip


EXERCISES: list[Task] = [CLEAN, PAIR, MERGE, ENCODE, FALLBACK, EXPERIMENT]
