"""Every rank gathers all tokens, computes those that need its experts, and the results are summed where tokens live.

Two collectives of even size instead of an exchange of uneven parts: for small groups, where most tokens go to most
ranks anyway. Ranks with fewer tokens than the most send rows that nobody reads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from am_moe.collectives import all_gather, reduce_scatter
from am_moe.dispatch import Received


@dataclass(frozen=True)
class Gathered:
    """Attributes:
    row_R: which of the gathered tokens each row is.
    num_tokens: T.
    most: the largest T of any rank.
    """

    row_R: torch.Tensor
    num_tokens: int
    most: int


class AllGather:
    """Collectives (expert axis) of `dispatch`: forward an all-gather each of counts (with a host sync), ids, rows and
    weights; backward a reduce-scatter each of rows and weights. Of `combine`: a reduce-scatter of rows forward, an
    all-gather backward."""

    def dispatch(
        self,
        x_TD: torch.Tensor,
        ids_TK: torch.Tensor,
        weights_TK: torch.Tensor,
        num_local_experts: int,
        group: dist.ProcessGroup,
    ) -> Received:
        ranks, rank = dist.get_world_size(group), dist.get_rank(group)
        most = int(all_gather(torch.tensor([len(x_TD)], device=x_TD.device), group).max())
        none = ranks * num_local_experts
        ids_GK = all_gather(_padded(ids_TK, most, none), group) - rank * num_local_experts
        row_R = ((ids_GK >= 0) & (ids_GK < num_local_experts)).any(-1).nonzero().squeeze(-1)
        x_GD, weights_GK = _Gather.apply(group, _padded(x_TD, most), _padded(weights_TK, most))
        ids_RK = ids_GK[row_R]
        ids_RK = torch.where(ids_RK < 0, num_local_experts, ids_RK)
        return Received(x_GD[row_R], ids_RK, weights_GK[row_R], Gathered(row_R, x_TD.shape[0], most))

    def combine(self, out_RF: torch.Tensor, received: Received, group: dist.ProcessGroup) -> torch.Tensor:
        gathered: Gathered = received.back
        size = gathered.most * dist.get_world_size(group)
        out_GF = out_RF.new_zeros(size, out_RF.shape[1]).index_copy(0, gathered.row_R, out_RF)
        return _SumOfRanks.apply(group, out_GF)[: gathered.num_tokens]


def _padded(tensor: torch.Tensor, rows: int, value: float = 0) -> torch.Tensor:
    return torch.nn.functional.pad(tensor, (0, 0, 0, rows - tensor.shape[0]), value=value)


class _Gather(torch.autograd.Function):
    """All-gather of some tensors of even sizes; backward sums the gradients of each rank's part over the ranks."""

    @staticmethod
    def forward(ctx, group, *tensors):
        ctx.group = group
        return tuple(all_gather(t, group) for t in tensors)

    @staticmethod
    def backward(ctx, *gradients):
        return None, *(reduce_scatter(g, ctx.group) for g in gradients)


class _SumOfRanks(torch.autograd.Function):
    """Reduce-scatter; backward gathers."""

    @staticmethod
    def forward(ctx, group, tensor):
        ctx.group = group
        return reduce_scatter(tensor, group)

    @staticmethod
    def backward(ctx, *gradients):
        return None, all_gather(gradients[0], ctx.group)
