"""Parts of a cut model, run one after the other in one process, give what the whole model gives."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaModel

from am_pipeline import build_part, generate_hf_model_fqn_per_model_part, plan_cut
from am_pipeline.cut.boundary import select_output
from am_pipeline.nested import tensors_in
from am_testkit.exact import assert_same, gradients
from am_testkit.heads import small_for
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

    logits = chained(model, plan_cut(model, num_stages), ids)
    next_token_loss(logits, labels).backward()

    assert_same(logits, expected, 1e-12, "logits")
    assert_same(gradients(model), gradients(whole), 1e-10, "gradients")


def chained(model, plan, ids, **inputs):
    """The output of all parts in a row, each with the ids where it needs them."""
    sent = (ids,)
    for stage, passage in enumerate(plan.passages):
        needed = {"input_ids": ids} if stage and "input_ids" in passage.needs else {}
        output = build_part(model, plan, stage)[0](*sent, **needed, **inputs)
        sent = output if isinstance(output, tuple) else (output,)
    return output


def same_as_whole(model, ids, plan, **inputs):
    whole = copy.deepcopy(model)
    expected = whole(ids, **inputs)
    expected.square().mean().backward()
    output = chained(model, plan, ids, **inputs)
    output.square().mean().backward()
    assert_same(output, expected, 1e-12, "output")
    wanted = {name: p.grad for name, p in whole.named_parameters() if p.grad is not None}
    assert_same({n: p.grad for n, p in model.named_parameters() if n in wanted}, wanted, 1e-10, "gradients")


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


@pytest.mark.parametrize("first", ["recompute", "cut"])
def test_layers_that_a_reentrant_checkpoint_recomputes_one_by_one_are_exact(first):
    model = tiny("llama", attention="sdpa").train()
    whole = copy.deepcopy(model)
    if first == "recompute":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
        model.enable_input_require_grads()
    plan = plan_cut(model, 2)
    parts = [build_part(model, plan, stage)[0] for stage in range(2)]
    if first == "cut":
        for part in parts:
            part.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    ids, labels = token_batch(2, 12)
    sent = parts[0](ids)
    received = sent.detach().clone().requires_grad_()
    next_token_loss(parts[1](received), labels).backward()
    sent.backward(received.grad)
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


def test_work_between_the_layers_is_done_where_the_next_layer_is():
    class Scaled(LlamaModel):
        def forward(self, input_ids, **kwargs):
            hidden = self.embed_tokens(input_ids)
            places = torch.arange(hidden.shape[1])[None]
            rotary = self.rotary_emb(hidden, places)
            for layer in self.layers:
                hidden = layer(hidden, position_embeddings=rotary) * 0.5
            return self.norm(hidden)

    model = Scaled(tiny("llama").config).double()
    for stages in (2, 4):
        same_as_whole(model, token_batch(2, 6)[0], plan_cut(model, stages))
        model.zero_grad()


@pytest.mark.parametrize(
    ("beside", "traveling", "needs_ids"),
    [
        (lambda ids, embedded: (ids % 3)[..., None], [], True),
        (lambda ids, embedded: embedded * 2, ["embed_tokens"], False),
    ],
)
def test_what_layers_take_beside_the_hidden_state_is_found(beside, traveling, needs_ids):
    plan = plan_cut(_llama_with(beside), 2)
    assert [crossed.value.unit for crossed in plan.traveling] == traveling
    assert plan.needs_first_input is needs_ids


def test_dropout_before_the_layers_needs_nothing_later():
    plan = plan_cut(tiny("gpt2").train(), 2)
    assert not plan.traveling


def test_a_mask_drawn_once_for_layers_of_several_stages_is_refused():
    model = _llama_with(lambda ids, hidden: torch.nn.functional.dropout(hidden, 0.5)).train()
    with pytest.raises(ValueError, match=r"random numbers drawn at .* would be drawn anew on every stage"):
        plan_cut(model, 2)


def test_layers_skipped_at_random_are_refused():
    model = small("opt", layerdrop=0.1)
    assert len(plan_cut(model, 2).stages) == 2
    with pytest.raises(ValueError, match=r"skips layers at random in training \(layerdrop 0\.1\)"):
        plan_cut(model.train(), 2)
    encoder = small_for("translation", "bart", torch.float32, encoder_layerdrop=0.3)
    with pytest.raises(ValueError, match=r"layerdrop 0\.3\), .* set encoder_layerdrop .* to 0"):
        plan_cut(encoder.train(), 2)


def test_a_part_that_needs_the_ids_says_so():
    model = _llama_with(lambda ids, embedded: ids[..., None])
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
    expected = list(tensors_in(select_output(whole(ids, use_cache=False))))
    assert len(expected) == (2 if kind == "QuestionAnswering" else 1)
    sum(tensor.square().sum() for tensor in expected).backward()
    output = list(tensors_in(chained(model, plan_cut(model, 2), ids)))
    sum(tensor.square().sum() for tensor in output).backward()
    for mine, whole_output in zip(output, expected, strict=True):
        assert_same(mine, whole_output, 1e-12, "output")
    given = {name: p.grad for name, p in whole.named_parameters() if p.grad is not None}
    assert_same({name: p.grad for name, p in model.named_parameters() if p.grad is not None}, given, 1e-10, "gradients")


def test_layers_that_share_keys_and_values_beside_the_hidden_state_are_refused():
    words = r"model\.layers\.2 takes more from model\.layers\.0 than it returns: .* inside model\.layers\.0\.self_attn"
    with pytest.raises(ValueError, match=words):
        plan_cut(
            small("gemma3n_text", num_kv_shared_layers=2, layer_types=["sliding_attention", "full_attention"] * 2), 2
        )


def test_hidden_states_of_earlier_layers_travel_to_the_layer_that_takes_them():
    class Skip(LlamaModel):
        def forward(self, input_ids, **kwargs):
            hidden = self.embed_tokens(input_ids)
            rotary = self.rotary_emb(hidden, torch.arange(hidden.shape[1])[None])
            kept = []
            for layer in self.layers:
                hidden = layer(hidden + sum(kept), position_embeddings=rotary)
                kept.append(hidden)
            return self.norm(hidden)

    model = Skip(tiny("llama").config).double()
    plan = plan_cut(model, 4)
    assert [[str(c.value.unit) for c in passage.sends] for passage in plan.passages] == [
        ["layers.0"],
        ["layers.0", "layers.1"],
        ["layers.0", "layers.1", "layers.2"],
        [],
    ]
    same_as_whole(model, token_batch(2, 6)[0], plan)


def test_a_head_that_reads_the_weights_of_another_module_shares_them():
    class Reads(LlamaModel):
        def forward(self, input_ids, **kwargs):
            hidden = self.embed_tokens(input_ids)
            rotary = self.rotary_emb(hidden, torch.arange(hidden.shape[1])[None])
            for layer in self.layers:
                hidden = layer(hidden, position_embeddings=rotary)
            return nn.functional.linear(self.norm(hidden), self.embed_tokens.weight)

    model = Reads(tiny("llama").config).double()
    plan = plan_cut(model, 2)
    assert "embed_tokens.weight (stage 0) = embed_tokens.weight (stage 1)" in str(plan)
    same_as_whole(model, token_batch(2, 6)[0], plan)


def test_work_between_the_layers_that_only_some_inputs_cause_is_proved_when_they_come():
    class DeepStack(LlamaModel):
        def forward(self, input_ids, features=None, **kwargs):
            hidden = self.embed_tokens(input_ids)
            rotary = self.rotary_emb(hidden, torch.arange(hidden.shape[1])[None])
            for index, layer in enumerate(self.layers):
                hidden = layer(hidden, position_embeddings=rotary)
                if features is not None and index < 3:
                    hidden = hidden + features
            return self.norm(hidden)

    model = DeepStack(tiny("llama").config).double()
    features = torch.randn(2, 6, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    same_as_whole(model, token_batch(2, 6)[0], plan_cut(model, 2), features=features)


def test_inputs_that_cut_otherwise_than_the_plan_are_refused_by_name():
    class Backwards(LlamaModel):
        def forward(self, input_ids, backwards=None, **kwargs):
            hidden = self.embed_tokens(input_ids)
            rotary = self.rotary_emb(hidden, torch.arange(hidden.shape[1])[None])
            for layer in reversed(self.layers) if backwards is not None else self.layers:
                hidden = layer(hidden, position_embeddings=rotary)
            return self.norm(hidden)

    model = Backwards(tiny("llama").config)
    part, _ = build_part(model, plan_cut(model, 2), 0)
    words = r"cannot be called with input_ids, backwards.*: layers\.1 on stage 0 reads what layers\.2 returns"
    with pytest.raises(ValueError, match=words):
        part(torch.ones(1, 6, dtype=torch.int64), backwards=True)


def _llama_with(beside):
    class WithMore(LlamaModel):
        def forward(self, input_ids, **kwargs):
            hidden = self.embed_tokens(input_ids)
            rotary = self.rotary_emb(hidden, torch.arange(hidden.shape[1])[None])
            more = beside(input_ids, hidden)
            for layer in self.layers:
                hidden = layer(hidden + more, position_embeddings=rotary)
            return self.norm(hidden)

    return WithMore(tiny("llama").config)
