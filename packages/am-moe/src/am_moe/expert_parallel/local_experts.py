"""Run a module's own experts on the rows that a rank received: grouped products where it has transformers' common form,
else its own forward, which sees its slice of the parameters.

R rows received      K choices of each      N of those choices fall on this rank      L experts of this rank
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from am_moe.expert_parallel.common_form import has_common_form, run_common_form
from am_moe.expert_parallel.dispatch import Received
from am_moe.expert_parallel.experts import Experts, own_forward
from am_moe.expert_parallel.ordering import by_expert


def run_local_experts(module: Any, experts: Experts, local: int, scale: float, received: Received) -> torch.Tensor:
    """The weighted sum of this rank's experts for every row: `(R, D)`, whatever way the module wants to be called.

    Every choice that falls on this rank becomes a row of its own, in the order of the experts, so that those and no
    others are computed and the module sees no id that means "none".

    Args:
        module: of the common form, or whose own forward computes.
        experts: what the module is.
        local: L.
        scale: what the gradients of stacked parameters are multiplied by.
        received: the rows with their local ids, L or above where a choice is another rank's, and weights.
    """
    rows_RD, ids_RK, weights_RK = received.rows_RD, received.ids_RK, received.weights_RK
    common, choices = has_common_form(module, experts), received.choices
    if choices is None and not common:
        choices = int((ids_RK < local).sum())
    order = by_expert(ids_RK, local, choices)
    if (counted := getattr(module, "when_computed", None)) is not None:
        counted(order.ends_L[-1])
    if common:
        return run_common_form(module, order, scale, rows_RD, weights_RK)
    x_ND, weights_N = order.rows.take(rows_RD), weights_RK.flatten().gather(0, order.choice_N)
    with slice_of_parameters(module, experts, local, scale, rows_RD.dtype) as parameters:
        if choices:
            run = _run_with_identity if experts.identity else _RUN[experts.call]
            counts_L = order.ends_L.diff(prepend=order.ends_L.new_zeros(1))
            out_NF = run(module, x_ND, ids_RK.flatten()[order.choice_N].long(), weights_N, counts_L)
        else:
            out_NF = _nothing(experts, x_ND, weights_N, parameters)
    return order.rows.sum(out_NF.to(rows_RD.dtype))


def _nothing(experts: Experts, x_ND, weights_N, parameters: list[torch.Tensor]) -> torch.Tensor:
    """No rows: everything still gets a gradient, of zeros, so that all ranks reduce the same ones."""
    empty = torch.stack([p.flatten()[:0].sum().to(x_ND.dtype) for p in parameters]).sum()
    out_ND = x_ND * weights_N[:, None].to(x_ND.dtype) + empty
    return out_ND.new_zeros(0, parameters[0].shape[1]) + out_ND.sum() if experts.call == "linear" else out_ND


def _run_routed(module, x_ND, ids_N, weights_N, counts_L):
    return own_forward(module)(x_ND, ids_N[:, None], weights_N[:, None]).reshape(len(x_ND), -1)


def _run_with_identity(module, x_ND, ids_N, weights_N, counts_L):
    """LongCat Flash counts on two choices or more: the second is the identity, with a weight of zero."""
    ids_N2 = torch.stack([ids_N, torch.full_like(ids_N, len(counts_L))], dim=1)
    return own_forward(module)(x_ND, ids_N2, torch.stack([weights_N, torch.zeros_like(weights_N)], dim=1))


def _run_linear(module, x_ND, ids_N, weights_N, counts_L):
    return own_forward(module)(x_ND, counts_L.tolist())


def _run_rows(module, x_ND, ids_N, weights_N, counts_L):
    """The module takes the same number of rows for every expert; rows of zeros, whose results nobody reads, fill up."""
    most = int(counts_L.max())
    first_L = counts_L.cumsum(0) - counts_L
    place_N = torch.arange(len(ids_N), device=ids_N.device) - first_L[ids_N] + ids_N * most
    padded = x_ND.new_zeros(len(counts_L) * most, x_ND.shape[1]).index_copy(0, place_N, x_ND)
    return own_forward(module)(padded)[place_N]


_RUN = {"routed": _run_routed, "linear": _run_linear, "rows": _run_rows}


@contextmanager
def slice_of_parameters(
    module: Any, experts: Experts, local: int, scale: float, dtype: torch.dtype
) -> Iterator[list[torch.Tensor]]:
    """Let the module's own forward see plain tensors, this rank's slices in the tokens' dtype, and their number."""
    owners: dict[str, tuple[nn.Module, str]] = {}
    for path in (*experts.stacked, *experts.shared):
        prefix, _, leaf = path.rpartition(".")
        owners[path] = (module.get_submodule(prefix), leaf)
    before = [(owner, leaf, owner.get_parameter(leaf)) for owner, leaf in owners.values()]
    count = getattr(module, experts.counter)
    seen = []
    try:
        for path, (owner, leaf) in owners.items():
            parameter = owner.get_parameter(leaf)
            plain: Any = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            if path in experts.stacked:
                plain = _ScaleGradient.apply(plain, scale).to(dtype)
            owner._parameters[leaf] = plain
            seen.append(plain)
        setattr(module, experts.counter, local)
        yield seen
    finally:
        setattr(module, experts.counter, count)
        for owner, leaf, parameter in before:
            owner._parameters[leaf] = parameter


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, scale):
        ctx.scale = scale
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, *gradients):
        return gradients[0] * ctx.scale, None
