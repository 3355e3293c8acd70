"""Arithmetic of stages: how many, which layers in each, which rank holds which. No tensors, no processes."""

from __future__ import annotations

import itertools
import math
from typing import Literal

RoundTo = Literal["up", "down"]

# What transformers' vision- and audio-language models call the parts that run before the decoder.
MULTIMODAL_ENCODERS = (
    "visual",
    "vision_tower",
    "vision_model",
    "image_newline",
    "multi_modal_projector",
    "mm_projector",
    "vision_projector",
    "audio_tower",
    "audio_model",
    "audio_projector",
    "embed_vision",
    "embed_audio",
    # And what nemo-automodel names besides, for models of its users' own.
    "image_encoder",
    "vision_encoder",
    "audio_encoder",
    "multimodal_projector",
)


def stage_ids_this_rank(pp_rank: int, pp_size: int, num_stages: int, style: str = "loop") -> tuple[int, ...]:
    """The stages that one rank of the pipeline holds, in the order the schedule runs their forwards.

    With 4 ranks and 8 stages::

        loop   rank 0: 0 4   rank 1: 1 5   rank 2: 2 6   rank 3: 3 7
        v      rank 0: 0 7   rank 1: 1 6   rank 2: 2 5   rank 3: 3 4

    Args:
        pp_rank: this rank's index on the pipeline axis, in `[0, pp_size)`.
        pp_size: number of ranks on the pipeline axis.
        num_stages: total number of stages, a multiple of `pp_size`; exactly twice `pp_size` for `"v"`.
        style: `"loop"` (GPipe, 1F1B and the interleaved schedules) or `"v"` (ZBVZeroBubble, DualPipeV).

    Raises:
        ValueError: a size is not positive, the rank is out of range, the stages do not divide over the ranks,
            or the style is unknown.
    """
    if pp_size < 1 or not 0 <= pp_rank < pp_size:
        raise ValueError(f"pp_rank must be in [0, pp_size), got pp_rank={pp_rank}, pp_size={pp_size}")
    if style not in ("loop", "v"):
        raise ValueError(f"style must be 'loop' or 'v', got {style!r}")
    if num_stages < 1 or num_stages % pp_size:
        raise ValueError(
            f"num_stages={num_stages} must be a positive multiple of pp_size={pp_size}; "
            f"the nearest is {max(1, round(num_stages / pp_size)) * pp_size}"
        )
    if style == "loop":
        return tuple(range(pp_rank, num_stages, pp_size))
    if num_stages != 2 * pp_size:
        raise ValueError(
            f"a V-shaped schedule has two stages per rank: num_stages must be {2 * pp_size} "
            f"for pp_size={pp_size}, got {num_stages}"
        )
    return (pp_rank, num_stages - 1 - pp_rank)


def calculate_virtual_stages(
    num_layers: int,
    layers_per_stage: int | None,
    pp_size: int,
    is_single_stage_schedule: bool,
    round_to_pp_multiple: RoundTo | None = None,
) -> tuple[int, int]:
    """How many stages to cut a decoder into: `(total stages, stages per rank)`.

    Args:
        num_layers: decoder layers in the model.
        layers_per_stage: the most layers a stage may hold; None for one stage per rank (single-stage schedules)
            or two (multi-stage schedules).
        pp_size: number of ranks on the pipeline axis.
        is_single_stage_schedule: True for GPipe and 1F1B, which hold exactly one stage per rank.
        round_to_pp_multiple: `"up"` or `"down"` rounds the number of stages that `layers_per_stage` asks for to
            a multiple of `pp_size`; None refuses a number that is not one.

    Raises:
        ValueError: an argument is out of range, or the result does not fit the schedule or the layer count.
    """
    if num_layers < 1 or pp_size < 1:
        raise ValueError(f"num_layers and pp_size must be positive, got {num_layers} and {pp_size}")
    if layers_per_stage is not None and layers_per_stage < 1:
        raise ValueError(f"layers_per_stage must be at least 1 or None, got {layers_per_stage}")
    if round_to_pp_multiple not in (None, "up", "down"):
        raise ValueError(f"round_to_pp_multiple must be 'up', 'down' or None, got {round_to_pp_multiple!r}")

    if layers_per_stage is None:
        num_stages = pp_size if is_single_stage_schedule else 2 * pp_size
    else:
        num_stages = math.ceil(num_layers / layers_per_stage)
        if round_to_pp_multiple == "up":
            num_stages = math.ceil(num_stages / pp_size) * pp_size
        elif round_to_pp_multiple == "down":
            num_stages = num_stages // pp_size * pp_size

    asked = f"layers_per_stage={layers_per_stage} on {num_layers} layers gives {num_stages} stages"
    if num_stages < pp_size or num_stages % pp_size:
        raise ValueError(
            f"{asked}, which is not a positive multiple of pp_size={pp_size}; "
            "change layers_per_stage or set round_to_pp_multiple='up' or 'down'"
        )
    if num_stages > num_layers:
        ranks = num_layers // max(1, num_stages // pp_size)
        fewer = f"at most pp_size={ranks} ranks or fewer stages per rank" if ranks > 1 else "a model of more layers"
        raise ValueError(f"{asked}, more than there are layers: every stage needs at least one; use {fewer}")
    stages_per_rank = num_stages // pp_size
    if is_single_stage_schedule and stages_per_rank != 1:
        raise ValueError(
            f"{asked}, {stages_per_rank} per rank, but this schedule holds one stage per rank; "
            f"set layers_per_stage={math.ceil(num_layers / pp_size)} or use an interleaved schedule"
        )
    if not is_single_stage_schedule and stages_per_rank < 2:
        raise ValueError(
            f"{asked}, one per rank, but this schedule needs at least two; "
            f"set layers_per_stage={max(1, num_layers // (2 * pp_size))} or use GPipe or 1F1B"
        )
    return num_stages, stages_per_rank


def split_layers(num_layers: int, num_stages: int) -> list[range]:
    """Consecutive, non-empty layer ranges whose sizes differ by at most one; the first stages take the remainder.

    The last stages are the shorter ones because the last stage also computes the head and the loss.
    """
    if not 1 <= num_stages <= num_layers:
        raise ValueError(f"num_stages={num_stages} must be between 1 and the number of layers, {num_layers}")
    base, extra = divmod(num_layers, num_stages)
    starts = [stage * base + min(stage, extra) for stage in range(num_stages + 1)]
    return [range(a, b) for a, b in itertools.pairwise(starts)]


def generate_hf_model_fqn_per_model_part(
    num_stages: int,
    num_layers: int,
    include_embeddings: bool = True,
    include_lm_head: bool = True,
    include_rotary_emb: bool = True,
    include_multimodal_encoders: bool = True,
    extra_module_fqns: list[str] | None = None,
    fqn_prefix: str = "model.",
    lm_head_fqn: str = "lm_head",
) -> list[list[str]]:
    """Module names for each stage of a Llama-shaped transformers model.

    `generate_hf_model_fqn_per_model_part(2, 4)` returns::

        [["model.embed_tokens", "model.layers.0", "model.layers.1", "model.rotary_emb"],
         ["model.layers.2", "model.layers.3", "model.norm", "lm_head", "model.rotary_emb"]]

    (the first list also names the usual multimodal encoders, which a text model simply does not have).

    Args:
        num_stages: number of stages, between 1 and `num_layers`.
        num_layers: number of decoder layers.
        include_embeddings: name `embed_tokens` on the first stage.
        include_lm_head: name the head on the last stage.
        include_rotary_emb: name `rotary_emb` on every stage.
        include_multimodal_encoders: name the usual vision and audio encoders on the first stage.
        extra_module_fqns: more modules for the first stage, full names.
        fqn_prefix: where the decoder sits, `"model."`; `""` for a bare decoder.
        lm_head_fqn: full name of the head.

    Raises:
        ValueError: `num_stages` is not between 1 and `num_layers`.
    """
    names = [[f"{fqn_prefix}layers.{i}" for i in layers] for layers in split_layers(num_layers, num_stages)]
    if include_embeddings:
        names[0].insert(0, f"{fqn_prefix}embed_tokens")
    if include_multimodal_encoders:
        names[0] += [f"{fqn_prefix}{encoder}" for encoder in MULTIMODAL_ENCODERS]
        if fqn_prefix:
            names[0] += list(MULTIMODAL_ENCODERS)
    names[0] += extra_module_fqns or []
    names[-1].append(f"{fqn_prefix}norm")
    if include_lm_head:
        names[-1].append(lm_head_fqn)
    if include_rotary_emb:
        for stage in names:
            stage.append(f"{fqn_prefix}rotary_emb")
    return names
