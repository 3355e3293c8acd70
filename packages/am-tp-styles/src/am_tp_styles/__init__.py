"""Tensor-parallel styles for LoRA layers, and a linear layer that compiles with sharded weights."""

from importlib.metadata import version

from am_tp_styles.compiled_linear import TPLinear
from am_tp_styles.gradients import reduce_replicated_gradients
from am_tp_styles.lora import (
    ColwiseParallelLora,
    RowwiseParallelLora,
    SequenceParallelLora,
    _distribute_param,  # noqa: F401  (named in the API this package answers to)
)
from am_tp_styles.translate import translate_to_lora

__all__ = [
    "ColwiseParallelLora",
    "RowwiseParallelLora",
    "SequenceParallelLora",
    "TPLinear",
    "reduce_replicated_gradients",
    "translate_to_lora",
]

__version__ = version("am-tp-styles")
