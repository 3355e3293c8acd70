"""The head of a suite that draws from `conditions`: which cases run, and what each of them must show."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from typing import Any

import pytest

from am_testkit import compositions, conditions
from am_testkit.compared import compare, largest_anywhere
from am_testkit.conditioned import tolerance
from am_testkit.pairwise import Case
from am_testkit.programs import Loop


def draw(usual: Mapping[str, Collection], narrow: Collection[str], *, most: int = 4, copied: bool = False) -> list[Any]:
    """Cases for `parametrize`, on two to `most` ranks, in which every legal pair of values occurs.

    Args:
        usual: the values of some axes; the others stay plain. With `AM_SWEEP` every axis of conditions has all.
        narrow: axes of conditions that have with `AM_SWEEP` too what they have usually.
        copied: whether every second program starts with a deep copy, of a model that can be copied.
    """
    axes = dict(usual)
    if os.environ.get("AM_SWEEP"):
        plain = {axis: (conditions.PLAIN[axis],) for axis in narrow}
        layouts = {axis: values for axis, values in usual.items() if axis in conditions.LAYOUTS}
        axes = conditions.AXES | plain | {axis: usual[axis] for axis in narrow if axis in usual} | layouts
    cases = conditions.cross(axes, least=2, most=most)
    copies = ("none", "deep copy") if copied else ("none",)
    return [_parameter(case | {"copies": copies[place % len(copies)]}) for place, case in enumerate(cases)]


def assert_trains_like_one_process(case: Case, laid_out: Loop) -> None:
    """Losses, norms, gradients and weights of a case's program, on every rank."""
    errors = compare(case, laid_out)
    worst = largest_anywhere(max(errors.values()))
    bad = {what: f"{error:.1e}" for what, error in errors.items() if not error <= tolerance(case)}
    assert worst <= tolerance(case), f"off by {worst:.1e}, here by {bad}"


def _parameter(case: Case) -> Any:
    marks = pytest.mark.ranks(compositions.ranks(case), timeout=120)
    return pytest.param(case, id=conditions.name(case), marks=marks)
