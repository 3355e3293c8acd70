"""The compositions that the packages are tested in: one table of axes, what is legal in it, a few that stand for all.

A composition is a dict of degrees by axis. `tp` is `"2 sp"` with sequence parallelism.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from typing import Any

from am_testkit import pairwise as few

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
    return few.pairwise(compositions, cost)


def cost(composition: Composition) -> int:
    """Eight ranks take four times what two do."""
    return 4 + ranks(composition)


def _size(degree: int | str) -> int:
    return int(str(degree).split()[0])
