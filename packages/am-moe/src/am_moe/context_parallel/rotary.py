"""Rotary tables whose frequencies depend on how long the sequence is, which no rank's part of it shows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

_BY_LENGTH = {"dynamic", "longrope"}


def tables_by_length(model: nn.Module) -> list[nn.Module]:
    """The modules that take their frequencies from the largest position they are given."""
    found = []
    for module in model.modules():
        types = getattr(module, "rope_type", None)
        if _BY_LENGTH & set(types.values() if isinstance(types, dict) else [types]):
            found.append(module)
    return found


def show_whole_length(table: nn.Module, last_position: Callable[[], torch.Tensor]) -> None:
    """Append the sequence's largest position to those that a table is asked for, and drop its row from the answer.

    Args:
        table: a module called with `(x, position_ids)` that returns tensors `(..., S, D)`.
        last_position: the largest position of the whole sequence, an integer tensor of one element.
    """

    def with_last(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        by_name = "position_ids" in kwargs
        positions = kwargs["position_ids"] if by_name else args[1]
        last = last_position().to(positions).expand(*positions.shape[:-1], 1)
        longer = torch.cat([positions, last], dim=-1)
        if by_name:
            return args, kwargs | {"position_ids": longer}
        return (args[0], longer, *args[2:]), kwargs

    def without_last(_: nn.Module, args: tuple, rows: Any) -> Any:
        return tuple(each[..., :-1, :] for each in rows) if isinstance(rows, tuple) else rows[..., :-1, :]

    table.register_forward_pre_hook(with_last, with_kwargs=True)
    table.register_forward_hook(without_last)
