"""What the attention view shows, as numbers: every head's map, one head chosen, and the next word's probabilities.

Letters: L layers that are shown, H heads, T tokens, V vocabulary.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from minillama.visualize.anatomy import anatomy, logits_of
from minillama.visualize.record import ablate, record
from minillama.visualize.view import MAX_BYTES, SHOWN_WORDS, layers_of, pack, read, that_fit


@dataclass(frozen=True)
class AttentionView:
    """One text as the heads see it.

    tokens (T,) int64; pieces: the same, to read. layers: the numbers of those shown, of `n_layers`.
    percent (L, H, T, T) uint8: how much each token looks at each, the last axis being what is looked at.
    head: the (layer, head) that is shown large; `silenced`: those that add nothing in `after`.
    before, after (V,): probabilities of the next token, from the whole model and with heads silenced.
    spell: a token's id → its piece.
    """

    tokens: Tensor
    pieces: list[str]
    n_layers: int
    layers: list[int]
    percent: Tensor
    head: tuple[int, int]
    silenced: list[tuple[int, int]]
    before: Tensor
    after: Tensor
    spell: Callable[[int], str]

    @property
    def chosen(self) -> Tensor:
        """The chosen head's map (T, T), in percent."""
        return self.percent[self.layers.index(self.head[0]), self.head[1]]

    def links(self, count: int = 10) -> list[tuple[int, int, int]]:
        """The chosen head's strongest links (looking, seen, percent), but those to itself and to the first token, where
        heads rest."""
        others = self.chosen.tril(-1)
        others[:, 0] = 0
        values, places = others.flatten().sort(descending=True, stable=True)
        found = zip(values[:count].tolist(), places[:count].tolist(), strict=True)
        return [(*divmod(place, len(self.pieces)), share) for share, place in found if share]

    def words(self) -> list[tuple[str, float, float]]:
        """The next words that are likely before or after, as (piece, before, after), the likeliest before first."""
        ids = self.before.maximum(self.after).topk(min(SHOWN_WORDS, len(self.before))).indices
        ids = ids[self.before[ids].argsort(descending=True, stable=True)]
        return [(self.spell(i), float(self.before[i]), float(self.after[i])) for i in ids.tolist()]

    def packed(self) -> bytes:
        """The maps as a page takes them: percent as (L, H, seen, looking), deflated.

        In this order what all look at (the first token, mostly) lies together, which makes it a quarter smaller.
        """
        return _pack(self.percent)


def attention_view(
    model: nn.Module,
    tokenizer: Any,
    text: str | Sequence[int] | Tensor,
    *,
    head: tuple[int, int] | None = None,
    layers: Collection[int] | None = None,
    silenced: Collection[tuple[int, int]] = (),
) -> AttentionView:
    """Run the model on a text, and once more with heads silenced if any are.

    For the arguments, and when it raises ValueError, see `attention`.
    """
    tokens, spell = read(tokenizer, text)
    count = len(anatomy(model).blocks)
    numbers = layers_of(layers, count)
    with record(model, "attention", layers=numbers) as seen, torch.inference_mode():
        model(tokens[None].to(next(model.parameters()).device))
    shares = seen.attention[:, 0]
    place, column = _busiest(shares) if head is None else _place(head, numbers, shares.shape[1])
    kept = _that_fit(shares, place)
    before = next_probabilities(model, tokens)
    view = AttentionView(
        tokens=tokens,
        pieces=[spell(i) for i in tokens.tolist()],
        n_layers=count,
        layers=[numbers[i] for i in kept],
        percent=_percent(shares[kept]),
        head=(numbers[place], column),
        silenced=[],
        before=before,
        after=before,
        spell=spell,
    )
    return silence(model, view, silenced)


def silence(model: nn.Module, view: AttentionView, heads: Collection[tuple[int, int]]) -> AttentionView:
    """The view with these heads silenced, and no others: `after` changes. Raises ValueError for a head that is not."""
    after = next_probabilities(model, view.tokens, heads) if heads else view.before
    return replace(view, silenced=sorted(set(heads)), after=after)


def next_probabilities(model: nn.Module, tokens: Tensor, silenced: Collection[tuple[int, int]] = ()) -> Tensor:
    """How likely each token comes next after tokens (T,), with some heads (layer, head) silenced: (V,) on the CPU."""
    with ablate(model, heads=silenced):
        return logits_of(model, tokens[None])[0, -1].softmax(-1).cpu()


def _busiest(shares: Tensor) -> tuple[int, int]:
    """The (layer, head), as places in shares, whose last token looks most at one word further back: not at the first
    token, where heads rest, nor at itself and the word before, which many do."""
    back = shares[:, :, -1, 1:-2]
    layer, head = divmod(int(back.amax(-1).argmax()), shares.shape[1]) if back.shape[-1] else (0, 0)
    return layer, head


def _place(head: tuple[int, int], layers: list[int], n_heads: int) -> tuple[int, int]:
    layer, column = head
    if layer not in layers or not 0 <= column < n_heads:
        raise ValueError(
            f"there is no layer and head {head} to show, expected a layer of {layers}, a head of 0 to {n_heads - 1}."
        )
    return layers.index(layer), column


def _that_fit(shares: Tensor, place: int) -> list[int]:
    """Places of layers that fit into a page: all, or every second, third …, with the chosen one among them."""
    sizes = [len(_pack(_percent(layer))) for layer in shares]
    if kept := that_fit(sizes, place):
        return kept
    raise ValueError(
        f"one layer takes {sizes[place]} bytes, expected {MAX_BYTES} at most: give a shorter text than these "
        f"{shares.shape[-1]} tokens."
    )


def _percent(shares: Tensor) -> Tensor:
    return (shares * 100).round().to(torch.uint8)


def _pack(percent: Tensor) -> bytes:
    return pack(percent.transpose(-1, -2).contiguous().numpy())
