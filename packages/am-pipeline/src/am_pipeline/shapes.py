"""Static shapes of what stages send, so that no forward has to run to find them out.

Torch would otherwise send pickled metadata from stage to stage and run a real forward and backward for it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.pipelining import PipelineStage

from am_pipeline._torch_compat import Schedule, compute_dtype, forget_shapes, set_shapes
from am_pipeline.stage import DecoderStage


def reset_pp_stage_shapes(
    schedule: Schedule,
    stages: list[PipelineStage],
    model_config: Any,
    microbatch_size: int,
    seq_len: int,
) -> None:
    """Prepare a schedule for batches of another sequence length (or microbatch size). Runs no collective.

    Call it on every rank of the pipeline. A schedule built by this package does it by itself when the length of
    the batch changes.

    Args:
        schedule: the schedule in use.
        stages: this rank's stages.
        model_config: `model.config`; only read for stages that this package did not cut.
        microbatch_size: sequences per microbatch.
        seq_len: tokens per sequence, over all tensor- and sequence-parallel ranks.

    Raises:
        ValueError: a size is not positive or `seq_len` does not divide over the ranks that shard the sequence.
    """
    _precompute_stage_shapes(stages, model_config, microbatch_size, seq_len)
    forget_shapes(schedule)


def _precompute_stage_shapes(
    stages: list[PipelineStage], model_config: Any, microbatch_size: int, seq_len: int
) -> None:
    """Give each stage meta tensors of what it receives and sends: ids `(B, S)`, then the residual stream."""
    if microbatch_size < 1 or seq_len < 1:
        raise ValueError(f"microbatch_size and seq_len must be positive, got {microbatch_size} and {seq_len}")
    for stage in stages:
        shards = getattr(stage.submod, "sequence_shards", 1)
        if seq_len % shards:
            raise ValueError(
                f"seq_len={seq_len} does not divide over the {shards} ranks that shard the sequence; "
                f"pad it to {-(-seq_len // shards) * shards}"
            )
        dtype = compute_dtype(stage.submod)
        shapes = _crossing_shapes(stage, model_config, microbatch_size, seq_len, shards)
        crossing = tuple(torch.empty(shape, dtype=dtype, device="meta", requires_grad=True) for shape in shapes)
        ids = torch.empty(microbatch_size, seq_len, dtype=torch.int64, device="meta")
        # The last stage's output is never sent, only counted.
        set_shapes(stage, (ids,) if stage.is_first else crossing, crossing)
        if isinstance(stage, DecoderStage):
            stage.boundary.expected = [(shape, dtype) for shape in shapes]


def _crossing_shapes(stage: PipelineStage, config: Any, batch: int, seq_len: int, shards: int) -> list[tuple[int, ...]]:
    if isinstance(stage, DecoderStage):
        residual = stage.plan.residual
        hidden = residual.hidden.at(batch, seq_len // shards)
        return [hidden, *(shape.at(batch, seq_len) for _, shape in residual.traveling)]
    text = getattr(config, "text_config", None) or config
    return [(batch, seq_len // shards, text.hidden_size)]
