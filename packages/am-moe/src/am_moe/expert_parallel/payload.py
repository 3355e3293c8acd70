"""Tensors with the same rows as one tensor of bytes, so that they travel in one collective."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn


def pack(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """`(N, ...)` each to `(N, bytes)`, whose rows start at multiples of 16 bytes as fast reads need."""
    parts = [t.contiguous().view(torch.uint8) for t in tensors]
    return torch.cat([nn.functional.pad(p, (0, -p.shape[1] % 16)) if p.shape[1] % 16 else p for p in parts], dim=1)


def unpack(payload: torch.Tensor, like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The tensors of a payload, as views of it: dtypes and row lengths are those of `like`."""
    first, found = 0, []
    for tensor in like:
        found.append(payload[:, first : first + _length(tensor)].view(tensor.dtype))
        first += _length(tensor) + -_length(tensor) % 16
    return found


def _length(tensor: torch.Tensor) -> int:
    return tensor.shape[1] * tensor.dtype.itemsize
