"""When one of these fails, torch has moved something private that `_torch_compat.py` stands on."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from am_tp_styles._torch_compat import FLATTENS_SHARDED_DIMS, exchanged_tensors, finished, kept_as_sharded


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
    mesh = init_device_mesh("cpu", (2,))
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
    mesh = init_device_mesh("cpu", (2,))
    weight = nn.Parameter(distribute_tensor(torch.ones(2, 5), mesh, [Shard(1)]))
    weight.register_hook(lambda gradient: kept_as_sharded(gradient, weight))
    (weight.to_local().t() * torch.arange(2.0)).sum().backward()
    assert weight.grad.placements == (Shard(1),)
    assert weight.grad.full_tensor().tolist() == [[0.0] * 5, [1.0] * 5]


@pytest.mark.ranks(2)
def test_whether_a_linear_flattens_a_sharded_sequence_is_known():
    mesh = init_device_mesh("cpu", (2,))
    weight = DTensor.from_local(torch.ones(3, 3), mesh, [Replicate()])
    x = DTensor.from_local(torch.ones(2, 2, 3), mesh, [Shard(1)])
    if FLATTENS_SHARDED_DIMS:
        assert nn.functional.linear(x, weight).placements == (Shard(1),)
    else:
        with pytest.raises(RuntimeError, match="flatten"):
            nn.functional.linear(x, weight)
