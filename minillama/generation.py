"""Generation (chapter 10): from scores to text, one token at a time.

A model says how likely every token is to come next. What is left is to choose one, append it, and ask again. Top to
bottom: ways to narrow the choice (filters), one choice (`Sampling`), a loop of choices (`stream_tokens`), a search for
a likely whole (`beam_search`), and on top of them `generate`, from text to text.

Letters: B batch (prompts, or beams), T tokens in a prompt, V vocabulary.
"""

import functools
import itertools
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minillama.cache import KVCache, StaticCache
from minillama.model import Llama
from minillama.tokenizer import Tokenizer


def top_k_filter(logits: Tensor, k: int) -> Tensor:
    """Keep the k highest logits of every row (B, V), and what ties with the k-th; the others become -inf.

    Source: Fan et al. 2018, "Hierarchical Neural Story Generation".
    """
    kth = logits.topk(min(k, logits.shape[-1])).values[:, -1:]
    return logits.masked_fill(logits < kth, -torch.inf)


def top_p_filter(logits: Tensor, p: float) -> Tensor:
    """Keep the likeliest tokens of every row (B, V) until together they have probability p; the others become -inf.

    The token that crosses p is kept, so one always is. Of equal tokens, those with lower ids go first.
    Source: Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration", section 3.1 (nucleus sampling).
    """
    ordered, ids = logits.sort(descending=True, stable=True)
    probabilities = ordered.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities  # of all likelier tokens together
    drop = before >= p
    return logits.masked_fill(drop.scatter(-1, ids, drop), -torch.inf)  # back in the order of the vocabulary


def min_p_filter(logits: Tensor, p: float) -> Tensor:
    """Keep the tokens of every row (B, V) with at least p times the probability of the likeliest; p > 0.

    Source: Nguyen et al. 2024, "Turning Up the Heat: Min-p Sampling", section 3.
    """
    return logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(p), -torch.inf)


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen: by chance, from scores that a temperature and three filters have shaped.

    temperature: scores are divided by it. Below 1 the likely tokens gain, above 1 the unlikely; 0 always takes the
    likeliest (greedy). The filters follow in this order; by default they keep everything.
    seed: the same seed draws the same tokens; None takes a new one from PyTorch's own generator.
    Raises ValueError for a value out of range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, 0 <= self.temperature < math.inf, "a number from 0")  # nan is neither
        _check("top_k", self.top_k, self.top_k is None or _is_count(self.top_k), "a whole number from 1")
        _check("top_p", self.top_p, 0 < self.top_p <= 1, "a number above 0 and at most 1")
        _check("min_p", self.min_p, 0 <= self.min_p <= 1, "a number from 0 to 1")
        fits = self.seed is None or isinstance(self.seed, int) and 0 <= self.seed < 2**63
        _check("seed", self.seed, fits, "a whole number from 0 to 2**63 - 1")

    def generators(self, rows: int, device: torch.device) -> list[torch.Generator]:
        """A source of chance for every row; row i has the seed of row 0, plus i."""
        seed = int(torch.randint(2**62, ())) if self.seed is None else self.seed
        return [torch.Generator(device).manual_seed(seed + row) for row in range(rows)]

    def probabilities(self, logits: Tensor) -> Tensor:
        """Logits (B, V) to the probabilities (B, V) with which each token is drawn, for a temperature above 0."""
        logits = (logits - logits.amax(-1, keepdim=True)) / max(self.temperature, 1e-30)  # the best is 0: no overflow
        if self.top_k is not None:
            logits = top_k_filter(logits, self.top_k)
        if self.top_p < 1:
            logits = top_p_filter(logits, self.top_p)
        if self.min_p > 0:
            logits = min_p_filter(logits, self.min_p)
        return logits.softmax(-1)


def sample_next(logits: Tensor, sampling: Sampling, generators: Sequence[torch.Generator]) -> Tensor:
    """Choose one token for every row: logits (B, V) to (B,). Rows draw from their own generators, so a row does not
    depend on its neighbours. Raises ValueError for logits that are not finite."""
    _check_finite(logits)
    if sampling.temperature == 0:
        return logits.argmax(-1)
    rows = zip(sampling.probabilities(logits), generators, strict=True)
    return torch.cat([torch.multinomial(row, 1, generator=generator) for row, generator in rows])


@torch.inference_mode()
def next_logits(model: Llama, tokens: Tensor, cache: KVCache) -> Tensor:
    """Scores (B, V), in fp32, of what may follow the last of `tokens` (B, T), which follow those in the cache."""
    return model.scores(model.hidden(tokens, cache)[:, -1]).float()


@functools.cache
def compiled_step(device: str, int8: bool = False) -> Callable[[Llama, Tensor, KVCache], Tensor]:
    """`next_logits` for a `StaticCache`, as one program instead of a thousand calls. It is made when it is first called
    with a model, a number of rows and a room of the cache. On a GPU it is also recorded, and a step is a single call;
    there a model in `int8` is compiled for longer, so that its codes become floats inside the products.

    Raises ValueError, when it is called, where there is no compiler.
    """
    torch._dynamo.config.recompile_limit = 64  # one for each of these, of all models
    recorded: dict[str, Any] = {"triton.cudagraphs": True, "coordinate_descent_tuning": int8}
    plain = torch.no_grad()(next_logits.__wrapped__)  # type: ignore[attr-defined]  # it stumbles over inference mode
    step = torch.compile(plain, fullgraph=True, dynamic=False, options=recorded if device == "cuda" else None)

    def checked(model: Llama, tokens: Tensor, cache: KVCache) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()  # what the step before gave may be written over
        try:
            return step(model, tokens, cache)
        except torch._inductor.exc.InductorError as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"the model cannot be compiled here ({reason:.200}): leave compile out.") from None

    return checked


def stream_tokens(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    stop_ids: Collection[int] = (),
    compile: bool = False,
) -> Iterator[list[int | None]]:
    """Continue several prompts, given as token ids, at once. Each step yields one new token for every prompt.

    A row ends with one of `stop_ids` (which is yielded), after `max_new_tokens`, or when the model's context is full;
    from then on it yields None, until all rows have ended. Row i draws with the seed plus i, so it says what its prompt
    says alone with that seed (up to rounding: a batch is summed in another order).
    compile: turn the step into one program first, which takes half a minute and a C++ compiler; see `compiled_step`.
    Raises ValueError for a prompt that is empty, unknown to the vocabulary or too long.
    """
    _check_prompts(model, prompts, max_new_tokens)
    longest = max(map(len, prompts))
    left = [min(max_new_tokens, model.config.max_seq_len - len(prompt)) for prompt in prompts]  # tokens to come
    padding = torch.tensor([longest - len(prompt) for prompt in prompts])
    cache = _new_cache(model, longest + max(left), padding, static=compile)
    generators = sampling.generators(len(prompts), cache.device)
    tokens = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=cache.device)
    int8 = any(buffer.dtype == torch.int8 for buffer in model.buffers())
    step_logits = compiled_step(cache.device.type, int8) if compile else next_logits
    logits = next_logits(model, tokens, cache)
    while any(left):
        chosen = sample_next(logits, sampling, generators)
        tokens = chosen[:, None]  # the cache has seen the prompts: from now on, only what is new goes in
        step = [token if n else None for token, n in zip(chosen.tolist(), left, strict=True)]
        left = [0 if token is None or token in stop_ids else n - 1 for token, n in zip(step, left, strict=True)]
        yield step
        if any(left):
            logits = step_logits(model, tokens, cache)


def guess(ids: Tensor, count: int) -> Tensor:
    """What may come next in a text (S,) that repeats itself: the `count` tokens, or fewer, that followed when its last
    three were there before, else its last two; none if they never were. The latest such place counts."""
    for n in (3, 2):
        if len(ids) > n:
            places = (ids.unfold(0, n, 1)[:-1] == ids[-n:]).all(1).nonzero()
            if len(places):
                return ids[int(places[-1]) + n :][:count]
    return ids[:0]


def stream_lookup(
    model: Llama,
    prompt: Sequence[int],
    *,
    lookup: int,
    max_new_tokens: int,
    sampling: Sampling,
    stop_ids: Collection[int] = (),
) -> Iterator[int]:
    """The tokens that `stream_tokens` would write for one prompt, sooner where the text repeats itself.

    Up to `lookup` tokens are guessed from the text. The model sees them in one pass with the last token, so each weight
    is read once for all. After each a token is chosen as always; when it is not the one guessed, the guesses behind it
    are forgotten. So every token is drawn from the model's own probabilities, whatever was guessed (up to rounding:
    several tokens at once are summed in another order).
    Source: Leviathan et al. 2023, "Fast Inference from Transformers via Speculative Decoding", algorithm 1, where q is
    certain of its guess; guesses from the prompt: Saxena 2023, "Prompt Lookup Decoding".
    Raises ValueError as `stream_tokens` does.
    """
    _check_prompts(model, [prompt], max_new_tokens)
    _check("lookup", lookup, _is_count(lookup), "a whole number from 1")
    left = min(max_new_tokens, model.config.max_seq_len - len(prompt))
    cache = _new_cache(model, len(prompt) + left, torch.zeros(1, dtype=torch.int64))
    generators = sampling.generators(1, cache.device)
    text = torch.tensor(list(prompt))
    new = text  # not yet in the cache
    while left:
        guesses = guess(text, min(lookup, left - 1))
        logits = _logits_behind(model, torch.cat([new, guesses])[None].to(cache.device), cache, len(guesses) + 1)
        for i in range(len(logits)):
            token = int(sample_next(logits[i : i + 1], sampling, generators))
            text, left = torch.cat([text, torch.tensor([token])]), left - 1
            yield token
            if token in stop_ids:
                return
            if i == len(guesses) or token != guesses[i]:
                break
        cache.rewind(len(text) - 1)
        new = text[-1:]


@torch.inference_mode()
def _logits_behind(model: Llama, tokens: Tensor, cache: KVCache, count: int) -> Tensor:
    """Scores (count, V), in fp32, of what may follow each of the last `count` of `tokens` (1, T)."""
    return model.scores(model.hidden(tokens, cache)[0, -count:]).float()


class Beam(NamedTuple):
    """A continuation that `beam_search` found. score: log-probability / length**length_penalty."""

    score: float
    ids: list[int]


def beam_search(
    model: Llama,
    ids: Sequence[int],
    *,
    beams: int,
    max_new_tokens: int,
    length_penalty: float = 1.0,
    n_best: int = 1,
    stop_ids: Collection[int] = (),
) -> list[Beam]:
    """Look for the likeliest continuations of one prompt: at every step, keep the `beams` likeliest so far.

    A continuation is finished by one of `stop_ids` (its last token) or after `max_new_tokens`; those with the best
    `n_best` scores are returned, best first. A long text is less probable than a short one: a larger `length_penalty`
    (say 2; 0 is none) prefers longer ones. The search ends when the best open beam, as it stands, scores no better than
    the worst of `beams` finished ones: the rule of `transformers` with `early_stopping=False`.
    Source: Wu et al. 2016, "Google's Neural Machine Translation System", section 7, with a simpler penalty.
    Raises ValueError as `stream_tokens` does, and for n_best > beams.
    """
    _check_prompts(model, [ids], max_new_tokens)
    _check("beams", beams, _is_count(beams), "a whole number from 1")
    _check("n_best", n_best, _is_count(n_best) and n_best <= beams, f"a whole number from 1 to beams, {beams}")
    _check("length_penalty", length_penalty, -10 <= length_penalty <= 10, "a number from -10 to 10")
    limit = min(max_new_tokens, model.config.max_seq_len - len(ids))
    cache = _new_cache(model, len(ids) + limit, torch.zeros(1, dtype=torch.int64))
    logits = next_logits(model, torch.tensor([list(ids)], device=cache.device), cache)
    totals = torch.zeros(1, device=cache.device)  # log-probability of each open beam
    texts: list[list[int]] = [[]]  # and its tokens
    finished: list[Beam] = []
    for length in range(1, limit + 1):
        _check_finite(logits)
        scores = totals[:, None] + logits.log_softmax(-1)  # (B, V)
        # Each beam has len(stop_ids) ways to end, so among this many candidates at least `beams` go on.
        best, places = scores.flatten().topk(min(max(2, 1 + len(stop_ids)) * beams, scores.numel()))
        rows, tokens = places // scores.shape[1], places % scores.shape[1]
        candidates = [[*texts[row], token] for row, token in zip(rows.tolist(), tokens.tolist(), strict=True)]
        marks = (best / length**length_penalty).tolist()
        going = [i for i, text in enumerate(candidates) if text[-1] not in stop_ids and length < limit]
        # Only the first `beams` may finish: the others are there to go on in place of better ones that end.
        finished += [Beam(marks[i], text) for i, text in enumerate(candidates[:beams]) if i not in going]
        finished = sorted(finished, key=lambda beam: -beam.score)[:beams]
        if not going or len(finished) == beams and marks[going[0]] <= finished[-1].score:
            break
        going = going[:beams]
        totals, texts = best[going], [candidates[i] for i in going]
        cache.reorder(rows[going])
        logits = next_logits(model, tokens[going, None], cache)
    return finished[:n_best]


def generate(
    model: Llama,
    tokenizer: Tokenizer,
    prompt: Any,
    *,
    max_new_tokens: int = 128,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int | None = None,
    beams: int | None = None,
    length_penalty: float = 1.0,
    n_best: int = 1,
    lookup: int = 0,
    compile: bool = False,
    stop: str | Sequence[str] = (),
    stream: bool = False,
) -> Any:
    """Continue a prompt: `print(generate(model, tokenizer, "Once upon a time"))`.

    prompt: a text ("" begins a new one), or token ids, as `tokenizer.chat` makes them; or a list of such prompts.
    Returns a str for a prompt, a list for a list. A text comes back with its continuation, so that it is whole; token
    ids bring only what is new. stream=True, for one prompt: an iterator over pieces of what is new.

    The text ends at one of `tokenizer.stop_ids`, before any of the `stop` strings, after `max_new_tokens`, or when the
    model's context is full. temperature (0 is greedy), top_k, top_p, min_p, seed: see `Sampling`. Prompt i of a list
    draws with the seed plus i.
    lookup: guess so many tokens at a time from the text so far (`stream_lookup`): the same text, sooner if it repeats
    itself, as summaries and edits do. Prompts of a list are then written one after the other.
    compile: write with a compiled model (`stream_tokens`): worth half a minute for long texts, or many.
    beams: search for the likeliest text instead of drawing one (`beam_search`); n_best above 1: a list for each prompt.
    Raises ValueError for a bad value, and for a prompt that is empty, unknown to the vocabulary or too long.
    """
    _check("tokenizer", tokenizer, tokenizer is not None, "one; without it, use stream_tokens, which needs none")
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
    stops = [stop] if isinstance(stop, str) else list(stop)
    _check("stop", stop, all(isinstance(text, str) and text for text in stops), "texts that are not empty")
    _check("lookup", lookup, isinstance(lookup, int) and lookup >= 0, "a whole number from 0")
    _check("prompt", prompt, isinstance(prompt, str) or isinstance(prompt, list | tuple) and prompt,
           "a text, token ids, or a list of at least one of these")  # fmt: skip
    several = not isinstance(prompt, str) and not isinstance(prompt[0], int)
    prompts = list(prompt) if several else [prompt]
    encoded = [_encode(tokenizer, one) for one in prompts]
    _check_prompts(model, encoded, max_new_tokens)

    def pieces(row: int, tokens: Iterable[int]) -> Iterator[str]:
        start = set(encoded[row]) <= {tokenizer.bos_id}  # a text's first word has no space before it
        return _until(tokenizer.decode_stream(tokens, start=start), stops)

    def whole(row: int, tokens: Iterable[int]) -> str:
        return (prompts[row] if isinstance(prompts[row], str) else "") + "".join(pieces(row, tokens))

    if beams is None:
        _check("n_best", n_best, n_best == 1, "1 where beams are not given")
        _check("stream", stream, not (stream and several), "False for several prompts")
        _check("lookup", lookup, lookup == 0 or not compile, "0 where the model is compiled")
        settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "stop_ids": tokenizer.stop_ids}
        if lookup:
            seeds = [None if seed is None else seed + row for row in range(len(prompts))]
            columns = [
                stream_lookup(model, ids, lookup=lookup, sampling=replace(sampling, seed=own), **settings)
                for ids, own in zip(encoded, seeds, strict=True)
            ]
        else:
            # Every row reads the same steps. The row that is ahead has them computed; for the others they are kept.
            steps = stream_tokens(model, encoded, sampling=sampling, compile=compile, **settings)
            columns = [_column(copy, row) for row, copy in enumerate(itertools.tee(steps, len(prompts)))]
        if stream:
            return pieces(0, columns[0])
        texts: list[Any] = [whole(row, column) for row, column in enumerate(columns)]
    else:
        _check("stream", stream, not stream, "False for beams, whose text is known only at the end")
        _check("lookup", lookup, lookup == 0, "0 for beams")
        _check("compile", compile, not compile, "False for beams")
        _check("sampling", sampling, sampling == Sampling(), "left out for beams, which draw nothing")
        texts = []
        for row, ids in enumerate(encoded):
            found = beam_search(
                model, ids, beams=beams, max_new_tokens=max_new_tokens, length_penalty=length_penalty, n_best=n_best,
                stop_ids=tokenizer.stop_ids,
            )  # fmt: skip
            best = [whole(row, beam.ids) for beam in found]
            texts.append(best if n_best > 1 else best[0])
    return texts if several else texts[0]


def _until(pieces: Iterable[str], stops: Sequence[str]) -> Iterator[str]:
    """The pieces of a text up to the first stop string; what may be the beginning of one is held back meanwhile."""
    text = ""
    for piece in pieces:
        text += piece
        if places := [text.index(stop) for stop in stops if stop in text]:
            text = text[: min(places)]
            break
        held = max((n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
        if ready := text[: len(text) - held]:
            yield ready
            text = text[len(ready) :]
    if text:
        yield text


def _column(steps: Iterable[list[int | None]], row: int) -> Iterator[int]:
    """The tokens of one row, until it has ended."""
    for step in steps:
        if (token := step[row]) is None:
            return
        yield token


def _new_cache(model: Llama, max_len: int, padding: Tensor, static: bool = False) -> KVCache:
    weight = model.norm.weight  # a float where other weights may be quantized
    settings: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype, "padding": padding}
    if not static:
        return KVCache(model.config, len(padding), max_len, **settings)
    room = max(128, 1 << (max_len - 1).bit_length())  # few sizes: for each, a step is compiled
    return StaticCache(model.config, len(padding), room, **settings)


def _encode(tokenizer: Tokenizer, prompt: Any) -> list[int]:
    if not isinstance(prompt, str):
        _check("prompt", prompt, isinstance(prompt, list | tuple), "a text or a list of token ids")
        return list(prompt)
    if not prompt and tokenizer.bos_id is None:
        raise ValueError("the prompt is empty, and this tokenizer has no BOS token to start it: give a word.")
    return tokenizer.encode(prompt, bos=tokenizer.add_bos or not prompt)


def _check_prompts(model: Llama, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    _check("max_new_tokens", max_new_tokens, _is_count(max_new_tokens), "a whole number from 1")
    _check("prompts", prompts, prompts, "at least one")
    vocab_size, context = model.config.vocab_size, model.config.max_seq_len
    for prompt in prompts:
        _check("prompt", prompt, prompt, "at least one token (BOS begins a text)")
        for token in prompt:
            known = isinstance(token, int) and 0 <= token < vocab_size
            _check("a token id of the prompt", token, known, f"0 to {vocab_size - 1}: the vocabulary of this model")
        if len(prompt) >= context:
            raise ValueError(
                f"the prompt has {len(prompt)} tokens, but the model's context is {context} and must hold "
                f"at least one more: shorten it to {context - 1}."
            )


def _check_finite(logits: Tensor) -> None:
    # The largest is enough: nan passes through a maximum, and -inf is a token ruled out.
    if not (highest := logits.amax(-1)).isfinite().all():
        raise ValueError(
            f"the model's scores are not finite (the highest: {highest.tolist()!r:.80}): its weights are damaged, or "
            "too large for its dtype; load it with dtype=torch.float32 to tell."
        )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and value >= 1


def _check(name: str, value: Any, fits: Any, expected: str) -> None:
    if not fits:
        raise ValueError(f"{name} is {value!r:.80}, expected {expected}.")
