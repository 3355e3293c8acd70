"""How tokens reach their experts and come back: the contract of a dispatcher, and what all of them share.

    T tokens of this rank          D model dim         K choices per token      P ranks on the axis
    S rows this rank sends         R rows it receives  E experts, L = E / P of them local

A dispatcher brings this rank the rows that need its experts, and takes the results back::

    received = dispatcher.dispatch(x_TD, ids_TK, weights_TK, L, group)      every token, wherever it must go
    out_RF   = experts of this rank, weighted and summed per row of received.rows_RD
    y_TF     = dispatcher.combine(out_RF, received, group)                  summed over the ranks of each token

Its obligations:

* Every rank issues the same collectives in the same order, forward and backward, whatever it sends; ranks may have
  different T, and T = 0.
* No token is dropped. Ids of E and above go nowhere; an id may occur twice in a row.
* Backward of `combine` brings the gradient of `y_TF` to each row of `out_RF` that was summed into it. Backward of
  `dispatch` brings each token the sum of the gradients of its rows on all ranks, and each routing weight the gradient
  of the one row that used it. Nothing is divided: whoever calls scales what must be averaged.
* Sums have a fixed order, so that the same inputs give the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist

DispatcherName = Literal["all_to_all", "all_gather", "local"]


@dataclass(frozen=True)
class Received:
    """What a rank received, and what its dispatcher needs to send the results back.

    Attributes:
        rows_RD: the tokens that need experts of this rank.
        ids_RK: their local expert ids in `[0, L)`; `L` or above where the choice is another rank's or none.
        weights_RK: their routing weights; anything where the choice is another rank's.
        back: the dispatcher's own.
        choices: how many ids are below L, if the host knows; it saves a sync where experts compute with their own
            forward, and rows that nobody reads elsewhere.
    """

    rows_RD: torch.Tensor
    ids_RK: torch.Tensor
    weights_RK: torch.Tensor
    back: Any
    choices: int | None = None


class Dispatcher(Protocol):
    """Brings tokens to the ranks of their experts and back; its obligations are those of this file."""

    def dispatch(
        self,
        x_TD: torch.Tensor,
        ids_TK: torch.Tensor,
        weights_TK: torch.Tensor,
        num_local_experts: int,
        group: dist.ProcessGroup,
    ) -> Received:
        """Bring every token to each rank that holds one of its experts.

        Args:
            x_TD: this rank's tokens, any float dtype.
            ids_TK: global expert ids, int64.
            weights_TK: routing weights, any float dtype.
            num_local_experts: L, the same on every rank; rank p holds the experts from `p L` to `(p + 1) L - 1`.
            group: the expert-parallel group.
        """
        ...

    def combine(self, out_RF: torch.Tensor, received: Received, group: dist.ProcessGroup) -> torch.Tensor:
        """Bring the results back to the tokens and add up what each got from its ranks: `(T, F)`."""
        ...


def count_choices(ids_TK: torch.Tensor, local: int, ranks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The rank of each choice, `(T, K)`, P for ids beyond the experts; and how many fall on each rank, `(P,)`."""
    owner_TK = torch.div(ids_TK.long(), local, rounding_mode="floor").clamp(max=ranks)
    # A comparison with each rank: adding to so few places at once makes a device wait for itself.
    each_P = torch.arange(ranks, device=ids_TK.device)
    return owner_TK, (owner_TK.flatten()[:, None] == each_P).sum(0)
