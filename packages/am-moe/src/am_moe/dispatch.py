"""Send tokens to the ranks that hold their experts, and the results back.

A token travels once to each rank that holds at least one of its experts, with its weights there; that rank sums the
weighted outputs of its experts before the row returns. With K choices over P ranks that is about `P (1 - (1 - 1/P)^K)`
rows each way instead of K.

    T tokens of this rank          D model dim         K choices per token      P ranks on the axis
    S rows this rank sends         R rows it receives  E experts, L = E / P of them local
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Dispatched:
    """What a rank received, and what it needs to send the results back.

    Attributes:
        rows_RD: the tokens that need experts of this rank.
        ids_RK: their local expert ids in `[0, L)`; `L` where the choice is another rank's.
        weights_RK: their routing weights; 0 where the choice is another rank's.
        token_S: which of this rank's tokens each sent row was.
        num_tokens: T.
        sent: rows sent to each rank.
        received: rows received from each rank.
    """

    rows_RD: torch.Tensor
    ids_RK: torch.Tensor
    weights_RK: torch.Tensor
    token_S: torch.Tensor
    num_tokens: int
    sent: list[int]
    received: list[int]


def dispatch(
    x_TD: torch.Tensor,
    ids_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    num_local_experts: int,
    group: dist.ProcessGroup,
) -> Dispatched:
    """Send every token once to each rank that holds one of its experts.

    Args:
        x_TD: this rank's tokens, any float dtype; T may differ between ranks and be 0.
        ids_TK: global expert ids, int64. Ids of `E` and above mean no expert; an id may occur twice in a row.
        weights_TK: routing weights, any float dtype.
        num_local_experts: L, the same on every rank; rank p holds the experts from `p L` to `(p + 1) L - 1`.
        group: the expert-parallel group.

    Collectives (expert axis): forward an all-to-all each of counts (with a host sync), ids, rows and weights; backward
    one each of rows and weights. Every rank issues them, whatever it sends.
    """
    ranks = dist.get_world_size(group)
    owner_TK = torch.div(ids_TK, num_local_experts, rounding_mode="floor")
    needs_PT = torch.stack([(owner_TK == p).any(-1) for p in range(ranks)])
    owner_S, token_S = needs_PT.nonzero(as_tuple=True)

    sent_P = needs_PT.sum(-1)
    received_P = torch.empty_like(sent_P)
    dist.all_to_all_single(received_P, sent_P, group=group)
    sent, received = sent_P.tolist(), received_P.tolist()

    here_SK = owner_TK[token_S] == owner_S[:, None]
    ids_SK = torch.where(here_SK, ids_TK[token_S] - owner_S[:, None] * num_local_experts, num_local_experts)
    weights_SK = torch.where(here_SK, weights_TK[token_S], 0)
    ids_RK = ids_SK.new_empty(sum(received), ids_SK.shape[1])
    dist.all_to_all_single(ids_RK, ids_SK.contiguous(), received, sent, group=group)
    rows_RD, weights_RK = _Exchange.apply(sent, received, group, x_TD[token_S], weights_SK)
    return Dispatched(rows_RD, ids_RK, weights_RK, token_S, x_TD.shape[0], sent, received)


def combine(out_RD: torch.Tensor, dispatched: Dispatched, group: dist.ProcessGroup) -> torch.Tensor:
    """Return the results to the tokens' ranks and add up what each token got from its ranks: `(T, D)`.

    Collectives (expert axis): one all-to-all of rows forward, one backward.
    """
    (back_SD,) = _Exchange.apply(dispatched.received, dispatched.sent, group, out_RD)
    y_TD = back_SD.new_zeros(dispatched.num_tokens, back_SD.shape[1])
    return y_TD.index_add(0, dispatched.token_S, back_SD)


class _Exchange(torch.autograd.Function):
    """All-to-all of the rows of some tensors; backward sends the gradients the other way, in the same order.

    One node for all tensors: ranks whose graphs differ, because one got no rows, still issue the same collectives in
    the same order.
    """

    @staticmethod
    def forward(ctx, sent, received, group, *tensors):
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return tuple(_all_to_all(t, sent, received, group) for t in tensors)

    @staticmethod
    def backward(ctx, *gradients):
        return None, None, None, *(_all_to_all(g, ctx.received, ctx.sent, ctx.group) for g in gradients)


def _all_to_all(tensor: torch.Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> torch.Tensor:
    out = tensor.new_empty(sum(received), *tensor.shape[1:])
    dist.all_to_all_single(out, tensor.contiguous(), received, sent, group=group)
    return out
