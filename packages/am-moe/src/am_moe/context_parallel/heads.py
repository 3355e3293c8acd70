"""Sequence parts of all heads to the whole sequence of some heads, and back: the all-to-all of DeepSpeed-Ulysses.

    rank 0: tokens 0 7, heads a b        rank 0: tokens 0 1 6 7, head a
    rank 1: tokens 1 6, heads a b   <->  rank 1: tokens 0 1 6 7, head b

The ranks of the axis hold neighbouring chunks of a head-tail layout; together they are one rank of a coarser one.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist

from am_moe._torch_compat import handed_out


def spread_heads(tensors: list[torch.Tensor], group: dist.ProcessGroup) -> list[torch.Tensor]:
    """From `(B, H, S, D)` with all heads to `(B, H / A, A S, D)`, in the order of the sequence.

    Args:
        tensors: S and B alike; the heads of each are a multiple of the A ranks, S is even.
        group: the ranks.

    Collectives: one all-to-all, for all tensors together; one in the backward.
    """
    ranks = dist.get_world_size(group)
    # (A, B, h, S, D) each: what goes to each rank.
    parts = [x.unflatten(1, (ranks, -1)).movedim(1, 0) for x in tensors]
    received = _AllToAll.apply(torch.cat([part.flatten(1) for part in parts], 1), group)
    whole = []
    for part, flat in zip(parts, received.split([part[0].numel() for part in parts], 1), strict=True):
        heads, tails = flat.view(part.shape).chunk(2, dim=3)
        both = torch.cat([heads, tails.flip(0)])  # (2 A, B, h, S / 2, D), in the order of the sequence
        whole.append(both.movedim(0, 2).flatten(2, 3))
    return whole


def gather_heads(x_BhND: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """The inverse of `spread_heads` for one tensor: `(B, h, A S, D)` to `(B, A h, S, D)`."""
    ranks = dist.get_world_size(group)
    heads, tails = x_BhND.unflatten(2, (2 * ranks, -1)).movedim(2, 0).chunk(2)
    parts = torch.cat([heads, tails.flip(0)], dim=3)  # (A, B, h, S, D)
    received = _AllToAll.apply(parts.flatten(1), group).view(parts.shape)
    return received.movedim(0, 1).flatten(1, 2)


def repeated_for(kv_heads: int, ranks: int) -> int:
    """How often key-value heads are repeated so that each of the ranks gets as many: 1 where they divide."""
    return math.lcm(kv_heads, ranks) // kv_heads


class _AllToAll(torch.autograd.Function):
    """Row i of each rank to rank i."""

    @staticmethod
    def forward(ctx, rows, group):
        ctx.group = group
        rows = rows.contiguous()
        received = torch.empty_like(rows)
        dist.all_to_all_single(received, rows, group=group)
        return handed_out(received)

    @staticmethod
    def backward(ctx, *gradients):
        return _AllToAll.apply(gradients[0], ctx.group), None
