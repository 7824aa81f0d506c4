"""Exercises of chapter 06, normalization."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minillama import norm
from minillama.checkpoint import load
from minillama.course.exercise import Exercise, Experiment, Task, Wrong
from minillama.data import story_validation
from minillama.trainer import mean_loss


def _vectors(rng: torch.Generator) -> list[Tensor]:
    """Odd sizes; large, small and zero vectors; bf16; none and one."""
    plain = torch.randn(2, 5, 7, generator=rng) + 0.5
    return [
        plain,
        torch.randn(3, 11, generator=rng) * 1e4,
        torch.randn(4, 6, generator=rng) * 1e-3,
        torch.cat([torch.zeros(1, 5), torch.randn(1, 5, generator=rng)]),
        torch.randn(1, generator=rng),
        torch.randn(0, 9, generator=rng),
    ]


# 06.1 ----------------------------------------------------------------------------------------------------------------


def _l2_cases(rng: torch.Generator) -> Iterable[tuple[Any, ...]]:
    return [(x,) for x in _vectors(rng)]


L2 = Exercise(
    "06.1", "L2 norm", "l2_norm", minutes=8, difficulty=1,
    why="The shortest way to fix a vector's size, and the one that RMSNorm is often mistaken for.",
    reference=lambda x: F.normalize(x, dim=-1, eps=1e-12),
    cases=_l2_cases,
    wrong=(
        Wrong("the sum of the absolute values stands where the length should be: that is the L1 norm.",
              lambda x: x / x.abs().sum(-1, keepdim=True).clamp_min(1e-12)),
        Wrong("each vector is divided by its squared length: a root is missing.",
              lambda x: x / x.square().sum(-1, keepdim=True).clamp_min(1e-12)),
        Wrong("the vectors have a root mean square of 1, not a length of 1: a mean was taken where a sum belongs.",
              lambda x: x / x.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-12)),
        Wrong("a vector of zeros becomes NaN: nothing keeps the division from being 0/0.",
              lambda x: x / x.norm(dim=-1, keepdim=True)),
        Wrong("the whole tensor is divided by one length: each vector along the last axis has its own.",
              lambda x: x / x.norm().clamp_min(1e-12)),
    ),
    hints=(
        "What is the length of (3, 4), and what do you divide (3, 4) by to make its length 1?",
        "Take the length along the last axis, keep that axis so that the division lines up, and let no length be zero.",
        "square · sum over the last axis, kept · root · not below 1e-12 · divide.",
    ),
    blocked=("torch.nn.functional.normalize", "minillama.norm.l2_norm"),
)  # fmt: skip


# 06.2 ----------------------------------------------------------------------------------------------------------------


def _layer_norm_cases(rng: torch.Generator) -> Iterable[tuple[Any, ...]]:
    for x in _vectors(rng):
        weight, bias = (torch.randn(x.shape[-1], generator=rng) for _ in range(2))
        yield x, weight, bias, 1e-5
    yield torch.randn(4, 6, generator=rng), torch.randn(6, generator=rng), torch.randn(6, generator=rng), 0.3


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, *, correction: int = 0) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (x.var(-1, keepdim=True, correction=correction) + eps).sqrt() * weight + bias


LAYER_NORM = Exercise(
    "06.2", "LayerNorm", "layer_norm", minutes=10, difficulty=2,
    why="The norm of the first Transformers and of GPT: what RMSNorm left out is seen by building it.",
    reference=lambda x, weight, bias, eps: F.layer_norm(x, x.shape[-1:], weight, bias, eps),
    cases=_layer_norm_cases,
    wrong=(
        Wrong("the variance is the unbiased one, divided by dim - 1: LayerNorm divides by dim.",
              lambda x, weight, bias, eps: _layer_norm(x, weight, bias, eps, correction=1)),
        Wrong("eps is added to the standard deviation: it belongs to the variance, inside the root.",
              lambda x, weight, bias, eps: (x - x.mean(-1, keepdim=True))
              / (x.var(-1, keepdim=True, correction=0).sqrt() + eps) * weight + bias),
        Wrong("the standard deviation is the unbiased one, divided by dim - 1, and eps is added to it: LayerNorm "
              "divides by dim and adds eps to the variance, inside the root.",
              lambda x, weight, bias, eps: (x - x.mean(-1, keepdim=True))
              / (x.std(-1, keepdim=True) + eps) * weight + bias),
        Wrong("eps is missing: a vector whose numbers are all alike becomes NaN.",
              lambda x, weight, bias, eps: _layer_norm(x, weight, bias, 0.0)),
        Wrong("the root is missing: the result is divided by the variance, not by the standard deviation.",
              lambda x, weight, bias, eps: (x - x.mean(-1, keepdim=True))
              / (x.var(-1, keepdim=True, correction=0) + eps) * weight + bias),
        Wrong("mean and variance are taken over the whole tensor: each vector along the last axis has its own.",
              lambda x, weight, bias, eps: (x - x.mean()) / (x.var(correction=0) + eps).sqrt() * weight + bias),
        Wrong("the mean is taken away, but the divisor still measures the sizes with the mean in them: the variance is "
              "the mean square of what is left.",
              lambda x, weight, bias, eps: (x - x.mean(-1, keepdim=True))
              / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight + bias),
        Wrong("the mean is taken out of the divisor only: the vector itself must lose its mean, too.",
              lambda x, weight, bias, eps: x / (x.var(-1, keepdim=True, correction=0) + eps).sqrt() * weight + bias),
        Wrong("the mean is not taken away: that is RMSNorm with a bias.",
              lambda x, weight, bias, eps: x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight + bias),
        Wrong("the bias is missing.",
              lambda x, weight, bias, eps: _layer_norm(x, weight, torch.zeros_like(bias), eps)),
        Wrong("the bias is added before the weight multiplies: the weight must not scale it.",
              lambda x, weight, bias, eps: (_layer_norm(x, torch.ones_like(weight), torch.zeros_like(bias), eps)
                                            + bias) * weight),
    ),
    hints=(
        "After LayerNorm without weight and bias, what are the mean and the variance of a vector's numbers?",
        "Centre along the last axis, divide by the root of the variance plus eps, then scale and shift.",
        "centred = … · variance = mean of centred squared · centred / root(variance + eps) · times weight, plus bias.",
    ),
    blocked=("torch.nn.functional.layer_norm", "torch.layer_norm", "minillama.norm.layer_norm"),
)  # fmt: skip


# 06.3 ----------------------------------------------------------------------------------------------------------------


def _firm(x: Tensor, eps: float) -> Tensor:
    """The rows whose results lie so far from the middle between two bf16 numbers that the last bits of fp32 (a root and
    a division, or one reciprocal root) do not matter."""
    result = x.double() / (x.double().square().mean(-1, keepdim=True) + eps).sqrt()
    return ((result * (1 - 1e-6)).bfloat16() == (result * (1 + 1e-6)).bfloat16()).all(-1)


def _rms_cases(rng: torch.Generator) -> Iterable[tuple[Any, ...]]:
    for x in _vectors(rng):
        yield x, torch.randn(x.shape[-1], generator=rng), 1e-5
    yield torch.randn(4, 6, generator=rng), torch.randn(6, generator=rng), 0.3
    for scale in (1.0, 30.0):  # in bf16 the place of each rounding shows, if the rows are many
        x = (torch.randn(48, 301, generator=rng) * scale).bfloat16()
        yield x[_firm(x, 1e-5)][:24], torch.randn(301, generator=rng).bfloat16(), 1e-5


def _rms_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    layer = norm.RMSNorm(x.shape[-1], eps)
    layer.weight = torch.nn.Parameter(weight)
    return layer(x).detach()


def _rms(x: Tensor, eps: float, inside: bool = True) -> Tensor:
    """1 / root mean square, in fp32."""
    mean = x.float().square().mean(-1, keepdim=True)
    return 1 / ((mean + eps).sqrt() if inside else mean.sqrt() + eps)


RMS_NORM = Exercise(
    "06.3", "RMSNorm", "rms_norm", minutes=15, difficulty=3,
    why="It stands twice in every block of LLaMA, and once at the end; bf16 makes its details matter.",
    reference=_rms_reference,
    cases=_rms_cases,
    wrong=(
        Wrong("eps is missing: a vector of zeros becomes NaN, and small vectors come out too large.",
              lambda x, weight, eps: (x.float() * _rms(x, 0.0)).to(x.dtype) * weight),
        Wrong("eps is added outside of the root: it belongs to the mean of the squares.",
              lambda x, weight, eps: (x.float() * _rms(x, eps, inside=False)).to(x.dtype) * weight),
        Wrong("the squares are summed, not averaged: the result is too small by the root of dim.",
              lambda x, weight, eps: (x.float() / (x.float().square().sum(-1, keepdim=True) + eps).sqrt()).to(x.dtype)
              * weight),
        Wrong("the root is missing: the result is divided by the mean square, not by its root.",
              lambda x, weight, eps: (x.float() * _rms(x, eps).square()).to(x.dtype) * weight),
        Wrong("one mean is taken over the whole tensor: each vector along the last axis has its own.",
              lambda x, weight, eps: (x.float() / (x.float().square().mean() + eps).sqrt()).to(x.dtype) * weight),
        Wrong("the mean is taken away first: that is LayerNorm; RMSNorm leaves the mean in.",
              lambda x, weight, eps: ((x.float() - x.float().mean(-1, keepdim=True))
                                      * _rms(x.float() - x.float().mean(-1, keepdim=True), eps)).to(x.dtype) * weight),
        Wrong("the statistics are computed in the input's own dtype: in bf16 they lose digits; take them in fp32.",
              lambda x, weight, eps: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight),
        Wrong("in bf16 each square is rounded before the mean is taken: widen before you square.",
              lambda x, weight, eps: (x.float() * torch.rsqrt(x.square().float().mean(-1, keepdim=True) + eps))
              .to(x.dtype) * weight),
        Wrong("in bf16 the factor is rounded before it multiplies the vector: stay in fp32 until that is done.",
              lambda x, weight, eps: x * _rms(x, eps).to(x.dtype) * weight),
        Wrong("in bf16 the root mean square is rounded before the vector is divided by it: stay in fp32 until that is "
              "done.",
              lambda x, weight, eps: x / (x.float().square().mean(-1, keepdim=True) + eps).sqrt().to(x.dtype) * weight),
        Wrong("in bf16 the weight multiplies before the rounding: LLaMA rounds to the input's dtype first.",
              lambda x, weight, eps: (x.float() * _rms(x, eps) * weight.float()).to(x.dtype)),
        Wrong("the weight is missing.",
              lambda x, weight, eps: (x.float() * _rms(x, eps)).to(x.dtype)),
    ),
    hints=(
        "Which number do you divide (3, 4) by, if its root mean square shall become 1?",
        "Widen to fp32, average the squares along the last axis, add eps, divide by the root; then think about when to "
        "come back to the input's dtype.",
        "wide = … · mean of squares, kept axis · rsqrt of it plus eps · multiply · back to x.dtype · times weight.",
    ),
    tolerance=2e-6,
    part="norm",
    blocked=("torch.nn.functional.rms_norm", "torch.rms_norm", "torch.nn.RMSNorm.forward",
             "minillama.norm.RMSNorm.forward"),
)  # fmt: skip


# 06.4 ----------------------------------------------------------------------------------------------------------------


def _residual_cases(rng: torch.Generator) -> Iterable[tuple[Any, ...]]:
    for shape in ((2, 5, 7), (1, 3), (0, 4)):
        dim = shape[-1]
        x = torch.randn(*shape, generator=rng) * 3
        yield x, torch.randn(dim, generator=rng), torch.randn(dim, dim, generator=rng), 1e-5
    for scale, eps in ((0.5, 0.7), (1e-3, 1e-5)):  # as small as the root of eps, and a vector of zeros: eps shows
        x = torch.cat([torch.zeros(1, 5), torch.randn(3, 5, generator=rng) * scale])
        yield x, torch.randn(5, generator=rng), torch.randn(5, 5, generator=rng), eps


def _sublayer(x: Tensor, w: Tensor) -> Tensor:
    return torch.tanh(x @ w.mT)


RESIDUAL = Exercise(
    "06.4", "pre-norm residual", "pre_norm_step", minutes=10, difficulty=2,
    why="Where the norm stands decides whether eighty layers can be trained.",
    reference=lambda x, weight, w, eps: x + _sublayer(_rms_reference(x, weight, eps), w),
    cases=_residual_cases,
    wrong=(
        Wrong("the norm is on the stream: after the addition, as in post-norm; in pre-norm nothing touches the stream.",
              lambda x, weight, w, eps: _rms_reference(x + _sublayer(x, w), weight, eps)),
        Wrong("the residual starts from the normed vector: add to the stream as it came in.",
              lambda x, weight, w, eps: _rms_reference(x, weight, eps) + _sublayer(_rms_reference(x, weight, eps), w)),
        Wrong("there is no norm: the sublayer must read the normed stream.",
              lambda x, weight, w, eps: x + _sublayer(x, w)),
        Wrong("there is no residual: what came in is lost.",
              lambda x, weight, w, eps: _sublayer(_rms_reference(x, weight, eps), w)),
        Wrong("the sublayer's output is normed, not its input.",
              lambda x, weight, w, eps: x + _rms_reference(_sublayer(x, w), weight, eps)),
        Wrong("the stream is normed once more after the addition: in pre-norm only the sublayer's copy is normed.",
              lambda x, weight, w, eps: _rms_reference(x + _sublayer(_rms_reference(x, weight, eps), w), weight, eps)),
        Wrong("eps is missing from the norm: a vector of zeros becomes NaN.",
              lambda x, weight, w, eps: x + _sublayer(x * _rms(x, 0.0) * weight, w)),
        Wrong("in the norm, eps is added outside of the root: it belongs to the mean of the squares.",
              lambda x, weight, w, eps: x + _sublayer(x * _rms(x, eps, inside=False) * weight, w)),
        Wrong("the norm's eps is always the same number: it is an argument, and differs from call to call.",
              lambda x, weight, w, eps: x + _sublayer(_rms_reference(x, weight, 1e-5), w)),
        Wrong("the norm's weight is missing.",
              lambda x, weight, w, eps: x + _sublayer(x * _rms(x, eps), w)),
        Wrong("the sublayer's matrix is not transposed: w has its outputs first.",
              lambda x, weight, w, eps: x + _sublayer(_rms_reference(x, weight, eps), w.mT)),
        Wrong("the sublayer's tanh is missing.",
              lambda x, weight, w, eps: x + _rms_reference(x, weight, eps) @ w.mT),
        Wrong("tanh is taken of the sum: it belongs to the sublayer, and the stream goes past it.",
              lambda x, weight, w, eps: torch.tanh(x + _rms_reference(x, weight, eps) @ w.mT)),
    ),
    hints=(
        "If the sublayer gave zeros, what should come out?",
        "The stream goes straight through; a normed copy of it goes into the sublayer, whose output is added.",
        "x plus sublayer of (norm of x); the sublayer is tanh of a product with the transposed weight.",
    ),
)  # fmt: skip


# 06.5 ----------------------------------------------------------------------------------------------------------------


def _loss_without(kind: str) -> float:
    """The toy's loss when the norms of that name no longer divide; none of them for "untouched"."""
    model, tokenizer = load("toy")
    for name, layer in model.named_modules():
        if name.rpartition(".")[2] == kind:
            layer.forward = lambda x, m=layer: x * m.weight
    assert tokenizer is not None
    return mean_loss(model, story_validation(tokenizer, 20, seed=0).batches)


def _verify(measured: dict[str, Any]) -> str:
    kinds = {"loss": "untouched", "without attention norms": "attention_norm", "without the last norm": "norm"}
    for key, kind in kinds.items():
        true = _loss_without(kind)
        if abs(measured[key] - true) > 0.03 * true:
            return f"{key!r} is not the mean loss on the 20 stories of seed 0: {_SUSPECTS[kind]}"
    if not measured["predicted"] > 0:
        return f"the prediction is {measured['predicted']}, expected a loss in nats, above 0."
    return ""


_SUSPECTS = {
    "untouched": "measure the toy as it is loaded, in fp32, before anything is taken out.",
    "attention_norm": "load a fresh toy, change the norm before each attention and no other, and leave the weights in.",
    "norm": "load a fresh toy, change only the norm behind the last block, and leave its weights in.",
}

EXPERIMENT = Experiment(
    "06.5", "experiment: a model without norms", "measured_06", minutes=20, difficulty=3,
    why="What a part is for is seen by taking it out.",
    keys={
        "predicted": "the loss that you expect without the last norm, in nats per token, written before you measure",
        "loss": "the toy's loss on 20 stories, in nats per token",
        "without attention norms": "the loss when the norms before attention no longer divide, in nats per token",
        "without the last norm": "the loss when the norm behind the last block no longer divides, in nats per token",
        "because": "a sentence on why",
    },
    verify=_verify,
    explain="on what the norm kept and now nothing keeps",
    hints=(
        "What does the last norm keep from growing, and what do large numbers do to a softmax?",
        "In a fresh toy, replace the forward of the norms in question by one that only multiplies by the weight.",
        "named_modules() gives each norm's name · set its forward · mean_loss on story_validation(tokenizer, 20, 0).",
    ),
)  # fmt: skip


EXERCISES: list[Task] = [L2, LAYER_NORM, RMS_NORM, RESIDUAL, EXPERIMENT]
