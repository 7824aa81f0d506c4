"""Activation patching: carry one place's value from one run of a model into another, and see what comes back.

Letters: L layers, H heads, T tokens.
"""

from typing import Any

import torch
from torch import Tensor, nn

from minillama.visualize.anatomy import anatomy
from minillama.visualize.record import record


@torch.inference_mode()
def patching(
    model: nn.Module, clean: Tensor, corrupt: Tensor, word: int, other: int, *, heads: bool = False
) -> Tensor:
    """Where two texts' difference is carried: the share of it that comes back when one place of the corrupt text gets
    the clean text's value.

    clean, corrupt (T,) tokens of one length, which differ in one fact; word and other: what each should be followed by.
    Measured by score(word) − score(other) behind the last token: 0 is as in the corrupt text, 1 as in the clean one.
    Returns (L + 1, T), the stream before each layer and after the last at each token; with heads=True (L, H), a head's
    mixture at all tokens. Source: Meng et al. 2022, "Locating and Editing Factual Associations in GPT", section 2.
    Raises ValueError if the texts have other lengths or do not differ in what they say.
    """
    if clean.shape != corrupt.shape or clean.dim() != 1:
        raise ValueError(
            f"the texts have the shapes {tuple(clean.shape)} and {tuple(corrupt.shape)}, expected (time,) twice: "
            "choose two of the same number of tokens."
        )
    body = anatomy(model)
    part = "heads" if heads else "stream"
    with record(model, part) as seen:
        before = _difference(model, clean[None], word, other)[0]
    after = _difference(model, corrupt[None], word, other)[0]
    if abs(before - after) < 1e-4:
        raise ValueError(f"both texts give the difference {before:.4f}: choose two that are followed by other words.")
    places = [*body.blocks, body.norm] if not heads else body.wo
    count = body.n_heads if heads else len(clean)
    found = []
    for layer, module in enumerate(places):
        value = (seen.heads if heads else seen.stream)[layer, 0]  # (T, H, D) or (T, dim)

        def put(module: nn.Module, inputs: tuple[Any, ...], value: Tensor = value) -> tuple[Any, ...]:
            x = inputs[0].clone()  # (copies, T, ...): in each copy of the text another place
            if heads:
                x = x.unflatten(-1, (count, -1))
                rows = torch.arange(count)
                x[rows, :, rows] = value.to(x).transpose(0, 1)
                return x.flatten(-2), *inputs[1:]
            rows = torch.arange(count)
            x[rows, rows] = value.to(x)
            return x, *inputs[1:]

        hook = module.register_forward_pre_hook(put)
        try:
            found.append(_difference(model, corrupt.expand(count, -1), word, other))
        finally:
            hook.remove()
    return (torch.stack(found) - after) / (before - after)


def _difference(model: nn.Module, tokens: Tensor, word: int, other: int) -> Tensor:
    found = model(tokens)
    scores = (found if isinstance(found, Tensor) else found.logits)[:, -1].float()
    return (scores[:, word] - scores[:, other]).cpu()
