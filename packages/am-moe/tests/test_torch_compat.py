"""What the package takes from torch beyond its public names still means what it did."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode

from am_moe._torch_compat import (
    all_gather,
    axis,
    by_argument,
    end_forward,
    group_of,
    in_backward,
    is_getter,
    is_unsharded,
    needs_numbers,
    operator_name,
    python_functions,
    reduce_as_asked,
    reduce_scatter,
    reduce_unused,
    side_by_side,
    unit_key,
    unit_parameters,
    writes,
    written_arguments,
)
from am_moe._torch_compat_fakes import fake_mode, is_fake, storage_key
from am_testkit.device import device_type


def test_a_backward_is_told_from_a_forward():
    seen = []

    class Look(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            seen.append(in_backward())
            return x.clone()

        @staticmethod
        def backward(ctx, *gradients):
            seen.append(in_backward())
            return gradients[0]

    Look.apply(torch.ones(2, requires_grad=True)).sum().backward()
    assert seen == [False, True]
    assert not in_backward()


@pytest.mark.ranks(2)
def test_a_group_is_found_by_its_name():
    group = dist.new_group([0, 1])
    assert group_of(group.group_name) is group


@pytest.mark.ranks(4)
def test_an_axis_and_a_flattened_one_are_one_mesh_with_the_groups_they_had():
    mesh = init_device_mesh(device_type(), (2, 1, 2), mesh_dim_names=("copies", "data", "context"))
    flat = mesh["data", "context"]._flatten("data_context")
    both = side_by_side(mesh["copies"], flat)
    assert both.mesh.tolist() == [[0, 1], [2, 3]]
    assert both.mesh_dim_names == ("copies", "data_context")
    assert both.get_group("data_context") is flat.get_group()
    assert both.get_group("copies") is mesh.get_group("copies")


@pytest.mark.ranks(2)
def test_tensors_are_gathered_and_summed_in_one_piece_without_a_warning():
    mine = torch.full((2,), float(dist.get_rank() + 1))
    whole, part = torch.empty(4), torch.empty(2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        all_gather(whole, mine)
        reduce_scatter(part, whole)
    assert whole.tolist() == [1.0, 1.0, 2.0, 2.0]
    assert part.tolist() == [2.0 * (dist.get_rank() + 1)] * 2


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


def test_writes_to_a_tensor_are_counted():
    tensor = torch.zeros(2)
    before = writes(tensor)
    tensor.add_(1)
    assert writes(tensor) > before


@pytest.mark.ranks(4)
def test_an_axis_is_found_by_its_name_whether_flattened_or_not():
    mesh = init_device_mesh(device_type(), (2, 2), mesh_dim_names=("data", "context"))
    flat = mesh["data", "context"]._flatten("both")
    assert axis(mesh, "data").get_group() is mesh.get_group("data")
    assert axis(mesh, "both").get_group() is flat.get_group()
    assert axis(mesh, "tensor") is None
    assert axis(None, "data") is None


@pytest.mark.ranks(2)
def test_parameters_that_a_rank_did_not_use_are_reduced_as_zeros():
    class Either(nn.Module):
        def __init__(self):
            super().__init__()
            self.choices = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])

        def forward(self, x):
            return self.choices[dist.get_rank()](x)

    unit = Either()
    fully_shard(unit, mesh=init_device_mesh(device_type(), (2,)))
    if not hasattr(unit, "set_reduce_scatter_unused_params"):
        with pytest.raises(ValueError, match=r"use torch 2\.13 or newer"):
            reduce_unused(unit)
        return
    reduce_unused(unit)
    unit(torch.ones(1, 2)).sum().backward()
    for parameter in unit.parameters():
        assert parameter.grad.full_tensor().eq(0.5).all()


def test_a_torch_that_cannot_reduce_what_is_unused_is_told():
    class Old(nn.Module):
        pass

    with pytest.raises(ValueError, match=r"Old may use other parameters on each rank, .* use torch 2\.13 or newer"):
        reduce_unused(Old())


def test_fake_tensors_have_shapes_and_no_numbers():
    with fake_mode():
        tensor = torch.empty(2, 3)
        assert is_fake(tensor)
        assert is_fake(tensor + torch.ones(3))
        assert tuple((tensor @ tensor.mT).shape) == (2, 2)
        with pytest.raises(Exception) as error:  # noqa: PT011  the type is torch's own
            tensor.sum().item()
    assert needs_numbers(error.value)
    assert not needs_numbers(ValueError("another"))
    assert not is_fake(torch.ones(2))


def test_views_share_the_identity_of_their_memory():
    tensor = torch.ones(4)
    assert storage_key(tensor) == storage_key(tensor[1:]) != storage_key(tensor.clone())


def test_an_operator_says_what_it_is_given_and_what_it_writes_into():
    one, two = torch.ones(2), torch.ones(2)
    add = torch.ops.aten.add_.Tensor
    given = by_argument(add, (one, two), {"alpha": 2})
    assert given == {"self": one, "other": two, "alpha": 2}
    assert written_arguments(add, given) == [one]
    assert operator_name(add) == "add_"
    assert written_arguments(torch.ops.aten.add.Tensor, given) == []


def test_functions_in_python_are_found_behind_a_tensor():
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, gradient):
            return 2 * gradient

    x = torch.ones(2, requires_grad=True)
    y, seen = Twice.apply(x * 3).exp(), set()
    assert python_functions([y.sum(), x], seen) == [Twice]
    assert python_functions([y], seen) == []
    assert python_functions([(x * 3).exp(), torch.ones(1)], set()) == []


def test_a_look_at_an_attribute_of_a_tensor_is_seen():
    class See(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append((is_getter(func, "grad_fn"), is_getter(func, "shape"), func.__name__))
            return func(*args, **(kwargs or {}))

    seen, x = [], torch.ones(1, requires_grad=True) * 2
    with See():
        _ = x.grad_fn, x.shape
        x.register_hook(print)
    assert seen[:2] == [(True, False, "__get__"), (False, True, "__get__")]
    assert seen[2] == (False, False, "register_hook")
