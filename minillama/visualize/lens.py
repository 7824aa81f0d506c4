"""Reading the residual stream: what the model would say after each layer, and which part said how much for a word.

Letters: L layers, H heads, T tokens, V vocabulary.
"""

from collections.abc import Collection, Iterator

import torch
from torch import Tensor, nn

from minillama.visualize.anatomy import anatomy, check_floats, scores_of
from minillama.visualize.record import record


@torch.inference_mode()
def at_each_depth(model: nn.Module, tokens: Tensor, depths: Collection[int] | None = None) -> Iterator[Tensor]:
    """Log-probabilities (T, V) of the next token behind each of tokens (T,), one depth after the other, on the CPU.

    depths: after how many layers the stream is read, 0 to L; None: each.
    """
    with record(model, "stream", layers=depths) as seen:
        model(tokens[None].to(next(model.parameters()).device))
    norm = anatomy(model).norm
    weight = next(norm.parameters())
    for x in seen.stream[:, 0]:
        yield scores_of(model, norm(x.to(weight))).float().log_softmax(-1).cpu()


def logit_lens(model: nn.Module, tokens: Tensor) -> Tensor:
    """Log-probabilities of the next token, if the layers after each were left out: tokens (T,) → (L + 1, T, V).

    The stream before the first layer and after each goes through the last norm and the output head. The last entry is
    what the model says. Source: nostalgebraist 2020, "interpreting GPT: the logit lens".
    """
    return torch.stack(list(at_each_depth(model, tokens)))


@torch.inference_mode()
def residual_sizes(model: nn.Module, tokens: Tensor) -> Tensor:
    """The root mean square of the residual stream before each layer and after the last, (T,) tokens → (L + 1, T)."""
    with record(model, "stream") as seen:
        model(tokens[None])
    return seen.stream[:, 0].square().mean(-1).sqrt()


@torch.inference_mode()
def attribution(model: nn.Module, tokens: Tensor, word: int, other: int) -> dict[str, Tensor]:
    """Who made one word's score higher than another's, behind the last of tokens (T,): every part's share, in logits.

    "embedding" (), "heads" (L, H), "feedforward" (L,): they add up to the difference of the two scores. The last norm's
    division is taken as it is in the whole model; then the stream is a sum, and so is the score.
    Source: Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits" (direct logit attribution).
    Raises ValueError for a quantized model.
    """
    check_floats(model)
    body = anatomy(model)
    added: list[Tensor] = []  # by each feed-forward
    hooks = [f.register_forward_hook(lambda m, x, y: added.append(y[0, -1].double())) for f in body.feedforwards]
    try:
        with record(model, "heads", "stream", dtype=torch.float64) as seen:
            model(tokens[None])
    finally:
        for hook in hooks:
            hook.remove()
    norm = body.norm
    eps = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
    last = seen.stream[-1, 0, -1]
    size = (last.square().mean() + eps).sqrt()
    both = scores_of(model, torch.eye(len(last)).to(norm.weight)).double()[:, [word, other]]  # (dim, 2)
    direction = (both[:, 0] - both[:, 1]) * norm.weight.double() / size  # (dim,): what a stream adds to the difference
    heads = []
    for layer, wo in enumerate(body.wo):
        weight = wo.weight.double().unflatten(1, (body.n_heads, -1))  # (dim, H, D)
        heads.append(torch.einsum("hd,ehd,e->h", seen.heads[layer, 0, -1], weight, direction))
    return {
        "embedding": seen.stream[0, 0, -1] @ direction,
        "heads": torch.stack(heads),
        "feedforward": torch.stack(added) @ direction,
    }
