"""FSDP2 for models with expert parallelism: experts over their own axis, everything else over the data axis."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import Shard

from am_moe.experts import find_experts


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

    Args:
        model: after `apply_ep`, if experts are spread. It may be a pipeline part whose absent modules are leaves
            without parameters.
        fsdp_mesh: the data axis.
        ep_enabled: whether `apply_ep` has spread the experts.
        ep_shard_enabled: whether several ranks hold the same experts.
        ep_shard_mesh: those ranks; an axis of the mesh that the expert axis belongs to.
        mp_policy, offload_policy: FSDP2's own.
        reshard_after_forward: free a layer's whole parameters between forward and backward.
        lm_head_precision: compute the head in this dtype (`"float32"` or `torch.float32`), as a unit of its own.
        wrap_outer_model: make the whole model the root unit; False makes each of its children one.

    Collectives: those of FSDP2, over `fsdp_mesh` and `ep_shard_mesh`.

    Raises:
        ValueError: `ep_shard_enabled` without a mesh, an unknown dtype, a head that is absent or tied; on every rank
            alike.
    """
    if ep_enabled and ep_shard_enabled and ep_shard_mesh is None:
        raise ValueError("ep_shard_enabled=True needs ep_shard_mesh, the ranks that hold the same experts")
    head, head_dtype = _head(model, lm_head_precision)
    settings: dict[str, Any] = {
        "mesh": fsdp_mesh,
        "mp_policy": mp_policy or MixedPrecisionPolicy(),
        "offload_policy": offload_policy or OffloadPolicy(),
        "reshard_after_forward": reshard_after_forward,
    }
    left_alone: set[nn.Parameter] = set()
    for _, experts in find_experts(model) if ep_enabled else ():
        if ep_shard_enabled:
            fully_shard(experts, **settings | {"mesh": ep_shard_mesh, "shard_placement_fn": _even_dim(ep_shard_mesh)})
        else:
            left_alone |= set(experts.parameters())
    settings["ignored_params"] = left_alone
    for stack in _layer_stacks(model):
        for layer in stack:
            if any(True for _ in layer.parameters()):
                fully_shard(layer, **settings)
    if head is not None:
        precise = MixedPrecisionPolicy(param_dtype=head_dtype, reduce_dtype=torch.float32, output_dtype=head_dtype)
        fully_shard(head, **settings | {"mp_policy": precise})
    for root in [model] if wrap_outer_model else [c for c in model.children() if any(True for _ in c.parameters())]:
        fully_shard(root, **settings)


def _even_dim(mesh: DeviceMesh):
    """Shard experts on dim 1 where it divides: their first dim is the expert axis's already."""

    def placement(parameter: nn.Parameter) -> Shard | None:
        return Shard(1) if parameter.dim() > 1 and parameter.shape[1] % mesh.size() == 0 else None

    return placement


def _layer_stacks(module: nn.Module) -> Iterator[nn.ModuleList]:
    if isinstance(module, nn.ModuleList):
        yield module
        return
    for child in module.children():
        yield from _layer_stacks(child)


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
