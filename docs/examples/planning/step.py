"""Seconds of a step: kernels and messages of its layers, what goes on beside what, and the schedule of the stages.

tensor, expert ranks    compute waits for their messages
context ranks           keys and values travel beside attention
data ranks              the next layer is gathered, and gradients are reduced, beside compute; in a pipeline
                        gradients are reduced after the last microbatch
pipeline                a hidden state before each forward and each backward of a stage
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass, field
from typing import Any

import am_moe
from am_pipeline.cut.anatomy import Anatomy, modules_beside
from am_pipeline.schedule.balance import balanced, costs_of
from am_pipeline.schedule.order import Event, Order, peak_live, schedule_order, simulate
from planning.costs import EXPERTS, REST, Costs, Part, scaled
from planning.costs import Work as WorkOf
from planning.layouts import Job, Layout
from planning.machine import Machine
from planning.memory import WIDE, Held
from planning.model import Planned

# AdamW with a loop over tensors, the norm and the clipping: passes over float32 numbers, and operators of a tensor.
_PASSES, _UPDATES = 24, 14
_PER_BLOCK = 12  # operators of a block of shared attention


@dataclass(frozen=True)
class Time:
    """Of a step.

    Attributes:
        seconds: of all of it.
        compute: of the busiest pipeline rank, without messages.
        exposed: seconds that compute waits for messages, by axis.
        bubble: idle share of pipeline ranks.
        optimizer: seconds of clipping and update.
        events: of the schedule; empty without a pipeline.
    """

    seconds: float
    compute: float
    exposed: dict[str, float] = field(default_factory=dict)
    bubble: float = 0.0
    optimizer: float = 0.0
    events: tuple[Event, ...] = ()


class Clock:
    """Times layouts of one model and job on one machine; what several layouts have in common is computed once."""

    def __init__(self, planned: Planned, machine: Machine, job: Job) -> None:
        self.planned, self.machine, self.job = planned, machine, job
        self._spans: dict[tuple[int, int, float], tuple[Span, Span]] = {}
        self._kept_alive: dict[int, Costs] = {}
        layer = planned.model.get_submodule(planned.stack)[0]
        self._tensors_of_a_layer = sum(p.requires_grad for p in layer.parameters())

    def time(self, costs: Costs, layout: Layout, bound: float = math.inf) -> Time | None:
        """The step of a layout, None where it cannot take less than `bound` seconds."""
        work = self._work(costs, layout)
        if work.floor > bound:
            return None
        microbatches, slow = layout.microbatches(self.job), self._crowded(layout)
        events: tuple[Event, ...] = ()
        span, bubble = work.busiest, 0.0
        if layout.pp > 1:
            # What a longer step adds is work of the busiest rank alone: the schedule repeats.
            short = microbatches if microbatches <= 4 * layout.pp else 3 * layout.pp + microbatches % layout.pp
            events = tuple(self._simulated(layout, short, work.pieces))
            span = max(e.end for e in events) + (microbatches - short) * work.busiest / microbatches
            bubble = 1 - work.mean / span
        # Ranks that share cores fill each other's idle time.
        seconds = max(span, work.mean * slow) + (sum(work.last.values()) + work.update) * slow
        exposed: dict[str, float] = {axis: waiting * slow for axis, waiting in work.last.items() if waiting}
        for piece in itertools.chain(*work.pieces):
            for axis, waiting in piece.exposed.items():
                exposed[axis] = exposed.get(axis, 0.0) + microbatches * waiting * slow / layout.pp
        compute = microbatches * sum(piece.compute for piece in itertools.chain(*work.pieces)) / layout.pp * slow
        return Time(seconds, compute, exposed, bubble, work.update * slow, events)

    def floor(self, costs: Costs, layout: Layout) -> float:
        """Seconds that the step of a layout takes at least."""
        return self._work(costs, layout).floor

    def _work(self, costs: Costs, layout: Layout) -> Labour:
        """What every pipeline rank has to do in a step, before the schedule says when."""
        size = 2 if self.job.dtype == "bfloat16" else 4
        microbatches = layout.microbatches(self.job)
        stages = self.stages(layout)
        share = layout.microbatch / layout.cp
        known: dict[tuple, tuple[Piece, Piece]] = {}
        pieces = []
        for index, stage in enumerate(stages):
            key = (index == 0, index == len(stages) - 1, *stage.items())
            if key not in known:
                known[key] = self._stage(costs, layout, stage, index, len(stages), share, size)
            pieces.append(known[key])
        per_rank = [0.0] * layout.pp
        for index, (forward, backward) in enumerate(pieces):
            per_rank[_rank_of(index, layout)] += microbatches * (forward.total + backward.total)
        last = self._after_the_last(costs, layout, stages)
        update = self._update(costs, layout, stages)
        busiest, mean, slow = max(per_rank), sum(per_rank) / layout.pp, self._crowded(layout)
        # The last rank waits for a microbatch to come through the stages before, and for its gradient to go back.
        away = sum(f.total + b.total for f, b in pieces[: layout.pp - 1])
        through = per_rank[-1] + away if layout.schedule != "ZBVZeroBubble" else 0.0
        floor = max(busiest, through, mean * slow) + (sum(last.values()) + update) * slow
        return Labour(pieces, busiest, mean, last, update, floor)

    def stages(self, layout: Layout) -> list[dict[int, int]]:
        """How many layers of each kind a stage holds."""
        return stages_of(self.planned, layout.pp * layout.stages_per_rank)

    def held(self, layout: Layout, rank: int, microbatches: int) -> Held:
        """What a pipeline rank holds."""
        stages = self.stages(layout)
        mine = [index for index in range(len(stages)) if _rank_of(index, layout) == rank]
        layers: dict[int, int] = {}
        for index in mine:
            for kind, count in stages[index].items():
                layers[kind] = layers.get(kind, 0) + count
        live = live_of(layout.schedule, layout.pp, microbatches, layout.stages_per_rank)[rank] if layout.pp > 1 else 1
        return Held(tuple(sorted(layers.items())), 0 in mine, len(stages) - 1 in mine, live, len(mine))

    def _crowded(self, layout: Layout) -> float:
        """How much longer work takes where the ranks of a node share fewer cores."""
        ranks = min(self.job.ranks, self.job.per_node)
        return max(1.0, ranks / self.machine.at_once) if self.machine.at_once else 1.0

    def _neighbours(self, stride: int, size: int) -> int:
        return max(1, min(size, self.job.per_node // stride))

    def _message(self, kind: str, size: float, stride: int, ranks: int) -> float:
        return self.machine.message(kind, size, ranks, self._neighbours(stride, ranks))

    def _span(self, costs: Costs, kind: int, share: float) -> tuple[Span, Span]:
        key = (id(costs), kind, share)
        if key not in self._spans:
            self._kept_alive[id(costs)] = costs
            part = costs.parts[kind]
            again = part.forward.operators if costs.recomputed and kind != REST else 0
            self._spans[key] = (
                self._measure(scaled(part.forward, share), part.forward.operators),
                self._measure(scaled(part.backward, share), again),
            )
        return self._spans[key]

    def _measure(self, share: Any, forward: int) -> Span:
        """Of a share, so many of whose operators come from the modules' forward."""
        machine = self.machine
        device = sum(number * machine.seconds(work) for work, number in share.work.items())
        host = forward * machine.forward_operator + max(0, share.operators - forward) * machine.backward_operator
        attention = tuple((work, number) for work, number in share.work.items() if work.kind.startswith("attention"))
        return Span(device, host, share.messages, share.keys_values, attention)

    def _stage(
        self, costs: Costs, layout: Layout, stage: dict[int, int], index: int, count: int, share: float, size: int
    ) -> tuple[Piece, Piece]:
        """Forward and backward of a microbatch through a stage."""
        pieces = []
        for backward in (False, True):
            total, compute, exposed = 0.0, 0.0, {}
            for kind, number in stage.items():
                layer, own, waits = self._layer(costs, layout, kind, share, size, backward)
                total += number * layer
                compute += number * own
                for axis, waiting in waits.items():
                    exposed[axis] = exposed.get(axis, 0.0) + number * waiting
            # Embedding, final norm, head and loss; what is not at the ends costs next to nothing.
            if index in (0, count - 1):
                span = self._span(costs, REST, share)[backward]
                waiting = self._tensor_messages(span, layout)
                part = 1.0 if count == 1 or index == count - 1 else 0.05
                seconds = self.machine.beside(span.device, span.host)
                total += part * (seconds + waiting)
                compute += part * seconds
                if waiting:
                    exposed["tp"] = exposed.get("tp", 0.0) + part * waiting
            if layout.pp > 1:
                stride = self.job.ranks // layout.pp
                sent = self.machine.point_to_point(costs.hidden * share, stride < self.job.per_node)
                total += sent
                exposed["pp"] = exposed.get("pp", 0.0) + sent
            pieces.append(Piece(total, compute, exposed))
        return pieces[0], pieces[1]

    def _layer(
        self, costs: Costs, layout: Layout, kind: int, share: float, size: int, backward: bool
    ) -> tuple[float, float, dict[str, float]]:
        """Seconds of a layer, of its own kernels, and of waiting by axis."""
        part, experts = costs.parts[kind], costs.parts.get(EXPERTS + kind)
        span = self._span(costs, kind, share)[backward]
        device, host = span.device, span.host
        exposed: dict[str, float] = {}
        if (waiting := self._tensor_messages(span, layout)) > 0:
            exposed["tp"] = waiting
        if experts is not None:
            inside = self._span(costs, EXPERTS + kind, share)[backward]
            device += inside.device / (layout.tp if layout.ep > 1 else 1)
            host += inside.host
            if layout.ep > 1:
                exposed["ep"] = self._dispatch(layout, share, backward)
        if layout.cp > 1:
            longer, more = self._in_blocks(span, layout.cp)
            device, host = device + longer, host + more
        arriving, gathered = self._gather(part, experts, layout, size, backward)
        if gathered:  # cast, copied in and out
            device += 6 * gathered / self.machine.bandwidth
            host += self.machine.unit
        compute = own = self.machine.beside(device, host)
        if layout.cp > 1:
            # Each rank needs three quarters of the others' keys on average, by the causal mask; in the backward keys
            # travel again, and their gradients.
            keys = span.keys_values or self._span(costs, kind, share)[0].keys_values
            sent = 0.75 * keys * (layout.cp - 1) * (3 if backward and layout.recompute else 2 if backward else 1)
            link = self.machine.inside if self._neighbours(layout.tp, layout.cp) >= layout.cp else self.machine.across
            moving = (layout.cp - 1) * link.latency + sent / link.bandwidth
            exposed["cp"] = self.machine.beside(own, moving) - own
            own += exposed["cp"]
        if arriving:
            exposed["dp"] = self.machine.beside(own, arriving) - own
        return compute + sum(exposed.values()), compute, exposed

    def _in_blocks(self, span: Span, ranks: int) -> tuple[float, float]:
        """What attention takes longer where keys come by, of device and host: a kernel for each half of each rank's,
        and bookkeeping."""
        blocks, longer, number = 2 * ranks, 0.0, 0
        for work, times in span.attention:
            piece = work._replace(flops=work.flops / blocks, bytes=work.bytes / blocks)
            longer += times * (blocks * self.machine.seconds(piece) - self.machine.seconds(work))
            number += times * blocks
        return longer, number * _PER_BLOCK * self.machine.forward_operator

    def _tensor_messages(self, span: Span, layout: Layout) -> float:
        return sum(number * self._message(kind, size, 1, layout.tp) for (kind, size), number in span.messages.items())

    def _dispatch(self, layout: Layout, share: float, backward: bool) -> float:
        forward, back = exchanged(self.planned, layout.ep)
        tokens = share * self.job.seq_len / layout.tp
        size = (back + (forward if layout.recompute else 0)) if backward else forward
        times = (2 if backward and layout.recompute else 1) * 2
        whole = size * tokens / times * layout.ep / (layout.ep - 1)
        return times * self._message("all_to_all", whole, 1, layout.ep)

    def _gather(
        self, part: Part, experts: Part | None, layout: Layout, size: int, backward: bool
    ) -> tuple[float, float]:
        """Seconds in which the layer's weights arrive from the data ranks in this pass, and their bytes."""
        if layout.pp > 1:  # what a backward has gathered stays until the next forward of the stage has ended
            gathers = backward and not layout.stays_gathered
        else:
            gathers = not (backward and layout.stays_gathered)
        if not gathers:
            return 0.0, 0.0
        whole = size * part.parameters
        if experts is None or layout.ep == 1:
            whole += size * (experts.parameters if experts else 0)
            return self._message("all_gather", whole, layout.tp, layout.data), whole
        copies, mine = self._stage_ranks(layout) // layout.ep, size * experts.parameters / layout.ep
        arriving = self._message("all_gather", whole, layout.tp, layout.data)
        return arriving + self._message("all_gather", mine, layout.ep, copies), whole + mine

    def _after_the_last(self, costs: Costs, layout: Layout, stages: list[dict[int, int]]) -> dict[str, float]:
        """What of reducing gradients is beside no compute: all of it in a pipeline, else what the last backward does
        not cover."""
        worst = {"dp": 0.0, "replicas": 0.0}
        for layers in _distinct(stages, layout):
            reduced = copied = own = device = 0.0
            units = 0
            for kind, number in layers:
                part, experts = costs.parts[kind], costs.parts.get(EXPERTS + kind)
                dense = WIDE * (part.trained + (experts.trained if experts and layout.ep == 1 else 0))
                reduced += number * self._message("reduce_scatter", dense, layout.tp, layout.data)
                copied += number * self._message(
                    "all_reduce", dense / layout.data, layout.tp * layout.data, layout.dp_replicate
                )
                if experts and layout.ep > 1:
                    copies = self._stage_ranks(layout) // layout.ep
                    reduced += number * self._message(
                        "reduce_scatter", WIDE * experts.trained / layout.ep, layout.ep, copies
                    )
                span = self._span(costs, kind, layout.microbatch / layout.cp)[1]
                own += number * self.machine.beside(span.device, span.host)
                device += number * 4 * dense / self.machine.bandwidth
                units += number
            if layout.pp == 1:
                over = self.machine.beside(own, reduced + copied) - own
                share = over / (reduced + copied) if reduced + copied else 0.0
                reduced, copied = reduced * share, copied * share
            reduced += self.machine.beside(device, units * self.machine.unit)
            if reduced + copied > sum(worst.values()):
                worst = {"dp": reduced, "replicas": copied}
        return worst

    def _update(self, costs: Costs, layout: Layout, stages: list[dict[int, int]]) -> float:
        most, tensors = 0.0, 0
        for layers in _distinct(stages, layout):
            numbers = costs.parts[REST].trained / layout.data / min(2, layout.pp)
            for kind, number in layers:
                numbers += number * costs.parts[kind].trained / layout.data
                if experts := costs.parts.get(EXPERTS + kind):
                    numbers += number * experts.trained / (self._stage_ranks(layout) if layout.ep > 1 else layout.data)
            most, tensors = max(most, numbers), max(tensors, sum(number for _, number in layers))
        count = max(1, tensors * self._tensors_of_a_layer)
        passes = self.machine.seconds(WorkOf("element-wise", 0.0, 3 * WIDE * most / count)) * count * _PASSES / 3
        return self.machine.beside(passes, count * _UPDATES * self.machine.forward_operator)

    @staticmethod
    def _stage_ranks(layout: Layout) -> int:
        return layout.dp_replicate * layout.dp_shard * layout.cp * layout.tp

    def _simulated(self, layout: Layout, microbatches: int, times: list[tuple[Piece, Piece]]) -> list[Event]:
        forward = sum(f.total for f, _ in times) / len(times)
        backward = sum(b.total for _, b in times) / len(times)
        weights = [(f.total + b.total) / (forward + backward) for f, b in times]
        seconds = {"F": forward, "B": backward, "I": backward / 2, "W": backward / 2}
        return simulate(
            order_of(layout.schedule, layout.pp, microbatches, layout.stages_per_rank), seconds, weights=weights
        )


@dataclass(frozen=True)
class Labour:
    """Forward and backward of a microbatch for every stage; seconds of a step on the busiest rank and on average; what
    comes after the last microbatch; and what a step takes at least."""

    pieces: list[tuple[Piece, Piece]]
    busiest: float
    mean: float
    last: dict[str, float]
    update: float
    floor: float


@dataclass(frozen=True)
class Span:
    """Of a part: seconds of its kernels and of the host, its messages over the tensor axis, the bytes of its keys and
    values, and its kernels of attention."""

    device: float
    host: float
    messages: Any
    keys_values: float
    attention: tuple = ()


@dataclass(frozen=True)
class Piece:
    """Forward or backward of a microbatch through a stage: all seconds, those of kernels, and waiting by axis."""

    total: float
    compute: float
    exposed: dict[str, float]


def _distinct(stages: list[dict[int, int]], layout: Layout) -> list[tuple[tuple[int, int], ...]]:
    """How many layers of each kind pipeline ranks hold; each answer once."""
    ranks: list[dict[int, int]] = [{} for _ in range(layout.pp)]
    for index, stage in enumerate(stages):
        mine = ranks[_rank_of(index, layout)]
        for kind, number in stage.items():
            mine[kind] = mine.get(kind, 0) + number
    return list({tuple(sorted(mine.items())) for mine in ranks})


@functools.cache
def order_of(schedule: str, ranks: int, microbatches: int, stages: int) -> Order:
    return schedule_order(schedule, ranks, microbatches, stages)


@functools.cache
def live_of(schedule: str, ranks: int, microbatches: int, stages: int) -> list[int]:
    return peak_live(order_of(schedule, ranks, microbatches, stages))


def stages_of(planned: Planned, count: int) -> list[dict[int, int]]:
    """The layers of each kind in every stage, cut as `am_pipeline` does by default."""
    return _stages(planned.model, planned.stack, planned.kinds, count)


@functools.lru_cache(maxsize=1024)
def _stages(model: Any, stack: str, kinds: tuple[int, ...], count: int) -> list[dict[int, int]]:
    costs = _flops(model, stack, len(kinds))
    found = []
    for layers in balanced(costs, count):
        held: dict[int, int] = {}
        for index in layers:
            held[kinds[index]] = held.get(kinds[index], 0) + 1
        found.append(held)
    return found


@functools.lru_cache(maxsize=8)
def _flops(model: Any, stack: str, layers: int) -> Any:
    beside = [name for name, module in modules_beside(model, (stack,)) if any(True for _ in module.parameters())]
    names = [name for name, _ in modules_beside(model, (stack,))]
    here = names.index(stack)
    before = tuple(name for name in beside if names.index(name) < here)
    after = tuple(name for name in beside if names.index(name) > here)
    return costs_of(model, Anatomy((stack,), (layers,), before, after), "flops")


@functools.lru_cache(maxsize=64)
def _exchanged(model: Any, ep: int) -> tuple[float, float]:
    told = am_moe.explain(model, ep)
    return told.forward_bytes, told.backward_bytes


def exchanged(planned: Planned, ep: int) -> tuple[float, float]:
    """Bytes that a token's rows take to experts and back, and their gradients, in a layer."""
    return _exchanged(planned.model, ep)


def _rank_of(stage: int, layout: Layout) -> int:
    if layout.schedule in ("ZBVZeroBubble",) and layout.pp > 1:
        return min(stage, 2 * layout.pp - 1 - stage)
    return stage % layout.pp


def utilisation(planned: Planned, plain: Costs, job: Job, machine: Machine, seconds: float) -> float:
    """Of the data sheet's FLOP/s: those of forward and backward without recomputation; attention by its causal half."""
    return 3 * forward_flops(planned, plain) * job.batch / (seconds * machine.peak * job.ranks)


def forward_flops(planned: Planned, plain: Costs) -> float:
    """Of a sequence, from costs without tensor parallelism and recomputation."""
    layers = itertools.chain(planned.counts.items(), ((EXPERTS + k, n) for k, n in planned.counts.items()), [(REST, 1)])
    return sum(n * plain.parts[kind].forward.flops for kind, n in layers if kind in plain.parts)
