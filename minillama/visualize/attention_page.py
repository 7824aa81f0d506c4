"""The attention view where nothing runs: a picture and a table, which also an untrusted page shows."""

import math
from html import escape

import numpy as np
import torch

from minillama.visualize.attention_view import AttentionView
from minillama.visualize.picture import Picture
from minillama.visualize.view import MARK, SIDE, bar, cell, picture_of_words

SMALL = 14  # pixels of a small map's side, at most


def attention_picture(view: AttentionView) -> Picture:
    """All heads' maps, small, a row for each layer; and the chosen head's, large (PNG)."""
    import matplotlib.pyplot as plt
    from matplotlib.colors import PowerNorm
    from matplotlib.patches import Rectangle

    count, heads = len(view.pieces), view.percent.shape[1]
    side = min(SMALL, count)
    # The largest of each patch, so that thin lines stay.
    small = torch.nn.functional.adaptive_max_pool2d(view.percent.float(), side)
    tiled = torch.nn.functional.pad(small, (0, 2, 0, 2), value=math.nan)  # gaps between the maps
    tiled = tiled.transpose(1, 2).flatten(2).flatten(0, 1)
    left = min(4.5, max(2.2, heads * min(0.5, max(0.28, 8 / len(view.layers)))))
    right = min(7.5, 2.2 + 0.11 * count)
    height = min(9.0, max(right - 0.6, left * len(view.layers) / heads))
    figure, (grid, large) = plt.subplots(
        1, 2, figsize=(left + right + 1, height), width_ratios=[left, right], layout="constrained"
    )
    colours = plt.get_cmap("cividis", 32)  # no more than an eye tells apart: the file is half as large
    norm = PowerNorm(0.5, vmin=0, vmax=100)  # brightness is the root of the share: small shares are seen too
    grid.imshow(tiled.numpy(), cmap=colours, norm=norm, interpolation="nearest")
    middle, pitch = (side - 1) / 2, side + 2
    grid.set_xticks(middle + pitch * np.arange(heads), range(heads), fontsize=7)
    grid.set_yticks(middle + pitch * np.arange(len(view.layers)), view.layers, fontsize=7)
    grid.set_xlabel("head")
    grid.set_ylabel("layer")
    grid.set_title("every head", fontsize=10)
    row, column = view.layers.index(view.head[0]), view.head[1]
    corner = (column * pitch - 1.5, row * pitch - 1.5)
    grid.add_patch(Rectangle(corner, side + 2, side + 2, fill=False, edgecolor=MARK, linewidth=2))
    image = large.imshow(view.chosen.numpy(), cmap=colours, norm=norm, interpolation="nearest")
    shown = range(0, count, math.ceil(count / 64))
    size = max(4.5, min(9.0, 62 * right / (count + 12)))
    for axis in (large.xaxis, large.yaxis):  # a piece such as $x$ is text, no formula
        axis.set_ticks(shown, [view.pieces[i] for i in shown], fontsize=size, parse_math=False)
    large.tick_params("x", rotation=90)
    large.set_xlabel("is looked at")
    large.set_ylabel("looks")
    large.set_title(f"layer {view.head[0]}, head {view.head[1]}", fontsize=10)
    figure.colorbar(image, ax=large, shrink=0.7, ticks=[0, 1, 10, 25, 50, 100], label="percent of attention")
    return picture_of_words(figure, attention_text(view))


def attention_text(view: AttentionView) -> str:
    """What the view shows, in words."""
    first = view.chosen[:, 0].float().mean()
    links = view.links(1)
    strongest = "".join(
        f" Its strongest link elsewhere: “{view.pieces[a]}” gives {share} % to “{view.pieces[b]}”."
        for a, b, share in links
    )
    return (
        f"Attention over {len(view.pieces)} tokens. {layers_text(view)} "
        f"Layer {view.head[0]}, head {view.head[1]} gives {first:.0f} % to the first token on average.{strongest}"
    )


def layers_text(view: AttentionView) -> str:
    """Which layers are shown, in words."""
    heads = f"with {view.percent.shape[1]} heads each"
    if len(view.layers) == view.n_layers:
        return f"All {view.n_layers} layers {heads}."
    shown = ", ".join(map(str, view.layers))
    return f"Layers {shown} of {view.n_layers}, {heads}; for others say layers=[…]."


def attention_table(view: AttentionView) -> str:
    """The chosen head's strongest links and the likeliest next words, as HTML without scripts or style sheets."""
    links = [
        f"<tr>{cell(view.pieces[a])}{cell(view.pieces[b])}{bar(f'{share} %', share / 100)}</tr>"
        for a, b, share in view.links()
    ]
    after = bool(view.silenced)
    words = [
        f"<tr>{cell(piece)}{''.join(bar(f'{100 * p:.1f} %', p) for p in ((old, new) if after else (old,)))}</tr>"
        for piece, old, new in view.words()
    ]
    silenced = ", ".join(f"layer {layer} head {head}" for layer, head in view.silenced)
    column = f"<th {SIDE}>without {silenced}</th>" if after else ""
    return (
        '<div style="display: flex; flex-wrap: wrap; column-gap: 40px">'
        f"<div><p><b>Layer {view.head[0]}, head {view.head[1]}: its strongest links</b> to another than the first token"
        f"</p><table><thead><tr><th {SIDE}>looks</th><th {SIDE}>is looked at</th><th {SIDE}>share</th></tr></thead>"
        f"<tbody>{''.join(links)}</tbody></table></div>"
        f"<div><p><b>The likeliest next words</b></p><table><thead><tr><th {SIDE}>word</th>"
        f"<th {SIDE}>whole model</th>{column}</tr></thead><tbody>{''.join(words)}</tbody></table></div>"
        f"</div><p>{escape(attention_text(view))}</p>"  # not every page reads a picture's own words to the blind
    )
