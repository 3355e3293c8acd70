"""Values are followed from where they are made to where they are read, and a part that reads others is not proved."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from torch import nn

from am_pipeline import plan_cut
from am_pipeline.cut.crossing import CannotCutError, Shape, needs_of, shape_of
from am_pipeline.cut.forms import SIZES, text_form
from am_pipeline.cut.provenance import Draw, Inner, Input, Value, Weight
from am_pipeline.cut.reading import Reading, holders_of
from am_pipeline.cut.weightless import Weightless


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, hidden):
        return hidden + self.linear(hidden).relu()


class Decoder(nn.Module):
    """Four layers, and a forward that a test gives."""

    def __init__(self, run):
        super().__init__()
        self.embed, self.norm = nn.Embedding(16, 8), nn.LayerNorm(8)
        self.layers = nn.ModuleList(Layer() for _ in range(4))
        self.scale = nn.Parameter(torch.ones(8))
        self.run = run

    def forward(self, input_ids):
        return self.run(self, input_ids)


def read(run):
    return Reading(Weightless(Decoder(run)), ["layers"], text_form("input_ids", training=True))


def stack(model, hidden):
    for layer in model.layers:
        hidden = layer(hidden)
    return hidden


def test_every_source_of_what_a_unit_reads_is_known():
    def run(model, ids):
        embedded = model.embed(ids)
        noise = torch.rand_like(embedded)
        mixed = stack(model, embedded) + noise + (ids > 3)[..., None] + model.embed.weight.sum(0)
        return model.norm(mixed * model.scale)

    reading = read(run)
    norm = reading.small.call("norm", 0)
    kinds = {type(source): source for source in norm.reads}
    assert kinds.keys() == {Value, Input, Weight, Draw}
    assert kinds[Value] == Value("layers.3", 0, 0)
    assert kinds[Input] == Input("input_ids")
    assert kinds[Weight] == Weight("embed", "embed.weight")
    assert reading.small.call("layers.1", 0).reads == {Value("layers.0", 0, 0)}


def test_views_have_the_sources_of_what_they_look_at_and_writes_add_to_them():
    def run(model, ids):
        hidden = model.embed(ids)
        kept = torch.zeros_like(hidden)
        corner = kept[:, :2].transpose(0, 1)
        hidden = stack(model, hidden)
        corner.copy_(hidden[:, :2].transpose(0, 1))
        return model.norm(kept)

    # Of the embedding, zeros_like takes the form alone.
    assert read(run).small.call("norm", 0).reads == {Value("layers.3", 0, 0)}


def test_what_leaves_a_unit_by_another_way_than_its_result_is_told():
    def run(model, ids):
        seen = []
        handle = model.layers[1].linear.register_forward_hook(lambda _m, _a, output: seen.append(output))
        hidden = stack(model, model.embed(ids))
        handle.remove()
        return model.norm(hidden + seen[0])

    reads = read(run).small.call("norm", 0).reads
    assert Inner("layers.1", 0, "layers.1.linear") in reads


def test_numbers_that_the_code_between_units_looks_at_are_noted_and_those_inside_are_not():
    def looks(model, ids):
        hidden = stack(model, model.embed(ids))
        return hidden if hidden.sum() > 0 else -hidden

    (look,) = read(looks).small.looks
    assert look.sources == {Value("layers.3", 0, 0)}
    assert "looks" in look.place
    assert not read(lambda model, ids: stack(model, model.embed(ids))).small.looks


def test_a_value_written_after_it_was_made_is_known_as_such():
    def run(model, ids):
        hidden = model.embed(ids)
        hidden += 1
        return stack(model, hidden)

    trace = read(run).small
    assert trace.written == {Value("embed", 0, 0)}
    assert trace.call("layers.1", 0).reads == {Value("layers.0", 0, 0)}


def test_what_is_sent_is_what_the_unit_returned_and_no_view_that_code_made_of_it():
    """It may have another gradient: a function that reverses it is a view going forward."""

    def run(model, ids):
        hidden = model.embed(ids)
        for layer in model.layers:
            hidden = layer(hidden.view_as(hidden))
        return hidden

    _, passages = read(run).cut(STAGES)
    assert passages[0].made == {("layers.1", 0): ((0, Value("layers.1", 0, 0)),)}


def test_reading_a_model_leaves_generators_and_grad_mode_alone():
    model = Decoder(lambda model, ids: stack(model, model.embed(ids) + torch.rand(())))
    torch.manual_seed(3)
    random.seed(3)
    expected = torch.rand(2), random.random()
    torch.manual_seed(3)
    random.seed(3)
    plan_cut(model, 2)
    assert torch.rand(2).equal(expected[0])
    assert random.random() == expected[1]
    assert torch.is_grad_enabled()


def test_a_unit_that_runs_without_gradients_sends_what_has_none():
    def run(model, ids):
        with torch.no_grad():
            embedded = model.embed(ids)
        return model.norm(stack(model, embedded + 1) + embedded)

    (crossed,) = (c for c in plan_cut(Decoder(run), 2).passages[0].sends if c.value.unit == "embed")
    assert not crossed.requires_grad


def test_a_unit_with_a_state_between_the_layers_is_refused():
    class Normed(Decoder):
        def __init__(self):
            super().__init__(run)
            self.norm = nn.BatchNorm1d(8)

    def run(model, ids):
        hidden = model.embed(ids)
        for layer in model.layers:
            hidden = model.norm(layer(hidden).mT).mT
        return hidden

    assert len(plan_cut(Normed().eval(), 2).stages) == 2
    with pytest.raises(ValueError, match=r"norm keeps a state, norm\.\w+, and would be on stages 0 and 1"):
        plan_cut(Normed(), 2)


STAGES = (("embed", "layers.0", "layers.1"), ("layers.2", "layers.3", "norm"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda p: replace(p, receives=p.receives[1:]), "would compute its output from other values"),
        (lambda p: replace(p, receives=p.receives[::-1]), None),
        (lambda p: replace(p, receives=(p.receives[0], p.receives[0])), "layers.2 would compute on other values"),
        (lambda p: replace(p, returns={}), "did not when the model was cut"),
        (
            lambda p: replace(p, returns=p.returns | {("layers.1", 0): p.returns["embed", 0]}),
            "layers.2 would compute on",
        ),
    ],
)
def test_a_part_that_would_see_other_values_is_not_proved(change, words):
    def run(model, ids):
        embedded = model.embed(ids)
        return model.norm(stack(model, embedded)) + embedded

    reading = read(run)
    stages, passages = reading.cut(STAGES)
    assert [str(c.value) for c in passages[1].receives] == ["what embed returns", "what layers.1 returns"]
    needs = needs_of(reading.small, reading.units, lambda unit: holders_of(stages, unit), 1)
    reading._prove(stages, needs, 1, passages[1])
    if words is None:  # the order of messages is a matter between the stages
        reading._prove(stages, needs, 1, change(passages[1]))
    else:
        with pytest.raises(CannotCutError, match=words):
            reading._prove(stages, needs, 1, change(passages[1]))


def test_a_stage_that_would_send_what_was_written_into_is_not_proved():
    def run(model, ids):
        hidden = model.embed(ids)
        for layer in model.layers:
            hidden = layer(hidden)
            hidden *= 2
        return model.norm(hidden)

    reading = read(run)
    stages, passages = reading.cut(STAGES)
    needs = needs_of(reading.small, reading.units, lambda unit: holders_of(stages, unit), 1)
    careless = replace(passages[0], sends=tuple(replace(c, written=False) for c in passages[0].sends))
    with pytest.raises(CannotCutError, match=r"stage 0 would send something else than what layers\.1 returns"):
        reading._prove(stages, needs, 0, careless)


@pytest.mark.parametrize(
    ("small", "large", "shape"),
    [
        ((3, 8, 32), (5, 16, 32), "(batch, sequence, 32)"),
        ((24, 32), (80, 32), "(batch * sequence, 32)"),
        ((3, 9), (5, 17), "(batch, sequence + 1)"),
        ((6, 4), (10, 8), "(2 * batch, 1/2 * sequence)"),
        ((1, 8), (1, 16), "(1, sequence)"),
        ((3, 7), (5, 12), None),
    ],
)
def test_dims_are_told_from_two_runs(small, large, shape):
    found = shape_of(small, large, SIZES)
    assert (found if found is None else str(found)) == shape
    if isinstance(found, Shape):
        assert (found.at(SIZES[0]), found.at(SIZES[1])) == (small, large)
