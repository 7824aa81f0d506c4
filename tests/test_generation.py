"""Generation: what is drawn, when it ends, what comes back as text."""

import functools
import itertools
import math
import random
import shutil

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch._subclasses.fake_tensor import FakeTensorMode

import minillama.generation
from minillama.cache import KVCache
from minillama.config import ModelConfig
from minillama.generation import (
    Sampling,
    beam_search,
    generate,
    guess,
    min_p_filter,
    next_logits,
    sample_next,
    stream_lookup,
    stream_tokens,
    top_k_filter,
    top_p_filter,
)
from minillama.model import Llama
from minillama.tokenizer import BPETokenizer, SentencePieceTokenizer

SHAPE = {"dim": 48, "n_layers": 2, "n_heads": 6, "n_kv_heads": 2, "head_dim": 10, "ffn_dim": 56, "max_seq_len": 64}
GREEDY = Sampling(temperature=0)
PATHS = pytest.mark.parametrize("fast", [True, False], ids=["fast", "readable"])


@functools.cache
def random_model(vocab_size: int = 37, seed: int = 0, fast: bool = True) -> Llama:
    """Weights large enough that every context gives another distribution."""
    torch.manual_seed(seed)
    model = Llama(ModelConfig(**SHAPE, vocab_size=vocab_size))
    with torch.no_grad():
        for weight in model.parameters():
            weight.uniform_(0.5, 1.5) if weight.dim() == 1 else weight.normal_(std=0.3)
    for block in model.blocks:
        block.attention.fast = fast
    return model


@functools.cache
def spelling() -> BPETokenizer:
    """One token for every byte; EOS 256, BOS 257, and ChatML's control tokens."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    letters = {byte: chr(byte) for byte in visible} | {byte: chr(256 + n) for n, byte in enumerate(hidden)}
    return bpe([letters[byte] for byte in range(256)], ["<|eos|>", "<|bos|>", "<|im_start|>", "<|im_end|>"], bos=True)


def bpe(normal: list[str], control: list[str], bos: bool) -> BPETokenizer:
    fields = {
        "tokens": normal + control, "token_type": [1] * len(normal) + [3] * len(control), "merges": [], "pre": "smollm",
        "eos_token_id": len(normal), **({"bos_token_id": len(normal) + 1} if bos else {}),
    }  # fmt: skip
    return BPETokenizer({f"tokenizer.ggml.{name}": value for name, value in fields.items()})


@functools.cache
def words() -> SentencePieceTokenizer:
    """As LLaMA's: BOS before a prompt, and a space before a text's first word."""
    texts = ["the cat saw the dog", "a dog saw a cat", "the cat and the dog sat"] * 20
    return SentencePieceTokenizer.train(texts, vocab_size=300)


class Parrot(torch.nn.Module):
    """A model that says one script for every row, whatever the prompt."""

    def __init__(self, *scripts: list[int], max_seq_len: int = 512):
        super().__init__()
        self.config = ModelConfig(**{**SHAPE, "max_seq_len": max_seq_len}, vocab_size=300)
        self.norm = torch.nn.RMSNorm(1)
        self.scripts, self.calls = scripts, 0

    def hidden(self, tokens: torch.Tensor, cache: KVCache) -> torch.Tensor:
        cache.advance(tokens.shape[1])
        self.calls += 1
        return tokens[..., None]

    def scores(self, x: torch.Tensor) -> torch.Tensor:
        said = torch.tensor([script[self.calls - 1] if self.calls <= len(script) else 33 for script in self.scripts])
        return torch.nn.functional.one_hot(said, 300) * 50.0


def say(text: str, **settings):
    """What `generate` makes of a model that wants to say `text` and then EOS. It has 500 tokens for it."""
    tokenizer = spelling()
    model = Parrot(tokenizer.encode(text, eos=True))
    return generate(model, tokenizer, [257], **{"temperature": 0, "max_new_tokens": 500, **settings})


def column(steps, row: int = 0) -> list[int]:
    return [step[row] for step in steps if step[row] is not None]


# --- Filters and probabilities


def kept(filtered: torch.Tensor) -> list[list[int]]:
    return [row.isfinite().nonzero().flatten().tolist() for row in filtered]


def logits_of(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows).log()


def test_top_k_keeps_the_k_best_of_each_row_and_what_ties_with_the_last():
    logits = logits_of([0.1, 0.4, 0.2, 0.3], [0.4, 0.2, 0.2, 0.2])
    assert kept(top_k_filter(logits, 1)) == [[1], [0]]
    assert kept(top_k_filter(logits, 2)) == [[1, 3], [0, 1, 2, 3]]
    assert kept(top_k_filter(logits, 99)) == [[0, 1, 2, 3]] * 2


def test_top_p_keeps_the_token_that_crosses_and_none_after_it():
    logits = logits_of([0.1, 0.4, 0.2, 0.3])
    for p, expected in (
        (1e-9, [1]), (0.39, [1]), (0.41, [1, 3]), (0.69, [1, 3]), (0.71, [1, 2, 3]), (0.91, [0, 1, 2, 3])
    ):  # fmt: skip
        assert kept(top_p_filter(logits, p)) == [expected]
    assert kept(top_p_filter(torch.zeros(1, 4), 0.5)) == [[0, 1]]  # of equals, the first


def test_min_p_keeps_what_is_likely_beside_the_likeliest():
    logits = logits_of([0.1, 0.4, 0.2, 0.3], [0.7, 0.1, 0.1, 0.1])
    assert kept(min_p_filter(logits, 0.45)) == [[1, 2, 3], [0]]
    assert kept(min_p_filter(logits, 0.1)) == [[0, 1, 2, 3]] * 2
    assert kept(min_p_filter(torch.zeros(1, 4), 1.0)) == [[0, 1, 2, 3]]


@given(
    st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=20),
    st.floats(1e-3, 10), st.integers(1, 25), st.floats(0.01, 1), st.floats(0, 1),
)  # fmt: skip
def test_probabilities_sum_to_one_and_keep_the_order_and_the_likeliest(row, temperature, top_k, top_p, min_p):
    logits = torch.tensor([row])
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    [probabilities] = sampling.probabilities(logits)
    assert probabilities.sum() == pytest.approx(1, abs=1e-5)
    assert probabilities[logits[0].argmax()] > 0
    by_logit = probabilities[logits[0].argsort(stable=True, descending=True)]
    assert (by_logit.diff()[logits[0].sort(descending=True).values.diff() < 0] <= 1e-7).all()


@pytest.mark.parametrize("temperature", [1e-44, 1e-6, 1e30])
def test_extreme_temperatures_stay_finite(temperature):
    logits = torch.tensor([[-40.0, 3.0, 90.0, 89.0]])
    [probabilities] = Sampling(temperature=temperature).probabilities(logits)
    expected = torch.tensor([0, 0, 1.0, 0]) if temperature < 1 else torch.full((4,), 0.25)
    torch.testing.assert_close(probabilities, expected)


SETTINGS = {
    "plain": {}, "hot": {"temperature": 1.7}, "cold": {"temperature": 0.4}, "top_k": {"top_k": 4},
    "top_p": {"top_p": 0.8}, "min_p": {"min_p": 0.15},
    "all": {"temperature": 1.4, "top_k": 6, "top_p": 0.9, "min_p": 0.1},
}  # fmt: skip


def by_hand(logits: list[float], temperature=1.0, top_k=None, top_p=1.0, min_p=0.0) -> list[float]:
    """The same distribution by sorting and counting in plain Python, for logits that all differ."""
    weights = {i: math.exp(logit / temperature) for i, logit in enumerate(logits)}
    ranked = sorted(weights, key=weights.__getitem__, reverse=True)[:top_k]
    total, mass, nucleus = sum(weights[i] for i in ranked), 0.0, []
    for i in ranked:
        if mass >= top_p * total:
            break
        nucleus.append(i)
        mass += weights[i]
    nucleus = [i for i in nucleus if weights[i] >= min_p * weights[nucleus[0]]]
    mass = sum(weights[i] for i in nucleus)
    return [weights[i] / mass if i in nucleus else 0.0 for i in range(len(logits))]


def assert_drawn_from(counts: list[int], expected: list[float]) -> None:
    """Pearson's chi-square test, at about one false alarm in 10 000 (seeds are fixed: it never comes)."""
    draws, degrees, statistic = sum(counts), -1, 0.0
    for count, probability in zip(counts, expected, strict=True):
        if probability == 0:
            assert count == 0
        else:
            statistic += (count - draws * probability) ** 2 / (draws * probability)
            degrees += 1
    assert degrees >= 1
    limit = degrees * (1 - 2 / (9 * degrees) + 3.72 * math.sqrt(2 / (9 * degrees))) ** 3  # Wilson and Hilferty
    assert statistic < limit


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_draws_follow_the_exact_distribution(settings):
    logits = [0.3, -1.2, 2.0, 1.1, 0.9, -0.4, 1.6, -2.5, 0.1, 1.3, -0.7]
    generator = torch.Generator().manual_seed(11)
    draws = 6000
    many = torch.tensor([logits]).expand(draws, -1)
    drawn = sample_next(many, Sampling(**settings), [generator] * draws)
    counts = drawn.bincount(minlength=len(logits)).tolist()
    assert_drawn_from(counts, by_hand(logits, **settings))


def test_rows_of_a_batch_draw_from_the_model_and_independently():
    """Pairs of tokens, from 2000 rows with neighbouring seeds: the product of the model's own probabilities."""
    model, rows = random_model(vocab_size=4, seed=5), 2000
    steps = list(stream_tokens(model, [[1, 3]] * rows, max_new_tokens=2, sampling=Sampling(temperature=2.0, seed=0)))
    expected, counts = [], []
    with torch.no_grad():
        first = (model(torch.tensor([[1, 3]]))[0, -1] / 2).softmax(-1)
        for i, j in itertools.product(range(4), range(4)):
            second = (model(torch.tensor([[1, 3, i]]))[0, -1] / 2).softmax(-1)
            expected.append((first[i] * second[j]).item())
            counts.append(sum((a, b) == (i, j) for a, b in zip(*steps, strict=True)))
    assert_drawn_from(counts, expected)


# --- Seeds, batches, the cache


def test_the_same_seed_gives_the_same_text_and_another_gives_another():
    model, tokenizer = random_model(260), spelling()
    texts = [generate(model, tokenizer, "ab", max_new_tokens=20, seed=seed) for seed in (4, 4, 5)]
    assert texts[0] == texts[1] != texts[2]


def test_without_a_seed_pytorchs_own_decides():
    model, tokenizer = random_model(260), spelling()
    texts = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        texts.append([generate(model, tokenizer, "ab", max_new_tokens=20) for _ in range(2)])
    assert texts[0] == texts[1] and len({*texts[0], *texts[2]}) == 4


@pytest.mark.parametrize("settings", [{"temperature": 0}, {"temperature": 0.8, "seed": 6}, {"top_p": 0.7, "seed": 0}])
def test_a_prompt_in_a_batch_gives_what_it_gives_alone_with_the_seed_of_its_row(settings):
    model = random_model()
    prompts = [[5, 1, 30], [2], [7, 7, 7, 7, 7, 7, 7, 36], [0, 9]]
    sampling = Sampling(**settings)
    together = list(stream_tokens(model, prompts, max_new_tokens=15, sampling=sampling, stop_ids=[3, 12, 33]))
    for row, prompt in enumerate(prompts):
        alone = Sampling(**settings | {"seed": row + settings.get("seed", 0)})
        steps = stream_tokens(model, [prompt], max_new_tokens=15, sampling=alone, stop_ids=[3, 12, 33])
        assert column(together, row) == column(steps)
    assert len({len(column(together, row)) for row in range(4)}) > 1  # they end at different times


@PATHS
def test_with_and_without_the_cache_the_logits_are_equal_over_a_whole_generation(fast):
    model = random_model(fast=fast)
    lengths, new = (3, 9, 1), 25
    generator = torch.Generator().manual_seed(2)
    rows = [torch.randint(37, (length + new,), generator=generator) for length in lengths]
    padding = torch.tensor([max(lengths) - length for length in lengths])
    cache = KVCache(model.config, 3, max(lengths) + new, padding=padding)
    with torch.no_grad():
        whole = [model(row[None])[0] for row in rows]
    tokens = torch.stack([torch.cat([row.new_zeros(pads), row[:length]]) for row, pads, length in zip(
        rows, padding, lengths, strict=True)])  # fmt: skip
    for step in range(new):
        expected = torch.stack([logits[length + step - 1] for logits, length in zip(whole, lengths, strict=True)])
        difference = (next_logits(model, tokens, cache) - expected).abs().max() / expected.abs().max()
        assert difference <= 1e-5
        tokens = torch.stack([row[length + step] for row, length in zip(rows, lengths, strict=True)])[:, None]


def test_only_new_tokens_go_through_the_model(monkeypatch):
    model, seen = random_model(), []
    hidden = Llama.hidden
    monkeypatch.setattr(Llama, "hidden", lambda self, x, cache: seen.append(tuple(x.shape)) or hidden(self, x, cache))
    list(stream_tokens(model, [[1, 2, 3], [4]], max_new_tokens=4, sampling=GREEDY))
    assert seen == [(2, 3), (2, 1), (2, 1), (2, 1)]


# --- When it ends


def test_a_row_ends_with_its_stop_token_and_the_others_go_on():
    a, b = [65, 66, 256, 67, 68], [70, 71, 72, 73, 259]
    steps = list(stream_tokens(Parrot(a, b), [[1], [2, 3]], max_new_tokens=9, sampling=GREEDY, stop_ids={256, 259}))
    assert steps == [[65, 70], [66, 71], [256, 72], [None, 73], [None, 259]]


def test_no_stop_token_shows_in_the_text():
    assert say("so") == "so"
    tokenizer = spelling()
    model = Parrot([*tokenizer.encode("hi"), 259, *tokenizer.encode("there")])  # <|im_end|> ends a turn
    assert generate(model, tokenizer, "x", temperature=0, max_new_tokens=9) == "xhi"


def test_it_ends_after_max_new_tokens():
    assert say("hello", max_new_tokens=3) == "hel"


def test_each_row_ends_where_the_context_is_full():
    model = random_model()  # a context of 64
    prompts = [[1] * 60, [2] * 10, [3] * 63]
    steps = list(stream_tokens(model, prompts, max_new_tokens=30, sampling=GREEDY))
    assert [len(column(steps, row)) for row in range(3)] == [4, 30, 1]
    [beam] = beam_search(model, [1] * 60, beams=2, max_new_tokens=30)
    assert len(beam.ids) == 4


@pytest.mark.parametrize("stop, expected", [
    ("world", "hello "), (["lo w", "zzz"], "hel"), ("!", "hello world"), ("hello", ""), ("d!?", "hello world!"),
    (["o w", "ello"], "h"), ("\n\n", "hello world!"),
])  # fmt: skip
def test_the_text_ends_before_a_stop_string_wherever_pieces_are_cut(stop, expected):
    assert say("hello world!", stop=stop) == expected
    assert "".join(say("hello world!", stop=stop, stream=True)) == expected


@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3))
def test_no_part_of_a_stop_string_is_ever_shown(text, stops):
    first_ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    said = text[: min(first_ends)] if first_ends else text  # a letter a token: it ends with the first complete one
    expected = said[: min(said.find(stop) for stop in stops if stop in said)] if first_ends else text
    shown = ""
    for piece in say(text, stop=stops, stream=True):
        shown += piece
        assert expected.startswith(shown)
    assert shown == expected


def test_no_step_is_computed_after_the_last_row_has_met_its_stop_string():
    tokenizer = spelling()
    model = Parrot(tokenizer.encode("one. two. three."), tokenizer.encode("sixteen. two."))
    assert generate(model, tokenizer, [[257], [257]], temperature=0, stop=".") == ["one", "sixteen"]
    assert model.calls == len("sixteen.")


# --- Text


def test_a_text_comes_back_whole_and_ids_bring_only_what_is_new():
    tokenizer = spelling()
    settings = {"temperature": 0, "max_new_tokens": 2}
    assert generate(Parrot([65, 66]), tokenizer, "xy", **settings) == "xyAB"
    assert generate(Parrot([65, 66]), tokenizer, [120, 121], **settings) == "AB"
    assert generate(Parrot([65, 66]), tokenizer, ["xy"], **settings) == ["xyAB"]
    assert generate(Parrot([65, 66], [67, 68]), tokenizer, ["xy", [120]], **settings) == ["xyAB", "CD"]
    assert list(generate(Parrot([65, 66]), tokenizer, "xy", stream=True, **settings)) == ["A", "B"]
    chat = tokenizer.chat([{"role": "user", "content": "hi"}])
    assert generate(Parrot([65, 66]), tokenizer, chat, **settings) == "AB"


class Prompts(Parrot):
    def hidden(self, tokens: torch.Tensor, cache: KVCache) -> torch.Tensor:
        if not self.calls:
            self.prompts = tokens.tolist()
        return super().hidden(tokens, cache)


def test_bos_begins_a_prompt_where_the_tokenizer_says_so_and_always_an_empty_one():
    cat = words().encode("the cat")
    for tokenizer, prompt, expected in (
        (words(), "the cat", [1, *cat]), (words(), "", [1]), (words(), cat, cat),
        (spelling(), "ab", [97, 98]), (spelling(), "", [257]),
    ):  # fmt: skip
        model = Prompts([65])
        generate(model, tokenizer, prompt, temperature=0, max_new_tokens=1)
        assert model.prompts == [expected]


def test_a_space_before_the_first_word_belongs_to_the_text_only_after_a_prompt():
    the, dog = words().encode("the dog")
    settings = {"temperature": 0, "max_new_tokens": 2}
    assert words().piece(dog) == "▁dog"
    assert generate(Parrot([the, dog]), words(), "", **settings) == "the dog"
    assert generate(Parrot([the, dog]), words(), [1], **settings) == "the dog"
    assert generate(Parrot([the, dog]), words(), "a cat and", **settings) == "a cat and the dog"
    assert "".join(generate(Parrot([the, dog]), words(), "a cat and", stream=True, **settings)) == " the dog"


def test_no_piece_of_a_stream_splits_a_character():
    text = "año 你好 👩‍🚀!"
    pieces = list(say(text, stream=True))
    assert "".join(pieces) == say(text) == text
    assert pieces == list(text)  # each as soon as its last byte is there
    assert list(say("你", max_new_tokens=2, stream=True)) == ["\ufffd"]  # ended in the middle


@pytest.mark.parametrize("settings", [{"temperature": 0}, {"seed": 3}, {"seed": 3, "stop": ["e", "th"]}])
def test_a_stream_is_what_comes_without_one(settings):
    for tokenizer in (words(), spelling()):
        model = random_model(tokenizer.vocab_size, seed=1)
        settings = {**settings, "max_new_tokens": 30}
        streamed = "".join(generate(model, tokenizer, "the cat", stream=True, **settings))
        assert "the cat" + streamed == generate(model, tokenizer, "the cat", **settings)


def test_a_stream_comes_piece_by_piece():
    model = Parrot(list(b"abcdef"))
    pieces = generate(model, spelling(), "x", temperature=0, stream=True)
    assert [next(pieces), next(pieces), model.calls] == ["a", "b", 2]


# --- Beams


# Guessing from the text so far


@pytest.mark.parametrize(
    "text, count, expected",
    [
        ([1, 2, 3, 9, 8, 7, 1, 2, 3], 2, [9, 8]),
        ([1, 2, 3, 9, 1, 2, 3, 5, 1, 2, 3], 2, [5, 1]),  # the latest place counts
        ([6, 2, 3, 9, 8, 1, 2, 3], 4, [9, 8, 1, 2]),  # its last three are new, its last two are not
        ([1, 2, 3, 9, 6, 2, 3, 5, 1, 2, 3], 1, [9]),  # three count before two, though these are later
        ([4, 4, 4, 4], 5, [4]),  # what follows is the text's own end
        ([3, 9, 1, 3], 4, []),  # one is too few
        ([1, 2], 4, []), ([1], 4, []), ([7, 8, 9, 7, 8, 9], 0, []),
    ],
)  # fmt: skip
def test_a_guess_is_what_followed_the_last_time(text, count, expected):
    assert guess(torch.tensor(text), count).tolist() == expected


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(0, 9))
def test_a_guess_is_what_a_search_from_the_end_finds(text, count):
    def search() -> list[int]:
        for n in (3, 2):
            for start in range(len(text) - n - 1, -1, -1):
                if text[start : start + n] == text[-n:]:
                    return text[start + n : start + n + count]
        return []

    assert guess(torch.tensor(text), count).tolist() == search()


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=0.3, seed=5), Sampling(temperature=1.0, seed=0)])
@pytest.mark.parametrize("lookup", [1, 3, 7, 50])
def test_guesses_do_not_change_the_text(sampling, lookup):
    """Greedy or drawn with a seed: every token is the one that is chosen without guesses."""
    guessed = 0
    for seed in range(3):
        model, prompt = random_model(vocab_size=5, seed=seed), [1, 2, 3, 0, 1, 2, 3, 0, 1]
        settings = {"max_new_tokens": 45, "sampling": sampling}
        expected = [token for (token,) in stream_tokens(model, [prompt], **settings)]
        assert list(stream_lookup(model, prompt, lookup=lookup, **settings)) == expected
        stop = expected[11]
        ended = list(stream_lookup(model, prompt, lookup=lookup, stop_ids=[stop], **settings))
        assert ended == expected[: expected.index(stop) + 1]
        guessed += len(guess(torch.tensor(prompt + expected), lookup))
    assert guessed, "nothing was guessed, so nothing was tested"


@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="there is no C++ compiler")
def test_a_compiled_model_writes_the_same():
    model, prompts, settings = random_model(vocab_size=260), ["ab", "a longer one"], {"max_new_tokens": 20, "seed": 4}
    expected = generate(model, spelling(), prompts, **settings)
    assert generate(model, spelling(), prompts, **settings, compile=True) == expected


@pytest.mark.filterwarnings("ignore")
def test_where_nothing_can_be_compiled_it_is_said(monkeypatch):
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("no-such-compiler",))
    torch.compiler.reset()
    with torch._inductor.config.patch(force_disable_caches=True), pytest.raises(ValueError, match="leave compile out"):
        generate(random_model(260, seed=1), spelling(), "ab", max_new_tokens=3, compile=True)
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    torch.compiler.reset()


class Counter(Parrot):
    """After each token it says the next of 0, 1, 2, 3, 0, …"""

    def hidden(self, tokens: torch.Tensor, cache: KVCache) -> torch.Tensor:
        self.scripts += (tokens.shape[1],)
        return super().hidden(tokens, cache)

    def scores(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.one_hot((x[..., 0] + 1) % 4, 300) * 50.0


def test_guesses_that_come_true_save_passes_and_the_context_is_never_left():
    model = Counter(max_seq_len=64)
    tokens = list(stream_lookup(model, [0, 1, 2, 3] * 5, lookup=3, max_new_tokens=99, sampling=GREEDY))
    assert tokens == [0, 1, 2, 3] * 11  # 64 with the prompt
    assert model.scripts == (20 + 3, *[4] * 10)  # the last token and three guesses: four tokens a pass


@pytest.mark.parametrize("prompt", ["ab ab ab", ["ab ab ab", "xyz xyz xy"]])
def test_generate_guesses_for_every_prompt_with_the_seed_of_its_row(prompt):
    settings = {"max_new_tokens": 20, "temperature": 0.5, "seed": 4}
    model = random_model(vocab_size=260)
    expected = generate(model, spelling(), prompt, **settings)
    assert generate(model, spelling(), prompt, **settings, lookup=5) == expected
    if isinstance(prompt, str):
        assert prompt + "".join(generate(model, spelling(), prompt, **settings, lookup=5, stream=True)) == expected


def test_beams_as_wide_as_the_tree_find_the_likeliest_text():
    model = random_model(vocab_size=4, seed=2)
    prompt, total = [3, 0], {}
    with torch.no_grad():
        for ids in itertools.product(range(4), repeat=3):
            scores = model(torch.tensor([[*prompt, *ids]]))[0].log_softmax(-1)
            total[ids] = sum(scores[1 + i, token].item() for i, token in enumerate(ids)) / 3
    best = sorted(total, key=total.__getitem__, reverse=True)[:5]
    found = beam_search(model, prompt, beams=64, max_new_tokens=3, n_best=5)
    assert [tuple(beam.ids) for beam in found] == best
    assert [beam.score for beam in found] == pytest.approx([total[ids] for ids in best], rel=1e-4)


def test_one_beam_is_greedy():
    model = random_model()
    [beam] = beam_search(model, [4, 2], beams=1, max_new_tokens=20)
    assert beam.ids == column(stream_tokens(model, [[4, 2]], max_new_tokens=20, sampling=GREEDY))


def test_length_penalty_moves_the_choice_from_short_to_long():
    lengths = [
        len(beam_search(random_model(), [4, 2], beams=4, max_new_tokens=12, stop_ids=range(0, 37, 3),
                        length_penalty=penalty)[0].ids)
        for penalty in (-2, 0, 3)
    ]  # fmt: skip
    assert lengths == sorted(lengths) and lengths[0] < lengths[-1]


def test_generate_returns_the_best_beam_or_the_n_best():
    tokenizer, model = words(), random_model(300)
    found = beam_search(
        model, [1, *tokenizer.encode("the cat")], beams=3, n_best=2, max_new_tokens=6, stop_ids=tokenizer.stop_ids
    )
    texts = ["the cat" + tokenizer.decode(beam.ids, start=False) for beam in found]
    settings = {"beams": 3, "max_new_tokens": 6}
    assert generate(model, tokenizer, "the cat", **settings) == texts[0]
    assert generate(model, tokenizer, "the cat", n_best=2, **settings) == texts
    assert generate(model, tokenizer, ["the cat", "a dog"], n_best=2, **settings)[0] == texts
    cut = generate(model, tokenizer, "the cat", stop=texts[0][9:11], **settings)
    assert cut == "the cat" + texts[0][7:].split(texts[0][9:11])[0]


# --- Around it


@pytest.mark.parametrize("training", [True, False])
def test_the_model_and_the_mode_around_are_left_as_they_were(training):
    model = random_model(260).train(training)
    pieces = generate(model, spelling(), "ab", max_new_tokens=9, stream=True, seed=0)
    for _ in pieces:
        assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()
    assert model.training == training
    assert not any(weight.grad_fn or weight.is_inference() for weight in model.parameters())
    model.eval()


def test_a_stream_that_is_interrupted_or_closed_leaves_nothing_behind():
    class Interrupted(Parrot):
        def hidden(self, tokens, cache):
            if self.calls == 2:
                raise KeyboardInterrupt
            return super().hidden(tokens, cache)

    pieces = generate(Interrupted(list(b"abcdef")), spelling(), "x", temperature=0, stream=True)
    assert [next(pieces), next(pieces)] == ["a", "b"]
    with pytest.raises(KeyboardInterrupt):
        next(pieces)
    assert not torch.is_inference_mode_enabled() and next(pieces, None) is None

    model = Parrot(list(b"abcdef"))
    pieces = generate(model, spelling(), "x", temperature=0, stream=True)
    next(pieces)
    pieces.close()
    assert next(pieces, None) is None and model.calls == 1 and not torch.is_inference_mode_enabled()


def test_the_cache_has_the_models_dtype_and_no_more_room_than_needed(monkeypatch):
    made = []

    class Spy(KVCache):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append((self.layers[0].k.dtype, self.layers[0].k.shape))

    monkeypatch.setattr(minillama.generation, "KVCache", Spy)
    model = Llama(random_model().config).to(torch.bfloat16)
    list(stream_tokens(model, [[1, 2, 3], [4]], max_new_tokens=4, sampling=GREEDY))
    beam_search(model, [1, 2, 3], beams=2, max_new_tokens=4)
    assert made == [(torch.bfloat16, (2, 2, 7, 10)), (torch.bfloat16, (1, 2, 7, 10))]


def test_scores_and_probabilities_are_computed_on_the_models_device():
    device = "lazy"  # a device that this machine cannot really have
    with FakeTensorMode():
        with torch.device(device):
            model = Llama(random_model().config)
            tokens = torch.zeros(2, 7, dtype=torch.long)
        cache = KVCache(model.config, 2, 16, device=device)
        sampling = Sampling(temperature=0.8, top_k=5, top_p=0.9, min_p=0.05)
        for step in (6, 1):
            probabilities = sampling.probabilities(next_logits(model, tokens[:, :step], cache))
            assert str(probabilities.device) == device and probabilities.shape == (2, 37)


# --- Bad input

BAD = [
    ({"temperature": -0.5}, r"temperature is -0.5"), ({"temperature": math.nan}, "temperature is nan"),
    ({"temperature": math.inf}, "temperature is inf"), ({"top_k": 0}, "top_k is 0"), ({"top_k": 2.5}, "top_k is 2.5"),
    ({"top_p": 0}, "top_p is 0,"), ({"top_p": 1.01}, "top_p is 1.01"), ({"top_p": math.nan}, "top_p is nan"),
    ({"min_p": -0.1}, "min_p is -0.1"), ({"min_p": 2}, "min_p is 2"), ({"seed": -1}, "seed is -1"),
    ({"seed": 2**64}, "seed is 18446744073709551616"), ({"seed": 0.5}, "seed is 0.5"),
    ({"max_new_tokens": 0}, "max_new_tokens is 0"), ({"max_new_tokens": 2.0}, "max_new_tokens is 2.0"),
    ({"stop": ""}, "stop is ''"), ({"stop": ["a", ""]}, r"stop is \['a', ''\]"), ({"stop": [7]}, r"stop is \[7\]"),
    ({"beams": 0}, "beams is 0"), ({"beams": 2, "n_best": 3}, "n_best is 3.* to beams, 2"),
    ({"n_best": 2}, "n_best is 2"),
    ({"beams": 2, "n_best": 0}, "n_best is 0"), ({"beams": 2, "length_penalty": math.nan}, "length_penalty is nan"),
    ({"beams": 2, "temperature": 0.7}, r"sampling is Sampling\(temperature=0.7.*left out for beams"),
    ({"beams": 2, "top_k": 3}, r"sampling is .*top_k=3.*left out for beams"),
    ({"beams": 2, "stream": True}, "stream is True.*beams"), ({"beams": 2, "lookup": 3}, "lookup is 3, expected 0 for"),
    ({"lookup": -1}, "lookup is -1, expected a whole number from 0"), ({"lookup": 1.5}, "lookup is 1.5"),
    ({"lookup": 3, "compile": True}, "lookup is 3, expected 0 where the model is compiled"),
    ({"beams": 2, "compile": True}, "compile is True, expected False for beams"),
]  # fmt: skip


@pytest.mark.parametrize("settings, message", BAD, ids=[str(settings) for settings, _ in BAD])
def test_a_bad_setting_is_refused_before_anything_is_computed(settings, message):
    model = Parrot([65])
    with pytest.raises(ValueError, match=message):
        generate(model, spelling(), "ab", **settings)
    assert model.calls == 0


@pytest.mark.parametrize("prompt, message", [
    ([], r"prompt is \[\], expected a text"), ([[]], r"prompt is \[\], expected at least one token"),
    ([300], "token id of the prompt is 300, expected .*299"), ([5, -1], "token id of the prompt is -1"),
    ([["a"]], "token id of the prompt is 'a'"), (["ab", [1, 300]], "is 300"), (None, "prompt is None"),
    (["a", None], "prompt is None, expected a text or a list of token ids"),
    ("a" * 64, "the prompt has 64 tokens, but the model's context is 64"), (["a", "b" * 99], "has 99 tokens.*is 64"),
    (torch.ones(3, dtype=torch.long), r"prompt is tensor\(\[1, 1, 1\]\), expected a text, token ids"),
])  # fmt: skip
@pytest.mark.parametrize("settings", [{}, {"beams": 2}, {"stream": True}], ids=["drawn", "beams", "stream"])
def test_a_bad_prompt_is_refused_before_anything_is_computed(prompt, message, settings):
    model = Parrot([65], max_seq_len=64)
    with pytest.raises(ValueError, match=message):
        generate(model, spelling(), prompt, **settings)
    assert model.calls == 0


def test_several_prompts_cannot_be_streamed():
    with pytest.raises(ValueError, match="stream is True, expected False for several prompts"):
        generate(Parrot([65]), spelling(), ["a"], stream=True)


def test_an_empty_prompt_needs_a_bos_token_and_text_needs_a_tokenizer():
    tokenizer = bpe(["a", "b"], ["<|eos|>"], bos=False)
    with pytest.raises(ValueError, match="the prompt is empty, and this tokenizer has no BOS token"):
        generate(random_model(), tokenizer, "")
    with pytest.raises(ValueError, match="tokenizer is None"):
        generate(random_model(), None, "a")


@pytest.mark.parametrize("settings", [{"temperature": 0}, {"temperature": 1.0}, {"beams": 2}], ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
def test_scores_that_are_not_finite_are_an_error_that_says_so(settings, value):
    model = Llama(random_model().config)
    model.norm.weight.data.fill_(value)
    with pytest.raises(ValueError, match="the model's scores are not finite .*(nan|inf)"):
        generate(model, spelling(), [1, 2], **settings)


def test_a_token_that_is_ruled_out_is_no_error():
    logits = torch.tensor([[0.0, -torch.inf, 1.0]]).expand(50, -1)
    drawn = sample_next(logits, Sampling(), Sampling(seed=0).generators(50, torch.device("cpu")))
    assert set(drawn.tolist()) == {0, 2}


def test_random_settings_never_break_it():
    rng = random.Random(0)
    tokenizer, model = spelling(), random_model(260)
    for _ in range(30):
        text = generate(
            model, tokenizer, "ab"[: rng.randint(0, 2)], max_new_tokens=rng.randint(1, 70), seed=rng.randint(0, 99),
            temperature=rng.choice([0, 1e-9, 0.5, 1, 100]), top_k=rng.choice([None, 1, 50, 1000]),
            top_p=rng.choice([1e-9, 0.5, 1]), min_p=rng.choice([0, 1e-9, 0.5, 1]),
            stop=rng.choice([(), "a", ["b", "cc"]]),
        )  # fmt: skip
        assert isinstance(text, str)
