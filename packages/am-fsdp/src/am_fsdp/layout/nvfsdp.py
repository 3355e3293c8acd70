"""nvFSDP, published today as megatron-fsdp: its sharding behind the arguments that it had under its old name."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ParallelStyle

import am_tp_plans
from am_fsdp._torch_compat import axis
from am_fsdp.layout.imports import import_class_from_path
from am_fsdp.layout.optimizer_groups import OptimizerGroups, check_gradients_before_step, without_update
from am_fsdp.layout.strategy import refuse_unused_tensor_axis

HAVE_NVFSDP: bool = importlib.util.find_spec("megatron_fsdp") is not None
"""Whether megatron-fsdp is installed; nothing is imported to find out."""

STRATEGIES = ("no_shard", "optim", "optim_grads", "optim_grads_params")
# What old strategies sharded, and what comes nearest to it today.
_GONE = {
    "params": "parameters alone are never sharded now; 'optim_grads_params' shards them and more",
    "grads_params": "gradients and parameters are never sharded without the optimizer now; use 'optim_grads_params'",
}


def nvfsdp_strategy_parallelize(
    model: nn.Module,
    device_mesh: DeviceMesh,
    optimizer: torch.optim.Optimizer | None = None,
    nvfsdp_unit_modules: list[str] | None = None,
    tp_shard_plan: dict[str, ParallelStyle] | str | None = None,
    data_parallel_sharding_strategy: str | int = "optim_grads_params",
    init_nvfsdp_with_meta_device: bool = False,
    grad_reduce_in_fp32: bool = False,
    preserve_fp32_weights: bool = False,
    overlap_grad_reduce: bool = True,
    overlap_param_gather: bool = True,
    check_for_nan_in_grad: bool = True,
    average_in_collective: bool = False,
    disable_bucketing: bool = False,
    calculate_per_token_loss: bool = False,
    keep_fp8_transpose_cache_when_using_custom_fsdp: bool = False,
    nccl_ub: bool = False,
    fsdp_double_buffer: bool = False,
    dp_mesh_name: str = "data_parallel",
    cp_mesh_name: str = "context_parallel",
    tp_mesh_name: str = "tensor_parallel",
) -> tuple[nn.Module, torch.optim.Optimizer | None]:
    """Lay a model out over CUDA ranks with tensor parallelism and megatron-fsdp.

    Args:
        model: real, or on meta with `init_nvfsdp_with_meta_device`. It ends up inside a `MegatronFSDP` module.
        device_mesh: CUDA; has the data axis, and may have a context and a tensor axis. Over a context axis of more
            than one rank the parameters are sharded too; the mesh must then hold all ranks of the process group.
        optimizer: over the model's parameters and not stepped yet; its parameter groups and their settings are kept,
            over the sharded parameters. None: make one afterwards and give it to
            `megatron_fsdp.fully_shard_optimizer`.
        nvfsdp_unit_modules: classes whose instances become units, by import path, or by their bare name if the model
            holds such modules: `["LlamaDecoderLayer"]`. None: the whole model is one unit.
        tp_shard_plan: as for `fsdp2_strategy_parallelize`, where there is a tensor axis of more than one rank.
        data_parallel_sharding_strategy: what is sharded: "no_shard", "optim", "optim_grads" or "optim_grads_params",
            or their numbers 0 to 3.
        init_nvfsdp_with_meta_device: materialise unit by unit; every module with parameters on meta needs a
            `reset_parameters`.
        grad_reduce_in_fp32: gradients are reduced and kept in float32, not in the model's dtype.
        preserve_fp32_weights: the optimizer works on a float32 copy of the weights.
        overlap_grad_reduce: reduce gradients during backward; must be True where gradients are sharded.
        overlap_param_gather: gather parameters ahead of their use; must be True where parameters are sharded.
        check_for_nan_in_grad: before each optimizer step, raise on every rank if any gradient is not finite; done by
            a hook of this package on the optimizer, so it takes one.
        average_in_collective: let the collective average instead of dividing before it.
        disable_bucketing: communicate each gradient on its own.
        calculate_per_token_loss: do not divide gradients by the number of data ranks.
        keep_fp8_transpose_cache_when_using_custom_fsdp: Transformer Engine's, kept between steps.
        nccl_ub: register communication buffers with NCCL.
        fsdp_double_buffer: keep two communication buffers instead of allocating them.
        dp_mesh_name, cp_mesh_name, tp_mesh_name: the axes; the last two may be missing.

    Returns:
        The `MegatronFSDP` module and the optimizer.

    Collectives: with a context axis the creation of groups over all ranks; those of the tensor plan; megatron-fsdp's.

    Raises:
        ImportError: megatron-fsdp is not installed.
        ValueError: the mesh is not on CUDA or lacks the data axis, an argument has no meaning today (which, and what to
            use), no module is of a unit's class, a module on meta cannot initialise itself, or the optimizer has state
            already or holds parameters of something else; on every rank alike, before any collective.
    """
    if not HAVE_NVFSDP:
        raise ImportError("nvfsdp_strategy_parallelize needs megatron-fsdp: pip install am-fsdp[megatron]")
    arguments = nvfsdp_arguments(
        data_parallel_sharding_strategy=data_parallel_sharding_strategy,
        init_nvfsdp_with_meta_device=init_nvfsdp_with_meta_device,
        grad_reduce_in_fp32=grad_reduce_in_fp32,
        preserve_fp32_weights=preserve_fp32_weights,
        overlap_grad_reduce=overlap_grad_reduce,
        overlap_param_gather=overlap_param_gather,
        average_in_collective=average_in_collective,
        disable_bucketing=disable_bucketing,
        calculate_per_token_loss=calculate_per_token_loss,
        keep_fp8_transpose_cache_when_using_custom_fsdp=keep_fp8_transpose_cache_when_using_custom_fsdp,
        nccl_ub=nccl_ub,
        fsdp_double_buffer=fsdp_double_buffer,
    )
    tp_mesh = axis(device_mesh, tp_mesh_name)
    _check_mesh(device_mesh, dp_mesh_name, tp_mesh, tp_mesh_name, tp_shard_plan)
    units = unit_classes(model, nvfsdp_unit_modules)
    if init_nvfsdp_with_meta_device:
        _check_reset(model)
    groups = OptimizerGroups.of(model, optimizer) if optimizer is not None else None
    if device_mesh.device_type != "cuda":
        raise ValueError(
            f"megatron-fsdp works on CUDA alone, but device_mesh is on {device_mesh.device_type!r}; use "
            "fsdp2_strategy_parallelize there"
        )

    if tp_mesh is not None and tp_mesh.size() > 1:
        plan = am_tp_plans.resolve_plan(model, tp_shard_plan)
        am_tp_plans.apply_plan(model, tp_mesh, plan)
    mesh, shard_axis = sharding_mesh(device_mesh, dp_mesh_name, cp_mesh_name)

    import megatron_fsdp

    precision = megatron_fsdp.MixedPrecisionPolicy(**arguments.pop("mixed_precision_policy"))
    sharded = megatron_fsdp.fully_shard_model(
        model,
        device_mesh=mesh,
        dp_shard_dim=shard_axis,
        tp_dim=tp_mesh_name if tp_mesh is not None else None,
        fsdp_unit_modules=units,
        mixed_precision_policy=precision,
        **arguments,
    )
    if optimizer is not None and groups is not None:
        groups.move_to(optimizer, dict(model.named_parameters(remove_duplicate=False)))
        with without_update(optimizer):  # megatron-fsdp makes the optimizer's state by a step with zero gradients
            megatron_fsdp.fully_shard_optimizer(optimizer)
        if check_for_nan_in_grad:
            check_gradients_before_step(optimizer, groups.names)
    return sharded, optimizer


def nvfsdp_arguments(
    *,
    data_parallel_sharding_strategy: str | int,
    init_nvfsdp_with_meta_device: bool,
    grad_reduce_in_fp32: bool,
    preserve_fp32_weights: bool,
    overlap_grad_reduce: bool,
    overlap_param_gather: bool,
    average_in_collective: bool,
    disable_bucketing: bool,
    calculate_per_token_loss: bool,
    keep_fp8_transpose_cache_when_using_custom_fsdp: bool,
    nccl_ub: bool,
    fsdp_double_buffer: bool,
) -> dict[str, Any]:
    """The arguments of `megatron_fsdp.fully_shard_model` that mean the same, `mixed_precision_policy` as a dict.

    Raises:
        ValueError: there is no such meaning today.
    """
    strategy = data_parallel_sharding_strategy
    if isinstance(strategy, int) and not isinstance(strategy, bool) and 0 <= strategy < len(STRATEGIES):
        strategy = STRATEGIES[strategy]
    if strategy not in STRATEGIES:
        why = f": {_GONE[strategy]}" if isinstance(strategy, str) and strategy in _GONE else ""
        raise ValueError(f"data_parallel_sharding_strategy={strategy!r} is none of {STRATEGIES} or 0 to 3{why}")
    if init_nvfsdp_with_meta_device and strategy == "no_shard":
        raise ValueError("init_nvfsdp_with_meta_device=True needs a sharding strategy other than 'no_shard'")
    if not overlap_grad_reduce and strategy in ("optim_grads", "optim_grads_params"):
        raise ValueError(
            f"overlap_grad_reduce=False has no effect with {strategy!r}, which always overlaps; use 'optim'"
        )
    if not overlap_param_gather and strategy == "optim_grads_params":
        raise ValueError(
            f"overlap_param_gather=False has no effect with {strategy!r}, which always overlaps; use 'optim_grads'"
        )
    return {
        "zero_dp_strategy": strategy,
        "init_model_with_meta_device": init_nvfsdp_with_meta_device,
        "mixed_precision_policy": {
            "main_params_dtype": torch.float32 if preserve_fp32_weights else None,
            "main_grads_dtype": torch.float32 if grad_reduce_in_fp32 else None,
            "grad_comm_dtype": torch.float32 if grad_reduce_in_fp32 else None,
        },
        "overlap_grad_reduce": overlap_grad_reduce,
        "overlap_param_gather": overlap_param_gather,
        "average_in_collective": average_in_collective,
        "disable_bucketing": disable_bucketing,
        "calculate_per_token_loss": calculate_per_token_loss,
        "keep_fp8_transpose_cache": keep_fp8_transpose_cache_when_using_custom_fsdp,
        "nccl_ub": nccl_ub,
        "fsdp_double_buffer": fsdp_double_buffer,
    }


def unit_classes(model: nn.Module, names: list[str] | None) -> list[type[nn.Module]] | None:
    """The classes that unit names mean: import paths, or bare names of classes of the model's modules."""
    if names is None:
        return None
    present = {type(module).__name__: type(module) for module in model.modules()}
    classes = []
    for name in names:
        kind = import_class_from_path(name) if "." in name else present.get(name)
        if not (isinstance(kind, type) and any(isinstance(module, kind) for module in model.modules())):
            raise ValueError(
                f"nvfsdp_unit_modules: no module of {type(model).__name__} is a {name!r}; it has {sorted(present)}"
            )
        classes.append(kind)
    return classes


def sharding_mesh(mesh: DeviceMesh, dp_name: str, cp_name: str) -> tuple[DeviceMesh, str]:
    """A mesh with one axis to shard over, and its name: the data axis, or data and context together.

    Collectives: the creation of groups over all ranks, where data and context are joined.
    """
    context = axis(mesh, cp_name)
    if context is None or context.size() == 1:
        return mesh, dp_name
    names = list(mesh.mesh_dim_names or ())
    rest = [name for name in names if name not in (dp_name, cp_name)]
    joined = f"{dp_name}_{cp_name}"
    order = [names.index(name) for name in (dp_name, cp_name, *rest)]
    ranks = mesh.mesh.permute(order).flatten(0, 1)
    return DeviceMesh(mesh.device_type, ranks, mesh_dim_names=(joined, *rest)), joined


def _check_mesh(mesh: DeviceMesh, dp_name: str, tp_mesh: DeviceMesh | None, tp_name: str, plan: object) -> None:
    names = mesh.mesh_dim_names
    if axis(mesh, dp_name) is None:
        raise ValueError(f"device_mesh has no data axis {dp_name!r}; it has {names}. Pass its name as dp_mesh_name")
    if tp_mesh is None and plan is not None:
        raise ValueError(f"tp_shard_plan needs a tensor axis, but device_mesh has no {tp_name!r}; it has {names}")
    refuse_unused_tensor_axis(mesh, tp_mesh, tp_name)


def _check_reset(model: nn.Module) -> None:
    for name, module in model.named_modules():
        on_meta = any(parameter.is_meta for parameter in module.parameters(recurse=False))
        if on_meta and not (hasattr(module, "reset_parameters") or hasattr(module, "_reset_parameters")):
            raise ValueError(
                f"init_nvfsdp_with_meta_device=True: {name} is a {type(module).__name__} on meta without "
                "reset_parameters(), so nothing would initialise it; materialise the model first"
            )
