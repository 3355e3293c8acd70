"""The compositions that the packages are tested in: one table of axes, what is legal in it, a few that stand for all.

A composition is a dict of degrees by axis. `tp` is `"2 sp"` with sequence parallelism.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from typing import Any

Composition = dict[str, Any]

AXES: dict[str, tuple] = {
    "pp": (1, 2),
    "dp_replicate": (1, 2),
    "dp_shard": (1, 2),
    "cp": (1, 2),
    "tp": (1, 2, "2 sp"),
    "ep": (1, 2, 4),
}


def ranks(composition: Composition) -> int:
    """How many ranks a composition takes: all axes but `ep`, which lies over the ranks of a stage."""
    return math.prod(_size(degree) for axis, degree in composition.items() if axis in AXES and axis != "ep")


def name(composition: Composition) -> str:
    """Such as `pp2-tp2sp-ep2`: the axes that are not 1, or `one`."""
    degrees = [f"{a}{str(d).replace(' ', '')}" for a, d in composition.items() if a in AXES and d != 1]
    return "-".join(degrees) or "one"


def product(most: int = 8) -> list[Composition]:
    """Every product of `AXES` on at most so many ranks."""
    every = (dict(zip(AXES, degrees, strict=True)) for degrees in itertools.product(*AXES.values()))
    return [composition for composition in every if ranks(composition) <= most]


def why_not(composition: Composition, experts: bool) -> str | None:
    """What makes a composition of a model with or without experts illegal; None if it is legal."""
    if composition["ep"] > 1 and not experts:
        return "the model has no experts"
    if ranks(composition) // composition["pp"] % composition["ep"]:
        return "ep does not divide the ranks of a stage"
    return None


def pairwise(compositions: Iterable[Composition]) -> list[Composition]:
    """Some of them in which every two values of two axes that occur together in any occur together, few ranks first."""
    left = list(compositions)
    missing = {pair for composition in left for pair in _pairs(composition)}
    chosen = []
    while missing:
        # Most new pairs for the ranks it takes: eight ranks cost four times what two do.
        best = max(left, key=lambda c: (len(missing & _pairs(c)) / (4 + ranks(c)), -left.index(c)))
        chosen.append(best)
        missing -= _pairs(best)
    return sorted(chosen, key=lambda c: (ranks(c), left.index(c)))


def _pairs(composition: Composition) -> set[tuple]:
    return set(_each_pair(composition))


def _each_pair(composition: Composition) -> Iterator[tuple]:
    yield from itertools.combinations(composition.items(), 2)


def _size(degree: int | str) -> int:
    return int(str(degree).split()[0])
