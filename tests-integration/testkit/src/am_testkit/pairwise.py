"""A few cases that stand for all: every two values that can occur together do so in one of them.

A case is a dict with one value by axis.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

Case = dict[str, Any]
Pair = frozenset[tuple[str, Any]]


def pairwise(candidates: Iterable[Case], cost: Callable[[Case], float] = lambda case: 1) -> list[Case]:
    """Some of the candidates in which every two values of two axes that occur together in any occur together.

    Args:
        candidates: all cases that may be chosen.
        cost: what a case takes; the cheapest that cover the most are chosen, and come first.
    """
    left = [(case, pairs(case), cost(case)) for case in candidates]
    missing = set().union(*(covered for _, covered, _ in left))
    chosen = []
    while missing:
        best = max(range(len(left)), key=lambda place: (len(missing & left[place][1]) / left[place][2], -place))
        chosen.append(best)
        missing -= left[best][1]
    return [left[place][0] for place in sorted(chosen, key=lambda place: (left[place][2], place))]


def covering(
    axes: Mapping[str, Collection],
    why_not: Callable[[Case], str | None],
    cost: Callable[[Case], float] = lambda case: 1,
) -> list[Case]:
    """`pairwise` of all legal cases, where these are too many to list.

    Args:
        axes: the values of each axis, the plainest first: it is taken where nothing asks for another. Axes whose
            values forbid those of others come first, or the search is long.
        why_not: why a case is illegal, or None. It also gets cases that lack axes, and must not object to what is
            legal with some value of those.
        cost: of a case, as in `pairwise`.
    """
    missing: dict[Pair, None] = {}  # in the order of the axes, so that the choice is the same everywhere
    for pair in _every_pair(axes):
        if not why_not(dict(pair)) and _completed(dict(pair), axes, why_not):
            missing[pair] = None
    candidates = []
    while missing:
        case = _densest(dict(next(iter(missing))), axes, why_not, missing)
        candidates.append(case)
        for pair in pairs(case):
            missing.pop(pair, None)
    return pairwise(candidates, cost)


def pairs(case: Case) -> set[Pair]:
    """Every two values of two axes that occur in a case."""
    return set(map(frozenset, itertools.combinations(case.items(), 2)))


def _every_pair(axes: Mapping[str, Collection]) -> Iterator[Pair]:
    for one, other in itertools.combinations(axes, 2):
        for value, another in itertools.product(reversed(axes[one]), reversed(axes[other])):
            yield frozenset([(one, value), (other, another)])


def _completed(
    case: Case, axes: Mapping[str, Collection], why_not: Callable, order: Callable | None = None
) -> Case | None:
    """A legal case with these values, or None if there is none: a search that goes back where it cannot go on."""
    axis = next((name for name in axes if name not in case), None)
    if axis is None:
        return {name: case[name] for name in axes}
    for value in order(axis, case) if order else axes[axis]:
        longer = case | {axis: value}
        if not why_not(longer) and (found := _completed(longer, axes, why_not, order)):
            return found
    return None


def _densest(case: Case, axes: Mapping[str, Collection], why_not: Callable, missing: Collection[Pair]) -> Case:
    """A legal case with these values that has many of the missing pairs: each axis takes the value that adds most."""

    def most_missing_first(axis: str, so_far: Case) -> list:
        def new(value: Any) -> int:
            return sum(frozenset([(axis, value), other]) in missing for other in so_far.items())

        return sorted(axes[axis], key=new, reverse=True)

    found = _completed(case, axes, why_not, most_missing_first)
    assert found is not None, "only pairs that can be completed are missing"
    return found
