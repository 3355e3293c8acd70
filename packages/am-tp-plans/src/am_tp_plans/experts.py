"""Stacked experts over the tensor-parallel axis: each rank holds a slice of the experts and sees every token."""

from __future__ import annotations

import importlib.metadata
import types
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle

from am_tp_plans.local import SumGradients, local_parameters, sum_over_ranks


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
    module: Any,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor | None = None,
    top_k_weights: torch.Tensor | None = None,
) -> torch.Tensor:
    group = module.tensor_mesh.get_group()
    if top_k_index is None or top_k_weights is None:
        return _forward_in_blocks(module, hidden_states)
    hidden_states, top_k_weights = SumGradients.apply(group, hidden_states, top_k_weights)
    ids = top_k_index - module.tensor_mesh.get_local_rank() * module.num_experts
    elsewhere = (ids < 0) | (ids >= module.num_experts)
    with local_parameters(module) as local:
        out = type(module).forward(
            module,
            hidden_states,
            ids.masked_fill(elsewhere, _no_expert(module)),
            top_k_weights.masked_fill(elsewhere, 0),
        )
    # A rank whose experts nobody chose still has a graph through everything, so that every rank reduces the same.
    for tensor in (hidden_states, top_k_weights, *local):
        out = out + tensor.flatten()[:0].sum()
    return sum_over_ranks(out, group)


def _no_expert(module: Any) -> int:
    """The id that a module skips. With transformers 5.17 some do not: then the first expert, whose weight is zero."""
    if not type(module).__module__.startswith("transformers."):
        return module.num_experts
    major, minor = importlib.metadata.version("transformers").split(".")[:2]
    return module.num_experts if (int(major), int(minor)) >= (5, 18) else 0


def _forward_in_blocks(module: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """Experts that take `(E * T, D)`, every expert's own T rows in order, and return the same: run this rank's rows."""
    group = module.tensor_mesh.get_group()
    (hidden_states,) = SumGradients.apply(group, hidden_states)
    rank, ranks = module.tensor_mesh.get_local_rank(), module.tensor_mesh.size()
    blocks = hidden_states.unflatten(0, (ranks, -1))
    with local_parameters(module):
        mine = type(module).forward(module, blocks[rank].clone())
    rows = torch.zeros_like(hidden_states).unflatten(0, (ranks, -1))
    return sum_over_ranks(rows.index_copy(0, torch.tensor([rank], device=rows.device), mine[None]).flatten(0, 1), group)
