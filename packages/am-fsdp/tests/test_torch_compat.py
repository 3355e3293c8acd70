"""What `_torch_compat` takes from torch's private names, against what tensors really hold."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from am_fsdp._torch_compat import (
    end_forward,
    foreach_norm,
    foreach_scale_,
    gathered_parameters,
    has_gradient_hooks,
    is_unsharded,
    local_box,
    reduce_as_asked,
    stay_gathered_after_forward,
    unit_key,
    unit_parameters,
    writes,
)
from am_testkit.device import device_type

LAYOUTS = [(Shard(0), Shard(0)), (Shard(0), Replicate()), (Shard(1), Shard(0)), (Replicate(), Shard(1))]


def assert_box_is_local(tensor, values):
    box = local_box(tensor)
    assert values[tuple(slice(*ends) for ends in box)].equal(tensor.to_local())


@pytest.mark.ranks(4)
def test_the_box_of_a_shard_holds_the_values_of_the_shard_where_sizes_do_not_divide_either():
    mesh = init_device_mesh(device_type(), (2, 2), mesh_dim_names=("dp", "tp"))
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
    mesh = init_device_mesh(device_type(), (2,))
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


@pytest.mark.ranks(2)
def test_the_private_state_of_units_is_still_there():
    first, second, third = (nn.Linear(4, 4) for _ in range(3))
    model = nn.Sequential(first, second, third)
    mesh = init_device_mesh(device_type(), (2,))
    fully_shard([first, second], mesh=mesh, reshard_after_forward=False)
    for module in (third, model):
        fully_shard(module, mesh=mesh)
    assert unit_key(first) == unit_key(second) != unit_key(third)
    assert unit_parameters(model) == []
    shards = [shard for _, shard, _ in unit_parameters(first)]
    assert all(mine is theirs for mine, theirs in zip(shards, [*first.parameters(), *second.parameters()], strict=True))
    assert [(name, whole) for name, _, whole in unit_parameters(third)] == [("weight", None), ("bias", None)]
    with torch.no_grad():
        model(torch.ones(1, 4))
    assert is_unsharded(first)
    assert not is_unsharded(third)
    assert all(any(p is whole for _, _, whole in unit_parameters(first)) for p in second.parameters())
    end_forward(first)
    with torch.no_grad():
        first(torch.ones(1, 4))  # of a unit of two modules FSDP2 waits for the other
    end_forward(first)
    assert not is_unsharded(first)
    assert all(isinstance(p, DTensor) for p in model.parameters())


@pytest.mark.ranks(2)
def test_a_unit_that_was_frozen_at_first_reduces_as_its_policy_says_once_it_is_trained():
    mesh, policy = init_device_mesh(device_type(), (2,)), MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    model = fully_shard(nn.Linear(4, 4).requires_grad_(False), mesh=mesh, mp_policy=policy)
    reduce_as_asked(model)  # before torch has looked
    model(torch.ones(1, 4))
    model.reshard()
    model.requires_grad_(True)
    reduce_as_asked(model)
    model(torch.ones(1, 4)).sum().backward()
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.ranks(2)
def test_gathered_parameters_of_any_model_are_known_by_identity():
    model = fully_shard(nn.Linear(4, 4), mesh=init_device_mesh(device_type(), (2,)))
    assert not gathered_parameters() & {id(p) for p in model.parameters()}
    undo = stay_gathered_after_forward(model)
    model(torch.ones(1, 4))
    undo()
    assert {id(p) for p in model.parameters()} <= gathered_parameters()
    model.reshard()
    assert not gathered_parameters()


@pytest.mark.parametrize("order", [2.0, math.inf])
def test_norms_of_many_tensors_are_float64_and_scaling_is_in_place(order):
    tensors = [torch.full((3,), 2.0), torch.full((4,), -1.0)]
    norms = foreach_norm(tensors, order)
    assert all(n.dtype == torch.float64 for n in norms)
    assert torch.stack(norms).tolist() == [torch.linalg.vector_norm(t.double(), order).item() for t in tensors]
    foreach_scale_(tensors, torch.tensor(0.5))
    assert [t[0].item() for t in tensors] == [1.0, -0.5]
