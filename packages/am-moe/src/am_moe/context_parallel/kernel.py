"""Attention of one block of queries and keys, forward and backward, with the log-sum-exp that joins blocks.

    B batch     H query heads     K key-value heads (G = H / K queries share one)     S queries     T keys
    D width of queries and keys     E width of values

Where a block, of all rows or of each, is made of whole and causal ones, the device's fused kernel does it: one launch
for each. Else (soft-caps, holes in padding) tiles of plain torch do, of `_SCORES` scores at most, so that nothing of
size S x T is held.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from am_moe.context_parallel.fused import fused_backward, fused_forward, has_fused
from am_moe.context_parallel.plan import Block, Interval, Kind, Rule

_SCORES = 2**26  # of all rows and heads
_FEWEST = (256, 1024)  # queries, keys


@dataclass(frozen=True)
class Scores:
    """How scores are made of queries and keys.

    Attributes:
        rule: which keys a query sees, by position.
        scale: factor of the products.
        softcap: scores are bent to `softcap * tanh(score / softcap)`; None for not.
        query_groups_BN, key_groups_BN: over the whole sequence of N tokens; a query sees the keys of its own group
            only. None where all tokens are one group.
        reach_BN: where images are, for each token of the sequence the one after the last that it sees, which takes the
            place of `rule.after`; None without.
        rows: the rule of each row, which says the same as the groups; None where all have `rule`, or none says it.
    """

    rule: Rule
    scale: float
    softcap: float | None = None
    query_groups_BN: torch.Tensor | None = None
    key_groups_BN: torch.Tensor | None = None
    reach_BN: torch.Tensor | None = None
    rows: tuple[Rule, ...] | None = None


def block_forward(
    q_BHSD: torch.Tensor, k_BKTD: torch.Tensor, v_BKTE: torch.Tensor, block: Block, scores: Scores
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output `(B, H, S, E)` of the softmax over this block's keys alone, and its log-sum-exp `(B, H, S)`.

    A query that sees none of the keys has the output 0 and the log-sum-exp minus infinity. For half-precision inputs
    the plain path computes in float32.
    """
    parts = _fused_parts(q_BHSD, v_BKTE, block, scores)
    if parts == [(slice(None), block)]:
        return fused_forward(q_BHSD, k_BKTD, v_BKTE, block.kind, scores.scale)
    dtype = accumulate_dtype(q_BHSD.dtype)
    out = q_BHSD.new_zeros(*q_BHSD.shape[:3], v_BKTE.shape[-1], dtype=dtype)
    lse = q_BHSD.new_full(q_BHSD.shape[:3], -torch.inf, dtype=dtype)
    for row, part in parts or ():
        q_at, k_at = _within(part.queries, block.queries), _within(part.keys, block.keys)
        q, k, v = q_BHSD[row, :, q_at], k_BKTD[row, :, k_at], v_BKTE[row, :, k_at]
        merge(out[row, :, q_at], lse[row, :, q_at], *fused_forward(q, k, v, part.kind, scores.scale))
    if parts is not None:
        return out, lse
    for tile, q_at, k_at in _tiles(block, scores.rule, q_BHSD.shape[0] * q_BHSD.shape[1]):
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
    if parts == [(slice(None), block)]:
        return fused_backward(grad_BHSE, q_BHSD, k_BKTD, v_BKTE, out_BHSE, lse_BHS, block.kind, scores.scale)
    dtype = accumulate_dtype(q_BHSD.dtype)
    dq, dk, dv = (torch.zeros_like(x, dtype=dtype) for x in (q_BHSD, k_BKTD, v_BKTE))
    for row, part in parts or ():
        q_at, k_at = _within(part.queries, block.queries), _within(part.keys, block.keys)
        grad, q, out, lse = (x[row, :, q_at] for x in (grad_BHSE, q_BHSD, out_BHSE, lse_BHS))
        k, v = k_BKTD[row, :, k_at], v_BKTE[row, :, k_at]
        more = fused_backward(grad, q, k, v, out, lse, part.kind, scores.scale)
        for total, at, one in zip((dq, dk, dv), (q_at, k_at, k_at), more, strict=True):
            total[row, :, at] += one
    if parts is not None:
        return dq, dk, dv
    for tile, q_at, k_at in _tiles(block, scores.rule, q_BHSD.shape[0] * q_BHSD.shape[1]):
        q, k, v = q_BHSD[:, :, q_at].to(dtype), k_BKTD[:, :, k_at].to(dtype), v_BKTE[:, :, k_at].to(dtype)
        grad, out = grad_BHSE[:, :, q_at].to(dtype), out_BHSE[:, :, q_at].to(dtype)
        s, bent = _scores(q, k, tile, scores)
        p = (s - finite(lse_BHS[:, :, q_at])[..., None]).exp()
        dp = _ungrouped(_grouped(grad, k) @ v.mT, q)
        ds = p * (dp - (grad * out).sum(-1, keepdim=True))
        if bent is not None:
            ds *= 1 - bent.square()  # the slope of the softcap
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


def _fused_parts(q: torch.Tensor, v: torch.Tensor, block: Block, scores: Scores) -> list[tuple[slice, Block]] | None:
    """The block as blocks of all rows, or of one, that the device's fused kernel computes; None if tiles have to."""
    if scores.softcap is not None or not has_fused(q, v):
        return None
    found: list[tuple[slice, Block]] = []
    for row, rule in enumerate(scores.rows or (scores.rule,)):
        part = rule.block(block.queries, block.keys) if scores.rows else block
        at = slice(row, row + 1) if scores.rows else slice(None)
        found += [(at, piece) for piece in (rule.parts(part) if part is not None else ())]
    (q0, q1), (k0, k1) = block.queries, block.keys
    tiles = -(-(q1 - q0) // _FEWEST[0]) * -(-(k1 - k0) // _FEWEST[1]) * len(scores.rows or (1,))
    return found if len(found) <= 8 * tiles and all(p.kind is not Kind.PARTIAL for _, p in found) else None


def _tiles(block: Block, rule: Rule, copies: int) -> Iterator[tuple[Block, slice, slice]]:
    """The parts of a block that the mask lets through, and where they are in its tensors."""
    width = max(_FEWEST[1], block.keys[1] - block.keys[0] if rule.before is None else 2 * rule.before)
    width = min(width, max(_FEWEST[1], _SCORES // (copies * _FEWEST[0])))
    height = max(_FEWEST[0], _SCORES // (copies * width))
    for q0, q1 in _cut(block.queries, height):
        for k0, k1 in _cut(block.keys, width):
            tile = rule.block((q0, q1), (k0, k1))
            if tile is not None:
                yield tile, _within(tile.queries, block.queries), _within(tile.keys, block.keys)


def _cut(interval: Interval, size: int) -> Iterator[Interval]:
    for start in range(interval[0], interval[1], size):
        yield start, min(start + size, interval[1])


def _within(part: Interval, whole: Interval) -> slice:
    return slice(part[0] - whole[0], part[1] - whole[0])


def _scores(q: torch.Tensor, k: torch.Tensor, tile: Block, scores: Scores) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scores `(B, H, S, T)`, minus infinity where the mask forbids, and their share of the softcap if there is one."""
    s = _ungrouped(_grouped(q * scores.scale, k) @ k.mT, q)
    bent = None
    if scores.softcap is not None:
        bent = s.div_(scores.softcap).tanh_()
        s = bent * scores.softcap
    if tile.kind is not Kind.FULL:
        s.masked_fill_(_forbidden(tile, scores, q.device), -torch.inf)
    return s, bent


def _forbidden(tile: Block, scores: Scores, device: torch.device) -> torch.Tensor:
    """What the mask does not let through, `(S, T)` or `(B, 1, S, T)`."""
    ahead = torch.arange(*tile.keys, device=device) - torch.arange(*tile.queries, device=device)[:, None]
    forbidden = []
    if scores.reach_BN is not None:
        keys, reach = torch.arange(*tile.keys, device=device), scores.reach_BN[:, None, slice(*tile.queries), None]
        forbidden.append(keys >= reach)
    elif scores.rule.after is not None:
        forbidden.append(ahead > scores.rule.after)
    if scores.rule.before is not None:
        forbidden.append(ahead < -scores.rule.before)
    if scores.query_groups_BN is not None and scores.key_groups_BN is not None:
        of_queries, of_keys = (
            scores.query_groups_BN[:, slice(*tile.queries)],
            scores.key_groups_BN[:, slice(*tile.keys)],
        )
        forbidden.append(of_queries[:, None, :, None] != of_keys[:, None, None, :])
    return functools.reduce(operator.or_, forbidden or [torch.zeros((), dtype=torch.bool, device=device)])


def _grouped(x_BHSX: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """`(B, K, G * S, X)`: the queries that share a key-value head, under each other."""
    return x_BHSX.reshape(x_BHSX.shape[0], k.shape[1], -1, x_BHSX.shape[-1])


def _ungrouped(x_BKRX: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return x_BKRX.reshape(*q.shape[:3], x_BKRX.shape[-1])
