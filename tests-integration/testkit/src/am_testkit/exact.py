"""Comparison with one process: relative errors of whole tensors, whatever their layout."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn
from torch.distributed.tensor import DTensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The full value of a tensor or DTensor. Collective over the DTensor's mesh."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def relative_error(
    actual: torch.Tensor, expected: torch.Tensor, floor: float | None = None, *, nan_is_nan: bool = False
) -> float:
    """Largest absolute difference over the largest absolute expected value, on whole tensors; infinite for a NaN.

    Args:
        actual, expected: of one shape, tensors or DTensors.
        floor: divide by this where the expected values are smaller, because they are nothing but rounding. None: where
            all are zero, the difference itself.
        nan_is_nan: NaN equals NaN in the same place, for models whose own numbers are NaN in places.
    """
    actual, expected = whole(actual).detach(), whole(expected).detach()
    if actual.shape != expected.shape:
        raise AssertionError(f"shape {tuple(actual.shape)} differs from the expected {tuple(expected.shape)}")
    if nan_is_nan:
        if not actual.isnan().equal(expected.isnan()):
            raise AssertionError("NaN in other places than expected")
        actual, expected = actual.nan_to_num(), expected.nan_to_num()
    scale = expected.abs().max().item() if expected.numel() else 0.0
    if floor is not None:
        scale = max(scale, floor, 1e-30)
    difference = (actual.to(expected.dtype) - expected).abs().max().item() if expected.numel() else 0.0
    error = difference / scale if scale else difference
    return math.inf if math.isnan(error) else error  # a NaN would be lost in a maximum


def assert_same(
    actual: torch.Tensor | Mapping[str, torch.Tensor],
    expected: torch.Tensor | Mapping[str, torch.Tensor],
    tolerance: float,
    label: str = "tensor",
) -> None:
    """Fail, naming the worst tensors, unless every relative error is at most `tolerance`.

    With mappings, every name of `actual` must exist in `expected` (a rank may hold a part of the model).
    """
    if isinstance(actual, torch.Tensor):
        actual, expected = {label: actual}, {label: expected}
    if not actual:
        raise AssertionError(f"{label}: nothing to compare")
    unknown = sorted(set(actual) - set(expected))
    if unknown:
        raise AssertionError(f"{label}: names that one process does not have: {unknown}")
    errors = {name: relative_error(tensor, expected[name]) for name, tensor in actual.items()}
    wrong = sorted(((e, n) for n, e in errors.items() if not e <= tolerance), reverse=True)
    if wrong:
        lines = "\n".join(f"  {name}: {error:.2e}" for error, name in wrong[:10])
        raise AssertionError(f"{label}: {len(wrong)} of {len(errors)} differ by more than {tolerance:.0e}\n{lines}")


def gradients(module: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter's gradient by name; a trainable parameter without one is an error.

    Tied parameters are listed under each of their names.
    """
    grads = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if not parameter.requires_grad:
            continue
        if parameter.grad is None:
            raise AssertionError(f"{name} has no gradient")
        grads[name] = parameter.grad
    return grads
