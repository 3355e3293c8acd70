"""Read a model by running its forward without numbers; say what every stage of a cut does, and prove it.

The whole model is traced on a few tokens, and what has to cross each cut follows from the trace (`crossing`). Then each
part is traced as well, with stand-ins where the other stages' units were. It is accepted when every unit that counts on
it saw the same computation as in the whole model, to the last operator.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from itertools import zip_longest
from typing import Any

import torch

from am_pipeline.cut.anatomy import Anatomy, modules_beside
from am_pipeline.cut.boundary import Boundary, Missing, NotHeldError, Passage, select_output
from am_pipeline.cut.crossing import (
    CannotCutError,
    Crossed,
    Needs,
    Shape,
    Sizes,
    needs_of,
    shape_of,
)
from am_pipeline.cut.forms import ODD, SIZES, Form, Piece, resolve_form
from am_pipeline.cut.provenance import Argument, Call, Inner, Input, Leaf, Trace, Tracer, Value, leaves_of, sent_key
from am_pipeline.cut.rows import first_mix
from am_pipeline.cut.skeleton import copy_without
from am_pipeline.cut.units import Units
from am_pipeline.cut.weightless import Weightless, refuse_training
from am_pipeline.nested import map_leaves
from am_pipeline.step.inputs import DECODER_IDS, ENCODER_INPUTS, decoder_length, padding_images

Stages = tuple[tuple[str, ...], ...]
_MOST_PROVED = 256  # forms of calls whose proofs are kept


class Reading:
    """What one choice of stacks shows of a model.

    Attributes:
        anatomy: where the model's parts sit.
        units: what a cut moves as one piece.
        mixes: what computes over the sequences of a batch, of which a microbatch has some; None where nothing does.
    """

    def __init__(
        self,
        weightless: Weightless,
        stacks: Iterable[str],
        form: Form,
        named: Iterable[str] = (),
        base: Reading | None = None,
    ) -> None:
        """Trace the model.

        Args:
            weightless: the model.
            stacks: full names of its stacks of layers.
            form: what it is called with.
            named: modules that a stage holds without what they are part of: nothing larger is one piece.
            base: an earlier reading with another form, from which the sizes of tensors are known.
        """
        self.weightless, self.stacks, self.form, self.base = weightless, tuple(stacks), form, base
        if form.training:
            refuse_training(weightless.model)
        self.named = tuple(named)
        opened = {name.rsplit(".", n)[0] for name in named for n in range(1, name.count(".") + 1)}
        while True:
            self.units = Units(weightless.model, self.stacks, opened)
            self.small = _trace(weightless, self.units, self.form, self.form.sizes[0], twice=True)
            called = {call.unit for call in self.small.calls}
            nested = {a for a in called for b in called if b.startswith(f"{a}.")}
            nested |= {unit for unit in self.small.opened if not self.units.is_layer(unit)}
            if not nested:
                break
            opened |= nested
        runs = {stack: [call.unit.startswith(f"{stack}.") for call in self.small.calls] for stack in self.stacks}
        for stack, ran in runs.items():
            if not any(ran):
                raise CannotCutError(f"its forward does not run {stack if len(runs) > 1 else 'them'} on text")
        self.stacks = tuple(sorted(self.stacks, key=lambda stack: runs[stack].index(True)))
        self.units = Units(weightless.model, self.stacks, opened)
        if self.grows_by_images and len(self.stacks) > 1:
            self._refuse_lists_of_no_stack()
        self._refuse_other_paths()
        self.large, self.odd = self.small, None
        if len(self.form.sizes) > 1:
            self.large = _trace(weightless, self.units, self.form, self.form.sizes[1])
            if not self.grows_by_images:
                with contextlib.suppress(Exception):  # some models take no odd length
                    self.odd = _trace(weightless, self.units, self.form, ODD)
        if [c.unit for c in self.small.calls] != [c.unit for c in self.large.calls]:
            raise CannotCutError("its forward runs other modules for longer inputs")
        two_sizes = len(self.form.sizes) > 1 and not self.grows_by_images
        self.mixes = first_mix(self.small.over, self.large.over, self.form.sizes) if two_sizes else None
        self.anatomy = self._anatomy()
        self._proved: dict[tuple, tuple[dict[str, int | None], tuple[Passage, ...]]] = {}
        self._grow: set[tuple] = set()  # forms that were read at two numbers of images, as what crosses depends on it

    def __deepcopy__(self, memo: dict) -> Reading:
        return self

    @property
    def grows_by_images(self) -> bool:
        """Whether it was read at two numbers of images, so that what a tower's layers make may cross a cut."""
        return len(self.form.sizes[0]) > 3

    def passages_for(
        self,
        stages: Stages,
        first: torch.Tensor | None,
        inputs: Mapping[str, Any],
        batch: int,
        seq_len: int,
        *,
        training: bool,
        batch_dims: Mapping[str, int | None] | None = None,
        pieces: int = 1,
        place: int = 0,
    ) -> tuple[dict[str, int | None], tuple[Passage, ...]]:
        """What every stage does when the model is called with these inputs; found out and proved once for each form.

        Args:
            stages: the modules of every stage, as `cut` returned them.
            first: the model's first argument, where it is known.
            inputs: further inputs, of the whole batch.
            batch, seq_len: sequences and tokens of the batch.
            training: whether the model is in training mode.
            batch_dims: the batch dims of inputs of which they are known.
            pieces, place: microbatches of the batch, and which of them inputs of one microbatch are for.

        Returns:
            The batch dim of every further tensor, None where it goes to every microbatch whole; the passages.

        Raises:
            ValueError: the cut does not hold for these inputs, or the batch dim of one cannot be told.
        """
        said = dict(batch_dims or {}) if inputs else {}
        splits = pieces if inputs else 1
        sizes = (batch, seq_len, *decoder_length(inputs))
        given = self.form.first if first is None else self.form.first.of(first.detach())
        pattern = training, given.fixed, _pattern(inputs, sizes, splits), tuple(sorted(said.items())), splits > 1
        grows = pattern in self._grow
        if grows or self.grows_by_images:
            pattern += _of_images(inputs)
        if pattern not in self._proved:
            if len(self._proved) >= _MOST_PROVED:
                del self._proved[next(iter(self._proved))]
            given = replace(given, sample=given.sample.cpu())
            form = replace(self.form, first=given, tensors={}, others={}, training=training, sizes=SIZES)
            if inputs:
                runs = partial(inputs_read, self.weightless, self.units)
                of = (given, inputs, batch, seq_len, runs)
                form = resolve_form(*of, training=training, batch_dims=said, pieces=splits, place=place)
            grown = len(set(ENCODER_INPUTS) & set(form.tensors)) == 1  # two towers are read as they are
            passages = () if grows and grown else self._prove_forms(form, stages)
            if not (grows or self.grows_by_images) and any(not c.shape.sizes for p in passages for c in p.sends):
                # What is of this many images would be taken for what is always so: read at another number of them.
                self._grow.add(pattern)
                pattern += _of_images(inputs)
                grows = True
            if grows and grown:
                passages = self._prove_form(form.with_more_images, stages)
            self._proved[pattern] = form.batch_dims, passages
        return self._proved[pattern]

    def remember(self, passages: tuple[Passage, ...]) -> None:
        """What `cut` returned for this form."""
        if not self.form.tensors and not self.form.others:
            self._proved[self.form.training, self.form.first.fixed, (), (), False] = {}, passages

    def _prove_forms(self, form: Form, stages: Stages) -> tuple[Passage, ...]:
        """A form with masks holds for masks that hide something and for those that hide nothing."""
        masks = {name for name, given in form.tensors.items() if given.is_mask}
        if not masks or len(form.sizes) == 1:
            return self._prove_form(form.with_more_images if self.grows_by_images else form, stages)
        found = []
        for hides in (False, True):
            tensors = {n: g.filled(hides) if n in masks else g for n, g in form.tensors.items()}
            found.append(self._prove_form(replace(form, tensors=tensors), stages))
        for open_, hiding in zip(*found, strict=True):
            if (open_.sends, list(open_.returns)) != (hiding.sends, list(hiding.returns)):
                raise ValueError(f"what crosses the cut depends on what {', '.join(sorted(masks))} hides")
        return found[1]

    def _prove_form(self, form: Form, stages: Stages) -> tuple[Passage, ...]:
        try:
            reading = Reading(self.weightless, self.stacks, form, self.named, self)
            held, passages = reading.cut(stages)
            if held != stages:
                more = [name for mine, names in zip(stages, held, strict=True) for name in names if name not in mine]
                raise CannotCutError(f"with them more than one stage has to hold {', '.join(more)}")
        except Exception as why:  # a refusal, or whatever the model's own code raises on such inputs
            failed = "" if isinstance(why, CannotCutError) else f"its forward failed: {type(why).__name__}: "
            names = ", ".join((form.first.name, *form.tensors, *form.others))
            raise ValueError(
                f"{type(self.weightless.model).__name__}, cut between the layers of {self.anatomy}, cannot be called "
                f"with {names}{' in training' if form.training else ''}: {failed}{why}"
            ) from why
        self.mixes = self.mixes or reading.mixes
        return passages

    @property
    def ran(self) -> list[int]:
        """The layers that run, in order."""
        return self.units.layers_in(call.unit for call in self.small.calls)

    def flops(self, sizes: Sizes) -> dict[str, int]:
        """By unit, the FLOPs of a forward of so many sequences, tokens and images, each stack with its own lengths."""
        form = replace(self.form, sizes=(sizes,))
        found: dict[str, int] = {}
        for call in _trace(self.weightless, self.units, form, sizes).calls:
            found[call.unit] = found.get(call.unit, 0) + call.flops
        return found

    def elements(self, unit: str, sizes: Sizes) -> int:
        """How many numbers a unit returns as its first tensor; 0 where it does not run."""
        found = next(
            (pair for pair in zip(self.small.calls, self.large.calls, strict=True) if pair[0].unit == unit), None
        )
        if found is None or not found[0].leaves:
            return 0
        one, other = (call.leaves[0] for call in found)
        shape = self._shape(one.value, one.shape, other.shape)
        return math.prod(one.shape if shape is None else shape.at(sizes))

    def cut(self, stages: Stages) -> tuple[Stages, tuple[Passage, ...]]:
        """What every stage does, and the modules that it holds: those given, and whose parameters its code reads too.

        Raises:
            CannotCutError: what stands against it.
        """
        last = len(stages) - 1
        while True:
            needs = needs_of(self.small, self.units, partial(holders_of, stages), last)
            more = needs.weights
            if not more:
                try:
                    return stages, tuple(self._passage(stages, needs, stage) for stage in range(last + 1))
                except _HoldMoreError as asked:
                    more = {(asked.stage, asked.unit)}
            stages = tuple(
                (*names, *sorted(unit for at, unit in more if at == stage)) for stage, names in enumerate(stages)
            )

    def _passage(self, stages: Stages, needs: Needs, stage: int) -> Passage:
        """The proved passage of one stage, with as few tokens as can be after its last layer."""
        passage = self._unproved(stages, needs, stage)
        withheld = frozenset(self.form.tensors) & frozenset(ENCODER_INPUTS)
        if stage and withheld:
            try:
                return self._shortest(stages, needs, stage, replace(passage, withheld=withheld))
            except CannotCutError:  # later stages depend on them too
                pass
        return self._shortest(stages, needs, stage, passage)

    def _shortest(self, stages: Stages, needs: Needs, stage: int, passage: Passage) -> Passage:
        order = [(c.unit, c.index) for c in self.small.calls]
        sent = [(c.value.unit, c.value.call) for c in passage.sends]
        after = max(place for place, call in enumerate(order) if call in needs.live[stage] or call in sent)
        narrow = frozenset(call for call in passage.returns if order.index(call) > after)
        if stage + 1 < len(stages) and narrow:
            try:
                return self._prove(stages, needs, stage, replace(passage, narrow=narrow))
            except CannotCutError:  # the model's own code wants the whole sequence there: it gets it
                pass
        return self._prove(stages, needs, stage, passage)

    def _unproved(self, stages: Stages, needs: Needs, stage: int) -> Passage:
        enters, leaves = needs.enters[stage], needs.enters[stage + 1]
        returns = {}
        made: dict[tuple[str, int], list[tuple[int, Value]]] = {}
        waiting = [value for value in leaves if value not in enters]
        for call, larger in zip(self.small.calls, self.large.calls, strict=True):
            key = (call.unit, call.index)
            if stage in holders_of(stages, call.unit):
                continue
            returns[key] = self._template(call, larger)
        for value in waiting:
            call = self.small.call(value.unit, value.call)
            tensors = [leaf for leaf in leaves_of(call.returns) if isinstance(leaf, (Leaf, Argument))]
            place = next(i for i, leaf in enumerate(tensors) if isinstance(leaf, Leaf) and leaf.value == value)
            made.setdefault((value.unit, value.call), []).append((place, value))
        receives = tuple(self._crossed(value) for value in enters)
        first = (self.form.first.name, self.form.first.shape, self.form.first.sample.dtype)
        # What a tower's layers hand on is of images: the ids tell how many sequences there are, of how many tokens.
        tells = {self.form.first.name} if stage and not self._tell_sizes(receives) else set()
        if tells and not self.grows_by_images:
            raise CannotCutError("between the layers there is no tensor with one batch and one sequence dim")
        # A unit that is held runs whether its result counts or not.
        held = (call for call in self.small.calls if stage in holders_of(stages, call.unit))
        run_on = {source.name for call in held for source in call.reads if isinstance(source, Input)}
        return Passage(
            receives,
            tuple(self._crossed(value) for value in leaves),
            returns,
            {call: tuple(places) for call, places in made.items()},
            frozenset(),
            first,
            frozenset(needs.inputs[stage] | run_on | tells),
            of_images=self.grows_by_images,
        )

    def _tell_sizes(self, receives: tuple[Crossed, ...]) -> bool:
        """Whether what a stage receives tells the sizes of a microbatch, but for those of the decoder's ids."""
        shapes = [crossed.shape for crossed in receives]
        told = {place for s in shapes for place in s.sizes if s.size_in(place, s.at(self.form.sizes[0])) is not None}
        return {0} | self.form.first.shape.sizes <= told

    def _template(self, call: Call, larger: Call) -> Any:
        shapes = iter([leaf.shape for leaf in larger.leaves])
        layer = self.units.is_layer(call.unit)

        def missing(leaf: Any) -> Any:
            if not isinstance(leaf, Leaf):
                return leaf
            written = leaf.value in self.small.written
            shape = self._shape(leaf.value, leaf.shape, next(shapes))
            return Missing(leaf.value, shape, leaf.shape, leaf.dtype, layer, written)

        return map_leaves(call.returns, missing)

    def _crossed(self, value: Value) -> Crossed:
        small, large = (
            next(leaf for leaf in trace.call(value.unit, value.call).leaves if leaf.value == value)
            for trace in (self.small, self.large)
        )
        if self.small.call(value.unit, value.call).hidden and not small.requires_grad:
            raise CannotCutError(
                f"{value} crosses the cut inside a custom autograd function, which hides it from the backward"
            )
        shape = self._shape(value, small.shape, large.shape)
        if shape is None:
            one, other = self.form.sizes
            raise CannotCutError(
                f"{value} has to travel to later stages, and has shape {small.shape} for {one[0]} sequences of "
                f"{one[1]} tokens and {large.shape} for {other[0]} of {other[1]}: it must be of the batch, the "
                "sequence and fixed sizes"
            )
        if self.odd is not None:
            seen = next((x.shape for x in self.odd.call(value.unit, value.call).leaves if x.value == value), None)
            if seen != shape.at(ODD):
                raise CannotCutError(f"{value} is {shape} for even lengths and {seen} for {ODD[1]} tokens")
        if small.dtype.is_complex:
            raise CannotCutError(f"{value} has to travel to later stages, and is complex: messages are not")
        written = value in self.small.written
        return Crossed(value, shape, small.dtype, small.requires_grad, self.units.is_layer(value.unit), written)

    def _shape(self, value: Value, small: tuple[int, ...], large: tuple[int, ...]) -> Shape | None:
        if len(self.form.sizes) > 1:
            return shape_of(small, large, self.form.sizes)
        known = self.base.shape_seen(value) if self.base is not None else None
        fits = known is not None and max(known.sizes, default=0) < len(self.form.sizes[0])
        return known if fits and known.at(self.form.sizes[0]) == small else Shape(small)

    def shape_seen(self, value: Value) -> Shape | None:
        """The dims of a value that was traced; None where there is no such value."""
        found = [
            leaf.shape
            for trace in (self.small, self.large)
            for call in trace.calls
            if (call.unit, call.index) == (value.unit, value.call)
            for leaf in call.leaves
            if leaf.value == value
        ]
        return shape_of(found[0], found[1], self.form.sizes) if len(self.form.sizes) > 1 and len(found) == 2 else None

    def _prove(self, stages: Stages, needs: Needs, stage: int, passage: Passage) -> Passage:
        """Trace the part of a stage and compare what counts on it with the whole model.

        Returns:
            The passage, less calls that are not made where inputs are withheld, with the units that it runs.
        """
        last = len(stages) - 1
        boundary = Boundary(stage == 0, stage == last, passage)
        fresh = self.weightless.fresh(self.form.training)
        part = copy_without(fresh, self.units, set(stages[stage]), boundary, self.weightless.recorders)
        boundary.install(part)
        absent = {unit for unit, _ in passage.returns}
        tracer = Tracer(part, self.weightless.fake, lambda name: None if (u := self.units.of(name)) in absent else u)
        tracer.narrow = bool(passage.narrow)
        boundary.watch = tracer
        size = self.form.sizes[0]
        given = {n: v for n, v in _inputs(tracer, self.form, size).items() if n not in passage.withheld}
        received = [tracer.given(c.value, c.shape.at(size), c.dtype, c.requires_grad) for c in passage.receives]
        try:
            trace = tracer.run(lambda: part(*received, **given))
        except Exception as error:
            asked = _asked_of(error)
            if asked is not None and not self.units.is_layer(asked) and stage not in holders_of(stages, asked):
                raise _HoldMoreError(stage, asked) from error
            raise CannotCutError(f"its forward fails on stage {stage}: {type(error).__name__}: {error}") from error
        if stage and trace.trained:
            raise CannotCutError(
                f"{trace.trained[0]} asks whether a tensor requires a gradient, which what arrives from another stage "
                "always does"
            )
        whole = {(c.unit, c.index): c.digest for c in self.small.calls}
        mine = {(c.unit, c.index): c.digest for c in trace.calls}
        for call in sorted(needs.live[stage]):
            if mine.get(call) != whole[call]:
                raise CannotCutError(
                    f"{call[0]} would compute on other values on stage {stage} than in the whole model"
                )
        if stage == last and trace.output_keys != self.small.output_keys:
            raise CannotCutError("the last stage would compute its output from other values than the whole model")
        sent = tuple(sent_key(c.value, tracer.unknown(c.shape.at(size), c.dtype)) for c in passage.sends)
        if stage < last and trace.output_keys != sent:
            wrong = next(c for c, mine, key in zip(passage.sends, trace.output_keys, sent, strict=True) if mine != key)
            raise CannotCutError(f"stage {stage} would send something else than {wrong.value}")
        called = {call: returned for call, returned in passage.returns.items() if boundary.called[call[0]] > call[1]}
        runs = tuple(dict.fromkeys(call.unit for call in trace.calls if stage in holders_of(stages, call.unit)))
        return replace(passage, returns=called, runs=runs)

    def _refuse_other_paths(self) -> None:
        """Where code between units looks at numbers of inputs, other numbers must run the same units on the same."""
        place = next((look.place for look in self.small.looks if any(isinstance(s, Input) for s in look.sources)), None)
        first, tensors = self.form.first, self.form.tensors
        given = [first, *(tensors[name] for name in (DECODER_IDS,) if name in tensors)]
        ids = [each for each in given if not each.sample.is_floating_point()]
        if place is None or not ids:
            return
        traces = []
        for change in (torch.zeros_like, lambda ids: ids * 5 % 11, lambda ids: ids + 1):
            changed = {each.name: replace(each, sample=change(each.sample)) for each in ids}
            of_decoder = {name: each for name, each in changed.items() if name in tensors}
            form = replace(self.form, first=changed.get(first.name, first), tensors={**tensors, **of_decoder})
            with contextlib.suppress(Exception):  # what does not run at all needs no cut
                traces.append(_trace(self.weightless, self.units, form, form.sizes[0]))
        for trace in traces:
            for one, two in zip_longest(self.small.calls, trace.calls):
                if one is None or two is None or (one.unit, one.reads) != (two.unit, two.reads):
                    unit = (one or two).unit if one is None or two is None else one.unit
                    raise CannotCutError(f"{place} decides by the numbers in its inputs whether or on what {unit} runs")

    def _refuse_lists_of_no_stack(self) -> None:
        """Modules in a list need not run one after the other, as mergers of what a tower's layers return."""
        for stack in self.stacks:
            layers = [call for call in self.small.calls if call.unit.rpartition(".")[0] == stack]
            for one, other in itertools.pairwise(layers):
                if self._first_reader(one) != self.units.layers_in([other.unit])[0]:
                    raise CannotCutError(f"{other.unit} does not go on with what {one.unit} returns: they are no stack")

    def _first_reader(self, call: Call) -> int:
        """The first layer that depends on what a call returned; -1 without one."""
        followed = {(call.unit, call.index)}
        for later in self.small.calls:
            if _made_by(later) & followed:
                if self.units.is_layer(later.unit):
                    return self.units.layers_in([later.unit])[0]
                followed.add((later.unit, later.index))
        return -1

    def _anatomy(self) -> Anatomy:
        """Which modules beside the stacks run before, after and between their layers.

        What text does not run is before them: an image encoder and its projector, wherever they are registered. What
        runs before a tower and is read after it, an embedding, stays with the layer that reads it.
        """
        depths = [len(self.weightless.model.get_submodule(stack)) for stack in self.stacks]
        ends = set(itertools.accumulate(depths))
        sides: dict[str, set[str | int]] = {}
        reads_layers: set[tuple[str, int]] = set()  # calls that depend on what layers made
        ran, passed = self.ran, 0
        for call in self.small.calls:
            made = _made_by(call)
            is_layer = self.units.is_layer(call.unit)
            if is_layer or made & reads_layers:
                reads_layers.add((call.unit, call.index))
            if is_layer:
                passed += len(self.units.layers_in([call.unit]))
                continue
            side: str | int = "before" if not passed else "after" if passed == len(ran) else "between"
            if side == "between" and ran[passed] in ends and ran[passed - 1] < ran[passed]:
                side = ran[passed - 1] if made & reads_layers else ran[passed]
            if side == "between" and len(self.stacks) > 1 and [c.unit for c in self.small.calls].count(call.unit) == 1:
                side = ran[passed - 1]
            if side == "before" and (reader := self._first_reader(call)) >= depths[0]:
                side = reader
            sides.setdefault(call.unit, set()).add(side)
        found: dict[str | int, list[str]] = {"before": [], "between": [], "after": []}
        for name, _ in modules_beside(self.weightless.model, self.stacks):
            if name in self.stacks:
                continue
            units = [unit for unit in self.units.names if unit == name or unit.startswith(f"{name}.")]
            of = {unit: sides.get(unit, {"before"}) for unit in units}
            if of and all(where == next(iter(of.values())) for where in of.values()):
                of = {name: next(iter(of.values()))}
            for unit, where in of.items():
                for side in where:
                    found.setdefault(side, []).append(unit)
        joints = tuple((unit, side) for side, units in found.items() if isinstance(side, int) for unit in units)
        before, after, between = (tuple(found[side]) for side in ("before", "after", "between"))
        return Anatomy(self.stacks, tuple(depths), before, after, between, joints)


def _made_by(call: Call) -> set[tuple[str, int]]:
    """The calls of units whose values this one reads."""
    return {(s.unit, s.call) for s in call.reads if isinstance(s, (Value, Inner))}


def inputs_read(weightless: Weightless, units: Units, form: Form) -> set[str]:
    """The names of the inputs that a model reads of a form."""
    trace = _trace(weightless, units, form, form.sizes[0])
    read = {source for call in trace.calls for source in call.reads} | trace.output
    read |= {source for look in trace.looks for source in look.sources}
    return {source.name for source in read if isinstance(source, Input)}


def _trace(weightless: Weightless, units: Units, form: Form, size: Sizes, twice: bool = False) -> Trace:
    """Run the whole model on inputs of a form, for so many sequences and tokens."""
    model = weightless.fresh(form.training)
    tracer = Tracer(model, weightless.fake, units.of)
    settings = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    given = settings | _inputs(tracer, form, size)
    first = given.pop(form.first.name)
    try:
        return tracer.run(lambda: select_output(model(first, **given)), twice=twice)
    finally:
        weightless.note_recorders(model)


def _inputs(tracer: Tracer, form: Form, size: Sizes) -> dict[str, Any]:
    tensors = {form.first.name: form.first, **form.tensors}
    return {name: tracer.input(name, given.at(size)) for name, given in tensors.items()} | dict(form.others)


class _HoldMoreError(Exception):
    """A stage has to hold a unit whose results do not count there, because code asks it for more than a call."""

    def __init__(self, stage: int, unit: str) -> None:
        super().__init__(unit)
        self.stage, self.unit = stage, unit


def _asked_of(error: BaseException | None) -> str | None:
    while error is not None and not isinstance(error, NotHeldError):
        error = error.__cause__ or error.__context__
    return None if error is None else error.unit


def holders_of(stages: Stages, unit: str) -> set[int]:
    """The stages that hold a unit: whole, as part of a module that they name."""
    return {s for s, names in enumerate(stages) if any(unit == n or unit.startswith(f"{n}.") for n in names)}


def _of_images(inputs: Mapping[str, Any]) -> tuple:
    """What one proof holds for, where what a tower makes crosses a cut.

    All sizes of its input but the first (that, too, where there are two of them); and what `image_sizes` says, as tiles
    of an image that are padding are left out.
    """
    tensors = {n: v.tensor if isinstance(v, Piece) else v for n, v in sorted(inputs.items())}
    towers = [v.shape for n, v in tensors.items() if n in ENCODER_INPUTS and isinstance(v, torch.Tensor)]
    numbers = [
        v.flatten().tolist() if isinstance(v, torch.Tensor) else v for n, v in tensors.items() if n.endswith("sizes")
    ]
    return tuple(tuple(s if len(towers) > 1 else s[1:]) for s in towers), repr(numbers)


def _pattern(inputs: Mapping[str, Any], sizes: Sizes, pieces: int) -> tuple:
    """What two calls have in common that one proof covers: names, dtypes, and which sizes are those of the batch."""
    batch, *lengths = sizes

    def of(value: Any, rows: int = batch) -> Any:
        if isinstance(value, Piece):
            return "piece", of(value.tensor, batch // pieces)
        if not isinstance(value, torch.Tensor):
            return "float" if isinstance(value, float) else repr(value)
        sizes = tuple((size == rows, *(size == n for n in lengths), size == 1) for size in value.shape)
        return str(value.dtype), sizes, tuple(padding_images(value))

    return tuple((name, of(value)) for name, value in sorted(inputs.items()))
