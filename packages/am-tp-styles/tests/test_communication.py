"""What the ranks exchange is right forward, backward and twice backward, also compiled; an axis copies and pickles."""

from __future__ import annotations

import copy
import gc
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import RowwiseParallel, parallelize_module

from am_testkit.device import device_type
from am_testkit.exact import assert_same, gradients
from am_tp_styles import translate_to_lora
from am_tp_styles.axis import MeshAxis, part_of
from am_tp_styles.communication import (
    gather,
    gather_for_shares,
    once,
    scatter_sum,
    split,
    sum_gradients,
    sum_gradients_in_order,
    sum_over_ranks,
)
from am_tp_styles.edges import gather_for_all_readers
from am_tp_styles.layer_parameters import exchange, note_local


def axis():
    return MeshAxis(init_device_mesh(device_type(), (dist.get_world_size(),), mesh_dim_names=("tp",)))


class WithItsOwnForward(nn.Linear):
    def forward(self, x):
        return x @ self.weight.T


@pytest.mark.ranks(2)
def test_a_model_may_write_into_what_a_sharded_layer_returns():
    """As Falcon, whose linears have a forward of their own, adds its attention to the output of its MLP, in place."""
    torch.manual_seed(0)
    one = nn.ModuleDict({"down": WithItsOwnForward(4, 3, bias=False)}).double()
    mesh, plan = init_device_mesh(device_type(), (2,)), {"down": translate_to_lora(RowwiseParallel())}
    both = parallelize_module(copy.deepcopy(one), mesh, plan)
    x = torch.randn(2, 4, dtype=torch.float64)
    for model, given in ((one, x), (both, x.chunk(2, -1)[dist.get_rank()])):
        out = model["down"](given)
        out += out.detach().square()
        out.square().sum().backward()
    assert_same(gradients(both), gradients(one), 1e-12, "gradients")


@pytest.mark.ranks(2)
def test_nothing_of_a_graph_outlives_it():
    """A tensor with a view of itself beside it was kept, with the graph behind it, for good."""
    over = axis()
    exchanges = [
        lambda x: sum_gradients(x, over),
        lambda x: sum_over_ranks(x, over),
        lambda x: split(x, over, 0),
        lambda x: gather(x, over, 0),
        lambda x: scatter_sum(x, over, 0),
        lambda x: gather_for_shares(x, over, 0),
        lambda x: gather_for_all_readers(over, 0, x),
        lambda x: sum_gradients_in_order(over, x, x * 2),
        lambda x: once(x, over),
    ]
    before = of_graphs()
    for each in exchanges:
        out = each(torch.ones(4, requires_grad=True) * 2)
        sum(tensor.sum() for tensor in (out if isinstance(out, tuple) else (out,))).backward()
        del out
        assert any(of_graphs() <= before for _ in range(5))  # a work that is not quite over holds one a little longer


def of_graphs():
    """How many tensors there are that know how they came about."""
    gc.collect()
    return sum(isinstance(found, torch.Tensor) and found.grad_fn is not None for found in gc.get_objects())


def share(axis, seed):
    """Each rank's own weights of a share of the features, and everyone's."""
    torch.manual_seed(seed)
    everyone = [torch.randn(5, dtype=torch.float64) for _ in range(axis.size)]
    return everyone[axis.rank], everyone


def by_share(axis, x_SD, mine):
    """A nonlinear function of a whole `x`, computed by shares and summed."""
    shared = sum_gradients(x_SD, axis)
    return sum_over_ranks((shared * mine).sin(), axis)


def by_share_along_sequence(axis, x_SD, mine):
    part = split(x_SD, axis, 0)
    whole = gather_for_shares(part.square().sqrt() * part.sign(), axis, 0)
    return gather(scatter_sum((whole * mine).sin(), axis, 0), axis, 0)


@pytest.mark.ranks(2, timeout=120)
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("function", [by_share, by_share_along_sequence])
def test_values_gradients_and_gradients_of_gradients_are_those_of_one_process(function, compiled):
    ranks = axis()
    mine, everyone = share(ranks, 1)
    torch.manual_seed(0)
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    expected = sum((x * weights).sin() for weights in everyone)
    run = torch.compile(function, fullgraph=True, backend="aot_eager") if compiled else function

    out = run(ranks, x, mine)
    torch.testing.assert_close(out, expected)
    (found,) = torch.autograd.grad(out.pow(3).sum(), x, create_graph=not compiled)
    (gradient,) = torch.autograd.grad(expected.pow(3).sum(), x, create_graph=True)
    torch.testing.assert_close(found, gradient)
    if not compiled:
        (twice,) = torch.autograd.grad(found.square().sum(), x)
        torch.testing.assert_close(twice, torch.autograd.grad(gradient.square().sum(), x)[0])


@pytest.mark.ranks(4)
@pytest.mark.parametrize("whole", [8, 7, 5])
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_parts_of_different_sizes_are_gathered_split_and_summed(whole, dim):
    ranks = axis()
    shape = [3, 2]
    shape.insert(dim % 3, whole)
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    mine = split(x, ranks, dim)
    assert mine.shape[dim] == part_of(whole, ranks)[1]
    assert torch.equal(ranks.all_gather(mine, dim, whole), x)
    assert torch.equal(gather(mine, ranks, dim, whole), x)
    summed = scatter_sum(x * (ranks.rank + 1), ranks, dim)
    torch.testing.assert_close(summed, 10 * mine)
    (mine * (ranks.rank + 1)).sum().backward()
    assert torch.equal(split(x.grad, ranks, dim), torch.full_like(mine, ranks.rank + 1))


@pytest.mark.ranks(2)
def test_a_sum_may_be_modified_in_place_and_rows_go_to_their_ranks():
    ranks = axis()
    x = torch.ones(3, requires_grad=True)
    out = sum_over_ranks(x, ranks)
    out.mul_(3)
    out.sum().backward()
    assert out.tolist() == [6.0] * 3
    assert x.grad.tolist() == [3.0] * 3
    assert ranks.all_reduce(torch.tensor([float(ranks.rank)]), "max").item() == 1
    rows = ranks.all_to_all(torch.tensor([10 * ranks.rank, 10 * ranks.rank + 1, 10 * ranks.rank + 2]), *_counts(ranks))
    assert rows.tolist() == ([0, 10, 11] if ranks.rank == 0 else [1, 2, 12])


def _counts(ranks):
    return ([1, 2], [1, 2]) if ranks.rank == 0 else ([2, 1], [2, 1])


@pytest.mark.ranks(1)
def test_an_axis_of_one_rank_sends_nothing_and_an_axis_copies_and_pickles():
    ranks = axis()
    x = torch.ones(3)
    assert all(same is x for same in (sum_gradients(x, ranks), gather(x, ranks, 0), scatter_sum(x, ranks, 0)))
    assert copy.deepcopy(ranks) is ranks
    again = pickle.loads(pickle.dumps(ranks))
    assert (again.size, again.rank, again.mesh) == (1, 0, ranks.mesh)
    with pytest.raises(ValueError, match="one dimension"):
        MeshAxis(init_device_mesh(device_type(), (1, 1), mesh_dim_names=("dp", "tp")))


@pytest.mark.ranks(2)
def test_gradients_are_summed_in_the_models_order_whatever_order_a_rank_notes_them_in():
    """As two processes that hash strings differently note a set of names."""
    over, module = axis(), nn.LayerNorm(4)
    names = ["weight", "bias"] if dist.get_rank() else ["bias", "weight"]
    note_local(module, dict.fromkeys(names, True))
    weight, bias = module.weight, module.bias
    exchange([module], over, summed_only=True)
    (module.weight * 2 + module.bias * 3).sum().backward()
    assert weight.grad.equal(torch.full((4,), 4.0))
    assert bias.grad.equal(torch.full((4,), 6.0))
