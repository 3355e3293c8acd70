"""What the styles communicate: an adapter adds nothing of the size of an activation."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import parallelize_module
from torch.utils._python_dispatch import TorchDispatchMode

from am_testkit.device import device_type
from am_tp_styles import ColwiseParallelLora, RowwiseParallelLora

sys.path.insert(0, str(Path(__file__).parent))
from lora_layers import LoraLinear

STYLES = {
    "up": lambda sequence: ColwiseParallelLora(input_layouts=Shard(1) if sequence else Replicate()),
    "down": lambda sequence: RowwiseParallelLora(output_layouts=Shard(1) if sequence else Replicate()),
}
GATHER, SCATTER, REDUCE = "all_gather_into_tensor", "reduce_scatter_tensor", "all_reduce"
# The base layer's own: forward, backward. The gradient of the adapter's replicated factor is one all-reduce more.
BASE = {
    ("up", False): ({}, {REDUCE: 1}),
    ("down", False): ({REDUCE: 1}, {}),
    ("up", True): ({GATHER: 1}, {SCATTER: 1}),
    ("down", True): ({SCATTER: 1}, {GATHER: 1}),
}


def counted(call):
    with CommDebugMode() as mode:
        result = call()
    return result, {str(op).rpartition(".")[2]: n for op, n in mode.get_comm_counts().items() if n}


def own(**options):
    torch.manual_seed(0)
    return LoraLinear(8, 8, bias=True, **options)


def peft(**options):
    torch.manual_seed(0)
    if options.pop("dora", False):
        options["use_dora"] = True
    model = get_peft_model(nn.Sequential(nn.Linear(8, 8)).double(), LoraConfig(r=3, target_modules=["0"], **options))
    return model.base_model.model[0].double()


@pytest.mark.ranks(2)
@pytest.mark.parametrize("make", [own, peft])
@pytest.mark.parametrize(("name", "sequence"), BASE)
def test_an_adapter_adds_one_sum_of_a_factors_gradient_and_none_of_an_activation(name, sequence, make):
    forward, backward = BASE[name, sequence]
    shape = (2, 4, 4) if name == "down" else (2, 2 if sequence else 4, 8)
    x = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    layer = parallelize_module(make(), init_device_mesh(device_type(), (2,)), STYLES[name](sequence))
    for trained in (False, True):
        for key, parameter in layer.named_parameters():
            parameter.requires_grad_(trained and "lora_" in key)
        out, found = counted(lambda: layer(x))
        assert found == forward
        _, found = counted(lambda out=out: out.sum().backward())
        extra = {REDUCE: backward.get(REDUCE, 0) + 1} if trained else {}
        assert found == {**backward, **extra}


@pytest.mark.ranks(2)
def test_rowwise_dora_adds_a_sum_of_the_size_of_a_vector():
    layer = parallelize_module(peft(dora=True), init_device_mesh(device_type(), (2,)), RowwiseParallelLora())
    x = torch.randn(2, 4, 4, dtype=torch.float64)
    with Sums() as sums:
        layer(x)
    assert sorted(sums.sizes) == [8, 2 * 4 * 8]


class Sums(TorchDispatchMode):
    """How many elements each all-reduce has. (`CommDebugMode` loses its way in DoRA's nested calls.)"""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function._schema.name == "_c10d_functional::all_reduce":
            self.sizes.append(args[0].numel())
        return function(*args, **(kwargs or {}))


@pytest.mark.ranks(2)
def test_a_bias_of_lora_b_is_added_once():
    mesh = init_device_mesh(device_type(), (2,))
    reference = own()
    reference.lora_B = nn.Linear(3, 8, dtype=torch.float64)
    layer = parallelize_module(copy.deepcopy(reference), mesh, RowwiseParallelLora(input_layouts=Replicate()))
    x = torch.randn(2, 4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    out, found = counted(lambda: layer(x))
    torch.testing.assert_close(out, reference(x))
    assert found == {REDUCE: 2}
