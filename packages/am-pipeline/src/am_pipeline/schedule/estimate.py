"""A table of a pipeline before anything is built: stage, rank, modules, parameters, FLOPs, memory, idle time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.distributed.pipelining.schedules import PipelineScheduleSingle

from am_pipeline._torch_compat import element_size
from am_pipeline.cut.anatomy import config_value
from am_pipeline.cut.plan import CutPlan, flops_of_example, plan_cut, plan_stages
from am_pipeline.placement import calculate_virtual_stages
from am_pipeline.schedule.balance import Costs, costs_of
from am_pipeline.schedule.build import schedule_class
from am_pipeline.schedule.order import Event, bubble_fraction, peak_live, schedule_order, simulate

# Activations of one layer in bytes per token and hidden unit at 16 bits, without attention scores: Korthikanti et al.,
# "Reducing Activation Recomputation in Large Transformer Models" (2022), equation 1.
_BYTES_PER_UNIT = 34


@dataclass(frozen=True)
class StageEstimate:
    """One stage of a planned pipeline; `peak_bytes` is of its rank, all of whose stages it counts."""

    stage: int
    rank: int
    modules: str
    parameters: int
    flops_share: float
    live_microbatches: int
    peak_bytes: int


@dataclass(frozen=True)
class PipelinePlan:
    """What a pipeline would be. Printing it gives a table.

    Attributes:
        schedule: its name.
        cut: which stage holds what.
        stages: one row per stage.
        events: when each action would run, in units of the forward of an average stage.
    """

    schedule: str
    cut: CutPlan
    stages: tuple[StageEstimate, ...]
    events: tuple[Event, ...]

    @property
    def idle(self) -> float:
        """Expected idle share of the ranks, stages of unequal cost included."""
        return bubble_fraction(self.events)

    def __str__(self) -> str:
        rows = [("stage", "rank", "parameters", "FLOPs", "live", "peak of rank", "modules")]
        for s in self.stages:
            rows.append(
                (
                    str(s.stage),
                    str(s.rank),
                    _human(s.parameters, 1000, ""),
                    f"{100 * s.flops_share:.1f} %",
                    str(s.live_microbatches),
                    _human(s.peak_bytes, 1024, "iB"),
                    s.modules,
                )
            )
        widths = [max(len(row[column]) for row in rows) for column in range(6)]
        lines = ["  ".join([*(c.rjust(w) for c, w in zip(row, widths, strict=False)), row[6]]) for row in rows]
        lines += [f"shared: {group}" for group in self.cut.shared]
        return "\n".join([*lines, f"{self.schedule}: idle {100 * self.idle:.1f} %"])


def plan_pipeline(
    model: nn.Module,
    ranks: int,
    schedule: str,
    *,
    microbatches: int,
    microbatch_size: int = 1,
    seq_len: int = 2048,
    decoder_seq_len: int | None = None,
    layers_per_stage: int | None = None,
    round_to_pp_multiple: str | None = None,
    module_names_per_stage: list[list[str]] | None = None,
    balance: str | Costs = "flops",
    optimizer_bytes: int = 8,
    example_inputs: Mapping[str, Any] | None = None,
) -> PipelinePlan:
    """Plan a pipeline without processes, memory or a device.

    The peak of a rank is an estimate: parameters and gradients in the model's dtype, `optimizer_bytes` per parameter,
    and for every live microbatch 34 bytes per number that a layer returns at 16 bits (Korthikanti et al., 2022), plus
    the logits of one microbatch in fp32 on the last stage. Sharding and recomputation by a `parallelize_fn` come off
    that. Every stack counts with its own length: an encoder's, a decoder's, a tower's patches.

    Args:
        model: the whole model, best on meta.
        ranks: size of the pipeline axis.
        schedule: its name.
        microbatches, microbatch_size, seq_len: per step; sequences; tokens.
        decoder_seq_len: of an encoder-decoder, tokens of the decoder; `seq_len` unless given.
        layers_per_stage, round_to_pp_multiple, module_names_per_stage, balance, example_inputs: see
            `split_model_into_stages`.
        optimizer_bytes: per parameter: 8 for Adam in fp32.

    Raises:
        ValueError: as `split_model_into_stages`; or a length below 1.
    """
    if min(seq_len, 1 if decoder_seq_len is None else decoder_seq_len) < 1:
        raise ValueError(f"a sequence has at least one token, got seq_len={seq_len}, decoder_seq_len={decoder_seq_len}")
    kind = schedule_class(None, schedule)
    lengths = seq_len, seq_len if decoder_seq_len is None else decoder_seq_len
    if module_names_per_stage is None:
        single = issubclass(kind, PipelineScheduleSingle)

        def stages_for(layers: int) -> int:
            return calculate_virtual_stages(layers, layers_per_stage, ranks, single, round_to_pp_multiple)[0]

        by = balance if layers_per_stage is None else "layers"
        cut = plan_stages(model, stages_for, balance=by, example_inputs=example_inputs, lengths=lengths)
    else:
        cut = plan_cut(model, module_names_per_stage=module_names_per_stage, example_inputs=example_inputs)
    count = len(cut.stages)
    order = schedule_order(schedule, ranks, microbatches, count // ranks)
    counted = flops_of_example(cut.reading, example_inputs)
    flops = costs_of(model, cut.anatomy, "flops", lengths[: len(cut.anatomy.stacks)], counted)
    shares = [
        sum(flops.layers[i] for i in cut.layers_of(s))
        + (flops.before if s == 0 else 0.0)
        + (flops.after if s == count - 1 else 0.0)
        for s in range(count)
    ]
    total = sum(shares)
    weights = [share * count / total for share in shares]
    rank_of = {action.stage: rank for rank, actions in enumerate(order) for action in actions}
    live = peak_live(order)
    held = [sum(model.get_parameter(n).numel() for n in cut.parameters_of(model, s)) for s in range(count)]
    size = element_size(model)
    rows, _, _, images = (*cut.reading.form.sizes[0], 0, 0)[:4]
    sizes = microbatch_size, *lengths, images * microbatch_size // rows
    peaks = [0] * ranks
    for stage in range(count):
        returned = sum(cut.reading.elements(cut.anatomy.layer(i), sizes) for i in cut.layers_of(stage))
        per_microbatch = _BYTES_PER_UNIT * size // 2 * returned
        share_of_live = live[rank_of[stage]] * ranks / count
        logits = (
            4 * microbatch_size * lengths[-1] * (config_value(model, "vocab_size") or 0) if stage == count - 1 else 0
        )
        peaks[rank_of[stage]] += int(
            held[stage] * (2 * size + optimizer_bytes) + per_microbatch * share_of_live + logits
        )
    rows = tuple(
        StageEstimate(s, rank_of[s], cut.modules_of(s), held[s], shares[s] / total, live[rank_of[s]], peaks[rank_of[s]])
        for s in range(count)
    )
    return PipelinePlan(schedule, cut, rows, tuple(simulate(order, weights=weights)))


def _human(number: float, base: int, unit: str) -> str:
    for prefix in ("", "K", "M", "G", "T"):
        if number < base or prefix == "T":
            return f"{number:.0f} {prefix}{unit}".strip() if prefix == "" else f"{number:.2f} {prefix}{unit}"
        number /= base
    raise AssertionError
