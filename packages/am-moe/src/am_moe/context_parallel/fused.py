"""The fused attention kernels of the devices that have them, for whole and causal blocks."""

from __future__ import annotations

import torch
from torch import nn

from am_moe.context_parallel.plan import Kind

_aten = torch.ops.aten


def has_fused(q: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether the device has a kernel for these tensors that returns the log-sum-exp and takes it back."""
    if q.device.type == "cpu":
        return True
    width = max(q.shape[-1], v.shape[-1])
    return q.is_cuda and q.dtype in (torch.float16, torch.bfloat16) and width <= 256 and width % 8 == 0


def fused_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kind: Kind, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp of `(B, H, S, D)` queries over `(B, K, T, D)` keys and `(B, K, T, E)` values.

    Kernels know one width: the narrower of the two is padded with zeros, which add nothing to a product.
    """
    if q.shape[-1] != v.shape[-1]:
        one_q, one_k, one_v = _of_one_width(q, k, v)
        out, lse = fused_forward(one_q, one_k, one_v, kind, scale)
        return out[..., : v.shape[-1]], lse
    if kind is Kind.REVERSED:  # the other way round it is causal
        out, lse = fused_forward(q.flip(2), k.flip(2), v.flip(2), Kind.CAUSAL, scale)
        return out.flip(2), lse.flip(2)
    causal = kind is Kind.CAUSAL
    if q.is_cuda:
        return _aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=scale)[:2]
    return _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)


def fused_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    kind: Kind,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of queries, keys and values; `out` and `lse` may be those over more keys than these."""
    if q.shape[-1] != v.shape[-1]:
        padded_grad, padded_q, padded_k, padded_v, padded_out = _of_one_width(grad, q, k, v, out)
        dq, dk, dv = fused_backward(padded_grad, padded_q, padded_k, padded_v, padded_out, lse, kind, scale)
        return dq[..., : q.shape[-1]], dk[..., : k.shape[-1]], dv[..., : v.shape[-1]]
    if kind is Kind.REVERSED:
        grad, q, k, v, out, lse = (x.flip(2) for x in (grad, q, k, v, out, lse))
        dq, dk, dv = fused_backward(grad, q, k, v, out, lse, Kind.CAUSAL, scale)
        return dq.flip(2), dk.flip(2), dv.flip(2)
    causal, grad, out, lse = kind is Kind.CAUSAL, grad.to(q.dtype), out.to(q.dtype), lse.contiguous()
    if q.is_cuda:
        # Without dropout there are no lengths per sequence and no random state to hand back.
        random = torch.zeros(2, dtype=torch.uint64, device=q.device)
        return _aten._scaled_dot_product_flash_attention_backward(
            grad, q, k, v, out, lse, None, None, q.shape[2], k.shape[2], 0.0, causal, random, random, scale=scale
        )
    return _aten._scaled_dot_product_flash_attention_for_cpu_backward(grad, q, k, v, out, lse, 0.0, causal, scale=scale)


def _of_one_width(*tensors: torch.Tensor) -> list[torch.Tensor]:
    width = max(x.shape[-1] for x in tensors)
    return [nn.functional.pad(x, (0, width - x.shape[-1])) for x in tensors]
