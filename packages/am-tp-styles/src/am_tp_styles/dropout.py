"""Dropout whose mask does not depend on how its input is sharded."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Placement, Shard

from am_tp_styles.axis import Axis
from am_tp_styles.classes import put_over


def shard_dropout(module: nn.Module, axis: Axis, placement: Placement) -> None:
    """Let a `nn.Dropout` draw the mask of the whole input and use this rank's part of it.

    Every rank draws as much as one process would, so ranks that start with the same random state keep it, masks on
    shards differ as those of one tensor do, and masks on replicated inputs agree.

    Args:
        module: exactly an `nn.Dropout`; anything else is left alone.
        axis: the tensor-parallel axis.
        placement: how a plain input lies on it; a DTensor says so itself.
    """
    if type(module) is nn.Dropout:
        put_over(module, ShardedDropout)
        module.axis, module.placement = axis, placement


class ShardedDropout:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        """Zero entries with probability `p` in training, of any shape and float dtype. Issues no collective."""
        if not self.training or not self.p:
            return x
        placement = x.placements[0] if isinstance(x, DTensor) else self.placement
        shape = list(x.shape)
        if isinstance(placement, Shard) and not isinstance(x, DTensor):
            shape[placement.dim] *= self.axis.size
        # The operator that one process runs, on ones: what it draws for a number depends on the device and the dtype.
        mask = nn.functional.dropout(torch.ones(shape, dtype=x.dtype, device=x.device), self.p)
        if isinstance(placement, Shard):
            part = shape[placement.dim] // self.axis.size
            mask = mask.narrow(placement.dim, self.axis.rank * part, part)
        if isinstance(x, DTensor):
            return x * DTensor.from_local(mask, x.device_mesh, [placement], run_check=False)
        return x * mask
