"""Sequence parallelism derived from a tensor-parallel plan: the residual stream sharded along the sequence."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel

from am_tp_plans.adapters import known_as
from am_tp_plans.expand import expand_plan, matches
from am_tp_plans.proof.numeric_check import check_numbers
from am_tp_plans.proof.rehearsal import NoFitError, rehearse, rehearse_training
from am_tp_plans.sources.shared_inputs import with_style
from am_tp_plans.sources.translate import complete
from am_tp_plans.stacks import stacks_of, stacks_with
from am_tp_plans.styles.basic import (
    SequenceGatherInput,
    SequenceGatherOutput,
    SequenceShardArgument,
    SequenceShardInput,
    SequenceWholeBlock,
    Several,
    SharedInput,
    each,
    is_open_colwise,
)
from am_tp_plans.styles.fused import Conv1DRowwiseParallel, PackedColwiseParallel
from am_tp_plans.styles.heads import fewest_ranks

Plan = dict[str, ParallelStyle]


def add_sequence_parallelism(
    model: nn.Module, plan: Plan, ranks: int = 2, *, example_inputs: dict[str, Any] | None = None
) -> Plan:
    """A tensor-parallel plan with the sequence sharded between the blocks of the layers.

    The layers take and return `(B, S / n, D)`. Each module of a layer is placed in the cheapest way that a rehearsal
    without devices shows to be right: on the shard (norms, dropout); gathering once for all its colwise projections and
    scattering what its rowwise ones sum; or, what mixes tokens in another way, seeing the whole sequence and splitting
    its result. The gradients of parameters on a shard are summed over the ranks during backward.

    Each stack of layers that the plan shards, such as an encoder and a decoder, is tried by itself. Between them the
    sequence is whole. A stack for which nothing can be shown keeps the plan as it is; `explain_plan` names it.

    Args:
        model: real or on meta, whole (before a pipeline cut).
        plan: a tensor-parallel plan for it, without sequence parallelism.
        ranks: how many to rehearse with, 2, 4 or 8, or the next number that the model's heads fit.
        example_inputs: keyword arguments of a forward, for a model that takes more or other than ids `(B, S)`; small
            ones do, with at least two sequences and a length that divides over the ranks.

    Returns:
        A new plan. With it, S must divide over the axis.

    Raises:
        ValueError: no stack can be sharded, because the inputs do not run all of it, or because what its layers do
            between their modules needs other tokens; names it. Or a small twin of the model computes other numbers with
            the plan.
    """
    plan = {key: apart for key, style in plan.items() if (apart := _without_shared_input(style)) is not None}
    concrete, ranks = expand_plan(model, plan), fewest_ranks(model, ranks)
    stacks = stacks_with(model, concrete)
    if not stacks:
        raise ValueError("a sequence is sharded between the layers of a stack, but the plan shards nothing in any")
    sharded, errors = plan, {}
    for stack in stacks:
        try:
            sharded = _shard_between_layers(model, sharded, stack, ranks, example_inputs)
        except ValueError as error:
            errors[stack] = error
    if sharded is plan:
        reasons = "; between those of ".join(f"{stack}: {error}" for stack, error in errors.items())
        raise ValueError(f"the sequence cannot be sharded between the blocks of {reasons}")
    ways, plan = _ways_to_run(model, ranks, example_inputs), sharded
    if example_inputs is not None and _runs_with_ids_alone(model, ranks):
        ways.append(None)
    for inputs in ways:
        try:
            plan = complete(model, plan, inputs)
        except ValueError as error:
            what = "with ids alone, which it takes too: " if inputs is None and example_inputs is not None else ""
            raise ValueError(f"the sequence cannot be sharded between the layers: {what}{error}") from error
    for inputs in ways:
        rehearse_training(model, expand_plan(model, plan), ranks, inputs)
        check_numbers(model, plan, ranks, inputs)
    return plan


def _shard_between_layers(
    model: nn.Module, plan: Plan, stack: str, ranks: int, example_inputs: dict[str, Any] | None
) -> Plan:
    """The plan with the sequence sharded between the layers of one stack.

    Raises:
        ValueError: a rehearsal does not show it to be right.
    """
    layers = list(stacks_of(model)[stack])  # one that is there twice counts twice
    blocks = _blocks(model, stack, plan)
    entry = _entry(stack, len(layers), None)
    try:
        chosen = _first_shown(model, stack, plan, entry, blocks, ranks, example_inputs)
    except NoFitError as error:
        in_layer = _starred(error.module) == f"{stack}.*"  # perhaps with an argument that is whole
        found = _with_argument(model, stack, plan, blocks, ranks, example_inputs) if in_layer else None
        if found is None:
            raise
        entry, chosen = found
    for block, inner in blocks.items():
        for placement in list(_placements(block, inner, plan))[:-1]:
            try:
                _rehearse(model, stack, _merged(plan, entry, chosen | {block: placement}), ranks, example_inputs)
            except ValueError:
                continue
            chosen[block] = placement
            break
    return _merged(plan, entry, chosen)


def _entry(stack: str, length: int, argument: tuple[str, int] | None) -> Plan:
    """The styles of the layers themselves: where the sequence and an argument are split, and the sequence gathered."""
    entry: Plan = {f"{stack}.{index}": SequenceShardArgument(*argument) for index in range(length)} if argument else {}
    for name, style in ((f"{stack}.0", SequenceShardInput()), (f"{stack}.{length - 1}", SequenceGatherOutput())):
        entry[name] = with_style(entry.get(name), style)
    return entry


def _with_argument(
    model: nn.Module,
    stack: str,
    plan: Plan,
    blocks: dict[str, Plan],
    ranks: int,
    example_inputs: dict[str, Any] | None,
) -> tuple[Plan, dict[str, Plan]] | None:
    """The styles of the layers and blocks with the first argument after the hidden state that may be split with it."""
    layers = list(stacks_of(model)[stack])
    for place, name in enumerate(inspect.signature(layers[0].forward).parameters):
        if not place or _NO_TOKENS.search(name):
            continue
        entry = _entry(stack, len(layers), (name, place))
        try:
            return entry, _first_shown(model, stack, plan, entry, blocks, ranks, example_inputs)
        except ValueError:
            continue
    return None


def _first_shown(
    model: nn.Module,
    stack: str,
    plan: Plan,
    entry: Plan,
    blocks: dict[str, Plan],
    ranks: int,
    example_inputs: dict[str, Any] | None,
) -> dict[str, Plan]:
    """For every block its last placement, but for those that only see inner features, such as an activation.

    Raises:
        ValueError: a rehearsal does not show it to be right.
    """
    chosen = {block: list(_placements(block, inner, plan))[-1] for block, inner in blocks.items()}
    bare = {block for block, inner in blocks.items() if not inner and not _has_parameters(model, block)}
    while True:
        try:
            _rehearse(model, stack, _merged(plan, entry, chosen), ranks, example_inputs)
        except NoFitError as error:
            block = _starred(error.module)
            if block not in bare or not chosen[block]:
                raise
            chosen[block] = {}
            continue
        return chosen


def _has_parameters(model: nn.Module, block: str) -> bool:
    return any(True for name, module in model.named_modules() if matches(block, name) for _ in module.parameters())


def _blocks(model: nn.Module, stack: str, plan: Plan) -> dict[str, Plan]:
    """The modules that the layers call, by wildcard name, and what the plan says of each and inside it.

    Left out are embeddings in a layer, such as biases by distance: they read no tokens of the sequence.
    """
    modules, inside = {known_as(name): module for name, module in model.named_modules()}, {}
    for layer in stacks_of(model)[stack]:
        inside |= {f"{stack}.*.{_starred(name)}": {} for name in _called(layer)}
    for key, style in plan.items():
        block = next((block for block in inside if f"{_starred(key)}.".startswith(f"{block}.")), None)
        of_ids = any(isinstance(m, nn.Embedding) for name, m in modules.items() if matches(key, name))
        if block is not None and not of_ids:
            inside[block][key] = style
    return inside


def _called(module: nn.Module) -> Iterator[str]:
    """The names of a module's children; a list is not called, but what the modules in it call is."""
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList):
            for index, item in child.named_children():
                yield from (f"{name}.{index}.{inner}" for inner in _called(item))
        else:
            yield name


def _starred(name: str) -> str:
    return re.sub(r"(^|(?<=\.))\d+(?=\.|$)", "*", name)


def _placements(block: str, inner: Plan, plan: Plan) -> Iterator[Plan]:
    """What may be added for one block, best first; the last one is right whenever any is."""
    colwise = [key for key, style in inner.items() if isinstance(style, _COLWISE)]
    rowwise = [key for key, style in inner.items() if isinstance(style, _ROWWISE)]
    scattered = {key: _scattering(plan[key]) for key in rowwise}
    gathered = {key: _gathering(plan[key]) for key in colwise}
    if any(is_open_colwise(plan[key]) for key in colwise) != any(_is_rowwise(plan[key]) for key in rowwise):
        # half of a pair: its linears gather or scatter themselves
        yield gathered | scattered
        return
    if not inner:
        yield {}
    if colwise and all(is_open_colwise(plan[key]) for key in colwise):
        parents = dict.fromkeys(key.rpartition(".")[0] for key in colwise)
        yield {
            parent: with_style(plan.get(parent), SharedInput(input_layouts=Shard(1))) for parent in parents
        } | scattered
        yield gathered | scattered
        yield {parent: with_style(plan.get(parent), SequenceGatherInput()) for parent in parents} | scattered
    try:
        yield {block: with_style(plan.get(block), SequenceWholeBlock())}
    except TypeError:
        yield {}


def _without_shared_input(style: ParallelStyle) -> ParallelStyle | None:
    left = [part for part in each(style) if not isinstance(part, SharedInput)]
    if len(left) == len(each(style)):
        return style
    return Several(*left) if left else None


def _rehearse(model: nn.Module, stack: str, plan: Plan, ranks: int, example_inputs: dict[str, Any] | None) -> None:
    """As `rehearse`; nothing is shown of what did not run."""
    concrete = expand_plan(model, plan)
    ways = _ways_to_run(model, ranks, example_inputs)
    ran = frozenset().union(*(rehearse(model, concrete, ranks, inputs).ran for inputs in ways))
    for name, style in concrete.items():
        if name in ran or not name.startswith(f"{stack}.") or not any(isinstance(part, _RUN) for part in each(style)):
            continue
        if any(True for _ in model.get_submodule(name).parameters()):
            inputs = "ids alone do" if example_inputs is None else "the example inputs do"
            raise ValueError(
                f"{inputs} not run {name}, so that nothing is shown of it; give example_inputs that run it"
            )


def _ways_to_run(model: Any, ranks: int, example_inputs: dict[str, Any] | None) -> list[dict[str, Any] | None]:
    """The user's example; else ids alone and, where a decoder may attend to an encoder's states, both."""
    takes = inspect.signature(model.forward).parameters
    name = next((name for name in ("encoder_hidden_states", "encoder_outputs") if name in takes), None)
    width = getattr(getattr(model, "config", None), "hidden_size", None)
    cross = any(_CROSS.search(module) for module, _ in model.named_modules())
    if example_inputs is not None or name is None or not cross or not isinstance(width, int):
        return [example_inputs]
    tokens = 4 * ranks
    ids = torch.arange(2 * tokens).reshape(2, tokens) % 7 + 3
    states = torch.linspace(-1, 1, 2 * (tokens + ranks) * width).reshape(2, tokens + ranks, width)
    return [None, {"input_ids": ids, name: states if name == "encoder_hidden_states" else (states,)}]


def _runs_with_ids_alone(model: nn.Module, ranks: int) -> bool:
    try:
        rehearse(model, {}, ranks)
    except ValueError:
        return False
    return True


def _merged(plan: Plan, entry: Plan, chosen: dict[str, Plan]) -> Plan:
    merged = dict(plan)
    for placement in chosen.values():
        merged |= placement
    return merged | {key: with_style(merged.get(key), style) for key, style in entry.items()}


_NO_TOKENS = re.compile("mask|position|cache|past|kwargs|output_|layer_idx")
_CROSS = re.compile(r"\.(encoder_attn|crossattention|cross_attn|EncDecAttention)$")
_COLWISE = (ColwiseParallel, PackedColwiseParallel)
_ROWWISE = (RowwiseParallel, Conv1DRowwiseParallel)
_RUN = (*_COLWISE, *_ROWWISE, SequenceShardInput, SequenceGatherInput, SequenceGatherOutput, SequenceWholeBlock)


def _is_rowwise(style: ParallelStyle) -> bool:
    return isinstance(style, Conv1DRowwiseParallel) or (
        isinstance(style, RowwiseParallel) and style.input_layouts[0] != Replicate()
    )


def _gathering(style: ParallelStyle) -> ParallelStyle:
    changed = copy.copy(style)
    if isinstance(changed, ColwiseParallel):
        changed.input_layouts = (Shard(1),)
    elif isinstance(changed, PackedColwiseParallel):
        changed.input_layouts = Shard(1)
    return changed


def _scattering(style: ParallelStyle) -> ParallelStyle:
    changed = copy.copy(style)
    if isinstance(changed, RowwiseParallel):
        changed.output_layouts = (Shard(1),)
    elif isinstance(changed, Conv1DRowwiseParallel):
        changed.output_layouts = Shard(1)
    return changed
