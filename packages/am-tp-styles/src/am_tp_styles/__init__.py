"""Tensor-parallel styles for LoRA layers, and a linear layer that compiles with sharded weights."""

from importlib.metadata import version

from am_tp_styles.classes import restore_classes
from am_tp_styles.compiled_linear import TPLinear, use_tp_linear
from am_tp_styles.gradients import reduce_replicated_gradients
from am_tp_styles.lora import (
    ColwiseParallelLora,
    KeyValueColwiseParallel,
    RowwiseParallelLora,
    SequenceParallelLora,
)
from am_tp_styles.parameters import _distribute_param  # noqa: F401  (named in the API this package answers to)
from am_tp_styles.translate import translate_to_lora

__all__ = [
    "ColwiseParallelLora",
    "KeyValueColwiseParallel",
    "RowwiseParallelLora",
    "SequenceParallelLora",
    "TPLinear",
    "reduce_replicated_gradients",
    "restore_classes",
    "translate_to_lora",
    "use_tp_linear",
]

__version__ = version("am-tp-styles")
