"""Cut a model and wrap this rank's parts as pipeline stages."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import (
    PipelineScheduleSingle,
    ScheduleDualPipeV,
    ScheduleZBVZeroBubble,
)
from torch.nn.parallel import DistributedDataParallel

from am_pipeline._torch_compat import Schedule
from am_pipeline.cut.plan import CutPlan, build_part, plan_cut, plan_stages
from am_pipeline.placement import RoundTo, calculate_virtual_stages, stage_ids_this_rank
from am_pipeline.schedule.balance import Balance, Costs
from am_pipeline.schedule.build import schedule_class
from am_pipeline.schedule.order import ScheduleName, read_order
from am_pipeline.step.stage import DecoderStage


def split_model_into_stages(
    model: nn.Module,
    pp_mesh: DeviceMesh,
    pp_axis_name: str,
    pp_schedule: ScheduleName,
    device: torch.device,
    module_names_per_stage: list[list[str]] | None = None,
    layers_per_stage: int | None = None,
    patch_inner_model: bool = True,
    patch_causal_lm_model: bool = True,
    round_to_pp_multiple: RoundTo | None = None,
    balance: Balance | Costs = "flops",
    example_inputs: Mapping[str, Any] | None = None,
) -> tuple[list[PipelineStage], list[nn.Module]]:
    """This rank's stages of a model and the parts they run, in the order of `stage_ids_this_rank`.

    A part is the model with the same class and the same names, whose absent modules are stand-ins without
    parameters. Its parameters are the model's own, not copies; drop your reference to the model to free the rest.
    A parameter that two stages of one rank share is copied once.

    Args:
        model: a transformers decoder, real or on the meta device (then the parts are too).
        pp_mesh: a mesh with the pipeline axis.
        pp_axis_name: its name.
        pp_schedule: name of the schedule that will run the stages; it decides how many a rank holds, and which.
        device: where the stages run; real parts are moved there.
        module_names_per_stage: full module names for each stage, by hand.
        layers_per_stage: the most layers of a stage, instead of one or two stages per rank.
        patch_inner_model, patch_causal_lm_model: see `build_part`.
        round_to_pp_multiple: see `calculate_virtual_stages`.
        balance, example_inputs: see `plan_cut`; with `layers_per_stage`, stages hold equally many layers.

    Collectives: none.

    Raises:
        ValueError: a model that DistributedDataParallel or FSDP2 has wrapped already, or from the plan or the
            arithmetic of stages, on every rank alike.
    """
    _refuse_wrapped(model)
    kind = schedule_class(None, pp_schedule)
    placement = "v" if issubclass(kind, (ScheduleZBVZeroBubble, ScheduleDualPipeV)) else "loop"
    _check_axis(pp_mesh, pp_axis_name)
    pp_size = pp_mesh.size(pp_mesh.mesh_dim_names.index(pp_axis_name))
    single = issubclass(kind, PipelineScheduleSingle)
    if module_names_per_stage is not None:
        _check_count(len(module_names_per_stage), kind, pp_size)

    def count(layers: int) -> int:
        return calculate_virtual_stages(layers, layers_per_stage, pp_size, single, round_to_pp_multiple)[0]

    by = balance if layers_per_stage is None else "layers"
    plan = plan_stages(model, count, module_names_per_stage, by, example_inputs)
    rank = pp_mesh.get_local_rank(pp_axis_name)
    return _build(
        model,
        plan,
        stage_ids_this_rank(rank, pp_size, len(plan.stages), placement),
        pp_mesh.get_group(pp_axis_name),
        device,
        patch_inner_model,
        patch_causal_lm_model,
    )


def split_model_for_csv(
    model: nn.Module,
    pp_mesh: DeviceMesh,
    pp_axis_name: str,
    csv: str,
    device: torch.device,
    module_names_per_stage: list[list[str]] | None = None,
    patch_inner_model: bool = True,
    patch_causal_lm_model: bool = True,
    balance: Balance | Costs = "flops",
    example_inputs: Mapping[str, Any] | None = None,
) -> tuple[list[PipelineStage], list[nn.Module]]:
    """Like `split_model_into_stages`, for a schedule file: its rows say which rank holds which stages."""
    _refuse_wrapped(model)
    _check_axis(pp_mesh, pp_axis_name)
    pp_size = pp_mesh.size(pp_mesh.mesh_dim_names.index(pp_axis_name))
    held = [list(dict.fromkeys(action.stage for action in actions)) for actions in read_order(csv, pp_size)]
    total = sum(map(len, held))
    if module_names_per_stage is not None and len(module_names_per_stage) != total:
        raise ValueError(f"module_names_per_stage has {len(module_names_per_stage)} stages, {csv} has {total}")
    plan = plan_cut(model, total, module_names_per_stage, balance, example_inputs)
    return _build(
        model,
        plan,
        tuple(held[pp_mesh.get_local_rank(pp_axis_name)]),
        pp_mesh.get_group(pp_axis_name),
        device,
        patch_inner_model,
        patch_causal_lm_model,
    )


def _refuse_wrapped(model: nn.Module) -> None:
    for name, module in model.named_modules():
        where = f"its module {name}" if name else "it"
        if isinstance(module, DistributedDataParallel):
            raise ValueError(
                f"{type(model).__name__} cannot be cut: {where} is wrapped in DistributedDataParallel. Give the plain "
                "model, and a parallelize_fn that applies FSDP2 (torch.distributed.fsdp.fully_shard) to each part"
            )
        if isinstance(module, FSDPModule):
            raise ValueError(
                f"{type(model).__name__} cannot be cut: {where} is sharded by FSDP2 already. Give the plain model, and "
                "a parallelize_fn that applies fully_shard to each part"
            )


def _check_axis(mesh: DeviceMesh, axis: str) -> None:
    if axis not in (mesh.mesh_dim_names or ()):
        raise ValueError(f"the mesh has no axis {axis!r}; it has {mesh.mesh_dim_names}")


def _check_count(stages: int, kind: type[Schedule], pp_size: int) -> None:
    single = issubclass(kind, PipelineScheduleSingle)
    per_rank, rest = divmod(stages, pp_size)
    if rest or (single and per_rank != 1) or (not single and per_rank < 2):
        allowed = f"exactly {pp_size}" if single else f"a multiple of {pp_size} that is at least {2 * pp_size}"
        raise ValueError(f"module_names_per_stage has {stages} stages; {kind.__name__} needs {allowed}")


def _build(
    model: nn.Module,
    plan: CutPlan,
    stage_ids: tuple[int, ...],
    group: torch.distributed.ProcessGroup,
    device: torch.device,
    patch_inner_model: bool,
    patch_causal_lm_model: bool,
) -> tuple[list[PipelineStage], list[nn.Module]]:
    stages, parts = [], []
    for index in stage_ids:
        part, boundary = build_part(
            model,
            plan,
            index,
            patch_inner_model=patch_inner_model,
            patch_causal_lm_model=patch_causal_lm_model,
        )
        _copy_what_earlier_parts_hold(part, parts)
        if not any(t.is_meta for t in (*part.parameters(), *part.buffers())):
            part.to(device)
        parts.append(part)
        stages.append(DecoderStage(part, plan, boundary, index, torch.device(device), group))
    return stages, parts


def _copy_what_earlier_parts_hold(part: nn.Module, earlier: list[nn.Module]) -> None:
    """Each stage updates its own copy of a shared parameter, also when one rank holds both stages."""
    taken = {id(p) for other in earlier for p in other.parameters()}
    copies: dict[int, nn.Parameter] = {}
    for module in part.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in taken:
                module.register_parameter(name, copies.setdefault(id(parameter), copy.deepcopy(parameter)))
