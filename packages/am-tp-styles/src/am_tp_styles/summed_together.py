"""The gradients of a model's whole parameters that see a share only, summed together: one all-reduce for all of them.

At the start of the model's forward the parameters are exchanged for local views that come out of one node of autograd,
and at its end they are back. In backward the node waits for all the views' gradients, sums them in one flat buffer per
dtype, and hands each to its parameter::

    norm 0 -- view 0 \\                         / gradient 0
    norm 1 -- view 1  } -> all-reduce of all ->   gradient 1    whole, before any hook of the parameters sees them
    ...

Where that cannot be, each layer sums its own: in a compiled graph, when a layer is called by itself or run again by a
checkpoint, and where FSDP2 holds the model, which reduces a unit's gradients before the last one is there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from am_tp_styles.axis import Axis
from am_tp_styles.layer_parameters import exchange, exchange_by_layer, holders, noted

_OWNERS = "_am_tp_styles_summed_in"
_HELD = "_am_tp_styles_held"


def sum_gradients_together(model: nn.Module, axis: Axis) -> nn.Module:
    """Let the parameters under `model`, whose styles are attached, be exchanged together: by layer, and those that are
    whole and see only a share for the whole model.

    Gradients are whole when `backward()` returns, as they are without this; only the number of all-reduces changes.

    Returns:
        `model`.

    Collectives (the given axis, in backward): one all-reduce per forward and dtype.
    """
    exchange_by_layer(model, axis)
    owners = [module for module in model.modules() if any(noted(module).values())]
    if owners:
        setattr(model, _OWNERS, (axis, owners, holders(model, owners)))
        model.register_forward_pre_hook(_exchange, prepend=True)
        model.register_forward_hook(_restore, always_call=True)
    return model


def _exchange(model: Any, _args: tuple) -> None:
    axis, owners, between = getattr(model, _OWNERS)
    compiling = torch.compiler.is_compiling()
    if compiling or not torch.is_grad_enabled() or any(isinstance(module, FSDPModule) for module in between):
        return
    for owner in owners:
        vars(owner)[_HELD] = owner._parameters
    exchange(owners, axis, summed_only=True)


def _restore(model: Any, _args: tuple, _output: Any) -> None:
    for owner in getattr(model, _OWNERS)[1]:
        held = vars(owner).pop(_HELD, None)
        if held is not None:
            vars(owner)["_parameters"] = held
