"""The names in a plan: wildcards, modules with several names, and modules that a pipeline cut left out."""

from __future__ import annotations

import re
from functools import cache

from torch import nn
from torch.distributed.tensor.parallel import ParallelStyle

from am_tp_plans.adapters import known_as, planned_modules
from am_tp_plans.styles.basic import describe


def matches(key: str, name: str) -> bool:
    """Whether a key of a plan means a name, in which `*` stands for one level."""
    return _pattern(key).fullmatch(name) is not None


@cache
def _pattern(key: str) -> re.Pattern[str]:
    return re.compile(key.replace(".", r"\.").replace("*", r"[^.]+"))


def expand_plan(model: nn.Module, plan: dict[str, ParallelStyle]) -> dict[str, ParallelStyle]:
    """The plan with `*` (one level of a name) replaced by the modules there are, in the model's order.

    A module named by several keys takes the last. One that has several names, such as a layer that is used twice, is
    in it by the first. Modules without parameters that stand where a pipeline cut left them out are passed over. What
    a key says of a module in peft's `modules_to_save` it says of the copies there.

    Raises:
        ValueError: a key matches nothing, and nothing that was left out could be what it means; or a module has
            several names, for which the plan has other styles.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    absent = {name for name, module in modules.items() if name and _is_placeholder(module)}
    planned = [name for name, _ in planned_modules(model, all_names=True)]
    matched: dict[str, ParallelStyle] = {}
    for key, style in plan.items():
        names = [name for name in planned if matches(key, name) or matches(key, known_as(name))]
        if not names and not any(_may_mean(key, name) for name in absent):
            raise ValueError(
                f"the plan's key {key!r} matches no module of {type(model).__name__}; {_nearest(key, modules)}"
            )
        matched |= {name: style for name in names if name not in absent}
    _check_several_names(modules, matched)
    return {name: matched[name] for name, _ in model.named_modules() if name in matched}


def _check_several_names(modules: dict[str, nn.Module], matched: dict[str, ParallelStyle]) -> None:
    first: dict[int, str] = {}
    for name, module in modules.items():
        other = first.setdefault(id(module), name)
        if name != other and describe(matched.get(name)) != describe(matched.get(other)):
            said = [type(matched[n]).__name__ if n in matched else "no style" for n in (other, name)]
            raise ValueError(
                f"{other} and {name} are one module, for which the plan has {said[0]} and {said[1]}; give it one style "
                "under both names, or a module of its own (copy.deepcopy)"
            )


def _is_placeholder(module: nn.Module) -> bool:
    """Whether a module stands for one that a pipeline cut left out: nothing in it, and no layer of torch's own."""
    if any(True for group in (module.children(), module.parameters(), module.buffers()) for _ in group):
        return False
    return isinstance(module, nn.Identity) or not type(module).__module__.startswith("torch.nn.")


def is_part(model: nn.Module) -> bool:
    """Whether a pipeline cut left layers out: some of a list have parameters, others have nothing."""
    for module in model.modules():
        # layers have modules in them; an activation between two linears, in a list of the three, was always there
        if isinstance(module, nn.ModuleList) and any(True for layer in module for _ in layer.children()):
            empty = [_is_left_out(layer) for layer in module]
            if any(empty) and not all(empty):
                return True
    return False


def _is_left_out(layer: nn.Module) -> bool:
    """Whether it stands where a layer was: with nothing in it, and not one that computes something of its own."""
    if any(True for _ in layer.parameters()) or any(True for _ in layer.children()):
        return False
    runs = next(cls.__name__ for cls in type(layer).__mro__ if "forward" in vars(cls))
    return runs in ("Identity", "Module") or "boundary" in vars(layer)  # the last is am-pipeline's


def _may_mean(key: str, absent: str) -> bool:
    """Whether a key names a module that was left out, or something inside it."""
    levels = key.split(".")[: absent.count(".") + 1]
    return matches(".".join(levels), absent)


def _nearest(key: str, modules: dict[str, nn.Module]) -> str:
    leaf = key.rpartition(".")[2]
    same = sorted({re.sub(r"\.\d+(?=\.|$)", ".*", n) for n in modules if n.rpartition(".")[2] == leaf})
    return f"modules of that name are {same}" if same else f"there is no module called {leaf!r}"
