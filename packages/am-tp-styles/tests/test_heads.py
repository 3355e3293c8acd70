"""A projection of fewer heads than ranks: each rank computes the head that its neighbours compute too."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import parallelize_module

from am_testkit.device import device_type
from am_testkit.exact import assert_same, gradients
from am_tp_styles import KeyValueColwiseParallel, TPLinear, translate_to_lora, use_tp_linear
from am_tp_styles.layout import plan_layout

HEADS, WIDTH = 2, 3


def axis():
    return init_device_mesh(device_type(), (dist.get_world_size(),), mesh_dim_names=("tp",))


def projection(adapter=False, dora=False):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, HEADS * WIDTH)).double()
    if adapter:
        inject_adapter_in_model(LoraConfig(r=2, target_modules=["0"], use_dora=dora, init_lora_weights=False), model)
        model.double().requires_grad_()
    return model


def of_own_head(out):
    """What a rank of the axis should have of a whole output."""
    return out.chunk(HEADS, -1)[dist.get_rank() * HEADS // dist.get_world_size()]


@pytest.mark.parametrize("form", ["linear", "tp linear", "lora", "dora"])
@pytest.mark.parametrize("tokens", [Replicate(), Shard(1)], ids=["whole", "sequence"])
@pytest.mark.ranks(4)
def test_every_rank_computes_its_head_and_gradients_are_those_of_all_ranks(form, tokens):
    whole = projection(form in ("lora", "dora"), form == "dora")
    if form == "tp linear":
        use_tp_linear(whole)
    model, rank, ranks = copy.deepcopy(whole), dist.get_rank(), dist.get_world_size()
    parallelize_module(model, axis(), {"0": KeyValueColwiseParallel(HEADS, input_layouts=tokens)})
    x = torch.randn(2, 4, 8, dtype=torch.float64, requires_grad=True)
    again = x.detach().clone().requires_grad_()
    out = model(x if isinstance(tokens, Replicate) else x.chunk(ranks, 1)[rank])
    expected = whole(again)
    assert_same(out, of_own_head(expected), 1e-12, "output")
    # every rank weighs its copy in its own way, as its query heads do
    weights = torch.randn(ranks, 2, 4, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (out * weights[rank]).sum().backward()
    per_head = weights.view(HEADS, -1, 2, 4, WIDTH).sum(1)
    (expected * torch.cat(list(per_head), -1)).sum().backward()
    assert_same(gradients(model), gradients(whole), 1e-12, "gradients")
    mine = x.grad if isinstance(tokens, Replicate) else x.grad.chunk(ranks, 1)[rank]
    assert_same(mine, again.grad if isinstance(tokens, Replicate) else again.grad.chunk(ranks, 1)[rank], 1e-12)


@pytest.mark.ranks(2)
def test_parameters_are_whole_and_frozen_ones_stay_frozen():
    model = projection()
    model[0].bias.requires_grad_(False)
    names = list(model.state_dict())
    parallelize_module(model, axis(), {"0": KeyValueColwiseParallel(1)})
    assert list(model.state_dict()) == names
    for parameter in model.parameters():
        assert isinstance(parameter, DTensor)
        assert parameter.placements == (Replicate(),)
    assert [parameter.requires_grad for parameter in model.parameters()] == [True, False]
    model(torch.ones(1, 8, dtype=torch.float64)).sum().backward()
    assert model[0].bias.grad is None


class Doubled(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


class WithOwnOutput(KeyValueColwiseParallel):
    @staticmethod
    def _prepare_output_fn(output_layouts, use_local_output, mod, outputs, device_mesh):
        return outputs


@pytest.mark.parametrize(
    ("layer", "style", "ranks", "error", "words"),
    [
        (nn.Linear(4, 6), KeyValueColwiseParallel(3), 4, ValueError, "3 heads in 6 output features .* by 4 ranks"),
        (nn.Linear(4, 7), KeyValueColwiseParallel(2), 4, ValueError, "2 heads in 7 output features"),
        (nn.Linear(4, 6), KeyValueColwiseParallel(0), 4, ValueError, "0 heads"),
        (nn.Embedding(4, 6), KeyValueColwiseParallel(2), 4, TypeError, "got Embedding"),
        (Doubled(4, 6), KeyValueColwiseParallel(2), 4, TypeError, "got Doubled"),
        (nn.Linear(4, 6), WithOwnOutput(2), 4, TypeError, "WithOwnOutput"),
    ],
)
def test_what_cannot_be_shared_is_refused_before_anything_is_sharded(layer, style, ranks, error, words):
    with pytest.raises(error, match=words):
        style.layout(layer, ranks)


def test_the_style_takes_adapters_as_it_is_and_replicates_everything():
    style = KeyValueColwiseParallel(2)
    assert translate_to_lora(style) is style
    assert set(plan_layout(projection(adapter=True)[0], "heads", 4).values()) == {Replicate()}
    assert style.layout(TPLinear(4, 6), 4) == {"weight": Replicate(), "bias": Replicate()}
