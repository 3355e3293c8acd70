"""Tensor- and sequence-parallel plans for Hugging Face models."""

from importlib.metadata import version

from am_tp_plans.apply import apply_plan, fit_plan
from am_tp_plans.expand import expand_plan
from am_tp_plans.explain import PlanReport, explain_plan
from am_tp_plans.proof.check import check_gradients
from am_tp_plans.sources.families.gemma3 import _parallelize_gemma3
from am_tp_plans.sources.families.llama import _parallelize_llama
from am_tp_plans.sources.families.ministral3 import _parallelize_ministral3
from am_tp_plans.sources.families.phi3 import _parallelize_phi3, phi3_with_whole_attention
from am_tp_plans.sources.families.qwen import _parallelize_qwen, _parallelize_qwen_classification
from am_tp_plans.sources.families.qwen3_moe import _parallelize_qwen3_moe
from am_tp_plans.sources.infer import infer_plan
from am_tp_plans.sources.registry import PARALLELIZE_FUNCTIONS
from am_tp_plans.sources.resolve import resolve_plan
from am_tp_plans.sources.sequence import add_sequence_parallelism
from am_tp_plans.sources.translate import get_hf_tp_shard_plan, translate_to_torch_parallel_style
from am_tp_plans.styles.basic import (
    NormOnShard,
    RotaryEmbedParallel,
    SequenceGatherInput,
    SequenceGatherOutput,
    SequenceParallelAllGatherActivation,
    SequenceShardArgument,
    SequenceShardInput,
    SequenceShardOutput,
    SequenceWholeBlock,
    Several,
    SharedInput,
    VocabParallelEmbedding,
)
from am_tp_plans.styles.experts import ExpertsOverTensorAxis
from am_tp_plans.styles.fused import Conv1DRowwiseParallel, HeadsPerRank, PackedColwiseParallel
from am_tp_plans.styles.local import (
    DividedInput,
    LocalShards,
    MlaKvAProjection,
    Replicated,
    ReplicatedWithGradAllReduce,
)
from am_tp_plans.styles.loss import keep_logits_sharded, vocab_parallel_cross_entropy

__version__ = version("am-tp-plans")

__all__ = [
    "PARALLELIZE_FUNCTIONS",
    "Conv1DRowwiseParallel",
    "DividedInput",
    "ExpertsOverTensorAxis",
    "HeadsPerRank",
    "LocalShards",
    "MlaKvAProjection",
    "NormOnShard",
    "PackedColwiseParallel",
    "PlanReport",
    "Replicated",
    "ReplicatedWithGradAllReduce",
    "RotaryEmbedParallel",
    "SequenceGatherInput",
    "SequenceGatherOutput",
    "SequenceParallelAllGatherActivation",
    "SequenceShardArgument",
    "SequenceShardInput",
    "SequenceShardOutput",
    "SequenceWholeBlock",
    "Several",
    "SharedInput",
    "VocabParallelEmbedding",
    "_parallelize_gemma3",
    "_parallelize_llama",
    "_parallelize_ministral3",
    "_parallelize_phi3",
    "_parallelize_qwen",
    "_parallelize_qwen3_moe",
    "_parallelize_qwen_classification",
    "add_sequence_parallelism",
    "apply_plan",
    "check_gradients",
    "expand_plan",
    "explain_plan",
    "fit_plan",
    "get_hf_tp_shard_plan",
    "infer_plan",
    "keep_logits_sharded",
    "phi3_with_whole_attention",
    "resolve_plan",
    "translate_to_torch_parallel_style",
    "vocab_parallel_cross_entropy",
]
