from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from am_testkit.device import device_type
from am_testkit.exact import assert_same, gradients
from am_tp_styles import TPLinear, restore_classes, use_tp_linear
from am_tp_styles._torch_compat import FLATTENS_SHARDED_DIMS


class Mlp(nn.Module):
    def __init__(self, *, bias):
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Linear(8, 12, bias=bias, dtype=torch.float64)
        self.down = nn.Linear(12, 8, bias=bias, dtype=torch.float64)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


def swapped(model):
    for linear in (model.up, model.down):
        linear.__class__ = TPLinear
    return model


def step(model, x):
    model.zero_grad()
    out = model(x)
    out.square().sum().backward()
    return out


@pytest.mark.parametrize("shape", [(8,), (3, 8), (2, 3, 8), (2, 3, 4, 8), (2, 1, 3, 4, 8), (0, 3, 8)])
@pytest.mark.parametrize("bias", [False, True])
def test_with_plain_weights_it_computes_what_nn_linear_computes(shape, bias):
    torch.manual_seed(1)
    reference, x = Mlp(bias=bias), torch.randn(*shape, dtype=torch.float64)
    model = swapped(copy.deepcopy(reference))
    expected, out = step(reference, x), step(model, x)
    assert_same(out, expected, 1e-12)
    assert_same(gradients(model), gradients(reference), 1e-12)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_with_sharded_weights_it_is_exact_for_every_number_of_dims(bias, sequence_parallel):
    torch.manual_seed(1)
    reference = Mlp(bias=bias)
    model = swapped(copy.deepcopy(reference))
    parallelize_module(model, init_device_mesh(device_type(), (2,)), plan(sequence_parallel))
    for shape in [(4, 8), (2, 4, 8), (2, 4, 3, 8)]:
        if sequence_parallel and len(shape) == 2:
            continue
        x = torch.randn(*shape, dtype=torch.float64)
        expected, out = step(reference, x), step(model, local_part(x, sequence_parallel))
        assert_same(out, local_part(expected, sequence_parallel), 1e-10)
        assert_same(gradients(model), gradients(reference), 1e-10)


def plan(sequence_parallel):
    if not sequence_parallel:
        return {"up": ColwiseParallel(), "down": RowwiseParallel()}
    return {"up": ColwiseParallel(input_layouts=Shard(1)), "down": RowwiseParallel(output_layouts=Shard(1))}


def local_part(x, sequence_parallel):
    if not sequence_parallel:
        return x
    return x.chunk(2, dim=1)[torch.distributed.get_rank()]


@pytest.mark.ranks(2, timeout=120)
@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("shapes", [[(2, 4, 8), (3, 6, 8)], [(2, 4, 3, 8), (3, 6, 2, 8)]], ids=["3d", "4d"])
def test_it_compiles_with_dynamic_shapes_and_sharded_weights(sequence_parallel, shapes):
    torch.manual_seed(1)
    reference = Mlp(bias=True)
    model = swapped(copy.deepcopy(reference))
    parallelize_module(model, init_device_mesh(device_type(), (2,)), plan(sequence_parallel))
    compiled = torch.compile(model, backend="aot_eager", dynamic=True)
    for shape in shapes:
        x = torch.randn(*shape, dtype=torch.float64)
        reference.zero_grad()
        model.zero_grad()
        expected = reference(x)
        expected.square().sum().backward()
        out = compiled(local_part(x, sequence_parallel).contiguous())
        out.square().sum().backward()
        assert_same(out, local_part(expected, sequence_parallel), 1e-10)
        assert_same(gradients(model), gradients(reference), 1e-10)


@pytest.mark.ranks(2, timeout=120)
def test_a_sharded_nn_linear_recurses_under_compile_and_tp_linear_does_not():
    """When the first part fails, torch has learnt to compile a sharded `nn.Linear`, and `TPLinear` may retire."""
    reference = Mlp(bias=False)
    model = copy.deepcopy(reference)
    parallelize_module(
        model, init_device_mesh(device_type(), (2,)), {"up": ColwiseParallel(), "down": RowwiseParallel()}
    )
    x = torch.randn(2, 4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    recurses = pytest.raises(Exception, match=r"(?i)recursion") if FLATTENS_SHARDED_DIMS else nullcontext()
    with recurses:  # not before torch 2.13
        torch.compile(model, backend="aot_eager", dynamic=True)(x).sum().backward()

    torch._dynamo.reset()
    use_tp_linear(model).zero_grad()
    torch.compile(model, backend="aot_eager", dynamic=True)(x).sum().backward()
    reference(x).sum().backward()
    assert_same(gradients(model), gradients(reference), 1e-10)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_use_tp_linear_reaches_subclasses_keeps_what_they_are_and_is_undone():
    torch.manual_seed(1)
    own = nn.Linear(8, 8)
    own.__class__ = TPLinear
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(Doubled(8, 8)), own)
    hooked = []
    model[0].register_forward_hook(lambda *_: hooked.append(1))
    names, before, x = list(model.state_dict()), [type(m) for m in model.modules()], torch.randn(2, 3, 8)
    expected = model(x)

    assert use_tp_linear(model) is model
    assert use_tp_linear(model)  # twice is once
    assert all(isinstance(model.get_submodule(name), TPLinear) for name in ("0", "1.0", "2"))
    assert isinstance(model[1][0], Doubled)
    assert [type(m).__name__ for m in model.modules()] == [cls.__name__ for cls in before]
    assert list(model.state_dict()) == names
    assert_same(model(x), expected, 1e-6)

    assert restore_classes(model) is model
    assert [type(m) for m in model.modules()] == before
    assert_same(model(x), expected, 0.0)
    assert len(hooked) == 3


@pytest.mark.ranks(2)
def test_an_output_that_is_gathered_comes_back_whole():
    torch.manual_seed(1)
    reference = nn.Linear(8, 12, dtype=torch.float64)
    model = copy.deepcopy(reference)
    model.__class__ = TPLinear
    parallelize_module(model, init_device_mesh(device_type(), (2,)), ColwiseParallel(output_layouts=Replicate()))
    x = torch.randn(2, 4, 8, dtype=torch.float64)
    assert_same(model(x), reference(x), 1e-12)
