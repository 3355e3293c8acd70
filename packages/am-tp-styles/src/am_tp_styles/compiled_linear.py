"""A linear layer whose forward has no `view` of a DTensor, so that it compiles when its weight is one."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Placement, Shard

from am_tp_styles.classes import M, put_under
from am_tp_styles.sharded import forward_on_shards


class TPLinear(nn.Linear):
    """`nn.Linear` computed with `bmm`, for `torch.compile` with tensor-parallel weights.

    `F.linear` on a 3-D input flattens it with `aten.view`. While AOT autograd traces the backward of a DTensor with
    symbolic sizes, the sharding of that view cannot be propagated and the trace ends in a `RecursionError`. `bmm` is
    3-D itself, and so is its backward: no view is ever emitted.

    Swap the class of a layer that already exists, before or after its weight is sharded; nothing else changes::

        linear.__class__ = TPLinear

    or let `use_tp_linear` do it for a whole model, subclasses included, and `restore_classes` undo it.

    Works in eager mode too, with a plain weight or a DTensor one (colwise `Shard(0)`, rowwise `Shard(1)`).
    """

    # pyrefly: ignore [bad-override-param-name]  (the documented name of the argument)
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x @ weight.T + bias` for `x` of shape `(..., in_features)` with one dim or more, any float dtype.

        Dims before the last two are flattened into the batch of the `bmm`; the last two are never mixed with them, so
        an input that is sharded along its sequence or its features keeps that layout.

        Collectives: none of its own for up to three dims. A sharded layer with a replicated input of more dims sums
        the input's gradient (one all-reduce) here and not in whatever made the input.
        """
        if "edges" in self.__dict__ and isinstance(self.weight, DTensor):  # the class was set after it was sharded
            return forward_on_shards(self, self.forward, x)
        if x.dim() == 3:
            return self._bmm(x)
        if x.dim() == 2:
            return self._bmm(x.unsqueeze(0)).squeeze(0)
        if x.dim() == 1:
            return self._bmm(x[None, None])[0, 0]
        if isinstance(x, DTensor):
            return self._bmm_of_local_flattened(x)
        return self._bmm(x.flatten(0, -3)).unflatten(0, x.shape[:-2])

    def _bmm(self, x_BSD: torch.Tensor) -> torch.Tensor:
        weight_BDF = self.weight.t().unsqueeze(0).expand(x_BSD.shape[0], -1, -1)
        out_BSF = torch.bmm(x_BSD, weight_BDF)
        return out_BSF if self.bias is None else out_BSF + self.bias

    def _bmm_of_local_flattened(self, x: DTensor) -> DTensor:
        """Flatten and unflatten each rank's own part, where a view is only a view.

        A batch dim sharded among several takes each rank's rows in another global order than a real flatten would;
        the rows are independent, and the same order is undone on the way out.
        """
        local = x.to_local()
        flat = DTensor.from_local(local.flatten(0, -3), x.device_mesh, [_to_flat(p, x.dim()) for p in x.placements])
        out = self._bmm(flat)
        back = [_from_flat(p, before, x.dim()) for p, before in zip(out.placements, x.placements, strict=True)]
        return DTensor.from_local(out.to_local().unflatten(0, local.shape[:-2]), x.device_mesh, back)


def use_tp_linear(module: M) -> M:
    """Let every `nn.Linear` under `module`, adapters included, compute as `TPLinear` does; `restore_classes` undoes it.

    A subclass of `nn.Linear` keeps its forward: what it calls through `super().forward` is `TPLinear`'s then. One that
    calls `nn.functional.linear` itself is not helped. Each layer's new class derives from its old one and bears its
    name; names in `state_dict()`, parameters and hooks stay.

    Args:
        module: a model, a layer or a linear, before or after it is sharded.

    Returns:
        `module` itself. Issues no collective.
    """
    for child in module.modules():
        if isinstance(child, nn.Linear):
            put_under(child, TPLinear)
    return module


def _to_flat(placement: Placement, ndim: int) -> Placement:
    """The placement of an `ndim`-dim tensor after all dims but the last two became one."""
    if not isinstance(placement, Shard):
        return placement
    return Shard(max(placement.dim % ndim - (ndim - 3), 0))


def _from_flat(placement: Placement, before: Placement, ndim: int) -> Placement:
    """Undo `_to_flat` on a result; `before` tells which of the flattened dims was sharded."""
    if not isinstance(placement, Shard):
        return placement
    return before if placement.dim == 0 else Shard(placement.dim + ndim - 3)
