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
from am_testkit.zoo import small

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


@pytest.mark.parametrize(
    ("beside", "traveling", "needs_ids"),
    [
        (lambda ids, hidden: {"tokens": ids}, [], True),
        (lambda ids, hidden: {"first": hidden + 0}, ["embed_tokens"], False),
    ],
)
def test_what_layers_take_beside_the_hidden_state_is_found(beside, traveling, needs_ids):
    residual = plan_cut(_llama_with(beside), 2).residual
    assert [name for name, _ in residual.traveling] == traveling
    assert residual.needs_ids is needs_ids


def test_dropout_does_not_confuse_the_rehearsal():
    residual = plan_cut(tiny("gpt2").train(), 2).residual
    assert not residual.traveling
    assert not residual.needs_ids


def test_layers_skipped_at_random_are_refused():
    model = small("opt", layerdrop=0.1)
    assert len(plan_cut(model, 2).stages) == 2
    with pytest.raises(ValueError, match=r"skips layers at random in training \(layerdrop 0\.1\)"):
        plan_cut(model.train(), 2)


def test_a_part_that_needs_the_ids_says_so():
    model = _llama_with(lambda ids, hidden: {"tokens": ids})
    part, _ = build_part(model, plan_cut(model, 2), 1)
    with pytest.raises(ValueError, match="needs the ids on every stage"):
        part(torch.zeros(1, 4, 32))


@pytest.mark.parametrize("kind", ["SequenceClassification", "TokenClassification", "QuestionAnswering"])
def test_other_heads_are_cut_too(kind):
    import transformers

    config = tiny("llama").config
    config.num_labels = 2
    torch.manual_seed(0)
    model = getattr(transformers, f"AutoModelFor{kind}").from_config(config, dtype=torch.float64).eval()
    whole = copy.deepcopy(model)
    ids, _ = token_batch(2, 12)
    ids[0, 7:] = config.pad_token_id
    expected = whole(ids, use_cache=False)[0]
    expected.square().sum().backward()
    plan = plan_cut(model, 2)
    hidden = build_part(model, plan, 0)[0](ids)
    output = build_part(model, plan, 1)[0](hidden, input_ids=ids)
    output.square().sum().backward()
    assert_same(output, expected, 1e-12, "output")
    given = {name: p.grad for name, p in whole.named_parameters() if p.grad is not None}
    assert_same({name: p.grad for name, p in model.named_parameters() if p.grad is not None}, given, 1e-10, "gradients")


def test_layers_that_share_keys_and_values_beside_the_hidden_state_are_refused():
    with pytest.raises(ValueError, match="hand keys and values to later layers"):
        plan_cut(
            small("gemma3n_text", num_kv_shared_layers=2, layer_types=["sliding_attention", "full_attention"] * 2), 2
        )


def test_a_later_layer_that_takes_an_earlier_hidden_state_is_refused():
    class Skip(LlamaModel):
        def forward(self, input_ids, **kwargs):
            hidden = self.embed_tokens(input_ids)
            rotary = self.rotary_emb(hidden, torch.arange(hidden.shape[1])[None])
            kept = []
            for layer in self.layers:
                hidden = layer(hidden, position_embeddings=rotary, skip=list(kept))
                kept.append(hidden)
            return self.norm(hidden)

    with pytest.raises(ValueError, match="takes the hidden state of an earlier layer too"):
        plan_cut(Skip(tiny("llama").config), 2)


def test_a_head_that_reads_the_weights_of_another_module_is_refused():
    class Reads(LlamaModel):
        def forward(self, input_ids, **kwargs):
            hidden = self.embed_tokens(input_ids)
            rotary = self.rotary_emb(hidden, torch.arange(hidden.shape[1])[None])
            for layer in self.layers:
                hidden = layer(hidden, position_embeddings=rotary)
            return nn.functional.linear(self.norm(hidden), self.embed_tokens.weight)

    with pytest.raises(ValueError, match="reads the weights of a module beside the stack directly"):
        plan_cut(Reads(tiny("llama").config), 2)


def test_work_between_absent_layers_that_only_some_inputs_cause_is_refused_when_it_happens():
    class DeepStack(LlamaModel):
        def forward(self, input_ids, features=None, **kwargs):
            hidden = self.embed_tokens(input_ids)
            rotary = self.rotary_emb(hidden, torch.arange(hidden.shape[1])[None])
            for index, layer in enumerate(self.layers):
                hidden = layer(hidden, position_embeddings=rotary)
                if features is not None and index < 3:
                    hidden = hidden + features
            return self.norm(hidden)

    model = DeepStack(tiny("llama").config)
    ids, _ = token_batch(1, 6)
    with pytest.raises(RuntimeError, match="put those layers on the first stage"):
        build_part(model, plan_cut(model, 2), 0)[0](ids, features=torch.ones(1, 6, 32))


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
