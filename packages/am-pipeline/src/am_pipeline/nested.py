"""Tensors in nested values: what modules take and return may be tuples, dicts, dataclasses, and these in each other."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Every tensor in a nested value, in order."""
    if isinstance(value, torch.Tensor):
        yield value
        return
    for item in _items(value):
        yield from tensors_in(item)


def map_leaves(value: Any, change: Callable[[Any], Any]) -> Any:
    """The same nested value with every leaf, tensor or not, replaced by `change(leaf)`."""
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_leaves(item, change) for item in value))
    if isinstance(value, (tuple, list)) and not isinstance(value, torch.Size):
        return type(value)(map_leaves(item, change) for item in value)
    if isinstance(value, dict):
        changed = copy.copy(value)  # a model output of transformers is a dict and a dataclass
        for key, item in value.items():
            changed[key] = map_leaves(item, change)
        return changed
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        changed = copy.copy(value)
        for field in dataclasses.fields(value):
            object.__setattr__(changed, field.name, map_leaves(getattr(value, field.name), change))
        return changed
    return change(value)


def _items(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, (tuple, list)):
        yield from value
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from (getattr(value, field.name) for field in dataclasses.fields(value))
