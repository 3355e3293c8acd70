"""The styles on a GPU, over NCCL and through Triton; `nox -s gpu` runs it."""

from __future__ import annotations

import copy
import itertools
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import parallelize_module

from am_testkit.exact import assert_same
from am_tp_styles import ColwiseParallelLora, RowwiseParallelLora, SequenceParallelLora, use_tp_linear

sys.path.insert(0, str(Path(__file__).parent))
from lora_layers import LoraLinear

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICE = "cuda"


class Block(nn.Module):
    def __init__(self, **adapter):
        super().__init__()
        self.norm = nn.LayerNorm(64, dtype=torch.float64)
        self.up = LoraLinear(64, 96, rank=8, **adapter)
        self.down = LoraLinear(96, 64, rank=8, **adapter)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(self.norm(x))))


def build(sequence, dtype, **adapter):
    torch.manual_seed(0)
    reference = nn.Sequential(Block(**adapter), Block(**adapter)).to(DEVICE, dtype)
    model = copy.deepcopy(reference)
    between = Shard(1) if sequence else Replicate()
    plan = {
        "*.up": ColwiseParallelLora(input_layouts=between),
        "*.down": RowwiseParallelLora(output_layouts=between),
    }
    if sequence:
        plan["*.norm"] = SequenceParallelLora(use_local_output=True)
    parallelize_module(model, init_device_mesh(DEVICE, (1,), mesh_dim_names=("tp",)), plan)
    return reference, use_tp_linear(model)


# The layer with DoRA calls F.linear itself, which neither symbolic sizes nor, before torch 2.13, sequence shards bear.
@pytest.mark.parametrize(
    ("mode", "sequence", "dora"),
    [
        *itertools.product(["eager", "inductor", "dynamic"], [False, True], [False]),
        *itertools.product(["eager", "inductor"], [False], [True]),
    ],
)
@pytest.mark.ranks(1, timeout=300)
def test_adapters_train_as_without_a_mesh(mode, sequence, dora):
    reference, model = build(sequence, torch.float64, dora=dora)
    run = model if mode == "eager" else torch.compile(model, dynamic=mode == "dynamic")
    for shape in [(2, 16, 64), (3, 24, 64)] if mode == "dynamic" else [(2, 16, 64)]:
        x = torch.randn(shape, dtype=torch.float64, device=DEVICE)
        expected, out = reference(x), run(x)
        assert_same(out, expected, 1e-12, "outputs")
        for each, result in ((reference, expected), (model, out)):
            each.zero_grad()
            result.square().mean().backward()
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert set(found) == {name for name, p in reference.named_parameters() if p.grad is not None}
        assert any("lora_A" in name for name in found)
        assert_same(found, {name: reference.get_parameter(name).grad for name in found}, 1e-10, "gradients")


@pytest.mark.ranks(1, timeout=300)
def test_a_compiled_step_in_bfloat16_is_as_near_to_exact_as_the_plain_one():
    exact, _ = build(False, torch.float64)
    plain, model = build(False, torch.bfloat16)
    x = torch.randn(4, 32, 64, device=DEVICE)
    wanted = exact(x.double())
    errors = [((run(x.bfloat16()) - wanted).norm() / wanted.norm()).item() for run in (plain, torch.compile(model))]
    assert errors[1] < 2 * errors[0] < 0.1
