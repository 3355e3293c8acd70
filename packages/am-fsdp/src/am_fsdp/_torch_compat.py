"""The one place that touches private names of FSDP2. `tests/test_torch_compat.py` fails when torch changes them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed._composable_state import _module_state_mapping
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import _StridedShard


def in_backward() -> bool:
    """Whether autograd is running a backward on this thread, as when an activation checkpoint recomputes."""
    return torch._C._current_graph_task_id() != -1


def is_unsharded(module: FSDPModule) -> bool:
    """Whether an FSDP module holds its whole parameters right now; False for one that manages none."""
    groups = _groups(module._get_fsdp_state())
    return bool(groups) and all(group.is_unsharded for group in groups)


def reduces_unused(module: FSDPModule) -> bool:
    """Whether the parameters of a unit that a rank did not use take part in the reduction of gradients, as zeros."""
    return any(getattr(group, "reduce_scatter_unused_params", False) for group in _groups(module._get_fsdp_state()))


def unit_key(module: FSDPModule) -> int:
    """The same for modules that FSDP2 gathers together."""
    return id(module._get_fsdp_state())


def unit_parameters(module: FSDPModule) -> list[tuple[str, torch.Tensor, torch.Tensor | None]]:
    """Name, shard and gathered form of each parameter of a unit; None where it was never gathered.

    Names are those in the model once it has run.
    """
    managed = [parameter for group in _groups(module._get_fsdp_state()) for parameter in group.fsdp_params]
    return [
        (p._param_fqn or p._module_info.param_name, p.sharded_param, getattr(p, "_unsharded_param", None))
        for p in managed
    ]


def end_forward(module: FSDPModule) -> None:
    """Shard a unit, also one of several modules of which a forward has run some and no other will come."""
    state: Any = module._get_fsdp_state()
    if state._modules_to_run_forward:
        state._modules_to_run_forward.clear()
        if state._state_ctx.iter_forward_root is state:
            state._state_ctx.iter_forward_root = None
        for held in (state, *_groups(state)):
            held._training_state = TrainingState.IDLE
    module.reshard()


def reduce_as_asked(module: FSDPModule) -> None:
    """Let a unit that was frozen at its first forward reduce gradients in the dtypes of its policy once it is trained.

    FSDP2 looks at what is trained in the first forward alone.
    """
    for group in _groups(module._get_fsdp_state()):
        frozen_at_first = getattr(group, "_orig_dtype", torch.float32) is None
        if frozen_at_first and any(p.sharded_param.requires_grad for p in group.fsdp_params):
            group._init_mp_dtypes()


def stay_gathered_after_forward(module: FSDPModule) -> Callable[[], None]:
    """Let a unit keep its whole parameters after a forward; returns what undoes it."""
    before = [(group, group.post_forward_mesh_info) for group in _groups(module._get_fsdp_state())]
    for group, _ in before:
        group.post_forward_mesh_info = None

    def undo() -> None:
        for group, mesh_info in before:
            group.post_forward_mesh_info = mesh_info

    return undo


def gathered_parameters() -> set[int]:
    """The ids of all parameters of this process that FSDP2 holds gathered right now, in whatever model."""
    states = {id(state): state for each in [*_module_state_mapping.values()] if (state := each()) is not None}
    groups = [g for state in states.values() for g in _groups(state) if g.is_unsharded]
    return {id(p._unsharded_param) for group in groups for p in group.fsdp_params}


def _groups(state: Any) -> list[Any]:
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:  # torch before 2.13 has one group per state
        groups = [g for g in [getattr(state, "_fsdp_param_group", None)] if g is not None]
    return groups


def axis(mesh: DeviceMesh, name: str) -> DeviceMesh | None:
    """A named axis of a mesh, flattened ones such as `dp_cp` included; None where there is no such axis."""
    if name in (mesh.mesh_dim_names or ()):
        return mesh[name]
    try:
        return mesh[name]
    except (KeyError, RuntimeError, ValueError):
        return None


def side_by_side(mesh: DeviceMesh, first: str, second: str) -> DeviceMesh:
    """Two axes of a mesh as one mesh, either of which may be a flattened one."""
    if second in (mesh.mesh_dim_names or ()) and first in (mesh.mesh_dim_names or ()):
        return mesh[first, second]
    return DeviceMesh._concatenate([mesh[first], mesh[second]])


def local_box(tensor: DTensor) -> list[tuple[int, int]]:
    """The index ranges of the whole tensor that this rank's shard is, [start, stop) per dim.

    The offsets are those that `torch.distributed.checkpoint` writes by. They say where the first row of a strided
    shard is; its rows are in one piece where the axes behind it divided the dim before, as under FSDP2 over tensor
    parallelism.

    Raises:
        ValueError: the tensor is a partial sum, or its shard is not in one piece.
    """
    if any(p.is_partial() for p in tensor.placements):
        raise ValueError(f"a partial sum, {tensor.placements}, is no part of a tensor")
    for axis, placement in enumerate(tensor.placements):
        if isinstance(placement, _StridedShard):
            later = range(axis + 1, tensor.device_mesh.ndim)
            before = [tensor.device_mesh.size(a) for a in later if tensor.placements[a].is_shard(placement.dim)]
            if math.prod(before) != placement.split_factor:
                raise ValueError(f"shards under {tensor.placements} on {tensor.device_mesh} are not in one piece")
    (chunk,) = tensor.__create_chunk_list__()
    return [(start, start + size) for start, size in zip(chunk.offsets, chunk.sizes, strict=True)]


def foreach_norm(tensors: list[torch.Tensor], order: float) -> list[torch.Tensor]:
    """The norm of each of some tensors of one dtype and device, in float64, by few kernels."""
    return list(torch._foreach_norm(tensors, order, dtype=torch.float64))


def foreach_scale_(tensors: list[torch.Tensor], factor: torch.Tensor) -> None:
    """Multiply tensors of one dtype and device in place."""
    torch._foreach_mul_(tensors, factor)


def has_gradient_hooks(parameter: torch.Tensor) -> bool:
    """Whether hooks were registered on a leaf, which memory of its own would lose."""
    return bool(parameter._backward_hooks or parameter._post_accumulate_grad_hooks)


def writes(tensor: torch.Tensor) -> int:
    """How many operations have written to a tensor in place; 0 where inference mode does not count."""
    return 0 if tensor.is_inference() else tensor._version


def group_name_of(argument: Any) -> str | None:
    """The name of the process group that an operator got as an argument, as an object or by its name."""
    if isinstance(argument, torch.ScriptObject):
        try:
            return dist.ProcessGroup.unbox(argument).group_name
        except RuntimeError:  # another object, such as the kind of a reduction
            return None
    return argument if isinstance(argument, str) else None


def init_fake_process_group(world_size: int) -> None:
    """A default group of that many ranks, of which this process is rank 0, whose collectives do nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
