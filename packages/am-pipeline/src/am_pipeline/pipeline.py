"""From a whole model to a schedule that trains it: cut, parallelise the parts, shape them, schedule them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining import PipelineStage

from am_pipeline.cut.split import split_model_for_csv, split_model_into_stages
from am_pipeline.placement import RoundTo
from am_pipeline.schedule.balance import Balance, Costs
from am_pipeline.schedule.build import ReduceGrads, build_pipeline_schedule
from am_pipeline.schedule.order import ScheduleName
from am_pipeline.step.schedule import PipelineSchedule
from am_pipeline.step.shapes import precompute_stage_shapes
from am_pipeline.step.stage import DecoderStage
from am_pipeline.step.tokens import axis_of


class ParallelizeFnProtocol(Protocol):
    """What `pipeline_model` calls on each part: applies tensor, expert, data and other parallelism to it.

    It works in place, or returns the module to use instead. If it shards the sequence dim of the tensor between decoder
    layers over n ranks (sequence parallelism), it calls `set_sequence_shards(model, n)`, so that the pipeline sends
    `(B, S / n, D)`. Modules that the part does not hold are leaf modules without parameters.

    Data ranks that share a part run the same modules in every microbatch, or their step is refused: one without images
    beside one with images would leave the other waiting. A part that runs its towers on every rank by itself, as those
    of am-fsdp and am-moe do, has an attribute `runs_towers_on_every_rank` that is true.

    The first three arguments come by position, whatever their names, or by name where they are keyword-only.
    """

    def __call__(
        self,
        model: nn.Module,
        world_mesh: DeviceMesh,
        moe_mesh: DeviceMesh | None,
        *,
        dp_axis_names: tuple[str, ...],
        cp_axis_name: str | None = None,
        tp_axis_name: str | None = None,
        ep_axis_name: str | None = None,
        ep_shard_axis_names: tuple[str, ...] | None = None,
    ) -> nn.Module | None: ...


def pipeline_model(
    model: nn.Module,
    world_mesh: DeviceMesh,
    moe_mesh: DeviceMesh | None = None,
    *,
    pp_axis_name: str = "pp",
    dp_axis_names: tuple[str, ...] = (),
    cp_axis_name: str | None = None,
    tp_axis_name: str | None = None,
    ep_axis_name: str | None = None,
    ep_shard_axis_names: tuple[str, ...] | None = None,
    layers_per_stage: int | None = None,
    pipeline_parallel_schedule_csv: str | None = None,
    pipeline_parallel_schedule: ScheduleName | None = "1F1B",
    microbatch_size: int,
    local_batch_size: int,
    device: torch.device | str | None = None,
    loss_fn: Callable[..., torch.Tensor] | None = None,
    parallelize_fn: ParallelizeFnProtocol | None = None,
    module_fqns_per_model_part: list[list[str]] | None = None,
    patch_inner_model: bool = True,
    patch_causal_lm_model: bool = True,
    scale_grads: bool = False,
    round_to_pp_multiple: RoundTo | None = None,
    patch_stage_backward_maybe_with_nosync: bool = False,
    seq_len: int | None = None,
    balance: Balance | Costs = "flops",
    reduce_grads: ReduceGrads = "step",
    batch_dims: Mapping[str, int | None] | None = None,
    example_inputs: Mapping[str, Any] | None = None,
) -> tuple[PipelineSchedule, list[nn.Module], bool, bool, list[PipelineStage]]:
    """Cut a transformers model, parallelise each part and build the schedule that trains it.

    `pipeline_model(model, mesh, microbatch_size=2, local_batch_size=8, loss_fn=loss_fn, scale_grads=True)` is 1F1B over
    the `"pp"` axis, with one stage on each of its ranks.

    Args:
        model: the whole model, real or on the meta device. With parts on meta, `parallelize_fn` or the caller
            materialises them before the first step.
        world_mesh: mesh with the pipeline axis and whatever other axes `parallelize_fn` uses.
        moe_mesh: the expert mesh over the same ranks, handed to `parallelize_fn`; None without expert parallelism.
        pp_axis_name: the pipeline axis; its size must be at least 2.
        dp_axis_names, cp_axis_name, tp_axis_name, ep_axis_name, ep_shard_axis_names: handed to `parallelize_fn`. The
            data and context axes are also those that `scale_grads_by_tokens(schedule)` counts labels over.
        layers_per_stage: the most layers of a stage; None for one or two stages per rank, as the schedule needs.
        pipeline_parallel_schedule_csv, pipeline_parallel_schedule: see `build_pipeline_schedule`.
        microbatch_size, local_batch_size: sequences per microbatch and per step.
        device: where this rank's stages run; the mesh's own kind of device unless given: for accelerators, the
            current one.
        loss_fn: see `build_pipeline_schedule`.
        parallelize_fn: see `ParallelizeFnProtocol`.
        module_fqns_per_model_part: the modules of each stage by hand.
        patch_inner_model, patch_causal_lm_model: see `build_part`.
        scale_grads: see `build_pipeline_schedule`.
        round_to_pp_multiple: see `calculate_virtual_stages`.
        patch_stage_backward_maybe_with_nosync: accepted and not needed: torch's stages hold back the gradient
            reduction of FSDP modules, experts included, until the last microbatch; `reduce_grads` chooses.
        seq_len: tokens per sequence, if known; another length later is noticed and handled.
        balance: what the stages are balanced by, see `plan_cut`.
        reduce_grads: see `build_pipeline_schedule`.
        batch_dims: the dim along which a keyword input is split into microbatches, by its name, None for whole; needed
            only where an error asks for it.
        example_inputs: what the model is called with, by name, where ids alone do not run all of it, see `plan_cut`.

    Returns:
        `(schedule, parts, has_first_stage, has_last_stage, stages)` of this rank; see `PipelineSchedule` for `step`
        and `eval`.

    Collectives: none here but those of `parallelize_fn`; see `build_pipeline_schedule` for those of a step.

    Raises:
        ValueError: an axis is missing or too small, or what the called functions raise; on every rank alike.
        TypeError: `parallelize_fn` cannot be called as its protocol says.
    """
    axes = world_mesh.mesh_dim_names or ()
    if pp_axis_name not in axes:
        raise ValueError(f"world_mesh has no axis {pp_axis_name!r}; it has {axes}")
    if world_mesh.size(axes.index(pp_axis_name)) < 2:
        raise ValueError(f"the {pp_axis_name!r} axis has one rank: there is nothing to pipeline")
    data_axes = (*dp_axis_names, *((cp_axis_name,) if cp_axis_name is not None else ()))
    averaged = tuple(name for name in data_axes if axis_of(world_mesh, name).size() > 1)
    peers = tuple(name for name in axes if name != pp_axis_name and world_mesh[name].size() > 1)
    device = _device_of(world_mesh) if device is None else torch.device(device)
    call = None if parallelize_fn is None else _call_of(parallelize_fn)
    if pipeline_parallel_schedule_csv:
        stages, parts = split_model_for_csv(
            model,
            world_mesh,
            pp_axis_name,
            pipeline_parallel_schedule_csv,
            device,
            module_fqns_per_model_part,
            patch_inner_model,
            patch_causal_lm_model,
            balance,
            example_inputs,
        )
    else:
        stages, parts = split_model_into_stages(
            model,
            world_mesh,
            pp_axis_name,
            pipeline_parallel_schedule,
            device,
            module_fqns_per_model_part,
            layers_per_stage,
            patch_inner_model,
            patch_causal_lm_model,
            round_to_pp_multiple,
            balance,
            example_inputs,
        )
    if call is not None:
        axis_names = {
            "dp_axis_names": dp_axis_names,
            "cp_axis_name": cp_axis_name,
            "tp_axis_name": tp_axis_name,
            "ep_axis_name": ep_axis_name,
            "ep_shard_axis_names": ep_shard_axis_names,
        }
        for index, part in enumerate(parts):
            replaced = call(part, world_mesh, moe_mesh, axis_names)
            if replaced is not None:
                parts[index] = stages[index].submod = replaced
            if isinstance(stages[index], DecoderStage):
                stages[index].has_collectives = bool(peers)
    schedule = build_pipeline_schedule(
        pipeline_parallel_schedule_csv,
        pipeline_parallel_schedule,
        microbatch_size,
        local_batch_size,
        stages,
        loss_fn,
        scale_grads,
        reduce_grads,
    )
    if seq_len is not None:
        precompute_stage_shapes(stages, getattr(model, "config", None), microbatch_size, seq_len)
    schedule.batch_dims = batch_dims or {}
    schedule.mesh, schedule.averaged_axes, schedule.peer_axes = world_mesh, averaged, peers
    return schedule, parts, any(s.is_first for s in stages), any(s.is_last for s in stages), stages


def set_sequence_shards(part: nn.Module, ranks: int, whole: Iterable[str] | None = None) -> None:
    """Say over how many ranks the sequence is sharded between the layers of a part: `part.sequence_shards`.

    Args:
        part: a part of the pipeline.
        ranks: over which each layer's result is sharded.
        whole: full names of layers whose results are gathered all the same, such as the last of an encoder without a
            final norm: `part.whole_outputs`. None leaves what is there, as `am_tp_plans.apply_plan` sets it.

    Raises:
        ValueError: `ranks` is not positive.
    """
    if ranks < 1:
        raise ValueError(f"ranks must be positive, got {ranks}")
    if whole is not None:
        part.__dict__["whole_outputs"] = tuple(whole)
    part.__dict__["sequence_shards"] = ranks


def _device_of(mesh: DeviceMesh) -> torch.device:
    if mesh.device_type == "cpu":
        return torch.device("cpu")
    return torch.device(mesh.device_type, torch.accelerator.current_device_index())


def _call_of(parallelize_fn: Callable) -> Callable[[nn.Module, DeviceMesh, DeviceMesh | None, dict], Any]:
    """How a function takes the meshes: by position, as most name them otherwise than the protocol, or by name."""
    names = dict.fromkeys(("dp_axis_names", "cp_axis_name", "tp_axis_name", "ep_axis_name", "ep_shard_axis_names"))
    signature = inspect.signature(parallelize_fn)
    try:
        signature.bind(None, None, None, **names)
        return lambda part, world, moe, axes: parallelize_fn(part, world, moe, **axes)
    except TypeError:
        pass
    try:
        signature.bind(None, world_mesh=None, moe_mesh=None, **names)
        return lambda part, world, moe, axes: parallelize_fn(part, world_mesh=world, moe_mesh=moe, **axes)
    except TypeError as error:
        raise TypeError(
            f"parallelize_fn is called as f(model, world_mesh, moe_mesh, *, {', '.join(names)}), but takes {signature} "
            f"({error}); add **axes for the names that it does not need"
        ) from None
