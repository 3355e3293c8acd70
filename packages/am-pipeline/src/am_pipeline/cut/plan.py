"""Cut a model into parts that share its parameters: the plan as plain data, then the parts."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from am_pipeline._torch_compat import compute_dtype
from am_pipeline.cut.anatomy import Anatomy, candidate_stacks, layer_lists
from am_pipeline.cut.boundary import Boundary, Passage
from am_pipeline.cut.crossing import CannotCutError, Crossed, Sizes
from am_pipeline.cut.forms import Form, example_forms, features_form, text_form
from am_pipeline.cut.reading import Reading, Stages, holders_of, inputs_read
from am_pipeline.cut.skeleton import copy_without
from am_pipeline.cut.units import Units
from am_pipeline.cut.weightless import Weightless, refuse_training, refuse_uncopied
from am_pipeline.placement import MULTIMODAL_ENCODERS, split_layers
from am_pipeline.schedule.balance import Costs, balanced, costs_of
from am_pipeline.step.inputs import DECODER_IDS, ENCODER_INPUTS, decoder_length

# Of so many lists of layers, the heaviest, two may be the encoder's and the decoder's.
_HEAVIEST = 4


@dataclass(frozen=True)
class SharedParameter:
    """One parameter that several stages need, for example tied embeddings: `((0, "embed.weight"), (3, "head.weight"))`.

    Each stage has its own copy; the copies' gradients are summed after every step.
    """

    copies: tuple[tuple[int, str], ...]

    def __str__(self) -> str:
        return " = ".join(f"{name} (stage {stage})" for stage, name in self.copies)


@dataclass(frozen=True)
class CutPlan:
    """Which stage holds which modules, proved on the model; printing it gives a table.

    Attributes:
        anatomy: where the model's parts sit.
        stages: full names of the modules that each stage holds.
        shared: parameters that more than one stage holds.
        passages: what each stage receives, sends and leaves out.
        reading: what the plan was made from.
        dtype: of most of the layers' parameters when the model was cut.
    """

    anatomy: Anatomy
    stages: tuple[tuple[str, ...], ...]
    shared: tuple[SharedParameter, ...]
    passages: tuple[Passage, ...]
    reading: Reading
    dtype: torch.dtype

    def __deepcopy__(self, memo: dict) -> CutPlan:
        return self

    def layers_of(self, stage: int) -> range:
        """The layers that a stage holds, numbered through all stacks: a decoder's after its encoder's."""
        held = [index for index, layer in enumerate(self.anatomy.layers) if layer in self.stages[stage]]
        return range(held[0], held[-1] + 1)

    @property
    def traveling(self) -> tuple[Crossed, ...]:
        """What is sent beside the hidden state of the last layer before a cut, each once."""
        beside: dict[Crossed, None] = {}
        for stage, passage in enumerate(self.passages):
            layer = self.anatomy.layer(self.layers_of(stage)[-1])
            beside |= {c: None for c in passage.sends if c.value.unit != layer or c.value.leaf}
        return tuple(beside)

    @property
    def stay(self) -> frozenset[str]:
        """Names of images and sound that only the first stage reads; others have what it computed of them."""
        read = (passage.needs - passage.withheld for passage in self.passages[1:])
        return frozenset(ENCODER_INPUTS).difference(*read)

    @property
    def needs_first_input(self) -> bool:
        """Whether stages after the first depend on the ids themselves."""
        return any(self.reading.form.first.name in passage.needs for passage in self.passages[1:])

    def modules_of(self, stage: int) -> str:
        """What a stage holds, in a few words: `model.layers.0-3  model.embed_tokens`."""
        layers, start, held = self.layers_of(stage), 0, []
        for stack, depth in zip(self.anatomy.stacks, self.anatomy.depths, strict=True):
            first, last = max(layers.start - start, 0), min(layers.stop - start, depth) - 1
            held += [f"{stack}.{first}-{last}"] if first <= last else []
            start += depth
        others = ", ".join(n for n in self.stages[stage] if n not in self.anatomy.layers)
        return f"{' '.join(held)}  {others}".rstrip()

    def parameters_of(self, model: nn.Module, stage: int) -> list[str]:
        """The names of the parameters that a stage holds, each once."""
        copies = {name: [s for s, _ in group.copies] for group in self.shared for _, name in group.copies}
        names = [name for name, _ in model.named_parameters()]
        return [n for n in names if stage in copies.get(n, _holders(self.reading.units, self.stages, n))]

    def __str__(self) -> str:
        rows = [f"stage {index}  {self.modules_of(index)}" for index in range(len(self.stages))]
        return "\n".join([*rows, *(f"shared  {group}" for group in self.shared)])


def plan_cut(
    model: nn.Module,
    num_stages: int | None = None,
    module_names_per_stage: list[list[str]] | None = None,
    balance: str | Costs = "flops",
    example_inputs: Mapping[str, Any] | None = None,
) -> CutPlan:
    """Decide which stage holds what, and prove that the parts compute what the model does.

    The model's own forward is run on a few tokens without numbers, and every value is followed to where it is read:
    what a stage reads comes from what it is sent, from its inputs or from modules that it holds. What else layers,
    norm or head take (an embedding once more, the mean of all layers, a second tensor of the layer before) travels
    along. Then every part is run in the same way, and must repeat the whole model's operators on the same values. Runs
    no collective, needs no memory and leaves the model as it is.

    Args:
        model: a model whose forward takes ids of shape `(B, S)` and runs one stack of layers, or ids of an encoder and
            `decoder_input_ids` of a decoder and runs two, one after the other; or a tower on images and then a decoder,
            both cut where `example_inputs` have images. May be on meta.
        num_stages: how many stages of about equal cost; not needed with `module_names_per_stage`.
        module_names_per_stage: full module names for each stage, by hand.
        balance: what to balance the stages by, see `costs_of`; or the costs themselves.
        example_inputs: what the model is called with, by name, where ids alone do not run all of it: as a processor
            gives it, ids and images for example. Only forms, lengths and flags count, and for stages of equal FLOPs
            or time how long it takes; without it, the model is called with ids (and ids of its decoder), or with
            features of the width that its first layer takes, and a tower stays whole on the first stage.

    Raises:
        ValueError: no stack of layers, a name that does not exist, a parameter that no stage or a layer that more
            than one stage would hold, layers out of order, a stage without a layer, or a model that cannot be
            cut between its layers: which value, where it is made and where it is read.
    """
    if module_names_per_stage is None and num_stages is None:
        raise ValueError("plan_cut needs num_stages or module_names_per_stage")
    return plan_stages(model, lambda _layers: num_stages or 0, module_names_per_stage, balance, example_inputs)


def plan_stages(
    model: nn.Module,
    count: Callable[[int], int],
    module_names_per_stage: list[list[str]] | None = None,
    balance: str | Costs = "flops",
    example_inputs: Mapping[str, Any] | None = None,
    lengths: Sequence[float] = (),
) -> CutPlan:
    """`plan_cut` where the number of stages depends on how many layers the model turns out to have.

    `lengths` are the tokens of an encoder and a decoder, for stages of equal FLOPs; an example tells them, too.
    """
    if model.training:
        refuse_training(model)
    refuse_uncopied(model)
    by_hand = None
    if module_names_per_stage is not None:
        by_hand = tuple(tuple(n for n in names if _exists(model, n)) for names in module_names_per_stage)
    candidates = _candidates(model, by_hand, example_inputs)

    def size(stacks: tuple[str, ...]) -> int:
        return sum(p.numel() for stack in stacks for p in model.get_submodule(stack).parameters())

    weightless = Weightless(model)
    plans: list[CutPlan] = []
    reasons: list[CannotCutError] = []
    for stacks in candidates:
        found = plans[0].anatomy.stacks if plans else ()
        if len(stacks) < len(found) or size(stacks) < size(found):
            break
        try:
            plans.append(_plan_with(model, weightless, stacks, by_hand, count, balance, example_inputs, lengths))
        except CannotCutError as why:
            reasons.append(why)
        except ValueError as why:  # of so few layers there are no such stages; why the likelier stacks fail says more
            if not reasons:
                raise
            reasons.append(CannotCutError(str(why)))
    if not plans:
        where = f"{type(model).__name__} cannot be cut between the layers of {' and '.join(candidates[0])}"
        raise ValueError(f"{where}: {reasons[0]}") from reasons[0].__cause__
    if len(plans) > 1:
        raise ValueError(
            f"{type(model).__name__} has several stacks of the same size, {[str(plan.anatomy) for plan in plans]}; "
            "name the modules of each stage yourself with module_names_per_stage"
        )
    return plans[0]


def _candidates(model: nn.Module, by_hand: Stages | None, example: Iterable[str] | None) -> list[tuple[str, ...]]:
    """The stacks that may be cut, together or alone, the likeliest first.

    Two where a decoder takes ids of its own, or where the user shows images or sound beside the ids.
    """
    if by_hand:
        named = [name for names in by_hand for name in names]
        lists = [stack for stack in candidate_stacks(model) if f"{stack}.0" in named]
        if lists and all(any(name.startswith(f"{lists[0]}.") for name in names) for names in by_hand):
            return [(lists[0],)]
        several = [stack for stack in layer_lists(model) if f"{stack}.0" in named]
        if len(several) > 1:  # no stack by itself has a layer on every stage
            return [tuple(sorted(several, key=lambda stack: named.index(f"{stack}.0")))]
        if lists:
            return [(lists[0],)]
    alone: list[tuple[str, ...]] = [(stack,) for stack in candidate_stacks(model)]
    _, *further = inspect.signature(model.forward).parameters
    if DECODER_IDS not in further and not set(example or ()) & set(further) & set(ENCODER_INPUTS):
        return alone
    heaviest = layer_lists(model)[:_HEAVIEST]
    return [*sorted(itertools.combinations(heaviest, 2), key=lambda pair: sum(map(heaviest.index, pair))), *alone]


def _plan_with(
    model: nn.Module,
    weightless: Weightless,
    stacks: tuple[str, ...],
    by_hand: Stages | None,
    count: Callable[[int], int],
    balance: str | Costs,
    example_inputs: Mapping[str, Any] | None,
    lengths: Sequence[float],
) -> CutPlan:
    """The plan for the first form of input that the model runs on and can be cut with."""
    first: list[CannotCutError] = []
    named = [name for names in by_hand or () for name in names]
    for reading in _readings(weightless, stacks, named, example_inputs):
        try:
            return _plan_from(model, reading, by_hand, count, balance, example_inputs, lengths)
        except CannotCutError as why:
            first.append(why)
    raise first[0]


def _plan_from(
    model: nn.Module,
    reading: Reading,
    by_hand: Stages | None,
    count: Callable[[int], int],
    balance: str | Costs,
    example_inputs: Mapping[str, Any] | None,
    lengths: Sequence[float],
) -> CutPlan:
    if by_hand is None:
        stages = _balanced_stages(model, reading, count(reading.anatomy.num_layers), balance, example_inputs, lengths)
    else:
        _check_stages(model, reading, by_hand)
        stages = _with_dropouts(model, reading, by_hand)
    _check_runs(reading, stages)
    stages, passages = reading.cut(stages)
    reading.remember(passages)
    shared = _find_shared(model, reading.units, stages)
    return CutPlan(reading.anatomy, stages, shared, passages, reading, compute_dtype(model, reading.anatomy.stacks))


def _readings(
    weightless: Weightless, stacks: tuple[str, ...], named: list[str], example_inputs: Mapping[str, Any] | None
) -> Iterator[Reading]:
    """A model read as called with the user's example, or with ids, or with features of a width that it takes.

    Raises:
        CannotCutError: there is none, or no stage can be cut of what it runs.
    """
    units = Units(weightless.model, stacks)
    first: Exception | None = None
    found = False
    for form in _forms(weightless, units, example_inputs):
        try:
            reading = Reading(weightless, stacks, form, named)
        except CannotCutError as why:
            if example_inputs is None:
                raise
            first = first or why
            continue
        except Exception as error:  # whatever the model's own code raises is the reason it cannot be read
            first = first or error
            continue
        yield reading
        found = True
        if example_inputs is None:
            return
    if not found and isinstance(first, CannotCutError):
        raise first
    if not found:
        _refuse_packed(weightless.model, first)
        raise CannotCutError(f"its forward failed on a few tokens: {type(first).__name__}: {first}") from first


def _refuse_packed(model: nn.Module, first: Exception | None) -> None:
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and tuple(module.weight.shape) != (module.out_features, module.in_features):
            raise CannotCutError(
                f"{name}.weight is packed (quantised), which cannot be read without its numbers; FSDP2 can shard such "
                "a model (am-fsdp)"
            ) from first


def _forms(weightless: Weightless, units: Units, example_inputs: Mapping[str, Any] | None) -> Iterator[Form]:
    name, model = weightless.first_input, weightless.model
    if example_inputs is not None:
        runs = partial(inputs_read, weightless, units)
        for form in example_forms(name, example_inputs, runs, training=model.training):
            yield form.with_more_images
        return
    if DECODER_IDS in inspect.signature(model.forward).parameters:
        yield text_form(name, model.training, decoder_ids=True)
    yield text_form(name, model.training)
    beside = (m for n, m in model.named_modules() if isinstance(m, nn.Linear) and not units.is_layer(n))
    for width, dtype in dict.fromkeys((m.in_features, m.weight.dtype) for m in beside):
        yield features_form(name, width, dtype, model.training)


def build_part(
    model: nn.Module,
    plan: CutPlan,
    stage: int,
    *,
    patch_inner_model: bool = True,
    patch_causal_lm_model: bool = True,
) -> tuple[nn.Module, Boundary]:
    """The model as one stage sees it: same class, same names, the stage's own parameters and nothing else's.

    Held parameters and buffers are the model's own tensors, not copies; the rest is never touched.

    Args:
        model: the whole model.
        plan: from `plan_cut` on this model.
        stage: which stage.
        patch_inner_model: let the hidden state enter and leave through the absent layers. False leaves them
            passing their input on, for a decoder whose forward has been written for stages by hand.
        patch_causal_lm_model: take a hidden state instead of ids on later stages and return a plain tensor. False
            leaves the call of the whole part as it is.
    """
    boundary = Boundary(stage == 0, stage == len(plan.stages) - 1, plan.passages[stage])
    boundary.passes_on = not patch_inner_model
    boundary.prove = partial(_passage_for_call, plan, stage)
    recorders = plan.reading.weightless.recorders
    part = copy_without(model, plan.reading.units, set(plan.stages[stage]), boundary, recorders)
    for name in plan.reading.small.kept if stage else ():  # each stage advances its own
        owner, _, leaf = name.rpartition(".")
        module = part.get_submodule(owner)
        if leaf in module._buffers:
            setattr(module, leaf, module._buffers[leaf].clone())
    if patch_causal_lm_model:
        boundary.install(part)
    if hasattr(part, "generate"):
        part.generate = partial(_refuse_to_generate, type(model).__name__)
    return part, boundary


def _refuse_to_generate(name: str, *_args: Any, **_kwargs: Any) -> None:
    raise RuntimeError(
        f"a part of {name} cannot generate: the other layers are on other ranks. Write the parts as a folder "
        "(am_fsdp.save_hf_weights(parts, folder, pipeline_parts=True)) and generate from it; schedule.eval gives logits"
    )


def _passage_for_call(
    plan: CutPlan,
    stage: int,
    first: torch.Tensor | None,
    inputs: dict[str, Any],
    sizes: Sizes,
    training: bool,
) -> Passage:
    return plan.reading.passages_for(plan.stages, first, inputs, *sizes[:2], training=training)[1][stage]


def _balanced_stages(
    model: nn.Module,
    reading: Reading,
    num_stages: int,
    balance: str | Costs,
    example_inputs: Mapping[str, Any] | None,
    lengths: Sequence[float],
) -> Stages:
    anatomy = reading.anatomy
    if balance == "layers":  # the same number of layers; the first stages take what remains
        return _around(anatomy, split_layers(anatomy.num_layers, num_stages))
    if isinstance(balance, str):
        flops = flops_of_example(reading, example_inputs) if balance == "flops" else None
        balance = costs_of(model, anatomy, balance, lengths[: len(anatomy.stacks)], flops, example_inputs)
    return _around(anatomy, balanced(balance, num_stages))


def flops_of_example(reading: Reading, example_inputs: Mapping[str, Any] | None) -> dict[str, int] | None:
    """By unit, the FLOPs of a forward of the user's example; None without one."""
    if example_inputs is None:
        return None
    if reading.grows_by_images:
        return reading.flops(reading.form.sizes[0])
    rows, length = example_inputs[reading.form.first.name].shape[:2]
    return reading.flops((rows, length, *decoder_length(example_inputs)))


def _around(anatomy: Anatomy, ranges: Iterable[Iterable[int]]) -> Stages:
    """Stages with these layers, and the modules that run beside them."""
    stages = [
        [*(anatomy.layer(i) for i in layers), *anatomy.between, *(n for n, at in anatomy.joints if at in layers)]
        for layers in ranges
    ]
    stages[0] = [*anatomy.before, *stages[0]]
    stages[-1] = [*stages[-1], *(name for name in anatomy.after if name not in stages[-1])]
    return tuple(tuple(dict.fromkeys(names)) for names in stages)


def _exists(model: nn.Module, name: str) -> bool:
    try:
        model.get_submodule(name)
    except AttributeError:
        leaf = name.rsplit(".", 1)[-1]
        if leaf == "rotary_emb" or leaf in MULTIMODAL_ENCODERS:
            return False  # the usual names are listed whether a model has them or not
        raise ValueError(f"module_names_per_stage names {name!r}, which {type(model).__name__} does not have") from None
    return True


def _check_stages(model: nn.Module, reading: Reading, stages: Stages) -> None:
    anatomy = reading.anatomy
    expected = [anatomy.layer(i) for i in range(anatomy.num_layers)]
    named = [name for names in stages for name in sorted(set(names) & set(expected), key=expected.index)]
    if named != expected:
        missing = [n for n in expected if n not in named]
        twice = sorted({n for n in named if named.count(n) > 1})
        raise ValueError(
            f"module_names_per_stage must name every layer of {anatomy} once, in order; "
            f"missing: {missing}, named twice: {twice}, order given: {named}"
        )
    for index, names in enumerate(stages):
        if not set(names) & set(expected):
            raise ValueError(f"stage {index} of module_names_per_stage holds no layer of {anatomy}; it needs one")
    names_of: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names_of.setdefault(parameter, []).append(name)
    orphans = [tied[0] for tied in names_of.values() if not any(_holders(reading.units, stages, name) for name in tied)]
    if orphans:
        raise ValueError(f"no stage of module_names_per_stage holds {orphans[:5]} ({len(orphans)} in all)")


def _with_dropouts(model: nn.Module, reading: Reading, stages: Stages) -> Stages:
    """Units without parameters, which nobody names, are where the layers beside them are."""
    automatic = _around(reading.anatomy, [[i for i, n in enumerate(reading.anatomy.layers) if n in s] for s in stages])
    nameless = [unit for unit in reading.units.names if next(model.get_submodule(unit).parameters(), None) is None]
    left = [unit for unit in nameless if not holders_of(stages, unit)]
    return tuple(
        (*mine, *(u for u in left if any(u == name or u.startswith(f"{name}.") for name in names)))
        for mine, names in zip(stages, automatic, strict=True)
    )


def _check_runs(reading: Reading, stages: Stages) -> None:
    """On text alone a model may leave layers out; every stage needs one that runs."""
    ran = [reading.anatomy.layer(index) for index in reading.ran]
    for stage, names in enumerate(stages):
        if not any(layer in names for layer in ran):
            raise CannotCutError(
                f"on text alone its forward runs only the layers {sorted(set(reading.ran))}, none of them on "
                f"stage {stage}"
            )


def _holders(units: Units, stages: Stages, parameter: str) -> set[int]:
    """The stages that hold a parameter: those of its unit; all of them where it belongs to the code between units."""
    unit = units.of(parameter.rpartition(".")[0])
    return set(range(len(stages))) if unit is None else holders_of(stages, unit)


def _find_shared(model: nn.Module, units: Units, stages: Stages) -> tuple[SharedParameter, ...]:
    copies: dict[int, dict[int, str]] = {}
    memory: dict[tuple, tuple[str, nn.Parameter, set[int]]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        held = copies.setdefault(id(parameter), {})
        holders = _holders(units, stages, name)
        for stage in holders:
            held.setdefault(stage, name)
        if parameter.is_meta or not parameter.numel() or isinstance(parameter, DTensor):
            continue
        place = (parameter.device, parameter.data_ptr())
        other, first, where = memory.setdefault(place, (name, parameter, holders))
        if first is not parameter and first.numel() == parameter.numel() and where != holders:
            raise CannotCutError(
                f"{other} and {name} are two parameters over one memory, on different stages; tie them as one parameter"
            )
    return tuple(SharedParameter(tuple(sorted(held.items()))) for held in copies.values() if len(held) > 1)
