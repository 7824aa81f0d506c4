"""Exercises of chapter 05, feed-forward."""

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minillama.checkpoint import load
from minillama.config import ModelConfig
from minillama.course.exercise import Exercise, Experiment, Task, Wrong
from minillama.data import story_validation
from minillama.trainer import mean_loss

# 05.1 ----------------------------------------------------------------------------------------------------------------


def _firm(x: Tensor) -> Tensor:
    """The numbers whose SiLU lies so far from the middle between two numbers of their dtype that the last bits of fp32
    (a product, or a division) do not matter."""
    result = F.silu(x.double())
    return x[(result * (1 - 1e-6)).to(x.dtype) == (result * (1 + 1e-6)).to(x.dtype)]


def _silu_cases(rng: torch.Generator) -> Iterable[tuple[Any, ...]]:
    x = torch.randn(3, 5, generator=rng) * 3
    return [
        (x,),
        (torch.tensor([-1e4, -200.0, -90.0, -1.0, 0.0, 1.0, 90.0, 200.0, 1e4]),),
        (_firm((torch.randn(60, generator=rng) * 4).bfloat16())[:28].view(4, 7),),
        (_firm((torch.randn(99, generator=rng) * 2).bfloat16())[:66].view(2, 33),),
        (torch.tensor([-300.0, -12.0, 11.5, 250.0], dtype=torch.float16),),
        (torch.randn(6, generator=rng, dtype=torch.float64),),
        (torch.tensor([-1e39, -50.0, 0.5, 1e39], dtype=torch.float64),),  # fp32 ends at 3.4e38
        (torch.randn(0, 4, generator=rng),),
        (torch.tensor(-0.7),),
    ]


def _widened(x: Tensor, f: Any) -> Tensor:
    """f in fp32 for the half dtypes, then rounded once."""
    return f(x if x.dtype == torch.float64 else x.float()).to(x.dtype)


SILU = Exercise(
    "05.1", "SiLU", "silu", minutes=10, difficulty=1,
    why="The bend in every LLaMA's feed-forward layer; written carelessly, it makes NaN of a large number.",
    reference=lambda x: _widened(x, F.silu),
    cases=_silu_cases,
    wrong=(
        Wrong("that is the sigmoid alone: SiLU is x times it.", lambda x: _widened(x, torch.sigmoid)),
        Wrong("that is GELU: close to SiLU, and another function.", lambda x: _widened(x, F.gelu)),
        Wrong("that is ReLU: SiLU is smooth and goes below zero a little.", lambda x: _widened(x, torch.relu)),
        Wrong("a large input becomes NaN: an exponential overflows, and infinity is divided by infinity.",
              lambda x: _widened(x, lambda y: y * y.exp() / (1 + y.exp()))),
        Wrong("the sigmoid's input is scaled by 1.702: that is a fast stand-in for GELU.",
              lambda x: _widened(x, lambda y: y * torch.sigmoid(1.702 * y))),
        Wrong("in bf16 and fp16 it is rounded at every step: compute in fp32 and round once.",
              lambda x: x / (1 + torch.exp(-x))),
        Wrong("in bf16 and fp16 the sigmoid is rounded before it multiplies: stay in fp32 until the product is made.",
              lambda x: x * torch.sigmoid(x)),
        Wrong("float64 is narrowed to fp32, where the largest numbers do not fit: widen the half dtypes only.",
              lambda x: F.silu(x.float()).to(x.dtype)),
        Wrong("the sign in the exponent is turned round: the gate opens where x is negative, and must open where it is "
              "positive.",
              lambda x: _widened(x, lambda y: y * torch.sigmoid(-y))),
    ),
    hints=(
        "How large is 1 / (1 + e^-x) for a very large x, and for a very small one, and where does e^… overflow?",
        "x times the sigmoid of x; of the two ways to write a sigmoid, one stays right where e^… is infinite.",
        "widen the half dtypes to fp32 · x divided by (1 + e to the minus x) · back to the input's dtype.",
    ),
    tolerance=1e-6,
    part="silu",
    blocked=("torch.nn.functional.silu", "torch.sigmoid", "torch.Tensor.sigmoid", "torch.nn.functional.sigmoid",
             "torch.nn.SiLU.forward"),
)  # fmt: skip


# 05.2 ----------------------------------------------------------------------------------------------------------------


def _swiglu_cases(rng: torch.Generator) -> Iterable[tuple[Any, ...]]:
    for shape, dim, width in (((2, 3), 5, 11), ((4,), 6, 7), ((), 3, 4), ((2, 1, 3), 4, 9), ((0,), 5, 8)):
        x = torch.randn(*shape, dim, generator=rng) * 2
        yield x, torch.randn(2 * width, dim, generator=rng), torch.randn(dim, width, generator=rng)
    gate_up, down = torch.randn(10, 3, generator=rng), torch.randn(3, 5, generator=rng)
    yield 200 * gate_up[:4].sign(), gate_up, down  # large gates of both signs: e^gate overflows


def _parts(x: Tensor, gate_up: Tensor) -> tuple[Tensor, Tensor]:
    gate, up = F.linear(x, gate_up).chunk(2, -1)
    return gate, up


def _swapped(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = _parts(x, gate_up)
    return (gate * F.silu(up)) @ down.mT


def _interleaved(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    both = F.linear(x, gate_up)
    return (F.silu(both[..., 0::2]) * both[..., 1::2]) @ down.mT


def _with(bend: Any) -> Any:
    """The layer with another bend for the gate."""

    def layer(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        gate, up = _parts(x, gate_up)
        return (bend(gate) * up) @ down.mT

    return layer


def _on_product(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = _parts(x, gate_up)
    return F.silu(gate * up) @ down.mT


def _no_up(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    return F.silu(_parts(x, gate_up)[0]) @ down.mT


def _added(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = _parts(x, gate_up)
    return (F.silu(gate) + up) @ down.mT


def _both(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = _parts(x, gate_up)
    return (F.silu(gate) * F.silu(up)) @ down.mT


SWIGLU = Exercise(
    "05.2", "SwiGLU in two products", "swiglu", minutes=15, difficulty=2,
    why="Two thirds of a LLaMA's weights work here; fast engines read gate and up as one matrix.",
    reference=_with(F.silu),
    cases=_swiglu_cases,
    wrong=(
        Wrong("the activation is on the up half: it belongs on the gate's, which is the first.", _swapped),
        Wrong("the activation is on the product: only the gate goes through it.", _on_product),
        Wrong("the gate goes through a sigmoid: that is GLU; SwiGLU's gate goes through SiLU.", _with(torch.sigmoid)),
        Wrong("the gate goes through GELU: that is GEGLU; SwiGLU's gate goes through SiLU.", _with(F.gelu)),
        Wrong("the gate goes through ReLU: that is ReGLU; SwiGLU's gate goes through SiLU.", _with(F.relu)),
        Wrong("the gate multiplies as it is, without a bend: that is the bilinear layer; SwiGLU's gate goes through "
              "SiLU.", _with(lambda gate: gate)),
        Wrong("a large gate becomes NaN: an exponential overflows, and infinity is divided by infinity.",
              _with(lambda gate: gate * gate.exp() / (1 + gate.exp()))),
        Wrong("x is added to the result: that addition belongs to the block around the layer.",
              lambda x, gate_up, down: x + _with(F.silu)(x, gate_up, down)),
        Wrong("the up half is missing: without it, it is a plain MLP.", _no_up),
        Wrong("gate and up are added, not multiplied.", _added),
        Wrong("both halves go through the activation: only the gate does.", _both),
        Wrong("gate and up were taken from every second row: the first half of the rows is the gate.",
              _interleaved),
    ),
    hints=(
        "Which of the two wide vectors decides how much passes, and which one says what passes?",
        "Project x once with the tall matrix, cut the result in two, bend the first half, multiply, project back.",
        "weights are (out, in), so each product is with a transposed weight · halves · SiLU on the first · down.",
    ),
    part="feedforward",
    blocked=("minillama.feedforward.FeedForward.forward", "torch.nn.functional.glu"),
)  # fmt: skip


# 05.3 ----------------------------------------------------------------------------------------------------------------


def _width_cases(rng: torch.Generator) -> Iterable[tuple[Any, ...]]:
    published = [
        (4096, 3, 256, 1.0), (5120, 3, 256, 1.0), (6656, 3, 256, 1.0), (8192, 3, 256, 1.0), (8192, 3, 4096, 1.3),
        (4096, 3, 1024, 1.3), (16384, 3, 4096, 1.2), (768, 2, 1, 1.0), (768, 2, 64, 1.0), (100, 3, 1, 1.0),
        (100, 3, 1, 1.3), (98, 3, 1, 1.5), (48, 2, 3, 1.3), (96, 4, 10, 1.2), (77, 1, 7, 1.1),
    ]  # fmt: skip
    drawn = torch.randint(1, 3000, (6,), generator=rng).tolist()
    return published + [(dim, 3, 8 + dim % 7, 1.0 + dim % 5 / 10) for dim in drawn]


def _width(dim: int, matrices: int, multiple_of: int, multiplier: float) -> int:
    return multiple_of * math.ceil(int(multiplier * int(2 * 4 * dim / matrices)) / multiple_of)


WIDTH = Exercise(
    "05.3", "the width of a feed-forward layer", "feedforward_width", minutes=10, difficulty=2,
    why="11,008 looks like a number from nowhere; the rule behind it gives every published width.",
    reference=_width,
    cases=_width_cases,
    wrong=(
        Wrong("it is rounded down to the multiple: the rule rounds up.",
              lambda dim, matrices, multiple_of, multiplier: int(multiplier * int(2 * 4 * dim / matrices))
              // multiple_of * multiple_of),
        Wrong("it is rounded to the nearest multiple: the rule rounds up.",
              lambda dim, matrices, multiple_of, multiplier: multiple_of
              * math.floor(int(multiplier * int(2 * 4 * dim / matrices)) / multiple_of + 0.5)),
        Wrong("a whole multiple is added even where the width already is one.",
              lambda dim, matrices, multiple_of, multiplier: multiple_of
              * (int(multiplier * int(2 * 4 * dim / matrices)) // multiple_of + 1)),
        Wrong("the multiplier comes after the rounding: the result need not be a multiple any more.",
              lambda dim, matrices, multiple_of, multiplier: int(
                  multiplier * _width(dim, matrices, multiple_of, 1.0))),
        Wrong("the width is four times dim whatever the number of matrices: three would cost half as much again.",
              lambda dim, matrices, multiple_of, multiplier: _width(dim, 2, multiple_of, multiplier)),
        Wrong("the multiplier is left out.",
              lambda dim, matrices, multiple_of, multiplier: _width(dim, matrices, multiple_of, 1.0)),
        Wrong("the fair width is not cut before it is multiplied: cut to a whole number first.",
              lambda dim, matrices, multiple_of, multiplier: multiple_of
              * math.ceil(int(multiplier * 2 * 4 * dim / matrices) / multiple_of)),
        Wrong("what the multiplier gives is not cut: even where a multiple is reached, its fraction makes it one more.",
              lambda dim, matrices, multiple_of, multiplier: multiple_of
              * math.ceil(multiplier * int(2 * 4 * dim / matrices) / multiple_of)),
        Wrong("a fraction is rounded to the nearest whole number: the rule cuts it off.",
              lambda dim, matrices, multiple_of, multiplier: multiple_of
              * math.ceil(round(multiplier * round(2 * 4 * dim / matrices)) / multiple_of)),
        Wrong("the width is two thirds of four times dim whatever the number of matrices: that is fair for three only.",
              lambda dim, matrices, multiple_of, multiplier: _width(dim, 3, multiple_of, multiplier)),
        Wrong("the parameters of one matrix were shared out: there are two of dim × 4·dim.",
              lambda dim, matrices, multiple_of, multiplier: _width(dim, 2 * matrices, multiple_of, multiplier)),
    ),
    hints=(
        "Two matrices of dim × 4·dim have 8·dim² numbers. How wide may three matrices be, to have as many?",
        "Share 8·dim among the matrices, cut to a whole number, multiply, cut again, and round up to the multiple.",
        "int of 8·dim / matrices · int of that times multiplier · how many multiples, rounded up · times it.",
    ),
    tolerance=0.0,
    blocked=("minillama.config.llama_ffn_dim",),
)  # fmt: skip


# 05.4 ----------------------------------------------------------------------------------------------------------------

_SHAPE = ("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "ffn_dim", "vocab_size", "tie_embeddings")


def _share_cases(rng: torch.Generator) -> Iterable[tuple[Any, ...]]:
    names = ("toy", "llama-7b", "llama-65b", "llama2-70b", "llama3-8b", "llama3.2-1b", "smollm2-135m")
    for name in names:
        yield ({key: getattr(ModelConfig.preset(name), key) for key in _SHAPE},)
    odd = torch.randint(1, 9, (6,), generator=rng).tolist()
    shape = [8 * odd[0], odd[1], 6, 2, 2 * odd[2], 16 * odd[3], 100 * odd[4], odd[5] % 2 == 0]
    yield (dict(zip(_SHAPE, shape, strict=True)),)


def _share(c: dict[str, Any], *, matrices: int = 3, layers: bool = True, bias: bool = False, tie: bool | None = None,
           grouped: bool = True, norms: bool = True) -> tuple[int, float]:  # fmt: skip
    one = matrices * c["dim"] * c["ffn_dim"] + bias * (2 * c["ffn_dim"] + c["dim"])
    feedforward = one * (c["n_layers"] if layers else 1)
    keys = c["n_kv_heads"] if grouped else c["n_heads"]
    attention = c["n_layers"] * 2 * c["dim"] * c["head_dim"] * (c["n_heads"] + keys)
    tables = c["vocab_size"] * c["dim"] * (1 if (c["tie_embeddings"] if tie is None else tie) else 2)
    rest = attention + tables + norms * (2 * c["n_layers"] + 1) * c["dim"]
    whole = rest + c["n_layers"] * (matrices * c["dim"] * c["ffn_dim"] + bias * (2 * c["ffn_dim"] + c["dim"]))
    return feedforward, feedforward / whole


SHARE = Exercise(
    "05.4", "where the parameters are", "feedforward_share", minutes=10, difficulty=2,
    why="Whoever can count a model's weights can say what it costs, before it is built.",
    reference=_share,
    cases=_share_cases,
    wrong=(
        Wrong("the layer has three matrices, gate, up and down, and two of them were counted.",
              lambda c: _share(c, matrices=2)),
        Wrong("one layer was counted: the model has n_layers of them.", lambda c: _share(c, layers=False)),
        Wrong("biases were counted: LLaMA's projections have none.", lambda c: _share(c, bias=True)),
        Wrong("the output was counted although it is the embedding table again (tie_embeddings).",
              lambda c: _share(c, tie=False)),
        Wrong("an output of its own was left out where the table is not tied.", lambda c: _share(c, tie=True)),
        Wrong("keys and values were counted for n_heads: with grouped queries there are n_kv_heads of them.",
              lambda c: _share(c, grouped=False)),
        Wrong("the share is in percent, expected a number from 0 to 1.",
              lambda c: (_share(c)[0], 100 * _share(c)[1])),
        Wrong("the norms' weights were left out: two vectors a layer, and one at the end.",
              lambda c: _share(c, norms=False)),
    ),
    hints=(
        "Which tensors does one block have, and what is the shape of each?",
        "Feed-forward: three matrices a layer. The rest: attention's four, the norms' vectors, one table or two.",
        "feed-forward of all layers · wq, wo with n_heads, wk, wv with n_kv_heads · 2 norms a layer and 1 · tables.",
    ),
    tolerance=1e-9,
    blocked=("minillama.config.ModelConfig.n_params", "minillama.config.ModelConfig.n_params_by_part"),
)  # fmt: skip


# 05.5 ----------------------------------------------------------------------------------------------------------------

SILENCED = 38  # of the toy's 384 neurons in a layer


def _losses() -> dict[str, float]:
    """The toy's loss with nothing, the strongest and the weakest neurons of the last layer silenced."""
    model, tokenizer = load("toy")
    assert tokenizer is not None
    batches = story_validation(tokenizer, 20, seed=0).batches
    down: Any = model.blocks[-1].feedforward.down  # type: ignore[union-attr]
    seen: list[Tensor] = []
    handle = down.register_forward_pre_hook(lambda layer, given: seen.append(given[0].abs().flatten(0, 1)))
    losses = {"loss": mean_loss(model, batches)}
    handle.remove()
    order = torch.cat(seen).mean(0).argsort(descending=True)
    whole = down.weight.detach().clone()
    for name, chosen in (("strongest", order[:SILENCED]), ("weakest", order[-SILENCED:])):
        with torch.no_grad():
            down.weight.copy_(whole).index_fill_(1, chosen, 0.0)
        losses[name] = mean_loss(model, batches)
    return losses


def _verify(measured: dict[str, Any]) -> str:
    true = _losses()
    for key in ("loss", "strongest", "weakest"):
        if abs(measured[key] - true[key]) > 0.02 * true[key]:
            return f"{key!r} is not what these 20 stories give: {_SUSPECTS[key]}"
    if not measured["predicted"] > 0:
        return f"the prediction is {measured['predicted']}, expected a loss in nats, above 0."
    return ""


_SUSPECTS = {
    "loss": "measure the toy as it is loaded, in fp32, with nothing silenced.",
    "strongest": f"sort by the mean absolute value of what goes into `down`, and silence the {SILENCED} largest.",
    "weakest": f"put the others back first, then silence the {SILENCED} neurons with the smallest mean absolute value.",
}

EXPERIMENT = Experiment(
    "05.5", "experiment: strong and weak neurons", "measured_05", minutes=25, difficulty=3,
    why="A neuron that is loud need not be one that matters; measure what each tenth is worth.",
    keys={
        "predicted": "the loss that you expect without the strongest neurons, in nats per token, written beforehand",
        "loss": "the toy's loss on 20 stories, in nats per token",
        "strongest": "the loss without the strongest tenth of the last layer's neurons, in nats per token",
        "weakest": "the loss without the weakest tenth, in nats per token",
        "because": "a sentence on why",
    },
    verify=_verify,
    explain="on what the strength of a neuron does not say",
    hints=(
        "What goes into `down`, and which of its numbers belong to one neuron?",
        "A forward pre-hook on the last layer's `down` sees (B, T, 384) numbers; average their absolute values over "
        "all positions, then set columns of the weight of `down` to zero.",
        f"hook, one pass, remove it · mean of absolute values · argsort · zero {SILENCED} columns · mean_loss.",
    ),
)  # fmt: skip


EXERCISES: list[Task] = [SILU, SWIGLU, WIDTH, SHARE, EXPERIMENT]
