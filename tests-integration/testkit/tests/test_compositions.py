"""The table of compositions: what is in it, and that a few stand for all."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from am_testkit.compositions import AXES, name, pairwise, product, ranks, why_not


def test_the_product_has_every_composition_that_fits_once():
    found = product(8)
    assert len({name(composition) for composition in found}) == len(found) == 37 * 3
    assert max(map(ranks, found)) == 8
    assert {composition["tp"] for composition in found} == {1, 2, "2 sp"}


def test_experts_need_a_model_that_has_them_and_ranks_of_a_stage():
    one = dict.fromkeys(AXES, 1)
    assert why_not(one | {"dp_shard": 2, "ep": 2}, experts=True) is None
    assert why_not(one | {"dp_shard": 2, "ep": 2}, experts=False) == "the model has no experts"
    assert why_not(one | {"pp": 2, "ep": 2}, experts=True) == "ep does not divide the ranks of a stage"
    assert name(one | {"tp": "2 sp", "ep": 2}) == "tp2sp-ep2"


@given(st.sets(st.sampled_from(range(111)), min_size=1))
def test_a_few_of_any_have_every_pair_of_degrees_that_all_have(picked):
    every = product(8)
    some = [every[index] for index in sorted(picked)]
    pairs = [{pair for c in group for pair in itertools.combinations(c.items(), 2)} for group in (some, pairwise(some))]
    assert pairs[0] == pairs[1]
    assert len(pairwise(some)) <= len(some)
