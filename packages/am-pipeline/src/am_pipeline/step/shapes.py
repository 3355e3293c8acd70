"""Static shapes of what stages send, so that no forward has to run to find them out.

Torch would otherwise send pickled metadata from stage to stage and run a real forward and backward for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.distributed.pipelining import PipelineStage

from am_pipeline._torch_compat import Schedule, compute_dtype, forget_shapes, set_shapes
from am_pipeline.cut.boundary import is_sharded
from am_pipeline.cut.crossing import Crossed
from am_pipeline.cut.messages import Form, Message, messages_of
from am_pipeline.cut.provenance import Value
from am_pipeline.step.stage import DecoderStage


def reset_pp_stage_shapes(
    schedule: Schedule,
    stages: list[PipelineStage],
    model_config: Any,
    microbatch_size: int,
    seq_len: int,
    decoder_seq_len: int | None = None,
    images: int | Sequence[int] | None = None,
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
            patches), or that of each; that of the cut's `example_inputs` unless given.

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
    images: int | Sequence[int] | None = None,
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
            patches), or that of each; that of the cut's `example_inputs` unless given.

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
        sizes = (microbatch_size, *lengths.values())
        ids = torch.empty(sizes[:2], dtype=torch.int64, device="meta")
        if not isinstance(stage, DecoderStage):
            width, _ = get_hidden_and_vocab_size(model_config)
            hidden = _on_meta([((microbatch_size, seq_len // shards, width), hidden_dtype(stage))])
            set_shapes(stage, (ids,) if stage.is_first else hidden, hidden)
            continue
        stage.messages = _messages(stage, sizes, _images_of_example(stage) if images is None else images, shards)
        received, sent = (_on_meta(message.slots) for message in stage.messages[0])
        stage.receives, stage.sends = received, sent or received  # what the last stage returns is only counted
        set_shapes(stage, (ids,) if stage.is_first else received, stage.sends)


def _messages(
    stage: DecoderStage, sizes: tuple[int, int, int], images: int | Sequence[int], shards: int
) -> tuple[tuple[Message, Message], ...]:
    """What a stage receives and sends of each microbatch."""
    dtype, cut_with, whole = hidden_dtype(stage), stage.plan.dtype, getattr(stage.submod, "whole_outputs", ())
    passages = stage.passages or (stage.boundary.passage,)
    counts = [images] * len(passages) if isinstance(images, int) else images
    batch, *lengths = sizes

    def forms(crossing: tuple[Crossed, ...], count: int) -> list[tuple[Value, Form]]:
        found = []
        for crossed in crossing:
            tokens = [length // shards for length in lengths] if is_sharded(crossed, whole) else lengths
            # What had the layers' dtype when the model was cut has the one in which the part computes now.
            kind = dtype if crossed.dtype == cut_with else crossed.dtype
            found.append((crossed.value, (crossed.shape.at((batch, *tokens, count)), kind)))
        return found

    of_each = list(zip(passages, counts, strict=True))
    received = messages_of(forms(passage.receives, count) for passage, count in of_each)
    sent = messages_of(forms(passage.sends, count) for passage, count in of_each)
    return tuple(zip(received, sent, strict=True))


def _images_of_example(stage: DecoderStage) -> int:
    sizes = stage.plan.reading.form.sizes[0]
    return sizes[3] if len(sizes) > 3 else 0


def hidden_dtype(stage: PipelineStage) -> torch.dtype:
    """The dtype that a stage receives and sends."""
    return compute_dtype(stage.submod, stage.plan.anatomy.stacks if isinstance(stage, DecoderStage) else ("",))


def _on_meta(forms: Iterable[Form]) -> tuple[torch.Tensor, ...]:
    return tuple(
        torch.empty(shape, dtype=dtype, device="meta", requires_grad=dtype.is_floating_point) for shape, dtype in forms
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
