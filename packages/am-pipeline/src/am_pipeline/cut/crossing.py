"""What crosses a cut, derived from a trace: every value that a stage needs is there, travels to it, or is refused.

A stage runs the layers it holds, the units beside them that it holds, and all code between units. From what its layers
(and on the last stage the output) read, everything that it needs follows: a value of a unit that it holds is computed
there, one of a unit that only an earlier stage holds travels through every stage between; inputs are on all stages.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from fractions import Fraction

import torch

from am_pipeline.cut.provenance import Call, Draw, Inner, Input, Source, Trace, Value, Weight
from am_pipeline.cut.units import Units

# Sequences, tokens of each; of a model with a decoder of its own the tokens of that, or 0; of one whose tower is cut
# the first dim of what the tower takes, images or patches.
Sizes = tuple[int, ...]


class CannotCutError(Exception):
    """Why a model cannot be cut, in words that follow "cannot be cut between the layers of model.layers: "."""


@dataclass(frozen=True)
class Dim:
    """`factor` times the product of some of the `Sizes`, by their places, plus `more`."""

    of: tuple[int, ...]
    factor: Fraction = Fraction(1)
    more: int = 0

    def at(self, sizes: Sizes) -> int:
        size = math.prod(sizes[place] for place in self.of)
        return size * self.factor.numerator // self.factor.denominator + self.more  # sizes may be symbolic

    def size_of(self, size: int) -> int:
        """The one of the sizes of which this makes `size`."""
        return (size - self.more) * self.factor.denominator // self.factor.numerator

    def __str__(self) -> str:
        words = [("batch", "sequence", "decoder sequence", "images")[place] for place in self.of]
        text = " * ".join(([str(self.factor)] if self.factor != 1 else []) + words)
        return f"{text} + {self.more}" if self.more else text


BATCH, SEQUENCE, DECODER_SEQUENCE, IMAGES = (Dim((place,)) for place in range(4))


@dataclass(frozen=True)
class Shape:
    """A tensor's dims as plain data: `(batch, sequence, 4096)`."""

    dims: tuple[int | Dim, ...]

    def at(self, sizes: Sizes) -> tuple[int, ...]:
        return tuple(dim.at(sizes) if isinstance(dim, Dim) else dim for dim in self.dims)

    @property
    def sizes(self) -> set[int]:
        """The places of the sizes that it depends on."""
        return {place for dim in self.dims if isinstance(dim, Dim) for place in dim.of}

    def size_in(self, place: int, shape: tuple[int, ...]) -> int | None:
        """One of the sizes, from the shape of a tensor; None where no dim tells it by itself."""
        for dim, size in zip(self.dims, shape, strict=True):
            if isinstance(dim, Dim) and dim.of == (place,) and dim.factor >= 1:
                return dim.size_of(size)
        return None

    def __str__(self) -> str:
        return f"({', '.join(map(str, self.dims))})"


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
            ran = units.layers_in(c.unit for c in trace.calls)
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
        if made := next((s for s in sorted(hook.sources, key=repr) if isinstance(s, (Value, Inner, Weight))), None):
            raise CannotCutError(f"{hook.place} puts a hook on the gradient of {made}, which every stage would do")
    for look in trace.looks:
        refuse_look(look.sources, look.place)
        for stage in range(last + 1):
            need(stage, look.sources, f"{look.place}, which looks at it,")
    for name, sources in trace.kept.items():
        if any(isinstance(s, (Value, Inner)) for s in sources):
            made = next(s for s in sorted(sources, key=repr) if isinstance(s, (Value, Inner)))
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


def shape_of(small: tuple[int, ...], large: tuple[int, ...], sizes: tuple[Sizes, ...]) -> Shape | None:
    """The dims of a tensor from its shapes in two runs, of two numbers of sequences and tokens.

    None where a dim is neither fixed nor a multiple of the batch, a sequence or both, nor some more than a sequence.
    """
    if len(small) != len(large):
        return None
    dims = [_dim(a, b, sizes) for a, b in zip(small, large, strict=True)]
    return None if any(dim is None for dim in dims) else Shape(tuple(d for d in dims if d is not None))


def _dim(small: int, large: int, sizes: tuple[Sizes, ...]) -> int | Dim | None:
    if small == large:
        return small
    lengths = [place for place, size in enumerate(sizes[0]) if place and size]
    found = []
    for of in ((0,), *((place,) for place in lengths), *((0, place) for place in lengths)):
        factor = Fraction(small, Dim(of).at(sizes[0]))
        if factor and factor * Dim(of).at(sizes[1]) == large and 1 in (factor.numerator, factor.denominator):
            found.append(Dim(of, factor))
    if found:  # twice the rows have twice the images: a multiple is one of images, of which a row may have more
        return min(found, key=lambda dim: 0 if dim.factor == 1 else 1 if dim.of == IMAGES.of else 2)
    for place in lengths:
        if large - small == sizes[1][place] - sizes[0][place]:
            return Dim((place,), more=small - sizes[0][place])
    return None


def _stages(stages: Iterable[int]) -> str:
    return " and ".join(map(str, sorted(stages)))
