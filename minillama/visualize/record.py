"""Recorders: plain hooks that take numbers out of a running model, and leave it as it was.

Letters: L layers, B batch, T tokens, H heads, D head_dim.
"""

import contextlib
from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from minillama.visualize.anatomy import anatomy, readable_attention

PARTS = ("attention", "heads", "stream", "feedforward")


class Recording:
    """What was recorded in the last pass through the model, for the layers that were asked for, in their order.

    attention (L, B, H, T, T): how much every token looks at every token; rows sum to 1.
    heads (L, B, T, H, D): what each head has mixed, before `wo`.
    stream (L + 1, B, T, dim): the residual stream before each layer, and after the last.
    feedforward (L, B, T, ffn_dim): each neuron, opened by its gate, before `down`.
    """

    def __init__(self) -> None:
        self.seen: dict[str, dict[int, Tensor]] = {}

    def __getattr__(self, part: str) -> Tensor:
        if part not in PARTS:
            raise AttributeError(part)
        layers = self.seen.get(part, {})
        if not layers:
            raise ValueError(f"{part} was not recorded: name it, and run the model inside `with record(…)`.")
        return torch.stack([layers[layer] for layer in sorted(layers)])


@contextlib.contextmanager
def record(
    model: nn.Module, *parts: str, layers: Collection[int] | None = None, dtype: torch.dtype = torch.float32
) -> Iterator[Recording]:
    """Record while the model runs: `with record(model, "stream") as seen: model(tokens)`; then `seen.stream`.

    model: a `Llama`, or transformers' LLaMA. parts: of "attention", "heads", "stream", "feedforward". layers: which (of
    the stream also L, after the last); None: all. What is recorded lies on the CPU in `dtype`. The model computes what
    it always does; only for "attention" it takes its readable path, up to rounding the same.
    Raises ValueError for other parts and layers.
    """
    if unknown := [part for part in parts if part not in PARTS]:
        raise ValueError(f"there is nothing called {unknown[0]!r} to record, expected {', '.join(PARTS)}.")
    body = anatomy(model)
    count = len(body.blocks)
    wanted = range(count + 1) if layers is None else layers
    if odd := [layer for layer in wanted if not 0 <= layer <= count]:
        raise ValueError(f"there is no layer {odd[0]}, expected 0 to {count - 1} (of the stream {count} as well).")
    seen = Recording()

    def keep(part: str, layer: int, x: Tensor) -> None:
        x = x.unflatten(-1, (body.n_heads, -1)) if part == "heads" else x
        seen.seen.setdefault(part, {})[layer] = x.detach().to("cpu", dtype, copy=True)

    with contextlib.ExitStack() as hooks:
        for layer in wanted:
            places = {"stream": body.norm if layer == count else body.blocks[layer]}
            if layer < count:
                places |= {"heads": body.wo[layer], "feedforward": body.down[layer]}
            for part in parts:
                if part in places:
                    hooks.enter_context(_before(places[part], partial(keep, part, layer)))
                elif layer < count:
                    hooks.enter_context(_probabilities(body.attentions[layer], partial(keep, part, layer)))
        if "attention" in parts:
            hooks.enter_context(readable_attention(model))
        yield seen


@contextlib.contextmanager
def ablate(
    model: nn.Module,
    *,
    heads: Collection[tuple[int, int]] = (),
    attention: Collection[int] = (),
    feedforward: Collection[int] = (),
    means: Tensor | None = None,
) -> Iterator[None]:
    """Inside, parts of the model are silent: some heads, given as (layer, head), or the whole attention or feed-forward
    of some layers, which then add nothing to the stream.

    means: (L, H, D), from `head_means`; a silent head then says its mean instead of zero, so that what reads it is not
    startled by a vector that never occurs. Raises ValueError for a layer or head that is not there.
    """
    body = anatomy(model)
    count = len(body.blocks)
    places = [*heads, *((layer, 0) for layer in (*attention, *feedforward))]
    if odd := [place for place in places if not (0 <= place[0] < count and 0 <= place[1] < body.n_heads)]:
        raise ValueError(
            f"there is no layer and head {odd[0]}, expected layers 0 to {count - 1}, heads 0 to {body.n_heads - 1}."
        )

    def silence(layer: int, x: Tensor) -> Tensor:
        parts = x.unflatten(-1, (body.n_heads, -1)).clone()
        for at, head in heads:
            if at == layer:
                parts[..., head, :] = 0 if means is None else means[layer, head].to(parts)
        return parts.flatten(-2)

    with contextlib.ExitStack() as hooks:
        for layer in {layer for layer, _ in heads}:
            hooks.enter_context(_before(body.wo[layer], partial(silence, layer)))
        for module in [body.wo[layer] for layer in attention] + [body.down[layer] for layer in feedforward]:
            hooks.enter_context(_before(module, torch.zeros_like))
        yield


def head_means(model: nn.Module, tokens: Tensor) -> Tensor:
    """What each head says on average over all tokens (B, T): (L, H, D), for `ablate`."""
    with record(model, "heads") as seen, torch.inference_mode():
        model(tokens)
    return seen.heads.mean(dim=(1, 2))


def attention_probabilities(model: nn.Module, tokens: Tensor) -> Tensor:
    """How much every token looks at every token, in each layer and head: (T,) int64 → (L, H, T, T) fp32 on the CPU.

    The last axis is what is looked at; each row sums to 1. They take 4·L·H·T² bytes.
    """
    if tokens.dim() != 1:
        raise ValueError(f"tokens have the shape {tuple(tokens.shape)}, expected (time,): give one text at a time.")
    with record(model, "attention") as seen, torch.inference_mode():
        model(tokens[None].to(next(model.parameters()).device))
    return seen.attention[:, 0]


@contextlib.contextmanager
def _before(module: nn.Module, look: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """Show a module's input to `look`, and put what it returns, if anything, in its place."""

    def hook(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        other = look(inputs[0])
        return None if other is None else (other, *inputs[1:])

    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def _probabilities(attention: nn.Module, look: Callable[[Tensor], None]) -> Iterator[None]:
    """Show an attention's probabilities (B, H, T, S) to `look`: ours pass through its tap, transformers' come back."""
    tap: Any = getattr(attention, "tap", None)

    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        look(output if tap is not None else output[1])

    handle = (attention if tap is None else tap).register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
