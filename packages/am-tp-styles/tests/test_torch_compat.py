"""When one of these fails, torch has moved something private that `_torch_compat.py` stands on."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from am_testkit.device import device_type
from am_tp_styles._torch_compat import (
    FLATTENS_SHARDED_DIMS,
    all_gather,
    all_reduce,
    all_to_all,
    base_of_view,
    exchanged_tensors,
    finished,
    has_gradient_hooks,
    is_compiled,
    kept_as_sharded,
    local_of,
    reduce_scatter,
    spec_of,
    with_spec,
)


def test_tensors_are_exchanged_for_the_length_of_a_block_even_when_it_raises():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.BatchNorm1d(2, affine=False))
    before, seen = dict(model.state_dict(keep_vars=True)), []

    def view(name, tensor):
        seen.append(name)
        return torch.zeros_like(tensor)

    with exchanged_tensors(model, view):
        assert not model[0].weight.any()
        assert not model(torch.ones(3, 2)).any()
    with pytest.raises(RuntimeError), exchanged_tensors(model, view):
        model(torch.ones(3, 5))
    assert seen == [*before, *before]
    assert all(model.state_dict(keep_vars=True)[name] is tensor for name, tensor in before.items())


@pytest.mark.ranks(2)
def test_a_running_collective_is_waited_for_and_its_gradient_passes():
    mesh = init_device_mesh(device_type(), (2,))
    x = torch.ones(4, requires_grad=True)
    summed = DTensor.from_local(x, mesh, [Partial()]).redistribute(placements=[Replicate()], async_op=True).to_local()
    assert type(summed) is not torch.Tensor
    done = finished(summed)
    assert type(done) is torch.Tensor
    (3 * done).sum().backward()
    assert done.tolist() == [2.0] * 4
    assert x.grad.tolist() == [3.0] * 4
    assert finished(x) is x


@pytest.mark.ranks(2)
def test_the_gradient_of_an_uneven_shard_stays_a_shard_whatever_its_strides_are():
    mesh = init_device_mesh(device_type(), (2,))
    weight = nn.Parameter(distribute_tensor(torch.ones(2, 5), mesh, [Shard(1)]))
    weight.register_hook(lambda gradient: kept_as_sharded(gradient, weight))
    (weight.to_local().t() * torch.arange(2.0)).sum().backward()
    assert weight.grad.placements == (Shard(1),)
    assert weight.grad.full_tensor().tolist() == [[0.0] * 5, [1.0] * 5]


@pytest.mark.ranks(2)
def test_whether_a_linear_flattens_a_sharded_sequence_is_known():
    mesh = init_device_mesh(device_type(), (2,))
    weight = DTensor.from_local(torch.ones(3, 3), mesh, [Replicate()])
    x = DTensor.from_local(torch.ones(2, 2, 3), mesh, [Shard(1)])
    if FLATTENS_SHARDED_DIMS:
        assert nn.functional.linear(x, weight).placements == (Shard(1),)
    else:
        with pytest.raises(RuntimeError, match="flatten"):
            nn.functional.linear(x, weight)


@pytest.mark.ranks(2)
def test_a_dtensor_is_taken_apart_and_put_together_without_dispatch():
    mesh = init_device_mesh(device_type(), (2,))
    weight = distribute_tensor(torch.arange(10.0).view(5, 2), mesh, [Shard(0)])
    part = local_of(weight)
    assert torch.equal(part, weight.to_local())
    again = with_spec(part + 1, spec_of(weight))
    assert (again.shape, again.placements, again.device_mesh) == (weight.shape, weight.placements, mesh)
    assert torch.equal(again.full_tensor(), torch.arange(10.0).view(5, 2) + 1)


@pytest.mark.ranks(2)
def test_the_operators_under_functional_collectives_take_a_groups_name_and_return_plain_tensors():
    mesh = init_device_mesh(device_type(), (2,))
    group, rank = mesh.get_group().group_name, mesh.get_local_rank()
    mine = torch.tensor([1.0, 2.0]) + rank
    assert all_reduce(mine, "sum", group).tolist() == [3, 5]
    assert all_reduce(mine, "max", group).tolist() == [2, 3]
    assert all_gather(mine, 2, group).tolist() == [1, 2, 2, 3]
    assert reduce_scatter(mine, 2, group).tolist() == [3 if rank == 0 else 5]
    assert all_to_all(mine, [1, 1], [1, 1], group).tolist() == ([1, 2] if rank == 0 else [2, 3])
    assert type(all_reduce(mine, "sum", group)) is torch.Tensor


def test_the_base_of_a_view_is_the_tensor_itself_with_what_was_laid_on_it():
    base = torch.ones(2, 3, requires_grad=True) * 2
    base.laid = 1
    assert base_of_view(base[:, 0:]).laid == 1
    assert base_of_view(base) is None


def test_a_module_tells_whether_it_was_compiled():
    layer = nn.Linear(2, 2)
    assert not is_compiled(layer)
    layer.compile(backend="eager")
    assert is_compiled(layer)


def test_hooks_on_the_gradient_of_a_parameter_are_seen():
    one, two, three = (nn.Parameter(torch.ones(2)) for _ in range(3))
    one.register_hook(lambda gradient: gradient)
    two.register_post_accumulate_grad_hook(lambda parameter: None)
    assert [has_gradient_hooks(p) for p in (one, two, three)] == [True, True, False]
