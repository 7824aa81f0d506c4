"""Recorders: plain hooks that take numbers out of a running model, and leave it as it was."""

import torch
from torch import Tensor
from torch.nn import Module

from minillama.attention import Attention
from minillama.model import Llama


@torch.inference_mode()
def attention_probabilities(model: Llama, tokens: Tensor) -> Tensor:
    """How much every token looks at every token, in each layer and head: (T,) int64 → (L, H, T, T) fp32 on the CPU.

    The last axis is what is looked at; each row sums to 1. The model runs on its readable path meanwhile, because the
    fast one never makes these numbers. They take 4·L·H·T² bytes.
    """
    if tokens.dim() != 1:
        raise ValueError(f"tokens have the shape {tuple(tokens.shape)}, expected (time,): give one text at a time.")
    layers = [module for module in model.modules() if isinstance(module, Attention)]
    fast = [layer.fast for layer in layers]
    seen: list[Tensor] = []

    def put_away(tap: Module, inputs: tuple[Tensor], output: Tensor) -> None:
        seen.append(output[0].float().cpu())

    handles = [layer.tap.register_forward_hook(put_away) for layer in layers]
    try:
        for layer in layers:
            layer.fast = False
        model(tokens[None].to(model.embedding.weight.device))
    finally:
        for handle, layer, was_fast in zip(handles, layers, fast, strict=True):
            handle.remove()
            layer.fast = was_fast
    return torch.stack(seen)
