"""Build a torch pipeline schedule whose `step` is exact, whatever the sequence length and whatever is tied."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
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

from am_pipeline._torch_compat import (
    CsvSchedule,
    Schedule,
    SplitsInputs,
    is_compiled,
    load_csv,
    n_microbatches,
    stages_of,
)
from am_pipeline.inputs import share_from_first, split_inputs
from am_pipeline.order import read_order
from am_pipeline.shapes import hidden_dtype, reset_pp_stage_shapes
from am_pipeline.shared import check_shared_layouts, sum_shared_gradients
from am_pipeline.stage import DecoderStage

logger = logging.getLogger(__name__)


def build_pipeline_schedule(
    pipeline_parallel_schedule_csv: str | None,
    pipeline_parallel_schedule: str | None,
    microbatch_size: int,
    local_batch_size: int,
    stages: list[PipelineStage],
    loss_fn: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None,
    scale_grads: bool = False,
    reduce_grads: str = "step",
) -> Schedule:
    """A schedule over this rank's stages, of torch's own class and a little more.

    `schedule.step(ids, target=labels, losses=losses)` and `schedule.eval(...)` are torch's: the first stage's rank
    gives the ids `(B, S)`, the last stage's the target. When `step` returns, every gradient is what one process would
    have, tied parameters included.

    Args:
        pipeline_parallel_schedule_csv: path of a file with one row of actions per rank; it goes before the name.
        pipeline_parallel_schedule: `GPipe`, `1F1B`, `Interleaved1F1B`, `LoopedBFS`, `InterleavedZeroBubble`,
            `ZBVZeroBubble` or `DualPipeV`.
        microbatch_size: sequences per microbatch.
        local_batch_size: sequences per step on this pipeline, a multiple of `microbatch_size`.
        stages: this rank's stages, in the order of `split_model_into_stages`.
        loss_fn: takes the last stage's output and the target of one microbatch, returns a scalar; None to evaluate
            only.
        scale_grads: divide gradients by the number of microbatches after the step: True for a `loss_fn` that is a
            mean over its microbatch. False sums what the microbatches give.
        reduce_grads: when FSDP2 modules in the stages reduce their gradients: `"step"` for once, after the last
            microbatch, or `"microbatch"` for after each, which keeps what accumulates sharded.

    With a schedule that splits the backward (the zero-bubble ones, DualPipeV, files), FSDP modules in the stages are
    set not to reshard after forward: torch finds no weight gradients otherwise.

    Collectives (pipeline axis): one all-reduce of four int64 per step, which tells every rank the batch's shape and
    whether its input is there; what `sum_shared_gradients` says; and torch's own sends and receives.

    Raises:
        ValueError: an unknown schedule, a batch that does not divide, stages that do not fit the schedule, a file
            that is not complete, in order and free of deadlock, compiled stages where torch cannot run them; in `step`,
            on every rank: no input, no target, a batch that is not `local_batch_size` sequences.
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
        stage.reduces_every_microbatch = reduce_grads == "microbatch"
    build: Any = _exact(kind)
    schedule = build(
        stages if issubclass(kind, PipelineScheduleMulti) else stages[0],
        n_microbatches=count,
        loss_fn=loss_fn,
        scale_grads=scale_grads,
    )
    schedule.local_batch_size = local_batch_size
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


SCHEDULES = (
    "GPipe",
    "1F1B",
    "Interleaved1F1B",
    "LoopedBFS",
    "InterleavedZeroBubble",
    "ZBVZeroBubble",
    "DualPipeV",
)


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
_HIDDEN = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2)
_SPLIT_BACKWARD = (ScheduleInterleavedZeroBubble, ScheduleZBVZeroBubble, ScheduleDualPipeV)


def _keep_unsharded_until_backward(stages: list[PipelineStage]) -> None:
    """A weight pass finds its parameters in the graph of the forward, so FSDP must not have replaced them by shards."""
    for stage in stages:
        for module in stage.submod.modules():
            if isinstance(module, FSDPModule):
                module.set_reshard_after_forward(False, recurse=False)


def _refuse_compiled(stages: list[PipelineStage], name: str) -> None:
    for stage in stages:
        compiled = [module or "the part" for module, m in stage.submod.named_modules() if is_compiled(m)]
        if compiled:
            raise ValueError(
                f"{name} computes gradients of inputs and of weights apart, which torch cannot do through compiled "
                f"modules ({', '.join(compiled[:3])} of stage {stage.stage_index}); use GPipe, 1F1B, Interleaved1F1B "
                "or LoopedBFS, or do not compile"
            )


class _Exact(SplitsInputs):
    """Mixed into a torch schedule class: agrees on the batch before a step, sums shared gradients after it.

    Attributes:
        target_tokens: labels of the last step's target that are not `ignore_index`, known on every rank of the
            pipeline; what a loss that sums over tokens is divided by.
    """

    local_batch_size: int
    ignore_index: int = -100
    target_tokens: int = 0
    _seq_len: int | None = None
    _checked: bool = False
    _evaluating: bool = False

    def step(self, *args: Any, target: Any = None, **kwargs: Any) -> Any:
        stages = stages_of(self)
        if isinstance(stages[0], DecoderStage):
            own = {name: kwargs.pop(name) for name in ("losses", "return_outputs", "loss_kwargs") if name in kwargs}
            kwargs = self._agree(stages, args, kwargs, target) | own
        result = super().step(*args, target=target, **kwargs)
        if not self._evaluating:
            sum_shared_gradients(stages)
        return result

    def eval(self, *args: Any, **kwargs: Any) -> Any:
        self._evaluating = True
        try:
            return super().eval(*args, **kwargs)
        finally:
            self._evaluating = False

    def split_inputs(self, args: tuple, kwargs: dict[str, Any]) -> tuple[list[tuple], list[dict[str, Any]]]:
        return split_inputs(args, kwargs, n_microbatches(self), self.local_batch_size)

    def _agree(self, stages: list[DecoderStage], args: tuple, kwargs: dict[str, Any], target: Any) -> dict[str, Any]:
        """Every rank learns the batch's shape, or what is wrong with the call, before any send; and gets its inputs."""
        device, group = stages[0].device, stages[0].group
        here = _Call()
        for stage in stages:
            if stage.is_first:
                if args and isinstance(args[0], torch.Tensor) and args[0].dim() >= 2:
                    here.batch, here.seq_len = args[0].shape[:2]
                else:
                    here.no_input = 1
                here.shares = int(bool(kwargs))
            if stage.is_last:
                here.no_target = int(target is None and not self._evaluating)
                here.tokens = _count_tokens(target, self.ignore_index)
                here.rows = target.shape[0] if isinstance(target, torch.Tensor) and target.dim() else 0
        if not self._checked:
            places = [_HIDDEN.index(hidden_dtype(stage)) for stage in stages]
            here.last_dtype, here.first_dtype = max(places), -min(places)
        agreed = torch.tensor(list(vars(here).values()), dtype=torch.int64, device=device)
        dist.all_reduce(agreed, dist.ReduceOp.MAX, group=group)
        call = _Call(*agreed.tolist())
        if call.no_input:
            raise ValueError("the rank of the first stage must call step(ids, ...) with ids of shape (B, S)")
        if call.no_target:
            raise ValueError("the rank of the last stage must call step(..., target=labels)")
        if call.batch != self.local_batch_size:
            raise ValueError(
                f"the batch has {call.batch} sequences, but the schedule was built for "
                f"local_batch_size={self.local_batch_size}"
            )
        if call.rows not in (0, call.batch):
            raise ValueError(f"the target has {call.rows} rows, but the batch has {call.batch} sequences")
        if call.last_dtype != -call.first_dtype:
            one, other = _HIDDEN[call.last_dtype], _HIDDEN[-call.first_dtype]
            raise ValueError(
                f"some stages have layers in {one} and others in {other}, but the hidden state has one dtype throughout"
            )
        self.target_tokens = call.tokens
        if not self._checked:
            check_shared_layouts(stages)
            self._checked = True
        if call.seq_len != self._seq_len:
            reset_pp_stage_shapes(self, stages, None, call.batch // n_microbatches(self), call.seq_len)
            self._seq_len = call.seq_len
        # Keyword inputs (images, positions) may make more depend on the ids than text alone does.
        if call.shares or stages[0].plan.needs_first_input:
            ids = {"input_ids": args[0]} if any(stage.is_first for stage in stages) else {}
            first = stages[0].stage_index_to_group_rank[0]
            kwargs = share_from_first(kwargs | ids, first, group, device)
        return kwargs


@dataclass
class _Call:
    """What the ranks tell each other about a step; the largest value wins."""

    batch: int = 0
    seq_len: int = 0
    no_input: int = 0
    no_target: int = 0
    tokens: int = 0
    rows: int = 0
    shares: int = 0
    last_dtype: int = 0  # of the stages' hidden states, by place in `_HIDDEN`
    first_dtype: int = 0  # the same, negative


def _count_tokens(target: Any, ignore_index: int) -> int:
    return int((target != ignore_index).sum()) if isinstance(target, torch.Tensor) else 0


@cache
def _exact(kind: type[Schedule]) -> type[Schedule]:
    return type(kind.__name__, (_Exact, kind), {"__module__": __name__})
