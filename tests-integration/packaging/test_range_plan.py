"""Which versions are tried together, on small repositories; nothing is built."""

from __future__ import annotations

import pytest
from packaging.version import Version
from range_plan import TOGETHER, in_order, last_tag, lowest, plan_compat, plan_floor, plan_latest

OTHERS = ["torch>=2.11", "transformers>=5.17,<6"]
PINS = ("torch==2.11", "transformers==5.17")


@pytest.fixture
def chain(repository):
    """Three packages, each needing the one before, and one that may."""
    repository.add("am-base", needs=OTHERS)
    repository.add("am-middle", needs=["am-base>=0.1,<0.2", *OTHERS])
    repository.add("am-top", needs=["am-middle>=0.1,<0.2", *OTHERS])
    repository.add("am-aside", needs=OTHERS, extra=["am-base>=0.1,<0.2", "am-aside"])
    return repository


def tag(repository, *tags):
    for name in tags:
        repository.git("tag", name)


def test_each_package_comes_after_what_it_needs(chain):
    order = in_order(chain.root)
    assert sorted(order) == ["am-aside", "am-base", "am-middle", "am-top"]
    assert order.index("am-base") < min(order.index("am-middle"), order.index("am-aside"))
    assert order.index("am-middle") < order.index("am-top")


def test_the_floor_is_the_lower_end_of_what_is_declared(repository):
    repository.add("am-base", needs=["torch~=2.12.1", "transformers<6,>=5.17"])
    assert lowest(repository.root, "am-base", "torch") == Version("2.12.1")
    assert lowest(repository.root, "am-base", "transformers") == Version("5.17")


@pytest.mark.parametrize(
    ("needs", "words"),
    [
        (["torch<3", "transformers>=5"], "am-base needs torch<3, a range without a lower end; write torch>=X.Y"),
        (["torch>=2.11"], "am-base declares no range of transformers"),
    ],
)
def test_a_range_without_a_floor_is_refused(repository, needs, words):
    repository.add("am-base", needs=needs)
    with pytest.raises(ValueError, match=words):
        plan_floor(repository.root)


def test_at_the_floor_siblings_are_the_lowest_tagged_in_range(chain):
    chain.add("am-aside", needs=OTHERS, extra=["am-base>=0.1.2,<0.2"])
    tag(chain, "am-base-v0.0.9", "am-base-v0.1.0", "am-base-v0.1.10", "am-base-v0.1.2", "am-middle-v0.1.0")
    plans = {plan.of: plan for plan in plan_floor(chain.root)}
    assert plans["am-middle"].tags == ("am-base-v0.1.0",)
    assert plans["am-middle"].checkout == ("am-middle",)
    assert plans["am-top"].tags == ("am-middle-v0.1.0", "am-base-v0.1.0")
    assert plans["am-aside"].tags == ()
    assert {plan.pins for plan in plans.values()} == {PINS}
    assert not any(plan.notes for plan in plans.values())
    # The extra of am-aside asks for more of am-base than am-middle does.
    assert set(plans[TOGETHER].checkout) == {"am-aside", "am-top"}
    assert set(plans[TOGETHER].tags) == {"am-middle-v0.1.0", "am-base-v0.1.2"}


def test_a_tagged_sibling_asks_for_what_it_needed_then(chain):
    tag(chain, "am-base-v0.1.0", "am-middle-v0.1.0")
    chain.add("am-base", version="0.1.5", needs=OTHERS)
    chain.add("am-middle", needs=["am-base>=0.1.5,<0.2", *OTHERS])
    plans = {plan.of: plan for plan in plan_floor(chain.root)}
    assert plans["am-top"].tags == ("am-middle-v0.1.0", "am-base-v0.1.0")


def test_without_tags_the_checkout_stands_in_and_it_is_said(chain):
    plan = next(plan for plan in plan_floor(chain.root) if plan.of == "am-middle")
    assert (plan.tags, plan.checkout) == ((), ("am-middle", "am-base"))
    assert "no release of am-base is in <0.2,>=0.1 yet: that of the checkout stands in" in str(plan)


def test_siblings_that_are_neither_tagged_nor_here_in_the_range_are_refused(chain):
    tag(chain, "am-base-v0.0.9")
    chain.add("am-base", version="0.3.0", needs=OTHERS)
    with pytest.raises(ValueError, match=r"am-middle needs am-base<0.2,>=0.1: no tag is in that range, nor 0.3.0 here"):
        plan_floor(chain.root)


def test_packages_together_are_tried_at_the_highest_of_their_floors(chain):
    chain.add("am-aside", needs=["torch>=2.12", "transformers>=5.9"])
    pins = {plan.of: plan.pins for plan in plan_floor(chain.root)}
    assert pins["am-aside"] == ("torch==2.12", "transformers==5.9")
    assert pins["am-top"] == PINS
    assert pins[TOGETHER] == ("torch==2.12", "transformers==5.17")


def test_the_newest_are_asked_for_by_the_ranges(chain):
    plans = plan_latest(chain.root)
    assert {plan.of for plan in plans} == {*in_order(chain.root), TOGETHER}
    assert {plan.pins for plan in plans} == {("torch>=2.11", "transformers<6,>=5.17")}


def test_the_last_release_is_the_highest_and_a_pre_release_only_if_there_is_no_other(chain):
    assert last_tag(chain.root, "am-base") is None
    tag(chain, "am-base-v0.2.0rc1")
    assert last_tag(chain.root, "am-base") == "am-base-v0.2.0rc1"
    tag(chain, "am-base-v0.1.9", "am-base-v0.1.10")
    assert last_tag(chain.root, "am-base") == "am-base-v0.1.10"


def test_each_last_release_is_tried_with_the_others_of_the_checkout(chain):
    tag(chain, "am-base-v0.1.0", "am-middle-v0.1.0")
    chain.write("packages/am-base/README.md", "changed")
    chain.commit("Change base")
    chain.add("am-aside", needs=OTHERS)
    plans, left_out = plan_compat(chain.root, ["torch==2.13"])
    assert [plan.tags for plan in plans] == [("am-base-v0.1.0",), ("am-middle-v0.1.0",)]
    assert set(plans[1].checkout) == {"am-base", "am-top", "am-aside"}
    assert plans[1].pins == ("torch==2.13",)
    assert "changed since their own last tags: " in plans[1].notes[0]
    assert "am-base" in plans[1].notes[0]
    assert sorted(left_out) == [
        f"{name}: no tag {name}-vVERSION, nothing released yet" for name in ("am-aside", "am-top")
    ]


def test_what_the_ranges_leave_out_is_not_tried_and_named(chain):
    tag(chain, "am-base-v0.1.0", "am-middle-v0.1.0", "am-top-v0.1.0", "am-aside-v0.1.0")
    chain.add("am-base", version="0.2.0", needs=OTHERS)
    chain.add("am-middle", needs=["am-base>=0.2,<0.3", *OTHERS])
    chain.add("am-aside", needs=OTHERS)
    plans, left_out = plan_compat(chain.root, ["torch==2.13"])
    assert [plan.tags for plan in plans] == [("am-top-v0.1.0",)]
    assert "am-base-v0.1.0: am-middle 0.1.0 needs am-base<0.3,>=0.2, which leaves out am-base 0.1.0" in left_out
    assert "am-middle-v0.1.0: am-middle 0.1.0 needs am-base<0.2,>=0.1, which leaves out am-base 0.2.0" in left_out
    assert "am-aside-v0.1.0: am-aside 0.1.0 needs am-base<0.2,>=0.1, which leaves out am-base 0.2.0" in left_out
