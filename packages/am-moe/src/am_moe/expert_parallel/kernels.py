"""What surrounds the grouped products of experts, one kernel each: rows taken, rows added up, the activation.

    N rows      R sources of them      D model dim      I inner dim

On a device that Triton knows, these are Triton's; anywhere else, and in float64, torch operators of the same result to
rounding. Sums are in float32 and in a fixed order, so that the same inputs give the same bits.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def take(x_RD: torch.Tensor, source_N: torch.Tensor) -> torch.Tensor:
    """`x_RD[source_N]`."""
    if (fused := _fused(x_RD)) and x_RD.stride(1) == 1:
        return fused.take(x_RD, source_N)
    return x_RD[source_N]


def add_up(rows_ND: torch.Tensor, index: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    """`(R, D)`: row r is the sum of `rows_ND[index[start[r]:start[r + 1]]]`; each row is read once.

    `index_add_` would round to half precision after each row, or add in any order.
    """
    if not len(rows_ND):
        return rows_ND.new_zeros(len(start) - 1, rows_ND.shape[1])
    if (fused := _fused(rows_ND)) and rows_ND.stride(1) == 1:
        return fused.add_up(rows_ND, index, start)
    return nn.functional.embedding_bag(index, rows_ND.contiguous(), start, mode="sum")[:-1]


def gated_silu(h_NF: torch.Tensor, weights_N: torch.Tensor) -> torch.Tensor | None:
    """`silu(gate) * up * weight`, `(N, I)`, of `h_NF = [gate | up]`; None where there is no kernel for it."""
    fused = _fused(h_NF) if h_NF.is_contiguous() else None
    return fused.gated_silu(h_NF, weights_N) if fused else None


def gated_silu_backward(
    h_NF: torch.Tensor, weights_N: torch.Tensor, da_NI: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """The gradients of `h_NF` and `weights_N`, and the activation once more, which takes the place of `da_NI`.

    None where there is no kernel for it; `da_NI` is then as it was.
    """
    fused = _fused(h_NF) if h_NF.is_contiguous() and da_NI.is_contiguous() else None
    return fused.gated_silu_backward(h_NF, weights_N, da_NI) if fused else None


def _fused(tensor: torch.Tensor) -> Any:
    """The module of Triton's kernels, if this tensor can go to them."""
    plain = type(tensor) is torch.Tensor or type(tensor) is nn.Parameter
    if not plain or tensor.device.type not in ("cuda", "xpu") or tensor.dtype not in _DTYPES:
        return None
    # Triton launches on the current device, whatever device its tensors are on.
    return _triton() if tensor.device.index == torch.accelerator.current_device_index() else None


@functools.cache
def _triton() -> Any:
    try:
        from am_moe.expert_parallel import kernels_triton
    except ImportError:
        return None
    return kernels_triton
