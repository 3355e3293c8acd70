"""What `_torch_compat` takes from torch's private names, against what tensors really hold."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from am_fsdp._torch_compat import has_gradient_hooks, local_box, writes

LAYOUTS = [(Shard(0), Shard(0)), (Shard(0), Replicate()), (Shard(1), Shard(0)), (Replicate(), Shard(1))]


def assert_box_is_local(tensor, values):
    box = local_box(tensor)
    assert values[tuple(slice(*ends) for ends in box)].equal(tensor.to_local())


@pytest.mark.ranks(4)
def test_the_box_of_a_shard_holds_the_values_of_the_shard_where_sizes_do_not_divide_either():
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    for size in (1, 2, 3, 5, 7, 8, 10):
        values = torch.arange(size * 6.0).view(size, 6)
        for layout in LAYOUTS:
            assert_box_is_local(distribute_tensor(values, mesh, layout), values)
        for dim in (0, 1):
            linear = nn.Linear(6, size, bias=False)
            linear.weight = nn.Parameter(distribute_tensor(values, mesh["tp"], [Shard(dim)]))
            fully_shard(linear, mesh=mesh["dp"])
            assert_box_is_local(linear.weight, values)
        replicated = nn.Linear(6, size, bias=False)
        replicated.weight = nn.Parameter(values.clone())
        fully_shard(replicated, mesh=mesh)
        assert_box_is_local(replicated.weight, values)


@pytest.mark.ranks(2)
def test_a_shard_in_several_pieces_has_no_box():
    mesh = init_device_mesh("cpu", (2,))
    pieces = DTensor.from_local(torch.ones(4, 2), mesh, [_StridedShard(0, split_factor=2)])
    with pytest.raises(ValueError, match="are not in one piece"):
        local_box(pieces)


def test_hooks_and_writes_are_noticed():
    one, two, three = (nn.Parameter(torch.ones(2)) for _ in range(3))
    one.register_hook(lambda gradient: gradient)
    two.register_post_accumulate_grad_hook(lambda parameter: None)
    assert [has_gradient_hooks(p) for p in (one, two, three)] == [True, True, False]
    count = writes(three)
    with torch.no_grad():
        three.copy_(torch.zeros(2))
    assert writes(three) > count
