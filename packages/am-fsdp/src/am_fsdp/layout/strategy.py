"""Tensor parallelism, activation checkpointing and FSDP2 on a model, in the order that works."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ParallelStyle

import am_tp_plans
from am_fsdp._torch_compat import axis, side_by_side
from am_fsdp.layout.after_layout import refuse_after_layout, refuse_before_layout
from am_fsdp.layout.batch_norm import batch_norms, normalise_over_ranks
from am_fsdp.layout.checkpointing import Mode, checkpoint_layers, recomputed_modules
from am_fsdp.layout.evaluation import reshard_after_evaluation
from am_fsdp.layout.packed import check_packed
from am_fsdp.layout.recursive import apply_fsdp_sharding_recursively
from am_fsdp.layout.replicas import check_replicas, check_replicas_at_first_forward
from am_fsdp.layout.same_towers import run_towers_on_every_rank
from am_fsdp.layout.same_units import keep_units_in_step
from am_fsdp.layout.units import edges, units_of_another_dtype


def fsdp2_strategy_parallelize(
    model: nn.Module,
    device_mesh: DeviceMesh,
    param_dtype: torch.dtype = torch.bfloat16,
    mp_policy: MixedPrecisionPolicy | None = None,
    offload_policy: CPUOffloadPolicy | None = None,
    sequence_parallel: bool = False,
    activation_checkpointing: bool | int | Mode = False,
    cpu_offload: bool = False,
    tp_shard_plan: dict[str, ParallelStyle] | str | None = None,
    dp_mesh_name: str | tuple[str, str] = "data_parallel",
    tp_mesh_name: str = "tensor_parallel",
    dp_cp_mesh_name: str = "dp_cp",
) -> nn.Module:
    """Lay a transformers model out over a data axis, or a data and a tensor axis, in place.

    Args:
        model: real, with the same weights on every rank, or on the meta device; then the caller materialises the
            shards afterwards (`model.to_empty(device=...)` and an initialisation or a checkpoint). It may be a pipeline
            part whose absent modules are leaves without parameters.
        device_mesh: has the data axis (size 1 allowed) and, for tensor parallelism, the tensor axis.
        param_dtype: compute dtype of the default `mp_policy`; gradients are then reduced in float32, or in
            `param_dtype` where that is wider. Adapters over a frozen model of this dtype compute in their own.
        mp_policy: FSDP2's own, instead.
        offload_policy: FSDP2's own; `cpu_offload=True` is short for `CPUOffloadPolicy`.
        sequence_parallel: shard the sequence between layers over the tensor axis; sets `model.sequence_shards`.
        activation_checkpointing: recompute in backward: True or "full" for each layer, n for every n-th, "selective" or
            "mlp"; see `checkpoint_layers`. Sets `use_cache = False` in the configs of the
            model and its parts.
        tp_shard_plan: a plan, or the import path of a dict or of a function of `(model, sequence_parallel)`, of the
            model, or without arguments; else the family's, else the one that transformers brings
            (`am_tp_plans.resolve_plan`).
        dp_mesh_name: the data axis; or two for HSDP, whose first replicates and whose second shards. Either may be a
            flattened one: beside context parallelism, shard over that of the data and the context axis.
        tp_mesh_name: the tensor axis; missing or of size 1 means no tensor parallelism.
        dp_cp_mesh_name: the flattened data and context axis; parameters are sharded over it where the mesh has it.

    Returns:
        The model. Its `state_dict()` has the names that it had and this rank's shards, also while units are gathered;
        its `save_pretrained` says to call `save_hf_weights`.

    Collectives: those of FSDP2 over the data axis and of the plan's styles over the tensor axis; with real weights
        each sharded parameter is broadcast once over the tensor axis, after those of `check_replicas`. Models with
        several stacks of layers compare what they are given over the data axis in every forward (`same_towers`): a
        tower that any rank runs is run by all, on made-up images where a rank has none. The first forward of each kind
        compares which units run (`same_units`); batch norms in training sum over the data ranks (`batch_norm`).

    Raises:
        ValueError: the data axis is missing, a plan or sequence parallelism was asked for without a tensor axis, packed
            (quantised) weights would be cast or lost, experts are already spread over the data ranks, a unit is sharded
            already, one module holds parameters of two dtypes, a parameter has hooks on its gradient or is held beside
            its registered name, a batch norm has a forward of its own, the recomputation or the plan does not fit, or
            real weights differ between data or tensor ranks; on every rank alike, before the model is changed. From
            the first forward: so do weights that a model from meta was given; parameters, such as adapters, were added
            after the layout; ranks would run other units than each other.
        TypeError: a dtype or a policy is something else.
    """
    dp_mesh = data_axes(device_mesh, dp_mesh_name, dp_cp_mesh_name)
    tp_mesh = axis(device_mesh, tp_mesh_name)
    _check_axes(device_mesh, dp_mesh, tp_mesh, dp_mesh_name, tp_mesh_name, sequence_parallel, tp_shard_plan)
    _check_settings(param_dtype, mp_policy, offload_policy)
    _check_model(model, dp_mesh, dp_mesh_name)
    refuse_before_layout(model)
    batch_norms(model)
    recomputed_modules(model, activation_checkpointing)
    offload = offload_policy or (offload_to_cpu() if cpu_offload else OffloadPolicy())
    mixed = mp_policy or default_mp_policy(model, param_dtype)
    check_packed(model, mixed)
    units_of_another_dtype(model, mixed)
    plan = None
    if tp_mesh is not None and tp_mesh.size() > 1:
        plan = am_tp_plans.resolve_plan(model, tp_shard_plan, sequence_parallel=sequence_parallel)
        # What does not fit is refused before the replicas are compared.
        am_tp_plans.fit_plan(model, plan, tp_mesh.size())
    check_replicas(model, dp_mesh, tp_mesh)
    from_meta = any(parameter.is_meta for parameter in model.parameters())

    if tp_mesh is not None and plan is not None:
        am_tp_plans.apply_plan(model, tp_mesh, plan)
    normalise_over_ranks(model, dp_mesh)
    checkpoint_layers(model, activation_checkpointing)
    apply_fsdp_sharding_recursively(model, dp_mesh, mixed, offload)
    for unit in edges(model):
        rest = [module for module in unit if not isinstance(module, FSDPModule)]  # but for one of another dtype
        whole = rest if len(rest) > 1 else rest[0] if rest else None
        if whole is not None:
            fully_shard(whole, mesh=dp_mesh, mp_policy=mixed, offload_policy=offload, reshard_after_forward=False)
    # The root holds what is left; tied embeddings and head stay one parameter in it.
    fully_shard(model, mesh=dp_mesh, mp_policy=mixed, offload_policy=offload, reshard_after_forward=False)
    towers = run_towers_on_every_rank(model, dp_mesh, mixed)
    keep_units_in_step(model, dp_mesh, towers)
    reshard_after_evaluation(model)
    refuse_after_layout(model)
    if from_meta:
        check_replicas_at_first_forward(model, dp_mesh, tp_mesh)
    return model


def data_axes(mesh: DeviceMesh, dp_name: str | tuple[str, str], dp_cp_name: str) -> DeviceMesh | None:
    """The mesh to shard parameters over: data and context flattened where there is such an axis, two axes for HSDP."""
    if isinstance(dp_name, str):
        return axis(mesh, dp_cp_name) or axis(mesh, dp_name)
    replicate, shard = dp_name
    if axis(mesh, replicate) is None or axis(mesh, shard) is None:
        return None
    return side_by_side(mesh, replicate, shard)


def default_mp_policy(model: nn.Module, param_dtype: torch.dtype) -> MixedPrecisionPolicy:
    """Compute in `param_dtype`, reduce gradients in float32 or wider.

    Over a frozen model that is in `param_dtype` already, adapters of another dtype keep computing in theirs.
    """
    frozen = {p.dtype for p in model.parameters() if not p.requires_grad}
    kept = frozen == {param_dtype} and any(p.requires_grad for p in model.parameters())
    reduced = torch.promote_types(param_dtype, torch.float32)
    return MixedPrecisionPolicy(param_dtype=None if kept else param_dtype, reduce_dtype=reduced)


def offload_to_cpu() -> CPUOffloadPolicy:
    """Shards in CPU memory, pinned where there is a device that copies from it."""
    return CPUOffloadPolicy(pin_memory=torch.accelerator.is_available())


def _check_axes(
    mesh: DeviceMesh,
    dp_mesh: DeviceMesh | None,
    tp_mesh: DeviceMesh | None,
    dp_name: str | tuple[str, str],
    tp_name: str,
    sequence_parallel: bool,
    plan: object,
) -> None:
    axes = mesh.mesh_dim_names
    if dp_mesh is None:
        raise ValueError(f"device_mesh has no data axis {dp_name!r}; it has {axes}. Pass its name as dp_mesh_name")
    if dp_mesh.ndim != (1 if isinstance(dp_name, str) else 2):
        raise ValueError(f"the data axis {dp_name!r} must be one axis, or two for HSDP; got {dp_mesh.mesh_dim_names}")
    if tp_mesh is None and (sequence_parallel or plan is not None):
        asked = "sequence_parallel=True" if sequence_parallel else "tp_shard_plan"
        raise ValueError(f"{asked} needs a tensor axis, but device_mesh has no {tp_name!r}; it has {axes}")
    refuse_unused_tensor_axis(mesh, tp_mesh, tp_name)


def _check_settings(param_dtype: object, mp_policy: object, offload_policy: object) -> None:
    if not isinstance(param_dtype, torch.dtype) or not param_dtype.is_floating_point:
        raise TypeError(f"param_dtype must be a floating-point torch.dtype, got {param_dtype!r}")
    if mp_policy is not None and not isinstance(mp_policy, MixedPrecisionPolicy):
        raise TypeError(f"mp_policy must be a MixedPrecisionPolicy or None, got {mp_policy!r}")
    if offload_policy is not None and not isinstance(offload_policy, OffloadPolicy):
        raise TypeError(
            f"offload_policy must be an OffloadPolicy such as CPUOffloadPolicy or None, got {offload_policy!r}"
        )


def _check_model(model: nn.Module, dp_mesh: DeviceMesh, dp_name: str | tuple[str, str]) -> None:
    sharded = [name for name, module in model.named_modules() if isinstance(module, FSDPModule)]
    if sharded:
        raise ValueError(
            f"{sharded[0] or type(model).__name__} is an FSDP2 unit already; give the model as it was made"
        )
    data_ranks = set(dp_mesh.mesh.flatten().tolist())
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            shared = data_ranks & set(parameter.device_mesh.mesh.flatten().tolist())
            if len(shared) > 1:
                raise ValueError(
                    f"{name} is already distributed over {len(shared)} ranks of the data axis {dp_name!r}, as experts "
                    "under expert parallelism are; shard such a model with am_moe.apply_fsdp"
                )


def refuse_unused_tensor_axis(mesh: DeviceMesh, tp_mesh: DeviceMesh | None, tp_name: str) -> None:
    """Refuse a mesh with a tensor axis that goes by another name: each of its ranks would train the whole model.

    Raises:
        ValueError: names the axis.
    """
    for name, size in zip(mesh.mesh_dim_names or (), mesh.shape, strict=False):
        if tp_mesh is None and size > 1 and (name.startswith("tp") or "tensor" in name):
            raise ValueError(
                f"device_mesh has a tensor axis {name!r} of {size} ranks, but nothing would use it: "
                f"tp_mesh_name is {tp_name!r}; pass tp_mesh_name={name!r}"
            )
