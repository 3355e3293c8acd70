"""Context parallelism: each rank holds a part of every sequence, attention sees the whole of it."""

from am_moe.context_parallel.apply import COMM_TYPES, apply_cp
from am_moe.context_parallel.batch import shard_batch, shard_loss, shard_sequence, unshard_sequence
from am_moe.context_parallel.plan import Block, Kind, Plan, Rule, head_tail

__all__ = [
    "COMM_TYPES",
    "Block",
    "Kind",
    "Plan",
    "Rule",
    "apply_cp",
    "head_tail",
    "shard_batch",
    "shard_loss",
    "shard_sequence",
    "unshard_sequence",
]
