"""Copy a model's module tree with stand-ins for what is left out. Tensors and configs are shared, never copied."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from am_pipeline.cut.boundary import Absent, Boundary
from am_pipeline.cut.units import Units
from am_pipeline.cut.weightless import Recorders


def copy_without(model: nn.Module, units: Units, held: set[str], boundary: Boundary, recorders: Recorders) -> nn.Module:
    """The model with stand-ins for every unit that is neither in `held` nor below a module that is.

    Args:
        model: the whole model; it is not changed.
        units: of that model.
        held: full names of the modules to keep.
        boundary: what the stand-ins read and write.
        recorders: by unit, the hooks by which the model's own code notes what it returned: of a stand-in, too.
    """
    memo: dict[int, Any] = {}
    kept = {id(m) for name in held for m in model.get_submodule(name).modules()}
    for name in units.names:
        if not any(name == n or name.startswith(f"{n}.") for n in held):
            module = model.get_submodule(name)
            if id(module) not in kept:
                stand_in = memo[id(module)] = Absent(module, name, boundary)
                for hook in recorders.get(name, ()):
                    stand_in.register_forward_hook(hook)
    for module in model.modules():
        if "config" in vars(module):
            memo[id(module.config)] = module.config
        for value in vars(module).values():  # a recurrent state left from an earlier forward
            if isinstance(value, torch.Tensor):
                memo[id(value)] = value.detach()
    for tensor in (*model.parameters(), *model.buffers()):
        memo[id(tensor)] = tensor
    part = copy.deepcopy(model, memo)
    for name, module in model.named_modules():
        if name and units.of(name) is None and hasattr(type(module), "dtype"):
            _keep_dtype(part.get_submodule(name), module, boundary)
    return part


def _keep_dtype(emptied: nn.Module, module: nn.Module, boundary: Boundary) -> None:
    """A transformers model reads its dtype and device from its parameters, of which a stage may hold none."""
    first = next(module.parameters(), None)
    if first is None or next(emptied.parameters(), None) is not None:
        return
    kind, device = type(emptied), property(lambda _: torch.device(boundary.device))
    # Transformers looks up by this name what a model records of its layers.
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    emptied.__class__ = type(kind.__name__, (kind,), {"dtype": module.dtype, "device": device, **names})
