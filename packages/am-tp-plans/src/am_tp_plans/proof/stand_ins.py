"""What a rank's modules would return under each style, without devices: shapes, and which share they are."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, singledispatch
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, PrepareModuleInput, RowwiseParallel

from am_tp_plans.adapters import why_not_sharded
from am_tp_plans.fit import no_linear
from am_tp_plans.proof.shares import FEATURES, TOKENS, Share, WrongError
from am_tp_plans.proof.watch import Collective, Watch, tensors
from am_tp_plans.styles.basic import (
    SequenceGatherInput,
    SequenceGatherOutput,
    SequenceParallelAllGatherActivation,
    SequenceShardArgument,
    SequenceShardInput,
    SequenceShardOutput,
    SequenceWholeBlock,
    SharedInput,
    each,
)
from am_tp_plans.styles.experts import ExpertsOverTensorAxis
from am_tp_plans.styles.fused import Conv1DRowwiseParallel, HeadsPerRank, PackedColwiseParallel, features, plan_exchange
from am_tp_plans.styles.local import LocalShards, MlaKvAProjection, ReplicatedWithGradAllReduce
from am_tp_styles import KeyValueColwiseParallel, SequenceParallelLora
from am_tp_styles.layout import base_layer, is_wrapped


@dataclass(frozen=True)
class _Place:
    """Where a style is: a module of the weightless twin, its name, and over how many ranks; the whole's run has one."""

    watch: Watch
    name: str
    module: Any
    ranks: int


def stand_in(watch: Watch, name: str, module: Any, style: ParallelStyle | None, ranks: int) -> None:
    """Make a module of the weightless twin behave as on one of `ranks` ranks under its style; no style has its own."""
    if style is None and _routes(module):
        _whole(watch, name, module)
    elif style is None and features(module):
        _plain(watch, name, module)
    for part in each(style):
        if isinstance(part, (ColwiseParallel, RowwiseParallel, PackedColwiseParallel, Conv1DRowwiseParallel)):
            prefix = f"{name}.base_layer" if is_wrapped(module) else name
            watch.sharded |= {f"{prefix}.{leaf}" for leaf, _ in base_layer(module).named_parameters(recurse=False)}
        act(part, _Place(watch, name, module, ranks))


@singledispatch
def act(style: Any, at: _Place) -> None:
    """Let a module take, return, hold and send what it does under a style; a style without an entry changes nothing."""


@act.register
def _(style: RowwiseParallel, at: _Place) -> None:
    layout, base = style.output_layouts[0], base_layer(at.module)
    if isinstance(base, nn.Embedding):
        at.module.forward = _summed(at.watch, at.name, base.embedding_dim, None, layout, at.ranks)
        return
    taken, returned = _widths(style, at.name, base)
    splits = style.input_layouts[0] == Replicate()
    wanted = taken if splits else taken // at.ranks
    at.module.forward = _summed(at.watch, at.name, returned, (wanted, splits), layout, at.ranks)


@act.register
def _(style: Conv1DRowwiseParallel, at: _Place) -> None:
    taken, returned = _widths(style, at.name, at.module)
    wanted = taken // at.ranks, False
    at.module.forward = _summed(at.watch, at.name, returned, wanted, style.output_layouts, at.ranks)


@act.register
def _(style: ColwiseParallel, at: _Place) -> None:
    whole = style.output_layouts[0] == Replicate()
    base = base_layer(at.module)
    width = base.embedding_dim if isinstance(base, nn.Embedding) else _widths(style, at.name, base)[1]
    at.module.forward = _shares(at.watch, at.name, [width], style.input_layouts[0], at.ranks, whole)


@act.register
def _(style: KeyValueColwiseParallel, at: _Place) -> None:
    at.module.forward = _own_head(at.watch, at.name, at.module, style, at.ranks)


@act.register
def _(style: PackedColwiseParallel, at: _Place) -> None:
    widths = style.widths(_widths(style, at.name, at.module)[1])
    if len(widths) > 1:
        exchanges = [plan_exchange(widths, at.ranks, rank) for rank in range(at.ranks)]
        sent = max(len(order) - sends[rank] for rank, (order, sends, _) in enumerate(exchanges))
        for parameter in at.module.parameters():
            for phase in ("forward", "backward"):
                rows = sent * parameter.numel() // sum(widths)
                at.watch.sends(at.name, phase, "all-to-all", rows, of_tokens=False)
    at.module.forward = _shares(at.watch, at.name, widths, style.input_layouts, at.ranks, whole=False)


@act.register
def _(style: ExpertsOverTensorAxis, at: _Place) -> None:
    _whole(at.watch, at.name, at.module, sums_inputs=True, sums_output=True)


@act.register
def _(style: LocalShards, at: _Place) -> None:
    _local(at.watch, at.name, at.module, style, at.ranks)


@act.register(ReplicatedWithGradAllReduce)
@act.register(SequenceParallelLora)
def _(style: Any, at: _Place) -> None:
    at.watch.summed |= {f"{at.name}.{leaf}" for leaf, _ in at.module.named_parameters()}
    only = getattr(style, "names", None)
    for leaf, parameter in at.module.named_parameters():
        if only is None or leaf in only:
            at.watch.sends(at.name, "backward", "all-reduce", parameter.numel(), of_tokens=False)
    if isinstance(style, SequenceParallelAllGatherActivation):
        _around(at.module, None, lambda output: _gathered_for_readers(at.watch, at.name, output, at.ranks))


@act.register
def _(style: MlaKvAProjection, at: _Place) -> None:
    _summed_in_backward(at.watch, at.name, at.module, style.rope_dim or 0)


@act.register
def _(style: HeadsPerRank, at: _Place) -> None:
    at.watch.ran.add(at.name)
    style.divide(copy.copy(at.module), at.watch.ranks)  # the whole's run says as well what does not divide
    style.divide(at.module, at.ranks)


@act.register
def _(style: SharedInput, at: _Place) -> None:
    if style.input_layouts == Shard(1):
        _around(at.module, lambda h: _share(at.watch, at.name, _gather(at, h, "reduce-scatter")))
    else:
        _around(at.module, lambda hidden: _share(at.watch, at.name, hidden * 1, sums=True))


@act.register
def _(style: PrepareModuleInput, at: _Place) -> None:
    _around(at.module, lambda hidden: _share(at.watch, at.name, hidden * 1, sums=True))


@act.register
def _(style: SequenceShardInput, at: _Place) -> None:
    _around(at.module, partial(_part, at))


@act.register
def _(style: SequenceShardArgument, at: _Place) -> None:
    _around_argument(at.module, style, partial(_part, at))


@act.register
def _(style: SequenceGatherInput, at: _Place) -> None:
    _around(at.module, partial(_gather, at))


@act.register
def _(style: SequenceGatherOutput, at: _Place) -> None:
    _around(at.module, None, partial(_gather, at))


@act.register
def _(style: SequenceShardOutput, at: _Place) -> None:
    _around(at.module, None, partial(_part, at))


@act.register
def _(style: SequenceWholeBlock, at: _Place) -> None:
    _whole_block(at.watch, at.name, at.module, at.ranks)


def _widths(style: ParallelStyle, name: str, module: nn.Module) -> tuple[int, int]:
    """What a linear takes and returns."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    widths = features(module)
    if widths is None:
        raise WrongError(why_not_sharded(name, module) or no_linear(name, module, style))
    return widths


def _gather(at: _Place, hidden: torch.Tensor, backward: str | None = None) -> torch.Tensor:
    return _gathered(at.watch, at.name, hidden, at.ranks, backward)


def _part(at: _Place, hidden: torch.Tensor) -> torch.Tensor:
    return _split(at.watch, at.name, hidden, at.ranks)


def _own_head(watch: Watch, name: str, module: Any, style: KeyValueColwiseParallel, ranks: int) -> Callable:
    """As `_shares`, of a head that neighbouring ranks share; their parameters' gradients are summed."""
    copies = watch.ranks // style.heads
    width = module.out_features * (copies if ranks > 1 else 1)
    shares = _shares(watch, name, [width], style.input_layouts[0], ranks, whole=False)
    for parameter in module.parameters():
        watch.sends(name, "backward", "all-reduce", parameter.numel(), of_tokens=False)

    def forward(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        output = shares(hidden, *args, **kwargs)
        return watch.note(output, share=Share(output.dim() - 1, FEATURES, (module.out_features,), copies), made=name)

    return forward


def _shares(watch: Watch, name: str, widths: list[int], layout: Any, ranks: int, whole: bool) -> Callable:
    def forward(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        watch.ran.add(name)
        if watch.has(hidden, FEATURES):
            raise WrongError(f"{name} wants all features, but gets one rank's share")
        rows = _rows(watch, name, hidden, layout, ranks)
        width = sum(widths) if whole else sum(widths) // ranks
        output = torch.ones(*rows, width, dtype=hidden.dtype if hidden.is_floating_point() else None)
        facts = watch.facts(hidden)
        if layout == Shard(1):
            watch.sends(name, "forward", "all-gather", hidden.numel() * ranks)
            watch.sends(name, "backward", "reduce-scatter", hidden.numel() * ranks)
        elif isinstance(facts.gathered, Collective):
            if facts.gathered not in watch.traffic:
                watch.traffic.append(facts.gathered)
        elif hidden.is_floating_point() and not facts.shared_by and not facts.gathered:
            watch.sends(name, "backward", "all-reduce", hidden.numel())
        if whole:
            watch.sends(name, "forward", "all-gather", output.numel())
            return watch.activate(output)
        return watch.features(output, widths)

    return forward


def _rows(watch: Watch, name: str, hidden: torch.Tensor, layout: Any, ranks: int) -> list[int]:
    """The shape before the features, after what a colwise layer does to its input's layout."""
    rows = list(hidden.shape[:-1]) if hidden.is_floating_point() else list(hidden.shape)
    if watch.has(hidden, TOKENS) != (layout == Shard(1)):
        has = "one rank's tokens" if watch.has(hidden, TOKENS) else "all tokens"
        raise WrongError(f"{name} gets {has}, but its input layout is {layout}")
    if layout == Shard(1):
        rows[_sequence_dim(watch, name, hidden)] *= ranks
    return rows


def _sequence_dim(watch: Watch, name: str, hidden: torch.Tensor) -> int:
    share = watch.share(hidden)
    if share is None or share.kind != TOKENS or share.dim != 1 or len(share.parts) > 1 or hidden.dim() < 3:
        raise WrongError(f"{name} gathers the sequence, but gets {tuple(hidden.shape)}, which is no part of one")
    return share.dim


def _summed(watch: Watch, name: str, width: int, wants: tuple[int, bool] | None, layout: Any, ranks: int) -> Callable:
    """What a rowwise layer or embedding returns; `wants` is the width of its input and whether it is a whole one."""

    def forward(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        watch.ran.add(name)
        rows = list(hidden.shape) if wants is None else list(hidden.shape[:-1])
        share = watch.share(hidden)
        if share and share.kind == TOKENS:
            raise WrongError(f"{name} gets one rank's tokens and would sum different ones")
        if wants is not None:
            _check_rowwise(name, hidden, share, wants)
        elif share:
            raise WrongError(f"{name} gets one rank's share of ids")
        dtype = hidden.dtype if hidden.is_floating_point() else None
        elements = math.prod(rows) * width
        watch.sends(name, "forward", "reduce-scatter" if layout == Shard(1) else "all-reduce", elements)
        if layout == Shard(1):
            watch.sends(name, "backward", "all-gather", elements)
        if wants is not None and wants[1]:  # a whole input, of which each rank takes its part
            watch.sends(name, "backward", "all-gather", hidden.numel())
        if layout != Shard(1):
            return watch.note(watch.activate(torch.ones(*rows, width, dtype=dtype)), output_of=name)
        if len(rows) != 2:
            raise WrongError(f"{name} would split dim 1 of {(*rows, width)}, which is not the sequence")
        length, rows[1] = rows[1], rows[1] // ranks
        return watch.note(watch.tokens(torch.ones(*rows, width, dtype=dtype), length), output_of=name)

    return forward


def _check_rowwise(name: str, hidden: torch.Tensor, share: Share | None, wants: tuple[int, bool]) -> None:
    """Whether a rowwise layer gets the whole input, or the rank's contiguous part of the columns, as it wants."""
    wanted, whole = wants
    if share and (len(share.parts) > 1 or share.copies > 1):
        raise WrongError(f"{name} wants one rank's contiguous columns, but gets {share.what}")
    if share and share.dim != hidden.dim() - 1:
        raise WrongError(f"{name} gets {tuple(hidden.shape)}, of which a rank has a share in another dim")
    if whole == bool(share) or hidden.shape[-1] != wanted:
        has = "one rank's share" if share else "all features"
        raise WrongError(f"{name} gets {has} in {hidden.shape[-1]} columns, but wants {wanted} of {_whose(whole)}")


def _whose(whole: bool) -> str:
    return "all" if whole else "one rank's share"


def _around(module: Any, before: Callable | None, after: Callable | None = None) -> None:
    forward = module.forward

    def around(*args: Any, **kwargs: Any) -> Any:
        if before and not isinstance(args[0] if args else kwargs.get("hidden_states"), torch.Tensor):
            raise WrongError(f"{type(module).__name__} is called without a hidden state of its own")
        if before and args:
            args = (before(args[0]), *args[1:])
        elif before:
            kwargs = kwargs | {"hidden_states": before(kwargs["hidden_states"])}
        output = forward(*args, **kwargs)
        if after and isinstance(output, tuple):
            return (after(output[0]), *output[1:])
        return after(output) if after else output

    module.forward = around


def _around_argument(module: Any, style: SequenceShardArgument, change: Callable) -> None:
    forward = module.forward

    def around(*args: Any, **kwargs: Any) -> Any:
        given = args[style.position] if len(args) > style.position else kwargs.get(style.name)
        if not isinstance(given, torch.Tensor):
            raise WrongError(f"{type(module).__name__} is called without a tensor {style.name}")
        if len(args) > style.position:
            return forward(*args[: style.position], change(given), *args[style.position + 1 :], **kwargs)
        return forward(*args, **(kwargs | {style.name: change(given)}))

    module.forward = around


def _gathered(watch: Watch, name: str, hidden: torch.Tensor, ranks: int, backward: str | None = None) -> torch.Tensor:
    watch.ran.add(name)
    dim = _sequence_dim(watch, name, hidden)
    whole = torch.ones(*hidden.shape[:dim], hidden.shape[dim] * ranks, *hidden.shape[dim + 1 :], dtype=hidden.dtype)
    watch.sends(name, "forward", "all-gather", whole.numel())
    if backward:
        watch.sends(name, "backward", backward, whole.numel())
    return watch.note(watch.activate(whole), gathered=backward is not None)


def _gathered_for_readers(watch: Watch, name: str, hidden: torch.Tensor, ranks: int) -> torch.Tensor:
    """A gathered sequence, whose gradient is reduce-scattered once if a colwise layer reads it."""
    whole = _gathered(watch, name, hidden, ranks)
    summed = Collective(name, "backward", "reduce-scatter", whole.numel(), of_tokens=True)
    return watch.note(whole, gathered=summed)


def _split(watch: Watch, name: str, hidden: torch.Tensor, ranks: int) -> torch.Tensor:
    watch.ran.add(name)
    if watch.share(hidden) or hidden.dim() < 3 or hidden.shape[1] % ranks:
        raise WrongError(f"{name} would split {tuple(hidden.shape)}, which is no whole sequence, along dim 1")
    watch.sends(name, "backward", "all-gather", hidden.numel())
    length = hidden.shape[1]
    part = torch.ones(hidden.shape[0], length // ranks, *hidden.shape[2:], dtype=hidden.dtype)
    return watch.tokens(part, length)


def _whole_block(watch: Watch, name: str, module: Any, ranks: int) -> None:
    """A block that sees the whole sequence; its result is split, if it is flat, row by row of the batch."""
    seen: list[int] = []

    def before(hidden: torch.Tensor) -> torch.Tensor:
        whole = _gathered(watch, name, hidden, ranks)
        seen[:] = whole.shape[:2]
        return whole

    def after(output: torch.Tensor) -> torch.Tensor:
        rows, length = seen
        if output.dim() != 2 or output.shape[0] != rows * length or watch.share(output):
            return _split(watch, name, output, ranks)
        width = output.shape[1]
        part = _split(watch, name, watch.activate(torch.ones(rows, length, width, dtype=output.dtype)), ranks)
        flat = watch.activate(torch.ones(rows * part.shape[1], width, dtype=output.dtype))
        return watch.note(flat, share=Share(0, TOKENS, (length,) * rows))

    _around(module, before, after)


def _share(watch: Watch, name: str, hidden: torch.Tensor, sums: bool = False) -> torch.Tensor:
    if watch.share(hidden):
        raise WrongError(f"{name} wants all features and tokens, but gets one rank's share")
    if sums:
        watch.sends(name, "backward", "all-reduce", hidden.numel())
    return watch.note(hidden, shared_by=name)


def _whole(watch: Watch, name: str, module: nn.Module, sums_inputs: bool = False, sums_output: bool = False) -> None:
    """A module of experts: what it takes and returns is whole; what it does depends on values, so it is not run."""

    def same(*args: Any, **kwargs: Any) -> Any:
        inputs = list(tensors((args, kwargs)))
        if any(watch.share(tensor) for tensor in inputs):
            raise WrongError(f"{name} wants all features and tokens, but gets one rank's share")
        if sums_output:
            watch.sends(name, "forward", "all-reduce", inputs[0].numel())
        for tensor in inputs if sums_inputs else ():
            if tensor.is_floating_point() and watch.facts(tensor).trained:
                watch.sends(name, "backward", "all-reduce", tensor.numel())
        return inputs[0] * 1

    module.forward = same


def _local(watch: Watch, name: str, module: Any, style: LocalShards, ranks: int) -> None:
    for leaf, placement in style.layouts.items():
        parameter = module._parameters.get(leaf)
        if parameter is None:
            continue
        dim = placement.dim % parameter.dim()  # type: ignore[attr-defined]
        local = nn.Parameter(parameter.narrow(dim, 0, parameter.shape[dim] // ranks).clone(), requires_grad=False)
        module.register_parameter(leaf, local)
        watch.note(local, share=Share(dim, FEATURES, (parameter.shape[dim],)))
    for leaf in style.partial:
        if (parameter := module._parameters.get(leaf)) is not None:
            watch.sends(name, "backward", "all-reduce", parameter.numel(), of_tokens=False)
    if style.sum_output:
        _whole(watch, name, module, style.sum_input_gradients, sums_output=True)


def _plain(watch: Watch, name: str, module: Any) -> None:
    """A linear without a style computes nothing either; a rank's share goes through it in any dim but the last."""
    _, out_features = features(module)  # type: ignore[misc]

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        facts = watch.facts(hidden)
        if facts.shared_by:
            raise WrongError(f"{name} reads the input that the projections of {facts.shared_by} share")
        output = watch.activate(torch.ones(*hidden.shape[:-1], out_features, dtype=hidden.dtype))
        if facts.share is None:
            return output
        if facts.share.dim == hidden.dim() - 1:
            raise WrongError(f"{name} sums over {facts.share.what} of which each rank has a share")
        watch.partial |= {f"{name}.{leaf}" for leaf, _ in module.named_parameters()}
        return watch.note(output, share=facts.share)

    module.forward = forward


def _summed_in_backward(watch: Watch, name: str, module: Any, rope_dim: int) -> None:
    def whole(hidden: torch.Tensor) -> torch.Tensor:
        if watch.share(hidden) or watch.facts(hidden).shared_by:
            raise WrongError("the rotary part of latent attention wants all tokens, and a gradient of its own")
        output = torch.ones(*hidden.shape[:-1], module.out_features, dtype=hidden.dtype)
        watch.sends(name, "backward", "all-reduce", output[..., :rope_dim].numel())
        return watch.note(output, active=True, alike=frozenset())  # not trained: the style sums its gradient

    module.forward = whole


def _routes(module: Any) -> bool:
    """Stacked experts, whose own forward loops over the experts that were chosen."""
    experts = getattr(module, "num_experts", None)
    stacked = [p for p in module.parameters(recurse=False) if p.dim() == 3 and p.shape[0] == experts]
    return isinstance(experts, int) and bool(stacked)
