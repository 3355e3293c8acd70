"""Copy a model's module tree with stand-ins for what is left out. Tensors and configs are shared, never copied."""

from __future__ import annotations

import copy

import torch
from torch import nn

from am_pipeline.cut.boundary import Absent, Boundary
from am_pipeline.cut.units import Units


def copy_without(model: nn.Module, units: Units, held: set[str], boundary: Boundary) -> nn.Module:
    """The model with stand-ins for every unit that is neither in `held` nor below a module that is.

    Args:
        model: the whole model; it is not changed.
        units: of that model.
        held: full names of the modules to keep.
        boundary: what the stand-ins read and write.
    """
    memo: dict[int, object] = {}
    kept = {id(m) for name in held for m in model.get_submodule(name).modules()}
    for name in units.names:
        if not any(name == n or name.startswith(f"{n}.") for n in held):
            module = model.get_submodule(name)
            if id(module) not in kept:
                memo[id(module)] = Absent(module, name, boundary)
    for module in model.modules():
        if "config" in vars(module):
            memo[id(module.config)] = module.config
        for value in vars(module).values():  # a recurrent state left from an earlier forward
            if isinstance(value, torch.Tensor):
                memo[id(value)] = value.detach()
    for tensor in (*model.parameters(), *model.buffers()):
        memo[id(tensor)] = tensor
    return copy.deepcopy(model, memo)
