"""What a head does, as one number for each: scores of known habits; and what all layers together look at (rollout).

Letters: L layers, H heads, T tokens, D head_dim. Attention is (L, H, T, T), as `attention_probabilities` gives it.
"""

from typing import Any

import torch
from torch import Tensor, nn

from minillama.model import Llama
from minillama.visualize.anatomy import anatomy, check_floats


def previous_word_scores(attention: Tensor) -> Tensor:
    """How much each token looks at the one before it, on average: (L, H), 0 to 1."""
    return attention.diagonal(offset=-1, dim1=-2, dim2=-1).mean(-1)


def induction_scores(attention: Tensor, tokens: Tensor) -> Tensor:
    """How much each token looks at what came after its last earlier occurrence: (L, H), 0 to 1.

    Such a head completes what it has seen: after «… Lily … Li» it looks at «ly». tokens (T,); averaged over those that
    have been there before. Raises ValueError if none has.
    Source: Olsson et al. 2022, "In-context Learning and Induction Heads".
    """
    ids = tokens.tolist()
    last: dict[int, int] = {}
    pairs = []
    for place, token in enumerate(ids):
        if token in last:
            pairs.append((place, last[token] + 1))
        last[token] = place
    if not pairs:
        raise ValueError("no token of the text occurs twice, so there is nothing to continue: give one that repeats.")
    looking, seen = torch.tensor(pairs).T
    return attention[..., looking, seen].mean(-1)


@torch.no_grad()
def copying_scores(model: nn.Module) -> Tensor:
    """Whether a head, when it looks at a token, makes that same token likelier: (L, H), from -1 to 1.

    A head turns what it looks at into scores by a matrix from tokens to tokens, M = embedding · wv · wo · output, whose
    eigenvalues with a positive real part stand for tokens that raise themselves. The score is the sum of the
    eigenvalues over the sum of their sizes. Norms are left out. They are found from the D × D matrix wv · output ·
    embedding · wo, which has the same ones but zeros.
    Source: Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits", "copying heads".
    Raises ValueError for a quantized model.
    """
    check_floats(model)
    body = anatomy(model)
    whole: Any = model
    if isinstance(model, Llama):
        output = whole.output or body.embedding
        values = [attention.wv for attention in body.attentions]
    else:
        output = whole.lm_head
        values = [attention.v_proj for attention in body.attentions]
    across = body.embedding.weight.double().T @ output.weight.double()  # (dim, dim): comes in, goes out
    found = []
    for wv, wo in zip(values, body.wo, strict=True):
        o = wo.weight.double().unflatten(1, (body.n_heads, -1))  # (dim, H, D)
        v = wv.weight.double().unflatten(0, (-1, o.shape[-1]))  # (K, D, dim)
        v = v.repeat_interleave(body.n_heads // len(v), dim=0)  # (H, D, dim)
        eigenvalues = torch.linalg.eigvals(torch.einsum("hde,ef,fhg->hdg", v, across, o))
        found.append(eigenvalues.real.sum(-1) / eigenvalues.abs().sum(-1))
    return torch.stack(found).float()


def rollout(attention: Tensor) -> Tensor:
    """What each token rests on after each layer, if heads are averaged and half of a token stays itself: (L, T, T).

    Rows sum to 1. A_l ← (A_l + 1) / 2, then the product A_l ··· A_1: the residual stream carries the token itself past
    each layer. Source: Abnar and Zuidema 2020, "Quantifying Attention Flow in Transformers", section 3.
    """
    mixed = (attention.mean(1) + torch.eye(attention.shape[-1])) / 2
    found = [mixed[0]]
    for layer in mixed[1:]:
        found.append(layer @ found[-1])
    return torch.stack(found)
