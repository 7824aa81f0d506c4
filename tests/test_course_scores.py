"""The scores of chapter 15's exercises against the libraries that papers quote."""

import random

import numpy as np
import pytest
import torch

from minillama import world
from minillama.course.chapters import c15
from minillama.course.exercise import Exercise
from minillama.course.judge import cases

sacrebleu = pytest.importorskip("sacrebleu.metrics")
rouge_scorer = pytest.importorskip("rouge_score.rouge_scorer")

each_seed = pytest.mark.parametrize("seed", [0, 1, 2])


def inputs(exercise: Exercise, seed: int) -> list[tuple]:
    found = cases(exercise, seed)
    assert len(found) >= 7
    return found


@each_seed
def test_bleu_is_sacrebleus(seed):
    bleu = sacrebleu.BLEU(tokenize="none", smooth_method="none", force=True)
    for answers, references in inputs(c15.BLEU, seed):
        if not answers:
            assert c15.BLEU.reference(answers, references) == 0  # sacrebleu refuses an empty corpus
            continue
        texts = [[" ".join(words) for words in side] for side in (answers, references)]
        expected = bleu.corpus_score(texts[0], [texts[1]]).score
        assert c15.BLEU.reference(answers, references) == pytest.approx(expected, rel=1e-9, abs=1e-9)


class Words:
    def tokenize(self, text: str) -> list[str]:
        return text.split()


@each_seed
def test_rouge_l_is_rouge_scores(seed):
    scorer = rouge_scorer.RougeScorer(["rougeL"], tokenizer=Words())
    for answer, references in inputs(c15.ROUGE, seed):
        expected = scorer.score_multi([" ".join(words) for words in references], " ".join(answer))["rougeL"]
        assert c15.ROUGE.reference(answer, references) == pytest.approx(tuple(expected), rel=1e-12)


@each_seed
def test_the_references_of_one_answer_are_equally_good_or_clearly_not(seed):
    for answer, references in inputs(c15.ROUGE, seed):
        scores = sorted(c15.ROUGE.reference(answer, [words])[2] for words in references)
        assert all(a == b or b - a > 1e-6 for a, b in zip(scores, scores[1:], strict=False))


@each_seed
def test_the_interval_is_that_of_numpys_quantiles(seed):
    for a, b, draws, level in inputs(c15.BOOTSTRAP, seed):
        found, low, high, _ = c15.BOOTSTRAP.reference(a, b, draws, level)
        gaps = a.numpy().astype(np.float64) - b.numpy()
        ends = np.quantile(gaps[draws.numpy()].mean(1), [(1 - level) / 2, (1 + level) / 2])
        assert (found, low, high) == pytest.approx((gaps.mean(), *ends), rel=1e-9, abs=1e-12)


@each_seed
def test_every_token_but_the_first_is_scored_once_with_the_most_context(seed):
    for nats, window, stride in inputs(c15.WINDOWS, seed):
        if stride >= window:
            with pytest.raises(ValueError):
                c15.WINDOWS.reference(nats, window, stride)
            continue
        plan, loss = c15.WINDOWS.reference(nats, window, stride)
        scored = {t: begin for begin, end, first in plan for t in range(first, end)}
        assert list(scored) == list(range(1, len(nats)))
        assert all(end - begin <= window and begin % stride == 0 for begin, end, _ in plan)
        for t, begin in scored.items():
            assert begin == min(b for b, end, _ in plan if b <= t < end)
        assert loss == pytest.approx(sum(nats[b, t].item() for t, b in scored.items()) / (len(nats) - 1))


def test_a_choice_is_judged_by_its_own_tokens():
    for log_probs, begin, end, n_bytes in inputs(c15.CHOICE, 0):
        by_sum, by_byte = c15.CHOICE.reference(log_probs, begin, end, n_bytes)
        assert by_sum.dtype == by_byte.dtype == torch.int64 and by_sum.shape == by_byte.shape == begin.shape
        for q in range(len(begin)):
            there = [c for c in range(end.shape[1]) if n_bytes[q, c]]
            sums = {c: log_probs[q, c, begin[q] : end[q, c]].double().sum().item() for c in there}
            assert by_sum[q] == max(there, key=sums.__getitem__)
            assert by_byte[q] == max(there, key=lambda c: sums[c] / n_bytes[q, c].item())


@pytest.fixture(scope="module")
def true() -> dict[str, float]:
    return c15._fooled(c15._bleu)


def test_bleu_prefers_three_wrong_versions_to_the_true_one(true):
    assert min(true[name] for name in ("wrong colour", "who is who", "backwards")) > true["other words"] + 3
    assert true["another story"] < 20
    rng = random.Random(0)
    for story in (world.sample(rng) for _ in range(20)):
        versions = c15._versions(story)
        assert len({story.text, *versions.values()}) == 5
        assert sorted(versions["backwards"].replace(".", " ").split()) == sorted(story.text.replace(".", " ").split())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda true: true, ""),
        (lambda true: {name: round(value, 1) for name, value in true.items()}, ""),
        (lambda true: {name: value / 100 for name, value in true.items()}, "shares from 0 to 1"),
        (lambda true: c15._fooled(c15._each(c15._bleu)), "the stories' own BLEU"),
        (lambda true: {name: 100.0 for name in true}, "'wrong colour' is not what the 100 stories"),
        (lambda true: true | {"backwards": -true["backwards"]}, "'backwards' is not what the 100 stories"),
        (lambda true: true | {"predicted": 101}, "expected a BLEU from 0 to 100"),
        (lambda true: true | {"predicted": -1}, "expected a BLEU from 0 to 100"),
    ],
)
def test_the_experiment_knows_its_numbers(change, message, true):
    told = c15.EXPERIMENT.verify({"predicted": 90.0} | change(true))
    assert message in told and bool(message) == bool(told)
