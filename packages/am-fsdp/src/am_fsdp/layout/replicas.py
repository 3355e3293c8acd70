"""Whether ranks that should hold the same weights do: FSDP2 and the spread of experts take it for granted."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate

from am_fsdp.layout.evaluation import outside_graphs


def check_replicas(model: nn.Module, mesh: DeviceMesh, tensor_mesh: DeviceMesh | None = None) -> None:
    """Refuse ranks that hold different weights where they should hold the same: other seeds, a checkpoint not loaded.

    The strategies ask before they shard a model with real weights, and at the first forward of one from meta. Call it
    yourself where weights are filled later still.

    Args:
        model: not sharded yet, or as between steps. Parameters on meta are left out.
        mesh: the data axes.
        tensor_mesh: the tensor axis.

    A parameter is compared along each of these axes that does not shard it.

    Collectives: an all-reduce of two int64 per replicated parameter along each axis that replicates, one of one int64
    along each axis; one host sync. Every weight is read once.

    Raises:
        ValueError: names the parameters, on every rank that holds a part of the model.
    """
    axes = [(mesh, axis) for axis in range(mesh.ndim)] + ([(tensor_mesh, 0)] if tensor_mesh is not None else [])
    # A rehearsal without other ranks has values of none.
    axes = [(m, axis) for m, axis in axes if m.size(axis) > 1 and dist.get_backend(m.get_group(axis)) != "fake"]
    replicated: dict[int, list[tuple[str, torch.Tensor]]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        local = (parameter.to_local() if isinstance(parameter, DTensor) else parameter).detach()
        alike = [] if local.is_meta else [n for n, (m, axis) in enumerate(axes) if _replicates(parameter, m, axis)]
        if alike:
            bits = _bit_sum(local)
            for number in alike:
                replicated[number].append((name, bits))
    names = sorted({name for pairs in replicated.values() for name, _ in pairs})
    if not names:
        return
    place_of = {name: place for place, name in enumerate(names)}
    differs = torch.zeros(len(names), dtype=torch.int64, device=mesh.device_type)
    for number, pairs in sorted(replicated.items()):
        sums = torch.stack([value for _, value in pairs]).to(mesh.device_type)  # from the CPU if offloaded
        ends = torch.stack([sums, ~sums])  # the largest of the complements is the complement of the smallest
        along, axis = axes[number]
        dist.all_reduce(ends, dist.ReduceOp.MAX, group=along.get_group(axis))
        places = torch.tensor([place_of[name] for name, _ in pairs], device=differs.device)
        differs.index_add_(0, places, (ends[0] != ~ends[1]).long())
    for along, axis in _all_axes(model, axes, tensor_mesh):
        dist.all_reduce(differs, dist.ReduceOp.MAX, group=along.get_group(axis))
    wrong = [name for name, count in zip(names, differs.tolist(), strict=True) if count]
    if wrong:
        shown = ", ".join(wrong[:3]) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")
        raise ValueError(
            f"ranks of the data or tensor axes hold different weights of this model ({shown}): set one seed on all "
            "ranks before the model is made, or load the same checkpoint on all of them"
        )


def check_replicas_at_first_forward(model: nn.Module, mesh: DeviceMesh, tensor_mesh: DeviceMesh | None) -> None:
    """`check_replicas` once, when a model from meta has got its weights and runs."""

    @outside_graphs
    def check(_module: nn.Module, _arguments: Any) -> None:
        handle.remove()
        check_replicas(model, mesh, tensor_mesh)

    handle = model.register_forward_pre_hook(check, prepend=True)


def _replicates(parameter: nn.Parameter, mesh: DeviceMesh, axis: int) -> bool:
    """Whether the ranks along an axis hold the same of a parameter."""
    if not isinstance(parameter, DTensor):
        return True
    names, theirs = mesh.mesh_dim_names or (), parameter.device_mesh.mesh_dim_names or ()
    placed = dict(zip(theirs, parameter.placements, strict=False))
    if names and names[axis] in placed:
        return isinstance(placed[names[axis]], Replicate)
    others = set(dist.get_process_group_ranks(mesh.get_group(axis))) - {dist.get_rank()}
    return not others & set(parameter.device_mesh.mesh.flatten().tolist())


def _all_axes(
    model: nn.Module, axes: list[tuple[DeviceMesh, int]], tensor_mesh: DeviceMesh | None
) -> list[tuple[DeviceMesh, int]]:
    """Those that all ranks with a part of the model are on: a tensor axis that nobody named is a parameter's."""
    meshes = [p.device_mesh for p in model.parameters() if isinstance(p, DTensor)]
    widest = max(meshes, key=lambda each: each.ndim, default=None)
    if tensor_mesh is not None or widest is None or widest.ndim <= len(axes):
        return axes
    return [(widest, axis) for axis in range(widest.ndim) if widest.size(axis) > 1]


def _bit_sum(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor's bits, read as integers and modulo 2^64: the same in whatever order it is added up."""
    flat = tensor.reshape(-1)
    if flat.storage_offset() * flat.element_size() % 8:
        flat = flat.clone()  # words start at multiples of their size
    words = torch.uint8 if flat.numel() * flat.element_size() % 8 else torch.int64
    return flat.view(words).sum(dtype=torch.int64)
