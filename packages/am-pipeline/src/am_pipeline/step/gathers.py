"""What a rank that failed does for the ranks that gather weights with it: it takes part in what they still gather.

A part that FSDP2 has sharded gathers its weights with other ranks while it computes. After an error in it on one rank
these would wait for the next all-gather forever. Which ones are to come is known from the last step that went well: the
ranks of a stage run the same actions in the same order, and every step begins with all weights sharded.

    forward 0    layers.0, layers.1, norm          as noted in the last step
    forward 1    layers.0 | layers.1, norm         an error behind layers.0: what is right of the bar is gathered still,
    backward 0   norm, layers.1, layers.0          and this, with nothing computed
    backward 1

Nothing is known before a step went well, nor where a part communicates in any other way, or outside of its actions.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from am_pipeline._torch_compat import collectives_issued, gather_once, settle_fsdp, watch_gathers

Gathered = dict[str, list[int]]  # by action, which units in which order


class GatherRecord:
    """The all-gathers of one part.

    Args:
        part: sharded by FSDP2, before its first step.
    """

    def __init__(self, part: nn.Module) -> None:
        self._part = part
        self._units = watch_gathers(part, self._note)
        self._known: dict[bool, Gathered] = {}  # of evaluations, and of steps that train
        self._now: Gathered = {}
        self._action, self._is_complete, self._training = "", True, True

    def begin(self, training: bool) -> None:
        """A step begins."""
        self._now, self._action, self._is_complete, self._training = {}, "", True, training

    def end(self) -> None:
        """It went well."""
        if self._is_complete:
            self._known[self._training] = self._now
        else:
            self._known.pop(self._training, None)

    @contextmanager
    def action(self, name: str) -> Iterator[None]:
        """What a stage does with one microbatch."""
        before, self._action, self._now[name] = collectives_issued(), name, []
        try:
            yield
            self._is_complete &= collectives_issued() - before == len(self._now[name])
        finally:
            self._action = ""

    @property
    def is_known(self) -> bool:
        """Whether the all-gathers that the other ranks of the stage still issue in this step are known."""
        known = self._known.get(self._training)
        if known is None or not self._is_complete:
            return False
        return all(names == known.get(action, [])[: len(names)] for action, names in self._now.items())

    def settle(self) -> None:
        """After an error in the part: everything is sharded, nothing under way."""
        settle_fsdp(self._part)

    def gather_the_rest(self, name: str) -> None:
        """Take part in the all-gathers of an action that this rank has not run, or not to its end."""
        done = self._now.setdefault(name, [])
        for unit in self._known[self._training].get(name, [])[len(done) :]:
            self._action = name
            gather_once(self._units[unit])
        self._action = ""

    def _note(self, unit: int) -> None:
        if self._action:
            self._now[self._action].append(unit)
        else:
            self._is_complete = False
