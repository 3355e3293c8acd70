"""Build a torch pipeline schedule over stages, or say why it cannot run them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import (
    PipelineScheduleMulti,
    PipelineScheduleSingle,
    ScheduleDualPipeV,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
    get_schedule_class,
)
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from am_pipeline._torch_compat import CsvSchedule, Schedule, data_ranks, is_compiled, load_csv
from am_pipeline.schedule.order import SCHEDULES, ScheduleName, read_order
from am_pipeline.step.schedule import PipelineSchedule, cut_here, exact
from am_pipeline.step.stage import DecoderStage

logger = logging.getLogger(__name__)

ReduceGrads = Literal["step", "microbatch"]


def build_pipeline_schedule(
    pipeline_parallel_schedule_csv: str | None,
    pipeline_parallel_schedule: ScheduleName | None,
    microbatch_size: int,
    local_batch_size: int,
    stages: list[PipelineStage],
    loss_fn: Callable[..., torch.Tensor] | None,
    scale_grads: bool = False,
    reduce_grads: ReduceGrads = "step",
) -> PipelineSchedule:
    """A schedule over this rank's stages, of torch's own class and of `PipelineSchedule`.

    `schedule.step(ids, target=labels, losses=losses)` and `schedule.eval(...)` are torch's: the first stage's rank
    gives the ids `(B, S)`, the last stage's the target. When `step` returns, what one process would add to every
    gradient has been added, tied parameters included.

    Args:
        pipeline_parallel_schedule_csv: path of a file with one row of actions per rank; it goes before the name.
        pipeline_parallel_schedule: `GPipe`, `1F1B`, `Interleaved1F1B`, `LoopedBFS`, `InterleavedZeroBubble`,
            `ZBVZeroBubble` or `DualPipeV`.
        microbatch_size: sequences per microbatch.
        local_batch_size: sequences per step on this pipeline, a multiple of `microbatch_size`. It fixes the number of
            microbatches; another batch that divides into as many is taken, too.
        stages: this rank's stages, in the order of `split_model_into_stages`.
        loss_fn: takes the last stage's output and the target of one microbatch, returns a scalar; None to evaluate
            only.
        scale_grads: divide the step's gradients by the number of microbatches: True for a `loss_fn` that is a mean
            over its microbatch. False sums what the microbatches give; see `scale_grads_by_tokens`.
        reduce_grads: when FSDP2 modules in the stages reduce their gradients: `"step"` for once, after the last
            microbatch, or `"microbatch"` for after each, which keeps what accumulates sharded.

    With a schedule that splits the backward (the zero-bubble ones, DualPipeV, files), FSDP modules in the stages are
    set not to reshard after forward: torch finds no weight gradients otherwise.

    Collectives (pipeline axis): for each step one all-gather of about 1.2 kB, with the one host sync, which tells every
    rank the batch and that all of them can run it; torch's own sends and receives; an all-reduce of one int64 among
    the hosts, which tells that all of them have; what `sum_shared_gradients` says. The first step makes a gloo group
    for the hosts where the pipeline's own does not take tensors on the CPU.

    Raises:
        ValueError: an unknown schedule, a batch that does not divide, stages that do not fit the schedule, a file
            that is not complete, in order and free of deadlock, compiled stages where torch cannot run them, parts
            wrapped in DistributedDataParallel. For `step`, see `PipelineSchedule.step`.
        FileNotFoundError: no such CSV file.
    """
    if microbatch_size < 1 or local_batch_size < 1 or local_batch_size % microbatch_size:
        raise ValueError(
            f"local_batch_size={local_batch_size} must be a positive multiple of microbatch_size={microbatch_size}"
        )
    if reduce_grads not in ("step", "microbatch"):
        raise ValueError(f"reduce_grads must be 'step' or 'microbatch', got {reduce_grads!r}")
    if not stages:
        raise ValueError("stages is empty: every rank of the pipeline holds at least one stage")
    _refuse_wrapped(stages)
    count = local_batch_size // microbatch_size
    kind = schedule_class(pipeline_parallel_schedule_csv, pipeline_parallel_schedule)
    if issubclass(kind, PipelineScheduleSingle) and len(stages) != 1:
        raise ValueError(
            f"{pipeline_parallel_schedule} holds one stage per rank, got {len(stages)}; use an interleaved schedule"
        )
    total_stages = stages[0].num_stages
    if count < total_stages:
        logger.warning("%d microbatches for %d stages leave ranks idle", count, total_stages)
    if pipeline_parallel_schedule_csv:
        read_order(pipeline_parallel_schedule_csv, stages[0].group_size, count)
    if issubclass(kind, _SPLIT_BACKWARD) or pipeline_parallel_schedule_csv:
        _refuse_compiled(stages, pipeline_parallel_schedule_csv or str(pipeline_parallel_schedule))
        if reduce_grads == "microbatch":
            raise ValueError("a schedule that splits the backward reduces gradients once: reduce_grads='step'")
        _keep_unsharded_until_backward(stages)
    for stage in stages:
        if isinstance(stage, DecoderStage):
            stage.reduces_every_microbatch = reduce_grads == "microbatch"
            stage.has_collectives = stage.has_collectives or _talks_to_others(stage)
    build: Any = exact(kind)
    schedule = build(
        stages if issubclass(kind, PipelineScheduleMulti) else stages[0],
        n_microbatches=count,
        loss_fn=loss_fn,
        scale_grads=scale_grads,
    )
    schedule.local_batch_size = local_batch_size
    schedule.follows_hooks = cut_here(stages)
    if pipeline_parallel_schedule_csv:
        load_csv(schedule, pipeline_parallel_schedule_csv)
    return schedule


def schedule_class(csv: str | None, name: str | None) -> type[Schedule]:
    """The schedule class for a CSV file or a name, or a clear error."""
    if csv:
        return CsvSchedule
    if not name:
        raise ValueError("give pipeline_parallel_schedule a schedule's name, or pipeline_parallel_schedule_csv a file")
    try:
        return get_schedule_class(name)
    except ValueError:
        raise ValueError(f"unknown pipeline schedule {name!r}; torch has {', '.join(SCHEDULES)}") from None


def scale_grads_by_divisor(stages: list[PipelineStage], divisor: int) -> None:
    """Divide every gradient of these stages by `divisor`, for a loss that is a sum over tokens or microbatches.

    Raises:
        ValueError: `divisor` is not positive.
    """
    if divisor <= 0:
        raise ValueError(f"divisor must be positive, got {divisor}")
    for stage in stages:
        stage.scale_grads(divisor)


# Schedules that compute the gradients of inputs and of weights in two passes over one graph.
_SPLIT_BACKWARD = (ScheduleInterleavedZeroBubble, ScheduleZBVZeroBubble, ScheduleDualPipeV)


def _keep_unsharded_until_backward(stages: list[PipelineStage]) -> None:
    """A weight pass finds its parameters in the graph of the forward, so FSDP must not have replaced them by shards."""
    for stage in stages:
        for module in stage.submod.modules():
            if isinstance(module, FSDPModule):
                module.set_reshard_after_forward(False, recurse=False)


def _refuse_wrapped(stages: list[PipelineStage]) -> None:
    for stage in stages:
        if not isinstance(stage.submod, nn.Module):
            raise TypeError(
                f"parallelize_fn returned {stage.submod!r} for stage {stage.stage_index}; return a module, or None "
                "where it has changed the part in place"
            )
        if any(isinstance(module, DistributedDataParallel) for module in stage.submod.modules()):
            raise ValueError(
                f"the part of stage {stage.stage_index} is wrapped in DistributedDataParallel, whose gradients a "
                "pipeline does not average; in parallelize_fn, use FSDP2 (torch.distributed.fsdp.fully_shard) instead"
            )
        stacks = stage.plan.anatomy.stacks if isinstance(stage, DecoderStage) else ()
        if lost := [stack for stack in stacks if not _has(stage.submod, stack)]:
            raise ValueError(
                f"the part of stage {stage.stage_index} is now a {type(stage.submod).__name__} without the module "
                f"{lost[0]!r}; parallelize_fn must keep the names of what it wraps"
            )


def _has(part: nn.Module, name: str) -> bool:
    try:
        return part.get_submodule(name) is not None
    except AttributeError:
        return False


def _talks_to_others(stage: PipelineStage) -> bool:
    return any(isinstance(p, DTensor) and p.device_mesh.size() > 1 for p in stage.submod.parameters()) or any(
        isinstance(m, FSDPModule) and data_ranks(m) > 1 for m in stage.submod.modules()
    )


def _refuse_compiled(stages: list[PipelineStage], name: str) -> None:
    for stage in stages:
        compiled = [module or "the part" for module, m in stage.submod.named_modules() if is_compiled(m)]
        if compiled:
            raise ValueError(
                f"{name} computes gradients of inputs and of weights apart, which torch cannot do through compiled "
                f"modules ({', '.join(compiled[:3])} of stage {stage.stage_index}); use GPipe, 1F1B, Interleaved1F1B "
                "or LoopedBFS, or do not compile"
            )
