"""Tokens that several ranks hold alike, as those of a tensor-parallel group do: each rank takes its share, then all
ranks get the whole results. No token is sent or computed twice."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from am_moe.expert_parallel.collectives import all_gather


def share_of(mesh: DeviceMesh, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """This rank's rows of tensors that are the same on all ranks of a mesh: `(T, ...)` to about `(T / ranks, ...)`.

    Collectives (the mesh): none forward; backward one all-gather of each gradient.
    """
    group = mesh.get_group()
    moving = [t for t in tensors if t.is_floating_point()]
    shares = iter(_Share.apply(group, *moving))
    return tuple(next(shares) if t.is_floating_point() else t[_rows(len(t), group)] for t in tensors)


def whole_again(mesh: DeviceMesh, share: torch.Tensor, rows: int) -> torch.Tensor:
    """All rows on every rank. Collectives (the mesh): one all-gather forward, none backward."""
    return _Whole.apply(mesh.get_group(), share, rows)


def _rows(total: int, group: dist.ProcessGroup) -> slice:
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    each = -(-total // ranks)
    return slice(min(rank * each, total), min((rank + 1) * each, total))


def _gather(share: torch.Tensor, rows: int, group: dist.ProcessGroup) -> torch.Tensor:
    ranks = dist.get_world_size(group)
    each = -(-rows // ranks)
    padded = share.new_zeros(each, *share.shape[1:])
    padded[: len(share)] = share
    return all_gather(padded, group)[:rows]


class _Share(torch.autograd.Function):
    """The gradient of every rank's whole tensor is whole: each share's comes from the rank that has it."""

    @staticmethod
    def forward(ctx, group, *tensors):
        ctx.group, ctx.rows = group, len(tensors[0])
        return tuple(t[_rows(len(t), group)].clone() for t in tensors)

    @staticmethod
    def backward(ctx, *gradients):
        return None, *(_gather(g.contiguous(), ctx.rows, ctx.group) for g in gradients)


class _Whole(torch.autograd.Function):
    """The gradient of the whole results is the same on all ranks; each takes its own rows of it."""

    @staticmethod
    def forward(ctx, group, share, rows):
        ctx.group = group
        return _gather(share.contiguous(), rows, group)

    @staticmethod
    def backward(ctx, *gradients):
        return None, gradients[0][_rows(len(gradients[0]), ctx.group)].contiguous(), None
