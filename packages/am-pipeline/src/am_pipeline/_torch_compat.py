"""The one place that touches private names of torch: of its pipelining and of FSDP2; `_torch_compat_fakes.py` those
of tensors without memory.

`tests/test_torch_compat.py` fails when torch changes them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.distributed_c10d import _world
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import (
    PipelineScheduleMulti,
    PipelineScheduleSingle,
    _PipelineSchedule,
    _PipelineScheduleRuntime,
    get_schedule_class,
)
from torch.utils.flop_counter import flop_registry

Schedule = _PipelineSchedule
CsvSchedule = _PipelineScheduleRuntime


class StepHooks:
    """Mixed into a torch schedule: private steps of its `step`, under public names that a subclass fills.

    `follows_hooks` says whether they apply: not for stages whose shapes torch itself finds out.
    """

    follows_hooks = True

    def split_inputs(self, args: tuple, kwargs: dict) -> tuple[list[tuple], list[dict]]:
        raise NotImplementedError

    def split_target(self) -> list | None:
        raise NotImplementedError

    def loss_of(self, output: Any, target: Any, **kwargs: Any) -> torch.Tensor:
        raise NotImplementedError

    def merge_outputs(self, chunks: list) -> Any:
        """What a step returns, of the last stage's outputs; torch's own way unless overridden."""
        return cast(Any, super())._merge_outputs(chunks)

    def _split_inputs(self, args: tuple, kwargs: dict | None = None) -> tuple[list[tuple], list[dict]]:
        if not self.follows_hooks:
            return cast(Any, super())._split_inputs(args, kwargs)
        return self.split_inputs(args, kwargs or {})

    def _step_microbatches(
        self, arg_mbs: Any = None, kwarg_mbs: Any = None, target_mbs: Any = None, *args: Any, **kwargs: Any
    ) -> None:
        if self.follows_hooks:
            target_mbs = self.split_target()
        cast(Any, super())._step_microbatches(arg_mbs, kwarg_mbs, target_mbs, *args, **kwargs)

    def _compute_loss(self, output: Any, target: Any, loss_kwargs: dict | None = None) -> torch.Tensor:
        if not self.follows_hooks:
            more = () if loss_kwargs is None else (loss_kwargs,)
            return cast(Any, super())._compute_loss(output, target, *more)
        return self.loss_of(output, target, **(loss_kwargs or {}))

    def _merge_outputs(self, output_chunks: list) -> Any:
        return self.merge_outputs(output_chunks)

    # torch sets its stages up again when training follows evaluation or the other way round: a chain of blocking
    # messages, and `grad = None` in FSDP modules. Stages with static shapes need neither, so that the set-up always
    # looks as before training.
    def _initialize_stage(self, *args: Any, **kwargs: Any) -> None:
        with _as_before_training(self, self.follows_hooks):
            cast(Any, super())._initialize_stage(*args, **kwargs)

    def _initialize_stages(self, *args: Any, **kwargs: Any) -> None:
        with _as_before_training(self, self.follows_hooks):
            cast(Any, super())._initialize_stages(*args, **kwargs)

    def _warmup_p2p(self, stages: list, *args: Any, **kwargs: Any) -> None:
        if any(getattr(stage, "_inference_mode", None) is None for stage in stages):
            cast(Any, super())._warmup_p2p(stages, *args, **kwargs)


@contextmanager
def _as_before_training(schedule: Any, applies: bool) -> Iterator[None]:
    """With the flags of training, those of the stages too, which torch before 2.13 asks, and outside inference mode."""
    flagged = [schedule, *stages_of(schedule)] if applies else []
    before = [each._has_backward for each in flagged]
    for each in flagged:
        each._has_backward = schedule._loss_fn is not None
    inferring = torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext()
    try:
        with inferring:
            yield
    finally:
        for each, value in zip(flagged, before, strict=True):
            each._has_backward = value


def has_loss(schedule: _PipelineSchedule) -> bool:
    return schedule._loss_fn is not None


def call_loss(schedule: _PipelineSchedule, output: Any, target: Any, **kwargs: Any) -> torch.Tensor:
    return cast(Any, schedule)._loss_fn(output, target, **kwargs)


def forget_step(schedule: _PipelineSchedule, stages: list[PipelineStage]) -> None:
    """Drop what an interrupted step left in a schedule and its stages: the next one starts as the first did."""
    schedule._internal_losses.clear()
    for name in ("fwd_recv_ops", "bwd_recv_ops", "unshard_ops", "unsharded_stages", "backward_counter"):
        if hasattr(schedule, name):
            getattr(schedule, name).clear()
    for stage in stages:
        stage.clear_runtime_states()
        for state in (stage.bwd_cache, stage.backward_state, stage.dw_runner):
            state.clear()
        for module in stage.submod.modules():
            if isinstance(module, FSDPModule):
                _drop_unreduced_gradients(module)
        settle_fsdp(stage.submod)
    # Buffers may still be the target of a message.
    forget_shapes(schedule)


def settle_fsdp(part: nn.Module) -> None:
    """Give every FSDP module of a part its shards back, as after a backward. No collective, no host sync.

    After a forward without a backward the parameters are other objects than those that the optimizer holds.
    """
    if isinstance(part, FSDPModule):
        # torch before 2.13 has no `reset_iter_state`; it needs what the first forward sets up.
        reset = getattr(part, "reset_iter_state", None)
        if reset is not None and part._get_fsdp_state()._is_root:
            reset()
            return
        for module in part.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        return
    for child in part.children():
        settle_fsdp(child)


def watch_gathers(part: nn.Module, note: Callable[[int], None]) -> list[FSDPModule]:
    """Call `note(unit)` whenever a unit of FSDP2 issues an all-gather; returns the units."""
    units: dict[int, FSDPModule] = {}
    for module in part.modules():
        if isinstance(module, FSDPModule):
            units.setdefault(id(module._get_fsdp_state()), module)
    for number, unit in enumerate(units.values()):
        for group in _groups_of(unit):
            group._all_gather_comm = _Watched(group._all_gather_comm, number, note)
    return list(units.values())


class _Watched:
    """An all-gather of FSDP2 that tells of being issued."""

    def __init__(self, comm: Any, unit: int, note: Callable[[int], None]) -> None:
        self.comm, self.unit, self.note = comm, unit, note

    def allocate(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.comm.allocate(*args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.note(self.unit)
        return self.comm(*args, **kwargs)


def gather_once(unit: FSDPModule) -> None:
    """Issue the all-gather of a unit, whatever its state, and let go of the weights."""
    unit.reshard()
    unit.unshard()
    unit.reshard()


def can_recover(part: nn.Module) -> bool:
    """Whether FSDP2 can begin anew after an error in the middle of a forward or backward: since torch 2.13."""
    return all(hasattr(module, "reset_iter_state") for module in part.modules() if isinstance(module, FSDPModule))


def collectives_issued() -> int:
    """How many collectives and messages this process has issued in all its groups."""
    backends = {}
    for group in _world.pg_map:
        for device in group._device_types:
            backend = group._get_backend(device)
            backends[id(backend)] = backend._get_sequence_number_for_group()
    return sum(backends.values())


def _groups_of(module: FSDPModule) -> list[Any]:
    state: Any = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:  # torch before 2.13
        groups = [state._fsdp_param_group] if state._fsdp_param_group is not None else []
    return groups


def _drop_unreduced_gradients(module: FSDPModule) -> None:
    for group in _groups_of(module):
        for parameter in group.fsdp_params:
            parameter.unsharded_accumulated_grad = None
            if hasattr(parameter, "_unsharded_param"):
                parameter._unsharded_param.grad = None


def data_ranks(module: FSDPModule) -> int:
    """Over how many ranks an FSDP module runs its collectives."""
    return max((group.mesh_info.mesh.size() for group in _groups_of(module)), default=1)


def load_csv(schedule: _PipelineScheduleRuntime, path: str) -> None:
    """Give a `CsvSchedule` its actions: one row per rank, cells such as `0F1` (stage 0, forward, microbatch 1)."""
    schedule._load_csv(path)


def order_of(name: str, ranks: int, stages_per_rank: int, microbatches: int) -> list[list[str]]:
    """The cells of a multi-stage schedule, one row per rank, from torch's class over stages that do nothing."""
    kind = get_schedule_class(name)
    stages = [_Nothing(index * ranks, ranks * stages_per_rank, ranks) for index in range(stages_per_rank)]
    build: Any = kind
    schedule = build(stages, n_microbatches=microbatches, loss_fn=lambda *_: None)
    return [["" if a is None else str(a) for a in schedule.pipeline_order[rank]] for rank in range(ranks)]


class _Nothing:
    """What a schedule reads of a stage when it makes its plan."""

    has_backward = False
    submod = nn.Module()
    device = torch.device("cpu")

    def __init__(self, stage_index: int, num_stages: int, group_size: int) -> None:
        self.stage_index, self.num_stages, self.group_size, self.group_rank = stage_index, num_stages, group_size, 0
        self.is_first, self.is_last = stage_index == 0, stage_index == num_stages - 1
        self.stage_index_to_group_rank: dict[int, int] = {}


def is_view(tensor: torch.Tensor) -> bool:
    """Whether autograd knows the tensor as a view of another."""
    return tensor._is_view()


def is_compiled(module: nn.Module) -> bool:
    """Whether a module was compiled, in place or by wrapping."""
    return module._compiled_call_impl is not None or type(module).__name__ == "OptimizedModule"


def after_each_call(module: nn.Module, do: Callable[[Any], None]) -> None:
    """Call `do(output)` after every call of a module; outside of the graph where the module has been compiled."""
    if is_compiled(module) and module._compiled_call_impl is not None:
        compiled = module._compiled_call_impl

        def call(*args: Any, **kwargs: Any) -> Any:
            output = compiled(*args, **kwargs)
            do(output)
            return output

        module._compiled_call_impl = call
    else:
        module.register_forward_hook(lambda _module, _args, output: do(output))


def backward_hooks_of(module: nn.Module) -> bool:
    """Whether somebody registered hooks for the backward of a module."""
    return bool(module._backward_hooks or module._backward_pre_hooks)


def hooks_of(module: nn.Module) -> bool:
    """Whether somebody registered hooks for the forward of a module."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def forward_hooks_of(module: nn.Module) -> tuple[Callable, ...]:
    """What runs after the forward of a module."""
    return tuple(module._forward_hooks.values())


def flops_of(function: Any, args: tuple, kwargs: dict[str, Any], result: Any) -> int:
    """The FLOPs of an operator that multiplies matrices or attends; 0 of others."""
    aten, packet = torch.ops.aten, function.overloadpacket
    if packet is aten._scaled_dot_product_flash_attention_for_cpu:
        packet = aten._scaled_dot_product_flash_attention
    formula = flop_registry.get(packet)
    return 0 if formula is None else int(formula(*args, **kwargs, out_val=result))


def looks_at_values(function: Any) -> bool:
    """Whether an operator's result, or the shape of it, is a matter of numbers in its inputs alone."""
    tags = function.tags
    return torch.Tag.dynamic_output_shape in tags or torch.Tag.data_dependent_output in tags


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
    kept: dict[str, Any] = {name: getattr(stage, name) for name in ("has_backward", "stage_index_to_group_rank")}
    # Neighbours found once that their shapes are static; asking again is a chain of blocking messages.
    kept["_inference_mode"] = getattr(stage, "_inference_mode", None)
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
    # What torch before 2.13 does and later ones do not: it compares what stages return with their metadata, though the
    # last one sends nothing and the stride of a dim of one means nothing; and it greets each neighbour by a message,
    # which gloo refuses where a V places both stages on one rank.
    vars(stage)["_validate_fwd_outputs"] = lambda outputs: None
    vars(stage)["_get_init_p2p_neighbors_ops"] = lambda: _to_others(PipelineStage._get_init_p2p_neighbors_ops(stage))


def _to_others(messages: list[dist.P2POp]) -> list[dist.P2POp]:
    return [message for message in messages if message.peer != dist.get_rank()]


def compute_dtype(part: nn.Module, layers: Iterable[str] = ("",)) -> torch.dtype:
    """The dtype of the hidden state in a part: FSDP's mixed-precision dtype if it has one, else most parameters'.

    Not the first one's: models keep some modules in float32, and neighbouring stages must agree.

    Args:
        layers: full names of what counts: a head or an embedding of another dtype does not change the layers'.
    """
    if isinstance(part, FSDPModule):
        policy = part._get_fsdp_state()._mp_policy
        if policy.param_dtype is not None:
            return policy.param_dtype
    return _dtype_of_most(*map(part.get_submodule, layers)) or torch.get_default_dtype()


def element_size(model: nn.Module) -> int:
    """Bytes of one of most of a model's floating-point parameters."""
    return (_dtype_of_most(model) or torch.float32).itemsize


def _dtype_of_most(*modules: nn.Module) -> torch.dtype | None:
    elements: Counter[torch.dtype] = Counter()
    for parameter in (parameter for module in modules for parameter in module.parameters()):
        if parameter.is_floating_point():
            elements[parameter.dtype] += parameter.numel()
    return elements.most_common(1)[0][0] if elements else None


def written_arguments(function: Any, args: tuple, kwargs: dict[str, Any]) -> list[Any]:
    """The arguments that an operator writes into."""
    written = []
    for index, argument in enumerate(function._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[index] if index < len(args) else kwargs.get(argument.name)
            written += value if isinstance(value, (list, tuple)) else [] if value is None else [value]
    return written


def arguments_by_name(function: Any, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """What an operator was called with, without its defaults."""
    return dict(zip((argument.name for argument in function._schema.arguments), args, strict=False)) | kwargs


def is_random(function: Any) -> bool:
    """Whether an operator draws from a generator."""
    return torch.Tag.nondeterministic_seeded in function.tags


def operator_name(function: Any) -> str:
    return str(function)
