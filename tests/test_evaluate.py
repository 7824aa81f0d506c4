"""Evaluation: scores against counts by hand and theory, perplexity against one pass, bad questions named by line."""

import importlib
import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from minillama import Llama, ModelConfig, load, world
from minillama import evaluate as e
from minillama.finetune import add_lora, save_adapter
from tests.test_cli import Result, Run, run  # noqa: F401  (`run` is a fixture)

TEXT = "Tom ate 3 pears.\nMia, who was 好, saw the naïve café 🎈 by the sea. " * 3


@pytest.fixture(scope="module")
def toy():
    return load("toy")


@pytest.fixture(scope="module")
def tiny(toy) -> Llama:
    """A model of the toy's vocabulary that says something else after each token; its context is 48."""
    torch.manual_seed(0)
    model = Llama(
        ModelConfig(dim=24, n_layers=2, n_heads=6, n_kv_heads=2, head_dim=6, ffn_dim=20,
                    vocab_size=toy[1].vocab_size, max_seq_len=48)
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.3)
    return model


@torch.no_grad()
def plain_losses(model: Llama, ids: list[int]) -> torch.Tensor:
    return F.cross_entropy(model(torch.tensor([ids[:-1]]))[0], torch.tensor(ids[1:]), reduction="none")


# Scores.


def test_mean_score_is_the_mean() -> None:
    assert e.mean_score([1.0, 2.0, 6.0]).value == 3.0


def test_interval_is_that_of_the_normal_approximation_for_many_examples() -> None:
    values = np.random.default_rng(0).normal(3, 2, 2000)
    value, low, high = e.bootstrap(values, resamples=4000)
    error = values.std() / math.sqrt(2000)
    assert value == pytest.approx(values.mean())
    assert (low, high) == pytest.approx((value - 1.96 * error, value + 1.96 * error), abs=0.1 * error)


def test_interval_covers_the_truth_as_often_as_its_level_says() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(300):
        _, low, high = e.bootstrap(rng.random(100) < 0.3, level=0.9, resamples=300, seed=seed)
        covered += low <= 0.3 <= high
    assert covered / 300 == pytest.approx(0.9, abs=0.05)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30))
def test_interval_lies_within_the_values_and_around_their_mean(values: list[float]) -> None:
    value, low, high = e.bootstrap(values, level=0.999, resamples=200)
    slack = 1e-9 * max(1, *map(abs, values))
    assert min(values) - slack <= low <= high <= max(values) + slack
    assert value == pytest.approx(np.mean(values), rel=1e-9, abs=slack)
    if len(set(values)) == 1:
        assert low == pytest.approx(value) == high


def test_the_seed_decides_the_resamples() -> None:
    score = e.mean_score(range(20))
    assert (e.resample(score, seed=1) == e.resample(score, seed=1)).all()
    assert (e.resample(score, seed=1) != e.resample(score, seed=2)).any()


def test_resamples_of_a_ratio_resample_its_parts_together() -> None:
    score = e.Score(np.array([[3.0, 1.0], [6.0, 2.0], [30.0, 10.0]]), lambda sums: sums[:, 0] / sums[:, 1])
    assert e.resample(score) == pytest.approx(np.full(1000, 3.0))


def test_paired_difference_is_more_certain_than_two_intervals() -> None:
    rng = np.random.default_rng(0)
    hard = rng.normal(0, 5, 200)
    a, b = hard + 0.3 + rng.normal(0, 0.1, 200), hard + rng.normal(0, 0.1, 200)
    difference = e.paired(a, b)
    assert 0.25 < difference.low < difference.value < difference.high < 0.35
    assert difference.flips == 0
    assert e.bootstrap(a).low < e.bootstrap(b).high  # apart, they tell nothing


def test_paired_difference_changes_sign_with_the_order() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.random(50), rng.random(50)
    one, other = e.paired(a, b), e.paired(b, a)
    assert one == pytest.approx((-other.value, -other.high, -other.low, other.flips))
    assert 0.02 < one.flips < 1


def test_a_model_is_not_better_than_itself() -> None:
    assert e.paired([0.0, 1.0, 1.0], [0.0, 1.0, 1.0]) == (0, 0, 0, 1)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: e.bootstrap([]), "there are no examples, expected at least 1"),
        (lambda: e.bootstrap([1.0], level=95), "level is 95, expected above 0 and below 1"),
        (lambda: e.bootstrap([1.0], resamples=0), "resamples is 0, expected at least 1"),
        (lambda: e.paired([1.0], [1.0, 0.0]), "the two scores have 1 and 2 examples"),
        (lambda: e.f1(["a"], ["a", "b"]), "expected a list of each, equally long"),
        (lambda: e.bleu("a cat", "a cat"), "expected a list of each"),
        (lambda: e.accuracy([], []), "with at least one"),
        (lambda: e.rouge(["a", "b"], ["ok", "从前"]), "reference 2 is '从前', which has no word of a-z"),
        (lambda: e.draw_tasks("story", 1), "the kind of task is 'story', expected one of mood, question"),
        (lambda: e.draw_tasks("mood", 0), "count is 0, expected at least 1"),
    ],
)
def test_bad_input_is_one_sentence(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


# Texts against references.


def test_normalized_is_squads_rule() -> None:
    assert e.normalized("  The  Cat's an Animal, in a hat! ") == "cats animal in hat"
    assert e.normalized("Theo ate another banana") == "theo ate another banana"


def test_exact_match_and_accuracy_differ_in_what_they_forgive() -> None:
    assert e.exact_match(["The cat.", "dog"], ["cat", "cat"]).value == 0.5
    assert e.accuracy(["cat.", "cat"], ["cat", "cat"]).value == 0.5


@pytest.mark.parametrize(
    "answer, reference, expected",
    [
        ("red kite", "red kite", 1),
        ("red red kite", "red kite", 2 * (2 / 3) * 1 / (2 / 3 + 1)),  # a word counts as often as the reference has it
        ("under the tree", "under a big tree", 2 * 1 * (2 / 3) / (1 + 2 / 3)),
        ("blue", "red", 0),
        ("the", "a", 1),  # nothing is left of either
        ("the", "red", 0),
    ],
)
def test_f1_is_the_overlap_of_words(answer: str, reference: str, expected: float) -> None:
    assert e.f1([answer], [reference]).value == pytest.approx(expected)


def test_bleu_counts_as_by_hand() -> None:
    score = e.bleu(["a b c d e"], ["a b c d f g"])
    assert score.value == pytest.approx(100 * math.exp(1 - 6 / 5) * (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25)
    assert "tok:13a" in score.signature and "version:" in score.signature


def test_chinese_has_a_word_for_each_character() -> None:
    answer, reference = "从前有一个小小的孩子。", "从前有一个小的孩子。"
    assert e.bleu([answer], [reference]).value < 1 < 50 < e.bleu([answer], [reference], chinese=True).value < 100
    assert "tok:zh" in e.bleu([answer], [reference], chinese=True).signature


@given(
    st.lists(
        st.lists(st.sampled_from(["a1", "b", "cat", "从", "前。"]), min_size=4, max_size=9), min_size=1, max_size=5
    )
)
def test_equal_texts_have_the_best_scores(words: list[list[str]]) -> None:
    texts = [" ".join(line) for line in words]
    assert e.bleu(texts, texts).value == pytest.approx(100)
    assert e.chrf(texts, texts).value == pytest.approx(100)
    assert e.exact_match(texts, texts).value == e.f1(texts, texts).value == e.accuracy(texts, texts).value == 1


def test_rouge_counts_as_by_hand() -> None:
    scores = e.rouge(["the cat on the mat sat", "a dog"], ["the cat sat on the mat", "a dog"])
    assert {name: score.value for name, score in scores.items()} == pytest.approx(
        {"rouge1": 1, "rouge2": (3 / 5 + 1) / 2, "rougeL": (5 / 6 + 1) / 2}
    )


@pytest.mark.parametrize("module, call", [("sacrebleu", e.bleu), ("sacrebleu", e.chrf), ("rouge_score", e.rouge)])
def test_missing_library_is_named_with_what_to_type(module: str, call, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def without(name: str):
        if name.startswith(module):
            raise ImportError(name)
        return real(name)

    monkeypatch.setattr(importlib, "import_module", without)
    with pytest.raises(ValueError, match=rf"needs {module.replace('_', '-')}.*pip install 'minillama\[lab\]'"):
        call(["a"], ["a"])


# Perplexity.


def test_a_text_that_fits_is_read_in_one_pass(toy) -> None:
    model, tokenizer = toy
    text = world.sample(random.Random(3)).text
    ids = tokenizer.encode(text, bos=True)
    found = e.perplexity(model, tokenizer, text)
    assert found.losses.tolist() == pytest.approx(plain_losses(model, ids).tolist(), abs=1e-5)
    assert (found.tokens, found.bytes) == (len(ids) - 1, len(text.encode()))
    assert found.per_token == pytest.approx(math.exp(found.nats / found.tokens))
    assert found.bits_per_byte == pytest.approx(found.nats / found.bytes / math.log(2))


@pytest.mark.parametrize("window, stride", [(12, 5), (12, 12), (12, 1), (1, 1), (48, 20)])
def test_every_token_is_scored_once_with_enough_before_it(tiny: Llama, window: int, stride: int) -> None:
    ids = torch.randint(9, tiny.config.vocab_size, (60,), generator=torch.Generator().manual_seed(1)).tolist()
    losses = e.sliding_losses(tiny, ids, window=window, stride=stride)
    assert len(losses) == 59
    done = 0
    for end in [window, *range(window + stride, 59 + stride, stride)]:
        end = min(end, 59)
        expected = plain_losses(tiny, ids[max(0, end - window) : end + 1])[-(end - done) :] if end > done else []
        assert losses[done:end].tolist() == pytest.approx(list(map(float, expected)), abs=1e-5)
        done = end
    assert done == 59


@settings(max_examples=25)
@given(st.integers(1, 48), st.data())
def test_stride_does_not_matter_where_the_text_fits_a_window(tiny: Llama, length: int, data) -> None:
    ids = list(range(20, 21 + length))
    window = data.draw(st.integers(length, 48))
    stride = data.draw(st.integers(1, window))
    losses = e.sliding_losses(tiny, ids, window=window, stride=stride)
    assert losses.tolist() == pytest.approx(plain_losses(tiny, ids).tolist(), abs=1e-5)


def test_logits_are_held_for_a_part_of_a_window_only(tiny: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    ids, sizes, scores = list(range(20, 68)), [], tiny.scores
    monkeypatch.setattr(e, "SCORED_AT_ONCE", 10)
    monkeypatch.setattr(tiny, "scores", lambda x: (sizes.append(len(x)), scores(x))[1])
    assert e.sliding_losses(tiny, ids).tolist() == pytest.approx(plain_losses(tiny, ids).tolist(), abs=1e-5)
    assert max(sizes[:-1]) == 10


@given(st.text(min_size=1, max_size=40).filter(lambda text: text.isprintable()))
def test_sizes_are_the_bytes_of_the_text(toy, text: str) -> None:
    tokenizer = toy[1]
    assert sum(e._sizes(tokenizer, tokenizer.encode(text))) == len(text.encode())


def test_blocks_cut_the_text_at_the_same_bytes(toy, tiny: Llama) -> None:
    found = e.perplexity(tiny, toy[1], TEXT)
    blocks = found.blocks(50)
    assert len(blocks) == math.ceil(found.bytes / 50)
    assert torch.equal(torch.cat([block.losses for block in blocks]), found.losses)
    ends = np.cumsum([block.bytes for block in blocks])
    assert all(50 * i - 12 < end <= 50 * i for i, end in enumerate(ends[:-1], start=1))  # no token here is longer
    scores = e.perplexity_scores(blocks)
    assert scores["bits_per_byte"].value == pytest.approx(found.bits_per_byte)
    assert scores["perplexity"].value == pytest.approx(found.per_token)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"window": 49}, "window is 49, expected 1 to 48"),
        ({"window": 0}, "window is 0, expected 1 to 48"),
        ({"window": 8, "stride": 9}, "stride is 9, expected 1 to 8"),
        ({"stride": 0}, "stride is 0, expected 1 to 48"),
    ],
)
def test_windows_that_would_leave_tokens_out_are_refused(tiny: Llama, toy, settings, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        e.perplexity(tiny, toy[1], TEXT, **settings)


def test_a_text_without_tokens_has_no_perplexity(tiny: Llama, toy) -> None:
    with pytest.raises(ValueError, match="the text is empty"):
        e.perplexity(tiny, toy[1], "")


# Choices.


def test_log_likelihood_is_that_of_each_choice_alone(tiny: Llama, toy) -> None:
    tokenizer = toy[1]
    questions = [
        e.Question("Tom had a ", ["red kite.", "red", "blue ball and a drum."], 1),
        e.Question("x", ["y", "z 好"], 0),
    ]
    found = e.choose(tiny, tokenizer, questions).log_likelihoods
    for (question, choices, _), row in zip(questions, found, strict=True):
        for choice, log_likelihood in zip(choices, row, strict=True):
            ids = tokenizer.encode(f"{question} {choice}", bos=True)
            context = tokenizer.encode(question.rstrip(), bos=True)
            assert ids[: len(context)] == context
            assert log_likelihood == pytest.approx(-float(plain_losses(tiny, ids)[len(context) - 1 :].sum()), abs=1e-4)


def test_long_choices_have_no_disadvantage_per_character(tiny: Llama, toy) -> None:
    questions = [e.Question("Tom had", ["a red kite and a blue ball", "it"], 0)]
    result = e.choose(tiny, toy[1], questions)
    (one, other), length = result.log_likelihoods[0], len(questions[0].choices[0])
    assert one < other and one / length > other / 2
    assert (result.scores["acc"].value, result.scores["acc_norm"].value) == (0, 1)


def test_a_question_that_does_not_fit_is_named(tiny: Llama, toy) -> None:
    questions = [e.Question("a", ["b", "c"], 0), e.Question("a b c d " * 20, ["b", "c"], 0)]
    with pytest.raises(ValueError, match="question 2 has .* tokens with its longest choice, but .* 48: shorten it"):
        e.choose(tiny, toy[1], questions)


GOOD = '{"question": "The sky is", "choices": ["blue", "a fish"], "answer": 0}'


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "line 3 is not JSON: Expecting property name .* at column 2"),
        ("[]", 'line 3: expected {"question"'),
        ('{"question": "q", "choices": ["a", "b"]}', 'line 3: expected {"question"'),
        (GOOD.replace('"The sky is"', '" "'), "line 3: the question is ' ', expected text"),
        (GOOD.replace(', "a fish"', ""), "line 3: the choices are .*, expected a list of at least 2"),
        (GOOD.replace('"a fish"', "7"), "line 3: choice 1 is 7, expected text"),
        (GOOD.replace("a fish", "blue"), "line 3: choice 1 is 'blue', which is there already"),
        (GOOD.replace("0}", "2}"), "line 3: the answer is 2, expected the index of a choice, 0 to 1"),
        (GOOD.replace("0}", "true}"), "line 3: the answer is True"),
        (GOOD.replace("blue", "\\ud800"), "line 3: .*surrogates not allowed"),
        (b"\xff", "line 3 is not UTF-8: byte 0 is 0xff"),
        ("[" * 10**5, "line 3: .*recursion"),
    ],
)
def test_a_bad_line_is_named_with_what_is_wrong(tmp_path: Path, line: str | bytes, message: str) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_bytes(f"{GOOD}\n\n".encode() + (line if isinstance(line, bytes) else line.encode()) + b"\n")
    with pytest.raises(ValueError, match=message.replace("{", r"\{")):
        e.read_questions(path)


def test_a_file_without_questions_is_refused(tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text("\n\n")
    with pytest.raises(ValueError, match="has no questions"):
        e.read_questions(tmp_path / "q.jsonl")


@given(
    st.lists(
        st.tuples(
            st.text(min_size=1).filter(str.strip),
            st.lists(st.text(min_size=1).filter(str.strip), min_size=2, max_size=4, unique=True),
            st.integers(0, 1),
        ),
        min_size=1,
        max_size=4,
    ),
    st.booleans(),
)
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, rows, ascii: bool) -> None:
    path = tmp_path_factory.getbasetemp() / "written.jsonl"
    keys = ("question", "choices", "answer")
    lines = [json.dumps(dict(zip(keys, row, strict=True)) | {"more": 1}, ensure_ascii=ascii) for row in rows]
    path.write_bytes("\n".join(lines).encode("utf-8-sig"))
    assert [tuple(question) for question in e.read_questions(path)] == rows


@given(st.binary(max_size=80))
def test_whatever_a_file_holds_the_answer_is_questions_or_one_sentence(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="any.jsonl(, line [0-9]+| has no questions)"):
        e.read_questions(path)


# Tasks.


class Oracle:
    """Stands in for `generate`: answers each task of the world right but for every `wrong`-th."""

    def __init__(self, tokenizer, tasks: list[world.Task], wrong: int = 10**9):
        self.answers = {}
        for i, task in enumerate(tasks, start=1):
            prompt = tokenizer.decode(tokenizer.chat([{"role": "user", "content": task.prompt}]))
            self.answers[prompt] = task.answer if i % wrong else "?"
        self.tokenizer, self.seen = tokenizer, []

    def __call__(self, model, tokenizer, prompts, *, max_new_tokens: int, temperature: float) -> list[str]:
        assert temperature == 0
        self.seen += prompts
        assert max_new_tokens > max(len(tokenizer.encode(answer)) for answer in self.answers.values())
        return [f" {self.answers[tokenizer.decode(prompt)]}" for prompt in prompts]


@pytest.mark.parametrize(
    "kind, expected",
    [
        ("mood", {"accuracy": 1}),
        ("question", {"exact_match": 1, "f1": 1}),
        ("summary", {"rougeL": 1, "exact_match": 1}),
        ("translation", {"bleu": 100, "chrf": 100, "exact_match": 1}),
    ],
)
def test_right_answers_have_the_best_scores(toy, monkeypatch, kind: str, expected: dict[str, float]) -> None:
    model, tokenizer = toy
    monkeypatch.setattr(e, "generate", Oracle(tokenizer, e.draw_tasks(kind, 7, seed=1)))
    result = e.run_task(model, tokenizer, kind, count=7, seed=1, batch_size=3)
    assert {name: score.value for name, score in result.scores.items()} == pytest.approx(expected)
    assert all(example.written == example.answer for example in result.examples)
    assert [example.prompt for example in result.examples] == [task.prompt for task in e.draw_tasks(kind, 7, seed=1)]


def test_wrong_answers_count(toy, monkeypatch) -> None:
    monkeypatch.setattr(e, "generate", Oracle(toy[1], e.draw_tasks("question", 8), wrong=4))
    result = e.run_task(*toy, "question", count=8)
    assert result.scores["exact_match"].value == 0.75
    assert [example.written == "?" for example in result.examples] == [False, False, False, True] * 2


def test_shots_are_earlier_turns_with_other_stories_than_the_tasks(toy, monkeypatch) -> None:
    model, tokenizer = toy
    seen = []
    monkeypatch.setattr(e, "generate", lambda m, t, prompts, **_: seen.extend(prompts) or ["?"] * len(prompts))
    e.run_task(model, tokenizer, "mood", count=3, shots=2, heldout=True)
    spelled = [tokenizer.decode(ids, control=True) for ids in seen]
    assert all(text.count("<|im_start|>user") == 3 and text.endswith("<|im_start|>assistant\n") for text in spelled)
    assert len({text.rsplit("<|im_start|>user", 1)[0] for text in spelled}) == 1
    worked = spelled[0].split("<|im_end|>")[1]
    assert worked.removeprefix("\n<|im_start|>assistant\n ") in world.MOODS


def test_the_batch_does_not_change_what_is_written(toy) -> None:
    one, other = (e.run_task(*toy, "mood", count=5, batch_size=size) for size in (1, 5))
    assert one.examples == other.examples


def test_tasks_follow_from_the_seed_and_heldout_ones_have_facts_of_their_own() -> None:
    assert (
        e.draw_tasks("summary", 5, seed=3) == e.draw_tasks("summary", 5, seed=3) != e.draw_tasks("summary", 5, seed=4)
    )
    for task in e.draw_tasks("summary", 5, heldout=True):
        facts = world.read(task.prompt.rsplit("\n", 1)[0], heldout=True).facts
        assert world.held_out(facts["colour"], facts["thing"])


# The command.


def test_eval_prints_a_table_and_writes_json(run: Run, tmp_path: Path) -> None:  # noqa: F811
    (tmp_path / "book.txt").write_text(TEXT, encoding="utf-8")
    out = tmp_path / "result.json"
    result = run("eval", "--text", tmp_path / "book.txt", "--out", out, "--checkpoint", "toy", "--checkpoint", "toy")
    assert result.code == 0 and result.err == ""
    lines = result.out.splitlines()
    assert lines[0].split() == ["toy", "toy", "difference", "flips"]
    assert lines[1].startswith("bits_per_byte") and lines[2].startswith("perplexity") and "100.0%" in lines[1]
    written = json.loads(out.read_text(encoding="utf-8"))
    found = e.perplexity(*load("toy"), TEXT)
    assert written["results"][0]["scores"]["bits_per_byte"]["value"] == pytest.approx(found.bits_per_byte)
    assert written["results"][1]["bytes"] == len(TEXT.encode())
    assert written["differences"]["perplexity"] == {"value": 0, "low": 0, "high": 0, "flips": 1}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["book.txt", "result.json"]


def test_eval_of_choices_and_of_tasks(run: Run, tmp_path: Path) -> None:  # noqa: F811
    data, out = tmp_path / "q.jsonl", tmp_path / "r.json"
    data.write_text(f"{GOOD}\n{GOOD.replace('sky', 'sea')}\n")
    assert "acc_norm" in run("eval", "--task", "choice", "--data", data, "--out", out).out
    written = json.loads(out.read_text())
    assert [len(row) for row in written["results"][0]["log_likelihoods"]] == [2, 2]
    assert run("eval", "--task", "mood", "--count", 2, "--out", out).code == 0
    written = json.loads(out.read_text())
    assert written["count"] == 2 and len(written["results"][0]["examples"]) == 2
    assert "2 examples" in run("eval", "--count", 2).out


def test_eval_compares_a_model_with_itself_and_an_adapter(run: Run, tmp_path: Path) -> None:  # noqa: F811
    model, _ = load("toy")
    add_lora(model, 2, 4, ["wq", "down"])
    for name, weight in model.named_parameters():
        if name.endswith(".b"):
            torch.nn.init.normal_(weight, std=0.1)
    save_adapter(model, tmp_path / "adapter")
    (tmp_path / "book.txt").write_text(TEXT, encoding="utf-8")
    both = ("--checkpoint", "toy", "--checkpoint", "toy", "--adapter", tmp_path / "adapter")
    result = run("eval", "--text", tmp_path / "book.txt", "--out", tmp_path / "r.json", *both)
    assert result.code == 0 and f"toy + {tmp_path / 'adapter'}"[-29:] in result.out.splitlines()[0]
    plain, adapted = json.loads((tmp_path / "r.json").read_text())["results"]
    assert "adapter" not in plain and adapted["adapter"] == str(tmp_path / "adapter")
    for found, of in ((plain, load("toy")), (adapted, (model, load("toy")[1]))):
        expected = e.perplexity(*of, TEXT).bits_per_byte
        assert found["scores"]["bits_per_byte"]["value"] == pytest.approx(expected, rel=1e-4)
    assert plain["scores"] != adapted["scores"]
    result = run("eval", "--count", 1, "--adapter", tmp_path / "none")
    assert result.code == 2 and "none" in result.err and result.err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--task", "story"], "--task is 'story', expected perplexity, choice"),
        (["--task", "choice"], "the task choice has no questions: give a file of them with --data"),
        (["--task", "mood", "--text", "x"], "--text is x, but the task is mood"),
        (["--data", "x"], "--data is x, but the task is perplexity"),
        (["--text", "x", "--count", "3"], "--count is given, but x is read whole"),
        (["--count", "0"], "--count is 0, expected at least 1"),
        (["--shots", "2"], "--shots is 2, but perplexity has no examples"),
        (["--text", "nowhere.txt"], "nowhere.txt: No such file"),
        (["--checkpoint", "toy", "--checkpoint", "a", "--checkpoint", "b"], "there are 3 checkpoints"),
    ],
)
def test_options_that_do_not_fit_are_one_sentence(run: Run, arguments: list[str], message: str) -> None:  # noqa: F811
    result = run("eval", *arguments)
    assert result.code == 2 and result.out == ""
    assert message in result.err and result.err.count("\n") == 1


def test_ctrl_c_ends_eval_cleanly(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(e, "run_task", stopped)
    result = run("eval", "--task", "mood", "--out", tmp_path / "r.json")
    assert result == Result(130, "", "minillama: stopped; nothing was written.\n")
    assert list(tmp_path.iterdir()) == []
