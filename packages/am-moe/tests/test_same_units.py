"""`apply_fsdp` on ranks that would run other layers, or normalise over other rows, than each other."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from am_moe import apply_fsdp
from am_testkit.device import device_type
from am_testkit.exact import assert_same, gradients


class Stacked(nn.Module):
    def __init__(self, skips=False):
        super().__init__()
        self.skips = skips
        self.enter, self.norm = nn.Linear(4, 8), nn.BatchNorm1d(8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x):
        skipped = (0 if x[0, 0] > 0 else 1) if self.skips else None
        x = self.norm(self.enter(x).tanh())
        for place, layer in enumerate(self.layers):
            x = x if place == skipped else layer(x).tanh()
        return x


def sharded(model):
    mesh = init_device_mesh(device_type(), (dist.get_world_size(),), mesh_dim_names=("dp",))
    apply_fsdp(model, mesh, ep_enabled=False, ep_shard_enabled=False)
    return model


def rows():
    """Four: the first number is positive on the first of two ranks, and negative on the second."""
    x = torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x[0, 0], x[2, 0] = 1, -1
    return x


@pytest.mark.ranks(2)
def test_ranks_that_skip_other_layers_are_refused():
    with pytest.raises(ValueError, match=r"some ranks are at layers\.0 and others at layers\.1"):
        sharded(Stacked(skips=True).double())(rows().chunk(2)[dist.get_rank()])


@pytest.mark.ranks(2)
def test_batch_norms_use_the_rows_of_all_ranks():
    torch.manual_seed(0)
    one, model = Stacked().double(), Stacked().double()
    model.load_state_dict(one.state_dict())
    sharded(model)
    one(rows()).square().mean().backward()
    model(rows().chunk(2)[dist.get_rank()]).square().mean().backward()
    assert_same(gradients(model), gradients(one), 1e-10, "gradients")
    assert_same(dict(model.named_buffers()), dict(one.named_buffers()), 1e-10, "statistics")
