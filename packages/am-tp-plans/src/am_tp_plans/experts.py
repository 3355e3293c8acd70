"""Stacked experts over the tensor-parallel axis: each rank holds a slice of the experts and sees every token."""

from __future__ import annotations

import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle


class ExpertsOverTensorAxis(ParallelStyle):
    """Shard stacked experts `(E, ...)` on the expert dim over ranks that hold the same tokens.

    The module's own forward runs on every rank with that rank's experts; choices of other ranks' experts become
    the id that transformers skips, and the ranks' outputs are summed. The router stays replicated.

    Collectives (the given axis): one all-reduce of the output `(T, D)` forward; backward one of the tokens' gradient
    and one of the routing weights'.
    """

    lora_neutral = True

    def _apply(self, module: Any, device_mesh: DeviceMesh) -> nn.Module:
        source = getattr(self, "src_data_rank", 0)
        for name, parameter in list(module.named_parameters(recurse=False)):
            sharded = distribute_tensor(parameter.detach(), device_mesh, [Shard(0)], src_data_rank=source)
            module.register_parameter(name, nn.Parameter(sharded, requires_grad=parameter.requires_grad))
        module.num_global_experts = module.num_experts
        module.num_experts //= device_mesh.size()
        # transformers' grouped and batched kernels handle the id that means "no expert" only if they see this.
        module._is_expert_parallel = True
        module.tensor_mesh = device_mesh
        module.forward = types.MethodType(_forward, module)
        return module


def _forward(
    module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    group = module.tensor_mesh.get_group()
    hidden_states, top_k_weights = _SumGradients.apply(group, hidden_states, top_k_weights)
    ids = top_k_index - module.tensor_mesh.get_local_rank() * module.num_experts
    elsewhere = (ids < 0) | (ids >= module.num_experts)
    with _local_parameters(module) as local:
        out = type(module).forward(
            module,
            hidden_states,
            ids.masked_fill(elsewhere, module.num_experts),
            top_k_weights.masked_fill(elsewhere, 0),
        )
    # A rank whose experts nobody chose still has a graph through everything, so that every rank reduces the same.
    for tensor in (hidden_states, top_k_weights, *local):
        out = out + tensor.flatten()[:0].sum()
    return _SumOutputs.apply(group, out)


@contextmanager
def _local_parameters(module: Any) -> Iterator[list[torch.Tensor]]:
    distributed = module._parameters
    local = {n: p.to_local() if isinstance(p, DTensor) else p for n, p in distributed.items() if p is not None}
    module._parameters = {**distributed, **local}
    try:
        yield list(local.values())
    finally:
        module._parameters = distributed


class _SumGradients(torch.autograd.Function):
    """Identity; backward sums over the ranks, in one node so that the collectives have one order."""

    @staticmethod
    def forward(ctx, group, *tensors):
        ctx.group = group
        return tuple(t.view_as(t) for t in tensors)

    @staticmethod
    def backward(ctx, *gradients):
        return None, *(_sum(g, ctx.group) for g in gradients)


class _SumOutputs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, group, tensor):
        return _sum(tensor, group)

    @staticmethod
    def backward(ctx, *gradients):
        return None, gradients[0]


def _sum(tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    total = tensor.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total
