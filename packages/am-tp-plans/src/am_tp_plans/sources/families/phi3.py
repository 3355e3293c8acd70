"""Phi3: query, key and value in one projection, gate and up in another, each part of them sharded."""

from __future__ import annotations

from torch import nn
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel

from am_tp_plans.config import config_value
from am_tp_plans.sources.families.llama import outside_of_layers
from am_tp_plans.styles.basic import SequenceParallelAllGatherActivation
from am_tp_plans.styles.fused import HeadsPerRank, PackedColwiseParallel


def _parallelize_phi3(model: nn.Module, sequence_parallel: bool = False) -> dict[str, ParallelStyle]:
    """The plan for a Phi3 causal LM: heads and inner dim over the ranks, no fused projection replicated."""
    heads, kv_heads = config_value(model, "num_attention_heads"), config_value(model, "num_key_value_heads")
    head_dim = config_value(model, "head_dim") or config_value(model, "hidden_size") // heads
    scattered = RowwiseParallel(output_layouts=Shard(1)) if sequence_parallel else RowwiseParallel()
    plan = outside_of_layers(sequence_parallel) | {
        "model.layers.*.self_attn": HeadsPerRank(["num_key_value_heads"], config=["num_attention_heads"]),
        "model.layers.*.self_attn.qkv_proj": PackedColwiseParallel([n * head_dim for n in (heads, kv_heads, kv_heads)]),
        "model.layers.*.self_attn.o_proj": scattered,
        "model.layers.*.mlp.gate_up_proj": PackedColwiseParallel(2),
        "model.layers.*.mlp.down_proj": scattered,
    }
    if sequence_parallel:
        for norm in ("input_layernorm", "post_attention_layernorm"):
            plan[f"model.layers.*.{norm}"] = SequenceParallelAllGatherActivation(use_local_output=True)
    return plan


def phi3_with_whole_attention(model: nn.Module, sequence_parallel: bool = False) -> dict[str, ParallelStyle]:
    """Phi3 with the weights of attention sharded but every head computed on every rank, as other systems do.

    Nothing is exchanged but activations; it is there to compare with, and for axes that the heads do not divide over.

    Raises:
        ValueError: with sequence parallelism, which would need the whole sequence in it anyway.
    """
    if sequence_parallel:
        raise ValueError("phi3_with_whole_attention has no sequence parallelism; _parallelize_phi3 has")
    return _parallelize_phi3(model) | {
        "model.layers.*.self_attn": HeadsPerRank(),
        "model.layers.*.self_attn.qkv_proj": RowwiseParallel(input_layouts=Replicate()),
        "model.layers.*.self_attn.o_proj": ColwiseParallel(input_layouts=Replicate(), output_layouts=Replicate()),
    }
