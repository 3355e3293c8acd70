"""Llama, and every decoder with the same names: the plan that the other families start from."""

from __future__ import annotations

from torch import nn
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel

from am_tp_plans.styles.basic import (
    SequenceParallelAllGatherActivation,
    SequenceShardInput,
    SharedInput,
    VocabParallelEmbedding,
)


def _parallelize_llama(model: nn.Module, sequence_parallel: bool = False) -> dict[str, ParallelStyle]:
    """The plan for a Llama-shaped causal LM: `model.layers.*` with q/k/v/o and gate/up/down projections.

    Per layer it costs two all-reduces forward and two backward, or with sequence parallelism two all-gathers and two
    reduce-scatters each way.
    """
    return outside_of_layers(sequence_parallel) | attention("*", sequence_parallel) | dense_mlp("*", sequence_parallel)


def outside_of_layers(sequence_parallel: bool, decoder: str = "model") -> dict[str, ParallelStyle]:
    """Embedding, the entry of the layer stack, final norm, head. Logits are whole and the same on every rank."""
    plan: dict[str, ParallelStyle] = {
        f"{decoder}.embed_tokens": VocabParallelEmbedding(),
        "lm_head": ColwiseParallel(output_layouts=Replicate()),
    }
    if sequence_parallel:
        plan[f"{decoder}.layers.0"] = SequenceShardInput()
        plan[f"{decoder}.norm"] = SequenceParallelAllGatherActivation(use_local_output=True)
    return plan


def attention(
    layer: int | str, sequence_parallel: bool, decoder: str = "model", norm: str = "input_layernorm"
) -> dict[str, ParallelStyle]:
    """Heads over the ranks; the gradient of what q, k and v read is summed once."""
    prefix = f"{decoder}.layers.{layer}"
    plan: dict[str, ParallelStyle] = {
        f"{prefix}.self_attn.{name}": ColwiseParallel() for name in ("q_proj", "k_proj", "v_proj")
    }
    if sequence_parallel:
        plan[f"{prefix}.{norm}"] = SequenceParallelAllGatherActivation(use_local_output=True)
        plan[f"{prefix}.self_attn.o_proj"] = RowwiseParallel(output_layouts=Shard(1))
    else:
        plan[f"{prefix}.self_attn"] = SharedInput()
        plan[f"{prefix}.self_attn.o_proj"] = RowwiseParallel()
    return plan


def dense_mlp(
    layer: int | str, sequence_parallel: bool, decoder: str = "model", norm: str = "post_attention_layernorm"
) -> dict[str, ParallelStyle]:
    """The inner dim over the ranks; gate and up share one gathered input, or one sum of input gradients."""
    prefix = f"{decoder}.layers.{layer}"
    plan: dict[str, ParallelStyle] = {
        f"{prefix}.mlp.gate_proj": ColwiseParallel(),
        f"{prefix}.mlp.up_proj": ColwiseParallel(),
    }
    if sequence_parallel:
        plan[f"{prefix}.{norm}"] = SequenceParallelAllGatherActivation(use_local_output=True)
        plan[f"{prefix}.mlp.down_proj"] = RowwiseParallel(output_layouts=Shard(1))
    else:
        plan[f"{prefix}.mlp"] = SharedInput()
        plan[f"{prefix}.mlp.down_proj"] = RowwiseParallel()
    return plan
