"""Whether ranks that should hold the same weights do: FSDP2 and the spread of experts take it for granted."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate

from am_moe.data_parallel.evaluation import outside_graphs


def check_replicas(model: nn.Module, meshes: list[DeviceMesh]) -> None:
    """Refuse ranks that hold different weights where they should hold the same: other seeds, a checkpoint not loaded.

    Args:
        model: a model or a part, laid out or not. Parameters on meta are left out.
        meshes: whose axes the model is laid out over: a parameter is compared along each that does not shard it.

    Collectives: an all-reduce of two int64 per replicated parameter along each axis, one of one int64 along each; one
        host sync. Every replicated weight is read once.

    Raises:
        ValueError: names the parameters, on every rank of the meshes.
    """
    axes = [(mesh, axis) for mesh in meshes for axis in range(mesh.ndim) if mesh.size(axis) > 1]
    # A rehearsal without other ranks has values of none.
    axes = [(mesh, axis) for mesh, axis in axes if dist.get_backend(mesh.get_group(axis)) != "fake"]
    names, sums = [], []
    for name, parameter in model.named_parameters():
        local = (parameter.to_local() if isinstance(parameter, DTensor) else parameter).detach()
        if not local.is_meta and any(_replicates(parameter, *axis) for axis in axes):
            names.append(name)
            sums.append(_bit_sum(local))
    if not names:
        return
    device = axes[0][0].device_type
    bits = torch.stack([each.to(device) for each in sums])  # from the CPU if offloaded
    differs = torch.zeros(len(names), dtype=torch.int64, device=device)
    parameters = dict(model.named_parameters())
    for mesh, axis in axes:
        alike = torch.tensor([_replicates(parameters[name], mesh, axis) for name in names], device=device)
        ends = torch.stack([bits, ~bits])  # the largest of the complements is the complement of the smallest
        dist.all_reduce(ends, dist.ReduceOp.MAX, group=mesh.get_group(axis))
        differs += (ends[0] != ~ends[1]) & alike
    for mesh, axis in axes:
        dist.all_reduce(differs, dist.ReduceOp.MAX, group=mesh.get_group(axis))
    wrong = [name for name, count in zip(names, differs.tolist(), strict=True) if count]
    if wrong:
        shown = ", ".join(wrong[:3]) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")
        raise ValueError(
            f"ranks of the data or tensor axes hold different weights of this model ({shown}): set one seed on all "
            "ranks before the model is made, or load the same checkpoint on all of them"
        )


def check_replicas_at_first_forward(model: nn.Module, meshes: list[DeviceMesh]) -> None:
    """`check_replicas` once, when a model from meta has got its weights and runs."""

    @outside_graphs
    def check(_module: nn.Module, _arguments: Any) -> None:
        handle.remove()
        check_replicas(model, meshes)

    handle = model.register_forward_pre_hook(check, prepend=True)


def _replicates(parameter: nn.Parameter, mesh: DeviceMesh, axis: int) -> bool:
    """Whether the ranks along an axis hold the same of a parameter; no where it cannot be told from its mesh."""
    if not isinstance(parameter, DTensor):
        return True
    names, theirs = mesh.mesh_dim_names or (), parameter.device_mesh.mesh_dim_names or ()
    placed = dict(zip(theirs, parameter.placements, strict=False))
    if names and names[axis] in placed:
        return isinstance(placed[names[axis]], Replicate)
    others = set(dist.get_process_group_ranks(mesh.get_group(axis))) - {dist.get_rank()}
    return not others & set(parameter.device_mesh.mesh.flatten().tolist())


def _bit_sum(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor's bits, read as integers and modulo 2^64: the same in whatever order it is added up."""
    flat = tensor.reshape(-1)
    if flat.storage_offset() * flat.element_size() % 8:
        flat = flat.clone()  # words start at multiples of their size
    words = torch.uint8 if flat.numel() * flat.element_size() % 8 else torch.int64
    return flat.view(words).sum(dtype=torch.int64)
