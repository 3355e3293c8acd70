"""The order in which a rank computes its rows, found once and without asking the device how many there are.

    R rows      K choices of each      L experts of this rank      N of the choices fall on it

Choices are sorted by expert; those of other ranks or of none, whose id is L, come last and are never read::

    row                 0       1       2                     ids (R, K) with L = 2
    ids                 1 0     2 1     0 2
    choice, in order    1 4 | 0 3 | 2 5                       two of expert 0, two of expert 1, two of nobody
    row, in order       0 2 | 0 1 | 1 2                       `source`: a row for each choice is taken from it
    back to rows        [2 0] [3] [1] [4 5]                   `index` in bags from `start`; the last bag is dropped
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from am_moe.expert_parallel.kernels import add_up, take


@dataclass(frozen=True)
class Rows:
    """Rows taken from others, and how to add them up again.

    Attributes:
        source: `(N,)`, which of R rows each is taken from.
        index: the N rows, ordered by their source.
        start: `(R + 1,)`, where in `index` those of each source begin; what follows the last entry belongs to none.
    """

    source: torch.Tensor
    index: torch.Tensor
    start: torch.Tensor

    def first(self, number: int) -> Rows:
        """Those of the first `number` rows, where the others belong to no source."""
        return Rows(self.source[:number], self.index[:number], self.start)

    def take(self, x_RD: torch.Tensor) -> torch.Tensor:
        """`(R, D)` to `(N, D)`. Its gradient is that of `sum`."""
        return _Take.apply(x_RD, self.source, self.index, self.start)

    def sum(self, rows_ND: torch.Tensor) -> torch.Tensor:
        """`(N, D)` to `(R, D)`, those of one source in a fixed order, half precision in float32."""
        return _Sum.apply(rows_ND, self.source, self.index, self.start)


@dataclass(frozen=True)
class ByExpert:
    """Attributes:
    rows: the rows of all choices in the order of their experts.
    choice_N: which of the R K choices each is.
    ends_L: int32, where the rows of each expert end; what follows belongs to none.
    place_RK: where in that order each choice is.
    here_RK: whether a choice falls on this rank.
    """

    rows: Rows
    choice_N: torch.Tensor
    ends_L: torch.Tensor
    place_RK: torch.Tensor
    here_RK: torch.Tensor


def by_expert(ids_RK: torch.Tensor, local: int, number: int | None) -> ByExpert:
    """Order choices by expert; no host sync.

    Args:
        ids_RK: local ids, L or above for choices of other ranks or none.
        local: L.
        number: N if the host knows it; else choices of nobody follow at the end.
    """
    kind = torch.int16 if local < 1 << 15 else torch.int64  # short keys are sorted in fewer passes
    flat = ids_RK.flatten().clamp(max=local).to(kind)
    everything = torch.arange(len(flat), device=flat.device)
    sorted_ids, order = flat.sort(stable=True)
    experts = torch.arange(local, device=flat.device, dtype=flat.dtype)
    ends_L = torch.searchsorted(sorted_ids, experts, right=True, out_int32=True)
    place = torch.empty_like(order).scatter_(0, order, everything)
    here_RK = ids_RK < local
    here = here_RK.flatten()
    before = here.cumsum(0)
    # Choices that fall here keep their order; the others come after them.
    position = torch.where(here, before - 1, before[-1:] + everything - before)
    index = torch.empty_like(place).scatter_(0, position, place)[:number]
    choice_N = order[:number]
    start = _starts(here_RK.sum(1))
    rows = Rows(torch.div(choice_N, max(ids_RK.shape[1], 1), rounding_mode="floor"), index, start)
    return ByExpert(rows, choice_N, ends_L, place.view(ids_RK.shape), here_RK)


def by_rank(needs_TP: torch.Tensor, number: int) -> tuple[torch.Tensor, Rows]:
    """For each rank the tokens that it needs, rank by rank: the ranks `(S,)`, and the rows.

    Args:
        needs_TP: which ranks need each token.
        number: S, how many of these are true, or more: what follows is then anything, see `Rows.first`.
    """
    needs_PT = needs_TP.t()
    place_PT = needs_PT.flatten().cumsum(0).view(needs_PT.shape) - 1
    rank_S, token_S = torch.nonzero_static(needs_PT, size=number).unbind(1)
    by_token, its_rank = torch.nonzero_static(needs_TP, size=number).unbind(1)
    return rank_S, Rows(token_S, place_PT[its_rank, by_token], _starts(needs_TP.sum(1)))


def _starts(counts: torch.Tensor) -> torch.Tensor:
    return nn.functional.pad(counts.cumsum(0), (1, 0))


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, source, index, start):
        ctx.save_for_backward(index, start)
        return take(x, source)

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients):  # pyrefly: ignore[bad-override]  (the decorator's type loses the names)
        return add_up(gradients[0], *ctx.saved_tensors), None, None, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, source, index, start):
        ctx.save_for_backward(source)
        return add_up(rows, index, start)

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients):  # pyrefly: ignore[bad-override]  (the decorator's type loses the names)
        return take(gradients[0], ctx.saved_tensors[0]), None, None, None
