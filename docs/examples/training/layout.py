"""Lay a model out over the meshes: tensor, context, expert and data parallelism, part by part, then the pipeline."""

from __future__ import annotations

import contextlib
import functools
import inspect
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
from training.compiled import compile_layers
from training.degrees import Degrees
from training.model import main_output, next_token_loss

# A tensor of all rows, what is the same for every row, or a list with a tensor or None for each microbatch.
Input = torch.Tensor | int | list[torch.Tensor | None]
# Takes ids, labels and the model's other inputs by name; returns the mean of this rank's losses, or None where no last
# stage is.
Step = Callable[..., torch.Tensor | None]
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass
class Layout:
    """A laid-out model: the parts this rank trains, one step over its share of the batch, and what to count once.

    Attributes:
        parts: the model, or this rank's stages of it.
        step: forward and backward of a batch; `step(ids, labels, attention_mask=…)`.
        evaluate: the same without gradients.
        stages: of a pipeline, with what a timeline records.
        duplicates: copies of tied weights that another stage counts.
    """

    parts: list[nn.Module]
    step: Step
    evaluate: Step
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
    loss_fn: Loss = next_token_loss,
    mp_policy: MixedPrecisionPolicy | None = None,
    recompute: bool | str | int = False,
    compile_with: str | None = None,
    output_of: Callable = main_output,
    autocast: torch.dtype | None = None,
) -> Layout:
    """Lay out a model that has the same weights on every rank.

    Args:
        model: changed in place, or cut. On meta, weights are for the parts to load.
        degrees, meshes: of `Degrees`.
        schedule: of `torch.distributed.pipelining`.
        microbatch, local_batch: sequences per forward, and of this rank per step.
        device: where the model will be.
        loss_fn: takes what the model returns and the labels of a microbatch; gradients are averaged over
            microbatches, data and context ranks.
        mp_policy: FSDP2's; None to compute and reduce in the dtype of the parameters.
        recompute: a mode of `am_fsdp.checkpoint_layers`.
        compile_with: a backend of `torch.compile`, for each layer by itself; None to compile nothing.
        output_of: what `loss_fn` gets of a whole model's output; a last stage gives its logits or last hidden state.
        autocast: the dtype that forward and loss run in by `torch.autocast`; None for that of the parameters.
    """
    # Of the whole model: a pipeline part does not show everything that a plan is derived from.
    plan = am_tp_plans.resolve_plan(model, sequence_parallel=degrees.sequence_parallel) if degrees.tp > 1 else None
    settings = {"mp_policy": mp_policy, "recompute": recompute, "compile_with": compile_with}
    parallelize = functools.partial(parallelize_part, degrees=degrees, plan=plan, **settings)
    cp_mesh = meshes[0]["cp"] if degrees.cp > 1 else None
    if degrees.pp == 1:
        if not any(parameter.is_meta for parameter in model.parameters()):
            model.to(device)
        parallelize(model, *meshes)
        step, evaluate = _plain_steps(model, local_batch // microbatch, cp_mesh, loss_fn, output_of, autocast)
        return Layout([model], step, evaluate, [], [])

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
        loss_fn=loss_fn,
        parallelize_fn=parallelize,
        scale_grads=True,
    )

    def call(do: Callable, ids: torch.Tensor, labels: torch.Tensor, **inputs: Input) -> torch.Tensor | None:
        ids, labels, inputs = _share_of_sequence(ids, labels, inputs, cp_mesh)
        losses: list[torch.Tensor] = []
        with torch.autocast(device.type, autocast) if autocast else contextlib.nullcontext():
            do(*((ids,) if has_first else ()), target=labels if has_last else None, losses=losses, **inputs)
        return torch.stack(losses).mean().detach() if has_last else None

    step = functools.partial(call, functools.partial(schedule.step, return_outputs=False))
    evaluate = functools.partial(call, schedule.eval)
    return Layout(parts, step, evaluate, stages, am_pipeline.duplicate_parameters(stages))


def parallelize_part(
    part: nn.Module,
    world_mesh: DeviceMesh,
    expert_mesh: DeviceMesh,
    *,
    degrees: Degrees,
    plan: dict[str, ParallelStyle] | None,
    mp_policy: MixedPrecisionPolicy | None = None,
    recompute: bool | str | int = False,
    compile_with: str | None = None,
    **_axes: object,
) -> None:
    """Tensor parallel, context, experts, then data parallel around all of it; on the model, or on a pipeline part."""
    mixed = mp_policy or MixedPrecisionPolicy()  # compute and reduce in the dtype of the parameters
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
            mp_policy=mixed,
            sequence_parallel=degrees.sequence_parallel,
            tp_shard_plan=plan,
            activation_checkpointing=bool(recompute),
        )
    elif degrees.dp * degrees.tp > 1 or mp_policy:
        am_fsdp.fsdp2_strategy_parallelize(
            part,
            world_mesh,
            mp_policy=mixed,
            sequence_parallel=degrees.sequence_parallel,
            activation_checkpointing=recompute,
            tp_shard_plan=plan,
            dp_mesh_name=("dp_replicate", "dp_shard") if degrees.dp_replicate > 1 else "dp_shard",
            tp_mesh_name="tp",
        )
    else:
        am_fsdp.checkpoint_layers(part, recompute)
    if compile_with:
        compile_layers(part, compile_with)


def _share_of_sequence(
    ids: torch.Tensor, labels: torch.Tensor, inputs: dict[str, Input], cp_mesh: DeviceMesh | None
) -> tuple[torch.Tensor, torch.Tensor, dict[str, Input]]:
    """This rank's tokens, their labels, and what tells the model where in the sequence they are."""
    if cp_mesh is None:
        return ids, labels, inputs
    inputs = {"position_ids": torch.arange(ids.shape[1], device=ids.device).expand_as(ids)} | inputs
    ids, labels = (am_moe.shard_sequence(tensor, cp_mesh) for tensor in (ids, labels))
    return ids, labels, {name: am_moe.shard_sequence(tensor, cp_mesh) for name, tensor in inputs.items()}


def _plain_steps(
    model: nn.Module,
    microbatches: int,
    cp_mesh: DeviceMesh | None,
    loss_fn: Loss,
    output_of: Callable,
    autocast: torch.dtype | None,
) -> tuple[Step, Step]:
    """`step` and `evaluate` of a model that is not cut."""
    takes_cache = "use_cache" in inspect.signature(model.forward).parameters

    def pieces(ids: torch.Tensor, labels: torch.Tensor, inputs: dict[str, Input]) -> list[tuple]:
        ids, labels, inputs = _share_of_sequence(ids, labels, inputs, cp_mesh)
        size = len(ids) // microbatches
        cut = []
        for place in range(microbatches):
            rows = slice(place * size, (place + 1) * size)
            mine = {name: _of_microbatch(value, place, rows, len(ids)) for name, value in inputs.items()}
            cut.append((ids[rows], labels[rows], {name: value for name, value in mine.items() if value is not None}))
        return cut

    def loss_of(ids: torch.Tensor, labels: torch.Tensor, inputs: dict[str, Input]) -> torch.Tensor:
        settings = {"use_cache": False} if takes_cache else {}
        # Around each forward alone: torch keeps cast weights until the context ends, FSDP2 gathers them anew for each.
        with torch.autocast(ids.device.type, autocast) if autocast else contextlib.nullcontext():
            return loss_fn(output_of(model(ids, **settings, **inputs)), labels) / microbatches

    def step(ids: torch.Tensor, labels: torch.Tensor, **inputs: Input) -> torch.Tensor:
        total = torch.zeros((), device=ids.device)
        sharded = hasattr(model, "set_requires_gradient_sync")
        chunks = pieces(ids, labels, inputs)
        for index, chunk in enumerate(chunks):
            if sharded:
                model.set_requires_gradient_sync(index == len(chunks) - 1)
            loss = loss_of(*chunk)
            loss.backward()
            total += loss.detach()
        return total

    @torch.no_grad()
    def evaluate(ids: torch.Tensor, labels: torch.Tensor, **inputs: Input) -> torch.Tensor:
        return torch.stack([loss_of(*chunk) for chunk in pieces(ids, labels, inputs)]).sum()

    return step, evaluate


def _of_microbatch(value: Input, place: int, rows: slice, batch: int) -> torch.Tensor | int | None:
    """What is the same for every row, such as positions `(1, S)`, stays whole."""
    if isinstance(value, list):
        return value[place]
    return value[rows] if isinstance(value, torch.Tensor) and value.shape[0] == batch else value
