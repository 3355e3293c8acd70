"""The backstop: what every rank of a tensor-parallel axis must agree on."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor


def check_gradients(model: nn.Module, tp_mesh: DeviceMesh, tolerance: float = 1e-3) -> None:
    """Check, after a backward, that parameters which every rank holds whole got the same gradient on all of them.

    A replicated parameter that saw only its rank's heads or tokens, and whose gradient nobody summed, shows here. Call
    it once, after the first backward of a run with a plan of your own.

    Args:
        model: after `apply_plan` and a backward.
        tp_mesh: the axis of the plan.
        tolerance: relative difference that the kernels' own disorder may cause.

    Collectives (the given axis): two all-reduces of four numbers per parameter.

    Raises:
        RuntimeError: names the parameters; on every rank alike.
    """
    whole = {name: parameter for name, parameter in model.named_parameters() if _is_whole(parameter, tp_mesh)}
    if not whole:
        return
    mine = torch.stack([_summary(p.grad) for p in whole.values()]).to(tp_mesh.device_type)
    least, most = mine.clone(), mine.clone()
    dist.all_reduce(least, dist.ReduceOp.MIN, group=tp_mesh.get_group())
    dist.all_reduce(most, dist.ReduceOp.MAX, group=tp_mesh.get_group())
    scale = torch.maximum(least.abs(), most.abs()).clamp(min=1e-30)
    # A sum may cancel: it is compared on the scale of the norm.
    scale[:, 2] = torch.maximum(scale[:, 2], scale[:, 3])
    off = ((most - least) / scale).nan_to_num(nan=float("inf")).amax(dim=1)
    if wrong := [
        f"{name} (by {error:.1e})" for name, error in zip(whole, off.tolist(), strict=True) if error > tolerance
    ]:
        raise RuntimeError(
            f"{len(wrong)} of {len(whole)} parameters that every rank of the axis holds whole got different gradients: "
            f"{', '.join(wrong[:10])}. Their plan needs a style that sums them, such as ReplicatedWithGradAllReduce"
        )


def check_seeds(model: nn.Module, tp_mesh: DeviceMesh) -> None:
    """Check that ranks with dropout were seeded alike: what is whole on every rank must be dropped alike.

    Collectives (the given axis): two all-reduces of one number, if the model has dropout.

    Raises:
        ValueError: they were not.
    """
    if not any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules()):
        return
    seed = torch.tensor([torch.initial_seed() % 2**62], dtype=torch.int64, device=tp_mesh.device_type)
    least, most = seed.clone(), seed.clone()
    dist.all_reduce(least, dist.ReduceOp.MIN, group=tp_mesh.get_group())
    dist.all_reduce(most, dist.ReduceOp.MAX, group=tp_mesh.get_group())
    if least.item() != most.item():
        raise ValueError(
            "the model has dropout, but the ranks of the tensor-parallel axis have different random seeds; call "
            "torch.manual_seed with the same seed on all ranks of the axis before apply_plan"
        )


def _is_whole(parameter: nn.Parameter, tp_mesh: DeviceMesh) -> bool:
    if not parameter.requires_grad:
        return False
    if not isinstance(parameter, DTensor) or parameter.device_mesh != tp_mesh:
        return not isinstance(parameter, DTensor)
    return all(placement.is_replicate() for placement in parameter.placements)


def _summary(gradient: torch.Tensor | None) -> torch.Tensor:
    """Whether there is one, its largest value, its sum, its norm."""
    if gradient is None:
        return torch.zeros(4, dtype=torch.float64)
    local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
    local = local.detach().double()
    return torch.stack(
        [torch.ones((), dtype=torch.float64), local.abs().max().cpu(), local.sum().cpu(), local.norm().cpu()]
    )
