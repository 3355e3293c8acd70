"""A few cases that stand for all, of candidates and of axes with rules."""

from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from am_testkit.pairwise import covering, pairs

AXES = {"a": (0, 1, 2), "b": (0, 1, 2, 3), "c": (0, 1), "d": (0, 1, 2)}
EVERY_PAIR = [
    ((one, x), (other, y)) for one, other in itertools.combinations(AXES, 2) for x in AXES[one] for y in AXES[other]
]


@settings(deadline=None)
@given(st.sets(st.sampled_from(EVERY_PAIR), max_size=12), st.sampled_from([None, 1, 4]))
def test_every_two_values_that_can_occur_together_do(forbidden, largest_sum):
    def why_not(case):
        if pairs(case) & forbidden:
            return "forbidden"
        if largest_sum is not None and len(case) == len(AXES) and sum(case.values()) > largest_sum:
            return "too much"
        return None

    every = [dict(zip(AXES, values, strict=True)) for values in itertools.product(*AXES.values())]
    legal = [case for case in every if not why_not(case)]
    chosen = covering(AXES, why_not, cost=lambda case: 1 + case["a"])
    assert all(case in legal for case in chosen)
    assert set().union(*map(pairs, chosen)) == set().union(*map(pairs, legal))
    assert [case["a"] for case in chosen] == sorted(case["a"] for case in chosen), "the cheapest first"


def test_a_few_stand_for_many():
    assert len(covering(AXES, lambda case: None)) <= 16, "12 are the fewest: three times four values"
