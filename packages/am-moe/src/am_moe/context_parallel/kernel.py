"""Attention of one block of queries and keys, forward and backward, with the log-sum-exp that joins blocks.

    B batch     H query heads     K key-value heads (G = H / K queries share one)     S queries     T keys
    D width of queries and keys     E width of values

Where nothing but a whole or a causal block is asked for, the device's fused kernel does it; else tiles of plain torch,
no larger than `_TILE`, so that nothing of size S x T is ever held.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from am_moe.context_parallel.fused import fused_backward, fused_forward, has_fused
from am_moe.context_parallel.plan import Block, Interval, Kind, Rule

_TILE = (256, 1024)  # queries, keys


@dataclass(frozen=True)
class Scores:
    """How scores are made of queries and keys.

    Attributes:
        rule: which keys a query sees, by position.
        scale: factor of the products.
        softcap: scores are bent to `softcap * tanh(score / softcap)`; None for not.
        query_groups_BN, key_groups_BN: over the whole sequence of N tokens; a query sees the keys of its own group
            only. None where all tokens are one group.
    """

    rule: Rule
    scale: float
    softcap: float | None = None
    query_groups_BN: torch.Tensor | None = None
    key_groups_BN: torch.Tensor | None = None


def block_forward(
    q_BHSD: torch.Tensor, k_BKTD: torch.Tensor, v_BKTE: torch.Tensor, block: Block, scores: Scores
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output `(B, H, S, E)` of the softmax over this block's keys alone, and its log-sum-exp `(B, H, S)`.

    A query that sees none of the keys has the output 0 and the log-sum-exp minus infinity. For half-precision inputs
    the plain path computes in float32.
    """
    parts = _fused_parts(q_BHSD, v_BKTE, block, scores)
    if parts == [block]:
        return fused_forward(q_BHSD, k_BKTD, v_BKTE, block.kind, scores.scale)
    dtype = accumulate_dtype(q_BHSD.dtype)
    out = q_BHSD.new_zeros(*q_BHSD.shape[:3], v_BKTE.shape[-1], dtype=dtype)
    lse = q_BHSD.new_full(q_BHSD.shape[:3], -torch.inf, dtype=dtype)
    for part in parts:
        q_at, k_at = _within(part.queries, block.queries), _within(part.keys, block.keys)
        more = fused_forward(q_BHSD[:, :, q_at], k_BKTD[:, :, k_at], v_BKTE[:, :, k_at], part.kind, scores.scale)
        merge(out[:, :, q_at], lse[:, :, q_at], *more)
    if parts:
        return out, lse
    for tile, q_at, k_at in _tiles(block, scores.rule):
        q, k, v = q_BHSD[:, :, q_at].to(dtype), k_BKTD[:, :, k_at].to(dtype), v_BKTE[:, :, k_at].to(dtype)
        s, _ = _scores(q, k, tile, scores)
        top = s.logsumexp(-1)
        p = (s - finite(top)[..., None]).exp()
        merge(out[:, :, q_at], lse[:, :, q_at], _ungrouped(_grouped(p, k) @ v, q), top)
    return out, lse


def block_backward(
    grad_BHSE: torch.Tensor,
    q_BHSD: torch.Tensor,
    k_BKTD: torch.Tensor,
    v_BKTE: torch.Tensor,
    out_BHSE: torch.Tensor,
    lse_BHS: torch.Tensor,
    block: Block,
    scores: Scores,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """This block's share of the gradients of queries, keys and values.

    Args:
        grad_BHSE: the gradient of the whole output.
        out_BHSE, lse_BHS: the whole output, over all keys of the sequence, and its log-sum-exp.
    """
    parts = _fused_parts(q_BHSD, v_BKTE, block, scores)
    if parts == [block]:
        return fused_backward(grad_BHSE, q_BHSD, k_BKTD, v_BKTE, out_BHSE, lse_BHS, block.kind, scores.scale)
    dtype = accumulate_dtype(q_BHSD.dtype)
    dq, dk, dv = (torch.zeros_like(x, dtype=dtype) for x in (q_BHSD, k_BKTD, v_BKTE))
    for part in parts:
        q_at, k_at = _within(part.queries, block.queries), _within(part.keys, block.keys)
        grad, q, out, lse = (x[:, :, q_at] for x in (grad_BHSE, q_BHSD, out_BHSE, lse_BHS))
        k, v = k_BKTD[:, :, k_at], v_BKTE[:, :, k_at]
        more = fused_backward(grad, q, k, v, out, lse, part.kind, scores.scale)
        for total, at, one in zip((dq, dk, dv), (q_at, k_at, k_at), more, strict=True):
            total[:, :, at] += one
    if parts:
        return dq, dk, dv
    for tile, q_at, k_at in _tiles(block, scores.rule):
        q, k, v = q_BHSD[:, :, q_at].to(dtype), k_BKTD[:, :, k_at].to(dtype), v_BKTE[:, :, k_at].to(dtype)
        grad, out = grad_BHSE[:, :, q_at].to(dtype), out_BHSE[:, :, q_at].to(dtype)
        s, bend = _scores(q, k, tile, scores)
        p = (s - finite(lse_BHS[:, :, q_at])[..., None]).exp()
        dp = _ungrouped(_grouped(grad, k) @ v.mT, q)
        ds = p * (dp - (grad * out).sum(-1, keepdim=True))
        if bend is not None:
            ds *= bend
        ds_BKRT = _grouped(ds, k) * scores.scale
        dq[:, :, q_at] += _ungrouped(ds_BKRT @ k, q)
        dk[:, :, k_at] += ds_BKRT.mT @ _grouped(q, k)
        dv[:, :, k_at] += _grouped(p, k).mT @ _grouped(grad, k)
    return dq, dk, dv


def merge(out: torch.Tensor, lse: torch.Tensor, more_out: torch.Tensor, more_lse: torch.Tensor) -> None:
    """Join the outputs of two sets of keys, in place: each counts by its share of the sum of exponentials."""
    total = torch.logaddexp(lse, more_lse.to(lse.dtype))
    safe = finite(total)
    out.mul_((lse - safe).exp()[..., None]).add_(
        more_out.to(out.dtype) * (more_lse.to(lse.dtype) - safe).exp()[..., None]
    )
    lse.copy_(total)


def finite(lse: torch.Tensor) -> torch.Tensor:
    """A log-sum-exp to subtract: that of no keys is minus infinity, from which nothing can be subtracted."""
    return lse.masked_fill(lse == -torch.inf, 0.0)


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums over blocks are kept in."""
    return torch.promote_types(dtype, torch.float32)


def _fused_parts(q: torch.Tensor, v: torch.Tensor, block: Block, scores: Scores) -> list[Block]:
    """The block as blocks that the device's fused kernel computes; empty if tiles have to, or are as few."""
    if scores.softcap is not None or not has_fused(q, v):
        return []
    parts = scores.rule.parts(block)
    (q0, q1), (k0, k1) = block.queries, block.keys
    tiles = -(-(q1 - q0) // _TILE[0]) * -(-(k1 - k0) // _TILE[1])
    return parts if len(parts) <= 8 * tiles and all(p.kind is not Kind.PARTIAL for p in parts) else []


def _tiles(block: Block, rule: Rule) -> Iterator[tuple[Block, slice, slice]]:
    """The parts of a block that the mask lets through, and where they are in its tensors."""
    for q0, q1 in _cut(block.queries, _TILE[0]):
        for k0, k1 in _cut(block.keys, _TILE[1]):
            tile = rule.block((q0, q1), (k0, k1))
            if tile is not None:
                yield tile, _within(tile.queries, block.queries), _within(tile.keys, block.keys)


def _cut(interval: Interval, size: int) -> Iterator[Interval]:
    for start in range(interval[0], interval[1], size):
        yield start, min(start + size, interval[1])


def _within(part: Interval, whole: Interval) -> slice:
    return slice(part[0] - whole[0], part[1] - whole[0])


def _scores(q: torch.Tensor, k: torch.Tensor, tile: Block, scores: Scores) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scores `(B, H, S, T)`, minus infinity where the mask forbids, and the slope of the softcap if there is one."""
    s = _ungrouped(_grouped(q * scores.scale, k) @ k.mT, q)
    bend = None
    if scores.softcap is not None:
        bent = (s / scores.softcap).tanh()
        s, bend = bent * scores.softcap, 1 - bent.square()
    if tile.kind is not Kind.FULL:
        s = s.masked_fill(~_allowed(tile, scores, q.device), -torch.inf)
    return s, bend


def _allowed(tile: Block, scores: Scores, device: torch.device) -> torch.Tensor:
    """What the mask lets through, `(S, T)` or `(B, 1, S, T)`."""
    ahead = torch.arange(*tile.keys, device=device) - torch.arange(*tile.queries, device=device)[:, None]
    allowed = torch.ones_like(ahead, dtype=torch.bool)
    if scores.rule.after is not None:
        allowed &= ahead <= scores.rule.after
    if scores.rule.before is not None:
        allowed &= ahead >= -scores.rule.before
    if scores.query_groups_BN is not None and scores.key_groups_BN is not None:
        of_queries, of_keys = (
            scores.query_groups_BN[:, slice(*tile.queries)],
            scores.key_groups_BN[:, slice(*tile.keys)],
        )
        return allowed & (of_queries[:, None, :, None] == of_keys[:, None, None, :])
    return allowed


def _grouped(x_BHSX: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """`(B, K, G * S, X)`: the queries that share a key-value head, under each other."""
    return x_BHSX.reshape(x_BHSX.shape[0], k.shape[1], -1, x_BHSX.shape[-1])


def _ungrouped(x_BKRX: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return x_BKRX.reshape(*q.shape[:3], x_BKRX.shape[-1])
