"""The parameters of a compiled layer, exchanged together for this rank's parts while the layer runs.

A layer that is compiled by itself (`layer.compile()`) then takes plain tensors, for which a compiled graph has nothing
to wrap and unwrap, and one node of autograd makes DTensors of all their gradients. In a layer that is not compiled each
module exchanges its own; what reads another module's parameter there meets a DTensor, and torch refuses to mix them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from am_tp_styles._torch_compat import is_compiled, local_of, spec_of
from am_tp_styles.axis import Axis
from am_tp_styles.classes import put_under
from am_tp_styles.communication import sum_over_ranks
from am_tp_styles.local_parameters import as_gradient

_NOTED = "_am_tp_styles_local"
_OWNERS = "_am_tp_styles_owners"


def note_local(module: Any, summed: dict[str, bool]) -> None:
    """Note which of its own parameters a module takes as local parts, and whether their gradients are to be summed."""
    setattr(module, _NOTED, noted(module) | summed)


def noted(module: nn.Module) -> dict[str, bool]:
    return vars(module).get(_NOTED, {})  # peft's wrappers answer for the attributes of what they wrap


def exchange_by_layer(model: nn.Module, axis: Axis) -> None:
    """Let every layer in a list of layers exchange its parameters together when compiled. Issues no collective."""
    for stack in model.modules():
        for layer in stack if isinstance(stack, nn.ModuleList) else ():
            owners = [module for module in layer.modules() if noted(module)]
            if owners and not isinstance(layer, ExchangesParameters):
                setattr(layer, _OWNERS, (axis, owners, holders(layer, owners)))
                put_under(layer, ExchangesParameters)


def holders(module: nn.Module, owners: list[nn.Module]) -> list[nn.Module]:
    """The module, `owners` under it and what lies between: those that FSDP2 may have wrapped to hold parameters."""
    names = {name for name, child in module.named_modules() if any(child is owner for owner in owners)}
    above = {name.rsplit(".", levels)[0] for name in names for levels in range(name.count(".") + 1)}
    return [module, *(module.get_submodule(name) for name in sorted(above) if name)]


class ExchangesParameters(nn.Module):
    """Under a layer's class and over `nn.Module`: inside a checkpoint, which runs it again, and outside a compiler."""

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        axis, owners, between = getattr(self, _OWNERS)
        held_by_fsdp = any(isinstance(module, FSDPModule) for module in between)
        if torch.compiler.is_compiling() or not is_compiled(self) or held_by_fsdp:
            return super().__call__(*args, **kwargs)
        held = [(owner, owner._parameters) for owner in owners]
        exchange(owners, axis)
        try:
            return super().__call__(*args, **kwargs)
        finally:
            for owner, parameters in held:
                vars(owner)["_parameters"] = parameters


def exchange(owners: list[Any], axis: Axis, *, summed_only: bool = False) -> None:
    """Put views in the place of the owners' noted parameters; the caller puts back what it held.

    Frozen ones have no gradient to sum: a checkpoint, which runs a layer again without this, has to find them the same.
    """
    found: dict[int, tuple[torch.Tensor, bool]] = {}
    for owner in owners:
        notes = vars(owner)[_NOTED]
        for name, parameter in owner._parameters.items():  # in the model's order, which every rank has alike
            summed = notes.get(name, False)
            sharded = name in notes and not summed_only and isinstance(parameter, DTensor)
            wanted = sharded or (summed and parameter is not None and parameter.requires_grad)
            if wanted and isinstance(parameter, nn.Parameter):
                found[id(parameter)] = (parameter, summed)
    if found:
        parameters, sums = zip(*found.values(), strict=True)
        views = dict(zip(found, _Views.apply(axis, sums, *parameters), strict=True))
        for owner in owners:  # past `nn.Module.__setattr__`, which costs more than the dict
            held = owner._parameters
            vars(owner)["_parameters"] = {name: views.get(id(held[name]), held[name]) for name in held}


class _Views(torch.autograd.Function):
    """Views of this rank's parts; backward one sum of all gradients that are to be summed, by dtype."""

    @staticmethod
    def forward(ctx: Any, axis: Axis, sums: tuple[bool, ...], *parameters: torch.Tensor) -> tuple[torch.Tensor, ...]:
        parts = [local_of(p) if isinstance(p, DTensor) else p.detach() for p in parameters]
        ctx.axis, ctx.sums = axis, sums
        specs = (spec_of(p) if isinstance(p, DTensor) else None for p in parameters)
        ctx.forms = [(spec, part.stride()) for spec, part in zip(specs, parts, strict=True)]
        ctx.set_materialize_grads(False)
        views = tuple(part.view_as(part) for part in parts)
        ctx.mark_non_differentiable(*(v for v, p in zip(views, parameters, strict=True) if not p.requires_grad))
        return views

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple:
        whole = list(gradients)
        places = [i for i, g in enumerate(gradients) if g is not None and ctx.sums[i] and ctx.axis.size > 1]
        for dtype in dict.fromkeys(gradients[i].dtype for i in places):
            these = [i for i in places if gradients[i].dtype == dtype]
            flat = sum_over_ranks(torch.cat([gradients[i].reshape(-1) for i in these]), ctx.axis)
            for i, piece in zip(these, flat.split([gradients[i].numel() for i in these]), strict=True):
                # a copy, because two gradients in one buffer would keep each other alive
                whole[i] = piece.view(gradients[i].shape).clone()
        given = zip(whole, ctx.forms, strict=True)
        return None, None, *(as_gradient(g, *form) if g is not None and form[0] is not None else g for g, form in given)
