"""Why fused weights lie in plain rows: what torch's own placement for parts of parts cannot do yet.

A test here that fails says that it can, and `PackedColwiseParallel` may then keep a rank's part of each projection.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from am_testkit.device import device_type
from am_tp_plans.styles.fused import _share

PARTS = 3
WEIGHT = torch.arange(24.0).view(12, 2)


def in_parts(mesh):
    """A fused weight of three projections, of each of which a rank holds its part."""
    return distribute_tensor(WEIGHT, mesh, [_StridedShard(0, split_factor=PARTS)])


@pytest.mark.skipif(tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13), reason="seen with torch 2.13")
@pytest.mark.ranks(2)
def test_on_one_axis_a_strided_shard_is_a_rank_s_part_of_each_projection():
    weight = in_parts(init_device_mesh(device_type(), (2,)))
    assert torch.equal(weight.to_local(), WEIGHT[_share([4] * PARTS, 2, dist.get_rank())])
    assert torch.equal(weight.full_tensor(), WEIGHT)


@pytest.mark.ranks(2)
def test_a_checkpoint_takes_a_strided_shard_for_one_run_of_rows(tmp_path_factory):
    folder = [str(tmp_path_factory.mktemp("checkpoint"))]
    dist.broadcast_object_list(folder)
    read = {"weight": torch.zeros_like(WEIGHT)}
    try:
        dcp.save({"weight": in_parts(init_device_mesh(device_type(), (2,)))}, checkpoint_id=folder[0])
        dcp.load(read, checkpoint_id=folder[0])
    except dcp.api.CheckpointException:  # torch refuses what it takes for overlapping rows
        return
    assert not torch.equal(read["weight"], WEIGHT)


@pytest.mark.ranks(4)
def test_under_fsdp_a_strided_shard_is_lost():
    mesh = init_device_mesh(device_type(), (2, 2), mesh_dim_names=("dp", "tp"))
    linear = nn.Linear(2, 12, bias=False)
    linear.weight = nn.Parameter(in_parts(mesh["tp"]))
    try:
        fully_shard(linear, mesh=mesh["dp"])
        whole = linear.weight.full_tensor()
    except Exception:  # a torch that refuses it, as it should
        return
    assert not torch.equal(whole, WEIGHT)
