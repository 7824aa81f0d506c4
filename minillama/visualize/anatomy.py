"""Where the parts of a LLaMA are: of ours, or of transformers', which has the same parts under other names."""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from minillama.model import Llama


class Anatomy(NamedTuple):
    """The modules that recorders listen to. In each list one for every layer, first to last."""

    embedding: Any  # tokens (B, T) → (B, T, dim)
    blocks: list[Any]
    attentions: list[Any]
    wo: list[Any]  # reads the heads' mixtures, (B, T, H·D)
    feedforwards: list[Any]
    down: list[Any]  # reads the opened neurons, (B, T, ffn_dim)
    norm: Any  # the last one, before the scores
    n_heads: int


def anatomy(model: nn.Module) -> Anatomy:
    """The parts of a `Llama`, or of transformers' `LlamaForCausalLM`. Raises ValueError for another model."""
    if isinstance(model, Llama):
        parts: list[Any] = list(model.blocks)
        return Anatomy(
            model.embedding, parts, [b.attention for b in parts], [b.attention.wo for b in parts],
            [b.feedforward for b in parts], [b.feedforward.down for b in parts], model.norm, model.config.n_heads,
        )  # fmt: skip
    if type(model).__name__ == "LlamaForCausalLM":
        inner: Any = model.model
        parts = list(inner.layers)
        return Anatomy(
            inner.embed_tokens, parts, [b.self_attn for b in parts], [b.self_attn.o_proj for b in parts],
            [b.mlp for b in parts], [b.mlp.down_proj for b in parts], inner.norm,
            inner.config.num_attention_heads,
        )  # fmt: skip
    raise ValueError(f"the model is a {type(model).__name__}, expected a Llama or transformers' LlamaForCausalLM.")


def check_floats(model: nn.Module) -> None:
    """Raise ValueError for a quantized model, where its weights themselves are to be looked at."""
    weight: Any = anatomy(model).embedding.weight
    if not weight.is_floating_point():
        raise ValueError("the model's weights are quantized, and this is read from floats: load it without.")


@torch.inference_mode()
def logits_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """Scores (B, T, V) in fp32 for tokens (B, T), of either kind of model."""
    found = model(tokens.to(next(model.parameters()).device))
    return (found if isinstance(found, Tensor) else found.logits).float()


def scores_of(model: nn.Module, x: Tensor) -> Tensor:
    """Normed vectors (..., dim) → scores (..., V), by the model's own output head."""
    return model.scores(x) if isinstance(model, Llama) else model.lm_head(x)  # type: ignore[operator]


@contextlib.contextmanager
def readable_attention(model: nn.Module) -> Iterator[None]:
    """Inside, attention makes its probabilities, which fused kernels never do."""
    if isinstance(model, Llama):
        layers: list[Any] = anatomy(model).attentions
        fast = [layer.fast for layer in layers]
        try:
            for layer in layers:
                layer.fast = False
            yield
        finally:
            for layer, was in zip(layers, fast, strict=True):
                layer.fast = was
    else:
        before = model.config._attn_implementation  # type: ignore[union-attr]
        model.set_attn_implementation("eager")  # type: ignore[operator]
        try:
            yield
        finally:
            model.set_attn_implementation(before)  # type: ignore[operator]
