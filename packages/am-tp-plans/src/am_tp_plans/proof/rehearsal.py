"""Run a model's own forward on one rank's share, without devices, and see what a plan lacks or would get wrong.

The modules that a plan shards are replaced, in two weightless copies of the model, by stand-ins: in one they return
what the whole model has, in the other what a rank has, its share of the features after a colwise layer, its share of
the tokens where the sequence is sharded, everything after a sum. The forward in between is the model's own. The whole
runs first, and a rule for every operator (`shares.py`) says where its share would be; the rank's run must then be the
same, operator by operator (`watch.py`). A whole parameter that meets a rank's share gets only a part of its gradient on
each rank; a share that reaches something that wants it all, or the end of the model, is a gap in the plan.
"""

from __future__ import annotations

import copy
import inspect
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, SequenceParallel

from am_tp_plans.adapters import with_their_copies
from am_tp_plans.proof.check import random_settings
from am_tp_plans.proof.read_outputs import refuse_parts
from am_tp_plans.proof.shares import WrongError
from am_tp_plans.proof.stand_ins import stand_in
from am_tp_plans.proof.watch import Collective, ReadDirectlyError, Step, Watch, tensors
from am_tp_plans.styles.basic import each, shards_sequence
from am_tp_plans.styles.experts import ExpertsOverTensorAxis
from am_tp_plans.styles.fused import Conv1DRowwiseParallel, PackedColwiseParallel
from am_tp_plans.styles.heads import share_key_value_heads
from am_tp_plans.styles.local import MlaKvAProjection, ReplicatedWithGradAllReduce
from am_tp_plans.styles.random_numbers import Draws, ends_of_shares

_TOKENS = 8


class NoFitError(ValueError):
    """A plan does not fit; `module` is the name of the one in which its run ended, "" for none."""

    def __init__(self, message: str, module: str) -> None:
        super().__init__(message)
        self.module = module


@dataclass(frozen=True)
class Findings:
    """What a rehearsal saw.

    Attributes:
        partial: parameters that no style covers and that meet a rank's share, so that each rank has a part of their
            gradients.
        modified: modules with a style whose output the model modifies in place.
        ran: modules with a style that ran at all, or a copy of which ran that peft chose.
        random: modules that draw random numbers for a rank's share.
        traffic: the collectives of a training step with two sequences of `tokens` tokens.
        tokens: the length of a sequence in the rehearsal.
    """

    partial: frozenset[str]
    modified: frozenset[str]
    ran: frozenset[str]
    random: tuple[str, ...]
    traffic: tuple[Collective, ...]
    tokens: int


def rehearse(
    model: nn.Module, plan: dict[str, ParallelStyle], ranks: int, example_inputs: dict[str, Any] | None = None
) -> Findings:
    """What a plan lacks to be right. No device, no collective, no real weight.

    Args:
        model: it is not changed.
        plan: concrete, without `*`: from `expand_plan`.
        ranks: size of the axis.
        example_inputs: keyword arguments of the forward; None for ids `(B, S)` alone.

    Raises:
        ValueError: the plan would give wrong results, and where.
        TypeError: `example_inputs` is no dict with names as keys.
    """
    plan = share_key_value_heads(model, plan, ranks)
    inputs = _inputs(model, ranks, example_inputs)
    whole = _run(model, plan, ranks, inputs, None)
    share = _run(model, plan, ranks, inputs, whole.steps)
    covers = {name for name, styles in plan.items() if any(isinstance(style, _COVERS) for style in each(styles))}
    partial = {name for name in share.partial if not any(name.startswith(f"{owner}.") for owner in covers)}
    traffic = tuple(share.traffic)
    ran = with_their_copies(model, share.ran)
    return Findings(frozenset(partial), frozenset(share.modified), ran, tuple(share.random), traffic, inputs.tokens)


def rehearse_training(
    model: nn.Module, plan: dict[str, ParallelStyle], ranks: int, example_inputs: dict[str, Any] | None = None
) -> None:
    """Show that a plan is right in training too, where a model may do more, and draw random numbers.

    Those are to be drawn alike for whole values, and differently for shares.

    Args:
        model, plan, ranks, example_inputs: as for `rehearse`.

    Raises:
        ValueError: it does not, or it cannot be shown in training mode; and where.
    """
    plan = share_key_value_heads(model, plan, ranks)
    inputs = _inputs(model, ranks, example_inputs)
    try:
        with _same_numbers():
            whole = _run(model, plan, ranks, inputs, None, training=True)
        with _same_numbers():
            _run(model, plan, ranks, inputs, whole.steps, training=True)
    except ValueError as why:
        settings = ", ".join(random_settings(model)[:3])
        remedy = f", with {settings}; with those 0 it may be another matter" if settings else ""
        raise ValueError(f"{why}. That is in training mode{remedy}") from why


@contextmanager
def _same_numbers() -> Iterator[None]:
    """Random numbers that are the same in every run and on every rank, so that both skip the same layers."""
    python = random.getstate()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        random.seed(0)
        try:
            yield
        finally:
            random.setstate(python)


@dataclass(frozen=True)
class _Inputs:
    """What the forward is called with, and how many tokens a sequence in it has."""

    args: tuple
    kwargs: dict[str, Any]
    tokens: int


def _inputs(model: nn.Module, ranks: int, example_inputs: dict[str, Any] | None) -> _Inputs:
    settings = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    if example_inputs is None:
        tokens = -(-_TOKENS // ranks) * ranks
        return _Inputs((torch.ones(2, tokens, dtype=torch.int64, device="cpu"),), settings, tokens)
    check_example_inputs(example_inputs)
    given = settings | dict(example_inputs)
    sizes = [tensor.shape[1] for tensor in tensors(given) if tensor.dim() > 1]
    return _Inputs((), given, sizes[0] if sizes else 1)


def check_example_inputs(example_inputs: Any) -> None:
    """
    Raises:
        TypeError: it is no dict of keyword arguments.
    """
    if not isinstance(example_inputs, Mapping) or not all(isinstance(name, str) for name in example_inputs):
        raise TypeError(
            f"example_inputs must be a dict of keyword arguments of the forward, got {type(example_inputs).__name__}"
        )


# Styles that take care of the gradients of the parameters under their module.
_COVERS = (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    PackedColwiseParallel,
    Conv1DRowwiseParallel,
    ExpertsOverTensorAxis,
    MlaKvAProjection,
    ReplicatedWithGradAllReduce,
)


def _run(
    model: nn.Module,
    plan: dict[str, ParallelStyle],
    ranks: int,
    inputs: _Inputs,
    whole: list[Step] | None,
    *,
    training: bool = False,
) -> Watch:
    """The whole model's run, or one rank's if it is given the whole's."""
    # whatever device the caller makes tensors on; a context costs every operator something
    with nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu"):
        return _run_on_the_cpu(model, plan, ranks, inputs, whole, training)


def _run_on_the_cpu(
    model: nn.Module,
    plan: dict[str, ParallelStyle],
    ranks: int,
    inputs: _Inputs,
    whole: list[Step] | None,
    training: bool,
) -> Watch:
    no_fit = f"the plan does not fit {type(model).__name__}"
    twin = _weightless(model).train(training)
    watch = Watch(dict(twin.named_parameters()), ranks, whole)
    if training:
        sequence = any(map(shards_sequence, plan.values()))
        for name, draws in ends_of_shares(twin, plan, shards_sequence=sequence):
            _follow_draws(watch, twin.get_submodule(name), draws)
    for name, module in list(twin.named_modules()):
        _name_where(watch, name, module)
        try:
            stand_in(watch, name, module, plan.get(name), 1 if whole is None else ranks)
        except WrongError as why:
            raise NoFitError(f"{no_fit}: {why}", name) from why
    if whole is not None:
        refuse_parts(twin, plan)
    modules = list(twin.modules())
    try:
        with torch.no_grad(), watch:
            output = twin(*_noted(watch, inputs.args), **_noted(watch, inputs.kwargs))
    except (WrongError, ReadDirectlyError) as why:
        raise NoFitError(f"{no_fit}: {why}", watch.modules[-1] if watch.modules else "") from why
    except Exception as error:  # whatever the model's own code raises on a rank's share
        of = "on one rank's share" if whole is not None else "whole"
        where = f" in {watch.modules[-1]}" if watch.modules and watch.modules[-1] else ""
        raise ValueError(f"{no_fit}: {of} its forward fails{where} with {type(error).__name__}: {error}") from error
    if any(now is not before for now, before in zip(twin.modules(), modules, strict=False)):
        raise ValueError(f"{no_fit}: its forward replaces modules, and what a plan did to them is lost")
    if any(watch.share(tensor) for tensor in tensors(output)):
        raise ValueError(f"{no_fit}: its output would be one rank's share")
    if whole is not None and len(watch.steps) != len(whole):
        raise ValueError(f"{no_fit}: on one rank's share it ends before {whole[len(watch.steps)].name}")
    return watch


def _noted(watch: Watch, value: Any) -> Any:
    """Copies of the inputs that the run knows as such, of the weightless twin's dtype; anything else as it is."""
    if isinstance(value, (tuple, list)):
        return type(value)(_noted(watch, item) for item in value)
    if isinstance(value, dict):
        return {name: _noted(watch, item) for name, item in value.items()}
    if not isinstance(value, torch.Tensor):
        return value
    value = torch.ones(value.shape, dtype=value.dtype) if value.is_meta else value.detach().to("cpu", copy=True)
    return watch.note(value.float() if value.is_floating_point() else value, active=True, alike=frozenset())


def _follow_draws(watch: Watch, module: nn.Module, draws: type[Draws]) -> None:
    """Keep whether a rank draws from its own random state."""

    def enter(_module: nn.Module, _args: Any) -> None:
        watch.draws_own = watch.draws_own if draws.own_inside is None else draws.own_inside

    def leave(_module: nn.Module, _args: Any, _output: Any) -> None:
        watch.draws_own = draws.own_afterwards

    module.register_forward_pre_hook(enter)
    module.register_forward_hook(leave)


def _name_where(watch: Watch, name: str, module: nn.Module) -> None:
    """Keep the names of the modules that run; those of an operator that fails stay for the message."""

    def enter(_module: nn.Module, _args: Any) -> None:
        watch.modules.append(name)

    def leave(_module: nn.Module, _args: Any, _output: Any) -> None:
        watch.modules.pop()

    module.register_forward_pre_hook(enter, prepend=True)
    module.register_forward_hook(leave)


def _weightless(model: nn.Module) -> nn.Module:
    """A copy on the CPU whose parameters share one number each."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(torch.ones(()).expand(parameter.shape), requires_grad=False)
    for buffer in model.buffers():
        memo[id(buffer)] = _values(buffer)
        if buffer.dtype == torch.float64:
            memo[id(buffer)] = memo[id(buffer)].float()
    for module in model.modules():
        if "config" in vars(module):
            memo[id(module.config)] = module.config
        for value in vars(module).values():
            if isinstance(value, torch.Tensor):
                memo.setdefault(id(value), _values(value) if _is_fake(value) else value.detach())
    return copy.deepcopy(model, memo).eval()


def _values(tensor: torch.Tensor) -> torch.Tensor:
    """A copy on the CPU; ones for a tensor without values, on the meta device or fake."""
    if tensor.is_meta or _is_fake(tensor):
        return torch.ones(tensor.shape, dtype=tensor.dtype)
    return tensor.to("cpu", copy=True)


def _is_fake(tensor: torch.Tensor) -> bool:
    return type(tensor).__name__ == "FakeTensor"
