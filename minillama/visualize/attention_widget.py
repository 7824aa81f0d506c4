"""The attention view: in a notebook one that can be clicked; before it, for pages where nothing runs, its stand-ins."""

from collections.abc import Collection, Sequence
from functools import cache
from typing import Any

from torch import Tensor, nn

from minillama.visualize.attention_page import attention_picture, attention_table, attention_text, layers_text
from minillama.visualize.attention_view import AttentionView, attention_view, silence
from minillama.visualize.view import show, sources


class Attention:
    """What `attention` gives: a notebook shows it. `view` has the numbers, `widget()` the live part."""

    def __init__(self, model: nn.Module, view: AttentionView) -> None:
        self.model, self.view = model, view

    def __repr__(self) -> str:
        return attention_text(self.view)

    def _ipython_display_(self) -> None:
        show(attention_picture(self.view), attention_table(self.view), self.widget())

    def widget(self) -> Any:
        """The live view, an anywidget. What its user silences is run in this kernel, on this model."""
        widget = _kind()(
            maps=self.view.packed(), page=_page(self.view), silenced=_pairs(self.view), words=_words(self.view)
        )

        def answer(change: Any) -> None:
            heads = [(layer, head) for layer, head in change.new]
            widget.words = _words(silence(self.model, self.view, heads))

        widget.observe(answer, "silenced")
        return widget


def attention(
    model: nn.Module,
    tokenizer: Any,
    text: str | Sequence[int] | Tensor,
    *,
    head: tuple[int, int] | None = None,
    layers: Collection[int] | None = None,
    silenced: Collection[tuple[int, int]] = (),
) -> Attention:
    """Which word looks at which, in every head, and what the next word becomes without some: as the value of a cell.

    model, tokenizer: as `load` gives them; or transformers' `LlamaForCausalLM`, with either kind of tokenizer (None is
    enough for token ids). text: a string, or ids (T,), of 200 tokens at most.
    head: the (layer, head) shown large at first; None: one whose last word looks far back.
    layers: which to show; None: all. Where they are too large for a page, every second, third … of them is shown.
    silenced: heads that add nothing, for the next word's probabilities before and after.
    Raises ValueError for a text, layer or head that cannot be shown.
    """
    return Attention(model, attention_view(model, tokenizer, text, head=head, layers=layers, silenced=silenced))


@cache
def _kind() -> Any:
    """The widget's class, made when it is first used: the package works without notebooks."""
    import anywidget
    import traitlets

    class AttentionWidget(anywidget.AnyWidget):
        _esm, _css = sources("attention_view")
        maps = traitlets.Bytes().tag(sync=True)
        page = traitlets.Dict().tag(sync=True)
        silenced: Any = traitlets.List().tag(sync=True)
        words = traitlets.Dict().tag(sync=True)

        def __repr__(self) -> str:  # what a saved page says in its place
            return "Run this cell to click through heads and words, and to silence heads."

    return AttentionWidget


def _page(view: AttentionView) -> dict[str, Any]:
    return {
        "pieces": view.pieces,
        "layers": view.layers,
        "heads": view.percent.shape[1],
        "shown": layers_text(view),
        "head": view.head,
    }


def _pairs(view: AttentionView) -> list[list[int]]:
    return [list(head) for head in view.silenced]


def _words(view: AttentionView) -> dict[str, Any]:
    return {"silenced": _pairs(view), "rows": [list(row) for row in view.words()]}
