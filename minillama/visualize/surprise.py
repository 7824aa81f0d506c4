"""Where a model is surprised, and where it should be: its loss at each token of a story beside the world's own nats."""

import html
from typing import NamedTuple

import torch
from torch import Tensor

from minillama import world
from minillama.model import Llama
from minillama.tokenizer import Tokenizer
from minillama.visualize.grid import colour

STRONGEST = 4.0  # nats, from which on no colour is stronger: one word that costs twenty does not hide the others


class Surprises(NamedTuple):
    """Nats of every token of a story, without BOS and with EOS: by the model, and as the world is (both (T,))."""

    pieces: list[str]
    model: Tensor
    world: Tensor

    @property
    def excess(self) -> Tensor:
        """What the model pays above the world, (T,): where it is wrong. Summed over many stories it is a KL divergence,
        and there above zero; for a single token it may be below, when the model happened to bet on what came."""
        return self.model - self.world

    def __repr__(self) -> str:
        dear = ", ".join(f"“{self.pieces[i]}” {self.excess[i]:+.1f}" for i in self.excess.topk(3).indices.tolist())
        return f"{self._sums} Dearest, against the world: {dear}."

    @property
    def _sums(self) -> str:
        return f"{self.model.sum():.1f} nats by the model, {self.world.sum():.1f} in the world."

    def _repr_html_(self) -> str:
        largest = min(max(self.excess.abs().max().item(), 0.3), STRONGEST)
        numbers = (x.tolist() for x in (self.excess.clamp(-largest, largest), self.model.clamp(min=0), self.world))
        spans = [
            f'<span title="model {ours:.2f}, world {true:.2f} nats" style="white-space:pre-wrap;'
            f'background-color:{colour(over, largest)}">{html.escape(piece)}</span>'
            for piece, over, ours, true in zip(self.pieces, *numbers, strict=True)
        ]
        said = (
            f"{self._sums} Blue: the model pays more than it must; orange: less. Rest the pointer on a word for its "
            "numbers."
        )
        return f'<div style="line-height:1.7">{"".join(spans)}<br><small>{html.escape(said)}</small></div>'


@torch.inference_mode()
def surprises(model: Llama, tokenizer: Tokenizer, text: str) -> Surprises:
    """A story of the toy world, token by token. Raises `world.Fault` for a text that the world does not tell."""
    letters = world.surprises(text)
    ids = torch.tensor(tokenizer.encode(text, bos=True, eos=True), device=model.norm.weight.device)
    logits = model(ids[None, :-1])[0].float()
    ours = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none").cpu()
    told, pieces, nats, place = ids[1:-1].tolist(), [], [], 0
    for n in range(1, len(told) + 1):
        piece = tokenizer.decode(told[:n])[place:]
        pieces.append(piece)
        nats.append(sum(letters[place : place + len(piece)]))
        place += len(piece)
    return Surprises([*pieces, " ∎"], ours, torch.tensor([*nats, 0.0]))
