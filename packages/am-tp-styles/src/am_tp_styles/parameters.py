"""Parameters exchanged for sharded ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, distribute_tensor

from am_tp_styles._torch_compat import has_gradient_hooks

_SHARDED_AS = "_am_tp_styles_sharded_as"


def distribute(module: nn.Module, layout: Mapping[str, Placement], device_mesh: DeviceMesh, source: int | None) -> None:
    """Exchange the parameters that `layout` names (relative to `module`) for DTensor parameters.

    Two layers that share a parameter share it afterwards, when both are sharded in the same way.

    Raises:
        ValueError: a parameter is shared with a layer that is sharded already, in another way, or has a hook on its
            gradient.

    Collectives (the given axis): a scatter or broadcast per parameter unless `source` is None.
    """
    refuse_hooks(module, layout)
    for name, placement in layout.items():
        shared = getattr(module.get_parameter(name), _SHARDED_AS, None)
        if shared is not None and (shared.device_mesh, shared.placements) != (device_mesh, (placement,)):
            raise ValueError(
                f"{type(module).__name__}.{name} is tied to a parameter that is {shared.placements[0]} already, and "
                f"would be {placement} here; tied weights need one layout (rows with colwise, say)"
            )
    for name, placement in layout.items():
        owner, _, leaf = name.rpartition(".")
        _distribute_param(module.get_submodule(owner), leaf, device_mesh, source, [placement])


def refuse_hooks(module: nn.Module, names: Iterable[str]) -> None:
    """Raise ValueError where a parameter that a sharded one would take the place of has a hook on its gradient."""
    for name in names:
        parameter = module.get_parameter(name)
        if not isinstance(parameter, DTensor) and has_gradient_hooks(parameter):
            raise ValueError(
                f"{name} of {type(module).__name__} has a hook on its gradient, which would stay with the parameter "
                "that the sharded one takes the place of; register it after the plan is applied"
            )


def _distribute_param(
    _module: nn.Module,
    name: str,
    device_mesh: DeviceMesh,
    src_data_rank: int | None,
    placements: Sequence[Placement],
) -> None:
    """Replace the parameter `name` of `_module` by a DTensor parameter with these placements.

    `requires_grad` is kept, and so is a tie to a parameter that was replaced before. Meta tensors move no data.
    Collectives (`device_mesh`): a scatter or broadcast from `src_data_rank`, none if that is None.
    """
    parameter = _module.get_parameter(name)
    if isinstance(parameter, DTensor):
        return
    sharded = getattr(parameter, _SHARDED_AS, None)
    if sharded is None:
        source = None if parameter.is_meta else src_data_rank
        tensor = distribute_tensor(parameter.detach(), device_mesh, placements, src_data_rank=source)
        sharded = nn.Parameter(tensor, requires_grad=parameter.requires_grad)
        setattr(parameter, _SHARDED_AS, sharded)
    if isinstance(_module, nn.ParameterDict):
        _module[name] = sharded
    else:
        _module.register_parameter(name, sharded)
