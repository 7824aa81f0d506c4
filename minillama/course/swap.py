"""Put what a learner wrote into a model, in the place of the package's own part."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from minillama.attention import Attention, LayerCache, causal_mask
from minillama.feedforward import FeedForward
from minillama.model import Llama
from minillama.norm import RMSNorm
from minillama.rope import rotate

PARTS = {
    "lookup": "lookup(tokens, table)",
    "logits": "tied_logits(x, table)",
    "frequencies": "rope_frequencies(head_dim, theta)",
    "rotate": "rotate_pairs(x, angles)",
    "split_heads": "split_heads(x, n_heads)",
    "repeat_kv": "repeat_kv(x, n_heads)",
    "scores": "attention_scores(q, k)",
    "mask": "causal_mask(new, total)",
    "softmax": "softmax(scores)",
    "weighted_sum": "weighted_sum(probabilities, v)",
    "attention": "attention(q, k, v)",
    "silu": "silu(x)",
    "feedforward": "swiglu(x, gate_up, down)",
    "norm": "rms_norm(x, weight, eps)",
}


def swap_in(model: Llama, **parts: Callable[..., Any]) -> Llama:
    """A copy of a model in which functions of yours do the work: `swap_in(model, norm=rms_norm, mask=causal_mask)`.

    PARTS lists the names and how each is called. Raises ValueError for a name that is not among them,
    and for a quantized model.
    """
    if unknown := parts.keys() - PARTS.keys():
        raise ValueError(f"the model has no part {min(unknown)!r}, expected one of {', '.join(PARTS)}.")
    if not model.embedding.weight.is_floating_point():
        raise ValueError("the model's weights are quantized, and parts of yours compute with floats: load it without.")
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, RMSNorm) and "norm" in parts:
            _replace(module, lambda x, m=module: parts["norm"](x, m.weight, m.eps))
        if isinstance(module, FeedForward):
            _replace_feedforward(module, parts)
        if isinstance(module, Attention):
            _replace(module, _Attention(module, parts))
    if "frequencies" in parts:
        model.frequency = parts["frequencies"](model.config.head_dim, model.config.rope_theta)
    if "lookup" in parts:
        _replace(model.embedding, lambda tokens: parts["lookup"](tokens, model.embedding.weight))
    if "logits" in parts and model.output is None:
        model.scores = lambda x: parts["logits"](x, model.embedding.weight)  # type: ignore[method-assign]
    return model


def _replace(module: torch.nn.Module, forward: Callable[..., Any]) -> None:
    module.forward = forward


def _replace_feedforward(module: FeedForward, parts: dict[str, Callable[..., Any]]) -> None:
    gate, up, down = module.gate, module.up, module.down
    if "feedforward" in parts:
        _replace(module, lambda x: parts["feedforward"](x, torch.cat([gate.weight, up.weight]), down.weight))
    elif "silu" in parts:
        _replace(module, lambda x: down(parts["silu"](gate(x)) * up(x)))


class _Attention:
    """Attention in single steps, each of which may be the learner's."""

    def __init__(self, layer: Attention, parts: dict[str, Callable[..., Any]]):
        self.layer, self.parts = layer, parts

    def __call__(
        self, x: Tensor, turn: tuple[Tensor, Tensor], mask: Tensor | None = None, cache: LayerCache | None = None
    ) -> Tensor:
        layer = self.layer
        q = self._turned(self._heads(layer.wq(x), layer.n_heads), turn)
        k = self._turned(self._heads(layer.wk(x), layer.n_kv_heads), turn)
        v = self._heads(layer.wv(x), layer.n_kv_heads)
        if cache is not None:
            k, v = cache.append(k, v)
        return layer.wo(self._attend(q, k, v, mask).transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor, n_heads: int) -> Tensor:
        if "split_heads" in self.parts:
            return self.parts["split_heads"](x, n_heads)
        return x.unflatten(-1, (n_heads, -1)).transpose(1, 2)

    def _turned(self, x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        """x (B, H, T, D)"""
        cosines, sines = turn
        if "rotate" in self.parts and cosines.dim() == 3:  # the same positions for all rows of the batch
            angles = torch.atan2(sines, cosines).squeeze(1)
            return self.parts["rotate"](x.transpose(1, 2), angles).transpose(1, 2)
        return rotate(x.transpose(1, 2), turn).transpose(1, 2)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        parts, groups = self.parts, self.layer.n_heads // self.layer.n_kv_heads
        if "attention" in parts and mask is None:
            return parts["attention"](q, k, v)
        if "repeat_kv" in parts:
            k, v = (parts["repeat_kv"](x, self.layer.n_heads) for x in (k, v))
        else:
            k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
        scores = parts["scores"](q, k) if "scores" in parts else q @ k.mT * self.layer.head_dim**-0.5
        if mask is None:
            new, total = q.shape[2], k.shape[2]
            mask = parts["mask"](new, total) if "mask" in parts else causal_mask(new, total, q.device)
        scores = scores.masked_fill(~mask, -torch.inf)
        probabilities = parts["softmax"](scores) if "softmax" in parts else scores.softmax(-1)
        return parts["weighted_sum"](probabilities, v) if "weighted_sum" in parts else probabilities.to(v.dtype) @ v
