"""A tensor-parallel plan for a model that brings none, from its structure, each step of it shown to be right."""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import nn
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel

from am_tp_plans.apply import expand_plan
from am_tp_plans.rehearsal import rehearse
from am_tp_plans.styles import VocabParallelEmbedding
from am_tp_plans.translate import complete, without_half_ties

# Projections of one input that a block may have before the one that leads back: query, key, value, gates.
_MOST = 5


def infer_plan(model: nn.Module, ranks: int = 2) -> dict[str, ParallelStyle]:
    """Look for projections that can be sharded, and keep those that a rehearsal shows to be right.

    In every kind of layer, runs of linears that read the hidden state, each followed by one that leads back to it, are
    tried as colwise and rowwise; so are the token embedding and the head over the vocabulary. Each is kept only if the
    model's own forward, run once without devices on one rank's share, needs nothing more (see `rehearsal.py`). Print
    the plan, edit it if you like, and give it to `apply_plan`; nothing uses it unless you do.

    Args:
        model: any model whose forward takes ids `(B, S)`, real or on meta.
        ranks: the size of the axis that widths have to divide over.

    Returns:
        A plan with `*` for the layers' numbers.

    Raises:
        ValueError: nothing in the model could be sharded.
    """
    plan: dict[str, ParallelStyle] = {}
    for candidate in (*_vocabulary(model), *_blocks(model, ranks)):
        if set(candidate) & set(plan):
            continue
        trial = without_half_ties(model, plan | candidate)
        if len(trial) == len(plan):
            continue
        try:
            concrete = expand_plan(model, trial)
            ran = rehearse(model, concrete, ranks).ran
        except ValueError:
            continue
        if ran == set(concrete):  # nothing is shown of what did not run
            plan = trial
    if not plan:
        raise ValueError(f"nothing in {type(model).__name__} was found that can be sharded over {ranks} ranks")
    return complete(model, plan)


def _vocabulary(model: nn.Module) -> Iterator[dict[str, ParallelStyle]]:
    config = getattr(model, "config", None)
    size = getattr(config, "vocab_size", None)
    both: dict[str, ParallelStyle] = {}
    stacks = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    for name, module in model.named_modules():
        if any(name.startswith(f"{stack}.") for stack in stacks):
            continue
        if type(module) is nn.Embedding and module.num_embeddings == size:
            both[name] = VocabParallelEmbedding()
        elif type(module) is nn.Linear and module.out_features == size:
            both[name] = ColwiseParallel(output_layouts=Replicate())
    if both:
        yield both


def _blocks(model: nn.Module, ranks: int) -> Iterator[dict[str, ParallelStyle]]:
    """Candidates in the order of registration, more projections before fewer."""
    for linears in _by_kind_of_layer(model):
        for place, (back, (wide, out)) in enumerate(linears):
            for count in range(min(_MOST, place), 0, -1):
                group = linears[place - count : place]
                if any(width != out for _, (width, _) in group) or wide % ranks:
                    continue
                if any(features % ranks for _, (_, features) in group):
                    continue
                yield {name: ColwiseParallel() for name, _ in group} | {back: RowwiseParallel()}


def _by_kind_of_layer(model: nn.Module) -> list[list[tuple[str, tuple[int, int]]]]:
    """For each list of layers, its linears with their widths by wildcard name, where all layers agree on them."""
    kinds = []
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    for stack in lists:
        if any(stack.startswith(f"{other}.") for other in lists if other != stack):
            continue
        widths: dict[str, set[tuple[int, int]]] = {}
        for name, module in model.get_submodule(stack).named_modules():
            if type(module) is nn.Linear:
                key = f"{stack}." + re.sub(r"(^|(?<=\.))\d+(?=\.|$)", "*", name)
                widths.setdefault(key, set()).add((module.in_features, module.out_features))
        kinds.append([(key, next(iter(its))) for key, its in widths.items() if len(its) == 1])
    return kinds
