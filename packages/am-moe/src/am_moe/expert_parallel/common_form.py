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

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor

from am_moe.expert_parallel import kernels
from am_moe.expert_parallel.experts import Experts, computes_as_transformers
from am_moe.expert_parallel.ordering import ByExpert, Rows

_GATES: weakref.WeakKeyDictionary[nn.Module, tuple[tuple, bool]] = weakref.WeakKeyDictionary()
_SAYS = ("has_gate", "has_bias", "is_transposed")


def has_common_form(module: Any, experts: Experts) -> bool:
    """Whether a module says what transformers' grouped kernels go by, has no more than that, and computes as they do.

    Under autocast it has not: what is then computed in which dtype is the business of its own forward.
    """
    if not all(isinstance(getattr(module, name, None), bool) for name in _SAYS):
        return False
    if getattr(module, "has_post_expert_norm", False):  # of transformers since 5.20
        return False
    if not computes_as_transformers(module):
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
    up, down, up_bias, down_bias = [_local(module, name) for name in _names(module)]
    form = _Form(act, module.is_transposed, scale, _is_gated_silu(module))
    h_NI = _Up.apply(form, order, rows_RD, up, up_bias)
    return _Down.apply(form, order, h_NI, weights_RK, down, down_bias)


@dataclass(frozen=True)
class _Form:
    act: Callable[[torch.Tensor], torch.Tensor]
    transposed: bool
    scale: float
    is_gated_silu: bool

    def into(self, weight: torch.Tensor) -> torch.Tensor:
        """A weight as `(L, in, out)`."""
        return weight if self.transposed else weight.transpose(1, 2)

    def activated(self, h_NI: torch.Tensor, weights_N: torch.Tensor) -> torch.Tensor:
        fused = self.is_gated_silu and not torch.is_grad_enabled()  # its kernel records no graph
        if fused and (a_NI := kernels.gated_silu(h_NI, weights_N)) is not None:
            return a_NI
        return (self.act(h_NI) * weights_N[:, None]).to(h_NI.dtype)

    def activated_backward(self, h_NI: torch.Tensor, weights_N: torch.Tensor, da_NI: torch.Tensor):
        """The gradients of both, and the activation; `da_NI` may be gone."""
        if self.is_gated_silu and (found := kernels.gated_silu_backward(h_NI, weights_N, da_NI)) is not None:
            return found
        with torch.enable_grad():
            leaves = h_NI.detach().requires_grad_(), weights_N.detach().requires_grad_()
            a_NI = self.activated(*leaves)
        return *torch.autograd.grad(a_NI, leaves, da_NI), a_NI.detach()

    def gradient(self, weight: torch.Tensor, in_NI: torch.Tensor, out_NO: torch.Tensor, ends_L: torch.Tensor):
        """Of a weight, from what went in and the gradient of what came out."""
        return self.scaled(products(*((in_NI, out_NO) if self.transposed else (out_NO, in_NI)), ends_L), weight)

    def scaled(self, gradient: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
        gradient = gradient.to(parameter.dtype)
        return gradient.mul_(self.scale) if self.scale != 1 else gradient


def _names(module: Any) -> tuple[str, str, str | None, str | None]:
    up = "gate_up_proj" if module.has_gate else "up_proj"
    return (up, "down_proj", f"{up}_bias", "down_proj_bias") if module.has_bias else (up, "down_proj", None, None)


def _local(module: nn.Module, name: str | None) -> torch.Tensor | None:
    parameter = module.get_parameter(name) if name is not None else None
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


class _Up(torch.autograd.Function):
    """`h_NI` of the rows. A node for each product, so that `h_NI` is gone while the gradients of `up` are made."""

    @staticmethod
    def forward(ctx, form, order, rows_RD, up, bias):
        dtype, ends_L = rows_RD.dtype, order.ends_L
        h_NI = product(kernels.take(rows_RD, order.rows.source), form.into(up.to(dtype)), ends_L)
        if bias is not None:
            h_NI += bias.to(dtype)[_expert_of(ends_L, len(h_NI))]
        ctx.form = form
        ctx.save_for_backward(rows_RD, up, bias, *_places(order))
        return h_NI

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients):  # pyrefly: ignore[bad-override]  (the decorator's type loses the names)
        form, (rows_RD, up, bias, *places) = ctx.form, ctx.saved_tensors
        order, (dh_NI,) = _order(places), gradients
        needs_x, needs_up, needs_bias = ctx.needs_input_grad[2:]
        dx_RD = dup = dbias = None
        if needs_up:
            x_ND = kernels.take(rows_RD, order.rows.source)
            dup = form.gradient(up, x_ND, dh_NI, order.ends_L)
            del x_ND
        if needs_bias:
            dbias = form.scaled(_sum_of_each(dh_NI, order.ends_L), bias)
        if needs_x:
            dx_ND = product(dh_NI, form.into(up.to(rows_RD.dtype)).transpose(1, 2), order.ends_L)
            dx_RD = kernels.add_up(dx_ND, order.rows.index, order.rows.start)
        return None, None, dx_RD, dup, dbias


class _Down(torch.autograd.Function):
    """The weighted sum of the experts' results for each row."""

    @staticmethod
    def forward(ctx, form, order, h_NI, weights_RK, down, bias):
        dtype, ends_L = h_NI.dtype, order.ends_L
        weights_N = weights_RK.flatten()[order.choice_N]
        y_ND = product(form.activated(h_NI, weights_N), form.into(down.to(dtype)), ends_L)
        if bias is not None:
            y_ND += (bias.to(dtype)[_expert_of(ends_L, len(h_NI))] * weights_N[:, None]).to(dtype)
        ctx.form = form
        ctx.save_for_backward(h_NI, weights_RK, down, bias, *_places(order))
        return kernels.add_up(y_ND, order.rows.index, order.rows.start)

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients):  # pyrefly: ignore[bad-override]  (the decorator's type loses the names)
        form, (h_NI, weights_RK, down, bias, *places) = ctx.form, ctx.saved_tensors
        order, dtype = _order(places), h_NI.dtype
        _, needs_weights, needs_down, needs_bias = ctx.needs_input_grad[2:]
        g_ND = kernels.take(gradients[0], order.rows.source)
        weights_N = weights_RK.flatten()[order.choice_N]
        da_NI = product(g_ND, form.into(down.to(dtype)).transpose(1, 2), order.ends_L)
        dh_NI, dw_N, a_NI = form.activated_backward(h_NI, weights_N, da_NI)
        del da_NI
        dweights_RK = ddown = dbias = None
        if needs_down:
            ddown = form.gradient(down, a_NI, g_ND, order.ends_L)
        if needs_bias:
            dbias = form.scaled(_sum_of_each(g_ND * weights_N[:, None], order.ends_L), bias)
        if needs_weights:
            if bias is not None:
                dw_N = dw_N + (g_ND * bias.to(dtype)[_expert_of(order.ends_L, len(h_NI))]).sum(-1).to(dw_N.dtype)
            dweights_RK = torch.zeros_like(weights_RK)
            if len(dw_N):
                taken = dw_N[order.place_RK.clamp(max=len(dw_N) - 1)]
                dweights_RK = torch.where(order.here_RK, taken, 0).to(weights_RK.dtype)
        return None, None, dh_NI, dweights_RK, ddown, dbias


def _places(order: ByExpert) -> tuple[torch.Tensor, ...]:
    rows = order.rows
    return rows.source, rows.index, rows.start, order.choice_N, order.ends_L, order.place_RK, order.here_RK


def _order(places: list[torch.Tensor]) -> ByExpert:
    return ByExpert(Rows(*places[:3]), *places[3:])


def _is_gated_silu(module: Any) -> bool:
    """Whether its activation is silu of the first half times the second, by numbers of every size, once for a state."""
    if not module.has_gate or module.get_parameter(_names(module)[0]).device.type == "cpu":
        return False  # there is no kernel that would want to know
    state = module.act_fn, *(value for value in vars(module).values() if isinstance(value, (bool, int, float)))
    known = _GATES.get(module)
    if known is None or known[0] != state:
        known = _GATES[module] = state, gates_by_silu(module._apply_gate)
    return known[1]


def gates_by_silu(gate: Callable[[torch.Tensor], torch.Tensor]) -> bool:
    """Whether `gate([g | u])` is `silu(g) * u`, tried with numbers of every size and sign."""
    sizes = torch.logspace(-6, 6, 97, dtype=torch.float64, device="cpu")
    values = torch.cat([-sizes, sizes.new_zeros(1), sizes])
    g, u = (torch.stack([x, x.flip(0)], dim=1) for x in torch.cartesian_prod(values, values[::7]).unbind(1))
    with torch.no_grad():
        found, wanted = gate(torch.cat([g, u], dim=1)), nn.functional.silu(g) * u
    return found.shape == wanted.shape and torch.allclose(found, wanted, rtol=1e-12, atol=0)


def _expert_of(ends_L: torch.Tensor, rows: int) -> torch.Tensor:
    """The expert of each row in order; the last one's id for rows that belong to none."""
    place_N = torch.arange(rows, device=ends_L.device, dtype=torch.int32)
    return torch.searchsorted(ends_L, place_N, right=True).clamp(max=len(ends_L) - 1)


def _sum_of_each(rows_NF: torch.Tensor, ends_L: torch.Tensor) -> torch.Tensor:
    """The sum of each expert's rows: `(L, F)`."""
    start = nn.functional.pad(ends_L.long(), (1, 0))
    return kernels.add_up(rows_NF, torch.arange(len(rows_NF), device=rows_NF.device), start)


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
