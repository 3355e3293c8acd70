"""Ministral3: Llama's names and Llama's plan."""

from __future__ import annotations

from torch import nn
from torch.distributed.tensor.parallel import ParallelStyle

from am_tp_plans.sources.families.llama import _parallelize_llama


def _parallelize_ministral3(model: nn.Module, sequence_parallel: bool = False) -> dict[str, ParallelStyle]:
    """The plan for a Ministral3 causal LM."""
    return _parallelize_llama(model, sequence_parallel)
