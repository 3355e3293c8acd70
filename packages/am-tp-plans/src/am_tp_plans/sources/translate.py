"""transformers' own tensor-parallel plans, in real parallel styles."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.distributed.tensor import Placement, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel

from am_tp_plans.adapters import known_as, planned_modules, trains_rows
from am_tp_plans.config import config_value
from am_tp_plans.expand import expand_plan, is_part, matches
from am_tp_plans.proof.numeric_check import check_numbers
from am_tp_plans.proof.rehearsal import rehearse, rehearse_training
from am_tp_plans.proof.watch import ReadDirectlyError
from am_tp_plans.sources.shared_inputs import share_inputs
from am_tp_plans.styles.basic import (
    NormOnShard,
    Several,
    VocabParallelEmbedding,
    each,
)
from am_tp_plans.styles.experts import ExpertsOverTensorAxis
from am_tp_plans.styles.heads import fewest_ranks
from am_tp_plans.styles.local import (
    DividedInput,
    LocalShards,
    MlaKvAProjection,
    Replicated,
    ReplicatedWithGradAllReduce,
)
from am_tp_styles.layout import base_layer

_STYLES = {
    "colwise": lambda: ColwiseParallel(),
    "rowwise": lambda: RowwiseParallel(),
    "colwise_gather_output": lambda: ColwiseParallel(output_layouts=Replicate()),
    "colwise_rep": lambda: ColwiseParallel(output_layouts=Replicate()),
    "rowwise_split_input": lambda: RowwiseParallel(input_layouts=Replicate()),
    "rowwise_rep": lambda: RowwiseParallel(input_layouts=Replicate()),
    "embedding_rowwise": lambda: VocabParallelEmbedding(),
    "embedding_colwise": lambda: ColwiseParallel(output_layouts=Replicate()),
    "sequence_parallel": lambda: NormOnShard(use_local_output=True),
    "replicated_with_grad_allreduce": lambda: ReplicatedWithGradAllReduce(),
    "mla_kv_a_proj": lambda: MlaKvAProjection(),
    "all_reduce": lambda: LocalShards(sum_input_gradients=True, sum_output=True),
    "local_params": lambda: LocalShards(),
    "moe_tp_experts": lambda: ExpertsOverTensorAxis(),
    "moe_identity_expert": lambda: DividedInput(),
    "replicate": lambda: Replicated(),
}
# What these say of a parameter is part of the style of the module that owns it.
_OF_PARAMETERS = ("packed_colwise", "packed_rowwise")


def translate_to_torch_parallel_style(style: str) -> ParallelStyle:
    """The parallel style that one of transformers' style names stands for; a new one at every call.

    `packed_colwise` and `packed_rowwise` lay out a fused parameter inside the style of its owner; for a module of
    stacked experts that is `ExpertsOverTensorAxis`, which keeps each expert's fused projections whole.

    Raises:
        ValueError: an unknown name; lists those there are.
        TypeError: not a string.
    """
    if not isinstance(style, str):
        raise TypeError(f"a style is named by a string, got {type(style).__name__}")
    if style in _OF_PARAMETERS:
        return ExpertsOverTensorAxis()
    if style not in _STYLES:
        known = ", ".join(sorted((*_STYLES, *_OF_PARAMETERS)))
        raise ValueError(f"{style!r} is not a tensor-parallel style of transformers; there are {known}")
    return _STYLES[style]()


class NoPlanError(ValueError, AssertionError):
    """A model without a plan. An AssertionError, too: code written for nemo-automodel catches that."""


def get_hf_tp_shard_plan(model: nn.Module, *, example_inputs: dict[str, Any] | None = None) -> dict[str, ParallelStyle]:
    """The tensor-parallel plan that a transformers model brings, collected from its class, itself and its inner models.

    Keys that match nothing in this model are left out (the plans list alternatives, such as dense and sparse layers),
    and so is a style for one of two tied weights where the other one has none. What names a parameter becomes part
    of the style of the module that owns it.

    Args:
        model: any transformers model; anything with `_tp_plan` dicts of style names.
        example_inputs: keyword arguments of a forward, for a model that takes more or other than ids `(B, S)`; small
            ones do, with at least two sequences and a length that divides over the ranks.

    Returns:
        A plan for `apply_plan`, with full module names (`*` for one level) as keys.

    Raises:
        ValueError: the model brings no plan (then an AssertionError, too), one with an unknown style, one whose parts
            contradict each other or that would give wrong results, found out by running the model's forward once
            without devices (`rehearsal.py`) and a small twin of it with numbers (`numeric_check.py`); or the model is a
            pipeline part.
    """
    named = named_styles(model)
    if is_part(model):
        raise ValueError(
            f"this {type(model).__name__} is a part of a cut model, on which its plan cannot be checked; make the plan "
            "of the whole model before the cut and apply that to the parts"
        )
    if not named:
        raise NoPlanError(f"{type(model).__name__} brings no tensor-parallel plan")
    modules = {known_as(name): module for name, module in planned_modules(model)}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    plan: dict[str, ParallelStyle] = {}
    layouts: dict[str, dict[str, Placement]] = {}
    widths: dict[str, set[int]] = {}
    for key, style in named.items():
        translated = translate_to_torch_parallel_style(style)
        if any(matches(key, name) for name in modules):
            plan[key] = translated
        elif matched := [name for name in parameters if matches(key, name)]:
            owner, _, leaf = key.rpartition(".")
            shape = parameters[matched[0]].shape
            dim = _sharded_dim(style, len(shape))
            layouts.setdefault(owner, {})[leaf] = Shard(dim)
            widths.setdefault(owner, set()).add(shape[dim])
    for owner, its in layouts.items():
        _lay_out(plan, owner, its, fused=len(widths[owner]) > 1)
    for key in [key for key, style in plan.items() if isinstance(style, MlaKvAProjection)]:
        del plan[key]
        for name in filter(lambda name: matches(key, name), modules):
            owner = modules[name.rpartition(".")[0]]
            plan[name] = MlaKvAProjection(getattr(owner, "qk_rope_head_dim", config_value(model, "qk_rope_head_dim")))
    plan = share_inputs(model, complete(model, without_half_ties(model, plan), example_inputs), example_inputs)
    rehearse_training(model, expand_plan(model, plan), fewest_ranks(model), example_inputs)
    check_numbers(model, plan, 2, example_inputs)
    return plan


def complete(
    model: nn.Module, plan: dict[str, ParallelStyle], example_inputs: dict[str, Any] | None = None
) -> dict[str, ParallelStyle]:
    """The plan with what a rehearsal finds missing: whole parameters that meet a rank's share of the activations."""
    while True:
        try:
            found = rehearse(model, expand_plan(model, plan), fewest_ranks(model), example_inputs)
        except ValueError as error:
            if not isinstance(error.__cause__, ReadDirectlyError):
                raise
            owner = known_as(error.__cause__.parameter.rpartition(".")[0]).removesuffix(".base_layer")
            plan = without_half_ties(model, {k: style for k, style in plan.items() if not matches(k, owner)})
            continue
        break
    plan = dict(plan)
    for key, names in _by_key(model, found.partial).items():
        style = plan.get(key, next((s for k, s in reversed(plan.items()) if matches(k, key)), None))
        plan[key] = _summing(key, style, names)
    return plan


def _by_key(model: nn.Module, parameters: Iterable[str]) -> dict[str, set[str]]:
    """The parameters' names by the key of their owners, with `*` for the layers if it is so in all of them."""
    leaves: dict[str, set[str]] = {}
    for name in sorted(parameters):
        owner, _, leaf = name.rpartition(".")
        leaves.setdefault(known_as(owner), set()).add(leaf)
    modules = {known_as(name) for name, _ in planned_modules(model)}
    keys: dict[str, set[str]] = {}
    for owner, names in leaves.items():
        key = re.sub(r"\.\d+(?=\.|$)", ".*", owner)
        alike = all(leaves.get(name) == names for name in modules if matches(key, name))
        keys[key if alike else owner] = names
    return keys


def _summing(owner: str, style: ParallelStyle | None, names: set[str]) -> ParallelStyle:
    """The style of a module, with the gradients of some of its parameters summed."""
    if style is None:
        return ReplicatedWithGradAllReduce(names)
    if isinstance(style, ReplicatedWithGradAllReduce):
        return style
    if isinstance(style, LocalShards):
        changed = copy.copy(style)
        changed.partial = style.partial | names
        return changed
    if not all(getattr(part, "lora_neutral", False) for part in each(style)):
        raise ValueError(f"{owner} has {type(style).__name__}, but its {sorted(names)} meet sharded activations")
    return Several(*(part for part in each(style)), ReplicatedWithGradAllReduce(names))


def named_styles(model: nn.Module) -> dict[str, str]:
    """The names of styles that a model brings, by full key; outer plans go before inner ones."""
    found: dict[str, str] = {}
    for prefix, module in model.named_modules():
        for source in (getattr(module, "_tp_plan", None), getattr(type(module), "_tp_plan", None)):
            for key, style in (source or {}).items():
                found.setdefault(f"{prefix}.{key}" if prefix else key, style)
    return found


def _sharded_dim(style: str, dims: int) -> int:
    if style in ("colwise", "packed_colwise"):
        return max(dims - 2, 0)
    return dims - 1


def _lay_out(plan: dict[str, ParallelStyle], owner: str, layouts: dict[str, Placement], fused: bool) -> None:
    style = plan.get(owner)
    if isinstance(style, ExpertsOverTensorAxis) and fused:  # a slice of gate and up side by side is neither
        return
    if isinstance(style, ExpertsOverTensorAxis):  # nothing fused: every expert's features over the ranks
        plan[owner] = LocalShards(layouts, sum_input_gradients=True, sum_output=True)
        return
    if not isinstance(style, LocalShards):
        raise ValueError(f"the plan lays out {sorted(layouts)} of {owner}, but has no style for {owner} that uses them")
    style.layouts |= layouts


def without_half_ties(model: nn.Module, plan: dict[str, ParallelStyle]) -> dict[str, ParallelStyle]:
    """The plan without embeddings and heads that cannot be sharded, and without a style for some of tied weights only.

    What a module takes and returns is whole with such a style and without it.
    """
    named = [(known_as(name), module) for name, module in planned_modules(model)]
    whole = {key for key, style in plan.items() if _keeps_whole(style)}
    more = [name for name, module in named if _has_more_than_a_weight(module)]
    other = [name for name, module in named if _is_no_table(module)]
    plan = {
        key: style
        for key, style in plan.items()
        if not any(matches(key, name) for name in more) and not (key in whole and any(matches(key, n) for n in other))
    }
    names: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), set()).add(_owner(name))
    dropped = set()
    for owners in names.values():
        keys = [[key for key in plan if matches(key, owner)] for owner in owners] if len(owners) > 1 else []
        if not all(keys):
            dropped |= {key for matched in keys for key in matched}
    return {key: style for key, style in plan.items() if key not in dropped}


def _keeps_whole(style: ParallelStyle) -> bool:
    """Whether a style of a linear or embedding changes nothing for the modules around it."""
    if not isinstance(style, (ColwiseParallel, RowwiseParallel)):
        return False
    return style.input_layouts[0] == Replicate() == style.output_layouts[0]


def _owner(parameter: str) -> str:
    """The module that a plan would name for a parameter."""
    owner = known_as(parameter.rpartition(".")[0])
    return owner.split(".token_adapter")[0].removesuffix(".base_layer")


def _is_no_table(module: nn.Module) -> bool:
    """Whether it is no linear and no embedding, with an adapter or without."""
    if trains_rows(module):
        return True
    return not isinstance(base_layer(module), (nn.Linear, nn.Embedding)) and any(True for _ in module.parameters())


def _has_more_than_a_weight(module: nn.Module) -> bool:
    """Whether an embedding has a norm in it, or a row of its own: no rank could compute that on its rows alone."""
    if not isinstance(module, nn.Embedding):
        return False
    return any(True for _ in module.children()) or any(name != "weight" for name, _ in module.named_parameters())
