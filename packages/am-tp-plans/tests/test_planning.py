"""Finding, expanding and refusing plans needs no processes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel

from am_tp_plans import expand_plan, resolve_plan

PLAN = {"layers.*.up": ColwiseParallel(), "layers.*.down": RowwiseParallel()}


def plan_by_function(model, sequence_parallel):
    return PLAN | ({"norm": ColwiseParallel()} if sequence_parallel else {})


def model_of(layers, absent=()):
    blocks = [
        nn.Identity() if i in absent else nn.ModuleDict({"up": nn.Linear(2, 4), "down": nn.Linear(4, 2)})
        for i in range(layers)
    ]
    return nn.ModuleDict({"layers": nn.ModuleList(blocks), "head": nn.Linear(2, 2)})


@given(layers=st.integers(1, 12), data=st.data())
def test_a_wildcard_becomes_the_modules_that_are_there_once_each_in_order(layers, data):
    absent = data.draw(st.sets(st.integers(0, layers - 1)))
    expanded = expand_plan(model_of(layers, absent), PLAN)
    held = [i for i in range(layers) if i not in absent]
    assert list(expanded) == [f"layers.{i}.{name}" for i in held for name in ("up", "down")]
    assert all(style is PLAN["layers.*." + name.rpartition(".")[2]] for name, style in expanded.items())


def test_a_later_key_goes_before_an_earlier_one():
    special = RowwiseParallel()
    assert expand_plan(model_of(2), PLAN | {"layers.1.up": special})["layers.1.up"] is special


@pytest.mark.parametrize("key", ["layers.*.gate", "layer.*.up", "layers.7.up", "head.up"])
def test_a_key_that_matches_nothing_is_refused_by_name(key):
    with pytest.raises(ValueError, match=f"key '{key}' matches no module".replace("*", r"\*")):
        expand_plan(model_of(2), {key: ColwiseParallel()})


def test_a_key_for_a_module_that_a_pipeline_left_out_is_passed_over():
    model = model_of(2, absent={0, 1})
    model["head"] = nn.Identity()
    assert expand_plan(model, PLAN | {"head": ColwiseParallel()}) == {}
    with pytest.raises(ValueError, match="'tail' matches no module"):
        expand_plan(model, {"tail": ColwiseParallel()})


def test_a_layer_of_torch_without_parameters_is_no_module_that_was_left_out():
    model = nn.ModuleDict({"dropout": nn.Dropout(0.1)})
    assert list(expand_plan(model, {"dropout": SequenceParallel()})) == ["dropout"]
    with pytest.raises(ValueError, match=r"'dropout\.inner' matches no module"):
        expand_plan(model, {"dropout.inner": ColwiseParallel()})


def test_plans_come_from_a_dict_then_a_path_then_the_registry():
    model = model_of(1)
    assert resolve_plan(model, PLAN) is PLAN
    here = f"{__name__}.plan_by_function"
    assert "norm" in resolve_plan(model, here, sequence_parallel=True)
    assert resolve_plan(model, f"{__name__}.PLAN") is PLAN


@pytest.mark.parametrize(
    ("plan", "error", "words"),
    [
        (None, ValueError, "no tensor-parallel plan for torch.nn.modules.container.ModuleDict"),
        ("nowhere.at.all", ValueError, "'nowhere.at.all' cannot be imported"),
        ("torch.nn.NoSuchPlan", ValueError, "NoSuchPlan"),
        ("plan", ValueError, "'plan' cannot be imported"),
        ("math.pi", TypeError, "math.pi must be or return a dict"),
        (3, TypeError, "must be a dict, an import path or None, got int"),
        ({"head": "colwise"}, TypeError, "'head' has 'colwise', which is not a torch ParallelStyle"),
    ],
)
def test_anything_else_is_refused_and_nothing_is_tried_instead(plan, error, words):
    with pytest.raises(error, match=words):
        resolve_plan(model_of(1), plan)
