"""Search: legal layouts whose weights fit are traced, those whose peak fits are timed, the best are kept."""

from __future__ import annotations

import functools
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch

import am_moe
import am_tp_plans
from am_moe.expert_parallel.experts import describe_experts
from planning.costs import EXPERTS, Costs, Part, count_costs
from planning.layouts import Job, Layout, axes, microbatch_sizes, schedules
from planning.machine import Machine
from planning.memory import WIDE, Memory, memory_of
from planning.model import Planned
from planning.step import Clock, Time, utilisation
from training.degrees import expert_count

RECOMPUTE = ("", "full")
LEAST_TOKENS = 1024  # of a context rank: shorter parts of a sequence are not looked at


@dataclass(frozen=True)
class Found:
    """A layout with its step and its peak."""

    layout: Layout
    time: Time
    memory: Memory
    tokens_per_second: float
    utilisation: float

    @property
    def order(self) -> tuple:
        """Faster first, then smaller."""
        return self.time.seconds, self.memory.peak, self.layout


@dataclass
class Search:
    """What was found and what was not.

    Attributes:
        found: the best, fastest first.
        looked: layouts that were composed.
        refused: why others were not, and how many.
        smallest: the layout with the smallest peak, where nothing fits.
    """

    found: list[Found]
    looked: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    smallest: tuple[Layout, Memory] | None = None


class Tracer:
    """Costs of a model by tensor ranks and recomputation, each traced once; why some cannot be had."""

    def __init__(self, planned: Planned, job: Job) -> None:
        self.planned, self.job = planned, job
        self.refused: dict[tuple, str] = {}
        self._known: dict[tuple, Costs] = {}
        self._plans: dict[bool, dict] = {}

    def costs(self, layout: Layout) -> Costs | None:
        key = (layout.tp, layout.sequence_parallel, layout.recompute, layout.ep > 1 and layout.tp > 1)
        if key not in self._known and key not in self.refused:
            dtype = torch.bfloat16 if self.job.dtype == "bfloat16" else torch.float32
            try:
                if layout.tp > 1 and layout.sequence_parallel not in self._plans:
                    twin = self.planned.twin()
                    plan = am_tp_plans.resolve_plan(twin, sequence_parallel=layout.sequence_parallel)
                    self._plans[layout.sequence_parallel] = plan
                self._known[key] = count_costs(
                    self.planned, seq_len=self.job.seq_len, tp=layout.tp, sequence_parallel=layout.sequence_parallel,
                    recompute=layout.recompute or False, keep_experts=key[3], dtype=dtype,
                    plan=self._plans.get(layout.sequence_parallel) if layout.tp > 1 else None,
                )  # fmt: skip
            except (ValueError, TypeError, NotImplementedError) as error:
                self.refused[key] = str(error)
        return self._known.get(key)

    def why(self, layout: Layout) -> str:
        key = (layout.tp, layout.sequence_parallel, layout.recompute, layout.ep > 1 and layout.tp > 1)
        return f"tp {layout.tp}{' sp' if layout.sequence_parallel else ''}: {self.refused[key]}"


def search(
    planned: Planned, machine: Machine, job: Job, *, memory: float, keep: int = 10, tracer: Tracer | None = None
) -> Search:
    """The fastest layouts whose peak is at most `memory` bytes.

    Args:
        keep: how many, each of another shape (`shape_of`).
        tracer: of the same model and job, with what it has traced already.

    Raises:
        ValueError: a batch that no data axis divides; a model that cannot be traced.
    """
    tracer, clock = tracer or Tracer(planned, job), Clock(planned, machine, job)
    plain = tracer.costs(Layout())
    if plain is None:
        raise ValueError(tracer.why(Layout()))
    result = Search([])
    cp_refusal = context_refusal(planned)
    experts = spreadable(planned)
    config = planned.config
    heads = getattr(config, "num_attention_heads", None) or 1
    candidates = axes(
        job,
        len(planned.kinds),
        experts,
        most_tp=heads,
        most_cp=1 if cp_refusal else max(1, job.seq_len // LEAST_TOKENS),
    )
    if cp_refusal:
        result.refused[f"cp: {cp_refusal}"] += 1
    divisions: list[tuple[float, Layout]] = []
    for layout in candidates:
        if least_weights(planned, plain, layout) > memory:
            result.refused["weights, gradients and optimizer alone do not fit"] += 1
            continue
        try:
            layout.check(job.ranks, config, job.batch, 1, job.seq_len)
        except ValueError as refusal:
            result.refused[str(refusal)] += 1
            continue
        if (costs := tracer.costs(layout)) is None:
            result.refused[tracer.why(layout)] += 1
            continue
        least = least_of(clock, tracer, layout)
        if result.smallest is None or least[1].peak < result.smallest[1].peak:
            result.smallest = least
        if least[1].peak > memory:
            result.refused["their peak does not fit"] += 1
            continue
        largest = microbatch_sizes(job.batch // layout.dp)[-1]
        divisions.append((clock.floor(costs, replace(layout, microbatch=largest)), layout))
    # The likeliest first: those that could not be faster than what was found are never expanded.
    best: dict[tuple, Found] = {}
    worst = math.inf
    for floor, division in sorted(divisions):
        if floor > worst:
            break
        for layout in expanded(division, job, len(planned.kinds)):
            costs = tracer.costs(layout)
            if costs is None:
                result.refused[tracer.why(layout)] += 1
                continue
            result.looked += 1
            known = best.get(shape_of(layout))
            bound = min(worst, known.time.seconds * (1 + 1e-9)) if known else worst
            if clock.floor(costs, layout) > bound:
                continue
            peak = peak_of(clock, costs, layout)
            if peak.peak > memory:
                result.refused["their peak does not fit"] += 1
                continue
            time = clock.time(costs, layout, bound)
            if time is None or time.seconds > bound:
                continue
            rate = job.tokens / time.seconds / job.ranks
            used = utilisation(planned, plain, job, machine, time.seconds)
            found = Found(layout, time, peak, rate, used)
            if known is None or found.order < known.order:
                best[shape_of(layout)] = found
            if len(best) >= keep:
                worst = sorted(f.time.seconds for f in best.values())[keep - 1]
    result.found = sorted(best.values(), key=lambda found: found.order)[:keep]
    return result


def shape_of(layout: Layout) -> tuple:
    """What makes layouts different ones to a reader: of the others the best is shown."""
    return layout.pp, layout.cp, layout.tp, layout.ep > 1, bool(layout.recompute)


def least_of(clock: Clock, tracer: Tracer, layout: Layout) -> tuple[Layout, Memory]:
    """The variant of a division with the smallest peak: one sequence at a time, everything recomputed."""
    layout = replace(layout, recompute=RECOMPUTE[-1])
    costs = tracer.costs(layout)
    if costs is None:
        layout = replace(layout, recompute="")
        costs = tracer.costs(layout)
    assert costs is not None  # without recomputation it has been traced
    return layout, peak_of(clock, costs, layout)


def expanded(division: Layout, job: Job, layers: int) -> Iterator[Layout]:
    """A division of the ranks with every microbatch, schedule and recomputation."""
    local = job.batch // division.dp
    for microbatch, recompute in itertools.product(microbatch_sizes(local), RECOMPUTE):
        for schedule in schedules(division.pp, local // microbatch, layers):
            if not (schedule == "ZBVZeroBubble" and recompute):
                yield replace(division, recompute=recompute, microbatch=microbatch, schedule=schedule)


def peak_of(clock: Clock, costs: Costs, layout: Layout) -> Memory:
    """Of the pipeline rank that needs most: one at the ends, or the one with the most layers."""
    microbatches, size = layout.microbatches(clock.job), 2 if clock.job.dtype == "bfloat16" else 4
    ranks = sorted({0, layout.pp - 1, min(1, layout.pp - 1)})
    every = [memory_of(costs, layout, clock.held(layout, rank, microbatches), microbatches, size) for rank in ranks]
    return max(every, key=lambda memory: memory.peak)


def least_weights(planned: Planned, plain: Costs, layout: Layout) -> float:
    """Bytes of weights and optimizer that no rank can have less of: every axis shards what it can."""
    dense = expert = 0.0
    for kind, number in planned.counts.items():
        dense += number * _durable(plain.parts[kind])
        expert += number * _durable(plain.parts[EXPERTS + kind]) if EXPERTS + kind in plain.parts else 0
    shards = layout.data * layout.tp
    spread = shards * layout.dp_replicate if layout.ep > 1 else shards
    return (dense / shards + expert / spread) / layout.pp


def _durable(part: Part) -> int:
    """Weights, gradients and optimizer, in float32."""
    return WIDE * part.parameters + 3 * WIDE * part.trained


def spreadable(planned: Planned) -> int:
    """Between how many ranks experts can be spread at most; 0 where there are none to spread."""
    found = describe_experts(planned.model)
    return expert_count(planned.config) if found else 0


@functools.lru_cache(maxsize=8)
def _context_refusal(model: Callable, twin: Callable) -> str:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    from am_fsdp._torch_compat import init_fake_process_group

    init_fake_process_group(2)
    try:
        am_moe.apply_cp(twin(), init_device_mesh("cpu", (2,), mesh_dim_names=("cp",)))
    except (ValueError, TypeError, NotImplementedError) as refusal:
        return str(refusal)
    finally:
        dist.destroy_process_group()
    return ""


def context_refusal(planned: Planned) -> str:
    """Why context parallelism is refused for a model; empty where it is not."""
    return _context_refusal(planned.model, planned.twin)
