"""What ranks exchange in a forward, and in its backward: pairs of functions, each of which is the other's gradient.

A tensor is *whole* where every rank holds the same, a *part* where each holds its own stretch of one dim, a *summand*
where the ranks' tensors add up to it. The gradient of a whole tensor is whole, or a summand where each rank used it for
its share of the features alone::

    function          takes     returns   its backward              takes     returns
    sum_gradients     whole     whole     sum_over_ranks            summand   whole
    sum_over_ranks    summand   whole     sum_gradients             whole     whole
    split             whole     part      gather                    part      whole
    gather            part      whole     split                     whole     part
    scatter_sum       summand   part      gather_for_shares         part      whole
    gather_for_shares part      whole     scatter_sum               summand   part
    once              whole     summand   the tensor itself         whole     whole

Because each backward is the other function itself, gradients of gradients are right too. On an axis of one rank all of
them return their argument. `dim` is the dim of the parts, which lie as `axis.part_of` says.
"""

from __future__ import annotations

from typing import Any

import torch

from am_tp_styles.axis import Axis, part_of


def sum_gradients(tensor: torch.Tensor, axis: Axis) -> torch.Tensor:
    """The tensor itself. Collectives: backward one all-reduce."""
    return tensor if axis.size == 1 else _SumGradients.apply(tensor, axis)


def sum_gradients_in_order(axis: Axis, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The tensors themselves, whose gradients are summed one after the other in every rank's order.

    Collectives: backward one all-reduce per tensor, of zeros too.
    """
    return tensors if axis.size == 1 else _SumInOrder.apply(axis, *tensors)


def sum_over_ranks(tensor: torch.Tensor, axis: Axis) -> torch.Tensor:
    """The sum of the ranks' tensors. Collectives: forward one all-reduce."""
    return tensor if axis.size == 1 else _SumOverRanks.apply(tensor, axis)


def split(tensor: torch.Tensor, axis: Axis, dim: int) -> torch.Tensor:
    """This rank's part of a whole tensor. Collectives: backward one all-gather."""
    return tensor if axis.size == 1 else _Split.apply(tensor, axis, dim)


def gather(tensor: torch.Tensor, axis: Axis, dim: int, whole: int | None = None) -> torch.Tensor:
    """The ranks' parts together; `whole` is their size if it does not divide. Collectives: forward one all-gather."""
    return tensor if axis.size == 1 else _Gather.apply(tensor, axis, dim, whole)


def scatter_sum(tensor: torch.Tensor, axis: Axis, dim: int) -> torch.Tensor:
    """This rank's part of the sum. Collectives: forward one reduce-scatter, backward one all-gather."""
    return tensor if axis.size == 1 else _ScatterSum.apply(tensor, axis, dim)


def gather_for_shares(tensor: torch.Tensor, axis: Axis, dim: int) -> torch.Tensor:
    """The ranks' parts, for use by shares. Collectives: forward one all-gather, backward one reduce-scatter."""
    return tensor if axis.size == 1 else _GatherForShares.apply(tensor, axis, dim, None)


def gather_for_all(tensor: torch.Tensor, axis: Axis, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The ranks' parts together, twice: as `gather` gives them and as `gather_for_shares` does.

    Collectives: forward one all-gather, backward one reduce-scatter if the second was used.
    """
    return (tensor, tensor) if axis.size == 1 else _GatherForAll.apply(tensor, axis, dim)


def once(tensor: torch.Tensor, axis: Axis) -> torch.Tensor:
    """A whole tensor as it enters a sum over the ranks: the first rank's, and zeros. Collectives: none."""
    return tensor if axis.size == 1 else _Once.apply(tensor, axis)


class _SumGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, axis: Axis) -> torch.Tensor:
        ctx.axis = axis
        # Not a view: a selective checkpoint counts those, and runs layers again without what `exchange` put in place.
        return tensor.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple:
        return _SumOverRanks.apply(gradients[0], ctx.axis), None


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, axis: Axis) -> torch.Tensor:
        ctx.axis = axis
        return axis.all_reduce(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple:
        return _SumGradients.apply(gradients[0], ctx.axis), None


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, axis: Axis, dim: int) -> torch.Tensor:
        ctx.axis, ctx.dim, ctx.whole = axis, dim, tensor.shape[dim]
        return tensor.narrow(dim, *part_of(tensor.shape[dim], axis)).contiguous()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple:
        return _Gather.apply(gradients[0], ctx.axis, ctx.dim, ctx.whole), None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, axis: Axis, dim: int, whole: int | None) -> torch.Tensor:
        ctx.axis, ctx.dim = axis, dim
        return axis.all_gather(tensor, dim, whole)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple:
        return _Split.apply(gradients[0], ctx.axis, ctx.dim), None, None, None


class _ScatterSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, axis: Axis, dim: int) -> torch.Tensor:
        ctx.axis, ctx.dim, ctx.whole = axis, dim, tensor.shape[dim]
        return axis.reduce_scatter(tensor, dim)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple:
        return _GatherForShares.apply(gradients[0], ctx.axis, ctx.dim, ctx.whole), None, None


class _GatherForShares(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, axis: Axis, dim: int, whole: int | None) -> torch.Tensor:
        ctx.axis, ctx.dim = axis, dim
        return axis.all_gather(tensor, dim, whole)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple:
        return _ScatterSum.apply(gradients[0], ctx.axis, ctx.dim), None, None, None


class _GatherForAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, axis: Axis, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.axis, ctx.dim = axis, dim
        ctx.set_materialize_grads(False)
        whole = axis.all_gather(tensor, dim)
        return whole, whole.detach()  # a view would hold the first, which it is laid beside, for good

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple:
        of_whole, of_shares = gradients
        mine = None if of_shares is None else _ScatterSum.apply(of_shares, ctx.axis, ctx.dim)
        if of_whole is not None:
            part = _Split.apply(of_whole, ctx.axis, ctx.dim)
            mine = part if mine is None else mine + part
        return mine, None, None


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, axis: Axis) -> torch.Tensor:
        ctx.axis = axis
        return tensor.view_as(tensor) if axis.rank == 0 else torch.zeros_like(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple:
        return _WholeOfOnce.apply(gradients[0], ctx.axis), None


class _WholeOfOnce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, axis: Axis) -> torch.Tensor:
        ctx.axis = axis
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple:
        return _Once.apply(gradients[0], ctx.axis), None


class _SumInOrder(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, axis: Axis, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.axis = axis
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple:
        return None, *(_SumOverRanks.apply(gradient, ctx.axis) for gradient in gradients)
