"""One gradient norm over parameters that live on any mix of meshes, in one all-reduce."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Partial, Replicate

from am_fsdp._torch_compat import foreach_norm, foreach_scale_, gathered_parameters
from am_fsdp.process_group import device_of

_NAMED = 8  # gradients that an error names; one bad value is soon in all of them


def clip_grad_norm_(
    parameters: torch.Tensor | Iterable[torch.Tensor] | Iterable[tuple[str, torch.Tensor]],
    max_norm: float,
    *,
    norm_type: float = 2.0,
    group: dist.ProcessGroup | None = None,
    pipeline_shards: int = 1,
    duplicates: Iterable[torch.Tensor] = (),
    error_if_nonfinite: bool = False,
) -> torch.Tensor:
    """Scale gradients in place so that their global norm is at most `max_norm`; returns the norm before.

    Every element of every gradient counts once. A rank adds the norm of its shard divided by the number of ranks that
    hold the same shard: with `n` ranks per pipeline stage, a tensor in `s` distinct shards is on `n / s` of them. So
    plain tensors, FSDP shards, tensor-parallel shards and experts on a mesh of their own may be mixed, and different
    stages of a pipeline may hold different parameters.

    Args:
        parameters: this rank's parameters, or `model.named_parameters()` so that errors name them; those without a
            gradient add nothing.
        max_norm: the largest norm allowed.
        norm_type: 2.0 or `inf`.
        group: all ranks that train the model; the default group if None.
        pipeline_shards: how many ranks of `group` hold different stages: the size of the pipeline axis.
        duplicates: parameters of this rank that are counted elsewhere (copies of tied weights on another stage);
            scaled, not counted.
        error_if_nonfinite: raise on every rank if the norm is not finite, naming this rank's gradients that are not;
            nothing is scaled then.

    Returns:
        The norm, a float32 scalar on the device of the gradients, bitwise the same on every rank.

    Collectives: one all-reduce of one float64 over `group`; one per gradient that is still a partial sum.

    Raises:
        ValueError: `norm_type` or `pipeline_shards` is out of range; or, after the all-reduce, which gives nan on other
            ranks, FSDP2 holds given parameters gathered: their gradients are on other objects.
        RuntimeError: with `error_if_nonfinite`, on every rank.
    """
    if norm_type not in (2.0, math.inf):
        raise ValueError(f"norm_type must be 2.0 or inf, got {norm_type}")
    size = dist.get_world_size(group)
    if pipeline_shards < 1 or size % pipeline_shards:
        raise ValueError(f"pipeline_shards={pipeline_shards} must divide the {size} ranks of the group")
    given = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
    # Pairs, not a dict: two parts of a model may each have a parameter of that name.
    pairs = [(f"parameter {i}", p) if isinstance(p, torch.Tensor) else p for i, p in enumerate(given)]
    gathered = gathered_parameters()
    lost = [name for name, p in pairs if id(p) in gathered]
    names = [name for name, p in pairs if p.grad is not None]
    trained = [p for _, p in pairs if p.grad is not None]
    uncounted = {id(p) for p in duplicates}
    locals_ = [_local_shard(p) for p in trained]
    counts = [0.0 if id(p) in uncounted else pipeline_shards * _distinct_shards(p.grad) / size for p in trained]
    total = _total(locals_, counts, norm_type, _device(pairs, group)) + (math.nan if lost else 0.0)
    dist.all_reduce(total, dist.ReduceOp.MAX if norm_type == math.inf else dist.ReduceOp.SUM, group=group)
    if lost:
        raise ValueError(
            f"FSDP2 holds {_some(lost)} gathered since a forward that had no backward, and gathered parameters are not "
            "those that are trained. Run such a forward under torch.no_grad(), or call reshard() on the model's FSDP "
            "modules before you ask for model.parameters()"
        )
    norm = total if norm_type == math.inf else total.sqrt()
    if error_if_nonfinite and not torch.isfinite(norm):
        bad = [name for name, shard in zip(names, locals_, strict=True) if not bool(torch.isfinite(shard).all())]
        where = _some(bad) or "none"
        raise RuntimeError(f"the gradient norm is {norm.item()}; gradients that are not finite on this rank: {where}")
    scale = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    for alike in _alike(locals_):
        foreach_scale_(alike, scale.to(alike[0]))
    return norm.float()


def _device(pairs: list[tuple[str, torch.Tensor]], group: dist.ProcessGroup | None) -> torch.device:
    """That of the gradients; a rank that has none takes that of its parameters, or one that the group works on."""
    for _, parameter in sorted(pairs, key=lambda pair: pair[1].grad is None):
        tensor = parameter if parameter.grad is None else parameter.grad
        device = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).device
        return device if device.type in dist.get_backend_config(group) else device_of(group)  # offloaded, over NCCL
    return device_of(group)


def _local_shard(parameter: Any) -> torch.Tensor:
    gradient = parameter.grad
    if not isinstance(gradient, DTensor):
        return gradient
    if any(isinstance(p, Partial) for p in gradient.placements):
        settled = [Replicate() if isinstance(p, Partial) else p for p in gradient.placements]
        parameter.grad = gradient = gradient.redistribute(placements=settled)
    return gradient.to_local()


def _total(shards: list[torch.Tensor], counts: list[float], norm_type: float, device: torch.device) -> torch.Tensor:
    """The sum of the squares of all shards, each times what it counts on this rank; or the largest value."""
    total = torch.zeros((), dtype=torch.float64, device=device)
    counted = {id(s): count for s, count in zip(shards, counts, strict=True) if count and s.numel()}
    for alike in _alike([shard for shard in shards if id(shard) in counted]):
        norms = torch.stack(foreach_norm(alike, norm_type)).to(device)
        if norm_type == math.inf:
            total = torch.maximum(total, norms.max())
        else:
            each = torch.tensor([counted[id(shard)] for shard in alike], dtype=torch.float64).to(device)
            total = total + (norms.square() * each).sum()
    return total


def _alike(tensors: list[torch.Tensor]) -> list[list[torch.Tensor]]:
    """Tensors of one dtype and device together, which is what a foreach kernel takes."""
    groups: dict[Any, list[torch.Tensor]] = {}
    for tensor in tensors:
        groups.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    return [*groups.values()]


def _distinct_shards(gradient: torch.Tensor) -> int:
    if not isinstance(gradient, DTensor):
        return 1
    sizes = zip(gradient.device_mesh.shape, gradient.placements, strict=True)
    return math.prod(size for size, placement in sizes if not isinstance(placement, Replicate))


def _some(names: list[str]) -> str:
    return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")
