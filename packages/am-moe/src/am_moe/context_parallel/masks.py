"""Masks as descriptions: recognised from what transformers would have made of them, and handed to every layer.

transformers asks a *mask interface* for each kind of mask of a forward and passes the answer to the layers of that
kind. Ours answers with a `ContextMask` instead of a tensor, so that which layer slides, and by how much, is the
model's own decision, and recomputation in a backward sees the same mask.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from am_moe.context_parallel.plan import Plan, Rule, head_tail
from am_moe.context_parallel.windows import UnknownMaskError, Window


class MaskReadError(ValueError, AttributeError):
    """A model treats a mask as a tensor instead of handing it to its attention function."""


@dataclass(frozen=True, eq=False)
class ContextMask:
    """What a layer's queries see, over the whole sequence."""

    plan: Plan
    query_groups_BN: torch.Tensor | None
    key_groups_BN: torch.Tensor | None
    reach_BN: torch.Tensor | None = None
    rows: tuple[Rule, ...] | None = None  # of each row of the batch where they differ; None too where no rule says it

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        raise MaskReadError(f"the model computes with its attention mask (reads .{name}), so it cannot be cut")


@dataclass(frozen=True, eq=False)
class Sequence:
    """The whole sequence of a forward, of which every rank holds a part.

    Attributes:
        seq_len: N.
        ranks: over how many the plan lays it out.
        last_position: the largest position of any row.
        starts_BN: the first token of each token's document, int64; None where each row is one document.
        valid_BN: which tokens are no padding; None where none is.
    """

    seq_len: int
    ranks: int
    last_position: torch.Tensor
    starts_BN: torch.Tensor | None = None
    valid_BN: torch.Tensor | None = None

    def mask(self, window: Window) -> ContextMask:
        """The mask of a window; as in transformers, packed documents are kept apart where it is causal."""
        layout, before, after = head_tail(self.seq_len, self.ranks), window.before, window.after
        reach = [] if window.reach_BN is None else window.reach_BN.tolist()
        if reach and self.starts_BN is not None:
            raise UnknownMaskError("the model's attention mask has images in packed documents")
        farthest, nearest = _largest_and_smallest(reach) if reach else (None, None)
        if self.valid_BN is not None:
            valid, rows = self.valid_BN.long(), None
            if all(stretch is not None for stretch in self.stretches):
                ends = reach or [None] * len(self.stretches)
                rows = tuple(
                    Rule(before, after, farthest=end, nearest=end, keys=keys)
                    for end, keys in zip(ends, self.stretches, strict=True)
                )
            rule = Rule(before, after, farthest=farthest, nearest=nearest, padded=True)
            return ContextMask(Plan(layout, rule), torch.ones_like(valid), valid, window.reach_BN, rows)
        if reach:
            rows = None if farthest == nearest else tuple(Rule(before, 0, farthest=r, nearest=r) for r in reach)
            rule = Rule(before, 0, farthest=farthest, nearest=nearest)
            return ContextMask(Plan(layout, rule), None, None, window.reach_BN, rows)
        if self.starts_BN is None or after != 0:
            return ContextMask(Plan(layout, Rule(before, after)), None, None)
        latest, earliest = _largest_and_smallest(self.starts)
        rows = None if latest == earliest else tuple(Rule(before, 0, row, row) for row in self.starts)
        plan = Plan(layout, Rule(before, 0, earliest, latest))
        return ContextMask(plan, self.starts_BN, self.starts_BN, rows=rows)

    @cached_property
    def starts(self) -> list[list[int]]:
        """The first token of each token's document, on the host; read from the device once in a forward."""
        return [] if self.starts_BN is None else self.starts_BN.tolist()

    @cached_property
    def stretches(self) -> list[tuple[int, int] | None]:
        """For each row the one stretch of tokens that are no padding; None where there are several, or none."""
        found: list[tuple[int, int] | None] = []
        for row in [] if self.valid_BN is None else self.valid_BN.tolist():
            first, count = (row.index(True), sum(row)) if any(row) else (0, 0)
            found.append((first, first + count) if count and all(row[first : first + count]) else None)
        return found


def describe(positions_BN: torch.Tensor, valid_BN: torch.Tensor | None, ranks: int) -> Sequence:
    """What a forward's positions and padding say about the whole sequence.

    A document starts wherever a position is not the one before plus one. With a padding mask, even one without
    padding, documents are not kept apart. Both are what transformers does.
    """
    seq_len, last = positions_BN.shape[1], positions_BN.max()
    if valid_BN is not None:
        return Sequence(seq_len, ranks, last, valid_BN=None if valid_BN.all() else valid_BN)
    starts = positions_BN.diff(dim=1) != 1
    if not starts.any():
        return Sequence(seq_len, ranks, last)
    here = torch.arange(1, seq_len, device=starts.device).expand_as(starts) * starts
    return Sequence(seq_len, ranks, last, torch.nn.functional.pad(here, (1, 0)).cummax(dim=1).values)


def _largest_and_smallest(rows: list[list[int]]) -> tuple[list[int], list[int]]:
    """Of each token over the rows."""
    columns = list(zip(*rows, strict=True))
    return list(map(max, columns)), list(map(min, columns))
