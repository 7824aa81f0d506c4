"""Exercises of chapter 11, looking inside."""

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from minillama.checkpoint import load
from minillama.config import ModelConfig
from minillama.course.exercise import Exercise, Experiment, Task, Wrong
from minillama.data import story_validation
from minillama.model import Llama
from minillama.trainer import mean_loss
from minillama.visualize.anatomy import logits_of
from minillama.visualize.record import ablate, record

# Models cross process borders as data: their config and weights, and a list of calls. The notebook has the same. ------

Calls = list[tuple[Any, ...]]
Data = tuple[dict[str, Any], Tensor]  # a config, and all weights one behind the other


def _on_data(function: Callable[..., Any]) -> Callable[[dict[str, Any], Tensor, Calls], dict[str, Any]]:
    """What function(model, …) gives for each of the calls, and what it has left behind in the model.

    It is kept: each check compares with all known mistakes, and passes through a model take time.
    """
    known: dict[tuple[str, str, float], dict[str, Any]] = {}

    def call(config: dict[str, Any], weights: Tensor, calls: Calls) -> dict[str, Any]:
        plain = [[x.tolist() if isinstance(x, Tensor) else x for x in arguments] for arguments in calls]
        key = str(config), str(plain), weights.double().sum().item()
        if key not in known:
            known[key] = run(config, weights, calls)
        return known[key]

    @torch.no_grad()
    def run(config: dict[str, Any], weights: Tensor, calls: Calls) -> dict[str, Any]:
        model: Any = Llama(ModelConfig(**config)).requires_grad_(False).to(weights.dtype)
        vector_to_parameters(weights, model.parameters())
        last = model.blocks[-1].attention
        last.fast = False
        last.wo.register_forward_pre_hook(lambda *_: None)
        last.tap.register_forward_hook(lambda *_: None)
        found = []
        for arguments in calls:
            try:
                found.append(function(model, *arguments))
            except IndexError:
                if all(int(x.max()) < config["vocab_size"] for x in arguments if isinstance(x, Tensor)):
                    raise
                found.append("the model failed")
        hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
        return {"found": found, "hooks": hooks, "fast": [block.attention.fast for block in model.blocks]}

    return call


def _model(rng: torch.Generator, dim: int, layers: int, heads: int, kv_heads: int, head_dim: int,
           dtype: torch.dtype = torch.float32) -> Data:  # fmt: skip
    config = ModelConfig(
        dim=dim, n_layers=layers, n_heads=heads, n_kv_heads=kv_heads, head_dim=head_dim, ffn_dim=dim + 5,
        vocab_size=19, max_seq_len=32, tie_embeddings=False,
    )  # fmt: skip
    weights = [
        torch.rand(weight.shape, generator=rng) + 0.5 if weight.dim() == 1 else
        torch.randn(weight.shape, generator=rng) * (2 if "embedding" in name else 1.5 * weight.shape[1] ** -0.5)
        for name, weight in Llama(config).named_parameters()
    ]  # fmt: skip
    return config.to_dict(), parameters_to_vector(weights).to(dtype)


def _text(rng: torch.Generator, length: int) -> Tensor:
    return torch.randint(19, (length,), generator=rng)


def _broken(rng: torch.Generator, length: int) -> Tensor:
    """A text with a token that the model does not have."""
    text = _text(rng, length)
    text[-1] = 19
    return text


# 11.1 ----------------------------------------------------------------------------------------------------------------

Two = tuple[Tensor, Tensor]


def _record_cases(rng: torch.Generator) -> Iterable[tuple[Any, ...]]:
    yield *_model(rng, 12, 2, 6, 2, 4), [(_text(rng, 5),)]
    yield *_model(rng, 20, 4, 4, 2, 6), [(_text(rng, 7),), (_text(rng, 3),)]
    yield *_model(rng, 18, 2, 3, 1, 8), [(_text(rng, 4),), (_broken(rng, 4),), (_text(rng, 6),)]
    yield *_model(rng, 10, 1, 5, 5, 2), [(_broken(rng, 3),)]
    yield *_model(rng, 12, 3, 6, 3, 4, torch.bfloat16), [(_text(rng, 1),)]
    yield *_model(rng, 16, 2, 4, 4, 4), []


def _record_reference(model: Any, tokens: Tensor) -> Two:
    with record(model, "attention", "heads") as seen:
        model(tokens[None])
    return seen.attention[:, 0], seen.heads[:, 0].transpose(1, 2)


def _cut(x: Tensor, heads: int) -> Tensor:
    """(1, T, H·D) to (1, H, T, D)"""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _recorded(model: Any, tokens: Tensor, *, remove: str = "always", fast: str = "restored", key: str = "own",
              cut: Callable[[Tensor, int], Tensor] = _cut, after: bool = False,
              change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = lambda p, x: (p[:, 0], x[:, 0]),
              dtype: torch.dtype | None = torch.float32) -> Two:  # fmt: skip
    """A recorder by hand, and what can go wrong with it."""
    probabilities: dict[int, Tensor] = {}
    mixtures: dict[int, Tensor] = {}
    layers = [block.attention for block in model.blocks]
    n = len(layers)
    before = [layer.fast for layer in layers]
    handles = []
    for i, layer in enumerate(layers):
        layer.fast = before[i] if fast == "never off" else False
        at = {"own": i, "last": n - 1, "reversed": n - 1 - i}[key]
        handles.append(layer.tap.register_forward_hook(lambda m, x, y, at=at: probabilities.__setitem__(at, y)))
        if after:
            handles.append(layer.wo.register_forward_hook(
                lambda m, x, y, at=at: mixtures.__setitem__(at, cut(y, model.config.n_heads))))  # fmt: skip
        else:
            handles.append(layer.wo.register_forward_pre_hook(
                lambda m, x, at=at: mixtures.__setitem__(at, cut(x[0], model.config.n_heads))))  # fmt: skip
    failed = True
    try:
        model(tokens[None])
        failed = False
    finally:
        if remove == "always" or (remove == "when it went well" and not failed):
            for handle in handles:
                handle.remove()
        if remove == "all":
            for layer in layers:
                layer.tap._forward_hooks.clear()
                layer.wo._forward_pre_hooks.clear()
        for layer, was in zip(layers, before, strict=True):
            if fast == "on" or (fast == "on when it went well" and not failed):
                layer.fast = True
            elif fast == "restored" or (fast == "when it went well" and not failed):
                layer.fast = was
    both = [torch.stack([seen[i] for i in sorted(seen)]) for seen in (probabilities, mixtures)]
    if dtype is not None:
        both = [x.to(dtype) for x in both]
    return change(both[0], both[1])


def _recorder(**options: Any) -> Callable[..., Any]:
    return _on_data(lambda model, tokens: _recorded(model, tokens, **options))


def _changed(probabilities: Callable[[Tensor], Tensor] = lambda p: p,
             mixtures: Callable[[Tensor], Tensor] = lambda x: x) -> Callable[..., Any]:  # fmt: skip
    return _recorder(change=lambda p, x: (probabilities(p[:, 0]), mixtures(x[:, 0])))


def _quiet(model: Any, tokens: Tensor) -> Two | None:
    try:
        return _recorded(model, tokens)
    except IndexError:
        return None


def _added(model: Any, tokens: Tensor) -> Two:
    """What each head adds to the stream, instead of its mixture."""
    probabilities, mixtures = _recorded(model, tokens)
    weights = [block.attention.wo.weight.unflatten(1, (mixtures.shape[1], -1)) for block in model.blocks]
    return probabilities, torch.einsum("lhtd,lehd->lhte", mixtures, torch.stack(weights).to(mixtures))


RECORD = Exercise(
    "11.1", "a recorder with hooks", "record_heads", minutes=20, difficulty=3,
    why="A recorder that leaves something behind, even once, makes every later measurement doubtful.",
    reference=_on_data(_record_reference),
    cases=_record_cases,
    wrong=(
        Wrong("the hooks stay in the model: each later pass runs them again. Remove them when you are done.",
              _recorder(remove="never")),
        Wrong("the hooks stay in the model when it fails, since the lines that remove them are never reached.",
              _recorder(remove="when it went well")),
        Wrong("hooks of others are gone as well: remove only those that you have put in.", _recorder(remove="all")),
        Wrong("all layers stay on the slow path: put `fast` back as it was.", _recorder(fast="off")),
        Wrong("when the model fails, all layers stay on the slow path, since the line that puts `fast` back is never "
              "reached.", _recorder(fast="when it went well")),
        Wrong("afterwards `fast` is True in all layers: in some it was False before. Put back what was there.",
              _recorder(fast="on")),
        Wrong("only layers that took the readable path anyway are there: the fast one never makes probabilities.",
              _recorder(fast="never off")),
        Wrong("`fast` is left off, and the hooks are left in.", _recorder(fast="off", remove="never")),
        Wrong("when the model fails, both the hooks and the slow path stay: nothing behind the failing line is "
              "reached.", _recorder(fast="when it went well", remove="when it went well")),
        Wrong("when the model fails, both the hooks and the slow path stay, and when it does not, `fast` is True in "
              "all layers: put back what was there, in any case.",
              _recorder(fast="on when it went well", remove="when it went well")),
        Wrong("the model's error is caught, and None is returned: whoever records a model that fails must hear of it.",
              _on_data(_quiet)),
        Wrong("there is one layer, the last: every hook wrote to the same place. A function that is made in a loop "
              "looks its variables up when it runs, and by then the loop is over.", _recorder(key="last")),
        Wrong("every layer has the last one's numbers: each layer's hook must know its own layer.",
              _changed(lambda p: p[-1:].expand_as(p), lambda x: x[-1:].expand_as(x))),
        Wrong("the layers come last to first, expected first to last.", _recorder(key="reversed")),
        Wrong("the batch axis, of length 1, is still there: expected (L, H, T, T) and (L, H, T, D).",
              _recorder(change=lambda p, x: (p, x))),
        Wrong("each layer's numbers are cut into heads as they lie in memory: a token's H·D numbers lie side by side, "
              "so time comes before heads, and the two are to be exchanged.",
              _recorder(cut=lambda x, n: x.reshape(len(x), n, x.shape[1], -1))),
        Wrong("a token's numbers are cut into D parts of H: each head's D numbers lie side by side.",
              _recorder(cut=lambda x, n: x.unflatten(-1, (-1, n)).permute(0, 3, 1, 2))),
        Wrong("the mixtures have time before heads, expected (L, H, T, D).", _changed(mixtures=lambda x: x.mT.permute(
              0, 3, 1, 2))),
        Wrong("the mixtures have their last two axes exchanged, expected (L, H, T, D).", _changed(
              mixtures=lambda x: x.mT)),
        Wrong("what `wo` returns was recorded, where all heads are mixed already: the mixtures are what it is given.",
              _recorder(after=True)),
        Wrong("these are what each head adds to the stream, behind its part of `wo`: asked are the mixtures before it.",
              _on_data(_added)),
        Wrong("the numbers stay in the model's dtype, expected fp32.", _recorder(dtype=None)),
        Wrong("the probabilities are averaged over heads: keep each head's.", _changed(lambda p: p.mean(1))),
        Wrong("the probabilities are transposed: the last axis is what is looked at, so that rows sum to 1.",
              _changed(lambda p: p.mT)),
        Wrong("the two are exchanged: the probabilities come first, then the mixtures.",
              _recorder(change=lambda p, x: (x[:, 0], p[:, 0]))),
        Wrong("the layer axis is not the first, expected (L, H, T, T) and (L, H, T, D).",
              _changed(lambda p: p.transpose(0, 1), lambda x: x.transpose(0, 1))),
    ),
    hints=(
        "Which lines still run when the model raises an error, and what is in the model by then?",
        "Note every handle, and every layer's `fast`, before you change anything; put all of it back in a place that "
        "is reached in any case. A hook of a layer needs to be told its layer when it is made.",
        "list of `fast` · for each layer: off, a hook on what leaves `tap`, a hook on what enters `wo`, handles kept · "
        "try: run the model · finally: remove, put back · stack, first of the batch, fp32; mixtures: cut the last axis "
        "in heads, exchange with time.",
    ),
    tolerance=1e-5,
    blocked=("minillama.visualize.record.record", "minillama.visualize.record.attention_probabilities",
             "minillama.visualize.record", "minillama.visualize.attention_probabilities"),
)  # fmt: skip


# 11.2 ----------------------------------------------------------------------------------------------------------------


def _attention(rng: torch.Generator, *size: int) -> Tensor:
    """Causal maps with rows that sum to 1: (..., T, T)."""
    T = size[-1]
    scores = torch.randn(*size, T, generator=rng) * 2
    return scores.masked_fill(~torch.ones(T, T, dtype=torch.bool).tril(), -torch.inf).softmax(-1)


def _induction_cases(rng: torch.Generator) -> Iterable[tuple[Any, ...]]:
    for n, layers, heads, T, words in ((1, 2, 3, 9, 3), (4, 3, 2, 12, 5), (3, 1, 6, 7, 3), (2, 2, 3, 20, 8)):
        lengths = torch.randint(T // 2, T, (n,), generator=rng)
        lengths[-1] = T
        tokens = torch.randint(words, (n, T), generator=rng)  # 0 is a token as good as any
        tokens[-1, :4] = torch.tensor([1, 1, 0, 1])
        tokens[-1, 5] = 0
        yield _attention(rng, n, layers, heads, T), _padded(tokens, lengths, 2), lengths
    # Of the second text nothing repeats; then of no text.
    for n, T in ((2, 6), (3, 5)):
        tokens = torch.stack([torch.randperm(9, generator=rng)[:T] for _ in range(n)])
        lengths = torch.tensor([T, T - 2, T - 1])[:n]
        if n == 2:
            tokens[0, 3] = tokens[0, 1]
        yield _attention(rng, n, 2, 3, T), _padded(tokens, lengths, int(tokens[1, 0])), lengths
    yield _attention(rng, 2, 3, 2, 1), torch.tensor([[4], [4]]), torch.tensor([1, 0])


def _padded(tokens: Tensor, lengths: Tensor, word: int) -> Tensor:
    """Behind its end each text goes on with a word that also occurs in it."""
    return tokens.where(torch.arange(tokens.shape[1]) < lengths[:, None], torch.tensor(word))


Pairs = Callable[[list[int], int], list[tuple[int, int]]]


def _last(ids: list[int], length: int) -> list[tuple[int, int]]:
    """(place, place to be looked at) for each token that repeats."""
    ids = ids[:length]
    return [(t, s + 1) for t in range(length) for s in [max((s for s in range(t) if ids[s] == ids[t]), default=-1)]
            if s >= 0]  # fmt: skip


def _first(ids: list[int], length: int) -> list[tuple[int, int]]:
    return [(t, ids.index(ids[t]) + 1) for t in range(length) if ids[t] in ids[:t]]


def _all_earlier(ids: list[int], length: int) -> list[tuple[int, int]]:
    return [(t, s + 1) for t in range(length) for s in range(t) if ids[s] == ids[t]]


def _anywhere(ids: list[int], length: int) -> list[tuple[int, int]]:
    """The last other occurrence, later ones too."""
    found = []
    for t in range(length):
        if others := [s for s in range(length - 1) if ids[s] == ids[t] and s != t]:
            found.append((t, others[-1] + 1))
    return found


def _moved(by: int) -> Pairs:
    return lambda ids, length: [(t, min(s + by, len(ids) - 1)) for t, s in _last(ids, length)]


def _all_at_once(attention: Tensor, tokens: Tensor, lengths: Tensor, mean: bool) -> Tensor:
    """A place is scored by how much it looks behind all earlier occurrences, together or on average."""
    scores = []
    for look, ids, length in zip(attention, tokens.tolist(), lengths.tolist(), strict=True):
        for t in range(length):
            if places := [s + 1 for s in range(t) if ids[s] == ids[t]]:
                scores.append(look[:, :, t, places].sum(-1) / (len(places) if mean else 1))
    return torch.stack(scores).mean(0) if scores else torch.zeros(attention.shape[1:3])


def _not_forgotten(attention: Tensor, tokens: Tensor, lengths: Tensor) -> Tensor:
    """What one text has said is still known when the next one begins."""
    scores, last = [], dict[int, int]()
    for look, ids, length in zip(attention, tokens.tolist(), lengths.tolist(), strict=True):
        for t, token in enumerate(ids[:length]):
            if token in last:
                scores.append(look[:, :, t, last[token] + 1])
            last[token] = t
    return torch.stack(scores).mean(0) if scores else torch.zeros(attention.shape[1:3])


def _induction(attention: Tensor, tokens: Tensor, lengths: Tensor, *, pairs: Pairs = _last, padding: bool = False,
               turned: bool = False, over: str = "pairs", nothing: float = 0.0) -> Tensor:  # fmt: skip
    N, L, H, T, _ = attention.shape
    if turned:
        attention = attention.mT
    sums, counts = torch.zeros(N, L, H), torch.zeros(N)
    for n, (ids, length) in enumerate(zip(tokens.tolist(), lengths.tolist(), strict=True)):
        for t, s in pairs(ids, T if padding else length):
            sums[n] += attention[n, :, :, t, s]
            counts[n] += 1
    if over == "texts":  # each text's own mean
        return sums / counts[:, None, None].clamp_min(1)
    if over == "means":
        return (sums / counts[:, None, None].clamp_min(1)).mean(0)
    if over == "means of those that repeat":
        return (sums / counts[:, None, None].clamp_min(1)).sum(0) / (counts > 0).sum().clamp_min(1)
    if over == "sum":
        return sums.sum(0)
    if over == "number of texts":
        return sums.sum(0) / N
    if over == "all places":
        return sums.sum(0) / lengths.sum()
    if over == "padding":
        return sums.sum(0) / (N * T)
    if over == "later places":
        return sums.sum(0) / (lengths - 1).clamp_min(0).sum().clamp_min(1)
    count = counts.sum()
    return sums.sum(0) / count if count else torch.full((L, H), nothing)


def _induction_as(**options: Any) -> Callable[..., Tensor]:
    return lambda *arguments: _induction(*arguments, **options)


def _induction_reference(attention: Tensor, tokens: Tensor, lengths: Tensor) -> Tensor:
    T = tokens.shape[1]
    places = torch.arange(T)
    equal = (tokens[:, :, None] == tokens[:, None, :]) & (places < places[:, None])
    last = torch.where(equal, places, -1).amax(-1)  # (N, T)
    counted = (last >= 0) & (places < lengths[:, None])
    texts, looking = counted.nonzero(as_tuple=True)
    found = attention[texts, :, :, looking, last[texts, looking] + 1]
    return found.sum(0) / max(len(texts), 1)


INDUCTION = Exercise(
    "11.2", "induction scores of many texts", "induction_scores", minutes=20, difficulty=3,
    why="One text says little about a head, and one place off the score finds heads of another kind.",
    reference=_induction_reference,
    cases=_induction_cases,
    wrong=(
        Wrong("it counts who looks at the same token: an induction head looks at what came after it, one place on.",
              _induction_as(pairs=_moved(-1))),
        Wrong("it counts who looks two places behind the last occurrence, expected one.",
              _induction_as(pairs=_moved(1))),
        Wrong("it counts who looks at what came before the last occurrence, expected after.",
              _induction_as(pairs=_moved(-2))),
        Wrong("the first occurrence is taken where there are several: expected the last one before the token.",
              _induction_as(pairs=_first)),
        Wrong("all earlier occurrences count: expected only the last one before the token, so that each token counts "
              "once.", _induction_as(pairs=_all_earlier)),
        Wrong("a place is scored by its looks at what came after any of the earlier occurrences, added up: only the "
              "last one counts.", functools.partial(_all_at_once, mean=False)),
        Wrong("a place is scored by the mean of its looks at what came after each of the earlier occurrences: only the "
              "last one counts.", functools.partial(_all_at_once, mean=True)),
        Wrong("a token that has been there in an earlier text counts: each text begins with nothing said.",
              _not_forgotten),
        Wrong("an occurrence at place 0 is overlooked: the number 0 is false, and still a place.",
              _induction_as(pairs=lambda ids, length: [(t, s) for t, s in _last(ids, length) if s != 1])),
        Wrong("token 0 is taken for padding: what is padding, only the lengths say.",
              _induction_as(pairs=lambda ids, length: [(t, s) for t, s in _last(ids, length) if ids[t] != 0])),
        Wrong("occurrences behind the token count: nothing can be looked at there. Expected those before it.",
              _induction_as(pairs=_anywhere)),
        Wrong("it is divided by all places: only those whose token has been there before can be induced.",
              _induction_as(over="all places")),
        Wrong("it is divided by all places, padding too: only those whose token has been there before can be induced.",
              _induction_as(over="padding")),
        Wrong("it is divided by all places but the first of each text: only those whose token has been there before "
              "can be induced.", _induction_as(over="later places")),
        Wrong("padding counts: what stands behind the end of a text is no part of it, even if its token has been "
              "there.", _induction_as(padding=True)),
        Wrong("rows and columns are exchanged: the last axis is what is looked at.", _induction_as(turned=True)),
        Wrong("each text has its mean, and these are averaged: every place counts the same, so a text with many counts "
              "more.", _induction_as(over="means of those that repeat")),
        Wrong("each text has its mean, zero where nothing repeats, and these are averaged: take the mean over the "
              "places of all texts.", _induction_as(over="means")),
        Wrong("each text has its own score: expected (L, H), over the places of all texts.",
              _induction_as(over="texts")),
        Wrong("it is a sum, expected the mean over the places that count.", _induction_as(over="sum")),
        Wrong("it is divided by the number of texts, expected by that of the places that count.",
              _induction_as(over="number of texts")),
        Wrong("the last token of each text is left out: its place is the length less one, and it counts.",
              _induction_as(pairs=lambda ids, length: _last(ids, max(length - 1, 0)))),
        Wrong("where no token of any text repeats, it is NaN, expected zeros: nothing was divided by nothing.",
              _induction_as(nothing=math.nan)),
        Wrong("tokens that stand twice side by side are left out: there the last occurrence is the place before, and "
              "the token itself is what came after it.",
              _induction_as(pairs=lambda ids, length: [(t, s) for t, s in _last(ids, length) if s != t])),
        Wrong("a token counts as its own earlier occurrence, so that it would have to look at the next one.",
              _induction_as(pairs=lambda ids, length: [(t, min(t + 1, len(ids) - 1)) for t in range(length)])),
        Wrong("the places before the first repetition are left out, and after it every one counts.",
              _induction_as(pairs=lambda ids, length: (lambda found: found + [
                  (t, t) for t in range(found[0][0], length) if t not in dict(found)] if found else [])(
                  _last(ids, length)))),
        Wrong("the heads are averaged: expected a score for each, (L, H).",
              lambda *a: _induction(*a).mean(1)),
    ),
    hints=(
        "In «a b c a», which place would an induction head look at from the second a?",
        "Compare every place with every place of the same text: equal, and before. Of those that remain in a row, the "
        "last is wanted; a row where none remains does not count, nor does one behind the end of the text.",
        "equal tokens, (N, T, T) · strictly before · number of the place where it holds, -1 elsewhere · largest of "
        "each row · those ≥ 0 and before the text's length · attention there, one on · sum by number, at least 1.",
    ),
    blocked=("minillama.visualize.heads.induction_scores", "minillama.visualize.induction_scores"),
)  # fmt: skip


# 11.3 ----------------------------------------------------------------------------------------------------------------


def _rollout_cases(rng: torch.Generator) -> Iterable[tuple[Any, ...]]:
    for n, layers, heads, T in (
        (2, 3, 6, 5), (1, 4, 2, 7), (3, 1, 3, 4), (2, 5, 1, 6), (4, 2, 2, 1), (0, 3, 2, 4),
    ):  # fmt: skip
        weights = torch.rand(n, layers, heads, generator=rng) * 3
        if layers == 4:
            weights[0, 2] = 0
        if layers == 5:
            weights = weights * 100
        yield _attention(rng, n, layers, heads, T), weights
    # Rows of quarters sum to 1 in bf16, too, and the products are exact: what is lost is lost in sums, in any order.
    places = torch.rand(3, 2, 2, 3, 4, generator=rng) * torch.arange(1, 4)[:, None]
    quarters = F.one_hot(places.long(), 3).sum(-2) / 4
    weights = torch.randint(16, 32, (3, 2, 2), generator=rng) * 2 + 1
    yield quarters.bfloat16(), (weights * torch.tensor([8, 1])).bfloat16()


def _mixed(attention: Tensor, weights: Tensor) -> Tensor:
    return torch.einsum("nlhts,nlh->nlts", attention, weights)


def _eye(attention: Tensor) -> Tensor:
    return torch.eye(attention.shape[-1], dtype=attention.dtype)


def _own(a: Tensor, w: Tensor) -> Tensor:
    return (_mixed(a, w) + _eye(a)) / (1 + w.sum(-1))[..., None, None]


def _rollout(attention: Tensor, weights: Tensor, *, layer: Callable[[Tensor, Tensor], Tensor] = _own,
             step: Callable[[Tensor, Tensor], Tensor] = torch.matmul, dtype: torch.dtype | None = torch.float32,
             back: bool = False, start: Callable[[Tensor, Tensor], Tensor] | None = None) -> Tensor:  # fmt: skip
    if dtype is not None:
        attention, weights = attention.to(dtype), weights.to(dtype)
    layers = layer(attention, weights)
    if back:
        layers = layers.flip(1)
    found = [layers[:, 0] if start is None else start(attention, weights)[:, 0]]
    for i in range(1, layers.shape[1]):
        found.append(step(layers[:, i], found[-1]))
    return torch.stack(found, 1)


def _rollout_as(**options: Any) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda attention, weights: _rollout(attention, weights, **options)


def _of_rollout(change: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda attention, weights: change(_rollout(attention, weights))


def _largest(a: Tensor, w: Tensor) -> Tensor:
    """Of every place the head that looks at it most, in its strength."""
    both = (a * w[..., None, None]).amax(2) + _eye(a)
    return both / both.sum(-1, keepdim=True)


def _with_start(attention: Tensor, weights: Tensor) -> Tensor:
    found = _rollout(attention, weights)
    return torch.cat([_eye(found).expand_as(found[:, :1]), found], 1)


def _early_sums(a: Tensor, w: Tensor, maps: bool, strengths: bool) -> Tensor:
    """The sums over heads before fp32 begins."""
    above = _mixed(a, w).float() if maps else _mixed(a.float(), w.float())
    below = (1 + w.sum(-1)).float() if strengths else 1 + w.float().sum(-1)
    return torch.stack(_products((above + _eye(above)) / below[..., None, None]), 1)


def _one_by_one(a: Tensor, w: Tensor) -> Tensor:
    return torch.stack([_rollout(maps[None], strengths[None])[0] for maps, strengths in zip(a, w, strict=True)])


def _each_head(a: Tensor, w: Tensor) -> Tensor:
    return (_mixed(a, w) + a.shape[2] * _eye(a)) / (a.shape[2] + w.sum(-1))[..., None, None]


ROLLOUT = Exercise(
    "11.3", "rollout with strong and weak heads", "rollout", minutes=15, difficulty=3,
    why="Rollout takes all heads for equally strong; with their measured strengths it is nearer to what flows.",
    reference=lambda attention, weights: torch.stack(_products(_own(attention.float(), weights.float())), 1),
    cases=_rollout_cases,
    wrong=(
        Wrong("the residual stream is left out: past each layer the token itself is carried on with the strength 1.",
              _rollout_as(layer=lambda a, w: _mixed(a, w) / w.sum(-1)[..., None, None])),
        Wrong("the residual stream is left out, and rows do not sum to 1.", _rollout_as(layer=_mixed)),
        Wrong("rows do not sum to 1 any more: divide by all strengths, with the token's own.",
              _rollout_as(layer=lambda a, w: _mixed(a, w) + _eye(a))),
        Wrong("it is divided by the strengths of the heads only: the token's own counts, too.",
              _rollout_as(layer=lambda a, w: (_mixed(a, w) + _eye(a)) / w.sum(-1)[..., None, None])),
        Wrong("it is halved, which is right only for strengths that sum to 1.",
              _rollout_as(layer=lambda a, w: (_mixed(a, w) + _eye(a)) / 2)),
        Wrong("it is divided by the number of heads and one: their strengths differ.",
              _rollout_as(layer=lambda a, w: (_mixed(a, w) + _eye(a)) / (1 + a.shape[2]))),
        Wrong("the strengths are not used: all heads count the same.",
              _rollout_as(layer=lambda a, w: (a.mean(2) + _eye(a)) / 2)),
        Wrong("the strengths of a layer are scaled to sum to 1, so that half of a token stays itself: they are meant "
              "beside the token's own 1.",
              _rollout_as(layer=lambda a, w: (_mixed(a, w / w.sum(-1, keepdim=True)) + _eye(a)) / 2)),
        Wrong("the strengths are scaled to sum to 1 and zeros left alone, so that half of a token stays itself: they "
              "are meant beside the token's own 1.",
              _rollout_as(layer=lambda a, w: _own(a, w / w.sum(-1, keepdim=True).clamp_min(1e-9)))),
        Wrong("the strengths go through a softmax: they are strengths already.",
              _rollout_as(layer=lambda a, w: _own(a, w.softmax(-1)))),
        Wrong("every head brings the token itself along, or, which is the same, the heads are averaged: the stream "
              "passes a layer once, with the strength 1, and what the heads bring is added up.",
              _rollout_as(layer=_each_head)),
        Wrong("each head is mixed with the token itself, and then they are averaged, so that a head twice as strong "
              "brings less than twice as much: one sum for all, and one division.",
              _rollout_as(layer=lambda a, w: ((a * w[..., None, None] + _eye(a)) / (1 + w)[..., None, None]).mean(2))),
        Wrong("of the heads the largest is taken at each place: all of them add to the stream.",
              _rollout_as(layer=_largest)),
        Wrong("the layers are multiplied in the wrong order: the later one's rows look at what the earlier one made.",
              _rollout_as(step=lambda layer, before: before @ layer)),
        Wrong("the last layer comes first: begin with the first.", _rollout_as(back=True)),
        Wrong("the matrices are multiplied number by number: a token rests on another over all those between.",
              _rollout_as(step=torch.mul)),
        Wrong("each layer's own matrix is returned: multiply it with what came before.",
              _rollout_as(step=lambda layer, before: layer)),
        Wrong("the layers are added up: what one layer mixes, the next one mixes again.",
              _rollout_as(step=torch.add)),
        Wrong("the first layer lacks the residual stream: the token itself is carried past it, too.",
              _rollout_as(start=lambda a, w: _mixed(a, w) / w.sum(-1)[..., None, None])),
        Wrong("the token itself is added a second time at each step: the matrices have it already.",
              _rollout_as(step=lambda layer, before: (layer @ before + _eye(layer)) / 2)),
        Wrong("the product begins with the identity as an entry of its own: expected one for each layer, (N, L, T, T).",
              _with_start),
        Wrong("only what comes after the last layer is returned: expected one for each layer, (N, L, T, T).",
              _of_rollout(lambda x: x[:, -1])),
        Wrong("rows and columns are exchanged: the last axis is what a token rests on, so that rows sum to 1.",
              _of_rollout(lambda x: x.mT)),
        Wrong("the maps are turned before they are multiplied: a row is what one token looks at, and sums to 1.",
              _rollout_as(layer=lambda a, w: _own(a.mT, w))),
        Wrong("the results come last layer first, expected first to last.", _of_rollout(lambda x: x.flip(1))),
        Wrong("the texts go one by one and are put together in the end, which fails where there are none: treat all "
              "texts at once.", _one_by_one),
        Wrong("layers and texts are exchanged, expected (N, L, T, T).", _of_rollout(lambda x: x.transpose(0, 1))),
        Wrong("the texts are averaged, expected one result for each.", _of_rollout(lambda x: x.mean(0))),
        Wrong("it is computed in bf16, whose errors grow with each product: go to fp32 first.",
              _rollout_as(dtype=None)),
        Wrong("it is computed in bf16 and made fp32 in the end, when the digits are lost: go to fp32 first.",
              lambda a, w: _rollout(a, w, dtype=None).float()),
        Wrong("the sums over heads are taken in bf16, before fp32 begins: go to fp32 first.",
              lambda a, w: _early_sums(a, w, True, True)),
        Wrong("the strengths are added up in bf16, whose digits do not reach for the sum: go to fp32 first.",
              lambda a, w: _early_sums(a, w, False, True)),
        Wrong("the maps times strengths are added up in bf16, whose digits do not reach for the sum: go to fp32 first.",
              lambda a, w: _early_sums(a, w, True, False)),
    ),
    hints=(
        "A head has the strength 3, the token itself 1: how much of the token is still itself after the layer?",
        "A layer's matrix is a mean of its heads' maps and of the identity, each with its strength. Behind two layers "
        "a token rests on what its sources rested on behind the first.",
        "fp32 · maps times strengths, summed over heads · plus identity · by 1 and all strengths · layer by layer, all "
        "texts at once: this layer times what came before · stack.",
    ),
    tolerance=1e-6,
    blocked=("minillama.visualize.heads.rollout", "minillama.visualize.rollout"),
    slow=lambda rng: (_attention(rng, 20_000, 2, 1, 3), torch.rand(20_000, 2, 1, generator=rng)),
)  # fmt: skip


def _products(layers: Tensor) -> list[Tensor]:
    """Of (N, L, T, T) the products of the first layers, for each number of them."""
    found: list[Tensor] = []
    for layer in layers.unbind(1):
        found.append(torch.bmm(layer, found[-1]) if found else layer)
    return found


# 11.4 ----------------------------------------------------------------------------------------------------------------

Lens = tuple[Tensor, Tensor]


def _lens_cases(rng: torch.Generator) -> Iterable[tuple[Any, ...]]:
    for layers, T, dim, V, eps, dtype, size in (
        (4, 6, 8, 11, 0.5, torch.float32, 1.0), (3, 9, 7, 7, 0.3, torch.float32, 0.1),
        (6, 5, 12, 9, 1e-5, torch.float32, 40.0), (2, 7, 5, 3, 0.2, torch.float32, 1.0),
        (1, 4, 6, 5, 0.1, torch.float32, 1.0), (3, 1, 6, 9, 0.5, torch.float32, 1.0),
        (3, 0, 6, 9, 0.5, torch.float32, 1.0), (4, 6, 16, 10, 0.5, torch.bfloat16, 1.0),
    ):  # fmt: skip
        stream = torch.randn(layers, T, dim, generator=rng)
        output = torch.randn(V, dim, generator=rng) * size
        weight = 0.5 + torch.rand(dim, generator=rng)
        targets = torch.randint(V, (T,), generator=rng)
        for t in range(T):  # where the token is best: never, at some layers, from some layer on
            good = torch.rand(layers, generator=rng) < 0.5
            if t % 3 == 1:
                good[-1] = True
            if t % 3 == 2:
                good[-1] = False
                good[0] = True
            stream[good, t] += 3 * output[targets[t]] / (size * weight)
        if T > 3:  # another one is best at all layers
            stream[:, 3] = 4 * output[targets[3] - 1] / (size * weight) + 0.1 * stream[:, 3]
        stream = stream * torch.linspace(0.5, 2, layers)[:, None, None]
        yield stream.to(dtype), weight.to(dtype), eps, output.to(dtype), targets


def _settled(best: Tensor, targets: Tensor) -> Tensor:
    right = best == targets
    return right.shape[0] - right.flip(0).long().cumprod(0).sum(0)


def _lens(stream: Tensor, weight: Tensor, eps: float, output: Tensor, targets: Tensor, *,
          norm: Callable[[Tensor, Tensor, float], Tensor] = lambda x, w, eps: x * torch.rsqrt(
              x.square().mean(-1, keepdim=True) + eps) * w,
          logs: Callable[[Tensor], Tensor] = lambda z: z.log_softmax(-1),
          pick: Callable[[Tensor, Tensor], Tensor] = lambda logs, targets: logs[:, torch.arange(len(targets)), targets],
          settled: Callable[[Tensor, Tensor], Tensor] = _settled, dtype: torch.dtype = torch.float32,
          ) -> Lens:  # fmt: skip
    stream, weight, output = (x.to(dtype) for x in (stream, weight, output))
    scores = norm(stream, weight, eps) @ output.mT
    return pick(logs(scores), targets).float(), settled(scores.argmax(-1), targets)


def _lens_as(**options: Any) -> Callable[..., Lens]:
    return lambda *arguments: _lens(*arguments, **options)


def _normed(statistic: Callable[[Tensor, float], Tensor]) -> Callable[..., Lens]:
    """With another divisor than the root of the mean of squares."""
    return _lens_as(norm=lambda x, w, eps: x / statistic(x, eps) * w)


def _lens_reference(stream: Tensor, weight: Tensor, eps: float, output: Tensor, targets: Tensor) -> Lens:
    normed = F.rms_norm(stream.float(), weight.shape, weight.float(), eps)
    scores = F.linear(normed, output.float())
    best, answers = scores.argmax(-1).tolist(), targets.tolist()
    logs = -F.cross_entropy(scores.transpose(1, 2), targets.expand(len(scores), -1), reduction="none")
    first = []
    for t, answer in enumerate(answers):
        layer = len(best)
        while layer > 0 and best[layer - 1][t] == answer:
            layer -= 1
        first.append(layer)
    return logs, torch.tensor(first, dtype=torch.int64)


def _first_right(best: Tensor, targets: Tensor) -> Tensor:
    """The first layer at which it is best, whatever follows."""
    right = best == targets
    return torch.where(right.any(0), right.long().argmax(0), len(right))


def _never(value: Callable[[int], int]) -> Callable[[Tensor, Tensor], Tensor]:
    def settled(best: Tensor, targets: Tensor) -> Tensor:
        found = _settled(best, targets)
        return torch.where(found == len(best), value(len(best)), found)

    return settled


def _more_than_half(*arguments: Any) -> Lens:
    logs, _ = _lens(*arguments)
    return logs, _settled((logs > math.log(0.5)).long(), torch.ones_like(arguments[-1]))


def _last_alone(x: Tensor, w: Tensor, eps: float) -> Tensor:
    """The norm only where the model has it: behind the last layer."""
    normed = x[-1:] * torch.rsqrt(x[-1:].square().mean(-1, keepdim=True) + eps) * w
    return torch.cat([x[:-1], normed])


LENS = Exercise(
    "11.4", "the logit lens: when does it settle?", "logit_lens", minutes=20, difficulty=3,
    why="A lens of a whole text has too many numbers to read; from which layer on the answer stands is one a token.",
    reference=_lens_reference,
    cases=_lens_cases,
    wrong=(
        Wrong("the last norm is left out: the output head has only ever read normed vectors.",
              _lens_as(norm=lambda x, w, eps: x)),
        Wrong("the norm lacks its weight.", _lens_as(norm=lambda x, w, eps: x * torch.rsqrt(
              x.square().mean(-1, keepdim=True) + eps))),
        Wrong("the norm is left out but for its weight: divide by the root of the mean of squares first.",
              _lens_as(norm=lambda x, w, eps: x * w)),
        Wrong("the norm is put only behind the last layer: the lens treats every layer's stream as if it were the "
              "last one's.", _lens_as(norm=_last_alone)),
        Wrong("every layer is divided by the size of the last one's stream: each has its own.",
              _normed(lambda x, eps: (x[-1:].square().mean(-1, keepdim=True) + eps).sqrt())),
        Wrong("the norm's mean is over time: it is over the numbers of each vector.",
              _normed(lambda x, eps: (x.square().mean(1, keepdim=True) + eps).sqrt())),
        Wrong("the norm's mean is over time and numbers: each vector has its own.",
              _normed(lambda x, eps: (x.square().mean((1, 2), keepdim=True) + eps).sqrt())),
        Wrong("the norm divides by the length of a vector, the root of the sum of squares: expected of their mean.",
              _normed(lambda x, eps: (x.square().sum(-1, keepdim=True) + eps).sqrt())),
        Wrong("the norm subtracts the mean: that is LayerNorm.",
              _lens_as(norm=lambda x, w, eps: F.layer_norm(x, w.shape, w, eps=eps))),
        Wrong("eps is left out.", _normed(lambda x, eps: x.square().mean(-1, keepdim=True).sqrt())),
        Wrong("eps is added outside the root.", _normed(lambda x, eps: x.square().mean(-1, keepdim=True).sqrt() + eps)),
        Wrong("eps is 1e-5 whatever was given.", _normed(lambda x, eps: (x.square().mean(-1, keepdim=True) + 1e-5
                                                                         ).sqrt())),
        Wrong("these are scores, expected log-probabilities.", _lens_as(logs=lambda z: z)),
        Wrong("these are probabilities, expected their logarithms.", _lens_as(logs=lambda z: z.softmax(-1))),
        Wrong("these are losses, the log-probabilities with the sign turned.",
              _lens_as(logs=lambda z: -z.log_softmax(-1))),
        Wrong("these are logarithms to the base 2, expected natural ones.",
              _lens_as(logs=lambda z: z.log_softmax(-1) / math.log(2))),
        Wrong("the softmax is over time: at each place the tokens of the vocabulary share the 1.",
              _lens_as(logs=lambda z: z.log_softmax(1))),
        Wrong("the softmax is over layers: at each place the tokens of the vocabulary share the 1.",
              _lens_as(logs=lambda z: z.log_softmax(0))),
        Wrong("small probabilities become -inf: the logarithm of a softmax that is 0. Take both in one.",
              _lens_as(logs=lambda z: z.softmax(-1).log())),
        Wrong("large scores become infinite or NaN: an exponential overflows. Take the largest score away first.",
              _lens_as(logs=lambda z: z - z.exp().sum(-1, keepdim=True).log())),
        Wrong("large scores become infinite or NaN: an exponential overflows, and infinity is divided by infinity.",
              _lens_as(logs=lambda z: (z.exp() / z.exp().sum(-1, keepdim=True)).log())),
        Wrong("a small number is added to the probabilities before the logarithm, which bends the small ones.",
              _lens_as(logs=lambda z: (z.softmax(-1) + 1e-9).log())),
        Wrong("the log-probabilities of the whole vocabulary are returned: expected only those of the targets, (L+1, "
              "T).", _lens_as(pick=lambda logs, targets: logs)),
        Wrong("the log-probabilities are those of the most probable token: expected those of the targets.",
              _lens_as(pick=lambda logs, targets: logs.amax(-1))),
        Wrong("they are transposed, expected (L+1, T).",
              _lens_as(pick=lambda logs, targets: logs[:, torch.arange(len(targets)), targets].mT)),
        Wrong("the targets are taken one place late: targets[t] already is what should follow token t.",
              _lens_as(pick=lambda logs, targets: logs[:, torch.arange(len(targets)), targets.roll(-1)],
                       settled=lambda best, targets: _settled(best, targets.roll(-1)))),
        Wrong("all is computed in bf16, where digits are lost: go to fp32 first.",
              lambda stream, *a: _lens(stream, *a, dtype=stream.dtype)),
        Wrong("the layer is the first at which the target is the most probable: it may lose that again. Expected the "
              "one from which on it stays.", _lens_as(settled=_first_right)),
        Wrong("the layer is the last at which the target is not the most probable yet: expected the one after it.",
              _lens_as(settled=lambda best, targets: _settled(best, targets) - 1)),
        Wrong("the target counts only where it has more than half of the probability: it is the most probable with "
              "less, if all others have less still.", _more_than_half),
        Wrong("the layers are gone through from the first, and counting ends where the target is not the most "
              "probable: begin at the last.",
              _lens_as(settled=lambda best, targets: len(best) - (best == targets).long().cumprod(0).sum(0))),
        Wrong("layers are counted from 1: the stream before the first layer is number 0.",
              _lens_as(settled=lambda best, targets: _settled(best, targets) + 1)),
        Wrong("where the target is not the most probable in the end, the layer is -1, expected L+1.",
              _lens_as(settled=_never(lambda n: -1))),
        Wrong("where the target is not the most probable in the end, the layer is 0, as if it had stood from the "
              "beginning: expected L+1.", _lens_as(settled=_never(lambda n: 0))),
        Wrong("where the target is not the most probable in the end, the layer is L, as if it had come with the last: "
              "expected L+1.", _lens_as(settled=_never(lambda n: n - 1))),
        Wrong("the layers at which the target is the most probable are counted: expected the number of the layer from "
              "which on it stays.", _lens_as(settled=lambda best, targets: (best == targets).sum(0))),
        Wrong("the layers at which the target is not the most probable are counted: it may have lost that again.",
              _lens_as(settled=lambda best, targets: (best != targets).sum(0))),
        Wrong("it is how many of the last layers have the target as the most probable: expected the number of the "
              "first of them.", _lens_as(settled=lambda best, targets: len(best) - _settled(best, targets))),
        Wrong("the layer is the one from which on the best token does not change, whether or not it is the target.",
              _lens_as(settled=lambda best, targets: _settled(best, best[-1]))),
        Wrong("the two are exchanged: the log-probabilities come first, then the layers.",
              lambda *a: _lens(*a)[::-1]),
        Wrong("the layers are not whole numbers in int64.",
              _lens_as(settled=lambda best, targets: _settled(best, targets).float())),
    ),
    hints=(
        "What does the model do with the stream between its last layer and the scores, and what does each of the "
        "layers' streams lack?",
        "Treat all layers at once, as a batch. For the second part walk back from the last layer as long as the target "
        "is best.",
        "fp32 · mean of squares over the last axis, eps, root, weight · times output, transposed · log-softmax over "
        "the vocabulary · of each place its target's · best = target? · layers flipped, products from the front, "
        "summed: how many at the end · away from their number.",
    ),
    tolerance=5e-6,
    blocked=("minillama.visualize.lens.logit_lens", "minillama.visualize.logit_lens", "torch.nn.functional.rms_norm",
             "torch.rms_norm", "minillama.norm.RMSNorm.forward"),
)  # fmt: skip


# 11.5 ----------------------------------------------------------------------------------------------------------------


def _silence_cases(rng: torch.Generator) -> Iterable[tuple[Any, ...]]:
    def some(n: int, heads: int) -> Tensor:
        silent = torch.rand(n, heads, generator=rng) < 0.4
        silent[0, 0], silent[0, -1] = True, False
        return silent

    for n, T, heads, head_dim, lengths in (
        (2, 5, 6, 4, [3, 5]), (3, 4, 2, 5, [4, 1, 2]), (4, 7, 3, 2, [7, 0, 2, 5]), (1, 1, 4, 3, [1]),
        (2, 3, 3, 3, [2, 3]),
    ):  # fmt: skip
        mixtures, silent = torch.randn(n, T, heads, head_dim, generator=rng) * 3 + 1, some(n, heads)
        for mean in (False, True):
            yield mixtures, silent, torch.tensor(lengths), mean
    yield torch.randn(2, 3, 4, 2, generator=rng), torch.zeros(2, 4, dtype=torch.bool), torch.tensor([3, 2]), True
    yield torch.randn(0, 3, 4, 2, generator=rng), torch.zeros(0, 4, dtype=torch.bool), torch.zeros(0).long(), False
    whole = torch.randint(80, 110, (2, 5, 3, 6), generator=rng)  # bf16 has not enough digits for the sum of 7
    yield whole.bfloat16(), torch.tensor([[True, False, True], [True, True, False]]), torch.tensor([5, 2]), True


def _real(mixtures: Tensor, lengths: Tensor) -> Tensor:
    return torch.arange(mixtures.shape[1]) < lengths[:, None]


def _mean(mixtures: Tensor, silent: Tensor, lengths: Tensor) -> Tensor:
    """(H, D) fp32: over all tokens of all texts."""
    return mixtures[_real(mixtures, lengths)].float().mean(0)


def _silence(mixtures: Tensor, silent: Tensor, lengths: Tensor, mean: bool, *,
             says: Callable[[Tensor, Tensor, Tensor], Tensor] = _mean,
             who: Callable[[Tensor], Tensor] = lambda silent: silent[:, None, :, None],
             zero: bool = False, always: bool = False) -> Tensor:  # fmt: skip
    instead = torch.zeros(())
    if (mean or always) and not zero:
        instead = says(mixtures, silent, lengths)
    return torch.where(who(silent), instead.to(mixtures.dtype), mixtures)


def _silence_as(**options: Any) -> Callable[..., Tensor]:
    return lambda *arguments: _silence(*arguments, **options)


def _says(what: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """Another mean, from the mixtures in fp32 and the booleans (B, T) of what is no padding."""
    return _silence_as(says=lambda x, silent, lengths: what(x.float(), _real(x, lengths)))


def _of_those(x: Tensor, which: Tensor, axes: tuple[int, ...]) -> Tensor:
    """The mean over some axes of those that a boolean (B, T, H, 1) chooses."""
    return (x * which).sum(axes, keepdim=True) / which.expand(x.shape).sum(axes, keepdim=True).clamp_min(1)


def _silence_in_place(mixtures: Tensor, silent: Tensor, lengths: Tensor, mean: bool) -> Tensor:
    return mixtures.copy_(_silence(mixtures, silent, lengths, mean))


def _silence_reference(mixtures: Tensor, silent: Tensor, lengths: Tensor, mean: bool) -> Tensor:
    found = mixtures.clone()
    rows = [text[: int(length)] for text, length in zip(mixtures, lengths, strict=True)]
    for text, heads in zip(found, silent, strict=True):
        for head in heads.nonzero()[:, 0].tolist():
            text[:, head] = torch.cat(rows).float()[:, head].mean(0).to(found.dtype) if mean else 0
    return found


SILENCE = Exercise(
    "11.5", "silence heads: zero and mean", "silence", minutes=20, difficulty=3,
    why="With another head silent in each copy of a text, one pass of the model tells what every head is worth.",
    reference=_silence_reference,
    cases=_silence_cases,
    wrong=(
        Wrong("the other heads are silent, and the chosen ones are left.",
              _silence_as(who=lambda silent: ~silent[:, None, :, None])),
        Wrong("each silent head's neighbour is silent instead: heads are counted from 0.",
              _silence_as(who=lambda silent: silent.roll(1, 1)[:, None, :, None])),
        Wrong("the neighbour before each silent head is silent instead: heads are counted from 0.",
              _silence_as(who=lambda silent: silent.roll(-1, 1)[:, None, :, None])),
        Wrong("a head that is silent in one text is silent in all: each text has its own.",
              _silence_as(who=lambda silent: silent.any(0)[:, None])),
        Wrong("the first text's heads are silent in all texts: each has its own.",
              _silence_as(who=lambda silent: silent[:1, None, :, None])),
        Wrong("the heads' numbers are taken from where they do not lie: in each row of H · D numbers a head's D lie "
              "side by side.", lambda x, silent, lengths, mean: _silence(
                  x.flatten(2).unflatten(-1, (x.shape[3], x.shape[2])).transpose(2, 3), silent, lengths, mean
              ).transpose(2, 3).flatten(2).unflatten(-1, x.shape[2:])),
        Wrong("the argument is changed in place: whoever recorded it would find it silent. Work on a copy.",
              _silence_in_place),
        Wrong("it is zero where the mean was asked for.", _silence_as(zero=True)),
        Wrong("it is the mean where zero was asked for.", _silence_as(always=True)),
        Wrong("zero and mean are exchanged.", lambda x, silent, lengths, mean: _silence(x, silent, lengths, not mean)),
        Wrong("padding counts in the mean: the model says something there, but nobody has asked it to.",
              _says(lambda x, real: x.mean((0, 1)))),
        Wrong("padding counts in the mean as zeros: divide by the number of tokens that are there.",
              _says(lambda x, real: (x * real[:, :, None, None]).mean((0, 1)))),
        Wrong("each text has its own mean: expected one over the tokens of all texts.",
              _says(lambda x, real: _of_those(x, real[:, :, None, None], (1,)))),
        Wrong("each text has its mean, and these are averaged: every token counts the same.",
              _says(lambda x, real: _of_those(x, real[:, :, None, None], (1,)).sum(0, keepdim=True)
                    / real.any(1).sum())),
        Wrong("each place has its own mean, over the texts: expected one over all places.",
              _says(lambda x, real: _of_those(x, real[:, :, None, None], (0,)))),
        Wrong("the mean is over the heads of a token: each head has a mean of its own, over tokens.",
              _says(lambda x, real: x.mean(2, keepdim=True))),
        Wrong("all heads have the same mean: each has its own.",
              _says(lambda x, real: x[real].mean((0, 1)))),
        Wrong("the mean is one number for a head: each of its D numbers has its own.",
              _says(lambda x, real: x[real].mean((0, 2))[:, None])),
        Wrong("a token's own numbers are averaged: the mean is over tokens, number by number.",
              _says(lambda x, real: x.mean(-1, keepdim=True))),
        Wrong("the mean is over the texts in which the head is silent: expected over all.",
              _silence_as(says=lambda x, silent, lengths: _of_those(
                  x.float(), _real(x, lengths)[:, :, None, None] & silent[:, None, :, None], (0, 1)))),
        Wrong("the mean is taken when the silent heads are zero already: take it from what the heads said.",
              lambda x, silent, lengths, mean: _silence(x, silent, lengths, mean, says=lambda y, s, n: _mean(
                  _silence(y, s, n, False), s, n))),
        Wrong("the mean is added to what a silent head says: it stands in its place.",
              lambda x, silent, lengths, mean: _silence(x, silent, lengths, mean, says=lambda y, s, n: y.float()
                                                        + _mean(y, s, n))),
        Wrong("the mean is taken away from what a silent head says: it stands in its place.",
              lambda x, silent, lengths, mean: _silence(x, silent, lengths, mean, says=lambda y, s, n: y.float()
                                                        - _mean(y, s, n))),
        Wrong("the sum behind the mean is rounded to bf16: add up in fp32.",
              _silence_as(says=lambda x, silent, lengths: x[_real(x, lengths)].sum(0) / lengths.sum())),
        Wrong("the result is fp32, expected the dtype of what was given.", lambda *a: _silence(*a).float()),
        Wrong("the other heads are scaled up, as dropout does in training: they are to stay as they are.",
              lambda x, silent, lengths, mean: torch.where(
                  silent[:, None, :, None], _silence(x, silent, lengths, mean),
                  x * (silent.shape[1] / (~silent).sum(1).clamp_min(1))[:, None, None, None].to(x))),
        Wrong("padding is left alone: a silent head is silent at all places.",
              lambda x, silent, lengths, mean: torch.where(_real(x, lengths)[:, :, None, None], _silence(
                  x, silent, lengths, mean), x)),
        Wrong("the silent heads are cut out, and the others move up: the shape is to stay as it is.",
              lambda x, silent, lengths, mean: x[:, :, ~silent.any(0)]),
    ),
    hints=(
        "Which axes does a head's mean run over, and which does it keep?",
        "Two steps that know nothing of each other: what a silent head says, (H, D), and where it says it, which "
        "depends on text and head only.",
        "places < lengths: (B, T) booleans · choose those tokens, (n, H, D) · fp32 · mean over the first axis, or "
        "zeros · back to the dtype · booleans with axes of length 1 for time and D · where they hold the one, else the "
        "other.",
    ),
    blocked=("minillama.visualize.record.ablate", "minillama.visualize.record.head_means",
             "minillama.visualize.ablate", "minillama.visualize.head_means"),
)  # fmt: skip


# 11.6 ----------------------------------------------------------------------------------------------------------------


def _patch_cases(rng: torch.Generator) -> Iterable[tuple[Any, ...]]:
    def two(model: Data, T: int, place: int) -> tuple[Any, ...]:
        """Texts that differ at one place, and the two words that this moves furthest apart."""
        config, weights = model
        clean, whole = _text(rng, T), Llama(ModelConfig(**config))
        corrupt = clean.clone()
        corrupt[place] = (clean[place] + 7) % 19
        vector_to_parameters(weights, whole.requires_grad_(False).parameters())
        moved = logits_of(whole, torch.stack([clean, corrupt]))[:, -1].diff(dim=0)[0]
        return clean, corrupt, int(moved.argmin()), int(moved.argmax())

    model = _model(rng, 12, 2, 6, 2, 4)
    yield *model, [two(model, 3, 1)]
    model = _model(rng, 20, 3, 4, 2, 6)
    yield *model, [two(model, 4, 0), two(model, 4, 2)]
    model = _model(rng, 18, 1, 3, 1, 8)
    yield *model, [two(model, 5, 3), (_text(rng, 5), _broken(rng, 5), 0, 1), (_broken(rng, 5), _text(rng, 5), 1, 0)]
    model = _model(rng, 14, 2, 2, 2, 4)
    yield *model, [two(model, 1, 0)]
    yield *model, []


def _effects(model: Any, clean: Tensor, corrupt: Tensor, word: int, other: int, *, into: str = "corrupt",
             value: Callable[[Tensor, Tensor], Tensor] = lambda clean, corrupt: clean, swapped: bool = False,
             where: Callable[[int], Tensor] = lambda T: torch.eye(T), stream: bool = False, late: bool = False,
             measure: Callable[[Tensor, int, int], Tensor] = lambda z, word, other: z[:, -1, word] - z[:, -1, other],
             share: Callable[[Tensor, Tensor, Tensor], Tensor] = lambda patched, clean, corrupt: (
                 patched - corrupt) / (clean - corrupt), remove: str = "always") -> Tensor:  # fmt: skip
    """Each layer and part in turn, in T copies of the text, and what can go wrong with it."""
    parts = [[getattr(block, name) for block in model.blocks]
             for name in (("attention_norm", "feedforward_norm") if stream else ("attention", "feedforward"))]
    T = len(clean)
    modules = [module for part in parts for module in part]
    said: dict[str, list[Tensor]] = {"clean": [], "corrupt": []}
    scores = {}
    for name, tokens in (("clean", clean), ("corrupt", corrupt)):
        kept: dict[int, Tensor] = {}
        handles = [
            module.register_forward_pre_hook(lambda m, x, i=i, kept=kept: kept.__setitem__(i, x[0][0]))
            if stream else
            module.register_forward_hook(lambda m, x, y, i=i, kept=kept: kept.__setitem__(i, y[0]))
            for i, module in enumerate(modules)
        ]  # fmt: skip
        failed = True
        try:
            scores[name] = measure(model(tokens[None]), word, other)
            failed = False
        finally:
            stays = {"when it went well": failed, "recording stays": name == "clean",
                     "when clean went well": failed and name == "clean"}  # fmt: skip
            if not stays.get(remove, False):
                for handle in handles:
                    handle.remove()
        said[name] = [kept[i] for i in range(len(modules))]
    found = []
    text = corrupt if into == "corrupt" else clean
    for i, module in enumerate(modules):
        put = value(said["clean"][i], said["corrupt"][i])
        if into == "clean":
            put = value(said["corrupt"][i], said["clean"][i])

        def patch(x: Tensor, put: Tensor = put) -> Tensor:
            return torch.where(where(T).bool()[:, :, None], put, x)

        if late:  # all layers' hooks change what the last one of the part says
            module = modules[-1 if i >= len(modules) // 2 else len(modules) // 2 - 1]
        handle = module.register_forward_pre_hook(lambda m, x, patch=patch: (patch(x[0]), *x[1:])) if stream else (
            module.register_forward_hook(lambda m, x, y, patch=patch: patch(y)))  # fmt: skip
        found.append(measure(model(text.expand(T, -1)), word, other))
        if remove != "never":
            handle.remove()
    n = len(parts[0])
    back = torch.stack(found)
    back = back.unflatten(0, (2, n))
    return share(back.flip(0) if swapped else back, scores["clean"], scores["corrupt"])


def _effects_as(**options: Any) -> Callable[..., Any]:
    return _on_data(lambda *arguments: _effects(*arguments, **options))


def _of_effects(change: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    return _on_data(lambda *arguments: change(_effects(*arguments)))


def _piled_up(model: Any, clean: Tensor, corrupt: Tensor, word: int, other: int, *, remove: bool = False) -> Tensor:
    """One patch after the other, of which none is taken out, or all in the end."""
    modules = [block.attention for block in model.blocks] + [block.feedforward for block in model.blocks]
    said: list[tuple[Any, Tensor]] = []
    handles = [module.register_forward_hook(lambda m, x, y: said.append((m, y[0]))) for module in modules]
    try:
        z = model(clean[None])[0, -1]
    finally:
        for handle in handles:
            handle.remove()
    known = dict(said)
    before, z = z[word] - z[other], model(corrupt[None])[0, -1]
    after = z[word] - z[other]
    found = []
    for module in modules:
        for place in range(len(clean)):
            def patch(m: Any, x: Any, y: Tensor, place: int = place) -> Tensor:
                y = y.clone()
                y[0, place] = known[m][place]
                return y

            handles.append(module.register_forward_hook(patch))
            z = model(corrupt[None])[0, -1]
            found.append((z[word] - z[other] - after) / (before - after))
    if remove:
        for handle in handles:
            handle.remove()
    return torch.stack(found).view(2, -1, len(clean))


def _stream_patched(model: Any, clean: Tensor, corrupt: Tensor, word: int, other: int) -> Tensor:
    """The stream before each layer, and behind it."""
    with record(model, "stream") as seen:
        z = [model(clean[None])[0, -1]]
    z.append(model(corrupt[None])[0, -1])
    copies, one = corrupt.expand(len(clean), -1), torch.eye(len(clean), dtype=torch.bool)[:, :, None]
    for part in (0, 1):
        for layer, block in enumerate(model.blocks):
            put = seen.stream[layer + part]
            handle = (
                block.register_forward_hook(lambda m, x, y, put=put: torch.where(one, put, y)) if part else
                block.register_forward_pre_hook(lambda m, x, put=put: (torch.where(one, put, x[0]), *x[1:]))
            )  # fmt: skip
            with handle:
                z.extend(model(copies)[:, -1])
    before, after, *found = (scores[word] - scores[other] for scores in z)
    return ((torch.stack(found) - after) / (before - after)).view(2, -1, len(clean))


def _swept(model: Any, *arguments: Any) -> Tensor:
    try:
        return _effects(model, *arguments)
    finally:
        for module in model.modules():
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()


def _probability(z: Tensor, word: int, other: int) -> Tensor:
    chances = z[:, -1].softmax(-1)
    return chances[:, word] - chances[:, other]


PATCH = Exercise(
    "11.6", "patching what each part adds", "patching_effect", minutes=30, difficulty=4,
    why="The stream tells where a fact is by then; what the parts add tells which of them has brought it there.",
    reference=_effects_as(),
    cases=_patch_cases,
    wrong=(
        Wrong("clean and corrupt are exchanged in the share: it is 0 where a patch brings all back, and 1 where it "
              "does nothing.", _effects_as(share=lambda p, clean, corrupt: (p - clean) / (corrupt - clean))),
        Wrong("the patch lands in the clean text: then the share shows what is destroyed, expected what comes back in "
              "the corrupt one.", _effects_as(into="clean")),
        Wrong("the patch lands in the clean text, and the share is how much of the difference is lost there: expected "
              "what comes back in the corrupt one.",
              _effects_as(into="clean", share=lambda p, clean, corrupt: (clean - p) / (clean - corrupt))),
        Wrong("these are differences of scores, expected their share of what lies between the texts.",
              _effects_as(share=lambda p, clean, corrupt: p - corrupt)),
        Wrong("these are the patched model's scores themselves, expected the share that comes back.",
              _effects_as(share=lambda p, clean, corrupt: p)),
        Wrong("it is divided by the clean text's score: expected by the difference between the texts.",
              _effects_as(share=lambda p, clean, corrupt: (p - corrupt) / clean)),
        Wrong("the patched scores are divided by the clean ones: 0 is to be as in the corrupt text, 1 as in the clean "
              "one.", _effects_as(share=lambda p, clean, corrupt: p / clean)),
        Wrong("the share has lost its sign: a patch may also lead further away.",
              _effects_as(share=lambda p, clean, corrupt: ((p - corrupt) / (clean - corrupt)).abs())),
        Wrong("the share is cut off at 0 and 1: a patch may lead further away, or beyond.",
              _effects_as(share=lambda p, clean, corrupt: ((p - corrupt) / (clean - corrupt)).clamp(0, 1))),
        Wrong("the whole text is patched each time: expected one place only.", _effects_as(where=lambda T: torch.ones(
              T, T))),
        Wrong("the places before are patched as well: expected one place at a time.",
              _effects_as(where=lambda T: torch.ones(T, T).tril())),
        Wrong("the places behind are patched as well: expected one place at a time.",
              _effects_as(where=lambda T: torch.ones(T, T).triu())),
        Wrong("all places but the one are patched.", _effects_as(where=lambda T: 1 - torch.eye(T))),
        Wrong("nothing comes back anywhere: what was put in is what the corrupt text said by itself. What was recorded "
              "of the clean text may have been written over by a later pass.",
              _of_effects(torch.zeros_like)),
        Wrong("the place is set to zero: expected what was said there in the clean text.",
              _effects_as(value=lambda clean, corrupt: torch.zeros_like(clean))),
        Wrong("the clean value is added to what is said in the corrupt text: it stands in its place.",
              _effects_as(value=lambda clean, corrupt: clean + corrupt)),
        Wrong("the difference of the two texts is put in: it is the clean value that stands there.",
              _effects_as(value=lambda clean, corrupt: clean - corrupt)),
        Wrong("what attention and feed-forward read is patched: expected what they add.", _effects_as(stream=True)),
        Wrong("the stream is patched, before each layer and behind it, with all that was added before: expected what "
              "one part adds to it.", _on_data(_stream_patched)),
        Wrong("attention and feed-forward are exchanged: attention comes first.", _effects_as(swapped=True)),
        Wrong("the layers come last to first, expected first to last.", _of_effects(lambda x: x.flip(1))),
        Wrong("every patch lands in the last layer: each layer's hook must know its own.", _effects_as(late=True)),
        Wrong("places and layers are exchanged, expected (2, L, T).", _of_effects(lambda x: x.mT)),
        Wrong("layers and parts are exchanged, expected (2, L, T).", _of_effects(lambda x: x.transpose(0, 1))),
        Wrong("only what attention adds is there: expected the feed-forward layers behind it.",
              _of_effects(lambda x: x[0])),
        Wrong("only the score of `word` is measured: expected how far it is ahead of `other`.",
              _effects_as(measure=lambda z, word, other: z[:, -1, word])),
        Wrong("probabilities are measured, expected scores.", _effects_as(measure=_probability)),
        Wrong("the scores are averaged over all places: measure behind the last token.",
              _effects_as(measure=lambda z, word, other: (z[..., word] - z[..., other]).mean(1))),
        Wrong("hooks stay in the model: each patch adds to all those before it.", _on_data(_piled_up)),
        Wrong("the patches are taken out only in the end, so that each adds to all those before it: expected one "
              "place at a time.",
              _on_data(lambda *a: _piled_up(*a, remove=True))),
        Wrong("hooks stay in the model: of each place, the patches of the layers before are still in.",
              _effects_as(remove="never")),
        Wrong("the hooks that record the clean text stay in the model.", _effects_as(remove="recording stays")),
        Wrong("nothing comes back anywhere: the hooks that record the clean text stay in the model, and write over it "
              "in each later pass.",
              _on_data(lambda *a: torch.zeros_like(_effects(*a, remove="recording stays")))),
        Wrong("hooks stay in the model when it fails, since the lines that remove them are never reached.",
              _effects_as(remove="when it went well")),
        Wrong("the hooks that record the clean text stay in the model when it fails there: it is then that they must "
              "be removed, too.", _effects_as(remove="when clean went well")),
        Wrong("hooks of others are gone as well: remove only those that you have put in.", _on_data(_swept)),
        Wrong("these are percent, expected shares: 1 is all.", _of_effects(lambda x: 100 * x)),
    ),
    hints=(
        "A hook that returns something puts it in the place of the output. What should it return, for one place?",
        "First a pass of the clean text, in which every part's output is kept; then one of the corrupt text, for what "
        "there is to bring back; then for each part, layer and place a corrupt pass with one vector replaced in a "
        "copy.",
        "score: word minus other behind the last token · clean pass with hooks that keep outputs, removed in any case "
        "· corrupt pass · for each: a hook that copies the output and sets one place, pass, remove · minus corrupt, by "
        "clean minus corrupt.",
    ),
    tolerance=1e-5,
    blocked=("minillama.visualize.patching.patching",
             "minillama.visualize.patching"),
)  # fmt: skip


# 11.7 ----------------------------------------------------------------------------------------------------------------

LAYER = 1
_KEYS = ("loss", "one silent", "one left", "all zero", "all mean")


@functools.cache
def _all_losses(layer: int) -> tuple[float, list[float], list[float], float, float, float]:
    """The toy's losses: whole, with one head of the layer silent, with one left, all at zero, at their means, and at
    means over the padding, too."""
    model, tokenizer = load("toy")
    assert tokenizer is not None
    batches = story_validation(tokenizer, 20, seed=0).batches
    heads = [(layer, head) for head in range(model.config.n_heads)]
    with torch.no_grad(), record(model, "heads") as seen:
        model(batches[0].inputs)
    real = batches[0].inputs != tokenizer.pad_id

    def loss(silent: list[tuple[int, int]], means: Tensor | None = None) -> float:
        with ablate(model, heads=silent, means=means):
            return mean_loss(model, batches)

    one = [loss([head]) for head in heads]
    left = [loss([other for other in heads if other != head]) for head in heads]
    return (loss([]), one, left, loss(heads), loss(heads, seen.heads[:, real].mean(1)),
            loss(heads, seen.heads.mean((1, 2))))  # fmt: skip


def _losses(*, layer: int = LAYER, padding: bool = False, other: bool = False) -> dict[str, float]:
    """What is asked for. padding: it counts in the means. other: the other extreme of the eight."""
    whole, one, left, zero, mean, padded = _all_losses(layer)
    most, least = (min, max) if other else (max, min)
    return dict(zip(_KEYS, (whole, most(one), least(left), zero, padded if padding else mean), strict=True))


_WHAT = {
    "loss": "measure the toy as it is loaded, in fp32, with no head silent.",
    "one silent": "silence one head of the layer at a time, by zeros, and take the largest of the eight losses.",
    "one left": "silence seven of the eight heads, by zeros, in all eight ways, and take the smallest loss.",
    "all zero": "silence all eight heads of the layer, by zeros, and no other layer's.",
    "all mean": "let all eight heads of the layer say their mean over the tokens of the 20 stories, at every place.",
}


def _near(measured: dict[str, Any], true: dict[str, float]) -> list[str]:
    """The keys whose numbers differ."""
    return [key for key, value in true.items() if abs(measured[key] - value) > 3e-4 * value]


def _verify(measured: dict[str, Any]) -> str:
    if not measured["predicted"] > 0:
        return f"the prediction is {measured['predicted']}, expected a loss in nats per token, above 0."
    true = _losses()
    different = _near(measured, true)
    if not different:
        return ""
    if not _near(measured, {key: math.exp(value) for key, value in true.items()}):
        return "these are perplexities, expected losses in nats per token, their logarithms."
    exact = true["loss"]
    if not _near({key: measured[key] + exact for key in _KEYS[1:]}, {key: true[key] for key in _KEYS[1:]}):
        return "these are distances to the loss of the whole model, expected the losses themselves."
    for message, other in _OTHERS.items():
        if not _near(measured, _losses(**other)):
            return message
    return f"{different[0]!r} is not what the 20 stories of seed 0 give: {_WHAT[different[0]]}"


_OTHERS: dict[str, dict[str, Any]] = {
    "these are the losses with heads of the first layer silent: layers are counted from 0.": {"layer": 0},
    "the means are over the padding as well: take only the tokens of the stories.": {"padding": True},
    "of the eight ways the wrong extreme is taken: the largest loss with one head silent, the smallest with one left.":
        {"other": True},
}  # fmt: skip

EXPERIMENT = Experiment(
    "11.7", "experiment: a head, and its layer", "measured_11", minutes=25, difficulty=3,
    why="A head whose loss nobody notices may still do what others do as well: only measuring them together shows it.",
    keys={
        "predicted": "the loss that you expect with all heads of layer 1 silent, in nats per token, before you measure",
        "loss": "the loss with no head silent, in nats per token",
        "one silent": "the largest loss with one of the eight heads silent, in nats per token",
        "one left": "the smallest loss with only one of the eight heads left, in nats per token",
        "all zero": "the loss with all eight heads saying zero, in nats per token",
        "all mean": "the loss with all eight heads saying their mean, in nats per token",
        "because": "a sentence on why",
    },
    verify=_verify,
    explain="on why single heads cost so much less than their layer",
    hints=(
        "If two heads do the same, what does the loss say about each of them when it is cut alone?",
        "A hook on what `wo` of layer 1 is given sees (B, T, H·D). Change chosen heads in a copy, and measure; remove "
        "the hook, and choose others.",
        "means: one pass, tokens that are not padding · for each choice of heads: hook with `ablate` or your own, "
        "mean_loss · largest of eight, smallest of eight, all with zero, all with means.",
    ),
)  # fmt: skip


EXERCISES: list[Task] = [RECORD, INDUCTION, ROLLOUT, LENS, SILENCE, PATCH, EXPERIMENT]
