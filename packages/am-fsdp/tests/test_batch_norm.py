"""Batch norms under data parallelism: statistics, outputs and gradients of all rows, as in one process."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from am_fsdp import fsdp2_strategy_parallelize
from am_testkit.device import device_type
from am_testkit.exact import assert_same, gradients, relative_error, whole
from am_testkit.heads import small_for


class Convolved(nn.Module):
    def __init__(self, momentum=0.1, affine=True):
        super().__init__()
        self.enter = nn.Linear(6, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.norms = nn.ModuleList(nn.BatchNorm1d(8, momentum=momentum, affine=affine) for _ in range(2))
        self.leave = nn.Linear(8, 3)

    def forward(self, x):
        x = self.enter(x)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = norm(layer(x).tanh().mT).mT
        return self.leave(x)


def data_mesh(hybrid=False):
    sizes, names = ((2, 2), ("replicas", "data_parallel")) if hybrid else ((dist.get_world_size(),), ("data_parallel",))
    return init_device_mesh(device_type(), sizes, mesh_dim_names=names)


def statistics(model):
    return {n: b.double() for n, b in model.named_buffers() if "running" in n or "num_batches" in n}


@pytest.mark.ranks(2)
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("settings", [{}, {"momentum": None}, {"affine": False}])
def test_batch_norms_use_the_rows_of_all_ranks(settings, recompute):
    torch.manual_seed(0)
    one, model = Convolved(**settings).double(), Convolved(**settings).double()
    model.load_state_dict(one.state_dict())
    fsdp2_strategy_parallelize(model, data_mesh(), torch.float64, activation_checkpointing=recompute)
    for step in range(3):
        x = torch.randn(6, 5 + step, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        mine = x.chunk(2)[dist.get_rank()]
        expected, output = one(x), model(mine)
        assert_same(output.detach(), expected.detach().chunk(2)[dist.get_rank()], 1e-10, "output")
        expected.square().mean().backward()
        output.square().mean().backward()
        assert_same(gradients(model), gradients(one), 1e-10, f"step {step}")
    assert_same(statistics(model), statistics(one), 1e-10, "statistics")
    assert_same(model.eval()(mine).detach(), one.eval()(mine).detach(), 1e-10, "evaluation")


@pytest.mark.ranks(4)
def test_of_replicas_too():
    torch.manual_seed(0)
    one, model = Convolved().double(), Convolved().double()
    model.load_state_dict(one.state_dict())
    fsdp2_strategy_parallelize(model, data_mesh(hybrid=True), torch.float64, dp_mesh_name=("replicas", "data_parallel"))
    x = torch.randn(8, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    one(x).square().mean().backward()
    model(x.chunk(4)[dist.get_rank()]).square().mean().backward()
    assert_same(gradients(model), gradients(one), 1e-10, "gradients")


@pytest.mark.ranks(2)
@pytest.mark.parametrize("family", ["resnet", "levit"])
def test_classifiers_of_transformers_train_as_in_one_process(family):
    torch.manual_seed(0)
    one = small_for("image", family, torch.float64).train()
    for module in one.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model = small_for("image", family, torch.float64).train()
    model.load_state_dict(one.state_dict())
    fsdp2_strategy_parallelize(model, data_mesh(), torch.float64)
    size = getattr(one.config, "image_size", 32)
    x = torch.randn(4, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    one(x).logits.square().mean().backward()
    model(x.chunk(2)[dist.get_rank()]).logits.square().mean().backward()
    wanted = {n: p.grad for n, p in one.named_parameters() if p.grad is not None}
    largest = max(g.abs().max().item() for g in wanted.values())
    for name, parameter in model.named_parameters():
        if name in wanted:
            assert relative_error(whole(parameter.grad), wanted[name], 1e-6 * largest) < 1e-8, name
    assert_same(statistics(model), statistics(one), 1e-10, "statistics")


class OfItsOwn(nn.BatchNorm1d):
    def forward(self, x):
        return super().forward(x) * 2


@pytest.mark.ranks(2)
def test_a_batch_norm_with_a_forward_of_its_own_is_refused_before_anything_is_sharded():
    model = Convolved()
    model.norms[1] = OfItsOwn(8)
    before = dict(model.named_parameters())
    with pytest.raises(ValueError, match=r"norms\.1 is a OfItsOwn, whose forward normalises over the rows of one rank"):
        fsdp2_strategy_parallelize(model, data_mesh())
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
