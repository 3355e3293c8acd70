"""The one place that touches private names of FSDP2. `tests/test_torch_compat.py` fails when torch changes them."""

from __future__ import annotations

from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule


def is_unsharded(module: FSDPModule) -> bool:
    """Whether an FSDP module holds its whole parameters right now; False for one that manages none."""
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:  # torch before 2.13 has one group per state
        groups = [g for g in [state._fsdp_param_group] if g is not None]
    return bool(groups) and all(group.is_unsharded for group in groups)


def axis(mesh: DeviceMesh, name: str) -> DeviceMesh | None:
    """A named axis of a mesh, flattened ones such as `dp_cp` included; None where there is no such axis."""
    if name in (mesh.mesh_dim_names or ()):
        return mesh[name]
    try:
        return mesh[name]
    except (KeyError, RuntimeError, ValueError):
        return None
