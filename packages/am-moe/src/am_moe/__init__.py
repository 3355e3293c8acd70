"""Expert and context parallelism for Hugging Face models."""

from importlib.metadata import version

from am_moe.checkpointing import apply_ac
from am_moe.context_parallel import apply_cp, shard_batch, shard_loss, shard_sequence, unshard_sequence
from am_moe.data_parallel.fsdp import apply_fsdp
from am_moe.expert_parallel.apply import ExpertParallel, apply_ep
from am_moe.expert_parallel.dispatch import Dispatcher
from am_moe.expert_parallel.experts import Experts, MoE, describe_experts, find_experts
from am_moe.expert_parallel.load import ExpertLoad
from am_moe.expert_parallel.plot import plot_load
from am_moe.explain import Explanation, explain
from am_moe.meshes import build_meshes
from am_moe.parallelize import parallelize_model

__version__ = version("am-moe")

__all__ = [
    "Dispatcher",
    "ExpertLoad",
    "ExpertParallel",
    "Experts",
    "Explanation",
    "MoE",
    "apply_ac",
    "apply_cp",
    "apply_ep",
    "apply_fsdp",
    "build_meshes",
    "describe_experts",
    "explain",
    "find_experts",
    "parallelize_model",
    "plot_load",
    "shard_batch",
    "shard_loss",
    "shard_sequence",
    "unshard_sequence",
]
