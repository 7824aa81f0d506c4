"""What the lens view shows, as numbers: behind every token, after every layer, the likeliest next words.

Letters: R depths that are shown, T tokens, K words at each place, N words that can be followed, V vocabulary.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from minillama.visualize.anatomy import anatomy
from minillama.visualize.lens import at_each_depth
from minillama.visualize.view import SHOWN_WORDS, layers_of, pack, read, that_fit

FOLLOWED = 500  # words, at most, that a page can show the way of


@dataclass(frozen=True)
class LensView:
    """One text as the output head reads it on its way through the layers.

    tokens (T,) int64; pieces: the same, to read. depths: after how many of the `n_layers` layers the stream is read, a
    row each. top, shares (R, T, K): the ids of the likeliest next words, the likeliest first, and their probabilities.
    entropy (R, T), in nats. rank (R, T): the place, from 1, of the word with which the text goes on; 0 behind the last.
    words (N,) int64: those whose way can be followed, first those of the text; roots (N, R, T) uint8: the roots of
    their probabilities, in 255ths. word: the one followed at first, if any. spell: a token's id → its piece.
    """

    tokens: Tensor
    pieces: list[str]
    n_layers: int
    n_words: int
    depths: list[int]
    top: Tensor
    shares: Tensor
    entropy: Tensor
    rank: Tensor
    words: Tensor
    roots: Tensor
    word: int | None
    spell: Callable[[int], str]

    @property
    def names(self) -> list[str]:
        """A name for each row."""
        return ["embedding" if depth == 0 else f"after layer {depth - 1}" for depth in self.depths]

    def following(self, word: int) -> Tensor:
        """The probability of one of `words` at each place, (R, T), within 0.2 %."""
        return (self.roots[self.words.tolist().index(word)] / 255).square()

    def rows(self, rows: list[int]) -> "LensView":
        """The same with some of its rows only."""
        return replace(
            self, depths=[self.depths[row] for row in rows], top=self.top[rows], shares=self.shares[rows],
            entropy=self.entropy[rows], rank=self.rank[rows], roots=self.roots[:, rows].contiguous(),
        )  # fmt: skip

    @cached_property
    def listed(self) -> list[int]:
        """The ids of all words that are shown: those that can be followed, then the others."""
        followed = self.words.tolist()
        return followed + sorted({*self.top.flatten().tolist()} - set(followed))

    def packed(self) -> bytes:
        """All numbers as a page takes them, deflated: rank uint32 (R, T); the words' places in `listed` and their
        shares in 10,000ths, uint16 (K, R, T); entropy in 1,000ths of a nat, uint16 (R, T); roots uint8."""
        place = {word: i for i, word in enumerate(self.listed)}
        top = torch.tensor([place[i] for i in self.top.flatten().tolist()]).view(self.top.shape).movedim(-1, 0)
        shares = (self.shares.movedim(-1, 0) * 10_000).round()
        return pack(
            self.rank.numpy().astype("<u4"), top.numpy().astype("<u2"), shares.numpy().astype("<u2"),
            (self.entropy * 1000).round().numpy().astype("<u2"), self.roots.numpy(),
        )  # fmt: skip


@torch.inference_mode()
def lens_view(
    model: nn.Module,
    tokenizer: Any,
    text: str | Sequence[int] | Tensor,
    *,
    word: int | None = None,
    layers: Collection[int] | None = None,
) -> LensView:
    """Read the stream at every depth. For the arguments, and when it raises ValueError, see `lens`."""
    tokens, spell = read(tokenizer, text)
    count = len(anatomy(model).blocks)
    depths = [0, *(layer + 1 for layer in layers_of(layers, count))]
    found: list[tuple[Tensor, ...]] = []
    for logs in at_each_depth(model, tokens, depths):
        if word is not None and not 0 <= word < logs.shape[-1]:
            raise ValueError(f"the word to follow is {word}, expected a token's id, 0 to {logs.shape[-1] - 1}.")
        shares, top = logs.exp().topk(min(SHOWN_WORDS, logs.shape[-1]))
        entropy = torch.special.entr(logs.exp()).sum(-1)
        after = logs.gather(-1, tokens.roll(-1)[:, None])
        rank = (logs > after).sum(-1) + 1
        rank[-1] = 0
        found.append((top, shares, entropy, rank, _roots(logs)))
    top, shares, entropy, rank, roots = (torch.stack(parts) for parts in zip(*found, strict=True))
    words = _followed(tokens, word, top, shares)
    view = LensView(
        tokens=tokens,
        pieces=[spell(i) for i in tokens.tolist()],
        n_layers=count,
        n_words=roots.shape[-1],
        depths=depths,
        top=top,
        shares=shares,
        entropy=entropy,
        rank=rank,
        words=words,
        roots=roots[..., words].movedim(-1, 0).contiguous(),
        word=word,
        spell=spell,
    )
    sizes = [len(view.rows([row]).packed()) for row in range(len(depths))]
    return view.rows(that_fit(sizes, len(depths) - 1))


def _roots(logs: Tensor) -> Tensor:
    """Probabilities as a page keeps them: the eye tells apart by their roots what it sees of them as colours."""
    return ((logs / 2).exp() * 255).round().to(torch.uint8)


def _followed(tokens: Tensor, word: int | None, top: Tensor, shares: Tensor) -> Tensor:
    """Ids (N,) of the words to follow: the one that is asked for, the text's own, and the likeliest anywhere."""
    order = top.flatten()[shares.flatten().argsort(descending=True, stable=True)]
    asked = [] if word is None else [word]
    return torch.tensor(list(dict.fromkeys([*asked, *tokens[1:].tolist(), *order.tolist()]))[:FOLLOWED])
