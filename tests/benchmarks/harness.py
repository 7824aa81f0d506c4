"""What the benchmarks share: how two rivals are timed, and what a row of the table is."""

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch


class Times(NamedTuple):
    """Medians over the rounds: seconds of one call of each, and how many times as fast ours is."""

    ours: float
    peer: float
    ratio: float  # peer's seconds / our seconds


def race(ours: Callable[[], Any], peer: Callable[[], Any], rounds: int) -> Times:
    """Time both in turns, so that whatever else the machine does falls on both alike.

    A round is one call of each; who goes first alternates. The ratio is taken within each round. One round before
    the first is not counted: it warms caches up.
    """
    times: dict[Callable, list[float]] = {ours: [], peer: []}
    for number in range(rounds + 1):
        for call in (ours, peer) if number % 2 else (peer, ours):
            start = time.perf_counter()
            call()
            times[call].append(time.perf_counter() - start)
    mine, other = times[ours][1:], times[peer][1:]
    ratios = [theirs / own for own, theirs in zip(mine, other, strict=True)]
    return Times(statistics.median(mine), statistics.median(other), statistics.median(ratios))


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Within this context PyTorch computes with this many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def row(
    name: str,
    ours: float,
    peer: float,
    unit: str,
    ratio: float,
    *,
    at_least: float | None = None,
    at_most: float | None = None,
) -> dict[str, Any]:
    """A row of the table: two measured values in one unit, their ratio, and whether it meets its target (if any)."""
    assert at_least is None or at_most is None, "a row has one target"
    if at_least is not None:
        target, met = f"≥ {at_least:g}", ratio >= at_least
    elif at_most is not None:
        target, met = f"≤ {at_most:g}", ratio <= at_most
    else:
        target, met = "", True
    return {"name": name, "ours": ours, "peer": peer, "unit": unit, "ratio": ratio, "target": target, "met": met}
