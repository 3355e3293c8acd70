"""How many labels a step trained on, and the division that a loss over tokens needs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from am_pipeline._torch_compat import stages_of
from am_pipeline.step.schedule import PipelineSchedule


def scale_grads_by_tokens(
    schedule: PipelineSchedule,
    mesh: DeviceMesh | None = None,
    axes: str | Sequence[str] | None = None,
    tokens: int | None = None,
) -> torch.Tensor:
    """Divide gradients by the labels of the whole batch, for a loss that sums over tokens (`reduction="sum"`).

    FSDP2 has averaged the gradients over the n ranks of data, replica and context axes, so that the divisor is the sum
    of their labels divided by n. Without such axes it is the labels of the pipeline. Call it on every rank, after the
    last step before `optimizer.step()`.

    Args:
        schedule: from `pipeline_model` or `build_pipeline_schedule`, with `scale_grads=False`.
        mesh: the mesh with the axes; the one given to `pipeline_model` unless another is.
        axes: the axes over which FSDP2 averages: data, replicas, context; those given to `pipeline_model` unless
            others are. Not the tensor axis: its ranks have the same labels.
        tokens: labels of all steps that are in `.grad`, on this pipeline: the sum of `schedule.pipeline_tokens` after
            each. The last step's alone unless given.

    Returns:
        The labels over all axes, a scalar on the stages' device: what the sum of losses is divided by. Where there
        are none, gradients stay as they are: zero.

    Collectives: an all-reduce of one int64 for each axis. No host sync.

    Raises:
        ValueError: an axis that the mesh does not have, axes without a mesh, `tokens` below zero; on every rank alike.
    """
    if tokens is not None and tokens < 0:
        raise ValueError(f"tokens must not be negative, got {tokens}")
    if axes is None:
        axes = schedule.averaged_axes if mesh is None or mesh is schedule.mesh else ()
    axes = (axes,) if isinstance(axes, str) else tuple(axes)
    mesh = schedule.mesh if mesh is None else mesh
    if axes and mesh is None:
        raise ValueError(f"axes={axes} need the mesh that has them: scale_grads_by_tokens(schedule, mesh, axes)")
    stages = stages_of(schedule)
    total = torch.tensor(schedule.pipeline_tokens if tokens is None else tokens, device=stages[0].device)
    ranks = 1
    for axis in axes:
        sub_mesh = axis_of(mesh, axis)
        dist.all_reduce(total, group=sub_mesh.get_group())
        ranks *= sub_mesh.size()
    divisor = total.clamp(min=1).to(torch.float64) / ranks
    for stage in stages:
        for parameter in stage.submod.parameters():
            if parameter.grad is not None:
                local = parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad
                local.div_(divisor)
    return total


def axis_of(mesh: Any, name: str) -> DeviceMesh:
    """One axis of a mesh, flattened ones included.

    Raises:
        ValueError: there is none of that name.
    """
    try:
        return mesh[name]
    except (KeyError, RuntimeError) as error:
        raise ValueError(f"the mesh has no axis {name!r}; it has {mesh.mesh_dim_names}") from error
