"""Every rank gathers all tokens, computes those that need its experts, and the results are summed where tokens live.

Two collectives of even size instead of an exchange of uneven parts: for small groups, where most tokens go to most
ranks anyway. Ranks with fewer tokens than the most send rows that nobody reads.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from am_moe.expert_parallel.collectives import all_gather, counts_of_all, reduce_scatter
from am_moe.expert_parallel.dispatch import Received, count_choices
from am_moe.expert_parallel.payload import pack, unpack


class AllGather:
    """Collectives (expert axis) of `dispatch`: forward an all-gather of counts, with the one host sync, and one of
    rows, weights and ids together; backward a reduce-scatter each of rows and weights. Of `combine`: a reduce-scatter
    of rows forward, an all-gather backward. `Received.back` is T."""

    def dispatch(
        self,
        x_TD: torch.Tensor,
        ids_TK: torch.Tensor,
        weights_TK: torch.Tensor,
        num_local_experts: int,
        group: dist.ProcessGroup,
    ) -> Received:
        ranks, rank = dist.get_world_size(group), dist.get_rank(group)
        _, choices_P = count_choices(ids_TK, num_local_experts, ranks)
        counts = counts_of_all(torch.cat([choices_P, choices_P.new_full((1,), len(x_TD))]), group)
        most, choices = max(counts[:, -1].tolist()), sum(counts[:, rank].tolist())
        ids_GK = _padded(ids_TK, most, ranks * num_local_experts)
        x_GD, weights_GK, ids_GK = _Gather.apply(group, _padded(x_TD, most), _padded(weights_TK, most), ids_GK)
        ids_GK = ids_GK - rank * num_local_experts
        ids_GK = torch.where((ids_GK < 0) | (ids_GK > num_local_experts), num_local_experts, ids_GK)
        return Received(x_GD, ids_GK, weights_GK, x_TD.shape[0], choices)

    def combine(self, out_RF: torch.Tensor, received: Received, group: dist.ProcessGroup) -> torch.Tensor:
        return _SumOfRanks.apply(group, out_RF)[: received.back]


def _padded(tensor: torch.Tensor, rows: int, value: float = 0) -> torch.Tensor:
    return torch.nn.functional.pad(tensor, (0, 0, 0, rows - tensor.shape[0]), value=value)


class _Gather(torch.autograd.Function):
    """All-gather of rows, weights and ids of even sizes; backward sums the gradients of each rank's part over the
    ranks."""

    @staticmethod
    def forward(ctx, group, x, weights, ids):
        ctx.group = group
        x, weights, ids = unpack(all_gather(pack([x, weights, ids]), group), [x, weights, ids])
        ctx.mark_non_differentiable(ids)
        return x, weights, ids

    @staticmethod
    def backward(ctx, *gradients):
        return None, *(reduce_scatter(g, ctx.group) for g in gradients[:2]), None


class _SumOfRanks(torch.autograd.Function):
    """Reduce-scatter; backward gathers."""

    @staticmethod
    def forward(ctx, group, tensor):
        ctx.group = group
        return reduce_scatter(tensor, group)

    @staticmethod
    def backward(ctx, *gradients):
        return None, all_gather(gradients[0], ctx.group)
