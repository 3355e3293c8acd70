"""One rank holds all experts: nothing moves."""

from __future__ import annotations

import torch
import torch.distributed as dist

from am_moe.expert_parallel.dispatch import Received


class Local:
    """Collectives: none."""

    def dispatch(
        self,
        x_TD: torch.Tensor,
        ids_TK: torch.Tensor,
        weights_TK: torch.Tensor,
        num_local_experts: int,
        group: dist.ProcessGroup,
    ) -> Received:
        return Received(x_TD, ids_TK, weights_TK, None)

    def combine(self, out_RF: torch.Tensor, received: Received, group: dist.ProcessGroup) -> torch.Tensor:
        return out_RF
