"""Exercises of chapter 07, the model."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minillama.checkpoint import load
from minillama.config import ModelConfig
from minillama.course.exercise import Exercise, Experiment, Task, Wrong
from minillama.data import story_validation
from minillama.model import Llama
from minillama.rope import rotation
from minillama.trainer import mean_loss

Weights = dict[str, Tensor]
_NAMES = {
    "attention_norm": "attention_norm.weight", "wq": "attention.wq.weight", "wk": "attention.wk.weight",
    "wv": "attention.wv.weight", "wo": "attention.wo.weight", "feedforward_norm": "feedforward_norm.weight",
    "gate": "feedforward.gate.weight", "up": "feedforward.up.weight", "down": "feedforward.down.weight",
}  # fmt: skip


def _model(rng: torch.Generator, layers: int, heads: int, kv: int, head_dim: int, dim: int, tied: bool, eps: float,
           theta: float) -> Llama:  # fmt: skip
    config = ModelConfig(
        dim=dim, n_layers=max(layers, 1), n_heads=heads, n_kv_heads=kv, head_dim=head_dim, ffn_dim=dim + 6,
        vocab_size=23, max_seq_len=32, norm_eps=eps, rope_theta=theta, tie_embeddings=tied,
    )  # fmt: skip
    model = Llama(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=rng) * 0.5)
    return model.requires_grad_(False)


def _layer(model: Llama, i: int) -> Weights:
    state = model.state_dict()
    return {short: state[f"blocks.{i}.{name}"] for short, name in _NAMES.items()}


def _shape(model: Llama) -> dict[str, Any]:
    c = model.config
    return {"n_heads": c.n_heads, "n_kv_heads": c.n_kv_heads, "head_dim": c.head_dim, "eps": c.norm_eps,
            "theta": c.rope_theta}  # fmt: skip


# A second implementation, in which each step can be replaced by a wrong one. -----------------------------------------


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def _heads(x: Tensor, n: int) -> Tensor:
    return x.unflatten(-1, (n, -1)).transpose(1, 2)


def _turn(x: Tensor, theta: float, halves: bool = False) -> Tensor:
    D = x.shape[-1]
    angles = torch.arange(x.shape[2])[:, None] * theta ** (-torch.arange(0, D, 2) / D)
    a, b = x.chunk(2, -1) if halves else (x[..., 0::2], x[..., 1::2])
    pair = [a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()]
    return torch.cat(pair, -1) if halves else torch.stack(pair, -1).flatten(-2)


def _attend(x: Tensor, w: Weights, s: dict[str, Any], *, causal: bool = True, turn: bool = True, tile: bool = False,
            halves: bool = False, values: bool = False, apart: bool = False) -> Tensor:  # fmt: skip
    q, k, v = _heads(x @ w["wq"].mT, s["n_heads"]), *(_heads(x @ w[n].mT, s["n_kv_heads"]) for n in ("wk", "wv"))
    if turn:
        q, k = _turn(q, s["theta"], halves), _turn(k, s["theta"], halves)
    if values:
        v = _turn(v, s["theta"])
    groups = s["n_heads"] // s["n_kv_heads"]
    k, v = (y.repeat(1, groups, 1, 1) if tile else y.repeat_interleave(groups, 1) for y in (k, v))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    if apart:  # (B, H, T, D), cut into T rows as it lies
        return y.reshape(*x.shape[:2], -1) @ w["wo"].mT
    return y.transpose(1, 2).flatten(2) @ w["wo"].mT


def _feed(x: Tensor, w: Weights, gate: str = "gate", up: str = "up") -> Tensor:
    return (F.silu(x @ w[gate].mT) * (x @ w[up].mT)) @ w["down"].mT


def _block(x: Tensor, w: Weights, s: dict[str, Any], *, order: str = "right", swapped: bool = False,
           up: bool = False, fixed: dict[str, float] | None = None, **how: bool) -> Tensor:  # fmt: skip
    s = s | (fixed or {})
    first, second = ("feedforward_norm", "attention_norm") if swapped else ("attention_norm", "feedforward_norm")
    a = _norm(x, w[first], s["eps"])
    if order == "parallel":
        return x + _attend(a, w, s, **how) + _feed(_norm(x, w[second], s["eps"]), w)
    if order == "from the normed":
        x = a + _attend(a, w, s, **how)
        b = _norm(x, w[second], s["eps"])
        return b + _feed(b, w)
    if order == "no residual":
        x = _attend(a, w, s, **how)
        return _feed(_norm(x, w[second], s["eps"]), w)
    came, x = x, x + _attend(a, w, s, **how)
    if order == "one norm":
        return x + _feed(x, w)
    b = _norm(x, w[second], s["eps"])
    return (came if order == "attention lost" else x) + (_feed(b, w, "up", "gate") if up else _feed(b, w))


# 07.1 ----------------------------------------------------------------------------------------------------------------


def _block_cases(rng: torch.Generator) -> Iterable[tuple[Any, ...]]:
    # Nothing is added, attention alone, the feed-forward layer alone, then all. x is large and so is eps: it must be
    # felt, while 1e-5, 1e-6 and nothing at all in its place give the same.
    for B, T, heads, kv, head_dim, dim, eps, theta, without in (
        (1, 3, 6, 2, 4, 11, 0.5, 100.0, ("wo", "down")), (2, 5, 6, 2, 4, 14, 0.5, 100.0, ("down",)),
        (2, 3, 4, 2, 6, 9, 1.0, 50.0, ("wo",)), (2, 5, 6, 2, 4, 14, 0.5, 100.0, ()), (1, 1, 2, 1, 6, 5, 1.0, 300.0, ()),
        (3, 4, 4, 4, 2, 9, 0.3, 50.0, ()), (1, 7, 6, 3, 8, 10, 1.0, 20.0, ()),
    ):  # fmt: skip
        layer_of = _model(rng, 1, heads, kv, head_dim, dim, True, eps, theta)
        w = _layer(layer_of, 0)
        w |= {name: torch.zeros_like(w[name]) for name in without}
        yield 3 * torch.randn(B, T, dim, generator=rng), w, _shape(layer_of)


def _block_reference(x: Tensor, w: Weights, s: dict[str, Any]) -> Tensor:
    dim = x.shape[-1]
    config = ModelConfig(
        dim=dim, n_layers=1, n_heads=s["n_heads"], n_kv_heads=s["n_kv_heads"], head_dim=s["head_dim"],
        ffn_dim=w["gate"].shape[0], vocab_size=8, max_seq_len=64, norm_eps=s["eps"], rope_theta=s["theta"],
    )  # fmt: skip
    model = Llama(config)
    model.blocks[0].load_state_dict({name: w[short] for short, name in _NAMES.items()})
    with torch.no_grad():
        return model.blocks[0](x, rotation(model.frequency, torch.arange(x.shape[1])), None)


def _wrong(**how: Any) -> Callable[..., Tensor]:
    return lambda x, w, s: _block(x, w, s, **how)


BLOCK = Exercise(
    "07.1", "block", "block", minutes=20, difficulty=3,
    why="A LLaMA is this, 32 to 126 times over.",
    reference=_block_reference,
    cases=_block_cases,
    wrong=(
        Wrong("both parts read the stream as it came in: the second reads what the first has added.",
              _wrong(order="parallel")),
        Wrong("the residual starts from the normed vector: add to the stream as it came in.",
              _wrong(order="from the normed")),
        Wrong("there is no residual: what came in is lost.", _wrong(order="no residual")),
        Wrong("the feed-forward layer reads the stream without a norm.", _wrong(order="one norm")),
        Wrong("the two norms are exchanged.", _wrong(swapped=True)),
        Wrong("the future is not hidden.", _wrong(causal=False)),
        Wrong("queries and keys are not turned: the block does not know where a token stands.", _wrong(turn=False)),
        Wrong("key/value heads are tiled: heads of a group are neighbours, so repeat each one in its place.",
              _wrong(tile=True)),
        Wrong("what attention added is lost: the second addition goes on top of the first.",
              _wrong(order="attention lost")),
        Wrong("the values are turned too: only queries and keys are, a value says what, not where.",
              _wrong(values=True)),
        Wrong("a rotary pair is taken half a head apart: here the numbers 2i and 2i + 1 are a pair.",
              _wrong(halves=True)),
        Wrong("the heads' results are cut up as they lie, (B, H, T, D): put each token's heads side by side first.",
              _wrong(apart=True)),
        Wrong("SiLU is on the up branch: it bends the gate.", _wrong(up=True)),
        Wrong("the norms do not use the eps of s: it is a setting of the model, and another one in each case.",
              _wrong(fixed={"eps": 1e-6})),
        Wrong("theta is fixed at 10,000: it is a setting of the model, take the one in s.",
              _wrong(fixed={"theta": 10_000.0})),
    ),
    hints=(
        "How many things does a block add to its input, and what does each of them read?",
        "Norm, attention, add; norm, feed-forward, add. The stream itself is never normed.",
        "x plus attention of the first norm of x · then that plus feed-forward of the second norm of it. In attention: "
        "heads apart · queries and keys turned · keys and values repeated · shares of the past · heads rejoined · wo.",
    ),
    blocked=("minillama.model.Block.forward", "minillama.attention.Attention.forward"),
)  # fmt: skip


# 07.2 ----------------------------------------------------------------------------------------------------------------


def _model_cases(rng: torch.Generator) -> Iterable[tuple[Any, ...]]:
    # No layers at all, one, then more. The embeddings are large and so is eps, for the reason given above.
    for B, T, layers, heads, kv, head_dim, dim, tied, eps in (
        (2, 3, 0, 6, 2, 4, 12, True, 0.5), (2, 1, 1, 4, 2, 2, 9, False, 1.0), (2, 5, 2, 6, 2, 4, 14, True, 0.5),
        (1, 4, 3, 2, 1, 6, 5, False, 1.0), (1, 6, 2, 6, 3, 8, 10, True, 0.3),
    ):  # fmt: skip
        model = _model(rng, layers, heads, kv, head_dim, dim, tied, eps, 100.0)
        model.embedding.weight.mul_(4)
        tokens = torch.randint(23, (B, T), generator=rng)
        state = {"embedding": model.embedding.weight.clone(), "norm": model.norm.weight.clone()}
        if model.output is not None:
            state["output"] = model.output.weight.clone()
        yield tokens, state, [_layer(model, i) for i in range(layers)], _shape(model)


def _logits(tokens: Tensor, state: Weights, layers: list[Weights], s: dict[str, Any], *, last_norm: bool = True,
            tie: bool | None = None, reverse: bool = False, first_only: bool = False, last_only: bool = False,
            scale: bool = False, twice: bool = False, inside: bool = False, eps: float | None = None,
            softmax: bool = False) -> Tensor:  # fmt: skip
    x = state["embedding"][tokens]
    if scale:
        x = x * math.sqrt(x.shape[-1])
    chosen = list(reversed(layers)) if reverse else layers[:1] * len(layers) if first_only else layers
    for w in chosen[-1:] if last_only else chosen:
        x = (x if twice else 0) + _block(x, w, s)
        if inside:
            x = _norm(x, state["norm"], s["eps"])
    if last_norm:
        x = _norm(x, state["norm"], s["eps"] if eps is None else eps)
    tied = "output" not in state if tie is None else tie
    scores = x @ (state["embedding"] if tied or "output" not in state else state["output"]).mT
    return scores.softmax(-1) if softmax else scores


def _reference(tokens: Tensor, state: Weights, layers: list[Weights], s: dict[str, Any]) -> Tensor:
    config = ModelConfig(
        dim=state["embedding"].shape[1], n_layers=max(len(layers), 1), n_heads=s["n_heads"],
        n_kv_heads=s["n_kv_heads"], head_dim=s["head_dim"], ffn_dim=layers[0]["gate"].shape[0] if layers else 8,
        vocab_size=state["embedding"].shape[0], max_seq_len=64, norm_eps=s["eps"], rope_theta=s["theta"],
        tie_embeddings="output" not in state,
    )  # fmt: skip
    model = Llama(config)
    model.blocks = model.blocks[: len(layers)]
    named = {f"{name}.weight": tensor for name, tensor in state.items()}
    for i, w in enumerate(layers):
        named |= {f"blocks.{i}.{name}": w[short] for short, name in _NAMES.items()}
    model.load_state_dict(named)
    with torch.no_grad():
        return model(tokens)


def _wrong_model(**how: Any) -> Callable[..., Tensor]:
    return lambda tokens, state, layers, s: _logits(tokens, state, layers, s, **how)


WHOLE = Exercise(
    "07.2", "the whole model", "logits", minutes=25, difficulty=4,
    why="From token ids to a score for every token: after this, nothing of LLaMA is left that you have not written.",
    reference=_reference,
    cases=_model_cases,
    wrong=(
        Wrong("the last norm is missing: the stream is normed once more before it is scored.",
              _wrong_model(last_norm=False)),
        Wrong("the output is the embedding table although the model has an output of its own.", _wrong_model(tie=True)),
        Wrong("the layers run in reverse.", _wrong_model(reverse=True)),
        Wrong("the first layer runs every time: each layer has weights of its own.", _wrong_model(first_only=True)),
        Wrong("the embeddings are scaled by the root of dim: the Transformer of 2017 did so, LLaMA does not.",
              _wrong_model(scale=True)),
        Wrong("only the last layer counts: each one reads what the one before it gave, not the embeddings.",
              _wrong_model(last_only=True)),
        Wrong("the stream is added once more to what a block gives: a block has done that itself.",
              _wrong_model(twice=True)),
        Wrong("the last norm is taken after every layer: the stream is normed once, behind the last one.",
              _wrong_model(inside=True, last_norm=False)),
        Wrong("the last norm does not use the eps of s.", _wrong_model(eps=1e-6)),
        Wrong("these are probabilities, expected the scores themselves (logits), before any softmax.",
              _wrong_model(softmax=True)),
    ),
    hints=(
        "What shape has the stream before the first block, and what shape behind the last one?",
        "Look the tokens up, run the blocks in order, norm, and compare with every row of the output's table.",
        "rows of the tokens · loop over layers with your block · last norm · product with the output table, turned.",
    ),
    tolerance=2e-5,
    blocked=("minillama.model.Llama.forward", "minillama.model.Block.forward"),
)  # fmt: skip


# 07.3 ----------------------------------------------------------------------------------------------------------------


_FIELDS = ("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "ffn_dim", "vocab_size", "tie_embeddings")


def _count_cases(rng: torch.Generator) -> Iterable[tuple[Any, ...]]:
    for name in ("toy", "llama-7b", "llama-30b", "llama2-70b", "llama3-8b", "llama3.2-1b", "smollm2-135m"):
        yield ({key: getattr(ModelConfig.preset(name), key) for key in _FIELDS},)
    odd = torch.randint(1, 9, (4,), generator=rng).tolist()
    yield (dict(zip(_FIELDS, [8 * odd[0], odd[1], 6, 2, 2 * odd[2], 16 * odd[3], 100, True], strict=True)),)


def _count(c: dict[str, Any], *, heads: str = "n_kv_heads", last: int = 1, width: str = "head_dim",
           tied: bool | None = None, bias: bool = False, norms: int = 2, matrices: int = 3, square: bool = False,
           wo: bool = False, once: bool = False) -> dict[str, int]:  # fmt: skip
    if once:
        c = c | {"n_layers": 1}
    D = c["head_dim"] if width == "head_dim" else c["dim"] // c["n_heads"]
    one = c["tie_embeddings"] if tied is None else tied
    attention = 4 * c["dim"] ** 2 if square else 2 * c["dim"] * D * (c["n_heads"] + c[heads])
    attention += wo * c["dim"] * (c["dim"] - D * c["n_heads"]) + bias * (D * (c["n_heads"] + 2 * c[heads]) + c["dim"])
    return {
        "embedding": c["vocab_size"] * c["dim"],
        "attention": c["n_layers"] * attention,
        "feedforward": c["n_layers"] * matrices * c["dim"] * c["ffn_dim"],
        "norms": (norms * c["n_layers"] + last) * c["dim"],
        "output": 0 if one else c["vocab_size"] * c["dim"],
    }


COUNT = Exercise(
    "07.3", "parameters by part", "count_parameters", minutes=10, difficulty=2,
    why="6,738,415,616 must come out for 7B, to the last one: a count that is nearly right has forgotten something.",
    reference=_count,
    cases=_count_cases,
    wrong=(
        Wrong("keys and values were counted for n_heads: with grouped queries there are n_kv_heads of them.",
              lambda c: _count(c, heads="n_heads")),
        Wrong("the last norm was forgotten.", lambda c: _count(c, last=0)),
        Wrong("a head was taken to be dim / n_heads wide: head_dim is a setting of its own.",
              lambda c: _count(c, width="dim")),
        Wrong("a tied output was counted: it is the embedding table again.", lambda c: _count(c, tied=False)),
        Wrong("an output of its own was not counted.", lambda c: _count(c, tied=True)),
        Wrong("biases were counted: LLaMA's projections have none.", lambda c: _count(c, bias=True)),
        Wrong("attention was counted as four matrices of dim by dim: their other side is heads times head_dim.",
              lambda c: _count(c, square=True)),
        Wrong("wo was counted as dim by dim: it reads what all heads give, n_heads times head_dim numbers.",
              lambda c: _count(c, wo=True)),
        Wrong("two matrices were counted in a feed-forward layer: SwiGLU has a third, the gate.",
              lambda c: _count(c, matrices=2)),
        Wrong("one norm was counted for a layer: attention and feed-forward have one each.",
              lambda c: _count(c, norms=1)),
        Wrong("one layer was counted: there are n_layers of them.", lambda c: _count(c, once=True)),
    ),
    hints=(
        "Which tensors does one block have, and what is the shape of each?",
        "Count a block, multiply by the layers; then the table, the last norm, and the output if it is not tied.",
        "wq and wo with n_heads, wk and wv with n_kv_heads, dim by heads times head_dim · three of dim by ffn_dim.",
    ),
    tolerance=0.0,
    blocked=("minillama.config.ModelConfig.n_params", "minillama.config.ModelConfig.n_params_by_part"),
)  # fmt: skip


# 07.4 ----------------------------------------------------------------------------------------------------------------

STD = Exercise(
    "07.4", "residual init", "residual_std", minutes=10, difficulty=2,
    why="Sixty additions of the same size make the stream eight times as large; small beginnings keep it level.",
    reference=lambda n_layers, std: std / math.sqrt(2 * n_layers),
    cases=lambda rng: [(1, 0.02), (12, 0.02), (32, 0.02), (80, 0.01), (4, 1.0),
                       (int(torch.randint(5, 60, (1,), generator=rng)), 0.3)],
    wrong=(
        Wrong("a block writes into the stream twice, so there are 2 · n_layers additions, not n_layers.",
              lambda n_layers, std: std / math.sqrt(n_layers)),
        Wrong("the root is missing: variances add up, not standard deviations.",
              lambda n_layers, std: std / (2 * n_layers)),
        Wrong("it grows with depth: the deeper the model, the smaller each addition must be.",
              lambda n_layers, std: std * math.sqrt(2 * n_layers)),
        Wrong("that is the variance, expected the standard deviation.",
              lambda n_layers, std: std**2 / (2 * n_layers)),
    ),
    hints=(
        "Add n independent numbers of variance 1: which variance has the sum?",
        "All additions together shall have the size that one of them had: divide the standard deviation accordingly.",
        "two additions a layer · the root of their number · std over it.",
    ),
    tolerance=1e-9,
)  # fmt: skip


# 07.5 ----------------------------------------------------------------------------------------------------------------


def _losses() -> list[float]:
    """The toy's loss with nothing left out, then without each of its layers."""
    model, tokenizer = load("toy")
    assert tokenizer is not None
    batches = story_validation(tokenizer, 20, seed=0).batches
    blocks = list(model.blocks)
    losses = [mean_loss(model, batches)]
    for i in range(len(blocks)):
        model.blocks = torch.nn.ModuleList(blocks[:i] + blocks[i + 1 :])
        losses.append(mean_loss(model, batches))
    return losses


def _verify(measured: dict[str, Any]) -> str:
    true = _losses()
    if abs(measured["loss"] - true[0]) > 0.02 * true[0]:
        return "'loss' is not the mean loss of the untouched toy on the 20 stories of seed 0."
    given = list(measured["without"])
    if len(given) != len(true) - 1:
        return f"'without' has {len(given)} losses, expected {len(true) - 1}: one for each layer that is left out."
    for i, (found, right) in enumerate(zip(given, true[1:], strict=True)):
        if not abs(found - right) <= 0.03 * right:
            return f"without layer {i} the loss is another one than {found:.3f}: leave out that layer and no other."
    if measured["predicted"] not in range(len(given)):
        return f"the prediction is {measured['predicted']!r}, expected the number of a layer, 0 to {len(given) - 1}."
    return ""


EXPERIMENT = Experiment(
    "07.5", "experiment: leave a layer out", "measured_07", minutes=25, difficulty=3,
    why="All layers read and write the same stream, so any of them can be left out; what that costs says what it did.",
    keys={
        "predicted": "the number of the layer whose absence you expect to cost most, written before you measure",
        "loss": "the toy's loss on 20 stories, in nats per token",
        "without": "a list: the loss without layer 0, without layer 1, and so on",
        "because": "a sentence on why",
    },
    verify=_verify,
    explain="on what the other layers expect to find",
    hints=(
        "Which layer's output do all the others build on?",
        "model.blocks is a list of modules; a list with one of them missing is a model too.",
        "nn.ModuleList of all blocks but one · mean_loss on story_validation(tokenizer, 20, seed=0) · next one.",
    ),
)  # fmt: skip


EXERCISES: list[Task] = [BLOCK, WHOLE, COUNT, STD, EXPERIMENT]
