"""The lens view: in a notebook one that can be clicked; before it, for pages where nothing runs, its stand-ins."""

from collections.abc import Collection, Sequence
from functools import cache
from typing import Any

from torch import Tensor, nn

from minillama.visualize.lens_page import depths_text, lens_picture, lens_table, lens_text
from minillama.visualize.lens_view import LensView, lens_view
from minillama.visualize.view import show, sources


class Lens:
    """What `lens` gives: a notebook shows it. `view` has the numbers, `widget()` the live part."""

    def __init__(self, view: LensView) -> None:
        self.view = view

    def __repr__(self) -> str:
        return lens_text(self.view)

    def _ipython_display_(self) -> None:
        show(lens_picture(self.view), lens_table(self.view), self.widget())

    def widget(self) -> Any:
        """The live view, an anywidget, which asks nothing of this kernel."""
        return _kind()(numbers=self.view.packed(), page=_page(self.view))


def lens(
    model: nn.Module,
    tokenizer: Any,
    text: str | Sequence[int] | Tensor,
    *,
    word: int | None = None,
    layers: Collection[int] | None = None,
) -> Lens:
    """What the model would say after each layer, behind every token, if the other layers were left out: as the value
    of a cell. `logit_lens` gives the same as numbers.

    model, tokenizer: as `load` gives them; or transformers' `LlamaForCausalLM`, with either kind of tokenizer (None is
    enough for token ids). text: a string, or ids (T,), of 200 tokens at most.
    word: a token's id, whose probability colours the view at first; None: the likeliest word's does.
    layers: after which to read; None: each. Where they are too many for a page, every second, third … is shown.
    Raises ValueError for a text, word or layer that cannot be shown.
    """
    return Lens(lens_view(model, tokenizer, text, word=word, layers=layers))


@cache
def _kind() -> Any:
    """The widget's class, made when it is first used: the package works without notebooks."""
    import anywidget
    import traitlets

    class LensWidget(anywidget.AnyWidget):
        _esm, _css = sources("lens_view")
        numbers = traitlets.Bytes().tag(sync=True)
        page = traitlets.Dict().tag(sync=True)

        def __repr__(self) -> str:  # what a saved page says in its place
            return "Run this cell to click through layers and tokens, and to follow a word."

    return LensWidget


def _page(view: LensView) -> dict[str, Any]:
    return {
        "pieces": view.pieces,
        "rows": view.names,
        "words": [view.spell(i) for i in view.listed],
        "followed": len(view.words),
        "text": [view.listed.index(i) for i in view.tokens[1:].tolist()],
        "word": None if view.word is None else view.listed.index(view.word),
        "tops": view.top.shape[-1],
        "vocabulary": view.n_words,
        "shown": depths_text(view),
    }
