"""What every rank of a schedule does, in order, as plain data: from a name or a file, checked, simulated."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from am_pipeline.placement import stage_ids_this_rank

ScheduleName = Literal[
    "GPipe", "1F1B", "Interleaved1F1B", "LoopedBFS", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV"
]
SCHEDULES: tuple[str, ...] = get_args(ScheduleName)

# Forward; backward in one pass; backward for the inputs only; backward for the weights only.
KINDS = ("F", "B", "I", "W")


class Action(NamedTuple):
    """One piece of work: `kind` is `F`, `B`, `I` or `W`; written `2F0` for microbatch 0 through stage 2."""

    stage: int
    kind: str
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.microbatch}"


# The actions of every rank, in the order in which it runs them.
Order = list[list[Action]]


@dataclass(frozen=True)
class Event:
    """One action and when it ran: `rank` is the pipeline rank, times are seconds (or units) from the start."""

    rank: int
    stage: int
    microbatch: int
    kind: str
    start: float
    end: float


def schedule_order(name: str, ranks: int, microbatches: int, stages_per_rank: int | None = None) -> Order:
    """What each rank of a schedule does.

    Args:
        name: `GPipe`, `1F1B`, `Interleaved1F1B`, `LoopedBFS`, `InterleavedZeroBubble`, `ZBVZeroBubble` or `DualPipeV`.
        ranks: size of the pipeline axis.
        microbatches: per step.
        stages_per_rank: None for one (GPipe, 1F1B) or two (the others).

    Raises:
        ValueError: an unknown name, or sizes that the schedule does not take.
    """
    # torch's own classes say what they do; asking them needs no process group.
    from am_pipeline._torch_compat import order_of

    if name not in SCHEDULES:
        raise ValueError(f"unknown pipeline schedule {name!r}; torch has {', '.join(SCHEDULES)}")
    if ranks < 1 or microbatches < 1:
        raise ValueError(f"ranks and microbatches must be positive, got {ranks} and {microbatches}")
    if name in ("GPipe", "1F1B"):
        if stages_per_rank not in (None, 1):
            raise ValueError(f"{name} holds one stage per rank, got stages_per_rank={stages_per_rank}")
        return [_one_stage(name, rank, ranks, microbatches) for rank in range(ranks)]
    cells = order_of(name, ranks, stages_per_rank or 2, microbatches)
    return [[action for cell in row for action in parse_cell(cell)] for row in cells]


def read_order(path: str, ranks: int, microbatches: int | None = None) -> Order:
    """Read a schedule file and check all of it.

    The file has one row per rank and comma-separated cells: `0F1` is the forward of microbatch 1 through stage 0, `B`
    a whole backward, `I` and `W` its two halves, `(0F3;1B2)OVERLAP_F_B` two actions at once; empty cells are idle.

    Args:
        path: the file.
        ranks: size of the pipeline axis.
        microbatches: per step; None to take the highest that the file names.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a cell that is no action, an action that is missing, there twice or before what it needs, a stage
            on two ranks, or rows that wait for each other; each names the row and the cell.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"the schedule file {path!r} does not exist")
    with open(path) as lines:
        rows = lines.read().splitlines()
    if len(rows) != ranks:
        raise ValueError(f"{path} has {len(rows)} rows, one per rank, but the pipeline axis has {ranks}")
    order: Order = []
    for number, row in enumerate(rows, 1):
        actions: list[Action] = []
        for cell in row.split(","):
            try:
                actions += parse_cell(cell)
            except ValueError as error:
                raise ValueError(f"{path}, row {number}: {error}") from None
        order.append(actions)
    if microbatches is None:
        microbatches = 1 + max((a.microbatch for actions in order for a in actions), default=-1)
    check_order(order, microbatches, path)
    return order


def check_order(order: Order, microbatches: int, where: str = "the schedule") -> None:
    """Refuse an order that is not complete, not in order, or would deadlock. See `read_order`."""
    owner: dict[int, int] = {}
    for row, actions in enumerate(order, 1):
        for action in actions:
            if owner.setdefault(action.stage, row) != row:
                raise ValueError(
                    f"{where}, row {row}: {action} runs stage {action.stage}, which is on row {owner[action.stage]}"
                )
    if not owner:
        raise ValueError(f"{where} has no actions")
    stages = max(owner) + 1
    if missing := list(itertools.islice((stage for stage in range(stages) if stage not in owner), 5)):
        others = stages - len(owner) - len(missing)
        more = f" and {others} more" if others else ""
        raise ValueError(f"{where}: no row runs the stages {missing}{more} of {stages}")
    for row, actions in enumerate(order, 1):
        _check_row(row, actions, microbatches, where)
    simulate(order, where=where)


def simulate(
    order: Order,
    seconds: Mapping[str, float] | None = None,
    *,
    weights: Sequence[float] | None = None,
    where: str = "the schedule",
) -> list[Event]:
    """When each action of an order runs, if every rank starts it as soon as its inputs are there.

    Args:
        order: from `schedule_order` or `read_order`.
        seconds: what each kind takes; the default is F 1, B 2, I 1, W 1. Messages take no time.
        weights: what a stage's actions cost relative to others', one number per stage; None for all alike.
        where: the name of the order in errors.

    Raises:
        ValueError: the rows wait for each other; names the action each stops at.
    """
    seconds = {"F": 1.0, "B": 2.0, "I": 1.0, "W": 1.0} | dict(seconds or {})
    stages = 1 + max((a.stage for actions in order for a in actions), default=0)
    done: dict[Action, float] = {}
    clock, place = [0.0] * len(order), [0] * len(order)
    events: list[Event] = []
    moved = True
    while moved:
        moved = False
        for rank, actions in enumerate(order):
            while place[rank] < len(actions):
                action = actions[place[rank]]
                ready = _ready_at(action, done, stages)
                if ready is None:
                    break
                start = max(clock[rank], ready)
                clock[rank] = start + seconds[action.kind] * (weights[action.stage] if weights else 1.0)
                done[action] = clock[rank]
                events.append(Event(rank, action.stage, action.microbatch, action.kind, start, clock[rank]))
                place[rank] += 1
                moved = True
    stuck = [(r, actions[place[r]]) for r, actions in enumerate(order) if place[r] < len(actions)]
    if stuck:
        waits = "; ".join(f"row {r + 1} stops at cell {place[r] + 1}, {a}" for r, a in stuck)
        raise ValueError(f"{where} would deadlock: {waits}")
    return sorted(events, key=lambda e: (e.start, e.rank))


def bubble_fraction(events: Sequence[Event]) -> float:
    """Idle share of the rank that is busy over the longest span: 1 - (work per rank) / (longest span of a rank).

    A rank's span runs from its first action to the end of its last. For 1F1B and GPipe on p ranks and m microbatches
    this is (p - 1) / (m + p - 1) (Narayanan et al., 2021); for ZB-V with equal F, I and W it is 0 (Qi et al., 2024).
    """
    rows: dict[int, list[Event]] = {}
    for event in events:
        rows.setdefault(event.rank, []).append(event)
    span = max(max(e.end for e in row) - min(e.start for e in row) for row in rows.values())
    return 1 - sum(e.end - e.start for e in events) / len(rows) / span


def peak_live(order: Order) -> list[int]:
    """The most microbatches, counted per stage, whose activations each rank keeps at once."""
    peaks = []
    for actions in order:
        split = {(a.stage, a.microbatch) for a in actions if a.kind == "W"}
        live = most = 0
        for action in actions:
            live += action.kind == "F"
            most = max(most, live)
            live -= action.kind == "W" or (action.kind == "B" and (action.stage, action.microbatch) not in split)
        peaks.append(most)
    return peaks


def parse_cell(cell: str) -> list[Action]:
    """The actions of one cell: none where it is empty, two where it overlaps them."""
    cell = cell.strip()
    if not cell:
        return []
    overlap = re.fullmatch(r"\(([^()]*)\)OVERLAP_F_B", cell)
    return [_parse_action(part.strip()) for part in (overlap[1].split(";") if overlap else [cell])]


def _parse_action(text: str) -> Action:
    single = re.fullmatch(r"([0-9]{1,6})([FBIW])([0-9]{1,6})", text)
    if single is None:
        shown = text if len(text) <= 40 else text[:40] + "..."
        raise ValueError(
            f"{shown!r} is not an action; write <stage><kind><microbatch> with a kind of F, B, I or W, such as 0F1, "
            "and numbers of at most six digits"
        )
    return Action(int(single[1]), single[2], int(single[3]))


def _check_row(row: int, actions: list[Action], microbatches: int, where: str) -> None:
    seen: dict[Action, int] = {}
    for cell, action in enumerate(actions, 1):
        here = f"{where}, row {row}, cell {cell}: {action}"
        if not 0 <= action.microbatch < microbatches:
            raise ValueError(f"{here} is of a microbatch that is not there: the step has {microbatches}")
        if action in seen:
            raise ValueError(f"{here} was there already, in cell {seen[action]}")
        seen[action] = cell
        forward, inputs = action._replace(kind="F"), action._replace(kind="I")
        if action.kind != "F" and forward not in seen:
            raise ValueError(f"{here} comes before {forward}")
        if action.kind == "W" and inputs not in seen:
            raise ValueError(f"{here} comes before {inputs}")
        if (action.kind == "I" and action._replace(kind="B") in seen) or (action.kind == "B" and inputs in seen):
            raise ValueError(f"{here} computes the gradients of its inputs a second time")
    for stage in sorted({a.stage for a in actions}):
        for microbatch in range(microbatches):
            has = {kind for kind in KINDS if Action(stage, kind, microbatch) in seen}
            if "F" not in has:
                raise ValueError(f"{where}, row {row}: {stage}F{microbatch} is missing")
            if "B" not in has and not {"I", "W"} <= has:
                lacks = f"{stage}B{microbatch}" if "I" not in has else f"{stage}W{microbatch}"
                raise ValueError(f"{where}, row {row}: {lacks} is missing")


def _ready_at(action: Action, done: Mapping[Action, float], stages: int) -> float | None:
    """When what an action needs from other stages is there; None while it is not."""
    stage, kind, microbatch = action
    if kind == "F":
        return 0.0 if stage == 0 else done.get(Action(stage - 1, "F", microbatch))
    if kind == "W":
        return done.get(Action(stage, "I", microbatch))
    if stage == stages - 1:
        return done.get(Action(stage, "F", microbatch))
    ends = (done.get(Action(stage + 1, later, microbatch)) for later in ("B", "I"))
    return next((end for end in ends if end is not None), None)


def _one_stage(name: str, rank: int, ranks: int, microbatches: int) -> list[Action]:
    (stage,) = stage_ids_this_rank(rank, ranks, ranks)
    forwards = [Action(stage, "F", m) for m in range(microbatches)]
    backwards = [Action(stage, "B", m) for m in range(microbatches)]
    if name == "GPipe":
        return forwards + backwards
    ahead = min(microbatches, ranks - rank)
    steady = [a for pair in zip(backwards, forwards[ahead:], strict=False) for a in pair]
    return forwards[:ahead] + steady + backwards[microbatches - ahead :]
