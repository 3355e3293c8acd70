"""Copy a model's module tree with stand-ins for what is left out. Tensors and configs are shared, never copied."""

from __future__ import annotations

import copy

import torch
from torch import nn

from am_pipeline.anatomy import owners
from am_pipeline.boundary import AbsentLayer, AbsentModule, Boundary


def copy_without(model: nn.Module, stack: str, held: set[str], boundary: Boundary) -> nn.Module:
    """The model with stand-ins for every module that has parameters and is not in `held` or below one that is.

    A module without parameters of its own keeps its forward; only those of its children that have some are replaced.

    Args:
        model: the whole model; it is not changed.
        stack: full name of its decoder stack.
        held: full names of the modules to keep.
        boundary: what the stand-ins read and write.
    """
    memo: dict[int, object] = {}

    def visit(module: nn.Module, prefix: str) -> None:
        for name, child in module.named_children():
            full = f"{prefix}{name}"
            if full in held:
                continue
            if prefix == f"{stack}.":
                memo[id(child)] = AbsentLayer(child, int(name), boundary)
            elif full == stack or any(n.startswith(f"{full}.") for n in (*held, stack)):
                visit(child, f"{full}.")
            else:
                for owner_name, owner in owners(full, child):
                    memo[id(owner)] = AbsentModule(owner, owner_name, boundary)

    visit(model, "")
    for module in model.modules():
        if "config" in vars(module):
            memo[id(module.config)] = module.config
        for value in vars(module).values():  # a recurrent state left from an earlier forward
            if isinstance(value, torch.Tensor):
                memo[id(value)] = value.detach()
    for tensor in (*model.parameters(), *model.buffers()):
        memo[id(tensor)] = tensor
    return copy.deepcopy(model, memo)
