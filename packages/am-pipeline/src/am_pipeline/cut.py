"""Cut a model into parts that share its parameters: the plan as plain data, then the parts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from am_pipeline.anatomy import Anatomy, candidate_stacks
from am_pipeline.balance import Costs, balanced, costs_of
from am_pipeline.boundary import Boundary
from am_pipeline.placement import MULTIMODAL_ENCODERS, split_layers
from am_pipeline.rehearsal import Residual, rehearse
from am_pipeline.skeleton import copy_without


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
    """Which stage holds which modules, checked against the model; printing it gives a table."""

    anatomy: Anatomy
    residual: Residual
    stages: tuple[tuple[str, ...], ...]
    shared: tuple[SharedParameter, ...]

    def layers_of(self, stage: int) -> range:
        """The decoder layers that a stage holds."""
        prefix = f"{self.anatomy.stack}."
        held = sorted(int(n[len(prefix) :]) for n in self.stages[stage] if n.startswith(prefix))
        return range(held[0], held[-1] + 1)

    def crossings(self, stage: int) -> tuple[int | None, int | None]:
        """The absent layers through which the hidden state enters and leaves a stage, of those that run."""
        held = self.layers_of(stage)
        earlier = [index for index in self.residual.ran if index < held.start]
        later = [index for index in self.residual.ran if index >= held.stop]
        receiver = earlier[-1] if stage > 0 and earlier else None
        return receiver, later[0] if stage < len(self.stages) - 1 and later else None

    def modules_of(self, stage: int) -> str:
        """What a stage holds, in a few words: `model.layers.0-3  model.embed_tokens`."""
        layers = self.layers_of(stage)
        others = ", ".join(n for n in self.stages[stage] if not n.startswith(f"{self.anatomy.stack}."))
        return f"{self.anatomy.stack}.{layers.start}-{layers.stop - 1}  {others}".rstrip()

    def parameters_of(self, model: nn.Module, stage: int) -> list[str]:
        """The names of the parameters that a stage holds, each once."""
        return [name for name, _ in model.named_parameters() if _holds_any(self, stage, name)]

    def __str__(self) -> str:
        rows = [f"stage {index}  {self.modules_of(index)}" for index in range(len(self.stages))]
        return "\n".join([*rows, *(f"shared  {group}" for group in self.shared)])


def plan_cut(
    model: nn.Module,
    num_stages: int | None = None,
    module_names_per_stage: list[list[str]] | None = None,
    balance: str | Costs = "flops",
) -> CutPlan:
    """Decide and check which stage holds what. Runs no collective and leaves the model as it is.

    Besides reading the structure, the plan runs the model's own forward on a few tokens with every module that has
    parameters replaced by a stand-in, which tells how the hidden state travels and whether it can be cut.

    Args:
        model: a model whose forward takes ids of shape `(B, S)` and runs one stack of layers; may be on meta.
        num_stages: how many stages of about equal cost; not needed with `module_names_per_stage`.
        module_names_per_stage: full module names for each stage, by hand.
        balance: what to balance the stages by, see `costs_of`; or the costs themselves.

    Raises:
        ValueError: no stack of layers, a name that does not exist, a parameter that no stage or a layer that more
            than one stage would hold, layers out of order, a stage without a layer, or a model that cannot be
            cut between its layers, and why.
    """
    if module_names_per_stage is None:
        if num_stages is None:
            raise ValueError("plan_cut needs num_stages or module_names_per_stage")
        anatomy, residual = rehearse(model)
        stages = _balanced_stages(model, anatomy, num_stages, balance)
    else:
        stages = tuple(tuple(n for n in names if _exists(model, n)) for names in module_names_per_stage)
        anatomy, residual = rehearse(model, _stack_in(model, stages))
        _check_stages(model, anatomy, stages)
    plan = CutPlan(anatomy, residual, stages, _find_shared(model, stages))
    _check_crossings(model, plan)
    return plan


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
    last = len(plan.stages) - 1
    residual = plan.residual
    boundary = Boundary(
        stage == 0,
        stage == last,
        residual.hidden.batch_dim,
        residual.hidden.sequence_dim,
        residual.returned,
        tuple(name for name, _ in residual.traveling),
        residual.needs_ids,
        residual.narrow,
    )
    part = copy_without(model, plan.anatomy.stack, set(plan.stages[stage]), boundary)
    if patch_inner_model:
        stack: Any = part.get_submodule(plan.anatomy.stack)
        receiver, sender = plan.crossings(stage)
        if receiver is not None:
            stack[receiver].receives = True
        if sender is not None:
            stack[sender].sends = True
    if patch_causal_lm_model:
        boundary.install(part)
    return part, boundary


def _balanced_stages(
    model: nn.Module, anatomy: Anatomy, num_stages: int, balance: str | Costs
) -> tuple[tuple[str, ...], ...]:
    if balance == "layers":  # the same number of layers; the first stages take what remains
        ranges = split_layers(anatomy.num_layers, num_stages)
    else:
        ranges = balanced(costs_of(model, anatomy, balance) if isinstance(balance, str) else balance, num_stages)
    stages = [[anatomy.layer(i) for i in layers] for layers in ranges]
    stages[0] = [*anatomy.before, *stages[0]]
    stages[-1] = [*stages[-1], *anatomy.after]
    return tuple(tuple(names) for names in stages)


def _exists(model: nn.Module, name: str) -> bool:
    try:
        model.get_submodule(name)
    except AttributeError:
        leaf = name.rsplit(".", 1)[-1]
        if leaf == "rotary_emb" or leaf in MULTIMODAL_ENCODERS:
            return False  # the usual names are listed whether a model has them or not
        raise ValueError(f"module_names_per_stage names {name!r}, which {type(model).__name__} does not have") from None
    return True


def _check_stages(model: nn.Module, anatomy: Anatomy, stages: tuple[tuple[str, ...], ...]) -> None:
    expected = [anatomy.layer(i) for i in range(anatomy.num_layers)]
    named = [name for names in stages for name in sorted(set(names) & set(expected), key=expected.index)]
    if named != expected:
        missing = [n for n in expected if n not in named]
        twice = sorted({n for n in named if named.count(n) > 1})
        raise ValueError(
            f"module_names_per_stage must name every layer of {anatomy.stack} once, in order; "
            f"missing: {missing}, named twice: {twice}, order given: {named}"
        )
    for index, names in enumerate(stages):
        if not set(names) & set(expected):
            raise ValueError(f"stage {index} of module_names_per_stage holds no layer of {anatomy.stack}; it needs one")
    orphans = [
        name
        for name, _ in model.named_parameters(remove_duplicate=False)
        if not any(_holds(names, name) for names in stages)
    ]
    if orphans:
        raise ValueError(f"no stage of module_names_per_stage holds {orphans[:5]} ({len(orphans)} in all)")


def _stack_in(model: nn.Module, stages: tuple[tuple[str, ...], ...]) -> str | None:
    """The stack whose first layer the stages name, where a model has more than one that it could be."""
    named = {name for names in stages for name in names}
    return next((stack for stack in candidate_stacks(model) if f"{stack}.0" in named), None)


def _check_crossings(model: nn.Module, plan: CutPlan) -> None:
    for stage in range(len(plan.stages)):
        receiver, sender = plan.crossings(stage)
        if (stage > 0 and receiver is None) or (stage < len(plan.stages) - 1 and sender is None):
            raise ValueError(
                f"{type(model).__name__} cannot be cut here: on text alone its forward runs only the layers "
                f"{list(plan.residual.ran)} of {plan.anatomy.stack}, none of them before or after stage {stage}"
            )


def _holds(names: tuple[str, ...], parameter: str) -> bool:
    """Whether a stage with these modules holds a parameter; one that sits on an ancestor of them is held by all."""
    owner = parameter.rpartition(".")[0]
    return owner == "" or any(owner == n or owner.startswith(f"{n}.") or n.startswith(f"{owner}.") for n in names)


def _holds_any(plan: CutPlan, stage: int, name: str) -> bool:
    """Whether a stage holds a parameter under this name or another one that it is tied to."""
    if _holds(plan.stages[stage], name):
        return True
    tied = next((g for g in plan.shared if any(n == name for _, n in g.copies)), None)
    return tied is not None and any(s == stage for s, _ in tied.copies)


def _find_shared(model: nn.Module, stages: tuple[tuple[str, ...], ...]) -> tuple[SharedParameter, ...]:
    copies: dict[int, list[tuple[int, str]]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        for stage, names in enumerate(stages):
            held = copies.setdefault(id(parameter), [])
            if _holds(names, name) and stage not in [s for s, _ in held]:
                held.append((stage, name))
    return tuple(SharedParameter(tuple(sorted(held))) for held in copies.values() if len(held) > 1)
