"""Sequence parallelism of models with several stacks of layers: each is shown by itself, or stays whole."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

from am_testkit.device import device_type
from am_testkit.exact import assert_same, gradients, relative_error, whole
from am_testkit.heads import small_for
from am_testkit.models import next_token_loss
from am_testkit.zoo import small
from am_tp_plans import (
    SequenceShardArgument,
    SequenceShardInput,
    add_sequence_parallelism,
    apply_plan,
    explain_plan,
    infer_plan,
    resolve_plan,
)
from am_tp_plans.expand import is_part
from am_tp_plans.styles.basic import each


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, hidden):
        return hidden + self.down(self.up(self.norm(hidden)).relu())


class TwoStacks(nn.Module):
    """A tower over patches, whose mean is added to every token, and a stack over tokens."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.tower = nn.ModuleList([Layer(), Layer()])
        self.layers = nn.ModuleList([Layer(), Layer()])

    def forward(self, input_ids, patches=None):
        hidden = self.embed(input_ids)
        if patches is not None:
            for layer in self.tower:
                patches = layer(patches)
            hidden = hidden + patches.mean(1, keepdim=True)
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


PLAN = {f"{stack}.*.up": ColwiseParallel() for stack in ("tower", "layers")}
PLAN |= {f"{stack}.*.down": RowwiseParallel() for stack in ("tower", "layers")}
IDS = torch.ones(2, 8, dtype=torch.int64)


def sharded_stacks(plan):
    return {key.partition(".")[0] for key, style in plan.items() if isinstance(style, SequenceShardInput)}


@pytest.mark.parametrize(
    ("patches", "stacks", "whole"),
    [(6, {"tower", "layers"}, ()), (7, {"layers"}, ("tower",)), (None, {"layers"}, ("tower",))],
    ids=["both divide", "patches do not divide", "the tower does not run"],
)
def test_each_stack_is_shown_by_itself_or_keeps_its_whole_sequence(patches, stacks, whole):
    inputs = {"input_ids": IDS} | ({"patches": torch.ones(2, patches, 8)} if patches else {})
    plan = add_sequence_parallelism(TwoStacks(), PLAN, example_inputs=inputs)
    assert sharded_stacks(plan) == stacks
    report = explain_plan(TwoStacks(), plan, 2, example_inputs=inputs)
    assert report.whole_sequence == whole
    assert ("the sequence is whole between the layers of: tower" in str(report)) == bool(whole)


def test_a_plan_without_a_stack_that_can_be_shown_is_refused_with_the_reason():
    tower = {key: style for key, style in PLAN.items() if key.startswith("tower")}
    with pytest.raises(ValueError, match=r"the blocks of tower: ids alone do not run tower.0.*give example_inputs"):
        add_sequence_parallelism(TwoStacks(), tower)
    with pytest.raises(ValueError, match="the plan shards nothing in any"):
        add_sequence_parallelism(TwoStacks(), {})


class ListOfCalled(nn.Module):
    """As the layers of T5: a list of what it calls, with an activation and something that mixes tokens, both bare."""

    def __init__(self):
        super().__init__()
        inner = {"norm": nn.LayerNorm(8), "up": nn.Linear(8, 16), "act": nn.ReLU(), "down": nn.Linear(16, 8)}
        self.layer = nn.ModuleList([nn.ModuleDict(inner | {"mix": nn.Softmax(1)})])

    def forward(self, hidden):
        inner = self.layer[0]
        return hidden + inner["mix"](inner["down"](inner["act"](inner["up"](inner["norm"](hidden)))))


def test_what_a_layer_calls_is_found_through_its_lists_and_placed_though_it_has_no_parameters():
    model = TwoStacks()
    model.layers = nn.ModuleList([ListOfCalled(), ListOfCalled()])
    plan = add_sequence_parallelism(
        model, {"layers.*.layer.*.up": ColwiseParallel(), "layers.*.layer.*.down": RowwiseParallel()}
    )
    styles = {key: type(style).__name__ for key, style in plan.items() if key.startswith("layers.*")}
    assert styles == {
        "layers.*.layer.*.up": "ColwiseParallel",
        "layers.*.layer.*.down": "RowwiseParallel",
        "layers.*.layer.*.mix": "SequenceWholeBlock",
        "layers.*.layer.*.norm": "ReplicatedWithGradAllReduce",
    }


class BringsAPlanForTokens(TwoStacks):
    _tp_plan = {"layers.*.up": "colwise", "layers.*.down": "rowwise"}  # noqa: RUF012 - as transformers writes it

    def __init__(self):
        super().__init__()
        del self.tower[1]


@pytest.mark.parametrize("patches", [True, False], ids=["the tower runs", "ids alone"])
def test_a_plan_that_a_model_brings_is_extended_to_a_tower_that_runs(patches):
    inputs = {"input_ids": IDS} | ({"patches": torch.ones(2, 7, 8)} if patches else {})
    plan = resolve_plan(BringsAPlanForTokens(), infer=True, example_inputs=inputs)
    assert any(key.startswith("tower.*") for key in plan) == patches
    report = explain_plan(BringsAPlanForTokens(), plan, 2, example_inputs=inputs)
    assert report.whole_stacks == (() if patches else ("tower",))
    assert ("every rank holds all layers of: tower" in str(report)) != patches
    brought = resolve_plan(BringsAPlanForTokens(), example_inputs=inputs)
    assert not any(key.startswith("tower") for key in brought)  # only if it is asked for


class Tower(nn.Module):
    """As CLIP's: returns what lies between its layers to who asks for it."""

    config = None

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Layer(), Layer()])

    def forward(self, patches, output_hidden_states=False):
        between = [patches]
        for layer in self.layers:
            between.append(layer(between[-1]))
        return tuple(between) if output_hidden_states else between[-1:]


class ReadsALayerOfItsTower(TwoStacks):
    """As LLaVA, which takes the features of layers that it is told."""

    def __init__(self):
        torch.manual_seed(0)
        super().__init__()
        self.tower = Tower()

    def forward(self, input_ids, patches):
        hidden = self.embed(input_ids) + sum(self.tower(patches, output_hidden_states=True)).mean(1, keepdim=True)
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


@pytest.mark.ranks(2)
def test_a_tower_whose_layers_are_read_keeps_its_whole_sequence_and_is_exact():
    inputs = {"input_ids": IDS, "patches": torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(1))}
    plan = {key.replace("tower.", "tower.layers."): style for key, style in PLAN.items()}
    one, sharded = ReadsALayerOfItsTower(), ReadsALayerOfItsTower()
    plan = add_sequence_parallelism(sharded, plan, example_inputs=inputs)
    assert sharded_stacks(plan) == {"layers"}
    apply_plan(sharded, init_device_mesh(device_type(), (2,), mesh_dim_names=("tp",)), plan)
    for model in (one, sharded):
        model(**inputs).square().sum().backward()
    assert_same(gradients(sharded), gradients(one), 1e-5)


class ListOfLinears(TwoStacks):
    """As a merger of patches: a list of two linears and the activation between them, which has no parameters."""

    def __init__(self):
        super().__init__()
        self.tower[1] = nn.Module()
        self.tower[1].mlp = nn.ModuleList([nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)])


class OwnActivation(nn.Module):
    def forward(self, hidden):
        return hidden.relu()


def test_an_activation_in_a_list_is_no_layer_that_a_pipeline_left_out():
    model = ListOfLinears()
    assert not is_part(model)
    model.tower[1].mlp[1] = OwnActivation()
    assert not is_part(model)
    for absent in (nn.Identity(), type("Absent", (nn.Module,), {})()):
        model = TwoStacks()
        model.layers[1] = absent
        assert is_part(model)


class OnlyInTraining(Layer):
    """As a layer with noise or a balance of its own: in training it mixes the tokens, without any dropout."""

    def forward(self, hidden):
        return super().forward(hidden - hidden.mean(1, keepdim=True) if self.training else hidden)


def test_what_a_model_does_in_training_only_is_seen_too():
    model = TwoStacks()
    del model.tower
    model.layers[1] = OnlyInTraining()
    with pytest.raises(ValueError, match=r"layers\.1.* That is in training mode"):
        add_sequence_parallelism(model, {key: style for key, style in PLAN.items() if key.startswith("layers")})


@pytest.mark.parametrize("seed", range(6))
def test_layers_that_are_dropped_by_chance_are_planned_whatever_numbers_a_rank_has_drawn(seed):
    model = small_for("translation", "m2m_100", torch.float32, encoder_layerdrop=0.5, decoder_layerdrop=0.5)
    torch.manual_seed(seed)
    before = torch.get_rng_state()
    inputs = {"input_ids": IDS, "decoder_input_ids": IDS}
    assert resolve_plan(model, infer=True, example_inputs=inputs)
    assert torch.get_rng_state().equal(before)


class LastLayerIsSkipped(TwoStacks):
    def forward(self, input_ids):
        return self.layers[0](self.embed(input_ids))


def test_nothing_is_added_to_layers_that_do_not_run():
    layers = {key: style for key, style in PLAN.items() if key.startswith("layers")}
    with pytest.raises(ValueError, match="the blocks of layers"):
        add_sequence_parallelism(LastLayerIsSkipped(), layers)


class LastLayerIsOfPatches(TwoStacks):
    """As Mllama with a last layer that attends to an image: without one, nothing gathers the sequence after it."""

    def forward(self, input_ids, patches=None):
        hidden = self.layers[0](self.embed(input_ids))
        return hidden if patches is None else self.layers[1](hidden)


def test_a_plan_shown_with_an_image_is_shown_without_one_too():
    layers = {key: style for key, style in PLAN.items() if key.startswith("layers")}
    with pytest.raises(ValueError, match=r"with ids alone, which it takes too: .*its output would be one rank's share"):
        add_sequence_parallelism(
            LastLayerIsOfPatches(), layers, example_inputs={"input_ids": IDS, "patches": torch.ones(2, 4, 8)}
        )


class Block(nn.Module):
    """Mixes the tokens of a row, and returns them as `(B, S, D)` or one below the other."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.proj = kind, nn.Linear(8, 8)

    def forward(self, hidden):
        mixed = self.proj(hidden) * hidden.mean(1, keepdim=True)
        if self.kind == "tokens of a row after each other":
            return mixed.reshape(-1, 8), None
        if self.kind == "a token of every row after each other":
            return mixed.transpose(0, 1).reshape(-1, 8), None
        return mixed, None


class WithFurther(Layer):
    """As `Layer`, with a block that returns rows in some order and a further argument for every token."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.block, self.gate = kind, Block(kind), nn.Linear(8, 8)

    def forward(self, hidden, further=None):
        rows, length, width = hidden.shape
        mixed, _ = self.block(hidden)
        if self.kind == "a token of every row after each other":
            mixed = mixed.view(length, rows, width).transpose(0, 1)
        hidden = super().forward(hidden + mixed.view(rows, length, width))
        if self.kind.startswith("every token"):
            return hidden + self.gate(hidden) * further
        if self.kind == "all tokens meet all of an argument":
            return hidden + self.gate(hidden) * further.mean(1, keepdim=True)
        return hidden + self.gate(hidden)


class Stream(nn.Module):
    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.embed, self.further = kind, nn.Embedding(16, 8), nn.Embedding(16, 8)
        self.layers = nn.ModuleList([WithFurther(kind), WithFurther(kind)])

    def forward(self, input_ids):
        further = self.further(input_ids)
        hidden = self.embed(input_ids) + further
        for layer in self.layers:
            hidden = layer(hidden, further=further) if self.kind.endswith("by name") else layer(hidden, further)
        return hidden


FURTHER = {  # what splits an argument; None where the sequence is whole
    "tokens of a row after each other": 0,
    "a token of every row after each other": None,
    "every token meets its own of an argument": 2,
    "every token meets its own of an argument by name": 2,
    "all tokens meet all of an argument": None,  # of its gradient each rank would have a part
}


@pytest.mark.ranks(2)
def test_flat_rows_and_further_arguments_of_layers_are_split_where_that_is_shown():
    plan = {"layers.*.up": ColwiseParallel(), "layers.*.down": RowwiseParallel()}
    ids = torch.randint(0, 16, (2, 8), generator=torch.Generator().manual_seed(1))
    for kind, splits in FURTHER.items():
        one, sharded = Stream(kind).double(), Stream(kind).double()
        if splits is None:
            with pytest.raises(ValueError, match="the sequence cannot be sharded"):
                add_sequence_parallelism(one, plan)
            continue
        found = add_sequence_parallelism(one, plan)
        parts = [type(part) for style in found.values() for part in each(style)]
        assert parts.count(SequenceShardArgument) == splits, kind
        apply_plan(sharded, init_device_mesh(device_type(), (2,)), found)
        for model in (one, sharded):
            model(ids).sin().sum().backward()
        assert_same(gradients(sharded), gradients(one), 1e-10)


@pytest.mark.parametrize("name", ["marian", "whisper"])
@pytest.mark.ranks(2)
def test_a_decoder_that_may_attend_to_an_encoder_is_right_with_one_and_without(name):
    """With ids alone nothing runs its cross-attention, whose norms would miss the other ranks' tokens."""
    model = small(name, attention=None).double()
    plan = add_sequence_parallelism(model, infer_plan(model, 2))
    ids = torch.randint(3, 60, (2, 8), generator=torch.Generator().manual_seed(1))
    labels = torch.randint(3, 60, (2, 8), generator=torch.Generator().manual_seed(2))
    states = torch.randn(2, 10, model.config.hidden_size, generator=torch.Generator().manual_seed(3)).double()
    given = {"encoder_outputs": (states,)} if name == "whisper" else {"encoder_hidden_states": states}
    for inputs in ({}, given):
        sharded = apply_plan(copy.deepcopy(model), init_device_mesh(device_type(), (2,)), plan)
        for either in (sharded, one := copy.deepcopy(model)):
            logits = whole(either(input_ids=ids, use_cache=False, **inputs).logits)
            next_token_loss(logits, labels).backward()
        found, wanted = (
            {name: whole(p.grad) for name, p in either.named_parameters() if p.grad is not None}
            for either in (sharded, one)
        )
        assert set(found) == set(wanted)
        largest = max(gradient.abs().max().item() for gradient in wanted.values())
        for name, gradient in wanted.items():
            assert relative_error(found[name], gradient, 1e-6 * largest) < 1e-5, name


@pytest.mark.ranks(2)
def test_layers_of_torch_are_exact_in_evaluation_too_where_it_would_take_a_fused_kernel():
    torch.manual_seed(0)
    model = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True), 2, enable_nested_tensor=False
    )
    hidden = torch.randn(2, 8, 16)
    plan = {"layers.*.linear1": ColwiseParallel(), "layers.*.linear2": RowwiseParallel()}
    with torch.no_grad():
        expected = model.eval()(hidden)
        sharded = apply_plan(copy.deepcopy(model), init_device_mesh(device_type(), (2,), mesh_dim_names=("tp",)), plan)
        assert_same(sharded(hidden), expected, 1e-5)
