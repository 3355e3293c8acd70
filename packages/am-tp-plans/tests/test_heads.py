"""Heads other than next token, and inputs other than ids alone: exact on two ranks, or refused by name."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from am_testkit.device import device_type
from am_testkit.exact import assert_same, gradients, relative_error, whole
from am_testkit.zoo import small_config
from am_tp_plans import (
    add_sequence_parallelism,
    apply_plan,
    explain_plan,
    get_hf_tp_shard_plan,
    infer_plan,
    resolve_plan,
)
from am_tp_plans.proof.numeric_check import check_numbers

FAMILIES = {"llama": "Llama", "qwen2": "Qwen2"}
FAMILIES |= {"bert": "Bert", "roberta": "Roberta", "modernbert": "ModernBert", "distilbert": "DistilBert"}
HEADS = ("SequenceClassification", "TokenClassification", "QuestionAnswering", "MaskedLM")
CASES = [(t, head) for t, family in FAMILIES.items() for head in HEADS if hasattr(transformers, f"{family}For{head}")]


def headed(model_type, head, seed=0, **settings):
    decoder = {"is_decoder": False} if model_type in ("bert", "roberta") else {}
    config = small_config(model_type, layers=2, **(decoder | {"pad_token_id": 0} | settings))
    config.num_labels = 2 if head == "QuestionAnswering" else 3
    torch.manual_seed(seed)
    model = getattr(transformers, f"{FAMILIES[model_type]}For{head}")(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model


def batch(head):
    torch.manual_seed(1)
    ids, mask = torch.randint(3, 90, (3, 8)), torch.ones(3, 8, dtype=torch.int64)
    ids[1, :3], mask[1, :3], ids[2, 6:], mask[2, 6:] = 0, 0, 0, 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if head == "QuestionAnswering":
        return inputs | {"start_positions": torch.tensor([1, 4, 2]), "end_positions": torch.tensor([3, 6, 2])}
    few = 90 if head == "MaskedLM" else 3
    labels = torch.randint(0, few, (3,) if head == "SequenceClassification" else (3, 8))
    return inputs | {"labels": labels.masked_fill(mask == 0, -100) if labels.dim() == 2 else labels}


def outputs(out):
    return {name: whole(value) for name, value in out.items() if isinstance(value, torch.Tensor)}


@pytest.mark.parametrize(("model_type", "head"), CASES)
@pytest.mark.ranks(2, timeout=200)
def test_a_head_is_exact_with_padding_and_labels(model_type, head):
    one, inputs = headed(model_type, head), batch(head)
    expected = one(**inputs)
    expected.loss.backward()
    for sequence in (False, True):
        model = headed(model_type, head)
        plan = resolve_plan(model, sequence_parallel=sequence, infer=True)
        assert check_numbers(model, plan, 2).error < 1e-9
        assert any(".layer" in key for key in plan), "the layers are sharded"
        apply_plan(model, init_device_mesh(device_type(), (2,)), plan)
        out = model(**inputs)
        out.loss.backward()
        assert_same(outputs(out), outputs(expected), 1e-10, f"outputs, sequence={sequence}")
        wanted = {name: p.grad for name, p in one.named_parameters() if p.grad is not None}
        floor = 1e-6 * max(gradient.abs().max().item() for gradient in wanted.values())  # a bias of keys has none
        for name, gradient in wanted.items():
            assert relative_error(model.get_parameter(name).grad, gradient, floor) < 1e-7, (name, sequence)


def test_a_head_that_cannot_run_says_so_in_its_own_words():
    model = headed("bert", "TokenClassification")
    broken = transformers.BertForQuestionAnswering(model.config)
    with pytest.raises(ValueError, match="whole its forward fails with ValueError: too many values to unpack"):
        infer_plan(broken)
    unpadded = headed("llama", "SequenceClassification", pad_token_id=None)
    with pytest.raises(ValueError, match="batch sizes > 1 if no padding token is defined"):
        resolve_plan(unpadded)
    one = {"input_ids": torch.arange(3, 11)[None]}
    plan = resolve_plan(unpadded, sequence_parallel=True, example_inputs=one)
    assert check_numbers(unpadded, plan, 2, one).conditions == ("the example inputs under sdpa", "labels under sdpa")


class TwoInputs(nn.Module):
    """Takes ids and how old they are, none of which has a default."""

    def __init__(self):
        super().__init__()
        self.embed, self.ages = nn.Embedding(16, 8), nn.Embedding(4, 8)
        self.layers = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(8, 12), "down": nn.Linear(12, 8)}) for _ in range(2))

    def forward(self, ids, ages, scale=None):
        hidden = self.embed(ids) + self.ages(ages)
        for layer in self.layers:
            inner = layer["up"](hidden).relu()
            hidden = hidden + layer["down"](inner if scale is None else inner * scale)
        return {"hidden": hidden}


def examples(**more):
    return {"ids": torch.arange(16).view(2, 8), "ages": torch.arange(16).view(2, 8) % 4} | more


@pytest.mark.ranks(2)
def test_a_model_of_two_inputs_is_inferred_by_an_example():
    torch.manual_seed(0)
    one = TwoInputs().double()
    with pytest.raises(ValueError, match="missing 1 required positional argument: 'ages'"):
        infer_plan(one)
    plan = infer_plan(one, example_inputs=examples())
    assert {"layers.*.up", "layers.*.down"} <= set(plan)
    assert check_numbers(one, plan, 2, examples()).error < 1e-12
    torch.manual_seed(0)
    model = TwoInputs().double()
    apply_plan(model, init_device_mesh(device_type(), (2,)), plan)
    for each in (one, model):
        each(**examples())["hidden"].square().sum().backward()
    assert_same(gradients(model), gradients(one), 1e-12)


def test_an_example_decides_what_runs_and_is_looked_at():
    model, plan = TwoInputs().double(), infer_plan(TwoInputs().double(), example_inputs=examples())
    per_feature = examples(scale=torch.arange(1.0, 13.0))
    with pytest.raises(ValueError, match=r"the plan does not fit TwoInputs: .*mul"):
        explain_plan(model, plan, 2, example_inputs=per_feature)
    with pytest.raises(ValueError, match="nothing in TwoInputs was found"):
        infer_plan(model, example_inputs=per_feature)
    report = explain_plan(model, plan, 2, example_inputs=examples())
    assert "(the example inputs)" in str(report)
    with pytest.raises(TypeError, match="must be a dict of keyword arguments of the forward, got Tensor"):
        infer_plan(model, example_inputs=torch.ones(2, 8))


def test_token_types_and_embeddings_are_examples_of_bert():
    model = headed("bert", "SequenceClassification")
    types = {"input_ids": torch.arange(16).view(2, 8), "token_type_ids": torch.arange(16).view(2, 8) % 2}
    embedded = {"inputs_embeds": torch.randn(2, 8, 32), "attention_mask": torch.ones(2, 8, dtype=torch.int64)}
    for example in (types, embedded):
        plan = add_sequence_parallelism(model, infer_plan(model, example_inputs=example), example_inputs=example)
        assert check_numbers(model, plan, 2, example).error < 1e-9
    model = headed("qwen2", "TokenClassification")
    assert get_hf_tp_shard_plan(model, example_inputs=embedded | {"position_ids": torch.arange(8)[None]})
