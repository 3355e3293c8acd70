"""Gemma3, text and multimodal: norms on the heads, and norms before and after each block."""

from __future__ import annotations

from torch import nn
from torch.distributed.tensor.parallel import ParallelStyle

from am_tp_plans.sources.families.llama import attention, dense_mlp, outside_of_layers
from am_tp_plans.sources.families.qwen import head_norms
from am_tp_plans.styles.basic import NormOnShard


def _parallelize_gemma3(model: nn.Module, sequence_parallel: bool = False) -> dict[str, ParallelStyle]:
    """The plan for a Gemma3 causal LM or its multimodal form, whose vision tower stays whole (see `extend_plan`)."""
    names = {name for name, _ in model.named_modules()}
    decoder = "model.language_model" if "model.language_model" in names else "model"
    plan = outside_of_layers(sequence_parallel, decoder) | head_norms("*", decoder)
    plan |= attention("*", sequence_parallel, decoder)
    plan |= dense_mlp("*", sequence_parallel, decoder, norm="pre_feedforward_layernorm")
    if sequence_parallel:
        for norm in ("post_attention_layernorm", "post_feedforward_layernorm"):
            plan[f"{decoder}.layers.*.{norm}"] = NormOnShard(use_local_output=True)
    return plan
