"""A pipeline stage that knows its boundary and the parameters it shares with other stages."""

from __future__ import annotations

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
    """

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
