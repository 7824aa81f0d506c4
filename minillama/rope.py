"""Positions (chapter 03): rotary embeddings turn each pair of a query's or key's coordinates by an angle that grows
with the token's position, so that their dot product depends only on how far apart the two tokens are.

Letters: B batch, T time, H heads, D head_dim. Layout: **interleaved**, as in Meta's code: pairs are (x[2i], x[2i+1]).
Source: Su et al. 2021, "RoFormer", equations 15 and 34.
"""

import math

import torch
from torch import Tensor

from minillama.config import LinearScaling, Llama3Scaling, ModelConfig


def sinusoidal_table(length: int, dim: int, theta: float = 10_000.0) -> Tensor:
    """The fixed table (length, dim) that the first Transformer added to its embeddings: sines at even coordinates,
    cosines at odd ones. Source: Vaswani et al. 2017, section 3.5. LLaMA does not use it; the chapter compares."""
    angles = torch.arange(length)[:, None] * theta ** (-torch.arange(0, dim, 2) / dim)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)


def frequencies(config: ModelConfig) -> Tensor:
    """The angle (D/2,) in radians by which each pair turns from one position to the next, in fp32.

    Pair i turns by `theta^(-2i/D)`; a scaling then slows the turning down, so that a longer context fits.
    """
    plain = 1.0 / config.rope_theta ** (torch.arange(0, config.head_dim, 2).float() / config.head_dim)
    match config.rope_scaling:
        case None:
            return plain
        case LinearScaling(factor):
            return plain / factor
        case Llama3Scaling() as scaling:
            return _llama3(plain, scaling)
        case other:
            raise ValueError(f"rope_scaling is {other!r}, expected None, LinearScaling or Llama3Scaling: use one.")


def _llama3(plain: Tensor, scaling: Llama3Scaling) -> Tensor:
    """Slow pairs are divided by the factor, fast ones stay, and between the two lies a smooth band.

    Fast and slow are told by how many full turns a pair makes within the context of the first training.
    Source: the Llama 3.1 release's reference code (`apply_scaling`).
    """
    turns = scaling.original_max_seq_len * plain / (2 * math.pi)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = kept.clamp(0, 1)
    return kept * plain + (1 - kept) * plain / scaling.factor


def rotation(frequency: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of each pair's angle: frequency (D/2,), positions (T,) or (B, T) to two of (..., T, 1, D/2).

    The 1 stands where the heads will be. Angles are in fp32 whatever the model's dtype: bf16 cannot tell
    position 1000 from 1001.
    """
    angles = (positions[..., None].float() * frequency)[..., None, :]
    return angles.cos(), angles.sin()


def rotate(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """Turn the pairs (a, b) = (x[2i], x[2i+1]) of x (B, T, H, D) to (a cos - b sin, a sin + b cos).

    That is the product of the complex numbers a + bi and cos + i sin.
    """
    if torch.compiler.is_compiling():  # a compiler makes one pass of it, and has no complex numbers
        (a, b), (cos, sin) = x.float().unflatten(-1, (-1, 2)).unbind(-1), turn
        return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2).to(x.dtype)
    # Written out it would be ten passes over x; the complex product is one, and several times faster.
    pairs = torch.view_as_complex(x.float().contiguous().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * torch.complex(*turn)).flatten(-2).to(x.dtype)


def halves_to_pairs(rows: Tensor, head_dim: int) -> Tensor:
    """Reorder the rows of a query or key weight from Hugging Face's layout to ours: (H·D, ...) to (H·D, ...).

    There, coordinate i of a head turns with coordinate i + D/2; here, 2i turns with 2i + 1. Whole rows move, so
    quantized rows survive.
    """
    return rows.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def pairs_to_halves(rows: Tensor, head_dim: int) -> Tensor:
    """The inverse of `halves_to_pairs`: from our layout to Hugging Face's."""
    return rows.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)
