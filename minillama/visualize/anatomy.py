"""Where the parts of a LLaMA are: of ours, or of transformers', which has the same parts under other names."""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from minillama.checkpoint.names import HUGGING_FACE_CONFIG
from minillama.model import Llama

Rows = tuple[nn.Module, slice]  # a linear layer, and which of its outputs: quantized models join several in one


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
    attention_norms: list[nn.Module]
    wq: list[Rows]
    wk: list[Rows]
    wv: list[Rows]
    feedforward_norms: list[nn.Module]
    gate: list[Rows]
    up: list[Rows]


def anatomy(model: nn.Module) -> Anatomy:
    """The parts of a `Llama`, or of transformers' `LlamaForCausalLM`. Raises ValueError for another model."""
    if isinstance(model, Llama):
        parts: list[Any] = list(model.blocks)
        queries, keys = model.config.n_heads * model.config.head_dim, model.config.n_kv_heads * model.config.head_dim
        q, k, v = slice(queries), slice(queries, queries + keys), slice(queries + keys, None)
        gate, up = slice(model.config.ffn_dim), slice(model.config.ffn_dim, None)
        return Anatomy(
            model.embedding, parts, [b.attention for b in parts], [b.attention.wo for b in parts],
            [b.feedforward for b in parts], [b.feedforward.down for b in parts], model.norm, model.config.n_heads,
            [b.attention_norm for b in parts], [_rows(b.attention, "wq", "wqkv", q) for b in parts],
            [_rows(b.attention, "wk", "wqkv", k) for b in parts], [_rows(b.attention, "wv", "wqkv", v) for b in parts],
            [b.feedforward_norm for b in parts], [_rows(b.feedforward, "gate", "gate_up", gate) for b in parts],
            [_rows(b.feedforward, "up", "gate_up", up) for b in parts],
        )  # fmt: skip
    if type(model).__name__ == "LlamaForCausalLM":
        inner: Any = model.model
        parts = list(inner.layers)
        return Anatomy(
            inner.embed_tokens, parts, [b.self_attn for b in parts], [b.self_attn.o_proj for b in parts],
            [b.mlp for b in parts], [b.mlp.down_proj for b in parts], inner.norm,
            inner.config.num_attention_heads, [b.input_layernorm for b in parts],
            [(b.self_attn.q_proj, slice(None)) for b in parts], [(b.self_attn.k_proj, slice(None)) for b in parts],
            [(b.self_attn.v_proj, slice(None)) for b in parts], [b.post_attention_layernorm for b in parts],
            [(b.mlp.gate_proj, slice(None)) for b in parts], [(b.mlp.up_proj, slice(None)) for b in parts],
        )  # fmt: skip
    raise ValueError(f"the model is a {type(model).__name__}, expected a Llama or transformers' LlamaForCausalLM.")


def _rows(layer: nn.Module, name: str, joined: str, rows: slice) -> Rows:
    return (getattr(layer, joined), rows) if hasattr(layer, joined) else (getattr(layer, name), slice(None))


def sizes_of(model: nn.Module) -> dict[str, int]:
    """What fixes the shapes of its weights, in our config's words. Raises ValueError for what `anatomy` refuses."""
    sizes = ("n_layers", "dim", "n_heads", "n_kv_heads", "head_dim", "ffn_dim", "vocab_size")
    anatomy(model)  # refuses what is neither
    config: Any = model.config
    return {name: getattr(config, name if isinstance(model, Llama) else HUGGING_FACE_CONFIG[name]) for name in sizes}


def turned(attention: nn.Module, x: Tensor, turn: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Of an attention's input (B, T, dim) the queries (B, T, H·D) and keys (B, T, K·D), after their rotation."""
    layer: Any = attention
    if hasattr(layer, "project"):
        q, k, _ = layer.project(x, turn)
        return q.flatten(2), k.flatten(2)
    from transformers.models.llama import modeling_llama

    heads = (project(x).unflatten(-1, (-1, layer.head_dim)) for project in (layer.q_proj, layer.k_proj))
    q, k = modeling_llama.apply_rotary_pos_emb(*heads, *turn, unsqueeze_dim=2)
    return q.flatten(2), k.flatten(2)


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
