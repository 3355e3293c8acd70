"""Finding, expanding and refusing plans needs no processes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, SequenceParallel

from am_testkit.zoo import small
from am_tp_plans import PARALLELIZE_FUNCTIONS, expand_plan, resolve_plan

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


def test_a_module_with_several_names_is_in_a_plan_once_and_has_one_style():
    model = model_of(3)
    model["layers"][2] = model["layers"][0]
    assert list(expand_plan(model, PLAN)) == [f"layers.{i}.{name}" for i in (0, 1) for name in ("up", "down")]
    assert list(expand_plan(model, {"layers.2.up": PLAN["layers.*.up"], "layers.0.up": PLAN["layers.*.up"]}))
    with pytest.raises(ValueError, match=r"layers\.0 and layers\.2 are one module, .* no style and RowwiseParallel"):
        expand_plan(model, {"layers.2": RowwiseParallel()})


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


def plan_of_a_model(model):
    return {"head": ColwiseParallel()} if isinstance(model, nn.Module) else None


def plan_of_nothing():
    return PLAN


def test_a_plan_function_may_take_the_model_alone_or_nothing():
    assert resolve_plan(model_of(1), f"{__name__}.plan_of_nothing") is PLAN
    assert resolve_plan(model_of(1), f"{__name__}.plan_of_a_model", sequence_parallel=True).keys() == {"head"}
    with pytest.raises(TypeError, match=r"must take \(model, sequence_parallel\)"):
        resolve_plan(model_of(1), f"{__name__}.model_of_three")


def model_of_three(one, two, three):
    raise AssertionError("never called")


def test_the_registry_is_a_mapping_by_class_or_name_that_a_user_may_change():
    class Mine(nn.Module):
        pass

    class Derived(Mine):
        pass

    mine = PARALLELIZE_FUNCTIONS.copy()
    mine[Mine] = plan_by_function
    assert mine[Mine] is mine[Derived] is mine[f"{__name__}.{Mine.__qualname__}"] is plan_by_function
    assert Mine not in PARALLELIZE_FUNCTIONS
    mine.update({Derived: plan_of_a_model})
    assert mine[Derived] is plan_of_a_model
    assert len(mine) == len(PARALLELIZE_FUNCTIONS) + 2
    del mine[Derived]
    assert mine.pop(Mine) is plan_by_function
    assert dict(mine) == dict(PARALLELIZE_FUNCTIONS)
    with pytest.raises(KeyError):
        del mine[Derived]
    with pytest.raises(TypeError, match="wants a function of"):
        mine[Mine] = PLAN
    PARALLELIZE_FUNCTIONS[Mine] = plan_by_function
    try:
        assert "norm" in resolve_plan(Derived(), sequence_parallel=True)
    finally:
        del PARALLELIZE_FUNCTIONS[Mine]


def test_a_brought_plan_that_shards_no_layer_is_refused_with_what_could_be_inferred():
    model = small("llama")
    model._tp_plan, model.model._tp_plan = {"lm_head": "colwise_gather_output"}, {}
    other = type("Other", (nn.Module,), {"forward": lambda self, input_ids: self.inner(input_ids).logits})()
    other.inner, other.config, other._tp_plan = model, model.config, {"inner.lm_head": "colwise_gather_output"}
    with pytest.raises(ValueError, match=r"nothing of inner\.model\.layers, its largest stack .*q_proj"):
        resolve_plan(other)
    inferred = resolve_plan(other, infer=True)
    assert "inner.model.layers.*.self_attn.q_proj" in inferred


def test_a_plan_is_inferred_when_asked_with_sequence_parallelism_too():
    with pytest.raises(ValueError, match=r"or infer=True"):
        resolve_plan(small("gpt2"))
    assert "transformer.h.*.attn.c_attn" in resolve_plan(small("gpt2"), infer=True)
    assert isinstance(resolve_plan(small("gpt2"), infer=True, sequence_parallel=True)["transformer.h.0"], ParallelStyle)


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
