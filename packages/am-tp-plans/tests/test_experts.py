"""Stacked experts over a tensor axis, whoever is chosen."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from am_testkit.device import device_type
from am_testkit.exact import assert_same, gradients
from am_testkit.models import tiny
from am_tp_plans import ExpertsOverTensorAxis


@pytest.mark.parametrize("implementation", ["eager", "batched_mm"])
@pytest.mark.parametrize("chosen", [0, 7])
@pytest.mark.ranks(2)
def test_a_rank_whose_experts_nobody_chose_trains_with_the_others(chosen, implementation):
    """Its output depends on nothing, and its backward has to take part in the sums all the same."""
    model = tiny("mixtral", layers=1)
    model.set_experts_implementation(implementation)
    one = model.model.layers[0].mlp.experts
    experts = copy.deepcopy(one)
    experts.config = one.config
    ExpertsOverTensorAxis()._apply(experts, init_device_mesh(device_type(), (2,)))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 32, dtype=torch.float64, generator=generator)
    weights = torch.rand(5, 2, dtype=torch.float64, generator=generator)
    ids = torch.full((5, 2), chosen)
    results = []
    for each in (experts, one):
        inputs = [nn.Parameter(x.clone()), nn.Parameter(weights.clone())]
        out = each(inputs[0], ids, inputs[1])
        out.square().sum().backward()
        results.append([out, *(i.grad for i in inputs)])
    for actual, expected in zip(*results, strict=True):
        assert_same(actual, expected, 1e-10)
    for parameter in one.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    assert_same(gradients(experts), gradients(one), 1e-10)
    dist.barrier()
