"""Ranks that are threads: what they compute is what one process does, and no thread is ever left waiting."""

from __future__ import annotations

import random
import threading

import pytest
import torch
from torch import nn
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import PrepareModuleInput

from am_testkit.device import device_type
from am_tp_styles import ColwiseParallelLora, RowwiseParallelLora, SequenceParallelLora
from am_tp_styles.communication import gather, scatter_sum, split, sum_gradients, sum_over_ranks
from am_tp_styles.edges import NeedsRealRanksError
from am_tp_styles.simulated import ExchangeError, on_simulated_ranks, shard_on_simulated_rank

STYLES = {"0": ColwiseParallelLora(), "2": RowwiseParallelLora()}
GATHERED = {"0": ColwiseParallelLora(output_layouts=Replicate()), "2": RowwiseParallelLora(input_layouts=Replicate())}


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 6), nn.LayerNorm(6)).double()


def loss_and_gradients(model, x):
    loss = model(x).square().sum()
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("styles", [STYLES, GATHERED])
def test_a_layer_on_simulated_ranks_is_that_of_one_process(ranks, styles):
    torch.manual_seed(1)
    x = torch.randn(2, 4, 6, dtype=torch.float64)

    def work(axis):
        model, parts = mlp(), {}
        layouts = {
            f"{name}.{leaf}": placement
            for name, style in styles.items()
            for leaf, placement in shard_on_simulated_rank(model.get_submodule(name), style, axis, parts).items()
        }
        return (*loss_and_gradients(model, x), layouts)

    loss, expected = loss_and_gradients(mlp(), x)
    results = on_simulated_ranks(ranks, work)
    for name, gradient in expected.items():
        placement = results[0][2].get(name, Replicate())
        theirs = [gradients[name] for _, gradients, _ in results]
        if isinstance(placement, Shard):
            torch.testing.assert_close(torch.cat(theirs, placement.dim), gradient, rtol=1e-12, atol=1e-13)
        else:
            assert all(torch.allclose(mine, gradient, rtol=1e-12, atol=1e-13) for mine in theirs), name
    assert all(torch.allclose(theirs, loss, rtol=1e-13) for theirs, _, _ in results)


def test_a_sequence_is_split_normed_and_gathered():
    torch.manual_seed(1)
    x = torch.randn(2, 6, 6, dtype=torch.float64)
    norm = nn.LayerNorm(6).double()

    def work(axis):
        mine, hidden = nn.LayerNorm(6).double(), x.clone().requires_grad_()
        shard_on_simulated_rank(mine, SequenceParallelLora(use_local_output=True), axis, {})
        out = gather(mine(split(hidden, axis, 1)), axis, 1)
        out.square().sum().backward()
        return out.detach(), mine.weight.grad, hidden.grad

    whole = x.clone().requires_grad_()
    norm(whole).square().sum().backward()
    for out, weight, hidden in on_simulated_ranks(3, work):
        for mine, expected in ((out, norm(x)), (weight, norm.weight.grad), (hidden, whole.grad)):
            torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-13)


def test_rows_go_to_their_ranks_and_a_sent_tensor_may_be_written_at_once():
    def work(axis):
        rows = torch.full((5, 2), float(axis.rank))
        sends = [2, 3] if axis.rank == 0 else [4, 1]
        received = axis.all_to_all(rows, [2, 4] if axis.rank == 0 else [3, 1], sends)
        total = axis.all_reduce(rows)
        largest = axis.all_reduce(rows, "max")
        rows.fill_(100)
        return received[:, 0].tolist(), total[0, 0].item(), largest[0, 0].item(), scatter(rows, axis)

    def scatter(rows, axis):
        return scatter_sum(rows, axis, 0).shape[0]

    first, second = on_simulated_ranks(2, work)
    assert first == ([0, 0, 1, 1, 1, 1], 1, 1, 3)
    assert second == ([0, 0, 0, 1], 1, 1, 2)


def test_an_error_of_one_rank_ends_the_others():
    def fails(axis):
        if axis.rank == 1:
            raise KeyError("only here")
        return axis.all_reduce(torch.ones(2))

    def fails_in_backward(axis):
        x = torch.ones(2, requires_grad=True)
        y = sum_gradients(x, axis) * (2 if axis.rank else 1)
        if axis.rank:
            y.register_hook(lambda gradient: 1 / 0)
        y.sum().backward()

    alive = threading.active_count()
    with pytest.raises(KeyError, match="only here"):
        on_simulated_ranks(3, fails)
    with pytest.raises(ZeroDivisionError):
        on_simulated_ranks(2, fails_in_backward)
    assert threading.active_count() == alive


@pytest.mark.parametrize(
    "other", [lambda axis, x: None, lambda axis, x: axis.all_gather(x, 0), lambda axis, x: axis.all_reduce(x[:1])]
)
def test_ranks_that_exchange_different_things_or_one_less_are_an_error(other):
    def work(axis):
        x = torch.ones(2)
        return axis.all_reduce(x) if axis.rank == 0 else other(axis, x)

    with pytest.raises(ExchangeError, match="sum of"):
        on_simulated_ranks(2, work)
    with pytest.raises(ExchangeError, match=r"along dim 0 make \(4,\)"):
        on_simulated_ranks(2, lambda axis: axis.all_gather(torch.ones(2), 0, whole=3))


def test_each_rank_draws_numbers_of_its_own_as_one_process_would_and_the_callers_are_left():
    def work(axis):
        first = torch.rand(3)
        sum_over_ranks(torch.ones(1), axis)
        more = torch.rand(5) if axis.rank else None
        sum_over_ranks(torch.ones(1), axis)
        return torch.cat([first, torch.rand(2)]), more

    torch.manual_seed(5)
    before, python = torch.get_rng_state(), random.getstate()
    first, second = on_simulated_ranks(2, work)
    assert torch.get_rng_state().equal(before)
    assert random.getstate() == python
    expected = torch.rand(10, generator=torch.Generator().manual_seed(0))
    assert first[0].equal(expected[:5])
    assert second[0].equal(expected[[0, 1, 2, 8, 9]])


def test_modes_of_the_caller_do_not_reach_the_ranks_and_stay():
    with torch.no_grad(), torch.device("meta"), torch.autocast(device_type(), dtype=torch.bfloat16):
        results = on_simulated_ranks(
            2, lambda axis: (torch.ones(1).device.type, torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"))
        )
        assert torch.ones(1).is_meta
        assert not torch.is_grad_enabled()
    assert results == [("cpu", True, False)] * 2


def test_what_needs_a_mesh_of_real_ranks_says_so():
    class OwnForward(nn.Linear):
        def forward(self, x):
            return nn.functional.linear(x, self.weight)

    def apply(module, style):
        return on_simulated_ranks(2, lambda axis: shard_on_simulated_rank(module, style, axis, {}))

    for module, style in (
        (OwnForward(4, 4), ColwiseParallelLora()),
        (nn.Linear(4, 4), PrepareModuleInput(input_layouts=Replicate(), desired_input_layouts=Replicate())),
    ):
        with pytest.raises(NeedsRealRanksError, match="computes on DTensors in a"):
            apply(module, style)
