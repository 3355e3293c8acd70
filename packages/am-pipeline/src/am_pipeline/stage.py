"""A pipeline stage that knows its boundary and the parameters it shares with other stages."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.pipelining import PipelineStage

from am_pipeline.boundary import Boundary
from am_pipeline.cut import CutPlan


class DecoderStage(PipelineStage):
    """torch's `PipelineStage` over one part of a cut model.

    Attributes:
        plan: the cut that this stage belongs to, the same on every rank.
        boundary: what enters and leaves the part.
        reduces_every_microbatch: whether FSDP2 reduces gradients after every backward instead of once per step: what
            accumulates is then sharded, at the price of a reduce-scatter and an all-gather more per microbatch.
    """

    reduces_every_microbatch = False

    def __init__(
        self,
        part: nn.Module,
        plan: CutPlan,
        boundary: Boundary,
        stage_index: int,
        device: torch.device,
        group: ProcessGroup,
    ) -> None:
        super().__init__(part, stage_index, len(plan.stages), device, group=group)
        self.plan = plan
        self.boundary = boundary

    def backward_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        result = super().backward_one_chunk(bwd_chunk_id, *args, **kwargs)
        if self.reduces_every_microbatch:
            self.perform_reduce_grad(1)
        return result
