"""What is a unit, in which precision it computes, and that everything trains like one process."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy
from torch.utils._python_dispatch import TorchDispatchMode

from am_moe import apply_ep, apply_fsdp, build_meshes, find_experts, parallelize_model
from am_testkit.device import device_type
from am_testkit.exact import assert_same, gradients, whole
from am_testkit.models import next_token_loss, tiny, token_batch


def meshes(copies, ep):
    data = init_device_mesh(device_type(), (copies * ep,), mesh_dim_names=("dp",))
    return data, init_device_mesh(device_type(), (copies, ep), mesh_dim_names=("ep_shard", "ep"))


def step_both(model, one, tolerance=1e-10):
    size, rank = dist.get_world_size(), dist.get_rank()
    ids, labels = token_batch(4, 6)
    share = slice(rank * 4 // size, (rank + 1) * 4 // size)
    logits = model(input_ids=ids[share], use_cache=False).logits
    expected = one(input_ids=ids, use_cache=False).logits
    next_token_loss(logits, labels[share]).backward()
    next_token_loss(expected, labels).backward()
    assert_same(logits, expected[share], tolerance, "logits")
    assert_same(gradients(model), gradients(one), tolerance, "gradients")


@pytest.mark.parametrize("wrap_outer_model", [True, False])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.ranks(2)
def test_embedding_and_head_are_units_unless_they_are_one_parameter(tied, wrap_outer_model):
    model = tiny("qwen3_moe", layers=2, tied=tied)
    one = copy.deepcopy(model)
    data, moe = meshes(1, 2)
    apply_ep(model, moe["ep"], moe)
    if tied and not wrap_outer_model:
        with pytest.raises(
            ValueError, match=r"wrap_outer_model=False needs parts that share nothing, but lm_head\.weight"
        ):
            apply_fsdp(model, data, True, False, wrap_outer_model=False)
        return
    apply_fsdp(model, data, True, False, wrap_outer_model=wrap_outer_model)
    assert isinstance(model, FSDPModule) is wrap_outer_model
    assert isinstance(model.lm_head, FSDPModule) is not tied
    assert isinstance(model.model.embed_tokens, FSDPModule) is not tied
    step_both(model, one)


@pytest.mark.ranks(2)
def test_what_shares_a_parameter_with_any_other_module_stays_with_the_root():
    """A head may have an embedding twice under two names, as that of a text's two stacks; a layer may hold a third."""
    model = tiny("qwen3_moe", layers=3)
    model.first_of_another_stack = nn.Embedding.from_pretrained(model.model.embed_tokens.weight, freeze=False)
    model.first_of_another_stack.weight = model.model.embed_tokens.weight
    model.another_norm = nn.RMSNorm(8)
    model.another_norm.weight = model.model.layers[1].input_layernorm.weight
    one = copy.deepcopy(model)
    data, moe = meshes(1, 2)
    apply_ep(model, moe["ep"], moe)
    apply_fsdp(model, data, True, False)
    assert [isinstance(layer, FSDPModule) for layer in model.model.layers] == [True, False, True]
    assert isinstance(model.lm_head, FSDPModule)
    assert not isinstance(model.model.embed_tokens, FSDPModule)
    step_both(model, one)


class Gathers(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.number += func.overloadpacket.__name__ == "all_gather_copy_in"
        return func(*args, **(kwargs or {}))


@pytest.mark.ranks(2)
def test_the_next_layer_and_its_experts_are_on_their_way_before_a_layer_computes():
    model = tiny("qwen3_moe", layers=3)
    data, moe = meshes(2, 1)
    apply_ep(model, moe["ep"], moe)
    apply_fsdp(model, data, True, True, moe["ep_shard"], reshard_after_forward=True)
    seen = []
    with Gathers() as gathers:
        for layer in model.model.layers:
            layer.self_attn.register_forward_pre_hook(lambda *_: seen.append(gathers.number))
            layer.mlp.experts.register_forward_hook(lambda *_: seen.append(gathers.number))
        model(input_ids=token_batch(2, 6)[0], use_cache=False)
    # Before the first attention: the embedding, layer 0, layer 1 with its experts; then the experts of layer 0; before
    # the second attention: layer 2 with its experts.
    assert seen == [4, 5, 7, 7, 7, 7]


class Block(nn.Module):
    def __init__(self, mlp):
        super().__init__()
        self.mlp = mlp

    def forward(self, hidden):
        return hidden + self.mlp(hidden)


class TwoHeads(nn.Module):
    """A model with a prediction head beside its backbone, as `mtp.layers`, and a tower before it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = tiny("mixtral", layers=2)
        self.tower = nn.ModuleList([nn.Linear(32, 32, dtype=torch.float64) for _ in range(2)])
        self.mtp = nn.ModuleDict({"layers": nn.ModuleList([Block(copy.deepcopy(self.backbone.model.layers[0].mlp))])})

    def forward(self, input_ids, use_cache=False):
        hidden = self.backbone.model.embed_tokens(input_ids)
        for layer in self.tower:
            hidden = layer(hidden).tanh()
        output = self.backbone(inputs_embeds=hidden, use_cache=False)
        output.logits = output.logits + self.backbone.lm_head(self.mtp["layers"][0](hidden))
        return output


@pytest.mark.ranks(2)
def test_experts_of_prediction_heads_and_layers_of_towers_are_found():
    model = TwoHeads()
    one = copy.deepcopy(model)
    data, moe = meshes(1, 2)
    assert [name for name, _ in find_experts(model)][-1] == "mtp.layers.0.mlp.experts"
    apply_ep(model, moe["ep"], moe)
    apply_fsdp(model, data, True, False)
    assert all(isinstance(layer, FSDPModule) for layer in [*model.tower, *model.mtp["layers"]])
    step_both(model, one)


class Routed(nn.Module):
    def __init__(self, experts):
        super().__init__()
        self.experts = experts

    def forward(self, *arguments):
        return self.experts(*arguments)


@pytest.mark.ranks(4)
def test_parameters_that_all_experts_share_are_averaged_over_the_data_ranks():
    pytest.importorskip("transformers.models.muse_spark")
    from transformers.models.muse_spark.configuration_muse_spark import MuseSparkTextConfig
    from transformers.models.muse_spark.modeling_muse_spark import MuseSparkExperts

    torch.manual_seed(0)
    config = MuseSparkTextConfig(num_local_experts=4, moe_hidden_size=8, moe_intermediate_size=6)
    config._experts_implementation = "eager"
    experts = MuseSparkExperts(config).double()
    for parameter in experts.parameters():
        nn.init.normal_(parameter)
    one = Routed(experts)
    model = copy.deepcopy(one)
    data, moe = meshes(2, 2)
    apply_ep(model, moe["ep"], moe)
    apply_fsdp(model, data, True, True, moe["ep_shard"])
    inputs = []
    for rank in range(4):
        generator = torch.Generator().manual_seed(rank)
        hidden = torch.randn(6, 8, generator=generator, dtype=torch.float64)
        weights, ids = torch.rand(6, 4, generator=generator, dtype=torch.float64).topk(2)
        inputs.append((hidden, ids, weights))
    model(*inputs[dist.get_rank()]).square().sum().backward()
    for each in inputs:
        (one(*each).square().sum() / 4).backward()
    assert_same(gradients(model), gradients(one), 1e-6)  # the norm computes in float32


@pytest.mark.parametrize(("family", "weights"), [("qwen3_moe", torch.bfloat16), ("mixtral", torch.float32)])
@pytest.mark.parametrize("ep_shard", [1, 2])
@pytest.mark.ranks(4)
def test_mixed_precision_computes_in_bfloat16_and_keeps_masters_in_float32(ep_shard, family, weights):
    model = tiny(family, layers=2, dtype=torch.float32)
    one = copy.deepcopy(model).to(torch.bfloat16)
    data, moe = meshes(ep_shard, 4 // ep_shard)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    apply_ep(model, moe["ep"], moe)
    apply_fsdp(model, data, True, ep_shard > 1, moe["ep_shard"], mp_policy=policy)
    seen = []
    for _, experts in find_experts(model):
        experts.register_forward_pre_hook(lambda _, args: seen.append([a.dtype for a in args]))
    step_both(model, one, tolerance=0.1)  # bfloat16 against bfloat16
    assert seen == [[torch.bfloat16, torch.int64, weights]] * 2, "routing weights keep the dtype the router gives them"
    assert all(p.dtype is torch.float32 for p in model.parameters())


@pytest.mark.ranks(2)
def test_offloaded_parameters_are_on_the_cpu_and_train_alike():
    model = tiny("mixtral", layers=2)
    one = copy.deepcopy(model)
    data, moe = meshes(1, 2)
    apply_ep(model, moe["ep"], moe)
    apply_fsdp(model, data, True, False, offload_policy=CPUOffloadPolicy(pin_memory=False), reshard_after_forward=True)
    step_both(model, one)


@pytest.mark.ranks(4)
def test_meshes_that_do_not_cover_each_other_are_refused():
    data, moe = meshes(2, 2)
    model = apply_ep(tiny("qwen3_moe", layers=1), moe["ep"], moe)
    message = r"experts of model\.layers\.0\.mlp\.experts are on 2 ranks, each copied 1 times, but the data axis has 4"
    with pytest.raises(ValueError, match=message):
        apply_fsdp(model, data, ep_enabled=True, ep_shard_enabled=False)
    with pytest.raises(ValueError, match=r"ep_enabled=False, but the experts of .* are spread"):
        apply_fsdp(model, data, ep_enabled=False, ep_shard_enabled=False)
    with pytest.raises(ValueError, match=r"ep_enabled=True, but the experts of .* are not spread"):
        apply_fsdp(tiny("qwen3_moe", layers=1), data, ep_enabled=True, ep_shard_enabled=False)


@pytest.mark.ranks(2)
def test_an_auxiliary_loss_is_that_of_each_ranks_tokens():
    model = tiny("mixtral", layers=2, output_router_logits=True, router_aux_loss_coef=0.1)
    one = copy.deepcopy(model)
    data, moe = meshes(1, 2)
    apply_ep(model, moe["ep"], moe)
    apply_fsdp(model, data, True, False)
    ids, labels = token_batch(4, 6)
    share = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
    mine = model(input_ids=ids[share], labels=labels[share], use_cache=False)
    mine.loss.backward()
    for rank in range(2):
        rows = slice(2 * rank, 2 * rank + 2)
        whole_model = one(input_ids=ids[rows], labels=labels[rows], use_cache=False)
        (whole_model.loss / 2).backward()
        if rank == dist.get_rank():
            assert_same(mine.loss, whole_model.loss, 1e-6, "loss")
            assert_same(mine.aux_loss, whole_model.aux_loss, 1e-6, "auxiliary loss")
            for logits, expected in zip(mine.router_logits, whole_model.router_logits, strict=True):
                assert_same(logits, expected, 1e-10, "router logits")
    assert_same(gradients(model), gradients(one), 1e-6)
    assert whole(mine.aux_loss) > 0


@pytest.mark.parametrize("which", ["head", "norm"])
@pytest.mark.ranks(2)
def test_float32_ends_of_a_bfloat16_model_are_trained_in_float32(which):
    model = tiny("qwen3_moe", layers=2, dtype=torch.bfloat16)
    part = model.lm_head if which == "head" else model.model.norm
    part.float()
    one = copy.deepcopy(model).float()  # wider all through
    data, _ = meshes(2, 1)
    apply_fsdp(model, data, False, False)
    ids, labels = token_batch(4, 6)
    share = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
    logits = model(input_ids=ids[share], use_cache=False).logits
    assert logits.dtype == (torch.float32 if which == "head" else torch.bfloat16)
    assert_same(logits.float(), one(input_ids=ids, use_cache=False).logits[share], 5e-2, "logits")
    next_token_loss(logits.float(), labels[share]).backward()
    assert all(p.grad is None or p.grad.dtype == p.dtype for p in model.parameters())
    assert next(part.parameters()).grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lm_head_precision": "float31"}, "lm_head_precision='float31' is not a torch dtype"),
        ({"wrap_outer_model": False}, "wrap_outer_model=False needs parts that share nothing"),
        ({"lm_head_precision": "float32"}, "lm_head is tied to the embedding"),
    ],
)
@pytest.mark.ranks(2)
def test_parallelize_model_refuses_before_the_first_parameter_is_touched(settings, words):
    model = tiny("qwen3_moe", layers=2, tied=True)
    before = {name: (parameter, type(parameter)) for name, parameter in model.named_parameters()}
    world, moe = build_meshes(device_type(), dp_shard=2, ep=2)
    with pytest.raises(ValueError, match=words):
        parallelize_model(model, world, moe, dp_axis_names=("dp_shard",), ep_axis_name="ep", **settings)
    assert {name: (parameter, type(parameter)) for name, parameter in model.named_parameters()} == before


@pytest.mark.ranks(2)
def test_a_module_of_two_dtypes_in_a_frozen_base_is_refused_before_experts_are_spread():
    model = tiny("qwen3_moe", layers=2).requires_grad_(False)
    attention = model.model.layers[0].self_attn
    attention.q_proj.requires_grad_(True)
    attention.o_proj.scale = nn.Parameter(torch.ones(1, dtype=torch.float32), requires_grad=False)
    before = {name: (parameter, type(parameter)) for name, parameter in model.named_parameters()}
    world, moe = build_meshes(device_type(), dp_shard=2, ep=2)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"o_proj holds parameters of"):
        parallelize_model(model, world, moe, dp_axis_names=("dp_shard",), ep_axis_name="ep", mp_policy=policy)
    assert {name: (parameter, type(parameter)) for name, parameter in model.named_parameters()} == before
