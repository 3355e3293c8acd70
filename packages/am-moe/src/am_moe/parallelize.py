"""Every parallelism of a mixture of experts on one model, in the order in which they have to come."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy

from am_moe._torch_compat import axis, side_by_side
from am_moe.checkpointing import apply_ac
from am_moe.data_parallel.fsdp import apply_fsdp, check_units
from am_moe.data_parallel.replicas import check_replicas, check_replicas_at_first_forward
from am_moe.expert_parallel.apply import ExpertParallel, check_spread, spread_with
from am_moe.expert_parallel.experts import find_experts, routes_itself


def parallelize_model(
    model: nn.Module,
    world_mesh: DeviceMesh,
    moe_mesh: DeviceMesh | None,
    *,
    dp_axis_names: tuple[str, ...],
    cp_axis_name: str | None = None,
    tp_axis_name: str | None = None,
    ep_axis_name: str | None = None,
    ep_shard_axis_names: tuple[str, ...] | None = None,
    activation_checkpointing: bool = False,
    ignore_router_for_ac: bool = False,
    reshard_after_forward: bool = False,
    lm_head_precision: str | torch.dtype | None = None,
    wrap_outer_model: bool = True,
    mp_policy: MixedPrecisionPolicy | None = None,
    sequence_parallel: bool = False,
    tp_shard_plan: dict[str, Any] | str | None = None,
) -> None:
    """Apply tensor, context, expert and data parallelism and activation checkpointing to a model, in place.

    The `parallelize_fn` of `am_pipeline`, too: bind the settings with `functools.partial`. `build_meshes` makes both
    meshes. Attention and shared experts are tensor-parallel by the model's plan; routed experts by the expert axis
    alone. If that goes across tensor ranks (the expert mesh has no axis of that name), each of those sends its share of
    the tokens.

    Args:
        model: a transformers model or a pipeline part of one, real or on the meta device.
        world_mesh: the mesh of everything but experts.
        moe_mesh: the mesh of the experts over the same ranks; None without expert parallelism.
        dp_axis_names: the data axes: one, or (replicate, shard) for HSDP. Any may be a flattened axis of the mesh, such
            as `dp_shard_cp`; the context axis is joined to the last one unless that has it already.
        cp_axis_name: the context axis; call the model with what `am_moe.context_parallel.shard_batch` returns.
        tp_axis_name: the tensor axis; needs `am-moe[tp]` where it has several ranks.
        ep_axis_name: the expert axis, of `moe_mesh`; None to keep experts whole.
        ep_shard_axis_names: the axes of `moe_mesh` over the ranks with the same experts.
        activation_checkpointing: recompute each block in backward.
        ignore_router_for_ac: keep routing and dispatched rows when recomputing.
        reshard_after_forward, lm_head_precision, wrap_outer_model, mp_policy: as in `apply_fsdp`.
        sequence_parallel: shard the sequence between layers over the tensor axis, too.
        tp_shard_plan: as in `am_tp_plans.resolve_plan`, instead of the model's own. A plan that is derived from the
            model's forward can only be made before a pipeline cut: make it of the whole model and give it here.

    Collectives: with real weights, those of comparing (`check_replicas`) and sharding them; then in every step those of
        `apply_ep`, `apply_fsdp`, `apply_cp` and the tensor plan.

    Raises:
        ValueError: an axis that its mesh does not have, data axes that go over the same ranks as each other or as the
            tensor axis, real weights that differ between data, context or tensor ranks, and what the steps raise; on
            every rank alike, before the model is changed. From the first forward: weights that a model from meta was
            given, where ranks hold copies of them.
        ImportError: a tensor axis without am-tp-plans.
    """
    _check_axes(world_mesh, moe_mesh, dp_axis_names, cp_axis_name, tp_axis_name, ep_axis_name, ep_shard_axis_names)
    tp_mesh = _several(world_mesh, tp_axis_name)
    if tp_mesh is None and (sequence_parallel or tp_shard_plan is not None):
        asked = "sequence_parallel=True" if sequence_parallel else "tp_shard_plan"
        raise ValueError(f"{asked} needs a tensor axis of several ranks; tp_axis_name is {tp_axis_name!r}")
    cp_mesh = _several(world_mesh, cp_axis_name)
    check_units(model, ep_axis_name is not None, lm_head_precision, wrap_outer_model, mp_policy)
    spreads = moe_mesh is not None and ep_axis_name is not None and _has_experts_here(model)
    axes = (moe_mesh.mesh_dim_names if moe_mesh is not None else None) or ()
    style = ExpertParallel(tp_mesh=None if tp_axis_name in axes else tp_mesh)
    if spreads:
        check_spread(model, moe_mesh[ep_axis_name], style)
    data_mesh = _data_mesh(world_mesh, dp_axis_names, cp_axis_name if cp_mesh is not None else None)
    check_replicas(model, data_mesh, tp_mesh)
    from_meta = any(parameter.is_meta for parameter in model.parameters())

    if tp_mesh is not None:
        _apply_tp(model, tp_mesh, tp_shard_plan, sequence_parallel, keep_experts=ep_axis_name is not None)
    if cp_mesh is not None:
        from am_moe.context_parallel import apply_cp

        apply_cp(model, cp_mesh)
    if spreads:
        spread_with(model, moe_mesh[ep_axis_name], moe_mesh, style)
    if activation_checkpointing:
        apply_ac(model, ignore_router_for_ac)
    copies = _joined(moe_mesh, ep_shard_axis_names) if ep_axis_name is not None and ep_shard_axis_names else None
    apply_fsdp(
        model,
        data_mesh,
        ep_enabled=ep_axis_name is not None,
        ep_shard_enabled=copies is not None and copies.size() > 1,
        ep_shard_mesh=copies,
        mp_policy=mp_policy,
        reshard_after_forward=reshard_after_forward,
        lm_head_precision=lm_head_precision,
        wrap_outer_model=wrap_outer_model,
    )
    if from_meta:
        check_replicas_at_first_forward(model, data_mesh, tp_mesh)


def _check_axes(world, moe, dp_names, cp_name, tp_name, ep_name, ep_shard_names) -> None:
    if isinstance(dp_names, str) or not 1 <= len(dp_names) <= 2:
        raise ValueError(f"dp_axis_names must be a tuple of one axis, or two for HSDP, got {dp_names!r}")
    if ep_name is not None and moe is None:
        raise ValueError(f"ep_axis_name={ep_name!r} needs moe_mesh; build_meshes makes one")
    asked = {
        "dp_axis_names": (world, dp_names),
        "cp_axis_name": (world, (cp_name,) if cp_name else ()),
        "tp_axis_name": (world, (tp_name,) if tp_name else ()),
        "ep_axis_name": (moe, (ep_name,) if ep_name else ()),
        "ep_shard_axis_names": (moe, (ep_shard_names or ()) if ep_name else ()),
    }
    for argument, (mesh, names) in asked.items():
        missing = [name for name in names if axis(mesh, name) is None]
        if missing:
            which = "moe_mesh" if argument.startswith("ep") else "world_mesh"
            known = (mesh.mesh_dim_names or ()) if mesh is not None else ()
            raise ValueError(f"{argument}: {which} has no axis {missing[0]!r}; its axes are {known}")
    _check_apart(world, (*dp_names, tp_name) if tp_name else dp_names)
    if cp_name is not None and not _covers(world, dp_names[-1], cp_name):
        _check_apart(world, (*dp_names, cp_name))
    _check_apart(moe, (*(ep_shard_names or ()), ep_name) if ep_name else ())


def _check_apart(mesh: DeviceMesh, names: tuple[str, ...]) -> None:
    """Refuse axes of which two go over the same ranks, as a flattened axis and one of its own do."""
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            if len(_ranks(mesh, first) & _ranks(mesh, second)) > 1:
                raise ValueError(f"the axes {first!r} and {second!r} of {mesh.mesh_dim_names} go over the same ranks")


def _covers(mesh: DeviceMesh, flattened: str, name: str) -> bool:
    """Whether an axis has all ranks of another, as a flattened axis has those of each axis that it is made of."""
    return _ranks(mesh, name) <= _ranks(mesh, flattened)


def _ranks(mesh: DeviceMesh, name: str) -> set[int]:
    return set(mesh[name].mesh.flatten().tolist())


def _apply_tp(
    model: nn.Module,
    mesh: DeviceMesh,
    given: dict[str, Any] | str | None,
    sequence_parallel: bool,
    *,
    keep_experts: bool,
) -> None:
    try:
        plans = importlib.import_module("am_tp_plans")
    except ImportError as error:
        raise ImportError(
            f"tensor parallelism over {mesh.size()} ranks needs the plans of am-tp-plans: pip install 'am-moe[tp]'"
        ) from error
    plan = plans.resolve_plan(model, given, sequence_parallel=sequence_parallel)
    experts = [name for name, _ in find_experts(model)] if keep_experts else []
    dense = {key: style for key, style in plan.items() if not any(_within(key, name) for name in experts)}
    plans.apply_plan(model, mesh, dense)


def _within(key: str, experts: str) -> bool:
    """Whether a plan's key, with `*` for one level, means an experts module or something in it."""
    levels, wanted = key.split("."), experts.split(".")
    return len(levels) >= len(wanted) and all(k in ("*", w) for k, w in zip(levels, wanted, strict=False))


def _has_experts_here(model: nn.Module) -> bool:
    """Whether there is something to spread. A pipeline part of a model with experts may have none: nothing to do.

    A model that has none anywhere, or only blocks that route themselves, has, and `apply_ep` refuses it.
    """
    if find_experts(model) or any(routes_itself(module) for module in model.modules()):
        return True
    config = getattr(model, "config", None)
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    counts = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "ffn_config")
    return not any(getattr(text, name, None) for name in counts)


def _several(mesh: DeviceMesh, axis: str | None) -> DeviceMesh | None:
    return mesh[axis] if axis is not None and mesh[axis].size() > 1 else None


def _joined(mesh: DeviceMesh, axes: tuple[str, ...]) -> DeviceMesh:
    if len(axes) == 1:
        return mesh[axes[0]]
    own = all(name in (mesh.mesh_dim_names or ()) for name in axes)
    return (mesh[axes] if own else side_by_side(mesh[axes[0]], mesh[axes[1]]))._flatten("_".join(axes))


def _data_mesh(world: DeviceMesh, data: tuple[str, ...], context: str | None) -> DeviceMesh:
    """One axis, or (replicate, shard): ranks of the context axis hold other tokens, so they are data ranks too."""
    *replicate, shard = [name for name in data if world[name].size() > 1] or [data[-1]]
    alone = context is None or any(_covers(world, name, context) for name in data)
    sharded = world[shard] if alone else _joined(world, (shard, context))
    return side_by_side(world[replicate[0]], sharded) if replicate else sharded
