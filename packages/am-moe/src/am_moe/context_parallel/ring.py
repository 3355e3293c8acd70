"""Attention of a sequence that the ranks of an axis share: each keeps its queries, keys and values come by."""

from __future__ import annotations

from functools import wraps

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from am_moe.context_parallel.kernel import Scores, accumulate_dtype, block_backward, block_forward, finite, merge
from am_moe.context_parallel.plan import Block, Interval, Plan
from am_moe.context_parallel.transport import Gathered, Piece, PointToPoint, place


def shared_attention(
    q_BHSD: torch.Tensor,
    k_BKSD: torch.Tensor,
    v_BKSE: torch.Tensor,
    sinks_H: torch.Tensor | None,
    scores: Scores,
    plan: Plan,
    group: dist.ProcessGroup | None,
    gather: bool,
) -> torch.Tensor:
    """Attention of this rank's queries over the whole sequence.

    Args:
        q_BHSD: this rank's queries, in the order of its intervals.
        k_BKSD, v_BKSE: its keys and values; `H` is a multiple of `K`.
        sinks_H: a score per head that takes part in the softmax and brings no value; None for none.
        scores: how scores are made.
        plan: what each rank holds; `plan.rule` is `scores.rule`.
        group: the ranks of the axis; None where this rank has the whole sequence.
        gather: gather all keys at once instead of exchanging them step by step.

    Returns:
        `(B, H, S, E)` in the dtype of the queries.

    Collectives: those of `PointToPoint` or `Gathered`, once forward and once backward.
    """
    transport = Gathered if gather else PointToPoint
    if not q_BHSD.dtype == k_BKSD.dtype == v_BKSE.dtype:
        raise ValueError(
            f"queries, keys and values must have one dtype; got {q_BHSD.dtype}, {k_BKSD.dtype} and {v_BKSE.dtype}"
        )
    return _Shared.apply(q_BHSD, k_BKSD, v_BKSE, sinks_H, scores, plan, group, transport)


def _as_it_is(function):
    """What runs within has the dtypes that it asks for: autocast would round the scores that it keeps in float32."""

    @wraps(function)
    def run(ctx, first, *others):
        with torch.autocast(first.device.type, enabled=False):
            return function(ctx, first, *others)

    return run


class _Shared(torch.autograd.Function):
    @staticmethod
    @_as_it_is
    def forward(ctx, q, k, v, sinks, scores, plan, group, transport):
        dtype = accumulate_dtype(q.dtype)
        out = q.new_zeros(*q.shape[:3], v.shape[-1], dtype=dtype)
        lse = q.new_full(q.shape[:3], -torch.inf, dtype=dtype)
        rank = place(group)[0]
        for source, pieces in transport(plan, group, k, v).pieces():
            for block in plan.blocks(rank, source):
                rows, piece, columns = _places(block, plan, rank, pieces)
                more = block_forward(q[:, :, rows], piece.k[:, :, columns], piece.v[:, :, columns], block, scores)
                merge(out[:, :, rows], lse[:, :, rows], *more)
        if sinks is not None:
            total = torch.logaddexp(lse, sinks.to(dtype)[:, None])
            out *= (lse - total).exp()[..., None]
            lse = total
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, sinks, out, lse)
        ctx.settings = scores, plan, group, transport
        return out

    @staticmethod
    @once_differentiable
    @_as_it_is
    def backward(ctx, *gradients):  # pyrefly: ignore[bad-override]  (the decorator's type loses the names)
        (grad,) = gradients
        q, k, v, sinks, out, lse = ctx.saved_tensors
        scores, plan, group, transport = ctx.settings
        dtype = lse.dtype
        dq, dk, dv = (torch.zeros_like(x, dtype=dtype) for x in (q, k, v))
        rank = place(group)[0]
        moving = transport(plan, group, k, v)
        for source, pieces in moving.pieces():
            given = [
                Piece(p.tokens, torch.zeros_like(p.k, dtype=dtype), torch.zeros_like(p.v, dtype=dtype)) for p in pieces
            ]
            for block in plan.blocks(rank, source):
                rows, piece, columns = _places(block, plan, rank, pieces)
                q_gradient, k_gradient, v_gradient = block_backward(
                    grad[:, :, rows], q[:, :, rows], piece.k[:, :, columns], piece.v[:, :, columns],
                    out[:, :, rows], lse[:, :, rows], block, scores,
                )  # fmt: skip
                into = next(g for g in given if g.tokens == piece.tokens)
                dq[:, :, rows] += q_gradient
                into.k[:, :, columns] += k_gradient
                into.v[:, :, columns] += v_gradient
            _add(moving.give_back(source, given), dk, dv, plan, rank)
        _add(moving.returned(), dk, dv, plan, rank)
        d_sinks = None
        if sinks is not None:
            share = (sinks.to(dtype)[:, None] - finite(lse)).exp()
            d_sinks = -(share * (grad * out).sum(-1)).sum((0, 2)).to(sinks.dtype)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), d_sinks, None, None, None, None


def _add(pieces: list[Piece], dk: torch.Tensor, dv: torch.Tensor, plan: Plan, rank: int) -> None:
    """Add gradients that have come home to those of this rank's keys and values."""
    for piece in pieces:
        start = plan.offset(rank, piece.tokens[0])
        at = slice(start, start + piece.tokens[1] - piece.tokens[0])
        dk[:, :, at] += piece.k
        dv[:, :, at] += piece.v


def _places(block: Block, plan: Plan, rank: int, pieces: list[Piece]) -> tuple[slice, Piece, slice]:
    """Where a block's queries are in this rank's, which piece has its keys, and where in it."""
    first = plan.offset(rank, block.queries[0])
    piece = next(p for p in pieces if _holds(p.tokens, block.keys))
    start = block.keys[0] - piece.tokens[0]
    rows = slice(first, first + block.queries[1] - block.queries[0])
    return rows, piece, slice(start, start + block.keys[1] - block.keys[0])


def _holds(tokens: Interval, part: Interval) -> bool:
    return tokens[0] <= part[0] and part[1] <= tokens[1]
