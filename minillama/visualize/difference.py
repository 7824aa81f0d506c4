"""The first difference between two models that should be equal: where a fault is, not what comes of it.

Letters: B batch, T tokens, H heads, K key/value heads, D head_dim.
"""

import contextlib
import html
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from minillama.model import Llama
from minillama.rope import halves_to_pairs, pairs_to_halves
from minillama.visualize.anatomy import anatomy, logits_of, readable_attention, sizes_of, turned

# What is compared in each layer, in the order of computation. What is no module's output is named by what it is.
LAYER = {
    "attention_norm": "norm before attention",
    "attention.wq": "queries",
    "attention.wk": "keys",
    "attention.wv": "values",
    "attention.q": "positions: queries turned",
    "attention.k": "positions: keys turned",
    "attention.tap": "attention probabilities",
    "attention.heads": "what each head mixes",
    "attention.wo": "attention's output",
    "stream": "stream after attention",
    "feedforward_norm": "norm before feed-forward",
    "feedforward.gate": "gate",
    "feedforward.up": "neurons before the gate",
    "feedforward.neurons": "neurons, opened by the gate",
    "feedforward.down": "feed-forward's output",
    "": "stream after the layer",
}
TURNED = ("wq", "wk", "q", "k")  # transformers orders their numbers in another way
# A step by itself rounds to at most 1e-5 in fp32 and 0.09 in bf16, measured against transformers, in softmax: it turns
# the rounding of a large score into that many parts of the probability. 8 bits come to 0.06, 4 bits to 0.16.
TOLERANCE, TOLERANCE_HALF = 2e-5, 0.1
CELL = "padding:1px 4px;text-align:center;font-size:80%;white-space:pre"


@dataclass(frozen=True)
class Place:
    """One tensor that both models compute.

    name: ours, such as "blocks.1.attention.wk". what: the same in words. layer: None outside of the layers.
    size: the largest difference between two numbers. relative: the largest as a part of its token's largest number.
    token: (row, position, id) of the first that differs by more than is tolerated; None if all agree.
    """

    name: str
    what: str
    layer: int | None
    size: float
    relative: float
    token: tuple[int, int, int] | None


@dataclass(frozen=True)
class Difference:
    """Where two models were compared, in the order of computation: `print` it, or show it in a notebook."""

    places: tuple[Place, ...]
    tolerance: float

    @property
    def first(self) -> Place | None:
        """The first place that differs, or None."""
        return next((place for place in self.places if place.token), None)

    @property
    def headline(self) -> str:
        """The result in one sentence."""
        if (first := self.first) and first.token:
            row, position, token = first.token
            return (
                f"First difference: {first.name}, {first.what}, at row {row}, position {position} (token {token}): "
                f"up to {first.size:.2g}, relative {_number(first.relative)}, tolerated {_number(self.tolerance)}."
            )
        most = max(self.places, key=lambda place: place.relative)
        least = f"{most.name} least: relative {_number(most.relative)}" if most.relative else "in every bit"
        return f"No difference: {len(self.places)} places agree, {least}, tolerated {_number(self.tolerance)}."

    def __str__(self) -> str:
        lines = [self.headline]
        for agree, group in groupby(self.places if self.first else (), lambda place: place.token is None):
            run = list(group)
            if agree and len(run) > 1:
                most = _number(max(place.relative for place in run))
                lines.append(f"= {f'{run[0].name} … {run[-1].name}':<55} {most:>7}  at most, in {len(run)} places")
                continue
            for place in run:
                mark = "=" if agree else "→" if place is self.first else "≠"
                lines.append(f"{mark} {place.name:<55} {_number(place.relative):>7}  {place.what}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """A row for each layer, in it a cell for each place. Light, middle, dark: agrees, differs, differs first."""
        heads = "".join(_heading(_short(part), "col", what) for part, what in LAYER.items())
        rows = [f"<tr>{_heading('layer', 'col')}{heads}</tr>"]
        for layer, group in groupby(self.places, lambda place: place.name if place.layer is None else place.layer):
            known = {place.what: place for place in group}
            if isinstance(layer, str):
                cells = [self._drawn(place, len(LAYER)) for place in known.values()]
            else:
                cells = [self._drawn(known[what]) if what in known else "<td>–</td>" for what in LAYER.values()]
            rows.append(f"<tr>{_heading(str(layer), 'row')}{''.join(cells)}</tr>")
        return (
            '<div style="overflow-x:auto"><table style="border-collapse:separate;border-spacing:2px;color:inherit">'
            f'<caption style="caption-side:top;text-align:left;padding:4px">{html.escape(self.headline)}</caption>'
            f"{''.join(rows)}</table></div>"
        )

    def _drawn(self, place: Place, columns: int = 1) -> str:
        mark, style = "", "background:#cfe3f1;color:#10222e"
        if place.token:
            mark, style = "≠ ", "background:#e69f00;color:#000000"
        if place is self.first:
            mark, style = "→ ", "background:#8a2f00;color:#ffffff;font-weight:bold"
        title = f"{place.name}, {place.what}: up to {place.size:.2g}"
        return (
            f'<td colspan="{columns}" title="{html.escape(title)}" style="{CELL};{style}">'
            f"{mark}{_number(place.relative, 0)}</td>"
        )


def first_difference(
    model_a: nn.Module, model_b: nn.Module, tokens: Tensor, tolerance: float | None = None
) -> Difference:
    """Walk two models, each a `Llama` or transformers' LLaMA, on tokens (B, T): `.first` is the first tensor to differ.

    After each comparison model_b goes on with model_a's numbers. So a difference is made where it is found, and no
    rounding adds up on the way; only from a layer's turned queries and keys to what its heads mix it is handed on. A
    place that one of the two does not pass (a forward of its own may skip it) is left out.
    tolerance: relative to a token's largest number; None: 2e-5 between fp32 models, 0.1 if one is in half precision or
    quantized. All is compared in fp32; what model_a computes is held in memory. Both are left as they were.
    Raises ValueError for models of different sizes, and for tokens of another shape.
    """
    sizes, others = sizes_of(model_a), sizes_of(model_b)
    if odd := [name for name in sizes if sizes[name] != others[name]]:
        raise ValueError(
            f"the models differ in {odd[0]}, {sizes[odd[0]]} and {others[odd[0]]}, expected the same sizes: "
            "give two models with the same tensors."
        )
    if tokens.dim() != 2 or not tokens.numel():
        raise ValueError(f"tokens have the shape {tuple(tokens.shape)}, expected (batch, time), both at least 1.")
    if tolerance is None:
        exact = all(next(model.parameters()).dtype.itemsize >= 4 for model in (model_a, model_b))
        tolerance = TOLERANCE if exact else TOLERANCE_HALF
    expected: dict[str, Tensor] = {}
    gaps: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(name: str, x: Tensor) -> Tensor:
        expected[name] = x
        return x

    def compare(name: str, x: Tensor) -> Tensor:
        if name not in expected:
            return x
        gaps[name] = _gaps(expected[name].to(x.device), x)
        return expected[name]

    with _watched(model_a, keep):
        keep("output", logits_of(model_a, tokens))
    with _watched(model_b, compare):
        compare("output", logits_of(model_b, tokens))

    parts = [(i, part, what) for i in range(sizes["n_layers"]) for part, what in LAYER.items()]
    order: list[tuple[str, str, int | None]] = [("embedding", "embedding", None)]
    order += [(f"blocks.{i}.{part}".rstrip("."), what, i) for i, part, what in parts]
    order += [("norm", "last norm", None), ("output", "logits", None)]
    places = []
    for name, what, layer in order:
        if name in gaps:
            size, relative = gaps[name]
            beyond = (~(relative <= tolerance)).nonzero().tolist()  # so that NaN counts, which is in no order
            token = (*beyond[0], int(tokens[tuple(beyond[0])])) if beyond else None
            places.append(Place(name, what, layer, size.max().item(), relative.max().item(), token))
    return Difference(tuple(places), tolerance)


def _gaps(expected: Tensor, got: Tensor) -> tuple[Tensor, Tensor]:
    """The largest difference in each token (B, T), and the same as a part of the token's largest number."""
    if expected.dim() == 4:  # probabilities (B, H, T, T): a token's are those with which it looks
        expected, got = expected.transpose(1, 2), got.transpose(1, 2)
    expected, got = expected.float().flatten(2), got.float().flatten(2)
    same = (expected == got) | (expected.isnan() & got.isnan())  # the difference of two infinities would be NaN
    size = (expected - got).abs().masked_fill(same, 0).amax(-1)
    scale = expected.abs().nan_to_num(0, 0).amax(-1).clamp_min(torch.finfo(torch.float32).tiny)
    return size, size / scale


@contextlib.contextmanager
def _watched(model: nn.Module, look: Callable[[str, Tensor], Tensor]) -> Iterator[None]:
    """Show all that is compared to `look`, by name and in our layout, and put what it returns in its place."""
    body, head_dim = anatomy(model), sizes_of(model)["head_dim"]

    def show(name: str, x: Tensor, rows: slice = slice(None)) -> Tensor | None:
        in_halves = not isinstance(model, Llama) and name.rpartition(".")[2] in TURNED
        part = _reorder(halves_to_pairs, x[..., rows], head_dim) if in_halves else x[..., rows]
        other = look(name, part)
        if other is part:
            return None
        x = x.clone()
        x[..., rows] = _reorder(pairs_to_halves, other, head_dim) if in_halves else other
        return x

    def positions(at: str, module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        x, turn = inputs[:2] if inputs else (named["hidden_states"], named["position_embeddings"])
        for name, y in zip("qk", turned(module, x, turn), strict=True):
            show(f"{at}.{name}", y)

    def beside(name: str, module: nn.Module, inputs: Any, output: tuple[Tensor, Tensor]) -> None:
        show(name, output[1])

    with contextlib.ExitStack() as hooks:
        hooks.enter_context(readable_attention(model))

        def before(name: str, module: nn.Module) -> None:
            hooks.callback(module.register_forward_pre_hook(lambda _, inputs: show(name, inputs[0])).remove)

        def after(name: str, module: nn.Module, rows: slice = slice(None)) -> None:
            hooks.callback(module.register_forward_hook(lambda _, inputs, output: show(name, output, rows)).remove)

        after("embedding", body.embedding)
        for i, (block, attention) in enumerate(zip(body.blocks, body.attentions, strict=True)):
            at = f"blocks.{i}"
            after(f"{at}.attention_norm", body.attention_norms[i])
            for name in ("wq", "wk", "wv"):
                after(f"{at}.attention.{name}", *getattr(body, name)[i])
            turning = partial(positions, f"{at}.attention")
            hooks.callback(attention.register_forward_pre_hook(turning, with_kwargs=True).remove)
            if isinstance(model, Llama):
                after(f"{at}.attention.tap", attention.tap)
            else:  # they come back beside the output, when nothing reads them any more
                hooks.callback(attention.register_forward_hook(partial(beside, f"{at}.attention.tap")).remove)
            before(f"{at}.attention.heads", body.wo[i])
            after(f"{at}.attention.wo", body.wo[i])
            before(f"{at}.stream", body.feedforward_norms[i])
            after(f"{at}.feedforward_norm", body.feedforward_norms[i])
            for name in ("gate", "up"):
                after(f"{at}.feedforward.{name}", *getattr(body, name)[i])
            before(f"{at}.feedforward.neurons", body.down[i])
            after(f"{at}.feedforward.down", body.down[i])
            after(at, block)
        after("norm", body.norm)
        yield


def _reorder(order: Callable[[Tensor, int], Tensor], x: Tensor, head_dim: int) -> Tensor:
    """What `order` does to rows, done to the last axis."""
    return order(x.movedim(-1, 0), head_dim).movedim(0, -1)


def _number(x: float, digits: int = 1) -> str:
    return f"{x:.{digits}e}" if x else "0"


def _short(part: str) -> str:
    return part.replace(".", "_").rpartition("_")[2] or "end"


def _heading(text: str, scope: str, title: str = "") -> str:
    return f'<th scope="{scope}" title="{html.escape(title)}" style="{CELL};font-weight:normal">{text}</th>'
