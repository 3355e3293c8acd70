"""What enters a stack for some of its tokens only: a mask of them, and rows for those that it marks.

Some models add features of an image to several layers (deepstack), at the tokens that stand for it::

    mask                     . x x . | x x . .
    rows                       0 1     2 3
    rank 0, tokens 0 1 6 7   . x . .           row 0
    rank 1, tokens 2 3 4 5   x . x x           rows 1 2 3

A rank takes the rows of its own tokens, in their order. Whether the stack treats them so is read like all else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from am_moe.context_parallel.batch import shard_sequence
from am_moe.context_parallel.nested import map_tensors, tensors_in


@dataclass(frozen=True)
class Picked:
    """Keyword arguments of a stack, by name: one of them is a mask, all tensors of the others have its rows."""

    mask: str
    given: dict[str, Any]

    def form(self) -> tuple:
        """What a proof depends on."""
        rows = [
            (name, [(str(x.dtype), tuple(x.shape[1:])) for x in tensors_in(value)])
            for name, value in self.given.items()
            if name != self.mask
        ]
        return self.mask, repr(rows)


def picked_tokens(given: dict[str, Any], shape: tuple[int, int]) -> Picked | None:
    """These arguments as a mask `(B, S)` and rows for the tokens that it marks; None if they are something else."""
    masks = [n for n, x in given.items() if isinstance(x, torch.Tensor) and x.dtype is torch.bool and x.shape == shape]
    if len(masks) != 1:
        return None
    count = int(given[masks[0]].sum())
    others = [x for name, value in given.items() if name != masks[0] for x in tensors_in(value)]
    fits = all(x.dim() > 1 and x.shape[0] == count and x.is_floating_point() for x in others)
    return Picked(masks[0], given) if fits else None


def cut_picked(picked: Picked, mesh: DeviceMesh) -> dict[str, Any]:
    """The arguments for this rank's tokens; gradients of the rows of others are zero here."""
    mask = picked.given[picked.mask]
    order = mask.flatten().cumsum(0).view_as(mask) - 1
    mine = shard_sequence(mask, mesh)
    rows = shard_sequence(order, mesh)[mine]

    def of_mine(name: str, value: Any) -> Any:
        return mine if name == picked.mask else map_tensors(value, lambda x: x[rows])

    return {name: of_mine(name, value) for name, value in picked.given.items()}
