"""Static shapes of what stages send, so that no forward has to run to find them out.

Torch would otherwise send pickled metadata from stage to stage and run a real forward and backward for it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.pipelining import PipelineStage

from am_pipeline._torch_compat import Schedule, compute_dtype, forget_shapes, set_shapes
from am_pipeline.cut.boundary import is_sharded
from am_pipeline.cut.crossing import Crossed, Sizes
from am_pipeline.step.stage import DecoderStage


def reset_pp_stage_shapes(
    schedule: Schedule,
    stages: list[PipelineStage],
    model_config: Any,
    microbatch_size: int,
    seq_len: int,
    decoder_seq_len: int | None = None,
    images: int | None = None,
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
        decoder_seq_len: of an encoder-decoder, tokens per sequence of the decoder; `seq_len` unless given.
        images: of a model whose tower is cut too, the first dim of what the tower takes of one microbatch (images, or
            patches); that of the cut's `example_inputs` unless given.

    Raises:
        ValueError: a size is not positive or does not divide over the ranks that shard the sequence.
    """
    precompute_stage_shapes(stages, model_config, microbatch_size, seq_len, decoder_seq_len, images)
    forget_shapes(schedule)


def precompute_stage_shapes(
    stages: list[PipelineStage],
    model_config: Any,
    microbatch_size: int,
    seq_len: int,
    decoder_seq_len: int | None = None,
    images: int | None = None,
) -> None:
    """Give each stage meta tensors of what it receives and sends, before its first step. Runs no collective.

    The first stage receives ids `(B, S)`; what runs between stages has the shape that the cut found by running the
    model's own forward, which may be more than one tensor and need not be `(B, S, D)`.

    Args:
        stages: this rank's stages.
        model_config: `model.config`; only its hidden size is read, and only for stages that this package did not cut.
        microbatch_size: sequences per microbatch.
        seq_len: tokens per sequence, over all tensor- and sequence-parallel ranks.
        decoder_seq_len: of an encoder-decoder, tokens per sequence of the decoder; `seq_len` unless given.
        images: of a model whose tower is cut too, the first dim of what the tower takes of one microbatch (images, or
            patches); that of the cut's `example_inputs` unless given.

    Raises:
        ValueError: as `reset_pp_stage_shapes`; or there is no hidden size in `model_config` where it is needed.
    """
    if microbatch_size < 1 or seq_len < 1:
        raise ValueError(f"microbatch_size and seq_len must be positive, got {microbatch_size} and {seq_len}")
    lengths = {"seq_len": seq_len, "decoder_seq_len": seq_len if decoder_seq_len is None else decoder_seq_len}
    for stage in stages:
        shards = getattr(stage.submod, "sequence_shards", 1)
        for name, length in lengths.items():
            if length < 1 or length % shards:
                raise ValueError(
                    f"{name}={length} does not divide over the {shards} ranks that shard the sequence; "
                    f"pad it to {-(-length // shards) * shards}"
                )
        count = _images_of_example(stage) if images is None else images
        received, sent = _crossing(stage, model_config, (microbatch_size, *lengths.values(), count), shards)
        ids = torch.empty(microbatch_size, seq_len, dtype=torch.int64, device="meta")
        # The last stage's output is never sent, only counted.
        set_shapes(stage, (ids,) if stage.is_first else _on_meta(received), _on_meta(sent or received))
        if isinstance(stage, DecoderStage):
            stage.boundary.expected = sent
            stage.receives, stage.sends = () if stage.is_first else _on_meta(received), _on_meta(sent or received)


def _images_of_example(stage: PipelineStage) -> int:
    sizes = stage.plan.reading.form.sizes[0] if isinstance(stage, DecoderStage) else ()
    return sizes[3] if len(sizes) > 3 else 0


def hidden_dtype(stage: PipelineStage) -> torch.dtype:
    """The dtype that a stage receives and sends."""
    return compute_dtype(stage.submod, stage.plan.anatomy.stacks if isinstance(stage, DecoderStage) else ("",))


Sent = list[tuple[tuple[int, ...], torch.dtype]]


def _crossing(stage: PipelineStage, config: Any, sizes: Sizes, shards: int) -> tuple[Sent, Sent]:
    """Shape and dtype of every tensor that a stage receives and sends."""
    dtype = hidden_dtype(stage)
    batch, length, of_decoder, images = sizes
    sharded = batch, length // shards, of_decoder // shards, images
    if not isinstance(stage, DecoderStage):
        hidden: Sent = [((*sharded[:2], get_hidden_and_vocab_size(config)[0]), dtype)]
        return hidden, hidden
    passage = stage.boundary.passage
    cut_with, whole = stage.plan.dtype, getattr(stage.submod, "whole_outputs", ())

    def form(crossed: Crossed) -> tuple[tuple[int, ...], torch.dtype]:
        # What had the layers' dtype when the model was cut has the one in which the part computes now.
        kind = dtype if crossed.dtype == cut_with else crossed.dtype
        return crossed.shape.at(sharded if is_sharded(crossed, whole) else sizes), kind

    return [form(c) for c in passage.receives], [form(c) for c in passage.sends]


def _on_meta(sizes: Sent) -> tuple[torch.Tensor, ...]:
    return tuple(
        torch.empty(shape, dtype=dtype, device="meta", requires_grad=dtype.is_floating_point) for shape, dtype in sizes
    )


def get_hidden_and_vocab_size(model_config: Any) -> tuple[int, int]:
    """Hidden and vocabulary size of a model's decoder, from a flat config or one that nests that of its text.

    Raises:
        ValueError: the config has neither under any usual name.
    """
    nested = (getattr(model_config, name, None) for name in ("text_config", "llm_config", "language_config", "decoder"))
    for config in (*(c for c in nested if c is not None), model_config):
        hidden = next(
            (v for n in ("hidden_size", "n_embd", "d_model") if isinstance(v := getattr(config, n, None), int)), 0
        )
        vocab = getattr(config, "vocab_size", 0)
        if hidden and vocab:
            return hidden, vocab
    raise ValueError(f"{type(model_config).__name__} has no hidden_size and vocab_size, flat or in its text_config")
