"""Figures for a page: a PNG that reads the same in a light and a dark page, with its content in words."""

import io
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Picture:
    """A PNG which Jupyter shows as the value of a cell. `alt` says what it shows, for those who cannot see it."""

    data: bytes = field(repr=False)
    alt: str

    def _repr_png_(self) -> tuple[bytes, dict[str, str]]:
        return self.data, {"alt": self.alt}


def picture(figure: "Figure", alt: str) -> Picture:
    """Draw a matplotlib figure, and close it."""
    import matplotlib.pyplot as plt

    buffer = io.BytesIO()
    # A ground of its own, so that it reads in a dark page; no version inside, so that the file is the same each time.
    figure.savefig(buffer, format="png", dpi=110, facecolor="white", metadata={"Software": None})
    plt.close(figure)
    return Picture(buffer.getvalue(), alt)
