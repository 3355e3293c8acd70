"""The ranks of the tensor-parallel axis, as the styles see them: how many, which one this is, and what they exchange.

Every style sends through an `Axis` and through nothing else, so that one process can stand for all the ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional as F

from am_tp_styles._torch_compat import all_gather, all_reduce, all_to_all, reduce_scatter


class Axis(Protocol):
    """Ranks that hold parts of one model. Its methods return new tensors and know nothing of gradients.

    On an axis of one rank they return their argument.
    """

    size: int
    rank: int

    def all_reduce(self, tensor: torch.Tensor, op: str = "sum") -> torch.Tensor:
        """The sum, or with `op="max"` the largest, of every rank's tensor; all of one shape."""
        ...

    def all_gather(self, tensor: torch.Tensor, dim: int, whole: int | None = None) -> torch.Tensor:
        """Every rank's part, one after the other along `dim`.

        Args:
            tensor: this rank's part.
            dim: along which the parts lie.
            whole: the size of the result along `dim`, if its parts are of different sizes (see `part_of`).
        """
        ...

    def reduce_scatter(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        """This rank's part along `dim` (see `part_of`) of the sum of every rank's tensor."""
        ...

    def all_to_all(self, tensor: torch.Tensor, receives: Sequence[int], sends: Sequence[int]) -> torch.Tensor:
        """Rows from every rank, in the ranks' order: `sends[r]` of `tensor` go to rank r, `receives[r]` come back."""
        ...


class MeshAxis:
    """The axis that a one-dimensional device mesh is. A deep copy is the axis itself."""

    def __init__(self, mesh: DeviceMesh) -> None:
        if mesh.ndim != 1:
            raise ValueError(f"an axis is a mesh of one dimension, got {mesh.mesh_dim_names or mesh.shape}")
        self.mesh = mesh
        self.size = mesh.size()
        self.rank = mesh.get_local_rank()
        self._group = mesh.get_group().group_name

    def all_reduce(self, tensor: torch.Tensor, op: str = "sum") -> torch.Tensor:
        return tensor if self.size == 1 else all_reduce(tensor.contiguous(), op, self._group)

    def all_gather(self, tensor: torch.Tensor, dim: int, whole: int | None = None) -> torch.Tensor:
        if self.size == 1:
            return tensor
        dim %= tensor.dim()
        whole = tensor.shape[dim] * self.size if whole is None else whole
        longest = -(-whole // self.size)
        gathered = all_gather(_padded(tensor, dim, longest).contiguous(), self.size, self._group)
        if dim:
            gathered = torch.cat(gathered.chunk(self.size, 0), dim)
        return gathered if longest * self.size == whole else gathered.narrow(dim, 0, whole)

    def reduce_scatter(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        if self.size == 1:
            return tensor
        dim %= tensor.dim()
        whole = tensor.shape[dim]
        longest = -(-whole // self.size)
        tensor = _padded(tensor, dim, longest * self.size)
        if dim:
            tensor = torch.cat(tensor.chunk(self.size, dim), 0)
        scattered = reduce_scatter(tensor.contiguous(), self.size, self._group)
        return scattered if longest * self.size == whole else scattered.narrow(dim, 0, part_of(whole, self)[1])

    def all_to_all(self, tensor: torch.Tensor, receives: Sequence[int], sends: Sequence[int]) -> torch.Tensor:
        return tensor if self.size == 1 else all_to_all(tensor.contiguous(), list(receives), list(sends), self._group)

    def __deepcopy__(self, memo: dict) -> MeshAxis:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return MeshAxis, (self.mesh,)


def part_of(whole: int, axis: Axis) -> tuple[int, int]:
    """Where this rank's part of a dim of size `whole` begins, and how long it is.

    As a DTensor lays out `Shard`: all parts are of one size, but that the last ones may be shorter or empty.
    """
    longest = -(-whole // axis.size)
    first = min(longest * axis.rank, whole)
    return first, min(longest, whole - first)


def _padded(tensor: torch.Tensor, dim: int, size: int) -> torch.Tensor:
    missing = size - tensor.shape[dim]
    return F.pad(tensor, [0, 0] * (tensor.dim() - 1 - dim) + [0, missing]) if missing else tensor
