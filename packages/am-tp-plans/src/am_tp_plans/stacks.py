"""A model's stacks of layers: its lists of modules that are in no other list."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


def stacks_of(model: nn.Module) -> dict[str, nn.ModuleList]:
    """The stacks by name, in the model's order."""
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    return {name: module for name, module in lists.items() if not any(name.startswith(f"{other}.") for other in lists)}


def stacks_with(model: nn.Module, names: Iterable[str]) -> list[str]:
    """The stacks in which something is that is named here, a module or a parameter."""
    names = list(names)
    return [stack for stack in stacks_of(model) if any(name.startswith(f"{stack}.") for name in names)]


def largest_stack(model: nn.Module) -> str | None:
    """The stack with the most parameters, the first of equal ones; None for a model without layers."""
    sizes = {name: sum(p.numel() for p in layers.parameters()) for name, layers in stacks_of(model).items()}
    return max(sizes, key=lambda name: sizes[name]) if sizes else None
