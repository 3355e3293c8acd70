"""What crosses a cut, derived from a trace: every value that a stage needs is there, travels to it, or is refused.

A stage runs the layers it holds, the units beside them that it holds, and all code between units. From what its layers
(and on the last stage the output) read, everything that it needs follows: a value of a unit that it holds is computed
there, one of a unit that only an earlier stage holds travels through every stage between; inputs are on all stages.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from fractions import Fraction

import torch

from am_pipeline.provenance import Call, Draw, Inner, Input, Source, Trace, Value, Weight
from am_pipeline.units import Units

Sizes = tuple[tuple[int, int], ...]


class CannotCutError(Exception):
    """Why a model cannot be cut, in words that follow "cannot be cut between the layers of model.layers: "."""


@dataclass(frozen=True)
class Dim:
    """`factor` times the batch size and the sequence length (either or both), plus `more`."""

    batch: bool
    sequence: bool
    factor: Fraction = Fraction(1)
    more: int = 0

    def at(self, batch: int, seq_len: int) -> int:
        size = (batch if self.batch else 1) * (seq_len if self.sequence else 1)
        return size * self.factor.numerator // self.factor.denominator + self.more  # sizes may be symbolic

    def size_of(self, size: int) -> int:
        """The batch size or sequence length of which this makes `size`."""
        return (size - self.more) * self.factor.denominator // self.factor.numerator

    def __str__(self) -> str:
        words = [w for w, there in (("batch", self.batch), ("sequence", self.sequence)) if there]
        text = " * ".join(([str(self.factor)] if self.factor != 1 else []) + words)
        return f"{text} + {self.more}" if self.more else text


BATCH, SEQUENCE = Dim(True, False), Dim(False, True)


@dataclass(frozen=True)
class Shape:
    """A tensor's dims as plain data: `(batch, sequence, 4096)`."""

    dims: tuple[int | Dim, ...]

    def at(self, batch: int, seq_len: int) -> tuple[int, ...]:
        return tuple(dim.at(batch, seq_len) if isinstance(dim, Dim) else dim for dim in self.dims)

    def __str__(self) -> str:
        return f"({', '.join(map(str, self.dims))})"


def batch_and_sequence(shape: Shape) -> tuple[int, int] | None:
    """Which dims tell the batch size and the sequence length; None where one of them is missing."""
    dims = [(i, d) for i, d in enumerate(shape.dims) if isinstance(d, Dim) and d.factor >= 1]
    batch = next((i for i, dim in dims if dim.batch and not dim.sequence), None)
    sequence = next((i for i, dim in dims if dim.sequence and not dim.batch), None)
    return None if batch is None or sequence is None else (batch, sequence)


@dataclass(frozen=True)
class Crossed:
    """One tensor that is sent from a stage to the next.

    Attributes:
        value: what it is.
        shape, dtype, requires_grad: of a model that is as it was when it was cut.
        of_layer: whether a layer made it: its tokens are then sharded where layers shard theirs.
        written: whether code writes into it after it was made, so that what is sent is a copy.
    """

    value: Value
    shape: Shape
    dtype: torch.dtype
    requires_grad: bool
    of_layer: bool
    written: bool


@dataclass
class Needs:
    """What follows from a cut, by stage.

    Attributes:
        live: the calls of units whose results count on a stage.
        enters: the values that a stage gets from the one before it, in the order in which they are made.
        inputs: names of the inputs that a stage depends on.
        weights: units that a stage must hold too, because code on it reads their parameters.
    """

    live: dict[int, set[tuple[str, int]]] = field(default_factory=lambda: defaultdict(set))
    enters: dict[int, list[Value]] = field(default_factory=lambda: defaultdict(list))
    inputs: dict[int, set[str]] = field(default_factory=lambda: defaultdict(set))
    weights: set[tuple[int, str]] = field(default_factory=set)


def needs_of(trace: Trace, units: Units, holders: Callable[[str], set[int]], last: int) -> Needs:
    """What every stage needs, given which stages hold a unit.

    Raises:
        CannotCutError: names what cannot be had, where it is made and where it is read.
    """
    needs = Needs()
    calls = {(call.unit, call.index): call for call in trace.calls}
    draws: dict[Draw, set[int]] = defaultdict(set)

    def need(stage: int, sources: Iterable[Source], reader: str) -> None:
        for source in sorted(sources, key=repr):
            if isinstance(source, Input):
                needs.inputs[stage].add(source.name)
            elif isinstance(source, Weight):
                if stage not in holders(source.unit):
                    if units.is_layer(source.unit):
                        raise CannotCutError(f"{reader} reads {source.name}, a parameter of a layer on another stage")
                    needs.weights.add((stage, source.unit))
            elif isinstance(source, Draw):
                draws[source].add(stage)
                if len(draws[source]) > 1:
                    raise CannotCutError(f"{source} would be drawn anew on every stage; {reader} reads them")
            elif isinstance(source, Inner):
                if stage not in holders(source.unit) or (source.unit, source.call) not in calls:
                    raise CannotCutError(
                        f"{reader} takes more from {source.unit} than it returns: {source} on stage "
                        f"{_stages(holders(source.unit))} is read on stage {stage}"
                    )
                run(stage, calls[source.unit, source.call])
            elif stage in holders(source.unit):
                run(stage, calls[source.unit, source.call])
            else:
                travel(source, stage, reader)

    def travel(value: Value, stage: int, reader: str) -> None:
        earlier = [holder for holder in holders(value.unit) if holder < stage]
        if not earlier:
            ran = [int(c.unit.rpartition(".")[2]) for c in trace.calls if units.is_layer(c.unit)]
            order = "" if ran == sorted(set(ran)) else f"its forward runs the layers in the order {ran}: "
            where = _stages(holders(value.unit))
            raise CannotCutError(
                f"{order}{reader} on stage {stage} reads {value}, which is made later, on stage {where}"
            )
        run(max(earlier), calls[value.unit, value.call])
        for place in range(max(earlier) + 1, stage + 1):
            if value not in needs.enters[place]:
                needs.enters[place].append(value)

    def run(stage: int, call: Call) -> None:
        if (call.unit, call.index) in needs.live[stage]:
            return
        needs.live[stage].add((call.unit, call.index))
        elsewhere = [s for s, live in needs.live.items() if s != stage and (call.unit, call.index) in live]
        if call.random and elsewhere:
            raise CannotCutError(f"{call.unit} draws random numbers and would run on stages {elsewhere[0]} and {stage}")
        need(stage, call.reads, call.unit)

    if trace.python_random:
        raise CannotCutError("its forward draws from Python's random module, on every stage something else")
    if trace.outside:
        raise CannotCutError(
            f"{trace.outside[0]} reads a parameter that the module does not hold, through a function closed over it, "
            "for example: no copy of the model has it; register it where it is read"
        )
    if trace.stale:
        raise CannotCutError(f"{trace.stale[0]} reads what an earlier forward left, which another stage may have")
    for hook in trace.hooked:
        if made := next((s for s in hook.sources if isinstance(s, (Value, Inner, Weight))), None):
            raise CannotCutError(f"{hook.place} puts a hook on the gradient of {made}, which every stage would do")
    for look in trace.looks:
        refuse_look(look.sources, look.place)
        for stage in range(last + 1):
            need(stage, look.sources, f"{look.place}, which looks at it,")
    for name, sources in trace.kept.items():
        if any(isinstance(s, (Value, Inner)) for s in sources):
            made = next(s for s in sources if isinstance(s, (Value, Inner)))
            raise CannotCutError(f"its forward writes {made} into {name}, which is on every stage")
    for call in trace.calls:
        if call.keeps and len(holders(call.unit)) > 1:
            where = _stages(holders(call.unit))
            raise CannotCutError(f"{call.unit} keeps a state, {call.keeps}, and would be on stages {where}")
        if units.is_layer(call.unit):
            for stage in holders(call.unit):
                run(stage, call)
    need(last, trace.output, "the output")
    order = {(call.unit, call.index): place for place, call in enumerate(trace.calls)}
    for values in needs.enters.values():
        values.sort(key=lambda v: (order[v.unit, v.call], v.leaf))
    return needs


def refuse_look(sources: Iterable[Source], place: str) -> None:
    """Every stage runs the code between units, so a number that it reads must be known on every stage."""
    for source in sorted(sources, key=repr):
        if isinstance(source, (Value, Inner, Weight)):
            raise CannotCutError(f"{place} reads a number of {source} into Python, where no stage has it all")
        if isinstance(source, Draw):
            raise CannotCutError(f"{place} depends on {source}, which every stage draws anew")


def shape_of(small: tuple[int, ...], large: tuple[int, ...], sizes: Sizes) -> Shape | None:
    """The dims of a tensor from its shapes in two runs, of two numbers of sequences and tokens.

    None where a dim is neither fixed nor a multiple of the batch, the sequence or both, nor some more than a sequence.
    """
    if len(small) != len(large):
        return None
    dims = [_dim(a, b, sizes) for a, b in zip(small, large, strict=True)]
    return None if any(dim is None for dim in dims) else Shape(tuple(d for d in dims if d is not None))


def _dim(small: int, large: int, sizes: Sizes) -> int | Dim | None:
    if small == large:
        return small
    for batch, sequence in ((True, False), (False, True), (True, True)):
        unit = Dim(batch, sequence)
        factor = Fraction(small, unit.at(*sizes[0]))
        if factor and factor * unit.at(*sizes[1]) == large and 1 in (factor.numerator, factor.denominator):
            return Dim(batch, sequence, factor)
    if large - small == sizes[1][1] - sizes[0][1]:
        return Dim(False, True, more=small - sizes[0][1])
    return None


def _stages(stages: Iterable[int]) -> str:
    return " and ".join(map(str, sorted(stages)))
