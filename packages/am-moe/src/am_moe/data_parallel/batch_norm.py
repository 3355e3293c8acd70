# A copy of packages/am-fsdp/src/am_fsdp/layout/batch_norm.py, made by `nox -s copies`: edit that one.
"""Batch norms over the rows of all ranks, as in one process, where each rank would normalise by its own."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.modules.batchnorm import _BatchNorm

from am_moe._torch_compat import in_backward


def normalise_over_ranks(model: nn.Module, mesh: DeviceMesh) -> None:
    """From now on, batch norms in training use the mean and variance of the rows of all ranks of a mesh, in place.

    Running statistics are then the same on all ranks, and a recomputation does not count twice. Frozen ones, in
    evaluation mode, and `nn.SyncBatchNorm` are left as they are.

    Args:
        model: before `fully_shard`; its batch norms compute by torch's own forward.
        mesh: the ranks that have different rows, one axis or two.

    Collectives of each batch norm in training: two small all-reduces in forward, two in backward.

    Raises:
        ValueError: a batch norm with a forward of its own.
    """
    if mesh.size() > 1:
        for norm in batch_norms(model):
            vars(norm)["forward"] = partial(_forward, norm, mesh)


def batch_norms(model: nn.Module) -> list[nn.Module]:
    """Those that `normalise_over_ranks` would change; raises what it does."""
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, _BatchNorm) and type(m) is not nn.SyncBatchNorm]
    for name, module in found:
        if type(module).forward is not _BatchNorm.forward or "forward" in vars(module):
            raise ValueError(
                f"{name} is a {type(module).__name__}, whose forward normalises over the rows of one rank in a way of "
                "its own; use torch.nn's batch norm"
            )
    return [module for _, module in found]


def _forward(norm: Any, mesh: DeviceMesh, x: torch.Tensor) -> torch.Tensor:
    if not norm.training and norm.running_mean is not None:
        return type(norm).forward(norm, x)
    norm._check_input_dim(x)
    dims = [dim for dim in range(x.dim()) if dim != 1]
    shape = [1, -1] + [1] * (x.dim() - 2)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    rows = wide.new_full((x.shape[1],), x.numel() / x.shape[1])
    total = _Summed.apply(torch.stack([wide.sum(dims), rows]), mesh)
    count = total[1].detach()
    mean = total[0] / count
    centred = wide - mean.view(shape)
    variance = _Summed.apply(centred.square().sum(dims), mesh) / count
    if norm.training and norm.track_running_stats and norm.running_mean is not None and not in_backward():
        norm.num_batches_tracked.add_(1)
        share = 1.0 / norm.num_batches_tracked.double() if norm.momentum is None else norm.momentum
        unbiased = variance.detach() * count / (count - 1)
        for kept, now in ((norm.running_mean, mean.detach()), (norm.running_var, unbiased)):
            kept.copy_(kept + share * (now - kept))
    result = centred * torch.rsqrt(variance + norm.eps).view(shape)
    if norm.weight is not None:
        result = result * norm.weight.view(shape) + norm.bias.view(shape)
    return result.to(x.dtype)


class _Summed(torch.autograd.Function):
    """The sum over the ranks of a mesh, and of what they say of its gradient."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor:
        ctx.mesh = mesh
        return _sum(tensor, mesh)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple:
        return _sum(gradients[0], ctx.mesh), None


def _sum(tensor: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor:
    tensor = tensor.clone(memory_format=torch.contiguous_format)
    for axis in range(mesh.ndim):
        dist.all_reduce(tensor, group=mesh.get_group(axis))
    return tensor
