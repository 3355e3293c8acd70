"""Apply a plan: expand it, check it against the model and the axis, then shard."""

from __future__ import annotations

import copy
import functools
from typing import Any, cast

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module

from am_tp_plans.expand import is_part
from am_tp_plans.fit import check_plan, tied_weights
from am_tp_plans.proof.check import check_seeds
from am_tp_plans.proof.numeric_check import check_numbers
from am_tp_plans.proof.read_outputs import refuse_parts
from am_tp_plans.proof.rehearsal import NoFitError, rehearse
from am_tp_plans.sources.registry import family_function, is_family
from am_tp_plans.sources.stock import what_was_edited
from am_tp_plans.styles.basic import SequenceGatherOutput, describe, local_form, shards_sequence
from am_tp_plans.styles.heads import shares_heads
from am_tp_plans.styles.random_numbers import check_dropout, draw_for_shares
from am_tp_styles.axis import MeshAxis
from am_tp_styles.parameters import refuse_hooks
from am_tp_styles.summed_together import sum_gradients_together


def apply_plan(model: nn.Module, tp_mesh: DeviceMesh, plan: dict[str, ParallelStyle]) -> nn.Module:
    """Shard a model over a tensor-parallel axis, in place; gradients are right when `backward()` returns.

    Tied weights stay one parameter. `model.sequence_shards` says over how many ranks the sequence is sharded between
    layers, `model.whole_outputs` which layers return it whole all the same.

    Args:
        model: real, with the same weights on every rank, or on the meta device. It may be a pipeline part, whose absent
            modules are leaves without parameters; keys for those are passed over. Of a model that peft wraps, give
            what `get_base_model()` returns; its linears may be wrapped.
        tp_mesh: one-dimensional.
        plan: from `resolve_plan`, or your own.

    Returns:
        The model.

    Collectives: with real weights a scatter or broadcast per parameter from the axis's first rank; then those of the
        styles.

    Raises:
        ValueError: a key matches nothing, heads or features do not divide over the axis, ranks would share key/value
            heads in an attention that no rehearsal shows to be right, a family's plan does not fit a model of it that
            was edited, tied weights would be sharded differently, a module is sharded already, a parameter has a hook
            on its gradient, the model has dropout and the ranks have different seeds, or dropout of a whole sequence
            between parts of it; on every rank alike, before anything is sharded.
        TypeError: a colwise or rowwise style is given to a module that is no linear and no embedding.
    """
    if tp_mesh.ndim != 1:
        raise ValueError(f"tp_mesh must have one axis, got {tp_mesh.mesh_dim_names}")
    refuse_hooks(model, [name for name, _ in model.named_parameters()])
    concrete = fit_plan(model, plan, tp_mesh.size())
    _prove_family_plan(model, plan, concrete, tp_mesh.size())
    if tp_mesh.size() > 1:
        check_dropout(model, concrete)
    check_seeds(model, tp_mesh)
    tied = tied_weights(model)
    for name, style in concrete.items():
        # a copy, because torch writes src_data_rank into the style, and the plan is the caller's
        parallelize_module(model.get_submodule(name), tp_mesh, copy.copy(local_form(style)))
    _tie_again(model, tied)
    sum_gradients_together(model, MeshAxis(tp_mesh))
    shards = any(map(shards_sequence, plan.values()))
    draw_for_shares(model, concrete, MeshAxis(tp_mesh), shards_sequence=shards)
    model.sequence_shards = tp_mesh.size() if shards else 1
    model.whole_outputs = tuple(name for name, style in plan.items() if isinstance(style, SequenceGatherOutput))
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.register_forward_hook(_keep)
    if tp_mesh.size() > 1:
        refuse_parts(model, {**plan, **concrete})  # a pipeline part may lack the layer in which a plan splits
    if shards and tp_mesh.size() > 1 and hasattr(model, "generate"):
        cast(Any, model).generate = functools.partial(_refuse_to_generate, type(model).__name__)
    return model


def _keep(_module: nn.Module, _inputs: Any, _output: Any) -> None:
    """Changes nothing; torch runs no fused kernel for inference, which takes whole weights, where a layer has hooks."""


def _refuse_to_generate(name: str, *_args: Any, **_kwargs: Any) -> None:
    raise RuntimeError(
        f"{name} cannot generate while its sequence is sharded between layers: one new token does not divide. "
        "Lay it out without sequence parallelism, or write a folder (am_fsdp.save_hf_weights) and generate from it"
    )


def fit_plan(model: nn.Module, plan: dict[str, ParallelStyle], ranks: int) -> dict[str, ParallelStyle]:
    """The plan for an axis of so many ranks, without wildcards, checked as `apply_plan` does; it changes nothing.

    Where an attention has fewer key/value heads than there are ranks, it says which ranks share one. `apply_plan` does
    this by itself; of a model that no family here knows, the parts of a pipeline need the plan that was fitted to the
    whole model, because nothing can be shown on a part.

    Raises:
        ValueError: as `apply_plan`.
        TypeError: as `apply_plan`.
    """
    concrete = check_plan(model, plan, ranks)
    _prove_shared_heads(model, plan, concrete, ranks)
    return concrete


def _prove_family_plan(
    model: nn.Module, plan: dict[str, ParallelStyle], concrete: dict[str, ParallelStyle], ranks: int
) -> None:
    """Rehearse a plan that was written for another model than this one: a family's, for one of it that was edited.

    A plan of the user's own is theirs, and so is one that `resolve_plan` had to complete. Nothing is shown on a part of
    a pipeline, nor of a model that does not run on ids alone.
    """
    function = family_function(model)
    if ranks == 1 or not plan or function is None or what_was_edited(model) is None:
        return
    theirs = function(model, any(map(shards_sequence, plan.values())))
    if any(describe(theirs.get(key)) != describe(style) for key, style in plan.items()):
        return
    if is_part(model) or any("boundary" in vars(module) for module in model.modules()):
        return
    try:
        rehearse(model, concrete, ranks)
    except NoFitError:
        raise
    except ValueError:  # its forward wants other inputs
        return
    check_numbers(model, plan, ranks)


def _prove_shared_heads(
    model: nn.Module, given: dict[str, ParallelStyle], concrete: dict[str, ParallelStyle], ranks: int
) -> None:
    """Rehearse the plan if ranks share heads: an attention may count them in a way of its own.

    Not for the families here, whose attentions are known, nor on a part of a pipeline whose plan says it itself.
    """
    sharing = [name for name, style in concrete.items() if shares_heads(style)]
    explicit = any(map(shares_heads, given.values()))
    if not sharing or (not explicit and is_family(model)):
        return
    if is_part(model):
        if explicit:
            return
        raise ValueError(
            f"{sharing[0]} has fewer key/value heads than the {ranks} ranks, and this {type(model).__name__} is a part "
            f"of a cut model, on which nothing can be shown; give the parts fit_plan(model, plan, {ranks}) of the whole"
        )
    rehearse(model, concrete, ranks)


def _tie_again(model: nn.Module, tied: list[list[str]]) -> None:
    for first, *others in tied:
        parameter = model.get_parameter(first)
        for name in others:
            owner, _, leaf = name.rpartition(".")
            other = model.get_parameter(name)
            if isinstance(other, DTensor) != isinstance(parameter, DTensor):
                raise ValueError(f"{first} and {name} are one parameter, but the plan shards only one of them")
            model.get_submodule(owner).register_parameter(leaf, parameter)
