"""The one place that touches private names of FSDP2. `tests/test_torch_compat.py` fails when torch changes them."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import _StridedShard


def is_unsharded(module: FSDPModule) -> bool:
    """Whether an FSDP module holds its whole parameters right now; False for one that manages none."""
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:  # torch before 2.13 has one group per state
        groups = [g for g in [state._fsdp_param_group] if g is not None]
    return bool(groups) and all(group.is_unsharded for group in groups)


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


def has_gradient_hooks(parameter: torch.Tensor) -> bool:
    """Whether hooks were registered on a leaf, which memory of its own would lose."""
    return bool(parameter._backward_hooks or parameter._post_accumulate_grad_hooks)


def writes(tensor: torch.Tensor) -> int:
    """How many operations have written to a tensor in place."""
    return tensor._version


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
