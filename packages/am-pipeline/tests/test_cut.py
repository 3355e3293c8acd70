"""Parts of a cut model, run one after the other in one process, give what the whole model gives."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaModel

from am_pipeline import build_part, generate_hf_model_fqn_per_model_part, plan_cut
from am_testkit.exact import assert_same, gradients
from am_testkit.models import next_token_loss, tiny, token_batch

FAMILIES = [
    ("llama", {}),
    ("llama", {"tied": True}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}),
    ("qwen3", {"tied": True}),
    ("qwen3_moe", {}),
    ("mixtral", {}),
    ("gemma3_text", {}),
    ("gpt2", {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}),
]


@pytest.mark.parametrize(("family", "settings"), FAMILIES, ids=lambda value: str(value))
@pytest.mark.parametrize("num_stages", [2, 4])
def test_parts_in_a_row_equal_the_whole_model(family, settings, num_stages):
    model = tiny(family, **settings)
    whole = copy.deepcopy(model)
    ids, labels = token_batch(2, 12)
    expected = whole(ids, use_cache=False).logits
    next_token_loss(expected, labels).backward()

    plan = plan_cut(model, num_stages)
    hidden = ids
    for stage in range(num_stages):
        hidden = build_part(model, plan, stage)[0](hidden)
    next_token_loss(hidden, labels).backward()

    assert_same(hidden, expected, 1e-12, "logits")
    assert_same(gradients(model), gradients(whole), 1e-10, "gradients")


def test_a_part_keeps_names_and_class_and_holds_nothing_of_the_others():
    model = tiny("qwen3", tied=True)
    plan = plan_cut(model, 2)
    parts = [build_part(model, plan, stage)[0] for stage in range(2)]
    for part in parts:
        assert type(part) is type(model)
        assert set(part.state_dict()) <= set(model.state_dict())
    assert not any("layers.2" in name or "lm_head" in name for name in parts[0].state_dict())
    assert not any("layers.0" in name or "embed" in name for name in parts[1].state_dict())
    held = [p for part in parts for p in part.parameters()]
    assert {id(p) for p in held} <= {id(p) for p in model.parameters()}, "a part must not copy parameters"


def test_the_plan_prints_what_each_stage_holds_and_what_is_shared():
    text = str(plan_cut(tiny("llama", tied=True), 2))
    assert "stage 0  model.layers.0-1  model.embed_tokens" in text
    assert "model.embed_tokens.weight (stage 0) = lm_head.weight (stage 1)" in text


def test_a_model_on_meta_is_cut_without_memory():
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny("llama").config)
    part, _ = build_part(model, plan_cut(model, 2), 1)
    assert all(p.is_meta for p in part.parameters())
    assert all(b.is_meta for b in part.buffers())


def test_names_given_by_hand_cut_where_they_say():
    model = tiny("llama")
    names = generate_hf_model_fqn_per_model_part(2, 4)
    names[1].insert(0, names[0].pop(names[0].index("model.layers.1")))
    plan = plan_cut(model, module_names_per_stage=names)
    assert [list(plan.layers_of(s)) for s in range(2)] == [[0], [1, 2, 3]]


def test_a_recomputed_layer_sees_its_own_microbatch():
    """Activation checkpointing runs a layer again in backward, when another microbatch has passed the boundary."""
    model = tiny("llama")
    whole = copy.deepcopy(model)
    plan = plan_cut(model, 2)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    parts = [build_part(model, plan, stage)[0] for stage in range(2)]
    batches = [token_batch(2, 12, seed=seed) for seed in (1, 2)]
    losses = [next_token_loss(parts[1](parts[0](ids)), labels) for ids, labels in batches]
    for loss in losses:
        loss.backward()
    for ids, labels in batches:
        next_token_loss(whole(ids, use_cache=False).logits, labels).backward()
    assert_same(gradients(model), gradients(whole), 1e-10, "gradients")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda names: names[0].append("model.layers.9"), "names 'model.layers.9', which LlamaForCausalLM does not"),
        (lambda names: names[0].remove("model.layers.0"), "missing: \\['model.layers.0'\\]"),
        (lambda names: names[1].append("model.layers.0"), "named twice: \\['model.layers.0'\\]"),
        (lambda names: names[1].remove("lm_head"), "no stage .* holds \\['lm_head.weight'\\]"),
        (lambda names: names.append(["model.norm"]), "stage 2 .* holds no layer"),
    ],
)
def test_wrong_names_by_hand_are_refused(change, words):
    names = generate_hf_model_fqn_per_model_part(2, 4)
    change(names)
    with pytest.raises(ValueError, match=words):
        plan_cut(tiny("llama"), module_names_per_stage=names)


def test_more_stages_than_layers_are_refused():
    with pytest.raises(ValueError, match="between 1 and the number of layers, 4"):
        plan_cut(tiny("llama"), 5)


def test_a_model_without_a_stack_is_refused():
    with pytest.raises(ValueError, match="no decoder stack"):
        plan_cut(nn.Sequential(nn.Linear(2, 2)), 2)


def test_a_model_that_works_between_its_layers_is_refused():
    class Scaled(LlamaModel):
        def forward(self, input_ids, **kwargs):
            hidden = self.embed_tokens(input_ids)
            places = torch.arange(hidden.shape[1])[None]
            rotary = self.rotary_emb(hidden, places)
            for layer in self.layers:
                hidden = layer(hidden, position_embeddings=rotary) * 0.5
            return self.norm(hidden)

    with pytest.raises(ValueError, match="changes the hidden state between layer 0 and layer 1"):
        plan_cut(Scaled(tiny("llama").config), 2)


def test_a_model_whose_layers_take_more_than_the_hidden_state_from_the_ids_is_refused():
    with pytest.raises(ValueError, match="layer 0 takes an input that depends on the ids"):
        plan_cut(_llama_with(lambda ids, hidden: {"tokens": ids}), 2)
    with pytest.raises(ValueError, match="layer 0 takes an input that depends on the embedded ids"):
        plan_cut(_llama_with(lambda ids, hidden: {"first": hidden + 0}), 2)


def test_a_head_that_reads_the_ids_is_refused():
    from transformers import AutoModelForSequenceClassification

    config = tiny("llama").config
    with pytest.raises(ValueError, match="what follows the layers reads the ids"):
        plan_cut(AutoModelForSequenceClassification.from_config(config), 2)


def _llama_with(side_inputs):
    class WithSideInputs(LlamaModel):
        def forward(self, input_ids, **kwargs):
            hidden = self.embed_tokens(input_ids)
            rotary = self.rotary_emb(hidden, torch.arange(hidden.shape[1])[None])
            beside = side_inputs(input_ids, hidden)
            for layer in self.layers:
                hidden = layer(hidden, position_embeddings=rotary, **beside)
            return self.norm(hidden)

    return WithSideInputs(tiny("llama").config)
