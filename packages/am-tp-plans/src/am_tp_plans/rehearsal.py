"""Run a model's own forward on one rank's share, without devices, and see what a plan lacks or would get wrong.

The modules that a plan shards are replaced, in a weightless copy of the model, by stand-ins that return what a rank
would have: its share of the features after a colwise layer, its share of the tokens where the sequence is sharded,
everything after a sum. The forward in between is the model's own, and every operator in it is watched (`watch.py`). A
whole parameter that meets a rank's share gets only a part of its gradient on each rank; a reduction over sharded
features would be taken over a part of them; a share that reaches something that wants it all, or the end of the model,
is a gap in the plan.
"""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, SequenceParallel

from am_tp_plans.experts import ExpertsOverTensorAxis
from am_tp_plans.fused import Conv1DRowwiseParallel, PackedColwiseParallel
from am_tp_plans.local import MlaKvAProjection, ReplicatedWithGradAllReduce
from am_tp_plans.stand_ins import stand_in
from am_tp_plans.styles import each
from am_tp_plans.watch import Collective, ReadDirectlyError, Watch, WrongError, tensors

_TOKENS = 8


@dataclass(frozen=True)
class Findings:
    """What a rehearsal saw.

    Attributes:
        partial: parameters that no style covers and that meet a rank's share, so that each rank has a part of their
            gradients.
        modified: modules with a style whose output the model modifies in place.
        ran: modules with a style that ran at all.
        traffic: the collectives of a training step with two sequences of `tokens` tokens.
        tokens: the length of a sequence in the rehearsal.
    """

    partial: frozenset[str]
    modified: frozenset[str]
    ran: frozenset[str]
    traffic: tuple[Collective, ...]
    tokens: int


def rehearse(model: nn.Module, plan: dict[str, ParallelStyle], ranks: int) -> Findings:
    """What a plan lacks to be right. No device, no collective, no real weight.

    Args:
        model: takes ids `(B, S)`; it is not changed.
        plan: concrete, without `*`: from `expand_plan`.
        ranks: size of the axis.

    Raises:
        ValueError: the plan would give wrong results, and where.
    """
    tokens = -(-_TOKENS // ranks) * ranks
    share, whole = _run(model, plan, ranks, tokens), _run(model, plan, 1, tokens)
    _compare(type(model).__name__, share, whole, ranks)
    covers = {name for name, styles in plan.items() if any(isinstance(style, _COVERS) for style in each(styles))}
    partial = {name for name in share.partial if not any(name.startswith(f"{owner}.") for owner in covers)}
    traffic = tuple(share.traffic)
    return Findings(frozenset(partial), frozenset(share.modified), frozenset(share.ran), traffic, tokens)


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


def _run(model: nn.Module, plan: dict[str, ParallelStyle], ranks: int, tokens: int) -> Watch:
    twin = _weightless(model)
    watch = Watch(dict(twin.named_parameters()))
    for name, module in list(twin.named_modules()):
        stand_in(watch, name, module, plan.get(name), ranks)
    modules = list(twin.modules())
    settings = {"use_cache": False} if "use_cache" in inspect.signature(twin.forward).parameters else {}
    no_fit = f"the plan does not fit {type(model).__name__}"
    try:
        with torch.no_grad(), watch:
            ids = torch.ones(2, tokens, dtype=torch.int64)
            watch.active[ids] = True
            output = twin(ids, **settings)
    except (WrongError, ReadDirectlyError) as why:
        raise ValueError(f"{no_fit}: {why}") from why
    except Exception as error:  # whatever the model's own code raises on a rank's share
        raise ValueError(
            f"{no_fit}: on one rank's share its forward fails with {type(error).__name__}: {error}"
        ) from error
    if any(now is not before for now, before in zip(twin.modules(), modules, strict=False)):
        raise ValueError(f"{no_fit}: its forward replaces modules, and what a plan did to them is lost")
    for tensor in tensors(output):
        if watch.is_sharded(tensor) or tensor in watch.tokens:
            raise ValueError(f"{no_fit}: its output would be one rank's share")
    return watch


def _compare(kind: str, share: Watch, whole: Watch, ranks: int) -> None:
    """What a rank does with its share, against what one process does with all of it."""
    no_fit = f"the plan does not fit {kind}"
    for (had, has), (had_whole, has_whole) in zip(share.reshaped, whole.reshaped, strict=False):
        if has != has_whole and (had, had_whole) != (has, has_whole):
            raise ValueError(f"{no_fit}: on one rank's share it would cut heads of {has_whole} features into {has}")
    for pieces, pieces_whole in zip(share.pieces, whole.pieces, strict=False):
        if [piece * ranks for piece in pieces] != pieces_whole:
            raise ValueError(f"{no_fit}: it takes fused features apart into {pieces_whole}, of a share into {pieces}")
    if len(share.met) != len(whole.met):
        raise ValueError(f"{no_fit}: what it computes with one rank's share differs from what it computes with all")
    for (name, has), (_, has_whole) in zip(share.met, whole.met, strict=True):
        if has != has_whole:
            raise ValueError(
                f"{no_fit}: it computes {name} of all features and {has_whole}, but of one rank's share and {has}"
            )


def _weightless(model: nn.Module) -> nn.Module:
    """A copy on the CPU whose parameters share one number each."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(torch.ones(()).expand(parameter.shape), requires_grad=False)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.ones_like(buffer, device="cpu") if buffer.is_meta else buffer.to("cpu", copy=True)
        if buffer.dtype == torch.float64:
            memo[id(buffer)] = memo[id(buffer)].float()
    for module in model.modules():
        if "config" in vars(module):
            memo[id(module.config)] = module.config
        for value in vars(module).values():
            if isinstance(value, torch.Tensor):
                memo.setdefault(id(value), value.detach())
    return copy.deepcopy(model, memo).eval()
