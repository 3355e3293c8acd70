"""Find the plan for a model: the one given, the one named, the family's; never another one instead."""

from __future__ import annotations

import importlib

from torch import nn
from torch.distributed.tensor.parallel import ParallelStyle

from am_tp_plans.registry import PARALLELIZE_FUNCTIONS
from am_tp_plans.sequence import add_sequence_parallelism
from am_tp_plans.translate import get_hf_tp_shard_plan


def resolve_plan(
    model: nn.Module, plan: dict[str, ParallelStyle] | str | None = None, *, sequence_parallel: bool = False
) -> dict[str, ParallelStyle]:
    """The tensor-parallel plan for a model, as a dict from module names (with `*` for one level) to styles.

    In this order: `plan` itself if it is a dict; what the import path `plan` names, a dict or a function of
    `(model, sequence_parallel)`; the function that `PARALLELIZE_FUNCTIONS` has for the model's class; the plan that
    the model brings itself (`get_hf_tp_shard_plan`), with `add_sequence_parallelism`. A plan is never inferred here:
    see `infer_plan`.

    Raises:
        ValueError: the path does not lead to a plan, or the model's class has none; names what there is.
        TypeError: `plan` is something else, or a plan has a value that is not a `ParallelStyle`.
    """
    if isinstance(plan, dict):
        return _checked(plan, "plan")
    if isinstance(plan, str):
        return _checked(_from_path(plan, model, sequence_parallel), plan)
    if plan is not None:
        raise TypeError(f"plan must be a dict, an import path or None, got {type(plan).__name__}")
    if type(model) not in PARALLELIZE_FUNCTIONS and getattr(model, "_tp_plan", None):
        brought = get_hf_tp_shard_plan(model)
        return add_sequence_parallelism(model, brought) if sequence_parallel else brought
    if type(model) not in PARALLELIZE_FUNCTIONS:
        kind = "sequence-parallel" if sequence_parallel else "tensor-parallel"
        known = "\n  ".join(PARALLELIZE_FUNCTIONS)
        raise ValueError(
            f"there is no {kind} plan for {type(model).__module__}.{type(model).__qualname__}; "
            f"pass one as a dict or an import path (infer_plan may find one). Known are\n  {known}"
        )
    return PARALLELIZE_FUNCTIONS[type(model)](model, sequence_parallel)


def _from_path(path: str, model: nn.Module, sequence_parallel: bool) -> object:
    module_name, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module_name), name)
    except (ImportError, ValueError, AttributeError) as error:
        raise ValueError(f"the plan {path!r} cannot be imported: {error}") from error
    return found(model, sequence_parallel) if callable(found) else found


def _checked(plan: object, label: str) -> dict[str, ParallelStyle]:
    if not isinstance(plan, dict):
        raise TypeError(f"{label} must be or return a dict of parallel styles, got {type(plan).__name__}")
    for name, style in plan.items():
        if not isinstance(name, str) or not isinstance(style, ParallelStyle):
            raise TypeError(f"{label}: {name!r} has {style!r}, which is not a torch ParallelStyle")
    return plan
