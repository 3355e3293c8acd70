"""A model without its numbers, hooks and layouts: what its own code computes, on tensors that have shapes only."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

# What is left behind: forwards and compiled calls that were put on an instance, and that transformers has its hooks.
_LEFT = {"forward", "_compiled_call_impl", "_output_capturing_hooks_installed"}
# Where a class that am-tp-styles put over a module's own keeps that one.
_OWN_CLASS = "_am_tp_styles_exchanged_from"


def skeleton_of(model: nn.Module, fake: Any) -> nn.Module:
    """A copy of the module tree with parameters of the same (global) shapes without memory, of a mode of such tensors.

    All of them are trained where gradients are enabled, for whatever is frozen now may be trained later.

    Buffers and tensors that are attributes are copied where they can be read. All other attributes, configs among them,
    are shared.
    """
    return _copied(model, fake, {})


def _copied(module: nn.Module, fake: Any, memo: dict[int, Any]) -> nn.Module:
    if id(module) in memo:
        return memo[id(module)]
    copy = object.__new__(_own_class(type(module)))
    nn.Module.__init__(copy)
    own = set(vars(copy)) - {"training"} | _LEFT
    for key, value in vars(module).items():
        if key not in own:
            plain = type(value) is torch.Tensor
            vars(copy)[key] = memo.setdefault(id(value), _content(value, fake)) if plain else value
    if "gradient_checkpointing" in vars(copy):
        vars(copy)["gradient_checkpointing"] = False
    memo[id(module)] = copy
    for name, child in module._modules.items():
        copy._modules[name] = None if child is None else _copied(child, fake, memo)
    for name, parameter in module._parameters.items():
        copy._parameters[name] = None if parameter is None else memo.setdefault(id(parameter), _empty(parameter, fake))
    for name, buffer in module._buffers.items():
        copy._buffers[name] = None if buffer is None else memo.setdefault(id(buffer), _content(buffer, fake))
    return copy


def _own_class(kind: type) -> type:
    """The class that a module had before a layout was put over it, by its class."""
    for base in kind.__mro__:
        if _OWN_CLASS in vars(base):
            return _own_class(vars(base)[_OWN_CLASS])
    return kind


def _empty(tensor: torch.Tensor, fake: Any) -> Any:
    trained = torch.is_grad_enabled() and isinstance(tensor, nn.Parameter) and tensor.is_floating_point()
    with fake:
        return nn.Parameter(torch.empty(tensor.shape, dtype=tensor.dtype), requires_grad=trained)


def _content(buffer: torch.Tensor, fake: Any) -> Any:
    if type(buffer) is not torch.Tensor or buffer.is_meta:
        return _empty(buffer, fake)
    return buffer.detach().cpu().clone()
