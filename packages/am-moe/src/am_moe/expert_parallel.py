"""Expert parallelism in place: each rank holds a slice of every layer's experts, the model's modules stay."""

from __future__ import annotations

import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle

from am_moe.dispatch import combine, dispatch
from am_moe.experts import find_experts


def apply_ep(model: nn.Module, ep_mesh: DeviceMesh, moe_mesh: DeviceMesh | None = None) -> nn.Module:
    """Spread the experts of every layer over the ranks of an axis, in place.

    Names, routers and the experts' own forward stay; their parameters become DTensors sharded on the expert dim, and
    each rank runs the forward on the tokens that need its slice. **Gradients are right when `backward()` returns**, by
    the convention of data parallelism, of which the expert axis is a part: every rank's loss is the mean of its own
    tokens, and gradients are averages over the data-parallel ranks. The style divides expert gradients, to which the
    tokens of all ranks contribute, by the axis's size; whoever does data parallelism averages the rest.

    Args:
        model: real, or on the meta device; any model in which `find_experts` finds something.
        ep_mesh: one-dimensional; its size divides the number of experts.
        moe_mesh: the mesh that `ep_mesh` is an axis of, if there is one; only checked.

    Returns:
        The model.

    Collectives: with real weights, the experts are scattered from the axis's first rank; then those of `dispatch` and
        `combine` in every layer.

    Raises:
        ValueError: no experts, experts that do not divide over the axis or are distributed already, a mesh with
            several axes; on every rank alike.
    """
    if ep_mesh.ndim != 1:
        raise ValueError(f"ep_mesh must have one axis, got {ep_mesh.mesh_dim_names}; pass moe_mesh['ep'] or the like")
    names = ep_mesh.mesh_dim_names
    if moe_mesh is not None and names and not set(names) <= set(moe_mesh.mesh_dim_names or ()):
        raise ValueError(f"ep_mesh is the axis {names}, but moe_mesh has {moe_mesh.mesh_dim_names}")
    found = find_experts(model)
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no experts to spread: no module with stacked 3-D parameters, `num_experts` "
            "and forward(hidden_states, top_k_index, top_k_weights)"
        )
    for name, module in found:
        _check(name, module, ep_mesh.size())
    for _, module in found:
        ExpertParallel()._apply(module, ep_mesh)
    return model


class ExpertParallel(ParallelStyle):
    """A parallel style for one experts module: dim 0 of each parameter, the expert dim, is sharded over the mesh.

    Rank p of 4 with 8 experts holds::

        rank 0: 0 1    rank 1: 2 3    rank 2: 4 5    rank 3: 6 7
    """

    def _partition_fn(self, name: str, module: nn.Module, device_mesh: DeviceMesh) -> None:
        source = getattr(self, "src_data_rank", 0)
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            local = distribute_tensor(parameter.detach(), device_mesh, [Shard(0)], src_data_rank=source)
            module.register_parameter(leaf, nn.Parameter(local, requires_grad=parameter.requires_grad))

    def _apply(self, module: Any, device_mesh: DeviceMesh) -> nn.Module:
        _check(type(module).__name__, module, device_mesh.size())
        self._partition_fn("", module, device_mesh)
        module.num_global_experts = module.num_experts
        module.num_experts //= device_mesh.size()
        # transformers' grouped and batched kernels handle the id that means "no expert" only if they see this.
        module._is_expert_parallel = True
        module.expert_mesh = device_mesh
        module.forward = types.MethodType(_forward, module)
        return module


def _check(name: str, module: Any, size: int) -> None:
    if any(isinstance(p, DTensor) for p in module.parameters(recurse=False)):
        raise ValueError(f"the experts of {name} are distributed already; apply expert parallelism once, before FSDP")
    experts = module.num_experts
    if experts % size:
        fits = [d for d in range(1, experts + 1) if experts % d == 0]
        raise ValueError(f"the {experts} experts of {name} do not divide over {size} ranks; an axis can have {fits}")


def _forward(
    module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """What an experts module does instead of its own forward; runs that on the rows this rank received."""
    group = module.expert_mesh.get_group()
    sent = dispatch(hidden_states, top_k_index, top_k_weights, module.num_experts, group)
    with _local_parameters(module, sent.rows_RD.dtype) as local:
        if sent.rows_RD.shape[0]:
            out_RD = type(module).forward(module, sent.rows_RD, sent.ids_RK, sent.weights_RK)
        else:
            # No rows: the parameters still get a gradient, of zeros, so that every rank reduces the same ones.
            nothing = sum(p.flatten()[:0].sum() for p in local)
            out_RD = sent.rows_RD * sent.weights_RK.sum(-1, keepdim=True).to(sent.rows_RD.dtype) + nothing
    return combine(out_RD, sent, group)


@contextmanager
def _local_parameters(module: Any, dtype: torch.dtype) -> Iterator[list[torch.Tensor]]:
    """Let the module's own forward see plain tensors: this rank's slices, in the dtype of the tokens."""
    distributed = module._parameters
    scale = 1 / module.expert_mesh.size()
    local = {}
    for name, parameter in distributed.items():
        if parameter is not None:
            plain = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            local[name] = _ScaleGradient.apply(plain, scale).to(dtype)
    module._parameters = {**distributed, **local}
    try:
        yield list(local.values())
    finally:
        module._parameters = distributed


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, scale):
        ctx.scale = scale
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, *gradients):
        return gradients[0] * ctx.scale, None
