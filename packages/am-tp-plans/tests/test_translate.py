"""transformers' style names in real styles, and what a rehearsal finds missing in the plans made of them."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel
from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES

from am_testkit.device import device_type
from am_testkit.exact import assert_same
from am_testkit.models import tiny
from am_testkit.zoo import OLDEST, small
from am_tp_plans import (
    LocalShards,
    ReplicatedWithGradAllReduce,
    VocabParallelEmbedding,
    apply_plan,
    expand_plan,
    get_hf_tp_shard_plan,
    resolve_plan,
    translate_to_torch_parallel_style,
)
from am_tp_plans.proof.rehearsal import rehearse
from am_tp_plans.sources.translate import without_half_ties

# Styles of transformers' expert parallelism; am-moe has its own.
OF_EXPERT_PARALLELISM = {"grouped_gemm", "ep_dispatch_experts", "ep_router", "megamoe_experts", "megamoe_router"}


def test_every_style_of_the_installed_transformers_is_translated():
    names = set(ALL_PARALLEL_STYLES.keys()) - OF_EXPERT_PARALLELISM
    assert len(names) > (14 if OLDEST else 15)
    for name in names:
        assert isinstance(translate_to_torch_parallel_style(name), ParallelStyle), name
    assert translate_to_torch_parallel_style("colwise") is not translate_to_torch_parallel_style("colwise")


@pytest.mark.parametrize("name", ["mistral", "stablelm"])
def test_a_plan_is_derived_for_a_model_on_meta_and_one_of_fake_tensors(name):
    keys = list(resolve_plan(small(name), sequence_parallel=True, infer=True))
    for without_values in (torch.device("meta"), FakeTensorMode()):
        with without_values:
            model = small(name)
        assert list(resolve_plan(model, sequence_parallel=True, infer=True)) == keys


def test_unknown_styles_are_refused_by_name():
    with pytest.raises(ValueError, match="'diagonal' is not a tensor-parallel style of transformers; there"):
        translate_to_torch_parallel_style("diagonal")
    with pytest.raises(TypeError, match="named by a string, got int"):
        translate_to_torch_parallel_style(3)


def test_a_plan_is_collected_from_class_instance_and_inner_models():
    plan = get_hf_tp_shard_plan(tiny("gemma3_text"))
    assert isinstance(plan["lm_head"], ColwiseParallel)
    if not OLDEST:  # whose plan leaves the embedding whole
        assert isinstance(plan["model.embed_tokens"], VocabParallelEmbedding)
    assert isinstance(plan["model.layers.*.self_attn.q_norm"], ReplicatedWithGradAllReduce)
    assert not any("shared_expert" in key for key in get_hf_tp_shard_plan(tiny("qwen3_moe")))


def test_one_of_two_tied_weights_is_not_sharded_alone():
    model = tiny("llama", tied=True)
    model._tp_plan = {k: v for k, v in model._tp_plan.items() if "embed" not in k}
    model.model._tp_plan = {k: v for k, v in model.model._tp_plan.items() if "embed" not in k}
    assert "lm_head" not in get_hf_tp_shard_plan(model)


def test_a_parameter_that_meets_a_share_of_the_activations_has_its_gradient_summed():
    plan = get_hf_tp_shard_plan(small("apertus"))
    assert plan["model.layers.*.mlp.act_fn"].names == {"alpha_p", "alpha_n"}


def test_an_embedding_whose_weight_is_read_elsewhere_stays_whole():
    plan = get_hf_tp_shard_plan(small("gemma4"))
    assert not any("embed_tokens" in key or key == "lm_head" for key in plan)


def test_a_model_without_a_plan_and_a_part_of_a_model_are_refused():
    with pytest.raises(ValueError, match="OPTForCausalLM brings no tensor-parallel plan") as raised:
        get_hf_tp_shard_plan(small("opt"))
    assert isinstance(raised.value, AssertionError), "what code written for nemo-automodel catches"
    part = tiny("llama")
    part.model.layers[0] = nn.Identity()
    with pytest.raises(ValueError, match="is a part of a cut model"):
        get_hf_tp_shard_plan(part)
    with pytest.raises(ValueError, match="there is no sequence-parallel plan"):
        resolve_plan(small("opt"), sequence_parallel=True)
    assert "model.layers.0" in resolve_plan(small("mistral"), sequence_parallel=True)
    assert "model.layers.*.self_attn.q_proj" in resolve_plan(small("mistral"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model.layers.*.self_attn.o_proj": None}, "o_proj sums over features of which each rank has a share"),
        ({"model.layers.*.mlp.down_proj": None}, "down_proj sums over features of which each rank"),
        (
            {"model.layers.*.mlp.gate_proj": None, "model.layers.*.mlp": None},
            r"features \(2, 8, 48\) and a whole tensor \(2, 8, 48\), which has values",
        ),
        ({"model.layers.*.mlp.gate_proj": None}, "mlp.gate_proj reads the input that the projections of .*mlp share"),
        ({"lm_head": RowwiseParallel()}, "lm_head gets all features in 32 columns, but wants 32 of one rank's share"),
    ],
)
def test_a_plan_that_would_be_wrong_is_found_out_without_devices(change, words):
    model = tiny("llama")
    plan = get_hf_tp_shard_plan(model) | {k: v for k, v in change.items() if v is not None}
    plan = {k: v for k, v in plan.items() if change.get(k, v) is not None}
    with pytest.raises(ValueError, match=words):
        rehearse(model, expand_plan(model, plan), 2)


def test_a_whole_activation_that_meets_a_share_is_found_out():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(16, 8)
            self.up, self.gate, self.down = nn.Linear(8, 8), nn.Linear(8, 1), nn.Linear(8, 8)

        def forward(self, ids):
            hidden = self.embed(ids)
            return self.down(self.up(hidden) * self.gate(hidden))

    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    with pytest.raises(ValueError, match="mul of one rank's features and a whole activation"):
        rehearse(Gated(), plan, 2)


@pytest.mark.parametrize("style", ["embedding_rowwise", "embedding_colwise"])
@pytest.mark.ranks(2)
def test_both_layouts_of_an_embedding_give_its_rows_and_gradients(style):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(12, 8, dtype=torch.float64))
    ids = torch.arange(12).view(2, 6)
    expected = model(ids)
    expected.square().sum().backward()
    wanted = model[0].weight.grad.clone()
    model.zero_grad()
    apply_plan(model, init_device_mesh(device_type(), (2,)), {"0": translate_to_torch_parallel_style(style)})
    output = model(ids)
    output.square().sum().backward()
    assert_same(output, expected, 1e-12)
    assert_same(model[0].weight.grad, wanted, 1e-12)


@pytest.mark.ranks(2)
def test_a_module_on_its_shards_sums_its_output_and_its_input_gradient():
    class Stacked(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Parameter(torch.randn(6, 4, dtype=torch.float64))
            self.down = nn.Parameter(torch.randn(4, 6, dtype=torch.float64))

        def forward(self, hidden):
            return torch.relu(hidden @ self.up.T) @ self.down.T

    torch.manual_seed(0)
    model, hidden = nn.Sequential(Stacked()), torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    model(hidden).square().sum().backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters()}, hidden.grad.clone()
    model.zero_grad()
    hidden.grad = None
    style = LocalShards({"up": Shard(0), "down": Shard(1)}, sum_input_gradients=True, sum_output=True)
    apply_plan(model, init_device_mesh(device_type(), (2,)), {"0": style})
    model(hidden).square().sum().backward()
    assert_same({name: p.grad for name, p in model.named_parameters()}, wanted[0], 1e-12)
    assert_same(hidden.grad, wanted[1], 1e-12)
    with pytest.raises(ValueError, match="sharded already"):
        apply_plan(model, init_device_mesh(device_type(), (2,)), {"0": style})


class WithARowOfItsOwn(nn.Embedding):
    """As T5Gemma 2's, which puts a parameter in the place of one id."""

    def __init__(self):
        super().__init__(16, 8)
        self.row = nn.Parameter(torch.zeros(8))

    def forward(self, input_ids):
        embedded = super().forward(input_ids)
        embedded[input_ids == 3] = self.row
        return embedded


def test_an_embedding_that_is_more_than_its_weight_is_left_whole_with_what_is_tied_to_it():
    model = nn.ModuleDict({"embed": WithARowOfItsOwn(), "head": nn.Linear(8, 16), "plain": nn.Embedding(16, 8)})
    model["head"].weight = model["embed"].weight
    plan = {"embed": VocabParallelEmbedding(), "head": ColwiseParallel(), "plain": VocabParallelEmbedding()}
    assert list(without_half_ties(model, plan)) == ["plain"]
