"""Two meshes over the same ranks: one for everything but experts, one for experts."""

from __future__ import annotations

import math

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


def build_meshes(
    device_type: str,
    *,
    pp: int = 1,
    dp_replicate: int = 1,
    dp_shard: int = 1,
    cp: int = 1,
    tp: int = 1,
    ep: int = 1,
) -> tuple[DeviceMesh, DeviceMesh]:
    """The world mesh and the expert mesh of some degrees.

    The world mesh is `(pp, dp_replicate, dp_shard, cp, tp)`; the expert mesh `(pp, ep_shard, ep)` over the same ranks:
    within a pipeline stage experts spread over neighbouring ranks, whatever those are for the rest of the model, and
    `ep_shard` counts the ranks with the same ones. Eight ranks with `dp_shard` 4, `tp` 2 and `ep` 4::

        rank        0     1     2     3     4     5     6     7
        tokens      [-- A --]   [-- B --]   [-- C --]   [-- D --]       dp_shard, tp
        experts     01    23    45    67    01    23    45    67        ep_shard, ep

    Args:
        device_type: such as `"cpu"`.
        pp, dp_replicate, dp_shard, cp, tp: degrees whose product is the number of ranks.
        ep: a divisor of `dp_replicate x dp_shard x cp x tp`.

    Returns:
        The world mesh and the expert mesh.

    Collectives: those of making the groups.

    Raises:
        ValueError: a degree below 1, a product that is not the number of ranks, an `ep` that does not divide.
    """
    degrees = {"pp": pp, "dp_replicate": dp_replicate, "dp_shard": dp_shard, "cp": cp, "tp": tp}
    check_degrees(degrees, ep, dist.get_world_size())
    world = init_device_mesh(device_type, tuple(degrees.values()), mesh_dim_names=tuple(degrees))
    stage = math.prod(degrees.values()) // pp
    experts = init_device_mesh(device_type, (pp, stage // ep, ep), mesh_dim_names=("pp", "ep_shard", "ep"))
    return world, experts


def check_degrees(degrees: dict[str, int], ep: int, ranks: int) -> None:
    """Refuse degrees that do not fit, before there is a mesh.

    Raises:
        ValueError: see `build_meshes`.
    """
    for name, degree in {**degrees, "ep": ep}.items():
        if degree < 1:
            raise ValueError(f"{name} must be at least 1, got {degree}")
    product = math.prod(degrees.values())
    if product != ranks:
        shown = " x ".join(f"{name} {degree}" for name, degree in degrees.items())
        raise ValueError(f"{shown} is {product} ranks, but there are {ranks}; start {product} or change a degree")
    stage = product // degrees["pp"]
    if stage % ep:
        fits = [d for d in range(1, stage + 1) if stage % d == 0]
        raise ValueError(f"ep {ep} does not divide the {stage} ranks of a pipeline stage; it can be {fits}")
