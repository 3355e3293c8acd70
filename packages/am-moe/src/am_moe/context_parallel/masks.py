"""Masks as descriptions: recognised from what transformers would have made of them, and handed to every layer.

transformers asks a *mask interface* for each kind of mask of a forward and passes the answer to the layers of that
kind. Ours answers with a `ContextMask` instead of a tensor, so that which layer slides, and by how much, is the
model's own decision, and recomputation in a backward sees the same mask.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch

from am_moe.context_parallel.plan import Plan, Rule, head_tail


class UnknownMaskError(ValueError):
    """A mask is none that context parallelism knows, in whatever way a forward is divided."""


class MaskReadError(ValueError, AttributeError):
    """A model treats a mask as a tensor instead of handing it to its attention function."""


@dataclass(frozen=True, eq=False)
class ContextMask:
    """What a layer's queries see, over the whole sequence."""

    plan: Plan
    query_groups_BN: torch.Tensor | None
    key_groups_BN: torch.Tensor | None
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

    def mask(self, before: int | None, after: int | None) -> ContextMask:
        """The mask of a window; as in transformers, packed documents are kept apart where it is causal."""
        layout = head_tail(self.seq_len, self.ranks)
        if self.valid_BN is not None:
            valid = self.valid_BN.long()
            rows = None
            if all(stretch is not None for stretch in self.stretches):
                rows = tuple(Rule(before, after, keys=stretch) for stretch in self.stretches)
            return ContextMask(Plan(layout, Rule(before, after, padded=True)), torch.ones_like(valid), valid, rows)
        if self.starts_BN is None or after != 0:
            return ContextMask(Plan(layout, Rule(before, after)), None, None)
        starts = self.starts
        if all(row == starts[0] for row in starts):
            return ContextMask(Plan(layout, Rule(before, after, starts[0], starts[0])), self.starts_BN, self.starts_BN)
        earliest, latest = [list(map(pick, zip(*starts, strict=True))) for pick in (min, max)]
        rows = tuple(Rule(before, after, row, row) for row in starts)
        plan = Plan(layout, Rule(before, after, earliest, latest))
        return ContextMask(plan, self.starts_BN, self.starts_BN, rows)

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


def recognise(
    mask_function: Callable, local_size: int | None, device: torch.device, rows: int = 1, seq_len: int = 0
) -> tuple[int | None, int | None]:
    """How many tokens before and after itself a query sees under one of transformers' mask functions.

    Args:
        mask_function: says for batch, head, query and key indices whether the query sees the key.
        local_size: the size of a window or chunk, if the mask has one.
        device: of the indices that it is given.
        rows, seq_len: of the batch, each token of which is asked for the next one and for the ends of its window.

    Raises:
        ValueError: a mask that is neither causal nor full, with or without a sliding window.
    """

    def sees(row: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        try:
            return mask_function(row, zero, query, key)
        except (IndexError, RuntimeError, TypeError) as error:
            raise UnknownMaskError(f"the model's attention mask depends on more than positions: {error}") from error

    width = 4 if local_size is None else local_size
    at = torch.tensor(
        sorted({0, 1, 2, max(width - 1, 0), width, width + 1, abs(2 * width - 1), 2 * width, 2 * width + 1, 3 * width}),
        device=device,
    )
    zero = at.new_zeros(())
    seen = sees(zero, at[:, None], at[None, :]).expand(len(at), len(at))
    windows = [(None, 0), (None, None)] if local_size is None else [(width - 1, 0), (width, width)]
    for before, after in windows:
        if not seen.equal(_within(at[None, :] - at[:, None], before, after)):
            continue
        # An image whose tokens see each other is noticed wherever it is: one of them sees the next.
        row, query = torch.arange(rows, device=device)[:, None], torch.arange(seq_len, device=device)[None]
        ends = [end + more for end in (-(before or 0), after or 0) for more in (-1, 0, 1)]
        right = torch.ones((), dtype=torch.bool, device=device)
        for key in (query * 0, *((query + end).clamp(0, max(seq_len - 1, 0)) for end in ends)):
            right &= (sees(row, query, key) == _within(key - query, before, after)).all()
        if right:
            return before, after
    kind = "no window" if local_size is None else f"a window or chunk of {local_size}"
    raise UnknownMaskError(
        f"the model's attention mask ({kind}) is neither causal nor full, with or without a sliding window; "
        "context parallelism knows no other"
    )


def _within(ahead: torch.Tensor, before: int | None, after: int | None) -> torch.Tensor:
    """Whether keys that are so many tokens ahead of their queries are in a window."""
    seen = torch.ones_like(ahead, dtype=torch.bool)
    if before is not None:
        seen &= ahead >= -before
    if after is not None:
        seen &= ahead <= after
    return seen
