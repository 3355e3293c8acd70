"""Gradients that are whole when `backward()` returns."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from am_tp_styles._torch_compat import kept_as_sharded

_HOOKED = "_am_tp_styles_reduces_gradient"


def reduce_replicated_gradients(module: nn.Module) -> nn.Module:
    """Make the gradient of every DTensor parameter under `module` arrive in the parameter's own placements.

    A replicated parameter that sees only its rank's tokens, heads or LoRA rows gets a gradient that is `Partial`: each
    rank holds one summand. Torch's `SequenceParallel` leaves it so, and an optimizer that reads the local tensor is
    then silently wrong. Here a tensor hook reduces it during backward, before it is added to `.grad`.

    The hook is put on the parameters that a forward really uses (they are looked up again at each forward), because
    `to_empty`, `to` and FSDP2 exchange the tensors behind a parameter and drop the hooks of the old ones.

    Args:
        module: any module; parameters that are not DTensors, or do not require a gradient, are left alone.

    Returns:
        `module` itself.

    Collectives (the mesh of each parameter, in backward): one all-reduce per parameter whose gradient is `Partial`.
    """
    module.register_forward_pre_hook(_hook_parameters, prepend=True)
    return module


def _hook_parameters(module: nn.Module, _args: tuple) -> None:
    for parameter in module.parameters():
        if isinstance(parameter, DTensor) and parameter.requires_grad and not hasattr(parameter, _HOOKED):
            _reduce(parameter)


def _reduce(parameter: DTensor) -> None:
    placements = parameter.placements

    def to_own_placements(grad: torch.Tensor) -> torch.Tensor:
        if isinstance(grad, DTensor) and grad.placements != placements:
            grad = grad.redistribute(placements=placements)
        return kept_as_sharded(grad, parameter)

    parameter.register_hook(to_own_placements)
    setattr(parameter, _HOOKED, True)
