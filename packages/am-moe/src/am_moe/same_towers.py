"""Ranks that shard a tower together must all run it: one without images would leave the others' collectives waiting."""

from __future__ import annotations

import zlib
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from am_moe.units import stack_names


def check_inputs_of_every_forward(model: nn.Module, mesh: DeviceMesh) -> None:
    """From now on, refuse a forward that the ranks of a mesh call with different inputs, on every rank.

    Which towers of a model run depends on which inputs are given and hold something, so these are compared before the
    first collective of the forward. Models with one stack of layers always run it: nothing is compared.

    Collectives of every forward (each axis of the mesh), for models with several stacks: one all-reduce of two numbers,
    with a host sync.
    """
    stacks = stack_names(model)
    if len(stacks) > 1 and mesh.size() > 1:
        model.register_forward_pre_hook(_SameInputs(mesh, stacks), prepend=True, with_kwargs=True)


class _SameInputs:
    def __init__(self, mesh: DeviceMesh, stacks: list[str]) -> None:
        self.mesh, self.stacks = mesh, stacks

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        given = [*map(str, range(len(args))), *sorted(name for name, value in kwargs.items() if _holds(value))]
        number = zlib.crc32(" ".join(given).encode())
        least_and_most = torch.tensor([-number, number], device=self.mesh.device_type)
        for axis in range(self.mesh.ndim):
            dist.all_reduce(least_and_most, dist.ReduceOp.MAX, group=self.mesh.get_group(axis))
        least, most = least_and_most.tolist()
        if -least != most:
            raise ValueError(
                f"ranks that shard {type(module).__name__} together were given different inputs, such as images on "
                f"some ranks only, so that they would not all run {' and '.join(self.stacks)}; give every rank of a "
                f"step the same kinds of inputs (this rank has {given})"
            )


def _holds(value: Any) -> bool:
    """Whether an input is there: no None, no empty tensor or list."""
    if isinstance(value, torch.Tensor):
        return value.numel() > 0
    return value is not None and not (isinstance(value, (list, tuple, dict)) and not value)
