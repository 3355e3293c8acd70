"""Whether ranks that should hold the same weights do: FSDP2 takes it for granted."""

from __future__ import annotations

from collections import defaultdict

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate


def check_replicas(model: nn.Module, mesh: DeviceMesh, tensor_mesh: DeviceMesh | None = None) -> None:
    """Refuse ranks that hold different weights where they should hold the same: other seeds, a checkpoint not loaded.

    `fsdp2_strategy_parallelize` asks before it shards a model with real weights. Call it yourself after you have filled
    the shards of a model from meta by code of your own.

    Args:
        model: not sharded yet, or as between steps. Parameters on meta are left out.
        mesh: the data axes. Plain parameters are compared along all of them, sharded ones along those that replicate.
        tensor_mesh: the tensor axis, whose ranks hear of a difference, too; needed before parameters are sharded.

    Collectives: an all-reduce of two int64 per replicated parameter along each axis that replicates, one of one int64
    along each axis of the parameters, a tensor axis included; one host sync. Every weight is read once.

    Raises:
        ValueError: names the parameters, on every rank that holds a part of the model.
    """
    replicated: dict[int, list[tuple[str, torch.Tensor]]] = defaultdict(list)
    widest = mesh  # with a tensor axis, if parameters are sharded along one, too
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            widest = max(widest, parameter.device_mesh, key=lambda each: each.ndim)
        local = (parameter.to_local() if isinstance(parameter, DTensor) else parameter).detach()
        axes = [] if local.is_meta else _replicating_axes(parameter, mesh)
        if axes:
            bits = _bit_sum(local)
            for axis in axes:
                replicated[axis].append((name, bits))
    names = sorted({name for pairs in replicated.values() for name, _ in pairs})
    if not names:
        return
    place_of = {name: place for place, name in enumerate(names)}
    differs = torch.zeros(len(names), dtype=torch.int64, device=mesh.device_type)
    for axis, pairs in sorted(replicated.items()):
        sums = torch.stack([value for _, value in pairs]).to(mesh.device_type)  # from the CPU if offloaded
        ends = torch.stack([sums, ~sums])  # the largest of the complements is the complement of the smallest
        dist.all_reduce(ends, dist.ReduceOp.MAX, group=mesh.get_group(axis))
        places = torch.tensor([place_of[name] for name, _ in pairs], device=differs.device)
        differs.index_add_(0, places, (ends[0] != ~ends[1]).long())
    for axis in range(widest.ndim):
        if widest.size(axis) > 1:
            dist.all_reduce(differs, dist.ReduceOp.MAX, group=widest.get_group(axis))
    if tensor_mesh is not None and tensor_mesh.size() > 1 and widest is mesh:
        dist.all_reduce(differs, dist.ReduceOp.MAX, group=tensor_mesh.get_group())
    wrong = [name for name, count in zip(names, differs.tolist(), strict=True) if count]
    if wrong:
        shown = ", ".join(wrong[:3]) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")
        raise ValueError(
            f"ranks of the data axes hold different weights of this model ({shown}): set one seed on all ranks before "
            "the model is made, or load the same checkpoint on all of them"
        )


def _replicating_axes(parameter: nn.Parameter, mesh: DeviceMesh) -> list[int]:
    """The axes of the data mesh along which several ranks hold the same of a parameter."""
    # A rehearsal without other ranks has values of none.
    several = [i for i in range(mesh.ndim) if mesh.size(i) > 1 and dist.get_backend(mesh.get_group(i)) != "fake"]
    if not isinstance(parameter, DTensor):
        return several
    names, theirs = mesh.mesh_dim_names or (), parameter.device_mesh.mesh_dim_names or ()
    placed = dict(zip(theirs, parameter.placements, strict=True))
    return [axis for axis in several if names and isinstance(placed.get(names[axis]), Replicate)]


def _bit_sum(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor's bits, read as integers and modulo 2^64: the same in whatever order it is added up."""
    flat = tensor.reshape(-1)
    if flat.storage_offset() * flat.element_size() % 8:
        flat = flat.clone()  # words start at multiples of their size
    words = torch.uint8 if flat.numel() * flat.element_size() % 8 else torch.int64
    return flat.view(words).sum(dtype=torch.int64)
