"""A tensor-parallel plan for a model that brings none, from its structure, each step of it shown to be right."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel

from am_tp_plans.adapters import known_as
from am_tp_plans.expand import expand_plan, matches
from am_tp_plans.fit import check_plan
from am_tp_plans.proof.numeric_check import check_numbers
from am_tp_plans.proof.rehearsal import rehearse, rehearse_training
from am_tp_plans.sources.shared_inputs import share_inputs
from am_tp_plans.sources.translate import complete, without_half_ties
from am_tp_plans.stacks import stacks_of, stacks_with
from am_tp_plans.styles.basic import VocabParallelEmbedding
from am_tp_plans.styles.fused import Conv1DRowwiseParallel, HeadsPerRank, PackedColwiseParallel, features, is_conv1d

# Projections of one input that a block may have before the one that leads back: query, key, value, gates.
_MOST = 5


def infer_plan(
    model: nn.Module, ranks: int = 2, *, example_inputs: dict[str, Any] | None = None
) -> dict[str, ParallelStyle]:
    """Look for projections that can be sharded, and keep those that a rehearsal shows to be right.

    In every kind of layer, runs of linears that read the hidden state, each followed by one that leads back to it, are
    tried as colwise and rowwise; so are the token embedding and the head over the vocabulary. Each is kept only if the
    model's own forward, run once without devices on one rank's share, needs nothing more (see `rehearsal.py`). Print
    the plan, edit it if you like, and give it to `apply_plan`; nothing uses it unless you do.

    Args:
        model: real or on meta.
        ranks: the size of the axis that widths have to divide over.
        example_inputs: keyword arguments of a forward, for a model that takes more or other than ids `(B, S)`; small
            ones do, with at least two sequences and a length that divides over the ranks.

    Returns:
        A plan with `*` for the layers' numbers.

    Raises:
        ValueError: nothing in the model could be sharded, its forward fails on the inputs, or a small twin of it
            computes other numbers with the plan (`numeric_check.py`).
    """
    plan = _grown(model, {}, (*_vocabulary(model), *_blocks(model, stacks_of(model), ranks)), ranks, example_inputs)
    if not plan:
        rehearse(model, {}, ranks, example_inputs)  # what its forward itself says
        raise ValueError(f"nothing in {type(model).__name__} was found that can be sharded over {ranks} ranks")
    return _proven(model, plan, ranks, example_inputs)


def extend_plan(
    model: nn.Module, plan: dict[str, ParallelStyle], ranks: int = 2, *, example_inputs: dict[str, Any] | None = None
) -> dict[str, ParallelStyle]:
    """The plan with what can be sharded in the stacks of layers that it leaves whole, such as a vision tower.

    A stack that the inputs do not run stays whole, and so does one in which nothing is shown to be right.

    Args:
        model, ranks, example_inputs: as for `infer_plan`.
        plan: for it.

    Raises:
        ValueError: a small twin of the model computes other numbers with what was found.
    """
    sharded = stacks_with(model, expand_plan(model, plan))
    left = [stack for stack in stacks_of(model) if stack not in sharded]
    extended = _grown(model, plan, _blocks(model, left, ranks), ranks, example_inputs)
    return plan if len(extended) == len(plan) else _proven(model, extended, ranks, example_inputs)


def _grown(
    model: nn.Module,
    plan: dict[str, ParallelStyle],
    candidates: Iterable[list[dict[str, ParallelStyle]]],
    ranks: int,
    example_inputs: dict[str, Any] | None,
) -> dict[str, ParallelStyle]:
    """The plan with the first alternative of every candidate that a rehearsal shows to be right."""
    for alternatives in candidates:
        for candidate in alternatives:
            trial = without_half_ties(model, plan | candidate)
            if set(candidate) & set(plan) or len(trial) <= len(plan):
                continue
            if _fits(model, trial, set(expand_plan(model, candidate)), ranks, example_inputs):
                plan = trial
                break
    return plan


def _proven(
    model: nn.Module, plan: dict[str, ParallelStyle], ranks: int, example_inputs: dict[str, Any] | None
) -> dict[str, ParallelStyle]:
    plan = share_inputs(model, complete(model, plan, example_inputs), example_inputs)
    rehearse_training(model, expand_plan(model, plan), ranks, example_inputs)
    check_numbers(model, plan, ranks, example_inputs)
    return plan


def _fits(
    model: nn.Module,
    plan: dict[str, ParallelStyle],
    added: set[str],
    ranks: int,
    example_inputs: dict[str, Any] | None,
) -> bool:
    """Whether a rehearsal shows the plan to be right; nothing is shown of an added module that did not run."""
    try:
        return added <= rehearse(model, check_plan(model, plan, ranks), ranks, example_inputs).ran
    except (ValueError, TypeError):
        return False


def _vocabulary(model: nn.Module) -> Iterator[list[dict[str, ParallelStyle]]]:
    config = getattr(model, "config", None)
    size = getattr(config, "vocab_size", None)
    both: dict[str, ParallelStyle] = {}
    for name, module in model.named_modules():
        name = known_as(name)
        if stacks_with(model, [name]):
            continue
        if type(module) is nn.Embedding and module.num_embeddings == size:
            both[name] = VocabParallelEmbedding()
        elif type(module) is nn.Linear and module.out_features == size:
            both[name] = ColwiseParallel(output_layouts=Replicate())
    if both:
        yield [both]


def _blocks(model: nn.Module, stacks: Iterable[str], ranks: int) -> Iterator[list[dict[str, ParallelStyle]]]:
    """Candidates in the order of registration, more projections before fewer, each with its alternatives."""
    for linears in (_by_kind_of_layer(model, stack) for stack in stacks):
        for place, (back, (wide, out, module)) in enumerate(linears):
            for count in range(min(_MOST, place), 0, -1):
                group = linears[place - count : place]
                if any(its[0] != out for _, its in group) or wide % ranks:
                    continue
                if any(its[1] % ranks for _, its in group):
                    continue
                rowwise = {back: Conv1DRowwiseParallel() if is_conv1d(module) else RowwiseParallel()}
                yield [
                    colwise | rowwise | numbers
                    for colwise in _colwise(group, wide)
                    for numbers in _numbers(model, [name for name, _ in group], (wide, *(its[1] for _, its in group)))
                ]


def _colwise(group: list[tuple[str, _Linear]], wide: int) -> Iterator[dict[str, ParallelStyle]]:
    if not any(is_conv1d(module) for _, (_, _, module) in group):
        yield {name: ColwiseParallel() for name, _ in group}
    else:
        yield {name: PackedColwiseParallel(1) for name, _ in group}
    if len(group) == 1:
        ((name, (_, out, _)),) = group
        if out > wide and out % wide == 0:
            yield {name: PackedColwiseParallel(out // wide)}
        elif out > wide and (out - wide) % 2 == 0:  # fewer heads for keys and values than for queries
            yield {name: PackedColwiseParallel((wide, (out - wide) // 2, (out - wide) // 2))}


def _numbers(model: nn.Module, names: list[str], widths: tuple[int, ...]) -> Iterator[dict[str, ParallelStyle]]:
    """Nothing, then what the module around the projections may say of heads, then of widths, divided over ranks.

    Embeddings in it with a column for every head, such as T5's biases by distance, are sharded with the heads.
    """
    yield {}
    owner = names[0].rpartition(".")[0]
    module = next((m for n, m in model.named_modules() if matches(owner, n)), None)
    integers = {n: v for n, v in vars(module).items() if type(v) is int} if module is not None else {}
    heads = [n for n in integers if "head" in n and "dim" not in n and "size" not in n and "group" not in n]
    wide = [n for n, value in integers.items() if value in widths and n not in heads and value > 1]
    counts = {integers[name] for name in heads}
    biases = [n for n, m in module.named_children() if _is_embedding(m, counts)] if module is not None else []
    if heads:
        yield {owner: HeadsPerRank(heads)}
    if biases:
        yield {owner: HeadsPerRank(heads), **{f"{owner}.{name}": ColwiseParallel() for name in biases}}
    if wide:
        yield {owner: HeadsPerRank(heads + wide)}


def _is_embedding(module: nn.Module, widths: set[int]) -> bool:
    return type(module) is nn.Embedding and module.embedding_dim in widths


_Linear = tuple[int, int, nn.Module]


def _by_kind_of_layer(model: nn.Module, stack: str) -> list[tuple[str, _Linear]]:
    """The linears of a stack with their widths by wildcard name, where all layers agree on them."""
    found: dict[str, dict[tuple[int, int], nn.Module]] = {}
    for name, module in model.get_submodule(stack).named_modules():
        if widths := features(module):
            key = f"{stack}." + re.sub(r"(^|(?<=\.))\d+(?=\.|$)", "*", name)
            found.setdefault(key, {}).setdefault(widths, module)
    return [(key, (*next(iter(its)), next(iter(its.values())))) for key, its in found.items() if len(its) == 1]
