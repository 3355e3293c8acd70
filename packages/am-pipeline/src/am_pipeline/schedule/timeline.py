"""See what a schedule did: record each action of a step, collect the ranks' records, draw them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage

from am_pipeline.schedule.order import KINDS, Event, bubble_fraction


@contextmanager
def record_timeline(stages: list[PipelineStage]) -> Iterator[list[Event]]:
    """Record every forward and backward of these stages while the context is open; fills the list it yields.

    On an accelerator the times are those of launching the work, unless the caller synchronises.

    Collectives (pipeline axis): one barrier on entry, so that the ranks' clocks start together.
    """
    events: list[Event] = []
    dist.barrier(group=stages[0].group)
    began = time.perf_counter()

    def watch(stage: PipelineStage, method: str, kind_of) -> None:
        original = getattr(stage, method)

        def timed(chunk, *args, **kwargs):
            start = time.perf_counter()
            result = original(chunk, *args, **kwargs)
            kind = kind_of(kwargs)
            events.append(
                Event(stage.group_rank, stage.stage_index, chunk, kind, start - began, time.perf_counter() - began)
            )
            return result

        setattr(stage, method, timed)

    methods = ("forward_one_chunk", "backward_one_chunk", "backward_weight_one_chunk")
    for stage in stages:
        watch(stage, methods[0], lambda _: "F")
        watch(stage, methods[1], lambda kwargs: "B" if kwargs.get("full_backward", True) else "I")
        watch(stage, methods[2], lambda _: "W")
    try:
        yield events
    finally:
        for stage in stages:
            for method in methods:
                delattr(stage, method)


def gather_timeline(events: list[Event], stages: list[PipelineStage]) -> list[Event]:
    """The events of all ranks of the pipeline, on every rank.

    Collectives (pipeline axis): an all-reduce of one int64 and an all-gather of six float64 per event.
    """
    device, group = stages[0].device, stages[0].group
    longest = torch.tensor(len(events), device=device)
    dist.all_reduce(longest, dist.ReduceOp.MAX, group=group)
    rows = torch.full((int(longest), 6), -1.0, dtype=torch.float64)
    for row, e in enumerate(events):
        rows[row] = torch.tensor(
            [e.rank, e.stage, e.microbatch, KINDS.index(e.kind), e.start, e.end], dtype=torch.float64
        )
    rows = rows.to(device)
    everyone = [torch.empty_like(rows) for _ in range(stages[0].group_size)]
    dist.all_gather(everyone, rows, group=group)
    return [
        Event(int(rank), int(stage), int(microbatch), KINDS[int(kind)], start, end)
        for rank, stage, microbatch, kind, start, end in torch.cat(everyone).tolist()
        if rank >= 0
    ]


def text_timeline(events: list[Event], width: int = 100) -> str:
    """A timeline for a terminal: a row per rank, a column per slice of time.

    Forwards are the number of the microbatch (its last digit), backwards its letter, backwards for the inputs alone
    its capital letter, those for the weights alone `=`, idle time `.`; the last row is the idle share.

    Raises:
        ValueError: there are no events.
    """
    _refuse_nothing(events)
    end = max(e.end for e in events)
    rows = []
    for rank in sorted({e.rank for e in events}):
        mine = [e for e in events if e.rank == rank]
        cells = []
        for column in range(width):
            middle = (column + 0.5) * end / width
            running = next((e for e in mine if e.start <= middle < e.end), None)
            cells.append(_character(running) if running else ".")
        rows.append(f"rank {rank:>2}  {''.join(cells)}")
    return "\n".join([*rows, f"idle {100 * bubble_fraction(events):.1f} %"])


def _character(event: Event) -> str:
    letter = chr(ord("a") + event.microbatch % 26)
    return {"F": str(event.microbatch % 10), "B": letter, "I": letter.upper(), "W": "="}[event.kind]


def _refuse_nothing(events: list[Event]) -> None:
    if not events:
        raise ValueError("there are no events to draw: record a step with record_timeline, or simulate an order")


def plot_timeline(events: list[Event], path: str, title: str = "", unit: str = "ms") -> None:
    """Draw one row per pipeline rank: blue forwards, green backwards, numbered by microbatch; darker is a later stage.

    Needs matplotlib (`pip install am-pipeline[plot]`).

    Args:
        events: from `gather_timeline` or `simulate`.
        path: where the picture goes; the ending decides the format.
        title: printed above it.
        unit: `"ms"` for measured events, whose times are seconds, or the name of the unit of simulated ones.

    Raises:
        ValueError: there are no events.
        ImportError: matplotlib is not installed.
    """
    _refuse_nothing(events)
    try:
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError as error:
        raise ImportError("plot_timeline needs matplotlib: pip install am-pipeline[plot]") from error

    colours = {"F": (0.33, 0.55, 0.85), "B": (0.35, 0.70, 0.45), "I": (0.55, 0.80, 0.55), "W": (0.20, 0.50, 0.35)}
    names = {"F": "forward", "B": "backward", "I": "backward, inputs", "W": "backward, weights"}
    ranks = sorted({e.rank for e in events})
    end = max(e.end for e in events)
    scale = 1e3 if unit == "ms" else 1.0
    stages = max(e.stage for e in events) + 1
    figure = Figure(figsize=(12, 1.2 + 0.7 * len(ranks)), dpi=120, layout="constrained")
    axes = figure.subplots()
    for e in events:
        shade = 1.15 - 0.4 * e.stage / max(1, stages - 1)
        colour = tuple(min(1.0, c * shade) for c in colours[e.kind])
        axes.broken_barh([(scale * e.start, scale * (e.end - e.start))], (e.rank - 0.4, 0.8), color=colour, ec="white")
        if (e.end - e.start) > 0.012 * end:
            middle = scale * (e.start + e.end) / 2
            axes.text(middle, e.rank, str(e.microbatch), ha="center", va="center", fontsize=8, color="white")
    axes.set_yticks(ranks, [f"rank {r}" for r in ranks])
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds" if unit == "ms" else unit)
    axes.set_title(f"{title}  idle {100 * bubble_fraction(events):.1f} %".strip())
    axes.spines[["top", "right"]].set_visible(False)
    kinds = [k for k in KINDS if any(e.kind == k for e in events)]
    figure.legend(
        handles=[Patch(color=colours[k], label=names[k]) for k in kinds], loc="outside lower right", ncols=len(kinds)
    )
    figure.savefig(path)
