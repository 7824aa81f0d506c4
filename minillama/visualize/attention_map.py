"""Attention maps: which token looks at which, and how much."""

from collections.abc import Sequence

from torch import Tensor

from minillama.visualize.picture import Picture, picture


def strongest_head(probabilities: Tensor, looking: int, seen: int) -> tuple[int, int]:
    """The (layer, head) in which the token at `looking` gives the largest share to the token at `seen`.

    probabilities: (L, H, T, T), from `attention_probabilities`.
    """
    shares = probabilities[:, :, looking, seen]
    layer, head = divmod(int(shares.argmax()), shares.shape[1])
    return layer, head


def attention_figure(probabilities: Tensor, pieces: Sequence[str], *, title: str, alt: str) -> Picture:
    """One head's map as a picture (PNG): a row for each token that looks, a column for each that is looked at.

    probabilities: (T, T), rows sum to 1. pieces: the T tokens as text. alt: what the picture shows, in words, for those
    who cannot see it.
    """
    import matplotlib.pyplot as plt

    count = len(pieces)
    if probabilities.shape != (count, count):
        raise ValueError(f"the map is {tuple(probabilities.shape)}, expected ({count}, {count}) for {count} tokens.")
    side = 1.5 + 0.17 * count
    figure, axes = plt.subplots(figsize=(side + 0.9, side), layout="constrained")
    image = axes.imshow(probabilities, cmap="cividis", vmin=0, vmax=1)  # readable for the colour-blind, and in grey
    axes.set_xticks(range(count), pieces, rotation=90, fontsize=7)
    axes.set_yticks(range(count), pieces, fontsize=7)
    axes.set_xlabel("is looked at")
    axes.set_ylabel("looks")
    axes.set_title(title, fontsize=10)
    figure.colorbar(image, ax=axes, shrink=0.7, label="share of attention")
    return picture(figure, alt)
