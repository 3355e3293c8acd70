"""What is taken for experts, what is not, and what a failed forward leaves."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from am_moe import apply_ep, apply_fsdp, build_meshes, describe_experts, find_experts, parallelize_model
from am_testkit.device import device_type
from am_testkit.exact import assert_same, gradients
from am_testkit.models import next_token_loss, tiny, token_batch


def experts_mesh():
    return init_device_mesh(device_type(), (dist.get_world_size(),), mesh_dim_names=("ep",))


class Stacked(nn.Module):
    """Stacked weights, and a forward that takes tokens alone."""

    def __init__(self, experts=4, width=6, inner=5):
        super().__init__()
        self.num_experts, self.width = experts, width
        self.up = nn.Parameter(torch.randn(experts, width, 2 * inner))
        self.down = nn.Parameter(torch.randn(experts, inner, width))

    def each(self, rows):
        gate, up = torch.bmm(rows, self.up).chunk(2, dim=-1)
        return torch.bmm(nn.functional.silu(gate) * up, self.down)


class Rows(Stacked):
    def forward(self, hidden_states):
        return self.each(hidden_states.view(self.num_experts, -1, self.width)).view(-1, self.width)


class RowsOfTransposedWeights(Stacked):
    def __init__(self):
        super().__init__()
        self.down = nn.Parameter(torch.randn(4, 6, 5))

    def forward(self, hidden_states):
        hidden = torch.bmm(hidden_states.reshape(self.num_experts, -1, self.width), self.up)[..., :5]
        return torch.bmm(torch.relu(hidden), self.down.transpose(1, 2)).reshape(-1, self.width)


class RoutesItself(Stacked):
    def __init__(self):
        super().__init__()
        self.router = nn.Linear(6, 4)

    def forward(self, hidden_states):
        weights = self.router(hidden_states).softmax(-1)
        every = self.each(hidden_states.expand(self.num_experts, -1, -1))
        return torch.einsum("te,etd->td", weights, every)


class RoutesItselfWithoutWeights(Stacked):
    def forward(self, hidden_states):
        weights = hidden_states[:, : self.num_experts].softmax(-1)
        every = self.each(hidden_states.expand(self.num_experts, -1, -1))
        return torch.einsum("te,etd->td", weights, every)


class TokensFirst(Stacked):
    def forward(self, hidden_states):
        rows = hidden_states.view(-1, self.num_experts, self.width).transpose(0, 1)
        return self.each(rows).transpose(0, 1).reshape(-1, self.width)


class NextExpert(Stacked):
    def forward(self, hidden_states):
        rows = hidden_states.view(self.num_experts, -1, self.width).roll(1, 0)
        return self.each(rows).roll(-1, 0).reshape(-1, self.width)


class Biased(Stacked):
    def forward(self, hidden_states):
        return (self.each(hidden_states.view(self.num_experts, -1, self.width)) + 1.0).view(-1, self.width)


class MeanOfItsRows(Stacked):
    def forward(self, hidden_states):
        rows = hidden_states.view(self.num_experts, -1, self.width)
        return self.each(rows - rows.mean(1, keepdim=True)).view(-1, self.width)


class OneWeightForAll(Stacked):
    def forward(self, hidden_states):
        return torch.relu(hidden_states @ self.up[0])[:, :5] @ self.down[0]


class WithNoise(Stacked):
    def forward(self, hidden_states):
        rows = hidden_states.view(self.num_experts, -1, self.width)
        return self.each(nn.functional.dropout(rows, 0.5, training=True)).view(-1, self.width)


@pytest.mark.parametrize("kind", [Rows, RowsOfTransposedWeights])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_rows_that_each_go_through_the_expert_of_their_place_are_proved(kind, device):
    with torch.device(device):
        block = nn.ModuleDict({"experts": kind()})
    assert [experts.call for experts in describe_experts(block)] == ["rows"]


BLOCKS = [RoutesItself, RoutesItselfWithoutWeights, TokensFirst, NextExpert, Biased, MeanOfItsRows]
BLOCKS += [OneWeightForAll, WithNoise]


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.ranks(1)
def test_a_block_that_takes_tokens_alone_and_is_not_proved_is_refused_by_name(kind):
    model = nn.ModuleDict({"block": kind()})
    before = copy.deepcopy(dict(model.state_dict()))
    assert not find_experts(model)
    with pytest.raises(ValueError, match=r"block holds stacked parameters, but its forward takes \['hidden_states'\]"):
        apply_ep(model, experts_mesh())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.ranks(1)
def test_a_pipeline_part_with_a_block_that_routes_itself_is_not_passed_over():
    part = tiny("qwen3_moe", layers=1)
    part.model.layers[0].mlp = RoutesItself()
    world, moe = build_meshes(device_type())
    with pytest.raises(ValueError, match="is not proved to compute each row with one expert"):
        parallelize_model(part, world, moe, dp_axis_names=("dp_shard",), ep_axis_name="ep")


class Routed(nn.Module):
    """Experts called with their routing, and a part whose parameter has as many rows as there are experts."""

    def __init__(self, part):
        super().__init__()
        self.num_experts = 4
        self.weight = nn.Parameter(torch.randn(4, 4, 4))
        self.part = part

    def forward(self, hidden_states, top_k_index, top_k_weights):
        out = torch.zeros_like(hidden_states)
        for expert in range(self.num_experts):
            token, choice = torch.where(top_k_index == expert)
            rows = self.part(hidden_states[token]) @ self.weight[expert]
            out = out.index_add(0, token, top_k_weights[token, choice, None] * rows)
        return out


@pytest.mark.parametrize("part", [lambda: nn.Linear(4, 4, bias=False), lambda: nn.LayerNorm(4)])
@pytest.mark.ranks(2)
def test_parameters_that_may_be_each_experts_or_everyones_are_refused(part):
    with pytest.raises(ValueError, match=r"part\.weight.* have 4 rows, as many as there are experts"):
        apply_ep(nn.ModuleDict({"experts": Routed(part())}), experts_mesh())


class Fails(nn.Module):
    def __init__(self):
        super().__init__()
        self.num_experts = 4
        self.first = nn.Parameter(torch.randn(4, 3, 3))
        self.second = nn.Parameter(torch.randn(4, 3, 3))
        self.broken = False

    def forward(self, hidden_states, top_k_index, top_k_weights):
        if self.broken:
            raise RuntimeError("out of memory, say")
        return hidden_states * top_k_weights.sum(-1, keepdim=True) + 0 * (self.first.sum() + self.second.sum())


@pytest.mark.parametrize("where", ["in the experts", "while parameters are swapped"])
@pytest.mark.ranks(2)
def test_after_an_exception_the_module_is_whole(where, monkeypatch):
    module = apply_ep(nn.ModuleDict({"experts": Fails()}), experts_mesh())["experts"]
    module.broken = True
    parameters = dict(module.named_parameters())
    inputs = torch.randn(3, 3), torch.tensor([[0], [1], [2]]), torch.ones(3, 1)
    with monkeypatch.context() as patch:
        if where != "in the experts":
            local, calls = DTensor.to_local, []

            def second_fails(self, **kwargs):
                calls.append(self)
                if len(calls) == 2:
                    raise RuntimeError("out of memory, say")
                return local(self, **kwargs)

            patch.setattr(DTensor, "to_local", second_fails)
        with pytest.raises(RuntimeError, match="out of memory, say"):
            module(*inputs)
    assert all(parameter is parameters[name] for name, parameter in module.named_parameters())
    assert module.num_experts == 4
    module.broken = False
    module(*inputs).sum().backward()


def with_lora(model, **settings):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=[], init_lora_weights=False, **settings)
    return peft.get_peft_model(model, config)


PARAMETERS = {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}


@pytest.mark.ranks(2)
def test_an_adapter_on_expert_parameters_is_refused_before_anything_is_sent():
    world, moe = build_meshes(device_type(), dp_shard=2, ep=2)
    model = with_lora(tiny("qwen3_moe", layers=1), **PARAMETERS)
    parameters = list(model.parameters())
    message = r"an adapter wraps the expert parameters of .*experts.*; merge it into the weights before apply_ep"
    with pytest.raises(ValueError, match=message):
        apply_ep(model, moe["ep"], moe)
    with pytest.raises(ValueError, match=message):
        parallelize_model(model, world, moe, dp_axis_names=("dp_shard",), ep_axis_name="ep")
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True)), "nothing was changed"
    # An adapter that comes after: found by apply_fsdp, or else by torch in the first forward, before experts run.
    model = with_lora(apply_ep(tiny("qwen3_moe", layers=1), moe["ep"]), **PARAMETERS)
    with pytest.raises(ValueError, match=message):
        apply_fsdp(model, world["dp_shard"], True, False)
    with pytest.raises(RuntimeError, match=r"mixed torch.Tensor and DTensor"):
        model(token_batch(2, 6)[0], use_cache=False)


class Twice(nn.Module):
    def forward(self, weight):
        return weight * 2


@pytest.mark.ranks(2)
def test_parametrized_expert_weights_are_refused_before_and_after():
    def parametrized(model):
        nn.utils.parametrize.register_parametrization(find_experts(model)[0][1], "down_proj", Twice())
        return model

    with pytest.raises(ValueError, match=r"experts has parametrized weights, which cannot be spread; merge it"):
        apply_ep(parametrized(tiny("qwen3_moe", layers=1)), experts_mesh())
    model = parametrized(apply_ep(tiny("qwen3_moe", layers=1), experts_mesh()))
    with pytest.raises(ValueError, match="an adapter was put on the parameters of"):
        model(token_batch(2, 6)[0], use_cache=False)


@pytest.mark.ranks(2)
def test_an_adapter_on_expert_parameters_trains_exactly_where_experts_stay_whole():
    model = with_lora(tiny("qwen3_moe", layers=2), **PARAMETERS)
    one = copy.deepcopy(model)
    world, _ = build_meshes(device_type(), dp_shard=2)
    parallelize_model(model, world, None, dp_axis_names=("dp_shard",))
    share = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
    ids, labels = token_batch(4, 6)
    for each, part in ((model, share), (one, slice(None))):
        next_token_loss(each(input_ids=ids[part], use_cache=False).logits, labels[part]).backward()
    assert len(gradients(model)) == 2 * 4
    assert_same(gradients(model), gradients(one), 1e-10)
