"""Exercises of chapter 15, evaluation."""

import difflib
import functools
import math
import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from minillama import world
from minillama.course.exercise import Exercise, Experiment, Task, Wrong

Words = list[str]


def _then(answer: Callable[..., Any], change: Callable[[Any], Any]) -> Callable[..., Any]:
    """An answer, with something done to it."""
    return lambda *arguments: change(answer(*arguments))


def _draw(rng: torch.Generator, count: int, words: Sequence[str]) -> Words:
    return [words[i] for i in torch.randint(len(words), (count,), generator=rng).tolist()]


# 15.1 ----------------------------------------------------------------------------------------------------------------

_VOCABULARY = ("the", "a", "red", "kite", "was", "lost", "in", "park", "Mia", "and", "found", "ball", "near", ".")


def _edited(rng: torch.Generator, words: Words, every: int) -> Words:
    """The same words, with about one in `every` replaced."""
    replaced = torch.randint(every, (len(words),), generator=rng).eq(0).tolist()
    return [other if change else word for word, other, change in
            zip(words, _draw(rng, len(words), _VOCABULARY), replaced, strict=True)]  # fmt: skip


def _bleu_cases(rng: torch.Generator) -> Iterable[tuple[Any, ...]]:
    def texts(*lengths: int) -> list[Words]:
        return [_draw(rng, length, _VOCABULARY) for length in lengths]

    references = texts(13, 9, 21)
    first, second, third = (_edited(rng, words, 7) for words in references)
    yield [first, second[:-1], third[2:-4]], references
    references = texts(11, 17, 8, 30)
    yield [[*words, *_edited(rng, words, 3)[:5], "the", "the", "the"] for words in references], references
    references = texts(10, 16, 12)  # one is long, two are short, all are too short
    yield [[*references[0], *_draw(rng, 3, _VOCABULARY)], references[1][:8], [*references[2][:5], "a"]], references
    yield ["the cat sat mouse on the mat".split()], ["the cat sat on the mat".split()]  # three in order, never four
    yield [["a", "red"], [], first, [*third, "."]], [["a", "red", "ball", "."], ["a", "kite"], references[0], third]
    references = texts(12, 15)
    yield [[*references[0], "a", "ab"], references[1][::-1]], [[*references[0], "aa", "b"], references[1][::-1]]
    yield [["The", *references[0], "Kite"], references[1]], [["the", *references[0], "kite"], references[1]]
    halves = texts(9, 10, 8, 7)
    a, b, c, d = halves
    yield [[*a, *d], [*c, *b]], [[*a, *b], [*c, *d]]
    yield [], []
    yield [[], []], texts(4, 6)
    yield [list(a), list(b)], [list(a), list(b)]
    yield [[], list(a), list(c)], [texts(5)[0], list(a), list(c)]  # nothing is said to the first of them


def _grams(words: Words, n: int) -> "Counter[Any]":
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def _clipped(found: "Counter[Any]", expected: "Counter[Any]") -> int:
    return sum(min(count, expected[gram]) for gram, count in found.items())


def _brevity(answers: list[int], references: list[int]) -> float:
    c, r = sum(answers), sum(references)
    return math.exp(min(0, 1 - r / c)) if c else 0.0


def _geometric(matches: list[int], totals: list[int]) -> float:
    if not all(matches):
        return 0.0
    return math.exp(sum(math.log(m / t) for m, t in zip(matches, totals, strict=True)) / len(matches))


def _bleu(answers: list[Words], references: list[Words], *, orders: Sequence[int] = (1, 2, 3, 4),
          grams: Callable[[Words, int], "Counter[Any]"] = _grams,
          match: Callable[["Counter[Any]", "Counter[Any]"], int] = _clipped,
          total: Callable[["Counter[Any]", "Counter[Any]", int], int] = lambda found, expected, size: sum(
              found.values()),
          penalty: Callable[[list[int], list[int]], float] = _brevity,
          mean: Callable[[list[int], list[int]], float] = _geometric) -> float:  # fmt: skip
    pairs = list(zip(answers, references, strict=True))
    matches, totals = [], []
    for n in orders:
        counted = [(grams(one, n), grams(other, n), len(one) - n + 1) for one, other in pairs]
        matches.append(sum(match(found, expected) for found, expected, _ in counted))
        totals.append(sum(total(*three) for three in counted))
    return 100 * penalty([len(one) for one, _ in pairs], [len(other) for _, other in pairs]) * mean(matches, totals)


def _bleu_as(**options: Any) -> Callable[..., float]:
    return lambda answers, references: _bleu(answers, references, **options)


def _each(of: Callable[..., float]) -> Callable[..., float]:
    """The mean of the sentences' own scores."""

    def mean(answers: list[Words], references: list[Words]) -> float:
        scores = [of([one], [other]) for one, other in zip(answers, references, strict=True)]
        return sum(scores) / len(scores) if scores else 0.0

    return mean


def _joined(texts: list[Words]) -> list[Words]:
    return [[word for words in texts for word in words]]


def _pooled(answers: list[Words], references: list[Words]) -> float:
    """Counts of the whole corpus, cut at those of the whole corpus."""
    matches, totals = [], []
    for n in range(1, 5):
        found, expected = (sum((_grams(words, n) for words in texts), Counter()) for texts in (answers, references))
        matches.append(_clipped(found, expected))
        totals.append(sum(found.values()))
    lengths = ([len(words) for words in texts] for texts in (answers, references))
    return 100 * _brevity(*lengths) * _geometric(matches, totals)


def _mean_precisions(answers: list[Words], references: list[Words]) -> float:
    """The geometric mean of precisions that are themselves means over sentences."""
    logs = 0.0
    for n in range(1, 5):
        shares = []
        for one, other in zip(answers, references, strict=True):
            found = _grams(one, n)
            shares.append(_clipped(found, _grams(other, n)) / max(sum(found.values()), 1))
        if not sum(shares):
            return 0.0
        logs += math.log(sum(shares) / len(shares)) / 4
    return 100 * _brevity([len(one) for one in answers], [len(other) for other in references]) * math.exp(logs)


def _ratios(matches: list[int], totals: list[int]) -> list[float]:
    return [m / t if t else 0.0 for m, t in zip(matches, totals, strict=True)]


def _raw_penalty(answers: list[int], references: list[int]) -> float:
    return math.exp(1 - sum(references) / sum(answers)) if sum(answers) else 0.0


def _each_penalty(answers: list[int], references: list[int]) -> float:
    own = [_brevity([c], [r]) for c, r in zip(answers, references, strict=True)]
    return sum(own) / len(own) if own else 0.0


def _word_penalty(answers: list[int], references: list[int]) -> float:
    """Each answer's length is cut at its reference's: words too many do not make up for those that lack elsewhere."""
    return _brevity([min(c, r) for c, r in zip(answers, references, strict=True)], references)


def _said(answers: list[Words], references: list[Words]) -> float:
    """Empty answers are passed over, and their references with them."""
    pairs = [(one, other) for one, other in zip(answers, references, strict=True) if one]
    return _bleu([one for one, _ in pairs], [other for _, other in pairs])


def _runs(fewer: Callable[[int], int]) -> Callable[[Words, int], "Counter[Any]"]:
    """n-grams that begin at another number of places."""
    return lambda words, n: Counter(tuple(words[i : i + n]) for i in range(len(words) - fewer(n)))


def _bare(matches: list[int], totals: list[int]) -> float:
    return math.exp(sum(math.log(m / t) for m, t in zip(matches, totals, strict=True)) / 4)


BLEU = Exercise(
    "15.1", "BLEU of a corpus", "bleu", minutes=20, difficulty=3,
    why="BLEU is quoted in thousands of papers, and two people who compute it by hand seldom get the same number.",
    reference=_bleu,
    cases=_bleu_cases,
    wrong=(
        Wrong("the matches are not cut: a word that stands once in the reference is found as often as the answer "
              "repeats it.", _bleu_as(match=lambda found, expected: sum(n for gram, n in found.items()
                                                                        if gram in expected))),
        Wrong("repeated n-grams count once, in the matches and in the totals: both are counts, not sets.",
              _bleu_as(grams=lambda words, n: Counter(set(_grams(words, n))))),
        Wrong("each n-gram is found at most once in a sentence: it may be found as often as the reference has it.",
              _bleu_as(match=lambda found, expected: len(found.keys() & expected.keys()))),
        Wrong("there is no penalty for brevity: an answer of a few sure words would beat whole ones.",
              _bleu_as(penalty=lambda c, r: 1.0 if sum(c) else 0.0)),
        Wrong("the penalty is not limited to 1: a corpus that is too long gains by it.",
              _bleu_as(penalty=_raw_penalty)),
        Wrong("the penalty is turned round: it falls on long answers, whose precision suffers already.",
              _bleu_as(penalty=lambda c, r: math.exp(min(0, 1 - sum(c) / max(sum(r), 1))) if sum(c) else 0.0)),
        Wrong("the penalty has r/c − 1 in the exponent: turned so, it falls on answers that are too long.",
              _bleu_as(penalty=lambda c, r: math.exp(min(0, sum(r) / sum(c) - 1)) if sum(c) else 0.0)),
        Wrong("the penalty is never below 1: expected the smaller of 1 and the exponential, not the larger.",
              _bleu_as(penalty=lambda c, r: math.exp(max(0, 1 - sum(r) / sum(c))) if sum(c) else 0.0)),
        Wrong("an empty answer is passed over, and its reference with it: the words of that reference count in r.",
              _said),
        Wrong("the penalty is the ratio of the lengths: it is exponential, exp(1 − r/c).",
              _bleu_as(penalty=lambda c, r: min(1, sum(c) / max(sum(r), 1)))),
        Wrong("the penalty is the mean of the sentences' own: add the lengths of all first.",
              _bleu_as(penalty=_each_penalty)),
        Wrong("an answer that is too long does not make up for one that is too short: the penalty looks at the whole "
              "lengths of both sides.", _bleu_as(penalty=_word_penalty)),
        Wrong("these are the means of the sentences' scores: add matches and totals of all sentences, and divide once.",
              _each(_bleu)),
        Wrong("the precisions are means over sentences: add matches and totals of all sentences, and divide once.",
              _mean_precisions),
        Wrong("the sentences are glued together: n-grams that reach over their borders are in no sentence.",
              lambda answers, references: _bleu(_joined(answers), _joined(references))),
        Wrong("the matches are cut by the counts of all references together: a word of another sentence is no match.",
              _pooled),
        Wrong("the mean of the four precisions is arithmetic, expected the geometric one.",
              _bleu_as(mean=lambda m, t: sum(_ratios(m, t)) / 4)),
        Wrong("where all orders have matches, the mean of the four precisions is arithmetic: expected the geometric "
              "one, in which the smallest weighs most.",
              _bleu_as(mean=lambda m, t: sum(_ratios(m, t)) / 4 if all(m) else 0.0)),
        Wrong("the four precisions are multiplied, and the fourth root is missing.",
              _bleu_as(mean=lambda m, t: math.prod(_ratios(m, t)))),
        Wrong("all orders are put into one sum: each order has its own precision, and their mean is taken.",
              _bleu_as(mean=lambda m, t: sum(m) / sum(t) if sum(t) else 0.0)),
        Wrong("orders without a match are left out: then the worst answers have the fewest to fear; the score is 0.",
              _bleu_as(mean=lambda m, t: _geometric([a for a in m if a], [b for a, b in zip(m, t, strict=True) if a])
                       if any(m) else 0.0)),
        Wrong("orders without a match count as 1 or as nothing at all, yet the root stays the fourth: the score is 0.",
              _bleu_as(mean=lambda m, t: math.exp(sum(math.log(a / b) for a, b in zip(m, t, strict=True) if a) / 4)
                       if any(m) else 0.0)),
        Wrong("1 is added to matches and totals of the higher orders: no smoothing is asked for here.",
              _bleu_as(mean=lambda m, t: _geometric([m[0], *(a + 1 for a in m[1:])],
                                                    [max(t[0], 1), *(b + 1 for b in t[1:])]))),
        Wrong("1 is added to all matches and totals: no smoothing is asked for here.",
              _bleu_as(mean=lambda m, t: _geometric([a + 1 for a in m], [b + 1 for b in t]))),
        Wrong("the logarithm of 0 is not looked after: without a match of some order the score is 0.",
              _bleu_as(mean=lambda m, t: 0.0 if not any(t) else _bare(m, [max(b, 1) for b in t]))),
        Wrong("a corpus without words is not looked after: there the score is 0.",
              _bleu_as(penalty=lambda c, r: math.exp(min(0, 1 - sum(r) / sum(c))))),
        Wrong("the matches are divided by the n-grams of the references, which is recall: expected precision.",
              _bleu_as(total=lambda found, expected, size: sum(expected.values()))),
        Wrong("an answer that is shorter than n takes n-grams away from the total: it has none.",
              _bleu_as(total=lambda found, expected, size: size)),
        Wrong("the total has each n-gram of an answer once: it counts as often as it stands there, as in the matches.",
              _bleu_as(total=lambda found, expected, size: len(found))),
        Wrong("the last n-gram of each text is left out: n words have one n-gram, not none.",
              _bleu_as(grams=_runs(lambda n: n))),
        Wrong("the last words of a text begin n-grams of fewer than n words: only whole ones count.",
              _bleu_as(grams=_runs(lambda n: 0))),
        Wrong("the matches of all orders are divided by the number of words: each order has its own number of n-grams, "
              "and short answers may have none.",
              _bleu_as(grams=lambda words, n: _grams([*words, *[""] * (n - 1)], n),
                       match=lambda found, expected: sum(min(count, expected[gram]) for gram, count in found.items()
                                                         if "" not in gram))),
        Wrong("each answer's number of words is taken for its number of n-grams: there are n − 1 fewer.",
              _bleu_as(total=lambda found, expected, size: max(size, 0) and sum(found.values()),
                       grams=lambda words, n: _grams([*words, *[""] * (n - 1)], n),
                       match=lambda found, expected: sum(min(count, expected[gram]) for gram, count in found.items()
                                                         if "" not in gram))),
        Wrong("only n-grams of four are looked at: expected one, two, three and four.", _bleu_as(orders=(4,))),
        Wrong("only single words are looked at: their order counts, too.", _bleu_as(orders=(1,))),
        Wrong("n-grams of four are missing: one, two and three are looked at.", _bleu_as(orders=(1, 2, 3))),
        Wrong("single words are missing: n-grams of two, three and four are looked at.", _bleu_as(orders=(2, 3, 4))),
        Wrong("n-grams of five are looked at: four are the longest.", _bleu_as(orders=(1, 2, 3, 4, 5))),
        Wrong("words are glued together without a space: 'a' 'ab' is not 'aa' 'b'.",
              _bleu_as(grams=lambda words, n: Counter("".join(words[i : i + n]) for i in range(len(words) - n + 1)))),
        Wrong("capital letters are made small: tokens are compared as they are.",
              _bleu_as(grams=lambda words, n: _grams([word.lower() for word in words], n))),
        Wrong("these are shares from 0 to 1, expected 0 to 100.", _then(_bleu, lambda score: score / 100)),
        Wrong("the score is rounded to the two digits that are printed: return all of them.",
              _then(_bleu, lambda score: round(score, 2))),
        Wrong("answers and references are exchanged: the first argument is judged.",
              lambda answers, references: _bleu(references, answers)),
    ),
    hints=(
        "An answer is only 'the the the the'. How many of its words are right, if the reference has 'the' twice?",
        "Keep two counts for each order, matches and n-grams, and add every sentence to them. Divide at the very end.",
        "for each order: count n-grams of an answer and of its reference, add the smaller counts, and all of the "
        "answer's · any order without a match: 0 · mean of four logarithms · lengths of all: penalty · times 100.",
    ),
    blocked=("minillama.evaluate.bleu", "sacrebleu.corpus_bleu", "sacrebleu.sentence_bleu",
             "sacrebleu.metrics.BLEU.corpus_score", "sacrebleu.metrics.BLEU.sentence_score"),
)  # fmt: skip


# 15.2 ----------------------------------------------------------------------------------------------------------------

_Scores = tuple[float, float, float]


def _rouge_cases(rng: torch.Generator) -> Iterable[tuple[Any, ...]]:
    few = ("a", "b", "c", "d")

    def shuffled(words: Words) -> Words:
        return [words[i] for i in torch.randperm(len(words), generator=rng).tolist()]

    yield _draw(rng, 9, few), [_draw(rng, 6, few)]
    yield "the cat the dog ran".split(), ["the dog and the cat ran away".split(), "dog ran".split()]
    yield "e a b f c d g".split(), ["a b c d".split(), _draw(rng, 8, few), "a b h c d i j k l".split()]
    yield "a b c d e f".split(), ["x y a b z c q r".split(), "a b c w v u t".split(), "f e d c b a".split()]
    yield "b a c d".split(), ["a c d b".split()]
    yield shuffled("a b c d e f g".split()), ["a b c d e f g".split(), "g f e d".split()]
    yield "a a a b".split(), ["a b b b b a".split()]
    yield "c a b a b".split(), ["a b a b c c".split(), "c".split()]
    yield "The cat".split(), ["the cat sat".split()]
    yield [], [["a", "b"]]
    yield ["a", "b"], [[], ["b", "c", "d"]]
    yield ["a"], [[]]
    # first longest, second best: recall, precision and length of the common part choose different references
    yield "a b c d e f g h".split(), ["a b".split(), "a x b y c z d w e v f u".split(), "a b c d p q e".split()]
    yield "a b c d".split(), ["a x b y".split(), "a u b v c w x y".split(), "q d".split()]  # F1 is 1/2 twice
    yield "a b c d e f g".split(), ["e f g x a y b z c w d".split()]  # the longest block is not part of it
    yield "a b c d".split(), ["d a b c".split()]
    yield ["x"], [["y", "z"]]


def _lcs(one: Words, other: Words) -> int:
    best = [[0] * (len(other) + 1) for _ in range(len(one) + 1)]
    for i, word in enumerate(one):
        for j, token in enumerate(other):
            best[i + 1][j + 1] = best[i][j] + 1 if word == token else max(best[i][j + 1], best[i + 1][j])
    return best[-1][-1]


def _harmonic(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _best(scores: list[_Scores]) -> _Scores:
    return max(scores, key=lambda score: score[2])


def _rouge(answer: Words, references: list[Words], *, common: Callable[[Words, Words], int] = _lcs,
           parts: Callable[[int, int, int], tuple[float, float]] = lambda length, n, m: (length / n, length / m),
           f: Callable[[float, float], float] = _harmonic,
           choose: Callable[[list[_Scores]], Any] = _best) -> Any:  # fmt: skip
    scores: list[_Scores] = []
    for reference in references:
        length = common(answer, reference)
        if not answer or not reference:
            scores.append((0.0, 0.0, 0.0))
            continue
        precision, recall = parts(length, len(answer), len(reference))
        scores.append((precision, recall, f(precision, recall)))
    return choose(scores)


def _rouge_as(**options: Any) -> Callable[..., Any]:
    return lambda answer, references: _rouge(answer, references, **options)


def _substring(one: Words, other: Words) -> int:
    longest = 0
    for i in range(len(one)):
        for j in range(len(other)):
            length = 0
            while i + length < len(one) and j + length < len(other) and one[i + length] == other[j + length]:
                length += 1
            longest = max(longest, length)
    return longest


def _prefix(one: Words, other: Words) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _greedy(one: Words, other: Words) -> int:
    """Take each word of `one` at its next place in `other`."""
    place = found = 0
    for word in one:
        if word in other[place:]:
            place = other.index(word, place) + 1
            found += 1
    return found


def _table(one: Words, other: Words, step: Callable[[int, int, int, bool], int]) -> int:
    """Like the longest common subsequence, with a rule of its own: (corner, above, left, same) → value."""
    best = [[0] * (len(other) + 1) for _ in range(len(one) + 1)]
    for i, word in enumerate(one):
        for j, token in enumerate(other):
            best[i + 1][j + 1] = step(best[i][j], best[i][j + 1], best[i + 1][j], word == token)
    return best[-1][-1]


def _largest(scores: list[_Scores]) -> _Scores:
    return tuple(max(column) for column in zip(*scores, strict=True))


def _means(scores: list[_Scores]) -> _Scores:
    return tuple(sum(column) / len(scores) for column in zip(*scores, strict=True))


def _unguarded_rouge(answer: Words, references: list[Words]) -> _Scores:
    lengths = [(_lcs(answer, other), len(other)) for other in references]
    return _best([(n / len(answer), n / m, _harmonic(n / len(answer), n / m)) for n, m in lengths])


def _unguarded_f(answer: Words, references: list[Words]) -> _Scores:
    return _rouge(answer, references, f=lambda p, r: 2 * p * r / (p + r))


ROUGE = Exercise(
    "15.2", "ROUGE-L against several references", "rouge_l", minutes=15, difficulty=3,
    why="A summary may have words of its own between the reference's: ROUGE-L looks for what is common, in order.",
    reference=_rouge,
    cases=_rouge_cases,
    wrong=(
        Wrong("the words must stand side by side: a subsequence may have other words between.",
              _rouge_as(common=_substring)),
        Wrong("only the words from the beginning on are compared: a subsequence may begin anywhere.",
              _rouge_as(common=_prefix)),
        Wrong("words at the same place are compared: one word more at the beginning moves all others.",
              _rouge_as(common=lambda one, other: sum(a == b for a, b in zip(one, other, strict=False)))),
        Wrong("common words are counted in any order: that is ROUGE-1; here their order counts.",
              _rouge_as(common=lambda one, other: sum((Counter(one) & Counter(other)).values()))),
        Wrong("different common words are counted, each once and in any order: order and repetitions count here.",
              _rouge_as(common=lambda one, other: len(set(one) & set(other)))),
        Wrong("the answer's words that occur in the reference are counted, in any order and however often.",
              _rouge_as(common=lambda one, other: sum(word in other for word in one))),
        Wrong("each word is taken at its next place in the reference, which may leave no room for those that follow.",
              _rouge_as(common=_greedy)),
        Wrong("each word of the reference is taken at its next place in the answer, which may leave no room for those "
              "that follow.", _rouge_as(common=lambda one, other: _greedy(other, one))),
        Wrong("one word is matched several times: behind a match both texts go on by one.",
              _rouge_as(common=lambda one, other: _table(one, other, lambda corner, above, left, same:
                                                         max(above, left) + same))),
        Wrong("without a match the value of the corner is kept: keep the larger one of dropping a word on either side.",
              _rouge_as(common=lambda one, other: _table(one, other, lambda corner, above, left, same:
                                                         corner + same))),
        Wrong("without a match only a word of the reference may be dropped: the answer may have words of its own.",
              _rouge_as(common=lambda one, other: _table(one, other, lambda corner, above, left, same:
                                                         corner + 1 if same else left))),
        Wrong("without a match only a word of the answer may be dropped: the reference may have words of its own.",
              _rouge_as(common=lambda one, other: _table(one, other, lambda corner, above, left, same:
                                                         corner + 1 if same else above))),
        Wrong("the last word of each text is never looked at.",
              _rouge_as(common=lambda one, other: _lcs(one[:-1], other[:-1]))),
        Wrong("common blocks are summed as a sequence matcher finds them, longest first: a longer chain of shorter "
              "ones is missed.", _rouge_as(common=lambda one, other: sum(
                  block.size for block in difflib.SequenceMatcher(None, one, other, False).get_matching_blocks()))),
        Wrong("precision and recall are exchanged: precision is the share of the answer.",
              _rouge_as(parts=lambda length, n, m: (length / m, length / n))),
        Wrong("both are divided by the longer text: precision is the share of the answer, recall of the reference.",
              _rouge_as(parts=lambda length, n, m: (length / max(n, m),) * 2)),
        Wrong("both are divided by the shorter text: precision is the share of the answer, recall of the reference.",
              _rouge_as(parts=lambda length, n, m: (length / min(n, m),) * 2)),
        Wrong("F1 is the arithmetic mean, expected the harmonic one, which one bad half pulls down.",
              _rouge_as(f=lambda p, r: (p + r) / 2)),
        Wrong("F1 is the geometric mean, expected the harmonic one.", _rouge_as(f=lambda p, r: math.sqrt(p * r))),
        Wrong("F1 is half as large as it should be: the harmonic mean has a factor of 2.",
              _rouge_as(f=lambda p, r: _harmonic(p, r) / 2)),
        Wrong("F1 is the product of precision and recall: their mean is taken, the harmonic one.",
              _rouge_as(f=lambda p, r: p * r)),
        Wrong("F weighs recall more (β = 1.2): F1 weighs both alike.",
              _rouge_as(f=lambda p, r: 2.44 * p * r / (r + 1.44 * p) if p + r else 0.0)),
        Wrong("texts without words are not looked after: there all three are 0.", _unguarded_rouge),
        Wrong("an F1 of nothing in common is not looked after: there all three are 0.", _unguarded_f),
        Wrong("all references are joined to one: a subsequence of several texts is in none of them.",
              lambda answer, references: _rouge(answer, _joined(references))),
        Wrong("precision, recall and F1 come from different references: take all three from the one with the best F1.",
              _rouge_as(choose=_largest)),
        Wrong("these are the means over the references: an answer has to fit one of them.", _rouge_as(choose=_means)),
        Wrong("only the first reference is looked at.", _rouge_as(choose=lambda scores: scores[0])),
        Wrong("the last reference stands for all.", _rouge_as(choose=lambda scores: scores[-1])),
        Wrong("the worst reference is taken, expected the one with the best F1.",
              _rouge_as(choose=lambda scores: min(scores, key=lambda score: score[2]))),
        Wrong("the reference with the best recall is taken, expected that with the best F1.",
              _rouge_as(choose=lambda scores: max(scores, key=lambda score: score[1]))),
        Wrong("the reference with the best precision, so with the longest common part, is taken: expected that with "
              "the best F1.", _rouge_as(choose=lambda scores: max(scores, key=lambda score: score[0]))),
        Wrong("of references with the same F1 the last is taken, expected the first.",
              _rouge_as(choose=lambda scores: _best(scores[::-1]))),
        Wrong("capital letters are made small: tokens are compared as they are.",
              _rouge_as(common=lambda one, other: _lcs([w.lower() for w in one], [w.lower() for w in other]))),
        Wrong("these are percent, expected shares from 0 to 1.",
              _rouge_as(choose=lambda scores: tuple(100 * share for share in _best(scores)))),
        Wrong("this is F1 alone, expected precision, recall and F1.",
              _rouge_as(choose=lambda scores: _best(scores)[2])),
        Wrong("F1 comes first, expected precision, recall and then F1.",
              _rouge_as(choose=lambda scores: (_best(scores)[2], *_best(scores)[:2]))),
    ),
    hints=(
        "Both texts end with the same word. What is then known about the longest subsequence without these two words?",
        "For each pair of beginnings, one of the answer and one of the reference, note the longest common subsequence: "
        "it follows from three that are noted already.",
        "a row of zeros · for each word of the answer a new row: same word, one more than the corner, else the larger "
        "of above and left · last number by both lengths · harmonic mean · best reference by it.",
    ),
    blocked=("minillama.evaluate.rouge", "rouge_score.rouge_scorer.RougeScorer.score",
             "rouge_score.rouge_scorer._score_lcs", "rouge_score.rouge_scorer._lcs_table"),
    slow=lambda rng: (_draw(rng, 12, [str(i) for i in range(500)]), [_draw(rng, 11, [str(i) for i in range(500)])]),
)  # fmt: skip


# 15.3 ----------------------------------------------------------------------------------------------------------------

_Plan = list[tuple[int, int, int]]


def _window_cases(rng: torch.Generator) -> Iterable[tuple[Any, ...]]:
    # two windows are not enough for some of the mistakes, and a text that ends with a window hides others
    for length, window, stride in ((23, 8, 3), (12, 6, 2), (7, 9, 4), (10, 10, 9), (17, 5, 4), (14, 9, 6), (2, 2, 1),
                                   (19, 7, 1), (12, 4, 4), (11, 3, 5)):  # fmt: skip
        nats = 8 * torch.rand(length, length, generator=rng, dtype=torch.float64)
        yield nats.masked_fill(torch.ones(length, length).tril().bool(), math.nan), window, stride


def _windows(length: int, window: int, stride: int) -> _Plan:
    """Each token belongs to the first window that holds it."""
    owner = [next(b for b in range(0, length, stride) if t < b + window) for t in range(length)]
    return [(b, min(b + window, length), max(1, owner.index(b))) for b in sorted(set(owner))]


def _scored(nats: Tensor, plan: _Plan) -> list[Tensor]:
    return [nats[begin, first:end] for begin, end, first in plan]


def _mean(nats: Tensor, plan: _Plan) -> float:
    return torch.cat(_scored(nats, plan)).mean().item()


def _refuse(window: int, stride: int) -> None:
    if stride >= window:
        raise ValueError("the first token of a window would have nothing before it")


def _refusing(by: int, answer: Callable[..., Any]) -> Callable[..., Any]:
    """Refuse at another stride than that of the window: larger by `by`, or smaller."""

    def refused(nats: Tensor, window: int, stride: int) -> Any:
        _refuse(window, stride - by)
        return answer(nats, window, stride)

    return refused


def _sliding(nats: Tensor, window: int, stride: int, *, plan: Callable[[_Plan, int, int, int], _Plan] = lambda
             plan, length, window, stride: plan, mean: Callable[[Tensor, _Plan], float] = _mean, check: bool = True,
             walk: Callable[[int, int, int], _Plan] = _windows) -> tuple[_Plan, float]:  # fmt: skip
    if check:
        _refuse(window, stride)
    found = plan(walk(len(nats), window, stride), len(nats), window, stride)
    return found, mean(nats, found)


def _sliding_as(**options: Any) -> Callable[..., tuple[_Plan, float]]:
    return lambda nats, window, stride: _sliding(nats, window, stride, **options)


def _planned(plan: Callable[[_Plan, int, int, int], _Plan], **options: Any) -> Callable[..., tuple[_Plan, float]]:
    return _sliding_as(plan=plan, **options)


def _again(plan: _Plan) -> _Plan:
    return [(begin, end, begin + 1) for begin, end, _ in plan]


def _mean_first_place(nats: Tensor, plan: _Plan) -> float:
    """The plan's third number is only a way of writing it down."""
    return _mean(nats, _windows_of(plan, lambda begin, end, first: begin + first))


def _windows_of(plan: _Plan, first: Callable[[int, int, int], int]) -> _Plan:
    return [(begin, end, first(begin, end, old)) for begin, end, old in plan]


def _last_holder(plan: _Plan, length: int, window: int, stride: int) -> _Plan:
    """Each window leaves to the next one what that can score."""
    ends = [min(begin + 1, length) for begin, *_ in plan[1:]] + [length]
    return [(begin, end, begin + 1) for (begin, *_), end in zip(plan, ends, strict=True)]


def _to_the_end(plan: _Plan, length: int, window: int, stride: int) -> _Plan:
    """A window begins at every multiple of the stride, whether there is something left to score or not."""
    more = range(plan[-1][0] + stride, length, stride)
    return [*plan, *((begin, length, length) for begin in more)]


def _to_the_end_again(plan: _Plan, length: int, window: int, stride: int) -> _Plan:
    return _again(_to_the_end(plan, length, window, stride))


def _full_last(plan: _Plan, length: int, window: int, stride: int) -> _Plan:
    begin, end, first = plan[-1]
    return [*plan[:-1], (max(0, length - window), end, first)]


def _whole_only(plan: _Plan, length: int, window: int, stride: int) -> _Plan:
    return [part for part in plan if part[1] - part[0] == window] or plan


def _beyond(plan: _Plan, length: int, window: int, stride: int) -> _Plan:
    return [(begin, begin + window, first) for begin, _, first in plan]


def _loosely(nats: Tensor, window: int, stride: int) -> tuple[_Plan, float]:
    """No look at the stride."""
    length, plan, scored, begin = len(nats), [], 1, 0
    while True:
        end = min(begin + window, length)
        plan.append((begin, end, scored))
        scored = end
        if end == length:
            return plan, _mean(nats, plan)
        begin += stride


WINDOWS = Exercise(
    "15.3", "sliding windows", "sliding_loss", minutes=20, difficulty=3,
    why="A text longer than the model's context is cut, and how it is cut moves the perplexity more than most models.",
    reference=_sliding,
    cases=_window_cases,
    wrong=(
        Wrong("all tokens of each window are scored: those that it shares with the window before are counted twice.",
              _planned(lambda plan, length, window, stride: _again(plan))),
        Wrong("the windows follow each other without overlap: the next one begins `stride` tokens further on.",
              _sliding_as(walk=lambda length, window, stride: [
                  (begin, min(begin + window, length), begin + 1) for begin in range(0, length, window)])),
        Wrong("`stride` is taken for the overlap of two windows: it is the way from one beginning to the next.",
              _sliding_as(walk=lambda length, window, stride: _windows(length, window, window - stride))),
        Wrong("a last window that is not full is left out, and its tokens are never scored.", _planned(_whole_only)),
        Wrong("the last window is moved back until it is full: here each begins at a multiple of the stride.",
              _planned(_full_last)),
        Wrong("windows go on after the end is reached, and have no token left to score.", _planned(_to_the_end)),
        Wrong("windows go on after the end is reached, and each scores all of its tokens: those shared with the window "
              "before are counted again.", _planned(_to_the_end_again)),
        Wrong("the first token of the text is scored: nothing stands before it.",
              _planned(lambda plan, length, window, stride: [(0, plan[0][1], 0), *plan[1:]])),
        Wrong("the first window, too, scores only its last `stride` tokens: those before them are scored nowhere.",
              _planned(lambda plan, length, window, stride: _windows_of(plan, lambda begin, end, first: max(
                  first, end - stride)))),
        Wrong("the last window scores `stride` tokens: fewer may be new, and the others are counted twice.",
              _planned(lambda plan, length, window, stride: plan[:1] + _windows_of(
                  plan[1:], lambda begin, end, first: max(begin + 1, end - stride)))),
        Wrong("tokens are scored by the last window that holds them, with the least context: take the first.",
              _planned(_last_holder)),
        Wrong("one token is left out where a window goes on: it begins to score where the one before has ended.",
              _planned(lambda plan, length, window, stride: plan[:1] + _windows_of(
                  plan[1:], lambda begin, end, first: first + 1))),
        Wrong("one token is counted twice where a window goes on: the one before has scored it.",
              _planned(lambda plan, length, window, stride: plan[:1] + _windows_of(
                  plan[1:], lambda begin, end, first: first - 1))),
        Wrong("the third number counts from the window's own beginning, expected from the text's.",
              _planned(lambda plan, length, window, stride: _windows_of(plan, lambda begin, end, first: first - begin),
                       mean=_mean_first_place)),
        Wrong("`end` is the last token, expected the place behind it.",
              _planned(lambda plan, length, window, stride: [(begin, end - 1, first) for begin, end, first in plan],
                       mean=lambda nats, plan: _mean(nats, [(b, end + 1, first) for b, end, first in plan]))),
        Wrong("windows reach beyond the end of the text.", _planned(_beyond)),
        Wrong("this is the mean of the windows' means: a short last window weighs as much as a long one.",
              _sliding_as(mean=lambda nats, plan: torch.stack([row.mean() for row in _scored(nats, plan)]).mean(
              ).item())),
        Wrong("the sum is divided by all tokens: the first is not scored, so there is one fewer.",
              _sliding_as(mean=lambda nats, plan: _mean(nats, plan) * (len(nats) - 1) / len(nats))),
        Wrong("this is the sum, expected the mean over the scored tokens.",
              _sliding_as(mean=lambda nats, plan: torch.cat(_scored(nats, plan)).sum().item())),
        Wrong("this is the perplexity, expected the loss in nats per token.",
              _sliding_as(mean=lambda nats, plan: math.exp(_mean(nats, plan)))),
        Wrong("all surprises come from a window that begins with the text: after `window` tokens there is none.",
              _sliding_as(mean=lambda nats, plan: nats[0, 1:].mean().item())),
        Wrong("the plan is right, but the row of the table is the number of the window: it is the token at which the "
              "window begins.",
              _sliding_as(mean=lambda nats, plan: torch.cat([nats[i, first:end] for i, (_, end, first) in
                                                             enumerate(plan)]).mean().item())),
        Wrong("the plan is right, but the mean is taken over all tokens that each window holds: those that it shares "
              "with the window before count once, from there.",
              _sliding_as(mean=lambda nats, plan: _mean(nats, _again(plan)))),
        Wrong("windows begin to score `stride` tokens behind their beginning: expected where the one before has ended.",
              _planned(lambda plan, length, window, stride: plan[:1] + _windows_of(
                  plan[1:], lambda begin, end, first: begin + stride))),
        Wrong("the second number is where a window begins to score, expected where it ends: begin, end, first.",
              _planned(lambda plan, length, window, stride: [(begin, first, end) for begin, end, first in plan],
                       mean=lambda nats, plan: _mean(nats, [(begin, end, first) for begin, first, end in plan]))),
        Wrong("windows hold a token more than `window`: their first one counts, although it is not scored.",
              _sliding_as(walk=lambda length, window, stride: _windows(length, window + 1, stride))),
        Wrong("the plan is right, but the columns of the table are places in the window: t counts from the text's "
              "beginning.", _sliding_as(mean=lambda nats, plan: torch.cat([nats[begin, first - begin : end - begin] for
                                                                          begin, end, first in plan]).mean().item())),
        Wrong("the plan is right, but the loss is not a number: in nats[b, t] the row b is the window's beginning, the "
              "column t the token itself, not the one before.",
              _sliding_as(mean=lambda nats, plan: torch.cat([nats[b, first - 1 : end - 1] for b, end, first in plan]
                                                            ).mean().item())),
        Wrong("a stride as large as the window is not refused: the first token of a window has nothing before it "
              "there, and would never be scored.", _loosely),
        Wrong("a stride as large as the window passes, and only larger ones are refused: there the first token of a "
              "window has nothing before it.",
              _refusing(1, _loosely)),
        Wrong("a stride of the window less one is refused: one token of context is enough to score the next.",
              _refusing(-1, _sliding)),
        Wrong("the loss comes first, expected the plan and then the loss.", _then(_sliding, lambda both: both[::-1])),
    ),
    hints=(
        "Windows of 6 tokens begin at 0, 2 and 4. Which of them give the token at place 6, and which with most before "
        "it?",
        "Remember up to where all is scored. A window scores from there to its end.",
        "refuse · beginning 0, scored up to 1 · end is at most the length; note beginning, end and where scoring "
        "begins; scored up to the end · stop at the length, else move on by the stride · all scored values, one mean.",
    ),
    blocked=("minillama.evaluate.perplexity",),
)  # fmt: skip


# 15.4 ----------------------------------------------------------------------------------------------------------------


def _paired_cases(rng: torch.Generator) -> Iterable[tuple[Any, ...]]:
    def scores(count: int, by: float) -> tuple[Tensor, Tensor]:
        """Two models on the same examples, of which some are hard for both."""
        hard = 3 * torch.rand(count, generator=rng, dtype=torch.float64)
        return (hard + by + torch.rand(count, generator=rng, dtype=torch.float64),
                hard + torch.rand(count, generator=rng, dtype=torch.float64))  # fmt: skip

    def draws(resamples: int, count: int) -> Tensor:
        return torch.randint(count, (resamples, count), generator=rng)

    yield *scores(23, 0.1), draws(40, 23), 0.95
    yield *scores(12, -0.15), draws(57, 12), 0.9
    yield *scores(7, 0.0), draws(101, 7), 0.5
    right = torch.tensor([1, 1, 0, 1, 0, 1, 1, 0, 1, 1])  # 0 or 1, and many resamples in which both are alike
    yield right[torch.randperm(10, generator=rng)], torch.tensor([1, 0, 0, 1, 1, 0, 1, 1, 0, 1]), draws(64, 10), 0.8
    yield torch.tensor([1, 0, 1, 0, 1, 1]), torch.tensor([0, 1, 1, 0, 1, 1]), draws(30, 6), 0.9
    same = torch.rand(6, generator=rng, dtype=torch.float64)
    yield same, same.clone(), draws(9, 6), 0.95
    yield *scores(1, 0.3), draws(5, 1), 0.95
    yield *scores(5, 0.2), draws(1, 5), 0.9
    yield 1000 * torch.rand(15, generator=rng, dtype=torch.float64), scores(15, 400)[1] * 300, draws(80, 15), 0.99


def _quantile(values: Tensor, q: float) -> float:
    ordered = values.sort().values
    place = q * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return (ordered[low] + (place - low) * (ordered[high] - ordered[low])).item()


def _both_tails(means: Tensor, level: float, found: float) -> tuple[float, float]:
    return _quantile(means, (1 - level) / 2), _quantile(means, (1 + level) / 2)


def _flipped(means: Tensor, found: float) -> float:
    return (means * found <= 0).double().mean().item()


def _bootstrap(a: Tensor, b: Tensor, draws: Tensor, level: float, *,
               means: Callable[[Tensor, Tensor, Tensor], Tensor] = lambda a, b, draws: (a[draws] - b[draws]).mean(1),
               centre: Callable[[Tensor, Tensor], float] = lambda values, means: values.mean().item(),
               interval: Callable[[Tensor, float, float], tuple[float, float]] = _both_tails,
               flips: Callable[[Tensor, float], float] = _flipped) -> tuple[float, float, float, float]:  # fmt: skip
    a, b = a.double(), b.double()
    found, resampled = (a - b).mean().item(), means(a, b, draws)
    return centre(a - b, resampled), *interval(resampled, level, found), flips(resampled, found)


def _bootstrap_as(**options: Any) -> Callable[..., Any]:
    return lambda a, b, draws, level: _bootstrap(a, b, draws, level, **options)


def _apart(a: Tensor, b: Tensor, draws: Tensor, level: float) -> tuple[float, float, float, float]:
    """Each model's own interval, and what lies between them at most and at least."""
    found, *_, flips = _bootstrap(a, b, draws, level)
    one, other = (_both_tails(scores.double()[draws].mean(1), level, 0) for scores in (a, b))
    return found, one[0] - other[1], one[1] - other[0], flips


def _without_repeats(a: Tensor, b: Tensor, draws: Tensor) -> Tensor:
    return torch.stack([(a - b)[row.unique()].mean() for row in draws])


def _normal(scale: Callable[[Tensor], Tensor]) -> Callable[[Tensor, float, float], tuple[float, float]]:
    def interval(means: Tensor, level: float, found: float) -> tuple[float, float]:
        z = math.sqrt(2) * torch.erfinv(torch.tensor(level, dtype=torch.float64)).item()
        spread = scale(means).nan_to_num().item() if len(means) > 1 else 0.0
        return found - z * spread, found + z * spread

    return interval


def _rounded(means: Tensor, level: float, found: float) -> tuple[float, float]:
    """Values of the resamples themselves, nothing in between."""
    ordered = means.sort().values.tolist()
    low, high = (1 - level) / 2 * len(ordered), (1 + level) / 2 * len(ordered)
    return ordered[int(low)], ordered[min(int(high), len(ordered) - 1)]


def _unsorted(means: Tensor, level: float, found: float) -> tuple[float, float]:
    def at(q: float) -> float:
        place = q * (len(means) - 1)
        low = math.floor(place)
        high = min(low + 1, len(means) - 1)
        return (means[low] + (place - low) * (means[high] - means[low])).item()

    return at((1 - level) / 2), at((1 + level) / 2)


def _as_they_are(a: Tensor, b: Tensor, draws: Tensor, level: float) -> Any:
    """Whole numbers stay whole, and have no mean."""
    if not a.is_floating_point():
        a.mean()
    return _bootstrap(a, b, draws, level)


BOOTSTRAP = Exercise(
    "15.4", "the paired bootstrap", "bootstrap", minutes=20, difficulty=3,
    why="A model that is a point better on a hundred examples may be no better at all: this says how sure you are.",
    reference=_bootstrap,
    cases=_paired_cases,
    wrong=(
        Wrong("the second model is not resampled: both are looked at on the same drawn examples.",
              _bootstrap_as(means=lambda a, b, draws: a[draws].mean(1) - b.mean())),
        Wrong("the first model is not resampled: both are looked at on the same drawn examples.",
              _bootstrap_as(means=lambda a, b, draws: a.mean() - b[draws].mean(1))),
        Wrong("the two models are resampled apart, the second with other resamples: what is hard for both cancels "
              "only on the same examples.",
              _bootstrap_as(means=lambda a, b, draws: a[draws].mean(1) - b[draws.flip(0)].mean(1))),
        Wrong("the second model's resamples are the first one's shifted by one: both need the same examples.",
              _bootstrap_as(means=lambda a, b, draws: a[draws].mean(1) - b[draws.roll(1, 0)].mean(1))),
        Wrong("the interval is put together from each model's own: they may overlap where the difference is certain; "
              "resample the difference.", _apart),
        Wrong("the scores are sorted first, so that each is compared with another example's: they belong in pairs.",
              _bootstrap_as(means=lambda a, b, draws: (a.sort().values - b.sort().values)[draws].mean(1))),
        Wrong("the mean goes over the resamples, and leaves a number for each place: expected one for each resample.",
              _bootstrap_as(means=lambda a, b, draws: (a - b)[draws].mean(0))),
        Wrong("all drawn differences are put into one heap: the mean of each resample comes first.",
              _bootstrap_as(means=lambda a, b, draws: (a - b)[draws].flatten())),
        Wrong("examples that are drawn twice count once: resampling is with replacement, and repeats count.",
              _bootstrap_as(means=_without_repeats)),
        Wrong("these are sums of the resamples, expected means.",
              _bootstrap_as(means=lambda a, b, draws: (a - b)[draws].sum(1))),
        Wrong("these are medians of the resamples, expected means.",
              _bootstrap_as(means=lambda a, b, draws: (a - b)[draws].quantile(0.5, dim=1))),
        Wrong("the draws are not used: the examples themselves are not resamples.",
              _bootstrap_as(means=lambda a, b, draws: a - b)),
        Wrong("the difference is that of the resamples on average: the best guess is that of the data themselves.",
              _bootstrap_as(centre=lambda values, means: means.mean().item())),
        Wrong("the difference is the middle resample's: the best guess is that of the data themselves.",
              _bootstrap_as(centre=lambda values, means: _quantile(means, 0.5))),
        Wrong("the difference is turned round: how much better is the first model than the second?",
              lambda a, b, draws, level: _bootstrap(b, a, draws, level)),
        Wrong("each tail is as large as both together should be: half of what is outside lies on either side.",
              _bootstrap_as(interval=lambda means, level, found: (_quantile(means, 1 - level),
                                                                  _quantile(means, level)))),
        Wrong("half of the level is cut off on either side: it is to stay inside.",
              _bootstrap_as(interval=lambda means, level, found: tuple(sorted((_quantile(means, level / 2),
                                                                               _quantile(means, 1 - level / 2)))))),
        Wrong("half of the level is cut off on either side, and low and high are exchanged by that: it is to stay "
              "inside.", _bootstrap_as(interval=lambda means, level, found: (
                  _quantile(means, 1 - level / 2), _quantile(means, level / 2)))),
        Wrong("only the lower tail is cut off: half of what is outside lies on either side.",
              _bootstrap_as(interval=lambda means, level, found: (_quantile(means, 1 - level), means.max().item()))),
        Wrong("low and high are exchanged.",
              _bootstrap_as(interval=lambda means, level, found: _both_tails(means, level, found)[::-1])),
        Wrong("these are the smallest and the largest resample: they drift apart with each resample more.",
              _bootstrap_as(interval=lambda means, level, found: (means.min().item(), means.max().item()))),
        Wrong("these are standard deviations around the difference: the percentiles of the resamples need no bell.",
              _bootstrap_as(interval=_normal(lambda means: means.std()))),
        Wrong("this is one standard deviation of the resamples to either side, whatever the level.",
              _bootstrap_as(interval=lambda means, level, found: (
                  (found - means.std(correction=0)).item(), (found + means.std(correction=0)).item()))),
        Wrong("the standard deviation of the resamples is divided by the root of their number: with more resamples the "
              "interval would vanish.", _bootstrap_as(interval=_normal(lambda means: means.std() / len(means) ** 0.5))),
        Wrong("the percentiles are mirrored at the difference (the basic bootstrap): expected as they are.",
              _bootstrap_as(interval=lambda means, level, found: tuple(
                  2 * found - end for end in _both_tails(means, level, found)[::-1]))),
        Wrong("the ends are resamples themselves: between two of them, interpolate.", _bootstrap_as(interval=_rounded)),
        Wrong("the resamples are not sorted before places are looked up.", _bootstrap_as(interval=_unsorted)),
        Wrong("the ends are distances from the difference, expected the ends themselves.",
              _bootstrap_as(interval=lambda means, level, found: tuple(
                  abs(end - found) for end in _both_tails(means, level, found)))),
        Wrong("resamples in which both are alike do not count as flipped: there the better model is not better.",
              _bootstrap_as(flips=lambda means, found: (means * found < 0).double().mean().item()
                            if found else 1.0)),
        Wrong("nothing flips where both models are alike on the data: neither is better there, so the share is 1.",
              _bootstrap_as(flips=lambda means, found: _flipped(means, found) if found else 0.0)),
        Wrong("resamples with a different strict sign are counted: a resample in which both are alike flips, too, and "
              "so does every one if the data show no better model.",
              _bootstrap_as(flips=lambda means, found: (means * found < 0).double().mean().item())),
        Wrong("signs are compared, and two zeros taken for the same sign: where neither model is better, nothing "
              "confirms a winner, so the share is 1.",
              _bootstrap_as(flips=lambda means, found: (
                  means.sign() != torch.tensor(found, dtype=torch.float64).sign()).double().mean().item())),
        Wrong("resamples in which the first model is not better are counted: if the second is better on the data, ask "
              "where it is not.", _bootstrap_as(flips=lambda means, found: (means <= 0).double().mean().item())),
        Wrong("resamples in which the first model is better are counted, expected those that flip.",
              _bootstrap_as(flips=lambda means, found: (means > 0).double().mean().item())),
        Wrong("resamples that agree are counted, expected those that flip.",
              _bootstrap_as(flips=lambda means, found: 1 - _flipped(means, found))),
        Wrong("the share is doubled, as for a test of two sides: here it is the share itself.",
              _bootstrap_as(flips=lambda means, found: 2 * _flipped(means, found))),
        Wrong("resamples are counted, expected their share.",
              _bootstrap_as(flips=lambda means, found: _flipped(means, found) * len(means))),
        Wrong("whole numbers are not looked after: scores may be 0 and 1 in int64, of which PyTorch takes no mean.",
              _as_they_are),
    ),
    hints=(
        "Two models fail on the same hard examples. Why is the difference surer than each of the two scores?",
        "Take the difference of each example first. Then there is one set of scores left to resample.",
        "fp64 · differences · drawn, one mean a row · two quantiles that leave the level between them · share of rows "
        "whose product with the whole difference is not above 0.",
    ),
    tolerance=1e-6,
    blocked=("minillama.evaluate.bootstrap", "minillama.evaluate.paired"),
    slow=lambda rng: (torch.rand(5, generator=rng), torch.rand(5, generator=rng),
                      torch.randint(5, (20000, 5), generator=rng), 0.95),
)  # fmt: skip


# 15.5 ----------------------------------------------------------------------------------------------------------------


def _choice_cases(rng: torch.Generator) -> Iterable[tuple[Any, ...]]:
    def questions(count: int, choices: int, longest: int, filling: float | None, missing: bool = False, most: int = 5,
                  scale: float = 3) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        begin = torch.randint(1, longest - most, (count,), generator=rng)
        lengths = torch.randint(1, most, (count, choices), generator=rng)
        if missing:
            lengths[torch.rand(count, choices, generator=rng) < 0.3] = 0
            lengths[:, 1] = lengths[:, 1].clamp(min=1)
        end = begin[:, None] + lengths
        log_probs = -scale * torch.rand(count, choices, longest, generator=rng)
        context = torch.arange(longest) < begin[:, None, None]
        log_probs = torch.where(context, log_probs[:, :1], log_probs)  # the same words, the same numbers
        behind = torch.arange(longest) >= end[:, :, None]
        if filling is not None:
            log_probs = log_probs.masked_fill(behind, filling)
        n_bytes = lengths * 3 + torch.randint(5, lengths.shape, generator=rng)
        return log_probs, begin, end, torch.where(lengths > 0, n_bytes, 0)

    yield questions(40, 4, 12, None)
    yield questions(25, 5, 9, math.nan)
    yield questions(30, 3, 14, 0.0, missing=True)
    yield questions(30, 4, 11, math.nan, missing=True)
    yield questions(20, 4, 60, None, most=40, scale=12)  # as likely as 10^-100
    yield questions(1, 2, 7, -math.inf)
    yield questions(3, 1, 8, math.nan)
    yield questions(0, 4, 8, None)
    log_probs, begin, end, n_bytes = questions(60, 2, 70, None, most=64, scale=4)
    closer = log_probs[:, :1].expand(-1, 2, -1).clone()  # two choices that differ in the last of many bits
    closer[:, 1, -1] = closer[:, 1, -1] * 0.9
    yield closer.bfloat16(), begin, torch.full_like(end, 70), torch.full_like(n_bytes, 200)


_Choices = tuple[Tensor, Tensor]


def _summed(log_probs: Tensor, begin: Tensor, end: Tensor) -> Tensor:
    counted = _between(log_probs, begin, end)
    return torch.where(counted, log_probs.double(), 0).sum(-1)


def _between(log_probs: Tensor, begin: Tensor, end: Tensor) -> Tensor:
    places = torch.arange(log_probs.shape[-1])
    return (places >= begin[:, None, None]) & (places < end[:, :, None])


def _choose(log_probs: Tensor, begin: Tensor, end: Tensor, n_bytes: Tensor, *,
            total: Callable[[Tensor, Tensor, Tensor], Tensor] = _summed,
            length: Callable[[Tensor, Tensor, Tensor], Tensor] = lambda n_bytes, begin, end: n_bytes,
            divide: Callable[[Tensor, Tensor], Tensor] = torch.div, there: bool = True,
            first: Callable[[Tensor, Tensor], Tensor] = lambda sums, shares: sums,
            pick: Callable[[Tensor], Tensor] = lambda scores: scores.argmax(1)) -> _Choices:  # fmt: skip
    sums = total(log_probs, begin, end)
    shares = divide(sums, length(n_bytes, begin, end).clamp(min=1))
    if there:
        sums, shares = (scores.masked_fill(n_bytes == 0, -math.inf) for scores in (sums, shares))
    return pick(first(sums, shares)), pick(shares)


def _choose_as(**options: Any) -> Callable[..., _Choices]:
    return lambda *arguments: _choose(*arguments, **options)


def _summing(begin: Callable[[Tensor, Tensor], Tensor] = lambda begin, end: begin,
             end: Callable[[Tensor, Tensor], Tensor] = lambda begin, end: end) -> Callable[..., _Choices]:  # fmt: skip
    return _choose_as(total=lambda log_probs, b, e: _summed(log_probs, begin(b, e), end(b, e)))


def _multiplied(log_probs: Tensor, begin: Tensor, end: Tensor) -> Tensor:
    return (log_probs.double() * _between(log_probs, begin, end)).sum(-1)


CHOICE = Exercise(
    "15.5", "multiple choice", "choose", minutes=15, difficulty=3,
    why="Most benchmarks of language models are multiple choice, and two ways of counting give two rankings.",
    reference=_choose,
    cases=_choice_cases,
    wrong=(
        Wrong("the filling behind a choice is counted: each choice ends at its own place.",
              _summing(end=lambda begin, end: torch.full_like(end, 1 << 30))),
        Wrong("the context's tokens are counted: they are the same for all choices, and once divided by the bytes they "
              "are not.", _summing(begin=lambda begin, end: torch.zeros_like(begin))),
        Wrong("all places are counted, context, choice and filling: only the choice's tokens are.",
              _summing(lambda begin, end: torch.zeros_like(begin), lambda begin, end: torch.full_like(end, 1 << 30))),
        Wrong("the context's last token is counted: `begin` is the place of the choice's first.",
              _summing(begin=lambda begin, end: begin - 1)),
        Wrong("the choice's first token is left out: it is the one that the context decides.",
              _summing(begin=lambda begin, end: begin + 1)),
        Wrong("all places are one too early: each token's log-probability stands at its own place, not at that of the "
              "token before.", _summing(lambda begin, end: begin - 1, lambda begin, end: end - 1)),
        Wrong("all places are one too late: each token's log-probability stands at its own place.",
              _summing(lambda begin, end: begin + 1, lambda begin, end: end + 1)),
        Wrong("number 0 is always taken, as it is if every sum is minus infinity: a place that does not count adds 0.",
              _choose_as(total=lambda log_probs, begin, end: torch.where(
                  _between(log_probs, begin, end), log_probs.double(), -math.inf).sum(-1))),
        Wrong("only what is not a number is left out: the filling may be numbers, too, and the context does not count.",
              _choose_as(total=lambda log_probs, begin, end: log_probs.double().nansum(-1))),
        Wrong("the choice's last token is left out: `end` is the place behind it.",
              _summing(end=lambda begin, end: end - 1)),
        Wrong("the place behind the choice is counted: `end` is not part of it.",
              _summing(end=lambda begin, end: end + 1)),
        Wrong("`end` is taken for the choice's length: it is a place in the row, as `begin` is.",
              _summing(end=lambda begin, end: begin[:, None] + end)),
        Wrong("only the first token of a choice is looked at.", _summing(end=lambda begin, end: (begin[:, None] + 1
                                                                                                 ).expand_as(end))),
        Wrong("the filling is multiplied by 0: what is not a number stays so; leave these places out.",
              _choose_as(total=_multiplied)),
        Wrong("both choices are by the mean per token: the first is by the sum, the second by the sum per byte.",
              _choose_as(length=lambda n_bytes, begin, end: end - begin[:, None], first=lambda sums, shares: shares)),
        Wrong("the second choice is by the mean per token: tokens are the tokenizer's affair; divide by bytes.",
              _choose_as(length=lambda n_bytes, begin, end: end - begin[:, None])),
        Wrong("the second choice divides by all tokens, those of the context too: divide by the choice's bytes.",
              _choose_as(length=lambda n_bytes, begin, end: end)),
        Wrong("the second choice is the mean per token divided by the bytes: divide the sum.",
              _choose_as(length=lambda n_bytes, begin, end: n_bytes * (end - begin[:, None]))),
        Wrong("both choices are by the sum: the second is by the sum per byte.",
              _choose_as(length=lambda n_bytes, begin, end: (n_bytes > 0).long())),
        Wrong("both choices are by the sum per byte: the first is by the sum.",
              _choose_as(first=lambda sums, shares: shares)),
        Wrong("the sum is multiplied by the bytes, expected divided.", _choose_as(divide=torch.mul)),
        Wrong("the two choices are exchanged: by the sum comes first.", _then(_choose, lambda both: both[::-1])),
        Wrong("a choice that is not there is chosen: a sum of nothing is 0, and no log-probability is larger.",
              _choose_as(there=False)),
        Wrong("by the sum, a choice that is not there is taken; by the sum per byte it is not: both must leave it out.",
              lambda *arguments: (_choose(*arguments, there=False)[0], _choose(*arguments)[1])),
        Wrong("by the sum per byte, a choice that is not there is taken; by the sum it is not: both must leave it out.",
              lambda *arguments: (_choose(*arguments)[0], _choose(*arguments, there=False)[1])),
        Wrong("the smallest is taken, which is minus infinity for a choice that is not there: log-probabilities are "
              "below 0, and the largest is the likeliest.", _choose_as(pick=lambda scores: scores.argmin(1))),
        Wrong("the least likely choice is taken: log-probabilities are below 0, and the largest is nearest to it.",
              _choose_as(pick=lambda scores: torch.where(scores.isinf(), math.inf, scores).argmin(1))),
        Wrong("probabilities are added: those of tokens that follow each other multiply, so their logarithms add up.",
              _choose_as(total=lambda log_probs, begin, end: torch.where(
                  _between(log_probs, begin, end), log_probs.double().exp(), 0).sum(-1))),
        Wrong("the sums are turned into probabilities, and those of long choices are 0 in fp32: compare logarithms.",
              _choose_as(total=lambda log_probs, begin, end: _summed(log_probs, begin, end).float().exp())),
        Wrong("the sum is in bf16, which has three digits: two good choices become one.",
              _choose_as(total=lambda log_probs, begin, end: _summed(log_probs, begin, end).to(log_probs.dtype))),
        Wrong("the choice is made over the questions: expected one for each question.",
              _choose_as(pick=lambda scores: scores.argmax(0) if len(scores) else scores.new_zeros(
                  scores.shape[1]).long())),
        Wrong("these are the scores, expected the number of the choice.", _choose_as(pick=lambda scores: scores)),
        Wrong("these are the scores of the choices taken, expected their number.",
              _choose_as(pick=lambda scores: scores.amax(1))),
        Wrong("choices are numbered from 1, expected from 0.", _choose_as(pick=lambda scores: scores.argmax(1) + 1)),
    ),
    hints=(
        "Two choices are a short word and a long sentence that are as good. Which has the larger log-probability?",
        "Make a mask of the places that belong to a choice, put 0 everywhere else, and add up along the row.",
        "places from 0 to T · not before begin, before end · 0 elsewhere, in fp32 · sum over the last axis · minus "
        "infinity where there are no bytes · place of the largest, of the sum and of the sum by bytes.",
    ),
    tolerance=0.0,
    blocked=("minillama.evaluate.choose",),
    slow=lambda rng: (-torch.rand(5000, 5, 8, generator=rng), torch.full((5000,), 2), torch.randint(
        4, 8, (5000, 5), generator=rng), torch.randint(3, 9, (5000, 5), generator=rng)),
)  # fmt: skip


# 15.6 ----------------------------------------------------------------------------------------------------------------

_TEXTS = (
    "Mia lost her kite.", "Ein größeres Übel", "从前有一个孩子。", "naïve café", "🙂 and 🪁!", "a\r\nb\n",
    "  two spaces ", "Once upon a time", "", "e\u0301te\u0301", "x", "Тихий океан", "Lily found it under the tree!",
)  # fmt: skip


def _bits_cases(rng: torch.Generator) -> Iterable[tuple[Any, ...]]:
    def nats(text: str) -> Tensor:
        """A token for about three characters, and one for the end."""
        return 6 * torch.rand(len(text) // 3 + 2, generator=rng)

    for chosen in ((0, 7, 12), (2,), (0, 2, 4, 6), (5, 8, 1), (3, 9, 11, 10), (10,), (12, 4)):
        texts = [_TEXTS[i] for i in chosen]
        own = [nats(text) for text in texts]
        yield own, texts, int(torch.randint(5, 60, (), generator=rng))
    large = _TEXTS[0] * 40
    yield [nats(large).bfloat16(), nats(_TEXTS[1]).bfloat16()], [large, _TEXTS[1]], 500


def _sum(nats: list[Tensor]) -> float:
    return sum(row.double().sum().item() for row in nats)


def _bits(nats: list[Tensor], texts: list[str], tokens: int, *,
          size: Callable[[str], int] = lambda text: len(text.encode()),
          total: Callable[[list[Tensor]], float] = _sum, base: float = math.log(2),
          bits: Callable[[float, int, int], float] = lambda bits, size, count: bits / size,
          perplexity: Callable[..., float] = lambda nats, tokens, size, own: math.exp(nats / tokens),
          ) -> tuple[float, float]:  # fmt: skip
    found, n_bytes, count = total(nats), sum(size(text) for text in texts), sum(len(row) for row in nats)
    return bits(found / base, n_bytes, count), perplexity(found, tokens, n_bytes, count)


def _bits_as(**options: Any) -> Callable[..., tuple[float, float]]:
    return lambda nats, texts, tokens: _bits(nats, texts, tokens, **options)


def _part(rows: slice) -> Callable[..., tuple[float, float]]:
    return _bits_as(total=lambda nats: sum(row[rows].double().sum().item() for row in nats))


def _of_each(nats: list[Tensor], texts: list[str], tokens: int) -> tuple[float, float]:
    """The mean of the texts' own ratios; those without bytes are left out."""
    own = [_bits([row], [text], tokens)[0] for row, text in zip(nats, texts, strict=True) if text]
    return sum(own) / len(own), _bits(nats, texts, tokens)[1]


BITS = Exercise(
    "15.6", "bits per byte", "bits_per_byte", minutes=15, difficulty=2,
    why="Two models with different tokenizers can be compared, but not by their perplexities per token.",
    reference=_bits,
    cases=_bits_cases,
    wrong=(
        Wrong("characters are counted: in UTF-8 many of them are two to four bytes.", _bits_as(size=len)),
        Wrong("these are nats per byte, expected bits: a bit is ln 2 nats.", _bits_as(base=1.0)),
        Wrong("nats are multiplied by ln 2: a bit is less than a nat, so there are more of them; divide.",
              _bits_as(base=1 / math.log(2))),
        Wrong("the first number is in decimal digits: a bit is ln 2 nats.", _bits_as(base=math.log(10))),
        Wrong("these are bits per token, expected per byte.", _bits_as(bits=lambda bits, size, count: bits / count)),
        Wrong("the first number is bytes per bit, expected bits per byte.",
              _bits_as(bits=lambda bits, size, count: size / bits)),
        Wrong("these are bits, which are not divided by the bytes.", _bits_as(bits=lambda bits, size, count: bits)),
        Wrong("this is the perplexity per byte, expected bits per byte.",
              _bits_as(bits=lambda bits, size, count: 2 ** (bits / size))),
        Wrong("these are bits per word, expected per byte.", _bits_as(size=lambda text: len(text.split()))),
        Wrong("bytes are counted in UTF-16, expected UTF-8.",
              _bits_as(size=lambda text: len(text.encode("utf-16-le")))),
        Wrong("bytes are counted after spaces and line ends at both ends are taken away: the model has written them.",
              _bits_as(size=lambda text: len(text.strip().encode()))),
        Wrong("the two characters of a Windows line end are counted as one byte: count the text as it is.",
              _bits_as(size=lambda text: len(text.replace("\r\n", "\n").encode()))),
        Wrong("a byte more is counted for the end of each text: the end has a surprise, and no bytes.",
              _bits_as(size=lambda text: len(text.encode()) + 1)),
        Wrong("the last surprise of each text is left out: to know where a text ends belongs to it.",
              _part(slice(None, -1))),
        Wrong("the first surprise of each text is left out: all that are given are scored.", _part(slice(1, None))),
        Wrong("this is the mean of the texts' own bits per byte: short texts would weigh as much as long ones; add all "
              "bits and all bytes first.", _of_each),
        Wrong("an empty text is passed over: the surprise at its end belongs to the sum, though it adds no bytes.",
              lambda nats, texts, tokens: _bits([row for row, text in zip(nats, texts, strict=True) if text], texts,
                                                tokens)),
        Wrong("an end is added to `tokens` for each text: the number has the ends already.",
              lambda nats, texts, tokens: (_bits(nats, texts, tokens)[0],
                                           _bits(nats, texts, tokens + len(texts))[1])),
        Wrong("the mean of each text's surprises is added up: add the surprises themselves.",
              _bits_as(total=lambda nats: sum(row.double().mean().item() for row in nats))),
        Wrong("the surprises are added in bf16, which loses most of them: go to fp32 first.",
              _bits_as(total=lambda nats: float(sum(row.sum().item() for row in nats)))),
        Wrong("the perplexity is per token of the model's own tokenizer: expected for the other's number of tokens.",
              _bits_as(perplexity=lambda nats, tokens, size, own: math.exp(nats / own))),
        Wrong("the perplexity is 2 to the nats per token: 2 belongs to bits, e to nats.",
              _bits_as(perplexity=lambda nats, tokens, size, own: 2 ** (nats / tokens))),
        Wrong("the perplexity is e to the bits per token: 2 belongs to bits, e to nats.",
              _bits_as(perplexity=lambda nats, tokens, size, own: math.exp(nats / math.log(2) / tokens))),
        Wrong("the perplexity is per byte, expected per token of the other tokenizer.",
              _bits_as(perplexity=lambda nats, tokens, size, own: math.exp(nats / size))),
        Wrong("the second number is the loss per token of the other tokenizer, expected the perplexity.",
              _bits_as(perplexity=lambda nats, tokens, size, own: nats / tokens)),
        Wrong("the second number is bits per token of the other tokenizer, expected the perplexity.",
              _bits_as(perplexity=lambda nats, tokens, size, own: nats / math.log(2) / tokens)),
        Wrong("the model's own perplexity is scaled by the numbers of tokens: scale the loss, its logarithm.",
              _bits_as(perplexity=lambda nats, tokens, size, own: math.exp(nats / own) * own / tokens)),
        Wrong("the model's own loss is scaled by the tokens the wrong way round: fewer tokens carry more each.",
              _bits_as(perplexity=lambda nats, tokens, size, own: math.exp(nats / own * tokens / own))),
        Wrong("the two are exchanged: bits per byte come first.", _then(_bits, lambda both: both[::-1])),
    ),
    hints=(
        "A tokenizer writes a text in half as many tokens. How does the loss per token change, if the text stays as "
        "likely?",
        "The probability of the whole text does not depend on how it is cut. Divide its logarithm by whatever you "
        "like: bytes, or another tokenizer's tokens.",
        "all surprises in fp32, one sum · by ln 2 and by the bytes of all texts in UTF-8 · e to the sum by the other's "
        "tokens.",
    ),
    blocked=("minillama.evaluate.perplexity", "minillama.loss.perplexity"),
)  # fmt: skip


# 15.7 ----------------------------------------------------------------------------------------------------------------

_COLOURS = ("red", "blue", "green", "yellow", "purple", "pink", "white", "brown")
_SAME = {
    "child": "kid", "named": "called", "lived": "dwelt", "loved": "adored", "friend": "pal", "told": "informed",
    "felt": "was", "went": "left", "took": "brought", "gave": "handed", "bought": "got", "said": "replied",
    "asked": "said", "found": "discovered", "looked": "searched",
}  # fmt: skip


def _versions(story: world.Story) -> dict[str, str]:
    words = story.text.split()
    after = dict(zip(_COLOURS, _COLOURS[1:] + _COLOURS[:1], strict=True))
    child, friend = story.facts["child"], story.facts["friend"]
    exchanged = story.text.replace(friend, "@").replace(child, friend).replace("@", child)
    return {
        "wrong colour": " ".join(after.get(word, word) for word in words),
        "who is who": exchanged,
        "backwards": ". ".join(reversed(story.text.removesuffix(".").split(". "))) + ".",
        "other words": " ".join(_SAME.get(word, word) for word in words),
    }


@functools.cache
def _told() -> tuple[dict[str, list[Words]], list[Words]]:
    """Each version of the 100 stories, and the stories themselves, in words."""
    rng = random.Random(0)
    stories = [world.sample(rng) for _ in range(100)]
    references = [story.text.split() for story in stories]
    told = [_versions(story) for story in stories]
    answers = {name: [version[name].split() for version in told] for name in told[0]}
    answers["another story"] = references[1:] + references[:1]
    return answers, references


def _fooled(score: Callable[[list[Words], list[Words]], float]) -> dict[str, float]:
    answers, references = _told()
    return {name: score(texts, references) for name, texts in answers.items()}


def _verify(measured: dict[str, Any]) -> str:
    if not 0 <= measured["predicted"] <= 100:
        return f"the prediction is {measured['predicted']}, expected a BLEU from 0 to 100."
    true = _fooled(_bleu)
    wrong = [name for name, value in true.items() if not abs(measured[name] - value) <= 0.06]
    if not wrong:
        return ""
    for message, score in _SUSPECTS.items():
        if all(abs(measured[name] - value) <= 0.01 * abs(value) for name, value in _fooled(score).items()):
            return message
    return (
        f"{wrong[0]!r} is not what the 100 stories of seed 0 give: one BLEU of the corpus, of words as `split` cuts "
        "them, with the stories themselves as references."
    )


_SUSPECTS: dict[str, Callable[[list[Words], list[Words]], float]] = {
    "these are shares from 0 to 1, expected BLEU from 0 to 100.": lambda texts, others: _bleu(texts, others) / 100,
    "these are the means of the stories' own BLEU, expected one of the whole corpus.": _each(_bleu),
    "these are the BLEU of all stories glued to one, expected n-grams within each story.":
        lambda texts, others: _bleu(_joined(texts), _joined(others)),
    "these are the BLEU of the first story alone, expected that of all.":
        lambda texts, others: _bleu(texts[:1], others[:1]),
    "these are shares of words that are right at their place, expected BLEU.": lambda texts, others: 100 * sum(
        a == b for one, other in zip(texts, others, strict=True) for a, b in zip(one, other, strict=False)
    ) / sum(map(len, texts)),
}  # fmt: skip

EXPERIMENT = Experiment(
    "15.7", "experiment: fooling BLEU", "measured_15", minutes=20, difficulty=3,
    why="A score counts what it counts: here is a right story that loses against three wrong ones.",
    keys={
        "predicted": "the BLEU that you expect of the right stories in other words, before you measure",
        "wrong colour": "BLEU, from 0 to 100, of the stories with another colour",
        "who is who": "BLEU, from 0 to 100, of the stories in which the child and the friend have changed names",
        "backwards": "BLEU, from 0 to 100, of the stories told from the last sentence to the first",
        "other words": "BLEU, from 0 to 100, of the stories in other words",
        "another story": "BLEU, from 0 to 100, of each next story",
        "because": "a sentence on why",
    },
    verify=_verify,
    explain="on which of these versions are true and what BLEU counts instead",
    hints=(
        "One word in a hundred is another: how many of the n-grams of four have it in them?",
        "Make each version of all stories, cut all of them into words, and give them to your BLEU at once.",
        "for each name of a version: that version of each story, cut into words · one corpus score against the stories "
        "cut into words · the next stories: the list turned by one.",
    ),
)  # fmt: skip


EXERCISES: list[Task] = [BLEU, ROUGE, WINDOWS, BOOTSTRAP, CHOICE, BITS, EXPERIMENT]
