"""The private parts of torch this package stands on; `tests/test_torch_compat.py` fails when they move."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor

_OPERATORS = torch.ops._c10d_functional
# Since 2.13 a view of a DTensor may flatten dims of which a later one is sharded, as `nn.Linear` does to a sequence.
FLATTENS_SHARDED_DIMS = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)


@contextmanager
def exchanged_tensors(module: nn.Module, view: Callable[[str, torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Inside, every parameter and buffer under `module` is what `view(its dotted name, itself)` returned.

    Reads as `_parameters` and `_buffers` because nothing public exchanges tensors for the length of a forward under
    `torch.compile` and leaves no trace.
    """
    owners: list[Any] = list(module.modules())
    names = [name for name, _ in module.named_modules()]
    before = [(owner._parameters, owner._buffers) for owner in owners]

    def viewed(prefix: str, tensors: dict[str, Any]) -> dict[str, Any]:
        dot = prefix + "." if prefix else ""
        return {name: None if t is None else view(dot + name, t) for name, t in tensors.items()}

    try:
        for owner, name, (parameters, buffers) in zip(owners, names, before, strict=True):
            owner._parameters = viewed(name, parameters)
            owner._buffers = viewed(name, buffers)
        yield
    finally:
        for owner, (parameters, buffers) in zip(owners, before, strict=True):
            owner._parameters, owner._buffers = parameters, buffers


def all_reduce(tensor: torch.Tensor, op: str, group: str) -> torch.Tensor:
    """The sum (`"sum"`) or maximum (`"max"`) over a process group, given by name; a new tensor.

    These four are the operators under torch's functional collectives, which `torch.compile` traces. The functions over
    them return a tensor subclass, and each of its uses costs the host what a DTensor's does.
    """
    return _OPERATORS.wait_tensor(_OPERATORS.all_reduce(tensor, op, group))


def all_gather(tensor: torch.Tensor, ranks: int, group: str) -> torch.Tensor:
    """The ranks' tensors, of one shape, one after the other along dim 0."""
    return _OPERATORS.wait_tensor(_OPERATORS.all_gather_into_tensor(tensor, ranks, group))


def reduce_scatter(tensor: torch.Tensor, ranks: int, group: str) -> torch.Tensor:
    """This rank's part along dim 0 of the sum."""
    return _OPERATORS.wait_tensor(_OPERATORS.reduce_scatter_tensor(tensor, "sum", ranks, group))


def all_to_all(tensor: torch.Tensor, receives: list[int], sends: list[int], group: str) -> torch.Tensor:
    """Rows along dim 0 from every rank."""
    return _OPERATORS.wait_tensor(_OPERATORS.all_to_all_single(tensor, receives, sends, group))


def local_of(tensor: DTensor) -> torch.Tensor:
    """This rank's part of a DTensor, without the dispatch and the new specification of `to_local`."""
    return tensor._local_tensor


def spec_of(tensor: DTensor) -> Any:
    """How a DTensor lies on its mesh, and its shape, strides and dtype."""
    return tensor._spec


def with_spec(local: torch.Tensor, spec: Any) -> DTensor:
    """A DTensor of a local part, as `spec_of` another one has it."""
    # without `__init__`, which does nothing and has a wrapper that costs more than the rest
    return DTensor.__new__(DTensor, local, copy.copy(spec), requires_grad=local.requires_grad)


def has_gradient_hooks(parameter: torch.Tensor) -> bool:
    """Whether somebody registered a hook that gets, or follows, the gradient of a parameter."""
    return bool(parameter._backward_hooks or parameter._post_accumulate_grad_hooks)


def is_compiled(module: nn.Module) -> bool:
    """Whether `module.compile()` was called."""
    return module._compiled_call_impl is not None


def base_of_view(tensor: torch.Tensor) -> torch.Tensor | None:
    """The tensor whose view this is, None for one that is none and under `torch.compile`, which cannot tell."""
    return None if torch.compiler.is_compiling() else tensor._base


def finished(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor whose collective may still run, as a plain tensor when it is done; others as they are.

    A compiled region takes the tensor out of such a wrapper, and its backward then hands plain tensors to the DTensor
    operations before it (`'Tensor' object has no attribute '_local_tensor'`).
    """
    return _Finished.apply(tensor) if isinstance(tensor, AsyncCollectiveTensor) else tensor


def kept_as_sharded(gradient: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """The gradient with the strides of its parameter.

    Autograd copies one with other strides into `.grad`, and before torch 2.13 the copy of an uneven shard is whole.
    """
    return gradient if gradient.stride() == parameter.stride() else gradient.contiguous()


class _Finished(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor: Any) -> torch.Tensor:
        done = tensor.wait()
        # Under torch.compile, torch 2.11 loses the gradient of what forward wrote in place. Else a model may write into
        # what it gets, as Falcon adds attention to its MLP's output, and autograd allows no writing into such a view.
        return done.view_as(done) if torch.compiler.is_compiling() else done

    @staticmethod
    def backward(ctx, *gradients: torch.Tensor) -> torch.Tensor:
        return gradients[0]
