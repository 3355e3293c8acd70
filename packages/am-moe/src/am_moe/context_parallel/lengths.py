"""Sizes that a model's code reads while its forward is read on few tokens, and what it decides by them.

A size that goes by the rank's tokens is a number that knows, through sums and products, what it would be for others.
Each comparison of such a number is kept. A proof holds for calls in which every one has the answer that it had::

    if x.shape[1] > 4096:        12 > 4096    no        kept
    if x.shape[1] == y.shape[1]: 12 == 12     yes       true of all lengths, not kept
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_At = Callable[[int, int], Any]
_SOME = [2**power for power in range(1, 24)]


@dataclass(frozen=True)
class Decision:
    """A comparison of two numbers, each a function of how many tokens and rows there are, and its answer."""

    compare: Callable[[Any, Any], bool]
    left: _At
    right: _At
    answer: bool

    def same_for(self, tokens: int, rows: int) -> bool:
        return self.compare(self.left(tokens, rows), self.right(tokens, rows)) is self.answer


class Length(int):
    """A number made of how many tokens there are; `at` says what it is for so many tokens and rows."""

    at: _At
    decisions: list[Decision]

    @classmethod
    def of(cls, value: int, at: _At, decisions: list[Decision]) -> Length:
        made = cls(value)
        made.at, made.decisions = at, decisions
        return made

    __hash__ = int.__hash__


def _at(value: Any) -> _At:
    return value.at if isinstance(value, Length) else lambda tokens, rows: value


def _plain(value: Any) -> Any:
    return int(value) if isinstance(value, Length) else value


def _computed(compute: Callable[[Any, Any], Any], swapped: bool) -> Callable[[Length, Any], Any]:
    def method(self: Length, other: Any) -> Any:
        if not isinstance(other, int):
            return NotImplemented
        one, two = (other, self) if swapped else (self, other)
        left, right = _at(one), _at(two)
        value = compute(_plain(one), _plain(two))
        return Length.of(value, lambda n, rows: compute(left(n, rows), right(n, rows)), self.decisions)

    return method


def _compared(compare: Callable[[Any, Any], bool]) -> Callable[[Length, Any], Any]:
    def method(self: Length, other: Any) -> Any:
        if not isinstance(other, (int, float)):
            return NotImplemented
        decision = Decision(compare, self.at, _at(other), compare(int(self), _plain(other)))
        if not all(decision.same_for(tokens, rows) for tokens in _SOME for rows in (1, 2)):
            self.decisions.append(decision)
        return decision.answer

    return method


for _name in ("add", "sub", "mul", "floordiv", "mod"):
    setattr(Length, f"__{_name}__", _computed(getattr(operator, _name), swapped=False))
    setattr(Length, f"__r{_name}__", _computed(getattr(operator, _name), swapped=True))
for _name in ("lt", "le", "gt", "ge", "eq", "ne"):
    setattr(Length, f"__{_name}__", _compared(getattr(operator, _name)))
