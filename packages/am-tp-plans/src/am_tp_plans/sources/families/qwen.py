"""Qwen2 and Qwen3: Llama's plan; Qwen3 has norms on its heads, Qwen2 biases that follow their projections."""

from __future__ import annotations

from torch import nn
from torch.distributed.tensor.parallel import ParallelStyle

from am_tp_plans.sources.families.llama import _parallelize_llama
from am_tp_plans.styles.basic import NormOnShard, SequenceParallelAllGatherActivation


def _parallelize_qwen(model: nn.Module, sequence_parallel: bool = False) -> dict[str, ParallelStyle]:
    """The plan for a Qwen2 or Qwen3 causal LM."""
    plan = _parallelize_llama(model, sequence_parallel)
    if any(name.endswith(".self_attn.q_norm") for name, _ in model.named_modules()):
        plan |= head_norms("*")
    return plan


def _parallelize_qwen_classification(model: nn.Module, sequence_parallel: bool = False) -> dict[str, ParallelStyle]:
    """The plan for a Qwen3 sequence classifier: its `score` has few columns and stays whole."""
    plan = _parallelize_qwen(model, sequence_parallel)
    del plan["lm_head"]
    if sequence_parallel:
        plan["model.norm"] = SequenceParallelAllGatherActivation(use_local_output=True)
    return plan


def head_norms(layer: int | str, decoder: str = "model") -> dict[str, ParallelStyle]:
    """q_norm and k_norm see `(B, S, heads, head_dim)` of their rank's heads; their gradients are summed over ranks."""
    prefix = f"{decoder}.layers.{layer}.self_attn"
    return {f"{prefix}.{name}": NormOnShard(sequence_dim=2, use_local_output=True) for name in ("q_norm", "k_norm")}
