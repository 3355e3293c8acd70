"""The one place that touches private names of `torch.distributed.pipelining` and FSDP2.

`tests/test_torch_compat.py` fails when torch changes them. Checked with torch 2.13.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import (
    PipelineScheduleMulti,
    PipelineScheduleSingle,
    _PipelineSchedule,
    _PipelineScheduleRuntime,
)

Schedule = _PipelineSchedule
CsvSchedule = _PipelineScheduleRuntime


class SplitsInputs:
    """Mixed into a torch schedule: `split_inputs(args, kwargs)` replaces torch's, which splits along dim 0 only."""

    def split_inputs(self, args: tuple, kwargs: dict) -> tuple[list[tuple], list[dict]]:
        raise NotImplementedError

    def _split_inputs(self, args: tuple, kwargs: dict | None = None) -> tuple[list[tuple], list[dict]]:
        return self.split_inputs(args, kwargs or {})


def load_csv(schedule: _PipelineScheduleRuntime, path: str) -> None:
    """Give a `CsvSchedule` its actions: one row per rank, cells such as `0F1` (stage 0, forward, microbatch 1)."""
    schedule._load_csv(path)


def n_microbatches(schedule: _PipelineSchedule) -> int:
    return schedule._n_microbatches


def stages_of(schedule: _PipelineSchedule) -> list[PipelineStage]:
    """The stages a schedule runs on this rank."""
    if isinstance(schedule, PipelineScheduleSingle):
        return cast(list[PipelineStage], [schedule._stage])
    if isinstance(schedule, PipelineScheduleMulti):
        return cast(list[PipelineStage], list(schedule._stages))
    raise TypeError(f"{type(schedule).__name__} is not a torch pipeline schedule")


def forget_shapes(schedule: _PipelineSchedule) -> None:
    """Make the next `step` set up its buffers again from the stages' metadata."""
    flags = [n for n in vars(schedule) if n.startswith("_stage") and n.endswith("_initialized")]
    if not flags:
        raise RuntimeError(f"{type(schedule).__name__} of torch {torch.__version__} has no initialisation flags")
    for name in flags:
        setattr(schedule, name, False)


def set_shapes(stage: PipelineStage, inputs: tuple[torch.Tensor, ...], outputs: tuple[torch.Tensor, ...]) -> None:
    """Give a stage new static metadata (meta tensors), keeping what its schedule has told it.

    torch takes them in the constructor only, so the constructor runs again on the same object.
    """
    kept = {"has_backward": stage.has_backward, "stage_index_to_group_rank": stage.stage_index_to_group_rank}
    PipelineStage.__init__(
        stage,
        stage.submod,
        stage.stage_index,
        stage.num_stages,
        stage.device,
        input_args=inputs,
        output_args=outputs,
        group=stage.group,
        dw_builder=stage.dw_builder,
    )
    for name, value in kept.items():
        setattr(stage, name, value)


def compute_dtype(part: nn.Module) -> torch.dtype:
    """The dtype of the hidden state in a part: FSDP's mixed-precision dtype if it has one, else the parameters'."""
    if isinstance(part, FSDPModule):
        policy = part._get_fsdp_state()._mp_policy
        if policy.param_dtype is not None:
            return policy.param_dtype
    for parameter in part.parameters():
        if parameter.is_floating_point():
            return parameter.dtype
    return torch.get_default_dtype()
