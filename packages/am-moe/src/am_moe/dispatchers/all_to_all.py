"""Each token travels once to every rank that holds one of its experts, and one row of summed results returns.

With K choices over P ranks that is about `P (1 - (1 - 1/P)^K)` rows each way instead of K.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from am_moe.collectives import all_to_all
from am_moe.dispatch import Received, sum_rows, take_rows


@dataclass(frozen=True)
class Routes:
    """Attributes:
    token_S: which of this rank's tokens each sent row was.
    num_tokens: T.
    sent: rows sent to each rank.
    received: rows received from each rank.
    """

    token_S: torch.Tensor
    num_tokens: int
    sent: list[int]
    received: list[int]


class AllToAll:
    """Collectives (expert axis) of `dispatch`: forward an all-to-all each of counts (with a host sync), ids, rows and
    weights; backward one each of rows and weights. Of `combine`: one of rows forward, one backward."""

    def dispatch(
        self,
        x_TD: torch.Tensor,
        ids_TK: torch.Tensor,
        weights_TK: torch.Tensor,
        num_local_experts: int,
        group: dist.ProcessGroup,
    ) -> Received:
        ranks = dist.get_world_size(group)
        owner_TK = torch.div(ids_TK, num_local_experts, rounding_mode="floor")
        needs_PT = torch.stack([(owner_TK == p).any(-1) for p in range(ranks)])
        owner_S, token_S = needs_PT.nonzero(as_tuple=True)

        sent_P = needs_PT.sum(-1)
        received_P = all_to_all(sent_P, [1] * ranks, [1] * ranks, group)
        sent, received = torch.stack([sent_P, received_P]).tolist()

        here_SK = owner_TK[token_S] == owner_S[:, None]
        ids_SK = torch.where(here_SK, ids_TK[token_S] - owner_S[:, None] * num_local_experts, num_local_experts)
        weights_SK = torch.where(here_SK, weights_TK[token_S], 0)
        ids_RK = all_to_all(ids_SK, sent, received, group)
        rows_RD, weights_RK = _Exchange.apply(sent, received, group, take_rows(x_TD, token_S), weights_SK)
        return Received(rows_RD, ids_RK, weights_RK, Routes(token_S, x_TD.shape[0], sent, received))

    def combine(self, out_RF: torch.Tensor, received: Received, group: dist.ProcessGroup) -> torch.Tensor:
        routes: Routes = received.back
        (back_SF,) = _Exchange.apply(routes.received, routes.sent, group, out_RF)
        return sum_rows(back_SF, routes.token_S, routes.num_tokens)


class _Exchange(torch.autograd.Function):
    """All-to-all of the rows of some tensors; backward sends the gradients the other way, in the same order.

    One node for all tensors: ranks whose graphs differ, because one got no rows, still issue the same collectives in
    the same order.
    """

    @staticmethod
    def forward(ctx, sent, received, group, *tensors):
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return tuple(all_to_all(t, sent, received, group) for t in tensors)

    @staticmethod
    def backward(ctx, *gradients):
        return None, None, None, *(all_to_all(g, ctx.received, ctx.sent, ctx.group) for g in gradients)
