"""Every style trains under `torch.compile` as it does in eager mode, which is as one process does."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import parallelize_module

from am_testkit.device import device_type
from am_testkit.exact import assert_same
from am_tp_styles import ColwiseParallelLora, RowwiseParallelLora, SequenceParallelLora, use_tp_linear

sys.path.insert(0, str(Path(__file__).parent))
from lora_layers import LoraLinear


class Block(nn.Module):
    def __init__(self, up, down):
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.up = up(8, 12)
        self.down = down(12, 8)

    def forward(self, x):
        return self.down(torch.tanh(self.up(self.norm(x))))  # no residual: the block itself meets the boundary


class Network(nn.Module):
    def __init__(self, up, down):
        super().__init__()
        self.tokens = nn.Embedding(11, 8)
        self.layers = nn.ModuleList([Block(up, down)])
        self.head = nn.Linear(8, 6)

    def forward(self, ids):
        x = self.tokens(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def build(adapters, sequence):
    """One process's network, and its copy on two ranks; `adapters` says which form `up` and `down` have."""
    torch.manual_seed(0)
    reference = Network(*(LoraLinear if form == "own" else nn.Linear for form in adapters)).double()
    if "peft" in adapters:
        names = [name for name, form in zip(("up", "down"), adapters, strict=True) if form == "peft"]
        get_peft_model(reference, LoraConfig(r=3, target_modules=[*names, "tokens"], bias="all"))
        reference.double()
        for name, parameter in reference.named_parameters():
            nn.init.normal_(parameter, std=0.3) if "lora_" in name else parameter.requires_grad_("norm" in name)
    model = copy.deepcopy(reference)
    between = Shard(1) if sequence else Replicate()
    plan = {
        "tokens": RowwiseParallelLora(input_layouts=Replicate(), output_layouts=between),
        "layers.*.up": ColwiseParallelLora(input_layouts=between),
        "layers.*.down": RowwiseParallelLora(output_layouts=between),
        "head": ColwiseParallelLora(input_layouts=between, output_layouts=Replicate()),
    }
    if sequence:
        plan["layers.*.norm"] = SequenceParallelLora(use_local_output=True)
    parallelize_module(model, init_device_mesh(device_type(), (2,)), plan)
    return reference, use_tp_linear(model)


def assert_trains_alike(reference, model, run, shapes):
    for shape in shapes:
        torch.manual_seed(len(shape))
        ids = torch.randint(0, 11, shape)
        expected, out = reference(ids), run(ids)
        assert_same(out, expected, 1e-10)
        for each, result in ((reference, expected), (model, out)):
            each.zero_grad()
            result.square().sum().backward()
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert set(found) == {name for name, p in reference.named_parameters() if p.grad is not None}
        assert_same(found, {name: reference.get_parameter(name).grad for name in found}, 1e-10)


def compiled(model, whole_model, **options):
    if whole_model:
        return torch.compile(model, **options)
    for layer in model.layers:  # the embedding stays eager
        layer.compile(**options)
    return model


@pytest.mark.ranks(2, timeout=120)
@pytest.mark.parametrize(
    ("adapters", "sequence", "whole_model", "dynamic"),
    [
        (("none", "none"), True, True, False),
        (("none", "none"), False, False, True),
        (("own", "peft"), False, True, True),
        (("peft", "own"), True, False, True),
    ],
)
def test_whole_models_and_single_layers_compile(adapters, sequence, whole_model, dynamic):
    shapes = [(2, 4), (3, 6)] if sequence or whole_model else [(2, 4), (7,)]
    reference, model = build(adapters, sequence)
    assert_trains_alike(reference, model, model, shapes)
    run = compiled(model, whole_model, backend="aot_eager", dynamic=dynamic)
    assert_trains_alike(reference, model, run, shapes if dynamic else shapes[1:])


@pytest.mark.ranks(2, timeout=240)
def test_inductor_compiles_the_styles_too():
    reference, model = build(("peft", "peft"), sequence=False)
    assert_trains_alike(reference, model, compiled(model, False, dynamic=True), [(2, 4), (3, 5)])
    torch._dynamo.reset()
    reference, model = build(("none", "none"), sequence=True)
    assert_trains_alike(reference, model, compiled(model, False, dynamic=False), [(2, 4)])


@pytest.mark.ranks(2, timeout=120)
def test_dropout_of_an_adapter_compiles_and_its_masks_agree_between_ranks():
    layer = use_tp_linear(
        parallelize_module(_peft_linear(), init_device_mesh(device_type(), (2,)), RowwiseParallelLora())
    )
    run = torch.compile(layer, backend="aot_eager", dynamic=True)
    x = torch.ones(2, 4, 4, dtype=torch.float64)
    torch.manual_seed(3)
    out = run(x)
    out.sum().backward()
    mine = torch.cat([out.detach().flatten(), torch.get_rng_state().double()])
    everyone = [torch.empty_like(mine) for _ in range(2)]
    dist.all_gather(everyone, mine)
    assert torch.equal(everyone[0], everyone[1])
    torch.manual_seed(3)
    assert_same(out, layer(x), 1e-12)
    with pytest.raises(AssertionError, match="differ"):
        assert_same(out, layer.eval()(x), 1e-3)


def _peft_linear():
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), LoraConfig(r=3, target_modules=["0"], lora_dropout=0.5))
    layer = model.base_model.model[0].double()
    nn.init.normal_(layer.lora_B["default"].weight)
    return layer
