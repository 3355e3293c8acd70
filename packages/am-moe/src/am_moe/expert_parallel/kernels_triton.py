"""The kernels of `am_moe.kernels` in Triton, which comes with torch where there is a device for it.

Each program works on a tile of so many rows and columns, all of whose loads are under way at once: what these kernels
take is memory traffic and nothing else. The sizes of the tiles were measured on an H100.
"""

from __future__ import annotations

import torch
import triton  # pyrefly: ignore[missing-import]
import triton.language as tl  # pyrefly: ignore[missing-import]


def take(x_RD: torch.Tensor, source_N: torch.Tensor) -> torch.Tensor:
    width, number = x_RD.shape[1], len(source_N)
    out_ND = x_RD.new_empty(number, width)
    tile = {"ROWS": 4, "BLOCK": _block(width, 512), "num_warps": 4}
    if number:
        grid = triton.cdiv(number, tile["ROWS"]), triton.cdiv(width, tile["BLOCK"])
        _take[grid](x_RD, source_N, out_ND, number, width, x_RD.stride(0), **tile)
    return out_ND


def add_up(rows_ND: torch.Tensor, index: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    width, number = rows_ND.shape[1], len(start) - 1
    out_RD = rows_ND.new_empty(number, width)
    tile = {"ROWS": 4, "BLOCK": _block(width, 2048), "num_warps": 4}
    if number:
        grid = number, triton.cdiv(width, tile["BLOCK"])
        _add_up[grid](rows_ND, index, start, out_RD, width, rows_ND.stride(0), **tile)
    return out_RD


def gated_silu(h_NF: torch.Tensor, weights_N: torch.Tensor) -> torch.Tensor:
    number, width = len(h_NF), h_NF.shape[1] // 2
    a_NI = h_NF.new_empty(number, width)
    tile = {"ROWS": 2, "BLOCK": _block(width, 512), "num_warps": 4}
    if number:
        grid = triton.cdiv(number, tile["ROWS"]), triton.cdiv(width, tile["BLOCK"])
        _gated_silu[grid](h_NF, weights_N, a_NI, number, width, **tile)
    return a_NI


def gated_silu_backward(
    h_NF: torch.Tensor, weights_N: torch.Tensor, da_NI: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    number, width = len(h_NF), h_NF.shape[1] // 2
    dh_NF, dw_N = torch.empty_like(h_NF), torch.empty_like(weights_N)
    tile = {"ROWS": 1, "BLOCK": _block(width, 512 if width % 1024 else 1024), "num_warps": 4}
    if number:
        grid = (triton.cdiv(number, tile["ROWS"]),)
        _gated_silu_backward[grid](h_NF, weights_N, da_NI, dh_NF, dw_N, number, width, **tile)
    return dh_NF, dw_N, da_NI


def _block(width: int, most: int) -> int:
    return min(triton.next_power_of_2(width), most)


@triton.jit
def _take(x, source, out, number, width, stride, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (row < number)[:, None] & (column < width)[None, :]
    there = tl.load(source + row, mask=row < number, other=0).to(tl.int64)
    values = tl.load(x + there[:, None] * stride + column[None, :], mask=inside)
    tl.store(out + row[:, None] * width + column[None, :], values, mask=inside)


@triton.jit
def _add_up(rows, index, start, out, width, stride, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    one = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    first, end = tl.load(start + one), tl.load(start + one + 1)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for at in range(first, end, ROWS):
        place = at + tl.arange(0, ROWS)
        row = tl.load(index + place, mask=place < end, other=0).to(tl.int64)
        inside = (place < end)[:, None] & (column < width)[None, :]
        each = tl.load(rows + row[:, None] * stride + column[None, :], mask=inside, other=0.0)
        total += tl.sum(each.to(tl.float32), axis=0)
    tl.store(out + one * width + column, total.to(out.dtype.element_ty), mask=column < width)


@triton.jit
def _gated_silu(h, weights, a, number, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (row < number)[:, None] & (column < width)[None, :]
    weight = tl.load(weights + row, mask=row < number, other=0.0).to(tl.float32)
    at = row[:, None] * (2 * width) + column[None, :]
    gate = tl.load(h + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(h + at + width, mask=inside, other=0.0).to(tl.float32)
    value = gate * tl.sigmoid(gate) * up * weight[:, None]
    tl.store(a + row[:, None] * width + column[None, :], value.to(a.dtype.element_ty), mask=inside)


@triton.jit
def _gated_silu_backward(h, weights, da, dh, dw, number, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    weight = tl.load(weights + row, mask=row < number, other=0.0).to(tl.float32)[:, None]
    total = tl.zeros((ROWS,), dtype=tl.float32)
    for first in range(0, width, BLOCK):
        column = first + tl.arange(0, BLOCK)
        inside = (row < number)[:, None] & (column < width)[None, :]
        at = row[:, None] * (2 * width) + column[None, :]
        there = row[:, None] * width + column[None, :]
        gate = tl.load(h + at, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(h + at + width, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(da + there, mask=inside, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        total += tl.sum(grad * silu * up, axis=1)
        slope = sigmoid * (1.0 + gate * (1.0 - sigmoid))
        dtype = dh.dtype.element_ty
        tl.store(dh + at, (grad * weight * up * slope).to(dtype), mask=inside)
        tl.store(dh + at + width, (grad * weight * silu).to(dtype), mask=inside)
        tl.store(da + there, (silu * up * weight).to(dtype), mask=inside)
    tl.store(dw + row, total.to(dw.dtype.element_ty), mask=row < number)
