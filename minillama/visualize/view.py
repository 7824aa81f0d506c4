"""What the live views share: how a text is read, what fits into a page, and how a notebook shows them."""

import io
import warnings
import zlib
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from minillama.tokenizer import Tokenizer
from minillama.visualize.picture import Picture, picture

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_TOKENS = 200  # more words than anybody reads in one picture
MAX_BYTES = 150_000  # of what is packed for a page, which stays small enough to be sent by mail
SHOWN_WORDS = 8
MARK = "#d55e00"  # vermilion: seen on dark and light ground, and by the colour-blind
BAR = "#0072b2"
SIDE = 'scope="col" style="text-align: left; vertical-align: bottom"'


def read(tokenizer: Any, text: str | Sequence[int] | Tensor) -> tuple[Tensor, Callable[[int], str]]:
    """Token ids (T,), and how to spell one. Raises ValueError for a text that cannot be shown."""
    if isinstance(text, str) and tokenizer is None:
        raise ValueError("there is no tokenizer to read the text with: give token ids.")
    ours = isinstance(tokenizer, Tokenizer)
    if isinstance(text, str):
        ids = tokenizer.encode(text, bos=True) if ours and tokenizer.add_bos else tokenizer.encode(text)
    else:
        ids = torch.as_tensor(text).tolist()
    tokens = torch.tensor(ids, dtype=torch.long)
    if tokens.dim() != 1 or not 1 <= len(tokens) <= MAX_TOKENS:
        shape = f"{len(tokens)} tokens" if tokens.dim() == 1 else f"the shape {tuple(tokens.shape)}"
        raise ValueError(f"the text has {shape}, expected 1 to {MAX_TOKENS} in a row: give another part of it.")
    if tokenizer is None:
        return tokens, str
    # transformers' tokenizers have no readable form of one token but its text.
    return tokens, tokenizer.piece if ours else lambda i: tokenizer.decode([i]).replace(" ", "▁")


def layers_of(layers: Any, count: int) -> list[int]:
    """The numbers of the layers to show, sorted; None means all. Raises ValueError for one that is not there."""
    numbers = list(range(count)) if layers is None else sorted(set(layers))
    if not numbers or not 0 <= numbers[0] <= numbers[-1] < count:
        raise ValueError(f"layers are {numbers}, expected some of 0 to {count - 1}.")
    return numbers


def pack(*arrays: np.ndarray) -> bytes:
    """Arrays one behind the other, deflated, as a page takes them."""
    return zlib.compress(b"".join(array.tobytes() for array in arrays), 9)


def that_fit(sizes: Sequence[int], place: int) -> list[int]:
    """Places of the layers that fit into a page, with one among them: all, or every second, third …; or none."""
    for step in range(1, len(sizes) + 1):
        kept = list(range(place % step, len(sizes), step))
        if sum(sizes[i] for i in kept) <= MAX_BYTES:
            return kept
    return []


def cell(piece: str) -> str:
    """A word, in a table."""
    return f'<td style="text-align: left; font-family: monospace">{escape(piece)}</td>'


def bar(text: str, share: float) -> str:
    """A share as text, above a bar, in a table."""
    return (
        f'<td style="text-align: left; width: 110px">{text}<div style="background-color: {BAR}; height: 5px; '
        f'width: {round(100 * share)}px"></div></td>'
    )


def picture_of_words(figure: "Figure", alt: str) -> Picture:
    """A picture that holds words of any script: signs that the font lacks are drawn as boxes; the table has them.

    It keeps 256 colours, which nobody can tell from the whole, in a third of the bytes.
    """
    from PIL import Image

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")
        whole = picture(figure, alt)
    image, buffer = Image.open(io.BytesIO(whole.data)).convert("RGB"), io.BytesIO()
    image.quantize(256, dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True)
    return Picture(buffer.getvalue(), alt)


def sources(name: str) -> tuple[str, str]:
    """A widget's code and its style: what all views share, and its own behind it."""
    return _source(name, "js"), _source(name, "css")


def show(drawn: Picture, table: str, widget: Any) -> None:
    """Put a view into a notebook: the picture and the table, which also an untrusted page shows, and what is live."""
    from IPython.display import HTML, display

    display(drawn, HTML(table), widget)


def _source(name: str, kind: str) -> str:
    here = Path(__file__).parent
    return "\n".join((here / f"{part}.{kind}").read_text(encoding="utf-8") for part in ("view", name))
