"""FSDP2 for models with expert parallelism: experts over their own axis, everything else over the data axis."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import Shard

from am_moe._torch_compat import reduce_unused
from am_moe.data_parallel.after_layout import refuse_after_layout, refuse_before_layout
from am_moe.data_parallel.batch_norm import batch_norms, normalise_over_ranks
from am_moe.data_parallel.evaluation import reshard_after_evaluation
from am_moe.data_parallel.packed import check_packed
from am_moe.data_parallel.same_towers import run_towers_on_every_rank
from am_moe.data_parallel.same_units import chooses, keep_units_in_step
from am_moe.data_parallel.units import edges, stacks_of_units, units_of_another_dtype
from am_moe.expert_parallel.apply import check_adapters
from am_moe.expert_parallel.experts import Experts, describe_experts


def apply_fsdp(
    model: nn.Module,
    fsdp_mesh: DeviceMesh,
    ep_enabled: bool,
    ep_shard_enabled: bool,
    ep_shard_mesh: DeviceMesh | None = None,
    mp_policy: MixedPrecisionPolicy | None = None,
    offload_policy: OffloadPolicy | None = None,
    reshard_after_forward: bool = False,
    lm_head_precision: str | torch.dtype | None = None,
    wrap_outer_model: bool = True,
) -> None:
    """Shard a model with experts over its data-parallel ranks, in place.

    Under expert parallelism the ranks of the data axis hold different experts, so the experts of a layer are a unit of
    their own over `ep_shard_mesh`, the ranks that hold the same ones; with no such ranks they are left as they are.
    Units are: experts; modules of a dtype other than the model's, which keep it; the layers of every stack (decoder,
    towers, prediction heads); the token embedding; the final norm with the head; and the rest.

    Every gradient is the average over the data axis. For experts that is the sum over all tokens' ranks, divided by
    their number: `apply_ep` divides by the expert axis's size, FSDP2 by that of `ep_shard_mesh`. The two must cover the
    data axis, and the tensor axis if the expert axis goes across it; that is checked.

    Args:
        model: after `apply_ep`, if experts are spread. It may be a pipeline part whose absent modules are leaves
            without parameters.
        fsdp_mesh: the data axis; or two axes, (replicate, shard), for HSDP.
        ep_enabled: whether `apply_ep` has spread the experts.
        ep_shard_enabled: whether several ranks hold the same experts.
        ep_shard_mesh: those ranks; an axis of the mesh that the expert axis belongs to.
        mp_policy, offload_policy: FSDP2's own.
        reshard_after_forward: free a layer's whole parameters between forward and backward. After a forward without
            gradients they are freed in any case.
        lm_head_precision: compute the head in this dtype (`"float32"` or `torch.float32`), as a unit of its own.
        wrap_outer_model: make the whole model the root unit; False makes each of its children one.

    A parameter of a layer that chooses among modules (Switch Transformers' experts), or whose experts may all be passed
    over (LongCat Flash), may be used on some ranks only: it gets zeros from the others, and on all ranks a gradient of
    zeros where none used it. A tower that any rank runs is run by all, on made-up images where a rank has none
    (`same_towers`); ranks whose inputs differ otherwise are refused in that forward.

    Collectives: those of FSDP2, over `fsdp_mesh` and `ep_shard_mesh`; where the model has several stacks of layers, one
        all-reduce of two numbers over `fsdp_mesh` in every forward (`same_towers`).

    Raises:
        ValueError: `ep_shard_enabled` without a mesh, meshes that do not cover each other, experts that `ep_enabled`
            denies or only claims are spread, an unknown dtype, a head that is absent or tied, parts that share
            parameters without `wrap_outer_model`; on every rank alike.
    """
    found = describe_experts(model)
    if ep_enabled and ep_shard_enabled and ep_shard_mesh is None:
        raise ValueError("ep_shard_enabled=True needs ep_shard_mesh, the ranks that hold the same experts")
    check_units(model, ep_enabled, lm_head_precision, wrap_outer_model, mp_policy)
    if ep_enabled:
        check_adapters(found)
    head, head_dtype = _head(model, lm_head_precision)
    replicas = ep_shard_mesh if ep_enabled and ep_shard_enabled else None
    _check_cover(model, found, fsdp_mesh, ep_enabled, replicas)
    settings: dict[str, Any] = {
        "mesh": fsdp_mesh,
        "mp_policy": mp_policy or MixedPrecisionPolicy(),
        "offload_policy": offload_policy or OffloadPolicy(),
        "reshard_after_forward": reshard_after_forward,
    }
    normalise_over_ranks(model, fsdp_mesh)
    expert_parameters = _spread_parameters(model, found) if ep_enabled else set()
    for owners, policy in units_of_another_dtype(model, settings["mp_policy"], expert_parameters):
        unit = [module for module in owners if module is not head]
        _shard(unit, settings | {"mp_policy": policy, "ignored_params": expert_parameters})
    if replicas is not None:
        for experts in found:
            _shard_experts(model.get_submodule(experts.name), experts, settings, replicas)
    else:
        settings["ignored_params"] = expert_parameters
    stacks = stacks_of_units(model)
    layers = [layer for stack in stacks for layer in stack]
    for layer in layers:
        if not isinstance(layer, FSDPModule):  # but for one of another dtype
            fully_shard(layer, **settings)
    if head is not None:
        wide = torch.promote_types(head_dtype, torch.float32)
        precise = MixedPrecisionPolicy(param_dtype=head_dtype, reduce_dtype=wide, output_dtype=head_dtype)
        fully_shard(head, **settings | {"mp_policy": precise})
    for unit in edges(model, head):
        _shard([module for module in unit if not isinstance(module, FSDPModule)], settings)
    for root in [model] if wrap_outer_model else [c for c in model.children() if any(True for _ in c.parameters())]:
        if not isinstance(root, FSDPModule):
            fully_shard(root, **settings)
    for layer in layers:
        if _may_use_a_part(layer):
            reduce_unused(layer)
    _prefetch(stacks)
    towers = run_towers_on_every_rank(model, fsdp_mesh, settings["mp_policy"])
    keep_units_in_step(model, fsdp_mesh, towers)
    reshard_after_evaluation(model)
    refuse_after_layout(model)


def _prefetch(stacks: list[list[nn.Module]]) -> None:
    """While a layer computes, the parameters of the next one are on their way, its experts' too.

    Experts make the host wait for the numbers of their rows; it could not ask for them in time otherwise.
    """
    for stack in stacks:
        for layer, following in itertools.pairwise(cast(list[Any], stack)):
            units = [module for module in following.modules() if isinstance(module, FSDPModule)]
            layer.set_modules_to_forward_prefetch(units)


def _may_use_a_part(layer: nn.Module) -> bool:
    """Whether a layer may leave parameters without a gradient: it holds several modules of one class to choose from,
    such as experts one by one, or stacked experts among which ids mean the token itself."""
    return chooses(layer) or any(experts.identity for experts in describe_experts(layer))


def check_units(
    model: nn.Module,
    ep_enabled: bool,
    lm_head_precision: str | torch.dtype | None,
    wrap_outer_model: bool,
    mp_policy: MixedPrecisionPolicy | None,
) -> None:
    """Refuse what `apply_fsdp` would, with its errors, as far as the model alone shows it; nothing is changed."""
    check_packed(model, mp_policy or MixedPrecisionPolicy())
    refuse_before_layout(model)
    batch_norms(model)
    _head(model, lm_head_precision)
    spread = _spread_parameters(model, describe_experts(model)) if ep_enabled else ()
    units_of_another_dtype(model, mp_policy or MixedPrecisionPolicy(), spread)
    if not wrap_outer_model:
        _check_apart(model)


def _spread_parameters(model: nn.Module, found: list[Experts]) -> set[nn.Parameter]:
    return {model.get_parameter(f"{e.name}.{path}".lstrip(".")) for e in found for path in e.stacked}


def _shard(unit: list[nn.Module], settings: dict[str, Any]) -> None:
    if unit:
        fully_shard(unit if len(unit) > 1 else unit[0], **settings)


def _check_apart(model: nn.Module) -> None:
    seen: dict[nn.Parameter, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first = seen.setdefault(parameter, name)
        if first.partition(".")[0] != name.partition(".")[0]:
            raise ValueError(
                f"wrap_outer_model=False needs parts that share nothing, but {name} is {first}; leave the outer model "
                "in one unit with wrap_outer_model=True"
            )


def _shard_experts(module: nn.Module, experts: Experts, settings: dict[str, Any], replicas: DeviceMesh) -> None:
    """The experts over the ranks that hold the same ones; what they share over the data axis, like everything else."""
    for owner in dict.fromkeys(path.rpartition(".")[0] for path in experts.shared):
        fully_shard(module.get_submodule(owner), **settings)
    # Routing weights keep their dtype, as they do where experts are no unit.
    policy = dataclasses.replace(settings["mp_policy"], cast_forward_inputs=False)
    fully_shard(module, **settings | {"mesh": replicas, "mp_policy": policy, "shard_placement_fn": _even_dim(replicas)})


def _even_dim(mesh: DeviceMesh):
    """Shard experts on dim 1 where it divides: their first dim is the expert axis's already."""

    def placement(parameter: nn.Parameter) -> Shard | None:
        return Shard(1) if parameter.dim() > 1 and parameter.shape[1] % mesh.size() == 0 else None

    return placement


def _check_cover(
    model: nn.Module, found: list[Experts], data: DeviceMesh, ep_enabled: bool, replicas: DeviceMesh | None
) -> None:
    spread = {e.name: getattr(model.get_submodule(e.name), "spread_experts", None) for e in found}
    for name, how in spread.items():
        if (how is not None) != ep_enabled:
            did = "are" if how is not None else "are not"
            raise ValueError(f"ep_enabled={ep_enabled}, but the experts of {name} {did} spread by apply_ep")
        if how is None:
            continue
        copies = replicas.size() if replicas is not None else 1
        alike = how.tp_mesh.size() if how.tp_mesh is not None else 1
        if how.mesh.size() * copies != data.size() * alike:
            raise ValueError(
                f"the experts of {name} are on {how.mesh.size()} ranks, each copied {copies} times, but the data axis "
                f"has {data.size()} ranks" + (f" of {alike} with the same tokens" if alike > 1 else "") + "; expert "
                "axis x ep_shard_mesh must be all of them: pass ep_shard_mesh with ep_shard_enabled=True, or none"
            )


def _head(model: nn.Module, precision: str | torch.dtype | None) -> tuple[nn.Module | None, torch.dtype | None]:
    if precision is None:
        return None, None
    dtype = getattr(torch, precision.removeprefix("torch."), None) if isinstance(precision, str) else precision
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"lm_head_precision={precision!r} is not a torch dtype; use 'float32' or 'bfloat16'")
    head = getattr(model, "lm_head", None)
    if head is None:
        raise ValueError(f"lm_head_precision was given, but {type(model).__name__} has no lm_head")
    others = {id(p) for name, p in model.named_parameters(remove_duplicate=False) if not name.startswith("lm_head.")}
    if any(id(p) in others for p in head.parameters()):
        raise ValueError("lm_head is tied to the embedding, which it would share its precision with")
    return (head, dtype) if any(True for _ in head.parameters()) else (None, None)
