"""Experts of transformers' common form, computed as grouped products: up, gate or activation, down, weighted, summed.

    R rows received      N choices in the order of their experts      L experts      D model dim      I inner dim

    x_ND = rows_RD[source]                 one gather
    h_NI = x_ND @ up of its expert         one grouped product
    a_NI = act(h_NI) * weight              weighted where rows are narrow, so that results are only summed
    y_ND = a_NI @ down of its expert       one grouped product
    out_RD = sum of each row's y           one kernel

The backward keeps `rows_RD` and `h_NI` and nothing else of that size: what it needs besides is gathered or computed
again. No host sync, but where there is no grouped product: float64, and rows whose length is no multiple of 16 bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor

from am_moe.experts import Experts
from am_moe.ordering import ByExpert, Rows, add_up

_SAYS = ("has_gate", "has_bias", "is_transposed", "has_post_expert_norm")


def has_common_form(module: Any, experts: Experts) -> bool:
    """Whether a module says what transformers' grouped kernels go by, and has no more than that.

    Under autocast it has not: what is then computed in which dtype is the business of its own forward.
    """
    if not all(isinstance(getattr(module, name, None), bool) for name in _SAYS) or module.has_post_expert_norm:
        return False
    device = next(module.parameters()).device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return False
    return set(experts.stacked) == set(_names(module)) - {None} and not experts.shared


def run_common_form(module: Any, order: ByExpert, scale: float, rows_RD, weights_RK) -> torch.Tensor:
    """The weighted sum of this rank's experts for every row, `(R, D)`.

    Args:
        module: of the common form, with this rank's slices of the parameters.
        order: of the choices.
        scale: what the gradients of expert parameters are multiplied by.
        rows_RD, weights_RK: the rows, and the weights of their choices.
    """
    act = module._apply_gate if module.has_gate else module.act_fn
    parameters = [_local(module, name) for name in _names(module)]
    form = _Form(act, module.is_transposed, scale)
    return _Experts.apply(form, order, rows_RD, weights_RK, *parameters)


@dataclass(frozen=True)
class _Form:
    act: Callable[[torch.Tensor], torch.Tensor]
    transposed: bool
    scale: float

    def into(self, weight: torch.Tensor) -> torch.Tensor:
        """A weight as `(L, in, out)`."""
        return weight if self.transposed else weight.transpose(1, 2)

    def activated(self, h_NI: torch.Tensor, weights_N: torch.Tensor) -> torch.Tensor:
        return (self.act(h_NI) * weights_N[:, None]).to(h_NI.dtype)


def _names(module: Any) -> tuple[str, str, str | None, str | None]:
    up = "gate_up_proj" if module.has_gate else "up_proj"
    return (up, "down_proj", f"{up}_bias", "down_proj_bias") if module.has_bias else (up, "down_proj", None, None)


def _local(module: nn.Module, name: str | None) -> torch.Tensor | None:
    parameter = module.get_parameter(name) if name is not None else None
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, form, order, rows_RD, weights_RK, *parameters):
        dtype, rows = rows_RD.dtype, order.rows
        up, down, up_bias, down_bias = [p if p is None else p.to(dtype) for p in parameters]
        weights_N = weights_RK.flatten()[order.choice_N]
        h_NI = product(rows_RD[rows.source], form.into(up), order.ends_L)
        ids_N = _expert_of(order, len(h_NI)) if up_bias is not None else None
        if up_bias is not None:
            h_NI += up_bias[ids_N]
        y_ND = product(form.activated(h_NI, weights_N), form.into(down), order.ends_L)
        if down_bias is not None:
            y_ND += (down_bias[ids_N] * weights_N[:, None]).to(dtype)
        ctx.form = form
        places = rows.source, rows.index, rows.start, order.choice_N, order.ends_L, order.place_RK, order.here_RK
        ctx.save_for_backward(rows_RD, weights_RK, h_NI, *parameters, *places)
        return add_up(y_ND, rows.index, rows.start)

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients):  # pyrefly: ignore[bad-override]  (the decorator's type loses the names)
        form, (rows_RD, weights_RK, h_NI, up, down, up_bias, down_bias, *places) = ctx.form, ctx.saved_tensors
        rows = Rows(*places[:3])
        order, ends_L, dtype = ByExpert(rows, *places[3:]), places[4], rows_RD.dtype
        needs_x, needs_weights, *needs = ctx.needs_input_grad[2:]
        g_ND = gradients[0][rows.source]
        with torch.enable_grad():
            leaves = h_NI.detach().requires_grad_(), weights_RK.detach().flatten()[order.choice_N].requires_grad_()
            a_NI = form.activated(*leaves)
        da_NI = product(g_ND, form.into(down.to(dtype)).transpose(1, 2), ends_L)
        dh_NI, dw_N = torch.autograd.grad(a_NI, leaves, da_NI)
        ids_N = _expert_of(order, len(h_NI)) if down_bias is not None else None
        if down_bias is not None:
            dw_N = dw_N + (g_ND * down_bias.to(dtype)[ids_N]).sum(-1).to(dw_N.dtype)
        found: list[torch.Tensor | None] = [None] * 4
        if needs[0]:
            x_ND = rows_RD[rows.source]
            found[0] = products(*((x_ND, dh_NI) if form.transposed else (dh_NI, x_ND)), ends_L)
            del x_ND
        if needs[1]:
            a_NI = a_NI.detach()
            found[1] = products(*((a_NI, g_ND) if form.transposed else (g_ND, a_NI)), ends_L)
        if needs[2]:
            found[2] = _sum_of_each(dh_NI, ends_L)
        if needs[3]:
            found[3] = _sum_of_each(g_ND * leaves[1].detach()[:, None], ends_L)
        found = [
            g if g is None else g.to(p.dtype).mul_(form.scale) if form.scale != 1 else g.to(p.dtype)
            for g, p in zip(found, (up, down, up_bias, down_bias), strict=True)
        ]
        dx_RD = dweights_RK = None
        if needs_x:
            dx_RD = add_up(product(dh_NI, form.into(up.to(dtype)).transpose(1, 2), ends_L), rows.index, rows.start)
        if needs_weights:
            dweights_RK = torch.zeros_like(weights_RK)
            if len(dw_N):
                taken = dw_N[order.place_RK.clamp(max=len(dw_N) - 1)]
                dweights_RK = torch.where(order.here_RK, taken, 0).to(weights_RK.dtype)
        return None, None, dx_RD, dweights_RK, *found


def _expert_of(order: ByExpert, rows: int) -> torch.Tensor:
    """The expert of each row in order; the last one's id for rows that belong to none."""
    place_N = torch.arange(rows, device=order.ends_L.device, dtype=torch.int32)
    return torch.searchsorted(order.ends_L, place_N, right=True).clamp(max=len(order.ends_L) - 1)


def _sum_of_each(rows_NF: torch.Tensor, ends_L: torch.Tensor) -> torch.Tensor:
    """The sum of each expert's rows: `(L, F)`."""
    start = nn.functional.pad(ends_L.long(), (1, 0))
    return add_up(rows_NF, torch.arange(len(rows_NF), device=rows_NF.device), start)


def product(a_NI: torch.Tensor, weight_LIO: torch.Tensor, ends_L: torch.Tensor) -> torch.Tensor:
    """Each expert's rows times its matrix: `(N, O)`. What follows the last expert's rows is anything."""
    if _grouped(a_NI, *weight_LIO.shape[1:]):
        return nn.functional.grouped_mm(a_NI, weight_LIO, offs=ends_L)
    out_NO = a_NI.new_zeros(len(a_NI), weight_LIO.shape[2])
    first = 0
    for weight_IO, end in zip(weight_LIO, ends_L.tolist(), strict=True):
        torch.mm(a_NI[first:end], weight_IO, out=out_NO[first:end])
        first = end
    return out_NO


def products(a_NI: torch.Tensor, b_NO: torch.Tensor, ends_L: torch.Tensor) -> torch.Tensor:
    """The product of each expert's rows of one matrix with those of another: `(L, I, O)`."""
    if _grouped(a_NI, a_NI.shape[1], b_NO.shape[1]):
        return nn.functional.grouped_mm(a_NI.t(), b_NO, offs=ends_L)
    out_LIO = a_NI.new_zeros(len(ends_L), a_NI.shape[1], b_NO.shape[1])
    first = 0
    for out_IO, end in zip(out_LIO, ends_L.tolist(), strict=True):
        torch.mm(a_NI[first:end].t(), b_NO[first:end], out=out_IO)
        first = end
    return out_LIO


def _grouped(rows: torch.Tensor, *sizes: int) -> bool:
    """Whether torch has a grouped product for rows of such a dtype and such lengths."""
    known = rows.dtype in (torch.bfloat16, torch.float16, torch.float32)
    return known and len(rows) > 0 and all(size * rows.dtype.itemsize % 16 == 0 for size in sizes)
