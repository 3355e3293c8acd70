"""Targets of a step: one tensor or a structure of several, split along the batch like inputs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch


def split_target(target: Any, count: int) -> list[Any]:
    """One target per microbatch, of the same structure.

    Tensors are split along their first dim; what has no dims, or is no tensor, goes to every microbatch.

    Args:
        target: a tensor, or tuples, lists and dicts of them, of the whole batch.
        count: number of microbatches, a divisor of the batch.
    """
    if isinstance(target, torch.Tensor):
        return list(target.chunk(count)) if target.dim() else [target] * count
    if isinstance(target, dict):
        pieces = {name: split_target(value, count) for name, value in target.items()}
        return [type(target)({name: each[i] for name, each in pieces.items()}) for i in range(count)]
    if isinstance(target, (tuple, list)):
        rows = [split_target(value, count) for value in target]
        return [_like(target, [each[i] for each in rows]) for i in range(count)]
    return [target] * count


def rows_of(target: Any) -> int:
    """Sequences in a target; 0 where it has no tensor.

    Raises:
        ValueError: its tensors have different numbers of them.
        TypeError: it holds something else than tensors, numbers, strings, None and structures of them.
    """
    sizes = {name: tensor.shape[0] for name, tensor in _tensors("target", target) if tensor.dim()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"the tensors of the target have different first dims: {sizes}; each is a batch of sequences")
    return next(iter(sizes.values()), 0)


def count_tokens(target: Any, ignore_index: int) -> torch.Tensor | int:
    """Labels that are not `ignore_index`, a scalar on the labels' device: no host sync.

    The labels of a structure are what it calls `labels`, else its first tensor of integers.
    """
    labels = _labels(target)
    return 0 if labels is None else (labels.detach() != ignore_index).sum()


def _labels(target: Any) -> torch.Tensor | None:
    if isinstance(target, torch.Tensor):
        return target
    if isinstance(target, dict) and isinstance(target.get("labels"), torch.Tensor):
        return target["labels"]
    tensors = (tensor for _, tensor in _tensors("target", target))
    return next((t for t in tensors if not (t.is_floating_point() or t.is_complex() or t.dtype is torch.bool)), None)


def _tensors(name: str, value: Any) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _tensors(f"{name}[{key!r}]", item)
    elif isinstance(value, (tuple, list)):
        for index, item in enumerate(value):
            yield from _tensors(f"{name}[{index}]", item)
    elif not (value is None or isinstance(value, (bool, int, float, str))):
        raise TypeError(
            f"{name} is a {type(value).__name__}; a target is a tensor, or tuples, lists and dicts of tensors"
        )


def _like(original: Any, items: list[Any]) -> Any:
    return type(original)(*items) if hasattr(original, "_fields") else type(original)(items)
