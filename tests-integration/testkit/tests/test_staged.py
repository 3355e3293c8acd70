"""The group that lets ranks share a GPU gives what gloo gives; here its tensors are on the CPU."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._functional_collectives import all_reduce, all_to_all_single
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

import am_testkit.staged
from am_testkit.exact import assert_same, gradients


def numbers(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(dist.get_rank()))


def reduced(op):
    def run(group):
        tensor = numbers(3, 2)
        dist.all_reduce(tensor, op, group=group)
        return tensor

    return run


def broadcast(group):
    tensor = numbers(5)
    dist.broadcast(tensor, 1, group=group)
    return tensor


def gathered(group):
    parts = [torch.empty(2, 3) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, numbers(2, 3), group=group)
    return torch.stack(parts)


def to_the_first(group):
    parts = [torch.empty(3) for _ in range(dist.get_world_size())] if dist.get_rank() == 0 else None
    dist.gather(numbers(3), parts, 0, group=group)
    return torch.stack(parts) if parts else torch.zeros(1)


def from_the_first(group):
    out, ranks = torch.empty(3), dist.get_world_size()
    dist.scatter(out, list(numbers(ranks, 3)) if dist.get_rank() == 0 else None, 0, group=group)
    return out


def reduced_to_the_last(group):
    tensor, last = numbers(4), dist.get_world_size() - 1
    dist.reduce(tensor, last, group=group)
    return tensor if dist.get_rank() == last else torch.zeros(1)


def exchanged(group):
    """Rank r sends r + p rows to rank p."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    sizes = [rank + other for other in range(ranks)]
    out = torch.empty(sum(sizes), 2)
    dist.all_to_all_single(out, numbers(sum(sizes), 2), sizes, sizes, group=group)
    return out


def passed_on(group):
    rank, ranks = dist.get_rank(), dist.get_world_size()
    out = torch.empty(3)
    receive = dist.P2POp(dist.irecv, out, (rank - 1) % ranks, group)
    for work in dist.batch_isend_irecv([receive, dist.P2POp(dist.isend, numbers(3), (rank + 1) % ranks, group)]):
        work.wait()
    return out


def objects(group):
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, {"rank": dist.get_rank()}, group=group)
    return torch.tensor([each["rank"] for each in found])


def functional(group):
    ranks = dist.get_world_size()
    whole = all_reduce(numbers(ranks, 3), "sum", group)
    return all_to_all_single(whole * dist.get_rank(), None, None, group) + 0


COLLECTIVES = {
    "sum": reduced(dist.ReduceOp.SUM),
    "largest": reduced(dist.ReduceOp.MAX),
    "broadcast": broadcast,
    "all-gather": gathered,
    "gather": to_the_first,
    "scatter": from_the_first,
    "reduce": reduced_to_the_last,
    "all-to-all": exchanged,
    "messages": passed_on,
    "objects": objects,
    "functional": functional,
}


@pytest.mark.ranks(3)
def test_every_collective_gives_what_gloo_gives():
    gloo, staged = dist.new_group(backend="gloo"), dist.new_group(backend=am_testkit.staged.NAME)
    for name, collective in COLLECTIVES.items():
        assert torch.equal(collective(staged), collective(gloo)), name
    dist.barrier(group=staged)


@pytest.mark.ranks(2)
def test_means_and_scaled_sums_which_gloo_has_not():
    staged = dist.new_group(backend=am_testkit.staged.NAME)
    total = reduced(dist.ReduceOp.SUM)(staged)
    assert torch.equal(reduced(dist.ReduceOp.AVG)(staged), total / 2)
    out, both = torch.empty(2), numbers(4)
    wanted = both.clone()
    dist.all_reduce(wanted, group=staged)
    dist.reduce_scatter_tensor(out, both, dist.ReduceOp.AVG, group=staged)
    assert torch.equal(out, wanted.chunk(2)[dist.get_rank()] / 2)


@pytest.mark.ranks(2)
def test_fsdp2_trains_over_it():
    torch.manual_seed(0)
    one = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    x = torch.randn(4, 4, dtype=torch.float64)
    one(x).square().mean().backward()
    wanted = gradients(one)
    mesh = DeviceMesh.from_group(dist.new_group(backend=am_testkit.staged.NAME), "cpu", mesh_dim_names=("dp",))
    fully_shard(one[0], mesh=mesh)
    fully_shard(one, mesh=mesh)
    one.zero_grad()
    one(x.chunk(2)[dist.get_rank()]).square().mean().backward()
    assert_same(gradients(one), wanted, 1e-12, "gradients")
