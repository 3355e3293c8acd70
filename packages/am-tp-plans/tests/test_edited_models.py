"""Models of a known family that somebody changed: a plan for them is shown to be right, or there is none."""

from __future__ import annotations

import copy
from types import MethodType

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from am_testkit.device import device_type
from am_testkit.exact import assert_same, gradients
from am_testkit.models import next_token_loss, tiny, token_batch
from am_tp_plans import _parallelize_llama, apply_plan, explain_plan, resolve_plan
from am_tp_plans.sources.stock import what_was_edited


class NormedMLP(nn.Module):
    """Llama's names, but the inner features are normalised."""

    def __init__(self, mlp):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj

    def forward(self, hidden):
        inner = F.silu(self.gate_proj(hidden)) * self.up_proj(hidden)
        return self.down_proj(F.rms_norm(inner, inner.shape[-1:]))


class AdapterBeside(NormedMLP):
    """An adapter that reads what the projections read."""

    def __init__(self, mlp):
        super().__init__(mlp)
        self.small = nn.Linear(32, 32, dtype=torch.float64)

    def forward(self, hidden):
        inner = F.silu(self.gate_proj(hidden)) * self.up_proj(hidden)
        return self.down_proj(inner) + self.small(hidden)


class GatedHeads(nn.Module):
    """An attention whose heads share a gate."""

    def __init__(self, attention):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            getattr(attention, f"{which}_proj") for which in ("q", "k", "v", "o")
        )

    def forward(self, hidden_states, **_):
        rows = hidden_states.shape[:2]
        q, k, v = (p(hidden_states).view(*rows, -1, 8).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        k, v = (each.repeat_interleave(q.shape[1] // each.shape[1], 1) for each in (k, v))
        heads = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        heads = heads * heads.mean(1, keepdim=True).sigmoid()
        return self.o_proj(heads.transpose(1, 2).flatten(2)), None


class NoAttention(nn.Module):
    def forward(self, hidden_states, **_):
        return 0.5 * hidden_states, None


class NoLayer(nn.Module):
    def forward(self, hidden_states, *_, **__):
        return hidden_states


class PenaltyOnWeights(LlamaForCausalLM):
    def forward(self, input_ids=None, labels=None, **kwargs):
        output = super().forward(input_ids=input_ids, labels=labels, **kwargs)
        if labels is not None:
            output.loss = output.loss + 0.01 * self.model.layers[0].mlp.down_proj.weight.pow(2).sum()
        return output


class HeadsWeight(LlamaForCausalLM):
    """As fused losses do: the head's weight is read, the head is not called."""

    def forward(self, input_ids=None, **kwargs):
        output = super().forward(input_ids=input_ids, **kwargs)
        output.logits = self.model(input_ids=input_ids, use_cache=False).last_hidden_state @ self.lm_head.weight.T
        return output


def llama(edit=None, layers=2):
    model = tiny("llama", layers=layers)
    torch.manual_seed(3)
    if isinstance(edit, type):
        edited = edit(model.config).double()
        edited.load_state_dict(model.state_dict())
        return edited
    if edit is not None:
        edit(model)
    return model


def each_mlp(kind):
    def edit(model):
        for layer in model.model.layers:
            layer.mlp = kind(layer.mlp)

    return edit


def gated_heads(model):
    for layer in model.model.layers:
        layer.self_attn = GatedHeads(layer.self_attn)


def hook_on(name, change, before=False):
    def edit(model):
        module = model.get_submodule(name)
        if before:
            module.register_forward_pre_hook(lambda _module, args: (change(args[0]), *args[1:]))
        else:
            module.register_forward_hook(lambda _module, _args, output: change(output))

    return edit


def normed(hidden):
    return hidden / hidden.norm(dim=-1, keepdim=True)


def parametrized(model):
    parametrizations.weight_norm(model.model.layers[1].mlp.up_proj)


def own_forward(model):
    mlp = model.model.layers[0].mlp
    mlp.forward = MethodType(NormedMLP.forward, mlp)


def without(name, kind):
    def edit(model):
        model.set_submodule(name, kind())

    return edit


def longer_head(model):
    model.lm_head = nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, model.config.vocab_size)).double()


def wider(model):
    config = copy.copy(model.config)
    config.intermediate_size = 64
    model.model.layers[1].mlp = LlamaMLP(config).double()


def layer_twice(model):
    model.model.layers[2] = model.model.layers[0]


def shared_mlp(model):
    model.model.layers[2].mlp = model.model.layers[0].mlp


REFUSED = {
    "mlp": each_mlp(NormedMLP),
    "heads": gated_heads,
    "hook on q": hook_on("model.layers.1.self_attn.q_proj", normed),
    "hook on up": hook_on("model.layers.1.mlp.up_proj", lambda hidden: hidden - hidden.mean(-1, keepdim=True)),
    "hook before down": hook_on("model.layers.1.mlp.down_proj", normed, before=True),
    "parametrized": parametrized,
    "own forward": own_forward,
    "penalty": PenaltyOnWeights,
}
# What an edit does to tokens matters with sequence parallelism only.
MIXES_TOKENS = {"hook on a layer": hook_on("model.layers.0", lambda hidden: hidden + hidden.cumsum(1))}
EXACT = {
    "beside": each_mlp(AdapterBeside),
    "hook on down": hook_on("model.layers.1.mlp.down_proj", lambda hidden: 2 * hidden),
    "no attention": without("model.layers.1.self_attn", NoAttention),
    "no layer": without("model.layers.1", NoLayer),
    "head": longer_head,
    "wider": wider,
    "shared mlp": shared_mlp,
    "head's weight": HeadsWeight,
}


def axis():
    return init_device_mesh(device_type(), (dist.get_world_size(),), mesh_dim_names=("tp",))


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_an_edit_that_a_plan_would_get_wrong_is_refused_with_what_was_edited(name, sequence_parallel):
    model = llama(REFUSED[name])
    with pytest.raises(ValueError, match=r"not as transformers builds it, (the model|model\.layers\.\d\S*) .* fails"):
        resolve_plan(model, sequence_parallel=sequence_parallel)
    with pytest.raises(ValueError, match="the plan does not fit"):
        explain_plan(model, _parallelize_llama(model, sequence_parallel), 2)


def test_an_edit_that_mixes_tokens_is_refused_with_sequence_parallelism_only():
    for edit in MIXES_TOKENS.values():
        with pytest.raises(ValueError, match=r"model\.layers\.0 has a forward hook.* cumsum over tokens"):
            resolve_plan(llama(edit), sequence_parallel=True)
        assert resolve_plan(llama(edit))


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.ranks(2, timeout=120)
def test_an_edited_model_trains_as_in_one_process(name, sequence_parallel):
    one, model = llama(EXACT[name], layers=3), llama(EXACT[name], layers=3)
    apply_plan(model, axis(), resolve_plan(model, sequence_parallel=sequence_parallel))
    assert_trains_as(one, model)


@pytest.mark.ranks(2)
def test_a_layer_that_is_used_twice_is_sharded_once():
    for family in ("llama", "mistral"):
        model = tiny(family, layers=4)
        layer_twice(model)
        one = copy.deepcopy(model)
        apply_plan(model, axis(), resolve_plan(model))
        assert_trains_as(one, model)


def assert_trains_as(one, model):
    ids, labels = token_batch(2, 12)
    for each in (one, model):
        next_token_loss(each(ids, use_cache=False).logits, labels).backward()
    assert_same(gradients(model), gradients(one), 1e-9, "gradients")


@pytest.mark.ranks(2)
def test_a_familys_plan_given_by_hand_is_not_applied_to_a_model_that_it_does_not_fit():
    for name in ("mlp", "penalty"):
        model = llama(REFUSED[name])
        with pytest.raises(ValueError, match="the plan does not fit"):
            apply_plan(model, axis(), _parallelize_llama(model))
        assert not any(hasattr(parameter, "placements") for parameter in model.parameters())


def test_what_transformers_and_pipelines_do_to_a_model_is_no_edit():
    model = llama()
    assert what_was_edited(model) is None
    ids, _ = token_batch(2, 12)
    model(ids, output_hidden_states=True)  # leaves hooks behind
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable()
    model.resize_token_embeddings(80)
    assert what_was_edited(model) is None
    model.model.layers[1] = nn.Identity()
    model.lm_head = nn.Identity()
    assert what_was_edited(model) is None
    whole = llama()
    whole.model.norm = nn.Identity()
    assert what_was_edited(whole) == "it has no model.norm"


def test_a_replaced_forward_of_a_class_is_an_edit(monkeypatch):
    monkeypatch.setattr(LlamaMLP, "forward", NormedMLP.forward)
    assert "LlamaMLP.forward was replaced" in what_was_edited(llama())


def test_comparing_a_model_with_a_new_one_draws_no_random_number():
    model = llama()
    state = torch.get_rng_state()
    model.config.vocab_size += 1  # a config that was not met before
    assert "embed_tokens has the parameters" in what_was_edited(model)
    assert torch.get_rng_state().equal(state)
