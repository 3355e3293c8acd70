"""Tensor- and sequence-parallel plans for Hugging Face models."""

from importlib.metadata import version

from am_tp_plans.apply import apply_plan, expand_plan
from am_tp_plans.experts import ExpertsOverTensorAxis
from am_tp_plans.families.llama import _parallelize_llama
from am_tp_plans.families.qwen import _parallelize_qwen
from am_tp_plans.families.qwen3_moe import _parallelize_qwen3_moe
from am_tp_plans.infer import infer_plan
from am_tp_plans.local import DividedInput, LocalShards, MlaKvAProjection, Replicated, ReplicatedWithGradAllReduce
from am_tp_plans.registry import PARALLELIZE_FUNCTIONS
from am_tp_plans.resolve import resolve_plan
from am_tp_plans.styles import (
    NormOnShard,
    SequenceParallelAllGatherActivation,
    SequenceShardInput,
    SequenceShardOutput,
    VocabParallelEmbedding,
)
from am_tp_plans.translate import get_hf_tp_shard_plan, translate_to_torch_parallel_style

__version__ = version("am-tp-plans")

__all__ = [
    "PARALLELIZE_FUNCTIONS",
    "DividedInput",
    "ExpertsOverTensorAxis",
    "LocalShards",
    "MlaKvAProjection",
    "NormOnShard",
    "Replicated",
    "ReplicatedWithGradAllReduce",
    "SequenceParallelAllGatherActivation",
    "SequenceShardInput",
    "SequenceShardOutput",
    "VocabParallelEmbedding",
    "_parallelize_llama",
    "_parallelize_qwen",
    "_parallelize_qwen3_moe",
    "apply_plan",
    "expand_plan",
    "get_hf_tp_shard_plan",
    "infer_plan",
    "resolve_plan",
    "translate_to_torch_parallel_style",
]
