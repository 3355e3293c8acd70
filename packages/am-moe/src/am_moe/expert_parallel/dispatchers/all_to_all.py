"""Each token travels once to every rank that holds one of its experts, and one row of summed results returns.

With K choices over P ranks that is about `P (1 - (1 - 1/P)^K)` rows each way instead of K.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from am_moe.expert_parallel.collectives import all_to_all, counts_of_all
from am_moe.expert_parallel.dispatch import Received, count_choices
from am_moe.expert_parallel.kernels import add_up, take
from am_moe.expert_parallel.ordering import Rows, by_rank
from am_moe.expert_parallel.payload import pack, unpack


@dataclass(frozen=True)
class Routes:
    """Attributes:
    rows: which of this rank's tokens each sent row was, rank by rank.
    sent: rows sent to each rank.
    received: rows received from each rank.
    """

    rows: Rows
    sent: list[int]
    received: list[int]


class AllToAll:
    """Collectives (expert axis) of `dispatch`: forward an all-gather of counts, with the one host sync, and an
    all-to-all of rows, weights and ids together; backward one of the gradients of rows and weights. Of `combine`: one
    of rows forward, one backward."""

    def dispatch(
        self,
        x_TD: torch.Tensor,
        ids_TK: torch.Tensor,
        weights_TK: torch.Tensor,
        num_local_experts: int,
        group: dist.ProcessGroup,
    ) -> Received:
        ranks, rank = dist.get_world_size(group), dist.get_rank(group)
        owner_TK, choices_P = count_choices(ids_TK, num_local_experts, ranks)
        needs_TP = owner_TK.new_zeros(len(ids_TK), ranks + 1, dtype=torch.bool).scatter_(1, owner_TK, True)[:, :ranks]
        # Ordered before the sync, with room for as many rows as there can be, while the device is still busy.
        rank_S, rows = by_rank(needs_TP, len(ids_TK) * min(ranks, ids_TK.shape[1]))
        ids_SK = ids_TK[rows.source] - rank_S[:, None] * num_local_experts
        ids_SK = torch.where((ids_SK < 0) | (ids_SK > num_local_experts), num_local_experts, ids_SK).int()
        counts_PP2 = counts_of_all(torch.stack([needs_TP.sum(0), choices_P], dim=1), group)
        sent = counts_PP2[rank, :, 0].tolist()
        received, choices = counts_PP2[:, rank].t().tolist()
        rows, ids_SK = rows.first(sum(sent)), ids_SK[: sum(sent)]

        rows_RD, weights_RK, ids_RK = _Send.apply(Routes(rows, sent, received), group, x_TD, weights_TK, ids_SK)
        return Received(rows_RD, ids_RK, weights_RK, Routes(rows, sent, received), sum(choices))

    def combine(self, out_RF: torch.Tensor, received: Received, group: dist.ProcessGroup) -> torch.Tensor:
        routes: Routes = received.back
        return routes.rows.sum(_Return.apply(routes, group, out_RF))


class _Send(torch.autograd.Function):
    """Rows with weights and ids to the ranks that need them; backward brings the gradients of both, and adds them up.

    One node for all: ranks whose graphs differ, because one got no rows, still issue the same collectives in the same
    order.
    """

    @staticmethod
    def forward(ctx, routes, group, x_TD, weights_TK, ids_SK):
        ctx.routes, ctx.group = routes, group
        ctx.like = x_TD.new_empty(0, x_TD.shape[1]), weights_TK.new_empty(0, weights_TK.shape[1])
        source = routes.rows.source
        sent = [take(x_TD, source), weights_TK[source], ids_SK]
        rows_RD, weights_RK, ids_RK = unpack(all_to_all(pack(sent), routes.sent, routes.received, group), sent)
        ctx.mark_non_differentiable(ids_RK)
        return rows_RD, weights_RK, ids_RK

    @staticmethod
    def backward(ctx, *gradients):
        routes = ctx.routes
        back = all_to_all(pack(gradients[:2]), routes.received, routes.sent, ctx.group)
        found = [add_up(g, routes.rows.index, routes.rows.start) for g in unpack(back, ctx.like)]
        return None, None, *found, None


class _Return(torch.autograd.Function):
    """Results to the ranks of their tokens; backward sends the gradients the other way, in the same order."""

    @staticmethod
    def forward(ctx, routes, group, out_RF):
        ctx.routes, ctx.group = routes, group
        return all_to_all(out_RF, routes.received, routes.sent, group)

    @staticmethod
    def backward(ctx, *gradients):
        return None, None, all_to_all(gradients[0], ctx.routes.sent, ctx.routes.received, ctx.group)
