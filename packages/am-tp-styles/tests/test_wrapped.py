"""Adapters in peft's form: everything one can do with them gives what one process gives."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from transformers import LlamaConfig, LlamaForCausalLM

from am_testkit.device import device_type
from am_testkit.exact import assert_same, gradients, whole
from am_tp_styles import restore_classes, translate_to_lora

TOLERANCE = 1e-10
VARIANTS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "biases": {"lora_bias": True, "bias": "all"},
}


class Network(nn.Module):
    """Two embeddings, a colwise and a rowwise linear, one on a sharded sequence; the vocabulary is uneven."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(11, 8, padding_idx=9)
        self.places = nn.Embedding(6, 8)
        self.up = nn.Linear(8, 12)
        self.down = nn.Linear(12, 8)
        self.along = nn.Linear(8, 8)

    def forward(self, ids):
        x = self.tokens(ids) + self.places(torch.arange(ids.shape[1]).expand_as(ids))
        x = x + self.down(torch.tanh(self.up(x)))
        return x + self.along(x)


def wrapped(names=("tokens", "places", "up", "down", "along"), **options):
    torch.manual_seed(0)
    embeddings = {"tokens", "places"} & set(names)
    if options.get("lora_bias"):  # peft has no such bias for embeddings
        names = [name for name in names if name not in embeddings]
    model = get_peft_model(Network(), LoraConfig(r=3, target_modules=list(names), **options)).double()
    randomise(model)
    return model


def randomise(model, seed=2):
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter.data, std=0.3) if "magnitude" not in name else parameter.data.mul_(1.3)


PLAN = {
    "tokens": RowwiseParallel(input_layouts=Replicate()),
    "places": ColwiseParallel(output_layouts=Replicate()),
    "up": ColwiseParallel(),
    "down": RowwiseParallel(),
}


def shard(model, ranks=2, plan=PLAN, **options):
    parallelize_module(
        model.base_model.model, init_device_mesh(device_type(), (ranks,)), translate_to_lora(plan), **options
    )
    return model


def ids():
    return torch.tensor([[1, 9, 3, 10], [0, 5, 5, 8]])


def step(model, given=None):
    model.zero_grad()
    out = model(ids() if given is None else given)
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).square().sum().backward()
    return out


def assert_equal_models(model, reference, given=None):
    expected = step(reference, given)
    assert_same(step(model, given), expected, TOLERANCE, "output")
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert set(found) == {n for n, p in reference.named_parameters() if p.grad is not None}
    assert_same(found, {n: reference.get_parameter(n).grad for n in found}, TOLERANCE, "gradients")


@pytest.mark.ranks(2)
@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_gradients_and_adapter_states_are_those_of_one_process(variant):
    reference = wrapped(**VARIANTS[variant])
    model = shard(copy.deepcopy(reference))

    assert_equal_models(model, reference)
    assert len(gradients(model)) == len(gradients(reference)) > 8
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == reference.get_parameter(name).requires_grad
        if parameter.grad is not None and ".along." not in name:
            assert parameter.grad.placements == parameter.placements, name
    assert model.state_dict().keys() == reference.state_dict().keys()
    assert_same(model.state_dict(), reference.state_dict(), 0.0)
    saved = get_peft_model_state_dict(model)
    assert saved.keys() == get_peft_model_state_dict(reference).keys()
    assert_same(saved, get_peft_model_state_dict(reference), 0.0)


@pytest.mark.ranks(4)
@pytest.mark.parametrize("variant", ["plain", "dora"])
def test_four_ranks_and_a_rank_smaller_than_their_number_work(variant):
    reference = wrapped(**VARIANTS[variant])
    assert_equal_models(shard(copy.deepcopy(reference), ranks=4), reference)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("variant", ["plain", "dora", "biases"])
def test_a_linear_on_a_sharded_sequence_has_whole_gradients(variant):
    reference = wrapped(["along"], **VARIANTS[variant])
    model = copy.deepcopy(reference)
    layer, expected = model.base_model.model.along, reference.base_model.model.along
    torch.manual_seed(1)
    x = torch.randn(2, 4, 8, dtype=torch.float64)
    parallelize_module(
        layer, init_device_mesh(device_type(), (2,)), translate_to_lora(SequenceParallel(use_local_output=True))
    )
    mine = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
    out = layer(x[:, mine])
    out.square().sum().backward()
    whole_out = expected(x)
    whole_out.square().sum().backward()
    assert_same(out, whole_out[:, mine], TOLERANCE)
    assert_same(gradients(layer), gradients(expected), TOLERANCE)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("variant", ["plain", "dora", "biases"])
@pytest.mark.parametrize("safe", [False, True])
def test_merging_unmerging_disabling_and_switching_adapters_match_one_process(variant, safe):
    options = VARIANTS[variant]
    reference = wrapped(**options)
    names = list(reference.peft_config["default"].target_modules)
    second = {k: v for k, v in options.items() if k != "bias"}
    reference.add_adapter("other", LoraConfig(r=5, target_modules=names, **second))
    reference.double()
    randomise(reference, seed=3)
    model = shard(copy.deepcopy(reference))

    def on_both(act):
        for each in (reference, model):
            act(each)
        assert_same(model.state_dict(), reference.state_dict(), TOLERANCE)

    assert_equal_models(model, reference)
    on_both(lambda each: each.set_adapter("other"))
    assert_equal_models(model, reference)
    on_both(lambda each: each.merge_adapter(safe_merge=safe))
    with torch.no_grad():
        assert_same(model(ids()), reference(ids()), TOLERANCE)
        if variant != "biases":  # peft's disable_adapter refuses trained biases
            with model.disable_adapter(), reference.disable_adapter():
                assert_same(model(ids()), reference(ids()), TOLERANCE)
            assert not model.base_model.model.up.merged
            on_both(lambda each: each.merge_adapter(safe_merge=safe))
    on_both(lambda each: each.unmerge_adapter())
    on_both(lambda each: each.set_adapter("default"))
    assert_equal_models(model, reference)
    if variant == "plain":
        mixed = {"adapter_names": ["other", "__base__"]}
        reference.eval(), model.eval()
        with torch.no_grad():
            assert_same(model(ids(), **mixed), reference(ids(), **mixed), TOLERANCE)
    on_both(lambda each: each.delete_adapter("other"))
    assert_equal_models(model, reference)


@pytest.mark.ranks(2)
def test_an_adapter_added_to_sharded_layers_takes_the_source_ranks_values_and_trains():
    reference = wrapped()
    model = shard(copy.deepcopy(reference))
    torch.manual_seed(10 + dist.get_rank())  # the ranks start differently
    model.add_adapter("late", LoraConfig(r=2, target_modules=["up", "down", "tokens", "places"], lora_dropout=0.0))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".late" in name:
                assert parameter.device_mesh.size() == 2
                parameter.copy_(parameter.double())
    model.double()
    model.set_adapter("late")
    reference.add_adapter("late", LoraConfig(r=2, target_modules=["up", "down", "tokens", "places"]))
    reference.double()
    reference.set_adapter("late")
    reference.load_state_dict({name: whole(tensor) for name, tensor in model.state_dict().items()})
    assert any(whole(p).abs().max() > 0 for n, p in model.named_parameters() if "up.lora_A.late" in n)
    assert_equal_models(model, reference)
    for config in (LoraConfig(use_dora=True), LoraConfig(init_lora_weights="pissa")):
        config.target_modules = {"up"}
        with pytest.raises(ValueError, match=r"'more' starts from the whole base weight"):
            model.add_adapter("more", config)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("variant", ["plain", "dora"])
def test_dropout_draws_the_masks_of_one_process(variant):
    reference = wrapped(["up", "down"], lora_dropout=0.4, **VARIANTS[variant])
    model = shard(copy.deepcopy(reference))
    masks = []
    for each in (reference, model):
        torch.manual_seed(5)
        masks.append((step(each), {n: whole(p.grad) for n, p in each.named_parameters() if p.grad is not None}))
    assert_same(masks[1][0], masks[0][0], TOLERANCE)
    assert_same(masks[1][1], masks[0][1], TOLERANCE)
    torch.manual_seed(6)
    with pytest.raises(AssertionError, match="differ"):
        assert_same(step(model), masks[0][0], 1e-3)


@pytest.mark.ranks(2)
def test_a_meta_model_is_laid_out_without_data_and_filled_by_rank():
    reference = wrapped()
    model = copy.deepcopy(reference).to("meta")
    shard(model, src_data_rank=None)
    assert all(p.is_meta for p in model.base_model.model.up.parameters())
    model.to_empty(device=device_type())
    mesh = model.base_model.model.up.base_layer.weight.device_mesh
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            value = reference.get_parameter(name)
            if hasattr(parameter, "placements"):
                value = torch.distributed.tensor.distribute_tensor(value, mesh, parameter.placements)
            parameter.copy_(value)
    assert_equal_models(model, reference)


@pytest.mark.ranks(2)
def test_the_wrappers_class_is_derived_and_comes_back():
    model = wrapped()
    before = {name: type(module) for name, module in model.named_modules()}
    shard(model)
    now = {name: type(module) for name, module in model.named_modules()}
    changed = {name for name in before if now[name] is not before[name]}
    assert {"base_model.model.up", "base_model.model.down", "base_model.model.tokens"} <= changed
    for name in changed:
        assert issubclass(now[name], before[name])
        assert (now[name].__name__, now[name].__module__) == (before[name].__name__, before[name].__module__)
    restore_classes(model)
    assert {name: type(module) for name, module in model.named_modules()} == before


class _Arrow:
    pass


def _variant(network):
    network.up.lora_variant["default"] = _Arrow()


def _width(network):
    network.down.base_layer = nn.Linear(13, 8)


def _max_norm(network):
    network.tokens.base_layer.max_norm = 1.0


def _few_ids(network):
    network.tokens.base_layer = nn.Embedding(1, 8)


def _parameter(network):
    network.up.lora_gate = nn.Parameter(torch.zeros(1))


def _base(network):
    network.up.base_layer = nn.Conv1d(8, 12, 1)


REFUSALS = [
    (_variant, "up", ValueError, r"'default' of Linear is a _Arrow"),
    (_width, "down", ValueError, r"in_features=13 does not divide over 2 ranks"),
    (_max_norm, "tokens", ValueError, r"max_norm=1\.0 cannot be sharded along its vocabulary"),
    (_few_ids, "tokens", ValueError, r"num_embeddings=1 leaves one of 2 ranks without a share"),
    (_parameter, "up", ValueError, r"Linear\.lora_gate has no known place"),
    (_base, "up", TypeError, r"base layer of Linear is a Conv1d"),
    (lambda network: network.up.merge(), "up", ValueError, r"has merged adapters"),
]


@pytest.mark.ranks(2)
def test_what_has_no_sharded_form_is_refused_before_any_collective():
    mesh = init_device_mesh(device_type(), (2,))
    for change, name, error, message in REFUSALS:
        network = wrapped(["up", "down", "tokens"]).base_model.model
        change(network)
        if dist.get_rank() == 0:  # alone: a collective would hang
            with pytest.raises(error, match=message):
                parallelize_module(network, mesh, {name: translate_to_lora(PLAN[name])})
    sharded_first = nn.Sequential(nn.Linear(8, 12))
    parallelize_module(sharded_first, mesh, {"0": ColwiseParallel()})
    late = get_peft_model(sharded_first, LoraConfig(r=2, target_modules=["0"]))
    with pytest.raises(ValueError, match=r"base_layer\.weight is a DTensor already.*after its adapters are on it"):
        parallelize_module(late.base_model.model[0], mesh, translate_to_lora(ColwiseParallel()))


@pytest.mark.ranks(2)
def test_a_safe_merge_of_a_broken_adapter_is_refused_on_every_rank():
    model = shard(wrapped(["up"]))
    weight = model.base_model.model.up.lora_B["default"].weight
    if dist.get_rank() == 1:
        weight.to_local().detach().fill_(float("nan"))
    before = whole(model.base_model.model.up.base_layer.weight).clone()
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_adapter(safe_merge=True)
    assert_same(model.base_model.model.up.base_layer.weight, before, 0.0)
    assert not model.base_model.model.up.merged


@pytest.mark.ranks(2)
def test_a_transformers_model_with_adapters_on_every_layer_trains_as_in_one_process():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=33,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    layers = {"colwise": ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"], "rowwise": ["o_proj", "down_proj"]}
    targets = [*layers["colwise"], *layers["rowwise"], "embed_tokens"]
    reference = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=3, target_modules=targets, use_dora=True))
    randomise(reference.double())
    model = copy.deepcopy(reference)
    plan = {f"model.layers.*.self_attn.{name}": ColwiseParallel() for name in layers["colwise"][:3]}
    plan |= {f"model.layers.*.mlp.{name}": ColwiseParallel() for name in layers["colwise"][3:]}
    plan |= {"model.layers.*.self_attn.o_proj": RowwiseParallel(), "model.layers.*.mlp.down_proj": RowwiseParallel()}
    plan |= {"model.embed_tokens": RowwiseParallel(input_layouts=Replicate())}
    plan |= {"lm_head": ColwiseParallel(output_layouts=Replicate())}
    shard(model, plan=plan)
    ids = torch.randint(0, 33, (2, 6))
    losses = []
    for each in (reference, model):
        losses.append(each(input_ids=ids, labels=ids).loss)
        losses[-1].backward()
    assert_same(losses[1], losses[0], TOLERANCE)
    assert len(gradients(model)) == 2 * 7 * 3 + 3
    assert_same(gradients(model), gradients(reference), TOLERANCE)


@pytest.mark.ranks(4)
@pytest.mark.parametrize("variant", VARIANTS)
def test_fsdp_over_the_styles_gives_the_same_gradients_and_merges_only_unsharded(variant):
    reference = wrapped(**VARIANTS[variant])
    model = copy.deepcopy(reference)
    network = model.base_model.model
    mesh = init_device_mesh(device_type(), (2, 2), mesh_dim_names=("dp", "tp"))
    parallelize_module(network, mesh["tp"], translate_to_lora(PLAN))
    for module in (network.up, network.down, network.tokens, network):
        fully_shard(module, mesh=mesh["dp"])
    assert_equal_models(model, reference)
    with pytest.raises(ValueError, match=r"is sharded over \('dp', 'tp'\).*unshard"):
        network.up.merge()
    network.up.unshard()
    network.up.merge()
    reference.base_model.model.up.merge()
    assert_same(network.up.base_layer.weight, reference.base_model.model.up.base_layer.weight, TOLERANCE)


@pytest.mark.ranks(4)
def test_output_features_of_a_wrapped_linear_may_be_uneven():
    torch.manual_seed(0)
    reference = get_peft_model(nn.Sequential(nn.Linear(8, 13)), LoraConfig(r=3, target_modules=["0"])).double()
    randomise(reference)
    model = copy.deepcopy(reference)
    plan = {"0": ColwiseParallel(output_layouts=Replicate())}
    shard(model, ranks=4, plan=plan)
    x = torch.randn(2, 4, 8, dtype=torch.float64)
    outs = [each(x) for each in (reference, model)]
    assert_same(outs[1], outs[0], TOLERANCE)
    for out in outs:
        out.square().sum().backward()
    assert_same(gradients(model), gradients(reference), TOLERANCE)
