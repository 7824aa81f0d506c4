"""A matrix of numbers as a coloured table, which reads where nothing runs, aloud, and in the light and the dark."""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from minillama.visualize.picture import Picture, picture

BLUE, ORANGE = (0, 114, 178), (230, 159, 0)  # told apart by the colour-blind; orange is below zero
STRONGEST = 0.6  # how much of a colour: the page's own text stays readable on it, black or white
MAX_CELLS = 20_000


@dataclass(frozen=True)
class Grid:
    """Numbers (R, C) with a name for each row and column, and perhaps a word to show in each cell in its place.

    Jupyter shows it as a table; `picture()` gives a PNG.
    """

    values: Tensor = field(repr=False)
    rows: Sequence[str] = field(repr=False)
    columns: Sequence[str] = field(repr=False)
    title: str
    words: Sequence[Sequence[str]] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        shape = (len(self.rows), len(self.columns))
        if tuple(self.values.shape) != shape:
            raise ValueError(f"the values are {tuple(self.values.shape)}, expected {shape}: a name a row and a column.")
        if math.prod(shape) > MAX_CELLS:
            raise ValueError(f"a table of {math.prod(shape)} cells is too large to read, expected {MAX_CELLS} at most.")
        if self.words is not None and [len(row) for row in self.words] != [shape[1]] * shape[0]:
            raise ValueError(f"the words do not fill the cells, expected {shape[0]} rows of {shape[1]}.")

    def _repr_html_(self) -> str:
        largest = float(self.values.abs().nan_to_num(0).max()) if self.values.numel() else 0.0
        cell = "padding:1px 5px;text-align:right;font-size:85%;white-space:pre"
        heading = 'style="padding:1px 5px;text-align:right;font-weight:normal;font-size:85%;white-space:pre"'
        names = "".join(f'<th scope="col" {heading}>{html.escape(name)}</th>' for name in self.columns)
        lines = []
        for r, name in enumerate(self.rows):
            cells = []
            for c, value in enumerate(self.values[r].tolist()):
                number = f"{value:.2f}" if abs(value) < 100 else f"{value:,.0f}"
                shown = number if self.words is None else self.words[r][c]
                where = f"{name}, {self.columns[c]}: {number}"
                cells.append(
                    f'<td style="{cell};background-color:{colour(value, largest)}" title="{html.escape(where)}">'
                    f"{html.escape(shown)}</td>"
                )
            lines.append(f'<tr><th scope="row" {heading}>{html.escape(name)}</th>{"".join(cells)}</tr>')
        return (
            '<div style="overflow-x:auto"><table style="border-collapse:collapse;color:inherit">'
            f'<caption style="caption-side:top;text-align:left;padding:4px">{html.escape(self.title)}</caption>'
            f"<thead><tr><td></td>{names}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
        )

    def picture(self, alt: str) -> Picture:
        """The same as a PNG. alt: what it shows, in words."""
        import matplotlib.pyplot as plt

        width, height = 1.6 + 0.45 * len(self.columns), 1.0 + 0.28 * len(self.rows)
        figure, axes = plt.subplots(figsize=(min(width, 16), min(height, 16)), layout="constrained")
        largest = float(self.values.abs().max())
        below = bool((self.values < 0).any())
        image = axes.imshow(
            self.values.numpy(), aspect="auto", vmax=largest, vmin=-largest if below else 0,
            cmap="PuOr" if below else "Blues",
        )  # fmt: skip
        axes.set_xticks(range(len(self.columns)), self.columns, rotation=90 if max(map(len, self.columns)) > 3 else 0)
        axes.set_yticks(range(len(self.rows)), self.rows)
        axes.set_title(self.title)
        figure.colorbar(image, ax=axes)
        return picture(figure, alt)


def grid(
    values: Tensor,
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
    words: Sequence[Sequence[str]] | None = None,
) -> Grid:
    """Show numbers (R, C) as a coloured table: blue above zero, orange below, the strongest colour for the largest.

    rows, columns: their names. words: what to write in each cell instead of its number, which is then told when the
    pointer rests on it. Raises ValueError if the sizes do not fit, or for a table too large to read.
    """
    return Grid(values.detach().float().cpu(), list(rows), list(columns), title, words)


def head_grid(values: Tensor, title: str) -> Grid:
    """A number for each head, (L, H): a row for each layer."""
    layers, heads = values.shape
    return grid(
        values, rows=[f"layer {i}" for i in range(layers)], columns=[f"head {i}" for i in range(heads)], title=title
    )


def colour(value: float, largest: float) -> str:
    """Blue for a number above zero, orange below, the stronger the nearer it is to the largest; grey if not finite."""
    if not math.isfinite(value):
        return "rgba(128,128,128,0.6)"
    share = STRONGEST * abs(value) / largest if largest else 0.0
    red, green, blue = BLUE if value >= 0 else ORANGE
    return f"rgba({red},{green},{blue},{share:.2f})"
