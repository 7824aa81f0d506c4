"""What a part does, found by taking it out: how much worse the model is without each head, attention, feed-forward."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from minillama.visualize.anatomy import anatomy
from minillama.visualize.record import ablate


def ablation_effects(
    model: nn.Module, measure: Callable[[nn.Module], float], *, means: Tensor | None = None
) -> dict[str, Tensor]:
    """How a number changes when each part is silent: "heads" (L, H), "attention" (L,), "feedforward" (L,).

    measure: a function of the model, such as its loss on some stories, or the score of one answer; it is called once
    for every part and once with all. means: from `head_means`, for heads that say their mean instead of zero.
    """
    body = anatomy(model)
    whole = measure(model)
    layers = range(len(body.blocks))

    def without(**parts: Any) -> float:
        with ablate(model, **parts):
            return measure(model) - whole

    return {
        "heads": torch.tensor(
            [[without(heads=[(layer, head)], means=means) for head in range(body.n_heads)] for layer in layers]
        ),
        "attention": torch.tensor([without(attention=[layer]) for layer in layers]),
        "feedforward": torch.tensor([without(feedforward=[layer]) for layer in layers]),
    }
