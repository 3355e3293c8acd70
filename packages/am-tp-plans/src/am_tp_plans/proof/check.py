"""The backstop: what every rank of a tensor-parallel axis must agree on."""

from __future__ import annotations

import hashlib
import inspect
import math
import re
from functools import cache

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor


def check_gradients(model: nn.Module, tp_mesh: DeviceMesh, tolerance: float = 1e-3) -> tuple[str, ...]:
    """Check, after a backward, that parameters which every rank holds whole got the same gradient on all of them.

    A replicated parameter that saw only its rank's heads or tokens, and whose gradient nobody summed, shows here. Call
    it once, after the first backward of a run with a plan of your own. Under FSDP2 the ranks of the axis compare the
    part of each gradient that they hold, which is the same part.

    Args:
        model: after `apply_plan` and a backward; FSDP2 may have been applied in between.
        tp_mesh: the axis of the plan.
        tolerance: relative difference that the kernels' own disorder may cause.

    Returns:
        The names of the parameters that could not be checked: trainable, but without a gradient on any rank, or laid
        out over a mesh in which the axis cannot be found.

    Collectives (the given axis): two all-reduces of four numbers per parameter.

    Raises:
        RuntimeError: names the parameters whose gradients differ or are not finite, or says that none has one; on every
            rank alike.
    """
    layouts = {name: _layout(p, tp_mesh) for name, p in model.named_parameters() if p.requires_grad}
    unknown = [name for name, layout in layouts.items() if layout == "unknown"]
    whole = {name: model.get_parameter(name) for name, layout in layouts.items() if layout == "whole"}
    if not whole:
        return tuple(unknown)
    mine = torch.stack([_summary(p.grad) for p in whole.values()]).to(tp_mesh.device_type)
    mine = mine.nan_to_num(nan=math.inf, posinf=math.inf, neginf=-math.inf)  # a NaN may get lost in an all-reduce
    least, most = mine.clone(), mine.clone()
    dist.all_reduce(least, dist.ReduceOp.MIN, group=tp_mesh.get_group())
    dist.all_reduce(most, dist.ReduceOp.MAX, group=tp_mesh.get_group())
    scale = torch.maximum(least.abs(), most.abs()).clamp(min=1e-30)
    # A sum may cancel: it is compared on the scale of the norm.
    scale[:, 2] = torch.maximum(scale[:, 2], scale[:, 3])
    finite = (least.isfinite() & most.isfinite()).all(dim=1)
    if spoilt := [name for name, good in zip(whole, finite.tolist(), strict=True) if not good]:
        raise RuntimeError(
            f"{len(spoilt)} of {len(whole)} parameters that every rank of the axis holds whole got gradients that are "
            f"not finite (NaN or infinite) and cannot be compared: {', '.join(spoilt[:10])}. Look at the loss first"
        )
    off = ((most - least) / scale).amax(dim=1)
    if wrong := [
        f"{name} (by {error:.1e})" for name, error in zip(whole, off.tolist(), strict=True) if error > tolerance
    ]:
        raise RuntimeError(
            f"{len(wrong)} of {len(whole)} parameters that every rank of the axis holds whole got different gradients: "
            f"{', '.join(wrong[:10])}. Their plan needs a style that sums them, such as ReplicatedWithGradAllReduce"
        )
    missing = [name for name, most_there in zip(whole, most[:, 0].tolist(), strict=True) if not most_there]
    if len(missing) == len(whole):
        raise RuntimeError(
            f"none of the {len(whole)} parameters that every rank of the axis holds whole has a gradient, so nothing "
            "could be checked; call check_gradients after a backward and before zero_grad (under FSDP2 one that "
            "synchronises gradients)"
        )
    return tuple(unknown + missing)


def check_seeds(model: nn.Module, tp_mesh: DeviceMesh) -> None:
    """Check that ranks with dropout draw the same random numbers: what is whole on every rank must be dropped alike.

    Compared are the states of the CPU's generator and of the axis's device. A model has dropout if a module is one, or
    if a module or a config has a positive number with "drop", "jitter" or "noise" in its name, as functional dropout
    and routers need.

    Collectives (the given axis): two all-reduces of one number, if the model has dropout.

    Raises:
        ValueError: they would draw others.
    """
    settings = random_settings(model)
    if not settings:
        return
    states = [torch.get_rng_state()]
    if tp_mesh.device_type != "cpu":
        states.append(torch.get_device_module(tp_mesh.device_type).get_rng_state().cpu())
    digest = hashlib.sha256(b"".join(state.numpy().tobytes() for state in states)).digest()[:7]
    mine = torch.tensor([int.from_bytes(digest, "big")], dtype=torch.int64, device=tp_mesh.device_type)
    least, most = mine.clone(), mine.clone()
    dist.all_reduce(least, dist.ReduceOp.MIN, group=tp_mesh.get_group())
    dist.all_reduce(most, dist.ReduceOp.MAX, group=tp_mesh.get_group())
    if least.item() != most.item():
        raise ValueError(
            f"the model has dropout or noise ({', '.join(settings[:3])}), but the ranks of the tensor-parallel axis "
            "have different random states (other seeds, or one drew more numbers); call torch.manual_seed with the "
            "same seed on all ranks of the axis right before apply_plan"
        )


def has_dropout(model: nn.Module) -> bool:
    return bool(random_settings(model))


def random_settings(model: nn.Module) -> list[str]:
    """What lets a model draw random numbers in training, such as `config.layerdrop=0.05`.

    A number of a config counts where a class of these modules names it: GPT-2's has one for a head that a language
    model does not have.
    """
    named = frozenset().union(*map(_names_in_code, {cls for m in model.modules() for cls in type(m).__mro__}))
    found = {f"{type(m).__name__}({m.p})": None for m in model.modules() if isinstance(m, _DROPOUT) and m.p > 0}
    for module in model.modules():
        for owner, held in ((type(module).__name__, module), ("config", getattr(module, "config", None))):
            for name, value in getattr(held, "__dict__", {}).items():
                used = owner != "config" or name in named
                if used and isinstance(value, float) and value > 0 and _RANDOM.search(name):
                    found[f"{owner}.{name}={value}"] = None
    return list(found)


@cache
def _names_in_code(cls: type) -> frozenset[str]:
    """The attributes that a class's own methods read by name."""
    functions = [inspect.unwrap(getattr(f, "fget", None) or getattr(f, "__func__", f)) for f in vars(cls).values()]
    codes = [function.__code__ for function in functions if hasattr(function, "__code__")]
    names: set[str] = set()
    while codes:
        code = codes.pop()
        names.update(code.co_names, (constant for constant in code.co_consts if isinstance(constant, str)))
        codes += [constant for constant in code.co_consts if inspect.iscode(constant)]
    return frozenset(names)


_RANDOM = re.compile("drop|jitter|noise")
_DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


def _layout(parameter: nn.Parameter, tp_mesh: DeviceMesh) -> str:
    """Whether the ranks of the axis hold the same of a parameter (whole), parts of it (sharded), or what is unknown."""
    if not isinstance(parameter, DTensor):
        return "whole"
    mesh, axis = parameter.device_mesh, set(tp_mesh.mesh.flatten().tolist())
    if len(axis & set(mesh.mesh.flatten().tolist())) <= 1:
        return "whole"  # FSDP2 shards it over other ranks, those of the axis alike
    for dim, placement in enumerate(parameter.placements):
        if set(dist.get_process_group_ranks(mesh.get_group(dim))) == axis:
            return "whole" if placement.is_replicate() else "sharded"
    return "unknown"


def _summary(gradient: torch.Tensor | None) -> torch.Tensor:
    """Whether there is one, its largest value, its sum, its norm."""
    if gradient is None:
        return torch.zeros(4, dtype=torch.float64)
    local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
    local = local.detach().double().flatten()
    if not local.numel():  # FSDP2 gave this part of the ranks nothing of it
        return torch.tensor([1.0, 0, 0, 0], dtype=torch.float64)
    numbers = [local.abs().max(), local.sum(), local.norm()]
    return torch.stack([torch.ones((), dtype=torch.float64), *(number.cpu() for number in numbers)])
