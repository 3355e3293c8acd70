"""This rank's part of a parameter as a plain tensor, whose gradient becomes the parameter's own on its way back."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from am_tp_styles._torch_compat import local_of, spec_of, with_spec
from am_tp_styles.axis import Axis
from am_tp_styles.communication import sum_gradients, sum_over_ranks


@contextmanager
def local_parameters(module: Any, axis: Axis, summed: Collection[str] = ()) -> Iterator[None]:
    """Inside, the module's own parameters are this rank's parts; the gradients of those in `summed` are summed."""
    held = module._parameters
    module._parameters = local_views(module, axis, summed)
    try:
        yield
    finally:
        module._parameters = held


def local_views(module: Any, axis: Axis, summed: Collection[str] = ()) -> dict[str, Any]:
    """What `local_parameters` puts in the place of the module's own parameters."""
    return {
        name: None if parameter is None else local(parameter, axis if name in summed else None)
        for name, parameter in module._parameters.items()
    }


def local(parameter: torch.Tensor, axis: Axis | None = None) -> torch.Tensor:
    """A parameter's part on this rank; with an axis, of a whole one whose gradient is a summand on each rank.

    Args:
        parameter: a DTensor, a plain parameter, or a plain tensor, which is what this function returned before.

    Collectives: with an axis, backward one all-reduce.
    """
    if not isinstance(parameter, DTensor):
        return sum_gradients(parameter, axis) if axis is not None and isinstance(parameter, nn.Parameter) else parameter
    if torch.compiler.is_compiling():
        part = parameter.to_local()
        return part if axis is None else sum_gradients(part, axis)
    return _Local.apply(parameter, axis)


class _Local(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parameter: DTensor, axis: Axis | None) -> torch.Tensor:
        part = local_of(parameter)
        ctx.spec, ctx.strides, ctx.axis = spec_of(parameter), part.stride(), axis
        ctx.set_materialize_grads(False)
        return part.detach()  # not a view, as in `sum_gradients`

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple:
        (gradient,) = gradients
        if gradient is None:
            return None, None
        if ctx.axis is not None:
            gradient = sum_over_ranks(gradient, ctx.axis)
        return as_gradient(gradient, ctx.spec, ctx.strides), None


def as_gradient(gradient: torch.Tensor, spec: Any, strides: tuple[int, ...]) -> DTensor:
    """The gradient of a local part as that of the DTensor it is a part of; it goes through, twice too."""
    if gradient.stride() != strides:  # such as one number, expanded, into which nothing can be added
        gradient = gradient.contiguous()
    return _AsGradient.apply(gradient, spec) if torch.is_grad_enabled() else with_spec(gradient, spec)


class _AsGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradient: torch.Tensor, spec: Any) -> DTensor:
        ctx.spec = spec
        return with_spec(gradient, spec)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple:
        return gradients[0].redistribute(placements=ctx.spec.placements).to_local(), None
