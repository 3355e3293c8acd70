"""The gradients of a model's whole parameters that see a share only, summed together: one all-reduce for all of them.

At the start of the model's forward the parameters are exchanged for local views that come out of one node of autograd,
and at its end they are back. In backward the node waits for all the views' gradients, sums them in one flat buffer per
dtype, and hands each to its parameter::

    norm 0 -- view 0 \\                         / gradient 0
    norm 1 -- view 1  } -> all-reduce of all ->   gradient 1    whole, before any hook of the parameters sees them
    ...

Where that cannot be, each layer sums its own (`local`): in a compiled graph, when a layer is called by itself or run
again by a checkpoint, and where FSDP2 holds the model, which reduces a unit's gradients before the last one is there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from am_tp_styles._torch_compat import local_of, spec_of
from am_tp_styles.axis import Axis
from am_tp_styles.communication import sum_over_ranks
from am_tp_styles.local_parameters import as_gradient

_NAMES = "_am_tp_styles_summed"
_OWNERS = "_am_tp_styles_summed_in"


def note_summed(module: Any, names: set[str]) -> None:
    """Note which of a module's own parameters are whole and see only a share, for `sum_gradients_together`."""
    setattr(module, _NAMES, tuple(sorted({*getattr(module, _NAMES, ()), *names})))


def sum_gradients_together(model: nn.Module, axis: Axis) -> nn.Module:
    """Let the whole parameters under `model` that its styles noted have their gradients summed in one go per backward.

    Gradients are whole when `backward()` returns, as they are without this; only the number of all-reduces changes.

    Returns:
        `model`.

    Collectives (the given axis, in backward): one all-reduce per forward and dtype.
    """
    owners = [module for module in model.modules() if getattr(module, _NAMES, ())]
    if owners:
        setattr(model, _OWNERS, (axis, owners, _between(model, owners)))
        model.register_forward_pre_hook(_exchange, prepend=True)
        model.register_forward_hook(_restore, always_call=True)
    return model


def _between(model: nn.Module, owners: list[nn.Module]) -> list[nn.Module]:
    """The modules that hold owners, and owners: those that FSDP2 may have wrapped to hold their parameters."""
    names = {name for name, module in model.named_modules() if any(module is owner for owner in owners)}
    above = {name.rsplit(".", levels)[0] for name in names for levels in range(name.count(".") + 1)}
    return [model, *(model.get_submodule(name) for name in sorted(above))]


def _exchange(model: Any, _args: tuple) -> None:
    axis, owners, between = getattr(model, _OWNERS)
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return
    if any(isinstance(module, FSDPModule) for module in between):
        return
    found = {}
    for owner in owners:
        for name in getattr(owner, _NAMES):
            parameter = owner._parameters.get(name)
            if isinstance(parameter, nn.Parameter) and parameter.requires_grad:
                found[id(parameter)] = parameter
    if not found:
        return
    views = dict(zip(found, _Together.apply(axis, *found.values()), strict=True))
    for owner in owners:
        held = owner._parameters
        owner.__dict__["_am_tp_styles_held"] = held
        owner._parameters = {name: views.get(id(parameter), parameter) for name, parameter in held.items()}


def _restore(model: Any, _args: tuple, _output: Any) -> None:
    for owner in getattr(model, _OWNERS)[1]:
        held = owner.__dict__.pop("_am_tp_styles_held", None)
        if held is not None:
            owner._parameters = held


class _Together(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, axis: Axis, *parameters: torch.Tensor) -> tuple[torch.Tensor, ...]:
        parts = [local_of(p) if isinstance(p, DTensor) else p.detach() for p in parameters]
        ctx.axis = axis
        ctx.forms = [(spec_of(p) if isinstance(p, DTensor) else None, p.stride()) for p in parameters]
        ctx.set_materialize_grads(False)
        return tuple(part.view_as(part) for part in parts)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple:
        summed = list(gradients)
        for dtype in dict.fromkeys(g.dtype for g in gradients if g is not None):
            places = [i for i, g in enumerate(gradients) if g is not None and g.dtype == dtype]
            if ctx.axis.size > 1:
                flat = torch.cat([gradients[i].reshape(-1) for i in places])
                pieces = sum_over_ranks(flat, ctx.axis).split([gradients[i].numel() for i in places])
                for i, piece in zip(places, pieces, strict=True):
                    # a copy, because two gradients in one buffer would keep each other alive
                    summed[i] = piece.view(gradients[i].shape).clone()
        given = zip(summed, ctx.forms, strict=True)
        return None, *(as_gradient(g, *form) if g is not None and form[0] is not None else g for g, form in given)
