"""Lay a model out over the meshes: tensor, context, expert and data parallelism, part by part, then the pipeline."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor.parallel import ParallelStyle

import am_fsdp
import am_moe
import am_pipeline
import am_tp_plans
from training.degrees import Degrees
from training.model import next_token_loss

# What a step returns on this rank: the mean loss of its sequences, or None where no last stage is.
Step = Callable[[torch.Tensor, torch.Tensor], torch.Tensor | None]


@dataclass
class Layout:
    """A laid-out model: the parts this rank trains, one step over its share of the batch, and what to count once."""

    parts: list[nn.Module]
    step: Step
    stages: list
    duplicates: list[nn.Parameter]


def lay_out(
    model: nn.Module,
    degrees: Degrees,
    meshes: tuple[DeviceMesh, DeviceMesh],
    *,
    schedule: str,
    microbatch: int,
    local_batch: int,
    device: torch.device,
) -> Layout:
    # Of the whole model: a pipeline part does not show everything that a plan is derived from.
    plan = am_tp_plans.resolve_plan(model, sequence_parallel=degrees.sequence_parallel) if degrees.tp > 1 else None
    parallelize = functools.partial(parallelize_part, degrees=degrees, plan=plan)
    cp_mesh = meshes[0]["cp"] if degrees.cp > 1 else None
    if degrees.pp == 1:
        model.to(device)
        parallelize(model, *meshes)
        return Layout([model], _plain_step(model, local_batch // microbatch, cp_mesh), [], [])

    schedule, parts, has_first, has_last, stages = am_pipeline.pipeline_model(
        model,
        *meshes,
        pp_axis_name="pp",
        dp_axis_names=("dp_replicate", "dp_shard"),
        layers_per_stage=None,
        pipeline_parallel_schedule_csv=None,
        pipeline_parallel_schedule=schedule,
        microbatch_size=microbatch,
        local_batch_size=local_batch,
        device=device,
        loss_fn=next_token_loss,
        parallelize_fn=parallelize,
        scale_grads=True,
    )

    def step(ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor | None:
        ids, labels, places = _share_of_sequence(ids, labels, cp_mesh)
        losses: list[torch.Tensor] = []
        schedule.step(
            *((ids,) if has_first else ()),
            target=labels if has_last else None,
            losses=losses,
            return_outputs=False,
            **places,
        )
        return torch.stack(losses).mean().detach() if has_last else None

    return Layout(parts, step, stages, am_pipeline.duplicate_parameters(stages))


def parallelize_part(
    part: nn.Module,
    world_mesh: DeviceMesh,
    expert_mesh: DeviceMesh,
    *,
    degrees: Degrees,
    plan: dict[str, ParallelStyle] | None,
    **_axes: object,
) -> None:
    """Tensor parallel, context, experts, then data parallel around all of it; on the model, or on a pipeline part."""
    as_it_is = MixedPrecisionPolicy()  # compute and reduce in the dtype of the parameters
    if degrees.cp > 1 or degrees.ep > 1:
        am_moe.parallelize_model(
            part,
            world_mesh,
            expert_mesh,
            dp_axis_names=("dp_replicate", "dp_shard"),
            cp_axis_name="cp",
            tp_axis_name="tp",
            ep_axis_name="ep" if degrees.ep > 1 else None,
            ep_shard_axis_names=("ep_shard",),
            mp_policy=as_it_is,
            sequence_parallel=degrees.sequence_parallel,
            tp_shard_plan=plan,
        )
    elif degrees.dp * degrees.tp > 1:
        am_fsdp.fsdp2_strategy_parallelize(
            part,
            world_mesh,
            mp_policy=as_it_is,
            sequence_parallel=degrees.sequence_parallel,
            tp_shard_plan=plan,
            dp_mesh_name=("dp_replicate", "dp_shard") if degrees.dp_replicate > 1 else "dp_shard",
            tp_mesh_name="tp",
        )


def _share_of_sequence(
    ids: torch.Tensor, labels: torch.Tensor, cp_mesh: DeviceMesh | None
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """This rank's tokens, their labels, and what tells the model where in the sequence they are."""
    if cp_mesh is None:
        return ids, labels, {}
    places = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    ids, labels, places = (am_moe.shard_sequence(tensor, cp_mesh) for tensor in (ids, labels, places))
    return ids, labels, {"position_ids": places}


def _plain_step(model: nn.Module, microbatches: int, cp_mesh: DeviceMesh | None) -> Step:
    def step(ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        ids, labels, places = _share_of_sequence(ids, labels, cp_mesh)
        total = torch.zeros((), device=ids.device)
        sharded = hasattr(model, "set_requires_gradient_sync")
        chunks = list(zip(ids.chunk(microbatches), labels.chunk(microbatches), strict=True))
        places = {name: tensor[: len(chunks[0][0])] for name, tensor in places.items()}  # the same in every row
        for index, (some_ids, some_labels) in enumerate(chunks):
            if sharded:
                model.set_requires_gradient_sync(index == len(chunks) - 1)
            loss = next_token_loss(model(some_ids, use_cache=False, **places).logits, some_labels) / microbatches
            loss.backward()
            total += loss.detach()
        return total

    return step
