"""Qwen3-MoE: Qwen3's attention; experts over the ranks in sparse layers, Llama's MLP in dense ones."""

from __future__ import annotations

from torch import nn
from torch.distributed.tensor.parallel import ParallelStyle

from am_tp_plans.sources.families.llama import attention, dense_mlp, outside_of_layers
from am_tp_plans.sources.families.qwen import head_norms
from am_tp_plans.styles.basic import SequenceParallelAllGatherActivation, SequenceShardOutput
from am_tp_plans.styles.experts import ExpertsOverTensorAxis


def _parallelize_qwen3_moe(model: nn.Module, sequence_parallel: bool = False) -> dict[str, ParallelStyle]:
    """The plan for a Qwen3-MoE causal LM; drop the keys that end in `.experts` if the experts go over another axis."""
    plan = outside_of_layers(sequence_parallel)
    for index, layer in enumerate(model.model.layers):
        if not any(True for _ in layer.parameters()):
            continue  # another pipeline stage's
        plan |= attention(index, sequence_parallel) | head_norms(index)
        if hasattr(layer.mlp, "experts"):
            plan |= sparse_mlp(index, sequence_parallel)
        else:
            plan |= dense_mlp(index, sequence_parallel)
    return plan


def sparse_mlp(layer: int, sequence_parallel: bool) -> dict[str, ParallelStyle]:
    """Every rank routes all tokens of the sequence and runs its own experts."""
    prefix = f"model.layers.{layer}"
    plan: dict[str, ParallelStyle] = {f"{prefix}.mlp.experts": ExpertsOverTensorAxis()}
    if sequence_parallel:
        plan[f"{prefix}.post_attention_layernorm"] = SequenceParallelAllGatherActivation(use_local_output=True)
        plan[f"{prefix}.mlp"] = SequenceShardOutput()
    return plan
