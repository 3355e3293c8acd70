"""What the package takes from torch beyond its public names still means what it did."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from am_moe._torch_compat import group_of, in_backward


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
