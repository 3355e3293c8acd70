"""What this package takes from torch beyond its public names; `test_torch_compat.py` fails when torch changes it."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.distributed.fsdp import FSDPModule

# torch 2.13 renamed them, and warns of the names before.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def in_backward() -> bool:
    """Whether autograd is running a backward on this thread, as when an activation checkpoint recomputes."""
    return torch._C._current_graph_task_id() != -1


def group_of(name: str) -> dist.ProcessGroup:
    """The process group of a name: custom operators take names."""
    return _resolve_process_group(name)


def handed_out(tensor: torch.Tensor) -> torch.Tensor:
    """What the forward of an autograd function returns in place of a tensor that it wrote in place, as collectives do.

    Under `torch.compile`, torch 2.11 takes such a tensor for a constant: its gradient would be zero.
    """
    return tensor.view_as(tensor)


def reduce_unused(unit: FSDPModule) -> None:
    """Let the parameters of a unit that a rank did not use take part in the reduction of gradients, as zeros.

    Raises:
        ValueError: this torch cannot do that.
    """
    if not hasattr(unit, "set_reduce_scatter_unused_params"):
        raise ValueError(
            f"{type(unit).__name__} may use other parameters on each rank, which FSDP2 of torch {torch.__version__} "
            "cannot reduce; use torch 2.13 or newer, or spread the experts with apply_ep"
        )
    unit.set_reduce_scatter_unused_params(True)


def side_by_side(first: DeviceMesh, second: DeviceMesh) -> DeviceMesh:
    """One mesh of two axes of the same root mesh, either of which may have been flattened; no collective."""
    return DeviceMesh._concatenate([first, second])


def axis(mesh: DeviceMesh | None, name: str) -> DeviceMesh | None:
    """A named axis of a mesh, flattened ones included; None where there is no such axis."""
    if mesh is None:
        return None
    try:
        return mesh[name]
    except (KeyError, RuntimeError, ValueError):
        return None
