# %% [markdown]
# # 01 · Exercises: tokens
#
# Chapter: [01 tokens](../chapters/01_tokens.ipynb). Run a check as often as you like: it says what is wrong.

# %%
import random
import unicodedata
from collections import Counter

import torch
from torch import Tensor

from minillama import world
from minillama.course import case, check, hint, report
from minillama.tokenizer import SentencePieceTokenizer

# %% [markdown] exercise="01.1"
# `clean_text(text)`: a string → a string, with all of these done:
#
# - line ends: `\r\n` and a `\r` alone each become one `\n`;
# - control characters (category Cc) are taken out, but for `\n` and `\t`;
# - zero-width space U+200B, byte order mark U+FEFF and soft hyphen U+00AD are taken out, wherever they stand; the joiners
#   U+200C and U+200D stay, and so does every other character;
# - the result is in normal form NFC;
# - white space at both ends (spaces, tabs, line ends: what `str.strip()` takes) is gone; inside, all of it stays.
#
# Cleaning a clean text changes nothing. For example `clean_text(" a\x00\r\nb\u200b ")` is `"a\nb"`.


# %% exercise="01.1"
def clean_text(text: str) -> str:
    # <solution>
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    dirt = {"\u200b", "\ufeff", "\u00ad"}
    text = "".join(c for c in text if c in "\n\t" or (unicodedata.category(c) != "Cc" and c not in dirt))
    return unicodedata.normalize("NFC", text).strip()
    # </solution>


# %% [markdown] exercise="01.2"
# `most_frequent_pair(rows)`: rows of ids, a list of lists of integers, one for each word → the pair of neighbours that stands
# at the most places, a tuple of two ids. A pair never goes from one row to the next. In `[5, 5, 5]` the pair (5, 5) stands at
# two places. Of equally frequent pairs, the smallest as a tuple: the one with the smaller first id, then second. None if there
# is no pair.
#
# For example `most_frequent_pair([[3, 1, 2], [1, 2]])` is `(1, 2)`.


# %% exercise="01.2"
def most_frequent_pair(rows: list[list[int]]) -> tuple[int, int] | None:
    # <solution>
    counts = Counter()
    for row in rows:
        counts.update(zip(row, row[1:], strict=False))
    if not counts:
        return None
    most = max(counts.values())
    return min(pair for pair, count in counts.items() if count == most)
    # </solution>


# %% [markdown] exercise="01.3"
# `merge_pair(ids, a, b, new)`: one row of ids, (N,) int64 → a new row, (M,) int64 (an empty one too), in which each a that is
# followed by b has become, together with it, the one id `new`; from left to right, once, over the ids as they were given. The
# row may be long: a loop over a plain list is quick enough, a loop over the elements of a tensor is not.
#
# For example `merge_pair(torch.tensor([7, 7, 7, 2]), 7, 7, 9)` is `[9, 7, 2]`.


# %% exercise="01.3"
def merge_pair(ids: Tensor, a: int, b: int, new: int) -> Tensor:
    """(N,) → (M,), M ≤ N"""
    # <solution>
    row, merged, i = ids.tolist(), [], 0
    while i < len(row):
        if i + 1 < len(row) and row[i] == a and row[i + 1] == b:
            merged.append(new)
            i += 2
        else:
            merged.append(row[i])
            i += 1
    return torch.tensor(merged, dtype=torch.int64)
    # </solution>


# %% [markdown] exercise="01.4"
# `bpe_encode(words, merges)`: words, a list of strings, and merges, a list of pairs of strings → for each word the list of its
# pieces. A word begins as its characters. Then, of all pairs of neighbours in it, the one that stands earliest in `merges` is
# joined, at its leftmost place; then look again, until no pair of neighbours is in the list. That is not quite the chapter's
# `cut_word`: a list may hold a pair before the merges that make its pieces, and one walk through it would miss that. (No pair
# is in the list twice.) There may be 100,000 merges: to walk through all of them for each word takes too long, and the check
# looks at the time.
#
# For example with merges `[("b", "c"), ("a", "b"), ("a", "bc")]` the words `["abc", "ab"]` are `[["abc"], ["ab"]]`.


# %% exercise="01.4"
def bpe_encode(words: list[str], merges: list[tuple[str, str]]) -> list[list[str]]:
    # <solution>
    rank = {tuple(pair): i for i, pair in enumerate(merges)}
    encoded = []
    for word in words:
        pieces = list(word)
        while True:
            pairs = enumerate(zip(pieces, pieces[1:], strict=False))
            found = [(rank[pair], i) for i, pair in pairs if pair in rank]
            if not found:
                break
            _, i = min(found)
            pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
        encoded.append(pieces)
    return encoded
    # </solution>


# %% [markdown] exercise="01.5"
# `byte_fallback(text, known, limit)`: text and the characters that have a token of their own, both strings → two things. First
# all the tokens of the text, a list of strings: a known character is itself, any other is its UTF-8 bytes, one token each,
# written as `<0xE2>` with two large hexadecimal digits. Second the text that the first `limit` tokens stand for: if they end
# inside a character, one `�` (U+FFFD) stands for what there is of it.
#
# For example `byte_fallback("aé", "a", 2)` is `(["a", "<0xC3>", "<0xA9>"], "a�")`.


# %% exercise="01.5"
def byte_fallback(text: str, known: str, limit: int) -> tuple[list[str], str]:
    # <solution>
    tokens = []
    for character in text:
        if character in known:
            tokens.append(character)
        else:
            tokens.extend(f"<0x{byte:02X}>" for byte in character.encode("utf-8"))
    data = b""
    for token in tokens[:limit]:
        data += token.encode("utf-8") if len(token) == 1 else bytes.fromhex(token[3:5])
    return tokens, data.decode("utf-8", errors="replace")
    # </solution>


# %% [markdown] exercise="01.6"
# Draw 300 stories and then 100 new ones, all with `world.sample(rng)` from one `rng = random.Random(1)`. Train two vocabularies
# of 1,000 pieces with `SentencePieceTokenizer.train(texts, vocab_size=1000)`: *mostly* is the 300 stories in English (`.text`)
# and the Chinese (`.chinese`) of the first three; *half* is the first 150 in English and the other 150 in Chinese. Count the
# tokens per new story in each language under each. Write down first how many Chinese tokens you expect for one English token
# when half is Chinese.

# %% exercise="01.6"
measured_01 = {
    "predicted": None,  # Chinese tokens over English tokens under *half*, before you measure
    "english_mostly": None,  # tokens per new story
    "chinese_mostly": None,
    "english_half": None,
    "chinese_half": None,
    "because": None,  # a sentence
}
# <solution>
measured_01["predicted"] = 1.0
rng = random.Random(1)
stories = [world.sample(rng) for _ in range(300)]
fresh = [world.sample(rng) for _ in range(100)]
mixtures = {
    "mostly": [s.text for s in stories] + [s.chinese for s in stories[:3]],
    "half": [s.text for s in stories[:150]] + [s.chinese for s in stories[150:]],
}
for name, texts in mixtures.items():
    tokenizer = SentencePieceTokenizer.train(texts, vocab_size=1000)
    measured_01[f"english_{name}"] = sum(len(tokenizer.encode(s.text)) for s in fresh) / len(fresh)
    measured_01[f"chinese_{name}"] = sum(len(tokenizer.encode(s.chinese)) for s in fresh) / len(fresh)
measured_01["because"] = "both languages share the same places, so what Chinese gets is taken from rare English words"
# </solution>

# %% tags=["nbval-ignore-output"]
print(report())
