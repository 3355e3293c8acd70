"""Find the plan for a model: the one given, the one named, the family's; never another one instead."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

from torch import nn
from torch.distributed.tensor.parallel import ParallelStyle

from am_tp_plans.expand import expand_plan
from am_tp_plans.proof.numeric_check import check_numbers
from am_tp_plans.proof.rehearsal import rehearse_training
from am_tp_plans.sources.infer import extend_plan, infer_plan
from am_tp_plans.sources.registry import PARALLELIZE_FUNCTIONS, family_function
from am_tp_plans.sources.sequence import add_sequence_parallelism
from am_tp_plans.sources.stock import what_was_edited
from am_tp_plans.sources.translate import complete, get_hf_tp_shard_plan, without_half_ties
from am_tp_plans.stacks import largest_stack, stacks_with
from am_tp_plans.styles.heads import fewest_ranks


def resolve_plan(
    model: nn.Module,
    plan: dict[str, ParallelStyle] | str | None = None,
    *,
    sequence_parallel: bool = False,
    infer: bool = False,
    example_inputs: dict[str, Any] | None = None,
) -> dict[str, ParallelStyle]:
    """The tensor-parallel plan for a model, as a dict from module names (with `*` for one level) to styles.

    A family's plan is taken as it is for a model that is as transformers builds it, with adapters of peft or without.
    For one that was edited (another module or forward in it, a hook, a subclass) it is rehearsed and run with numbers
    first; where it does not fit, the plan that the model brings takes its place.

    In this order: `plan` itself if it is a dict; what the import path `plan` names, a dict or a function of
    `(model, sequence_parallel)`, of the model, or of nothing; the function that `PARALLELIZE_FUNCTIONS` has for the
    model's class; the plan that the model brings itself (`get_hf_tp_shard_plan`), with `add_sequence_parallelism`. With
    `infer`, what `infer_plan` finds takes the place of a plan that there is none of, or that shards no stack of layers,
    and what it finds in a stack that a plan leaves whole, such as a vision tower, is added.
    `example_inputs` are keyword arguments of a forward, for a model that takes more or other than ids `(B, S)`.

    Raises:
        ValueError: the path does not lead to a plan, or the model's class has none; names what there is. Or no plan is
            shown to be right for a model that was edited.
        TypeError: `plan` is something else, or a plan has a value that is not a `ParallelStyle`.
    """
    if isinstance(plan, dict):
        return _checked(plan, "plan")
    if isinstance(plan, str):
        return _checked(_from_path(plan, model, sequence_parallel), plan)
    if plan is not None:
        raise TypeError(f"plan must be a dict, an import path or None, got {type(plan).__name__}")
    refused: str | None = None
    if type(model) in PARALLELIZE_FUNCTIONS:
        plan = without_half_ties(model, PARALLELIZE_FUNCTIONS[type(model)](model, sequence_parallel))
        edited = what_was_edited(model) if family_function(model) else None
        try:
            plan = plan if edited is None else _proven(model, plan, example_inputs)
            return extend_plan(model, plan, example_inputs=example_inputs) if infer else plan
        except (ValueError, TypeError) as error:
            if edited is None:
                raise
            refused = f"the model is not as transformers builds it, {edited}, and its family's plan fails: {error}"
    try:
        return _derived(model, sequence_parallel, infer, example_inputs)
    except (ValueError, TypeError) as error:
        if refused is None:
            raise
        again = "" if f"{error}" in refused else f": {error}"
        raise ValueError(f"{refused}; so does a plan that is derived for it{again}") from error


def _proven(
    model: nn.Module, plan: dict[str, ParallelStyle], example_inputs: dict[str, Any] | None
) -> dict[str, ParallelStyle]:
    """The plan with what a rehearsal finds missing, shown to be right as a derived one is."""
    plan = complete(model, plan, example_inputs)
    rehearse_training(model, expand_plan(model, plan), fewest_ranks(model), example_inputs)
    check_numbers(model, plan, 2, example_inputs)
    return plan


def _derived(
    model: nn.Module, sequence_parallel: bool, infer: bool, example_inputs: dict[str, Any] | None
) -> dict[str, ParallelStyle]:
    """The plan from what the model brings, or from its structure."""
    derived = _without_sequence(model, infer, example_inputs)
    if derived is None:
        kind = "sequence-parallel" if sequence_parallel else "tensor-parallel"
        known = "\n  ".join(PARALLELIZE_FUNCTIONS)
        raise ValueError(
            f"there is no {kind} plan for {type(model).__module__}.{type(model).__qualname__}; "
            f"pass one as a dict or an import path, or infer=True (infer_plan may find one). Known are\n  {known}"
        )
    if sequence_parallel:
        return add_sequence_parallelism(model, derived, example_inputs=example_inputs)
    return derived


def _without_sequence(
    model: nn.Module, infer: bool, example_inputs: dict[str, Any] | None
) -> dict[str, ParallelStyle] | None:
    """The plan that the model brings if it shards the largest stack, or if that is asked for, extended or inferred."""
    brought = get_hf_tp_shard_plan(model, example_inputs=example_inputs) if getattr(model, "_tp_plan", None) else None
    if brought is None:
        return infer_plan(model, example_inputs=example_inputs) if infer else None
    sharded, left = stacks_with(model, expand_plan(model, brought)), largest_stack(model)
    if infer and not sharded:
        return infer_plan(model, example_inputs=example_inputs)
    if infer:
        return extend_plan(model, brought, example_inputs=example_inputs)
    if left is None or left in sharded:
        return brought
    try:
        inner = sorted(key for key in infer_plan(model, example_inputs=example_inputs) if key.startswith(f"{left}."))
        found = f"infer_plan finds {inner}" if inner else "infer_plan finds nothing in it either"
    except ValueError:
        found = "infer_plan finds nothing either"
    raise ValueError(
        f"the plan that {type(model).__name__} brings shards {sorted(brought)}, but nothing of {left}, its largest "
        f"stack of layers; {found}. Pass a plan of your own, or infer=True"
    )


def _from_path(path: str, model: nn.Module, sequence_parallel: bool) -> object:
    module_name, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module_name), name)
    except (ImportError, ValueError, AttributeError) as error:
        raise ValueError(f"the plan {path!r} cannot be imported: {error}") from error
    return _called(found, model, sequence_parallel) if callable(found) else found


def _called(function: Any, *arguments: Any) -> object:
    """What a function returns for as many of the arguments as it takes."""
    for count in range(len(arguments), -1, -1):
        try:
            inspect.signature(function).bind(*arguments[:count])
        except TypeError:
            continue
        return function(*arguments[:count])
    raise TypeError(f"{function!r} must take (model, sequence_parallel), the model, or nothing")


def _checked(plan: object, label: str) -> dict[str, ParallelStyle]:
    if not isinstance(plan, dict):
        raise TypeError(f"{label} must be or return a dict of parallel styles, got {type(plan).__name__}")
    for name, style in plan.items():
        if not isinstance(name, str) or not isinstance(style, ParallelStyle):
            raise TypeError(f"{label}: {name!r} has {style!r}, which is not a torch ParallelStyle")
    return plan
