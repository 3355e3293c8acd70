"""What peft puts around modules, told by its structure.

A plan knows a module by the name that it has without peft. `modules_to_save` keeps the module beside a copy for every
adapter, of which one runs; what a plan says of the module is said of all of them::

    lm_head                                 the wrapper: nothing of its own
    lm_head.original_module                 runs while adapters are disabled     known as lm_head
    lm_head.modules_to_save.default         runs and is trained otherwise        known as lm_head
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from am_tp_styles.layout import has_own_adapter, is_wrapped

_COPY = re.compile(r"\.(original_module|modules_to_save\.[^.]+)(?=\.|$)")


def known_as(name: str) -> str:
    """The name by which a plan knows a module."""
    return _COPY.sub("", name)


def has_copies(module: nn.Module) -> bool:
    """Whether a module is peft's wrapper of `modules_to_save`."""
    inner = dict(module.named_children())
    return "original_module" in inner and isinstance(inner.get("modules_to_save"), nn.ModuleDict)


def planned_modules(model: nn.Module, *, all_names: bool = False) -> Iterator[tuple[str, nn.Module]]:
    """The modules by full name, without those of peft that only hold copies; with `all_names`, some several times."""
    for name, module in model.named_modules(remove_duplicate=not all_names):
        if has_copies(module):
            continue
        owner, _, leaf = name.rpartition(".")
        if leaf != "modules_to_save" or not has_copies(model.get_submodule(owner)):
            yield name, module


def with_their_copies(model: nn.Module, names: Iterable[str]) -> frozenset[str]:
    """These names and those of the copies that would run in their place with another adapter, or with none."""
    known = {known_as(name) for name in names}
    copies = {name for name, _ in model.named_modules() if known_as(name) != name and known_as(name) in known}
    return frozenset(names) | copies


def trains_rows(module: nn.Module) -> bool:
    """Whether a module is peft's wrapper of `trainable_token_indices`, which puts a few rows into a whole weight."""
    return isinstance(getattr(dict(module.named_children()).get("token_adapter"), "base_layer", None), nn.Module)


def without_peft(module: Any) -> nn.Module:
    """The module that was there before peft."""
    inner = dict(module.named_children())
    if has_copies(module):
        return without_peft(inner["original_module"])
    if trains_rows(module):
        return without_peft(inner["token_adapter"].base_layer)
    return without_peft(module.base_layer) if is_wrapped(module) else module


def why_not_sharded(name: str, module: nn.Module) -> str | None:
    """What to say of a module that peft made into something that no style shards; None for any other."""
    if trains_rows(module):
        return (
            f"{name} trains single rows (peft's trainable_token_indices), which no rank could on its rows alone; leave "
            "it whole (resolve_plan does, for the model with its adapters), or train all of it (modules_to_save)"
        )
    inner = dict(module.named_children()).get("base_layer")
    if inner is not None and not is_wrapped(module) and not has_own_adapter(module):
        kind = type(module)
        return (
            f"{name} is an adapter layer {kind.__module__}.{kind.__qualname__} around a {type(inner).__name__}; of "
            "peft's adapters only LoRA has a tensor-parallel form here: use LoRA, merge_and_unload() the adapter, or "
            "leave this module out of the plan"
        )
    return None
