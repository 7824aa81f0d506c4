"""The lens view where nothing runs: a picture and a table, which also an untrusted page shows."""

import math
from html import escape

import torch

from minillama.visualize.grid import grid
from minillama.visualize.lens_view import LensView
from minillama.visualize.picture import Picture
from minillama.visualize.view import SIDE, bar, cell, picture_of_words

COLUMNS, ROWS = 12, 12  # as many words as a page has room for; the live view has all
LETTERS = 10  # of a word in the picture


def lens_picture(view: LensView) -> Picture:
    """The likeliest next word behind each of the last tokens, after each layer, coloured by its probability (PNG)."""
    import matplotlib.pyplot as plt
    from matplotlib.colors import PowerNorm

    part, first = _part(view), _first(view)
    shares = _coloured(part)[:, first:]
    rows, columns = shares.shape
    figure, axes = plt.subplots(figsize=(2.4 + 0.72 * max(columns, 4), 1.7 + 0.27 * rows), layout="constrained")
    # Of one word brightness is the root of the probability: small ones are seen too.
    power = 1 if view.word is None else 0.5
    norm = PowerNorm(power, vmin=0, vmax=1)
    image = axes.imshow(shares.numpy(), cmap=plt.get_cmap("cividis", 32), norm=norm, aspect="auto")
    for row in range(rows):
        for column in range(columns):
            right = int(part.rank[row, first + column]) == 1
            bright = float(shares[row, column]) ** power > 0.5
            axes.text(
                column, row, _short(view.spell(int(part.top[row, first + column, 0]))), ha="center", va="center",
                fontsize=8, color="black" if bright else "white", weight="bold" if right else "normal",
                parse_math=False,
            )  # fmt: skip
    pieces = [_short(piece) for piece in view.pieces]
    axes.set_xticks(range(columns), pieces[first:], fontsize=8, parse_math=False)
    axes.set_yticks(range(rows), part.names, fontsize=8)
    axes.set_xlabel("behind this token of the text")
    above = axes.secondary_xaxis("top")
    above.set_xticks(range(columns), [*pieces[first + 1 :], "?"], fontsize=8, parse_math=False)
    above.set_xlabel("the text goes on with (bold where the lens reads it)")
    axes.tick_params(length=0)
    above.tick_params(length=0)
    label = "of the likeliest word" if view.word is None else f"of “{_short(view.spell(view.word))}”"
    ticks = [0, 0.25, 0.5, 0.75, 1] if power == 1 else [0, 0.01, 0.1, 0.25, 0.5, 1]
    scale = figure.colorbar(image, ax=axes, ticks=ticks, format=lambda p, _: f"{p:.0%}")
    scale.set_label(f"probability {label}", parse_math=False)
    return picture_of_words(figure, lens_text(view))


def lens_text(view: LensView) -> str:
    """What the view shows, in words."""
    best = view.top[:, -1, 0].tolist()
    since = next(row for row in range(len(best)) if len(set(best[row:])) == 1)
    return (
        f"The next word over {len(view.pieces)} tokens, read off the stream. {depths_text(view)} "
        f"Behind the last token, “{view.spell(int(view.tokens[-1]))}”, the likeliest at the end is "
        f"“{view.spell(best[-1])}” with {view.shares[-1, -1, 0]:.1%}, and it leads from here on: {view.names[since]}."
    )


def depths_text(view: LensView) -> str:
    """Which layers are shown, in words."""
    shown = [depth - 1 for depth in view.depths if depth]
    if len(shown) == view.n_layers:
        return f"All {view.n_layers} layers."
    return f"Layers {', '.join(map(str, shown))} of {view.n_layers}; for others say layers=[…]."


def lens_table(view: LensView) -> str:
    """The same words with their probabilities, and the last ones, as HTML without scripts or style sheets."""
    part, first = _part(view), _first(view)
    words = [
        [f"{view.spell(int(best[0]))} {share[0]:.0%}" for best, share in zip(top, shares, strict=True)]
        for top, shares in zip(part.top[:, first:], part.shares[:, first:], strict=True)
    ]
    title = "The likeliest next word after each layer, behind each token, with its probability"
    if view.word is not None:
        title += f"; coloured by that of “{view.spell(view.word)}”"
    table = grid(_coloured(part)[:, first:], rows=part.names, columns=view.pieces[first:], title=title, words=words)
    last = [
        f"<tr>{cell(view.spell(i))}{bar(f'{100 * share:.1f} %', share)}</tr>"
        for i, share in zip(view.top[-1, -1].tolist(), view.shares[-1, -1].tolist(), strict=True)
    ]
    return (
        f"{table._repr_html_()}<p><b>The likeliest next words at the end</b></p><table><thead><tr><th {SIDE}>word</th>"
        f"<th {SIDE}>probability</th></tr></thead><tbody>{''.join(last)}</tbody></table>"
        f"<p>{escape(lens_text(view))}{_rest(view)}</p>"  # not every page reads a picture's own words to the blind
    )


def _coloured(view: LensView) -> torch.Tensor:
    return view.shares[..., 0] if view.word is None else view.following(view.word)


def _part(view: LensView) -> LensView:
    """The last row and every second, third … before it."""
    step = math.ceil(len(view.depths) / ROWS)
    return view.rows(list(range((len(view.depths) - 1) % step, len(view.depths), step)))


def _first(view: LensView) -> int:
    return max(0, len(view.pieces) - COLUMNS)


def _rest(view: LensView) -> str:
    return f" Here: the last {COLUMNS} tokens." if _first(view) else ""


def _short(piece: str) -> str:
    return piece if len(piece) <= LETTERS else piece[: LETTERS - 1] + "…"
