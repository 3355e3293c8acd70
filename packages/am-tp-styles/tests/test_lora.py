from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module

from am_testkit.device import device_type
from am_testkit.exact import assert_same, gradients
from am_tp_styles import ColwiseParallelLora, RowwiseParallelLora, SequenceParallelLora, translate_to_lora
from am_tp_styles._torch_compat import FLATTENS_SHARDED_DIMS

sys.path.insert(0, str(Path(__file__).parent))
from lora_layers import Block, LoraLinear

TOLERANCE = 1e-10


def one_step(model, x, target):
    out = model(x)
    ((out - target) ** 2).sum().backward()
    return out


def batch(*shape, seed=1):
    torch.manual_seed(seed)
    x = torch.randn(*shape, 8, dtype=torch.float64, requires_grad=True)
    return x, torch.randn(*shape, 8, dtype=torch.float64)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("shape", [(4,), (2, 4)])
def test_colwise_and_rowwise_lora_give_the_gradients_of_one_process(dora, frozen, shape):
    reference = Block(LoraLinear, dora=dora, frozen=frozen)
    model = copy.deepcopy(reference)
    x, target = batch(*shape)
    expected = one_step(reference, x, target)
    x_grad, x.grad = x.grad, None

    plan = {"up": ColwiseParallelLora(), "down": RowwiseParallelLora()}
    parallelize_module(model, init_device_mesh(device_type(), (2,)), plan)
    out = one_step(model, x, target)

    assert_same(out, expected, TOLERANCE)
    assert_same(gradients(model), gradients(reference), TOLERANCE)
    assert_same(x.grad, x_grad, TOLERANCE)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == reference.get_parameter(name).requires_grad
        if parameter.grad is not None:
            assert parameter.grad.placements == parameter.placements, name
    assert model.state_dict().keys() == reference.state_dict().keys()


@pytest.mark.ranks(2)
@pytest.mark.parametrize("dora", [False, True])
def test_lora_styles_under_sequence_parallel_layouts_give_the_gradients_of_one_process(dora):
    reference = Block(LoraLinear, dora=dora, frozen=False)
    model = copy.deepcopy(reference)
    x, target = batch(2, 4)
    expected = one_step(reference, x, target)

    mesh = init_device_mesh(device_type(), (2,))
    plan = {
        "up": ColwiseParallelLora(input_layouts=Shard(1)),
        "down": RowwiseParallelLora(output_layouts=Shard(1), use_local_output=False),
    }
    parallelize_module(model, mesh, plan)
    shard = distribute_tensor(x.detach(), mesh, [Shard(1)])
    out = model(shard)
    ((out - distribute_tensor(target, mesh, [Shard(1)])) ** 2).sum().full_tensor().backward()

    assert out.placements == (Shard(1),)
    assert_same(out, expected, TOLERANCE)
    assert_same(gradients(model), gradients(reference), TOLERANCE)


@pytest.mark.ranks(2)
@pytest.mark.parametrize(
    "make", [lambda: LoraLinear(8, 8), lambda: LoraLinear(8, 8, dora=True), lambda: nn.LayerNorm(8)]
)
def test_sequence_parallel_lora_reduces_the_gradients_of_its_replicated_parameters(make):
    torch.manual_seed(0)
    reference = make().double()
    if hasattr(reference, "lora_magnitude") and not FLATTENS_SHARDED_DIMS:
        pytest.skip("its forward calls nn.functional.linear, which takes no sharded sequence before torch 2.13")
    model = copy.deepcopy(reference)
    x, target = batch(2, 4)
    one_step(reference, x, target)

    mesh = init_device_mesh(device_type(), (2,))
    parallelize_module(model, mesh, SequenceParallelLora())
    shard = distribute_tensor(x.detach(), mesh, [Shard(1)])
    out = model(shard.to_local())
    ((out - distribute_tensor(target, mesh, [Shard(1)])) ** 2).sum().full_tensor().backward()

    assert out.placements == (Shard(1),)
    assert_same(gradients(model), gradients(reference), TOLERANCE)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == reference.get_parameter(name).requires_grad
        if parameter.grad is not None:
            assert parameter.grad.placements == (Replicate(),), name


@pytest.mark.ranks(2)
@pytest.mark.parametrize("style", [ColwiseParallelLora, RowwiseParallelLora, SequenceParallelLora])
def test_weights_come_from_the_source_rank_unless_it_is_none(style):
    torch.manual_seed(dist.get_rank())
    model = LoraLinear(8, 8, dora=True)
    mine = copy.deepcopy(model.state_dict())
    torch.manual_seed(1)
    of_rank_one = LoraLinear(8, 8, dora=True).state_dict()
    mesh = init_device_mesh(device_type(), (2,))

    parallelize_module(model, mesh, style(), src_data_rank=1)
    assert_same(model.state_dict(), of_rank_one, 0.0)

    torch.manual_seed(dist.get_rank())
    model = LoraLinear(8, 8, dora=True)
    parallelize_module(model, mesh, style(), src_data_rank=None)
    for name, tensor in model.state_dict().items():
        own = distribute_tensor(mine[name], mesh, tensor.placements, src_data_rank=None).to_local()
        assert torch.equal(tensor.to_local(), own), name


@pytest.mark.ranks(2)
def test_gradients_stay_whole_after_the_parameters_were_exchanged_by_to_empty():
    reference = Block(LoraLinear, frozen=False)
    with torch.device("meta"):
        model = Block(LoraLinear, frozen=False)
    mesh = init_device_mesh(device_type(), (2,))
    parallelize_module(model, mesh, {"up": ColwiseParallelLora(), "down": RowwiseParallelLora()})
    model.to_empty(device=device_type())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(distribute_tensor(reference.get_parameter(name), mesh, parameter.placements))
    x, target = batch(2, 4)

    one_step(reference, x, target)
    one_step(model, x, target)

    assert_same(gradients(model), gradients(reference), TOLERANCE)
    assert model.up.lora_A.weight.grad.placements == (Replicate(),)


@pytest.mark.ranks(2)
def test_a_linear_without_an_adapter_and_an_embedding_work_as_with_the_torch_styles():
    torch.manual_seed(0)
    reference = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 6), nn.Linear(6, 8)).double()
    ids = torch.randint(0, 10, (2, 4))
    mesh = init_device_mesh(device_type(), (2,))
    reference(ids).square().sum().backward()
    for style in (
        ColwiseParallelLora(output_layouts=Replicate()),
        RowwiseParallelLora(input_layouts=Replicate(), output_layouts=Replicate()),
    ):
        model = copy.deepcopy(reference)
        model.zero_grad()
        parallelize_module(model, mesh, {"0": style, "1": ColwiseParallelLora(), "2": RowwiseParallelLora()})
        model(ids).square().sum().backward()
        assert_same(gradients(model), gradients(reference), TOLERANCE)


@pytest.mark.ranks(1)
def test_another_adapter_layout_is_refused_by_name():
    model = nn.Linear(8, 8)
    model.lora_A = nn.ModuleDict({"default": nn.Linear(8, 2)})
    model.lora_B = nn.ModuleDict({"default": nn.Linear(2, 8)})
    with pytest.raises(TypeError, match=r"Linear\.lora_A is a ModuleDict.*peft"):
        parallelize_module(model, init_device_mesh(device_type(), (1,)), ColwiseParallelLora())


@pytest.mark.ranks(2)
def test_dropout_of_an_adapter_draws_the_masks_of_one_process():
    reference = Block(LoraLinear, dropout=0.4)
    model = copy.deepcopy(reference)
    x, target = batch(2, 4)
    plan = {"up": ColwiseParallelLora(), "down": RowwiseParallelLora()}
    parallelize_module(model, init_device_mesh(device_type(), (2,)), plan)
    torch.manual_seed(5)
    expected = one_step(reference, x, target)
    torch.manual_seed(5)
    assert_same(one_step(model, x, target), expected, TOLERANCE)
    assert_same(gradients(model), gradients(reference), TOLERANCE)


@pytest.mark.ranks(4)
def test_uneven_features_and_vocabularies_are_exact_or_refused_before_any_collective():
    torch.manual_seed(0)
    mesh = init_device_mesh(device_type(), (4,))
    reference = nn.Sequential(nn.Embedding(11, 10), nn.Linear(10, 13)).double()
    ids = torch.randint(0, 11, (2, 4))
    expected = reference(ids)
    expected.square().sum().backward()
    gathered = {"input_layouts": Replicate(), "output_layouts": Replicate()}
    for embedding in (RowwiseParallelLora(**gathered), ColwiseParallelLora(**gathered)):
        model = copy.deepcopy(reference)
        model.zero_grad()
        parallelize_module(model, mesh, {"0": embedding, "1": ColwiseParallelLora(output_layouts=Replicate())})
        out = model(ids)
        out.square().sum().backward()
        assert_same(out, expected, TOLERANCE)
        assert_same(gradients(model), gradients(reference), TOLERANCE)
    if dist.get_rank() == 0:  # alone: a collective would hang
        with pytest.raises(ValueError, match=r"in_features=13 does not divide over 4 ranks"):
            parallelize_module(nn.Linear(13, 8), mesh, RowwiseParallelLora())
        with pytest.raises(ValueError, match=r"out_features=5 leaves one of 4 ranks without a share"):
            parallelize_module(nn.Linear(8, 5), mesh, ColwiseParallelLora())
        packed = nn.Linear(8, 8)
        packed.weight = nn.Parameter(torch.zeros(16, 4))
        with pytest.raises(ValueError, match=r"weight has shape \(16, 4\), not \(8, 8\)"):
            parallelize_module(packed, mesh, ColwiseParallelLora())


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.tokens = nn.Embedding(10, 8, padding_idx=7, dtype=torch.float64)
        self.head = nn.Linear(8, 10, bias=False, dtype=torch.float64)
        self.head.weight = self.tokens.weight

    def forward(self, ids):
        return self.head(torch.tanh(self.tokens(ids)))


@pytest.mark.ranks(2)
def test_tied_weights_stay_one_parameter_or_are_refused():
    reference, ids = Tied(), torch.tensor([[1, 7, 3], [9, 0, 7]])
    model = copy.deepcopy(reference)
    mesh = init_device_mesh(device_type(), (2,))
    tokens = RowwiseParallelLora(input_layouts=Replicate())
    parallelize_module(model, mesh, {"tokens": tokens, "head": ColwiseParallelLora(output_layouts=Replicate())})
    assert model.head.weight is model.tokens.weight
    assert [name for name, _ in model.named_parameters()] == ["tokens.weight"]
    for each in (reference, model):
        each(ids).square().sum().backward()
    assert_same(gradients(model), gradients(reference), TOLERANCE)

    model = copy.deepcopy(reference)
    parallelize_module(model, mesh, {"tokens": RowwiseParallelLora(input_layouts=Replicate())})
    with pytest.raises(ValueError, match=r"Linear\.weight is tied to .* Shard\(dim=0\)|S\(0\) already"):
        parallelize_module(model.head, mesh, RowwiseParallelLora())


class _GatheredNorm(SequenceParallel):
    @staticmethod
    def _prepare_output_fn(use_local_output, mod, outputs, device_mesh):
        return outputs.redistribute(placements=[Replicate()]).to_local()


@pytest.mark.ranks(2)
def test_a_translated_subclass_keeps_its_own_behaviour_and_its_gradients_become_whole():
    torch.manual_seed(0)
    reference = nn.LayerNorm(8).double()
    model = copy.deepcopy(reference)
    x, target = batch(2, 4)
    expected = one_step(reference, x, target)
    mesh = init_device_mesh(device_type(), (2,))

    parallelize_module(model, mesh, translate_to_lora(_GatheredNorm()))
    out = one_step(model, distribute_tensor(x.detach(), mesh, [Shard(1)]).to_local(), target)

    assert not isinstance(out, DTensor)
    assert_same(out, expected, TOLERANCE)
    assert_same(gradients(model), gradients(reference), TOLERANCE)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("rank", [1, 3])
def test_a_translated_plan_trains_an_adapter_of_any_rank(rank):
    reference = Block(LoraLinear, rank=rank)
    model = copy.deepcopy(reference)
    x, target = batch(2, 4)
    one_step(reference, x, target)
    plan = translate_to_lora({"up": ColwiseParallel(), "down": RowwiseParallel()})
    parallelize_module(model, init_device_mesh(device_type(), (2,)), plan)
    one_step(model, x, target)
    assert_same(gradients(model), gradients(reference), TOLERANCE)
    assert Partial() not in model.up.lora_A.weight.grad.placements


@pytest.mark.ranks(2)
def test_a_partition_function_called_by_hand_shards_the_module_that_it_is_given_under_any_name():
    mesh = init_device_mesh(device_type(), (2,))
    for name in ("", "proj", "layers.0.proj"):
        for style, make, placement in (
            (ColwiseParallelLora(), lambda: nn.Linear(8, 8), Shard(0)),
            (RowwiseParallelLora(), lambda: nn.Linear(8, 8), Shard(1)),
            (ColwiseParallelLora(), lambda: nn.Embedding(8, 8), Shard(1)),
            (RowwiseParallelLora(), lambda: nn.Embedding(8, 8), Shard(0)),
        ):
            torch.manual_seed(0)
            layer = make()
            before = layer.weight.detach().clone()
            partition = style._partition_linear_fn if isinstance(layer, nn.Linear) else style._partition_embedding_fn
            partition(name, layer, mesh)
            assert layer.weight.placements == (placement,), (name, style)
            assert layer.weight.full_tensor().equal(before)
        norm = nn.LayerNorm(8)
        SequenceParallelLora()._replicate_module_fn(name, norm, mesh)
        assert norm.weight.placements == norm.bias.placements == (Replicate(),)


@pytest.mark.ranks(2)
def test_a_partition_function_shards_an_adapter_with_its_layer_and_neither_twice():
    mesh = init_device_mesh(device_type(), (2,))
    layer = LoraLinear(8, 12)
    style = ColwiseParallelLora()
    for name, module in layer.named_modules():  # as `distribute_module` does
        style._partition_linear_fn(name, module, mesh)
    assert layer.weight.placements == layer.lora_B.weight.placements == (Shard(0),)
    assert layer.lora_A.weight.placements == (Replicate(),)
    named = LoraLinear(8, 12)
    style._partition_linear_fn("up", named, mesh)
    style._partition_linear_fn("up.lora_A", named.lora_A, mesh)
    assert [p.placements for p in named.parameters()] == [p.placements for p in layer.parameters()]
