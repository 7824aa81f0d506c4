"""Figures for a page: a PNG that reads the same in a light and a dark page, with its content in words."""

import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from IPython.display import Image
    from matplotlib.figure import Figure


def picture(figure: "Figure", alt: str) -> "Image":
    """Turn a matplotlib figure into an image for a notebook, and close it.

    alt: what it shows, in words, for those who cannot see it.
    """
    import matplotlib.pyplot as plt
    from IPython.display import Image

    buffer = io.BytesIO()
    # A ground of its own, so that it reads in a dark page; no version inside, so that the file is the same each time.
    figure.savefig(buffer, format="png", dpi=110, facecolor="white", metadata={"Software": None})
    plt.close(figure)
    return Image(data=buffer.getvalue(), alt=alt)
